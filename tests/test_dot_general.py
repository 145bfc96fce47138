"""Factors in stock Flax layers: the same as with the dense matrix, and gradients of every factor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pallas_kernels as pk
from pallas_kernels.nn import DotGeneral
from pallas_kernels.ops import blast_matmul, low_rank_matmul, monarch_matmul

PRODUCTS = {
    "blast": (pk.blast_matmul, blast_matmul.to_dense),
    "low_rank": (pk.low_rank_matmul, low_rank_matmul.to_dense),
    "monarch": (pk.monarch_matmul, monarch_matmul.to_dense),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


def drawn(name, random, inputs=24, outputs=24):
    """Factors, and the matrix (inputs, outputs)."""
    b, r = 3, 6
    shapes = {
        "blast": {"u": (b, r, outputs // b), "s": (b, b, r), "v": (b, r, inputs // b)},
        "low_rank": {"u": (r, outputs), "v": (r, inputs)},
        "monarch": {"w1": (b, r, inputs // b), "w2": (b, r, outputs // b)},
    }[name]
    factors = {k: jnp.asarray(random.normal(size=shape), jnp.float32) for k, shape in shapes.items()}
    return DotGeneral(PRODUCTS[name][0], **factors), PRODUCTS[name][1](**factors)


def dense_twin(layer, kernel):
    """The same layer with a kernel instead."""
    twin = nnx.clone(layer)
    del twin.dot_general
    twin.dot_general = jax.lax.dot_general
    twin.kernel = nnx.Param(kernel)
    return twin


@each_product
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_by_the_factors(name, bias, random):
    layer = nnx.Linear(24, 36, use_bias=bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    factors, matrix = drawn(name, random, 24, 36)
    factors.install(layer)
    assert layer.kernel.shape == (0, 36)
    x = jnp.asarray(random.normal(size=(2, 5, 24)), jnp.float32)
    np.testing.assert_allclose(layer(x), dense_twin(layer, matrix)(x), rtol=1e-4, atol=1e-4)


@each_product
def test_gradients_of_factors_are_those_through_the_dense_matrix(name, random):
    layer = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
    factors, _ = drawn(name, random, 24, 36)
    factors.install(layer)
    x, weights = (jnp.asarray(random.normal(size=(7, n)), jnp.float32) for n in (24, 36))
    gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(weights * layer(x))))(layer)["dot_general"]
    values = {k: getattr(factors, k)[...] for k in factors.names}
    expected = jax.grad(lambda values: jnp.sum(weights * (x @ PRODUCTS[name][1](**values))))(values)
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(gradients[key][...], value, rtol=1e-3, atol=1e-3)


@each_product
def test_attention_projects_by_factors(name, random):
    attention = nnx.MultiHeadAttention(4, 24, decode=False, rngs=nnx.Rngs(0))
    twin = nnx.clone(attention)
    for part in ("query", "key", "value", "out"):
        factors, matrix = drawn(name, random)
        layer = getattr(attention, part)
        shape = layer.kernel.shape
        factors.install(layer)
        getattr(twin, part).kernel = nnx.Param(matrix.reshape(shape) / 5)
        first = getattr(factors, factors.names[0])
        first[...] = first[...] / 5
    x = jnp.asarray(random.normal(size=(2, 5, 24)), jnp.float32)
    np.testing.assert_allclose(attention(x), twin(x), rtol=1e-3, atol=1e-3)
    left = sum(p.size for p in jax.tree.leaves(nnx.state(attention, nnx.Param)))
    assert left < sum(p.size for p in jax.tree.leaves(nnx.state(twin, nnx.Param))) * 0.8


def test_a_layer_takes_it_where_it_is_made(random):
    factors, matrix = drawn("monarch", random, 24, 36)
    layer = nnx.Linear(24, 36, dot_general=factors, rngs=nnx.Rngs(0))
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    np.testing.assert_allclose(layer(x), x @ matrix, rtol=1e-4, atol=1e-4)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer)
    assert not np.any(gradients["kernel"][...]) and np.all(gradients["dot_general"]["w1"][...] != 0)


def test_a_layer_with_factors_learns(random):
    layer = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
    drawn("blast", random, 24, 36)[0].install(layer)
    x, y = (jnp.asarray(random.normal(size=(64, n)), jnp.float32) for n in (24, 36))
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        value, gradients = nnx.value_and_grad(lambda layer: jnp.mean((layer(x) - y) ** 2))(layer)
        optimizer.update(layer, gradients)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_any_axes_are_contracted_as_lax_does(random):
    factors, matrix = drawn("low_rank", random)
    x = jnp.asarray(random.normal(size=(4, 5, 6)), jnp.float32)
    for axes, kernel in (((0, 2), matrix.reshape(4, 6, 3, 8)), ((2, 0), matrix.reshape(6, 4, 24))):
        numbers = ((axes, (0, 1)), ((), ()))
        expected = jax.lax.dot_general(x, kernel, numbers)
        np.testing.assert_allclose(factors(x, kernel, numbers), expected, rtol=1e-4, atol=1e-4)


def test_dtypes_are_those_that_the_layer_asks_for(random):
    layer = nnx.Linear(24, 36, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    factors, matrix = drawn("monarch", random, 24, 36)
    factors.install(layer)
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    assert layer(x).dtype == jnp.bfloat16
    y = factors(x.astype(jnp.bfloat16), matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)


@each_product
def test_empty_batches(name, random):
    layer = nnx.LinearGeneral((4, 6), (3, 8), axis=(-2, -1), rngs=nnx.Rngs(0))
    drawn(name, random)[0].install(layer)
    assert layer(jnp.ones((0, 5, 4, 6))).shape == (0, 5, 3, 8)


def test_int8_weights(random):
    u, v = (jnp.asarray(random.integers(-127, 128, (6, n)), jnp.int8) for n in (36, 24))
    scale = jnp.asarray(random.uniform(1e-4, 1e-3, 6), jnp.float32)
    weights = {"u": nnx.Variable(u), "v": nnx.Variable(v)}
    layer = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
    DotGeneral(functools.partial(pk.low_rank_matmul, implementation="xla"), **weights, scale=scale).install(
        layer
    )
    x = jnp.asarray(random.normal(size=(5, 24)), jnp.float32)
    matrix = low_rank_matmul.to_dense(u, v, scale)
    np.testing.assert_allclose(layer(x), x @ matrix, rtol=1e-4, atol=1e-5)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert set(gradients["dot_general"]) == {"scale"}


def test_what_does_not_fit_is_refused(random):
    factors, _ = drawn("monarch", random)
    x = jnp.ones((2, 24))
    with pytest.raises(ValueError, match="24 outputs, expected those of a kernel of \\(24, 36\\)"):
        factors.install(nnx.Linear(24, 36, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="`x` must be"):
        factors.install(nnx.Linear(36, 24, rngs=nnx.Rngs(0)))
    batched = nnx.LinearGeneral(24, 24, batch_axis={0: 2}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="each of a batch"):
        factors.install(batched)
    for numbers in ((((1,), (1,)), ((), ())), (((1,), (0,)), ((0,), (1,)))):
        with pytest.raises(ValueError, match="expected no batch"):
            factors(x, jnp.ones((24, 24)), numbers)
    with pytest.raises(NotImplementedError, match="out_sharding"):
        factors(x, jnp.ones((24, 24)), (((1,), (0,)), ((), ())), out_sharding="x")
