"""How depthwise convolution runs on a TPU.

Slabs are (8 places, 128 lanes), one vector register, so that rows and columns are plain addresses: any tap, stride or
dilation is one load, taps in the padding are skipped, and odd heights and widths waste nothing. The places are images
or strips of one image's columns, channels fill the lanes, and if they fill them badly, several images share them. XLA
would often take longer to transpose or cut arrays like that than the kernel does to convolve them, so programs do it
themselves, with the block in VMEM.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernels.depthwise_conv import correlate, correlate_gradient
from pallas_kernels.lowering import Work, launch
from pallas_kernels.tpu._depthwise_conv_slabs import (
    GROUPS,
    IMAGES,
    LANES,
    ROWS,
    Places,
    Plan,
    Slabs,
    slabs_of,
)
from pallas_kernels.tpu.tiles import cores, vmem_budget, vmem_limit
from pallas_kernels.windows import Axis, Blocks, Gather, Strips, Taps

# Multiply-adds in the code of a program, all unrolled: what compiles within seconds.
CODE_BUDGET = 18_500
# Columns, of the image or of the kernel, that are always accumulated together; and how many registers hold columns of
# the image and a row of weights.
TILE, REGISTERS = 14, 41
# How many blocks of images may share the lanes.
FOLDS = 2, 3, 4, 5, 8, 16
# How many rows are computed together at most.
TOGETHER = 2
# From this many equal rows on, a loop over them with all taps unrolled beats a loop over the taps of each, unless that
# is so much code at once that the compiler runs out of registers.
EQUAL_ROWS, STRAIGHT = 4, 4000
# Rows from which on it takes longer to unroll all that stand apart in the code than four at a time.
MANY_ROWS = 9
# Cycles, measured on v5e: to start a program, to start an iteration of a loop, to reduce one sum over the images, to
# fetch the code of a multiply-add.
PROGRAM, ITERATION, REDUCTION, CODE = 250, 12, 0.5, 0.3
# To gather a register of pixels or put it back: as it lies, with strips apart, turned; and if it is folded, or only
# converted amid the multiply-adds.
GATHERING: dict[Places, float] = {"batch": 1, "strips": 2, "images": 4}
FOLDING, AMID = 4, 0.55
# Cycles, as XLA estimates them, to copy a register of pixels from the layout that it gives an array to the one that
# the kernel reads, to pad its channels, and to do more than that.
TRANSPOSITION, PADDING, REGROUPING = 16, 22, 150
# Multiply-adds of registers, and bytes from HBM, in a cycle; what a load adds to the time of the multiply-adds.
MULTIPLY_ADDS, BANDWIDTH, LOAD = 2, 545, 0.16


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
        return functools.reduce(jnp.add, parts).astype(dtype)
    blocks, columns = plan.blocks, plan.strips.columns
    sources, targets = _sides(plan, c, x.dtype.itemsize, gradient=False)
    schedule, come, streams = plan.schedule(c), range(plan.fold), plan.streams
    weights = [_to_lanes(a, plan, sources) for a in (w, *([] if bias is None else [bias[None]]))]
    x_specs, o_specs = sources.specs(come, blocks), targets.specs(schedule.put_back)

    def body(*refs: Any) -> None:
        others = iter(refs)
        x_refs, w_ref = [next(others) for _ in x_specs], next(others)
        b_ref = None if bias is None else next(others)
        o_ref, *scratch = others
        x_ref, x_slabs = x_refs[0], scratch[0] if sources.copied else x_refs
        o_slabs = scratch[-1] if targets.copied else [o_ref]
        step = pl.program_id(3) if plan.steps else 0
        gather, put_back = (
            functools.partial(sources.gather_row, 0, x_ref, x_slabs),
            functools.partial(targets.put_row, 0, o_slabs, o_ref),
        )

        def after_row(group: int, ahead: int, row: Any) -> None:
            """Gather a row that none of those computed together needs, and put one back that is done."""
            if group == 0:
                sources.amid(gather, row + ahead)
            if group == plan.lanes - 1:
                targets.amid(put_back, row - TOGETHER)

        def rows_of_kind(first: int) -> None:
            ahead = blocks.reach(first) + TOGETHER - 1
            if streams:
                sources.gather(0, x_ref, x_slabs, range(ahead))
            for group in schedule.groups(step):
                correlate(
                    sources.of(x_slabs, group), w_ref, b_ref, targets.of(o_slabs, group),
                    slab=sources.slab(group), rows=blocks.rows(first), cols=columns,
                    tile=_tile(plan.strips, gradient=False), unroll=plan.unroll,
                    unrolled_rows=_unrolled_rows(blocks, plan.strips), rows_at_once=_rows_at_once(plan.strips),
                    share=plan.many_taps and _rows_at_once(plan.strips) > 1,
                    after_row=functools.partial(after_row, group, ahead) if streams else None,
                )  # fmt: skip
            if streams:
                done = len(blocks.targets(first))
                targets.put_back(0, o_slabs, o_ref, range(done - TOGETHER, done))

        for block in () if streams else come:
            pl.when(step == block)(functools.partial(sources.gather, block, x_ref, x_slabs))
        each_kind = functools.partial(_each_kind, blocks, pl.program_id(2), rows_of_kind)
        pl.when(schedule.convolves(step))(each_kind)
        for block, last in enumerate(() if streams else schedule.put_back):
            pl.when(step == last)(functools.partial(targets.put_back, block, o_slabs, o_ref))

    nbytes = x.nbytes + n * rows.targets * cols.targets * c * dtype.itemsize + w.nbytes
    images, channels = plan.programs(n, c)
    sizes = rows.targets, plan.pieces.size, images * plan.batch, c
    out = launch(
        body, *[_arrange(x, plan)] * len(x_specs), *weights,
        platform="tpu", interpret=interpret, name="depthwise_conv" + "_input_gradient" * rows.transposed,
        grid=(images, channels, blocks.count, schedule.length),
        in_specs=[*x_specs, *(_whole_spec(a, sources) for a in weights)],
        out_specs=o_specs[0],
        out_shape=jax.ShapeDtypeStruct(plan.ordered(*sizes), _loadable(dtype)),
        scratch_shapes=[*sources.scratch, *targets.scratch],
        sequential=int(plan.steps), vmem_limit_bytes=vmem_limit(),
        work=_work(n, c, plan, nbytes),
    )  # fmt: skip
    return _from_arranged(out, n, c, cols.targets, plan).astype(dtype)


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
    blocks, columns = plan.blocks, plan.strips.kernel_columns
    sources, targets = _sides(plan, c, x.dtype.itemsize, gradient=True)
    schedule, come = plan.schedule(c), range(plan.fold)
    images, channels = plan.programs(n, c)
    # Each core adds up what it computes, one program after the other.
    parts = math.gcd(images, cores())

    x_specs, g_specs = sources.specs(come, blocks), targets.specs(come)

    def body(*refs: Any) -> None:
        others = iter(refs)
        x_refs, g_refs = [next(others) for _ in x_specs], [next(others) for _ in g_specs]
        o_ref, *scratch = others
        x_ref, x_slabs = x_refs[0], scratch[0] if sources.copied else x_refs
        g_ref, g_slabs = g_refs[0], scratch[-1] if targets.copied else g_refs
        image, block_of_rows = pl.program_id(2), pl.program_id(3)
        step = pl.program_id(4) if plan.steps else 0

        @pl.when((image == 0) & (block_of_rows == 0) & (step == 0))
        def start_from_zero() -> None:
            o_ref[...] = jnp.zeros_like(o_ref)

        amid = sources.copied and plan.converts_amid
        for block in () if amid else come:
            pl.when(step == block)(functools.partial(sources.gather, block, x_ref, x_slabs))
            pl.when(step == block)(functools.partial(targets.gather, block, g_ref, g_slabs))

        def rows_of_kind(first: int) -> None:
            kernel_rows = blocks.kernel_rows(first)
            convert = functools.partial(
                _convert, [(sources, x_ref, x_slabs), (targets, g_ref, g_slabs)], kernel_rows
            )
            for group in schedule.groups(step):
                correlate_gradient(
                    sources.of(x_slabs, group), targets.of(g_slabs, group), _Sums(o_ref),
                    slab=sources.slab(group), rows=kernel_rows, cols=columns,
                    tile=_tile(plan.strips, gradient=True), unroll=plan.unroll, unroll_groups=plan.at_once,
                    sum_images=_sum_images, before=functools.partial(convert, group) if amid else None,
                )  # fmt: skip

        each_kind = functools.partial(_each_kind, blocks, block_of_rows, rows_of_kind)
        pl.when(schedule.convolves(step))(each_kind)

    def in_parts(spec: pl.BlockSpec) -> pl.BlockSpec:
        return pl.BlockSpec(
            spec.block_shape, lambda p, c, i, b, t: spec.index_map(p * (images // parts) + i, c, b, t)
        )

    sums = launch(
        body, *[_arrange(x, plan)] * len(x_specs),
        *[_arrange(g, plan._replace(pieces=plan.pieces.of_targets()))] * len(g_specs),
        platform="tpu", interpret=interpret, name="depthwise_conv_weight_gradient",
        grid=(parts, channels, images // parts, blocks.count, schedule.length),
        in_specs=[*map(in_parts, (*x_specs, *g_specs))],
        out_specs=pl.BlockSpec(
            (None, rows.kernel, cols.kernel, sources.width), lambda p, c, i, b, t: (p, 0, 0, c)
        ),
        out_shape=jax.ShapeDtypeStruct(
            (parts, rows.kernel, cols.kernel, channels * sources.width), jnp.float32
        ),
        scratch_shapes=[*sources.scratch, *targets.scratch],
        sequential=3, vmem_limit_bytes=vmem_limit(),
        work=_work(n, c, plan, x.nbytes + g.nbytes + rows.kernel * cols.kernel * c * 4),
    )  # fmt: skip
    total = sums.sum(0)
    return sum((total[..., i * c : (i + 1) * c] for i in range(1, plan.fold)), total[..., :c])


def _convert(
    sides: Sequence[tuple[Slabs, Any, Any]], kernel_rows: Sequence[Taps], group: int, k_row: int, images: Any
) -> None:
    """Convert what no row of the kernel before this one reads: rows of sources and of targets, of some images."""
    for which, (side, ref, slabs) in enumerate(sides):
        reads = [{pair[which] for pair in taps.pairs()} for taps in kernel_rows[: k_row + 1]]
        for row in sorted(reads[-1].difference(*reads[:-1])):
            side.gather_some(group, ref, slabs, row, images)


class _Sums(NamedTuple):
    """A Ref to whose rows is added what is written."""

    ref: Any

    def __setitem__(self, at: Any, rows: jax.Array) -> None:
        self.ref[at] += rows


def _sum_images(slabs: Sequence[jax.Array]) -> list[jax.Array]:
    """The sums over images of eight slabs in a register, image i's place being that of slab i.

    Two slabs exchange every other image and are added, then two such sums every other two, then every other four.
    """
    zeros = jnp.zeros_like(slabs[0])
    place = lax.broadcasted_iota(jnp.int32, zeros.shape, 0)

    def together(slabs: Sequence[jax.Array], step: int) -> jax.Array:
        if not slabs or step == 0:
            return slabs[0] if slabs else zeros
        first, second = (together(half, step // 2) for half in (slabs[:step], slabs[step:]))
        upper = place & step != 0
        return jnp.where(upper, second, first) + pltpu.roll(jnp.where(upper, first, second), step, 0)

    eights = [slabs[i : i + IMAGES] for i in range(0, len(slabs), IMAGES)]
    return [together(eight, IMAGES // 2)[: len(eight)] for eight in eights]


def _plan(n: int, c: int, itemsize: int, rows: Gather, cols: Gather, *, gradient: bool) -> Plan | None:
    """The plan of the fewest estimated cycles whose blocks fit in VMEM; None if no plan does."""
    return _search(n, c, itemsize, rows, cols, gradient, vmem_budget(), cores())


@functools.lru_cache(maxsize=4096)
def _search(
    n: int, c: int, itemsize: int, rows: Gather, cols: Gather, gradient: bool, vmem: int, cores: int
) -> Plan | None:
    costs = (
        (_launch_cycles(n, c, itemsize, plan, gradient, cores), plan)
        for blocks in _block_choices(rows)
        for layout in _layout_choices(n, blocks, cols)
        if _width(layout.strips, gradient) <= CODE_BUDGET
        for unroll in (1, 2, 4, 64)
        if unroll <= 4 or not _has_many_edges(rows)
        for plan in _group_choices(n, c, itemsize, layout._replace(unroll=unroll), gradient)
        if _vmem_bytes(plan, c, itemsize, gradient) <= vmem
    )
    return min(costs, key=lambda cost: cost[0], default=(0, None))[1]


def _has_many_edges(rows: Gather) -> bool:
    """Whether a large kernel reaches over an edge from most rows of pixels, which then read through different taps."""
    kernel = rows.axis.kernel
    return min(kernel, rows.targets) >= MANY_ROWS and rows.targets <= 2 * kernel


def _layout_choices(n: int, blocks: Blocks, cols: Gather) -> Iterator[Plan]:
    """What the places of a slab are."""
    periods = -(-cols.targets // cols.period)
    for count in (1, 2, 4, 8, 16, 32, 64, 256, 1024):
        if count > max(1, periods // 16):
            return
        pieces = Strips(cols, min(-(-periods // count) * cols.period, cols.targets))
        images = n * pieces.count
        size = -(-pieces.size // (IMAGES * cols.period))
        # Loads with such a stride meet in the banks of VMEM.
        size += size * max(cols.period, cols.advance) % 16 == 0
        # Some rows of several images would be copied in one dimension more than a DMA has.
        whole = images % IMAGES == 0 and blocks.count == 1
        kinds: Sequence[Places] = ("batch", "images", "strips") if whole else ("batch", "strips")
        for kind in kinds:
            strips = Strips(cols, size * cols.period) if kind == "strips" else pieces
            if strips.size <= CODE_BUDGET:
                yield Plan(blocks, kind, pieces, strips)


def _group_choices(n: int, c: int, itemsize: int, plan: Plan, gradient: bool) -> Iterator[Plan]:
    """Lanes, and groups of images, whose code stays within its budget.

    Groups of images are looped over, which only code without another loop can be. All images or none: other blocks
    are not contiguous, and a copy of them takes the DMA engine one more dimension.
    """
    code, _, has_loop = _program(plan.blocks, plan.strips, plan.unroll, gradient)
    can_loop = gradient and plan.places == "batch" and not has_loop
    for choice in _lane_choices(n, c, itemsize, plan, gradient):
        images = choice.programs(n, c)[0] if can_loop and choice.fold == 1 else 1
        for groups in {1, images}:
            sizes = (choice._replace(groups=groups, at_once=min(groups, most)) for most in GROUPS)
            yield from [plan for plan in sizes if plan.repeats * code <= CODE_BUDGET][:1]


def _lane_choices(n: int, c: int, itemsize: int, plan: Plan, gradient: bool) -> Iterator[Plan]:
    """Lanes that divide those of the channels, or hold all channels of images that are folded.

    Images are folded where that saves registers. Steps of the grid are for lanes that are alike.
    """
    whole = -(-c // LANES)
    for lanes, steps in itertools.product((part for part in range(1, 9) if whole % part == 0), (False, True)):
        choice = plan._replace(lanes=lanes, steps=steps)
        sources, targets = _sides(choice, c, itemsize, gradient)
        # Columns in a block that are four registers apart meet in the banks of VMEM.
        meet = lanes % 4 == 0 and not (sources.copied or sources.apart)
        alike = lanes > 1 and (c % LANES == 0 or (sources.copied and targets.copied))
        if not meet and (alike or not steps):
            yield choice
    for fold in FOLDS:
        choice = plan._replace(fold=fold, lanes=-(-fold * c // LANES), steps=True)
        if choice.lanes < fold * whole and n * plan.pieces.count % choice.batch == 0:
            yield choice


def _block_choices(rows: Gather) -> Iterator[Blocks]:
    yield Blocks(rows, rows.targets)
    sizes = (size * rows.period for size in (48, 32, 28, 24, 16, 14, 12, 8, 7, 4, 2, 1))
    yield from (Blocks(rows, size) for size in sizes if size < rows.targets)


@functools.lru_cache(maxsize=4096)
def _program(blocks: Blocks, strips: Strips, unroll: int, gradient: bool) -> tuple[int, float, bool]:
    """Multiply-adds in the code for a slab; cycles for all of its blocks; whether the code holds a loop."""
    kernel = strips.gather.axis.kernel
    tiles = -(-(kernel if gradient else strips.size) // _tile(strips, gradient))
    width = _width(strips, gradient)
    loads = strips.window + tiles * (strips.size if gradient else 2 * kernel - 1)
    row_cycles = width / MULTIPLY_ADDS + LOAD * loads
    code, cycles, has_loop = 0, 0.0, False
    for same, copies, iterations, rows in _loops(blocks, strips, gradient):
        unrolled = unroll if rows == 1 else _rows_at_once(strips)
        chunks = iterations // unrolled
        inline = iterations if chunks < 2 else unrolled + iterations % unrolled
        code += copies * inline * rows * width
        has_loop |= chunks > 1
        overhead = tiles * ITERATION * (chunks if chunks > 1 else 0)
        cycles += same * copies * (iterations * rows * row_cycles + overhead)
    return code, cycles, has_loop


def _tile(strips: Strips, gradient: bool) -> int:
    """Columns, of the kernel for its gradient, that are accumulated together."""
    kernel = strips.gather.axis.kernel
    return _even(kernel, TILE) if gradient else _even(strips.size, max(TILE, REGISTERS - kernel))


def _rows_at_once(strips: Strips) -> int:
    """Rows of few columns that the registers of a tile hold together: their sums don't wait for each other."""
    return max(1, min(TOGETHER, TILE // strips.size))


@functools.lru_cache(maxsize=4096)
def _width(strips: Strips, gradient: bool) -> int:
    """Multiply-adds between one row of pixels and one of the kernel."""
    return sum(t.hi - t.lo for t in (strips.kernel_columns if gradient else strips.columns))


@functools.lru_cache(maxsize=4096)
def _unrolled_rows(blocks: Blocks, strips: Strips) -> int:
    """From how many equal rows on all of their taps are unrolled."""
    straight = blocks.gather.axis.kernel * _width(strips, False) * _rows_at_once(strips)
    return EQUAL_ROWS if straight <= STRAIGHT else blocks.size + 1


@functools.lru_cache(maxsize=4096)
def _inline_rows(blocks: Blocks, strips: Strips) -> int:
    """How many rows' code stands in a program."""
    most = _unrolled_rows(blocks, strips)
    counts = ([r.count for r in blocks.rows(block)] for block in blocks.kinds())
    return max(sum(n if n < most else _rows_at_once(strips) for n in rows) for rows in counts)


@functools.lru_cache(maxsize=4096)
def _loops(blocks: Blocks, strips: Strips, gradient: bool) -> list[tuple[int, int, int, int]]:
    """(blocks that run it, times that it stands in the code, iterations, rows of each) for every loop."""
    loops = []
    for block, same in blocks.kinds().items():
        if gradient:
            loops += [(len(same), 1, t.hi - t.lo, 1) for t in blocks.kernel_rows(block)]
            continue
        for r in blocks.rows(block):
            taps = r.taps.hi - r.taps.lo
            over_rows = r.count >= _unrolled_rows(blocks, strips)
            loops.append((len(same), 1, r.count, taps) if over_rows else (len(same), r.count, taps, 1))
    return loops


def _launch_cycles(n: int, c: int, itemsize: int, plan: Plan, gradient: bool, cores: int) -> float:
    """Arithmetic or memory, whichever takes longer; the first and the last block, which nothing hides; code; copies."""
    programs = math.prod(plan.programs(n, c)) * plan.blocks.count
    rows, cols = plan.blocks.gather, plan.strips.gather
    code, cycles, _ = _program(plan.blocks, plan.strips, plan.unroll, gradient)
    sides = _sides(plan, c, itemsize, gradient)
    start = PROGRAM * plan.schedule(c).length + _gathering_cycles(plan, sides, itemsize, gradient)
    if gradient:
        start += REDUCTION * plan.lanes * rows.axis.kernel * cols.axis.kernel
        cycles += ITERATION * rows.axis.kernel / plan.at_once * (plan.groups > 1)
    exposed = (sum(side.moved_bytes(itemsize) for side in sides) + _kernel_bytes(plan)) / BANDWIDTH
    registers = max(1.0, n / IMAGES) * -(-c // LANES)
    copies = registers * (
        rows.sources * cols.sources * _copy_cycles(n, c, cols.sources, plan)
        + rows.targets * cols.targets * _copy_cycles(n, c, cols.targets, plan)
    )
    once = exposed + CODE * plan.repeats * code + copies
    of_one_core = -(-programs // cores) / programs
    arithmetic = of_one_core * (plan.slabs(n, c) * cycles + programs * start)
    return max(arithmetic, programs * plan.fold * exposed) + once


def _gathering_cycles(plan: Plan, sides: Sequence[Slabs], itemsize: int, gradient: bool) -> float:
    """For what a program gathers and puts back, unless it does so amid the convolution of other rows."""
    if plan.streams and not gradient:
        return 0
    registers = sum(side.nbytes(4) for side in sides if side.copied) / (IMAGES * LANES * 4)
    if gradient and plan.converts_amid:
        return AMID * registers
    # Eight images fill half of a register of 16-bit numbers.
    halves = 2 if plan.places == "batch" and plan.groups == 1 and itemsize < 4 else 1
    return registers * (FOLDING * plan.fold if plan.fold > 1 else GATHERING[plan.places] * halves)


def _copy_cycles(n: int, c: int, columns: int, plan: Plan) -> float:
    """For each register of an array, what XLA needs to arrange it for the launch."""
    if plan.pieces.count > 1 or (plan.places == "batch" and n % IMAGES):
        return REGROUPING
    batch_is_minor = columns % IMAGES != 0 and n % IMAGES == 0
    padded = _missing_channels(c, plan) > 0
    return TRANSPOSITION * (batch_is_minor != (plan.places == "batch")) + PADDING * padded


def _sides(plan: Plan, c: int, itemsize: int, gradient: bool) -> tuple[Slabs, Slabs]:
    """The slabs of the sources and of the targets."""
    sources = slabs_of(plan, c, itemsize, targets=False)
    return sources, slabs_of(plan, c, itemsize, targets=True, written=not gradient)


def _kernel_bytes(plan: Plan) -> int:
    rows, cols = plan.blocks.gather.axis.kernel, plan.strips.gather.axis.kernel
    return 4 * plan.lanes * LANES * rows * -(-cols // 8) * 8


def _vmem_bytes(plan: Plan, c: int, itemsize: int, gradient: bool) -> int:
    """Two buffers of every block, the scratch, and what turns."""
    sides = _sides(plan, c, itemsize, gradient)
    rows = ROWS if gradient or not plan.streams else max(ROWS, _inline_rows(plan.blocks, plan.strips))
    blocks = sum(side.nbytes(itemsize) for side in sides) + _kernel_bytes(plan)
    scratch = sum(math.prod(s.shape) * 4 for side in sides for s in side.scratch)
    return 2 * blocks + scratch + sum(side.turned_bytes(rows) for side in sides)


def _work(n: int, c: int, plan: Plan, nbytes: int) -> Work:
    rows, strips = plan.blocks.gather.axis, plan.strips
    return Work(
        flops=2 * n * c * rows.pairs * strips.gather.axis.pairs,
        bytes=nbytes,
        padded_flops=2 * plan.slabs(n, c) * IMAGES * LANES * rows.pairs * _width(strips, False),
    )


def _arrange(x: jax.Array, plan: Plan) -> jax.Array:
    """The array that the launch reads, filled up to whole programs."""
    x = plan.pieces.cut(x)
    n, *_, c = x.shape
    x = jnp.pad(x, ((0, -n % plan.batch), (0, 0), (0, 0), (0, _missing_channels(c, plan))))
    return x.transpose(1, 2, 0, 3) if plan.places == "batch" else x


def _missing_channels(c: int, plan: Plan) -> int:
    """How many fill up the last program. It may lack some, unless blocks of rows overlap: those must be whole."""
    return -c % plan.channels(c) if plan.blocks.count > 1 else 0


def _from_arranged(o: jax.Array, n: int, c: int, width: int, plan: Plan) -> jax.Array:
    o = o.transpose(2, 0, 1, 3) if plan.places == "batch" else o
    count, (_, h, size, _) = plan.pieces.count, o.shape
    o = o[: n * count, ..., :c].reshape(count, n, h, size, c).transpose(1, 2, 0, 3, 4)
    return o.reshape(n, h, count * size, c)[:, :, :width]


def _loadable(dtype: Any) -> Any:
    """TPUs can't even load float16; float32 holds all of it, bfloat16 would not."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _to_lanes(a: jax.Array, plan: Plan, slabs: Slabs) -> jax.Array:
    """(..., channels) in float32, for every folded image, which fill up the lanes of programs."""
    a = jnp.tile(a.astype(jnp.float32), plan.fold)
    missing = -a.shape[-1] % slabs.width if plan.fold > 1 else 0
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])


def _whole_spec(a: jax.Array, slabs: Slabs) -> pl.BlockSpec:
    return pl.BlockSpec((*a.shape[:-1], slabs.width), lambda s, c, b, _: (0,) * (a.ndim - 1) + (c,))


def _each_kind(blocks: Blocks, block: Any, run: Callable[[int], None]) -> None:
    """Run the code of the kind that a block is of."""
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
