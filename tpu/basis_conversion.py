"""How basis conversions run on a TPU: all limbs of some columns in a program."""

from typing import Any

import jax

from pallas_kernels import limbs

# Columns of a block; the weights stay.
COLUMNS = 2048
# What the limbs of either basis are filled up to: rows of a tile of int8.
LIMBS = 32


def basis_conversion(x: jax.Array, *operands: jax.Array, **options: Any) -> jax.Array:
    """See `limbs.convert`."""
    n = x.shape[-1]
    columns = min(COLUMNS, n + -n % limbs.LANES)
    return limbs.convert(x, *operands, rows=None, columns=columns, limbs=LIMBS, platform="tpu", **options)
