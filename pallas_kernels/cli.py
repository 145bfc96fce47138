"""The command line: `pallas-kernels info | check | compile | bench | demo`."""

import csv
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from absl import flags

from pallas_kernels import aot, demos, testing
from pallas_kernels.operators import Case, NoSuchName, Operator, benchmarks, named, operators
from pallas_kernels.progress import Progress


class UsageError(Exception):
    """A mistake in the command line; the message says all."""


_BAD_PATHS = FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      argv: what follows the program's name; by default, this process's arguments.

    Returns:
      The exit status. 0: all is well. 1: something that was looked at is not. 2: the command line is wrong,
      a package is missing, or a device. 130: interrupted.

    >>> main(["compil"])
    2
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except (UsageError, NoSuchName, demos.NoPicture, flags.Error, *_BAD_PATHS) as e:
        status, message = 2, str(e)
    except ImportError as e:
        if "pip install" not in str(e):
            raise
        status, message = 2, str(e)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:
        # `| head` has seen enough. Python flushes once more as it exits: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"pallas-kernels: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("--help", "-h"):
        print(_help())
        return 0
    name, *rest = argv
    command = COMMANDS[_known("command", name, COMMANDS)]
    # Flags of its own, so that those of a host program stay as they are.
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_bool("help", False, "this text", short_name="h", flag_values=values)
    for define, flag, default, text in command.flags:
        define(flag, default, text, flag_values=values)
    _, *arguments = values([name, *rest])
    if values.help:
        print(_help_of(name))
        return 0
    _find_devices()
    return command.run(values, arguments)


def _find_devices() -> None:
    """Every command asks JAX for them sooner or later."""
    try:
        jax.devices()
    # JAX asserts it of a platform that it knows: an NVIDIA GPU where there is none.
    except (AssertionError, RuntimeError) as e:
        wanted = f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise UsageError(str(e) or wanted) from e


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UsageError(f"unknown {kind} {name!r}: {hint}")


def _operators(
    names: Sequence[str], known: Callable[[], Mapping[str, Operator]] | None = None
) -> list[Operator]:
    """Those of these names, or of these families."""
    every = (known or operators)()
    families = {o.family for o in every.values()} - {""}
    wanted = [_known("operator", name, [*every, *families]) for name in names or every]
    return [o for name in wanted for o in every.values() if name in (o.name, o.family)]


def _info(_: flags.FlagValues, arguments: list[str]) -> int:
    """Show versions, devices, and which implementation each operator takes here, and why.

    Example:
      pallas-kernels info
    """
    if arguments:
        raise UsageError(f"info takes no arguments, got {' '.join(arguments)}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in ("pallas-kernels", "jax", "jaxlib", "flax", "numpy", "libtpu", "triton", "jax-triton"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    print(
        "devices: " + ", ".join(f"{d.device_kind} ({d.platform}:{d.id})" for d in jax.devices()), end="\n\n"
    )
    _print_table([("operator", "takes", "because"), *((o.name, *_implementation(o)) for o in _operators([]))])
    return 0


def _implementation(operator: Operator) -> tuple[str, str]:
    """What an operator does here if nobody chooses, asked of the operator itself."""
    case = operator.compile_cases(False)[0]
    try:
        jax.jit(partial(operator.function, **case.options, implementation="pallas")).lower(*case.arguments)
    except NotImplementedError as e:
        return "xla", str(e).removeprefix(f"{operator.name}: ")
    return "pallas", f"this machine has a {jax.devices()[0].device_kind}"


def _check(_: flags.FlagValues, names: list[str]) -> int:
    """Compare operators and their gradients with the float64 reference, on this machine.

    Every implementation that runs here is compared. Errors are shown as shares of what the dtype explains:
    one above 1 fails, and the exit status is 1.

    Example:
      pallas-kernels check
      pallas-kernels check depthwise_conv
    """
    chosen = _operators(names)
    rows, bad = [_CHECK_HEADER], 0
    with Progress(sum(len(operator.parity_cases()) for operator in chosen), "check") as progress:
        for operator in chosen:
            for case, results in itertools.groupby(testing.check_operator(operator), lambda r: r.case):
                for result in results:
                    rows.append(_check_row(operator.name, result))
                    bad += not result.ok
                progress.advance(f"{operator.name} {case}")
    _print_table(rows)
    print(f"{len(rows) - 1 - bad} of {len(rows) - 1} are right", file=sys.stderr)
    return 1 if bad else 0


