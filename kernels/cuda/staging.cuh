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
constexpr u32 POLLS = 64;  // before the first look at the clock
#define NOTHING Packet{{EMPTY, EMPTY, EMPTY, EMPTY}}

// Passed by value. Only in and out differ between two calls of the same shape.
struct Args {
    u64 staging[8];  // of each rank, as mapped in this process: a Header, then the slots
    u64 own;         // = staging[rank]
    u64 in, out;     // the user's tensors, on this GPU, from this launch's first element on; may be equal
    u64 numel;       // of this launch
    u64 total;       // of the whole call, for the signature
    u64 slots;       // offset of this algorithm's slots in the staging memory
    u64 channels;    // Channel per channel of this algorithm, local
    u64 control;     // Control, local
    u64 report;      // Report, host memory
    u32 rank;
    u32 capacity;    // slots per (buffer, source)
    u32 tag;         // dtype and algorithm, for the signature (guard.cuh)
    u32 config;      // which flag of Control.met belongs to calls of this shape
    u32 launch;      // number of this launch within the call, from 0
    u32 scatter;     // buffers of a stream's launch (two_shot.cu)
    u32 gather;
    u32 last;        // whether it ends what a guard began: the last of a stream, any other launch
};

// First in the staging memory: what peers may write besides packets.
struct Header {
    u32 abort;  // 0, or why this rank's kernels must stop: an abort code
    u32 reserved[63];
    Packet signature[2][8];  // per parity of the sequence number, per source
};

struct Control {
    u32 sequence;     // calls that were signed, by this rank and all others
    u32 ended;        // calls whose last channel is done
    u64 deadline_ns;  // how long to wait for a peer that was met in this shape of call; 0 = for ever
    u64 grace_ns;     // the same until it is met: it may still compile, or load a model
    u32 reported;
    u32 entered;      // calls that began
    u32 met[4096];    // per shape of call: whether all ranks have taken part in one
    u32 channels;     // how many there are of all algorithms together, from CHANNELS_AT on
};

// What a channel keeps from call to call; one load reads both.
struct Channel {
    u32 epoch;
    u32 stopped;  // this rank was stopped: push no more
};

constexpr u32 CHANNELS_AT = 32 << 10;  // bytes from the beginning of Control

// Why waits ended. Code = kind | culprit << 8 | rank that found out << 16.
constexpr u32 TIMEOUT = 1, MISMATCH = 2, CONCURRENT = 3;

struct Report {
    u32 code;  // written last
    u32 sequence;  // 0: whoever reports does not know; Control.sequence tells
    u32 tag, buffer, channel, waited_ms;
    u32 mine[2], theirs[2];  // signatures that differ: numel, tag
};

#define FIELD(type, member) reinterpret_cast<u64>(&reinterpret_cast<type *>(0)->member)

// Source's place among a rank's slots: its own is left out.
__device__ inline u32 place(u32 source, u32 owner) { return source - (source > owner); }
__device__ inline u32 source_at(u32 place, u32 owner) { return place + (place >= owner); }

// Peer number k, 0 <= k < PEERS: every rank and block begins with another one, so that no link is flooded.
__device__ inline u32 target(const Args &a, u32 k) {
    u32 peer = a.rank + 1 + (k + blockIdx.x) % PEERS;
    return peer >= WORLD_SIZE ? peer - WORLD_SIZE : peer;
}

// Where a thread reads and pushes: the slots of buffer 0 at `index`. Computed before the loads return that decide
// which buffer is next, so that nothing but an addition is left to do then.
struct Slots {
    u64 mine;
    u32 stride;     // bytes from one place to the next
    u32 pitch;      // bytes from one buffer to the next
    u64 to[PEERS];  // at target(k)

    __device__ Slots(const Args &a, u32 index)
        : mine(a.own + a.slots + index * 16ull), stride(a.capacity * 16 + zero()), pitch(a.capacity * (16 * PEERS) + zero()) {
#pragma unroll
        for (u32 k = 0; k < PEERS; k++) {
            const u32 peer = target(a, k);
            to[k] = a.staging[peer] + a.slots + (u64(place(a.rank, peer)) * a.capacity + index) * 16;
            materialize(to[k]);
        }
        materialize(mine);
    }

    __device__ u32 buffer(u32 number) const { return number * pitch; }
};

// EMPTY is the largest word there is: packets have arrived when all of their words are less.
__device__ inline u32 largest(Packet p) { return max_u32(max_u32(p.w[0], p.w[1]), max_u32(p.w[2], p.w[3])); }
__device__ inline bool arrived(Packet p) { return largest(p) != EMPTY; }

// What a slot may be filled with: 0xFFFFFFFF is one fp32 NaN or two 16-bit NaNs; ...FE is NaN as well, in every dtype.
__device__ inline Packet sendable(Packet p) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) p.w[i] = min_u32(p.w[i], EMPTY - 1);
    return p;
}

