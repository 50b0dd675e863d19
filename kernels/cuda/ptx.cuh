// PTX instructions as functions, named after their mnemonics. No headers: NVRTC compiles this unaided.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// 16 bytes, the unit that travels. Only each 4-byte word is relied upon to arrive whole.
struct alignas(16) Packet {
    u32 w[4];
};

__device__ constexpr Packet splat(u32 word) { return Packet{{word, word, word, word}}; }

// Weak accesses: the user's tensors.
__device__ inline Packet ld_global_v4(u64 address) {
    Packet p;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
                 : "l"(address)
                 : "memory");
    return p;
}

__device__ inline void st_global_v4(u64 address, Packet p) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(p.w[0]), "r"(p.w[1]),
                 "r"(p.w[2]), "r"(p.w[3])
                 : "memory");
}

// Strong system-scope accesses: the only ones used on memory that a peer writes or reads.
__device__ inline Packet ld_relaxed_sys_v4(u64 address) {
    Packet p;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
                 : "l"(address)
                 : "memory");
    return p;
}

// Predicated on `yes`: a branch would take longer than the store.
__device__ inline void st_relaxed_sys_v4(u64 address, Packet p, bool yes = true) {
    asm volatile("{ .reg .pred yes; setp.ne.u32 yes, %5, 0; @yes "
                 "st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4}; }" ::"l"(address), "r"(p.w[0]), "r"(p.w[1]),
                 "r"(p.w[2]), "r"(p.w[3]), "r"(u32(yes))
                 : "memory");
}

// Two 8-byte scalars: each half arrives whole.
__device__ inline Packet ld_relaxed_sys_v2_u64(u64 address) {
    u64 low, high;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(address) : "memory");
    return Packet{{u32(low), u32(low >> 32), u32(high), u32(high >> 32)}};
}

__device__ inline void st_relaxed_sys_v2_u64(u64 address, Packet p) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(p.w[0] | u64(p.w[1]) << 32),
                 "l"(p.w[2] | u64(p.w[3]) << 32)
                 : "memory");
}

__device__ inline u32 ld_relaxed_sys_u32(u64 address) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

__device__ inline u32 ld_relaxed_gpu_u32(u64 address) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

__device__ inline u64 ld_relaxed_gpu_u64(u64 address) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
    return v;
}

// Two words, each whole. One 8-byte load could not race with a 4-byte store: the memory model wants equal sizes.
__device__ inline u64 ld_relaxed_gpu_v2_u32(u64 address) {
    u32 low, high;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"(address) : "memory");
    return low | u64(high) << 32;
}

__device__ inline void st_relaxed_gpu_u32(u64 address, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

__device__ inline void st_relaxed_sys_u32(u64 address, u32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

__device__ inline u32 atom_exch_relaxed_gpu_u32(u64 address, u32 v) {
    u32 old;
    asm volatile("atom.exch.relaxed.gpu.global.b32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
    return old;
}

__device__ inline u32 atom_cas_relaxed_sys_u32(u64 address, u32 expected, u32 v) {
    u32 old;
    asm volatile("atom.cas.relaxed.sys.global.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "l"(address), "r"(expected), "r"(v)
                 : "memory");
    return old;
}

__device__ inline u32 atom_add_relaxed_gpu_u32(u64 address, u32 v) {
    u32 old;
    asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
    return old;
}

__device__ inline void fence_acq_rel_sys() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

__device__ inline u64 globaltimer() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    return t;
}

// Of this SM, and they wrap. Nothing but speed may depend on them.
__device__ inline u32 cycles() {
    u32 t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
    return t;
}

// Returns when so many cycles have passed since then.
__device__ inline void pause(u32 since, u32 duration) {
    while (cycles() - since < duration) {}
}

// 0 at run time, unknown at compile time: a value to which this is added stays in a register. Otherwise the compiler computes
// it again wherever it is needed, from the launch's arguments, and reading those takes dozens of cycles. (Measured on sm_90;
// nothing is forced on others, where registers may be too few.)
__device__ inline u32 zero() {
#if __CUDA_ARCH__ == 900
    return threadIdx.y;
#else
    return 0;
#endif
}

// The value, never 1 (never all ones), is in a register when this returns: the compiler cannot sink its computation below a
// branch on it.
__device__ inline void materialize(u64 &value) {
    value += zero();
    asm volatile("{ .reg .pred none; setp.eq.u64 none, %0, 1; @none exit; }" : "+l"(value)::"memory");
}
__device__ inline void materialize(u32 &value) {
    value += zero();
    asm volatile("{ .reg .pred none; setp.eq.u32 none, %0, 0xFFFFFFFF; @none exit; }" : "+r"(value)::"memory");
}

__device__ inline void materialize(float &value) {
    u32 bits = __float_as_uint(value);
    materialize(bits);
    value = __uint_as_float(bits);
}

// Optimisation barrier: the compiler loses what it knows about the value, so it neither merges a branch on it with an earlier
// one nor sinks the computation of it.
__device__ inline void opaque(u32 &value) { asm volatile("" : "+r"(value)); }
__device__ inline void opaque(Packet &p) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) opaque(p.w[i]);
}

