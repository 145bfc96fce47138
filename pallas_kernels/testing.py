"""The parity rule: what it takes for an implementation of an operator to be right.

Truth is the definition in float64. The error of the definition in the arguments' own dtype is what rounding
explains; an implementation may have twice that, its gradients three times, and a little for luck, which
counts in small results:

    rms(error) <= factor rms(error of the definition) + eps (1 + 8 / sqrt(size)) rms(truth) / 4
    rms(error) <= RELATIVE_RMS[dtype] rms(truth)
    max|error| <= factor max|error of the definition| + eps (1 + 8 / sqrt(size)) max|truth|

In float64, where the truth is no better than the definition, only the second line counts, and its like for
the maximum. Integers are equal, bit for bit. Shape, dtype and weak type are the definition's, nothing is NaN
where the truth is finite, the arguments are left alone, and three runs give the same bits.

Tests of kernels of one's own can use `assert_parity`, `assert_sensitive` and `interpret`.
"""

import contextlib
import dataclasses
import functools
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.lowering import Platform, enable_x64
from pallas_kernels.operators import Case, Operator

TRIALS = ("normal", "offset", "large", "tiny")
FORWARD_FACTOR, GRADIENT_FACTOR = 2, 3
# Room for sums of some thousand terms in float32; about 2.5 roundings in the 16-bit types.
RELATIVE_RMS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
RUNS = 3

Function = Callable[..., jax.Array]
Arrays = Sequence[Any]


class Parity(NamedTuple):
    """How an implementation compares.

    forward, gradient: the largest error, as a share of its bound: up to 1 is right. No gradient: None.
    problems: what is wrong, a line each.
    """

    forward: float
    gradient: float | None
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """One case of one implementation of an operator.

    forward, gradient: the largest error of all trials, as a share of its bound. No gradient: None.
    message: what is wrong.
    """

    case: str
    implementation: str
    ok: bool
    forward: float
    gradient: float | None
    message: str


class _Expected(NamedTuple):
    """What the definition says of some arguments: its result, then the gradients, each three times.

    truth: in float64. plain: in the arguments' dtype. avals: its type.
    """

    truth: list[np.ndarray]
    plain: list[np.ndarray]
    avals: list[Any]


def assert_parity(
    candidate: Function,
    reference: Function,
    arguments: Arrays,
    *,
    differentiable: Sequence[int] | None = None,
) -> Parity:
    """Check that `candidate` computes what `reference` defines, and so do its gradients.

    Args:
      candidate: what to check; called as `candidate(*arguments)`, and differentiated with `jax.vjp`.
      reference: the definition, in jnp; it must follow the dtype of its arguments up to float64.
      arguments: arrays; see `inputs_for` for good ones.
      differentiable: the arguments that have gradients; by default, all of a floating type.

    Returns:
      The errors as shares of their bounds.

    Raises:
      AssertionError: with all that is wrong, and for errors their maximum, root mean square and worst place.

    Example:
      >>> import numpy as np
      >>> from pallas_kernels import testing
      >>> x = np.random.default_rng(0).normal(size=(4, 64)).astype("float32")
      >>> parity = testing.assert_parity(lambda x: jax.nn.relu(x) - jax.nn.relu(-x), lambda x: x, [x])
      >>> parity.forward <= 1 and parity.gradient <= 1
      True
    """
    chosen = _differentiable(arguments, differentiable)
    parity = _compare(candidate, arguments, chosen, _expect(reference, arguments, chosen))
    if parity.problems:
        raise AssertionError("\n".join(parity.problems))
    return parity


def assert_sensitive(reference: Function, arguments: Arrays) -> None:
    """Check that these arguments would expose a wrong implementation.

    The rule must refuse zeros, the mean of the truth, a copy of the first argument, and the definition of
    arguments whose second half (along the first axis) is zero: what a kernel sees that stops too early.

    Raises:
      AssertionError: with what would have passed.
    """
    expected = _expect(reference, arguments, ())
    impostors = _impostors(reference, arguments, expected)
    passed = [name for name, value in impostors if not _problem(value, expected, 0)[1]]
    if passed:
        raise AssertionError(f"these arguments can't tell the operator from: {', '.join(passed)}")


