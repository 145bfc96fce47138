"""How modular matrix products run on a TPU: all of K in a block, digits of the known factor resident over the rows."""

from typing import Any

import jax

from pallas_kernels import limbs
from pallas_kernels.limbs import LANES

# Terms of the sums in one step: what is written out in full stays small enough to compile.
STEP = 512
# Of the digits of the known factor in a block, which is there twice.
WEIGHT_BYTES = 8 << 20
VMEM_BYTES = 32 << 20


def mod_matmul(x: jax.Array, weights: jax.Array, *modulus: jax.Array, **options: Any) -> jax.Array:
    """See `limbs.matmul`."""
    (_, m, k), n = x.shape, weights.shape[-1]
    step = min(STEP, k + -k % LANES)
    rows, columns = _tiles(m, k + -k % step, n)
    return limbs.matmul(
        x, weights, *modulus, rows=rows, columns=columns, step=step, platform="tpu", vmem_limit_bytes=VMEM_BYTES,
        **options,
    )  # fmt: skip


def _tiles(m: int, terms: int, n: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = max(1, min(4, WEIGHT_BYTES // (16 * terms * LANES), -(-n // LANES))) * LANES
    most = max(32, min(512, (2 << 20) // (4 * terms)))
    blocks = -(-m // most)
    return -(-m // (blocks * 32)) * 32, columns
