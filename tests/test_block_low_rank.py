"""What the products with block-low-rank matrices share: layouts, structure, gradients, transforms, errors."""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import aot, lowering, testing
from pallas_kernels.aot._programs import described, pallas_calls, work_of
from pallas_kernels.blocks import Blocks, blast_work, monarch_work, powers_of_two
from pallas_kernels.gpu import blast_matmul as gpu_blast
from pallas_kernels.kernels.blast_matmul import GROUP, expand
from pallas_kernels.operators import operators
from pallas_kernels.ops import _block_low_rank, blast_matmul, low_rank_matmul, monarch_matmul
from pallas_kernels.ops._block_low_rank import LAYERS
from pallas_kernels.tpu import blast_matmul as tpu_blast
from pallas_kernels.tpu import monarch_matmul as tpu_monarch
from pallas_kernels.tpu import streams

NAMES = ("blast_matmul", "low_rank_matmul", "monarch_matmul")
OPERATORS = {name: operators()[name] for name in NAMES}
MODULES: dict[str, Any] = dict(zip(NAMES, (blast_matmul, low_rank_matmul, monarch_matmul), strict=True))
# x and factors: small, without a power of two, with as many input as output blocks and not.
SHAPES = {
    "blast_matmul": ((5, 18), (2, 4, 5), (2, 3, 4), (3, 4, 6)),
    "low_rank_matmul": ((5, 18), (4, 10), (4, 18)),
    "monarch_matmul": ((5, 18), (3, 8, 6), (2, 12, 5)),
}
# Of each operator: what covers the code in seconds.
QUICK = {"N7", "N2x17", "N2x9", "N12", "N6", "order=interleaved"}
KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}

each_operator = pytest.mark.parametrize("name", NAMES)


def arrays(random, shapes, dtype: Any = np.float32):
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def function(name, **options):
    return functools.partial(OPERATORS[name].function, **options)


def assert_close(got, expected, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def gradients(f, count):
    return jax.grad(lambda *a: jnp.sum(jnp.tanh(f(*a) / 3)), tuple(range(count)))


# Parity


@functools.cache
def results(name, i):
    cases = OPERATORS[name].parity_cases()
    one = dataclasses.replace(OPERATORS[name], parity_cases=lambda: [cases[i]])
    return {r.implementation: r for r in testing.check_operator(one)}


CASES = [
    pytest.param(
        name, i, id=f"{name} {case.name}", marks=[pytest.mark.slow] * (not QUICK & set(case.name.split()))
    )
    for name in NAMES
    for i, case in enumerate(OPERATORS[name].parity_cases())
]


@pytest.mark.parametrize(("name", "i"), CASES)
@pytest.mark.parametrize("implementation", ["xla", "pallas (tpu, interpreted)", "pallas (cuda, interpreted)"])
def test_parity(name, i, implementation):
    result = results(name, i)[implementation]
    assert result.ok, result.message


@each_operator
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5)])
def test_the_dense_matrix_gives_the_same(name, dtype, tolerance, random):
    with lowering.enable_x64():
        x, *factors = arrays(random, SHAPES[name], dtype)
        dense = MODULES[name].to_dense(*factors)
        assert_close(function(name)(x, *factors), x @ dense, tolerance)


PUBLISHED = [
    pytest.param(
        name,
        layer,
        id=f"{name} {layer.name}",
        marks=[pytest.mark.slow] * (layer.inputs * layer.outputs > 2**22),
    )
    for name in NAMES
    for layer in LAYERS
    if name != "monarch_matmul" or layer.monarch
]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "layer"), PUBLISHED)
def test_published_layers(name, layer, random):
    """The definition, one block after the other, in float64; the largest layers in float32 only, to save time."""
    b, rank = {"blast_matmul": layer.blast, "monarch_matmul": layer.monarch}.get(name) or (1, layer.low_rank)
    p, q = layer.inputs // b, layer.outputs // b
    first, second = random.normal(size=(b, rank, p)) / p**0.5, random.normal(size=(b, rank, q)) / rank**0.5
    s, x = random.normal(size=(b, b, rank)) / b**0.5, random.normal(size=(2, layer.inputs))
    ranks = [block @ f.T for block, f in zip(np.split(x, b, 1), first, strict=True)]
    if name == "blast_matmul":
        factors = (second, s, first)
        mixed = [sum(s[j, k] * ranks[k] for k in range(b)) for j in range(b)]
    else:
        factors = (first, second) if name == "monarch_matmul" else (second[0], first[0])
        mixed = [np.concatenate([np.split(y, b, 1)[j] for y in ranks], 1) for j in range(b)]
    expected = np.concatenate([y @ f for y, f in zip(mixed, second, strict=True)], 1)
    with lowering.enable_x64():
        for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-13))[: 1 if layer.inputs > 4000 else 2]:
            got = jax.jit(function(name))(*(jnp.asarray(a, dtype) for a in (x, *factors)))
            assert got.dtype == dtype
            assert_close(got, expected, tolerance)


