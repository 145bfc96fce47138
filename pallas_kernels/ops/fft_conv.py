"""Convolution along a sequence with kernels as long as the sequence."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.fourier import Gates, Lags
from pallas_kernels.gpu import fft_conv as gpu
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops import _fft_conv_xla as xla
from pallas_kernels.ops._fft_conv_baselines import baselines
from pallas_kernels.tpu import fft_conv as tpu

Mode = Literal["causal", "bidirectional", "circular"]
Mask = tuple[bool, ...] | None
NO_GATES: Gates = (None, None)


def fft_conv(
    u: jax.Array,
    k: jax.Array,
    *,
    skip: jax.Array | None = None,
    gate_in: jax.Array | None = None,
    gate_out: jax.Array | None = None,
    mode: Mode = "causal",
    first_backward_lag: Literal[0, -1] = -1,
    spectrum_mask: Any = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolve every channel of a sequence with a kernel of its own, of any length, by Fourier transforms.

    With v = gate_in u, zero outside of the sequence unless the mode is circular::

        y[b, t, c] = gate_out[b, t, c] (skip[c] v[b, t, c] + sum_{lag} kernel[lag, c] v[b, t - lag, c])

    * causal: kernel[j] = k[j] for j >= 0;
    * bidirectional: that of k[0], and kernel[first_backward_lag - j] += k[1, j];
    * circular: kernel[j] = k[j], and the time t - lag is modulo L.

    Args:
      u: (B, L, C); float32, bfloat16, float16, or float64 (XLA only). Any L.
      k: (K, C), or (2, K, C) if bidirectional, any of these dtypes. Any K: a short kernel is a partial convolution, and
        of a long one, taps that reach across the whole sequence have no effect (they wrap around if circular).
      skip: (C,), the weight of the input itself.
      gate_in, gate_out: (B, L, C).
      mode: "causal", "bidirectional" or "circular".
      first_backward_lag: where k[1, 0] acts: -1 as in S4 and SGConv, or 0, on top of k[0, 0], as in H3.
      spectrum_mask: (n,) booleans, known when the function is traced: zero the kernel's transform where they are
        False. They stand for n equal blocks of the L bins of the real transform of the kernel over 2 L points,
        lags below zero at its end; the bin of the highest frequency goes with the last block. The result is that
        of the kernel transformed back, whose taps before and after zero are both used, whatever the mode.
      precision: of products in a Pallas kernel. "highest": bfloat16 in three parts, a relative error of 2e-7, the
        default for float32. "high": in two parts, 1e-5, the default for bfloat16 and float16, where it vanishes
        beside rounding. "default": plain bfloat16, 5e-3, and half the time or less. XLA transforms in float32.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (B, L, C) in u's dtype. It can be differentiated in all arrays, to any order. The gradient of k is summed in
      float32. Between the passes only the arguments are kept.

    Raises:
      TypeError: an argument is not an array of floating-point numbers.
      ValueError: shapes don't fit, a size is zero, or the mask doesn't divide L.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> y = pk.fft_conv(jnp.ones((1, 5, 2)), jnp.ones((5, 2)))
      >>> [round(float(v), 4) for v in y[0, :, 0]]
      [1.0, 2.0, 3.0, 4.0, 5.0]

    Transforms as matrix products: Fu et al., FlashFFTConv, arXiv:2311.05908, section 3.
    """
    choice = dispatch.choose(implementation)
    mask = _check(u, k, skip, gate_in, gate_out, mode, first_backward_lag, spectrum_mask)
    given = {"u": u, "k": k, "skip": skip, "gate_in": gate_in, "gate_out": gate_out}
    given = {name: a for name, a in given.items() if a is not None}
    arrays = dict(zip(given, lowering.make_varying(*map(jnp.asarray, given.values())), strict=True))
    h, lags = _taps(arrays["k"].astype(_accumulator(u.dtype)), u.shape[1], mode, first_backward_lag)
    if mask is None and skip is not None:
        h = h.at[lags.zero].add(arrays.pop("skip").astype(h.dtype))
    if mask is not None:
        h, lags = _masked(h, lags, mask)
    options = _Options(lags, _parts(precision, u.dtype), mask, choice)
    u, gates = arrays["u"], (arrays.get("gate_in"), arrays.get("gate_out"))
    if "skip" in arrays:
        return _composed(u, h, arrays["skip"], gates, options)
    return _gated(u, h, gates, options) if any(a is not None for a in gates) else _convolve(u, h, options)


