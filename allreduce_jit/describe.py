"""What a communicator says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .policy import backends
from .policy.operation import DTYPES, ITEMSIZE, OpSpec, all_reduce
from .policy.plan import Plan
from .policy.verdict import Path, Reason
from .records import Record

if TYPE_CHECKING:
    import torch

    from .engine.fallback import TorchEngine
    from .routes import Routes
    from .setup.ladder import Ladder

T = TypeVar("T")

LARGEST = 1 << 30  # bytes up to which plans are asked for


@dataclass(frozen=True)
class Band(Record):
    """Sizes of all-reduces that run the same algorithm; both ends belong to the band.

    Attributes:
        dtype: as torch names it: ``bfloat16``.
        from_bytes, to_bytes: sizes of one rank's tensor, in bytes; ``to_bytes`` of the last one is None: it has no end.
        path: ``v2``, ``legacy``, ``host`` or ``torch.distributed``.
        algorithm: as ``Plan.algorithm``.
    """

    dtype: str
    from_bytes: int
    to_bytes: int | None
    path: str
    algorithm: str


@dataclass(frozen=True)
class KernelsOf(Record):
    """What a path is inside: the name of its ``backend``, and the kind of ``memory`` that its ranks share."""

    backend: str
    memory: str


@dataclass(frozen=True)
class KernelCounts(Record):
    """Kernel modules of this rank: ``compiled`` for this communicator, and ``cached`` before."""

    compiled: int
    cached: int


@dataclass(frozen=True)
class FusedFamily(Record):
    """Calls with a norm that the same kernels run, or that should have had some.

    Attributes:
        operation: ``all_reduce_norm``.
        dtype: of the tensors, as torch names it.
        hidden: elements of a row.
        rounding: ``R``, ``U`` or ``H``.
        quantization: ``none``, ``static``, ``token`` or ``group``.
        residual: whether one is added.
        weight: dtype of the weights.
        weight_bias: what is added to the weights, 0 or 1.
        norm: whether the norm itself is a result.
        path: where the kernels belong; ``apart``: there are none, and calls are the all-reduce and then a kernel of its own.
        reason: why there are none, else None.
    """

    operation: str
    dtype: str
    hidden: int
    rounding: str
    quantization: str
    residual: bool
    weight: str
    weight_bias: int
    norm: bool
    path: str
    reason: str | None


@dataclass(frozen=True)
class CommunicatorReport(Record):
    """What a communicator is and why; ``Communicator.describe`` makes it.

    Attributes:
        path: the best path of this communicator.
        kernels_of: what the path is inside (``backend``, ``memory``); None: it has no kernels of ours.
        backend: what runs calls that no kernel takes: ``nccl`` or ``gloo``.
        reasons: why this path, and why not NCCL where it was wanted; at least one.
        deterministic: whether every call has the exact bits of the fp32 sum in rank order.
        tuning: the path's table: ``package``, or the file that ``allreduce-jit tune`` wrote; None on paths that it cannot measure.
        bands: which algorithm runs, for each dtype from its smallest size on.
        staging_bytes: memory of this GPU that peers write into; on path host, memory of the host that this rank writes and they read.
        device_bytes: memory of this GPU that the kernels need, but for their code.
        watched: ranks whose deaths are known at once.
        timings: seconds that the steps of the set-up took, by their names.
        kernels: modules ``compiled`` and ``cached``.
        c_calls: whether eager calls of one launch are made in C; a small C extension does that, where it was built.
        operations: families of calls with a norm that have kernels, or should have.
        rank, world_size: this rank, and how many there are.
        device: this rank's device, as torch writes it.
    """

    path: Path
    kernels_of: KernelsOf | None
    backend: str
    reasons: tuple[Reason, ...]
    deterministic: bool
    tuning: str | None
    bands: tuple[Band, ...]
    staging_bytes: int
    device_bytes: int
    watched: tuple[int, ...]
    timings: Mapping[str, float]
    kernels: KernelCounts
    c_calls: bool
    operations: tuple[FusedFamily, ...]
    rank: int
    world_size: int
    device: str


def describe(
    ladder: Ladder,
    torch_engine: TorchEngine,
    routes: Routes,
    watched: Sequence[int],
    deterministic: bool,
    operations: tuple[FusedFamily, ...],
    rank: int,
    device: torch.device,
) -> CommunicatorReport:
    """What was agreed and built."""
    engine, verdict = ladder.engine, ladder.verdict
    row = backends.of(verdict.path)

    def plan(spec: OpSpec) -> Plan:
        return routes.engine(spec).plan(spec)

    return CommunicatorReport(
        path=verdict.path,
        kernels_of=None if row is None else KernelsOf(row.name, row.memory),
        backend=torch_engine.backend,
        reasons=tuple(reasons(ladder, torch_engine)),
        deterministic=deterministic or verdict.path in (Path.V2, Path.HOST) or len(ladder.processes) == 1,
        tuning=(ladder.tuning or "package") if row and row.tunable else None,
        bands=tuple(band for dtype in DTYPES for band in bands(dtype, plan)),
        staging_bytes=engine.memory.nbytes if engine else 0,
        device_bytes=engine.state.nbytes + (engine.memory.nbytes if row and row.memory == "device" else 0) if engine else 0,
        watched=tuple(watched),
        timings={name: round(seconds, 4) for name, seconds in ladder.timings.items()},
        kernels=KernelCounts(engine.compiled, engine.cached) if engine else KernelCounts(0, 0),
        c_calls=engine is not None and engine.c_calls,
        operations=operations,
        rank=rank,
        world_size=len(ladder.processes),
        device=str(device),
    )


def reasons(ladder: Ladder, torch_engine: TorchEngine) -> list[Reason]:
    """Why this path, and why not NCCL where it was wanted."""
    problem = torch_engine.problem
    without = [Reason("no-nccl", f"NCCL cannot be set up: {problem}")] if problem else []
    return [*ladder.verdict.reasons, *without]


def bands(dtype: str, plan: Callable[[OpSpec], Plan]) -> list[Band]:
    """The bands of all-reduces of ``dtype``, from the smallest size on."""
    size = ITEMSIZE[dtype]

    def what(numel: int) -> tuple[str, str]:
        found = plan(all_reduce(dtype, numel))
        return found.path, found.algorithm

    return [
        Band(dtype, first * size, None if last is None else last * size, path, algorithm)
        for first, last, (path, algorithm) in stretches(what, LARGEST // size)
    ]


def stretches(what: Callable[[int], T], last: int) -> Iterator[tuple[int, int | None, T]]:
    """(first, last, answer) for every stretch of 1 … ``last`` with one answer; the final one has no end (None).

    ``what`` must not come back to an answer that it has left, and no plan does.
    """
    first = 1
    while first <= last:
        answer = what(first)
        high = first  # the last number known to have the answer
        while high < last and what(min(2 * high, last)) == answer:
            high = min(2 * high, last)
        beyond = min(2 * high, last + 1)
        while beyond - high > 1:
            middle = (high + beyond) // 2
            high, beyond = (middle, beyond) if what(middle) == answer else (high, middle)
        yield first, (None if high == last else high), answer
        first = high + 1
