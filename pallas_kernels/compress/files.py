"""Files of compressed networks: their arrays, and which layers they have."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.compress.network import by_path, configuration, with_layers

_KEY = "pallas_kernels.compress"


def save(model: nnx.Module, path: str | Path) -> None:
    """Write a compressed network's parameters and which layers it has.

    Args:
      model: from `compress`.
      path: of a file that ends in ".safetensors", which is overwritten, or of a new folder for Orbax.

    Raises:
      ValueError: from Orbax, there is such a folder.
      ModuleNotFoundError: safetensors or orbax-checkpoint is not installed.
    """
    path, arrays = Path(path), {k: np.asarray(v[...]) for k, v in _variables(model).items()}
    written = json.dumps(configuration(model))
    if path.suffix == ".safetensors":
        numpy = _module("safetensors.numpy")
        numpy.save_file(arrays, path, metadata={_KEY: written})
        return
    with _module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)
    (path / "configuration.json").write_text(written)


def load(model: nnx.Module, path: str | Path) -> nnx.Module:
    """A compressed network as it was saved.

    Args:
      model: a dense network of the same kind, as it was before `compress`. It is left as it is.
      path: as given to `save`.

    Raises:
      ValueError: what was saved is no configuration of layers, or its layers or arrays, with their dtypes, are not
        those of such a network.
      ModuleNotFoundError: safetensors or orbax-checkpoint is not installed.
    """
    path = Path(path)
    written, arrays = _read(path)
    try:
        small = with_layers(model, json.loads(written))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a configuration that is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from None
    variables = _variables(small)
    if differing := {k for k in {*variables, *arrays} if _kind(variables, k) != _kind(arrays, k)}:
        name = min(differing)
        raise ValueError(
            f"{path} has {_kind(arrays, name)} for {name}, the network has {_kind(variables, name)}"
            f"; {len(differing)} such differences"
        )
    for key, variable in variables.items():
        variable[...] = jnp.asarray(arrays[key])
    return small


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The configuration and the arrays."""
    arrays: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        with _module("safetensors").safe_open(path, framework="numpy") as file:
            written = (file.metadata() or {}).get(_KEY)
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    else:
        file = path / "configuration.json"
        written = file.read_text() if file.exists() else None
        if written is not None:
            with _module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore(path.absolute())
    if written is None:
        raise ValueError(f"{path} was not saved by pallas_kernels.compress.save")
    return written, arrays


def _variables(model: nnx.Module) -> dict[str, Any]:
    """All of them but empty ones, which Orbax refuses, and the states of random streams, by path."""
    return by_path(
        model, lambda v: isinstance(v, nnx.Variable) and not isinstance(v, nnx.RngState) and v[...].size
    )


def _kind(arrays: dict[str, Any], key: str) -> str | None:
    return f"{arrays[key].dtype} {list(arrays[key].shape)}" if key in arrays else None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"safetensors": "safetensors", "orbax": "orbax-checkpoint"}[name.split(".")[0]]
        raise ModuleNotFoundError(
            f'this needs {package}, which is not installed: pip install "pallas-kernels[compress]"', name=name
        ) from None
