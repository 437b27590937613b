// X (and B of MxActMatMul) quantised and folded: element times scale as one bfloat16, exactly.
//
// A value that no normal bfloat16 holds marks its row in `bad`; finish.cu computes such rows again
// in fp64. The common factor 2^shift leaves the weights room for scales up to 2^33.
#include "formats.cuh"

struct Fold {
    const void* x;
    void* out;
    u8* bad;                 // [batch, m, parts]
    const u32* amax;         // bits of partial maxima, for a tensor scale
    float* scale;            // the tensor scale is written here
    u32* any_bad;            // set where anything is marked (cleared by the caller), or null
    long long x_batch;       // elements between matrices of X
    long long out_batch;     // 16-byte units between matrices of the output
    int amax_count;
    int m;
    int k;
    int type;                // FloatType of X
    int rows;                // rows of the output, a multiple of a tile's
    int width;               // k of the output: a multiple of 128 (fragments) or 8 (rows)
    int terms;               // bfloat16 terms of an unquantised value
    int order;               // see fragment()
    int fragments;           // 1: fragment order, 0: row-major, 2: row-major, NaN where nothing fits
    int shift;
    int parts;
    Quant q;
};

// Where fragment order puts the eight values from k on of row r, in 16-byte units: for each 128 k
// and 8 rows, four groups of 32 lanes; lane 4 * (r % 8) + t. Which k a lane holds follows from how
// the weight's bytes lie: order 0 = bfloat16, 1 = one byte a code, 2 = four and six bits.
DEVICE long long fragment(const Fold& f, int r, int k) {
    int q = k % 128 / 8, t, j;
    if (f.order == 0)
        t = q % 4, j = q / 4;
    else if (f.order == 1)
        t = q % 8 / 2, j = q / 8 * 2 + q % 2;
    else
        t = q / 4, j = q % 4;
    long long tile = (long long)(k / 128) * (f.rows / 8) + r / 8;
    return (tile * 4 + j) * 32 + r % 8 * 4 + t;
}

// Eight values in the order in which the weight's codes come out of a register.
DEVICE uint4 ordered(int order, const float (&v)[8]) {
    if (order == 0)
        return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                          pack_bf16(v[6], v[7]));
    if (order == 1)
        return make_uint4(pack_bf16(v[0], v[2]), pack_bf16(v[1], v[3]), pack_bf16(v[4], v[6]),
                          pack_bf16(v[5], v[7]));
    return make_uint4(pack_bf16(v[0], v[4]), pack_bf16(v[1], v[5]), pack_bf16(v[2], v[6]),
                      pack_bf16(v[3], v[7]));
}

DEVICE void put(const Fold& f, uint4* out, int r, int k, const float (&v)[8]) {
    if (f.fragments == 1)
        out[fragment(f, r, k)] = ordered(f.order, v);
    else
        out[((long long)r * f.width + k) / 8] = ordered(0, v);
}

// Whether v is neither zero nor a normal bfloat16.
DEVICE bool outside(float v) {
    u32 bits = float_bits(v) & 0x7fffffffu;
    return bits != 0 && bits - 0x00800000u >= 0x7f800000u - 0x00800000u;
}

// Quantises eight neighbours of one block, spread over q.block / 8 lanes. Returns whether the row
// cannot be folded; `v` holds the folded values then too, zero where they would not fit.
DEVICE bool fold_scaled(const Quant& q, int shift, float (&v)[8]) {
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = max(amax, float_bits(v[i]) & 0x7fffffffu);
    for (int lanes = 1; lanes < q.block / 8; lanes *= 2)
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, lanes));
    int e = amax == 0 || amax >= INFINITY_BITS ? 0 : shared_exponent(q, amax);
    bool fits = amax < INFINITY_BITS && q.emin - q.mantissa + e + shift >= -126 &&
                q.emax + e + shift <= 127;
    float down = exp2_exact(-e), up = fits ? exp2_exact(e + shift) : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fits ? round_element(q, v[i] * down) * up : 0.0f;
    return !fits && amax != 0;
}

