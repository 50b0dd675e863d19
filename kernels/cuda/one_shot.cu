// One-shot push all-reduce: every rank sends its whole tensor to every peer and sums all of them.
//
// (WORLD_SIZE - 1) * S bytes out, one hop. WORLD_SIZE and PACKETS (of a thread) are defined by the compiler front.
// Contract: block 0 is the guard; (grid.x - 1) * block.x * PACKETS <= capacity, block.x % 32 == 0; every rank
// passes the same numel (block and grid may differ from call to call, and between ranks).
//
// Buffers: one per parity of the channel's epoch. Two are enough because (1) every lane of an active channel
// exchanges a packet with every peer in every epoch, and (2) one kernel is one epoch, and a rank pushes only
// when its earlier kernels are complete, poisoning included (griddepcontrol.wait): hearing from a peer in epoch
// e+1 allows writing the slots of epoch e there again, in epoch e+2.
#include "entry.cuh"
#include "guard.cuh"

template <class T, bool WHOLE>
__device__ inline void one_shot(const Args &a) {
    griddepcontrol_launch_dependents();
    if (blockIdx.x == 0) return guard(a);
    const u32 thread = (blockIdx.x - 1) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;
    const Tensor<T, WHOLE> in(a.in, a.numel), out(a.out, a.numel);
    if (first - lane >= in.packets) return;  // an idle channel, on every rank

    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    // The loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = in.load(first + k * WARP);
    const u64 epoch = a.epochs + channel * 4;
    bool ok = alive(a);
    const u32 parity = ld_relaxed_gpu_u32(epoch) & 1;
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            if (ok) push(a, target(a, j), parity, first + k * WARP, own[k]);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Packet peers[PEERS], v[WORLD_SIZE];
        ok = receive<0>(a, parity, channel, first + k * WARP, ok, peers);
        in_rank_order(peers, own[k], a.rank, v);
        out.store(first + k * WARP, sum<T>(v));
        poison(a, parity, first + k * WARP);
    }
    __syncwarp();  // every lane has read the epoch
    if (lane > 0) return;
    st_relaxed_gpu_u32(epoch, parity ^ 1);
    if (a.last && first + WARP * PACKETS >= in.packets) leave(a);
}

ENTRY_ALL_DTYPES(one_shot)
