"""Depthwise convolution as bodies over slabs.

A slab is what one pixel holds: (images, channels). A launcher says where slab (row, column) lies in its Refs, so the
same body reads (row, column, image, channel) blocks on a TPU, where a slab is one vector register and no tap is ever
unaligned, and (image, row, column, channel) blocks on a GPU, where it is one register of every thread.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Arithmetic, within
from pallas_kernels.windows import Rows, Taps


class Slab(NamedTuple):
    """How the Refs of a launch hold slabs, and how a kernel computes with them.

    at: (row, column, group) -> the index of a slab.
    channels: those of the slabs, in the Refs of a kernel.
    groups: slabs of each pixel, where they are summed over.
    width: columns of the source, if others may be read, which are zero.
    repeated: whether the weights of a tap are stored as a slab, once for every image.
    """

    shape: tuple[int, int]
    at: Callable[[Any, Any, Any], tuple[Any, ...]]
    channels: Any = slice(None)
    groups: int = 1
    width: int | None = None
    repeated: bool = False
    arithmetic: Arithmetic = Arithmetic()

    def pixel(self, ref: Any, row: Any, column: Any, group: Any = 0) -> jax.Array:
        """A slab of the source, in float32."""
        if self.width is None:
            return self._float32(ref[self.at(row, column, group)])
        nearest = within(column, self.width)
        return jnp.where(nearest == column, self._float32(ref[self.at(row, nearest, group)]), 0.0)

    def cotangent(self, ref: Any, row: Any, column: Any, group: Any) -> jax.Array:
        """A slab of the output's cotangent, in float32."""
        return self._float32(ref[self.at(row, column, group)])

    def weight(self, ref: Any, k_row: Any, k: Any) -> jax.Array:
        """Those of a tap, as a slab."""
        if self.repeated:
            return self._float32(ref[k_row, k, :, self.channels])
        return self._broadcast(ref[k_row, pl.ds(k, 1), self.channels])

    def bias(self, ref: Any) -> jax.Array:
        """That of a kernel, or zero, as a slab."""
        if ref is None:
            return jnp.zeros(self.shape, jnp.float32)
        return self._broadcast(ref[:, self.channels])

    def add(self, total: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """total + x y."""
        return self.arithmetic.multiply_add(x, y, total)

    def _broadcast(self, row: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row.astype(jnp.float32), self.shape)

    def _float32(self, slab: jax.Array) -> jax.Array:
        return self.arithmetic.to_float32(slab)


def correlate(
    x_ref: Any, w_ref: Any, b_ref: Any, o_ref: Any, *, slab: Slab, rows: Sequence[Rows],
    cols: Sequence[Taps], tile: int, unroll: int, unrolled_rows: int, rows_at_once: int = 1, share: bool = False,
    loop_tiles: bool = False, after_row: Callable[[Any], None] | None = None,
) -> None:  # fmt: skip
    """One block of a depthwise convolution, or of its input gradient: o = b + the sum over taps of x * w.

    Args:
      x_ref, o_ref: source and target slabs; w_ref: [kernel rows, kernel columns, channels], or slabs of weights if
        `slab` says so; b_ref: [1, channels] or None.
      slab: how the Refs of slabs are indexed.
      rows: the block's rows and what they read; cols: what each of its columns reads.
      tile: columns that are accumulated together, in registers.
      unroll: kernel rows in one iteration of the loop over them.
      unrolled_rows: from this many equal rows on, the loop runs over the rows, and all of their taps are unrolled.
      rows_at_once: rows in one iteration of that loop.
      share: whether those read each pixel once for all of them, not one row after the other; not in loops of tiles.
      loop_tiles: whether tiles that read alike are a loop, or all unrolled.
      after_row: called with each row that is done.
    """
    runs = _tiles(cols, tile, loop_tiles)

    def kernel_row(taps: Taps, run: _Run, i: Any, j: Any, sums: _Sums) -> _Sums:
        row, k_row = taps.source + j * taps.source_step, taps.tap + j * taps.tap_step
        column_shift, k_shift = (i * step for step in run.shift)

        @functools.cache
        def weight(k: int) -> jax.Array:
            return slab.weight(w_ref, k_row, k + k_shift)

        totals = list(sums)
        for column, uses in run.by_column():
            x = slab.pixel(x_ref, row, column + column_shift)
            for target, k in uses:
                totals[target] = slab.add(totals[target], x, weight(k))
        return tuple(totals)

    def leave(same: Rows, row: Any, run: _Run, i: Any, sums: Sequence[jax.Array]) -> None:
        for t, total in enumerate(sums):
            column = (run.first + i) * tile + t
            o_ref[slab.at(same.first + row * same.period, column, 0)] = total.astype(o_ref.dtype)

    def target_tile(same: Rows, unroll: int, row: Any, run: _Run, i: Any, _: None) -> None:
        step = functools.partial(kernel_row, taps := same.taps.shifted(-row * same.advance), run, i)
        leave(same, row, run, i, loop(taps.lo, taps.hi, unroll, step, (slab.bias(b_ref),) * run.size))

    def target_row(same: Rows, unroll: int, row: Any, _: None) -> None:
        for run in runs:
            loop(0, run.count, 1, functools.partial(target_tile, same, unroll, row, run), None)
        if after_row:
            after_row(same.first + row * same.period)

    def target_rows(same: Rows, count: int, chunk: Any, _: None) -> None:
        """`count` equal rows, pixel row after pixel row: those that read a pixel share it in a register."""
        taps = same.taps.shifted(-chunk * count * same.advance)
        chunk_rows = [chunk * count + r for r in range(count)]
        reads = sorted(
            (r * same.advance + j * taps.source_step, r, j)
            for r in range(count)
            for j in range(taps.lo, taps.hi)
        )
        weight = functools.cache(lambda j, k: slab.weight(w_ref, taps.tap + j * taps.tap_step, k))
        for run in runs:
            totals = [[slab.bias(b_ref)] * run.size for _ in chunk_rows]
            for offset, readers in itertools.groupby(reads, lambda read: read[0]):
                pairs = [(totals[r], j) for _, r, j in readers]
                for column, uses in run.by_column():
                    x = slab.pixel(x_ref, taps.source + offset, column)
                    for (sums, j), (t, k) in itertools.product(pairs, uses):
                        sums[t] = slab.add(sums[t], x, weight(j, k))
            for row, sums in zip(chunk_rows, totals, strict=True):
                leave(same, row, run, 0, sums)
        if after_row:
            for row in chunk_rows:
                after_row(same.first + row * same.period)

    for same in rows:
        over_rows = same.count >= unrolled_rows
        if over_rows and share:
            chunks, rest = divmod(same.count, rows_at_once)
            loop(0, chunks, 1, functools.partial(target_rows, same, rows_at_once), None)
            for row in range(same.count - rest, same.count):
                target_rows(same, 1, row, None)
        else:
            step = functools.partial(target_row, same, max(1, same.taps.hi) if over_rows else unroll)
            loop(0, same.count, rows_at_once if over_rows else same.count, step, None)


def correlate_together(
    x_ref: Any, w_ref: Any, b_ref: Any, o_ref: Any, *, slab: Slab, taps: Taps, sources: int, count: int,
    cols: Sequence[Taps], tile: int, part: Any = None,
) -> None:  # fmt: skip
    """One block of `count` rows, of which each reads one source further on: each pixel is read for all of them.

    Args:
      x_ref, w_ref, b_ref, o_ref, slab, cols, tile: as in `correlate`; tiles that read alike are a loop.
      taps: what the first row would read of a source without an end, one after the other.
      sources: the rows that there are.
      part: the tile to compute, of `equal_tiles`; None: all.
    """

    def pixel_row(run: _Run, i: Any, q: Any, sums: tuple[_Sums, ...]) -> tuple[_Sums, ...]:
        source, (column_shift, k_shift) = within(taps.source + q, sources), (i * step for step in run.shift)
        pixels = [
            (slab.pixel(x_ref, source, column + column_shift), uses) for column, uses in run.by_column()
        ]

        def add(k_row: Any, totals: _Sums) -> _Sums:
            weight = functools.cache(lambda k: slab.weight(w_ref, k_row, k + k_shift))
            found = list(totals)
            for x, uses in pixels:
                for target, k in uses:
                    found[target] = slab.add(found[target], x, weight(k))
            return tuple(found)

        if count == 1:
            return (add(q, sums[0]),)
        return tuple(
            lax.cond((q >= row) & (q < row + taps.hi), functools.partial(add, q - row), lambda t: t, totals)
            for row, totals in enumerate(sums)
        )

    def target_tile(run: _Run, i: Any, _: None) -> None:
        i = within(i, run.count)
        sums = ((slab.bias(b_ref),) * run.size,) * count
        here = taps._replace(hi=taps.hi + count - 1).inside(sources)
        sums = loop(here.lo, here.hi, 1, functools.partial(pixel_row, run, i), sums)
        for row, totals in enumerate(sums):
            for t, total in enumerate(totals):
                o_ref[slab.at(row, (run.first + i) * tile + t, 0)] = total.astype(o_ref.dtype)

    for run in _tiles(cols, tile, loop=True):
        if part is None:
            loop(0, run.count, 1, functools.partial(target_tile, run), None)
        else:
            target_tile(run, part, None)


def sum_of_each(slabs: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum over images of each slab."""
    return [jnp.sum(slab, axis=0, keepdims=True) for slab in slabs]


def correlate_gradient(
    x_ref: Any, g_ref: Any, o_ref: Any, *, slab: Slab, rows: Sequence[Taps], cols: Sequence[Taps],
    tile: int, unroll: int, unroll_groups: int = 1, chunk: int | None = None,
    sum_images: Callable[[Sequence[jax.Array]], Sequence[jax.Array]] = sum_of_each,
    before: Callable[[int, Any], None] | None = None,
) -> None:  # fmt: skip
    """One block's share of the weight gradient of a depthwise convolution: o[k] = sum over images and pixels of x * g.

    Args:
      x_ref, g_ref: slabs of the input and of the output's cotangent.
      o_ref: [kernel rows, kernel columns, channels].
      slab: as in `correlate`.
      rows: for each kernel row of the block, the outputs (`tap`) that read an input (`source`) through it.
      cols: the same for each kernel column.
      tile: kernel columns that are accumulated together, in registers.
      unroll, unroll_groups: rows of pixels, and groups, in one iteration of the loops over them.
      chunk: outputs of a row that are unrolled; chunks that read alike are a loop. None: the row.
      sum_images: slabs -> arrays of rows, which hold the sums over the images of one slab after the other.
      before: called with each kernel row, and the first of each `unroll_groups` groups, before it sums over them; the
        groups are so many, or a multiple.
    """
    together = unroll_groups if before else 1

    def pixel_chunk(taps: Taps, run: _Run, group: Any, j: Any, i: Any, sums: _Sums) -> _Sums:
        column_shift, x_shift = (i * step for step in run.shift)
        x_row, g_row = taps.source + j * taps.source_step, taps.tap + j * taps.tap_step
        pixel = functools.cache(lambda column: slab.pixel(x_ref, x_row, column + x_shift, group))
        totals = list(sums)
        for column, uses in run.by_column():
            g = slab.cotangent(g_ref, g_row, column + column_shift, group)
            for k, x_column in uses:
                totals[k] = slab.add(totals[k], pixel(x_column), g)
        return tuple(totals)

    def pixel_row(taps: Taps, runs: list[_Run], group: Any, j: Any, sums: _Sums) -> _Sums:
        for run in runs:
            sums = loop(0, run.count, 1, functools.partial(pixel_chunk, taps, run, group, j), sums)
        return sums

    def over_images(k_row: int, taps: Taps, ks: range, runs: list[_Run], i: Any, sums: _Sums) -> _Sums:
        if before and ks.start == 0:
            before(k_row, i * together)
        for group in range(together):
            step = functools.partial(pixel_row, taps, runs, i * together + group)
            sums = loop(taps.lo, taps.hi, unroll, step, sums)
        return sums

    for k_row, taps in enumerate(rows):
        for ks, runs in _gradient_tiles(cols, tile, chunk):
            zeros = (jnp.zeros(slab.shape, jnp.float32),) * len(ks)
            step = functools.partial(over_images, k_row, taps, ks, runs)
            sums = loop(0, slab.groups // together, unroll_groups // together, step, zeros)
            first = ks.start
            for total in sum_images(sums):
                o_ref[k_row, pl.ds(first, len(total)), slab.channels] = total
                first += len(total)


def correlate_gradient_together(
    x_ref: Any, g_ref: Any, o_ref: Any, *, slab: Slab, first: Any, count: int, live: Any, targets: int, lo: Any,
    hi: Any, cols: Sequence[Taps], tile: int, chunk: int, part: Any = None,
) -> None:  # fmt: skip
    """One block's share in `count` neighbouring rows of the weight gradient: each pixel is read for all of them.

    Args:
      x_ref, g_ref, o_ref, slab, cols, tile, chunk: as in `correlate_gradient`.
      first: the row of the input that the first row of outputs reads through the first of these kernel rows; through
        each next one it reads one further on.
      live: how many of the kernel rows there are.
      targets: the rows of outputs.
      lo, hi: the block's rows of the input.
      part: the chunk to sum up, of `equal_chunks`; None: all.
    """

    def pixel_row(run: _Run, group: Any, i: Any, q: Any, sums: tuple[_Sums, ...]) -> tuple[_Sums, ...]:
        source, (column_shift, x_shift) = within(q, x_ref.shape[1]), (i * step for step in run.shift)
        columns = sorted({x_column for *_, x_column in run.reads})
        pixels = {column: slab.pixel(x_ref, source, column + x_shift, group) for column in columns}

        def add(row: Any, totals: _Sums) -> _Sums:
            found = list(totals)
            for column, uses in run.by_column():
                g = slab.cotangent(g_ref, row, column + column_shift, group)
                for k, x_column in uses:
                    found[k] = slab.add(found[k], pixels[x_column], g)
            return tuple(found)

        def is_read(k_row: int) -> Any:
            row = q - first - k_row
            return (row >= 0) & (row < targets) & (k_row < live)

        return tuple(
            lax.cond(is_read(k_row), functools.partial(add, q - first - k_row), lambda t: t, totals)
            for k_row, totals in enumerate(sums)
        )

    def over_rows(run: _Run, group: Any, i: Any, sums: Any) -> Any:
        step = functools.partial(pixel_row, run, within(group, slab.groups), within(i, run.count))
        return loop(lo, hi, 1, step, sums)

    def over_images(runs: list[_Run], group: Any, sums: Any) -> Any:
        for run in runs:
            step = functools.partial(over_rows, run, group)
            sums = loop(0, run.count, 1, step, sums) if part is None else step(part, sums)
        return sums

    for ks, runs in _gradient_tiles(cols, tile, chunk):
        zeros = ((jnp.zeros(slab.shape, jnp.float32),) * len(ks),) * count
        sums = loop(0, slab.groups, 1, functools.partial(over_images, runs), zeros)
        for k_row, totals in enumerate(sums):
            for k, total in zip(ks, sum_of_each(totals), strict=True):
                o_ref[k_row, pl.ds(k, 1), slab.channels] = total


def _gradient_tiles(cols: Sequence[Taps], tile: int, chunk: int | None) -> list[tuple[range, "list[_Run]"]]:
    """Of each `tile` kernel columns, the chunks of outputs that are multiplied by what they read."""

    def chunks(ks: range) -> list[_Run]:
        reads = sorted((g, t, x) for t, k in enumerate(ks) for x, g in cols[k].pairs())
        size = chunk or 1 + max((g for g, *_ in reads), default=0)
        pieces = [list(piece) for _, piece in itertools.groupby(reads, lambda read: read[0] // size)]
        return _runs(pieces, [len(ks)] * len(pieces), loop=True)

    tiles = (range(start, min(start + tile, len(cols))) for start in range(0, len(cols), tile))
    return [(ks, chunks(ks)) for ks in tiles]


_Sums = tuple[jax.Array, ...]
# (column, accumulator, index of the other factor) of each multiply-add in a tile.
_Reads = list[tuple[int, int, int]]


class _Run(NamedTuple):
    """Tiles of one `size` that read alike: from one to the next, columns and other indices move by `shift`."""

    first: int
    size: int
    reads: _Reads
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]
    shift: tuple[int, int] = (0, 0)

    def by_column(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each column that the first tile reads, its uses: an accumulator and the index of the other factor."""
        groups = itertools.groupby(sorted(self.reads), lambda read: read[0])
        return [(column, [(t, other) for _, t, other in uses]) for column, uses in groups]


def multiply_adds(cols: Sequence[Taps], tile: int) -> int:
    """Those in the code for one row of the kernel, in which tiles that read alike are a loop."""
    return sum(len(run.reads) for run in _tiles(cols, tile, loop=True))


def equal_tiles(cols: Sequence[Taps], tile: int) -> int:
    """How many tiles there are, if all read alike; otherwise 1."""
    runs = _tiles(cols, tile, loop=True)
    return runs[0].count if len(runs) == 1 else 1


def equal_chunks(cols: Sequence[Taps], tile: int, chunk: int) -> int:
    """How many chunks there are, if all read alike; otherwise 1."""
    runs = [runs for _, runs in _gradient_tiles(cols, tile, chunk)]
    counts = {found[0].count if len(found) == 1 else 1 for found in runs}
    return counts.pop() if len(counts) == 1 else 1


def gradient_multiply_adds(cols: Sequence[Taps], tile: int, chunk: int) -> int:
    """Those in the code for one row of the kernel, in which chunks that read alike are a loop."""
    return sum(len(run.reads) for _, runs in _gradient_tiles(cols, tile, chunk) for run in runs)


def _tiles(cols: Sequence[Taps], size: int, loop: bool) -> list[_Run]:
    """Of each `size` columns, what they read."""
    tiles = [cols[start : start + size] for start in range(0, len(cols), size)]
    reads = [[(source, t, k) for t, taps in enumerate(tile) for source, k in taps.pairs()] for tile in tiles]
    return _runs(reads, [len(tile) for tile in tiles], loop)


def _runs(tiles: Sequence[_Reads], sizes: Sequence[int], loop: bool) -> list[_Run]:
    """The tiles, those in a row that read alike together, or if not `loop` each one alone."""
    runs: list[_Run] = []
    for n, (reads, size) in enumerate(zip(tiles, sizes, strict=True)):
        last = runs[-1] if runs else None
        shift = _shift(tiles[n - 1], reads) if loop and last and size == last.size else None
        if last and shift and shift == (last.shift if last.count > 1 else shift):
            runs[-1] = last._replace(count=last.count + 1, shift=shift)
        else:
            runs.append(_Run(n, size, reads))
    return runs


def _shift(a: _Reads, b: _Reads) -> tuple[int, int] | None:
    """How far columns and other indices move from a to b, if nothing else changes."""
    shifts = {(q[0] - p[0], q[1] - p[1], q[2] - p[2]) for p, q in zip(a, b, strict=False)}
    if len(a) == len(b) and len(shifts) == 1:
        ((column, accumulator, other),) = shifts
        return (column, other) if accumulator == 0 else None
    return None


def loop(lo: Any, hi: Any, unroll: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """carry = step(j, carry) for lo <= j < hi; with static bounds, `unroll` of them to an iteration."""
    if not (isinstance(lo, int) and isinstance(hi, int)):
        return lax.fori_loop(lo, hi, step, carry)
    chunks = max(0, hi - lo) // unroll
    if chunks > 1:

        def chunk(i: Any, carry: Any) -> Any:
            for u in range(unroll):
                carry = step(lo + i * unroll + u, carry)
            return carry

        carry = lax.fori_loop(0, chunks, chunk, carry)
        lo += chunks * unroll
    for j in range(lo, hi):
        carry = step(j, carry)
    return carry
