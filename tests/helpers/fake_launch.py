"""A stand-in of ``driver.KernelLaunch``: what it would have handed to the driver is noted, as it was at that moment.

``test_driver_types.py`` holds the two side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fired:
    """One launch: its kernel as the engine names it, the values of its arguments in their own types, and the rest."""

    kernel: Any
    arguments: list[ctypes._SimpleCData | ctypes.Structure]
    grid: int
    block: int
    shared_bytes: int
    pdl: bool
    ranks: int
    stream: int


class FakeLaunch:
    """In place of ``driver.KernelLaunch``; kernels may be of any name. Launches are noted in ``fired``."""

    fired: list[Any] = []

    def __init__(
        self,
        kernel,
        arguments: Sequence[ctypes._SimpleCData | ctypes.Structure],
        grid: int,
        block: int,
        shared_bytes: int = 0,
        pdl: bool = False,
        ranks: int = 1,
        cluster: int = 1,
    ):
        self.arguments, self.grid, self.pdl, self.cluster = arguments, grid, pdl, cluster
        self.kernel, self.about = kernel, (grid, block, shared_bytes, pdl, ranks)

    def __call__(self, stream: int) -> None:
        FakeLaunch.fired.append(Fired(self.kernel, self.held(), *self.about, stream))

    def held(self) -> list[ctypes._SimpleCData | ctypes.Structure]:
        """Copies of the arguments."""
        return [type(argument).from_buffer_copy(argument) for argument in self.arguments]
