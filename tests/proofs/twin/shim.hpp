// Stands in for kernels/cuda/ptx.cuh, with the same names, when the kernels are built for the host.
//
// Every CUDA thread is a fiber, and all fibers share one host thread (driver.cpp): a seed decides who runs next, so
// every run can be repeated. A fiber may lose its turn at each access below.
//
// Strong accesses are relaxed atomics of 4-byte words; 16 bytes are four of them in random order.
// - Plain build: stores wait in a buffer of their block and leave it in any order (per address in program order).
//   The block's own threads see them at once, everybody else when they leave. So a store that needs a release before
//   it is seen too early in some run. Loads are not reordered.
// - ThreadSanitizer build: stores act at once, and relaxed accesses order nothing, as in the language. Fences, which
//   ThreadSanitizer does not know, are carried by the relaxed accesses round them: a store is a release while nothing
//   but strong accesses came between the fence and it; a fence acquires the words that the thread loaded since the last
//   one. This never hides a race of the C++ model; it could invent one (fence, weak access, store).
//
// Addresses must be aligned as PTX wants them, and what a peer or the host writes or reads is accessed with system scope.
//
// Weak accesses, the user's tensors and shared memory, are plain ones: what ThreadSanitizer watches. They are ordered by program
// order, __syncwarp, shuffles, __syncthreads, memory barriers and griddepcontrol_wait, each a release and an acquire of its own object.
// The barrier of a cluster, whose arrival is relaxed, orders nothing but that blocks have begun and their memory barriers exist.
//
// Stricter than the hardware: barriers of a block or a cluster wait for threads that have ended, too (there they are let off, and what
// they had to say is missing), lanes that meet must do so in the same operation, and a cluster's memory may be written only while the
// block whose it is has begun and not ended.
#pragma once

#define __CUDA_ARCH__ 900

typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

struct alignas(16) Packet {
    u32 w[4];
};
constexpr Packet splat(u32 word) { return Packet{{word, word, word, word}}; }

namespace twin {

struct Index {
    u32 x, y, z;
};

struct Exit {};  // thrown by a thread that ends

struct Lane {
    Index thread, block, block_dim, grid_dim;
};

extern Lane *lane;   // of the fiber that runs
void pause();        // perhaps others run first
void hold(u32 cycles);  // a pause in the code: it may be short alone
void spin(u64 address);  // a poll of that packet failed: others run first
u32 random(u32 n);   // 0 … n-1
u64 clock();         // virtual nanoseconds
void fence();
void syncwarp();
void syncthreads();
bool all(bool vote, u32 mask);    // of a warp, whose lanes are those of `mask`
u32 broadcast(u32 v, u32 mask);   // what the warp's lane 0 has
u32 shuffle(u32 v, u32 from);  // what that lane has
u32 ballot(bool p);     // a bit of each lane
u32 shared(u32 words);  // address of the block's shared memory
u32 *shared_at(u32 address, u32 words);  // of the block, or another one of its cluster
void cluster_arrive();
void cluster_wait();
void mbarrier_init(u32 address, u32 bytes);
void mbarrier_wait(u32 address);
void arrived(u32 barrier, u32 bytes, u32 at);  // at a barrier of the block, or another one of its cluster, which has the address, too
void trigger();      // griddepcontrol.launch_dependents
void wait();         // griddepcontrol.wait
void weak();         // a weak access follows
enum Scope { WEAK, GPU, SYS };
void access(u64 address, u32 nbytes, Scope scope, bool write = false);  // may this be?

// Strong accesses of the running fiber, of 4 or 8 bytes. Packets are checked: a push may only meet an empty slot.
u64 load(u64 address, u32 nbytes);
void store(u64 address, u64 value, u32 nbytes, bool packet);
void settle(u64 address);  // what the block has stored there leaves its buffer

#ifdef __SANITIZE_THREAD__
bool fenced();               // a relaxed store now is a release
void loaded(u64 address);    // for the next fence
void storing(u64 address, u32 value);
void stored(u64 address);
#endif

template <class Word>
inline Word load_word(u64 address) {
    pause();
#ifdef __SANITIZE_THREAD__
    loaded(address);
    return __atomic_load_n(reinterpret_cast<Word *>(address), __ATOMIC_RELAXED);
#else
    return Word(load(address, sizeof(Word)));
#endif
}

template <class Word>
inline void store_word(u64 address, Word value, bool packet = false) {
    pause();
#ifdef __SANITIZE_THREAD__
    if (packet) storing(address, value);
    if (fenced()) __atomic_store_n(reinterpret_cast<Word *>(address), value, __ATOMIC_RELEASE);
    else __atomic_store_n(reinterpret_cast<Word *>(address), value, __ATOMIC_RELAXED);
    stored(address);
#else
    store(address, value, sizeof(Word), packet);
#endif
}

// Where a read-modify-write acts.
inline u32 *target_of_atomic(u64 address) {
    pause();
    settle(address);
    return reinterpret_cast<u32 *>(address);
}

inline u32 bits(float f) { return __builtin_bit_cast(u32, f); }
inline float value(u32 bits) { return __builtin_bit_cast(float, bits); }

}  // namespace twin

