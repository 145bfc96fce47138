"""Depthwise convolution as one would write it in Triton itself, called through jax-triton: a baseline of `bench`.

Stride 1, odd kernels and "SAME" padding only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    import triton.language as tl
except ModuleNotFoundError:  # nobody calls the kernels then
    tl = None

# Columns of a row that a program holds, and the programs that the weight gradient shares the rows among.
COLUMNS, PARTS = 8, 64


def correlate(
    x, w, o, height: "tl.constexpr", width: "tl.constexpr", channels: "tl.constexpr", kernel_height: "tl.constexpr",
    kernel_width: "tl.constexpr", flipped: "tl.constexpr", block_w: "tl.constexpr", block_c: "tl.constexpr",
):  # fmt: skip
    """o[n, r, c] = sum over (i, j) of x[n, r + i - KH // 2, c + j - KW // 2] * w[i, j], or by the flipped kernel."""
    row = tl.program_id(0)
    column = tl.program_id(1) * block_w + tl.arange(0, block_w)
    channel = tl.program_id(2) * block_c + tl.arange(0, block_c)
    total = tl.zeros((block_w, block_c), tl.float32)
    for i in range(kernel_height):
        moved = i - kernel_height // 2
        if (row % height + moved >= 0) & (row % height + moved < height):
            for j in tl.static_range(kernel_width):
                source = column + j - kernel_width // 2
                tap = i * kernel_width + j
                if flipped:
                    tap = kernel_height * kernel_width - 1 - tap
                inside = ((source >= 0) & (source < width))[:, None] & (channel < channels)[None]
                at = ((row + moved) * width + source)[:, None] * channels + channel[None]
                weight = tl.load(w + tap * channels + channel, channel < channels, 0.0).to(tl.float32)
                total += tl.load(x + at, inside, 0.0).to(tl.float32) * weight[None]
    at = (row * width + column)[:, None] * channels + channel[None]
    tl.store(o + at, total.to(o.dtype.element_ty), (column < width)[:, None] & (channel < channels)[None])


def correlate_gradient(
    x, g, o, rows: "tl.constexpr", height: "tl.constexpr", width: "tl.constexpr", channels: "tl.constexpr",
    kernel_height: "tl.constexpr", kernel_width: "tl.constexpr", block_w: "tl.constexpr", block_c: "tl.constexpr",
):  # fmt: skip
    """o[part, i, j] = sum over n, r, c in a part of the rows of x[n, r + i - KH // 2, c + j - KW // 2] * g[n, r, c]."""
    tap, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.program_id(2) * block_c + tl.arange(0, block_c)
    down, right = tap // kernel_width - kernel_height // 2, tap % kernel_width - kernel_width // 2
    total = tl.zeros((block_w, block_c), tl.float32)
    for row in range(part, rows, parts):
        if (row % height + down >= 0) & (row % height + down < height):
            for start in range(0, width, block_w):
                column = start + tl.arange(0, block_w)
                source = column + right
                inside = ((source >= 0) & (source < width) & (column < width))[:, None]
                inside = inside & (channel < channels)[None]
                at_x = ((row + down) * width + source)[:, None] * channels + channel[None]
                at_g = (row * width + column)[:, None] * channels + channel[None]
                factor = tl.load(g + at_g, inside, 0.0).to(tl.float32)
                total += tl.load(x + at_x, inside, 0.0).to(tl.float32) * factor
    taps = kernel_height * kernel_width
    tl.store(o + (part * taps + tap) * channels + channel, tl.sum(total, 0), channel < channels)


@functools.partial(jax.custom_vjp)
def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """x: (N, H, W, C), w: (KH, KW, C), both of one dtype; returns the shape of x."""
    return _correlate(x, w, flipped=False)


def _correlate(x: jax.Array, w: jax.Array, flipped: bool) -> jax.Array:
    n, height, width, _ = x.shape
    grid = (n * height, -(-width // COLUMNS), -(-x.shape[3] // _channels(x)))
    return _call(
        correlate, (x, w), x, grid, kernel_height=w.shape[0], kernel_width=w.shape[1], flipped=flipped
    )


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    n, height, _, channels = x.shape
    parts = min(PARTS, n * height)
    sums = jax.ShapeDtypeStruct((parts, *w.shape), jnp.float32)
    grid = (w.shape[0] * w.shape[1], parts, -(-channels // _channels(x)))
    sizes = {"rows": n * height, "kernel_height": w.shape[0], "kernel_width": w.shape[1]}
    dw = _call(correlate_gradient, (x, g), sums, grid, **sizes)
    return _correlate(g, w, flipped=True), dw.sum(0).astype(w.dtype)


convolve.defvjp(lambda x, w: (convolve(x, w), (x, w)), _backward)


def _channels(x: jax.Array) -> int:
    return min(64, 1 << (x.shape[3] - 1).bit_length())


def _call(kernel: Callable[..., None], operands: Any, out: Any, grid: tuple[int, ...], **sizes: Any) -> Any:
    import jax_triton

    _, height, width, channels = operands[0].shape
    return jax_triton.triton_call(
        *operands, kernel=jit(kernel), grid=grid, num_warps=4,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        height=height, width=width, channels=channels, block_w=COLUMNS, block_c=_channels(operands[0]), **sizes,
    )  # fmt: skip


@functools.cache
def jit(kernel: Callable[..., None]) -> Any:
    import triton

    return triton.jit(kernel)