[[noreturn]] __device__ inline void exit_thread() {
    asm volatile("exit;");
    __builtin_unreachable();
}

// Whether `p` holds in every lane of `mask`; all of them take part.
__device__ inline bool all_sync(u32 mask, bool p) { return __all_sync(mask, p); }

// Whether `p` holds in a lane of `mask`; all of them take part.
__device__ inline bool any_sync(u32 mask, bool p) { return __any_sync(mask, p); }

// A bit of each lane: whether `p` holds there; all lanes of the warp take part.
__device__ inline u32 ballot(bool p) { return __ballot_sync(~0u, p); }

// That lane's value; all lanes of the warp take part.
__device__ inline u32 shfl(u32 v, u32 lane) { return __shfl_sync(~0u, v, lane); }

// Lane 0's value; the lanes of `mask` take part.
__device__ inline u32 broadcast(u32 mask, u32 v) { return __shfl_sync(mask, v, 0); }

// The other lane's value; all lanes of the warp take part.
__device__ inline float shfl_xor(float v, u32 lanes) { return __shfl_xor_sync(~0u, v, lanes); }
__device__ inline u32 shfl_xor(u32 v, u32 lanes) { return __shfl_xor_sync(~0u, v, lanes); }

// The largest of all lanes of the warp.
__device__ inline u32 warp_max(u32 v) { return __reduce_max_sync(~0u, v); }

// Shared memory: an address of this block's, or of another one's of its cluster (clusters: sm_90 and later).
template <u32 WORDS>
__device__ inline u32 shared_memory() {
    __shared__ alignas(16) u32 words[WORDS];
    return u32(__cvta_generic_to_shared(words));
}

__device__ inline void st_shared_u32(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ inline Packet ld_shared_v4(u32 address) {
    Packet p;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
                 : "r"(address)
                 : "memory");
    return p;
}

#if __CUDA_ARCH__ >= 900
__device__ inline u32 mapa(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

// A barrier of 8 bytes in shared memory, in its only phase complete when this has returned and so many bytes have come. Blocks of the
// cluster know of it behind the cluster's next barrier.
__device__ inline void mbarrier_init(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the barrier is complete, and what came is visible.
__device__ inline void mbarrier_wait(u32 barrier) {
    asm volatile(
        "{ .reg .pred complete;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], 0;\n"
        "@!complete bra again; }" ::"r"(barrier) : "memory");
}

// A word into the memory of a block of the cluster, whose `barrier` counts its bytes once they are there.
__device__ inline void st_async_u32(u32 address, u32 v, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(v), "r"(barrier)
                 : "memory");
}

// Of all threads of the cluster. Relaxed: it orders no writes before the arrival, and so does not wait for them.
__device__ inline void barrier_cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

// Programmatic dependent launch (sm_90 and later; before it, kernels of a stream do not overlap).
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when every earlier kernel of the stream has completed and its writes are visible.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// One instruction; the compiler would emit a comparison and a select.
__device__ inline u32 min_u32(u32 a, u32 b) {
    u32 r;
    asm("min.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ inline u32 max_u32(u32 a, u32 b) {
    u32 r;
    asm("max.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// sum += x, predicated on `yes`.
__device__ inline void add_if(bool yes, float &sum, float x) {
    asm("{ .reg .pred yes; setp.ne.u32 yes, %2, 0; @yes add.f32 %0, %0, %1; }" : "+f"(sum) : "f"(x), "r"(u32(yes)));
}

__device__ inline float cvt_f32_f16(u32 low16) {
    float f;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(low16));
    return f;
}

__device__ inline u32 cvt_rn_f16x2_f32(float high, float low) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline u32 cvt_rn_bf16x2_f32(float high, float low) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two elements each, every one rounded by itself; NaN becomes 0x7FFF. (1 * a + b: a bf16 addition is an instruction of sm_90 only.)
__device__ inline u32 add_rn_bf16x2(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return r;
}

__device__ inline u32 add_rn_f16x2(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// e4m3, saturating; NaN stays NaN.
__device__ inline u32 cvt_rn_satfinite_e4m3x2_f32(float high, float low) {
    unsigned short r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline void st_global_u32(u64 address, u32 v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

__device__ inline void st_global_v2(u64 address, u32 low, u32 high) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(low), "r"(high) : "memory");
}

__device__ inline float ld_global_f32(u64 address) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}
