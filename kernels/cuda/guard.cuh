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
#include "packet.cuh"
#include "staging.cuh"

constexpr u32 IN_PLACE = 1u << 15;  // in the signature for the report only: no rank depends on another's

__device__ inline bool arrived(Packet signature, u32 sequence) {
    return (signature.w[1] == sequence) & (signature.w[3] == sequence);
}

// Small, as every launch has to fetch it: a lane per peer. Calls count from 1 (the header holds zeros at first), and
// each knows its number before its turn has come: the next launch may start only when this one has drawn its ticket. So
// the signature leaves at once, and comes back sooner than the data, which has the epoch to wait for.
__device__ inline void guard(const Args &a) {
    const u32 lane = threadIdx.x;
    if (lane >= PEERS) return;
    const u32 peer = source_at(lane, a.rank);
    u32 entered = 0;
    if (lane == 0) entered = atom_add_relaxed_gpu_u32(a.control + FIELD(Control, entered), 1);
    const bool aborted = stopped(a);
    u64 to = a.staging[peer] + FIELD(Header, signature) + a.rank * 16;
    u64 from = a.own + FIELD(Header, signature) + peer * 16;
    const u32 sequence = broadcast((1u << PEERS) - 1, entered) + 1;
    to += (sequence & 1) * 8 * 16;
    from += (sequence & 1) * 8 * 16;
    materialize(to);
    if (!STREAM) griddepcontrol_launch_dependents();  // now that the ticket is there
    u64 control = a.control, flag = a.control + FIELD(Control, met) + a.config * 4ull;
    const u32 tag = a.tag | u32(a.total >> 32) << 16 | (a.in == a.out ? IN_PLACE : 0);
    u64 call = u64(tag) << 32 | u32(a.total);
    materialize(from);
    materialize(control);
    materialize(flag);
    materialize(call);
    griddepcontrol_wait();
    if (!aborted) st_relaxed_sys_v2_u64(to, Packet{{u32(call), sequence, u32(call >> 32), sequence}});
    const u64 signed_ended = ld_relaxed_gpu_v2_u32(control + FIELD(Control, sequence));
    const u32 known = ld_relaxed_gpu_u32(flag);
    const bool alone = u32(signed_ended) == sequence - 1 && int(u32(signed_ended >> 32) - (sequence - 1)) >= 0;
    const bool dead = aborted | !alone;
    Wait wait;
    Packet theirs;
    u32 kind = TIMEOUT, culprit = peer, polls = dead ? POLLS : 0;
    // One way out, as in receive().
#pragma unroll 1
    do {
        theirs = ld_relaxed_sys_v2_u64(from);
        if (arrived(theirs, sequence)) kind = 0;
    } while (kind && ++polls <= POLLS);
    if (!dead)
#pragma unroll 1
        while (kind && !wait.over(a)) {
            theirs = ld_relaxed_sys_v2_u64(from);
            if (arrived(theirs, sequence)) kind = 0;
        }
    const u64 other = theirs.w[0] | u64(theirs.w[2]) << 32;
    if (!alone) kind = CONCURRENT, culprit = a.rank;
    else if (!kind && (other ^ call) & ~(u64(IN_PLACE) << 32)) kind = MISMATCH;
    // Before the others are waited for, whose peers may be late.
    if (kind) stop(a, kind, culprit, 0, wait.waited_ns, sequence, call, kind == MISMATCH ? other : 0);
    const bool met = all_sync((1u << PEERS) - 1, kind == 0);  // by now every lane has read the counts, too
    if (lane > 0) return;
    st_relaxed_gpu_u32(control + FIELD(Control, sequence), sequence);
    if (met && !known) st_relaxed_gpu_u32(flag, 1);
}

// Of a thread that did not get every packet: NaN for its packets of each of `PARTS` parts of the output, and word to
// everybody.
template <class T, bool WHOLE, u32 PARTS>
__device__ __noinline__ void give_up(const Args &a, u32 first, u32 part, Wait wait) {
    griddepcontrol_wait();  // a launch that follows may not have: what comes after it waits for all before it
    const Tensor<T, WHOLE> out(a.out, a.numel);
#pragma unroll 1
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll 1
        for (u32 i = 0; i < PARTS && first + k * WARP < part; i++) out.store(i * part + first + k * WARP, NOTHING);
    stop(a, TIMEOUT, wait.culprit(a), wait.buffer, wait.waited_ns);
}

// Of a thread whose packets are late: returns when they are there, or gives up. Out of line, not to stand between the usual
// wait and what follows it.
template <class T, bool WHOLE, u32 PARTS>
__device__ __noinline__ void wait_long(const Args &a, u64 slot, u32 stride, u32 buffer, u32 first, u32 part) {
    Wait wait;
    wait.buffer = buffer;
    if (wait.ends_well(a, slot, stride)) return;
    give_up<T, WHOLE, PARTS>(a, first, part, wait);
    exit_thread();
}

// Of a call's last channel: says, when it is done, that the call has ended. The count is read while the peers are waited for.
struct Ending {
    u64 count;  // where it is; 0 in all other channels
    u32 ended = 0;

    __device__ Ending(const Args &a, bool last_channel)
        : count(GUARDED && a.last && last_channel ? a.control + FIELD(Control, ended) : 0) {}
    __device__ void look() {
        if (count) ended = ld_relaxed_gpu_u32(count);
    }
    __device__ void say() {
        opaque(ended);  // or one would be added, and the count waited for, as soon as it is read
        if (count) st_relaxed_gpu_u32(count, ended + 1);
    }
};
