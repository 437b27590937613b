// Y = X W^T for many rows of X on compute capability 9.0: W goes from memory to registers, is decoded
// there and enters warpgroup matrix products as their first factor; X, folded by fold.cu into the tiles
// that the products read, comes by bulk copies.
//
// A block of two multiplying warpgroups and a copying one takes 128 features and TILE rows of X, one tile after
// the other. A warpgroup has 64 features: while its products of 64 k run, it decodes the next 64 k.
// Pairs of blocks (CLUSTER 2) share rows of X: each fetches one half for both. Shares of k are added by
// finish.cu in a fixed order.
#include "hopper.cuh"
#include "weights.cuh"

struct Wide {
    const u8* codes;
    const u8* scales;        // null: no block scales
    const u8* x;             // folded: [chunks of 64 k][padded rows][128 bytes]
    void* y;                 // Y, or partial sums [splits, rows, n]
    const void* bias;        // null with partial sums
    u8* bad_n;               // [splits * tiles_m, n]
    u32* any_bad;
    int n;
    int row_bytes;
    int blocks;              // of 32 codes in a row
    int steps;               // of 128 k
    int splits;
    int rows;                // rows of X that count
    int padded;              // rows of the folded X, a multiple of TILE
    int tiles_m;
    int groups_n;            // clusters along the features
    int partial;             // 1: y takes float partial sums
    int type;
    float alpha;
    float beta;
};

const int FEATURES = 128;            // of a block
const int CONSUMERS = 256;           // threads that multiply
const int CONSUMER_REGISTERS = 240, COPY_REGISTERS = 24;
const int PIECE = 32;                // rows of X that leave through shared memory at a time
const int PITCH = 64 + 4;            // floats from row to row there; no two lanes meet in a bank

template <int TILE, int CLUSTER>
struct Layout {
    static const int STAGE = TILE * 128;
    // wide.rs computes the same.
    static const int STAGES = TILE == 64 ? 8 : 6;
    // Steps whose codes are under way: what registers allow. A share of k is rounded up to whole rounds
    // of as many, with codes of zero, so that the loop has one exit: sums in flight must not be moved.
    static const int DEPTH = TILE == 64 ? 4 : 2;
    static const int SCRATCH = STAGES * STAGE;
    static const int BARRIERS = SCRATCH + 2 * PIECE * PITCH * 4;
};

// One tile of the output and its share of k.
struct Work {
    int m0, n0, part, split, step, end, rounds;
};
template <int TILE, int CLUSTER>
DEVICE Work work_at(const Wide& p, int index, int rank) {
    Work w;
    int tile_m = index % p.tiles_m, rest = index / p.tiles_m;
    w.split = rest % p.splits;
    w.n0 = (rest / p.splits * CLUSTER + rank) * FEATURES;
    w.m0 = tile_m * TILE;
    w.part = w.split * p.tiles_m + tile_m;
    w.step = p.steps * w.split / p.splits;
    w.end = p.steps * (w.split + 1) / p.splits;
    const int DEPTH = Layout<TILE, CLUSTER>::DEPTH;
    w.rounds = (w.end - w.step + DEPTH - 1) / DEPTH;
    return w;
}

// A lane's 32 codes of one step of two rows; zeros behind the end of the share and of the rows.
DEVICE void fetch(const u8* (&from)[2], const u8* (&scale_from)[2], bool scaled, int step, int end, int blocks,
                  int t, u32 (&w)[2][LANE_WORDS], u32 (&scale)[2]) {
    bool valid = step < end && step * 4 + t < blocks;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u8* at = from[i] + (long long)step * STEP_BYTES;
        scale[i] = 127;
        if (valid) {
#pragma unroll
            for (int j = 0; j < LANE_WORDS; j += BITS == 6 ? 2 : 4) stream_words<BITS == 6 ? 2 : 4, BITS == 8>(at + j * 4, &w[i][j]);
            if (scaled) scale[i] = scale_from[i][step * 4];
        } else {
#pragma unroll
            for (int j = 0; j < LANE_WORDS; j++) w[i][j] = 0;
        }
    }
}

