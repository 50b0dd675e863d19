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

import ctypes

import triton
import triton.language as tl
from allreduce_jit import abi
from allreduce_jit.policy.p2p import NUM_WARPS

MAX_REGISTERS = 168  # compile option `maxnreg`: left to itself ptxas spills a register or two in a few variants

_THREADS = tl.constexpr(32 * NUM_WARPS)
_CHECK_EVERY = tl.constexpr(abi.POLLS)  # polls of the staging memory between two checks of the clock and the abort code
_SIGNATURES = tl.constexpr(abi.Header.signatures.offset)
_RANKS, _SIGNATURE = tl.constexpr(abi.MAX_RANKS), tl.constexpr(ctypes.sizeof(abi.Signature))
_IN_PLACE, _NUMEL_SHIFT = tl.constexpr(abi.IN_PLACE), tl.constexpr(abi.NUMEL_SHIFT)
_CULPRIT_SHIFT, _FINDER_SHIFT = tl.constexpr(abi.CULPRIT_SHIFT), tl.constexpr(abi.FINDER_SHIFT)
_TIMEOUT, _MISMATCH = tl.constexpr(int(abi.Kind.TIMEOUT)), tl.constexpr(int(abi.Kind.MISMATCH))
_CONCURRENT = tl.constexpr(int(abi.Kind.CONCURRENT))

