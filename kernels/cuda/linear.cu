// Y = X W^T on tensor cores, W decoded on its way from shared memory to registers.
//
// W is the 16-row operand of the matrix instruction, X (folded by fold.cu into fragment order) the
// 8-column one: few rows of X leave no part of the tensor cores' 16 rows empty. A block of eight
// warps takes 128 or 256 features and 8 to 128 rows of X over its share of k; copies of the next
// 128-wide steps run behind the products. Shares of k are added by finish.cu in a fixed order.
#include "exact.cuh"
#include "hopper.cuh"
#include "weights.cuh"

struct Linear {
    const u8* codes;
    const u8* scales;        // null: no block scales
    const uint4* x;          // folded
    void* y;                 // Y, or partial sums [batch, splits, rows, n]
    const void* bias;        // null with partial sums
    u8* bad_n;               // [matrices of Y, splits * blocks of rows, n]
    u32* any_bad;
    long long x_batch;       // 16-byte units between matrices of X
    long long w_batch;       // bytes between matrices of W
    int n;
    int row_bytes;
    int blocks;
    int block_shift;         // log2 of the block size
    int steps;               // of 128 k
    int splits;
    int rows;                // rows of X that count
    int tiles;               // 8-row tiles of X, a multiple of a block's
    int copy_bytes;          // 16, 8 or 4: what W's rows are aligned to
    int partial;             // 1: y takes float partial sums
    int type;
    int w_constant;          // W is not made by the kernel before
    float alpha;
    float beta;
    int dims[4];             // broadcasting, see finish.cu
    int a[4];
    int b[4];
};

const int WARPS = 8;

// One step of rows that end inside it, lie behind W's last row or are aligned to 4 bytes only.
__device__ __noinline__ void copy_ragged(const u8* first, int row_bytes, int have, int rows, u32 to, int at0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * (STEP_BYTES / 4); i += WARPS * 32) {
        int row = i / (STEP_BYTES / 4), at = at0 + i % (STEP_BYTES / 4) * 4;
        bool valid = row < have && at < row_bytes;
        copy_async<4>(to + i * 4, valid ? first + (long long)row * row_bytes + at : first, valid);
    }
}

// What a block does: features per warp 16 * MT, rows of X per block 8 * NT.
template <int NT, int MT>
struct Shape {
    static const int ROWS = WARPS * 16 * MT;
    static const int W_BYTES = ROWS * STEP_BYTES;
    static const int X_BYTES = NT * 2048;
    static const int STAGE = W_BYTES + X_BYTES;
    // Steps whose copies are under way; tiles.rs computes the same. What leaves room for three, two
    // or one block on a multiprocessor of compute capability 9.0.
    static const int ROOM = NT <= 2 ? 75 << 10 : NT <= 8 ? 98 << 10 : 200 << 10;
    static const int STAGES = ROOM / STAGE < 2 ? 2 : ROOM / STAGE > 6 ? 6 : ROOM / STAGE;
    // 16-byte pieces of a row's step, and rows that the block's threads copy at a time.
    static const int PIECES = STEP_BYTES / 16;
    static const int PASS = PIECES == 6 ? 32 : WARPS * 32 / PIECES;
};

// Returns whether a sum is not finite: it may have left fp32 on its way, and fp64 has to tell.
template <int NT, int MT>
DEVICE bool store(const Linear& p, float (&acc)[MT][NT][4], float* scratch, long long out, int n0, int m0) {
    const int COLUMNS = 16 * MT, PITCH = COLUMNS + 1;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool wild = false;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        if (m0 + nt * 8 >= p.rows) break;
        __syncwarp();
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scratch[(t * 2 + i % 2) * PITCH + mt * 16 + g + i / 2 * 8] = acc[mt][nt][i];
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 8 * COLUMNS; i += 32) {
            int row = i / COLUMNS, column = i % COLUMNS, m = m0 + nt * 8 + row, n = n0 + column;
            if (m >= p.rows || n >= p.n) continue;
            float v = scratch[row * PITCH + column];
            wild |= (float_bits(v) & 0x7fffffffu) >= INFINITY_BITS;
            long long at = out + (long long)m * p.n + n;
            if (p.partial) {
                static_cast<float*>(p.y)[at] = v;
            } else {
                v *= p.alpha;
                if (p.bias) v += p.beta * load_float(p.bias, p.type, n);
                store_float(p.y, p.type, at, v);
            }
        }
    }
    return wild;
}