#define threadIdx (twin::lane->thread)
#define blockIdx (twin::lane->block)
#define blockDim (twin::lane->block_dim)
#define gridDim (twin::lane->grid_dim)

inline Packet ld_global_v4(u64 address) {
    twin::access(address, 16, twin::WEAK);
    twin::pause();
    return *reinterpret_cast<const Packet *>(address);
}

inline void st_global_v4(u64 address, Packet p) {
    twin::access(address, 16, twin::WEAK, true);
    twin::pause();
    twin::weak();
    *reinterpret_cast<Packet *>(address) = p;
}

inline float ld_global_f32(u64 address) {
    twin::access(address, 4, twin::WEAK);
    twin::pause();
    return *reinterpret_cast<const float *>(address);
}

inline void st_global_u32(u64 address, u32 v) {
    twin::access(address, 4, twin::WEAK, true);
    twin::pause();
    twin::weak();
    *reinterpret_cast<u32 *>(address) = v;
}

inline void st_global_v2(u64 address, u32 low, u32 high) {
    twin::access(address, 8, twin::WEAK, true);
    twin::pause();
    twin::weak();
    reinterpret_cast<u32 *>(address)[0] = low;
    reinterpret_cast<u32 *>(address)[1] = high;
}

// Addresses as on sm_90: the upper byte says which block of the cluster, 0: one's own.
template <u32 WORDS>
inline u32 shared_memory() { return twin::shared(WORDS); }

inline void st_shared_u32(u32 address, u32 v) {
    twin::pause();
    twin::weak();
    *twin::shared_at(address, 1) = v;
}

inline Packet ld_shared_v4(u32 address) {
    twin::pause();
    const u32 *w = twin::shared_at(address, 4);
    return Packet{{w[0], w[1], w[2], w[3]}};
}

inline u32 mapa(u32 address, u32 block) { return (block + 1) << 24 | address; }
inline void mbarrier_init(u32 barrier, u32 bytes) { twin::mbarrier_init(barrier, bytes); }
inline void mbarrier_wait(u32 barrier) { twin::mbarrier_wait(barrier); }
inline void st_async_u32(u32 address, u32 v, u32 barrier) {
    st_shared_u32(address, v);
    twin::arrived(barrier, 4, address);
}
inline void barrier_cluster_arrive_relaxed() { twin::cluster_arrive(); }
inline void barrier_cluster_wait() { twin::cluster_wait(); }

inline Packet ld_relaxed_sys_v4(u64 address) {
    twin::access(address, 16, twin::SYS);
    Packet p;
    const u32 turn = twin::random(8);  // 0…3: upwards from there; 4…7: downwards
    bool empty = false;
    for (u32 i = 0; i < 4; i++) {
        const u32 k = (turn < 4 ? turn + i : turn - i) % 4;
        p.w[k] = twin::load_word<u32>(address + 4 * k);
        empty |= p.w[k] == 0xFFFFFFFFu;
    }
    if (empty) twin::spin(address);
    return p;
}

