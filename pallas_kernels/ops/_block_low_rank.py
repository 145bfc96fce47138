"""What the products with block-low-rank matrices share: checks, the choice of a launcher, layers, PyTorch's forms."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, lowering
from pallas_kernels.baselines import Contestant, Prepare, of_jax, of_torch, versioned
from pallas_kernels.blocks import Blocks
from pallas_kernels.dispatch import Launcher
from pallas_kernels.operators import Case


class Layer(NamedTuple):
    """A layer of a published compression. monarch, blast: (number of blocks, parameters by inputs + outputs).

    Source: arXiv:2512.20861, table 3.
    """

    name: str
    inputs: int
    outputs: int
    low_rank: int
    monarch: tuple[int, int] | None
    blast: tuple[int, int]


LAYERS = (
    Layer("Llama-7B qkvo", 4096, 4096, 1024, (16, 1024), (16, 1024)),
    Layer("Llama-7B gate", 4096, 11008, 1488, (16, 1536), (16, 1488)),
    Layer("Llama-7B down", 11008, 4096, 1488, (16, 1536), (16, 1488)),
    Layer("Llama-3.2-1B qo", 2048, 2048, 256, (16, 256), (16, 256)),
    Layer("Llama-3.2-1B gate", 2048, 8192, 512, (16, 512), (16, 512)),
    Layer("Llama-3.2-1B up", 2048, 8192, 768, (16, 768), (16, 768)),
    Layer("Llama-3.2-1B down", 8192, 2048, 768, (16, 768), (16, 768)),
    Layer("GPT-2 c_attn", 768, 2304, 192, (4, 192), (6, 192)),
    Layer("GPT-2 c_fc", 768, 3072, 192, (4, 192), (6, 192)),
    Layer("GPT-2 c_proj", 3072, 768, 192, (4, 192), (6, 192)),
    Layer("ViT-B qkv", 768, 2304, 128, (4, 128), (3, 128)),
    Layer("ViT-B fc1", 768, 3072, 128, (4, 128), (3, 128)),
    Layer("ViT-B fc2", 3072, 768, 128, (4, 128), (3, 128)),
    Layer("DiT-XL/2 qkv", 1152, 3456, 384, None, (9, 384)),
    Layer("DiT-XL/2 fc1", 1152, 4608, 256, None, (9, 256)),
    Layer("DiT-XL/2 adaLN", 1152, 6912, 256, None, (9, 256)),
)
TOKENS = (1, 197, 384, 1024, 4096)
# The fewest of them that take every path; those that a CPU can do in seconds; and how many tokens are timed.
COMPILED = ((197, "ViT-B fc1"), (1024, "GPT-2 c_attn"), (1024, "Llama-3.2-1B down"), (4096, "Llama-7B gate"))
TIMED_ON_CPU = ("Llama-7B qkvo", "Llama-3.2-1B qo", "GPT-2 c_fc", "ViT-B fc1")
TIMED_TOKENS = (1, 384, 1024)


# From tokens, a layer and a dtype to a case, named after the layer; None if the layer has no such product.
OfLayer = Callable[[int, Layer, Any], Case | None]


def compiled_cases(of_layer: OfLayer, full: bool) -> list[Case]:
    """Of every published layer, or the fewest that take every path."""
    named = {layer.name: layer for layer in LAYERS}
    chosen = itertools.product(TOKENS, LAYERS) if full else [(n, named[name]) for n, name in COMPILED]
    return [case for n, layer in chosen if (case := of_layer(n, layer, jnp.bfloat16))]


def timed_cases(of_layer: OfLayer) -> list[Case]:
    """On a GPU of every published layer in bfloat16, on a CPU of some in float32."""
    on_gpu = jax.default_backend() == "gpu"
    timed = [layer for layer in LAYERS if on_gpu or layer.name in TIMED_ON_CPU]
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    return [case for layer in timed for n in TIMED_TOKENS if (case := of_layer(n, layer, dtype))]


def check_arrays(name: str, x: Any, floats: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Refuse what isn't an array of numbers that the product takes; weights may be int8."""
    for label, a in {"x": x, **weights, **floats}.items():
        dtype = getattr(a, "dtype", None)
        if dtype is not None and (
            jnp.issubdtype(dtype, jnp.floating) or (label in weights and dtype == jnp.int8)
        ):
            continue
        expected = "a floating-point or int8" if label in weights else "a floating-point"
        raise TypeError(f"{name}: `{label}` must be {expected} array, got {dtype or type(a)}")
    if x.ndim < 1:
        raise ValueError(f"{name}: `x` must be (..., inputs), got shape ()")
    for label, a in {"x": x, **weights, **floats}.items():
        # Of tokens there may be none.
        if 0 in (a.shape[-1:] if label == "x" else a.shape):
            raise ValueError(f"{name}: sizes must be positive, got `{label}` of shape {a.shape}")


