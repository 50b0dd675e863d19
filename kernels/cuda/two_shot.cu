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
// from the same peer, which proves that the peer's previous kernel is complete. These are the last three buffers of
// STREAM 1, if a communicator has both forms, and the epochs are the same, too.
//
// STREAM 1: the launches of a call overlap: launch i pushes its scatter packets while launch i-1 gathers. It starts
// when some thread of every block of launch i-1 has received a packet of i-1 from every peer (launch_dependents), or
// all have given up, and said so before they ended. A peer's launch i-1 began when all blocks of its launch i-2 had passed
// griddepcontrol.wait: so its launch i-3 is complete, its slots are poisoned, and three scatter buffers, taken in turn,
// are enough. A gather packet goes out after our own wait (launch i-1 is complete here) and after the peer's scatter
// packet (its launch i-2 is complete): two gather buffers are enough.
//
// A call begins after a full wait, but a peer may still be in its last launch before. So the first launch scatters through
// the buffer of the channel's parity, as STREAM 0 does, and the last one through that of the other parity, which leaves
// the epoch as it is: the next call, of either form, begins with another buffer than this one ended with. The last launch's
// gather buffer is always the same (the host sees to all that: v2.launches; the number of launches is not 1 modulo 3).
// The other two buffers may lie over the slots of other algorithms. What was pushed into them came from a launch before the
// last: who has completed a call has gather packets of its last launch from every peer, sent when that peer's launch before
// was complete. And they are pushed into only after a scatter packet of this call has come from every peer, whose
// earlier calls are complete then.
#include "entry.cuh"
#include "guard.cuh"

template <class T, bool WHOLE>
__device__ inline void two_shot(const Args &a) {
    const bool follows = STREAM && a.launch > 0;
    const bool guarded = GUARDED && !follows;
    if (guarded && blockIdx.x == 0) return guard(a);
    if (!STREAM) griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - guarded) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;
    const Tensor<T, WHOLE> in(a.in, a.numel), out(a.out, a.numel);
    const u32 part = (in.packets + WORLD_SIZE - 1) / WORLD_SIZE;
    if (first - lane >= part) return;  // an idle channel, on every rank
    // Packet number k of that rank's part. Lanes past its end pad: they exchange zeros and store nothing.
    const auto at = [&](u32 rank, u32 k) {
        const u32 packet = first + k * WARP;
        return packet < part ? rank * part + packet : in.packets;
    };

    const Slots slots(a, first);
    u64 own_channel = a.channels + channel * sizeof(Channel);
    materialize(own_channel);
    u32 rank = a.rank;
    materialize(rank);
    Ending ending(a, first + WARP * PACKETS >= part);
    const bool aborted = stopped(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots. A launch
    // that follows reads an input that was complete before the call's first launch went on.
    if (!follows) griddepcontrol_wait();
    // All loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS], theirs[PACKETS][PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        own[k] = in.load(at(rank, k));
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) theirs[k][j] = sendable(in.load(at(target(a, j), k)));
    }
    const u64 state = ld_relaxed_gpu_v2_u32(own_channel);
    __syncwarp();  // every lane has read the epoch; after the loops below, bringing them together would take 0.1 us
    const u32 parity = u32(state) & 1;
    const u32 scatter = STREAM ? a.scatter ^ (parity & a.scatter >> 1) : parity;  // 2 and 3 change places with the parity
    const u32 gather = STREAM ? a.gather : 2;
    const u32 scattered = slots.buffer(scatter), gathered = slots.buffer(gather);
    const bool alive = !(GUARDED && aborted | u32(state >> 32));
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            st_relaxed_sys_v4(slots.to[j] + scattered + k * WARP * 16, theirs[k][j], alive);
    ending.look();
    if (!alive) return give_up<T, WHOLE, WORLD_SIZE>(a, first, part, Wait());
    if (!STREAM && lane == 0) st_relaxed_gpu_u32(own_channel + FIELD(Channel, epoch), parity ^ 1);
    if (follows) griddepcontrol_wait();

    Packet peers[PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + scattered + k * WARP * 16;
        Packet result;
        const auto reduce = [&] {
            result = sendable(sum<T>(peers, own[k], rank));
            opaque(result);
        };
        const auto late = [&] { wait_long<T, WHOLE, WORLD_SIZE>(a, mine, slots.stride, scatter, first, part); };
        receive(mine, slots.stride, peers, reduce, late);
        if (STREAM && k == 0) griddepcontrol_launch_dependents();
        own[k] = result;
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            st_relaxed_sys_v4(slots.to[j] + gathered + k * WARP * 16, own[k]);
        out.store(at(rank, k), own[k]);
        poison(mine, slots.stride);
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + gathered + k * WARP * 16;
        const auto late = [&] { wait_long<T, WHOLE, WORLD_SIZE>(a, mine, slots.stride, gather, first, part); };
        receive(mine, slots.stride, peers, [] {}, late);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            out.store(at(source_at(j, rank), k), peers[j]);
        poison(mine, slots.stride);
    }
    if (lane == 0) ending.say();
}

ENTRY_ALL_DTYPES(two_shot)
