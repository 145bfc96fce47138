"""Which inputs the outputs of a convolution read: the arithmetic of indices behind its kernels and their launches.

Along each axis output o reads input `stride * o + dilation * k - pad_lo` through tap k. Everything here is that
relation, seen from an output, an input or a tap, and cut into blocks and strips.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Taps(NamedTuple):
    """What one target reads along an axis: source + j * source_step through tap + j * tap_step, lo <= j < hi."""

    source: Any
    source_step: int
    tap: int
    tap_step: int
    lo: Any
    hi: Any

    def inside(self, size: int) -> "Taps":
        """Without the taps whose source is outside of range(size), which would read zero."""
        step, source = abs(self.source_step), self.source
        below, above = (-source, size - source) if self.source_step > 0 else (source - size + 1, source + 1)
        if isinstance(source, int):
            lo = max(self.lo, -(-below // step))
            return self._replace(lo=lo, hi=max(lo, min(self.hi, -(-above // step))))
        ceil = lambda a: lax.div(lax.max(a + (step - 1), jnp.int32(0)), jnp.int32(step))  # noqa: E731
        return self._replace(
            lo=lax.max(jnp.int32(self.lo), ceil(below)), hi=lax.min(jnp.int32(self.hi), ceil(above))
        )

    def shifted(self, by: Any) -> "Taps":
        """The same taps of a source that starts `by` later."""
        return self._replace(source=self.source - by)

    def pairs(self) -> list[tuple[int, int]]:
        """The (source, tap) pairs, when they are static."""
        return [
            (self.source + j * self.source_step, self.tap + j * self.tap_step)
            for j in range(self.lo, self.hi)
        ]


class Axis(NamedTuple):
    """One spatial axis of a convolution: output o reads input `stride * o + dilation * k - pad_lo` through tap k.

    Sizes are in pixels and taps. Taps that fall outside of the input read zero, so they are never visited.
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    pad_lo: int = 0
    pad_hi: int = 0

    @property
    def out(self) -> int:
        """The number of outputs; not positive when the dilated kernel is longer than the padded input."""
        return (
            self.size + self.pad_lo + self.pad_hi - self.dilation * (self.kernel - 1) - 1
        ) // self.stride + 1

    @property
    def pairs(self) -> int:
        """How many (output, tap) pairs read a pixel of the input: the multiply-adds of this axis."""
        return sum(t.hi - t.lo for t in map(self.tap_range, range(self.kernel)))

    @property
    def live(self) -> tuple[int, int]:
        """The first and the last tap, plus one, that read the input at all: of 31 taps on 7 pixels, 13 do."""
        taps = [k for k in range(self.kernel) for t in (self.tap_range(k),) if t.lo < t.hi] or [0]
        return taps[0], taps[-1] + 1

    def part(self, lo: int, hi: int) -> "Axis":
        """The same outputs, through the taps lo, ..., hi - 1 alone."""
        before, after = self.dilation * lo, self.dilation * (self.kernel - hi)
        return self._replace(kernel=hi - lo, pad_lo=self.pad_lo - before, pad_hi=self.pad_hi - after)

    @property
    def mirrored(self) -> "Axis":
        """For stride 1: the axis along which the outputs' cotangent and the flipped kernel give the input gradient."""
        reach = self.dilation * (self.kernel - 1)
        pads = reach - self.pad_lo, self.size - self.out + self.pad_lo
        return Axis(self.out, self.kernel, 1, self.dilation, *pads)

    def tap_range(self, k: int) -> Taps:
        """For tap k the outputs that read a pixel through it: `source` is the input's index, `tap` the output's."""
        return Taps(self.dilation * k - self.pad_lo, self.stride, 0, 1, 0, self.out).inside(self.size)


