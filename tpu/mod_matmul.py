"""How modular matrix products run on a TPU: all of K in a block, digits of the known factor resident over the rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.mod_matmul import Reduction, matmul
from pallas_kernels.lowering import Work, launch

LANES = 128
# Of the digits of the known factor in a block, which is there twice.
WEIGHT_BYTES = 8 << 20
VMEM_BYTES = 64 << 20


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
    terms = k + -k % LANES
    rows, columns = _tiles(m, terms, n)
    x = jnp.pad(x, ((0, 0), (0, -m % rows), (0, terms - k)))
    weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, terms - k), (0, -n % columns)))
    scalar = pl.BlockSpec((None, 1, 1), lambda limb, j, i: (limb, 0, 0))
    padded = limbs, x.shape[1], weights.shape[-1]
    out = launch(
        functools.partial(matmul, step=terms, how=how),
        x, weights, q, inverse,
        platform="tpu", interpret=interpret, name="mod_matmul",
        grid=(limbs, padded[2] // columns, padded[1] // rows),
        in_specs=[
            pl.BlockSpec((None, rows, terms), lambda limb, j, i: (limb, i, 0)),
            pl.BlockSpec((None, 4, 4, terms, columns), lambda limb, j, i: (limb, 0, 0, 0, j)),
            scalar, scalar,
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda limb, j, i: (limb, i, j)),
        out_shape=jax.ShapeDtypeStruct(padded, jnp.int32),
        vmem_limit_bytes=VMEM_BYTES // 2,
        work=Work(
            flops=2 * 16 * limbs * m * k * n,
            bytes=limbs * (4 * m * k + 16 * k * n + 4 * m * n),
            padded_flops=2 * 16 * padded[0] * padded[1] * padded[2] * terms,
        ),
    )  # fmt: skip
    return out[:, :m, :n]


def _tiles(m: int, terms: int, n: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = max(1, min(4, WEIGHT_BYTES // (16 * terms * LANES), -(-n // LANES))) * LANES
    most = max(32, min(512, (2 << 20) // (4 * terms)))
    blocks = -(-m // most)
    return -(-m // (blocks * 32)) * 32, columns
