// The slots of the staging memory: 16 bytes for each (buffer, source, index), into which the source pushes one packet.
//
// A channel is a warp of data blocks, counted over the grid; it owns the same slots whatever the grid. A kernel pushes only
// into slots that its peers have emptied; each algorithm says above its code why they are.
//
// Progress: a warp waits only for the same warp of its peers. Blocks start in the order of their index, on every GPU, so a
// grid may be larger than what is resident at once.
#pragma once
#include "abi.cuh"

constexpr u32 WARP = 32;

template <class Config>
constexpr u32 PEERS = Config::WORLD_SIZE - 1;

// The place of a source among the slots of `owner`, who has none for itself; and the source at a place.
__device__ inline u32 place_of(u32 source, u32 owner) { return source - (source > owner); }
__device__ inline u32 source_at(u32 place, u32 owner) { return place + (place >= owner); }

// Peer number k, 0 <= k < PEERS: every rank and block begins with another one, so that no link is flooded.
template <class Config>
__device__ inline u32 target(const Args &a, u32 k) {
    u32 peer = a.rank + 1 + (k + blockIdx.x) % PEERS<Config>;
    return peer >= Config::WORLD_SIZE ? peer - Config::WORLD_SIZE : peer;
}

// Where a thread reads and pushes: the slots of buffer 0 at `index`. Computed before the loads return that decide which
// buffer is next, so that nothing but an addition is left to do then.
template <class Config>
struct Slots {
    u64 mine;
    u32 stride;             // bytes from one place to the next
    u32 pitch;              // bytes from one buffer to the next
    u64 to[PEERS<Config>];  // at target(k)

    __device__ Slots(const Args &a, u32 index)
        : mine(a.own + a.slots + index * 16ull), stride(a.capacity * 16 + zero()),
          pitch(a.capacity * (16 * PEERS<Config>) + zero()) {
#pragma unroll
        for (u32 k = 0; k < PEERS<Config>; k++) {
            const u32 peer = target<Config>(a, k);
            to[k] = a.staging[peer] + a.slots + (u64(place_of(a.rank, peer)) * a.capacity + index) * 16;
            materialize(to[k]);
        }
        materialize(mine);
    }
};
