"""GPT-2: counts of parameters, its definition in numpy and in transformers, the cache, sampling, compression."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels import lowering, models
from pallas_kernels.compress import compress, restore
from pallas_kernels.models.gpt2 import GPT2, generate
from pallas_kernels.nn import BlastLinear, LowRankLinear, MonarchLinear

SMALL: dict[str, Any] = {"vocabulary": 23, "context": 12, "depth": 2, "features": 24, "heads": 3}


@pytest.fixture
def model(random):
    """Parameters so large that attention is far from even, and no two are alike."""
    model = GPT2(**SMALL, rngs=nnx.Rngs(0))
    model.eval()
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: jnp.float32(p + 0.3 * random.normal(size=p.shape)), state))
    return model


@pytest.fixture
def tokens(random):
    return jnp.asarray(random.integers(0, 23, (2, 9)))


@nnx.jit
def apply(model, tokens):
    return model(tokens)


@nnx.jit
def extend(model, tokens, cache):
    return model.extend(tokens, cache)


def shapes(name, **overrides) -> Any:
    return nnx.eval_shape(lambda: models.create(name, **overrides, rngs=nnx.Rngs(0)))


def count(model):
    state = nnx.state(model, nnx.Param)
    return sum(math.prod(p.shape) for p in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        pytest.param("gpt2_medium", 354_823_168, marks=pytest.mark.slow),
        pytest.param("gpt2_large", 774_030_080, marks=pytest.mark.slow),
        pytest.param("gpt2_xl", 1_557_611_200, marks=pytest.mark.slow),
    ],
)
def test_the_published_sizes_have_their_parameters(name, parameters):
    assert count(shapes(name)) == parameters


def test_presets_have_the_published_ranks():
    # Of c_attn, c_fc and mlp.c_proj each rank has the features that go in and out, and for BLAST 36 more.
    features = (768 + 2304) + (768 + 3072) + (3072 + 768)
    dense = count(shapes("gpt2", depth=1)) - 768 * (2304 + 3072 + 3072)
    for kind, rank, blocks, kept in (
        (MonarchLinear, 48, 4, features), (BlastLinear, 192, 6, features + 3 * 36), (LowRankLinear, 192, 1, features)
    ):  # fmt: skip
        method = {MonarchLinear: "monarch", BlastLinear: "blast", LowRankLinear: "low_rank"}[kind]
        model = shapes(f"gpt2_{method}", depth=1)
        assert count(model) == dense + 192 * kept
        layer = model.h[0].mlp.c_fc
        assert (type(layer), layer.rank, layer.blocks) == (kind, rank, blocks)
        assert type(model.h[0].attn.c_proj) is nnx.Linear


def definition(model, tokens):
    """In float64, one sequence and one head at a time."""

    def f64(variable):
        return np.asarray(variable[...], np.float64)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * f64(layer.scale) + f64(
            layer.bias
        )

    def linear(x, layer):
        return x @ f64(layer.kernel) + f64(layer.bias)

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    def attention(x, layer):
        q, k, v = (part.reshape(len(x), layer.heads, -1) for part in np.split(linear(x, layer.c_attn), 3, -1))
        heads = []
        for head in range(layer.heads):
            scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(q.shape[-1])) * np.tri(len(x))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
        return linear(np.concatenate(heads, -1), layer.c_proj)

    logits = []
    for sequence in np.asarray(tokens):
        x = f64(model.wte.embedding)[sequence] + f64(model.wpe.embedding)[: len(sequence)]
        for block in model.h:
            x = x + attention(norm(x, block.ln_1), block.attn)
            x = x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
        logits.append(norm(x, model.ln_f) @ f64(model.wte.embedding).T)
    return np.stack(logits)


@pytest.mark.parametrize("linear", ["dense", "monarch", "blast", "low_rank"])
def test_matrices_of_every_kind_start_alike(linear):
    model = GPT2(5, 4, depth=2, features=192, heads=2, linear=linear, rngs=nnx.Rngs(0))
    for block in model.h:
        for layer, std in ((block.attn.c_attn, 0.02), (block.mlp.c_fc, 0.02), (block.mlp.c_proj, 0.01)):
            matrix = layer.kernel[...] if linear == "dense" else layer.to_dense()
            assert math.isclose(float(jnp.std(matrix)), std, rel_tol=0.1)


def test_logits_are_their_definition(model, tokens):
    expected = definition(model, tokens)
    assert np.std(expected) > 1
    np.testing.assert_allclose(apply(model, tokens), expected, atol=1e-4)


def test_logits_are_those_of_transformers(model, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=23, n_positions=12, n_embd=24, n_layer=2, n_head=3)
    other = transformers.GPT2LMHeadModel(config).eval()
    names = {"scale": "weight", "kernel": "weight", "embedding": "weight"}
    arrays = {}
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            *modules, name = map(str, path)
            arrays[".".join([*modules, names.get(name, name)])] = torch.tensor(np.asarray(variable[...]))
    assert not other.transformer.load_state_dict(arrays, strict=False).unexpected_keys
    with torch.no_grad():
        expected = other(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(apply(model, tokens), expected, atol=1e-4)


def test_no_token_knows_of_later_ones(model, tokens):
    logits = np.asarray(apply(model, tokens))
    changed = np.asarray(apply(model, tokens.at[:, 5].add(1)))
    np.testing.assert_array_equal(changed[:, :5], logits[:, :5])
    assert np.all(np.abs(changed[:, 5:] - logits[:, 5:]).max(-1) > 1e-3)


@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 1, 3, 1]])
def test_a_cache_changes_nothing(parts, model, tokens):
    cache, logits = model.cache(2), []
    for part in np.split(tokens, np.cumsum(parts)[:-1], 1):
        found, cache = extend(model, part, cache)
        logits.append(found)
    np.testing.assert_allclose(np.concatenate(logits, 1), apply(model, tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == 9 and cache.keys[0].shape == (2, 12, 3, 8)


def test_a_cache_goes_round_a_loop_with_64_bit_types(model, tokens):
    with lowering.enable_x64():
        steps = tokens.T[:, :, None]
        cache, found = jax.lax.scan(lambda c, t: model.extend(t, c)[::-1], model.cache(2), steps)
    assert cache.length.dtype == jnp.int32 and cache.length == 9
    np.testing.assert_allclose(found[:, :, 0].swapaxes(0, 1), apply(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dense", "monarch", "blast", "low_rank"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens_give_no_logits(method, shape, model):
    if method != "dense":
        model, _ = compress(model, method, rank=1)
    tokens = jnp.zeros(shape, int)
    logits, cache = extend(model, tokens, model.cache(shape[0]))
    assert logits.shape == apply(model, tokens).shape == (*shape, 23)
    assert cache.length == shape[1] and cache.keys[0].shape == (shape[0], 12, 3, 8)


def test_greedy_sequences_take_the_likeliest_token(model, tokens):
    prompt, expected = tokens[:, :3], jnp.zeros((2, 10), int).at[:, :3].set(tokens[:, :3])
    for i in range(3, 10):
        expected = expected.at[:, i].set(jnp.argmax(apply(model, expected)[:, i - 1], -1))
    assert len(np.unique(expected[:, 3:])) > 2
    for options in ({}, {"temperature": 1.0, "top_k": 1, "key": jax.random.key(0)}):
        np.testing.assert_array_equal(generate(model, prompt, 7, **options), expected)


def test_samples_have_the_probabilities_of_the_network(model, tokens):
    prompt = jnp.tile(tokens[:1, :4], (4000, 1))
    logits = np.asarray(apply(model, prompt[:1])[0, -1], np.float64)
    for top_k, temperature in ((None, 2.0), (3, 1.5)):
        options = {"temperature": temperature, "top_k": top_k, "key": jax.random.key(3)}
        drawn = np.asarray(generate(model, prompt, 1, **options)[:, -1])
        np.testing.assert_array_equal(drawn, generate(model, prompt, 1, **options)[:, -1])
        p = np.exp((logits - logits.max()) / temperature)
        p = np.where(p >= np.sort(p)[-(top_k or len(p))], p, 0)
        p /= p.sum()
        assert np.all(np.abs(np.bincount(drawn, minlength=23) / 4000 - p) <= 5 * np.sqrt(p / 4000))


def test_dropout_is_for_training_only(model, tokens):
    expected = generate(model, tokens[:, :3], 5)
    logits = apply(model, tokens)
    model.train()
    first, second = apply(model, tokens), apply(model, tokens)
    assert not np.allclose(first, second) and not np.allclose(first, logits)
    np.testing.assert_array_equal(generate(model, tokens[:, :3], 5), expected)


def test_dropout_is_on_embeddings_attention_and_sums(model, tokens):
    logits = model(tokens)
    model.train()
    everywhere = [model.drop]
    for block in model.h:
        everywhere += [block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout]
    for on in everywhere:
        for drop in everywhere:
            drop.rate = 0.5 * (drop is on)
        assert not np.allclose(model(tokens), logits, atol=1e-2)


@pytest.mark.parametrize("method", ["dense", "monarch"])
def test_it_learns(method, tokens):
    linear = {"dense": "dense", "monarch": lambda *a, **k: MonarchLinear(*a, rank=2, blocks=4, **k)}[method]
    model = GPT2(**SMALL, linear=linear, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(tokens)[:, :-1], tokens[:, 1:]
            ).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, gradients

    steps = [step(model, optimizer) for _ in range(30)]
    first, last = float(steps[0][0]), float(steps[-1][0])
    assert abs(first - math.log(23)) < 0.5 and last < 0.3 * first
    for path, g in jax.tree.leaves_with_path(steps[0][1]):
        assert np.any(np.asarray(g) != 0), jax.tree_util.keystr(path)


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["monarch", "blast", "low_rank"])
def test_its_layers_are_compressed(method, model, tokens):
    kind = {"monarch": MonarchLinear, "blast": BlastLinear, "low_rank": LowRankLinear}[method]
    small, report = compress(model, method, ratio=0.5, pattern=["*.c_attn", "*.mlp.*"])
    paths = [layer.path for layer in report.layers]
    assert paths == [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]
    assert type(small.h[1].mlp.c_fc) is kind and type(small.h[1].attn.c_proj) is nnx.Linear
    assert report.ratio <= 0.5
    np.testing.assert_allclose(apply(restore(small), tokens), apply(small, tokens), atol=1e-4)
    assert generate(small, tokens[:, :3], 4).shape == (2, 7)


def test_half_precision(tokens):
    model = GPT2(**SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert model(tokens).dtype == model.cache(2).keys[0].dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert generate(model, tokens[:, :3], 4).shape == (2, 7)


def test_bad_arguments_are_refused(model, tokens):
    with pytest.raises(ValueError, match="features=24, heads=5"):
        GPT2(**{**SMALL, "heads": 5}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear='sparse', expected one of dense, monarch"):
        GPT2(**SMALL, linear="sparse", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(9,\), expected \(B, L\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="13 tokens after 0, expected at most 12"):
        model(jnp.zeros((1, 13), int))
    _, cache = extend(model, tokens, model.cache(2, 10))
    with pytest.raises(ValueError, match="2 tokens after 9, expected at most 10"):
        model.extend(tokens[:, :2], cache)
    calls: list[tuple[jax.Array, int, dict[str, Any], str]] = [
        (tokens, 4, {}, r"9 \+ 4 tokens, expected at most 12"),
        (tokens[:, :0], 4, {}, r"shape \(2, 0\)"),
        (tokens, 0, {}, "length=0"),
        (tokens, 1, {"temperature": -1.0}, r"temperature=-1\.0"),
        (tokens, 1, {"temperature": 1.0}, "key=None"),
        (
            tokens,
            1,
            {"temperature": 1.0, "top_k": 24, "key": jax.random.key(0)},
            "top_k=24, expected 1 to 23",
        ),
    ]
    for prompt, length, options, words in calls:
        with pytest.raises(ValueError, match=words):
            generate(model, prompt, length, **options)
