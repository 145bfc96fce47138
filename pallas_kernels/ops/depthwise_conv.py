"""Depthwise convolution in one and two dimensions, with large kernels in mind."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.gpu import depthwise_conv as gpu
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops import _depthwise_conv_xla as xla
from pallas_kernels.ops._depthwise_conv_baselines import baselines
from pallas_kernels.tpu import depthwise_conv as tpu
from pallas_kernels.windows import Axis, Gather

Padding = str | int | Sequence[tuple[int, int]]
Axes = tuple[Axis, Axis]
DTYPES = "float32", "bfloat16", "float16", "float64"


def depthwise_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    bias: jax.Array | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolve every channel with a kernel of its own.

    In two dimensions, with the input zero outside of its bounds::

        y[n, i, j, c] = bias[c] + sum_{k, l} x[n, s i + d k - p, s j + d l - p, c] w[k, l, c]

    where s is the stride, d the dilation and p the padding before the first pixel, each per axis. As in `lax` and in
    other deep-learning libraries this is a cross-correlation: the kernel is not flipped.

    Args:
      x: (N, L, C) or (N, H, W, C); float32, bfloat16, float16, or float64 (XLA only).
      w: (K, C) or (KH, KW, C), any of these dtypes. The kernel may be larger than the image.
      strides: of the output, an int for all axes or one each.
      padding: "SAME", "SAME_LOWER" or "VALID" as in `lax`; "CAUSAL" (one dimension: all before the first pixel); an
        int, or (before, after) per axis, in pixels, negative to crop.
      dilation: distance between the taps of the kernel, in pixels, an int for all axes or one each.
      bias: (C,), any of these dtypes, added before the result is rounded.
      precision: for the sake of `lax`'s signature. There are no matrix products here: every implementation
        multiplies and adds in float32 (float64 if x is).
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (N, OL, C) or (N, OH, OW, C) in x's dtype. It can be differentiated in x, w and bias, to any order.

    Raises:
      TypeError: an argument is not an array of one of these dtypes.
      ValueError: ranks, channels or sizes don't fit, the output would be empty, or an option is none of those above.
      NotImplementedError: `implementation="pallas"` can't run here, or is given an array of float64.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> y = pk.depthwise_conv(jnp.ones((1, 7, 7, 16)), jnp.ones((13, 13, 16)))
      >>> y.shape, float(y[0, 3, 3, 0])
      ((1, 7, 7, 16), 49.0)

    Large kernels: Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022 (arXiv:2203.06717).
    """
    if precision is not None:
        # `lax` refuses what is none of its own.
        number = jax.ShapeDtypeStruct((1,), jnp.float32)
        jax.eval_shape(functools.partial(lax.dot, precision=precision), number, number)
    choice = dispatch.choose(implementation)
    axes = _axes(x, w, strides, padding, dilation, bias)
    arrays = lowering.make_varying(*(jnp.asarray(a) for a in (x, w, bias) if a is not None))
    if choice.implementation is None and _any_float64(arrays):
        # And so do its gradients: that of w may be of an x and a cotangent that are narrower.
        choice = choice._replace(implementation="xla")
    x, w, b = (*arrays, None)[:3]
    images, kernel = _as_images(x, w)
    # Taps that only ever read padding have no part in anything that follows.
    (top, bottom), (left, right) = (axis.live for axis in axes)
    live = axes[0].part(top, bottom), axes[1].part(left, right)
    y = _convolve(images, kernel[top:bottom, left:right], b, live, choice)
    return y if x.ndim == 4 else y[:, 0]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with depthwise convolutions done by `depthwise_conv`.

    It takes those of one or two dimensions with one output a channel, operands of one dtype that `depthwise_conv`
    takes, and no `lhs_dilation`; all others are `lax`'s. Arguments, result and errors are those of `lax`, newer options
    included.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> conv = nnx.Conv(16, 16, (13, 13), feature_group_count=16, rngs=nnx.Rngs(0),
      ...                 conv_general_dilated=pk.conv_general_dilated)
      >>> conv(jnp.ones((1, 7, 7, 16))).shape
      (1, 7, 7, 16)
    """
    convolve = functools.partial(
        lax.conv_general_dilated, window_strides=window_strides, padding=padding, lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation, dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
        batch_group_count=batch_group_count, precision=precision, preferred_element_type=preferred_element_type,
        **options,
    )  # fmt: skip
    expected = jax.eval_shape(convolve, lhs, rhs)
    ours = (
        lhs.ndim in (3, 4)
        and batch_group_count == 1
        and all(d == 1 for d in lhs_dilation or ())
        and lhs.dtype.name in DTYPES
        and preferred_element_type in (None, lhs.dtype)
        and all(option is None for option in options.values())
        and expected.size > 0
    )
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) if ours else None
    if numbers is not None:
        x = lhs.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        w = rhs.transpose(*numbers.rhs_spec[2:], *numbers.rhs_spec[1::-1])
        if w.shape[-2:] == (1, x.shape[-1]) and feature_group_count == x.shape[-1]:
            padding = padding.upper() if isinstance(padding, str) else padding
            y = depthwise_conv(
                x, w[..., 0, :], strides=window_strides, padding=padding, dilation=rhs_dilation or 1
            )
            back = sorted(
                range(y.ndim),
                key=(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]).__getitem__,
            )
            return y.transpose(back)
    return convolve(lhs, rhs)


def reference(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """The definition: one shifted, strided product for every tap of the kernel, summed in float32 at least."""
    rows, cols = _axes(x, w, strides, padding, dilation, bias)
    dtype = _accumulator(x)
    images, kernel = _as_images(jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    padded = lax.pad(
        images, dtype.type(0), [(0, 0, 0), *((a.pad_lo, a.pad_hi, 0) for a in (rows, cols)), (0, 0, 0)]
    )
    window = [a.stride * (a.out - 1) + 1 for a in (rows, cols)]

    def add_tap(y: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
        k, l = tap // cols.kernel, tap % cols.kernel  # noqa: E741
        start = (0, k * rows.dilation, l * cols.dilation, 0)
        shifted = lax.dynamic_slice(padded, start, (x.shape[0], *window, x.shape[-1]))
        return y + shifted[:, :: rows.stride, :: cols.stride] * kernel[k, l], None

    y = jnp.zeros((x.shape[0], rows.out, cols.out, x.shape[-1]), dtype) + (
        0 if bias is None else bias.astype(dtype)
    )
    y, _ = lax.scan(add_tap, y, jnp.arange(rows.kernel * cols.kernel))
    return (y if x.ndim == 4 else y[:, 0]).astype(x.dtype)


# Convolution, input gradient and weight gradient are each linear in two arrays, and each other's derivatives.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, axes: Axes, choice: dispatch.Choice
) -> jax.Array:
    return _run("convolve", (x, w, bias), axes, choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _input_gradient(g: jax.Array, w: jax.Array, axes: Axes, choice: dispatch.Choice) -> jax.Array:
    if all(axis.stride == 1 for axis in axes):
        # With SAME padding and an odd kernel it is the forward pass's program, traced and compiled already.
        return _run("convolve", (g, w[::-1, ::-1], None), (axes[0].mirrored, axes[1].mirrored), choice)
    return _run("input_gradient", (g, w), axes, choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weight_gradient(x: jax.Array, g: jax.Array, axes: Axes, choice: dispatch.Choice) -> jax.Array:
    return _run("weight_gradient", (x, g), axes, choice)


def _convolve_backward(axes: Axes, choice: dispatch.Choice, saved: Any, g: jax.Array) -> Any:
    x, w, bias = saved
    return (
        _input_gradient(g, w, axes, choice),
        _weight_gradient(x, g, axes, choice).astype(w.dtype),
        None if bias is None else jnp.sum(g, (0, 1, 2), _accumulator(g)).astype(bias.dtype),
    )


def _input_gradient_backward(axes: Axes, choice: dispatch.Choice, saved: Any, dx: jax.Array) -> Any:
    g, w = saved
    return _convolve(dx, w, None, axes, choice), _weight_gradient(dx, g, axes, choice).astype(w.dtype)


def _weight_gradient_backward(axes: Axes, choice: dispatch.Choice, saved: Any, dw: jax.Array) -> Any:
    x, g = saved
    return _input_gradient(g, dw, axes, choice), _convolve(x, dw, None, axes, choice)


# To pyright, what `partial` decorates is a plain function.
_convolve.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda x, w, b, axes, choice: (_convolve(x, w, b, axes, choice), (x, w, b)), _convolve_backward
)
_input_gradient.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda g, w, *a: (_input_gradient(g, w, *a), (g, w)), _input_gradient_backward
)
_weight_gradient.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda x, g, *a: (_weight_gradient(x, g, *a), (x, g)), _weight_gradient_backward
)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _run(kind: str, arrays: tuple[Any, ...], axes: Axes, choice: dispatch.Choice) -> jax.Array:
    """One jit for each kind, so that a network of equal layers holds one copy of the program."""
    unsupported = "it has no float64 arithmetic" if _any_float64(arrays) else None
    implementations = {
        "convolve": (xla.forward, _on(tpu, transposed=False), _on(gpu, transposed=False)),
        "input_gradient": (
            xla.input_gradient,
            _on(tpu, transposed=True),
            _on(gpu, transposed=True),
        ),
        "weight_gradient": (xla.weight_gradient, _summed_on(tpu), _summed_on(gpu)),
    }
    in_xla, on_tpu, on_gpu = (functools.partial(f, axes=axes) for f in implementations[kind])
    return dispatch.run(
        choice,
        *arrays,
        name="depthwise_conv",
        xla=in_xla,
        tpu=unsupported or on_tpu,
        cuda=unsupported or on_gpu,
    )


def _on(accelerator: Any, *, transposed: bool) -> Callable[..., jax.Array]:
    """The convolution as an accelerator launches it, or with `transposed` axes its input gradient."""

    def launch(
        x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, axes: Axes, interpret: Any
    ) -> jax.Array:
        rows, cols = (Gather(axis, transposed) for axis in axes)
        return accelerator.convolve(x, w, bias, rows, cols, interpret=interpret)

    return launch


def _summed_on(accelerator: Any) -> Callable[..., jax.Array]:
    def launch(x: jax.Array, g: jax.Array, *, axes: Axes, interpret: Any) -> jax.Array:
        return accelerator.weight_gradient(x, g, *axes, interpret=interpret)

    return launch


def _any_float64(arrays: Sequence[jax.Array | None]) -> bool:
    return any(a is not None and a.dtype == jnp.float64 for a in arrays)


def _accumulator(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _as_images(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A one-dimensional convolution as one of images of height 1."""
    return (x, w) if x.ndim == 4 else (x[:, None], w[None])


