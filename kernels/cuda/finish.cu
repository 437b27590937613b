// The last step of a product: partial sums added in a fixed order, factors, bias, Y's type; and, for
// rows and columns marked bad, the sum itself again in fp64 from the operands as they were given.
#include "exact.cuh"

DEVICE bool marked(const u8* bad, long long first, int parts, long long stride) {
    u32 any = 0;
    for (int p = 0; p < parts; p++) any |= bad[first + p * stride];
    return any != 0;
}

// WIDTH neighbouring columns: loads of partial sums and marks are as wide.
template <int WIDTH>
DEVICE void load_sums(const float* p, float (&v)[WIDTH]) {
    if (WIDTH == 4) {
        float4 a = *reinterpret_cast<const float4*>(p);
        v[0] = a.x, v[1 % WIDTH] = a.y, v[2 % WIDTH] = a.z, v[3 % WIDTH] = a.w;
    } else {
        v[0] = *p;
    }
}
template <int WIDTH>
DEVICE u32 load_marks(const u8* p) {
    return WIDTH == 4 ? *reinterpret_cast<const u32*>(p) : *p;
}

template <int WIDTH>
DEVICE void finish_columns(const Finish& f, int m, int batch, int n) {
    int ia, ib;
    matrices(f.batches, batch, ia, ib);
    // All loads are on their way before the first is looked at.
    u32 bad = 0, bad_row = 0;
    const u8* bad_m = f.bad_m + ((long long)ia * f.m + m) * f.parts_m;
    const u8* bad_n = f.bad_n + (long long)batch * f.parts_n * f.n + n;
    long long rows = (long long)f.terms * f.m;
    const float* p = f.partial + (long long)batch * f.splits * rows * f.n + (long long)m * f.n + n;
    float total[WIDTH] = {};
    // The smallest terms first.
    for (int term = f.terms - 1; term >= 0; term--) {
        float sum[WIDTH] = {};
#pragma unroll 4
        for (int s = 0; s < f.splits; s++) {
            float v[WIDTH];
            load_sums<WIDTH>(p + (s * rows + (long long)term * f.m) * f.n, v);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sum[i] += v[i];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) total[i] += sum[i];
    }
#pragma unroll 4
    for (int i = 0; i < f.parts_n; i++) bad |= load_marks<WIDTH>(bad_n + (long long)i * f.n);
#pragma unroll 4
    for (int i = 0; i < f.parts_m; i++) bad_row |= bad_m[i];
    float y[WIDTH];
    bool again = bad || bad_row;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        // A sum that left fp32 on its way may come back; fp64 tells.
        again |= (float_bits(total[i]) & 0x7fffffffu) >= INFINITY_BITS;
        y[i] = f.alpha * total[i];
        if (f.bias) y[i] += f.beta * load_float(f.bias, f.type, n + i);
    }
    if (again || f.factor_x || f.factor_w) {
#pragma unroll 1
        for (int i = 0; i < WIDTH; i++) {
            float sum = i == 0 ? total[0] : i == 1 ? total[1 % WIDTH] : i == 2 ? total[2 % WIDTH] : total[3 % WIDTH];
            bool exact = bad_row || bad >> 8 * i & 255 || (float_bits(sum) & 0x7fffffffu) >= INFINITY_BITS;
            write(f, batch, m, n + i, exact ? exact_sum(f, ia, ib, m, n + i) : sum);
        }
        return;
    }
    long long at = ((long long)batch * f.m + m) * f.n + n;
    if (WIDTH == 1) {
        store_float(f.y, f.type, at, y[0]);
    } else if (f.type == F32) {
        *reinterpret_cast<float4*>(static_cast<float*>(f.y) + at) =
            make_float4(y[0], y[1 % WIDTH], y[2 % WIDTH], y[3 % WIDTH]);
    } else {
        u32 h[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float low = y[2 * i % WIDTH], high = y[(2 * i + 1) % WIDTH];
            h[i] = f.type == F16 ? float_f16(low) | u32(float_f16(high)) << 16
                                 : float_bf16(low) | u32(float_bf16(high)) << 16;
        }
        *reinterpret_cast<uint2*>(static_cast<u16*>(f.y) + at) = make_uint2(h[0], h[1]);
    }
}

// Block (256 threads of one column, or of four where rows are whole fours; row; matrix).
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ Finish f) {
    wait_for_previous();
    launch_dependents();
    int at = blockIdx.x * 256 + threadIdx.x;
    if (f.n % 4 == 0) {
        if (at * 4 < f.n) finish_columns<4>(f, blockIdx.y, blockIdx.z, at * 4);
    } else if (at < f.n) {
        finish_columns<1>(f, blockIdx.y, blockIdx.z, at);
    }
}

// Only the marked rows and columns of a finished Y; blocks take rows in turn.
extern "C" __global__ void __launch_bounds__(256) repair(const __grid_constant__ Finish f, int batches) {
    wait_for_previous();
    launch_dependents();
    if (*f.any_bad == 0) return;
    for (int batch = 0; batch < batches; batch++) {
        int ia, ib;
        matrices(f.batches, batch, ia, ib);
        const u8* bad_n = f.bad_n + (long long)batch * f.parts_n * f.n;
        bool some = false;
        for (long long i = threadIdx.x; i < (long long)f.parts_n * f.n; i += 256) some |= bad_n[i] != 0;
        bool any_n = __syncthreads_or(some);
        for (int m = blockIdx.x; m < f.m; m += gridDim.x) {
            bool bad_m = marked(f.bad_m, ((long long)ia * f.m + m) * f.parts_m, f.parts_m, 1);
            if (!bad_m && !any_n) continue;
            for (int n = threadIdx.x; n < f.n; n += 256)
                if (bad_m || marked(bad_n, n, f.parts_n, f.n))
                    write(f, batch, m, n, exact_sum(f, ia, ib, m, n));
        }
    }
}
