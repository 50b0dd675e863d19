// Kernel entry points, which the compiler front appends to a source: ENTRY(NAME, body). The names show in profilers. `Config` is
// the front's, too: a struct of the compile-time constants WORLD_SIZE, PACKETS (of a thread), STREAM, GUARDED, VIRTUAL_RANKS, HOST
// (staging memory is on the host), and what else a source takes.
//
// With VIRTUAL_RANKS the kernels take an array of Args and blockIdx.y is the rank: all ranks of a world in one cooperative
// launch on one GPU, for tests and compute-sanitizer.
#pragma once
#include "abi.cuh"

template <class A, bool VIRTUAL_RANKS>
struct Parameter {
    typedef A Type;
    __device__ static const A &of(const A &args) { return args; }
};

template <class A>
struct Parameter<A, true> {
    typedef const A *Type;
    __device__ static const A &of(const A *ranks) { return ranks[blockIdx.y]; }
};

// Blocks of 512 threads that an SM must have registers for. Few-SM modes and many peers need more registers a thread, and kernels of
// staging memory on the host, whose blocks are small and few, may have them.
template <class Config>
constexpr u32 MIN_BLOCKS = Config::WORLD_SIZE > 4 || Config::PACKETS > 1 || Config::HOST ? 1 : 2;

#define ENTRY(name, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(512, MIN_BLOCKS<Config>)                       \
        name(const __grid_constant__ Parameter<Args, Config::VIRTUAL_RANKS>::Type parameter) {  \
        __VA_ARGS__(Parameter<Args, Config::VIRTUAL_RANKS>::of(parameter));                     \
    }

// The same over NormArgs, for rows of a block of WARPS warps, or of a cluster of CLUSTER blocks.
#define NORM_ENTRY(name, CLUSTER, WARPS, MIN_BLOCKS, ...)                                           \
    extern "C" __global__ void CLUSTER_OF_##CLUSTER __launch_bounds__(32 * WARPS, MIN_BLOCKS)       \
        name(const __grid_constant__ Parameter<NormArgs, Config::VIRTUAL_RANKS>::Type parameter) {  \
        __VA_ARGS__(Parameter<NormArgs, Config::VIRTUAL_RANKS>::of(parameter));                     \
    }
#define CLUSTER_OF_1
#define CLUSTER_OF_2 __cluster_dims__(2, 1, 1)
#define CLUSTER_OF_4 __cluster_dims__(4, 1, 1)
#define CLUSTER_OF_8 __cluster_dims__(8, 1, 1)
