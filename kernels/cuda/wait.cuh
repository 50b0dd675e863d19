// Waiting for packets: a fast path that only polls, and a slow path that watches the clock and the abort code, too.
#pragma once
#include "slots.cuh"

// The slow path of a wait, and how it ended.
struct Wait {
    u64 since = 0;  // when it began; the last bit is whether the shape was handshaken then
    u64 waited_ns = 0;
    u32 missing = 0;  // a bit per place whose packet has not come
    u32 buffer = 0;

    // Whether to stop waiting: the communicator was aborted, or the deadline has passed.
    __device__ bool expired(const Args &a) {
        const u64 now = globaltimer();
        const u32 handshaken = ld_relaxed_gpu_u32(a.control + offsetof(Control, handshaken) + 4 * a.shape_id);
        // The handshake replaces the grace period by the deadline, which counts from then.
        if (since == 0 || (since & 1) != handshaken) since = (now & ~1ull) | handshaken;
        waited_ns = now - since;
        const u64 limit =
            ld_relaxed_gpu_u64(a.control + (handshaken ? offsetof(Control, deadline_ns) : offsetof(Control, grace_ns)));
        return ld_relaxed_sys_u32(a.own + offsetof(Header, abort)) || (limit && now >= since + limit);
    }

    // Waits for the packet of every peer, in the slots from `first` on; returns whether all came.
    template <class Config, class Wire>
    __device__ bool wait_all(const Args &a, u64 first, u32 stride) {
        do {
            missing = 0;
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++)
                missing |= u32(typename Wire::Arrival(ld_relaxed_sys_v4(first + j * stride)).pending()) << j;
        } while (missing && !expired(a));
        return !missing;
    }

    __device__ u32 culprit(const Args &a) const { return source_at(__ffs(missing) - 1, a.rank); }
};

// Wait for the packet of every peer, u[place], in the slots from `first` on. All loads first, then all checks, so that the
// round trips overlap. `use()` consumes what was loaded, and does so again after `wait_slow()`, which is called if something
// is missing after POLLS polls: it returns true when all packets are there, or false (or ends the thread) when they will not come.
// Returns what it returned last.
//
// The polling loop has a single exit, its backward branch, so that the lanes of a warp reconverge there. With a second exit,
// lanes that leave in different iterations would run the sum and the store one after the other: 0.1 us for a small message.
// For the same reason `use()` comes before the branch on whether it was too early: by then the answer is known. The slow path
// keeps nothing in registers that would have to be merged with the fast path.
template <class Config, class Wire, class Use, class WaitSlow>
__device__ inline bool receive(u64 first, u32 stride, Packet (&u)[PEERS<Config>], Use use, WaitSlow wait_slow) {
    for (;;) {
        u32 polls = 0;
        bool pending;
#pragma unroll 1
        do {
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++) u[j] = ld_relaxed_sys_v4(first + j * stride);
            typename Wire::Arrival arrival(u[0]);
#pragma unroll
            for (u32 j = 1; j < PEERS<Config>; j++) arrival.add(u[j]);
            pending = arrival.pending();
        } while (pending & (!Config::GUARDED || ++polls <= POLLS));
        opaque(polls);
        use();
        if (!Config::GUARDED || polls <= POLLS) return true;
        if (!wait_slow()) return false;
    }
}
