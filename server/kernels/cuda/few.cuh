// What both forms of a product of few rows take (few.rs).
#pragma once
#include "common.cuh"

struct Few {
    const half* x;  // [n, k]
    // Sums of squares of x before its norm's weight, [n, square_parts]: the norm's scale is applied
    // to the output. Null: x is used as it is.
    const float* squares;
    half* out;               // QKV: [n, m]; GATE_UP: [n, m / 2]
    float* residual;         // RESIDUAL: [n, m], added to
    const float* next_norm;  // RESIDUAL: weight [m] of the norm that comes next
    half* next;              // RESIDUAL: [n, m], residual times that weight
    float* next_squares;     // RESIDUAL: [n, tiles]
    float* logits;           // HEAD: [n, m]
    u64* best;               // HEAD: [n, tiles], the highest logit of each tile; null: not wanted
    int m, k, n;
    int square_parts;
    float epsilon;
};

enum Op { QKV, RESIDUAL, GATE_UP, HEAD };