@each_operator
def test_unit_vectors_give_the_columns_of_the_matrix(name, random):
    _, *factors = arrays(random, SHAPES[name])
    dense = MODULES[name].to_dense(*factors)
    assert_close(function(name)(jnp.eye(len(dense)), *factors), dense)


@pytest.mark.sweep
@pytest.mark.parametrize("cores", [1, 2])
def test_plans_of_blast_on_a_tpu(cores, monkeypatch, random):
    """Ragged tiles of tokens and of ranks, programs that add up in parts, on one core and on two."""
    blocks = Blocks(2, 3, 6, 5, 24)
    operands = arrays(random, ((19, 12), (2, 24, 6), (3, 2, 24), (3, 24, 5)))
    (x, v, s, u), g = operands, arrays(random, [(19, 15)])[0]
    monkeypatch.setattr(tpu_blast, "cores", lambda: cores)
    monkeypatch.setattr(tpu_blast, "_plan", lambda *_, **__: tpu_blast.Plan(16, 2, 16, 2))
    run = functools.partial(tpu_blast.multiply, blocks=blocks, interpret=True)
    expected, backward = jax.vjp(
        lambda x, v, s, u: OPERATORS["blast_matmul"].reference(x, u, s, v), *operands
    )
    assert_close(run(x, v, s, u), expected)
    got = tpu_blast.gradients(x, g, v, s, u, blocks=blocks, interpret=True)
    assert_close(got, backward(g)[1:])


