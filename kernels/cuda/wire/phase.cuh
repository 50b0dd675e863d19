// Phase: how a warp's packets travel through memory that only their sender writes, and that several ranks read.
//
// A slot is what a warp sends at once, PACKETS packets of each lane. Slots are written again and again, and each 8-byte half of a packet
// carries its own proof of arrival: its upper bit, the phase, which changes with every use of the slot. So nothing is poisoned (over
// PCIe that would be the same bytes once more), there is no flag and no fence, and 8-byte atomicity is enough. The bits that phases
// displace travel in the last packet of the last lane, which has no data of its own: of 2 packets of 32 lanes they are 126, as
// many as it has room for.
//
// Memory begins as zeros, and the first phase is 1. A reader meets what was written for this use of the slot or for the one before,
// nothing older: it has read that one, in the same place.
#pragma once
#include "ptx.cuh"

template <u32 PACKETS>
struct Phase {
    static_assert(PACKETS == 1 || PACKETS == 2, "the displaced bits of more do not fit into one packet");
    static constexpr u32 SLOT = PACKETS * 32 * 16;    // bytes
    static constexpr u32 DATA = PACKETS * 32 - 1;     // packets of a slot that are data
    static constexpr u32 LAST = 31, BIT = 0x80000000u;  // the lane with the displaced bits; of the upper word of each half, the phase
    typedef Packet Packets[PACKETS];

    // Of use number `use` of a slot, from 0.
    __device__ static u32 of(u32 use) { return use & 1 ? 0 : BIT; }

    // By a whole warp. The last packet of the last lane holds nothing, or zeros.
    __device__ static void encode(Packets &p, u32 phase, u32 lane) {
        u32 bits[2][2] = {};  // [half][packet]
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) {
            bits[0][k] = ballot(p[k].w[1] & BIT);
            bits[1][k] = ballot(p[k].w[3] & BIT);
        }
        if (lane == LAST) p[PACKETS - 1] = Packet{{bits[0][0], bits[0][1], bits[1][0], bits[1][1]}};
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) {
            p[k].w[1] = (p[k].w[1] & ~BIT) | phase;
            p[k].w[3] = (p[k].w[3] & ~BIT) | phase;
        }
    }

    __device__ static bool arrived(Packet p, u32 phase) { return !(((p.w[1] ^ phase) | (p.w[3] ^ phase)) & BIT); }

    // By a whole warp, of packets that have arrived.
    __device__ static void decode(Packets &p, u32 lane) {
        const Packet last = p[PACKETS - 1];
        const u32 bits[2][2] = {{shfl(last.w[0], LAST), PACKETS > 1 ? shfl(last.w[1], LAST) : 0},
                                {shfl(last.w[2], LAST), PACKETS > 1 ? shfl(last.w[3], LAST) : 0}};
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) {
            p[k].w[1] = (p[k].w[1] & ~BIT) | (bits[0][k] >> lane << 31);
            p[k].w[3] = (p[k].w[3] & ~BIT) | (bits[1][k] >> lane << 31);
        }
    }
};

// For sums: packets as they are.
struct Plain {
    __device__ static Packet decode(Packet p) { return p; }
};
