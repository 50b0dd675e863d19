// Where a field of a struct is. NVRTC has no <stddef.h>, and up to CUDA 13.0 no __builtin_offsetof (12.8, 12.9 and 13.0 were tried).
#pragma once
#include "ptx.cuh"

// In kernels: a constant once compiled, but no constant expression.
#define offsetof(type, field) reinterpret_cast<u64>(&reinterpret_cast<type *>(0)->field)

template <class T>
struct Words {
    u32 w[sizeof(T) / 4];
};

template <class T>
__device__ constexpr T all_ones() {
    Words<T> words{};
    for (u32 i = 0; i < sizeof(T) / 4; i++) words.w[i] = ~0u;
    return __builtin_bit_cast(T, words);
}

template <class T>
__device__ constexpr bool begins_at(const T &t, u32 offset) {
    const Words<T> words = __builtin_bit_cast(Words<T>, t);
    return words.w[offset / 4] == ~0u && (offset == 0 || words.w[offset / 4 - 1] == 0);
}

// For static_assert: whether that field is at `offset`, a multiple of 4. Found by setting it, or its first element, in a struct of zeros.
template <class T, class F>
__device__ constexpr bool is_at(F T::*field, u32 offset) {
    T t{};
    t.*field = all_ones<F>();
    return begins_at(t, offset);
}
template <class T, class F, u32 N>
__device__ constexpr bool is_at(F (T::*field)[N], u32 offset) {
    T t{};
    (t.*field)[0] = all_ones<F>();
    return begins_at(t, offset);
}
template <class T, class F, u32 N, u32 M>
__device__ constexpr bool is_at(F (T::*field)[N][M], u32 offset) {
    T t{};
    (t.*field)[0][0] = all_ones<F>();
    return begins_at(t, offset);
}
