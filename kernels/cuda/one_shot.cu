// One-shot push all-reduce: every rank sends its whole tensor to every peer and sums all of them.
//
// (WORLD_SIZE - 1) * S bytes out, one hop. The compiler front defines WORLD_SIZE, PACKETS (of a thread) and
// GUARDED (0 only to measure what guards and deadlines cost).
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
    if (GUARDED && blockIdx.x == 0) return guard(a);
    griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - GUARDED) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;
    Tensor<T, WHOLE> in(a.in, a.numel, first), out(a.out, a.numel, first);
    if (first - lane >= in.packets) return;  // an idle channel, on every rank

    const Slots slots(a, first);
    u64 own_channel = a.channels + channel * sizeof(Channel);
    materialize(in.address);
    materialize(out.address);
    materialize(own_channel);
    u32 rank = a.rank;
    materialize(rank);
    Ending ending(a, first + WARP * PACKETS >= in.packets);
    if (GUARDED) materialize(ending.count);
    const bool aborted = stopped(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    // The loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = sendable(in.load(k * WARP));
    const u64 state = ld_relaxed_gpu_v2_u32(own_channel);
    __syncwarp();  // every lane has read the epoch; after the loops below, bringing them together would take 0.1 us
    const u32 parity = u32(state) & 1;
    const u32 buffer = slots.buffer(parity);
    const bool alive = !(GUARDED && aborted | u32(state >> 32));
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            st_relaxed_sys_v4(slots.to[j] + buffer + k * WARP * 16, own[k], alive);
    ending.look();
    if (!alive) return give_up<T, WHOLE, 1>(a, first, in.packets, Wait());
    if (lane == 0) st_relaxed_gpu_u32(own_channel + FIELD(Channel, epoch), parity ^ 1);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + buffer + k * WARP * 16;
        Packet peers[PEERS], result;
        const auto reduce = [&] {
            result = sum<T>(peers, own[k], rank);
            opaque(result);
        };
        const auto late = [&] { wait_long<T, WHOLE, 1>(a, mine, slots.stride, parity, first, in.packets); };
        receive(mine, slots.stride, peers, reduce, late);
        out.store(k * WARP, result);
        poison(mine, slots.stride);
    }
    if (lane == 0) ending.say();
}

ENTRY_ALL_DTYPES(one_shot)
