// Attention of one row a sequence (decoding): rope, KV write and paged attention in one kernel.
//
// A block of threads takes one KV head of one sequence, or a part of its context; its warps take
// KV blocks in turn. The queries that share the head are the rows of the A operand; keys and values
// go from global memory into the fragments they are needed in, with no stop in shared memory.
#include "attention.cuh"

struct Decode {
    Qkv qkv;
    KvShape kv;
    half* cache;
    const Row* rows;
    const Sequence* sequences;
    const u32* tables;
    half* out;  // [rows, heads * size]
    // Of each part of a context: [sequence, KV head, part][group, size + 2].
    float* workspace;
    u32* tickets;  // [sequence, KV head], zeros
    // Tokens that are worth a part of their own.
    int part_tokens;
    float scale;
};

// Query heads that share a KV head, at most.
constexpr int GROUP = 8;

template <int SIZE, int WARPS> __device__ __forceinline__ void decode(const Decode& p) {
    constexpr int CHUNKS = SIZE / 32, PAIRS = SIZE / 16;
    __shared__ float maxima[WARPS][GROUP], totals[WARPS][GROUP];
    __shared__ float outs[WARPS][GROUP][SIZE + 4];
    __shared__ u32 ticket;
    let_next_begin();
    const int kv_head = blockIdx.x, parts_most = gridDim.z, part = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int group = p.kv.heads / p.kv.kv_heads;

    const Sequence sequence = p.sequences[blockIdx.y];
    const int length = sequence.start + 1;
    const int blocks = (length + BLOCK - 1) / BLOCK;
    const int wanted = max(1, min(parts_most, length / p.part_tokens));
    const int each = (blocks + wanted - 1) / wanted;
    const int parts = (blocks + each - 1) / each;
    const int begin = part * each, end = min(blocks, begin + each);
    if (sequence.rows == 0 || begin >= blocks) {
        wait_for_previous();
        return;
    }
    const int row = sequence.first_row;
    const u32* table = p.tables + sequence.table;

    // Ids of this warp's next 32 blocks, one a lane.
    u32 ids = 0;
    auto load_ids = [&](int i) {
        int block = begin + warp + (i + lane) * WARPS;
        ids = block < end ? table[block] : 0;
    };
    uint4 k[2][CHUNKS], v[PAIRS];
    auto load_keys = [&](u32 id) {
        const uint4* from = (const uint4*)(p.cache + p.kv.at(id, kv_head)) + lane;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) k[j][c] = from[(j * CHUNKS + c) * 32];
    };
    auto load_values = [&](u32 id) {
        const uint4* from = (const uint4*)(p.cache + p.kv.at(id, kv_head) + BLOCK * SIZE) + lane;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) v[i] = from[i * 32];
    };

    load_ids(0);
    const int newest = blocks - 1;
    int block = begin + warp;
    u32 id = __shfl_sync(FULL_WARP, ids, 0);
    // The newest block is written below; the others are from steps before.
    if (block < end && block != newest) load_keys(id);
    wait_for_previous();

    if (end == blocks && newest % WARPS == (begin + warp) % WARPS) {
        u32 written = p.rows[row].block;
        half* head = p.cache + p.kv.at(written, kv_head);
        int token = sequence.start % BLOCK;
        for (int d = lane * 2; d < SIZE; d += 64) {
            float2 key = p.qkv.pair(row, (p.kv.heads + kv_head) * SIZE + d);
            float2 value = p.qkv.pair(row, (p.kv.heads + p.kv.kv_heads + kv_head) * SIZE + d);
            put_key(head, SIZE, token, d, p.qkv.rotate(key, sequence.start, d));
            put_value(head, SIZE, token, d, value);
        }
        __syncwarp();
        if (block == newest) load_keys(id);
    }

    u32 q[CHUNKS][4];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[c][i] = 0;
            if (g < group) {
                int d = 32 * c + 8 * t + 2 * i;
                float2 pair = p.qkv.pair(row, (kv_head * group + g) * SIZE + d);
                pair = p.qkv.rotate(pair, sequence.start, d);
                q[c][i] = pack(pair.x, pair.y);
            }
        }

    const float scale = p.scale * 1.4426950408889634f;
    float max = -1e30f, total = 0.0f;
    float o[2 * PAIRS][2] = {};
    for (int i = 0; block < end; i++, block += WARPS) {
        load_values(id);
        float s[2][2] = {};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                mma_half(s[j][0], s[j][1], q[c][0], q[c][1], k[j][c].x, k[j][c].y);
                mma_half(s[j][0], s[j][1], q[c][2], q[c][3], k[j][c].z, k[j][c].w);
            }
        if (i % 32 == 31) load_ids(i + 1);
        id = __shfl_sync(FULL_WARP, ids, (i + 1) % 32);
        if (block + WARPS < end) load_keys(id);
        float highest = -1e30f;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float& score = s[e / 2][e % 2];
            score = block * BLOCK + 4 * t + e < length ? score * scale : -1e30f;
            highest = fmaxf(highest, score);
        }
        highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 2));
        if (__any_sync(FULL_WARP, highest > max)) {
            float higher = fmaxf(max, highest);
            float shrink = exp2f(max - higher);
            max = higher;
            total *= shrink;
#pragma unroll
            for (int d = 0; d < 2 * PAIRS; d++) o[d][0] *= shrink, o[d][1] *= shrink;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float& score = s[e / 2][e % 2];
            score = exp2f(score - max);
            total += score;
        }
        u32 a0 = pack(s[0][0], s[0][1]), a2 = pack(s[1][0], s[1][1]);