_CHECK_HEADER: tuple[str, ...] = ("operator", "case", "implementation", "forward", "gradient", "")


def _check_row(operator: str, result: testing.Result) -> tuple[str, ...]:
    errors = (f"{result.forward:.2f}", "-" if result.gradient is None else f"{result.gradient:.2f}")
    verdict = "" if result.ok else f"FAILED: {result.message}"
    return (operator, result.case, result.implementation, *errors, verdict)


def _compile(values: flags.FlagValues, names: list[str]) -> int:
    """Compile operators, forward and all gradients, for accelerators that this machine doesn't have.

    The exit status is 1 if one doesn't compile, doesn't fit, or spills registers. For TPUs, the table has
    the cycles that their compiler estimates, and the share of the roofline that those are: counting the true
    work, and counting the padded work; `around` are the cycles of XLA's copies and arithmetic beside the kernels.

    Example:
      pallas-kernels compile
      pallas-kernels compile depthwise_conv --target v5e,sm_90
      pallas-kernels compile --target all --full --out compiled.csv
      pallas-kernels compile blast_matmul --full --only N1024 --target v5e,v6e --rivals
    """
    targets = [_known("target", t, [*aot.TARGETS, "all"]) for t in values.target]
    targets = list(aot.TARGETS) if "all" in targets else targets
    for target in targets:
        aot.target_named(target)
    if not targets:
        raise UsageError("--target names none")
    cases = (
        (operator, case) for operator in _operators(names) for case in operator.compile_cases(values.full)
    )
    jobs = [
        job
        for operator, case in named(cases, values.only)
        for job in _jobs(operator, case, targets, values.rivals)
    ]
    reports, rows, transfers = [], _rows_of(values.out), {}
    done = {(call, target) for call, target, *_ in rows}
    jobs = [job for job in jobs if (job.name, job.target) not in done]
    with open(values.out or os.devnull, "a", newline="") as file, Progress(len(jobs), "compile") as progress:
        write = csv.writer(file).writerows
        write([] if file.tell() else [_COMPILED])
        for report in aot.compile_many(jobs, workers=values.workers, estimate=values.estimate):
            reports.append(report)
            transfers[report.name, report.target] = report.transfer_cycles or 0
            rows += (new := list(_compile_rows(report, rows, transfers)))
            write(new)
            file.flush()
            progress.advance(f"{report.name} {report.target}")
    if values.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    else:
        _print_table([_COMPILED, *rows])
    calls = {(call, target) for call, target, *_ in rows}
    bad = {
        (call, target)
        for call, target, *_, spill, note in rows
        if spill not in ("-", "0") or "FAILED" in note
    }
    print(f"{len(calls) - len(bad)} of {len(calls)} compile without a spill", file=sys.stderr)
    return 1 if bad else 0


def _rows_of(path: str | None) -> list[tuple[str, ...]]:
    """What an earlier run wrote to a file."""
    if path is None or not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as file:
        header, *rows = map(tuple, csv.reader(file)) if os.path.getsize(path) else [_COMPILED]
    if header != _COMPILED:
        raise UsageError(f"{path} is there, and is not of this command: {','.join(header)}")
    return rows


def _jobs(operator: Operator, case: Case, targets: Sequence[str], rivals: bool) -> Iterator[aot.Job]:
    programs = [(target, *program) for program in _passes(operator, case) for target in targets]
    if rivals:
        in_xla = dataclasses.replace(operator, function=partial(operator.function, implementation="xla"))
        others = [
            *((f"{name}{_BY}XLA", fn, arguments) for name, fn, arguments in _passes(in_xla, case)),
            *((f"forward{_BY}{name}", *of_case(case)) for name, of_case in operator.rivals.items()),
        ]
        estimating = [target for target in targets if target in aot.TPUS]
        programs += [(target, *other) for other in others for target in estimating]
    for target, name, fn, arguments in programs:
        yield aot.Job(fn, arguments, target, f"{operator.name} {case.name} {name}")


