"""Push all-reduce over any memory that peers can store to: the legacy path.

Nothing is asked of the link but that stores of one element (2 or 4 bytes; 8 for signatures) arrive whole: no remote
atomics, no remote loads, no order between stores. So the data must prove its own arrival. Staging memory is poisoned
with 0xFF bytes; an element has arrived once it differs from the all-ones *sentinel*. That pattern is a NaN: a payload
that has it travels as its neighbour ...FE, a NaN too. The receiver poisons what it has read for the next use.

Channels and parities. Program p + 1 of a launch is channel p: it has an epoch word and bytes
[p * BLOCK_BYTES, +BLOCK_BYTES) of every slot to itself, whatever the dtype. Each launch uses the slots of one parity
and flips it. A slot is refilled two epochs later, which is safe because in every phase every program sends a full
block to every peer (zeros past the end, and for empty parts too) and waits for a full block from every peer:
 - a program in epoch e+2 has, in epoch e+1, received from q's program of epoch e+1;
 - that ran after q's launch of epoch e was complete, its poisoning included;
 - so the slots that q read in epoch e are poisoned, and nobody still reads them.
This needs the boundary between launches: one stream, and *no* programmatic dependent launch. Program p waits for
the peers' programs p alone. A grid may be larger than what fits on the GPU at once, as blocks start in the order of
their index (an assumption: docs/protocol.md).

Program 0 is the launch's guard (what for: kernels/cuda/guard.cuh). The header, the control block and the report are
those of allreduce_jit/abi.py. Every launch of a call signs for itself, with the number of elements of the
whole call. It takes no longer than the programs beside it, so it costs no latency.

Failure. A wait ends when its deadline passes or this rank's header holds an abort code, from a peer, from the host or
from another program. Then this rank broadcasts an abort code. Its programs run on to the end but push no more, nor do
those of any later launch: a rank that no longer waits could overtake its peers, and they would read two epochs mixed.
What such a program writes to `out` is NaN throughout.

Numbers. fp32 sum in rank order 0..WORLD-1, begun with rank 0's value (so -0 + -0 = -0), rounded once. The local
contribution is added in rank order, too, in its encoded form, so all ranks add the same bits.

Addresses are plain int64 values. Slots, `capacity` and `part` in bytes are multiples of 16.
"""

import triton
import triton.language as tl

from .guard import IN_FLIGHT, guard
from .slots import encode, peers_of, push, read, word_at, write
from .wait import receive, stopped

MAX_REGISTERS = 168  # compile option `maxnreg`: left to itself ptxas spills a register or two in a few variants

_ARGUMENTS = {
    "table": "i64",
    "staging": "i64",
    "x": "i64",
    "out": "i64",
    "epoch": "i64",
    "control": "i64",
    "report": "i64",
    "numel": "i64",
    "total": "i64",
    "slots": "i64",
    "capacity": "i64",
    "rank": "i32",
    "tag": "i32",
    "shape_id": "i32",
}
_CONSTANTS = ("WORLD", "DTYPE", "BLOCK", "VECTOR", "INTERPRET")


def signature(kernel_name: str) -> dict[str, str]:
    """Argument types of a kernel in order, as ``triton.compiler.ASTSource`` wants them.

    Args:
        kernel_name: ``"legacy_one_shot"`` or ``"legacy_two_shot"``.
    """
    part = {"legacy_one_shot": {}, "legacy_two_shot": {"part": "i64"}}[kernel_name]
    return _ARGUMENTS | part | dict.fromkeys(_CONSTANTS, "constexpr")


