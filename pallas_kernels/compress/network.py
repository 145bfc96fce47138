"""Networks whose dense layers are replaced by those of smaller matrices, and back."""

import fnmatch
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from pallas_kernels.compress import factors as factorization
from pallas_kernels.compress.report import LayerReport, Report
from pallas_kernels.nn import BlastLinear, DotGeneral, LowRankLinear, MonarchLinear
from pallas_kernels.nn.dot_general import like
from pallas_kernels.ops import blast_matmul, low_rank_matmul, monarch_matmul
from pallas_kernels.progress import Progress

LAYERS = {"monarch": MonarchLinear, "blast": BlastLinear, "low_rank": LowRankLinear}
_OPERATORS = {"monarch": monarch_matmul, "blast": blast_matmul, "low_rank": low_rank_matmul}
# Of a layer: what `configuration` gives and `with_layers` needs.
_CONFIGURATION = ("method", "features", "rank", "blocks")
_PRODUCTS = {method: getattr(operator, f"{method}_matmul") for method, operator in _OPERATORS.items()}


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
    steps: int = factorization.STEPS,
) -> tuple[nnx.Module, Report]:
    """A copy of a network whose linear layers have smaller matrices.

    Each matrix is replaced by the nearest one of its kind that the budget allows: for low rank and Monarch by singular
    values, which is optimal; for BLAST by a descent that starts from the better of these two, of as many ranks, and
    never gets worse. `nnx.Linear` becomes a layer of `pallas_kernels.nn`; one with a precision, `promote_dtype` or
    `preferred_element_type` of its own, and `nnx.LinearGeneral`, of which `nnx.MultiHeadAttention` is made, get factors
    by `pallas_kernels.nn.DotGeneral`. Factors are variables of the kernel's type and metadata, but for its sharding.
    Layers that share a kernel share its factors, and are one layer of the report.

    Args:
      model: any network of such layers. It is left as it is.
      method: "monarch", "blast" or "low_rank".
      ratio: parameters to keep of each matrix, 0 to 1. Give one of ratio, rank and error.
      rank: as in the layers' classes: of a block for Monarch, of the matrix else.
      error: the largest relative error of a matrix, in the Frobenius norm. A layer stays dense where factors within it
        would take at least as many parameters as the matrix. BLAST takes the rank at which its descent starts within
        the error, so that it ends below it.
      blocks: along each side of a matrix; without a part in "low_rank".
      pattern: which layers, by their path such as "blocks.0.mlp.fc1", with `*` and `?` as in a shell; or several,
        each of which matches a layer.
      calibration: batches that `model` takes; one that is a tuple is its positional arguments. Then errors are weighted
        by the root mean square of the activations that each input of a layer has.
      steps: of BLAST's descent.

    Returns:
      The compressed network, whose layers hold factors in the dtype of their matrices, and a report.

    Raises:
      TypeError: a budget, blocks or steps that are no such numbers; a complex matrix.
      ValueError: not one budget; a pattern that no layer matches; features that don't divide into blocks; a budget
        that allows no rank at all, or a rank above that of a full block; fewer than 0 steps; a stack of matrices, or a
        layer in a tuple; a kernel that is shared with what stays; NaN or infinity in a matrix or in activations; keys
        with dots that give two layers one path.

    Example:
      >>> from flax import nnx
      >>> from pallas_kernels.compress import compress
      >>> model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu)
      >>> small, report = compress(model, "low_rank", ratio=0.5)
      >>> report.parameters, report.dense_parameters
      (4032, 8192)

    Sources: Dao et al., Monarch, arXiv:2204.00595, section 3.2; Lee et al., BLAST, arXiv:2410.21262, section 3.2.
    """
    if sum(budget is not None for budget in (ratio, rank, error)) != 1:
        raise ValueError(f"got {ratio=}, {rank=}, {error=}, expected one of them")
    if error is not None:
        factorization.check_numbers(numbers.Real, error=error)
        if not 0 <= error < 1:
            raise ValueError(f"got {error=}, expected 0 or more, and less than 1")
    factorization.check_steps(steps)
    blocks = 1 if method == "low_rank" else blocks
    found = _matching(model, pattern)
    tied = _tied(model, found)
    ranks = {}
    for path, linear in found.items():
        try:
            ranks[path] = _rank(linear, method, blocks, ratio, rank)
        except (TypeError, ValueError) as e:
            raise type(e)(f"{path}: {e}") from None
    weights = _activations(model, found, tied, calibration) if calibration is not None else {}

    replaced, rows, each = {}, [], 1 + (steps if method == "blast" else 0)
    with Progress(each * len(tied), "compress") as progress:
        for path, *others in tied:
            linear, advance = found[path], functools.partial(progress.advance, path)
            scale = np.ones((1, 1)) if calibration is None else weights[path]
            matrix, (inputs, outputs) = _matrix(linear) * scale, _features(linear)
            r = ranks[path] or factorization.least_rank(matrix, method, blocks, error or 0.0)
            row = _unchanged(path, linear, matrix)
            if error is None or factorization.parameters(method, inputs, outputs, r, blocks) < matrix.size:
                nearest = factorization.factorize(
                    matrix, method, rank=r, blocks=blocks, steps=steps, on_step=advance
                )
                factors = _variables(linear.kernel, factorization.scale_inputs(nearest, 1 / scale))
                row = replace(row, method=method, rank=r, blocks=blocks, **_measured(factors, matrix, scale))
                replaced |= {p: _factored(found[p], method, factors) for p in (path, *others)}
            rows.append(row)
            # A layer that stays dense takes no steps, and a descent may end early.
            progress.done = each * len(rows) - 1
            advance()
    return _copy_with(model, replaced), Report(tuple(rows))


