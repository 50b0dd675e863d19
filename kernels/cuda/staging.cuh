// The staging memory that peers write into, and the waits on it.
//
// A slot holds one packet. "Not arrived" is a packet in which some 32-bit word is all ones; the payload
// never contains that word (a NaN, sent as another NaN), so the data is its own arrival proof: no flag,
// no fence, no barrier, and 4-byte atomicity is enough. The reader poisons the slot again after reading.
//
// A channel is a warp index of the whole grid. Each channel alternates between two parities, kept in its
// own epoch word in local memory, so grids and block sizes may differ from call to call. Overwriting is
// safe because (1) every lane of an active warp exchanges a packet with every peer in every epoch, and
// (2) one kernel is one epoch, and a rank pushes only when its earlier kernels are complete, poisoning
// included (griddepcontrol.wait): hearing from a peer in epoch e+1 allows writing the slots of epoch e
// there again, in epoch e+2. Slots that are written only after the packet of the same peer and
// the same epoch has arrived elsewhere (two-shot's gather) need no parity.
//
// Progress: a warp waits only for the same warp of its peers. Blocks start in the order of their index, on
// every GPU, so a grid may be larger than what is resident at once.
#pragma once
#include "ptx.cuh"

constexpr u32 EMPTY = 0xFFFFFFFFu;
#define NOTHING Packet{{EMPTY, EMPTY, EMPTY, EMPTY}}

// Passed by value. Everything but in, out and numel is fixed for the life of the communicator.
struct Args {
    u64 staging[8];  // this algorithm's slots of each rank, as mapped in this process
    u64 in, out;     // the user's tensors, on this GPU; may be equal
    u64 numel;
    u64 epochs;      // u32 per channel, local
    u64 control;     // Control, local
    u64 report;      // Report, host memory
    u32 rank;
    u32 capacity;    // slots per (buffer, source): the most threads that a grid may have
};

struct Control {
    u32 poisoned;
    u32 reserved;
    u64 deadline_ns;  // 0 = wait for ever
};

struct Report {
    u32 expired;  // written last
    u32 source;   // the rank that did not arrive
    u32 algorithm;
    u32 buffer;
    u32 channel;
};

__device__ inline u64 slot(const Args &a, u32 owner, u32 buffer, u32 source, u32 index) {
    return a.staging[owner] + (u64(buffer * WORLD_SIZE + source) * a.capacity + index) * 16;
}

__device__ inline bool arrived(Packet p) {
    return p.w[0] != EMPTY && p.w[1] != EMPTY && p.w[2] != EMPTY && p.w[3] != EMPTY;
}

// 0xFFFFFFFF is one fp32 NaN or two 16-bit NaNs; ...FE is NaN as well, in every dtype.
__device__ inline void push(const Args &a, u32 to, u32 buffer, u32 index, Packet p) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) p.w[i] = min(p.w[i], EMPTY - 1);
    st_relaxed_sys_v4(slot(a, to, buffer, a.rank, index), p);
}

// True when waiting is over without the packet: the communicator is poisoned, or the deadline passed and
// this thread poisons it.
//
// A rank that stopped waiting must stop pushing as well, now and in later kernels: it could overtake a peer
// that is merely late and overwrite slots which that peer has not read yet. Peers run into their own
// deadlines instead; here, what did not arrive reads as EMPTY, so the output is NaN, and the host raises.
__device__ inline bool give_up(const Args &a, u64 &started, u32 algorithm, u32 buffer, u32 missing) {
    if (ld_relaxed_gpu_u32(a.control)) return true;
    u64 now = globaltimer();
    if (started == 0) started = now;
    u64 deadline = ld_relaxed_gpu_u64(a.control + 8);
    if (deadline == 0 || now - started < deadline) return false;
    if (atom_exch_relaxed_gpu_u32(a.control, 1) == 0) {
        st_relaxed_sys_u32(a.report + 4, __ffs(missing) - 1);
        st_relaxed_sys_u32(a.report + 8, algorithm);
        st_relaxed_sys_u32(a.report + 12, buffer);
        st_relaxed_sys_u32(a.report + 16, (blockIdx.x * blockDim.x + threadIdx.x) / 32);
        fence_acq_rel_sys();
        st_relaxed_sys_u32(a.report, 1);
    }
    return true;
}

__device__ inline bool alive(const Args &a) { return ld_relaxed_gpu_u32(a.control) == 0; }

// Wait for the packet of every peer; v[a.rank] is not used. All loads first, then all checks, so that the
// round trips overlap; the own slot, always empty, is loaded as well, which is cheaper than a branch.
// Returns whether all arrived; if not, the missing ones are NOTHING.
__device__ inline bool receive(const Args &a, u32 algorithm, u32 buffer, u32 index, bool alive,
                               Packet (&v)[WORLD_SIZE]) {
    u64 mine = slot(a, a.rank, buffer, 0, index);
    u64 stride = u64(a.capacity) * 16;
    if (!alive) {
#pragma unroll
        for (u32 s = 0; s < WORLD_SIZE; s++) v[s] = NOTHING;
        return false;
    }
#pragma unroll
    for (u32 s = 0; s < WORLD_SIZE; s++) v[s] = ld_relaxed_sys_v4(mine + s * stride);
    u64 started = 0;
    for (u32 spins = 1;; spins++) {
        u32 missing = 0;
#pragma unroll
        for (u32 s = 0; s < WORLD_SIZE; s++) missing |= u32(!arrived(v[s])) << s;
        missing &= ~(1u << a.rank);
        if (!missing) return true;
#pragma unroll
        for (u32 s = 0; s < WORLD_SIZE; s++)
            if (missing >> s & 1) v[s] = ld_relaxed_sys_v4(mine + s * stride);
        if (spins % 64 == 0 && give_up(a, started, algorithm, buffer, missing)) return false;
    }
}

__device__ inline void poison(const Args &a, u32 buffer, u32 index) {
    u64 mine = slot(a, a.rank, buffer, 0, index);
#pragma unroll
    for (u32 s = 0; s < WORLD_SIZE; s++) st_relaxed_sys_v4(mine + u64(s) * a.capacity * 16, NOTHING);
}
