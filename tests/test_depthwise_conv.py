"""Depthwise convolution: parity with its definition, transforms, lowering for other platforms, sharding, errors."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import aot, lowering, testing
from pallas_kernels.aot._programs import described
from pallas_kernels.ops.depthwise_conv import OPERATOR, reference
from pallas_kernels.tpu import depthwise_conv as tpu

CASES = OPERATOR.parity_cases()
# What takes more than a few seconds to compile when it is interpreted, and what others cover nearly as well.
SLOW = {"K13x13", "K5x5", "K7x3", "K11x1", "K61x61", "57x5", "dilation=5", "dilation=2", "33"}
# Sizes of kernels and images, in layouts that others have.
SWEEP = {"9x5", "14x2", "2x15", "16x1", "dilation=7"}
MARKS = (SLOW, pytest.mark.slow), (SWEEP, pytest.mark.sweep)
KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


@pytest.fixture
def conv(implementation):
    """The operator by each implementation."""
    return functools.partial(pk.depthwise_conv, implementation=implementation)


def normal(random, *shape, dtype=np.float32):
    return jnp.asarray(random.normal(size=shape), dtype)


def assert_close(got, expected, tolerance=1e-5):
    """Equal in the L2 norm of each array, relative to `expected`."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def loss(conv):
    """A function whose gradients and second derivatives depend on all arguments."""
    return lambda *arrays: jnp.sum(jnp.tanh(conv(*arrays) / 3))


def gradients(conv):
    return jax.grad(loss(conv), (0, 1))


# Parity


@functools.cache
def results(i):
    one = dataclasses.replace(OPERATOR, parity_cases=lambda: [CASES[i]])
    return {r.implementation: r for r in testing.check_operator(one)}


@pytest.mark.parametrize(
    "i",
    [
        pytest.param(i, id=case.name, marks=[m for words, m in MARKS if words & set(case.name.split())])
        for i, case in enumerate(CASES)
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "pallas (tpu, interpreted)", "pallas (cuda, interpreted)"])
def test_parity(i, implementation):
    result = results(i)[implementation]
    assert result.ok, result.message


