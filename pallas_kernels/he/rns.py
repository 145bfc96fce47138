"""Integers modulo products of primes, as residues: in and out, to larger and smaller moduli, rounded quotients.

Arrays are (..., L, N) uint32, canonical, a limb for every prime; coefficients, unless a function says values.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.moduli import check_moduli, garner
from pallas_kernels.ops.basis_conversion import BasisPlan, basis_conversion
from pallas_kernels.ops.modular import check_residues, mul, mul_add, reduce, sub
from pallas_kernels.ops.ntt import NttPlan, intt, ntt


def from_integers(x: Any, moduli: Sequence[int]) -> jax.Array:
    """Residues of integers; on the host.

    Args:
      x: (..., N), integers of any size: numpy's, or Python's in an array of objects.

    Returns:
      (..., L, N) uint32.

    Example:
      >>> import numpy as np
      >>> from pallas_kernels.he import rns
      >>> print(rns.from_integers(np.array([-1, 20]), (17, 7)))
      [[16  3]
       [ 6  6]]
    """
    x = np.asarray(x)
    if x.dtype != object and not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"rns: integers are wanted, got {x.dtype}")
    if x.dtype.itemsize < 8:
        x = x.astype(np.int64)  # numpy wants a modulus of the dtype of what it divides.
    limbs = [(x % q).astype(np.uint32) for q in check_moduli(moduli)]
    return jnp.asarray(np.stack(limbs, -2))


def to_integers(x: Any, moduli: Sequence[int], *, signed: bool = True) -> np.ndarray:
    """The integers of residues, by the Chinese remainder theorem; on the host.

    Args:
      x: (..., L, N) uint32.
      signed: in (-Q/2, Q/2), else in [0, Q).

    Returns:
      (..., N), Python's integers.
    """
    moduli = check_moduli(moduli)
    check_residues("rns", moduli, x=x)
    limbs = np.moveaxis(np.asarray(x), -2, 0)
    whole = math.prod(moduli)
    values = np.array(garner(limbs, moduli), object).reshape(limbs.shape[1:])
    return np.where(values > whole // 2, values - whole, values) if signed else values


def mod_up(x: jax.Array, source: Sequence[int], extra: Sequence[int], *, exact: bool = False) -> jax.Array:
    """Add limbs: (..., K, N) to (..., K + J, N). Unless `exact`, what the new limbs hold is x + v Q, |v| <= K / 2."""
    more = basis_conversion(x, basis(tuple(source), tuple(extra)), exact=exact)
    return jnp.concatenate([x, more], -2)


def mod_down(x: jax.Array, moduli: Sequence[int], extra: Sequence[int], *, exact: bool = False) -> jax.Array:
    """Divide by the product P of the last limbs, and drop them: (..., L + K, N) to (..., L, N).

    The result is (x - r) / P with r = x modulo P, of which `exact` gives the one nearest to 0: x / P, rounded. Else r
    may be off by v P, and the result by v, |v| <= K / 2. (One limb is always exact.)
    """
    count = len(moduli)
    remainder = basis_conversion(x[..., count:, :], basis(tuple(extra), tuple(moduli)), exact=exact)
    return _divided(x[..., :count, :], remainder, tuple(moduli), math.prod(extra))


def rescale(x: jax.Array, moduli: Sequence[int], count: int = 1) -> jax.Array:
    """Divide by the last modulus, rounded to the nearest, and drop it; `count` times, one after the other.

    Example:
      >>> import numpy as np
      >>> from pallas_kernels.he import rns
      >>> x = rns.from_integers(np.array([1000, -1000]), (97, 193, 17))
      >>> print(rns.to_integers(rns.rescale(x, (97, 193, 17)), (97, 193)))
      [59 -59]
    """
    moduli = tuple(moduli)
    if not 0 < count < len(moduli):
        raise ValueError(f"rns: of {len(moduli)} limbs, 1 to {len(moduli) - 1} can be dropped, not {count}")
    for last in range(len(moduli) - 1, len(moduli) - 1 - count, -1):
        x = mod_down(x, moduli[:last], moduli[last : last + 1])
    return x


def mod_down_values(x: jax.Array, plan: NttPlan, count: int) -> jax.Array:
    """`mod_down` of values, as `ntt` gives them: by the last `count` limbs of the plan."""
    kept = len(plan.moduli) - count
    moduli, extra = plan.moduli[:kept], plan.moduli[kept:]
    below = intt(x[..., kept:, :], plan.limbs(slice(kept, None)))
    remainder = ntt(basis_conversion(below, basis(extra, moduli)), plan.limbs(slice(kept)))
    return _divided(x[..., :kept, :], remainder, moduli, math.prod(extra))


def inner_product(x: jax.Array, y: jax.Array, moduli: Sequence[int]) -> jax.Array:
    """sum_d x[d] y[d]: what key switching does with digits and keys.

    Args:
      x: (D, ..., L, N), y: (D, ..., L, N) uint32, canonical; what lies between broadcasts.
    """
    terms = list(zip(x, y, strict=True))
    first = mul(*terms[0], moduli, implementation="xla")
    add = functools.partial(mul_add, moduli=moduli, implementation="xla")
    return functools.reduce(lambda total, term: add(*term, total), terms[1:], first)


def constant(value: int, moduli: Sequence[int]) -> jax.Array:
    """(L, 1) residues of one integer."""
    return jnp.array([value % q for q in moduli], jnp.uint32)[:, None]


def lift(x: jax.Array, source: int, moduli: Sequence[int]) -> jax.Array:
    """Residues modulo one prime, nearest to 0, as residues modulo others: (..., 1, N) to (..., L, N)."""
    word = reduce(
        jnp.broadcast_to(x, (*x.shape[:-2], len(moduli), x.shape[-1])), moduli, implementation="xla"
    )
    shifted = sub(word, constant(source, moduli), moduli, implementation="xla")
    return jnp.where(x > source // 2, shifted, word)


def _divided(x: jax.Array, remainder: jax.Array, moduli: tuple[int, ...], divisor: int) -> jax.Array:
    if any(math.gcd(divisor, q) > 1 for q in moduli):
        raise ValueError(f"rns: a modulus can't be divided by, and kept: got {divisor} and {moduli}")
    inverse = jnp.array([pow(divisor, -1, q) for q in moduli], jnp.uint32)[:, None]
    difference = sub(x, remainder, moduli, implementation="xla")
    return mul(difference, inverse, moduli, implementation="xla")


@functools.lru_cache(maxsize=256)
def basis(source: tuple[int, ...], target: tuple[int, ...]) -> BasisPlan:
    """The plan, made once. Where that happens within a trace, its arrays must not be of the trace."""
    with jax.ensure_compile_time_eval():
        return BasisPlan(source, target)
