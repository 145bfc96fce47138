"""Every kernel of the library goes through the vendors' compilers, at shapes that take every path."""

import itertools
import json

import pytest

from pallas_kernels import cli
from pallas_kernels.operators import operators

KERNELS = {
    "basis_conversion": {"basis_conversion"},
    "blast_matmul": {"blast_matmul", "blast_matmul_gradients"},
    "depthwise_conv": {
        "depthwise_conv",
        "depthwise_conv_input_gradient",
        "depthwise_conv_weight_gradient",
    },
    "fft_conv": {"fft_conv", "fft_conv_gradients", "fft_conv_outer", "fft_conv_outer_back"},
    "low_rank_matmul": set[str](),  # two products that XLA does as fast
    "mod_matmul": {"mod_matmul"},
    "modular": {"modular_mul_add"},
    "monarch_matmul": {"monarch_matmul", "monarch_matmul_gradients"},
    "ntt": {"intt", "ntt"},
}
# On a GPU the products around the mixing of ranks are XLA's; v4 multiplies no int8.
ON_GPU = {"blast_matmul": {"blast_mix"}}
ON_V4 = {name: set[str]() for name in ("basis_conversion", "mod_matmul", "ntt")}


# The oldest and the newest generations besides, where what they lack or changed matters.
CALLS = [
    *itertools.product(operators(), ("v5e", "sm_80")),
    ("depthwise_conv", "v4"),
    ("mod_matmul", "v4"),
    ("depthwise_conv", "sm_100"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), CALLS)
def test_every_kernel_compiles(name: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", name, "--target", target, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert {r["target"] for r in reports} == {target}
    kernels = [k for r in reports for k in r["kernels"]]
    special = ON_V4 if target == "v4" else ON_GPU if target.startswith("sm_") else {}
    assert {k["name"] for k in kernels} == {**KERNELS, **special}[name]
    for kernel in kernels:
        assert not kernel["spill_bytes"]
        assert kernel["memory_bytes"] is None or kernel["memory_bytes"] <= kernel["memory_limit"]
