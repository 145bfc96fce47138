"""Layers and networks of long convolutions: published formulas in float64, streaming, presets."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from pallas_kernels import lowering, models
from pallas_kernels.models.sequence import LanguageModel, SequenceClassifier
from pallas_kernels.nn import Hyena, LongConv, SGConv, streaming


def upsample(w, factor, nearest):
    """(d,) to (factor d,), one tap after the other."""
    t = (np.arange(factor * len(w)) + 0.5) / factor - 0.5
    return np.repeat(w, factor) if nearest else np.interp(t, np.arange(len(w)), w)


def published(weights, multiplier, decay, z, combine, nearest):
    """The kernel of one channel."""
    scales, d = weights.shape
    parts = [
        multiplier ** (scales - 1 - i)
        * upsample(w, 2 ** ((max(i - 1, 0) if combine == "cat" else i) + z), nearest)
        for i, w in enumerate(weights)
    ]
    taps = d * 2 ** (scales - 1 + z)
    padded = [np.pad(p, (0, taps - len(p))) for p in parts]
    kernel = np.concatenate(parts) if combine == "cat" else np.sum(padded, 0)
    assert len(kernel) == taps
    return kernel * np.arange(1.0, taps + 1) ** -decay


@pytest.mark.parametrize(
    ("combine", "interpolation", "z"), list(itertools.product(("cat", "sum"), ("linear", "nearest"), (0, 2)))
)
@pytest.mark.parametrize("decay", [False, True])
def test_the_kernel_is_the_published_one(combine, interpolation, z, decay, random):
    weights, multiplier = random.normal(size=(4, 2, 5, 3)), random.uniform(1, 3, 3)
    exponents = random.uniform(0, 2, 3) if decay else np.zeros(3)
    with lowering.enable_x64():
        kernel = pk.sgconv_kernel(
            jnp.asarray(weights), multiplier=jnp.asarray(multiplier), decay=jnp.asarray(exponents) if decay else None,
            init_scale=z, combine=combine, interpolation=interpolation,
        )  # fmt: skip
        assert kernel.dtype == jnp.float64 and kernel.shape == (2, 5 << (3 + z), 3)
        for way, c in itertools.product(range(2), range(3)):
            expected = published(
                weights[:, way, :, c], multiplier[c], exponents[c], z, combine, interpolation == "nearest"
            )
            np.testing.assert_allclose(kernel[way, :, c], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [3, 40, 41])
def test_the_kernel_is_cropped_or_filled_up(length, random):
    weights, norm = jnp.asarray(random.normal(size=(3, 10, 2))), jnp.asarray([[2.0, 3.0]])
    whole = np.asarray(pk.sgconv_kernel(weights))
    got = pk.sgconv_kernel(weights, norm=norm, length=length)
    expected = np.pad(whole, ((0, 1), (0, 0)))[:length] / norm
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": jnp.ones((3, 4))}, ValueError, "(3, 4)"),
        ({"weights": jnp.ones((3, 0, 4))}, ValueError, "(3, 0, 4)"),
        ({"weights": jnp.ones((3, 4, 4), int)}, TypeError, "int32"),
        ({"weights": jnp.ones((3, 4, 4)), "combine": "add"}, ValueError, "'add'"),
        ({"weights": jnp.ones((3, 4, 4)), "interpolation": "cubic"}, ValueError, "'cubic'"),
        ({"weights": jnp.ones((3, 4, 4)), "init_scale": -1}, ValueError, "got -1 and None"),
        ({"weights": jnp.ones((3, 4, 4)), "length": 0}, ValueError, "got 0 and 0"),
        ({"weights": jnp.ones((3, 4, 4)), "length": -3}, ValueError, "got 0 and -3"),
    ],
    ids=str,
)
def test_bad_weights_are_refused(arguments, error, words):
    with pytest.raises(error) as caught:
        pk.sgconv_kernel(**arguments)
    assert words in str(caught.value)


def test_sgconv_refuses_to_coarsen():
    with pytest.raises(ValueError, match="`init_scale` must be 0 or more"):
        SGConv(2, length=16, kernel_dim=4, init_scale=-1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{"decay": jnp.ones(2)}, {"norm": jnp.ones((1, 2))}], ids=str)
def test_the_kernel_has_the_dtype_of_the_weights(options):
    assert pk.sgconv_kernel(jnp.ones((3, 4, 2), jnp.bfloat16), **options).dtype == jnp.bfloat16


MIXERS = {
    "SGConv": functools.partial(SGConv, length=40, kernel_dim=4),
    "SGConv, both ways": functools.partial(SGConv, length=40, kernel_dim=4, bidirectional=True, channels=2),
    "SGConv, learnable": functools.partial(
        SGConv, length=40, power_decay="learnable", kernel_dim=4, glu=True
    ),
    "SGConv, cosines": functools.partial(SGConv, length=40, kernel_dim=4, init="cos", decay=(1.0, 3.0)),
    "LongConv": functools.partial(LongConv, length=40, squash=0.0001),
    "LongConv, smooth": functools.partial(LongConv, length=40, smooth="time", init="double_exp"),
    "LongConv, smooth spectrum": functools.partial(LongConv, length=40, smooth="frequency", squash=0.0),
    "Hyena": functools.partial(Hyena, length=40),
    "Hyena of order 3": functools.partial(Hyena, length=40, order=3, waves=2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("SGConv", "Hyena"))) for n in MIXERS]
)
def test_mixers(name, random):
    mixer = MIXERS[name](6, rngs=nnx.Rngs(0))
    x = jnp.asarray(random.normal(size=(2, 33, 6)), jnp.float32)
    y = mixer(x)
    assert y.shape == x.shape and y.dtype == x.dtype and np.isfinite(y).all()
    gradients = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2))(mixer, x)
    sizes = [float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)]
    assert all(np.isfinite(sizes)) and min(sizes) > 0
    later = jax.jacrev(lambda x: mixer(x)[0, 10].sum())(x)[0, 11:]
    causal = float(jnp.abs(later).max()) < 1e-5 * float(jnp.abs(y).max())
    assert causal == ("both ways" not in name)
    with pytest.raises(ValueError, match=r"\(2, 33, 5\)"):
        mixer(x[..., :5])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_sgconv_is_the_published_layer(bidirectional, channels, random):
    with lowering.enable_x64():
        layer = SGConv(
            3, length=16, kernel_dim=4, bidirectional=bidirectional, channels=channels, glu=True,
            param_dtype=jnp.float64, rngs=nnx.Rngs(0),
        )  # fmt: skip
        x = random.normal(size=(2, 13, 3))
        got = np.asarray(layer(jnp.asarray(x)))
        weights, skip = np.asarray(layer.weights[...]), np.asarray(layer.skip[...])
        kernel, bias = (np.asarray(p[...]) for p in (layer.out.kernel, layer.out.bias))
    y = np.tile(x, channels) * skip
    for c in range(3 * channels):
        for way in range(1 + bidirectional):
            k = published(weights[:, way, :, c], 2.0, 0.0, 0, "cat", False)
            k = k / np.linalg.norm(k)
            for t, s in itertools.product(range(13), range(13)):
                lag = t - s if way == 0 else s - t - 1
                if lag >= 0:
                    y[:, t, c] += k[lag] * x[:, s, c % 3]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
    a, b = np.split(y @ kernel + bias, 2, -1)
    np.testing.assert_allclose(got, a / (1 + np.exp(-b)), rtol=1e-10, atol=1e-12)


def test_parameters_of_sgconv_grow_with_the_logarithm():
    shapes = [
        nnx.eval_shape(lambda n=n: SGConv(2, length=n, kernel_dim=8, rngs=nnx.Rngs(0))).weights.shape
        for n in (8, 64, 1000)
    ]
    assert [s[0] for s in shapes] == [1, 4, 8]


def test_the_norm_is_computed_once():
    layer = SGConv(2, length=16, kernel_dim=4, rngs=nnx.Rngs(0))
    norms = jnp.linalg.norm(layer.kernel(16), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    layer.weights[...] = 2 * layer.weights[...]
    np.testing.assert_allclose(jnp.linalg.norm(layer.kernel(16), axis=1), 2, rtol=1e-5)
    assert not [p for p in jax.tree.leaves(nnx.state(layer, nnx.Param)) if p is layer.kernel_norm]


def test_long_conv_squashes(random):
    layer = LongConv(2, length=50, squash=0.002, rngs=nnx.Rngs(0))
    taps, k = np.asarray(layer.taps[...]), np.asarray(layer.kernel(50))
    np.testing.assert_allclose(k, np.sign(taps) * np.maximum(np.abs(taps) - 0.002, 0), atol=1e-8)
    assert 0.1 < np.mean(k == 0) < 0.9


def test_long_conv_smooths():
    layer = LongConv(2, length=50, squash=0.0, smooth="time", rngs=nnx.Rngs(0))
    taps, k = np.asarray(layer.taps[...])[0, :, 1], np.asarray(layer.kernel(50))[0, :, 1]
    np.testing.assert_allclose(k, np.convolve(taps, np.full(7, 1 / 7), "same"), atol=1e-7)


def test_long_conv_smooths_the_spectrum():
    layer = LongConv(2, length=50, squash=0.0, smooth="frequency", rngs=nnx.Rngs(0))
    taps, k = np.asarray(layer.taps[...])[0, :, 1], np.asarray(layer.kernel(50))[0, :, 1]
    weights = np.exp(-((np.arange(7) - 3) ** 2) / 2)
    np.testing.assert_allclose(
        k, np.fft.irfft(np.convolve(np.fft.rfft(taps), weights, "same"), 50), atol=1e-7
    )


def test_a_spectrum_is_smoothed_in_float64():
    with lowering.enable_x64():
        layer = LongConv(
            2, length=50, squash=0.0, smooth="frequency", param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        taps, k = np.asarray(layer.taps[...])[0, :, 1], np.asarray(layer.kernel(50))[0, :, 1]
    weights = np.exp(-((np.arange(7) - 3) ** 2) / 2)
    expected = np.fft.irfft(np.convolve(np.fft.rfft(taps), weights, "same"), 50)
    np.testing.assert_allclose(k, expected, rtol=1e-12, atol=1e-15)


def test_kernels_of_hyena_are_the_published_function_of_time(random):
    layer = Hyena(3, length=12, order=3, waves=2, filter_features=5, rngs=nnx.Rngs(0))
    layer.frequency[...] = jnp.asarray(random.uniform(1, 9, 5), jnp.float32)
    t = np.linspace(0, 1, 12)[:, None]
    waves = np.exp(-2j * np.pi * np.arange(12)[:, None] / 12 * np.linspace(1e-4, 1, 2))
    z = np.hstack([t, np.real(waves), np.imag(waves)])
    for linear in layer.layers:
        z = np.sin(np.asarray(layer.frequency[...]) * (z @ linear.kernel[...] + linear.bias[...]))
    rates = np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, 3)
    k = (z @ layer.last.kernel[...]).reshape(12, 2, 3) * (np.exp(-t * np.abs(rates)) + 0.05)[:, None]
    np.testing.assert_allclose(layer.kernels(12), k.swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.kernels(7), layer.kernels(12)[:, :7], rtol=1e-5, atol=1e-6)


def test_hyena_is_its_recurrence(random):
    layer = Hyena(3, length=12, order=3, rngs=nnx.Rngs(0))
    x = jnp.asarray(random.normal(size=(2, 12, 3)), jnp.float32)
    projected = np.asarray(layer.short(layer.into(x)), np.float64)
    x0, x1, x2, v = np.split(projected, 4, -1)
    for k, skip, gate in zip(
        np.asarray(layer.kernels(12)), np.asarray(layer.skip[...]), (x2, x1), strict=True
    ):
        z = gate * v
        v = z * skip + sum(k[j] * np.pad(z, ((0, 0), (j, 0), (0, 0)))[:, :12] for j in range(12))
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(v * x0, jnp.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 7, 20])
def test_streaming_equals_the_parallel_form(start, random):
    u, k, skip = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((2, 20, 3), (9, 3), (3,)))
    expected = pk.fft_conv(u, k, skip=skip)
    state, outputs = streaming.start(2, k), []
    if start:
        y, state = streaming.prefill(u[:, :start], k, skip=skip)
        outputs = [*y.swapaxes(0, 1)]
    step = jax.jit(streaming.step)
    for t in range(start, 20):
        y, state = step(state, u[:, t], k, skip=skip)
        outputs.append(y)
    np.testing.assert_allclose(jnp.stack(outputs, 1), expected, rtol=1e-5, atol=1e-5)


def test_streaming_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        streaming.step(jnp.zeros((1, 4, 3)), jnp.zeros((2, 3)), jnp.ones((4, 3)))


# Networks


def test_presets_have_the_published_sizes():
    assert len(models.list("sgconv_*")) == 6
    for name, blocks, features, taps, in_all in (
        ("sgconv_listops", 8, 128, 2048, 12), ("sgconv_text", 6, 256, 4096, 24), ("sgconv_retrieval", 6, 256, 4096, 13),
        ("sgconv_image", 6, 512, 1024, 192), ("sgconv_pathfinder", 6, 256, 1024, 192),
        ("sgconv_pathx", 6, 256, 16384, 512),
    ):  # fmt: skip
        model = nnx.eval_shape(lambda name=name: models.create(name, rngs=nnx.Rngs(0)))
        assert len(model.blocks) == blocks
        scales, ways, d, c = model.blocks[0].mixer.weights.shape
        z = model.blocks[0].mixer.init_scale
        assert (ways, c, scales * d, d << (scales - 1 + z)) == (2, features, in_all, taps)


def test_classifiers_read_tokens_or_numbers(random):
    mixer = functools.partial(SGConv, length=32, kernel_dim=4)
    for options, x in (
        ({"vocabulary": 5, "norm": "layer", "norm_first": False}, random.integers(5, size=(2, 32))),
        ({"in_features": 3, "pool": "last", "dropout": 0.5}, random.normal(size=(2, 32, 3))),
    ):
        model = SequenceClassifier(2, 8, mixer, num_classes=4, rngs=nnx.Rngs(0), **options)
        model.eval()
        assert model(jnp.asarray(x)).shape == (2, 4)
        with pytest.raises(ValueError, match="expected"):
            model(jnp.ones((2, 32, 7)))


@pytest.mark.parametrize(("option", "name"), [("norm", "rms"), ("pool", "max")])
def test_classifiers_refuse_unknown_options(option, name):
    options = {option: name}
    with pytest.raises(ValueError, match=f"got {option}='{name}', expected"):
        SequenceClassifier(
            1, 4, functools.partial(SGConv, length=8), num_classes=2, rngs=nnx.Rngs(0), **options
        )


def test_the_language_model_is_causal(random):
    model = LanguageModel(7, 2, 8, functools.partial(Hyena, length=24), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(random.integers(7, size=(2, 24)))
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % 7)
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 24, 7)
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 1e-3


@pytest.mark.parametrize("layer", [SGConv, LongConv, Hyena])
@pytest.mark.parametrize("length", [0, -3])
def test_sizes_must_be_positive(layer, length):
    with pytest.raises(ValueError, match=f"sizes must be positive, got length={length}"):
        layer(8, length=length, rngs=nnx.Rngs(0))
