"""CKKS: approximate arithmetic on encrypted vectors of complex numbers (Cheon, Kim, Kim and Song, ASIACRYPT 2017).

The full RNS form (Cheon et al., SAC 2018) with hybrid key switching (Han and Ki, CT-RSA 2020). A ciphertext holds n / 2
slots. Every level has two primes, whose product is near the scale; a product of ciphertexts uses up one level.

A research library: not audited, not constant in time. Keys and noise come from the operating system's generator.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.he import rns
from pallas_kernels.he.ring import permutation
from pallas_kernels.moduli import check_moduli, ntt_primes
from pallas_kernels.ops import modular
from pallas_kernels.ops.basis_conversion import basis_conversion
from pallas_kernels.ops.ntt import NttPlan, intt, ntt

# The most bits of all moduli together at 128 bits of classical security with a ternary secret
# (Homomorphic Encryption Standard, 2018).
MOST_BITS = {2**10: 27, 2**11: 54, 2**12: 109, 2**13: 218, 2**14: 438, 2**15: 881}
NOISE = 3.2
# Scales this close are the same, relatively.
SCALE_TOLERANCE = 1e-9

# What XLA fuses with its neighbours is left to it.
_add, _sub, _neg, _mul = (
    functools.partial(f, implementation="xla") for f in (modular.add, modular.sub, modular.neg, modular.mul)
)


@dataclass(frozen=True)
class Parameters:
    """The ring, the moduli and the scale; made by `parameters`. Hashable.

    n: degree of the ring, twice the number of slots.
    moduli: of ciphertexts: the base, then `width` for every level.
    special: of keys alone; as many limbs make a digit.
    scale_bits: of the scale of a fresh ciphertext.
    width: primes that a level has.
    base: primes that are there at level 0.
    """

    n: int
    moduli: tuple[int, ...]
    special: tuple[int, ...]
    scale_bits: int
    width: int
    base: int

    @property
    def depth(self) -> int:
        """The level of a fresh ciphertext: how many products one after the other it allows."""
        return (len(self.moduli) - self.base) // self.width

    @property
    def slots(self) -> int:
        return self.n // 2

    def limbs(self, level: int) -> int:
        """How many moduli a ciphertext of that level has."""
        return self.base + self.width * level

    def dropped(self, level: int) -> int:
        """What a rescale from that level divides by."""
        return math.prod(self.moduli[self.limbs(level - 1) : self.limbs(level)])

    @functools.cached_property
    def scales(self) -> tuple[float, ...]:
        """The scale of ciphertexts at each level: rescaled squares of the one above have just that."""
        scales = [2.0**self.scale_bits]
        for level in range(self.depth, 0, -1):
            scales.append(scales[-1] ** 2 / self.dropped(level))
        return tuple(reversed(scales))


def parameters(
    n: int,
    depth: int,
    *,
    scale_bits: int = 40,
    base_bits: int = 60,
    special: int = 1,
    allow_insecure: bool = False,
) -> Parameters:
    """Choose moduli for a ring and a number of products one after the other.

    Args:
      n: degree, a power of two from 2^3; n / 2 slots.
      depth: products (of ciphertexts or with plaintexts) one after the other.
      scale_bits: of the scale, from 36: the bits of a value after the point, of which the noise takes about 18.
      base_bits: of what is left at level 0: values are up to 2^(base_bits - scale_bits - 1).
      special: primes of keys alone. More make keys smaller and key switching faster, and take bits from the levels.
      allow_insecure: take what has less than 128 bits of security.

    Raises:
      ValueError: that has less than 128 bits of security; there are no such primes.

    Example:
      >>> from pallas_kernels.he import ckks
      >>> p = ckks.parameters(2**13, depth=2)
      >>> p.slots, p.depth, sum(q.bit_length() for q in (*p.moduli, *p.special))
      (4096, 2, 173)
    """
    if depth < 0 or special < 1 or not 36 <= scale_bits <= 60 or not scale_bits < base_bits <= 61:
        raise ValueError(
            "ckks: `depth` must be 0 or more, `special` 1 or more, `scale_bits` 36 to 60 and less than `base_bits`, at "
            f"most 61; got {depth}, {special}, {scale_bits} and {base_bits}"
        )
    large = ntt_primes(n, 30.5)
    special_primes = tuple(next(large) for _ in range(special))
    base = tuple(itertools.islice(ntt_primes(n, base_bits / 2), 2))
    taken = {*base, *special_primes}
    levels = _level_primes(n, depth, scale_bits, taken)
    moduli = check_moduli((*base, *levels), n)
    chosen = Parameters(n, moduli, special_primes, scale_bits, 2, 2)
    bits = math.log2(math.prod((*moduli, *special_primes)))
    most = MOST_BITS.get(n, 0 if n < 2**10 else MOST_BITS[2**15])
    if bits > most and not allow_insecure:
        raise ValueError(
            f"ckks: moduli of {bits:.0f} bits leave less than 128 bits of security for n = {n}, which allows {most}: "
            "take a larger n, less depth or smaller scales; or `allow_insecure=True`, to experiment"
        )
    return chosen


def _level_primes(n: int, depth: int, scale_bits: int, taken: set[int]) -> list[int]:
    """Pairs of primes, largest level first, whose products keep the scales near 2^scale_bits."""
    pool = [q for q in itertools.islice(ntt_primes(n, scale_bits / 2), 120) if q not in taken]
    scale, levels = 2.0**scale_bits, []
    for _ in range(depth):
        # The scale below is scale^2 / product: nearest to where it began.
        wanted = 2 * math.log2(scale) - scale_bits
        pairs = itertools.combinations(pool, 2)
        pair = min(pairs, key=lambda p: abs(math.log2(p[0] * p[1]) - wanted), default=(1, 1))
        pool = [q for q in pool if q not in pair]
        scale = scale**2 / math.prod(pair)
        levels = [*pair, *levels]
        if abs(math.log2(scale) - scale_bits) > 1:
            raise ValueError(
                f"ckks: for n = {n} there are too few primes near 2^{scale_bits / 2:g} for {depth} levels: take larger "
                "`scale_bits`"
            )
    return levels


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["scale", "level"])
@dataclass(frozen=True)
class Plaintext:
    """An encoded vector: (limbs, n) values of its polynomial, times the scale."""

    values: jax.Array
    scale: float
    level: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "key"],
    meta_fields=["scale", "level", "parameters"],
)
@dataclass(frozen=True)
class Ciphertext:
    """An encrypted vector; a pytree.

    parts: (2, limbs, n) uint32, values of polynomials c with c_0 + c_1 s = scale * message + noise; a product that
      is not relinearised has a third one.
    key: the fingerprint of the secret key, (2,) uint32.
    """

    parts: jax.Array
    key: jax.Array
    scale: float
    level: int
    parameters: Parameters


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "key"], meta_fields=["parameters"]
)
@dataclass(frozen=True, repr=False)
class SecretKey:
    """values: (all limbs, n). Whoever has it reads everything: keep it to yourself."""

    values: jax.Array
    key: jax.Array
    parameters: Parameters


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "key"], meta_fields=["parameters"])
@dataclass(frozen=True, repr=False)
class PublicKey:
    """parts: (2, limbs, n). Encrypts."""

    parts: jax.Array
    key: jax.Array
    parameters: Parameters


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["relinearisation", "galois", "key"],
    meta_fields=["parameters"],
)
@dataclass(frozen=True, repr=False)
class EvaluationKeys:
    """What computing takes: for products, and by Galois element for rotations. Each (digits, 2, all limbs, n)."""

    relinearisation: jax.Array
    galois: Mapping[int, jax.Array]
    key: jax.Array
    parameters: Parameters


@functools.lru_cache(maxsize=64)
def _plan(parameters: Parameters, level: int | None = None, special: bool = False) -> NttPlan:
    with jax.ensure_compile_time_eval():
        if level is None:
            return NttPlan(parameters.n, (*parameters.moduli, *parameters.special))
        count = parameters.limbs(level)
        last = len(parameters.moduli)
        return _plan(parameters).limbs(
            [*range(count), *range(last, last + len(parameters.special) * special)]
        )


# Keys


def generate_keys(
    parameters: Parameters, *, rotations: Iterable[int] = (), conjugation: bool = False
) -> tuple[SecretKey, PublicKey, EvaluationKeys]:
    """Make a secret key and its public keys, with the operating system's random numbers.

    Args:
      rotations: by which slots will be rotated. conjugation: whether they will be conjugated.
    """
    plan = _plan(parameters)
    key = jnp.asarray(_random_words((2,)))
    secret = ntt(rns.from_integers(_ternary(parameters.n), plan.moduli), plan)
    count = len(parameters.moduli)
    top = _plan(parameters, parameters.depth)
    mask = _uniform(top)
    body = _sub(_noise(top), _mul(mask, secret[:count], top.moduli), top.moduli)
    elements = {galois_element(parameters, r) for r in rotations} | (
        {2 * parameters.n - 1} if conjugation else set()
    )
    square = _mul(secret, secret, plan.moduli)
    moved = {k: jnp.take(secret, permutation(parameters.n, k), axis=-1) for k in sorted(elements - {1})}
    evaluation = EvaluationKeys(
        _switching_key(parameters, secret, square),
        {k: _switching_key(parameters, secret, s) for k, s in moved.items()},
        key,
        parameters,
    )
    return (
        SecretKey(secret, key, parameters),
        PublicKey(jnp.stack([body, mask]), key, parameters),
        evaluation,
    )


def galois_element(parameters: Parameters, rotation: int) -> int:
    """The k of X -> X^k that rotates the slots to the left by `rotation`."""
    return pow(5, rotation % parameters.slots, 2 * parameters.n)


def _switching_key(parameters: Parameters, secret: jax.Array, source: jax.Array) -> jax.Array:
    """Encryptions of P source under `secret`, on the limbs of one digit each: (digits, 2, all limbs, n)."""
    plan, alpha, count = _plan(parameters), len(parameters.special), len(parameters.moduli)
    scaled = _mul(source, rns.constant(math.prod(parameters.special), plan.moduli), plan.moduli)
    digits = []
    for start in range(0, count, alpha):
        mine = np.zeros((len(plan.moduli), 1), bool)
        mine[start : min(start + alpha, count)] = True
        mask = _uniform(plan)
        body = _sub(_noise(plan), _mul(mask, secret, plan.moduli), plan.moduli)
        digits.append(jnp.stack([_add(body, jnp.where(mine, scaled, 0), plan.moduli), mask]))
    return jnp.stack(digits)


def _random_words(shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(os.urandom(4 * math.prod(shape)), np.uint32).reshape(shape)


def _ternary(n: int) -> np.ndarray:
    """-1, 0 and 1, each with probability 1/3."""
    return _below(3, n).astype(np.int64) - 1


def _below(bound: int, count: int) -> np.ndarray:
    """Uniform numbers: words that would make some of them likelier are drawn again."""
    limit, found = 2**32 // bound * bound, np.zeros(0, np.uint32)
    while len(found) < count:
        words = _random_words((count,))
        found = np.concatenate([found, words[words < limit] % np.uint32(bound)])
    return found[:count]


def _gaussian(n: int) -> np.ndarray:
    """Integers of standard deviation 3.2: a normal number, rounded."""
    # Box and Muller's transform, of uniform numbers that are never 0.
    words = np.frombuffer(os.urandom(16 * n), np.uint64).reshape(2, n) >> np.uint64(11)
    u, v = (words.astype(np.float64) + 0.5) * 2.0**-53
    return np.rint(NOISE * np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).astype(np.int64)


def _noise(plan: NttPlan) -> jax.Array:
    return ntt(rns.from_integers(_gaussian(plan.n), plan.moduli), plan)


def _uniform(plan: NttPlan) -> jax.Array:
    return jnp.asarray(np.stack([_below(q, plan.n) for q in plan.moduli]))


# Encoding


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
      ValueError: there are more values than slots, or they are too large for the moduli, or not finite.
    """
    level = parameters.depth if level is None else _checked_level(parameters, level)
    scale = parameters.scales[level] if scale is None else float(scale)
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
    plan = _plan(parameters, level)
    if np.abs(coefficients).max() * 2 >= math.prod(plan.moduli):
        raise ValueError(
            f"ckks: values times the scale 2^{math.log2(scale):.1f} exceed the moduli of level {level}"
        )
    integers = np.rint(coefficients)
    big = np.abs(integers).max() >= 2**62
    integers = np.array([int(c) for c in integers], object) if big else integers.astype(np.int64)
    return Plaintext(ntt(rns.from_integers(integers, plan.moduli), plan), scale, level)


