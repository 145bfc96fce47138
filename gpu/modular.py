"""How elementwise modular arithmetic runs on an NVIDIA GPU: small blocks of one limb each, eight words a thread."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import limbs

ROWS = 8


def elementwise(
    *operands: jax.Array, function: Callable[..., jax.Array], name: str, interpret: Any = False
) -> jax.Array:
    """See `limbs.elementwise`."""
    return limbs.elementwise(
        operands, function, name, rows=ROWS, members=1, platform="cuda", interpret=interpret
    )
