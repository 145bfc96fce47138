"""What the command line, the parity suite and the benchmarks know of an operator: its functions and its cases.

An operator's module in `pallas_kernels.ops` states it once, as `OPERATOR`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Case:
    """One call of an operator: `function(*arguments, **options)`.

    name: unique within the operator, made of the shape, e.g. "56x56 C96 K7 bfloat16".
    arguments: shapes and dtypes of the arrays.
    differentiable: which arguments have gradients.
    options: keyword arguments.
    draw: makes the arguments for one of `testing.TRIALS`, where not any numbers of their dtypes will do.
    """

    name: str
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0, 1)
    draw: Callable[[np.random.Generator, str], list[np.ndarray]] | None = None


@dataclass(frozen=True)
class Operator:
    """An operator with implementations to compare.

    function: takes a case's arrays, its options, and `implementation=`.
    reference: the definition; takes the same arrays and options, without `implementation`.
    parity_cases: small calls that cover every code path; what `check` and the test suite run.
    compile_cases: calls at the shapes of real models; given `full=False`, a subset that covers every code path.
    bench_cases: calls that are timed.
    baselines: other people's implementations of the same call, by name; those that can't run a case return None.
    rivals: other programs of XLA's for the same job than implementation="xla", by name: of a case, a function and its
      arguments. `compile --rivals` holds their cycles against ours.
    family: a name for this operator and its kin together.
    contestant: how it is timed, where that is not `function` of a case's arguments alone.
    tolerance: what timed results may be off by, relative to their root mean square; None goes by their dtype.
    """

    name: str
    function: Callable[..., jax.Array]
    reference: Callable[..., jax.Array]
    parity_cases: Callable[[], list[Case]]
    compile_cases: Callable[[bool], list[Case]]
    bench_cases: Callable[[], list[Case]]
    baselines: Mapping[str, Callable[[Case], Callable[..., Any] | None]] = field(default_factory=dict)
    rivals: Mapping[str, Callable[[Case], tuple[Callable[..., Any], tuple[Any, ...]]]] = field(
        default_factory=dict
    )
    family: str = ""
    contestant: Callable[[Case], Callable[..., Any]] | None = None
    tolerance: float | None = None


def operators() -> dict[str, Operator]:
    """Every operator of the library, by name."""
    import pallas_kernels.ops as ops

    modules = (
        importlib.import_module(f"{ops.__name__}.{m.name}") for m in pkgutil.iter_modules(ops.__path__)
    )
    return {m.OPERATOR.name: m.OPERATOR for m in modules if hasattr(m, "OPERATOR")}


def benchmarks() -> dict[str, Operator]:
    """Every operator, and what is made of several and timed as one."""
    from pallas_kernels.he._benchmark import BENCHMARK

    return {**operators(), BENCHMARK.name: BENCHMARK}


class NoSuchName(ValueError):
    """No case, or no baseline, has a name like the one asked for."""


def named(cases: Iterable[tuple[Operator, Case]], only: str | None) -> list[tuple[Operator, Case]]:
    """Those with `only` in the case's name, or all."""
    chosen = [(operator, case) for operator, case in cases if only is None or only in case.name]
    if not chosen:
        raise NoSuchName(f"no case has {only!r} in its name")
    return chosen
