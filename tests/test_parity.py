"""Operators on residues equal their definitions, bit for bit, on every implementation."""

import dataclasses
from typing import Any

import pytest

from pallas_kernels import testing
from pallas_kernels.operators import Case, Operator, operators

RESIDUES = [o for o in operators().values() if o.family == "he"]


def implementations(case: Case) -> int:
    """XLA and both kernels, but small transforms are left to XLA."""
    split = getattr(case.options.get("plan"), "split", (32,))
    return 3 if min(split) >= 32 else 1


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("operator", "case"),
    [
        pytest.param(o, case, id=f"{o.name} {case.name}", marks=[pytest.mark.slow] * ("n2048" in case.name))
        for o in RESIDUES
        for case in o.parity_cases()
    ],
)
def test_residues_are_equal(operator: Operator, case: Any) -> None:
    one = dataclasses.replace(operator, parity_cases=lambda: [case])
    results = list(testing.check_operator(one))
    assert len(results) == implementations(case)
    assert all(r.ok for r in results), results
