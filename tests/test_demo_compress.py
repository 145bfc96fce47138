"""The compression demonstration: it learns, and fine-tuning gives back what compression took."""

import pytest

from pallas_kernels.demos import compress


@pytest.mark.slow
def test_it_learns_compresses_and_recovers(tmp_path):
    result = compress.run(tmp_path / "compress.png")
    dense, *rows = result.rows
    assert dense.before > 0.9
    assert [(r.method, r.ratio) for r in rows] == [
        (m, ratio) for m in compress.METHODS for ratio in compress.RATIOS
    ]
    for row in rows:
        assert row.parameters < dense.parameters and row.flops <= row.ratio * dense.flops
        assert 0 < row.error < 1 and row.rate in compress.RATES and row.validation > 0.8
        if row.ratio == 0.5:
            assert row.after >= dense.before - 0.01
    assert result.figure.read_bytes().startswith(b"\x89PNG")
    assert "monarch" in str(result) and f"{dense.before:.1%}" in str(result)
