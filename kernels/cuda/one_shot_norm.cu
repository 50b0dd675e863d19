// One-shot push all-reduce, each row of the sum normalized by the block (or cluster) that has received it.
//
// As one_shot.cu, whose slots, epochs and proof of two buffers these are: a warp owns PACKETS of its channels, and every lane exchanges a
// packet with every peer in each of them.
// Contract: blocks 0 … CLUSTER - 1 are the guard's (if GUARDED); a grid of CLUSTER * (1 + rows) blocks of Rows::WARPS warps; all ranks
// have the same grid and block; tensors begin at multiples of 16 bytes.
#include "entry.cuh"
#include "epilogue/norm.cuh"
#include "exchange.cuh"
#include "guard.cuh"
#include "partition/rows.cuh"
#include "warp_exchange.cuh"
#include "wire/sentinel.cuh"

template <class Config, class T, u32 PACKETS, u32 CLUSTER>
__device__ inline void one_shot_norm(const NormArgs &args) {
    typedef Sentinel Wire;
    typedef Rows<Config, T, 1, PACKETS, CLUSTER> Partition;
    typedef Norm<Config, T, Partition> Epilogue;
    typedef WarpExchange<Config, Wire, Epilogue, PACKETS> Hop;
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
    if (Config::GUARDED) materialize(counter.address);
    Epilogue epilogue(args, rows);
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the residual, the weight, the epochs or the slots.
    griddepcontrol_wait();

    Packet own[PACKETS], sums[PACKETS];
    bool alive = true;
    Hop hop(a, slots);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = Wire::encode(Epilogue::load(input, rows.at(0, k), rows.exists(0, k)));
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Epoch<Config> epoch(channels + k * sizeof(Channel));
        epoch.load(aborted);
        hop.choose(k, epoch.parity);
        alive &= epoch.alive;
    }
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) hop.push(k, own[k], alive);
    counter.load();
    epilogue.prepare();
    if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        u32 parity = hop.buffer[k];
        opaque(parity);  // or the lane becomes an index, and all of the array lies in memory
        if (alive && rows.lane == k) Epoch<Config>(channels + k * sizeof(Channel), parity).advance();
    }

    typename Hop::Peers peers;
    const auto lost = [&] {
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) sums[k] = splat(~0u);
    };
    lost();
    const bool came = !any_sync(~0u, !alive) && hop.wait(peers, [&] {
#pragma unroll
        for (u32 k = 0; k < PACKETS; k++) opaque(sums[k] = sum<T, Wire>(peers[k], own[k], rank));
    }, lost);
    if (came) hop.poison();
    __syncwarp();
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) epilogue.take(0, k, sums[k]);
    epilogue.finish();
    if (rows.lane == 0) counter.publish();
}
