"""CKKS: approximate arithmetic on encrypted vectors of complex numbers (Cheon, Kim, Kim and Song, ASIACRYPT 2017).

The full RNS form (Cheon et al., SAC 2018) with hybrid key switching (Han and Ki, CT-RSA 2020). A ciphertext holds n / 2
slots. Every level has two primes, whose product is near the scale; a product of ciphertexts uses up one level.

A research library: not audited, not constant in time. Keys and noise come from the operating system's generator.
"""

from pallas_kernels.he.ckks._ciphertexts import (
    SCALE_TOLERANCE,
    Ciphertext,
    add,
    conjugate,
    decrypt,
    drop_level,
    encrypt,
    multiply,
    negate,
    noise_budget,
    relinearise,
    rescale,
    rotate,
    subtract,
)
from pallas_kernels.he.ckks._encoding import Plaintext, decode, encode
from pallas_kernels.he.ckks._functions import (
    matrix,
    matrix_rotations,
    matrix_vector,
    polynomial,
    product,
    square,
)
from pallas_kernels.he.ckks._keys import (
    NOISE,
    EvaluationKeys,
    PublicKey,
    SecretKey,
    galois_element,
    generate_keys,
)
from pallas_kernels.he.ckks._parameters import MOST_BITS, Parameters, parameters

__all__ = [
    "MOST_BITS",
    "NOISE",
    "SCALE_TOLERANCE",
    "Ciphertext",
    "EvaluationKeys",
    "Parameters",
    "Plaintext",
    "PublicKey",
    "SecretKey",
    "add",
    "conjugate",
    "decode",
    "decrypt",
    "drop_level",
    "encode",
    "encrypt",
    "galois_element",
    "generate_keys",
    "matrix",
    "matrix_rotations",
    "matrix_vector",
    "multiply",
    "negate",
    "noise_budget",
    "parameters",
    "polynomial",
    "product",
    "relinearise",
    "rescale",
    "rotate",
    "square",
    "subtract",
]
