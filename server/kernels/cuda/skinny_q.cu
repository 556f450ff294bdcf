// Few rows times a weight matrix of 8 or 4 bits: skinny.cu's way, with what is read unpacked in
// registers.
//
// A warp takes one group of 128 values along k in a turn: the unscaled products of a group are
// summed on tensor cores, then scaled into the sum. k is permuted as in skinny.cu.
#include "quantised.cuh"
#include "skinny.cuh"

struct SkinnyQ {
    const unsigned char* w;  // [m, k], packed
    const half* scales;      // [k / 128, m]
    Few few;
};

template <int OP, int BITS, int WARPS, int MT, int NT, int STAGES, bool AHEAD>
__device__ __forceinline__ void skinny(const SkinnyQ& p) {
    const Few& f = p.few;
    using End = TileEnd<OP, WARPS, MT, NT>;
    constexpr int ROWS = End::ROWS;
    // 16-byte loads of a lane for a group of a row.
    constexpr int LOADS = BITS / 4;
    __shared__ typename End::Sums sums;
    __shared__ float row_scales[End::COLUMNS];
    let_next_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int groups = f.k / GROUP;
    // Turns of a warp in a tile, made whole rounds of the stages.
    const int turns = ((groups + WARPS - 1) / WARPS + STAGES - 1) / STAGES * STAGES;
    const int tiles = (f.m + ROWS - 1) / ROWS;

    int next_tile = blockIdx.x, next_turn = 0;
    const unsigned char* w[MT];
    const half* scales[MT];
    auto enter_tile = [&]() {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            int row = min(next_tile * ROWS + 16 * i, f.m - 16) + g;
            w[i] = p.w + group_at<BITS>(row, 0, groups) + t * 16;
            scales[i] = p.scales + row;
        }
    };
    enter_tile();
    const half* x[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) x[j] = f.x + (size_t)min(8 * j + g, f.n - 1) * f.k + t * 8;

    uint4 a[STAGES][MT][2][LOADS];
    half a_scale[STAGES][MT][2];
    auto load = [&](int s) {
        int group = warp + next_turn * WARPS;
        if (group < groups && next_tile < tiles) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
#pragma unroll
                    for (int h = 0; h < LOADS; h++)
                        a[s][i][r][h] = load_once(w[i] + (16 * group + 8 * r) * GROUP_BYTES<BITS> + 64 * h);
                    a_scale[s][i][r] = scales[i][(size_t)group * f.m + 8 * r];
                }
        }
        if (++next_turn == turns) {
            next_turn = 0, next_tile += gridDim.x;
            if (next_tile < tiles) enter_tile();
        }
    };

    // x for a turn, each piece asked for again as soon as it's used.
    uint4 b[4][NT];
    auto load_x = [&](int j, int turn) {
        // After a tile's last turn comes the first of the next: the same x again.
        const int group = min(warp + (turn < turns ? turn : 0) * WARPS, groups - 1);
#pragma unroll
        for (int n = 0; n < NT; n++) b[j][n] = *(const uint4*)(x[n] + group * GROUP + 32 * j);
    };

#pragma unroll
    for (int s = 0; s < STAGES; s++) load(s);
    wait_for_previous();
    if (AHEAD) {
#pragma unroll
        for (int j = 0; j < 4; j++) load_x(j, 0);
    }
    if (OP != RESIDUAL) norm_scales<WARPS>(f, row_scales);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        End end;
        end.ask(f, tile * ROWS);
        float c[MT][NT][4] = {};
        for (int turn = 0; turn < turns; turn += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
                const int group = warp + (turn + s) * WARPS;
                if (group < groups) {
                    float d[MT][NT][4] = {};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        uint4 now[NT];
#pragma unroll
                        for (int n = 0; n < NT; n++)
                            now[n] = AHEAD ? b[j][n] : *(const uint4*)(x[n] + group * GROUP + 32 * j);
#pragma unroll
                        for (int i = 0; i < MT; i++) {
                            u32 low[4], high[4];
                            auto piece = [&](int r, u32 (&h)[4]) {
                                const uint4& v = a[s][i][r][BITS == 8 ? j / 2 : 0];
                                if (BITS == 8) unpack_piece<8>(j % 2 ? v.z : v.x, j % 2 ? v.w : v.y, h);
                                else unpack_piece<4>(j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w, 0, h);
                            };
                            piece(0, low);
                            piece(1, high);
#pragma unroll
                            for (int n = 0; n < NT; n++) {
                                mma(d[i][n], low[0], high[0], low[1], high[1], now[n].x, now[n].y);
                                mma(d[i][n], low[2], high[2], low[3], high[3], now[n].z, now[n].w);
                            }
                        }
                        if (AHEAD) load_x(j, turn + s + 1);
                    }
#pragma unroll
                    for (int i = 0; i < MT; i++)
#pragma unroll
                        for (int n = 0; n < NT; n++)
#pragma unroll
                            for (int e = 0; e < 4; e++)
                                c[i][n][e] += __half2float(a_scale[s][i][e / 2]) * d[i][n][e];
                } else if (AHEAD) {
#pragma unroll
                    for (int j = 0; j < 4; j++) load_x(j, turn + s + 1);
                }
                load(s);
            }
        }
        end.finish(f, tile, tiles, c, sums, row_scales);
    }
}

// AHEAD: whether there is room in registers to ask for x ahead of its turn. BOUNDS: what the
// compiler makes registers fit: threads, and blocks of a multiprocessor (left to it with 8 bits).
#define SKINNY(OP, NAME, BITS, MT, NT, STAGES, AHEAD, BOUNDS)                           \
    KERNEL __launch_bounds__ BOUNDS skinny##BITS##_##NAME##_w8_m##MT##_n##NT(           \
        const __grid_constant__ SkinnyQ p) {                                            \
        skinny<OP, BITS, 8, MT, NT, STAGES, AHEAD>(p);                                  \
    }
#define SKINNY_TILES(OP, NAME)                    \
    SKINNY(OP, NAME, 8, 1, 1, 2, false, (256))    \
    SKINNY(OP, NAME, 8, 2, 1, 2, false, (256))    \
    SKINNY(OP, NAME, 8, 1, 2, 2, false, (256, 2)) \
    SKINNY(OP, NAME, 4, 1, 1, 3, true, (256, 2))  \
    SKINNY(OP, NAME, 4, 2, 1, 3, false, (256, 2)) \
    SKINNY(OP, NAME, 4, 1, 2, 3, false, (256, 2))
SKINNY_TILES(QKV, qkv)
SKINNY_TILES(RESIDUAL, residual)
SKINNY_TILES(GATE_UP, gate_up)
SKINNY_TILES(HEAD, head)
