"""The guard of the Triton kernels: what kernels/cuda/guard.cuh is to those in CUDA C++."""

import ctypes

import triton
import triton.language as tl
from allreduce_jit import abi
from allreduce_jit.policy.p2p import THREADS

from .slots import word_at
from .wait import CHECK_EVERY, HANDSHAKEN, SEQUENCE, TIMEOUT, begin, check, fail, stopped

IN_FLIGHT = tl.constexpr(abi.Control.completed.offset // 4)  # word of Control
MINE, THEIRS = tl.constexpr(abi.Report.mine.offset // 4), tl.constexpr(abi.Report.theirs.offset // 4)
_THREADS = tl.constexpr(THREADS)
_SIGNATURES = tl.constexpr(abi.Header.signatures.offset)
_RANKS, _SIGNATURE = tl.constexpr(abi.MAX_RANKS), tl.constexpr(ctypes.sizeof(abi.Signature))
_IN_PLACE, _NUMEL_SHIFT = tl.constexpr(abi.IN_PLACE), tl.constexpr(abi.NUMEL_SHIFT)
_MISMATCH, _CONCURRENT = tl.constexpr(int(abi.Kind.MISMATCH)), tl.constexpr(int(abi.Kind.CONCURRENT))


@triton.jit
def guard(link, total, in_place, WORLD: tl.constexpr, INTERPRET: tl.constexpr):
    """Signs this launch at every peer, compares theirs, and checks for another launch in flight.

    Each thread reads for itself: of all words as they are when the reductions put them together, see wait._poll.
    """
    table, staging, control, report, rank, tag, shape_id = link
    threads = tl.arange(0, _THREADS)
    sources = threads % _RANKS
    others = (sources < WORLD) & (sources != rank)
    regions = tl.load(word_at(table, sources, tl.int64), mask=others, other=0)
    stop = stopped(staging)
    sequence = tl.load(word_at(control, SEQUENCE, tl.int32)) + 1  # from 1: the header holds zeros at first
    number = sequence.to(tl.int64) << 32
    total = total.to(tl.int64)
    first = number | (total & 0xFFFFFFFF)
    second = number | tag | tl.where(in_place, _IN_PLACE, 0) | ((total >> 32) << _NUMEL_SHIFT)
    parity = _SIGNATURES + (sequence & 1) * _RANKS * _SIGNATURE
    theirs = word_at(regions + parity, rank * 2, tl.int64)
    signing = others & (threads < _RANKS) & (stop == 0)
    tl.store(theirs, first, mask=signing, cache_modifier=".wt")
    tl.store(theirs + 1, second, mask=signing, cache_modifier=".wt")

    in_flight = tl.atomic_add(word_at(control, IN_FLIGHT, tl.int32), 1, sem="relaxed")
    # Behind the atomic's barrier: every thread has read the number before.
    tl.store(word_at(control, SEQUENCE, tl.int32), sequence, cache_modifier=".wt")

    low, high, verdict = _load_signatures(staging + parity, sources, others, first, second, stop)
    polls = 0
    wait = begin()
    while (verdict > 3) & (verdict % 4 == 0):
        polls += 1
        if polls % CHECK_EVERY == 0:
            wait, stop = check(link, wait, stop, polls, INTERPRET)
        low, high, verdict = _load_signatures(staging + parity, sources, others, first, second, stop)
    came = verdict < 2
    differ = (low != first) | (((high ^ second) & ~_IN_PLACE) != 0)
    other = tl.max(tl.where(differ, 1 + sources, 0)) - 1
    # Signed: the last program of this launch may have left before this one entered.
    misused = tl.where(other >= 0, _MISMATCH, tl.where(in_flight > 0, _CONCURRENT, 0))
    kind = tl.where(came, misused, TIMEOUT)
    if kind == _MISMATCH:
        words = word_at(report, 0, tl.int32)
        _store_halves(words + MINE, first, second)
        _store_halves(words + THEIRS, tl.sum(tl.where(threads == other, low, 0)), tl.sum(tl.where(threads == other, high, 0)))
    if kind != 0:
        blamed = tl.where(came, tl.where(other >= 0, other, rank), verdict // 4 - 1)
        fail(link, kind, blamed, 0, 0, wait, polls, WORLD, INTERPRET)
    if came:
        tl.store(word_at(control, HANDSHAKEN + shape_id, tl.int32), 1, cache_modifier=".wt")


@triton.jit
def _load_signatures(signatures, sources, others, first, second, stop):
    """Loads the signatures of all sources, this rank's own being (first, second): (their halves, verdict as of wait._poll).

    The upper half of each is the sequence number, so that it proves its own arrival.
    """
    words = word_at(signatures, sources * 2, tl.int64)
    low = tl.load(words, mask=others, other=first, volatile=True)
    high = tl.load(words + 1, mask=others, other=second, volatile=True)
    late = (low >> 32 != first >> 32) | (high >> 32 != first >> 32)
    return low, high, tl.max(4 * tl.where(late, 1 + sources, 0) + stop)


@triton.jit
def _store_halves(words, first, second):
    tl.store(words, first)
    tl.store(words + 1, second)
