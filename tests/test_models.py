"""The registry, and UniRepLKNet: its sizes, its definition in float64 numpy, its merged form."""

import functools
import math
import re
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels import models
from pallas_kernels.lowering import enable_x64
from pallas_kernels.models.unireplknet import UniRepLKNet, merge
from pallas_kernels.nn import BatchNorm, DilatedReparamConv

# Training form and deploy form, with 1000 classes.
COUNTS = {
    "a": (4_649_060, 4_437_300),
    "f": (6_489_328, 6_235_216),
    "p": (11_080_520, 10_741_704),
    "n": (18_818_880, 18_318_560),
    "t": (31_693_420, 31_037_980),
    "s": (56_456_704, 55_645_984),
    "b": (99_089_416, 98_008_456),
    "l": (220_076_056, 218_454_616),
    "xl": (388_690_984, 386_529_064),
}

# Drawing keys from nnx.Rngs under a trace is slow with flax 0.12.8 on jax 0.10: a minute for all variants.
KEYS: Any = types.SimpleNamespace(params=lambda: jax.random.key(0))


@pytest.fixture(autouse=True)
def no_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


def count(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def randomize(model, random):
    """Everything: the initial layer scale of 1e-6 and gamma of 0 would hide a broken block."""

    def fresh(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        noise = random.normal(size=leaf.shape)
        if "kernel" in names:
            taps = leaf.shape[:2] if "dwconv" in names else leaf.shape[:-1]
            noise /= math.sqrt(math.prod(taps))
        elif "var" in names:
            noise = random.uniform(0.5, 2, leaf.shape)
        elif "scale" in names:
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.5
        return jnp.asarray(noise, leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(fresh, nnx.state(model)))


def f64(variable):
    return np.asarray(variable[...], np.float64)


OPTIONS = {"depths": (1, 2), "dims": (8, 16), "kernel_sizes": (3, (7, 3)), "num_classes": 5}


def small(random, **overrides) -> Any:
    # Initial values would be compiled one by one, to be overwritten.
    model = nnx.eval_shape(functools.partial(UniRepLKNet, **(OPTIONS | overrides), rngs=KEYS))
    randomize(model, random)
    return model


@nnx.jit
def apply(model, x):
    return model(x)


@pytest.mark.sweep
@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    counts = tuple(
        count(
            nnx.eval_shape(
                functools.partial(models.create, f"unireplknet_{variant}", deploy=deploy, rngs=KEYS)
            )
        )
        for deploy in (False, True)
    )
    assert counts == COUNTS[variant]


def convolution(x, layer):
    """Stride 2, one pixel of zeros on every side."""
    kernel = f64(layer.kernel)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, cols = ((size - 3) // 2 + 1 for size in x.shape[1:3])
    y = np.stack(
        [
            np.stack(
                [np.tensordot(x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel, 3) for j in range(cols)], 1
            )
            for i in range(rows)
        ],
        1,
    )
    return y + f64(layer.bias)


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * f64(layer.scale) + f64(layer.bias)


def batch_norm(x, layer):
    return (x - f64(layer.mean)) / np.sqrt(f64(layer.var) + 1e-5) * f64(layer.scale) + f64(layer.bias)


def linear(x, layer):
    return x @ f64(layer.kernel) + (0 if layer.bias is None else f64(layer.bias))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def depthwise(x, kernel, dilation):
    pad = len(kernel) // 2 * dilation
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return sum(
        padded[:, i * dilation :, j * dilation :][:, : x.shape[1], : x.shape[2]] * kernel[i, j]
        for i, j in np.ndindex(kernel.shape[:2])
    )


def block(x, layers):
    conv = layers.dwconv
    if hasattr(conv, "lk_origin"):
        branches = [(conv.lk_origin, conv.origin_bn, 1)]
        for k, r in (5, 1), (3, 2), (3, 3):
            branches.append((getattr(conv, f"dil_conv_k{k}_{r}"), getattr(conv, f"dil_bn_k{k}_{r}"), r))
        y = sum(batch_norm(depthwise(x, f64(c.kernel), r), norm) for c, norm, r in branches)
    else:
        y = depthwise(x, f64(conv.kernel), 1)
    y = batch_norm(y, layers.norm)
    gate = linear(np.maximum(linear(y.mean((1, 2), keepdims=True), layers.se.down), 0), layers.se.up)
    y = gelu(linear(y / (1 + np.exp(-gate)), layers.pwconv1))
    energy = np.sqrt((y**2).sum((1, 2), keepdims=True))
    response = energy / (energy.mean(-1, keepdims=True) + 1e-6)
    y = (f64(layers.grn.gamma) * response + 1) * y + f64(layers.grn.beta)
    return x + batch_norm(linear(y, layers.pwconv2), layers.norm2) * f64(layers.layer_scale.gamma)


def network(x, model):
    features = []
    for i, (downsample, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        layers = downsample.layers
        x = layer_norm(convolution(x, layers[0]), layers[1])
        if i == 0:
            x = layer_norm(convolution(gelu(x), layers[3]), layers[4])
        for b in blocks:
            x = block(x, b)
        features.append(x)
    return linear(layer_norm(x.mean((1, 2)), model.norm), model.head), features


@pytest.mark.sweep
@pytest.mark.parametrize("size", [(32, 32), (27, 38)])
def test_definition(random, size):
    model = small(random)
    model.eval()
    x = random.normal(size=(2, *size, 3))
    logits, features = network(x, model)
    assert np.std(logits) > 0.3
    np.testing.assert_allclose(apply(model, jnp.float32(x)), logits, atol=1e-4)
    for got, expected in zip(nnx.jit(UniRepLKNet.features)(model, jnp.float32(x)), features, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("bits, tolerance", [(32, 2e-5), (64, 1e-12)])
def test_merge_changes_nothing(random, bits, tolerance):
    with enable_x64(bits == 64):
        dtype = jnp.dtype(f"float{bits}")
        model = small(random, dims=(8, 8), kernel_sizes=(13, (7, 3)), param_dtype=dtype)
        model.eval()
        x = jnp.asarray(random.normal(size=(2, 56, 56, 3)), dtype)
        before = nnx.state(model)
        logits, merged = apply(model, x), apply(merge(model), x)
        assert logits.dtype == merged.dtype == dtype
        assert np.std(logits) > 0.3 and np.max(np.abs(logits)) < 20
        np.testing.assert_allclose(merged, logits, rtol=0, atol=tolerance)
        jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_of_a_published_size_changes_nothing(random, dtype):
    """In bfloat16 but for rounding: it may be twice as far from the result in float32 as the network it is made of."""

    def unireplknet_a(param_dtype) -> Any:
        return nnx.eval_shape(
            functools.partial(models.create, "unireplknet_a", param_dtype=param_dtype, rngs=KEYS)
        )

    model, wide = unireplknet_a(dtype), unireplknet_a(jnp.float32)
    randomize(model, random)
    nnx.update(wide, jax.tree.map(jnp.float32, nnx.state(model)))
    x = jnp.asarray(random.normal(size=(1, 64, 64, 3)), dtype)
    for network in (model, wide):
        network.eval()
    logits, merged = apply(model, x), apply(merge(model), x)
    assert logits.dtype == merged.dtype == dtype
    logits, merged, exact = (np.asarray(y, np.float64) for y in (logits, merged, apply(wide, jnp.float32(x))))
    assert np.std(exact) > 0.3
    if dtype == jnp.float32:
        np.testing.assert_allclose(merged, logits, rtol=0, atol=2e-5 * np.max(np.abs(logits)))
    else:
        error, usual = (np.linalg.norm(y - exact) for y in (merged, logits))
        assert error <= 2 * usual <= 2 * jnp.finfo(dtype).eps * np.linalg.norm(exact)


def test_merge_of_bfloat16_rounds_once(random):
    model = small(random, param_dtype=jnp.bfloat16)
    merged = merge(model)
    with enable_x64():
        exact = small(random, param_dtype=jnp.float64)
        nnx.update(exact, jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), nnx.state(model)))
        expected = jax.tree.leaves(nnx.state(merge(exact)))
    for got, want in zip(jax.tree.leaves(nnx.state(merged)), expected, strict=True):
        assert got.dtype == jnp.bfloat16 and want.dtype == jnp.float64
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-6)


def test_merge_gives_the_deploy_form(random):
    model = small(random)
    merged = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(small(random, deploy=True))
    layers = [type(node) for _, node in nnx.iter_graph(merged)]
    assert BatchNorm not in layers and DilatedReparamConv not in layers
    assert model.stages[0][0].norm is not None
    with pytest.raises(ValueError, match="deploy form"):
        merge(merged)


def test_features(random):
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "kernel_sizes": (3, 3, 3, 3)}
    model, backbone = (small(random, **options, num_classes=n) for n in (5, None))
    model.downsample_layers, model.stages = nnx.data(backbone.downsample_layers), nnx.data(backbone.stages)
    for part in model, backbone:
        part.eval()
    x = jnp.float32(random.normal(size=(1, 64, 40, 3)))
    raw, normed = nnx.jit(UniRepLKNet.features)(model, x), apply(backbone, x)
    assert [y.shape for y in raw] == [(1, 16, 10, 8), (1, 8, 5, 8), (1, 4, 3, 16), (1, 2, 2, 16)]
    assert not hasattr(backbone, "head")
    for y, norm, got in zip(raw, backbone.norms, normed, strict=True):
        np.testing.assert_allclose(got, layer_norm(np.asarray(y, np.float64), norm), atol=1e-4)


@pytest.mark.sweep
def test_every_parameter_has_a_gradient(random):
    model = small(random)
    for blocks in model.stages:
        for b in blocks:
            # So that not all of the few hidden units are dead.
            b.se.down.bias[...] += 3
    x, weights = (jnp.float32(random.normal(size=s)) for s in ((2, 32, 32, 3), (2, 5)))
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(model(x) * weights)))(model)
    for path, g in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)


