"""Modular matrix products: against Python's integers and FLINT, at the bounds of their sums, and what is refused."""

import functools
import itertools
import math
import re

import flint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import aot, lowering
from pallas_kernels.aot._programs import described
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.operators import operators

MODULI = (3, 257, 536903681, 1073692673, 2147473409, 2147483647)


def with_flint(a: np.ndarray, b: np.ndarray, moduli: tuple[int, ...]) -> np.ndarray:
    def one(x: np.ndarray, y: np.ndarray, q: int) -> list[int]:
        product = flint.nmod_mat(*x.shape, x.ravel().tolist(), q) * flint.nmod_mat(
            *y.shape, y.ravel().tolist(), q
        )
        return [int(v) for v in product.entries()]

    rows = [one(x, y, q) for x, y, q in zip(a, b, moduli, strict=True)]
    return np.array(rows, np.uint32).reshape(len(moduli), a.shape[1], b.shape[2])


def filled(kind: str, shape: tuple[int, ...], moduli: tuple[int, ...]) -> np.ndarray:
    q = np.array(moduli, np.int64)[:, None, None]
    values = {
        "largest": lambda: np.broadcast_to(q - 1, shape),
        "half": lambda: np.broadcast_to(q // 2, shape),
        "above half": lambda: np.broadcast_to(q // 2 + 1, shape) % q,
        "zero": lambda: np.zeros(shape),
        "one-hot": lambda: np.arange(math.prod(shape[1:])).reshape(shape[1:]) % 7 == np.zeros(shape),
        "bytes": lambda: np.broadcast_to(np.int64(0x7F7F7F80), shape) % q,
        "random": lambda: np.random.default_rng(shape[-1]).integers(0, q, shape),
    }
    return values[kind]().astype(np.uint32)


@pytest.mark.parametrize(
    "kinds",
    [
        *itertools.product(["largest", "half", "above half", "bytes"], repeat=2),
        ("one-hot", "random"),
        ("random", "one-hot"),
        ("zero", "largest"),
    ],
    ids=str,
)
def test_extreme_factors(kinds, implementation):
    a, b = filled(kinds[0], (6, 2, 256), MODULI), filled(kinds[1], (6, 256, 3), MODULI)
    got = pk.he.mod_matmul(a, b, MODULI, implementation=implementation)
    np.testing.assert_array_equal(got, with_flint(a, b, MODULI))


@pytest.mark.slow
@pytest.mark.parametrize("terms", [1, 3, 7, 64, 127, 128, 129, 255, 257, 512, 1024, 4096, 4097, 8192])
@pytest.mark.parametrize("kind", ["largest", "half", "random"])
def test_lengths_of_sums(terms, kind):
    a, b = filled(kind, (6, 3, terms), MODULI), filled(kind, (6, terms, 2), MODULI)
    expected = with_flint(a, b, MODULI)
    np.testing.assert_array_equal(pk.he.mod_matmul(a, b, MODULI, implementation="xla"), expected)
    plan = pk.he.ModMatmulPlan(b, MODULI)
    # On a CPU "xla" takes float64; what other platforms take, and the digits of plans, are checked here.
    from pallas_kernels.ops._mod_matmul_xla import in_digits
    from pallas_kernels.ops.modular import as_int32, as_uint32

    if terms <= kernels.MAX_TERMS:
        q = jnp.array(MODULI, jnp.int32)[:, None, None]
        m = kernels.Modulus(q, 1 / q.astype(jnp.float32))
        how = kernels.reduction(terms, MODULI)
        got = as_uint32(in_digits(as_int32(jnp.asarray(a)), plan.weights, m, how))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("terms", [257, 4096, 4097])
def test_long_sums_in_kernels(terms, implementation):
    a, b = filled("largest", (6, 2, terms), MODULI), filled("half", (6, terms, 2), MODULI)
    got = pk.he.mod_matmul(a, b, MODULI, implementation=implementation)
    np.testing.assert_array_equal(got, with_flint(a, b, MODULI))


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512, 1024])
def test_large_squares(size):
    q = (1073692673,)
    a, b = filled("random", (1, size, size), q), filled("random", (1, size, size), q)[:, ::-1]
    np.testing.assert_array_equal(pk.he.mod_matmul(a, b, q), with_flint(a, b, q))


def test_reductions_by_their_bounds():
    """256 terms fit one word for every modulus that has large transforms; no bound is crossed without notice."""
    assert kernels.reduction(256, (2**31 - 65793,)).wide is False
    assert kernels.reduction(256, (2**31 - 1,)).wide is True
    assert kernels.reduction(257, (2**31 - 65793,)).wide is True
    assert (
        kernels.reduction(256, (2**26 + 1, 2**30)).coarse and not kernels.reduction(256, (2**26 - 1,)).coarse
    )
    assert kernels.reduction(1, (kernels.LARGEST_WORD,)).centre is False
    assert kernels.reduction(1, (kernels.LARGEST_WORD + 2,)).centre is True


@pytest.mark.slow
def test_a_plan_is_the_matrix(implementation):
    a, b = filled("random", (6, 5, 40), MODULI), filled("random", (6, 40, 7), MODULI)
    plan = pk.he.ModMatmulPlan(b, MODULI)
    multiply = functools.partial(pk.he.mod_matmul, implementation=implementation)
    expected = with_flint(a, b, MODULI)
    for got in (
        multiply(a, plan),
        jax.jit(multiply)(a, plan),
        jax.jit(lambda a: multiply(a, plan))(a),
        jax.jit(multiply, static_argnums=1)(a, plan),
        jax.jit(jax.vmap(multiply, (0, None)))(a[None], plan)[0],
    ):
        np.testing.assert_array_equal(got, expected)


