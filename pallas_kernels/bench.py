"""Time operators side by side with other people's implementations.

All contestants of a case run in one process in turns, round after round, so that what else the machine does
hits all of them; ratios are of medians. Or each has a process of its own (`apart`), which no other's threads and
memory are in, and its peak memory is taken too. Nothing is timed that isn't right: results are compared with the
definition, and gradients with its derivative in a random direction, <gradient, t> = <cotangent, J t>.
"""

import csv
import ctypes
import gc
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import operators, testing
from pallas_kernels.baselines import Contestant, cpus, of_jax
from pallas_kernels.operators import Case, Operator
from pallas_kernels.progress import Progress

# Ours, as it is chosen for the device, which on a CPU is XLA's; and XLA's elsewhere.
OURS = "pallas-kernels"
IN_XLA = f"{OURS}, XLA"
PASSES = ("forward", "forward+backward")
# Seconds for one pass of a case, all contestants together, and the rounds that it gets at least and at most. A GPU's
# times are steadier.
BUDGET, MIN_ROUNDS, MAX_ROUNDS = 2.0, 7, 200
BUDGET_ON_GPU, MIN_ROUNDS_ON_GPU = 0.5, 5
# Seconds that the threads of a CPU's contestant may go on looking for work, which the next one would pay for; and
# milliseconds up to which the first call after another's, which may pay for gigabytes that were freed, isn't timed.
RESTLESS, LONG = 0.02, 1000.0
# Milliseconds of work that a GPU is given at once, and how many programs that may be.
QUEUED, MOST_QUEUED = 4.0, 16
# Of checked values, relative to their root mean square: rounding is far below, mistakes far above.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


class Timing(NamedTuple):
    """Times of one contestant in one pass of a case, in milliseconds.

    low, high: the quartiles. best: the minimum, which says most on a machine that others use too.
    ratio: how many times as long as ours it takes; ratio_low, ratio_high: the quartiles of single rounds.
    memory: the most that the process held during the pass beyond what it held before, arguments included in both, in
      megabytes; measured in a process of its own only, on Linux.
    note: why there are no times.
    """

    operator: str
    case: str
    what: str
    contestant: str
    median: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    best: float = float("nan")
    ratio: float = float("nan")
    ratio_low: float = float("nan")
    ratio_high: float = float("nan")
    rounds: int = 0
    memory: float = float("nan")
    note: str = ""


def run(
    names: list[str],
    *,
    out: str | None = None,
    only: str | None = None,
    against: Sequence[str] = (),
    apart: bool = False,
) -> int:
    """Time operators against their baselines; print a table.

    Args:
      names: of operators.
      out: a CSV file to write, case by case, and beside it a chart, as PNG.
      only: time the cases with this in their name.
      against: time ours and the baselines with one of these in their name; all of them if there is none.
      apart: give every contestant a process of its own, and take its peak memory.

    Returns:
      1 if a contestant gave wrong results, else 0.

    Raises:
      ImportError: a chart is wanted, and matplotlib is missing.
      ValueError: no case has `only` in its name, or no baseline one of `against`.

    Example:
      >>> from pallas_kernels import bench
      >>> bench.run(["depthwise_conv"], only="7x7 C768 K7")  # doctest: +SKIP
    """
    plot = _pyplot() if out else None
    known = operators.benchmarks()
    jobs = operators.named(((known[n], c) for n in names for c in known[n].bench_cases()), only)
    contestants = dict.fromkeys(c for operator, _ in jobs for c in _contestants(operator)[1:])
    for part in against:
        if not any(part in name for name in contestants):
            raise operators.NoSuchName(f"no baseline has {part!r} in its name: {', '.join(contestants)}")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    device = f"{jax.devices()[0].device_kind}, {cpus()} CPU{'s' * (cpus() > 1)}"
    print(f"jax {jax.__version__} on {device}; times in ms: median [quartiles]", flush=True)
    timings: list[Timing] = []
    # What can't be written is said before anything is timed.
    with open(out or os.devnull, "w", newline="") as file, Progress(len(jobs), "bench") as progress:
        writer = csv.writer(file)
        writer.writerow([*Timing._fields, "jax", "device"])
        for operator, case in jobs:
            time_one = time_case_apart if apart else time_case
            rows = list(time_one(operator, case, _contestants(operator, against)))
            timings += rows
            print("\n".join(map(_line, rows)), flush=True)
            writer.writerows([*row, jax.__version__, device] for row in rows)
            file.flush()
            progress.advance(f"{operator.name} {case.name}")
    if out:
        chart = Path(out).with_suffix(".png") if out.endswith(".csv") else Path(f"{out}.png")
        _draw(timings, chart, plot)
        print(f"wrote {out} and {chart}", file=sys.stderr)
    return int(any(t.note.startswith("wrong") for t in timings))


