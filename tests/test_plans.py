"""Any legal plan gives the same numbers: what tuning changes must not change results."""

import functools
import re
from typing import Any, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, testing
from pallas_kernels.aot._programs import described, pallas_calls
from pallas_kernels.gpu import blast_matmul as gpu_blast
from pallas_kernels.gpu import depthwise_conv as gpu
from pallas_kernels.operators import Case
from pallas_kernels.ops.depthwise_conv import OPERATOR, reference
from pallas_kernels.tpu import _depthwise_conv_slabs as slabs
from pallas_kernels.tpu import depthwise_conv as tpu
from pallas_kernels.tpu.tiles import vmem_budget
from pallas_kernels.windows import Axis, Blocks, Gather, Strips

# (images, rows, columns, channels), (kernel), stride
GEOMETRIES = [((19, 7, 6, 5), (3, 2), 1), ((4, 9, 10, 3), (3, 3), 2)]
# places of a slab, rows of a block in periods, columns of a piece in periods, unroll
TPU_PLANS = [
    ("batch", 99, 99, 1),
    ("batch", 1, 99, 2),
    ("batch", 2, 2, 64),
    ("images", 99, 99, 1),
    ("images", 2, 2, 64),
    ("strips", 99, 99, 1),
    ("strips", 2, 4, 64),
]


