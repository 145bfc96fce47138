"""Negacyclic number-theoretic transforms, and products of polynomials modulo X^n + 1."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lowering, moduli
from pallas_kernels.gpu import ntt as gpu
from pallas_kernels.kernels import mod_matmul as kernels
from pallas_kernels.kernels.modular import Modulus
from pallas_kernels.operators import Case, Operator
from pallas_kernels.ops import _ntt_xla as xla
from pallas_kernels.ops import mod_matmul
from pallas_kernels.ops._ntt_baselines import baselines
from pallas_kernels.ops.modular import as_int32, as_uint32, check_residues, draw_residues, mul, ntt_moduli
from pallas_kernels.plans import Plan
from pallas_kernels.tpu import ntt as tpu

ORDERS = ("bit_reversed", "natural")
SMALLEST, LARGEST = 2**3, 2**16
# So many terms every implementation sums before it reduces, for every modulus with the roots.
LARGEST_SIDE = 2**8


class Tables(NamedTuple):
    """What one direction needs. Matrices and twiddles: canonical uint32; digits of the matrices: int8.

    left: (L, R, R); right: (L, C, C); twiddles: (L, R, C).
    left_digits: (L, 4, R, 4 R); right_digits: (L, 4, 4, C, C).
    words, shares: (L, 2, R, C), the twiddles t and 2^16 t, centred, as int32; and divided by q, as float32.
    """

    left: Any
    right: Any
    twiddles: Any
    left_digits: Any
    right_digits: Any
    words: Any
    shares: Any


class NttPlan(Plan):
    """The transforms of polynomials of degree below n, with a prime for each limb; made once on the host.

    Args:
      n: a power of two, from 2^3 to 2^16.
      moduli: L distinct primes below 2^31 that are 1 modulo 2n; see `ntt_primes`.
      order: of the values: "bit_reversed", or "natural", which costs a transposition.
      split: (R, C) with R C = n: the polynomial as a matrix of that shape, whose columns and rows are transformed. It
        changes speed, not results.

    psi is the smallest primitive 2n-th root of unity. It is immutable, hashable, and a pytree: an argument or a
    constant of jitted functions. Its digits take 16 (R^2 + C^2) bytes a limb and direction.

    Example:
      >>> import pallas_kernels as pk
      >>> plan = pk.he.NttPlan(8, (17,))
      >>> plan.roots, plan.split
      ((3,), (2, 4))
    """

    ARRAYS, STATIC = ("forward", "inverse"), ("n", "moduli", "order", "split")
    forward: Tables
    inverse: Tables
    n: int
    moduli: tuple[int, ...]
    order: str
    split: tuple[int, int]

    def __init__(
        self,
        n: int,
        moduli: Sequence[int],
        *,
        order: str = "bit_reversed",
        split: tuple[int, int] | None = None,
    ):
        n, primes, split = _check_plan(n, moduli, order, split)
        both = [_tables(n, q, order, split) for q in primes]
        forward, inverse = (
            Tables(*(jnp.asarray(np.stack(a)) for a in zip(*direction, strict=True)))
            for direction in zip(*both, strict=True)
        )
        self._set(forward=forward, inverse=inverse, n=n, moduli=primes, order=order, split=split)

    @classmethod
    def abstract(cls, n: int, moduli: Sequence[int]) -> "NttPlan":
        """A plan of shapes alone, to compile with."""
        n, primes, (r, c) = _check_plan(n, moduli, ORDERS[0], None)
        limbs = len(primes)
        word, byte, signed, real = (
            functools.partial(jax.ShapeDtypeStruct, dtype=d)
            for d in (jnp.uint32, jnp.int8, jnp.int32, jnp.float32)
        )
        tables = Tables(
            word((limbs, r, r)), word((limbs, c, c)), word((limbs, r, c)), byte((limbs, 4, r, 4 * r)),
            byte((limbs, 4, 4, c, c)), signed((limbs, 2, r, c)), real((limbs, 2, r, c)),
        )  # fmt: skip
        return cls.of(tables, tables, n, primes, ORDERS[0], (r, c))

    @property
    def roots(self) -> tuple[int, ...]:
        """psi of every limb."""
        return tuple(moduli.root_of_unity(self.n, q) for q in self.moduli)

    def limbs(self, chosen: slice | Sequence[int]) -> "NttPlan":
        """The plan of some of the limbs, sharing what they have."""
        index = chosen if isinstance(chosen, slice) else np.array(chosen)
        forward, inverse = (Tables(*(a[index] for a in t)) for t in (self.forward, self.inverse))
        primes = tuple(np.array(self.moduli)[index].tolist())
        return NttPlan.of(forward, inverse, self.n, primes, self.order, self.split)


def ntt(x: jax.Array, plan: NttPlan, *, implementation: str | None = None) -> jax.Array:
    """Transform polynomials: their values at the roots of X^n + 1.

    With psi the smallest primitive 2n-th root of unity modulo q_l, in limb l and natural order::

        y[k] = sum_i x[i] psi^((2 k + 1) i) mod q_l

    It is two modular matrix products, of R x R and C x C with R C = n, with a multiplication by twiddle factors between
    them, on int8 matrix units as in `mod_matmul`; all permutations stand in the matrices.

    Args:
      x: (..., L, n) uint32, the coefficients, canonical: limb l in [0, q_l). Larger values raise where they are known,
        that is outside of `jit`; inside, the result is not defined.
      plan: of the ring.
      implementation: None, "xla" or "pallas"; see `pallas_kernels.dispatch`.

    Returns:
      (..., L, n) uint32, canonical, in the order of the plan.

    Raises:
      TypeError: `x` is not an array of uint32, or `plan` not a plan.
      ValueError: `x` doesn't fit the plan, or its values are not canonical.
      NotImplementedError: `implementation="pallas"` can't run here.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> plan = pk.he.NttPlan(8, (17,), order="natural")
      >>> print(pk.he.ntt(jnp.arange(1, 9, dtype=jnp.uint32)[None], plan))
      [[ 5  9 13  5  0 11  8  8]]

    Matrix form and permutations: Tong et al., arXiv:2501.07047, section 4.
    """
    return _transform(x, plan, False, implementation)


def intt(y: jax.Array, plan: NttPlan, *, implementation: str | None = None) -> jax.Array:
    """Transform values back to polynomials: the inverse of `ntt`, whose arguments, result and errors these are.

    In limb l and natural order::

        x[i] = 1/n sum_k y[k] psi^(-(2 k + 1) i) mod q_l

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> plan = pk.he.NttPlan(8, (17,), order="natural")
      >>> print(pk.he.intt(jnp.uint32([[5, 9, 13, 5, 0, 11, 8, 8]]), plan))
      [[1 2 3 4 5 6 7 8]]
    """
    return _transform(y, plan, True, implementation)


def polymul(f: jax.Array, g: jax.Array, plan: NttPlan, *, implementation: str | None = None) -> jax.Array:
    """Multiply polynomials modulo X^n + 1 and q_l in limb l, by way of their values.

    Arguments, result and errors are those of `ntt`; `f` and `g` broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_kernels as pk
      >>> x, x7 = (jnp.zeros((1, 8), jnp.uint32).at[0, i].set(1) for i in (1, 7))
      >>> print(pk.he.polymul(x, x7, pk.he.NttPlan(8, (17,))))
      [[16  0  0  0  0  0  0  0]]
    """
    a, b = (ntt(x, plan, implementation=implementation) for x in (f, g))
    return intt(mul(a, b, plan.moduli, implementation=implementation), plan, implementation=implementation)


def reference(*arrays: jax.Array, plan: NttPlan, operation: str = "ntt") -> jax.Array:
    """The definitions: a product with the matrix of all powers; of polynomials, the product of their values at 2^96."""
    if operation == "polymul":
        multiply = functools.partial(_polymul_of_integers, moduli=plan.moduli)
        return jax.pure_callback(multiply, jax.ShapeDtypeStruct(arrays[0].shape, jnp.uint32), *arrays)
    (x,) = arrays
    matrices = jnp.asarray(np.stack([_definition(plan, q, operation == "intt") for q in plan.moduli]))
    return mod_matmul.reference(x[..., None, :], matrices, plan.moduli)[..., 0, :]


def _polymul_of_integers(f: Any, g: Any, moduli: tuple[int, ...]) -> np.ndarray:
    """On the host, by Kronecker: coefficients below 2^96 never meet in a product of Python's integers."""
    f, g = np.asarray(f), np.asarray(g)
    n, out = f.shape[-1], np.empty(f.shape, np.uint32)

    def at_2_to_96(a: np.ndarray) -> int:
        return int.from_bytes(np.pad(a[:, None], ((0, 0), (0, 2))).astype("<u4").tobytes(), "little")

    for index in np.ndindex(f.shape[:-1]):
        q = moduli[index[-1]]
        whole = (at_2_to_96(f[index]) * at_2_to_96(g[index])).to_bytes(24 * n, "little")
        words = np.frombuffer(whole, "<u4").reshape(2 * n, 3).astype(np.uint64) % np.uint64(q)
        weights = np.array([2 ** (32 * i) % q for i in range(3)], np.uint64)
        residues = (words * weights % np.uint64(q)).sum(1).astype(np.int64)
        out[index] = (residues[:n] - residues[n:]) % q
    return out


