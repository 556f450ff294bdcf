// Products of few rows on Hopper: what a stage of the ring holds, and how a warp multiplies its part of
// it. Weights are in f16, or quantised, which warps unpack.
#pragma once
#include "few.cuh"
#include "quantised.cuh"
#include "ring.cuh"

struct Thin {
    TensorMap w, x;
    const unsigned char* packed;  // quantised weights, instead of w
    Few few;
    int stages;
};

constexpr int STEP = 64, MOST_STAGES = 32, ROWS = 16;
// Warps that multiply; one copies besides, and one works out the norm's scales.
constexpr int HALVES_WARPS = 8, QUANTISED_WARPS = 16;

// Weights in f16.
struct Halves {};
// Weights of a format.
template <class F> struct Quantised {};

// A tile of BN outputs: boxes of a stage, and how the warps share it out.
template <int BN, class W> struct Cut {
    static constexpr int WARPS = HALVES_WARPS;
    static constexpr int BOXES = BN <= 48 ? 4 : BN <= 64 ? 2 : 1;
    static constexpr int SLICES = BOXES * STEP / 16;  // of k, 16 each
    static constexpr int PARTS = SLICES < WARPS ? SLICES : WARPS;
    static constexpr int GROUPS = WARPS / PARTS;  // of outputs
    static constexpr int COLUMNS = BN / GROUPS, PAIRS = (COLUMNS + 15) / 16;
    static constexpr int W_BYTES = BOXES * BN * STEP * 2;  // of a stage

    // Begins to copy a stage's weights; the barrier is told of `more` bytes besides.
    static __device__ __forceinline__ void copy_weights(const Thin& p, int tile, int step, u32 to, u32 barrier, int more) {
        barrier_expect(barrier, W_BYTES + more);
#pragma unroll
        for (int b = 0; b < BOXES; b++)
            copy_tile(to + b * (BN * STEP * 2), &p.w, (step * BOXES + b) * STEP, tile * BN, barrier);
    }
};
template <int BN, class F> struct Cut<BN, Quantised<F>> {
    // What is unpacked takes more warps. So many share a unit's columns.
    static constexpr int WARPS = QUANTISED_WARPS;
    static constexpr int SHARE = F::UNIT == 128 ? 2 : 1;
    // Units along k of a stage; parts of k, of which a warp has one, or some of its outputs.
    static constexpr int ALONG = (BN <= 48 ? WARPS : BN <= 64 ? WARPS / 2 : WARPS / 4) / SHARE;
    static constexpr int PARTS = ALONG * SHARE, GROUPS = WARPS / PARTS;
    static constexpr int BOXES = ALONG * F::UNIT / STEP;  // of x
    static constexpr int COLUMNS = BN / GROUPS, EIGHTS = COLUMNS / 8, PAIRS = (EIGHTS + 1) / 2;
    static constexpr int UNITS = BN / 8;  // side by side
    static constexpr int W_BYTES = ALONG * UNITS * F::BYTES;

    static __device__ __forceinline__ int units(int k) { return k / F::UNIT; }

    static __device__ __forceinline__ void copy_weights(const Thin& p, int tile, int step, u32 to, u32 barrier, int more) {
        const int here = min(UNITS, p.few.m / 8 - tile * UNITS) * F::BYTES;
        const int along = min(ALONG, units(p.few.k) - step * ALONG);
        barrier_expect(barrier, along * here + more);
        for (int i = 0; i < along; i++)
            copy_run(to + i * UNITS * F::BYTES, p.packed + unit_at<F>(step * ALONG + i, tile * UNITS, p.few.m), here, barrier);
    }
};

// Where this lane finds its row of a slice of k, 16 rows as an A operand. A stage has its boxes' rows
// one after the other, with 128-byte swizzle: what stands after the n-th becomes rows of the product
// that nobody reads.
__device__ __forceinline__ u32 row_at(int n, int slice) {
    const int lane = threadIdx.x % 32;
    const int row = slice / 4 * n + lane % 16, piece = slice % 4 * 2 + lane / 16;
    return row * 128 + (piece ^ row % 8) * 16;
}

// The same of 8 rows, and of two slices from an even one on.
__device__ __forceinline__ u32 eight_at(int n, int slice) {
    const int lane = threadIdx.x % 32;
    const int row = slice / 4 * n + lane % 8, piece = slice % 4 * 2 + lane / 8;
    return row * 128 + (piece ^ row % 8) * 16;
}

