"""Compression: factors against closed forms, budgets, whole networks, files."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.compress import compress, factorize, load, restore, save
from pallas_kernels.compress.factors import expanded, to_dense
from pallas_kernels.nn import BlastLinear, LowRankLinear, MonarchLinear
from pallas_kernels.progress import Progress

METHODS = ("blast", "low_rank", "monarch")
MAKE = {"blast": BlastLinear, "low_rank": LowRankLinear, "monarch": MonarchLinear}
each_method = pytest.mark.parametrize("method", METHODS)


class Network(nnx.Module):
    """Layers as an attribute and in a list, with a bias and without, and a dropout that has a state of its own."""

    def __init__(self, seed: int = 0, hidden: int = 48):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.data(
            [nnx.Linear(24, hidden, rngs=rngs), nnx.Linear(hidden, 24, use_bias=False, rngs=rngs)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(24, 36, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(self.dropout(x))


@pytest.fixture
def network():
    model = Network()
    model.eval()
    return model


def error(w, method, rank, blocks=4, **options):
    factors = factorize(w, method, rank=rank, blocks=blocks, **options)
    return np.linalg.norm(w - to_dense(factors)) / np.linalg.norm(w)


# Layers


@each_method
def test_a_new_layer_keeps_the_variance_and_knows_its_matrix(method, random):
    layer = MAKE[method](256, 192, rank=16, rngs=nnx.Rngs(1))
    x = jnp.asarray(random.normal(size=(512, 256)), jnp.float32)
    y = layer(x)
    assert 0.8 < float(jnp.var(y)) < 1.25
    np.testing.assert_allclose(y, x @ layer.to_dense(), rtol=1e-3, atol=1e-4)
    half = MAKE[method](256, 192, rank=16, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(1))
    assert half(x).dtype == jnp.bfloat16 and half.bias is None


@each_method
def test_a_layer_learns(method, random):
    x, target = (jnp.asarray(random.normal(size=(64, n)), jnp.float32) for n in (16, 8))
    layer = MAKE[method](16, 8, rank=2, rngs=nnx.Rngs(2))

    def loss(layer):
        return jnp.mean((layer(x) - target) ** 2)

    before, gradients = nnx.value_and_grad(loss)(layer)
    nnx.update(layer, jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(layer, nnx.Param), gradients))
    assert loss(layer) < before


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("monarch", {"rank": 0}, "rank=0, expected 1 to 4"),
        ("monarch", {"rank": 5}, "rank=5, expected 1 to 4"),
        ("monarch", {"rank": 1, "blocks": 3}, "multiples of blocks=3"),
        ("blast", {"rank": 17}, "rank=17, expected 1 to 16"),
        ("low_rank", {"rank": 17}, "rank=17, expected 1 to 16"),
    ],
)
def test_layers_refuse_what_does_not_factor(method, options, words):
    with pytest.raises(ValueError, match=words):
        MAKE[method](16, 32, rngs=nnx.Rngs(0), **options)


def test_a_layer_refuses_other_features():
    with pytest.raises(ValueError, match=r"\(2, 15\), expected \(..., 16\)"):
        LowRankLinear(16, 8, rank=2, rngs=nnx.Rngs(0))(jnp.ones((2, 15)))


@each_method
def test_a_layer_takes_an_empty_batch(method):
    assert MAKE[method](16, 8, rank=2, rngs=nnx.Rngs(0))(jnp.ones((0, 16))).shape == (0, 8)


# Factors


def test_the_error_is_what_singular_values_leave_out(random):
    w = random.normal(size=(24, 36))
    blocks = w.reshape(4, 6, 4, 9).swapaxes(1, 2)
    for method, stack, full in (("low_rank", w, 24), ("monarch", blocks, 6)):
        values = np.linalg.svd(stack, compute_uv=False)
        errors = []
        for rank in range(1, full + 1):
            errors.append(error(w, method, rank))
            expected = np.sqrt(np.sum(values[..., rank:] ** 2)) / np.linalg.norm(w)
            assert abs(errors[-1] - expected) < 1e-12
        assert np.all(np.diff(errors) <= 1e-12) and errors[-1] < 1e-12


@pytest.mark.parametrize("method", ["low_rank", "monarch"])
def test_projections_are_idempotent_and_no_neighbour_is_nearer(method, random):
    w = random.normal(size=(16, 24))
    factors = factorize(w, method, rank=2, blocks=4)
    projected = to_dense(factors)
    assert error(projected, method, 2) < 1e-12
    best = np.linalg.norm(w - projected)
    for _ in range(50):
        moved = {k: f + 1e-3 * random.normal(size=f.shape) for k, f in factors.items()}
        assert np.linalg.norm(w - to_dense(moved)) > best


def test_a_blast_matrix_of_a_third_of_the_rank_is_found_from_anywhere(random):
    u, s, v = (random.normal(size=shape) for shape in ((4, 4, 16), (4, 4, 4), (4, 4, 12)))
    w = expanded(u, s, v).transpose(1, 3, 0, 2).reshape(48, 64)
    for seed in range(3):
        assert error(w, "blast", 12, steps=300, seed=seed) < 1e-10


@pytest.mark.slow
def test_a_blast_matrix_of_its_own_rank_is_found_from_one_of_six_starts_and_always_the_same(random):
    u, s, v = (random.normal(size=shape) for shape in ((4, 4, 16), (4, 4, 4), (4, 4, 16)))
    w = expanded(u, s, v).transpose(1, 3, 0, 2).reshape(64, 64)
    errors = [error(w, "blast", 4, steps=300, seed=seed) for seed in range(6)]
    assert min(errors) <= 1e-6
    assert errors[0] == error(w, "blast", 4, steps=300, seed=0) != errors[1]


@pytest.mark.parametrize("kind", ["gaussian", "low rank and noise", "monarch"])
def test_blast_is_no_worse_than_low_rank_and_monarch_of_its_size(kind, random):
    w = random.normal(size=(32, 48))
    if kind == "low rank and noise":
        w = random.normal(size=(32, 4)) @ random.normal(size=(4, 48)) + 0.1 * w
    if kind == "monarch":
        w = to_dense(factorize(w, "monarch", rank=2, blocks=4))
    others = error(w, "low_rank", 8), error(w, "monarch", 2)
    errors = [error(w, "blast", 8, steps=steps) for steps in (0, 1, 5, 20)]
    assert errors[0] <= min(others) + 1e-12
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    if kind != "monarch":
        assert errors[-1] < 0.95 * min(others)


def test_blast_uses_the_ranks_that_its_start_leaves_over(random):
    w = to_dense(factorize(random.normal(size=(32, 48)), "monarch", rank=2, blocks=4))
    w = w + random.normal(size=(32, 1)) @ random.normal(size=(1, 48)) / 50
    assert error(w, "blast", 11, steps=0) < 0.9 * error(w, "blast", 8, steps=0)
    assert error(w, "blast", 11, steps=0) <= min(error(w, "low_rank", 11), error(w, "monarch", 2)) + 1e-12


def test_blast_scales_with_its_matrix(random):
    w = random.normal(size=(16, 24))
    one, four = (to_dense(factorize(c * w, "blast", rank=6, blocks=4)) for c in (1, 4))
    np.testing.assert_allclose(four, 4 * one, rtol=1e-9)


def test_a_step_of_the_descent_is_told(random):
    w, told = random.normal(size=(16, 24)), []
    factors = factorize(w, "blast", rank=6, blocks=4, steps=7, on_step=lambda: told.append(1))
    assert len(told) == 7
    silent = factorize(w, "blast", rank=6, blocks=4, steps=7)
    jax.tree.map(np.testing.assert_array_equal, factors, silent)


# Networks


@pytest.mark.sweep
@each_method
def test_half_the_parameters(method, network, random):
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    before = np.asarray(network(x))
    small, report = compress(network, method, ratio=0.5)
    assert [layer.path for layer in report.layers] == ["blocks.0", "blocks.1", "head"]
    assert all(layer.parameters <= 0.5 * layer.dense_parameters for layer in report.layers)
    assert type(small.blocks[1]) is MAKE[method]
    kept = sum(p.size for m in (*small.blocks, small.head) for p in m._factors())
    assert report.parameters == kept and report.dense_parameters == 24 * 48 * 2 + 24 * 36
    for layer in report.layers:
        parent = small.head if layer.path == "head" else small.blocks[int(layer.path[-1])]
        old = network.head if layer.path == "head" else network.blocks[int(layer.path[-1])]
        true = np.linalg.norm(old.kernel[...] - parent.to_dense()) / np.linalg.norm(old.kernel[...])
        assert abs(layer.relative_error - true) < 1e-5
    assert 0 < report.relative_error < 1
    assert all(word in str(report) for word in ("blocks.1", "head", method, f"{report.relative_error:.4f}"))
    np.testing.assert_array_equal(network(x), before)
    np.testing.assert_allclose(restore(small)(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "rank"), [("low_rank", 24), ("monarch", 6)])
def test_full_rank_changes_nothing(method, rank, network, random):
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    small, report = compress(network, method, rank=rank)
    np.testing.assert_allclose(small(x), network(x), rtol=1e-4, atol=1e-5)
    assert report.relative_error < 1e-6


@each_method
def test_an_error_budget_is_kept_and_not_by_much(method, network):
    report = compress(network, method, error=0.5)[1]
    assert all(layer.relative_error <= 0.5 for layer in report.layers)
    if method != "blast":
        fewer = [layer.rank - 1 for layer in report.layers]
        for layer, rank in zip(report.layers, fewer, strict=True):
            assert compress(network, method, rank=rank, pattern=layer.path)[1].relative_error > 0.5
        return
    # BLAST's descent starts within the error, at the least rank at which one of its starts is.
    low_rank, monarch = (compress(network, m, error=0.5)[1].layers for m in ("low_rank", "monarch"))
    for layer, a, b in zip(report.layers, low_rank, monarch, strict=True):
        assert layer.rank == min(a.rank, 4 * b.rank)
        start = compress(network, "blast", rank=layer.rank, pattern=layer.path, steps=0)[1]
        assert layer.relative_error < start.relative_error <= 0.5


@each_method
def test_a_layer_stays_dense_where_factors_within_the_error_would_be_no_smaller(method, network, random):
    x, kernel = jnp.asarray(random.normal(size=(5, 24)), jnp.float32), network.head.kernel
    kernel[...] = jnp.outer(kernel[...][:, 0], kernel[...][0])
    small, report = compress(network, method, error=0.3)
    assert [layer.method for layer in report.layers] == ["dense", "dense", method]
    dense, _, head = report.layers
    assert (dense.rank, dense.blocks, dense.relative_error) == (24, 1, 0)
    assert dense.parameters == dense.dense_parameters == 24 * 48
    assert dense.bytes == dense.dense_bytes == 4 * 24 * 48
    assert head.rank <= 4 and head.parameters < head.dense_parameters and report.relative_error < 1e-6
    assert type(small.blocks[0]) is nnx.Linear and type(small.head) is MAKE[method]
    np.testing.assert_allclose(small(x), network(x), rtol=1e-4, atol=1e-5)
    # Low rank takes exactly as many parameters as the matrices of the blocks here.
    rank = compress(network, "low_rank", rank=16, pattern="blocks.*")[1]
    assert rank.parameters == rank.dense_parameters and rank.relative_error < 0.3


def test_more_steps_of_blast_give_no_larger_error(network):
    errors = [
        compress(network, "blast", ratio=0.5, pattern="head", steps=steps)[1].relative_error
        for steps in (0, 1, 5, 60)
    ]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] == compress(network, "blast", ratio=0.5, pattern="head")[1].relative_error


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"method": "blast", "ratio": 0.5, "steps": 5}, 6),
        ({"method": "blast", "error": 0.0, "steps": 5}, 1),
        ({"method": "low_rank", "ratio": 0.5}, 1),
    ],
)
def test_progress_advances_at_each_step(options, each, network, monkeypatch):
    bars = []

    class Recorded(Progress):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.seen = []
            bars.append(self)

        def advance(self, message=""):
            super().advance(message)
            self.seen.append((self.done, message))

    monkeypatch.setattr("pallas_kernels.compress.network.Progress", Recorded)
    compress(network, **options)
    (bar,) = bars
    done, messages = zip(*bar.seen, strict=True)
    assert messages == tuple(path for path in ("blocks.0", "blocks.1", "head") for _ in range(each))
    assert list(done) == sorted({*done}) and done[-1] == bar.total


def test_a_pattern_chooses_layers(network):
    small, report = compress(network, "monarch", ratio=0.5, pattern=["blocks.*", "blocks.1"])
    assert len(report.layers) == 2 and type(small.head) is nnx.Linear


@each_method
def test_calibration_helps_where_inputs_differ(method, network, random):
    batches = [
        jnp.asarray(random.normal(size=(64, 24)) * np.geomspace(0.01, 10, 24), jnp.float32) for _ in range(3)
    ]
    x, w = np.concatenate(batches), np.asarray(network.blocks[0].kernel[...])

    def output_error(**options):
        small, _ = compress(network, method, ratio=0.5, pattern="blocks.0", **options)
        return np.linalg.norm(x @ (w - np.asarray(small.blocks[0].to_dense())))

    assert output_error(calibration=batches) < 0.8 * output_error()


def test_a_batch_that_is_a_tuple_is_the_positional_arguments(random):
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

        def __call__(self, x, scale=1.0):
            return self.linear(scale * x)

    x = jnp.asarray(random.normal(size=(64, 16)), jnp.float32)
    scale = jnp.asarray(np.geomspace(0.01, 10, 16), jnp.float32)
    both, product, alone, bare = (
        compress(Model(), "low_rank", rank=2, calibration=[batch])[1].layers[0].squared_norm
        for batch in ((x, scale), scale * x, (x,), x)
    )
    assert both == pytest.approx(product, rel=1e-5) and alone == bare != pytest.approx(both, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.5, "rank": 2}, "ratio=0.5, rank=2, error=None, expected one"),
        ({}, "expected one of them"),
        ({"method": "svd", "ratio": 0.5}, "'svd', expected one of monarch, blast, low_rank"),
        ({"ratio": 0.0}, r"blocks.0: got ratio=0.0"),
        ({"ratio": 0.01}, r"blocks.0: ratio=0.01 leaves 12 parameters, and rank 1 takes 288"),
        ({"rank": 0}, "rank=0, expected 1 to 6"),
        ({"rank": 7}, "rank=7, expected 1 to 6"),
        ({"error": 1.5}, "error=1.5"),
        ({"ratio": 0.5, "blocks": 5}, "blocks.0: 24 to 48 features don't divide into 5 blocks"),
        (
            {"ratio": 0.5, "pattern": "encoder.*"},
            r"no nnx.Linear or nnx.LinearGeneral matches 'encoder.\*'; there are blocks.0",
        ),
        (
            {"ratio": 0.5, "pattern": ["blocks.*", "nothing", "encoder.*"]},
            r"LinearGeneral matches 'nothing', 'encoder.\*'; there are blocks.0",
        ),
        ({"ratio": 0.5, "pattern": []}, r"matches \[\]; there are blocks.0"),
        ({"ratio": 0.5, "calibration": []}, "no activations"),
        ({"ratio": 0.5, "calibration": [np.full((1, 24), np.nan)]}, "^blocks.0: got activations with NaN"),
        ({"ratio": 0.5, "steps": -1}, "steps=-1, expected 0 or more"),
        ({"ratio": 1.5}, r"blocks.0: got ratio=1.5, expected more than 0, and at most 1"),
    ],
)
def test_bad_budgets_are_refused_and_the_network_is_left_alone(options, words, network):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    with pytest.raises(ValueError, match=words):
        compress(network, **options)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    assert type(network.head) is nnx.Linear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2.5}, "^blocks.0: got rank=2.5, expected an integer"),
        ({"rank": True}, "got rank=True, expected an integer"),
        ({"ratio": "0.5"}, "^blocks.0: got ratio='0.5', expected a number"),
        ({"ratio": True}, "got ratio=True, expected a number"),
        ({"error": 0.5j}, "^got error=0.5j, expected a number"),
        ({"rank": 2, "blocks": 4.0}, "got blocks=4.0, expected an integer"),
        ({"rank": 2, "steps": 1.5}, "^got steps=1.5, expected an integer"),
    ],
)
def test_budgets_that_are_no_numbers_are_refused(options, words, network):
    with pytest.raises(TypeError, match=words):
        compress(network, **options)


@pytest.mark.parametrize(
    "options", [{"rank": np.int64(2)}, {"ratio": np.float32(0.5)}, {"error": np.float64(0.5)}]
)
def test_numpy_numbers_are_numbers(options, network):
    assert compress(network, "low_rank", pattern="head", **options)[1].ratio < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 1j])
def test_matrices_of_other_numbers_are_refused(value, network):
    error, words = {
        True: (TypeError, "got a matrix of complex64, expected real"),
        False: (ValueError, "got a matrix with NaN or infinity, expected finite"),
    }[np.iscomplexobj(value)]
    network.head.kernel = nnx.Param(network.head.kernel[...].at[3, 4].set(0) + value)
    with pytest.raises(error, match=f"^{words}"):
        factorize(network.head.kernel[...], "low_rank", rank=1)
    with pytest.raises(error, match=f"^head: {words}"):
        compress(network, "low_rank", rank=1)


@pytest.mark.parametrize(
    "options", [{"rank": 2.5}, {"rank": True}, {"rank": None}, {"rank": 2, "blocks": 4.0}, {"steps": "5"}]
)
def test_factors_take_integers(options):
    with pytest.raises(TypeError, match="expected an integer"):
        factorize(np.ones((16, 24)), "blast", **{"rank": 2, "blocks": 4, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "monarch", "rank": 0, "blocks": 4}, "rank=0, expected 1 to 4"),
        ({"method": "blast", "rank": 17, "blocks": 4}, "rank=17, expected 1 to 16"),
        ({"method": "monarch", "rank": 1, "blocks": 5}, "16 to 24 features don't divide into 5 blocks"),
        ({"method": "svd", "rank": 1}, "'svd', expected one of"),
        ({"method": "blast", "rank": 1, "steps": -1}, "steps=-1, expected 0 or more"),
    ],
)
def test_what_does_not_factor_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        factorize(np.ones((16, 24)), **options)


class Holder(nnx.Module):
    """Layers in all sorts of places, one of them twice, one in attention, and one that only looks like a layer."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.named = nnx.data({"a": nnx.Linear(16, 16, rngs=rngs)})
        self.nested = nnx.data([{"b": [nnx.Linear(16, 16, rngs=rngs)]}])
        self.sequential = nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.relu)
        self.again = self.sequential.layers[0]
        self.lora = nnx.LoRALinear(16, 16, lora_rank=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.nested[0]["b"][0](self.named["a"](x))
        return self.attention(self.lora(self.again(self.sequential(x))))


@pytest.mark.parametrize(
    ("method", "name"), [("blast", "network"), ("low_rank", "network.safetensors"), ("monarch", "network")]
)
def test_layers_are_found_wherever_they_are(method, name, random, tmp_path):
    path = tmp_path / name
    model, x = Holder(), jnp.asarray(random.normal(size=(3, 5, 16)), jnp.float32)
    before = np.asarray(model(x))
    small, report = compress(model, method, ratio=0.75, blocks=2)
    attention = [f"attention.{part}" for part in ("key", "out", "query", "value")]
    assert {layer.path for layer in report.layers} >= {"named.a", "nested.0.b.0", *attention}
    assert len(report.layers) == 7
    assert small.again is small.sequential.layers[0] and type(small.again) is MAKE[method]
    assert small.attention.query.kernel.shape == (0, 4, 4)
    assert nnx.state(small, nnx.Param)["attention"]["query"]["dot_general"]
    dense = restore(small)
    assert type(dense.attention.query) is nnx.LinearGeneral and dense.attention.query.kernel.shape == (
        16,
        4,
        4,
    )
    np.testing.assert_allclose(dense(x), small(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(x), before)
    assert not np.allclose(small(x), before)
    save(small, path)
    np.testing.assert_array_equal(load(Holder(seed=1), path)(x), small(x))


class Part(nnx.Pytree):
    """Holds a layer, and is no module."""

    def __init__(self):
        self.linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))


