"""The demonstrations behind `pallas-kernels demo`, and the scans of digits that all of them learn from."""

from typing import Any

import numpy as np


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
