// Products of many rows with quantised weights, on Hopper.
#include "wide.cuh"

#define WIDE(OP, NAME, BN, FORMAT, BITS)                                                                 \
    KERNEL __launch_bounds__(THREADS, 1) wide##BITS##_##NAME##_##BN(const __grid_constant__ Wide p) { \
        wide<OP, false, BN, Quantised<FORMAT>>(p);                                                       \
    }
#define SIZES(OP, NAME, FORMAT, BITS)                                                                       \
    WIDE(OP, NAME, 32, FORMAT, BITS) WIDE(OP, NAME, 64, FORMAT, BITS) WIDE(OP, NAME, 96, FORMAT, BITS)      \
    WIDE(OP, NAME, 128, FORMAT, BITS) WIDE(OP, NAME, 192, FORMAT, BITS)
#define TILES(FORMAT, BITS) SIZES(F32, f32, FORMAT, BITS) SIZES(GATE_UP, gate_up, FORMAT, BITS)
FORMATS(TILES)
