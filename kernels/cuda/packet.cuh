// Packets of elements: reading and writing the user's tensors, and the one sum of this project.
#pragma once
#include "ptx.cuh"

struct Fp32 {
    typedef u32 Bits;
    static constexpr u32 PER_WORD = 1;
    __device__ static void unpack(u32 w, float *f) { f[0] = __uint_as_float(w); }
    __device__ static u32 pack(const float *f) { return __float_as_uint(f[0]); }
};

struct Fp16 {
    typedef unsigned short Bits;
    static constexpr u32 PER_WORD = 2;
    __device__ static void unpack(u32 w, float *f) {
        f[0] = cvt_f32_f16(w & 0xFFFFu);
        f[1] = cvt_f32_f16(w >> 16);
    }
    __device__ static u32 pack(const float *f) { return cvt_rn_f16x2_f32(f[1], f[0]); }
};

struct Bf16 {
    typedef unsigned short Bits;
    static constexpr u32 PER_WORD = 2;
    __device__ static void unpack(u32 w, float *f) {
        f[0] = __uint_as_float(w << 16);
        f[1] = __uint_as_float(w & 0xFFFF0000u);
    }
    __device__ static u32 pack(const float *f) { return cvt_rn_bf16x2_f32(f[1], f[0]); }
};

template <class T>
constexpr u32 ELEMENTS = 4 * T::PER_WORD;  // elements of dtype T in a packet

// The user's tensor: any element-aligned address, any number of elements.
template <class T>
struct Tensor {
    u64 address;
    u64 numel;
    bool aligned;  // 16-byte accesses allowed

    __device__ Tensor(u64 address, u64 numel) : address(address), numel(numel), aligned(address % 16 == 0) {}

    __device__ static u64 packets(u64 numel) { return (numel + ELEMENTS<T> - 1) / ELEMENTS<T>; }

    // Packets of each of WORLD_SIZE equal parts.
    __device__ static u64 part(u64 numel) { return (packets(numel) + WORLD_SIZE - 1) / WORLD_SIZE; }

    // Packet number `packet`, zeros past the end: padding is sent like data, so that every thread of
    // an active warp always exchanges a packet with every peer (the protocol's safety needs it).
    __device__ Packet load(u64 packet) const {
        u64 first = packet * ELEMENTS<T>;
        Packet p = ZEROS;
        if (aligned && first + ELEMENTS<T> <= numel) {
            p = ld_global_v4(address + packet * 16);
        } else {
            const typename T::Bits *x = reinterpret_cast<const typename T::Bits *>(address);
#pragma unroll
            for (u32 i = 0; i < ELEMENTS<T>; i++)
                if (first + i < numel) p.w[i / T::PER_WORD] |= u32(x[first + i]) << (16 * (i % T::PER_WORD));
        }
        return p;
    }

    __device__ void store(u64 packet, Packet p) const {
        u64 first = packet * ELEMENTS<T>;
        if (aligned && first + ELEMENTS<T> <= numel) {
            st_global_v4(address + packet * 16, p);
        } else {
            typename T::Bits *x = reinterpret_cast<typename T::Bits *>(address);
#pragma unroll
            for (u32 i = 0; i < ELEMENTS<T>; i++)
                if (first + i < numel) x[first + i] = (typename T::Bits)(p.w[i / T::PER_WORD] >> (16 * (i % T::PER_WORD)));
        }
    }
};

// v[rank] = own, by selects: a run-time index would move v to local memory.
template <u32 N>
__device__ inline void insert(Packet (&v)[N], u32 rank, Packet own) {
#pragma unroll
    for (u32 s = 0; s < N; s++) v[s] = s == rank ? own : v[s];
}

// fp32 sum in absolute rank order, rounded once to T: the same bits in every algorithm. The sum starts
// from rank 0's value, not from zero, so that -0 + -0 stays -0.
template <class T, u32 N>
__device__ inline Packet sum_in_rank_order(const Packet (&v)[N]) {
    Packet r;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float acc[T::PER_WORD], x[T::PER_WORD];
        T::unpack(v[0].w[i], acc);
#pragma unroll
        for (u32 rank = 1; rank < N; rank++) {
            T::unpack(v[rank].w[i], x);
#pragma unroll
            for (u32 e = 0; e < T::PER_WORD; e++) acc[e] += x[e];
        }
        r.w[i] = T::pack(acc);
    }
    return r;
}
