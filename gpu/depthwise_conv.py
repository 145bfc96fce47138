"""How depthwise convolution runs on an NVIDIA GPU.

Slabs are (images, channels) with 4 bytes for every thread of a program, read where they lie in (batch, height,
width, channels). A program computes a tile of columns in a row of the image, or in a few rows together, in registers;
taps in the padding are skipped or read zeros, so nothing is padded but channels that no block divides.

That is mostly multiply-adds, of pixels that several rows share. Programs wait for memory all the same, so there are
many small ones. Indices go through `within`, so that the loads of a row share one address.
"""

import functools
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
    correlate_gradient_together,
    correlate_together,
    equal_chunks,
    equal_tiles,
    gradient_multiply_adds,
    multiply_adds,
)
from pallas_kernels.lowering import Work, gpu_arithmetic, launch, within
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
# Rows that a program may compute together, the most of their sums in a thread and of multiply-adds in their code, and
# the threads that fill a GPU.
TOGETHER, SUMS, TOGETHER_CODE, FULL = (4, 2), 64, 800, 2**16
# The same of kernel rows in the weight gradient; the outputs of a chunk, the fewest rows of pixels that a program
# sums over, and the warps that fill a GPU.
GRADIENT_SUMS, GRADIENT_TOGETHER_CODE, CHUNK, FEWEST_ROWS, WARPS = 64, 1_500, 14, 4, 4096


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
    pieces, w, *biases = (_whole_blocks(a, plan) for a in (strips.cut(x), w, bias) if a is not None)
    count, height, width, lanes = pieces.shape
    slab = _slab(plan, interpret)._replace(width=width if outside else None)
    consecutive = (rows.transposed, rows.axis.stride, rows.axis.dilation) == (False, 1, 1)
    tiles = equal_tiles(columns, tile) if consecutive else 1
    threads = count * rows.targets * tiles * lanes * x.dtype.itemsize // 4
    together = _together(rows, columns, tile, x.dtype.itemsize, threads) if consecutive else 1
    size = together * rows.period
    blocks = -(-rows.targets // size)
    place = functools.partial(_place, sizes=(count // plan.images, blocks, tiles))
    channel = functools.partial(within, size=lanes // plan.channels)

    def body(x_ref: Any, w_ref: Any, *others: Any) -> None:
        refs = x_ref, w_ref, others[0] if biases else None, others[-1]
        _, block, part = place(pl.program_id(0))
        taps = [rows.taps(r).shifted(-block * together * rows.advance) for r in range(rows.period)]
        if consecutive:
            correlate_together(
                *refs, slab=slab, taps=taps[0], sources=rows.sources, count=together, cols=columns, tile=tile,
                part=part if tiles > 1 else None,
            )  # fmt: skip
            return
        kinds = [Rows(r, 1, t.inside(rows.sources)) for r, t in enumerate(taps)]
        correlate(
            *refs, slab=slab, rows=kinds, cols=columns,
            tile=tile, unroll=1, unrolled_rows=2, loop_tiles=True,
        )  # fmt: skip

    # Weights lie as pixels do, once for every image of a slab; otherwise threads would have to exchange them.
    w = jnp.broadcast_to(w[:, :, None], (*w.shape[:2], plan.images, lanes))
    out = launch(
        body, pieces, w, *(b[None] for b in biases),
        platform="cuda", interpret=interpret, name="depthwise_conv" + "_input_gradient" * rows.transposed,
        grid=(count // plan.images * blocks * tiles, lanes // plan.channels),
        in_specs=[
            pl.BlockSpec((plan.images, height, width, plan.channels), lambda i, c: (place(i)[0], 0, 0, channel(c))),
            pl.BlockSpec((*w.shape[:3], plan.channels), lambda i, c: (0, 0, 0, channel(c))),
            *(pl.BlockSpec((1, plan.channels), lambda i, c: (0, channel(c))) for _ in biases),
        ],
        out_specs=pl.BlockSpec(
            (plan.images, size, strips.size, plan.channels), lambda i, c: (*place(i)[:2], 0, channel(c))
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
    n, height, _, c = x.shape
    plan = _plan(n, c, x.dtype.itemsize, Gather(cols), width=cols.kernel)
    strips = plan.strips
    tile = -(-cols.kernel // -(-cols.kernel // TILE))
    consecutive = (rows.stride, rows.dilation) == (1, 1)
    chunk = _chunk(strips.size, tile, x.dtype.itemsize, consecutive)
    columns, outside = _alike(strips.kernel_columns, strips.all_kernel_columns, strips.size > chunk)
    pieces, cotangents = (_whole_blocks(s.cut(a), plan) for a, s in ((x, strips), (g, strips.of_targets())))
    count, *_, lanes = pieces.shape
    warps = lanes // plan.channels * plan.num_warps(x.dtype.itemsize)
    chunks, most = 1, 1
    if consecutive:
        chunks = equal_chunks(columns, tile, chunk)
        most = _most_kernel_rows(columns, tile, chunk, x.dtype.itemsize)
    parts = _parts(rows, count // plan.images, chunks, warps, most)
    together = -(-rows.kernel // parts.kernel_rows)
    images, size = count // parts.images, -(-height // parts.rows)
    slab = _slab(plan, interpret, images // plan.images)._replace(width=pieces.shape[2] if outside else None)
    place = functools.partial(_place, sizes=parts)
    channel = functools.partial(within, size=lanes // plan.channels)

    def body(*refs: Any) -> None:
        _, row, part, block = place(pl.program_id(0))
        options = {"slab": slab, "cols": columns, "tile": tile, "chunk": chunk}
        if not consecutive:
            correlate_gradient(*refs, rows=[rows.tap_range(block)], unroll=1, **options)
            return
        first = block * together - rows.pad_lo
        correlate_gradient_together(
            *refs, first=first, count=together, live=rows.kernel - block * together, targets=rows.out,
            lo=jax.lax.max(row * size, first),
            hi=jax.lax.min(jax.lax.min((row + 1) * size, height), first + (together - 1 + rows.out)),
            part=part if parts.columns > 1 else None, **options,
        )  # fmt: skip

    def spec(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (images, *a.shape[1:3], plan.channels), lambda i, c: (place(i)[0], 0, 0, channel(c))
        )

    partial_sums = launch(
        body, pieces, cotangents,
        platform="cuda", interpret=interpret, name="depthwise_conv_weight_gradient",
        grid=(math.prod(parts), lanes // plan.channels),
        in_specs=[spec(pieces), spec(cotangents)],
        out_specs=pl.BlockSpec((together, cols.kernel, plan.channels), lambda i, c: (i, 0, channel(c))),
        out_shape=jax.ShapeDtypeStruct((math.prod(parts) * together, cols.kernel, lanes), jnp.float32),
        num_warps=plan.num_warps(x.dtype.itemsize),
        work=_work(n, c, rows, plan, pieces, x.nbytes + g.nbytes),
    )  # fmt: skip
    sums = partial_sums.reshape(-1, parts.kernel_rows * together, cols.kernel, lanes)
    return sums[:, : rows.kernel, :, :c].sum(0)


class _Parts(NamedTuple):
    """Into how many parts the weight gradient's work is cut along each axis: a program has one of each."""

    images: int
    rows: int
    columns: int
    kernel_rows: int


def _parts(rows: Axis, slabs: int, chunks: int, warps: int, most: int) -> _Parts:
    """Enough for as many warps as fill a GPU; of kernel rows as few as may be, since those in a part share reads.

    chunks: parts of the columns. warps: of a part. most: kernel rows of a part; if 1, pixels' rows stay together.
    """
    pieces = max(1, rows.size // FEWEST_ROWS) if most > 1 else 1
    blocks = -(-rows.kernel // most)
    while blocks < rows.kernel and slabs * pieces * chunks * blocks * warps < WARPS:
        blocks += 1
    blocks = -(-rows.kernel // -(-rows.kernel // blocks))
    busy = -(-WARPS // (chunks * blocks * warps))
    images = min(slabs, next(p for p in range(busy, slabs + busy) if slabs % p == 0 or p >= slabs))
    return _Parts(images, max(1, min(pieces, busy // images)), chunks, blocks)


def _most_kernel_rows(columns: Sequence[Taps], tile: int, chunk: int, itemsize: int) -> int:
    """How many neighbouring kernel rows a program may compute, that each pixel is read for."""
    sums = GRADIENT_SUMS * itemsize // (4 * tile)
    code = max(1, gradient_multiply_adds(columns, tile, chunk))
    return max(1, min(sums, GRADIENT_TOGETHER_CODE // code))


def _chunk(size: int, tile: int, itemsize: int, consecutive: bool) -> int:
    """Outputs of a row that are unrolled; `consecutive` kernel rows share what they read."""
    if consecutive:
        return -(-size // -(-size // CHUNK))
    most = min((GRADIENT_READS - tile) // 2, GRADIENT_CODE * itemsize // (4 * tile))
    return -(-size // (1 if 2 * size <= GRADIENT_READS else -(-size // most)))


def _place(i: Any, sizes: Sequence[int]) -> tuple[Any, ...]:
    """A program's place along axes of these sizes, of which the last moves first."""
    places = []
    for size in reversed(sizes):
        # Python's integers would be of 64 bits under x64, and indices are of 32.
        places.append(within(jax.lax.rem(i, jnp.int32(size)), size))
        i = jax.lax.div(i, jnp.int32(size))
    return tuple(reversed(places))


def _alike(inside: list[Taps], everywhere: list[Taps], several: bool) -> tuple[list[Taps], bool]:
    """What columns read, and whether of the padding too: for little more, pieces of them then read alike."""
    pairs, all_pairs = (sum(t.hi - t.lo for t in taps) for taps in (inside, everywhere))
    outside = several and pairs < all_pairs <= MOST_READ * pairs
    return (everywhere, True) if outside else (inside, False)


def _together(rows: Gather, cols: Sequence[Taps], tile: int, itemsize: int, threads: int) -> int:
    """How many neighbouring rows a program computes, that each pixel is read for.

    threads: of 4 bytes each, those of all programs if each computed a row.
    """
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
        return max(1, min(128 // (channels * itemsize), math.gcd(n * strips.count, 32)))

    def cost(channels: int) -> float:
        idle = max(1.0, 32 / (images(channels) * channels)) * max(1.0, 32 / (channels * itemsize))
        return -(-c // channels) * channels * idle

    channels = min((128, 64, 32, 16, 8), key=cost)
    return Plan(images(channels), channels, strips)


def _slab(plan: Plan, interpret: Any, groups: int = 1) -> Slab:
    def at(row: Any, column: Any, group: Any) -> tuple[Any, ...]:
        return pl.ds(group * plan.images, plan.images), row, column, slice(None)

    return Slab(
        (plan.images, plan.channels), at, groups=groups, repeated=True, arithmetic=gpu_arithmetic(interpret)
    )


def _whole_blocks(a: jax.Array, plan: Plan) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % plan.channels)])


def _work(n: int, c: int, rows: Axis, plan: Plan, pieces: jax.Array, nbytes: int) -> Work:
    columns = sum(t.hi - t.lo for t in plan.strips.columns)
    return Work(
        flops=2 * n * c * rows.pairs * plan.strips.gather.axis.pairs,
        bytes=nbytes + 4 * c * rows.kernel * plan.strips.gather.axis.kernel,
        padded_flops=2 * pieces.shape[0] * pieces.shape[-1] * rows.pairs * columns,
    )