# int32 words of Control, its deadlines as int64, and int32 words of Report.
_SEQUENCE, _IN_FLIGHT = tl.constexpr(abi.Control.sequence.offset // 4), tl.constexpr(abi.Control.completed.offset // 4)
_REPORTED, _HANDSHAKEN = tl.constexpr(abi.Control.reported.offset // 4), tl.constexpr(abi.Control.handshaken.offset // 4)
_DEADLINE, _GRACE = tl.constexpr(abi.Control.deadline_ns.offset // 8), tl.constexpr(abi.Control.grace_ns.offset // 8)
_CALL, _TAG = tl.constexpr(abi.Report.sequence.offset // 4), tl.constexpr(abi.Report.tag.offset // 4)
_BUFFER, _CHANNEL = tl.constexpr(abi.Report.buffer.offset // 4), tl.constexpr(abi.Report.channel.offset // 4)
_WAITED_MS, _MINE = tl.constexpr(abi.Report.waited_ms.offset // 4), tl.constexpr(abi.Report.mine.offset // 4)
_THEIRS = tl.constexpr(abi.Report.theirs.offset // 4)

_LATE, _STOPPED = tl.constexpr(1), tl.constexpr(2)  # bits of `stop`: this wait has expired, this rank is stopped

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
        _guard(link, total, x == out, WORLD, INTERPRET)
    else:
        WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        channel = tl.program_id(0).to(tl.int64) - 1
        parity = tl.load(_words(epoch, channel, tl.int32))
        stop = _stopped(staging)

        peers = _peers(table, rank, WORLD)
        mine = _read(x, channel, numel, WORD, BLOCK, VECTOR)
        for step in tl.static_range(1, WORLD):
            _push(peers[step - 1] + slots, parity * WORLD + rank, capacity, channel, mine, stop, WORD, BLOCK)
        blocks, stop = _receive(link, slots, parity, capacity, channel, mine, stop, WORLD, WORD, BLOCK, INTERPRET)
        _write(out, channel, numel, _sum(blocks, WORLD, DTYPE, WORD), stop, WORD, BLOCK, VECTOR)
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
        _guard(link, total, x == out, WORLD, INTERPRET)
    else:
        WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
        channel = tl.program_id(0).to(tl.int64) - 1
        parity = tl.load(_words(epoch, channel, tl.int32))
        stop = _stopped(staging)
        gather = 2 + parity
        stride = part // BLOCK  # blocks from one part to the next

        peers = _peers(table, rank, WORLD)
        parts = ()
        for step in tl.static_range(WORLD):
            parts = parts + (_read(x, (rank + step) % WORLD * stride + channel, numel, WORD, BLOCK, VECTOR),)
        for step in tl.static_range(1, WORLD):
            _push(peers[step - 1] + slots, parity * WORLD + rank, capacity, channel, parts[step], stop, WORD, BLOCK)
        addends, stop = _receive(link, slots, parity, capacity, channel, parts[0], stop, WORLD, WORD, BLOCK, INTERPRET)

        reduced = _sum(addends, WORLD, DTYPE, WORD)
        for step in tl.static_range(1, WORLD):
            _push(peers[step - 1] + slots, gather * WORLD + rank, capacity, channel, reduced, stop, WORD, BLOCK)
        blocks, stop = _receive(link, slots, gather, capacity, channel, reduced, stop, WORLD, WORD, BLOCK, INTERPRET)
        for source in tl.static_range(WORLD):
            _write(out, source * stride + channel, numel, blocks[source], stop, WORD, BLOCK, VECTOR)
        _leave(epoch, control, channel, parity)


@triton.jit
def _guard(link, total, in_place, WORLD: tl.constexpr, INTERPRET: tl.constexpr):
    """Signs this launch at every peer, compares theirs, and checks for another launch in flight.

    Each thread reads for itself: of all words as they are when the reductions put them together, see _poll.
    """
    table, staging, control, report, rank, tag, shape_id = link
    threads = tl.arange(0, _THREADS)
    sources = threads % _RANKS
    others = (sources < WORLD) & (sources != rank)
    regions = tl.load(_words(table, sources, tl.int64), mask=others, other=0)
    stop = _stopped(staging)
    sequence = tl.load(_words(control, _SEQUENCE, tl.int32)) + 1  # from 1: the header holds zeros at first
    number = sequence.to(tl.int64) << 32
    total = total.to(tl.int64)
    first = number | (total & 0xFFFFFFFF)
    second = number | tag | tl.where(in_place, _IN_PLACE, 0) | ((total >> 32) << _NUMEL_SHIFT)
    parity = _SIGNATURES + (sequence & 1) * _RANKS * _SIGNATURE
    theirs = _words(regions + parity, rank * 2, tl.int64)
    signing = others & (threads < _RANKS) & (stop == 0)
    tl.store(theirs, first, mask=signing, cache_modifier=".wt")
    tl.store(theirs + 1, second, mask=signing, cache_modifier=".wt")

    in_flight = tl.atomic_add(_words(control, _IN_FLIGHT, tl.int32), 1, sem="relaxed")
    # Behind the atomic's barrier: every thread has read the number before.
    tl.store(_words(control, _SEQUENCE, tl.int32), sequence, cache_modifier=".wt")

    low, high, verdict = _load_signatures(staging + parity, sources, others, first, second, stop)
    polls = 0
    wait = _begin()
    while (verdict > 3) & (verdict % 4 == 0):
        polls += 1
        if polls % _CHECK_EVERY == 0:
            wait, stop = _check(link, wait, stop, polls, INTERPRET)
        low, high, verdict = _load_signatures(staging + parity, sources, others, first, second, stop)
    came = verdict < 2
    differ = (low != first) | (((high ^ second) & ~_IN_PLACE) != 0)
    other = tl.max(tl.where(differ, 1 + sources, 0)) - 1
    # Signed: the last program of this launch may have left before this one entered.
    misused = tl.where(other >= 0, _MISMATCH, tl.where(in_flight > 0, _CONCURRENT, 0))
    kind = tl.where(came, misused, _TIMEOUT)
    if kind == _MISMATCH:
        words = _words(report, 0, tl.int32)
        _store_halves(words + _MINE, first, second)
        _store_halves(words + _THEIRS, tl.sum(tl.where(threads == other, low, 0)), tl.sum(tl.where(threads == other, high, 0)))
    if kind != 0:
        blamed = tl.where(came, tl.where(other >= 0, other, rank), verdict // 4 - 1)
        _fail(link, kind, blamed, 0, 0, wait, polls, WORLD, INTERPRET)
    if came:
        tl.store(_words(control, _HANDSHAKEN + shape_id, tl.int32), 1, cache_modifier=".wt")


@triton.jit
def _load_signatures(signatures, sources, others, first, second, stop):
    """Loads the signatures of all sources, this rank's own being (first, second): (their halves, verdict of _poll).

    The upper half of each is the sequence number, so that it proves its own arrival.
    """
    words = _words(signatures, sources * 2, tl.int64)
    low = tl.load(words, mask=others, other=first, volatile=True)
    high = tl.load(words + 1, mask=others, other=second, volatile=True)
    late = (low >> 32 != first >> 32) | (high >> 32 != first >> 32)
    return low, high, tl.max(4 * tl.where(late, 1 + sources, 0) + stop)


@triton.jit
def _store_halves(words, first, second):
    tl.store(words, first)
    tl.store(words + 1, second)


@triton.jit
def _words(address, first, WORD: tl.constexpr):
    """Pointer to the word (or words) number `first` of an array at `address`."""
    return address.to(tl.pointer_type(WORD)) + first


@triton.jit
def _slot(slots, index, capacity, channel, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to this channel's block of slot number `index` of those at an address: 16-byte aligned."""
    first = slots + index.to(tl.int64) * capacity
    pointers = first.to(tl.pointer_type(WORD)) + (channel * BLOCK + tl.arange(0, BLOCK))
    return tl.multiple_of(tl.max_contiguous(pointers, BLOCK), 16)


@triton.jit
def _peers(table, rank, WORLD: tl.constexpr):
    """Staging memory of the next rank, the one after, and so on round the ring.

    Loaded before the first push: a load placed after one is issued after it, and every push would wait for its own.
    """
    regions = ()
    for step in tl.static_range(1, WORLD):
        regions = regions + (tl.load(_words(table, (rank + step) % WORLD, tl.int64)),)
    return regions


@triton.jit
def _stopped(staging):
    """_STOPPED if this rank's header holds an abort code, as this thread sees it, else 0."""
    return tl.where(tl.load(_words(staging, 0, tl.int32), volatile=True) != 0, _STOPPED, 0)


@triton.jit
def _encode(bits):
    """The payload as it travels: never the sentinel."""
    return tl.where(bits == -1, -2, bits)


@triton.jit
def _user(address, block, numel, WORD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to block number `block` of a tensor, and which of its elements exist."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    pointers = address.to(tl.pointer_type(WORD)) + offsets
    if VECTOR:
        # The product is numel again, and shows that no group of 16 bytes is half masked.
        numel = numel // (128 // WORD.primitive_bitwidth) * (128 // WORD.primitive_bitwidth)
        pointers = tl.multiple_of(tl.max_contiguous(pointers, BLOCK), 16)
    return pointers, offsets < numel


@triton.jit
def _read(x, block, numel, WORD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Block of the input, encoded, zeros past its end."""
    pointers, exist = _user(x, block, numel, WORD, BLOCK, VECTOR)
    return _encode(tl.load(pointers, mask=exist, other=0))


@triton.jit
def _write(out, block, numel, bits, stop, WORD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Block of the output; NaN once this rank has stopped waiting, for then even what has arrived may be stale."""
    pointers, exist = _user(out, block, numel, WORD, BLOCK, VECTOR)
    tl.store(pointers, tl.where(stop == 0, bits, -1), mask=exist)


@triton.jit
def _push(slots, index, capacity, channel, bits, stop, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block into a peer's slot, all of it, unless this rank is stopped.

    `.wt` compiles to st.wt = a relaxed store of system scope; nothing orders it, and nothing needs to.
    """
    pointers = _slot(slots, index, capacity, channel, WORD, BLOCK)
    tl.store(pointers, bits, mask=stop == 0, cache_modifier=".wt")


@triton.jit
def _poll(slots, buffer, capacity, channel, mine, rank, stop, WORLD: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the blocks of all sources at once: (blocks in rank order, verdict).

    verdict = 4 * (1 + highest source with an element missing, or 0 if none is) + stop.
    `stop` comes from a clock and a word that each thread reads for itself, so threads may differ. They may not differ
    in leaving a loop with barriers in it: all control flow hangs on the verdict, which the reduction makes one value.
    Where only threads whose elements are not the latest have seen the stop, it takes effect at the next check.
    """
    late = tl.zeros([BLOCK], tl.int32)
    blocks = ()
    for source in tl.static_range(WORLD):
        pointers = _slot(slots, buffer * WORLD + source, capacity, channel, WORD, BLOCK)
        bits = tl.load(pointers, mask=source != rank, other=mine, volatile=True)
        late = tl.where(bits == -1, 1 + source, late)
        blocks = blocks + (bits,)
    return blocks, tl.max(4 * late + stop)


@triton.jit
def _receive(
    link,
    slots,
    buffer,
    capacity,
    channel,
    mine,
    stop,
    WORLD: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Waits for this channel's block from every source and poisons the slots again: (blocks, stop).

    blocks[rank] is `mine`. On return with stop = 0 no element is missing; what arrived as time ran out counts.
    The barriers of the reduction also order this program's reads before its later writes: of the epoch word before
    its flip, of x before out where these are one, of the staging by one thread before its poisoning by another.
    """
    table, staging, control, report, rank, tag, shape_id = link
    own = staging + slots
    blocks, verdict = _poll(own, buffer, capacity, channel, mine, rank, stop, WORLD, WORD, BLOCK)
    polls = 0
    wait = _begin()
    while (verdict > 3) & (verdict % 4 == 0):
        polls += 1
        if polls % _CHECK_EVERY == 0:
            wait, stop = _check(link, wait, stop, polls, INTERPRET)
        blocks, verdict = _poll(own, buffer, capacity, channel, mine, rank, stop, WORLD, WORD, BLOCK)
    stop &= _STOPPED
    if verdict > 1:
        stop |= _STOPPED
        # Of a stop that others caused, too: the host must not take what is written now for a result.
        _fail(link, _TIMEOUT, verdict // 4 - 1, buffer, channel, wait, polls, WORLD, INTERPRET)
    for source in tl.static_range(WORLD):
        pointers = _slot(own, buffer * WORLD + source, capacity, channel, WORD, BLOCK)
        tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=source != rank)
    return blocks, stop


@triton.jit
def _begin():
    """A wait: (when its clock was started, whether the shape was handshaken then)."""
    return tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)


@triton.jit
def _check(link, wait, stop, polls, INTERPRET: tl.constexpr):
    """(wait, stop) as this thread sees them now. The clock starts again at the handshake."""
    table, staging, control, report, rank, tag, shape_id = link
    began, handshaken_before = wait
    now = _clock(polls, INTERPRET)
    handshaken = tl.load(_words(control, _HANDSHAKEN + shape_id, tl.int32), volatile=True)
    limit = tl.load(_words(control, tl.where(handshaken != 0, _DEADLINE, _GRACE), tl.int64), volatile=True)
    began = tl.where((began == 0) | (handshaken != handshaken_before), now, began)
    late = (limit != 0) & (now - began >= limit)
    return (began, handshaken), stop | _stopped(staging) | tl.where(late, _LATE, 0)


@triton.jit
def _clock(polls, INTERPRET: tl.constexpr):
    """ns"""
    if INTERPRET:
        return tl.full([], 1000000, tl.int64) * polls
    else:
        return tl.extra.cuda.globaltimer()


@triton.jit
def _fail(link, kind, culprit, buffer, channel, wait, polls, WORLD: tl.constexpr, INTERPRET: tl.constexpr):
    """Broadcasts the abort code, unless this rank has one already; the first program to come here reports to the host.

    No atomics but on local memory. One thread makes all of the scalar stores; the code must reach the host after the
    rest, and what the report says of a mismatch was written before the exchange, which releases it.
    """
    table, staging, control, report, rank, tag, shape_id = link
    code = kind | (culprit << _CULPRIT_SHIFT) | (rank << _FINDER_SHIFT)
    before = tl.atomic_cas(_words(staging, 0, tl.int32), 0, code, sem="acq_rel", scope="sys")
    if before == 0:
        for step in tl.static_range(1, WORLD):
            peer = tl.load(_words(table, (rank + step) % WORLD, tl.int64))
            tl.store(_words(peer, 0, tl.int32), code, cache_modifier=".wt")
    if tl.atomic_xchg(_words(control, _REPORTED, tl.int32), 1, sem="acq_rel") == 0:
        began, handshaken = wait
        waited = tl.where(began == 0, 0, _clock(polls, INTERPRET) - began)
        words = _words(report, 0, tl.int32)
        tl.store(words + _CALL, tl.load(_words(control, _SEQUENCE, tl.int32), volatile=True))
        tl.store(words + _TAG, tag)
        tl.store(words + _BUFFER, buffer)
        tl.store(words + _CHANNEL, channel)
        tl.store(words + _WAITED_MS, waited // 1000000)
        code = tl.where(before == 0, code, before)
        if not INTERPRET:
            code = tl.inline_asm_elementwise(
                "fence.acq_rel.sys; mov.b32 $0, $1;", "=r,r", [code], dtype=tl.int32, is_pure=False, pack=1
            )
        tl.store(words, code, cache_modifier=".wt")


@triton.jit
def _sum(blocks, WORLD: tl.constexpr, DTYPE: tl.constexpr, WORD: tl.constexpr):
    """fp32 sum in rank order, rounded once, as it travels."""
    total = blocks[0].to(DTYPE, bitcast=True).to(tl.float32)
    for source in tl.static_range(1, WORLD):
        total += blocks[source].to(DTYPE, bitcast=True).to(tl.float32)
    return _encode(total.to(DTYPE).to(WORD, bitcast=True))


@triton.jit
def _leave(epoch, control, channel, parity):
    """The end of every channel; the last one counts the launch as complete."""
    tl.store(_words(epoch, channel, tl.int32), parity ^ 1)
    if channel + 2 == tl.num_programs(0):
        tl.atomic_add(_words(control, _IN_FLIGHT, tl.int32), -1, sem="relaxed")
