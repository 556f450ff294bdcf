// Rows times a weight matrix of 8 or 4 bits in tiles, on mma.sync: many rows.
//
// As tiled.cu, but that weights pass through registers on their way to shared memory, where they are
// f16: unpacked, times their scale. The next step's are on their way meanwhile.
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

#if __CUDA_ARCH__ >= 800
constexpr int X_STAGES = 3;
#else
constexpr int X_STAGES = 2;
#endif
constexpr int W_STAGES = 2;

template <int OP, int BITS, int BN, int BM, int WN, int WM>
__device__ __forceinline__ void tiled(const TiledQ& p) {
    constexpr int WARPS_N = BN / WN, THREADS = 32 * WARPS_N * (BM / WM);
    constexpr int NT = WN / 16, MT = WM / 8;
    // Pairs of pieces of a step's weights that a thread unpacks.
    constexpr int PAIRS = BM * 4 / THREADS;
    extern __shared__ __align__(128) half memory[];
    half* const x_stages = memory;                           // [X_STAGES][BN][STEP]
    half* const w_stages = memory + X_STAGES * BN * STEP;    // [W_STAGES][BM][STEP]
    let_next_begin();
    const int warp = threadIdx.x / 32;
    const int n0 = blockIdx.y * BN, m0 = blockIdx.x * BM;
    const int wn = warp % WARPS_N * WN, wm = warp / WARPS_N * WM;
    const int begin = blockIdx.z * p.steps;
    const int steps = min(p.steps, p.k / STEP - begin);
    const size_t row_bytes = (size_t)p.k * BITS / 8;

    auto load_x = [&](int step) {
        half* to = x_stages + step % X_STAGES * BN * STEP;
#pragma unroll
        for (int i = threadIdx.x; i < BN * 8; i += THREADS) {
            int row = i / 8, k = (begin + step) * STEP + i % 8 * 8;
            bool valid = n0 + row < p.n;
            copy16(to + swizzled(row, i % 8), valid ? p.x + (size_t)(n0 + row) * p.k + k : p.x, valid);
        }
    };
    // Of a group, a step takes pieces t + 4 j with j = 2 h and 2 h + 1, where h is its half.
    uint4 raw[PAIRS];
    half scale[PAIRS];
    auto load_w = [&](int step) {
        const int group = (begin + step) / 2, h = (begin + step) % 2;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int unit = i * THREADS + threadIdx.x, row = min(m0 + unit / 4, p.m - 1), t = unit % 4;
            const unsigned char* from = p.w + row * row_bytes + group * GROUP_BYTES<BITS> + piece_at<BITS>(t, 2 * h);
            if (BITS == 8) {
                raw[i] = *(const uint4*)from;
            } else {
                uint2 v = *(const uint2*)from;
                raw[i].x = v.x, raw[i].z = v.y;
            }
            scale[i] = p.scales[(size_t)group * p.m + row];
        }
    };
    auto store_w = [&](int step) {
        half* to = w_stages + step % W_STAGES * BM * STEP;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int unit = i * THREADS + threadIdx.x, row = unit / 4, t = unit % 4;
            const __half2 by = __half2half2(scale[i]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 h[4];
                unpack_piece<BITS>(j ? raw[i].z : raw[i].x, j ? raw[i].w : raw[i].y, h);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    __half2 v = __hmul2(*(__half2*)&h[e], by);
                    h[e] = *(u32*)&v;
                }
                *(uint4*)(to + swizzled(row, t + 4 * j)) = make_uint4(h[0], h[1], h[2], h[3]);
            }
        }
    };

    if (steps > 0) load_w(0);
    wait_for_previous();
#pragma unroll
    for (int s = 0; s < X_STAGES - 1; s++) {
        if (s < steps) load_x(s);
        copies_begun();
    }
    Sums<NT, MT> sums = {};
    for (int step = 0; step < steps; step++) {
        store_w(step);
        if (step + 1 < steps) load_w(step + 1);
        wait_for_copies<X_STAGES - 2>();
        // This step's tiles are there; and all are done with the step before, whose places the
        // next ones take.
        __syncthreads();
        if (step + X_STAGES - 1 < steps) load_x(step + X_STAGES - 1);
        copies_begun();
        sums.multiply(x_stages + step % X_STAGES * BN * STEP, w_stages + step % W_STAGES * BM * STEP, wn, wm);
    }
    sums.template write<OP>(p, n0 + wn, m0 + wm);
}

#define TILED(OP, NAME, BITS)                                                                   \
    KERNEL __launch_bounds__(128) tiled##BITS##_##NAME##_64(const __grid_constant__ TiledQ p) { \
        tiled<OP, BITS, 64, 64, 32, 32>(p);                                                     \
    }                                                                                           \
    KERNEL __launch_bounds__(256) tiled##BITS##_##NAME##_128(const __grid_constant__ TiledQ p) { \
        tiled<OP, BITS, 128, 128, 64, 32>(p);                                                   \
    }
TILED(F16, f16, 8)
TILED(F32, f32, 8)
TILED(GATE_UP, gate_up, 8)
TILED(F16, f16, 4)
TILED(F32, f32, 4)
TILED(GATE_UP, gate_up, 4)