def prepared(x: jax.Array, *factors: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """x as (tokens, inputs), and the factors in its dtype unless they are integers, over the same mesh axes."""
    arrays = iter(lowering.make_varying(*(jnp.asarray(v) for v in (x, *factors) if v is not None)))
    x = next(arrays)
    given = [None if f is None else next(arrays) for f in factors]
    cast = [f if f is None or jnp.issubdtype(f.dtype, jnp.integer) else f.astype(x.dtype) for f in given]
    return x.reshape(-1, x.shape[-1]), tuple(cast)


def exact(x: jax.Array) -> dict[str, Any]:
    """How products of x are summed: accelerators would round float32 to fewer bits."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return {
        "preferred_element_type": wide,
        "precision": jax.lax.Precision.HIGHEST if x.dtype == wide else None,
    }


# Pairs of blocks beyond which a CPU's program of one product a block takes too long to compile.
MOST_PAIRS = 1024


def by_platform(
    blocks: Blocks, batched: Callable[..., Any], on_cpu: Callable[..., Any], on_gpu: Callable[..., Any]
) -> Callable[..., Any]:
    """XLA's implementation: on a CPU one product a block, because it runs batched ones on one core, or slowly."""
    if blocks.b1 * blocks.b2 > MOST_PAIRS:
        on_cpu = in_float32(batched)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, cpu=on_cpu, cuda=on_gpu, default=batched)


def in_float32(form: Callable[..., Any]) -> Callable[..., Any]:
    """`form` of wider operands: a CPU multiplies no batches of bfloat16 into float32."""

    def run(*arrays: jax.Array | None) -> Any:
        given, wide = jax.eval_shape(form, *arrays), exact(arrays[0])["preferred_element_type"]  # pyright: ignore
        found = form(*jax.tree.map(lambda a: a.astype(wide), arrays))
        return jax.tree.map(lambda a, like: a.astype(like.dtype), found, given)

    return run


def project(x: jax.Array, factor: jax.Array) -> list[jax.Array]:
    """Of every block of x (n, b p) its product with the transpose of that of the factor (b, r, p), unrounded."""
    pairs = zip(jnp.split(x, len(factor), 1), factor.astype(x.dtype), strict=True)
    if len(x) == len(factor) == 1:
        # A CPU takes several times as long for a row times the transpose of a large matrix.
        return [jnp.dot(f, b.T, **exact(x)).T for b, f in pairs]
    return [jnp.dot(b, f.T, **exact(x)) for b, f in pairs]


def expand(ranks: Sequence[jax.Array], factor: jax.Array, dtype: Any) -> jax.Array:
    """The products of ranks (n, r) with the blocks of the factor (b, r, q), as (n, b q)."""
    pairs = ((y.astype(dtype), f.astype(dtype)) for y, f in zip(ranks, factor, strict=True))
    return jnp.concatenate([jnp.dot(y, f, **exact(y)) for y, f in pairs], 1).astype(dtype)


