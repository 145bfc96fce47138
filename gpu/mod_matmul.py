"""How modular matrix products run on an NVIDIA GPU: small tiles, whose digit sums stay in registers over all of K."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.mod_matmul import Reduction, matmul
from pallas_kernels.lowering import Work, launch

# A tile of the result, and the terms of its sums in one step: four sums and their operands just fit the registers.
ROWS, COLUMNS, STEP, WARPS = 32, 64, 32, 4


def mod_matmul(
    x: jax.Array, weights: jax.Array, q: jax.Array, inverse: jax.Array, *,
    how: Reduction, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """x @ weights modulo q.

    Args:
      x: (L, M, K) int32; weights: (L, 4, 4, K, N) int8; q, inverse: (L, 1, 1).
      interpret: see `launch`.

    Returns:
      (L, M, N) int32, canonical.
    """
    limbs, m, k = x.shape
    n = weights.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, -m % ROWS), (0, -k % STEP)))
    weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, -k % STEP), (0, -n % COLUMNS)))
    rows, terms, columns = *x.shape[1:], weights.shape[-1]
    scalar = pl.BlockSpec((None, 1, 1), lambda i, j, limb: (limb, 0, 0))
    out = launch(
        functools.partial(matmul, step=STEP, how=how),
        x, weights, q, inverse,
        platform="cuda", interpret=interpret, name="mod_matmul", num_warps=WARPS,
        grid=(rows // ROWS, columns // COLUMNS, limbs),
        in_specs=[
            pl.BlockSpec((None, ROWS, terms), lambda i, j, limb: (limb, i, 0)),
            pl.BlockSpec((None, 4, 4, terms, COLUMNS), lambda i, j, limb: (limb, 0, 0, 0, j)),
            scalar, scalar,
        ],
        out_specs=pl.BlockSpec((None, ROWS, COLUMNS), lambda i, j, limb: (limb, i, j)),
        out_shape=jax.ShapeDtypeStruct((limbs, rows, columns), jnp.int32),
        work=Work(
            flops=2 * 16 * limbs * m * k * n,
            bytes=limbs * (4 * m * k + 16 * k * n + 4 * m * n),
            padded_flops=2 * 16 * limbs * rows * terms * columns,
        ),
    )  # fmt: skip
    return out[:, :m, :n]
