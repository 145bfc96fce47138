"""Depthwise convolution as XLA, PyTorch and a plain Triton kernel have it, to be timed beside ours."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from pallas_kernels.baselines import Contestant, Prepare, of_jax, of_torch, versioned
from pallas_kernels.operators import Case

# A case's (strides, padding, dilation) as plain numbers, or None if a baseline can't run it.
Geometry = Callable[[Case], tuple[tuple[int, int], tuple[tuple[int, int], ...], tuple[int, int]] | None]


def baselines(geometry: Geometry) -> Mapping[str, Callable[[Case], Prepare | None]]:
    """Other implementations by name; PyTorch's name says if it isn't installed."""

    def run(of: Callable[..., Prepare | None]) -> Callable[[Case], Prepare | None]:
        def of_case(case: Case) -> Prepare | None:
            numbers = (
                geometry(case) if len(case.arguments) == 2 and len(case.arguments[0].shape) == 4 else None
            )
            return of(case, *numbers) if numbers else None

        return of_case

    return {
        "lax.conv_general_dilated": run(_lax),
        "jax-triton": run(_triton),
        versioned("torch", "the better layout"): run(_torch),
    }


def _lax(case: Case, strides: Any, padding: Any, dilation: Any) -> Prepare:
    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w[:, :, None],
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
            precision=lax.Precision.HIGHEST,
        )

    return of_jax(convolve, case)


def _triton(case: Case, strides: Any, padding: Any, dilation: Any) -> Prepare | None:
    kernel = case.arguments[1].shape[:2]
    same = tuple((k // 2, k // 2) for k in kernel if k % 2)
    if (strides, padding, dilation) != ((1, 1), same, (1, 1)) or jax.default_backend() != "gpu":
        return None
    if importlib.util.find_spec("jax_triton") is None:
        return None
    from pallas_kernels.gpu._depthwise_conv_triton import convolve

    return of_jax(convolve, case)


def _torch(case: Case, strides: Any, padding: Any, dilation: Any) -> Prepare | None:
    if any(lo != hi for lo, hi in padding):
        return None

    def convolve(x: Any, w: Any) -> Any:
        from torch.nn import functional

        return functional.conv2d(x, w, None, strides, [lo for lo, _ in padding], dilation, x.shape[1])

    def place(a: np.ndarray, i: int) -> np.ndarray:
        return a[..., None].transpose(2, 3, 0, 1) if i == 1 else a.transpose(0, 3, 1, 2)

    def back(a: np.ndarray, i: int) -> np.ndarray:
        return a[:, 0].transpose(1, 2, 0) if i == 1 else a.transpose(0, 2, 3, 1)

    layouts = ("contiguous_format", "channels_last")
    in_layouts = [of_torch(convolve, case, place=place, back=back, memory_format=f) for f in layouts]

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        both = [of_layout(arguments, cotangent) for of_layout in in_layouts if of_layout]
        forward = min(both, key=lambda c: _seconds(lambda: c.wait(c.forward()))).forward
        gradients = min(both, key=lambda c: _seconds(lambda: c.wait(c.gradients()))).gradients
        return both[0]._replace(forward=forward, gradients=gradients)

    return prepare if all(in_layouts) else None


def _seconds(run: Callable[[], Any]) -> float:
    """The best of three runs, after one to warm up."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
