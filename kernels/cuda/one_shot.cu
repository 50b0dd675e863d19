// One-shot push all-reduce: every rank sends its whole tensor to every peer and sums all of them.
//
// (WORLD_SIZE - 1) * S bytes out, one hop. The compiler front defines WORLD_SIZE, PACKETS (of a thread) and
// GUARDED (0 only to measure what guards and deadlines cost).
// Contract: block 0 is the guard; (grid.x - 1) * block.x * PACKETS <= capacity, block.x % 32 == 0; every rank
// passes the same numel (block and grid may differ from call to call, and between ranks).
//
// Buffers: one per parity of the channel's epoch. Two are enough because (1) every lane of an active channel
// exchanges a packet with every peer in every epoch, and (2) one kernel is one epoch, and a rank pushes only
// when its earlier kernels are complete, poisoning included (griddepcontrol.wait): hearing from a peer in epoch
// e+1 allows writing the slots of epoch e there again, in epoch e+2.
#include "entry.cuh"
#include "guard.cuh"

// What a thread has, which is the same wherever it stands.
template <class T, bool WHOLE>
struct Thread {
    const Args &a;
    u32 lane, channel;
    u32 first;  // packet; the others follow at distances of a warp
    Tensor<T, WHOLE> in, out;

    __device__ Thread(const Args &a) : a(a), in(a.in, a.numel), out(a.out, a.numel) {
        const u32 thread = (blockIdx.x - GUARDED) * blockDim.x + threadIdx.x;
        lane = thread % WARP, channel = thread / WARP;
        first = channel * WARP * PACKETS + lane;
    }
    __device__ bool idle() const { return first - lane >= in.packets; }  // on every rank
    __device__ bool in_last_channel() const { return first + WARP * PACKETS >= in.packets; }
    __device__ u64 state() const { return a.channels + channel * sizeof(Channel); }

    // Packet number k of every rank is there.
    __device__ void finish(u32 k, Packet own, const Packet (&peers)[PEERS], u64 mine, u32 stride) const {
        Packet v[WORLD_SIZE];
        in_rank_order(peers, own, a.rank, v);
        out.store(first + k * WARP, sum<T>(v));
        poison(mine, stride);
    }
    __device__ void leave(u64 state, u32 parity, const Ending &ending) const {
        __syncwarp();  // every lane has read the epoch
        if (lane > 0) return;
        st_relaxed_gpu_u32(state + FIELD(Channel, epoch), parity ^ 1);
        ending.say();
    }
};

// The same from packet number k on, for as long as it takes. It begins anew with what the arguments say: code and registers
// of the usual way know nothing of this one, which made them slower.
template <class T, bool WHOLE>
__device__ __noinline__ void one_shot_late(const Args &a, u32 k, bool dead) {
    const Thread<T, WHOLE> thread(a);
    const Slots slots(a, thread.first);
    Ending ending(a, thread.in_last_channel());
    ending.look();
    Wait wait;
    wait.buffer = ld_relaxed_gpu_u32(thread.state() + FIELD(Channel, epoch)) & 1;
#pragma unroll 1
    for (; k < PACKETS; k++) {
        const u64 mine = slots.mine + slots.buffer(wait.buffer) + k * WARP * 16;
        Packet peers[PEERS];
        if (dead || !wait.receive(a, mine, slots.stride, peers)) return give_up<T, WHOLE, 1>(a, thread.out, thread.first, thread.out.packets, wait);
        thread.finish(k, thread.in.load(thread.first + k * WARP), peers, mine, slots.stride);
    }
    thread.leave(thread.state(), wait.buffer, ending);
}

template <class T, bool WHOLE>
__device__ inline void one_shot(const Args &a) {
    if (GUARDED && blockIdx.x == 0) return guard(a);
    griddepcontrol_launch_dependents();
    Thread<T, WHOLE> thread(a);
    if (thread.idle()) return;

    const Slots slots(a, thread.first);
    u64 state = thread.state();
    materialize(thread.in.address);
    materialize(thread.out.address);
    materialize(state);
    Ending ending(a, thread.in_last_channel());
    if (GUARDED) materialize(ending.count);
    const bool aborted = stopped(a);
    // Before this, an earlier kernel of the stream may still be writing the input, the epoch or the slots.
    griddepcontrol_wait();
    // The loads overlap only in this order: the compiler uses the parity before it loads anything else.
    Packet own[PACKETS];
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) own[k] = thread.in.load(thread.first + k * WARP);
    ending.look();
    const u64 epoch_stopped = ld_relaxed_gpu_v2_u32(state);
    const u32 parity = u32(epoch_stopped) & 1;
    const u32 buffer = slots.buffer(parity);
    if (GUARDED && aborted | epoch_stopped >> 32) return one_shot_late<T, WHOLE>(a, 0, true);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++)
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) push(slots.to[j] + buffer + k * WARP * 16, own[k]);
#pragma unroll
    for (u32 k = 0; k < PACKETS; k++) {
        const u64 mine = slots.mine + buffer + k * WARP * 16;
        Packet peers[PEERS];
        if (!receive(mine, slots.stride, peers)) return one_shot_late<T, WHOLE>(a, k, false);
        thread.finish(k, own[k], peers, mine, slots.stride);
    }
    thread.leave(state, parity, ending);
}

ENTRY_ALL_DTYPES(one_shot)
