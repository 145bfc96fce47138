"""Every kernel of the library goes through the vendors' compilers, at shapes that take every path."""

import json

import pytest

from pallas_kernels import cli


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "sm_80", "sm_100"])
def test_every_kernel_compiles(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--target", target, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert {r["target"] for r in reports} == {target}
    kernels = [k for r in reports for k in r["kernels"]]
    blast = {"blast_mix"} if target.startswith("sm_") else {"blast_matmul", "blast_matmul_gradients"}
    assert {k["name"] for k in kernels} == blast | {
        "depthwise_conv",
        "depthwise_conv_input_gradient",
        "depthwise_conv_weight_gradient",
        "monarch_matmul",
        "monarch_matmul_gradients",
    }
    for kernel in kernels:
        assert not kernel["spill_bytes"]
        assert kernel["memory_bytes"] is None or kernel["memory_bytes"] <= kernel["memory_limit"]
