"""How depthwise convolution runs on a TPU.

Slabs are (8 images, 128 channels), one vector register, so that rows and columns are plain addresses: any tap, stride
or dilation is an aligned load, taps in the padding are skipped, and odd heights and widths waste nothing. That is the
layout (height, width, batch, channels), which XLA gives convolutions too, so that it can often leave out the
transposition. Few images are cut into vertical strips, which fill the 8 places; few channels share the 128 lanes with
those of other images.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernels.depthwise_conv import Slab, correlate, correlate_gradient
from pallas_kernels.lowering import Work, launch
from pallas_kernels.windows import Axis, Blocks, Gather, Strips

IMAGES, LANES = 8, 128
# What every TPU since v4 has, less what the compiler keeps for itself.
VMEM_BYTES = 14 << 20
# Multiply-adds in the code of a program, all unrolled: what compiles within seconds.
CODE_BUDGET = 14_500
# Columns, of the image or of the kernel, that are accumulated together: the other registers hold a row of weights.
TILE = 14
# Groups of images in one iteration of the loop over them.
GROUPS = 4
# From this many equal rows on, a loop over them with all taps unrolled beats a loop over the taps of each.
EQUAL_ROWS = 4
# Cycles, measured on v5e: to start a program, to start an iteration of a loop, to reduce one sum over the images, to
# unpack a slab.
PROGRAM, ITERATION, REDUCTION, UNPACKING = 250, 12, 6, 0.75
# Multiply-adds of registers, and bytes from HBM, in a cycle.
MULTIPLY_ADDS, BANDWIDTH = 2 * 0.96, 545


class Plan(NamedTuple):
    """How a launch cuts its arrays.

    fold: images that share the lanes.
    groups: of slabs in a program: of channels, or of images where they are summed over.
    unroll: rows, of the kernel or of pixels, in one iteration of the inner loop.
    """

    blocks: Blocks
    strips: Strips
    fold: int
    groups: int
    unroll: int

    def slabs(self, n: int, c: int) -> tuple[int, int]:
        """How many slabs of images, and of channels, the arrays hold."""
        return -(-n * self.strips.count // (self.fold * IMAGES)), -(-self.fold * c // LANES)


def convolve(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, rows: Gather, cols: Gather, *,
    dtype: Any = None, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """A depthwise convolution, or with transposed axes its input gradient.

    Args:
      x: (N, sources of rows, sources of cols, C); w: (KH, KW, C); bias: (C,) or None.
      dtype: of the result; x's by default.
      interpret: see `launch`.

    Returns:
      (N, targets of rows, targets of cols, C).
    """
    n, _, _, c = x.shape
    dtype = jnp.dtype(dtype or x.dtype)
    x = x.astype(_loadable(x.dtype))
    plan = _plan(n, c, x.dtype.itemsize, rows, cols, gradient=False)
    if plan is None:
        parts = [
            convolve(x, w[taps], b, part, cols, dtype=jnp.float32, interpret=interpret)
            for b, (taps, part) in zip((bias, None), _halves(rows), strict=True)
        ]
        return sum(parts).astype(dtype)
    blocks, strips, fold, groups, unroll = plan
    columns = strips.columns
    slabs = _to_slabs(x, strips, fold)
    *_, images, lanes = slabs.shape
    weights = [_to_lanes(a, fold, lanes) for a in (w, jnp.zeros((1, c)) if bias is None else bias[None])]

    def block_of_kind(refs: Any, block: int) -> None:
        correlate(
            *refs, slab=_channel_slab(groups), rows=blocks.rows(block), cols=columns,
            tile=_even(len(columns), TILE), unroll=unroll, unrolled_rows=EQUAL_ROWS,
        )  # fmt: skip

    wide = _wide(x.dtype, (blocks.window, strips.window, IMAGES, LANES * groups))
    out = launch(
        lambda *refs: _each_kind(blocks, functools.partial(block_of_kind, _widen(refs, len(wide)))),
        slabs, *weights,
        platform="tpu", interpret=interpret, name="depthwise_conv" + "_input_gradient" * rows.transposed,
        grid=(images // IMAGES, lanes // (LANES * groups), blocks.count),
        in_specs=[_window_spec(blocks, strips, IMAGES, LANES * groups), *(_whole_spec(a, groups) for a in weights)],
        out_specs=_block_spec(blocks, strips, IMAGES, LANES * groups),
        out_shape=jax.ShapeDtypeStruct((rows.targets, strips.size, images, lanes), _loadable(dtype)),
        scratch_shapes=wide,
        work=_work(n, c, plan, x.nbytes + n * rows.targets * cols.targets * c * dtype.itemsize + w.nbytes),
    )  # fmt: skip
    return _from_slabs(out, n, c, cols.targets, strips, fold).astype(dtype)


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
    x, g = (a.astype(_loadable(a.dtype)) for a in (x, g))
    plan = _plan(n, c, x.dtype.itemsize, Gather(rows), Gather(cols), gradient=True)
    if plan is None:
        halves = _halves(Gather(rows))
        return jnp.concatenate(
            [weight_gradient(x, g, part.axis, cols, interpret=interpret) for _, part in halves]
        )
    blocks, strips, fold, groups, unroll = plan
    columns = strips.kernel_columns
    slabs, cotangents = (_to_slabs(a, s, fold) for a, s in ((x, strips), (g, strips.of_targets())))
    lanes, programs = slabs.shape[-1], slabs.shape[-2] // (IMAGES * groups)
    # Reducing the sums over images takes longer than writing them, once for all of the images.
    sums = (rows.kernel, cols.kernel * (IMAGES if groups > 1 else 1))

    areas = (blocks.window, strips.window), (blocks.size, strips.size)
    wide = _wide(x.dtype, *((*sizes, IMAGES * groups, LANES) for sizes in areas))

    def block_of_kind(refs: Any, block: int) -> None:
        correlate_gradient(
            *refs, slab=_image_slab(groups), rows=blocks.kernel_rows(block), cols=columns,
            tile=_even(len(columns), TILE), unroll=unroll, unroll_groups=GROUPS,
        )  # fmt: skip

    partial_sums = launch(
        lambda *refs: _each_kind(blocks, functools.partial(block_of_kind, _widen(refs, len(wide)))),
        slabs, cotangents,
        platform="tpu", interpret=interpret, name="depthwise_conv_weight_gradient",
        grid=(programs, lanes // LANES, blocks.count),
        in_specs=[spec(blocks, strips, IMAGES * groups, LANES) for spec in (_window_spec, _block_spec)],
        out_specs=pl.BlockSpec((None, *sums, LANES), lambda s, c, b: (s * blocks.count + b, 0, 0, c)),
        out_shape=jax.ShapeDtypeStruct((programs * blocks.count, *sums, lanes), jnp.float32),
        scratch_shapes=wide,
        work=_work(n, c, plan, x.nbytes + g.nbytes + rows.kernel * cols.kernel * c * 4),
    )  # fmt: skip
    total = partial_sums.sum(0)[..., : fold * c]
    return total.reshape(rows.kernel, cols.kernel, -1, c).sum(2)


def _channel_slab(groups: int) -> Slab:
    lanes = lambda group: pl.ds(group * LANES, LANES)  # noqa: E731
    return Slab(
        (IMAGES, LANES), lambda row, column, group: (row, column, slice(None), lanes(group)), lanes, groups
    )


def _image_slab(groups: int) -> Slab:
    def at(row: Any, column: Any, group: Any) -> tuple[Any, ...]:
        first = group * IMAGES if isinstance(group, int) else pl.multiple_of(group * IMAGES, IMAGES)
        return row, column, pl.ds(first, IMAGES)

    return Slab((IMAGES, LANES), at, groups=groups)


@functools.lru_cache(maxsize=4096)
def _plan(n: int, c: int, itemsize: int, rows: Gather, cols: Gather, *, gradient: bool) -> Plan | None:
    """The plan of the fewest estimated cycles whose blocks fit in VMEM; None if no plan does."""
    costs = (
        (_launch_cycles(n, c, itemsize, plan, gradient), plan)
        for strips in _strip_choices(cols)
        if _width(strips, gradient) <= CODE_BUDGET
        for blocks in _block_choices(rows)
        for unroll in (1, 2, 4, 64)
        for fold in {1, *(f for f in (2, 4, 8, 16, 32) if f <= n * strips.count and f * c <= 8 * LANES)}
        for groups in _group_choices(n, c, Plan(blocks, strips, fold, 1, unroll), gradient)
        for plan in (Plan(blocks, strips, fold, groups, unroll),)
        if _vmem_bytes(plan, itemsize, gradient) <= VMEM_BYTES
    )
    return min(costs, key=lambda cost: cost[0], default=(0, None))[1]


def _group_choices(n: int, c: int, plan: Plan, gradient: bool) -> Iterator[int]:
    """Groups that divide the slabs and whose code stays within its budget.

    Groups of images are looped over, which only code without another loop can be. All images or none: other blocks
    are not contiguous, and a copy of them takes the DMA engine one more dimension.
    """
    code, _, has_loop = _program(plan.blocks, plan.strips, plan.unroll, gradient)
    images, channels = plan.slabs(n, c)
    if code > CODE_BUDGET:
        return
    yield 1
    if not gradient:
        yield from (g for g in range(2, 9) if channels % g == 0 and g * code <= CODE_BUDGET)
    elif not has_loop and images > 1:
        yield images


def _strip_choices(cols: Gather) -> Iterator[Strips]:
    periods = -(-cols.targets // cols.period)
    sizes = {
        -(-periods // count) * cols.period for count in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 256, 1024)
    }
    yield from (Strips(cols, min(size, cols.targets)) for size in sorted(sizes, reverse=True))


def _block_choices(rows: Gather) -> Iterator[Blocks]:
    yield Blocks(rows, rows.targets)
    sizes = (size * rows.period for size in (32, 28, 24, 16, 14, 12, 8, 7, 4, 2, 1))
    yield from (Blocks(rows, size) for size in sizes if size < rows.targets)


def _program(blocks: Blocks, strips: Strips, unroll: int, gradient: bool) -> tuple[int, float, bool]:
    """Multiply-adds in the code for a slab; cycles for all of its blocks; whether the code holds a loop."""
    tiles = -(-(strips.gather.axis.kernel if gradient else strips.size) // TILE)
    width = _width(strips, gradient)
    code, cycles, has_loop = 0, 0.0, False
    for same, copies, iterations, rows in _loops(blocks, gradient):
        unrolled = unroll if rows == 1 else 1
        chunks = iterations // unrolled
        inline = iterations if chunks < 2 else unrolled + iterations % unrolled
        code += copies * inline * rows * width
        has_loop |= chunks > 1
        overhead = tiles * ITERATION * (chunks if chunks > 1 else 0)
        cycles += same * copies * (iterations * rows * width / MULTIPLY_ADDS + overhead)
    return code, cycles, has_loop


@functools.lru_cache(maxsize=4096)
def _width(strips: Strips, gradient: bool) -> int:
    """Multiply-adds between one row of pixels and one of the kernel."""
    return sum(t.hi - t.lo for t in (strips.kernel_columns if gradient else strips.columns))


@functools.lru_cache(maxsize=4096)
def _loops(blocks: Blocks, gradient: bool) -> list[tuple[int, int, int, int]]:
    """(blocks that run it, times that it stands in the code, iterations, rows of each) for every loop."""
    loops = []
    for block, same in blocks.kinds().items():
        if gradient:
            loops += [(len(same), 1, t.hi - t.lo, 1) for t in blocks.kernel_rows(block)]
            continue
        for r in blocks.rows(block):
            taps = r.taps.hi - r.taps.lo
            over_rows = r.count >= EQUAL_ROWS
            loops.append((len(same), 1, r.count, taps) if over_rows else (len(same), r.count, taps, 1))
    return loops


def _launch_cycles(n: int, c: int, itemsize: int, plan: Plan, gradient: bool) -> float:
    """Arithmetic or memory, whichever takes longer; the first and the last block, which nothing hides; copies."""
    blocks, strips, fold, groups, unroll = plan
    slabs = math.prod(plan.slabs(n, c))
    programs = slabs // groups * blocks.count
    _, cycles, _ = _program(blocks, strips, unroll, gradient)
    start = PROGRAM + UNPACKING * groups * _widened_slabs(plan, itemsize, gradient)
    if gradient:
        start += REDUCTION * (groups == 1) * blocks.gather.axis.kernel * strips.gather.axis.kernel
        cycles += ITERATION * blocks.gather.axis.kernel / GROUPS * (groups > 1)
    exposed = _block_bytes(plan, itemsize, gradient) / BANDWIDTH
    pixel = slabs * IMAGES * LANES * itemsize / BANDWIDTH
    copied = (
        0 if strips.count == fold == 1 and n % IMAGES == c % LANES == 0 else pixel * blocks.gather.sources
    )
    return max(slabs * cycles + programs * start, programs * exposed) + exposed + 2 * copied * strips.window


def _widened_slabs(plan: Plan, itemsize: int, gradient: bool) -> int:
    """Slabs of a group that a program unpacks."""
    if itemsize >= 4:
        return 0
    blocks, strips, *_ = plan
    return blocks.window * strips.window + gradient * blocks.size * strips.size


def _block_bytes(plan: Plan, itemsize: int, gradient: bool) -> int:
    """Of all blocks of a program."""
    blocks, strips, _, groups, _ = plan
    rows, cols = blocks.gather.axis.kernel, strips.gather.axis.kernel
    if gradient:
        kernel = rows * (cols * IMAGES if groups > 1 else -(-cols // 8) * 8)
    else:
        kernel = groups * rows * -(-cols // 8) * 8
    slabs = groups * IMAGES * (blocks.window * strips.window + blocks.size * strips.size)
    return LANES * (slabs * itemsize + kernel * 4)


def _vmem_bytes(plan: Plan, itemsize: int, gradient: bool) -> int:
    """Two buffers of every block, and what is unpacked."""
    unpacked = 4 * plan.groups * IMAGES * LANES * _widened_slabs(plan, itemsize, gradient)
    return 2 * _block_bytes(plan, itemsize, gradient) + unpacked


def _work(n: int, c: int, plan: Plan, nbytes: int) -> Work:
    rows, strips = plan.blocks.gather.axis, plan.strips
    return Work(
        flops=2 * n * c * rows.pairs * strips.gather.axis.pairs,
        bytes=nbytes,
        padded_flops=2 * math.prod(plan.slabs(n, c)) * IMAGES * LANES * rows.pairs * _width(strips, False),
    )


def _to_slabs(x: jax.Array, strips: Strips, fold: int) -> jax.Array:
    """(N, H, W, C) -> (H, columns of a strip, strips and images, lanes), the last two filled up to whole slabs."""
    c = x.shape[-1]
    x = strips.cut(x)
    x = jnp.pad(x, ((0, -x.shape[0] % (IMAGES * fold)), (0, 0), (0, 0), (0, 0)))
    x = x.transpose(1, 2, 0, 3).reshape(*x.shape[1:3], -1, fold * c)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % LANES)))


def _from_slabs(o: jax.Array, n: int, c: int, width: int, strips: Strips, fold: int) -> jax.Array:
    h, size, *_ = o.shape
    o = o[..., : fold * c].reshape(h, size, -1, c)[:, :, : n * strips.count]
    o = o.reshape(h, size, strips.count, n, c).transpose(3, 0, 2, 1, 4)
    return o.reshape(n, h, -1, c)[:, :, :width]


def _loadable(dtype: Any) -> Any:
    """TPUs can't even load float16; float32 holds all of it, bfloat16 would not."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _wide(dtype: Any, *blocks: tuple[int, ...]) -> list[Any]:
    """Scratch for blocks of a narrow dtype in float32, so that a slab is unpacked once and not for every tap."""
    return [pltpu.VMEM(shape, jnp.float32) for shape in blocks if dtype.itemsize < 4]


