// Products of few rows with quantised weights, on Hopper.
#include "thin.cuh"

constexpr int THREADS = 32 * (QUANTISED_WARPS + 2);
#define THIN(OP, NAME, BN, FORMAT, BITS)                                                              \
    KERNEL __launch_bounds__(THREADS, 1) thin##BITS##_##NAME##_##BN(const __grid_constant__ Thin p) { \
        thin<OP, BN, Quantised<FORMAT>>(p);                                                           \
    }
#define TILES(FORMAT, BITS)                                                                             \
    THIN(QKV, qkv, 16, FORMAT, BITS) THIN(QKV, qkv, 24, FORMAT, BITS)                                   \
    THIN(QKV, qkv, 32, FORMAT, BITS) THIN(QKV, qkv, 40, FORMAT, BITS)                                   \
    THIN(RESIDUAL, residual, 16, FORMAT, BITS) THIN(RESIDUAL, residual, 24, FORMAT, BITS)               \
    THIN(RESIDUAL, residual, 32, FORMAT, BITS) THIN(RESIDUAL, residual, 40, FORMAT, BITS)               \
    THIN(GATE_UP, gate_up, 32, FORMAT, BITS) THIN(GATE_UP, gate_up, 64, FORMAT, BITS)                   \
    THIN(GATE_UP, gate_up, 128, FORMAT, BITS) THIN(HEAD, head, 128, FORMAT, BITS)
FORMATS(TILES)
