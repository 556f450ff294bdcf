// Weights of 8 or 4 bits: where they stand, and how lanes unpack them.
//
// A row is in groups of values with one f16 scale each, and a least value (f16) where the format has
// one. A value is q times its scale plus the least one, or (q - 128) or (q - 8) times its scale.
//
// Rows of a matrix stand together by eight, in units of so many columns: [columns / UNIT][rows / 8].
// A unit holds values of 64 columns at a time, 16 (or with 4 bits 8) bytes of each of 32 lanes, and
// then its groups' scales, [groups][8 rows], as pairs with the least values. Lane 4 g + t has values
// of row g, in pieces of 8: of each 32 columns one piece (see `pair_at`). In a piece of 4 bits, value
// 2 i is nibble i and value 2 i + 1 nibble i + 4, so that one mask gives two neighbours.
#pragma once
#include "common.cuh"

// Which columns a piece has. FRAGMENTS: those of tensor-core fragments as ldmatrix and wgmma have them, on
// Hopper. RUNS: eight in a row, which lanes elsewhere read of the rows' values at once.
enum Order { RUNS, FRAGMENTS };

template <int BITS_, int GROUP_, bool LEAST_> struct Format {
    static constexpr int BITS = BITS_, GROUP = GROUP_;
    static constexpr bool LEAST = LEAST_;
    // Columns of a unit, and what a lane has of them.
    static constexpr int UNIT = GROUP > 64 ? GROUP : 64;
    static constexpr int PIECES = UNIT / 32, WORDS = PIECES * BITS / 4;
    static constexpr int GROUPS = UNIT / GROUP;
    // Bytes of a unit's values, and of all of it.
    static constexpr int VALUES = UNIT * BITS;
    static constexpr int BYTES = VALUES + 8 * GROUPS * (LEAST ? 4 : 2);
};
// What is made of f16 weights.
typedef Format<8, 128, false> Int8;
typedef Format<4, 128, false> Int4;
// What weights of GGUF files are kept as: Q8_0; Q4_0, Q4_1 and Q4_K; Q6_K.
typedef Format<8, 32, false> Int8By32;
typedef Format<4, 32, true> Int4By32;
typedef Format<8, 16, false> Int8By16;
// Kernels of a format are named by the last: EACH(Int8, 8) and so on.
#define FORMATS(EACH) EACH(Int8, 8) EACH(Int4, 4) EACH(Int8By32, 8by32) EACH(Int4By32, 4by32) EACH(Int8By16, 8by16)

// Where a unit begins.
template <class F> __device__ __forceinline__ size_t unit_at(int unit, int eight, int rows) {
    return ((size_t)unit * (rows / 8) + eight) * F::BYTES;
}
// Where a piece of a lane begins in its unit.
template <class F> __device__ __forceinline__ int piece_at(int lane, int piece) {
    return (piece / 2 * 32 + lane) * 2 * F::BITS + piece % 2 * F::BITS;
}
// Where the scale of a row's group stands in its unit.
template <class F> __device__ __forceinline__ int scale_at(int group, int row) {
    return F::VALUES + (group * 8 + row) * (F::LEAST ? 4 : 2);
}
// The columns of values 2 i and 2 i + 1 of lane t's piece, of 32: this one and the next.
__device__ __forceinline__ int pair_at(Order order, int t, int i) {
    return order == FRAGMENTS ? 8 * i + 2 * t : 8 * t + 2 * i;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    __half2 d = __hsub2(*(__half2*)&a, *(__half2*)&b);
    return *(u32*)&d;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    __half2 d = __hmul2(*(__half2*)&a, *(__half2*)&b);
    return *(u32*)&d;
}
__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
    __half2 d = __hfma2(*(__half2*)&a, *(__half2*)&b, *(__half2*)&c);
    return *(u32*)&d;
}

