"""Modular matrix products in XLA: in bytes, as the kernels do it, and on CPUs in float64."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import lowering
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.kernels import modular
from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.kernels.modular import Modulus

# XLA makes Triton kernels of some shorter sums of int8, of an odd number of terms or of 2, that count them twice.
WHOLE = 32


def filled(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x (..., K) and weights (..., K, N) for products with as many terms, of zeros, as GPUs need: see `WHOLE`."""
    missing = -x.shape[-1] % WHOLE
    if not missing:
        return x, weights
    zeros = [(0, 0)] * (weights.ndim - 2)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]), jnp.pad(
        weights, [*zeros, (0, missing), (0, 0)]
    )


def in_digits(x: jax.Array, weights: jax.Array, m: Modulus, how: Reduction) -> jax.Array:
    """x (L, M, K) int32 @ weights modulo q, canonical, from the digits (L, 4, 4, K, N) of the weights."""
    x, weights = filled(x, weights)

    def one_limb(x: jax.Array, w: jax.Array, *numbers: jax.Array) -> jax.Array:
        m = Modulus(*numbers)
        digits = kernels.digits(modular.centre(x, m) if how.centre else x)
        return modular.canonical(kernels.fold(kernels.times_weights(digits, lambda j, p: w[j, p]), m, how), m)

    return jax.vmap(one_limb)(x, weights, *m)


def in_float64(a: jax.Array, b: jax.Array, q: jax.Array, *, terms: int) -> jax.Array:
    """a (L, M, K) @ b (L, K, N) of canonical uint32, canonical: on a CPU the fastest by far. q: (L, 1, 1) int32.

    Centred residues of 30 bits times halves of such, of 15 bits, sum exactly in the 53 bits of a float64 up to `terms`
    terms: 256, or 128 for the very largest q. This needs no 64-bit types outside.
    """
    with lowering.enable_x64():
        return _in_float64(a, b, q, terms)


@functools.partial(jax.jit, static_argnums=3)
def _in_float64(a: jax.Array, b: jax.Array, q: jax.Array, terms: int) -> jax.Array:
    m = float64_modulus(q)
    a, b = (centred_float64(v, m) for v in (a, b))
    halves = split_float64(b)
    parts = [
        product_float64(a[..., here], [h[..., here, :] for h in halves], m)
        for here in (slice(start, start + terms) for start in range(0, a.shape[-1], terms))
    ]
    return canonical_uint32(parts[0] if len(parts) == 1 else reduce_float64(sum(parts), m), m)


def float64_modulus(q: jax.Array) -> Modulus:
    q = q.astype(jnp.float64)
    return Modulus(q, 1 / q)


def centred_float64(x: jax.Array, m: Modulus) -> jax.Array:
    x = x.astype(jnp.float64)
    return x - jnp.where(x > m.q * 0.5, m.q, 0.0)


def split_float64(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = 2^15 high + low, |low| <= 2^14."""
    high = lax.round(x * 2.0**-15, lax.RoundingMethod.TO_NEAREST_EVEN)
    return high, x - high * 2.0**15


def reduce_float64(x: jax.Array, m: Modulus) -> jax.Array:
    """Integers |x| < 2^53 - q, centred."""
    return x - lax.round(x * m.inverse, lax.RoundingMethod.TO_NEAREST_EVEN) * m.q


def product_float64(a: jax.Array, halves: Sequence[jax.Array], m: Modulus) -> jax.Array:
    """a @ (2^15 halves[0] + halves[1]) modulo q, centred."""
    high, low = (_matmul(a, h) for h in halves)
    return reduce_float64(reduce_float64(high, m) * 2.0**15 + low, m)


def canonical_uint32(x: jax.Array, m: Modulus) -> jax.Array:
    return jnp.where(x < 0, x + m.q, x).astype(jnp.uint32)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)
