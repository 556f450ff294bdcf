// Rows times a weight matrix of 8 or 4 bits in tiles, on mma.sync: many rows.
//
// As tiled.cu, but that weights are unpacked on their way: packed they come with the rows' values
// through a ring of stages; those of the next step become f16, times their scale, while this step's
// are multiplied. Before sm_80, where copies aren't asynchronous, packed weights come through
// registers instead.
#include "quantised.cuh"
#include "tiled.cuh"

struct TiledQ {
    const unsigned char* w;  // [m, k], packed
    const half* scales;      // [k / 128, m]
    const half* x;           // [n, k]
    half* out;               // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;             // F32: [parts, n, m]
    int m, k, n;
    // Parts of k: gridDim.z of them, each this many steps of 64.
    int steps;
};

// Two pieces of a step's weights, which stand side by side when packed, as f16 at `to`.
template <int BITS> __device__ __forceinline__ void unpack_pair(uint4 raw, half scale, half* to, int row, int t) {
    const __half2 by = __half2half2(scale);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        u32 h[4];
        if (BITS == 8) unpack_piece<8>(j ? raw.z : raw.x, j ? raw.w : raw.y, h);
        else unpack_piece<4>(j ? raw.y : raw.x, 0, h);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            __half2 v = __hmul2(*(__half2*)&h[e], by);
            h[e] = *(u32*)&v;
        }
        *(uint4*)(to + swizzled(row, t + 4 * j)) = make_uint4(h[0], h[1], h[2], h[3]);
    }
}

// `BN` rows and `BM` outputs a block.
template <int OP, int BITS, int BN, int BM, int WN, int WM>
__device__ __forceinline__ void tiled(const TiledQ& p) {
    constexpr int WARPS_N = BN / WN, THREADS = 32 * WARPS_N * (BM / WM);
    constexpr int NT = WN / 16, MT = WM / 8;
    // Pairs of pieces of a step's weights that a thread unpacks, and the bytes of one.
    constexpr int PAIRS = BM * 4 / THREADS, PAIR_BYTES = 2 * BITS;
    extern __shared__ __align__(128) unsigned char memory[];
    let_next_begin();
    const int warp = threadIdx.x / 32;
    const int n0 = blockIdx.y * BN, m0 = blockIdx.x * BM;
    const int wn = warp % WARPS_N * WN, wm = warp / WARPS_N * WM;
    const int begin = blockIdx.z * p.steps;
    const int steps = min(p.steps, p.k / STEP - begin);

    auto load_x = [&](half* to, int step) {
#pragma unroll
        for (int i = threadIdx.x; i < BN * 8; i += THREADS) {
            int row = i / 8, k = (begin + step) * STEP + i % 8 * 8;
            bool valid = n0 + row < p.n;
            copy16(to + swizzled(row, i % 8), valid ? p.x + (size_t)(n0 + row) * p.k + k : p.x, valid);
        }
    };
    // Of a group, a step takes pieces t + 4 j with j = 2 h and 2 h + 1, where h is its half.
    auto pair_at = [&](int step, int i) {
        const int unit = i * THREADS + threadIdx.x, row = min(m0 + unit / 4, p.m - 1), t = unit % 4;
        const int group = (begin + step) / 2, h = (begin + step) % 2;
        return p.w + group_at<BITS>(row, group, p.k / GROUP) + piece_at<BITS>(t, 2 * h);
    };
    Sums<NT, MT> sums = {};

#if __CUDA_ARCH__ >= 800
    constexpr int STAGES = 4;
    constexpr int X_BYTES = BN * STEP * 2, RAW_BYTES = BM * 4 * PAIR_BYTES;
    constexpr int STAGE_BYTES = X_BYTES + RAW_BYTES + BM * 2;
    half* const w_stages = (half*)memory;  // [2][BM][STEP]
    unsigned char* const stages = memory + 2 * BM * STEP * 2;
    auto stage = [&](int step) { return stages + step % STAGES * STAGE_BYTES; };
    auto load_w = [&](int step) {
        unsigned char* raw = stage(step) + X_BYTES;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            unsigned char* to = raw + (i * THREADS + threadIdx.x) * PAIR_BYTES;
            if (BITS == 8) copy16(to, pair_at(step, i), true);
            else copy8(to, pair_at(step, i));
        }
        if (threadIdx.x < BM / 8) {
            const int row = m0 + threadIdx.x * 8;
            const half* from = p.scales + (size_t)((begin + step) / 2) * p.m + row;
            copy16(raw + RAW_BYTES + threadIdx.x * 16, row < p.m ? from : p.scales, row < p.m);
        }
    };
    auto unpack = [&](int step) {
        const unsigned char* raw = stage(step) + X_BYTES;
        half* to = w_stages + step % 2 * BM * STEP;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int unit = i * THREADS + threadIdx.x;
            uint4 pair;
            if (BITS == 8) {
                pair = *(const uint4*)(raw + unit * PAIR_BYTES);
            } else {
                uint2 v = *(const uint2*)(raw + unit * PAIR_BYTES);
                pair.x = v.x, pair.y = v.y;
            }
            const half scale = *(const half*)(raw + RAW_BYTES + unit / 4 * 2);
            unpack_pair<BITS>(pair, scale, to, unit / 4, unit % 4);
        }
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < steps) load_w(s);
    wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_x((half*)stage(s), s);
        copies_begun();
    }
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (steps > 0) unpack(0);
    for (int step = 0; step < steps; step++) {
        // The next step's values are there, this one's weights are unpacked, and all are done with
        // the step before, whose place is taken now.
        wait_for_copies<STAGES - 3>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            load_w(step + STAGES - 1);
            load_x((half*)stage(step + STAGES - 1), step + STAGES - 1);
        }
        copies_begun();
        if (step + 1 < steps) unpack(step + 1);
        sums.multiply((const half*)stage(step), w_stages + step % 2 * BM * STEP, wn, wm);
    }
