// Kernel entry points: NAME_DTYPE_wsN(Args) and NAME_DTYPE_wsN_ragged(Args), names that show in profilers. NAME is
// defined by the compiler front; the ragged form takes tensors that are not made of whole, aligned packets.
//
// With VIRTUAL_RANKS defined the kernels take an array of Args and blockIdx.y is the rank: all ranks of a
// world in one cooperative launch on one GPU, for tests and compute-sanitizer.
#pragma once
#include "packet.cuh"
#include "staging.cuh"

#define JOIN_(a, b, c, d) a##_##b##_ws##c##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)

#ifdef VIRTUAL_RANKS
#define PARAMETER const Args *ranks
#define ARGS ranks[blockIdx.y]
#else
#define PARAMETER const __grid_constant__ Args args
#define ARGS args
#endif

#define ENTRY(dtype, Dtype, suffix, whole, body)                                                          \
    extern "C" __global__ void __launch_bounds__(512, WORLD_SIZE > 4 || PACKETS > 1 ? 1 : 2)              \
        JOIN(NAME, dtype, WORLD_SIZE, suffix)(PARAMETER) {                                                \
        body<Dtype, whole>(ARGS);                                                                         \
    }

#define ENTRIES(dtype, Dtype, body)        \
    ENTRY(dtype, Dtype, , true, body)      \
    ENTRY(dtype, Dtype, _ragged, false, body)

#define ENTRY_ALL_DTYPES(body)   \
    ENTRIES(fp32, Fp32, body)    \
    ENTRIES(fp16, Fp16, body)    \
    ENTRIES(bf16, Bf16, body)
