"""Number-theoretic transforms: known answers, Python's integers and FLINT, laws, and what is refused."""

import functools

import flint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import lowering, moduli, testing
from pallas_kernels.he import NttPlan
from pallas_kernels.kernels.mod_matmul import reduction
from pallas_kernels.ops import _ntt_xla
from pallas_kernels.ops.modular import as_int32, as_uint32, draw_residues


def primes(n: int, count: int, bits: float = 30) -> tuple[int, ...]:
    found = moduli.ntt_primes(n, bits)
    return tuple(next(found) for _ in range(count))


def random(shape: tuple[int, ...], q: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(draw_residues(np.random.default_rng(seed), "normal", shape, q))


@pytest.mark.parametrize(
    ("order", "values"),
    [("natural", [5, 9, 13, 5, 0, 11, 8, 8]), ("bit_reversed", [5, 0, 13, 8, 9, 11, 5, 8])],
)
def test_known_answer(order, values):
    plan = NttPlan(8, (17,), order=order)
    x = jnp.arange(1, 9, dtype=jnp.uint32)[None]
    np.testing.assert_array_equal(pk.he.ntt(x, plan), [values])
    np.testing.assert_array_equal(pk.he.intt(jnp.uint32([values]), plan), x)


def definition(x: np.ndarray, q: int, order: str) -> np.ndarray:
    n = len(x)
    psi = moduli.root_of_unity(n, q)
    points = [pow(psi, 2 * k + 1, q) for k in range(n)]
    values = []
    for point in points:
        total = 0
        for c in reversed(x.tolist()):
            total = (total * point + c) % q
        values.append(total)
    return np.array(values)[np.arange(n) if order == "natural" else moduli.bit_reversal(n)]


@pytest.mark.sweep
@pytest.mark.parametrize("order", ["natural", "bit_reversed"])
@pytest.mark.parametrize(
    ("n", "q"), [(8, 17), (16, 257), (128, 257), (64, 65537), (256, 12289), (256, 2147473409)]
)
def test_against_the_definition(n, q, order):
    plan = NttPlan(n, (q,), order=order)
    for trial in testing.TRIALS:
        x = draw_residues(np.random.default_rng(n), trial, (1, n), (q,))
        y = pk.he.ntt(x, plan)
        np.testing.assert_array_equal(y[0], definition(x[0], q, order))
        np.testing.assert_array_equal(pk.he.intt(y, plan), x)


@pytest.mark.parametrize("split", [(8, 16), (16, 8)])
def test_a_small_prime_in_every_split(split):
    plan = NttPlan(128, (257,), split=split)
    for trial in testing.TRIALS:
        x = draw_residues(np.random.default_rng(0), trial, (1, 128), (257,))
        y = pk.he.ntt(x, plan)
        np.testing.assert_array_equal(y[0], definition(x[0], 257, "bit_reversed"))
        np.testing.assert_array_equal(pk.he.intt(y, plan), x)


@pytest.mark.parametrize("n", [2**13, pytest.param(2**16, marks=pytest.mark.slow)])
def test_values_are_those_of_flint(n):
    q = primes(n, 2)
    plan = NttPlan(n, q, order="natural")
    x = random((2, n), q)
    y = np.asarray(pk.he.ntt(x, plan))
    for limb, (p, psi) in enumerate(zip(q, plan.roots, strict=True)):
        polynomial = flint.nmod_poly(np.asarray(x)[limb].tolist(), p)
        places = np.random.default_rng(n).integers(0, n, 50)
        values = [int(polynomial(pow(psi, 2 * int(k) + 1, p))) for k in places]
        np.testing.assert_array_equal(y[limb, places], values)


SPLITS = [(4, 256), (8, 128), (16, 64), (32, 32), (64, 16), (128, 8), (256, 4)]


@pytest.mark.slow
def test_every_split_gives_the_same_bits():
    q = (536903681, 2147473409, 12289)
    x = random((2, 3, 1024), q)
    expected = pk.he.ntt(x, NttPlan(1024, q, split=SPLITS[0]))
    np.testing.assert_array_equal(expected[0, 0], definition(np.asarray(x)[0, 0], q[0], "bit_reversed"))
    for split in SPLITS:
        plan = NttPlan(1024, q, split=split)
        np.testing.assert_array_equal(pk.he.ntt(x, plan), expected)
        np.testing.assert_array_equal(pk.he.intt(expected, plan), x)


def test_splits_of_a_small_ring_give_the_same_bits():
    x = random((1, 64), (7681,))
    first, *others = (NttPlan(64, (7681,), split=(r, 64 // r)) for r in (2, 8, 16))
    expected = pk.he.ntt(x, first)
    for plan in others:
        np.testing.assert_array_equal(pk.he.ntt(x, plan), expected)
        np.testing.assert_array_equal(pk.he.intt(expected, plan), x)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["normal", "offset", "large"])
@pytest.mark.parametrize("n", [2**10, 2**13, pytest.param(2**16, marks=pytest.mark.slow)])
def test_in_digits_is_in_float64(n, kind):
    """What XLA does on a CPU and what it does elsewhere, which is what the kernels do."""
    q = next(q for q in range(2**31 - 2**31 % (2 * n) + 1 - 2 * n, 0, -2 * n) if moduli.is_prime(q))
    plan = NttPlan(n, (q, *primes(n, 1)))
    x = jnp.asarray(draw_residues(np.random.default_rng(n), kind, (2, 2, n), plan.moduli))
    for inverse, tables in ((False, plan.forward), (True, plan.inverse)):
        word = jnp.array(plan.moduli, jnp.int32)[:, None, None]
        how = reduction(max(plan.split), plan.moduli)
        got = _ntt_xla.in_digits(
            as_int32(x.reshape(2, 2, *plan.split)), *tables[3:], word, 1 / word.astype(jnp.float32),
            inverse=inverse, how=how,
        )  # fmt: skip
        expected = (pk.he.intt if inverse else pk.he.ntt)(x, plan, implementation="xla")
        np.testing.assert_array_equal(as_uint32(got).reshape(x.shape), expected)


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True])
def test_kernels_at_a_size_of_ckks(inverse, implementation):
    plan = NttPlan(2**12, primes(2**12, 2, 28))
    transform = pk.he.intt if inverse else pk.he.ntt
    x = random((3, 2, 2**12), plan.moduli)
    np.testing.assert_array_equal(transform(x, plan, implementation=implementation), transform(x, plan))


LARGE = [(2**11, 3), (2**13, 3), (2**15, 3), (2**16, 3), (2**12, 48), (2**16, 1)]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("n", "limbs"),
    [(2**10, 3), (2**12, 1), (2**14, 3), *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGE)],
)
def test_products_are_those_of_flint(n, limbs):
    q = primes(n, limbs)
    plan = NttPlan(n, q)
    f, g = (random((limbs, n), q, seed) for seed in (1, 2))
    got = np.asarray(jax.jit(pk.he.polymul)(f, g, plan))
    for limb, p in enumerate(q):
        product = flint.nmod_poly(np.asarray(f)[limb].tolist(), p) * flint.nmod_poly(
            np.asarray(g)[limb].tolist(), p
        )
        whole = np.array([int(c) for c in product.coeffs()] + [0] * (2 * n), np.int64)[: 2 * n]
        np.testing.assert_array_equal(got[limb], (whole[:n] - whole[n:]) % p)


