"""What calls of a norm are given: tensors taken, refused, or packed first, and what such a call is as a value."""

from __future__ import annotations

import functools
import math
from ctypes import c_float
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from .errors import InputError, InputTypeError
from .inputs import check_input, packed, said_by
from .policy.norm import GROUP, HIDDEN, QUANTS, ROUNDINGS, Norm
from .policy.operation import DTYPES, OpSpec
from .policy.plan import PACKET

E4M3 = torch.float8_e4m3fn
OLDEST_WITH_E4M3 = (8, 9)
TITLES = {"norm": "add_rms_norm", "all_reduce_norm": "all_reduce_add_rms_norm"}


@dataclass(frozen=True)
class Operands:
    """A call whose tensors were accepted.

    Attributes:
        spec: the call.
        tensors: one per pointer of ``spec``, contiguous, at multiples of 16 bytes; but for scales: those are fp32, at the epilogue's
            strides.
        results: what the caller gets.
        copies: (destination, source) of what has to be copied once the call is enqueued.
    """

    spec: OpSpec
    tensors: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def operands(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    quant: str = "none",
    rounding: str = "R",
    weight_bias: int = 0,
    scale: torch.Tensor | None = None,
    column_major: bool = False,
    keep_norm: bool = False,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    operation: str,
    device: torch.device,
    index: int,
    rank: int | None,
) -> Operands:
    """Check what a call is given and make it ready; what kernels cannot read as it is, is packed: that is enqueued here.

    Args:
        operation: of ``policy.operation.NORMS``.
        device, index: where tensors have to be; ``index`` as ``Tensor.get_device`` has it.
        rank: for messages; None: of no communicator.
        others: as of ``norms.add_rms_norm_fp8``; ``quant`` is its ``scales`` (``quant_of``) or ``none``, ``keep_norm`` its ``with_norm``.

    Raises:
        InputError, InputTypeError: what is wrong, and what to do.
    """
    check = _Checks(TITLES[operation] + "_fp8" * (quant != "none"), device, index, rank)
    check.option("scales", quant, QUANTS)
    check.option("rounding", rounding, ROUNDINGS)
    check.option("weight_bias", weight_bias, (0, 1))
    norm_eps = check.eps(eps)
    if device.type not in ("cpu", "cuda"):
        check.refuse(f"the tensor is on {device}: expected a CUDA device or the CPU")
    check.input("the tensor", x)
    dtype, hidden = str(x.dtype).removeprefix("torch."), x.shape[-1] if x.dim() else 0
    check.option("dtype", dtype, DTYPES)
    if hidden not in HIDDEN:
        check.refuse(f"rows of {hidden} elements: expected a multiple of {HIDDEN.step} from {HIDDEN.start} to {HIDDEN.stop - 1}")
    if residual is not None:
        check.input("residual", residual, x.shape, x.dtype)
    check.input("weight", weight, x.shape[-1:], x.dtype, torch.float32)
    check.scales(quant, hidden, scale, scale_out, column_major)
    if norm_out is not None and not keep_norm:
        check.refuse("norm_out without with_norm=True")

    rows = x.numel() // hidden
    like_x = x.shape, x.dtype
    outs = [
        check.output("out", out, x.shape, x.dtype if quant == "none" else E4M3),
        check.output("residual_out", residual_out, *like_x),
    ]
    if keep_norm:
        outs.append(check.output("norm_out", norm_out, *like_x))
    strides = 0, 0
    if quant in ("token", "group"):
        found = check.scale_output(scale_out, x.shape[:-1], rows, hidden // GROUP if quant == "group" else 1, quant, column_major)
        outs.append(found)
        strides = found.strides if quant == "group" else strides
    read = {"x": x, "residual": residual, "weight": weight, "scale": scale}
    ready = {
        name: tensor if tensor is None or name == "scale" or _direct(tensor) else packed(tensor) for name, tensor in read.items()
    }
    in_place = {name: (tensor, tensor is ready[name]) for name, tensor in read.items() if tensor is not None}
    check.overlaps(outs, in_place, quant)

    spec = OpSpec(
        operation,
        dtype,
        (rows, hidden),
        Norm(
            rounding,
            quant,
            residual is not None,
            str(weight.dtype).removeprefix("torch."),
            weight_bias,
            norm_eps,
            keep_norm,
            strides,
        ),
    )
    made = {one.name: one for one in outs}
    bound: dict[str, Any] = {
        "input": ready["x"],
        "output": made["out"].used,
        "residual": ready["residual"],
        "weight": ready["weight"],
        "residual_out": made["residual_out"].used,
        "scale": made["scale_out"].used if "scale_out" in made else scale,
        "norm": made["norm_out"].used if keep_norm else None,
    }
    results = [made["out"].told, made["residual_out"].told]
    if quant != "none":
        results.insert(1, made["scale_out"].told if scale is None else scale)
    if keep_norm:
        results.append(made["norm_out"].told)
    tensors = tuple(bound[pointer.name] for pointer in spec.pointers)
    return Operands(spec, tensors, tuple(results), tuple((one.told, one.used) for one in outs if one.told is not one.used))


def quant_of(scales: str, operation: str, rank: int | None) -> str:
    """``quant`` of a call that quantizes. Raises ``InputError``: there are no such scales."""
    _Checks(TITLES[operation] + "_fp8", torch.device("cpu"), -1, rank).option("scales", scales, QUANTS[1:])
    return scales


@dataclass(frozen=True)
class _Out:
    """An output: what the caller gets (``told``) and what the kernel writes (``used``), of scales with their strides."""

    name: str
    told: torch.Tensor
    used: torch.Tensor
    strides: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Checks:
    """What is refused, in the words of one operation."""

    title: str
    device: torch.device
    index: int
    rank: int | None

    def refuse(self, why: str) -> NoReturn:
        raise InputError(f"{said_by(self.rank)}{self.title}: {why}")

    def option(self, name: str, value: object, values: Any) -> None:
        if value not in values:
            self.refuse(f"{name} {value!r}: expected one of {', '.join(map(str, values))}")

    def eps(self, eps: float) -> float:
        """As fp32 has it."""
        try:
            value = c_float(eps).value
        except TypeError:
            raise InputTypeError(f"{said_by(self.rank)}{self.title}: eps is a {type(eps).__name__}: expected a float") from None
        if not (math.isfinite(value) and value >= 0):
            self.refuse(f"eps {eps}: expected a finite number of fp32 that is not negative")
        return value

    def input(self, name: str, tensor: object, shape: torch.Size | None = None, *dtypes: torch.dtype) -> None:
        check_input(tensor, self.device, self.index, self.rank, self.title, name)
        assert isinstance(tensor, torch.Tensor)
        if shape is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
            kinds = " or ".join(map(str, dict.fromkeys(dtypes)))
            self.refuse(f"{name} is {tuple(tensor.shape)} {tensor.dtype}: expected {tuple(shape)} {kinds}")

    def scales(
        self, quant: str, hidden: int, scale: torch.Tensor | None, scale_out: torch.Tensor | None, column_major: bool
    ) -> None:
        if quant == "static":
            if scale is None:
                self.refuse('scales="static" without scale: pass one fp32 element on the device, or scales="token"')
            self.input("scale", scale)
            if scale.numel() != 1 or scale.dtype is not torch.float32:
                self.refuse(f"scale is {tuple(scale.shape)} {scale.dtype}: expected one element of {torch.float32}")
            if scale_out is not None:
                self.refuse('scale_out with scales="static", of which the scale is given')
        elif scale is not None:
            self.refuse(f'scale with scales="{quant}", which are found: pass scale_out for where they go')
        if quant == "group" and hidden % GROUP:
            self.refuse(f"rows of {hidden} elements: with scales by the group a multiple of {GROUP}")
        if column_major and quant != "group":
            self.refuse(f'column_major with scales="{quant}": it is for scales by the group')
        if quant == "none" and scale_out is not None:
            self.refuse("scale_out without scales")
        if quant != "none" and self.device.type == "cuda" and (arch := _capability(self.device)) < OLDEST_WITH_E4M3:
            self.refuse(f"{E4M3} needs a GPU from sm_89 on, {self.device} is sm_{arch[0]}{arch[1]}: use {self.title[:-4]}")

    def output(self, name: str, out: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> _Out:
        if out is None:
            new = torch.empty(shape, dtype=dtype, device=self.device)
            return _Out(name, new, new)
        self._writable(name, out, shape, dtype)
        return _Out(name, out, out if _direct(out) else torch.empty(shape, dtype=dtype, device=self.device))

    def scale_output(
        self, out: torch.Tensor | None, lead: torch.Size, rows: int, groups: int, quant: str, column_major: bool
    ) -> _Out:
        shape = torch.Size((*lead, groups))
        if out is not None:
            self._writable("scale_out", out, shape, torch.float32)
            strides = _matrix_strides(out, rows, groups)
            if strides is not None and (quant == "group" or strides == (1, 1)):
                return _Out("scale_out", out, out, strides)
        sizes = (groups, rows) if column_major else (rows, groups)
        new = torch.empty(sizes, dtype=torch.float32, device=self.device)
        new = (new.t() if column_major else new).view(shape)
        return _Out("scale_out", new if out is None else out, new, _matrix_strides(new, rows, groups) or (groups, 1))

    def _writable(self, name: str, out: object, shape: torch.Size, dtype: torch.dtype) -> None:
        self.input(name, out, shape, dtype)
        assert isinstance(out, torch.Tensor)
        if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            self.refuse(f"{name} is an expanded tensor, whose elements share memory: clone it")

    def overlaps(self, outs: list[_Out], read: dict[str, tuple[torch.Tensor, bool]], quant: str) -> None:
        """Refuse an output in the memory of another operand, but for the norm in that of ``x`` and the sum in that of the residual.

        Args:
            read: by name each input, and whether it is read where it is: what is packed first, no output can spoil.
        """
        same = {("out" if quant == "none" else "norm_out", "x"), ("residual_out", "residual")}
        for i, out in enumerate(outs):
            for other in outs[:i]:
                if _overlap(out.told, other.told):
                    self.refuse(f"{out.name} overlaps {other.name}: pass separate memory")
            for name, (tensor, in_place) in read.items():
                if not _overlap(out.told, tensor) or (out.name, name) in same and _same_view(out.told, tensor):
                    continue
                if in_place and out.told is out.used:
                    but = f" without being the same view: pass {out.name}={name}, or separate memory"
                    self.refuse(f"{out.name} overlaps {name}{but if (out.name, name) in same else ': pass separate memory'}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _direct(tensor: torch.Tensor) -> bool:
    """Whether kernels can use it as it is."""
    return tensor.is_contiguous() and tensor.data_ptr() % PACKET == 0 and not tensor.is_neg()


def _matrix_strides(tensor: torch.Tensor, rows: int, columns: int) -> tuple[int, int] | None:
    """Of a tensor as a matrix that is dense in one of its dimensions, (1, 1) of a single row or column; None: it is no such matrix."""
    try:
        row, column = tensor.view(rows, columns).stride()
    except RuntimeError:  # rows that no stride tells
        return None
    row, column = row if rows > 1 else columns, column if columns > 1 else 1
    return (row, column) if column == 1 and row >= columns or row == 1 and column >= rows else None


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (begin, end), (other, other_end) = map(_memory, (a, b))
    return begin < other_end and other < end


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.is_neg()) == (b.data_ptr(), b.shape, b.stride(), b.dtype, b.is_neg())
