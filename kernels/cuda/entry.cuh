// Kernel entry points, which the compiler front appends to a source: ENTRY(NAME, body). The names show in profilers. `Config` is
// the front's, too: a struct of the compile-time constants WORLD_SIZE, PACKETS (of a thread), STREAM, GUARDED, VIRTUAL_RANKS.
//
// With VIRTUAL_RANKS the kernels take an array of Args and blockIdx.y is the rank: all ranks of a world in one cooperative
// launch on one GPU, for tests and compute-sanitizer.
#pragma once
#include "abi.cuh"

template <bool VIRTUAL_RANKS>
struct Parameter {
    typedef Args Type;
    __device__ static const Args &of(const Args &args) { return args; }
};

template <>
struct Parameter<true> {
    typedef const Args *Type;
    __device__ static const Args &of(const Args *ranks) { return ranks[blockIdx.y]; }
};

// Blocks of 512 threads that an SM must have registers for. Few-SM modes and many peers need more registers a thread.
template <class Config>
constexpr u32 MIN_BLOCKS = Config::WORLD_SIZE > 4 || Config::PACKETS > 1 ? 1 : 2;

#define ENTRY(name, ...)                                                                      \
    extern "C" __global__ void __launch_bounds__(512, MIN_BLOCKS<Config>)                     \
        name(const __grid_constant__ Parameter<Config::VIRTUAL_RANKS>::Type parameter) {      \
        __VA_ARGS__(Parameter<Config::VIRTUAL_RANKS>::of(parameter));                         \
    }
