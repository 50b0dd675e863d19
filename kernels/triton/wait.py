"""Waits of the Triton kernels: polls, deadlines, and the abort code that ends them."""

import triton
import triton.language as tl
from allreduce_jit import abi

from .slots import slot, word_at

CHECK_EVERY = tl.constexpr(abi.POLLS)  # polls of the staging memory between two checks of the clock and the abort code
_CULPRIT_SHIFT, _FINDER_SHIFT = tl.constexpr(abi.CULPRIT_SHIFT), tl.constexpr(abi.FINDER_SHIFT)
TIMEOUT = tl.constexpr(int(abi.Kind.TIMEOUT))

# int32 words of Control, its deadlines as int64, and int32 words of Report.
SEQUENCE, HANDSHAKEN = tl.constexpr(abi.Control.sequence.offset // 4), tl.constexpr(abi.Control.handshaken.offset // 4)
_REPORTED = tl.constexpr(abi.Control.reported.offset // 4)
_DEADLINE, _GRACE = tl.constexpr(abi.Control.deadline_ns.offset // 8), tl.constexpr(abi.Control.grace_ns.offset // 8)
_CALL, _TAG = tl.constexpr(abi.Report.sequence.offset // 4), tl.constexpr(abi.Report.tag.offset // 4)
_BUFFER, _CHANNEL = tl.constexpr(abi.Report.buffer.offset // 4), tl.constexpr(abi.Report.channel.offset // 4)
_WAITED_MS = tl.constexpr(abi.Report.waited_ms.offset // 4)

_LATE, STOPPED = tl.constexpr(1), tl.constexpr(2)  # bits of `stop`: this wait has expired, this rank is stopped


@triton.jit
def receive(
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
    wait = begin()
    while (verdict > 3) & (verdict % 4 == 0):
        polls += 1
        if polls % CHECK_EVERY == 0:
            wait, stop = check(link, wait, stop, polls, INTERPRET)
        blocks, verdict = _poll(own, buffer, capacity, channel, mine, rank, stop, WORLD, WORD, BLOCK)
    stop &= STOPPED
    if verdict > 1:
        stop |= STOPPED
        # Of a stop that others caused, too: the host must not take what is written now for a result.
        fail(link, TIMEOUT, verdict // 4 - 1, buffer, channel, wait, polls, WORLD, INTERPRET)
    for source in tl.static_range(WORLD):
        pointers = slot(own, buffer * WORLD + source, capacity, channel, WORD, BLOCK)
        tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=source != rank)
    return blocks, stop


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
        pointers = slot(slots, buffer * WORLD + source, capacity, channel, WORD, BLOCK)
        bits = tl.load(pointers, mask=source != rank, other=mine, volatile=True)
        late = tl.where(bits == -1, 1 + source, late)
        blocks = blocks + (bits,)
    return blocks, tl.max(4 * late + stop)


@triton.jit
def stopped(staging):
    """STOPPED if this rank's header holds an abort code, as this thread sees it, else 0."""
    return tl.where(tl.load(word_at(staging, 0, tl.int32), volatile=True) != 0, STOPPED, 0)


@triton.jit
def begin():
    """A wait: (when its clock was started, whether the shape was handshaken then)."""
    return tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)


@triton.jit
def check(link, wait, stop, polls, INTERPRET: tl.constexpr):
    """(wait, stop) as this thread sees them now. The clock starts again at the handshake."""
    table, staging, control, report, rank, tag, shape_id = link
    began, handshaken_before = wait
    now = _clock(polls, INTERPRET)
    handshaken = tl.load(word_at(control, HANDSHAKEN + shape_id, tl.int32), volatile=True)
    limit = tl.load(word_at(control, tl.where(handshaken != 0, _DEADLINE, _GRACE), tl.int64), volatile=True)
    began = tl.where((began == 0) | (handshaken != handshaken_before), now, began)
    late = (limit != 0) & (now - began >= limit)
    return (began, handshaken), stop | stopped(staging) | tl.where(late, _LATE, 0)


@triton.jit
def _clock(polls, INTERPRET: tl.constexpr):
    """ns; in the interpreter, which has no clock, a millisecond for each poll, from a day on."""
    if INTERPRET:
        return tl.full([], 1000000, tl.int64) * (86400000 + polls)
    else:
        return tl.extra.cuda.globaltimer()


@triton.jit
def fail(link, kind, culprit, buffer, channel, wait, polls, WORLD: tl.constexpr, INTERPRET: tl.constexpr):
    """Broadcasts the abort code, unless this rank has one already; the first program to come here reports to the host.

    No atomics but on local memory. One thread makes all of the scalar stores; the code must reach the host after the
    rest, and what the report says of a mismatch was written before the exchange, which releases it.
    """
    table, staging, control, report, rank, tag, shape_id = link
    code = kind | (culprit << _CULPRIT_SHIFT) | (rank << _FINDER_SHIFT)
    before = tl.atomic_cas(word_at(staging, 0, tl.int32), 0, code, sem="acq_rel", scope="sys")
    if before == 0:
        for step in tl.static_range(1, WORLD):
            peer = tl.load(word_at(table, (rank + step) % WORLD, tl.int64))
            tl.store(word_at(peer, 0, tl.int32), code, cache_modifier=".wt")
    if tl.atomic_xchg(word_at(control, _REPORTED, tl.int32), 1, sem="acq_rel") == 0:
        began, handshaken = wait
        waited = tl.where(began == 0, 0, _clock(polls, INTERPRET) - began)
        words = word_at(report, 0, tl.int32)
        tl.store(words + _CALL, tl.load(word_at(control, SEQUENCE, tl.int32), volatile=True))
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
