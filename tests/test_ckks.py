"""CKKS: errors of every operation, noise against its prediction, and what is refused."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lowering, moduli
from pallas_kernels.he import NttPlan, automorphism, ckks, intt, ntt, rns
from pallas_kernels.he.ckks import _keys
from pallas_kernels.he.ckks._ciphertexts import switch
from pallas_kernels.he.ckks._parameters import plan_of
from pallas_kernels.ops import modular


class Setting:
    """Keys of a ring, and short names."""

    def __init__(self, n: int, depth: int, seed: int, **options):
        self.p = ckks.parameters(n, depth, **options)
        rotations = {1, 5, n // 2 - 3} | ckks.matrix_rotations(8, n // 16) | ckks.matrix_rotations(8)
        self.secret, self.public, self.keys = ckks.generate_keys(
            self.p, rotations=rotations, conjugation=True
        )
        self.random = np.random.default_rng(seed)

    def vector(self, complex_too: bool = True) -> np.ndarray:
        parts = self.random.uniform(-1, 1, (2, self.p.slots))
        return parts[0] + 1j * parts[1] * complex_too

    def encrypt(self, v: np.ndarray, **options) -> ckks.Ciphertext:
        return ckks.encrypt(ckks.encode(v, self.p, **options), self.public)

    def decrypt(self, x: ckks.Ciphertext) -> np.ndarray:
        return ckks.decode(ckks.decrypt(x, self.secret), self.p)

    def error(self, x: ckks.Ciphertext, expected: np.ndarray) -> float:
        return float(np.abs(self.decrypt(x) - expected).max())


@pytest.fixture(scope="module")
def small() -> Setting:
    return Setting(2**10, 3, 0, allow_insecure=True)


# The bounds are those of n = 2^13: noise grows with n, so that they hold all the more here.


@pytest.mark.sweep
def test_encoding_is_near_exact(small):
    v = small.vector()
    for level in (3, 0):
        plain = ckks.encode(v, small.p, level=level)
        assert np.abs(ckks.decode(plain, small.p) - v).max() < 1e-9


def test_encoding_multiplies_slots(small):
    """A product of polynomials is one of slots: the embedding is a ring homomorphism, with slot j at 5^j."""
    v, w = small.vector(), small.vector()
    a, b = (ckks.encode(u, small.p) for u in (v, w))
    q = small.p.moduli
    both = ckks.Plaintext(modular.mul(a.values, b.values, q), a.scale * b.scale, a.level)
    assert np.abs(ckks.decode(both, small.p) - v * w).max() < 1e-8


def test_fewer_values_are_followed_by_zeros(small):
    got = ckks.decode(ckks.encode([1, 2j], small.p), small.p)
    assert np.abs(got - np.r_[1, 2j, np.zeros(small.p.slots - 2)]).max() < 1e-9


def test_encryption_and_sums(small):
    v, w = small.vector(), small.vector()
    x, y = small.encrypt(v), small.encrypt(w)
    assert small.error(x, v) < 1e-6
    assert small.error(ckks.add(x, y), v + w) < 2e-6
    assert small.error(ckks.subtract(x, y), v - w) < 2e-6
    assert small.error(ckks.add(x, ckks.encode(w, small.p)), v + w) < 2e-6
    assert small.error(ckks.subtract(x, ckks.encode(w, small.p)), v - w) < 2e-6
    assert small.error(ckks.negate(x), -v) < 1e-6


def test_ciphertexts_are_fresh_every_time(small):
    v = small.vector()
    assert not np.array_equal(small.encrypt(v).parts, small.encrypt(v).parts)


def test_products(small):
    v, w = small.vector(), small.vector()
    x, y = small.encrypt(v), small.encrypt(w)
    three = ckks.multiply(x, y)
    assert len(three.parts) == 3 and small.error(three, v * w) < 1e-5
    assert small.error(ckks.product(x, y, small.keys), v * w) < 1e-5
    plain = ckks.rescale(ckks.multiply(x, ckks.encode(w, small.p)))
    assert plain.level == 2 and small.error(plain, v * w) < 1e-5
    # Scales are as announced, so that what was multiplied can be added to what was not.
    lower = ckks.drop_level(x, 2)
    assert small.error(ckks.add(ckks.product(x, y, small.keys), lower), v * w + v) < 1e-5


@pytest.mark.sweep
def test_products_until_the_end(small):
    v = small.vector() / 2**0.5
    x, power = small.encrypt(v), v
    for _ in range(3):
        x, power = ckks.square(x, small.keys), power**2
    assert x.level == 0 and small.error(x, power) < 1e-4
    with pytest.raises(ValueError, match="level 0 nothing is left"):
        ckks.rescale(x)


def test_levels(small):
    v = small.vector()
    x = small.encrypt(v)
    for level in (2, 1, 0):
        lower = ckks.drop_level(x, level)
        assert (lower.level, lower.scale) == (level, pytest.approx(small.p.scales[level], rel=1e-12))
        assert small.error(lower, v) < 1e-5
        assert small.error(small.encrypt(v, level=level), v) < 1e-6


def test_a_product_drops_levels_once_it_is_rescaled(small):
    v, w = small.vector(), small.vector()
    plain = ckks.encode(w, small.p)
    once = ckks.multiply(small.encrypt(v), plain)
    twice = ckks.multiply(once, plain)
    for x in (once, twice):
        with pytest.raises(
            ValueError, match=r"no multiple of the 2\^(80|120)\.0+ of the ciphertext: `rescale`"
        ):
            ckks.drop_level(x, 1)
    with pytest.raises(ValueError, match="`rescale` first"):
        ckks.product(once, ckks.drop_level(small.encrypt(w), 1), small.keys)
    assert small.error(ckks.drop_level(ckks.rescale(once), 0), v * w) < 1e-5
    assert small.error(ckks.drop_level(ckks.rescale(ckks.rescale(twice)), 0), v * w**2) < 1e-5


def test_products_where_one_bit_is_left_above_the_scale(random):
    p = ckks.parameters(2**8, 1, scale_bits=48, base_bits=49, allow_insecure=True)
    # A 1 at the scale of a product would not fit.
    assert 2 * p.scales[1] ** 2 > math.prod(p.moduli)
    secret, public, _ = ckks.generate_keys(p)
    v, w = random.uniform(-0.5, 0.5, (2, p.slots))
    got = ckks.multiply(ckks.encrypt(ckks.encode(v, p), public), ckks.encode(w, p))
    assert np.abs(ckks.decode(ckks.decrypt(got, secret), p) - v * w).max() < 1e-5


def test_rotations(small):
    v = small.vector()
    x = small.encrypt(v)
    slots = small.p.slots
    for steps in (0, 1, 5, -3, slots - 3, slots, slots + 1):
        assert small.error(ckks.rotate(x, steps, small.keys), np.roll(v, -steps)) < 1e-5
    lower = ckks.drop_level(x, 1)
    assert small.error(ckks.rotate(lower, 5, small.keys), np.roll(v, -5)) < 1e-5
    once = ckks.conjugate(x, small.keys)
    assert small.error(once, v.conj()) < 1e-5
    assert small.error(ckks.conjugate(once, small.keys), v) < 1e-5


@pytest.mark.parametrize("stride", [1, 64])
def test_matrix_vector(small, stride):
    d, slots = 8, small.p.slots
    m = small.random.normal(size=(d, d)) + 1j * small.random.normal(size=(d, d))
    # Vectors one after the other, or interleaved.
    vectors = small.vector().reshape(-1, d) if stride == 1 else small.vector().reshape(d, -1)
    if stride == 1:
        vectors = np.broadcast_to(vectors[:1], (slots // d, d))
        expected = vectors @ m.T
    else:
        expected = m @ vectors
    plan = ckks.matrix(m, small.p, level=3, stride=stride)
    got = ckks.matrix_vector(plan, small.encrypt(vectors.ravel()), small.keys, stride=stride)
    assert got.level == 2 and small.error(got, expected.ravel()) < 1e-5


@pytest.mark.parametrize(
    "coefficients", [[0.25, -1.5], [0, 0, 2], [0.5, -0.3, 0.7, 0.2], [1, 0, 0, 0, -0.25]], ids=len
)
def test_polynomials(small, coefficients):
    v = small.vector(complex_too=False)
    got = ckks.polynomial(small.encrypt(v), coefficients, small.keys)
    assert got.level == 2 - math.ceil(math.log2(len(coefficients) - 1))
    assert small.error(got, np.polyval(coefficients[::-1], v)) < 1e-5


def test_jit_and_pytrees(small):
    v, w = small.vector(), small.vector()
    x, y = small.encrypt(v), small.encrypt(w)

    @jax.jit
    def compute(x, y, keys):
        return ckks.add(ckks.rotate(ckks.product(x, y, keys), 5, keys), ckks.drop_level(x, 2))

    got = compute(x, y, small.keys)
    assert small.error(got, np.roll(v * w, -5) + v) < 1e-5
    same = jax.tree.unflatten(jax.tree.structure(got), jax.tree.leaves(got))
    assert same.parameters == small.p and same.scale == got.scale


@pytest.mark.slow
def test_moduli_larger_than_any_float():
    """Their product is above 2^1024."""
    p = ckks.parameters(2**6, 26, allow_insecure=True)
    secret, public, _ = ckks.generate_keys(p)
    x = ckks.encrypt(ckks.encode([1.5, -2.0], p), public)
    assert math.fsum(map(math.log2, p.moduli)) > 1024
    assert np.abs(ckks.decode(ckks.decrypt(x, secret), p)[:2] - [1.5, -2.0]).max() < 1e-6
    assert 950 < ckks.noise_budget(x, secret, [1.5, -2.0]) < 1100


def test_noise_budget(small):
    v = small.vector()
    x = small.encrypt(v)
    top, bottom = (ckks.noise_budget(c, small.secret, v) for c in (x, ckks.drop_level(x, 0)))
    assert top > bottom + 100 > 110
    assert ckks.noise_budget(x, small.secret, -v) < top - 15


# Noise


def switching_error(p: ckks.Parameters, level: int) -> tuple[np.ndarray, list[tuple[int, ...]], float]:
    """Of what a switched polynomial decrypts to; the digits' moduli; and the secret's sum of absolute values."""
    full, numbers = plan_of(p), _keys.ternary(p.n)
    secret, source = (ntt(rns.from_integers(v, full.moduli), full) for v in (numbers, _keys.ternary(p.n)))
    key = _keys.switching_key(p, secret, source)
    plan = plan_of(p, level)
    x = _keys.uniform(plan)
    b, a = switch(x, key, p, level)
    count, q, special = len(plan.moduli), plan.moduli, len(p.special)
    got = modular.add(b, modular.mul(a, secret[:count], q), q)
    error = modular.sub(got, modular.mul(x, source[:count], q), q)
    digits = [q[start : start + special] for start in range(0, count, special)]
    integers = rns.to_integers(intt(error, plan), q).astype(float)
    return integers, digits, float(np.abs(numbers).sum())


# One to six digits; of 4 limbs by 3, the last one is short.
DIGITS = [(1, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in
          [(2, 0), (2, 1), (1, 0), (2, 2), (1, 1), (3, 2), (3, 1)])]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize(("special", "level"), DIGITS)
def test_noise_of_key_switching_is_as_predicted(special, level):
    n = 2**10
    p = ckks.parameters(n, 2, special=special, allow_insecure=True)
    error, digits, _ = switching_error(p, level)
    whole = math.prod(p.special)
    # A digit is a sum with as many terms as limbs, each uniform within half the product of its moduli.
    spread = sum((math.prod(d) / whole) ** 2 * len(d) / 12 for d in digits)
    rounding = (1 + n * 2 / 3) / 12 * special
    predicted = math.sqrt(n * ckks.NOISE**2 * spread + rounding)
    assert predicted / 2 < error.std() < 2 * predicted


@pytest.mark.sweep
@pytest.mark.parametrize(("special", "level"), DIGITS)
def test_key_switching_without_noise_only_rounds(special, level, monkeypatch):
    monkeypatch.setattr(_keys, "noise", lambda plan: jnp.zeros((len(plan.moduli), plan.n), jnp.uint32))
    p = ckks.parameters(2**8, 2, special=special, allow_insecure=True)
    error, _, weight = switching_error(p, level)
    # Both parts are divided by P, each off by 1/2 and what the approximate conversion of its limbs adds.
    assert 0 < np.abs(error).max() <= (1 + weight) * (1 / 2 + special // 2)


def test_fresh_noise_is_as_predicted(small):
    x = small.encrypt(np.zeros(1))
    plan = plan_of(small.p, x.level)
    noise = rns.to_integers(intt(ckks.decrypt(x, small.secret).values, plan), plan.moduli).astype(float)
    predicted = ckks.NOISE * math.sqrt(1 + small.p.n * 4 / 3)
    assert 0.8 * predicted < noise.std() < 1.25 * predicted


def test_random_numbers():
    n = 2**16
    ternary = _keys.ternary(n)
    assert all(abs(np.mean(ternary == v) - 1 / 3) < 0.01 for v in (-1, 0, 1))
    noise = _keys.gaussian(n)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - ckks.NOISE) < 0.1
    for bound in (3, 2**31 - 1, 1073692673):
        uniform = _keys.below(bound, n)
        assert uniform.max() < bound and abs(uniform.mean() / (bound - 1) - 0.5) < 0.01
    assert not np.array_equal(_keys.random_words((8,)), _keys.random_words((8,)))


# Sizes that are used


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "depth", "allow_insecure"), [(2**13, 3, False), (2**13, 4, True), (2**14, 4, False)]
)
def test_errors_at_sizes_that_are_used(n, depth, allow_insecure):
    s = Setting(n, depth, n, allow_insecure=allow_insecure)
    for _ in range(20):
        v, w = s.vector(), s.vector()
        x, y = s.encrypt(v), s.encrypt(w)
        assert np.abs(ckks.decode(ckks.encode(v, s.p), s.p) - v).max() < 1e-7
        assert s.error(x, v) < 1e-6
        assert s.error(ckks.add(x, y), v + w) < 2e-6
        assert s.error(ckks.product(x, y, s.keys), v * w) < 1e-5
        assert s.error(ckks.rotate(x, 5, s.keys), np.roll(v, -5)) < 1e-5
    power = s.vector() / 2**0.5
    x = s.encrypt(power)
    for _ in range(depth):
        x, power = ckks.square(x, s.keys), power**2
    assert s.error(x, power) < 1e-4
    other, _, _ = ckks.generate_keys(s.p)
    forced = dataclasses.replace(other, key=x.key)
    assert np.abs(ckks.decode(ckks.decrypt(x, forced), s.p) - power).max() > 1


@pytest.mark.slow
def test_64_bit_types_change_nothing(small):
    v, w = small.vector(), small.vector()
    x, y = small.encrypt(v), small.encrypt(w)
    narrow = ckks.rotate(ckks.product(x, y, small.keys), 5, small.keys)
    with lowering.enable_x64():
        wide = ckks.rotate(ckks.product(x, y, small.keys), 5, small.keys)
        assert small.error(small.encrypt(v), v) < 1e-6
    assert wide.parts.dtype == jnp.uint32
    np.testing.assert_array_equal(narrow.parts, wide.parts)


def test_rotation_in_the_ring_is_rotation_of_slots(small):
    v = small.vector()
    plain = ckks.encode(v, small.p)
    plan = plan_of(small.p, plain.level)
    k = ckks.galois_element(small.p, 7)
    moved = ntt(automorphism(intt(plain.values, plan), k, plan.moduli), plan)
    got = ckks.decode(dataclasses.replace(plain, values=moved), small.p)
    assert np.abs(got - np.roll(v, -7)).max() < 1e-9


# Errors


def test_a_wrong_key_is_refused_and_would_give_garbage(small):
    other, _, other_keys = ckks.generate_keys(small.p)
    x = small.encrypt(small.vector())
    for call in (
        lambda: ckks.decrypt(x, other),
        lambda: ckks.relinearise(ckks.multiply(x, x), other_keys),
        lambda: ckks.rotate(x, 1, other_keys),
    ):
        with pytest.raises(ValueError, match="the key is another one"):
            call()
    forced = dataclasses.replace(other, key=x.key)
    assert np.abs(ckks.decode(ckks.decrypt(x, forced), small.p)).max() > 1


def test_what_does_not_fit_is_refused(small):
    x = small.encrypt(small.vector())
    lower, bottom = ckks.drop_level(x, 1), ckks.drop_level(x, 0)
    refused = [
        (lambda: ckks.add(x, lower), "levels differ: 3 and 1"),
        (lambda: ckks.multiply(x, lower), "levels differ"),
        (lambda: ckks.add(x, ckks.multiply(x, x)), r"scales differ: 2\^40\.0+ and 2\^80"),
        (lambda: ckks.multiply(ckks.multiply(x, x), x), "3 and 2 parts"),
        (lambda: ckks.relinearise(x, small.keys), "has 3 parts, got 2"),
        (lambda: ckks.rotate(ckks.multiply(x, x), 1, small.keys), "relinearise before"),
        (lambda: ckks.rotate(x, 9, small.keys), "no key for a rotation by 9"),
        (lambda: ckks.drop_level(lower, 2), "from level 1"),
        (lambda: ckks.encode(np.ones(600), small.p), "up to 512 finite numbers"),
        (lambda: ckks.encode([np.nan], small.p), "finite"),
        *((lambda scale=scale: ckks.encode([1], small.p, scale=scale), f"above 0, got {scale}") for scale in
          (0.0, -1.0, math.nan, math.inf)),
        (lambda: ckks.multiply(bottom, ckks.encode([1], small.p, level=0)), r"scale 2\^80\.\d .* level 0, 2\^60\.0"),
        (lambda: ckks.multiply(bottom, bottom), "`rescale` before"),
        (lambda: ckks.rescale(ckks.encrypt(ckks.encode([1], small.p, scale=2.0**39), small.public)),
         r"nothing is left of a scale of 2\^39\.0 .* level 3, 2\^40\.0"),
        (lambda: ckks.encode([1e30], small.p, level=0), "exceed the moduli"),
        (lambda: ckks.encode([1], small.p, level=4), r"levels are 0 \.\.\. 3, got 4"),
        (lambda: ckks.matrix(np.ones((7, 7)), small.p, level=1), "dividing 512"),
        (lambda: ckks.polynomial(x, [1], small.keys), "degree 1 at least"),
    ]  # fmt: skip
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()


def test_other_parameters_are_refused(small):
    p = ckks.parameters(2**10, 1, allow_insecure=True)
    _, public, _ = ckks.generate_keys(p)
    x, y = small.encrypt([1]), ckks.encrypt(ckks.encode([1], p), public)
    with pytest.raises(ValueError, match="different parameters"):
        ckks.add(x, y)
    with pytest.raises(ValueError, match="for other parameters"):
        ckks.decrypt(y, small.secret)


@pytest.mark.parametrize(
    ("n", "depth", "bits"), [(2**10, 0, 40), (2**12, 1, 40), (2**13, 4, 40), (2**14, 9, 46)]
)
def test_insecure_parameters_are_refused(n, depth, bits):
    with pytest.raises(ValueError, match="less than 128 bits of security"):
        ckks.parameters(n, depth, scale_bits=bits)
    assert ckks.parameters(n, depth, scale_bits=bits, allow_insecure=True).depth == depth


@pytest.mark.parametrize(
    ("n", "depth", "bits"), [(2**13, 3, 40), (2**14, 4, 40), (2**14, 7, 46), (2**15, 12, 52)]
)
def test_secure_parameters(n, depth, bits):
    p = ckks.parameters(n, depth, scale_bits=bits)
    every = (*p.moduli, *p.special)
    assert math.log2(math.prod(every)) <= ckks.MOST_BITS[n]
    assert len(set(every)) == len(every) and all(moduli.is_prime(q) and q % (2 * n) == 1 for q in every)
    assert all(abs(math.log2(s) - bits) < 1 for s in p.scales)
    assert min(p.special) > max(p.moduli)


def test_options_of_parameters():
    for scale, base, special in ((20, 60, 1), (60, 60, 1), (40, 60, 0)):
        with pytest.raises(ValueError, match="scale_bits"):
            ckks.parameters(2**13, 1, scale_bits=scale, base_bits=base, special=special)
    with pytest.raises(ValueError, match="depth"):
        ckks.parameters(2**13, -1)
    for n in (3000, 2**16 + 1, 2**17, 4):
        with pytest.raises(ValueError, match=f"ckks: `n` must be a power of two from 8 to 65536, got {n}"):
            ckks.parameters(n, 4)
    assert ckks.parameters(np.arange(2**13 + 1)[-1], 2) == ckks.parameters(2**13, 2)


def test_too_few_primes_are_refused():
    with pytest.raises(
        ValueError, match="too few primes near 2\\^20 for 12 levels: take larger `scale_bits`"
    ):
        ckks.parameters(2**15, 12)


def test_secrets_are_not_printed(small):
    for thing in (small.secret, small.public, small.keys):
        assert "Array" not in repr(thing)


def test_level_zero_needs_no_special_case(small):
    v = small.vector()
    x = small.encrypt(v, level=0)
    assert small.error(ckks.rotate(x, 1, small.keys), np.roll(v, -1)) < 1e-5
    assert isinstance(x.parts, jnp.ndarray) and functools.reduce(max, x.parts.shape) == 2**10


def test_openfhe_has_the_same_transforms_and_slots():
    """A key and a ciphertext of OpenFHE's, as tests/data/openfhe_vectors.py wrote them down."""
    vectors = np.load(Path(__file__).parent / "data" / "openfhe_vectors.npz")
    primes = tuple(vectors["moduli"].tolist())
    plan = NttPlan(4096, primes)
    assert plan.roots == tuple(vectors["roots"].tolist())

    residues = intt(jnp.asarray(vectors["secret"]), plan)
    secret = rns.to_integers(residues, primes)
    assert set(secret) == {-1, 0, 1}
    np.testing.assert_array_equal(ntt(rns.from_integers(secret, primes), plan), vectors["secret"])

    parameters = ckks.Parameters(4096, primes, (), scale_bits=28, width=1, base=1)
    mark = jnp.zeros(2, jnp.uint32)
    key = ckks.SecretKey(jnp.asarray(vectors["secret"]), mark, parameters)
    ciphertext = ckks.Ciphertext(
        jnp.asarray(vectors["ciphertext"]), mark, float(vectors["scale"]), 1, parameters
    )
    decrypted = ckks.decode(ckks.decrypt(ciphertext, key), parameters)
    # Of a fresh ciphertext's noise, e_0 + e_1 s + e u, eight standard deviations in a slot.
    noise = ckks.NOISE * math.sqrt(1 + 4096 * 4 / 3) * math.sqrt(4096) / vectors["scale"]
    np.testing.assert_allclose(decrypted, vectors["values"], atol=8 * noise)
