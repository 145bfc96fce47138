"""Train a small vision transformer on handwritten digits, compress it in three ways, and fine-tune what is left."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.compress import Report, compress
from pallas_kernels.demos import handwritten_digits
from pallas_kernels.models.vit import VisionTransformer
from pallas_kernels.progress import Progress

METHODS = ("monarch", "blast", "low_rank")
RATIOS = (0.5, 0.25)
# The layers that are compressed hold nearly all parameters.
PATTERN = "blocks.*"
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One network.

    method: "dense", or how it was compressed to `ratio` of its linear parameters.
    parameters: of the whole network. flops: of its compressed layers, a token.
    error: of the compressed matrices, relative.
    before, after: accuracy on the held-out scans, 0 to 1, before and after fine-tuning.
    milliseconds: for a batch of 64 scans.
    """

    method: str
    ratio: float
    parameters: int
    flops: int
    error: float
    before: float
    after: float
    milliseconds: float


@dataclass(frozen=True)
class Result:
    """What `run` found: a row for the dense network, then one for each method and ratio. `str` of it is a table."""

    rows: tuple[Row, ...]
    seconds: float
    figure: Path

    def __str__(self) -> str:
        head = ("method", "kept", "parameters", "FLOPs/token", "error", "accuracy", "fine-tuned", "ms/batch")
        cells: list[tuple[str, ...]] = [head]
        for r in self.rows:
            numbers = (f"{r.ratio:.0%}", f"{r.parameters:,}", f"{r.flops:,}", f"{r.error:.3f}")
            cells.append((r.method, *numbers, f"{r.before:.1%}", f"{r.after:.1%}", f"{r.milliseconds:.1f}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, f"{self.seconds:.0f} s; picture in {self.figure}"])


def run(
    out: str | Path = "compress.png", *, epochs: int | None = None, tuning: int | None = None, seed: int = 0
) -> Result:
    """Train on scikit-learn's 1797 scans of handwritten digits, compress to a half and a quarter, fine-tune, draw.

    Args:
      out: the PNG to write.
      epochs: passes over the training scans; None takes 15, which is enough.
      tuning: passes of the fine-tuning; None takes 4.
      seed: of the split, the initial parameters and the order of the scans.

    Returns:
      What it measured.

    Raises:
      ModuleNotFoundError: scikit-learn, matplotlib or optax is not installed.
    """
    start = time.monotonic()
    x_train, x_test, y_train, y_test = handwritten_digits(seed)
    x_train, x_test = (x.reshape(-1, 8, 8, 1) for x in (x_train, x_test))
    steps = len(x_train) // BATCH
    training, tuning_steps = (
        (15 if epochs is None else epochs) * steps,
        (4 if tuning is None else tuning) * steps,
    )

    model = VisionTransformer(
        8,
        2,
        in_channels=1,
        depth=2,
        features=64,
        heads=4,
        num_classes=10,
        linear=nnx.Linear,
        rngs=nnx.Rngs(seed),
    )
    # So few steps would not teach it where a patch lies, if positions started as small as in a long training.
    model.pos_embed[...] = model.pos_embed[...] * 50
    with Progress(training + len(METHODS) * len(RATIOS) * tuning_steps, "training") as progress:
        _train(model, x_train, y_train, training, 3e-3, seed, progress, "dense")
        accuracy = _accuracy(model, x_test, y_test)
        _, whole = compress(model, "low_rank", rank=64, pattern=PATTERN)
        flops, milliseconds = 2 * whole.dense_parameters, _time(model, x_test)
        rows = [Row("dense", 1.0, _count(model), flops, 0.0, accuracy, accuracy, milliseconds)]
        for method in METHODS:
            for ratio in RATIOS:
                small, report = compress(model, method, ratio=ratio, pattern=PATTERN)
                before = _accuracy(small, x_test, y_test)
                _train(
                    small, x_train, y_train, tuning_steps, 1e-3, seed + 1, progress, f"{method} {ratio:.0%}"
                )
                rows.append(_row(method, ratio, small, report, before, x_test, y_test))
    result = Result(tuple(rows), time.monotonic() - start, Path(out))
    _draw(result)
    return result


def _row(
    method: str, ratio: float, model: Any, report: Report, before: float, x: np.ndarray, y: np.ndarray
) -> Row:
    flops = sum(layer.flops for layer in report.layers)
    after = _accuracy(model, x, y)
    return Row(method, ratio, _count(model), flops, report.relative_error, before, after, _time(model, x))


def _train(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    steps: int,
    rate: float,
    seed: int,
    progress: Progress,
    name: str,
) -> None:
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            target = optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)
            return optax.softmax_cross_entropy(model(x), target).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(x)) for _ in range(steps * BATCH // len(x) + 1)])
    for batch in order[: steps * BATCH].reshape(steps, BATCH):
        value = step(model, optimizer, jnp.asarray(x[batch]), jnp.asarray(y[batch]))
        progress.advance(f"{name}, loss {float(value):.3f}")


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
    colours = dict(zip(METHODS, ("#2b6cb0", "#dd8a20", "#3f9142"), strict=True))
    dense, *rows = result.rows
    figure = Figure(figsize=(8.4, 5), facecolor="white", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.12, 0.86, 0.72))
    axes.axhline(dense.after * 100, color=grey, linewidth=0.8, linestyle=":")
    axes.plot(dense.parameters, dense.after * 100, "o", color=ink, label="dense")
    for method, colour in colours.items():
        points = sorted((r.parameters, r.before * 100, r.after * 100) for r in rows if r.method == method)
        sizes, before, after = zip(*points, strict=True)
        axes.plot(sizes, after, "o-", color=colour, label=f"{method.replace('_', ' ')}, fine-tuned")
        axes.plot(sizes, before, "o--", color=colour, alpha=0.5, mfc="white", label="before")
    axes.set_xlabel("parameters of the network", color=grey, size=9)
    axes.set_ylabel("held-out digits that are right, %", color=grey, size=9)
    axes.tick_params(colors=grey, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.legend(frameon=False, fontsize=8, labelcolor=ink, ncol=2)
    figure.text(0.1, 0.93, "A vision transformer on fewer parameters", size=14, weight="bold", color=ink)
    figure.text(
        0.1, 0.88, f"Dense: {dense.after:.1%} with {dense.parameters:,} parameters", size=9.5, color=grey
    )
    figure.savefig(result.figure)