def decode(plaintext: Plaintext, parameters: Parameters) -> np.ndarray:
    """The vector of a plaintext: n / 2 complex numbers; on the host."""
    plan, n = _plan(parameters, plaintext.level), parameters.n
    integers = rns.to_integers(intt(plaintext.values, plan), plan.moduli)
    coefficients = integers.astype(np.float64) / plaintext.scale
    points = np.fft.ifft(coefficients * np.exp(1j * np.pi * np.arange(n) / n)) * n
    return points[_slot_places(n)]


# Encryption


def encrypt(plaintext: Plaintext, key: PublicKey) -> Ciphertext:
    """Encrypt with fresh random numbers of the operating system."""
    plan = _plan(key.parameters, plaintext.level)
    once = ntt(rns.from_integers(_ternary(plan.n), plan.moduli), plan)
    parts = _mul(key.parts[:, : len(plan.moduli)], once, plan.moduli)
    parts = _add(parts, jnp.stack([_noise(plan), _noise(plan)]), plan.moduli)
    parts = parts.at[0].set(_add(parts[0], plaintext.values, plan.moduli))
    return Ciphertext(parts, key.key, plaintext.scale, plaintext.level, key.parameters)


def decrypt(x: Ciphertext, key: SecretKey) -> Plaintext:
    """Decrypt.

    Raises:
      ValueError: it was encrypted for another key, where that is known.
    """
    _check_key(x, key)
    plan = _plan(x.parameters, x.level)
    secret = key.values[: len(plan.moduli)]
    total = x.parts[-1]
    for part in x.parts[-2::-1]:
        total = _add(_mul(total, secret, plan.moduli), part, plan.moduli)
    return Plaintext(total, x.scale, x.level)


