"""Products with a BLAST matrix: out_j = z_j U_j, where z_j = sum_k s_jk * y_k and y_k = x_k V_k^T.

Mixing the ranks takes few multiplications but b1 b2 for each of them, which a vector unit is slow at. With tokens along
the last axis, GROUP ranks of all blocks are the rows of one matrix, and a block-diagonal matrix mixes them in a matrix
unit.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks
from pallas_kernels.kernels.monarch_matmul import dot, tile_of
from pallas_kernels.lowering import Arithmetic

GROUP = 8
# Numbers of a row of a register of TPUs.
LANES = 128


def multiply_stacked(
    x_ref: Any, v_ref: Any, u_ref: Any, o_ref: Any, m_ref: Any, sum_ref: Any = None, *, blocks: Blocks, parts: int
) -> None:  # fmt: skip
    """x (n, b1 p), v (b1, r, p), u (b2, r, q) -> o (n, b2 q).

    m_ref: s expanded by `expand`.
    sum_ref: (n, b2 q) in float32, where `parts` programs add up, of r ranks each.
    """
    part = lax.rem(pl.program_id(1), jnp.int32(parts)) if parts > 1 else 0
    ranks, dtype = v_ref.shape[1], x_ref.dtype
    y = _projected(x_ref, v_ref, blocks.b1)
    z = _mixed(_part(m_ref, part, parts), y, 2)
    outs = (
        dot(z_j, u_ref[j].astype(dtype), 0, 0) for j, z_j in enumerate(_ungrouped(z, blocks.b2, ranks, dtype))
    )
    if sum_ref is None:
        for j, out in enumerate(outs):
            o_ref[:, _columns(j, blocks.q)] = out.astype(o_ref.dtype)
        return

    @pl.when(part == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for j, out in enumerate(outs):
        sum_ref[:, _columns(j, blocks.q)] += out

    @pl.when(part == parts - 1)
    def _() -> None:
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)


def gradients_stacked(
    x_ref: Any, g_ref: Any, v_ref: Any, s_ref: Any, u_ref: Any, dv_ref: Any, ds_ref: Any, du_ref: Any,
    m_ref: Any, dv_sum: Any, dm_sum: Any, du_sum: Any, *, blocks: Blocks, tokens: int, tiles: int, parts: int,
) -> None:  # fmt: skip
    """The gradients of v and u for r of all ranks, and of s for all, from `tokens` tokens in `tiles` tiles.

    The ranks are in `parts` parts; a core of the accelerator has some, and leaves zeros for the others in ds (1, ...).
    m_ref: s expanded. *_sum: in float32, what programs add up, of dm for all parts.
    """
    step, steps = pl.program_id(1), pl.num_programs(1)
    tile, part = lax.rem(step, jnp.int32(tiles)), lax.div(step + pl.program_id(0) * steps, jnp.int32(tiles))

    @pl.when(step == 0)
    def _() -> None:
        expand(s_ref, m_ref)
        dm_sum[...] = jnp.zeros_like(dm_sum)

    @pl.when(tile == 0)
    def _() -> None:
        dv_sum[...] = jnp.zeros_like(dv_sum)
        du_sum[...] = jnp.zeros_like(du_sum)

    ranks, dtype, s = v_ref.shape[1], x_ref.dtype, _part(m_ref, part, parts)
    x, g = (tile_of(ref, tile, tokens) for ref in (x_ref, g_ref))
    y, dz = _projected(x, v_ref, blocks.b1), _projected(g, u_ref, blocks.b2)
    dm_sum[pl.ds(part * len(s), len(s))] += _batched(dz, y, 1, 1)
    for j, z_j in enumerate(_ungrouped(_mixed(s, y, 2), blocks.b2, ranks, dtype)):
        du_sum[j] += dot(z_j, g[:, _columns(j, blocks.q)], 1, 0)
    for k, dy_k in enumerate(_ungrouped(_mixed(s, dz, 1), blocks.b1, ranks, dtype)):
        dv_sum[k] += dot(dy_k, x[:, _columns(k, blocks.p)], 1, 0)

    @pl.when(tile == tiles - 1)
    def _() -> None:
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
        du_ref[...] = du_sum[...].astype(du_ref.dtype)

    @pl.when(step == steps - 1)
    def _() -> None:
        _contract(dm_sum, ds_ref)


def expand(s_ref: Any, m_ref: Any) -> None:
    """Write s (b2, b1, r) as matrices (r / GROUP, b2 GROUP, b1 GROUP), diagonal in a group."""
    b2, b1, r = s_ref.shape
    # As many output blocks at once as matrix units multiply by without a pause; of many ranks they'd fill v4's VMEM.
    width = 512 if r <= 1024 else 256
    at_once = next(m for m in range(max(1, width // (b1 * GROUP)), 0, -1) if b2 % m == 0)
    spread, kept = _spread(at_once * b1, s_ref.dtype), _diagonal(r, at_once * b1)
    for j in range(0, b2, at_once):
        rows = s_ref[j : j + at_once].reshape(at_once * b1, r)
        whole = len(rows) * GROUP % LANES == r % LANES == 0 and len(rows) < LANES
        # Lanes are shuffled while matrix units multiply.
        spread_rows = _shuffled(rows) if whole and j // at_once % 2 else dot(rows, spread, 0, 0)
        spread_rows = jnp.where(kept, spread_rows, 0)
        for i in range(at_once):
            block = _grouped(spread_rows[:, _columns(i, b1 * GROUP)], len(m_ref))
            m_ref[:, _columns(j + i, GROUP)] = block.astype(m_ref.dtype)


def _contract(m_ref: Any, s_ref: Any) -> None:
    """Write the entries that `expand` fills, as (1, b2, b1, r)."""
    _, b2, b1, r = s_ref.shape
    spread, kept = _spread(b1, m_ref.dtype), _diagonal(r, b1)
    for j in range(b2):
        rows = m_ref[:, _columns(j, GROUP)].reshape(-1, b1 * GROUP)[:r]
        s_ref[0, j] = dot(spread, jnp.where(kept, rows, 0), 1, 1).astype(s_ref.dtype)


def _spread(count: int, dtype: Any) -> jax.Array:
    """What repeats each of `count` columns GROUP times."""
    shape = (count, count * GROUP)
    column = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), jnp.int32(GROUP))
    return (column == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(dtype)


def _shuffled(rows: jax.Array) -> jax.Array:
    """The columns of the transpose, each GROUP times, by moving numbers between the LANES lanes of registers."""
    count, r = rows.shape
    filled = jnp.concatenate([rows.astype(jnp.float32), jnp.zeros((LANES - count, r), jnp.float32)], 0).T
    source = lax.div(lax.broadcasted_iota(jnp.int32, (r, LANES), 1), jnp.int32(GROUP))
    firsts = range(0, count, LANES // GROUP)
    taken = (jnp.take_along_axis(filled, first + source, 1, mode="promise_in_bounds") for first in firsts)
    return jnp.concatenate([*taken], 1)


def _diagonal(ranks: int, count: int) -> jax.Array:
    row, column = (
        lax.rem(lax.broadcasted_iota(jnp.int32, (ranks, count * GROUP), axis), jnp.int32(GROUP))
        for axis in (0, 1)
    )
    return row == column


def _part(m_ref: Any, part: Any, parts: int) -> list[jax.Array]:
    """The matrices of a part; taken out of one value they would all be copied."""
    groups = m_ref.shape[0] // parts
    return [m_ref[part * groups + g] for g in range(groups)]


def _columns(block: int, width: int) -> slice:
    return slice(block * width, (block + 1) * width)


def _projected(x: Any, v_ref: Any, count: int) -> list[jax.Array]:
    """For each group the ranks of all blocks of x, an array or a Ref, as (count GROUP, n)."""
    (_, r, p), n = v_ref.shape, x.shape[0]
    groups = -(-r // GROUP)
    ys = [dot(v_ref[k].astype(x.dtype), x[:, _columns(k, p)], 1, 1) for k in range(count)]
    grouped = jnp.stack([_grouped(y, groups) for y in ys], 1).reshape(groups, count * GROUP, n)
    return [grouped[g].astype(x.dtype) for g in range(groups)]


def _grouped(y: jax.Array, groups: int) -> jax.Array:
    """Rows (r, n) as (groups, GROUP, n), filled up with zeros: whole tiles of registers, so only renamed."""
    r, n = y.shape
    if missing := groups * GROUP - r:
        y = jnp.concatenate([y, jnp.zeros((missing, n), y.dtype)], 0)
    return y.reshape(-1, GROUP, n)


def _mixed(s: Sequence[jax.Array], y: Sequence[jax.Array], axis: int) -> jax.Array:
    return _batched(s, y, axis - 1, 0)


def _batched(a: Sequence[jax.Array], b: Sequence[jax.Array], axis_a: int, axis_b: int) -> jax.Array:
    return jnp.stack([dot(left, right, axis_a, axis_b) for left, right in zip(a, b, strict=True)])


def _ungrouped(z: jax.Array, count: int, ranks: int, dtype: Any) -> list[jax.Array]:
    """Each block's ranks as (r, n)."""
    groups, _, n = z.shape
    by_block = z.reshape(groups, count, GROUP, n)
    return [by_block[:, j].reshape(groups * GROUP, n)[:ranks].astype(dtype) for j in range(count)]


