"""Products with Monarch matrices: every block of the matrix has a low rank of its own."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import Blocks
from pallas_kernels.gpu import monarch_matmul as gpu
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
from pallas_kernels.tpu import monarch_matmul as tpu

ORDERS = ("blocked", "interleaved")


def monarch_matmul(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    scale: jax.Array | None = None,
    order: str = "blocked",
    implementation: str | None = None,
) -> jax.Array:
    """Multiply by a Monarch matrix.

    The matrix has b2 by b1 blocks of q by p, and block (j, k) is W2_jk^T diag(s_jk) W1_kj with rank t::

        out[n, j, :] = sum_k W2[j, k, :, :]^T (s[j, k, :] * (W1[k, j, :, :] x[n, k, :]))

    What lies between the factors is rounded to x's dtype (not for few tokens on a CPU), and never leaves a kernel. On a
    GPU cuBLAS multiplies unless `implementation="pallas"` asks for the kernel: an H200 took longer for that. By a TPU
    compiler's estimates, which let each transfer have HBM to itself, a dense product is faster at some hundred tokens
    of wide layers on v6e: for 197 tokens of 4096 features it takes 5 % fewer cycles, and twice the bytes.

    Args:
      x: (..., b1 p); float32, bfloat16, float16, or float64 (XLA only).
      w1: (b1, b2 t, p): for input block k the ranks of output block j, then of the next. Any of these dtypes, or
        int8.
      w2: (b2, b1 t, q): for output block j the ranks of input block k, then of the next. The rank stands before
        the features in both, so that the transposed matrix has factors (w2, w1).
      scale: (b2, b1, t), s, of floating-point numbers: what int8 weights are to be multiplied by. None: ones.
      order: "blocked" as above; "interleaved" as in the literature: rank r of input block k, and output feature f,
        belong to output block r % b2 and f % b2. That costs a transposition of w1 and of the result, because TPUs
        store 16-bit numbers only side by side along the last axis, where the blocks of the result would stand.
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
      >>> x, w1, w2 = jnp.ones((5, 12)), jnp.ones((2, 6, 6)), jnp.ones((3, 4, 7))
      >>> y = pk.monarch_matmul(x, w1, w2)
      >>> y.shape, float(y[0, 0])
      ((5, 21), 24.0)

    Dao et al., "Monarch: Expressive Structured Matrices", ICML 2022 (arXiv:2204.00595).
    """
    choice = dispatch.choose(implementation)
    b1, b2, t = _sizes(x, w1, w2, scale, order)
    shape = (*x.shape[:-1], b2 * w2.shape[-1])
    x, (w1, w2, scale) = prepared(x, w1, w2, scale)
    if not len(x):
        return jnp.zeros(shape, x.dtype)
    if order == "interleaved":
        w1 = w1.reshape(b1, t, b2, -1).swapaxes(1, 2).reshape(w1.shape)
    y = multiply(MONARCH, choice, x, (w1, w2, scale))
    if order == "interleaved":
        y = y.reshape(-1, b2, w2.shape[-1]).swapaxes(1, 2)
    return y.reshape(shape)


def reference(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    scale: jax.Array | None = None,
    *,
    order: str = "blocked",
) -> jax.Array:
    """The definition, summed in float32 at least."""
    b1, b2, t = _sizes(x, w1, w2, scale, order)
    p, q = w1.shape[-1], w2.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    given = (x, w1, w2, jnp.ones((b2, b1, t)) if scale is None else scale)
    x_, w1, w2, scale = (v.astype(wide) for v in given)
    first = w1.reshape((b1, b2, t, p) if order == "blocked" else (b1, t, b2, p))
    ranks = "kjtp" if order == "blocked" else "ktjp"
    y = jnp.einsum(
        f"...kp,{ranks},jkt->...jkt", x_.reshape(*x.shape[:-1], b1, p), first, scale, precision="highest"
    )
    features = "jf" if order == "blocked" else "fj"
    out = jnp.einsum(f"...jkt,jktf->...{features}", y, w2.reshape(b2, b1, t, q), precision="highest")
    return out.reshape(*x.shape[:-1], b2 * q).astype(x.dtype)


def to_dense(
    w1: jax.Array, w2: jax.Array, scale: jax.Array | None = None, *, order: str = "blocked"
) -> jax.Array:
    """The matrix (b1 p, b2 q) that `monarch_matmul` multiplies x by."""
    wide = w1.dtype if scale is None else scale.dtype
    return reference(jnp.eye(w1.shape[0] * w1.shape[2], dtype=wide), w1, w2, scale, order=order)


def _multiply(
    choice: dispatch.Choice, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None
) -> jax.Array:
    return _run("multiply", choice, x.dtype, x, a, b, scale)


def _gradients(
    choice: dispatch.Choice, x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    if scale is None:
        return *_run("gradients", choice, a.dtype, x, g, a, b), None
    # The scale goes with the first factor, into whose gradient it then enters.
    b2, b1, t = scale.shape
    rows = scale.swapaxes(0, 1).reshape(b1, b2 * t, 1)
    scaled, db = _run(
        "gradients", choice, jnp.dtype(jnp.float32), x, g, (a * rows).astype(x.dtype), b.astype(x.dtype)
    )
    dscale = jnp.sum(scaled * a, -1).reshape(b1, b2, t).swapaxes(0, 1)
    return scaled * rows, db, dscale


def _transpose(a: jax.Array, b: jax.Array, scale: jax.Array | None) -> tuple[jax.Array | None, ...]:
    return b, a, None if scale is None else scale.swapaxes(0, 1)


MONARCH = Multilinear(_multiply, _gradients, _transpose)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(kind: str, choice: dispatch.Choice, dtype: Any, *arrays: Any) -> Any:
    """dtype: of the results."""
    x, a, b = arrays[0], *arrays[-2 if kind == "gradients" else 1 :][:2]
    b1, b2 = len(a), len(b)
    blocks = Blocks(b1, b2, a.shape[2], b.shape[2], a.shape[1] // b2)
    sizes = (len(x), blocks, x.dtype.itemsize, a.dtype.itemsize)

    gradient = kind == "gradients"

    def on(accelerator: Any, why_slower: str | None, **options: Any) -> dispatch.Launcher:
        why_not = None if accelerator.fits(*sizes, gradient=gradient) else accelerator.TOO_LARGE
        run = functools.partial(getattr(accelerator, kind), blocks=blocks, **options)
        return launcher(choice, x, why_not, why_slower, run)

    typed = {"dtype": dtype} if gradient else {}
    batched, on_cpu, on_gpu = _XLA[kind]
    if len(x) <= FEW_TOKENS and b1 * b2 > 1:
        on_cpu = in_float32(_FEW_ON_CPU[kind])
    forms = [
        batched,
        on_cpu,
        functools.partial(on_gpu, **typed),
        on(tpu, tpu.slower(*sizes), **typed),
        on(gpu, gpu.SLOWER),
    ]
    if gradient:
        forms = [rounding(form, (dtype, dtype)) for form in forms]
    *in_xla, for_tpu, for_gpu = forms
    xla = by_platform(blocks, *in_xla)
    return dispatch.run(choice, *arrays, name="monarch_matmul", xla=xla, tpu=for_tpu, cuda=for_gpu)


def _multiply_in_xla(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None) -> jax.Array:
    ranks = _ranks(x, a, len(b))
    if scale is not None:
        ranks = ranks * scale[:, :, None]
    factor = b.reshape(len(b), len(a), -1, b.shape[-1]).astype(x.dtype)
    out = jnp.einsum("jknt,jktq->njq", ranks.astype(x.dtype), factor, **exact(x))
    return out.reshape(len(x), -1).astype(x.dtype)


def _gradients_in_xla(x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, dy = tpu.settled(_ranks(x, a, len(b)).astype(x.dtype), _ranks(g, b, len(a)).astype(x.dtype))
    da = jnp.einsum("kjnt,nkp->kjtp", dy, x.reshape(len(x), len(a), -1), **exact(x))
    db = jnp.einsum("jknt,njq->jktq", y, g.reshape(len(g), len(b), -1), **exact(x))
    return da.reshape(a.shape), db.reshape(b.shape)


def _ranks(x: jax.Array, a: jax.Array, outputs: int) -> jax.Array:
    """What input block k gives output block j, as (j, k, tokens, t), unrounded."""
    factor = a.reshape(len(a), outputs, -1, a.shape[-1]).astype(x.dtype)
    return jnp.einsum("nkp,kjtp->jknt", x.reshape(len(x), len(a), -1), factor, **exact(x))


def _multiply_on_gpu(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None) -> jax.Array:
    ranks = _by_output_on_gpu(x, a, len(b))
    if scale is not None:
        ranks = (ranks * scale.reshape(len(b), 1, -1)).astype(x.dtype)
    return dot(ranks, b.astype(x.dtype), (2, 1), (0, 0)).swapaxes(0, 1).reshape(len(x), -1)


def _gradients_on_gpu(
    x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array, *, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    y, dy = _by_output_on_gpu(x, a, len(b)), _by_output_on_gpu(g, b, len(a))
    da, db = (
        dot(ranks, v.reshape(len(v), len(ranks), -1), (1, 0), (0, 1), dtype=dtype)
        for ranks, v in ((dy, x), (y, g))
    )
    return da, db


def _by_output_on_gpu(x: jax.Array, a: jax.Array, outputs: int) -> jax.Array:
    """The ranks of each output block, from all inputs, as (outputs, tokens, ranks)."""
    n, inputs = len(x), len(a)
    ranks = dot(x.reshape(n, inputs, -1), a.astype(x.dtype), (2, 2), (1, 0))
    return ranks.reshape(inputs, n, outputs, -1).transpose(2, 1, 0, 3).reshape(outputs, n, -1)


def _multiply_on_cpu(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None) -> jax.Array:
    ranks = _by_output(project(x, a), len(b))
    if scale is not None:
        ranks = [y * row.reshape(-1) for y, row in zip(ranks, scale, strict=True)]
    return expand(ranks, b, x.dtype)


def _gradients_on_cpu(x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    da = outer(_by_output(project(g, b), len(a)), x)
    return da, outer(_by_output(project(x, a), len(b)), g)


def _multiply_few_on_cpu(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | None) -> jax.Array:
    ranks = _by_output_at_once(x, a, len(b))
    if scale is not None:
        ranks = ranks * scale.reshape(len(b), 1, -1)
    return expand_at_once(ranks, b, x.dtype)


def _gradients_few_on_cpu(
    x: jax.Array, g: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    da = outer_at_once(_by_output_at_once(g, b, len(a)), x)
    return da, outer_at_once(_by_output_at_once(x, a, len(b)), g)


def _by_output_at_once(x: jax.Array, a: jax.Array, outputs: int) -> jax.Array:
    """`_by_output`, as one array (outputs, tokens, ranks)."""
    inputs, n = len(a), len(x)
    ranks = project_at_once(x, a).reshape(inputs, n, outputs, -1)
    return ranks.transpose(2, 1, 0, 3).reshape(outputs, n, -1)


def _by_output(ys: Sequence[jax.Array], outputs: int) -> list[jax.Array]:
    """From the ranks of each input block, for all outputs in turn, those of each output block, from all inputs."""
    return [jnp.concatenate(parts, 1) for parts in zip(*(jnp.split(y, outputs, 1) for y in ys), strict=True)]


_XLA: dict[str, tuple[Callable[..., Any], ...]] = {
    "multiply": (_multiply_in_xla, _multiply_on_cpu, _multiply_on_gpu),
    "gradients": (_gradients_in_xla, _gradients_on_cpu, _gradients_on_gpu),
}


# Up to how many tokens a CPU is faster at one batch of products than at a product for each block.
FEW_TOKENS = 32
_FEW_ON_CPU: dict[str, Callable[..., Any]] = {
    "multiply": _multiply_few_on_cpu,
    "gradients": _gradients_few_on_cpu,
}


def _sizes(x: Any, w1: Any, w2: Any, scale: Any, order: str) -> tuple[int, int, int]:
    """(b1, b2, t), once everything about the call has been found to fit."""
    name = "monarch_matmul"
    check_arrays(name, x, {} if scale is None else {"scale": scale}, {"w1": w1, "w2": w2})
    if order not in ORDERS:
        raise ValueError(f"{name}: `order` is 'blocked' or 'interleaved', got {order!r}")
    if w1.ndim != 3 or w2.ndim != 3:
        raise ValueError(
            f"{name}: `w1` must be (b1, b2 t, p) and `w2` (b2, b1 t, q), got shapes {w1.shape} and {w2.shape}"
        )
    b1, b2 = len(w1), len(w2)
    if w1.shape[1] % b2 or w1.shape[1] // b2 * b1 != w2.shape[1]:
        raise ValueError(
            f"{name}: with {b1} input and {b2} output blocks, `w1` must have {b2} t ranks and `w2` {b1} t for the same "
            f"t, got {w1.shape[1]} and {w2.shape[1]}"
        )
    if x.shape[-1] != b1 * w1.shape[2]:
        raise ValueError(
            f"{name}: `x` must be (..., {b1 * w1.shape[2]}) for `w1` of {w1.shape}, got {x.shape}"
        )
    t = w1.shape[1] // b2
    if scale is not None and scale.shape != (b2, b1, t):
        raise ValueError(f"{name}: `scale` must have shape {(b2, b1, t)}, got {scale.shape}")
    return b1, b2, t


def _case(
    n: int | tuple[int, ...],
    blocks: Blocks,
    dtype: Any = jnp.float32,
    *,
    int8: bool = False,
    **options: Any,
) -> Case:
    b1, b2, p, q, t = blocks
    tokens = n if isinstance(n, tuple) else (n,)
    weights = jnp.int8 if int8 else dtype
    structs = [
        jax.ShapeDtypeStruct((*tokens, b1 * p), dtype),
        jax.ShapeDtypeStruct((b1, b2 * t, p), weights),
        jax.ShapeDtypeStruct((b2, b1 * t, q), weights),
        *([jax.ShapeDtypeStruct((b2, b1, t), jnp.float32)] * int8),
    ]
    name = f"N{'x'.join(map(str, tokens))} {b1}x{p} to {b2}x{q} rank {t} {jnp.dtype(dtype).name}"
    extras = [*(["int8"] * int8), *(f"{k}={v}" for k, v in options.items())]
    differentiable = (0, 3) if int8 else (0, 1, 2)
    return Case(" ".join([name, *extras]), tuple(structs), options, differentiable)


def _parity_cases() -> list[Case]:
    """One token, odd sizes and more than a tile; ranks and blocks that are no powers of two; b1 other than b2."""
    f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
    return [
        _case(1, Blocks(2, 2, 8, 8, 4)),
        _case(7, Blocks(3, 2, 5, 9, 3)),
        _case((2, 9), Blocks(2, 3, 16, 24, 20), bf16),
        _case(40, Blocks(4, 4, 12, 20, 5), f16),
        _case(130, Blocks(2, 2, 24, 17, 18)),
        _case(5, Blocks(1, 1, 20, 30, 7)),
        _case(9, Blocks(3, 3, 8, 6, 2), f32, order="interleaved"),
        _case(12, Blocks(2, 3, 16, 8, 5), f32, int8=True),
    ]


def _of_layer(n: int, layer: Any, dtype: Any) -> Case | None:
    if layer.monarch is None:
        return None
    b, rank = layer.monarch
    blocks = Blocks(b, b, layer.inputs // b, layer.outputs // b, rank // b)
    case = _case(n, blocks, dtype)
    return dataclasses.replace(case, name=f"{layer.name} {case.name}")


def _odd_calls() -> list[Case]:
    """float32 and float16, int8 weights, sizes that no tile divides."""
    blocks = Blocks(3, 2, 200, 104, 20)
    return [
        _case(100, blocks),
        _case(100, blocks, jnp.float16),
        _case(1000, Blocks(4, 4, 192, 768, 48), jnp.bfloat16, int8=True),
    ]


def _torch_form(x: Any, w1: Any, w2: Any) -> Any:
    """Two batched products, with permutations between and after them."""
    (b1, ranks, p), (b2, _, _), n = w1.shape, w2.shape, x.shape[0]
    y = (x.reshape(n, b1, p).transpose(0, 1) @ w1.transpose(1, 2)).reshape(b1, n, b2, ranks // b2)
    y = y.permute(2, 1, 0, 3).reshape(b2, n, -1)
    return (y @ w2).transpose(0, 1).reshape(n, -1)


def _function(x: Any, w1: Any, w2: Any, scale: Any = None, **options: Any) -> jax.Array:
    return monarch_matmul(x, w1, w2, scale=scale, **options)


OPERATOR = Operator(
    name="monarch_matmul",
    function=_function,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=lambda full: [*compiled_cases(_of_layer, full), *_odd_calls()],
    bench_cases=lambda: timed_cases(_of_layer),
    baselines=baselines(to_dense, _torch_form, lambda x, w1, w2: _multiply_in_xla(x, w1, w2, None)),
    family="blr",
    rivals=rivals(_function, lambda case: case.arguments[2].shape[0] * case.arguments[2].shape[2]),
)
