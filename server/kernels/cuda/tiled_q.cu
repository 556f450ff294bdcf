// Many rows times a weight matrix of 8 or 4 bits in tiles, on mma.sync.
//
// Weights are the A operand and never go through shared memory: a warp has 32 outputs of its own, and
// unpacks what its lanes have loaded of them, asked for one step ahead. Rows are B, out of shared
// memory, a step before they are needed. A lane takes eight of a row's values at once (k is permuted
// as in skinny.cu): rows' 16-byte pieces are swapped so that those of two neighbours never meet in a
// bank.
#include "columns.cuh"
#include "quantised.cuh"

struct TiledQ {
    const unsigned char* w;  // [m, k], packed
    const half* x;           // [n, k]
    half* out;               // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;             // F32: [parts, n, m]
    int m, k, n;
    // Parts of k: gridDim.z of them, each this many steps of 128.
    int steps;
};

constexpr int ROWS = 64, WARPS = 4, THREADS = 32 * WARPS;
// Values along k of a step.
constexpr int ALONG = 128;

// Where a row's 16-byte piece stands, in values.
__device__ __forceinline__ int place_of(int row, int piece) { return row * ALONG + (piece ^ (row & 1) * 4) * 8; }

template <int OP, class F> __device__ __forceinline__ void tiled(const TiledQ& p) {
    // Units of a step, and eights and rows of a warp.
    constexpr int UNITS = ALONG / F::UNIT, EIGHTS = 4, NT = ROWS / 8;
    extern __shared__ __align__(128) half stages[];  // [2][ROWS][ALONG]
    let_next_begin();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.y * ROWS, m0 = (blockIdx.x * WARPS + threadIdx.x / 32) * 8 * EIGHTS;
    const int begin = blockIdx.z * p.steps;
    const int steps = min(p.steps, (p.k + ALONG - 1) / ALONG - begin);

    auto load_x = [&](int step) {
        half* to = stages + step % 2 * ROWS * ALONG;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * 16; i += THREADS) {
            const int row = i / 16, k = (begin + step) * ALONG + i % 16 * 8;
            const bool valid = n0 + row < p.n && k < p.k;
            copy16(to + place_of(row, i % 16), valid ? p.x + (size_t)(n0 + row) * p.k + k : p.x, valid);
        }
        copies_begun();
    };
    // Beyond the last unit and the last output the same ones again: they meet zeros, or aren't written.
    auto load_w = [&](Packed<F> (&to)[UNITS][EIGHTS], int step) {
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                const int unit = min((begin + step) * UNITS + u, p.k / F::UNIT - 1);
                to[u][e].read(p.w + unit_at<F>(unit, min(m0 / 8 + e, p.m / 8 - 1), p.m), lane);
            }
    };

    Packed<F> w[UNITS][EIGHTS], next[UNITS][EIGHTS];
    float c[EIGHTS / 2][NT][4] = {};
    if (steps > 0) load_w(next, 0);
    wait_for_previous();
    if (steps > 0) load_x(0);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) w[u][e] = next[u][e];
        if (step + 1 < steps) load_w(next, step + 1);
        // This step's rows are there; and all are done with the step before, whose place is taken now.
        wait_for_copies<0>();
        __syncthreads();
        if (step + 1 < steps) load_x(step + 1);
        const half* x = stages + step % 2 * ROWS * ALONG;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int j = 0; j < F::PIECES; j++) {
                u32 a[EIGHTS][4];
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) w[u][e].template unpack<RUNS>(j, t, a[e]);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint4 b = *(const uint4*)(x + place_of(8 * n + g, (u * F::PIECES + j) * 4 + t));
#pragma unroll
                    for (int i = 0; i < EIGHTS / 2; i++) {
                        const u32(&low)[4] = a[2 * i], (&high)[4] = a[2 * i + 1];
                        mma(c[i][n], low[0], high[0], low[1], high[1], b.x, b.y);
                        mma(c[i][n], low[2], high[2], low[3], high[3], b.z, b.w);
                    }
                }
            }
    }
#pragma unroll
    for (int i = 0; i < EIGHTS / 2; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                write_pair<OP>(p, blockIdx.z, n0 + 8 * n + 2 * t + e, m0 + 16 * i + g, g, c[i][n][e], c[i][n][2 + e]);
}

#define TILED(OP, NAME, FORMAT, BITS)                                                          \
    KERNEL __launch_bounds__(THREADS) tiled##BITS##_##NAME(const __grid_constant__ TiledQ p) { \
        tiled<OP, FORMAT>(p);                                                                  \
    }
#define OPERATIONS(FORMAT, BITS) \
    TILED(F16, f16, FORMAT, BITS) TILED(F32, f32, FORMAT, BITS) TILED(GATE_UP, gate_up, FORMAT, BITS)
FORMATS(OPERATIONS)