@pytest.mark.parametrize(("b1", "b2", "r"), [(16, 16, 128), (8, 32, 256), (16, 8, 40), (5, 3, 21)])
def test_what_mixes_ranks_in_a_matrix_unit(b1, b2, r, random):
    """Of many blocks and of whole registers of ranks some is made by shuffles, else all of it by products."""
    s = random.standard_normal((b2, b1, r), np.float32)
    expected = np.zeros((-(-r // GROUP), b2 * GROUP, b1 * GROUP), np.float32)
    for rank in range(r):
        group, i = divmod(rank, GROUP)
        expected[group, i::GROUP, i::GROUP] = s[:, :, rank]
    shape = jax.ShapeDtypeStruct(expected.shape, expected.dtype)
    np.testing.assert_array_equal(pl.pallas_call(expand, shape, interpret=True)(s), expected)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("p", "outputs", "tokens", "piece"),
    [
        pytest.param(128, (3, 5), 5, 1, id="x and v in pieces of one block and of two, u in two"),
        pytest.param(6, (4, 64), 5, 1, id="x and v at once, a result in two pieces"),
        pytest.param(6, (3, 5), 7, 1, id="a tile that is not full: blocks"),
    ],
)
def test_blast_copies_what_it_takes_and_gives(cores, p, outputs, tokens, piece, monkeypatch, random):
    """In programs that others follow; a batch of factors comes as blocks."""
    (b2, q), n = outputs, 40
    blocks = Blocks(5, b2, p, q, 24)
    shapes = (n, 5 * p), (5, 24, p), (b2, 5, 24), (b2, 24, q)
    monkeypatch.setattr(tpu_blast, "cores", lambda: cores)
    monkeypatch.setattr(streams, "cores", lambda: cores)
    monkeypatch.setattr(streams, "PIECE", piece)
    monkeypatch.setattr(tpu_blast, "_plan", lambda *_, **__: tpu_blast.Plan(tokens, -(-n // tokens), 24, 1))
    run = functools.partial(tpu_blast.multiply, blocks=blocks, interpret=True)
    reference = lambda x, v, s, u: OPERATORS["blast_matmul"].reference(x, u, s, v)  # noqa: E731
    x, v, s, u = arrays(random, shapes)
    assert_close(run(x, v, s, u), reference(x, v, s, u))
    batch = arrays(random, [(2, *shape) for shape in shapes])
    assert_close(jax.vmap(run)(*batch), jax.vmap(reference)(*batch))
    axes = (0, None, None, None)
    assert_close(jax.vmap(run, axes)(batch[0], v, s, u), jax.vmap(reference, axes)(batch[0], v, s, u))


@pytest.mark.sweep
@pytest.mark.parametrize("plan", [(1, 1, 3), (1, 3, 3), (2, 1, 3), (2, 3, 3), (1, 1, 1)])
def test_plans_of_monarch_on_a_tpu(plan, monkeypatch, random):
    """Ragged tiles of tokens, and programs for some of the blocks; with a scale too."""
    blocks = Blocks(2, 3, 6, 5, 4)
    x, a, b, g, scale = arrays(random, ((19, 12), (2, 12, 6), (3, 8, 5), (19, 15), (3, 2, 4)))
    monkeypatch.setattr(tpu_monarch, "_plan", lambda *_, **__: tpu_monarch.Plan(16, 2, *plan))
    reference = OPERATORS["monarch_matmul"].reference
    run = functools.partial(tpu_monarch.multiply, blocks=blocks, interpret=True)
    assert_close(run(x, a, b), reference(x, a, b))
    assert_close(run(x, a, b, scale.reshape(3, 8)), reference(x, a, b, scale))
    if plan[1] == 3:
        _, backward = jax.vjp(reference, x, a, b)
        got = tpu_monarch.gradients(x, g, a, b, blocks=blocks, dtype=jnp.float32, interpret=True)
        assert_close(got, backward(g)[1:])


@pytest.mark.sweep
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(tpu_monarch.Plan(20, 1, 2, 2, 5, "pieces"), id="pieces of one block and of more"),
        pytest.param(tpu_monarch.Plan(4, 5, 4, 5, 5, "tiles"), id="tiles of tokens"),
    ],
)
def test_monarch_copies_what_it_takes_and_gives(copied, monkeypatch, random):
    """More than VMEM holds at once; a batch comes as blocks."""
    blocks = Blocks(4, 5, 6, 5, 4)
    shapes = (20, 24), (4, 20, 6), (5, 16, 5)

    def plan(*_, copying, **__):
        return copied if copying else tpu_monarch.Plan(16, 2, 2, 5, 5)

    monkeypatch.setattr(tpu_monarch, "_plan", plan)
    run = functools.partial(tpu_monarch.multiply, blocks=blocks, interpret=True)
    reference = OPERATORS["monarch_matmul"].reference
    x, a, b = arrays(random, shapes)
    assert_close(run(x, a, b), reference(x, a, b))
    batch = arrays(random, [(2, *shape) for shape in shapes])
    assert_close(jax.vmap(run)(*batch), jax.vmap(reference)(*batch))
    scale = arrays(random, [(5, 4, 4)])[0]
    assert_close(run(x, a, b, scale.reshape(5, 16)), reference(x, a, b, scale))


@pytest.mark.parametrize(("blocks", "most"), [(1, 1), (2, 1), (7, 3), (16, 5), (16, 16)])
def test_pieces_grow_to_all_blocks(blocks, most):
    sizes = streams.growing(blocks, most)
    assert sum(sizes) == blocks and sizes[0] == 1 and max(sizes) <= most and sizes == sorted(sizes)
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))


# Structure


def test_orders_differ_by_permutations_of_ranks_and_outputs(random):
    b1, b2, t, q = 3, 2, 4, 5
    x, w1, w2 = arrays(random, SHAPES["monarch_matmul"])
    interleaved = pk.monarch_matmul(x, w1, w2, order="interleaved")
    blocked_w1 = w1.reshape(b1, t, b2, -1).swapaxes(1, 2).reshape(w1.shape)
    blocked = pk.monarch_matmul(x, blocked_w1, w2).reshape(-1, b2, q)
    assert_close(interleaved, blocked.swapaxes(1, 2).reshape(interleaved.shape))
    assert not np.allclose(interleaved, blocked.reshape(interleaved.shape))


def test_a_monarch_matrix_written_out(random):
    x, w1, w2 = (np.asarray(a, np.float64) for a in arrays(random, SHAPES["monarch_matmul"]))
    b1, b2, t, p, q = 3, 2, 4, 6, 5
    y = np.zeros((len(x), b2 * q))
    for j in range(b2):
        for k in range(b1):
            ranks = x[:, k * p : (k + 1) * p] @ w1[k, j * t : (j + 1) * t].T
            y[:, j * q : (j + 1) * q] += ranks @ w2[j, k * t : (k + 1) * t]
    assert_close(pk.monarch_matmul(*(jnp.asarray(a, jnp.float32) for a in (x, w1, w2))), y)


def test_the_discrete_fourier_transform_is_a_monarch_matrix_of_rank_one(random):
    b = 8
    n = b * b
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)
    # Output block and input block are the low digits; of the inputs, they come first.
    blocks = fourier.reshape(b, b, b, b).transpose(1, 3, 0, 2)
    left, values, right = np.linalg.svd(blocks)
    assert values[..., 1:].max() < 1e-10 * values.max()
    w1, w2 = right[..., 0, :].transpose(1, 0, 2), left[..., 0] * values[..., :1]
    x = random.normal(size=(2, n))
    inputs = x.reshape(2, b, b).swapaxes(1, 2).reshape(2, n)
    with lowering.enable_x64():
        # Real and imaginary parts of the factors give four real products.
        rr, ri, ir, ii = (
            np.asarray(pk.monarch_matmul(jnp.asarray(inputs), f(w1), g(w2), order="interleaved"))
            for f in (np.real, np.imag)
            for g in (np.real, np.imag)
        )
    assert np.abs(rr - ii + 1j * (ri + ir) - np.fft.fft(x)).max() < 1e-10


