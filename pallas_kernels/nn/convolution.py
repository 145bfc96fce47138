"""Depthwise convolutions as layers, plain and with the branches that help large kernels to train."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.nn.normalization import BatchNorm, fold_batch_norm
from pallas_kernels.ops.depthwise_conv import Padding, depthwise_conv

Branches = tuple[tuple[int, int], ...]

_LECUN_NORMAL = nnx.initializers.lecun_normal()

# For each kernel size, the (size, dilation) of the branches that train beside it.
BRANCHES: dict[str, dict[int, Branches]] = {
    "unireplknet": {
        5: ((3, 1), (3, 2)),
        7: ((5, 1), (3, 2), (3, 3)),
        9: ((5, 1), (5, 2), (3, 3), (3, 4)),
        11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
        13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    },
    "overlock": {
        5: ((3, 1), (3, 2)),
        7: ((5, 1), (3, 1), (3, 2), (3, 3)),
        9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
        11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
        13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
        19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    },
}


class DepthwiseConv(nnx.Module):
    """Convolve every channel with a kernel of its own: `pallas_kernels.depthwise_conv` with its parameters.

    y[n, i, j, c] = bias[c] + sum_{a, b} kernel[a, b, c] x[n, i * stride + a * dilation - pad, j * ..., c]

    Parameters: kernel (KH, KW, C), or (K, C) in one dimension; bias (C,).

    Args:
      features: channels C.
      kernel_size: K for a square of two dimensions, (KH, KW), or (K,) for one dimension.
      strides, padding, dilation, implementation: as in `pallas_kernels.depthwise_conv`.
      use_bias: whether to add a bias.
      dtype: of the computation; None takes what the input and the parameters promote to.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers.
      rngs: random streams.

    Returns (of a call): (N, H', W', C) for x (N, H, W, C); (N, L', C) for x (N, L, C) in one dimension.

    Raises:
      ValueError: from a call, if x has not the C channels or the number of dimensions of the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import DepthwiseConv
      >>> DepthwiseConv(8, 13, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
      (2, 14, 14, 8)

    Source: Chollet, Xception, arXiv:1610.02357; large kernels: Ding et al., RepLKNet, arXiv:2203.06717.
    """

    def __init__(
        self,
        features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _LECUN_NORMAL,
        bias_init: nnx.Initializer = jax.nn.initializers.zeros,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        size = _hashable(kernel_size)
        self.kernel_size = (size,) * 2 if isinstance(size, int) else size
        if len(self.kernel_size) not in (1, 2):
            raise ValueError(f"got kernel_size={kernel_size}, expected one or two dimensions")
        shape = (*self.kernel_size, features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(
            nnx.Param(bias_init(rngs.params(), (features,), param_dtype)) if use_bias else None
        )
        self.strides, self.padding, self.dilation = map(_hashable, (strides, padding, dilation))
        self.dtype = dtype
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if x.ndim != kernel.ndim + 1 or x.shape[-1] != kernel.shape[-1]:
            spatial = ("H", "W") if kernel.ndim == 3 else ("L",)
            raise ValueError(
                f"got x of shape {x.shape}, expected ({', '.join(('N', *spatial))}, {kernel.shape[-1]})"
            )
        dtype = self.dtype or jnp.result_type(x, kernel)
        return depthwise_conv(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            bias=None if self.bias is None else self.bias[...].astype(dtype),
            implementation=self.implementation,
        )

    def merge(self, norm: nnx.BatchNorm) -> "DepthwiseConv":
        """The one convolution, with a bias, that this layer followed by `norm` is in inference."""
        bias = 0.0 if self.bias is None else self.bias[...]
        return self._replace(*fold_batch_norm(self.kernel[...], bias, norm))

    def _replace(self, kernel: jax.Array, bias: jax.Array) -> "DepthwiseConv":
        conv = nnx.clone(self)
        dtype = self.kernel[...].dtype
        conv.kernel, conv.bias = nnx.Param(kernel.astype(dtype)), nnx.Param(bias.astype(dtype))
        return conv


def _hashable(option: Any) -> Any:
    """As Flax hashes and compares it: Python's numbers, sequences as tuples. The operator checks what they hold."""
    if isinstance(option, np.generic):
        return option.item()
    if isinstance(option, str) or not np.iterable(option):
        return option
    return tuple(map(_hashable, option))


class DilatedReparamConv(nnx.Module):
    """A large depthwise convolution that trains with small dilated ones beside it, and merges into one.

    y = BN_0(x * w_K) + sum_b BN_b(x *_{r_b} w_b), every convolution depthwise, "SAME" and without bias; *_r
    is dilated by r. In inference the sum is one K x K convolution with a bias, which `merge` returns.

    Args:
      features: channels C.
      kernel_size: K, odd.
      branches: the ((k, r), ...) of the small convolutions, or whose table of `BRANCHES` to look K up in.
      dtype: of the computation; None takes what the input and the parameters promote to.
      param_dtype: of the parameters.
      kernel_init: initializer of all kernels.
      implementation: as in `pallas_kernels.depthwise_conv`.
      rngs: random streams.

    Returns (of a call): (N, H, W, C) for x of shape (N, H, W, C).

    Raises:
      ValueError: no table of that name, K not in the table, or a branch that does not fit inside K x K.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import DilatedReparamConv
      >>> conv = DilatedReparamConv(8, 13, rngs=nnx.Rngs(0))
      >>> conv.eval()
      >>> x = jnp.ones((1, 14, 14, 8))
      >>> bool(jnp.allclose(conv(x), conv.merge()(x), atol=1e-5))
      True

    Source: Ding et al., UniRepLKNet, arXiv:2311.15599, section 3.1; Lou and Yu, OverLoCK, arXiv:2502.20087.
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        *,
        branches: str | Branches = "unireplknet",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _LECUN_NORMAL,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.branches = _branches(kernel_size, branches)
        options = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation, "rngs": rngs}
        for (k, r), (conv, norm) in zip(((kernel_size, 1), *self.branches), self._names(), strict=True):
            layer = DepthwiseConv(features, k, dilation=r, use_bias=False, kernel_init=kernel_init, **options)
            setattr(self, conv, layer)
            setattr(self, norm, BatchNorm(features, param_dtype=param_dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return sum(norm(conv(x)) for conv, norm in self._pairs())  # pyright: ignore[reportReturnType]

    def merge(self, norm: nnx.BatchNorm | None = None) -> DepthwiseConv:
        """The one convolution, with a bias, that this layer (and then `norm`, if given) is in inference.

        Args:
          norm: a BatchNorm over the C channels that follows.

        Returns:
          The convolution; its parameters are computed in the statistics' dtype and rounded once.
        """
        (large, large_norm), *small = self._pairs()
        kernel, bias = fold_batch_norm(large.kernel[...], 0.0, large_norm)
        size = kernel.shape[0]
        for (k, r), (conv, conv_norm) in zip(self.branches, small, strict=True):
            w, b = fold_batch_norm(conv.kernel[...], 0.0, conv_norm)
            extent = (k - 1) * r + 1
            taps = slice((size - extent) // 2, (size + extent) // 2, r)
            kernel, bias = kernel.at[taps, taps].add(w), bias + b
        return large._replace(*((kernel, bias) if norm is None else fold_batch_norm(kernel, bias, norm)))

    def _names(self) -> list[tuple[str, str]]:
        """The attributes, named as the keys of the published checkpoints."""
        return [
            ("lk_origin", "origin_bn"),
            *((f"dil_conv_k{k}_{r}", f"dil_bn_k{k}_{r}") for k, r in self.branches),
        ]

    def _pairs(self) -> list[tuple[DepthwiseConv, BatchNorm]]:
        return [(getattr(self, conv), getattr(self, norm)) for conv, norm in self._names()]


def _branches(kernel_size: int, branches: str | Branches) -> Branches:
    if isinstance(branches, str):
        if branches not in BRANCHES:
            raise ValueError(
                f"got branches={branches!r}, expected one of {sorted(BRANCHES)} or ((size, dilation), ...)"
            )
        if kernel_size not in BRANCHES[branches]:
            raise ValueError(
                f"got kernel_size={kernel_size}, expected one of {sorted(BRANCHES[branches])}, "
                f"which {branches!r} has branches for; or give the branches"
            )
        return BRANCHES[branches][kernel_size]
    for k, r in branches:
        extent = (k - 1) * r + 1
        if extent > kernel_size or (kernel_size - extent) % 2:
            raise ValueError(
                f"got a branch of size {k} and dilation {r}, which spans {extent}, "
                f"expected a span of the parity of, and no wider than, kernel_size={kernel_size}"
            )
    return tuple((k, r) for k, r in branches)
