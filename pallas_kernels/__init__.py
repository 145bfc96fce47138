"""JAX/Pallas kernels written once and run on both NVIDIA GPUs (Triton) and TPUs (Mosaic)."""

from pallas_kernels import he
from pallas_kernels.ops.depthwise_conv import conv_general_dilated, depthwise_conv
from pallas_kernels.ops.fft_conv import fft_conv
from pallas_kernels.ops.sgconv_kernel import sgconv_kernel

__all__ = ["conv_general_dilated", "depthwise_conv", "fft_conv", "he", "sgconv_kernel"]