def test_laws():
    n, q = 64, primes(64, 3)
    plan = NttPlan(n, q)
    f, g, h = (random((3, n), q, seed) for seed in range(3))
    multiply, add = functools.partial(pk.he.polymul, plan=plan), functools.partial(pk.he.add, moduli=q)
    np.testing.assert_array_equal(multiply(f, g), multiply(g, f))
    np.testing.assert_array_equal(multiply(multiply(f, g), h), multiply(f, multiply(g, h)))
    np.testing.assert_array_equal(multiply(f, add(g, h)), add(multiply(f, g), multiply(f, h)))
    np.testing.assert_array_equal(pk.he.ntt(add(f, g), plan), add(pk.he.ntt(f, plan), pk.he.ntt(g, plan)))
    one = jnp.zeros((3, n), jnp.uint32).at[:, 0].set(1)
    np.testing.assert_array_equal(pk.he.ntt(one, plan), jnp.ones((3, n), jnp.uint32))
    x = jnp.zeros((3, n), jnp.uint32).at[:, 1].set(1)
    odd = 2 * moduli.bit_reversal(n) + 1
    roots = [[pow(psi, k, p) for k in odd.tolist()] for psi, p in zip(plan.roots, q, strict=True)]
    np.testing.assert_array_equal(pk.he.ntt(x, plan), roots)
    for x in (f, g):
        np.testing.assert_array_equal(pk.he.intt(pk.he.ntt(x, plan), plan), x)
        np.testing.assert_array_equal(pk.he.ntt(pk.he.intt(x, plan), plan), x)