def _definition(plan: NttPlan, q: int, inverse: bool) -> np.ndarray:
    """[i, k] -> psi^((2 k + 1) i), or [k, i] -> its inverse by n."""
    n = plan.n
    table = moduli.powers(moduli.root_of_unity(n, q), 2 * n, q)
    k = np.arange(n) if plan.order == "natural" else moduli.bit_reversal(n)
    exponents = np.outer(np.arange(n), 2 * k + 1)
    if not inverse:
        return table[exponents % (2 * n)].astype(np.uint32)
    return (table[-exponents.T % (2 * n)] * np.uint64(pow(n, -1, q)) % np.uint64(q)).astype(np.uint32)


def _transform(x: Any, plan: NttPlan, inverse: bool, implementation: str | None) -> jax.Array:
    choice = dispatch.choose(implementation)
    if not isinstance(plan, NttPlan):
        raise TypeError(f"ntt: `plan` must be an NttPlan, got {type(plan)}")
    check_residues("ntt", plan.moduli, x=x)
    if x.shape[-1] != plan.n:
        raise ValueError(
            f"ntt: `x` must be (..., {len(plan.moduli)}, {plan.n}) for this plan, got shape {x.shape}"
        )
    if x.size == 0:
        return x
    tables = plan.inverse if inverse else plan.forward
    x, *tables = lowering.make_varying(x, *tables)
    return _run(x, Tables._make(tables), plan.moduli, plan.order, inverse, choice, mod_matmul.no_int8())


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _run(
    x: jax.Array,
    tables: Tables,
    primes: tuple[int, ...],
    order: str,
    inverse: bool,
    choice: dispatch.Choice,
    problem: str | None,
) -> jax.Array:
    shape = x.shape
    rows, columns = tables.twiddles.shape[1:]
    x = x.reshape(-1, shape[-2], rows, columns)
    if order == "natural" and inverse:
        x = x.reshape(*x.shape[:2], columns, rows).swapaxes(2, 3)
    q = jnp.array(primes, jnp.int32)[:, None, None]
    options = {"inverse": inverse, "how": kernels.reduction(max(rows, columns), primes)}

    def in_words(
        run: Callable[..., jax.Array], x: jax.Array, q: jax.Array, tables: Tables, **more: Any
    ) -> jax.Array:
        m = Modulus(q, 1 / q.astype(jnp.float32))
        return as_uint32(run(as_int32(x), *tables[3:], *m, **options, **more))

    def in_xla(*operands: Any) -> jax.Array:
        on_cpu = functools.partial(xla.in_float64, inverse=inverse)
        return lax.platform_dependent(
            *operands, cpu=on_cpu, default=functools.partial(in_words, xla.in_digits)
        )

    small = f"transforms of {rows} x {columns} are left to XLA" if min(rows, columns) < 32 else None
    on_tpu, on_gpu = (functools.partial(in_words, accelerator.ntt) for accelerator in (tpu, gpu))
    y = dispatch.run(
        choice, x, q, tables, name="ntt", xla=in_xla, tpu=problem or small or on_tpu, cuda=small or on_gpu
    )
    if order == "natural" and not inverse:
        y = y.swapaxes(2, 3)
    return y.reshape(shape)


