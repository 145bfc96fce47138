"""Compress the linear layers of a trained network: dense matrices become Monarch, BLAST or low-rank ones.

`compress` returns a copy of a network and what became of each layer, `restore` goes back to dense matrices, `save` and
`load` keep a compressed network together with its configuration.
"""

import fnmatch
import functools
import importlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.nn import BlastLinear, LowRankLinear, MonarchLinear
from pallas_kernels.progress import Progress

LAYERS = {"monarch": MonarchLinear, "blast": BlastLinear, "low_rank": LowRankLinear}
# Of the descent that improves a BLAST matrix.
STEPS, DAMPING = 60, 0.1
_CONFIGURATION = "pallas_kernels.compress"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    path: of the layer in the network, with dots. rank, blocks: as in the layer's class.
    parameters, dense_parameters: of the matrix, which takes two operations a token for each of them.
    bytes, dense_bytes: that the matrix takes.
    relative_error: of the matrix, in the Frobenius norm; of a data-aware compression, weighted by the activations.
    squared_norm: of the matrix, weighted alike.
    """

    path: str
    method: str
    rank: int
    blocks: int
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    relative_error: float
    squared_norm: float

    @property
    def flops(self) -> int:
        """Operations a token."""
        return 2 * self.parameters

    @property
    def dense_flops(self) -> int:
        return 2 * self.dense_parameters


@dataclass(frozen=True)
class Report:
    """What became of a network. `str` of it is a table."""

    layers: tuple[LayerReport, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Parameters kept of the matrices that were compressed."""
        return self.parameters / self.dense_parameters

    @property
    def relative_error(self) -> float:
        """Of all matrices together."""
        errors = sum(layer.relative_error**2 * layer.squared_norm for layer in self.layers)
        return math.sqrt(errors / (sum(layer.squared_norm for layer in self.layers) or 1.0))

    def __str__(self) -> str:
        head = (
            "layer",
            "method",
            "blocks",
            "rank",
            "parameters",
            "of dense",
            "FLOPs/token",
            "bytes",
            "error",
        )
        rows: list[tuple[str, ...]] = [head]
        for a in self.layers:
            share = f"{a.parameters / a.dense_parameters:.0%}"
            numbers = (a.blocks, a.rank, f"{a.parameters:,}", share, f"{a.flops:,}", f"{a.bytes:,}")
            rows.append((a.path, a.method, *map(str, numbers), f"{a.relative_error:.4f}"))
        total = (f"{self.parameters:,}", f"{self.ratio:.0%}", f"{2 * self.parameters:,}")
        size = f"{sum(a.bytes for a in self.layers):,}"
        rows.append(("all", "", "", "", *total, size, f"{self.relative_error:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def compress(
    model: nnx.Module,
    method: str = "monarch",
    *,
    ratio: float | None = None,
    rank: int | None = None,
    error: float | None = None,
    blocks: int = 4,
    pattern: str | Sequence[str] = "*",
    calibration: Iterable[Any] | None = None,
) -> tuple[nnx.Module, Report]:
    """A copy of a network whose linear layers have smaller matrices.

    Each matrix is replaced by the nearest one of its kind that the budget allows: for low rank and Monarch by singular
    values, which is optimal; for BLAST by a descent that starts from the better of these two and never gets worse.

    Args:
      model: any network with `nnx.Linear`s. It is left as it is.
      method: "monarch", "blast" or "low_rank".
      ratio: parameters to keep of each matrix, 0 to 1. Give one of ratio, rank and error.
      rank: as in the layers' classes: of a block for Monarch, of the matrix else.
      error: the largest relative error of a matrix, in the Frobenius norm.
      blocks: along each side of a matrix; without a part in "low_rank".
      pattern: which layers, by their path such as "blocks.0.mlp.fc1", with `*` and `?` as in a shell; or several.
      calibration: batches that `model` takes. Then errors are weighted by the root mean square of the activations
        that each input of a layer has.

    Returns:
      The compressed network, whose layers hold factors in the dtype of their matrices, and a report.

    Raises:
      ValueError: not one budget; no layer matches; features that don't divide into blocks; a budget that allows
        no rank at all, or a rank above that of a full block.

    Example:
      >>> from flax import nnx
      >>> from pallas_kernels.compress import compress
      >>> model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu)
      >>> small, report = compress(model, "low_rank", ratio=0.5)
      >>> report.parameters, report.dense_parameters
      (4032, 8192)

    Sources: Dao et al., Monarch, arXiv:2204.00595, section 3.2; Lee et al., BLAST, arXiv:2410.21262, section 3.2.
    """
    if method not in LAYERS:
        raise ValueError(f"got {method=}, expected one of {', '.join(LAYERS)}")
    if sum(budget is not None for budget in (ratio, rank, error)) != 1:
        raise ValueError(f"got {ratio=}, {rank=}, {error=}, expected one of them")
    found = _linears(model, pattern)
    weights = _activations(model, list(found), calibration) if calibration is not None else {}
    blocks = 1 if method == "low_rank" else blocks
    jobs = []
    for path, linear in found.items():
        try:
            _block(linear, blocks)
            matrix = np.asarray(linear.kernel[...], np.float64) * weights.get(path, np.ones((1, 1)))
            chosen = _rank(matrix, method, blocks, ratio, rank, error)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        jobs.append((path, linear, matrix, chosen))

    small, rows = nnx.clone(model), []
    with Progress(len(jobs), "compress") as progress:
        for path, linear, matrix, chosen in jobs:
            factors = factorize(matrix, method, rank=chosen, blocks=blocks)
            layer = _layer(method, linear, chosen, blocks)
            difference = matrix - _to_dense(factors)
            scale = weights.get(path, np.ones((1, 1)))
            dtype = linear.kernel[...].dtype
            for name, factor in _unweighted(layer, factors, scale).items():
                setattr(layer, name, nnx.Param(jnp.asarray(factor, dtype)))
            _replace(small, path, layer)
            rows.append(_report(path, method, layer, matrix, difference))
            progress.advance(path)
    return small, Report(tuple(rows))


def restore(model: nnx.Module) -> nnx.Module:
    """A copy of a compressed network with dense layers again, which compute the same.

    Raises:
      ValueError: there is no compressed layer.
    """
    found = _factored(model)
    if not found:
        raise ValueError("got a network without a compressed layer")
    dense = nnx.clone(model)
    for path, layer in found.items():
        matrix = layer.to_dense()
        linear = nnx.Linear(
            *matrix.shape, use_bias=layer.bias is not None, dtype=layer.dtype, param_dtype=matrix.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        linear.kernel = nnx.Param(matrix)
        if layer.bias is not None:
            linear.bias = nnx.Param(layer.bias[...])
        _replace(dense, path, linear)
    return dense


def factorize(
    matrix: Any, method: str, *, rank: int, blocks: int = 1, steps: int = STEPS, seed: int | None = None
) -> dict[str, np.ndarray]:
    """The factors of a matrix, by the names that the layers have for them.

    Args:
      matrix: (inputs, outputs).
      method: "monarch", "blast" or "low_rank".
      rank: of a block for Monarch, of the matrix else.
      blocks: along each side.
      steps: of BLAST's descent.
      seed: start BLAST's descent from random factors instead of the better of low rank and Monarch.

    Returns:
      Arrays of float64.
    """
    w = np.asarray(matrix, np.float64)
    if method == "low_rank":
        return dict(zip("uv", _low_rank(w, rank), strict=True))
    if method == "monarch":
        return dict(zip(("w1", "w2"), _monarch(w, rank, blocks), strict=True))
    return dict(zip("usv", _blast(w, rank, blocks, steps, seed), strict=True))


def save(model: nnx.Module, path: str | Path) -> None:
    """Write a compressed network's parameters and which layers it has.

    Args:
      model: from `compress`.
      path: of a file that ends in ".safetensors", or of a new folder for Orbax.

    Raises:
      ModuleNotFoundError: safetensors or orbax-checkpoint is not installed.
    """
    path, arrays = Path(path), {k: np.asarray(v[...]) for k, v in _variables(model).items()}
    configuration = json.dumps(_configuration(model))
    if path.suffix == ".safetensors":
        numpy = _module("safetensors.numpy")
        numpy.save_file(arrays, path, metadata={_CONFIGURATION: configuration})
        return
    with _module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)
    (path / "configuration.json").write_text(configuration)


def load(model: nnx.Module, path: str | Path) -> nnx.Module:
    """A compressed network as it was saved.

    Args:
      model: a dense network of the same kind, as it was before `compress`. It is left as it is.
      path: as given to `save`.

    Raises:
      ValueError: the layers or arrays saved are not those of such a network.
      ModuleNotFoundError: safetensors or orbax-checkpoint is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with _module("safetensors").safe_open(path, framework="numpy") as file:
            configuration = (file.metadata() or {}).get(_CONFIGURATION)
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if configuration is None:
            raise ValueError(f"{path} was not saved by pallas_kernels.compress.save")
    else:
        if not (path / "configuration.json").exists():
            raise ValueError(f"{path} was not saved by pallas_kernels.compress.save")
        with _module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path.absolute())
        configuration = (path / "configuration.json").read_text()
    small, linears = nnx.clone(model), _all_linears(model)
    for name, layer in json.loads(configuration).items():
        linear = linears.get(name)
        features = None if linear is None else [linear.in_features, linear.out_features]
        if features != layer["features"]:
            raise ValueError(
                f"{path} has a layer {name} of {layer['features']} features, the network has {features}"
            )
        _replace(small, name, _layer(layer["method"], linear, layer["rank"], layer["blocks"]))
    variables = _variables(small)
    if differing := {k for k in {*variables, *arrays} if _shape(variables, k) != _shape(arrays, k)}:
        name = min(differing)
        raise ValueError(
            f"{path} has {_shape(arrays, name)} for {name}, the network has {_shape(variables, name)}"
            f"; {len(differing)} such differences"
        )
    for key, variable in variables.items():
        variable[...] = jnp.asarray(arrays[key])
    return small


def _low_rank(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """u (r, outputs), v (r, inputs) of the best approximation, which shares the singular values evenly."""
    left, values, right = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(values[..., :rank, None])
    return root * right[..., :rank, :], root * left[..., :rank].swapaxes(-1, -2)


def _monarch(w: np.ndarray, rank: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Every block's best approximation."""
    u, v = _low_rank(_cut(w, blocks), rank)  # of block (k, j): (k, j, t, q) and (k, j, t, p)
    return v.reshape(blocks, -1, v.shape[-1]), u.swapaxes(0, 1).reshape(blocks, -1, u.shape[-1])


def _blast(
    w: np.ndarray, rank: int, blocks: int, steps: int, seed: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damped Newton steps in one factor at a time; each of these problems is quadratic."""
    scale = w.std() or 1.0
    targets = _cut(w / scale, blocks).transpose(1, 0, 3, 2)  # (j, k, q, p)
    if seed is None:
        u, s, v = min(_starts(w / scale, rank, blocks), key=lambda f: np.linalg.norm(targets - _expanded(*f)))
    else:
        random = np.random.default_rng(seed)
        _, _, q, p = targets.shape
        small = 1e-3 / math.sqrt(rank)
        u, v = (small * random.normal(size=(blocks, rank, size)) for size in (q, p))
        s = random.normal(size=(blocks, blocks, rank))
    best, least = (u, s, v), np.linalg.norm(targets - _expanded(u, s, v))
    for step in range(steps):
        # From a good start whole steps never get worse; a random one needs the longer steps that shrink.
        eta = 1.0 if seed is None else 2 * (1 - step / steps)
        u = u - eta * _newton_bases(targets, u, s, v)
        v = v - eta * _newton_bases(targets.transpose(1, 0, 3, 2), v, s.swapaxes(0, 1), u)
        s = s - eta * _newton_mixing(targets, u, s, v)
        error = np.linalg.norm(targets - _expanded(u, s, v))
        if not np.isfinite(error):
            break
        if error < least:
            best, least = (u, s, v), error
    u, s, v = best
    return u, s * scale, v


def _newton_bases(targets: np.ndarray, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    error = _expanded(u, s, v) - targets
    mixed = s[..., None] * v  # (j, k, r, p)
    gradient = np.einsum("jkqp,jkrp->jrq", error, mixed, optimize=True)
    curvature = np.einsum("jkrp,jkcp->jrc", mixed, mixed, optimize=True)
    return _damped_solve(curvature, gradient, error)


def _newton_mixing(targets: np.ndarray, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    error = _expanded(u, s, v) - targets
    gradient = np.einsum("jrq,jkqp,krp->jkr", u, error, v, optimize=True)
    curvature = (u @ u.swapaxes(1, 2))[:, None] * (v @ v.swapaxes(1, 2))[None]
    return _damped_solve(curvature, gradient[..., None], error)[..., 0]


def _damped_solve(curvature: np.ndarray, gradient: np.ndarray, error: np.ndarray) -> np.ndarray:
    damping = DAMPING * np.linalg.norm(error) + np.finfo(float).tiny ** 0.5
    identity = np.eye(curvature.shape[-1])
    return np.linalg.solve(curvature + (damping + 1e-14 * np.abs(curvature).max()) * identity, gradient)


def _starts(w: np.ndarray, rank: int, blocks: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The BLAST matrices that the low-rank and the Monarch matrix of as many parameters are."""
    b, most = blocks, min(w.shape)
    u, v = _low_rank(w, min(rank, most))
    u, v = (np.pad(f, ((0, rank - len(f)), (0, 0))).reshape(rank, b, -1).swapaxes(0, 1) for f in (u, v))
    starts = [(u, np.ones((b, b, rank)), v)]
    t = min(rank // b, most // b)
    if t:
        # Block (j, k) takes ranks (j + k) % b of its row and its column, which no other block there does.
        w1, w2 = _monarch(w, t, b)
        u, v = np.zeros((b, rank, w.shape[1] // b)), np.zeros((b, rank, w.shape[0] // b))
        s = np.zeros((b, b, rank))
        for j in range(b):
            for k in range(b):
                ranks = slice((j + k) % b * t, ((j + k) % b + 1) * t)
                u[j, ranks], v[k, ranks] = w2[j, k * t : (k + 1) * t], w1[k, j * t : (j + 1) * t]
                s[j, k, ranks] = 1
        starts.append((u, s, v))
    return starts


def _expanded(u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The blocks (j, k, q, p)."""
    return np.einsum("jrq,jkr,krp->jkqp", u, s, v, optimize=True)


def _cut(w: np.ndarray, blocks: int) -> np.ndarray:
    """(inputs, outputs) as blocks (k, j, p, q)."""
    return w.reshape(blocks, w.shape[0] // blocks, blocks, -1).swapaxes(1, 2)


def _rank(
    matrix: np.ndarray, method: str, blocks: int, ratio: float | None, rank: int | None, error: float | None
) -> int:
    """What the budget allows."""
    inputs, outputs = matrix.shape
    full = min(inputs, outputs) // (blocks if method == "monarch" else 1)
    if rank is None and ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"got {ratio=}, expected more than 0, and at most 1")
        each = _parameters(method, inputs, outputs, 1, blocks)
        rank = min(full, math.floor(ratio * inputs * outputs / each))
        if not rank:
            raise ValueError(
                f"{ratio=} leaves {ratio * inputs * outputs:.0f} parameters, and rank 1 takes {each}"
            )
    elif rank is None:
        assert error is not None
        rank = _rank_for(matrix, method, blocks, error)
    if not 1 <= rank <= full:
        raise ValueError(f"got {rank=}, expected 1 to {full}, the rank of a full block")
    return rank


def _rank_for(matrix: np.ndarray, method: str, blocks: int, error: float) -> int:
    """The least rank of that error; for BLAST, where its descent starts."""
    if not 0 <= error < 1:
        raise ValueError(f"got {error=}, expected 0 or more, and less than 1")

    def least(stack: np.ndarray) -> int:
        values = np.linalg.svd(stack, compute_uv=False) ** 2
        kept = np.cumsum(values.reshape(-1, values.shape[-1]).sum(0))
        allowed = max(error**2, 1e-30) * kept[-1]
        return 1 + int(np.argmax(kept[-1] - kept <= allowed))

    if method == "low_rank":
        return least(matrix)
    in_blocks = least(_cut(matrix, blocks))
    return in_blocks if method == "monarch" else min(least(matrix), in_blocks * blocks)


def _parameters(method: str, inputs: int, outputs: int, rank: int, blocks: int) -> int:
    per_rank = {
        "low_rank": inputs + outputs,
        "monarch": blocks * (inputs + outputs),
        "blast": inputs + outputs + blocks**2,
    }
    return rank * per_rank[method]


def _report(path: str, method: str, layer: Any, matrix: np.ndarray, difference: np.ndarray) -> LayerReport:
    factors = [getattr(layer, name)[...] for name in layer.FACTORS]
    size, norm = sum(f.size for f in factors), float(np.linalg.norm(matrix))
    return LayerReport(
        path=path,
        method=method,
        rank=layer.rank,
        blocks=layer.blocks,
        parameters=size,
        dense_parameters=matrix.size,
        bytes=sum(f.nbytes for f in factors),
        dense_bytes=matrix.size * factors[0].dtype.itemsize,
        relative_error=float(np.linalg.norm(difference)) / (norm or 1.0),
        squared_norm=norm**2,
    )


def _to_dense(factors: dict[str, np.ndarray]) -> np.ndarray:
    """What the float64 factors multiply to, as (inputs, outputs)."""
    if "s" in factors:
        blocks = _expanded(factors["u"], factors["s"], factors["v"]).transpose(1, 3, 0, 2)
    elif "w1" in factors:
        b = len(factors["w1"])
        w1, w2 = (factors[name].reshape(b, b, -1, factors[name].shape[-1]) for name in ("w1", "w2"))
        blocks = np.einsum("kjtp,jktq->kpjq", w1, w2, optimize=True)
    else:
        return factors["v"].T @ factors["u"]
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def _unweighted(layer: Any, factors: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The factors of the matrix itself: the first one meets the inputs, and has lost their weights again."""
    first = "w1" if "w1" in factors else "v"
    columns = np.broadcast_to(weights[:, 0], (layer.in_features,))
    if factors[first].ndim == 3:
        columns = columns.reshape(layer.blocks, 1, -1)
    return {**factors, first: factors[first] / columns}


def _layer(method: str, linear: Any, rank: int, blocks: int) -> Any:
    """In place of a linear layer, with its bias, and with zeros for factors: drawing random ones takes time."""
    options = {} if method == "low_rank" else {"blocks": blocks}
    dtype = linear.kernel[...].dtype
    layer: Any = nnx.eval_shape(
        lambda: LAYERS[method](
            linear.in_features, linear.out_features, rank=rank, use_bias=linear.bias is not None, dtype=linear.dtype,
            param_dtype=dtype, rngs=nnx.Rngs(0), **options,
        )
    )  # fmt: skip
    for name in layer.FACTORS:
        setattr(layer, name, nnx.Param(jnp.asarray(np.zeros(getattr(layer, name).shape, dtype))))
    if linear.bias is not None:
        layer.bias = nnx.Param(linear.bias[...])
    return layer


def _block(linear: Any, blocks: int) -> None:
    if blocks < 1 or linear.in_features % blocks or linear.out_features % blocks:
        raise ValueError(
            f"{linear.in_features} to {linear.out_features} features don't divide into {blocks} blocks; give other "
            "`blocks`, or a `pattern` without this layer"
        )


def _linears(model: nnx.Module, pattern: str | Sequence[str]) -> dict[str, Any]:
    found, patterns = _all_linears(model), [pattern] if isinstance(pattern, str) else list(pattern)
    chosen = {path: m for path, m in found.items() if any(fnmatch.fnmatchcase(path, p) for p in patterns)}
    if not chosen:
        raise ValueError(f"no nnx.Linear matches {pattern!r}; there are {', '.join(found) or 'none'}")
    return chosen


def _all_linears(model: nnx.Module) -> dict[str, Any]:
    return _modules(model, nnx.Linear)


def _factored(model: nnx.Module) -> dict[str, Any]:
    return _modules(model, tuple(LAYERS.values()))


def _modules(model: nnx.Module, kinds: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): m for path, m in nnx.iter_graph(model) if isinstance(m, kinds)}


def _replace(model: nnx.Module, path: str, layer: Any) -> None:
    *parents, last = path.split(".")

    def child(parent: Any, name: str) -> Any:
        return parent[int(name)] if name.isdigit() else getattr(parent, name)

    parent = functools.reduce(child, parents, model)
    if last.isdigit():
        parent[int(last)] = layer
    else:
        setattr(parent, last, layer)


class _Observed(nnx.Module):
    """A linear layer that sums up the squares of its inputs."""

    def __init__(self, linear: nnx.Linear):
        self.linear = linear
        self.squares = nnx.Variable(jnp.zeros(linear.in_features))
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        self.squares[...] = self.squares[...] + jnp.sum(rows**2, 0)
        self.count[...] = self.count[...] + len(rows)
        return self.linear(x)


def _activations(model: nnx.Module, paths: list[str], calibration: Iterable[Any]) -> dict[str, np.ndarray]:
    """The root mean square of each input of each layer, as a column; a dead input counts a little."""
    watched = nnx.clone(model)
    linears = _all_linears(watched)
    for path in paths:
        _replace(watched, path, _Observed(linears[path]))
    run = nnx.jit(lambda model, batch: model(batch))
    for batch in calibration:
        run(watched, batch)
    weights = {}
    for path, m in _modules(watched, _Observed).items():
        count = float(m.count[...])
        if not count:
            raise ValueError(f"{path}: got no activations from the calibration batches")
        rms = np.sqrt(np.asarray(m.squares[...], np.float64) / count)
        weights[path] = np.maximum(rms, 1e-3 * rms.max() or 1.0)[:, None]
    return weights


class _Saved(NamedTuple):
    method: str
    features: list[int]
    rank: int
    blocks: int


def _configuration(model: nnx.Module) -> dict[str, dict[str, Any]]:
    methods = {layer: method for method, layer in LAYERS.items()}
    return {
        path: _Saved(methods[type(m)], [m.in_features, m.out_features], m.rank, m.blocks)._asdict()
        for path, m in _factored(model).items()
    }


def _variables(model: nnx.Module) -> dict[str, Any]:
    """All of them but the states of random streams, by path."""
    return {
        ".".join(map(str, path)): v
        for path, v in nnx.iter_graph(model)
        if isinstance(v, nnx.Variable) and not isinstance(v, nnx.RngState)
    }


def _shape(arrays: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(arrays[key].shape) if key in arrays else None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"safetensors": "safetensors", "orbax": "orbax-checkpoint"}[name.split(".")[0]]
        raise ModuleNotFoundError(
            f'this needs {package}, which is not installed: pip install "pallas-kernels[compress]"', name=name
        ) from None
