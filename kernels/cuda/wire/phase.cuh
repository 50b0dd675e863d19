// Phase: how a warp's packets travel through memory that only their sender writes, and that several ranks read.
//
// A slot is 512 bytes, a packet of each lane. Its packets are written again and again, and each 8-byte half carries its own proof of
// arrival: the upper bit, the phase, which changes with every use of the slot. So nothing is poisoned (over PCIe that would be the
// same bytes once more), there is no flag and no fence, and 8-byte atomicity is enough. The bits that phases displace travel
// in the packet of the last lane, which has no data of its own: 31 packets of a slot are data.
//
// Memory begins as zeros, and the first phase is 1. A reader meets what was written for this use of the slot or for the one before,
// nothing older: it has read that one, in the same place.
#pragma once
#include "ptx.cuh"

struct Phase {
    static constexpr u32 DATA = 31;          // packets of a slot that are data; the number of the lane that has the displaced bits
    static constexpr u32 SLOT = 32 * 16;     // bytes
    static constexpr u32 BIT = 0x80000000u;  // of the upper word of each half

    // Of use number `use` of a slot, from 0.
    __device__ static u32 of(u32 use) { return use & 1 ? 0 : BIT; }

    // By a whole warp: a packet of each lane, of which the last lane's is not sent.
    __device__ static Packet encode(Packet p, u32 phase, u32 lane) {
        const u32 low = ballot(p.w[1] & BIT), high = ballot(p.w[3] & BIT);
        if (lane == DATA) p = Packet{{low, 0, high, 0}};
        p.w[1] = (p.w[1] & ~BIT) | phase;
        p.w[3] = (p.w[3] & ~BIT) | phase;
        return p;
    }

    __device__ static bool arrived(Packet p, u32 phase) { return !(((p.w[1] ^ phase) | (p.w[3] ^ phase)) & BIT); }

    // By a whole warp, of packets that have arrived.
    __device__ static Packet decode(Packet p, u32 lane) {
        const u32 low = shfl(p.w[0], DATA), high = shfl(p.w[2], DATA);
        p.w[1] = (p.w[1] & ~BIT) | (low >> lane << 31);
        p.w[3] = (p.w[3] & ~BIT) | (high >> lane << 31);
        return p;
    }
};

// For sums: packets as they are.
struct Plain {
    __device__ static Packet decode(Packet p) { return p; }
};
