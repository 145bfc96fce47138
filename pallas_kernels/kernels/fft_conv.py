"""Convolution by a Fourier transform that is all matrix products, as bodies over blocks of sequences.

A sequence of length N1 N2 is a matrix x[n1, n2] of its samples. Its transform is: a product from the left, a rotation
of every element (the twiddle), a product from the right. The spectrum stays in the order [k1, k2] in which that leaves
it, so nothing is ever permuted. There is no complex type: a spectrum is two planes, real and imaginary part.

The matrix units multiply bfloat16. Operands that need more are sums of bfloat16 parts, of 8 bits each, and a product
of two such sums is a sum of products: 1, 3 or 6 for 1, 2 or 3 parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

Parts = Sequence[jax.Array]
Planes = tuple[jax.Array, jax.Array]
REAL, IMAGINARY = 0, 1
# So many products are under way at once.
AT_ONCE = 4


class Matrices(NamedTuple):
    """The Refs of a transform's constants; products are with [part, plane, row, column].

    left: from samples to k1. left_back: its transpose.
    right: from n2 to k2. right_back: its transpose.
    twiddle: [plane, k1, n2].
    """

    left: Any
    left_back: Any
    twiddle: Any
    right: Any
    right_back: Any


class LaneMatrices(NamedTuple):
    """The Refs of the constants for channels on lanes, where two planes are below each other.

    left: [n2, part, plane k1, n1], the twiddle included. left_back: [n2, part, plane, n1, k1].
    right: [part, plane j k2, j plane n2], for as many k1 (j) as fill a matrix unit. right_back: its transpose.
    """

    left: Any
    left_back: Any
    right: Any
    right_back: Any


class Gated(NamedTuple):
    """Which gates a convolution has, one on its input, one on its output."""

    before: bool = False
    after: bool = False


def convolve(x_ref: Any, spectrum_ref: Any, *refs: Any, gated: Gated, conjugate: bool) -> None:
    """Multiply the spectra of a block of sequences by one spectrum, or its conjugate: o = F* (spectrum . F x).

    Args:
      x_ref, o_ref (the last of `refs`): [sequences, ..., n2], real or with planes before the rows.
      spectrum_ref: [plane, k1, k2], the scale 1 / length of the inverse transform included.
      refs: the gates, like x_ref, of x and of o; the `Matrices`; o_ref.
    """
    before, after, m, (o_ref,) = _named(refs, gated, Matrices)

    def sequence(i: Any, _: None) -> None:
        product = _multiply(
            _transform(_load(x_ref, before, i), m), (spectrum_ref[0], spectrum_ref[1]), conjugate
        )
        _store(o_ref, i, _transform_back(product, m), after)

    _loop(o_ref.shape[0], sequence, None)


def gradients(x_ref: Any, g_ref: Any, spectrum_ref: Any, *refs: Any, gated: Gated) -> None:
    """The gradients of `convolve`: dx = F* (conj(spectrum) . F g) and dspectrum = sum of conj(F x) . F g.

    Args:
      x_ref, g_ref, dx_ref: blocks of sequences, as in `convolve`.
      refs: the gates; the `Matrices`; then dx_ref, the gradients of the gates, and dspectrum_ref, of the block's own
        sum: [plane, k1, k2].
    """
    before, after, m, (dx_ref, *others, dspectrum_ref) = _named(refs, gated, Matrices)
    spectrum = spectrum_ref[0], spectrum_ref[1]

    def sequence(i: Any, total: Planes) -> Planes:
        made = iter(others)
        g = _transform(_load(g_ref, after, i), m)
        dx = _transform_back(_multiply(g, spectrum, True), m)
        _store(dx_ref, i, dx, before)
        if gated.before:
            _store(next(made), i, dx, x_ref)
        x = _transform(_load(x_ref, before, i), m)
        if gated.after:
            _store(
                next(made),
                i,
                _transform_back(_multiply(x, spectrum, False), m),
                g_ref,
            )
        re, im = _multiply(g, x, True)
        return total[0] + re, total[1] + im

    zeros = jnp.zeros(dspectrum_ref.shape[1:], jnp.float32)
    dspectrum_ref[0], dspectrum_ref[1] = _loop(dx_ref.shape[0], sequence, (zeros, zeros))


def outer_transform(x_ref: Any, *refs: Any) -> None:
    """The first factor of a longer transform: [..., n0, m] to [plane, k0, m], a block of the columns m.

    Args:
      refs: a gate of x, if it has one; the left matrix; the twiddle; the result.
    """
    *gate, left_ref, twiddle_ref, o_ref = refs
    x = _load(x_ref, gate[0] if gate else None, ...)
    re, im = _rotate(_from_samples(x, left_ref), twiddle_ref)
    o_ref[0], o_ref[1] = re.astype(o_ref.dtype), im.astype(o_ref.dtype)


def outer_transform_back(x_ref: Any, left_back_ref: Any, twiddle_ref: Any, *refs: Any) -> None:
    """The transpose of `outer_transform`: [plane, k0, m] to [..., n0, m].

    Args:
      refs: what it is multiplied by, and as many products; or nothing, and the result itself.
    """
    y = _to_samples(_rotate_back((x_ref[0], x_ref[1]), twiddle_ref), left_back_ref)
    factors, results = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    for factor, o_ref in zip(factors or [None], results, strict=True):
        _store(o_ref, ..., y, factor)


def convolve_lanes(
    x_ref: Any, spectrum_ref: Any, *refs: Any, gated: Gated, conjugate: bool, side: int
) -> None:
    """`convolve` with channels on lanes, so that a product from the left is all that ever is: no transposition.

    Args:
      x_ref, o_ref: [rows of the batch, n, channels]; `side` rows go side by side through the lanes.
      spectrum_ref: [k1 / j, plane, j k2, lanes], with the scale 1 / length.
      refs: the gates, like x_ref; the `LaneMatrices`; o_ref; scratch for the samples, [n1 n2, lanes], and if n2 > 1 for
        what is between the products, [plane n2 k1, lanes], in float32.
    """
    before, after, m, (o_ref, samples, *between) = _named(refs, gated, LaneMatrices)

    def rows(i: Any, _: None) -> None:
        exact = _to_lanes(x_ref, before, i, side, samples)
        point = lambda k, x: [_multiply(x, (spectrum_ref[k, 0], spectrum_ref[k, 1]), conjugate)]  # noqa: E731
        _through([(samples, exact)], m, point, between, 1)
        _from_lanes(samples, o_ref, i, side, after)

    _loop(x_ref.shape[0] // side, rows, None)


def gradients_lanes(x_ref: Any, g_ref: Any, spectrum_ref: Any, *refs: Any, gated: Gated, side: int) -> None:
    """`gradients` with channels on lanes; see `convolve_lanes`.

    Args:
      refs: the gates; the `LaneMatrices`; dx_ref, the gradients of the gates, and dspectrum_ref, which programs along
        the second axis of the grid, in order, add to; scratch of either kind for g, then for x.
    """
    before, after, m, (dx_ref, *rest) = _named(refs, gated, LaneMatrices)
    made = iter(rest)
    dbefore, dafter = (next(made) if has else None for has in gated)
    dspectrum_ref, *scratch = made
    of_g, of_x, *between = scratch

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dspectrum_ref[...] = jnp.zeros_like(dspectrum_ref)

    def point(k: Any, g: Planes, x: Planes) -> list[Planes]:
        spectrum = spectrum_ref[k, 0], spectrum_ref[k, 1]
        for plane, d in enumerate(_multiply(g, x, True)):
            dspectrum_ref[k, plane] += d
        dx = _multiply(g, spectrum, True)
        return [dx, _multiply(x, spectrum, False)] if gated.after else [dx]

    def rows(i: Any, _: None) -> None:
        g = of_g, _to_lanes(g_ref, after, i, side, of_g)
        x = of_x, _to_lanes(x_ref, before, i, side, of_x)
        _through([g, x], m, point, between, 1 + gated.after)
        _from_lanes(of_g, dx_ref, i, side, before)
        if gated.before:
            _from_lanes(of_g, dbefore, i, side, x_ref)
        if gated.after:
            _from_lanes(of_x, dafter, i, side, g_ref)

    _loop(x_ref.shape[0] // side, rows, None)


def _named(refs: Sequence[Any], gated: Gated, matrices: Any) -> tuple[Any, Any, Any, Sequence[Any]]:
    """The gates or None, the matrices, and what comes after them."""
    rest = iter(refs)
    before, after = (next(rest) if has else None for has in gated)
    return before, after, matrices(*(next(rest) for _ in matrices._fields)), list(rest)


def _to_lanes(ref: Any, gate_ref: Any, i: Any, side: int, samples: Any) -> bool:
    """Fill `samples` with the i-th rows that go side by side, zeros below them; whether bfloat16 holds them."""
    _, length, channels = ref.shape
    for row in range(side):
        lanes = slice(row * channels, (row + 1) * channels)
        samples[:length, lanes] = _load(ref, gate_ref, i * side + row).astype(jnp.float32)
    if length < samples.shape[0]:
        samples[length:] = jnp.zeros((samples.shape[0] - length, samples.shape[1]), jnp.float32)
    return ref.dtype == jnp.bfloat16 and gate_ref is None


def _from_lanes(samples: Any, ref: Any, i: Any, side: int, factor_ref: Any) -> None:
    _, length, channels = ref.shape
    for row in range(side):
        lanes = slice(row * channels, (row + 1) * channels)
        _store(ref, i * side + row, samples[:length, lanes], factor_ref)


def _through(
    signals: Sequence[tuple[Any, bool]],
    m: LaneMatrices,
    point: Callable[..., list[Planes]],
    between: Sequence[Any],
    results: int,
) -> None:
    """Replace signals by the transforms back of the `results` spectra that `point(k, *spectra)` makes of theirs.

    signals: Refs, and whether bfloat16 holds their samples.
    """
    n2, _, k1, n1 = m.left.shape
    k1 //= 2

    if not between:
        spectra = [_halves(_of(m.left.at[0], ..., _parts_of(ref[...], exact, m))) for ref, exact in signals]
        for (ref, _), x in zip(signals, point(0, *spectra), strict=False):
            ref[...] = _to_samples(x, m.left_back.at[0])
        return
    group = m.right.shape[-1] // (2 * n2)

    # All loads of some steps come before their stores, so that their products overlap.
    def there(i: Any) -> list[Any]:
        return [
            _halves(_of(m.left.at[i], ..., _parts_of(ref[pl.ds(i, n1, stride=n2), :], exact, m)))
            for ref, exact in signals
        ]

    def arrived(i: Any, spectra: list[Any]) -> None:
        for x, z in zip(spectra, between, strict=True):
            for plane, a in enumerate(x):
                z[pl.ds((plane * n2 + i) * k1, k1), :] = a

    def at(i: Any) -> list[Any]:
        return [pl.ds(i * group + j, 2 * n2, stride=k1) for j in range(group)]

    def middle(i: Any) -> list[Any]:
        x = [jnp.concatenate([z[rows, :] for rows in at(i)]) for z in between]
        spectra = point(i, *(_halves(_of(m.right, ..., _parts_of(a, False, m))) for a in x))
        return [_of(m.right_back, ..., _parts_of(jnp.concatenate(a), False, m)) for a in spectra]

    def multiplied(i: Any, spectra: list[Any]) -> None:
        for z, y in zip(between, spectra, strict=False):
            for j, rows in enumerate(at(i)):
                z[rows, :] = y[j * 2 * n2 : (j + 1) * 2 * n2]

    def back(i: Any) -> list[Any]:
        x = [
            tuple(z[pl.ds((plane * n2 + i) * k1, k1), :] for plane in (REAL, IMAGINARY))
            for z in between[:results]
        ]
        return [_to_samples(planes, m.left_back.at[i]) for planes in x]

    def returned(i: Any, samples: list[Any]) -> None:
        for (ref, _), y in zip(signals, samples, strict=False):
            ref[pl.ds(i, n1, stride=n2), :] = y

    _in_steps(n2, there, arrived)
    _in_steps(k1 // group, middle, multiplied)
    _in_steps(n2, back, returned)


def _in_steps(count: int, load: Callable[..., Any], store: Callable[..., None]) -> None:
    size = math.gcd(count, AT_ONCE)

    def step(i: Any, _: None) -> None:
        indices = [i * size + j for j in range(size)]
        for j, loaded in [(j, load(j)) for j in indices]:
            store(j, loaded)

    _loop(count // size, step, None)


def _parts_of(x: jax.Array, exact: bool, m: LaneMatrices) -> Parts:
    return _split(x.astype(jnp.bfloat16) if exact else x, m.left.at[0])


def _halves(x: jax.Array) -> Planes:
    half = x.shape[0] // 2
    return x[:half], x[half:]


def _load(ref: Any, gate_ref: Any, i: Any) -> jax.Array:
    if gate_ref is None:
        return ref[i]
    return ref[i].astype(jnp.float32) * gate_ref[i].astype(jnp.float32)


def _store(ref: Any, i: Any, y: jax.Array, factor_ref: Any) -> None:
    y = y.reshape(ref.shape if i is ... else ref.shape[1:])
    ref[i] = (y if factor_ref is None else y * factor_ref[i].astype(jnp.float32)).astype(ref.dtype)


def _transform(x: jax.Array, m: Matrices) -> Planes:
    re, im = (_split(a, m.right) for a in _rotate(_from_samples(x, m.left), m.twiddle))
    return (
        _times(re, m.right, REAL) - _times(im, m.right, IMAGINARY),
        _times(re, m.right, IMAGINARY) + _times(im, m.right, REAL),
    )


def _transform_back(x: Planes, m: Matrices) -> jax.Array:
    re, im = (_split(a, m.right_back) for a in x)
    z = (
        _times(re, m.right_back, REAL) + _times(im, m.right_back, IMAGINARY),
        _times(im, m.right_back, REAL) - _times(re, m.right_back, IMAGINARY),
    )
    return _to_samples(_rotate_back(z, m.twiddle), m.left_back)


def _from_samples(x: jax.Array, left_ref: Any) -> Planes:
    samples = _split(x.reshape(-1, x.shape[-1]), left_ref)
    return _of(left_ref, REAL, samples), _of(left_ref, IMAGINARY, samples)


def _to_samples(x: Planes, left_back_ref: Any) -> jax.Array:
    re, im = (_split(a, left_back_ref) for a in x)
    return _of(left_back_ref, REAL, re) + _of(left_back_ref, IMAGINARY, im)


def _rotate(x: Planes, twiddle_ref: Any) -> Planes:
    return _multiply(x, (twiddle_ref[0], twiddle_ref[1]), False)


def _rotate_back(x: Planes, twiddle_ref: Any) -> Planes:
    return _multiply(x, (twiddle_ref[0], twiddle_ref[1]), True)


def _multiply(x: Planes, y: Planes, conjugate: bool) -> Planes:
    """x y, or x conj(y)."""
    (a, b), (c, d) = x, y
    return (a * c + b * d, b * c - a * d) if conjugate else (a * c - b * d, a * d + b * c)


def _split(x: jax.Array, like: Any) -> Parts:
    """x as a sum of as many bfloat16 parts as the matrices `like` have."""
    if x.dtype == jnp.bfloat16:
        return [x]
    rest, parts = x.astype(jnp.float32), []
    for _ in range(like.shape[0] - 1):
        # The upper half of the bits, where XLA would leave out a cast to bfloat16 and back. Cutting what is a little
        # too large rounds it, or nearly so: the next part has the rest of it.
        bits = lax.bitcast_convert_type(rest * np.float32(1 + 3 / 2048), jnp.int32) & np.int32(-0x10000)
        upper = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(upper.astype(jnp.bfloat16))
        rest = rest - upper
    return [*parts, rest.astype(jnp.bfloat16)]


def _of(matrix_ref: Any, plane: Any, x: Parts) -> jax.Array:
    """A plane of a matrix times x."""
    return _product(matrix_ref, plane, x, lambda matrix, part: (matrix, part))


def _times(x: Parts, matrix_ref: Any, plane: int) -> jax.Array:
    """x times a plane of a matrix."""
    return _product(matrix_ref, plane, x, lambda matrix, part: (part, matrix))


def _product(
    matrix_ref: Any, plane: Any, x: Parts, order: Callable[..., tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """The product of two sums, the smallest terms first, without those below what the sums leave out.

    The first of several matrices is negated, so that its products are subtracted: what is added to a product, Triton
    has tensor cores add, who cut off what other units round.
    """
    total = None
    for i in reversed(range(matrix_ref.shape[0])):
        matrix = matrix_ref[i, plane]
        for part in reversed(x[: matrix_ref.shape[0] - i]):
            term = lax.dot_general(
                *order(matrix, part), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            total = term if total is None else total - term if i == 0 else total + term
    return total


def _loop(count: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    if count == 1:
        return step(0, carry)
    # Bounds of 32 bits: under x64 Python's integers would make a 64-bit index, which no TPU has.
    return lax.fori_loop(np.int32(0), np.int32(count), step, carry)
