"""Arrays of limbs as kernels take them: (batch, limb, rows of 128 lanes), padded to whole blocks."""

import jax
import jax.numpy as jnp

LANES = 128


def to_rows(a: jax.Array, block: int) -> jax.Array:
    """(..., L, N) -> (B, L, rows, 128), with rows a multiple of `block`."""
    a = a.reshape(-1, *a.shape[-2:])
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[-1] % (block * LANES))))
    return a.reshape(*a.shape[:2], -1, LANES)


def from_rows(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Back to (..., L, N), of which `shape` is."""
    return a.reshape(*a.shape[:2], -1)[..., : shape[-1]].reshape(shape)
