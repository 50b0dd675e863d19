"""The CPU twin: the V2 kernels built for the host, all ranks of a world in one process.

``build`` makes an executable of ``kernels/cuda`` and ``twin/`` (a shim for ptx.cuh, and a driver that schedules CUDA
threads as fibers); ``World`` is a communicator of it. Layout, plans, argument blocks and launches are the package's
own: ``NvlinkEngine`` with the memory and the launches of the twin.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from allreduce_jit.abi import MAX_SHAPES, Control, Header, NormArgs
from allreduce_jit.engine import host as host_engine_module
from allreduce_jit.engine import nvlink as engine_module
from allreduce_jit.engine import nvlink_norm as norm_engine_module
from allreduce_jit.engine import reference
from allreduce_jit.engine.memory import REPORT_BYTES, LocalState
from allreduce_jit.engine.prepared import PreparedCall
from allreduce_jit.jit import source
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS, KernelSpec, cuda_module, nvlink_algorithms
from allreduce_jit.policy.operation import ITEMSIZE, OpSpec, all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES, MAX_BLOCK, PACKET, WARP, Layout, Plan
from allreduce_jit.policy.tables import NEVER, Band
from allreduce_jit.settings import Settings

HERE = Path(__file__).parent / "twin"
COMPILER = os.environ.get("CXX", "g++")
STAGING_MB = 3  # holds every algorithm's slots, and makes a few MB take several launches
ARENA = 24 << 20  # bytes of a rank's tensors
GUARD = 64  # bytes between tensors, which nobody may touch
GAP = 8  # channels between those of two regions, likewise
PAGE = 4096

Edit = tuple[str, str, str]  # file, old text, new text
ARGS_BYTES = ctypes.sizeof(NormArgs)  # of a launch, whatever its kernel takes
TOGETHER = 4  # modules of a source that are compiled as one file
WARNINGS, OPTIMIZATION = ["-Wall", "-Wextra", "-Werror"], "-O1"
DRIVERS = "-O2"  # the driver's own, which runs between all accesses and changes seldom


class StaleEdit(Exception):
    """The text that an edit replaces is not exactly once in its file."""


class Failed(Exception):
    """A run ended badly. ``kind``: overwritten, foreign poison, hang, early report, crash, race, bits, guard,
    slots, report, in flight, misaligned, scope, shared memory, apart, unordered, handshake."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def missing() -> str | None:
    """Why the twin cannot be built here."""
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


# -- building


def sources(edits: Sequence[Edit] = ()) -> dict[str, str]:
    """All sources by name, ``ptx.cuh`` replaced by the shim, with ``edits`` made."""
    texts = {name: text for name, text in sorted(source.files().items()) if name != "ptx.cuh"}
    texts |= {path.name: path.read_text() for path in sorted(HERE.iterdir()) if path.is_file()}
    # Half of all waits take the slow path.
    for name, old, new in (("abi_constants.cuh", "POLLS = 64;", "POLLS = 2;"), *edits):
        if texts[name].count(old) != 1:
            raise StaleEdit(f"{name} holds {texts[name].count(old)} times: {old!r}")
        texts[name] = texts[name].replace(old, new)
    texts["ptx.cuh"] = texts["shim.hpp"]
    return texts


