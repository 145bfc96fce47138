"""The results of `pallas-kernels compile OPERATOR --full --out` that the library ships are whole, and as claimed."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels import aot, bench, cli
from pallas_kernels.aot._programs import lower
from pallas_kernels.operators import operators

ROOT = Path(pallas_kernels.__file__).parent
GPUS = {"sm_80", "sm_90", "sm_100"}
COMPILED = {
    "gpu/results/blr.csv": GPUS,
    "gpu/results/depthwise_conv.csv": GPUS,
    "gpu/results/fft_conv.csv": GPUS,
    "gpu/results/he.csv": GPUS,
    "tpu/results/blr.csv": {"v4", "v5e", "v6e"},
    "tpu/results/depthwise_conv.csv": {"v4", "v5e", "v5p", "v6e", "7x"},
    "tpu/results/fft_conv.csv": {"v4", "v5e", "v6e"},
    "tpu/results/he.csv": {"v5e", "v5p", "v6e"},
}
# What `bench` writes there, on a machine that has the device.
TIMES = "times.csv"
# Of the int8 matrix units' peak, a batch of polynomials at a time.
LEAST_OF_NTT = {
    ("v5e", "n4096 L1 B512"): 55,
    ("v5e", "n16384 L1 B128"): 75,
    ("v5e", "n65536 L1 B32"): 75,
    ("v6e", "n16384 L1 B128"): 25,
    ("v6e", "n65536 L1 B32"): 50,
}

# What `compile --rivals` puts before the name of another program for the same call.
BY = ", by "
# How many times our cycles XLA's product with the dense matrix takes at least, with 1024 tokens and bfloat16: of every
# layer, of which those of 16 blocks and half of the parameters are the hardest, and of two.
LEAST_BESIDE_DENSE = {
    ("v5e", "monarch_matmul", ""): 1.7,
    ("v5e", "monarch_matmul", "Llama-7B qkvo"): 2,
    ("v5e", "blast_matmul", ""): 1.6,
    ("v5e", "low_rank_matmul", ""): 1.69,
    ("v6e", "monarch_matmul", ""): 1.64,
    ("v6e", "monarch_matmul", "Llama-7B qkvo"): 2,
    ("v6e", "monarch_matmul", "GPT-2 c_fc"): 3.3,
    ("v6e", "blast_matmul", ""): 1.47,
    ("v6e", "blast_matmul", "GPT-2 c_fc"): 3.2,
    ("v6e", "low_rank_matmul", ""): 1.59,
}

# Of the vector units' peak, with 13x13 kernels: counting padded work, by the size of images whose channels fill the
# lanes. Others may share lanes, which saves padding: it is counted as if they didn't.
LEAST_OF_CONVOLUTION = {
    "v5e": {7: 85, 12: 86, 14: 87, 24: 85, 28: 86, 48: 86},
    "v6e": {7: 85, 12: 88, 14: 89, 24: 89, 28: 89, 48: 90},
}
LEAST_WITH_OTHER_CHANNELS = {
    "v5e": {7: 82, 12: 87, 14: 90, 24: 87, 28: 85, 48: 89},
    "v6e": {7: 85, 12: 90, 14: 90, 24: 91, 28: 89, 48: 82},
}
# How many times as long as ours others take on an H200 at least: with 3x3 kernels, and with larger ones.
LEAST_BESIDE_OTHERS = {3: 0.79, 7: 1.7}


def rows(path: str) -> list[dict[str, str]]:
    with (ROOT / path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_no_other_results_are_shipped() -> None:
    found = {str(p.relative_to(ROOT)) for p in ROOT.glob("?pu/results/*.csv") if p.name != TIMES}
    assert found == set(COMPILED)


@pytest.mark.parametrize("path", COMPILED)
def test_every_full_case_compiles_for_every_target(path: str) -> None:
    calls = defaultdict(set)
    for row in rows(path):
        if BY not in row["call"]:
            calls[row["target"]].add(row["call"])
        assert row["spill"] in ("-", "0") and "FAILED" not in row["note"], row
    every = {
        f"{operator.name} {case.name} {name}"
        for operator in operators().values()
        if Path(path).stem in (operator.name, operator.family)
        for case in operator.compile_cases(True)
        for name in ("forward", "gradients")[: 2 if case.differentiable else 1]
    }
    assert calls == dict.fromkeys(COMPILED[path], every)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["blast_matmul", "low_rank_matmul", "monarch_matmul"])
@pytest.mark.parametrize("tokens", ["N1 ", "N1024 "])
def test_every_kernel_of_a_call_has_a_row(name: str, tokens: str) -> None:
    found = defaultdict(set)
    for row in rows("tpu/results/blr.csv"):
        if row["target"] == "v5e" and BY not in row["call"]:
            found[row["call"]].add(row["kernel"])
    operator = operators()[name]
    for case in (case for case in operator.compile_cases(True) if tokens in case.name):
        for program, function, arguments in cli._passes(operator, case):
            kernels = lower(function, arguments, aot.TPUS["v5e"], estimate=False)[1]
            expected = {kernel.name for kernel in kernels} or {"-"}
            assert found[f"{name} {case.name} {program}"] == expected


@pytest.mark.parametrize(("target", "case"), LEAST_OF_NTT)
@pytest.mark.parametrize("direction", ["ntt", "intt"])
def test_transforms_use_the_matrix_units(target: str, case: str, direction: str) -> None:
    (row,) = (
        r
        for r in rows("tpu/results/he.csv")
        if (r["target"], r["call"]) == (target, f"ntt {direction} {case} forward")
    )
    assert int(row["padded"].removesuffix("%")) >= LEAST_OF_NTT[target, case]


@pytest.mark.parametrize(("target", "operator", "layer"), LEAST_BESIDE_DENSE)
def test_structured_products_beat_dense_ones(target: str, operator: str, layer: str) -> None:
    ratios = [
        float(row["note"].removesuffix(" times ours"))
        for row in rows("tpu/results/blr.csv")
        if row["target"] == target
        and re.fullmatch(rf"{operator} {layer}.* N1024 .*{BY}XLA, dense", row["call"])
        and row["note"].endswith(" times ours")
    ]
    assert len(ratios) >= (1 if layer else 8)
    assert min(ratios) >= LEAST_BESIDE_DENSE[target, operator, layer]


@pytest.mark.parametrize("target", LEAST_OF_CONVOLUTION)
def test_convolutions_use_the_vector_units(target: str) -> None:
    estimated = [
        (int(size), int(channels), int(row["true"].removesuffix("%")), int(row["padded"].removesuffix("%")))
        for row in rows("tpu/results/depthwise_conv.csv")
        if row["target"] == target and row["padded"] != "-"
        for size, channels in re.findall(r" \d+x(\d+) C(\d+) K13x13 ", row["call"])
    ]
    assert {size for size, *_ in estimated} == set(LEAST_OF_CONVOLUTION[target])
    for size, channels, true, padded in estimated:
        if channels % 128 == 0:
            assert padded >= LEAST_OF_CONVOLUTION[target][size], (size, channels)
        else:
            lanes = -(-channels // 128) * 128
            assert true * lanes / channels >= LEAST_WITH_OTHER_CHANNELS[target][size], (size, channels)


def test_times_on_a_gpu_beside_others() -> None:
    times = defaultdict(dict)
    for row in rows(f"gpu/results/{TIMES}"):
        assert "H200" in row["device"] and not row["note"], row
        times[row["case"], row["what"]][row["contestant"].split()[0]] = float(row["ratio"])
    images = {"56x56": 96, "28x28": 192, "14x14": 384, "7x7": 768}
    cases = [f"N64 {i} C{c} K{k}x{k} float32" for i, c in images.items() for k in (3, 7, 13, 31)]
    assert {(case, what) for case in cases for what in bench.PASSES} <= times.keys()
    for (case, _), ratios in times.items():
        assert ratios.keys() == {bench.OURS, "lax.conv_general_dilated", "jax-triton", "torch"}
        others = [ratio for name, ratio in ratios.items() if name != bench.OURS]
        assert min(others) >= LEAST_BESIDE_OTHERS[3 if "K3x3" in case else 7], case
