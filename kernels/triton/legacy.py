"""Push all-reduce over any memory that peers can store to: the legacy path.

Nothing is asked of the link but that stores of one element (2 or 4 bytes) arrive whole: no remote atomics, no remote
loads, no order between stores. So the data must prove its own arrival. Staging memory is poisoned with 0xFF bytes;
an element has arrived once it differs from the all-ones *sentinel*. That pattern is a NaN: a payload that has it
travels as its neighbour ...FE, a NaN too. The reader poisons what it has read for the next use.

Channels and parities. Program p of a launch is channel p: it has an epoch word and bytes
[p * BLOCK_BYTES, +BLOCK_BYTES) of every slot to itself, whatever the dtype. Each launch uses the slots of one parity
and flips it. A slot is refilled two epochs later, which is safe because in every phase every program sends a full
block to every peer (zeros past the end, and for empty parts too) and waits for a full block from every peer:
 - a program in epoch e+2 has, in epoch e+1, received from q's program of epoch e+1;
 - that ran after q's launch of epoch e was complete, its poisoning included;
 - so the slots that q read in epoch e are poisoned, and nobody still reads them.
It leans on the boundary between launches: one stream, and *no* programmatic dependent launch. Program p waits for
the peers' programs p alone. A grid may be larger than what fits on the GPU at once, as blocks start in the order of
their index (an assumption: docs/protocol.md).

Failure. A wait that outlasts its deadline, or finds the poison flag set, ends. Its program runs on to the end but
pushes no more, nor does any later launch: a rank that no longer waits could overtake its peers, and they would read
two epochs mixed. They run into their own deadlines instead. What such a program writes to `out` is NaN throughout.

Numbers. fp32 sum in rank order 0..WORLD-1, begun with rank 0's value (so -0 + -0 = -0), rounded once. The own
addend takes its place in that order in its encoded form, so all ranks add the same bits.

Addresses are plain int64 values. Staging regions, `capacity` and `part` in bytes are multiples of 16.
"""

import triton
import triton.language as tl

BLOCK_BYTES = 2048  # what one program sends to one peer in one phase: 16 bytes a thread
NUM_WARPS = 4
MAX_REGISTERS = 168  # compile option `maxnreg`: left to itself ptxas spills a register or two in a few variants

_CHECK_EVERY = tl.constexpr(64)  # looks at the staging memory between two looks at the clock
_ONE_SHOT, _TWO_SHOT = tl.constexpr(3), tl.constexpr(4)  # algorithms, as reports name them

_ARGUMENTS = {
    "table": "i64",
    "x": "i64",
    "out": "i64",
    "epoch": "i64",
    "control": "i64",
    "report": "i64",
    "numel": "i64",
    "rank": "i32",
    "capacity": "i64",
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
    table,  # address of int64[WORLD]: each rank's staging region as mapped in this process
    x,  # address of the input
    out,  # address of the output; may equal x
    epoch,  # address of int32[grid]: the parity of each channel, local, zero at first
    control,  # address of the local control block: int32 poison flag, int64 at byte 8 deadline in ns (0: none)
    report,  # address of int32[8]: {1 once valid, source waited for, 3 one-shot or 4 two-shot, phase 1 or 2}
    numel,  # elements of x and out
    rank,
    capacity,  # bytes of one slot, at least grid * BLOCK_BYTES
    WORLD: tl.constexpr,  # ranks, 2 to 8
    DTYPE: tl.constexpr,  # tl.float32, tl.float16 or tl.bfloat16
    BLOCK: tl.constexpr,  # elements in BLOCK_BYTES
    VECTOR: tl.constexpr,  # x and out are 16-byte aligned and numel * itemsize is a multiple of 16
    INTERPRET: tl.constexpr,  # run by Triton's interpreter: no clock, the deadline counts looks
):
    """out = sum of all ranks' x. Every rank sends all of its x to every peer.

    Launch: grid = ceil(numel / BLOCK), the same numel, DTYPE and order of launches on all ranks.
    Staging: slot (parity, source) at byte (parity * WORLD + source) * capacity.
    """
    WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
    channel = tl.program_id(0).to(tl.int64)
    parity = tl.load(_words(epoch, channel, tl.int32))
    stop = tl.load(_words(control, 0, tl.int32), volatile=True)
    slots = parity.to(tl.int64) * WORLD * capacity

    regions = _regions(table, rank, WORLD)
    mine = _read(x, channel, numel, WORD, BLOCK, VECTOR)
    for step in tl.static_range(1, WORLD):
        _push(regions[step], slots + rank * capacity, channel, mine, stop, WORD, BLOCK)
    blocks, stop = _receive(regions[0], slots, channel, mine, rank, capacity, stop, control, report, _ONE_SHOT, 1,
                            WORLD, WORD, BLOCK, INTERPRET)
    _write(out, channel, numel, _sum(blocks, WORLD, DTYPE, WORD), stop, WORD, BLOCK, VECTOR)
    _flip(epoch, channel, parity)


