"""Compile kernels for TPUs and NVIDIA GPUs on a machine that has neither, and say how good the result is.

The vendors' own compilers do it: libtpu for TPUs, Triton and ptxas for GPUs.
`pip install "pallas-kernels[aot]"` brings them.
"""

import importlib.metadata
import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pallas_kernels.aot._crew import Crew, Task, one_line
from pallas_kernels.aot._programs import Kernel, Target, lower
from pallas_kernels.gpu.targets import GPU, GPUS
from pallas_kernels.lowering import Work
from pallas_kernels.tpu.targets import TPU, TPUS

TARGETS: dict[str, Target] = {**TPUS, **GPUS}


@dataclass(frozen=True)
class KernelReport:
    """What a compiler made of one Pallas kernel.

    name: the kernel's.
    error: why it doesn't compile or doesn't fit; None if it does.
    work: what one call does, as its launcher stated it; None if it didn't.
    memory_bytes, memory_limit: VMEM of a TPU core, shared memory of a GPU block.
    code_bytes: size of the machine code.
    cycles: on a TPU, the compiler's estimate, as if each transfer had HBM to itself; None for the reason `no_cycles`.
      A few thousand are a call's first and last transfers.
    bundles: on a TPU where `cycles` is None, the instructions of the kernel's code, loops counted once.
    bound_cycles, bound_seconds: the least that arithmetic units and HBM allow for `work`; cycles of a TPU only.
    share: `bound_cycles` by the cycles estimated, or by those that HBM takes for all transfers if they are more.
    padded_share: the same for the operations issued, those on padding included.
    registers, spill_bytes: of a GPU thread; what doesn't fit in registers is spilled to its stack.
    """

    name: str
    error: str | None = None
    work: Work | None = None
    memory_bytes: int | None = None
    memory_limit: int | None = None
    code_bytes: int | None = None
    cycles: int | None = None
    no_cycles: str | None = None
    bundles: int | None = None
    bound_cycles: float | None = None
    bound_seconds: float | None = None
    share: float | None = None
    padded_share: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """What a target's compiler made of a function.

    compiled: whether it would run there, as far as a compiler can tell.
    error: why not.
    kernels: one for each Pallas kernel that the function needs on the target.
    around_cycles: on a TPU, XLA's estimate for all else in the program, 0 if there is nothing; None if it gives none.
    compiler: the package that compiled it, and its version.
    transfer_cycles: on a TPU, the least that HBM takes for arguments and results; XLA's estimate may be below it.
    """

    name: str
    target: str
    compiled: bool
    error: str | None
    kernels: tuple[KernelReport, ...]
    around_cycles: int | None = None
    compiler: str = ""
    transfer_cycles: float | None = None


