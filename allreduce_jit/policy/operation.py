"""One call as a value: what it computes, on what, and how its data travels. Pure.

Everything between the front and the kernels speaks of calls as an ``OpSpec``: plan, catalogue, engine, graph cache, signature and
``describe``. A new operation is an entry of ``OPERATIONS``; what its kernels do is kernels/cuda's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# Dtypes that kernels sum, with the short names that kernels have for them, and bytes per element.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Pointer:
    """An address that a call binds.

    Attributes:
        name: of the kernels' argument.
        stride: bytes by which it advances per element of the input, from one launch of a call to the next; 0 for what every
            launch takes whole, as it would a weight.
    """

    name: str
    stride: int


# Each operation with the pointers that a call binds, in the order of its arguments: input and output first.
OPERATIONS = {"all_reduce": ("input", "output")}
EPILOGUES = ("none",)
WIRES = ("sentinel",)
MEMORIES = ("device",)


@dataclass(frozen=True)
class OpSpec:
    """One call, or (without a shape) the family of all calls that the same kernels run.

    Attributes:
        operation: a name of ``OPERATIONS``.
        dtype: of the tensors that are summed, by torch's name; engines say which they take.
        shape: of the input; None = the family.
        epilogue: what happens to a sum before it is stored, of ``EPILOGUES``.
        wire: how elements become packets, of ``WIRES``: ``sentinel`` sends them as they are, but for all-ones words.
        memory: where the packets pass through, of ``MEMORIES``: staging memory on the ``device``.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...] | None = None
    epilogue: str = "none"
    wire: str = "sentinel"
    memory: str = "device"

    def __post_init__(self) -> None:
        known = {"operation": OPERATIONS, "epilogue": EPILOGUES, "wire": WIRES, "memory": MEMORIES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(values)}")

    @property
    def family(self) -> OpSpec:
        """All calls that differ from this one in their shape alone."""
        return replace(self, shape=None)

    @property
    def numel(self) -> int:
        """Elements of the input. Raises ``ValueError`` for a family."""
        if self.shape is None:
            raise ValueError(f"{self} is a family of calls, which has no shape")
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the input, of a dtype in ``ITEMSIZE``."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def pointers(self) -> tuple[Pointer, ...]:
        """What a call binds, in order."""
        return tuple(Pointer(name, ITEMSIZE[self.dtype]) for name in OPERATIONS[self.operation])


def all_reduce(dtype: str, numel: int | None = None) -> OpSpec:
    """An all-reduce of ``numel`` elements, or the family of all of them."""
    return OpSpec("all_reduce", dtype, None if numel is None else (numel,))


ALL_REDUCE = tuple(all_reduce(dtype) for dtype in DTYPES)  # the families that every communicator builds
