// What all kernels share: types, the step's description in device memory, and thin wrappers of
// instructions that CUDA C++ has no word for.
#pragma once
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL extern "C" __global__ void
#define FULL_WARP 0xffffffffu

// Tokens of a KV block.
constexpr int BLOCK = 16;

// One row (token) of a step.
struct Row {
    // Token id, or PREVIOUS | slot: what the step before sampled for that slot.
    u32 token;
    u32 position;
    // KV block that holds this position.
    u32 block;
    u32 sequence;
};
constexpr u32 PREVIOUS = 0x80000000u;

// A sequence's part of a step.
struct Sequence {
    u32 first_row;
    // 0: nothing to do (a place of a graph's batch that is not taken).
    u32 rows;
    // Position of the first row.
    u32 start;
    // Where its block ids begin among all block ids of the step.
    u32 table;
};

// A row whose next token is wanted.
struct Sample {
    u32 row;
    u32 slot;
    // Where the token goes; NOWHERE: nothing to do.
    u32 out;
    u32 top_k;
    float temperature;
    float top_p;
    u64 seed;
    u64 position;
};
constexpr u32 NOWHERE = 0xffffffffu;

// Some tokens of a prompt chunk that one block of threads attends with.
struct Tile {
    u32 sequence;
    // Counted from the sequence's first row of this step.
    u32 first;
};

// Programmatic dependent launch: a kernel lets the next one begin at once (that one fetches weights
// and waits), and waits for the one before it before it reads what that one wrote, or writes at all.
// What came before those two is over then. A step's first kernel is launched without it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that are read once: past the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ const unsigned char* shared_pointer(u32 address) {
    return (const unsigned char*)__cvta_shared_to_generic(address);
}

// d += a * b on tensor cores; a: 16 rows x 16, b: 16 x 8 columns, in mma.m16n8k16's fragments.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// Turns over an 8 x 8 matrix of f16 of which a lane 4 g + t has columns 2 t and 2 t + 1 of row g.
__device__ __forceinline__ u32 transpose(u32 v) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Four 8x8 tiles out of shared memory; a lane gives the address of one of their rows.
__device__ __forceinline__ void load_tiles(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Copies 16 bytes from global to shared memory, asynchronously where the device can; zeros where
// not `valid`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *(const uint4*)from;
    *(uint4*)to = v;
#endif
}
__device__ __forceinline__ void copies_begun() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int OPEN> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
#endif
}

__device__ __forceinline__ u32 pack(float a, float b) {
    __half2 h = __floats2half2_rn(a, b);
    return *(u32*)&h;
}
__device__ __forceinline__ float2 unpack(u32 v) { return __half22float2(*(__half2*)&v); }

// f16 without infinities: what stands in unused places of the KV cache is multiplied by zero.
__device__ __forceinline__ half finite_half(float v) {
    return __float2half_rn(fmaxf(fminf(v, 65504.0f), -65504.0f));
}

__device__ __forceinline__ u32 pack_finite(float a, float b) {
    half out[2] = {finite_half(a), finite_half(b)};
    return *(u32*)out;
}

// Grows with a logit. What is not a number comes last.
__device__ __forceinline__ u32 key_of(float v) {
    if (v != v) return 0;
    u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// A logit with its id: the highest of several is that of the highest logit, of equals the first. 0: none.
__device__ __forceinline__ u64 ranked(float v, u32 id) {
    // Both zeros are equal.
    u32 key = key_of(v + 0.0f);
    return key ? (u64)key << 32 | (u32)~id : 0;
}

// 2^v, by the special function unit alone: 0 below what f32 holds at full precision.
__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

template <int LANES = 32> __device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) v += __shfl_xor_sync(FULL_WARP, v, i);
    return v;
}

// Sum over the block; every thread gets it. `scratch` has room for 32 values.
__device__ __forceinline__ float sum_block(float v, float* scratch) {
    v = sum_lanes(v);
    const int warps = (blockDim.x + 31) / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float total = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.0f;
    return sum_lanes(total);
}
