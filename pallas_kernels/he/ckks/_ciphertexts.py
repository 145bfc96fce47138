"""Encryption and decryption, and arithmetic on ciphertexts."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.he import rns
from pallas_kernels.he.ckks._encoding import Plaintext, decode
from pallas_kernels.he.ckks._keys import EvaluationKeys, PublicKey, SecretKey, galois_element, noise, ternary
from pallas_kernels.he.ckks._parameters import Parameters, plan_of
from pallas_kernels.he.ring import permutation
from pallas_kernels.ops import modular
from pallas_kernels.ops.basis_conversion import basis_conversion
from pallas_kernels.ops.ntt import intt, ntt

# Scales this close are the same, relatively.
SCALE_TOLERANCE = 1e-9

# What XLA fuses with its neighbours is left to it.
_add, _sub, _neg, _mul = (
    functools.partial(f, implementation="xla") for f in (modular.add, modular.sub, modular.neg, modular.mul)
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "key"],
    meta_fields=["scale", "level", "parameters"],
)
@dataclass(frozen=True)
class Ciphertext:
    """An encrypted vector; a pytree.

    parts: (2, limbs, n) uint32, values of polynomials c with c_0 + c_1 s = scale * message + noise; a product that
      is not relinearised has a third one.
    key: the fingerprint of the secret key, (2,) uint32.
    """

    parts: jax.Array
    key: jax.Array
    scale: float
    level: int
    parameters: Parameters


def encrypt(plaintext: Plaintext, key: PublicKey) -> Ciphertext:
    """Encrypt with fresh random numbers of the operating system."""
    plan = plan_of(key.parameters, plaintext.level)
    once = ntt(rns.from_integers(ternary(plan.n), plan.moduli), plan)
    parts = _mul(key.parts[:, : len(plan.moduli)], once, plan.moduli)
    parts = _add(parts, jnp.stack([noise(plan), noise(plan)]), plan.moduli)
    parts = parts.at[0].set(_add(parts[0], plaintext.values, plan.moduli))
    return Ciphertext(parts, key.key, plaintext.scale, plaintext.level, key.parameters)


def decrypt(x: Ciphertext, key: SecretKey) -> Plaintext:
    """Decrypt.

    Raises:
      ValueError: it was encrypted for another key, where that is known.
    """
    _check_key(x, key)
    plan = plan_of(x.parameters, x.level)
    secret = key.values[: len(plan.moduli)]
    total = x.parts[-1]
    for part in x.parts[-2::-1]:
        total = _add(_mul(total, secret, plan.moduli), part, plan.moduli)
    return Plaintext(total, x.scale, x.level)


def noise_budget(x: Ciphertext, key: SecretKey, expected: Any) -> float:
    """Bits between the largest error and the largest number that the slots hold; below 0 nothing is left.

    Args:
      expected: the vector that it should hold.
    """
    expected = np.asarray(expected, np.complex128)
    error = np.abs(decode(decrypt(x, key), x.parameters)[: len(expected)] - expected).max()
    moduli = plan_of(x.parameters, x.level).moduli
    return math.fsum(map(math.log2, moduli)) - 1 - math.log2(x.scale * error) if error else math.inf


def add(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x + y, of the same level and scale."""
    return _sum(x, y, _add)