def _contestants(operator: Operator, against: Sequence[str] = ()) -> list[str]:
    """The names of ours and of the baselines that are asked for, which are all if `against` is empty."""
    in_xla = () if jax.default_backend() == "cpu" or operator.contestant else (IN_XLA,)
    known = (*in_xla, *operator.baselines)
    return [OURS, *(name for name in known if not against or any(part in name for part in against))]


def time_case_apart(operator: Operator, case: Case, names: Collection[str] | None = None) -> Iterator[Timing]:
    """The same as `time_case`, each contestant in a process of its own."""
    found: dict[str, list[Timing]] = {}
    for name in _contestants(operator) if names is None else names:
        # A new process for each: not forked, which threads don't survive, and not used again.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            found[name] = alone.submit(_time_alone, operator.name, case.name, name).result()
    for rows in zip(*found.values(), strict=True):
        for row in rows:
            yield row._replace(ratio=row.median / rows[0].median)


def _time_alone(operator: str, case: str, contestant: str) -> list[Timing]:
    known = operators.benchmarks()[operator]
    chosen = next(c for c in known.bench_cases() if c.name == case)
    return list(time_case(known, chosen, [contestant]))


def time_case(operator: Operator, case: Case, names: Collection[str] | None = None) -> Iterator[Timing]:
    """Check, then time, each contestant in each pass of a case, or those of some names."""
    arguments = testing.inputs_for(case)
    reference = jax.jit(partial(operator.reference, **case.options))
    aval = jax.eval_shape(reference, *case.arguments)
    cotangent = np.random.default_rng(1).normal(size=aval.shape).astype(aval.dtype)
    ours = operator.contestant or partial(of_jax, partial(operator.function, **case.options))
    contestants, notes = {}, {}
    in_xla = partial(of_jax, partial(operator.function, **case.options, implementation="xla"))
    known = {OURS: ours, IN_XLA: in_xla, **operator.baselines}
    for name in _contestants(operator) if names is None else names:
        prepare = known[name](case)
        if prepare is None:
            notes[name] = "can't run this"
        else:
            contestants[name] = prepare(arguments, cotangent)
    passes = PASSES if case.differentiable else PASSES[:1]
    # Before the check: what that allocates would count.
    peaks = {
        what: _peak_memory(lambda call=call, of=contestant: of.wait(getattr(of, call)()))
        for contestant in (contestants.values() if names is not None and len(names) == 1 else ())
        for what, call in zip(passes, ("forward", "gradients"), strict=False)
    }
    tolerance = operator.tolerance or TOLERANCE.get(case.arguments[0].dtype.name, 0.0)
    check = _checker(reference, case, arguments, cotangent, tolerance)
    for name, contestant in list(contestants.items()):
        calls = [contestant.forward, contestant.gradients][: len(passes)]
        if problem := next(filter(None, (check(contestant.to_numpy(call())) for call in calls)), ""):
            notes[name] = f"wrong: {problem}"
            del contestants[name]
    for what in passes:
        for timing in _time(contestants, what):
            memory = peaks.get(what, float("nan"))
            yield timing._replace(operator=operator.name, case=case.name, memory=memory)
        for name, note in notes.items():
            yield Timing(operator.name, case.name, what, name, note=note)


def _checker(
    reference: Callable[..., jax.Array],
    case: Case,
    arguments: list[np.ndarray],
    cotangent: np.ndarray,
    tolerance: float,
) -> Callable[[list[np.ndarray]], str]:
    generator = np.random.default_rng(2)
    directions = [
        generator.normal(size=arguments[i].shape).astype(arguments[i].dtype) for i in case.differentiable
    ]

    def directional(i: int, t: np.ndarray) -> float:
        of_one = lambda a: reference(*arguments[:i], a, *arguments[i + 1 :])  # noqa: E731
        _, derivative = jax.jvp(of_one, (jnp.asarray(arguments[i]),), (jnp.asarray(t),))
        return float(np.vdot(np.asarray(derivative, np.float64), cotangent.astype(np.float64)))

    truth = np.asarray(reference(*arguments), np.float64)
    slopes = [directional(i, t) for i, t in zip(case.differentiable, directions, strict=True)]

    def check(values: list[np.ndarray]) -> str:
        out, *gradients = (v.astype(np.float64) for v in values)
        error = np.abs(out - truth).max()
        if not error <= 10 * tolerance * np.sqrt(np.mean(truth**2)):
            return f"result differs by {error:.2e}"
        for i, gradient, t, slope in zip(case.differentiable, gradients, directions, slopes, strict=False):
            error = abs(float(np.vdot(gradient, t.astype(np.float64))) - slope)
            if not error <= 10 * tolerance * np.linalg.norm(gradient):
                return f"gradient of argument {i} differs by {error:.2e} along a random direction"
        return ""

    return check


