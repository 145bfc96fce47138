"""Functions lowered for a target: what its compiler is given of the whole program and of each Pallas kernel in it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.mlir import ir
from jax.interpreters import mlir, partial_eval
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.aot._crew import Task
from pallas_kernels.gpu.targets import GPU
from pallas_kernels.lowering import Work, described_kind
from pallas_kernels.tpu.targets import TPU

Target = TPU | GPU


class Kernel(NamedTuple):
    """A Pallas kernel of a function, lowered.

    no_cycles: why there will be no estimate of its cycles.
    peak_flops: operations of the unit that it runs on, per cycle of a TPU, per second of a GPU.
    task: what a child compiles; None if the program tells enough.
    """

    name: str
    work: Work | None
    memory_limit: int
    no_cycles: str | None
    peak_flops: float | None
    task: Task | None


def lower(
    fn: Callable[..., Any], args: Any, target: Target, estimate: bool
) -> tuple[Task | None, list[Kernel]]:
    """What children compile: the whole program (for a TPU), and each of the target's Pallas kernels in it.

    estimate: whether to lower kernels for a TPU alone, too.
    """
    leaves, tree = jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves))))
    with described(target), _without_locations():
        jaxpr = flat.trace(*leaves).jaxpr.jaxpr
        live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        calls = {id(call): call for call in pallas_calls(live, target)}
        kernels = [_lower_kernel(call, target, estimate) for call in calls.values()]
        if isinstance(target, TPU):
            return _exported(flat, leaves, target), kernels
        flat.trace(*leaves).lower(lowering_platforms=("cuda",))  # for its errors
        return None, kernels


def described(target: Target) -> contextlib.AbstractContextManager[Any]:
    """JAX asks which device it lowers for, and this machine's don't say."""
    platform, cores = ("tpu", target.cores) if isinstance(target, TPU) else ("gpu", None)
    try:
        device = AbstractDevice(device_kind=target.device_kind, num_cores=cores, platform=platform)
    except TypeError:
        # JAX 0.7.2 doesn't ask, but our own choices do.
        return described_kind(target.device_kind) if isinstance(target, TPU) else contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Lower without the lines of code that led to a kernel: equal kernels are then equal bytes."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def pallas_calls(jaxpr: Jaxpr, target: Target) -> Iterator[JaxprEqn]:
    """The target's calls: `lax.platform_dependent` leaves those of every platform in the jaxpr."""
    wanted = pltpu.CompilerParams if isinstance(target, TPU) else pltriton.CompilerParams
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "pallas_call" and not eqn.params["interpret"]:
            params = eqn.params["compiler_params"]
            params = params.values() if isinstance(params, Mapping) else [params]  # JAX 0.7.2: by backend
            if any(isinstance(p, wanted) for p in params):
                yield eqn


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner_jaxprs(eqn):
            yield from equations(inner)


def _inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _lower_kernel(call: JaxprEqn, target: Target, estimate: bool) -> Kernel:
    body = call.params["jaxpr"]
    bare = jax.jit(lambda *operands: call.primitive.bind(*operands, **call.params))
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars]
    name, work = body.debug_info.func_src_info.split(" at ")[0], work_of(call)
    if not isinstance(target, TPU):
        task = _triton_source(bare, operands, target)
        return Kernel(name, work, target.shared_memory_bytes, None, _peak_flops(body, target), task)
    task = _exported(bare, operands, target) if estimate else None
    no_cycles = _unprofilable(body, target) if estimate else "cycles not asked for"
    return Kernel(name, work, target.vmem_bytes, no_cycles, _peak_flops(body, target), task)


def _exported(fn: Any, args: Sequence[Any], tpu: TPU) -> Task:
    exported = export.export(fn, platforms=["tpu"])(*args)
    moved = sum(a.size * a.dtype.itemsize for a in (*exported.in_avals, *exported.out_avals))
    return {"exported": bytes(exported.serialize()), "topology": tpu.topology, "moved_bytes": moved}


def _triton_source(fn: Any, args: Sequence[Any], gpu: GPU) -> Task:
    """The Triton IR of the one kernel in `fn`, and the options that compile it."""
    # Pallas gives no public way to it: jaxlib's dialect reads back what the custom call holds.
    from jaxlib.triton import dialect

    configs = []

    def visit(op: Any) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            configs.append(op.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module = fn.trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    module.operation.walk(visit)
    (config,) = configs
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    return {
        "ttir": ir.Module.parse(config["ir"].value_bytes, context).operation.get_asm(),
        "options": {k: ir.IntegerAttr(config[k]).value for k in ("num_warps", "num_stages")},
        "compute_capability": gpu.compute_capability,
    }


def work_of(call: JaxprEqn) -> Work | None:
    cost, stated = call.params["cost_estimate"], dict(call.params["metadata"] or {})
    if cost is None:
        return None
    # vmap multiplies the cost estimate, but leaves the metadata.
    batch = cost.flops / max(1, int(stated.get("flops", cost.flops)))
    padded, intermediate = (
        round(batch * int(stated.get(name, default)))
        for name, default in (("padded_flops", cost.flops), ("intermediate_bytes", 0))
    )
    return Work(cost.flops, cost.bytes_accessed, padded, intermediate)


def _peak_flops(body: Jaxpr, target: Target) -> float:
    """Operations of the unit that does the kernel's work, per cycle of a TPU, per second of a GPU.

    That is the matrix unit, if there is a dot; on a GPU not of float32, which is multiplied exactly.
    """
    dots = [eqn for eqn in equations(body) if eqn.primitive.name == "dot_general"]
    widest = max((v.aval.dtype.itemsize for eqn in dots for v in eqn.invars), default=4)
    if isinstance(target, GPU):
        return {1: 2 * target.matrix_flops, 2: target.matrix_flops}.get(widest, target.vector_flops)
    if not dots:
        return target.cores * target.vector_flops
    return target.cores * 2 * target.matrix_macs * (target.int8_rate if widest == 1 else 1)


def _unprofilable(body: Jaxpr, tpu: TPU) -> str | None:
    """Why the static profile would be wrong, or would take the compiler down."""
    if not tpu.static_profile:
        return f"cycles not estimated: the compiler's profiler aborts on {tpu.name}"
    return _uncounted_loop(body, inside_loop=False)


def _uncounted_loop(jaxpr: Jaxpr, inside_loop: bool) -> str | None:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            return "cycles not estimated: the trip count of a loop is dynamic"
        loops = eqn.primitive.name == "scan" and eqn.params["unroll"] < eqn.params["length"]
        if loops and inside_loop:
            return "cycles not estimated: loops nest, and the profile drops the outer trip count"
        for inner in _inner_jaxprs(eqn):
            if reason := _uncounted_loop(inner, inside_loop or loops):
                return reason
    return None
