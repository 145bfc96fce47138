"""Convolution by Fourier transforms of matrix products: its lengths, constants and layouts, and how it is launched.

A causal convolution of L samples needs 2 L points if nothing may wrap around. Here it takes L complex ones: modulo
z^L - i, the product of two real polynomials holds the first L coefficients in its real part and the rest in its
imaginary part. Its transform is one at the frequencies f - 1/4, so the shift goes into the matrices, samples stay
real, nothing is padded with zeros and rows of a batch need not be paired.

Only a spectrum that is zero in places needs the plain transform of 2 L points, whose frequencies those places are
given in: there two rows of the batch are real and imaginary part of one sequence, and the rows of the matrices that
would meet the zero half of it, or make the zeros of the spectrum, are left out.

With a length of N1 N2, n = n1 N2 + n2 and f = k1 + N1 k2, and s the shift,

    exp(-2 pi i n (f + s) / (N1 N2)) = exp(-2 pi i n1 (k1 + s) / N1)      the left matrix
                                     * exp(-2 pi i n2 (k1 + s) / (N1 N2))  the twiddle
                                     * exp(-2 pi i n2 k2 / N2)             the right matrix

and longer ones have more factors on the left, each a pass over memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.kernels import fft_conv as kernels
from pallas_kernels.lowering import Platform, Work, launch

# What the input and the result of a convolution are multiplied by, (B, L, C), where it is not None.
Gates = tuple[jax.Array | None, jax.Array | None]

# The shift of the frequencies that makes z^N = i, in quarters.
QUARTERS = -1


class Lags(NamedTuple):
    """A real convolution: y[t] = sum over j of h[j] u[t - j + zero], for `length` samples and `taps` taps.

    zero: the tap that acts at lag 0; all lags are shorter than `length`.
    """

    length: int
    taps: int
    zero: int

    @property
    def flipped(self) -> "Lags":
        """What the convolution's transpose is with the taps in reversed order."""
        return self._replace(zero=self.taps - 1 - self.zero)


