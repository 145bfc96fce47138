"""Products with BLAST matrices: blocks of low rank that share their bases along rows and columns."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import Blocks, gradient_dtype
from pallas_kernels.gpu import blast_matmul as gpu
from pallas_kernels.gpu.products import dot
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops._block_low_rank import (
    baselines,
    by_platform,
    check_arrays,
    compiled_cases,
    exact,
    expand,
    expand_at_once,
    in_float32,
    launcher,
    outer,
    outer_at_once,
    prepared,
    project,
    project_at_once,
    rivals,
    rounding,
    timed_cases,
)
from pallas_kernels.ops._multilinear import Multilinear, multiply
from pallas_kernels.tpu import blast_matmul as tpu


def blast_matmul(
    x: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiply by a BLAST matrix.

    The matrix has b2 by b1 blocks of q by p, and block (j, k) is U_j^T diag(s_jk) V_k with rank r::

        out[n, j, :] = U[j, :, :]^T sum_k s[j, k, :] * (V[k, :, :] x[n, k, :])

    With s of ones it is a matrix of rank r, with s the identity in (j, k) a block-diagonal one. Any Monarch matrix of
    as many ranks, r / b for each of its b by b blocks, is a BLAST matrix, with b^2 r parameters more: s. What lies
    between the factors is rounded to x's dtype (on a CPU not for one token); on a TPU it never leaves the kernel, on a
    GPU cuBLAS multiplies, and a kernel sums over k. By a TPU compiler's estimates a dense product comes nearest on v6e
    with many blocks, which take mixing, and few tokens: for 4096 features in 16 blocks it takes 1.26 times as long with
    384 tokens, and 1.47 times with 1024.

    Args:
      x: (..., b1 p); float32, bfloat16, float16, or float64 (XLA only).
      u: (b2, r, q); any of these dtypes, or int8, whose scales s holds. The rank stands before the features, so that
        the transposed matrix has factors (v, s^T, u).
      s: (b2, b1, r); any of these dtypes.
      v: (b1, r, p), as u.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., b2 q) in x's dtype. It can be differentiated in x and in all factors that aren't integers, to any order;
      only those are saved for it.

    Raises:
      TypeError: an argument is not an array of one of these dtypes.
      ValueError: sizes don't factor, or are 0, but for the number of tokens.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> x, u, s, v = jnp.ones((5, 12)), jnp.ones((3, 4, 7)), jnp.ones((3, 2, 4)), jnp.ones((2, 4, 6))
      >>> y = pk.blast_matmul(x, u, s, v)
      >>> y.shape, float(y[0, 0])
      ((5, 21), 48.0)

    Lee et al., "BLAST: Block-Level Adaptive Structured Matrices", NeurIPS 2024 (arXiv:2410.21262).
    """
    choice = dispatch.choose(implementation)
    _check(x, u, s, v)
    shape = (*x.shape[:-1], len(u) * u.shape[-1])
    x, (v, s, u) = prepared(x, v, s, u)
    if not len(x):
        return jnp.zeros(shape, x.dtype)
    return multiply(BLAST, choice, x, (v, s, u)).reshape(shape)


