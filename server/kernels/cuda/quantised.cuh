// Weights of 8 or 4 bits, and how lanes unpack them.
//
// A row is in groups of 128 values with one f16 scale each; scales lie [groups, rows]. A value is
// (q - 128) or (q - 8) times its scale. The same group of 16 rows stands together, so that memory is
// read in long runs: [rows / 16][groups][16 rows]. A group is 16 pieces of 8 values; lane t of four has pieces
// t + 4 j, j = 0 .. 3, in 16-byte loads that stand side by side for the four lanes:
// - 8 bits: [2 halves][4 lanes][2 pieces of 8 bytes], half h with j = 2 h and 2 h + 1;
// - 4 bits: [4 lanes][4 pieces of 4 bytes]; value 2 i of a piece is nibble i, value 2 i + 1 nibble
//   i + 4, so that one mask gives two neighbours.
#pragma once
#include "common.cuh"

constexpr int GROUP = 128;

// Bytes of a group.
template <int BITS> constexpr int GROUP_BYTES = GROUP * BITS / 8;

// Where a group of a row begins.
template <int BITS> __device__ __forceinline__ size_t group_at(size_t row, int group, int groups) {
    return ((row / 16 * groups + group) * 16 + row % 16) * GROUP_BYTES<BITS>;
}

// Where piece t + 4 j of a group begins.
template <int BITS> __device__ __forceinline__ int piece_at(int t, int j) {
    return BITS == 8 ? j / 2 * 64 + t * 16 + j % 2 * 8 : t * 16 + j * 4;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    __half2 d = __hsub2(*(__half2*)&a, *(__half2*)&b);
    return *(u32*)&d;
}
__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
    __half2 d = __hfma2(*(__half2*)&a, *(__half2*)&b, *(__half2*)&c);
    return *(u32*)&d;
}

// A piece as f16 without its scale: exact, since 1024 + q is an f16 whose last bits are q.
template <int BITS> __device__ __forceinline__ void unpack_piece(u32 low, u32 high, u32 (&h)[4]) {
    if (BITS == 8) {
        const u32 offset = 0x64806480;  // 1024 + 128
        h[0] = minus(__byte_perm(low, 0x64646464, 0x4140), offset);
        h[1] = minus(__byte_perm(low, 0x64646464, 0x4342), offset);
        h[2] = minus(__byte_perm(high, 0x64646464, 0x4140), offset);
        h[3] = minus(__byte_perm(high, 0x64646464, 0x4342), offset);
    } else {
        const u32 one = 0x64006400, offset = 0x64086408;           // 1024, 1024 + 8
        const u32 sixteenth = 0x2c002c00, rest = 0xd480d480;       // 1 / 16, -(64 + 8)
        h[0] = minus((low & 0x000f000f) | one, offset);
        h[1] = times_plus((low & 0x00f000f0) | one, sixteenth, rest);
        low >>= 8;
        h[2] = minus((low & 0x000f000f) | one, offset);
        h[3] = times_plus((low & 0x00f000f0) | one, sixteenth, rest);
    }
}

// The same from memory.
template <int BITS> __device__ __forceinline__ void read_piece(const unsigned char* group, int t, int j, u32 (&h)[4]) {
    const u32* from = (const u32*)(group + piece_at<BITS>(t, j));
    unpack_piece<BITS>(from[0], BITS == 8 ? from[1] : 0, h);
}

#if __CUDA_ARCH__ >= 800
// Copies 8 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void copy8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
#endif
