// The staging memory that peers write into, and the waits on it.
//
// A slot holds one packet. "Not arrived" is a packet in which some 32-bit word is all ones; the payload
// never contains that word (a NaN, sent as another NaN), so the data is its own arrival proof: no flag,
// no fence, no barrier, and 4-byte atomicity is enough. The reader poisons the slot again after reading.
//
// A channel is a warp of data blocks, counted over the grid; it owns the same slots whatever the grid. A
// kernel pushes only what its peers have room for; each algorithm says why above its code.
//
// Progress: a warp waits only for the same warp of its peers. Blocks start in the order of their index, on
// every GPU, so a grid may be larger than what is resident at once.
#pragma once
#include "ptx.cuh"

constexpr u32 WARP = 32;
constexpr u32 PEERS = WORLD_SIZE - 1;
constexpr u32 EMPTY = 0xFFFFFFFFu;
#define NOTHING Packet{{EMPTY, EMPTY, EMPTY, EMPTY}}

// Passed by value. Only in and out differ between two calls of the same shape.
struct Args {
    u64 staging[8];  // of each rank, as mapped in this process: a Header, then the slots
    u64 in, out;     // the user's tensors, on this GPU, from this launch's first element on; may be equal
    u64 numel;       // of this launch
    u64 total;       // of the whole call, for the signature
    u64 slots;       // offset of this algorithm's slots in the staging memory
    u64 epochs;      // u32 per channel, local
    u64 control;     // Control, local
    u64 report;      // Report, host memory
    u32 rank;
    u32 capacity;    // slots per (buffer, source)
    u32 tag;         // dtype and algorithm, for the signature (guard.cuh)
    u32 config;      // which flag of Control.met belongs to calls of this shape
    u32 launch;      // number of this launch within the call, from 0
    u32 last;        // whether it ends what a guard began: the last of a stream, any other launch
};

// First in the staging memory: what peers may write besides packets.
struct Header {
    u32 abort;  // 0, or why this rank's kernels must stop: an abort code
    u32 reserved[63];
    Packet signature[2][8];  // per parity of the sequence number, per source
};

struct Control {
    u32 sequence;     // calls so far
    u32 in_flight;    // calls that entered and did not leave
    u64 deadline_ns;  // how long to wait for a peer that was met in this shape of call; 0 = for ever
    u64 grace_ns;     // the same until it is met: it may still compile, or load a model
    u32 reported;
    u32 reserved;
    u32 met[4096];    // per shape of call: whether all ranks have taken part in one
};

// Why waits ended. Code = kind | culprit << 8 | rank that found out << 16.
constexpr u32 TIMEOUT = 1, MISMATCH = 2, CONCURRENT = 3;

struct Report {
    u32 code;  // written last
    u32 sequence;
    u32 tag;
    u32 buffer;
    u32 channel;
    u32 waited_ms;
    u32 mine[2], theirs[2];  // signatures, if they differ
};

#define FIELD(type, member) reinterpret_cast<u64>(&reinterpret_cast<type *>(0)->member)

// Source's place among a rank's slots: its own is left out.
__device__ inline u32 place(u32 source, u32 owner) { return source - (source > owner); }
__device__ inline u32 source_at(u32 place, u32 owner) { return place + (place >= owner); }

__device__ inline u64 slot(const Args &a, u32 owner, u32 buffer, u32 place, u32 index) {
    return a.staging[owner] + a.slots + (u64(buffer * PEERS + place) * a.capacity + index) * 16;
}

// Peer number k, 0 <= k < PEERS: every rank and block begins with another one, so that no link is flooded.
__device__ inline u32 target(const Args &a, u32 k) {
    u32 peer = a.rank + 1 + (k + blockIdx.x) % PEERS;
    return peer >= WORLD_SIZE ? peer - WORLD_SIZE : peer;
}

__device__ inline bool arrived(Packet p) {
    return p.w[0] != EMPTY && p.w[1] != EMPTY && p.w[2] != EMPTY && p.w[3] != EMPTY;
}

// 0xFFFFFFFF is one fp32 NaN or two 16-bit NaNs; ...FE is NaN as well, in every dtype.
__device__ inline void push(const Args &a, u32 to, u32 buffer, u32 index, Packet p) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) p.w[i] = min(p.w[i], EMPTY - 1);
    st_relaxed_sys_v4(slot(a, to, buffer, place(a.rank, to), index), p);
}

