// Rows times a weight matrix on Hopper's own matrix instructions (wgmma), fed by its copy engine:
// many rows.
//
// One warp's first thread keeps a ring of stages full (tiles of 64 values along k, 128-byte swizzle;
// quantised weights as they are packed); two warpgroups multiply, 64 rows of the A operand each.
// Blocks stay and take tile after tile, so that the ring runs on while results are written. Weights
// are A where rows are few (they are B then, as many columns as there are rows), else B, 128 or 256 of
// them. Quantised weights are always A, from registers: those of the next 64 values along k are
// unpacked while this one's are multiplied.
#pragma once
#include "columns.cuh"
#include "quantised.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

struct Wide {
    TensorMap a, b;
    const unsigned char* packed;  // quantised weights, instead of a
    half* out;    // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;  // F32: [parts, n, m]
    int m, k, n;
    int parts, steps;  // parts of k, and steps of a stage in each
    int stages;
    // The maps of A, B: which one is of the activations is known to the kernel.
};

constexpr int STEP = 64, TILE_A = 128;
// Two warpgroups that multiply, and a warp that copies.
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 32;
constexpr int MOST_STAGES = 16;
// Tiles of rows that are gone through before the next outputs.
constexpr int ROW_TILES = 16;

struct Place {
    int a, b, part;
};

template <bool ROWS_ARE_A> __device__ __forceinline__ Place place_of(int tile, int as, int bs) {
    Place place;
    place.part = tile / (as * bs);
    tile %= as * bs;
    if (ROWS_ARE_A) {
        int group = tile / (ROW_TILES * bs), first = group * ROW_TILES;
        int here = min(ROW_TILES, as - first);
        tile -= first * bs;
        place.a = first + tile % here, place.b = tile / here;
    } else {
        place.a = tile / bs, place.b = tile % bs;
    }
    return place;
}

// Weights in f16, and of a format.
struct Halves {};
template <class F> struct Quantised {};

// A stage: A, then B. How it's filled, and how a warpgroup multiplies it.
template <bool ROWS_ARE_A, int BN, class W> struct Stage {
    static constexpr int ALONG = STEP;  // values along k
    static constexpr int A_BYTES = TILE_A * STEP * 2, B_BYTES = BN * STEP * 2;

    // Begins to copy the weights of a stage at `step` along k, and tells the barrier of all bytes.
    static __device__ __forceinline__ void copy_weights(const Wide& p, Place place, int step, u32 to, u32 barrier) {
        barrier_expect(barrier, A_BYTES + B_BYTES);
        if (ROWS_ARE_A) copy_tile(to + A_BYTES, &p.b, step * STEP, place.b * BN, barrier);
        else copy_tile(to, &p.a, step * STEP, place.a * TILE_A, barrier);
    }
    static __device__ __forceinline__ void copy_rows(const Wide& p, Place place, int step, u32 to, u32 barrier) {
        if (ROWS_ARE_A) copy_tile(to, &p.a, step * STEP, place.a * TILE_A, barrier);
        else copy_tile(to + A_BYTES, &p.b, step * STEP, place.b * BN, barrier);
    }

    // `begin`: these are a tile's first products. When this returns, those of the stage before are over.
    __device__ __forceinline__ void multiply(float (&d)[BN / 2], const Wide&, u32 from, int half_a, int, bool begin) {
        u64 a = descriptor(from + half_a * (A_BYTES / 2)), b = descriptor(from + A_BYTES);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < STEP / 16; kk++) Wgmma<BN>::run(d, a + 2 * kk, b + 2 * kk, !begin || kk > 0);
        wgmma_commit();
        wgmma_wait<1>();
    }
};
template <int BN, class F> struct Stage<false, BN, Quantised<F>> {
    static constexpr int ALONG = 2 * STEP, UNITS = ALONG / F::UNIT, EIGHTS = TILE_A / 8;
    static constexpr int A_BYTES = (UNITS * EIGHTS * F::BYTES + 1023) / 1024 * 1024, B_BYTES = BN * ALONG * 2;
    // A operands of 64 values along k: those that are multiplied, and those to come.
    u32 a[2][4][4];

    static __device__ __forceinline__ void copy_weights(const Wide& p, Place place, int step, u32 to, u32 barrier) {
        const int here = min(EIGHTS, p.m / 8 - place.a * EIGHTS) * F::BYTES;
        const int units = min(UNITS, p.k / F::UNIT - step * UNITS);
        barrier_expect(barrier, units * here + B_BYTES);
        for (int i = 0; i < units; i++)
            copy_run(to + i * EIGHTS * F::BYTES, p.packed + unit_at<F>(step * UNITS + i, place.a * EIGHTS, p.m), here, barrier);
    }
    static __device__ __forceinline__ void copy_rows(const Wide& p, Place place, int step, u32 to, u32 barrier) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            copy_tile(to + A_BYTES + i * (B_BYTES / 2), &p.b, step * ALONG + i * STEP, place.b * BN, barrier);
    }

    __device__ __forceinline__ void multiply(float (&d)[BN / 2], const Wide& p, u32 from, int half_a, int step, bool begin) {
        const int lane = threadIdx.x % 32, eight = half_a * 8 + threadIdx.x / 32 % 4 * 2;
        const unsigned char* units = shared_pointer(from) + eight * F::BYTES;
        Packed<F> packed[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // Where this 64 begin in their unit: a unit has 64 or 128 of them.
            const int unit = h * UNITS / 2, piece = h * 2 % F::PIECES;
            if (piece == 0) {
                packed[0].read(units + unit * EIGHTS * F::BYTES, lane);
                packed[1].read(units + (unit * EIGHTS + 1) * F::BYTES, lane);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 low[4], high[4];
                packed[0].template unpack<FRAGMENTS>(piece + i, lane % 4, low);
                packed[1].template unpack<FRAGMENTS>(piece + i, lane % 4, high);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32(&to)[4] = a[h][2 * i + e];
                    to[0] = low[2 * e], to[1] = high[2 * e], to[2] = low[2 * e + 1], to[3] = high[2 * e + 1];
                }
            }
            // Beyond the last column there may be anything.
            if (F::UNIT == STEP && step * ALONG + h * STEP >= p.k) {
#pragma unroll
                for (int i = 0; i < 16; i++) a[h][i / 4][i % 4] = 0;
            }
            const u64 b = descriptor(from + A_BYTES + h * (B_BYTES / 2));
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < STEP / 16; kk++) Wgmma<BN>::run(d, a[h][kk], b + 2 * kk, !begin || h + kk > 0);
            wgmma_commit();
            wgmma_wait<1>();
        }
    }
};

