"""What all demonstrations share."""

import importlib
import pkgutil
import sys

import numpy as np
import pytest

from pallas_kernels import cli, demos

NAMES = [module.name for module in pkgutil.iter_modules(demos.__path__)]


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "optax"])
@pytest.mark.parametrize("demo", NAMES)
def test_a_missing_extra_says_what_to_install(demo, missing, monkeypatch):
    run = importlib.import_module(f"pallas_kernels.demos.{demo}").run
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pallas-kernels\[demo\]"') as error:
        run()
    assert missing in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.xyz", "Format 'xyz' is not supported"),
        ("x", "Format '' is not supported"),
        ("missing/x.png", "No such file or directory"),
        ("folder.png", "Is a directory"),
    ],
)
@pytest.mark.parametrize("demo", NAMES)
def test_a_picture_that_cannot_be_written_is_refused_before_training(
    demo, out, message, monkeypatch, capsys, tmp_path
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(importlib.import_module(f"pallas_kernels.demos.{demo}"), "_train", None)
    assert cli.main(["demo", demo, "--out", str(tmp_path / out)]) == 2
    printed, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not printed
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_picture_is_left_as_it_was_until_it_is_drawn(tmp_path):
    (tmp_path / "x.svg").write_text("before")
    assert demos.picture(str(tmp_path / "x.svg")).read_text() == "before"


def test_digits_are_split_by_the_seed():
    x_train, x_test, y_train, y_test = demos.handwritten_digits(0)
    assert x_train.shape == (1437, 64) and x_test.shape == (360, 64) and x_train.dtype == np.float32
    assert len(y_train) == 1437 and set(y_test) == set(range(10))
    assert x_train.min() == 0 and x_train.max() == 1
    assert not np.array_equal(x_test, demos.handwritten_digits(1)[1])
