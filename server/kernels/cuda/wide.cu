// Rows times a weight matrix on Hopper's own matrix instructions (wgmma), fed by its copy engine:
// many rows.
//
// One warp's first thread keeps a ring of stages full (tiles of 64 values along k, 128-byte swizzle);
// two warpgroups multiply, 64 rows of the A operand each. Blocks stay and take tile after
// tile, so that the ring runs on while results are written. Weights are A where rows are few (they
// are B then, as many columns as there are rows), else B, 128 or 256 of them.
#include "ring.cuh"
#include "wgmma.cuh"

struct Wide {
    TensorMap a, b;
    half* out;    // F16: [n, m]; GATE_UP: [n, m / 2]
    float* sums;  // F32: [parts, n, m]
    int m, k, n;
    int parts, steps;  // parts of k, and steps of 64 in each
    int stages;
    // The maps of A, B: which one is of the activations is known to the kernel.
};

enum Op { F16, F32, GATE_UP };

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

template <int OP, bool ROWS_ARE_A, int BN> __device__ __forceinline__ void wide(const Wide& p) {
    constexpr int A_BYTES = TILE_A * STEP * 2, B_BYTES = BN * STEP * 2, BYTES = A_BYTES + B_BYTES;
    let_next_begin();
    extern __shared__ unsigned char memory[];
    const u32 barriers = shared_address(memory);  // full, then empty
    const u32 stages = (barriers + 16 * MOST_STAGES + 1023) / 1024 * 1024;
    auto full = [&](int s) { return barriers + 8 * s; };
    auto empty = [&](int s) { return barriers + 8 * (MOST_STAGES + s); };
    const int as = ((ROWS_ARE_A ? p.n : p.m) + TILE_A - 1) / TILE_A;
    const int bs = ((ROWS_ARE_A ? p.m : p.n) + BN - 1) / BN;
    const int tiles = as * bs * p.parts;
    const int steps_all = (p.k + STEP - 1) / STEP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), 2);
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
                for (; ahead < min(p.stages, steps); ahead++) {
                    u32 to = stages + ahead * BYTES;
                    barrier_expect(full(ahead), BYTES);
                    if (ROWS_ARE_A) copy_tile(to + A_BYTES, &p.b, (begin + ahead) * STEP, place.b * BN, full(ahead));
                    else copy_tile(to, &p.a, (begin + ahead) * STEP, place.a * TILE_A, full(ahead));
                }
            }
            wait_for_previous();
            int stage = 0, parity = 1, done = 0;
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                Place place = place_of<ROWS_ARE_A>(tile, as, bs);
                int begin = place.part * p.steps, steps = min(p.steps, steps_all - begin);
                for (int step = 0; step < steps; step++, done++) {
                    barrier_wait(empty(stage), parity);
                    u32 to = stages + stage * BYTES;
                    int k = (begin + step) * STEP;
                    if (done >= ahead) {
                        barrier_expect(full(stage), BYTES);
                        copy_tile(to, &p.a, k, place.a * TILE_A, full(stage));
                        copy_tile(to + A_BYTES, &p.b, k, place.b * BN, full(stage));
                    } else if (ROWS_ARE_A) {
                        copy_tile(to, &p.a, k, place.a * TILE_A, full(stage));
                    } else {
                        copy_tile(to + A_BYTES, &p.b, k, place.b * BN, full(stage));
                    }
                    if (++stage == p.stages) stage = 0, parity ^= 1;
                }
            }
        }
        return;
    }

    wait_for_previous();
    const int half_a = threadIdx.x / 128;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    const bool first_thread = threadIdx.x % 128 == 0;
    int stage = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Place place = place_of<ROWS_ARE_A>(tile, as, bs);
        const int steps = min(p.steps, steps_all - place.part * p.steps);
        float d[BN / 2];
        int before = -1;
        for (int step = 0; step < steps; step++) {
            barrier_wait(full(stage), parity);
            u32 from = stages + stage * BYTES;
            u64 a = descriptor(from + half_a * (A_BYTES / 2)), b = descriptor(from + A_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int kk = 0; kk < STEP / 16; kk++) Wgmma<BN>::run(d, a + 2 * kk, b + 2 * kk, step + kk > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            // The step before has been multiplied: its stage is free.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (before >= 0 && first_thread) barrier_arrive(empty(before));
            before = stage;
            if (++stage == p.stages) stage = 0, parity ^= 1;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (before >= 0 && first_thread) barrier_arrive(empty(before));

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
                for (int e = 0; e < 2; e++) {
                    const int n = b0 + 8 * j + 2 * t + e;
                    if (n >= p.n) continue;
                    float low = d[4 * j + e], high = d[4 * j + 2 + e];
                    if (OP == GATE_UP) {
                        if (a0 < p.m) p.out[(size_t)n * (p.m / 2) + (a0 - g) / 2 + g] = finite_half(silu(low) * high);
                    } else {
                        float* to = p.sums + ((size_t)place.part * p.n + n) * p.m;
                        if (a0 < p.m) to[a0] = low;
                        if (a0 + 8 < p.m) to[a0 + 8] = high;
                    }
                }
        }
    }
}

// Few rows: weights are A.
#define FEW(OP, NAME, BN)                                                                        \
    KERNEL __launch_bounds__(THREADS, 1) wide_few_##NAME##_##BN(const __grid_constant__ Wide p) { \
        wide<OP, false, BN>(p);                                                                  \
    }
#define FEW_SIZES(OP, NAME) \
    FEW(OP, NAME, 32) FEW(OP, NAME, 64) FEW(OP, NAME, 96) FEW(OP, NAME, 128) FEW(OP, NAME, 192) FEW(OP, NAME, 256)
FEW_SIZES(F32, f32)
FEW_SIZES(GATE_UP, gate_up)
// Many rows: rows are A.
#define MANY(OP, NAME, BN)                                                                        \
    KERNEL __launch_bounds__(THREADS, 1) wide_many_##NAME##_##BN(const __grid_constant__ Wide p) { \
        wide<OP, true, BN>(p);                                                                    \
    }
#define MANY_SIZES(OP, NAME) MANY(OP, NAME, 128) MANY(OP, NAME, 256)
MANY_SIZES(F16, f16)
MANY_SIZES(F32, f32)
MANY_SIZES(GATE_UP, gate_up)