def inputs_for(case: Case, trial: str | int = "normal") -> list[np.ndarray]:
    """Signed random arguments for a case, the same in every process, and others for every case and trial.

    Args:
      trial: "normal"; "offset": of mean 3; "large" and "tiny": the first argument scaled by 1000 and 1/1000
        (in float16 by 50 and 1/50); or the index of one of these. Integers take all values of their dtype.
        A case that draws its arguments itself makes of these names what suits it.
    """
    trial = TRIALS[trial] if isinstance(trial, int) else trial

    def generator_for(key: Any) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{case.name} {trial} {key}".encode()))

    if case.draw:
        return case.draw(generator_for("all"), trial)

    def draw(i: int, struct: jax.ShapeDtypeStruct) -> np.ndarray:
        generator = generator_for(i)
        if jnp.issubdtype(struct.dtype, jnp.integer):
            info = jnp.iinfo(struct.dtype)
            return generator.integers(info.min, info.max, struct.shape, struct.dtype, endpoint=True)
        values = generator.normal(3.0 if trial == "offset" else 0.0, size=struct.shape)
        scale = 50.0 if struct.dtype == jnp.float16 else 1000.0
        power = {"large": 1, "tiny": -1}.get(trial, 0) if i == 0 else 0
        return (values * scale**power).astype(struct.dtype)

    return [draw(i, struct) for i, struct in enumerate(case.arguments)]


@contextlib.contextmanager
def interpret(platform: Platform = "tpu", *, detect_races: bool = False) -> Iterator[None]:
    """Let implementation="pallas" run on a CPU, as it is launched on a TPU or an NVIDIA GPU.

    Args:
      platform: whose launcher, "tpu" or "cuda".
      detect_races: run the programs of a grid on two simulated cores in random order, and find those that
        touch what another one writes. Slow; "tpu" only.

    Raises:
      RuntimeError: as the block ends, or earlier, if there was a race.

    Example:
      >>> from pallas_kernels import dispatch, testing
      >>> with testing.interpret("cuda"):
      ...     dispatch.choose("pallas").interpret.platform
      'cuda'
    """
    if detect_races and platform != "tpu":
        raise ValueError(f"races are detected as on a TPU only, got platform={platform!r}")
    params = _race_detection() if detect_races else True
    # JAX before 0.12 only prints what it finds.
    with contextlib.redirect_stdout(io.StringIO()) if detect_races else contextlib.nullcontext() as printed:
        with dispatch.interpreting(dispatch.Interpret(platform, params)):
            yield
        jax.effects_barrier()
    if printed is not None and "RACE DETECTED" in printed.getvalue():
        raise RuntimeError(f"two programs touch the same memory, and one writes:\n{printed.getvalue()}")


def check_operator(operator: Operator) -> Iterator[Result]:
    """Hold every implementation of an operator that this machine can run against its definition.

    On a CPU the Pallas kernels run interpreted, as launched on a TPU and on a GPU. What an implementation
    says that it doesn't support (`NotImplementedError`) is left out.

    Example:
      >>> from pallas_kernels import operators, testing
      >>> for name, operator in operators.operators().items():
      ...     wrong = [r.message for r in testing.check_operator(operator) if not r.ok]  # doctest: +SKIP
    """
    for case in operator.parity_cases():
        reference = functools.partial(operator.reference, **case.options)
        trials = [inputs_for(case, trial) for trial in TRIALS]
        expected = [_expect(reference, arguments, case.differentiable) for arguments in trials]
        blind = _message(lambda reference=reference, inputs=trials[0]: assert_sensitive(reference, inputs))
        for name, implementation, context in _implementations():
            options = {**case.options, "implementation": implementation}
            function = jax.jit(functools.partial(operator.function, **options))
            evaluate = _evaluate_unoptimized if "interpreted" in name else _evaluate
            try:
                with context():
                    parities = [
                        _compare(function, arguments, case.differentiable, e, evaluate)
                        for arguments, e in zip(trials, expected, strict=True)
                    ]
            except NotImplementedError:
                continue
            yield _result(case.name, name, parities, blind)


