"""Vision transformers, with dense linear layers or with those of a compression trained from scratch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.models._linear import choose, layers, named

_STD = 0.02
_INIT = nnx.initializers.normal(_STD)
# Those of the published ViT-B/16 that is trained from scratch: arXiv:2512.20861, table 3.
_LINEAR = layers(_STD, 128, monarch=4, blast=3)


class VisionTransformer(nnx.Module):
    """Patches of an image, and a token for its class, through blocks of attention and perceptrons.

    Modules have the names of timm's `vision_transformer`: patch_embed.proj, cls_token, pos_embed, blocks.0.norm1,
    blocks.0.attn.qkv, blocks.0.attn.proj, blocks.0.norm2, blocks.0.mlp.fc1, blocks.0.mlp.fc2, norm, head.

    Args:
      image_size, patch_size: pixels along a side; the first is a multiple of the second.
      in_channels: of the image.
      depth: number of blocks.
      features: of a token.
      heads: of attention; they divide the features.
      num_classes: outputs of the head.
      linear: makes the layers qkv, fc1 and fc2: "dense", "monarch", "blast", "low_rank" with the ranks published for
        ViT-B, or a function with the arguments of `nnx.Linear`.
      dtype: of the computation; None takes what the input and the parameters promote to.
      param_dtype: of the parameters.
      rngs: random streams.

    Returns (of a call): logits (N, num_classes) for images (N, image_size, image_size, in_channels).

    Raises:
      ValueError: sizes don't divide, there is no `linear` of that name, or, from a call, images of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.vit import VisionTransformer
      >>> model = VisionTransformer(
      ...     8, 2, in_channels=1, depth=1, features=32, heads=2, num_classes=10, rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.ones((2, 8, 8, 1))).shape
      (2, 10)

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        *,
        in_channels: int = 3,
        depth: int = 12,
        features: int = 768,
        heads: int = 12,
        num_classes: int = 1000,
        linear: str | Callable[..., nnx.Module] = "dense",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size or features % heads:
            raise ValueError(
                f"got {image_size=}, {patch_size=}, {features=}, {heads=}, expected multiples of the patches and heads"
            )
        self.image_shape = image_size, image_size, in_channels
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(nnx.LayerNorm, features, epsilon=1e-6, **options)
        self.patch_embed = _PatchEmbedding(patch_size, in_channels, features, options)
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nnx.Param(_INIT(rngs.params(), (1, 1, features), param_dtype))
        self.pos_embed = nnx.Param(_INIT(rngs.params(), (1, tokens, features), param_dtype))
        make = choose(linear, _LINEAR)
        self.blocks = nnx.data([_Block(features, heads, make, norm, options) for _ in range(depth)])
        self.norm = norm()
        self.head = nnx.Linear(features, num_classes, kernel_init=_INIT, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"got images of shape {images.shape}, expected (N, {', '.join(map(str, self.image_shape))})"
            )
        x = self.patch_embed(images)
        first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1) + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class _PatchEmbedding(nnx.Module):
    def __init__(self, size: int, in_channels: int, features: int, options: dict[str, Any]):
        self.proj = nnx.Conv(in_channels, features, (size, size), strides=size, padding="VALID", **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.proj(images)
        return jax.lax.collapse(patches, 1, 3)


class _Block(nnx.Module):
    """x + attention, then x + perceptron, each of what a LayerNorm leaves."""

    def __init__(
        self,
        features: int,
        heads: int,
        linear: Callable[..., Any],
        norm: Callable[..., Any],
        options: dict[str, Any],
    ):
        self.norm1 = norm()
        self.attn = _Attention(features, heads, linear, options)
        self.norm2 = norm()
        self.mlp = _Perceptron(features, 4 * features, linear, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nnx.Module):
    def __init__(self, features: int, heads: int, linear: Callable[..., Any], options: dict[str, Any]):
        self.heads = heads
        self.qkv = linear(features, 3 * features, **options)
        self.proj = nnx.Linear(features, features, kernel_init=_INIT, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], 3 * self.heads, x.shape[2] // self.heads)
        q, k, v = jnp.split(self.qkv(x).reshape(shape), 3, 2)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class _Perceptron(nnx.Module):
    def __init__(self, features: int, hidden: int, linear: Callable[..., Any], options: dict[str, Any]):
        self.fc1 = linear(features, hidden, **options)
        self.fc2 = linear(hidden, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


MODELS = {
    "vit_tiny": functools.partial(VisionTransformer, 32, 8, depth=2, features=64, heads=4),
    "vit_tiny_patch16_224": functools.partial(VisionTransformer, depth=12, features=192, heads=3),
    "vit_small_patch16_224": functools.partial(VisionTransformer, depth=12, features=384, heads=6),
    **named("vit_base_patch16_224", functools.partial(VisionTransformer, depth=12, features=768, heads=12)),
}
