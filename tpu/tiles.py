"""What products of matrices fit and fill on a TPU: VMEM, tiles of tokens, layouts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lowering import tpu_kind
from pallas_kernels.tpu.targets import TPU, TPUS

# In how many parts factors come where there is one tile of tokens: all but the first arrive amid the work on others.
PARTS = 4


def vmem_bytes() -> int:
    """VMEM of a core of the TPU that a program is traced for, as far as JAX says; else what every TPU since v4 has."""
    sizes = {tpu.device_kind: tpu.vmem_bytes for tpu in TPUS.values()}
    return sizes.get(tpu_kind() or "", min(sizes.values()))


def target() -> TPU:
    """The TPU that a program is traced for, as for `vmem_bytes`; else v5e."""
    return next((tpu for tpu in TPUS.values() if tpu.device_kind == tpu_kind()), TPUS["v5e"])


def vmem_budget() -> int:
    """What a kernel may take of it: XLA keeps some for itself, and overfills the rest if a kernel may take most."""
    return min(vmem_bytes() * 7 // 8, 64 << 20)


def vmem_limit() -> int:
    """What the compiler is told: a plan counts its blocks, not what the compiler needs beside them."""
    return vmem_budget() + (2 << 20)


def cores() -> int:
    """Of the TPU that a program is traced for, as for `vmem_bytes`: those that share a grid's parallel axes."""
    known = {tpu.device_kind: tpu.cores for tpu in TPUS.values()}
    return known.get(tpu_kind() or "", max(known.values()))


def matrix_width() -> int:
    """Columns of a matrix unit of the TPU that a program is traced for, as for `vmem_bytes`."""
    known = {tpu.device_kind: math.isqrt(tpu.matrix_macs // 4) for tpu in TPUS.values()}
    return known.get(tpu_kind() or "", max(known.values()))


def token_tiles(n: int) -> list[tuple[int, int]]:
    """(tokens of a tile, number of tiles) for n tokens along the lanes, the best first; the last tile may hold fewer.

    Tiles are read and written ragged: to fill up x, and cut the result, takes XLA longer than the product.
    """
    if n <= 256:
        return [(max(n, 8), 1), *((size, -(-n // size)) for size in (128, 64, 32, 16) if size < n)]
    sizes = sorted((256, 128), key=lambda size: -(-n // size) * size)
    return [(size, -(-n // size)) for size in (*sizes, 64, 32, 16)]


def factor_spec(shape: tuple[int, ...], index: Any, whole: bool) -> pl.BlockSpec:
    """The blocks of a factor. The whole of it is read once, and needs no second buffer for what comes next."""
    return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1) if whole else None)


def loadable(x: jax.Array) -> jax.Array:
    """TPUs can't even load float16; float32 holds all of it, bfloat16 would not."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def oriented(factor: jax.Array) -> tuple[jax.Array, int]:
    """A factor (blocks, ranks, features), its last two axes exchanged where that fills fewer tiles; the features' axis.

    XLA lays it out so anyhow, and would copy it for the kernel.
    """
    if rank_first(*factor.shape[1:]):
        return factor, 1
    return factor.swapaxes(1, 2), 0


def rank_first(ranks: int, features: int) -> bool:
    def tiles(rows: int, columns: int) -> int:
        return -(-rows // 16) * -(-columns // 128)

    return tiles(ranks, features) <= tiles(features, ranks)
