"""What users can import by name, and that all of it is documented."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import pallas_kernels as pk
from pallas_kernels import aot, bench, compress, he, models, nn, testing
from pallas_kernels.he import ckks, ring, rns
from pallas_kernels.models import gpt2, unireplknet

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", [pk, he, nn], ids=lambda m: m.__name__)
def test_public_names(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    "module",
    [pk, nn, he, ckks, ring, rns, compress, models, gpt2, unireplknet, aot, bench, testing],
    ids=lambda m: m.__name__,
)
def test_public_functions_and_classes_have_docstrings(module: ModuleType) -> None:
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    values = {name: getattr(module, name) for name in names}
    things = {n: v for n, v in values.items() if inspect.isclass(v) or inspect.isfunction(v)}
    assert things
    # A class without a docstring would inherit its base's, a NamedTuple gets one of its own.
    bare = [n for n, v in things.items() if not v.__doc__ or v.__doc__.startswith(f"{n}(")]
    assert not bare


def test_every_module_has_a_docstring() -> None:
    modules = [m.name for m in pkgutil.walk_packages(pk.__path__, "pallas_kernels.")]
    assert {"pallas_kernels.models.unireplknet", "pallas_kernels.tpu.targets"} <= set(modules)
    assert not [name for name in modules if not importlib.import_module(name).__doc__]


@pytest.mark.slow
def test_the_code_in_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_readme_names_the_commands_that_are_there() -> None:
    from pallas_kernels.cli import COMMANDS

    shown = set(
        re.findall(r"(?:`|bin/|^)pallas-kernels (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    assert shown == set(COMMANDS)
