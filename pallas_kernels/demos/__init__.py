"""The demonstrations behind `pallas-kernels demo`."""