template <int OP, bool ROWS_ARE_A, int BN, class W> __device__ __forceinline__ void wide(const Wide& p) {
    using S = Stage<ROWS_ARE_A, BN, W>;
    constexpr int BYTES = S::A_BYTES + S::B_BYTES;
    let_next_begin();
    extern __shared__ unsigned char memory[];
    const u32 barriers = shared_address(memory);  // full, then empty
    const u32 stages = (barriers + 16 * MOST_STAGES + 1023) / 1024 * 1024;
    auto full = [&](int s) { return barriers + 8 * s; };
    auto empty = [&](int s) { return barriers + 8 * (MOST_STAGES + s); };
    const int as = ((ROWS_ARE_A ? p.n : p.m) + TILE_A - 1) / TILE_A;
    const int bs = ((ROWS_ARE_A ? p.m : p.n) + BN - 1) / BN;
    const int tiles = as * bs * p.parts;
    const int steps_all = (p.k + S::ALONG - 1) / S::ALONG;

    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), CONSUMERS);
        barriers_made();
    }
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            // Weights don't depend on the kernel before this one: the first of them go ahead.
            int ahead = 0;
            {
                Place place = place_of<ROWS_ARE_A>(blockIdx.x, as, bs);
                int begin = place.part * p.steps, steps = min(p.steps, steps_all - begin);
                for (; ahead < min(p.stages, steps); ahead++)
                    S::copy_weights(p, place, begin + ahead, stages + ahead * BYTES, full(ahead));
            }
            wait_for_previous();
            int stage = 0, parity = 1, done = 0;
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                Place place = place_of<ROWS_ARE_A>(tile, as, bs);
                int begin = place.part * p.steps, steps = min(p.steps, steps_all - begin);
                for (int step = 0; step < steps; step++, done++) {
                    barrier_wait(empty(stage), parity);
                    u32 to = stages + stage * BYTES;
                    if (done >= ahead) S::copy_weights(p, place, begin + step, to, full(stage));
                    S::copy_rows(p, place, begin + step, to, full(stage));
                    if (++stage == p.stages) stage = 0, parity ^= 1;
                }
            }
        }
        return;
    }

    wait_for_previous();
    const int half_a = threadIdx.x / 128;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    int stage = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Place place = place_of<ROWS_ARE_A>(tile, as, bs);
        const int first = place.part * p.steps, steps = min(p.steps, steps_all - first);
        float d[BN / 2];
        S work;
        int before = -1;
        for (int step = 0; step < steps; step++) {
            barrier_wait(full(stage), parity);
            work.multiply(d, p, stages + stage * BYTES, half_a, first + step, step == 0);
            // The stage before is free.
            if (before >= 0) barrier_arrive(empty(before));
            before = stage;
            if (++stage == p.stages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (before >= 0) barrier_arrive(empty(before));

        const int a0 = place.a * TILE_A + half_a * 64 + warp * 16 + g, b0 = place.b * BN;
        if (ROWS_ARE_A) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int n = a0 + 8 * h;
                if (n >= p.n) continue;
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    const int m = b0 + 8 * j + 2 * t;
                    float v0 = d[4 * j + 2 * h], v1 = d[4 * j + 2 * h + 1];
                    if (OP == GATE_UP) {
                        // Of 16 outputs the first 8 are gates, the others their ups.
                        if (j % 2 == 0 && m < p.m) {
                            float u0 = d[4 * (j + 1) % (BN / 2) + 2 * h], u1 = d[4 * (j + 1) % (BN / 2) + 2 * h + 1];
                            half out[2] = {finite_half(silu(v0) * u0), finite_half(silu(v1) * u1)};
                            *(u32*)(p.out + (size_t)n * (p.m / 2) + (b0 + 8 * j) / 2 + 2 * t) = *(u32*)out;
                        }
                    } else if (OP == F16) {
                        half out[2] = {finite_half(v0), finite_half(v1)};
                        if (m < p.m) *(u32*)(p.out + (size_t)n * p.m + m) = *(u32*)out;
                    } else {
                        float* to = p.sums + ((size_t)place.part * p.n + n) * p.m + m;
                        if (m + 1 < p.m && p.m % 2 == 0) *(float2*)to = make_float2(v0, v1);
                        else {
                            if (m < p.m) to[0] = v0;
                            if (m + 1 < p.m) to[1] = v1;
                        }
                    }
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    write_pair<OP>(p, place.part, b0 + 8 * j + 2 * t + e, a0, g, d[4 * j + e], d[4 * j + 2 + e]);
        }
    }
}
