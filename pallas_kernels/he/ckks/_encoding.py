"""Vectors as polynomials: the values of slots are those at the odd powers of a root of unity."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.he import rns
from pallas_kernels.he.ckks._parameters import Parameters, checked_level, plan_of
from pallas_kernels.ops.ntt import intt, ntt


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["scale", "level"])
@dataclass(frozen=True)
class Plaintext:
    """An encoded vector: (limbs, n) values of its polynomial, times the scale."""

    values: jax.Array
    scale: float
    level: int


@functools.lru_cache(maxsize=16)
def _slot_places(n: int) -> np.ndarray:
    """Where slot j stands among the odd powers of the root: at the power 5^j."""
    powers = np.array([pow(5, j, 2 * n) for j in range(n // 2)])
    return (powers - 1) // 2


def encode(
    values: Any, parameters: Parameters, *, level: int | None = None, scale: float | None = None
) -> Plaintext:
    """Encode a vector; on the host.

    Args:
      values: n / 2 complex numbers, or fewer, followed by zeros.
      level: of what it will be combined with; the top one by default. scale: that of the level by default.

    Raises:
      ValueError: there are more values than slots, or they are too large for the moduli, or not finite; `scale` is not
        finite and above 0.
    """
    level = parameters.depth if level is None else checked_level(parameters, level)
    scale = parameters.scales[level] if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"ckks: `scale` must be finite and above 0, got {scale}")
    values = np.asarray(values, np.complex128)
    n = parameters.n
    if values.ndim != 1 or len(values) > n // 2 or not np.isfinite(values).all():
        raise ValueError(f"ckks: `values` must be up to {n // 2} finite numbers, got shape {values.shape}")
    points = np.zeros(n, np.complex128)
    places = _slot_places(n)[: len(values)]
    points[places] = values
    points[n - 1 - places] = values.conj()
    # The polynomial with these values at the odd powers of exp(i pi / n).
    coefficients = (np.fft.fft(points) / n * np.exp(-1j * np.pi * np.arange(n) / n)).real * scale
    plan = plan_of(parameters, level)
    # Python compares its own numbers of any size.
    if float(np.abs(coefficients).max()) * 2 >= math.prod(plan.moduli):
        raise ValueError(
            f"ckks: values times the scale 2^{math.log2(scale):.1f} exceed the moduli of level {level}"
        )
    integers = np.rint(coefficients)
    big = np.abs(integers).max() >= 2**62
    integers = np.array([int(c) for c in integers], object) if big else integers.astype(np.int64)
    return Plaintext(ntt(rns.from_integers(integers, plan.moduli), plan), scale, level)


def decode(plaintext: Plaintext, parameters: Parameters) -> np.ndarray:
    """The vector of a plaintext: n / 2 complex numbers; on the host."""
    plan, n = plan_of(parameters, plaintext.level), parameters.n
    integers = rns.to_integers(intt(plaintext.values, plan), plan.moduli)
    coefficients = integers.astype(np.float64) / plaintext.scale
    points = np.fft.ifft(coefficients * np.exp(1j * np.pi * np.arange(n) / n)) * n
    return points[_slot_places(n)]
