"""Number-theoretic transforms in XLA: in bytes, as the kernels do it, and on CPUs in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import lowering
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.kernels import modular
from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.kernels.modular import Modulus
from pallas_kernels.ops._mod_matmul_xla import (
    canonical_uint32,
    centred_float64,
    filled,
    float64_modulus,
    reduce_float64,
    split_float64,
)


def in_digits(x: jax.Array, *tables: jax.Array, inverse: bool, how: Reduction) -> jax.Array:
    """What the kernels do to x (B, L, R, C), by the same functions. tables: as for the launchers."""

    def one(x: jax.Array, left: Any, right: Any, words: Any, shares: Any, *numbers: Any) -> jax.Array:
        m = Modulus(*numbers)
        x = modular.centre(x, m) if how.centre else x

        def down_columns(x: jax.Array) -> jax.Array:
            return kernels.fold(kernels.stacked_times(left, x), m, how)

        def along_rows(x: jax.Array) -> jax.Array:
            x, weights = filled(x, right)
            return kernels.fold(kernels.times_weights(kernels.digits(x), lambda j, p: weights[j, p]), m, how)

        first, second = (along_rows, down_columns) if inverse else (down_columns, along_rows)
        return modular.canonical(second(modular.mul_constant(first(x), words, shares, m)), m)

    return jax.vmap(jax.vmap(one), (0, *[None] * len(tables)))(x, *tables)


def in_float64(x: jax.Array, q: jax.Array, tables: Any, *, inverse: bool) -> jax.Array:
    """The same of canonical uint32 in float64: see `_mod_matmul_xla.in_float64`. Sums have up to 256 terms."""
    with lowering.enable_x64():
        return _in_float64(x, q, tables.left, tables.right, tables.twiddles, inverse)


@functools.partial(jax.jit, static_argnums=5)
def _in_float64(
    x: jax.Array, q: jax.Array, left: jax.Array, right: jax.Array, twiddles: jax.Array, inverse: bool
) -> jax.Array:
    # A limb and a polynomial at a time: that stays in the cache.
    of_limb = functools.partial(_limb_in_float64, inverse=inverse)
    return lax.map(of_limb, (x.swapaxes(0, 1), q, left, right, twiddles)).swapaxes(0, 1)


def _limb_in_float64(operands: tuple[jax.Array, ...], inverse: bool) -> jax.Array:
    x, q, *tables = operands
    m = float64_modulus(q)
    left, right, twiddles = (centred_float64(t, m) for t in tables)
    rows, columns = twiddles.shape
    down = jnp.concatenate(split_float64(left), 0)
    along = jnp.concatenate(split_float64(right), 1)
    high, low = split_float64(twiddles)
    multiply = functools.partial(lax.dot, precision=lax.Precision.HIGHEST)

    def whole(upper: jax.Array, lower: jax.Array) -> jax.Array:
        return reduce_float64(reduce_float64(upper, m) * 2.0**15 + lower, m)

    def down_columns(y: jax.Array) -> jax.Array:
        product = multiply(down, y)
        return whole(product[:rows], product[rows:])

    def along_rows(y: jax.Array) -> jax.Array:
        product = multiply(y, along)
        return whole(product[:, :columns], product[:, columns:])

    def transform(y: jax.Array) -> jax.Array:
        first, second = (along_rows, down_columns) if inverse else (down_columns, along_rows)
        y = first(centred_float64(y, m))
        return canonical_uint32(second(whole(y * high, y * low)), m)

    return lax.map(transform, x)
