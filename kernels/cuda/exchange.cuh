// What the algorithms are made of: a channel's epoch, and exchanges of packets between all ranks.
#pragma once
#include "failure.cuh"

// A channel's word that counts its kernels, by whose parity buffers alternate, and whether this rank may push.
template <class Config>
struct Epoch {
    u64 address;
    u32 parity;
    bool alive;

    __device__ Epoch(const Args &a, u32 channel) : address(a.channels + channel * sizeof(Channel)) {}
    __device__ explicit Epoch(u64 address, u32 parity = 0) : address(address), parity(parity) {}

    __device__ void load(bool aborted) {
        const u64 state = ld_relaxed_gpu_v2_u32(address);
        __syncwarp();  // every lane has read the epoch; to reconverge after the loops below would take 0.1 us
        parity = u32(state) & 1;
        alive = !(Config::GUARDED && aborted | u32(state >> 32));
    }

    // For the next kernel. By one lane, after the barrier in load().
    __device__ void advance() const { st_relaxed_gpu_u32(address + offsetof(Channel, epoch), parity ^ 1); }
};

// One packet number k from every rank to every other, through one buffer: pushed to the peers, received from them, and the
// slots poisoned again.
template <class Config, class Wire, class Epilogue, class Share>
struct Exchange {
    typedef Packet Peers[PEERS<Config>];

    const Args &a;
    const Slots<Config> &slots;
    const Share &share;  // of the partition
    u32 buffer;  // its number
    u32 offset;  // in bytes

    __device__ Exchange(const Args &a, const Slots<Config> &slots, const Share &share, u32 buffer)
        : a(a), slots(slots), share(share), buffer(buffer), offset(buffer * slots.pitch) {}

    // To peer number j.
    __device__ void push(u32 k, u32 j, Packet p, bool alive) const {
        st_relaxed_sys_v4(slots.to[j] + offset + k * WARP * 16, p, alive);
    }

    // The same to every peer.
    __device__ void push(u32 k, Packet p, bool alive) const {
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) push(k, j, p, alive);
    }

    // Every peer's packet, by place; `use()` as in receive(). Returns whether they came.
    template <class Use>
    __device__ bool wait(u32 k, Peers &peers, Use use) const {
        const u64 slot = slots.mine + offset + k * WARP * 16;
        const auto slow = [&] { return wait_slow<Config, Wire, Epilogue>(a, slot, slots.stride, buffer, share), true; };
        return receive<Config, Wire>(slot, slots.stride, peers, use, slow);
    }

    __device__ void poison(u32 k) const {
        const u64 slot = slots.mine + offset + k * WARP * 16;
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) st_relaxed_sys_v4(slot + j * slots.stride, Wire::empty());
    }
};
