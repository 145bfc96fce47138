"""Compress the linear layers of a trained network: dense matrices become Monarch, BLAST or low-rank ones.

`compress` returns a copy of a network and what became of each layer, `restore` goes back to dense matrices, `save` and
`load` keep a compressed network together with its configuration.
"""

from pallas_kernels.compress.factors import factorize
from pallas_kernels.compress.files import load, save
from pallas_kernels.compress.network import LAYERS, compress, restore
from pallas_kernels.compress.report import LayerReport, Report

__all__ = ["LAYERS", "LayerReport", "Report", "compress", "factorize", "load", "restore", "save"]
