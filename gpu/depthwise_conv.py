"""How depthwise convolution runs on an NVIDIA GPU.

Slabs are (images, channels) with 4 bytes for every thread of a program, read where they lie in (batch, height,
width, channels). A program computes a row of the image, or a few together, a tile of columns at a time in registers;
taps in the padding are skipped or read zeros, so nothing is padded but channels that no block divides.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.depthwise_conv import (
    Slab,
    correlate,
    correlate_gradient,
    correlate_together,
    multiply_adds,
)
from pallas_kernels.lowering import Work, launch
from pallas_kernels.windows import Axis, Gather, Rows, Strips, Taps

# Columns, of the image or of the kernel, that are accumulated together in a thread's registers.
TILE = 14
# Multiply-adds, and 8 times the columns, in the code for one row of the kernel: what compiles within seconds.
CODE_BUDGET = 2_000
# Pixels that the code for a chunk of a row reads for the weight gradient, and its multiply-adds of a thread, unless it
# is the row.
GRADIENT_READS, GRADIENT_CODE = 64, 240
# Reads of pixels and of padding, by those of pixels, for which there is one code for all tiles of a row, and how many
# multiply-adds there are otherwise: less may as well stay apart.
MOST_READ, APART = 1.2, 150
# Columns of the strips that wider images are cut into.
STRIP = 56
# Programs that fill a GPU.
PROGRAMS = 1024
# Rows that a program may compute together, the most of their sums in a thread and of multiply-adds in their code, and
# the threads that fill a GPU.
TOGETHER, SUMS, TOGETHER_CODE, FULL = (4, 2), 64, 800, 2**16


class Plan(NamedTuple):
    """How a launch cuts its arrays: slabs of `images` by `channels`, and the strips of wide images."""

    images: int
    channels: int
    strips: Strips

    def num_warps(self, itemsize: int) -> int:
        """Threads of 4 bytes each, of which a warp reads a whole line of memory."""
        return max(1, self.images * self.channels * itemsize // 128)


def convolve(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, rows: Gather, cols: Gather, *, interpret: Any = False
) -> jax.Array:
    """A depthwise convolution, or with transposed axes its input gradient.

    Args:
      x: (N, sources of rows, sources of cols, C); w: (KH, KW, C); bias: (C,) or None.
      interpret: see `launch`.

    Returns:
      (N, targets of rows, targets of cols, C), in x's dtype.
    """
    n, _, _, c = x.shape
    plan = _plan(n, c, x.dtype.itemsize, cols, width=cols.axis.kernel)
    strips = plan.strips
    tile = -(-strips.size // -(-strips.size // TILE))
    several = strips.size > tile and multiply_adds(strips.columns, tile) > APART
    columns, outside = _alike(strips.columns, strips.all_columns, several)
    pieces, w, bias = (
        _whole_blocks(a, plan) for a in (strips.cut(x), w, jnp.zeros(c) if bias is None else bias)
    )
    count, height, width, lanes = pieces.shape
    slab = _slab(plan)._replace(width=width if outside else None)
    threads = count * rows.targets * lanes * x.dtype.itemsize // 4
    together = _together(rows, columns, tile, x.dtype.itemsize, threads)
    size = together * rows.period
    blocks = -(-rows.targets // size)

    # Python's integers would be of 64 bits under x64, and indices are of 32.
    def slab_and_block(i: Any) -> tuple[Any, Any]:
        return jax.lax.div(i, jnp.int32(blocks)), jax.lax.rem(i, jnp.int32(blocks))

    def body(*refs: Any) -> None:
        moved = slab_and_block(pl.program_id(0))[1] * together * rows.advance
        taps = [rows.taps(r).shifted(-moved) for r in range(rows.period)]
        if together > 1:
            correlate_together(
                *refs, slab=slab, taps=taps[0], sources=rows.sources, count=together, cols=columns, tile=tile,
            )  # fmt: skip
            return
        kinds = [Rows(r, 1, t.inside(rows.sources)) for r, t in enumerate(taps)]
        correlate(
            *refs, slab=slab, rows=kinds, cols=columns,
            tile=tile, unroll=1, unrolled_rows=2, loop_tiles=True,
        )  # fmt: skip

    out = launch(
        body, pieces, w, bias[None],
        platform="cuda", interpret=interpret, name="depthwise_conv" + "_input_gradient" * rows.transposed,
        grid=(count // plan.images * blocks, lanes // plan.channels),
        in_specs=[
            pl.BlockSpec((plan.images, height, width, plan.channels), lambda i, c: (slab_and_block(i)[0], 0, 0, c)),
            pl.BlockSpec((*w.shape[:2], plan.channels), lambda i, c: (0, 0, c)),
            pl.BlockSpec((1, plan.channels), lambda i, c: (0, c)),
        ],
        out_specs=pl.BlockSpec(
            (plan.images, size, strips.size, plan.channels),
            lambda i, c: (*slab_and_block(i), 0, c),
        ),
        out_shape=jax.ShapeDtypeStruct((count, blocks * size, strips.size, lanes), x.dtype),
        num_warps=plan.num_warps(x.dtype.itemsize),
        work=_work(n, c, rows.axis, plan, pieces, x.nbytes + n * rows.targets * cols.targets * c * x.dtype.itemsize),
    )  # fmt: skip
    out = out[: n * strips.count, : rows.targets, :, :c].reshape(
        strips.count, n, rows.targets, strips.size, c
    )
    return out.transpose(1, 2, 0, 3, 4).reshape(n, rows.targets, -1, c)[:, :, : cols.targets]


def weight_gradient(
    x: jax.Array, g: jax.Array, rows: Axis, cols: Axis, *, interpret: Any = False
) -> jax.Array:
    """The gradient of a depthwise convolution with respect to its weight, summed over images and pixels.

    Args:
      x: (N, H, W, C), the input; g: (N, OH, OW, C), the cotangent of the output.
      interpret: see `launch`.

    Returns:
      (KH, KW, C), float32.
    """
    n, _, _, c = x.shape
    plan = _plan(n, c, x.dtype.itemsize, Gather(cols), width=cols.kernel)
    strips = plan.strips
    tile = -(-cols.kernel // -(-cols.kernel // TILE))
    most = min((GRADIENT_READS - tile) // 2, GRADIENT_CODE * x.dtype.itemsize // (4 * tile))
    chunk = -(-strips.size // (1 if 2 * strips.size <= GRADIENT_READS else -(-strips.size // most)))
    columns, outside = _alike(strips.kernel_columns, strips.all_kernel_columns, strips.size > chunk)
    pieces, cotangents = (_whole_blocks(s.cut(a), plan) for a, s in ((x, strips), (g, strips.of_targets())))
    count, *_, lanes = pieces.shape
    slabs = count // plan.images
    busy = -(-PROGRAMS // (rows.kernel * lanes // plan.channels))
    parts = min(slabs, next(p for p in range(busy, slabs + busy) if slabs % p == 0 or p >= slabs))
    images = count // parts
    slab = _slab(plan, slabs // parts)._replace(width=pieces.shape[2] if outside else None)

    def body(*refs: Any) -> None:
        taps = rows.tap_range(jax.lax.rem(pl.program_id(0), jnp.int32(rows.kernel)))
        correlate_gradient(*refs, slab=slab, rows=[taps], cols=columns, tile=tile, unroll=1, chunk=chunk)

    def spec(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (images, *a.shape[1:3], plan.channels),
            lambda i, c: (jax.lax.div(i, jnp.int32(rows.kernel)), 0, 0, c),
        )

    partial_sums = launch(
        body, pieces, cotangents,
        platform="cuda", interpret=interpret, name="depthwise_conv_weight_gradient",
        grid=(parts * rows.kernel, lanes // plan.channels),
        in_specs=[spec(pieces), spec(cotangents)],
        out_specs=pl.BlockSpec((1, cols.kernel, plan.channels), lambda i, c: (i, 0, c)),
        out_shape=jax.ShapeDtypeStruct((parts * rows.kernel, cols.kernel, lanes), jnp.float32),
        num_warps=plan.num_warps(x.dtype.itemsize),
        work=_work(n, c, rows, plan, pieces, x.nbytes + g.nbytes),
    )  # fmt: skip
    return partial_sums.reshape(parts, rows.kernel, cols.kernel, lanes)[..., :c].sum(0)


def _alike(inside: list[Taps], everywhere: list[Taps], several: bool) -> tuple[list[Taps], bool]:
    """What columns read, and whether of the padding too: for little more, pieces of them then read alike."""
    pairs, all_pairs = (sum(t.hi - t.lo for t in taps) for taps in (inside, everywhere))
    outside = several and pairs < all_pairs <= MOST_READ * pairs
    return (everywhere, True) if outside else (inside, False)


def _together(rows: Gather, cols: Sequence[Taps], tile: int, itemsize: int, threads: int) -> int:
    """How many neighbouring rows a program computes, that each pixel is read for.

    threads: of 4 bytes each, those of all programs if each computed a row.
    """
    if (rows.period, rows.advance, rows.axis.dilation) != (1, 1, 1):
        return 1
    code, sums = multiply_adds(cols, tile), tile * 4 // itemsize
    fitting = (
        r for r in TOGETHER
        if r <= rows.axis.kernel and rows.targets % r == 0
        and r * code <= TOGETHER_CODE and r * sums <= SUMS and threads >= r * FULL
    )  # fmt: skip
    return next(fitting, 1)


def _plan(n: int, c: int, itemsize: int, cols: Gather, *, width: int) -> Plan:
    """Channels by what they waste, in lanes of padding, idle threads and half-used sectors of memory."""
    widest = CODE_BUDGET // (width + 8)
    columns = cols.targets if cols.targets <= widest else max(TILE, min(STRIP, widest))
    count = -(-cols.targets // columns)
    strips = Strips(cols, min(cols.targets, -(-cols.targets // (count * cols.period)) * cols.period))

    def images(channels: int) -> int:
        return max(1, min(32 // channels, math.gcd(n * strips.count, 32)))

    def cost(channels: int) -> float:
        idle = max(1.0, 32 / (images(channels) * channels)) * max(1.0, 32 / (channels * itemsize))
        return -(-c // channels) * channels * idle

    channels = min((128, 64, 32, 16, 8), key=cost)
    return Plan(images(channels), channels, strips)


def _slab(plan: Plan, groups: int = 1) -> Slab:
    def at(row: Any, column: Any, group: Any) -> tuple[Any, ...]:
        return pl.ds(group * plan.images, plan.images), row, column, slice(None)

    return Slab((plan.images, plan.channels), at, groups=groups)


def _whole_blocks(a: jax.Array, plan: Plan) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % plan.channels)])


def _work(n: int, c: int, rows: Axis, plan: Plan, pieces: jax.Array, nbytes: int) -> Work:
    columns = sum(t.hi - t.lo for t in plan.strips.columns)
    return Work(
        flops=2 * n * c * rows.pairs * plan.strips.gather.axis.pairs,
        bytes=nbytes + 4 * c * rows.kernel * plan.strips.gather.axis.kernel,
        padded_flops=2 * pieces.shape[0] * pieces.shape[-1] * rows.pairs * columns,
    )
