"""Compile kernels for TPUs and NVIDIA GPUs on a machine that has neither, and say how good the result is.

The vendors' own compilers do it: libtpu for TPUs, Triton and ptxas for GPUs.
`pip install "pallas-kernels[aot]"` brings them.
"""

import contextlib
import hashlib
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.mlir import ir
from jax.interpreters import mlir, partial_eval
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import _aot_worker
from pallas_kernels.gpu.targets import GPU, GPUS
from pallas_kernels.lowering import Work, described_kind
from pallas_kernels.tpu.targets import TPU, TPUS

Target = TPU | GPU
TARGETS: dict[str, Target] = {**TPUS, **GPUS}


@dataclass(frozen=True)
class KernelReport:
    """What a compiler made of one Pallas kernel.

    name: the kernel's.
    error: why it doesn't compile or doesn't fit; None if it does.
    work: what one call does, as its launcher stated it; None if it didn't.
    memory_bytes, memory_limit: VMEM of a TPU core, shared memory of a GPU block.
    code_bytes: size of the machine code.
    cycles: on a TPU, the compiler's estimate, waits for HBM left out; None for the reason `no_cycles`. A few
      thousand are a call's first and last transfers.
    bundles: on a TPU where `cycles` is None, the instructions of the kernel's code, loops counted once.
    bound_cycles, bound_seconds: on a TPU, the least that its arithmetic units and its HBM allow for `work`.
    share: `bound_cycles` by the cycles estimated, waits for HBM included.
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
    other_cycles: on a TPU, XLA's estimate for all else in the program; None if it gives none.
    """

    name: str
    target: str
    compiled: bool
    error: str | None
    kernels: tuple[KernelReport, ...]
    other_cycles: int | None = None


class Job(NamedTuple):
    """One function to compile for one target. `name` is for the report."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    target: str
    name: str = ""


def compile(fn: Callable[..., Any], *args: Any, target: str, timeout: float = 600.0) -> Report:
    """Compile `fn` for `target`, without the device.

    The program goes through the vendor's compiler in a child process, because a bad kernel may take it down.
    For a TPU, each Pallas kernel is also compiled bare: the compiler estimates the cycles of kernels, but not
    those of the copies that XLA puts around them.

    Args:
      fn: a function that `jax.jit` takes.
      args: arrays or `jax.ShapeDtypeStruct`s, or trees of them.
      target: a TPU ("v4", "v5e", "v5p", "v6e", "7x") or a GPU ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100").
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
    (report,) = compile_many([Job(fn, args, target)], timeout=timeout)
    return report


def compile_many(
    jobs: Iterable[Job], *, workers: int | None = None, timeout: float = 600.0
) -> Iterator[Report]:
    """Compile jobs as `compile` does, `workers` at a time, and yield their reports in the order of the jobs.

    Args:
      jobs: taken one by one, a few ahead of the reports.
      workers: child processes at work at once; by default one for each CPU.
      timeout: seconds that the compiler may take for one program.
    """
    workers = workers or os.cpu_count() or 1
    with _Crew(workers, timeout) as crew:
        pending: deque[Callable[[], Report]] = deque()
        for job in jobs:
            pending.append(_start(job, crew))
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
    for module in ("libtpu", "flatbuffers") if isinstance(target, TPU) else ("triton",):
        if importlib.util.find_spec(module) is None:
            message = f'compiling for {name} needs {module}: pip install "pallas-kernels[aot]"'
            raise ModuleNotFoundError(message, name=module)
    return target


def _start(job: Job, crew: "_Crew") -> Callable[[], Report]:
    """Lower a job here and hand it to the children; what comes back waits for its report."""
    target = target_named(job.target)
    try:
        exported, kernels = _lower(job, target)
    except Exception as e:
        failed = Report(job.name, target.name, False, _one_line(f"{type(e).__name__}: {e}"), ())
        return lambda: failed
    compiling = crew.submit("tpu", exported) if exported else None
    measuring = [_measure(kernel, target, crew) for kernel in kernels]

    def wait() -> Report:
        reports = tuple(_judge(k, f.result(), target) for k, f in zip(kernels, measuring, strict=True))
        program = compiling.result() if compiling else {}
        errors = [program.get("error")] if compiling else [k.error for k in reports]
        error = next(filter(None, errors), None)
        return Report(job.name, target.name, error is None, error, reports, program.get("other_cycles"))

    return wait


class _Kernel(NamedTuple):
    """A Pallas kernel of a function, lowered.

    no_cycles: why a static estimate of its cycles would be wrong.
    peak_flops: operations per cycle of the TPU unit that it runs on.
    task: what a child compiles.
    """

    name: str
    work: Work | None
    memory_limit: int
    no_cycles: str | None
    peak_flops: float | None
    task: "_Task"


_Task = dict[str, Any]


