"""Products of blocks as cuBLAS computes them: summed in float32, and rounded to the dtype of the operands at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kernels.monarch_matmul import exact


def dot(
    a: jax.Array,
    b: jax.Array,
    contracted: tuple[int, int],
    batch: tuple[int, int],
    *,
    dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """The products of each block of a with that of b.

    Args:
      contracted, batch: an axis of a and one of b.
      dtype: of the result, if not a's.
      interpret: whether this is for a CPU, where XLA doesn't sum all products of bfloat16 in float32.

    Returns:
      (blocks, the other axis of a, the other axis of b).
    """
    dtype = dtype or a.dtype
    if interpret:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    axes = tuple(((i,), (j,)) for i, j in (contracted, batch))
    summed = a.dtype if interpret else dtype
    return lax.dot_general(a, b, axes, precision=exact(a), preferred_element_type=summed).astype(dtype)