// The first factors of a step's chunk of 64 k: four of 16.
template <int HALF>
DEVICE void decode(const u32 (&w)[2][LANE_WORDS], const u32 (&multipliers)[2], u32 (&a)[4][4]) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 pairs[4];
            expand(w[i], HALF * 2 + j, pairs);
#pragma unroll
            for (int q = 0; q < 4; q++) a[j * 2 + q / 2][q % 2 * 2 + i] = mul_bf16x2(pairs[q], multipliers[i]);
        }
}

template <int TILE>
DEVICE void multiply(float (&acc)[TILE / 2], const u32 (&a)[4][4], u64 x) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) Wgmma<TILE>::go(acc, a[i], x + i * 2);
    wgmma_commit();
}

DEVICE float finished(const Wide& p, float v, int n) {
    v *= p.alpha;
    return p.bias ? v + p.beta * load_float(p.bias, p.type, n) : v;
}

// Rows of sums from shared memory: PIECE rows of X, 64 features.
DEVICE void write_piece(const Wide& p, const float* scratch, int m0, int n0, long long out, int thread) {
    int type = p.partial ? F32 : p.type;
    if (p.n % 8 != 0) {
#pragma unroll 1
        for (int i = thread; i < PIECE * 64; i += 128) {
            int row = i / 64, n = n0 + i % 64, m = m0 + row;
            if (m >= p.rows || n >= p.n) continue;
            float v = scratch[row * PITCH + i % 64];
            store_float(p.y, type, out + (long long)m * p.n + n, p.partial ? v : finished(p, v, n));
        }
        return;
    }
#pragma unroll 1
    for (int row = thread / 8; row < PIECE; row += 16) {
        int feature = thread % 8 * 8, m = m0 + row, n = n0 + feature;
        if (m >= p.rows || n >= p.n) continue;
        const float4* from = reinterpret_cast<const float4*>(scratch + row * PITCH + feature);
        float4 a = from[0], b = from[1];
        float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        if (!p.partial)
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = finished(p, v[i], n + i);
        long long at = out + (long long)m * p.n + n;
        if (type == F32) {
            float4* y = reinterpret_cast<float4*>(static_cast<float*>(p.y) + at);
            y[0] = make_float4(v[0], v[1], v[2], v[3]), y[1] = make_float4(v[4], v[5], v[6], v[7]);
        } else {
            u32 h[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                h[i] = type == F16 ? float_f16(v[2 * i]) | u32(float_f16(v[2 * i + 1])) << 16
                                   : float_bf16(v[2 * i]) | u32(float_bf16(v[2 * i + 1])) << 16;
            *reinterpret_cast<uint4*>(static_cast<u16*>(p.y) + at) = make_uint4(h[0], h[1], h[2], h[3]);
        }
    }
}

// The sums of a warpgroup: through shared memory, so that features lie side by side.
template <int TILE>
DEVICE void store(const Wide& p, const float (&acc)[TILE / 2], float* scratch, const Work& work, int group) {
    int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    long long out = (long long)work.split * p.rows * p.n;
#pragma unroll
    for (int piece = 0; piece < TILE / PIECE; piece++) {
        if (work.m0 + piece * PIECE >= p.rows) break;
        group_sync(1 + group, 128);
#pragma unroll
        for (int i = 0; i < PIECE / 2; i++)
            scratch[(i / 4 * 8 + t * 2 + i % 2) * PITCH + warp * 16 + g + i % 4 / 2 * 8] = acc[piece * PIECE / 2 + i];
        group_sync(1 + group, 128);
        write_piece(p, scratch, work.m0 + piece * PIECE, work.n0 + group * 64, out, thread);
    }
}

// Says of the warp's rows of W whether their sums have to be taken again.
template <int TILE>
DEVICE void mark(const Wide& p, const float (&acc)[TILE / 2], u32 (&bad)[2], const Work& work, int row, int t) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 most = 0;
#pragma unroll
        for (int j = 0; j < TILE / 2; j += 4)
            most = max(most, max(float_bits(acc[j + i * 2]) & 0x7fffffffu, float_bits(acc[j + i * 2 + 1]) & 0x7fffffffu));
        // A sum that is not finite may have left fp32 on its way; with partial sums finish.cu looks.
        u32 any = bad[i] | (!p.partial && most >= INFINITY_BITS);
        any |= __shfl_xor_sync(0xffffffffu, any, 1);
        any |= __shfl_xor_sync(0xffffffffu, any, 2);
        int n = row + i * 8;
        if (t == 0 && n < p.n) {
            p.bad_n[(long long)work.part * p.n + n] = any != 0;
            if (any && p.any_bad) atomicOr(p.any_bad, 1u);
        }
    }
}