def test_layers_of_what_is_no_module_are_replaced_and_calibrated(random):
    class Model(nnx.Module):
        def __init__(self):
            self.part = Part()

        def __call__(self, x):
            return self.part.linear(x)

    x = jnp.asarray(random.normal(size=(64, 16)) * np.geomspace(0.01, 10, 16), jnp.float32)
    small, report = compress(Model(), "low_rank", rank=2)
    assert type(small.part.linear) is LowRankLinear
    calibrated = compress(Model(), "low_rank", rank=2, calibration=[x])[1]
    assert calibrated.relative_error < 0.9 * report.relative_error


class Frozen(nnx.Param):
    """A parameter that isn't to be trained."""


@pytest.mark.parametrize(("method", "rank"), [("blast", 16), ("low_rank", 16), ("monarch", 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "highest"},
        {"promote_dtype": lambda arrays, dtype: tuple(a.astype(jnp.bfloat16) for a in arrays)},
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
    ],
)
def test_what_a_layer_was_made_with_stays(options, method, rank, random, tmp_path):
    if "preferred_element_type" in options and not hasattr(linear_of({}), "preferred_element_type"):
        pytest.skip("nnx.Linear of this Flax has no preferred_element_type")
    model, x = linear_of(options), jnp.asarray(random.normal(size=(5, 16)), jnp.float32)
    small, _ = compress(nnx.Sequential(model), method, rank=rank)
    layer, restored = small.layers[0], restore(small).layers[0]
    assert type(layer) is (nnx.Linear if options else MAKE[method])
    for other in (layer, restored):
        assert other(x).dtype == model(x).dtype
        np.testing.assert_allclose(other(x), model(x), rtol=2e-2, atol=2e-2)
        kinds = {path: type(v) for path, v in nnx.to_flat_state(nnx.state(other, nnx.Variable))}
        assert set(kinds.values()) == {Frozen}
        assert all(v.get_metadata()["tag"] == "x" for _, v in nnx.to_flat_state(nnx.state(other)))
    assert type(restored) is nnx.Linear
    assert all(getattr(restored, name) == value for name, value in options.items())
    save(small, tmp_path / "network.safetensors")
    again = load(nnx.Sequential(linear_of(options)), tmp_path / "network.safetensors")
    np.testing.assert_array_equal(again(x), small(x))


