// Random weights, for benches.
#include "common.cuh"

struct Fill {
    half* to;
    u64 count;
    u64 seed;
    float size;
};

KERNEL fill(const __grid_constant__ Fill p) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < p.count; i += (u64)gridDim.x * blockDim.x) {
        u64 z = (i + p.seed) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        float v = (float)(u32)(z >> 40) * (2.0f / 16777216.0f) - 1.0f;
        p.to[i] = __float2half_rn(v * p.size);
    }
}
