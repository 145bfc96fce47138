"""How products with Monarch matrices run on a TPU.

Programs for some input blocks each project a tile of tokens, programs for some output blocks each expand what those
have left in VMEM, so that the factors arrive amid the products; where the factors are small, one program does it all.
Where all tokens are one tile, the first and the last program take a single block, because nothing hides its transfer.
Between the factors tokens lie along the lanes, so that ranks that are no multiple of 128 cost nothing, and the ranks
of all blocks that an output block adds up are stacked into one product.
"""

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks, monarch_work
from pallas_kernels.kernels.monarch_matmul import (
    expand_stacked,
    gradients_stacked,
    multiply_stacked,
    project_stacked,
)
from pallas_kernels.lowering import Work, launch
from pallas_kernels.tpu.streams import (
    PIECE,
    Stream,
    batchable,
    growing,
    halves,
    in_tiles,
    tile_buffers,
    tileable,
)
from pallas_kernels.tpu.tiles import (
    PARTS,
    cores,
    factor_spec,
    loadable,
    matrix_width,
    oriented,
    rank_first,
    target,
    token_tiles,
    vmem_budget,
    vmem_limit,
)

# What a program takes beside its products: one for all blocks, one for some of them, and one that copies those itself.
WHOLE_CYCLES, PART_CYCLES, STREAMING_CYCLES = 480, 720, 500
# What a copy takes beside its bytes.
COPY_CYCLES = 250
# Tokens of a tile at most.
TOKENS = 1024
# By how much a plan with pieces of blocks for a single tile of tokens must be better to be taken: their copies are
# strided, which the estimate leaves out.
PIECES = 1.2
# And one whose programs all have code of their own, for pieces of their own sizes.
OWN_CODE = 1.02
# Bytes of factors, of one block, that XLA's two products may read faster than a kernel.
LARGE = 12 << 20
TOO_LARGE = "the factors of one block of the output don't fit in VMEM"


class Plan(NamedTuple):
    """tokens: of a program, `tiles` times over. inputs, outputs: blocks of a program. part: output blocks in a row.

    Programs for the output blocks of a part share what others of that part have projected.

    copies: what programs copy themselves. "pieces": one block, then more, up to those, and at the end fewer again;
      "tiles": tiles of tokens, and all blocks of the factors.
    """

    tokens: int
    tiles: int
    inputs: int
    outputs: int
    part: int
    copies: Literal["", "pieces", "tiles"] = ""


