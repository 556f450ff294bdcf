// Products of many rows with weights in f16, on Hopper.
#include "wide.cuh"

// Few rows: weights are A.
#define FEW(OP, NAME, BN)                                                                        \
    KERNEL __launch_bounds__(THREADS, 1) wide_few_##NAME##_##BN(const __grid_constant__ Wide p) { \
        wide<OP, false, BN, Halves>(p);                                                                  \
    }
#define FEW_SIZES(OP, NAME) \
    FEW(OP, NAME, 32) FEW(OP, NAME, 64) FEW(OP, NAME, 96) FEW(OP, NAME, 128) FEW(OP, NAME, 192) FEW(OP, NAME, 256)
FEW_SIZES(F32, f32)
FEW_SIZES(GATE_UP, gate_up)
// Many rows: rows are A.
#define MANY(OP, NAME, BN)                                                                        \
    KERNEL __launch_bounds__(THREADS, 1) wide_many_##NAME##_##BN(const __grid_constant__ Wide p) { \
        wide<OP, true, BN, Halves>(p);                                                                    \
    }
#define MANY_SIZES(OP, NAME) MANY(OP, NAME, 128) MANY(OP, NAME, 256)
MANY_SIZES(F16, f16)
MANY_SIZES(F32, f32)
MANY_SIZES(GATE_UP, gate_up)
