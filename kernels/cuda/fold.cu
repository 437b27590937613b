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
    int layout;              // of the output, see below
    int shift;
    int parts;
    Quant q;
};

// ROWS: row-major; FRAGMENTS: see fragment(); ROWS_NAN: row-major, NaN where nothing fits; TILES: see tile().
enum { ROWS = 0, FRAGMENTS = 1, ROWS_NAN = 2, TILES = 3 };

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

// ordered() of eight values that are pairs of bfloat16 already.
DEVICE uint4 ordered(int order, const u32 (&w)[4]) {
    if (order == 0) return make_uint4(w[0], w[1], w[2], w[3]);
    // 8 bits: values 0 and 2, 1 and 3, ...; fewer: 0 and 4, 1 and 5, ...
    u32 first = order == 1 ? w[1] : w[2], second = order == 1 ? w[2] : w[1];
    return make_uint4(__byte_perm(w[0], first, 0x5410), __byte_perm(w[0], first, 0x7632),
                      __byte_perm(second, w[3], 0x5410), __byte_perm(second, w[3], 0x7632));
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

// Where tile order puts what this thread has after transposed(), in 16-byte units: [64 k][row][128 bytes]
// with the pieces of a row exchanged as wide.cu's products read them. A lane of those has 32 codes of W
// side by side, of which product s of 128 k takes two pairs: so piece 4 * j + i of a row's 128 k holds
// pair i of the codes 8 * j to 8 * j + 7 of all four lanes.
DEVICE long long tile(const Fold& f, int r, int k) {
    int t = k % 128 / 32, j = k % 32 / 8;
    return ((long long)(k / 128 * 2 + j / 2) * f.rows + r) * 8 + ((j % 2 * 4 + t) ^ (r % 8));
}

// Exchanges pairs between the four threads whose k differ by 32: thread t gets pair t of each. All
// threads of the warp take part.
DEVICE uint4 transposed(uint4 v) {
    bool odd = threadIdx.x & 4, upper = threadIdx.x & 8;
    u32 a = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 4), b = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 4);
    if (odd) v.x = a, v.z = b; else v.y = a, v.w = b;
    a = __shfl_xor_sync(0xffffffffu, upper ? v.x : v.z, 8), b = __shfl_xor_sync(0xffffffffu, upper ? v.y : v.w, 8);
    if (upper) v.x = a, v.y = b; else v.z = a, v.w = b;
    return v;
}

// Writes eight values of row r of the output. All threads of the warp take part.
template <typename Values>
DEVICE void put_tile(const Fold& f, uint4* out, int r, int k, const Values& v) {
    uint4 u = transposed(ordered(f.order, v));
    if (k < f.width) out[tile(f, r, k)] = u;
}
DEVICE void put(const Fold& f, uint4* out, int r, int k, const float (&v)[8]) {
    if (f.layout == TILES) return put_tile(f, out, r, k, v);
    uint4 u = ordered(f.layout == FRAGMENTS ? f.order : 0, v);
    if (k >= f.width) return;
    if (f.layout == FRAGMENTS)
        out[fragment(f, r, k)] = u;
    else
        out[((long long)r * f.width + k) / 8] = u;
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
    if (q.rounding == 0 && q.format < INT8) {
        // The usual case without the questions that round_element asks of every value.
        u32 floor_bits = u32(q.emin + 127) << 23, add = u32(23 - q.mantissa) << 23;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float s = v[i] * down, t = fminf(fabsf(s), q.largest);
            float c = bits_float(max(float_bits(t) & INFINITY_BITS, floor_bits) + add);
            float r = fits ? (__fadd_rn(t, c) - c) * up : 0.0f;
            v[i] = bits_float(float_bits(r) | (float_bits(s) & 0x80000000u));
        }
        return !fits && amax != 0;
    }
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
        put(f, out, f.terms * f.m + row - f.m, k, v);
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
            put(f, out, term * f.m + row, k, v);
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
        if (bad && f.layout == ROWS_NAN)
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = bits_float(0x7fc00000u);
        put(f, out, row, k, v);
    }
    if (f.layout == ROWS_NAN) return;
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
        f.bad[((long long)blockIdx.z * f.m + row) * f.parts + chunk] = bad;
        if (bad && f.any_bad) atomicOr(f.any_bad, 1u);
    }
}

