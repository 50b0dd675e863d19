"""One call as a value: what it computes, on what, and how its data travels. Pure.

Everything between the front and the kernels speaks of calls as an ``OpSpec``: plan, catalogue, engine, graph cache, signature and
``describe``. A new operation is an entry of ``OPERATIONS``; what its kernels do is kernels/cuda's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .norm import HIDDEN, Norm

# Dtypes that kernels sum, with the short names that kernels have for them, and bytes per element.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 4  # of a scale: fp32


@dataclass(frozen=True)
class Pointer:
    """An address that a call binds.

    Attributes:
        name: of the kernels' argument.
        stride: bytes by which it advances from one launch of a call to the next, for every ``per`` elements of the input in between;
            0 for what every launch takes whole, as it would a weight.
        per: 1, or the elements of a row: launches then begin where rows do.
    """

    name: str
    stride: int
    per: int = 1

    def offset(self, start: int) -> int:
        """Bytes into its tensor at which a launch begins whose first element of the input is number ``start``."""
        return start // self.per * self.stride


OPERATIONS = (
    "all_reduce",  # output = the sum of all ranks' inputs
    "all_reduce_norm",  # what policy/norm.py makes of that sum
    "norm",  # and of the input of this rank alone
)
NORMS = OPERATIONS[1:]
WIRES = ("sentinel",)
MEMORIES = ("device",)


@dataclass(frozen=True)
class OpSpec:
    """One call, or the family of all calls that the same kernels run: without a shape, of ``NORMS`` without rows.

    Attributes:
        operation: a name of ``OPERATIONS``.
        dtype: of the tensors that are summed, by torch's name; engines say which they take.
        shape: of the input, of ``NORMS`` (rows, hidden); of a family None, or (0, hidden).
        epilogue: what happens to a sum before it is stored: of ``NORMS`` how it is normalized, else None.
        wire: how elements become packets, of ``WIRES``: ``sentinel`` sends them as they are, but for all-ones words.
        memory: where the packets pass through, of ``MEMORIES``: staging memory on the ``device``.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...] | None = None
    epilogue: Norm | None = None
    wire: str = "sentinel"
    memory: str = "device"

    def __post_init__(self) -> None:
        known = {"operation": OPERATIONS, "wire": WIRES, "memory": MEMORIES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(values)}")
        if (self.operation in NORMS) != (self.epilogue is not None):
            raise ValueError(
                f"{self.operation} with epilogue {self.epilogue}: expected {' and '.join(NORMS)} to have one, and no other"
            )
        if self.epilogue is not None and self.shape is not None and (len(self.shape) != 2 or self.shape[1] not in HIDDEN):
            raise ValueError(f"{self.operation} of shape {self.shape}: expected (rows, hidden), with hidden in {HIDDEN}")

    @property
    def family(self) -> OpSpec:
        """All calls that the same kernels run: of any shape, or of any number of rows and any norm of one family."""
        if self.epilogue is None or self.shape is None:
            return replace(self, shape=None)
        return replace(self, shape=(0, self.hidden), epilogue=self.epilogue.family)

    @property
    def numel(self) -> int:
        """Elements of the input. Raises ``ValueError`` without a shape."""
        return math.prod(self._shape)

    @property
    def rows(self) -> int:
        """Of an operation of ``NORMS``, in which a row is what is normalized; 0 of a family."""
        return self._shape[0]

    @property
    def hidden(self) -> int:
        """Elements of a row."""
        return self._shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the input, of a dtype in ``ITEMSIZE``."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def pointers(self) -> tuple[Pointer, ...]:
        """What a call binds, in order: input and output first."""
        itemsize = ITEMSIZE[self.dtype]
        if self.epilogue is None:
            return Pointer("input", itemsize), Pointer("output", itemsize)
        return tuple(Pointer(name, stride, self.hidden) for name, stride in _bound(self.epilogue, self.hidden, itemsize))

    @property
    def _shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise ValueError(f"{self} is a family of calls, which has no shape")
        return self.shape


def _bound(norm: Norm, hidden: int, itemsize: int) -> Iterator[tuple[str, int]]:
    """(name, bytes from one row to the next) of each pointer of a norm."""
    quantized, row = norm.quant != "none", hidden * itemsize
    yield "input", row
    yield "output", hidden if quantized else row
    if norm.residual:
        yield "residual", row
    yield "weight", 0
    yield "residual_out", row
    if quantized:
        yield "scale", {"static": 0, "token": SCALE_BYTES, "group": norm.scale_strides[0] * SCALE_BYTES}[norm.quant]
    if quantized and norm.keep_norm:
        yield "norm", row


def all_reduce(dtype: str, numel: int | None = None) -> OpSpec:
    """An all-reduce of ``numel`` elements, or the family of all of them."""
    return OpSpec("all_reduce", dtype, None if numel is None else (numel,))


ALL_REDUCE = tuple(all_reduce(dtype) for dtype in DTYPES)  # the families that every communicator builds