// Leaves products of rows g and g + 8 in shared memory, row by row.
template <int EIGHTS>
__device__ __forceinline__ void leave_rows(const Few& f, const float (&d)[EIGHTS][4], float* to, int pitch) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (g + 8 * h < f.n)
#pragma unroll
            for (int j = 0; j < EIGHTS; j++)
                *(float2*)(to + (g + 8 * h) * pitch + 8 * j + 2 * t) = make_float2(d[j][2 * h], d[j][2 * h + 1]);
}

// What a warp multiplies of a stage, taken out of shared memory; and its products.
template <int BN, class W> struct Work {
    using C = Cut<BN, W>;
    static constexpr int MINE = C::SLICES / C::PARTS;
    // Where what a lane takes begins in a stage's rows and weights.
    struct Places {
        u32 x[MINE], w;
        int part;

        __device__ __forceinline__ Places(const Few& f, int part, int group) : part(part) {
#pragma unroll
            for (int i = 0; i < MINE; i++) x[i] = row_at(f.n, part + i * C::PARTS);
            w = (group * C::COLUMNS + threadIdx.x % 8) * 128;
        }
    };
    u32 a[MINE][4], b[MINE][C::PAIRS][4];

    // `w` and `x` are the weights and rows of stage `step` along k.
    __device__ __forceinline__ void take(const Places& at, u32 w, u32 x, int) {
        const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        const u32 mine = w + at.w;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int slice = at.part + i * C::PARTS, box = slice / 4, piece = slice % 4 * 2;
            load_tiles(a[i], x + at.x[i]);
#pragma unroll
            for (int j = 0; j < C::PAIRS; j++) {
                // The last half of an odd number of eights is there twice.
                const int eight = min(2 * j + matrix / 2, C::COLUMNS / 8 - 1);
                load_tiles(b[i][j], mine + box * (BN * STEP * 2) + eight * 1024 + ((piece + matrix % 2) ^ r) * 16);
            }
        }
    }
    static __device__ __forceinline__ void leave(const Few& f, const float (&d)[C::COLUMNS / 8][4], float* to, int pitch) {
        leave_rows(f, d, to, pitch);
    }
    __device__ __forceinline__ void multiply(const Places&, float (&d)[C::COLUMNS / 8][4]) const {
#pragma unroll
        for (int i = 0; i < MINE; i++)
#pragma unroll
            for (int j = 0; j < C::COLUMNS / 8; j++)
                mma(d[j], a[i][0], a[i][1], a[i][2], a[i][3], b[i][j / 2][j % 2 * 2], b[i][j / 2][j % 2 * 2 + 1]);
    }
};
template <int BN, class F> struct Work<BN, Quantised<F>> {
    using C = Cut<BN, Quantised<F>>;
    static constexpr int PIECES = F::PIECES / C::SHARE, WIDTH = F::BITS / 4, WORDS = PIECES * WIDTH;
    // A unit with one scale a row: products are scaled when they are summed up, else weights are.
    static constexpr bool AFTER = F::GROUP == F::UNIT && !F::LEAST;
    struct Places {
        u32 x[2 * PIECES], w, scales;
        int steps;  // stages that this warp has a unit in
        bool eight;  // rows, at most: they are the B operand then

        __device__ __forceinline__ Places(const Few& f, int part, int group) {
            const int lane = threadIdx.x % 32, unit = part / C::SHARE, share = part % C::SHARE;
#pragma unroll
            for (int i = 0; i < 2 * PIECES; i++) x[i] = row_at(f.n, part * 2 * PIECES + i);
            eight = f.n <= 8;
            if (eight) {
#pragma unroll
                for (int i = 0; i < PIECES; i++) x[i] = eight_at(f.n, part * 2 * PIECES + 2 * i);
            }
            const u32 mine = (unit * C::UNITS + group * C::EIGHTS) * F::BYTES;
            w = mine + piece_at<F>(lane, share * PIECES);
            scales = mine + scale_at<F>(0, AFTER && f.n > 8 ? lane % 4 * 2 : lane / 4);
            steps = (C::units(f.k) - unit + C::ALONG - 1) / C::ALONG;
        }
    };
    u32 a[2 * PIECES][4], b[C::EIGHTS][WORDS];
    // AFTER, and more than 8 rows: of this lane's two columns; else of the row it unpacks.
    u32 scales[C::EIGHTS][F::GROUPS];
    bool there;

    // There is nothing to multiply beyond the last unit.
    __device__ __forceinline__ void take(const Places& at, u32 w, u32 x, int step) {
        there = step < at.steps;
        if (!there) return;
        if (at.eight) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) load_tiles(a[i], x + at.x[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 2 * PIECES; i++) load_tiles(a[i], x + at.x[i]);
        }
        const unsigned char *words = shared_pointer(w + at.w), *of_groups = shared_pointer(w + at.scales);
#pragma unroll
        for (int j = 0; j < C::EIGHTS; j++) {
            read_words<F>(b[j], words + j * F::BYTES);
#pragma unroll
            for (int i = 0; i < F::GROUPS; i++) {
                const unsigned char* from = of_groups + j * F::BYTES + i * (F::LEAST ? 32 : 16);
                const bool pair = F::LEAST || (AFTER && !at.eight);
                scales[j][i] = pair ? *(const u32*)from : *(const unsigned short*)from;
            }
        }
    }
    // Eight columns' piece, scaled if that isn't done after.
    __device__ __forceinline__ void unpack_eight(int j, int i, u32 (&h)[4]) const {
        const u32 low = b[j][WIDTH * i], high = b[j][WIDTH * i + WIDTH - 1];
        const int group = 32 * i / F::GROUP;
        if (AFTER) whole_numbers<F>(low, high, h);
        else unpack_piece<F, FRAGMENTS>(low, high, scales[j][group], scales[j][(group + 1) % F::GROUPS], 0, h);
    }
    __device__ __forceinline__ void multiply(const Places& at, float (&d)[C::EIGHTS][4]) const {
        if (!there) return;
        if (at.eight) multiply_eight(d);
        else multiply_sixteen(d);
    }
    __device__ __forceinline__ void multiply_sixteen(float (&d)[C::EIGHTS][4]) const {
        float sums[C::EIGHTS][4] = {};
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int j = 0; j < C::EIGHTS; j++) {
                u32 h[4];
                unpack_eight(j, i, h);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32(&rows)[4] = a[2 * i + e];
                    mma(AFTER ? sums[j] : d[j], rows[0], rows[1], rows[2], rows[3], h[2 * e], h[2 * e + 1]);
                }
            }
        if (!AFTER) return;
