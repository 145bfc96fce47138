"""How products with BLAST matrices run on a TPU.

A program takes a tile of tokens, all blocks and some ranks, which it projects to, mixes and expands in VMEM; programs
of the other ranks add to what it left there.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks, blast_work
from pallas_kernels.kernels.blast_matmul import GROUP, expand, gradients_stacked, multiply_stacked
from pallas_kernels.lowering import Work, launch
from pallas_kernels.tpu.streams import batchable, halves, in_tiles, tile_buffers, tileable
from pallas_kernels.tpu.tiles import (
    PARTS,
    cores,
    factor_spec,
    loadable,
    rank_first,
    target,
    token_tiles,
    vmem_budget,
    vmem_limit,
)

# Rows of bfloat16 in a tile of registers.
GRAIN = 16
# Tokens that a program may take if others follow: more than 256 save waits, but the compiler has only been seen to keep
# less than all of what lies between the factors in VMEM for this many.
LARGE_TILE = 512
# Bytes of the largest block of a factor that programs wait for amid their work.
LARGE_BLOCK = 2 << 20
# More ranks a program add nothing but code.
MOST_RANKS = 2048
# With how few tokens, and on which TPUs, XLA's own products take no longer than to turn a factor, and the kernel then.
# On v4 they take longer.
FEW_TOKENS, FEW_TOKENS_ON = 512, ("v5e", "v6e")
# Bytes of factors from which on one takes long to turn.
LONG_TO_TURN = 4 << 20
TOO_LARGE = f"{GRAIN} ranks of all blocks don't fit in VMEM"


class Plan(NamedTuple):
    """tokens: of a program, `tiles` times over. ranks: of a program, `parts` times over."""

    tokens: int
    tiles: int
    ranks: int
    parts: int


def multiply(
    x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:
    """x (n, b1 p), v (b1, r, p), s (b2, b1, r), u (b2, r, q) -> (n, b2 q) in x's dtype."""
    dtype = x.dtype
    x, v, s, u, plan = _planned(x, v, s, u, blocks, gradient=False)
    run = functools.partial(_multiply, plan=plan, blocks=blocks, interpret=interpret)
    if not _copies(plan, len(x), blocks, v.dtype.itemsize):
        return run(x, v, s, u, streamed=False).astype(dtype)
    return batchable(run, x, v, s, u, interpret=interpret).astype(dtype)