// The copying warp: chunks of 64 k of X in the order in which the products take them.
template <int TILE, int CLUSTER>
DEVICE void copy(const Wide& p, u32 base, int rank, int clusters, int total) {
    typedef Layout<TILE, CLUSTER> L;
    const int SHARE = TILE / CLUSTER;
    int stage = 0;
    u32 parity = 1;
    wait_for_previous();
    for (int index = blockIdx.x / CLUSTER; index < total; index += clusters) {
        Work work = work_at<TILE, CLUSTER>(p, index, rank);
        const u8* from = p.x + ((long long)work.step * 2 * p.padded + work.m0 + rank * SHARE) * 128;
        int left = (work.end - work.step) * 2;
        for (int chunk = work.rounds * L::DEPTH * 2; chunk > 0; chunk--) {
            u32 full = base + L::BARRIERS + stage * 8, empty = full + L::STAGES * 8;
            barrier_wait(empty, parity);
            barrier_expect(full, L::STAGE);
            u32 to = base + stage * L::STAGE + rank * SHARE * 128;
            if (CLUSTER == 1)
                bulk_copy(to, from, SHARE * 128, full);
            else
                bulk_copy(to, from, SHARE * 128, full, u16((1 << CLUSTER) - 1));
            // The last chunk again where a share was rounded up.
            if (--left > 0) from += (long long)p.padded * 128;
            if (++stage == L::STAGES) stage = 0, parity ^= 1;
        }
    }
}

template <int TILE, int CLUSTER>
DEVICE void consume(const Wide& p, u32 base, float* scratch, int rank, int clusters, int total) {
    typedef Layout<TILE, CLUSTER> L;
    const int DEPTH = L::DEPTH;
    int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int stage = 0;
    u32 parity = 0;
    auto release = [&](int stage) {
        u32 empty = base + L::BARRIERS + (L::STAGES + stage) * 8;
        if (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(empty);
        } else if (lane < CLUSTER) {
            barrier_arrive(empty, lane);
        }
    };
    int index = blockIdx.x / CLUSTER;
    if (index >= total) return;
    Work work;
    const u8 *from[2], *scale_from[2];
    u32 w[DEPTH][2][LANE_WORDS], scale[DEPTH][2];
    auto begin = [&](int index) {
        work = work_at<TILE, CLUSTER>(p, index, rank);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            long long r = min(work.n0 + warp * 16 + g + i * 8, p.n - 1);
            from[i] = p.codes + r * p.row_bytes + t * LANE_WORDS * 4;
            scale_from[i] = p.scales + r * p.blocks + t;
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            fetch(from, scale_from, p.scales, work.step + d, work.end, p.blocks, t, w[d], scale[d]);
    };
    begin(index);
    // Nothing is written before the kernels before this one are done.
    wait_for_previous();
    launch_dependents();
    for (;;) {
        u32 bad[2] = {}, a[2][4][4], multipliers[2];
        float acc[TILE / 2];
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) acc[i] = 0;
        int previous = -1;
        auto take = [&](const u32 (&codes)[2][LANE_WORDS], const u32 (&scales)[2]) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                bad[i] |= special(codes[i]);
                multipliers[i] = multiplier(scales[i], codes[i], bad[i]);
            }
        };
        // One chunk's products. The next chunk's factors are decoded while they run.
        auto run = [&](const u32 (&factors)[4][4]) {
            barrier_wait(base + L::BARRIERS + stage * 8, parity);
            multiply<TILE>(acc, factors, tile_descriptor(base + stage * L::STAGE));
            wgmma_wait<1>();
            if (previous >= 0) release(previous);
            previous = stage;
            if (++stage == L::STAGES) stage = 0, parity ^= 1;
        };
        take(w[0], scale[0]);
        decode<0>(w[0], multipliers, a[0]);
        int first = work.step;
        // There is a step at least: the host makes no more shares than steps.
