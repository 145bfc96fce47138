"""How convolution by Fourier transforms runs on an NVIDIA GPU.

All sizes are powers of two, as Triton wants them. A program holds a sequence in its registers; what doesn't fit there
takes one more pass over memory, or two.
"""

import itertools
import math
from typing import Any

import jax

from pallas_kernels import fourier
from pallas_kernels.fourier import Gates, Lags, Plan

# Sides of a matrix that Triton multiplies; rows that fill the warps of a program.
SMALLEST, FULL = 16, 64
# What leaves a program's threads enough registers: the longest sequence of one kernel, by the number of parts; of one
# between outer passes.
LONGEST, INNER = {1: 4096, 2: 2048, 3: 2048}, {1: 1024, 2: 1024, 3: 512}
# The factors of outer passes, in the order in which they are tried.
OUTER = 32, 16, 64
# Points of an inner sequence from which on threads need eight warps to have registers enough, there and in the passes.
WIDE = 512
# Elements of a program's sequences, and of a block of an outer pass.
BLOCK, OUTER_BLOCK = 1 << 14, 1 << 10


def convolve(
    v: jax.Array, h: jax.Array, gates: Gates, *,
    lags: Lags, parts: int, mask: Any, transposed: bool, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `fourier.convolve`."""
    plan = _plan(v.shape, parts, mask)
    return fourier.convolve(
        v, h, gates, lags, plan, transposed=transposed, platform="cuda", interpret=interpret
    )


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, *,
    lags: Lags, parts: int, mask: Any, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Gates]:  # fmt: skip
    """See `fourier.gradients`."""
    plan = _plan(v.shape, parts, mask)
    return fourier.gradients(v, h, gates, g, lags, plan, platform="cuda", interpret=interpret)


def _plan(shape: tuple[int, ...], parts: int, mask: Any) -> Plan:
    batch, length, _ = shape
    points = max(SMALLEST**2, 1 << (length - 1).bit_length())
    skips = mask is not None and points == length <= LONGEST[parts] // 2
    outer, points = _passes(2 * points if skips else points, parts)
    rows = max(SMALLEST, min(2 * FULL, points // SMALLEST))
    columns = points // rows
    kept = None
    if mask is not None and skips:
        k1, k2 = fourier.kept(mask, rows, columns)
        kept = _power_of_two(k1, rows), _power_of_two(k2, columns)
    group = 1 if outer or kept else max(1, FULL // rows)
    plan = Plan(
        outer=outer, rows=rows, columns=columns, batch=group, channels=1, block=1,
        outer_columns=max(SMALLEST, OUTER_BLOCK // (max(1, *outer, 0) * (1 + (parts == 3)))), parts=parts, kept=kept,
        num_warps=8 if rows > FULL or (outer and points >= WIDE) else 4,
    )  # fmt: skip
    # In a loop over sequences all matrices stay in registers, where several parts or pairs of rows leave them no room.
    return plan.with_block(batch, 1 if parts > 1 or kept or outer else BLOCK)


def _passes(points: int, parts: int) -> tuple[tuple[int, ...], int]:
    """The factors of the fewest outer passes, and the points that they leave, as few as may be."""
    if points <= LONGEST[parts]:
        return (), points
    choices = (
        (factors, points // math.prod(factors))
        for passes in itertools.count(1)
        for factors in itertools.combinations_with_replacement(OUTER, passes)
    )
    return next(c for c in choices if SMALLEST**2 <= c[1] <= INNER[parts])


def _power_of_two(kept: tuple[int, ...], size: int) -> tuple[int, ...]:
    """With as many more as Triton needs; the spectrum is zero there."""
    count = max(SMALLEST, 1 << (len(kept) - 1).bit_length())
    return tuple(sorted([*kept, *(k for k in range(size) if k not in kept)][:count]))