def test_training_lowers_the_loss(random):
    options = OPTIONS | {"depths": (1, 1), "drop_path": 0.2, "layer_scale": 0.1}
    model: Any = UniRepLKNet(**options, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    x, y = jnp.float32(random.normal(size=(8, 16, 16, 3))), jnp.arange(8) % 5
    var = f64(model.stages[1][0].norm.var)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert np.all(f64(model.stages[1][0].norm.var) != var)


def test_drop_path_grows_linearly():
    options = OPTIONS | {"depths": (2, 3), "drop_path": 0.4}
    model: Any = nnx.eval_shape(lambda: UniRepLKNet(**options, rngs=nnx.Rngs(0)))
    rates = [b.drop_path.rate for blocks in model.stages for b in blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])


def test_bfloat16_computation(random):
    model = small(random, dtype=jnp.bfloat16)
    model.eval()
    x = jnp.ones((1, 32, 32, 3))
    assert apply(model, x).dtype == apply(merge(model), x).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}


def test_bad_arguments(random):
    with pytest.raises(ValueError, match="same number of stages"):
        small(random, depths=(1, 1, 1))
    with pytest.raises(ValueError, match="kernel_size=19, expected one of"):
        small(random, kernel_sizes=(3, 19))
    for shape in (1, 32, 32, 4), (32, 32, 3):
        with pytest.raises(ValueError, match=r"expected \(N, H, W, 3\)"):
            small(random).features(jnp.zeros(shape))


