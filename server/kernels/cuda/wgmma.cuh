// wgmma.mma_async of 64 x N x 16 for the Ns in use: C++ can't spell a list of N / 2 registers, so
// each is written out.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until so many groups are open.
template <int OPEN> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
}

template <int N> struct Wgmma;

// LIST: the places of d's registers, which follow at the end; P0 to P5: those of what comes after.
#define WGMMA(N, LIST, P0, P1, P2, P3, P4, P5, ...)                                                        \
    template <> struct Wgmma<N> {                                                                          \
        /* d = a * b, plus d if `add`; a and b by their descriptors. */                                    \
        static __device__ __forceinline__ void run(float (&d)[N / 2], u64 a, u64 b, int add) {             \
            asm volatile("{.reg .pred p;\n"                                                                \
                         "setp.ne.b32 p, %" #P2 ", 0;\n"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" LIST "}, "             \
                         "%" #P0 ", %" #P1 ", p, 1, 1, 0, 0;}"                                             \
                         : __VA_ARGS__                                                                     \
                         : "l"(a), "l"(b), "r"(add));                                                      \
        }                                                                                                  \
        /* The same with a in registers. */                                                                \
        static __device__ __forceinline__ void run(float (&d)[N / 2], const u32 (&a)[4], u64 b, int add) { \
            asm volatile("{.reg .pred p;\n"                                                                \
                         "setp.ne.b32 p, %" #P5 ", 0;\n"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" LIST "}, "             \
                         "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 0;}"                \
                         : __VA_ARGS__                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                  \
        }                                                                                                  \
    };

#define LIST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST48 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST64 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST80 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LIST96 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST112 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LIST128 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT16(i) OUT4(i), OUT4(i + 4), OUT4(i + 8), OUT4(i + 12)

WGMMA(32, LIST16, 16, 17, 18, 19, 20, 21,
      OUT16(0))
WGMMA(64, LIST16 "," LIST32, 32, 33, 34, 35, 36, 37,
      OUT16(0), OUT16(16))
WGMMA(96, LIST16 "," LIST32 "," LIST48, 48, 49, 50, 51, 52, 53,
      OUT16(0), OUT16(16), OUT16(32))
WGMMA(128, LIST16 "," LIST32 "," LIST48 "," LIST64, 64, 65, 66, 67, 68, 69,
      OUT16(0), OUT16(16), OUT16(32), OUT16(48))
WGMMA(192, LIST16 "," LIST32 "," LIST48 "," LIST64 "," LIST80 "," LIST96, 96, 97, 98, 99, 100, 101,
      OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80))
WGMMA(256, LIST16 "," LIST32 "," LIST48 "," LIST64 "," LIST80 "," LIST96 "," LIST112 "," LIST128, 128, 129, 130, 131, 132, 133,
      OUT16(0), OUT16(16), OUT16(32), OUT16(48), OUT16(64), OUT16(80), OUT16(96), OUT16(112))
