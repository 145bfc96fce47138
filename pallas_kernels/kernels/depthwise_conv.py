"""Depthwise convolution as bodies over slabs, and the arithmetic of indices that they share.

A slab is what one pixel holds: (images, channels). A launcher says where slab (row, column) lies in its Refs, so the
same body reads (row, column, image, channel) blocks on a TPU, where a slab is a whole vector register and no tap is
ever unaligned, and (image, row, column, channel) blocks on a GPU.
"""

from typing import NamedTuple


class Axis(NamedTuple):
    """One spatial axis of a convolution: output o reads input `stride * o + dilation * k - pad_lo` through tap k.

    Sizes are in pixels and taps. Taps that fall outside of the input read zero, so they are never visited.
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    pad_lo: int = 0
    pad_hi: int = 0

    @property
    def out(self) -> int:
        """The number of outputs; not positive when the dilated kernel is longer than the padded input."""
        return (self.size + self.pad_lo + self.pad_hi - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def pairs(self) -> int:
        """How many (output, tap) pairs read a pixel of the input: the multiply-adds of this axis."""
        starts = (self.stride * o - self.pad_lo for o in range(self.out))
        reads = (start + self.dilation * k for start in starts for k in range(self.kernel))
        return sum(0 <= read < self.size for read in reads)
