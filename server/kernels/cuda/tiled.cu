// Rows times a weight matrix in tiles through shared memory, on mma.sync: many rows, on any GPU.
//
// A block computes a tile of rows x outputs; both operands are row-major along k.
#include "tiled.cuh"

struct Tiled {
    const half* w;    // [m, k]
    const half* x;    // [n, k]
    half* out;        // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;      // F32: [parts, n, m]
    int m, k, n;
    // Parts of k: gridDim.z of them, each this many steps of 64.
    int steps;
};

template <int OP, int BN, int BM, int WN, int WM, int STAGES>
__device__ __forceinline__ void tiled(const Tiled& p) {
    constexpr int WARPS_N = BN / WN, THREADS = 32 * WARPS_N * (BM / WM);
    constexpr int NT = WN / 16, MT = WM / 8;
    extern __shared__ __align__(128) half stages[];  // [STAGES][BN + BM][STEP]
    let_next_begin();
    const int warp = threadIdx.x / 32;
    const int n0 = blockIdx.y * BN, m0 = blockIdx.x * BM;
    const int wn = warp % WARPS_N * WN, wm = warp / WARPS_N * WM;
    const int begin = blockIdx.z * p.steps;
    const int steps = min(p.steps, (p.k + STEP - 1) / STEP - begin);

    auto load_w = [&](int stage, int step) {
        half* to = stages + stage * (BN + BM) * STEP + BN * STEP;
#pragma unroll
        for (int i = threadIdx.x; i < BM * 8; i += THREADS) {
            int row = i / 8, k = (begin + step) * STEP + i % 8 * 8;
            bool valid = m0 + row < p.m && k < p.k;
            copy16(to + swizzled(row, i % 8), valid ? p.w + (size_t)(m0 + row) * p.k + k : p.w, valid);
        }
    };
    auto load_x = [&](int stage, int step) {
        half* to = stages + stage * (BN + BM) * STEP;
#pragma unroll
        for (int i = threadIdx.x; i < BN * 8; i += THREADS) {
            int row = i / 8, k = (begin + step) * STEP + i % 8 * 8;
            bool valid = n0 + row < p.n && k < p.k;
            copy16(to + swizzled(row, i % 8), valid ? p.x + (size_t)(n0 + row) * p.k + k : p.x, valid);
        }
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (s < steps) load_w(s, s);
    wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_x(s, s);
        copies_begun();
    }

    Sums<NT, MT> sums = {};
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            load_w((step + STAGES - 1) % STAGES, step + STAGES - 1);
            load_x((step + STAGES - 1) % STAGES, step + STAGES - 1);
        }
        copies_begun();
        const half* x = stages + step % STAGES * (BN + BM) * STEP;
        const half* w = x + BN * STEP;
        sums.multiply(x, w, wn, wm);
#if __CUDA_ARCH__ < 800
        // Copies are done at once there, and the next ones go where this step is still read.
        __syncthreads();
#endif
    }

    sums.template write<OP>(p, n0 + wn, m0 + wm);
}

#if __CUDA_ARCH__ >= 800
constexpr int DEEP = 4, WIDE_DEEP = 3;
#else
constexpr int DEEP = 2, WIDE_DEEP = 2;
#endif
#define TILED(OP, NAME)                                                              \
    KERNEL __launch_bounds__(128) tiled_##NAME##_64(const __grid_constant__ Tiled p) { \
        tiled<OP, 64, 64, 32, 32, DEEP>(p);                                          \
    }                                                                                \
    KERNEL __launch_bounds__(256) tiled_##NAME##_128(const __grid_constant__ Tiled p) { \
        tiled<OP, 128, 128, 64, 32, WIDE_DEEP>(p);                                   \
    }
TILED(F16, f16)
TILED(F32, f32)
TILED(GATE_UP, gate_up)
