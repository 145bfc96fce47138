"""Whole networks, one file a family."""
