"""Matrix products modulo primes below 2^31, a different one for every limb."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.gpu import mod_matmul as gpu
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.kernels import modular
from pallas_kernels.kernels.modular import Modulus
from pallas_kernels.moduli import check_moduli, weight_digits
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops._mod_matmul_baselines import baselines
from pallas_kernels.ops._mod_matmul_xla import in_digits, in_float64
from pallas_kernels.ops.modular import (
    HARD_MODULI,
    as_int32,
    as_uint32,
    check_canonical,
    draw_residues,
    ntt_moduli,
)
from pallas_kernels.ops.modular import reference as modular_reference
from pallas_kernels.plans import Plan
from pallas_kernels.tpu import mod_matmul as tpu


class ModMatmulPlan(Plan):
    """The right factor of many products, prepared once on the host: its digits take 16 bytes for every residue.

    Args:
      b: (L, K, N) uint32, canonical, not traced.
      moduli: L distinct odd primes below 2^31.

    It is immutable, hashable, and a pytree: an argument or a constant of jitted functions.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> plan = pk.he.ModMatmulPlan(jnp.full((1, 3, 2), 10, jnp.uint32), (17,))
      >>> print(pk.he.mod_matmul(jnp.full((1, 2, 3), 16, jnp.uint32), plan))
      [[[4 4]
        [4 4]]]
    """

    ARRAYS, STATIC, IDENTITY = ("b", "weights"), ("moduli",), ("b",)
    b: jax.Array
    weights: jax.Array
    moduli: tuple[int, ...]

    def __init__(self, b: Any, moduli: Sequence[int]):
        moduli = check_moduli(moduli)
        _check_factor("b", b, moduli)
        if b.ndim != 3:
            raise ValueError(f"mod_matmul: the `b` of a plan must be (L, K, N), got shape {b.shape}")
        digits = [weight_digits(w, q) for w, q in zip(np.asarray(b), moduli, strict=True)]
        self._set(b=jnp.asarray(b), weights=jnp.asarray(np.stack(digits)), moduli=moduli)


def mod_matmul(
    a: jax.Array,
    b: jax.Array | ModMatmulPlan,
    moduli: Sequence[int] | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply matrices of residues: sum_k a[m, k] b[k, n] mod q_l in limb l.

    Words are products of signed bytes on int8 matrix units, 16 for each product of words, summed in int32 and reduced
    once, in the epilogue: by a quotient estimated in float32, whose error only decides which multiple of q is taken
    off. That is exact for sums of 4096 terms, whatever the factors and q: the bounds stand in
    `pallas_kernels.kernels.mod_matmul`. Longer sums are cut, and their parts added modulo q.

    Args:
      a: (..., L, M, K) uint32, canonical: limb l in [0, q_l). Larger values raise where they are known, that is outside
        of `jit`; inside, the result is not defined.
      b: (..., L, K, N) uint32, canonical; or a plan of one. Leading axes of both broadcast.
      moduli: L distinct odd primes below 2^31; a plan has its own.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., L, M, N) uint32, canonical.

    Raises:
      TypeError: a factor is not an array of uint32, or `moduli` not of ints.
      ValueError: shapes don't fit each other or the moduli, these are not such primes, or values are not canonical.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> a, b = jnp.full((1, 2, 3), 16, jnp.uint32), jnp.full((1, 3, 2), 10, jnp.uint32)
      >>> print(pk.he.mod_matmul(a, b, (17,)))
      [[[4 4]
        [4 4]]]

    Basis-aligned transformation: Tong et al., arXiv:2501.07047, section 4; here with signed digits.
    """
    choice = dispatch.choose(implementation)
    planned = isinstance(b, ModMatmulPlan)
    if planned:
        if moduli is not None and check_moduli(moduli) != b.moduli:
            raise ValueError(f"mod_matmul: `moduli` {tuple(moduli)} are not those of the plan, {b.moduli}")
        moduli, right = b.moduli, b.b
    else:
        if moduli is None:
            raise TypeError("mod_matmul: `moduli` is missing; only a plan has its own")
        moduli, right = check_moduli(moduli), b
        _check_factor("b", b, moduli)
    _check_factor("a", a, moduli)
    if a.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"mod_matmul: `a` of shape {a.shape} has {a.shape[-1]} columns, `b` {right.shape[-2]} rows"
        )
    try:
        lead = jnp.broadcast_shapes(a.shape[:-3], right.shape[:-3])
    except ValueError:
        raise ValueError(
            f"mod_matmul: leading axes must broadcast, got `a` {a.shape} and `b` {right.shape}"
        ) from None
    weights = (b.weights,) if planned else ()
    if 0 in (*lead, *a.shape, *right.shape):
        return jnp.zeros((*lead, len(moduli), a.shape[-2], right.shape[-1]), jnp.uint32)
    return _run(lowering.make_varying(a, right, *weights), lead, moduli, choice, no_int8())


