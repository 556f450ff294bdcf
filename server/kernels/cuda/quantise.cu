// Between f16 weights and those of 8 or 4 bits, and rows of an embedding of such.
#include "quantised.cuh"

struct Quantise {
    const half* w;       // [m, k]
    unsigned char* q;    // [m, k], packed
    half* scales;        // [k / 128, m]
    int m, k;
};

// The one of larger magnitude; of equal ones the positive one, whatever their order.
__device__ __forceinline__ float larger(float a, float b) {
    return fabsf(b) > fabsf(a) || (fabsf(b) == fabsf(a) && b > a) ? b : a;
}

// A warp takes a group; a lane four values of it. The scale is the group's largest magnitude by 127;
// with 4 bits its largest value by -8, so that the side with the larger values gets the ninth step.
template <int BITS> __device__ __forceinline__ void quantise(const Quantise& p) {
    const int lane = threadIdx.x % 32, groups = p.k / GROUP;
    const size_t index = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (index >= (size_t)p.m * groups) return;
    const size_t row = index / groups;
    const int group = index % groups;
    const uint2 halves = *(const uint2*)(p.w + row * p.k + group * GROUP + lane * 4);
    const float2 first = unpack(halves.x), second = unpack(halves.y);
    const float v[4] = {first.x, first.y, second.x, second.y};
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) most = larger(most, v[i]);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) most = larger(most, __shfl_xor_sync(FULL_WARP, most, i));
    const half scale = __float2half_rn(BITS == 8 ? fabsf(most) / 127.0f : most / -8.0f);
    const float by = __half2float(scale);
    int q[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float steps = by == 0.0f ? 0.0f : rintf(v[i] / by);
        q[i] = BITS == 8 ? (int)fminf(fmaxf(steps, -127.0f), 127.0f) + 128 : (int)fminf(fmaxf(steps, -8.0f), 7.0f) + 8;
    }
    const int piece = lane / 2, t = piece % 4, j = piece / 4;
    unsigned char* to = p.q + group_at<BITS>(row, group, groups) + piece_at<BITS>(t, j);
    if (BITS == 8) {
        *(u32*)(to + lane % 2 * 4) = q[0] | q[1] << 8 | q[2] << 16 | q[3] << 24;
    } else {
        u32 packed = (q[0] | q[1] << 16 | q[2] << 4 | q[3] << 20) << lane % 2 * 8;
        packed |= __shfl_xor_sync(FULL_WARP, packed, 1);
        if (lane % 2 == 0) *(u32*)to = packed;
    }
    if (lane == 0) p.scales[(size_t)group * p.m + row] = scale;
}
KERNEL __launch_bounds__(256) quantise8(const __grid_constant__ Quantise p) { quantise<8>(p); }
KERNEL __launch_bounds__(256) quantise4(const __grid_constant__ Quantise p) { quantise<4>(p); }

// A piece's values times their scale, as f16.
template <int BITS>
__device__ __forceinline__ uint4 dequantised(const unsigned char* q, const half* scales, int m, int k, size_t row, int piece) {
    const int group = piece / 16, t = piece % 4, j = piece % 16 / 4;
    u32 h[4];
    read_piece<BITS>(q + group_at<BITS>(row, group, k / GROUP), t, j, h);
    const __half2 by = __half2half2(scales[(size_t)group * m + row]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        __half2 v = __hmul2(*(__half2*)&h[e], by);
        h[e] = *(u32*)&v;
    }
    return make_uint4(h[0], h[1], h[2], h[3]);
}

struct Dequantise {
    const unsigned char* q;
    const half* scales;
    half* w;
    int m, k;
};

// A thread takes a piece.
template <int BITS> __device__ __forceinline__ void dequantise(const Dequantise& p) {
    let_next_begin();
    // What is written over is read by the product before this one.
    wait_for_previous();
    const int pieces = p.k / 8;
    const size_t count = (size_t)p.m * pieces, stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
        ((uint4*)p.w)[i] = dequantised<BITS>(p.q, p.scales, p.m, p.k, i / pieces, i % pieces);
}
KERNEL __launch_bounds__(256) dequantise8(const __grid_constant__ Dequantise p) { dequantise<8>(p); }
KERNEL __launch_bounds__(256) dequantise4(const __grid_constant__ Dequantise p) { dequantise<4>(p); }

struct EmbedQ {
    const Row* rows;
    const u32* previous;  // token that the step before sampled, by slot
    const unsigned char* q;
    const half* scales;
    float* residual;    // [rows, width]
    const float* norm;  // [width]: of the first layer
    half* normed;       // [rows, width]
    int width, vocab;
    float epsilon;
};

// As embed in rows.cu.
template <int BITS> __device__ __forceinline__ void embed(const EmbedQ& p) {
    __shared__ float scratch[32];
    const size_t at = (size_t)blockIdx.x * p.width;
    let_next_begin();
    wait_for_previous();
    u32 token = p.rows[blockIdx.x].token;
    if (token & PREVIOUS) token = p.previous[token & ~PREVIOUS];
    token = min(token, (u32)p.vocab - 1);
    float squares = 0.0f;
    auto values = [&](int piece, float (&v)[8]) {
        uint4 h = dequantised<BITS>(p.q, p.scales, p.vocab, p.width, token, piece);
        const u32 pairs[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 pair = unpack(pairs[e]);
            v[2 * e] = pair.x, v[2 * e + 1] = pair.y;
        }
    };
    for (int piece = threadIdx.x; piece < p.width / 8; piece += blockDim.x) {
        float v[8];
        values(piece, v);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            p.residual[at + piece * 8 + e] = v[e];
            squares += v[e] * v[e];
        }
    }
    float scale = rsqrtf(sum_block(squares, scratch) / p.width + p.epsilon);
    for (int piece = threadIdx.x; piece < p.width / 8; piece += blockDim.x) {
        float v[8];
        values(piece, v);
#pragma unroll
        for (int e = 0; e < 8; e++)
            p.normed[at + piece * 8 + e] = finite_half(v[e] * scale * p.norm[piece * 8 + e]);
    }
}
KERNEL __launch_bounds__(256) embed8(const __grid_constant__ EmbedQ p) { embed<8>(p); }
KERNEL __launch_bounds__(256) embed4(const __grid_constant__ EmbedQ p) { embed<4>(p); }
