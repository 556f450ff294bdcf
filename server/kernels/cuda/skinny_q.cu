// Few rows times a weight matrix of 8 or 4 bits: skinny.cu's way, with what is read unpacked in
// registers.
//
// A warp takes a unit along k in a turn. k is permuted as in skinny.cu.
#include "quantised.cuh"
#include "skinny.cuh"

struct SkinnyQ {
    const unsigned char* w;  // [m, k], packed
    Few few;
};

template <int OP, class F, int WARPS, int MT, int NT, int STAGES, bool AHEAD>
__device__ __forceinline__ void skinny(const SkinnyQ& p) {
    const Few& f = p.few;
    using End = TileEnd<OP, WARPS, MT, NT>;
    constexpr int ROWS = End::ROWS;
    __shared__ typename End::Sums sums;
    __shared__ float row_scales[End::COLUMNS];
    let_next_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int units = f.k / F::UNIT;
    // Turns of a warp in a tile, made whole rounds of the stages.
    const int turns = ((units + WARPS - 1) / WARPS + STAGES - 1) / STAGES * STAGES;
    const int tiles = (f.m + ROWS - 1) / ROWS;

    int next_tile = blockIdx.x, next_turn = 0;
    const unsigned char* w[MT];
    auto enter_tile = [&]() {
#pragma unroll
        for (int i = 0; i < MT; i++)
            w[i] = p.w + unit_at<F>(0, min(next_tile * ROWS + 16 * i, f.m - 16) / 8, f.m);
    };
    enter_tile();
    const half* x[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) x[j] = f.x + (size_t)min(8 * j + g, f.n - 1) * f.k + t * 8;

    const size_t along = unit_at<F>(1, 0, f.m);
    Packed<F> a[STAGES][MT][2];
    auto load = [&](int s) {
        int unit = warp + next_turn * WARPS;
        if (unit < units && next_tile < tiles) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) a[s][i][r].read(w[i] + unit * along + r * F::BYTES, lane);
        }
        if (++next_turn == turns) {
            next_turn = 0, next_tile += gridDim.x;
            if (next_tile < tiles) enter_tile();
        }
    };

    // x for a turn, each piece asked for again as soon as it's used.
    uint4 b[F::PIECES][NT];
    auto load_x = [&](int j, int turn) {
        // After a tile's last turn comes the first of the next: the same x again.
        const int unit = min(warp + (turn < turns ? turn : 0) * WARPS, units - 1);
#pragma unroll
        for (int n = 0; n < NT; n++) b[j][n] = *(const uint4*)(x[n] + unit * F::UNIT + 32 * j);
    };

#pragma unroll
    for (int s = 0; s < STAGES; s++) load(s);
    wait_for_previous();
    if (AHEAD) {
#pragma unroll
        for (int j = 0; j < F::PIECES; j++) load_x(j, 0);
    }
    if (OP != RESIDUAL) norm_scales<WARPS>(f, row_scales);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        End end;
        end.ask(f, tile * ROWS);
        float c[MT][NT][4] = {};
        for (int turn = 0; turn < turns; turn += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
                const int unit = warp + (turn + s) * WARPS;
                if (unit < units) {
#pragma unroll
                    for (int j = 0; j < F::PIECES; j++) {
                        uint4 now[NT];
#pragma unroll
                        for (int n = 0; n < NT; n++)
                            now[n] = AHEAD ? b[j][n] : *(const uint4*)(x[n] + unit * F::UNIT + 32 * j);
#pragma unroll
                        for (int i = 0; i < MT; i++) {
                            u32 low[4], high[4];
                            a[s][i][0].template unpack<RUNS>(j, t, low);
                            a[s][i][1].template unpack<RUNS>(j, t, high);
#pragma unroll
                            for (int n = 0; n < NT; n++) {
                                mma(c[i][n], low[0], high[0], low[1], high[1], now[n].x, now[n].y);
                                mma(c[i][n], low[2], high[2], low[3], high[3], now[n].z, now[n].w);
                            }
                        }
                        if (AHEAD) load_x(j, turn + s + 1);
                    }
                } else if (AHEAD) {
#pragma unroll
                    for (int j = 0; j < F::PIECES; j++) load_x(j, turn + s + 1);
                }
                load(s);
            }
        }
        end.finish(f, tile, tiles, c, sums, row_scales);
    }
}

// AHEAD: whether there is room in registers to ask for x ahead of its turn. BOUNDS: what the
// compiler makes registers fit: threads, and blocks of a multiprocessor (left to it with 8 bits).
#define SKINNY(OP, NAME, FORMAT, BITS, MT, NT, STAGES, AHEAD, BOUNDS)         \
    KERNEL __launch_bounds__ BOUNDS skinny##BITS##_##NAME##_w8_m##MT##_n##NT( \
        const __grid_constant__ SkinnyQ p) {                                  \
        skinny<OP, FORMAT, 8, MT, NT, STAGES, AHEAD>(p);                      \
    }
#define EIGHT(OP, NAME, FORMAT, BITS, STAGES, OF_TWO)          \
    SKINNY(OP, NAME, FORMAT, BITS, 1, 1, STAGES, false, (256)) \
    SKINNY(OP, NAME, FORMAT, BITS, 2, 1, OF_TWO, false, (256)) \
    SKINNY(OP, NAME, FORMAT, BITS, 1, 2, STAGES, false, (256, 2))
#define FOUR(OP, NAME, FORMAT, BITS, STAGES, OF_TWO)              \
    SKINNY(OP, NAME, FORMAT, BITS, 1, 1, STAGES, true, (256, 2))  \
    SKINNY(OP, NAME, FORMAT, BITS, 2, 1, OF_TWO, false, (256, 2)) \
    SKINNY(OP, NAME, FORMAT, BITS, 1, 2, STAGES, false, (256, 2))
// Of units of 64 columns more are under way: with one tile of outputs, and with two.
#define TILES(OP, NAME)                    \
    EIGHT(OP, NAME, Int8, 8, 2, 2)         \
    EIGHT(OP, NAME, Int8By32, 8by32, 4, 3) \
    EIGHT(OP, NAME, Int8By16, 8by16, 4, 2) \
    FOUR(OP, NAME, Int4, 4, 3, 3)          \
    FOUR(OP, NAME, Int4By32, 4by32, 6, 4)
TILES(QKV, qkv)
TILES(RESIDUAL, residual)
TILES(GATE_UP, gate_up)
TILES(HEAD, head)