def multiply(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None = None, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """x (n, b1 p), a (b1, b2 t, p), b (b2, b1 t, q), scale (b2, b1 t) or None -> (n, b2 q) in x's dtype."""
    dtype = x.dtype
    x, a, b = (loadable(v) for v in (x, a, b))
    plan_for = functools.partial(
        _checked_plan, len(x), blocks, x.dtype.itemsize, a.dtype.itemsize, gradient=False
    )
    plan = plan_for(copying=scale is None)
    if not plan.copies:
        return _multiply_in_blocks(x, a, b, scale, plan, blocks, interpret).astype(dtype)

    def run(x: jax.Array, a: jax.Array, b: jax.Array, *, streamed: bool) -> jax.Array:
        if streamed:
            return _multiply_copied(x, a, b, plan, blocks, interpret)
        return _multiply_in_blocks(x, a, b, None, plan_for(copying=False), blocks, interpret)

    return batchable(run, x, a, b, interpret=interpret).astype(dtype)


def _multiply_in_blocks(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | None,
    plan: Plan,
    blocks: Blocks,
    interpret: Any,
) -> jax.Array:
    n, (b1, b2, p, q, t), (tokens, tiles, kb, jb, part, _) = len(x), blocks, plan
    (a, a_features), (b, b_features) = oriented(a), oriented(b)

    # The last program of a tile of tokens that projects is the first that expands.
    last, steps = b1 // kb - 1, part // jb

    def projecting(s: Any) -> Any:
        return jnp.minimum(s, last)

    def expanding(o: Any, s: Any) -> Any:
        return o * steps + jnp.maximum(s - last, 0)

    (a_shape, a_index), (b_shape, b_index) = _specs(blocks, kb, jb, part, a_features, b_features)
    specs = [
        pl.BlockSpec((tokens, kb * p), lambda o, i, s: (i, projecting(s))),
        factor_spec(a_shape, lambda o, i, s: a_index(projecting(s), o), (kb, part) == (b1, b2)),
        factor_spec(b_shape, lambda o, i, s: b_index(expanding(o, s)), jb == b2),
    ]
    operands = [x, a, b]
    body = functools.partial(
        multiply_stacked, blocks=blocks._replace(b2=part), features=(a_features, b_features)
    )
    if scale is None:
        launched = lambda x, a, b, *refs: body(x, a, b, None, *refs)  # noqa: E731
    else:
        launched = body
        rows = scale.astype(jnp.float32).reshape(b2 // part, part, b1, t).swapaxes(1, 2)
        operands.append(rows.reshape(b2 // part, b1, part * t, 1))
        specs.append(pl.BlockSpec((None, kb, part * t, 1), lambda o, i, s: (o, projecting(s), 0, 0)))
    return launch(
        launched, *operands,
        platform="tpu", interpret=interpret, name="monarch_matmul",
        grid=(b2 // part, tiles, last + steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((tokens, jb * q), lambda o, i, s: (i, expanding(o, s))),
        out_shape=jax.ShapeDtypeStruct((n, b2 * q), x.dtype),
        scratch_shapes=[pltpu.VMEM((b1, part, t, tokens), _between_dtype(x, t))],
        sequential=1,
        vmem_limit_bytes=vmem_limit(),
        work=_work(x, a, blocks, tokens * tiles),
    )  # fmt: skip


def _multiply_copied(
    x: jax.Array, a: jax.Array, b: jax.Array, plan: Plan, blocks: Blocks, interpret: Any
) -> jax.Array:
    n, (b1, b2, p, q, t) = len(x), blocks
    (a, a_features), (b, b_features) = oriented(a), oriented(b)
    features, tokens = (a_features, b_features), plan.tokens
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    if plan.copies == "tiles":
        body: Any = functools.partial(_in_tiles, features)
        divided = math.gcd(plan.tiles, cores())
        grid = divided, plan.tiles // divided
        buffers = tile_buffers(tokens, x, a, b, b2, q)
    else:
        inputs, outputs = growing(b1, plan.inputs), growing(b2, plan.outputs)[::-1]
        body = functools.partial(_in_pieces, inputs, outputs, (p, q), features)
        grid = (len(inputs) + len(outputs) - 1,)
        buffers = [
            pltpu.VMEM((2, tokens, max(inputs) * p), x.dtype),
            pltpu.VMEM((2, max(inputs), *a.shape[1:]), a.dtype),
            pltpu.VMEM((2, max(outputs), *b.shape[1:]), b.dtype),
            pltpu.VMEM((2, tokens, max(outputs) * q), x.dtype),
            pltpu.SemaphoreType.DMA((4, 2)),
        ]
    return launch(
        body, x, a, b,
        platform="tpu", interpret=interpret, name="monarch_matmul",
        grid=grid,
        in_specs=[in_hbm] * 3,
        out_specs=in_hbm,
        out_shape=jax.ShapeDtypeStruct((n, b2 * q), x.dtype),
        scratch_shapes=[pltpu.VMEM((b1, b2, t, tokens), _between_dtype(x, t)), *buffers],
        sequential=1,
        vmem_limit_bytes=vmem_limit(),
        work=_work(x, a, blocks, n),
    )  # fmt: skip


def _in_tiles(
    features: tuple[int, int], x_hbm: Any, a_hbm: Any, b_hbm: Any, o_hbm: Any, y_ref: Any, *buffers: Any
) -> None:
    b1, b2, *_ = y_ref.shape

    def run(x: Any, a: Any, b: Any, o: Any) -> None:
        project_stacked(x, a, None, y_ref, 0, b1, axis=features[0])
        expand_stacked(y_ref, b, o, 0, b2, axis=features[1])

    in_tiles(run, x_hbm, a_hbm, b_hbm, o_hbm, *buffers, outputs=halves(b_hbm))


def _in_pieces(
    inputs: list[int], outputs: list[int], widths: tuple[int, int], features: tuple[int, int], x_ref: Any, a_ref: Any,
    b_ref: Any, o_ref: Any, y_ref: Any, x_here: Any, a_here: Any, b_here: Any, o_here: Any, copied: Any,
) -> None:  # fmt: skip
    """A program takes a piece of the input blocks or of the output blocks, and the one amid them one of each."""
    step, last = pl.program_id(0), len(inputs) - 1
    x = Stream(x_ref, x_here, copied.at[0], inputs, axis=1, width=widths[0])
    a = Stream(a_ref, a_here, copied.at[1], inputs, axis=0, width=1)
    b = Stream(b_ref, b_here, copied.at[2], outputs, axis=0, width=1)
    o = Stream(o_ref, o_here, copied.at[3], outputs, axis=1, width=widths[1])

    def start() -> None:
        for stream in (x, a, b):
            stream.start(0)

    def project(i: int) -> None:
        project_stacked(x.take(i), a.take(i), None, y_ref, sum(inputs[:i]), inputs[i], axis=features[0])

    def expand(i: int) -> None:
        expand_stacked(y_ref, b.take(i), o.room(i), sum(outputs[:i]), outputs[i], axis=features[1])
        o.leave(i)

    pl.when(step == 0)(start)
    for i in range(len(inputs)):
        pl.when(step == i)(functools.partial(project, i))
    for i in range(len(outputs)):
        pl.when(step == last + i)(functools.partial(expand, i))


def gradients(
    x: jax.Array,
    g: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    blocks: Blocks,
    dtype: Any,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of a and b, in `dtype` (float16: in float32), for cotangents g (n, b2 q)."""
    n = x.shape[0]
    b1, b2, p, q, _ = blocks
    x, g, a, b = (loadable(v) for v in (x, g, a, b))
    tokens, tiles, _, jb, *_ = _checked_plan(n, blocks, x.dtype.itemsize, a.dtype.itemsize, gradient=True)
    (a, a_features), (b, b_features) = oriented(a), oriented(b)
    dtype = jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)
    (a_shape, a_index), (b_shape, b_index) = _specs(blocks, b1, jb, jb, a_features, b_features)
    factor_specs = [
        pl.BlockSpec(a_shape, lambda j, i: a_index(0, j)),
        pl.BlockSpec(b_shape, lambda j, i: b_index(j)),
    ]
    body = functools.partial(
        gradients_stacked, blocks=blocks._replace(b2=jb), tokens=n, features=(a_features, b_features)
    )
    da, db = launch(
        body, x, g, a, b,
        platform="tpu", interpret=interpret, name="monarch_matmul_gradients",
        grid=(b2 // jb, tiles),
        in_specs=[
            pl.BlockSpec((tokens, b1 * p), lambda j, i: (i, 0)),
            pl.BlockSpec((tokens, jb * q), lambda j, i: (i, j)),
            *factor_specs,
        ],
        out_specs=factor_specs,
        out_shape=[jax.ShapeDtypeStruct(v.shape, dtype) for v in (a, b)],
        scratch_shapes=[pltpu.VMEM(spec.block_shape, jnp.float32) for spec in factor_specs],
        sequential=1,
        vmem_limit_bytes=vmem_limit(),
        work=monarch_work(
            n, blocks, tokens * tiles, itemsize=x.dtype.itemsize, factor_itemsize=a.dtype.itemsize + dtype.itemsize,
            products=2,
        ),
    )  # fmt: skip
    return da if a_features else da.swapaxes(1, 2), db if b_features else db.swapaxes(1, 2)


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether VMEM holds what one block of the output takes."""
    return _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient) is not None


def _specs(
    blocks: Blocks, kb: int, jb: int, part: int, a_features: int, b_features: int
) -> list[tuple[tuple[int, ...], Any]]:
    """The shapes of the factors' blocks; their index from that of the inputs and the part, and of the outputs."""
    b1, _, p, q, t = blocks
    ranks = part * t
    return [
        ((kb, ranks, p), lambda k, o: (k, o, 0)) if a_features else ((kb, p, ranks), lambda k, o: (k, 0, o)),
        ((jb, b1 * t, q) if b_features else (jb, q, b1 * t), lambda j: (j, 0, 0)),
    ]


def _work(x: jax.Array, a: jax.Array, blocks: Blocks, tokens: int) -> Work:
    itemsizes = {"itemsize": x.dtype.itemsize, "factor_itemsize": a.dtype.itemsize}
    return monarch_work(len(x), blocks, tokens, **itemsizes, products=1)


def _between_dtype(x: jax.Array, t: int) -> Any:
    """Of what lies between the factors: rows of 16-bit numbers are read in whole tiles."""
    return jnp.float32 if t % 16 else x.dtype


def _checked_plan(
    n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool, copying: bool = False
) -> Plan:
    plan = _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient, copying=copying)
    assert plan is not None, "the operator asks `fits` first"
    return plan


def _plan(
    n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool, copying: bool = False
) -> Plan | None:
    """The fewest cycles that fit; for gradients as many output blocks a program as a matrix unit needs, then tokens.

    Blocks are whole tiles of registers, unless all of a kind.
    """
    b1, b2, p, q, t = blocks
    grain = 16 if rank_first(b2 * t, p) else 128

    def divisors(count: int, width: int) -> list[int]:
        return [m for m in range(count, 0, -1) if count % m == 0 and (m == count or m * width % 128 == 0)]

    parts = [part for part in divisors(b2, q) if part == b2 or part * t % grain == 0]
    if gradient:
        plans = [Plan(*tiles, b1, part, part) for tiles in token_tiles(n) for part in parts]
    else:
        large = [(min(size, n), -(-n // size)) for size in (TOKENS, TOKENS // 2) if n > size // 2]
        tilings = [*large, *token_tiles(n)]
        plans = [
            Plan(*tiles, kb, jb, part)
            for tiles, kb, part in itertools.product(tilings, divisors(b1, p), parts)
            for jb in divisors(b2, q)
            if part % jb == 0
        ]
        if copying:
            plans += [Plan(*tiles, b1, b2, b2, copies="tiles") for tiles in tilings if tileable(n, tiles[0])]
        if copying and n <= TOKENS and p % 128 == q % 128 == 0:
            pieces = itertools.product(range(1, b1), range(1, b2))
            plans += [Plan(n, 1, kb, jb, b2, copies="pieces") for kb, jb in pieces]

    def fit(plan: Plan) -> bool:
        tokens, _, kb, jb, part, _ = plan
        lanes = -(-tokens // 128) * 128
        buffers = 2 * itemsize * tokens * (kb * p + jb * q) + 8 * tokens * q
        if gradient:
            ranks = b1 * part * t
            factors = (4 + 4 * factor_itemsize) * ranks * (p + q)
            # The compiler splits float32 into parts, three of x and g, and keeps them.
            buffers += (12 * tokens * (b1 * p + part * q) + 4 * ranks * (p + q)) * (itemsize == 4)
            return buffers + factors + ranks * lanes * (4 + 2 * itemsize) <= vmem_budget()
        a, b = (1 if whole else 2 for whole in ((kb, part) == (b1, b2), jb == b2))
        factors = factor_itemsize * t * (a * kb * part * p + b * jb * b1 * q)
        between = b1 * part * -(-t // 16) * 16 * lanes * (4 if t % 16 else itemsize)
        if itemsize == 4 and not plan.copies and (kb, jb, part) != (b1, b2, b2):
            # Parts that float32 is split into are kept where a program has some blocks.
            buffers += 4 * tokens * (kb * p + jb * q) + 4 * t * (kb * part * p + jb * b1 * q) + between
        # Results that start amid the lanes are shifted there.
        buffers += 8 * tokens * q * (q % 128 > 0)
        # The compiler takes some more to keep what registers can't.
        between += 0 if plan.copies == "pieces" else 8 * part * t * lanes
        # Of a block that is waited for it keeps a copy, and more.
        factors += factor_itemsize * t * max(b2 * p, b1 * q) * 3 // 2 * (plan.copies == "tiles")
        return buffers + factors + between * 9 // 8 <= vmem_budget()

    def quality(plan: Plan) -> Any:
        if not gradient:
            # Parts are pieces of every block of a factor: they serve to read it once for many tiles of tokens.
            in_pieces = plan.part < b2 and plan.tiles == 1
            doubt = PIECES if in_pieces else OWN_CODE if plan.copies == "pieces" else 1
            return -_cycles(plan, n, blocks, itemsize, factor_itemsize) * doubt
        # Fewer ranks than a matrix unit has rows leave most of it idle, fewer tokens only some.
        full = min(plan.part * t, 256, b2 * t), plan.tokens
        return (*full, -max(PARTS, b2 // plan.part), -plan.part) if plan.tiles == 1 else (*full, plan.part)

    return max(filter(fit, plans), key=quality, default=None)


def _cycles(plan: Plan, n: int, blocks: Blocks, itemsize: int, factor_itemsize: int) -> float:
    """About what the plan takes: products after the first blocks have come and before the last has gone, or HBM."""
    if plan.copies == "pieces":
        return _cycles_in_pieces(plan, blocks, itemsize, factor_itemsize)
    tokens, tiles, kb, jb, part, _ = plan
    b1, b2, p, q, t = blocks
    if (kb, jb) == (b1, b2):
        return _cycles_in_tiles(plan, blocks, itemsize, factor_itemsize)
    tpu = target()
    parts, programs = b2 // part, b1 // kb + part // jb - 1
    x, a, b = itemsize * n * b1 * p, *(factor_itemsize * b1 * b2 * t * features for features in (p, q))
    ends = itemsize * tokens * (kb * p + jb * q) + a * kb // b1 // parts + b * jb // b2
    # What the next program takes too is not read again.
    moved = (
        x * (1 if tiles == 1 and kb == b1 else parts)
        + a * (1 if kb == b1 else tiles)
        + b * (1 if jb == part else tiles)
        + itemsize * n * b2 * q
    )
    rounds = -(-tiles * parts // tpu.cores)
    products = rounds * sum(_product_cycles(tokens, blocks._replace(b2=part)))
    busy = max(products + ends / tpu.hbm_bytes_per_cycle, moved / tpu.cores / tpu.hbm_bytes_per_cycle)
    return busy + rounds * programs * PART_CYCLES


def _cycles_in_tiles(plan: Plan, blocks: Blocks, itemsize: int, factor_itemsize: int) -> float:
    """While a tile is multiplied, the next one comes, and the one before goes, or the same if programs copy theirs."""
    tpu, (b1, b2, p, q, t) = target(), blocks
    steps = -(-plan.tiles // tpu.cores)
    work = sum(_product_cycles(plan.tokens, blocks)) + WHOLE_CYCLES
    come, go = (itemsize * plan.tokens * size / tpu.hbm_bytes_per_cycle for size in (b1 * p, b2 * q))
    a, b = (factor_itemsize * b1 * b2 * t * features for features in (p, q))
    factors, comes = (a + b) / tpu.hbm_bytes_per_cycle, [come] * (steps - 1) + [0]
    first, goes, last = come + factors, [0] + [go] * (steps - 1), go
    if plan.copies:
        first = (come + a / tpu.hbm_bytes_per_cycle) * min(1, max(1 / b1, PIECE / a))
        comes[0], goes, last = comes[0] + come + factors - first, [go] * steps, go / b2
    return first + sum(max(work, COPY_CYCLES + c + g) for c, g in zip(comes, goes, strict=True)) + last


def _cycles_in_pieces(plan: Plan, blocks: Blocks, itemsize: int, factor_itemsize: int) -> float:
    """While a piece is multiplied, the next one comes, and the one before goes."""
    n, (b1, b2, p, q, t) = plan.tokens, blocks
    inputs, outputs = growing(b1, plan.inputs), growing(b2, plan.outputs)[::-1]
    projecting, expanding = _product_cycles(n, blocks)
    works = [k * projecting / b1 for k in inputs] + [j * expanding / b2 for j in outputs]
    comes = [k * p * (itemsize * n + factor_itemsize * b2 * t) for k in inputs]
    comes += [j * q * factor_itemsize * b1 * t for j in outputs]
    goes = [0] * len(inputs) + [j * q * itemsize * n for j in outputs]
    rate = target().hbm_bytes_per_cycle
    amid = (
        max(work + STREAMING_CYCLES, COPY_CYCLES + (come + go) / rate)
        for work, come, go in zip(works, [*comes[1:], 0], [0, *goes[:-1]], strict=True)
    )
    return comes[0] / rate + sum(amid) + goes[-1] / rate


def _product_cycles(tokens: int, blocks: Blocks) -> tuple[float, float]:
    """Of the products with all blocks of the first factor, and of the second."""
    b1, b2, p, q, t = blocks
    width = matrix_width()
    lanes, inputs, ranks, outputs = (-(-size // width) * width for size in (tokens, p, b1 * t, q))
    cycles = lanes * b2 / target().matrix_macs
    return cycles * b1 * t * inputs, cycles * ranks * outputs


def slower(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int) -> str | None:
    """Why XLA is faster: a factor of one block comes as a whole, while XLA reads it amid the product with the other."""
    plan = _plan(n, blocks, itemsize, factor_itemsize, gradient=False)
    if blocks.b1 * blocks.b2 > 1 or plan is None:
        return None
    factors, tpu = blocks.rank * (blocks.p + blocks.q), target()
    large = factors * factor_itemsize >= LARGE
    # Half of a wide matrix unit's lanes may be filled by choice.
    if plan.tokens < min(n, matrix_width() if large else 128):
        return "beside factors that large VMEM holds too few tokens for a matrix unit"
    waits = factors * factor_itemsize / tpu.hbm_bytes_per_cycle
    products = plan.tiles * -(-plan.tokens // 128) * 128 * factors / tpu.matrix_macs
    # XLA's own products with fewer tokens, or with small factors, take longer than the wait.
    if n >= 128 and large and waits > 0.8 * products:
        return "it would wait for factors that large almost as long as it multiplies so few tokens by them"
    return None


def settled(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, on 7x computed before all that follows, where XLA would pin more of wide layers than VMEM holds.

    It gives up then. On other TPUs it finds room, and to wait would only take longer.
    """
    return jax.lax.optimization_barrier(arrays) if target().name == "7x" else arrays
