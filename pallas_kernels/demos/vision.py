"""Train a small UniRepLKNet on handwritten digits, merge it, and look at how far it sees."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.demos import handwritten_digits, picture
from pallas_kernels.models.unireplknet import UniRepLKNet, merge
from pallas_kernels.progress import Progress

LARGE, SMALL = 13, 3
SIZE = 48  # The scans are 8 x 8; enlarged so, the stages of the network see 12 x 12 and 6 x 6.
SHIFT = 4  # Training images are moved by up to this many pixels.
BATCH = 64
GAP = 2e-5  # The most that merging may move a logit by.


@dataclass(frozen=True)
class Result:
    """What `run` found.

    accuracy: of the large-kernel network on the held-out scans, 0 to 1.
    small_accuracy: of its twin with small kernels, trained alike.
    merge_gap: largest difference of a logit before and after merging.
    changed: number of predictions that merging changed.
    parameters, merged_parameters: of the large-kernel network.
    reach, small_reach: side of the centred square that holds half of the receptive field, as a share of the
      image's.
    seconds: all of it, compilation included.
    figure: where the picture is.
    """

    accuracy: float
    small_accuracy: float
    merge_gap: float
    changed: int
    parameters: int
    merged_parameters: int
    reach: float
    small_reach: float
    seconds: float
    figure: Path

    @property
    def problem(self) -> str:
        """What merging did that it must not do; empty if it did nothing."""
        if self.merge_gap <= GAP and not self.changed:
            return ""
        return (
            f"merging moved a logit by {self.merge_gap:.1e}, where {GAP:.0e} may be, "
            f"and changed {self.changed} predictions"
        )

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} of the held-out digits are right with {LARGE}x{LARGE} kernels, "
            f"{self.small_accuracy:.1%} with {SMALL}x{SMALL}\n"
            f"merging {self.parameters:,} parameters into {self.merged_parameters:,} moves no logit by more "
            f"than {self.merge_gap:.1e} and changes {self.changed} predictions\n"
            f"half of what the centre sees lies within {self.reach:.0%} of the image's side, "
            f"{self.small_reach:.0%} with {SMALL}x{SMALL} kernels\n"
            f"{self.seconds:.0f} s; picture in {self.figure}"
        )


def run(out: str | Path = "vision.png", *, epochs: int | None = None, seed: int = 0) -> Result:
    """Train on scikit-learn's 1797 scans of handwritten digits, merge, and draw the receptive fields.

    Two networks are trained alike, one with 13 x 13 kernels and one with 3 x 3.

    Args:
      out: the picture to write, in the format that its name ends in.
      epochs: passes over the training scans; None takes 12, after which at least 97 % of the held-out scans are right.
      seed: of the split, the initial parameters and the order of the scans.

    Returns:
      What it measured.

    Raises:
      ModuleNotFoundError: scikit-learn, matplotlib or optax is not installed.
      demos.NoPicture, OSError: `out` can't be written; nothing was trained.
    """
    start = time.monotonic()
    x_train, scans, y_train, y_test = handwritten_digits(seed)
    figure = picture(out)
    x_train, x_test = (np.asarray(_enlarge(x)) for x in (x_train, scans))

    networks, losses = {}, {}
    steps = (12 if epochs is None else epochs) * (len(x_train) // BATCH)
    with Progress(2 * steps, "training") as progress:
        for k in (LARGE, SMALL):
            networks[k], losses[k] = _train(k, x_train, y_train, steps, seed, progress)
            networks[k].eval()

    large, small = networks[LARGE], networks[SMALL]
    logits = _predict(large, x_test)
    merged = merge(large)
    merged_logits = _predict(merged, x_test)
    fields = {k: _receptive_field(networks[k], x_test[:64]) for k in (LARGE, SMALL)}
    result = Result(
        accuracy=float(np.mean(logits.argmax(-1) == y_test)),
        small_accuracy=float(np.mean(_predict(small, x_test).argmax(-1) == y_test)),
        merge_gap=float(np.abs(logits - merged_logits).max()),
        changed=int(np.sum(logits.argmax(-1) != merged_logits.argmax(-1))),
        parameters=_count(large),
        merged_parameters=_count(merged),
        reach=_reach(fields[LARGE]),
        small_reach=_reach(fields[SMALL]),
        seconds=time.monotonic() - start,
        figure=figure,
    )
    _draw(result, scans.reshape(-1, 8, 8), y_test, merged_logits.argmax(-1), losses, fields)
    return result


def _enlarge(scans: np.ndarray) -> jax.Array:
    images = jnp.asarray(scans).reshape(-1, 8, 8, 1)
    return jax.image.resize(images, (len(images), SIZE, SIZE, 1), "cubic")


def _train(
    kernel_size: int, x: np.ndarray, y: np.ndarray, steps: int, seed: int, progress: Progress
) -> tuple[UniRepLKNet, list[float]]:
    """The trained network, and its loss at every step."""
    import optax

    model = UniRepLKNet(
        (1, 1),
        (24, 48),
        (kernel_size,) * 2,
        num_classes=10,
        in_channels=1,
        layer_scale=0.5,
        rngs=nnx.Rngs(seed),
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 8, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.05), wrt=nnx.Param)

    @nnx.jit
    def step(
        model: UniRepLKNet, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array, shift: jax.Array
    ) -> jax.Array:
        def loss(model: UniRepLKNet) -> jax.Array:
            target = optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)
            return optax.softmax_cross_entropy(model(jax.vmap(_move)(x, shift)), target).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(x)) for _ in range(steps * BATCH // len(x) + 1)])
    losses = []
    for batch in order[: steps * BATCH].reshape(steps, BATCH):
        shift = random.integers(-SHIFT, SHIFT + 1, (BATCH, 2))
        losses.append(float(step(model, optimizer, *map(jnp.asarray, (x[batch], y[batch], shift)))))
        progress.advance(f"{kernel_size}x{kernel_size} kernels, loss {losses[-1]:.3f}")
    return model, losses


def _move(image: jax.Array, shift: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    return jax.lax.dynamic_slice(padded, (SHIFT + shift[0], SHIFT + shift[1], 0), image.shape)


def _predict(model: UniRepLKNet, x: np.ndarray) -> np.ndarray:
    """Logits, at the highest precision: by default accelerators round more away than merging may change."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(nnx.jit(lambda model, x: model(x))(model, x))


