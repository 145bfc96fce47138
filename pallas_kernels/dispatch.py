"""`implementation=None | "xla" | "pallas"`: one copy of the choice, for all operators.

`None` takes the Pallas kernel where the operator has one for the platform that a function is lowered *for* (not the
one it is traced on), and XLA elsewhere. A name given explicitly never falls back: it runs, or raises
`NotImplementedError` saying why.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.lowering import Platform, described_platform

Implementation = Literal["xla", "pallas"]


class Interpret(NamedTuple):
    """Run the kernels as `platform` launches them, interpreted on this machine's CPU.

    params: what `pallas_call(interpret=...)` takes: True, or a `pltpu.InterpretParams`.
    """

    platform: Platform
    params: Any = True


# A user context is part of jit's cache key, which a thread-local is not: a function traced outside of
# `testing.interpret()` is traced again inside of it.
interpreting = jax.make_user_context(None)


class Choice(NamedTuple):
    """How one call of an operator runs. Hashable: a static argument of `jit` and `custom_vjp`."""

    implementation: Implementation | None
    interpret: Interpret | None


def choose(implementation: str | None) -> Choice:
    """The choice of one call. Read once, in the public function: a backward pass runs as its forward pass did."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"`implementation` is None, 'xla' or 'pallas', got {implementation!r}")
    return Choice(implementation, interpreting.value)  # pyright: ignore[reportArgumentType]


# What an operator gives for a platform: its launcher, or the reason why it has none for these arguments.
Launcher = Callable[..., Any] | str


def run(choice: Choice, *args: Any, name: str, xla: Callable[..., Any], tpu: Launcher, cuda: Launcher) -> Any:
    """Call one of an operator's implementations on `args`.

    Args:
      choice: from `choose`.
      name: the operator's, for messages.
      xla: takes `args`.
      tpu, cuda: take `args` and `interpret=`; or the reason why Pallas can't run this call there.

    Raises:
      NotImplementedError: "pallas" was asked for and can't run: here if no platform can, else when the call is
        lowered for a platform that can't.
    """
    launchers: dict[str, Launcher] = {"tpu": tpu, "cuda": cuda}
    if choice.implementation == "xla":
        return xla(*args)
    if choice.implementation == "pallas" and choice.interpret is not None:
        launcher = launchers[choice.interpret.platform]
        if isinstance(launcher, str):
            raise NotImplementedError(
                f"{name}: implementation='pallas' on {choice.interpret.platform}: {launcher}"
            )
        return launcher(*args, interpret=choice.interpret.params)

    if (problem := _local_gpu_problem()) is not None:
        launchers["cuda"] = problem
    # A kernel may take seconds to trace: those of other platforms are left out where it is known which one it is for.
    described = described_platform()
    kernels = {
        platform: functools.partial(_guarded, name, launcher, xla)
        for platform, launcher in launchers.items()
        if not isinstance(launcher, str) and described in (None, platform)
    }
    if choice.implementation is None:
        return jax.lax.platform_dependent(*args, **kernels, default=xla) if kernels else xla(*args)

    reasons = "; ".join(f"on {p}: {r}" for p, r in launchers.items() if isinstance(r, str))
    if not kernels:
        raise NotImplementedError(f"{name}: implementation='pallas' can't run this call {reasons}")
    why = (
        f"{name}: implementation='pallas' runs on TPU (v4 and newer) and on NVIDIA GPUs (sm_80 and newer) only"
        + (f" ({reasons})" if reasons else "")
        + "; on a CPU, test it under `pallas_kernels.testing.interpret()`, or use implementation='xla'"
    )
    return jax.lax.platform_dependent(*args, **kernels, default=lambda *a: _refuse(why, "always", xla(*a)))


def _guarded(name: str, launcher: Callable[..., Any], xla: Callable[..., Any], *args: Any) -> Any:
    why = (
        f"{name}: a Pallas kernel can't be partitioned automatically (on a GPU it would gather its operands on every "
        "device). Call it inside jax.shard_map over the batch or channel axis, or use implementation='xla'"
    )
    if any(map(_has_explicit_axes, jax.tree.leaves(args))):
        return _refuse(why, "always", xla(*args))
    return launcher(*_refuse(why, "partitioned", args), interpret=False)


def _has_explicit_axes(x: Any) -> bool:
    """Whether an array's type says how it lies on the devices of a mesh, which `pallas_call` doesn't take."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return bool(getattr(mesh, "explicit_axes", ()))


def _local_gpu_problem() -> str | None:
    """Why this machine's GPU can't run Triton kernels; None if it can, or if it has none: then we lower for others."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return "Triton kernels need an NVIDIA GPU"
    if float(capability) < 8:
        return f"Triton needs compute capability 8.0, this GPU has {capability}"
    return None


def _refuse(why: str, when: Literal["always", "partitioned"], tree: Any) -> Any:
    """`tree` as it is, with an error of text `why` when a program that holds it is lowered."""
    return jax.tree.map(lambda x: _refusal.bind(x, why=why, when=when), tree)


_refusal = Primitive("pallas_kernels_refusal")
_refusal.def_abstract_eval(lambda x, *, why, when: x)
batching.defvectorized(_refusal)  # pyright: ignore[reportArgumentType]


def _lower_refusal(ctx: Any, x: Any, *, why: str, when: str) -> Any:
    if when == "always" or _is_partitioned(ctx.module_context.axis_context):
        raise NotImplementedError(why)
    return [x]


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA's partitioner will cut the program that is being lowered: several devices, not all axes manual."""
    if hasattr(axis_context, "manual_axes"):
        mesh = axis_context.mesh
        manual = axis_context.manual_axes | set(getattr(mesh, "manual_axes", ()))
        return mesh.size > 1 and bool(manual) and manual != frozenset(mesh.axis_names)
    return (getattr(axis_context, "num_devices", None) or 1) > 1


mlir.register_lowering(_refusal, _lower_refusal)