def _peak_memory(call: Callable[[], Any]) -> float:
    """Megabytes that a call takes beyond what is resident already, the second time, which compiles nothing."""
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # What the first call left to the allocator would not count.
        Path("/proc/self/clear_refs").write_text("5")  # The peak is what is resident now.
        before = _resident("VmRSS")
        call()
        return (_resident("VmHWM") - before) / 1e3
    except (OSError, AttributeError):
        return float("nan")


def _resident(which: str) -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def _time(contestants: Mapping[str, Contestant], what: str) -> Iterator[Timing]:
    runs = {name: _timer(contestant, what) for name, contestant in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    on_cpu = jax.default_backend() == "cpu"
    budget, least = (BUDGET, MIN_ROUNDS) if on_cpu else (BUDGET_ON_GPU, MIN_ROUNDS_ON_GPU)
    start, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < MAX_ROUNDS and time.perf_counter() - start < budget):
        rounds += 1
        for name, call in runs.items():
            if on_cpu and len(runs) > 1:
                _settle(call, times[name][-1:])
            times[name].append(call())
    for name, spent in times.items():
        low, median, high = np.percentile(spent, [25, 50, 75]).tolist()
        ours = np.array(times.get(OURS, [float("nan")] * rounds))
        ratio_low, ratio_high = np.percentile(np.array(spent) / ours, [25, 75]).tolist()
        ratio = median / np.median(ours).item()
        yield Timing("", "", what, name, median, low, high, min(spent), ratio, ratio_low, ratio_high, rounds)


def _settle(call: Callable[[], float], before: list[float]) -> None:
    """Work until the threads of other contestants are asleep, but its own are not; or wait, where a call takes long."""
    end = time.perf_counter() + RESTLESS
    if before and before[0] > LONG:
        time.sleep(RESTLESS)
        return
    call()
    while time.perf_counter() < end:
        call()


def _timer(contestant: Contestant, what: str) -> Callable[[], float]:
    """A function that runs a contestant and returns the milliseconds of one call."""
    start, wait = contestant.forward if what == PASSES[0] else contestant.gradients, contestant.wait

    def milliseconds(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times - 1):
            start()
        wait(start())
        return (time.perf_counter() - begin) * 1e3 / times

    milliseconds(1)
    # While a GPU works on one, the next is on its way to it.
    times = 1 if contestant.calls == 1 else math.ceil(min(MOST_QUEUED, max(1, QUEUED / milliseconds(1))))
    return lambda: milliseconds(times) / contestant.calls


def _line(t: Timing) -> str:
    head = f"{t.operator}  {t.case:28}  {t.what:16}  "
    if t.note:
        return f"{head}{t.note:70}  {t.contestant}"
    spread = f"{t.median:9.3f} [{t.low:.3f}, {t.high:.3f}] best {t.best:.3f}"
    quartiles = "" if np.isnan(t.ratio_low) else f" [{t.ratio_low:.2f}, {t.ratio_high:.2f}]"
    ratio = "" if t.contestant == OURS else f"{t.ratio:.2f}x{quartiles}"
    memory = "" if np.isnan(t.memory) else f"{t.memory:8.1f} MB"
    return f"{head}{spread:46}{ratio:24}{memory}  {t.contestant}"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError('a chart needs matplotlib: pip install "pallas-kernels[demo]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    return plot


def _draw(timings: list[Timing], chart: Path, plot: Any) -> None:
    # One panel a pass, one group of bars a case: how many times as long as ours each baseline takes.
    names = [n for n in dict.fromkeys(t.contestant for t in timings if not t.note) if n != OURS]
    cases = list(dict.fromkeys((t.operator, t.case) for t in timings))
    figure, panels = plot.subplots(1, 2, figsize=(12, 1 + 0.35 * len(cases)), sharey=True, squeeze=False)
    for panel, what in zip(panels[0], PASSES, strict=True):
        for n, name in enumerate(names):
            bars = {
                (t.operator, t.case): t
                for t in timings
                if t.contestant == name and t.what == what and not t.note
            }
            height = 0.8 / len(names)
            places = [cases.index(key) + height * (n + 0.5) - 0.4 for key in bars]
            panel.barh(places, [t.ratio for t in bars.values()], height, label=name)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", title=what, xlabel=f"time / time of {OURS}", yticks=range(len(cases)))
        panel.set_yticklabels([case for _, case in cases])
    panels[0][0].invert_yaxis()
    if names:
        panels[0][-1].legend(fontsize="small")
    figure.savefig(chart, dpi=150, bbox_inches="tight")
    plot.close(figure)