#pragma unroll 1
        do {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int NEXT = (d + 1) % DEPTH;
                run(a[0]);
                decode<1>(w[d], multipliers, a[1]);
                run(a[1]);
                take(w[NEXT], scale[NEXT]);
                decode<0>(w[NEXT], multipliers, a[0]);
                // Not sooner, though codes d were used up before: take() waits for the codes of the next
                // step, and would wait for these as well, since loads are counted together.
                fetch(from, scale_from, p.scales, first + d + DEPTH, work.end, p.blocks, t, w[d], scale[d]);
            }
            first += DEPTH;
        } while (first < work.end);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) wgmma_done(acc[i]);
        release(previous);
        // The next tile's codes come while this one is written.
        Work done = work;
        index += clusters;
        if (index < total) begin(index);
        mark<TILE>(p, acc, bad, done, done.n0 + warp * 16 + g, t);
        store<TILE>(p, acc, scratch + group * PIECE * PITCH, done, group);
        if (index >= total) break;
    }
}

template <int TILE, int CLUSTER>
DEVICE void wide(const Wide& p) {
    extern __shared__ uint4 shared[];
    typedef Layout<TILE, CLUSTER> L;
    // Tiles have to be aligned to the pattern in which their pieces are exchanged.
    u32 start = shared_address(shared), base = (start + 1023) & ~1023u;
    int rank = CLUSTER == 1 ? 0 : cluster_rank(), clusters = gridDim.x / CLUSTER;
    int total = p.tiles_m * p.groups_n * p.splits;
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::STAGES; i++) {
            barrier_init(base + L::BARRIERS + i * 8, 1);
            // One arrival of each multiplying warp of the cluster.
            barrier_init(base + L::BARRIERS + (L::STAGES + i) * 8, CONSUMERS / 32 * CLUSTER);
        }
        barrier_init_done();
    }
    if (CLUSTER == 1)
        __syncthreads();
    else
        cluster_sync();
    if (threadIdx.x >= CONSUMERS) {
        registers_down<COPY_REGISTERS>();
        if (threadIdx.x == CONSUMERS) copy<TILE, CLUSTER>(p, base, rank, clusters, total);
        __syncwarp();
    } else {
        registers_up<CONSUMER_REGISTERS>();
        float* scratch = reinterpret_cast<float*>(reinterpret_cast<u8*>(shared) + (base - start) + L::SCRATCH);
        consume<TILE, CLUSTER>(p, base, scratch, rank, clusters, total);
    }
    // No block leaves while another one may still report to its barriers.
    if (CLUSTER != 1) cluster_sync();
}

#define KERNEL(TILE, CLUSTER)                                                              \
    extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)                           \
        wide_##TILE(const __grid_constant__ Wide p) {                                              \
        wide<TILE, CLUSTER>(p);                                                                    \
    }
KERNEL(64, 1)
KERNEL(128, 2)
KERNEL(256, 2)
