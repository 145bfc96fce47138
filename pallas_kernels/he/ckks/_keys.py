"""Keys of CKKS, and the random numbers that they and encryption are made of."""

import functools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.he import rns
from pallas_kernels.he.ckks._parameters import Parameters, plan_of
from pallas_kernels.he.ring import permutation
from pallas_kernels.ops.modular import add, mul, sub
from pallas_kernels.ops.ntt import NttPlan, ntt

NOISE = 3.2


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


def generate_keys(
    parameters: Parameters, *, rotations: Iterable[int] = (), conjugation: bool = False
) -> tuple[SecretKey, PublicKey, EvaluationKeys]:
    """Make a secret key and its public keys, with the operating system's random numbers.

    Args:
      rotations: by which slots will be rotated. conjugation: whether they will be conjugated.
    """
    plan = plan_of(parameters)
    key = jnp.asarray(random_words((2,)))
    secret = ntt(rns.from_integers(ternary(parameters.n), plan.moduli), plan)
    count = len(parameters.moduli)
    top = plan_of(parameters, parameters.depth)
    mask = uniform(top)
    body = sub(noise(top), mul(mask, secret[:count], top.moduli), top.moduli)
    elements = {galois_element(parameters, r) for r in rotations} | (
        {2 * parameters.n - 1} if conjugation else set()
    )
    square = mul(secret, secret, plan.moduli)
    moved = {k: jnp.take(secret, permutation(parameters.n, k), axis=-1) for k in sorted(elements - {1})}
    evaluation = EvaluationKeys(
        switching_key(parameters, secret, square),
        {k: switching_key(parameters, secret, s) for k, s in moved.items()},
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


def switching_key(parameters: Parameters, secret: jax.Array, source: jax.Array) -> jax.Array:
    """Encryptions of P source under `secret`, on the limbs of one digit each: (digits, 2, all limbs, n)."""
    plan, alpha, count = plan_of(parameters), len(parameters.special), len(parameters.moduli)
    scaled = mul(source, rns.constant(math.prod(parameters.special), plan.moduli), plan.moduli)
    digits = []
    for start in range(0, count, alpha):
        mine = np.zeros((len(plan.moduli), 1), bool)
        mine[start : min(start + alpha, count)] = True
        mask = uniform(plan)
        body = sub(noise(plan), mul(mask, secret, plan.moduli), plan.moduli)
        digits.append(jnp.stack([add(body, jnp.where(mine, scaled, 0), plan.moduli), mask]))
    return jnp.stack(digits)


def random_words(shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(os.urandom(4 * math.prod(shape)), np.uint32).reshape(shape)


def ternary(n: int) -> np.ndarray:
    """-1, 0 and 1, each with probability 1/3."""
    return below(3, n).astype(np.int64) - 1


def below(bound: int, count: int) -> np.ndarray:
    """Uniform numbers: words that would make some of them likelier are drawn again."""
    limit, found = 2**32 // bound * bound, np.zeros(0, np.uint32)
    while len(found) < count:
        words = random_words((count,))
        found = np.concatenate([found, words[words < limit] % np.uint32(bound)])
    return found[:count]


def gaussian(n: int) -> np.ndarray:
    """Integers of standard deviation 3.2: a normal number, rounded."""
    # Box and Muller's transform, of uniform numbers that are never 0.
    words = np.frombuffer(os.urandom(16 * n), np.uint64).reshape(2, n) >> np.uint64(11)
    u, v = (words.astype(np.float64) + 0.5) * 2.0**-53
    return np.rint(NOISE * np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).astype(np.int64)


def noise(plan: NttPlan) -> jax.Array:
    return ntt(rns.from_integers(gaussian(plan.n), plan.moduli), plan)


def uniform(plan: NttPlan) -> jax.Array:
    return jnp.asarray(np.stack([below(q, plan.n) for q in plan.moduli]))
