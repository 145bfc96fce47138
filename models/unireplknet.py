"""UniRepLKNet: a network of few, large kernels that merges into a plainer one after training."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.nn import (
    GRN,
    BatchNorm,
    DepthwiseConv,
    DilatedReparamConv,
    DropPath,
    LayerScale,
    SqueezeExcite,
    fold_batch_norm,
)

# The published code cuts this normal off at +-2, a hundred standard deviations away.
_INIT = nnx.initializers.normal(0.02)


class UniRepLKNet(nnx.Module):
    """A pyramid of large depthwise convolutions, squeeze and excite, and inverted bottlenecks.

    Each block is x + gamma * BN(W2 GRN(GELU(W1 SE(BN(dw(x)))))), where dw is a `DilatedReparamConv` for a
    kernel of 7 or more, else a plain depthwise convolution. `merge` returns the same function in its deploy
    form: without any BatchNorm, branch or layer scale.

    Args:
      depths: number of blocks in each stage.
      dims: channels of each stage; the first stage sees the image at 1/4 of its size, each next one at half.
      kernel_sizes: for each stage K, or a pattern of Ks that its blocks repeat; odd, 3 or more.
      num_classes: outputs of the head; None makes a backbone: no head, a LayerNorm on each stage's output.
      in_channels: channels of the image.
      drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
      layer_scale: initial gamma.
      deploy: build the deploy form, for the parameters of a merged network.
      dtype: of the computation; None takes what the input and the parameters promote to.
      param_dtype: of the parameters.
      implementation: as in `pallas_kernels.depthwise_conv`.
      rngs: random streams.

    Returns (of a call): logits (N, num_classes) for images (N, H, W, in_channels); of a backbone, `features`.

    Raises:
      ValueError: depths, dims and kernel_sizes of different lengths; a kernel size that is even or less than 3, or
        has no table of branches; from a call, images of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.models.unireplknet import UniRepLKNet, merge
      >>> model = UniRepLKNet((1, 1), (8, 16), (3, 13), num_classes=10, rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> merge(model)(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)

    Source: Ding et al., UniRepLKNet, arXiv:2311.15599, section 3 and table 2; arXiv:2410.08049.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: Sequence[int | Sequence[int]],
        *,
        num_classes: int | None = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        deploy: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if not len(depths) == len(dims) == len(kernel_sizes):
            raise ValueError(
                f"got {depths=}, {dims=}, {kernel_sizes=}, expected the same number of stages in each"
            )
        patterns = [tuple(k) if np.iterable(k) else (k,) for k in kernel_sizes]
        if not all(p and all(map(_is_kernel_size, p)) for p in patterns):
            raise ValueError(f"got {kernel_sizes=}, expected odd ints, 3 or more, for every stage")
        self.in_channels = in_channels
        self.num_classes = num_classes

        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(nnx.LayerNorm, epsilon=1e-6, **options)
        # "SAME" would pad an even size by (0, 1) at stride 2.
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), strides=2, padding=((1, 1), (1, 1)), kernel_init=_INIT, **options
        )
        block = functools.partial(
            Block, layer_scale=layer_scale, deploy=deploy, implementation=implementation, **options
        )

        half = dims[0] // 2
        stem = nnx.Sequential(conv(in_channels, half), norm(half), _gelu, conv(half, dims[0]), norm(dims[0]))
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.downsample_layers = nnx.data(
            [stem, *(nnx.Sequential(conv(c, d), norm(d)) for c, d in itertools.pairwise(dims))]
        )
        self.stages = nnx.data(
            [
                [block(dim, kernels[j % len(kernels)], drop_path=next(rates)) for j in range(depth)]
                for depth, dim, kernels in zip(depths, dims, patterns, strict=True)
            ]
        )
        if num_classes is None:
            self.norms = nnx.data([norm(dim) for dim in dims])
        else:
            self.norm = norm(dims[-1])
            self.head = nnx.Linear(dims[-1], num_classes, kernel_init=_INIT, **options)

    def __call__(self, x: jax.Array) -> Any:
        features = self.features(x)
        if self.num_classes is None:
            return features
        return self.head(self.norm(jnp.mean(features[-1], axis=(1, 2))))

    def features(self, x: jax.Array) -> list[jax.Array]:
        """Every stage's output, first (N, H / 4, W / 4, dims[0]); a backbone's through their LayerNorms."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"got images of shape {x.shape}, expected (N, H, W, {self.in_channels})")
        outputs = []
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in blocks:
                x = block(x)
            outputs.append(x)
        if self.num_classes is None:
            return [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        return outputs


class Block(nnx.Module):
    """One residual block of `UniRepLKNet`, which has the arguments; in training or in deploy form."""

    def __init__(
        self,
        features: int,
        kernel_size: int,
        *,
        drop_path: float,
        layer_scale: float,
        deploy: bool,
        dtype: Any,
        param_dtype: Any,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": _INIT, "rngs": rngs}
        if kernel_size >= 7 and not deploy:
            self.dwconv = DilatedReparamConv(features, kernel_size, implementation=implementation, **options)
        else:
            self.dwconv = DepthwiseConv(
                features, kernel_size, use_bias=deploy, implementation=implementation, **options
            )
        norm = functools.partial(BatchNorm, features, param_dtype=param_dtype, rngs=rngs)
        self.norm = nnx.data(None if deploy else norm())
        self.se = SqueezeExcite(features, features // 4, **options)
        self.pwconv1 = nnx.Linear(features, 4 * features, **options)
        self.grn = GRN(4 * features, use_bias=not deploy, param_dtype=param_dtype)
        self.pwconv2 = nnx.Linear(4 * features, features, use_bias=deploy, **options)
        self.norm2 = nnx.data(None if deploy else norm())
        self.layer_scale = nnx.data(
            None if deploy else LayerScale(features, init=layer_scale, param_dtype=param_dtype)
        )
        self.drop_path = nnx.data(None if deploy else DropPath(drop_path, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.dwconv(x)
        y = y if self.norm is None else self.norm(y)
        y = self.pwconv2(self.grn(_gelu(self.pwconv1(self.se(y)))))
        for layer in (self.norm2, self.layer_scale, self.drop_path):
            y = y if layer is None else layer(y)
        return x + y


def merge(model: UniRepLKNet) -> UniRepLKNet:
    """The deploy form of a trained network: the same function in inference, with fewer and plainer layers.

    Each convolution absorbs its BatchNorms and branches; GRN's beta, the second BatchNorm and the layer scale
    move into the kernel and the bias of the block's last Linear. Computed in float32 (float64 for float64
    parameters) and rounded once to the dtype of the parameters.

    Args:
      model: in training form. It is left as it is.

    Returns:
      A network that equals `UniRepLKNet(..., deploy=True)` but for the values of its parameters.

    Raises:
      ValueError: the network is in deploy form already.

    Example:
      >>> from flax import nnx
      >>> from pallas_kernels.models.unireplknet import UniRepLKNet, merge
      >>> model = UniRepLKNet((1,), (8,), (13,), rngs=nnx.Rngs(0))
      >>> merge(model).stages[0][0].dwconv.kernel.shape
      (13, 13, 8)

    Source: Ding et al., UniRepLKNet, arXiv:2311.15599, section 3.1.
    """
    model = nnx.clone(model)
    for block in (block for blocks in model.stages for block in blocks):
        _merge_block(block)
    return model


def _merge_block(block: Any) -> None:
    if block.norm is None:
        raise ValueError("got a network in deploy form, expected one in training form")
    block.dwconv = block.dwconv.merge(block.norm)

    linear = block.pwconv2
    dtype = linear.kernel[...].dtype
    kernel = linear.kernel[...].astype(block.norm2.mean[...].dtype)
    # Accelerators would round the operands of a product at default precision.
    from_beta = jnp.dot(block.grn.beta[...].astype(kernel.dtype), kernel, precision="highest")
    kernel, bias = fold_batch_norm(kernel, from_beta, block.norm2)
    gamma = block.layer_scale.gamma[...]
    linear.kernel = nnx.Param((kernel * gamma).astype(dtype))
    linear.bias = nnx.Param((bias * gamma).astype(dtype))
    linear.use_bias = True

    block.norm = block.grn.beta = block.norm2 = block.layer_scale = block.drop_path = None


def _is_kernel_size(k: Any) -> bool:
    return isinstance(k, int | np.integer) and bool(k % 2 == 1 and k >= 3)


def _gelu(x: jax.Array) -> jax.Array:
    return nnx.gelu(x, approximate=False)


# Depths, channels of the first stage (which double from stage to stage), kernel sizes of the third stage.
_VARIANTS = {
    "a": ((2, 2, 6, 2), 40, (13,)),
    "f": ((2, 2, 6, 2), 48, (13,)),
    "p": ((2, 2, 6, 2), 64, (13,)),
    "n": ((2, 2, 8, 2), 80, (13,)),
    "t": ((3, 3, 18, 3), 80, (13, 3)),
    "s": ((3, 3, 27, 3), 96, (13, 3, 3)),
    "b": ((3, 3, 27, 3), 128, (13, 3, 3)),
    "l": ((3, 3, 27, 3), 192, (13, 3, 3)),
    "xl": ((3, 3, 27, 3), 256, (13, 3, 3)),
}

MODELS = {
    f"unireplknet_{variant}": functools.partial(
        UniRepLKNet, depths=depths, dims=tuple(dim << i for i in range(4)), kernel_sizes=(3, 13, third, 13)
    )
    for variant, (depths, dim, third) in _VARIANTS.items()
}