class Gather(NamedTuple):
    """An axis seen from the side that is computed: outputs from inputs, or, transposed, inputs from outputs."""

    axis: Axis
    transposed: bool = False

    @property
    def targets(self) -> int:
        return self.axis.size if self.transposed else self.axis.out

    @property
    def sources(self) -> int:
        return self.axis.out if self.transposed else self.axis.size

    @property
    def period(self) -> int:
        """Targets this far apart read through the same taps."""
        return self.axis.stride if self.transposed else 1

    @property
    def advance(self) -> int:
        """How far the sources move from one period to the next."""
        return 1 if self.transposed else self.axis.stride

    def taps(self, target: int) -> Taps:
        """All taps of a target, those outside of the source included."""
        a = self.axis
        if not self.transposed:
            return Taps(a.stride * target - a.pad_lo, a.dilation, 0, 1, 0, a.kernel)
        common = math.gcd(a.stride, a.dilation)
        period, position = a.stride // common, target + a.pad_lo
        first = next((k for k in range(period) if (position - a.dilation * k) % a.stride == 0), a.kernel)
        count = -(-(a.kernel - first) // period)
        return Taps(
            (position - a.dilation * first) // a.stride, -a.dilation // common, first, period, 0, count
        )

    def window(self, targets: int) -> tuple[int, int]:
        """First source (for target 0) and number of sources that `targets` consecutive targets read."""
        edges = {*range(min(self.period, targets)), *range(max(0, targets - self.period), targets)}
        reads = [t.source + j * t.source_step for t in map(self.taps, edges) if t.hi for j in (0, t.hi - 1)]
        return (min(reads), max(reads) - min(reads) + 1) if reads else (0, 1)


class Rows(NamedTuple):
    """Targets of a block that read through the same taps: `count` rows, `period` apart, from `first` on.

    taps: what the first of them reads; each next one reads `advance` sources further on.
    """

    first: Any
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    taps: Taps
    period: int = 1
    advance: int = 0


def equal_rows(gather: Gather, first: int, count: int) -> list[Rows]:
    """Targets first, ..., first + count - 1 as groups that read through the same taps, numbered from 0."""
    groups: list[Rows] = []
    for residue in range(gather.period):
        run: list[Rows] = []
        for row in range(residue, count, gather.period):
            taps = gather.taps(first + row).inside(gather.sources)
            if run and taps.shifted(run[-1].count * gather.advance) == run[-1].taps:
                run[-1] = run[-1]._replace(count=run[-1].count + 1)
            else:
                run.append(Rows(row, 1, taps, gather.period, gather.advance))
        groups += run
    return groups


class Blocks(NamedTuple):
    """Rows of a launch, cut into programs: `size` targets each, which read `window` sources."""

    gather: Gather
    size: int

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -(-self.gather.targets // self.size)

    @property
    def window(self) -> int:
        return (
            min(self.gather.sources, self.gather.window(self.size)[1])
            if self.count > 1
            else self.gather.sources
        )

    def start(self, block: Any) -> Any:
        """The first source of a block; traced if `block` is. Kept inside, so that nothing needs padding."""
        if self.count == 1:
            return 0
        start = (
            block * (self.size // self.gather.period * self.gather.advance) + self.gather.window(self.size)[0]
        )
        if isinstance(block, int):
            return min(max(start, 0), self.gather.sources - self.window)
        return jnp.clip(start, 0, self.gather.sources - self.window)

    def reach(self, block: int) -> int:
        """How many sources of a block its first target reads, those before it included."""
        first, extent = self.gather.window(1)
        return (
            block * self.size * self.gather.advance // self.gather.period + first + extent - self.start(block)
        )

    def targets(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.gather.targets))

    def kinds(self) -> dict[int, range]:
        """Blocks that run the same code, by the first of them: those at the edges alone, all others together."""
        shape = [(len(self.targets(b)), *self.rows(b)) for b in range(self.count)]
        firsts = [b for b in range(self.count) if b == 0 or shape[b] != shape[b - 1]]
        return {b: range(b, end) for b, end in zip(firsts, [*firsts[1:], self.count], strict=True)}

    def rows(self, block: int) -> list[Rows]:
        """The rows of a block, their sources counted from the block's first."""
        start = self.start(block)
        rows = equal_rows(self.gather, block * self.size, len(self.targets(block)))
        return [r._replace(taps=r.taps.shifted(start)) for r in rows]

    def kernel_rows(self, block: int) -> list[Taps]:
        """For each kernel row the outputs of a block that read through it, counted from the block's first."""
        axis, targets, start = self.gather.axis, self.targets(block), self.start(block)
        kernel_rows = []
        for k in range(axis.kernel):
            through = axis.tap_range(k)
            lo = max(through.lo - targets.start, 0)
            hi = max(lo, min(through.hi - targets.start, len(targets)))
            source = through.source + targets.start * axis.stride - start
            kernel_rows.append(Taps(source, axis.stride, 0, 1, lo, hi))
        return kernel_rows


class Strips(NamedTuple):
    """Columns of a launch, cut into strips that count as images: `size` targets each."""

    gather: Gather
    size: int

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -(-self.gather.targets // self.size)

    @property
    def window(self) -> int:
        return self.gather.window(self.size)[1] if self.count > 1 else self.gather.sources

    @property
    def first(self) -> int:
        """The first source of the first strip."""
        return self.gather.window(self.size)[0] if self.count > 1 else 0

    @property
    def step(self) -> int:
        """How far the sources move from one strip to the next."""
        return self.size // self.gather.period * self.gather.advance

    def of_targets(self) -> "Strips":
        """The same strips of the targets themselves: no halo."""
        return Strips(Gather(Axis(self.gather.targets, 1)), self.size)

    @property
    def columns(self) -> list[Taps]:
        """What each column of a strip reads. The one strip of an uncut image skips the padding, others read zeros."""
        taps = self.all_columns
        return [t.inside(self.gather.sources) for t in taps] if self.count == 1 else taps

    @property
    def all_columns(self) -> list[Taps]:
        """The same, with what the one strip would read of the padding."""
        first = self.first
        return [self.gather.taps(t).shifted(first) for t in range(self.size)]

    @property
    def kernel_columns(self) -> list[Taps]:
        """For each kernel column the outputs of a strip that read through it; of an uncut image, not the padding."""
        axis = self.gather.axis
        if self.count == 1:
            return [axis.tap_range(k) for k in range(axis.kernel)]
        return self.all_kernel_columns

    @property
    def all_kernel_columns(self) -> list[Taps]:
        """The same, with those that read padding."""
        axis = self.gather.axis
        first = self.first + axis.pad_lo
        return [Taps(axis.dilation * k - first, axis.stride, 0, 1, 0, self.size) for k in range(axis.kernel)]

    def cut(self, x: jax.Array) -> jax.Array:
        """(N, H, sources, C) -> (strips * N, H, sources of a strip, C), zeros where a strip reads padding."""
        if self.count == 1:
            return x
        n, height, sources, channels = x.shape
        # How many steps a window reaches over: slices for every strip would be code that grows with the image.
        reach = -(-self.window // self.step)
        steps = self.count + reach - 1
        edges = [(0, 0, 0), (0, 0, 0), (-self.first, steps * self.step - sources + self.first, 0), (0, 0, 0)]
        x = lax.pad(x, jnp.zeros((), x.dtype), edges).reshape(n, height, steps, self.step, channels)
        windows = jnp.concatenate([x[:, :, i : i + self.count] for i in range(reach)], 3)
        return jnp.moveaxis(windows[:, :, :, : self.window], 2, 0).reshape(-1, height, self.window, channels)