def no_int8() -> str | None:
    """Why the TPU that is compiled for multiplies no matrices of int8, if that is so."""
    kind = lowering.tpu_kind() or ""
    old = any(f"v{generation}" in kind for generation in (2, 3, 4))
    return f"its matrix units take int8 from v5e on, this is a {kind}" if old else None


def reference(a: jax.Array, b: jax.Array, moduli: Sequence[int]) -> jax.Array:
    """The definition, a product at a time."""
    rows, columns = a.shape[-2], b.shape[-1]

    def step(total: jax.Array, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, y = factors
        shape = (*total.shape[:-1], rows, columns)
        x, y = jnp.broadcast_to(x[..., :, None], shape), jnp.broadcast_to(y[..., None, :], shape)
        x, y = (v.reshape(*v.shape[:-2], -1) for v in (x, y))
        return modular_reference(x, y, total, operation="mul_add", moduli=moduli), None

    lead = jnp.broadcast_shapes(a.shape[:-3], b.shape[:-3])
    zero = jnp.zeros((*lead, len(moduli), rows * columns), jnp.uint32)
    total, _ = lax.scan(step, zero, (jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -2, 0)))
    return total.reshape(*total.shape[:-1], rows, columns)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _run(
    arrays: tuple[jax.Array, ...],
    lead: tuple[int, ...],
    moduli: tuple[int, ...],
    choice: dispatch.Choice,
    problem: str | None,
) -> jax.Array:
    a, b, *weights = arrays
    rows, terms, columns = *a.shape[-2:], b.shape[-1]
    batch = math.prod(lead)
    if math.prod(b.shape[:-3]) == 1:
        # Products with the same right factor are rows of one product.
        a = jnp.broadcast_to(a, (*lead, *a.shape[-3:])).reshape(batch, *a.shape[-3:])
        a = a.swapaxes(0, 1).reshape(len(moduli), batch * rows, terms)
        out = _multiply(a, b.reshape(b.shape[-3:]), weights, moduli, choice, problem)
        return out.reshape(-1, batch, rows, columns).swapaxes(0, 1).reshape(*lead, -1, rows, columns)
    a, b = (jnp.broadcast_to(v, (*lead, *v.shape[-3:])).reshape(-1, *v.shape[-2:]) for v in (a, b))
    return _multiply(a, b, weights, moduli * batch, choice, problem).reshape(*lead, -1, rows, columns)


def _multiply(
    a: jax.Array,
    b: jax.Array,
    weights: Sequence[jax.Array],
    moduli: tuple[int, ...],
    choice: dispatch.Choice,
    problem: str | None,
) -> jax.Array:
    """a (L, M, K) @ b (L, K, N), one modulus for each of the first axis; weights: the digits of b, if known."""
    terms = a.shape[-1]
    most = kernels.MAX_TERMS
    if terms > most:
        parts = [
            _multiply(a[:, :, here], b[:, here], [w[..., here, :] for w in weights], moduli, choice, problem)
            for here in (slice(start, start + most) for start in range(0, terms, most))
        ]
        q = jnp.array(moduli, jnp.int32)[:, None, None]
        sums = functools.reduce(lambda x, y: modular.add(x, y, Modulus(q, None)), map(as_int32, parts))
        return as_uint32(sums)
    q = jnp.array(moduli, jnp.int32)[:, None, None]
    how = kernels.reduction(terms, moduli)

    def kernel(
        accelerator: Any, a: jax.Array, b: jax.Array, q: jax.Array, *weights: jax.Array, interpret: Any
    ) -> Any:
        m = Modulus(q, 1 / q.astype(jnp.float32))
        digits = weights[0] if weights else _weight_digits(as_int32(b), m)
        return as_uint32(accelerator.mod_matmul(as_int32(a), digits, *m, how=how, interpret=interpret))

    def anywhere(a: jax.Array, b: jax.Array, q: jax.Array, *weights: jax.Array) -> jax.Array:
        m = Modulus(q, 1 / q.astype(jnp.float32))
        digits = weights[0] if weights else _weight_digits(as_int32(b), m)
        return as_uint32(in_digits(as_int32(a), digits, m, how))

    def in_xla(*operands: jax.Array) -> jax.Array:
        on_cpu = functools.partial(_on_cpu, terms=256 if max(moduli) < 2**31 - 512 else 128)
        return lax.platform_dependent(*operands, cpu=on_cpu, default=anywhere)

    on_tpu, on_gpu = (functools.partial(kernel, accelerator) for accelerator in (tpu, gpu))
    return dispatch.run(
        choice, a, b, q, *weights, name="mod_matmul", xla=in_xla, tpu=problem or on_tpu, cuda=on_gpu
    )


