"""How number-theoretic transforms run on a TPU: several polynomials of one limb in a program, weights resident."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.kernels.ntt import transform
from pallas_kernels.lowering import Work, launch

# Rows of all polynomials of a program, which one product takes: what hides the latency of the matrix units.
ROWS = 1024
VMEM_BYTES = 48 << 20


def ntt(
    x: jax.Array, *tables: jax.Array, inverse: bool, how: Reduction, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """A forward or inverse transform of every polynomial.

    Args:
      x: (B, L, R, C) int32.
      tables: left (L, 4, R, 4 R) and right (L, 4, 4, C, C) digits, int8; words and shares of the twiddle factors,
        (L, 2, R, C) int32 and float32; q and 1 / q, (L, 1, 1).
      interpret: see `launch`.

    Returns:
      (B, L, R, C) int32, canonical.
    """
    batch, limbs, rows, columns = x.shape
    count = next(c for c in range(min(max(1, ROWS // rows), batch), 0, -1) if batch % c == 0)
    polynomials = pl.BlockSpec((count, None, rows, columns), lambda limb, b: (b, limb, 0, 0))

    def of_limb(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *a.shape[1:]), lambda limb, b: (limb,) + (0,) * (a.ndim - 1))

    flops = 2 * 16 * x.size * (rows + columns)
    return launch(
        functools.partial(transform, inverse=inverse, how=how),
        x, *tables,
        platform="tpu", interpret=interpret, name="intt" if inverse else "ntt",
        grid=(limbs, batch // count),
        in_specs=[polynomials, *map(of_limb, tables)],
        out_specs=polynomials,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.int32),
        vmem_limit_bytes=VMEM_BYTES,
        work=Work(flops, 2 * x.nbytes + sum(t.nbytes for t in tables), flops),
    )  # fmt: skip
