"""Batch normalization, and how it disappears into the linear map before it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class BatchNorm(nnx.BatchNorm):
    """Flax's BatchNorm over the last axis, in float32 or better whatever the dtype of the parameters.

    Flax keeps the running statistics in float32, but since 0.12 rounds them to `dtype` before it subtracts
    the mean, and without a `dtype` returns float32 for a bfloat16 input. This layer computes in the dtype of
    its statistics and returns the dtype of its input, on every version.

    Args:
      features: channels C.
      momentum: weight of the old running statistics in the new.
      epsilon: added to the variance.
      param_dtype: dtype of scale and bias; statistics have this dtype too where it is wider than float32.
      rngs: random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import BatchNorm
      >>> BatchNorm(8, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 8), jnp.bfloat16)).dtype
      dtype(bfloat16)

    Source: Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167, algorithm 1.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, momentum=momentum, epsilon=epsilon, param_dtype=param_dtype, rngs=rngs)
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(features, dtype))
        self.var = nnx.BatchStat(jnp.ones(features, dtype))

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, self.mean[...].dtype))
        return super().__call__(wide, use_running_average, mask=mask).astype(x.dtype)


def fold_batch_norm(
    kernel: jax.Array, bias: jax.Array | float, norm: nnx.BatchNorm
) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of one linear map that equals a linear map followed by a BatchNorm in inference.

    With s = scale / sqrt(var + epsilon): kernel' = kernel * s and bias' = norm.bias + (bias - mean) * s.

    Args:
      kernel: (..., C), output channels last: of a depthwise convolution, a convolution or a Linear.
      bias: (C,), or 0.
      norm: a BatchNorm over the C channels; a scale that it lacks is 1, a bias 0.

    Returns:
      (kernel', bias') in the dtype of the statistics, float32 or wider, so that several folds round once.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import BatchNorm, fold_batch_norm
      >>> kernel, bias = fold_batch_norm(jnp.ones((5, 5, 8)), 0.0, BatchNorm(8, rngs=nnx.Rngs(0)))
      >>> kernel.shape, bias.shape
      ((5, 5, 8), (8,))

    Source: Ding et al., RepVGG, arXiv:2101.03697, equation 3.
    """
    gamma = 1.0 if norm.scale is None else norm.scale[...]
    beta = 0.0 if norm.bias is None else norm.bias[...]
    scale = gamma / jnp.sqrt(norm.var[...] + norm.epsilon)
    return kernel * scale, beta + (bias - norm.mean[...]) * scale
