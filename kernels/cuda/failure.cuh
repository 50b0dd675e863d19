// Leaving a wait: the first rank to find a reason broadcasts an abort code, and all ranks stop.
#pragma once
#include "wait.cuh"

// Tell the host and all channels of this rank, once: whoever makes an output NaN calls this.
template <class Config>
__device__ inline void report(const Args &a, u32 code, u32 buffer, u64 waited_ns, u32 sequence, u64 mine, u64 theirs) {
    const u64 reported = a.control + offsetof(Control, reported);
    if (ld_relaxed_gpu_u32(reported) || atom_exch_relaxed_gpu_u32(reported, 1)) return;
    const u32 channels = ld_relaxed_gpu_u32(a.control + offsetof(Control, channels));
#pragma unroll 1
    for (u32 c = 0; c < channels; c++)
        st_relaxed_gpu_u32(a.control + sizeof(Control) + c * sizeof(Channel) + offsetof(Channel, stopped), 1);
    st_relaxed_sys_u32(a.report + offsetof(Report, tag), a.tag);
    st_relaxed_sys_u32(a.report + offsetof(Report, buffer), buffer);
    st_relaxed_sys_u32(a.report + offsetof(Report, waited_ms), u32(waited_ns / 1000000));
    if (sequence) {
        st_relaxed_sys_u32(a.report + offsetof(Report, sequence), sequence);
        for (u32 i = 0; i < 2; i++) {
            st_relaxed_sys_u32(a.report + offsetof(Report, mine) + 4 * i, u32(mine >> 32 * i));
            st_relaxed_sys_u32(a.report + offsetof(Report, theirs) + 4 * i, u32(theirs >> 32 * i));
        }
    }
    fence_acq_rel_sys();
    st_relaxed_sys_u32(a.report + offsetof(Report, code), code);
}

// Stop this communicator on all ranks: broadcasts the abort code, unless there is one already, as the first cause counts. Only
// the guard knows the call's number and the signatures.
//
// HOST: headers are in host memory, where atomic operations may not be (PCIe need not have them). So threads of this rank settle
// in its Control which is first, and what peers and the host tell comes before that.
template <class Config>
__device__ inline void stop(const Args &a, u32 kind, u32 culprit, u32 buffer, u64 waited_ns, u32 sequence = 0, u64 mine = 0,
                            u64 theirs = 0) {
    u32 code = kind | culprit << CULPRIT_SHIFT | a.rank << FINDER_SHIFT;
    u32 before;
    if constexpr (Config::HOST) {
        const u32 told = ld_relaxed_sys_u32(a.own + offsetof(Header, abort));
        before = atom_cas_relaxed_sys_u32(a.control + offsetof(Control, abort), 0, told ? told : code);
        if (before == 0 && told) before = told;
        if (before == 0) st_relaxed_sys_u32(a.own + offsetof(Header, abort), code);
    } else {
        before = atom_cas_relaxed_sys_u32(a.own + offsetof(Header, abort), 0, code);
    }
    for (u32 j = 0; j < PEERS<Config> && before == 0; j++)
        st_relaxed_sys_u32(a.staging[source_at(j, a.rank)] + offsetof(Header, abort), code);
    report<Config>(a, before ? before : code, buffer, waited_ns, sequence, mine, theirs);
}

// Whether this rank was stopped before this kernel. Then it must not push: it could overtake a peer that is merely late, and
// overwrite slots that this peer has not read yet. Two checks prevent that. This one comes before griddepcontrol.wait, where
// it costs nothing, and ends a stopped rank's kernels at once. It may miss what the kernel just before has stopped; that is in
// Channel.stopped, which is read behind the kernel boundary. Device scope, which is faster, is enough: whoever waits will see
// what peers and the host write. (HOST: the header is a round trip over the bus away, and whoever waits looks there. Here
// it is what this rank's own kernels and its own process have found.)
template <class Config>
__device__ inline bool stopped(const Args &a) {
    return Config::GUARDED && ld_relaxed_gpu_u32(Config::HOST ? a.control + offsetof(Control, abort) : a.own + offsetof(Header, abort));
}

// Of a thread that did not get every packet: the epilogue's substitute for its results, and the abort.
template <class Config, class Epilogue, class Share>
__device__ __noinline__ void give_up(const Args &a, Share share, Wait wait) {
    griddepcontrol_wait();  // an overlapping launch may not have waited yet, and later kernels rely on all before this one
    Epilogue::abandon(a, share);
    stop<Config>(a, TIMEOUT, wait.culprit(a), wait.buffer, wait.waited_ns);
}

// The slow path of a thread whose packets are late: returns when they are there, or gives up and ends the thread; where others wait
// for it (Epilogue::WAITED_FOR), it returns whether they are there. A function of its own, so that the fast path is contiguous.
template <class Config, class Wire, class Epilogue, class Share>
__device__ __noinline__ auto wait_slow(const Args &a, u64 slot, u32 stride, u32 buffer, Share share) {
    Wait wait;
    wait.buffer = buffer;
    const bool came = wait.wait_all<Config, Wire>(a, slot, stride);
    if (!came) give_up<Config, Epilogue>(a, share, wait);
    if constexpr (Epilogue::WAITED_FOR) return came;
    else if (!came) exit_thread();
}
