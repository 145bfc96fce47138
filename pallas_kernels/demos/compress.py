"""Train a small vision transformer on handwritten digits, compress it in three ways, and fine-tune what is left."""

import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.compress import compress
from pallas_kernels.compress.report import table
from pallas_kernels.demos import handwritten_digits, picture
from pallas_kernels.models.vit import VisionTransformer
from pallas_kernels.progress import Progress

METHODS = ("monarch", "blast", "low_rank")
RATIOS = (0.5, 0.25)
# The layers that are compressed hold nearly all parameters.
PATTERN = "blocks.*"
BATCH = 64
# Of the training scans, to choose among RATES of fine-tuning by; the other fifth, for testing, has no part in it.
VALIDATION = 288
RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class Row:
    """One network.

    method: "dense", or how it was compressed to `ratio` of its linear parameters.
    parameters: of the whole network. flops: of its compressed layers, a token.
    error: of the compressed matrices, relative.
    before, after: accuracy on the test scans, 0 to 1, before and after fine-tuning.
    validation: accuracy on the validation scans, after fine-tuning at `rate`, which was best there.
    milliseconds: for a batch of 64 scans.
    """

    method: str
    ratio: float
    parameters: int
    flops: int
    error: float
    before: float
    after: float
    validation: float
    rate: float
    milliseconds: float


@dataclass(frozen=True)
class Result:
    """What `run` found: a row for the dense network, fine-tuned as the others are, then one for each method and ratio.

    `str` of it is a table.
    """

    rows: tuple[Row, ...]
    seconds: float
    figure: Path

    def __str__(self) -> str:
        head = (
            "method", "kept", "parameters", "FLOPs/token", "error", "accuracy", "fine-tuned", "at rate", "ms/batch"
        )  # fmt: skip
        cells: list[tuple[str, ...]] = [head]
        for r in self.rows:
            numbers = (f"{r.ratio:.0%}", f"{r.parameters:,}", f"{r.flops:,}", f"{r.error:.3f}")
            accuracies = (f"{r.before:.1%}", f"{r.after:.1%}", f"{r.rate:g}")
            cells.append((r.method, *numbers, *accuracies, f"{r.milliseconds:.1f}"))
        return f"{table(cells)}\n{self.seconds:.0f} s; picture in {self.figure}"


def run(
    out: str | Path = "compress.png", *, epochs: int | None = None, tuning: int | None = None, seed: int = 0
) -> Result:
    """Train on scikit-learn's 1797 scans of handwritten digits, compress to a half and a quarter, fine-tune, draw.

    Args:
      out: the picture to write, in the format that its name ends in.
      epochs: passes over the training scans; None takes 15, which is enough.
      tuning: passes of each fine-tuning; None takes 8.
      seed: of the split, the initial parameters and the order of the scans.

    Returns:
      What it measured.

    Raises:
      ModuleNotFoundError: scikit-learn, matplotlib or optax is not installed.
      demos.NoPicture, OSError: `out` can't be written; nothing was trained.
    """
    start = time.monotonic()
    x, x_test, y, y_test = handwritten_digits(seed)
    figure = picture(out)
    x, test = x.reshape(-1, 8, 8, 1), (x_test.reshape(-1, 8, 8, 1), y_test)
    train, valid = (x[:-VALIDATION], y[:-VALIDATION]), (x[-VALIDATION:], y[-VALIDATION:])
    steps = len(train[0]) // BATCH
    training, tuning_steps = (
        (default if n is None else n) * steps for n, default in ((epochs, 15), (tuning, 8))
    )

    model = VisionTransformer(
        8, 2, in_channels=1, depth=2, features=64, heads=4, num_classes=10, linear=nnx.Linear, rngs=nnx.Rngs(seed)
    )  # fmt: skip
    # So few steps would not teach it where a patch lies, if positions started as small as in a long training.
    model.pos_embed[...] = model.pos_embed[...] * 50
    networks = [("dense", 1.0), *itertools.product(METHODS, RATIOS)]
    with Progress(training + len(networks) * len(RATES) * tuning_steps, "training") as progress:
        _train(model, *train, training, 3e-3, seed, progress, "dense")
        whole = compress(model, "low_rank", rank=64, pattern=PATTERN)[1]
        rows = []
        for method, ratio in networks:
            small, flops, error = model, 2 * whole.dense_parameters, 0.0
            if method != "dense":
                small, report = compress(model, method, ratio=ratio, pattern=PATTERN)
                flops, error = sum(layer.flops for layer in report.layers), report.relative_error
            tuned = []
            for rate in RATES:
                candidate = nnx.clone(small)
                _train(candidate, *train, tuning_steps, rate, seed + 1, progress, f"{method} {ratio:.0%}")
                tuned.append((_accuracy(candidate, *valid), rate, candidate))
            validation, rate, best = max(tuned, key=lambda scored: scored[0])
            accuracies = _accuracy(small, *test), _accuracy(best, *test), validation
            rows.append(
                Row(method, ratio, _count(best), flops, error, *accuracies, rate, _time(best, test[0]))
            )
    result = Result(tuple(rows), time.monotonic() - start, figure)
    _draw(result)
    return result


