// What no all-reduce through host memory can beat on this machine: the shortest exchange of packets between all ranks, and how fast
// a GPU stores and loads at once. Beside the kernels of floor.cu, whose contract holds here, but for two: `state` is an array, a
// FloorState for each block, and data[r] is what rank r stores for all others, `packets` packets. TURNS is one more constant of `Config`.
#include "floor.cu"

// A packet is its sender's epoch, four times: no data is loaded before or stored after. What flags are to floor_flag, packets are here:
// nothing is cleared, and a peer that is already in the next epoch has arrived in this one, too.
extern "C" __global__ void __launch_bounds__(512) floor_packets(const __grid_constant__ FloorArgs a) {
    griddepcontrol_launch_dependents();
    const u64 own_state = a.state + blockIdx.x * sizeof(FloorState);
    const u32 first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    griddepcontrol_wait();
    const u64 state = ld_relaxed_gpu_u64(own_state);
    if (state >> 32) return;
    const u32 epoch = u32(state) + 1, began = cycles(), turn = a.pace * (first / 32);  // as in host_one_shot.cu
    pause(began, turn);
    for (u32 i = first; i < a.packets; i += step) st_relaxed_sys_v4(a.data[a.rank] + u64(i) * 16, splat(epoch));
    pause(began, turn + a.first_poll);
    u64 started = 0;
    for (u32 i = first; i < a.packets; i += step)
#pragma unroll
        for (u32 k = 1; k < Config::WORLD_SIZE; k++) {
            const u32 peer = (a.rank + k) % Config::WORLD_SIZE;
            for (u32 polls = 1;; polls++) {
                const Packet p = ld_relaxed_sys_v4(a.data[peer] + u64(i) * 16);
                if (int(p.w[0] - epoch) >= 0 && int(p.w[1] - epoch) >= 0 && int(p.w[2] - epoch) >= 0 && int(p.w[3] - epoch) >= 0) break;
                if (polls % POLLS) continue;
                const u64 now = globaltimer();
                if (started == 0) started = now;
                if (now - started > a.timeout_ns) {
                    st_relaxed_gpu_u32(own_state + offsetof(FloorState, expired), peer + 1);
                    return;
                }
            }
        }
    __syncthreads();  // every thread has read the epoch
    if (threadIdx.x == 0) st_relaxed_gpu_u32(own_state + offsetof(FloorState, epoch), epoch);
}

// Stores of `packets` packets, and loads of as many of the next rank's, which nobody waits to have been stored: both directions of the bus.
// All of it TURNS times, as slots are written again and again.
extern "C" __global__ void __launch_bounds__(512) floor_both(const __grid_constant__ FloorArgs a) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const u64 to = a.data[a.rank], from = a.data[(a.rank + 1) % Config::WORLD_SIZE];
    u32 seen = 0;
    for (u32 turn = 0; turn < Config::TURNS; turn++)
        for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < a.packets; i += gridDim.x * blockDim.x) {
            st_relaxed_sys_v4(to + u64(i) * 16, splat(i));
            const Packet p = ld_relaxed_sys_v4(from + u64(i) * 16);
            seen |= p.w[0] & p.w[1] & p.w[2] & p.w[3];
        }
    // Never: no packet is all ones. But ptxas drops loads whose values lead to no store, whatever the source says.
    if (seen == ~0u) st_relaxed_gpu_u32(a.state + offsetof(FloorState, expired), a.rank + 1);
}
