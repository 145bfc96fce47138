"""What became of a network that was compressed: parameters, operations, bytes and errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    path: of the layer in the network, with dots; of the first, where layers share a kernel.
    method: as given to `compress`, or "dense" for a layer that stayed as it was.
    rank, blocks: as in the layer's class; of a dense one the full rank, and 1.
    parameters, dense_parameters: of the matrix, which takes two operations a token for each of them.
    bytes, dense_bytes: that the matrix takes.
    relative_error: of the matrix, in the Frobenius norm; of a data-aware compression, weighted by the activations.
    squared_norm: of the matrix, weighted alike.
    """

    path: str
    method: str
    rank: int
    blocks: int
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    relative_error: float
    squared_norm: float

    @property
    def flops(self) -> int:
        """Operations a token."""
        return 2 * self.parameters

    @property
    def dense_flops(self) -> int:
        return 2 * self.dense_parameters


@dataclass(frozen=True)
class Report:
    """What became of a network. `str` of it is a table."""

    layers: tuple[LayerReport, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Parameters kept of the matrices that were compressed."""
        return self.parameters / self.dense_parameters

    @property
    def relative_error(self) -> float:
        """Of all matrices together."""
        errors = sum(layer.relative_error**2 * layer.squared_norm for layer in self.layers)
        return math.sqrt(errors / (sum(layer.squared_norm for layer in self.layers) or 1.0))

    def __str__(self) -> str:
        head = (
            "layer",
            "method",
            "blocks",
            "rank",
            "parameters",
            "of dense",
            "FLOPs/token",
            "bytes",
            "error",
        )
        rows: list[tuple[str, ...]] = [head]
        for a in self.layers:
            share = f"{a.parameters / a.dense_parameters:.0%}"
            numbers = (a.blocks, a.rank, f"{a.parameters:,}", share, f"{a.flops:,}", f"{a.bytes:,}")
            rows.append((a.path, a.method, *map(str, numbers), f"{a.relative_error:.4f}"))
        total = (f"{self.parameters:,}", f"{self.ratio:.0%}", f"{2 * self.parameters:,}")
        size = f"{sum(a.bytes for a in self.layers):,}"
        rows.append(("all", "", "", "", *total, size, f"{self.relative_error:.4f}"))
        return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
