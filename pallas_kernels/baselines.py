"""What a benchmark needs of an implementation, the library's own or somebody else's.

`Operator.baselines[name](case)` is None, or a function that takes the arguments and a cotangent as numpy
arrays, moves them to where it runs, and returns a `Contestant`.

On an accelerator a contestant makes many calls at once, each on its own copy of the arguments: one alone would take
less time than it takes to start, and find its arguments in the cache.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.operators import Case

# Bytes that no cache holds; the fewest and the most copies of a call's arguments: XLA compiles every call.
UNCACHED, FEWEST, MOST = 2**28, 4, 32


class Contestant(NamedTuple):
    """An implementation with its arguments.

    forward: starts the operator; returns the result, which may not be there yet.
    gradients: forward and backward; returns the result, then the gradient of each differentiable argument.
    to_numpy: what either returned, as arrays in the layout of the case.
    wait: returns when what either returned is there.
    calls: how many of them each makes.
    """

    forward: Callable[[], Any]
    gradients: Callable[[], Any]
    to_numpy: Callable[[Any], list[np.ndarray]]
    wait: Callable[[Any], Any] = lambda out: out
    calls: int = 1


Prepare = Callable[[Sequence[np.ndarray], np.ndarray], Contestant]


def cpus() -> int:
    """How many CPUs this process may run on; `taskset` makes them fewer, and XLA's threads too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        calls = calls_at_once([*arguments, cotangent])
        placed = [[jnp.array(a) for a in arguments] for _ in range(calls)]
        with_cotangents = [[jnp.array(cotangent), *copies] for copies in placed]
        forward, both = (jax.jit(functools.partial(_one_by_one, f)) for f in (function, gradients))
        return Contestant(
            lambda: forward(placed),
            lambda: both(with_cotangents),
            lambda out: [np.asarray(v) for v in (out[0] if isinstance(out[0], tuple) else (out[0],))],
            jax.block_until_ready,
            calls,
        )

    return prepare


def calls_at_once(arrays: Sequence[np.ndarray]) -> int:
    """How many calls with arguments like these are timed as one: on an accelerator as no cache holds, up to `MOST`."""
    if jax.default_backend() == "cpu":
        return 1
    return min(MOST, max(FEWEST, -(-UNCACHED // sum(a.nbytes for a in arrays))))


def _one_by_one(function: Callable[..., Any], calls: Sequence[Sequence[jax.Array]]) -> list[Any]:
    """The results of `function` for the arguments of each call; none starts before the one before is done."""
    results: list[Any] = []
    for arguments in calls:
        if results:
            arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
        results.append(function(*arguments))
    return results


def of_torch(
    form: Callable[..., Any],
    case: Case,
    *,
    place: Callable[[np.ndarray, int], np.ndarray] = lambda a, i: a,
    back: Callable[[np.ndarray, int], np.ndarray] = lambda a, i: a,
    memory_format: str = "contiguous_format",
) -> Prepare | None:
    """A function of a case's arguments as PyTorch's tensors, on the GPU or all `cpus`; None without PyTorch.

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
    torch.set_num_threads(cpus())

    def tensor(a: np.ndarray) -> Any:
        # PyTorch doesn't know NumPy's bfloat16.
        wide = torch.from_numpy(np.array(a, np.float32)).to(device, getattr(torch, a.dtype.name))
        return wide.contiguous(memory_format=getattr(torch, memory_format))

    # As JAX's contestants: float32 is not rounded to fewer bits, and the fastest algorithm is looked for.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        calls = calls_at_once([*arguments, cotangent]) if device.type == "cuda" else 1
        copies = [[tensor(place(a, i)) for i, a in enumerate(arguments)] for _ in range(calls)]
        g = tensor(place(cotangent, -1))

        def forward() -> Any:
            with torch.no_grad():
                return [(form(*tensors),) for tensors in copies]

        def gradients() -> Any:
            def of(tensors: list[Any]) -> Any:
                differentiable = [tensors[i].requires_grad_() for i in case.differentiable]
                out = form(*tensors)
                return out, *torch.autograd.grad(out, differentiable, g)

            return [of(tensors) for tensors in copies]

        def to_numpy(results: Sequence[Any]) -> list[np.ndarray]:
            arrays = [v.detach().float().cpu().numpy() for v in results[0]]
            return [back(a, i) for i, a in zip((-1, *case.differentiable), arrays, strict=False)]

        if device.type == "cpu":
            return Contestant(forward, gradients, to_numpy)

        def wait(results: Any) -> Any:
            torch.cuda.synchronize()
            return results

        return Contestant(_recorded(forward), _recorded(gradients), to_numpy, wait, calls)

    return prepare


def _recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """What `run` has the GPU do, without what it takes to ask for it; recorded at the first call."""
    import torch

    @functools.cache
    def recording() -> tuple[Any, Any]:
        # As PyTorch's manual has it: what is recorded has run before, on another stream.
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return graph, results

    def replay() -> Any:
        graph, results = recording()
        graph.replay()
        return results

    return replay
