// A partition says which packet of the tensors belongs to whom: to which thread, and to which rank. Its Share is what the slow
// path is given of it, in registers: enough to find all packets of a thread.
//
// Flat: the packets in order, cut into PARTS equal parts, one per rank, of which the last may be short or empty. (One part:
// every rank has all packets.) A channel has WARP * PACKETS consecutive packets of each part, a thread every WARP-th of them,
// so that each access of a warp is contiguous. A packet's index in its part is the index of its slot.
#pragma once
#include "slots.cuh"

template <class Config, u32 PARTS>
struct FlatShare {
    static constexpr u32 COUNT = PARTS, PER_THREAD = Config::PACKETS;

    u32 first;  // this thread's first packet, in each part
    u32 part;   // packets of a part

    // Whether packet number k of this thread exists in any part.
    __device__ bool has(u32 k) const { return first + k * WARP < part; }

    // That packet in the part of a rank.
    __device__ u32 index(u32 rank, u32 k) const { return rank * part + first + k * WARP; }
};

template <class Config, u32 PARTS>
struct Flat : FlatShare<Config, PARTS> {
    typedef FlatShare<Config, PARTS> Share;
    static constexpr u32 PER_CHANNEL = WARP * Config::PACKETS;
    using Share::first, Share::part;

    u32 packets;  // of the tensors

    __device__ Flat(u32 packets, u32 slot)
        : Share{slot, (packets + PARTS - 1) / PARTS}, packets(packets) {}

    // Whether the channel has nothing to do, on every rank alike.
    __device__ bool idle(u32 lane) const { return first - lane >= part; }

    // Whether no channel after this one has anything to do.
    __device__ bool last_channel() const { return first + PER_CHANNEL >= part; }

    // The packet from which `at` counts. It is known before the data is, so that its address may be computed early.
    __device__ u32 origin() const { return PARTS == 1 ? first : 0; }

    // Packet number k of this thread in the part of a rank; past the end of the tensors if there is none.
    __device__ u32 at(u32 rank, u32 k) const {
        if (PARTS == 1) return k * WARP;
        const u32 packet = first + k * WARP;
        return packet < part ? rank * part + packet : packets;
    }
};
