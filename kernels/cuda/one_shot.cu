// One-shot push all-reduce: every rank sends its whole tensor to every peer and sums all of them.
//
// (WORLD_SIZE - 1) * S bytes out, one hop.
// Contract: block 0 is the guard (if GUARDED, which is 0 only to measure what guards and deadlines cost); the other threads
// times PACKETS <= capacity, block.x % 32 == 0; every rank passes the same numel (block and grid may differ from call to call,
// and between ranks).
//
// Buffers: one per parity of the channel's epoch. Two are enough because (1) every lane of an active channel exchanges a packet
// with every peer in every epoch, and (2) one kernel is one epoch, and a rank pushes only when its earlier kernels are complete,
// poisoning included (griddepcontrol.wait). So a packet from a peer in epoch e+1 proves that the slots of epoch e there are
// empty, and may be written again in epoch e+2.
#include "entry.cuh"
#include "epilogue/store.cuh"
#include "exchange.cuh"
#include "guard.cuh"
#include "partition/flat.cuh"
#include "wire/sentinel.cuh"

template <class Config, class T, bool WHOLE, class Wire = Sentinel, class Partition = Flat<Config, 1>,
          class Epilogue = Store<T, WHOLE>>
__device__ inline void one_shot(const Args &a) {
    constexpr u32 PACKETS = Config::PACKETS;
    if (Config::GUARDED && blockIdx.x == 0) return guard<Config>(a);
    griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - Config::GUARDED) * blockDim.x + threadIdx.x, lane = thread % WARP, channel = thread / WARP;
    const u32 first = channel * WARP * PACKETS + lane;  // of this thread's slots, which are WARP apart
    const Partition partition(packets_of<T>(a.numel), first);
    if (partition.idle(lane)) return;
    Tensor<T, WHOLE> in(a.input, a.numel, partition.origin());
    Epilogue epilogue(a, partition);

    const Slots<Config> slots(a, first);
    Epoch<Config> epoch(a, channel);
    materialize(in.address);
    materialize(epilogue.out.address);
    materialize(epoch.address);
    u32 rank = a.rank;
    materialize(rank);
    CompletionCounter<Config> counter(a, partition.last_channel());
    if (Config::GUARDED) materialize(counter.address);
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();

    // The loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = Wire::encode(in.load(partition.at(rank, k)));
    epoch.load(aborted);
    const Exchange<Config, Wire, Epilogue, typename Partition::Share> exchange(a, slots, partition, epoch.parity);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) exchange.push(k, own[k], epoch.alive);
    counter.load();
    if (!epoch.alive) return give_up<Config, Epilogue, typename Partition::Share>(a, partition, Wait());
    if (lane == 0) epoch.advance();

#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Packet peers[PEERS<Config>], result;
        exchange.wait(k, peers, [&] {
            result = sum<T, Wire>(peers, own[k], rank);
            opaque(result);
        });
        epilogue.take(partition.at(rank, k), result);
        exchange.poison(k);
    }
    epilogue.finish();
    if (lane == 0) counter.publish();
}