def _result(case: str, implementation: str, parities: Sequence[Parity], blind: str) -> Result:
    problems = [
        f"{trial}: {p}" for trial, parity in zip(TRIALS, parities, strict=True) for p in parity.problems
    ]
    gradients = [p.gradient for p in parities if p.gradient is not None]
    return Result(
        case,
        implementation,
        not problems and not blind,
        max(p.forward for p in parities),
        max(gradients, default=None),
        "; ".join([*problems, *([blind] if blind else [])]),
    )


def _message(check: Callable[[], None]) -> str:
    try:
        check()
    except AssertionError as e:
        return str(e)
    return ""


def _implementations() -> list[tuple[str, str, Callable[[], contextlib.AbstractContextManager[None]]]]:
    if jax.default_backend() != "cpu":
        return [(name, name, contextlib.nullcontext) for name in ("xla", "pallas")]
    platforms: tuple[Platform, ...] = ("tpu", "cuda")
    interpreted = [
        (f"pallas ({p}, interpreted)", "pallas", functools.partial(interpret, p)) for p in platforms
    ]
    return [("xla", "xla", contextlib.nullcontext), *interpreted]


def _differentiable(arguments: Arrays, chosen: Sequence[int] | None) -> Sequence[int]:
    floats = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]
    return floats if chosen is None else chosen


def _evaluate(function: Function, arguments: Arrays, differentiable: Sequence[int]) -> list[Any]:
    """The result, and the gradients of its product with a random cotangent."""
    arguments = [jnp.asarray(a) for a in arguments]
    if not differentiable:
        return [function(*arguments)]

    def of_differentiable(*some: Any) -> jax.Array:
        changed = dict(zip(differentiable, some, strict=True))
        return function(*(changed.get(i, a) for i, a in enumerate(arguments)))

    out, vjp = jax.vjp(of_differentiable, *(arguments[i] for i in differentiable))
    # Rounded to 8 bits, so that it is the same number in every dtype.
    cotangent = np.random.default_rng(out.size).normal(size=out.shape).astype(jnp.bfloat16)
    return [out, *vjp(jnp.asarray(cotangent, out.dtype))]