LARGE = [
    ((1, 56, 57, 20), (31, 31), {}),
    ((3, 28, 28, 40), (13, 13), {}),
    ((1, 14, 28, 96), (27, 29), {}),
    ((3, 13, 5, 130), (9, 17), {}),
    ((1, 57, 56, 3), (15, 15), {"strides": 2}),
    ((3, 28, 57, 20), (7, 5), {"dilation": 5}),
    ((1, 56, 56, 40), (7, 7), {"dilation": (2, 3), "strides": (2, 1)}),
    ((1, 57, 28, 3), (5, 3), {"dilation": 7, "padding": "VALID"}),
    ((3, 56, 14, 20), (1, 11), {}),
    ((3, 14, 56, 20), (11, 1), {"strides": 2}),
    ((1, 1, 13, 96), (31, 5), {}),
    ((3, 512, 40), (31,), {"padding": "CAUSAL"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("x", "kernel", "options"), LARGE)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_large_shapes_in_xla(x, kernel, options, dtype, tolerance, random):
    arrays = [random.normal(size=shape) for shape in (x, (*kernel, x[-1]), x[-1:])]

    def evaluate(function, *arrays):
        y, vjp = jax.vjp(function, *arrays)
        return y, *vjp(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    def ours(x, w, bias):
        return pk.depthwise_conv(x, w, bias=bias, implementation="xla", **options)

    with lowering.enable_x64():
        narrow = [jnp.asarray(a, dtype) for a in arrays]
        wide = [a.astype(jnp.float64) for a in narrow]
        expected = jax.jit(functools.partial(evaluate, functools.partial(reference, **options)))(*wide)
        got = jax.jit(functools.partial(evaluate, ours))(*narrow)
        assert {a.dtype for a in got} == {jnp.dtype(dtype)}
        assert_close([a.astype(jnp.float64) for a in got], list(expected), tolerance)


def relative_to_rounding(y, exact):
    """The error, as a multiple of what rounding the exact result would make."""
    error, rounding = (np.asarray(a, np.float64) - exact for a in (y, jnp.asarray(exact).astype(y.dtype)))
    return np.linalg.norm(error) / np.linalg.norm(rounding)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_sums_in_float32(conv, dtype, random):
    x, w = normal(random, 2, 5, 7, 8, dtype=dtype), normal(random, 7, 7, 8, dtype=dtype)
    with lowering.enable_x64():
        exact = reference(x.astype(jnp.float64), w.astype(jnp.float64))
        y = conv(x, w)
        assert y.dtype == dtype
        assert relative_to_rounding(y, exact) <= 2


def test_low_precision_of_961_taps_needs_float32(random):
    x, w = normal(random, 1, 31, 31, 8, dtype=jnp.bfloat16), normal(random, 31, 31, 8, dtype=jnp.bfloat16)
    with lowering.enable_x64():
        exact = reference(x.astype(jnp.float64), w.astype(jnp.float64), padding="VALID")
        y = pk.depthwise_conv(x, w, padding="VALID", implementation="xla")
        products = (x[0] * w).reshape(-1, 8)
        summed, _ = lax.scan(lambda y, p: (y + p, None), jnp.zeros(8, jnp.bfloat16), products)
        assert relative_to_rounding(y, exact) <= 2
        assert relative_to_rounding(summed.reshape(exact.shape), exact) > 2


# Transforms

X, W = (2, 5, 6, 3), (3, 3, 3)


def test_jit_and_eager_agree(conv, random):
    x, w = normal(random, *X), normal(random, *W)
    for function in (conv, gradients(conv)):
        assert_close(jax.jit(function)(x, w), function(x, w), 1e-6)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (-1, 2)], ids=str)
def test_vmap(conv, axes, random):
    shapes = [
        shape if axis is None else (*shape[: axis % 5], 2, *shape[axis % 5 :])
        for shape, axis in ((X, axes[0]), (W, axes[1]))
    ]
    x, w = (normal(random, *shape) for shape in shapes)
    assert_close(jax.jit(jax.vmap(conv, axes))(x, w), jax.vmap(reference, axes)(x, w))


def test_vmap_of_vmap(conv, random):
    x, w = normal(random, 2, *X), normal(random, 3, *W)

    def all_pairs(conv):
        return jax.vmap(jax.vmap(conv, (None, 0)), (0, None))

    assert_close(jax.jit(all_pairs(conv))(x, w), all_pairs(reference)(x, w))


ORDERS = {
    "grad of vmap": lambda conv, axes: gradients(jax.vmap(conv, axes)),
    "vmap of grad": lambda conv, axes: jax.vmap(gradients(conv), axes),
}


@pytest.mark.parametrize("axes", [(0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_vmap_and_grad(conv, order, axes, random):
    x, w = (normal(random, *([2] if a == 0 else []), *s) for s, a in ((X, axes[0]), (W, axes[1])))
    got = jax.jit(ORDERS[order](conv, axes))(x, w)
    assert_close(got, ORDERS[order](reference, axes)(x, w))


def test_scan_over_layers_with_remat(conv, random):
    x, w = normal(random, *X), normal(random, 3, *W)

    def network(conv):
        def layer(x, w):
            return jnp.tanh(conv(x, w) / 3), None

        return lambda x, w: lax.scan(jax.checkpoint(layer), x, w)[0]

    for function in (lambda f: f, gradients):
        assert_close(jax.jit(function(network(conv)))(x, w), function(network(reference))(x, w))


def test_second_derivatives(conv, random):
    x, w, tangent = normal(random, *X), normal(random, *W), normal(random, *X)

    def third(conv, x, w):
        """The gradient of a directional derivative goes through every rule twice."""
        dx, dw = gradients(conv)(x, w)
        return jnp.sum(dx * tangent) + jnp.sum(dw**2)

    second = jax.grad(third, (1, 2))
    got = jax.jit(functools.partial(second, conv))(x, w)
    assert_close(got, second(reference, x, w))


def test_zero_cotangent_gives_zero_gradients(conv, random):
    x, w, b = normal(random, *X), normal(random, *W), normal(random, 3)
    y, vjp = jax.vjp(lambda x, w, b: conv(x, w, bias=b), x, w, b)
    assert all(not np.any(g) for g in vjp(jnp.zeros_like(y)))


def test_three_runs_have_the_same_bits(conv, random):
    x, w = normal(random, 17, 5, 6, 20), normal(random, 3, 3, 20)
    function = jax.jit(gradients(conv))
    runs = [function(x, w) for _ in range(3)]
    assert len({b"".join(np.asarray(g).tobytes() for g in run) for run in runs}) == 1


def test_eval_shape(conv):
    x, w, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 8, 9, 3), (3, 5, 3), (3,)))
    y = jax.eval_shape(lambda x, w, b: conv(x, w, bias=b, strides=2, padding="VALID"), x, w, b)
    assert (y.shape, y.dtype) == ((2, 3, 3, 3), jnp.bfloat16)


def test_donation(conv, random):
    x, w = normal(random, *X), normal(random, *W)
    expected = reference(x, w)
    assert_close(jax.jit(conv, donate_argnums=0)(x, w), expected)


# Which programs hold a kernel


def lowered(function, *args, platform):
    """StableHLO for a platform. From 0.12 on JAX asks for which GPU."""
    gpu = described(aot.TARGETS["sm_90"])
    with gpu if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def structs(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def kernels_in(text):
    return {platform for platform, call in KERNELS.items() if call in text}


TRANSFORMS = {"forward": lambda f: f, "grad": gradients, "vmap of grad": lambda f: jax.vmap(gradients(f))}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_platform_lowered_for_has_its_kernel(platform, implementation, transform):
    function = TRANSFORMS[transform](functools.partial(pk.depthwise_conv, implementation=implementation))
    batch = (2,) * ("vmap" in transform)
    text = lowered(function, *structs((*batch, *X), (*batch, *W)), platform=platform)
    assert kernels_in(text) == ({platform} & set(KERNELS) if implementation is None else set())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("shapes", [(X, W), ((1, 56, 56, 96), (7, 7, 96))], ids=["unrolled", "loops"])
def test_float32_has_its_kernel_where_float64_is_enabled(shapes, platform):
    with lowering.enable_x64():
        text = lowered(gradients(pk.depthwise_conv), *structs(*shapes), platform=platform)
    assert kernels_in(text) == {platform}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("wide", ["x w bias", "x", "w", "bias"])
def test_float64_is_left_to_xla(wide, platform):
    """Whichever of the arrays it is; results and gradients have the dtype of what they belong to."""
    dtypes = ["float64" if name in wide.split() else "float32" for name in ("x", "w", "bias")]

    def evaluate(x, w, bias):
        y, vjp = jax.vjp(lambda x, w, bias: pk.depthwise_conv(x, w, bias=bias), x, w, bias)
        return y, *vjp(y)

    with lowering.enable_x64():
        arrays = [jax.ShapeDtypeStruct(shape, d) for shape, d in zip((X, W, W[-1:]), dtypes, strict=True)]
        assert [a.dtype for a in jax.eval_shape(evaluate, *arrays)] == [dtypes[0], *dtypes]
        assert not kernels_in(lowered(evaluate, *arrays, platform=platform))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_equal_layers_share_one_program(platform):
    def network(count):
        return gradients(lambda x, w: functools.reduce(lambda x, _: pk.depthwise_conv(x, w), range(count), x))

    one, ten = (lowered(network(n), *structs(X, W), platform=platform) for n in (1, 10))
    assert len(ten) < 2 * len(one)


# Sharding


@pytest.fixture
def mesh():
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()), ("d",))


