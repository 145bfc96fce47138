"""Products with a Monarch matrix: out_j = sum_k (x_k A_kj^T) B_jk, where A_kj and B_jk have the rank first.

What lies between the factors stays in the program. It is either stacked over blocks, with tokens along the last axis,
so that blocks of low rank fill a large matrix unit; or a loop over blocks adds one product after the other.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, Parts

# Features that are multiplied at once: a power of two.
CHUNK = 64


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product of two matrices over an axis each, in float32."""
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=exact(a), preferred_element_type=jnp.float32
    )


def exact(x: jax.Array) -> lax.Precision | None:
    """By default TPUs round float32 to bfloat16 before they multiply, and GPUs to 19 bits."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def multiply_stacked(
    x_ref: Any, a_ref: Any, b_ref: Any, scale_ref: Any, o_ref: Any, y_ref: Any, *, blocks: Blocks,
    features: tuple[int, int],
) -> None:  # fmt: skip
    """x (n, k p), a (k, b2 t, p), b (j, b1 t, q), scale (k, b2 t, 1) or None -> o (n, j q).

    Programs for k input blocks each leave their ranks in y_ref (b1, b2, t, n), where those for j output blocks find
    them; the last of the former is the first of the latter.

    features: the axis of p in the blocks of a, and of q in those of b, which may be transposed.
    """
    inputs, outputs = len(a_ref), len(b_ref)
    step, last = pl.program_id(2), blocks.b1 // inputs - 1

    def project() -> None:
        project_stacked(x_ref, a_ref, scale_ref, y_ref, step * inputs, inputs, axis=features[0])

    def expand() -> None:
        expand_stacked(y_ref, b_ref, o_ref, (step - last) * outputs, outputs, axis=features[1])

    if inputs == blocks.b1 and outputs == blocks.b2:
        project()
        expand()
    else:
        pl.when(step <= last)(project)
        pl.when(step >= last)(expand)


def project_stacked(
    x_ref: Any, a_ref: Any, scale_ref: Any, y_ref: Any, first: Any, count: int, *, axis: int
) -> None:
    """Leave the ranks of `count` input blocks, which x_ref and a_ref start with, in y_ref from `first` on."""
    _, b2, t, _ = y_ref.shape
    p, dtype = a_ref.shape[1 + axis], x_ref.dtype
    for k in range(count):
        y = dot(a_ref[k].astype(dtype), x_ref[:, k * p : (k + 1) * p], axis, 1)
        if scale_ref is not None:
            y = y * scale_ref[k]
        for j in range(b2):
            y_ref[first + k, j] = y[j * t : (j + 1) * t].astype(y_ref.dtype)


def expand_stacked(y_ref: Any, b_ref: Any, o_ref: Any, first: Any, count: int, *, axis: int) -> None:
    """Write `count` output blocks, made of the ranks in y_ref from `first` on, from the start of o_ref on."""
    q, dtype = b_ref.shape[1 + axis], o_ref.dtype
    for j in range(count):
        y = jnp.concatenate([y_ref[k, first + j] for k in range(len(y_ref))], 0)
        out = dot(y.astype(dtype), b_ref[j].astype(dtype), 0, 1 - axis)
        o_ref[:, j * q : (j + 1) * q] = out.astype(dtype)


def gradients_stacked(
    x_ref: Any, g_ref: Any, a_ref: Any, b_ref: Any, da_ref: Any, db_ref: Any, da_sum: Any, db_sum: Any, *,
    blocks: Blocks, tokens: int, features: tuple[int, int],
) -> None:  # fmt: skip
    """The gradients of a and b from `tokens` tokens, which programs add up in float32 in *_sum."""
    b1, b2, p, q, _ = blocks
    dtype, tile, tiles = x_ref.dtype, pl.program_id(1), pl.num_programs(1)

    @pl.when(tile == 0)
    def start_from_zero() -> None:
        da_sum[...] = jnp.zeros_like(da_sum)
        db_sum[...] = jnp.zeros_like(db_sum)

    x, g = (tile_of(ref, tile, tokens) for ref in (x_ref, g_ref))
    xs = [x[:, k * p : (k + 1) * p] for k in range(b1)]
    gs = [g[:, j * q : (j + 1) * q] for j in range(b2)]
    ys = [dot(a_ref[k], x, features[0], 1) for k, x in enumerate(xs)]
    dys = [dot(b_ref[j], g, features[1], 1) for j, g in enumerate(gs)]
    for j, g in enumerate(gs):
        db_sum[j] += _outer(_of_block(ys, j, b2).astype(dtype), g, features[1])
    for k, x in enumerate(xs):
        da_sum[k] += _outer(_of_block(dys, k, b1).astype(dtype), x, features[0])

    @pl.when(tile == tiles - 1)
    def leave() -> None:
        da_ref[...] = da_sum[...].astype(da_ref.dtype)
        db_ref[...] = db_sum[...].astype(db_ref.dtype)


def tile_of(ref: Any, tile: Any, tokens: int) -> jax.Array:
    """A tile of tokens, with zeros for those that are beyond the last one."""
    block = ref[...]
    size = len(block)
    if tokens % size == 0:
        return block
    row = lax.broadcasted_iota(jnp.int32, block.shape, 0)
    # TPUs select among 32-bit numbers.
    return jnp.where(row < tokens - tile * size, block.astype(jnp.float32), 0).astype(block.dtype)


def _outer(ranks: jax.Array, features: jax.Array, axis: int) -> jax.Array:
    """The sum over tokens of ranks (t, n) by features (n, f), which are on `axis` of the result."""
    return dot(ranks, features, 1, 0) if axis else dot(features, ranks, 0, 1)


def _of_block(ys: Sequence[jax.Array], j: int, count: int) -> jax.Array:
    """The ranks that block j shares with each y: `count` blocks stand in the rows of each."""
    t = ys[0].shape[0] // count
    return jnp.concatenate([y[j * t : (j + 1) * t] for y in ys], 0)


def multiply_looped(
    x_ref: Any,
    a_ref: Any,
    b_ref: Any,
    scale_ref: Any,
    o_ref: Any,
    *,
    blocks: Blocks,
    ranks: Parts,
    outputs: Parts,
) -> None:
    """x (n, b1 p), a (b1, t, p), b (1, b1 t, q), scale (1, b1 t, 1) or None -> o (n, q), cut into powers of two."""
    p, t, dtype = blocks.p, blocks.rank, x_ref.dtype

    def add(k: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for t0, tl in ranks:
            y = project_looped(x_ref, k * p, a_ref, (k, pl.ds(t0, tl)), p, tl)
            rows = pl.ds(k * t + t0, tl)
            if scale_ref is not None:
                y = y * scale_ref[0, rows, 0][None]
            y = y.astype(dtype)
            sums = tuple(
                s + dot(y, b_ref[0, rows, pl.ds(q0, qn)].astype(dtype), 1, 0)
                for s, (q0, qn) in zip(sums, outputs, strict=True)
            )
        return sums

    zeros = tuple(jnp.zeros((x_ref.shape[0], qn), jnp.float32) for _, qn in outputs)
    for (q0, qn), s in zip(outputs, lax.fori_loop(0, blocks.b1, add, zeros), strict=True):
        o_ref[:, pl.ds(q0, qn)] = s.astype(o_ref.dtype)


def gradients_looped(
    x_ref: Any, g_ref: Any, a_ref: Any, b_ref: Any, da_ref: Any, db_ref: Any, *, tokens: int, inputs: Parts,
    outputs: Parts,
) -> None:  # fmt: skip
    """x (n, p), g (n, q), a (1, t, p), b (1, t, q) -> the gradients of a and b, `tokens` at a time."""
    dtype, (_, t, p), q = x_ref.dtype, a_ref.shape, b_ref.shape[2]

    def add(i: Any, sums: Any) -> Any:
        rows = pl.ds(i * tokens, tokens)
        y = project_looped(x_ref, 0, a_ref, (0, slice(None)), p, t, rows).astype(dtype)
        dy = project_looped(g_ref, 0, b_ref, (0, slice(None)), q, t, rows).astype(dtype)
        return tuple(
            tuple(s + dot(left, ref[rows, pl.ds(c, m)], 0, 0) for s, (c, m) in zip(some, parts, strict=True))
            for some, left, ref, parts in ((sums[0], dy, x_ref, inputs), (sums[1], y, g_ref, outputs))
        )

    zeros = tuple(tuple(jnp.zeros((t, m), jnp.float32) for _, m in parts) for parts in (inputs, outputs))
    sums = lax.fori_loop(0, x_ref.shape[0] // tokens, add, zeros)
    for ref, some, parts in ((da_ref, sums[0], inputs), (db_ref, sums[1], outputs)):
        for s, (c, m) in zip(some, parts, strict=True):
            ref[0, 0, :, pl.ds(c, m)] = s


def project_looped(
    x_ref: Any, start: Any, w_ref: Any, at: tuple[Any, Any], size: int, ranks: int, rows: Any = slice(None)
) -> jax.Array:
    """x[rows, start:start + size] times the transpose of the matrix w[at], a chunk of features after the other."""
    chunk = math.gcd(size, CHUNK)

    def add(i: Any, y: jax.Array) -> jax.Array:
        w = w_ref[(*at, pl.ds(i * chunk, chunk))].astype(x_ref.dtype)
        return y + dot(x_ref[rows, pl.ds(start + i * chunk, chunk)], w, 1, 1)

    count = x_ref.shape[0] if rows == slice(None) else rows.size
    return lax.fori_loop(0, size // chunk, add, jnp.zeros((count, ranks), jnp.float32))
