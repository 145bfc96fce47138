"""Long convolution: parity with sums in float64, causality, gradients, memory, transforms, lowering, errors."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import aot, fourier, lowering, testing
from pallas_kernels.aot._programs import described, equations, pallas_calls
from pallas_kernels.gpu import fft_conv as gpu
from pallas_kernels.ops import _fft_conv_xla as xla
from pallas_kernels.ops.fft_conv import OPERATOR, reference
from pallas_kernels.tpu import fft_conv as tpu

CASES = OPERATOR.parity_cases()
# Lengths of the cases that cover most of the code in seconds.
QUICK = {1, 7, 31, 64, 127}
KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
# Relative root mean square errors that each precision of a kernel stays within.
ERRORS = {"highest": 1e-6, "high": 2e-5, "default": 1.5e-2}
LENGTHS = (
    1, 2, 3, 7, 16, 31, 64, 100, 127, 128, 129, 255, 256, 257, 500, 512, 777, 1000, 1024, 1025, 2048, 3000, 4096,
)  # fmt: skip


@pytest.fixture(
    params=["xla", pytest.param("tpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.slow)]
)
def platform(request):
    return request.param


@pytest.fixture
def conv(implementation):
    """The operator by each implementation."""
    return functools.partial(pk.fft_conv, implementation=implementation)


def normal(random, *shape, dtype: Any = np.float32):
    return jnp.asarray(random.normal(size=shape), dtype)


def direct(u, k):
    """The causal sum, in float64."""
    u, k = np.asarray(u, np.float64), np.asarray(k, np.float64)
    one = lambda u, k: np.convolve(u, k)[: len(u)]  # noqa: E731
    return np.stack([np.stack([one(row, taps) for row, taps in zip(x.T, k.T, strict=True)], 1) for x in u])


def error(got, expected):
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    assert got.shape == expected.shape
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def loss(conv):
    """A function whose gradients and second derivatives depend on all arguments."""
    return lambda *arrays: jnp.sum(jnp.tanh(conv(*arrays) / 3))


def given(conv, names):
    """A function of u, k and of what has these names."""
    return lambda u, k, *values: conv(u, k, **dict(zip(names, values, strict=True)))


def gradients(conv, count=2):
    return jax.grad(loss(conv), tuple(range(count)))


def assert_close(got, expected, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and error(a, b) <= tolerance


# Parity


@functools.cache
def results(i):
    one = dataclasses.replace(OPERATOR, parity_cases=lambda: [CASES[i]])
    return {r.implementation: r for r in testing.check_operator(one)}


@pytest.mark.parametrize(
    "i",
    [
        pytest.param(i, id=case.name, marks=[pytest.mark.slow] * (case.arguments[0].shape[1] not in QUICK))
        for i, case in enumerate(CASES)
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "pallas (tpu, interpreted)", "pallas (cuda, interpreted)"])
def test_parity(i, implementation):
    result = results(i)[implementation]
    assert result.ok, result.message


@pytest.mark.sweep
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_is_the_sum(length, random):
    for taps in {1, -(-length // 3), length, length + 5}:
        u, k = normal(random, 3, length, 2), normal(random, taps, 2)
        assert error(pk.fft_conv(u, k, implementation="xla"), direct(u, k)) <= 1e-6


@pytest.mark.parametrize("length", [1, 31, 100, 257, pytest.param(1025, marks=pytest.mark.slow)])
def test_kernels_at_odd_lengths_are_the_sum(conv, length, random):
    u, k = normal(random, 3, length, 2), normal(random, length, 2)
    assert error(conv(u, k), direct(u, k)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_at_every_length_are_the_sum(length, platform, random):
    u, k = normal(random, 1, length, 1), normal(random, length, 1)
    with testing.interpret(platform):
        assert error(pk.fft_conv(u, k, implementation="pallas"), direct(u, k)) <= 1e-6


SIGNALS = {
    "a shift": lambda u, k: (u, np.eye(len(k), 1, -(len(k) // 3))[:, [0, 0]]),
    "the identity": lambda u, k: (u, np.eye(len(k), 1)[:, [0, 0]]),
    "a running sum": lambda u, k: (u, np.ones_like(k)),
    "a large offset": lambda u, k: (u + 100, k),
    "channels of different scale": lambda u, k: (u * [1e3, 1e-3], k),
    "a decaying kernel": lambda u, k: (u, k * np.exp(-np.arange(len(k)) / 9)[:, None]),
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_signals(conv, signal, random):
    u, k = (
        jnp.asarray(a, jnp.float32)
        for a in SIGNALS[signal](random.normal(size=(2, 100, 2)), random.normal(size=(100, 2)))
    )
    got, expected = conv(u, k), direct(u, k)
    assert max(error(got[..., c], expected[..., c]) for c in (0, 1)) <= 1e-6


@pytest.mark.sweep
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("precision", ERRORS)
def test_precisions_keep_their_promise(platform, precision, random):
    u, k = normal(random, 2, 200, 2), normal(random, 200, 2)
    with testing.interpret(platform):
        y = pk.fft_conv(u, k, precision=precision, implementation="pallas")
    better = {"highest": 0.0, "high": 1e-6, "default": 1e-3}
    assert better[precision] < error(y, direct(u, k)) <= ERRORS[precision]


@pytest.mark.parametrize("length", [1 << 13, 50_000, 1 << 17, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_long_sequences_in_xla(length, random):
    u, k = normal(random, 1, length, 1), normal(random, length, 1)
    with lowering.enable_x64():
        expected = reference(u.astype(jnp.float64), k.astype(jnp.float64))
    assert error(pk.fft_conv(u, k, implementation="xla"), expected) <= 1e-6


@pytest.mark.sweep
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("passes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_outer_passes(platform, passes, random, monkeypatch):
    module = {"tpu": tpu, "cuda": gpu}[platform]
    plan = module._plan
    factors = {1: (3,), 2: (3, 2)} if platform == "tpu" else {1: (16,), 2: (16, 16)}

    def longer(*args):
        outer = factors[passes]
        return plan(*args)._replace(outer=outer, rows=16, columns=16, batch=1, channels=1, outer_columns=64)

    monkeypatch.setattr(module, "_plan", longer)
    monkeypatch.setattr(tpu.lanes, "plan", lambda *_, **__: None)
    length = int(np.prod(factors[passes])) * 256 - 5
    u, before, after, g = (normal(random, 2, length, 2) for _ in range(4))
    k = normal(random, 2, length // 2, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(conv, *arrays):
        y, vjp = jax.vjp(lambda u, k, i, o: conv(u, k, gate_in=i, gate_out=o, mode="bidirectional"), *arrays)
        return y, *vjp(g)

    jax.clear_caches()
    with testing.interpret(platform):
        got = everything(functools.partial(pk.fft_conv, implementation="pallas"), u, k, before, after)
    jax.clear_caches()
    assert_close(got, everything(reference, u, k, before, after), 2e-6)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("shape", "dtype", "precision"),
    [
        ((4, 70, 5), jnp.float32, "highest"),
        pytest.param((3, 600, 130), jnp.bfloat16, "default", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_channels_on_lanes(shape, dtype, precision, gated, random):
    """Rows of the batch side by side, channels in ragged blocks, two products either way."""
    arrays = [normal(random, *shape, dtype=dtype) for _ in range(1 + 2 * gated)]
    k, g = normal(random, *shape[1:]), normal(random, *shape, dtype=dtype)
    plan = tpu.lanes.plan([g] * 7, {"highest": 3, "default": 1}[precision], signals=2)
    assert plan is not None and plan.columns > 1 and (plan.side > 1) == (shape[2] < 64)

    def everything(conv, u, k, *gates):
        of = lambda u, k, *gates: conv(u, k, **dict(zip(("gate_in", "gate_out"), gates, strict=False)))  # noqa: E731
        y, vjp = jax.vjp(of, u, k, *gates)
        return y, *vjp(g.astype(y.dtype))

    with testing.interpret("tpu"):
        conv = functools.partial(pk.fft_conv, implementation="pallas", precision=precision)
        got = everything(conv, arrays[0], k, *arrays[1:])
    with lowering.enable_x64():
        wide = [a.astype(jnp.float64) for a in (arrays[0], k, *arrays[1:])]
        expected = everything(reference, *wide)
    for a, want in zip(got, expected, strict=True):
        assert error(a, want) <= ERRORS[precision]


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "circular"])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float64")])
def test_gradients_have_the_dtypes_of_their_arrays(dtypes, mode, random):
    with lowering.enable_x64():
        k = normal(random, *(2, 8, 2)[mode != "bidirectional" :])
        u, k = (jnp.asarray(a, dtype) for a, dtype in zip((normal(random, 1, 8, 2), k), dtypes, strict=True))
        of = lambda u, k: jnp.sum(jnp.sin(pk.fft_conv(u, k, mode=mode).astype(jnp.float64)))  # noqa: E731
        gradients = jax.grad(of, (0, 1))(u, k)
        again = jax.grad(lambda k: jnp.sum(jax.grad(of, 1)(u, k) ** 2))(k)
    assert (*(str(d.dtype) for d in gradients), again.dtype) == (*dtypes, dtypes[1])


# Causality


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_past_knows_nothing_of_the_future(conv, size, random):
    u, k = normal(random, 1, 129, 2), normal(random, 129, 2)
    change = jnp.where(jnp.arange(129)[:, None] >= 70, size, 0) * normal(random, 1, 129, 2)
    y, changed = conv(u, k), conv(u + change, k)
    assert np.linalg.norm((changed - y)[:, :70]) <= 1e-6 * np.linalg.norm(changed)
    assert np.linalg.norm((changed - y)[:, 70:]) > 0.1 * np.linalg.norm(change)


def test_the_jacobian_is_lower_triangular(conv, random):
    u, k = normal(random, 1, 33, 1), normal(random, 33, 1)
    jacobian = jax.jacrev(lambda u: conv(u, k)[0, :, 0])(u)[:, 0, :, 0]
    i, j = np.indices(jacobian.shape)
    assert np.abs(jacobian[i < j]).max() <= 1e-6 * np.abs(jacobian).max()
    expected = np.where(i >= j, np.asarray(k)[np.abs(i - j), 0], 0)
    assert error(jacobian, expected) <= 1e-6


@pytest.mark.parametrize("length", [65, 129, 513])
def test_nothing_wraps_around(conv, length, random):
    """Just above a power of two, where a transform of too few points would."""
    u = jnp.zeros((1, length, 1)).at[0, -1].set(1.0)
    k = normal(random, length, 1)
    y = conv(u, k)
    assert np.abs(y[0, :-1]).max() <= 1e-6 * np.abs(k).max()
    np.testing.assert_allclose(y[0, -1], k[0], rtol=1e-5)


@pytest.mark.parametrize("lag", [-1, 0])
@pytest.mark.parametrize("taps", [5, 12, 20])
def test_bidirectional_conventions(conv, lag, taps, random):
    u, k = normal(random, 2, 12, 3), normal(random, 2, taps, 3)
    expected = np.zeros(u.shape)
    for t in range(12):
        for j in range(taps):
            if t - j >= 0:
                expected[:, t] += np.float64(k[0, j]) * np.float64(u[:, t - j])
            if t + j - lag < 12:
                expected[:, t] += np.float64(k[1, j]) * np.float64(u[:, t + j - lag])
    assert error(conv(u, k, mode="bidirectional", first_backward_lag=lag), expected) <= 1e-6


@pytest.mark.parametrize("taps", [5, 12, 30])
def test_circular(conv, taps, random):
    u, k = normal(random, 2, 12, 3), normal(random, taps, 3)
    expected = sum(np.float64(k[j]) * np.roll(np.float64(u), j, 1) for j in range(taps))
    assert error(conv(u, k, mode="circular"), expected) <= 1e-6


# Options


def test_gates_and_skip_are_what_they_say(conv, random):
    u, k, skip = normal(random, 2, 40, 3), normal(random, 40, 3), normal(random, 3)
    before, after = normal(random, 2, 40, 3), normal(random, 2, 40, 3)
    v = np.float64(u) * np.float64(before)
    summed = direct(v, k)
    for options, expected in {
        ("skip",): direct(u, k) + np.float64(skip) * np.float64(u),
        ("gate_in",): summed,
        ("gate_out",): np.float64(after) * direct(u, k),
        ("skip", "gate_in", "gate_out"): np.float64(after) * (summed + np.float64(skip) * v),
    }.items():
        given = {"skip": skip, "gate_in": before, "gate_out": after}
        assert error(conv(u, k, **{name: given[name] for name in options}), expected) <= 1e-6


def test_gradients_of_every_argument(conv, random):
    arrays = [normal(random, *s) for s in ((2, 30, 2), (30, 2), (2,), (2, 30, 2), (2, 30, 2))]

    options = "skip", "gate_in", "gate_out"
    with lowering.enable_x64():
        wide = [a.astype(jnp.float64) for a in arrays]
        expected = gradients(given(reference, options), 5)(*wide)
    for got, want in zip(gradients(given(conv, options), 5)(*arrays), expected, strict=True):
        assert error(got, want) <= 2e-6


@pytest.mark.parametrize("gate", ["gate_in", "gate_out"])
def test_gradients_with_one_gate(conv, gate, random):
    u, k, g = normal(random, 2, 20, 2), normal(random, 20, 2), normal(random, 2, 20, 2, dtype=jnp.bfloat16)
    got = gradients(lambda u, k, g: conv(u, k, **{gate: g}), 3)(u, k, g)
    with lowering.enable_x64():
        wide = [a.astype(jnp.float64) for a in (u, k, g)]
        expected = gradients(lambda u, k, g: reference(u, k, **{gate: g}), 3)(*wide)
    assert [a.dtype for a in got] == [u.dtype, k.dtype, g.dtype]
    for a, want, tolerance in zip(got, expected, (2e-6, 2e-6, 3e-3), strict=True):
        assert error(a, want) <= tolerance


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("channels", "part", "loops"), [(8, 4, 0), (7, 3, 0), (24, 3, 2), (17, 3, 2)], ids=str
)
def test_channels_in_parts_are_the_same(channels, part, loops, random, monkeypatch):
    u, gate = normal(random, 2, 20, channels), normal(random, 2, 20, channels, dtype=jnp.bfloat16)
    k = normal(random, 20, channels)

    def both(u, k, gate):
        y, vjp = jax.vjp(lambda u, k, g: pk.fft_conv(u, k, gate_out=g, implementation="xla"), u, k, gate)
        return y, *vjp(u)

    expected = both(u, k, gate)
    monkeypatch.setattr(xla, "MANY", 1)
    monkeypatch.setattr(xla, "CHANNELS", part)
    jax.clear_caches()
    program = jax.jit(both).lower(u, k, gate).as_text()
    assert program.count("stablehlo.while") == loops
    assert_close(both(u, k, gate), expected, 1e-6)
    jax.clear_caches()


def test_kernel_gradient_of_a_large_batch(conv, random):
    u, k = normal(random, 64, 20, 2, dtype=jnp.bfloat16), normal(random, 20, 2)
    g = normal(random, 64, 20, 2, dtype=jnp.bfloat16)
    (dk,) = jax.vjp(lambda k: conv(u, k), k)[1](g)
    u, g = np.asarray(u, np.float64), np.asarray(g, np.float64)
    expected = np.stack([np.sum(g[:, j:] * u[:, : 20 - j], (0, 1)) for j in range(20)])
    assert error(dk, expected) <= 2e-5


def test_zeros_have_finite_gradients(conv):
    u, k, gate = jnp.zeros((1, 9, 2)), jnp.zeros((9, 2)), jnp.zeros((1, 9, 2))
    y, vjp = jax.vjp(lambda u, k, g: conv(u, k, gate_in=g, gate_out=g), u, k, gate)
    assert all(np.isfinite(g).all() for g in vjp(jnp.ones_like(y)))


def test_second_derivatives(conv, random):
    u, k, tangent = normal(random, 2, 9, 2), normal(random, 9, 2), normal(random, 2, 9, 2)

    def third(conv, u, k):
        """The gradient of a directional derivative goes through every rule twice."""
        du, dk = gradients(lambda u, k: conv(u, k, gate_in=u))(u, k)
        return jnp.sum(du * tangent) + jnp.sum(dk**2)

    got = jax.jit(jax.grad(functools.partial(third, conv), (0, 1)))(u, k)
    assert_close(got, jax.grad(functools.partial(third, reference), (0, 1))(u, k))


MASKS = {
    "low frequencies": [True] + [False] * 3,
    "high frequencies": [False, True],
    "a comb": [True, False] * 64,
    "all": [True],
    "none": [False],
    "random blocks": [True, False, False, True, True, False, True, False],
}


@pytest.mark.parametrize("length", [128, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_spectra(conv, mask, length, random):
    u, k, skip = normal(random, 2, length, 2), normal(random, length, 2), normal(random, 2)
    keep = np.repeat(MASKS[mask], length // len(MASKS[mask]))
    spectrum = np.fft.rfft(np.float64(k), 2 * length, 0) * np.append(keep, keep[-1])[:, None]
    spectrum = spectrum * np.fft.rfft(np.float64(u), 2 * length, 1)
    expected = np.fft.irfft(spectrum, 2 * length, 1)[:, :length] + np.float64(skip) * np.float64(u)
    assert error(conv(u, k, skip=skip, spectrum_mask=MASKS[mask]), expected) <= 1e-6


def test_masked_blocks_are_skipped():
    """What is left out of the matrices is neither loaded nor multiplied."""
    low, comb = (True, False, False, False), (True, False) * 256

    def sizes(module, mask):
        matrices = fourier._matrices(module._plan((4, 512, 2), 1, mask))
        return matrices.left.size, matrices.right.size

    for module in (tpu, gpu):
        (left, _), (full, _) = sizes(module, comb), sizes(module, (True,))
        assert 2 * left <= full
    assert 3 * sizes(tpu, low)[1] <= sizes(tpu, (True,))[1]


def test_a_short_kernel_is_one_with_zeros_appended(conv, random):
    u, k = normal(random, 2, 50, 2), normal(random, 7, 2)
    assert error(conv(u, k), conv(u, jnp.pad(k, ((0, 43), (0, 0))))) <= 1e-6


# Memory


GATES = [(), ("gate_in",), ("gate_out",), ("gate_in", "gate_out")]


def structs(b, length, c, gates=()):
    """Of a signal, of a kernel as long, and of gates."""
    signal, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, length, c), (length, c)))
    return signal, kernel, *(signal for _ in gates)


@pytest.mark.parametrize("gates", GATES, ids=str)
def test_only_arguments_are_saved(gates):
    def saved(b, length):
        arguments = structs(b, length, 4, gates)
        residuals = jax.eval_shape(lambda *arrays: jax.vjp(given(pk.fft_conv, gates), *arrays)[1], *arguments)
        leaves = jax.tree.leaves(residuals)
        assert not any(jnp.issubdtype(a.dtype, jnp.complexfloating) for a in leaves)
        return sum(a.size * a.dtype.itemsize for a in leaves)

    signals, kernel = (1 + len(gates)) * 4 * 512 * 4, 4 * 512 * 4
    assert saved(8, 512) <= 8 * signals + 2 * kernel
    assert saved(16, 512) - saved(8, 512) == 8 * signals
    assert saved(8, 1024) == 2 * saved(8, 512)


def temporaries(conv, *arguments):
    memory = jax.jit(conv).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("gates", [(), ("gate_in",)], ids=str)
def test_memory_grows_with_the_batch_and_the_length(gates):
    def needed(b, length):
        of_all = gradients(given(pk.fft_conv, gates), 2 + len(gates))
        return temporaries(of_all, *structs(b, length, 4, gates))

    signal = 4 * 512 * 4 * 4
    # Four transforms, of as many complex points as a signal has samples.
    assert signal < needed(4, 512) <= 8 * signal
    assert needed(8, 512) <= 2.1 * needed(4, 512)
    assert needed(4, 1024) <= 2.1 * needed(4, 512)


def test_many_channels_share_memory():
    some, many = (temporaries(pk.fft_conv, *structs(2, 1024, c)) for c in (64, 512))
    assert many <= 1.5 * some


# Transforms


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (-1, 1)], ids=str)
def test_vmap(conv, axes, random):
    shapes = [
        shape if axis is None else (*shape[: axis % (len(shape) + 1)], 2, *shape[axis % (len(shape) + 1) :])
        for shape, axis in (((2, 9, 3), axes[0]), ((9, 3), axes[1]))
    ]
    u, k = (normal(random, *shape) for shape in shapes)
    assert_close(jax.jit(jax.vmap(conv, axes))(u, k), jax.vmap(reference, axes)(u, k))
    got = jax.jit(jax.vmap(gradients(conv), axes))(u, k)
    assert_close(got, jax.vmap(gradients(reference), axes)(u, k))


def test_scan_over_layers_with_remat(conv, random):
    u, k = normal(random, 2, 9, 3), normal(random, 3, 9, 3)

    def network(conv):
        def layer(u, k):
            return jnp.tanh(conv(u, k) / 3), None

        return lambda u, k: jax.lax.scan(jax.checkpoint(layer), u, k)[0]

    got = jax.jit(gradients(network(conv)))(u, k)
    assert_close(got, gradients(network(reference))(u, k))


def test_eval_shape(conv):
    u, k = jax.ShapeDtypeStruct((2, 7, 3), jnp.bfloat16), jax.ShapeDtypeStruct((9, 3), jnp.float32)
    y = jax.eval_shape(conv, u, k)
    assert (y.shape, y.dtype) == ((2, 7, 3), jnp.bfloat16)


def test_float64_is_exact(random):
    with lowering.enable_x64():
        u, k = normal(random, 2, 45, 2, dtype=np.float64), normal(random, 45, 2, dtype=np.float64)
        y = pk.fft_conv(u, k)
        assert y.dtype == jnp.float64 and error(y, direct(u, k)) <= 1e-14


@pytest.mark.parametrize(
    "split", [(P("d"), P()), (P(None, None, "d"), P(None, "d"))], ids=["batch", "channels"]
)
def test_shard_map(conv, split, random):
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    u, k = normal(random, 4, 9, 8), normal(random, 9, 8)
    # The interpreter's own loops have no varying types.
    parts = jax.shard_map(conv, mesh=mesh, in_specs=split, out_specs=split[0], check_vma="xla" in repr(conv))
    assert_close(jax.jit(parts)(u, k), reference(u, k))
    assert_close(jax.jit(gradients(parts))(u, k), gradients(reference)(u, k))


TRANSFORMS = {"forward": lambda f: f, "grad": gradients, "vmap of grad": lambda f: jax.vmap(gradients(f))}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("length", [40, 70_000])
def test_the_platform_lowered_for_has_its_kernel(platform, transform, length):
    batch = (2,) * ("vmap" in transform)
    structs = [jax.ShapeDtypeStruct((*batch, *s), jnp.float32) for s in ((2, length, 2), (length, 2))]
    gpu_mesh = described(aot.TARGETS["sm_90"])
    with gpu_mesh if platform == "cuda" else contextlib.nullcontext():
        text = (
            jax.jit(TRANSFORMS[transform](pk.fft_conv))
            .trace(*structs)
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert {p for p, call in KERNELS.items() if call in text} == {platform} & set(KERNELS)


@pytest.mark.parametrize("length", [300, 4096])
def test_tensor_cores_do_not_add_up_the_largest_products(length):
    """They would cut off what other units round: on an H200, offset samples of length 300 came out too inexact."""
    u, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, length, 2), (length, 2)))
    with described(aot.TARGETS["sm_90"]):
        jaxpr = jax.jit(functools.partial(pk.fft_conv, implementation="pallas")).trace(u, k).jaxpr.jaxpr
    calls = list(pallas_calls(jaxpr, aot.TARGETS["sm_90"]))
    assert calls
    for call in calls:
        eqns = list(equations(call.params["jaxpr"]))
        products = {e.outvars[0] for e in eqns if e.primitive.name == "dot_general"}
        subtracted = [e for e in eqns if e.primitive.name == "sub" and e.invars[1] in products]
        # Of six products of parts, the three of the largest part of the matrix.
        assert 2 * len(subtracted) == len(products) > 0


@pytest.mark.parametrize("target", ["v5e", "sm_90"])
@pytest.mark.parametrize("length", [40, 700, 5000, 70_000])
def test_kernels_have_no_complex_numbers(target, length):
    """Interpreters take them, and Fourier transforms too; no accelerator does."""
    u, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, length, 2), (length, 2)))
    with described(aot.TARGETS[target]):
        jaxpr = jax.jit(gradients(pk.fft_conv)).trace(u, k).jaxpr.jaxpr
    calls = list(pallas_calls(jaxpr, aot.TARGETS[target]))
    assert calls
    for call in calls:
        for inner in equations(call.params["jaxpr"]):
            assert inner.primitive.name != "fft"
            assert not any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in inner.outvars)


@pytest.mark.slow
def test_programs_of_a_grid_do_not_race(random):
    u, k = normal(random, 3, 40, 2), normal(random, 40, 2)
    with testing.interpret("tpu", detect_races=True):
        y, vjp = jax.vjp(functools.partial(pk.fft_conv, implementation="pallas"), u, k)
        got = y, *vjp(y)
        jax.block_until_ready(got)
    expected, vjp = jax.vjp(reference, u, k)
    assert_close(got, (expected, *vjp(expected)))


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"u": (5, 3)}, ValueError, ["(B, L, C)", "(5, 3)"]),
        ({"k": (5, 4)}, ValueError, ["(K, 3)", "(5, 4)"]),
        ({"k": (2, 5, 3)}, ValueError, ["(K, 3)", "(2, 5, 3)"]),
        ({"mode": "bidirectional"}, ValueError, ["(2, K, 3)", "(5, 3)"]),
        ({"k": (3, 5, 3), "mode": "bidirectional"}, ValueError, ["(2, K, 3)", "(3, 5, 3)"]),
        ({"mode": "acausal"}, ValueError, ["'causal', 'bidirectional', 'circular'", "'acausal'"]),
        ({"first_backward_lag": 1}, ValueError, ["0 or -1", "1"]),
        ({"skip": (4,)}, ValueError, ["`skip`", "(3,)", "(4,)"]),
        ({"gate_in": (2, 6, 4)}, ValueError, ["`gate_in`", "(2, 6, 3)", "(2, 6, 4)"]),
        ({"gate_out": (2, 3)}, ValueError, ["`gate_out`", "(2, 6, 3)", "(2, 3)"]),
        ({"u": (2, 0, 3)}, ValueError, ["positive", "(2, 0, 3)"]),
        ({"u": (0, 6, 3)}, ValueError, ["positive", "(0, 6, 3)"]),
        ({"k": (0, 3)}, ValueError, ["positive", "(0, 3)"]),
        ({"spectrum_mask": [True] * 4}, ValueError, ["divide L = 6", "(4,)"]),
        ({"spectrum_mask": [1, 0]}, ValueError, ["booleans", "int64"]),
        ({"precision": "float128"}, ValueError, ["'highest', 'high' or 'default'", "'float128'"]),
        ({"u_dtype": "int32"}, TypeError, ["`u`", "floating-point", "int32"]),
        ({"k_dtype": "complex64"}, TypeError, ["`k`", "floating-point", "complex64"]),
        ({"implementation": "cufft"}, ValueError, ["None, 'xla' or 'pallas'", "'cufft'"]),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_when_traced(arguments, error, words):
    arguments = {"u": (2, 6, 3), "k": (5, 3), **arguments}
    dtypes = {name: arguments.pop(f"{name}_dtype", "float32") for name in ("u", "k")}
    shapes = {n: arguments.pop(n) for n in ("u", "k", "skip", "gate_in", "gate_out") if n in arguments}

    def call():
        arrays = {n: jnp.ones(s, dtypes.get(n, "float32")) for n, s in shapes.items()}
        return pk.fft_conv(**arrays, **arguments)

    with pytest.raises(error) as caught:
        jax.eval_shape(call)
    assert all(word in str(caught.value) for word in words), caught.value


def test_pallas_refuses_float64():
    with lowering.enable_x64(), pytest.raises(NotImplementedError, match="no float64 arithmetic"):
        jax.eval_shape(lambda: pk.fft_conv(jnp.ones((1, 4, 2)), jnp.ones((4, 2)), implementation="pallas"))