// The same without a shared exponent: a saturating cast of v / divisor.
DEVICE bool fold_cast(const Quant& q, int shift, float divisor, float (&v)[8]) {
    bool bad = false;
    float up = exp2_exact(shift);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float t = divisor == 1.0f ? v[i] : divide(v[i], divisor);
        bool nan = t != t;
        t = nan ? 0.0f : round_element(q, t) * up;
        bool out = outside(t);
        bad |= nan || out;
        v[i] = out ? 0.0f : t;
    }
    return bad;
}

// Block (row or padding row, 1024 k, matrix).
extern "C" __global__ void __launch_bounds__(128) fold(const __grid_constant__ Fold f) {
    wait_for_previous();
    launch_dependents();
    int chunk = blockIdx.y, row = blockIdx.x, k = (chunk * 128 + threadIdx.x) * 8;
    uint4* out = static_cast<uint4*>(f.out) + blockIdx.z * f.out_batch;
    float v[8] = {};
    if (row >= f.m) {
        if (k < f.width) put(f, out, f.terms * f.m + row - f.m, k, v);
        return;
    }
    long long at = blockIdx.z * f.x_batch + (long long)row * f.k;
    int unit = f.type == F32 ? 4 : 8;
    bool vector = f.k % unit == 0 && f.x_batch % unit == 0 && reinterpret_cast<u64>(f.x) % 16 == 0;
    load8(f.x, f.type, at + k, f.k - k, vector, v);
    bool bad = false;
    if (f.q.kind == AS_IS) {
        float up = exp2_exact(f.shift), rest[8];
        bool finite[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            rest[i] = v[i] * up;
            finite[i] = (float_bits(rest[i]) & 0x7fffffffu) < INFINITY_BITS;
            bad |= !finite[i];
        }
        for (int term = 0; term < f.terms; term++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float t = bf16_float(float_bf16(rest[i]));
                bool out = outside(t) || !finite[i];
                bad |= out;
                v[i] = out ? 0.0f : t;
                rest[i] -= v[i];
            }
            if (k < f.width) put(f, out, term * f.m + row, k, v);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) bad |= rest[i] != 0.0f;
    } else {
        if (f.q.kind == SCALED) {
            bad = fold_scaled(f.q, f.shift, v);
        } else {
            float divisor = 1.0f;
            if (f.q.kind == TENSOR) {
                u32 amax = 0;
                for (int i = 0; i < f.amax_count; i++) amax = max(amax, f.amax[i]);
                divisor = tensor_scale(f.q, amax);
                if (row == 0 && chunk == 0 && threadIdx.x == 0) *f.scale = divisor;
            }
            bad = fold_cast(f.q, f.shift, divisor, v);
        }
        // As a weight, the values tell the product which of its columns to mark.
        if (bad && f.fragments == 2)
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = bits_float(0x7fc00000u);
        if (k < f.width) put(f, out, row, k, v);
    }
    if (f.fragments == 2) return;
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
        f.bad[((long long)blockIdx.z * f.m + row) * f.parts + chunk] = bad;
        if (bad && f.any_bad) atomicOr(f.any_bad, 1u);
    }
}

// Largest finite magnitude of `count` values; one partial result a block.
extern "C" __global__ void __launch_bounds__(256)
    largest(const void* x, int type, long long count, u32* partial) {
    __shared__ u32 warps[8];
    wait_for_previous();
    launch_dependents();
    u32 amax = 0;
    bool vector = reinterpret_cast<u64>(x) % 16 == 0;
    for (long long i = (blockIdx.x * 256ll + threadIdx.x) * 8; i < count; i += gridDim.x * 2048ll) {
        float v[8];
        load8(x, type, i, count - i, vector, v);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 bits = float_bits(v[j]) & 0x7fffffffu;
            if (bits < INFINITY_BITS) amax = max(amax, bits);
        }
    }
    amax = __reduce_max_sync(0xffffffffu, amax);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = amax;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) amax = max(amax, warps[i]);
        partial[blockIdx.x] = amax;
    }
}

