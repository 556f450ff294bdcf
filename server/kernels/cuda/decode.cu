// Attention of one row a sequence (decoding): rope, KV write and paged attention in one kernel.
//
// A block of threads takes one KV head of one sequence, or a part of its context; its warps take
// KV blocks in turn. Keys, then values, are the A operand, the queries that share the head are the
// columns of B; keys and values go from global memory into the fragments they are needed in, with no
// stop in shared memory.
#include "attention.cuh"

struct Decode {
    Qkv qkv;
    KvShape kv;
    half* cache;
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
// KV heads of all sequences up to which a context is worth asking for ahead.
constexpr int FEW = 32;

template <int SIZE, int WARPS> __device__ __forceinline__ void decode(const Decode& p) {
    constexpr int CHUNKS = SIZE / 32, PAIRS = SIZE / 16, PITCH = SIZE + 4;
    extern __shared__ float scratch[];
    // Cosine and sine of each pair of dimensions at the newest position.
    __shared__ __align__(16) float turns[SIZE];
    __shared__ u32 ticket;
    let_next_begin();
    const int kv_head = blockIdx.x, parts_most = gridDim.z, part = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int group = p.kv.heads / p.kv.kv_heads;
    float* maxima = scratch;                // [WARPS][GROUP]
    float* totals = maxima + WARPS * GROUP;  // [WARPS][GROUP]
    float* outs = totals + WARPS * GROUP;    // [WARPS][group][PITCH]

    const Sequence sequence = p.sequences[blockIdx.y];
    const int length = sequence.start + 1;
    const int blocks = (length + BLOCK - 1) / BLOCK;
    const int wanted = max(1, min(parts_most, length / p.part_tokens));
    const int each = (blocks + wanted - 1) / wanted;
    const int parts = (blocks + each - 1) / each;
    const int begin = part * each, end = min(blocks, begin + each);
    // Whoever has something to do waits for the kernel before this one.
    if (sequence.rows == 0 || begin >= blocks) return;
    const int row = sequence.first_row;
    const u32* table = p.tables + sequence.table;

    // A warp takes every so many blocks, from the last one down. Ids of its next 32, one a lane.
    u32 ids = 0;
    auto load_ids = [&](int i) {
        int block = end - 1 - warp - (i + lane) * WARPS;
        ids = block >= begin ? table[block] : 0;
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

    // What a warp reads next is asked for into the L2 cache: registers have room for one block.
    auto prefetch = [&](u32 id) {
        const char* from = (const char*)(p.cache + p.kv.at(id, kv_head));
#pragma unroll
        for (int at = 128 * lane; at < 4 * BLOCK * SIZE; at += 32 * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
    };

    // Tokens from steps before, and rotations, don't depend on the kernel before this one.
    load_ids(0);
    int block = end - 1 - warp;
    u32 id = __shfl_sync(FULL_WARP, ids, 0);
    if (block >= begin) load_keys(id), load_values(id);
    // With more blocks of threads there are others to run meanwhile, whose weights it would only delay.
    const bool few = gridDim.x * gridDim.y <= FEW;
    if (few && block - WARPS >= begin) prefetch(__shfl_sync(FULL_WARP, ids, 1));
    for (int d = threadIdx.x * 2; d < SIZE; d += 64 * WARPS) *(float2*)(turns + d) = p.qkv.turn(sequence.start, d);
    __syncthreads();
    wait_for_previous();

    const bool has_newest = warp == 0 && end == blocks;
    const int token = sequence.start % BLOCK;
    half* head = p.cache + p.kv.at(id, kv_head);
    uint4 queries[CHUNKS], key[CHUNKS];
    u32 value[PAIRS];
    const half* from = p.qkv.at(row, (kv_head * group + min(g, group - 1)) * SIZE + 8 * t);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) queries[c] = *(const uint4*)(from + 32 * c);
    if (has_newest) {
        const half* keys = p.qkv.at(row, (p.kv.heads + kv_head) * SIZE + 8 * t);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) key[c] = *(const uint4*)(keys + 32 * c);
        const int column = (p.kv.heads + p.kv.kv_heads + kv_head) * SIZE + g;
        const unsigned short* values = (const unsigned short*)p.qkv.at(row, column);
        // Dimensions g and 8 + g of each 16.
#pragma unroll
        for (int i = 0; i < PAIRS; i++) value[i] = values[16 * i] | (u32)values[16 * i + 8] << 16;
    }
    u32 q[CHUNKS][4];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        uint4 eight = turned<false>(queries[c], turns + 32 * c + 8 * t);
        const bool there = g < group;
        q[c][0] = there ? eight.x : 0, q[c][1] = there ? eight.y : 0;
        q[c][2] = there ? eight.z : 0, q[c][3] = there ? eight.w : 0;
    }
    // The newest token: into this warp's registers, and into the cache.
    if (has_newest) {
        const int tile = token % 4 / 2, column = token / 4 * 2 + token % 2;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            uint4 eight = turned<true>(key[c], turns + 32 * c + 8 * t);
            if (g == column) {
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (tile == j) k[j][c] = eight;
                ((uint4*)head)[(tile * CHUNKS + c) * 32 + lane] = eight;
            }
        }
    }
    if (has_newest && t == token / 4) {
        unsigned short* to = (unsigned short*)(head + BLOCK * SIZE) + lane * 8 + token % 4;
        const u32 kept = token % 2 ? 0xffffu : 0xffff0000u, shift = token % 2 * 16;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            u32 low = value[i] & 0xffffu, high = value[i] >> 16;
            to[i * 256] = low, to[i * 256 + 4] = high;
            if (token % 4 < 2) v[i].x = (v[i].x & kept) | low << shift, v[i].z = (v[i].z & kept) | high << shift;
            else v[i].y = (v[i].y & kept) | low << shift, v[i].w = (v[i].w & kept) | high << shift;
        }
    }

    // Scores and outputs are kept with tokens and dimensions as rows: lane 4 g + t has those of query
    // heads 2 t and 2 t + 1.
    const float scale = p.scale * 1.4426950408889634f;
    float max[2] = {-1e30f, -1e30f}, total[2] = {};
    float o[PAIRS][4] = {};
