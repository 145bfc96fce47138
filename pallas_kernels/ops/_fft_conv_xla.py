"""Long convolution and its gradients in plain XLA, by its own Fourier transforms: what runs on a CPU.

Modulo z^N - i, the product of two real polynomials of up to N coefficients holds the first N coefficients of their
product in its real part and the rest in its imaginary part. So a causal convolution takes a complex transform of N >= L
points for every row, of samples that are rotated by exp(i pi n / 2 N), where the usual one takes a real transform of
2 L points: there is no padding to write, read and transform, and memory is what limits transforms on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fourier import Lags


def convolve(v: jax.Array, h: jax.Array, lags: Lags, *, transposed: bool) -> jax.Array:
    """The convolution of v (B, L, C) with h (taps, C), or its transpose, in v's dtype."""
    n = _points(lags.length)
    spectrum = _spectrum(h, lags, n, _accumulator(v.dtype))
    return _back(_transform(v, n) * (spectrum.conj() if transposed else spectrum), v)


def gradients(v: jax.Array, h: jax.Array, g: jax.Array, lags: Lags) -> tuple[jax.Array, jax.Array]:
    """The gradients of `convolve` in v and in h for the cotangent g, in v's dtype and in float32 or wider."""
    n = _points(lags.length)
    of_g = _transform(g, n)
    dv = _back(of_g * _spectrum(h, lags, n, _accumulator(v.dtype)).conj(), v)
    z = jnp.fft.ifft(jnp.sum(_transform(v, n).conj() * of_g, 0)) * _rotation(n, of_g.dtype).conj()
    before, after = -z.imag[:, n - lags.zero :], z.real[:, : lags.taps - lags.zero]
    return dv, jnp.concatenate([before, after], 1).T


def _transform(v: jax.Array, n: int) -> jax.Array:
    x = v.swapaxes(1, 2).astype(_accumulator(v.dtype))
    rotation = _rotation(n, jnp.result_type(x, jnp.complex64))[: v.shape[1]]
    return jnp.fft.fft(jax.lax.complex(x * rotation.real, x * rotation.imag), n)


def _back(spectrum: jax.Array, like: jax.Array) -> jax.Array:
    z = jnp.fft.ifft(spectrum)[..., : like.shape[1]]
    rotation = _rotation(spectrum.shape[-1], z.dtype)[: like.shape[1]]
    return (z.real * rotation.real + z.imag * rotation.imag).swapaxes(1, 2).astype(like.dtype)


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
