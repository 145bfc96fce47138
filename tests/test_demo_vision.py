"""The vision demonstration: it learns, and merging changes nothing."""

import jax
import numpy as np
import pytest

from pallas_kernels.demos import vision


@pytest.mark.slow
@pytest.mark.sweep
def test_it_learns_and_merges(tmp_path):
    result = vision.run(tmp_path / "vision.png")
    assert 0.97 <= result.accuracy <= 1
    assert result.merge_gap <= 2e-5 and result.changed == 0 and result.problem == ""
    assert result.merged_parameters < result.parameters
    assert result.small_reach < result.reach < 1
    assert result.figure.read_bytes().startswith(b"\x89PNG")
    assert f"{result.accuracy:.1%}" in str(result)


def test_reach_of_known_fields():
    even = np.full((8, 8), 1 / 64)
    point = np.zeros((8, 8))
    point[3:5, 3:5] = 1 / 4
    assert vision._reach(point) < 0.25
    # Half of an even field lies in the square of half its area, up to the line drawn between whole cells.
    assert abs(vision._reach(even) - 0.5**0.5) < 0.02


def test_move_shifts_and_fills_with_zeros():
    image = np.random.default_rng(7).normal(size=(6, 5, 1))
    moved = np.asarray(jax.jit(vision._move)(image, np.array([2, -1])))
    np.testing.assert_allclose(moved[:4, 1:], image[2:, :4], rtol=1e-6)
    assert not moved[4:].any() and not moved[:, 0].any()