class Job(NamedTuple):
    """One function to compile for one target. `name` is for the report."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    target: str
    name: str = ""


def compile(
    fn: Callable[..., Any], *args: Any, target: str, estimate: bool = True, timeout: float = 600.0
) -> Report:
    """Compile `fn` for `target`, without the device.

    The program goes through the vendor's compiler in a child process, because a bad kernel may take it down.
    For a TPU, each Pallas kernel is also compiled bare, with the compiler's estimate of its cycles.

    Args:
      fn: a function that `jax.jit` takes.
      args: arrays or `jax.ShapeDtypeStruct`s, or trees of them.
      target: a TPU ("v4", "v5e", "v5p", "v6e", "7x") or a GPU ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100").
      estimate: for a TPU, whether to compile the bare kernels too, for their cycles and VMEM. It takes most of
        the time; whether the program compiles, and fits, is known without.
      timeout: seconds that the compiler may take for one program.

    Returns:
      A `Report`. On a GPU target the Pallas kernels are compiled, but not what XLA makes of the rest.

    Raises:
      ValueError: the target is unknown.
      ModuleNotFoundError: the target's compiler isn't installed.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import aot, depthwise_conv
    >>> x = jax.ShapeDtypeStruct((1, 32, 32, 128), jnp.float32)
    >>> w = jax.ShapeDtypeStruct((7, 7, 128), jnp.float32)
    >>> aot.compile(depthwise_conv, x, w, target="v5e").compiled
    True
    """
    (report,) = compile_many([Job(fn, args, target)], estimate=estimate, timeout=timeout)
    return report


def compile_many(
    jobs: Iterable[Job], *, workers: int | None = None, estimate: bool = True, timeout: float = 600.0
) -> Iterator[Report]:
    """Compile jobs as `compile` does, `workers` at a time, and yield their reports in the order of the jobs.

    Args:
      jobs: taken one by one, a few ahead of the reports.
      workers: child processes at work at once; by default one for each CPU.
      estimate, timeout: as in `compile`.
    """
    workers = workers or os.cpu_count() or 1
    with Crew(workers, timeout) as crew:
        pending: deque[Callable[[], Report]] = deque()
        for job in jobs:
            pending.append(_start(job, crew, estimate))
            if len(pending) > 2 * workers:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()


def target_named(name: str) -> Target:
    """The target of that name, if this machine can compile for it.

    Raises:
      ValueError: the target is unknown.
      ModuleNotFoundError: its compiler isn't installed.
    """
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}, expected one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    for module in (_package(target), *(["flatbuffers"] if isinstance(target, TPU) else [])):
        if importlib.util.find_spec(module) is None:
            message = f'compiling for {name} needs {module}: pip install "pallas-kernels[aot]"'
            raise ModuleNotFoundError(message, name=module)
    return target


def _package(target: Target) -> str:
    return "libtpu" if isinstance(target, TPU) else "triton"


def _start(job: Job, crew: Crew, estimate: bool) -> Callable[[], Report]:
    """Lower a job here and hand it to the children; what comes back waits for its report."""
    target = target_named(job.target)
    package = _package(target)
    compiler = f"{package} {importlib.metadata.version(package)}"
    try:
        exported, kernels = lower(job.fn, job.args, target, estimate)
    except Exception as e:
        failed = Report(
            job.name, target.name, False, one_line(f"{type(e).__name__}: {e}"), (), None, compiler
        )
        return lambda: failed
    compiling = crew.submit("program", exported, partial(crew.ask, "tpu")) if exported else None
    measuring = [_measure(kernel, target, crew) for kernel in kernels]

    def wait() -> Report:
        program = compiling.result() if compiling else {}
        replies = [result() for result in measuring]
        if compiling and "error" not in program:
            replies = list(map(_excused, replies))
        reports = tuple(_judge(*pair, target) for pair in zip(kernels, replies, strict=True))
        errors = [program.get("error")] if compiling else [k.error for k in reports]
        error = next(filter(None, errors), None)
        around = program.get("around_cycles")
        transfer = exported["moved_bytes"] / _hbm_bytes_per_cycle(target) if exported else None
        return Report(job.name, target.name, error is None, error, reports, around, compiler, transfer)

    return wait


def _measure(kernel: Kernel, target: Target, crew: Crew) -> Callable[[], Task]:
    if kernel.task is None:
        return lambda: {"no_cycles": kernel.no_cycles}
    ask = (
        partial(crew.ask, "triton") if isinstance(target, GPU) else partial(_profile, kernel.no_cycles, crew)
    )
    return crew.submit("kernel", kernel.task, ask).result


def _profile(no_cycles: str | None, crew: Crew, task: Task) -> Task:
    """Estimated cycles if the profiler can, else bundles."""
    if no_cycles is None:
        reply = crew.ask("tpu-profile", task)
        if not reply.pop("died", False) and (reply.get("cycles") or "error" in reply):
            return reply
        no_cycles = f"cycles not estimated: {reply.get('error', 'the compiler gave none')}"
    return {"no_cycles": no_cycles, **crew.ask("tpu-bundles", task)}


def _excused(reply: Task) -> Task:
    """What was found out of a kernel whose program compiles: alone it may not, because XLA lays out its operands."""
    if "error" not in reply:
        return reply
    return {"no_cycles": f"cycles not estimated: alone the kernel doesn't compile: {reply['error']}"}


def _judge(kernel: Kernel, reply: Task, target: Target) -> KernelReport:
    """What a child found out, against the limits and the peaks of the target."""
    found = {k: v for k, v in reply.items() if k not in ("died", "around_cycles")}
    needed = reply.get("memory_bytes") or 0
    if "error" not in reply and needed > kernel.memory_limit:
        found["error"] = (
            f"{kernel.name} needs {needed} bytes of shared memory, {target.name} has {kernel.memory_limit}"
        )
    work, peak = kernel.work, kernel.peak_flops
    if work and peak and isinstance(target, TPU):
        found |= _roofline(work, peak, found.get("cycles"), target)
    elif work and peak:
        found["bound_seconds"] = max(work.flops / peak, work.bytes / target.hbm_bytes_per_second)
    return KernelReport(name=kernel.name, work=kernel.work, memory_limit=kernel.memory_limit, **found)


def _hbm_bytes_per_cycle(target: Target) -> float:
    assert isinstance(target, TPU)
    return target.cores * target.hbm_bytes_per_cycle


def _roofline(work: Work, peak_flops: float, cycles: int | None, tpu: TPU) -> dict[str, Any]:
    transfer = work.bytes / _hbm_bytes_per_cycle(tpu)
    bound = max(work.flops / peak_flops, transfer)
    bounds = {"bound_cycles": bound, "bound_seconds": bound / tpu.clock_hz}
    if cycles is None:
        return bounds
    if work.flops > peak_flops * cycles:
        flops = f"{work.flops / cycles:.0f} operations a cycle, and {tpu.name} does {peak_flops:.0f}"
        return {**bounds, "cycles": None, "no_cycles": f"estimate refused: {cycles} cycles would be {flops}"}
    spent = max(cycles, transfer)
    return {
        **bounds,
        "share": bound / spent,
        "padded_share": max(work.padded_flops / peak_flops, transfer) / spent,
    }
