"""Convolution by Fourier transforms on a TPU with channels on lanes: shorter sequences, where they are in memory."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fourier import QUARTERS, Gates, Lags, dft, matmul, of_planes, planes, product, split
from pallas_kernels.kernels import fft_conv as kernels
from pallas_kernels.lowering import Work, launch
from pallas_kernels.tpu.tiles import vmem_budget

LANES = 128
# Up to so many samples one matrix is the whole transform; beyond them, rows of the left one. By the number of parts:
# sums of more than 64 terms would be the largest error of a convolution in float32.
DIRECT = {1: 512, 2: 512, 3: 64}
ROWS = {1: 128, 2: 128, 3: 64}
# The longest sequences: of the sums of 2000 samples with an offset, errors reach 1.2 times what the parity rule allows.
LONGEST = {1: math.inf, 2: math.inf, 3: 1024}
# Multiply-adds that a program should have at the least: to start one takes as long as some millions.
PROGRAM = 1 << 26
# Bytes of VMEM that hold values between the products, as measured at 1024 samples.
BETWEEN = 11 << 19


class Plan(NamedTuple):
    """rows, columns: N1 and N2. group: how many k1 share the right matrix. lanes: of a program. side: how many rows of
    the batch lie side by side in them. block: rows of the batch in a program. parts: of bfloat16 operands.
    """

    rows: int
    columns: int
    group: int
    lanes: int
    side: int
    block: int
    parts: int


def plan(arrays: Sequence[Any], parts: int, *, signals: int) -> Plan | None:
    """How sequences go through VMEM; None if they are too long.

    arrays: those (B, L, C) that a program reads and writes, or None. signals: how many it transforms.
    """
    batch, length, channels = arrays[0].shape
    columns = 1 if length <= DIRECT[parts] else 8 * -(-length // (8 * ROWS[parts]))
    rows = 16 * -(-length // (16 * columns))
    points = rows * columns
    lanes = 2 * LANES if columns == 1 and channels > LANES else LANES
    matrices = 2 * 2 * parts * 2 * points * rows
    sequences = 2 * sum(a.dtype.itemsize for a in arrays if a is not None)
    # For each signal a spectrum, the convolution's or its gradient, in two buffers, and scratch.
    spectra = signals * 4 * (2 * 2 + 3)
    needed = matrices + (sequences + spectra) * points * lanes + BETWEEN
    if length > LONGEST[parts] or needed > vmem_budget():
        return None
    group = math.gcd(rows, 1 << max(0, (LANES // (2 * columns)).bit_length() - 1))
    side = max(d for d in range(1, max(1, lanes // channels) + 1) if batch % d == 0)
    most = max(1, PROGRAM // (4 * rows**2 * lanes)) if columns == 1 else 1
    block = side * max(d for d in range(1, most + 1) if batch // side % d == 0)
    return Plan(rows, columns, group, lanes, side, block, parts)


def convolve(
    v: jax.Array, h: jax.Array, gates: Gates, lags: Lags, p: Plan, *, transposed: bool, interpret: Any
) -> jax.Array:
    """The convolution of v (B, L, C) with h (taps, C), or its transpose."""
    body = functools.partial(kernels.convolve_lanes, conjugate=transposed)
    name = "fft_conv" + "_transposed" * transposed
    (y,) = _launch(body, name, [v], _spectrum(h, lags, p), gates, [v.dtype], p, interpret)
    return y


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, lags: Lags, p: Plan, *, interpret: Any
) -> tuple[jax.Array, jax.Array, Gates]:
    """The gradients of `convolve` in v, in h and in the gates, for the cotangent g; that of h in float32."""
    spectrum, of_spectrum = jax.vjp(lambda h: _spectrum(h, lags, p), h.astype(jnp.float32))
    dtypes = [v.dtype, *(gate.dtype for gate in gates if gate is not None)]
    dv, *of_gates, sums = _launch(
        kernels.gradients_lanes, "fft_conv_gradients", [v, g], spectrum, gates, dtypes, p, interpret
    )
    before, after = (None if gate is None else of_gates.pop(0) for gate in gates)
    return dv, *of_spectrum(sums), (before, after)


def _launch(
    body: Any, name: str, arrays: list[jax.Array], spectrum: jax.Array, gates: Gates, dtypes: list[Any], p: Plan,
    interpret: Any,
) -> Any:  # fmt: skip
    batch, length, channels = arrays[0].shape
    points = p.rows * p.columns
    gated = kernels.Gated(*(gate is not None for gate in gates))
    given = [*arrays, *(gate for gate in gates if gate is not None)]
    matrices = _matrices(p)
    width = min(channels, p.lanes)
    of_rows = pl.BlockSpec((p.block, length, width), lambda i, j: (j, 0, i))
    of_spectrum = pl.BlockSpec((*spectrum.shape[:-1], p.lanes), lambda i, j: (0, 0, 0, i))
    out_shape = [jax.ShapeDtypeStruct(arrays[0].shape, dtype) for dtype in dtypes]
    out_specs = [of_rows] * len(dtypes)
    if len(arrays) == 2:
        out_shape.append(jax.ShapeDtypeStruct(spectrum.shape, jnp.float32))
        out_specs.append(of_spectrum)
    scratch = [(points, p.lanes)] * len(arrays)
    if p.columns > 1:
        scratch += [(2 * points, p.lanes)] * len(arrays)
    grid = -(-channels // width), batch // p.block
    transforms = len(arrays) + len(dtypes) - gated.before * (len(arrays) - 1)
    return launch(
        functools.partial(body, gated=gated, side=p.side),
        *arrays, spectrum, *given[len(arrays) :], *matrices,
        platform="tpu", interpret=interpret, name=name + "_gated" * any(gated), grid=grid,
        in_specs=[*[of_rows] * len(arrays), of_spectrum, *[of_rows] * (len(given) - len(arrays)),
                  *map(_constant, matrices)],
        out_specs=out_specs, out_shape=out_shape, sequential=int(len(arrays) == 2),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        vmem_limit_bytes=vmem_budget(),
        work=_work(p, batch // p.side * grid[0], batch * channels, transforms,
                   [*given, spectrum, *matrices, *out_shape]),
    )  # fmt: skip


def _constant(a: np.ndarray) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim, pipeline_mode=pl.Buffered(1))


def _spectrum(h: jax.Array, lags: Lags, p: Plan) -> jax.Array:
    """The spectrum of taps h (taps, C) as [k1 / j, plane, j k2, lanes], in float32."""
    points, empty = p.rows * p.columns, -h.shape[1] * p.side % p.lanes
    h = jnp.pad(jnp.concatenate([h.astype(jnp.float32)] * p.side, 1), ((0, 0), (0, empty)))
    after, before = h[lags.zero :], h[: lags.zero]
    re = jnp.pad(after, ((0, points - len(after)), (0, 0)))
    im = -jnp.pad(before, ((points - len(before), 0), (0, 0)))
    x = tuple(a.reshape(p.rows, -1) for a in (re, im))
    x = product(planes(dft(p.rows, p.rows, QUARTERS)), x, matmul)
    x = tuple(a.reshape(p.rows, p.columns, -1) for a in x)
    if p.columns > 1:
        twiddle = planes(dft(p.rows, p.columns, QUARTERS, points))[..., None]
        x = product(twiddle, x, jnp.multiply)
        x = product(planes(dft(p.columns, p.columns, 0)), x, matmul)
    group = p.group if p.columns > 1 else p.rows
    x = (jnp.stack(x, 1) / points).reshape(-1, group, 2, p.columns, x[0].shape[-1]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], group * p.columns, -1)


@functools.lru_cache(maxsize=64)
def _matrices(p: Plan) -> kernels.LaneMatrices:
    points = p.rows * p.columns
    samples = np.arange(points).reshape(p.rows, p.columns).T[:, None]
    phase = samples * (4 * np.arange(p.rows)[:, None] + QUARTERS) % (4 * points)
    left = planes(np.exp(-0.5j * np.pi * phase / points)).swapaxes(0, 1)
    right = np.kron(np.eye(p.group), of_planes(dft(p.columns, p.columns, 0)).reshape(2 * p.columns, -1))
    right = right.reshape(p.group, 2, p.columns, -1).swapaxes(0, 1).reshape(right.shape)
    return kernels.LaneMatrices(
        left=split(left.reshape(p.columns, -1, p.rows), p.parts).swapaxes(0, 1),
        left_back=split(left.swapaxes(2, 3), p.parts).swapaxes(0, 1),
        right=split(right, p.parts),
        right_back=split(right.T, p.parts),
    )


def _work(p: Plan, groups: int, sequences: int, transforms: int, arrays: list[Any]) -> Work:
    """`flops` of the sequences, `padded_flops` with lanes that are empty and zeros beside the diagonal."""
    points = p.rows * p.columns
    left = 2 * 2 * points * p.rows
    right = 2 * 4 * points * p.columns if p.columns > 1 else 0
    scale = transforms * {1: 1, 2: 3, 3: 6}[p.parts]
    return Work(
        flops=scale * sequences * (left + right),
        bytes=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        padded_flops=scale * groups * p.lanes * (left + p.group * right),
    )
