"""What a benchmark needs of an implementation, the library's own or somebody else's.

`Operator.baselines[name](case)` is None, or a function that takes the arguments and a cotangent as numpy
arrays, moves them to where it runs, and returns a `Contestant`.
"""

import importlib.metadata
import os
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


def of_torch(
    form: Callable[..., Any],
    case: Case,
    *,
    place: Callable[[np.ndarray, int], np.ndarray] = lambda a, i: a,
    back: Callable[[np.ndarray, int], np.ndarray] = lambda a, i: a,
    memory_format: str = "contiguous_format",
) -> Prepare | None:
    """A function of a case's arguments as PyTorch's tensors, on all CPUs or the GPU; None without PyTorch.

    Args:
      place: an argument, or the cotangent, as the tensor's array: what that costs is not timed. `i` counts the
        arguments; it is -1 for the cotangent, and for the result.
      back: the inverse of `place`.
      memory_format: of the tensors, an attribute of `torch`.
    """
    try:
        import torch
    except ImportError:
        return None
    device = torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)

    def tensor(a: np.ndarray) -> Any:
        # PyTorch doesn't know NumPy's bfloat16.
        wide = torch.from_numpy(np.array(a, np.float32)).to(device, getattr(torch, a.dtype.name))
        return wide.contiguous(memory_format=getattr(torch, memory_format))

    def finished(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return values

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        tensors = [tensor(place(a, i)) for i, a in enumerate(arguments)]
        g = tensor(place(cotangent, -1))
        for i in case.differentiable:
            tensors[i].requires_grad_()

        def forward() -> Any:
            with torch.no_grad():
                return finished((form(*tensors),))

        def gradients() -> Any:
            out = form(*tensors)
            return finished((out, *torch.autograd.grad(out, [tensors[i] for i in case.differentiable], g)))

        def to_numpy(values: Sequence[Any]) -> list[np.ndarray]:
            arrays = [v.detach().float().cpu().numpy() for v in values]
            return [back(a, i) for i, a in zip((-1, *case.differentiable), arrays, strict=False)]

        return Contestant(forward, gradients, to_numpy)

    return prepare