def reference(
    u: jax.Array,
    k: jax.Array,
    skip: jax.Array | None = None,
    gate_in: jax.Array | None = None,
    gate_out: jax.Array | None = None,
    *,
    mode: Mode = "causal",
    first_backward_lag: Literal[0, -1] = -1,
    spectrum_mask: Any = None,
    precision: Any = None,
) -> jax.Array:
    """The definition, by the real transforms of as many points as nothing wraps around in, in float32 at least."""
    del precision
    dtype, length = _accumulator(u.dtype), u.shape[1]
    v = u.astype(dtype) if gate_in is None else u.astype(dtype) * gate_in.astype(dtype)
    h, lags = _taps(k.astype(dtype), length, mode, first_backward_lag)
    if spectrum_mask is not None:
        h, lags = _masked(h, lags, tuple(np.asarray(spectrum_mask).tolist()))
    n = length + lags.taps
    y = jnp.fft.irfft(jnp.fft.rfft(v, n, axis=1) * jnp.fft.rfft(h, n, axis=0), n, axis=1)
    y = y[:, lags.zero : lags.zero + length]
    y = y if skip is None else y + skip.astype(dtype) * v
    return (y if gate_out is None else y * gate_out.astype(dtype)).astype(u.dtype)


class _Options(NamedTuple):
    """What is static about a call."""

    lags: Lags
    parts: int
    mask: Mask
    choice: dispatch.Choice

    @property
    def flipped(self) -> "_Options":
        return self._replace(lags=self.lags.flipped)


@functools.partial(jax.checkpoint, static_argnums=(4,))
def _composed(u: jax.Array, h: jax.Array, skip: Any, gates: Gates, options: _Options) -> jax.Array:
    """With gates outside of the convolution, to which a skip beside a masked spectrum belongs too.

    Nothing is saved but arguments, and nothing rounded on the way, or gradients would add up more than the rounding of
    one result.
    """
    dtype = _accumulator(u.dtype)
    gate_in, gate_out = gates
    v = u.astype(dtype) if gate_in is None else u.astype(dtype) * gate_in.astype(dtype)
    y = _convolve(v, h, options)
    y = y if skip is None else y + skip.astype(dtype) * v
    return (y if gate_out is None else y * gate_out.astype(dtype)).astype(u.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated(u: jax.Array, h: jax.Array, gates: Gates, options: _Options) -> jax.Array:
    return _run("convolve", (u, h, gates), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gated_gradients(u: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, options: _Options) -> Any:
    return _run("gradients", (u, h, gates, g), options)


def _gated_backward(options: _Options, saved: Any, g: jax.Array) -> Any:
    u, h, gates = saved
    return _gated_gradients(u, h, gates, g, options)


def _gated_gradients_backward(options: _Options, saved: Any, cotangents: Any) -> Any:
    """Derivatives from the second on are those of the composed form."""

    def composed(u: jax.Array, h: jax.Array, gates: Gates, g: jax.Array) -> Any:
        of = lambda u, h, gates: _composed(u, h, None, gates, options)  # noqa: E731
        return jax.vjp(of, u, h, gates)[1](g)

    return jax.vjp(composed, *saved)[1](cotangents)


# The convolution is linear in signal and taps, and its two gradients are convolutions again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(v: jax.Array, h: jax.Array, options: _Options) -> jax.Array:
    return _run("convolve", (v, h, NO_GATES), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transposed(g: jax.Array, h: jax.Array, options: _Options) -> jax.Array:
    return _run("transposed", (g, h, NO_GATES), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradients(v: jax.Array, h: jax.Array, g: jax.Array, options: _Options) -> tuple[jax.Array, jax.Array]:
    return _run("gradients", (v, h, NO_GATES, g), options)[:2]


def _convolve_backward(options: _Options, saved: Any, g: jax.Array) -> Any:
    v, h = saved
    return _gradients(v, h, g, options)


def _transposed_backward(options: _Options, saved: Any, dv: jax.Array) -> Any:
    g, h = saved
    # <g, convolve(dv, h)> has the gradient g convolved, and in h that of a convolution of dv.
    return _convolve(dv, h, options), _gradients(dv, h, g, options)[1]


def _gradients_backward(options: _Options, saved: Any, cotangents: Any) -> Any:
    (v, h, g), (ddv, ddh) = saved, cotangents
    return (
        _transposed(g, ddh, options),
        _gradients(ddv, h, g, options)[1],
        _convolve(ddv, h, options) + _convolve(v, ddh, options),
    )


# To pyright, what `partial` decorates is a plain function.
_gated.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda u, h, gates, options: (_gated(u, h, gates, options), (u, h, gates)),
    _gated_backward,
)
_gated_gradients.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda u, h, gates, g, options: (_gated_gradients(u, h, gates, g, options), (u, h, gates, g)),
    _gated_gradients_backward,
)
_convolve.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda v, h, options: (_convolve(v, h, options), (v, h)), _convolve_backward
)
_transposed.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda g, h, options: (_transposed(g, h, options), (g, h)), _transposed_backward
)
_gradients.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda v, h, g, options: (_gradients(v, h, g, options), (v, h, g)), _gradients_backward
)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(kind: str, arrays: tuple[Any, ...], options: _Options) -> Any:
    """One jit for each kind, so that a network of equal layers holds one copy of the program."""
    lags, parts, mask, choice = options
    dtype = arrays[0].dtype
    unsupported = f"it has no {dtype} arithmetic" if dtype == jnp.float64 else None

    def bind(module: Any, **extra: Any) -> Callable[..., Any]:
        if kind == "gradients":
            return functools.partial(module.gradients, lags=lags, **extra)
        return functools.partial(module.convolve, lags=lags, transposed=kind == "transposed", **extra)

    return dispatch.run(
        choice,
        *arrays,
        name="fft_conv",
        xla=bind(xla),
        tpu=unsupported or bind(tpu, parts=parts, mask=mask),
        cuda=unsupported or bind(gpu, parts=parts, mask=mask),
    )


