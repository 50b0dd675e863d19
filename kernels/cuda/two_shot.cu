// Two-shot push all-reduce: reduce-scatter, then all-gather, both by pushing.
//
// The tensor is cut into WORLD_SIZE parts of equal packets (the last ones may be short or empty); rank r
// sums part r and sends the sum to everybody. 2 * (WORLD_SIZE - 1) / WORLD_SIZE * S bytes out, two hops;
// a rank's own part never leaves its registers. WORLD_SIZE is defined by the compiler front.
// Contract: grid.x * block.x <= capacity, block.x % 32 == 0; every rank passes the same numel and grid.
// two_shot_*: packets of a part <= threads, one packet of each part a thread. two_shot_loop_*: any numel.
#include "entry.cuh"
#include "packet.cuh"
#include "staging.cuh"

constexpr u32 TWO_SHOT = 2, SCATTER = 0, GATHER = 1;

template <class T, bool LOOP>
__device__ inline void two_shot(const Args &a) {
    griddepcontrol_launch_dependents();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x, lane = index % 32;
    const u64 threads = gridDim.x * blockDim.x;
    const u64 part = (Tensor<T>::packets(a.numel) + WORLD_SIZE - 1) / WORLD_SIZE;
    const Tensor<T> in(a.in, a.numel), out(a.out, a.numel);
    if (index - lane >= part) return;  // an idle channel, on every rank

    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    const u64 epoch = a.epochs + index / 32 * 4;
    u32 parity = ld_relaxed_gpu_u32(epoch) & 1;
    bool ok = alive(a);
    for (u64 packet = index;;) {
        const bool inside = packet < part;  // lanes past the part pad: they exchange zeros and store nothing
        Packet v[WORLD_SIZE];
#pragma unroll
        for (u32 k = 1; k < WORLD_SIZE; k++) {
            u32 owner = (a.rank + k) % WORLD_SIZE;
            Packet p = inside ? in.load(owner * part + packet) : ZEROS;
            if (ok) push(a, owner, SCATTER, parity, index, p);
        }
        Packet own = inside ? in.load(a.rank * part + packet) : ZEROS;
#pragma unroll
        for (u32 s = 0; s < WORLD_SIZE; s++)
            if (s == a.rank) v[s] = own;
        ok = receive(a, TWO_SHOT, SCATTER, parity, index, ok, v);
        Packet sum = sum_in_rank_order<T>(v);
#pragma unroll
        for (u32 k = 1; k < WORLD_SIZE; k++)
            if (ok) push(a, (a.rank + k) % WORLD_SIZE, GATHER, parity, index, sum);
        if (inside) out.store(a.rank * part + packet, sum);
        poison(a, SCATTER, parity, index);
        ok = receive(a, TWO_SHOT, GATHER, parity, index, ok, v);
#pragma unroll
        for (u32 s = 0; s < WORLD_SIZE; s++)
            if (s != a.rank && inside) out.store(s * part + packet, v[s]);
        poison(a, GATHER, parity, index);
        parity ^= 1;
        packet += threads;
        if (!LOOP || packet - lane >= part) break;
        fence_acq_rel_sys();  // this epoch's poisoning before the next epoch's push
    }
    // The loads of the epoch by the other lanes came before their packets did.
    __syncwarp();
    if (lane == 0) st_relaxed_gpu_u32(epoch, parity);
}

ENTRY_ALL_DTYPES(two_shot, (two_shot<T, false>))
ENTRY_ALL_DTYPES(two_shot_loop, (two_shot<T, true>))
