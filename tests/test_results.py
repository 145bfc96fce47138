"""The results of `pallas-kernels compile OPERATOR --full --out` that the library ships are whole, and as claimed."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels.operators import operators

ROOT = Path(pallas_kernels.__file__).parent
# What `bench` writes there, on a machine that has the device.
TIMES = "times.csv"
FILES = [
    path
    for where in ("tpu", "gpu")
    for path in (ROOT / where / "results").glob("*.csv")
    if path.name != TIMES
]
# Of the int8 matrix units' peak, a batch of polynomials at a time.
LEAST_OF_NTT = {
    ("v5e", "n4096 L1 B512"): 55,
    ("v5e", "n16384 L1 B128"): 75,
    ("v5e", "n65536 L1 B32"): 75,
    ("v6e", "n16384 L1 B128"): 25,
    ("v6e", "n65536 L1 B32"): 50,
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_full_case_compiles_for_every_target(path: Path) -> None:
    calls = defaultdict(set)
    for row in rows(path):
        calls[row["target"]].add(row["call"])
        assert row["spill"] in ("-", "0") and "FAILED" not in row["note"], row
    every = {
        f"{operator.name} {case.name} {name}"
        for operator in operators().values()
        if path.stem in (operator.name, operator.family)
        for case in operator.compile_cases(True)
        for name in ("forward", "gradients")[: 2 if case.differentiable else 1]
    }
    assert every, f"{path.stem} is neither an operator nor a family"
    for target, compiled in calls.items():
        assert compiled == every, target


@pytest.mark.parametrize(("target", "case"), LEAST_OF_NTT)
@pytest.mark.parametrize("direction", ["ntt", "intt"])
def test_transforms_use_the_matrix_units(target: str, case: str, direction: str) -> None:
    (row,) = (
        r
        for r in rows(ROOT / "tpu" / "results" / "he.csv")
        if (r["target"], r["call"]) == (target, f"ntt {direction} {case} forward")
    )
    assert int(row["padded"].removesuffix("%")) >= LEAST_OF_NTT[target, case]
