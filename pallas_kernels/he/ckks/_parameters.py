"""Parameters of CKKS: rings, moduli and scales, and how much of them is secure."""

import functools
import itertools
import math
from dataclasses import dataclass

import jax

from pallas_kernels.moduli import check_moduli, ntt_primes
from pallas_kernels.ops.ntt import NttPlan, check_degree

# The most bits of all moduli together at 128 bits of classical security with a ternary secret
# (Homomorphic Encryption Standard, 2018).
MOST_BITS = {2**10: 27, 2**11: 54, 2**12: 109, 2**13: 218, 2**14: 438, 2**15: 881}


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
      n: degree, a power of two from 2^3 to 2^16; n / 2 slots.
      depth: products (of ciphertexts or with plaintexts) one after the other.
      scale_bits: of the scale, from 36: the bits of a value after the point, of which the noise takes about 18.
      base_bits: of what is left at level 0: values are up to 2^(base_bits - scale_bits - 1).
      special: primes of keys alone. More make keys smaller and key switching faster, and take bits from the levels.
      allow_insecure: take what has less than 128 bits of security.

    Raises:
      ValueError: `n` is no such power; that has less than 128 bits of security; there are no such primes.

    Example:
      >>> from pallas_kernels.he import ckks
      >>> p = ckks.parameters(2**13, depth=2)
      >>> p.slots, p.depth, sum(q.bit_length() for q in (*p.moduli, *p.special))
      (4096, 2, 173)
    """
    n = check_degree("ckks", n)
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
    most = MOST_BITS.get(n, 0 if n < 2**10 else MOST_BITS[2**15])  # n = 2^16 is not in the standard.
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


@functools.lru_cache(maxsize=64)
def plan_of(parameters: Parameters, level: int | None = None, special: bool = False) -> NttPlan:
    with jax.ensure_compile_time_eval():
        if level is None:
            return NttPlan(parameters.n, (*parameters.moduli, *parameters.special))
        count = parameters.limbs(level)
        last = len(parameters.moduli)
        return plan_of(parameters).limbs(
            [*range(count), *range(last, last + len(parameters.special) * special)]
        )


def checked_level(p: Parameters, level: int) -> int:
    if not 0 <= level <= p.depth:
        raise ValueError(f"ckks: levels are 0 ... {p.depth}, got {level}")
    return level
