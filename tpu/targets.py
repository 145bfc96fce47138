"""TPUs that `pallas_kernels.aot` compiles for, with the peaks that a roofline needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TPU:
    """One JAX device of a TPU generation, and the name by which libtpu knows a slice of it.

    name: what users call it.
    topology: the smallest slice that libtpu describes without hardware.
    device_kind: what `jax.Device.device_kind` says there.
    vmem_bytes: physical VMEM of one core.
    hbm_bytes_per_second: of one core.
    clock_hz: no vendor publishes it; the published bfloat16 peak divided by `matrix_macs`.
    matrix_macs: bfloat16 multiply-adds per cycle of one core's matrix units.
    int8_rate: how many int8 multiply-adds take the place of one in bfloat16.
    vector_flops: float32 operations per cycle of one core's vector unit: 4 slots x 1024 lanes. A multiply and
      the add that follows it take a slot each. Known for v5e, the same number is a yardstick on the others.
    cores: how many cores make the device; a grid's parallel axes are divided among them.
    static_profile: whether the compiler estimates cycles; for v4 its profiler aborts.
    """

    name: str
    topology: str
    device_kind: str
    vmem_bytes: int
    hbm_bytes_per_second: float
    clock_hz: float
    matrix_macs: int
    int8_rate: int
    vector_flops: int = 4 * 1024
    cores: int = 1
    static_profile: bool = True

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_second / self.clock_hz


_MIB = 2**20
_MXU128 = 4 * 128 * 128
# Two units of 256 x 256 are published for v6e and 7x, but their peak would need 3.5 and 4.4 GHz, and the
# compiler schedules more than 2 * 256 * 256 multiply-adds a cycle: each unit counts twice.
_MXU256 = 4 * 256 * 256

TPUS = {
    tpu.name: tpu
    for tpu in (
        TPU(
            "v4",
            "v4:2x2x1",
            "TPU v4",
            16 * _MIB,
            615e9,
            275e12 / 2 / (2 * _MXU128),
            _MXU128,
            1,
            static_profile=False,
        ),
        TPU("v5e", "v5e:1x1", "TPU v5 lite", 128 * _MIB, 820e9, 197e12 / (2 * _MXU128), _MXU128, 2),
        TPU("v5p", "v5p:2x2x1", "TPU v5", 64 * _MIB, 1230e9, 459e12 / 2 / (2 * _MXU128), _MXU128, 2, cores=2),
        TPU("v6e", "v6e:1x1", "TPU v6 lite", 128 * _MIB, 1640e9, 918e12 / (2 * _MXU256), _MXU256, 2),
        TPU("7x", "tpu7x:2x2x1", "TPU7x", 64 * _MIB, 3700e9, 2307e12 / 2 / (2 * _MXU256), _MXU256, 1),
    )
}
