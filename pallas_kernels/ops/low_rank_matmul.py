"""Products with matrices of low rank: the Monarch matrices of one block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops._block_low_rank import (
    baselines,
    check_arrays,
    compiled_cases,
    prepared,
    rivals,
    timed_cases,
)
from pallas_kernels.ops._multilinear import multiply
from pallas_kernels.ops.monarch_matmul import MONARCH


def low_rank_matmul(
    x: jax.Array,
    u: jax.Array,
    v: jax.Array,
    *,
    scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply by a matrix of low rank.

    out[n, :] = U^T (s * (V x[n, :])), and what lies between the factors is rounded to x's dtype. A TPU takes one kernel
    where its VMEM holds the factors, unless they are large, and the tokens so few that the kernel would wait for them
    most of the time. On a GPU XLA's two products are as fast as a kernel that fuses them, which only
    `implementation="pallas"` takes, where the registers hold it.

    Args:
      x: (..., p); float32, bfloat16, float16, or float64 (XLA only).
      u: (r, q); any of these dtypes, or int8. A rank r above min(p, q) is allowed, and gains
        nothing: no matrix of these sides has a higher one.
      v: (r, p), as u.
      scale: (r,), s, of floating-point numbers: what int8 weights are to be multiplied by. None: ones.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., q) in x's dtype. It can be differentiated in x and in all factors that aren't integers, to any order.

    Raises:
      TypeError: an argument is not an array of one of these dtypes.
      ValueError: sizes don't fit, or are 0, but for the number of tokens.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> y = pk.low_rank_matmul(jnp.ones((5, 12)), jnp.ones((2, 7)), jnp.ones((2, 12)))
      >>> y.shape, float(y[0, 0])
      ((5, 7), 24.0)
    """
    choice = dispatch.choose(implementation)
    _check(x, u, v, scale)
    shape = (*x.shape[:-1], u.shape[-1])
    x, (v, u, scale) = prepared(x, v[None], u[None], None if scale is None else scale[None, None])
    if not len(x):
        return jnp.zeros(shape, x.dtype)
    return multiply(MONARCH, choice, x, (v, u, scale)).reshape(shape)


def reference(x: jax.Array, u: jax.Array, v: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The definition, summed in float32 at least."""
    _check(x, u, v, scale)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum("...p,rp->...r", x.astype(wide), v.astype(wide), precision="highest")
    y = y if scale is None else y * scale.astype(wide)
    return jnp.einsum("...r,rq->...q", y, u.astype(wide), precision="highest").astype(x.dtype)


def to_dense(u: jax.Array, v: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The matrix (p, q) that `low_rank_matmul` multiplies x by."""
    return reference(jnp.eye(v.shape[1], dtype=u.dtype if scale is None else scale.dtype), u, v, scale)


def _check(x: Any, u: Any, v: Any, scale: Any) -> None:
    name = "low_rank_matmul"
    check_arrays(name, x, {} if scale is None else {"scale": scale}, {"u": u, "v": v})
    if u.ndim != 2 or v.ndim != 2 or len(u) != len(v):
        raise ValueError(f"{name}: `u` must be (r, q) and `v` (r, p), got shapes {u.shape} and {v.shape}")
    if x.shape[-1] != v.shape[1]:
        raise ValueError(f"{name}: `x` must be (..., {v.shape[1]}) for `v` of {v.shape}, got {x.shape}")
    if scale is not None and scale.shape != (len(v),):
        raise ValueError(f"{name}: `scale` must have shape {(len(v),)}, got {scale.shape}")


def _case(
    n: int | tuple[int, ...], p: int, q: int, r: int, dtype: Any = jnp.float32, *, int8: bool = False
) -> Case:
    tokens = n if isinstance(n, tuple) else (n,)
    weights = jnp.int8 if int8 else dtype
    shapes = [((*tokens, p), dtype), ((r, q), weights), ((r, p), weights), *([((r,), jnp.float32)] * int8)]
    name = f"N{'x'.join(map(str, tokens))} {p} to {q} rank {r} {jnp.dtype(dtype).name}{' int8' * int8}"
    structs = tuple(jax.ShapeDtypeStruct(*s) for s in shapes)
    return Case(name, structs, {}, (0, 3) if int8 else (0, 1, 2))


def _parity_cases() -> list[Case]:
    """One token, odd sizes, 16-bit types, int8."""
    return [
        _case(1, 8, 6, 3),
        _case((2, 9), 17, 24, 5, jnp.bfloat16),
        _case(20, 16, 8, 7, jnp.float16),
        _case(6, 12, 20, 4, int8=True),
    ]


def _of_layer(n: int, layer: Any, dtype: Any) -> Case:
    case = _case(n, layer.inputs, layer.outputs, layer.low_rank, dtype)
    return dataclasses.replace(case, name=f"{layer.name} {case.name}")


OPERATOR = Operator(
    name="low_rank_matmul",
    function=lambda x, u, v, scale=None, **options: low_rank_matmul(x, u, v, scale=scale, **options),
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=lambda full: compiled_cases(_of_layer, full),
    bench_cases=lambda: timed_cases(_of_layer),
    baselines=baselines(to_dense, lambda x, u, v: (x @ v.T) @ u),
    family="blr",
    rivals=rivals(low_rank_matmul, lambda case: case.arguments[1].shape[1]),
)
