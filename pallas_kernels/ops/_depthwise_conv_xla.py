"""Depthwise convolution and its gradients in plain XLA: fast on a CPU, correct and partitionable everywhere.

All three are one correlation. XLA makes one loop nest of a sum of shifted products: it reads all taps of an
output and writes it once. How fast that nest is (in 10^9 multiply-adds a second on two cores with AVX-512)
hangs on

* the layout. With all channels innermost, every pixel reloads every weight: 15 to 27, and 7 to 13 once the
  weights don't fit the first-level cache. With (image, channels // 8, row, column, 8), the weights of eight
  channels stay in registers along a row: 35 to 50, for two more copies of the image.
* the number of taps. Registers hold about 28 weights; up to 64 taps it costs less to reload some than to
  read and write the outputs again. Beyond 124 LLVM's alias analysis gives up and nothing is vectorised: 1 to
  2. So a loop goes over groups of taps.
* the order of the sum. One product added after the other, each waits for the one before. With ten in turn, and
  their sums added then, a 7x7 kernel takes half the time.

Partitioned over channels, a device needs a multiple of eight of them (or of what 8 and the channels have in
common), or XLA gathers.
"""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import lowering
from pallas_kernels.windows import Axis

_LANES = 8  # float32 in one of the vectors that XLA prefers on x86
_GROUP = 36  # taps of a nest in the loop over groups of them
_IN_TURN = 10  # products of a nest that are added one after the other
_NEST = 64  # taps up to which one nest without the loop, which reads and writes the output again, is faster

Axes = tuple[Axis, ...]  # rows, columns


def forward(x: jax.Array, w: jax.Array, bias: jax.Array | None, axes: Axes) -> jax.Array:
    """The convolution of x (N, H, W, C) with w (KH, KW, C), plus bias (C), in x's dtype."""
    dtype = _accumulator(x.dtype)
    w = w[None].astype(dtype)
    y = _correlate(x.astype(dtype), w, axes)
    return (y if bias is None else y + bias.astype(dtype)).astype(x.dtype)