def build(directory: Path, world_size: int, tsan: bool = False, edits: Sequence[Edit] = (),
          modules: Sequence[KernelSpec] | None = None) -> Path:  # fmt: skip
    """The executable for one world size; objects that did not change are taken from ``directory``.

    ``modules``: what is in it; None: ``bare(world_size)``."""
    texts, modules = sources(edits), bare(world_size) if modules is None else modules
    # Without races, bounds: an element behind an array of a thread ends the twin, by a trap, which needs no library.
    sanitize = ["-fsanitize=thread", "-g1"] if tsan else ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"]
    entries = entries_of(modules)
    declarations = "".join(f'extern "C" void {entry}_call(const void *);\n' for entry in entries)
    table = (
        f"{declarations}typedef void (*Entry)(const void *);\n"
        f"extern const Entry entries[] = {{{', '.join(f'{entry}_call' for entry in entries)}}};\n"
        f"extern const unsigned args_bytes = {ARGS_BYTES};\n"
    )
    jobs = [("driver.cpp", texts["driver.cpp"], ["-DTWIN_TSAN"] if tsan else []), ("table.cpp", table, [])]
    for name in dict.fromkeys(spec.source for spec in modules):
        specs = [spec for spec in modules if spec.source == name]
        for part in (specs[i : i + TOGETHER] for i in range(0, len(specs), TOGETHER)):
            jobs.append((f"{part[0].name}.cpp", _unit(part), sanitize))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(directory, texts, *job), jobs))
    executable = directory / f"twin-{digest(*map(str, objects))}{'-tsan' if tsan else ''}"
    if not executable.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:  # others may build the same at the same time
            _call([COMPILER, *sanitize, *map(str, objects), "-o", str(Path(folder, "twin"))])
            os.replace(Path(folder, "twin"), executable)
    return executable


def _unit(specs: Sequence[KernelSpec]) -> str:
    """A file of modules of one source."""
    kernels, calls = "", ""
    for spec in specs:
        kernels += f"namespace of_{spec.name} {{\n{source.unit(spec, '')}}}\n"
        for entry in spec.entries:
            args = "unit::NormArgs" if spec.macro[0] == "NORM_ENTRY" else "unit::Args"
            call = f"unit::of_{spec.name}::{entry}(*static_cast<const {args} *>(a));"
            calls += f'extern "C" void {entry}_call(const void *a) {{ {call} }}\n'
    unit = f"unit_{specs[0].name}"  # two units must not share a template's name
    text = f'#include "ptx.cuh"\nnamespace unit {{\n#include "{specs[0].source}"\n{kernels}}}\n{calls}'
    return re.sub(r"\bunit\b", unit, text)


def bare(world_size: int) -> list[KernelSpec]:
    """The modules of all-reduces."""
    return [cuda_module(name, world_size) for name in algorithms(world_size)]


def entries_of(modules: Sequence[KernelSpec]) -> list[str]:
    return [entry for spec in modules for entry in spec.entries]


def algorithms(world_size: int) -> list[str]:
    """Every algorithm that a plan can pick, the one for the largest messages last."""
    wide, narrow = nvlink_algorithms(world_size), nvlink_algorithms(world_size, few_sms=True)
    return list(dict.fromkeys([wide[0], *narrow, *wide[1:]]))


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _included(texts: dict[str, str], text: str) -> dict[str, str]:
    """What a file includes, and what that does."""
    found: dict[str, str] = {}
    left = [text]
    while left:
        for name in re.findall(r'^#include "([^"]+)"', left.pop(), re.M):
            if name not in found:
                found[name] = texts[name]
                left.append(texts[name])
    return dict(sorted(found.items()))


def _compile(directory: Path, texts: dict[str, str], name: str, text: str, flags) -> Path:
    command = [COMPILER, "-std=c++17", DRIVERS if name == "driver.cpp" else OPTIMIZATION, *WARNINGS,
               "-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-strict-aliasing", *flags]  # fmt: skip
    headers = _included(texts, text)
    key = digest(name, text, *command, *headers, *headers.values())
    result = directory / f"{key}.o"
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            for other, content in texts.items():
                Path(folder, other).parent.mkdir(exist_ok=True)
                Path(folder, other).write_text(content)
            Path(folder, name).write_text(text)
            _call([*command, "-I", folder, "-c", str(Path(folder, name)), "-o", str(Path(folder, "result.o"))])
            os.replace(Path(folder, "result.o"), result)
    return result


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


# -- calls, and what must come out


