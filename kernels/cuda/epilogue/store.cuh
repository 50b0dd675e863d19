// An epilogue says what becomes of a sum. A thread hands it each of its sums with `take`, in any order, and ends with `finish`.
// A thread that gives up a wait calls `abandon`, and then ends, unless other threads wait for it in `finish` (WAITED_FOR): then it goes
// on, with NaN in place of what did not come.
//
// Store: the sum is the result.
#pragma once
#include "abi.cuh"
#include "packet.cuh"

template <class T, bool WHOLE>
struct Store {
    static constexpr bool WAITED_FOR = false;

    Tensor<T, WHOLE> out;

    template <class Partition>
    __device__ Store(const Args &a, const Partition &partition) : out(a.output, a.numel, partition.origin()) {}

    __device__ void take(u32 packet, Packet sum) const { out.store(packet, sum); }
    __device__ void finish() const {}

    // NaN for all results of this thread.
    template <class Share>
    __device__ static void abandon(const Args &a, const Share &share) {
        const Tensor<T, WHOLE> out(a.output, a.numel);
#pragma unroll 1
        for (u32 k = 0; k < Share::PER_THREAD; k++)
#pragma unroll 1
            for (u32 part = 0; part < Share::COUNT && share.has(k); part++) out.store(share.index(part, k), splat(0xFFFFFFFFu));
    }
};
