"""What a benchmark needs of an implementation, the library's own or somebody else's.

`Operator.baselines[name](case)` is None, or a function that takes the arguments and a cotangent as numpy
arrays, moves them to where it runs, and returns a `Contestant`.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.operators import Case


class Contestant(NamedTuple):
    """An implementation with its arguments.

    forward: runs the operator, waits for the end, returns the result.
    gradients: forward and backward; returns the result, then the gradient of each differentiable argument.
    to_numpy: what either returned, as arrays in the layout of the case.
    """

    forward: Callable[[], Any]
    gradients: Callable[[], Any]
    to_numpy: Callable[[Any], list[np.ndarray]]


Prepare = Callable[[Sequence[np.ndarray], np.ndarray], Contestant]


def versioned(package: str, how: str) -> str:
    """What tables call a package's implementation: its version and how it runs, or that it isn't installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}, {how}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} (not installed)"


def of_jax(function: Callable[..., jax.Array], case: Case) -> Prepare:
    """A function of a case's arguments alone, compiled by `jax.jit`."""

    def gradients(cotangent: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        def of_differentiable(*some: jax.Array) -> jax.Array:
            changed = dict(zip(case.differentiable, some, strict=True))
            return function(*(changed.get(i, a) for i, a in enumerate(arguments)))

        out, vjp = jax.vjp(of_differentiable, *(arguments[i] for i in case.differentiable))
        return out, *vjp(cotangent)

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        placed = [jnp.asarray(a) for a in arguments]
        forward, both, g = jax.jit(function), jax.jit(gradients), jnp.asarray(cotangent)
        return Contestant(
            lambda: jax.block_until_ready(forward(*placed)),
            lambda: jax.block_until_ready(both(g, *placed)),
            lambda out: [np.asarray(v) for v in (out if isinstance(out, tuple) else (out,))],
        )

    return prepare
