// What keeps misuse from hanging or lying: block 0 of a launch is its guard, while the other blocks move the
// data, which takes longer but for the smallest messages. (The overlapping launches of a stream have one guard, in
// the first. "Call" here is what a guard guards.)
//
// - Signature: sequence number, number of elements, dtype and algorithm go to every peer and are compared
//   with theirs; a difference stops the communicator on both. Each 8-byte half carries the sequence number, so
//   it proves its own arrival (the LL protocol of NCCL). Two parities are enough: a rank sends signature e+2
//   when its call e+1 is complete, so it has the peer's e+1, which the peer sent when its call e was complete.
// - Concurrent use: two calls in flight on one rank (two streams, two replayed graphs) share slots and epochs. A call
//   meets another in flight if more calls began than were signed, or more were signed than ended, which the last
//   channel of each says. (The call at hand may have ended before its guard looks. Other channels may still be at
//   work when the last one is done.)
// - Met: once all ranks came to a call of some shape, later ones must come within the short deadline.
#pragma once
#include "staging.cuh"

constexpr u32 IN_PLACE = 1u << 15;  // in the signature for the report only: no rank depends on another's

__device__ inline bool arrived(Packet signature, u32 sequence) {
    return (signature.w[1] == sequence) & (signature.w[3] == sequence);
}

// Small, as every launch has to fetch it: a lane per peer.
__device__ inline void guard(const Args &a) {
    const u32 lane = threadIdx.x;
    if (lane >= PEERS) return;
    const u32 peer = source_at(lane, a.rank);
    u64 to = a.staging[peer] + FIELD(Header, signature) + a.rank * 16;
    u64 from = a.own + FIELD(Header, signature) + peer * 16;
    u64 control = a.control, flag = a.control + FIELD(Control, met) + a.config * 4ull;
    const u32 tag = a.tag | u32(a.total >> 32) << 16 | (a.in == a.out ? IN_PLACE : 0);
    u64 call = u64(tag) << 32 | u32(a.total);
    materialize(to);
    materialize(from);
    materialize(control);
    materialize(flag);
    materialize(call);
    griddepcontrol_wait();
    // Calls count from 1: the header holds zeros at first.
    const u64 signed_ended = ld_relaxed_gpu_v2_u32(control + FIELD(Control, sequence));
    const bool dead = stopped(a);
    const u32 known = ld_relaxed_gpu_u32(flag);
    const u32 sequence = u32(signed_ended) + 1, parity = (sequence & 1) * 8 * 16;
    if (!dead) st_relaxed_sys_v2_u64(to + parity, Packet{{u32(call), sequence, u32(call >> 32), sequence}});
    // Whatever can wait is done while the peers' signatures are on their way.
    u32 entered = sequence - 1;
    if (lane == 0) entered = atom_add_relaxed_gpu_u32(control + FIELD(Control, entered), 1);
    Wait wait;
    Packet theirs;
    u32 kind = TIMEOUT, culprit = peer, polls = dead ? POLLS : 0;
    // As in receive().
#pragma unroll 1
    do {
        theirs = ld_relaxed_sys_v2_u64(from + parity);
        if (arrived(theirs, sequence)) kind = 0;
    } while (kind && ++polls <= POLLS);
    if (!dead)
#pragma unroll 1
        while (kind && !wait.over(a)) {
            theirs = ld_relaxed_sys_v2_u64(from + parity);
            if (arrived(theirs, sequence)) kind = 0;
        }
    const bool alone = entered == sequence - 1 && int(u32(signed_ended >> 32) - (sequence - 1)) >= 0;
    if (!kind && (theirs.w[0] != u32(call) || (theirs.w[2] ^ u32(call >> 32)) & ~IN_PLACE)) kind = MISMATCH;
    else if (!kind && !alone) kind = CONCURRENT, culprit = a.rank;
    if (kind) stop(a, kind, culprit, 0, wait.waited_ns);  // before the others are waited for, whose peers may be late
    const bool met = all_sync((1u << PEERS) - 1, kind == 0);  // by now every lane has read the sequence number, too
    if (lane > 0) return;
    st_relaxed_gpu_u32(control + FIELD(Control, sequence), sequence);
    if (met && !known) st_relaxed_gpu_u32(flag, 1);
}

// Of a call's last channel: says, when it is done, that the call has ended. The count is read ahead, with the rest.
struct Ending {
    u64 count;  // where it is; 0 in all other channels
    u32 ended = 0;

    __device__ Ending(const Args &a, bool last_channel)
        : count(GUARDED && a.last && last_channel ? a.control + FIELD(Control, ended) : 0) {}
    __device__ void look() {
        if (count) ended = ld_relaxed_gpu_u32(count);
    }
    __device__ void say() const {
        if (count) st_relaxed_gpu_u32(count, ended + 1);
    }
};