inline void st_relaxed_sys_v4(u64 address, Packet p, bool yes = true) {
    if (!yes) return;
    twin::access(address, 16, twin::SYS, true);
    const u32 turn = twin::random(8);
    for (u32 i = 0; i < 4; i++) {
        const u32 k = (turn < 4 ? turn + i : turn - i) % 4;
        twin::store_word(address + 4 * k, p.w[k], true);
    }
}

// Two 8-byte scalars, each whole.
inline Packet ld_relaxed_sys_v2_u64(u64 address) {
    twin::access(address, 16, twin::SYS);
    u64 w[2];
    const u32 turn = twin::random(2);
    for (u32 i = 0; i < 2; i++) w[i ^ turn] = twin::load_word<u64>(address + 8 * (i ^ turn));
    return Packet{{u32(w[0]), u32(w[0] >> 32), u32(w[1]), u32(w[1] >> 32)}};
}

inline void st_relaxed_sys_v2_u64(u64 address, Packet p) {
    twin::access(address, 16, twin::SYS, true);
    const u64 w[2] = {p.w[0] | u64(p.w[1]) << 32, p.w[2] | u64(p.w[3]) << 32};
    const u32 turn = twin::random(2);
    for (u32 i = 0; i < 2; i++) twin::store_word(address + 8 * (i ^ turn), w[i ^ turn]);
}

inline u32 ld_relaxed_sys_u32(u64 address) {
    twin::access(address, 4, twin::SYS);
    return twin::load_word<u32>(address);
}
inline u32 ld_relaxed_gpu_u32(u64 address) {
    twin::access(address, 4, twin::GPU);
    return twin::load_word<u32>(address);
}
inline u64 ld_relaxed_gpu_u64(u64 address) {
    twin::access(address, 8, twin::GPU);
    return twin::load_word<u64>(address);
}
inline u64 ld_relaxed_gpu_v2_u32(u64 address) {
    twin::access(address, 8, twin::GPU);
    const u64 low = twin::load_word<u32>(address);
    return low | u64(twin::load_word<u32>(address + 4)) << 32;
}
inline void st_relaxed_gpu_u32(u64 address, u32 v) {
    twin::access(address, 4, twin::GPU, true);
    twin::store_word(address, v);
}
inline void st_relaxed_sys_u32(u64 address, u32 v) {
    twin::access(address, 4, twin::SYS, true);
    twin::store_word(address, v);
}

inline u32 atom_exch_relaxed_gpu_u32(u64 address, u32 v) {
    twin::access(address, 4, twin::GPU, true);
    return __atomic_exchange_n(twin::target_of_atomic(address), v, __ATOMIC_RELAXED);
}

