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
// when some thread of every block of launch i-1 has received a packet of i-1 from every peer (launch_dependents), or
// all have given up, and said so before they ended. A peer's launch i-1 began when all blocks of its launch i-2 had passed
// griddepcontrol.wait: so its launch i-3 is complete, its slots are poisoned, and three scatter buffers, taken in turn,
// are enough. A gather packet goes out after our own wait (launch i-1 is complete here) and after the peer's scatter
// packet (its launch i-2 is complete): two gather buffers are enough.
//
// A call begins after a full wait, but a peer may still be in its last launch before. So the first launch has a
// scatter buffer of its own, and so has the last; and the last launch's gather buffer is always the same (the host sees to
// all that: v2.launches; the number of launches is not 1 modulo 3). The other two buffers may lie over the slots of other
// algorithms. What was pushed into them came from a launch before the last: who has completed a call has
// gather packets of its last launch from every peer, sent when that peer's launch before was complete. And they are
// pushed into only after a scatter packet of this call has come from every peer, whose earlier calls are complete then.
#include "entry.cuh"
#include "guard.cuh"

// What a thread has, which is the same wherever it stands.
template <class T, bool WHOLE>
struct Thread {
    const Args &a;
    bool follows, guarded;
    u32 lane, channel;
    u32 first;  // packet of each part; the others follow at distances of a warp
    Tensor<T, WHOLE> in, out;
    u32 part;  // packets

    __device__ Thread(const Args &a) : a(a), in(a.in, a.numel), out(a.out, a.numel) {
        follows = STREAM && a.launch > 0;
        guarded = GUARDED && !follows;
        const u32 thread = (blockIdx.x - guarded) * blockDim.x + threadIdx.x;
        lane = thread % WARP, channel = thread / WARP;
        first = channel * WARP * PACKETS + lane;
        part = (in.packets + WORLD_SIZE - 1) / WORLD_SIZE;
    }
    __device__ bool idle() const { return first - lane >= part; }  // on every rank
    __device__ bool in_last_channel() const { return first + WARP * PACKETS >= part; }
    __device__ u64 state() const { return a.channels + channel * sizeof(Channel); }
    __device__ u32 scatter(u32 parity) const { return STREAM ? a.scatter : parity; }
    __device__ u32 gather() const { return STREAM ? a.gather : 2; }

    // Packet number k of this rank's part or a peer's; lanes past its end pad: they exchange zeros and store nothing.
    __device__ Packet own(u32 k) const { return in.load(packet(k, a.rank)); }
    __device__ Packet theirs(u32 k, u32 j) const { return in.load(packet(k, target(a, j))); }
    __device__ u32 packet(u32 k, u32 rank) const {
        const u32 packet = first + k * WARP;
        return packet < part ? rank * part + packet : in.packets;
    }

    // Packet number k of our part has come from every peer, or of their parts.
    __device__ void scattered(u32 k, Packet own, const Packet (&peers)[PEERS], u64 mine, const Slots &slots, u32 gathered) const {
        if (STREAM && k == 0) griddepcontrol_launch_dependents();
        Packet v[WORLD_SIZE];
        in_rank_order(peers, own, a.rank, v);
        own = sum<T>(v);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) push(slots.to[j] + gathered + k * WARP * 16, own);
        out.store(packet(k, a.rank), own);
        poison(mine, slots.stride);
    }
    __device__ void gathered(u32 k, const Packet (&peers)[PEERS], u64 mine, u32 stride) const {
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) out.store(packet(k, source_at(j, a.rank)), peers[j]);
        poison(mine, stride);
    }
    __device__ void leave(u64 state, u32 parity, const Ending &ending) const {
        __syncwarp();  // every lane has read the epoch
        if (lane > 0) return;
        if (!STREAM) st_relaxed_gpu_u32(state + FIELD(Channel, epoch), parity ^ 1);
        ending.say();
    }
};

// The same from `step` on, which counts the packets to be received, for as long as it takes (see one_shot.cu).
template <class T, bool WHOLE>
__device__ __noinline__ void two_shot_late(const Args &a, u32 step, bool dead) {
    griddepcontrol_wait();
    const Thread<T, WHOLE> thread(a);
    const Slots slots(a, thread.first);
    Ending ending(a, thread.in_last_channel());
    ending.look();
    const u32 parity = ld_relaxed_gpu_u32(thread.state() + FIELD(Channel, epoch)) & 1;
    Wait wait;
#pragma unroll 1
    for (; step < 2 * PACKETS; step++) {
        const u32 k = step % PACKETS;
        wait.buffer = step < PACKETS ? thread.scatter(parity) : thread.gather();
        const u64 mine = slots.mine + slots.buffer(wait.buffer) + k * WARP * 16;
        Packet peers[PEERS];
        if (dead || !wait.receive(a, mine, slots.stride, peers))
            return give_up<T, WHOLE, WORLD_SIZE>(a, thread.out, thread.first, thread.part, wait);
        if (step < PACKETS) thread.scattered(k, thread.own(k), peers, mine, slots, slots.buffer(thread.gather()));
        else thread.gathered(k, peers, mine, slots.stride);
    }
    thread.leave(thread.state(), parity, ending);
}

template <class T, bool WHOLE>
__device__ inline void two_shot(const Args &a) {
    const Thread<T, WHOLE> thread(a);
    if (thread.guarded && blockIdx.x == 0) return guard(a);
    if (!STREAM) griddepcontrol_launch_dependents();
    if (thread.idle()) return;

    const Slots slots(a, thread.first);
    u64 state = thread.state();
    materialize(state);
    Ending ending(a, thread.in_last_channel());
    const bool aborted = stopped(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots. A launch
    // that follows reads an input that was complete before the call's first launch went on.
    if (!thread.follows) griddepcontrol_wait();
    // All loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS], theirs[PACKETS][PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        own[k] = thread.own(k);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) theirs[k][j] = thread.theirs(k, j);
    }
    ending.look();
    const u64 epoch_stopped = ld_relaxed_gpu_v2_u32(state);
    const u32 parity = u32(epoch_stopped) & 1;
    const u32 scatter = slots.buffer(thread.scatter(parity)), gather = slots.buffer(thread.gather());
    if (GUARDED && aborted | epoch_stopped >> 32) return two_shot_late<T, WHOLE>(a, 0, true);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) push(slots.to[j] + scatter + k * WARP * 16, theirs[k][j]);
    if (thread.follows) griddepcontrol_wait();

    Packet peers[PEERS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + scatter + k * WARP * 16;
        if (!receive(mine, slots.stride, peers)) return two_shot_late<T, WHOLE>(a, k, false);
        thread.scattered(k, own[k], peers, mine, slots, gather);
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + gather + k * WARP * 16;
        if (!receive(mine, slots.stride, peers)) return two_shot_late<T, WHOLE>(a, PACKETS + k, false);
        thread.gathered(k, peers, mine, slots.stride);
    }
    thread.leave(state, parity, ending);
}

ENTRY_ALL_DTYPES(two_shot)
