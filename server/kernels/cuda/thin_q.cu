// Products of few rows with quantised weights, on Hopper.
#include "thin.cuh"

constexpr int THREADS = 32 * (QUANTISED_WARPS + 2);
#define THIN(OP, NAME, BN, FORMAT, BITS)                                                                     \
    KERNEL __launch_bounds__(THREADS, 1) thin##BITS##_##NAME##_##BN(const __grid_constant__ Thin p) { \
        thin<OP, BN, Quantised<FORMAT>>(p);                                                                  \
    }
#define FORMATS(OP, NAME, BN) THIN(OP, NAME, BN, Int8, 8) THIN(OP, NAME, BN, Int4, 4)
FORMATS(QKV, qkv, 16)
FORMATS(QKV, qkv, 24)
FORMATS(QKV, qkv, 32)
FORMATS(QKV, qkv, 40)
FORMATS(RESIDUAL, residual, 16)
FORMATS(RESIDUAL, residual, 24)
FORMATS(RESIDUAL, residual, 32)
FORMATS(RESIDUAL, residual, 40)
FORMATS(GATE_UP, gate_up, 32)
FORMATS(GATE_UP, gate_up, 64)
FORMATS(GATE_UP, gate_up, 128)
FORMATS(HEAD, head, 128)
