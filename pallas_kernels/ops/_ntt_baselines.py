"""Products of polynomials as FLINT has them, to be timed beside ours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.baselines import Contestant, Prepare, versioned
from pallas_kernels.operators import Case


def baselines() -> Mapping[str, Callable[[Case], Prepare | None]]:
    return {versioned("python-flint", "nmod_poly without the reduction by X^n + 1, one thread"): _flint}


def _flint(case: Case) -> Prepare | None:
    try:
        import flint
    except ImportError:
        return None
    if case.options["operation"] != "polymul":
        return None
    moduli = case.options["plan"].moduli

    def prepare(arguments: Sequence[np.ndarray], _: np.ndarray) -> Contestant:
        f, g = (
            [flint.nmod_poly(row.tolist(), q) for row, q in zip(a, moduli, strict=True)] for a in arguments
        )
        n = arguments[0].shape[-1]

        def reduced(product: Any, q: int) -> np.ndarray:
            whole = np.zeros(2 * n, np.int64)
            coefficients = [int(c) for c in product.coeffs()]
            whole[: len(coefficients)] = coefficients
            return (whole[:n] - whole[n:]) % q

        def to_numpy(products: Any) -> list[np.ndarray]:
            return [
                np.stack([reduced(p, q) for p, q in zip(products, moduli, strict=True)]).astype(np.uint32)
            ]

        return Contestant(lambda: [a * b for a, b in zip(f, g, strict=True)], lambda: None, to_numpy)

    return prepare
