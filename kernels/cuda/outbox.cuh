// The outbox of a rank: slots in pinned host memory that this rank alone writes, once, and all peers read. Its data crosses this
// GPU's bus once, however many they are.
//
// A channel is a warp of data blocks, counted over the grid; it owns SLOTS slots of each rank's outbox, and its Channel.epoch counts
// how often it has used them, over all calls. Each algorithm says above its code why a slot that it writes again has been read by all.
//
// What is relied upon beside what slots.cuh says of progress: accesses of 8 bytes arrive whole; a lane that reads a place twice does
// not go back to what it held before (coherence; loads of system scope go to host memory each time, whatever cache is on the way);
// a store does not overtake the loads on whose values it depends. Nothing is asked of the order of two stores, or of a
// store and a flag: relaxed ordering on the bus may be on or off.
#pragma once
#include "failure.cuh"
#include "wire/phase.cuh"

// The slow path of a wait, by one lane; whether all came. `offset`: of its packets in the outbox of rank 0; of rank s, `stride * s` further.
template <class Config>
__device__ __noinline__ bool outbox_wait_slow(const Args &a, u64 offset, u32 stride, u32 phase, u32 buffer) {
    Wait wait;
    wait.buffer = buffer;
    do {
        wait.missing = 0;
#pragma unroll 1
        for (u32 j = 0; j < PEERS<Config>; j++) {
            const u32 source = source_at(j, a.rank);
            bool all = true;
#pragma unroll
            for (u32 k = 0; k < Config::PACKETS; k++)
                all &= Phase<Config::PACKETS>::arrived(
                    ld_relaxed_sys_v2_u64(a.staging[source] + offset + source * stride + k * (WARP * 16)), phase);
            wait.missing |= u32(!all) << j;
        }
    } while (wait.missing && !wait.expired(a));
    if (wait.missing) stop<Config>(a, TIMEOUT, wait.culprit(a), buffer, wait.waited_ns);
    return !wait.missing;
}

template <class Config, u32 SLOTS>
struct Outbox {
    static constexpr u32 PACKETS = Config::PACKETS;
    typedef Phase<PACKETS> Wire;
    typedef typename Wire::Packets Packets;
    typedef Packet Peers[PEERS<Config>][PACKETS];

    const Args &a;
    u64 offset;  // of this channel's slots, and this lane's first packet in the first of them
    u32 lane;

    __device__ Outbox(const Args &a, u32 channel, u32 lane)
        : a(a), offset(a.slots + u64(channel) * (SLOTS * Wire::SLOT) + lane * 16), lane(lane) {}

    // By a whole warp, as all below.
    __device__ void store(u32 slot, const Packets &data, u32 phase) const {
        Packets p;
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) p[k] = data[k];
        Wire::encode(p, phase, lane);
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) st_relaxed_sys_v2_u64(a.own + offset + slot * Wire::SLOT + k * (WARP * 16), p[k]);
    }

    // Every peer's packets, by place, in slot `slot` of each peer's outbox, or, OF_SOURCE, in the slot that has its own number.
    // Returns whether they came, to all lanes alike.
    template <bool OF_SOURCE>
    __device__ bool receive(u32 slot, Peers &u, u32 phase, u32 buffer) const {
        const u64 at = offset + slot * Wire::SLOT;
        constexpr u32 STRIDE = OF_SOURCE ? Wire::SLOT : 0;
        u64 from[PEERS<Config>];
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) {
            const u32 source = source_at(j, a.rank);
            from[j] = a.staging[source] + at + source * STRIDE;
        }
        for (u32 polls = 0;;) {
            if (!any_sync(~0u, pending<0>(from, u, phase))) break;
            // A poll of a slot that has not come costs the bus as much as the slot. Where many are under way (PATIENT), only
            // the last lane asks for its last packet until that has come, and then all do.
            if (Config::PATIENT)
                while (any_sync(~0u, lane == Wire::LAST && pending<PACKETS - 1>(from, u, phase)) && (!Config::GUARDED || ++polls <= POLLS)) {}
            if (!Config::GUARDED || ++polls <= POLLS) continue;
            const bool came = outbox_wait_slow<Config>(a, at, STRIDE, phase, buffer);
            if (any_sync(~0u, !came)) return false;
            polls = 0;
        }
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) Wire::decode(u[j], lane);
        return true;
    }

  private:
    // Of a lane, from packet FIRST on. Loads all before it looks at one: round trips overlap.
    template <u32 FIRST>
    __device__ static bool pending(const u64 (&from)[PEERS<Config>], Peers &u, u32 phase) {
        bool all = true;
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++)
#pragma unroll
            for (u32 k = FIRST; k < PACKETS; k++) u[j][k] = ld_relaxed_sys_v2_u64(from[j] + k * (WARP * 16));
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++)
#pragma unroll
            for (u32 k = FIRST; k < PACKETS; k++) all &= Wire::arrived(u[j][k], phase);
        return !all;
    }
};

// Of a channel: how often it has used its slots, over all calls, and whether this rank may store.
template <class Config>
struct Uses {
    u64 address;
    u32 number;
    bool alive;

    __device__ Uses(const Args &a, u32 channel) : address(a.channels + channel * sizeof(Channel)) {}

    __device__ void load(bool aborted) {
        const u64 state = ld_relaxed_gpu_v2_u32(address);
        number = u32(state);
        // The warp goes one way, though its lanes may have found different words; and every lane has read the count.
        alive = all_sync(~0u, !(Config::GUARDED && aborted | u32(state >> 32)));
    }

    // For the next kernel. By one lane, after the barrier in load().
    __device__ void advance(u32 uses) const { st_relaxed_gpu_u32(address + offsetof(Channel, epoch), number + uses); }
};
