"""Permutations of polynomials modulo X^n + 1: products with monomials, and automorphisms."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.moduli import bit_reversal, check_moduli
from pallas_kernels.ops.modular import check_residues, neg
from pallas_kernels.ops.ntt import NttPlan


def monomial_mul(x: jax.Array, k: int, moduli: Sequence[int]) -> jax.Array:
    """X^k times a polynomial.

    Args:
      x: (..., L, n) uint32, coefficients, canonical.
      k: any integer; X^n = -1.

    Returns:
      (..., L, n) uint32, canonical.
    """
    n = x.shape[-1]
    source = np.arange(n) - operator.index(k) % (2 * n)
    return _signed_gather(x, source % n, source // n % 2 == 1, moduli)


def automorphism(x: jax.Array, k: int, moduli: Sequence[int]) -> jax.Array:
    """The polynomial x(X^k), from coefficients.

    Args:
      x: (..., L, n) uint32, coefficients, canonical.
      k: odd.

    Returns:
      (..., L, n) uint32, canonical.
    """
    n = x.shape[-1]
    source = np.arange(n) * pow(_odd(k, n), -1, 2 * n) % (2 * n)
    return _signed_gather(x, source % n, source >= n, moduli)


def ntt_automorphism(y: jax.Array, k: int, plan: NttPlan) -> jax.Array:
    """The values of x(X^k), from those of x: a permutation. y: (..., L, n) as `ntt` gives them."""
    check_residues("ntt_automorphism", plan.moduli, y=y)
    if y.shape[-1] != plan.n:
        raise ValueError(
            f"ntt_automorphism: `y` must be (..., {len(plan.moduli)}, {plan.n}) for this plan, got shape {y.shape}"
        )
    return jnp.take(y, permutation(plan.n, k, plan.order), axis=-1)


@functools.lru_cache(maxsize=256)
def permutation(n: int, k: int, order: str = "bit_reversed") -> Any:
    """Where the values of x(X^k) stand among those of x."""
    places = np.arange(n) if order == "natural" else bit_reversal(n)
    exponents = (2 * places + 1) * _odd(k, n) % (2 * n)
    # Both orders are their own inverses.
    return places[(exponents - 1) // 2].astype(np.int32)


def _odd(k: int, n: int) -> int:
    """`k` modulo 2n."""
    if k % 2 == 0:
        raise ValueError(f"X -> X^k is an automorphism for odd k only, got {k}")
    return operator.index(k) % (2 * n)


def _signed_gather(
    x: jax.Array, source: np.ndarray, negative: np.ndarray, moduli: Sequence[int]
) -> jax.Array:
    moduli = check_moduli(moduli)
    check_residues("ring", moduli, x=x)
    moved = jnp.take(x, source, axis=-1)
    return jnp.where(negative, neg(moved, moduli, implementation="xla"), moved)
