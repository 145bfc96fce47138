"""Arrays that a kernel copies between HBM and VMEM itself, in pieces, each amid the work on another."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.tiles import cores

# Bytes of the first piece of an array at least: waiting for each divides what is scheduled.
PIECE = 1 << 20


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


class Arriving(NamedTuple):
    """Blocks on their way from HBM to VMEM, in pieces: to take the first block of a piece is to wait for the piece.

    pieces, axis, width: as in `Stream`; blocks along the second axis are taken as slices of its columns.
    """

    there: Any
    here: Any
    arrived: Any
    pieces: Sequence[int]
    axis: int = 0
    width: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.here.shape

    @property
    def dtype(self) -> Any:
        return self.here.dtype

    def start(self, piece: int) -> None:
        """Let a piece come, if there is one."""
        if piece < len(self.pieces):
            self._copy(piece).start()

    def __getitem__(self, at: Any) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        block = at[1].start // self.width if self.axis else at
        firsts = [sum(self.pieces[:piece]) for piece in range(len(self.pieces))]
        if block in firsts:
            self._copy(firsts.index(block)).wait()
        return self.here[at]

    def _copy(self, piece: int) -> Any:
        part = pl.ds(sum(self.pieces[:piece]) * self.width, self.pieces[piece] * self.width)
        there, here = (ref.at[(slice(None),) * self.axis + (part,)] for ref in (self.there, self.here))
        return pltpu.make_async_copy(there, here, self.arrived.at[piece])


class Leaving(NamedTuple):
    """A tile on its way from VMEM to HBM, in a piece of its columns for each semaphore.

    Blocks are written in order, and the last of a piece lets the piece go.

    there, here: Refs of the tile.
    """

    there: Any
    here: Any
    left: Any

    @property
    def dtype(self) -> Any:
        return self.here.dtype

    @property
    def _width(self) -> int:
        """Columns of a piece."""
        return self.here.shape[1] // self.left.shape[0]

    def _piece(self, i: int) -> Any:
        part = pl.ds(i * self._width, self._width)
        return pltpu.make_async_copy(self.here.at[:, part], self.there.at[:, part], self.left.at[i])

    def __setitem__(self, at: tuple[slice, slice], columns: jax.Array) -> None:
        self.here[at] = columns
        if at[1].stop % self._width == 0:
            self._piece(at[1].stop // self._width - 1).start()

    def wait(self) -> None:
        """Until all of it has gone."""
        for i in range(self.left.shape[0]):
            self._piece(i).wait()


def in_tiles(
    run: Callable[..., None], x_hbm: Any, a_hbm: Any, b_hbm: Any, o_hbm: Any, x_here: Any, a_here: Any, b_here: Any,
    o_here: Any, x_arrived: Any, arrived: Any, left: Any, *, outputs: Sequence[int],
    before: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """run(x, a, b, o) with a tile of tokens in a program, which takes x from the one before and leaves o to one after.

    The first program reads x and the factors amid its work, in code of its own.

    Args:
      x_here, a_here, b_here, o_here, x_arrived, arrived, left: `tile_buffers`.
      outputs: the pieces that b is read in.
      before: what the first program does while these come.
    """
    step, steps = pl.program_id(1), pl.num_programs(1)
    first, tokens, earlier = step == 0, x_here.shape[1], pl.program_id(0) * steps

    def tile(hbm: Any, i: Any) -> Any:
        return hbm.at[pl.ds((earlier + i) * tokens, tokens)]

    def x_of(i: Any) -> Any:
        slot = lax.rem(i, jnp.int32(2))
        return pltpu.make_async_copy(tile(x_hbm, i), x_here.at[slot], x_arrived.at[slot])

    def result_of(i: Any) -> Leaving:
        slot = lax.rem(i, jnp.int32(2))
        return Leaving(tile(o_hbm, i), o_here.at[slot], left.at[slot])

    width = x_here.shape[2] // len(a_here)
    inputs = _first_pieces(a_here, width)
    x = Arriving(tile(x_hbm, 0), x_here.at[0], arrived.at[0], inputs, axis=1, width=width)
    a = Arriving(a_hbm, a_here, arrived.at[1], inputs)
    b = Arriving(b_hbm, b_here, arrived.at[2], outputs)

    @pl.when(first)
    def _() -> None:
        for piece in range(len(inputs)):
            x.start(piece)
            a.start(piece)
        for piece in range(len(outputs)):
            b.start(piece)

    pl.when(step + 1 < steps)(lambda: x_of(step + 1).start())

    @pl.when(first)
    def _() -> None:
        before()
        run(x, a, b, result_of(step))

    @pl.when(~first)
    def _() -> None:
        x_of(step).wait()
        pl.when(step > 1)(lambda: result_of(step - 2).wait())
        run(x_here.at[lax.rem(step, jnp.int32(2))], a_here, b_here, result_of(step))

    @pl.when(step == steps - 1)
    def _() -> None:
        pl.when(~first)(lambda: result_of(step - 1).wait())
        result_of(step).wait()


def _first_pieces(factor: Any, width: int) -> list[int]:
    """The pieces that a factor is read in, with blocks of x so wide: of `PIECE` bytes, of twice that, and the rest."""
    blocks = len(factor)
    if width % 128:
        return [blocks]
    first = min(-(-PIECE * blocks // _nbytes(factor)), blocks)
    second = min(2 * first, blocks - first)
    return [piece for piece in (first, second, blocks - first - second) if piece]


def halves(factor: Any) -> list[int]:
    """The pieces that a factor is read in if another is needed before it: each wait costs, and there is time."""
    blocks = len(factor)
    return [blocks // 2, blocks - blocks // 2] if blocks > 1 and _nbytes(factor) >= 4 * PIECE else [blocks]


def _nbytes(ref: Any) -> int:
    return math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize


def tileable(n: int, tokens: int) -> bool:
    """Whether `in_tiles` takes n tokens, so many at a time: in whole tiles, on each core as many, and more than one."""
    return n % (tokens * cores()) == 0 and n > tokens * cores()


def tile_buffers(tokens: int, x: jax.Array, a: jax.Array, b: jax.Array, blocks: int, width: int) -> list[Any]:
    """The scratch of `in_tiles`, for results of `blocks` blocks, so wide."""
    x_here, o_here = (pltpu.VMEM((2, tokens, columns), x.dtype) for columns in (x.shape[1], blocks * width))
    # Copies start and end at whole tiles of 128 columns, or take all.
    together = 128 // math.gcd(width, 128)
    left = blocks // together if blocks % together == 0 else 1
    return [
        x_here,
        *(pltpu.VMEM(f.shape, f.dtype) for f in (a, b)),
        o_here,
        *(pltpu.SemaphoreType.DMA(shape) for shape in ((2,), (3, 3), (2, left))),
    ]


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