def _axes(x: Any, w: Any, strides: Any, padding: Padding, dilation: Any, bias: Any) -> Axes:
    """The geometry of rows and columns, once everything about the call has been found to fit."""
    for name, a in {"x": x, "w": w, "bias": bias}.items():
        dtype = getattr(a, "dtype", None)
        if getattr(dtype, "name", None) not in DTYPES and not (name == "bias" and a is None):
            raise TypeError(
                f"depthwise_conv: `{name}` must be an array of {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, "
                f"got {dtype or type(a)}"
            )
    n = x.ndim - 2
    if n not in (1, 2):
        raise ValueError(f"depthwise_conv: `x` must be (N, L, C) or (N, H, W, C), got shape {x.shape}")
    if w.ndim != n + 1 or w.shape[-1] != x.shape[-1]:
        expected = f"({'K' if n == 1 else 'KH, KW'}, {x.shape[-1]})"
        raise ValueError(
            f"depthwise_conv: `w` must be {expected} for `x` of shape {x.shape}, got shape {w.shape}"
        )
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"depthwise_conv: `bias` must have shape {x.shape[-1:]}, got {bias.shape}")
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"depthwise_conv: sizes must be positive, got `x` of {x.shape} and `w` of {w.shape}")
    strides, dilation = (_per_axis(name, v, n) for name, v in (("strides", strides), ("dilation", dilation)))
    kernel = w.shape[:-1]
    pads = _pads(padding, x.shape[1:-1], kernel, strides, dilation)
    axes = [
        Axis(size, k, s, d, *p)
        for size, k, s, d, p in zip(x.shape[1:-1], kernel, strides, dilation, pads, strict=True)
    ]
    if min(axis.out for axis in axes) < 1:
        raise ValueError(
            f"depthwise_conv: the output would be empty: kernel {kernel} with dilation {dilation} is larger than the "
            f"image {x.shape[1:-1]} padded by {tuple(pads)}"
        )
    return (axes[0], axes[1]) if n == 2 else (Axis(1, 1), axes[0])


