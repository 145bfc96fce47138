"""How number-theoretic transforms run on an NVIDIA GPU: two launches, tile by tile, of the two products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.kernels.ntt import half_transform
from pallas_kernels.lowering import Work, launch

# A tile of the result, and the terms of its sums in one step: four sums and their operands just fit the registers.
ROWS, COLUMNS, STEP, WARPS = 32, 64, 32, 4


def ntt(
    x: jax.Array, left: jax.Array, right: jax.Array, words: jax.Array, shares: jax.Array, q: jax.Array,
    reciprocal: jax.Array, *, inverse: bool, how: Reduction, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """A forward or inverse transform of every polynomial.

    Args:
      x: (B, L, R, C) int32.
      left, right: (L, 4, R, 4 R) and (L, 4, 4, C, C) int8.
      words, shares: of the twiddle factors, (L, 2, R, C) int32 and float32.
      q, reciprocal: q and 1 / q, (L, 1, 1).
      interpret: see `launch`.

    Returns:
      (B, L, R, C) int32, canonical.
    """
    half = functools.partial(_half, m=(q, reciprocal), name="intt" if inverse else "ntt", interpret=interpret)
    (first, weights), (second, others) = [("right", right), ("left", left)][:: 1 if inverse else -1]
    y = half(x, weights, side=first, twiddles=(words, shares), how=how)
    return half(y, others, side=second, twiddles=(), how=how._replace(centre=False))


def _half(
    x: jax.Array, weights: jax.Array, *, side: str, twiddles: tuple[jax.Array, ...], m: tuple[jax.Array, ...],
    name: str, how: Reduction, interpret: Any,
) -> jax.Array:  # fmt: skip
    batch, limbs, rows, columns = x.shape
    tile_rows, tile_columns = min(ROWS, rows), min(COLUMNS, columns)
    row_tiles, tiles = rows // tile_rows, rows // tile_rows * (columns // tile_columns)
    terms = columns if side == "right" else rows

    def place(i: Any) -> tuple[Any, Any]:
        """Row and column of the i-th tile."""
        return jax.lax.rem(i, jnp.int32(row_tiles)), jax.lax.div(i, jnp.int32(row_tiles))

    def tile_of(i: Any, limb: Any, b: Any) -> tuple[Any, ...]:
        return b, limb, *place(i)

    if side == "right":
        data = pl.BlockSpec((None, None, tile_rows, columns), lambda i, limb, b: (b, limb, place(i)[0], 0))
        known = pl.BlockSpec(
            (None, 4, 4, terms, tile_columns), lambda i, limb, b: (limb, 0, 0, 0, place(i)[1])
        )
    else:
        data = pl.BlockSpec((None, None, rows, tile_columns), lambda i, limb, b: (b, limb, 0, place(i)[1]))
        known = pl.BlockSpec((None, 4, tile_rows, 4 * terms), lambda i, limb, b: (limb, 0, place(i)[0], 0))
    factors = [
        pl.BlockSpec((None, 2, tile_rows, tile_columns), lambda i, limb, b: (limb, 0, *place(i)))
    ] * len(twiddles)
    scalar = pl.BlockSpec((None, 1, 1), lambda i, limb, b: (limb, 0, 0))
    tables = weights, *twiddles, *m
    flops = 2 * 16 * x.size * terms
    return launch(
        functools.partial(half_transform, side=side, last=not twiddles, step=min(STEP, terms), how=how),
        x, *tables,
        platform="cuda", interpret=interpret, name=name, num_warps=WARPS,
        grid=(tiles, limbs, batch),
        in_specs=[data, known, *factors, scalar, scalar],
        out_specs=pl.BlockSpec((None, None, tile_rows, tile_columns), tile_of),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.int32),
        work=Work(flops, 2 * x.nbytes + sum(t.nbytes for t in tables), flops),
    )  # fmt: skip
