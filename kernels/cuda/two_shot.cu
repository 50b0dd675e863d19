// Two-shot push all-reduce: reduce-scatter, then all-gather, both by pushing.
//
// The tensor is cut into WORLD_SIZE parts; rank r sums part r and sends the sum to every peer.
// 2 * (WORLD_SIZE - 1) / WORLD_SIZE * S bytes out, two hops; a rank's own part never leaves its registers.
// Contract: block 0 of a call's first launch is the guard (if GUARDED, which is 0 only to measure what guards and deadlines
// cost); the other threads times PACKETS <= capacity, block.x % 32 == 0; every rank passes the same numel (block and grid may
// differ from call to call, and between ranks).
//
// STREAM 0: a call is one launch, or several that do not overlap. Scatter has a buffer per parity of the channel's epoch, as in
// one_shot.cu. Gather has one: it is written only after the scatter packet of the same epoch arrived from the same peer, which
// proves that the peer's previous kernel is complete. These are the last three buffers of STREAM 1, if a communicator has both
// forms, and the epochs are the same, too.
//
// STREAM 1: the launches of a call overlap: launch i pushes its scatter packets while launch i-1 gathers. It starts when, in
// every block of launch i-1, some thread has received a packet of i-1 from every peer (launch_dependents), or all threads have
// given up, after setting the abort code. A peer's launch i-1 began when all blocks of its launch i-2 had passed
// griddepcontrol.wait: so its launch i-3 is complete, its slots are poisoned, and three scatter buffers, used in turn, are
// enough. A gather packet goes out after our own wait (launch i-1 is complete here) and after the peer's scatter packet (its
// launch i-2 is complete): two gather buffers are enough.
//
// A call begins after a full wait, but a peer may still be in its last launch of the call before. So the first launch scatters
// through the buffer of the channel's parity, as STREAM 0 does, and the last one through that of the other parity, which leaves
// the epoch as it is: the next call, of either form, begins with another buffer than this one ended with. The last launch's
// gather buffer is always the same. (The host assigns the buffers: policy/nvlink.launches. The number of launches is not 1 modulo 3.)
//
// The other two buffers may alias the slots of other algorithms. What was pushed into them came from a launch before the last:
// a rank that has completed a call has gather packets of its last launch from every peer, sent when that peer's launch before
// was complete. And they are pushed into only after a scatter packet of this call has come from every peer, whose earlier calls
// are complete then.
#include "entry.cuh"
#include "epilogue/store.cuh"
#include "exchange.cuh"
#include "guard.cuh"
#include "partition/flat.cuh"
#include "wire/sentinel.cuh"

template <class Config, class T, bool WHOLE, class Wire = Sentinel, class Partition = Flat<Config, Config::WORLD_SIZE>,
          class Epilogue = Store<T, WHOLE>>
__device__ inline void two_shot(const Args &a) {
    constexpr u32 PACKETS = Config::PACKETS;
    constexpr bool STREAM = Config::STREAM;
    const bool follows = STREAM && a.launch > 0;
    const bool guarded = Config::GUARDED && !follows;
    if (guarded && blockIdx.x == 0) return guard<Config>(a);
    if (!STREAM) griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - guarded) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;  // of this thread's slots, which are WARP apart
    const Partition partition(packets_of<T>(a.numel), first);
    if (partition.idle(lane)) return;
    const Tensor<T, WHOLE> in(a.input, a.numel, partition.origin());
    Epilogue epilogue(a, partition);

    const Slots<Config> slots(a, first);
    Epoch<Config> epoch(a, channel);
    materialize(epoch.address);
    u32 rank = a.rank;
    materialize(rank);
    CompletionCounter<Config> counter(a, partition.last_channel());
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots. A launch
    // that follows reads an input that was complete before the call's first launch went on.
    if (!follows) griddepcontrol_wait();

    // All loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS], theirs[PACKETS][PEERS<Config>];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        own[k] = in.load(partition.at(rank, k));
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) theirs[k][j] = Wire::encode(in.load(partition.at(target<Config>(a, j), k)));
    }
    epoch.load(aborted);
    typedef Exchange<Config, Wire, Epilogue, typename Partition::Share> Hop;
    // Buffers 2 and 3 change places with the parity.
    const Hop scatter(a, slots, partition, STREAM ? a.scatter ^ (epoch.parity & a.scatter >> 1) : epoch.parity);
    const Hop gather(a, slots, partition, STREAM ? a.gather : 2);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) scatter.push(k, j, theirs[k][j], epoch.alive);
    counter.load();
    if (!epoch.alive) return give_up<Config, Epilogue, typename Partition::Share>(a, partition, Wait());
    if (!STREAM && lane == 0) epoch.advance();
    if (follows) griddepcontrol_wait();

    Packet peers[PEERS<Config>];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Packet result;
        scatter.wait(k, peers, [&] {
            result = Wire::encode(sum<T, Wire>(peers, own[k], rank));
            opaque(result);
        });
        if (STREAM && k == 0) griddepcontrol_launch_dependents();
        gather.push(k, result, true);
        epilogue.take(partition.at(rank, k), Wire::decode(result));
        scatter.poison(k);
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        gather.wait(k, peers, [] {});
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) epilogue.take(partition.at(source_at(j, rank), k), Wire::decode(peers[j]));
        gather.poison(k);
    }
    epilogue.finish();
    if (lane == 0) counter.publish();
}