def arrays(shape: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(sum(shape))
    axes = tuple(Axis(size, k, stride, 1, k // 2, k // 2) for size, k in zip(shape[1:3], kernel, strict=True))
    x, w = rng.normal(size=shape), rng.normal(size=(*kernel, shape[-1]))
    g = rng.normal(size=(shape[0], *(a.out for a in axes), shape[-1]))
    return axes, *(jnp.asarray(a, jnp.float32) for a in (x, w, g))


def expected(x: Any, w: Any, g: Any, kernel: tuple[int, ...], stride: int) -> list[jax.Array]:
    definition = functools.partial(reference, strides=stride, padding=[(k // 2, k // 2) for k in kernel])
    y, vjp = jax.vjp(definition, x, w)
    return [y, *vjp(g)]


def results(accelerator: Any, axes: Any, x: Any, w: Any, g: Any) -> list[jax.Array]:
    forward, transposed = ([Gather(a, t) for a in axes] for t in (False, True))
    return [
        accelerator.convolve(x, w, None, *forward, interpret=True),
        accelerator.convolve(g, w, None, *transposed, interpret=True),
        accelerator.weight_gradient(x, g, *axes, interpret=True),
    ]


def laid_out(
    rows: Gather, cols: Gather, places: Any, block: int, piece: int = 99, **options: Any
) -> tpu.Plan:
    """A plan of `block` rows and `piece` columns, in periods, or of all if that is less."""
    blocks = Blocks(rows, min(rows.targets, block * rows.period))
    pieces = Strips(cols, min(cols.targets, piece * cols.period))
    periods = -(-pieces.size // cols.period)
    strips = Strips(cols, -(-periods // 8) * cols.period) if places == "strips" else pieces
    return tpu.Plan(blocks, places, pieces, strips, **options)


def assert_near(got: list[jax.Array], want: list[jax.Array]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.sweep
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("numbers", TPU_PLANS, ids=str)
def test_tpu_plans(monkeypatch: pytest.MonkeyPatch, geometry: Any, numbers: Any) -> None:
    places, block, piece, unroll = numbers

    def plan(n: int, c: int, itemsize: int, rows: Gather, cols: Gather, *, gradient: bool) -> tpu.Plan:
        plan = laid_out(rows, cols, places, block, piece, unroll=unroll)
        if not (gradient and places == "batch" and unroll > 4):
            return plan
        groups = plan.programs(n, c)[0]
        return plan._replace(groups=groups, at_once=min(groups, slabs.GROUPS[0]))

    monkeypatch.setattr(tpu, "_plan", plan)
    axes, x, w, g = arrays(*geometry)
    assert_near(results(tpu, axes, x, w, g), expected(x, w, g, *geometry[1:]))


# XLA:CPU of JAX 0.7.2 simplifies this interpreted program in circles, so it is left to the versions that run all tests.
@pytest.mark.slow
def test_tpu_groups_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    search = tpu._plan

    def grouped(*args: Any, gradient: bool) -> tpu.Plan:
        plan = search(*args, gradient=gradient)
        assert plan is not None
        return plan._replace(lanes=1 if gradient else 2)

    monkeypatch.setattr(tpu, "_plan", grouped)
    geometry = ((3, 4, 3, 256), (3, 3), 1)
    axes, x, w, g = arrays(*geometry)
    assert_near(results(tpu, axes, x, w, g), expected(x, w, g, *geometry[1:]))


@pytest.mark.sweep
@pytest.mark.parametrize("kernel, stride", [((3, 3), 1), ((2, 3), 2)], ids=str)
@pytest.mark.parametrize(
    "places, fold, channels, block",
    [
        ("batch", 1, 256, 99),
        ("batch", 2, 64, 2),
        ("batch", 3, 48, 99),
        ("images", 1, 200, 99),
        ("images", 2, 160, 99),
        ("strips", 2, 160, 2),
        ("strips", 4, 40, 99),
    ],
)
def test_tpu_steps(
    monkeypatch: pytest.MonkeyPatch,
    places: Any, fold: int, channels: int, block: int, kernel: tuple[int, int], stride: int,
) -> None:  # fmt: skip
    """Lanes one group after the other, each as soon as the images that share it have come."""

    def plan(n: int, c: int, itemsize: int, rows: Gather, cols: Gather, *, gradient: bool) -> tpu.Plan:
        return laid_out(rows, cols, places, block, lanes=-(-fold * c // 128), steps=True, fold=fold)

    monkeypatch.setattr(tpu, "_plan", plan)
    axes, x, w, g = arrays((19, 5, 6, channels), kernel, stride)
    assert_near(results(tpu, axes, x, w, g), expected(x, w, g, kernel, stride))


@pytest.mark.sweep
@pytest.mark.parametrize("padding", [(1, 1), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "places, block, lanes, dtype",
    [
        ("images", 99, 1, "float32"),
        ("images", 4, 2, "float32"),
        ("strips", 99, 1, "float32"),
        ("strips", 4, 1, "float32"),
        ("strips", 99, 2, "float32"),
        ("batch", 99, 1, "bfloat16"),
        ("batch", 2, 1, "bfloat16"),
    ],
)
def test_tpu_rows_are_copied_amid_the_convolution_of_others(
    monkeypatch: pytest.MonkeyPatch, places: Any, block: int, lanes: int, dtype: str, padding: tuple[int, int]
) -> None:
    """Alone and in twos, an odd number of them, at the edges of blocks and of images."""
    rows, cols = Axis(9, 3, 1, 1, *padding), Axis(6, 2, 1, 1, 1, 0)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2 if places == "strips" else 8, 9, 6, 130 if lanes > 1 else 5)), dtype)
    w = jnp.asarray(rng.normal(size=(3, 2, x.shape[-1])), jnp.float32)
    plan = laid_out(Gather(rows), Gather(cols), places, block, lanes=lanes)
    monkeypatch.setattr(tpu, "_plan", lambda *_, **__: plan)
    monkeypatch.setattr(slabs, "MANY_TAPS", 1)
    assert plan.streams
    got = tpu.convolve(x, w, None, Gather(rows), Gather(cols), dtype=jnp.float32, interpret=True)
    assert_near([got], [reference(x.astype(jnp.float32), w, padding=[padding, (1, 0)])])


@pytest.mark.sweep
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("block", [1, 99])
@pytest.mark.parametrize("channels, lanes", [(256, 2), (130, 1)])
def test_tpu_groups_of_lanes(
    monkeypatch: pytest.MonkeyPatch, channels: int, lanes: int, block: int, gradient: bool
) -> None:
    """Several in a program are operands of their own; the last of several programs may lack some channels."""
    geometry = ((8, 3, 2, channels), (2, 1), 1)
    axes, x, w, g = arrays(*geometry)
    rows, cols = map(Gather, axes)
    plan = laid_out(rows, cols, "batch", block, lanes=lanes, unroll=64)
    assert slabs.slabs_of(plan, channels, 4, targets=False).apart == (lanes > 1)
    monkeypatch.setattr(tpu, "_plan", lambda *_, **__: plan)
    y, _, dw = expected(x, w, g, *geometry[1:])
    if gradient:
        assert_near([tpu.weight_gradient(x, g, *axes, interpret=True)], [dw])
    else:
        assert_near([tpu.convolve(x, w, w[0, 0], rows, cols, interpret=True)], [y + w[0, 0]])


@pytest.mark.sweep
@pytest.mark.parametrize("at_once", slabs.GROUPS)
@pytest.mark.parametrize(
    "geometry",
    [((64, 3, 2, 130), (5, 3), 1), ((32, 5, 2, 8), (2, 1), 2), ((32, 6, 1, 8), (2, 1), 1)],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 99])
def test_tpu_narrow_pixels_are_converted_amid_sums(
    monkeypatch: pytest.MonkeyPatch, block: int, geometry: Any, at_once: int
) -> None:
    plans = []

    def plan(n: int, c: int, _: int, rows: Gather, cols: Gather, *, gradient: bool) -> tpu.Plan:
        plan = laid_out(rows, cols, "batch", block, lanes=-(-c // slabs.LANES), unroll=64)
        plans.append(plan._replace(groups=plan.programs(n, c)[0], at_once=at_once))
        assert plans[-1].converts_amid
        return plans[-1]

    monkeypatch.setattr(tpu, "_plan", plan)
    axes, x, w, g = arrays(*geometry)
    x, g = (a.astype(jnp.bfloat16) for a in (x, g))
    got = tpu.weight_gradient(x, g, *axes, interpret=True)
    assert_near([got], expected(x.astype(jnp.float32), w, g.astype(jnp.float32), *geometry[1:])[2:])
    assert plans


def test_tpu_kernel_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fits no plan runs as two."""
    search = tpu._plan
    monkeypatch.setattr(
        tpu, "_plan", lambda *a, gradient: None if a[3].axis.kernel > 3 else search(*a, gradient=gradient)
    )
    axes, x, w, g = arrays(*GEOMETRIES[0])
    assert_near(results(tpu, axes, x, w, g), expected(x, w, g, *GEOMETRIES[0][1:]))


@pytest.mark.sweep
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("images, channels, strip", [(1, 8, 99), (1, 32, 2), (2, 16, 3)])
def test_gpu_plans(
    monkeypatch: pytest.MonkeyPatch, geometry: Any, images: int, channels: int, strip: int
) -> None:
    def plan(n: int, c: int, itemsize: int, cols: Gather, *, width: int) -> gpu.Plan:
        strips = Strips(cols, min(cols.targets, strip * cols.period))
        return gpu.Plan(images if n * strips.count % images == 0 else 1, channels, strips)

    monkeypatch.setattr(gpu, "_plan", plan)
    monkeypatch.setattr(gpu, "WARPS", 8)
    axes, x, w, g = arrays(*geometry)
    assert_near(results(gpu, axes, x, w, g), expected(x, w, g, *geometry[1:]))


@pytest.mark.sweep
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width, kernel", [(31, (2, 3)), (11, (1, 25))], ids=str)
def test_gpu_loops_over_tiles(
    monkeypatch: pytest.MonkeyPatch, width: int, kernel: tuple[int, int], stride: int
) -> None:
    """Tiles of the image's columns, or all of them reading the same pixels through other taps; chunks of outputs."""
    monkeypatch.setattr(gpu, "APART", 0)
    monkeypatch.setattr(gpu, "GRADIENT_READS", 16)
    monkeypatch.setattr(gpu, "CHUNK", 4)
    monkeypatch.setattr(gpu, "TILE", 4)
    axes, x, w, g = arrays((2, 3, width, 8), kernel, stride)
    assert_near(results(gpu, axes, x, w, g), expected(x, w, g, kernel, stride))


@pytest.mark.parametrize(
    "warps, parts", [(1, (1, 1, 3, 2)), (10, (3, 1, 3, 2)), (99, (3, 3, 3, 3)), (999, (3, 4, 3, 5))]
)
@pytest.mark.parametrize("padding", [0, 2, 3])
def test_gpu_weight_gradient_in_parts(
    monkeypatch: pytest.MonkeyPatch, padding: int, warps: int, parts: tuple[int, ...]
) -> None:
    """Of images, rows of pixels, columns and kernel rows, the last of which has fewer of those than others."""
    monkeypatch.setattr(gpu, "WARPS", warps)
    monkeypatch.setattr(gpu, "APART", 0)
    monkeypatch.setattr(gpu, "MOST_READ", 9)
    monkeypatch.setattr(gpu, "CHUNK", 4)
    monkeypatch.setattr(gpu, "FEWEST_ROWS", 2)
    monkeypatch.setattr(gpu, "GRADIENT_SUMS", 9)
    rng = np.random.default_rng(warps)
    rows, cols = Axis(9, 5, 1, 1, padding, padding), Axis(12, 3, 1, 1, 1, 1)
    x = jnp.asarray(rng.normal(size=(3, 9, 12, 32)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(3, rows.out, 12, 32)), jnp.float32)
    cut = mock.Mock(side_effect=gpu._parts)
    monkeypatch.setattr(gpu, "_parts", cut)
    got = gpu.weight_gradient(x, g, rows, cols, interpret=True)
    assert gpu._parts(*cut.call_args.args) == parts
    convolve = functools.partial(reference, x, padding=[(padding, padding), (1, 1)])
    _, vjp = jax.vjp(convolve, jnp.zeros((5, 3, 32)))
    assert_near([got], list(vjp(g)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpus_multiply_and_add_in_one_instruction(dtype: Any) -> None:
    """XLA's Triton makes two of a product and a sum; and three of a pair of bfloat16 that are widened."""
    axis = Axis(28, 7, 1, 1, 3, 3)
    x, w = jax.ShapeDtypeStruct((64, 28, 28, 192), dtype), jax.ShapeDtypeStruct((7, 7, 192), dtype)
    y, s = jax.ShapeDtypeStruct((4, 64, 64), dtype), jax.ShapeDtypeStruct((2, 4, 64), dtype)
    for function, arguments, widened in (
        (lambda x, w: gpu.convolve(x, w, None, Gather(axis), Gather(axis)), (x, w), True),
        (lambda x, g: gpu.weight_gradient(x, g, axis, axis), (x, x), True),
        (lambda y, s: gpu_blast._mix(y, s, 64, False), (y, s), False),
        (lambda dz, y: gpu_blast._mix_gradient(dz, y, 64, False), (y, y), False),
    ):
        kernel = str(jax.make_jaxpr(function)(*arguments))
        assert kernel.count("fma.rn.f32") >= 2
        assert not re.search(r":f32\[\d+,\d+\] = (mul|add) ", kernel)
        assert (kernel.count("shl.b32") >= 20) == (widened and dtype == jnp.bfloat16)


@pytest.mark.sweep
@pytest.mark.parametrize("padding", [0, 2, 5])
@pytest.mark.parametrize("together, kernel", [(2, 3), (3, 3), (4, 5)])
def test_gpu_rows_computed_together(
    monkeypatch: pytest.MonkeyPatch, together: int, kernel: int, padding: int
) -> None:
    """In an image of one tile, or with tiles that read padding like pixels; what is not finite stays where it is."""
    monkeypatch.setattr(gpu, "FULL", 0)
    monkeypatch.setattr(gpu, "APART", 0)
    monkeypatch.setattr(gpu, "TOGETHER", (together,))
    monkeypatch.setattr(gpu, "TILE", 4)
    rng = np.random.default_rng(together)
    height = 4 * together * 3 + kernel - 1 - 2 * padding
    for width in (4, 11):
        rows, cols = Axis(height, kernel, 1, 1, padding, padding), Axis(width, 3, 1, 1, 1, 1)
        x = jnp.asarray(rng.normal(size=(2, height, width, 24)), jnp.float32).at[1, 2, 1, 3].set(jnp.inf)
        w = jnp.asarray(rng.normal(size=(kernel, 3, 24)), jnp.float32)
        traced = jax.make_jaxpr(lambda x, w: gpu.convolve(x, w, None, Gather(rows), Gather(cols)))(x, w)  # noqa: B023
        assert str(traced).count("cond[") == together * (1 if width == 4 else 2)
        got = gpu.convolve(x, w, None, Gather(rows), Gather(cols), interpret=True)
        want = reference(x, w, padding=[(padding, padding), (1, 1)])
        assert not np.isfinite(want).all()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_gpu_code_does_not_grow_with_the_image(stride: int) -> None:
    """Triton's time to compile grows with the cube of the code."""

    def products(width: int) -> int:
        axes, x, w, g = arrays((1, 4, width, 32), (3, 3), stride)
        return str(jax.make_jaxpr(functools.partial(results, gpu, axes))(x, w, g)).count("= mul")

    assert products(4 * 112) <= 1.1 * products(2 * 112)


def test_long_sequences_are_not_cut_slice_by_slice() -> None:
    def equations(length: int) -> int:
        axes, x, w, g = arrays((1, 1, length, 32), (1, 4), 1)
        return str(jax.make_jaxpr(functools.partial(results, gpu, axes))(x, w, g)).count(" = ")

    assert equations(1 << 16) <= 1.1 * equations(1 << 12)


@pytest.mark.parametrize("gradient", [False, True])
def test_rows_that_all_stand_apart_are_not_all_unrolled(gradient: bool) -> None:
    axis = Gather(Axis(12, 13, 1, 1, 6, 6))
    plan = tpu._search(32, 384, 4, axis, axis, gradient, vmem=64 << 20, cores=1)
    assert plan and plan.unroll <= 4


def planned(shape: tuple[int, ...], kernel: int, gradient: bool) -> tpu.Plan:
    """What the launch of a convolution that keeps the image's size goes by, in float32."""
    n, *sizes, c = shape
    rows, cols = (Gather(Axis(size, kernel, 1, 1, kernel // 2, kernel // 2)) for size in sizes)
    plan = tpu._plan(n, c, 4, rows, cols, gradient=gradient)
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    "shape, kernel",
    [((1, 64, 64, 64), 31), ((8, 56, 56, 96), 7), ((2, 224, 224, 40), 3), ((32, 12, 12, 512), 13)],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_tpu_plans_fit(shape: tuple[int, ...], kernel: int, gradient: bool) -> None:
    plan, c = planned(shape, kernel, gradient), shape[-1]
    assert tpu._vmem_bytes(plan, c, 4, gradient) <= vmem_budget()
    code = tpu._program(plan.blocks, plan.strips, plan.unroll, gradient)[0]
    assert plan.repeats * code <= tpu.CODE_BUDGET


def test_tpu_rows_turned_amid_the_convolution_take_vmem() -> None:
    """The compiler wants 18.4 MB for this, more than a v4 has."""
    axis = Gather(Axis(48, 13, 1, 1, 6, 6))
    plan = laid_out(axis, axis, "images", 8)
    assert plan.streams and tpu._vmem_bytes(plan, 128, 2, False) > 16 << 20


@pytest.mark.parametrize("channels", [1024, 1536, 2048])
def test_tpu_columns_meet_in_no_bank(channels: int) -> None:
    axis = Gather(Axis(7, 13, 1, 1, 6, 6))
    plan = tpu._search(64, channels, 4, axis, axis, gradient=False, vmem=64 << 20, cores=1)
    assert plan is not None
    sources, _ = tpu._sides(plan, channels, 4, gradient=False)
    apart = [spec.block_shape[-1] // slabs.LANES for spec in sources.specs([0])]
    assert sources.copied or all(registers % 4 for registers in apart)


@pytest.mark.parametrize(
    "shape, kernel",
    [
        ((1, 56, 56, 96), 7),
        ((8, 56, 56, 128), 3),
        ((8, 56, 56, 80), 13),
        ((16, 28, 28, 80), 13),
        ((64, 7, 7, 768), 13),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_tpu_launches_read_images_as_they_lie(shape: tuple[int, ...], kernel: int, gradient: bool) -> None:
    """Copies by XLA would take longer than the kernels."""
    n, _, width, c = shape
    assert tpu._copy_cycles(n, c, width, planned(shape, kernel, gradient)) == 0


@pytest.mark.parametrize(("target", "cores"), [("v5e", 1), ("v5p", 2)])
def test_tpu_cores_add_up_weight_gradients(target: str, cores: int) -> None:
    """What is left to XLA to add up must be written to HBM, and read again."""
    axis, x = Axis(7, 13, 1, 1, 6, 6), jax.ShapeDtypeStruct((64, 7, 7, 384), jnp.float32)
    with described(aot.TARGETS[target]):
        program = jax.jit(lambda x, g: tpu.weight_gradient(x, g, axis, axis)).trace(x, x).jaxpr.jaxpr
        plan = tpu._plan(64, 384, 4, Gather(axis), Gather(axis), gradient=True)
    (call,) = pallas_calls(program, aot.TARGETS[target])
    assert plan is not None and plan.programs(64, 384)[0] > cores
    assert call.outvars[0].aval.shape == (cores, 13, 13, 384)


def launched(case: Case) -> list[tpu.Plan]:
    """The plans of a case's forward pass, input gradient and weight gradient, as the operator calls for them."""
    plans: list[Any] = []

    def choose(x: Any, rows: Gather, cols: Gather, *, gradient: bool) -> None:
        itemsize = tpu._loadable(x.dtype).itemsize
        plans.append(tpu._plan(len(x), x.shape[-1], itemsize, rows, cols, gradient=gradient))

    def convolve(x: Any, w: Any, bias: Any, rows: Gather, cols: Gather, *, interpret: Any) -> Any:
        choose(x, rows, cols, gradient=False)
        return jnp.zeros((len(x), rows.targets, cols.targets, x.shape[-1]), x.dtype)

    def weight_gradient(x: Any, g: Any, rows: Axis, cols: Axis, *, interpret: Any) -> Any:
        choose(x, Gather(rows), Gather(cols), gradient=True)
        return jnp.zeros((rows.kernel, cols.kernel, x.shape[-1]), jnp.float32)

    def evaluate(*arrays: jax.Array) -> Any:
        function = functools.partial(OPERATOR.function, implementation="pallas", **case.options)
        y, vjp = jax.vjp(function, *arrays)
        return vjp(y)

    # Without jit, which would remember an equal call.
    with pytest.MonkeyPatch.context() as patch, testing.interpret("tpu"), jax.disable_jit():
        patch.setattr(tpu, "convolve", convolve)
        patch.setattr(tpu, "weight_gradient", weight_gradient)
        jax.eval_shape(evaluate, *case.arguments)
    return plans


@pytest.mark.sweep
def test_parity_cases_take_every_layout_of_a_tpu() -> None:
    passes = list(zip(*map(launched, OPERATOR.parity_cases()), strict=True))
    assert len(passes) == 3
    for plans in passes:
        assert {p.places for p in plans} == set(get_args(slabs.Places))
        assert {p.places for p in plans if p.blocks.count > 1} == {"batch", "strips"}
        assert {p.lanes > 1 for p in plans} == {p.steps and p.fold > 1 for p in plans} == {False, True}
    *convolutions, weight_gradients = passes
    assert all(any(p.streams for p in plans) for plans in convolutions)
    assert any(p.groups > 1 for p in weight_gradients)