def test_plans_are_immutable_and_compare():
    b = filled("random", (6, 4, 3), MODULI)
    plan, same, other = (pk.he.ModMatmulPlan(v, MODULI) for v in (b, b.copy(), b[:, ::-1]))
    assert plan == same and hash(plan) == hash(same) and plan != other
    with pytest.raises(AttributeError, match="can't be changed"):
        plan.moduli = (17,)


@pytest.mark.slow
def test_leading_axes_broadcast(implementation):
    q = MODULI[2:4]
    a, b = filled("random", (2, 3, 5), q), filled("random", (2, 5, 4), q)
    stacked = np.stack([b, (b * 3) % np.array(q, np.uint32)[:, None, None] // 2])
    multiply = functools.partial(pk.he.mod_matmul, moduli=q, implementation=implementation)
    expected = np.stack([with_flint(a, v, q) for v in stacked])
    np.testing.assert_array_equal(multiply(a, stacked), expected)
    np.testing.assert_array_equal(multiply(np.stack([a, a])[:, None], stacked)[1], expected)
    np.testing.assert_array_equal(multiply(np.stack([a, a]), b)[1], expected[0])


def test_empty_products_are_zero():
    got = pk.he.mod_matmul(np.zeros((1, 2, 0), np.uint32), np.zeros((1, 0, 3), np.uint32), (17,))
    np.testing.assert_array_equal(got, np.zeros((1, 2, 3), np.uint32))


def test_results_are_the_same_with_64_bit_types(implementation):
    a, b = filled("random", (6, 3, 300), MODULI), filled("random", (6, 300, 2), MODULI)
    with lowering.enable_x64():
        got = pk.he.mod_matmul(a, b, MODULI, implementation=implementation)
    assert got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, with_flint(a, b, MODULI))


def test_shard_map_over_rows():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    a, b = filled("random", (2, 16, 5), MODULI[2:4]), filled("random", (2, 5, 3), MODULI[2:4])
    multiply = functools.partial(pk.he.mod_matmul, moduli=MODULI[2:4])
    split = jax.shard_map(multiply, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d"))
    np.testing.assert_array_equal(jax.jit(split)(a, b), with_flint(a, b, MODULI[2:4]))


@pytest.mark.parametrize(
    ("target", "call"), [("v5e", "tpu_custom_call"), ("v4", None), ("sm_90", "xla.gpu.triton")]
)
def test_the_target_lowered_for_decides(target, call):
    device = described(aot.TARGETS[target])
    shapes = [jax.ShapeDtypeStruct(s, jnp.uint32) for s in ((1, 32, 32), (1, 32, 32))]
    platform = "cuda" if target == "sm_90" else "tpu"
    with device:
        function = jax.jit(functools.partial(pk.he.mod_matmul, moduli=(17,)))
        text = function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("custom_call" in text and call in text) if call else "tpu_custom_call" not in text


@pytest.mark.parametrize(
    ("a", "b", "primes", "error", "text"),
    [
        ((1, 2, 3), (1, 4, 5), (17,), ValueError, "3 columns, `b` 4 rows"),
        ((2, 3), (1, 3, 5), (17,), ValueError, r"`a` must be \(\.\.\., 1, M, K\)"),
        ((1, 2, 3), (2, 3, 5), (17,), ValueError, r"`b` must be \(\.\.\., 1, K, N\).*got shape \(2, 3, 5\)"),
        ((2, 1, 2, 3), (3, 1, 3, 5), (17,), ValueError, "leading axes must broadcast"),
        ((1, 2, 3), (1, 3, 5), (21,), ValueError, "odd prime, got 21"),
        ((1, 2, 3), (1, 3, 5), None, TypeError, "`moduli` is missing"),
    ],
)
def test_what_is_refused(a, b, primes, error, text):
    a, b = (np.zeros(s, np.uint32) for s in (a, b))
    with pytest.raises(error, match=text):
        pk.he.mod_matmul(a, b, primes)


def test_values_are_checked():
    a = np.zeros((1, 2, 2), np.uint32)
    with pytest.raises(ValueError, match=r"`b` must be canonical.*got 20 for q = 17"):
        pk.he.mod_matmul(a, a + 20, (17,))
    with pytest.raises(TypeError, match="`a` must be an array of uint32, got float32"):
        pk.he.mod_matmul(a.astype(np.float32), a, (17,))
    with pytest.raises(ValueError, match=r"are not those of the plan, \(17,\)"):
        pk.he.mod_matmul(a, pk.he.ModMatmulPlan(a, (17,)), (19,))


@pytest.mark.parametrize(
    "name, case",
    [("mod_matmul", "9x7x5"), ("ntt", "split"), ("ntt", "ntt n8 "), ("basis_conversion", "1 to 2")],
)
def test_gpus_sum_no_int8_that_xla_gets_wrong(name: str, case: str) -> None:
    """On an H200, int8 products of 2, 3, 5, 7, 9, 13 and 15 terms were twice what they should be, of 4 n were right."""
    if case == "split":
        plan = pk.he.NttPlan(8, (17,), split=(4, 2))
        call, arguments = functools.partial(pk.he.ntt, plan=plan), (jnp.zeros((1, 8), jnp.uint32),)
    else:
        operator = operators()[name]
        chosen = next(c for c in operator.parity_cases() if case in c.name)
        call, arguments = functools.partial(operator.function, **chosen.options), chosen.arguments
    call = functools.partial(call, implementation="xla")
    text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"contracting_dims = \[(\d+)\] x .*: \(tensor<([\dx]+)xi8>", text)
    assert found and all(int(shape.split("x")[int(axis)]) % 4 == 0 for axis, shape in found)