def test_blast_of_ones_is_of_low_rank_and_of_the_identity_is_block_diagonal(random):
    x, u, s, v = arrays(random, ((5, 18), (3, 4, 5), (3, 3, 4), (3, 4, 6)))
    low_rank = pk.low_rank_matmul(x, u.swapaxes(0, 1).reshape(4, -1), v.swapaxes(0, 1).reshape(4, -1))
    assert_close(pk.blast_matmul(x, u, jnp.ones_like(s), v), low_rank)
    diagonal = jnp.einsum("nkp,krp,krq->nkq", x.reshape(5, 3, 6), v, u).reshape(5, -1)
    assert_close(pk.blast_matmul(x, u, jnp.broadcast_to(jnp.eye(3)[..., None], s.shape), v), diagonal)


@each_operator
def test_the_transpose_exchanges_the_factors(name, random):
    _, *factors = arrays(random, SHAPES[name])
    exchanged = list(reversed(factors))
    if name == "blast_matmul":
        exchanged[1] = exchanged[1].swapaxes(0, 1)
    to_dense = MODULES[name].to_dense
    assert_close(to_dense(*exchanged), to_dense(*factors).T)


def test_int8_weights_are_their_values(random):
    x, w1, w2 = arrays(random, SHAPES["monarch_matmul"])
    quantized = [jnp.asarray(random.integers(-127, 128, w.shape), jnp.int8) for w in (w1, w2)]
    scale = jnp.asarray(random.uniform(0.1, 1, (2, 3, 4)), jnp.float32)
    rows = scale.swapaxes(0, 1).reshape(3, 8, 1)
    expected = pk.monarch_matmul(x, quantized[0] * rows, quantized[1].astype(jnp.float32))
    assert_close(pk.monarch_matmul(x, *quantized, scale=scale), expected)


# Transforms


@pytest.mark.parametrize("name", ["blast_matmul", "monarch_matmul"])
def test_vmap_of_gradients(name, implementation, random):
    x, *factors = arrays(random, SHAPES[name])
    batch = jnp.stack([x, 2 * x, -x])
    f, reference = function(name, implementation=implementation), OPERATORS[name].reference
    axes = (0, *(None for _ in factors))
    got, expected = (
        jax.jit(jax.vmap(gradients(g, len(axes)), axes))(batch, *factors) for g in (f, reference)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["monarch_matmul", pytest.param("blast_matmul", marks=pytest.mark.slow)])
def test_second_derivatives(name, implementation, random):
    operands = arrays(random, SHAPES[name])
    count = len(operands)

    def slope(f, *operands):
        """The gradients' own sizes, so that every rule is differentiated."""
        return sum(jnp.sum(jnp.sin(g)) for g in gradients(f, count)(*operands))

    f = function(name, implementation=implementation)
    second = jax.grad(slope, tuple(range(1, count + 1)))
    assert_close(
        jax.jit(functools.partial(second, f))(*operands), second(OPERATORS[name].reference, *operands)
    )


@each_operator
def test_no_tokens_give_no_results_and_gradients_of_zeros(name, random):
    x, *factors = arrays(random, SHAPES[name])
    x = jnp.zeros((2, 0, x.shape[-1]), jnp.bfloat16)
    y = function(name)(x, *factors)
    assert y.shape == (2, 0, 10) == OPERATORS[name].reference(x, *factors).shape and y.dtype == x.dtype
    found = gradients(function(name), 1 + len(factors))(x, *factors)
    assert_close(found, tuple(jnp.zeros_like(a) for a in (x, *factors)))


