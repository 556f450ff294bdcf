// What products in tiles on mma.sync share: where values stand in shared memory, the multiplication
// of a step, and what becomes of the sums.
#pragma once
#include "common.cuh"

enum Op { F16, F32, GATE_UP };

// Values along k that are multiplied between two barriers.
constexpr int STEP = 64;

// Rows of 128 bytes whose 16-byte pieces are swapped by their row, so that eight neighbouring rows
// never meet in a bank.
__device__ __forceinline__ int swizzled(int row, int piece) {
    return row * STEP + (piece ^ (row & 7)) * 8;
}

// A warp's part of a tile: NT x 16 rows and MT x 8 outputs.
template <int NT, int MT> struct Sums {
    float c[NT][MT][4];

    // Adds a step's products; `x` and `w` are its tiles, `wn` and `wm` the warp's place in them.
    __device__ __forceinline__ void multiply(const half* x, const half* w, int wn, int wm) {
        const int lane = threadIdx.x % 32;
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
    }

    // Writes what is inside the matrix; the warp's part begins at row `n0` and output `m0`.
    template <int OP, class P> __device__ __forceinline__ void write(const P& p, int n0, int m0) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int n = n0 + i * 16 + g + 8 * h;
                if (n >= p.n) continue;
#pragma unroll
                for (int j = 0; j < MT; j++) {
                    int m = m0 + j * 8 + 2 * t;
                    float v0 = c[i][j][2 * h], v1 = c[i][j][2 * h + 1];
                    if (OP == GATE_UP) {
                        // Of 16 outputs the first 8 are gates, the others their ups.
                        if (j % 2 == 0 && m < p.m) {
                            float u0 = c[i][j + 1][2 * h], u1 = c[i][j + 1][2 * h + 1];
                            half out[2] = {finite_half(silu(v0) * u0), finite_half(silu(v1) * u1)};
                            *(u32*)(p.out + (size_t)n * (p.m / 2) + (m0 + j * 8) / 2 + 2 * t) = *(u32*)out;
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
};
