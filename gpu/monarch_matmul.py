"""How products with Monarch matrices run on an NVIDIA GPU, if somebody asks for a kernel.

A program computes one tile of one output block. The ranks that block shares with each input block belong to no other,
so they never leave its registers, and nothing is computed twice unless a wide block is cut into columns.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, Parts, monarch_work, powers_of_two
from pallas_kernels.kernels.monarch_matmul import gradients_looped, multiply_looped
from pallas_kernels.lowering import launch

# Sides of the smallest matrices that tensor cores multiply, and of the parts that blocks are cut into.
GRAIN, PART = 16, 64
# Columns that 256 threads can add up for 64 tokens, in one piece; and for 32 tokens, in parts.
COLUMNS, COLUMNS_IN_PARTS = 256, 640
# Elements of gradients that they can.
ACCUMULATORS = 16 * 1024
# Programs that fill a GPU.
PROGRAMS = 256
SLOWER = "two batched products by cuBLAS, and what transposes the ranks between them, are faster"
TOO_LARGE = "tensor cores would recompute or spill ranks above 256: that is two products of large matrices"


class Plan(NamedTuple):
    """tokens, columns: of a program. outputs: the parts of the columns."""

    tokens: int
    columns: int
    outputs: Parts


def multiply(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None = None, *, blocks: Blocks, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """x (n, b1 p), a (b1, b2 t, p), b (b2, b1 t, q), scale (b2, b1 t) or None -> (n, b2 q) in x's dtype."""
    n, true = x.shape[0], blocks
    x, _, a, b, scale, blocks = _whole_parts(x, None, a, b, scale, blocks)
    b1, b2, p, q, t = blocks
    tokens, columns, outputs = _plan(n, blocks, x.dtype.itemsize, scaled=scale is not None)
    x = jnp.pad(x, ((0, -n % tokens), (0, 0)))
    tiles = -(-q // columns)
    operands = [x, a, b]
    specs = [
        pl.BlockSpec((tokens, b1 * p), lambda i, j, c: (i, 0)),
        pl.BlockSpec((b1, t, p), lambda i, j, c: (0, j, 0)),
        pl.BlockSpec((1, b1 * t, columns), lambda i, j, c: (j, 0, c)),
    ]
    body = functools.partial(multiply_looped, blocks=blocks, ranks=powers_of_two(t, PART), outputs=outputs)
    if scale is None:
        launched = lambda x, a, b, o: body(x, a, b, None, o)  # noqa: E731
    else:
        launched = body
        operands.append(scale.astype(jnp.float32).reshape(b2, b1 * t, 1))
        specs.append(pl.BlockSpec((1, b1 * t, 1), lambda i, j, c: (j, 0, 0)))
    out = launch(
        launched, *operands,
        platform="cuda", interpret=interpret, name="monarch_matmul",
        grid=(x.shape[0] // tokens, b2, tiles),
        in_specs=specs,
        out_specs=pl.BlockSpec((tokens, columns), lambda i, j, c: (i, j * tiles + c)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], b2 * q), x.dtype),
        num_warps=8,
        num_stages=2,
        work=monarch_work(
            n, true, x.shape[0], itemsize=x.dtype.itemsize, factor_itemsize=a.dtype.itemsize, products=1
        ),
    )  # fmt: skip
    return out[:n].reshape(n, b2, q)[..., : true.q].reshape(n, -1)


