"""Modular matrix products as FLINT has them, to be timed beside ours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.baselines import Contestant, Prepare, versioned
from pallas_kernels.operators import Case


def baselines() -> Mapping[str, Callable[[Case], Prepare | None]]:
    return {versioned("python-flint", "nmod_mat, one thread"): _flint}


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
