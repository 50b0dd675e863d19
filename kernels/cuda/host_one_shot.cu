// One-shot through host memory: every rank stores its whole tensor once, into its own outbox, and sums all tensors, which it
// reads from the peers' outboxes.
//
// S bytes out, (WORLD_SIZE - 1) * S in, one hop; both directions of the bus at once.
// Contract: block 0 is the guard (if GUARDED); block.x % 32 == 0; every rank passes the same numel, grid and block.
//
// A channel walks over its chunks, which count on from call to call. Chunk c goes through slot c % RING; a channel
//   stores chunk c after it has received chunk c - AHEAD from all peers, AHEAD <= RING / 2,
// and stores the first chunks of a call after a full wait (griddepcontrol.wait), when it has received all of the calls before.
// Then the slot is free: it held chunk c - RING. A peer from which c - AHEAD has come had received c - 2 * AHEAD from all before it
// stored that, and c - RING is no later. So a slot is written when all have read it, and a reader cannot meet a later chunk than
// the one that it waits for. With AHEAD 1 and one chunk a call this is one_shot.cu's argument for two parities.
//
// PACE and the first poll, in cycles, are for speed alone, and PACE 0 is without both. All channels begin at once, but the bus takes their
// stores one after the other, and a load waits behind all stores that were issued before it. So a channel stores when its turn comes, and
// polls right behind its own stores, while the others' still wait: both directions of the bus are in use. A poll that came too early costs
// a round trip over the bus, 1.3 us, so the first one gives a peer that is late by FIRST_POLL, and a little for each channel, time to store.
#include "entry.cuh"
#include "guard.cuh"
#include "partition/chunks.cuh"

template <class Config, class T, bool WHOLE>
__device__ inline void host_one_shot(const Args &a) {
    constexpr u32 PACKETS = Config::PACKETS, AHEAD = Config::AHEAD, RING = Config::RING;
    static_assert(2 * AHEAD <= RING && (RING & (RING - 1)) == 0, "slots are written again before all have read them");
    if (Config::GUARDED && blockIdx.x == 0) return guard<Config>(a);
    griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - Config::GUARDED) * blockDim.x + threadIdx.x, lane = thread % WARP;
    const Chunks<Config, 1> chunks(packets_of<T>(a.numel), thread / WARP, (gridDim.x - Config::GUARDED) * blockDim.x / WARP, lane);
    const u32 count = chunks.count();
    if (count == 0) return;
    const Tensor<T, WHOLE> in(a.input, a.numel), out(a.output, a.numel);
    typedef Outbox<Config, RING> Channel;
    const Channel outbox(a, chunks.channel, lane);
    Uses<Config> uses(a, chunks.channel);
    CompletionCounter<Config> counter(a, chunks.last_channel());
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the count or the slots.
    griddepcontrol_wait();

    Packet own[AHEAD][PACKETS];  // chunks that are stored and not summed
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++)
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) own[i][k] = in.load(chunks.at(i, k));
    uses.load(aborted);
    counter.load();
    u32 done = 0;
    bool came = uses.alive;
    const u32 began = Config::PACE ? cycles() : 0, turn = Config::PACE * chunks.channel;
    if (came) {
        if (Config::PACE) pause(began, turn);
        const auto store = [&](u32 i, const Packet(&p)[PACKETS]) {
            const u32 number = uses.number + i;
            if (i < count) outbox.store(number % RING, p, Channel::Wire::of(number / RING));
        };
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) store(i, own[i]);
        if (lane == 0) uses.advance(count);
        if (Config::PACE) pause(began, turn + Config::FIRST_POLL + Config::FIRST_POLL_PER_CHANNEL * chunks.busy());
#pragma unroll 1
        for (; done < count; done++) {
            Packet next[PACKETS];
#pragma unroll
            for (u32 k = 0; k < PACKETS; k++) next[k] = in.load(chunks.at(done + AHEAD, k));  // while the peers are waited for
            typename Channel::Peers peers;
            const u32 number = uses.number + done;
            came = outbox.template receive<false>(number % RING, peers, Channel::Wire::of(number / RING), 0);
            if (!came) break;
            store(done + AHEAD, next);
#pragma unroll
            for (u32 k = 0; k < PACKETS; k++) {
                Packet theirs[PEERS<Config>];
#pragma unroll
                for (u32 j = 0; j < PEERS<Config>; j++) theirs[j] = peers[j][k];
                out.store(chunks.at(done, k), sum<T, Plain>(theirs, own[0][k], a.rank));
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) own[i][k] = i + 1 < AHEAD ? own[i + 1][k] : next[k];
            }
        }
    } else {
        stop<Config>(a, TIMEOUT, a.rank, 0, 0);  // for the report alone: there is a code
    }
#pragma unroll 1
    for (; done < count; done++)
#pragma unroll 1
        for (u32 k = 0; k < PACKETS; k++) out.store(chunks.at(done, k), splat(0xFFFFFFFFu));
    if (came && lane == 0) counter.publish();
}
