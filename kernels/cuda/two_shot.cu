// Two-shot push all-reduce: reduce-scatter, then all-gather, both by pushing.
//
// The tensor is cut into WORLD_SIZE parts of equal packets (the last ones may be short or empty); rank r
// sums part r and sends the sum to everybody. 2 * (WORLD_SIZE - 1) / WORLD_SIZE * S bytes out, two hops;
// a rank's own part never leaves its registers. WORLD_SIZE is defined by the compiler front.
// Contract: one packet of each part a thread; grid.x * block.x <= capacity, block.x % 32 == 0; every rank
// passes the same numel (block and grid may differ from call to call, and between ranks).
#include "entry.cuh"
#include "packet.cuh"
#include "staging.cuh"

constexpr u32 TWO_SHOT = 2, GATHER = 2;  // buffers: scatter one per parity, then gather

template <class T>
__device__ inline void two_shot(const Args &a) {
    griddepcontrol_launch_dependents();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x, lane = index % 32;
    const u64 part = Tensor<T>::part(a.numel);
    const Tensor<T> in(a.in, a.numel), out(a.out, a.numel);
    if (index - lane >= part) return;  // an idle channel, on every rank

    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    const u64 epoch = a.epochs + index / 32 * 4;
    const bool inside = index < part;  // lanes past the part pad: they exchange zeros and store nothing
    // All loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet mine[WORLD_SIZE];  // of the part of rank (a.rank + k) % WORLD_SIZE
#pragma unroll
    for (u32 k = 0; k < WORLD_SIZE; k++) {
        u32 owner = (a.rank + k) % WORLD_SIZE;
        mine[k] = inside ? in.load(owner * part + index) : ZEROS;
    }
    bool ok = alive(a);
    const u32 parity = ld_relaxed_gpu_u32(epoch) & 1;
#pragma unroll
    for (u32 k = 1; k < WORLD_SIZE; k++)
        if (ok) push(a, (a.rank + k) % WORLD_SIZE, parity, index, mine[k]);
    Packet v[WORLD_SIZE];
    ok = receive(a, TWO_SHOT, parity, index, ok, v);
    insert(v, a.rank, mine[0]);
    Packet sum = sum_in_rank_order<T>(v);
#pragma unroll
    for (u32 k = 1; k < WORLD_SIZE; k++)
        if (ok) push(a, (a.rank + k) % WORLD_SIZE, GATHER, index, sum);
    if (inside) out.store(a.rank * part + index, sum);
    poison(a, parity, index);
    receive(a, TWO_SHOT, GATHER, index, ok, v);
#pragma unroll
    for (u32 s = 0; s < WORLD_SIZE; s++)
        if (s != a.rank && inside) out.store(s * part + index, v[s]);
    poison(a, GATHER, index);
    __syncwarp();  // every lane has read the epoch
    if (lane == 0) st_relaxed_gpu_u32(epoch, parity ^ 1);
}

ENTRY_ALL_DTYPES(two_shot, two_shot)
