// Norm: the sum, with the residual added, is normalized by row and scaled by the weight, and quantized where that is asked for.
// The arithmetic, step by step: allreduce_jit/policy/norm.py. Every step is rounded by itself, in fp32.
//
// The sum of squares is a tree over the element's index, neighbours first: over the elements of a packet, the lanes of a warp (a group),
// the groups of the row. So its bits depend on the row alone, whatever the partition. Additions commute, so all lanes of a butterfly
// have the same bits.
//
// A thread whose packets did not come goes on with NaN: others wait for its part of the sum, which makes their results NaN as well.
//
// Config says what is computed: HIDDEN, ROUNDING, QUANT, RESIDUAL, WEIGHT_IS_FP32, WEIGHT_BIAS, KEEP_NORM.
#pragma once
#include "abi.cuh"
#include "packet.cuh"
#include "row_exchange.cuh"

enum Rounding { ROUND_ONCE, ROUND_LATE, ROUND_TWICE };  // R, U, H
enum Quant { NOT_QUANTIZED, STATIC, PER_TOKEN, PER_GROUP };

constexpr float LARGEST_E4M3 = 448.f, LEAST_TOKEN_SCALE = 1.f / (512.f * 448.f), LEAST_GROUP_ABSMAX = 1e-10f;

template <class T>
struct Values {
    float f[ELEMENTS<T>];

    __device__ static Values of(Packet p) {
        Values v;
#pragma unroll
        for (u32 i = 0; i < 4; i++) T::unpack(p.w[i], v.f + i * T::PER_WORD);
        return v;
    }
    __device__ Packet rounded() const {
        Packet p;
#pragma unroll
        for (u32 i = 0; i < 4; i++) p.w[i] = T::pack(f + i * T::PER_WORD);
        return p;
    }
};

template <class Config, class T, class Partition>
struct Norm {
    static constexpr bool WAITED_FOR = true;
    static constexpr u32 PACKETS = Partition::PACKETS, CLUSTER = Partition::CLUSTER;
    static constexpr u32 COUNT = Partition::PARTS * PACKETS, E = ELEMENTS<T>;  // packets of a thread, elements of a packet
    static constexpr bool WIDE_WEIGHT = Config::WEIGHT_IS_FP32 && T::PER_WORD == 2;
    static constexpr bool AHEAD = COUNT * (WIDE_WEIGHT ? 2 : 1) <= 4;  // registers for the weight before it is needed
    static constexpr u32 WEIGHTS = AHEAD ? COUNT : 1, HALVES = WIDE_WEIGHT ? 2 : 1;
    typedef RowExchange<Partition::GROUPS, CLUSTER> Sums;
    typedef RowExchange<Partition::WARPS * CLUSTER, CLUSTER> Maxima;

    const Partition &rows;
    Sums sums;
    Maxima maxima;
    // Of this block's row, but for the weight.
    u64 residual_at, residual_out, weight_at, output, norm_at, scale_at;
    float eps;
    u32 scale_group;
    Packet residual[COUNT], weight[WEIGHTS][HALVES];
    Values<T> value[COUNT];  // what is normalized
    float scale;             // of a static quantization

    __device__ Norm(const NormArgs &a, const Partition &rows) : rows(rows) {
        const u64 row = rows.begin * 16ull;
        residual_at = a.residual + row, residual_out = a.residual_out + row, weight_at = a.weight, eps = a.eps;
        output = a.call.output + (Config::QUANT == NOT_QUANTIZED ? row : u64(rows.begin) * E);
        materialize(residual_at);
        materialize(residual_out);
        materialize(weight_at);
        materialize(output);
        materialize(eps);
        if (Config::KEEP_NORM) materialize(norm_at = a.norm + row);
        if (Config::QUANT != NOT_QUANTIZED) materialize(scale_at = a.scale + 4ull * rows.row * (Config::QUANT == STATIC ? 0 : a.scale_row));
        if (Config::QUANT == PER_GROUP) materialize(scale_group = a.scale_group);
        u32 memory = shared_memory<Sums::SHARED_WORDS + (Config::QUANT == PER_TOKEN ? Maxima::SHARED_WORDS : 0)>();
        materialize(memory);
        sums.init(memory, rows.lane);
        if (Config::QUANT == PER_TOKEN) maxima.init(memory + 4 * Sums::SHARED_WORDS, rows.lane);
        cluster_arrive<CLUSTER>();
    }