# Between the name of a pass and that of a rival.
_BY = ", by "


def _passes(operator: Operator, case: Case) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    forward = partial(operator.function, **case.options)
    yield "forward", forward, case.arguments

    def gradients(cotangent: Any, *arguments: Any) -> Any:
        def of_differentiable(*some: Any) -> Any:
            changed = dict(zip(case.differentiable, some, strict=True))
            return forward(*(changed.get(i, a) for i, a in enumerate(arguments)))

        return jax.vjp(of_differentiable, *(arguments[i] for i in case.differentiable))[1](cotangent)

    if case.differentiable:
        cotangent = jax.eval_shape(partial(operator.reference, **case.options), *case.arguments)
        yield "gradients", gradients, (cotangent, *case.arguments)


_COMPILED = (
    "call", "target", "compiler", "kernel", "cycles", "around", "true", "padded", "memory", "registers", "spill", "note"
)  # fmt: skip


def _compile_rows(
    report: aot.Report, rows: Sequence[tuple[str, ...]], transfers: Mapping[tuple[str, str], float]
) -> Iterator[tuple[str, ...]]:
    """One row a kernel; of a program without one, what XLA estimates, against our program among the `rows` so far.

    transfers: cycles that HBM takes for the arguments and results of a call on a target: neither can take fewer.
    """
    program, around = (report.name, report.target, report.compiler or "-"), _cell(report.around_cycles)
    for k in report.kernels:
        cells = map(_cell, (k.memory_bytes, k.registers, k.spill_bytes))
        shares = ("-" if share is None else f"{share:.0%}" for share in (k.share, k.padded_share))
        between = k.work.intermediate_bytes if k.work else 0
        known = [k.no_cycles, f"{between} bytes that only the next product reads" if between else None]
        note = f"FAILED: {k.error}" if k.error else "; ".join(filter(None, known))
        yield (*program, k.name, _cell(k.cycles), around, *shares, *cells, note)
        # Once a program: the columns add up.
        around = "-"
    if report.error and not any(k.error for k in report.kernels):
        yield (*program, *"--------", f"FAILED: {report.error}")
    elif not report.kernels:
        note, (call, rival, _) = "no Pallas kernel: XLA compiles it", report.name.partition(_BY)
        ours = [row for row in rows if row[:2] == (call, report.target)]
        kernels, other = ([row[i] for row in ours] for i in (4, 5))
        if rival and ours and report.around_cycles and "-" not in (*kernels, other[0]):
            # Of a call of an earlier run XLA's program for the same tells what it moves.
            same = (transfers.get((name, report.target), 0) for name in (call, f"{call}{_BY}XLA"))
            total = max(sum(map(int, (*kernels, other[0]))), *same)
            theirs = max(report.around_cycles, transfers.get((report.name, report.target), 0))
            note = f"{theirs / total:.2f} times ours"
        yield (*program, "-", "-", around, *"-----", note)


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


def _bench(values: flags.FlagValues, names: list[str]) -> int:
    """Time operators on this machine's device against XLA and other people's implementations.

    Example:
      pallas-kernels bench
      pallas-kernels bench depthwise_conv --only 56x56 --out times.csv
      pallas-kernels bench he
      pallas-kernels bench fft_conv --apart
      pallas-kernels bench depthwise_conv --against torch,lax
    """
    from pallas_kernels import bench

    chosen = [o.name for o in _operators(names, benchmarks)]
    return bench.run(chosen, out=values.out, only=values.only, against=values.against, apart=values.apart)


