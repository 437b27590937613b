// Scores of predicted tokens: one block a row, one pass over the vocabulary with an online softmax.
//
// Sums run in double, relative to each thread's own largest logit so far, and are joined in a fixed
// order. Which thread sums which logits follows from their index alone, never from an address, so
// the same row gives the same bits wherever it lies.

#include "types.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
// Consecutive logits of one thread: one or two 16-byte loads.
#define GROUP 8

#define MASKED (-100)

// FloatType in scores.rs.
#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_BF16 2

#define MINUS_INF (__int_as_float(0xff800000))
#define INF_F64 (__longlong_as_double(0x7ff0000000000000LL))
#define NAN_F64 (__longlong_as_double(0x7ff8000000000000LL))

// exp(d) for d <= 0 within 1e-13, relatively; 0 below -700 and NaN for NaN: a
// polynomial, cheaper than the library's.
static __device__ __forceinline__ double exp_negative(double d) {
    const double magic = 6755399441055744.0; // 1.5 * 2^52: adding it rounds to an integer
    double clamped = d < -700.0 ? -700.0 : d;
    double shifted = fma(clamped, 1.4426950408889634, magic);
    double n = shifted - magic;
    double r = fma(-n, 0.6931471803691238, clamped);
    r = fma(-n, 1.9082149292705877e-10, r);
    double p = 1.0 / 39916800.0;
    p = fma(p, r, 1.0 / 3628800.0);
    p = fma(p, r, 1.0 / 362880.0);
    p = fma(p, r, 1.0 / 40320.0);
    p = fma(p, r, 1.0 / 5040.0);
    p = fma(p, r, 1.0 / 720.0);
    p = fma(p, r, 1.0 / 120.0);
    p = fma(p, r, 1.0 / 24.0);
    p = fma(p, r, 1.0 / 6.0);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    double power = __longlong_as_double((__double_as_longlong(shifted) + 1023) << 52);
    return d < -700.0 ? 0.0 : p * power;
}

static __device__ __forceinline__ float half_to_float(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

static __device__ __forceinline__ float bfloat_to_float(u16 bits) {
    return __int_as_float((int)bits << 16);
}

static __device__ __forceinline__ void load_16_bytes(const void *from, u32 (&to)[4]) {
    // Every logit is read once: no line of the first cache level is worth keeping.
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "l"(from));
}

// One row of logits of any float type.
struct Row {
    const u8 *start;
    u32 vocab;
    int type;
    bool aligned;

    __device__ Row(const u8 *logits, u64 row, u32 vocab, int type) : vocab(vocab), type(type) {
        start = logits + row * vocab * (type == TYPE_F32 ? 4 : 2);
        aligned = ((u64)start & 15) == 0;
    }

    __device__ __forceinline__ float at(u64 i) const {
        if (type == TYPE_F32) return ((const float *)start)[i];
        u16 bits = ((const u16 *)start)[i];
        return type == TYPE_F16 ? half_to_float(bits) : bfloat_to_float(bits);
    }

    // Logits first .. first + GROUP; -inf, which adds nothing, past the end.
    __device__ __forceinline__ void load(u32 first, float (&v)[GROUP]) const {
        if (!aligned || vocab - first < GROUP) {
#pragma unroll
            for (u32 j = 0; j < GROUP; ++j) v[j] = first + j < vocab ? at(first + j) : MINUS_INF;
            return;
        }
        u32 words[4];
        if (type == TYPE_F32) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                load_16_bytes(start + 4 * ((u64)first + 4 * half), words);
#pragma unroll
                for (int j = 0; j < 4; ++j) v[4 * half + j] = __int_as_float(words[j]);
            }
            return;
        }
        load_16_bytes(start + 2 * (u64)first, words);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u16 low = (u16)words[j], high = (u16)(words[j] >> 16);
            bool half = type == TYPE_F16;
            v[2 * j] = half ? half_to_float(low) : bfloat_to_float(low);
            v[2 * j + 1] = half ? half_to_float(high) : bfloat_to_float(high);
        }
    }
};

// A softmax in sums, relative to `max`, over the logits seen so far.
struct Softmax {
    float max;       // largest logit
    u32 index;       // first index of it
    bool nan;        // whether one was NaN
    double sum;      // of p = exp(l - max)
    double weighted; // of p * (l - max)

