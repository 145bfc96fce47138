"""How elementwise modular arithmetic runs on a TPU: large blocks of one limb each, whose constants come beside them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels import modular
from pallas_kernels.limbs import LANES, from_rows, to_rows
from pallas_kernels.lowering import Work, launch

# Rows of a block, of several members of the batch: enough that memory, not the start of a program, sets the pace.
ROWS = 1024


def elementwise(
    *operands: jax.Array, function: Callable[..., jax.Array], name: str, interpret: Any = False
) -> jax.Array:
    """function(*arrays, constant, Modulus) elementwise.

    Args:
      operands: (..., L, N) arrays of int32; then q, 1 / q and the constant of each limb, (L, 1).
      interpret: see `launch`.

    Returns:
      (..., L, N) int32.
    """
    *arrays, q, inverse, constant = operands
    shape = arrays[0].shape
    rows = min(ROWS, -(-shape[-1] // LANES))
    blocks = [to_rows(a, rows) for a in arrays]
    batch, limbs, height, _ = blocks[0].shape
    members = next(m for m in range(max(1, ROWS // rows), 0, -1) if batch % m == 0)
    block = pl.BlockSpec((members, None, rows, LANES), lambda limb, b, i: (b, limb, i, 0))
    scalar = pl.BlockSpec((None, 1, 1), lambda limb, b, i: (limb, 0, 0))
    out = launch(
        functools.partial(modular.elementwise, operation=function),
        *blocks, *(c[:, :, None] for c in (q, inverse, constant)),
        platform="tpu", interpret=interpret, name=name,
        grid=(limbs, batch // members, height // rows),
        in_specs=[block] * len(blocks) + [scalar] * 3,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(blocks[0].shape, jnp.int32),
        work=Work(arrays[0].size, (len(arrays) + 1) * arrays[0].nbytes, blocks[0].size),
    )  # fmt: skip
    return from_rows(out, shape)