inline u32 atom_cas_relaxed_sys_u32(u64 address, u32 expected, u32 v) {
    twin::access(address, 4, twin::SYS, true);
    __atomic_compare_exchange_n(twin::target_of_atomic(address), &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

inline u32 atom_add_relaxed_gpu_u32(u64 address, u32 v) {
    twin::access(address, 4, twin::GPU, true);
    return __atomic_fetch_add(twin::target_of_atomic(address), v, __ATOMIC_RELAXED);
}

inline void fence_acq_rel_sys() { twin::fence(); }

inline u64 globaltimer() { return twin::clock(); }
inline u32 cycles() { return 0; }
inline void pause(u32, u32 duration) { twin::hold(duration); }  // for speed alone: the driver delays whom it likes

inline void griddepcontrol_launch_dependents() { twin::trigger(); }
inline void griddepcontrol_wait() { twin::wait(); }

inline u32 zero() { return 0; }
inline void materialize(u64 &) {}
inline void materialize(u32 &) {}
inline void materialize(float &) {}
inline void opaque(u32 &) {}
inline void opaque(Packet &) {}
[[noreturn]] inline void exit_thread() { throw twin::Exit(); }
// Of the lanes that have not returned.
inline bool all_sync(u32 mask, bool p) { return twin::all(p, mask); }
inline bool any_sync(u32 mask, bool p) { return !twin::all(!p, mask); }
inline u32 broadcast(u32 mask, u32 v) { return twin::broadcast(v, mask); }
inline u32 shfl(u32 v, u32 lane) { return twin::shuffle(v, lane); }
inline u32 ballot(bool p) { return twin::ballot(p); }
inline u32 shfl_xor(u32 v, u32 lanes) { return twin::shuffle(v, threadIdx.x % 32 ^ lanes); }
inline float shfl_xor(float v, u32 lanes) { return twin::value(shfl_xor(twin::bits(v), lanes)); }
inline u32 warp_max(u32 v) {
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        const u32 other = shfl_xor(v, lanes);
        v = v < other ? other : v;
    }
    return v;
}
inline void __syncwarp() { twin::syncwarp(); }
inline void __syncthreads() { twin::syncthreads(); }
inline u32 __float_as_uint(float f) { return twin::bits(f); }
inline float __uint_as_float(u32 w) { return twin::value(w); }
inline int __ffs(u32 w) { return __builtin_ffs(int(w)); }
inline u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max_u32(u32 a, u32 b) { return a < b ? b : a; }
inline void add_if(bool yes, float &sum, float x) {
    if (yes) sum += x;
}

// Rounded to nearest each, as g++ is told to contract nothing. For __frsqrt_rn see norm_reference.rsqrt.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return float(1.0 / __builtin_sqrt(double(x))); }

inline float cvt_f32_f16(u32 low16) {
    const u32 sign = low16 << 16 & 0x80000000u, exponent = low16 >> 10 & 31, mantissa = low16 & 1023;
    if (exponent == 31) return twin::value(sign | 0x7F800000u | mantissa << 13);
    if (exponent) return twin::value(sign | (exponent + 112) << 23 | mantissa << 13);
    return twin::value(sign | twin::bits(float(mantissa) * 0x1p-24f));
}

namespace twin {

// Round to nearest, ties to even; every NaN becomes 0x7FFF, as cvt.rn does.
inline u32 half(float f) {
    const u32 sign = bits(f) >> 16 & 0x8000u;
    u32 a = bits(f) & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return 0x7FFFu;
    if (a >= 0x47800000u) return sign | 0x7C00u;
    if (a < 0x38800000u) return sign | (bits(value(a) + 0.5f) - bits(0.5f));  // the addition rounds to 2^-24
    a += 0xC8000FFFu + (a >> 13 & 1);  // exponent - 112, half a unit less one, one more if odd
    return sign | a >> 13;
}

inline u32 brain(float f) {
    const u32 w = bits(f);
    return (w & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : (w + 0x7FFFu + (w >> 16 & 1)) >> 16;
}

// e4m3: four bits of exponent with bias 7, three of mantissa, no infinity. Saturating; every NaN becomes 0x7F.
inline u32 e4m3(float f) {
    const u32 sign = bits(f) >> 24 & 0x80u;
    u32 a = bits(f) & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return 0x7Fu;
    if (a >= bits(448.0f)) return sign | 0x7Eu;
    if (a < bits(0x1p-6f)) return sign | (bits(value(a) + 0x1p14f) - bits(0x1p14f));  // the addition rounds to 2^-9
    a += 0x7FFFFu + (a >> 20 & 1);  // half a unit less one, one more if odd
    return sign | ((a >> 20) - (120 << 3));
}

}  // namespace twin

inline u32 cvt_rn_satfinite_e4m3x2_f32(float high, float low) { return twin::e4m3(high) << 8 | twin::e4m3(low); }
inline u32 cvt_rn_f16x2_f32(float high, float low) { return twin::half(high) << 16 | twin::half(low); }
inline u32 cvt_rn_bf16x2_f32(float high, float low) { return twin::brain(high) << 16 | twin::brain(low); }

// An fp32 addition, then rounded: the same bits (packet.cuh).
inline u32 add_rn_f16x2(u32 a, u32 b) {
    return cvt_rn_f16x2_f32(cvt_f32_f16(a >> 16) + cvt_f32_f16(b >> 16), cvt_f32_f16(a & 0xFFFFu) + cvt_f32_f16(b & 0xFFFFu));
}
inline u32 add_rn_bf16x2(u32 a, u32 b) {
    return cvt_rn_bf16x2_f32(twin::value(a & 0xFFFF0000u) + twin::value(b & 0xFFFF0000u), twin::value(a << 16) + twin::value(b << 16));
}