def mix(y_ref: Any, s_ref: Any, z_ref: Any, *, arithmetic: Arithmetic) -> None:
    """y (b1, n, r), s (b2, b1, r) -> z (b2, n, r): z_j = sum_k s_jk * y_k."""
    b2, b1, _ = s_ref.shape

    def add(k: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y = y_ref[k].astype(jnp.float32)
        weights = (jnp.broadcast_to(s_ref[j, k][None].astype(jnp.float32), y.shape) for j in range(b2))
        return tuple(arithmetic.multiply_add(s, y, z) for s, z in zip(weights, sums, strict=True))

    zeros = (jnp.zeros(z_ref.shape[1:], jnp.float32),) * b2
    for j, z in enumerate(lax.fori_loop(0, b1, add, zeros)):
        z_ref[j] = z.astype(z_ref.dtype)


def mix_gradient(dz_ref: Any, y_ref: Any, ds_ref: Any, *, arithmetic: Arithmetic) -> None:
    """dz (j, n, r), y (b1, n, r) -> ds (1, j, b1, r): the sums over n tokens of dz_j * y_k."""
    (count, n, r), b1 = dz_ref.shape, len(y_ref)

    def row(ref: Any, block: int, i: Any) -> jax.Array:
        return ref[block, pl.ds(i, 1)].astype(jnp.float32)

    def add(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ys = [row(y_ref, k, i) for k in range(b1)]
        pairs = itertools.product((row(dz_ref, j, i) for j in range(count)), ys)
        return tuple(arithmetic.multiply_add(*pair, total) for pair, total in zip(pairs, sums, strict=True))

    sums = iter(lax.fori_loop(0, n, add, (jnp.zeros((1, r), jnp.float32),) * (count * b1)))
    for j in range(count):
        for k in range(b1):
            ds_ref[0, j, pl.ds(k, 1)] = next(sums)