def subtract(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x - y, of the same level and scale."""
    return _sum(x, y, _sub)


def negate(x: Ciphertext) -> Ciphertext:
    """-x."""
    return replace(x, parts=_neg(x.parts, _moduli(x)))


def _sum(x: Ciphertext, y: Ciphertext | Plaintext, operation: Any) -> Ciphertext:
    _check_alike(x, y, same_scale=True)
    if isinstance(y, Plaintext):
        return replace(x, parts=x.parts.at[0].set(operation(x.parts[0], y.values, _moduli(x))))
    count = max(len(x.parts), len(y.parts))
    a, b = (jnp.pad(v.parts, ((0, count - len(v.parts)), (0, 0), (0, 0))) for v in (x, y))
    return replace(x, parts=operation(a, b, _moduli(x)))


def multiply(x: Ciphertext, y: Ciphertext | Plaintext) -> Ciphertext:
    """x y in every slot, of the same level; the scales multiply. Of ciphertexts, three parts: see `relinearise`."""
    _check_alike(x, y)
    moduli, scale = _moduli(x), x.scale * y.scale
    # Not half of them, which a 1 takes: where `parameters` leave values a single bit, smaller ones still fit.
    if scale >= (whole := math.prod(moduli)):
        raise ValueError(
            f"ckks: a product of scale 2^{math.log2(scale):.1f} exceeds the moduli of level {x.level}, "
            f"2^{math.log2(whole):.1f}: multiply at a higher level, or `rescale` before"
        )
    if isinstance(y, Plaintext):
        return replace(x, parts=_mul(x.parts, y.values, moduli), scale=scale)
    if len(x.parts) != 2 or len(y.parts) != 2:
        raise ValueError(
            f"ckks: relinearise before the next product; got {len(x.parts)} and {len(y.parts)} parts"
        )
    (a, b), (c, d) = x.parts, y.parts
    cross = _add(_mul(a, d, moduli), _mul(b, c, moduli), moduli)
    parts = jnp.stack([_mul(a, c, moduli), cross, _mul(b, d, moduli)])
    return replace(x, parts=parts, scale=scale)


def relinearise(x: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """A product of two ciphertexts, as two parts again."""
    _check_key(x, keys)
    if len(x.parts) != 3:
        raise ValueError(f"ckks: a product of two ciphertexts has 3 parts, got {len(x.parts)}")
    switched = switch(x.parts[2], keys.relinearisation, x.parameters, x.level)
    return replace(x, parts=_add(x.parts[:2], switched, _moduli(x)))


def rescale(x: Ciphertext) -> Ciphertext:
    """Divide the scale by the moduli of the level, and go one level down."""
    if x.level == 0:
        raise ValueError("ckks: at level 0 nothing is left to rescale by: take parameters of more depth")
    divisor = x.parameters.dropped(x.level)
    if x.scale < divisor:
        raise ValueError(
            f"ckks: nothing is left of a scale of 2^{math.log2(x.scale):.1f} that is divided by the moduli of level "
            f"{x.level}, 2^{math.log2(divisor):.1f}: rescale products, and see `drop_level`"
        )
    parts, level = _rescaled(x.parts, x.parameters, x.level), x.level - 1
    return replace(x, parts=parts, scale=x.scale / divisor, level=level)


def drop_level(x: Ciphertext, level: int) -> Ciphertext:
    """The same vector at a lower level, with the scale of that level."""
    if not 0 <= level <= x.level:
        raise ValueError(f"ckks: from level {x.level} one can go to 0 ... {x.level}, not to {level}")
    if level == x.level:
        return x
    # Leave moduli out down to the level above, and make the scale right by the last rescale.
    above = level + 1
    parts, p = x.parts[:, : x.parameters.limbs(above)], x.parameters
    scale = p.scales[level] * p.dropped(above)
    factor = round(scale / x.scale)
    if not math.isclose(factor * x.scale, scale, rel_tol=SCALE_TOLERANCE):
        raise ValueError(
            f"ckks: level {level} is reached from a scale of 2^{math.log2(scale):.6f}, which is no multiple of the "
            f"2^{math.log2(x.scale):.6f} of the ciphertext: `rescale` first"
        )
    moduli = plan_of(p, above).moduli
    parts = _mul(parts, rns.constant(factor, moduli), moduli)
    # What rounding the factor is off by is far below the noise: from the scale of a level it has some 40 bits.
    return rescale(replace(x, parts=parts, level=above, scale=scale))


def rotate(x: Ciphertext, steps: int, keys: EvaluationKeys) -> Ciphertext:
    """The slots moved to the left: slot j gets what slot j + steps had."""
    return _apply_galois(x, galois_element(x.parameters, steps), keys, f"rotation by {steps}")


def conjugate(x: Ciphertext, keys: EvaluationKeys) -> Ciphertext:
    """The complex conjugate in every slot."""
    return _apply_galois(x, 2 * x.parameters.n - 1, keys, "conjugation")


def _apply_galois(x: Ciphertext, k: int, keys: EvaluationKeys, what: str) -> Ciphertext:
    _check_key(x, keys)
    if k == 1:
        return x
    if len(x.parts) != 2:
        raise ValueError(f"ckks: relinearise before a {what}; got {len(x.parts)} parts")
    if k not in keys.galois:
        raise ValueError(f"ckks: there is no key for a {what}: name it in `generate_keys`")
    moved = jnp.asarray(permutation(x.parameters.n, k))
    return replace(x, parts=_moved(x.parts, moved, keys.galois[k], x.parameters, x.level))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _moved(parts: jax.Array, places: jax.Array, key: jax.Array, p: Parameters, level: int) -> jax.Array:
    a, b = jnp.take(parts, places, axis=-1)
    switched = switch(b, key, p, level)
    return switched.at[0].set(_add(switched[0], a, plan_of(p, level).moduli))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rescaled(parts: jax.Array, p: Parameters, level: int) -> jax.Array:
    return rns.mod_down_values(parts, plan_of(p, level), p.width)


@functools.partial(jax.jit, static_argnums=(2, 3))
def switch(x: jax.Array, key: jax.Array, p: Parameters, level: int) -> jax.Array:
    """From a polynomial under one key to two parts under another: sum of its digits times the key's, divided by P."""
    plan, extended = plan_of(p, level), plan_of(p, level, special=True)
    alpha, count, last = len(p.special), len(plan.moduli), len(p.moduli)
    coefficients = intt(x, plan)
    digits = [
        basis_conversion(
            coefficients[start : start + alpha],
            rns.basis(plan.moduli[start : start + alpha], extended.moduli),
        )
        for start in range(0, count, alpha)
    ]
    values = ntt(jnp.stack(digits), extended)
    key = jnp.concatenate([key[: len(digits), :, :count], key[: len(digits), :, last:]], 2)
    return rns.mod_down_values(rns.inner_product(values[:, None], key, extended.moduli), extended, alpha)


def _moduli(x: Ciphertext) -> tuple[int, ...]:
    return x.parameters.moduli[: x.parameters.limbs(x.level)]


def _check_alike(x: Ciphertext, y: Ciphertext | Plaintext, same_scale: bool = False) -> None:
    if isinstance(y, Ciphertext):
        if x.parameters != y.parameters:
            raise ValueError("ckks: the ciphertexts have different parameters")
        _check_key(x, y)
    if x.level != y.level:
        raise ValueError(f"ckks: levels differ: {x.level} and {y.level}; see `drop_level`")
    if same_scale and not math.isclose(x.scale, y.scale, rel_tol=SCALE_TOLERANCE):
        raise ValueError(
            f"ckks: scales differ: 2^{math.log2(x.scale):.6f} and 2^{math.log2(y.scale):.6f}; see `rescale`"
        )


def _check_key(x: Any, y: Any) -> None:
    if x.parameters != y.parameters:
        raise ValueError("ckks: the key is for other parameters")
    if any(isinstance(v.key, jax.core.Tracer) for v in (x, y)):
        return
    if not np.array_equal(x.key, y.key):
        raise ValueError("ckks: the key is another one than that of the ciphertext")