def check_degree(name: str, n: int) -> int:
    """`n` as an int, once it has been found to be a degree that there are transforms for."""
    try:
        degree = operator.index(n)
    except TypeError:
        raise TypeError(f"{name}: `n` must be an int, got {n!r}") from None
    if degree & (degree - 1) or not SMALLEST <= degree <= LARGEST:
        raise ValueError(f"{name}: `n` must be a power of two from {SMALLEST} to {LARGEST}, got {n}")
    return degree


def _check_plan(
    n: int, primes: Sequence[int], order: str, split: tuple[int, int] | None
) -> tuple[int, tuple[int, ...], tuple[int, int]]:
    n = check_degree("ntt", n)
    if order not in ORDERS:
        raise ValueError(f"ntt: `order` must be 'bit_reversed' or 'natural', got {order!r}")
    if split is None:
        bits = n.bit_length() - 1
        # Full lanes of a TPU where that leaves enough rows, and near a square, which costs least.
        rows = 1 << (5 if bits in (10, 11) else min(bits // 2, bits - 7) if bits >= 12 else bits // 2)
        split = rows, n // rows
    if len(split) != 2 or split[0] * split[1] != n or not 2 <= min(split) <= max(split) <= LARGEST_SIDE:
        raise ValueError(
            f"ntt: `split` must be two powers of two, at most {LARGEST_SIDE}, whose product is {n}, got {split}"
        )
    return n, moduli.check_moduli(primes, n), (split[0], split[1])


@functools.lru_cache(maxsize=128)
def _tables(n: int, q: int, order: str, split: tuple[int, int]) -> tuple[Tables, Tables]:
    """Forward and inverse of one limb."""
    rows, columns = split
    table = moduli.powers(moduli.root_of_unity(n, q), 2 * n, q)
    natural = order == "natural"
    k = np.arange(rows) if natural else moduli.bit_reversal(rows)
    l = np.arange(columns) if natural else moduli.bit_reversal(columns)  # noqa: E741
    r, c = np.arange(rows), np.arange(columns)
    left = columns * np.outer(2 * k + 1, r)
    right = 2 * rows * np.outer(c, l)
    twiddles = np.outer(2 * k + 1, c)

    def of(left: np.ndarray, right: np.ndarray, twiddles: np.ndarray, scale: int) -> Tables:
        w, v, t = (table[exponents % (2 * n)] for exponents in (left, right, twiddles))
        t = t * np.uint64(scale) % np.uint64(q)
        words = np.stack([moduli.centred(t * np.uint64(s) % np.uint64(q), q) for s in (1, 2**16 % q)])
        # From [j, p, R, K] to [p, R, j K]: the order of `digit_rows`.
        digits = moduli.weight_digits(w, q).transpose(1, 2, 0, 3).reshape(4, rows, 4 * rows)
        return Tables(
            w.astype(np.uint32), v.astype(np.uint32), t.astype(np.uint32),
            digits, moduli.weight_digits(v, q), words.astype(np.int32), (words / q).astype(np.float32),
        )  # fmt: skip

    return of(left, right, twiddles, 1), of(-left.T, -right.T, -twiddles, pow(n, -1, q))


def _parity_cases() -> list[Case]:
    """Digits in the extreme: q just below 2^31, with the largest bytes; small q; the default split, and others."""
    return [
        _case(n, primes, (2,) * (n < 1024), operation=operation, split=split)
        for n, primes, split in (
            (8, (17, 257), None),
            (128, (257, 65537), (16, 8)),
            (1024, (2147473409, 12289), None),
            (2048, (536903681,), (64, 32)),
        )
        for operation in ("ntt", "intt", *["polymul"] * (n <= 1024))
    ]


def _compile_cases(full: bool) -> list[Case]:
    """Rings of CKKS: with a batch that uses the matrices again, of one limb, which is what the profiler of TPUs can
    follow of a batch; with a batch and limbs; alone.
    """
    sizes = [(2**12, 1, 512), (2**14, 1, 128), (2**16, 1, 32), (2**12, 4, 32)]
    if full:
        sizes += [(n, limbs, 1) for n in (2**12, 2**14, 2**16) for limbs in (4, 16, 48)]
    else:
        sizes = [(2**11, 1, 4), *sizes[1:]]
    return [_compile_case(*size, operation) for size in sizes for operation in ("ntt", "intt")]


def _bench_cases() -> list[Case]:
    return [
        _case(n, tuple(itertools.islice(moduli.ntt_primes(n, 30), limbs)), (), operation="polymul")
        for n in (2**12, 2**13, 2**14, 2**15, 2**16)
        for limbs in (1, 16)
    ]


def _compile_case(n: int, limbs: int, batch: int, operation: str) -> Case:
    primes = ntt_moduli(limbs)
    x = jax.ShapeDtypeStruct((batch, limbs, n), jnp.uint32)
    name = f"{operation} n{n} L{limbs} B{batch}"
    return Case(name, (x, NttPlan.abstract(n, primes)), {"operation": operation}, ())


def _case(
    n: int,
    primes: tuple[int, ...],
    lead: tuple[int, ...],
    *,
    operation: str,
    split: tuple[int, int] | None = None,
) -> Case:
    shape = (*lead, len(primes), n)
    count = 2 if operation == "polymul" else 1

    def draw(generator: np.random.Generator, trial: str) -> list[np.ndarray]:
        return [draw_residues(generator, trial, shape, primes) for _ in range(count)]

    name = f"{operation} n{n} L{len(primes)}" + "".join(f" B{size}" for size in lead)
    options = {"plan": NttPlan(n, primes, split=split), "operation": operation}
    return Case(name, (jax.ShapeDtypeStruct(shape, jnp.uint32),) * count, options, (), draw)


def _apply(*operands: Any, operation: str, **options: Any) -> jax.Array:
    return {"ntt": ntt, "intt": intt, "polymul": polymul}[operation](*operands, **options)


OPERATOR = Operator(
    name="ntt",
    family="he",
    function=_apply,
    reference=reference,
    parity_cases=_parity_cases,
    compile_cases=_compile_cases,
    bench_cases=_bench_cases,
    baselines=baselines(),
)
