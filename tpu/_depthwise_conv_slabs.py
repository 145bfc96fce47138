"""Where the slabs of a depthwise convolution lie in the blocks of a TPU's program, and how they are gathered there."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kernels.depthwise_conv import Slab, loop
from pallas_kernels.windows import Blocks, Strips

IMAGES, LANES = 8, 128
# Rows that are gathered, or put back, in one iteration.
ROWS = 4
# Groups of images in one iteration of the loop over them, at best and at least: pairs of them fill registers of 16-bit
# numbers.
GROUPS = 4, 2
# Taps from which on a pixel's multiply-adds take longer than to copy it.
MANY_TAPS = 49

Places = Literal["batch", "images", "strips"]


class Schedule(NamedTuple):
    """What the steps of a program are for. Block i of its images is gathered at step i.

    convolved: the step of each group of lanes, when all of its images have come.
    put_back: the step of each block of images, when all of its lanes are convolved.
    """

    convolved: tuple[int, ...]
    put_back: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many steps there are."""
        return self.put_back[-1] + 1

    def convolves(self, step: Any) -> Any:
        """Whether a step is for any lanes."""
        idle = set(range(self.length)).difference(self.convolved)
        return functools.reduce(jnp.logical_and, [step != i for i in idle], True)

    def groups(self, step: Any) -> Sequence[Any]:
        """The groups of lanes that a step is for."""
        in_turn = self.convolved[-1] > 0
        return [_passed(step, self.convolved)] if in_turn else range(len(self.convolved))


def _passed(step: Any, steps: Sequence[int]) -> Any:
    """How many of the steps, of all but the last, come before this one."""
    return sum((step > i).astype(jnp.int32) for i in steps[:-1])


