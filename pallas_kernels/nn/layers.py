"""The small parts of large-kernel networks: what stands between their convolutions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_LECUN_NORMAL = nnx.initializers.lecun_normal()


class GRN(nnx.Module):
    """Global response normalization: channels compete by their energy over the whole image.

    G[c] = sqrt(sum_{space} x[..., c]^2),  N[c] = G[c] / (mean_c G + epsilon),  y = (gamma N + 1) x + beta

    The sum of squares is taken in float32 or better, so that float16 does not overflow, and the gradient of a
    channel that is zero everywhere is that of G = 0, not NaN.

    Parameters: gamma (C,) and beta (C,), zero at first.

    Args:
      features: channels C.
      use_bias: whether there is a beta.
      epsilon: added to the mean.
      param_dtype: of the parameters.
      rngs: unused, here because every layer takes it.

    Returns (of a call): shape and dtype of x, which is (N, ..., C).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import GRN
      >>> GRN(8, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 8))).shape
      (2, 4, 4, 8)

    Source: Woo et al., ConvNeXt V2, arXiv:2301.00808, section 3.2.
    """

    def __init__(
        self,
        features: int,
        *,
        use_bias: bool = True,
        epsilon: float = 1e-6,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.gamma = nnx.Param(jnp.zeros(features, param_dtype))
        self.beta = nnx.data(nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        energy = jnp.sum(jnp.square(wide), axis=range(1, x.ndim - 1), keepdims=True)
        # The inner `where` keeps sqrt'(0) = inf out of the backward pass, where inf * 0 would be NaN.
        norm = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1)), 0)
        response = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        y = (self.gamma[...].astype(wide.dtype) * response + 1) * wide
        return (y if self.beta is None else y + self.beta[...].astype(wide.dtype)).astype(x.dtype)


class SqueezeExcite(nnx.Module):
    """Weigh the channels by what the whole image holds.

    y = x * sigmoid(up(activation(down(mean_{space} x)))), with `down` and `up` linear maps with bias.

    Args:
      features: channels C.
      hidden: channels between `down` and `up`.
      activation: between them.
      dtype: of the computation; None takes what the input and the parameters promote to.
      param_dtype: of the parameters.
      kernel_init: initializer of both kernels.
      rngs: random streams.

    Returns (of a call): shape of x, which is (N, ..., C).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import SqueezeExcite
      >>> SqueezeExcite(8, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 8))).shape
      (2, 4, 4, 8)

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507, equations 2 to 4.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _LECUN_NORMAL,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.down = nnx.Linear(features, hidden, **options)
        self.up = nnx.Linear(hidden, features, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        squeezed = jnp.mean(x, axis=range(1, x.ndim - 1), keepdims=True)
        return x * nnx.sigmoid(self.up(self.activation(self.down(squeezed))))


class DropPath(nnx.Module):
    """Drop a residual branch of whole samples at random in training: stochastic depth.

    y[n] = x[n] / (1 - rate) with probability 1 - rate, else 0; y = x in inference (`model.eval()`).

    Args:
      rate: probability of dropping, in [0, 1).
      rngs: random streams; "dropout" is forked. Not needed when rate is 0.

    Returns (of a call): shape and dtype of x, which is (N, ...).

    Raises:
      ValueError: rate outside of [0, 1), or no rngs where rate > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import DropPath
      >>> y = DropPath(0.5, rngs=nnx.Rngs(0))(jnp.ones((8, 3)))
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382, section 3.
    """

    def __init__(self, rate: float = 0.0, *, rngs: nnx.Rngs | None = None):
        if not 0 <= rate < 1:
            raise ValueError(f"got rate={rate}, expected 0 <= rate < 1")
        if rate and rngs is None:
            raise ValueError(f"got rngs=None with rate={rate}, expected rngs where rate > 0")
        self.rate = rate
        self.rngs = nnx.data(rngs.dropout.fork() if rate and rngs is not None else None)
        self.deterministic = False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rngs is None or self.deterministic:
            return x
        keep = jax.random.bernoulli(self.rngs(), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - self.rate), 0)


class LayerScale(nnx.Module):
    """Scale every channel by a learned factor, small at first: a deep network starts near the identity.

    y = gamma x

    Args:
      features: channels C.
      init: what gamma (C,) is at first.
      param_dtype: of gamma.
      rngs: unused, here because every layer takes it.

    Returns (of a call): shape and dtype of x, which is (..., C).

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.nn import LayerScale
      >>> LayerScale(2, init=0.5)(jnp.ones((1, 2)))
      Array([[0.5, 0.5]], dtype=float32)

    Source: Touvron et al., Going deeper with Image Transformers, arXiv:2103.17239, equation 4.
    """

    def __init__(
        self,
        features: int,
        *,
        init: float = 1e-6,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.gamma = nnx.Param(jnp.full(features, init, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)
