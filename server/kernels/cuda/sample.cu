// Choosing the next token of each row from its logits, as sampling.rs does on the CPU.
//
// Weights are fixed-point numbers, so that sums don't depend on the order of their terms: the same
// logits, seed and position give the same token always. The heaviest set that top-k and top-p leave
// and the draw from it are all found the same way: by bytes of a key that grows with the logit,
// from the highest, with a histogram of counts or of weights for each byte.
#include "common.cuh"

struct Choose {
    const float* logits;  // [samples, vocab]
    // The highest of each part of a row's logits, [samples, parts]; parts 0: to be looked for.
    const u64* best;
    int parts;
    const Sample* samples;
    u32* previous;  // by slot
    u32* out;       // by sample's place, in the host's memory
    int vocab;
};

constexpr int THREADS = 1024;
constexpr float LEAST_TEMPERATURE = 1e-5f;

__device__ __forceinline__ u64 mix(u64 v) {
    u64 z = v + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

struct Chooser {
    const float* logits;
    int vocab;
    float max, inverse_temperature;

    __device__ u64 weight(float v) const {
        if (v != v || v == __int_as_float(0xff800000)) return 0;
        return (u64)(__expf((v - max) * inverse_temperature) * 1099511627776.0f);
    }
};

struct Found {
    // The key at which the running total from the highest passes the target.
    u32 key;
    // The total of the keys above it.
    u64 above;
};

// Finds where the running total (of counts, or of weights) over keys in falling order passes
// `target`, which must be below the grand total of the keys from `least` on.
template <bool COUNTS>
__device__ Found find(const Chooser& c, u64 target, u32 least, u64* bins, Found* found) {
    u32 prefix = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 256; i += THREADS) bins[i] = 0;
        __syncthreads();
        const u32 mask = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int i = threadIdx.x; i < c.vocab; i += THREADS) {
            u32 key = key_of(c.logits[i]);
            if ((key & mask) != prefix || key < least) continue;
            u64 amount = COUNTS ? 1 : c.weight(c.logits[i]);
            if (amount) atomicAdd(&bins[key >> shift & 255], amount);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            // The lowest bin that holds anything, should the target be the total itself.
            int lowest = -1;
            u64 before_lowest = above;
            for (; bin >= 0; bin--) {
                if (bins[bin]) lowest = bin, before_lowest = above;
                if (above + bins[bin] > target) break;
                above += bins[bin];
            }
            if (bin < 0) bin = max(lowest, 0), above = before_lowest;
            found->key = prefix | (u32)bin << shift;
            found->above = above;
        }
        __syncthreads();
        prefix = found->key;
        above = found->above;
    }
    Found result = {prefix, above};
    return result;
}

// The `rank`-th id (from 0) among those whose key is `key`, in rising order.
__device__ u32 id_of(const Chooser& c, u32 key, u64 rank, u32* counts, u32* answer) {
    const int each = (c.vocab + THREADS - 1) / THREADS;
    const int from = threadIdx.x * each, to = min(c.vocab, from + each);
    u32 count = 0;
    for (int i = from; i < to; i++) count += key_of(c.logits[i]) == key;
    __syncthreads();
    counts[threadIdx.x] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 before = 0;
        u32 last = 0;
        *answer = NOWHERE;
        for (int i = 0; i < THREADS; i++) {
            if (counts[i]) last = i;
            if (before + counts[i] > rank) {
                *answer = i, counts[0] = (u32)(rank - before);
                break;
            }
            before += counts[i];
        }
        if (*answer == NOWHERE) *answer = last, counts[0] = 0;
    }
    __syncthreads();
    const u32 owner = *answer;
    u32 skip = counts[0];
    __syncthreads();
    if (threadIdx.x == owner) {
        for (int i = from; i < to; i++)
            if (key_of(c.logits[i]) == key && skip-- == 0) {
                *answer = i;
                break;
            }
    }
    __syncthreads();
    return *answer;
}

