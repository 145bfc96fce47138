"""NVIDIA GPUs that `pallas_kernels.aot` compiles for: limits that the compiler doesn't check, peaks for a roofline."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A compute capability of NVIDIA GPUs.

    name: what ptxas calls it.
    compute_capability: 10 x major + minor.
    device_kind: what `jax.Device.device_kind` says on one such GPU, whose published peaks follow.
    shared_memory_bytes: the most that one block may have.
    vector_flops, matrix_flops: operations per second in float32, and of the matrix units in bfloat16; those do twice as
      many in int8.
    hbm_bytes_per_second: of its memory.
    registers: the most that one thread may have; what doesn't fit is spilled to the stack.
    """

    name: str
    compute_capability: int
    device_kind: str
    shared_memory_bytes: int
    vector_flops: float
    matrix_flops: float
    hbm_bytes_per_second: float
    registers: int = 255


_KIB = 2**10

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("sm_80", 80, "NVIDIA A100-SXM4-80GB", 163 * _KIB, 19.5e12, 312e12, 2039e9),
        GPU("sm_86", 86, "NVIDIA A10", 99 * _KIB, 31.2e12, 125e12, 600e9),
        GPU("sm_89", 89, "NVIDIA L4", 99 * _KIB, 30.3e12, 121e12, 300e9),
        GPU("sm_90", 90, "NVIDIA H100 80GB HBM3", 227 * _KIB, 66.9e12, 989e12, 3350e9),
        GPU("sm_100", 100, "NVIDIA B200", 227 * _KIB, 75e12, 2250e12, 8000e9),
    )
}
