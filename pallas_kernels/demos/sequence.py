"""Train networks of long convolutions to remember what they saw first, and to read digits pixel by pixel."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.demos import handwritten_digits, picture
from pallas_kernels.models.sequence import SequenceClassifier
from pallas_kernels.nn import SGConv
from pallas_kernels.progress import Progress

LENGTH, CLASSES, NOISE = 256, 4, 0.1  # Of the sequences to remember a symbol of.
SHORT = 32  # Taps that are left of the twin's kernels.
BATCH, EVERY = 64, 20  # Accuracy is measured once in so many steps.


@dataclass(frozen=True)
class Result:
    """What `run` found.

    recall, short_recall: share of symbols that were remembered, by long kernels and by the same ones cut short.
    digits: share of held-out scans that were read right, pixel by pixel.
    seconds: all of it, compilation included.
    figure: where the picture is.
    """

    recall: float
    short_recall: float
    digits: float
    seconds: float
    figure: Path

    def __str__(self) -> str:
        return (
            f"{self.recall:.1%} of the symbols at the start of {LENGTH} steps are remembered at their end, "
            f"{self.short_recall:.1%} with kernels cut to {SHORT} taps ({1 / CLASSES:.0%} is chance)\n"
            f"{self.digits:.1%} of the held-out digits are right, read as 64 pixels in a row\n"
            f"{self.seconds:.0f} s; picture in {self.figure}"
        )


class ShortSGConv(SGConv):
    """SGConv with all but the first taps of its kernels cut off."""

    def kernel(self, length: int) -> jax.Array:
        return super().kernel(length)[:, :SHORT]


def run(out: str | Path = "sequence.png", *, steps: int = 400, epochs: int = 12, seed: int = 0) -> Result:
    """Train on a symbol to remember, with long and with short kernels, and on scikit-learn's digits; draw the kernels.

    Args:
      out: the picture to write, in the format that its name ends in.
      steps: of training to remember, each with 64 fresh sequences.
      epochs: passes over the training scans of digits.
      seed: of the data, the split and the initial parameters.

    Returns:
      What it measured.

    Raises:
      ModuleNotFoundError: scikit-learn, matplotlib or optax is not installed.
      demos.NoPicture, OSError: `out` can't be written; nothing was trained.
    """
    start = time.monotonic()
    x_train, x_test, y_train, y_test = handwritten_digits(seed)
    figure = picture(out)
    x_train, x_test = x_train[..., None], x_test[..., None]
    scan_steps = epochs * (len(x_train) // BATCH)

    random = np.random.default_rng(seed)
    x_recall, y_recall = _symbols(random, 512)
    curves, models = {}, {}
    with Progress(2 * steps + scan_steps, "training") as progress:
        for name, mixer in (("long kernels", SGConv), (f"cut to {SHORT} taps", ShortSGConv)):
            models[name] = SequenceClassifier(
                2, 32, functools.partial(mixer, length=LENGTH, kernel_dim=8), num_classes=CLASSES,
                in_features=CLASSES, pool="last", rngs=nnx.Rngs(seed),
            )  # fmt: skip
            batches = (_symbols(random, BATCH) for _ in range(steps))
            curves[name] = _train(models[name], batches, 1e-2, steps, (x_recall, y_recall), progress, name)
        reader = SequenceClassifier(
            3, 64, functools.partial(SGConv, length=64, kernel_dim=4, bidirectional=True, glu=True, dropout=0.1),
            num_classes=10, rngs=nnx.Rngs(seed),
        )  # fmt: skip
        batches = _shuffled(random, x_train, y_train, scan_steps)
        curves["digits"] = _train(reader, batches, 4e-3, scan_steps, (x_test, y_test), progress, "digits")
    long, short = (curves[name][-1][1] for name in models)
    result = Result(long, short, curves["digits"][-1][1], time.monotonic() - start, figure)
    _draw(result, models["long kernels"], curves)
    return result


def _symbols(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with one symbol in the first eighth; and which symbol it was."""
    x = random.normal(scale=NOISE, size=(count, LENGTH, CLASSES)).astype(np.float32)
    y = random.integers(CLASSES, size=count)
    x[np.arange(count), random.integers(LENGTH // 8, size=count), y] += 1
    return x, y


def _shuffled(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.concatenate([random.permutation(len(x)) for _ in range(steps * BATCH // len(x) + 1)])
    for batch in order[: steps * BATCH].reshape(steps, BATCH):
        yield x[batch], y[batch]


def _train(
    model: SequenceClassifier, batches: Iterator[tuple[np.ndarray, np.ndarray]], rate: float, steps: int,
    held_out: tuple[np.ndarray, np.ndarray], progress: Progress, name: str,
) -> list[tuple[int, float]]:  # fmt: skip
    """(step, accuracy on what is held out), now and then, and at the end."""
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model: SequenceClassifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(model: SequenceClassifier) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    predict = nnx.jit(lambda model, x: model(x).argmax(-1))
    curve = []
    for i, (x, y) in enumerate(batches, 1):
        step(model, optimizer, jnp.asarray(x), jnp.asarray(y))
        if i % EVERY == 0 or i == steps:
            model.eval()
            curve.append((i, float(np.mean(np.asarray(predict(model, held_out[0])) == held_out[1]))))
            model.train()
        progress.advance(f"{name}, {curve[-1][1]:.1%} right" if curve else name)
    return curve


def _draw(result: Result, model: SequenceClassifier, curves: dict[str, list[tuple[int, float]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, grey = "#1f2933", "#7b8794"
    colours = ("#2b6cb0", "#dd8a20", "#2f855a")
    figure = Figure(figsize=(13, 6.4), facecolor="white", dpi=130)
    FigureCanvasAgg(figure)
    figure.text(
        0.05,
        0.93,
        "Networks of long convolutions: what a kernel must reach",
        size=17,
        weight="bold",
        color=ink,
    )
    figure.text(
        0.05,
        0.88,
        f"Of the symbols at the start of {LENGTH} steps, {result.recall:.1%} are remembered at the end, with kernels "
        f"cut to {SHORT} taps {result.short_recall:.1%}.  Digits, pixel by pixel: {result.digits:.1%}.",
        size=10.5,
        color=grey,
    )

    for i, block in enumerate(model.blocks):
        axes = figure.add_axes((0.06 + 0.245 * i, 0.12, 0.215, 0.62))
        k = np.asarray(block.mixer.kernel(LENGTH))[0]
        loudest = np.argsort(-np.abs(k[SHORT:]).max(0))[:4]
        for c, shade in zip(loudest, ("#1a365d", "#2b6cb0", "#63b3ed", "#90cdf4"), strict=True):
            axes.plot(np.arange(1, LENGTH + 1), k[:, c], color=shade, linewidth=1.2)
        axes.axvspan(1, SHORT, color="#dd8a20", alpha=0.12, linewidth=0)
        axes.set(xscale="log", xlim=(1, LENGTH))
        axes.set_xlabel("lag + 1", color=grey, size=9)
        axes.set_title(f"block {i + 1}: the four kernels that reach farthest", size=9.5, color=ink)
        _plain(axes, grey)
    figure.text(
        0.06, 0.80, f"Learned kernels; shaded, what is left of them at {SHORT} taps", size=11, color=ink
    )

    axes = figure.add_axes((0.58, 0.12, 0.38, 0.62))
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        at, accuracy = np.asarray(curve).T
        axes.plot(at, accuracy, color=colour, label=name)
    axes.axhline(1 / CLASSES, color=grey, linewidth=0.8, linestyle="--")
    axes.text(0, 1 / CLASSES + 0.015, " chance, of remembering", size=8, color=grey)
    axes.set(ylim=(0, 1.02))
    axes.set_xlabel("step", color=grey, size=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=ink, loc="center right")
    _plain(axes, grey)
    figure.text(0.58, 0.80, "Accuracy on what was held out", size=11, color=ink)
    figure.savefig(result.figure)


def _plain(axes: Any, grey: str) -> None:
    axes.tick_params(colors=grey, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
