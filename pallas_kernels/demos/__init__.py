"""The demonstrations behind `pallas-kernels demo`; the scans of digits that they learn from, and where they draw."""

import io
from pathlib import Path
from typing import Any

import numpy as np


class NoPicture(ValueError):
    """A picture can't be written as its name asks for."""


def picture(out: str | Path) -> Path:
    """The path of a picture, when it is sure that it can be written; training takes minutes, and comes after this.

    Raises:
      NoPicture: matplotlib doesn't write what the name ends in.
      OSError: the folder isn't there, or the file can't be written.
    """
    from matplotlib.figure import Figure

    path = Path(out)
    try:
        Figure().savefig(io.BytesIO(), format=path.suffix[1:])
    except ValueError as error:
        raise NoPicture(f"{path}: {error}") from None
    path.open("ab").close()
    return path


def handwritten_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1797 scans of handwritten digits, split 4 : 1.

    Returns:
      x_train, x_test: (N, 64) float32, 8 x 8 pixels of 0 to 1; y_train, y_test: (N,), the digits.

    Raises:
      ModuleNotFoundError: what demonstrations need, scikit-learn, matplotlib or optax, is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import optax  # noqa: F401
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ModuleNotFoundError(
            f'this demo needs {error.name}, which is not installed: pip install "pallas-kernels[demo]"',
            name=error.name,
        ) from None
    scans, digits = load_digits(return_X_y=True)
    x = np.asarray(scans / 16, np.float32)
    split: list[Any] = train_test_split(x, digits, test_size=0.2, stratify=digits, random_state=seed)
    return tuple(split)  # pyright: ignore[reportReturnType]
