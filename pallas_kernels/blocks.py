"""The shapes of block-low-rank matrices, shared by the definitions, the launchers and the compression.

A matrix of `b2 * q` rows and `b1 * p` columns is cut into blocks of q by p. Every factor has its rank before its
features, so that the factors of the transpose are those of the matrix, exchanged.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.lowering import Work

# (start, length) of parts of a size.
Parts = Sequence[tuple[int, int]]


class Blocks(NamedTuple):
    """Block (j, k) of `b2` by `b1` maps p inputs to q outputs.

    rank: of a block of a Monarch matrix; all blocks of a BLAST matrix share theirs.
    """

    b1: int
    b2: int
    p: int
    q: int
    rank: int

    @property
    def inputs(self) -> int:
        return self.b1 * self.p

    @property
    def outputs(self) -> int:
        return self.b2 * self.q


def monarch_work(
    n: int, blocks: Blocks, tokens: int, *, itemsize: int, factor_itemsize: int, products: int
) -> Work:
    """What a Monarch product of n tokens takes, filled up to `tokens`; its gradients are twice the products."""
    b1, b2, p, q, t = blocks
    parameters = b1 * b2 * t * (p + q)
    flops = 2 * products * parameters
    return Work(flops * n, _bytes(n, blocks, itemsize) + parameters * factor_itemsize, flops * tokens)


def blast_work(
    n: int, blocks: Blocks, tokens: int, *, itemsize: int, factor_itemsize: int, products: int, mix: int
) -> Work:
    """The same for BLAST, where the ranks of `mix` blocks are multiplied for each one that counts."""
    b1, b2, p, q, r = blocks
    dense, mixed = r * (b1 * p + b2 * q), r * b1 * b2
    return Work(
        2 * n * products * (dense + mixed),
        _bytes(n, blocks, itemsize) + (dense + mixed) * factor_itemsize,
        2 * tokens * products * (dense + mix * mixed),
    )


def _bytes(n: int, blocks: Blocks, itemsize: int) -> int:
    return n * (blocks.inputs + blocks.outputs) * itemsize


def powers_of_two(size: int, most: int) -> list[tuple[int, int]]:
    """(start, length) of parts of `size`, each a power of two up to `most`, the longest first.

    >>> powers_of_two(48, 64), powers_of_two(768, 512)
    ([(0, 32), (32, 16)], [(0, 512), (512, 256)])
    """
    parts, start = [], 0
    while start < size:
        length = min(most, 1 << ((size - start).bit_length() - 1))
        parts.append((start, length))
        start += length
    return parts


def gradient_dtype(factor: Any) -> Any:
    """What a factor's gradient is computed in: that of integers, which nobody asks for, in float32."""
    return factor.dtype if jnp.issubdtype(factor.dtype, jnp.floating) else jnp.dtype(jnp.float32)