def reference(x: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """The definition, summed in float32 at least."""
    _check(x, u, s, v)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    blocks = x.reshape(*x.shape[:-1], len(v), v.shape[-1]).astype(wide)
    u, s, v = (f.astype(wide) for f in (u, s, v))
    y = jnp.einsum("...kp,krp->...kr", blocks, v, precision="highest")
    z = jnp.einsum("jkr,...kr->...jr", s, y, precision="highest")
    out = jnp.einsum("...jr,jrq->...jq", z, u, precision="highest")
    return out.reshape(*x.shape[:-1], len(u) * u.shape[-1]).astype(x.dtype)


def to_dense(u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """The matrix (b1 p, b2 q) that `blast_matmul` multiplies x by."""
    return reference(jnp.eye(v.shape[0] * v.shape[2], dtype=s.dtype), u, s, v)


def _multiply(choice: dispatch.Choice, x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array) -> jax.Array:
    return _run("multiply", choice, x, v, s, u)


def _gradients(
    choice: dispatch.Choice, x: jax.Array, g: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array
) -> tuple[jax.Array, ...]:
    return _run("gradients", choice, x, g, v, s, u)


def _transpose(v: jax.Array, s: jax.Array, u: jax.Array) -> tuple[jax.Array, ...]:
    return u, s.swapaxes(0, 1), v


BLAST = Multilinear(_multiply, _gradients, _transpose)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(kind: str, choice: dispatch.Choice, *arrays: jax.Array) -> Any:
    x, (v, s, u) = arrays[0], arrays[-3:]
    blocks = Blocks(len(v), len(u), v.shape[2], u.shape[2], s.shape[2])
    sizes = (len(x), blocks, x.dtype.itemsize, v.dtype.itemsize)

    def on(accelerator: Any, why_slower: str | None) -> dispatch.Launcher:
        why_not = None if accelerator.fits(*sizes, gradient=kind == "gradients") else accelerator.TOO_LARGE
        run = functools.partial(getattr(accelerator, kind), blocks=blocks)
        return launcher(choice, x, why_not, why_slower, run)

    forms = [
        *_XLA[kind],
        on(tpu, tpu.slower(len(x), blocks, v.dtype.itemsize)),
        on(gpu, gpu.slower(len(x), blocks)),
    ]
    if kind == "gradients":
        dtypes = [gradient_dtype(f) for f in (v, s, u)]
        forms = [rounding(form, dtypes) for form in forms]
    batched, on_cpu, on_gpu, for_tpu, for_gpu = forms
    # For one token a CPU is faster at one batch of products than at a product for each block.
    xla = by_platform(blocks, batched, in_float32(batched) if len(x) == 1 else on_cpu, on_gpu)
    return dispatch.run(choice, *arrays, name="blast_matmul", xla=xla, tpu=for_tpu, cuda=for_gpu)


def _multiply_in_xla(x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array) -> jax.Array:
    return expand_at_once(_mixed(s, project_at_once(x, v)), u, x.dtype)


def _gradients_in_xla(
    x: jax.Array, g: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array
) -> tuple[jax.Array, ...]:
    y, dz = project_at_once(x, v), project_at_once(g, u)
    ds = jnp.einsum("jnr,knr->jkr", dz, y, **exact(y))
    return outer_at_once(_mixed(s.swapaxes(0, 1), dz), x), ds, outer_at_once(_mixed(s, y), g)


def _mixed(s: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("jkr,knr->jnr", s.astype(y.dtype), y, **exact(y))


def _multiply_on_gpu(x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array) -> jax.Array:
    z = _mixed_on_gpu(s, _ranks_on_gpu(x, v))
    return dot(z, u.astype(x.dtype), (2, 1), (0, 0)).swapaxes(0, 1).reshape(len(x), -1)


def _gradients_on_gpu(
    x: jax.Array, g: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array
) -> tuple[jax.Array, ...]:
    y, dz = _ranks_on_gpu(x, v), _ranks_on_gpu(g, u)
    z, dy = _mixed_on_gpu(s, y), _mixed_on_gpu(s.swapaxes(0, 1), dz)
    dv, du = (
        dot(ranks, a.reshape(len(a), len(f), -1), (1, 0), (0, 1), dtype=gradient_dtype(f))
        for ranks, a, f in ((dy, x, v), (z, g, u))
    )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return dv, jnp.sum(dz[:, None].astype(wide) * y.astype(wide), 2), du


def _ranks_on_gpu(x: jax.Array, v: jax.Array) -> jax.Array:
    return dot(x.reshape(len(x), len(v), -1), v.astype(x.dtype), (2, 2), (1, 0))


def _mixed_on_gpu(s: jax.Array, y: jax.Array) -> jax.Array:
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.sum(s[:, :, None].astype(wide) * y.astype(wide), 1).astype(y.dtype)


def _multiply_on_cpu(x: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array) -> jax.Array:
    return expand(_mixed_on_cpu(s, project(x, v)), u, x.dtype)


def _gradients_on_cpu(
    x: jax.Array, g: jax.Array, v: jax.Array, s: jax.Array, u: jax.Array
) -> tuple[jax.Array, ...]:
    ys, dzs = project(x, v), project(g, u)
    ds = jnp.einsum("jnr,knr->jkr", jnp.stack(dzs), jnp.stack(ys), **exact(ys[0]))
    return outer(_mixed_on_cpu(s.swapaxes(0, 1), dzs), x), ds, outer(_mixed_on_cpu(s, ys), g)


def _mixed_on_cpu(s: jax.Array, ys: Sequence[jax.Array]) -> list[jax.Array]:
    return [functools.reduce(jnp.add, map(jnp.multiply, row.astype(ys[0].dtype), ys)) for row in s]


_XLA = {
    "multiply": (_multiply_in_xla, _multiply_on_cpu, _multiply_on_gpu),
    "gradients": (_gradients_in_xla, _gradients_on_cpu, _gradients_on_gpu),
}


def _check(x: Any, u: Any, s: Any, v: Any) -> None:
    name = "blast_matmul"
    check_arrays(name, x, {"s": s}, {"u": u, "v": v})
    if u.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"{name}: `u` must be (b2, r, q) and `v` (b1, r, p), got shapes {u.shape} and {v.shape}"
        )
    if u.shape[1] != v.shape[1]:
        raise ValueError(f"{name}: `u` and `v` must have the same rank, got {u.shape[1]} and {v.shape[1]}")
    if s.shape != (len(u), len(v), u.shape[1]):
        raise ValueError(f"{name}: `s` must have shape {(len(u), len(v), u.shape[1])}, got {s.shape}")
    if x.shape[-1] != len(v) * v.shape[2]:
        raise ValueError(
            f"{name}: `x` must be (..., {len(v) * v.shape[2]}) for `v` of {v.shape}, got {x.shape}"
        )


def _case(n: int | tuple[int, ...], blocks: Blocks, dtype: Any = jnp.float32, *, int8: bool = False) -> Case:
    b1, b2, p, q, r = blocks
    tokens = n if isinstance(n, tuple) else (n,)
    weights = jnp.int8 if int8 else dtype
    shapes = (((*tokens, b1 * p), dtype), ((b2, r, q), weights), ((b2, b1, r), dtype), ((b1, r, p), weights))
    name = (
        f"N{'x'.join(map(str, tokens))} {b1}x{p} to {b2}x{q} rank {r} {jnp.dtype(dtype).name}{' int8' * int8}"
    )
    return Case(name, tuple(jax.ShapeDtypeStruct(*s) for s in shapes), {}, (0, 2) if int8 else (0, 1, 2, 3))


def _parity_cases() -> list[Case]:
    """One token, odd sizes and more than a tile; ranks and blocks that are no powers of two; b1 other than b2."""
    f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
    return [
        _case(1, Blocks(2, 2, 8, 8, 4)),
        # One token has few values between the factors: ranks enough for the errors of rounding them to average.
        _case(1, Blocks(3, 2, 33, 49, 100), bf16),
        _case(7, Blocks(3, 2, 5, 9, 3)),
        _case((2, 17), Blocks(4, 3, 16, 24, 20), bf16),
        _case(20, Blocks(3, 3, 6, 10, 9), f16),
        _case(130, Blocks(2, 2, 8, 6, 32)),
        _case(12, Blocks(2, 3, 16, 8, 5), f32, int8=True),
    ]


def _of_layer(n: int, layer: Any, dtype: Any) -> Case:
    b, rank = layer.blast
    case = _case(n, Blocks(b, b, layer.inputs // b, layer.outputs // b, rank), dtype)
    return dataclasses.replace(case, name=f"{layer.name} {case.name}")


def _odd_calls() -> list[Case]:
    """float32 and float16, int8 weights, sizes that no tile divides."""
    blocks = Blocks(3, 2, 200, 104, 60)
    return [
        _case(100, blocks),
        _case(100, blocks, jnp.float16),
        _case(1000, Blocks(6, 6, 128, 512, 192), jnp.bfloat16, int8=True),
    ]


def _torch_form(x: Any, u: Any, s: Any, v: Any) -> Any:
    """Batched products, and the mixing by broadcasting."""
    n = x.shape[0]
    y = x.reshape(n, len(v), -1).transpose(0, 1) @ v.transpose(1, 2)
    z = (s[:, :, None] * y[None]).sum(1)
    return (z @ u).transpose(0, 1).reshape(n, -1)


OPERATOR = Operator(
    name="blast_matmul",
    function=blast_matmul,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=lambda full: [*compiled_cases(_of_layer, full), *_odd_calls()],
    bench_cases=lambda: timed_cases(_of_layer),
    baselines=baselines(to_dense, _torch_form, lambda x, u, s, v: _multiply_in_xla(x, v, s, u)),
    family="blr",
    rivals=rivals(blast_matmul, lambda case: case.arguments[1].shape[0] * case.arguments[1].shape[2]),
)
