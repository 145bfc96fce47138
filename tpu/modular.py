"""How elementwise modular arithmetic runs on a TPU: large blocks of one limb each, whose constants come beside them."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import limbs

# Rows of a block, of several members of the batch: enough that memory, not the start of a program, sets the pace.
ROWS = 1024


def elementwise(
    *operands: jax.Array, function: Callable[..., jax.Array], name: str, interpret: Any = False
) -> jax.Array:
    """See `limbs.elementwise`."""
    rows = min(ROWS, -(-operands[0].shape[-1] // limbs.LANES))
    return limbs.elementwise(
        operands, function, name, rows=rows, members=max(1, ROWS // rows), platform="tpu", interpret=interpret
    )
