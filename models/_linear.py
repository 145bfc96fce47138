"""The linear layers of a transformer: dense ones, or those of a published compression, trained from scratch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from pallas_kernels.nn import BlastLinear, LowRankLinear, MonarchLinear

Linear = Callable[..., Any]
METHODS = ("monarch", "blast", "low_rank")


def layers(std: float, rank: int, *, monarch: int, blast: int) -> dict[str, Linear]:
    """What makes a linear layer, by name.

    Args:
      std: the standard deviation that the entries of each matrix have at first.
      rank: parameters of a compressed layer by its inputs + outputs.
      monarch, blast: blocks along each side.
    """
    return {
        "dense": functools.partial(nnx.Linear, kernel_init=nnx.initializers.normal(std)),
        "monarch": functools.partial(MonarchLinear, rank=rank // monarch, blocks=monarch, kernel_std=std),
        "blast": functools.partial(BlastLinear, rank=rank, blocks=blast, kernel_std=std),
        "low_rank": functools.partial(LowRankLinear, rank=rank, kernel_std=std),
    }


def choose(linear: str | Linear, known: Mapping[str, Linear]) -> Linear:
    """The function that a network's argument `linear` is, or names."""
    if not isinstance(linear, str):
        return linear
    if linear not in known:
        raise ValueError(f"got {linear=}, expected one of {', '.join(known)} or a function")
    return known[linear]


def named(name: str, network: Callable[..., nnx.Module]) -> dict[str, Callable[..., nnx.Module]]:
    """A network, and for each compression one that is trained with it."""
    factored = {f"{name}_{method}": functools.partial(network, linear=method) for method in METHODS}
    return {name: network, **factored}
