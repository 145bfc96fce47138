"""Networks for sequences, of any mixer: a residual classifier and a causal language model."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.nn import BatchNorm, SGConv

# Takes the number of features and `rngs`; (B, L, C) to (B, L, C).
Mixer = Callable[..., nnx.Module]

_NORMS = {"batch": BatchNorm, "layer": nnx.LayerNorm}


class Block(nnx.Module):
    """One residual block: x + dropout(mixer(norm(x))), or with the norm last, norm(x + dropout(mixer(x)))."""

    def __init__(
        self, features: int, mixer: Mixer, *, norm: Literal["batch", "layer"], norm_first: bool,
        dropout: float, rngs: nnx.Rngs,
    ):  # fmt: skip
        if norm not in _NORMS:
            raise ValueError(f"got norm={norm!r}, expected 'batch' or 'layer'")
        self.mixer = mixer(features, rngs=rngs)
        self.norm = _NORMS[norm](features, rngs=rngs)
        self.norm_first = norm_first
        # One draw for all of the sequence.
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm_first:
            return x + self.dropout(self.mixer(self.norm(x)))  # pyright: ignore[reportCallIssue]
        return self.norm(x + self.dropout(self.mixer(x)))  # pyright: ignore[reportCallIssue]


class SequenceClassifier(nnx.Module):
    """Residual blocks of a mixer between an encoder of tokens or numbers and a head of classes.

    Args:
      depth: number of blocks.
      features: channels C of all blocks.
      mixer: makes the mixer of a block from C and `rngs`, e.g. `functools.partial(SGConv, length=1024)`.
      num_classes: outputs of the head.
      vocabulary: number of tokens; None: the input is `in_features` numbers for each step.
      in_features: numbers for each step.
      norm: "batch" or "layer". norm_first: whether it stands before the mixer or after the sum.
      dropout: rate in every block.
      pool: what the head reads, the "mean" of the steps or the "last" one.
      rngs: random streams.

    Returns (of a call): logits (B, num_classes) for tokens (B, L), integers, or numbers (B, L, in_features).

    Raises:
      ValueError: there is no such norm or pool; from a call, an input of another shape.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.sequence import SequenceClassifier
      >>> from pallas_kernels.nn import SGConv
      >>> mixer = functools.partial(SGConv, length=64, kernel_dim=8)
      >>> model = SequenceClassifier(2, 16, mixer, num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((3, 64, 1))).shape
      (3, 10)

    Source: the backbone of Gu et al., arXiv:2111.00396, with the mixers of Li et al., arXiv:2210.09298.
    """

    def __init__(
        self,
        depth: int,
        features: int,
        mixer: Mixer,
        *,
        num_classes: int,
        vocabulary: int | None = None,
        in_features: int = 1,
        norm: Literal["batch", "layer"] = "batch",
        norm_first: bool = True,
        dropout: float = 0.0,
        pool: Literal["mean", "last"] = "mean",
        rngs: nnx.Rngs,
    ):
        if pool not in ("mean", "last"):
            raise ValueError(f"got pool={pool!r}, expected 'mean' or 'last'")
        self.vocabulary, self.in_features, self.pool = vocabulary, in_features, pool
        if vocabulary is None:
            self.encoder = nnx.Linear(in_features, features, rngs=rngs)
        else:
            self.encoder = nnx.Embed(vocabulary, features, rngs=rngs)
        block = functools.partial(
            Block, features, mixer, norm=norm, norm_first=norm_first, dropout=dropout, rngs=rngs
        )
        self.blocks = nnx.data([block() for _ in range(depth)])
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        expected = ("B", "L") if self.vocabulary is not None else ("B", "L", self.in_features)
        if x.ndim != len(expected) or (x.ndim == 3 and x.shape[-1] != self.in_features):
            raise ValueError(f"got x of shape {x.shape}, expected ({', '.join(map(str, expected))})")
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, 1) if self.pool == "mean" else x[:, -1])


class LanguageModel(nnx.Module):
    """A causal language model: blocks of a causal mixer and a two-layer map, and the embedding as the head.

    Args:
      vocabulary: number of tokens.
      depth: number of blocks.
      features: channels C.
      mixer: makes the mixer of a block from C and `rngs`; it must be causal, e.g.
        `functools.partial(Hyena, length=1024)`.
      expansion: width of the two-layer map, in C.
      dropout: rate after every mixer and map.
      rngs: random streams.

    Returns (of a call): logits (B, L, vocabulary) of the next token, for tokens (B, L).

    Raises:
      ValueError: from a call, an input that is not (B, L).

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.sequence import LanguageModel
      >>> from pallas_kernels.nn import Hyena
      >>> model = LanguageModel(10, 1, 16, functools.partial(Hyena, length=64), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 64), int)).shape
      (2, 64, 10)

    Source: Poli et al., Hyena Hierarchy, arXiv:2302.10866, section 4.
    """

    def __init__(
        self,
        vocabulary: int,
        depth: int,
        features: int,
        mixer: Mixer,
        *,
        expansion: int = 4,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocabulary, features, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        parts = {"norm": "layer", "norm_first": True, "dropout": dropout, "rngs": rngs}
        feed_forward = functools.partial(_FeedForward, expansion=expansion)
        self.blocks = nnx.data(
            [Block(features, make, **parts) for _ in range(depth) for make in (mixer, feed_forward)]
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if tokens.ndim != 2:
            raise ValueError(f"got tokens of shape {tokens.shape}, expected (B, L)")
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class _FeedForward(nnx.Module):
    def __init__(self, features: int, *, expansion: int, rngs: nnx.Rngs):
        self.into = nnx.Linear(features, expansion * features, rngs=rngs)
        self.out = nnx.Linear(expansion * features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.into(x)))


# The configurations of SGConv on the tasks of the Long Range Arena: blocks, features, weights for each scale, and
# what differs from a network with batch norm before the mixer.
_LISTOPS = {"vocabulary": 18, "num_classes": 10, "norm_first": False}
_TEXT = {"vocabulary": 135, "num_classes": 2}
_RETRIEVAL = {"vocabulary": 100, "num_classes": 2}
_IMAGE = {"num_classes": 10, "norm": "layer", "norm_first": False, "dropout": 0.2}
_PATHFINDER = {"num_classes": 2, "dropout": 0.2, "pool": "last"}
_PATHX = {"num_classes": 2}


def _sgconv(
    depth: int, features: int, kernel_dim: int, length: int, model: dict[str, Any], **mixer: Any
) -> Callable[..., nnx.Module]:
    mixer = {
        "length": length, "kernel_dim": kernel_dim, "bidirectional": True, "glu": True,
        "dropout": model.get("dropout", 0.0), **mixer,
    }  # fmt: skip
    return functools.partial(
        SequenceClassifier, depth=depth, features=features, mixer=functools.partial(SGConv, **mixer), **model
    )


MODELS = {
    "sgconv_listops": _sgconv(8, 128, 1, 2048, _LISTOPS),
    "sgconv_text": _sgconv(6, 256, 2, 4096, _TEXT),
    "sgconv_retrieval": _sgconv(6, 256, 1, 4000, _RETRIEVAL),
    "sgconv_image": _sgconv(6, 512, 32, 1024, _IMAGE, power_decay="fixed", decay=(1.0, 1.0)),
    "sgconv_pathfinder": _sgconv(6, 256, 32, 1024, _PATHFINDER),
    "sgconv_pathx": _sgconv(6, 256, 64, 16384, _PATHX, init="cos", init_scale=1, decay=(1.0, 3.0)),
}
