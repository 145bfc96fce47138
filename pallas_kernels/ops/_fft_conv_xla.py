"""Long convolution and its gradients in plain XLA, by its own Fourier transforms: what runs on a CPU.

Modulo z^N - i, the product of two real polynomials of up to N coefficients holds the first N coefficients of their
product in its real part and the rest in its imaginary part. So a causal convolution takes a complex transform of N >= L
points for every row, of samples that are rotated by exp(i pi n / 2 N), where the usual one takes a real transform of
2 L points: there is no padding to write, read and transform, and memory is what limits transforms on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.fourier import Gates, Lags

# On a CPU, signals of so many elements or more are cut into parts of so many channels, some of them at a time.
MANY, CHANNELS, PARTS = 1 << 16, 16, 4


def convolve(v: jax.Array, h: jax.Array, gates: Gates, *, lags: Lags, transposed: bool) -> jax.Array:
    """The convolution of v (B, L, C) with h (taps, C), or its transpose, in v's dtype."""

    def of_channels(v: jax.Array, h: jax.Array, gates: Gates) -> jax.Array:
        n = _points(lags.length)
        spectrum = _spectrum(h, lags, n, _accumulator(v.dtype))
        of_v = _transform(_times(v, gates[0]), n)
        y = _back(of_v * (spectrum.conj() if transposed else spectrum), v)
        return _times(y, gates[1]).astype(v.dtype)

    return _in_parts(of_channels, v, v, h, gates)


def gradients(
    v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array, *, lags: Lags
) -> tuple[jax.Array, jax.Array, Gates]:
    """The gradients of `convolve` in v, in h and in the gates for the cotangent g; that of h in float32 or wider."""

    def of_channels(v: jax.Array, h: jax.Array, gates: Gates, g: jax.Array) -> Any:
        n, (before, after) = _points(lags.length), gates
        spectrum = _spectrum(h, lags, n, _accumulator(v.dtype))
        of_v, of_g = _transform(_times(v, before), n), _transform(_times(g, after), n)
        dv = _back(of_g * spectrum.conj(), v)
        z = jnp.fft.ifft(jnp.sum(of_v.conj() * of_g, 0)) * _rotation(n, of_g.dtype).conj()
        dh = jnp.concatenate([-z.imag[:, n - lags.zero :], z.real[:, : lags.taps - lags.zero]], 1).T
        dbefore = None if before is None else _times(dv, v).astype(before.dtype)
        dafter = None if after is None else _times(_back(of_v * spectrum, v), g).astype(after.dtype)
        return _times(dv, before).astype(v.dtype), dh, (dbefore, dafter)

    return _in_parts(of_channels, (v, h.astype(_accumulator(v.dtype)), gates), v, h, gates, g)


def _in_parts(function: Callable[..., Any], like: Any, *arrays: Any) -> Any:
    """`function` of arrays (..., C), on a CPU of a part of the channels at a time.

    XLA computes parts beside each other that don't need each other, where the passes over one part wait for each other.
    A part is as wide as a line of the cache: wider ones are slower to transpose. Where there are more than PARTS, a
    loop takes those one after the other, in memory that it uses again.

    like: arrays of the shapes and dtypes of the results.
    """
    channels = arrays[0].shape[-1]
    if arrays[0].size < MANY or channels <= CHANNELS:
        return function(*arrays)

    def side_by_side(*arrays: Any) -> Any:
        starts = range(0, channels, CHANNELS)
        parts = [function(*_cut(arrays, i, min(CHANNELS, channels - i))) for i in starts]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *parts)

    def in_steps(*arrays: Any) -> Any:
        steps = -(-channels // (PARTS * CHANNELS))
        width = -(-channels // (PARTS * steps))

        def step(i: Any, results: Any) -> Any:
            # A part that would reach beyond the end is the last one, some of it once more.
            for start in (width * (PARTS * i + j) for j in range(PARTS)):
                results = _put(results, function(*_cut(arrays, start, width)), start)
            return results

        return lax.fori_loop(0, steps, step, like)

    on_cpu = side_by_side if channels <= PARTS * CHANNELS else in_steps
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=function)


def _cut(arrays: Any, start: Any, width: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, width, a.ndim - 1), arrays)


def _put(arrays: Any, parts: Any, start: Any) -> Any:
    return jax.tree.map(
        lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, a.ndim - 1), arrays, parts
    )


def _times(x: jax.Array, gate: jax.Array | None) -> jax.Array:
    return x if gate is None else x.astype(_accumulator(x.dtype)) * gate.astype(_accumulator(x.dtype))


def _transform(v: jax.Array, n: int) -> jax.Array:
    x = v.swapaxes(1, 2).astype(_accumulator(v.dtype))
    rotation = _rotation(n, jnp.result_type(x, jnp.complex64))[: v.shape[1]]
    return jnp.fft.fft(jax.lax.complex(x * rotation.real, x * rotation.imag), n)


def _back(spectrum: jax.Array, like: jax.Array) -> jax.Array:
    z = jnp.fft.ifft(spectrum)[..., : like.shape[1]]
    rotation = _rotation(spectrum.shape[-1], z.dtype)[: like.shape[1]]
    return (z.real * rotation.real + z.imag * rotation.imag).swapaxes(1, 2)


def _spectrum(h: jax.Array, lags: Lags, n: int, dtype: np.dtype) -> jax.Array:
    before, after = h[: lags.zero].T.astype(dtype), h[lags.zero :].T.astype(dtype)
    re = jnp.pad(after, ((0, 0), (0, n - after.shape[1])))
    im = jnp.pad(-before, ((0, 0), (n - before.shape[1], 0)))
    return jnp.fft.fft(jax.lax.complex(re, im) * _rotation(n, jnp.result_type(dtype, jnp.complex64)))


def _rotation(n: int, dtype: np.dtype) -> Any:
    return np.exp(0.5j * np.pi * np.arange(n) / n).astype(dtype)


def _points(length: int) -> int:
    """The next length without prime factors above 5, which transforms are fast for."""
    candidates = (
        2**a * 3**b * 5**c
        for b in range(14)
        for c in range(10)
        for a in [max(0, (-(-length // (3**b * 5**c)) - 1).bit_length())]
    )
    return min(n for n in candidates if n >= length)


def _accumulator(dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, jnp.float32)
