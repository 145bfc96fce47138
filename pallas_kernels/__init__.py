"""JAX/Pallas kernels written once and run on both NVIDIA GPUs (Triton) and TPUs (Mosaic)."""

from pallas_kernels import he
from pallas_kernels.ops.blast_matmul import blast_matmul
from pallas_kernels.ops.depthwise_conv import conv_general_dilated, depthwise_conv
from pallas_kernels.ops.fft_conv import fft_conv
from pallas_kernels.ops.low_rank_matmul import low_rank_matmul
from pallas_kernels.ops.monarch_matmul import monarch_matmul
from pallas_kernels.ops.sgconv_kernel import sgconv_kernel

__all__ = [
    "blast_matmul",
    "conv_general_dilated",
    "depthwise_conv",
    "fft_conv",
    "he",
    "low_rank_matmul",
    "monarch_matmul",
    "sgconv_kernel",
]