BATCH, CHANNELS = (P("d"), P()), (P(None, None, None, "d"), P(None, None, "d"))
each_split = pytest.mark.parametrize("split", [BATCH, CHANNELS], ids=["batch", "channels"])


def sharded(conv, mesh, split, check_vma=True):
    return jax.shard_map(conv, mesh=mesh, in_specs=split, out_specs=split[0], check_vma=check_vma)


@each_split
def test_shard_map(conv, mesh, split, random):
    x, w = normal(random, 8, 5, 6, 16), normal(random, 3, 3, 16)
    # The interpreter's own loops have no varying types.
    parts = sharded(conv, mesh, split, check_vma="xla" in repr(conv))
    assert_close(jax.jit(parts)(x, w), reference(x, w))
    assert_close(jax.jit(gradients(parts))(x, w), gradients(reference)(x, w))


def test_gradient_of_a_replicated_weight_inside_shard_map(mesh, random):
    x, w = normal(random, 8, 5, 6, 16), normal(random, 3, 3, 16)
    conv = functools.partial(pk.depthwise_conv, implementation="xla")
    inside = jax.shard_map(gradients(conv), mesh=mesh, in_specs=BATCH, out_specs=BATCH)
    assert_close(jax.jit(inside)(x, w), gradients(reference)(x, w))