def _demo(values: flags.FlagValues, names: list[str]) -> int:
    """Run a demonstration, minutes on a CPU.

    The exit status is 1 if `vision` finds that merging changes a prediction, or a logit by more than 2e-5.

    Example:
      pallas-kernels demo vision
      pallas-kernels demo vision --out picture.png
      pallas-kernels demo encrypted --deep
    """
    if len(names) != 1:
        raise UsageError(f"demo takes one name: {', '.join(_demos())}")
    run = importlib.import_module(f"pallas_kernels.demos.{_known('demo', names[0], _demos())}").run
    options = {name: values[name].value for name in ("out", "deep") if values[name].value}
    if unknown := options.keys() - inspect.signature(run).parameters.keys():
        raise UsageError(f"demo {names[0]} takes no --{', --'.join(unknown)}")
    result = run(**options)
    print(result)
    if problem := getattr(result, "problem", ""):  # vision looks for one
        print(f"pallas-kernels: {problem}", file=sys.stderr)
    return 1 if problem else 0


def _demos() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(demos.__path__)]


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns side by side; the last one may be long."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, last in rows:
        print("  ".join([*map(str.ljust, cells, widths), last]).rstrip())


class Command(NamedTuple):
    """`run` takes the flags and the other arguments; its docstring is the command's help.

    flags: the function that defines it, name, default, help.
    """

    run: Callable[[flags.FlagValues, list[str]], int]
    arguments: str = ""
    flags: tuple[tuple[Callable[..., Any], str, Any, str], ...] = ()


COMMANDS = {
    "info": Command(_info),
    "check": Command(_check, "[OPERATOR...]"),
    "compile": Command(
        _compile,
        "[OPERATOR...]",
        (
            (flags.DEFINE_list, "target", ["v5e", "v6e", "sm_80", "sm_90"], "what to compile for, or `all`"),
            (
                flags.DEFINE_bool,
                "full",
                False,
                "all shapes of real models, not one for each path through the code",
            ),
            (flags.DEFINE_string, "only", None, "compile the cases with this in their name"),
            (flags.DEFINE_bool, "estimate", True, "estimate cycles on TPUs, which takes most of the time"),
            (
                flags.DEFINE_bool,
                "rivals",
                False,
                "compile XLA's programs for the same job too, and hold their cycles against ours, on TPUs",
            ),
            (
                flags.DEFINE_string,
                "out",
                None,
                "the CSV to write, call by call; calls that it has already are not compiled again",
            ),
            (flags.DEFINE_bool, "json", False, "print all that is known of every kernel, as JSON"),
            (
                partial(flags.DEFINE_integer, lower_bound=1),
                "workers",
                None,
                "compilers at work at once; by default one for each CPU",
            ),
        ),
    ),
    "bench": Command(
        _bench,
        "[OPERATOR...]",
        (
            (flags.DEFINE_string, "out", None, "the CSV to write, with a chart beside it"),
            (flags.DEFINE_string, "only", None, "time the cases with this in their name"),
            (flags.DEFINE_list, "against", [], "time beside baselines with one of these in their name only"),
            (flags.DEFINE_bool, "apart", False, "a process for each contestant, and its peak memory"),
        ),
    ),
    "demo": Command(
        _demo,
        "NAME",
        (
            (flags.DEFINE_string, "out", None, "the file to write"),
            (flags.DEFINE_bool, "deep", False, "encrypted: two layers with a square between them"),
        ),
    ),
}


def _help() -> str:
    lines = [f"  {name:9}{_docstring(command).splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["JAX/Pallas kernels for TPUs and NVIDIA GPUs.", "", "pallas-kernels COMMAND [--help]", "", *lines]
    )


def _help_of(name: str) -> str:
    command = COMMANDS[name]
    lines = [f"pallas-kernels {name} {command.arguments}".rstrip(), "", _docstring(command), ""]
    for define, flag, default, text in command.flags:
        value = "" if define is flags.DEFINE_bool else "=..."
        shown = f" (default: {','.join(default)})" if default and isinstance(default, list) else ""
        shown = f" (default; --no{flag} turns it off)" if default is True else shown
        lines.append(f"  --{flag + value:14}{text}{shown}")
    return "\n".join(lines).rstrip()


def _docstring(command: Command) -> str:
    return inspect.getdoc(command.run) or ""


if __name__ == "__main__":
    sys.exit(main())