def input_gradient(g: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    """The gradient of `forward` with respect to x, in g's dtype.

    It is a convolution of g, spread by the strides, with the flipped kernel.
    """
    dtype = _accumulator(g.dtype)
    w = w[None].astype(dtype)
    spread = lax.pad(
        g.astype(dtype), jnp.zeros((), dtype), ((0, 0, 0), *((0, 0, a.stride - 1) for a in axes), (0, 0, 0))
    )
    transposed = tuple(
        _axis_for(
            a.stride * (a.out - 1) + 1,
            a.kernel,
            1,
            a.dilation,
            a.dilation * (a.kernel - 1) - a.pad_lo,
            a.size,
        )
        for a in axes
    )
    return _correlate(spread, w[:, ::-1, ::-1], transposed).astype(g.dtype)


def weight_gradient(x: jax.Array, g: jax.Array, axes: Axes) -> jax.Array:
    """The gradient of `forward` with respect to w, in float32 (float64 for float64).

    Output pixels and taps change places, strides and dilations too: g is the kernel, another for each image.
    """
    dtype = _accumulator(x.dtype)
    swapped = tuple(_axis_for(a.size, a.out, a.dilation, a.stride, a.pad_lo, a.kernel) for a in axes)
    of_images = _correlate(x.astype(dtype), g.astype(dtype), swapped)
    return lax.platform_dependent(of_images, cpu=_sum_by_product, default=lambda y: y.sum(0))


def _sum_by_product(y: jax.Array) -> jax.Array:
    """The sum over images: XLA would put a plain one into the nest, and LLVM not vectorise that."""
    return jnp.tensordot(jnp.ones(len(y), y.dtype), y, 1, precision=lax.Precision.HIGHEST)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _axis_for(size: int, kernel: int, stride: int, dilation: int, pad_lo: int, out: int) -> Axis:
    """The axis with `out` outputs."""
    return Axis(
        size,
        kernel,
        stride,
        dilation,
        pad_lo,
        stride * (out - 1) + dilation * (kernel - 1) + 1 - size - pad_lo,
    )


def _parts(length: int, at_most: int) -> tuple[int, int]:
    """The fewest equal parts that cover a length: how many, and their size."""
    count = -(-length // max(1, at_most))
    return count, -(-length // count)


def _extent(axis: Axis) -> int:
    """How many pixels, padding included, the outputs read from the first to the last."""
    return axis.stride * (axis.out - 1) + axis.dilation * (axis.kernel - 1) + 1


def _correlate(x: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    """x (N, H, W, C) with w (N or 1, KH, KW, C): (N, OH, OW, C)."""
    _, height, width, _ = w.shape
    if height * width <= _GROUP:
        return _in_groups(x, w, axes, (height, width), x.shape[-1])
    if height * width > _NEST:
        width = _parts(width, _GROUP)[1]
        height = _parts(height, _GROUP // width)[1]

    # Eight lanes would leave the rest of a TPU's vectors empty.
    lanes = {"cpu": math.gcd(x.shape[-1], _LANES), "default": x.shape[-1]}
    nests = {
        p: functools.partial(_in_groups, axes=axes, group=(height, width), lanes=n) for p, n in lanes.items()
    }
    return lax.platform_dependent(x, w, **nests)


def _in_groups(x: jax.Array, w: jax.Array, axes: Axes, group: tuple[int, int], lanes: int) -> jax.Array:
    """`_correlate` as a loop over groups of (rows, columns) of taps, with `lanes` channels innermost."""
    counts = tuple(-(-a.kernel // taps) for a, taps in zip(axes, group, strict=True))
    whole, part = (
        tuple(
            _axis_for(a.size, k, a.stride, a.dilation, a.pad_lo, a.out)
            for a, k in zip(axes, kernel, strict=True)
        )
        for kernel in ([c * taps for c, taps in zip(counts, group, strict=True)], group)
    )
    pads = ((a.pad_lo, _extent(a) - a.size - a.pad_lo, 0) for a in whole)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    x = x.reshape(*x.shape[:3], -1, lanes).transpose(0, 3, 1, 2, 4)
    w = jnp.pad(w, ((0, 0), *((0, v.kernel - a.kernel) for v, a in zip(whole, axes, strict=True)), (0, 0)))
    w = w.reshape(*w.shape[:3], -1, lanes)

    # XLA would fuse a dynamic slice with fewer than 16 readers into the nest, and LLVM not vectorise it.
    def add(t: jax.Array, y: jax.Array) -> jax.Array:
        i, j = group[0] * lax.div(t, counts[1]), group[1] * lax.rem(t, counts[1])
        x_start, w_start = (0, 0, axes[0].dilation * i, axes[1].dilation * j, 0), (0, i, j, 0, 0)
        x_group = lax.dynamic_slice(x, x_start, (*x.shape[:2], *map(_extent, part), lanes))
        w_group = lax.dynamic_slice(w, w_start, (len(w), *group, *w.shape[3:]))
        return y + _sum_of_taps(x_group, w_group, part)

    if counts == (1, 1):
        y = _sum_of_taps(x, w, part)
    else:
        # Made of x, so that they lie on the devices of a mesh as it does.
        zeros = jnp.broadcast_to(
            jnp.zeros_like(x[:, :, :1, :1]), (*x.shape[:2], *(a.out for a in axes), lanes)
        )
        y = lax.fori_loop(0, math.prod(counts), add, lowering.make_varying(zeros, x, w)[0])
    return y.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], *y.shape[2:4], -1)


def _sum_of_taps(x: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    """One loop nest without padding: x (N, B, H, W, L) with w (N or 1, KH, KW, B, L)."""

    def reads(axis: Axis, tap: int) -> slice:
        start = axis.dilation * tap
        return slice(start, start + axis.stride * (axis.out - 1) + 1, axis.stride)

    rows, cols = axes
    taps = itertools.product(range(rows.kernel), range(cols.kernel))
    products = [x[:, :, reads(rows, i), reads(cols, j)] * w[:, i, j, :, None, None] for i, j in taps]
    in_turn = (products[start : start + _IN_TURN] for start in range(0, len(products), _IN_TURN))
    return functools.reduce(operator.add, (functools.reduce(operator.add, some) for some in in_turn))