// Says of each of the warp's rows of W whether its sums have to be taken again.
template <int ROWS>
DEVICE void mark(const Linear& p, u32 (&bad)[ROWS], u32 wild, long long part, int row, int t) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        u32 any = bad[i] | wild;
        any |= __shfl_xor_sync(0xffffffffu, any, 1);
        any |= __shfl_xor_sync(0xffffffffu, any, 2);
        int n = row + i * 8;
        if (t == 0 && n < p.n) {
            p.bad_n[part * p.n + n] = any != 0;
            if (any && p.any_bad) atomicOr(p.any_bad, 1u);
        }
    }
}

// Block (features, rows of X, matrix * splits + split).
template <int NT, int MT>
DEVICE void linear(const Linear& p) {
    extern __shared__ uint4 shared[];
    typedef Shape<NT, MT> S;
    int split = blockIdx.z % p.splits, matrix = blockIdx.z / p.splits, ia = 0, ib = 0, rest = matrix;
#pragma unroll
    for (int d = 3; d >= 0; d--) {
        int i = rest % p.dims[d];
        rest /= p.dims[d];
        ia += i * p.a[d];
        ib += i * p.b[d];
    }
    const int STAGES = S::STAGES, STAGE = S::STAGE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int n0 = blockIdx.x * S::ROWS, row = n0 + warp * 16 * MT + g;
    int step = int((long long)p.steps * split / p.splits);
    int left = int((long long)p.steps * (split + 1) / p.splits) - step;
    u32 base = shared_address(shared);

    // Where this thread's copies come from; moved on after each step.
    const u8* block_codes = p.codes + ib * p.w_batch + (long long)n0 * p.row_bytes;
    const u8* w_from = block_codes + (long long)(threadIdx.x / S::PIECES) * p.row_bytes +
                       threadIdx.x % S::PIECES * 16 + (long long)step * STEP_BYTES;
    int w_at = step * STEP_BYTES;
    bool even = p.copy_bytes == 16 && n0 + S::ROWS <= p.n;
    bool copies = S::PIECES * S::PASS == WARPS * 32 || threadIdx.x < S::PIECES * S::PASS;
    const uint4* x_from = p.x + ia * p.x_batch + ((long long)step * p.tiles + blockIdx.y * NT) * 128 + threadIdx.x;
    auto copy_w = [&](u32 to) {
        if (even && w_at + STEP_BYTES <= p.row_bytes) {
            if (copies)
#pragma unroll
                for (int i = 0; i < S::ROWS / S::PASS; i++)
                    copy_async<16>(to + threadIdx.x * 16 + i * S::PASS * STEP_BYTES, w_from + (long long)i * S::PASS * p.row_bytes);
        } else {
            copy_ragged(block_codes, p.row_bytes, min(S::ROWS, p.n - n0), S::ROWS, to, w_at);
        }
        w_from += STEP_BYTES, w_at += STEP_BYTES;
    };
    auto copy_x = [&](u32 to) {
        if (NT > 1 || threadIdx.x < 128)
#pragma unroll
            for (int i = 0; i < (NT + 1) / 2; i++)
                copy_async<16>(to + S::W_BYTES + threadIdx.x * 16 + i * 4096, x_from + i * 256);
        x_from += p.tiles * 128;
    };
    // A lane's codes of a step lie side by side, within one block.
    bool same = BITS < 8 && p.block_shift >= 5;
    // Scale bytes of this lane's rows, one step ahead: low byte for codes 0-15, then for 16-31.
    const u8* row_scales[2 * MT];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++)
        row_scales[i] = p.scales + (long long)min(row + i * 8, p.n - 1) * p.blocks;
    u32 next_scales[2 * MT], bad[2 * MT];
    auto load_scales = [&](int step) {
        int first = (step * 128 + code_offset(t, 0)) >> p.block_shift;
        int second = (step * 128 + code_offset(t, 2)) >> p.block_shift;
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) {
            u32 a = first < p.blocks ? row_scales[i][first] : 127;
            u32 b = same ? 0 : second < p.blocks ? row_scales[i][second] : 127;
            next_scales[i] = a | b << 8;
        }
    };

    if (!p.w_constant) wait_for_previous();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++)
        if (s < left) copy_w(base + s * STAGE);
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) next_scales[i] = 127 | 127 << 8, bad[i] = 0;
    if (p.scales && left > 0) load_scales(step);
    if (p.w_constant) wait_for_previous();
    launch_dependents();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < left) copy_x(base + s * STAGE);
        copy_commit();
    }

    const int GROUP = NT < 4 ? NT : 4, CHAINS = NT <= 2 ? 2 : 1;
    float acc[MT][NT][4] = {}, odd[MT][CHAINS == 2 ? NT : 1][4] = {};
    u32 here = 0, there = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (; left > 0; left--) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (left >= STAGES) {
            copy_w(base + there);
            copy_x(base + there);
        }
        copy_commit();
        u32 scales[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) scales[i] = next_scales[i];
        step++;
        if (p.scales && left > 1) load_scales(step);

        const u8* codes = reinterpret_cast<const u8*>(shared) + here + (warp * 16 * MT + g) * STEP_BYTES;
        const uint4* x = reinterpret_cast<const uint4*>(reinterpret_cast<const u8*>(shared) + here + S::W_BYTES) + lane;
        u32 w[2 * MT][LANE_WORDS], multipliers[2 * MT][2];
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) {
            load_codes(codes + i * 8 * STEP_BYTES, t, w[i]);
            bad[i] |= special(w[i]);
            multipliers[i][0] = multiplier(scales[i] & 255, w[i], bad[i]);
            multipliers[i][1] = same ? multipliers[i][0] : multiplier(scales[i] >> 8, w[i], bad[i]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[MT][2][4];
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) {
                u32 pairs[4];
                expand(w[i], j, pairs);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    if (WEIGHT != BFLOAT16) pairs[q] = mul_bf16x2(pairs[q], multipliers[i][j / 2]);
                    a[i / 2][q / 2][q % 2 * 2 + i % 2] = pairs[q];
                }
            }
