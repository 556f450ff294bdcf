// Attention of prompt chunks: 128 rows (tokens times the query heads that share a KV head) a block
// of threads. Keys and values pass through shared memory some blocks at a time, two deep; queries wait
// there. Where there are many blocks of threads a warp has 32 rows, so that what it reads from shared
// memory is used twice; else 16, for twice the warps.
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

constexpr int TILE_ROWS = 128;
// KV blocks at a time: what two of them and the queries leave room for.
#if __CUDA_ARCH__ >= 800
constexpr int STEP = 4;
#else
constexpr int STEP = 2;
#endif

// MT: times 16 rows a warp.
template <int SIZE, int MT> __device__ __forceinline__ void prefill(const Prefill& p) {
    constexpr int ROWS = 16 * MT, LANE_ROWS = 2 * MT, WARPS = TILE_ROWS / ROWS;
    constexpr int CHUNKS = SIZE / 32, PAIRS = SIZE / 16;
    constexpr int BLOCK_VALUES = 2 * BLOCK * SIZE;
    extern __shared__ __align__(16) half staged[];  // [2][STEP][BLOCK_VALUES], then queries
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

    // The rows of this lane: g, 8 + g, .. of its warp's.
    auto token_of = [&](int r) { return (warp * ROWS + g + 8 * r) / group; };
    auto at = [&](int r) {
        const int token = min(token_of(r), tokens - 1), head = (warp * ROWS + g + 8 * r) % group;
        return ((size_t)(sequence.first_row + tile.first + token) * p.kv.heads + kv_head * group + head) * SIZE;
    };
    int position[LANE_ROWS];
    // A lane's part of the queries, as operands of mma: [16 rows][chunk][half of its dimensions].
    uint4* queries = (uint4*)(staged + 2 * STEP * BLOCK_VALUES) + warp * MT * CHUNKS * 2 * 32 + lane;
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) position[r] = sequence.start + tile.first + min(token_of(r), tokens - 1);
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const half *low = p.queries + at(2 * m) + 8 * t, *high = p.queries + at(2 * m + 1) + 8 * t;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const uint4 a = *(const uint4*)(low + 32 * c), b = *(const uint4*)(high + 32 * c);
            queries[((m * CHUNKS + c) * 2) * 32] = make_uint4(a.x, b.x, a.y, b.y);
            queries[((m * CHUNKS + c) * 2 + 1) * 32] = make_uint4(a.z, b.z, a.w, b.w);
        }
    }
    // Positions of a warp's rows grow with them.
    const int warp_last = sequence.start + tile.first + min((warp * ROWS + ROWS - 1) / group, tokens - 1);
    const bool warp_there = warp * ROWS / group < tokens;

    // Ids of the blocks that are copied next.
    u32 ids[STEP];
    auto load_ids = [&](int step) {
#pragma unroll
        for (int b = 0; b < STEP; b++) {
            const int block = step * STEP + b;
            ids[b] = block < blocks ? table[block] : NOWHERE;
        }
    };
    auto stage = [&](int step) {
        half* to = staged + step % 2 * STEP * BLOCK_VALUES;
#pragma unroll
        for (int b = 0; b < STEP; b++) {
            const bool valid = ids[b] != NOWHERE;
            const half* from = p.cache + p.kv.at(valid ? ids[b] : 0, kv_head);
            constexpr int PIECES = BLOCK_VALUES / 8, THREADS = 32 * WARPS;
#pragma unroll
            for (int i = 0; i < (PIECES + THREADS - 1) / THREADS; i++) {
                const int piece = i * THREADS + threadIdx.x;
                if (PIECES % THREADS == 0 || piece < PIECES)
                    copy16(to + b * BLOCK_VALUES + piece * 8, from + piece * 8, valid);
            }
        }
        copies_begun();
        load_ids(step + 1);
    };

    const float scale = p.scale * 1.4426950408889634f;
    float max[LANE_ROWS], total[LANE_ROWS] = {};
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) max[r] = -1e30f;
    float o[MT][2 * PAIRS][4] = {};
    const int steps = (blocks + STEP - 1) / STEP;
    load_ids(0);
    stage(0);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) stage(step + 1);
        else copies_begun();
        wait_for_copies<1>();
        __syncthreads();
        if (warp_there && step * STEP * BLOCK <= warp_last) {
            const uint4* blocks_here = (const uint4*)(staged + step % 2 * STEP * BLOCK_VALUES) + lane;
            float s[MT][STEP][2][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                uint4 q[MT][2];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) q[m][h] = queries[((m * CHUNKS + c) * 2 + h) * 32];
#pragma unroll
                for (int b = 0; b < STEP; b++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        uint4 k = blocks_here[b * BLOCK_VALUES / 8 + (j * CHUNKS + c) * 32];
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            mma(s[m][b][j], q[m][0].x, q[m][0].y, q[m][0].z, q[m][0].w, k.x, k.y);
                            mma(s[m][b][j], q[m][1].x, q[m][1].y, q[m][1].z, q[m][1].w, k.z, k.w);
                        }
                    }
            }
            // Only steps that reach past the first row's position need a mask.
            if ((step + 1) * STEP * BLOCK > sequence.start + (int)tile.first) {
#pragma unroll
                for (int b = 0; b < STEP; b++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int e = 0; e < 4 * MT; e++) {
                            int token = (step * STEP + b) * BLOCK + 4 * t + 2 * j + e % 2;
                            if (token > position[e / 2]) s[e / 4][b][j][e % 4] = -1e30f;
                        }
            }
            float highest[LANE_ROWS];