@pytest.mark.parametrize(
    "kernel_sizes", [(3, 1), (4, 3), (3, (7, 8)), (3, 3.0), (3, ()), (3, "13"), (3, -3)], ids=str
)
@pytest.mark.parametrize("deploy", [False, True])
def test_bad_kernel_sizes(random, deploy, kernel_sizes):
    words = re.escape(f"got {kernel_sizes=}, expected odd ints, 3 or more")
    with pytest.raises(ValueError, match=words):
        small(random, deploy=deploy, kernel_sizes=kernel_sizes)


@pytest.mark.sweep
@pytest.mark.parametrize("name", models.list("unireplknet_*"))
def test_every_name_runs(name):
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 7, "in_channels": 2}
    for extra in {}, {"deploy": True}:
        logits = nnx.eval_shape(
            lambda extra=extra: models.create(name, **small, **extra, rngs=KEYS)(jnp.ones((3, 64, 64, 2)))
        )
        assert logits.shape == (3, 7)


def test_vit_takes_an_empty_batch():
    assert models.create("vit_tiny", rngs=KEYS)(jnp.ones((0, 32, 32, 3))).shape == (0, 1000)


def test_registry():
    assert models.list() == tuple(sorted(models.list()))
    assert {f"unireplknet_{variant}" for variant in COUNTS} <= set(models.list("unireplknet_*"))
    assert models.list("no such*") == ()
    with pytest.raises(ValueError, match=r"'unirepnet_a'.*unireplknet_a"):
        models.create("unirepnet_a", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"models\.list\(\)"):
        models.create("zzz", rngs=nnx.Rngs(0))
