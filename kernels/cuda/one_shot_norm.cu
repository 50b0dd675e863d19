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
#include "wire/sentinel.cuh"

template <class Config, class T, u32 PACKETS, u32 CLUSTER>
__device__ inline void one_shot_norm(const NormArgs &args) {
    typedef Sentinel Wire;
    typedef Rows<Config, T, 1, PACKETS, CLUSTER> Partition;
    typedef Norm<Config, T, Partition> Epilogue;
    typedef Exchange<Config, Wire, Epilogue, typename Epilogue::Share> Hop;
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
    if (Config::GUARDED) materialize(counter.address);
    Epilogue epilogue(args, rows);
    const bool aborted = stopped<Config>(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the residual, the weight, the epochs or the slots.
    griddepcontrol_wait();

    Packet own[PACKETS];
    bool alive = true;
    u32 parity[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = Wire::encode(Epilogue::load(input, rows.at(0, k), rows.exists(0, k)));
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Epoch<Config> epoch(channels + k * sizeof(Channel));
        epoch.load(aborted);
        parity[k] = epoch.parity;
        alive &= epoch.alive;
    }
    const auto hop = [&](u32 k) { return Hop(a, slots, nothing, parity[k]); };
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) hop(k).push(k, own[k], alive);
    counter.load();
    epilogue.prepare();
    if (!alive) give_up<Config, Epilogue>(a, nothing, Wait());
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
        if (alive && rows.lane == k) Epoch<Config>(channels + k * sizeof(Channel), parity[k]).advance();

#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        Packet peers[PEERS<Config>], result = splat(~0u);
        const bool came = alive && hop(k).wait(k, peers, [&] {
            result = sum<T, Wire>(peers, own[k], rank);
            opaque(result);
        });
        __syncwarp();  // or lanes whose packets came later would do all of the rest after the others: 0.2 us
        if (!came) alive = false, result = splat(~0u);
        epilogue.take(0, k, result);
        if (came) hop(k).poison(k);
    }
    epilogue.finish();
    if (rows.lane == 0) counter.publish();
}