def _lower(job: Job, target: Target) -> tuple[_Task | None, list[_Kernel]]:
    """What children compile: the whole program (for a TPU), and each of the target's Pallas kernels in it."""
    leaves, tree = jax.tree.flatten(job.args)
    fn = jax.jit(lambda *leaves: jax.tree.leaves(job.fn(*jax.tree.unflatten(tree, leaves))))
    with _abstract_device(target):
        jaxpr = fn.trace(*leaves).jaxpr.jaxpr
        live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        calls = {id(call): call for call in _pallas_calls(live, target)}
        kernels = [_lower_kernel(call, target) for call in calls.values()]
        if isinstance(target, TPU):
            return _exported(fn, leaves, target), kernels
        fn.trace(*leaves).lower(lowering_platforms=("cuda",))  # for its errors
        return None, kernels


def _abstract_device(target: Target) -> contextlib.AbstractContextManager[Any]:
    """JAX asks which device it lowers for, and this machine's don't say."""
    platform, cores = ("tpu", target.cores) if isinstance(target, TPU) else ("gpu", None)
    try:
        device = AbstractDevice(device_kind=target.device_kind, num_cores=cores, platform=platform)
    except TypeError:
        # JAX 0.7.2 doesn't ask, but our own choices do.
        return described_kind(target.device_kind) if isinstance(target, TPU) else contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _pallas_calls(jaxpr: Jaxpr, target: Target) -> Iterator[JaxprEqn]:
    """The target's calls: `lax.platform_dependent` leaves those of every platform in the jaxpr."""
    wanted = pltpu.CompilerParams if isinstance(target, TPU) else pltriton.CompilerParams
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "pallas_call" and not eqn.params["interpret"]:
            params = eqn.params["compiler_params"]
            params = params.values() if isinstance(params, Mapping) else [params]  # JAX 0.7.2: by backend
            if any(isinstance(p, wanted) for p in params):
                yield eqn


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner_jaxprs(eqn):
            yield from _equations(inner)


def _inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _lower_kernel(call: JaxprEqn, target: Target) -> _Kernel:
    body = call.params["jaxpr"]
    bare = jax.jit(lambda *operands: call.primitive.bind(*operands, **call.params))
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars]
    on_tpu = isinstance(target, TPU)
    return _Kernel(
        name=body.debug_info.func_src_info.split(" at ")[0],
        work=_work(call),
        memory_limit=target.vmem_bytes if on_tpu else target.shared_memory_bytes,
        no_cycles=_unprofilable(body, target) if on_tpu else None,
        peak_flops=_peak_flops(body, target) if on_tpu else None,
        task=_exported(bare, operands, target) if on_tpu else _triton_source(bare, operands, target),
    )


def _exported(fn: Any, args: Sequence[Any], tpu: TPU) -> _Task:
    exported = export.export(fn, platforms=["tpu"])(*args)
    return {"exported": bytes(exported.serialize()), "topology": tpu.topology}


