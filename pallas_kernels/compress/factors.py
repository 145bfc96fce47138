"""The nearest Monarch, BLAST and low-rank matrices to a given one, in float64."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

METHODS = ("monarch", "blast", "low_rank")
# Of the descent that improves a BLAST matrix.
STEPS, DAMPING = 60, 0.1


def factorize(
    matrix: Any,
    method: str,
    *,
    rank: int,
    blocks: int = 1,
    steps: int = STEPS,
    seed: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> dict[str, np.ndarray]:
    """The factors of a matrix, by the names that the layers have for them.

    Args:
      matrix: (inputs, outputs), of real numbers.
      method: "monarch", "blast" or "low_rank".
      rank: of a block for Monarch, of the matrix else.
      blocks: along each side.
      steps: of BLAST's descent.
      seed: start BLAST's descent from random factors instead of the better of low rank and Monarch.
      on_step: is called after each step of BLAST's descent.

    Returns:
      Arrays of float64.

    Raises:
      TypeError: a complex matrix; a rank, blocks or steps that are no integers.
      ValueError: no such method, sides that don't divide into blocks, a rank of 0 or above that of a full block, fewer
        than 0 steps, or a matrix with NaN or infinity.
    """
    w = real(matrix)
    inputs, outputs = w.shape
    check(method, inputs, outputs, blocks, rank)
    check_steps(steps)
    if method == "low_rank":
        return dict(zip("uv", _low_rank(w, rank), strict=True))
    if method == "monarch":
        return dict(zip(("w1", "w2"), _monarch(w, rank, blocks), strict=True))
    return dict(zip("usv", _blast(w, rank, blocks, steps, seed, on_step), strict=True))


def real(matrix: Any) -> np.ndarray:
    """A matrix in float64; complex ones and those that aren't finite are refused."""
    w = np.asarray(matrix)
    if np.iscomplexobj(w):
        raise TypeError(f"got a matrix of {w.dtype}, expected real numbers")
    w = w.astype(np.float64)
    if not np.isfinite(w).all():
        raise ValueError("got a matrix with NaN or infinity, expected finite numbers")
    return w


def check_numbers(kind: type, **values: Any) -> None:
    """Refuse what is no number of a kind; a bool is none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "an integer" if kind is numbers.Integral else "a number"
            raise TypeError(f"got {name}={value!r}, expected {expected}")


def check_steps(steps: int) -> None:
    check_numbers(numbers.Integral, steps=steps)
    if steps < 0:
        raise ValueError(f"got {steps=}, expected 0 or more")


def check(method: str, inputs: int, outputs: int, blocks: int, rank: int) -> None:
    """Refuse a method, blocks and a rank that there are not."""
    if method not in METHODS:
        raise ValueError(f"got {method=}, expected one of {', '.join(METHODS)}")
    check_numbers(numbers.Integral, blocks=blocks, rank=rank)
    if blocks < 1 or inputs % blocks or outputs % blocks:
        raise ValueError(
            f"{inputs} to {outputs} features don't divide into {blocks} blocks; give other `blocks`"
        )
    full = full_rank(method, inputs, outputs, blocks)
    if not 1 <= rank <= full:
        raise ValueError(f"got {rank=}, expected 1 to {full}, the rank of a full block")


def full_rank(method: str, inputs: int, outputs: int, blocks: int) -> int:
    """The largest rank: of a block for Monarch, of the matrix else."""
    return min(inputs, outputs) // (blocks if method == "monarch" else 1)


def parameters(method: str, inputs: int, outputs: int, rank: int, blocks: int) -> int:
    return sum(math.prod(shape) for shape in shapes(method, inputs, outputs, rank, blocks).values())


def shapes(method: str, inputs: int, outputs: int, rank: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Those of the factors."""
    b, p, q = blocks, inputs // blocks, outputs // blocks
    if method == "low_rank":
        return {"u": (rank, outputs), "v": (rank, inputs)}
    if method == "monarch":
        return {"w1": (b, b * rank, p), "w2": (b, b * rank, q)}
    return {"u": (b, rank, q), "s": (b, b, rank), "v": (b, rank, p)}


def rank_and_blocks(factors: Mapping[str, Any]) -> tuple[int, int]:
    if "w1" in factors:
        blocks, ranks, _ = factors["w1"].shape
        return ranks // blocks, blocks
    return factors["v"].shape[-2], len(factors["s"]) if "s" in factors else 1


def least_rank(matrix: np.ndarray, method: str, blocks: int, error: float) -> int:
    """The least rank whose relative error is at most `error`; for BLAST, where its descent starts."""

    def least(stack: np.ndarray) -> int:
        values = np.linalg.svd(stack, compute_uv=False) ** 2
        kept = np.cumsum(values.reshape(-1, values.shape[-1]).sum(0))
        allowed = max(error**2, 1e-30) * kept[-1]
        return 1 + int(np.argmax(kept[-1] - kept <= allowed))

    if method == "low_rank":
        return least(matrix)
    in_blocks = least(_cut(matrix, blocks))
    return in_blocks if method == "monarch" else min(least(matrix), in_blocks * blocks)


