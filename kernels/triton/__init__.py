"""Triton kernels of the legacy path, compiled at run time."""
