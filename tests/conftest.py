"""What all tests share: the CPU, unless told otherwise, as eight devices; fresh numbers; each implementation."""

import os

# Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import testing

# The script in it needs OpenFHE, and so a Python of its own.
collect_ignore = ["data"]


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers of the test's own."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file() -> Iterator[None]:
    """Compiled programs are let go of: Linux maps 65530 pieces of memory a process, and a program takes 30."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["xla", "tpu", "cuda"])
def platform(request: pytest.FixtureRequest) -> Any:
    """A platform whose kernels are interpreted, or "xla"."""
    return request.param


@pytest.fixture
def implementation(platform: Any) -> Iterator[str]:
    """What an operator takes as `implementation=` to run as on `platform`."""
    if platform == "xla":
        yield "xla"
        return
    before = jax.config.read("jax_disable_most_optimizations")
    # An interpreted kernel is a long program that runs once.
    jax.config.update("jax_disable_most_optimizations", True)
    with testing.interpret(platform):
        yield "pallas"
    jax.config.update("jax_disable_most_optimizations", before)