def gradients(
    x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array, *, blocks: Blocks, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """The gradients of a and b, in float32, for cotangents g (n, b2 q)."""
    n, true = x.shape[0], blocks
    x, g, a, b, _, blocks = _whole_parts(x, g, a, b, None, blocks)
    b1, b2, p, q, t = blocks
    # Ranks are as independent as blocks: as many together as registers hold beside the operands.
    room = 2 * ACCUMULATORS // (x.dtype.itemsize * (p + q))
    rows = next(r for r in (64, 32, 16) if t % r == 0 and (r == GRAIN or r <= room))
    tokens = 32
    tiles = t // rows
    parts = max(1, min(-(-n // (4 * tokens)), PROGRAMS // (b1 * b2 * tiles)))
    part = -(-n // (parts * tokens)) * tokens
    x, g = (jnp.pad(v, ((0, parts * part - n), (0, 0))) for v in (x, g))

    def spec(columns: int, transposed: bool, summed: bool) -> pl.BlockSpec:
        def index(i: Any, k: Any, j: Any) -> tuple[Any, ...]:
            k, j = (j, k) if transposed else (k, j)
            tile = j * tiles + jax.lax.rem(i, jnp.int32(tiles))
            return (*((jax.lax.div(i, jnp.int32(tiles)),) if summed else ()), k, tile, 0)

        return pl.BlockSpec((*((1,) if summed else ()), 1, rows, columns), index)

    body = functools.partial(
        gradients_looped, tokens=tokens, inputs=powers_of_two(p, 2 * PART), outputs=powers_of_two(q, 2 * PART)
    )
    da, db = launch(
        body, x, g, a, b,
        platform="cuda", interpret=interpret, name="monarch_matmul_gradients",
        grid=(parts * tiles, b1, b2),
        in_specs=[
            pl.BlockSpec((part, p), lambda i, k, j: (jax.lax.div(i, jnp.int32(tiles)), k)),
            pl.BlockSpec((part, q), lambda i, k, j: (jax.lax.div(i, jnp.int32(tiles)), j)),
            spec(p, False, False),
            spec(q, True, False),
        ],
        out_specs=[spec(p, False, True), spec(q, True, True)],
        out_shape=[jax.ShapeDtypeStruct((parts, *v.shape), jnp.float32) for v in (a, b)],
        num_warps=8,
        num_stages=2,
        work=monarch_work(
            n, true, x.shape[0], itemsize=x.dtype.itemsize, factor_itemsize=a.dtype.itemsize + 4, products=2
        ),
    )  # fmt: skip
    return (
        da.sum(0).reshape(b1, b2, t, p)[:, :, : true.rank, : true.p].reshape(b1, -1, true.p),
        db.sum(0).reshape(b2, b1, t, q)[:, :, : true.rank, : true.q].reshape(b2, -1, true.q),
    )


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether the blocks are small enough to be worth a fused kernel."""
    del n, itemsize, factor_itemsize
    widest = blocks.p + blocks.q if gradient else 0
    return blocks.rank <= 4 * PART and GRAIN * widest <= ACCUMULATORS


def _plan(n: int, blocks: Blocks, itemsize: int, *, scaled: bool) -> Plan:
    """As many columns as stay in registers, since those that don't fit have their ranks computed again."""
    # Products of float32 are exact, and take as many registers again.
    narrow = itemsize == 4
    columns = math.gcd(blocks.q, PART if narrow else COLUMNS if blocks.rank <= PART else COLUMNS // 2)
    whole = narrow or columns >= 2 * PART or columns == blocks.q
    most = 32 if narrow else 64 if whole else GRAIN if scaled else 32
    tokens = min(most, max(GRAIN, 1 << (n - 1).bit_length()))
    columns = columns if whole else blocks.q
    return Plan(tokens, columns, powers_of_two(columns, COLUMNS if whole else PART))


def _whole_parts(x: Any, g: Any, a: Any, b: Any, scale: Any, blocks: Blocks) -> Any:
    """Blocks filled up with zeros to whole tiles of tensor cores; those of real models are."""
    b1, b2, p, q, t = blocks
    grains = (
        PART if p > PART else GRAIN,
        2 * PART if q > COLUMNS_IN_PARTS else PART if q > PART else GRAIN,
        GRAIN,
    )
    filled = Blocks(b1, b2, *(-(-v // grain) * grain for v, grain in zip((p, q, t), grains, strict=True)))
    if filled == blocks:
        return x, g, a, b, scale, blocks

    def fill(v: Any, shape: tuple[int, ...], to: tuple[int, ...]) -> Any:
        return (
            None
            if v is None
            else jnp.pad(v.reshape(shape), [(0, m - s) for s, m in zip(shape, to, strict=True)])
        )

    n = x.shape[0]
    _, _, fp, fq, ft = filled
    x, g = fill(x, (n, b1, p), (n, b1, fp)), fill(g, (n, b2, q), (n, b2, fq))
    a, b = fill(a, (b1, b2, t, p), (b1, b2, ft, fp)), fill(b, (b2, b1, t, q), (b2, b1, ft, fq))
    scale = fill(scale, (b2, b1, t), (b2, b1, ft))
    return (
        x.reshape(n, -1),
        None if g is None else g.reshape(n, -1),
        a.reshape(b1, -1, fp),
        b.reshape(b2, -1, fq),
        scale,
        filled,
    )
