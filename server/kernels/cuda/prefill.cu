// Attention of prompt chunks: 128 rows (tokens times the query heads that share a KV head) a block
// of threads, 16 a warp; keys and values pass through shared memory, 64 tokens at a time, two deep.
#include "attention.cuh"

struct Prefill {
    const half* queries;  // [rows, heads * size], rotated
    KvShape kv;
    const half* cache;
    const Sequence* sequences;
    const Tile* tiles;
    const u32* tables;
    half* out;  // [rows, heads * size]
    float scale;
};

constexpr int WARPS = 8;
constexpr int TILE_ROWS = 16 * WARPS;
// KV blocks at a time.
constexpr int STEP = 4;

template <int SIZE> __device__ __forceinline__ void prefill(const Prefill& p) {
    constexpr int CHUNKS = SIZE / 32, PAIRS = SIZE / 16;
    constexpr int BLOCK_VALUES = 2 * BLOCK * SIZE;
    extern __shared__ __align__(16) half staged[];  // [2][STEP][BLOCK_VALUES]
    const int kv_head = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int group = p.kv.heads / p.kv.kv_heads;
    let_next_begin();
    wait_for_previous();
    // The longest contexts first.
    const Tile tile = p.tiles[gridDim.y - 1 - blockIdx.y];
    const Sequence sequence = p.sequences[tile.sequence];
    const int tokens = min(TILE_ROWS / group, (int)(sequence.rows - tile.first));
    const int last = sequence.start + tile.first + tokens - 1;
    const int blocks = last / BLOCK + 1;
    const u32* table = p.tables + sequence.table;

    // The two rows of this lane.
    int position[2];
    size_t at[2];
    bool there[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = warp * 16 + g + 8 * h;
        int token = row / group;
        there[h] = token < tokens;
        token = min(token, tokens - 1);
        position[h] = sequence.start + tile.first + token;
        at[h] = ((size_t)(sequence.first_row + tile.first + token) * p.kv.heads + kv_head * group + row % group) * SIZE;
    }
    u32 q[CHUNKS][2][4];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            uint4 v = *(const uint4*)(p.queries + at[h] + 32 * c + 8 * t);
            q[c][h][0] = v.x, q[c][h][1] = v.y, q[c][h][2] = v.z, q[c][h][3] = v.w;
        }
    // Positions of a warp's rows grow with them.
    const int warp_last = sequence.start + tile.first + min((warp * 16 + 15) / group, tokens - 1);
    const bool warp_there = warp * 16 / group < tokens;

    auto stage = [&](int step) {
        half* to = staged + step % 2 * STEP * BLOCK_VALUES;
#pragma unroll
        for (int b = 0; b < STEP; b++) {
            int block = step * STEP + b;
            bool valid = block < blocks;
            const half* from = p.cache + p.kv.at(valid ? table[block] : 0, kv_head);
            for (int i = threadIdx.x; i < BLOCK_VALUES / 8; i += 32 * WARPS)
                copy16(to + b * BLOCK_VALUES + i * 8, from + i * 8, valid);
        }
        copies_begun();
    };

    const float scale = p.scale * 1.4426950408889634f;
    float max[2] = {-1e30f, -1e30f}, total[2] = {};
    float o[2 * PAIRS][4] = {};
    const int steps = (blocks + STEP - 1) / STEP;
    stage(0);
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) stage(step + 1);
        else copies_begun();
        wait_for_copies<1>();
        __syncthreads();
        if (warp_there && step * STEP * BLOCK <= warp_last) {
            const uint4* blocks_here = (const uint4*)(staged + step % 2 * STEP * BLOCK_VALUES) + lane;
            float s[STEP][2][4];
#pragma unroll
            for (int b = 0; b < STEP; b++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) s[b][j][e] = 0.0f;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        uint4 k = blocks_here[b * BLOCK_VALUES / 8 + (j * CHUNKS + c) * 32];
                        mma(s[b][j], q[c][0][0], q[c][1][0], q[c][0][1], q[c][1][1], k.x, k.y);
                        mma(s[b][j], q[c][0][2], q[c][1][2], q[c][0][3], q[c][1][3], k.z, k.w);
                    }
                }
            // Only steps that reach past the first row's position need a mask.
            const bool masked = (step + 1) * STEP * BLOCK > sequence.start + (int)tile.first;
            float highest[2] = {-1e30f, -1e30f};
#pragma unroll
            for (int b = 0; b < STEP; b++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int h = e / 2;
                        int token = (step * STEP + b) * BLOCK + 4 * t + 2 * j + e % 2;
                        s[b][j][e] = masked && token > position[h] ? -1e30f : s[b][j][e] * scale;
                        highest[h] = fmaxf(highest[h], s[b][j][e]);
                    }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(FULL_WARP, highest[h], 1));
                highest[h] = fmaxf(highest[h], __shfl_xor_sync(FULL_WARP, highest[h], 2));
            }
            if (__any_sync(FULL_WARP, highest[0] > max[0] || highest[1] > max[1])) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float higher = fmaxf(max[h], highest[h]);
                    float shrink = exp2f(max[h] - higher);
                    max[h] = higher;
                    total[h] *= shrink;
#pragma unroll
                    for (int d = 0; d < 2 * PAIRS; d++) o[d][2 * h] *= shrink, o[d][2 * h + 1] *= shrink;
                }
            }
#pragma unroll
            for (int b = 0; b < STEP; b++) {
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        s[b][j][e] = exp2f(s[b][j][e] - max[e / 2]);
                        total[e / 2] += s[b][j][e];
                    }
                u32 a0 = pack(s[b][0][0], s[b][0][1]), a1 = pack(s[b][0][2], s[b][0][3]);
                u32 a2 = pack(s[b][1][0], s[b][1][1]), a3 = pack(s[b][1][2], s[b][1][3]);
                const uint4* values = blocks_here + b * BLOCK_VALUES / 8 + BLOCK * SIZE / 8;
#pragma unroll
                for (int d = 0; d < PAIRS; d++) {
                    uint4 v = values[d * 32];
                    mma(o[2 * d], a0, a1, a2, a3, v.x, v.y);
                    mma(o[2 * d + 1], a0, a1, a2, a3, v.z, v.w);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 1);
        total[h] += __shfl_xor_sync(FULL_WARP, total[h], 2);
        if (!there[h]) continue;
        float share = 1.0f / total[h];
#pragma unroll
        for (int d = 0; d < 2 * PAIRS; d++) {
            half out[2] = {finite_half(o[d][2 * h] * share), finite_half(o[d][2 * h + 1] * share)};
            *(u32*)(p.out + at[h] + 8 * d + 2 * t) = *(u32*)out;
        }
    }
}

KERNEL __launch_bounds__(32 * WARPS) prefill_64(const __grid_constant__ Prefill p) { prefill<64>(p); }
KERNEL __launch_bounds__(32 * WARPS) prefill_96(const __grid_constant__ Prefill p) { prefill<96>(p); }
KERNEL __launch_bounds__(32 * WARPS) prefill_128(const __grid_constant__ Prefill p) { prefill<128>(p); }
