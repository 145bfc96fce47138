"""A causal convolution one step at a time: what a network that writes a sequence needs.

Example:
  >>> import jax.numpy as jnp
  >>> import pallas_kernels as pk
  >>> from pallas_kernels.nn import streaming
  >>> u, k = jnp.arange(12.0).reshape(1, 6, 2), jnp.ones((4, 2))
  >>> y, state = streaming.prefill(u[:, :4], k)
  >>> for t in (4, 5):
  ...     y_t, state = streaming.step(state, u[:, t], k)
  >>> bool(jnp.allclose(y_t, pk.fft_conv(u, k)[:, 5], atol=1e-4))
  True
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ops.fft_conv import fft_conv


def start(batch: int, k: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The state before the first step: as many inputs as the kernel k (K, C) has taps, (batch, K, C), all zero."""
    return jnp.zeros((batch, *k.shape), dtype)


def prefill(
    u: jax.Array, k: jax.Array, *, skip: jax.Array | None = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """All steps of a beginning at once.

    Args:
      u: (B, L, C); k: (K, C); skip: (C,) or None.
      implementation: as in `pallas_kernels.fft_conv`.

    Returns:
      Its causal convolution (B, L, C), and the state after it.
    """
    y = fft_conv(u, k, skip=skip, implementation=implementation)
    return y, jnp.concatenate([start(len(u), k, u.dtype), u], 1)[:, -len(k) :]


def step(
    state: jax.Array, u: jax.Array, k: jax.Array, *, skip: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The next output of the causal convolution, by one product with each tap.

    Args:
      state: (B, K, C), the last inputs; u: (B, C), the next one; k: (K, C); skip: (C,) or None.

    Returns:
      The output (B, C), and the state after it. Equal to `fft_conv` of all inputs up to this one, at its end.
    """
    if state.shape[1:] != k.shape or u.shape != (len(state), k.shape[1]):
        raise ValueError(
            f"got a state of {state.shape}, u of {u.shape} and k of {k.shape}, expected (B, K, C), (B, C) and (K, C)"
        )
    state = jnp.concatenate([state[:, 1:], u[:, None].astype(state.dtype)], 1)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    y = jnp.einsum("bkc,kc->bc", state.astype(wide), k[::-1].astype(wide), precision="highest")
    y = y if skip is None else y + skip.astype(wide) * u.astype(wide)
    return y.astype(u.dtype), state
