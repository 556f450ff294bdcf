// Rows times a weight matrix in tiles through shared memory, on mma.sync: many rows, on any GPU.
//
// A block computes a tile of rows x outputs; both operands are row-major along k. Tiles of shared
// memory have rows of 64 values (128 bytes) whose 16-byte pieces are swapped by their row, so that
// eight neighbouring rows never meet in a bank.
#include "common.cuh"

struct Tiled {
    const half* w;    // [m, k]
    const half* x;    // [n, k]
    half* out;        // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;      // F32: [parts, n, m]
    int m, k, n;
    // Parts of k: gridDim.z of them, each this many steps of 64.
    int steps;
};

enum Op { F16, F32, GATE_UP };

constexpr int STEP = 64;

__device__ __forceinline__ int swizzled(int row, int piece) {
    return row * STEP + (piece ^ (row & 7)) * 8;
}

template <int OP, int BN, int BM, int WN, int WM, int STAGES>
__device__ __forceinline__ void tiled(const Tiled& p) {
    constexpr int WARPS_N = BN / WN, THREADS = 32 * WARPS_N * (BM / WM);
    constexpr int NT = WN / 16, MT = WM / 8;
    extern __shared__ __align__(128) half stages[];  // [STAGES][BN + BM][STEP]
    let_next_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
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

    float c[NT][MT][4] = {};
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
#pragma unroll
        for (int kk = 0; kk < STEP / 16; kk++) {
            u32 a[NT][4], b[MT][2];
#pragma unroll
            for (int i = 0; i < NT; i++)
                load_tiles(a[i], shared_address(x + swizzled(wn + i * 16 + lane % 16, kk * 2 + lane / 16)));
#pragma unroll
            for (int j = 0; j < MT; j += 2) {
                u32 r[4];
                load_tiles(r, shared_address(w + swizzled(wm + j * 8 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2)));
                b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
            }
#pragma unroll
            for (int i = 0; i < NT; i++)
#pragma unroll
                for (int j = 0; j < MT; j++) mma(c[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j][0], b[j][1]);
        }
#if __CUDA_ARCH__ < 800
        // Copies are done at once there, and the next ones go where this step is still read.
        __syncthreads();
#endif
    }

#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int n = n0 + wn + i * 16 + g + 8 * h;
            if (n >= p.n) continue;
#pragma unroll
            for (int j = 0; j < MT; j++) {
                int m = m0 + wm + j * 8 + 2 * t;
                float v0 = c[i][j][2 * h], v1 = c[i][j][2 * h + 1];
                if (OP == GATE_UP) {
                    // Of 16 outputs the first 8 are gates, the others their ups.
                    if (j % 2 == 0 && m < p.m) {
                        float u0 = c[i][j + 1][2 * h], u1 = c[i][j + 1][2 * h + 1];
                        half out[2] = {finite_half(silu(v0) * u0), finite_half(silu(v1) * u1)};
                        *(u32*)(p.out + (size_t)n * (p.m / 2) + (m0 + wm + j * 8) / 2 + 2 * t) = *(u32*)out;
                    }
                } else if (OP == F16) {
                    half out[2] = {finite_half(v0), finite_half(v1)};
                    if (m < p.m) *(u32*)(p.out + (size_t)n * p.m + m) = *(u32*)out;
                } else {
                    float* to = p.sums + ((size_t)blockIdx.z * p.n + n) * p.m + m;
                    if (m < p.m) to[0] = v0;
                    if (m + 1 < p.m) to[1] = v1;
                }
            }
        }
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