@dataclass(frozen=True)
class Call:
    """One all-reduce.

    Attributes:
        algorithm: by name, or None for the plan's choice.
        dtype: by name.
        numel: elements, may be 0.
        kind: of values, see ``reference.values``.
        offset: elements by which input and output are off a 16-byte boundary.
        in_place: the output is the input.
        block: threads of a block, if the algorithm is named.
        chained: the input is the output of the call before, of the same dtype and size, and the output (unless in
            place) goes to that call's input: any access that is not ordered by the stream shows.
    """

    algorithm: str | None
    dtype: str
    numel: int
    kind: str = reference.RANDOM
    offset: int = 0
    in_place: bool = False
    chained: bool = False
    block: int = 32

    @property
    def spec(self) -> OpSpec:
        return all_reduce(self.dtype, self.numel)

    def plan(self, world: World) -> Plan:
        """The named algorithm or the engine's choice; one-shot where there are too few elements to stream."""
        try:
            if self.algorithm in world.layout.regions:
                return nvlink.plan_of(self.algorithm, self.block, self.spec, world.world_size, world.layout)
            return world.engines[0].plan(self.spec)
        except ValueError:
            return nvlink.plan_of("one_shot", self.block, self.spec, world.world_size, world.layout)


@dataclass(frozen=True)
class Buffer:
    """A tensor in the arena of every rank."""

    dtype: torch.dtype
    start: int  # byte
    numel: int

    def of(self, arena: torch.Tensor) -> torch.Tensor:
        return arena[self.start : self.start + self.numel * self.dtype.itemsize].view(self.dtype)