#pragma unroll
            for (int first = 0; first < NT; first += GROUP) {
                uint4 b[GROUP];
#pragma unroll
                for (int i = 0; i < GROUP; i++) b[i] = x[((first + i) * 4 + j) * 32];
                // Products that add to one another stand apart: each takes some thirty cycles.
#pragma unroll
                for (int i = 0; i < GROUP; i++)
#pragma unroll
                    for (int mt = 0; mt < MT; mt++) mma_bf16(acc[mt][first + i], a[mt][0], b[i].x, b[i].y);
#pragma unroll
                for (int i = 0; i < GROUP; i++)
#pragma unroll
                    for (int mt = 0; mt < MT; mt++)
                        mma_bf16(CHAINS == 2 ? odd[mt][CHAINS == 2 ? first + i : 0] : acc[mt][first + i], a[mt][1], b[i].z, b[i].w);
            }
        }
        there = here;
        here = here + STAGE == STAGES * STAGE ? 0 : here + STAGE;
    }
    copy_wait<0>();
    __syncthreads();
    if (CHAINS == 2) {
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) acc[i / 4 / NT][i / 4 % NT][i % 4] += odd[i / 4 / NT][CHAINS == 2 ? i / 4 % NT : 0][i % 4];
    }
    float* scratch = reinterpret_cast<float*>(shared) + warp * 8 * (16 * MT + 1);
    long long out = (long long)blockIdx.z * p.rows * p.n;
    u32 wild = store<NT, MT>(p, acc, scratch, out, n0 + warp * 16 * MT, blockIdx.y * NT * 8);
    wild = p.partial ? 0 : __any_sync(0xffffffffu, wild);
    // By product, not by matrix of W: whose sums leave fp32 follows from both operands.
    mark(p, bad, wild, ((long long)matrix * gridDim.y + blockIdx.y) * p.splits + split, row, t);
}

// Few rows of X: the codes go straight from memory to registers, DEPTH steps ahead, and no warp waits
// for another. Rows of W are aligned to 16 bytes and whole steps, blocks are 32 wide or absent.
const int STREAM_WARPS = 4;
const int STREAM_FEATURES = STREAM_WARPS * 16;

// The sums of this warp's 16 features, from n0 on, over one share of k; and whether a row of W was met
// that has to be taken again.
template <int NT>
DEVICE void stream(const Linear& p, int n0, int split, float (&acc)[1][NT][4], u32 (&bad)[2]) {
    const int DEPTH = BITS == 4 ? 4 : BITS == 6 ? 3 : 2;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = n0 + g;
    int step = int((long long)p.steps * split / p.splits);
    int left = int((long long)p.steps * (split + 1) / p.splits) - step;
    const u8* from[2];
    const u32* scale_from[2];
    u32 w[DEPTH][2][LANE_WORDS], scales[DEPTH][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        long long r = min(row + i * 8, p.n - 1);
        from[i] = p.codes + r * p.row_bytes + (long long)step * STEP_BYTES;
        scale_from[i] = reinterpret_cast<const u32*>(p.scales + r * p.blocks) + step;
    }
    auto load = [&](int d) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            stream_codes(from[i], t, w[d][i]);
            scales[d][i] = p.scales ? *scale_from[i] : 0x7f7f7f7fu;
            from[i] += STEP_BYTES, scale_from[i]++;
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < left) load(d);
    wait_for_previous();
    launch_dependents();
    const uint4* x = p.x + (long long)step * p.tiles * 128 + lane;
    float odd[NT][4] = {};
    int first = BITS < 8 ? t : t / 2, second = BITS < 8 ? t : 2 + t / 2;
