// Work on single rows: embedding, norms, rope with KV write for prompt chunks.
#include "attention.cuh"

struct Embed {
    const Row* rows;
    const u32* previous;  // token that the step before sampled, by slot
    const half* table;    // [vocab, width]
    float* residual;      // [rows, width]
    const float* norm;    // [width]: of the first layer
    half* normed;         // [rows, width]
    int width, vocab;
    float epsilon;
};

// Embedding of each row's token, and its norm for the first layer.
KERNEL __launch_bounds__(256) embed(const __grid_constant__ Embed p) {
    __shared__ float scratch[32];
    const size_t at = (size_t)blockIdx.x * p.width;
    let_next_begin();
    wait_for_previous();
    u32 token = p.rows[blockIdx.x].token;
    if (token & PREVIOUS) token = p.previous[token & ~PREVIOUS];
    token = min(token, (u32)p.vocab - 1);
    const half* from = p.table + (size_t)token * p.width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
        float v = __half2float(from[i]);
        p.residual[at + i] = v;
        squares += v * v;
    }
    float scale = rsqrtf(sum_block(squares, scratch) / p.width + p.epsilon);
    for (int i = threadIdx.x; i < p.width; i += blockDim.x)
        p.normed[at + i] = finite_half(__half2float(from[i]) * scale * p.norm[i]);
}

struct Norm {
    float* residual;        // [rows, width]
    const float* partials;  // [parts, rows, width], added to the residual first
    int parts;
    size_t part_stride;
    // Rows to take, by block: those of the samples. Null: all of them.
    const Sample* samples;
    const float* norm;  // [width]
    half* normed;       // [blocks, width]
    int width;
    float epsilon;
};

// residual += sum of partials; normed = norm(residual).
KERNEL __launch_bounds__(256) norm_rows(const __grid_constant__ Norm p) {
    __shared__ float scratch[32];
    let_next_begin();
    wait_for_previous();
    const u32 row = p.samples ? p.samples[blockIdx.x].row : blockIdx.x;
    float4* residual = (float4*)(p.residual + (size_t)row * p.width);
    const float4* norm = (const float4*)p.norm;
    uint2* normed = (uint2*)(p.normed + (size_t)blockIdx.x * p.width);
    // What a thread works on stays in registers, up to a width of 8192.
    constexpr int MOST = 8;
    float4 v[MOST];
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        int i = j * blockDim.x + threadIdx.x;
        if (i < p.width / 4) {
            v[j] = residual[i];
            for (int s = 0; s < p.parts; s++) {
                float4 part = *(const float4*)(p.partials + s * p.part_stride + (size_t)row * p.width + i * 4);
                v[j].x += part.x, v[j].y += part.y, v[j].z += part.z, v[j].w += part.w;
            }
            squares += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
    }
    float scale = rsqrtf(sum_block(squares, scratch) / p.width + p.epsilon);
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        int i = j * blockDim.x + threadIdx.x;
        if (i < p.width / 4) {
            // Where only some rows are normed, two of them may be the same one: it's written by
            // the step's last kernel but one, whose residual nobody reads again.
            if (p.parts && !p.samples) residual[i] = v[j];
            float4 w = norm[i];
            half out[4] = {finite_half(v[j].x * scale * w.x), finite_half(v[j].y * scale * w.y),
                           finite_half(v[j].z * scale * w.z), finite_half(v[j].w * scale * w.w)};
            normed[i] = *(uint2*)out;
        }
    }
}

struct RopeRows {
    Qkv qkv;
    half* queries;  // [rows, heads * size]
    const Row* rows;
    // Rows before this one are decoded: attention takes care of them itself.
    int first;
    KvShape kv;
    half* cache;
};

// Rotates the queries of prompt chunks and writes their keys and values to the cache.
KERNEL __launch_bounds__(256) rope_rows(const __grid_constant__ RopeRows p) {
    let_next_begin();
    wait_for_previous();
    const int row = p.first + blockIdx.x;
    const Row place = p.rows[row];
    const int size = p.kv.size, pairs = size / 2;
    const int heads = p.kv.heads, kv_heads = p.kv.kv_heads;
    for (int i = threadIdx.x; i < (heads + 2 * kv_heads) * pairs; i += blockDim.x) {
        int head = i / pairs, d = i % pairs * 2;
        float2 v = p.qkv.pair(row, head * size + d);
        if (head < heads + kv_heads) v = p.qkv.rotate(v, place.position, d);
        if (head < heads) {
            *(u32*)(p.queries + ((size_t)row * heads + head) * size + d) = pack(v.x, v.y);
        } else if (head < heads + kv_heads) {
            put_key(p.cache + p.kv.at(place.block, head - heads), size, place.position % BLOCK, d, v);
        } else {
            put_value(p.cache + p.kv.at(place.block, head - heads - kv_heads), size,
                      place.position % BLOCK, d, v);
        }
    }
}