def _taps(k: jax.Array, length: int, mode: Mode, first_backward_lag: int) -> tuple[jax.Array, Lags]:
    """The kernel as one row of taps, of lags that a sequence of that length has."""
    if mode == "causal":
        h = k[:length]
        return h, Lags(length, len(h), 0)
    if mode == "bidirectional":
        # Of a kernel that is longer than the sequence, no lag is `length` or more.
        after, before = k[0, :length], k[1, : length + first_backward_lag][::-1]
        if first_backward_lag == 0:
            after, before = after.at[0].add(before[-1]), before[:-1]
        return jnp.concatenate([before, after]), Lags(length, len(before) + len(after), len(before))
    folded = jnp.pad(k, ((0, -len(k) % length), (0, 0))).reshape(-1, length, k.shape[1]).sum(0)
    return jnp.concatenate([folded[1:], folded]), Lags(length, 2 * length - 1, length - 1)


def _masked(h: jax.Array, lags: Lags, mask: tuple[bool, ...]) -> tuple[jax.Array, Lags]:
    """The taps whose transform over 2 L points is that of h, or zero where the mask is."""
    n = 2 * lags.length
    bins = np.append(np.repeat(mask, lags.length // len(mask)), mask[-1])
    around = jnp.pad(h, ((0, n - lags.taps), (0, 0)))
    spectrum = jnp.fft.rfft(jnp.roll(around, -lags.zero, 0), axis=0)
    h = jnp.fft.irfft(jnp.where(bins[:, None], spectrum, 0), n, axis=0)
    # No two samples are L apart, but without the tap of lag -L the transform would not be zero where it has to be.
    return jnp.roll(h, lags.length, 0), Lags(lags.length, n, lags.length)


def _parts(precision: Any, dtype: Any) -> int:
    """How many bfloat16 parts the operands of products have."""
    if precision is None:
        return 3 if dtype.itemsize > 2 else 2
    if isinstance(precision, str | lax.Precision):
        try:
            return {lax.Precision.HIGHEST: 3, lax.Precision.HIGH: 2, lax.Precision.DEFAULT: 1}[
                lax.Precision(precision)
            ]
        except ValueError:
            pass
    raise ValueError(f"fft_conv: `precision` must be None, 'highest', 'high' or 'default', got {precision!r}")


def _accumulator(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _check(u: Any, k: Any, skip: Any, gate_in: Any, gate_out: Any, mode: Any, lag: Any, mask: Any) -> Mask:
    """Raise if anything about the call doesn't fit; the mask as a tuple."""
    for name, a in {"u": u, "k": k, "skip": skip, "gate_in": gate_in, "gate_out": gate_out}.items():
        if a is not None and not (hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)):
            raise TypeError(
                f"fft_conv: `{name}` must be a floating-point array, got {getattr(a, 'dtype', type(a))}"
            )
    if mode not in get_args(Mode):
        raise ValueError(
            f"fft_conv: `mode` must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}"
        )
    if lag not in (0, -1):
        raise ValueError(f"fft_conv: `first_backward_lag` must be 0 or -1, got {lag!r}")
    if u.ndim != 3:
        raise ValueError(f"fft_conv: `u` must be (B, L, C), got shape {u.shape}")
    expected = ("K", u.shape[2]) if mode != "bidirectional" else (2, "K", u.shape[2])
    if k.ndim != len(expected) or any(
        n not in ("K", size) for n, size in zip(expected, k.shape, strict=True)
    ):
        raise ValueError(
            f"fft_conv: `k` must be ({', '.join(map(str, expected))}) for `u` of shape {u.shape} and mode {mode!r}, "
            f"got shape {k.shape}"
        )
    for name, a, shape in (
        ("skip", skip, u.shape[2:]),
        ("gate_in", gate_in, u.shape),
        ("gate_out", gate_out, u.shape),
    ):
        if a is not None and a.shape != shape:
            raise ValueError(f"fft_conv: `{name}` must have shape {shape}, got {a.shape}")
    if 0 in (*u.shape, *k.shape):
        raise ValueError(f"fft_conv: sizes must be positive, got `u` of {u.shape} and `k` of {k.shape}")
    if mask is None:
        return None
    if isinstance(mask, jax.core.Tracer):
        raise TypeError("fft_conv: `spectrum_mask` must be known when the function is traced, got a tracer")
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 1 or not len(mask) or u.shape[1] % len(mask):
        raise ValueError(
            f"fft_conv: `spectrum_mask` must be (n,) booleans of blocks that divide L = {u.shape[1]}, "
            f"got {mask.dtype} of shape {mask.shape}"
        )
    return tuple(mask.tolist())


def _parity_cases() -> list[Case]:
    """One sample, primes, a power of two and its neighbours; kernels shorter and longer; every option."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    return [
        _case(1, 1, 1, 1),
        _case(2, 7, 3, 5),
        _case(3, 37, 50, 3, skip=True),
        _case(2, 127, 127, 2, bf16),
        _case(1, 129, 129, 3, f16, gates=True),
        _case(5, 64, 64, 17, skip=True, gates=True),
        _case(3, 31, 12, 2, mode="bidirectional"),
        _case(2, 20, 33, 3, mode="bidirectional", first_backward_lag=0, skip=True),
        _case(2, 45, 45, 2, mode="circular"),
        _case(2, 11, 30, 2, bf16, mode="circular", gates=True),
        _case(3, 128, 128, 2, spectrum_mask=(True, False, True, False), skip=True),
        _case(2, 60, 60, 2, spectrum_mask=(True, True, False)),
        _case(2, 300, 300, 2),
    ]


def _compile_cases(full: bool) -> list[Case]:
    """Every power of four from 256 to 1M, gated and not; or the fewest calls that take every path.

    Batches are small: more rows are more of the same, and a compiler's profile of them may outgrow its memory.
    """
    f32, bf16 = jnp.float32, jnp.bfloat16
    if full:
        return [
            _case(*shape, dtype, gates=gates)
            for shape in (
                (16, 256, 256, 64), (4, 1024, 1024, 64), (2, 4096, 4096, 64),
                (8, 16384, 16384, 32), (4, 65536, 65536, 16), (2, 1 << 20, 1 << 20, 4),
            )
            for dtype in (f32, bf16)
            for gates in (False, True)
        ]  # fmt: skip
    return [
        _case(64, 256, 256, 256, bf16, gates=True),
        _case(2, 1000, 1000, 96, skip=True),
        _case(2, 4096, 4096, 64, bf16, mode="bidirectional"),
        _case(2, 8192, 8192, 16, bf16),
        _case(2, 65536, 65536, 8, gates=True),
        _case(2, 65536, 65536, 8, bf16, precision="default"),
        _case(1, 300_000, 300_000, 2),
        _case(4, 2048, 2048, 16, bf16, spectrum_mask=(True, False, False, False)),
    ]


def _bench_cases() -> list[Case]:
    """On a GPU those of the published times, with as few channels as its memory asks for."""
    if jax.default_backend() == "gpu":
        lengths = (2**8, 2**10, 2**12, 2**14, 2**16, 2**20, 2**22)
        return [_case(64, n, n, min(768, 2**28 // (64 * n)), jnp.bfloat16) for n in lengths]
    return [_case(4, length, length, 64) for length in (1024, 4096, 16384, 65536)]


def _case(
    b: int, length: int, taps: int, c: int, dtype: Any = jnp.float32, *, skip: bool = False, gates: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    u = b, length, c
    k = (2, taps, c) if options.get("mode") == "bidirectional" else (taps, c)
    # Without the arguments between them, later ones could not be told apart.
    shapes = [u, k, *([(c,)] * (skip or gates)), *([u, u] * gates)]
    structs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    extras = (
        ["skip"] * (skip or gates)
        + ["gates"] * gates
        + [f"{k}={v}".replace(" ", "") for k, v in options.items()]
    )
    name = f"N{b} L{length} C{c} K{taps} {jnp.dtype(dtype).name}"
    return Case(" ".join([name, *extras]), structs, options, tuple(range(len(shapes))))


def _of_arrays(
    u: Any, k: Any, skip: Any = None, gate_in: Any = None, gate_out: Any = None, **options: Any
) -> Any:
    return fft_conv(u, k, skip=skip, gate_in=gate_in, gate_out=gate_out, **options)


OPERATOR = Operator(
    name="fft_conv",
    function=_of_arrays,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=_bench_cases,
    baselines=baselines(),
)
