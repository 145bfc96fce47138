"""Products of encrypted vectors, timed beside those of Microsoft SEAL by way of TenSEAL."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.baselines import Contestant, Prepare, versioned
from pallas_kernels.he import ckks
from pallas_kernels.operators import Case, Operator


def _ours(case: Case) -> Prepare:
    p = case.options["parameters"]

    def prepare(arguments: Sequence[np.ndarray], _: np.ndarray) -> Contestant:
        secret, public, keys = ckks.generate_keys(p)
        x, y = (ckks.encrypt(ckks.encode(v, p), public) for v in arguments)
        product = jax.jit(lambda x, y, keys: ckks.relinearise(ckks.multiply(x, y), keys))

        def to_numpy(z: ckks.Ciphertext) -> list[np.ndarray]:
            return [np.real(ckks.decode(ckks.decrypt(z, secret), p))]

        return Contestant(lambda: product(x, y, keys), lambda: None, to_numpy, jax.block_until_ready)

    return prepare


def _tenseal(case: Case) -> Prepare | None:
    """With as many levels of as many bits, and the same scale."""
    try:
        import tenseal
    except ImportError:
        return None
    p = case.options["parameters"]

    def prepare(arguments: Sequence[np.ndarray], _: np.ndarray) -> Contestant:
        bits = [60, *[p.scale_bits] * p.depth, 60]
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=p.n, coeff_mod_bit_sizes=bits, n_threads=1
        )
        context.global_scale = 2.0**p.scale_bits
        context.auto_relin, context.auto_rescale = True, False
        x, y = (tenseal.ckks_vector(context, v.tolist()) for v in arguments)
        return Contestant(lambda: x * y, lambda: None, lambda z: [np.array(z.decrypt())])

    return prepare


def _case(n: int, depth: int, scale_bits: int, special: int) -> Case:
    p = ckks.parameters(n, depth, scale_bits=scale_bits, special=special)

    def draw(generator: np.random.Generator, trial: str) -> list[np.ndarray]:
        return list(generator.uniform(-1, 1, (2, p.slots)).astype(np.float32))

    vectors = (jax.ShapeDtypeStruct((p.slots,), jnp.float32),) * 2
    name = f"multiply + relinearise n{n} depth {depth}"
    return Case(name, vectors, {"parameters": p}, (), draw)


def _of_slots(x: Any, y: Any, *, parameters: ckks.Parameters) -> Any:
    return x * y


BENCHMARK = Operator(
    name="ckks",
    family="he",
    function=_of_slots,
    reference=_of_slots,
    parity_cases=list,
    compile_cases=lambda full: [],
    bench_cases=lambda: [_case(2**13, 2, 40, 2), _case(2**14, 6, 46, 3)],
    baselines={versioned("TenSEAL", "one thread"): _tenseal},
    contestant=_ours,
    tolerance=1e-6,
)
