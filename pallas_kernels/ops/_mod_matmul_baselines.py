"""Modular matrix products as FLINT has them, to be timed beside ours."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.baselines import Contestant, Prepare
from pallas_kernels.operators import Case


def baselines() -> Mapping[str, Callable[[Case], Prepare | None]]:
    return {flint_name("nmod_mat"): _flint}


def flint_name(what: str) -> str:
    try:
        return f"python-flint {importlib.metadata.version('python-flint')}, {what}, one thread"
    except importlib.metadata.PackageNotFoundError:
        return "python-flint (not installed)"


def _flint(case: Case) -> Prepare | None:
    try:
        import flint
    except ImportError:
        return None
    (q,) = case.options["moduli"]

    def prepare(arguments: Sequence[np.ndarray], _: np.ndarray) -> Contestant:
        a, b = (flint.nmod_mat(*v.shape[-2:], v.ravel().tolist(), q) for v in arguments)

        def to_numpy(product: Any) -> list[np.ndarray]:
            entries = np.array([int(x) for x in product.entries()], np.uint32)
            return [entries.reshape(1, product.nrows(), product.ncols())]

        return Contestant(lambda: a * b, lambda: None, to_numpy)

    return prepare