// A rank that stopped waiting must stop pushing as well, now and in later kernels: it could overtake a peer
// that is merely late and overwrite slots which that peer has not read yet. What did not arrive reads as
// EMPTY, so the output is NaN, and the host raises.
__device__ inline bool alive(const Args &a) {
    return ld_relaxed_sys_u32(a.staging[a.rank] + FIELD(Header, abort)) == 0;
}

struct Wait {
    u64 started = 0;
    u32 met = 0;
};

__device__ inline void report(const Args &a, u32 code, u32 buffer, u32 channel, u64 waited_ns) {
    if (atom_exch_relaxed_gpu_u32(a.control + FIELD(Control, reported), 1)) return;
    st_relaxed_sys_u32(a.report + FIELD(Report, sequence), ld_relaxed_gpu_u32(a.control + FIELD(Control, sequence)));
    st_relaxed_sys_u32(a.report + FIELD(Report, tag), a.tag);
    st_relaxed_sys_u32(a.report + FIELD(Report, buffer), buffer);
    st_relaxed_sys_u32(a.report + FIELD(Report, channel), channel);
    st_relaxed_sys_u32(a.report + FIELD(Report, waited_ms), u32(waited_ns / 1000000));
    fence_acq_rel_sys();
    st_relaxed_sys_u32(a.report + FIELD(Report, code), code);
}

// Stop this communicator on all ranks; the first cause counts.
__device__ inline void stop(const Args &a, u32 kind, u32 culprit, u32 buffer, u32 channel, u64 waited_ns) {
    u32 code = kind | culprit << 8 | a.rank << 16;
    u32 before = atom_cas_relaxed_sys_u32(a.staging[a.rank] + FIELD(Header, abort), 0, code);
    if (before == 0)
        for (u32 j = 0; j < PEERS; j++) st_relaxed_sys_u32(a.staging[source_at(j, a.rank)] + FIELD(Header, abort), code);
    report(a, before ? before : code, buffer, channel, waited_ns);
}

// True when waiting is over without the packet: the communicator was stopped, or the deadline has passed and
// this thread stops it. `missing` has a bit per place.
__device__ inline bool give_up(const Args &a, Wait &wait, u32 buffer, u32 channel, u32 missing) {
    u64 now = globaltimer();
    u32 code = ld_relaxed_sys_u32(a.staging[a.rank] + FIELD(Header, abort));
    u32 met = ld_relaxed_gpu_u32(a.control + FIELD(Control, met) + 4 * a.config);
    if (wait.started == 0 || met != wait.met) wait.started = now;
    wait.met = met;
    if (code) {
        report(a, code, buffer, channel, now - wait.started);
        return true;
    }
    u64 limit = ld_relaxed_gpu_u64(a.control + (met ? FIELD(Control, deadline_ns) : FIELD(Control, grace_ns)));
    if (limit == 0 || now - wait.started < limit) return false;
    stop(a, TIMEOUT, source_at(__ffs(missing) - 1, a.rank), buffer, channel, now - wait.started);
    return true;
}

// Wait for the packet of every peer, u[place]. All loads first, then all checks, so that the round trips
// overlap. Returns whether all arrived; words that did not are EMPTY. SLEEP_NS > 0 polls less often.
template <u32 SLEEP_NS>
__device__ inline bool receive(const Args &a, u32 buffer, u32 channel, u32 index, bool alive, Packet (&u)[PEERS]) {
    if (!alive) {
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) u[j] = NOTHING;
        return false;
    }
    const u64 first = slot(a, a.rank, buffer, 0, index), stride = u64(a.capacity) * 16;
#pragma unroll
    for (u32 j = 0; j < PEERS; j++) u[j] = ld_relaxed_sys_v4(first + j * stride);
    Wait wait;
    for (u32 spins = 1;; spins++) {
        u32 missing = 0;
#pragma unroll
        for (u32 j = 0; j < PEERS; j++) missing |= u32(!arrived(u[j])) << j;
        if (!missing) return true;
        if (SLEEP_NS) nanosleep(SLEEP_NS);
#pragma unroll
        for (u32 j = 0; j < PEERS; j++)
            if (missing >> j & 1) u[j] = ld_relaxed_sys_v4(first + j * stride);
        if (spins % 64 == 0 && give_up(a, wait, buffer, channel, missing)) return false;
    }
}

__device__ inline void poison(const Args &a, u32 buffer, u32 index) {
    const u64 first = slot(a, a.rank, buffer, 0, index), stride = u64(a.capacity) * 16;
#pragma unroll
    for (u32 j = 0; j < PEERS; j++) st_relaxed_sys_v4(first + j * stride, NOTHING);
}
