// One-shot push all-reduce: every rank sends its whole tensor to every peer and sums all of them.
//
// (WORLD_SIZE - 1) * S bytes out, one hop. WORLD_SIZE is defined by the compiler front.
// Contract: one packet a thread; grid.x * block.x <= capacity, block.x % 32 == 0; every rank passes the
// same numel (block and grid may differ from call to call, and between ranks).
#include "entry.cuh"
#include "packet.cuh"
#include "staging.cuh"

constexpr u32 ONE_SHOT = 1;  // buffers: one per parity

template <class T>
__device__ inline void one_shot(const Args &a) {
    griddepcontrol_launch_dependents();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x, lane = index % 32;
    const Tensor<T> in(a.in, a.numel), out(a.out, a.numel);
    if (index - lane >= Tensor<T>::packets(a.numel)) return;  // an idle channel, on every rank

    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    const u64 epoch = a.epochs + index / 32 * 4;
    // The three loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own = in.load(index);
    bool ok = alive(a);
    const u32 parity = ld_relaxed_gpu_u32(epoch) & 1;
#pragma unroll
    for (u32 k = 1; k < WORLD_SIZE; k++)
        if (ok) push(a, (a.rank + k) % WORLD_SIZE, parity, index, own);
    Packet v[WORLD_SIZE];
    receive(a, ONE_SHOT, parity, index, ok, v);
    insert(v, a.rank, own);
    out.store(index, sum_in_rank_order<T>(v));
    poison(a, parity, index);
    __syncwarp();  // every lane has read the epoch
    if (lane == 0) st_relaxed_gpu_u32(epoch, parity ^ 1);
}

ENTRY_ALL_DTYPES(one_shot, one_shot)
