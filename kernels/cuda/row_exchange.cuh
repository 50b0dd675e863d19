// One word per place from the warps of a row to all of them, through shared memory: sums of squares by group, maxima by warp.
//
// All warps of the row send theirs, also those whose packets did not come, which send NaN: nobody waits for ever.
//
// In a block, a barrier tells that all have. Across a cluster each block has a memory barrier (an mbarrier), for one phase, that counts the
// bytes that arrive: blocks store into each other's memory not before all have begun, and none ends before it has all words itself. (A
// barrier of the cluster with release and acquire would first wait for this thread's stores to global memory: 0.3 us.)
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
    static constexpr u32 LANES = WORDS / 4;                  // that together read all, four words each
    static constexpr u32 BARRIER = CLUSTER > 1 ? 4 : 0;      // words before those: an mbarrier, padded
    static constexpr u32 SHARED_WORDS = BARRIER + WORDS;

    u32 address;  // in shared memory, of a multiple of 16 bytes
    u32 there;    // in block number `lane` of the cluster

    // Before the cluster meets (cluster_arrive, cluster_wait), and that before the first `send`.
    __device__ void init(u32 at, u32 lane) {
        address = at;
#if __CUDA_ARCH__ >= 900
        if (CLUSTER == 1) return;
        if (threadIdx.x == 0) mbarrier_init(address, 4 * USED);
        there = mapa(address, lane % CLUSTER);
        materialize(there);
#endif
    }

    // By a whole warp: lane l < CLUSTER writes to block l.
    __device__ void send(u32 place, u32 word, u32 lane) const {
        const u32 offset = 4 * (BARRIER + place);
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) {
            if (lane < CLUSTER) st_async_u32(there + offset, word, there);
            return;
        }
#endif
        if (lane == 0) st_shared_u32(address + offset, word);
    }

    // By all threads of the row, when each has sent what it has to: this lane's consecutive words, of those of all.
    __device__ Packet receive(u32 lane) const {
#if __CUDA_ARCH__ >= 900
        if (CLUSTER > 1) {
            mbarrier_wait(address);
            __syncwarp();
        } else
#endif
            __syncthreads();
        const u32 first = lane % LANES * 4;
        Packet words = ld_shared_v4(address + 4 * (BARRIER + first));
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (USED != WORDS && first + i >= USED) words.w[i] = 0;
        return words;
    }
};

// All blocks of the row have begun: between the two there may be work.
template <u32 CLUSTER>
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) barrier_cluster_arrive_relaxed();
#endif
}
template <u32 CLUSTER>
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) barrier_cluster_wait();
#endif
}
