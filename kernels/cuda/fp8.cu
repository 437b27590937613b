// X as E4M3 codes under one scale for the whole tensor: what cuBLASLt's fp8 product takes.
#include "formats.cuh"

struct Fp8 {
    const void* x;           // [m, k]
    u8* codes;               // [m, pitch], zeros behind k
    const u32* amax;         // bits of partial maxima of the whole X
    const float* scale_w;
    float* scales;           // X's scale, the factor of the sums, 1: 16 bytes apart
    u8* bad;                 // [m]: results that the factor does not give
    u32* any_bad;            // whether there are any; null: the last kernel scales the sums
    int amax_count;
    int m;
    int k;
    int pitch;               // bytes from row to row of the codes, a multiple of 16
    int type;                // FloatType of X
    float alpha;
    Quant q;
};

// alpha and both scales as one float32, so that no product of two of them leaves float32's range on
// the way. Returns whether the factor itself does.
DEVICE bool sum_factor(const Fp8& f, float scale, float& factor) {
    double exact = double(f.alpha) * double(scale) * double(*f.scale_w);
    factor = float(exact);
    u32 bits = float_bits(factor) & 0x7fffffffu;
    return exact != 0.0 && bits - 0x00800000u >= INFINITY_BITS - 0x00800000u;
}

// Codes of eight values; the first in the lowest byte.
DEVICE uint2 codes8(const Quant& q, float scale, const float (&v)[8]) {
    u32 word[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float t = divide(v[i], scale);
        u32 code = t != t ? nan_code(q, v[i]) : element_code(q, round_element(q, t));
        word[i / 4] |= code << (i % 4 * 8);
    }
    return make_uint2(word[0], word[1]);
}

// Block (1024 k, rows in turn).
extern "C" __global__ void __launch_bounds__(128) fp8_codes(const __grid_constant__ Fp8 f) {
    wait_for_previous();
    // What follows is a kernel of cuBLASLt's, which starts when this one has ended.
    u32 amax = 0;
    for (int i = threadIdx.x % 32; i < f.amax_count; i += 32) amax = max(amax, f.amax[i]);
    float scale = tensor_scale(f.q, __reduce_max_sync(0xffffffffu, amax));
    bool first = blockIdx.x == 0 && threadIdx.x == 0, bad = false;
    if (first) {
        float factor;
        bad = sum_factor(f, scale, factor) && f.any_bad;
        if (blockIdx.y == 0) {
            f.scales[0] = scale, f.scales[4] = factor, f.scales[8] = 1.0f;
            if (f.any_bad) *f.any_bad = bad;
        }
    }
    int k = (blockIdx.x * 128 + threadIdx.x) * 8;
    bool vector = f.k % (f.type == F32 ? 4 : 8) == 0 && reinterpret_cast<u64>(f.x) % 16 == 0;
    for (int row = blockIdx.y; row < f.m; row += gridDim.y) {
        if (first) f.bad[row] = bad;
        if (k >= f.pitch) continue;
        float v[8];
        load8(f.x, f.type, (long long)row * f.k + k, f.k - k, vector, v);
        *reinterpret_cast<uint2*>(f.codes + (long long)row * f.pitch + k) = codes8(f.q, scale, v);
    }
}
