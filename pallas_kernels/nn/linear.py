"""Linear layers whose matrices are of low rank, as a whole or block by block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.ops import blast_matmul, low_rank_matmul, monarch_matmul

_ZEROS = jax.nn.initializers.zeros


class _FactoredLinear(nnx.Module):
    """What the layers share: a bias, dtypes, and the way back to a dense layer."""

    FACTORS: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        blocks: int = 4,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_std: float | None = None,
        bias_init: nnx.Initializer = _ZEROS,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise ValueError(
                f"got {in_features} to {out_features} features, expected multiples of blocks={blocks}"
            )
        p, q = in_features // blocks, out_features // blocks
        full = self._full_rank(p, q, blocks)
        if not 1 <= rank <= full:
            raise ValueError(f"got {rank=}, expected 1 to {full}, the rank of a full block")
        self.in_features, self.out_features, self.rank, self.blocks = in_features, out_features, rank, blocks
        for name, (shape, variance) in self._shapes(p, q, rank, blocks).items():
            if kernel_std is not None and name == self.FACTORS[-1]:
                variance *= kernel_std**2 * in_features
            draw = nnx.initializers.normal(variance**0.5)
            setattr(self, name, nnx.Param(draw(rngs.params(), shape, param_dtype)))
        bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)
        self.dtype, self.implementation = dtype, implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"got x of shape {x.shape}, expected (..., {self.in_features})")
        factors = self._factors()
        dtype = self.dtype or jnp.result_type(x, *factors)
        y = self._multiply(x.astype(dtype), *factors)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def to_dense(self) -> jax.Array:
        """The matrix (in_features, out_features) that the factors stand for."""
        return self._to_dense(*self._factors())

    def _factors(self) -> list[jax.Array]:
        return [getattr(self, name)[...] for name in self.FACTORS]

    def _full_rank(self, p: int, q: int, blocks: int) -> int:
        return blocks * min(p, q)

    def _shapes(self, p: int, q: int, rank: int, blocks: int) -> dict[str, Any]:
        """Of each factor its shape, and the variance of its entries with which x and y have the same."""
        raise NotImplementedError

    def _multiply(self, x: jax.Array, *factors: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _to_dense(self, *factors: jax.Array) -> jax.Array:
        raise NotImplementedError


class MonarchLinear(_FactoredLinear):
    """A linear layer with a Monarch matrix: each of blocks x blocks blocks has a low rank of its own.

    y = pallas_kernels.monarch_matmul(x, w1, w2) + bias. At first the variance of y is that of a dense layer.

    Parameters: w1 (blocks, blocks rank, in_features / blocks), w2 (blocks, blocks rank, out_features / blocks), bias.

    Args:
      in_features, out_features: multiples of `blocks`.
      rank: of a block.
      blocks: along each side.
      use_bias: whether to add a bias.
      dtype: of the computation; None takes what the input and the factors promote to.
      param_dtype: of the parameters.
      kernel_std: standard deviation of the matrix's entries at first; None: 1 / sqrt(in_features), as in `nnx.Linear`.
      bias_init: initializer.
      implementation: as in `pallas_kernels.monarch_matmul`.
      rngs: random streams.

    Returns (of a call): (..., out_features) for x of shape (..., in_features).

    Raises:
      ValueError: the features don't divide into blocks, or the rank is 0 or above that of a full block.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import MonarchLinear
      >>> MonarchLinear(64, 96, rank=4, blocks=4, rngs=nnx.Rngs(0))(jnp.ones((2, 64))).shape
      (2, 96)

    Source: Dao et al., Monarch, arXiv:2204.00595.
    """

    FACTORS = ("w1", "w2")

    def _full_rank(self, p: int, q: int, blocks: int) -> int:
        return min(p, q)

    def _shapes(self, p: int, q: int, rank: int, blocks: int) -> dict[str, Any]:
        ranks = blocks * rank
        return {"w1": ((blocks, ranks, p), 1 / p), "w2": ((blocks, ranks, q), 1 / ranks)}

    def _multiply(self, x: jax.Array, *factors: jax.Array) -> jax.Array:
        return monarch_matmul.monarch_matmul(x, *factors, implementation=self.implementation)

    def _to_dense(self, *factors: jax.Array) -> jax.Array:
        return monarch_matmul.to_dense(*factors)


class BlastLinear(_FactoredLinear):
    """A linear layer with a BLAST matrix: blocks of low rank that share their bases along rows and columns.

    y = pallas_kernels.blast_matmul(x, u, s, v) + bias. At first the variance of y is that of a dense layer.

    Parameters: u (blocks, rank, out_features / blocks), s (blocks, blocks, rank), v (blocks, rank, in_features /
    blocks), bias.

    Args:
      in_features, out_features: multiples of `blocks`.
      rank: that all blocks share.
      blocks: along each side.
      use_bias, dtype, param_dtype, kernel_std, bias_init, implementation, rngs: as in `MonarchLinear`.

    Returns (of a call): (..., out_features) for x of shape (..., in_features).

    Raises:
      ValueError: the features don't divide into blocks, or the rank is 0 or above that of the full matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import BlastLinear
      >>> BlastLinear(64, 96, rank=16, blocks=4, rngs=nnx.Rngs(0))(jnp.ones((2, 64))).shape
      (2, 96)

    Source: Lee et al., BLAST, arXiv:2410.21262.
    """

    FACTORS = ("u", "s", "v")

    def _shapes(self, p: int, q: int, rank: int, blocks: int) -> dict[str, Any]:
        return {
            "u": ((blocks, rank, q), 1 / (blocks * rank)),
            "s": ((blocks, blocks, rank), 1.0),
            "v": ((blocks, rank, p), 1 / p),
        }

    def _multiply(self, x: jax.Array, *factors: jax.Array) -> jax.Array:
        return blast_matmul.blast_matmul(x, *factors, implementation=self.implementation)

    def _to_dense(self, *factors: jax.Array) -> jax.Array:
        return blast_matmul.to_dense(*factors)


class LowRankLinear(_FactoredLinear):
    """A linear layer with a matrix of low rank.

    y = pallas_kernels.low_rank_matmul(x, u, v) + bias. At first the variance of y is that of a dense layer.

    Parameters: u (rank, out_features), v (rank, in_features), bias.

    Args:
      in_features, out_features: of the layer.
      rank: of its matrix.
      use_bias, dtype, param_dtype, kernel_std, bias_init, implementation, rngs: as in `MonarchLinear`.

    Returns (of a call): (..., out_features) for x of shape (..., in_features).

    Raises:
      ValueError: the rank is 0 or above that of the full matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import LowRankLinear
      >>> LowRankLinear(64, 96, rank=16, rngs=nnx.Rngs(0))(jnp.ones((2, 64))).shape
      (2, 96)
    """

    FACTORS = ("u", "v")

    def __init__(self, in_features: int, out_features: int, *, rank: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(in_features, out_features, rank=rank, blocks=1, rngs=rngs, **options)

    def _shapes(self, p: int, q: int, rank: int, blocks: int) -> dict[str, Any]:
        return {"u": ((rank, q), 1 / rank), "v": ((rank, p), 1 / p)}

    def _multiply(self, x: jax.Array, *factors: jax.Array) -> jax.Array:
        return low_rank_matmul.low_rank_matmul(x, *factors, implementation=self.implementation)

    def _to_dense(self, *factors: jax.Array) -> jax.Array:
        return low_rank_matmul.to_dense(*factors)
