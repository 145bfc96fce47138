"""NVIDIA GPUs that `pallas_kernels.aot` compiles for, with the limits that the compiler doesn't check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A compute capability of NVIDIA GPUs.

    name: what ptxas calls it.
    compute_capability: 10 x major + minor.
    device_kind: what `jax.Device.device_kind` says on one such GPU.
    shared_memory_bytes: the most that one block may have.
    registers: the most that one thread may have; what doesn't fit is spilled to the stack.
    """

    name: str
    compute_capability: int
    device_kind: str
    shared_memory_bytes: int
    registers: int = 255


_KIB = 2**10

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("sm_80", 80, "NVIDIA A100-SXM4-80GB", 163 * _KIB),
        GPU("sm_86", 86, "NVIDIA A10", 99 * _KIB),
        GPU("sm_89", 89, "NVIDIA L4", 99 * _KIB),
        GPU("sm_90", 90, "NVIDIA H100 80GB HBM3", 227 * _KIB),
        GPU("sm_100", 100, "NVIDIA B200", 227 * _KIB),
    )
}
