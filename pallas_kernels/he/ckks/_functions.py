"""Matrix-vector products and polynomials of ciphertexts."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.he.ckks._ciphertexts import (
    Ciphertext,
    add,
    drop_level,
    multiply,
    relinearise,
    rescale,
    rotate,
)
from pallas_kernels.he.ckks._encoding import Plaintext, encode
from pallas_kernels.he.ckks._keys import EvaluationKeys
from pallas_kernels.he.ckks._parameters import Parameters


def matrix(m: Any, parameters: Parameters, *, level: int, stride: int = 1) -> dict[int, dict[int, Plaintext]]:
    """Encode a square matrix for `matrix_vector`; on the host.

    Args:
      m: (d, d), with d stride = the number of slots, or d stride that divides it: the vector then stands there again
        and again.
      level: of the vectors. stride: slots between one entry of a vector and the next; those between hold other vectors.

    Returns:
      Its diagonals, by giant and by baby step.
    """
    m = np.asarray(m, np.complex128)
    d, slots = len(m), parameters.slots
    if m.ndim != 2 or m.shape[1] != d or slots % (d * stride):
        raise ValueError(
            f"ckks: a matrix (d, d) with d * {stride} dividing {slots} is wanted, got shape {m.shape}"
        )
    baby = 1 << (d - 1).bit_length() // 2 if d > 1 else 1
    scale = parameters.scales[level - 1] * parameters.dropped(level) / parameters.scales[level]
    rows, plan = np.arange(d), {}
    for k in range(d):
        giant, step = k // baby * baby, k % baby
        diagonal = np.roll(m[rows, (rows + k) % d], giant)
        if diagonal.any():
            whole = np.tile(np.repeat(diagonal, stride), slots // (d * stride))
            plan.setdefault(giant, {})[step] = encode(whole, parameters, level=level, scale=scale)
    return plan


def matrix_rotations(d: int, stride: int = 1) -> set[int]:
    """The rotations that `matrix_vector` takes for a (d, d) matrix."""
    baby = 1 << (d - 1).bit_length() // 2 if d > 1 else 1
    return {stride * k for k in (*range(1, baby), *range(baby, d, baby))}


def matrix_vector(
    m: dict[int, dict[int, Plaintext]], x: Ciphertext, keys: EvaluationKeys, *, stride: int = 1
) -> Ciphertext:
    """Matrix times vector, by baby and giant steps: about 2 sqrt(d) rotations; one level down.

    Args:
      m: from `matrix`, of the level of x and the same stride.
    """
    steps = sorted({k for row in m.values() for k in row})
    turned = {k: rotate(x, k * stride, keys) for k in steps}
    total = None
    for giant, row in m.items():
        terms = [multiply(turned[k], diagonal) for k, diagonal in row.items()]
        part = rotate(functools.reduce(add, terms), giant * stride, keys)
        total = part if total is None else add(total, part)
    if total is None:
        raise ValueError("ckks: the matrix is zero")
    return rescale(total)


def square(x: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """x^2 in every slot; one level down."""
    return rescale(relinearise(multiply(x, x), keys))


def product(x: Ciphertext, y: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """x y in every slot, relinearised and rescaled: one level below the lower of the two."""
    level = min(x.level, y.level)
    return rescale(relinearise(multiply(drop_level(x, level), drop_level(y, level)), keys))


def polynomial(x: Ciphertext, coefficients: Sequence[float], keys: EvaluationKeys) -> Ciphertext:
    """sum_k coefficients[k] x^k in every slot, of degree d: 1 + ceil(log2(d)) levels down.

    Args:
      coefficients: the constant one first; degree 1 at least.
    """
    degree = len(coefficients) - 1
    if degree < 1:
        raise ValueError("ckks: a polynomial of degree 1 at least is wanted")
    powers = {1: x}
    for k in range(2, degree + 1):
        high = 1 << (k - 1).bit_length() - 1
        powers[k] = product(powers[high], powers[k - high], keys)
    level, p = min(power.level for power in powers.values()), x.parameters
    scale = p.scales[level - 1] * p.dropped(level) / p.scales[level] if level else 1.0
    total = None
    for k in range(1, degree + 1):
        if coefficients[k]:
            term = multiply(
                drop_level(powers[k], level),
                encode(_constant(coefficients[k], p), p, level=level, scale=scale),
            )
            total = term if total is None else add(total, term)
    if total is None:
        raise ValueError("ckks: a polynomial that depends on x is wanted")
    total = rescale(total)
    return add(total, encode(_constant(coefficients[0], p), p, level=total.level, scale=total.scale))


def _constant(value: complex, p: Parameters) -> np.ndarray:
    return np.full(p.slots, value)
