"""How products with BLAST matrices run on a TPU.

A program takes a tile of tokens, all blocks and some ranks, which it projects to, mixes and expands in VMEM; programs
of the other ranks add to what it left there.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks, blast_work
from pallas_kernels.kernels.blast_matmul import GROUP, contract, expand, gradients_stacked, multiply_stacked
from pallas_kernels.lowering import launch
from pallas_kernels.tpu.tiles import factor_spec, loadable, token_tiles, vmem_budget

# Rows of bfloat16 in a tile of registers.
GRAIN = 16
# More ranks a program add nothing but code.
MOST_RANKS = 2048
TOO_LARGE = f"{GRAIN} ranks of all blocks don't fit in VMEM"


class Plan(NamedTuple):
    """tokens: of a program, `tiles` times over. ranks: of a program; they divide those there are."""

    tokens: int
    tiles: int
    ranks: int


def multiply(
    x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:
    """x (n, b1 p), v (b1, r, p), s (b2, b1, r), u (b2, r, q) -> (n, b2 q) in x's dtype."""
    dtype, n = x.dtype, len(x)
    x, v, s, u, blocks = _whole_tiles(x, v, s, u, blocks)
    b1, b2, p, q, r = blocks
    tokens, tiles, ranks = _checked_plan(n, blocks, x.dtype.itemsize, v.dtype.itemsize, gradient=False)
    x = jnp.pad(x, ((0, tokens * tiles - n), (0, 0)))
    whole = ranks == r
    out = launch(
        functools.partial(multiply_stacked, blocks=blocks), x, v, expand(s.astype(x.dtype)), u,
        platform="tpu", interpret=interpret, name="blast_matmul",
        grid=(tiles, r // ranks),
        in_specs=[
            pl.BlockSpec((tokens, b1 * p), lambda i, c: (i, 0)),
            factor_spec((b1, ranks, p), lambda i, c: (0, c, 0), whole),
            factor_spec((ranks // GROUP, b2 * GROUP, b1 * GROUP), lambda i, c: (c, 0, 0), whole),
            factor_spec((b2, ranks, q), lambda i, c: (0, c, 0), whole),
        ],
        out_specs=pl.BlockSpec((tokens, b2 * q), lambda i, c: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((len(x), b2 * q), x.dtype),
        scratch_shapes=[] if whole else [pltpu.VMEM((tokens, b2 * q), jnp.float32)],
        sequential=True,
        vmem_limit_bytes=vmem_budget(),
        work=_work(n, len(x), blocks, x, v, products=1),
    )  # fmt: skip
    return out[:n].astype(dtype)


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
    n, rank = len(x), blocks.rank
    x, v, s, u, blocks = _whole_tiles(x, v, s, u, blocks)
    b1, b2, p, q, r = blocks
    tokens, tiles, ranks = _checked_plan(n, blocks, x.dtype.itemsize, v.dtype.itemsize, gradient=True)
    x, g = (jnp.pad(a, ((0, tokens * tiles - n), (0, 0))) for a in (x, loadable(g)))
    matrices = expand(s.astype(x.dtype))
    specs = [
        pl.BlockSpec((b1, ranks, p), lambda c, i: (0, c, 0)),
        pl.BlockSpec((ranks // GROUP, b2 * GROUP, b1 * GROUP), lambda c, i: (c, 0, 0)),
        pl.BlockSpec((b2, ranks, q), lambda c, i: (0, c, 0)),
    ]
    dv, ds, du = launch(
        functools.partial(gradients_stacked, blocks=blocks), x, g, v, matrices, u,
        platform="tpu", interpret=interpret, name="blast_matmul_gradients",
        grid=(r // ranks, tiles),
        in_specs=[
            pl.BlockSpec((tokens, b1 * p), lambda c, i: (i, 0)),
            pl.BlockSpec((tokens, b2 * q), lambda c, i: (i, 0)),
            *specs,
        ],
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (v, matrices, u)],
        sequential=True,
        vmem_limit_bytes=vmem_budget(),
        work=_work(n, len(x), blocks, x, v, products=2),
    )  # fmt: skip
    return dv[:, :rank], contract(ds, b2)[..., :rank], du[:, :rank]


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether VMEM holds a tile of tokens and of ranks."""
    return _plan(n, _whole(blocks), itemsize, factor_itemsize, gradient=gradient) is not None


def slower(n: int, blocks: Blocks) -> str | None:
    """Why XLA is faster."""
    return None


def _checked_plan(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> Plan:
    plan = _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient)
    assert plan is not None, "the operator asks `fits` first"
    return plan


def _plan(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> Plan | None:
    """Ranks enough for a matrix unit, then as many tokens, then as many ranks, as fit."""
    b1, b2, p, q, r = blocks
    choices = [ranks for ranks in range(GRAIN, min(r, MOST_RANKS) + 1, GRAIN) if r % ranks == 0]
    plans = [Plan(*tiles, ranks) for tiles in token_tiles(n) for ranks in choices]
    features = b1 * p + b2 * q

    def fit(plan: Plan) -> bool:
        tokens, _, ranks = plan
        lanes = -(-tokens // 128) * 128
        factors = ranks * (features * factor_itemsize + b1 * b2 * GROUP * itemsize)
        buffers = 2 * tokens * features * itemsize
        if gradient:
            buffers += 2 * factors + 2 * 4 * ranks * (features + b1 * b2 * GROUP)
        elif ranks == r:
            buffers += factors
        else:
            buffers += 2 * factors + 4 * tokens * b2 * q
        return buffers + (1 + gradient) * (b1 + b2) * ranks * lanes * (4 + itemsize) <= vmem_budget()

    def quality(plan: Plan) -> tuple[int, ...]:
        tokens, _, ranks = plan
        if ranks == r and not gradient:  # the factors are read once
            return 2 * MOST_RANKS, min(tokens, 128), tokens, ranks
        return min(ranks, 128, r), min(tokens, 128), min(ranks, 256), tokens, ranks

    return max(filter(fit, plans), key=quality, default=None)


def _whole(blocks: Blocks) -> Blocks:
    return blocks._replace(rank=-(-blocks.rank // GRAIN) * GRAIN)


def _whole_tiles(x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, blocks: Blocks) -> Any:
    """What TPUs can load, with ranks filled up to whole tiles by zeros."""
    x, v, s, u = map(loadable, (x, v, s, u))
    missing = _whole(blocks).rank - blocks.rank
    v, u = (jnp.pad(f, ((0, 0), (0, missing), (0, 0))) for f in (v, u))
    return x, v, jnp.pad(s, ((0, 0), (0, 0), (0, missing))), u, _whole(blocks)


def _work(n: int, tokens: int, blocks: Blocks, x: jax.Array, v: jax.Array, products: int) -> Any:
    factor_itemsize = v.dtype.itemsize + 4 * (products - 1)
    return blast_work(
        n,
        blocks,
        tokens,
        itemsize=x.dtype.itemsize,
        factor_itemsize=factor_itemsize,
        products=products,
        mix=GROUP,
    )