@each_split
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_shard_map_lowers_to_kernels(split, platform):
    with described(aot.TARGETS["sm_90"]):
        device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    # The mesh of a shard_map says which GPU it lowers for.
    options = {"abstract_device": device} if device is not None and platform == "cuda" else {}
    mesh = AbstractMesh((8,), ("d",), (AxisType.Auto,), **options)
    function = gradients(sharded(pk.depthwise_conv, mesh, split))
    text = lowered(function, *structs((8, 5, 6, 16), (3, 3, 16)), platform=platform)
    assert kernels_in(text) == {platform}


@each_split
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_refuse_automatic_partitioning(mesh, split, platform):
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((8, 5, 6, 16), (3, 3, 16)), split, strict=True)
    )
    with pytest.raises(NotImplementedError, match="shard_map"):
        lowered(pk.depthwise_conv, x, w, platform=platform)
    xla = functools.partial(pk.depthwise_conv, implementation="xla")
    assert not kernels_in(lowered(xla, x, w, platform=platform))


@each_split
@pytest.mark.parametrize("k", [3, 13])
def test_xla_partitions_without_gathering(mesh, split, k, random):
    arrays = normal(random, 8, 7, 7, 64), normal(random, k, k, 64)
    x, w = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, split, strict=True))
    both = jax.jit(lambda x, w: (pk.depthwise_conv(x, w), gradients(pk.depthwise_conv)(x, w)))
    assert "all-gather" not in both.lower(x, w).compile().as_text()
    assert_close(both(x, w)[0], reference(*arrays))


def test_a_cpu_sums_over_images_outside_of_the_nest():
    """Inside, LLVM would not vectorise it: 7x7 images with 7x7 kernels would take three times as long."""
    x, w = jax.ShapeDtypeStruct((4, 7, 7, 16), jnp.float32), jax.ShapeDtypeStruct((7, 7, 16), jnp.float32)
    of_w = jax.jit(lambda x, w, g: jax.vjp(lambda w: pk.depthwise_conv(x, w), w)[1](g))
    program = of_w.lower(x, w, x).compile().as_text()
    assert " dot(" in program and " reduce(" not in program


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [3, 13])
def test_explicit_axes_are_left_to_xla_or_refused(devices, k, random):
    explicit = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Explicit,))
    x, w = normal(random, 8, 5, 6, 16), normal(random, k, k, 16)
    with jax.set_mesh(explicit):
        placed = jax.device_put(x, NamedSharding(explicit, BATCH[0]))
        assert_close(jax.jit(pk.depthwise_conv)(placed, w), reference(x, w))
        for platform in ("tpu", "cuda"):
            with pytest.raises(NotImplementedError, match="shard_map"):
                lowered(pk.depthwise_conv, placed, w, platform=platform)
        inside = sharded(pk.depthwise_conv, explicit, BATCH)
        assert kernels_in(lowered(inside, placed, w, platform="tpu")) == {"tpu"}


# Interpret mode


