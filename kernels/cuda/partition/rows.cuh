// Rows: a row of the tensors belongs to a block, or to the CLUSTER blocks of a cluster, block 0 (or cluster 0) being the guard's.
//
// A row's packets form groups of WARP, and its groups are cut into PARTS equal parts, one per rank, of which the last may be short or
// empty. (One part: every rank has all groups.) A warp has PACKETS consecutive groups of each part, a thread one packet of each.
// Behind the row's end there are zeros, which are sent like data, so that every warp exchanges packets with every peer.
//
// A channel is a group of a part, with 32 slots and an epoch, as in one_shot and two_shot with one packet per thread, whose slots and
// epochs these are, too. So a warp owns PACKETS channels, whose parities may differ.
#pragma once
#include "slots.cuh"

template <class Config, class T, u32 PARTS_, u32 PACKETS_, u32 CLUSTER_>
struct Rows {
    static constexpr u32 PARTS = PARTS_, PACKETS = PACKETS_, CLUSTER = CLUSTER_;
    static constexpr u32 ROW = Config::HIDDEN / ELEMENTS<T>;  // packets of a row
    static constexpr u32 GROUPS = (ROW + WARP - 1) / WARP;
    static constexpr u32 PART = (GROUPS + PARTS - 1) / PARTS;                          // groups of a part
    static constexpr u32 WARPS = (PART + CLUSTER * PACKETS - 1) / (CLUSTER * PACKETS);  // of a block
    static constexpr bool WHOLE = ROW == WARPS * CLUSTER * PACKETS * PARTS * WARP;      // no warp has zeros

    u32 rank;
    u32 row;      // this block's, in this launch
    u32 warp;     // this one's number in the row
    u32 channel;  // its first one
    u32 lane;
    u32 begin;  // this row's first packet, in this launch

    __device__ explicit Rows(u32 rank) : rank(rank) {
        const u32 block = blockIdx.x - Config::GUARDED * CLUSTER;
        lane = threadIdx.x % WARP;
        row = block / CLUSTER;
        warp = block % CLUSTER * WARPS + threadIdx.x / WARP;
        channel = (block * WARPS + threadIdx.x / WARP) * PACKETS;
        begin = row * ROW;
        materialize(lane);
        materialize(warp);
    }

    // The index of its first slot; those of a thread are WARP apart.
    __device__ u32 slot() const { return channel * WARP + lane; }

    // Whether this warp is the last one of the launch.
    __device__ bool last_channel() const { return blockIdx.x == gridDim.x - 1 && threadIdx.x / WARP == WARPS - 1; }

    // A thread's packets are numbered by place, a compile-time constant: those of the peers' parts, then those of its own rank's.
    __device__ u32 part_of(u32 place) const { return PARTS == 1 ? 0 : place == PARTS - 1 ? rank : source_at(place, rank); }

    // This warp's group number k in a part: its number in the row, and whether it is one.
    __device__ u32 group(u32 part, u32 k) const { return part * PART + warp * PACKETS + k; }
    __device__ bool has(u32 part, u32 k) const { return WHOLE || (warp * PACKETS + k < PART && group(part, k) < GROUPS); }

    // This thread's packet in that group: its number in the row, and whether it exists.
    __device__ u32 at(u32 part, u32 k) const { return group(part, k) * WARP + lane; }
    __device__ bool exists(u32 part, u32 k) const { return WHOLE || (warp * PACKETS + k < PART && at(part, k) < ROW); }
};