def noise_budget(x: Ciphertext, key: SecretKey, expected: Any) -> float:
    """Bits between the largest error and the largest number that the slots hold; below 0 nothing is left.

    Args:
      expected: the vector that it should hold.
    """
    expected = np.asarray(expected, np.complex128)
    error = np.abs(decode(decrypt(x, key), x.parameters)[: len(expected)] - expected).max()
    largest = math.prod(_plan(x.parameters, x.level).moduli) / 2 / x.scale
    return math.log2(largest / error) if error else math.inf


# Arithmetic


def add(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x + y, of the same level and scale."""
    return _sum(x, y, _add)


def subtract(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x - y, of the same level and scale."""
    return _sum(x, y, _sub)


def negate(x: Ciphertext) -> Ciphertext:
    """-x."""
    return replace(x, parts=_neg(x.parts, _moduli(x)))


def _sum(x: Ciphertext, y: Ciphertext | Plaintext, operation: Any) -> Ciphertext:
    _check_alike(x, y, same_scale=True)
    if isinstance(y, Plaintext):
        return replace(x, parts=x.parts.at[0].set(operation(x.parts[0], y.values, _moduli(x))))
    count = max(len(x.parts), len(y.parts))
    a, b = (jnp.pad(v.parts, ((0, count - len(v.parts)), (0, 0), (0, 0))) for v in (x, y))
    return replace(x, parts=operation(a, b, _moduli(x)))


def multiply(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x y in every slot, of the same level; the scales multiply. Of ciphertexts, three parts: see `relinearise`."""
    _check_alike(x, y)
    moduli = _moduli(x)
    if isinstance(y, Plaintext):
        return replace(x, parts=_mul(x.parts, y.values, moduli), scale=x.scale * y.scale)
    if len(x.parts) != 2 or len(y.parts) != 2:
        raise ValueError(
            f"ckks: relinearise before the next product; got {len(x.parts)} and {len(y.parts)} parts"
        )
    (a, b), (c, d) = x.parts, y.parts
    cross = _add(_mul(a, d, moduli), _mul(b, c, moduli), moduli)
    parts = jnp.stack([_mul(a, c, moduli), cross, _mul(b, d, moduli)])
    return replace(x, parts=parts, scale=x.scale * y.scale)


def relinearise(x: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """A product of two ciphertexts, as two parts again."""
    _check_key(x, keys)
    if len(x.parts) != 3:
        raise ValueError(f"ckks: a product of two ciphertexts has 3 parts, got {len(x.parts)}")
    switched = _switch(x.parts[2], keys.relinearisation, x.parameters, x.level)
    return replace(x, parts=_add(x.parts[:2], switched, _moduli(x)))


def rescale(x: Ciphertext) -> Ciphertext:
    """Divide the scale by the moduli of the level, and go one level down."""
    if x.level == 0:
        raise ValueError("ckks: at level 0 nothing is left to rescale by: take parameters of more depth")
    parts, level = _rescaled(x.parts, x.parameters, x.level), x.level - 1
    return replace(x, parts=parts, scale=x.scale / x.parameters.dropped(x.level), level=level)


def drop_level(x: Ciphertext, level: int) -> Ciphertext:
    """The same vector at a lower level, with the scale of that level."""
    if not 0 <= level <= x.level:
        raise ValueError(f"ckks: from level {x.level} one can go to 0 ... {x.level}, not to {level}")
    if level == x.level:
        return x
    # Leave moduli out down to the level above, and make the scale right by the last rescale.
    above = level + 1
    parts, p = x.parts[:, : x.parameters.limbs(above)], x.parameters
    factor = round(p.scales[level] * p.dropped(above) / x.scale)
    moduli = _plan(p, above).moduli
    parts = _mul(parts, rns.constant(factor, moduli), moduli)
    # The factor is a rounded integer of some 40 bits: what it is off by is far below the noise.
    return rescale(replace(x, parts=parts, level=above, scale=p.scales[level] * p.dropped(above)))


def rotate(x: Ciphertext, steps: int, keys: EvaluationKeys) -> Ciphertext:
    """The slots moved to the left: slot j gets what slot j + steps had."""
    return _apply_galois(x, galois_element(x.parameters, steps), keys, f"rotation by {steps}")


def conjugate(x: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """The complex conjugate in every slot."""
    return _apply_galois(x, 2 * x.parameters.n - 1, keys, "conjugation")


def _apply_galois(x: Ciphertext, k: int, keys: EvaluationKeys, what: str) -> Ciphertext:
    _check_key(x, keys)
    if k == 1:
        return x
    if len(x.parts) != 2:
        raise ValueError(f"ckks: relinearise before a {what}; got {len(x.parts)} parts")
    if k not in keys.galois:
        raise ValueError(f"ckks: there is no key for a {what}: name it in `generate_keys`")
    moved = jnp.asarray(permutation(x.parameters.n, k))
    return replace(x, parts=_moved(x.parts, moved, keys.galois[k], x.parameters, x.level))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _moved(parts: jax.Array, places: jax.Array, key: jax.Array, p: Parameters, level: int) -> jax.Array:
    a, b = jnp.take(parts, places, axis=-1)
    switched = _switch(b, key, p, level)
    return switched.at[0].set(_add(switched[0], a, _plan(p, level).moduli))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rescaled(parts: jax.Array, p: Parameters, level: int) -> jax.Array:
    return rns.mod_down_values(parts, _plan(p, level), p.width)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _switch(x: jax.Array, key: jax.Array, p: Parameters, level: int) -> jax.Array:
    """From a polynomial under one key to two parts under another: sum of its digits times the key's, divided by P."""
    plan, extended = _plan(p, level), _plan(p, level, special=True)
    alpha, count, last = len(p.special), len(plan.moduli), len(p.moduli)
    coefficients = intt(x, plan)
    digits = [
        basis_conversion(
            coefficients[start : start + alpha],
            rns.basis(plan.moduli[start : start + alpha], extended.moduli),
        )
        for start in range(0, count, alpha)
    ]
    values = ntt(jnp.stack(digits), extended)
    key = jnp.concatenate([key[: len(digits), :, :count], key[: len(digits), :, last:]], 2)
    return rns.mod_down_values(rns.inner_product(values[:, None], key, extended.moduli), extended, alpha)


# Linear maps and polynomials


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


def _moduli(x: Ciphertext) -> tuple[int, ...]:
    return x.parameters.moduli[: x.parameters.limbs(x.level)]


def _checked_level(p: Parameters, level: int) -> int:
    if not 0 <= level <= p.depth:
        raise ValueError(f"ckks: levels are 0 ... {p.depth}, got {level}")
    return level


def _check_alike(x: Ciphertext, y: Ciphertext | Plaintext, same_scale: bool = False) -> None:
    if isinstance(y, Ciphertext):
        if x.parameters != y.parameters:
            raise ValueError("ckks: the ciphertexts have different parameters")
        _check_key(x, y)
    if x.level != y.level:
        raise ValueError(f"ckks: levels differ: {x.level} and {y.level}; see `drop_level`")
    if same_scale and not math.isclose(x.scale, y.scale, rel_tol=SCALE_TOLERANCE):
        raise ValueError(
            f"ckks: scales differ: 2^{math.log2(x.scale):.6f} and 2^{math.log2(y.scale):.6f}; see `rescale`"
        )


def _check_key(x: Any, y: Any) -> None:
    if x.parameters != y.parameters:
        raise ValueError("ckks: the key is for other parameters")
    if any(isinstance(v.key, jax.core.Tracer) for v in (x, y)):
        return
    if not np.array_equal(x.key, y.key):
        raise ValueError("ckks: the key is another one than that of the ciphertext")