def test_monomials():
    n, q = 32, primes(32, 2)
    plan = NttPlan(n, q)
    f = random((2, n), q)
    shifts = (0, 1, 5, n - 1, n, n + 3, 2 * n - 1, 2 * n, -1, -n)
    for k in (*shifts, 2**70 + 1, -(2**70) - 1, *np.array([5], np.int8)):
        sign = 1 if int(k) % (2 * n) < n else -1
        x = np.zeros((2, n), np.int64)
        x[:, int(k) % n] = sign
        monomial = jnp.asarray(x % np.array(q)[:, None], jnp.uint32)
        np.testing.assert_array_equal(pk.he.monomial_mul(f, k, q), pk.he.polymul(f, monomial, plan))


@pytest.mark.parametrize("order", ["natural", "bit_reversed"])
def test_automorphisms(order):
    n, q = 32, primes(32, 2)
    plan = NttPlan(n, q, order=order)
    f, g = (random((2, n), q, seed) for seed in (1, 2))
    for k in (1, 3, 5, 25, 2 * n - 1):
        image = pk.he.automorphism(f, k, q)
        # X -> X^k, term by term.
        terms = [pk.he.monomial_mul(f * (np.arange(n) == i), (k - 1) * i, q) for i in range(n)]
        expected = functools.reduce(lambda a, b: pk.he.add(a, b, q), terms)
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(
            pk.he.ntt_automorphism(pk.he.ntt(f, plan), k, plan), pk.he.ntt(image, plan)
        )
        product = pk.he.automorphism(pk.he.polymul(f, g, plan), k, q)
        np.testing.assert_array_equal(product, pk.he.polymul(image, pk.he.automorphism(g, k, q), plan))
    y = pk.he.ntt(f, plan)
    for k in (2**70 + 5, *np.array([5], np.int8)):
        np.testing.assert_array_equal(pk.he.automorphism(f, k, q), pk.he.automorphism(f, 5, q))
        np.testing.assert_array_equal(pk.he.ntt_automorphism(y, k, plan), pk.he.ntt_automorphism(y, 5, plan))
    twice = pk.he.automorphism(pk.he.automorphism(f, 5, q), 5, q)
    np.testing.assert_array_equal(twice, pk.he.automorphism(f, 25, q))
    for k, order_of_k in ((5, n // 2), (2 * n - 1, 2)):
        around = functools.reduce(lambda x, _: pk.he.automorphism(x, k, q), range(order_of_k), f)
        np.testing.assert_array_equal(around, f)


def test_transforms(implementation):
    plan = NttPlan(1024, (2147473409, 12289))
    x = random((2, 2, 1024), plan.moduli)
    ntt = functools.partial(pk.he.ntt, implementation=implementation)
    expected = pk.he.ntt(x, plan)
    np.testing.assert_array_equal(jax.jit(ntt)(x, plan), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(ntt, (0, None)))(x, plan), expected)
    with lowering.enable_x64():
        np.testing.assert_array_equal(ntt(x, plan), expected)
    assert jax.eval_shape(ntt, x, plan).dtype == jnp.uint32


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["batch", "limbs"])
def test_sharded_over_a_batch_or_limbs(spec):
    plan = NttPlan(64, primes(64, 8))
    x = random((8, 8, 64), plan.moduli)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), spec)
    got = jax.jit(pk.he.ntt, out_shardings=sharding)(jax.device_put(x, sharding), plan)
    assert got.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(got, pk.he.ntt(x, plan))


