"""Residues by limb, with a modulus for each: their layouts and padding, and how the kernels on them are launched.

How large blocks are is for `pallas_kernels.tpu` and `pallas_kernels.gpu` to say.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernels import basis_conversion as conversion
from pallas_kernels.kernels import mod_matmul as products
from pallas_kernels.kernels import modular
from pallas_kernels.kernels.mod_matmul import Reduction
from pallas_kernels.lowering import Platform, Work, launch

LANES = 128


def elementwise(
    operands: tuple[jax.Array, ...], function: Callable[..., jax.Array], name: str, *, rows: int, members: int,
    platform: Platform, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """function(*arrays, constant, Modulus) elementwise.

    Args:
      operands: (..., L, N) arrays of int32; then q, 1 / q and the constant of each limb, (L, 1).
      rows: of 128 lanes, in a block. members: of the batch in a block, at most.

    Returns:
      (..., L, N) int32.
    """
    *arrays, q, inverse, constant = operands
    shape = arrays[0].shape
    blocks = [_to_rows(a, rows) for a in arrays]
    batch, limbs, height, _ = blocks[0].shape
    members = next(m for m in range(members, 0, -1) if batch % m == 0)

    def at(i: Any, limb: Any) -> tuple[Any, ...]:
        # The first axis of a GPU's grid may be long, the others not.
        steps = jnp.int32(height // rows)
        return jax.lax.div(i, steps), limb, jax.lax.rem(i, steps), 0

    block = pl.BlockSpec((members, None, rows, LANES), at)
    scalar = pl.BlockSpec((None, 1, 1), lambda i, limb: (limb, 0, 0))
    out = launch(
        functools.partial(modular.elementwise, operation=function),
        *blocks, *(c[:, :, None] for c in (q, inverse, constant)),
        platform=platform, interpret=interpret, name=name,
        grid=(batch // members * (height // rows), limbs),
        in_specs=[block] * len(blocks) + [scalar] * 3,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(blocks[0].shape, jnp.int32),
        work=Work(arrays[0].size, (len(arrays) + 1) * arrays[0].nbytes, blocks[0].size),
    )  # fmt: skip
    return out.reshape(batch, limbs, -1)[..., : shape[-1]].reshape(shape)


def _to_rows(a: jax.Array, block: int) -> jax.Array:
    """(..., L, N) -> (B, L, rows, 128), with rows a multiple of `block`."""
    a = a.reshape(-1, *a.shape[-2:])
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[-1] % (block * LANES))))
    return a.reshape(*a.shape[:2], -1, LANES)


def matmul(
    x: jax.Array, weights: jax.Array, q: jax.Array, inverse: jax.Array, *, how: Reduction, rows: int,
    columns: int, step: int, platform: Platform, interpret: Any = False, **params: Any,
) -> jax.Array:  # fmt: skip
    """x @ weights modulo q.

    Args:
      x: (L, M, K) int32; weights: (L, 4, 4, K, N) int8; q, inverse: (L, 1, 1).
      rows, columns: of a block of the result, for which all of K is there. step: terms added at once.
      params: of `launch`.

    Returns:
      (L, M, N) int32, canonical.
    """
    (limbs, m, k), n = x.shape, weights.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, -m % rows), (0, -k % step)))
    weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, -k % step), (0, -n % columns)))
    padded = limbs, x.shape[1], weights.shape[-1]
    terms = x.shape[2]
    # Innermost on TPUs are rows, so that weights are fetched once; the first axis of a GPU's grid alone may be long.
    turn = 1 if platform == "tpu" else -1

    def block(
        shape: tuple[int | None, ...], place: Callable[[Any, Any, Any], tuple[Any, ...]]
    ) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *index: place(*index[::turn]))

    scalar = block((None, 1, 1), lambda limb, j, i: (limb, 0, 0))
    out = launch(
        functools.partial(products.matmul, step=step, how=how),
        x, weights, q, inverse,
        platform=platform, interpret=interpret, name="mod_matmul", **params,
        grid=(limbs, padded[2] // columns, padded[1] // rows)[::turn],
        in_specs=[
            block((None, rows, terms), lambda limb, j, i: (limb, i, 0)),
            block((None, 4, 4, terms, columns), lambda limb, j, i: (limb, 0, 0, 0, j)),
            scalar, scalar,
        ],
        out_specs=block((None, rows, columns), lambda limb, j, i: (limb, i, j)),
        out_shape=jax.ShapeDtypeStruct(padded, jnp.int32),
        work=Work(
            flops=2 * 16 * limbs * m * k * n,
            bytes=limbs * (4 * m * k + 16 * k * n + 4 * m * n),
            padded_flops=2 * 16 * padded[0] * padded[1] * padded[2] * terms,
        ),
    )  # fmt: skip
    return out[:, :m, :n]


def convert(
    x: jax.Array, weights: jax.Array, q: jax.Array, inverse: jax.Array, *, how: Reduction, rows: int | None,
    columns: int, limbs: int, platform: Platform, interpret: Any = False, **params: Any,
) -> jax.Array:  # fmt: skip
    """weights @ x, with a modulus for every row.

    Args:
      x: (B, K, N) int32, |x| <= 0x7F7F7F7F.
      weights: (4, J, 4, K) int8: digit p, row, byte j of x, column; q, inverse: (J, 1).
      limbs: what those of either basis are filled up to a multiple of.
      rows, columns: of a block of the result, for which all of K is there; as many terms are added at once. `rows` None
        takes all.
      params: of `launch`.

    Returns:
      (B, J, N) int32, canonical.
    """
    (batch, k, n), j = x.shape, len(q)
    x = jnp.pad(x, ((0, 0), (0, -k % limbs), (0, -n % columns)))
    weights = jnp.pad(weights, ((0, 0), (0, -j % limbs), (0, 0), (0, -k % limbs)))
    terms, targets = x.shape[1], weights.shape[1]
    weights = weights.reshape(4, targets, 4 * terms)
    q, inverse = (jnp.pad(a, ((0, targets - j), (0, 0)), mode="edge") for a in (q, inverse))
    step, rows = rows or terms, rows or targets
    scalar = pl.BlockSpec((rows, 1), lambda c, i, b: (i, 0))
    out = launch(
        functools.partial(conversion.convert, step=step, how=how),
        x, weights, q, inverse,
        platform=platform, interpret=interpret, name="basis_conversion", **params,
        grid=(x.shape[2] // columns, targets // rows, batch),
        in_specs=[
            pl.BlockSpec((None, terms, columns), lambda c, i, b: (b, 0, c)),
            pl.BlockSpec((4, rows, 4 * terms), lambda c, i, b: (0, i, 0)),
            scalar, scalar,
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda c, i, b: (b, i, c)),
        out_shape=jax.ShapeDtypeStruct((batch, targets, x.shape[2]), jnp.int32),
        work=Work(
            flops=2 * 16 * batch * j * k * n,
            bytes=4 * batch * (k + j) * n + 16 * j * k,
            padded_flops=2 * 16 * batch * targets * terms * x.shape[2],
        ),
    )  # fmt: skip
    return out[:, :j, :n]