def outer(ranks: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The sums over tokens of ranks (n, r) by blocks of x (n, b p), as (b, r, p), unrounded."""
    blocks = jnp.split(x, len(ranks), 1)
    return jnp.stack(
        [jnp.dot(y.astype(x.dtype).T, b, **exact(x)) for y, b in zip(ranks, blocks, strict=True)]
    )


def project_at_once(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`project`, as one array (b, n, r)."""
    blocks = x.reshape(len(x), len(factor), -1)
    return jnp.einsum("nkp,krp->knr", blocks, factor.astype(x.dtype), **exact(x))


def expand_at_once(ranks: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """`expand`, for one array (b, n, r)."""
    y = ranks.astype(dtype)
    out = jnp.einsum("jnr,jrq->njq", y, factor.astype(dtype), **exact(y))
    return out.reshape(y.shape[1], -1).astype(dtype)


def outer_at_once(ranks: jax.Array, x: jax.Array) -> jax.Array:
    """`outer`, for one array (b, n, r)."""
    blocks = x.reshape(len(x), len(ranks), -1)
    return jnp.einsum("knr,nkp->krp", ranks.astype(x.dtype), blocks, **exact(x))


def launcher(
    choice: dispatch.Choice, x: jax.Array, why_not: str | None, why_slower: str | None, run: Any
) -> Launcher:
    """`run`, or why it can't; or, if nobody asked for it, why XLA is faster."""
    if x.dtype == jnp.float64:
        return "it has no float64 arithmetic"
    return why_not or (why_slower if choice.implementation is None else None) or run


def rounding(run: Any, dtypes: Sequence[Any]) -> Any:
    """`run` with its results in `dtypes`, as those of all platforms must be; or why it can't run."""
    if isinstance(run, str):
        return run
    return lambda *arrays, **options: tuple(
        result.astype(dtype) for result, dtype in zip(run(*arrays, **options), dtypes, strict=True)
    )


def baselines(
    to_dense: Callable[..., jax.Array], torch_form: Callable[..., Any], einsum: Callable[..., jax.Array] | None = None
) -> Mapping[str, Callable[[Case], Prepare | None]]:  # fmt: skip
    """XLA's product with the dense matrix, what it makes of einsums, and the usual form of this product in PyTorch.

    Args:
      to_dense: from the factors to the matrix (inputs, outputs).
      torch_form: takes x and the factors as tensors.
      einsum: takes x and the factors; None where our own form is that.
    """
    return {
        "XLA, dense": lambda case: functools.partial(_dense, case, to_dense),
        **({"XLA, einsum": functools.partial(of_jax, einsum)} if einsum else {}),
        versioned("torch", "batched products"): lambda case: of_torch(torch_form, case),
    }


def rivals(
    function: Callable[..., jax.Array], outputs: Callable[[Case], int]
) -> Mapping[str, Callable[[Case], tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """XLA's product with a dense matrix of that size, and what it makes of the factors."""

    def dense(case: Case) -> Any:
        x = case.arguments[0]
        return _dot, (x, jax.ShapeDtypeStruct((x.shape[-1], outputs(case)), x.dtype))

    def factored(case: Case) -> Any:
        return functools.partial(function, **case.options, implementation="xla"), case.arguments

    return {"XLA, dense": dense, "XLA, factored": factored}


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, **exact(x)).astype(x.dtype)


def _dense(
    case: Case, to_dense: Callable[..., jax.Array], arguments: Sequence[np.ndarray], cotangent: np.ndarray
) -> Contestant:
    x, *factors = arguments
    matrix = np.asarray(to_dense(*map(jnp.asarray, factors)))
    structs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, matrix))
    dense = of_jax(_dot, Case(case.name, structs))
    contestant = dense([x, matrix], cotangent)
    # The gradient of the matrix is computed, but there are only those of factors to compare it with.
    return contestant._replace(to_numpy=lambda out: contestant.to_numpy(out)[:2])
