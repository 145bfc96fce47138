"""Every kernel of the library goes through the vendors' compilers, at shapes that take every path."""

import json

import pytest

from pallas_kernels import cli
from pallas_kernels.operators import operators


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "sm_80", "sm_100"])
@pytest.mark.parametrize("name", operators())
def test_every_kernel_compiles(name: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", name, "--target", target, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert {r["target"] for r in reports} == {target}
    cases = operators()[name].compile_cases(False)
    assert len(reports) == sum(2 if case.differentiable else 1 for case in cases)
    for kernel in (k for r in reports for k in r["kernels"]):
        assert not kernel["spill_bytes"]
        assert kernel["memory_bytes"] is None or kernel["memory_bytes"] <= kernel["memory_limit"]


@pytest.mark.slow
def test_depthwise_convolution_has_a_kernel_for_every_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "depthwise_conv", "--target", "sm_90", "--json"]) == 0
    kernels = [k for r in json.loads(capsys.readouterr().out) for k in r["kernels"]]
    names = ["depthwise_conv", "depthwise_conv_input_gradient", "depthwise_conv_weight_gradient"]
    assert sorted({k["name"] for k in kernels}) == names