def _train(
    model: Any, x: np.ndarray, y: np.ndarray, steps: int, rate: float, seed: int, progress: Progress, name: str
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(x)) for _ in range(steps * BATCH // len(x) + 1)])
    graph, parameters = nnx.split(model)
    state = _optimizer(steps).init(parameters)
    for batch in order[: steps * BATCH].reshape(steps, BATCH):
        parameters, state, value = _step(graph, steps, parameters, state, rate, x[batch], y[batch])
        progress.advance(f"{name}, loss {float(value):.3f}")
    nnx.update(model, parameters)


@functools.cache
def _optimizer(steps: int) -> Any:
    """Of updates that are still to be multiplied by a rate, so that one program serves all rates."""
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps)
    return optax.adamw(schedule, weight_decay=0.05)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    graph: Any, steps: int, parameters: Any, state: Any, rate: float, x: jax.Array, y: jax.Array
) -> tuple[Any, Any, jax.Array]:
    import optax

    def loss(parameters: Any) -> jax.Array:
        target = optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)
        return optax.softmax_cross_entropy(nnx.merge(graph, parameters)(x), target).mean()

    value, gradients = jax.value_and_grad(loss)(parameters)
    updates, state = _optimizer(steps).update(gradients, state, parameters)
    return jax.tree.map(lambda p, u: p + rate * u, parameters, updates), state, value


def _accuracy(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.asarray(_predict(model, jnp.asarray(x))).argmax(-1) == y))


def _time(model: Any, x: np.ndarray) -> float:
    """The best of 20 runs, without what Flax does around a call."""
    graph, state = nnx.split(model)
    run, batch = jax.jit(lambda state, x: nnx.merge(graph, state)(x)), jnp.asarray(x[:BATCH])
    times = []
    for _ in range(21):
        begin = time.perf_counter()
        jax.block_until_ready(run(state, batch))
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times[1:])


_predict = nnx.jit(lambda model, x: model(x))


def _count(model: Any) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _draw(result: Result) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, grey = "#1f2933", "#7b8794"
    labels = {"monarch": "Monarch", "blast": "BLAST", "low_rank": "low rank"}
    colours = dict(zip(METHODS, ("#2b6cb0", "#dd8a20", "#3f9142"), strict=True))
    dense, *rows = result.rows
    figure = Figure(figsize=(8.4, 5), facecolor="white", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.12, 0.86, 0.72))
    axes.axhline(dense.before * 100, color=grey, linewidth=0.8, linestyle=":")
    axes.plot(dense.parameters, dense.after * 100, "o", color=ink, label="dense, fine-tuned")
    axes.plot(dense.parameters, dense.before * 100, "o", color=ink, alpha=0.5, mfc="white")
    for method, colour in colours.items():
        points = sorted((r.parameters, r.before * 100, r.after * 100) for r in rows if r.method == method)
        sizes, before, after = zip(*points, strict=True)
        axes.plot(sizes, after, "o-", color=colour, label=f"{labels[method]}, fine-tuned")
        axes.plot(sizes, before, "o--", color=colour, alpha=0.5, mfc="white")
    axes.plot([], [], "o--", color=grey, alpha=0.5, mfc="white", label="before fine-tuning")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("parameters of the network", color=grey, size=9)
    axes.set_ylabel("test digits that are right, %", color=grey, size=9)
    axes.tick_params(colors=grey, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    figure.text(0.1, 0.93, "A vision transformer on fewer parameters", size=14, weight="bold", color=ink)
    figure.text(
        0.1,
        0.88,
        f"Dense, as it is compressed: {dense.before:.1%} with {dense.parameters:,} parameters",
        size=9.5,
        color=grey,
    )
    figure.savefig(result.figure)
