// Few rows times a weight matrix on Hopper, bound by reading the weights: decoding.
//
// The copy engine keeps a ring of stages full (boxes of 64 values along k, 128-byte swizzle; quantised
// weights as they are packed); eight warps share out a stage's k among them (mma.m16n8k16: rows are
// the A operand, weights are B) and sum up in shared memory at a tile's end. A block has the whole of
// k, so that what follows a product happens here too; its tile is as narrow as gives every
// multiprocessor one.
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

// Barriers among some warps; those that only reach one go on at once.
enum Barrier { SCALES = 1, SUMS };
template <int NAME, int COUNT> __device__ __forceinline__ void barrier_reached() {
    asm volatile("bar.arrive %0, %1;" ::"n"(NAME), "n"(COUNT) : "memory");
}
template <int NAME, int COUNT> __device__ __forceinline__ void barrier_passed() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(COUNT) : "memory");
}

// Sums over the warp of eight values a lane; lanes 4 g .. 4 g + 3 get that of the g-th.
__device__ __forceinline__ float sum_eighths(float (&v)[8], int lane) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            float other = upper ? v[i] : v[i + half];
            v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(FULL_WARP, other, 4 * half);
        }
    }
    return sum_lanes<4>(v[0]);
}

// The scale of each row's norm.
__device__ __forceinline__ void work_out_scales(const Few& f, float* scales, int lane) {
#pragma unroll 1
    for (int from = 0; from < f.n; from += 8) {
        // Eight rows at a time, all their loads under way together.
        float sums[8] = {};
        const float* squares = f.squares + (size_t)from * f.square_parts;
#pragma unroll 1
        for (int i = lane; i < f.square_parts; i += 128) {
#pragma unroll
            for (int r = 0; r < 8; r++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (from + r < f.n && i + 32 * c < f.square_parts)
                        sums[r] += squares[r * f.square_parts + i + 32 * c];
        }
        float scale = rsqrtf(sum_eighths(sums, lane) * (1.0f / f.k) + f.epsilon);
        if (lane % 4 == 0) scales[from + lane / 4] = scale;
    }
}

// Warps that multiply; one copies besides, and one works out the norm's scales.
constexpr int QWARPS = 16;
constexpr int THREADS = 32 * (8 + 2), QTHREADS = 32 * (QWARPS + 2);

// Weights in f16.
struct Halves {};
// Weights of a format.
template <class F> struct Quantised {};

// A tile of BN outputs: boxes of a stage, and how the warps share it out.
template <int BN, class W> struct Cut {
    static constexpr int WARPS = 8;
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
    // What is unpacked takes more warps: two share a unit's columns, where it has 128.
    static constexpr int WARPS = QWARPS;
    static constexpr int SHARE = WARPS == 16 && F::UNIT == 128 ? 2 : 1;
    // Units along k of a stage; parts of k, of which a warp has one, or some of its outputs.
    static constexpr int ALONG = (BN <= 48 ? WARPS : BN <= 64 ? WARPS / 2 : WARPS / 4) / SHARE;
    static constexpr int PARTS = ALONG * SHARE, GROUPS = WARPS / PARTS;
    static constexpr int BOXES = ALONG * F::UNIT / STEP;  // of x
    static constexpr int COLUMNS = BN / GROUPS, EIGHTS = COLUMNS / 8;
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

// 16 rows of a slice of k as an A operand. A stage has its boxes' rows one after the other, with
// 128-byte swizzle: what stands after the n-th becomes rows of the product that nobody reads.
__device__ __forceinline__ void load_rows(u32 (&a)[4], u32 x, int n, int slice) {
    const int lane = threadIdx.x % 32;
    const int row = slice / 4 * n + lane % 16, piece = slice % 4 * 2 + lane / 16;
    load_tiles(a, x + row * 128 + (piece ^ row % 8) * 16);
}

// What a warp multiplies of a stage, taken out of shared memory; and its products.
template <int BN, class W> struct Work {
    using C = Cut<BN, W>;
    static constexpr int MINE = C::SLICES / C::PARTS;
    u32 a[MINE][4], b[MINE][C::PAIRS][4];

    // `w` and `x` are a stage's weights and rows.
    __device__ __forceinline__ void take(const Few& f, u32 w, u32 x, int part, int group, int) {
        const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
        const u32 mine = w + (group * C::COLUMNS + r) * 128;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int slice = part + i * C::PARTS, box = slice / 4, piece = slice % 4 * 2;
            load_rows(a[i], x, f.n, slice);
#pragma unroll
            for (int j = 0; j < C::PAIRS; j++) {
                // The last half of an odd number of eights is there twice.
                const int eight = min(2 * j + matrix / 2, C::COLUMNS / 8 - 1);
                load_tiles(b[i][j], mine + box * (BN * STEP * 2) + eight * 1024 + ((piece + matrix % 2) ^ r) * 16);
            }
        }
    }
    __device__ __forceinline__ void multiply(float (&d)[C::COLUMNS / 8][4]) const {
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
    u32 a[2 * PIECES][4], b[C::EIGHTS][WORDS];
    // AFTER: of this lane's two columns; else of the row it unpacks.
    u32 scales[C::EIGHTS][F::GROUPS];
    bool there;

    // `step`: the stage's place along k. There is nothing to multiply beyond the last unit.
    __device__ __forceinline__ void take(const Few& f, u32 w, u32 x, int part, int group, int step) {
        const int lane = threadIdx.x % 32, unit = part / C::SHARE, share = part % C::SHARE;
        there = step * C::ALONG + unit < C::units(f.k);
        if (!there) return;
#pragma unroll
        for (int i = 0; i < 2 * PIECES; i++) load_rows(a[i], x, f.n, part * 2 * PIECES + i);
        const unsigned char* mine = shared_pointer(w) + (unit * C::UNITS + group * C::EIGHTS) * F::BYTES;
#pragma unroll
        for (int j = 0; j < C::EIGHTS; j++) {
            const unsigned char* from = mine + j * F::BYTES;
            read_words<WORDS>(b[j], from + piece_at<F>(lane, share * PIECES));
#pragma unroll
            for (int i = 0; i < F::GROUPS; i++)
                scales[j][i] = AFTER ? *(const u32*)(from + scale_at<F>(0, lane % 4 * 2)) : read_scale<F>(from, i, lane / 4);
        }
    }
    __device__ __forceinline__ void multiply(float (&d)[C::EIGHTS][4]) const {
        if (!there) return;
        float sums[C::EIGHTS][4] = {};
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int j = 0; j < C::EIGHTS; j++) {
                const u32 low = b[j][WIDTH * i], high = b[j][WIDTH * i + WIDTH - 1];
                u32 h[4];
                const int scale = 32 * i / F::GROUP;
                if (AFTER) whole_numbers<F>(low, high, h);
                else unpack_piece<F, FRAGMENTS>(low, high, scales[j][scale], scales[j][(scale + 1) % F::GROUPS], 0, h);
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
};

template <int OP, int BN, class W> __device__ __forceinline__ void thin(const Thin& p) {
    using C = Cut<BN, W>;
    constexpr int WARPS = C::WARPS, CONSUMERS = 32 * WARPS;
    // Of the sums in shared memory: 8 banks on from row to row.
    constexpr int PITCH = (BN + 23) / 32 * 32 + 8;
    const Few& f = p.few;
    extern __shared__ unsigned char memory[];
    __shared__ float scales[ROWS];
    let_next_begin();
    // A stage has rows, then weights.
    const int x_bytes = C::BOXES * f.n * STEP * 2, w_at = (x_bytes + 1023) / 1024 * 1024;
    const int stage_bytes = w_at + (C::W_BYTES + 1023) / 1024 * 1024;
    const u32 barriers = shared_address(memory);  // full, then empty
    float* sums = (float*)(memory + 16 * MOST_STAGES);  // [PARTS][n][PITCH]
    const u32 ring = (barriers + 16 * MOST_STAGES + C::PARTS * f.n * PITCH * 4 + 1023) / 1024 * 1024;
    auto full = [&](int s) { return barriers + 8 * s; };
    auto empty = [&](int s) { return barriers + 8 * (MOST_STAGES + s); };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tiles = (f.m + BN - 1) / BN;
    const int steps = (f.k + C::BOXES * STEP - 1) / (C::BOXES * STEP);

    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), WARPS);
        barriers_made();
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane != 0) return;
        struct Unit {
            int tile, step;
        };
        auto advance = [&](Unit& u) {
            if (++u.step == steps) u.step = 0, u.tile += gridDim.x;
        };
        auto weights = [&](const Unit& u, int stage) {
            C::copy_weights(p, u.tile, u.step, ring + stage * stage_bytes + w_at, full(stage), x_bytes);
        };
        auto rows = [&](const Unit& u, int stage) {
            copy_boxes(ring + stage * stage_bytes, &p.x, u.step * C::BOXES, full(stage));
        };
        // Weights don't depend on the kernel before this one: the first of them go ahead.
        const Unit first = {(int)blockIdx.x, 0};
        Unit u = first;
        int ahead = 0;
#pragma unroll 1
        for (; ahead < p.stages && u.tile < tiles; ahead++, advance(u)) weights(u, ahead);
        prefetch_map(&p.x);
        wait_for_previous();
        Unit v = first;
#pragma unroll 1
        for (int s = 0; s < ahead; s++, advance(v)) rows(v, s);
        int stage = 0, parity = 0;
#pragma unroll 1
        for (; u.tile < tiles; advance(u)) {
            barrier_wait(empty(stage), parity);
            weights(u, stage);
            rows(u, stage);
            if (++stage == p.stages) stage = 0, parity ^= 1;
        }
        return;
    }
    const bool scaled = OP != RESIDUAL && f.squares;
    if (warp > WARPS) {
        if (!scaled) return;
        wait_for_previous();
        work_out_scales(f, scales, lane);
        barrier_reached<SCALES, CONSUMERS + 32>();
        return;
    }

    // At the end a row's outputs, two of them each, are shared out to so many threads.
    constexpr int OUTS = OP == GATE_UP ? BN / 4 : BN / 2;
    constexpr int LANES = OUTS <= 8 ? 8 : OUTS <= 16 ? 16 : 32;
    constexpr int AT_ONCE = CONSUMERS / LANES, TURNS = (ROWS + AT_ONCE - 1) / AT_ONCE;
    const int out_lane = threadIdx.x % LANES, out_row = threadIdx.x / LANES;
    const int part = warp % C::PARTS, group = warp / C::PARTS;

    wait_for_previous();
    int stage = 0, parity = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        // What the end needs, asked for early.
        float2 residual[TURNS], norm = make_float2(0.0f, 0.0f);
        if (OP == RESIDUAL) {
            const int column = tile * BN + 2 * out_lane;
            const bool inside = out_lane < OUTS && column < f.m;
            if (inside) norm = *(const float2*)(f.next_norm + column);
#pragma unroll
            for (int i = 0; i < TURNS; i++) {
                const int row = out_row + i * AT_ONCE;
                residual[i] = inside && row < f.n ? *(const float2*)(f.residual + (size_t)row * f.m + column)
                                                  : make_float2(0.0f, 0.0f);
            }
        }

        float d[C::COLUMNS / 8][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            barrier_wait(full(stage), parity);
            const u32 from = ring + stage * stage_bytes;
            Work<BN, W> work;
            work.take(f, from + w_at, from, part, group, step);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty(stage));
            if (++stage == p.stages) stage = 0, parity ^= 1;
            work.multiply(d);
        }
        if (scaled && tile == blockIdx.x) barrier_passed<SCALES, CONSUMERS + 32>();
        // The tile before has been summed up.
        if (tile != blockIdx.x) barrier_passed<SUMS, CONSUMERS>();
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (g + 8 * h < f.n) {
                float* to = sums + (part * f.n + g + 8 * h) * PITCH + group * C::COLUMNS + 2 * t;
#pragma unroll
                for (int j = 0; j < C::COLUMNS / 8; j++)
                    *(float2*)(to + 8 * j) = make_float2(d[j][2 * h], d[j][2 * h + 1]);
            }
        barrier_passed<SUMS, CONSUMERS>();