def _on_cpu(a: jax.Array, b: jax.Array, q: jax.Array, *_: jax.Array, terms: int) -> jax.Array:
    return in_float64(a, b, q, terms=terms)


def _weight_digits(b: jax.Array, m: Modulus) -> jax.Array:
    """`moduli.weight_digits` of all limbs on the device: (L, K, N) int32 -> (L, 4, 4, K, N) int8."""
    scaled = [modular.centre(b, m)]
    for _ in range(3):
        product = modular.mul(scaled[-1], jnp.int32(256), m)
        scaled.append(modular.centre(modular.canonical(product, m), m))
    return jnp.stack([jnp.stack(kernels.digits(v), 1) for v in scaled], 1)


def _check_factor(name: str, a: Any, moduli: tuple[int, ...]) -> None:
    if getattr(a, "dtype", None) != jnp.uint32:
        raise TypeError(
            f"mod_matmul: `{name}` must be an array of uint32, got {getattr(a, 'dtype', type(a))}"
        )
    if a.ndim < 3 or a.shape[-3] != len(moduli):
        sizes = "M, K" if name == "a" else "K, N"
        raise ValueError(
            f"mod_matmul: `{name}` must be (..., {len(moduli)}, {sizes}) for {len(moduli)} moduli, got shape {a.shape}"
        )
    check_canonical("mod_matmul", name, a, np.array(moduli, np.uint32)[:, None, None])


def _parity_cases() -> list[Case]:
    q31, q28 = HARD_MODULI, ntt_moduli(3)
    return [
        _case((5,), 3, 1, 2, q31),
        _case((5,), 33, 40, 70, q31),
        _case((1,), 20, 300, 17, (2147483647,)),
        _case((2, 3), 9, 7, 5, q28),
        _case((2, 3), 4, 5, 6, q28, batched=True),
        _case((1,), 2, 4100, 3, (536903681,)),
    ]


def _compile_cases(full: bool) -> list[Case]:
    """Squares, with a known right factor and without; a long sum, for the largest prime."""
    primes = ntt_moduli(4)
    cases = [
        _case((4,), 256, 256, 256, primes, planned=True),
        _case((1,), 1000, 1000, 1000, primes[:1]),
    ]
    if full:
        cases += [_case((4,), size, size, size, primes, planned=True) for size in (512, 1024, 2048)]
        cases += [_case((1,), 64, 4096, 4096, (2147483647,), planned=True)]
    return cases


def _bench_cases() -> list[Case]:
    return [_case((1,), size, size, size, (1073692673,)) for size in (256, 512, 1024)]


def _case(
    limbs: tuple[int, ...],
    m: int,
    k: int,
    n: int,
    moduli: tuple[int, ...],
    *,
    planned: bool = False,
    batched: bool = False,
) -> Case:
    shapes = (*limbs, m, k), (*(limbs if batched else limbs[-1:]), k, n)

    def draw(generator: np.random.Generator, trial: str) -> list[np.ndarray]:
        return [draw_residues(generator, trial, shape, moduli, axis=-3) for shape in shapes]

    structs: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in shapes]
    if planned:
        structs[1] = ModMatmulPlan.of(
            structs[1], jax.ShapeDtypeStruct((limbs[-1], 4, 4, k, n), jnp.int8), moduli
        )
    name = (
        f"{m}x{k}x{n} L{limbs[-1]}" + " batch" * (len(limbs) > 1) + " both" * batched + " planned" * planned
    )
    return Case(name, tuple(structs), {"moduli": moduli}, (), draw)


OPERATOR = Operator(
    name="mod_matmul",
    family="he",
    function=mod_matmul,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=_bench_cases,
    baselines=baselines(),
)
