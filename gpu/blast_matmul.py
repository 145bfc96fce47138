"""How products with BLAST matrices run on an NVIDIA GPU.

No program can hold a whole matrix's mixed ranks, nor recompute them for every output block. So one kernel projects to
the ranks and mixes them in registers, and XLA's batched product does the rest: one of the two intermediate results
never reaches memory, and the other is read as it was written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, blast_work
from pallas_kernels.kernels.blast_matmul import mix_looped
from pallas_kernels.kernels.monarch_matmul import exact
from pallas_kernels.lowering import launch

# Sides of the smallest matrices that tensor cores multiply.
GRAIN = 16
TOKENS = 64
# Elements that the 256 threads of a program can add up in registers.
ACCUMULATORS = 16 * 1024
# 64 ranks of float32 spill: exact products split their operands.
BYTES_OF_RANKS = 128
TOO_LARGE = f"a program can't add up more than {ACCUMULATORS // GRAIN**2} blocks in registers"
# A product of fewer tokens is as fast as its factors are read.
FEW_TOKENS = 32


class Plan(NamedTuple):
    """tokens, ranks: of a program."""

    tokens: int
    ranks: int


def multiply(
    x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:
    """x (n, b1 p), v (b1, r, p), s (b2, b1, r), u (b2, r, q) -> (n, b2 q) in x's dtype."""
    z = _mix(x, v, s, blocks, interpret)
    return _sum("jnr,jrf->njf", z, u.astype(x.dtype), interpret).reshape(len(x), -1).astype(x.dtype)


def gradients(
    x: jax.Array,
    g: jax.Array,
    v: jax.Array,
    s: jax.Array,
    u: jax.Array,
    *,
    blocks: Blocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of v, s and u, in float32, for cotangents g (n, b2 q)."""
    n, (b1, b2, p, q, r) = len(x), blocks
    z = _mix(x, v, s, blocks, interpret)
    dy = _mix(g, u, s.swapaxes(0, 1), Blocks(b2, b1, q, p, r), interpret)
    xs, gs = x.reshape(n, b1, p), g.reshape(n, b2, q)
    y, dz = (
        _sum("nkf,krf->rkn", a, f.astype(x.dtype), interpret).astype(x.dtype) for a, f in ((xs, v), (gs, u))
    )
    return (
        _sum("knr,nkp->krp", dy, xs, interpret),
        _sum("rjn,rkn->jkr", dz, y, interpret),
        _sum("jnr,njq->jrq", z, gs, interpret),
    )


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether registers hold a tile of the mixed ranks of all blocks."""
    del n, itemsize, factor_itemsize
    return (max(blocks.b1, blocks.b2) if gradient else blocks.b2) * GRAIN**2 <= ACCUMULATORS


def slower(n: int, blocks: Blocks) -> str | None:
    """Why XLA is faster."""
    if n < FEW_TOKENS:
        return f"for fewer than {FEW_TOKENS} tokens reading the factors is all there is to do"
    return None


def _mix(x: jax.Array, v: jax.Array, s: jax.Array, blocks: Blocks, interpret: Any) -> jax.Array:
    """z (b2, n, r): what U is to be multiplied by."""
    n = len(x)
    b1, b2, true_p, _, true_r = blocks
    p, r = (-(-size // GRAIN) * GRAIN for size in (true_p, true_r))
    tokens, ranks = _plan(n, b2, r, x.dtype.itemsize)
    if p != true_p:
        x = jnp.pad(x.reshape(n, b1, true_p), ((0, 0), (0, 0), (0, p - true_p))).reshape(n, -1)
    x = jnp.pad(x, ((0, -n % tokens), (0, 0)))
    v = jnp.pad(v, ((0, 0), (0, r - true_r), (0, p - true_p)))
    s = jnp.pad(s, ((0, 0), (0, 0), (0, r - true_r)))
    body = functools.partial(mix_looped, blocks=blocks._replace(p=p))
    z = launch(
        body, x, v, s,
        platform="cuda", interpret=interpret, name="blast_mix",
        grid=(len(x) // tokens, r // ranks),
        in_specs=[
            pl.BlockSpec((tokens, b1 * p), lambda i, c: (i, 0)),
            pl.BlockSpec((b1, ranks, p), lambda i, c: (0, c, 0)),
            pl.BlockSpec((b2, b1, ranks), lambda i, c: (0, 0, c)),
        ],
        out_specs=pl.BlockSpec((b2, tokens, ranks), lambda i, c: (0, i, c)),
        out_shape=jax.ShapeDtypeStruct((b2, len(x), r), x.dtype),
        num_warps=8,
        num_stages=2,
        work=blast_work(
            n, blocks._replace(q=0), len(x), itemsize=x.dtype.itemsize, factor_itemsize=v.dtype.itemsize, products=1,
            mix=1,
        )._replace(intermediate_bytes=b2 * len(x) * r * x.dtype.itemsize),
    )  # fmt: skip
    return z[:, :n, :true_r]


def _plan(n: int, b2: int, r: int, itemsize: int) -> Plan:
    """The largest tile whose sums for all blocks, beside operands of so many bytes, fit in registers."""
    tokens = next(
        t for t in (TOKENS, 32, GRAIN) if t == GRAIN or (t < 2 * n and b2 * t * GRAIN <= ACCUMULATORS)
    )
    sizes = [c for c in (64, 32, GRAIN) if r % c == 0 and c * itemsize <= BYTES_OF_RANKS]
    return Plan(tokens, next(c for c in sizes if c == GRAIN or b2 * tokens * c <= ACCUMULATORS))


def _sum(subscripts: str, a: jax.Array, b: jax.Array, interpret: Any) -> jax.Array:
    if interpret:  # XLA:CPU doesn't sum all products of bfloat16 in float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, precision=exact(a), preferred_element_type=jnp.float32)
