"""How convolution by Fourier transforms runs on a TPU.

What fits in VMEM with its channels on lanes is transformed so (`_fft_conv_lanes`), and nothing is transposed around the
kernel. For longer sequences and masked spectra, lanes hold 128 columns. As many sequences share the left matrix as fill
128 rows, so that matrix units are full at any length. What doesn't fit in VMEM takes one more pass over memory.
"""

from typing import Any

import jax

from pallas_kernels import fourier
from pallas_kernels.fourier import Gates, Lags, Plan
from pallas_kernels.tpu import _fft_conv_lanes as lanes
from pallas_kernels.tpu.tiles import loadable

LANES = 128
# The longest sequence of one kernel, and what is left for the kernel of a longer one.
LONGEST, INNER = 1 << 16, 1 << 14
# Elements of a program's sequences, and columns of a block of an outer pass.
BLOCK, OUTER_BLOCK = 1 << 17, 1 << 17


def convolve(
    v: jax.Array, h: jax.Array, gates: Gates, *,
    lags: Lags, parts: int, mask: Any, transposed: bool, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `fourier.convolve`."""
    x, gates = jax.tree.map(loadable, (v, gates))
    plan = lanes.plan([x, x, *gates], parts, signals=1) if mask is None else None
    if plan:
        y = lanes.convolve(x, h, gates, lags, plan, transposed=transposed, interpret=interpret)
    else:
        plan = _plan(v.shape, parts, mask)
        y = fourier.convolve(
            x, h, gates, lags, plan, transposed=transposed, platform="tpu", interpret=interpret
        )
    return y.astype(v.dtype)


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, *,
    lags: Lags, parts: int, mask: Any, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Gates]:  # fmt: skip
    """See `fourier.gradients`."""
    x, of_gates, g = jax.tree.map(loadable, (v, gates, g))
    plan = lanes.plan([x, x, g, *of_gates, *of_gates], parts, signals=2) if mask is None else None
    if plan:
        dv, dh, dgates = lanes.gradients(x, h, of_gates, g, lags, plan, interpret=interpret)
    else:
        # More sequences in float32, and three parts of each, than VMEM holds.
        longest = LONGEST // 2 if jax.tree.leaves(of_gates) and parts == 3 else LONGEST
        plan = _plan(v.shape, parts, mask, longest)
        dv, dh, dgates = fourier.gradients(x, h, of_gates, g, lags, plan, platform="tpu", interpret=interpret)
    return dv.astype(v.dtype), dh, jax.tree.map(lambda d, gate: d.astype(gate.dtype), dgates, gates)


def _plan(shape: tuple[int, ...], parts: int, mask: Any, longest: int = LONGEST) -> Plan:
    batch, length, channels = shape
    outer: tuple[int, ...] = ()
    kept = None
    if mask is not None and length % LANES == 0 and length <= LONGEST // 2:
        rows, columns = 2 * length // LANES, LANES
        kept = fourier.kept(mask, rows, columns)
    elif length > longest:
        outer, rows, columns = (-(-length // INNER),), LANES, LANES
    else:
        columns = min(-(-length // 8) * 8, LANES) if length <= LONGEST // 2 else 2 * LANES
        rows = -(-length // columns)
    group = 1 if outer else max(1, LANES // rows)
    # Channels first: the spectrum of a channel would have to be repeated for each row of the batch.
    in_channels = min(group, channels)
    in_batch = min(group // in_channels, -(-batch // (2 if kept else 1)))
    plan = Plan(
        outer=outer, rows=rows, columns=columns, batch=in_batch, channels=in_channels,
        block=1, outer_columns=max(LANES, OUTER_BLOCK // max(1, *outer, 0) // LANES * LANES), parts=parts, kept=kept,
    )  # fmt: skip
    return plan.with_block(batch, BLOCK)