def _per_axis(name: str, value: Any, n: int) -> tuple[int, ...]:
    values = _ints(value if np.iterable(value) else (value,) * n, n)
    if values is None or min(values) < 1:
        raise ValueError(f"depthwise_conv: `{name}` must be a positive int or {n} of them, got {value!r}")
    return values


def _pads(padding: Padding, size: Any, kernel: Any, strides: Any, dilation: Any) -> list[tuple[int, int]]:
    """(before, after) for every axis."""
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        if padding == "CAUSAL" and len(size) == 1:
            return [(extent[0] - 1, 0)]
        if padding in ("SAME", "SAME_LOWER", "VALID"):
            return [(int(lo), int(hi)) for lo, hi in lax.padtype_to_pads(size, extent, strides, padding)]
    each = list(padding) if np.iterable(padding) else [(padding, padding)] * len(size)
    pads = [pad for p in each if (pad := _ints(p, 2))]
    if not len(pads) == len(each) == len(size):
        raise ValueError(
            "depthwise_conv: `padding` must be 'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (one dimension only), or ints: "
            f"one, or {len(size)} (before, after) pairs, got {padding!r}"
        )
    return [(lo, hi) for lo, hi in pads]


def _ints(values: Any, n: int) -> tuple[int, ...] | None:
    """`values` as n ints, if they are that: NumPy's are, a bool isn't."""
    try:
        values = tuple(values)
        ints = tuple(map(operator.index, values))
    except TypeError:
        return None
    return ints if len(ints) == n and not any(isinstance(v, bool) for v in values) else None


