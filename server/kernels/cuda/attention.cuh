// The paged KV cache and what attention's kernels share.
//
// A block holds 16 tokens of all KV heads: for each head its keys, then its values, `16 size` f16
// each, in the order in which the lanes of a warp load them as B operands of mma.m16n8k16, 16 bytes
// a lane:
// - keys: [2 tiles of 8 tokens][size / 32][lane][8]: lane 4 g + t has dimensions 8 t.. 8 t + 7 of
//   each 32 for the g-th token of the tile. Tile j's g-th token is 4 (g / 2) + 2 j + g % 2, so that
//   the scores of a lane are those of tokens 4 t .. 4 t + 3.
// - values: [size / 16][lane][2 halves][4]: lane 4 g + t has tokens 4 t .. 4 t + 3 of dimensions
//   g and 8 + g of each 16.
#pragma once
#include "common.cuh"

struct KvShape {
    int heads, kv_heads, size;

    // Where a head's keys begin in a layer's cache.
    __device__ size_t at(u32 block, int kv_head) const {
        return ((size_t)block * kv_heads + kv_head) * 2 * BLOCK * size;
    }
};

// Eight neighbouring dimensions of a head, turned by four cosines and sines. FINITE: without infinities.
template <bool FINITE> __device__ __forceinline__ uint4 turned(uint4 v, const float* turns) {
    const u32 in[4] = {v.x, v.y, v.z, v.w};
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = unpack(in[i]), turn = *(const float2*)(turns + 2 * i);
        float x = a.x * turn.x - a.y * turn.y, y = a.x * turn.y + a.y * turn.x;
        out[i] = FINITE ? pack_finite(x, y) : pack(x, y);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Queries, keys and values as the projection left them.
struct Qkv {
    const half* values;  // [rows, width]
    int width;
    // (cosine, sine), [positions, rotated / 2]
    const float2* rope;
    int rotated;

    __device__ const half* at(int row, int column) const { return values + (size_t)row * width + column; }

    // Cosine and sine by which dimensions d and d + 1 of a head are turned.
    __device__ __forceinline__ float2 turn(u32 position, int d) const {
        if (d >= rotated) return make_float2(1.0f, 0.0f);
        return rope[(size_t)position * (rotated / 2) + d / 2];
    }

    // Dimensions d and d + 1 of a head, turned by their position.
    __device__ float2 rotate(float2 v, u32 position, int d) const {
        if (d >= rotated) return v;
        float2 r = rope[(size_t)position * (rotated / 2) + d / 2];
        return make_float2(v.x * r.x - v.y * r.y, v.x * r.y + v.y * r.x);
    }
};

// Dimensions d and d + 1 of a token's key.
__device__ __forceinline__ void put_key(half* head, int size, int token, int d, float2 v) {
    int tile = token % 4 / 2, column = token / 4 * 2 + token % 2;
    int lane = column * 4 + d % 32 / 8;
    half out[2] = {finite_half(v.x), finite_half(v.y)};
    *(u32*)(head + ((tile * (size / 32) + d / 32) * 32 + lane) * 8 + d % 8) = *(u32*)out;
}

// Dimensions d and d + 1 of a token's value.
__device__ __forceinline__ void put_value(half* head, int size, int token, int d, float2 v) {
    half* values = head + BLOCK * size;
    auto at = [&](int d) {
        return (d / 16 * 32 + d % 8 * 4 + token / 4) * 8 + d % 16 / 8 * 4 + token % 4;
    };
    values[at(d)] = finite_half(v.x);
    values[at(d + 1)] = finite_half(v.y);
}
