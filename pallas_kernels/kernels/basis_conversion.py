"""From residues of one basis to those of another: a modular matrix product with a modulus for every row."""

from typing import Any

from pallas_kernels.kernels import modular
from pallas_kernels.kernels.mod_matmul import Reduction, product
from pallas_kernels.kernels.modular import Modulus


def convert(
    x_ref: Any, w_ref: Any, q_ref: Any, inverse_ref: Any, o_ref: Any, *, step: int, how: Reduction
) -> None:
    """o = weights @ x, canonical: some columns of one array of residues.

    Args:
      x_ref: [K, columns], words of at most 0x7F7F7F7F; w_ref: [p, rows, 4 K], in the order of `digit_rows`.
      q_ref, inverse_ref: [rows, 1].
      step: terms of the sum in an iteration of the loop over them.
    """
    m = Modulus(q_ref[...], inverse_ref[...])
    o_ref[...] = modular.canonical(product(x_ref, w_ref, m, side="left", step=step, how=how), m)
