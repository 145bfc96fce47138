"""Number-theoretic transforms as two modular matrix products with a multiplication by twiddle factors in between.

A polynomial is a matrix x[r, c]. Forwards, its columns are transformed first (weights from the left), then its rows
(weights from the right); backwards, the rows first. What permutes rows and columns stands in the weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kernels import modular
from pallas_kernels.kernels.mod_matmul import Reduction, digits, fold, product, stacked_times, times_weights
from pallas_kernels.kernels.modular import Modulus


def transform(
    x_ref: Any, left_ref: Any, right_ref: Any, words_ref: Any, shares_ref: Any, q_ref: Any, inverse_ref: Any,
    o_ref: Any, *, inverse: bool, how: Reduction,
) -> None:  # fmt: skip
    """Whole polynomials of one limb at once: between the products nothing leaves the core. For TPUs.

    Args:
      x_ref, o_ref: [polynomials, R, C], canonical.
      left_ref: [p, R, 4 R]; right_ref: [j, p, C, C].
      words_ref, shares_ref: [2, R, C], of the twiddle factors, for `modular.mul_constant`.
    """
    count, rows, _ = x_ref.shape
    m = Modulus(q_ref[...], inverse_ref[...])

    def twiddled(y: jax.Array) -> jax.Array:
        return modular.mul_constant(y, words_ref, shares_ref, m)

    def words(b: Any) -> jax.Array:
        return modular.centre(x_ref[b], m) if how.centre else x_ref[b]

    def down_columns(x: jax.Array) -> jax.Array:
        return fold(stacked_times(left_ref, x), m, how)

    def along_rows(words: Callable[[int], jax.Array]) -> list[jax.Array]:
        """One product of all polynomials' rows, which fills the matrix units."""
        each = [digits(words(b)) for b in range(count)]
        data = [jnp.concatenate([d[j] for d in each], 0) for j in range(4)]
        y = fold(times_weights(data, lambda j, p: right_ref[j, p]), m, how)
        return [y[b * rows : (b + 1) * rows] for b in range(count)]

    if inverse:
        out = [down_columns(twiddled(y)) for y in along_rows(words)]
    else:
        out = along_rows(lambda b: twiddled(down_columns(words(b))))
    for b, y in enumerate(out):
        o_ref[b] = modular.canonical(y, m)


def half_transform(*refs: Any, side: str, last: bool, **options: Any) -> None:
    """A tile of one of the two products of a transform, of one polynomial and limb. For GPUs.

    Args:
      refs: of the data and the weights, as `mod_matmul.product` takes them; of the words and shares of the twiddle
        factors if this is the first half; of q, 1 / q and the result.
      side: of the weights.
      last: give canonical residues, else centred ones.
      options: of `product`.
    """
    x_ref, w_ref, *twiddle_refs, q_ref, inverse_ref, o_ref = refs
    m = Modulus(q_ref[...], inverse_ref[...])
    y = product(x_ref, w_ref, m, side=side, **options)
    if last:
        o_ref[...] = modular.canonical(y, m)
    else:
        words_ref, shares_ref = twiddle_refs
        o_ref[...] = modular.mul_constant(y, words_ref, shares_ref, m)
