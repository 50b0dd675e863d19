"""The C extension, which pyproject.toml cannot tell of. Optional: without a C compiler or Python's headers all of it runs in Python."""

from setuptools import Extension, setup

setup(
    ext_modules=[Extension("allreduce_jit.engine._eager", ["allreduce_jit/engine/eager.c"], py_limited_api=True, optional=True)]
)