#pragma unroll
        for (int j = 0; j < C::EIGHTS; j++) {
            const float2 by = unpack(scales[j][0]);
#pragma unroll
            for (int e = 0; e < 4; e++) d[j][e] += (e % 2 ? by.y : by.x) * sums[j][e];
        }
    }
    // Of at most 8 rows: weights are the A operand, 16 columns of them at once; `d` has products of two
    // rows with columns 16 j + g and 16 j + 8 + g.
    __device__ __forceinline__ void multiply_eight(float (&d)[C::EIGHTS][4]) const {
        float sums[C::PAIRS][4] = {};
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int j = 0; j < C::PAIRS; j++) {
                u32 low[4], high[4] = {};
                unpack_eight(2 * j, i, low);
                if (2 * j + 1 < C::EIGHTS) unpack_eight(2 * j + 1, i, high);
#pragma unroll
                for (int e = 0; e < 2; e++)
                    mma(AFTER ? sums[j] : d[j], low[2 * e], high[2 * e], low[2 * e + 1], high[2 * e + 1], a[i][2 * e],
                        a[i][2 * e + 1]);
            }
        if (!AFTER) return;
#pragma unroll
        for (int j = 0; j < C::PAIRS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                d[j][e] += unpack(scales[min(2 * j + e / 2, C::EIGHTS - 1)][0]).x * sums[j][e];
    }
    // Leaves the products of the warp's columns in shared memory, row by row.
    static __device__ __forceinline__ void leave(const Few& f, const float (&d)[C::EIGHTS][4], float* to, int pitch) {
        if (f.n > 8) {
            leave_rows(f, d, to, pitch);
            return;
        }
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < C::PAIRS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (2 * t + e % 2 < f.n && 2 * j + e / 2 < C::EIGHTS)
                    to[(2 * t + e % 2) * pitch + 16 * j + e / 2 * 8 + g] = d[j][e];
    }
};
