"""Vision transformers: counts of parameters, the definition of attention, presets, errors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import models
from pallas_kernels.compress import compress
from pallas_kernels.models.vit import VisionTransformer
from pallas_kernels.nn import BlastLinear, LowRankLinear, MonarchLinear

SMALL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "depth": 2,
    "features": 24,
    "heads": 3,
    "num_classes": 5,
}


def count(make):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(p.shape) for p in jax.tree.leaves(state))


def test_the_published_base_model_has_its_parameters():
    def make(name):
        return models.create(name, rngs=nnx.Rngs(0))

    assert count(lambda: make("vit_base_patch16_224")) == 86_567_656
    assert count(lambda: make("vit_tiny_patch16_224")) == 5_717_416
    # Of qkv, fc1 and fc2 each rank has the features that go in and out, and for BLAST 9 more.
    features = (768 + 2304) + (768 + 3072) + (3072 + 768)
    dense = 768 * (2304 + 3072 + 3072)
    for name, kept in (
        ("monarch", 128 * features),
        ("low_rank", 128 * features),
        ("blast", 128 * (features + 27)),
    ):
        assert count(lambda name=name: make(f"vit_base_patch16_224_{name}")) == 86_567_656 + 12 * (
            kept - dense
        )


def test_names_are_those_of_checkpoints():
    model = VisionTransformer(**SMALL, rngs=nnx.Rngs(0))
    paths = {".".join(map(str, path)) for path, _ in nnx.iter_graph(model)}
    assert {
        "cls_token", "pos_embed", "patch_embed.proj.kernel", "blocks.1.norm1.scale", "blocks.0.attn.qkv.kernel",
        "blocks.0.attn.proj.bias", "blocks.1.mlp.fc2.kernel", "norm.bias", "head.kernel",
    } <= paths  # fmt: skip


def test_attention_is_its_definition():
    model = VisionTransformer(**SMALL, rngs=nnx.Rngs(1))
    attention = model.blocks[0].attn
    x = np.random.default_rng(0).normal(size=(2, 7, 24)).astype(np.float32)
    q, k, v = np.split(np.asarray(attention.qkv(x)).reshape(2, 7, 9, 8), 3, 2)
    scores = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(8))
    mixed = np.einsum("nhqk,nkhd->nqhd", scores / scores.sum(-1, keepdims=True), v).reshape(2, 7, 24)
    expected = mixed @ np.asarray(attention.proj.kernel[...]) + np.asarray(attention.proj.bias[...])
    np.testing.assert_allclose(attention(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("linear", "kind"),
    [
        (functools.partial(MonarchLinear, rank=2, blocks=4), MonarchLinear),
        (functools.partial(BlastLinear, rank=6, blocks=3), BlastLinear),
        (functools.partial(LowRankLinear, rank=6), LowRankLinear),
    ],
)
def test_factored_layers_train_from_scratch(linear, kind):
    model = VisionTransformer(**SMALL, linear=linear, rngs=nnx.Rngs(2))
    assert type(model.blocks[1].mlp.fc2) is kind and type(model.head) is nnx.Linear
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
    gradients = nnx.grad(lambda model: jnp.sum(model(images) ** 2))(model)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients))


def test_a_compressed_network_computes_nearly_the_same():
    model = VisionTransformer(**SMALL, rngs=nnx.Rngs(3))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
    small, report = compress(model, "monarch", rank=6, pattern="blocks.*.mlp.*")
    assert len(report.layers) == 4
    np.testing.assert_allclose(small(images), model(images), rtol=1e-3, atol=1e-4)


def test_bad_arguments_are_refused():
    make = functools.partial(VisionTransformer, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="patch_size=3"):
        make(**{**SMALL, "patch_size": 3})
    with pytest.raises(ValueError, match="linear='sparse', expected one of dense, monarch"):
        make(**SMALL, linear="sparse")
    with pytest.raises(ValueError, match=r"\(1, 9, 8, 1\), expected \(N, 8, 8, 1\)"):
        make(**SMALL)(jnp.ones((1, 9, 8, 1)))
