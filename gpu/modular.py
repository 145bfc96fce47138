"""How elementwise modular arithmetic runs on an NVIDIA GPU: small blocks of one limb each, eight words a thread."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels import modular
from pallas_kernels.limbs import LANES, from_rows, to_rows
from pallas_kernels.lowering import Work, launch

ROWS = 8


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
    blocks = [to_rows(a, ROWS) for a in arrays]
    batch, limbs, height, _ = blocks[0].shape

    def at(i: Any, limb: Any) -> tuple[Any, ...]:
        # The first axis of a grid may be long, the others not.
        steps = jnp.int32(height // ROWS)
        return jax.lax.div(i, steps), limb, jax.lax.rem(i, steps), 0

    block = pl.BlockSpec((None, None, ROWS, LANES), at)
    scalar = pl.BlockSpec((None, 1, 1), lambda i, limb: (limb, 0, 0))
    out = launch(
        functools.partial(modular.elementwise, operation=function),
        *blocks, *(c[:, :, None] for c in (q, inverse, constant)),
        platform="cuda", interpret=interpret, name=name,
        grid=(batch * height // ROWS, limbs),
        in_specs=[block] * len(blocks) + [scalar] * 3,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(blocks[0].shape, jnp.int32),
        work=Work(arrays[0].size, (len(arrays) + 1) * arrays[0].nbytes, blocks[0].size),
    )  # fmt: skip
    return from_rows(out, shape)
