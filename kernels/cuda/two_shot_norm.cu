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
#include "warp_exchange.cuh"
#include "wire/sentinel.cuh"

template <class Config, class T, u32 PACKETS, u32 CLUSTER>
__device__ inline void two_shot_norm(const NormArgs &args) {
    typedef Sentinel Wire;
    typedef Rows<Config, T, Config::WORLD_SIZE, PACKETS, CLUSTER> Partition;
    typedef Norm<Config, T, Partition> Epilogue;
    typedef WarpExchange<Config, Wire, Epilogue, PACKETS> Hop;
    constexpr u32 GATHER = 2;  // the buffer of sums; the others take turns
    const Args &a = args.call;
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

    Packet own[PACKETS], sums[PACKETS];
    typename Hop::Peers theirs, peers;
    Hop scatter(a, slots), gather(a, slots);
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
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Epoch<Config> epoch(channels + k * sizeof(Channel));
        epoch.load(aborted);
        scatter.choose(k, epoch.parity);
        gather.choose(k, GATHER);
        alive &= epoch.alive;
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) scatter.push(k, j, theirs[k][j], alive);
    counter.load();
    epilogue.prepare();
    if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        u32 parity = scatter.buffer[k];
        opaque(parity);  // or the lane becomes an index, and all of the array lies in memory
        if (alive && rows.lane == k) Epoch<Config>(channels + k * sizeof(Channel), parity).advance();
    }

    const auto lost = [&] {
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) sums[k] = splat(~0u);
    };
    lost();
    bool came = !any_sync(~0u, !alive) && scatter.wait(peers, [&] {
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) opaque(sums[k] = Wire::encode(sum<T, Wire>(peers[k], own[k], rank)));
    }, lost);
    __syncwarp();
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) gather.push(k, sums[k], came);
    if (came) scatter.poison();
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) epilogue.take(PEERS<Config>, k, sums[k]);
    came = came && gather.wait(peers, [] {}, [] {});
    if (came) gather.poison();
    __syncwarp();
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS<Config>; j++) epilogue.take(j, k, came ? peers[k][j] : splat(~0u));
    epilogue.finish();
    if (rows.lane == 0) counter.publish();
}
