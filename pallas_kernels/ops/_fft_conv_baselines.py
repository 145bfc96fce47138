"""Long convolution by the Fourier transforms of jax.numpy, PyTorch and SciPy, to be timed beside ours."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.baselines import Contestant, Prepare, of_jax, of_torch, versioned
from pallas_kernels.operators import Case


def baselines() -> Mapping[str, Callable[[Case], Prepare | None]]:
    """Other implementations by name, of plain causal convolutions; a name says what isn't installed."""

    def run(of: Callable[[Case], Prepare | None]) -> Callable[[Case], Prepare | None]:
        plain = lambda case: len(case.arguments) == 2 and not case.options  # noqa: E731
        return lambda case: of(case) if plain(case) else None

    return {
        "jnp.fft, real": run(_jnp),
        versioned("torch", "real FFT"): run(_torch),
        versioned("torch", "complex FFT"): run(functools.partial(_torch, real=False)),
        versioned("scipy", "oaconvolve"): run(_scipy),
    }


def _jnp(case: Case) -> Prepare:
    def convolve(u: jax.Array, k: jax.Array) -> jax.Array:
        x, h = (a.astype(jnp.float32).swapaxes(-1, -2) for a in (u, k))
        n = u.shape[1] + k.shape[0]
        y = jnp.fft.irfft(jnp.fft.rfft(x, n) * jnp.fft.rfft(h, n), n)[..., : u.shape[1]]
        return y.swapaxes(-1, -2).astype(u.dtype)

    return of_jax(convolve, case)


def _torch(case: Case, *, real: bool = True) -> Prepare | None:
    n = case.arguments[0].shape[1] + case.arguments[1].shape[0]

    def convolve(u: Any, k: Any) -> Any:
        from torch import fft

        there, back = (fft.rfft, fft.irfft) if real else (fft.fft, fft.ifft)
        y = back(there(u, n) * there(k, n), n)[..., : u.shape[-1]]
        return y if real else y.real

    # In the layout that it likes best, (batch, channels, length), and the dtype that it has transforms of.
    place = lambda a, i: a.swapaxes(-1, -2).astype(np.float32)  # noqa: E731
    return of_torch(convolve, case, place=place, back=lambda a, i: a.swapaxes(-1, -2))


def _scipy(case: Case) -> Prepare | None:
    try:
        from scipy import signal
    except ImportError:
        return None
    length, taps = case.arguments[0].shape[1], case.arguments[1].shape[0]

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        u, k, g = (np.ascontiguousarray(a.swapaxes(-1, -2), np.float32) for a in (*arguments, cotangent))

        def forward() -> list[np.ndarray]:
            return [signal.oaconvolve(u, k[None], axes=-1)[..., :length]]

        def gradients() -> list[np.ndarray]:
            du = signal.oaconvolve(g, k[None, :, ::-1], axes=-1)[..., taps - 1 :]
            dk = signal.oaconvolve(g, u[..., ::-1], axes=-1)[..., length - 1 :].sum(0)[..., :taps]
            return [*forward(), du, dk]

        return Contestant(forward, gradients, lambda out: [v.swapaxes(-1, -2) for v in out])

    return prepare
