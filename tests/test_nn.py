"""Layers against their formulas, written out in float64 numpy."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import nn


@pytest.fixture(autouse=True)
def no_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


def randomize(module, random):
    """Fresh values for every parameter and statistic; variances positive."""
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            value = variable[...]
            new = (
                random.uniform(0.5, 2.0, value.shape)
                if path[-1] == "var"
                else random.normal(size=value.shape)
            )
            variable[...] = jnp.asarray(new, value.dtype)


def f64(a):
    return np.asarray(a, np.float64)


def depthwise(x, w, dilation=(1, 1)):
    """ "SAME" at stride 1, one output at a time."""
    (_, height, width, _), (kh, kw, _) = x.shape, w.shape
    y = np.zeros(x.shape)
    for i in range(height):
        for j in range(width):
            for a in range(kh):
                for b in range(kw):
                    row, col = i + (a - kh // 2) * dilation[0], j + (b - kw // 2) * dilation[1]
                    if 0 <= row < height and 0 <= col < width:
                        y[:, i, j] += x[:, row, col] * w[a, b]
    return y


def batch_norm(x, norm):
    mean, var, scale, bias = (f64(a[...]) for a in (norm.mean, norm.var, norm.scale, norm.bias))
    return scale * (x - mean) / np.sqrt(var + 1e-5) + bias


@pytest.mark.parametrize(
    "shape, kernel_size, dilation", [((2, 9, 6, 3), (5, 3), (2, 1)), ((2, 7, 7, 4), 3, (1, 1))]
)
def test_depthwise_conv(random, shape, kernel_size, dilation):
    conv: Any = nn.DepthwiseConv(shape[-1], kernel_size, dilation=dilation, rngs=nnx.Rngs(0))
    randomize(conv, random)
    x = random.normal(size=shape)
    expected = depthwise(x, f64(conv.kernel[...]), dilation) + f64(conv.bias[...])
    np.testing.assert_allclose(conv(jnp.float32(x)), expected, atol=1e-5)


def test_depthwise_conv_in_one_dimension_without_bias(random):
    conv: Any = nn.DepthwiseConv(3, (5,), use_bias=False, rngs=nnx.Rngs(0))
    x = random.normal(size=(2, 11, 3))
    expected = depthwise(x[:, None], f64(conv.kernel[...])[None])[:, 0]
    assert conv.bias is None
    np.testing.assert_allclose(conv(jnp.float32(x)), expected, atol=1e-5)


def test_depthwise_conv_dtypes(random):
    x = jnp.float32(random.normal(size=(1, 5, 5, 3)))
    half = nn.DepthwiseConv(3, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half.kernel[...].dtype == jnp.float32
    assert half(x).dtype == jnp.bfloat16
    assert nn.DepthwiseConv(3, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == jnp.float32


def test_depthwise_conv_takes_the_integers_and_sequences_of_its_operator(random):
    one, three, pads = np.int64(1), np.int64(3), [[1, 1], [1, 1]]
    make: Any = nn.DepthwiseConv
    conv = make(4, three, one, padding=one, dilation=one, rngs=nnx.Rngs(0))
    same = make(4, [3, 3], [1, 1], padding=pads, dilation=[1, 1], rngs=nnx.Rngs(0))
    x = jnp.float32(random.normal(size=(2, 5, 6, 4)))
    for layer in conv, same:
        np.testing.assert_array_equal(nnx.jit(lambda layer: layer(x))(layer), conv(x))
    with pytest.raises(ValueError, match=r"or 1 \(before, after\) pairs, got \(2, 0\)"):
        make(4, (3,), padding=(2, 0), rngs=nnx.Rngs(0))(x[0])


def test_depthwise_conv_refuses_other_shapes():
    conv: Any = nn.DepthwiseConv(3, 3, rngs=nnx.Rngs(0))
    for shape in (1, 5, 5, 4), (5, 5, 3), (1, 5, 5, 5, 3):
        with pytest.raises(ValueError, match=r"expected \(N, H, W, 3\)"):
            conv(jnp.zeros(shape))
    with pytest.raises(ValueError, match="one or two dimensions"):
        nn.DepthwiseConv(3, (3, 3, 3), rngs=nnx.Rngs(0))


def test_initial_scale(random):
    """Unit inputs give outputs of unit variance: the fan-in is the window, not the channels."""
    kernel = nn.DepthwiseConv(512, 7, rngs=nnx.Rngs(0)).kernel[...]
    assert math.isclose(float(jnp.std(kernel)) * 7, 1, rel_tol=0.02)


@pytest.mark.parametrize("table", nn.BRANCHES)
def test_branch_tables_fit(table):
    for size, branches in nn.BRANCHES[table].items():
        assert len(set(branches)) == len(branches)
        assert all(k % 2 == 1 and (k - 1) * r + 1 <= size for k, r in branches)


@pytest.mark.parametrize("size, branches", [(7, "unireplknet"), (5, "overlock"), (9, ((3, 4), (5, 2)))])
def test_dilated_reparam_conv_is_the_sum_of_its_branches_and_merges(random, size, branches):
    conv: Any = nn.DilatedReparamConv(3, size, branches=branches, rngs=nnx.Rngs(0))
    randomize(conv, random)
    conv.eval()
    x = random.normal(size=(2, 8, 11, 3))

    expected = batch_norm(depthwise(x, f64(conv.lk_origin.kernel[...])), conv.origin_bn)
    for k, r in nn.BRANCHES[branches][size] if isinstance(branches, str) else branches:
        small, norm = getattr(conv, f"dil_conv_k{k}_{r}"), getattr(conv, f"dil_bn_k{k}_{r}")
        expected += batch_norm(depthwise(x, f64(small.kernel[...]), (r, r)), norm)

    merged = conv.merge()
    assert isinstance(merged, nn.DepthwiseConv) and merged.kernel[...].shape == (size, size, 3)
    np.testing.assert_allclose(conv(jnp.float32(x)), expected, atol=3e-5)
    np.testing.assert_allclose(merged(jnp.float32(x)), expected, atol=3e-5)

    norm: Any = nn.BatchNorm(3, rngs=nnx.Rngs(0))
    randomize(norm, random)
    np.testing.assert_allclose(conv.merge(norm)(jnp.float32(x)), batch_norm(expected, norm), atol=1e-4)


def test_dilated_reparam_conv_refuses():
    options: Any
    for options, message in (
        ({"kernel_size": 14}, r"expected one of \[5, 7, 9, 11, 13, 15, 17\]"),
        ({"kernel_size": 7, "branches": "replknet"}, "'overlock', 'unireplknet'"),
        ({"kernel_size": 7, "branches": ((5, 2),)}, "spans 9"),
        ({"kernel_size": 7, "branches": ((4, 1),)}, "spans 4"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.DilatedReparamConv(3, **options, rngs=nnx.Rngs(0))


def test_batch_norm_trains_and_infers(random):
    norm: Any = nn.BatchNorm(3, rngs=nnx.Rngs(0))
    randomize(norm, random)
    mean, var = f64(norm.mean[...]), f64(norm.var[...])
    x = random.normal(2, 3, size=(4, 5, 5, 3))
    batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale, bias = f64(norm.scale[...]), f64(norm.bias[...])

    y = norm(jnp.float32(x))
    np.testing.assert_allclose(y, scale * (x - batch_mean) / np.sqrt(batch_var + 1e-5) + bias, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.9 * mean + 0.1 * batch_mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 * var + 0.1 * batch_var, rtol=1e-5)

    norm.eval()
    np.testing.assert_allclose(norm(jnp.float32(x)), batch_norm(x, norm), atol=1e-5)


def test_batch_norm_does_not_round_its_statistics(random):
    norm: Any = nn.BatchNorm(1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.eval()
    norm.mean[...] = jnp.float32([3.01])
    y = norm(jnp.full((1, 2, 1), 3, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(y), -0.01, rtol=0.01)


def test_fold_batch_norm(random):
    norm: Any = nn.BatchNorm(4, rngs=nnx.Rngs(0))
    randomize(norm, random)
    x, kernel, bias = (random.normal(size=s) for s in ((6, 5), (5, 4), (4,)))
    folded, folded_bias = nn.fold_batch_norm(jnp.float32(kernel), jnp.float32(bias), norm)
    np.testing.assert_allclose(
        x @ f64(folded) + f64(folded_bias), batch_norm(x @ kernel + bias, norm), atol=1e-5
    )


@pytest.mark.parametrize("parts", [{"use_scale": False}, {"use_bias": False}])
def test_a_batch_norm_without_a_scale_or_bias_is_merged(parts, random):
    conv: Any = nn.DepthwiseConv(4, 3, rngs=nnx.Rngs(0))
    norm: Any = nnx.BatchNorm(4, **parts, rngs=nnx.Rngs(0))
    randomize(conv, random)
    randomize(norm, random)
    norm.eval()
    x = jnp.float32(random.normal(size=(2, 5, 6, 4)))
    np.testing.assert_allclose(conv.merge(norm)(x), norm(conv(x)), rtol=1e-4, atol=1e-4)


def grn(x, gamma, beta):
    y = np.empty_like(x)
    for n in range(len(x)):
        norms = [math.sqrt(sum(v * v for v in x[n, ..., c].ravel())) for c in range(x.shape[-1])]
        for c, norm in enumerate(norms):
            y[n, ..., c] = (gamma[c] * norm / (sum(norms) / len(norms) + 1e-6) + 1) * x[n, ..., c] + beta[c]
    return y


@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (3, 7, 4)])
def test_grn(random, shape):
    layer: Any = nn.GRN(shape[-1])
    np.testing.assert_array_equal(layer(jnp.ones(shape)), 1)
    randomize(layer, random)
    x = random.normal(size=shape)
    np.testing.assert_allclose(
        layer(jnp.float32(x)), grn(x, f64(layer.gamma[...]), f64(layer.beta[...])), atol=2e-5
    )


def test_grn_gradient_with_a_dead_channel(random):
    layer: Any = nn.GRN(4, use_bias=False)
    randomize(layer, random)
    gamma = f64(layer.gamma[...])
    x, weights = random.normal(size=(2, 1, 3, 3, 4))
    x[..., 2] = 0
    gradient = f64(jax.grad(lambda x: jnp.sum(layer(x) * weights))(jnp.float32(x)))

    # With N[2] = 0 that channel passes its own cotangent, and adds nothing to anyone else's.
    np.testing.assert_allclose(gradient[..., 2], weights[..., 2], rtol=1e-6)
    step = np.zeros_like(x)
    step[..., [0, 1, 3]] = random.normal(size=(1, 3, 3, 3))
    up, down = (np.sum(grn(x + s * step, gamma, np.zeros(4)) * weights) for s in (1e-6, -1e-6))
    np.testing.assert_allclose(np.sum(gradient * step), (up - down) / 2e-6, rtol=1e-4, atol=1e-4)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(layer(x)))(jnp.zeros((1, 3, 3, 4)))))


def test_grn_of_large_half_precision_numbers(random):
    layer: Any = nn.GRN(4, param_dtype=jnp.float16)
    randomize(layer, random)
    x = np.float16(random.normal(0, 100, size=(1, 16, 16, 4)))
    expected = grn(f64(x), f64(layer.gamma[...]), f64(layer.beta[...]))
    y = layer(jnp.asarray(x))
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(f64(y), expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (3, 7, 8)])
def test_squeeze_excite(random, shape):
    layer: Any = nn.SqueezeExcite(8, 2, rngs=nnx.Rngs(0))
    randomize(layer, random)
    x = random.normal(size=shape)
    down, down_bias, up, up_bias = (
        f64(a[...]) for a in (layer.down.kernel, layer.down.bias, layer.up.kernel, layer.up.bias)
    )
    for n in range(len(x)):
        hidden = np.maximum(x[n].reshape(-1, 8).mean(0) @ down + down_bias, 0)
        gate = 1 / (1 + np.exp(-(hidden @ up + up_bias)))
        np.testing.assert_allclose(layer(jnp.float32(x))[n], x[n] * gate, atol=1e-5)


def test_drop_path(random):
    layer = nn.DropPath(0.25, rngs=nnx.Rngs(0))
    x = jnp.float32(random.uniform(1, 2, size=(4000, 2, 3)))
    y = layer(x)
    kept = np.asarray(y[:, 0, 0] != 0)
    np.testing.assert_allclose(y, np.where(kept[:, None, None], x / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    assert not np.array_equal(kept, layer(x)[:, 0, 0] != 0)

    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    layer.train()
    assert np.any(layer(x) != x)


def test_drop_path_refuses():
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        nn.DropPath(1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rngs"):
        nn.DropPath(0.5)


def test_layer_scale(random):
    layer = nn.LayerScale(3, init=0.25)
    np.testing.assert_array_equal(layer(jnp.ones((2, 3))), 0.25)
    randomize(layer, random)
    x = random.normal(size=(2, 5, 3))
    np.testing.assert_allclose(layer(jnp.float32(x)), x * f64(layer.gamma[...]), rtol=1e-5)
    assert layer(jnp.bfloat16(x)).dtype == jnp.bfloat16
