"""How products with Monarch matrices run on a TPU.

A program takes a tile of tokens, all input blocks and as many output blocks as VMEM holds. Between the factors tokens
lie along the lanes, so that ranks that are no multiple of 128 cost nothing, and the ranks of all blocks that an output
block adds up are stacked into one product.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks, monarch_work
from pallas_kernels.kernels.monarch_matmul import gradients_stacked, multiply_stacked
from pallas_kernels.lowering import launch
from pallas_kernels.tpu.tiles import (
    PARTS,
    factor_spec,
    loadable,
    matrix_width,
    oriented,
    rank_first,
    token_tiles,
    vmem_budget,
)

TOO_LARGE = "the factors of one block of the output don't fit in VMEM"


class Plan(NamedTuple):
    """tokens: of a program, `tiles` times over. outputs: blocks of a program."""

    tokens: int
    tiles: int
    outputs: int


def multiply(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None = None, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """x (n, b1 p), a (b1, b2 t, p), b (b2, b1 t, q), scale (b2, b1 t) or None -> (n, b2 q) in x's dtype."""
    n, dtype = x.shape[0], x.dtype
    b1, b2, p, q, t = blocks
    x, a, b = (loadable(v) for v in (x, a, b))
    tokens, tiles, jb = _checked_plan(n, blocks, x.dtype.itemsize, a.dtype.itemsize, gradient=False)
    (a, a_features), (b, b_features) = oriented(a), oriented(b)
    # Either the input or the factors are read more than once.
    again = (b2 // jb - 1) * x.nbytes < (tiles - 1) * (a.nbytes + b.nbytes)

    def at(index: Any) -> Any:
        return (lambda j, i: index(i, j)) if again else index

    a_spec, b_spec = _specs(blocks, jb, a_features, b_features)
    specs = [
        pl.BlockSpec((tokens, b1 * p), at(lambda i, j: (i, 0))),
        *(
            factor_spec(shape, at(lambda i, j, index=index: index(j)), jb == b2)
            for shape, index in (a_spec, b_spec)
        ),
    ]
    operands = [x, a, b]
    body = functools.partial(
        multiply_stacked, blocks=blocks._replace(b2=jb), features=(a_features, b_features)
    )
    if scale is None:
        launched = lambda x, a, b, o: body(x, a, b, None, o)  # noqa: E731
    else:
        launched = body
        operands.append(scale.astype(jnp.float32).reshape(b2, b1 * t, 1))
        specs.append(pl.BlockSpec((jb, b1 * t, 1), at(lambda i, j: (j, 0, 0))))
    out = launch(
        launched, *operands,
        platform="tpu", interpret=interpret, name="monarch_matmul",
        grid=(b2 // jb, tiles) if again else (tiles, b2 // jb),
        in_specs=specs,
        out_specs=pl.BlockSpec((tokens, jb * q), at(lambda i, j: (i, j))),
        out_shape=jax.ShapeDtypeStruct((n, b2 * q), x.dtype),
        vmem_limit_bytes=vmem_budget(),
        work=monarch_work(
            n, blocks, tokens * tiles, itemsize=x.dtype.itemsize, factor_itemsize=a.dtype.itemsize, products=1
        ),
    )  # fmt: skip
    return out.astype(dtype)


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
    tokens, tiles, jb = _checked_plan(n, blocks, x.dtype.itemsize, a.dtype.itemsize, gradient=True)
    (a, a_features), (b, b_features) = oriented(a), oriented(b)
    dtype = jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)
    factor_specs = [
        pl.BlockSpec(shape, lambda j, i, index=index: index(j))
        for shape, index in _specs(blocks, jb, a_features, b_features)
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
        sequential=True,
        vmem_limit_bytes=vmem_budget(),
        work=monarch_work(
            n, blocks, tokens * tiles, itemsize=x.dtype.itemsize, factor_itemsize=a.dtype.itemsize + dtype.itemsize,
            products=2,
        ),
    )  # fmt: skip
    return da if a_features else da.swapaxes(1, 2), db if b_features else db.swapaxes(1, 2)


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether VMEM holds what one block of the output takes."""
    return _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient) is not None


def _specs(blocks: Blocks, jb: int, a_features: int, b_features: int) -> list[tuple[tuple[int, ...], Any]]:
    """The shape of the factors' blocks for `jb` output blocks, and their index from that of the output blocks."""
    b1, _, p, q, t = blocks
    return [
        ((b1, jb * t, p), lambda j: (0, j, 0)) if a_features else ((b1, p, jb * t), lambda j: (0, 0, j)),
        ((jb, b1 * t, q) if b_features else (jb, q, b1 * t), lambda j: (j, 0, 0)),
    ]


def _checked_plan(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> Plan:
    plan = _plan(n, blocks, itemsize, factor_itemsize, gradient=gradient)
    assert plan is not None, "the operator asks `fits` first"
    return plan


def _plan(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> Plan | None:
    """As many output blocks a program as a matrix unit needs, then tokens, then output blocks, as fit.

    Blocks are whole tiles of registers, unless all of a kind.
    """
    b1, b2, p, q, t = blocks
    whole = [jb for jb in range(b2, 0, -1) if b2 % jb == 0]
    grain = 16 if rank_first(b2 * t, p) else 128
    choices = [jb for jb in whole if jb == b2 or (jb * t % grain == jb * q % 128 == 0)]
    plans = [Plan(*tiles, jb) for tiles in token_tiles(n) for jb in choices]

    def fit(plan: Plan) -> bool:
        tokens, _, jb = plan
        ranks = b1 * jb * t
        copies = 1 if jb == b2 and not gradient else 2
        buffers = 2 * itemsize * tokens * (b1 * p + jb * q) + copies * factor_itemsize * ranks * (p + q)
        lanes = -(-tokens // 128) * 128
        if gradient:
            buffers += (4 + 2 * factor_itemsize) * ranks * (p + q) + ranks * lanes * itemsize
        return buffers + ranks * lanes * (4 + itemsize) + 8 * tokens * q <= vmem_budget()

    def quality(plan: Plan) -> tuple[int, ...]:
        # Fewer ranks than a matrix unit has rows leave most of it idle, fewer tokens only some.
        full = min(plan.outputs * t, 256, b2 * t), plan.tokens
        return (
            (*full, -max(PARTS, b2 // plan.outputs), -plan.outputs)
            if plan.tiles == 1
            else (*full, plan.outputs)
        )

    return max(filter(fit, plans), key=quality, default=None)


def slower(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int) -> str | None:
    """Why XLA is faster."""
    plan = _plan(n, blocks, itemsize, factor_itemsize, gradient=False)
    if blocks.b1 == blocks.b2 == 1 and plan is not None and plan.tokens < min(n, matrix_width()):
        return "beside factors that large VMEM holds too few tokens for a matrix unit"
    return None
