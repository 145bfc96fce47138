"""How basis conversions run on an NVIDIA GPU: small tiles, whose digit sums stay in registers."""

from typing import Any

import jax

from pallas_kernels import limbs

# A tile of the result; 32 is also the least number of terms that a product of int8 takes.
LIMBS, COLUMNS, WARPS = 32, 64, 4


def basis_conversion(*operands: jax.Array, **options: Any) -> jax.Array:
    """See `limbs.convert`."""
    return limbs.convert(
        *operands, rows=LIMBS, columns=COLUMNS, limbs=LIMBS, platform="cuda", num_warps=WARPS, **options
    )
