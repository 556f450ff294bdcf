// What skinny.cu and skinny_q.cu share: all but how weights are read.
#pragma once
#include "few.cuh"

// The scale of each row's norm, from its sums of squares; 1 where there are none.
template <int WARPS, int COLUMNS>
__device__ __forceinline__ void norm_scales(const Few& f, float (&scales)[COLUMNS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int n = warp; n < COLUMNS; n += WARPS) {
        float scale = 1.0f;
        if (f.squares && n < f.n) {
            float sum = 0.0f;
            for (int i = lane; i < f.square_parts; i += 32) sum += f.squares[n * f.square_parts + i];
            scale = rsqrtf(sum_lanes(sum) / f.k + f.epsilon);
        }
        if (lane == 0) scales[n] = scale;
    }
}

// The end of a tile of outputs: sums of its warps, and what becomes of them.
template <int OP, int WARPS, int MT, int NT> struct TileEnd {
    static constexpr int ROWS = 16 * MT, COLUMNS = 8 * NT, THREADS = 32 * WARPS;
    static constexpr int PITCH = ROWS + 4;
    static constexpr int OUTS = (ROWS * COLUMNS + THREADS - 1) / THREADS;
    typedef float Sums[WARPS][COLUMNS][PITCH];

    float residual[OUTS];

    // What the end needs of the residual, asked for before the tile is computed.
    __device__ __forceinline__ void ask(const Few& f, int first) {
        if (OP != RESIDUAL) return;
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            int index = o * THREADS + threadIdx.x;
            int row = first + index % ROWS, n = index / ROWS;
            residual[o] = row < f.m && n < f.n && n < COLUMNS ? f.residual[(size_t)n * f.m + row] : 0.0f;
        }
    }

    // `c`: the warp's part of the tile, as mma.m16n8k16 leaves it.
    __device__ __forceinline__ void finish(const Few& f, int tile, int tiles, const float (&c)[MT][NT][4], Sums& sums,
                                           const float (&scales)[COLUMNS]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int g = lane / 4, t = lane % 4;
        const int first = tile * ROWS;
        // The tile before has been summed up.
        if (tile != blockIdx.x) __syncthreads();
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sums[warp][8 * j + 2 * t + e % 2][16 * i + g + 8 * (e / 2)] = c[i][j][e];
        __syncthreads();
        auto total = [&](int row, int n) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += sums[i][n][row];
            return sum;
        };

        if (OP == GATE_UP) {
            // Of 16 rows the first 8 are gates, the others the ups of the same outputs.
            for (int index = threadIdx.x; index < ROWS / 2 * COLUMNS; index += THREADS) {
                int out = index % (ROWS / 2), n = index / (ROWS / 2);
                int row = out / 8 * 16 + out % 8;
                if (n < f.n && first + row < f.m) {
                    float gate = total(row, n) * scales[n], up = total(row + 8, n) * scales[n];
                    f.out[(size_t)n * (f.m / 2) + first / 2 + out] = finite_half(silu(gate) * up);
                }
            }
            return;
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            int index = o * THREADS + threadIdx.x;
            int row = index % ROWS, n = index / ROWS;
            // Where this row stands in its tile, which may have been moved up.
            int base = first + row / 16 * 16;
            int place = row + base - min(base, f.m - 16);
            bool there = n < f.n && n < COLUMNS && first + row < f.m;
            float v = there ? total(place, n) : 0.0f;
            size_t at = (size_t)n * f.m + first + row;
            if (OP == QKV && there) f.out[at] = finite_half(v * scales[n]);
            if (OP == HEAD && there) f.logits[at] = v * scales[n];
            if (OP == RESIDUAL) {
                v = there ? v + residual[o] : 0.0f;
                if (there) {
                    f.residual[at] = v;
                    f.next[at] = finite_half(v * f.next_norm[first + row]);
                }
                float square = sum_lanes<ROWS>(v * v);
                if (there && row == 0) f.next_squares[n * tiles + tile] = square;
            }
        }
    }
};
