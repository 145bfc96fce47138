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
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.windows import Rows, Taps


class Slab(NamedTuple):
    """How the Refs of a launch hold slabs, of which each pixel may have several `groups`.

    at: (row, column, group) -> the index of a slab.
    channels: group -> the index of its channels.
    """

    shape: tuple[int, int]
    at: Callable[[Any, Any, Any], tuple[Any, ...]]
    channels: Callable[[Any], Any] = lambda group: slice(None)
    groups: int = 1


def correlate(
    x_ref: Any, w_ref: Any, b_ref: Any, o_ref: Any, *, slab: Slab, rows: Sequence[Rows],
    cols: Sequence[Taps], tile: int, unroll: int, unrolled_rows: int,
) -> None:  # fmt: skip
    """One block of a depthwise convolution, or of its input gradient: o = b + the sum over taps of x * w.

    Args:
      x_ref, o_ref: source and target slabs; w_ref: [kernel rows, kernel columns, channels]; b_ref: [1, channels].
      slab: how the Refs of slabs are indexed.
      rows: the block's rows and what they read; cols: what each of its columns reads.
      tile: columns that are accumulated together, in registers.
      unroll: kernel rows in one iteration of the loop over them.
      unrolled_rows: from this many equal rows on, the loop runs over the rows, and all of their taps are unrolled.
    """
    tiles = [range(start, min(start + tile, len(cols))) for start in range(0, len(cols), tile)]
    reads = [_by_source([cols[c].pairs() for c in columns]) for columns in tiles]

    def broadcast(row: jax.Array) -> jax.Array:
        return jnp.broadcast_to(row.astype(jnp.float32), slab.shape)

    def kernel_row(taps: Taps, read: _Reads, group: Any, j: Any, sums: _Sums) -> _Sums:
        row, k_row = taps.source + j * taps.source_step, taps.tap + j * taps.tap_step

        @functools.cache
        def weight(k: int) -> jax.Array:
            return broadcast(w_ref[k_row, pl.ds(k, 1), slab.channels(group)])

        totals = list(sums)
        for column, uses in read:
            x = x_ref[slab.at(row, column, group)].astype(jnp.float32)
            for target, k in uses:
                totals[target] = lax.add(totals[target], lax.mul(x, weight(k)))
        return tuple(totals)

    def target_row(same: Rows, unroll: int, group: Any, i: Any) -> None:
        taps = same.taps.shifted(-i * same.advance)
        bias = broadcast(b_ref[:, slab.channels(group)])
        for columns, read in zip(tiles, reads, strict=True):
            step = functools.partial(kernel_row, taps, read, group)
            sums = _loop(taps.lo, taps.hi, unroll, step, (bias,) * len(columns))
            for column, total in zip(columns, sums, strict=True):
                o_ref[slab.at(same.first + i * same.period, column, group)] = total.astype(o_ref.dtype)

    for group, same in itertools.product(range(slab.groups), rows):
        over_rows = same.count >= unrolled_rows
        step = functools.partial(target_row, same, max(1, same.taps.hi) if over_rows else unroll, group)
        _loop(0, same.count, 1 if over_rows else same.count, lambda i, _: step(i), None)  # noqa: B023


def correlate_gradient(
    x_ref: Any, g_ref: Any, o_ref: Any, *, slab: Slab, rows: Sequence[Taps], cols: Sequence[Taps],
    tile: int, unroll: int, unroll_groups: int = 1,
) -> None:  # fmt: skip
    """One block's share of the weight gradient of a depthwise convolution: o[k] = sum over images and pixels of x * g.

    Args:
      x_ref, g_ref: slabs of the input and of the output's cotangent.
      o_ref: [kernel rows, kernel columns * images, channels]; a slab's images are summed if that leaves room for one.
      slab: as in `correlate`; its groups are of images, and summed over.
      rows: for each kernel row of the block, the outputs (`tap`) that read an input (`source`) through it.
      cols: the same for each kernel column.
      tile: kernel columns that are accumulated together, in registers.
      unroll, unroll_groups: rows of pixels, and groups, in one iteration of the loops over them.
    """
    tiles = [range(start, min(start + tile, len(cols))) for start in range(0, len(cols), tile)]
    images = o_ref.shape[1] // len(cols)
    reads = [_by_source([[(g, x) for x, g in cols[k].pairs()] for k in ks]) for ks in tiles]

    def pixel_row(taps: Taps, read: _Reads, group: Any, j: Any, sums: _Sums) -> _Sums:
        load = lambda ref, row, column: ref[slab.at(row, column, group)].astype(jnp.float32)  # noqa: E731
        pixel = functools.cache(functools.partial(load, x_ref, taps.source + j * taps.source_step))
        totals = list(sums)
        for column, uses in read:
            g = load(g_ref, taps.tap + j * taps.tap_step, column)
            for k, x_column in uses:
                totals[k] = lax.add(totals[k], lax.mul(pixel(x_column), g))
        return tuple(totals)

    def over_images(taps: Taps, read: _Reads, group: Any, sums: _Sums) -> _Sums:
        return _loop(taps.lo, taps.hi, unroll, functools.partial(pixel_row, taps, read, group), sums)

    for k_row, taps in enumerate(rows):
        for ks, read in zip(tiles, reads, strict=True):
            zeros = (jnp.zeros(slab.shape, jnp.float32),) * len(ks)
            sums = _loop(0, slab.groups, unroll_groups, functools.partial(over_images, taps, read), zeros)
            for k, total in zip(ks, sums, strict=True):
                if images == 1:
                    total = jnp.sum(total, axis=0, keepdims=True)
                o_ref[k_row, pl.ds(k * images, images), :] = total


_Sums = tuple[jax.Array, ...]
# Source column -> the (accumulator, other index) pairs that use it, so that each slab is loaded once.
_Reads = list[tuple[int, list[tuple[int, int]]]]


def _by_source(pairs: list[list[tuple[int, int]]]) -> _Reads:
    uses: dict[int, list[tuple[int, int]]] = {}
    for target, reads in enumerate(pairs):
        for source, other in reads:
            uses.setdefault(source, []).append((target, other))
    return sorted(uses.items())


def _loop(lo: Any, hi: Any, unroll: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """carry = step(j, carry) for lo <= j < hi; with static bounds, `unroll` of them to an iteration."""
    if not (isinstance(lo, int) and isinstance(hi, int)):
        return lax.fori_loop(lo, hi, step, carry)
    chunks = max(0, hi - lo) // unroll
    if chunks > 1:

        def chunk(i: Any, carry: Any) -> Any:
            for u in range(unroll):
                carry = step(lo + i * unroll + u, carry)
            return carry

        # Bounds of 32 bits: under x64 Python's integers would make a 64-bit index, which no TPU has.
        carry = lax.fori_loop(np.int32(0), np.int32(chunks), chunk, carry)
        lo += chunks * unroll
    for j in range(lo, hi):
        carry = step(j, carry)
    return carry