// fold_scaled() of bfloat16 values with half-to-even rounding, two at a time. bfloat16 has enough bits
// for every step of it: quotients by powers of two are exact where they do not round to zero anyway,
// and adding c rounds as in round_element.
DEVICE bool fold_pairs(const Quant& q, int shift, u32 (&w)[4]) {
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) amax = max(amax, max(w[i] & 0x7fffffffu, w[i] << 16 & 0x7fffffffu));
    amax &= 0x7fff0000u;
    for (int lanes = 1; lanes < q.block / 8; lanes *= 2)
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, lanes));
    int e = amax == 0 || amax >= INFINITY_BITS ? 0 : shared_exponent(q, amax);
    bool fits = amax < INFINITY_BITS && q.emin - q.mantissa + e + shift >= -126 &&
                q.emax + e + shift <= 127;
    // All of these are bfloat16 values: powers of two, and largest elements of at most four bits.
    u32 down = twice(exp2_exact(-e)), up = fits ? twice(exp2_exact(e + shift)) : 0;
    u32 largest = twice(q.largest), least = twice(exp2_exact(q.emin)), add = u32(7 - q.mantissa) * 0x00800080u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 t = min_bf16x2(mul_bf16x2(w[i], down) & 0x7fff7fffu, largest);
        u32 c = max_bf16x2(t & 0x7f807f80u, least) + add;
        t = mul_bf16x2(sub_bf16x2(add_bf16x2(t, c), c), up);
        w[i] = t | (w[i] & 0x80008000u);
    }
    return !fits && amax != 0;
}

// Writes which of four rows a block of 128 threads could not fold; bit r of `bad` is row first + r.
DEVICE void mark_rows(const Fold& f, u32* marks, u32 bad, int first, int chunk) {
    bad = __reduce_or_sync(0xffffffffu, bad);
    if (threadIdx.x % 32 == 0) marks[threadIdx.x / 32] = bad;
    __syncthreads();
    int row = first + threadIdx.x;
    if (threadIdx.x < 4 && row < f.m) {
        bad = (marks[0] | marks[1] | marks[2] | marks[3]) >> threadIdx.x & 1;
        f.bad[(long long)row * f.parts + chunk] = u8(bad);
        if (bad && f.any_bad) atomicOr(f.any_bad, 1u);
    }
}

// fold() for many rows with a scale a block, as tiles: loads of four rows are under way before the
// first is rounded. Block (four rows, 1024 k).
extern "C" __global__ void __launch_bounds__(128) fold_tiles(const __grid_constant__ Fold f) {
    __shared__ u32 marks[4];
    wait_for_previous();
    launch_dependents();
    int chunk = blockIdx.y, first = blockIdx.x * 4, k = (chunk * 128 + threadIdx.x) * 8;
    int unit = f.type == F32 ? 4 : 8;
    bool vector = f.k % unit == 0 && reinterpret_cast<u64>(f.x) % 16 == 0;
    float v[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[r][i] = 0;
        if (first + r < f.m) load8(f.x, f.type, (long long)(first + r) * f.k + k, f.k - k, vector, v[r]);
    }
    u32 bad = 0;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        bad |= u32(fold_scaled(f.q, f.shift, v[r])) << r;
        put_tile(f, static_cast<uint4*>(f.out), first + r, k, v[r]);
    }
    mark_rows(f, marks, bad, first, chunk);
}

// The same for bfloat16 in whole and aligned eights, formats of at most three mantissa bits, rounded
// half to even.
extern "C" __global__ void __launch_bounds__(128) fold_tiles_bf16(const __grid_constant__ Fold f) {
    __shared__ u32 marks[4];
    wait_for_previous();
    launch_dependents();
    int chunk = blockIdx.y, first = blockIdx.x * 4, k = (chunk * 128 + threadIdx.x) * 8;
    const u16* from = static_cast<const u16*>(f.x) + (long long)first * f.k + k;
    uint4 x[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        x[r] = make_uint4(0, 0, 0, 0);
        if (first + r < f.m && k < f.k) x[r] = load_once(from + (long long)r * f.k);
    }
    u32 bad = 0;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        u32 w[4] = {x[r].x, x[r].y, x[r].z, x[r].w};
        bad |= u32(fold_pairs(f.q, f.shift, w)) << r;
        put_tile(f, static_cast<uint4*>(f.out), first + r, k, w);
    }
    mark_rows(f, marks, bad, first, chunk);
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
