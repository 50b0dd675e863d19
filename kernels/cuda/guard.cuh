// Protection against misuse: block 0 of a launch is its guard, while the other blocks move the data, which takes longer for all
// but the smallest messages. (The overlapping launches of a stream have one guard, in the first. "Call" here is what a guard
// guards.)
//
// - Signature: sequence number, number of elements, dtype and algorithm go to every peer and are compared with theirs (of calls with
//   parameters, these as well); a difference stops the communicator on both. Each 8-byte half carries the sequence number, so it
//   proves its own arrival (the LL protocol of NCCL). Two parities are enough: a rank sends signature e+2 when its call e+1 is complete, so it has the
//   peer's e+1, which the peer sent when its call e was complete.
// - Concurrent use: two calls in flight on one rank (two streams, two replayed graphs) share slots and epochs. Another call is
//   in flight if more calls entered than were signed, or more were signed than completed, which the last channel of each call
//   counts. (The call at hand may have completed before its guard reads the counts. Other channels may still be at work when the last
//   one is done.)
// - Handshake: once all ranks came to a call of some shape, later ones must come within the short deadline.
#pragma once
#include "failure.cuh"

__device__ inline bool arrived(Packet signature, u32 sequence) {
    return (signature.w[1] == sequence) & (signature.w[3] == sequence);
}

__device__ inline bool differ(Packet signature, u64 call) {
    return ((signature.w[0] | u64(signature.w[2]) << 32) ^ call) & ~(u64(IN_PLACE) << 32);
}

// With its parameters, which come right behind, from a call of the same kind.
template <bool WITH_PARAMETERS>
__device__ inline bool arrived(const Packet &signature, const Packet &parameters, u64 call, u32 sequence) {
    if constexpr (!WITH_PARAMETERS) return arrived(signature, sequence);
    else return arrived(signature, sequence) && (differ(signature, call) || arrived(parameters, sequence));
}

// Small, as every launch has to fetch it: a lane per peer. Calls count from 1 (the header holds zeros at first). Each knows its
// number before griddepcontrol.wait: the next launch may start only when this one has drawn its ticket. So the signature leaves
// at once, and comes back sooner than the data, which has to wait for the epoch.
template <class Config, bool WITH_PARAMETERS = false>
__device__ inline void guard(const Args &a, u64 parameters = 0) {
    constexpr u32 LANES = (1u << PEERS<Config>) - 1, SIGNATURE = sizeof(Signature), PARITY = sizeof(Header::signatures[0]);
    const u64 BEHIND = offsetof(Header, parameters) - offsetof(Header, signatures);
    const u32 lane = threadIdx.x;
    if (lane >= PEERS<Config>) return;
    const u32 peer = source_at(lane, a.rank);
    u32 entered = 0;
    if (lane == 0) entered = atom_add_relaxed_gpu_u32(a.control + offsetof(Control, entered), 1);
    const bool aborted = stopped<Config>(a);
    u64 to = a.staging[peer] + offsetof(Header, signatures) + a.rank * SIGNATURE;
    u64 from = a.own + offsetof(Header, signatures) + peer * SIGNATURE;
    const u32 sequence = broadcast(LANES, entered) + 1;
    to += (sequence & 1) * PARITY;
    from += (sequence & 1) * PARITY;
    materialize(to);
    if (!Config::STREAM) griddepcontrol_launch_dependents();  // now that the ticket is drawn
    u64 control = a.control, flag = a.control + offsetof(Control, handshaken) + a.shape_id * 4ull;
    const u32 tag = a.tag | u32(a.total >> 32) << NUMEL_SHIFT | (a.input == a.output ? IN_PLACE : 0);
    u64 call = u64(tag) << 32 | u32(a.total);
    materialize(from);
    materialize(control);
    materialize(flag);
    materialize(call);
    griddepcontrol_wait();
    if (!aborted) st_relaxed_sys_v2_u64(to, Packet{{u32(call), sequence, u32(call >> 32), sequence}});
    if (WITH_PARAMETERS && !aborted)
        st_relaxed_sys_v2_u64(to + BEHIND, Packet{{u32(parameters), sequence, u32(parameters >> 32), sequence}});
    const u64 signed_completed = ld_relaxed_gpu_v2_u32(control + offsetof(Control, sequence));
    const u32 handshaken = ld_relaxed_gpu_u32(flag);
    const bool alone = u32(signed_completed) == sequence - 1 && int(u32(signed_completed >> 32) - (sequence - 1)) >= 0;
    const bool dead = aborted | !alone;
    Wait wait;
    Packet theirs, more;
    u32 kind = TIMEOUT, culprit = peer, polls = dead ? POLLS : 0;
    // A single exit, as in receive().
#pragma unroll 1
    do {
        theirs = ld_relaxed_sys_v2_u64(from);
        if (WITH_PARAMETERS) more = ld_relaxed_sys_v2_u64(from + BEHIND);
        if (arrived<WITH_PARAMETERS>(theirs, more, call, sequence)) kind = 0;
    } while (kind && ++polls <= POLLS);
    if (!dead)
#pragma unroll 1
        while (kind && !wait.expired(a)) {
            theirs = ld_relaxed_sys_v2_u64(from);
            if (WITH_PARAMETERS) more = ld_relaxed_sys_v2_u64(from + BEHIND);
            if (arrived<WITH_PARAMETERS>(theirs, more, call, sequence)) kind = 0;
        }
    const u64 other = theirs.w[0] | u64(theirs.w[2]) << 32;
    if (!alone) kind = CONCURRENT, culprit = a.rank;
    else if (!kind && (other ^ call) & ~(u64(IN_PLACE) << 32)) kind = MISMATCH;
    if constexpr (WITH_PARAMETERS)
        if (!kind && (more.w[0] | u64(more.w[2]) << 32) != parameters) kind = MISMATCH;
    // Before the vote, which waits for the other lanes, whose peers may be late.
    if (kind) stop<Config>(a, kind, culprit, 0, wait.waited_ns, sequence, call, kind == MISMATCH ? other : 0);
    const bool all_signed = all_sync(LANES, kind == 0);  // after it every lane has read the counts
    if (lane > 0) return;
    st_relaxed_gpu_u32(control + offsetof(Control, sequence), sequence);
    if (all_signed && !handshaken) st_relaxed_gpu_u32(flag, 1);
}

// Counts a call as completed, when the last of its channels is done. The count is loaded while the peers are waited for.
template <class Config>
struct CompletionCounter {
    u64 address;  // 0 in all other channels
    u32 completed = 0;

    __device__ CompletionCounter(const Args &a, bool last_channel)
        : address(Config::GUARDED && a.last && last_channel ? a.control + offsetof(Control, completed) : 0) {}
    __device__ void load() {
        if (address) completed = ld_relaxed_gpu_u32(address);
    }
    __device__ void publish() {
        opaque(completed);  // or 1 would be added, and the load waited for, as soon as it is issued
        if (address) st_relaxed_gpu_u32(address, completed + 1);
    }
};
