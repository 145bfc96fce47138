"""Depthwise convolution as XLA, PyTorch and a plain Triton kernel have it, to be timed beside ours."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from pallas_kernels.baselines import Contestant, Prepare, of_jax, versioned
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
        versioned("torch", f"{os.cpu_count()} threads, the better layout"): run(_torch),
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
    try:
        import torch
    except ImportError:
        return None
    if case.arguments[0].dtype != np.float32 or any(lo != hi for lo, hi in padding):
        return None
    device = torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)

    def contestant(arguments: Sequence[np.ndarray], cotangent: np.ndarray, layout: Any) -> Contestant:
        def place(a: Any) -> Any:
            return torch.from_numpy(a).to(device).contiguous(memory_format=layout)

        x, w, g = (
            place(np.ascontiguousarray(a.transpose(axes)))
            for a, axes in (
                (arguments[0], (0, 3, 1, 2)),
                (arguments[1][..., None], (2, 3, 0, 1)),
                (cotangent, (0, 3, 1, 2)),
            )
        )
        for a in (x, w):
            a.requires_grad_()

        def convolve() -> Any:
            pads = tuple(lo for lo, _ in padding)
            return torch.nn.functional.conv2d(x, w, None, strides, pads, dilation, x.shape[1])

        def finished(value: Any) -> Any:
            if device.type == "cuda":
                torch.cuda.synchronize()
            return value

        def forward() -> Any:
            with torch.no_grad():
                return finished((convolve(),))

        def gradients() -> Any:
            out = convolve()
            return finished((out, *torch.autograd.grad(out, (x, w), g)))

        def to_numpy(out: Any) -> list[np.ndarray]:
            images = [v.detach().cpu().numpy().transpose(0, 2, 3, 1) for v in out[:2]]
            return [*images, *(v.detach().cpu().numpy()[:, 0].transpose(1, 2, 0) for v in out[2:])]

        return Contestant(forward, gradients, to_numpy)

    def prepare(arguments: Sequence[np.ndarray], cotangent: np.ndarray) -> Contestant:
        layouts = torch.contiguous_format, torch.channels_last
        both = [contestant(arguments, cotangent, layout) for layout in layouts]
        forward = min(both, key=lambda c: _seconds(c.forward)).forward
        gradients = min(both, key=lambda c: _seconds(c.gradients)).gradients
        return Contestant(forward, gradients, both[0].to_numpy)

    return prepare


def _seconds(run: Callable[[], Any]) -> float:
    """The best of three runs, after one to warm up."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
