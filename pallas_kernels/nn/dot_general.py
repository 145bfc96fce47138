"""Matrices in factors for stock Flax layers, by the function that those take as `dot_general=`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class DotGeneral(nnx.Module):
    """A matrix in factors that a stock Flax layer multiplies by, instead of by its kernel.

    dot_general(x, kernel, ...) = product(x, **factors), with the shape that x and the kernel ask for. What the kernel
    holds has no part in it: Flax makes one array of a kernel, so the factors are parameters of this module, which
    is a part of the layer. `install` gives the layer a kernel without rows; a layer that is made with `dot_general=` of
    such a module also keeps the kernel it has drawn, whose gradient is 0.

    Args:
      product: `pallas_kernels.monarch_matmul`, `blast_matmul` or `low_rank_matmul`, or a `functools.partial` of one.
      **factors: by the names of its arguments; arrays become `nnx.Param`s, and `nnx.Variable`s stay what they are, as
        is needed for int8 weights.

    Returns (of a call): what `jax.lax.dot_general` does, in the dtype of x, or in `preferred_element_type`.

    Raises:
      ValueError: from a call, products of batches, or contracted axes of a kernel that are not its first;
        what the product raises.
      NotImplementedError: from a call, an `out_sharding`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import pallas_kernels as pk
      >>> from pallas_kernels.nn import DotGeneral
      >>> attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
      >>> factors = DotGeneral(pk.low_rank_matmul, u=jnp.ones((3, 32)), v=jnp.ones((3, 32)))
      >>> factors.install(attention.query)
      >>> attention(jnp.ones((2, 5, 32))).shape
      (2, 5, 32)
    """

    def __init__(self, product: Callable[..., jax.Array], **factors: Any):
        self.product, self.names = product, tuple(factors)
        for name, factor in factors.items():
            setattr(self, name, factor if isinstance(factor, nnx.Variable) else nnx.Param(factor))

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        (axes, rows), batch = dimension_numbers
        if any(batch) or tuple(rows) != tuple(range(len(rows))):
            raise ValueError(f"got {dimension_numbers=}, expected no batch, and the first axes of the kernel")
        if out_sharding is not None:
            raise NotImplementedError(f"got {out_sharding=}; products of factors take none")
        dtype = preferred_element_type or lhs.dtype
        x = jnp.moveaxis(lhs.astype(jnp.promote_types(lhs.dtype, dtype)), axes, range(-len(axes), 0))
        shape = x.shape[: lhs.ndim - len(axes)]
        x = x.reshape(*shape, math.prod(x.shape[len(shape) :]))
        y = self.product(x, **{name: getattr(self, name)[...] for name in self.names})
        return y.astype(dtype).reshape(*shape, *rhs.shape[len(rows) :])

    def install(self, layer: nnx.Linear | nnx.LinearGeneral) -> None:
        """Let a layer multiply by these factors, and take away what its kernel holds.

        Raises:
          ValueError: the factors make a matrix of another shape, or the layer has a matrix for each of a batch.
        """
        kernel = layer.kernel[...]
        general = isinstance(layer, nnx.LinearGeneral)
        if general and layer.batch_axis:
            raise ValueError("got a layer with a matrix for each of a batch, expected one matrix")
        inputs = len(layer.in_features) if general else 1
        x = jax.ShapeDtypeStruct((1, math.prod(kernel.shape[:inputs])), kernel.dtype)
        factors = {name: getattr(self, name)[...] for name in self.names}
        outputs = jax.eval_shape(lambda x: self.product(x, **factors), x).shape[1]
        if outputs != math.prod(kernel.shape[inputs:]):
            raise ValueError(
                f"got factors for {outputs} outputs, expected those of a kernel of {kernel.shape}"
            )
        layer.kernel = like(layer.kernel, jnp.zeros((0,) * inputs + kernel.shape[inputs:], kernel.dtype))
        layer.dot_general = nnx.data(self)


def like(variable: nnx.Variable, value: jax.Array) -> Any:
    """A variable of the same kind and metadata, but for its sharding: that is of the axes of another shape."""
    metadata = {k: v for k, v in variable.get_metadata().items() if "sharding" not in k and k != "mesh"}
    return type(variable)(value, **metadata)
