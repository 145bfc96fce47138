"""Derivatives of products that are linear in the input and in each factor of a matrix.

The input gradient is the product with the factors of the transposed matrix, and the derivatives of all gradients are
such products again: an operator states its product, its factors' gradients and its transpose, and has every order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

Factors = tuple[jax.Array | None, ...]


class Multilinear(NamedTuple):
    """What an operator states. Factors may be None, or integers, which have no gradient.

    multiply: (choice, x (n, inputs), *factors) -> (n, outputs), in x's dtype.
    gradients: (choice, x, cotangents (n, outputs), *factors) -> a gradient of each factor, in its dtype or a wider one.
    transpose: the factors of the transposed matrix.
    """

    multiply: Callable[..., jax.Array]
    gradients: Callable[..., Factors]
    transpose: Callable[..., Factors]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(op: Multilinear, choice: dispatch.Choice, x: jax.Array, factors: Factors) -> jax.Array:
    return op.multiply(choice, x, *factors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    op: Multilinear, choice: dispatch.Choice, x: jax.Array, g: jax.Array, factors: Factors
) -> Factors:
    found = op.gradients(choice, x, g, *factors)
    return tuple(d if _differentiable(f) else None for d, f in zip(found, factors, strict=True))


def _multiply_backward(op: Multilinear, choice: dispatch.Choice, saved: Any, g: jax.Array) -> Any:
    x, factors = saved
    found = _gradients(op, choice, x, g, factors)
    gradients = (None if d is None else d.astype(f.dtype) for d, f in zip(found, factors, strict=True))
    return multiply(op, choice, g, op.transpose(*factors)), tuple(gradients)


def _gradients_backward(op: Multilinear, choice: dispatch.Choice, saved: Any, cotangents: Factors) -> Any:
    x, g, factors = saved
    floats = [i for i, f in enumerate(factors) if _differentiable(f)]

    def pairing(x: jax.Array, g: jax.Array, *some: jax.Array) -> jax.Array:
        """<cotangents, gradients>, by linearity without the gradients."""
        whole = _replaced(factors, floats, some)
        parts = (
            multiply(op, choice, x, _replaced(whole, [i], [cotangents[i].astype(factors[i].dtype)]))  # pyright: ignore
            for i in floats
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return sum(jnp.sum(g.astype(wide) * part.astype(wide)) for part in parts)  # pyright: ignore

    dx, dg, *found = jax.grad(pairing, range(2 + len(floats)))(x, g, *(factors[i] for i in floats))
    return dx, dg, _replaced((None,) * len(factors), floats, found)


# To pyright, what `partial` decorates is a plain function.
multiply.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda op, choice, x, factors: (multiply(op, choice, x, factors), (x, factors)), _multiply_backward
)
_gradients.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
    lambda op, choice, x, g, factors: (_gradients(op, choice, x, g, factors), (x, g, factors)),
    _gradients_backward,
)


def _differentiable(factor: jax.Array | None) -> bool:
    return factor is not None and jnp.issubdtype(factor.dtype, jnp.floating)


def _replaced(factors: Factors, places: Any, values: Any) -> Factors:
    changed = dict(zip(places, values, strict=True))
    return tuple(changed.get(i, f) for i, f in enumerate(factors))