class Plan(NamedTuple):
    """How a launch cuts its arrays.

    places: what the places of a slab are. "batch": images, in arrays of (height, width, batch, channels), which is the
      layout that XLA gives 8 or more images whose width is no multiple of 8; "images": in arrays of (batch, height,
      width, channels); "strips": of the columns of one image in such an array.
    pieces: of wide images, cut by XLA, each of which counts as an image.
    strips: the columns of a place; those of a piece, unless the places are strips.
    lanes: groups of 128 lanes in a program.
    steps: whether those are steps of the grid, which share the code and what was gathered, or all stand in the code.
    fold: blocks of images whose channels lie side by side in those lanes, and which come and go one a step.
    groups: of 8 images in a block, where images are summed over.
    at_once: of those, in one iteration of the loop over them.
    unroll: rows, of the kernel or of pixels, in one iteration of the inner loop.
    """

    blocks: Blocks
    places: Places
    pieces: Strips
    strips: Strips
    lanes: int = 1
    steps: bool = False
    fold: int = 1
    groups: int = 1
    at_once: int = 1
    unroll: int = 1

    @property
    def images(self) -> int:
        """Images in a block."""
        return 1 if self.places == "strips" else IMAGES * self.groups

    @property
    def batch(self) -> int:
        """Images in a program."""
        return self.images * self.fold

    @property
    def streams(self) -> bool:
        """Whether rows are gathered, and put back, amid the convolution of others, which takes no more time then.

        Where the first row reads most of the image, there is nothing to gain.
        """
        rows = self.blocks.gather
        in_order = rows.period == rows.advance == 1 and self.fold == 1 and not self.steps
        return in_order and self.many_taps and 2 * self.blocks.reach(0) < rows.sources

    @property
    def many_taps(self) -> bool:
        """Whether loads and stores, not the arithmetic, have time to spare."""
        return self.blocks.gather.axis.kernel * self.strips.gather.axis.kernel >= MANY_TAPS

    @property
    def converts_amid(self) -> bool:
        """Whether narrow pixels, where they are summed over images, are converted amid the first sums that read them.

        They are in registers then, for multiply-adds, amid which they are stored for the next ones.
        """
        return self.at_once % 2 == 0 and self.groups % self.at_once == 0 and not self.steps

    @property
    def repeats(self) -> int:
        """How often the code of a slab stands in a program."""
        return (1 if self.steps else self.lanes) * self.at_once

    def channels(self, c: int) -> int:
        """Channels in a program: all, or as many as its lanes hold."""
        return c if self.fold > 1 else min(c, LANES * self.lanes)

    def ordered(self, height: Any, width: Any, images: Any, channels: Any) -> tuple[Any, ...]:
        """The dimensions of an array, as the launch has them."""
        batch = self.places == "batch"
        return (height, width, images, channels) if batch else (images, height, width, channels)

    def schedule(self, c: int) -> Schedule:
        """The earliest step for everything, one group of lanes and one block of images a step; or one step for all."""
        channels, step = self.channels(c), -1
        convolved, put_back = [], []
        for group in range(self.lanes):
            images = min(self.fold, -(-(group + 1) * LANES // channels))
            step = max(step + 1, images - 1) if self.steps else 0
            convolved.append(step)
        step = -1
        for image in range(1, self.fold + 1):
            step = max(step + 1, convolved[(image * channels - 1) // LANES])
            put_back.append(step)
        return Schedule(tuple(convolved), tuple(put_back))

    def programs(self, n: int, c: int) -> tuple[int, int]:
        """How many programs share the images, and the channels."""
        return -(-n * self.pieces.count // self.batch), -(-c // self.channels(c))

    def slabs(self, n: int, c: int) -> int:
        """How many slabs hold a pixel of every image and channel."""
        return math.prod(self.programs(n, c)) * self.lanes * self.groups


class Slabs(NamedTuple):
    """The slabs of one array of a launch: how its blocks lie, how slabs are gathered from a block and put back.

    channels, rows, columns: of a block.
    copied: whether slabs are gathered in scratch, as float32, or the block holds them already.
    read: whether they are read, or written.
    start: where the columns of a row start in scratch, amid zeros, for strips to read as padding.
    place, step: where the pixels of the first strip start there, and how far those of the next are from them.
    size: of a row there.
    """

    plan: Plan
    channels: int
    rows: int
    columns: int
    copied: bool
    read: bool = True
    start: int = 0
    place: int = 0
    step: int = 0
    size: int = 0

    @property
    def apart(self) -> bool:
        """Whether each group of lanes is an operand: in one block, the columns of four would meet in a bank of VMEM."""
        several = self.plan.lanes > 1 and self.channels == LANES * self.plan.lanes
        return several and self.read and not self.copied and not self.plan.steps

    def specs(self, steps: Sequence[int], blocks: Blocks | None = None) -> list[pl.BlockSpec]:
        """Equal blocks of rows, or the overlapping windows of `blocks`: Pallas wants all in elements then.

        steps: the last one for each block of images.
        """
        count = self.plan.lanes if self.apart else 1
        return [self._spec(steps, blocks, count, group) for group in range(count)]

    def _spec(self, steps: Sequence[int], blocks: Blocks | None, count: int, group: int) -> pl.BlockSpec:
        order, channels = self.plan.ordered, self.channels // count
        shape = self.rows, self.columns, self.plan.images, channels
        block = lambda s, t: s * self.plan.fold + _passed(t, steps)  # noqa: E731
        if blocks is None or blocks.count == 1:
            return pl.BlockSpec(order(*shape), lambda s, c, b, t: order(b, 0, block(s, t), c * count + group))
        # Mosaic must see that channels start at a multiple of the lanes.
        step = channels if channels % LANES == 0 else 0
        return pl.BlockSpec(
            order(*map(pl.Element, shape)),
            lambda s, c, b, t: order(
                blocks.start(b), 0, block(s, t) * self.plan.images, (c * count + group) * step
            ),
        )

    @property
    def scratch(self) -> list[Any]:
        """Groups of lanes, rows and columns of slabs; strips are loads of every `step`-th column."""
        pixels = self.plan.lanes, self.rows, self.columns, IMAGES * self.plan.groups
        shape = (self.plan.lanes * self.rows * self.size,) if self.step else pixels
        return [pltpu.VMEM((*shape, LANES), jnp.float32)] * self.copied

    @property
    def width(self) -> int:
        """Lanes of a program."""
        return self.plan.lanes * LANES if self.copied else self.channels

    def nbytes(self, itemsize: int) -> int:
        """Of a block in VMEM."""
        *leading, second, minor = self.plan.ordered(self.rows, self.columns, self.plan.images, self.channels)
        tile = IMAGES * 4 // itemsize
        return itemsize * math.prod(leading) * -(-second // tile) * tile * -(-minor // LANES) * LANES

    def moved_bytes(self, itemsize: int) -> int:
        """Of a block, between HBM and VMEM."""
        lanes = -(-self.channels // LANES) * LANES
        return itemsize * self.rows * self.columns * self.plan.images * lanes

    def turned_bytes(self, rows: int) -> int:
        """Of the rows that the compiler turns in one piece of code, before and after, beside the scratch."""
        turns = self.copied and self.plan.places == "images"
        return 2 * rows * self.columns * IMAGES * -(-self.channels // LANES) * LANES * 4 * turns

    def gather(self, block: int, ref: Any, slabs: Any, rows: range | None = None) -> None:
        """Fill the lanes of a block of images, in all rows or in some, unless the slabs are the block."""
        self._each_row(rows, lambda row, _: self.gather_row(block, ref, slabs, row))

    def gather_row(self, block: int, ref: Any, slabs: Any, row: Any) -> None:
        values = self._turned(ref[self._row(row)].astype(jnp.float32))
        for group, lanes, channels in self._parts(block):
            for lo, hi in ((0, self.start), ((self.start + self.columns) // 8 * 8, self.size)):
                if lo < hi:
                    zeros = jnp.zeros((hi - lo, lanes.stop - lanes.start), jnp.float32)
                    slabs[self._in_row(group, row, lo, hi), lanes] = zeros
            slabs[self._columns(group, row, lanes)] = values[..., channels]

    def gather_some(self, group: int, ref: Any, slabs: Any, row: int, first: Any) -> None:
        """Fill the lanes of a group, in a row of the images of an iteration, of which this is the `first` group."""
        size = self.plan.at_once * IMAGES
        images = pl.ds(pl.multiple_of(first * IMAGES, size), size)
        _, lanes, channels = list(self._parts(0))[group]
        slabs[group, row, :, images, lanes] = ref[row, :, images, channels].astype(jnp.float32)

    def put_back(self, block: int, slabs: Any, ref: Any, rows: range | None = None) -> None:
        self._each_row(rows, lambda row, _: self.put_row(block, slabs, ref, row))

    def put_row(self, block: int, slabs: Any, ref: Any, row: Any) -> None:
        values = [slabs[self._columns(group, row, lanes)] for group, lanes, _ in self._parts(block)]
        value = jnp.concatenate(values, -1) if len(values) > 1 else values[0]
        ref[self._row(row)] = self._turned(value).astype(ref.dtype)

    def amid(self, copy_row: Callable[[Any], None], row: Any) -> None:
        """Copy a row between others, if there is such a row; a loop may copy the first or the last one again."""
        if self.copied and not (isinstance(row, int) and row not in range(self.rows)):
            copy_row(row if isinstance(row, int) else jnp.clip(row, 0, self.rows - 1))

    def of(self, slabs: Any, group: Any) -> "Pixels":
        """The slabs of a group of lanes, in the scratch or in the blocks of the operands."""

        def at(row: Any, column: Any, images: Any) -> tuple[Any, ...]:
            if self.step:
                first = (group * self.rows + row) * self.size + self.place + column
                return (pl.ds(first, IMAGES, stride=self.step),)
            first = images * IMAGES if isinstance(images, int) else pl.multiple_of(images * IMAGES, IMAGES)
            slab = row, column, pl.ds(first, IMAGES)
            return (group, *slab) if self.copied else (*slab, self._group(0 if self.apart else group))

        return Pixels(slabs if self.copied else slabs[group if self.apart else 0], at)

    def slab(self, group: Any) -> Slab:
        lanes = self._group(group)
        return Slab((IMAGES, lanes.size), lambda *at: at, channels=lanes, groups=self.plan.groups)

    def _each_row(self, rows: range | None, step: Callable[[Any, None], None]) -> None:
        if self.copied:
            rows = range(self.rows) if rows is None else rows
            loop(max(rows.start, 0), min(rows.stop, self.rows), ROWS, step, None)

    def _row(self, row: Any) -> tuple[Any, ...]:
        """A row in the block."""
        return {"batch": (row,), "images": (slice(None), row), "strips": (0, row)}[self.plan.places]

    def _turned(self, x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1) if self.plan.places == "images" else x

    def _columns(self, group: int, row: Any, lanes: slice) -> tuple[Any, ...]:
        """The same row in scratch."""
        if self.step:
            return self._in_row(group, row, self.start, self.start + self.columns), lanes
        return group, row, slice(None), slice(None), lanes

    def _in_row(self, group: int, row: Any, lo: int, hi: int) -> Any:
        first = (group * self.rows + row) * self.size + lo
        return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, 8), hi - lo)

    def _parts(self, block: int) -> Iterator[tuple[int, slice, slice]]:
        """(group, lanes of it, channels) for what a block of images has of each group of lanes."""
        first, last = block * self.channels, (block + 1) * self.channels
        for group in range(first // LANES, -(-last // LANES)):
            lo, hi = max(first, group * LANES), min(last, (group + 1) * LANES)
            yield group, slice(lo - group * LANES, hi - group * LANES), slice(lo - first, hi - first)

    def _group(self, group: Any) -> Any:
        """The lanes of a group, in a program's weights and in blocks that aren't copied."""
        if not isinstance(group, int):
            return pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
        return pl.ds(group * LANES, LANES if self.copied else min(LANES, self.channels - group * LANES))


class Pixels(NamedTuple):
    """A Ref, indexed by pixel."""

    ref: Any
    at: Callable[..., tuple[Any, ...]]

    @property
    def dtype(self) -> Any:
        return self.ref.dtype

    def __getitem__(self, at: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.ref[self.at(*at)]

    def __setitem__(self, at: Any, slab: jax.Array) -> None:
        self.ref[self.at(*at)] = slab


def slabs_of(plan: Plan, c: int, itemsize: int, *, targets: bool, written: bool = False) -> Slabs:
    """The slabs of the sources, or of the targets, of a launch."""
    blocks, pieces, strips, channels = plan.blocks, plan.pieces, plan.strips, plan.channels(c)
    rows, columns = (blocks.size, pieces.size) if targets else (blocks.window, pieces.window)
    if plan.places != "strips":
        # A block's narrow pixels can be written from registers, but not be read by every tap.
        narrow = itemsize < 4 and (not written or c % LANES > 0)
        copied = plan.places == "images" or plan.fold > 1 or narrow
        return Slabs(plan, channels, rows, columns, copied, not written)
    first, reach, step = 0, strips.size, strips.size
    if not targets:
        first, reach, step = strips.first - pieces.first, strips.window, strips.step
    start = max(0, -(first // 8) * 8)
    size = max(start + columns, start + first + reach + (IMAGES - 1) * step)
    return Slabs(
        plan, channels, rows, columns, True, not written, start, start + first, step, -(-size // 8) * 8
    )
