"""What is made once on the host for many calls: immutable, hashable, and a pytree."""

from typing import Any, ClassVar, Self

import jax
import numpy as np


class Plan:
    """Arrays with what they were made from; an argument or a constant of jitted functions, static or not.

    A subclass names its fields and sets all of them with `_set`. Plans are equal where their `STATIC` fields and
    their `IDENTITY` arrays are.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ()
    STATIC: ClassVar[tuple[str, ...]] = ()
    IDENTITY: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_node(
            cls,
            lambda plan: (
                [getattr(plan, n) for n in cls.ARRAYS],
                tuple(getattr(plan, n) for n in cls.STATIC),
            ),
            lambda static, arrays: cls.of(*arrays, *static),
        )

    @classmethod
    def of(cls, *fields: Any) -> Self:
        """A plan of fields that are there already: arrays, then what is static."""
        plan = object.__new__(cls)
        plan._set(**dict(zip((*cls.ARRAYS, *cls.STATIC), fields, strict=True)))
        return plan

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {type(self).__name__} can't be changed")

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, n) for n in self.STATIC)))

    def __eq__(self, other: object) -> bool:
        if self is other or type(self) is not type(other):
            return self is other
        if any(getattr(self, n) != getattr(other, n) for n in self.STATIC):
            return False
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in self.IDENTITY)
