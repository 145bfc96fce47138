"""Checkpoints from PyTorch: name maps and converters."""
