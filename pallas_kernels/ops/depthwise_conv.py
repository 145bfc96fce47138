"""Depthwise convolution in one and two dimensions, with large kernels in mind."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.windows import Axis

Padding = str | int | Sequence[tuple[int, int]]


def depthwise_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    bias: jax.Array | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolve every channel with a kernel of its own."""
    axes, lift = _geometry(x, w, strides, padding, dilation, bias)
    choice = dispatch.choose(implementation)
    arrays = lowering.make_varying(*((x, w) if bias is None else (x, w, bias)))
    x, w, b = (*arrays, None)[:3]
    y = _convolve(lift(x), lift(w, 0), b, axes, choice)
    return y.reshape(x.shape[0], *y.shape[4 - x.ndim + 1 :]) if x.ndim == 3 else y


def reference(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The definition: one shifted, strided product per tap of the kernel, summed."""
    axes, lift = _geometry(x, w, strides, padding, dilation, bias)
    return _shift_and_add(lift(x), lift(w, 0), bias, axes).reshape(
        x.shape[0], *(a.out for a in axes[4 - x.ndim :]), x.shape[-1]
    )


def _shift_and_add(x: jax.Array, w: jax.Array, bias: jax.Array | None, axes: tuple[Axis, Axis]) -> jax.Array:
    rows, cols = axes
    padded = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), (rows.pad_lo, rows.pad_hi, 0), (cols.pad_lo, cols.pad_hi, 0), (0, 0, 0))
    )
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((), accumulator) if bias is None else bias.astype(accumulator)
    for i in range(rows.kernel):
        for j in range(cols.kernel):
            h, v = i * rows.dilation, j * cols.dilation
            tap = padded[:, h : h + rows.stride * (rows.out - 1) + 1 : rows.stride,
                         v : v + cols.stride * (cols.out - 1) + 1 : cols.stride]
            y = y + tap.astype(accumulator) * w[i, j].astype(accumulator)
    return y.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _convolve(x: jax.Array, w: jax.Array, bias: jax.Array | None, axes: tuple[Axis, Axis], choice: Any) -> jax.Array:
    return _shift_and_add(x, w, bias, axes)


def _geometry(x: Any, w: Any, strides: Any, padding: Padding, dilation: Any, bias: Any) -> tuple[Any, Any]:
    """The two spatial axes, and how an array of a 1-D convolution becomes one of a 2-D convolution of height 1."""
    n = x.ndim - 2
    strides, dilation = ((v,) * n if isinstance(v, int) else tuple(v) for v in (strides, dilation))
    size, kernel = x.shape[1:-1], w.shape[:-1]
    if padding == "CAUSAL":
        padding = [(d * (k - 1), 0) for d, k in zip(dilation, kernel, strict=True)]
    elif isinstance(padding, str):
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        padding = lax.padtype_to_pads(size, extent, strides, padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * n
    axes = [Axis(*a, *p) for *a, p in zip(size, kernel, strides, dilation, padding, strict=True)]
    if n == 1:
        return (Axis(1, 1), axes[0]), lambda a, axis=1: jnp.expand_dims(a, axis)
    return tuple(axes), lambda a, axis=1: a


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
