"""How products with BLAST matrices run on an NVIDIA GPU.

No program can hold a whole matrix's mixed ranks, nor recompute them for every output block. So the products with u and
v are those of cuBLAS, and kernels do what lies between, at the speed of memory: they mix ranks, or sum up the gradients
of the weights that mix them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, gradient_dtype
from pallas_kernels.gpu.products import dot
from pallas_kernels.kernels.blast_matmul import mix, mix_gradient
from pallas_kernels.lowering import Work, gpu_arithmetic, launch

# Ranks are filled up to whole ones of these; those of real models are.
GRAIN = 16
# Sums that the threads of a program can hold: a tile of all blocks, or pairs of blocks for some ranks each.
WARPS, SUMS, PAIRS = 4, 8 * 1024, 64
# Ranks of a program.
MIXED, SUMMED = 64, 128
# Tokens whose products are summed up in a row: longer sums of float32 round worse.
IN_A_ROW = 32
TOO_LARGE = f"a program can't add up more than {PAIRS} blocks in registers"
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
    n = len(x)
    x, (v, s, u) = _whole(x, v, s, u)
    y = dot(x.reshape(len(x), len(v), -1), v, (2, 2), (1, 0), interpret=interpret)
    z = _mix(y, s, n, interpret)
    out = dot(z, u, (2, 1), (0, 0), interpret=interpret)
    return out[:, :n].swapaxes(0, 1).reshape(n, blocks.outputs)


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
    """The gradients of v, s and u, in the factors' dtype or in float32, for cotangents g (n, b2 q)."""
    n, rank = len(x), blocks.rank
    dtypes = gradient_dtype(v), gradient_dtype(u)
    x, (v, s, u) = _whole(x, v, s, u)
    g = jnp.pad(g, ((0, len(x) - n), (0, 0)))
    xs, gs = x.reshape(len(x), blocks.b1, -1), g.reshape(len(x), blocks.b2, -1)
    y, dz = (dot(a, f, (2, 2), (1, 0), interpret=interpret) for a, f in ((xs, v), (gs, u)))
    z, dy = _mix(y, s, n, interpret), _mix(dz, s.swapaxes(0, 1), n, interpret)
    dv, du = (
        dot(ranks, a, (1, 0), (0, 1), dtype=dtype, interpret=interpret)[:, :rank]
        for ranks, a, dtype in zip((dy, z), (xs, gs), dtypes, strict=True)
    )
    return dv, _mix_gradient(dz, y, n, interpret)[..., :rank], du


def fits(n: int, blocks: Blocks, itemsize: int, factor_itemsize: int, *, gradient: bool) -> bool:
    """Whether registers hold what all blocks of a tile add up to."""
    del n, itemsize, factor_itemsize
    return max(blocks.b1 if gradient else 0, blocks.b2) <= PAIRS


def slower(n: int, blocks: Blocks) -> str | None:
    """Why XLA is faster."""
    if n < FEW_TOKENS:
        return f"for fewer than {FEW_TOKENS} tokens reading the factors is all there is to do"
    return None


def _whole(x: jax.Array, *factors: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """x with tokens for whole tiles, and the factors v, s, u in its dtype with ranks for whole ones."""
    v, s, u = (f.astype(x.dtype) for f in factors)
    missing = -v.shape[1] % GRAIN
    return jnp.pad(x, ((0, -len(x) % IN_A_ROW), (0, 0))), [
        jnp.pad(v, ((0, 0), (0, missing), (0, 0))),
        jnp.pad(s, ((0, 0), (0, 0), (0, missing))),
        jnp.pad(u, ((0, 0), (0, missing), (0, 0))),
    ]


def _mix(y: jax.Array, s: jax.Array, tokens: int, interpret: Any) -> jax.Array:
    """y (b1, n, r), s (b2, b1, r) -> z (b2, n, r), what u is to be multiplied by; `tokens` of the n count."""
    (b1, n, r), b2 = y.shape, len(s)
    plan = _plan(n, b2, r)
    return launch(
        functools.partial(mix, arithmetic=gpu_arithmetic(interpret)), y, s,
        platform="cuda", interpret=interpret, name="blast_mix", num_warps=WARPS,
        grid=(n // plan.tokens, r // plan.ranks),
        in_specs=[
            pl.BlockSpec((b1, plan.tokens, plan.ranks), lambda i, c: (0, i, c)),
            pl.BlockSpec((b2, b1, plan.ranks), lambda i, c: (0, 0, c)),
        ],
        out_specs=pl.BlockSpec((b2, plan.tokens, plan.ranks), lambda i, c: (0, i, c)),
        out_shape=jax.ShapeDtypeStruct((b2, n, r), y.dtype),
        work=_work(tokens, n, b1, b2, r, y)._replace(intermediate_bytes=b2 * n * r * y.dtype.itemsize),
    )  # fmt: skip


def _mix_gradient(dz: jax.Array, y: jax.Array, tokens: int, interpret: Any) -> jax.Array:
    """dz (b2, n, r), y (b1, n, r) -> ds (b2, b1, r), in float32."""
    (b2, n, r), b1 = dz.shape, len(y)
    ranks = next(c for c in (SUMMED, 64, 32, GRAIN) if r % c == 0)
    count = next(j for j in range(b2, 0, -1) if (b2 % j == 0 and j * b1 <= PAIRS) or j == 1)
    parts = n // IN_A_ROW
    sums = launch(
        functools.partial(mix_gradient, arithmetic=gpu_arithmetic(interpret)), dz, y,
        platform="cuda", interpret=interpret, name="blast_mix_gradient", num_warps=max(1, ranks // 64),
        grid=(parts, b2 // count, r // ranks),
        in_specs=[
            pl.BlockSpec((count, IN_A_ROW, ranks), lambda i, j, c: (j, i, c)),
            pl.BlockSpec((b1, IN_A_ROW, ranks), lambda i, j, c: (0, i, c)),
        ],
        out_specs=pl.BlockSpec((1, count, b1, ranks), lambda i, j, c: (i, j, 0, c)),
        out_shape=jax.ShapeDtypeStruct((parts, b2, b1, r), jnp.float32),
        work=_work(tokens, n, b1, b2, r, y),
    )  # fmt: skip
    return sums.sum(0)


def _plan(n: int, b2: int, r: int) -> Plan:
    """The largest tile whose sums for all blocks fit in registers, of ranks that a warp reads in whole lines."""
    ranks = next(c for c in (MIXED, 32, GRAIN) if r % c == 0)
    return Plan(next(t for t in (32, 16, 8, 4, 2, 1) if t == 1 or b2 * t * ranks <= SUMS), ranks)


def _work(tokens: int, filled: int, b1: int, b2: int, r: int, y: jax.Array) -> Work:
    flops = 2 * b1 * b2 * r
    return Work(
        flops=flops * tokens, bytes=(b1 + b2) * tokens * r * y.dtype.itemsize, padded_flops=flops * filled
    )