def to_dense(factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the factors multiply to, as (inputs, outputs), in float64."""
    if "s" in factors:
        blocks = expanded(factors["u"], factors["s"], factors["v"]).transpose(1, 3, 0, 2)
    elif "w1" in factors:
        b = len(factors["w1"])
        w1, w2 = (factors[name].reshape(b, b, -1, factors[name].shape[-1]) for name in ("w1", "w2"))
        blocks = np.einsum("kjtp,jktq->kpjq", w1, w2, optimize=True)
    else:
        return factors["v"].T @ factors["u"]
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def scale_inputs(factors: Mapping[str, np.ndarray], scale: np.ndarray) -> dict[str, np.ndarray]:
    """The factors of the matrix times a column, which goes into the factor that meets the inputs."""
    first = factors["w1" if "w1" in factors else "v"]
    columns = scale[:, 0] if first.ndim == 2 or len(scale) == 1 else scale.reshape(len(first), 1, -1)
    return {name: f * columns if f is first else f for name, f in factors.items()}


def expanded(u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The blocks (j, k, q, p) of a BLAST matrix."""
    return np.einsum("jrq,jkr,krp->jkqp", u, s, v, optimize=True)


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
    w: np.ndarray, rank: int, blocks: int, steps: int, seed: int | None, on_step: Callable[[], object] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damped Newton steps in one factor at a time; each of these problems is quadratic."""
    scale = w.std() or 1.0
    targets = _cut(w / scale, blocks).transpose(1, 0, 3, 2)  # (j, k, q, p)
    if seed is None:
        u, s, v = min(_starts(w / scale, rank, blocks), key=lambda f: np.linalg.norm(targets - expanded(*f)))
    else:
        random = np.random.default_rng(seed)
        _, _, q, p = targets.shape
        small = 1e-3 / math.sqrt(rank)
        u, v = (small * random.normal(size=(blocks, rank, size)) for size in (q, p))
        s = random.normal(size=(blocks, blocks, rank))
    best, least = (u, s, v), np.linalg.norm(targets - expanded(u, s, v))
    for step in range(steps):
        # From a good start whole steps never get worse; a random one needs the longer steps that shrink.
        eta = 1.0 if seed is None else 2 * (1 - step / steps)
        u = u - eta * _newton_bases(targets, u, s, v)
        v = v - eta * _newton_bases(targets.transpose(1, 0, 3, 2), v, s.swapaxes(0, 1), u)
        s = s - eta * _newton_mixing(targets, u, s, v)
        error = np.linalg.norm(targets - expanded(u, s, v))
        if on_step:
            on_step()
        if not np.isfinite(error):
            break
        if error < least:
            best, least = (u, s, v), error
    u, s, v = best
    return u, s * scale, v


def _newton_bases(targets: np.ndarray, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    error = expanded(u, s, v) - targets
    mixed = s[..., None] * v  # (j, k, r, p)
    gradient = np.einsum("jkqp,jkrp->jrq", error, mixed, optimize=True)
    curvature = np.einsum("jkrp,jkcp->jrc", mixed, mixed, optimize=True)
    return _damped_solve(curvature, gradient, error)


def _newton_mixing(targets: np.ndarray, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    error = expanded(u, s, v) - targets
    gradient = np.einsum("jrq,jkqp,krp->jkr", u, error, v, optimize=True)
    curvature = (u @ u.swapaxes(1, 2))[:, None] * (v @ v.swapaxes(1, 2))[None]
    return _damped_solve(curvature, gradient[..., None], error)[..., 0]


def _damped_solve(curvature: np.ndarray, gradient: np.ndarray, error: np.ndarray) -> np.ndarray:
    damping = DAMPING * np.linalg.norm(error) + np.finfo(float).tiny ** 0.5
    identity = np.eye(curvature.shape[-1])
    return np.linalg.solve(curvature + (damping + 1e-14 * np.abs(curvature).max()) * identity, gradient)


def _starts(w: np.ndarray, rank: int, blocks: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The BLAST matrices that the low-rank and the Monarch matrix of as many ranks are."""

    def of_low_rank(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v = (f.reshape(rank, blocks, -1).swapaxes(0, 1) for f in _low_rank(w, rank))
        return u, np.ones((blocks, blocks, rank)), v

    starts = [of_low_rank(w, rank)]
    t = rank // blocks
    if t:
        w1, w2 = _monarch(w, t, blocks)
        left = w - to_dense({"w1": w1, "w2": w2})
        # What ranks are over when each block has t of its own are those of the whole matrix.
        u, s, v = (np.array(f) for f in of_low_rank(left, rank))
        u, s, v = (np.roll(f, t * blocks, axis) for f, axis in ((u, 1), (s, 2), (v, 1)))
        s[..., : t * blocks] = 0
        # Block (j, k) takes ranks (j + k) % blocks of its row and its column, which no other block there does.
        for j in range(blocks):
            for k in range(blocks):
                ranks = slice((j + k) % blocks * t, ((j + k) % blocks + 1) * t)
                u[j, ranks], v[k, ranks] = w2[j, k * t : (k + 1) * t], w1[k, j * t : (j + 1) * t]
                s[j, k, ranks] = 1
        starts.append((u, s, v))
    return starts


def _cut(w: np.ndarray, blocks: int) -> np.ndarray:
    """(inputs, outputs) as blocks (k, j, p, q)."""
    return w.reshape(blocks, w.shape[0] // blocks, blocks, -1).swapaxes(1, 2)