// (a & mask) | bits, in one instruction.
__device__ __forceinline__ u32 masked(u32 a, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// A piece's whole numbers as f16: exact, since 1024 + q is an f16 whose last bits are q.
template <class F> __device__ __forceinline__ void whole_numbers(u32 low, u32 high, u32 (&h)[4]) {
    if (F::BITS == 8) {
        const u32 offset = F::LEAST ? 0x64006400 : 0x64806480;  // 1024, 1024 + 128
        h[0] = minus(__byte_perm(low, 0x64646464, 0x4140), offset);
        h[1] = minus(__byte_perm(low, 0x64646464, 0x4342), offset);
        h[2] = minus(__byte_perm(high, 0x64646464, 0x4140), offset);
        h[3] = minus(__byte_perm(high, 0x64646464, 0x4342), offset);
    } else {
        const u32 one = 0x64006400, offset = F::LEAST ? 0x64006400 : 0x64086408;  // 1024, 1024 + 8
        const u32 sixteenth = 0x2c002c00, rest = F::LEAST ? 0xd400d400 : 0xd480d480;  // 1 / 16, -64, -(64 + 8)
        h[0] = minus(masked(low, 0x000f000f, one), offset);
        h[1] = times_plus(masked(low, 0x00f000f0, one), sixteenth, rest);
        low >>= 8;
        h[2] = minus(masked(low, 0x000f000f, one), offset);
        h[3] = times_plus(masked(low, 0x00f000f0, one), sixteenth, rest);
    }
}

// A piece as f16 values, by the scale of its group. Groups of 16 have two, `scale` and `second`.
template <class F, Order ORDER>
__device__ __forceinline__ void unpack_piece(u32 low, u32 high, u32 scale, u32 second, int t, u32 (&h)[4]) {
    whole_numbers<F>(low, high, h);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (F::GROUP == 16 && (ORDER == FRAGMENTS ? i > 0 : t > 1)) scale = second;
        const u32 by = __byte_perm(scale, 0, 0x1010), least = __byte_perm(scale, 0, 0x3232);
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; e++) h[e] = F::LEAST ? times_plus(h[e], by, least) : times(h[e], by);
    }
}
template <class F> __device__ __forceinline__ u32 read_scale(const unsigned char* unit, int group, int row) {
    const unsigned char* from = unit + scale_at<F>(group, row);
    return F::LEAST ? *(const u32*)from : *(const unsigned short*)from;
}

// What a lane has of some times 64 columns, from its first piece on.
template <class F, int WORDS> __device__ __forceinline__ void read_words(u32 (&words)[WORDS], const unsigned char* from) {
    constexpr int AT_ONCE = F::BITS / 2;
#pragma unroll
    for (int c = 0; c < WORDS / AT_ONCE; c++) {
        const unsigned char* at = from + c * 64 * F::BITS;
        u32* to = words + c * AT_ONCE;
        if (F::BITS == 8) {
            const uint4 v = *(const uint4*)at;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
            const uint2 v = *(const uint2*)at;
            to[0] = v.x, to[1] = v.y;
        }
    }
}

// What a lane has of a unit.
template <class F> struct Packed {
    u32 words[F::WORDS];
    u32 scales[F::GROUPS];

    __device__ __forceinline__ void read(const unsigned char* unit, int lane) {
        read_words<F>(words, unit + piece_at<F>(lane, 0));
#pragma unroll
        for (int i = 0; i < F::GROUPS; i++) scales[i] = read_scale<F>(unit, i, lane / 4);
    }

    // A piece as f16 values.
    template <Order ORDER> __device__ __forceinline__ void unpack(int piece, int t, u32 (&h)[4]) const {
        constexpr int WIDTH = F::BITS / 4;
        const int group = 32 * piece / F::GROUP;
        unpack_piece<F, ORDER>(words[WIDTH * piece], words[WIDTH * piece + WIDTH - 1], scales[group],
                               scales[F::GROUP == 16 ? group + 1 : group], t, h);
    }
};