#else
    half* const x_stages = (half*)memory;                // [2][BN][STEP]
    half* const w_stages = x_stages + 2 * BN * STEP;     // [2][BM][STEP]
    uint4 raw[PAIRS];
    half scale[PAIRS];
    auto load_w = [&](int step) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const unsigned char* from = pair_at(step, i);
            if (BITS == 8) {
                raw[i] = *(const uint4*)from;
            } else {
                uint2 v = *(const uint2*)from;
                raw[i].x = v.x, raw[i].y = v.y;
            }
            const int row = min(m0 + (i * THREADS + threadIdx.x) / 4, p.m - 1);
            scale[i] = p.scales[(size_t)((begin + step) / 2) * p.m + row];
        }
    };
    if (steps > 0) {
        load_w(0);
        load_x(x_stages, 0);
    }
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int unit = i * THREADS + threadIdx.x;
            unpack_pair<BITS>(raw[i], scale[i], w_stages + step % 2 * BM * STEP, unit / 4, unit % 4);
        }
        if (step + 1 < steps) load_w(step + 1);
        // This step's tiles are there; and all are done with the step before, whose places the
        // next one takes.
        __syncthreads();
        if (step + 1 < steps) load_x(x_stages + (step + 1) % 2 * BN * STEP, step + 1);
        sums.multiply(x_stages + step % 2 * BN * STEP, w_stages + step % 2 * BM * STEP, wn, wm);
    }
#endif
    sums.template write<OP>(p, n0 + wn, m0 + wm);
}

#define TILED(OP, NAME, BITS)                                                                    \
    KERNEL __launch_bounds__(128) tiled##BITS##_##NAME##_64(const __grid_constant__ TiledQ p) {  \
        tiled<OP, BITS, 64, 64, 32, 32>(p);                                                      \
    }                                                                                            \
    KERNEL __launch_bounds__(128) tiled##BITS##_##NAME##_128(const __grid_constant__ TiledQ p) { \
        tiled<OP, BITS, 128, 64, 64, 32>(p);                                                     \
    }
TILED(F16, f16, 8)
TILED(F32, f32, 8)
TILED(GATE_UP, gate_up, 8)
TILED(F16, f16, 4)
TILED(F32, f32, 4)
TILED(GATE_UP, gate_up, 4)
