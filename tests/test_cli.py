"""The command line: what it prints, where, and with which exit status."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental import pallas as pl

import pallas_kernels
from pallas_kernels import aot, cli, dispatch, lowering
from pallas_kernels.demos import vision
from pallas_kernels.operators import Case, Operator

X = jax.ShapeDtypeStruct((16, 128), jnp.float32)


def scale(x: jax.Array, *, platform: Any, interpret: Any = False) -> jax.Array:
    def body(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = 2 * x_ref[...]

    return lowering.launch(
        body,
        x,
        platform=platform,
        name="double",
        grid=(1,),
        in_specs=[pl.BlockSpec(x.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec(x.shape, lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        work=lowering.Work(x.size, 2 * x.nbytes, x.size),
        interpret=interpret,
    )


def dispatched(x: jax.Array, choice: dispatch.Choice) -> jax.Array:
    launchers = {p: partial(scale, platform=p) for p in ("tpu", "cuda")}
    return dispatch.run(choice, x, name="double", xla=lambda x: 2 * x, **launchers)


differentiable = jax.custom_vjp(dispatched, nondiff_argnums=(1,))
differentiable.defvjp(
    lambda x, choice: (dispatched(x, choice), None), lambda choice, _, g: (dispatched(g, choice),)
)


def double(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    return differentiable(x, dispatch.choose(implementation))


DOUBLE = Operator(
    name="double",
    function=double,
    reference=lambda x: 2 * x,
    parity_cases=lambda: [Case("16x128", (X,), differentiable=(0,))],
    compile_cases=lambda full: [Case("16x128", (X,), differentiable=(0,))],
    bench_cases=lambda: [],
)


@pytest.fixture(autouse=True)
def only_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "operators", lambda: {"double": DOUBLE})


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name}" in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_examples_and_flags(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert cli.main(["help", name]) == 0
    assert capsys.readouterr().out == out
    assert f"\nExample:\n  pallas-kernels {name}" in out
    assert all(f"\n  --{flag}" in out for _, flag, _, _ in cli.COMMANDS[name].flags)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compil"], "unknown command 'compil': did you mean compile?"),
        (["compile", "dubble"], "unknown operator 'dubble': did you mean double?"),
        (["check", "convolution"], "unknown operator 'convolution': there are double"),
        (["compile", "--target", "v5"], "unknown target 'v5': did you mean v5p or v5e?"),
        (["compile", "--targt=v5e"], "Unknown command line flag 'targt'. Did you mean: target ?"),
        (["compile", "--workers=two"], "flag --workers=two: invalid literal for int() with base 10: 'two'"),
        (["compile", "--workers=0"], "flag --workers=0: 0 is not a positive integer"),
        (["demo", "visio"], "unknown demo 'visio': did you mean vision?"),
        (["demo"], "demo takes one name: compress, encrypted, sequence, vision"),
        (["info", "double"], "info takes no arguments, got double"),
    ],
)
def test_mistakes_take_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"pallas-kernels: {message}\n"


def test_help_says_how_to_turn_off_what_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--help"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "turns it off" in line)
    assert line.startswith("  --estimate ") and line.endswith(" (default; --noestimate turns it off)")


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "JAX finds no device for JAX_PLATFORMS=cuda"),
        (RuntimeError("Unable to initialize\n'foo'"), "Unable to initialize 'foo'"),
    ],
)
def test_missing_devices_take_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    message: str,
) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    assert cli.main([name]) == 2
    assert capsys.readouterr() == ("", f"pallas-kernels: {message}\n")


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "nowhere"])
def test_platforms_that_jax_does_not_find(platforms: str) -> None:
    where = os.environ | {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pallas_kernels.cli", "info"]
    done = subprocess.run(command, env=where, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pallas-kernels: ") and platforms in last and "Traceback" not in done.stderr


def test_missing_compiler_takes_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compile", "--target=v5e"]) == 2
    assert capsys.readouterr().err == (
        'pallas-kernels: compiling for v5e needs libtpu: pip install "pallas-kernels[aot]"\n'
    )


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(aot, "compile_many", interrupted)
    assert cli.main(["compile"]) == 130
    assert capsys.readouterr().err == "pallas-kernels: interrupted\n"


def test_flags_of_a_host_program_are_left_alone() -> None:
    before = set(flags.FLAGS)
    assert cli.main(["compile", "--help"]) == 0
    assert set(flags.FLAGS) == before


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m pallas_kernels.cli info | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_info_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"\njax {jax.__version__}\n" in out
    assert "\ndouble    xla    implementation='pallas' runs on TPU" in out


def test_check_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    captured = capsys.readouterr()
    header, *rows = captured.out.splitlines()
    assert header.split() == ["operator", "case", "implementation", "forward", "gradient"]
    assert [row.split()[:3] for row in rows] == [
        ["double", "16x128", "xla"],
        ["double", "16x128", "pallas"],
        ["double", "16x128", "pallas"],
    ]
    assert captured.err.endswith("3 of 3 are right\n")


def test_check_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "operators", lambda: {"double": replace(DOUBLE, reference=lambda x: 2.1 * x)})
    assert cli.main(["check", "double"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FAILED: normal: ") == 3
    assert captured.err.endswith("0 of 3 are right\n")


def test_bench_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    bench = SimpleNamespace(run=lambda names, **options: calls.append((names, options)) or 3)
    monkeypatch.setattr(pallas_kernels, "bench", bench, raising=False)
    monkeypatch.setattr(cli, "benchmarks", lambda: {"double": DOUBLE})
    assert cli.main(["bench", "--out=times.csv", "double", "--only", "56", "--apart", "--against=a,b"]) == 3
    assert cli.main(["bench"]) == 3
    assert calls == [
        (["double"], {"out": "times.csv", "only": "56", "against": ["a", "b"], "apart": True}),
        (["double"], {"out": None, "only": None, "against": [], "apart": False}),
    ]


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "run", lambda out="vision.png": f"a picture in {out}")
    assert cli.main(["demo", "vision"]) == 0
    assert cli.main(["demo", "vision", "--out", "x.png"]) == 0
    assert capsys.readouterr().out == "a picture in vision.png\na picture in x.png\n"


@pytest.mark.parametrize(
    ("gap", "changed", "status", "message"),
    [
        (2e-5, 0, 0, ""),
        (3e-5, 0, 1, "merging moved a logit by 3.0e-05, where 2e-05 may be, and changed 0 predictions"),
        (float("nan"), 0, 1, "merging moved a logit by nan, where 2e-05 may be, and changed 0 predictions"),
        (1e-6, 2, 1, "merging moved a logit by 1.0e-06, where 2e-05 may be, and changed 2 predictions"),
    ],
)
def test_a_demo_that_does_not_keep_its_promise_fails(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gap: float,
    changed: int,
    status: int,
    message: str,
) -> None:
    result = vision.Result(0.5, 0.5, gap, changed, 2, 1, 0.5, 0.5, 1.0, Path("x.png"))
    monkeypatch.setattr(vision, "run", lambda: result)
    assert cli.main(["demo", "vision"]) == status
    assert capsys.readouterr() == (f"{result}\n", f"pallas-kernels: {message}\n" if message else "")


def test_demo_without_its_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "vision"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "pallas-kernels[demo]"' in line


def test_compile_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "double", "--target", "v5e,sm_80"]) == 0
    captured = capsys.readouterr()
    header, *rows = captured.out.splitlines()
    assert header.startswith("call") and header.endswith("registers  spill  note")
    assert [row.split()[:7] for row in rows] == [
        ["double", "16x128", pass_, target, compiler, version(compiler), "double"]
        for pass_ in ("forward", "gradients")
        for target, compiler in (("v5e", "libtpu"), ("sm_80", "triton"))
    ]
    assert captured.err.endswith("4 of 4 compile without a spill\n")


def test_compile_goes_on_where_it_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "compiled.csv"
    arguments = ["compile", "double", "--target=sm_80", "--only=16x128", f"--out={out}"]

    def interrupted(jobs: list[aot.Job], **_: Any) -> Iterator[aot.Report]:
        yield aot.Report(jobs[0].name, "sm_80", True, None, (aot.KernelReport("double", spill_bytes=8),))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(aot, "compile_many", interrupted)
        assert cli.main(arguments) == 130
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.endswith("1 of 2 compile without a spill\n")
    with out.open() as file:
        rows = [(row["call"], row["spill"]) for row in csv.DictReader(file)]
    assert rows == [("double 16x128 forward", "8"), ("double 16x128 gradients", "0")]


def test_compile_leaves_other_files_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert cli.main(["compile", "double", "--target=sm_80", f"--out={tmp_path / 'mine.csv'}"]) == 2
    assert "is not of this command: a,b" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"


def test_compile_fills_an_empty_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (out := tmp_path / "compiled.csv").touch()
    assert cli.main(["compile", "double", "--target=sm_80", "--only=16x128", f"--out={out}"]) == 0
    assert out.read_text().startswith("call,target") and len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--target="], "--target names none"),
        (["compile", "--target=sm_80", "--out={}/file/x.csv"], "Not a directory"),
        (["compile", "--target=sm_80", "--out={}/file"], "is not of this command"),
        (["compile", "--only=9x9"], "no case has '9x9' in its name"),
        (["bench", "--only=9x9"], "no case has '9x9' in its name"),
    ],
)
def test_mistakes_take_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"\xff\x00\n")
    assert cli.main([a.format(tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_family_stands_for_its_operators(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {n: replace(DOUBLE, name=n, family=f) for n, f in (("a", "twins"), ("b", ""), ("c", "twins"))}
    monkeypatch.setattr(cli, "operators", lambda: every)
    assert [o.name for o in cli._operators(["twins"])] == ["a", "c"]
    assert [o.name for o in cli._operators(["b", "twins"])] == ["b", "a", "c"]
    assert cli.main(["check", "twin"]) == 2
    assert "did you mean twins?" in capsys.readouterr().err


def test_compile_of_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "double", "--only=17"]) == 2
    assert capsys.readouterr().err == "pallas-kernels: no case has '17' in its name\n"


def test_compile_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--json", "--target=sm_90"]) == 0
    forward, gradients = json.loads(capsys.readouterr().out)
    assert forward["name"] == "double 16x128 forward" and forward["compiled"] and forward["target"] == "sm_90"
    assert gradients["kernels"][0]["registers"] > 0


def test_compile_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spills = aot.KernelReport("double", spill_bytes=8)
    reports = [
        aot.Report("a", "sm_90", True, None, (aot.KernelReport("double", spill_bytes=0),)),
        aot.Report("b", "sm_90", True, None, (spills,)),
        aot.Report("c", "sm_90", False, "it is bad", ()),
        aot.Report("d", "sm_90", True, None, ()),
    ]
    monkeypatch.setattr(aot, "compile_many", lambda jobs, **options: reports)
    assert cli.main(["compile", "--target=sm_90"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: it is bad" in captured.out and "no Pallas kernel" in captured.out
    assert captured.err.endswith("2 of 4 compile without a spill\n")


@pytest.mark.parametrize("resumed", [False, True])
def test_rivals_take_no_fewer_cycles_than_hbm(resumed: bool) -> None:
    """Nor do calls that an earlier run compiled."""

    def rows_of(name: str, kernels: tuple[aot.KernelReport, ...], around: int, rows: list[tuple[str, ...]]):
        report = aot.Report(name, "v5e", True, None, kernels, around)
        transfers = {("f, by XLA", "v5e"): 300, ("f, by XLA, dense", "v5e"): 900}
        return list(cli._compile_rows(report, rows, transfers | ({} if resumed else {("f", "v5e"): 300})))

    ours = rows_of("f", (aot.KernelReport("kernel", cycles=200),), 0, [])
    for around, ratio in ((600, "3.00"), (1200, "4.00")):
        (row,) = rows_of("f, by XLA, dense", (), around, ours)
        assert row[-1] == f"{ratio} times ours"
