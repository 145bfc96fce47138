"""Kernels as long as a sequence from few parameters: a structured global convolution's sum of scales."""

from typing import Literal

import jax
import jax.numpy as jnp

Combine = Literal["cat", "sum"]
Interpolation = Literal["linear", "nearest"]


def sgconv_kernel(
    weights: jax.Array,
    *,
    multiplier: jax.Array | float = 2.0,
    decay: jax.Array | None = None,
    norm: jax.Array | None = None,
    length: int | None = None,
    init_scale: int = 0,
    combine: Combine = "cat",
    interpolation: Interpolation = "linear",
) -> jax.Array:
    """The kernel that a few weights for each of its scales stand for: finer and larger near its start.

    With S scales of d weights each, upsample(w, f) interpolating w to f d taps, and z the init_scale::

        part[i] = multiplier^(S - 1 - i) upsample(w[i], 2^(max(i - 1, 0) + z))    if combine is "cat"
        part[i] = multiplier^(S - 1 - i) upsample(w[i], 2^(i + z))                if combine is "sum"

    they are appended, or summed from their starts, to d 2^(S - 1 + z) taps; then tap t is multiplied by
    (t + 1)^-decay and divided by the norm.

    Args:
      weights: (S, ..., d, C), floating-point.
      multiplier: how much a scale outweighs the next, one for all or (C,).
      decay: (..., 1 or C) exponents, or None.
      norm: (..., 1, C), or None: undivided.
      length: taps to crop to, or to fill up to with zeros; None: as many as there are.
      init_scale: every scale is upsampled by two to the power of it.
      combine: "cat" or "sum".
      interpolation: "linear", between the centres of taps, or "nearest".

    Returns:
      (..., length, C) in the dtype of the weights.

    Raises:
      TypeError: the weights are not an array of floating-point numbers.
      ValueError: they have fewer than three dimensions or none along one, an option is unknown, the length is less
        than 1, or the init_scale less than 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> k = pk.sgconv_kernel(jnp.ones((3, 4, 1)))
      >>> [float(v) for v in k[:, 0]]
      [4.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: Li et al., What Makes Convolutional Models Great on Long Sequence Modeling?, arXiv:2210.09298, section 3.
    """
    if not (hasattr(weights, "dtype") and jnp.issubdtype(weights.dtype, jnp.floating)):
        raise TypeError(
            f"sgconv_kernel: `weights` must be a floating-point array, got {getattr(weights, 'dtype', type(weights))}"
        )
    if weights.ndim < 3 or 0 in weights.shape:
        raise ValueError(f"sgconv_kernel: `weights` must be (S, ..., d, C), got shape {weights.shape}")
    if combine not in ("cat", "sum") or interpolation not in ("linear", "nearest"):
        raise ValueError(
            "sgconv_kernel: `combine` must be 'cat' or 'sum' and `interpolation` 'linear' or 'nearest', "
            f"got {combine!r} and {interpolation!r}"
        )
    if init_scale < 0 or (length is not None and length < 1):
        raise ValueError(
            "sgconv_kernel: `init_scale` must be 0 or more and `length` None or 1 or more, "
            f"got {init_scale} and {length}"
        )
    scales, taps = len(weights), weights.shape[-2] << (len(weights) - 1 + init_scale)
    multiplier = jnp.asarray(multiplier, weights.dtype)
    parts = [
        multiplier ** (scales - 1 - i)
        * _upsample(w, 1 << ((max(i - 1, 0) if combine == "cat" else i) + init_scale), interpolation)
        for i, w in enumerate(weights)
    ]
    kernel = jnp.concatenate(parts, -2) if combine == "cat" else sum(_resized(p, taps) for p in parts)
    if decay is not None:
        t = jnp.arange(1, taps + 1, dtype=weights.dtype)[:, None]
        kernel = kernel * jnp.exp(-decay[..., None, :] * jnp.log(t))
    kernel = _resized(kernel, taps if length is None else length)
    return (kernel if norm is None else kernel / norm).astype(weights.dtype)


def _upsample(w: jax.Array, factor: int, interpolation: Interpolation) -> jax.Array:
    """(..., d, C) -> (..., factor d, C). No gather, whose gradient would be a scatter."""
    if interpolation == "nearest":
        return jnp.repeat(w, factor, -2)
    before = jnp.concatenate([w[..., :1, :], w[..., :-1, :]], -2)
    after = jnp.concatenate([w[..., 1:, :], w[..., -1:, :]], -2)
    # Where the taps of a weight lie, from its centre.
    x = ((jnp.arange(factor, dtype=w.dtype) + 0.5) / factor - 0.5)[:, None]
    w, before, after = (a[..., None, :] for a in (w, before, after))
    near = w * (1 - jnp.abs(x)) + jnp.where(x < 0, before, after) * jnp.abs(x)
    return near.reshape(*near.shape[:-3], -1, near.shape[-1])


def _resized(kernel: jax.Array, length: int) -> jax.Array:
    missing = max(0, length - kernel.shape[-2])
    return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, missing), (0, 0)])[..., :length, :]
