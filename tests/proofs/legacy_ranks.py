"""The legacy kernels in Triton's interpreter: one process a rank, staging in shared memory, every bit checked.

As a module: the scenario's types, the exact reference, and `Stage`, which has scenarios played in another process.
As a script: reads a scenario a line from standard input and prints its `Outcome`, both as JSON.

The interpreter wants one process a rank (its state is global) and TRITON_INTERPRET set before Triton is imported,
hence the other process, which imports everything once and forks. The interpreter's one defect that matters here,
bf16 casts that truncate, is repaired on the way in.
"""

import dataclasses
import importlib.util
import itertools
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from allreduce_jit import abi
from allreduce_jit.engine.failure import SIGNATURES, SIGNATURES_AT, Kind, abort_code, tag
from allreduce_jit.policy.plan import HEADER_BYTES

KERNELS = {"one_shot": "legacy_one_shot", "two_shot": "legacy_two_shot"}
WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
CANARY = 0xA5
EDGE = 64  # bytes of canary on either side of every tensor
AGAIN = 2 * 2 * abi.POLLS  # words looked at for signatures up to the second look at the clock
LOOK = 1_000_000  # ns: what the kernels take a look for, as the interpreter has no clock
# int32 words of Control, and its deadlines as int64.
SEQUENCE, IN_FLIGHT, HANDSHAKEN = (at.offset // 4 for at in (abi.Control.sequence, abi.Control.completed, abi.Control.handshaken))
MINE = abi.Report.mine.offset // 4
DEADLINES = slice(abi.Control.deadline_ns.offset // 8, abi.Control.grace_ns.offset // 8 + 1)


def source() -> Path:
    """The folder of the kernels' sources."""
    return Path(importlib.util.find_spec("allreduce_jit.triton_kernels").origin).parent


@dataclass
class Call:
    """One all-reduce. `data`: normal, specials or bits; `offset`: elements by which the tensors miss alignment; `others`: elements of the
    same call that other launches reduce."""

    algorithm: str
    dtype: str
    numel: int
    data: str = "normal"
    in_place: bool = False
    offset: int = 0
    others: int = 0


@dataclass
class Scenario:
    """The calls of one communicator and what befalls its ranks.

    Attributes:
        jitter: how likely a rank pauses at a store or a look; stores are then torn into two random halves as well.
        slow: a rank that dawdles before it looks at what has arrived.
        absent: a rank that takes no part.
        dies: a rank that ends after its first push of data.
        leaves: a rank that takes part in the first call alone.
        late: a rank that comes to its first call when the others have looked for it so many times, `looked`, and whose first data
            comes so many polls after the handshake, `behind`.
        just: a rank that comes to its first call when the others' second look at the clock lies behind them, and before they look for it
            again.
        hesitates: a rank whose first data comes when the others' second look at the clock, while they wait for data, lies behind them, and
            before they look for it again.
        aborted: a rank whose host has set its abort word beforehand.
        stopped: a rank whose host sets its abort word when it first looks for data. It finds none before it has seen
            that word, and all of it from then on.
        busy: a rank with a call in flight that never ends.
        halved: a rank, and which half of its signatures comes last: when its peers have looked for it.
        differs: a rank and in what its calls differ, e.g. [1, {"numel": 5}].
        deadline: looks after which a wait gives up; 0: it does not.
        grace: the same until a shape of call is handshaken; None: no other than the deadline.
        hasty: the one rank for which both hold; all others wait for ever.
    """

    world: int
    calls: list[Call]
    seed: int = 0
    jitter: float = 0.0
    slow: int | None = None
    absent: int | None = None
    dies: int | None = None
    leaves: int | None = None
    late: int | None = None
    looked: int = 400
    behind: int = 70
    just: int | None = None
    hesitates: int | None = None
    aborted: int | None = None
    stopped: int | None = None
    busy: int | None = None
    halved: list[int] | None = None
    differs: list | None = None
    deadline: int = 20_000
    grace: int | None = None
    hasty: int | None = None
    block_bytes: int = 256
    source: str = field(default_factory=lambda: str(source()))


@dataclass
class Outcome:
    """`wrong`: everything that differs from the contract, in words. The rest: per rank, as the host would see it, reports when it finds
    their code."""

    wrong: list[str]
    reports: list[list[int]]  # words of an abi.Report
    aborted: list[int]  # abort words
    signatures: list[str]  # of the headers, in hex
    all_nan: list[bool]  # every output element of the rank's last call is NaN
    pushed: list[int]  # bytes in the rank's staging that are not poison


class Stage:
    """The process that plays scenarios. After a hang it is replaced. ``errors``: where its ranks' tracebacks go, as of ``subprocess``."""

    def __init__(self, errors: int | None = None):
        self.process, self.errors = None, errors

    def run(self, scenario: Scenario, timeout: float = 300) -> Outcome:
        """Plays a scenario. Raises TimeoutError if it hangs, AssertionError if a rank raises."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                start_new_session=True,
                env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            )
            assert self.process.stdout.readline() == b"ready\n"
        self.process.stdin.write(json.dumps(dataclasses.asdict(scenario)).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.close()
            raise TimeoutError(f"no outcome after {timeout} s of {scenario}")
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return Outcome(**answer)

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: itself and its ranks
            self.process.communicate()
            self.process = None


# The exact reference, on bit patterns.


def widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 to dtype, to nearest even."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)


def reference(addends: list[np.ndarray], dtype: str) -> np.ndarray:
    """fp32 sum in rank order, begun with rank 0, rounded once."""
    total = widen(addends[0], dtype)
    for addend in addends[1:]:
        total = total + widen(addend, dtype)
    return narrow(total, dtype)


def make_data(kind: str, dtype: str, numel: int, rng: np.random.Generator) -> np.ndarray:
    word = np.dtype(WORDS[dtype])
    if kind == "normal":
        spread = rng.standard_normal(numel) * 2.0 ** rng.integers(-6, 7, numel)
        return narrow(spread.astype(np.float32), dtype)
    anything = rng.integers(0, 2 ** (8 * word.itemsize), numel, dtype=np.uint64).astype(word)
    if kind == "bits":
        return anything
    sign, ones = 1 << (8 * word.itemsize - 1), (1 << (8 * word.itemsize)) - 1
    infinity = int(narrow(np.array([np.inf], np.float32), dtype)[0])
    positive = [0, 1, 2, (infinity & -infinity) - 1, infinity & -infinity, infinity - 1, infinity, infinity + 1]
    specials = [p | s for p in positive for s in (0, sign)] + [ones, ones - 1, ones & ~sign] + 4 * [sign, 0]
    return rng.choice(np.array(specials, word), numel)


class Trespass(Exception):
    """An access outside of what a rank may touch."""


TRESPASSED = 3  # how such a rank ends


# The communicator, as a host would build it, in memory that all ranks share at one address.


class Memory:
    def __init__(self, nbytes: int):
        self.all = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        self.used = 0

    def take(self, nbytes: int, fill: int) -> np.ndarray:
        start, self.used = self.used, (self.used + nbytes + 255) & ~255
        assert self.used <= self.all.size, "the arena is too small for this scenario"
        self.all[start : start + nbytes] = fill
        return self.all[start : start + nbytes]


class Communicator:
    """Memory of all ranks: staging, epochs, control, reports and every call's tensors."""

    def __init__(self, scenario: Scenario):
        self.scenario, world = scenario, scenario.world
        self.memory = Memory(256 << 20)
        bytes_of = [call.numel * np.dtype(WORDS[call.dtype]).itemsize for call in scenario.calls]
        self.capacity = (max(bytes_of, default=1) // scenario.block_bytes + 1) * scenario.block_bytes
        channels = self.capacity // scenario.block_bytes
        one_shot, two_shot = 2 * world * self.capacity, 4 * world * self.capacity
        self.slots = {"one_shot": HEADER_BYTES, "two_shot": HEADER_BYTES + one_shot}
        self.staging = [self.take(HEADER_BYTES + one_shot + two_shot, 0xFF) for _ in range(world)]
        self.header = [staging[:HEADER_BYTES].view(np.int32) for staging in self.staging]
        self.table = self.take(8 * world, 0)
        self.table.view(np.int64)[:] = [address(staging) for staging in self.staging]
        self.epoch = {a: [self.take(4 * channels, 0) for _ in range(world)] for a in self.slots}
        self.shapes = sorted({(call.algorithm, call.dtype, call.numel) for call in scenario.calls})
        self.control = [self.take(4 * (HANDSHAKEN + len(self.shapes)), 0).view(np.int32) for _ in range(world)]
        self.report = [self.take(64, 0).view(np.int32) for _ in range(world)]
        grace = scenario.deadline if scenario.grace is None else scenario.grace
        for rank in range(world):
            self.header[rank][:] = 0
            if scenario.hasty in (None, rank):
                self.control[rank][:6].view(np.int64)[DEADLINES] = scenario.deadline * LOOK, grace * LOOK
        self.told = [self.take(64, 0).view(np.int32) for _ in range(world)]  # the report as it is when its code is stored
        self.looks = [self.take(24, 0).view(np.int64) for _ in range(world)]  # for signatures, for data; and pushes of data
        if scenario.aborted is not None:
            self.abort(scenario.aborted)
        if scenario.busy is not None:
            self.control[scenario.busy][IN_FLIGHT] = 1
        rng = np.random.default_rng(scenario.seed)
        self.inputs, self.x, self.out = [], [], []
        for call in scenario.calls:
            inputs = [make_data(call.data, call.dtype, call.numel, rng) for _ in range(world)]
            x = [self.tensor(call, bits) for bits in inputs]
            self.inputs.append(inputs)
            self.x.append(x)
            self.out.append([x[rank] if self.of(call, rank).in_place else self.tensor(call, None) for rank in range(world)])

    def take(self, nbytes: int, fill: int) -> np.ndarray:
        return self.memory.take(nbytes, fill)

    def abort(self, rank: int) -> None:
        """What the host of a rank does, but for telling the others."""
        self.header[rank][0] = abort_code(Kind.ABORTED, rank, rank)

    def tensor(self, call: Call, bits: np.ndarray | None) -> np.ndarray:
        word = np.dtype(WORDS[call.dtype])
        first = EDGE + call.offset * word.itemsize
        whole = self.take(first + call.numel * word.itemsize + EDGE, CANARY)
        tensor = whole[first : len(whole) - EDGE].view(word)
        if bits is not None:
            tensor[:] = bits
        return tensor

    def own(self, rank: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What the kernels of a rank may touch: one word at a time, or as signatures; and by blocks of data."""
        local = [self.table, self.control[rank], self.report[rank], *(epoch[rank] for epoch in self.epoch.values())]
        slots = [staging[HEADER_BYTES:] for staging in self.staging]
        return [*local, *self.header], [*slots, *(tensors[rank] for tensors in (*self.x, *self.out))]

    def altered(self) -> list[int]:
        """Ranks whose report changed after its code was there. Both calls belong to it if the rank found a mismatch itself: the guard
        of one that was told of it may write them later."""
        found = []
        for rank, (told, report) in enumerate(zip(self.told, self.report)):
            own = told[0] & 0xFF == Kind.MISMATCH and told[0] >> abi.FINDER_SHIFT == rank
            last = len(report) if own else MINE
            if told[0] and not np.array_equal(told[:last], report[:last]):
                found.append(rank)
        return found

    def of(self, call: Call, rank: int) -> Call:
        """The call as this rank makes it."""
        who, how = self.scenario.differs or (None, {})
        return dataclasses.replace(call, **how) if rank == who else call

    def play(self, rank: int, module, tl) -> None:
        if rank == self.scenario.late:
            self.until(rank, lambda peer: self.looks[peer][0] >= 2 * self.scenario.looked)  # two words a look
        if rank == self.scenario.just:
            self.until(rank, lambda peer: self.looks[peer][0] > AGAIN)
        for number, (call, x, out) in enumerate(zip(self.scenario.calls, self.x, self.out)):
            if number == 1 and rank == self.scenario.leaves:
                break
            shape_id = self.shapes.index((call.algorithm, call.dtype, call.numel))
            call = self.of(call, rank)
            self.launch(rank, call, x[rank][: call.numel], out[rank][: call.numel], shape_id, module, tl)

    def launch(self, rank: int, call: Call, x: np.ndarray, out: np.ndarray, shape_id: int, module, tl) -> None:
        world, block = self.scenario.world, self.scenario.block_bytes // x.itemsize
        part = -(-call.numel // (world * block)) * block
        arguments = dict(
            table=address(self.table),
            staging=address(self.staging[rank]),
            x=address(x),
            out=address(out),
            epoch=address(self.epoch[call.algorithm][rank]),
            control=address(self.control[rank]),
            report=address(self.report[rank]),
            numel=call.numel,
            total=call.numel + call.others,
            slots=self.slots[call.algorithm],
            capacity=self.capacity,
            rank=rank,
            tag=tag(KERNELS[call.algorithm], call.dtype),
            shape_id=shape_id,
        )
        grid = 1 + -(-call.numel // block)
        if call.algorithm == "two_shot":
            arguments["part"], grid = part, 1 + part // block
        aligned = not (address(x) | address(out) | call.numel * x.itemsize) % 16
        kernel = getattr(module, KERNELS[call.algorithm])
        constants = dict(WORLD=world, DTYPE=getattr(tl, call.dtype), BLOCK=block, VECTOR=aligned, INTERPRET=True)
        assert list(module.signature(kernel.__name__)) == list(arguments | constants)

        def programs(first: int, count: int) -> None:
            self.first, self.grid = first, grid
            kernel[(count,)](**arguments, **constants)

        # On a GPU the guard runs beside the others, here one program after the other, but for a fork. That takes its
        # time, so only where it matters who overtakes whom.
        scenario = self.scenario
        if not scenario.jitter and scenario.slow is None and scenario.late is None:
            return programs(0, grid)
        guard = fork(lambda: programs(0, 1))
        programs(1, grid - 1)
        end = os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
        if end == TRESPASSED:
            raise Trespass("the guard")
        assert end == 0, "the guard raised"

    def until(self, rank: int, condition) -> None:
        """Waits for a condition on every peer, or for the end of this rank."""
        peers = [peer for peer in range(self.scenario.world) if peer != rank]
        while not all(map(condition, peers)) and not self.header[rank][0]:
            time.sleep(1e-3)

    def until_looked(self, rank: int, which: int, times: int) -> None:
        """Waits until every peer has looked so often since, at signatures (``which`` = 0; two words a look) or data (1)."""
        before = [looks[which] for looks in self.looks]
        self.until(rank, lambda peer: self.looks[peer][which] >= before[peer] + times)

    def outcome(self) -> Outcome:
        scenario = self.scenario
        wrong = []
        for number, (call, inputs, outs) in enumerate(zip(scenario.calls, self.inputs, self.out)):
            want = reference(inputs, call.dtype)
            for rank, out in enumerate(outs):
                differ = count_different(out, want, call.dtype)
                if differ:
                    wrong.append(f"call {number} {call}: {differ} of {call.numel} elements wrong on rank {rank}")
                if not np.array_equal(out, outs[0]):
                    wrong.append(f"call {number} {call}: ranks 0 and {rank} differ")
        for rank in range(scenario.world):
            if self.left(rank):
                wrong.append(f"{self.left(rank)} bytes of the staging of rank {rank} are not poisoned")
            if self.header[rank][0]:
                wrong.append(f"rank {rank} was stopped: report {self.report[rank][:10]}")
            if self.control[rank][SEQUENCE] != len(scenario.calls) or self.control[rank][IN_FLIGHT]:
                wrong.append(f"rank {rank} counts its calls wrong: {self.control[rank][:2]}")
            if not self.control[rank][HANDSHAKEN:].all():
                wrong.append(f"rank {rank} does not know of all shapes that they are handshaken")
        wrong += self.overruns()
        last, dtype = self.out[-1], scenario.calls[-1].dtype
        return Outcome(
            wrong=wrong,
            reports=[told[:10].tolist() for told in self.told],
            aborted=[int(header[0]) for header in self.header],
            signatures=[header.tobytes()[SIGNATURES_AT : SIGNATURES_AT + SIGNATURES].hex() for header in self.header],
            all_nan=[bool(np.isnan(widen(out, dtype)).all()) for out in last],
            pushed=[self.left(rank) for rank in range(scenario.world)],
        )

    def left(self, rank: int) -> int:
        """Bytes in the slots of a rank that are not poison."""
        return int(np.count_nonzero(self.staging[rank][HEADER_BYTES:] != 0xFF))

    def overruns(self) -> list[str]:
        """Tensors that were written beyond their ends."""
        found = []
        for number, tensors in enumerate(self.out):
            for rank, tensor in enumerate(tensors):
                start = address(tensor) - address(self.memory.all)
                edges = self.memory.all[start - EDGE : start], self.memory.all[start + tensor.nbytes :][:EDGE]
                if any((edge != CANARY).any() for edge in edges):
                    found.append(f"call {number} wrote past the end of out on rank {rank}")
        return found


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def count_different(out: np.ndarray, want: np.ndarray, dtype: str) -> int:
    """Elements that differ in bits; a NaN may be any NaN but the sentinel."""
    nan = np.isnan(widen(want, dtype))
    is_nan = np.isnan(widen(out, dtype)) & (out != np.iinfo(out.dtype).max)
    return int(np.count_nonzero(np.where(nan, ~is_nan, out != want)))


# What the interpreter's memory accesses are put through.


def repair_bf16(interpreter) -> None:
    def convert(data, from_type, to_type, _rounding):
        names = {"bf16": "bfloat16", "fp32": "float32"}
        if to_type.name == "fp32":
            return widen(data.astype(np.uint16), names[from_type.name]).view(np.uint32)
        return narrow(np.ascontiguousarray(data), names[to_type.name])

    interpreter._convert_float = convert


def repair_masks(interpreter, boolean) -> None:
    """Comparing scalars gives int32 in the interpreter, which newer versions refuse as a mask. Last, so that all see bool."""
    builder = interpreter.InterpreterBuilder
    whole_load, whole_store = builder.create_masked_load, builder.create_masked_store

    def repaired(mask):
        return interpreter.TensorHandle(mask.data.astype(bool), boolean)

    def load(self, pointers, mask, *rest):
        return whole_load(self, pointers, repaired(mask), *rest)

    def store(self, pointers, value, mask, *rest):
        return whole_store(self, pointers, value, repaired(mask), *rest)

    builder.create_masked_load, builder.create_masked_store = load, store


def patch_once(interpreter) -> None:
    """The interpreter patches triton.language again at every call of a helper, to no effect but time."""
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def watch(interpreter, tl, communicator: Communicator, rank: int) -> None:
    """An access outside of what a rank may touch raises ``Trespass``; the report is kept as it is when its code is stored."""
    builder = interpreter.InterpreterBuilder
    words, blocks = (
        tuple(map(np.array, zip(*sorted((address(array), address(array) + array.nbytes) for array in arrays))))
        for arrays in communicator.own(rank)
    )
    report, told = communicator.report[rank], communicator.told[rank]
    whole_load, whole_store = builder.create_masked_load, builder.create_masked_store
    whole_cas, whole_rmw = builder.create_atomic_cas, builder.create_atomic_rmw

    def check(pointers, mask=True):
        starts, ends = blocks if pointers.data.size > 1 and pointers.get_element_ty() != tl.int64 else words
        first = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.searchsorted(starts, first, side="right") - 1
        if (at < 0).any() or (first + width > ends[at]).any():
            raise Trespass(f"rank {rank}: {first - address(communicator.memory.all)} of {width} bytes")

    def load(self, pointers, mask, *rest):
        check(pointers, mask.data)
        return whole_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask.data)
        done = whole_store(self, pointers, value, mask, *rest)
        if pointers.data.size == 1 and int(pointers.data.item()) == address(report) and not told[0]:
            told[:] = report
        return done

    def cas(self, pointer, *rest):
        check(pointer)
        return whole_cas(self, pointer, *rest)

    def rmw(self, operation, pointer, *rest):
        check(pointer)
        return whole_rmw(self, operation, pointer, *rest)

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_cas, builder.create_atomic_rmw = cas, rmw


def disturb(interpreter, tl, communicator: Communicator, rank: int, check_every: int) -> None:
    """Pauses, torn stores, slowness and death at the points where ranks meet: block stores and volatile looks."""
    scenario, builder = communicator.scenario, interpreter.InterpreterBuilder
    rng = random.Random(f"{scenario.seed} {rank}")
    looks, pushes, held = itertools.count(), itertools.count(), []
    halved, last = scenario.halved or (None, None)
    whole_load, whole_store = builder.create_masked_load, builder.create_masked_store

    def pause():
        if rng.random() < scenario.jitter:
            time.sleep(rng.random() * 2e-3)

    # How the cache policy is passed depends on Triton's version; volatile comes last in all of them.
    def load(self, pointers, mask, other, *policy):
        if policy[-1] and pointers.data.size > 1:
            for_data = pointers.get_element_ty() != tl.int64  # rather than for signatures
            communicator.looks[rank][int(for_data)] += not for_data or not mask.data.any()  # own block: once a round
            if scenario.just not in (None, rank) and communicator.looks[rank][0] == AGAIN + 1:
                while not communicator.control[scenario.just][SEQUENCE]:  # which is counted when it has signed
                    time.sleep(1e-3)
            if for_data and scenario.hesitates not in (None, rank) and communicator.looks[rank][1] == 2 * check_every + 1:
                while not communicator.looks[scenario.hesitates][2]:
                    time.sleep(1e-3)
            if for_data and rank == scenario.dies:
                os._exit(0)
            if for_data and rank == scenario.stopped:
                communicator.abort(rank)
                return midway(lambda: whole_load(self, pointers, mask, other, *policy), mask)
            # Long enough for others to begin their next call; not for ever, as a hang need not be slow.
            dawdles = rank == scenario.slow and next(looks) < (30 if for_data else 8)
            time.sleep(
                (80e-3 if for_data else 0.3) if dawdles else 2e-4
            )  # in any case, as ranks share few cores, let the others get on
            pause()
        return whole_load(self, pointers, mask, other, *policy)

    def midway(look, mask):
        """What the rank that is stopped midway finds: see ``Scenario.stopped``."""
        found = look()
        if not mask.data.any():  # its own block
            return found
        if next(looks) < check_every:
            found.data = np.where(mask.data, -1, found.data)
            return found
        while (found.data[mask.data] == -1).any() and not any(report[0] for report in communicator.report):
            time.sleep(1e-3)
            found = look()
        return found

    def sign(*half):
        """Stores the half that comes last when every peer has looked for both."""
        held.append(half)
        if len(held) == 2:
            early, late = held if last else reversed(held)
            held.clear()
            whole_store(*early)
            communicator.until_looked(rank, 0, 4)
            whole_store(*late)

    def store(self, pointers, value, mask, *policy):
        if rank == halved and pointers.data.size > 1 and pointers.get_element_ty() == tl.int64:
            return sign(self, pointers, value, mask, *policy)
        of_data = pointers.data.size > 1 and pointers.get_element_ty() != tl.int64
        if rank == scenario.late and of_data and not next(pushes):
            communicator.until(rank, lambda peer: communicator.control[peer][HANDSHAKEN])
            communicator.until_looked(rank, 1, scenario.behind)
        if rank == scenario.hesitates and of_data and not communicator.looks[rank][2]:
            communicator.until(rank, lambda peer: communicator.looks[peer][1] > 2 * check_every)
            whole_store(self, pointers, value, mask, *policy)
            communicator.looks[rank][2] = 1
            return None
        if not scenario.jitter or pointers.data.size == 1:
            return whole_store(self, pointers, value, mask, *policy)
        half = np.random.default_rng(rng.getrandbits(32)).random(pointers.data.shape) < 0.5
        for piece in (half, ~half):
            pause()
            torn = interpreter.TensorHandle(mask.data & piece, mask.dtype)
            whole_store(self, pointers, value, torn, *policy)

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_get_program_id = lambda self, axis: number(self.grid_idx[axis] + (communicator.first if axis == 0 else 0))
    builder.create_get_num_programs = lambda self, axis: number(communicator.grid if axis == 0 else 1)

    def number(value: int):
        return interpreter.TensorHandle(np.array([value], np.int32), tl.int32)


def play(scenario: Scenario, interpreter, tl) -> Outcome:
    folder = scenario.source
    spec = importlib.util.spec_from_file_location(
        "kernels_under_test", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    module = importlib.import_module("kernels_under_test.p2p")
    check_every = importlib.import_module("kernels_under_test.wait").CHECK_EVERY.value
    communicator = Communicator(scenario)

    def live(rank: int) -> None:
        watch(interpreter, tl, communicator, rank)
        disturb(interpreter, tl, communicator, rank, check_every)
        repair_masks(interpreter, tl.int1)
        communicator.play(rank, module, tl)

    ranks = [fork(lambda: live(rank)) for rank in range(scenario.world) if rank != scenario.absent]
    ends = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert not any(end < 0 for end in ends), f"ranks crashed: {ends}"
    assert TRESPASSED not in ends, f"ranks touched what is not theirs: {ends}"
    assert not any(ends), f"{sum(map(bool, ends))} ranks raised"
    assert not communicator.altered(), f"reports of ranks {communicator.altered()} changed after their code was stored"
    return communicator.outcome()


def fork(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            traceback.print_exc()
            os._exit(TRESPASSED if any(isinstance(one, Trespass) for one in causes(error)) else 1)
    return child


def causes(error: BaseException | None):
    """An exception and what led to it: the interpreter wraps those of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def main() -> None:
    import torch  # noqa: F401 - the interpreter imports it at the first launch, once here rather than in every rank
    import triton.language as tl
    from triton.runtime import interpreter

    np.seterr(all="ignore")
    repair_bf16(interpreter)
    patch_once(interpreter)
    print("ready", flush=True)

    def answer(scenario):
        try:
            print(json.dumps(dataclasses.asdict(play(scenario, interpreter, tl))))
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}))

    for line in sys.stdin:
        spec = json.loads(line)
        spec["calls"] = [Call(**call) for call in spec["calls"]]
        # A process of its own for each, so that nothing of it, its memory above all, outlasts the scenario.
        os.waitpid(fork(lambda: answer(Scenario(**spec))), 0)


if __name__ == "__main__":
    main()