    __device__ static Packet load(u64 tensor, u32 packet, bool exists) {
        return exists ? ld_global_v4(tensor + packet * 16ull) : splat(0);
    }

    // Reads what this thread needs besides the sums: behind griddepcontrol.wait, as earlier kernels may have written it.
    __device__ void prepare() {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            const u32 part = rows.part_of(i / PACKETS), k = i % PACKETS;
            if (Config::RESIDUAL) residual[i] = load(residual_at, rows.at(part, k), rows.exists(part, k));
            if (AHEAD) load_weight(i, weight[i]);
        }
        if (Config::QUANT == STATIC) scale = ld_global_f32(scale_at);
        cluster_wait<CLUSTER>();
    }

    __device__ void load_weight(u32 i, Packet (&w)[HALVES]) const {
        const u32 part = rows.part_of(i / PACKETS), k = i % PACKETS;
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) w[half] = load(weight_at, rows.at(part, k) * HALVES + half, rows.exists(part, k));
    }

    // The sum of this thread's packet k of a place.
    __device__ void take(u32 place, u32 k, Packet sum) {
        const u32 i = place * PACKETS + k, part = rows.part_of(place);
        const Packet rounded = Config::RESIDUAL ? add<T>(sum, residual[i]) : sum;
        Values<T> v = Values<T>::of(Config::ROUNDING == ROUND_LATE ? sum : rounded);
        if (Config::ROUNDING == ROUND_LATE && Config::RESIDUAL) {
            const Values<T> r = Values<T>::of(residual[i]);
#pragma unroll
            for (u32 e = 0; e < E; e++) v.f[e] = __fadd_rn(v.f[e], r.f[e]);
        }
        value[i] = v;
        float square[E];
#pragma unroll
        for (u32 e = 0; e < E; e++) square[e] = __fmul_rn(v.f[e], v.f[e]);
#pragma unroll
        for (u32 step = 1; step < E; step *= 2)
#pragma unroll
            for (u32 e = 0; e < E; e += 2 * step) square[e] = __fadd_rn(square[e], square[e + step]);
        float group = rows.exists(part, k) ? square[0] : 0.f;
#pragma unroll
        for (u32 lanes = 1; lanes < WARP; lanes *= 2) group = __fadd_rn(group, shfl_xor(group, lanes));
        if (rows.has(part, k)) sums.send(rows.group(part, k), __float_as_uint(group), rows.lane);
        if (rows.exists(part, k)) st_global_v4(residual_out + rows.at(part, k) * 16ull, rounded);
    }

    // The sum of squares of the row.
    __device__ float total() const {
        const Values<Fp32> groups = Values<Fp32>::of(sums.receive(rows.lane));
        float sum = __fadd_rn(__fadd_rn(groups.f[0], groups.f[1]), __fadd_rn(groups.f[2], groups.f[3]));
#pragma unroll
        for (u32 lanes = 1; lanes < Sums::LANES; lanes *= 2) sum = __fadd_rn(sum, shfl_xor(sum, lanes));
        return sum;
    }

    __device__ Values<T> weights(u32 i) {
        Packet late[HALVES];
        if (!AHEAD) load_weight(i, late);
        Packet(&packets)[HALVES] = AHEAD ? weight[AHEAD ? i : 0] : late;
        Values<T> w;
        if (WIDE_WEIGHT) {
#pragma unroll
            for (u32 e = 0; e < E; e++) w.f[e] = __uint_as_float(packets[e / 4 % HALVES].w[e % 4]);
        } else {
            w = Values<T>::of(packets[0]);
        }
        // A bias of 0 as well: it makes 0 of -0.
#pragma unroll
        for (u32 e = 0; e < E; e++) w.f[e] = __fadd_rn(w.f[e], float(Config::WEIGHT_BIAS));
        return w;
    }

    __device__ void finish() {
        const float r = __frsqrt_rn(__fadd_rn(__fmul_rn(total(), 1.f / Config::HIDDEN), eps));
        Packet norm[COUNT];
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            const u32 part = rows.part_of(i / PACKETS), k = i % PACKETS;
            Values<T> y;
#pragma unroll
            for (u32 e = 0; e < E; e++) y.f[e] = __fmul_rn(value[i].f[e], r);
            if (Config::ROUNDING == ROUND_TWICE) y = Values<T>::of(y.rounded());
            const Values<T> w = weights(i);
#pragma unroll
            for (u32 e = 0; e < E; e++) y.f[e] = __fmul_rn(y.f[e], w.f[e]);
            norm[i] = y.rounded();
            if (Config::QUANT == NOT_QUANTIZED && rows.exists(part, k)) st_global_v4(output + rows.at(part, k) * 16ull, norm[i]);
            if (Config::KEEP_NORM && rows.exists(part, k)) st_global_v4(norm_at + rows.at(part, k) * 16ull, norm[i]);
        }
        if (Config::QUANT != NOT_QUANTIZED) quantize(norm);
    }

    // Absolute values compare as integers do, NaN above all.
    __device__ static u32 largest(Packet norm) {
        const Values<T> v = Values<T>::of(norm);
        u32 m = 0;
#pragma unroll
        for (u32 e = 0; e < E; e++) m = max_u32(m, __float_as_uint(v.f[e]) & 0x7FFFFFFFu);
        return m;
    }

    // NaN if x is.
    __device__ static float at_least(float x, float least) { return x < least ? least : x; }

    // The scale of the row: by all threads, with their largest absolute value.
    __device__ float token_scale(u32 m) {
        maxima.send(rows.warp, warp_max(m), rows.lane);
        const Packet warps = maxima.receive(rows.lane);
        m = max_u32(max_u32(warps.w[0], warps.w[1]), max_u32(warps.w[2], warps.w[3]));
        if (Maxima::LANES > 1) m = warp_max(m);
        return at_least(__fdiv_rn(__uint_as_float(m), LARGEST_E4M3), LEAST_TOKEN_SCALE);
    }

    __device__ void quantize(const Packet (&norm)[COUNT]) {
        if (Config::QUANT == PER_TOKEN) {
            u32 m = 0;
#pragma unroll
            for (u32 i = 0; i < COUNT; i++)
                if (rows.exists(rows.part_of(i / PACKETS), i % PACKETS)) m = max_u32(m, largest(norm[i]));
            scale = token_scale(m);
            if (rows.warp == 0 && rows.lane == 0) st_global_u32(scale_at, __float_as_uint(scale));
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            const u32 part = rows.part_of(i / PACKETS), k = i % PACKETS, at = rows.at(part, k);
            const bool exists = rows.exists(part, k);
            if (Config::QUANT == PER_GROUP) {
                constexpr u32 LANES = 128 / E;
                u32 m = largest(norm[i]);
#pragma unroll
                for (u32 lanes = 1; lanes < LANES; lanes *= 2) m = max_u32(m, shfl_xor(m, lanes));
                scale = __fdiv_rn(at_least(__uint_as_float(m), LEAST_GROUP_ABSMAX), LARGEST_E4M3);
                if (exists && rows.lane % LANES == 0) st_global_u32(scale_at + 4ull * (at / LANES) * scale_group, __float_as_uint(scale));
            }
            const float inverse = __frcp_rn(scale);
            const Values<T> v = Values<T>::of(norm[i]);
            u32 q[2] = {0, 0};
#pragma unroll
            for (u32 e = 0; e < E; e += 2)
                q[e / 4] |= cvt_rn_satfinite_e4m3x2_f32(__fmul_rn(v.f[e + 1], inverse), __fmul_rn(v.f[e], inverse)) << 8 * (e % 4);
            if (exists && E == 8) st_global_v2(output + at * 8ull, q[0], q[1]);
            if (exists && E == 4) st_global_u32(output + at * 4ull, q[0]);
        }
    }

    // What did not come is NaN in `take`.
    template <class Nothing>
    __device__ static void abandon(const Args &, Nothing) {}
};