KERNEL __launch_bounds__(THREADS, 1) choose(const __grid_constant__ Choose p) {
    __shared__ u64 bins[256];
    __shared__ u32 counts[THREADS];
    __shared__ u64 sums[THREADS / 32];
    __shared__ u64 tops[THREADS / 32];
    __shared__ u32 answer;
    __shared__ Found found;
    const Sample s = p.samples[blockIdx.x];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    let_next_begin();
    wait_for_previous();
    if (s.out == NOWHERE) return;
    const float* logits = p.logits + (size_t)blockIdx.x * p.vocab;

    // The highest, the first of equals.
    u64 top = 0;
    if (p.parts) {
        for (int i = threadIdx.x; i < p.parts; i += THREADS)
            top = max(top, p.best[(size_t)blockIdx.x * p.parts + i]);
    } else if (p.vocab % 4 == 0) {
#pragma unroll 4
        for (int i = threadIdx.x; i < p.vocab / 4; i += THREADS) {
            float4 v = ((const float4*)logits)[i];
            top = max(max(top, ranked(v.x, 4 * i)), ranked(v.y, 4 * i + 1));
            top = max(max(top, ranked(v.z, 4 * i + 2)), ranked(v.w, 4 * i + 3));
        }
    } else {
        for (int i = threadIdx.x; i < p.vocab; i += THREADS) top = max(top, ranked(logits[i], i));
    }
    auto top_of_warp = [&]() {
#pragma unroll
        for (int i = 16; i > 0; i /= 2) top = max(top, __shfl_xor_sync(FULL_WARP, top, i));
    };
    top_of_warp();
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    top = tops[lane];
    top_of_warp();
    const u32 best_id = top ? ~(u32)top : NOWHERE;
    const float best = value_of((u32)(top >> 32));

    u32 token = best_id;
    const bool finite = best - best == 0.0f;
    if (best_id != NOWHERE && finite && s.temperature >= LEAST_TEMPERATURE &&
        s.temperature - s.temperature == 0.0f && s.top_k != 1) {
        const Chooser c = {logits, p.vocab, best, 1.0f / s.temperature};
        // 53 bits, as a number in 0..1.
        const double draw = (double)(mix(mix(s.seed) + s.position) >> 11) / 9007199254740992.0;
        const bool some = s.top_k != 0 && s.top_k < p.vocab;
        // The total weight of what top-k leaves.
        u32 least = 1;
        u64 equals = ~0ull;  // of the least key, how many belong
        if (some) {
            Found f = find<true>(c, s.top_k - 1, 1, bins, &found);
            least = max(f.key, 1u);
            equals = s.top_k - f.above;
        }
        // Of keys above `least` all, of it the first `equals`.
        u64 sum = 0;
        u32 same = 0;
        const bool by_id = !some && s.top_p >= 1.0f;
        // Warps take stretches of ids, so that their sums can be walked by id.
        const int stretch = (p.vocab + 31) / 32;
        const int from = warp * stretch, to = min(p.vocab, from + stretch);
        for (int i = from + lane; i < to; i += 32) {
            u32 key = key_of(logits[i]);
            if (key > least || (!some && key == least)) sum += c.weight(logits[i]);
            else if (key == least) same++;
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) {
            sum += __shfl_xor_sync(FULL_WARP, sum, i);
            same += __shfl_xor_sync(FULL_WARP, same, i);
        }
        __syncthreads();
        if (lane == 0) sums[warp] = sum, counts[warp] = same;
        __syncthreads();
        u64 total = 0, ties = 0;
        for (int i = 0; i < 32; i++) total += sums[i], ties += counts[i];
        float least_value = value_of(least);
        const u64 least_weight = some ? c.weight(least_value) : 0;
        if (some) total += least_weight * min(ties, equals);

        if (by_id) {
            const u64 target = (u64)(draw * (double)total);
            u64 before = 0;
            int owner = 0;
            for (; owner < 31; owner++) {
                if (before + sums[owner] > target) break;
                before += sums[owner];
            }
            __syncthreads();
            if (warp == owner) {
                u32 chosen = NOWHERE, last = best_id;
                for (int i = from; i < to && chosen == NOWHERE; i += 32) {
                    u64 w = i + lane < to ? c.weight(logits[i + lane]) : 0;
                    u64 running = w;
#pragma unroll
                    for (int d = 1; d < 32; d *= 2) {
                        u64 v = __shfl_up_sync(FULL_WARP, running, d);
                        if (lane >= d) running += v;
                    }
                    u32 passed = __ballot_sync(FULL_WARP, w && before + running > target);
                    u32 any = __ballot_sync(FULL_WARP, w != 0);
                    if (passed) chosen = i + __ffs(passed) - 1;
                    if (any) last = i + 31 - __clz(any);
                    before += __shfl_sync(FULL_WARP, running, 31);
                }
                if (lane == 0) answer = chosen == NOWHERE ? last : chosen;
            }
            __syncthreads();
            token = answer;
        } else {
            // What top-p leaves of it: the heaviest whose sum reaches its share of the total.
            u64 wanted = total;
            if (s.top_p < 1.0f) wanted = (u64)((double)fmaxf(s.top_p, 0.0f) * (double)total);
            u64 mass = total;
            if (wanted < total) {
                // The last one that belongs is where the running total reaches `wanted`.
                Found f = find<false>(c, wanted ? wanted - 1 : 0, least, bins, &found);
                float value = value_of(f.key);
                u64 w = c.weight(value);
                u64 needed = w ? (max(wanted, 1ull) - f.above + w - 1) / w : 0;
                mass = f.above + needed * w;
            }
            u64 target = min((u64)(draw * (double)mass), mass ? mass - 1 : 0);
            Found f = find<false>(c, target, least, bins, &found);
            float value = value_of(f.key);
            u64 w = c.weight(value);
            token = id_of(c, f.key, w ? (target - f.above) / w : 0, counts, &answer);
        }
    }
    if (threadIdx.x == 0) {
        // Where no logit is a number the host is told so.
        p.previous[s.slot] = token == NOWHERE ? 0 : token;
        p.out[s.out] = token;
    }
}
