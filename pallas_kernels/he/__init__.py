"""Homomorphic encryption on matrix units: modular arithmetic, transforms, residue number systems, CKKS.

A research library: not audited, and not constant in time.
"""

from pallas_kernels.he import ckks, rns
from pallas_kernels.he.ring import automorphism, monomial_mul, ntt_automorphism
from pallas_kernels.moduli import check_moduli, ntt_primes
from pallas_kernels.ops.basis_conversion import BasisPlan, basis_conversion
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
from pallas_kernels.ops.ntt import NttPlan, intt, ntt, polymul

__all__ = [
    "BasisPlan",
    "ModMatmulPlan",
    "NttPlan",
    "add",
    "automorphism",
    "basis_conversion",
    "check_moduli",
    "ckks",
    "from_montgomery",
    "intt",
    "mod_matmul",
    "monomial_mul",
    "mul",
    "mul_add",
    "neg",
    "ntt",
    "ntt_automorphism",
    "ntt_primes",
    "polymul",
    "reduce",
    "rns",
    "shoup_quotient",
    "sub",
    "to_montgomery",
]
