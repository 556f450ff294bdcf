// What some architectures do to queries, keys and values before rope: a bias on all of them
// (Qwen2), a norm of each head of queries and keys (Qwen3).
#include "common.cuh"

struct Heads {
    half* qkv;  // [rows, width]
    int width;
    const float* bias;        // [width], or null
    const float* query_norm;  // [size], or null
    const float* key_norm;
    int heads, kv_heads, size;
    float epsilon;
};

// A block takes a row, a warp a head.
KERNEL __launch_bounds__(256) finish_heads(const __grid_constant__ Heads p) {
    let_next_begin();
    wait_for_previous();
    const int lane = threadIdx.x % 32, row = blockIdx.x;
    // Pairs of a lane, up to heads of 128.
    constexpr int MOST = 2;
    for (int head = threadIdx.x / 32; head < p.heads + 2 * p.kv_heads; head += blockDim.x / 32) {
        float2 v[MOST];
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const int d = (i * 32 + lane) * 2;
            if (d >= p.size) continue;
            v[i] = unpack(*(const u32*)(p.qkv + (size_t)row * p.width + head * p.size + d));
            if (p.bias) v[i].x += p.bias[head * p.size + d], v[i].y += p.bias[head * p.size + d + 1];
            squares += v[i].x * v[i].x + v[i].y * v[i].y;
        }
        const float* norm = head < p.heads ? p.query_norm : head < p.heads + p.kv_heads ? p.key_norm : nullptr;
        const float scale = norm ? rsqrtf(sum_lanes(squares) / p.size + p.epsilon) : 1.0f;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const int d = (i * 32 + lane) * 2;
            if (d >= p.size) continue;
            if (norm) v[i].x *= scale * norm[d], v[i].y *= scale * norm[d + 1];
            half out[2] = {finite_half(v[i].x), finite_half(v[i].y)};
            *(u32*)(p.qkv + (size_t)row * p.width + head * p.size + d) = *(u32*)out;
        }
    }
}
