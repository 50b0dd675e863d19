// Two-shot through host memory: every rank stores what the peers are to sum into its own outbox, sums its part, which it reads from the
// peers' outboxes, stores that sum, and reads theirs.
//
// The tensor is cut into WORLD_SIZE parts; rank r sums part r. S bytes out (the own part is not stored, its sum is) and
// 2 * (WORLD_SIZE - 1) / WORLD_SIZE * S in, two hops.
// Contract: block 0 is the guard (if GUARDED); block.x % 32 == 0; every rank passes the same numel, grid and block.
//
// A channel walks over its chunks of all parts at once, which count on from call to call. It has a slot for each rank: of rank r's outbox,
// slot q carries a chunk of part q to rank q, slot r the sum of part r to all. One of each is enough:
// - slot q is stored when the sum of the chunk before has come from rank q, which stored that after it had received what slot q held;
// - slot r is stored when chunks to be summed have come from all peers, each of which stored those after it had received all sums of the
//   chunk before, r's among them.
// Between calls as well: a call stores after a full wait (griddepcontrol.wait), when all before it were received.
#include "entry.cuh"
#include "guard.cuh"
#include "partition/chunks.cuh"

template <class Config, class T, bool WHOLE>
__device__ inline void host_two_shot(const Args &a) {
    constexpr u32 WORLD_SIZE = Config::WORLD_SIZE, SCATTER = 0, GATHER = 1;
    static_assert(Config::PACKETS == 1, "a lane has one packet of a chunk");
    if (Config::GUARDED && blockIdx.x == 0) return guard<Config>(a);
    griddepcontrol_launch_dependents();
    const u32 thread = (blockIdx.x - Config::GUARDED) * blockDim.x + threadIdx.x, lane = thread % WARP;
    const Chunks<Config, WORLD_SIZE> chunks(packets_of<T>(a.numel), thread / WARP, (gridDim.x - Config::GUARDED) * blockDim.x / WARP, lane);
    const u32 count = chunks.count();
    if (count == 0) return;
    const Tensor<T, WHOLE> in(a.input, a.numel), out(a.output, a.numel);
    typedef Outbox<Config, WORLD_SIZE> Channel;
    const Channel outbox(a, chunks.channel, lane);
    Uses<Config> uses(a, chunks.channel);
    CompletionCounter<Config> counter(a, chunks.last_channel());
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the count or the slots.
    griddepcontrol_wait();

    typename Channel::Packets own;  // of the chunk that is stored next
    typename Channel::Peers theirs;
    const auto load = [&](u32 i) {
        own[0] = in.load(chunks.at(i, 0, a.rank));
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) theirs[j][0] = in.load(chunks.at(i, 0, target<Config>(a, j)));
    };
    load(0);
    uses.load(aborted);
    counter.load();
    u32 done = 0;
    bool came = uses.alive;
    if (came) {
        if (lane == 0) uses.advance(count);
#pragma unroll 1
        for (; done < count; done++) {
            const u32 phase = Channel::Wire::of(uses.number + done);
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++) outbox.store(target<Config>(a, j), theirs[j], phase);
            const Packet mine = own[0];
            load(done + 1);  // on its way while the peers are waited for
            typename Channel::Peers peers;
            came = outbox.template receive<false>(a.rank, peers, phase, SCATTER);
            if (!came) break;
            Packet addends[PEERS<Config>];
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++) addends[j] = peers[j][0];
            const Packet result[1] = {sum<T, Plain>(addends, mine, a.rank)};
            outbox.store(a.rank, result, phase);
            out.store(chunks.at(done, 0, a.rank), result[0]);
            came = outbox.template receive<true>(0, peers, phase, GATHER);
            if (!came) break;
#pragma unroll
            for (u32 j = 0; j < PEERS<Config>; j++) out.store(chunks.at(done, 0, source_at(j, a.rank)), peers[j][0]);
        }
    } else {
        stop<Config>(a, TIMEOUT, a.rank, 0, 0);  // for the report alone: there is a code
    }
#pragma unroll 1
    for (; done < count; done++)
#pragma unroll 1
        for (u32 rank = 0; rank < WORLD_SIZE; rank++) out.store(chunks.at(done, 0, rank), splat(0xFFFFFFFFu));
    if (came && lane == 0) counter.publish();
}
