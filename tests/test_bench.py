"""The benchmark times what is right, says what isn't, and writes what it found."""

import csv
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import baselines as baselines_of
from pallas_kernels import bench, operators
from pallas_kernels.baselines import Contestant, of_jax
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops._depthwise_conv_baselines import baselines

X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def scaled(x: jax.Array, y: jax.Array, *, by: float = 2.0) -> jax.Array:
    return by * x * jnp.sin(y)


@jax.custom_vjp
def half_a_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
    return scaled(x, y)


half_a_gradient.defvjp(lambda x, y: (scaled(x, y), y), lambda y, g: (2 * g * jnp.sin(y), jnp.zeros_like(g)))  # pyright: ignore

SCALED = Operator(
    name="scaled",
    function=lambda x, y, *, implementation=None, **options: scaled(x, y, **options),
    reference=scaled,
    parity_cases=lambda: [],
    compile_cases=lambda full: [],
    bench_cases=lambda: [Case("8x128", (X, X)), Case("8x128 by 3", (X, X), {"by": 3.0})],
    baselines={
        "the same": lambda case: of_jax(lambda x, y: scaled(x, y, **case.options), case),
        "wrong": lambda case: of_jax(lambda x, y: scaled(x, y, **case.options) * 1.01, case),
        "wrong gradient": lambda case: of_jax(half_a_gradient, case) if not case.options else None,
    },
)


@pytest.fixture(autouse=True)
def only_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "operators", lambda: {"scaled": SCALED})
    monkeypatch.setattr(bench, "BUDGET", 0.01)
    monkeypatch.setattr(bench, "RESTLESS", 0.0)


def test_what_is_wrong_is_not_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.run(["scaled"], out=str(tmp_path / "deep" / "times.csv"), only="by") == 1
    with (tmp_path / "deep" / "times.csv").open() as file:
        rows = {(row["what"], row["contestant"]): row for row in csv.DictReader(file)}
    assert {(row["jax"], row["device"].split(",")[0]) for row in rows.values()} == {(jax.__version__, "cpu")}
    assert len(rows) == 8
    assert (tmp_path / "deep" / "times.png").stat().st_size > 1000
    for what in bench.PASSES:
        assert float(rows[what, bench.OURS]["ratio"]) == 1
        same = rows[what, "the same"]
        assert 0 < float(same["best"]) <= float(same["low"]) <= float(same["median"]) <= float(same["high"])
        assert (
            float(same["ratio_low"]) <= float(same["ratio_high"]) and int(same["rounds"]) >= bench.MIN_ROUNDS
        )
        assert rows[what, "wrong"]["note"].startswith("wrong: result differs")
        assert rows[what, "wrong gradient"]["note"] == "can't run this"
    captured = capsys.readouterr()
    assert "; times in ms" in captured.out and "the same" in captured.out
    assert "bench" in captured.err and "bench" not in captured.out


def test_wrong_gradients_are_not_timed() -> None:
    rows = {row.contestant: row for row in bench.time_case(SCALED, SCALED.bench_cases()[0])}
    assert rows["wrong gradient"].note.startswith("wrong: gradient of argument 1")
    assert not rows["the same"].note


def test_all_right_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dataclasses.replace(SCALED, baselines={"the same": SCALED.baselines["the same"]})
    monkeypatch.setattr(operators, "operators", lambda: {"scaled": right})
    assert bench.run(["scaled"], only="by 3") == 0


def test_against_some_baselines_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(["scaled"], only="by 3", against=["same", "the"]) == 0
    assert {row.split("  ")[-1].strip() for row in capsys.readouterr().out.splitlines()[1:]} == {
        bench.OURS,
        "the same",
    }
    assert bench.run(["scaled"], only="by 3", against=["wrong"]) == 1
    with pytest.raises(operators.NoSuchName, match="no baseline has 'right' in its name: the same, wrong, "):
        bench.run(["scaled"], against=["same", "right"])


def test_a_contestant_and_a_tolerance_of_an_operator_s_own() -> None:
    def off(case: Case) -> Any:
        return of_jax(lambda x, y: scaled(x, y) * (1 + 2e-6), case)

    ours, same, *_ = bench.time_case(dataclasses.replace(SCALED, contestant=off), SCALED.bench_cases()[0])
    assert ours.contestant == bench.OURS and not ours.note
    strict = dataclasses.replace(SCALED, contestant=off, tolerance=1e-9)
    notes = {row.contestant: row.note for row in bench.time_case(strict, SCALED.bench_cases()[0])}
    assert notes[bench.OURS].startswith("wrong: result differs") and same.contestant == "the same"


