// Exchanges of a warp whose lanes go on together: where what follows takes all of them. Packets are numbered 0 ... PACKETS - 1; each goes
// through a buffer of its own.
#pragma once
#include "failure.cuh"

template <class Config, class Wire, class Epilogue, u32 PACKETS>
struct WarpExchange {
    typedef Packet Peers[PACKETS][PEERS<Config>];

    const Args &a;
    const Slots<Config> &slots;
    u32 buffer[PACKETS];  // its number
    u32 offset[PACKETS];  // in bytes, of packet k's slots
    u64 mine[PACKETS];

    __device__ WarpExchange(const Args &a, const Slots<Config> &slots) : a(a), slots(slots) {}

    // Which buffer packet k goes through.
    __device__ void choose(u32 k, u32 number) {
        buffer[k] = number;
        offset[k] = number * slots.pitch + k * WARP * 16;
        mine[k] = slots.mine + offset[k];
    }

    // To peer number j.
    __device__ void push(u32 k, u32 j, Packet p, bool alive) const { st_relaxed_sys_v4(slots.to[j] + offset[k], p, alive); }

    // The same to every peer.
    __device__ void push(u32 k, Packet p, bool alive) const {
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) push(k, j, p, alive);
    }

    // All peers' packets, u[k][place], by a whole warp: returns, to all lanes, whether they came to all. `use()` as in receive(), whose
    // loop this is; if not all came, `lost()` follows it. All packets are loaded before one is looked at: to wait for them one by one
    // takes a round trip for each, 0.17 us.
    template <class Use, class Lost>
    __device__ bool wait(Peers &u, Use use, Lost lost) const {
        for (;;) {
            u32 polls = 0;
            bool pending;
#pragma unroll 1
            do {
#pragma unroll
                for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
                    for (u32 j = 0; j < PEERS<Config>; j++) u[k][j] = ld_relaxed_sys_v4(mine[k] + j * slots.stride);
                typename Wire::Arrival arrival(u[0][0]);
#pragma unroll
                for (u32 i = 1; i < PACKETS * PEERS<Config>; i++) arrival.add(u[i / PEERS<Config>][i % PEERS<Config>]);
                pending = any_sync(~0u, arrival.pending());
            } while (pending & (!Config::GUARDED || ++polls <= POLLS));
            opaque(polls);
            use();
            if (!Config::GUARDED || polls <= POLLS) return true;
            bool came = true;
#pragma unroll
            for (u32 k = 0; k < PACKETS; k++)
                if (came) came = wait_slow<Config, Wire, Epilogue>(a, mine[k], slots.stride, buffer[k], Nothing());
            if (any_sync(~0u, !came)) return lost(), false;
        }
    }

    // All slots. At once when they are read: the kernel is complete when its last store has arrived.
    __device__ void poison() const {
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++) st_relaxed_sys_v4(mine[k] + j * slots.stride, Wire::empty());
    }

    // What the slow path needs to know of the partition: what did not come is NaN in the epilogue.
    struct Nothing {
        __device__ Nothing() {}
    };
};
