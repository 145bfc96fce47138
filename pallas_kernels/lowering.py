"""The one seam to `pallas_call`: JAX versions, the compiler parameters of each accelerator, interpret mode.

Every kernel of the library is launched here and nowhere else, so that what changes in Pallas changes in one file.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

Platform = Literal["tpu", "cuda"]

# Raised when a kernel is lowered, long after the call. Users can't act on it: leaving Triton is this file's business.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


class Work(NamedTuple):
    """What a kernel has to do: the numbers behind the cost estimate and the roofline.

    flops: floating-point (or integer) operations that the definition needs, one multiply-add counted as two.
    bytes: what must cross HBM once, operands and results.
    padded_flops: operations that the launch issues, lanes and rows of padding included.
    intermediate_bytes: those of its results that only the operator's next product reads; 0 where all is fused.
    """

    flops: int
    bytes: int
    padded_flops: int
    intermediate_bytes: int = 0


def launch(
    body: Callable[..., None],
    *operands: jax.Array,
    platform: Platform,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    work: Work,
    interpret: Any = False,
    num_warps: int = 4,
    num_stages: int = 1,
    vmem_limit_bytes: int | None = None,
    sequential: int = 0,
    scratch_shapes: Sequence[Any] = (),
) -> Any:
    """Run `body` over `grid` on `platform`; every grid axis is parallel, because a GPU's are, unless `sequential`.

    Args:
      body: a function of Refs: inputs, outputs, scratch.
      operands: the arrays that `in_specs` cut into blocks.
      name: what profiles and compiled programs call the kernel.
      out_shape: `jax.ShapeDtypeStruct`s. Over a manual mesh axis the results vary wherever an operand does.
      work: becomes the cost estimate, and what `pallas_kernels.aot` divides by.
      interpret: False, True, or `pltpu.InterpretParams`.
      num_warps, num_stages: GPU only.
      vmem_limit_bytes: TPU only.
      sequential: TPU only: so many of the last axes run in order, and a program can add to what one before has left.
      scratch_shapes: TPU only: arrays that stay from program to program, Refs after those of the results.
    """
    if platform == "tpu":
        params: Any = pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential,
            vmem_limit_bytes=vmem_limit_bytes,
        )
    else:
        params = pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    axes = frozenset[Any]().union(*map(varying_axes, operands))
    call = pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=jax.tree.map(lambda s: _varying_struct(s, axes), out_shape),
        name=name,
        scratch_shapes=scratch_shapes,
        interpret=interpret,
        compiler_params=params,
        cost_estimate=pl.CostEstimate(flops=work.flops, bytes_accessed=work.bytes, transcendentals=0),
        metadata={name: str(value) for name, value in work._asdict().items() if name != "bytes"},
    )
    # Where 64-bit types are enabled Python's integers would be among them, in indices too, and no accelerator's are.
    # What is interpreted becomes part of a program for which they are enabled: JAX 0.7.2 can't mix the two.
    with contextlib.nullcontext() if interpret else enable_x64(False):
        return call(*operands)


class Arithmetic(NamedTuple):
    """How a kernel computes in float32.

    to_float32: converts an array. multiply_add: (x, y, total) -> x y + total, of arrays of one shape.
    """

    to_float32: Callable[[jax.Array], jax.Array] = lambda x: x.astype(jnp.float32)
    multiply_add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lambda x, y, total: jax.lax.add(
        total, jax.lax.mul(x, y)
    )


def gpu_arithmetic(interpret: Any) -> Arithmetic:
    """In the fewest instructions of NVIDIA GPUs: XLA's Triton doesn't fuse a product and a sum."""
    return Arithmetic() if interpret else Arithmetic(_to_float32, _fused_multiply_add)


def _fused_multiply_add(x: jax.Array, y: jax.Array, total: jax.Array) -> jax.Array:
    return _inline_asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", x, y, total)


def _to_float32(x: jax.Array) -> jax.Array:
    """Two bfloat16 of a register in two instructions, not three."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    low, high = "shl.b32 pair, $2, 16; mov.b32 $0, pair;", "and.b32 pair, $2, 0xffff0000; mov.b32 $1, pair;"
    return _inline_asm(f"{{ .reg .b32 pair; {low} {high} }}", "=f,=f,r", x, pack=2)


def _inline_asm(asm: str, constraints: str, *args: jax.Array, pack: int = 1) -> jax.Array:
    out = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    [result] = pltriton.elementwise_inline_asm(
        asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[out]
    )
    return result


def within(index: Any, size: int) -> jax.Array:
    """An index that is in range(size), with that said to the compiler: constants added to it cost nothing then."""
    return jax.lax.clamp(jnp.int32(0), jnp.int32(index), jnp.int32(size - 1))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """The mesh axes of an enclosing `shard_map` over which `x` differs from device to device."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def make_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Let every array vary over the axes that any of them varies over; the transpose of that is a psum.

    A replicated weight beside a sharded input needs this before a `custom_vjp`, whose cotangents must have the type
    of the primals.
    """
    axes = frozenset[Any]().union(*map(varying_axes, arrays))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)

    return tuple(map(cast, arrays))


def enable_x64(enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    """64-bit types within the block, or none, wherever JAX keeps the switch."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    return importlib.import_module("jax.experimental").enable_x64(enabled)


# The kind of device that a program is traced for, where JAX has no way to be told: 0.7.2.
described_kind = jax.make_user_context(None)


def tpu_kind() -> str | None:
    """The kind of TPU that a program is traced for, as far as that is known: the one described, or the one here."""
    if isinstance(kind := described_kind.value, str):
        return kind
    if (device := _described_device()) is not None:
        return device.device_kind if device.device_kind.startswith("TPU") else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def described_platform() -> Platform | None:
    """The accelerator that a program is traced for, where that was said: by a mesh, or for a machine without it."""
    if isinstance(described_kind.value, str):
        return "tpu"
    platforms: dict[str, Platform] = {"tpu": "tpu", "gpu": "cuda"}
    return platforms.get(getattr(_described_device(), "platform", ""))


def _described_device() -> Any:
    return getattr(getattr(jax.sharding, "get_abstract_mesh", lambda: None)(), "abstract_device", None)


def _varying_struct(struct: jax.ShapeDtypeStruct, axes: frozenset[Any]) -> jax.ShapeDtypeStruct:
    if not axes:
        return struct
    if hasattr(jax.sharding, "ManualAxisType"):
        kind = jax.sharding.ManualAxisType(varying=axes)
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, manual_axis_type=kind)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, vma=axes)