@each_operator
def test_remat_and_eval_shape(name, random):
    operands = arrays(random, SHAPES[name])
    f = function(name)
    assert_close(
        gradients(jax.checkpoint(f), len(operands))(*operands), gradients(f, len(operands))(*operands)
    )
    structs = [jax.ShapeDtypeStruct((2, *SHAPES[name][0]), jnp.bfloat16), *operands[1:]]
    y = jax.eval_shape(f, *structs)
    assert y.shape == (2, 5, 10) and y.dtype == jnp.bfloat16


@each_operator
def test_only_the_input_and_the_factors_are_saved(name, random):
    operands = arrays(random, SHAPES[name])
    _, backward = jax.vjp(function(name), *operands)
    saved = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert saved <= sum(a.size for a in operands)


@each_operator
def test_shard_map_over_tokens(name, random):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x, *factors = arrays(random, ((8, 18), *SHAPES[name][1:]))
    split = (P("d"), *(P() for _ in factors))
    f = function(name, implementation="xla")
    parts = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=P("d"))
    assert_close(jax.jit(parts)(x, *factors), f(x, *factors))
    count = len(split)
    assert_close(jax.jit(gradients(parts, count))(x, *factors), gradients(f, count)(x, *factors))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "plan"),
    [
        ("blast_matmul", 40, None),
        ("blast_matmul", 48, tpu_blast.Plan(8, 6, 16, 1)),
        ("monarch_matmul", 40, None),
        ("monarch_matmul", 24, tpu_monarch.Plan(24, 1, 1, 1, 3, "pieces")),
        ("monarch_matmul", 48, tpu_monarch.Plan(8, 6, 3, 3, 3, "tiles")),
    ],
)
def test_programs_of_a_grid_do_not_race(name, tokens, plan, monkeypatch, random):
    """Nor what they copy themselves with their products."""
    if isinstance(plan, tpu_blast.Plan):
        monkeypatch.setattr(streams, "PIECE", 1)
        monkeypatch.setattr(tpu_blast, "_plan", lambda *_, **__: plan)
    elif plan:
        checked = tpu_monarch._checked_plan
        copies = lambda *sizes, copying=False, **kind: plan if copying else checked(*sizes, **kind)  # noqa: E731
        monkeypatch.setattr(tpu_monarch, "_checked_plan", copies)
    shapes = (tokens, 18), *SHAPES[name][1:]
    if name == "blast_matmul" and plan:
        # Pieces of x are whole tiles of columns.
        shapes = (tokens, 3 * 128), *shapes[1:3], (3, *shapes[3][1:2], 128)
    x, *factors = arrays(random, shapes)
    f, reference = function(name, implementation="pallas"), OPERATORS[name].reference
    with testing.interpret("tpu", detect_races=True):
        got = gradients(f, 1 + len(factors))(x, *factors)
        jax.block_until_ready(got)
    assert_close(got, gradients(reference, 1 + len(factors))(x, *factors))


# Which programs hold a kernel


def lowered(f, *args, platform):
    gpu = described(aot.TARGETS["sm_90"])
    with gpu if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@each_operator
def test_the_platform_lowered_for_has_its_kernel(name, platform):
    case = OPERATORS[name].compile_cases(False)[0]
    count = len(case.arguments)
    text = lowered(gradients(function(name), count), *case.arguments, platform=platform)
    # On a GPU cuBLAS is faster, but at the mixing of BLAST's ranks.
    expected = {platform} & (KERNELS.keys() - ({"cuda"} if name != "blast_matmul" else set()))
    assert {p for p, call in KERNELS.items() if call in text} == expected


@pytest.mark.parametrize("tokens", [1, 32, 1000])
@each_operator
def test_a_tpu_takes_the_kernel_however_little_there_is_to_do(name, tokens, random):
    """Where XLA may be faster, both take microseconds. Factors that VMEM can't hold are left to it."""
    case = OPERATORS[name].parity_cases()[0]
    x, *factors = case.arguments
    x = jax.ShapeDtypeStruct((tokens, x.shape[1]), x.dtype)
    assert KERNELS["tpu"] in lowered(function(name), x, *factors, platform="tpu")