def _widen(refs: Sequence[Any], count: int) -> Sequence[Any]:
    """The Refs with the first `count` copied to the scratch at their end, which takes their place."""
    operands, wide = refs[: len(refs) - count], refs[len(refs) - count :]
    for narrow, copy in zip(operands, wide, strict=False):
        copy[...] = narrow[...].astype(jnp.float32)
    return *wide, *operands[count:]


def _to_lanes(a: jax.Array, fold: int, lanes: int) -> jax.Array:
    """Channels repeated for every image that shares the lanes, in float32."""
    tiled = jnp.tile(a.astype(jnp.float32), (1,) * (a.ndim - 1) + (fold,))
    return jnp.pad(tiled, ((0, 0),) * (a.ndim - 1) + ((0, lanes - tiled.shape[-1]),))


def _whole_spec(a: jax.Array, groups: int) -> pl.BlockSpec:
    return pl.BlockSpec((*a.shape[:-1], LANES * groups), lambda s, c, b: (0,) * (a.ndim - 1) + (c,))


def _block_spec(blocks: Blocks, strips: Strips, images: int, lanes: int) -> pl.BlockSpec:
    return pl.BlockSpec((blocks.size, strips.size, images, lanes), lambda s, c, b: (b, 0, s, c))


def _window_spec(blocks: Blocks, strips: Strips, images: int, lanes: int) -> pl.BlockSpec:
    """Overlapping windows of rows; Pallas wants all dimensions in elements then."""
    shape = (blocks.window, strips.window, images, lanes)
    if blocks.count == 1:
        return pl.BlockSpec(shape, lambda s, c, b: (0, 0, s, c))
    return pl.BlockSpec(
        tuple(map(pl.Element, shape)), lambda s, c, b: (blocks.start(b), 0, s * images, c * lanes)
    )


def _each_kind(blocks: Blocks, run: Any) -> None:
    """Run the code of the kind of block that this program is."""
    block = pl.program_id(2)
    for first, same in blocks.kinds().items():
        mine = (block >= same.start) & (block < same.stop)
        pl.when(True if len(same) == blocks.count else mine)(functools.partial(run, first))


def _halves(rows: Gather) -> list[tuple[slice, Gather]]:
    """The upper and the lower half of the kernel: what does not fit at once runs one after the other."""
    axis, middle = rows.axis, rows.axis.kernel // 2
    return [
        (slice(lo, hi), rows._replace(axis=axis.part(lo, hi)))
        for lo, hi in ((0, middle), (middle, axis.kernel))
    ]


def _even(count: int, most: int) -> int:
    """The size of the fewest equal parts of at most `most`."""
    return -(-count // -(-count // most))