    __device__ Softmax() : max(MINUS_INF), index(0xffffffffu), nan(false), sum(0), weighted(0) {}

    // Makes `max` the largest of it and v; returns the old one minus the new one, 0 mostly.
    __device__ __forceinline__ double raise(const float (&v)[GROUP], u32 first) {
        float top = MINUS_INF;
        u32 at = 0;
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            nan |= v[j] != v[j];
            if (v[j] > top) {
                top = v[j];
                at = j;
            }
        }
        if (!(top > max)) return 0.0;
        // Nothing but -inf so far: the sums are zero and stay so.
        double shift = max == MINUS_INF ? 0.0 : rescale(top);
        max = top;
        index = first + at;
        return shift;
    }

    // Turns the sums into sums relative to a larger `to`; returns max - to.
    __device__ __forceinline__ double rescale(float to) {
        double shift = (double)max - (double)to;
        double factor = exp_negative(shift);
        weighted = factor * fma(shift, sum, weighted);
        sum *= factor;
        return shift;
    }

    // What differences are taken from; while all are -inf, 0, so that p is 0 and not NaN.
    __device__ __forceinline__ double reference() const {
        return max == MINUS_INF ? 0.0 : (double)max;
    }

    // Adds one logit; returns p.
    __device__ __forceinline__ double add(float v, double reference) {
        double d = (double)v - reference;
        double p = exp_negative(d);
        sum += p;
        // -inf has probability 0 and adds nothing, where 0 * -inf would be NaN.
        weighted = fma(p, d < -800.0 ? 0.0 : d, weighted);
        return p;
    }
};

// What the baseline's and this model's logits differ by, over tokens that both allow. Taken
// relative to each one's largest logit so far: differences of the logits themselves would cancel.
struct Cross {
    double sum;    // of p * (d of the baseline - d of this), p the baseline's
    double weight; // of p

    __device__ Cross() : sum(0), weight(0) {}

    // Follows the largest logits, which rose by -base_shift and -shift.
    __device__ __forceinline__ void rescale(double base_shift, double shift) {
        if (base_shift == 0.0 && shift == 0.0) return;
        double factor = exp_negative(base_shift);
        sum = factor * fma(base_shift - shift, weight, sum);
        weight *= factor;
    }
};

// The sum over the block, for every thread, always in the same order.
static __device__ double block_sum(double value) {
    __shared__ double parts[WARPS];
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) value += __shfl_xor_sync(0xffffffffu, value, lane);
    __syncthreads(); // an earlier call's parts have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += parts[warp];
    return total;
}

static __device__ __forceinline__ void take_larger(float &max, u32 &index, float m, u32 i) {
    if (m > max || (m == max && i < index)) {
        max = m;
        index = i;
    }
}

// Joins the threads' softmaxes into that of the whole row, the same in every thread. Returns this
// thread's own largest logit minus the row's, 0 where it has none.
static __device__ double join(Softmax &own) {
    __shared__ float maxima[WARPS];
    __shared__ u32 indices[WARPS];
    float max = own.max;
    u32 index = own.index;
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) {
        float m = __shfl_xor_sync(0xffffffffu, max, lane);
        u32 i = __shfl_xor_sync(0xffffffffu, index, lane);
        take_larger(max, index, m, i);
    }
    __syncthreads(); // an earlier call's maxima have been read
    if (threadIdx.x % 32 == 0) {
        maxima[threadIdx.x / 32] = max;
        indices[threadIdx.x / 32] = index;
    }
    own.nan = __syncthreads_or(own.nan);
    max = maxima[0];
    index = indices[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) take_larger(max, index, maxima[warp], indices[warp]);
    double shift = own.max == MINUS_INF ? 0.0 : own.rescale(max);
    own.max = max;
    own.index = index;
    own.sum = block_sum(own.sum);
    own.weighted = block_sum(own.weighted);
    // As on the CPU: no distribution without a largest finite logit. +inf made the sums NaN already.
    if (own.nan || max == MINUS_INF) own.sum = own.weighted = NAN_F64;
    return shift;
}

static __device__ __forceinline__ double label_nll(const Softmax &all, double log_sum,
                                                   const Row &row, i64 label) {
    // A device cannot refuse a label: one outside the vocabulary has no probability to speak of.
    if ((u64)label >= row.vocab) return NAN_F64;
    return log_sum - ((double)row.at((u64)label) - (double)all.max);
}