@pytest.mark.parametrize(
    ("name", "layer", "target", "taken"),
    [
        ("low_rank_matmul", "7B gate N1024", "v5e", True),
        ("low_rank_matmul", "7B gate N1024", "v6e", False),  # VMEM holds too few tokens
        ("low_rank_matmul", "1B up N197", "v5e", False),  # the factors arrive too late
        ("low_rank_matmul", "1B up N197", "v6e", False),
        ("low_rank_matmul", "1B up N384", "v5e", True),
        ("low_rank_matmul", "1B up N1 ", "v5e", True),
        ("low_rank_matmul", "1B qo N197", "v5e", True),
        ("low_rank_matmul", "GPT-2 c_proj N384", "v6e", True),  # of which a program takes 128 tokens
        (
            "blast_matmul",
            "7B gate N384",
            "v5e",
            False,
        ),  # XLA lays 1488 ranks along the lanes, and would turn them
        ("blast_matmul", "7B down N197", "v6e", False),
        ("blast_matmul", "7B gate N384", "v4", True),
        ("blast_matmul", "7B gate N1024", "v5e", True),
        ("blast_matmul", "7B qkvo N197", "v5e", True),
    ],
)
def test_what_a_kernel_is_slower_at_is_left_to_xla(name, layer, target, taken):
    case = next(c for c in OPERATORS[name].compile_cases(True) if layer in c.name)
    with described(aot.TARGETS[target]):
        program = jax.jit(function(name)).trace(*case.arguments).jaxpr.jaxpr
        assert bool(list(pallas_calls(program, aot.TARGETS[target]))) == taken


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_tokens_that_wait_for_hbm_come_many_at_a_time(target):
    """A copy takes some time beside that for its bytes."""
    with described(aot.TARGETS[target]):
        plan = tpu_monarch._plan(4096, Blocks(1, 1, 3072, 768, 128), 2, 2, gradient=False)
    assert plan is not None and plan.tokens >= 512


@pytest.mark.parametrize("tokens", [100, 197])
@pytest.mark.parametrize("name", ["blast_matmul", "monarch_matmul"])
def test_a_tpu_fills_up_and_cuts_off_nothing(name, tokens):
    """What XLA would do around the kernel can take longer than the kernel does."""
    case = next(c for c in OPERATORS[name].compile_cases(True) if "GPT-2 c_fc N1024" in c.name)
    x, *factors = case.arguments
    x = jax.ShapeDtypeStruct((tokens, x.shape[1]), x.dtype)
    text = lowered(function(name, implementation="pallas"), x, *factors, platform="tpu")
    assert not {op for op in ("stablehlo.pad", "stablehlo.slice", "stablehlo.transpose") if op in text}


@pytest.mark.parametrize("batched", [False, True])
def test_large_factors_of_blast_are_lowered_alone_in_batches_and_in_shard_map(batched):
    (case,) = (c for c in OPERATORS["blast_matmul"].compile_cases(True) if "1B up N1024" in c.name)
    f, operands = function("blast_matmul"), case.arguments
    if batched:
        f, operands = jax.vmap(f), [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in operands]
    split = (P(None, "d") if batched else P("d"), P(), P(), P())
    inside = jax.shard_map(
        f, mesh=Mesh(np.array(jax.devices()[:2]), ("d",)), in_specs=split, out_specs=split[0]
    )
    for program in (f, inside):
        assert lowered(program, *operands, platform="tpu").count("tpu_custom_call") == 1


@pytest.mark.parametrize(
    ("name", "layer"), [("blast_matmul", " N1 "), ("monarch_matmul", " N1 "), ("monarch_matmul", " N1024 ")]
)
def test_a_gpu_leaves_to_cublas_what_it_does_faster(name, layer):
    case = next(c for c in OPERATORS[name].compile_cases(True) if layer in c.name)
    assert KERNELS["cuda"] not in lowered(function(name), *case.arguments, platform="cuda")
    asked = function(name, implementation="pallas")
    assert KERNELS["cuda"] in lowered(asked, *case.arguments, platform="cuda")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["blast_matmul", "monarch_matmul"])
def test_what_xla_does_on_a_gpu(name, dtype, random):
    """On a CPU nobody else calls it. The order of the operands is the kernels'."""
    x, *factors = arrays(random, SHAPES[name], dtype)
    g = arrays(random, [OPERATORS[name].reference(x, *factors).shape], dtype)[0]
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2  # two or three roundings to 8 bits
    multiply, sums = (MODULES[name]._XLA[kind][2] for kind in ("multiply", "gradients"))
    if name == "blast_matmul":
        u, s, v = factors
        args, order, typed = (v, s, u), (2, 1, 0), {}
    else:
        args, order, typed = factors, (0, 1), {"dtype": dtype}
    scales = () if name == "blast_matmul" else (None,)
    assert_close(multiply(x, *args, *scales), OPERATORS[name].reference(x, *factors), tolerance)
    wide = [a.astype(jnp.float32) for a in (x, *factors)]
    expected = jax.vjp(functools.partial(OPERATORS[name].reference, wide[0]), *wide[1:])[1](
        g.astype(jnp.float32)
    )
    assert_close(tuple(sums(x, g, *args, **typed)[i] for i in order), expected, tolerance)