@triton.jit
def legacy_two_shot(
    table,
    x,
    out,
    epoch,
    control,
    report,
    numel,
    rank,
    capacity,  # bytes of one slot, at least part * itemsize
    part,  # elements of one rank's part: ceil(numel / WORLD) rounded up to BLOCK
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = sum of all ranks' x: reduce-scatter, then all-gather. Arguments as in legacy_one_shot.

    Rank k sums elements [k * part, (k + 1) * part) of those that exist; program p does block p of every part.
    Launch: grid = part / BLOCK, the same numel, DTYPE and order of launches on all ranks.
    Staging: slot (phase, parity, source) at byte ((phase * 2 + parity) * WORLD + source) * capacity, phase 0 or 1.
    """
    WORD: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
    channel = tl.program_id(0).to(tl.int64)
    parity = tl.load(_words(epoch, channel, tl.int32))
    stop = tl.load(_words(control, 0, tl.int32), volatile=True)
    scatter = parity.to(tl.int64) * WORLD * capacity
    gather = scatter + 2 * WORLD * capacity
    stride = part // BLOCK  # blocks from one part to the next

    regions = _regions(table, rank, WORLD)
    parts = ()
    for step in tl.static_range(WORLD):
        parts = parts + (_read(x, (rank + step) % WORLD * stride + channel, numel, WORD, BLOCK, VECTOR),)
    for step in tl.static_range(1, WORLD):
        _push(regions[step], scatter + rank * capacity, channel, parts[step], stop, WORD, BLOCK)
    addends, stop = _receive(regions[0], scatter, channel, parts[0], rank, capacity, stop, control, report, _TWO_SHOT, 1,
                             WORLD, WORD, BLOCK, INTERPRET)

    reduced = _sum(addends, WORLD, DTYPE, WORD)
    for step in tl.static_range(1, WORLD):
        _push(regions[step], gather + rank * capacity, channel, reduced, stop, WORD, BLOCK)
    blocks, stop = _receive(regions[0], gather, channel, reduced, rank, capacity, stop, control, report, _TWO_SHOT, 2,
                            WORLD, WORD, BLOCK, INTERPRET)
    for source in tl.static_range(WORLD):
        _write(out, source * stride + channel, numel, blocks[source], stop, WORD, BLOCK, VECTOR)
    _flip(epoch, channel, parity)


@triton.jit
def _words(address, first, WORD: tl.constexpr):
    """Pointer to the word (or words) number `first` of an array at `address`."""
    return address.to(tl.pointer_type(WORD)) + first


@triton.jit
def _staging(region, slot, channel, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to this channel's block of the slot at byte `slot` of a staging region: 16-byte aligned."""
    pointers = (region + slot).to(tl.pointer_type(WORD)) + (channel * BLOCK + tl.arange(0, BLOCK))
    return tl.multiple_of(tl.max_contiguous(pointers, BLOCK), 16)


@triton.jit
def _regions(table, rank, WORLD: tl.constexpr):
    """Staging regions of this rank, the next one, and so on round the ring.

    Loaded before the first push: a load placed after one is issued after it, and every push would wait for its own.
    """
    regions = ()
    for step in tl.static_range(WORLD):
        regions = regions + (tl.load(_words(table, (rank + step) % WORLD, tl.int64)),)
    return regions


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
def _push(region, slot, channel, bits, stop, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block into a peer's staging region, all of it, unless this rank has stopped waiting for others.

    `.wt` compiles to st.wt = a relaxed store of system scope; nothing orders it, and nothing needs to.
    """
    pointers = _staging(region, slot, channel, WORD, BLOCK)
    tl.store(pointers, bits, mask=stop == 0, cache_modifier=".wt")


@triton.jit
def _look(region, slots, channel, mine, rank, capacity, stop,
          WORLD: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the blocks of all sources at once: (blocks in rank order, verdict).

    verdict = 2 * (1 + highest source with an element missing, or 0 if none is) + stop.
    `stop` comes from a clock and a flag that each thread reads for itself, so threads may differ. They may not differ
    in leaving a loop with barriers in it: all control flow hangs on the verdict, which the reduction makes one value.
    Where only threads whose elements are not the latest have seen the stop, it takes effect at the next check.
    """
    late = tl.zeros([BLOCK], tl.int32)
    blocks = ()
    for source in tl.static_range(WORLD):
        pointers = _staging(region, slots + source * capacity, channel, WORD, BLOCK)
        bits = tl.load(pointers, mask=source != rank, other=mine, volatile=True)
        late = tl.where(bits == -1, 1 + source, late)
        blocks = blocks + (bits,)
    return blocks, tl.max(2 * late + stop)


@triton.jit
def _receive(region, slots, channel, mine, rank, capacity, stop, control, report,
             ALGORITHM: tl.constexpr, PHASE: tl.constexpr,
             WORLD: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Waits for this channel's block from every source and poisons the slots again: (blocks, stop).

    blocks[rank] is `mine`. On return with stop = 0 no element is missing.
    The barriers of the reduction also order this program's reads before its later writes: of the epoch word before
    its flip, of x before out where these are one, of the staging by one thread before its poisoning by another.
    """
    blocks, verdict = _look(region, slots, channel, mine, rank, capacity, stop, WORLD, WORD, BLOCK)
    began = _clock(0, INTERPRET)
    looks = 0
    while (verdict > 1) & (verdict % 2 == 0):
        looks += 1
        if looks % _CHECK_EVERY == 0:
            stop |= _over(control, _clock(looks, INTERPRET) - began)
        blocks, verdict = _look(region, slots, channel, mine, rank, capacity, stop, WORLD, WORD, BLOCK)
    if verdict > 1:
        stop |= 1
        _fail(control, report, verdict // 2 - 1, ALGORITHM, PHASE, INTERPRET)
    for source in tl.static_range(WORLD):
        pointers = _staging(region, slots + source * capacity, channel, WORD, BLOCK)
        tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=source != rank)
    return blocks, stop


@triton.jit
def _over(control, elapsed):
    """1 if this rank is poisoned or the wait has used up its budget, as this thread sees it."""
    poison = tl.load(_words(control, 0, tl.int32), volatile=True)
    deadline = tl.load(_words(control, 1, tl.int64), volatile=True)
    return poison | ((deadline != 0) & (elapsed > deadline)).to(tl.int32)


@triton.jit
def _clock(looks, INTERPRET: tl.constexpr):
    if INTERPRET:
        return looks
    else:
        return tl.extra.cuda.globaltimer()


@triton.jit
def _fail(control, report, source, ALGORITHM: tl.constexpr, PHASE: tl.constexpr, INTERPRET: tl.constexpr):
    """Poisons this rank; the first program to do so tells the host why.

    The exchange is local. One thread makes all of these stores; report[0] must reach the host after the rest.
    """
    if tl.atomic_xchg(_words(control, 0, tl.int32), 1, sem="relaxed") == 0:
        words = _words(report, 0, tl.int32)
        tl.store(words + 1, source)
        tl.store(words + 2, ALGORITHM)
        tl.store(words + 3, PHASE)
        valid = 1
        if not INTERPRET:
            valid = tl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 1;", "=r,r", [source], dtype=tl.int32,
                                              is_pure=False, pack=1)
        tl.store(words, valid)


@triton.jit
def _sum(blocks, WORLD: tl.constexpr, DTYPE: tl.constexpr, WORD: tl.constexpr):
    """fp32 sum in rank order, rounded once, as it travels."""
    total = blocks[0].to(DTYPE, bitcast=True).to(tl.float32)
    for source in tl.static_range(1, WORLD):
        total += blocks[source].to(DTYPE, bitcast=True).to(tl.float32)
    return _encode(total.to(DTYPE).to(WORD, bitcast=True))


@triton.jit
def _flip(epoch, channel, parity):
    tl.store(_words(epoch, channel, tl.int32), parity ^ 1)
