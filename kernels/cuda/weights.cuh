// Codes of one weight format to bfloat16 fragments, scales folded in. WEIGHT names the format.
//
// A code's exponent and mantissa, moved to the right place of a bfloat16, are its value times
// 2^-BIAS (subnormals included), so one exact multiplication by 2^(scale + BIAS - SHIFT) decodes and
// scales it. SHIFT leaves room for scales up to 2^33; X carries the inverse.
#pragma once
#include "formats.cuh"

#if WEIGHT == 0 || WEIGHT == 1 || WEIGHT == 5
const int BITS = 8;
#elif WEIGHT == 2 || WEIGHT == 3
const int BITS = 6;
#elif WEIGHT == 4
const int BITS = 4;
#else
const int BITS = 16;
#endif

// Bytes of 128 codes, and of the codes that one lane decodes of them.
const int STEP_BYTES = 16 * BITS;
const int LANE_WORDS = BITS;

// 127 - the format's bias; 127 - 6 for the integer format, whose fragments start as whole numbers.
const int BIAS = WEIGHT == E4M3 ? 120 : WEIGHT == E5M2 ? 112 : WEIGHT == E3M2 ? 124
               : WEIGHT == INT8 ? -6 : 126;
const int SHIFT = 32;
// Exponent of the smallest element that is not zero.
const int SMALLEST = WEIGHT == E4M3 ? -9 : WEIGHT == E5M2 ? -16 : WEIGHT == E3M2 ? -4
                   : WEIGHT == E2M3 ? -3 : WEIGHT == E2M1 ? -1 : -6;
// Scale bytes whose every element is a normal bfloat16 and whose multiplier is one.
const int LOWEST = 1 + SHIFT - SMALLEST;
const int HIGHEST = 254 + SHIFT - BIAS < 254 ? 254 + SHIFT - BIAS : 254;

// Where lane t's group j of eight codes lies within 128; fragment() of fold.cu mirrors it.
DEVICE int code_offset(int t, int j) {
    if (BITS == 8) return j / 2 * 64 + t * 16 + j % 2 * 8;
    if (BITS == 16) return j * 32 + t * 8;
    return t * 32 + j * 8;
}

// The codes of lane t of one row's 128, from shared or global memory aligned to 8 (fp6) or 16 bytes.
DEVICE void load_codes(const u8* row, int t, u32 (&w)[LANE_WORDS]) {
#if WEIGHT == 4
    uint4 v = *reinterpret_cast<const uint4*>(row + t * 16);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
#elif WEIGHT == 2 || WEIGHT == 3
#pragma unroll
    for (int i = 0; i < 3; i++) {
        uint2 v = *reinterpret_cast<const uint2*>(row + t * 24 + i * 8);
        w[2 * i] = v.x, w[2 * i + 1] = v.y;
    }
#else
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
        uint4 v = *reinterpret_cast<const uint4*>(row + i * 64 + t * 16);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
#endif
}

// The same from global memory, each byte used once: nothing is kept in the first-level cache, unless
// several loads share a sector (KEEP).
template <int WORDS, bool KEEP = false>
DEVICE void stream_words(const u8* from, u32* w) {
    if (WORDS == 4 && KEEP)
        asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from));
    else if (WORDS == 4)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from));
    else
        // A lane's 24 bytes take three loads, which share sectors with its neighbours': these stay.
        asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(from));
}
DEVICE void stream_codes(const u8* row, int t, u32 (&w)[LANE_WORDS]) {
    if (BITS == 4) {
        stream_words<4>(row + t * 16, w);
    } else if (BITS == 6) {
#pragma unroll
        for (int i = 0; i < 3; i++) stream_words<2>(row + t * 24 + i * 8, w + i * 2);
    } else {
#pragma unroll
        for (int i = 0; i < BITS / 4; i++) stream_words<4>(row + i * 64 + t * 16, w + i * 4);
    }
}

