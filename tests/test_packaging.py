"""What is installed: from a wheel, plainly and editably, seen from the checkout and from elsewhere."""

import ast
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("build")
uv = pytest.importorskip("uv")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
FOLDERS = ("models", "ports", "tpu", "gpu")
# What brings a module that isn't called like its distribution; SciPy comes with JAX.
BRINGS = {
    "absl": "absl-py",
    "flint": "python-flint",
    "jax_triton": "jax-triton",
    "scipy": "jax",
    "sklearn": "scikit-learn",
}
IMPORT_ALL = """
import importlib, pkgutil
import pallas_kernels
names = [m.name for m in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, symlinks as they are: building leaves files in the folder."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*FILES, "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("pallas_kernels", *FOLDERS, "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # By way of the source distribution, so that this is complete too.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


def environment(folder: Path, *installed: str | Path) -> Path:
    """The Python of a new environment that sees our dependencies, but of us only what is `installed` there."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # Python doesn't follow the .pth files of a path from a .pth file: an editable install of us stays unseen.
    paths = dict.fromkeys(
        [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    )
    (purelib / "dependencies.pth").write_text("\n".join(paths))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--offline", "--python", python)
    run(uv.find_uv_bin(), "pip", "install", *options, *installed, cwd=folder)
    return python


def modules(paths: Sequence[Path], root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in paths}


def imports(node: ast.AST, optional: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules at the top, and whether one can do without them: they are imported in a function, or tried."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], optional) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield (child.module or "").partition(".")[0], optional
        else:
            yield from imports(child, optional or isinstance(child, ast.FunctionDef | ast.Try))


def test_what_is_imported_is_depended_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for some in project["optional-dependencies"].values() for requirement in some]
    required, optional = (
        {re.split(r"[^\w-]", requirement)[0] for requirement in some}
        for some in (project["dependencies"], project["dependencies"] + extras)
    )
    sources = [p for folder in ("pallas_kernels", *FOLDERS) for p in (ROOT / folder).rglob("*.py")]
    found = {(name, lazy, path) for path in sources for name, lazy in imports(ast.parse(path.read_text()))}
    assert {"jax", "flax", "numpy", "absl", "optax", "triton"} <= {name for name, _, _ in found}
    ours = {*sys.stdlib_module_names, "pallas_kernels"}
    missing = {
        (name, str(path.relative_to(ROOT)))
        for name, lazy, path in found
        if name not in ours and BRINGS.get(name, name) not in (optional if lazy else required)
    }
    assert not missing


def test_the_wheel_holds_one_package_with_all_modules(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pallas_kernels"}
    assert len(tops) == 2
    package = ROOT / "pallas_kernels"
    expected = modules([p for p in package.rglob("*.py") if "__pycache__" not in p.parts], ROOT)
    for folder in FOLDERS:
        expected |= {f"pallas_kernels/{p}" for p in modules(list((ROOT / folder).rglob("*.py")), ROOT)}
    assert {name for name in names if name.endswith(".py")} == expected
    results = {f"pallas_kernels/{p}" for p in modules(list(ROOT.glob("?pu/results/*.csv")), ROOT)}
    assert {name for name in names if name.endswith(".csv")} == results != set()
    assert "pallas_kernels/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_source_distribution_can_be_tested(wheel: Path) -> None:
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = [p for p in (ROOT / "tests").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert modules(tests, ROOT) | set(FILES) <= names
    assert not any("__pycache__" in name for name in names)


def test_an_installed_wheel_imports_everywhere_and_has_its_command(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel)
    found = run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert {"pallas_kernels.models.unireplknet", "pallas_kernels.gpu.depthwise_conv"} <= set(found)
    assert "pallas_kernels.pallas_kernels" not in found
    where = run(python, "-c", "import pallas_kernels; print(pallas_kernels.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    assert "compile" in run(python.parent / "pallas-kernels", "--help", cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["plain", "editable"])
def test_an_install_from_the_checkout_works_inside_and_outside_of_it(
    options: tuple[str, ...], checkout: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "venv", *options, checkout)
    code = "import pallas_kernels.models, pallas_kernels.tpu.targets; print(*pallas_kernels.models.list())"
    for cwd in (checkout, tmp_path):
        assert "unireplknet_a" in run(python, "-c", code, cwd=cwd).split()
