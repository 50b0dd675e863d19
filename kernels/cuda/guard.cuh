// What keeps misuse from hanging or lying: block 0 of a launch is its guard, while the other blocks move the
// data, which takes longer but for the smallest messages. (The overlapping launches of a stream have one guard, in
// the first. "Call" here is what a guard guards.)
//
// - Signature: sequence number, number of elements, dtype and algorithm go to every peer and are compared
//   with theirs; a difference stops the communicator on both. Each 8-byte half carries the sequence number, so
//   it proves its own arrival (the LL protocol of NCCL). Two parities are enough: a rank sends signature e+2
//   when its call e+1 is complete, so it has the peer's e+1, which the peer sent when its call e was complete.
// - Concurrent use: two calls in flight on one rank (two streams, two replayed graphs) share slots and epochs.
// - Met: once all ranks came to a call of some shape, later ones must come within the short deadline.
#pragma once
#include "staging.cuh"

constexpr u32 IN_PLACE = 1u << 15;  // in the signature for the report only: no rank depends on another's

// Small, as every launch has to fetch it: a lane per peer.
__device__ inline void guard(const Args &a) {
    const u32 lane = threadIdx.x;
    if (lane >= PEERS) return;
    const u32 peer = source_at(lane, a.rank);
    const u64 to = a.staging[peer] + FIELD(Header, signature) + a.rank * 16;
    const u64 from = a.own + FIELD(Header, signature) + peer * 16;
    const u32 tag = a.tag | u32(a.total >> 32) << 16 | (a.in == a.out ? IN_PLACE : 0);
    griddepcontrol_wait();
    // Calls count from 1: the header holds zeros at first.
    const u32 sequence = ld_relaxed_gpu_u32(a.control + FIELD(Control, sequence)) + 1;
    const u32 code = ld_relaxed_gpu_u32(a.own + FIELD(Header, abort));
    u32 in_flight = 0;
    if (lane == 0) in_flight = atom_add_relaxed_gpu_u32(a.control + FIELD(Control, in_flight), 1);
    bool met = code == 0;
    if (met) {
        const u32 parity = (sequence & 1) * 8 * 16;
        st_relaxed_sys_v2_u64(to + parity, Packet{{u32(a.total), sequence, tag, sequence}});
        u64 since = 0;
        Packet theirs;
        bool came = false;
        do {
#pragma unroll 1
            for (u32 spins = 0; spins < POLLS && !came; spins++) {
                theirs = ld_relaxed_sys_v2_u64(from + parity);
                came = theirs.w[1] == sequence && theirs.w[3] == sequence;
            }
        } while (!came && (since = keep_waiting(a, since, 0, 1u << lane)));
        met = came;
        const bool differs = met && (theirs.w[0] != u32(a.total) || (theirs.w[2] ^ tag) & ~IN_PLACE);
        // As signed: the last channel may have left before this thread entered.
        if (differs || int(in_flight) > 0)
            stop(a, differs ? MISMATCH : CONCURRENT, differs ? peer : a.rank, 0, 0);
    } else {
        report(a, code, 0, 0);
    }
    met = all_sync((1u << PEERS) - 1, met);  // by now every lane has read the sequence number, too
    if (lane > 0) return;
    st_relaxed_gpu_u32(a.control + FIELD(Control, sequence), sequence);
    if (met) st_relaxed_gpu_u32(a.control + FIELD(Control, met) + 4 * a.config, 1);
}

// By one thread, when the last channel of the call is done.
__device__ inline void leave(const Args &a) { red_add_relaxed_gpu_u32(a.control + FIELD(Control, in_flight), u32(-1)); }
