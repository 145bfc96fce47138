"""Residue number systems, against Python's integers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import lowering, moduli
from pallas_kernels.he import BasisPlan, NttPlan, rns

BIG = (536903681, 1073692673, 2147473409, 2147483647)
SMALL = (3, 17, 257, 12289)


def primes(count: int, bits: float = 28) -> tuple[int, ...]:
    return tuple(itertools.islice(moduli.ntt_primes(2**11, bits), count))


def integers(random: np.random.Generator, bound: int, n: int = 50) -> np.ndarray:
    """In (-bound / 2, bound / 2), its ends and 0."""
    digits = [int(d) for d in random.integers(0, 2**62, n)]
    scale = [int(d) for d in random.integers(0, 2**62, n)]
    values = [(a * 2**62 + b) * bound // 2**124 - bound // 2 for a, b in zip(digits, scale, strict=True)]
    return np.array([0, 1, -1, bound // 2 - 1, 1 - bound // 2, *values], object)


@pytest.mark.parametrize("q", [BIG, SMALL, primes(9), (2147483647,)], ids=len)
def test_integers_come_back(q, random):
    x = integers(random, math.prod(q))
    residues = rns.from_integers(x, q)
    assert (rns.to_integers(residues, q) == x).all()
    assert (rns.to_integers(residues, q, signed=False) == x % math.prod(q)).all()


@pytest.mark.parametrize("dtype", np.typecodes["AllInteger"])
def test_integers_of_every_dtype(dtype, random):
    ends = np.iinfo(dtype)
    x = np.array([ends.min, ends.max, *random.integers(ends.min, ends.max, 50, dtype)], dtype)
    for q in (SMALL, (*SMALL, *BIG)):
        expected = x.astype(object) % np.array(q, object)[:, None]
        np.testing.assert_array_equal(rns.from_integers(x, q), expected)


BASES = [
    (BIG, primes(5)), (primes(2), BIG), (primes(1), SMALL), (SMALL, BIG), (primes(8), primes(20)[8:]),
    (primes(8), (260702209, 268042241)), (primes(24), (260702209, 268042241)),
    (primes(24), BIG), (primes(64), primes(70)[64:]), (primes(12), primes(16, 20)),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), BASES, ids=lambda b: str(len(b)))
def test_approximate_conversions_differ_by_one_multiple(source, target, random):
    whole = math.prod(source)
    x = integers(random, whole)
    got = np.asarray(rns.basis_conversion(rns.from_integers(x, source), BasisPlan(source, target))).astype(
        object
    )
    limit = len(source) // 2
    matches = np.array([[((x + v * whole) % p == row) for p, row in zip(target, got, strict=True)]
                        for v in range(-limit, limit + 1)])  # fmt: skip
    # The same v for all targets.
    assert matches.all(1).any(0).all()


@pytest.mark.parametrize(("source", "target"), BASES, ids=lambda b: str(len(b)))
def test_exact_conversions(source, target, random):
    whole = math.prod(source)
    x = integers(random, whole - 2 * max(2, whole * len(source) >> 22))
    got = rns.basis_conversion(rns.from_integers(x, source), BasisPlan(source, target), exact=True)
    np.testing.assert_array_equal(got, rns.from_integers(x, target))


def test_up_and_down_again(random):
    q, p = primes(5)[:3], primes(5)[3:]
    x = integers(random, math.prod(q) // 4)
    up = rns.mod_up(rns.from_integers(x, q), q, p, exact=True)
    assert (rns.to_integers(up, (*q, *p)) == x).all()
    scaled = rns.from_integers(x * math.prod(p), (*q, *p))
    assert (rns.to_integers(rns.mod_down(scaled, q, p), q) == x).all()


def rounded(x: np.ndarray, q: int) -> np.ndarray:
    """x / q to the nearest; there are no ties, as q is odd."""
    return (x + q // 2) // q


CHAINS = [
    primes(4), (557057, 1073740609, 1073741953), (1073741953, 1073740609, 557057), (17, 2147483647), (2147483647, 3),
]  # fmt: skip


@pytest.mark.parametrize("q", CHAINS, ids=str)
def test_rescale_rounds(q, random):
    x = integers(random, math.prod(q))
    got = rns.to_integers(rns.rescale(rns.from_integers(x, q), q), q[:-1])
    whole = math.prod(q[:-1])
    assert ((got - rounded(x, q[-1])) % whole == 0).all()


def test_two_rescales_are_one_of_two(random):
    q = primes(5)
    x = rns.from_integers(integers(random, math.prod(q)), q)
    np.testing.assert_array_equal(rns.rescale(x, q, 2), rns.rescale(rns.rescale(x, q), q[:-1]))
    twice = rounded(rounded(rns.to_integers(x, q), q[4]), q[3])
    np.testing.assert_array_equal(rns.rescale(x, q, 2), rns.from_integers(twice, q[:3]))
    with pytest.raises(ValueError, match="of 5 limbs, 1 to 4 can be dropped, not 5"):
        rns.rescale(x, q, 5)


@pytest.mark.parametrize("exact", [False, True])
def test_mod_down(exact, random):
    q, p = primes(6)[:3], primes(6)[3:]
    x = integers(random, math.prod(q) * math.prod(p) // 2)
    got = rns.to_integers(rns.mod_down(rns.from_integers(x, (*q, *p)), q, p, exact=exact), q)
    error = got - rounded(x, math.prod(p))
    assert (abs(error) <= (0 if exact else 1)).all()


def test_mod_down_of_values_is_that_of_coefficients(random):
    n, q = 64, tuple(itertools.islice(moduli.ntt_primes(64, 28), 5))
    plan = NttPlan(n, q)
    x = rns.from_integers(random.integers(-(2**60), 2**60, n), q)
    got = jax.jit(rns.mod_down_values, static_argnums=2)(pk.he.ntt(x, plan), plan, 2)
    np.testing.assert_array_equal(pk.he.intt(got, plan.limbs(slice(3))), rns.mod_down(x, q[:3], q[3:]))


def test_inner_product(random):
    q = BIG
    x, y = (random.integers(0, np.array(q)[:, None], (5, 4, 9)) for _ in range(2))
    got = rns.inner_product(jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32), q)
    np.testing.assert_array_equal(got, (x.astype(object) * y).sum(0) % np.array(q, object)[:, None])


def test_lift(random):
    for source, target in ((2147483647, SMALL), (17, BIG)):
        x = np.concatenate([[0, source // 2, source // 2 + 1, source - 1], random.integers(0, source, 20)])
        got = rns.lift(jnp.asarray(x, jnp.uint32)[None], source, target)
        np.testing.assert_array_equal(got, rns.from_integers(moduli.centred(x, source), target))


def test_jit_and_vmap(random):
    plan = BasisPlan(primes(4), BIG)
    x = rns.from_integers(random.integers(0, 2**60, (3, 40)), plan.source)
    convert = functools.partial(pk.he.basis_conversion, exact=True)
    expected = convert(x, plan)
    np.testing.assert_array_equal(jax.jit(convert)(x, plan), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(convert, (0, None)))(x, plan), expected)
    with lowering.enable_x64():
        wide = convert(x, plan)
    assert wide.dtype == jnp.uint32
    np.testing.assert_array_equal(wide, expected)


def test_what_is_refused():
    with pytest.raises(TypeError, match="integers are wanted, got float64"):
        rns.from_integers(np.ones(3), (17,))
    with pytest.raises(ValueError, match="can't be divided by, and kept"):
        rns.mod_down(jnp.zeros((2, 3), jnp.uint32), (17,), (17,))
    with pytest.raises(ValueError, match="at most 128 source limbs, got 129"):
        BasisPlan(primes(129), (17,))
    with pytest.raises(TypeError, match="must be a BasisPlan"):
        rns.basis_conversion(jnp.zeros((1, 3), jnp.uint32), (17,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 2, N\)"):
        pk.he.basis_conversion(jnp.zeros((1, 3), jnp.uint32), BasisPlan((17, 19), (23,)))
