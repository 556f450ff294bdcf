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

// residual += sum of partials; normed = norm(residual). A thread has four neighbours, or twice four.
KERNEL __launch_bounds__(1024) norm_rows(const __grid_constant__ Norm p) {
    __shared__ float scratch[32];
    let_next_begin();
    constexpr int MOST = 2;
    float4 v[MOST], w[MOST];
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        int i = j * blockDim.x + threadIdx.x;
        if (i < p.width / 4) w[j] = ((const float4*)p.norm)[i];
    }
    wait_for_previous();
    const u32 row = p.samples ? p.samples[blockIdx.x].row : blockIdx.x;
    float4* residual = (float4*)(p.residual + (size_t)row * p.width);
    uint2* normed = (uint2*)(p.normed + (size_t)blockIdx.x * p.width);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        int i = j * blockDim.x + threadIdx.x;
        if (i < p.width / 4) {
            v[j] = residual[i];
            const float* partials = p.partials + (size_t)row * p.width + i * 4;
            // Eight at a time, all under way together.
#pragma unroll 1
            for (int s = 0; s < p.parts; s += 8) {
                float4 part[8];
#pragma unroll
                for (int c = 0; c < 8; c++)
                    part[c] = s + c < p.parts ? *(const float4*)(partials + (s + c) * p.part_stride)
                                              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                for (int c = 0; c < 8; c++)
                    v[j].x += part[c].x, v[j].y += part[c].y, v[j].z += part[c].z, v[j].w += part[c].w;
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
            normed[i] = make_uint2(pack_finite(v[j].x * scale * w[j].x, v[j].y * scale * w[j].y),
                                   pack_finite(v[j].z * scale * w[j].z, v[j].w * scale * w[j].w));
        }
    }
}

struct Sum {
    const float* partials;  // [parts, count]
    half* out;              // [count]
    int parts, count;
};

// The sum of a product's parts, in f16.
KERNEL __launch_bounds__(256) sum_parts(const __grid_constant__ Sum p) {
    let_next_begin();
    wait_for_previous();
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= p.count) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    // Four at a time, all under way together.
#pragma unroll 1
    for (int s = 0; s < p.parts; s += 4) {
        float4 part[4];
#pragma unroll
        for (int c = 0; c < 4; c++)
            part[c] = s + c < p.parts ? *(const float4*)(p.partials + (size_t)(s + c) * p.count + i)
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int c = 0; c < 4; c++) sum.x += part[c].x, sum.y += part[c].y, sum.z += part[c].z, sum.w += part[c].w;
    }
    *(uint2*)(p.out + i) = make_uint2(pack_finite(sum.x, sum.y), pack_finite(sum.z, sum.w));
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
        float2 v = unpack(*(const u32*)p.qkv.at(row, head * size + d));
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