def _receptive_field(model: UniRepLKNet, x: np.ndarray) -> np.ndarray:
    """How much every 4 x 4 pixels move the centre of the last map: mean |d centre / d pixel|, sum 1."""

    def centre(x: jax.Array, model: UniRepLKNet) -> jax.Array:
        features = model.features(x)[-1]
        # An even map has its centre between four positions.
        h, w = features.shape[1] // 2, features.shape[2] // 2
        return jax.nn.relu(features[:, h - 1 : h + 1, w - 1 : w + 1]).sum()

    field = np.abs(np.asarray(nnx.jit(nnx.grad(centre))(x, model))).mean((0, -1))
    # The stem's stride makes neighbouring pixels differ, whatever the kernels after it: sum over its cells.
    cells = field.reshape(SIZE // 4, 4, SIZE // 4, 4).sum((1, 3))
    return cells / cells.sum()


def _reach(field: np.ndarray) -> float:
    """Side of the centred square that holds half of the field, as a share of the image's side."""
    half = len(field) // 2
    held = [field[half - r : half + r, half - r : half + r].sum() for r in range(half + 1)]
    return float(np.interp(0.5, held, np.arange(half + 1))) / half


def _count(model: UniRepLKNet) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


_INK, _GREY, _PALE, _RED = "#1f2933", "#7b8794", "#cbd2d9", "#d64545"
_COLOURS = {LARGE: "#2b6cb0", SMALL: "#dd8a20"}


def _draw(
    result: Result,
    scans: np.ndarray,
    digits: np.ndarray,
    predictions: np.ndarray,
    losses: dict[int, list[float]],
    fields: dict[int, np.ndarray],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), facecolor="white", dpi=130)
    FigureCanvasAgg(figure)
    text = partial(figure.text, size=11, color=_INK)
    text(0.04, 0.945, "A small UniRepLKNet reads handwritten digits", size=17, weight="bold")
    summary = (
        f"{result.accuracy:.1%} of {len(digits)} held-out scans right.  Merging {result.parameters:,} "
        f"parameters into {result.merged_parameters:,} moved no logit by more than {result.merge_gap:.0e} "
        f"and changed {result.changed} predictions."
    )
    text(0.04, 0.905, summary, size=10.5, color=_GREY)

    wrong = np.flatnonzero(predictions != digits)
    shown = np.concatenate([wrong, np.flatnonzero(predictions == digits)])[:35]
    tiles = figure.add_gridspec(5, 7, left=0.04, right=0.5, top=0.83, bottom=0.05, wspace=0.12, hspace=0.42)
    text(0.04, 0.865, f"Predictions after merging, mistakes first ({len(wrong)})")
    for i, n in enumerate(shown):
        _draw_scan(figure.add_subplot(tiles[i]), scans[n], int(digits[n]), int(predictions[n]))

    text(0.57, 0.865, "Training loss of two networks trained alike")
    _draw_losses(figure.add_axes((0.57, 0.555, 0.39, 0.275)), losses)

    text(0.57, 0.455, "Effective receptive field: what moves the centre of the last map")
    top = max(field.max() for field in fields.values())
    for i, (k, share) in enumerate({SMALL: result.small_reach, LARGE: result.reach}.items()):
        axes = figure.add_axes((0.57 + 0.205 * i, 0.09, 0.185, 0.33))
        _draw_field(axes, fields[k] / top, share)
        axes.set_xlabel(f"{k} x {k}: half within {share:.0%} of the side", color=_INK, size=9.5, labelpad=6)
    figure.savefig(result.figure)


def _draw_scan(axes: Any, scan: np.ndarray, digit: int, prediction: int) -> None:
    axes.imshow(scan, cmap="gray_r", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    if prediction == digit:
        axes.set_title(f"{prediction}", size=9.5, color=_INK, pad=3)
        axes.spines[:].set(color=_PALE, linewidth=0.8)
    else:
        axes.set_title(f"{prediction}, not {digit}", size=9.5, color=_RED, weight="bold", pad=3)
        axes.spines[:].set(color=_RED, linewidth=2)


def _draw_losses(axes: Any, losses: dict[int, list[float]]) -> None:
    for k, values in losses.items():
        axes.plot(values, color=_COLOURS[k], alpha=0.2, linewidth=0.8)
        window = min(20, len(values))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(np.arange(len(smooth)) + window - 1, smooth, color=_COLOURS[k], label=f"{k} x {k} kernels")
    axes.set_xlabel("step", color=_GREY, size=9)
    axes.set_ylabel("cross entropy", color=_GREY, size=9)
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def _draw_field(axes: Any, field: np.ndarray, share: float) -> None:
    """A receptive field, and the square that holds half of it."""
    # The square root brings out what a linear scale would leave black.
    axes.imshow(np.sqrt(field), cmap="magma", vmin=0, vmax=1)
    low, side = len(field) * (1 - share) / 2 - 0.5, len(field) * share
    axes.plot([low, low + side, low + side, low, low], [low, low, low + side, low + side, low], "w--", lw=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