def test_a_gpu_makes_many_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On arguments of their own, each waiting for the one before; and XLA is a contestant."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = [np.zeros(n, np.uint8) for n in (1 << 12, 42 << 20, 1 << 27)]
    assert [baselines_of.calls_at_once([a]) for a in shapes] == [baselines_of.MOST, 7, baselines_of.FEWEST]
    monkeypatch.setattr(baselines_of, "UNCACHED", 5 * 3 * X.size * 4)
    rows = {(r.what, r.contestant): r for r in bench.time_case(SCALED, SCALED.bench_cases()[0])}
    assert {name for _, name in rows} == {bench.OURS, f"{bench.OURS}, XLA", *SCALED.baselines}
    assert rows["forward", "wrong"].note and rows["forward", "wrong gradient"].note
    assert all(rows[what, "the same"].median > 0 for what in bench.PASSES)

    def function(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    x = np.ones(X.shape, X.dtype)
    prepared = of_jax(function, Case("one", (X,), differentiable=(0,)))([x], x)
    assert prepared.calls == 8 and len(prepared.forward()) == len(prepared.gradients()) == 8


def test_times_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def spend() -> None:
        clock[0] += 0.001

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    contestant = Contestant(spend, spend, lambda out: [], calls=4)
    for what in bench.PASSES:
        assert abs(bench._timer(contestant, what)() - 0.25) < 1e-9
    # In each pass one to warm up, one to see how many fill 4 ms, and those.
    assert abs(clock[0] - 2 * 0.006) < 1e-9


def test_threads_of_others_go_to_sleep_before_a_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made meanwhile, untimed, at least one, so that its own don't; but not if they take a second."""
    clock, slept = [0.0], []

    def call() -> float:
        clock[0] += 0.006
        return 6.0

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(bench, "RESTLESS", 0.02)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench.time, "sleep", sleep)
    bench._settle(call, [])
    bench._settle(call, [6.0])
    assert not slept and abs(clock[0] - 2 * 4 * 0.006) < 1e-9
    bench._settle(call, [2000.0])
    assert slept == [0.02] and abs(clock[0] - (2 * 4 * 0.006 + 0.02)) < 1e-9
    monkeypatch.setattr(bench, "RESTLESS", 0.001)
    bench._settle(call, [30.0])
    assert abs(clock[0] - (2 * 4 * 0.006 + 0.02 + 0.006)) < 1e-9


@pytest.mark.slow
def test_encrypted_products_are_right() -> None:
    from pallas_kernels.he._benchmark import BENCHMARK

    rows = {row.contestant: row for row in bench.time_case(BENCHMARK, BENCHMARK.bench_cases()[0])}
    assert len(rows) == 2 and rows[bench.OURS].median > 0
    assert not any(row.note.startswith("wrong") for row in rows.values())


def test_no_such_case() -> None:
    with pytest.raises(ValueError, match=r"no case has '9x9' in its name"):
        bench.run(["scaled"], only="9x9")


def test_a_chart_never_takes_the_place_of_the_times(tmp_path: Path) -> None:
    out = tmp_path / "times.png"
    bench.run(["scaled"], out=str(out), only="by")
    assert out.read_text().startswith(",".join(bench.Timing._fields))
    assert (tmp_path / "times.png.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "time_case", None)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        bench.run(["scaled"], out=str(tmp_path / "file" / "times.csv"))


def test_a_folder_is_no_file_for_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "time_case", None)
    with pytest.raises(IsADirectoryError):
        bench.run(["scaled"], out=str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_threads_are_as_many_as_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    torch = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(bench, "time_case", lambda *_: [])
    for count, shown in ((1, ", 1 CPU;"), (3, ", 3 CPUs;")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=count: set(range(count)))
        assert baselines_of.of_torch(scaled, SCALED.bench_cases()[0])
        torch.set_num_threads.assert_called_with(count)
        assert bench.run(["scaled"], only="by") == 0
        assert shown in capsys.readouterr().out


def test_a_missing_matplotlib_is_said_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pallas-kernels\[demo\]"'):
        bench.run(["scaled"], out="times.csv")


def test_depthwise_baselines_are_right() -> None:
    shapes = [(2, 9, 8, 6), (5, 3, 6)]
    case = Case("9x8", tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    geometry: Any = lambda case: ((2, 1), ((2, 2), (1, 1)), (1, 2))  # noqa: E731

    def reference(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (2, 2), (1, 1), (0, 0)))
        return sum(x[:, i : i + 9 : 2, 2 * j : 2 * j + 6] * w[i, j] for i in range(5) for j in range(3))  # pyright: ignore

    function = lambda x, w, *, implementation=None: reference(x, w)  # noqa: E731
    operator = dataclasses.replace(
        SCALED, function=function, reference=reference, baselines=baselines(geometry)
    )
    rows = list(bench.time_case(operator, case))
    assert {row.what for row in rows} == set(bench.PASSES) and len(rows) == 8
    absent = {"jax-triton", "torch (not installed)"}
    for row in rows:
        assert not row.note or (row.contestant in absent and row.note == "can't run this")


def test_depthwise_baselines_leave_out_what_they_can_t_run() -> None:
    one_dimensional = Case("9", tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 9, 6), (3, 6)]))
    assert all(of_case(one_dimensional) is None for of_case in baselines(lambda case: None).values())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_is_what_a_call_takes() -> None:
    assert 60 < bench._peak_memory(lambda: np.ones(1 << 23).sum()) < 90
    assert bench._peak_memory(lambda: None) < 5


def test_one_contestant_alone() -> None:
    rows = bench._time_alone("scaled", "8x128", "the same")
    assert [(r.what, r.contestant, r.note) for r in rows] == [(what, "the same", "") for what in bench.PASSES]
    assert all(r.memory < 100 and r.median > 0 for r in rows)


@pytest.mark.slow
def test_every_contestant_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    operator = operators.operators()["fft_conv"]
    rows = list(bench.time_case_apart(operator, operator.bench_cases()[0]))
    assert {r.contestant for r in rows} == {bench.OURS, *operator.baselines}
    for r in rows:
        if r.contestant == bench.OURS:
            assert not r.note and r.ratio == 1
        assert r.note == "can't run this" or r.median > 0
