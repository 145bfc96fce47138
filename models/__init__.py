"""Whole networks, one file a family.

A family's module states its networks once, as `MODELS`: a constructor for each name. It is imported when a
network is asked for, not when this package is.
"""

import difflib
import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from flax import nnx


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> nnx.Module:
    """A network by its name.

    Args:
      name: one of `list()`.
      rngs: random streams for the parameters, and for drop path.
      **overrides: any argument of the network's class, instead of what the name stands for.

    Returns:
      The network, freshly initialized, in training mode.

    Raises:
      ValueError: no network has that name; the message has the names nearest to it.

    Example:
      >>> from flax import nnx
      >>> from pallas_kernels import models
      >>> model = models.create("unireplknet_a", dims=(8, 16, 24, 32), num_classes=10, rngs=nnx.Rngs(0))
      >>> model.head.out_features
      10
    """
    if name not in _registry():
        near = difflib.get_close_matches(name, _registry(), n=3, cutoff=0.5)
        hint = f"one of {', '.join(near)}" if near else "a name in pallas_kernels.models.list()"
        raise ValueError(f"got the model name {name!r}, expected {hint}")
    return _registry()[name](rngs=rngs, **overrides)


def list(pattern: str = "*") -> tuple[str, ...]:
    """The names that `create` knows, sorted.

    Args:
      pattern: what they match, with `*` and `?` as in a shell.

    Example:
      >>> from pallas_kernels import models
      >>> models.list("unireplknet_[ab]")
      ('unireplknet_a', 'unireplknet_b')
    """
    return tuple(sorted(fnmatch.filter(_registry(), pattern)))


@functools.cache
def _registry() -> dict[str, Callable[..., nnx.Module]]:
    families = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    )
    return {name: make for family in families for name, make in family.MODELS.items()}
