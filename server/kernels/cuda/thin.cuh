// Few rows times a weight matrix on Hopper, bound by reading the weights: decoding.
//
// The copy engine keeps a ring of stages full (boxes of 64 values along k, 128-byte swizzle; quantised
// weights as they are packed); eight warps, or sixteen of quantised weights, share out a stage's k among
// them (mma.m16n8k16: rows are the A operand, weights are B; the other way round where quantised
// weights meet at most eight rows) and sum up in shared memory at a tile's end. A block has the whole
// of k, so that what follows a product happens here too; its tile is as narrow as gives every
// multiprocessor one.
#pragma once
#include "thin_work.cuh"

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
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = (f.m + BN - 1) / BN;
    const int steps = (f.k + C::BOXES * STEP - 1) / (C::BOXES * STEP);

    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; s++) barrier_init(full(s), 1), barrier_init(empty(s), CONSUMERS);
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
    const typename Work<BN, W>::Places places(f, part, group);

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
            work.take(places, from + w_at, from, step);
            barrier_arrive(empty(stage));
            if (++stage == p.stages) stage = 0, parity ^= 1;
            work.multiply(places, d);
        }
        if (scaled && tile == blockIdx.x) barrier_passed<SCALES, CONSUMERS + 32>();
        // The tile before has been summed up.
        if (tile != blockIdx.x) barrier_passed<SUMS, CONSUMERS>();
        Work<BN, W>::leave(f, d, sums + part * f.n * PITCH + group * C::COLUMNS, PITCH);
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