def _parity_cases() -> list[Case]:
    """Sizes 1, odd and larger than a tile; kernels larger than the image; bands; strides, dilations, paddings.

    Together they make a TPU's planner choose each of its layouts.
    """
    f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
    return [
        _case((2, 5, 6, 3), (13, 13)),
        _case((3, 7, 7, 20), (3, 3), f32, bias=True),
        _case((1, 13, 14, 40), (5, 5), bf16),
        _case((9, 4, 5, 130), (7, 3), f32, bias=True),
        _case((1, 1, 1, 1), (31, 31)),
        _case((2, 3, 4, 5), (61, 61)),
        _case((3, 8, 9, 24), (3, 3), f32, strides=2, padding=((1, 1), (1, 1))),
        _case((2, 7, 6, 3), (4, 2), f32, strides=(2, 3), dilation=(3, 2)),
        _case((1, 9, 8, 6), (3, 3), f32, dilation=5, padding=4),
        _case((2, 6, 7, 8), (3, 3), f32, padding=((-1, 2), (0, -1))),
        _case((2, 8, 12, 16), (1, 11), f16),
        _case((2, 12, 8, 16), (11, 1), bf16, bias=True),
        _case((2, 57, 5, 4), (3, 3), f32, padding="VALID"),
        _case((3, 70, 20), (4,), f32, padding="CAUSAL", bias=True),
        _case((1, 130, 3), (9,), bf16, dilation=2),
        _case((1, 33, 7), (5,), f32, strides=2, padding="SAME_LOWER"),
        _case((16, 8, 3, 5), (2, 2)),
        _case((16, 14, 1, 3), (9, 3), bf16),
        _case((8, 4, 8, 128), (2, 2)),
        _case((8, 8, 8, 8), (7, 7)),
        _case((2, 9, 5, 3), (7, 7)),
        _case((3, 9, 9, 20), (9, 17)),
        _case((1, 14, 2, 3), (27, 15)),
        _case((1, 2, 15, 20), (3, 29)),
        _case((1, 16, 1, 40), (31, 31)),
        _case((1, 15, 8, 3), (3, 2), f32, dilation=7),
    ]