def _triton_source(fn: Any, args: Sequence[Any], gpu: GPU) -> _Task:
    """The Triton IR of the one kernel in `fn`, and the options that compile it."""
    # Pallas gives no public way to it: jaxlib's dialect reads back what the custom call holds.
    from jaxlib.triton import dialect

    configs = []

    def visit(op: Any) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            configs.append(op.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module = fn.trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    module.operation.walk(visit)
    (config,) = configs
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    return {
        "ttir": ir.Module.parse(config["ir"].value_bytes, context).operation.get_asm(),
        "options": {k: ir.IntegerAttr(config[k]).value for k in ("num_warps", "num_stages")},
        "compute_capability": gpu.compute_capability,
    }


def _work(call: JaxprEqn) -> Work | None:
    cost, stated = call.params["cost_estimate"], dict(call.params["metadata"] or {})
    if cost is None:
        return None
    # vmap multiplies the cost estimate, but leaves the metadata.
    batch = cost.flops / max(1, int(stated.get("flops", cost.flops)))
    padded, intermediate = (
        round(batch * int(stated.get(name, default)))
        for name, default in (("padded_flops", cost.flops), ("intermediate_bytes", 0))
    )
    return Work(cost.flops, cost.bytes_accessed, padded, intermediate)


def _peak_flops(body: Jaxpr, tpu: TPU) -> float:
    """Operations per cycle of the unit that does the kernel's work: the matrix unit, if there is a dot."""
    dots = [eqn for eqn in _equations(body) if eqn.primitive.name == "dot_general"]
    if not dots:
        return tpu.cores * tpu.vector_flops
    int8 = all(v.aval.dtype.itemsize == 1 for eqn in dots for v in eqn.invars)
    return tpu.cores * 2 * tpu.matrix_macs * (tpu.int8_rate if int8 else 1)


def _unprofilable(body: Jaxpr, tpu: TPU) -> str | None:
    """Why the static profile would be wrong, or would take the compiler down."""
    if not tpu.static_profile:
        return f"cycles not estimated: the compiler's profiler aborts on {tpu.name}"
    return _uncounted_loop(body, inside_loop=False)


def _uncounted_loop(jaxpr: Jaxpr, inside_loop: bool) -> str | None:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            return "cycles not estimated: the trip count of a loop is dynamic"
        loops = eqn.primitive.name == "scan" and eqn.params["unroll"] < eqn.params["length"]
        if loops and inside_loop:
            return "cycles not estimated: loops nest, and the profile drops the outer trip count"
        for inner in _inner_jaxprs(eqn):
            if reason := _uncounted_loop(inner, inside_loop or loops):
                return reason
    return None


def _measure(kernel: _Kernel, target: Target, crew: "_Crew") -> "Future[_Task]":
    if isinstance(target, GPU):
        return crew.submit("triton", kernel.task)
    return crew.pool.submit(_profile, kernel, crew)


def _profile(kernel: _Kernel, crew: "_Crew") -> _Task:
    """Estimated cycles if the profiler can, else bundles."""
    reason = kernel.no_cycles
    if reason is None:
        reply = crew.ask("tpu-profile", kernel.task)
        if not reply.pop("died", False) and (reply.get("cycles") or "error" in reply):
            return reply
        reason = f"cycles not estimated: {reply.get('error', 'the compiler gave none')}"
    return {"no_cycles": reason, **crew.ask("tpu-bundles", kernel.task)}


def _judge(kernel: _Kernel, reply: _Task, target: Target) -> KernelReport:
    """What a child found out, against the limits and the peaks of the target."""
    found = {k: v for k, v in reply.items() if k not in ("died", "other_cycles")}
    needed = reply.get("memory_bytes") or 0
    if "error" not in reply and needed > kernel.memory_limit:
        found["error"] = (
            f"{kernel.name} needs {needed} bytes of shared memory, {target.name} has {kernel.memory_limit}"
        )
    if isinstance(target, TPU) and kernel.work and kernel.peak_flops:
        found |= _roofline(kernel.work, kernel.peak_flops, found.get("cycles"), target)
    return KernelReport(name=kernel.name, work=kernel.work, memory_limit=kernel.memory_limit, **found)


def _roofline(work: Work, peak_flops: float, cycles: int | None, tpu: TPU) -> dict[str, Any]:
    transfer = work.bytes / (tpu.cores * tpu.hbm_bytes_per_second) * tpu.clock_hz
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


class _Crew:
    """Child processes that compile, and the threads that wait for them."""

    def __init__(self, workers: int, timeout: float):
        self.pool = ThreadPoolExecutor(workers)
        self._memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4 // workers
        self._timeout = timeout
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: list[_Child] = []
        self._asked: dict[bytes, Future[_Task]] = {}
        self._closed = False

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            children = (*self._idle, *self._busy)
            for child in children:
                child.kill()
        self.pool.shutdown(cancel_futures=True)
        for child in children:
            child.close()

    def submit(self, mode: str, task: _Task) -> "Future[_Task]":
        """What `ask` will reply. Calls of many sizes need the same GPU program, which is compiled once."""
        key = hashlib.sha256(pickle.dumps((mode, task))).digest()
        if key not in self._asked:
            self._asked[key] = self.pool.submit(self.ask, mode, task)
        return self._asked[key]

    def ask(self, mode: str, task: _Task) -> _Task:
        """The reply of a child of that mode; a crash or a time-out is a reply with an error."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the crew has gone home")
            child = next((c for c in self._idle if c.mode == mode), None)
            if child:
                self._idle.remove(child)
            else:
                child = _Child(mode, self._memory)
            self._busy.append(child)
        reply = child.ask(task, self._timeout)
        with self._lock:
            self._busy.remove(child)
            if child.alive:
                self._idle.append(child)
            else:
                child.close()
        return reply


class _Child:
    def __init__(self, mode: str, memory: int):
        self.mode = mode
        self.alive = True
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # Out of the reach of Ctrl-C: that is for the parent, which then kills its children.
        self._process = subprocess.Popen(
            [sys.executable, "-P", _aot_worker.__file__, mode, str(memory), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of the files of a dead child."""
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # closing flushes what nobody reads any more
                file.close()  # pyright: ignore[reportOptionalMemberAccess]

    def ask(self, task: _Task, timeout: float) -> _Task:
        assert self._process.stdin and self._process.stdout
        heard = os.fstat(self._log.fileno()).st_size
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self._process.kill()))
        timer.start()
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            reply = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.alive = False
            reply = {"error": f"the compiler died ({self._cause_of_death()})", "died": True}
        finally:
            timer.cancel()
        if late.is_set():
            reply = {"error": f"the compiler took more than {timeout:.0f} s", "died": True}
        elif "error" in reply:
            log = os.pread(self._log.fileno(), 2**24, heard).decode(errors="replace")
            reply["error"] = _one_line(": ".join([reply["error"], *_LAST_WORDS.findall(log)[-1:]]))
        return reply

    def _cause_of_death(self) -> str:
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


# What compilers write to standard error before they give up.
_LAST_WORDS = re.compile(
    r"(?:^F\d{4} [^]]*\] |(?=Check failed|LLVM ERROR|Assertion|Pipeline failed while executing))(.*)",
    re.MULTILINE,
)


def _one_line(text: str, limit: int = 300) -> str:
    text = re.sub(r" for %\S+ = .*?}\. ", ". ", text, flags=re.DOTALL)  # XLA quotes a whole instruction
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."