// Tell the host and all channels, once: whoever makes an output NaN calls this.
__device__ inline void report(const Args &a, u32 code, u32 buffer, u64 waited_ns, u32 sequence, u64 mine, u64 theirs) {
    const u64 reported = a.control + FIELD(Control, reported);
    if (ld_relaxed_gpu_u32(reported) || atom_exch_relaxed_gpu_u32(reported, 1)) return;
    const u32 channels = ld_relaxed_gpu_u32(a.control + FIELD(Control, channels));
#pragma unroll 1
    for (u32 c = 0; c < channels; c++)
        st_relaxed_gpu_u32(a.control + CHANNELS_AT + c * sizeof(Channel) + FIELD(Channel, stopped), 1);
    st_relaxed_sys_u32(a.report + FIELD(Report, tag), a.tag);
    st_relaxed_sys_u32(a.report + FIELD(Report, buffer), buffer);
    st_relaxed_sys_u32(a.report + FIELD(Report, waited_ms), u32(waited_ns / 1000000));
    if (sequence) {
        st_relaxed_sys_u32(a.report + FIELD(Report, sequence), sequence);
        for (u32 i = 0; i < 2; i++) {
            st_relaxed_sys_u32(a.report + FIELD(Report, mine) + 4 * i, u32(mine >> 32 * i));
            st_relaxed_sys_u32(a.report + FIELD(Report, theirs) + 4 * i, u32(theirs >> 32 * i));
        }
    }
    fence_acq_rel_sys();
    st_relaxed_sys_u32(a.report + FIELD(Report, code), code);
}

// Stop this communicator on all ranks, unless somebody did: the first cause counts. The guard knows the call's number and
// signature, and a peer's.
__device__ inline void stop(const Args &a, u32 kind, u32 culprit, u32 buffer, u64 waited_ns, u32 sequence = 0, u64 mine = 0,
                            u64 theirs = 0) {
    u32 code = kind | culprit << 8 | a.rank << 16;
    const u32 before = atom_cas_relaxed_sys_u32(a.own + FIELD(Header, abort), 0, code);
    for (u32 j = 0; j < PEERS && before == 0; j++)
        st_relaxed_sys_u32(a.staging[source_at(j, a.rank)] + FIELD(Header, abort), code);
    report(a, before ? before : code, buffer, waited_ns, sequence, mine, theirs);
}

// Whether this rank was stopped before. It must not push then: it could overtake a peer that is merely late and
// overwrite slots which that peer has not read yet. Two looks see to it that it does not. This one is taken before
// griddepcontrol.wait, where it costs nothing, and ends a stopped rank's kernels at once. What the kernel just before has
// stopped may escape it: that is in Channel, which is read behind the boundary between the two. Only device scope, which is
// quicker: what peers and the host write may be seen later, by whoever waits.
__device__ inline bool stopped(const Args &a) { return GUARDED && ld_relaxed_gpu_u32(a.own + FIELD(Header, abort)); }

// A wait that lasts, and how it ended.
struct Wait {
    u64 since = 0;  // when it began, the last bit being `met`
    u64 waited_ns = 0;
    u32 missing = 0;  // a bit per place from where nothing came
    u32 buffer = 0;

    // Whether to wait no longer: the communicator was stopped, or the deadline has passed.
    __device__ bool over(const Args &a) {
        const u64 now = globaltimer();
        const u32 met = ld_relaxed_gpu_u32(a.control + FIELD(Control, met) + 4 * a.config);
        if (since == 0 || (since & 1) != met) since = (now & ~1ull) | met;  // another limit, another start
        waited_ns = now - since;
        const u64 limit = ld_relaxed_gpu_u64(a.control + (met ? FIELD(Control, deadline_ns) : FIELD(Control, grace_ns)));
        return ld_relaxed_sys_u32(a.own + FIELD(Header, abort)) || (limit && now >= since + limit);
    }

    // Waits until there is a packet of every peer; returns whether they came.
    __device__ bool ends_well(const Args &a, u64 first, u32 stride) {
        do {
            missing = 0;
#pragma unroll
            for (u32 j = 0; j < PEERS; j++) missing |= u32(!arrived(ld_relaxed_sys_v4(first + j * stride))) << j;
        } while (missing && !over(a));
        return !missing;
    }

    __device__ u32 culprit(const Args &a) const { return source_at(__ffs(missing) - 1, a.rank); }
};

// Wait for the packet of every peer, u[place], in the slots from `first` on. All loads first, then all checks, so
// that the round trips overlap. `use()` takes what is there, and once more after `wait_long()`, if that is called for: it
// returns when all packets are there, or gives up and ends the thread.
//
// The inner loop has one way out, by the branch that goes back: behind it the lanes of a warp are together again. With two
// ways, lanes that leave in different turns would sum and store one after the other, which took a small message 0.1 us.
// Behind the loop the sum comes before the question whether it was too early: by then the answer is there. And a long wait
// leaves nothing in registers that the usual way would have to be merged with.
template <class Use, class WaitLong>
__device__ inline void receive(u64 first, u32 stride, Packet (&u)[PEERS], Use use, WaitLong wait_long) {
    for (;;) {
        u32 polls = 0, most;
#pragma unroll 1
        do {
#pragma unroll
            for (u32 j = 0; j < PEERS; j++) u[j] = ld_relaxed_sys_v4(first + j * stride);
            most = largest(u[0]);
#pragma unroll
            for (u32 j = 1; j < PEERS; j++) most = max_u32(most, largest(u[j]));
        } while ((most == EMPTY) & (!GUARDED || ++polls <= POLLS));
        opaque(polls);
        use();
        if (!GUARDED || polls <= POLLS) return;
        wait_long();
    }
}

__device__ inline void poison(u64 first, u32 stride) {
#pragma unroll
    for (u32 j = 0; j < PEERS; j++) st_relaxed_sys_v4(first + j * stride, NOTHING);
}
