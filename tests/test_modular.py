"""Modular arithmetic: against Python's integers, on every implementation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import lowering, moduli, testing
from pallas_kernels.kernels import modular as kernels
from pallas_kernels.ops.modular import OPERATIONS

MODULI = (
    3, 17, 257, 7681, 12289, 65537, 557057, 786433, 268369921, 260702209, 268042241, 536903681, 1073692673,
    2013265921, 2147473409, 2147483647,
)  # fmt: skip


def wide_words(q: int) -> list[int]:
    """Where an estimated quotient goes wrong, if it does anywhere."""
    near = {k for k in range(max(1, q - 1000), q)} | {1, 2}
    values = {0, 1, q - 1, q, q + 1, 2 * q - 1, (q - 1) ** 2, q * q - 1, 2**32 - 1, 2**32, 2**64 - 1}
    return sorted(values | {k * q - 1 for k in near} | {k * q for k in near})


def words(*values: int) -> jax.Array:
    return jnp.asarray(np.array(values, np.uint64).astype(np.uint32))


def test_reduce_where_quotients_turn(implementation):
    rng = np.random.default_rng(0)
    columns = [np.array(wide_words(q) + [0] * 2500, np.uint64)[:2500] for q in MODULI]
    z = np.concatenate([np.stack(columns), rng.integers(0, 2**64, (len(MODULI), 3000), np.uint64)], 1)
    low, high = (jnp.asarray((z >> np.uint64(s)).astype(np.uint32)) for s in (0, 32))
    got = pk.he.reduce(low, MODULI, high=high, implementation=implementation)
    np.testing.assert_array_equal(got, z % np.array(MODULI, np.uint64)[:, None])
    got = pk.he.reduce(low, MODULI, implementation=implementation)
    np.testing.assert_array_equal(got, np.asarray(low) % np.array(MODULI, np.uint32)[:, None])


@pytest.mark.slow
def test_reduce_a_million_random_words():
    z = np.random.default_rng(1).integers(0, 2**64, (len(MODULI), 10**6), np.uint64)
    low, high = (jnp.asarray((z >> np.uint64(s)).astype(np.uint32)) for s in (0, 32))
    got = jax.jit(functools.partial(pk.he.reduce, moduli=MODULI))(low, high=high)
    np.testing.assert_array_equal(got, z % np.array(MODULI, np.uint64)[:, None])


@pytest.mark.slow
def test_all_primes_of_rings_from_2_to_the_10():
    """One modulus of all had a reciprocal that was off by one, and random numbers did not find it."""
    q = np.arange(2**20) * 2**11 + 1
    prime = np.arange(2**20) > 0
    for p in filter(moduli.is_prime, range(3, 46341)):
        first = -pow(2**11, -1, p) % p
        prime[first::p] &= q[first::p] == p
    q = q[prime].astype(np.uint64)
    assert len(q) > 9e4 and 536903681 in q
    columns = [q - 1, q, q + 1, 2 * q - 1, (q - 1) ** 2, q**2 - 1, q**2 - q - 1, (q // 2) * q - 1, 0 * q - 1]
    z, primes = np.stack(columns, 1), tuple(q.tolist())
    low, high = (jnp.asarray((z >> np.uint64(s)).astype(np.uint32)) for s in (0, 32))
    np.testing.assert_array_equal(pk.he.reduce(low, primes, high=high), z % q[:, None])
    a, b = (np.stack(v, 1) for v in ([q - 1, q // 2, q // 2 + 1, q - 1], [q - 1, q - 1, q // 2, q // 2 + 1]))
    x, y = (jnp.asarray(v.astype(np.uint32)) for v in (a, b))
    expected = a * b % q[:, None]
    np.testing.assert_array_equal(pk.he.mul(x, y, primes), expected)
    quotient = pk.he.shoup_quotient(y, primes)
    np.testing.assert_array_equal(pk.he.mul(x, y, primes, method="shoup", quotient=quotient), expected)
    x, y = (pk.he.to_montgomery(v, primes) for v in (x, y))
    product = pk.he.mul(x, y, primes, method="montgomery")
    np.testing.assert_array_equal(pk.he.from_montgomery(product, primes), expected)


def edges(q: int) -> list[int]:
    return [
        x
        for x in (0, 1, 2, q // 2 - 1, q // 2, q // 2 + 1, q - 2, q - 1, 2**15, 2**16, 2**16 - 1)
        if 0 <= x < q
    ]


def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    rows = []
    for q in MODULI:
        some = np.array([(x, y) for x in edges(q) for y in edges(q)])
        rows.append(np.concatenate([some, rng.integers(0, q, (500, 2))])[:500])
    a, b = np.stack(rows).transpose(2, 0, 1).astype(np.uint32)
    return a, b


@pytest.mark.sweep
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o != "reduce"])
def test_operations_at_the_edges(operation, implementation):
    a, b = pairs()
    c = b[:, ::-1].copy()
    q = np.array(MODULI, object)[:, None]
    x, y, z = (v.astype(object) for v in (a, b, c))
    unword = np.array([pow(2**32, -1, m) for m in MODULI], object)[:, None]
    expected, arrays = {
        "add": (x + y, (a, b)),
        "sub": (x - y, (a, b)),
        "neg": (-x, (a,)),
        "mul": (x * y, (a, b)),
        "mul_add": (x * y + z, (a, b, c)),
        "mul_montgomery": (x * y * unword, (a, b)),
        "mul_shoup": (x * y, (a, b)),
        "to_montgomery": (x * 2**32, (a,)),
        "from_montgomery": (x * unword, (a,)),
    }[operation]
    options = {"moduli": MODULI, "implementation": implementation}
    if operation == "mul_shoup":
        got = pk.he.mul(a, b, method="shoup", quotient=pk.he.shoup_quotient(b, MODULI), **options)
    elif operation == "mul_montgomery":
        got = pk.he.mul(a, b, method="montgomery", **options)
    else:
        got = getattr(pk.he, operation)(*arrays, **options)
    np.testing.assert_array_equal(np.asarray(got), (expected % q).astype(np.uint32))


def test_mul_high():
    edges = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    a, b = (np.array(v, np.uint64) for v in zip(*((x, y) for x in edges for y in edges), strict=True))
    more = np.random.default_rng(3).integers(0, 2**32, (2, 10**6), np.uint64)
    a, b = np.concatenate([a, more[0]]), np.concatenate([b, more[1]])
    x, y = (jnp.asarray(v.astype(np.uint32).view(np.int32)) for v in (a, b))
    got = np.asarray(jax.jit(kernels.mul_high)(x, y)).view(np.uint32)
    np.testing.assert_array_equal(got, (a * b) >> np.uint64(32))


def test_montgomery_form_multiplies():
    q = (1073692673, 12289)
    a, b = (jnp.asarray(np.random.default_rng(4).integers(0, 12289, (2, 9)), jnp.uint32) for _ in range(2))
    x, y = (pk.he.to_montgomery(v, q) for v in (a, b))
    product = pk.he.mul(x, y, q, method="montgomery")
    np.testing.assert_array_equal(pk.he.from_montgomery(product, q), pk.he.mul(a, b, q))


def test_results_are_the_same_with_64_bit_types(implementation):
    a, b = map(jnp.asarray, pairs())
    narrow = pk.he.mul_add(a, b, a, MODULI, implementation=implementation)
    with lowering.enable_x64():
        wide = pk.he.mul_add(a, b, a, MODULI, implementation=implementation)
    assert wide.dtype == jnp.uint32
    np.testing.assert_array_equal(narrow, wide)


def test_jit_vmap_and_broadcasting(implementation):
    a, b = (jnp.asarray(v)[None] for v in pairs())
    mul = functools.partial(pk.he.mul, moduli=MODULI, implementation=implementation)
    expected = mul(a, b)
    np.testing.assert_array_equal(jax.jit(mul)(a, b), expected)
    np.testing.assert_array_equal(jax.vmap(mul)(a, b), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(mul, (0, None)))(a, b[0]), expected)
    np.testing.assert_array_equal(mul(a, b[0, :, :1]), mul(a, jnp.broadcast_to(b[:, :, :1], a.shape)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (((17,), [0]), TypeError, "must be an array of uint32"),
        (
            ((17, 7), np.zeros((3, 4), np.uint32)),
            ValueError,
            r"\(\.\.\., 2, N\) for 2 moduli, got shape \(3, 4\)",
        ),
        (((17,), np.zeros((1, 4), np.int32)), TypeError, "uint32, got int32"),
        (((17,), np.full((1, 4), 17, np.uint32)), ValueError, "canonical.*got 17 for q = 17"),
        (((15,), np.zeros((1, 4), np.uint32)), ValueError, "odd prime, got 15"),
        (((2,), np.zeros((1, 4), np.uint32)), ValueError, "odd prime, got 2"),
        (((2**31 + 11,), np.zeros((1, 4), np.uint32)), ValueError, r"below 2\^31"),
        (((17, 17), np.zeros((2, 4), np.uint32)), ValueError, "distinct"),
        ((17, np.zeros((1, 4), np.uint32)), TypeError, "sequence of ints"),
        (((), np.zeros((0, 4), np.uint32)), ValueError, "at least one"),
    ],
)
def test_what_is_refused(arguments, error, text):
    primes, a = arguments
    with pytest.raises(error, match=text):
        pk.he.add(a, a, primes)


def test_options_are_checked():
    a = jnp.zeros((1, 4), jnp.uint32)
    with pytest.raises(ValueError, match="'barrett', 'montgomery' or 'shoup', got 'karatsuba'"):
        pk.he.mul(a, a, (17,), method="karatsuba")
    with pytest.raises(ValueError, match="takes `quotient`"):
        pk.he.mul(a, a, (17,), method="shoup")
    with pytest.raises(ValueError, match="broadcast"):
        pk.he.add(a, jnp.zeros((1, 3), jnp.uint32), (17,))
    with pytest.raises(NotImplementedError, match="empty"), testing.interpret("tpu"):
        pk.he.neg(jnp.zeros((1, 0), jnp.uint32), (17,), implementation="pallas")


# Number theory on the host


def test_primes():
    sieve = np.ones(10**5, bool)
    sieve[:2] = False
    for i in range(2, 317):
        sieve[i * i :: i] = False
    assert [moduli.is_prime(i) for i in range(10**5)] == sieve.tolist()
    assert not any(map(moduli.is_prime, (25326001, 134234113, 2**31 - 2)))
    assert moduli.is_prime(2**31 - 1)


@pytest.mark.parametrize(
    ("n", "q", "psi"),
    [(8, 17, 3), (16, 257, 15), (1024, 12289, 7), (4096, 1073692673, 236231), (16384, 536903681, 29132)],
)
def test_smallest_roots(n, q, psi):
    assert moduli.root_of_unity(n, q) == psi


@pytest.mark.parametrize("q", MODULI)
def test_weight_digits_are_bytes_of_scaled_residues(q):
    w = np.concatenate([edges(q), np.random.default_rng(q).integers(0, q, 100)])
    digits = moduli.weight_digits(w, q).astype(object)
    for j in range(4):
        value = sum(digits[j, p] * 256**p for p in range(4))
        assert (abs(value) <= q // 2).all()
        assert ((value - w.astype(object) * 256**j) % q == 0).all()


def test_garner_is_the_inverse_of_reduction():
    primes = (257, 12289, 1073692673)
    values = [0, 1, 257 * 12289 * 1073692673 - 1, 123456789012345]
    assert moduli.garner(np.array([[v % q for v in values] for q in primes]), primes) == values