class Plan(NamedTuple):
    """How a platform computes a convolution.

    outer: the factors that are passes over memory, the first of the transform.
    rows, columns: N1 and N2 of the kernel.
    batch, channels: how many sequences of either share the left matrix, which repeats along its diagonal.
    block: how many such groups a program takes.
    outer_columns: columns of a block of an outer pass.
    parts: of bfloat16 operands.
    kept: the k1 and the k2 where a plain transform's spectrum is not zero; None for the shifted transform.
    """

    outer: tuple[int, ...]
    rows: int
    columns: int
    batch: int
    channels: int
    block: int
    outer_columns: int
    parts: int
    kept: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    num_warps: int = 4

    def with_block(self, batch: int, elements: int) -> "Plan":
        """Programs of up to that many elements, all of the same size with as little to fill up as there can be."""
        groups = -(-batch // self.batch_rows)
        most = max(1, elements // (self.batch_rows * self.channels * self.sample_rows * self.columns))
        return self._replace(block=-(-groups // -(-groups // most)))

    @property
    def points(self) -> int:
        return math.prod(self.outer) * self.rows * self.columns

    @property
    def spectrum_shape(self) -> tuple[int, int]:
        return (len(self.kept[0]), len(self.kept[1])) if self.kept else (self.rows, self.columns)

    @property
    def sample_rows(self) -> int:
        """Rows that a row of the batch fills: half of them, where it may not wrap around."""
        return self.rows // 2 if self.kept else self.rows

    @property
    def between(self) -> Any:
        """The dtype between passes over memory: the kernels round to one part anyway."""
        return jnp.bfloat16 if self.parts == 1 else jnp.float32

    @property
    def batch_rows(self) -> int:
        """Rows of the batch in a group."""
        return 2 * self.batch if self.kept else self.batch


def kept(mask: Sequence[bool], rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The k1 and the k2 of a plain transform of rows * columns points that a mask of its first half leaves anything of.

    mask: equal blocks of the real transform's bins; see `pallas_kernels.fft_conv`.
    """
    half = rows * columns // 2
    bins = np.append(np.repeat(mask, half // len(mask)), mask[-1])
    spectrum = np.append(bins, bins[-2:0:-1]).reshape(columns, rows)
    k1, k2 = (np.flatnonzero(spectrum.any(axis)) for axis in (0, 1))
    return tuple(k1.tolist()) or (0,), tuple(k2.tolist()) or (0,)


def convolve(
    v: jax.Array, h: jax.Array, gates: Gates, lags: Lags, plan: Plan, *,
    transposed: bool, platform: Platform, interpret: Any,
) -> jax.Array:  # fmt: skip
    """The convolution of v (B, L, C) with h (taps, C), or its transpose, as a platform launches it."""
    run = _Launch(plan, platform, interpret)
    spectrum = _grouped(_spectrum(h, lags, plan), plan)
    before, after = _packed(gates, plan)
    x = run.there(_pack(v, plan), before)
    inner_gates = (None, None) if plan.outer else (before, after)
    y = run.convolve(x, spectrum, inner_gates, v.dtype, transposed=transposed)
    (y,) = run.back(y, [after], [v.dtype])
    return _unpack(y, v.shape, plan)


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, lags: Lags, plan: Plan, *,
    platform: Platform, interpret: Any,
) -> tuple[jax.Array, jax.Array, Gates]:  # fmt: skip
    """The gradients of `convolve` in v, in h and in the gates, for the cotangent g; that of h in float32."""
    run = _Launch(plan, platform, interpret)
    spectrum, of_spectrum = jax.vjp(lambda h: _grouped(_spectrum(h, lags, plan), plan), h.astype(jnp.float32))
    (before, after), x, g = _packed(gates, plan), _pack(v, plan), _pack(g, plan)
    of_before, of_after = ([] if gate is None else [gate.dtype] for gate in gates)
    dtypes = [v.dtype, *of_before]
    if plan.outer:
        x_there, g_there = run.there(x, before), run.there(g, after)
        dv, sums = run.gradients(x_there, g_there, spectrum, (None, None), dtypes)
        made = run.back(dv, [before, x] if of_before else [None], dtypes)
        if of_after:
            # By a kernel of its own: a GPU's registers don't hold both.
            y = run.convolve(x_there, spectrum, (None, None), v.dtype)
            made += run.back(y, [g], of_after)
    else:
        *made, sums = run.gradients(x, g, spectrum, (before, after), [*dtypes, *of_after])
    dv, *of_gates = (_unpack(a, v.shape, plan) for a in made)
    dbefore = of_gates.pop(0) if of_before else None
    dafter = of_gates.pop(0) if of_after else None
    return dv, *of_spectrum(sums.sum(1)), (dbefore, dafter)


class _Launch(NamedTuple):
    """The kernels of a plan, launched."""

    plan: Plan
    platform: Platform
    interpret: Any

    def there(self, x: jax.Array, gate: jax.Array | None) -> jax.Array:
        """All outer passes."""
        for level in range(len(self.plan.outer)):
            factors = [gate] if gate is not None and level == 0 else []
            (x,) = self.outer(x, factors, level, back=False, dtypes=[self.plan.between])
        return x

    def back(self, y: jax.Array, factors: Sequence[Any], dtypes: Sequence[Any]) -> list[jax.Array]:
        """All outer passes back; the results are multiplied by a factor each, where it is not None."""
        results = [y]
        for level in reversed(range(len(self.plan.outer))):
            given = [f for f in factors if f is not None and level == 0]
            made = dtypes if level == 0 else [self.plan.between]
            results = self.outer(results[0], given, level, back=True, dtypes=made)
        return list(results)

    def convolve(
        self, x: jax.Array, spectrum: jax.Array, gates: Gates, dtype: Any, *, transposed: bool = False
    ) -> jax.Array:
        """The kernel of the convolution; its result is in `dtype` where no outer pass comes after it."""
        body = functools.partial(kernels.convolve, gated=_gated(gates), conjugate=transposed)
        name = "fft_conv" + "_transposed" * transposed
        (y,) = self._inner(body, name, [x], spectrum, gates, [dtype], transforms=2)
        return y

    def gradients(
        self, x: jax.Array, g: jax.Array, spectrum: jax.Array, gates: Gates, dtypes: Sequence[Any]
    ) -> Sequence[jax.Array]:
        """The kernel of the gradients in x and in the gates, and the spectrum's summed for each program."""
        gated = _gated(gates)
        body = functools.partial(kernels.gradients, gated=gated)
        return self._inner(
            body, "fft_conv_gradients", [x, g], spectrum, gates, dtypes, transforms=3 + gated.after, sums=True
        )

    def _inner(
        self, body: Callable[..., None], name: str, arrays: Sequence[jax.Array], spectrum: jax.Array, gates: Gates,
        dtypes: Sequence[Any], *, transforms: int, sums: bool = False,
    ) -> Sequence[jax.Array]:  # fmt: skip
        plan, matrices = self.plan, _matrices(self.plan)
        if plan.outer:
            planes = 2, math.prod(plan.outer), plan.rows, plan.columns
            arrays = [a.reshape(*a.shape[:2], *planes) for a in arrays]
            dtypes = [plan.between]
        given = [gate for gate in gates if gate is not None]
        channels, groups, *tail = arrays[0].shape
        programs = groups // plan.block
        of_sequences, of_spectrum, of_sums = self._blocks(tail, spectrum.shape[2:])
        out_shape = [jax.ShapeDtypeStruct(arrays[0].shape, dtype) for dtype in dtypes]
        if sums:
            out_shape += [jax.ShapeDtypeStruct((channels, programs, *spectrum.shape[1:]), jnp.float32)]
        return launch(
            body, *arrays, spectrum, *given, *matrices,
            platform=self.platform, interpret=self.interpret, name=name + "_gated" * bool(given),
            grid=(channels * math.prod(plan.outer), programs),
            in_specs=[*(of_sequences for _ in arrays), of_spectrum, *(of_sequences for _ in given),
                      *map(_whole, matrices)],
            out_specs=[*(of_sequences for _ in dtypes), *[of_sums] * sums],
            out_shape=out_shape, num_warps=plan.num_warps,
            work=_work(plan, [*arrays, *given], transforms, spectrum, matrices, out_shape),
        )  # fmt: skip

    def _blocks(self, tail: Sequence[int], spectrum: Sequence[int]) -> tuple[pl.BlockSpec, ...]:
        """Of sequences (..., rows, columns), of spectra and of sums of spectra, in a grid over the sequences that share
        a spectrum, and blocks of them.

        tail: axes of a sequence, (rows, columns), or with outer passes (planes, which k0, rows, columns).
        """
        outer = math.prod(self.plan.outer)

        def program(i: Any) -> tuple[Any, Any]:
            return lax.div(i, jnp.int32(outer)), lax.rem(i, jnp.int32(outer))

        def sequences(i: Any, j: Any) -> tuple[Any, ...]:
            channel, k = program(i)
            return (channel, j, 0, k, 0, 0) if self.plan.outer else (channel, j, 0, 0)

        def sums(i: Any, j: Any) -> tuple[Any, ...]:
            channel, k = program(i)
            return channel, j, k, 0, 0, 0

        block = (2, None, *tail[-2:]) if self.plan.outer else tail
        return (
            pl.BlockSpec((None, self.plan.block, *block), sequences),
            pl.BlockSpec((None, None, *spectrum), lambda i, j: (*program(i), 0, 0, 0)),
            pl.BlockSpec((None, None, None, *spectrum), sums),
        )

    def outer(
        self, x: jax.Array, factors: Sequence[jax.Array], level: int, *, back: bool, dtypes: Sequence[Any]
    ) -> Sequence[jax.Array]:  # fmt: skip
        """One pass over memory: (C, B, 2, K, n, M) to itself, of which the first has no planes yet.

        factors: what the input of the first pass, or each result of the last one, is multiplied by.
        """
        plan = self.plan
        n = plan.outer[level]
        k = math.prod(plan.outer[:level])
        m = plan.points // (n * k)
        channels, batch = x.shape[:2]
        width = min(m, plan.outer_columns)
        left, left_back, twiddle = _outer_matrices(plan, level)
        planes, samples = (channels, batch, 2, k, n, m), (channels, batch, n, m)
        real = level == 0
        x = x.reshape(planes if back or not real else samples)
        factors = [f.reshape(samples) for f in factors]

        def sequence(i: Any) -> tuple[Any, Any, Any]:
            per_channel = jnp.int32(batch * k)
            rest = lax.rem(i, per_channel)
            return lax.div(i, per_channel), lax.div(rest, jnp.int32(k)), lax.rem(rest, jnp.int32(k))

        def at(j: Any, i: Any) -> tuple[Any, ...]:
            channel, row, which = sequence(i)
            return channel, row, 0, which, 0, j

        of_planes = pl.BlockSpec((None, None, 2, None, n, width), at)
        of_samples = (
            pl.BlockSpec((None, None, n, width), lambda j, i: (*sequence(i)[:2], 0, j)) if real else of_planes
        )
        matrix = left_back if back else left
        constants = [_whole(matrix), pl.BlockSpec((2, n, width), lambda j, i: (0, 0, j))]
        of_factors = [of_samples] * len(factors)
        shape = samples if back and real else planes
        return launch(
            kernels.outer_transform_back if back else kernels.outer_transform,
            *((x, matrix, twiddle, *factors) if back else (x, *factors, matrix, twiddle)),
            platform=self.platform, interpret=self.interpret, name="fft_conv_outer" + "_back" * back,
            # The columns are the outer axis, so that their part of the twiddle stays where it is.
            grid=(m // width, channels * batch * k),
            in_specs=[of_planes, *constants, *of_factors] if back else [of_samples, *of_factors, *constants],
            out_specs=[of_samples if back else of_planes] * len(dtypes),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
            num_warps=plan.num_warps,
            work=_outer_work(plan, [x, *factors], n, real, len(dtypes)),
        )  # fmt: skip


def _gated(gates: Gates) -> kernels.Gated:
    return kernels.Gated(*(gate is not None for gate in gates))


def _whole(a: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)


def _pack(v: jax.Array, plan: Plan) -> jax.Array:
    """(B, L, C) -> (C, B, points) for an outer pass, else (groups of C, of B, rows, columns); zeros fill up."""
    x = v.transpose(2, 0, 1)
    length = math.prod(plan.outer) * plan.sample_rows * plan.columns
    units = plan.channels, plan.batch_rows * plan.block
    x = jnp.pad(
        x,
        [*((0, -size % unit) for size, unit in zip(x.shape, units, strict=False)), (0, length - x.shape[2])],
    )
    if plan.outer:
        return x
    c, b, _ = x.shape
    x = x.reshape(c // plan.channels, plan.channels, b // plan.batch_rows, plan.batch_rows, -1, plan.columns)
    return x.swapaxes(1, 2).reshape(*x.shape[:3:2], -1, plan.columns)


def _packed(gates: Gates, plan: Plan) -> Gates:
    before, after = (None if gate is None else _pack(gate, plan) for gate in gates)
    return before, after


def _unpack(y: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
    if not plan.outer:
        y = y.reshape(*y.shape[:2], plan.channels, plan.batch_rows, -1).swapaxes(1, 2)
        y = y.reshape(y.shape[0] * plan.channels, -1, y.shape[-1])
    batch, length, channels = shape
    return y.reshape(*y.shape[:2], -1)[:channels, :batch, :length].transpose(1, 2, 0)


def _spectrum(h: jax.Array, lags: Lags, plan: Plan) -> jax.Array:
    """The spectrum of taps h (taps, C) over the number of points, as (C, k0, plane, k1, k2), in float32."""
    after, before = (a.T.astype(jnp.float32) for a in (h[lags.zero :], h[: lags.zero]))
    missing = plan.points - after.shape[1], plan.points - before.shape[1]
    re = jnp.pad(after, ((0, 0), (0, missing[0])))
    im = jnp.pad(before, ((0, 0), (missing[1], 0)))
    x = (re + im, jnp.zeros_like(re)) if plan.kept else (re, -im)

    which = 1
    for level, n in enumerate(plan.outer):
        x = tuple(a.reshape(-1, which, n, plan.points // (which * n)) for a in x)
        x = product(planes(dft(n, n, _shift(plan, level))), x, matmul)
        x = product(_outer_twiddle(plan, level), x, jnp.multiply)
        which *= n
    x = tuple(a.reshape(-1, which, plan.rows, plan.columns) for a in x)
    left, twiddle, right = map(planes, _factors(plan))
    x = product(product(left, x, matmul), twiddle, jnp.multiply)
    x = product(x, right, matmul)
    return jnp.stack(x, 2) / plan.points


def product(a: Any, b: Any, multiply: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The planes of a complex product."""
    a, b = (tuple(jnp.asarray(plane, jnp.float32) for plane in planes) for planes in (a, b))
    return multiply(a[0], b[0]) - multiply(a[1], b[1]), multiply(a[0], b[1]) + multiply(a[1], b[0])


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """By sums of 64 terms: one of more of them would be the largest error of a convolution in float32."""
    starts = range(0, a.shape[-1], 64)
    multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return functools.reduce(jnp.add, (multiply(a[..., i : i + 64], b[..., i : i + 64, :]) for i in starts))


def _grouped(spectrum: jax.Array, plan: Plan) -> jax.Array:
    """The spectra of the channels of a group below each other, each as often as the group has rows of the batch."""
    c, outer, _, rows, columns = spectrum.shape
    x = jnp.pad(spectrum, ((0, -c % plan.channels), *((0, 0),) * 4))
    x = x.reshape(-1, plan.channels, outer, 2, rows, columns).transpose(0, 2, 3, 1, 4, 5)
    x = jnp.broadcast_to(x[:, :, :, :, None], (*x.shape[:4], plan.batch, rows, columns))
    return x.reshape(*x.shape[:3], -1, columns)


def _shift(plan: Plan, level: int) -> int:
    """Of the frequencies, in quarters, for the first factor of the transform; the other ones get it in the twiddle."""
    return QUARTERS if level == 0 and not plan.kept else 0


def dft(k: int, n: int, quarters: int, period: int | None = None) -> np.ndarray:
    """exp(-2 pi i n (k + quarters / 4) / period), from phases that are exact."""
    period = period or k
    phase = np.arange(n)[None] * (4 * np.arange(k)[:, None] + quarters) % (4 * period)
    return np.exp(-0.5j * np.pi * phase / period)


@functools.lru_cache(maxsize=64)
def _factors(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The left matrix, the twiddle and the right matrix of one sequence."""
    shift = _shift(plan, len(plan.outer))
    left = dft(plan.rows, plan.rows, shift)
    twiddle = dft(plan.rows, plan.columns, shift, plan.rows * plan.columns)
    right = dft(plan.columns, plan.columns, 0)
    if plan.kept:
        left, twiddle, right = left[plan.kept[0], :], twiddle[plan.kept[0], :], right[:, plan.kept[1]]
    return left, twiddle, right


@functools.lru_cache(maxsize=64)
def _matrices(plan: Plan) -> kernels.Matrices:
    left, twiddle, right = _factors(plan)
    group = plan.batch * plan.channels
    of_samples = planes(left) if not (plan.kept or plan.outer) else of_planes(left[:, : plan.sample_rows])
    repeated = np.kron(np.eye(group), of_samples)
    return kernels.Matrices(
        left=split(repeated, plan.parts),
        left_back=split(repeated.swapaxes(1, 2), plan.parts),
        twiddle=np.tile(planes(twiddle), (1, group, 1)).astype(np.float32),
        right=split(planes(right), plan.parts),
        right_back=split(planes(right.T), plan.parts),
    )


def _outer_matrices(plan: Plan, level: int) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    n = plan.outer[level]
    matrix = dft(n, n, _shift(plan, level))
    both = planes(matrix) if level == 0 else of_planes(matrix)
    return split(both, plan.parts), split(both.swapaxes(1, 2), plan.parts), _outer_twiddle(plan, level)


def _outer_twiddle(plan: Plan, level: int) -> jax.Array:
    """[plane, k0, m], made where it is needed: it is as large as the sequence."""
    n = plan.outer[level]
    m = plan.points // math.prod(plan.outer[: level + 1])
    turns = lax.broadcasted_iota(jnp.int32, (n, m), 1) * (
        4 * lax.broadcasted_iota(jnp.int32, (n, m), 0) + _shift(plan, level)
    )
    # Less than half a turn either way, which keeps the phase exact up to its last bits.
    turns = jnp.where(turns > 2 * n * m, turns - 4 * n * m, turns)
    phase = turns.astype(jnp.float32) * np.float32(-0.5 * np.pi / (n * m))
    return jnp.stack([jnp.cos(phase), jnp.sin(phase)])


def planes(a: np.ndarray) -> np.ndarray:
    return np.stack([np.real(a), np.imag(a)])


def of_planes(a: np.ndarray) -> np.ndarray:
    """The real and the imaginary part of a product with what has its own planes below each other."""
    return np.stack([np.hstack([np.real(a), -np.imag(a)]), np.hstack([np.imag(a), np.real(a)])])


def split(a: np.ndarray, parts: int) -> np.ndarray:
    """As a sum of bfloat16 parts, the largest first, and that negated if it isn't alone: see `kernels._product`."""
    found = []
    for _ in range(parts):
        found.append(a.astype(jnp.bfloat16))
        a = a - found[-1].astype(np.float64)
    return np.stack([-found[0] if parts > 1 else found[0], *found[1:]])


def _work(
    plan: Plan, arrays: Sequence[jax.Array], transforms: int, spectrum: jax.Array, matrices: kernels.Matrices,
    results: Sequence[jax.ShapeDtypeStruct],
) -> Work:  # fmt: skip
    """`flops` without, `padded_flops` with what the zeros beside the diagonal of the left matrix take."""
    group = plan.batch * plan.channels
    k1, k2 = plan.spectrum_shape
    sequences = arrays[0].size // (matrices.left.shape[-1] * plan.columns)
    products = {1: 1, 2: 3, 3: 6}[plan.parts]
    left = 2 * matrices.left[0].size * plan.columns
    right = 2 * 4 * group * k1 * plan.columns * k2
    scale = sequences * transforms * products
    return Work(
        flops=round(scale * (left / group + right)),
        bytes=spectrum.nbytes + sum(a.size * a.dtype.itemsize for a in (*arrays, *results)),
        padded_flops=scale * (left + right),
    )


def _outer_work(plan: Plan, arrays: Sequence[jax.Array], n: int, real: bool, results: int) -> Work:
    points = arrays[0].shape[0] * arrays[0].shape[1] * plan.points
    flops = {1: 1, 2: 3, 3: 6}[plan.parts] * points * n * (4 if real else 8)
    return Work(flops=flops, bytes=sum(a.nbytes for a in arrays) + 8 * points * results, padded_flops=flops)
