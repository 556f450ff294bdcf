// Between f16 weights and those of 8 or 4 bits, and rows of an embedding of such.
#include "quantised.cuh"

struct Quantise {
    const half* w;     // [m, k]
    unsigned char* q;  // [m, k], packed
    int m, k;
    Order order;
};

// The one of larger magnitude; of equal ones the positive one, whatever their order.
__device__ __forceinline__ float larger(float a, float b) {
    return fabsf(b) > fabsf(a) || (fabsf(b) == fabsf(a) && b > a) ? b : a;
}

// A warp takes a group, a lane of its first half a piece of it. The scale is the group's largest
// magnitude by 127; with 4 bits its largest value by -8, so that the side with the larger values gets
// the ninth step.
template <class F> __device__ __forceinline__ void quantise(const Quantise& p) {
    const int lane = threadIdx.x % 32, groups = p.k / F::GROUP;
    const size_t index = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (index >= (size_t)p.m * groups) return;
    const int row = index / groups, group = index % groups;
    const int t = lane % 4, piece = lane / 4 % F::PIECES;
    const half* from = p.w + (size_t)row * p.k + group * F::GROUP + 32 * piece;
    float v[8], most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack(*(const u32*)(from + pair_at(p.order, t, i)));
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
        most = larger(larger(most, pair.x), pair.y);
    }
#pragma unroll
    for (int i = 8; i > 0; i /= 2) most = larger(most, __shfl_xor_sync(FULL_WARP, most, i));
    const half scale = __float2half_rn(F::BITS == 8 ? fabsf(most) / 127.0f : most / -8.0f);
    const float by = __half2float(scale);
    u32 words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float steps = by == 0.0f ? 0.0f : rintf(v[i] / by);
        if (F::BITS == 8) words[i / 4] |= ((int)fminf(fmaxf(steps, -127.0f), 127.0f) + 128) << i % 4 * 8;
        else words[0] |= ((int)fminf(fmaxf(steps, -8.0f), 7.0f) + 8) << (i / 2 + i % 2 * 4) * 4;
    }
    unsigned char* unit = p.q + unit_at<F>(group, row / 8, p.m);
    if (lane < 16) {
        u32* to = (u32*)(unit + piece_at<F>(row % 8 * 4 + t, piece));
        to[0] = words[0];
        if (F::BITS == 8) to[1] = words[1];
    }
    if (lane == 0) *(half*)(unit + scale_at<F>(0, row % 8)) = scale;
}
KERNEL __launch_bounds__(256) quantise8(const __grid_constant__ Quantise p) { quantise<Int8>(p); }
KERNEL __launch_bounds__(256) quantise4(const __grid_constant__ Quantise p) { quantise<Int4>(p); }

// The pairs of values of a row's piece, the `t`-th of the `block`-th 32 columns, as f16.
template <class F>
__device__ __forceinline__ void read_piece(const unsigned char* q, int rows, int row, int block, int t, Order order, u32 (&h)[4]) {
    const int piece = block % F::PIECES;
    const unsigned char* unit = q + unit_at<F>(block / F::PIECES, row / 8, rows);
    const u32* words = (const u32*)(unit + piece_at<F>(row % 8 * 4 + t, piece));
    const u32 low = words[0], high = F::BITS == 8 ? words[1] : 0;
    const int group = 32 * piece / F::GROUP;
    const u32 scale = read_scale<F>(unit, group, row % 8);
    const u32 second = F::GROUP == 16 ? read_scale<F>(unit, group + 1, row % 8) : 0;
    if (order == FRAGMENTS) unpack_piece<F, FRAGMENTS>(low, high, scale, second, t, h);
    else unpack_piece<F, RUNS>(low, high, scale, second, t, h);
}

struct Dequantise {
    const unsigned char* q;
    half* w;
    int m, k;
    Order order;
};

// A thread takes a piece; four of them write 32 columns.
template <class F> __device__ __forceinline__ void dequantise(const Dequantise& p) {
    let_next_begin();
    // What is written over is read by the product before this one.
    wait_for_previous();
    const int pieces = p.k / 8;
    // Whole warps: of 8 rows, of 64 columns.
    const size_t count = (size_t)p.m * pieces, stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const int row = i / pieces, block = i % pieces / 4, t = i % 4;
        u32 h[4];
        read_piece<F>(p.q, p.m, row, block, t, p.order, h);
        if (p.order == FRAGMENTS) {
            // Turned over among four lanes, each has eight columns in a row.
#pragma unroll
            for (int by = 1; by < 4; by *= 2)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (e & by) continue;
                    const bool upper = t & by;
                    const u32 other = __shfl_xor_sync(FULL_WARP, upper ? h[e] : h[e | by], by);
                    if (upper) h[e] = other;
                    else h[e | by] = other;
                }
        }
        ((uint4*)p.w)[i] = make_uint4(h[0], h[1], h[2], h[3]);
    }
}
#define DEQUANTISE(FORMAT, NAME) \
    KERNEL __launch_bounds__(256) dequantise##NAME(const __grid_constant__ Dequantise p) { dequantise<FORMAT>(p); }
FORMATS(DEQUANTISE)

struct EmbedQ {
    const Row* rows;
    const u32* previous;  // token that the step before sampled, by slot
    const unsigned char* q;
    float* residual;    // [rows, width]
    const float* norm;  // [width]: of the first layer
    half* normed;       // [rows, width]
    int width, vocab;
    Order order;
    float epsilon;
};

// As embed in rows.cu.
template <class F> __device__ __forceinline__ void embed(const EmbedQ& p) {
    __shared__ float scratch[32];
    const size_t at = (size_t)blockIdx.x * p.width;
    let_next_begin();
    wait_for_previous();
    u32 token = p.rows[blockIdx.x].token;
    if (token & PREVIOUS) token = p.previous[token & ~PREVIOUS];
    token = min(token, (u32)p.vocab - 1);
    float squares = 0.0f;
    // Goes through the row's pairs of values: the column of the first of them, and both.
    auto each = [&](auto&& take) {
        for (int i = threadIdx.x; i < p.width / 8; i += blockDim.x) {
            u32 h[4];
            read_piece<F>(p.q, p.vocab, token, i / 4, i % 4, p.order, h);
#pragma unroll
            for (int e = 0; e < 4; e++) take(i / 4 * 32 + pair_at(p.order, i % 4, e), unpack(h[e]));
        }
    };
    each([&](int column, float2 v) {
        *(float2*)(p.residual + at + column) = v;
        squares += v.x * v.x + v.y * v.y;
    });
    const float scale = rsqrtf(sum_block(squares, scratch) / p.width + p.epsilon);
    each([&](int column, float2 v) {
        const float2 norm = *(const float2*)(p.norm + column);
        *(u32*)(p.normed + at + column) = pack_finite(v.x * scale * norm.x, v.y * scale * norm.y);
    });
}
#define EMBED(FORMAT, NAME) \
    KERNEL __launch_bounds__(256) embed##NAME(const __grid_constant__ EmbedQ p) { embed<FORMAT>(p); }
FORMATS(EMBED)
