"""What host and device share: the layout of every struct that both know, and their constants. The only description.

CUDA: the structs of ``kernels/cuda/abi.cuh`` and ``floor.cu`` have the same fields; ``headers`` makes the constants that they
use and a ``static_assert`` of every offset and size, so that a field that moved on one side only does not compile. Triton
has no structs: the kernels of ``kernels/triton`` take their word indices from here. The host fills and reads the structs themselves.

Nothing is imported but ctypes: every room stands on this, and so do the kernels.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from enum import IntEnum

MAX_RANKS = 8
MAX_SHAPES = 4096  # of calls: each has a flag in Control.handshaken
POLLS = 64  # of a wait, before the first check of the clock and the abort code, and between two checks in Triton

# An abort code: Kind | culprit << CULPRIT_SHIFT | rank that found out << FINDER_SHIFT.
CULPRIT_SHIFT, FINDER_SHIFT = 8, 16
# The tag of a signature: algorithm | dtype << DTYPE_SHIFT | IN_PLACE | upper half of the number of elements << NUMEL_SHIFT.
DTYPE_SHIFT, NUMEL_SHIFT = 8, 16
IN_PLACE = 1 << 15  # for the report only, never compared: no rank depends on another's

FLAG_STRIDE = 128  # bytes between two flags of the floor's kernels: a cache line each


class Kind(IntEnum):
    """Why kernels stop: the low byte of an abort code. Kernels detect the first three."""

    TIMEOUT = 1
    MISMATCH = 2
    CONCURRENT = 3
    LOST = 4
    ABORTED = 5


class Args(ctypes.Structure):
    """The argument of a V2 kernel, by value. Only ``input`` and ``output`` differ between two calls of one shape."""

    _fields_ = [
        ("staging", u64 * MAX_RANKS),  # of each rank, as mapped in this process: a Header, then the slots
        ("own", u64),  # = staging[rank]
        ("input", u64),  # the user's tensors, on this GPU, from this launch's first element on; may be equal
        ("output", u64),
        ("numel", u64),  # elements of this launch
        ("total", u64),  # elements of the whole call, for the signature
        ("slots", u64),  # offset of this algorithm's slots in the staging memory
        ("channels", u64),  # Channel per channel of this algorithm, local
        ("control", u64),  # Control, local
        ("report", u64),  # Report, host memory
        ("rank", u32),
        ("capacity", u32),  # slots per (buffer, source)
        ("tag", u32),  # dtype and algorithm, for the signature
        ("shape_id", u32),  # which flag of Control.handshaken belongs to calls of this shape
        ("launch", u32),  # number of this launch within the call, from 0
        ("scatter", u32),  # buffers of a stream's launch (two_shot.cu)
        ("gather", u32),
        ("last", u32),  # whether it completes what a guard began: the last launch of a stream, any other launch
    ]


class NormArgs(ctypes.Structure):
    """The argument of a V2 kernel that normalizes the rows of the sum (policy/norm.py), by value. Absent tensors are 0.

    ``call.output`` is the norm, or what it is quantized to; the elements of ``call`` are whole rows.
    """

    _fields_ = [
        ("call", Args),
        ("residual", u64),  # as the input; from this launch's first row on, as all tensors but the weight and a static scale
        ("residual_out", u64),
        ("weight", u64),  # hidden elements
        ("norm", u64),  # where the output is quantized: the norm
        ("scale", u64),  # of the quantized output: fp32, read (static) or written
        ("eps", ctypes.c_float),
        ("scale_row", u32),  # elements of the scales from one row to the next
        ("scale_group", u32),  # and from one group to the next
        ("reserved", u32),
        ("parameters", u64),  # what the signature tells beside Args: hidden, flags, eps
    ]


class Signature(ctypes.Structure):
    """What a call tells its peers of itself. Both halves carry the sequence number, and so prove their own arrival."""

    _fields_ = [("numel", u32), ("sequence", u32), ("tag", u32), ("sequence_again", u32)]


class Header(ctypes.Structure):
    """First in the staging memory: what peers may write besides packets."""

    _fields_ = [
        ("abort", u32),  # 0, or an abort code: this rank's kernels must stop
        ("reserved", u32 * 63),
        ("signatures", Signature * MAX_RANKS * 2),  # per parity of the sequence number, per source
        ("parameters", Signature * MAX_RANKS * 2),  # the same for NormArgs.parameters, in place of numel and tag
        ("unused", u32 * 832),
    ]


def _control(shapes: int, unused: int) -> list[tuple]:
    return [
        ("sequence", u32),  # calls that were signed, by this rank and all others
        ("completed", u32),  # V2: calls whose last channel is done. Legacy: calls in flight
        ("deadline_ns", u64),  # how long to wait for a peer in a shape of call that is handshaken; 0 = for ever
        ("grace_ns", u64),  # the same until it is: the peer may still compile, or load a model
        ("reported", u32),  # whether the report is taken
        ("entered", u32),  # calls that began
        ("handshaken", u32 * shapes),  # per shape of call: whether all ranks have taken part in one
        ("channels", u32),  # how many there are of all algorithms together
        ("abort", u32),  # where the staging memory is on the host: 0, or why this rank's kernels must stop, near to them
        ("unused", u32 * unused),
        ("table", u64 * MAX_RANKS),  # legacy: the staging memory of each rank, as mapped in this process
    ]


class Control(ctypes.Structure):
    """A rank's own, in device memory; its channels follow."""

    _fields_ = _control(MAX_SHAPES, unused=4070)