#pragma unroll 1
    while (left > 0) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (left <= 0) break;
            uint4 b[NT][4];
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int j = 0; j < 4; j++) b[nt][j] = x[(nt * 4 + j) * 32];
            x += p.tiles * 128;
            u32 m[2][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                bad[i] |= special(w[d][i]);
                m[i][0] = multiplier(scales[d][i] >> first * 8 & 255, w[d][i], bad[i]);
                m[i][1] = BITS < 8 ? m[i][0] : multiplier(scales[d][i] >> second * 8 & 255, w[d][i], bad[i]);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 a[2][4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 pairs[4];
                    expand(w[d][i], j, pairs);
#pragma unroll
                    for (int q = 0; q < 4; q++)
                        a[q / 2][q % 2 * 2 + i] =
                            WEIGHT == BFLOAT16 ? pairs[q] : mul_bf16x2(pairs[q], m[i][j / 2]);
                }
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    mma_bf16(acc[0][nt], a[0], b[nt][j].x, b[nt][j].y);
                    mma_bf16(odd[nt], a[1], b[nt][j].z, b[nt][j].w);
                }
            }
            if (left > DEPTH) load(d);
            left--;
        }
    }
#pragma unroll
    for (int i = 0; i < NT * 4; i++) acc[0][i / 4][i % 4] += odd[i / 4][i % 4];
}

// Sums or partial sums to memory. Block (features, 1, share of k).
template <int NT>
DEVICE void stream_shares(const Linear& p) {
    __shared__ float shared[STREAM_WARPS][8 * 17];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = blockIdx.x * STREAM_FEATURES + warp * 16;
    float acc[1][NT][4] = {};
    u32 bad[2] = {};
    stream<NT>(p, n0, blockIdx.z, acc, bad);
    u32 wild = store<NT, 1>(p, acc, shared[warp], (long long)blockIdx.z * p.rows * p.n, n0, 0);
    mark(p, bad, p.partial ? 0 : __any_sync(0xffffffffu, wild), blockIdx.z, n0 + lane / 4, lane % 4);
}

#if __CUDA_ARCH__ >= 900
// The word at this place in the shared memory of block `rank` of the cluster.
DEVICE u32 cluster_word(const void* place, u32 rank) {
    u32 word;
    asm volatile("{.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %1, %2;\n"
                 "ld.shared::cluster.u32 %0, [remote];}"
                 : "=r"(word)
                 : "r"(shared_address(place)), "r"(rank)
                 : "memory");
    return word;
}

// The whole product: the blocks of a cluster take one share of k each, read each other's sums in
// finish.cu's order and write Y, so that no kernel has to be started for that.
template <int NT>
DEVICE void stream_whole(const Linear& p, const Finish& f) {
    __shared__ float sums[NT * 8][STREAM_FEATURES];
    __shared__ u32 marks[STREAM_FEATURES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int rank = cluster_rank(), block_n = blockIdx.x / p.splits * STREAM_FEATURES;
    float acc[1][NT][4] = {};
    u32 bad[2] = {};
    stream<NT>(p, block_n + warp * 16, rank, acc, bad);
#pragma unroll
    for (int i = 0; i < NT * 4; i++)
        sums[i / 4 * 8 + t * 2 + i % 2][warp * 16 + g + i / 2 % 2 * 8] = acc[0][i / 4][i % 4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 any = bad[i];
        any |= __shfl_xor_sync(0xffffffffu, any, 1);
        any |= __shfl_xor_sync(0xffffffffu, any, 2);
        if (t == 0) marks[warp * 16 + g + i * 8] = any;
    }
    cluster_sync();
#pragma unroll 1
    for (int i = rank * STREAM_WARPS * 32 + threadIdx.x; i < f.m * STREAM_FEATURES; i += p.splits * STREAM_WARPS * 32) {
        int m = i / STREAM_FEATURES, column = i % STREAM_FEATURES, n = block_n + column;
        if (n >= f.n) continue;
        float total = 0;
        u32 again = 0;
        for (int term = f.terms - 1; term >= 0; term--) {
            float sum = 0;
#pragma unroll 4
            for (int s = 0; s < p.splits; s++) sum += bits_float(cluster_word(&sums[term * f.m + m][column], s));
            total += sum;
        }
#pragma unroll 4
        for (int s = 0; s < p.splits; s++) again |= cluster_word(&marks[column], s);
        for (int j = 0; j < f.parts_m; j++) again |= f.bad_m[(long long)m * f.parts_m + j];
        // A sum that left fp32 on its way may come back; fp64 tells.
        if (again || (float_bits(total) & 0x7fffffffu) >= INFINITY_BITS) {
            write(f, 0, m, n, exact_sum(f, 0, 0, m, n));
            continue;
        }
        float y = f.alpha * total;
        if (f.bias) y += f.beta * load_float(f.bias, f.type, n);
        store_float(f.y, f.type, (long long)m * f.n + n, y);
    }
    // Lanes left the loop at different times, and the barrier is one of whole warps.
    __syncwarp();
    // Until then others may read this block's sums.
    cluster_sync();
}
#endif

#define KERNEL(NAME, NT, MT, PER_SM)                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM) NAME(const __grid_constant__ Linear p) { \
        linear<NT, MT>(p);                                                             \
    }
