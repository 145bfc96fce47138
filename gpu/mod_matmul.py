"""How modular matrix products run on an NVIDIA GPU: small tiles, whose digit sums stay in registers over all of K."""

from typing import Any

import jax

from pallas_kernels import limbs

# A tile of the result, and the terms of its sums in one step: four sums and their operands just fit the registers.
ROWS, COLUMNS, STEP, WARPS = 32, 64, 32, 4


def mod_matmul(*operands: jax.Array, **options: Any) -> jax.Array:
    """See `limbs.matmul`."""
    return limbs.matmul(
        *operands, rows=ROWS, columns=COLUMNS, step=STEP, platform="cuda", num_warps=WARPS, **options
    )
