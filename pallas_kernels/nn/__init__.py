"""Flax NNX layers on the operators of this library."""

from pallas_kernels.nn.convolution import BRANCHES, DepthwiseConv, DilatedReparamConv
from pallas_kernels.nn.dot_general import DotGeneral
from pallas_kernels.nn.layers import GRN, DropPath, LayerScale, SqueezeExcite
from pallas_kernels.nn.linear import BlastLinear, LowRankLinear, MonarchLinear
from pallas_kernels.nn.normalization import BatchNorm, fold_batch_norm
from pallas_kernels.nn.sequence import Hyena, KernelNorm, LongConv, SGConv

__all__ = [
    "BRANCHES",
    "GRN",
    "BatchNorm",
    "BlastLinear",
    "DepthwiseConv",
    "DilatedReparamConv",
    "DotGeneral",
    "DropPath",
    "Hyena",
    "KernelNorm",
    "LayerScale",
    "LongConv",
    "LowRankLinear",
    "MonarchLinear",
    "SGConv",
    "SqueezeExcite",
    "fold_batch_norm",
]