KERNEL(linear_8, 1, 1, 3)
KERNEL(linear_16, 2, 1, 3)
KERNEL(linear_32, 4, 1, 2)
KERNEL(linear_64, 8, 1, 2)
KERNEL(linear_128, 16, 2, 1)

extern "C" __global__ void __launch_bounds__(STREAM_WARPS * 32, 5) stream_8(const __grid_constant__ Linear p) {
    stream_shares<1>(p);
}
extern "C" __global__ void __launch_bounds__(STREAM_WARPS * 32, 4) stream_16(const __grid_constant__ Linear p) {
    stream_shares<2>(p);
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __launch_bounds__(STREAM_WARPS * 32, 5)
    whole_8(const __grid_constant__ Linear p, const __grid_constant__ Finish f) {
    stream_whole<1>(p, f);
}
#endif

struct Dequantise {
    const u8* codes;
    const u8* scales;
    uint4* out;              // [n, width] bfloat16, row-major
    u8* bad_n;               // [parts, n]
    u32* any_bad;
    int n;
    int k;
    int row_bytes;
    int blocks;
    int block_shift;
    int width;               // k padded to a multiple of 8
};

// W as bfloat16 times 2^-SHIFT; eight codes a thread. Block (row, 1024 k). Runs beside the kernel
// before it and ends after that one, so that whoever waits for this waits for both.
extern "C" __global__ void __launch_bounds__(128) dequantise(const __grid_constant__ Dequantise p) {
    launch_dependents();
    int n = blockIdx.x, k = (blockIdx.y * 128 + threadIdx.x) * 8;
    u32 bad = 0;
    if (k < p.width) {
        // Rows are whole blocks, so eight codes from a multiple of eight on are all there.
        const u8* from = p.codes + (long long)n * p.row_bytes + (long long)k * BITS / 8;
        u32 w[LANE_WORDS] = {};
        if (BITS == 6) {
            // Six bytes, aligned to two.
            const u16* h = reinterpret_cast<const u16*>(from);
            w[0] = h[0] | u32(h[1]) << 16, w[1] = h[2];
        } else {
#pragma unroll
            for (int i = 0; i < BITS / 4; i++) w[i] = reinterpret_cast<const u32*>(from)[i];
        }
        if (k + 8 > p.k) {
            // What lies behind the end of a row is no part of it.
            for (int i = p.k - k; i < 8; i++) {
                int bit = i * BITS;
                for (int b = bit; b < bit + BITS; b++) w[b / 32] &= ~(1u << b % 32);
            }
        }
        bad |= special(w);
        u32 scale = p.scales ? p.scales[(long long)n * p.blocks + (k >> p.block_shift)] : 127;
        u32 m = multiplier(scale, w, bad), v[4];
        expand(w, 0, v);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = WEIGHT == BFLOAT16 ? v[i] : mul_bf16x2(v[i], m);
        // Back to the order of k.
        uint4 o;
        if (BITS == 16)
            o = make_uint4(v[0], v[1], v[2], v[3]);
        else if (BITS == 8)
            o = make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632),
                           __byte_perm(v[2], v[3], 0x5410), __byte_perm(v[2], v[3], 0x7632));
        else
            o = make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
                           __byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632));
        p.out[((long long)n * p.width + k) / 8] = o;
    }
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
        p.bad_n[(long long)blockIdx.y * p.n + n] = bad != 0;
        if (bad && p.any_bad) atomicOr(p.any_bad, 1u);
    }
    wait_for_previous();
}
