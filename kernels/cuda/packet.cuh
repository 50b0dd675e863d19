// Packets of elements: reading and writing the user's tensors, and the one sum of this project.
#pragma once
#include "ptx.cuh"

struct Fp32 {
    typedef u32 Bits;
    static constexpr u32 PER_WORD = 1;
    __device__ static void unpack(u32 w, float *f) { f[0] = __uint_as_float(w); }
    __device__ static u32 pack(const float *f) { return __float_as_uint(f[0]); }
    __device__ static u32 add(u32 a, u32 b) { return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b))); }
};

struct Fp16 {
    typedef unsigned short Bits;
    static constexpr u32 PER_WORD = 2;
    __device__ static void unpack(u32 w, float *f) {
        f[0] = cvt_f32_f16(w & 0xFFFFu);
        f[1] = cvt_f32_f16(w >> 16);
    }
    __device__ static u32 pack(const float *f) { return cvt_rn_f16x2_f32(f[1], f[0]); }
    __device__ static u32 add(u32 a, u32 b) { return add_rn_f16x2(a, b); }
};

struct Bf16 {
    typedef unsigned short Bits;
    static constexpr u32 PER_WORD = 2;
    __device__ static void unpack(u32 w, float *f) {
        f[0] = __uint_as_float(w << 16);
        f[1] = __uint_as_float(w & 0xFFFF0000u);
    }
    __device__ static u32 pack(const float *f) { return cvt_rn_bf16x2_f32(f[1], f[0]); }
    __device__ static u32 add(u32 a, u32 b) { return add_rn_bf16x2(a, b); }
};

template <class T>
constexpr u32 ELEMENTS = 4 * T::PER_WORD;  // elements of dtype T in a packet

template <class T>
__device__ inline u32 packets_of(u64 numel) {
    return (u32(numel) + ELEMENTS<T> - 1) / ELEMENTS<T>;
}

// The user's tensor: any number of elements at any element-aligned address. WHOLE: the address is a multiple of 16
// and the elements fill whole packets; such tensors take a fraction of the code, and to fetch code is what small messages wait for.
// Packets are numbered from `first` on.
template <class T, bool WHOLE>
struct Tensor {
    u64 address;  // of packet 0 from there
    u32 numel;
    u32 packets;
    u32 first;

    __device__ Tensor(u64 address, u64 numel, u32 first = 0)
        : address(address + u64(first) * 16), numel(numel), packets(packets_of<T>(numel)), first(first) {}

    // Packet number `packet`, zeros past the end: padding is sent like data, so that every thread of
    // an active warp always exchanges a packet with every peer (the protocol's safety needs it).
    __device__ Packet load(u32 packet) const {
        if (first + packet >= packets) return splat(0);
        u64 at = address + u64(packet) * 16;
        if (WHOLE) return ld_global_v4(at);
        Packet p = splat(0);
        const typename T::Bits *x = reinterpret_cast<const typename T::Bits *>(at);
#pragma unroll
        for (u32 i = 0; i < ELEMENTS<T>; i++)
            if ((first + packet) * ELEMENTS<T> + i < numel) p.w[i / T::PER_WORD] |= u32(x[i]) << (16 * (i % T::PER_WORD));
        return p;
    }

    __device__ void store(u32 packet, Packet p) const {
        if (first + packet >= packets) return;
        u64 at = address + u64(packet) * 16;
        if (WHOLE) return st_global_v4(at, p);
        typename T::Bits *x = reinterpret_cast<typename T::Bits *>(at);
#pragma unroll
        for (u32 i = 0; i < ELEMENTS<T>; i++)
            if ((first + packet) * ELEMENTS<T> + i < numel)
                x[i] = (typename T::Bits)(p.w[i / T::PER_WORD] >> (16 * (i % T::PER_WORD)));
    }
};

// Element by element, rounded to T. An fp32 addition that is then rounded to T has the same bits: where the fp32 sum of two 16-bit
// numbers is not exact, one of them is too small to reach the middle between two 16-bit numbers (tests/gpu tries all pairs).
template <class T>
__device__ inline Packet add(Packet a, Packet b) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) a.w[i] = T::add(a.w[i], b.w[i]);
    return a;
}

// fp32 sum in absolute rank order, rounded once to T: the same bits in every algorithm. The local contribution is added in rank
// order by predicated adds: to select its place among the peers' would take twice as long. The sum starts from the first two
// ranks' values, whose order does not matter, not from zero, so that -0 + -0 stays -0.
template <class T, class Wire, u32 PEERS>
__device__ inline Packet sum(const Packet (&peers)[PEERS], Packet own, u32 rank) {
    constexpr u32 WORLD_SIZE = PEERS + 1;
    if (WORLD_SIZE == 2) return add<T>(Wire::decode(peers[0]), own);
    Packet r;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float acc[T::PER_WORD], mine[T::PER_WORD], x[T::PER_WORD];
        T::unpack(Wire::decode(peers[0]).w[i], acc);
        T::unpack(own.w[i], mine);
#pragma unroll
        for (u32 turn = 1; turn < WORLD_SIZE; turn++) {
            const bool now = turn == 1 ? rank <= 1 : rank == turn;
#pragma unroll
            for (u32 e = 0; e < T::PER_WORD; e++) add_if(now, acc[e], mine[e]);
            if (turn == WORLD_SIZE - 1) break;
            T::unpack(Wire::decode(peers[turn]).w[i], x);
#pragma unroll
            for (u32 e = 0; e < T::PER_WORD; e++) acc[e] += x[e];
        }
        r.w[i] = T::pack(acc);
    }
    return r;
}