def _multiply(
    x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, *, plan: Plan, blocks: Blocks, interpret: Any,
    streamed: bool,
) -> jax.Array:  # fmt: skip
    """streamed: whether programs copy arguments and the result themselves: they start sooner, and end sooner.

    Else they get blocks, which a batch of factors can be cut into too.
    """
    n = len(x)
    b1, b2, p, q, _ = blocks
    tokens, tiles, ranks, parts = plan
    divided = math.gcd(tiles, cores())
    whole = parts == 1

    def at(index: Any) -> Any:
        """From a tile of tokens and a part of the ranks; programs that share the matrices made of s come in order."""
        steps = tiles // divided * parts
        return lambda core, step: index(*_divmod(core * steps + step, parts))

    widths = ((b1, p), (b2, q))
    if streamed:
        body: Any = functools.partial(_in_tiles, tokens=tokens)
        x_spec = v_spec = s_spec = u_spec = o_spec = pl.BlockSpec(memory_space=pl.ANY)
        scratch = [
            pltpu.VMEM(s.shape, s.dtype),
            pltpu.SemaphoreType.DMA(()),
            *tile_buffers(tokens, x, v, u, b2, q),
        ]
    else:
        body = _first_expands
        x_spec, o_spec = (pl.BlockSpec((tokens, b * width), at(lambda i, c: (i, 0))) for b, width in widths)
        v_spec, u_spec = (
            factor_spec((b, ranks, width), at(lambda i, c: (0, c, 0)), whole) for b, width in widths
        )
        s_spec = factor_spec(s.shape, at(lambda i, c: (0, 0, 0)), True)
        scratch = [] if whole else [pltpu.VMEM((tokens, b2 * q), jnp.float32)]
    return launch(
        functools.partial(body, functools.partial(multiply_stacked, blocks=blocks, parts=parts)), x, v, s, u,
        platform="tpu", interpret=interpret, name="blast_matmul",
        grid=(divided, tiles // divided * parts),
        in_specs=[x_spec, v_spec, s_spec, u_spec],
        out_specs=o_spec,
        out_shape=jax.ShapeDtypeStruct((n, b2 * q), x.dtype),
        scratch_shapes=[pltpu.VMEM(_matrices(blocks, plan), x.dtype), *scratch],
        sequential=1,
        vmem_limit_bytes=vmem_limit(),
        work=_work(n, plan, blocks, x.dtype.itemsize, v.dtype.itemsize, products=1),
    )  # fmt: skip


def _first_expands(
    run: Any, x_ref: Any, v_ref: Any, s_ref: Any, u_ref: Any, o_ref: Any, m_ref: Any, *scratch: Any
) -> None:
    pl.when(pl.program_id(1) == 0)(lambda: expand(s_ref, m_ref))
    run(x_ref, v_ref, u_ref, o_ref, m_ref, *scratch)


def _in_tiles(
    run: Any, x_hbm: Any, v_hbm: Any, s_hbm: Any, u_hbm: Any, o_hbm: Any, m_ref: Any, s_ref: Any, s_arrived: Any,
    *buffers: Any, tokens: int,
) -> None:  # fmt: skip
    s = pltpu.make_async_copy(s_hbm, s_ref, s_arrived)
    pl.when(pl.program_id(1) == 0)(s.start)

    def expand_s() -> None:
        s.wait()
        expand(s_ref, m_ref)

    # A large tile is mixed for so long that all of u has come.
    outputs = [len(u_hbm)] if tokens == LARGE_TILE else halves(u_hbm)
    run_mixed = functools.partial(run, m_ref=m_ref)
    in_tiles(run_mixed, x_hbm, v_hbm, u_hbm, o_hbm, *buffers, outputs=outputs, before=expand_s)


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
    """The gradients of v, s and u for cotangents g (n, b2 q); in float32 for factors of integers or float16."""
    n, rank = len(x), blocks.rank
    x, v, s, u, plan = _planned(x, v, s, u, blocks, gradient=True)
    b1, b2, p, q, _ = blocks
    tokens, tiles, ranks, parts = plan
    divided = math.gcd(parts, cores())

    def at(index: Any) -> Any:
        steps = parts // divided * tiles
        return lambda core, step: index(*_divmod(core * steps + step, tiles))

    dtype = jnp.dtype(v.dtype if jnp.issubdtype(v.dtype, jnp.floating) else jnp.float32)
    factor_specs = [
        pl.BlockSpec((b1, ranks, p), at(lambda c, i: (0, c, 0))),
        factor_spec(s.shape, at(lambda c, i: (0, 0, 0)), True),
        pl.BlockSpec((b2, ranks, q), at(lambda c, i: (0, c, 0))),
    ]
    dv, ds, du = launch(
        functools.partial(gradients_stacked, blocks=blocks, tokens=n, tiles=tiles, parts=parts),
        x, loadable(g), v, s, u,
        platform="tpu", interpret=interpret, name="blast_matmul_gradients",
        grid=(divided, parts // divided * tiles),
        in_specs=[
            pl.BlockSpec((tokens, b1 * p), at(lambda c, i: (i, 0))),
            pl.BlockSpec((tokens, b2 * q), at(lambda c, i: (i, 0))),
            *factor_specs,
        ],
        out_specs=[
            factor_specs[0],
            pl.BlockSpec((1, *s.shape), lambda core, step: (core, 0, 0, 0)),
            factor_specs[2],
        ],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((divided, *s.shape), jnp.float32 if divided > 1 else s.dtype),
            jax.ShapeDtypeStruct(u.shape, dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM(_matrices(blocks, plan), x.dtype),
            pltpu.VMEM((b1, ranks, p), jnp.float32),
            pltpu.VMEM(_matrices(blocks, plan), jnp.float32),
            pltpu.VMEM((b2, ranks, q), jnp.float32),
        ],
        sequential=1,
        vmem_limit_bytes=vmem_limit(),
        work=_work(n, plan, blocks, x.dtype.itemsize, v.dtype.itemsize + dtype.itemsize, products=2),
    )  # fmt: skip
    return dv[:, :rank], (jnp.sum(ds, 0) if divided > 1 else ds[0])[..., :rank], du[:, :rank]


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether VMEM holds a tile of tokens and of ranks."""
    return _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient) is not None


def slower(n: int, blocks: Blocks, factor_itemsize: int) -> str | None:
    """Why XLA is faster: the kernel takes ranks before features, even where the other order fills fewer tiles."""
    turned = not (rank_first(blocks.rank, blocks.p) and rank_first(blocks.rank, blocks.q))
    few = n <= FEW_TOKENS and target().name in FEW_TOKENS_ON
    if few and turned and _factor_bytes(blocks, factor_itemsize) >= LONG_TO_TURN:
        return f"it would wait until a factor is turned, which for at most {FEW_TOKENS} tokens takes too long"
    return None


def _plan(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> Plan | None:
    """Ranks enough for a matrix unit, then as many tokens, then as many ranks, as fit."""
    b1, b2, p, q, r = blocks
    choices = [(r, 1)] if r <= MOST_RANKS else []
    for ranks in range(GRAIN, min(r, MOST_RANKS), GRAIN):
        parts = -(-r // ranks)
        if (gradient and r % GROUP == 0) or parts * ranks == -(-r // GRAIN) * GRAIN:
            choices.append((ranks, parts))
    plans = [Plan(*tiles, *some) for tiles in token_tiles(n) for some in choices]
    if not gradient:
        large = (Plan(LARGE_TILE, n // LARGE_TILE, *some) for some in choices)
        plans += [plan for plan in large if _copies(plan, n, blocks, factor_itemsize)]
    features = b1 * p + b2 * q

    def fit(plan: Plan) -> bool:
        tokens, _, ranks, parts = plan
        lanes = -(-tokens // 128) * 128
        factors = ranks * features * factor_itemsize
        *matrices, columns = _matrices(blocks, plan)
        mixing, s = math.prod(matrices) * -(-columns // 128) * 128, b1 * b2 * ranks * parts
        buffers = 2 * tokens * features * itemsize + (mixing + s) * itemsize
        # The compiler splits float32 into parts, and keeps those of x, and of factors unless they come one by one.
        waits = not gradient and factor_itemsize == 4 and _copies(plan, n, blocks, factor_itemsize)
        split = 4 * ranks * min(4 * max(p, q) if waits else features, features)
        if gradient:
            # The gradients of s may be in float32.
            buffers += 4 * factors + 4 * ranks * features + 4 * mixing + 8 * s
            split += 16 * tokens * features
        elif parts == 1:
            buffers += factors
        else:
            buffers += 2 * factors + 4 * tokens * b2 * q
            split += 8 * tokens * features
        buffers += split * (itemsize == 4)
        # The compiler rounds what is summed soon enough that no more than this lies in VMEM at once.
        between = (b1 + b2) * ranks * lanes * (2 * (4 + itemsize) if gradient else itemsize)
        between = between * 17 // 20 if tokens == LARGE_TILE else between * 9 // 8
        return buffers + between <= vmem_budget()

    def quality(plan: Plan) -> tuple[int, ...]:
        tokens, tiles, ranks, parts = plan
        once = tiles == 1 or (parts == 1 and not gradient)  # the factors are read once
        full = (
            min(ranks, 128, r),
            min(tokens, 128),
            once,
            -ranks * parts,
            min(ranks, 256),
            -tokens * tiles,
            tokens,
        )
        return (*full, -max(PARTS, parts), parts) if tiles == 1 else (*full, ranks)

    return max(filter(fit, plans), key=quality, default=None)


def _copies(plan: Plan, n: int, blocks: Blocks, factor_itemsize: int) -> bool:
    """Whether programs copy what they take and give: not where the compiler would keep copies of large blocks, too."""
    block = plan.ranks * max(blocks.p, blocks.q) * factor_itemsize
    return plan.parts == 1 and block <= LARGE_BLOCK and tileable(n, plan.tokens)


def _factor_bytes(blocks: Blocks, factor_itemsize: int) -> int:
    return blocks.rank * (blocks.b1 * blocks.p + blocks.b2 * blocks.q) * factor_itemsize


def _planned(
    x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array, blocks: Blocks, *, gradient: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Plan]:
    """What TPUs can load, and the plan.

    Ranks are filled up by zeros to whole parts, but not where each one's results stay apart, in whole groups.
    """
    x, v, s, u = map(loadable, (x, v, s, u))
    plan = _plan(len(x), blocks, x.dtype.itemsize, v.dtype.itemsize, gradient=gradient)
    assert plan is not None, "the operator asks `fits` first"
    missing = plan.ranks * plan.parts - blocks.rank
    if missing and not (gradient and blocks.rank % GROUP == 0):
        v, u = (jnp.pad(f, ((0, 0), (0, missing), (0, 0))) for f in (v, u))
        s = jnp.pad(s, ((0, 0), (0, 0), (0, missing)))
    return x, v, s.astype(x.dtype), u, plan


def _matrices(blocks: Blocks, plan: Plan) -> tuple[int, int, int]:
    """The shape of s, expanded to what mixes a group of ranks of all blocks."""
    return plan.parts * -(-plan.ranks // GROUP), blocks.b2 * GROUP, blocks.b1 * GROUP


def _divmod(a: Any, b: int) -> tuple[Any, Any]:
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _work(n: int, plan: Plan, blocks: Blocks, itemsize: int, factor_itemsize: int, products: int) -> Work:
    return blast_work(
        n,
        blocks._replace(rank=plan.ranks * plan.parts),
        plan.tokens * plan.tiles,
        itemsize=itemsize,
        factor_itemsize=factor_itemsize,
        products=products,
        mix=GROUP,
    )
