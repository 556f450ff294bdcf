// Products of few rows with weights in f16, on Hopper.
#include "thin.cuh"

constexpr int THREADS = 32 * (HALVES_WARPS + 2);
#define THIN(OP, NAME, BN)                                                                 \
    KERNEL __launch_bounds__(THREADS) thin_##NAME##_##BN(const __grid_constant__ Thin p) { \
        thin<OP, BN, Halves>(p);                                                           \
    }
THIN(QKV, qkv, 16)
THIN(QKV, qkv, 24)
THIN(QKV, qkv, 32)
THIN(QKV, qkv, 40)
THIN(QKV, qkv, 48)
THIN(RESIDUAL, residual, 16)
THIN(RESIDUAL, residual, 24)
THIN(RESIDUAL, residual, 32)
THIN(RESIDUAL, residual, 40)
THIN(RESIDUAL, residual, 48)
THIN(GATE_UP, gate_up, 32)
THIN(GATE_UP, gate_up, 64)
THIN(GATE_UP, gate_up, 128)
THIN(HEAD, head, 128)