def test_a_jitted_function_follows_interpret_mode(random):
    x, w = normal(random, *X), normal(random, *W)
    function = jax.jit(functools.partial(pk.depthwise_conv, implementation="pallas"))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"interpret\(\)"):
            function(x, w)
        for platform in ("tpu", "cuda"):
            with testing.interpret(platform):
                assert_close(function(x, w), reference(x, w))


def test_a_backward_pass_runs_as_its_forward_pass_did(random):
    x, w = normal(random, *X), normal(random, *W)
    with testing.interpret("tpu"):
        y, vjp = jax.vjp(functools.partial(pk.depthwise_conv, implementation="pallas"), x, w)
    assert_close(vjp(y), jax.vjp(reference, x, w)[1](y))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "kernel", "fold", "planned"),
    [
        ((9, 5, 6, 130), (3, 3), 1, {"lanes": {2}, "steps": {False}}),
        ((16, 5, 5, 3), (1, 3), 1, {"blocks": {3, 5}, "groups": {1, 2}}),
        ((6, 4, 3, 70), (3, 2), 2, {"lanes": {2}, "steps": {True}, "fold": {2}}),
    ],
    ids=["lanes", "blocks of rows, groups of images", "steps of folded images"],
)
def test_programs_of_a_grid_do_not_race(monkeypatch, x, kernel, fold, planned, random):
    search, plans = tpu._plan, []

    def plan(n, c, *args, **options):
        plan = search(n, c, *args, **options)
        assert plan is not None
        plans.append(plan if fold == 1 else plan._replace(fold=fold, lanes=-(-fold * c // 128), steps=True))
        return plans[-1]

    monkeypatch.setattr(tpu, "_plan", plan)
    x, w = normal(random, *x), normal(random, *kernel, x[-1])
    with testing.interpret("tpu", detect_races=True):
        y, vjp = jax.vjp(functools.partial(pk.depthwise_conv, implementation="pallas"), x, w)
        got = y, *vjp(y)
        jax.block_until_ready(got)
    expected, vjp = jax.vjp(reference, x, w)
    assert_close(got, (expected, *vjp(expected)))
    chosen = [p._asdict() | {"blocks": p.blocks.count} for p in plans]
    assert {name: {p[name] for p in chosen} for name in planned} == planned


# Errors


def call(x=X, w=W, bias=None, x_dtype="float32", w_dtype="float32", bias_dtype="float32", **options):
    bias = None if bias is None else jnp.ones(bias, bias_dtype)
    return pk.depthwise_conv(jnp.ones(x, x_dtype), jnp.ones(w, w_dtype), bias=bias, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": (5, 3)}, ValueError, ["(N, L, C) or (N, H, W, C)", "(5, 3)"]),
        ({"x": (1, 2, 5, 6, 3)}, ValueError, ["(N, L, C) or (N, H, W, C)", "(1, 2, 5, 6, 3)"]),
        ({"w": (3, 3)}, ValueError, ["(KH, KW, 3)", "(3, 3)"]),
        ({"x": (2, 5, 3)}, ValueError, ["(K, 3)", "(3, 3, 3)"]),
        ({"w": (3, 3, 4)}, ValueError, ["(KH, KW, 3)", "(3, 3, 4)"]),
        ({"w": (3, 3, 1, 3)}, ValueError, ["(KH, KW, 3)", "(3, 3, 1, 3)"]),
        ({"x": (0, 5, 6, 3)}, ValueError, ["positive", "(0, 5, 6, 3)"]),
        ({"x": (2, 5, 0, 3)}, ValueError, ["positive", "(2, 5, 0, 3)"]),
        ({"w": (3, 0, 3)}, ValueError, ["positive", "(3, 0, 3)"]),
        ({"strides": 0}, ValueError, ["strides", "positive int or 2 of them", "0"]),
        ({"strides": (1, -2)}, ValueError, ["strides", "positive int or 2 of them", "(1, -2)"]),
        ({"strides": (1, 2, 1)}, ValueError, ["strides", "positive int or 2 of them", "(1, 2, 1)"]),
        ({"strides": 1.5}, ValueError, ["strides", "positive int", "1.5"]),
        ({"strides": float("nan")}, ValueError, ["strides", "positive int or 2 of them", "nan"]),
        ({"strides": float("inf")}, ValueError, ["strides", "positive int or 2 of them", "inf"]),
        ({"strides": True}, ValueError, ["strides", "positive int or 2 of them", "True"]),
        ({"strides": np.True_}, ValueError, ["strides", "positive int or 2 of them", "True"]),
        ({"strides": None}, ValueError, ["strides", "positive int or 2 of them", "None"]),
        ({"strides": (1, None)}, ValueError, ["strides", "positive int or 2 of them", "(1, None)"]),
        ({"strides": ((1, 2), 3)}, ValueError, ["strides", "positive int or 2 of them", "((1, 2), 3)"]),
        ({"strides": "a"}, ValueError, ["strides", "positive int or 2 of them", "'a'"]),
        ({"dilation": "2"}, ValueError, ["dilation", "positive int or 2 of them", "'2'"]),
        ({"dilation": -1}, ValueError, ["dilation", "positive int or 2 of them", "-1"]),
        ({"padding": "FULL"}, ValueError, ["'SAME'", "'FULL'"]),
        ({"padding": "CAUSAL"}, ValueError, ["one dimension only", "'CAUSAL'"]),
        ({"padding": ((1, 1),)}, ValueError, ["2 (before, after) pairs", "((1, 1),)"]),
        ({"padding": ((1, 1, 1), (1, 1, 1))}, ValueError, ["2 (before, after) pairs", "(1, 1, 1)"]),
        ({"padding": (1, 1)}, ValueError, ["2 (before, after) pairs", "(1, 1)"]),
        ({"padding": None}, ValueError, ["2 (before, after) pairs", "None"]),
        ({"padding": True}, ValueError, ["ints: one, or 2 (before, after) pairs", "True"]),
        ({"padding": 1.0}, ValueError, ["ints: one, or 2 (before, after) pairs", "1.0"]),
        (
            {"padding": ((0.5, 0.9), (1, 1))},
            ValueError,
            ["ints: one, or 2 (before, after) pairs", "((0.5, 0.9), (1, 1))"],
        ),
        (
            {"padding": ((None, 0), (1, 1))},
            ValueError,
            ["ints: one, or 2 (before, after) pairs", "((None, 0), (1, 1))"],
        ),
        (
            {"padding": ((1, 1), (False, 1))},
            ValueError,
            ["ints: one, or 2 (before, after) pairs", "((1, 1), (False, 1))"],
        ),
        ({"precision": "foo"}, ValueError, ["Precision", "'highest'", "foo"]),
        ({"w": (7, 3, 3), "padding": "VALID"}, ValueError, ["empty", "(7, 3)", "(5, 6)"]),
        ({"padding": ((-3, -3), (0, 0))}, ValueError, ["empty", "(3, 3)", "(-3, -3)"]),
        ({"x_dtype": "int32"}, TypeError, ["`x`", "float16 or float64", "int32"]),
        ({"w_dtype": "int8"}, TypeError, ["`w`", "float16 or float64", "int8"]),
        ({"x_dtype": "complex64"}, TypeError, ["`x`", "float16 or float64", "complex64"]),
        ({"x_dtype": "float8_e5m2"}, TypeError, ["`x`", "float16 or float64", "float8_e5m2"]),
        ({"w_dtype": "float8_e4m3fn"}, TypeError, ["`w`", "float16 or float64", "float8_e4m3fn"]),
        (
            {"bias": (3,), "bias_dtype": "float8_e4m3fn"},
            TypeError,
            ["`bias`", "float16 or float64", "float8_e4m3fn"],
        ),
        ({"bias": (4,)}, ValueError, ["bias", "(3,)", "(4,)"]),
        ({"bias": (1, 3)}, ValueError, ["bias", "(3,)", "(1, 3)"]),
        ({"implementation": "cudnn"}, ValueError, ["None, 'xla' or 'pallas'", "'cudnn'"]),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_when_traced(arguments, error, words):
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda: call(**arguments))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [("x", [1.0], "list"), ("x", None, "NoneType"), ("w", None, "NoneType"), ("bias", 3, "int")],
)
def test_things_that_are_not_arrays_are_refused(name, value, got):
    arguments = {"x": jnp.ones(X), "w": jnp.ones(W)} | {name: value}
    with pytest.raises(TypeError, match=rf"`{name}` must be an array of .*, got .*{got}"):
        pk.depthwise_conv(**arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": np.int32(2), "dilation": np.int64(2), "padding": np.int8(2)},
        {"strides": np.array([2, 2]), "dilation": [2, 2], "padding": np.array([[2, 2], [2, 2]])},
        {"strides": 2, "dilation": 2, "padding": [(np.int64(2), 2), [2, 2]], "precision": "highest"},
        {"strides": 2, "dilation": 2, "padding": 2, "precision": (lax.Precision.HIGH, lax.Precision.DEFAULT)},
    ],
    ids=str,
)
def test_ints_may_be_those_of_numpy_and_precisions_those_of_lax(options, random):
    x, w = normal(random, *X), normal(random, *W)
    expected = pk.depthwise_conv(x, w, strides=2, dilation=2, padding=2)
    np.testing.assert_array_equal(pk.depthwise_conv(x, w, **options), expected)


# One array of float64 among others is enough.
each_float64 = pytest.mark.parametrize("wide", ["x_dtype", "w_dtype", "bias_dtype"])


@each_float64
def test_pallas_refuses_float64(wide):
    with lowering.enable_x64(), pytest.raises(NotImplementedError, match="no float64 arithmetic"):
        jax.eval_shape(lambda: call(bias=(3,), implementation="pallas", **{wide: "float64"}))


@each_float64
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_interpreted_pallas_refuses_float64(platform, wide):
    refused = pytest.raises(NotImplementedError, match=f"on {platform}.*no float64 arithmetic")
    with lowering.enable_x64(), testing.interpret(platform), refused:
        jax.eval_shape(lambda: call(bias=(3,), implementation="pallas", **{wide: "float64"}))


# The signature of lax


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 7, 8, 6), (3, 5, 1, 6), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
        ((2, 6, 7, 8), (6, 1, 3, 5), {"padding": "same"}),
        ((2, 6, 7, 8), (6, 1, 3, 5), {"window_strides": (2, 1), "padding": ((1, 2), (0, -1))}),
        ((2, 9, 6), (4, 1, 6), {"dimension_numbers": ("NWC", "WIO", "NWC"), "window_strides": (2,)}),
        ((7, 6, 2, 8), (3, 6, 1, 5), {"dimension_numbers": ("HCNW", "HOIW", "WNCH")}),
        ((8, 2, 6, 7), (1, 5, 6, 3), {"dimension_numbers": ("WNCH", "IWOH", "CHNW"), "padding": "VALID"}),
        ((2, 9, 9, 6), (3, 3, 1, 6), {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "rhs_dilation": (2, 3)}),
        (
            (2, 7, 8, 6),
            (2, 4, 1, 6),
            {"dimension_numbers": ("NHWC", "HWIO", "NCHW"), "padding": "SAME_LOWER"},
        ),
    ],
    ids=str,
)
def test_conv_general_dilated_is_that_of_lax(lhs, rhs, options, random):
    lhs, rhs = normal(random, *lhs), normal(random, *rhs)
    options = {
        "window_strides": (1,) * (lhs.ndim - 2), "padding": "SAME", "feature_group_count": 6, **options,
    }  # fmt: skip

    def evaluate(conv):
        y, vjp = jax.vjp(lambda lhs, rhs: conv(lhs, rhs, **options), lhs, rhs)
        return y, *vjp(jnp.cos(y))

    assert_close(evaluate(pk.conv_general_dilated), evaluate(lax.conv_general_dilated))
    text = lowered(functools.partial(pk.conv_general_dilated, **options), lhs, rhs, platform="tpu")
    assert kernels_in(text) == {"tpu"}


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 6, 7, 8), (12, 1, 3, 3), {"feature_group_count": 6}),
        ((2, 6, 7, 8), (6, 2, 3, 3), {"feature_group_count": 3}),
        ((2, 6, 7, 8), (4, 6, 3, 3), {}),
        (
            (2, 6, 7, 8),
            (6, 1, 3, 3),
            {"feature_group_count": 6, "lhs_dilation": (2, 1), "padding": ((1, 1), (2, 0))},
        ),
        ((6, 1, 7, 8), (6, 1, 3, 3), {"batch_group_count": 6}),
        ((2, 6, 4, 5, 5), (6, 1, 3, 3, 3), {"feature_group_count": 6}),
        ((0, 6, 7, 8), (6, 1, 3, 3), {"feature_group_count": 6}),
        ((2, 6, 2, 2), (6, 1, 3, 3), {"feature_group_count": 6, "padding": "VALID"}),
        ((2, 6, 7, 8), (6, 1, 3, 3), {"feature_group_count": 6, "preferred_element_type": jnp.float32}),
    ],
    ids=str,
)
def test_conv_general_dilated_hands_the_rest_to_lax(lhs, rhs, options, random):
    lhs, rhs = normal(random, *lhs), normal(random, *rhs)
    options = {"window_strides": (1,) * (lhs.ndim - 2), "padding": "SAME", **options}
    if "preferred_element_type" in options:
        lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    got, expected = (f(lhs, rhs, **options) for f in (pk.conv_general_dilated, lax.conv_general_dilated))
    assert got.dtype == expected.dtype and (got == expected).all()
    text = lowered(functools.partial(pk.conv_general_dilated, **options), lhs, rhs, platform="tpu")
    assert not kernels_in(text)


