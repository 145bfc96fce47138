"""Moduli on the host: what they must be, their roots of unity, and matrices of residues as signed digits.

All of it is integer arithmetic: Python's, or numpy's in 64 bits, where products of residues below 2^31 fit.
"""

import functools
import math
import operator
from collections.abc import Iterator, Sequence

import numpy as np

BITS = 31


@functools.lru_cache(maxsize=1024)
def _checked(moduli: tuple[int, ...], n: int | None) -> tuple[int, ...]:
    if not moduli:
        raise ValueError("`moduli` must hold at least one prime, got none")
    for q in moduli:
        if q >= 2**BITS:
            raise ValueError(f"a modulus must be below 2^{BITS}, got {q}")
        if q < 3 or not is_prime(q):
            raise ValueError(f"a modulus must be an odd prime, got {q}")
        if n is not None and q % (2 * n) != 1:
            raise ValueError(
                f"for n = {n} a modulus must be 1 modulo {2 * n}, got {q}, which is {q % (2 * n)}"
            )
    if len(set(moduli)) < len(moduli):
        raise ValueError(f"moduli must be distinct, got {moduli}")
    return moduli


def check_moduli(moduli: Sequence[int], n: int | None = None) -> tuple[int, ...]:
    """`moduli` as a tuple of ints, once they have been found to be distinct odd primes below 2^31.

    Args:
      n: the degree of a ring X^n + 1 whose roots must exist: then each is 1 modulo 2n.

    Raises:
      TypeError: they are not a sequence of integers. ValueError: they are not such primes.
    """
    try:
        values = tuple(map(operator.index, moduli))
    except TypeError:
        raise TypeError(f"`moduli` must be a sequence of ints, got {moduli!r}") from None
    return _checked(values, n)


def is_prime(q: int) -> bool:
    """Miller and Rabin's test; these bases leave no composite below 3.2e9."""
    if q < 2 or any(q % p == 0 for p in (2, 3, 5, 7)):
        return q in (2, 3, 5, 7)
    twos = ((q - 1) & (1 - q)).bit_length() - 1
    for base in (2, 3, 5, 7):
        x = pow(base, (q - 1) >> twos, q)
        if x in (1, q - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % q
            if x == q - 1:
                break
        else:
            return False
    return True


def ntt_primes(n: int, bits: float) -> Iterator[int]:
    """Primes that are 1 modulo 2n, the nearest to 2^bits first.

    Example:
      >>> from itertools import islice
      >>> list(islice(ntt_primes(4096, 30), 3))
      [1073750017, 1073692673, 1073668097]
    """
    start = round(2**bits / (2 * n))
    for i in range(2**BITS // (2 * n)):
        for k in (start - i, start + i) if i else (start,):
            q = k * 2 * n + 1
            if 2 < q < 2**BITS and is_prime(q):
                yield q


@functools.lru_cache(maxsize=1024)
def root_of_unity(n: int, q: int) -> int:
    """The smallest psi of order 2n modulo the prime q: psi^n = -1.

    Example:
      >>> root_of_unity(8, 17), root_of_unity(4096, 1073692673)
      (3, 236231)
    """
    some = next(x for g in range(2, q) if pow(x := pow(g, (q - 1) // (2 * n), q), n, q) == q - 1)
    return int(powers(some, 2 * n, q)[1::2].min())


def powers(base: int, count: int, q: int) -> np.ndarray:
    """base^i mod q for 0 <= i < count, as uint64."""
    table = np.ones(1, np.uint64)
    while len(table) < count:
        step = np.uint64(pow(base, len(table), q))
        table = np.concatenate([table, table * step % np.uint64(q)])
    return table[:count]


def bit_reversal(n: int) -> np.ndarray:
    """The permutation of range(n), a power of two, that reverses the bits of each index."""
    table = np.zeros(1, np.int64)
    while len(table) < n:
        table = np.concatenate([2 * table, 2 * table + 1])
    return table


def centred(x: np.ndarray, q: int) -> np.ndarray:
    """Residues in [0, q) moved to [-q/2, q/2], as int64."""
    x = np.asarray(x).astype(np.int64)
    return x - np.where(x > q // 2, q, 0)


def weight_digits(w: np.ndarray, q: int) -> np.ndarray:
    """The residues w 256^j mod q, centred, as balanced digits: v = sum_p digits[j, p] 256^p with digits in int8.

    A word x with balanced bytes x_j then has x w = sum_p 256^p sum_j x_j digits[j, p] modulo q: a product of words
    is 16 products of signed bytes, and as the v are small, so is their sum. (The basis-aligned transformation of
    arXiv:2501.07047, with signs.)

    Args:
      w: canonical residues, any shape.

    Returns:
      (4, 4, *w.shape), int8.
    """
    w = np.asarray(w).astype(np.uint64)
    scaled = np.stack([centred(w * np.uint64(pow(256, j, q)) % np.uint64(q), q) for j in range(4)])
    # Adding 128 to every byte lets carries run; taking it off again within each byte leaves digits in [-128, 128).
    offset = np.uint32(0x80808080)
    shifted = (scaled.astype(np.uint32) + offset) ^ offset
    digits = [(shifted >> np.uint32(8 * p)).astype(np.uint8).view(np.int8) for p in range(4)]
    return np.stack(digits, 1)


def garner(residues: np.ndarray, moduli: Sequence[int]) -> list[int]:
    """The integers in [0, prod(moduli)) with these residues, (L, ...) flattened: the Chinese remainder theorem."""
    total = math.prod(moduli)
    terms = [total // q * pow(total // q, -1, q) for q in moduli]
    columns = np.asarray(residues).reshape(len(moduli), -1).astype(object)
    sums = np.sum([t * row for t, row in zip(terms, columns, strict=True)], axis=0)
    return [int(x) for x in sums % total]