#pragma unroll
            for (int r = 0; r < LANE_ROWS; r++) {
                highest[r] = -1e30f;
#pragma unroll
                for (int b = 0; b < STEP; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        highest[r] = fmaxf(highest[r], s[r / 2][b][e / 2][r % 2 * 2 + e % 2]);
            }
            bool higher = false;
#pragma unroll
            for (int r = 0; r < LANE_ROWS; r++) {
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(FULL_WARP, highest[r], 1));
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(FULL_WARP, highest[r], 2)) * scale;
                higher |= highest[r] > max[r];
            }
            if (__any_sync(FULL_WARP, higher)) {
#pragma unroll
                for (int r = 0; r < LANE_ROWS; r++) {
                    highest[r] = fmaxf(max[r], highest[r]);
                    const float shrink = exp2_fast(max[r] - highest[r]);
                    max[r] = highest[r];
                    total[r] *= shrink;
#pragma unroll
                    for (int d = 0; d < 2 * PAIRS; d++)
                        o[r / 2][d][r % 2 * 2] *= shrink, o[r / 2][d][r % 2 * 2 + 1] *= shrink;
                }
            }
#pragma unroll
            for (int b = 0; b < STEP; b++) {
                u32 a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const int r = 2 * m + h;
                            float x = exp2_fast(fmaf(s[m][b][j][2 * h], scale, -max[r]));
                            float y = exp2_fast(fmaf(s[m][b][j][2 * h + 1], scale, -max[r]));
                            total[r] += x + y;
                            a[m][2 * j + h] = pack(x, y);
                        }
                const uint4* values = blocks_here + b * BLOCK_VALUES / 8 + BLOCK * SIZE / 8;
#pragma unroll
                for (int d = 0; d < PAIRS; d++) {
                    uint4 v = values[d * 32];
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(o[m][2 * d], a[m][0], a[m][1], a[m][2], a[m][3], v.x, v.y);
                        mma(o[m][2 * d + 1], a[m][0], a[m][1], a[m][2], a[m][3], v.z, v.w);
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) {
        total[r] += __shfl_xor_sync(FULL_WARP, total[r], 1);
        total[r] += __shfl_xor_sync(FULL_WARP, total[r], 2);
        if (token_of(r) >= tokens) continue;
        const float share = 1.0f / total[r];
        half* to = p.out + at(r) + 2 * t;
#pragma unroll
        for (int d = 0; d < 2 * PAIRS; d++)
            *(u32*)(to + 8 * d) = pack_finite(o[r / 2][d][r % 2 * 2] * share, o[r / 2][d][r % 2 * 2 + 1] * share);
    }
}

#define PREFILL(SIZE)                                                                               \
    KERNEL __launch_bounds__(256) prefill_##SIZE##_16(const __grid_constant__ Prefill p) {          \
        prefill<SIZE, 1>(p);                                                                        \
    }                                                                                               \
    KERNEL __launch_bounds__(128, 2) prefill_##SIZE##_32(const __grid_constant__ Prefill p) {       \
        prefill<SIZE, 2>(p);                                                                        \
    }
PREFILL(64)
PREFILL(96)
PREFILL(128)