def _compile_cases(full: bool) -> list[Case]:
    """All shapes of the nine UniRepLKNets at 224 and 384 pixels; or the fewest calls that take every path."""
    f32, bf16 = jnp.float32, jnp.bfloat16
    if full:
        return [
            _case((_countable(batches[stage], *shape, k), *shape), (k, k), dtype)
            for (size, batches), width, dtype in itertools.product(
                ((56, (8, 16, 32, 128)), (96, (8, 8, 16, 32))),
                (40, 48, 64, 80, 96, 128, 192, 256),
                (f32, bf16),
            )
            for stage, k in ((0, 3), (1, 13), (2, 13), (2, 3), (3, 13))
            for shape in [(size >> stage, size >> stage, width << stage)]
        ]
    return [
        _case((32, 7, 7, 320), (13, 13)),
        _case((32, 14, 14, 160), (13, 13), bf16),
        _case((8, 28, 28, 80), (13, 13), bias=True),
        _case((8, 56, 56, 40), (3, 3), bf16),
        _case((8, 96, 96, 128), (3, 3), bf16),
        _case((1, 56, 56, 96), (7, 7)),
        _case((64, 28, 28, 192), (7, 7)),
        _case((8, 57, 57, 64), (3, 3), strides=2, padding=((1, 1), (1, 1))),
        _case((2, 28, 28, 100), (5, 5), bf16, dilation=2),
        _case((2, 1024, 256), (4,), bf16, padding="CAUSAL"),
    ]


def _countable(batch: int, height: int, width: int, c: int, k: int) -> int:
    """So many images that a compiler's static profile needs a few gigabytes; 8 or more, if that many still do."""
    rows, cols = (Axis(size, k, 1, 1, k // 2, k // 2).pairs for size in (height, width))
    while batch * c * rows * cols > 450e6 and (batch > 8 or width > 28):
        batch //= 2
    return batch


def _bench_cases() -> list[Case]:
    on_gpu = jax.default_backend() == "gpu"
    return [
        _case((batch, size, size, c), (k, k), dtype)
        for batch in ((64, 1) if on_gpu else (1, 8))
        for dtype in ((jnp.float32, jnp.bfloat16) if on_gpu else (jnp.float32,))
        for (c, size), k in itertools.product(((96, 56), (192, 28), (384, 14), (768, 7)), (3, 7, 13, 31))
    ]


def _case(
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    dtype: Any = jnp.float32,
    *,
    bias: bool = False,
    **options: Any,
) -> Case:
    shapes = [x, (*kernel, x[-1]), *([(x[-1],)] * bias)]
    name = f"N{x[0]} {'x'.join(map(str, x[1:-1]))} C{x[-1]} K{'x'.join(map(str, kernel))} {jnp.dtype(dtype).name}"
    extras = [*(["bias"] * bias), *(f"{k}={v}".replace(" ", "") for k, v in options.items())]
    structs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return Case(" ".join([name, *extras]), structs, options, tuple(range(len(shapes))))


def _geometry(case: Case) -> Any:
    """A two-dimensional case's strides, padding and dilation, spelt out."""
    axes = _axes(
        *case.arguments[:2], **{"strides": 1, "padding": "SAME", "dilation": 1, **case.options}, bias=None
    )
    return tuple(zip(*((a.stride, (a.pad_lo, a.pad_hi), a.dilation) for a in axes), strict=True))


OPERATOR = Operator(
    name="depthwise_conv",
    function=lambda x, w, bias=None, **options: depthwise_conv(x, w, bias=bias, **options),
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=_bench_cases,
    baselines=baselines(_geometry),
)
