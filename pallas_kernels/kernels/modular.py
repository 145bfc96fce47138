"""Arithmetic modulo q < 2^31 in 32-bit words, and the elementwise kernels made of it.

Neither accelerator has 64-bit products, or the upper half of a 32-bit one. Here a float32 estimate of the quotient
x / q, good to much less than 1, is rounded, and its multiple of q is taken off in 32-bit arithmetic that wraps: what is
left is exact. Only which multiple is taken off depends on rounding, and canonical results do not.

Residues are int32: canonical in [0, q), or centred, |r| <= 0.52 q. Functions take arrays or Refs' values alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# 1.5 * 2^23: in float32 its neighbours are integers.
ROUNDER = 12582912.0
# 0x80808080 as int32: 128 in every byte.
BYTE_OFFSETS = -0x7F7F7F80


class Modulus(NamedTuple):
    """q as int32 and 1 / q as float32, of shapes that broadcast against residues."""

    q: Any
    inverse: Any


def nearest(x: jax.Array) -> jax.Array:
    """The integer next to x, |x| < 2^22."""
    # The bitwise operation right after the cast also keeps the TPU compiler's profiler aware of the type.
    return (lax.bitcast_convert_type(x + ROUNDER, jnp.int32) & 0x7FFFFF) - 0x400000


def real(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def canonical(r: jax.Array, m: Modulus) -> jax.Array:
    """Into [0, q), from (-q, q)."""
    return jnp.where(r < 0, r + m.q, r)


def centre(x: jax.Array, m: Modulus) -> jax.Array:
    """Into [-q/2, q/2], from [0, q)."""
    return x - jnp.where(x > (m.q >> 1), m.q, 0)


def add(a: jax.Array, b: jax.Array, m: Modulus) -> jax.Array:
    """a + b of canonical residues, canonical; their sum may not fit 31 bits."""
    return canonical(a - (m.q - b), m)


def sub(a: jax.Array, b: jax.Array, m: Modulus) -> jax.Array:
    """a - b of canonical residues, canonical."""
    return canonical(a - b, m)


def neg(a: jax.Array, m: Modulus) -> jax.Array:
    """-a of a canonical residue, canonical."""
    return canonical(-a, m)


def mul(a: jax.Array, b: jax.Array, m: Modulus) -> jax.Array:
    """a b, centred, of a centred a and a b of |b| < q.

    16 bits of a at a time: each quotient is below 2^16, its estimate good to 2^-6.
    """
    high = (a + 0x8000) >> 16
    low = a - (high << 16)
    fb = real(b)
    r = high * b - nearest(real(high) * fb * m.inverse) * m.q
    return (r << 16) + low * b - nearest((real(r) * 65536.0 + real(low) * fb) * m.inverse) * m.q


def mul_constant(r: jax.Array, words: Sequence[Any], shares: Sequence[Any], m: Modulus) -> jax.Array:
    """r t, centred, for a known t: one quotient. |r| < q, and r < 2^31 - 2^15.

    Args:
      words: t and 2^16 t, centred. shares: the same divided by q, float32.
    """
    high = (r + 0x8000) >> 16
    low = r - (high << 16)
    quotient = nearest(real(high) * shares[1] + real(low) * shares[0])
    return high * words[1] + low * words[0] - quotient * m.q


def reduce(x: jax.Array, m: Modulus) -> jax.Array:
    """Any word of 32 bits, read as unsigned, modulo q; centred."""
    high, low = lax.shift_right_logical(x, 16), x & 0xFFFF
    r = high - nearest(real(high) * m.inverse) * m.q
    return (r << 16) + low - nearest((real(r) * 65536.0 + real(low)) * m.inverse) * m.q


def mul_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of two unsigned words, by 16 bits at a time."""
    ah, al, bh, bl = lax.shift_right_logical(a, 16), a & 0xFFFF, lax.shift_right_logical(b, 16), b & 0xFFFF
    low, cross, other = al * bl, al * bh, ah * bl
    carry = lax.shift_right_logical(low, 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return (
        ah * bh
        + lax.shift_right_logical(cross, 16)
        + lax.shift_right_logical(other, 16)
        + lax.shift_right_logical(carry, 16)
    )


def mul_montgomery(a: jax.Array, b: jax.Array, q_inverse: jax.Array, m: Modulus) -> jax.Array:
    """a b / 2^32 of canonical residues, canonical. q_inverse: 1 / q modulo 2^32 (Montgomery 1985)."""
    return canonical(mul_high(a, b) - mul_high(a * b * q_inverse, m.q), m)


def mul_shoup(a: jax.Array, b: jax.Array, quotient: jax.Array, m: Modulus) -> jax.Array:
    """a b for a canonical b, canonical. a: any word; quotient: floor(2^32 b / q) (Harvey 2014)."""
    return canonical(a * b - mul_high(a, quotient) * m.q - m.q, m)


def elementwise(*refs: Any, operation: Callable[..., jax.Array]) -> None:
    """o = operation(*arrays, constants) on one block of one limb.

    Args:
      refs: of the arrays; of q, of 1 / q, of one further constant of the limb; of the result.
    """
    *arrays, q, inverse, constant, out = (*refs[:-1], refs[-1])
    out[...] = operation(*(a[...] for a in arrays), constant[...], Modulus(q[...], inverse[...]))