// Codes and scales as the file format has them; one thread a block of one row.
extern "C" __global__ void __launch_bounds__(128)
    quantize(const __grid_constant__ Fold f, u8* codes, u8* scales, int blocks, int row_bytes) {
    long long i = blockIdx.x * 128ll + threadIdx.x;
    if (i >= (long long)f.m * blocks) return;
    const Quant& q = f.q;
    int row = int(i / blocks), block = int(i % blocks), k = block * q.block;
    int len = min(q.block, f.k - k);
    long long at = (long long)row * f.k + k;
    u32 amax = 0;
    for (int j = 0; j < len; j++)
        amax = max(amax, float_bits(load_float(f.x, f.type, at + j)) & 0x7fffffffu);
    int e = 0;
    bool nan = q.kind == SCALED && amax >= INFINITY_BITS;
    float divisor = 1.0f;
    if (q.kind == SCALED) {
        e = amax == 0 ? -127 : nan ? 128 : shared_exponent(q, amax);
        scales[i] = u8(e + 127);
    } else if (q.kind == TENSOR) {
        u32 most = 0;
        for (int j = 0; j < f.amax_count; j++) most = max(most, f.amax[j]);
        divisor = tensor_scale(q, most);
        if (i == 0) *reinterpret_cast<float*>(scales) = divisor;
    }
    u8* to = codes + (long long)row * row_bytes + (long long)k * q.bits / 8;
    u64 word = 0;
    int filled = 0;
    for (int j = 0; j < q.block; j++) {
        u32 code = 0;
        if (j < len && !nan) {
            float x = load_float(f.x, f.type, at + j), v = x;
            v = q.kind == SCALED ? v * exp2_exact(-e) : divisor == 1.0f ? v : divide(v, divisor);
            code = v != v ? nan_code(q, x) : element_code(q, round_element(q, v));
        }
        word |= u64(code) << filled;
        filled += q.bits;
        for (; filled >= 8; filled -= 8, word >>= 8) *to++ = u8(word);
    }
}

struct FoldB {
    const void* b;           // [batch, k, n]
    uint4* out;              // [batch, n, width] bfloat16
    long long b_batch;
    int n;
    int k;
    int type;
    int width;               // k padded to a multiple of 128
    Quant q;
};

// B as a bfloat16 weight, k innermost; NaN where a value does not fit, so that the product marks the
// column. One thread a block of one column: neighbours read neighbours. Block (64 columns, blocks of
// k in turn, matrix).
extern "C" __global__ void __launch_bounds__(64) fold_b(const __grid_constant__ FoldB f) {
    wait_for_previous();
    launch_dependents();
    int n = blockIdx.x * 64 + threadIdx.x;
    if (n >= f.n) return;
    long long at = blockIdx.z * f.b_batch + n;
    uint4* out = f.out + ((long long)blockIdx.z * f.n + n) * (f.width / 8);
    bool scaled = f.q.kind == SCALED;
    for (long long k0 = (long long)blockIdx.y * f.q.block; k0 < f.width; k0 += (long long)gridDim.y * f.q.block) {
        int first = int(k0), end = min(first + f.q.block, f.k);
        u32 amax = 0;
        if (scaled)
            for (int k = first; k < end; k++)
                amax = max(amax, float_bits(load_float(f.b, f.type, at + (long long)k * f.n)) & 0x7fffffffu);
        int e = amax == 0 || amax >= INFINITY_BITS ? 0 : shared_exponent(f.q, amax);
        bool fits = amax == 0 || (amax < INFINITY_BITS && f.q.emin - f.q.mantissa + e >= -126 &&
                                  f.q.emax + e <= 127);
        float down = exp2_exact(-e), up = fits ? exp2_exact(e) : 0.0f;
        for (int k = first; k < min(first + f.q.block, f.width); k += 8) {
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float t = k + i < f.k ? load_float(f.b, f.type, at + (long long)(k + i) * f.n) : 0.0f;
                bool nan = t != t || !fits;
                t = nan ? 0.0f : round_element(f.q, t * down) * up;
                v[i] = nan || outside(t) ? bits_float(0x7fc00000u) : t;
            }
            out[k / 8] = ordered(0, v);
        }
    }
}