@pytest.mark.parametrize("wrong", [{"padding": 1}, {"padding": "some"}, {"rhs_dilation": (0, 1)}], ids=str)
def test_conv_general_dilated_refuses_what_lax_does(wrong):
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 6, **wrong}
    errors = []
    for f in (pk.conv_general_dilated, lax.conv_general_dilated):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as e:
            f(jnp.ones((2, 6, 7, 8)), jnp.ones((6, 1, 3, 3)), **options)
        errors.append((e.type, str(e.value)))
    assert errors[0] == errors[1]


def test_conv_general_dilated_of_integers_is_that_of_lax(random):
    lhs, rhs = (jnp.asarray(random.integers(-9, 9, s), jnp.int32) for s in ((2, 6, 7, 8), (6, 1, 3, 3)))
    got, expected = (
        f(lhs, rhs, (1, 1), "SAME", feature_group_count=6)
        for f in (pk.conv_general_dilated, lax.conv_general_dilated)
    )
    assert got.dtype == jnp.int32 and (got == expected).all()


def test_conv_general_dilated_of_float8_is_that_of_lax(random):
    lhs, rhs = (normal(random, *s, dtype=jnp.float8_e4m3fn) for s in ((2, 6, 7, 8), (6, 1, 3, 3)))
    got, expected = (
        jax.make_jaxpr(lambda lhs, rhs: f(lhs, rhs, (1, 1), "SAME", feature_group_count=6))(lhs, rhs)  # noqa: B023
        for f in (pk.conv_general_dilated, lax.conv_general_dilated)
    )
    assert str(got) == str(expected)


def test_nnx_conv_takes_the_kernel(random):
    make = functools.partial(nnx.Conv, 16, 16, (5, 5), feature_group_count=16, padding="SAME")
    stock, ours = make(rngs=nnx.Rngs(0)), make(conv_general_dilated=pk.conv_general_dilated, rngs=nnx.Rngs(0))
    x = normal(random, 2, 7, 7, 16)
    assert_close(ours(x), stock(x))
    assert kernels_in(lowered(lambda x: stock(x), x, platform="tpu")) == set()
    assert kernels_in(lowered(lambda x: ours(x), x, platform="tpu")) == {"tpu"}
