"""GPT-2: a causal transformer over tokens, its cache of keys and values, and sampling from it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.models._linear import choose, layers, named

_STD = 0.02
_INIT = nnx.initializers.normal(_STD)
# Those of the published GPT-2 that is trained from scratch: arXiv:2512.20861, table 3.
_LINEAR = layers(_STD, 192, monarch=4, blast=6)


class Cache(NamedTuple):
    """What attention needs to know of the tokens so far.

    keys, values: for each block (B, room, heads, features of a head).
    length: how many tokens they are of.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


class GPT2(nnx.Module):
    """Tokens and their positions through blocks of causal attention and perceptrons; the embedding is the head.

    Modules have the names of OpenAI's checkpoints: wte, wpe, h.0.ln_1, h.0.attn.c_attn, h.0.attn.c_proj, h.0.ln_2,
    h.0.mlp.c_fc, h.0.mlp.c_proj, ln_f; and kernels their layout, (inputs, outputs).

    Args:
      vocabulary: number of tokens.
      context: number of positions.
      depth: number of blocks.
      features: of a token.
      heads: of attention; they divide the features.
      linear: makes the layers c_attn, c_fc and mlp.c_proj: "dense", "monarch", "blast", "low_rank" with the ranks
        published for GPT-2, or a function with the arguments of `nnx.Linear`.
      dropout: rate on embeddings, on the weights of attention, and on what each block adds.
      dtype: of the computation; None takes that of the parameters.
      param_dtype: of the parameters.
      rngs: random streams.

    Returns (of a call): logits (B, L, vocabulary) of the next token, for tokens (B, L).

    Raises:
      ValueError: features don't divide, there is no `linear` of that name, or, from a call, tokens that are not (B, L)
        or more than there are positions.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.gpt2 import GPT2
      >>> model = GPT2(11, 16, depth=1, features=8, heads=2, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 5), int)).shape
      (2, 5, 11)

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    def __init__(
        self,
        vocabulary: int = 50257,
        context: int = 1024,
        *,
        depth: int = 12,
        features: int = 768,
        heads: int = 12,
        linear: str | Callable[..., nnx.Module] = "dense",
        dropout: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % heads:
            raise ValueError(f"got {features=}, {heads=}, expected a multiple of the heads")
        self.context, self.heads = context, heads
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(nnx.LayerNorm, features, epsilon=1e-5, **options)
        self.wte = nnx.Embed(vocabulary, features, embedding_init=_INIT, **options)
        self.wpe = nnx.Embed(context, features, embedding_init=_INIT, **options)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        make = choose(linear, _LINEAR)
        self.h = nnx.data([_Block(features, heads, make, norm, dropout, options) for _ in range(depth)])
        for block in self.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                # Every block adds twice to the sum, and starts so small that its variance stays.
                kernel = getattr(layer, getattr(layer, "FACTORS", ("kernel",))[-1], None)
                if kernel is not None:
                    kernel[...] = kernel[...] / (2 * depth) ** 0.5
        self.ln_f = norm()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.wte.attend(self._features(tokens, None)[0])

    def cache(self, batch: int, room: int | None = None) -> Cache:
        """An empty one, for `batch` sequences of at most `room` tokens; None: as many as there are positions."""
        features = self.wte.features
        shape = (batch, self.context if room is None else room, self.heads, features // self.heads)
        dtype = self.wte.dtype or self.wte.embedding[...].dtype
        zeros = tuple(jnp.zeros(shape, dtype) for _ in self.h)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, L, vocabulary) for tokens (B, L) that come after those of the cache, and the cache of all.

        Raises:
          ValueError: there is no room for them; under `jit`, only if there is none in an empty cache.
        """
        x, cache = self._features(tokens, cache)
        return self.wte.attend(x), cache

    def _features(self, tokens: jax.Array, cache: Cache | None) -> tuple[jax.Array, Any]:
        """What the head reads, and the cache."""
        if tokens.ndim != 2:
            raise ValueError(f"got tokens of shape {tokens.shape}, expected (B, L)")
        room, start = self.context, 0
        if cache is not None:
            room, start = min(room, cache.keys[0].shape[1]), cache.length
        known = 0 if isinstance(start, jax.core.Tracer) else int(start)
        if tokens.shape[1] + known > room:
            raise ValueError(f"got {tokens.shape[1]} tokens after {known}, expected at most {room} together")
        # In int32 with 64-bit types too: a cache that goes round a loop keeps its types.
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        keys, values = [], []
        for i, block in enumerate(self.h):
            before = None if cache is None else (cache.keys[i], cache.values[i], start)
            x, (k, v) = block(x, before, positions)
            keys.append(k)
            values.append(v)
        return self.ln_f(x), Cache(tuple(keys), tuple(values), start + tokens.shape[1])


class _Block(nnx.Module):
    """x + attention, then x + perceptron, each of what a LayerNorm leaves."""

    def __init__(
        self, features: int, heads: int, linear: Callable[..., Any], norm: Callable[..., Any], dropout: float,
        options: dict[str, Any],
    ):  # fmt: skip
        self.ln_1 = norm()
        self.attn = _Attention(features, heads, linear, dropout, options)
        self.ln_2 = norm()
        self.mlp = _Perceptron(features, linear, dropout, options)

    def __call__(self, x: jax.Array, before: Any, positions: jax.Array) -> tuple[jax.Array, Any]:
        y, cached = self.attn(self.ln_1(x), before, positions)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cached


