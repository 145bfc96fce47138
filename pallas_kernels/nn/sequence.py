"""Layers that mix a sequence by convolutions as long as it is."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.nn.convolution import DepthwiseConv
from pallas_kernels.ops.fft_conv import fft_conv
from pallas_kernels.ops.sgconv_kernel import Combine, Interpolation, sgconv_kernel


class KernelNorm(nnx.Variable):
    """What a kernel is divided by: computed once, never trained."""


def _check_positive(**sizes: int) -> None:
    if wrong := ", ".join(f"{name}={size}" for name, size in sizes.items() if size < 1):
        raise ValueError(f"sizes must be positive, got {wrong}")


class _LongMixer(nnx.Module):
    """Convolve by `kernel()`, weigh in the input, then GELU, dropout and a linear map or its gated form.

    Subclasses make the kernels, (directions, K, channels * features), in their own way.
    """

    def __init__(
        self, features: int, *, channels: int, bidirectional: bool, dropout: float, glu: bool, dtype: Any,
        param_dtype: Any, implementation: str | None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.features, self.channels, self.bidirectional = features, channels, bidirectional
        self.skip = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), (channels * features,), param_dtype)
        )
        # One draw for all of the sequence, as the mask of a channel.
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1,), rngs=rngs)
        self.glu = glu
        self.out = nnx.Linear(
            channels * features, features << glu, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dtype = dtype
        self.implementation = implementation

    def kernel(self, length: int) -> jax.Array:
        """The kernels of a sequence of that length, (directions, K, channels * features)."""
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"got x of shape {x.shape}, expected (B, L, {self.features})")
        k = self.kernel(x.shape[1])
        dtype = self.dtype or jnp.result_type(x, self.skip[...])
        y = fft_conv(
            jnp.tile(x.astype(dtype), self.channels),
            k if self.bidirectional else k[0],
            skip=self.skip[...],
            mode="bidirectional" if self.bidirectional else "causal",
            implementation=self.implementation,
        )
        y = self.out(self.dropout(nnx.gelu(y, approximate=False)))
        return nnx.glu(y) if self.glu else y


class SGConv(_LongMixer):
    """Structured global convolution: a mixer whose kernels grow with the logarithm of the sequence.

    y = out(gelu(skip x + sgconv_kernel(weights) * x)), every channel convolved by itself, `out` linear or gated.

    Parameters: weights (S, directions, kernel_dim, channels C), skip (channels C,), those of `out`, and decay
    (channels C,) if it is learnable. Variable: kernel_norm, the L2 norm over the taps of the first kernels.

    Args:
      features: channels C.
      length: of the sequences; the number of scales is S = 1 + ceil(log2(length / kernel_dim)) - init_scale.
      kernel_dim: weights for each scale.
      decay: (low, high): what scales are weighted by, or with `power_decay` the exponents; spread over channels.
      power_decay: None: scales are weighted; "learnable" or "fixed": taps are, by a power of their time.
      init: "randn", or "cos": cosines whose frequency is the channel's number.
      combine, interpolation, init_scale: as in `pallas_kernels.sgconv_kernel`.
      bidirectional: a second kernel looks ahead.
      channels: kernels for each channel.
      glu: whether `out` is gated.
      dropout: rate before `out`, of whole channels.
      dtype, param_dtype: of the computation, and of the parameters.
      implementation: as in `pallas_kernels.fft_conv`.
      rngs: random streams.

    Returns (of a call): (B, L, C) for x (B, L, C).

    Raises:
      ValueError: an option is unknown, a size is not positive, or no scale is left; from a call, x of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import SGConv
      >>> SGConv(8, length=100, kernel_dim=4, rngs=nnx.Rngs(0))(jnp.ones((2, 100, 8))).shape
      (2, 100, 8)

    Source: Li et al., What Makes Convolutional Models Great on Long Sequence Modeling?, arXiv:2210.09298, section 3.
    """

    def __init__(
        self,
        features: int,
        *,
        length: int,
        kernel_dim: int = 64,
        decay: tuple[float, float] = (2.0, 2.0),
        power_decay: Literal["learnable", "fixed"] | None = None,
        init: Literal["randn", "cos"] = "randn",
        combine: Combine = "cat",
        interpolation: Interpolation = "linear",
        init_scale: int = 0,
        bidirectional: bool = False,
        channels: int = 1,
        glu: bool = False,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check_positive(features=features, length=length, kernel_dim=kernel_dim, channels=channels)
        super().__init__(
            features, channels=channels, bidirectional=bidirectional, dropout=dropout, glu=glu, dtype=dtype,
            param_dtype=param_dtype, implementation=implementation, rngs=rngs,
        )  # fmt: skip
        scales = 1 + math.ceil(math.log2(length / kernel_dim)) - init_scale
        if scales < 1 or init not in ("randn", "cos") or power_decay not in (None, "learnable", "fixed"):
            raise ValueError(
                f"got {scales} scales, init={init!r} and power_decay={power_decay!r}, expected 1 or more, "
                "'randn' or 'cos', and None, 'learnable' or 'fixed'"
            )
        self.combine: Combine = combine
        self.interpolation: Interpolation = interpolation
        self.init_scale = init_scale
        shape = scales, 1 + bidirectional, kernel_dim, channels * features
        if init == "randn":
            weights = jax.random.normal(rngs.params(), shape, param_dtype)
        else:
            frequencies = jax.random.permutation(rngs.params(), features)
            cosines = jnp.cos(jnp.linspace(0, 2 * np.pi * frequencies, kernel_dim))
            weights = jnp.broadcast_to(jnp.tile(cosines, channels), shape).astype(param_dtype)
        self.weights = nnx.Param(weights)
        spread = np.tile(np.linspace(*decay, features), channels)
        self.multiplier = 1.0 if power_decay else tuple(spread.tolist())
        exponents = None
        if power_decay:
            draw = jax.random.uniform(rngs.params(), spread.shape, param_dtype, *decay)
            exponents = nnx.Param(draw) if power_decay == "learnable" else nnx.Variable(draw)
        self.decay = nnx.data(exponents)
        self.kernel_norm = KernelNorm(jnp.linalg.norm(self._kernel(), axis=-2, keepdims=True))

    def kernel(self, length: int) -> jax.Array:
        return self._kernel(norm=self.kernel_norm[...], length=length)

    def _kernel(self, **options: Any) -> jax.Array:
        weights = self.weights[...]
        return sgconv_kernel(
            weights,
            multiplier=jnp.asarray(self.multiplier, weights.dtype),
            decay=None if self.decay is None else self.decay[...],
            init_scale=self.init_scale,
            combine=self.combine,
            interpolation=self.interpolation,
            **options,
        )


class LongConv(_LongMixer):
    """A mixer with a parameter for every tap, kept sparse or smooth.

    k = dropout(squash(smooth(kernel))), with squash(k) = sign(k) max(|k| - squash, 0) and smooth the mean over a
    window of taps, or of the real transform's bins with Gaussian weights; then as `SGConv`.

    Parameters: taps (directions, length, channels C), skip (channels C,), and those of `out`.

    Args:
      features: channels C.
      length: of the kernels.
      squash: what the size of every tap is lowered by.
      smooth: None, "time" or "frequency". window: taps or bins.
      kernel_dropout: rate among taps.
      init: "random": normal, small; "double_exp": exponentials, a decay of its own for each channel.
      bidirectional, channels, glu, dropout, dtype, param_dtype, implementation, rngs: as in `SGConv`.

    Returns (of a call): (B, L, C) for x (B, L, C).

    Raises:
      ValueError: an option is unknown, or a size is not positive; from a call, x of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import LongConv
      >>> LongConv(8, length=100, rngs=nnx.Rngs(0))(jnp.ones((2, 100, 8))).shape
      (2, 100, 8)

    Source: Fu et al., Simple Hardware-Efficient Long Convolutions for Sequence Modeling, arXiv:2302.06646, section 3.
    """

    def __init__(
        self,
        features: int,
        *,
        length: int,
        squash: float = 0.003,
        smooth: Literal["time", "frequency"] | None = None,
        window: int = 7,
        kernel_dropout: float = 0.0,
        init: Literal["random", "double_exp"] = "random",
        bidirectional: bool = False,
        channels: int = 1,
        glu: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check_positive(features=features, length=length, window=window, channels=channels)
        super().__init__(
            features, channels=channels, bidirectional=bidirectional, dropout=dropout, glu=glu, dtype=dtype,
            param_dtype=param_dtype, implementation=implementation, rngs=rngs,
        )  # fmt: skip
        if smooth not in (None, "time", "frequency") or init not in ("random", "double_exp"):
            raise ValueError(
                f"got smooth={smooth!r} and init={init!r}, expected None, 'time' or 'frequency', "
                "and 'random' or 'double_exp'"
            )
        self.squash, self.smooth, self.window = squash, smooth, window
        self.kernel_dropout = nnx.Dropout(kernel_dropout, rngs=rngs)
        taps = jax.random.normal(rngs.params(), (1 + bidirectional, length, channels * features), param_dtype)
        if init == "double_exp":
            rates = jnp.tile((features / 2) ** (jnp.arange(features) / features), channels)
            taps = 0.02 * taps * jnp.exp(-jnp.arange(length)[:, None] / length * rates)
        else:
            taps = 0.002 * taps
        self.taps = nnx.Param(taps.astype(param_dtype))

    def kernel(self, length: int) -> jax.Array:
        k = self.taps[...]
        if self.smooth == "time":
            k = _window_sum(k, np.full(self.window, 1 / self.window))
        elif self.smooth == "frequency":
            weights = np.exp(-0.5 * (np.arange(self.window) - self.window // 2) ** 2)
            wide = k.astype(jnp.promote_types(k.dtype, jnp.float32))
            spectrum = _window_sum(jnp.fft.rfft(wide, axis=1), weights)
            k = jnp.fft.irfft(spectrum, k.shape[1], axis=1).astype(k.dtype)
        k = jnp.sign(k) * jnp.maximum(jnp.abs(k) - self.squash, 0)
        return self.kernel_dropout(k)[:, :length]


class Hyena(nnx.Module):
    """Gates and long convolutions in turns, the convolutions' kernels a function of time that is learned.

    [x_0, ..., x_(n-1), v] = short(in(x)), a causal depthwise convolution of three taps; then for i = n - 1 to 1
    v <- k_i * (x_i v) + skip_i (x_i v), causal, and y = out(x_0 v). Tap t of k is MLP(z(t)) (exp(-t |delta|) + shift),
    with z(t) the time and a few of its waves, and sines between the layers of the MLP.

    Args:
      features: channels C.
      length: of the longest sequence.
      order: n, 2 or more; it has n - 1 long convolutions.
      filter_features: width of the MLP. inner_layers: of that width to itself.
      waves: how many waves z(t) has, each as a cosine and a sine.
      shift: what the decay of kernels ends in.
      dropout: rate, on v.
      dtype, param_dtype, implementation, rngs: as in `SGConv`.

    Returns (of a call): (B, L, C) for x (B, L, C).

    Raises:
      ValueError: an order below 2, or a size that is not positive; from a call, x of another shape, or longer than
        `length`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pallas_kernels.nn import Hyena
      >>> Hyena(8, length=100, rngs=nnx.Rngs(0))(jnp.ones((2, 100, 8))).shape
      (2, 100, 8)

    Source: Poli et al., Hyena Hierarchy, arXiv:2302.10866, section 3.
    """

    def __init__(
        self,
        features: int,
        *,
        length: int,
        order: int = 2,
        filter_features: int = 64,
        inner_layers: int = 2,
        waves: int = 1,
        shift: float = 0.05,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check_positive(features=features, length=length)
        if order < 2:
            raise ValueError(f"got order={order}, expected 2 or more")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.features, self.order, self.shift = features, order, shift
        self.implementation = implementation
        self.into = nnx.Linear(features, (order + 1) * features, **options)
        self.short = DepthwiseConv(
            (order + 1) * features, (3,), padding="CAUSAL", implementation=implementation, **options
        )
        self.out = nnx.Linear(features, features, **options)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        t = np.linspace(0, 1, length)[:, None]
        phases = (
            2 * np.pi * np.arange(length)[:, None] / length * np.linspace(1e-4, max(waves - 1, 1e-4), waves)
        )
        self.positions = nnx.Param(jnp.asarray(np.hstack([t, np.cos(phases), -np.sin(phases)]), param_dtype))
        widths = [1 + 2 * waves, *[filter_features] * (1 + inner_layers)]
        filters = {"param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.data([nnx.Linear(a, b, **filters) for a, b in itertools.pairwise(widths)])
        self.last = nnx.Linear(filter_features, (order - 1) * features, use_bias=False, **filters)
        self.frequency = nnx.Param(jnp.ones(filter_features, param_dtype))
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (order - 1, features), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        length = self.positions[...].shape[0]
        if x.ndim != 3 or x.shape[-1] != self.features or x.shape[1] > length:
            raise ValueError(f"got x of shape {x.shape}, expected (B, L up to {length}, {self.features})")
        *gates, v = jnp.split(self.short(self.into(x)), self.order + 1, axis=-1)
        for k, skip, gate in zip(self.kernels(x.shape[1]), self.skip[...], reversed(gates[1:]), strict=True):
            v = fft_conv(self.dropout(v), k, skip=skip, gate_in=gate, implementation=self.implementation)
        return self.out(v * gates[0])

    def kernels(self, length: int) -> jax.Array:
        """The kernels of the long convolutions in the order of their use, (order - 1, length, C)."""
        z = self.positions[...][:length]
        for layer in self.layers:
            z = jnp.sin(self.frequency[...] * layer(z))
        k = self.last(z).reshape(length, self.order - 1, self.features).swapaxes(0, 1)
        rates = np.abs(np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, self.features))
        t = np.linspace(0, 1, self.positions[...].shape[0])[:length, None]
        return k * jnp.asarray(np.exp(-t * rates) + self.shift, k.dtype)


def _window_sum(k: jax.Array, weights: Sequence[float] | np.ndarray) -> jax.Array:
    """Every element of axis 1 and its neighbours, weighted; zero beyond the ends."""
    half = len(weights) // 2
    padded = jnp.pad(k, ((0, 0), (half, len(weights) - 1 - half), (0, 0)))
    return sum(float(w) * padded[:, i : i + k.shape[1]] for i, w in enumerate(weights))  # pyright: ignore[reportReturnType]
