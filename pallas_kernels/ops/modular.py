"""Elementwise arithmetic modulo primes below 2^31, a different one for every limb."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering
from pallas_kernels.gpu import modular as gpu
from pallas_kernels.kernels import modular as kernels
from pallas_kernels.kernels.modular import Modulus
from pallas_kernels.moduli import check_moduli, ntt_primes
from pallas_kernels.operators import Case, Operator
from pallas_kernels.tpu import modular as tpu


def add(a: jax.Array, b: jax.Array, moduli: Sequence[int], *, implementation: str | None = None) -> jax.Array:
    """Add residues: (a + b) mod q_l in limb l.

    Args:
      a, b: (..., L, N) uint32, canonical: limb l in [0, q_l). They broadcast. Larger values raise where they are known,
        that is outside of `jit`; inside, the result is not defined.
      moduli: L distinct odd primes below 2^31.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., L, N) uint32, canonical.

    Raises:
      TypeError: an array is not of uint32, or `moduli` not of ints.
      ValueError: limbs don't fit the moduli, these are not such primes, or values are not canonical.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> print(pk.he.add(jnp.uint32([[5, 16], [6, 3]]), jnp.uint32([[13, 0], [8, 4]]), (17, 7)))
      Traceback (most recent call last):
      ...
      ValueError: modular: `b` must be canonical: below q in every limb, got 8 for q = 7
      >>> print(pk.he.add(jnp.uint32([[5, 16], [6, 3]]), jnp.uint32([[13, 0], [6, 4]]), (17, 7)))
      [[ 1 16]
       [ 5  0]]
    """
    return apply(a, b, operation="add", moduli=moduli, implementation=implementation)


def sub(a: jax.Array, b: jax.Array, moduli: Sequence[int], *, implementation: str | None = None) -> jax.Array:
    """Subtract residues: (a - b) mod q_l in limb l. Arguments, result and errors are those of `add`."""
    return apply(a, b, operation="sub", moduli=moduli, implementation=implementation)


def neg(a: jax.Array, moduli: Sequence[int], *, implementation: str | None = None) -> jax.Array:
    """Negate residues: -a mod q_l in limb l. Arguments, result and errors are those of `add`."""
    return apply(a, operation="neg", moduli=moduli, implementation=implementation)


def mul(
    a: jax.Array,
    b: jax.Array,
    moduli: Sequence[int],
    *,
    method: str = "barrett",
    quotient: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply residues: a b mod q_l in limb l. Arguments, result and errors are those of `add`, and:

    Args:
      method: how the product is reduced. "barrett": by a quotient from the precomputed reciprocal of q, the fastest
        here. "montgomery": the result is a b / 2^32 mod q, which is the product where operands and result carry a
        factor 2^32, see `to_montgomery`. "shoup": by a quotient precomputed from b.
      quotient: for "shoup", `shoup_quotient(b, moduli)`.

    P. Barrett, CRYPTO 1986; P. Montgomery, Math. Comp. 44 (1985); D. Harvey, J. Symb. Comp. 60 (2014).
    """
    if method not in ("barrett", "montgomery", "shoup"):
        raise ValueError(f"modular: `method` must be 'barrett', 'montgomery' or 'shoup', got {method!r}")
    if (method == "shoup") != (quotient is not None):
        raise ValueError(
            "modular: method='shoup', and no other, takes `quotient`, from `shoup_quotient(b, moduli)`"
        )
    arrays = (a, b) if quotient is None else (a, b, quotient)
    operation = "mul" if method == "barrett" else f"mul_{method}"
    return apply(*arrays, operation=operation, moduli=moduli, implementation=implementation)


def mul_add(
    a: jax.Array, b: jax.Array, c: jax.Array, moduli: Sequence[int], *, implementation: str | None = None
) -> jax.Array:
    """Multiply and add residues: (a b + c) mod q_l in limb l. Arguments, result and errors are those of `add`."""
    return apply(a, b, c, operation="mul_add", moduli=moduli, implementation=implementation)


