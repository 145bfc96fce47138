"""Flax NNX layers on the operators of this library."""
