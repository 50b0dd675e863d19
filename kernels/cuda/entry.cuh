// Kernel entry points: NAME_DTYPE_wsN(Args), names that show in profilers.
//
// With VIRTUAL_RANKS defined the kernels take an array of Args and blockIdx.y is the rank: all ranks of a
// world in one cooperative launch on one GPU, for tests and compute-sanitizer.
#pragma once
#include "packet.cuh"
#include "staging.cuh"

#define JOIN_(a, b, c, d) a##_##b##_##c##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)

#ifdef VIRTUAL_RANKS
#define PARAMETER const Args *ranks
#define ARGS ranks[blockIdx.y]
#else
#define PARAMETER const __grid_constant__ Args args
#define ARGS args
#endif

#define ENTRY(name, dtype, Dtype, body)                                                                  \
    extern "C" __global__ void __launch_bounds__(512, WORLD_SIZE > 4 ? 1 : 2) JOIN(name, dtype, ws, WORLD_SIZE)(PARAMETER) { \
        body<Dtype>(ARGS);                                                                               \
    }

#define ENTRY_ALL_DTYPES(name, body) \
    ENTRY(name, fp32, Fp32, body)    \
    ENTRY(name, fp16, Fp16, body)    \
    ENTRY(name, bf16, Bf16, body)
