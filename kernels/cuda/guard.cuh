// What keeps misuse from hanging or lying: block 0 of a launch is its guard, while the other blocks move the
// data. (The overlapping launches of a stream have one guard, in the first. "Call" here is what a guard guards.) It costs no latency, as it takes no longer than they do.
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

__device__ inline void guard(const Args &a) {
    const u32 lane = threadIdx.x;
    if (lane >= WARP) return;
    griddepcontrol_wait();
    // Calls count from 1: the header holds zeros at first.
    const u32 sequence = ld_relaxed_gpu_u32(a.control + FIELD(Control, sequence)) + 1;
    const bool ok = alive(a);
    u32 in_flight = 0;
    if (lane == 0) in_flight = atom_add_relaxed_gpu_u32(a.control + FIELD(Control, in_flight), 1);
    bool met = ok;
    if (lane < PEERS && ok) {
        const u32 peer = source_at(lane, a.rank), parity = FIELD(Header, signature) + (sequence & 1) * 8 * sizeof(Packet);
        const u32 tag = a.tag | u32(a.total >> 32) << 16 | (a.in == a.out ? IN_PLACE : 0);
        const Packet mine{{u32(a.total), sequence, tag, sequence}};
        st_relaxed_sys_v2_u64(a.staging[peer] + parity + a.rank * sizeof(Packet), mine);
        const u64 from = a.staging[a.rank] + parity + peer * sizeof(Packet);
        Wait wait;
        Packet theirs = ld_relaxed_sys_v2_u64(from);
        for (u32 spins = 1; met && (theirs.w[1] != sequence || theirs.w[3] != sequence); spins++) {
            theirs = ld_relaxed_sys_v2_u64(from);
            if (spins % 64 == 0 && give_up(a, wait, 0, 0, 1u << lane)) met = false;
        }
        if (met && (theirs.w[0] != mine.w[0] || (theirs.w[2] ^ mine.w[2]) & ~IN_PLACE)) {
            for (u32 i = 0; i < 2; i++) {
                st_relaxed_sys_u32(a.report + FIELD(Report, mine) + 4 * i, mine.w[2 * i]);
                st_relaxed_sys_u32(a.report + FIELD(Report, theirs) + 4 * i, theirs.w[2 * i]);
            }
            stop(a, MISMATCH, peer, 0, 0, 0);
        }
    } else if (lane == 0 && !ok) {
        report(a, ld_relaxed_sys_u32(a.staging[a.rank] + FIELD(Header, abort)), 0, 0, 0);
    }
    // As signed: the last channel may have left before this thread entered.
    if (lane == 0 && ok && int(in_flight) > 0) stop(a, CONCURRENT, a.rank, 0, 0, 0);
    met = all_sync(met);
    if (lane == 0) {
        st_relaxed_gpu_u32(a.control + FIELD(Control, sequence), sequence);
        if (met) st_relaxed_gpu_u32(a.control + FIELD(Control, met) + 4 * a.config, 1);
    }
}

// By one thread, when the last channel of the call is done.
__device__ inline void leave(const Args &a) { red_add_relaxed_gpu_u32(a.control + FIELD(Control, in_flight), u32(-1)); }
