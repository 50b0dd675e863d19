// A wire says how data travels in 16-byte packets: what a packet is encoded to and decoded from, how a receiver knows that it
// has arrived, and what an empty slot holds.
//
// Sentinel: "not arrived" is a packet in which some 32-bit word is all ones. The payload never contains that word: it is a
// NaN, and sent as another NaN. So the data is its own arrival proof: no flag, no fence, no barrier, and 4-byte atomicity is
// enough. The receiver poisons the slot again after reading.
#pragma once
#include "ptx.cuh"

struct Sentinel {
    static constexpr u32 WORD = 0xFFFFFFFFu;  // one fp32 NaN or two 16-bit NaNs; ...FE is a NaN as well, in every dtype

    __device__ static Packet encode(Packet p) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) p.w[i] = min_u32(p.w[i], WORD - 1);
        return p;
    }

    __device__ static Packet decode(Packet p) { return p; }

    // What poisons a slot; as output, NaN in every dtype.
    __device__ static Packet empty() { return splat(WORD); }

    // Whether all of several packets have arrived. The sentinel is the largest word there is: they have if all words are less.
    class Arrival {
        u32 largest;

        __device__ static u32 largest_of(Packet p) { return max_u32(max_u32(p.w[0], p.w[1]), max_u32(p.w[2], p.w[3])); }

      public:
        __device__ explicit Arrival(Packet p) : largest(largest_of(p)) {}
        __device__ void add(Packet p) { largest = max_u32(largest, largest_of(p)); }
        __device__ bool pending() const { return largest == WORD; }
    };
};