def restore(model: nnx.Module) -> nnx.Module:
    """A copy of a compressed network with dense layers again, which compute the same.

    Layers that share factors share a kernel.

    Raises:
      ValueError: there is no compressed layer.
    """
    found = _compressed(model)
    if not found:
        raise ValueError("got a network without a compressed layer")
    kernels: dict[Any, nnx.Variable] = {}
    return _copy_with(model, {path: _dense(*parts, kernels) for path, parts in found.items()})


def configuration(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Of each compressed layer what `with_layers` needs, by path."""
    found = {}
    for path, (layer, method, factors) in _compressed(model).items():
        rank, blocks = factorization.rank_and_blocks(factors)
        found[path] = dict(zip(_CONFIGURATION, (method, _features(layer), rank, blocks), strict=True))
    return found


def with_layers(model: nnx.Module, layers: Any) -> nnx.Module:
    """A copy of a dense network with compressed layers of zeros, which `configuration` gave.

    Raises:
      ValueError: it has no such dense layer, or `layers` are none; the message goes on from "... has".
    """
    if not isinstance(layers, dict):
        raise ValueError(f"a configuration of type {type(layers).__name__}, expected a dict of layers")
    linears: dict[str, Any] = _linears(model)
    replaced, variables = {}, {}
    for path, layer in layers.items():
        if not (isinstance(layer, dict) and layer.keys() >= {*_CONFIGURATION}):
            raise ValueError(f"{layer!r} for a layer {path}, expected {', '.join(_CONFIGURATION)}")
        method, expected, rank, blocks = (layer[key] for key in _CONFIGURATION)
        features = _features(linears[path]) if path in linears else None
        if features is None or features != expected:
            raise ValueError(f"a layer {path} of {expected} features, the network has {features}")
        inputs, outputs = features
        try:
            factorization.check(method, inputs, outputs, blocks, rank)
        except (TypeError, ValueError) as e:
            raise ValueError(f"a layer {path} of another kind: {e}") from None
        kernel = linears[path].kernel
        if id(kernel) not in variables:
            shapes = factorization.shapes(method, inputs, outputs, rank, blocks)
            variables[id(kernel)] = _variables(kernel, {k: np.zeros(shape) for k, shape in shapes.items()})
        replaced[path] = _factored(linears[path], method, variables[id(kernel)])
    return _copy_with(model, replaced)


def _linears(model: nnx.Module) -> dict[str, Any]:
    """Layers that multiply by their kernel, and do nothing else: subclasses may."""
    return {
        path: m
        for path, m in _modules(model, (nnx.Linear, nnx.LinearGeneral)).items()
        if type(m) in (nnx.Linear, nnx.LinearGeneral)
        and m.dot_general in (None, jax.lax.dot_general)
        and getattr(m, "dot_general_cls", None) is None
    }


def _compressed(model: nnx.Module) -> dict[str, tuple[Any, str, dict[str, nnx.Variable]]]:
    """Of each compressed layer itself, how it was compressed, and its factors."""
    found = {}
    for method, kind in LAYERS.items():
        for path, layer in _modules(model, kind).items():
            found[path] = layer, method, {name: getattr(layer, name) for name in layer.FACTORS}
    methods = {product: method for method, product in _PRODUCTS.items()}
    for path, layer in _modules(model, (nnx.Linear, nnx.LinearGeneral)).items():
        hook = layer.dot_general
        if isinstance(hook, DotGeneral) and hook.product in methods:
            factors = {name: getattr(hook, name) for name in hook.names}
            found[path] = layer, methods[hook.product], factors
    return found


def by_path(model: nnx.Module, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """The parts that are wanted, by their paths with dots."""
    found = {}
    for keys, part in nnx.iter_graph(model):
        if wanted(part):
            path = ".".join(map(str, keys))
            if path in found:
                raise ValueError(f"got two parts at {path}, expected a path of its own for each")
            found[path] = part
    return found


def _modules(model: nnx.Module, kinds: Any) -> dict[str, Any]:
    return by_path(model, lambda part: isinstance(part, kinds))


def _matching(model: nnx.Module, pattern: str | Sequence[str]) -> dict[str, Any]:
    found, patterns = _linears(model), [pattern] if isinstance(pattern, str) else list(pattern)
    chosen = {path: m for path, m in found.items() if any(fnmatch.fnmatchcase(path, p) for p in patterns)}
    unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(path, p) for path in found)]
    if unmatched or not patterns:
        wanted = ", ".join(map(repr, unmatched or [pattern]))
        raise ValueError(
            f"no nnx.Linear or nnx.LinearGeneral matches {wanted}; there are {', '.join(found) or 'none'}"
        )
    # What can't be replaced is refused before factors are sought, which may take long.
    _copy_with(model, dict.fromkeys(chosen, nnx.Module()))
    return chosen


def _tied(model: nnx.Module, chosen: Mapping[str, Any]) -> list[list[str]]:
    """The paths of these layers, those that share a kernel together; it must come apart from nothing else."""
    tied: dict[int, list[str]] = {}
    for path, linear in chosen.items():
        tied.setdefault(id(linear.kernel), []).append(path)
    for path, m in _modules(model, nnx.Pytree).items():
        for value in vars(m).values():
            first = tied.get(id(value), [path])[0]
            if path != first and (path not in chosen or _features(m) != _features(chosen[first])):
                raise ValueError(
                    f"{first}: got a kernel that {path or 'the network'} shares, expected both to be layers that "
                    "`pattern` matches, of the same features"
                )
    return list(tied.values())


def _copy_with(model: nnx.Module, layers: Mapping[str, Any]) -> nnx.Module:
    """The layers at these paths are others, and wherever else the network shares them."""
    copy = nnx.clone(model)
    old = _modules(copy, nnx.Module)
    new = {id(old[path]): layer for path, layer in layers.items()}
    if id(copy) in new:
        return new[id(copy)]
    for _, node in list(nnx.iter_graph(copy)):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if id(value) in new:
                    setattr(node, name, new[id(value)])
        elif isinstance(node, list | dict):
            for key, value in enumerate(node) if isinstance(node, list) else list(node.items()):
                if id(value) in new:
                    node[key] = new[id(value)]
    left = {id(part) for _, part in nnx.iter_graph(copy)}
    for path in layers:
        if id(old[path]) in left:
            raise ValueError(
                f"{path}: got a layer in a tuple or the like, expected a list, a dict or a module"
            )
    return copy


def _features(layer: Any) -> list[int]:
    """Inputs and outputs of its matrix."""
    return [int(np.prod(layer.in_features)), int(np.prod(layer.out_features))]


def _matrix(linear: Any) -> np.ndarray:
    return factorization.real(linear.kernel[...]).reshape(_features(linear))


def _rank(linear: Any, method: str, blocks: int, ratio: float | None, rank: int | None) -> int | None:
    """What the budget allows; None, if that takes the singular values."""
    inputs, outputs = _features(linear)
    if linear.kernel[...].size != inputs * outputs:
        raise ValueError(
            f"got a kernel of shape {linear.kernel[...].shape}, expected one matrix of {inputs} to {outputs}"
        )
    _matrix(linear)  # It refuses complex numbers, NaN and infinity.
    factorization.check(method, inputs, outputs, blocks, 1 if rank is None else rank)
    if ratio is not None:
        factorization.check_numbers(numbers.Real, ratio=ratio)
        if not 0 < ratio <= 1:
            raise ValueError(f"got {ratio=}, expected more than 0, and at most 1")
        each = factorization.parameters(method, inputs, outputs, 1, blocks)
        full = factorization.full_rank(method, inputs, outputs, blocks)
        rank = min(full, math.floor(ratio * inputs * outputs / each))
        if not rank:
            raise ValueError(
                f"{ratio=} leaves {ratio * inputs * outputs:.0f} parameters, and rank 1 takes {each}"
            )
    return rank


def _unchanged(path: str, linear: Any, matrix: np.ndarray) -> LayerReport:
    """Of a layer that stays dense, whose matrix is weighted."""
    kernel, squared_norm = linear.kernel[...], float(np.linalg.norm(matrix)) ** 2
    sizes = kernel.size, kernel.size, kernel.nbytes, kernel.nbytes
    return LayerReport(path, "dense", min(matrix.shape), 1, *sizes, 0.0, squared_norm)


def _measured(factors: Mapping[str, nnx.Variable], matrix: np.ndarray, scale: np.ndarray) -> dict[str, Any]:
    """What the report says of factors, where errors count in proportion to `scale`, a number for each input."""
    arrays = {name: factor[...] for name, factor in factors.items()}
    stored = factorization.to_dense({name: np.asarray(a, np.float64) for name, a in arrays.items()})
    return {
        "parameters": sum(a.size for a in arrays.values()),
        "bytes": sum(a.nbytes for a in arrays.values()),
        "relative_error": float(np.linalg.norm(matrix - stored * scale) / (np.linalg.norm(matrix) or 1.0)),
    }


def _variables(kernel: nnx.Variable, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Factors as what the kernel is, in its dtype."""
    return {name: like(kernel, jnp.asarray(f, kernel[...].dtype)) for name, f in factors.items()}


def _factored(linear: Any, method: str, variables: Mapping[str, Any]) -> Any:
    """In place of a dense layer, with its bias."""
    # Options that the layers of pallas_kernels.nn don't have.
    options = linear.precision, linear.promote_dtype, getattr(linear, "preferred_element_type", None)
    if isinstance(linear, nnx.LinearGeneral) or options != (None, promote_dtype, None):
        layer = nnx.clone(linear)
        DotGeneral(_PRODUCTS[method], **variables).install(layer)
        return layer
    rank, blocks = factorization.rank_and_blocks(variables)
    options = {} if method == "low_rank" else {"blocks": blocks}
    # Drawing random factors first would take time.
    layer: Any = nnx.eval_shape(
        lambda: LAYERS[method](
            linear.in_features, linear.out_features, rank=rank, use_bias=linear.bias is not None, dtype=linear.dtype,
            param_dtype=linear.kernel[...].dtype, rngs=nnx.Rngs(0), **options,
        )
    )  # fmt: skip
    for name, variable in variables.items():
        setattr(layer, name, variable)
    if linear.bias is not None:
        layer.bias = linear.bias.copy()
    return layer


def _dense(layer: Any, method: str, factors: Mapping[str, nnx.Variable], kernels: dict[Any, Any]) -> Any:
    """In place of a compressed layer, with its bias; `kernels` keeps those of factors that others may share."""
    matrix = _OPERATORS[method].to_dense(**{name: factor[...] for name, factor in factors.items()})
    if isinstance(layer, nnx.Linear | nnx.LinearGeneral):
        dense: Any = nnx.clone(layer)
        del dense.dot_general  # It was a module; a function is no data to Flax.
        dense.dot_general = jax.lax.dot_general
        if isinstance(layer, nnx.LinearGeneral):
            matrix = matrix.reshape(*layer.in_features, *layer.out_features)
        kernel = like(layer.kernel, matrix)
    else:
        dense = nnx.Linear(
            *matrix.shape, use_bias=layer.bias is not None, dtype=layer.dtype, param_dtype=matrix.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        kernel = like(next(iter(factors.values())), matrix)
        if layer.bias is not None:
            dense.bias = layer.bias.copy()
    dense.kernel = kernels.setdefault((*map(id, factors.values()), matrix.shape), kernel)
    return dense


class _Observed(nnx.Module):
    """A linear layer that sums up the squares of its inputs."""

    def __init__(self, linear: nnx.Linear | nnx.LinearGeneral):
        self.linear = linear
        self.squares = nnx.Variable(jnp.zeros(_features(linear)[0]))
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        axes = getattr(self.linear, "axis", (-1,))
        rows = jnp.moveaxis(x, axes, range(-len(axes), 0)).reshape(-1, len(self.squares[...]))
        self.squares[...] = self.squares[...] + jnp.sum(rows.astype(jnp.float32) ** 2, 0)
        self.count[...] = self.count[...] + len(rows)
        return self.linear(x, **options)


def _activations(
    model: nnx.Module, found: Mapping[str, Any], tied: list[list[str]], calibration: Iterable[Any]
) -> dict[str, np.ndarray]:
    """The root mean square of each input of each kernel, as a column; a dead input counts a little."""
    watched = _copy_with(model, {path: _Observed(nnx.clone(linear)) for path, linear in found.items()})
    watched.eval()
    run = nnx.jit(lambda model, *batch: model(*batch))
    for batch in calibration:
        run(watched, *(batch if isinstance(batch, tuple) else (batch,)))
    observed, weights = _modules(watched, _Observed), {}
    for paths in tied:
        path, count = paths[0], sum(float(observed[p].count[...]) for p in paths)
        if not count:
            raise ValueError(f"{path}: got no activations from the calibration batches")
        rms = np.sqrt(sum(np.asarray(observed[p].squares[...], np.float64) for p in paths) / count)
        if not np.isfinite(rms).all():
            raise ValueError(f"{path}: got activations with NaN or infinity, expected finite numbers")
        weights[path] = np.maximum(rms, 1e-3 * rms.max() or 1.0)[:, None]
    return weights