def linear_of(options):
    linear = nnx.Linear(16, 16, **options, rngs=nnx.Rngs(0))
    linear.kernel, linear.bias = (Frozen(v[...], tag="x") for v in (linear.kernel, linear.bias))
    return linear


def test_factors_of_a_sharded_kernel_have_no_sharding():
    with jax.set_mesh(jax.make_mesh((1,), ("features",))):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "features"))
        model = nnx.Sequential(nnx.Linear(16, 16, kernel_init=init, rngs=nnx.Rngs(0)))
        small, _ = compress(model, "monarch", rank=1)
    assert not {"sharding_names", "out_sharding"} & set(small.layers[0].w1.get_metadata())


def test_two_layers_at_one_path_are_refused():
    model, linears = nnx.Module(), [nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(2)]
    model.layers = nnx.data({"a.b": linears[0], "a": {"b": linears[1]}})
    with pytest.raises(ValueError, match=r"two parts at layers.a.b, expected a path of its own for each"):
        compress(model, "low_rank", rank=1)


class Tied(nnx.Module):
    """Three layers with one kernel; the factors of the last are no layer of pallas_kernels.nn."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.a, self.b = (nnx.Linear(16, 16, rngs=rngs) for _ in range(2))
        self.c = nnx.Linear(16, 16, precision="highest", rngs=rngs)
        self.b.kernel = self.c.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


@each_method
def test_layers_that_share_a_kernel_share_its_factors(method, path, random):
    model, x = Tied(), jnp.asarray(random.normal(size=(5, 16)), jnp.float32)
    small, report = compress(model, method, ratio=0.75)
    assert [layer.path for layer in report.layers] == ["a"] and report.dense_parameters == 256
    dense = restore(small)
    assert dense.a.kernel is dense.b.kernel is dense.c.kernel
    np.testing.assert_allclose(dense(x), small(x), rtol=1e-4, atol=1e-5)
    save(small, path)
    again = load(Tied(seed=1), path)
    np.testing.assert_array_equal(again(x), small(x))
    for shared in (small, again):
        for name in MAKE[method].FACTORS:
            factor = getattr(shared.a, name)
            assert factor is getattr(shared.b, name) is getattr(shared.c.dot_general, name)
    kept = compress(model, method, error=0.0)[0]
    assert kept.a.kernel is kept.b.kernel is kept.c.kernel


def test_a_shared_kernel_is_weighted_by_the_activations_of_all_its_layers(random):
    model, x = Tied(), jnp.asarray(random.normal(size=(64, 16)) * np.geomspace(0.01, 10, 16), jnp.float32)
    inputs = [x, nnx.relu(model.a(x))]
    inputs = np.stack([*inputs, nnx.relu(model.b(inputs[1]))])
    report = compress(model, "low_rank", rank=2, calibration=[x])[1]
    weighted = np.sqrt(np.mean(inputs**2, (0, 1)))[:, None] * model.a.kernel[...]
    assert report.layers[0].squared_norm == pytest.approx(np.linalg.norm(weighted) ** 2, rel=1e-4)


def test_a_kernel_that_would_come_apart_is_refused():
    with pytest.raises(ValueError, match=r"^b: got a kernel that a shares, expected both to be layers"):
        compress(Tied(), "low_rank", rank=2, pattern=["b", "c"])
    model = nnx.Module()
    model.linear = nnx.LinearGeneral(4, (4, 16), rngs=nnx.Rngs(0))
    model.other = nnx.LinearGeneral((4, 4), 16, axis=(-2, -1), rngs=nnx.Rngs(0))
    model.other.kernel = model.linear.kernel
    with pytest.raises(ValueError, match=r"^linear: got a kernel that other shares, .* of the same features"):
        compress(model, "low_rank", rank=2)


def test_full_ranks_of_attention_change_nothing(random):
    model, x = Holder(), jnp.asarray(random.normal(size=(3, 5, 16)), jnp.float32)
    small, _ = compress(model, "monarch", rank=8, blocks=2, calibration=[x])
    np.testing.assert_allclose(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_stacks_and_tuples_of_layers_are_refused():
    @nnx.vmap
    def stack(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    rngs = nnx.Rngs(0)
    with nnx.split_rngs(rngs, splits=3):
        stacked = nnx.Sequential(stack(rngs))
    with pytest.raises(ValueError, match=r"layers.0: got a kernel of shape \(3, 16, 16\)"):
        compress(stacked, "low_rank", ratio=0.5)
    network = Network()
    network.blocks = nnx.data(tuple(network.blocks))
    with pytest.raises(ValueError, match=r"blocks.0: got a layer in a tuple or the like, expected a list"):
        compress(network, "low_rank", ratio=0.5)


def test_the_error_is_that_of_the_factors_as_they_are_stored(random):
    model = nnx.Sequential(nnx.Linear(16, 24, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    small, report = compress(model, "low_rank", rank=16)
    w, factors = (np.asarray(a, np.float64) for a in (model.layers[0].kernel[...], small.layers[0].u[...]))
    near = np.asarray(small.layers[0].v[...], np.float64).T @ factors
    assert report.relative_error == pytest.approx(np.linalg.norm(w - near) / np.linalg.norm(w), rel=1e-6)
    assert report.relative_error > 1e-4


def test_calibration_leaves_dropout_out(random):
    model = nnx.Sequential(nnx.Dropout(0.9, rngs=nnx.Rngs(0)), nnx.Linear(16, 24, rngs=nnx.Rngs(0)))
    x = jnp.asarray(random.normal(size=(32, 16)), jnp.float32)
    training = compress(model, "low_rank", rank=3, calibration=[x])[1]
    model.eval()
    assert training == compress(model, "low_rank", rank=3, calibration=[x])[1]


def test_a_network_that_was_not_compressed_is_not_restored(network):
    with pytest.raises(ValueError, match="without a compressed layer"):
        restore(network)


# Files


@pytest.fixture(params=["network.safetensors", "network"])
def path(request, tmp_path):
    pytest.importorskip("safetensors.numpy" if request.param.endswith("safetensors") else "orbax.checkpoint")
    return tmp_path / request.param


@each_method
def test_a_saved_network_is_the_same(method, network, path, random):
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    small, _ = compress(network, method, ratio=0.5, pattern="blocks.*")
    save(small, path)
    other = Network(seed=7)
    other.eval()
    again = load(other, path)
    np.testing.assert_array_equal(again(x), small(x))
    assert type(other.blocks[0]) is nnx.Linear


def test_a_checkpoint_of_another_network_is_refused(network, path):
    save(compress(network, "low_rank", ratio=0.5)[0], path)
    with pytest.raises(ValueError, match=r"blocks.0 of \[24, 48\] features, the network has \[24, 60\]"):
        load(Network(hidden=60), path)
    with pytest.raises(ValueError, match="was not saved by"):
        load(network, path.with_name("nothing"))


LAYER = {"method": "low_rank", "features": [24, 36], "rank": 2, "blocks": 1}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{", "a configuration that is not JSON"),
        ("[3]", "a configuration of type list, expected a dict of layers"),
        ('{"head": 3}', "3 for a layer head, expected method, features, rank, blocks"),
        *[
            (
                json.dumps({"head": {k: v for k, v in LAYER.items() if k != key}}),
                f"layer head, expected .*{key}",
            )
            for key in LAYER
        ],
        (
            json.dumps({"head": LAYER | {"method": "svd"}}),
            "head of another kind: got method='svd', expected one",
        ),
        (
            json.dumps({"head": LAYER | {"rank": "2"}}),
            "head of another kind: got rank='2', expected an integer",
        ),
        (
            json.dumps({"head": LAYER | {"blocks": None}}),
            "head of another kind: got blocks=None, expected an int",
        ),
        (json.dumps({"head": LAYER | {"rank": 25}}), "head of another kind: got rank=25, expected 1 to 24"),
        (json.dumps({"tail": LAYER | {"features": None}}), "tail of None features, the network has None"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(written, words, network, tmp_path):
    path = tmp_path / "network.safetensors"
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({}, path, metadata={"pallas_kernels.compress": written})
    with pytest.raises(ValueError, match=rf"network.safetensors has .*{words}"):
        load(network, path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_arrays_keep_their_dtype_and_are_not_cast(dtype, path):
    def model(dtype):
        return nnx.Sequential(nnx.Linear(16, 24, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0)))

    small, _ = compress(model(dtype), "low_rank", rank=2)
    save(small, path)
    factor = load(model(dtype), path).layers[0].u[...]
    assert factor.dtype == dtype
    np.testing.assert_array_equal(factor, small.layers[0].u[...])
    other = jnp.float16 if dtype == jnp.float32 else jnp.float32
    saved, wanted = (rf"{jnp.dtype(d)} \[2, 24\]" for d in (dtype, other))
    with pytest.raises(ValueError, match=f"has {saved} for layers.0.u, the network has {wanted}; 2 such"):
        load(model(other), path)


def test_a_missing_extra_says_what_to_install(network, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pallas-kernels\[compress\]"'):
        save(network, tmp_path / "network.safetensors")
