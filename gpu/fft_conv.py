"""How convolution by Fourier transforms runs on an NVIDIA GPU.

All sizes are powers of two, as Triton wants them. A program holds a sequence in its registers; what doesn't fit there
takes one more pass over memory, or two.
"""

from typing import Any

import jax

from pallas_kernels import fourier
from pallas_kernels.fourier import Lags, Plan

# Sides of a matrix that Triton multiplies; rows that fill the warps of a program.
SMALLEST, FULL = 16, 64
# The longest sequence of one kernel that spills no registers, by the number of parts; the largest outer factor.
LONGEST, OUTER = {1: 1 << 12, 2: 1 << 11, 3: 1 << 10}, 1 << 6
# Elements of a program's sequences, and of a block of an outer pass.
BLOCK, OUTER_BLOCK = 1 << 14, 1 << 12


def convolve(
    v: jax.Array, h: jax.Array, *, lags: Lags, parts: int, mask: Any, transposed: bool, interpret: Any = False
) -> jax.Array:
    """See `fourier.convolve`."""
    plan = _plan(*v.shape, parts, mask)
    return fourier.convolve(v, h, lags, plan, transposed=transposed, platform="cuda", interpret=interpret)


def gradients(
    v: jax.Array, h: jax.Array, g: jax.Array, *, lags: Lags, parts: int, mask: Any, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """See `fourier.gradients`."""
    plan = _plan(*v.shape, parts, mask)
    return fourier.gradients(v, h, g, lags, plan, platform="cuda", interpret=interpret)


def _plan(batch: int, length: int, channels: int, parts: int, mask: Any) -> Plan:
    del channels
    points = max(SMALLEST**2, 1 << (length - 1).bit_length())
    longest, outer = LONGEST[parts], ()
    skips = mask is not None and points == length <= longest // 2
    if skips:
        points *= 2
    while points > longest:
        outer = (*outer, min(OUTER, max(SMALLEST, points // longest)))
        points //= outer[-1]
    rows = max(SMALLEST, min(2 * FULL, points // SMALLEST))
    columns = points // rows
    kept = tuple(map(_power_of_two, fourier.kept(mask, rows, columns), (rows, columns))) if skips else None
    group = 1 if outer or kept else max(1, FULL // rows)
    plan = Plan(
        outer=outer, rows=rows, columns=columns, batch=group, channels=1, block=1,
        outer_columns=max(SMALLEST, OUTER_BLOCK // max(1, *outer, 0)), parts=parts, kept=kept,
        num_warps=4 if rows <= FULL else 8,
    )  # fmt: skip
    return plan.with_block(batch, BLOCK)


def _power_of_two(kept: tuple[int, ...], size: int) -> tuple[int, ...]:
    """With as many more as Triton needs; the spectrum is zero there."""
    count = max(SMALLEST, 1 << (len(kept) - 1).bit_length())
    return tuple(sorted([*kept, *(k for k in range(size) if k not in kept)][:count]))
