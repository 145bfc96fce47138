"""The sequence demonstration: long kernels remember, short ones can't, and digits are read."""

import numpy as np
import pytest

from pallas_kernels.demos import sequence


@pytest.mark.slow
def test_it_remembers_and_reads(tmp_path):
    result = sequence.run(tmp_path / "sequence.png")
    assert result.recall >= 0.95 and result.short_recall <= 0.4
    assert 0.96 <= result.digits <= 1
    assert result.figure.read_bytes().startswith(b"\x89PNG")
    assert f"{result.recall:.1%}" in str(result)


def test_symbols_stand_where_short_kernels_do_not_reach():
    x, y = sequence._symbols(np.random.default_rng(3), 50)
    loudest = np.abs(x).reshape(50, -1).argmax(1)
    step, symbol = np.divmod(loudest, sequence.CLASSES)
    assert (symbol == y).all() and set(y) == set(range(sequence.CLASSES))
    # Two layers of short kernels see twice as far as one.
    assert step.max() < sequence.LENGTH - 2 * sequence.SHORT
