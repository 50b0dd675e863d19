// One word per place from the warps of a row to all of them, through shared memory and a barrier: sums of squares by group, maxima by warp.
//
// All threads of the row come to the barrier, also those whose packets did not come, which send NaN: nobody waits for ever. Blocks of a
// cluster write into each other's memory: not before all have begun, and none ends before all have written.
//
// Not by polling the words, as slots are polled: a block of 16 warps that poll shared memory can keep some of its own warps from running,
// for seconds (seen on sm_90 with two such blocks on a multiprocessor).
#pragma once
#include "slots.cuh"

__device__ constexpr u32 power_of_two(u32 least) { return least <= 4 ? 4 : 2 * power_of_two((least + 1) / 2); }

// USED places, padded with zeros.
template <u32 USED, u32 CLUSTER>
struct RowExchange {
    static constexpr u32 WORDS = power_of_two(USED);
    static constexpr u32 READS = WORDS < 16 ? WORDS / 4 : 4;  // of four words each, by a thread
    static constexpr u32 LANES = WORDS / READS / 4;           // that together read all

    u32 address;  // in shared memory

    // All blocks of the row have begun: between `begin` and `begun` there may be work. Before the first `send`.
    __device__ static void begin() {
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) barrier_cluster_arrive();
#endif
    }
    __device__ static void begun() {
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) barrier_cluster_wait();
#endif
    }

    // By a whole warp: lane l < CLUSTER writes to block l.
    __device__ void send(u32 place, u32 word, u32 lane) const {
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) {
            if (lane < CLUSTER) st_shared_cluster_u32(mapa(address + 4 * place, lane), word);
            return;
        }
#endif
        if (lane == 0) st_shared_u32(address + 4 * place, word);
    }

    // By all threads of the row, when each has sent what it has to: this lane's consecutive words, of those of all.
    __device__ void receive(u32 lane, u32 (&words)[4 * READS]) const {
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) {
            __syncwarp();  // the barrier wants whole warps
            barrier_cluster_arrive();
            barrier_cluster_wait();
        } else
#endif
            __syncthreads();
        const u32 first = lane % LANES * (READS * 4);
#pragma unroll
        for (u32 i = 0; i < READS; i++) {
            const Packet p = ld_shared_v4(address + 4 * first + 16 * i);
#pragma unroll
            for (u32 j = 0; j < 4; j++) words[4 * i + j] = USED == WORDS || first + 4 * i + j < USED ? p.w[j] : 0;
        }
    }
};
