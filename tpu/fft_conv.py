"""How convolution by Fourier transforms runs on a TPU.

Lanes hold 128 columns. As many sequences share the left matrix as fill 128 rows, so that matrix units are full at any
length. What doesn't fit in VMEM takes one more pass over memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import fourier
from pallas_kernels.fourier import Gates, Lags, Plan

LANES = 128
# The longest sequence of one kernel, and what is left for the kernel of a longer one.
LONGEST, INNER = 1 << 16, 1 << 14
# Elements of a program's sequences, and columns of a block of an outer pass.
BLOCK, OUTER_BLOCK = 1 << 17, 1 << 17


def convolve(
    v: jax.Array, h: jax.Array, gates: Gates, *,
    lags: Lags, parts: int, mask: Any, transposed: bool, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `fourier.convolve`."""
    plan = _plan(v.shape, parts, mask)
    x, gates = jax.tree.map(_loadable, (v, gates))
    y = fourier.convolve(x, h, gates, lags, plan, transposed=transposed, platform="tpu", interpret=interpret)
    return y.astype(v.dtype)


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, *,
    lags: Lags, parts: int, mask: Any, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Gates]:  # fmt: skip
    """See `fourier.gradients`."""
    plan = _plan(v.shape, parts, mask)
    x, of_gates, g = jax.tree.map(_loadable, (v, gates, g))
    dv, dh, dgates = fourier.gradients(x, h, of_gates, g, lags, plan, platform="tpu", interpret=interpret)
    return dv.astype(v.dtype), dh, jax.tree.map(lambda d, gate: d.astype(gate.dtype), dgates, gates)


def _plan(shape: tuple[int, ...], parts: int, mask: Any) -> Plan:
    batch, length, channels = shape
    outer: tuple[int, ...] = ()
    kept = None
    if mask is not None and length % LANES == 0 and length <= LONGEST // 2:
        rows, columns = 2 * length // LANES, LANES
        kept = fourier.kept(mask, rows, columns)
    elif length > LONGEST:
        outer, rows, columns = (-(-length // INNER),), LANES, LANES
    else:
        columns = min(-(-length // 8) * 8, LANES) if length <= LONGEST // 2 else 2 * LANES
        rows = -(-length // columns)
    group = 1 if outer else max(1, LANES // rows)
    in_batch = min(group, -(-batch // (2 if kept else 1)))
    plan = Plan(
        outer=outer, rows=rows, columns=columns, batch=in_batch, channels=min(channels, group // in_batch),
        block=1, outer_columns=max(LANES, OUTER_BLOCK // max(1, *outer, 0) // LANES * LANES), parts=parts, kept=kept,
    )  # fmt: skip
    return plan.with_block(batch, BLOCK)


def _loadable(x: jax.Array) -> jax.Array:
    """TPUs can't even load float16; float32 holds all of it, bfloat16 would not."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