static __device__ __forceinline__ i64 top_token(const Softmax &all) {
    if (all.nan) return -1;
    return all.max == MINUS_INF ? 0 : (i64)all.index;
}

// Writes a row's result where somebody asks for it.
template <typename T> static __device__ __forceinline__ void put(T *to, u64 row, T value) {
    if (to) to[row] = value;
}

// nll, entropy, top1 [rows] (null: not asked for) of logits [rows, vocab]. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
token_scores(const u8 *logits, const i64 *labels, float *nll, float *entropy, i64 *top1, u32 vocab,
             int type) {
    u64 row = blockIdx.x;
    i64 label = labels[row];
    if (label == MASKED) {
        if (threadIdx.x == 0) {
            put(nll, row, 0.0f);
            put(entropy, row, 0.0f);
            put(top1, row, (i64)0);
        }
        return;
    }
    Row values(logits, row, vocab, type);
    Softmax all;
    for (u64 first = threadIdx.x * GROUP; first < vocab; first += THREADS * GROUP) {
        float v[GROUP];
        values.load((u32)first, v);
        all.raise(v, (u32)first);
        double reference = all.reference();
#pragma unroll
        for (int j = 0; j < GROUP; ++j) all.add(v[j], reference);
    }
    join(all);
    if (threadIdx.x == 0) {
        double log_sum = log(all.sum);
        put(nll, row, (float)label_nll(all, log_sum, values, label));
        put(entropy, row, (float)(log_sum - all.weighted / all.sum));
        put(top1, row, top_token(all));
    }
}

// As above, and KL(baseline || this) and the baseline's nll.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
token_scores_baseline(const u8 *logits, const u8 *baseline, const i64 *labels, float *nll,
                      float *entropy, i64 *top1, float *kl, float *baseline_nll, u32 vocab, int type,
                      int baseline_type) {
    u64 row = blockIdx.x;
    i64 label = labels[row];
    if (label == MASKED) {
        if (threadIdx.x == 0) {
            put(nll, row, 0.0f);
            put(entropy, row, 0.0f);
            put(top1, row, (i64)0);
            put(kl, row, 0.0f);
            put(baseline_nll, row, 0.0f);
        }
        return;
    }
    Row values(logits, row, vocab, type), base_values(baseline, row, vocab, baseline_type);
    Softmax all, base;
    Cross cross;
    // The baseline's largest logit among tokens that this model rules out.
    float ruled_out = MINUS_INF;
    for (u64 first = threadIdx.x * GROUP; first < vocab; first += THREADS * GROUP) {
        float v[GROUP], b[GROUP];
        values.load((u32)first, v);
        base_values.load((u32)first, b);
        double shift = all.raise(v, (u32)first);
        cross.rescale(base.raise(b, (u32)first), shift);
        double reference = all.reference(), base_reference = base.reference();
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            all.add(v[j], reference);
            double p = base.add(b[j], base_reference);
            if (v[j] == MINUS_INF) {
                ruled_out = b[j] > ruled_out ? b[j] : ruled_out;
            } else if (p != 0.0) {
                double difference = ((double)b[j] - base_reference) - ((double)v[j] - reference);
                cross.sum = fma(p, difference, cross.sum);
                cross.weight += p;
            }
        }
    }
    double shift = join(all);
    cross.rescale(join(base), shift);
    double crossed = block_sum(cross.sum);
    bool impossible = __syncthreads_or((double)ruled_out - (double)base.max >= -700.0);
    if (threadIdx.x == 0) {
        double log_sum = log(all.sum), base_log_sum = log(base.sum);
        put(nll, row, (float)label_nll(all, log_sum, values, label));
        put(entropy, row, (float)(log_sum - all.weighted / all.sum));
        put(top1, row, top_token(all));
        put(baseline_nll, row, (float)label_nll(base, base_log_sum, base_values, label));
        // KL = sum p (log p - log q), with log p = (b - base.max) - base_log_sum and so on.
        double divergence = crossed / base.sum - base_log_sum + log_sum;
        if (impossible && divergence == divergence) divergence = INF_F64;
        // Rounding can leave -1e-17 where the distributions agree; NaN stays.
        put(kl, row, divergence < 0.0 ? 0.0f : (float)divergence);
    }
}