class Program:
    """Calls with their tensors: every rank's arena before, and as it must be after."""

    def __init__(self, world_size: int, calls: Sequence[Call], seed: int):
        self.calls, self.buffers, self.steps = list(calls), [], []
        self.end, self.holes = GUARD, []
        fill = []
        for call in self.calls:
            if call.chained:
                _, x, out = self.steps[-1]
                x, out = out, out if call.in_place else x
            else:
                x = self._new(call)
                out = x if call.in_place else self._new(call)
                fill.append((x, call.kind))
            self.steps.append((call, x, out))
        self.before = [torch.full((self.end,), 0x5A, dtype=torch.uint8) for _ in range(world_size)]
        for rank, arena in enumerate(self.before):
            for i, (buffer, kind) in enumerate(fill):
                made = reference.values(seed * 1000 + i, rank, buffer.numel, buffer.dtype, kind=kind, world_size=world_size)
                buffer.of(arena).copy_(made)
        self.after = [arena.clone() for arena in self.before]
        for _, x, out in self.steps:
            want = reference.ordered_sum([x.of(arena) for arena in self.after])
            for arena in self.after:
                out.of(arena).copy_(want)

    def _new(self, call: Call) -> Buffer:
        return self._buffer(getattr(torch, call.dtype), call.numel, call.offset)

    def _buffer(self, dtype: torch.dtype, numel: int, offset: int = 0) -> Buffer:
        """Every other one, as dice say, ends where memory ends: whoever touches what lies behind it ends the twin."""
        nbytes = numel * dtype.itemsize
        if random.Random(len(self.buffers)).random() < 0.5:
            end = -(-(self.end + GUARD + nbytes) // PAGE) * PAGE
            self.holes.append(end)
            start, self.end = end - nbytes, end + PAGE
        else:
            start = -(-(self.end + GUARD) // 16) * 16 + offset * dtype.itemsize
            self.end = start + nbytes + GUARD
        self.buffers.append(Buffer(dtype, start, numel))
        assert self.end <= ARENA
        return self.buffers[-1]

    def check(self, rank: int, arena: torch.Tensor, or_nan: bool = False, calls: bool = True) -> None:
        """Compare bits, of tensors and of everything between them.

        Args:
            rank: whose.
            arena: what it has now.
            or_nan: a NaN is never wrong.
            calls: whether this rank made the calls, or nothing may have changed.
        """
        if not calls:
            if not torch.equal(arena, self.before[rank]):
                raise Failed("guard", f"the tensors of rank {rank} have changed")
            return
        if torch.equal(arena, self.after[rank]):
            return
        between = torch.ones(self.end, dtype=torch.bool)
        for buffer in self.buffers:
            between[buffer.start : buffer.start + buffer.numel * buffer.dtype.itemsize] = False
            got, want = buffer.of(arena), buffer.of(self.after[rank])
            difference = reference.compare(got, torch.where(got.float().isnan(), got, want) if or_nan else want)
            if difference.wrong:
                users = [call for call, *buffers in self.steps if buffer in buffers]
                raise Failed("bits", f"rank {rank}: {difference} in {users}")
        if not torch.equal(arena[between], self.after[rank][between]):
            raise Failed("guard", f"rank {rank} wrote beside its tensors")
        if not or_nan:
            self.after[rank].copy_(arena)  # NaNs of another payload


# -- running


class World:
    """A communicator of ``world_size`` ranks that lasts over many runs; its tensors are new in each.

    Args:
        executable: what ``build`` returned for this world size.
        world_size: number of ranks.
        pdl: whether launches may start before the kernel ahead has ended.
        epoch: what all epoch words hold at first; the sequence number of calls is a few behind.
        max_ctas: as in ``allreduce_jit.init``; then only the algorithms of such communicators have slots.
        relayout: a change of the package's layout (for planted bugs).
        modules: what the executable was built of; None: ``bare(world_size)``.
    """

    EMPTY = 0xFF  # what every byte of the slots holds at first; at the end, too, where slots are poisoned
    POISONED = True

    def __init__(self, executable: Path, world_size: int, *, pdl: bool = True, epoch: int = 0, max_ctas: int | None = None,
                 relayout=lambda layout, world_size: layout, modules: Sequence[KernelSpec] | None = None):  # fmt: skip
        self.world_size = world_size
        self.engines = self._make_engines(pdl, max_ctas)
        self.layout = spread(relayout(self.engines[0].layout, world_size))
        channel_bytes = engine_module.NvlinkEngine.channel_bytes
        local = ctypes.sizeof(Control) + channel_bytes * self.layout.channels
        parts = {"staging": self.layout.nbytes, "local": local, "report": REPORT_BYTES, "arena": ARENA}
        self._offsets, size = [], 0
        for _ in range(world_size):
            self._offsets.append({})
            for name, nbytes in parts.items():
                self._offsets[-1][name] = size
                size += (-(-nbytes // PAGE) + 1) * PAGE
        self._file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self._file.truncate(size)
        memory = torch.frombuffer(mmap.mmap(self._file.fileno(), size), dtype=torch.uint8)
        self._parts = [
            {name: memory[start : start + parts[name]] for name, start in offsets.items()} for offsets in self._offsets
        ]
        # What lies between two parts: nobody's.
        ends = [(name, start + parts[name]) for offsets in self._offsets for name, start in offsets.items()]
        starts = [start for offsets in self._offsets for start in offsets.values()]
        self._borders = [(name, memory[end:start]) for (name, end), start in zip(ends, [*starts[1:], size], strict=True)]
        for _, border in self._borders:
            border.fill_(0x5A)
        epochs, sequence = torch.tensor([epoch, max(0, epoch - 4)]).to(torch.int32)  # the same bits
        # The channels of every algorithm, and behind them what nobody may touch, but who tells all that this rank is stopped.
        channels, self._between = [], []
        for first, count in {(region.first_channel, region.channels) for region in self.layout.regions.values()}:
            at = ctypes.sizeof(Control) + channel_bytes * first
            end = at + channel_bytes * count
            channels.append(slice(at, end))
            self._between.append(slice(end, end + channel_bytes * GAP))
        for parts in self._parts:
            parts["staging"][HEADER_BYTES:].fill_(self.EMPTY)
            for count in LocalState.COUNTS_AT:
                parts["local"][count : count + 4].view(torch.int32).fill_(sequence)
            parts["local"][Control.channels.offset :][:4].view(torch.int32).fill_(self.layout.channels)
            for words in channels:
                parts["local"][words].view(torch.int32)[::2].fill_(epochs)
            for gap in self._between:
                parts["local"][gap].fill_(0x5A)
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [executable, f"/dev/fd/{self._file.fileno()}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            pass_fds=[self._file.fileno()], env={**os.environ, "TSAN_OPTIONS": "history_size=0"},
        )  # fmt: skip
        self._base = int(self._process.stdout.readline() or self._crash())
        self._queue: list[bytes] = []
        self._calls: list[dict[tuple, PreparedCall]] = [{} for _ in range(world_size)]
        modules = bare(world_size) if modules is None else modules
        entries = entries_of(modules)
        clusters = {entry: spec.macro[1] if spec.macro[0] == "NORM_ENTRY" else 1 for spec in modules for entry in spec.entries}
        for rank, engine in enumerate(self.engines):
            address = {name: self._base + offset for name, offset in self._offsets[rank].items()}
            engine.layout = self.layout
            engine.memory = SimpleNamespace(addresses=[self._base + offsets["staging"] for offsets in self._offsets])
            channels = address["local"] + ctypes.sizeof(Control)
            engine.state = SimpleNamespace(channels=channels, control=address["local"], report=address["report"])
            engine._kernels = {entry: (self._queue, rank, number, clusters[entry]) for number, entry in enumerate(entries)}
        self.collectives = self.pushes = self.switches = 0
        self.steps = 0  # that the last run took

    def _make_engines(self, pdl: bool, max_ctas: int | None) -> list:
        names = algorithms(self.world_size)
        # Small messages already take different algorithms, and every algorithm has a region.
        tuned = tuple(Band(2048 << 2 * i, name, 32 << i) for i, name in enumerate(names[:-1]))
        tuned += (Band(NEVER, names[-1], MAX_BLOCK),)
        return [
            engine_module.NvlinkEngine(self._config(rank, pdl, max_ctas, tuned=dict.fromkeys(ITEMSIZE, tuned)))
            for rank in range(self.world_size)
        ]

    def _config(self, rank: int, pdl: bool, max_ctas: int | None, **more) -> SimpleNamespace:
        return SimpleNamespace(
            rank=rank, world_size=self.world_size, device=SimpleNamespace(index=0), arch="sm_90", nvlink=True,
            deterministic=True, settings=Settings(staging_mb=STAGING_MB, pdl=pdl, c_calls=False), max_ctas=max_ctas, **more,
        )  # fmt: skip

    def run(self, program: Program, seed: int, *, skip: Sequence[int] = (), complete: bool = True,
            instead: Mapping[int, Call] | None = None, told: Mapping[int, Mapping[str, int]] | None = None, **options) -> None:  # fmt: skip
        """All calls of ``program`` on every rank, enqueued at once; then, if it is to be ``complete``, check bits and slots.

        Args:
            program: the calls.
            seed: of the schedule.
            skip: ranks that make no call.
            complete: whether every call must succeed.
            instead: what single ranks call instead of each call, with its tensors.
            told: fields of ``abi.Args`` or ``NormArgs`` that single ranks' launches are given in place of what they should be.
            options: room (threads resident on a rank), jitter and sleep (chances that a thread loses its turn at an
                access, and that it sleeps long), patience (steps without progress that are a hang), tick (nanoseconds
                of a step, to kernels), pokes ((step, address, word): what the host writes meanwhile).

        Raises:
            Failed: whatever went wrong.
        """
        for rank, before in enumerate(program.before):
            self._parts[rank]["arena"][: program.end].copy_(before)
            if rank not in skip:
                first = len(self._queue)
                for call, *buffers in program.steps:
                    self._enqueue(rank, (instead or {}).get(rank, call), buffers)
                for i in range(first, len(self._queue)):
                    self._queue[i] = _with(self._queue[i], (told or {}).get(rank, {}))
        holes = [self._base + offsets["arena"] + hole for offsets in self._offsets for hole in program.holes]
        self._run(seed, holes=holes, **options)
        for name, border in self._borders:
            if (border != 0x5A).any():
                raise Failed("guard", f"somebody wrote behind a rank's {name}, or before what follows it")
        self.collectives += len(program.steps)
        if complete:
            self.check_reports()
            for rank in range(self.world_size):
                program.check(rank, self.arena(rank)[: program.end])
            self.check_slots()

    def _enqueue(self, rank: int, call: Call, buffers: Sequence[Buffer]) -> None:
        if not call.spec.numel:  # as Communicator does
            return
        plan, calls, spec = self.plan(call), self._calls[rank], call.spec
        if (spec, plan) not in calls:
            with contextlib.ExitStack() as stack:
                for module in (engine_module, norm_engine_module, host_engine_module):
                    stack.enter_context(mock.patch.object(module, "KernelLaunch", Recorder))
                calls[spec, plan] = self.engines[rank].prepare(spec, plan, shape_id=len(calls) % MAX_SHAPES)
        arena = self._base + self._offsets[rank]["arena"]
        calls[spec, plan].bind([arena + buffer.start for buffer in buffers], 0)

    def plan(self, call: Call) -> Plan:
        return call.plan(self)

    def _run(self, seed: int, *, room: int = 0, jitter: float = 0.05, sleep: float = 0.001, patience: int = 400_000,
             tick: int = 1, pokes: Sequence[tuple[int, int, int]] = (), holes: Sequence[int] = ()) -> None:  # fmt: skip
        slots = []
        for rank, offsets in enumerate(self._offsets):
            start, end = (self._base + offsets["staging"] + b for b in (HEADER_BYTES, self.layout.nbytes))
            slots.append(struct.pack("QQII", start, end, rank, HEADER_BYTES))
        reports = [struct.pack("Q", self._base + offsets["report"]) for offsets in self._offsets]
        chances = (int(jitter * 65536), int(sleep * 65536))
        counts = (len(self._queue), len(slots), len(pokes), len(reports), len(holes), PAGE)
        request = struct.pack("QQQ12I", seed, patience, tick, self.world_size, room or 64, *chances, *counts, self.POISONED, 0)
        request += b"".join([*self._queue, *slots, *(struct.pack("QQII", *p, 0) for p in pokes), *reports])
        request += struct.pack(f"{len(holes)}Q", *holes)
        self._queue.clear()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._crash()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else self._crash()
        if answer["status"] != "ok":
            raise Failed(answer["status"], answer["text"])
        if answer["reports"]:
            raise Failed("race", self._log())
        self.steps = answer["steps"]
        self.pushes += answer["pushes"]
        self.switches += answer["switches"]

    def check_slots(self) -> None:
        """Every slot is empty, where that is their end."""
        if not self.POISONED:
            return
        for rank, parts in enumerate(self._parts):
            slots = parts["staging"][HEADER_BYTES:]
            if slots.min() != 0xFF:
                full = (slots.view(torch.int32) != -1).nonzero()
                raise Failed("slots", f"rank {rank}: {len(full)} words left, the first at {int(full[0])}")

    def check_reports(self) -> None:
        """Nobody gave up, all calls are over, and each of their shapes is handshaken, no other."""
        for rank, parts in enumerate(self._parts):
            flags = list(self.control(rank).handshaken)
            if flags != [shape < len(self._calls[rank]) for shape in range(MAX_SHAPES)]:
                raise Failed("handshake", f"rank {rank}: {sum(flags)} of {len(self._calls[rank])} shapes: {flags}")
            if parts["report"].any() or parts["staging"][Header.abort.offset :][:4].any():
                raise Failed("report", f"rank {rank} gave up: {self.report(rank)}")
            if any((parts["local"][gap] != 0x5A).any() for gap in self._between):
                raise Failed("guard", f"rank {rank} wrote beside its channels")
            if len({int(parts["local"][count : count + 4].view(torch.int32)) for count in LocalState.COUNTS_AT}) > 1:
                raise Failed("in flight", f"rank {rank} thinks that calls are still in flight")

    def arena(self, rank: int) -> torch.Tensor:
        return self._parts[rank]["arena"]

    def report(self, rank: int) -> list[int]:
        return self._parts[rank]["report"].view(torch.int32).tolist()

    def report_bytes(self, rank: int) -> bytes:
        return bytes(self._parts[rank]["report"].numpy())

    def staging(self, rank: int) -> torch.Tensor:
        return self._parts[rank]["staging"]

    def control(self, rank: int) -> Control:
        """That rank's counts, flags and limits, as they are; what is assigned there counts."""
        return Control.from_buffer(self._parts[rank]["local"][: ctypes.sizeof(Control)].numpy())

    def channels(self, rank: int) -> torch.Tensor:
        """[channels, 2]: epoch, and whether it is stopped, of every channel and of the gaps between them."""
        return self._parts[rank]["local"][ctypes.sizeof(Control) :].view(torch.int32).view(-1, 2)

    def control_address(self, rank: int) -> int:
        """For pokes."""
        return self._base + self._offsets[rank]["local"]

    def set_deadlines(self, deadline: int, grace: int | None = None, ranks: Sequence[int] | None = None) -> None:
        """After how many nanoseconds of the driver a wait ends, which is a step unless a run says otherwise; 0 for never. ``grace``: before ranks met. ``ranks``: of
        these alone."""
        for parts in self._parts if ranks is None else [self._parts[rank] for rank in ranks]:
            words = parts["local"][Control.deadline_ns.offset :][:16].view(torch.int64)
            words.copy_(torch.tensor([deadline, deadline if grace is None else grace]))

    def abort_word(self, rank: int) -> int:
        """Address of the word that stops that rank's kernels, for pokes."""
        return self._base + self._offsets[rank]["staging"] + Header.abort.offset

    def _log(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")[:4000]

    def _crash(self):
        self._process.wait()
        raise Failed("crash", f"exit status {self._process.returncode}\n{self._log()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()
        self._file.close()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _with(launch: bytes, fields: Mapping[str, int]) -> bytes:
    """A launch of the queue with other arguments."""
    at = len(launch) - ARGS_BYTES
    args = NormArgs.from_buffer_copy(launch[at:])
    for name, value in fields.items():
        if name.startswith("staging_"):
            args.call.staging[int(name.removeprefix("staging_"))] = value
            continue
        of = args.call if hasattr(args.call, name) else args
        getattr(of, name)  # it exists
        setattr(of, name, value)
    return launch[:at] + bytes(args)


def cramped(layout: Layout, world_size: int, under: str = "two_shot_wide", warps: int = 2) -> Layout:
    """Room for two ``warps`` per launch, so that a few KB take many launches, and no byte between two algorithms.

    Of a stream's buffers, those that may alias other slots alias the last ones of the algorithm ``under``.
    """
    regions, offset = {}, HEADER_BYTES
    owners = [name for name in layout.regions if NVLINK_ALGORITHMS[name].shares_buffers_with not in layout.regions]
    for owner in sorted(owners, key=lambda name: (NVLINK_ALGORITHMS[name].stream, name == under)):
        algorithm = NVLINK_ALGORITHMS[owner]
        capacity = warps * WARP * algorithm.packets
        buffer = (world_size - 1) * PACKET * capacity
        offset -= algorithm.aliased_buffers * buffer
        for name, region in layout.regions.items():
            if owner in (name, NVLINK_ALGORITHMS[name].shares_buffers_with):
                others = algorithm.buffers - NVLINK_ALGORITHMS[name].buffers
                regions[name] = replace(region, offset=offset + others * buffer, capacity=capacity, channels=warps)
        offset += algorithm.buffers * buffer
    return replace(layout, regions={name: regions[name] for name in layout.regions})


def spread(layout: Layout) -> Layout:
    """With ``GAP`` channels behind those of every region that are nobody's."""
    firsts, total = {}, 0
    for region in layout.regions.values():
        if region.first_channel not in firsts:
            firsts[region.first_channel] = total
            total += region.channels + GAP
    regions = {name: replace(r, first_channel=firsts[r.first_channel]) for name, r in layout.regions.items()}
    return replace(layout, regions=regions, channels=total)


class Recorder:
    """In the place of ``driver.KernelLaunch``: puts a launch in the queue of the twin."""

    def __init__(self, kernel, arguments, grid: int, block: int, pdl: bool = False, cluster: int = 1):
        self._queue, rank, number, compiled = kernel
        (self._args,) = arguments
        assert cluster == compiled, "a launch is told of the clusters that its kernel has"
        self._shape = struct.pack("IIIIII", rank, number, grid, block, pdl, cluster)

    def __call__(self, stream: int) -> None:
        self._queue.append(self._shape + bytes(self._args).ljust(ARGS_BYTES, b"\0"))
