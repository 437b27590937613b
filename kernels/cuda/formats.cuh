// Element formats, shared exponents and exact quantisation. Sources: OCP Microscaling Formats (MX)
// v1.0, sections 5 and 6.3; the specification in code is kernels/src/reference.rs.
#pragma once
#include "common.cuh"

// ElementFormat of kernels/src/formats.rs.
enum { E4M3 = 0, E5M2 = 1, E3M2 = 2, E2M3 = 3, E2M1 = 4, INT8 = 5, BFLOAT16 = 6 };

// How one operand becomes what the product takes. Filled in by kernels/src/cuda/params.rs.
struct Quant {
    int kind;      // 0: as it is, 1: e8m0, 2: no scale, 3: one float32 a tensor
    int format;
    int bits;
    int mantissa;  // explicit mantissa bits
    int emin;      // exponent of the smallest normal number
    int emax;
    float largest;
    int block;     // elements that share a scale
    int rounding;  // 0: half to even, 1: half away from zero, 2: toward zero
    int rule;      // 0: floor, 1: ceil, 2: even, 3: rceil
};
enum { AS_IS = 0, SCALED = 1, UNSCALED = 2, TENSOR = 3 };

const u32 INFINITY_BITS = 0x7f800000u;

// Shared exponent of a block whose largest magnitude has these bits (finite, not zero).
DEVICE int shared_exponent(const Quant& q, u32 amax) {
    int exponent = int(amax >> 23);
    u32 significand = amax & 0x7fffffu;
    if (exponent == 0) {
        int shift = __clz(significand) - 8;
        exponent = -126 - shift;
        significand <<= shift;
    } else {
        exponent -= 127;
        significand |= 0x800000u;
    }
    bool up = false;
    if (q.rule == 1) up = significand != 0x800000u;
    if (q.rule == 2) up = significand + (1u << (22 - q.mantissa)) >= 0x1000000u;
    if (q.rule == 3) up = significand > ((float_bits(q.largest) & 0x7fffffu) | 0x800000u);
    return min(127, max(-127, exponent + int(up) - q.emax));
}

// The element nearest to v (already divided by the scale), as a float; saturating, with v's sign.
// v is no NaN. bfloat16 alone keeps infinities.
DEVICE float round_element(const Quant& q, float v) {
    u32 sign = float_bits(v) & 0x80000000u;
    u32 bits = float_bits(v) & 0x7fffffffu;
    if (q.format == BFLOAT16) {
        u32 up = q.rounding == 0 ? 0x7fffu + ((bits >> 16) & 1) : q.rounding == 1 ? 0x8000u : 0;
        u32 rounded = bits >= INFINITY_BITS ? bits : (bits + up) & 0xffff0000u;
        return bits_float(rounded | sign);
    }
    float t = fminf(bits_float(bits), q.largest);
    // Adding c makes a float's last bit worth one step of the format at t, so the addition rounds.
    u32 floor_bits = u32(q.emin + 127) << 23;
    u32 binade = max(float_bits(t) & INFINITY_BITS, floor_bits);
    if (q.format == INT8) binade = floor_bits;
    float c = bits_float(binade + (u32(23 - q.mantissa) << 23));
    float r;
    if (q.rounding == 0) {
        r = __fadd_rn(t, c) - c;
    } else {
        r = __fadd_rz(t, c) - c;
        float half = c * 5.9604644775390625e-8f;  // 2^-24
        if (q.rounding == 1 && t - r >= half) r += half + half;
    }
    return bits_float(float_bits(r) | sign);
}

// The code of an element that round_element returned.
DEVICE u32 element_code(const Quant& q, float v) {
    u32 bits = float_bits(v) & 0x7fffffffu;
    u32 sign = float_bits(v) >> 31;
    if (q.format == BFLOAT16) return float_bits(v) >> 16;
    if (q.format == INT8) {
        int code = int(fabsf(v) * 64.0f);
        return u32(sign ? -code : code) & 0xff;
    }
    u32 code;
    if (bits >= u32(q.emin + 127) << 23)
        code = (bits >> (23 - q.mantissa)) - (u32(q.emin - 1 + 127) << q.mantissa);
    else
        code = u32(bits_float(bits) * exp2_exact(q.mantissa - q.emin));
    return code | sign << (q.bits - 1);
}

// The code of an unscaled NaN.
DEVICE u32 nan_code(const Quant& q, float v) {
    u32 sign = float_bits(v) >> 31;
    if (q.format == BFLOAT16) return 0x7fc0u | sign << 15;
    return (q.format <= E5M2 ? 0x7fu : 0u) | sign << (q.bits - 1);
}

// Value of any code, Inf and NaN codes included.
DEVICE float decode_element(int format, u32 code) {
    if (format == BFLOAT16) return bits_float(code << 16);
    if (format == INT8) return float(int(code << 24) >> 24) * 0.015625f;
    int mantissa = format == E4M3 || format == E2M3 ? 3 : format == E2M1 ? 1 : 2;
    int exponent = format == E4M3 ? 4 : format == E5M2 ? 5 : format == E3M2 ? 3 : 2;
    int bias = (1 << (exponent - 1)) - 1;
    u32 magnitude = code & ((1u << (exponent + mantissa)) - 1);
    bool negative = code >> (exponent + mantissa) & 1;
    float value;
    if ((format == E4M3 && magnitude == 0x7f) || (format == E5M2 && magnitude > 0x7c))
        value = bits_float(0x7fc00000u);
    else if (format == E5M2 && magnitude == 0x7c)
        value = bits_float(INFINITY_BITS);
    else {
        int e = int(magnitude >> mantissa);
        u32 m = magnitude & ((1u << mantissa) - 1);
        value = e == 0 ? float(m) * exp2_exact(1 - bias - mantissa)
                       : float(m | 1u << mantissa) * exp2_exact(e - bias - mantissa);
    }
    return negative ? -value : value;
}

// 2^e as a double, -1022 <= e <= 1023.
DEVICE double exp2_double(int e) { return __longlong_as_double((long long)(e + 1023) << 52); }

// float32 / float32 as the specification divides: correctly rounded.
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }

// The scale of a whole tensor whose largest finite magnitude has these bits.
DEVICE float tensor_scale(const Quant& q, u32 amax) {
    float a = bits_float(amax);
    return amax == 0 ? 1.0f : fmaxf(divide(a, q.largest), 1.1754943508222875e-38f);
}
