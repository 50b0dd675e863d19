// Pipelined two-shot push all-reduce, for any size through bounded staging memory.
//
// Parts and bytes as in two_shot.cu, but a block works through its chunks of every part in steps, and in
// one step it scatters chunk s, reduces and gathers chunk s-1, and copies out chunk s-2: both directions of
// the links stay busy. Data is plain packets; one flag per block, peer and step, released after the data,
// tells that a step's data is there AND that everything read in that step may be overwritten. With two
// buffers per (phase, source), what is written in step s+1 was last read in step s-1 or earlier (scatter:
// written in s, read in s+1; gather: written in s, read in s+1), and all peers have released step s.
// A new call starts again at step 0: its first scatter needs the buffers that peers read in the last but
// one step of the call before, whose flags were awaited; its first gather comes after a flag of this call.
//
// Contract: channel = block; block.x is the same in all calls of a communicator and on all ranks, a chunk
// is block.x packets; grid.x * block.x <= capacity and grid.x is the same on all ranks; a.epochs holds a
// step counter per block; flags lie behind the slots: u32[blocks][WORLD_SIZE], at most FLAG_BLOCKS blocks.
#include "entry.cuh"
#include "packet.cuh"
#include "staging.cuh"

constexpr u32 PIPELINED = 5, SCATTER = 0, GATHER = 1;

__device__ inline u64 flag(const Args &a, u32 owner, u32 source) {
    return slot(a, owner, 2, 0, 0, 0) + (u64(blockIdx.x) * WORLD_SIZE + source) * 4;
}

// All threads of the block: publish what the block has written and read so far as `step`, and wait until
// every peer has published as much. Returns whether all did.
__device__ inline bool exchange(const Args &a, u32 step, bool ok) {
    __syncthreads();
    bool late = false;
    if (threadIdx.x < WORLD_SIZE && threadIdx.x != a.rank && ok) {
        fence_acq_rel_sys();  // the block's accesses (ordered before by the barrier) before the flag
        st_relaxed_sys_u32(flag(a, threadIdx.x, a.rank), step);
        u64 started = 0;
        for (u32 spins = 1; int(ld_relaxed_sys_u32(flag(a, a.rank, threadIdx.x)) - step) < 0; spins++)
            if (spins % 64 == 0 && give_up(a, started, PIPELINED, 0, 1u << threadIdx.x)) {
                late = true;
                break;
            }
        fence_acq_rel_sys();  // the flag before the block's next accesses
    }
    return !__syncthreads_or(late || !ok);
}

template <class T>
__device__ inline void pipelined(const Args &a) {
    griddepcontrol_launch_dependents();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    const u64 part = Tensor<T>::part(a.numel), threads = gridDim.x * blockDim.x;
    const Tensor<T> in(a.in, a.numel), out(a.out, a.numel);
    const u64 first = u64(blockIdx.x) * blockDim.x;
    if (first >= part) return;  // an idle channel, on every rank
    const u64 chunks = (part - first + threads - 1) / threads;

    // Before this, an earlier kernel of the stream may still be writing the input, the counter or the slots.
    griddepcontrol_wait();
    const u64 counter = a.epochs + blockIdx.x * 4;
    const u32 base = ld_relaxed_gpu_u32(counter) + 1;
    bool ok = !__syncthreads_or(!alive(a));
    for (u64 step = 0; step < chunks + 2; step++) {
        const u64 ahead = step * threads + index;  // this thread's packet of a part: scattered in this step
        const u32 parity = step & 1;
        if (ok && ahead < part) {
#pragma unroll
            for (u32 k = 1; k < WORLD_SIZE; k++) {
                u32 owner = (a.rank + k) % WORLD_SIZE;
                st_relaxed_sys_v4(slot(a, owner, SCATTER, parity, a.rank, index), in.load(owner * part + ahead));
            }
        }
        const u64 middle = ahead - threads;  // reduced and gathered in this step
        if (step >= 1 && middle < part) {
            Packet v[WORLD_SIZE];
            fetch(a, SCATTER, parity ^ 1, index, ok, v);
            Packet own = in.load(a.rank * part + middle);
            insert(v, a.rank, own);
            Packet sum = sum_in_rank_order<T>(v);
            if (ok) {
#pragma unroll
                for (u32 k = 1; k < WORLD_SIZE; k++)
                    st_relaxed_sys_v4(slot(a, (a.rank + k) % WORLD_SIZE, GATHER, parity, a.rank, index), sum);
            }
            out.store(a.rank * part + middle, sum);
        }
        const u64 behind = middle - threads;  // copied out in this step
        if (step >= 2 && behind < part) {
            Packet v[WORLD_SIZE];
            fetch(a, GATHER, parity ^ 1, index, ok, v);
#pragma unroll
            for (u32 s = 0; s < WORLD_SIZE; s++)
                if (s != a.rank) out.store(s * part + behind, v[s]);
        }
        if (step <= chunks) ok = exchange(a, base + u32(step), ok);
    }
    if (threadIdx.x == 0 && ok) st_relaxed_gpu_u32(counter, base + u32(chunks));
}

ENTRY_ALL_DTYPES(pipelined, pipelined)
