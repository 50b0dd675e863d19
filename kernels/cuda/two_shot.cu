// Two-shot push all-reduce: reduce-scatter, then all-gather, both by pushing.
//
// The tensor is cut into WORLD_SIZE parts of equal packets (the last ones may be short or empty); rank r
// sums part r and sends the sum to everybody. 2 * (WORLD_SIZE - 1) / WORLD_SIZE * S bytes out, two hops;
// a rank's own part never leaves its registers. The compiler front defines WORLD_SIZE, PACKETS (of each part a
// thread has), STREAM, and GUARDED (0 only to measure what guards and deadlines cost).
// Contract: block 0 of a call's first launch is the guard; the other threads times PACKETS <= capacity,
// block.x % 32 == 0; every rank passes the same numel (block and grid may differ from call to call, and between
// ranks).
//
// STREAM 0: a call is one launch, or several that do not overlap. Scatter has a buffer per parity of the channel's
// epoch, as in one_shot.cu. Gather has one: it is written only after the scatter packet of the same epoch arrived
// from the same peer, which proves that the peer's previous kernel is complete.
//
// STREAM 1: the launches of a call overlap: launch i pushes its scatter packets while launch i-1 gathers. It starts
// when some thread of every block of launch i-1 has received a packet of i-1 from every peer (launch_dependents). A
// peer's launch i-1 began when all blocks of its launch i-2 had passed griddepcontrol.wait: so its launch i-3 is
// complete, its slots are poisoned, and three scatter buffers, taken in turn, are enough. A gather packet goes
// out after our own wait (launch i-1 is complete here) and after the peer's scatter packet (its launch i-2 is
// complete): two gather buffers are enough. Every call begins with buffer 0 after a full wait. Only the peer's
// last launch before may still be running then, so no call may end with scatter buffer 0: the number of its
// launches is not 1 modulo 3 (the plan sees to it).
#include "entry.cuh"
#include "guard.cuh"

constexpr u32 GATHER = STREAM ? 3 : 2;  // its first buffer, after those of scatter

// Of a thread that did not get every packet: NaN for a result, and word to everybody.
template <class T, bool WHOLE>
__device__ __noinline__ void give_up(const Args &a, u32 first, u32 part, Wait wait) {
    griddepcontrol_wait();
    const Tensor<T, WHOLE> out(a.out, a.numel);
#pragma unroll 1
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll 1
        for (u32 rank = 0; rank < WORLD_SIZE && first + k * WARP < part; rank++)
            out.store(rank * part + first + k * WARP, NOTHING);
    stop(a, TIMEOUT, wait.culprit(a), wait.buffer, wait.waited_ns);
}

template <class T, bool WHOLE>
__device__ inline void two_shot(const Args &a) {
    if (!STREAM) griddepcontrol_launch_dependents();
    const bool follows = STREAM && a.launch > 0;
    const bool guarded = GUARDED && !follows;
    if (guarded && blockIdx.x == 0) return guard(a);
    const u32 thread = (blockIdx.x - guarded) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;
    const Tensor<T, WHOLE> in(a.in, a.numel), out(a.out, a.numel);
    const u32 part = (in.packets + WORLD_SIZE - 1) / WORLD_SIZE;
    if (first - lane >= part) return;  // an idle channel, on every rank

    const Slots slots(a, first);
    u64 epoch = a.epochs + channel * 4;
    materialize(epoch);
    Ending ending(a, first + WARP * PACKETS >= part);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots. A launch
    // that follows reads an input that was complete before the call's first launch went on.
    if (!follows) griddepcontrol_wait();
    // All loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS], theirs[PACKETS][PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u32 packet = first + k * WARP;  // lanes past the part pad: they exchange zeros and store nothing
        own[k] = packet < part ? in.load(a.rank * part + packet) : ZEROS;
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) theirs[k][j] = packet < part ? in.load(target(a, j) * part + packet) : ZEROS;
    }
    Wait wait;
    ending.look();
    const bool dead = stopped(a);
    const u32 parity = STREAM ? 0 : ld_relaxed_gpu_u32(epoch) & 1;
    const u32 scatter = STREAM ? a.launch % 3 : parity, gather = GATHER + (STREAM ? a.launch % 2 : 0);
    const u32 scattered = slots.buffer(scatter), gathered = slots.buffer(gather);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            if (!dead) push(slots.to[j] + scattered + k * WARP * 16, theirs[k][j]);
    if (follows) griddepcontrol_wait();

    Packet peers[PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u32 packet = first + k * WARP;
        const u64 mine = slots.mine + scattered + k * WARP * 16;
        Packet v[WORLD_SIZE];
        if (!receive(a, mine, slots.stride, scatter, dead, wait, peers)) return give_up<T, WHOLE>(a, first, part, wait);
        if (STREAM && k == 0) griddepcontrol_launch_dependents();
        in_rank_order(peers, own[k], a.rank, v);
        own[k] = sum<T>(v);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            push(slots.to[j] + gathered + k * WARP * 16, own[k]);
        if (packet < part) out.store(a.rank * part + packet, own[k]);
        poison(mine, slots.stride);
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u32 packet = first + k * WARP;
        const u64 mine = slots.mine + gathered + k * WARP * 16;
        if (!receive(a, mine, slots.stride, gather, false, wait, peers)) return give_up<T, WHOLE>(a, first, part, wait);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            if (packet < part) out.store(source_at(j, a.rank) * part + packet, peers[j]);
        poison(mine, slots.stride);
    }
    __syncwarp();  // every lane has read the epoch
    if (lane == 0) {
        if (!STREAM) st_relaxed_gpu_u32(epoch, parity ^ 1);
        ending.say();
    }
}

ENTRY_ALL_DTYPES(two_shot)
