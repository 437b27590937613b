// What the last step of a product takes, and a sum taken again in fp64 from the operands as they were given.
#pragma once
#include "formats.cuh"

// One operand as given: packed codes, or float values that are quantised on the way.
struct Operand {
    const void* values;      // null for packed codes
    const u8* codes;
    const u8* scales;        // null without block scales
    const float* scale;      // the tensor scale of quantised values
    long long batch;         // elements between matrices of values
    long long row_stride;
    long long k_stride;
    int row_bytes;
    int type;
    Quant q;                 // of packed codes: how they were made
};

// Which matrix of A and of B belongs to matrix b of Y: MatMul's broadcasting.
struct Batches {
    int dims[4];
    int a[4];
    int b[4];
};

struct Finish {
    const float* partial;    // [batch, splits, terms * m, n], null: Y is there, only repair it
    void* y;
    const void* bias;
    const u8* bad_m;         // [matrices of A, m, parts_m]
    const u8* bad_n;         // [matrices of Y, parts_n, n]
    const float* factor_x;   // tensor scales, or null
    const float* factor_w;
    const u32* any_bad;      // 0: nothing is marked
    int type;
    int m;
    int n;
    int k;
    int splits;
    int terms;
    int parts_m;
    int parts_n;
    float alpha;
    float beta;
    Operand x;
    Operand w;
    Batches batches;
};

DEVICE void matrices(const Batches& b, int index, int& ia, int& ib) {
    ia = ib = 0;
#pragma unroll
    for (int d = 3; d >= 0; d--) {
        int i = index % b.dims[d];
        index /= b.dims[d];
        ia += i * b.a[d];
        ib += i * b.b[d];
    }
}

// Walks one row of an operand along k and yields its exact values.
struct Walker {
    const Operand& o;
    long long at;            // element, or byte of the row
    int row, blocks, k;
    double scale, divisor;
    bool nan;

    DEVICE Walker(const Operand& o, int matrix, int row, int k) : o(o), row(row), k(k), scale(1), nan(false) {
        blocks = (k + o.q.block - 1) / o.q.block;
        at = o.values ? matrix * o.batch + row * o.row_stride : (long long)row * o.row_bytes;
        divisor = o.values && o.q.kind == TENSOR ? *o.scale : 1.0f;
    }
    DEVICE float value(int i) const { return load_float(o.values, o.type, at + i * o.k_stride); }
    // Called at the first k of each block.
    DEVICE void block(int first) {
        if (o.q.kind != SCALED) return;
        int byte;
        if (o.values) {
            u32 amax = 0;
            for (int i = first; i < min(first + o.q.block, k); i++)
                amax = max(amax, float_bits(value(i)) & 0x7fffffffu);
            byte = amax >= INFINITY_BITS ? 255 : amax == 0 ? 0 : shared_exponent(o.q, amax) + 127;
        } else {
            byte = o.scales[(long long)row * blocks + first / o.q.block];
        }
        nan = byte == 255;
        scale = exp2_double(byte - 127);
    }
    DEVICE double get(int i) const {
        if (nan) return __longlong_as_double(0x7ff8000000000000ll);
        if (o.values) {
            float v = value(i);
            if (o.q.kind == AS_IS) return v;
            if (o.q.kind == SCALED) return double(round_element(o.q, v * exp2_exact(exponent()) * 1.0f)) * scale;
            float t = divisor == 1.0 ? v : divide(v, float(divisor));
            return t != t ? t : round_element(o.q, t);
        }
        long long bit = (long long)i * o.q.bits;
        const u8* p = o.codes + at + bit / 8;
        u32 code = p[0];
        if (bit % 8 + o.q.bits > 8) code |= u32(p[1]) << 8;
        code = code >> bit % 8 & ((1u << o.q.bits) - 1);
        return double(decode_element(o.q.format, code)) * scale;
    }
    // -e of the current block.
    DEVICE int exponent() const { return 1023 - int(__double_as_longlong(scale) >> 52); }
};

__device__ __noinline__ double exact_sum(const Finish& f, int ia, int ib, int m, int n) {
    Walker x(f.x, ia, m, f.k), w(f.w, ib, n, f.k);
    double sum = 0;
    for (int k = 0; k < f.k; k++) {
        if (k % f.x.q.block == 0) x.block(k);
        if (k % f.w.q.block == 0) w.block(k);
        sum += x.get(k) * w.get(k);
    }
    return sum;
}

DEVICE void write(const Finish& f, int batch, int m, int n, double sum) {
    double factor = f.alpha;
    if (f.factor_x) factor *= double(*f.factor_x);
    if (f.factor_w) factor *= double(*f.factor_w);
    double v = factor * sum;
    if (f.bias) v += double(f.beta) * load_float(f.bias, f.type, n);
    store_float(f.y, f.type, ((long long)batch * f.m + m) * f.n + n, float(v));
}
