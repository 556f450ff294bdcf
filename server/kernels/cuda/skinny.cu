// Few rows times a weight matrix, bound by reading the weights: decoding.
//
// The weights are the A operand of mma.m16n8k16, read once from global memory into registers,
// row-major as they are stored. k is permuted so that a lane's 16 bytes (8 values of one row) feed
// two mma steps: the permutation is the same for both operands, so the sum doesn't change. The
// warps of a block split k (a chunk of 32 each in turn) and sum up in shared memory. A block takes
// tile after tile, the next one's weights on their way while it sums up one. The first chunks are on
// their way before the kernel before this one has ended.
#include "skinny.cuh"

struct Skinny {
    const half* w;  // [m, k]
    Few few;
};

template <int OP, int WARPS, int MT, int NT, int STAGES>
__device__ __forceinline__ void skinny(const Skinny& p) {
    const Few& f = p.few;
    using End = TileEnd<OP, WARPS, MT, NT>;
    constexpr int ROWS = End::ROWS;
    __shared__ typename End::Sums sums;
    __shared__ float scales[End::COLUMNS];
    let_next_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int chunks = f.k / 32;
    // Turns of a warp in a tile, made whole rounds of the stages.
    const int turns = ((chunks + WARPS - 1) / WARPS + STAGES - 1) / STAGES * STAGES;
    const int tiles = (f.m + ROWS - 1) / ROWS;

    // Where the next weights come from: a tile, and the warp's turn in it. The last tile is moved up
    // to end with the matrix; its first rows are another one's then.
    int next_tile = blockIdx.x, next_turn = 0;
    const half* w[MT];
    auto enter_tile = [&]() {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            int row = min(next_tile * ROWS + 16 * i, f.m - 16) + g;
            w[i] = p.w + (size_t)row * f.k + t * 8;
        }
    };
    enter_tile();
    const size_t eight_rows = (size_t)8 * f.k;
    const half* x[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) x[j] = f.x + (size_t)min(8 * j + g, f.n - 1) * f.k + t * 8;

    uint4 a[STAGES][MT][2], b[STAGES][NT];
    const uint4 zero = make_uint4(0, 0, 0, 0);
    auto load_a = [&](int s) {
        int chunk = warp + next_turn * WARPS;
        bool there = chunk < chunks && next_tile < tiles;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            a[s][i][0] = a[s][i][1] = zero;
            if (there) {
                a[s][i][0] = load_once(w[i] + chunk * 32);
                a[s][i][1] = load_once(w[i] + eight_rows + chunk * 32);
            }
        }
        if (++next_turn == turns) {
            next_turn = 0, next_tile += gridDim.x;
            if (next_tile < tiles) enter_tile();
        }
    };
    auto load_b = [&](int s, int chunk) {
#pragma unroll
        for (int j = 0; j < NT; j++)
            b[s][j] = chunk < chunks ? *(const uint4*)(x[j] + chunk * 32) : zero;
    };

#pragma unroll
    for (int s = 0; s < STAGES; s++) load_a(s);
    wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES; s++) load_b(s, warp + s * WARPS);
    if (OP != RESIDUAL) norm_scales<WARPS>(f, scales);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        End end;
        end.ask(f, tile * ROWS);
        float c[MT][NT][4] = {};
        for (int turn = 0; turn < turns; turn += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        mma(c[i][j], a[s][i][0].x, a[s][i][1].x, a[s][i][0].y, a[s][i][1].y, b[s][j].x, b[s][j].y);
                        mma(c[i][j], a[s][i][0].z, a[s][i][1].z, a[s][i][0].w, a[s][i][1].w, b[s][j].z, b[s][j].w);
                    }
                load_a(s);
                // After a tile's last turns come the first of the next: the same x again.
                int next = turn + s + STAGES;
                load_b(s, warp + (next < turns ? next : next - turns) * WARPS);
            }
        }
        end.finish(f, tile, tiles, c, sums, scales);
    }
}

#define SKINNY(OP, NAME, W, MT, NT, ST)                                              \
    KERNEL __launch_bounds__(32 * W) skinny_##NAME##_w##W##_m##MT##_n##NT(           \
        const __grid_constant__ Skinny p) {                                          \
        skinny<OP, W, MT, NT, ST>(p);                                                \
    }
#define SKINNY_TILES(OP, NAME)    \
    SKINNY(OP, NAME, 4, 1, 1, 4)  \
    SKINNY(OP, NAME, 8, 1, 1, 4)  \
    SKINNY(OP, NAME, 4, 2, 1, 4)  \
    SKINNY(OP, NAME, 8, 2, 1, 4)  \
    SKINNY(OP, NAME, 4, 1, 2, 4)  \
    SKINNY(OP, NAME, 8, 1, 2, 4)  \
    SKINNY(OP, NAME, 4, 2, 2, 3)  \
    SKINNY(OP, NAME, 8, 2, 2, 3)  \
    SKINNY(OP, NAME, 4, 2, 4, 2)  \
    SKINNY(OP, NAME, 8, 1, 4, 3)  \
    SKINNY(OP, NAME, 8, 2, 4, 2)
SKINNY_TILES(QKV, qkv)
SKINNY_TILES(RESIDUAL, residual)
SKINNY_TILES(GATE_UP, gate_up)
SKINNY_TILES(HEAD, head)
