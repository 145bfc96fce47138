"""Device-free compilation: what a report says of good kernels, and of each way in which one can be bad."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import aot, lowering
from pallas_kernels.aot import _crew, _worker
from pallas_kernels.aot._programs import lower

pytest.importorskip("libtpu")
pytest.importorskip("triton")
pytest.importorskip("flatbuffers")

X = jax.ShapeDtypeStruct((256, 128), jnp.float32)


def rowwise(
    body: Callable[..., None], *operands: Any, platform: Any, rows: int = 64, flops: int = 1, **kwargs: Any
) -> Any:
    """Blocks of rows of the operands in, a block of rows of the shape of the first one out."""
    x = operands[0]
    specs = [pl.BlockSpec((rows, a.shape[1]), lambda i: (i, 0)) for a in operands]
    return lowering.launch(
        body,
        *operands,
        platform=platform,
        name="rowwise",
        grid=(x.shape[0] // rows,),
        in_specs=specs,
        out_specs=specs[0],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        work=lowering.Work(flops, 2 * x.nbytes, 2 * flops),
        **kwargs,
    )


def power(x: jax.Array, *, trips: tuple[int, ...], platform: str, **kwargs: Any) -> jax.Array:
    """Multiply `x` by itself in nested loops."""

    def body(x_ref: Any, o_ref: Any) -> None:
        def loops(trips: tuple[int, ...], value: jax.Array) -> jax.Array:
            if not trips:
                return value * x_ref[...]
            return lax.fori_loop(0, trips[0], lambda _, v: loops(trips[1:], v), value)

        o_ref[...] = loops(trips, x_ref[...])

    return rowwise(body, x, platform=platform, **kwargs)


def power_everywhere(x: jax.Array) -> jax.Array:
    kernels = {p: partial(power, trips=(16,), platform=p) for p in ("tpu", "cuda")}
    return lax.platform_dependent(x, **kernels, default=lambda x: x**17)


def padded_power(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, [(0, -size % 128) for size in x.shape])
    return power_everywhere(padded)[: x.shape[0], : x.shape[1]]


def dynamic_power(x: jax.Array, n: jax.Array) -> jax.Array:
    def body(x_ref: Any, n_ref: Any, o_ref: Any) -> None:
        trips = n_ref[0, 0].astype(jnp.int32)
        o_ref[...] = lax.fori_loop(0, trips, lambda _, v: v * x_ref[...], x_ref[...])

    return rowwise(body, x, n, platform="tpu")


def increment(x: jax.Array, *, platform: str, **kwargs: Any) -> jax.Array:
    def body(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] + 1

    return rowwise(body, x, platform=platform, **kwargs)


def matmul(x: jax.Array, y: jax.Array, *, platform: Any, out: Any = jnp.float32) -> jax.Array:
    n = x.shape[0]

    def body(x_ref: Any, y_ref: Any, o_ref: Any) -> None:
        o_ref[...] = lax.dot(x_ref[...], y_ref[...], preferred_element_type=out)

    spec = pl.BlockSpec((n, n), lambda i: (0, 0))
    return lowering.launch(
        body,
        x,
        y,
        platform=platform,
        name="matmul",
        grid=(1,),
        in_specs=[spec, spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((n, n), out),
        work=lowering.Work(2 * n**3, x.nbytes + y.nbytes, 3 * n**3),
    )


def square(n: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((n, n), dtype),) * 2


ALL_TARGETS = ("v4", "v5e", "v5p", "v6e", "7x", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
JOBS = [
    *(aot.Job(power_everywhere, (X,), target, f"fine {target}") for target in ALL_TARGETS),
    aot.Job(jax.vmap(power_everywhere), (jax.ShapeDtypeStruct((3, *X.shape), X.dtype),), "v5e", "vmap"),
    aot.Job(padded_power, (jax.ShapeDtypeStruct((100, 100), jnp.float32),), "v5e", "padded by XLA"),
    aot.Job(partial(matmul, platform="tpu"), square(512, jnp.bfloat16), "v5e", "bf16 matmul"),
    aot.Job(partial(matmul, platform="tpu", out=jnp.int32), square(512, jnp.int8), "v5e", "int8 matmul"),
    aot.Job(partial(power, trips=(10, 100), platform="tpu"), (X,), "v5e", "nested loops"),
    aot.Job(dynamic_power, (X, X), "v5e", "dynamic loop"),
    aot.Job(partial(increment, platform="tpu", flops=10**9), (X,), "v5e", "above the peak"),
    aot.Job(
        partial(increment, platform="tpu", rows=4096),
        (jax.ShapeDtypeStruct((4096, 1024), jnp.float32),),
        "v5e",
        "VMEM overflow",
    ),
    aot.Job(partial(matmul, platform="cuda"), square(128, jnp.float32), "sm_86", "shared memory overflow"),
    aot.Job(partial(power, trips=(16,), platform="cuda", num_warps=1), (X,), "sm_90", "spill"),
    aot.Job(partial(matmul, platform="cuda", out=jnp.int32), square(64, jnp.int4), "sm_80", "int4 dot"),
    aot.Job(lambda x: x[None] @ {"not": "an array"}, (X,), "v5e", "doesn't trace"),
    aot.Job(jnp.sin, (X,), "v5e", "no kernel"),
    aot.Job(lambda x: (power_everywhere(x), x)[1], (X,), "v5e", "unused kernel"),
]


@pytest.fixture(scope="module")
def reports() -> dict[str, aot.Report]:
    return {report.name: report for report in aot.compile_many(JOBS)}


def test_reports_come_in_the_order_of_the_jobs(reports: dict[str, aot.Report]) -> None:
    assert [(r.name, r.target) for r in reports.values()] == [(j.name, j.target) for j in JOBS]


@pytest.mark.parametrize("target", ALL_TARGETS)
def test_one_kernel_for_the_target(reports: dict[str, aot.Report], target: str) -> None:
    report = reports[f"fine {target}"]
    assert report.compiled and report.error is None
    (kernel,) = report.kernels
    assert kernel.code_bytes and kernel.memory_limit and kernel.error is None
    if target.startswith("sm_"):
        assert kernel.registers and kernel.registers <= 255 and kernel.spill_bytes == 0
        assert kernel.bound_seconds == 2 * 4 * 256 * 128 / aot.GPUS[target].hbm_bytes_per_second
    elif target == "v4":
        assert kernel.cycles is None and kernel.bundles and "not estimated" in str(kernel.no_cycles)
    else:
        assert kernel.cycles and kernel.bound_cycles and kernel.memory_bytes and kernel.no_cycles is None


def test_without_estimates() -> None:
    fine, overflow = (next(job for job in JOBS if job.name == name) for name in ("fine v5e", "VMEM overflow"))
    fits, does_not = aot.compile_many([fine, overflow], estimate=False)
    assert fits.compiled and fits.kernels[0].work
    assert fits.kernels[0].cycles is None and fits.kernels[0].no_cycles == "cycles not asked for"
    assert not does_not.compiled and "exceeded scoped vmem limit" in str(does_not.error)


def test_vmap_multiplies_the_work(reports: dict[str, aot.Report]) -> None:
    (one,), (three,) = reports["fine v5e"].kernels, reports["vmap"].kernels
    assert one.work and three.work == lowering.Work(*(3 * n for n in one.work))


def test_xla_around_the_kernel_does_not_stop_the_profile(reports: dict[str, aot.Report]) -> None:
    report = reports["padded by XLA"]
    assert report.compiled and report.kernels[0].cycles and report.around_cycles


def test_a_program_of_one_kernel_has_nothing_around_it(reports: dict[str, aot.Report]) -> None:
    assert reports["fine v5e"].around_cycles == 0


@pytest.mark.parametrize(
    ("job", "macs_per_cycle"), [("bf16 matmul", 4 * 128**2), ("int8 matmul", 8 * 128**2)]
)
def test_shares(reports: dict[str, aot.Report], job: str, macs_per_cycle: int) -> None:
    (kernel,) = reports[job].kernels
    assert kernel.cycles and kernel.bound_cycles and kernel.share
    assert kernel.bound_cycles == 512**3 / macs_per_cycle
    assert kernel.share == kernel.bound_cycles / kernel.cycles
    assert kernel.padded_share == pytest.approx(1.5 * kernel.share)


@pytest.mark.parametrize(
    ("dtype", "peak"), [(jnp.float32, 66.9e12), (jnp.bfloat16, 989e12), (jnp.int8, 2 * 989e12)]
)
def test_gpus_multiply_matrices_of_few_bits_in_other_units(dtype: Any, peak: float) -> None:
    fn = partial(matmul, platform="cuda", out=jnp.int32 if dtype == jnp.int8 else jnp.float32)
    _, (kernel,) = lower(fn, square(64, dtype), aot.GPUS["sm_90"], estimate=False)
    assert kernel.peak_flops == peak


@pytest.mark.parametrize(
    ("job", "reason"),
    [("nested loops", "loops nest"), ("dynamic loop", "dynamic"), ("above the peak", "refused")],
)
def test_refused_estimates(reports: dict[str, aot.Report], job: str, reason: str) -> None:
    report = reports[job]
    (kernel,) = report.kernels
    assert report.compiled and kernel.cycles is None and kernel.share is None
    assert kernel.no_cycles and reason in kernel.no_cycles


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("VMEM overflow", "exceeded scoped vmem limit"),
        ("shared memory overflow", "needs 131072 bytes of shared memory, sm_86 has 101376"),
        ("int4 dot", "Pipeline failed while executing [`TritonGPUAccelerateMatmul`"),
        ("doesn't trace", "TypeError"),
    ],
)
def test_what_does_not_compile_says_why_in_one_line(
    reports: dict[str, aot.Report], job: str, reason: str
) -> None:
    report = reports[job]
    assert not report.compiled
    assert report.error and reason in report.error and "\n" not in report.error


def test_spills_are_seen(reports: dict[str, aot.Report]) -> None:
    (kernel,) = reports["spill"].kernels
    assert kernel.spill_bytes and kernel.spill_bytes > 0 and kernel.registers == 255


@pytest.mark.parametrize("job", ["no kernel", "unused kernel"])
def test_a_function_without_kernels(reports: dict[str, aot.Report], job: str) -> None:
    assert reports[job].compiled and reports[job].kernels == ()


STUB = """
import os, pickle, signal, sys, time
while True:
    task = pickle.load(sys.stdin.buffer)
    if sys.argv[1] == "tpu-profile":
        print("F0000 foo.cc:1] Check failed: x > 0", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if sys.argv[1] == "triton":
        time.sleep(60)
    pickle.dump({"bundles": 7} if sys.argv[1] == "tpu-bundles" else {}, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


@pytest.mark.sweep
def test_where_the_profiler_aborts_bundles_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    v4 = replace(aot.TPUS["v4"], static_profile=True)
    monkeypatch.setitem(aot.TARGETS, "v4", v4)
    report = aot.compile(power_everywhere, X, target="v4")
    (kernel,) = report.kernels
    assert report.compiled and kernel.cycles is None and kernel.bundles
    assert "the compiler died (SIGABRT): Static LLO profiling of" in str(kernel.no_cycles)


def test_compilers_leave_no_logs() -> None:
    logs = Path("/tmp/tpu_logs")  # whatever TMPDIR says
    before = set(logs.glob("*"))
    assert aot.compile(power_everywhere, X, target="v5e").compiled
    assert set(logs.glob("*")) == before


def test_crash_and_timeout(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "worker.py").write_text(STUB)
    monkeypatch.setattr(_worker, "__file__", str(tmp_path / "worker.py"))
    jobs = [aot.Job(power_everywhere, (X,), target) for target in ("v5e", "sm_80", "v5e")]
    crashed, late, again = aot.compile_many(jobs, workers=2, timeout=2)
    assert crashed == again
    assert crashed.compiled and crashed.kernels[0].bundles == 7
    assert crashed.kernels[0].no_cycles == (
        "cycles not estimated: the compiler died (SIGABRT): Check failed: x > 0"
    )
    assert not late.compiled and late.error == "the compiler took more than 2 s"


@pytest.mark.sweep
def test_leaving_early_ends_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    popen = _crew.subprocess.Popen

    def recorded(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        started.append(process.pid)
        return process

    monkeypatch.setattr(_crew.subprocess, "Popen", recorded)
    reports = aot.compile_many([aot.Job(power_everywhere, (X,), "v5e")] * 6, workers=1)
    next(reports)
    reports.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_parent_leaves_no_child() -> None:
    """A compiler may run for minutes, and nobody would end it any more."""
    parent = f"""
import os, signal, subprocess, sys
silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
child = subprocess.Popen([sys.executable, "-P", {_worker.__file__!r}, "triton", str(2**34), str(os.getpid())],
                         stdin=subprocess.PIPE, start_new_session=True, **silent)
os.set_inheritable(child.stdin.fileno(), True)
holder = subprocess.Popen(["sleep", "30"], close_fds=False, **silent)
print(child.pid, holder.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=30)
    child, holder = map(int, run.stdout.split())
    try:
        # The holder keeps the child's standard input open: it is not the end of its tasks that ends it.
        deadline = time.monotonic() + 10
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(child)
    finally:
        os.kill(holder, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A child gets less than the machine has; what is never touched costs nothing here."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hungry = f"lambda task: {{'code_bytes': len(bytearray({machine * 9 // 10}))}}"
    worker = Path(_worker.__file__).read_text()
    (tmp_path / "worker.py").write_text(worker.replace("functools.partial(_triton, directory=dump)", hungry))
    monkeypatch.setattr(_worker, "__file__", str(tmp_path / "worker.py"))
    assert aot.compile(power_everywhere, X, target="sm_80").error == "MemoryError:"


def test_what_jaxlib_cannot_read_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Path(_worker.__file__).read_text()
    unreadable = 'raise jax.errors.JaxRuntimeError("an async-update of two operands")'
    (tmp_path / "worker.py").write_text(worker.replace("text = compiled.as_text()", unreadable))
    monkeypatch.setattr(_worker, "__file__", str(tmp_path / "worker.py"))
    report = aot.compile(power_everywhere, X, target="v5e", estimate=False)
    assert report.compiled and report.around_cycles is None


@pytest.mark.sweep
@pytest.mark.parametrize(("target", "programs"), [("v5e", 4), ("sm_80", 2)])
def test_a_child_that_has_grown_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, programs: int
) -> None:
    """What a compiler has taken it never gives back."""
    worker = Path(_worker.__file__).read_text()
    (tmp_path / "worker.py").write_text(worker.replace("memory // 4", "0"))
    monkeypatch.setattr(_worker, "__file__", str(tmp_path / "worker.py"))
    children: list[Any] = []
    popen = _crew.subprocess.Popen
    monkeypatch.setattr(
        _crew.subprocess, "Popen", lambda *args, **kw: (children.append(popen(*args, **kw)), children[-1])[1]
    )
    calls = [(jax.ShapeDtypeStruct(X.shape, dtype),) for dtype in (jnp.float32, jnp.bfloat16)]
    reports = list(aot.compile_many([aot.Job(power_everywhere, x, target) for x in calls], workers=1))
    assert [r.error for r in reports] == [None, None]
    assert len(children) == programs and {child.returncode for child in children} == {0}


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_arguments_of_64_bits(dtype: str) -> None:
    with lowering.enable_x64():
        report = aot.compile(lambda x: x + 1, jax.ShapeDtypeStruct((8,), dtype), target="v5e", estimate=False)
    assert report.compiled, report.error


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="unknown target 'v5', expected one of v4, v5e"):
        aot.compile(power_everywhere, X, target="v5")


@pytest.mark.parametrize(("target", "module"), [("v5e", "libtpu"), ("sm_80", "triton")])
def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, target: str, module: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=rf'{target} needs {module}: pip install "pallas-kernels\[aot\]"'
    ):
        aot.compile(power_everywhere, X, target=target)


def test_a_kernel_that_compiles_only_within_its_program_has_not_failed():
    assert aot._excused({"error": "out of memory"}) == {
        "no_cycles": "cycles not estimated: alone the kernel doesn't compile: out of memory"
    }
    assert aot._excused({"cycles": 5}) == {"cycles": 5}


def test_triton_fuses_no_product_and_sum(tmp_path: Path) -> None:
    """XLA's doesn't, which is the one that compiles for users."""
    from triton.backends import nvidia

    def body(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] * x_ref[...] + 1

    function = partial(rowwise, body, platform="cuda", rows=8)
    (kernel,) = lower(function, (X,), aot.GPUS["sm_90"], estimate=False)[1]
    assert kernel.task is not None
    _worker._triton(kernel.task, str(tmp_path))
    cuobjdump = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    command = [cuobjdump, "-sass", str(tmp_path / "kernel.cubin")]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "FMUL" in sass and "FADD" in sass and "FFMA" not in sass
