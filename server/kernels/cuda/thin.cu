// Few rows times a weight matrix on Hopper, bound by reading the weights: decoding.
//
// The copy engine keeps a ring of stages full (boxes of 64 values along k, 128-byte swizzle); eight
// warps share out a stage's k among them (mma.m16n8k16: rows are the A operand, weights are B) and sum
// up in shared memory at a tile's end. A block has the whole of k, so that what follows a product
// happens here too; its tile is as narrow as gives every multiprocessor one.
#include "few.cuh"
#include "ring.cuh"

struct Thin {
    TensorMap w, x;
    Few few;
    // Rows of x in a box: n made 8 or 16.
    int box_rows;
    int stages;
};

constexpr int STEP = 64, MOST_STAGES = 32, ROWS = 16;
// Warps that multiply, one that copies, and one that works out the norm's scales.
constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 64;

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

// A tile of BN outputs: boxes of a stage, and how the warps share it out.
template <int BN> struct Cut {
    static constexpr int BOXES = BN <= 48 ? 4 : BN <= 64 ? 2 : 1;
    static constexpr int SLICES = BOXES * STEP / 16;  // of k, 16 each
    static constexpr int PARTS = SLICES < WARPS ? SLICES : WARPS;
    static constexpr int GROUPS = WARPS / PARTS;  // of outputs
    static constexpr int COLUMNS = BN / GROUPS, PAIRS = (COLUMNS + 15) / 16;
    // Of the sums in shared memory: 8 banks on from row to row.
    static constexpr int PITCH = (BN + 23) / 32 * 32 + 8;
};

template <int OP, int BN> __device__ __forceinline__ void thin(const Thin& p) {
    using C = Cut<BN>;
    constexpr int W_BOX = BN * STEP * 2;
    const Few& f = p.few;
    extern __shared__ unsigned char memory[];
    __shared__ float scales[ROWS];
    let_next_begin();
    const int x_box = p.box_rows * STEP * 2, stage_bytes = C::BOXES * (W_BOX + x_box);
    const u32 barriers = shared_address(memory);  // full, then empty
    float* sums = (float*)(memory + 16 * MOST_STAGES);  // [PARTS][box_rows][PITCH]
    const u32 ring = (barriers + 16 * MOST_STAGES + C::PARTS * p.box_rows * C::PITCH * 4 + 1023) / 1024 * 1024;
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
            u32 to = ring + stage * stage_bytes;
            barrier_expect(full(stage), stage_bytes);
#pragma unroll
            for (int b = 0; b < C::BOXES; b++)
                copy_tile(to + b * W_BOX, &p.w, (u.step * C::BOXES + b) * STEP, u.tile * BN, full(stage));
        };
        auto rows = [&](const Unit& u, int stage) {
            u32 to = ring + stage * stage_bytes + C::BOXES * W_BOX;
#pragma unroll
            for (int b = 0; b < C::BOXES; b++)
                copy_tile(to + b * x_box, &p.x, (u.step * C::BOXES + b) * STEP, 0, full(stage));
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
    // Where this lane's rows of 8 x 8 matrices begin in a box, and its part of k there.
    const int matrix = lane / 8, r = lane % 8;
    const u32 x_at = C::BOXES * W_BOX + (matrix % 2 * 8 + r) % p.box_rows * 128;
    const int part = warp % C::PARTS, group = warp / C::PARTS;
    const u32 w_at = (group * C::COLUMNS + r) * 128;

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
            constexpr int MINE = C::SLICES / C::PARTS;
            u32 a[MINE][4], b[MINE][C::PAIRS][4];
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const int slice = part + i * C::PARTS, box = slice / 4, piece = slice % 4 * 2;
                load_tiles(a[i], from + x_at + box * x_box + ((piece + matrix / 2) ^ r) * 16);
#pragma unroll
                for (int j = 0; j < C::PAIRS; j++) {
                    // The last half of an odd number of eights is there twice.
                    const int eight = min(2 * j + matrix / 2, C::COLUMNS / 8 - 1);
                    load_tiles(b[i][j], from + w_at + box * W_BOX + eight * 1024 + ((piece + matrix % 2) ^ r) * 16);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty(stage));
            if (++stage == p.stages) stage = 0, parity ^= 1;
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int j = 0; j < C::COLUMNS / 8; j++)
                    mma(d[j], a[i][0], a[i][1], a[i][2], a[i][3], b[i][j / 2][j % 2 * 2], b[i][j / 2][j % 2 * 2 + 1]);
        }
        if (scaled && tile == blockIdx.x) barrier_passed<SCALES, CONSUMERS + 32>();
        // The tile before has been summed up.
        if (tile != blockIdx.x) barrier_passed<SUMS, CONSUMERS>();
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (g + 8 * h < f.n) {
                float* to = sums + (part * p.box_rows + g + 8 * h) * C::PITCH + group * C::COLUMNS + 2 * t;
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
                const float* at = sums + row * C::PITCH + column;
                float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int s = 0; s < C::PARTS; s++) {
                    float2 v = *(const float2*)(at + s * p.box_rows * C::PITCH);
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

#define THIN(OP, NAME, BN)                                                                 \
    KERNEL __launch_bounds__(THREADS) thin_##NAME##_##BN(const __grid_constant__ Thin p) { \
        thin<OP, BN>(p);                                                                   \
    }
THIN(QKV, qkv, 16)
THIN(QKV, qkv, 24)
THIN(QKV, qkv, 32)
THIN(QKV, qkv, 40)
THIN(QKV, qkv, 48)
THIN(RESIDUAL, residual, 16)
THIN(RESIDUAL, residual, 24)
THIN(RESIDUAL, residual, 32)
THIN(RESIDUAL, residual, 40)
THIN(RESIDUAL, residual, 48)
THIN(GATE_UP, gate_up, 32)
THIN(GATE_UP, gate_up, 64)
THIN(GATE_UP, gate_up, 128)
THIN(HEAD, head, 128)