// Group j of eight codes as four pairs of unscaled bfloat16, in the order of fold.cu's ordered().
DEVICE void expand(const u32 (&w)[LANE_WORDS], int j, u32 (&p)[4]) {
#if WEIGHT == 4
    u32 v = w[j];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 sign = v << (12 - 4 * i);
        u32 magnitude = i < 2 ? v << (6 - 4 * i) : v >> (4 * i - 6);
        p[i] = (sign & 0x80008000u) | (magnitude & 0x01c001c0u);
    }
#elif WEIGHT == 2 || WEIGHT == 3
    // Four codes are three bytes: codes 0 and 1 (4 and 5) lie in the first two, 2 and 3 in the last.
    u32 low = w[j / 2 * 3 + j % 2], high = w[j / 2 * 3 + j % 2 + 1];
    u32 a = __byte_perm(low, high, j % 2 ? 0x6532 : 0x4310);
    u32 b = __byte_perm(low, high, j % 2 ? 0x7643 : 0x5421);
    const u32 S = 0x80008000u;
#if WEIGHT == 2
    const u32 M = 0x03e003e0u;
    p[0] = (a << 10 & S) | (a << 5 & M);
    p[1] = (a << 4 & S) | (a >> 1 & M);
    p[2] = (b << 6 & S) | (b << 1 & M);
    p[3] = (b & S) | (b >> 5 & M);
#else
    const u32 M = 0x01f001f0u;
    p[0] = (a << 10 & S) | (a << 4 & M);
    p[1] = (a << 4 & S) | (a >> 2 & M);
    p[2] = (b << 6 & S) | (b & M);
    p[3] = (b & S) | (b >> 6 & M);
#endif
#elif WEIGHT == 5
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 v = (w[2 * j + i / 2] >> (i % 2 * 8)) & 0x00ff00ffu;
        // 128 + the low seven bits, less 128 or, for negative codes, 256.
        p[i] = sub_bf16x2((v & 0x007f007fu) | 0x43004300u, (v & 0x00800080u) | 0x43004300u);
    }
#elif WEIGHT == 6
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = w[4 * j + i];
#else
    const int UP = WEIGHT == E4M3 ? 4 : 5;
    const u32 M = WEIGHT == E4M3 ? 0x07f007f0u : 0x0fe00fe0u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 v = w[2 * j + i];
        p[2 * i] = (v << 8 & 0x80008000u) | (v << UP & M);
        p[2 * i + 1] = (v & 0x80008000u) | (v >> (8 - UP) & M);
    }
#endif
}

// Not zero when the codes hold Inf or NaN.
DEVICE u32 special(const u32 (&w)[LANE_WORDS]) {
    u32 found = 0;
#if WEIGHT == 0 || WEIGHT == 1
#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++)
        found |= ((w[i] & 0x7f7f7f7fu) + (WEIGHT == E4M3 ? 0x01010101u : 0x04040404u)) & 0x80808080u;
#elif WEIGHT == 6
#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++)
        found |= ((w[i] & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
#endif
    return found;
}

DEVICE bool all_zero(const u32 (&w)[LANE_WORDS]) {
    const u32 magnitudes = BITS == 4 ? 0x77777777u : BITS == 8 && WEIGHT != INT8 ? 0x7f7f7f7fu : ~0u;
    u32 any = 0;
#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++) any |= w[i] & magnitudes;
    return any == 0;
}

// Both halves of a bfloat16 multiplier for a scale byte; zero, and `bad`, where there is none.
DEVICE u32 multiplier(u32 scale, const u32 (&w)[LANE_WORDS], u32& bad) {
    if (WEIGHT == BFLOAT16) return 0x3f803f80u;
    if (scale - LOWEST > u32(HIGHEST - LOWEST)) {
        bad |= scale == 255 || !all_zero(w);
        return 0;
    }
    u32 m = (scale + BIAS - SHIFT) << 7;
    return m | m << 16;
}
