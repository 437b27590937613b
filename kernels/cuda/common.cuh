// Types, conversions and asynchronous copies that every unit shares. No header of CUDA is needed.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// FloatType of kernels/src/cuda/mod.rs.
enum FloatType { F32 = 0, F16 = 1, BF16 = 2 };

DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_bits(float v) { return __float_as_uint(v); }

// 2^e for -149 <= e <= 127, exact.
DEVICE float exp2_exact(int e) {
    return bits_float(e >= -126 ? u32(e + 127) << 23 : 1u << (e + 149));
}

DEVICE float f16_float(u16 v) {
    // The conversion drops a NaN's sign, which an unscaled cast keeps.
    if ((v & 0x7fffu) > 0x7c00u) return bits_float(0x7fc00000u | u32(v & 0x8000u) << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
DEVICE u16 float_f16(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
DEVICE float bf16_float(u16 v) { return bits_float(u32(v) << 16); }
DEVICE u16 float_bf16(float v) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
// The two bfloat16 of exactly representable values: their upper halves.
DEVICE u32 pack_bf16(float low, float high) {
    return __byte_perm(float_bits(low), float_bits(high), 0x7632);
}

DEVICE float load_float(const void* p, int type, long long i) {
    if (type == F32) return static_cast<const float*>(p)[i];
    u16 v = static_cast<const u16*>(p)[i];
    return type == F16 ? f16_float(v) : bf16_float(v);
}
// Eight neighbours from value i on; zeros from the `count`th on. `vector`: their address is a multiple
// of 16.
DEVICE void load8(const void* p, int type, long long i, long long count, bool vector, float (&v)[8]) {
    if (vector && count >= 8) {
        if (type == F32) {
            const float4* q = reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
            float4 a = q[0], b = q[1];
            v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
            v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        } else {
            uint4 a = *reinterpret_cast<const uint4*>(static_cast<const u16*>(p) + i);
            u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (type == BF16) {
                    v[2 * j] = bits_float(w[j] << 16);
                    v[2 * j + 1] = bits_float(w[j] & 0xffff0000u);
                } else {
                    v[2 * j] = f16_float(u16(w[j]));
                    v[2 * j + 1] = f16_float(u16(w[j] >> 16));
                }
            }
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = j < count ? load_float(p, type, i + j) : 0.0f;
}
DEVICE void store_float(void* p, int type, long long i, float v) {
    if (type == F32)
        static_cast<float*>(p)[i] = v;
    else
        static_cast<u16*>(p)[i] = type == F16 ? float_f16(v) : float_bf16(v);
}

// a * b on two bfloat16 at once. The added -0 keeps the sign of a zero product (sm_80 has no mul).
DEVICE u32 mul_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
DEVICE u32 sub_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
    return d;
}

DEVICE u32 add_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return d;
}
DEVICE u32 min_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 max_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// A bfloat16 value, given as float, in both halves.
DEVICE u32 twice(float v) { return __byte_perm(float_bits(v), 0, 0x3232); }

// 16 bytes of global memory that this kernel reads once.
DEVICE uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Copies BYTES (4, 8 or 16) to shared memory in the background.
template <int BYTES>
DEVICE void copy_async(u32 to, const void* from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES));
}
// The same, or zeros where `valid` is false.
template <int BYTES>
DEVICE void copy_async(u32 to, const void* from, bool valid) {
    int size = valid ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                     "r"(size));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most PENDING groups of copies are under way.
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// d += a * b: a is 16 x 16, b 16 x 8, both bfloat16, d fp32; fragments as PTX lays them out.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Lets the next kernel of the stream start its prologue / waits for the kernel before. Both are
// no-ops for a launch without programmatic serialization.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