class _Attention(nnx.Module):
    def __init__(
        self, features: int, heads: int, linear: Callable[..., Any], dropout: float, options: dict[str, Any]
    ):
        self.heads = heads
        self.c_attn = linear(features, 3 * features, **options)
        self.c_proj = nnx.Linear(features, features, kernel_init=_INIT, **options)
        self.attn_dropout, self.resid_dropout = (nnx.Dropout(dropout, rngs=options["rngs"]) for _ in range(2))

    def __call__(self, x: jax.Array, before: Any, positions: jax.Array) -> tuple[jax.Array, Any]:
        """`before`: keys and values of a cache, and how many tokens they are of: those of x come next."""
        shape = (*x.shape[:2], 3 * self.heads, x.shape[2] // self.heads)
        q, k, v = jnp.split(self.c_attn(x).reshape(shape), 3, 2)
        if before is not None:
            *known, start = before
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
                for old, new in zip(known, (k, v), strict=True)
            )
        mask = (jnp.arange(k.shape[1]) <= positions[:, None])[None, None]
        y = self._attend(q, k, v, mask).reshape(x.shape)
        return self.resid_dropout(self.c_proj(y)), (k, v)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        drop = self.attn_dropout
        if drop.deterministic or not drop.rate:
            return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)
        # Flax's has dropout, JAX's has not.
        return nnx.dot_product_attention(
            q, k, v, mask=mask, dropout_rng=drop.rngs(), dropout_rate=drop.rate, broadcast_dropout=False
        )


class _Perceptron(nnx.Module):
    def __init__(self, features: int, linear: Callable[..., Any], dropout: float, options: dict[str, Any]):
        self.c_fc = linear(features, 4 * features, **options)
        self.c_proj = linear(4 * features, features, **options)
        self.dropout = nnx.Dropout(dropout, rngs=options["rngs"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.c_proj(nnx.gelu(self.c_fc(x), approximate=True)))


def generate(
    model: GPT2,
    prompt: jax.Array,
    length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Go on with token sequences; one compiled program, without dropout.

    Each next token is drawn with probabilities softmax(logits / temperature), among all or the likeliest.

    Args:
      model: its own tokens go back into it.
      prompt: tokens (B, P).
      length: how many tokens to add to each.
      temperature: 0 takes the likeliest token.
      top_k: draw only among so many of the likeliest tokens.
      key: of random numbers, such as `jax.random.key(0)`; needed if the temperature is not 0.

    Returns:
      Tokens (B, P + length), the prompt first.

    Raises:
      ValueError: an empty prompt or no length, more tokens than there are positions, a temperature below 0, one above 0
        without a key, or a `top_k` that is not 1 to the size of the vocabulary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.gpt2 import GPT2, generate
      >>> model = GPT2(11, 16, depth=1, features=8, heads=2, rngs=nnx.Rngs(0))
      >>> generate(model, jnp.zeros((2, 3), int), 4, temperature=0.8, top_k=5, key=jax.random.key(1)).shape
      (2, 7)
    """
    if prompt.ndim != 2 or not prompt.shape[1] or length < 1:
        raise ValueError(f"got a prompt of shape {prompt.shape} and {length=}, expected (B, P) and 1 or more")
    if prompt.shape[1] + length > model.context:
        raise ValueError(f"got {prompt.shape[1]} + {length} tokens, expected at most {model.context}")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"got {temperature=}, {key=}, expected 0, or more and a key")
    if top_k is not None and not 1 <= top_k <= model.wte.num_embeddings:
        raise ValueError(f"got {top_k=}, expected 1 to {model.wte.num_embeddings}")
    graph, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _generate(graph, length, top_k, temperature == 0, state, prompt, temperature or 1.0, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    graph: Any, length: int, top_k: int | None, greedy: bool, state: Any, prompt: jax.Array,
    temperature: jax.Array, key: jax.Array,
) -> jax.Array:  # fmt: skip
    model = nnx.merge(graph, state)
    model.eval()

    def draw(features: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.wte.attend(features[:, -1])
        if greedy:
            return jnp.argmax(logits, -1).astype(prompt.dtype)
        values, tokens = jax.lax.top_k(logits, top_k or logits.shape[-1])
        chosen = jax.random.categorical(key, values.astype(jnp.float32) / temperature)
        return jnp.take_along_axis(tokens, chosen[:, None], 1)[:, 0].astype(prompt.dtype)

    def step(carry: tuple[jax.Array, Cache], key: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        last, cache = carry
        features, cache = model._features(last[:, None], cache)
        token = draw(features, key)
        return (token, cache), token

    first, *keys = jnp.split(jax.random.split(key, length), [1])
    features, cache = model._features(prompt, model.cache(len(prompt), prompt.shape[1] + length))
    token = draw(features, first[0])
    _, tokens = jax.lax.scan(step, (token, cache), keys[0])
    return jnp.concatenate([prompt, token[:, None], tokens.T], 1)


# Depth, features, heads of the published sizes.
_SIZES = {"_medium": (24, 1024, 16), "_large": (36, 1280, 20), "_xl": (48, 1600, 25)}

MODELS = {
    "gpt2_tiny": functools.partial(GPT2, 256, 64, depth=2, features=64, heads=4),
    **named("gpt2", functools.partial(GPT2, depth=12, features=768, heads=12)),
    **{
        f"gpt2{size}": functools.partial(GPT2, depth=depth, features=features, heads=heads)
        for size, (depth, features, heads) in _SIZES.items()
    },
}