# Definitions and interpreted kernels are long programs that run a few times: a third of the time to compile.
_evaluate_unoptimized = jax.jit(
    _evaluate,
    static_argnums=(0, 2),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def _expect(reference: Function, arguments: Arrays, differentiable: Sequence[int]) -> _Expected:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = _evaluate_unoptimized(reference, list(arguments), tuple(differentiable))
        with enable_x64():
            wide = [_widened(np.asarray(a)) for a in arguments]
            truth = [np.asarray(v) for v in _evaluate_unoptimized(reference, wide, tuple(differentiable))]
    return _Expected(truth, [np.asarray(v) for v in plain], [jax.typeof(v) for v in plain])


def _widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _compare(
    candidate: Function,
    arguments: Arrays,
    differentiable: Sequence[int],
    expected: _Expected,
    evaluate: Callable[..., list[Any]] = _evaluate,
) -> Parity:
    given = [jnp.array(a) for a in arguments]
    before = [np.array(a) for a in given]
    runs = [evaluate(candidate, given, tuple(differentiable)) for _ in range(RUNS)]
    names = ["result", *(f"gradient of argument {i}" for i in differentiable)]
    shares, problems = [], []
    for i, name in enumerate(names):
        share, problem = _problem(runs[0][i], expected, i)
        shares.append(share)
        problems += [f"{name}: {problem}"] if problem else []
        if len({np.asarray(run[i]).tobytes() for run in runs}) > 1:
            problems.append(f"{name}: not the same bits in {RUNS} runs")
    for i, (a, b) in enumerate(zip(given, before, strict=True)):
        if a.is_deleted():
            problems.append(f"argument {i} is donated")
        elif np.asarray(a).tobytes() != b.tobytes():
            problems.append(f"argument {i} is changed")
    return Parity(shares[0], max(shares[1:], default=None), tuple(problems))


def _problem(value: Any, expected: _Expected, i: int) -> tuple[float, str]:
    """The error of result `i` as a share of its bound, and what is wrong with it, if anything is."""
    aval, want = jax.typeof(value), expected.avals[i]
    for attribute in ("shape", "dtype", "weak_type"):
        if getattr(aval, attribute) != getattr(want, attribute):
            return np.inf, f"{attribute} {getattr(aval, attribute)}, expected {getattr(want, attribute)}"
    got, truth = np.asarray(value), expected.truth[i]
    if not got.size:
        return 0.0, ""
    if not jnp.issubdtype(got.dtype, jnp.floating):
        differ = [tuple(map(int, index)) for index in np.argwhere(got != truth)]
        if not differ:
            return 0.0, ""
        where = differ[0]
        return np.inf, f"{len(differ)} differ, first {where}: {got[where]}, expected {truth[where]}"
    return _error(got, truth, expected.plain[i], FORWARD_FACTOR if i == 0 else GRADIENT_FACTOR)


def _error(got: np.ndarray, truth: np.ndarray, plain: np.ndarray, factor: float) -> tuple[float, str]:
    error, usual = (np.abs(v.astype(np.float64) - truth) for v in (got, plain))
    size = {"rms": _rms(truth), "max": np.abs(truth).max()}
    relative = RELATIVE_RMS[got.dtype.name]
    if got.dtype == np.float64:
        bounds = {k: relative * size[k] for k in size}
    else:
        eps = float(jnp.finfo(got.dtype).eps) * (1 + 8 / got.size**0.5)
        bounds = {
            "rms": min(factor * _rms(usual) + eps * size["rms"] / 4, relative * size["rms"]),
            "max": factor * usual.max() + eps * size["max"],
        }
    measured = {"rms": _rms(error), "max": error.max()}
    # Zero of zero is right; NaN of anything is not.
    shares = [
        0.0 if measured[k] == 0 else float(measured[k] / bounds[k]) if bounds[k] else np.inf for k in bounds
    ]
    share = max(s if s == s else np.inf for s in shares)
    if share <= 1:
        return share, ""
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    where = tuple(map(int, worst))
    text = ", ".join(f"{k} {measured[k]:.2e} (bound {bounds[k]:.2e})" for k in bounds)
    return share, f"error {text}, worst at {where}: {got[worst]}, expected {truth[worst]:.9g}"


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _impostors(reference: Function, arguments: Arrays, expected: _Expected) -> Iterator[tuple[str, Any]]:
    truth, dtype = expected.truth[0], expected.avals[0].dtype
    yield "zeros", jnp.zeros(truth.shape, dtype)
    if truth.size > 1:
        yield "the mean", jnp.full(truth.shape, truth.mean(), dtype)
    yield "a copy of argument 0", jnp.asarray(np.resize(arguments[0], truth.shape), dtype)
    for i, a in enumerate(map(np.asarray, arguments)):
        if a.ndim:
            half = a.copy()
            half[len(a) // 2 :] = 0
            yield (
                f"half of argument {i}",
                _evaluate_unoptimized(reference, [*arguments[:i], half, *arguments[i + 1 :]], ())[0],
            )


def _race_detection() -> Any:
    names = {f.name for f in dataclasses.fields(pltpu.InterpretParams)}
    cores = "num_cores_or_threads" if "num_cores_or_threads" in names else "num_cores_per_device"
    return pltpu.InterpretParams(detect_races=True, random_seed=0, **{cores: 2})
