// Two-shot push all-reduce, sliced by row: rank r sums slice r of every row, and every rank normalizes all rows.
//
// As two_shot.cu with STREAM 0, whose slots, epochs and proof of three buffers these are: a warp owns PACKETS of its channels, and every lane
// exchanges a packet with every peer in each of them, twice. The thread that sums packet k of this rank's slice gathers packet k of all
// other slices of the same row, so that a row stays in its block.
// Contract: as one_shot_norm.cu.
#include "entry.cuh"
#include "epilogue/norm.cuh"
#include "exchange.cuh"
#include "guard.cuh"
#include "partition/rows.cuh"
#include "wire/sentinel.cuh"

template <class Config, class T, u32 PACKETS, u32 CLUSTER>
__device__ inline void two_shot_norm(const NormArgs &args) {
    typedef Sentinel Wire;
    typedef Rows<Config, T, Config::WORLD_SIZE, PACKETS, CLUSTER> Partition;
    typedef Norm<Config, T, Partition> Epilogue;
    typedef Exchange<Config, Wire, Epilogue, typename Epilogue::Share> Hop;
    constexpr u32 GATHER = 2;  // the buffer of sums; the others take turns
    const Args &a = args.call;
    const typename Epilogue::Share nothing;
    if (Config::GUARDED && blockIdx.x < CLUSTER) {
        if (blockIdx.x == 0) guard<Config, true>(a, args.parameters);
        return;
    }
    griddepcontrol_launch_dependents();
    u32 rank = a.rank;
    materialize(rank);
    const Partition rows(rank);
    const Slots<Config> slots(a, rows.slot());
    u64 input = a.input + rows.begin * 16ull;
    materialize(input);
    u64 channels = Epoch<Config>(a, rows.channel).address;
    materialize(channels);
    CompletionCounter<Config> counter(a, rows.last_channel());
    Epilogue epilogue(args, rows);
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the residual, the weight, the epochs or the slots.
    griddepcontrol_wait();

    Packet own[PACKETS], theirs[PACKETS][PEERS<Config>];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        own[k] = Epilogue::load(input, rows.at(rank, k), rows.exists(rank, k));
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) {
            const u32 peer = target<Config>(a, j);
            theirs[k][j] = Wire::encode(Epilogue::load(input, rows.at(peer, k), rows.exists(peer, k)));
        }
    }
    bool alive = true;
    u32 parity[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Epoch<Config> epoch(channels + k * sizeof(Channel));
        epoch.load(aborted);
        parity[k] = epoch.parity;
        alive &= epoch.alive;
    }
    const auto scatter = [&](u32 k) { return Hop(a, slots, nothing, parity[k]); };
    const Hop gather(a, slots, nothing, GATHER);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) scatter(k).push(k, j, theirs[k][j], alive);
    counter.load();
    epilogue.prepare();
    if (!alive) give_up<Config, Epilogue>(a, nothing, Wait());
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
        if (alive && rows.lane == k) Epoch<Config>(channels + k * sizeof(Channel), parity[k]).advance();

    Packet peers[PEERS<Config>], sums[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Packet result = splat(~0u);
        const bool came = alive && scatter(k).wait(k, peers, [&] {
            result = Wire::encode(sum<T, Wire>(peers, own[k], rank));
            opaque(result);
        });
        __syncwarp();  // or lanes whose packets came later would do all of the rest after the others: 0.2 us
        if (!came) alive = false, result = splat(~0u);
        gather.push(k, result, came);
        sums[k] = result;
        if (came) scatter(k).poison(k);
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) epilogue.take(PEERS<Config>, k, sums[k]);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const bool came = alive && gather.wait(k, peers, [] {});
        __syncwarp();
        alive &= came;
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) epilogue.take(j, k, came ? peers[j] : splat(~0u));
        if (came) gather.poison(k);
    }
    epilogue.finish();
    if (rows.lane == 0) counter.publish();
}
