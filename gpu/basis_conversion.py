"""How basis conversions run on an NVIDIA GPU: small tiles, whose digit sums stay in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.basis_conversion import convert
from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.lowering import Work, launch

# A tile of the result; 32 is also the least number of terms that a product of int8 takes.
LIMBS, COLUMNS, WARPS = 32, 64, 4


def basis_conversion(
    x: jax.Array,
    weights: jax.Array,
    q: jax.Array,
    inverse: jax.Array,
    *,
    how: Reduction,
    interpret: Any = False,
) -> jax.Array:
    """weights @ x, with a modulus for every row.

    Args:
      x: (B, K, N) int32, |x| <= 0x7F7F7F7F.
      weights: (4, J, 4, K) int8: digit p, row, byte j of x, column; q, inverse: (J, 1).
      interpret: see `launch`.

    Returns:
      (B, J, N) int32, canonical.
    """
    batch, k, n = x.shape
    j = q.shape[0]
    columns = COLUMNS
    x = jnp.pad(x, ((0, 0), (0, -k % LIMBS), (0, -n % columns)))
    weights = jnp.pad(weights, ((0, 0), (0, -j % LIMBS), (0, 0), (0, -k % LIMBS)))
    terms, limbs = x.shape[1], weights.shape[1]
    weights = weights.reshape(4, limbs, 4 * terms)
    q, inverse = (jnp.pad(a, ((0, limbs - j), (0, 0)), mode="edge") for a in (q, inverse))
    rows = LIMBS
    scalar = pl.BlockSpec((rows, 1), lambda c, i, b: (i, 0))
    out = launch(
        functools.partial(convert, step=LIMBS, how=how),
        x, weights, q, inverse,
        platform="cuda", interpret=interpret, name="basis_conversion", num_warps=WARPS,
        grid=(x.shape[2] // columns, limbs // rows, batch),
        in_specs=[
            pl.BlockSpec((None, terms, columns), lambda c, i, b: (b, 0, c)),
            pl.BlockSpec((4, rows, 4 * terms), lambda c, i, b: (0, i, 0)),
            scalar, scalar,
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda c, i, b: (b, i, c)),
        out_shape=jax.ShapeDtypeStruct((batch, limbs, x.shape[2]), jnp.int32),
        work=Work(
            flops=2 * 16 * batch * j * k * n,
            bytes=4 * batch * (k + j) * n + 16 * j * k,
            padded_flops=2 * 16 * batch * limbs * terms * x.shape[2],
        ),
    )  # fmt: skip
    return out[:, :j, :n]
