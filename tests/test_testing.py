"""The parity rule, held against implementations that are wrong in ways that have got past such rules."""

import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, lowering, testing
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops import _depthwise_conv_xla as xla
from pallas_kernels.windows import Axis


def case(size: int = 9, kernel: int = 7, dtype: Any = jnp.float32, images: int = 2) -> Case:
    x = jax.ShapeDtypeStruct((images, size, size, 5), dtype)
    w = jax.ShapeDtypeStruct((kernel, kernel, 5), dtype)
    return Case(f"{size}x{size} K{kernel} {jnp.dtype(dtype).name}", (x, w))


def axes(x: Any, w: Any) -> tuple[Axis, Axis]:
    k = w.shape[0]
    rows, cols = (Axis(n, k, 1, 1, (k - 1) // 2, k // 2) for n in x.shape[1:3])
    return rows, cols


def reference(x: jax.Array, w: jax.Array) -> jax.Array:
    """Depthwise convolution, padded to the same size."""
    k, wide = w.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x, ((0, 0), ((k - 1) // 2, k // 2), ((k - 1) // 2, k // 2), (0, 0))).astype(wide)
    rows, cols = (np.arange(n)[:, None] + np.arange(k) for n in x.shape[1:3])
    windows = padded[:, rows[:, None, :, None], cols[None, :, None, :]]
    return (windows * w.astype(wide)).sum((3, 4)).astype(x.dtype)


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    return xla.forward(x, w, None, axes(x, w))


right = jax.custom_vjp(convolve)


def right_backward(arguments: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = arguments
    dw = xla.weight_gradient(x, g, axes(x, w)).astype(w.dtype)
    return xla.input_gradient(g, w, axes(x, w)), dw


right.defvjp(lambda x, w: (convolve(x, w), (x, w)), right_backward)


def accumulating_in_the_dtype(x: jax.Array, w: jax.Array) -> jax.Array:
    k = w.shape[0]
    padded = jnp.pad(x, ((0, 0), ((k - 1) // 2, k // 2), ((k - 1) // 2, k // 2), (0, 0)))
    y = jnp.zeros_like(x)
    for i, j in itertools.product(range(k), range(k)):
        # Kept by XLA, which else would leave out the rounding in between.
        product = padded[:, i : i + x.shape[1], j : j + x.shape[2]] * w[i, j]
        y = jax.lax.reduce_precision(y + product, 8, 7) if x.dtype == jnp.bfloat16 else y + product
    return y


@pytest.mark.sweep
@pytest.mark.parametrize("trial", testing.TRIALS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("size", "kernel"), [(1, 1), (9, 7), (5, 13)])
def test_what_is_right_passes(size: int, kernel: int, dtype: Any, trial: str) -> None:
    arguments = testing.inputs_for(case(size, kernel, dtype), trial)
    testing.assert_sensitive(reference, arguments)
    parity = testing.assert_parity(jax.jit(right), reference, arguments)
    assert parity.forward <= 1 and parity.gradient is not None and parity.gradient <= 1


def test_float64_is_held_to_float64() -> None:
    with lowering.enable_x64():
        arguments = testing.inputs_for(case(dtype=jnp.float64))
        testing.assert_parity(jax.jit(right), reference, arguments)
        with pytest.raises(AssertionError, match="rms"):
            rounded = lambda x, w: right(x, w).astype(jnp.float32).astype(jnp.float64)  # noqa: E731
            testing.assert_parity(rounded, reference, arguments)


WRONG: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "zeros": lambda x, w: jnp.zeros_like(right(x, w)),
    "input": lambda x, w: x,
    "mean": lambda x, w: jnp.full_like(x, right(x, w).mean()),
    "last row of the kernel left out": lambda x, w: right(x, w.at[-1].set(0)),
    "one tap wrong": lambda x, w: right(x, w.at[3, 2].multiply(1.1)),
    "one tap wrong in one channel": lambda x, w: right(x, w.at[3, 2, 1].multiply(1.01)),
    "flipped": lambda x, w: right(x, w[::-1, ::-1]),
    "one wrong pixel": lambda x, w: right(x, w).at[1, 2, 3, 4].add(1e-4),
    "one NaN": lambda x, w: right(x, w).at[1, 2, 3, 4].set(jnp.nan),
    "one infinity": lambda x, w: right(x, w).at[0, 0, 0, 0].set(jnp.inf),
    "poison beyond the last row": lambda x, w: right(x, w).at[:, -1].set(jnp.nan),
    "rounded to bfloat16": lambda x, w: right(x.astype(jnp.bfloat16), w).astype(x.dtype),
    "another dtype": lambda x, w: right(x, w).astype(jnp.bfloat16),
    "another shape": lambda x, w: right(x, w)[None],
    "another image's": lambda x, w: right(x[::-1], w),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_fails(name: str) -> None:
    with pytest.raises(AssertionError, match="result: "):
        testing.assert_parity(WRONG[name], reference, testing.inputs_for(case()))


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", [13, 31])
def test_accumulating_in_bfloat16_fails(kernel: int) -> None:
    arguments = testing.inputs_for(case(kernel, kernel, jnp.bfloat16, images=1))
    testing.assert_parity(jax.jit(right), reference, arguments)
    with pytest.raises(AssertionError, match="result: error rms"):
        testing.assert_parity(accumulating_in_the_dtype, reference, arguments, differentiable=())


def with_gradients(change: Callable[[jax.Array, jax.Array], Any]) -> Callable[..., jax.Array]:
    wrong = jax.custom_vjp(right)
    wrong.defvjp(lambda x, w: (right(x, w), (x, w)), lambda saved, g: change(*right_backward(saved, g)))
    return wrong


WRONG_GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "argument 0": lambda dx, dw: (jnp.zeros_like(dx), dw),
    "argument 1": lambda dx, dw: (dx, dw.at[0].set(0)),
    "argument 1: error": lambda dx, dw: (dx, dw.at[2, 2, 2].multiply(1.001)),
    "argument 0: error": lambda dx, dw: (dx.at[0, 0, 0, 0].set(jnp.nan), dw),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_wrong_gradients_fail(name: str) -> None:
    with pytest.raises(AssertionError, match=f"^gradient of {name}"):
        testing.assert_parity(with_gradients(WRONG_GRADIENTS[name]), reference, testing.inputs_for(case()))


def test_the_message_says_where() -> None:
    with pytest.raises(AssertionError, match=r"max 1\.00e\+00 .* worst at \(1, 2, 3, 4\): .*, expected "):
        wrong = lambda x, w: right(x, w).at[1, 2, 3, 4].add(1)  # noqa: E731
        testing.assert_parity(wrong, reference, testing.inputs_for(case()))


def test_chance_fails() -> None:
    calls = itertools.count()
    different = lambda x, w: right(x, w) * (1 + 1e-7 * next(calls))  # noqa: E731
    with pytest.raises(AssertionError, match="not the same bits"):
        testing.assert_parity(different, reference, testing.inputs_for(case()), differentiable=())


def test_changed_and_donated_arguments_fail() -> None:
    def view(x: jax.Array) -> np.ndarray:
        pointer = ctypes.cast(x.unsafe_buffer_pointer(), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, x.shape)

    def writing(x: jax.Array, w: jax.Array) -> jax.Array:
        y = right(x, w).block_until_ready()
        view(x)[0] += 1
        return y

    arguments = testing.inputs_for(case())
    with pytest.raises(AssertionError, match="argument 0 is changed"):
        testing.assert_parity(writing, reference, arguments, differentiable=())


def test_weak_types_fail() -> None:
    with pytest.raises(AssertionError, match="weak_type True, expected False"):
        testing.assert_parity(lambda x: 0.5, jnp.mean, [np.full(3, 0.5, np.float32)], differentiable=())


@pytest.mark.parametrize("dtype", [jnp.uint32, jnp.int8])
def test_integers_are_equal(dtype: Any) -> None:
    (x,) = testing.inputs_for(Case("integers", (jax.ShapeDtypeStruct((64,), dtype),), differentiable=()))
    square = lambda x: x * x  # noqa: E731
    testing.assert_sensitive(square, [x])
    assert testing.assert_parity(jax.jit(square), square, [x]) == testing.Parity(0, None, ())
    with pytest.raises(AssertionError, match=r"1 differ, first \(7,\)"):
        testing.assert_parity(lambda x: (x * x).at[7].add(1), square, [x])


def test_blind_arguments_fail() -> None:
    ones = np.ones((2, 5, 5, 3), np.float32)
    with pytest.raises(AssertionError, match="copy of argument 0"):
        testing.assert_sensitive(lambda x, w: x * w[0, 0], [ones, np.ones((1, 1, 3), np.float32)])
    with pytest.raises(AssertionError, match="half of argument 1"):
        testing.assert_sensitive(lambda x, w: x * w[0], [ones + np.arange(3), ones[0]])


def test_inputs_are_fresh_signed_and_the_same_every_time() -> None:
    seen = [testing.inputs_for(case(size), trial) for size in (18, 19) for trial in testing.TRIALS]
    assert len({a.tobytes() for arguments in seen for a in arguments}) == 2 * len(seen)
    for arguments in seen:
        assert all(abs(a.mean()) > 2 * a.std() or a.min() < 0 < a.max() for a in arguments)
    again = testing.inputs_for(case(19), 3)
    assert all(np.array_equal(a, b) for a, b in zip(again, seen[-1], strict=True))
    assert [a.dtype for a in testing.inputs_for(case(dtype=jnp.bfloat16))] == [jnp.bfloat16] * 2


def add_one(body: Callable[..., None], platform: Any, x: jax.Array, *, interpret: Any) -> jax.Array:
    whole = pl.BlockSpec(x.shape, lambda i: (0, 0))
    row = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return lowering.launch(
        body,
        x,
        platform=platform,
        name="add_one",
        grid=(2,),
        in_specs=[row],
        out_specs=whole if body is racing else row,
        out_shape=x,
        work=lowering.Work(x.size, 2 * x.nbytes, x.size),
        interpret=interpret,
    )


def correct(x_ref: Any, o_ref: Any) -> None:
    o_ref[...] = x_ref[...] + 1


def racing(x_ref: Any, o_ref: Any) -> None:
    o_ref[...] = jnp.concatenate([x_ref[...]] * 2) + 1


def operator_of(body: Callable[..., None], cuda: str | None = None) -> Operator:
    launchers: dict[Any, Any] = {p: functools.partial(add_one, body, p) for p in ("tpu", "cuda")}
    launchers["cuda"] = cuda or launchers["cuda"]

    def forward(x: jax.Array, choice: dispatch.Choice) -> jax.Array:
        return dispatch.run(choice, x, name="add_one", xla=lambda x: x + 1, **launchers)

    run = jax.custom_vjp(forward, nondiff_argnums=(1,))
    run.defvjp(lambda x, choice: (forward(x, choice), None), lambda choice, _, g: (g,))
    shape = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    return Operator(
        "add_one",
        lambda x, *, implementation=None: run(x, dispatch.choose(implementation)),
        lambda x: x + 1,
        lambda: [Case("16x128", (shape,), differentiable=(0,))],
        lambda full: [],
        lambda: [],
    )


def test_check_operator_runs_every_implementation() -> None:
    results = list(testing.check_operator(operator_of(correct)))
    assert [r.implementation for r in results] == [
        "xla",
        "pallas (tpu, interpreted)",
        "pallas (cuda, interpreted)",
    ]
    assert all(r.ok and r.forward <= 1 and r.gradient == 0 and not r.message for r in results)


def test_check_operator_reports_what_is_wrong_and_leaves_out_what_is_not_supported() -> None:
    first, second = testing.check_operator(operator_of(lambda x_ref, o_ref: None, cuda="no kernel"))
    assert first.ok and not second.ok
    assert second.forward == np.inf and second.message.startswith("normal: result: error")


def test_races_are_detected() -> None:
    x = jnp.ones((16, 128))
    with testing.interpret("tpu", detect_races=True):
        np.testing.assert_array_equal(operator_of(correct).function(x, implementation="pallas"), x + 1)
    with (
        pytest.raises(Exception, match=r"(?i)race|touch the same memory"),
        testing.interpret(detect_races=True),
    ):
        jax.block_until_ready(operator_of(racing).function(x, implementation="pallas"))
    with pytest.raises(ValueError, match="TPU only"), testing.interpret("cuda", detect_races=True):
        pass
