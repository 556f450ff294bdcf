// What becomes of products whose outputs are a tile's rows: a lane has two outputs of a row of x, as
// tensor cores leave them.
#pragma once
#include "common.cuh"

enum Op { F16, F32, GATE_UP };

// Output `m`, the `g`-th of its eight, and that eight further on, of row `n` and part `part` of k.
template <int OP, class P>
__device__ __forceinline__ void write_pair(const P& p, int part, int n, int m, int g, float low, float high) {
    if (n >= p.n) return;
    if (OP == GATE_UP) {
        // Of 16 outputs the first 8 are gates, the others their ups.
        if (m < p.m) p.out[(size_t)n * (p.m / 2) + (m - g) / 2 + g] = finite_half(silu(low) * high);
    } else if (OP == F16) {
        half* to = p.out + (size_t)n * p.m;
        if (m < p.m) to[m] = finite_half(low);
        if (m + 8 < p.m) to[m + 8] = finite_half(high);
    } else {
        float* to = p.sums + ((size_t)part * p.n + n) * p.m;
        if (m < p.m) to[m] = low;
        if (m + 8 < p.m) to[m + 8] = high;
    }
}
