// Chunks: the packets in order, cut into PARTS equal parts, one per rank, of which the last may be short or empty, and each part into
// chunks of as many packets as a slot of the outbox carries. The channels of a launch take turns: channel c has chunks c,
// c + channels, … of every part. A lane has PACKETS packets of a chunk, WARP apart, the last lane one less.
#pragma once
#include "outbox.cuh"
#include "packet.cuh"

template <class Config, u32 PARTS>
struct Chunks {
    static constexpr u32 DATA = Phase<Config::PACKETS>::DATA;

    u32 packets, part;  // of the tensors; of a part
    u32 channel, channels, lane;
    u32 all;  // chunks of a part

    __device__ Chunks(u32 packets, u32 channel, u32 channels, u32 lane)
        : packets(packets), part((packets + PARTS - 1) / PARTS), channel(channel), channels(channels), lane(lane),
          all((part + DATA - 1) / DATA) {}

    // Of each part, of this channel.
    __device__ u32 count() const { return all > channel ? (all - channel - 1) / channels + 1 : 0; }

    // How many channels have any.
    __device__ u32 busy() const { return min_u32(all, channels); }

    // Whether this channel has the last one.
    __device__ bool last_channel() const { return (all - 1) % channels == channel; }

    // Packet number k of this lane in this channel's chunk number i, in the part of a rank; past the end of the tensors if there is none.
    __device__ u32 at(u32 i, u32 k, u32 rank = 0) const {
        const u32 place = k * WARP + lane, packet = (channel + i * channels) * DATA + place;
        return place < DATA && packet < part ? rank * part + packet : packets;
    }
};