def test_a_gpu_sums_few_tokens_in_a_row(random):
    """On an H200 the gradient of s was too inexact: it was one long sum of float32."""
    dz, y = (jnp.asarray(random.normal(1, 1, (2, 4096, 32)), jnp.float32) for _ in range(2))
    terms = np.asarray(dz)[:, None] * np.asarray(y)
    exact = np.einsum("jnr,knr->jkr", *(np.asarray(a, np.float64) for a in (dz, y)))
    in_a_row = np.cumsum(terms, 2, dtype=np.float32)[:, :, -1]
    error, usual = (np.linalg.norm(v - exact) for v in (gpu_blast._mix_gradient(dz, y, 4096, True), in_a_row))
    assert error < usual / 4


# The cost model


def test_work_counts_operations_and_bytes():
    blocks = Blocks(4, 4, 192, 768, 48)
    work = monarch_work(1024, blocks, 1024, itemsize=2, factor_itemsize=2, products=1)
    parameters = 192 * (768 + 3072)
    assert work.flops == work.padded_flops == 2 * 1024 * parameters
    # What lies between the factors isn't among them.
    assert work.bytes == 2 * (1024 * (768 + 3072) + parameters)
    blast = blast_work(
        1024, Blocks(6, 6, 128, 512, 192), 1024, itemsize=2, factor_itemsize=2, products=1, mix=8
    )
    assert blast.flops == 2 * 1024 * 192 * (768 + 3072 + 36)
    assert blast.padded_flops - blast.flops == 2 * 1024 * 192 * 7 * 36


@pytest.mark.parametrize("target", ["v5e", "sm_90"])
@pytest.mark.parametrize("name", ["blast_matmul", "monarch_matmul"])
def test_what_lies_between_the_factors_is_stated(name, target):
    """What a kernel returns is the result, or is for the next product alone."""
    case = OPERATORS[name].compile_cases(False)[1]
    program = jax.jit(function(name, implementation="pallas")).trace(*case.arguments).jaxpr.jaxpr
    (call,) = pallas_calls(program, aot.TARGETS[target])
    (result,) = (v.aval for v in call.outvars)
    work = work_of(call)
    assert work
    if (name, target) == ("blast_matmul", "sm_90"):
        assert work.intermediate_bytes == result.size * result.dtype.itemsize == 2 * 6 * 1024 * 192
    else:
        assert work.intermediate_bytes == 0 and result.shape == (1024, 2304)


def test_rivals_do_the_same_job(random):
    for name, operator in OPERATORS.items():
        case = operator.parity_cases()[0]
        x, *factors = (jnp.asarray(a) for a in testing.inputs_for(case))
        expected = operator.reference(x, *factors)
        dense, structs = operator.rivals["XLA, dense"](case)
        matrix = MODULES[name].to_dense(*factors)
        assert [a.shape for a in structs] == [x.shape, matrix.shape]
        assert_close(dense(x, matrix), expected)
        factored, arguments = operator.rivals["XLA, factored"](case)
        assert arguments == case.arguments
        assert_close(factored(x, *factors), expected)