def reduce(
    low: jax.Array, moduli: Sequence[int], *, high: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
    """Reduce words: (2^32 high + low) mod q_l in limb l.

    Args:
      low, high: (..., L, N) uint32, of any value; `high` None is 0.
      The others, the result and the errors are those of `add`.
    """
    high = jnp.zeros_like(low) if high is None else high
    return apply(high, low, operation="reduce", moduli=moduli, implementation=implementation)


def to_montgomery(a: jax.Array, moduli: Sequence[int], *, implementation: str | None = None) -> jax.Array:
    """2^32 a mod q_l in limb l. Arguments, result and errors are those of `add`."""
    return apply(a, operation="to_montgomery", moduli=moduli, implementation=implementation)


def from_montgomery(a: jax.Array, moduli: Sequence[int], *, implementation: str | None = None) -> jax.Array:
    """a / 2^32 mod q_l in limb l. Arguments, result and errors are those of `add`."""
    return apply(a, operation="from_montgomery", moduli=moduli, implementation=implementation)


def shoup_quotient(b: Any, moduli: Sequence[int]) -> jax.Array:
    """floor(2^32 b / q_l) in limb l, made on the host: what `mul(method="shoup")` needs of a known b.

    Args:
      b: (..., L, N) uint32, canonical, not traced.
    """
    moduli = check_moduli(moduli)
    check_residues("modular", moduli, b=b)
    q = np.array(moduli, np.uint64)[:, None]
    return jnp.asarray(((np.asarray(b).astype(np.uint64) << np.uint64(32)) // q).astype(np.uint32))


class _Operation(NamedTuple):
    """names: of the arguments; those in `words` need not be canonical. constant: of a limb, by its q."""

    names: tuple[str, ...]
    function: Callable[..., jax.Array]
    constant: Callable[[int], int] = lambda q: 0
    words: tuple[str, ...] = ()


def _mul(a: jax.Array, b: jax.Array, m: Modulus) -> jax.Array:
    return kernels.canonical(kernels.mul(kernels.centre(a, m), b, m), m)


def _reduce(high: jax.Array, low: jax.Array, word: jax.Array, m: Modulus) -> jax.Array:
    upper = kernels.canonical(kernels.mul(kernels.reduce(high, m), word, m), m)
    return kernels.add(upper, kernels.canonical(kernels.reduce(low, m), m), m)


OPERATIONS = {
    "add": _Operation(("a", "b"), lambda a, b, _, m: kernels.add(a, b, m)),
    "sub": _Operation(("a", "b"), lambda a, b, _, m: kernels.sub(a, b, m)),
    "neg": _Operation(("a",), lambda a, _, m: kernels.neg(a, m)),
    "mul": _Operation(("a", "b"), lambda a, b, _, m: _mul(a, b, m)),
    "mul_add": _Operation(("a", "b", "c"), lambda a, b, c, _, m: kernels.add(_mul(a, b, m), c, m)),
    "mul_montgomery": _Operation(("a", "b"), kernels.mul_montgomery, lambda q: pow(q, -1, 2**32)),
    "mul_shoup": _Operation(
        ("a", "b", "quotient"), lambda a, b, c, _, m: kernels.mul_shoup(a, b, c, m), words=("quotient",)
    ),
    "reduce": _Operation(("high", "low"), _reduce, lambda q: 2**32 % q, words=("high", "low")),
    "to_montgomery": _Operation(("a",), _mul, lambda q: 2**32 % q),
    "from_montgomery": _Operation(("a",), _mul, lambda q: pow(2**32, -1, q)),
}


def apply(
    *arrays: jax.Array, operation: str, moduli: Sequence[int], implementation: str | None = None
) -> jax.Array:
    """One of `OPERATIONS` on residues; the functions above say which."""
    choice, moduli = dispatch.choose(implementation), check_moduli(moduli)
    names, words = OPERATIONS[operation].names, OPERATIONS[operation].words
    named = dict(zip(names, arrays, strict=True))
    check_residues("modular", moduli, words, **named)
    try:
        shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    except ValueError:
        shapes = ", ".join(f"`{n}` {a.shape}" for n, a in named.items())
        raise ValueError(f"modular: arrays must broadcast against each other, got {shapes}") from None
    arrays = lowering.make_varying(*(jnp.broadcast_to(a, shape) for a in arrays))
    return _run(operation, arrays, moduli, choice)


def check_residues(
    operator: str, moduli: tuple[int, ...], words: Sequence[str] = (), /, **arrays: Any
) -> None:
    """That arrays are (..., L, N) uint32, and but for `words` canonical, as far as their values are known."""
    for name, a in arrays.items():
        if getattr(a, "dtype", None) != jnp.uint32:
            raise TypeError(
                f"{operator}: `{name}` must be an array of uint32, got {getattr(a, 'dtype', type(a))}"
            )
        if a.ndim < 2 or a.shape[-2] != len(moduli):
            raise ValueError(
                f"{operator}: `{name}` must be (..., {len(moduli)}, N) for {len(moduli)} moduli, got shape {a.shape}"
            )
        if name not in words:
            check_canonical(operator, name, a, np.array(moduli, np.uint32)[:, None])


def check_canonical(operator: str, name: str, a: Any, q: np.ndarray) -> None:
    """That `a` is below `q`, which broadcasts against it, if its values are known."""
    if isinstance(a, jax.core.Tracer):
        return
    if bool((wrong := a >= q).any()):
        where = tuple(np.argwhere(np.asarray(wrong))[0])
        value, modulus = np.asarray(a)[where], np.broadcast_to(q, a.shape)[where]
        raise ValueError(
            f"{operator}: `{name}` must be canonical: below q in every limb, got {value} for q = {modulus}"
        )


def reference(*arrays: jax.Array, operation: str, moduli: Sequence[int]) -> jax.Array:
    """The definition: products bit by bit, and no sum beyond 32 bits."""
    q = jnp.array(moduli, jnp.uint32)[:, None]

    def plus(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(a >= q - b, a - (q - b), a + b)

    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            bit = a >> (31 - i).astype(jnp.uint32) & jnp.uint32(1)
            return plus(plus(total, total), bit * b)

        return lax.fori_loop(0, 32, step, jnp.zeros(jnp.broadcast_shapes(a.shape, b.shape), jnp.uint32))

    def constant(of: Callable[[int], int]) -> jax.Array:
        return jnp.array([of(m) for m in moduli], jnp.uint32)[:, None]

    one, word, unword = (constant(f) for f in (lambda q: 1, lambda q: 2**32 % q, lambda q: pow(2**32, -1, q)))
    definitions: dict[str, Callable[..., jax.Array]] = {
        "add": plus,
        "sub": lambda a, b: plus(a, jnp.where(b == 0, b, q - b)),
        "neg": lambda a: jnp.where(a == 0, a, q - a),
        "mul": times,
        "mul_add": lambda a, b, c: plus(times(a, b), c),
        "mul_montgomery": lambda a, b: times(times(a, b), unword),
        "mul_shoup": lambda a, b, _: times(a, b),
        "reduce": lambda high, low: plus(times(high, word), times(low, one)),
        "to_montgomery": lambda a: times(a, word),
        "from_montgomery": lambda a: times(a, unword),
    }
    return definitions[operation](*arrays)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _run(
    operation: str, arrays: tuple[jax.Array, ...], moduli: tuple[int, ...], choice: dispatch.Choice
) -> jax.Array:
    launchers = (
        functools.partial(a.elementwise, function=OPERATIONS[operation].function, name=f"modular_{operation}")
        for a in (tpu, gpu)
    )
    q = jnp.array(moduli, jnp.int32)[:, None]
    constant = np.array([OPERATIONS[operation].constant(m) for m in moduli], np.uint32)[:, None]
    operands = (*arrays, q, jnp.asarray(constant))
    empty = "an array is empty" if 0 in arrays[0].shape else None

    def signed(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """In int32 inside: TPUs compare no unsigned words."""

        def call(*operands: jax.Array, **options: Any) -> jax.Array:
            *arrays, q, constant = (as_int32(a) for a in operands)
            return as_uint32(run(*arrays, q, 1 / q.astype(jnp.float32), constant, **options))

        return call

    on_tpu, on_gpu = map(signed, launchers)
    in_xla = signed(lambda *a: OPERATIONS[operation].function(*a[:-3], a[-1], Modulus(*a[-3:-1])))
    return dispatch.run(
        choice, *operands, name="modular", xla=in_xla, tpu=empty or on_tpu, cuda=empty or on_gpu
    )


def as_int32(a: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(a, jnp.int32)


def as_uint32(a: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(a, jnp.uint32)


def draw_residues(
    generator: np.random.Generator, trial: str, shape: Sequence[int], moduli: Sequence[int], axis: int = -2
) -> np.ndarray:
    """Canonical residues for a trial, limbs along `axis`: random, and where carries and signs turn."""
    q = np.array(moduli, np.int64).reshape(-1, *[1] * (-axis - 1))
    values = {
        "normal": generator.integers(0, q, shape),
        "offset": np.broadcast_to(q - 1, shape),
        "large": np.clip(q // 2 + generator.integers(-1, 3, shape), 0, q - 1),
        "tiny": generator.integers(0, 3, shape),
    }
    return values[trial].astype(np.uint32)


# The smallest; those where float64 reciprocals are off by one, or a product of digits is largest; 2^31 - 1.
HARD_MODULI = (3, 257, 536903681, 2147473409, 2147483647)


def _parity_cases() -> list[Case]:
    # Not Shoup's: the result doesn't depend on its third argument, as the parity rule wants.
    names = [name for name in OPERATIONS if name != "mul_shoup"]
    return [_case(name, [(5, 7), (2, 5, 130)][i % 2], HARD_MODULI) for i, name in enumerate(names)]


def _compile_cases(full: bool) -> list[Case]:
    # One limb: the TPU's profiler doesn't know the copies of blocks with strides.
    primes = ntt_moduli(1)
    return [_case(operation, (32, 1, 16384), primes) for operation in (OPERATIONS if full else ("mul_add",))]


def ntt_moduli(count: int) -> tuple[int, ...]:
    """Primes near 2^28 for transforms of up to 2^16 points, as CKKS uses them."""
    return tuple(itertools.islice(ntt_primes(2**16, 28), count))


def _bench_cases() -> list[Case]:
    return [_case(operation, (16, 16384), ntt_moduli(16)) for operation in ("add", "mul", "mul_add")]


def _case(operation: str, shape: tuple[int, ...], moduli: tuple[int, ...]) -> Case:
    names, words = OPERATIONS[operation].names, OPERATIONS[operation].words

    def draw(generator: np.random.Generator, trial: str) -> list[np.ndarray]:
        arrays = {
            n: generator.integers(0, 2**32, shape, np.uint32)
            if n in words
            else draw_residues(generator, trial, shape, moduli)
            for n in names
        }
        if "quotient" in arrays:
            arrays["quotient"] = np.asarray(shoup_quotient(arrays["b"], moduli))
        return list(arrays.values())

    name = f"{operation} {'x'.join(map(str, shape))}"
    structs = (jax.ShapeDtypeStruct(shape, jnp.uint32),) * len(names)
    return Case(name, structs, {"operation": operation, "moduli": moduli}, (), draw)


OPERATOR = Operator(
    name="modular",
    family="he",
    function=apply,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=_bench_cases,
)
