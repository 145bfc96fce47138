"""Homomorphic encryption on matrix units: modular arithmetic, number-theoretic transforms, residue number systems, CKKS.

A research library: not audited, and not constant in time.
"""

from pallas_kernels.moduli import check_moduli, ntt_primes
from pallas_kernels.ops.mod_matmul import ModMatmulPlan, mod_matmul
from pallas_kernels.ops.modular import (
    add,
    from_montgomery,
    mul,
    mul_add,
    neg,
    reduce,
    shoup_quotient,
    sub,
    to_montgomery,
)

__all__ = [
    "ModMatmulPlan",
    "add",
    "check_moduli",
    "from_montgomery",
    "mod_matmul",
    "mul",
    "mul_add",
    "neg",
    "ntt_primes",
    "reduce",
    "shoup_quotient",
    "sub",
    "to_montgomery",
]
