"""Forks of the tests' own process (``conftest.py``)."""

import gc
import multiprocessing
import os


class Left:
    """In a cycle, so that a collection alone ends it; says so."""

    def __init__(self, into):
        self.into, self.itself = into, self

    def __del__(self):
        os.write(self.into, b"x")


def collect(into):
    gc.collect()
    os.write(into, b"done")


def test_a_child_collects_nothing_of_its_parent():
    """What is garbage when a process forks; the parent collects it as before."""
    out, into = os.pipe()
    gc.disable()
    try:
        Left(into)
        pid = os.fork()
        if pid == 0:
            collect(into)
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(out, 100) == b"done"
        process = multiprocessing.get_context("fork").Process(target=collect, args=(into,))
        process.start()
        process.join()
        assert os.read(out, 100) == b"done"
        gc.collect()
        assert os.read(out, 100) == b"x"
    finally:
        gc.enable()
        os.close(out), os.close(into)
