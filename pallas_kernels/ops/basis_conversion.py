"""Conversion of residues from one basis of primes to another: the sum behind key switching and rescaling."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.gpu import basis_conversion as gpu
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.kernels import modular
from pallas_kernels.kernels.modular import Modulus
from pallas_kernels.moduli import check_moduli, weight_digits
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops._mod_matmul_xla import (
    canonical_uint32,
    centred_float64,
    float64_modulus,
    reduce_float64,
    split_float64,
)
from pallas_kernels.ops.mod_matmul import no_int8
from pallas_kernels.ops.modular import as_int32, as_uint32, check_residues, draw_residues, ntt_moduli
from pallas_kernels.ops.modular import reference as modular_reference
from pallas_kernels.plans import Plan
from pallas_kernels.tpu import basis_conversion as tpu


class BasisPlan(Plan):
    """The conversion from one basis to another; made once on the host.

    Args:
      source: K distinct odd primes below 2^31, Q their product. target: J distinct ones; they may share some.

    It is immutable, hashable, and a pytree: an argument or a constant of jitted functions.
    """

    ARRAYS, STATIC = ("matrix", "weights"), ("source", "target")
    matrix: jax.Array
    weights: jax.Array
    source: tuple[int, ...]
    target: tuple[int, ...]

    def __init__(self, source: Sequence[int], target: Sequence[int]):
        source, target = check_moduli(source), check_moduli(target)
        if len(source) > MOST_LIMBS:
            raise ValueError(f"basis_conversion: at most {MOST_LIMBS} source limbs, got {len(source)}")
        whole = math.prod(source)
        matrix = np.array([[whole // q % p for q in source] for p in target], np.uint32)
        # [row, byte, digit, column] to [digit, row, byte, column].
        weights = np.stack([weight_digits(row, p) for row, p in zip(matrix, target, strict=True)])
        weights = weights.transpose(2, 0, 1, 3)
        self._set(matrix=jnp.asarray(matrix), weights=jnp.asarray(weights), source=source, target=target)


# Of the source: quotients by Q stay exact in float32, and sums in float64.
MOST_LIMBS = 128


def basis_conversion(
    x: jax.Array, plan: BasisPlan, *, exact: bool = False, implementation: str | None = None
) -> jax.Array:
    """Convert residues modulo q_1 ... q_K to residues modulo p_1 ... p_J.

    With Q the product of the q, and y_i the residue of x_i (Q / q_i)^-1 modulo q_i that is nearest to 0::

        out[j] = (sum_i y[i] (Q / q_i) - v Q) mod p_j

    where v is 0, or, if `exact`, the integer next to sum_i y[i] / q_i. The sum is the integer x that is nearest to 0,
    plus v Q; |v| <= K / 2, and the same v for all j.

    Args:
      x: (..., K, N) uint32, canonical: limb i in [0, q_i). Larger values raise where they are known, that is outside of
        `jit`; inside, the result is not defined.
      plan: of the two bases.
      exact: take v Q off: the result is x itself, as long as |x| < Q / 2 - K Q / 2^22. Beyond, v may be off by one.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., J, N) uint32, canonical.

    Raises:
      TypeError: `x` is not an array of uint32, or `plan` not a plan.
      ValueError: `x` doesn't fit the plan, or its values are not canonical.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> plan = pk.he.BasisPlan((17, 97), (193, 257))
      >>> print(pk.he.basis_conversion(jnp.uint32([[100 % 17, 16], [3, 96]]), plan, exact=True))
      [[100 192]
       [100 256]]

    Bajard et al., SAC 2016 (the approximate form); Halevi, Polyakov and Shoup, CT-RSA 2019 (the exact one).
    """
    choice = dispatch.choose(implementation)
    if not isinstance(plan, BasisPlan):
        raise TypeError(f"basis_conversion: `plan` must be a BasisPlan, got {type(plan)}")
    check_residues("basis_conversion", plan.source, x=x)
    if x.size == 0:
        return jnp.zeros((*x.shape[:-2], len(plan.target), x.shape[-1]), jnp.uint32)
    arrays = lowering.make_varying(x, plan.matrix, plan.weights)
    return _run(arrays, plan.source, plan.target, exact, choice, no_int8())


def reference(x: jax.Array, plan: BasisPlan, *, exact: bool = False) -> jax.Array:
    """The definition; v by its fractions in 32 bits below the point, which is exact where the operator is."""
    times = functools.partial(modular_reference, operation="mul")
    y = times(x, _column([pow(math.prod(plan.source) // q, -1, q) for q in plan.source]), moduli=plan.source)
    q = _column(plan.source)
    negative, whole = y > q // 2, math.prod(plan.source)
    total = jnp.zeros((*x.shape[:-2], len(plan.target), x.shape[-1]), jnp.uint32)

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return modular_reference(a, b, operation="add", moduli=plan.target)

    def times_column(a: jax.Array, values: Sequence[int]) -> jax.Array:
        a = jnp.broadcast_to(a, total.shape)
        word = modular_reference(jnp.zeros_like(a), a, operation="reduce", moduli=plan.target)
        return times(
            word, _column([v % p for v, p in zip(values, plan.target, strict=True)]), moduli=plan.target
        )

    def add_limb(total: jax.Array, limb: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        y, negative, weight = limb
        y = jnp.broadcast_to(y[..., None, :], total.shape)
        word = modular_reference(jnp.zeros_like(y), y, operation="reduce", moduli=plan.target)
        minus = jnp.where(negative[..., None, :], _column([-whole % p for p in plan.target]), 0)
        return add(total, add(times(word, weight, moduli=plan.target), minus.astype(jnp.uint32))), None

    weights = jnp.array([[whole // q % p for p in plan.target] for q in plan.source], jnp.uint32)[:, :, None]
    total, _ = lax.scan(add_limb, total, (jnp.moveaxis(y, -2, 0), jnp.moveaxis(negative, -2, 0), weights))
    if not exact:
        return total
    signed = y.astype(jnp.float32) / q.astype(jnp.float32) - negative
    v = jnp.round(jnp.sum(signed, -2, keepdims=True)).astype(jnp.int32)
    up = times_column(jnp.maximum(-v, 0).astype(jnp.uint32), [whole] * len(plan.target))
    down = times_column(jnp.maximum(v, 0).astype(jnp.uint32), [-whole] * len(plan.target))
    return add(total, add(up, down))


def _column(values: Sequence[int]) -> jax.Array:
    return jnp.array(values, jnp.uint32)[:, None]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _run(
    arrays: tuple[jax.Array, ...],
    source: tuple[int, ...],
    target: tuple[int, ...],
    exact: bool,
    choice: dispatch.Choice,
    problem: str | None,
) -> jax.Array:
    x, matrix, weights = arrays
    whole = math.prod(source)
    lead, n = x.shape[:-2], x.shape[-1]
    m = _modulus(source)
    scale = jnp.array([pow(whole // q, -1, q) for q in source], jnp.int32)[:, None]
    scaled = modular.mul(modular.centre(as_int32(x), m), scale, m)
    y = modular.centre(modular.canonical(scaled, m), m).reshape(-1, len(source), n)
    how = kernels.reduction(len(source), target)._replace(centre=False)
    q = jnp.array(target, jnp.int32)[:, None]

    def kernel(
        accelerator: Any, y: jax.Array, q: jax.Array, _: Any, weights: jax.Array, **more: Any
    ) -> jax.Array:
        return accelerator.basis_conversion(y, weights, q, 1 / q.astype(jnp.float32), how=how, **more)

    def anywhere(y: jax.Array, q: jax.Array, _: Any, weights: jax.Array) -> jax.Array:
        m = Modulus(q, 1 / q.astype(jnp.float32))
        stacked = weights.reshape(4, len(target), -1)
        return jax.vmap(
            lambda y: modular.canonical(kernels.fold(kernels.stacked_times(stacked, y), m, how), m)
        )(y)

    def in_xla(*operands: jax.Array) -> jax.Array:
        return lax.platform_dependent(*operands, cpu=_on_cpu, default=anywhere)

    on_tpu, on_gpu = (functools.partial(kernel, accelerator) for accelerator in (tpu, gpu))
    out = dispatch.run(
        choice, y, q, matrix, weights, name="basis_conversion", xla=in_xla, tpu=problem or on_tpu, cuda=on_gpu
    )
    if exact:
        v = modular.nearest(jnp.sum(modular.real(y) * m.inverse, 1, keepdims=True))
        to = _modulus(target)
        excess = modular.canonical(
            modular.mul(v, jnp.array([whole % p for p in target], jnp.int32)[:, None], to), to
        )
        out = modular.sub(out, excess, to)
    return as_uint32(out).reshape(*lead, len(target), n)


def _modulus(moduli: Sequence[int]) -> Modulus:
    q = jnp.array(moduli, jnp.int32)[:, None]
    return Modulus(q, 1 / q.astype(jnp.float32))


def _on_cpu(y: jax.Array, q: jax.Array, matrix: jax.Array, _: Any) -> jax.Array:
    with lowering.enable_x64():
        return as_int32(_in_float64(y, q, matrix))


@jax.jit
def _in_float64(y: jax.Array, q: jax.Array, matrix: jax.Array) -> jax.Array:
    """Sums of up to 128 terms of 30 and 15 bits are exact."""
    m = float64_modulus(q)
    halves = jnp.concatenate(split_float64(centred_float64(matrix, m)))

    def convert(y: jax.Array) -> jax.Array:
        product = lax.dot(halves, y.astype(jnp.float64), precision=lax.Precision.HIGHEST)
        high, low = product[: len(q)], product[len(q) :]
        return canonical_uint32(reduce_float64(reduce_float64(high, m) * 2.0**15 + low, m), m)

    return lax.map(convert, y)


def _parity_cases() -> list[Case]:
    hard = (257, 536903681, 2147473409, 2147483647)
    return [
        _case((2,), 70, hard, ntt_moduli(3), exact=True),
        _case((), 33, (3, 5, 7), hard),
        _case((), 130, ntt_moduli(34), (2147483647, 5), exact=True),
        _case((3,), 9, (2147483647,), (17, 2147473409)),
    ]


def _compile_cases(full: bool) -> list[Case]:
    """The conversions of key switching at N = 2^16, 12 limbs to 28 and 24 to 56."""
    sizes = [(12, 28), (24, 56)] if full else [(12, 28)]
    primes = ntt_moduli(80)
    return [_compile_case(primes[:k], primes[k : k + j]) for k, j in sizes]


def _compile_case(source: tuple[int, ...], target: tuple[int, ...]) -> Case:
    k, j = len(source), len(target)
    matrix = jax.ShapeDtypeStruct((j, k), jnp.uint32), jax.ShapeDtypeStruct((4, j, 4, k), jnp.int8)
    plan: Any = BasisPlan.of(*matrix, source, target)
    return Case(f"{k} to {j} n65536", (jax.ShapeDtypeStruct((1, k, 2**16), jnp.uint32), plan), {}, ())


def _case(
    lead: tuple[int, ...], n: int, source: tuple[int, ...], target: tuple[int, ...], *, exact: bool = False
) -> Case:
    shape = (*lead, len(source), n)

    def draw(generator: np.random.Generator, trial: str) -> list[np.ndarray]:
        if trial in ("normal", "tiny"):
            return [draw_residues(generator, trial, shape, source)]
        # Integers near 0, and at a quarter of Q: `exact` leaves those next to a half undefined.
        near = math.prod(source) // 4 if trial == "large" else 0
        values = near + generator.integers(-2, 3, (*lead, n)).astype(object)
        return [np.stack([(values % q).astype(np.uint32) for q in source], -2)]

    name = f"{len(source)} to {len(target)} n{n}" + " exact" * exact
    options = {"plan": BasisPlan(source, target), "exact": exact}
    return Case(name, (jax.ShapeDtypeStruct(shape, jnp.uint32),), options, (), draw)


OPERATOR = Operator(
    name="basis_conversion",
    family="he",
    function=basis_conversion,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=lambda: [_case((), 16384, ntt_moduli(8)[:4], ntt_moduli(8)[4:])],
)
