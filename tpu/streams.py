"""Arrays that a kernel copies between HBM and VMEM itself, in pieces, each amid the work on another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Stream(NamedTuple):
    """Pieces of an array that come from HBM, or go there. VMEM holds two: one is copied amid the work on the other.

    there: the array, in HBM.
    here: (2, *shape of the largest piece).
    copied: a semaphore for each of the two.
    pieces: how many blocks each is.
    axis, width: along which the blocks lie, so wide.
    """

    there: Any
    here: Any
    copied: Any
    pieces: Sequence[int]
    axis: int
    width: int

    def start(self, piece: int) -> None:
        """Let a piece come, if there is one."""
        if piece < len(self.pieces):
            self._copy(piece, comes=True).start()

    def take(self, piece: int) -> Any:
        """A piece that was let come, while the next one comes."""
        self.start(piece + 1)
        self._copy(piece, comes=True).wait()
        return self.here.at[piece % 2]

    def room(self, piece: int) -> Any:
        """Where to write a piece that is to go."""
        if piece >= 2:
            self._copy(piece - 2, comes=False).wait()
        return self.here.at[piece % 2]

    def leave(self, piece: int) -> None:
        """Let a piece go; the last one when all have gone."""
        self._copy(piece, comes=False).start()
        if piece == len(self.pieces) - 1:
            for going in range(max(piece - 1, 0), piece + 1):
                self._copy(going, comes=False).wait()

    def _copy(self, piece: int, *, comes: bool) -> Any:
        slot, size = piece % 2, self.pieces[piece] * self.width

        def part(ref: Any, first: int) -> Any:
            return ref.at[(slice(None),) * self.axis + (pl.ds(first * self.width, size),)]

        there, here = part(self.there, sum(self.pieces[:piece])), part(self.here.at[slot], 0)
        return pltpu.make_async_copy(*((there, here) if comes else (here, there)), self.copied.at[slot])


def growing(blocks: int, most: int) -> list[int]:
    """Pieces of one block, then of at most twice the one before, and `most`.

    So work starts soon, while large pieces are few: each wait divides what is scheduled.
    """
    sizes = [1]
    while left := blocks - sum(sizes):
        sizes.append(min(2 * sizes[-1], most, left))
    return sorted(sizes)


def batchable(run: Callable[..., jax.Array], *arrays: jax.Array, interpret: Any) -> jax.Array:
    """run(*arrays, streamed=True), and for a batch of any of them run(*arrays, streamed=False).

    What a kernel copies itself can't be batched.
    """

    def stream(*arrays: jax.Array) -> jax.Array:
        return run(*arrays, streamed=True)

    # Their effects can't be lowered in a `custom_vmap` by JAX 0.7.2.
    if isinstance(interpret, pltpu.InterpretParams):
        return stream(*arrays)

    def in_blocks(_: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        axes = [0 if some else None for some in batched]
        return jax.vmap(lambda *arrays: run(*arrays, streamed=False), axes)(*arrays), True

    streams = jax.custom_batching.custom_vmap(stream)
    streams.def_vmap(in_blocks)
    return streams(*arrays)
