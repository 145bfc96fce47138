"""The demonstration of encryption: predictions are those of the clear network."""

import numpy as np
import pytest

from pallas_kernels import cli
from pallas_kernels.demos import encrypted


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_encrypted_predictions_are_the_clear_ones(tmp_path, deep):
    result = encrypted.run(tmp_path / "encrypted.png", deep=deep, images=100)
    assert result.agreement >= 0.99 and result.accuracy > 0.9
    assert len(result.clear) == 100 and result.layers == 1 + deep
    assert result.errors.max() < 1e-4 and result.budgets.min() > 20
    assert result.figure.read_bytes().startswith(b"\x89PNG")
    assert f"{result.agreement:.1%}" in str(result) and len(str(result).splitlines()) == 104


def test_the_network_in_the_clear():
    random = np.random.default_rng(0)
    layers = [
        (random.normal(size=(3, 5)), random.normal(size=3)),
        (random.normal(size=(2, 3)), random.normal(size=2)),
    ]
    x = random.normal(size=5)
    expected = layers[1][0] @ (layers[0][0] @ x + layers[0][1]) ** 2 + layers[1][1]
    np.testing.assert_allclose(encrypted._forward(layers, x), expected)


def test_deep_is_for_this_demo_alone(capsys):
    assert cli.main(["demo", "vision", "--deep"]) == 2
    assert "demo vision takes no --deep" in capsys.readouterr().err