@triton.jit
def legacy_one_shot(
    table,  # address of int64[WORLD]: each rank's staging memory as mapped in this process
    staging,  # this rank's: known without a load, on which the first push would wait
    x,  # address of the input
    out,  # address of the output; may equal x
    epoch,  # address of int32[grid - 1]: the parity of each channel, local, zero at first
    control,  # address of Control, local
    report,  # address of Report, host memory
    numel,  # elements of x and out
    total,  # elements of the call that this launch is part of
    slots,  # offset of this algorithm's slots in the staging memory
    capacity,  # bytes of one slot, at least (grid - 1) * BLOCK_BYTES
    rank,
    tag,  # dtype and algorithm, for the signature
    shape_id,  # which flag of Control.handshaken belongs to calls of this shape
    WORLD: tl.constexpr,  # ranks, 2 to 8
    DTYPE: tl.constexpr,  # tl.float32, tl.float16 or tl.bfloat16
    BLOCK: tl.constexpr,  # elements in BLOCK_BYTES
    VECTOR: tl.constexpr,  # x and out are 16-byte aligned and numel * itemsize is a multiple of 16
    INTERPRET: tl.constexpr,  # run by Triton's interpreter: no clock, a poll takes a millisecond
):
    """out = sum of all ranks' x. Every rank sends all of its x to every peer.

    Launch: grid = 1 + ceil(numel / BLOCK), the same numel, DTYPE and order of launches on all ranks.
    Staging: slot (parity, source) at byte slots + (parity * WORLD + source) * capacity.
    """
    link = (table, staging, control, report, rank, tag, shape_id)
    if tl.program_id(0) == 0:
        guard(link, total, x == out, WORLD, INTERPRET)
    else:
        WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        channel = tl.program_id(0).to(tl.int64) - 1
        parity = tl.load(word_at(epoch, channel, tl.int32))
        stop = stopped(staging)

        peers = peers_of(table, rank, WORLD)
        mine = read(x, channel, numel, WORD, BLOCK, VECTOR)
        for step in tl.static_range(1, WORLD):
            push(peers[step - 1] + slots, parity * WORLD + rank, capacity, channel, mine, stop, WORD, BLOCK)
        blocks, stop = receive(link, slots, parity, capacity, channel, mine, stop, WORLD, WORD, BLOCK, INTERPRET)
        write(out, channel, numel, _sum(blocks, WORLD, DTYPE, WORD), stop, WORD, BLOCK, VECTOR)
        _leave(epoch, control, channel, parity)


@triton.jit
def legacy_two_shot(
    table,
    staging,
    x,
    out,
    epoch,
    control,
    report,
    numel,
    total,
    slots,
    capacity,  # bytes of one slot, at least part * itemsize
    rank,
    tag,
    shape_id,
    part,  # elements of one rank's part: ceil(numel / WORLD) rounded up to BLOCK
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = sum of all ranks' x: reduce-scatter, then all-gather. Arguments as in legacy_one_shot.

    Rank k sums elements [k * part, (k + 1) * part) of those that exist; channel p does block p of every part.
    Launch: grid = 1 + part / BLOCK, the same numel, DTYPE and order of launches on all ranks.
    Staging: slot (buffer, source) at byte slots + (buffer * WORLD + source) * capacity; buffers 0 and 1 are those of
    scatter, by parity, 2 and 3 those of gather.
    """
    link = (table, staging, control, report, rank, tag, shape_id)
    if tl.program_id(0) == 0:
        guard(link, total, x == out, WORLD, INTERPRET)
    else:
        WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        channel = tl.program_id(0).to(tl.int64) - 1
        parity = tl.load(word_at(epoch, channel, tl.int32))
        stop = stopped(staging)
        gather = 2 + parity
        stride = part // BLOCK  # blocks from one part to the next

        peers = peers_of(table, rank, WORLD)
        parts = ()
        for step in tl.static_range(WORLD):
            parts = parts + (read(x, (rank + step) % WORLD * stride + channel, numel, WORD, BLOCK, VECTOR),)
        for step in tl.static_range(1, WORLD):
            push(peers[step - 1] + slots, parity * WORLD + rank, capacity, channel, parts[step], stop, WORD, BLOCK)
        addends, stop = receive(link, slots, parity, capacity, channel, parts[0], stop, WORLD, WORD, BLOCK, INTERPRET)

        reduced = _sum(addends, WORLD, DTYPE, WORD)
        for step in tl.static_range(1, WORLD):
            push(peers[step - 1] + slots, gather * WORLD + rank, capacity, channel, reduced, stop, WORD, BLOCK)
        blocks, stop = receive(link, slots, gather, capacity, channel, reduced, stop, WORLD, WORD, BLOCK, INTERPRET)
        for source in tl.static_range(WORLD):
            write(out, source * stride + channel, numel, blocks[source], stop, WORD, BLOCK, VECTOR)
        _leave(epoch, control, channel, parity)


@triton.jit
def _sum(blocks, WORLD: tl.constexpr, DTYPE: tl.constexpr, WORD: tl.constexpr):
    """fp32 sum in rank order, rounded once, as it travels."""
    total = blocks[0].to(DTYPE, bitcast=True).to(tl.float32)
    for source in tl.static_range(1, WORLD):
        total += blocks[source].to(DTYPE, bitcast=True).to(tl.float32)
    return encode(total.to(DTYPE).to(WORD, bitcast=True))


@triton.jit
def _leave(epoch, control, channel, parity):
    """The end of every channel; the last one counts the launch as complete."""
    tl.store(word_at(epoch, channel, tl.int32), parity ^ 1)
    if channel + 2 == tl.num_programs(0):
        tl.atomic_add(word_at(control, IN_FLIGHT, tl.int32), -1, sem="relaxed")
