"""Train a classifier of handwritten digits in the clear, and run it on images that stay encrypted."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.demos import handwritten_digits, picture
from pallas_kernels.he import ckks
from pallas_kernels.progress import Progress

N = 2**13
PIXELS = 64
CLASSES = 10
STEPS, CHUNK = 600, 50

Layers = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Result:
    """What `run` found.

    clear, encrypted: predictions for every image, from pixels and from encrypted pixels.
    digits: what the images are.
    errors: of every image, the largest difference of a logit.
    budgets: of every image, bits between that and the largest number that the ciphertext could hold.
    layers: of the network: 1, or 2 with a square between them.
    seconds_each: of computing on encrypted images, per image.
    seconds: all of it, compilation included.
    figure: where the picture is.
    """

    clear: np.ndarray
    encrypted: np.ndarray
    digits: np.ndarray
    errors: np.ndarray
    budgets: np.ndarray
    layers: int
    seconds_each: float
    seconds: float
    figure: Path

    @property
    def agreement(self) -> float:
        """The share of images for which both predictions are the same."""
        return float(np.mean(self.clear == self.encrypted))

    @property
    def accuracy(self) -> float:
        """The share of images that are predicted right while encrypted."""
        return float(np.mean(self.encrypted == self.digits))

    def __str__(self) -> str:
        columns = zip(self.digits, self.clear, self.encrypted, self.errors, self.budgets, strict=True)
        rows = [
            f"{i:5}  {digit:5}  {clear:5}  {encrypted:9}  {error:15.1e}  {budget:17.1f}"
            for i, (digit, clear, encrypted, error, budget) in enumerate(columns)
        ]
        return "\n".join(
            [
                "image  digit  clear  encrypted  max logit error  budget left, bits",
                *rows,
                f"{len(rows)} images, {self.layers} layer{'s' * (self.layers > 1)}: clear and encrypted predictions "
                f"agree on {self.agreement:.1%}, and {self.accuracy:.1%} are right",
                f"largest error of a logit {self.errors.max():.1e}; {self.budgets.min():.0f} bits of noise budget left",
                f"{self.seconds_each:.2f} s to compute on an encrypted image, {self.seconds:.0f} s in all; picture in "
                f"{self.figure}",
            ]
        )


def run(out: str | Path = "encrypted.png", *, deep: bool = False, images: int = 128, seed: int = 0) -> Result:
    """Train on scikit-learn's scans of handwritten digits, encrypt others, classify these, decrypt the logits.

    Args:
      out: the picture to write, in the format that its name ends in.
      deep: two layers with a square between them, not one.
      images: how many to encrypt; 64 share a ciphertext.
      seed: of the split and the initial weights. Keys and noise are the operating system's.

    Returns:
      What it measured.

    Raises:
      ModuleNotFoundError: scikit-learn, matplotlib or optax is not installed.
      demos.NoPicture, OSError: `out` can't be written; nothing was trained.
    """
    start = time.monotonic()
    x_train, x_test, y_train, y_test = handwritten_digits(seed)
    figure = picture(out)
    x_test, y_test = x_test[:images], y_test[:images]

    parameters = ckks.parameters(N, depth=3 if deep else 1)
    together = parameters.slots // PIXELS
    groups = -(-len(x_test) // together)
    with Progress(STEPS // CHUNK + 1 + groups * (4 if deep else 3), "encrypted") as progress:
        layers = _train(x_train, y_train, deep, seed, progress)
        secret, public, evaluation = ckks.generate_keys(
            parameters, rotations=ckks.matrix_rotations(PIXELS, together)
        )
        progress.advance("keys are made")
        weights = _encode(layers, parameters, together)
        logits, spent, largest = [], 0.0, 0.0
        for first in range(0, len(x_test), together):
            x = np.zeros((PIXELS, together))
            some = x_test[first : first + together]
            x[:, : len(some)] = some.T
            y = ckks.encrypt(ckks.encode(x.ravel(), parameters), public)
            progress.advance("encrypted")
            begin = time.monotonic()
            for i, layer in enumerate(weights):
                y = _layer(layer, ckks.square(y, evaluation) if i else y, evaluation, together)
                progress.advance(f"layer {i + 1} is computed")
            jax.block_until_ready(y.parts)
            spent += time.monotonic() - begin
            slots = np.real(ckks.decode(ckks.decrypt(y, secret), parameters))
            logits.append(slots.reshape(PIXELS, together)[:CLASSES, : len(some)].T)
            largest = (
                np.prod([float(q) for q in parameters.moduli[: parameters.limbs(y.level)]]) / 2 / y.scale
            )
            progress.advance("decrypted")

    got, expected = np.concatenate(logits), _forward(layers, x_test)
    errors = np.abs(got - expected).max(-1)
    result = Result(
        clear=expected.argmax(-1),
        encrypted=got.argmax(-1),
        digits=y_test,
        errors=errors,
        budgets=np.log2(largest / errors),
        layers=len(layers),
        seconds_each=spent / len(x_test),
        seconds=time.monotonic() - start,
        figure=figure,
    )
    _draw(result, x_test.reshape(-1, 8, 8))
    return result


def _forward(layers: Layers, x: Any) -> Any:
    """Logits: a linear layer, or two with a square between them."""
    for i, (w, b) in enumerate(layers):
        x = (x**2 if i else x) @ w.T + b
    return x


def _train(x: np.ndarray, y: np.ndarray, deep: bool, seed: int, progress: Progress) -> Layers:
    import optax

    random = np.random.default_rng(seed)
    sizes = [PIXELS, 32, CLASSES] if deep else [PIXELS, CLASSES]
    layers = [
        (jnp.asarray(random.normal(size=(m, n)) / n**0.5), jnp.zeros(m)) for n, m in itertools.pairwise(sizes)
    ]
    optimizer = optax.adamw(0.01, weight_decay=1e-3)
    state = optimizer.init(layers)

    def loss(layers: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            _forward(layers, jnp.asarray(x)), jnp.asarray(y)
        ).mean()

    @jax.jit
    def some_steps(layers: Any, state: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            layers, state = carry
            value, gradients = jax.value_and_grad(loss)(layers)
            updates, state = optimizer.update(gradients, state, layers)
            return (optax.apply_updates(layers, updates), state), value

        return jax.lax.scan(step, (layers, state), None, CHUNK)

    for _ in range(STEPS // CHUNK):
        (layers, state), values = some_steps(layers, state)
        progress.advance(f"training in the clear, loss {float(values[-1]):.3f}")
    return [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in layers]


def _encode(layers: Layers, parameters: ckks.Parameters, together: int) -> list[Any]:
    """Matrices and biases, filled up to 64 rows and columns; slot p * together + i holds entry p for image i."""
    encoded = []
    for i, (w, b) in enumerate(layers):
        level = parameters.depth - 2 * i
        whole, bias = np.zeros((PIXELS, PIXELS)), np.zeros(PIXELS)
        whole[: w.shape[0], : w.shape[1]], bias[: len(b)] = w, b
        matrix = ckks.matrix(whole, parameters, level=level, stride=together)
        encoded.append((matrix, ckks.encode(np.repeat(bias, together), parameters, level=level - 1)))
    return encoded


def _layer(layer: Any, x: ckks.Ciphertext, keys: ckks.EvaluationKeys, together: int) -> ckks.Ciphertext:
    matrix, bias = layer
    return ckks.add(ckks.matrix_vector(matrix, x, keys, stride=together), bias)


def _draw(result: Result, scans: np.ndarray) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, grey, red = "#1f2933", "#7b8794", "#d64545"
    columns = 16
    rows = -(-len(scans) // columns)
    figure = Figure(figsize=(13, 2.2 + 0.85 * rows), facecolor="white", dpi=130)
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(
        0.04, 1 - 0.5 / height, "Digits classified while encrypted", size=17, weight="bold", color=ink
    )
    figure.text(
        0.04,
        1 - 0.85 / height,
        f"{len(scans)} scans under CKKS, n = {N}, 128-bit security.  Encrypted and clear predictions agree on "
        f"{result.agreement:.1%}; {result.accuracy:.1%} are right (red: wrong).  Largest error of a logit "
        f"{result.errors.max():.0e}.",
        size=10.5,
        color=grey,
    )
    tiles = figure.add_gridspec(
        rows,
        columns,
        left=0.04,
        right=0.96,
        top=1 - 1.4 / height,
        bottom=0.25 / height,
        wspace=0.12,
        hspace=0.5,
    )
    for i, scan in enumerate(scans):
        axes = figure.add_subplot(tiles[i])
        axes.imshow(scan, cmap="gray_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        wrong = bool(result.encrypted[i] != result.digits[i])
        title = f"{result.encrypted[i]}" + f", not {result.digits[i]}" * wrong
        axes.set_title(
            title, size=9, color=red if wrong else ink, weight="bold" if wrong else "normal", pad=2
        )
        for spine in axes.spines.values():
            spine.set(color=red if wrong else "#cbd2d9", linewidth=2 if wrong else 0.8)
    figure.savefig(result.figure)
