// What no all-reduce can beat on this machine: the shortest exchange between all ranks, and the rate of stores.
//
// Measured by the benchmark, never used by a communicator. `Config` is the compiler front's: a struct of the compile-time
// constant WORLD_SIZE.
// Contract: all three with one and the same FloorArgs; floor_flag with one block of 32 threads.
#include "layout.cuh"
#include "abi_constants.cuh"

// The kernel argument, by value.
struct FloorArgs {
    u64 flags[MAX_RANKS];  // of each rank, as mapped here: a u32 per source, FLAG_STRIDE bytes apart
    u64 data[MAX_RANKS];   // of each rank, as mapped here: `packets` packets per source
    u64 state;             // FloorState, local
    u64 timeout_ns;        // of one wait
    u32 rank;
    u32 packets;
    u32 pace;        // cycles from a warp's stores to those of the next one
    u32 first_poll;  // cycles from a warp's stores to its first poll
};

// One load reads both, so that a check for expiry costs nothing.
struct FloorState {
    u32 epoch;
    u32 expired;  // 1 + the rank that did not arrive; from then on kernels neither store nor wait
};

#include "floor_layout.cuh"

extern "C" __global__ void floor_empty(const __grid_constant__ FloorArgs a) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
}

// One flag to every peer, and wait for theirs. A flag is its sender's epoch, which only grows: nothing is ever
// cleared, and a peer that is already in the next epoch has arrived in this one, too. Memory that nobody has
// written holds 0 or -1; the first epoch is 1.
extern "C" __global__ void floor_flag(const __grid_constant__ FloorArgs a) {
    griddepcontrol_launch_dependents();
    const u32 peer = threadIdx.x < Config::WORLD_SIZE ? threadIdx.x : a.rank;
    u64 to = a.flags[peer] + a.rank * FLAG_STRIDE, from = a.flags[a.rank] + peer * FLAG_STRIDE;
    asm volatile("" : "+l"(to), "+l"(from));  // computed while the epoch is on its way, not after
    griddepcontrol_wait();  // the epoch is written by the kernel before
    const u64 state = ld_relaxed_gpu_u64(a.state);
    if (state >> 32) return;
    const u32 epoch = u32(state) + 1;
    if (peer != a.rank) {
        st_relaxed_sys_u32(to, epoch);
        u64 started = 0;
        for (u32 polls = 1; int(ld_relaxed_sys_u32(from) - epoch) < 0; polls++) {
            if (polls % POLLS) continue;
            const u64 now = globaltimer();
            if (started == 0) started = now;
            if (now - started > a.timeout_ns) {
                st_relaxed_gpu_u32(a.state + offsetof(FloorState, expired), peer + 1);
                break;
            }
        }
    }
    __syncwarp();
    if (threadIdx.x == 0) st_relaxed_gpu_u32(a.state + offsetof(FloorState, epoch), epoch);
}

// 16-byte stores to all peers at once, (WORLD_SIZE - 1) * packets of them; complete when the kernel is.
extern "C" __global__ void __launch_bounds__(512) floor_store(const __grid_constant__ FloorArgs a) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    constexpr u32 WORLD_SIZE = Config::WORLD_SIZE;
    u64 to[WORLD_SIZE];
#pragma unroll
    for (u32 k = 1; k < WORLD_SIZE; k++) to[k] = a.data[(a.rank + k) % WORLD_SIZE] + u64(a.rank) * a.packets * 16;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < a.packets; i += gridDim.x * blockDim.x) {
        const Packet p = splat(i);
#pragma unroll
        for (u32 k = 1; k < WORLD_SIZE; k++) st_relaxed_sys_v4(to[k] + u64(i) * 16, p);
    }
}
