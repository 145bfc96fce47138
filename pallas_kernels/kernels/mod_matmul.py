"""Matrix products modulo q < 2^31 as products of signed bytes, with the reduction in the epilogue.

One factor is known as `weights`: the int8 digits of `pallas_kernels.moduli.weight_digits`. The other one, `data`, is
split into its own four balanced bytes here. Then

    data weights = sum_p 256^p S_p,    S_p = sum_j data_j weights[j, p]    modulo q,

16 products of int8 matrices with sums in int32, which `fold` brings together. With K terms in a sum:

* |S_p| <= 4 K 2^14 < 2^31 for K < 2^15.
* The v of `weight_digits` are below q / 2 and bytes at most 128, so |sum_p 256^p S_p| <= 256 K q: its quotient by q is
  below 2^22, and its estimate in float32, of relative error 3 / 2^24, is off by less than 1/4, for K <= 4096.
* What else a sum may need depends on K and q: see `Reduction`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.kernels import modular
from pallas_kernels.kernels.modular import BYTE_OFFSETS, Modulus, nearest, real

# The most terms of a sum that one `fold` takes.
MAX_TERMS = 4096
# The largest word whose balanced digits are bytes; canonical residues above it have to be centred before.
LARGEST_WORD = 0x7F7F7F7F


class Reduction(NamedTuple):
    """What it takes to reduce sums of a length by given moduli; made by `reduction`.

    centre: canonical data have to be centred before they are split into bytes.
    wide: S_2 + 256 S_3 may exceed one word, and is reduced by itself first.
    coarse: S_0 is so small beside q that the quotient can do without it.
    """

    centre: bool
    wide: bool
    coarse: bool


def reduction(terms: int, moduli: Sequence[int]) -> Reduction:
    """By the bounds for any data and weights: |S_2 + 256 S_3| <= K (q / 256 + 257), and |S_0| <= 2^16 K."""
    wide = terms * (max(moduli) + 257 * 256) >= 256 * 2**31
    return Reduction(
        centre=max(moduli) > LARGEST_WORD, wide=wide, coarse=not wide and 4 * 2**16 * terms <= min(moduli)
    )


def digits(x: jax.Array) -> list[jax.Array]:
    """The four balanced bytes of words |x| <= 0x7F7F7F7F, lowest first."""
    u = (x + BYTE_OFFSETS) ^ BYTE_OFFSETS
    return [(u >> (8 * j) if j else u).astype(jnp.int8) for j in range(4)]


def digit_rows(x: jax.Array) -> jax.Array:
    """The same bytes, one above the other: (R, C) -> (4 R, C). Without a concatenation, which no GPU kernel has."""
    rows, columns = x.shape
    u = jnp.broadcast_to((x + BYTE_OFFSETS) ^ BYTE_OFFSETS, (4, rows, columns))
    return (
        (u >> (8 * lax.broadcasted_iota(jnp.int32, u.shape, 0))).astype(jnp.int8).reshape(4 * rows, columns)
    )


def fold(sums: Sequence[jax.Array], m: Modulus, how: Reduction) -> jax.Array:
    """sum_p 256^p sums[p] modulo q, |r| < q; for up to 256 terms |r| < 0.8 q.

    What exceeds 32 bits wraps and comes back: only the result has to fit. S_0 + 256 S_1 may wrap, so its estimate is
    made of its parts.
    """
    high = sums[2] + (sums[3] << 8)
    if how.wide:
        high = high - nearest((real(sums[3]) * 256.0 + real(sums[2])) * m.inverse) * m.q
    low = sums[0] + (sums[1] << 8) + (high << 16)
    if how.coarse:
        quotient = real(high + (sums[1] >> 8)) * (m.inverse * 65536.0)
    else:
        quotient = (real(high) * 65536.0 + real(sums[1]) * 256.0 + real(sums[0])) * m.inverse
    return low - nearest(quotient) * m.q


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def sum_of(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(lax.add, terms)


def times_weights(data: Sequence[jax.Array], weights: Callable[[int, int], jax.Array]) -> list[jax.Array]:
    """The digit sums of data @ weights. data: its `digits`; weights: (j, p) -> int8 matrix."""
    return [sum_of([dot(data[j], weights(j, p)) for j in range(4)]) for p in range(4)]


def weights_times(weights: Callable[[int, int], jax.Array], data: Sequence[jax.Array]) -> list[jax.Array]:
    """The digit sums of weights @ data."""
    return [sum_of([dot(weights(j, p), data[j]) for j in range(4)]) for p in range(4)]


def stacked_times(weights: Any, x: jax.Array) -> list[jax.Array]:
    """The digit sums of weights @ x, with the bytes of x above each other: one long sum. weights: [p, rows, 4 K]."""
    data = digit_rows(x)
    return [dot(weights[p], data) for p in range(4)]


def product(x_ref: Any, w_ref: Any, m: Modulus, *, side: str, step: int, how: Reduction) -> jax.Array:
    """A block of a product modulo q, in (-q, q).

    Args:
      x_ref: the block's rows (or columns) of the data, all K of them.
      w_ref: [j, p, K, columns] for data @ weights, side "right"; [p, rows, 4 K], in the order of `digit_rows`, for
        weights @ data, side "left".
      step: terms of the sum in an iteration of the loop over them.
    """
    right = side == "right"
    terms = x_ref.shape[1 if right else 0]
    shape = (x_ref.shape[0], w_ref.shape[3]) if right else (w_ref.shape[1], x_ref.shape[1])

    def add_terms(i: Any, sums: Sequence[jax.Array]) -> list[jax.Array]:
        start = i * step if isinstance(i, int) else pl.multiple_of(i * step, step)
        here = pl.ds(start, step)
        x = x_ref[:, here] if right else x_ref[here, :]
        data = digits(modular.centre(x, m) if how.centre else x)
        if right:
            more = times_weights(data, lambda j, p: w_ref[j, p, here, :])
        else:
            more = weights_times(lambda j, p: w_ref[p, :, pl.ds(j * terms + start, step)], data)
        return [lax.add(s, t) for s, t in zip(sums, more, strict=True)] if sums else more

    if terms == step:
        return fold(add_terms(0, []), m, how)
    zeros = [jnp.zeros(shape, jnp.int32)] * 4
    # Bounds of 32 bits: under x64 Python's integers would make a 64-bit index. Not of JAX: those would be traced.
    sums = lax.fori_loop(np.int32(0), np.int32(terms // step), add_terms, zeros)
    return fold(sums, m, how)


def matmul(x_ref: Any, w_ref: Any, q_ref: Any, inverse_ref: Any, o_ref: Any, **options: Any) -> None:
    """o = x @ weights modulo q, canonical: one block of one limb. options: of `product`."""
    m = Modulus(q_ref[...], inverse_ref[...])
    o_ref[...] = modular.canonical(product(x_ref, w_ref, m, side="right", **options), m)
