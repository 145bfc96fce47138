"""Products with a BLAST matrix: out_j = z_j U_j, where z_j = sum_k s_jk * y_k and y_k = x_k V_k^T.

Mixing the ranks takes few multiplications but b1 b2 for each of them, which a vector unit is slow at. With tokens along
the last axis, GROUP ranks of all blocks are the rows of one matrix, and a block-diagonal matrix mixes them in a matrix
unit.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks
from pallas_kernels.kernels.monarch_matmul import dot, project_looped

GROUP = 8


def expand(s: jax.Array) -> jax.Array:
    """s (b2, b1, r) as matrices (r / GROUP, b2 GROUP, b1 GROUP), diagonal in the ranks of a group."""
    b2, b1, r = s.shape
    groups = s.reshape(b2, b1, r // GROUP, GROUP).transpose(2, 0, 3, 1)[..., None]
    return (groups * jnp.eye(GROUP, dtype=s.dtype)[:, None]).reshape(-1, b2 * GROUP, b1 * GROUP)


def contract(matrices: jax.Array, b2: int) -> jax.Array:
    """The entries of `matrices` that `expand` fills, as (b2, b1, r)."""
    groups = matrices.reshape(len(matrices), b2, GROUP, -1, GROUP)
    return jnp.einsum("gjiki->jkgi", groups).reshape(b2, -1, len(matrices) * GROUP)


def multiply_stacked(
    x_ref: Any, v_ref: Any, s_ref: Any, u_ref: Any, o_ref: Any, sum_ref: Any = None, *, blocks: Blocks
) -> None:
    """x (n, b1 p), v (b1, r, p), s expanded, u (b2, r, q) -> o (n, b2 q).

    sum_ref: (n, b2 q) in float32, where programs of some ranks each add up.
    """
    z = _mixed(s_ref[...], _projected(x_ref, v_ref, blocks.b1), 2)
    outs = (
        dot(z_j, u_ref[j].astype(z_j.dtype), 0, 0)
        for j, z_j in enumerate(_ungrouped(z, blocks.b2, x_ref.dtype))
    )
    if sum_ref is None:
        for j, out in enumerate(outs):
            o_ref[:, _columns(j, blocks.q)] = out.astype(o_ref.dtype)
        return
    tile, tiles = pl.program_id(1), pl.num_programs(1)

    @pl.when(tile == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for j, out in enumerate(outs):
        sum_ref[:, _columns(j, blocks.q)] += out

    @pl.when(tile == tiles - 1)
    def _() -> None:
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)


def gradients_stacked(
    x_ref: Any, g_ref: Any, v_ref: Any, s_ref: Any, u_ref: Any, dv_ref: Any, ds_ref: Any, du_ref: Any, *,
    blocks: Blocks,
) -> None:  # fmt: skip
    """Add what these tokens contribute to the gradients of all factors; the first ones start from zero."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref in (dv_ref, ds_ref, du_ref):
            ref[...] = jnp.zeros_like(ref)

    dtype, s = x_ref.dtype, s_ref[...]
    y, dz = _projected(x_ref, v_ref, blocks.b1), _projected(g_ref, u_ref, blocks.b2)
    ds_ref[...] += _batched(dz, y, 1, 1)
    for j, z_j in enumerate(_ungrouped(_mixed(s, y, 2), blocks.b2, dtype)):
        du_ref[j] += dot(z_j, g_ref[:, _columns(j, blocks.q)], 1, 0)
    for k, dy_k in enumerate(_ungrouped(_mixed(s, dz, 1), blocks.b1, dtype)):
        dv_ref[k] += dot(dy_k, x_ref[:, _columns(k, blocks.p)], 1, 0)


def _columns(block: int, width: int) -> slice:
    return slice(block * width, (block + 1) * width)


def _projected(x_ref: Any, v_ref: Any, count: int) -> list[jax.Array]:
    """For each group the ranks of all blocks of x, (count GROUP, n): rows of whole tiles, so only renamed."""
    p, dtype = v_ref.shape[2], x_ref.dtype
    ys = [dot(v_ref[k].astype(dtype), x_ref[:, _columns(k, p)], 1, 1) for k in range(count)]
    r, n = ys[0].shape
    grouped = jnp.stack([y.reshape(r // GROUP, GROUP, n) for y in ys], 1).reshape(-1, count * GROUP, n)
    return [grouped[g].astype(dtype) for g in range(r // GROUP)]


def _mixed(s: jax.Array, y: Sequence[jax.Array], axis: int) -> jax.Array:
    return _batched(s, y, axis - 1, 0)


def _batched(
    a: Sequence[jax.Array] | jax.Array, b: Sequence[jax.Array], axis_a: int, axis_b: int
) -> jax.Array:
    return jnp.stack([dot(a[g], b[g], axis_a, axis_b) for g in range(len(b))])


def _ungrouped(z: jax.Array, count: int, dtype: Any) -> list[jax.Array]:
    """Each block's ranks as (r, n)."""
    groups, _, n = z.shape
    by_block = z.reshape(groups, count, GROUP, n)
    return [by_block[:, j].reshape(groups * GROUP, n).astype(dtype) for j in range(count)]


def mix_looped(x_ref: Any, v_ref: Any, s_ref: Any, z_ref: Any, *, blocks: Blocks) -> None:
    """x (n, b1 p), v (b1, r, p), s (b2, b1, r) -> z (b2, n, r)."""
    _, n, r = z_ref.shape

    def add(k: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y = project_looped(x_ref, k * blocks.p, v_ref, (k, slice(None)), blocks.p, r)
        return tuple(z + s_ref[j, k][None].astype(jnp.float32) * y for j, z in enumerate(sums))

    zeros = tuple(jnp.zeros((n, r), jnp.float32) for _ in range(blocks.b2))
    for j, z in enumerate(lax.fori_loop(0, blocks.b1, add, zeros)):
        z_ref[j] = z.astype(z_ref.dtype)