#pragma unroll 1
    for (int i = 0; block >= begin; i++, block -= WARPS) {
        // Of tokens g of the block's two tiles.
        float s[4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            mma(s, k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y, q[c][0], q[c][1]);
            mma(s, k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w, q[c][2], q[c][3]);
        }
        if (i % 32 == 31) load_ids(i + 1);
        id = __shfl_sync(FULL_WARP, ids, (i + 1) % 32);
        const bool more = block - WARPS >= begin;
        if (more) load_keys(id);
        bool higher = false;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int place = block * BLOCK + g / 2 * 4 + e / 2 * 2 + g % 2;
            s[e] = place < length ? s[e] * scale : -1e30f;
            higher |= s[e] > max[e % 2];
        }
        if (__any_sync(FULL_WARP, higher)) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float highest = fmaxf(max[h], fmaxf(s[h], s[2 + h]));
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2)
                    highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, lanes));
                float shrink = exp2_fast(max[h] - highest);
                max[h] = highest;
                total[h] *= shrink;
#pragma unroll
                for (int d = 0; d < PAIRS; d++) o[d][h] *= shrink, o[d][2 + h] *= shrink;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[e] = exp2_fast(s[e] - max[e % 2]);
            total[e % 2] += s[e];
        }
        // Turned over, they are tokens 4 t .. 4 t + 3 of query head g.
        const u32 first = transpose(pack(s[0], s[1])), second = transpose(pack(s[2], s[3]));
#pragma unroll
        for (int d = 0; d < PAIRS; d++) mma(o[d], v[d].x, v[d].z, v[d].y, v[d].w, first, second);
        if (more) load_values(id);
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int head = 2 * t + h;
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) total[h] += __shfl_xor_sync(FULL_WARP, total[h], lanes);
        if (g == 0) maxima[warp * GROUP + head] = max[h], totals[warp * GROUP + head] = total[h];
        if (head < group) {
            float* to = outs + (warp * group + head) * PITCH + g;
#pragma unroll
            for (int d = 0; d < PAIRS; d++) to[16 * d] = o[d][h], to[16 * d + 8] = o[d][2 + h];
        }
    }
    __syncthreads();

    // The warps' results as one; of several parts as partial results.
    const size_t place = ((size_t)blockIdx.y * p.kv.kv_heads + kv_head) * parts_most;
    float* partial = p.workspace + (place + part) * group * (SIZE + 2);
    for (int i = threadIdx.x; i < group * SIZE / 2; i += 32 * WARPS) {
        const int head = i / (SIZE / 2), d = i % (SIZE / 2) * 2;
        float highest = -1e30f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w * GROUP + head]);
        float2 sum = make_float2(0.0f, 0.0f);
        float weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float share = exp2_fast(maxima[w * GROUP + head] - highest);
            float2 out = *(const float2*)(outs + (w * group + head) * PITCH + d);
            sum.x += out.x * share, sum.y += out.y * share;
            weight += totals[w * GROUP + head] * share;
        }
        if (parts == 1) {
            float whole = 1.0f / weight;
            *(u32*)(p.out + ((size_t)row * p.kv.heads + kv_head * group + head) * SIZE + d) =
                pack_finite(sum.x * whole, sum.y * whole);
        } else {
            *(float2*)(partial + head * (SIZE + 2) + d) = sum;
            if (d == 0) *(float2*)(partial + head * (SIZE + 2) + SIZE) = make_float2(highest, weight);
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
            float share = exp2_fast(mine[s * stride + SIZE] - highest);
            sum += mine[s * stride + d] * share;
            weight += mine[s * stride + SIZE + 1] * share;
        }
        p.out[((size_t)row * p.kv.heads + kv_head * group + head) * SIZE + d] = finite_half(sum / weight);
    }
}

// Many sequences: one warp each; few: several.
// Twelve warps a multiprocessor; or eight beside a block of thin.cu.
#define REGISTERS 168
#define DECODE(SIZE, WARPS)                                                                            \
    KERNEL __maxnreg__(REGISTERS) decode_##SIZE##_w##WARPS(const __grid_constant__ Decode p) {         \
        decode<SIZE, WARPS>(p);                                                                        \
    }
#define DECODE_WARPS(SIZE) DECODE(SIZE, 1) DECODE(SIZE, 2) DECODE(SIZE, 4) DECODE(SIZE, 8)
DECODE_WARPS(64)
DECODE_WARPS(96)
DECODE_WARPS(128)