def test_a_hundred_runs_are_alike_and_operands_may_be_donated():
    plan = NttPlan(1024, primes(1024, 2))
    x = random((2, 1024), plan.moduli)
    transform = jax.jit(pk.he.ntt)
    expected = np.asarray(transform(x, plan))
    assert all(np.array_equal(transform(x, plan), expected) for _ in range(100))
    np.testing.assert_array_equal(jax.jit(pk.he.ntt, donate_argnums=0)(x + 0, plan), expected)


def test_plans():
    plan, same = NttPlan(64, (257, 7681)), NttPlan(64, (257, 7681))
    assert plan == same and hash(plan) == hash(same)
    assert plan != NttPlan(64, (257,)) and plan != NttPlan(64, (257, 7681), order="natural")
    assert plan == NttPlan(np.arange(65)[-1], (257, 7681))
    assert NttPlan(64, (257, 7681)).limbs([1]) == NttPlan(64, (7681,))
    x = random((1, 64), (7681,))
    np.testing.assert_array_equal(pk.he.ntt(x, plan.limbs(slice(1, 2))), pk.he.ntt(x, NttPlan(64, (7681,))))
    with pytest.raises(AttributeError, match="can't be changed"):
        plan.n = 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n": 12, "moduli": (97,)}, "power of two from 8 to 65536, got 12"),
        ({"n": 4, "moduli": (17,)}, "power of two from 8"),
        ({"n": 2**17, "moduli": (17,)}, "power of two from 8"),
        ({"n": 16, "moduli": (17,)}, "1 modulo 32, got 17, which is 17"),
        ({"n": 8, "moduli": (17, 17)}, "distinct"),
        ({"n": 8, "moduli": (33,)}, "odd prime, got 33"),
        ({"n": 8, "moduli": (17,), "order": "random"}, "'bit_reversed' or 'natural', got 'random'"),
        ({"n": 8, "moduli": (17,), "split": (4, 4)}, "whose product is 8"),
        ({"n": 8, "moduli": (17,), "split": (8, 1)}, "whose product is 8"),
    ],
)
def test_bad_plans_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        NttPlan(**arguments)


def test_bad_operands_are_refused():
    plan = NttPlan(8, (17,))
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 1, 8\) for this plan, got shape \(1, 16\)"):
        pk.he.ntt(np.zeros((1, 16), np.uint32), plan)
    for n in (4, 16):
        with pytest.raises(
            ValueError, match=rf"`y` must be \(\.\.\., 1, 8\) for this plan, got shape \(1, {n}\)"
        ):
            pk.he.ntt_automorphism(jnp.zeros((1, n), jnp.uint32), 3, plan)
    with pytest.raises(TypeError, match=r"`n` must be an int, got 8\.0"):
        NttPlan(8.0, (17,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"canonical.*got 17"):
        pk.he.ntt(np.full((1, 8), 17, np.uint32), plan)
    with pytest.raises(TypeError, match="`plan` must be an NttPlan"):
        pk.he.ntt(np.zeros((1, 8), np.uint32), (17,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotImplementedError, match="2 x 4 are left to XLA"), testing.interpret("tpu"):
        pk.he.ntt(np.zeros((1, 8), np.uint32), plan, implementation="pallas")