#pragma unroll
        for (int d = 0; d < PAIRS; d++) {
            mma_half(o[2 * d][0], o[2 * d][1], a0, a2, v[d].x, v[d].y);
            mma_half(o[2 * d + 1][0], o[2 * d + 1][1], a0, a2, v[d].z, v[d].w);
        }
    }

    total += __shfl_xor_sync(FULL_WARP, total, 1);
    total += __shfl_xor_sync(FULL_WARP, total, 2);
    if (t == 0) maxima[warp][g] = max, totals[warp][g] = total;
#pragma unroll
    for (int d = 0; d < 2 * PAIRS; d++) {
        outs[warp][g][8 * d + 2 * t] = o[d][0];
        outs[warp][g][8 * d + 2 * t + 1] = o[d][1];
    }
    __syncthreads();

    // The warps' results as one; of several parts as partial results.
    const size_t place = ((size_t)blockIdx.y * p.kv.kv_heads + kv_head) * parts_most;
    float* partial = p.workspace + (place + part) * group * (SIZE + 2);
    for (int i = threadIdx.x; i < group * SIZE; i += blockDim.x) {
        int head = i / SIZE, d = i % SIZE;
        float highest = -1e30f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w][head]);
        float sum = 0.0f, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float share = exp2f(maxima[w][head] - highest);
            sum += outs[w][head][d] * share;
            weight += totals[w][head] * share;
        }
        if (parts == 1) {
            p.out[((size_t)row * p.kv.heads + kv_head * group + head) * SIZE + d] = finite_half(sum / weight);
        } else {
            partial[head * (SIZE + 2) + d] = sum;
            if (d == 0) {
                partial[head * (SIZE + 2) + SIZE] = highest;
                partial[head * (SIZE + 2) + SIZE + 1] = weight;
            }
        }
    }
    if (parts == 1) return;

    // The last part to be done sums up.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = p.tickets + blockIdx.y * p.kv.kv_heads + kv_head;
        ticket = atomicAdd(counter, 1);
        if (ticket == parts - 1) *counter = 0;
    }
    __syncthreads();
    if (ticket != parts - 1) return;
    __threadfence();
    const volatile float* all = p.workspace + place * group * (SIZE + 2);
    const int stride = group * (SIZE + 2);
    for (int i = threadIdx.x; i < group * SIZE; i += blockDim.x) {
        int head = i / SIZE, d = i % SIZE;
        const volatile float* mine = all + head * (SIZE + 2);
        float highest = -1e30f;
        for (int s = 0; s < parts; s++) highest = fmaxf(highest, mine[s * stride + SIZE]);
        float sum = 0.0f, weight = 0.0f;
        for (int s = 0; s < parts; s++) {
            float share = exp2f(mine[s * stride + SIZE] - highest);
            sum += mine[s * stride + d] * share;
            weight += mine[s * stride + SIZE + 1] * share;
        }
        p.out[((size_t)row * p.kv.heads + kv_head * group + head) * SIZE + d] = finite_half(sum / weight);
    }
}

#define DECODE(SIZE, WARPS)                                                                      \
    KERNEL __launch_bounds__(32 * WARPS) decode_##SIZE##_w##WARPS(const __grid_constant__ Decode p) { \
        decode<SIZE, WARPS>(p);                                                                  \
    }
DECODE(64, 4)
DECODE(96, 4)
DECODE(128, 4)
DECODE(64, 8)
DECODE(96, 8)
DECODE(128, 8)
