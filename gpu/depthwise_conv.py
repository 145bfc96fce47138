"""How depthwise convolution runs on an NVIDIA GPU.

Slabs are (images, channels) with 4 bytes for every thread of a program, read where they lie in (batch, height,
width, channels). A program computes one row of the image, a tile of its columns at a time in registers; taps in the
padding are skipped, so nothing is padded but channels that no block divides.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels.depthwise_conv import Slab, correlate, correlate_gradient
from pallas_kernels.lowering import Work, launch
from pallas_kernels.windows import Axis, Gather, Rows, Strips

# Columns, of the image or of the kernel, that are accumulated together in a thread's registers.
TILE = 14
# Multiply-adds, and 8 times the columns, in the code for one row of the kernel: what compiles within seconds.
CODE_BUDGET = 2_000
# Columns of the strips that wider images are cut into.
STRIP = 56
# Programs that fill a GPU.
PROGRAMS = 1024


class Plan(NamedTuple):
    """How a launch cuts its arrays: slabs of `images` by `channels`, and the strips of wide images."""

    images: int
    channels: int
    strips: Strips

    def num_warps(self, itemsize: int) -> int:
        """Threads of 4 bytes each, of which a warp reads a whole line of memory."""
        return max(1, self.images * self.channels * itemsize // 128)


def convolve(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, rows: Gather, cols: Gather, *, interpret: Any = False
) -> jax.Array:
    """A depthwise convolution, or with transposed axes its input gradient.

    Args:
      x: (N, sources of rows, sources of cols, C); w: (KH, KW, C); bias: (C,) or None.
      interpret: see `launch`.

    Returns:
      (N, targets of rows, targets of cols, C), in x's dtype.
    """
    n, _, _, c = x.shape
    plan = _plan(n, c, x.dtype.itemsize, cols, width=cols.axis.kernel)
    strips, columns = plan.strips, plan.strips.columns
    blocks = -(-rows.targets // rows.period)
    pieces, w, bias = (
        _whole_blocks(a, plan) for a in (strips.cut(x), w, jnp.zeros(c) if bias is None else bias)
    )
    count, height, width, lanes = pieces.shape

    # Python's integers would be of 64 bits under x64, and indices are of 32.
    def slab_and_block(i: Any) -> tuple[Any, Any]:
        return jax.lax.div(i, jnp.int32(blocks)), jax.lax.rem(i, jnp.int32(blocks))

    def body(*refs: Any) -> None:
        moved = slab_and_block(pl.program_id(0))[1] * rows.advance
        taps = [rows.taps(r).shifted(-moved).inside(rows.sources) for r in range(rows.period)]
        kinds = [Rows(r, 1, t) for r, t in enumerate(taps)]
        tile = -(-len(columns) // -(-len(columns) // TILE))
        correlate(
            *refs, slab=_slab(plan), rows=kinds, cols=columns,
            tile=tile, unroll=1, unrolled_rows=2, loop_tiles=True,
        )  # fmt: skip

    out = launch(
        body, pieces, w, bias[None],
        platform="cuda", interpret=interpret, name="depthwise_conv" + "_input_gradient" * rows.transposed,
        grid=(count // plan.images * blocks, lanes // plan.channels),
        in_specs=[
            pl.BlockSpec((plan.images, height, width, plan.channels), lambda i, c: (slab_and_block(i)[0], 0, 0, c)),
            pl.BlockSpec((*w.shape[:2], plan.channels), lambda i, c: (0, 0, c)),
            pl.BlockSpec((1, plan.channels), lambda i, c: (0, c)),
        ],
        out_specs=pl.BlockSpec(
            (plan.images, rows.period, strips.size, plan.channels),
            lambda i, c: (*slab_and_block(i), 0, c),
        ),
        out_shape=jax.ShapeDtypeStruct((count, blocks * rows.period, strips.size, lanes), x.dtype),
        num_warps=plan.num_warps(x.dtype.itemsize),
        work=_work(n, c, rows.axis, plan, pieces, x.nbytes + n * rows.targets * cols.targets * c * x.dtype.itemsize),
    )  # fmt: skip
    out = out[: n * strips.count, : rows.targets, :, :c].reshape(
        strips.count, n, rows.targets, strips.size, c
    )
    return out.transpose(1, 2, 0, 3, 4).reshape(n, rows.targets, -1, c)[:, :, : cols.targets]


def weight_gradient(
    x: jax.Array, g: jax.Array, rows: Axis, cols: Axis, *, interpret: Any = False
) -> jax.Array:
    """The gradient of a depthwise convolution with respect to its weight, summed over images and pixels.

    Args:
      x: (N, H, W, C), the input; g: (N, OH, OW, C), the cotangent of the output.
      interpret: see `launch`.

    Returns:
      (KH, KW, C), float32.
    """
    n, _, _, c = x.shape
    plan = _plan(n, c, x.dtype.itemsize, Gather(cols), width=cols.kernel)
    strips, columns = plan.strips, plan.strips.kernel_columns
    pieces, cotangents = (_whole_blocks(s.cut(a), plan) for a, s in ((x, strips), (g, strips.of_targets())))
    count, *_, lanes = pieces.shape
    slabs = count // plan.images
    busy = -(-PROGRAMS // (rows.kernel * lanes // plan.channels))
    parts = min(slabs, next(p for p in range(busy, slabs + busy) if slabs % p == 0 or p >= slabs))
    images = count // parts

    def body(*refs: Any) -> None:
        taps = rows.tap_range(jax.lax.rem(pl.program_id(0), jnp.int32(rows.kernel)))
        tile = -(-cols.kernel // -(-cols.kernel // TILE))
        correlate_gradient(
            *refs, slab=_slab(plan, slabs // parts), rows=[taps], cols=columns,
            tile=tile, unroll=1, chunk=TILE // 2 if cols.out > 2 * TILE else None,
        )  # fmt: skip

    def spec(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (images, *a.shape[1:3], plan.channels),
            lambda i, c: (jax.lax.div(i, jnp.int32(rows.kernel)), 0, 0, c),
        )

    partial_sums = launch(
        body, pieces, cotangents,
        platform="cuda", interpret=interpret, name="depthwise_conv_weight_gradient",
        grid=(parts * rows.kernel, lanes // plan.channels),
        in_specs=[spec(pieces), spec(cotangents)],
        out_specs=pl.BlockSpec((1, cols.kernel, plan.channels), lambda i, c: (i, 0, c)),
        out_shape=jax.ShapeDtypeStruct((parts * rows.kernel, cols.kernel, lanes), jnp.float32),
        num_warps=plan.num_warps(x.dtype.itemsize),
        work=_work(n, c, rows, plan, pieces, x.nbytes + g.nbytes),
    )  # fmt: skip
    return partial_sums.reshape(parts, rows.kernel, cols.kernel, lanes)[..., :c].sum(0)


def _plan(n: int, c: int, itemsize: int, cols: Gather, *, width: int) -> Plan:
    """Channels by what they waste, in lanes of padding, idle threads and half-used sectors of memory."""
    widest = CODE_BUDGET // (width + 8)
    columns = cols.targets if cols.targets <= widest else max(TILE, min(STRIP, widest))
    count = -(-cols.targets // columns)
    strips = Strips(cols, min(cols.targets, -(-cols.targets // (count * cols.period)) * cols.period))

    def images(channels: int) -> int:
        return max(1, min(32 // channels, math.gcd(n * strips.count, 32)))

    def cost(channels: int) -> float:
        idle = max(1.0, 32 / (images(channels) * channels)) * max(1.0, 32 / (channels * itemsize))
        return -(-c // channels) * channels * idle

    channels = min((128, 64, 32, 16, 8), key=cost)
    return Plan(images(channels), channels, strips)


def _slab(plan: Plan, groups: int = 1) -> Slab:
    def at(row: Any, column: Any, group: Any) -> tuple[Any, ...]:
        return pl.ds(group * plan.images, plan.images), row, column, slice(None)

    return Slab((plan.images, plan.channels), at, groups=groups)


def _whole_blocks(a: jax.Array, plan: Plan) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % plan.channels)])


def _work(n: int, c: int, rows: Axis, plan: Plan, pieces: jax.Array, nbytes: int) -> Work:
    columns = sum(t.hi - t.lo for t in plan.strips.columns)
    return Work(
        flops=2 * n * c * rows.pairs * plan.strips.gather.axis.pairs,
        bytes=nbytes + 4 * c * rows.kernel * plan.strips.gather.axis.kernel,
        padded_flops=2 * pieces.shape[0] * pieces.shape[-1] * rows.pairs * columns,
    )