@pytest.mark.parametrize(("tokens", "most"), [(1, 1024), (3, 1024), (3, 0), (37, 0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@each_operator
def test_a_cpu_multiplies_few_tokens_or_many_blocks_at_once(name, dtype, tokens, most, monkeypatch, random):
    monkeypatch.setattr(_block_low_rank, "MOST_PAIRS", most)
    jax.clear_caches()
    arguments = arrays(random, ((tokens, 18), *SHAPES[name][1:]), dtype)
    f, reference = function(name), OPERATORS[name].reference
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_close(f(*arguments), reference(*arguments), tolerance)
    count = len(arguments)
    wide = [a.astype(jnp.float32) for a in arguments]
    got = [g.astype(jnp.float32) for g in gradients(f, count)(*arguments)]
    assert_close(got, list(gradients(reference, count)(*wide)), tolerance)


@each_operator
def test_contestants_compute_the_same(name):
    operator = OPERATORS[name]
    case = operator.parity_cases()[0]
    arguments = testing.inputs_for(case)
    expected = operator.reference(*map(jnp.asarray, arguments))
    cotangent = np.ones(expected.shape, np.float32)
    prepared = {label: of_case(case) for label, of_case in operator.baselines.items() if "XLA" in label}
    assert len(prepared) == (1 if name == "low_rank_matmul" else 2)
    for prepare in filter(None, prepared.values()):
        contestant = prepare(arguments, cotangent)
        assert_close(contestant.to_numpy(contestant.forward())[0], expected)


def test_published_layers_factor():
    for layer in LAYERS:
        for b, rank in filter(None, (layer.monarch, layer.blast)):
            assert layer.inputs % b == layer.outputs % b == 0
            assert layer.monarch != (b, rank) or rank % b == 0


def test_powers_of_two_cover_a_size():
    for size, most in ((1, 64), (48, 64), (688, 256), (768, 64)):
        parts = powers_of_two(size, most)
        assert all(n & (n - 1) == 0 and n <= most for _, n in parts)
        assert [i for start, n in parts for i in range(start, start + n)] == list(range(size))


# Errors

BAD = [
    ("monarch_matmul", ((5, 17), (3, 8, 6), (2, 12, 5)), ValueError, ["`x`", "(..., 18)", "(5, 17)"]),
    ("monarch_matmul", ((5, 18), (3, 7, 6), (2, 12, 5)), ValueError, ["2 t", "got 7 and 12"]),
    ("monarch_matmul", ((5, 18), (3, 8, 6), (2, 9, 5)), ValueError, ["3 t", "got 8 and 9"]),
    ("monarch_matmul", ((5, 18), (3, 8), (2, 12, 5)), ValueError, ["(b1, b2 t, p)", "(3, 8)"]),
    ("monarch_matmul", ((5, 18), (3, 0, 6), (2, 0, 5)), ValueError, ["positive", "(3, 0, 6)"]),
    ("monarch_matmul", ((5, 0), (3, 8, 0), (2, 12, 5)), ValueError, ["positive", "`x`", "(5, 0)"]),
    ("monarch_matmul", ((), (3, 8, 6), (2, 12, 5)), ValueError, ["(..., inputs)", "()"]),
    ("blast_matmul", ((5, 17), (2, 4, 5), (2, 3, 4), (3, 4, 6)), ValueError, ["(..., 18)", "(5, 17)"]),
    ("blast_matmul", ((5, 18), (2, 4, 5), (3, 2, 4), (3, 4, 6)), ValueError, ["(2, 3, 4)", "(3, 2, 4)"]),
    ("blast_matmul", ((5, 18), (2, 3, 5), (2, 3, 4), (3, 4, 6)), ValueError, ["same rank", "3 and 4"]),
    ("low_rank_matmul", ((5, 18), (3, 10), (4, 18)), ValueError, ["(r, q)", "(3, 10)", "(4, 18)"]),
    ("low_rank_matmul", ((5, 17), (4, 10), (4, 18)), ValueError, ["(..., 18)", "(5, 17)"]),
]


@pytest.mark.parametrize(("name", "shapes", "error", "words"), BAD)
def test_bad_shapes_are_refused_when_traced(name, shapes, error, words):
    with pytest.raises(error) as caught:
        jax.eval_shape(function(name), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert all(word in str(caught.value) for word in (name, *words)), caught.value


@each_operator
def test_bad_arguments_are_refused(name, random):
    x, *factors = arrays(random, SHAPES[name])
    with pytest.raises(TypeError, match=r"`x` must be a floating-point array, got int32"):
        function(name)(x.astype(jnp.int32), *factors)
    with pytest.raises(TypeError, match=r"must be a floating-point or int8 array, got .*list"):
        function(name)(x, [1.0], *factors[1:])
    with pytest.raises(ValueError, match="None, 'xla' or 'pallas'"):
        function(name, implementation="cublas")(x, *factors)
    with lowering.enable_x64(), pytest.raises(NotImplementedError, match="no float64 arithmetic"):
        function(name, implementation="pallas")(*(np.asarray(a, np.float64) for a in (x, *factors)))
    if name == "monarch_matmul":
        with pytest.raises(ValueError, match=r"'blocked' or 'interleaved', got 'random'"):
            function(name, order="random")(x, *factors)
        with pytest.raises(ValueError, match=r"`scale` must have shape \(2, 3, 4\), got \(2,\)"):
            function(name)(x, *factors, jnp.ones(2))
