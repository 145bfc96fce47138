"""How convolution by Fourier transforms runs on an NVIDIA GPU.

All sizes are powers of two, as Triton wants them. A program holds a sequence in its registers; what doesn't fit there
takes one more pass over memory, or two.
"""

import math
from typing import Any

import jax

from pallas_kernels import fourier
from pallas_kernels.fourier import Lags, Plan

# Sides of a matrix that Triton multiplies.
SMALLEST = 16
# The longest sequence of one kernel, and the largest factor of an outer pass.
LONGEST, OUTER = 1 << 12, 1 << 7
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
    outer: tuple[int, ...] = ()
    skips = mask is not None and points == length <= LONGEST // 2
    if skips:
        points *= 2
    while points > LONGEST:
        n = min(OUTER, max(SMALLEST, points // LONGEST))
        outer, points = (*outer, n), points // n
    columns = 1 << (points.bit_length() - 1) // 2
    rows = points // columns
    kept = tuple(map(_power_of_two, fourier.kept(mask, rows, columns), (rows, columns))) if skips else None
    plan = Plan(
        outer=outer, rows=rows, columns=columns, batch=1, channels=1, block=1,
        outer_columns=max(SMALLEST, OUTER_BLOCK // max(1, *outer, 0)), parts=parts, kept=kept,
        num_warps=max(1, min(8, points // 512)),
    )  # fmt: skip
    return plan.with_block(batch, BLOCK)


def _power_of_two(kept: tuple[int, ...], size: int) -> tuple[int, ...]:
    """With as many more as Triton needs; the spectrum is zero there."""
    count = max(SMALLEST, 1 << (len(kept) - 1).bit_length())
    return tuple(sorted([*kept, *(k for k in range(size) if k not in kept)][:count]))