class SmallControl(ctypes.Structure):
    """``Control`` with short arrays. Offsets are asserted of this one: to find them in 32 KiB takes as long as to compile a kernel."""

    _fields_ = _control(2, unused=2)


class Channel(ctypes.Structure):
    """What a V2 channel keeps from call to call; one load reads both. Legacy's channels have an epoch alone."""

    _fields_ = [
        ("epoch", u32),
        ("stopped", u32),  # this rank was stopped: push no more
    ]


class Report(ctypes.Structure):
    """Why waits ended, for the host."""

    _fields_ = [
        ("code", u32),  # an abort code; written last
        ("sequence", u32),  # of the call; 0: whoever reports does not know, Control.sequence tells
        ("tag", u32),
        ("buffer", u32),
        ("channel", u32),
        ("waited_ms", u32),
        ("mine", u32 * 2),  # signatures that differ: numel, tag
        ("theirs", u32 * 2),
    ]


class FloorArgs(ctypes.Structure):
    """The argument of the floor's kernels, by value."""

    _fields_ = [
        ("flags", u64 * MAX_RANKS),  # of each rank, as mapped here: a u32 per source, FLAG_STRIDE bytes apart
        ("data", u64 * MAX_RANKS),  # of each rank, as mapped here: ``packets`` packets per source
        ("state", u64),  # FloorState, local
        ("timeout_ns", u64),  # of one wait
        ("rank", u32),
        ("packets", u32),
        ("pace", u32),  # cycles from a warp's stores to those of the next one
        ("first_poll", u32),  # cycles from a warp's stores to its first poll
    ]


class FloorState(ctypes.Structure):
    """One load reads both, so that a check for expiry costs nothing."""

    _fields_ = [
        ("epoch", u32),
        ("expired", u32),  # 1 + the rank that did not arrive; from then on kernels neither store nor wait
    ]


CONSTANTS = {
    "MAX_RANKS": MAX_RANKS,
    "MAX_SHAPES": MAX_SHAPES,
    "POLLS": POLLS,
    "CULPRIT_SHIFT": CULPRIT_SHIFT,
    "FINDER_SHIFT": FINDER_SHIFT,
    "NUMEL_SHIFT": NUMEL_SHIFT,
    "IN_PLACE": IN_PLACE,
    "FLAG_STRIDE": FLAG_STRIDE,
    **{kind.name: int(kind) for kind in (Kind.TIMEOUT, Kind.MISMATCH, Kind.CONCURRENT)},
}


def headers() -> dict[str, str]:
    """The headers of ``kernels/cuda`` that are made from this module, by name."""
    constants = "#pragma once\n" + "".join(f"constexpr u32 {name} = {value};\n" for name, value in CONSTANTS.items())
    return {
        "abi_constants.cuh": constants,
        "abi_layout.cuh": _layout(Args, NormArgs, Signature, Header, SmallControl, Control, Channel, Report),
        "floor_layout.cuh": _layout(FloorArgs, FloorState),
    }


def _layout(*structs: type[ctypes.Structure]) -> str:
    """A ``static_assert`` of the size of each struct, and of the offset and size of each of its fields; of ``Control`` all but offsets."""
    lines = []
    for struct in structs:
        name = struct.__name__
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            if struct is not Control:
                lines.append(f'static_assert(is_at(&{name}::{field}, {at.offset}), "{name}.{field} has moved");')
            lines.append(f'static_assert(sizeof({name}::{field}) == {at.size}, "{name}.{field} has another size");')
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name} has another size");')
    return "".join(f"{line}\n" for line in lines)