#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (i * AT_ONCE >= f.n) break;
            const int row = out_row + i * AT_ONCE;
            const bool there = row < f.n;
            const float scale = scaled && there ? scales[row] : 1.0f;
            auto total = [&](int column) {
                const float* at = sums + row * PITCH + column;
                float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int s = 0; s < C::PARTS; s++) {
                    float2 v = *(const float2*)(at + s * f.n * PITCH);
                    sum.x += v.x, sum.y += v.y;
                }
                return make_float2(sum.x * scale, sum.y * scale);
            };
            const size_t at = (size_t)row * f.m;
            float squares = 0.0f;
            u64 best = 0;
#pragma unroll
            for (int out = out_lane; out < (OUTS + LANES - 1) / LANES * LANES; out += LANES) {
                // Of 16 outputs of gate and up the first 8 are gates, the others their ups.
                const int column = OP == GATE_UP ? out / 4 * 16 + out % 4 * 2 : 2 * out;
                const int m = tile * BN + column;
                if (!there || out >= OUTS || m >= f.m) continue;
                float2 v = total(column);
                if (OP == QKV) *(u32*)(f.out + at + m) = pack_finite(v.x, v.y);
                if (OP == GATE_UP) {
                    float2 up = total(column + 8);
                    *(u32*)(f.out + (at + tile * BN) / 2 + 2 * out) = pack_finite(silu(v.x) * up.x, silu(v.y) * up.y);
                }
                if (OP == RESIDUAL) {
                    v.x += residual[i].x, v.y += residual[i].y;
                    *(float2*)(f.residual + at + m) = v;
                    *(u32*)(f.next + at + m) = pack_finite(v.x * norm.x, v.y * norm.y);
                    squares += v.x * v.x + v.y * v.y;
                }
                if (OP == HEAD) {
                    const bool second = m + 1 < f.m;
                    if (f.m % 2 == 0) {
                        *(float2*)(f.logits + at + m) = v;
                    } else {
                        f.logits[at + m] = v.x;
                        if (second) f.logits[at + m + 1] = v.y;
                    }
                    best = max(best, ranked(v.x, m));
                    if (second) best = max(best, ranked(v.y, m + 1));
                }
            }
            if (OP == RESIDUAL) {
                squares = sum_lanes<LANES>(squares);
                if (there && out_lane == 0) f.next_squares[(size_t)row * tiles + tile] = squares;
            }
            if (OP == HEAD && f.best) {
#pragma unroll
                for (int lanes = LANES / 2; lanes > 0; lanes /= 2)
                    best = max(best, __shfl_xor_sync(FULL_WARP, best, lanes));
                if (there && out_lane == 0) f.best[(size_t)row * tiles + tile] = best;
            }
        }
    }
}

