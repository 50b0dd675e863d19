"""Addresses and accesses of the Triton kernels: the user's tensors, the slots of the staging memory, words of structs."""

import triton
import triton.language as tl


@triton.jit
def word_at(address, first, WORD: tl.constexpr):
    """Pointer to the word (or words) number `first` of an array at `address`."""
    return address.to(tl.pointer_type(WORD)) + first


@triton.jit
def slot(slots, index, capacity, channel, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to this channel's block of slot number `index` of those at an address: 16-byte aligned."""
    first = slots + index.to(tl.int64) * capacity
    pointers = first.to(tl.pointer_type(WORD)) + (channel * BLOCK + tl.arange(0, BLOCK))
    return tl.multiple_of(tl.max_contiguous(pointers, BLOCK), 16)


@triton.jit
def peers_of(table, rank, WORLD: tl.constexpr):
    """Staging memory of the next rank, the one after, and so on round the ring.

    Loaded before the first push: a load placed after one is issued after it, and every push would wait for its own.
    """
    regions = ()
    for step in tl.static_range(1, WORLD):
        regions = regions + (tl.load(word_at(table, (rank + step) % WORLD, tl.int64)),)
    return regions


@triton.jit
def encode(bits):
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
def read(x, block, numel, WORD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Block of the input, encoded, zeros past its end."""
    pointers, exist = _user(x, block, numel, WORD, BLOCK, VECTOR)
    return encode(tl.load(pointers, mask=exist, other=0))


@triton.jit
def write(out, block, numel, bits, stop, WORD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Block of the output; NaN once this rank has stopped waiting, for then even what has arrived may be stale."""
    pointers, exist = _user(out, block, numel, WORD, BLOCK, VECTOR)
    tl.store(pointers, tl.where(stop == 0, bits, -1), mask=exist)


@triton.jit
def push(slots, index, capacity, channel, bits, stop, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block into a peer's slot, all of it, unless this rank is stopped.

    `.wt` compiles to st.wt = a relaxed store of system scope; nothing orders it, and nothing needs to.
    """
    pointers = slot(slots, index, capacity, channel, WORD, BLOCK)
    tl.store(pointers, bits, mask=stop == 0, cache_modifier=".wt")
