// SIMD vectors and GEMM (GEMV for one row) over float32, bfloat16 and int8 weights, for native.cpp.
//
// R rows of x, n inputs, O outputs. Few rows are bound by memory bandwidth, many by arithmetic. In both cases a
// row is accumulated in the same order (per lane, then halves of lanes), so results do not depend on the batch.
// Inputs are rounded to 16 bits if the processor has instructions for it: AVX512_BF16 for bfloat16 weights, AVX2
// or VNNI for int8 weights.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#ifdef __AVX2__  // keeps a value in a register: gcc would reload it for every row
#define KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v)
#endif
typedef float vf32 __attribute__((vector_size(LANES * 4)));
typedef int32_t vi32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t vu16 __attribute__((vector_size(LANES * 2)));
typedef int8_t vi8 __attribute__((vector_size(LANES)));

extern "C" {
// (outputs, inputs), row-major; dtype 0 = float32, 1 = bfloat16, 2 = int8 with a scale per row
struct Matrix {
    const void* weight;
    const float *scale, *bias;  // or null
    int64_t outputs, inputs, dtype;
};
}

namespace {

// Dequantize-on-load: LANES weights of any dtype as float32.
inline vf32 load(const float* p) { vf32 v; std::memcpy(&v, p, sizeof v); return v; }
#if defined(__AVX512F__)
inline vf32 load(const uint16_t* p) {
    return (vf32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline vf32 load(const int8_t* p) {
    return (vf32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#elif defined(__AVX2__)  // compilers generate several instructions for the generic code below
inline vf32 load(const uint16_t* p) {
    return (vf32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline vf32 load(const int8_t* p) {
    return (vf32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#else
inline vf32 load(const uint16_t* p) {
    vu16 h; std::memcpy(&h, p, sizeof h);
    return (vf32)(__builtin_convertvector(h, vu32) << 16);
}
inline vf32 load(const int8_t* p) {
    vi8 b; std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi32), vf32);
}
#endif
inline float horizontal_sum(vf32 v) {  // by halves: log2(LANES) steps
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);  // gcc generates fifty instructions for the generic code
#else
    for (int half = LANES / 2; half; half /= 2) {
#ifdef __clang__
        vf32 other;
        for (int i = 0; i < LANES; i++) other[i] = v[i ^ half];
#else
        vi32 from;
        for (int i = 0; i < LANES; i++) from[i] = i ^ half;
        vf32 other = __builtin_shuffle(v, from);
#endif
        v += other;
    }
    return v[0];
#endif
}

// exp to 2 ulp: 2^k by the exponent bits times a polynomial on [-ln2/2, ln2/2] (Cephes' expf)
inline vf32 exp_lanes(vf32 x) {
    vf32 low = vf32{} - 87.0f, high = vf32{} + 88.0f;
    x = x < low ? low : x; x = x > high ? high : x;
    vf32 t = x * 1.44269504f + 12582912.0f, k = t - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    vf32 r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vf32 p = r * (r * (r * (r * (r * 1.9875691e-4f + 1.3981999e-3f) + 8.3334519e-3f) + 4.1665795e-2f)
                  + 1.6666665e-1f) + 0.5f;
    p = p * r * r + r + 1.0f;
    vi32 bits = (__builtin_convertvector(k, vi32) + 127) << 23;
    return p * (vf32)bits;
}
inline vf32 silu(vf32 x) { return x / (1.0f + exp_lanes(-x)); }
inline vf32 gelu_tanh(vf32 x) {
    return x / (1.0f + exp_lanes(-1.5957691216f * (x + 0.044715f * x * x * x)));
}
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }

// The dot product of STEP weights of type T with STEP packed inputs. An input is stored as x / input_scale, with
// one scale per row, in the type of the multiply-add instruction.
template <class T> struct Dot {
    typedef float Input;
    typedef vf32 Accumulator;
    static constexpr int STEP = LANES;
    static float input_scale(const float*, int64_t) { return 1; }
    static void pack(const float* x, float, Input* to) { std::memcpy(to, x, sizeof(vf32)); }
    static vf32 load_inputs(const Input* x) { return load(x); }
    static vf32 load_weights(const T* w) { return load(w); }
    static Accumulator multiply_add(Accumulator sum, vf32 w, vf32 x) { return sum + w * x; }
    static vf32 to_float(Accumulator sum) { return sum; }
};
#ifdef __AVX512BF16__
template <> struct Dot<uint16_t> {  // pairs; inputs rounded to bfloat16, as torch does
    typedef uint16_t Input;
    typedef vf32 Accumulator;
    static constexpr int STEP = 32;
    static float input_scale(const float*, int64_t) { return 1; }
    static void pack(const float* x, float, Input* to) {
        auto pairs = _mm512_cvtne2ps_pbh((__m512)load(x + 16), (__m512)load(x));
        std::memcpy(to, &pairs, sizeof pairs);
    }
    static __m512i load_inputs(const Input* x) { return _mm512_loadu_si512(x); }
    static __m512i load_weights(const uint16_t* w) { return _mm512_loadu_si512(w); }
    static Accumulator multiply_add(Accumulator sum, __m512i w, __m512i x) {
        return (vf32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
    static vf32 to_float(Accumulator sum) { return sum; }
};
#endif
#if defined(__AVX2__)
// Int8 weights times inputs quantized to int16, by instructions that add pairs of products to int32 lanes: the
// scale of n inputs, so that these sums cannot overflow.
inline float int16_scale(const float* x, int64_t n, int64_t step) {
    vf32 tops = vf32{} + 1e-30f, odd = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf32 v = load(x + i);
        v = v < vf32{} ? -v : v;
        tops = v > tops ? v : tops, odd += v * 0.0f;
    }
    float top = 0, nan = horizontal_sum(odd);  // NaN if an input is not finite, else 0
    for (int lane = 0; lane < LANES; lane++) top = std::max(top, tops[lane]);
    for (; i < n; i++) top = std::max(top, std::abs(x[i])), nan += x[i] * 0.0f;
    // an int32 lane adds two products of up to 127 * limit per step
    float limit = std::floor(2147483520.0f / (127 * 2 * (n / step + 1)));
    return top / std::min(32767.0f, limit) + nan;
}
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <> struct Dot<int8_t> {
    typedef int16_t Input;
    typedef __m512i Accumulator;
    static constexpr int STEP = 32;
    static float input_scale(const float* x, int64_t n) { return int16_scale(x, n, STEP); }
    static void pack(const float* x, float scale, Input* to) {
        for (int i = 0; i < STEP; i += LANES) {
            __m256i lanes = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load(x + i) / scale)));
            std::memcpy(to + i, &lanes, sizeof lanes);
        }
    }
    static __m512i load_inputs(const Input* x) { return _mm512_loadu_si512(x); }
    static __m512i load_weights(const int8_t* w) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
    }
    static Accumulator multiply_add(Accumulator sum, __m512i w, __m512i x) {
        return _mm512_dpwssd_epi32(sum, w, x);
    }
    static vf32 to_float(Accumulator sum) { return (vf32)_mm512_cvtepi32_ps(sum); }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <> struct Dot<int8_t> {
    typedef int16_t Input;
    typedef __m256i Accumulator;
    static constexpr int STEP = 16;
    static float input_scale(const float* x, int64_t n) { return int16_scale(x, n, STEP); }
    static void pack(const float* x, float scale, Input* to) {
        __m256i low = _mm256_cvtps_epi32((__m256)(load(x) / scale));
        __m256i high = _mm256_cvtps_epi32((__m256)(load(x + LANES) / scale));
        // packs works on halves: 0 to 3, 8 to 11, 4 to 7, 12 to 15
        __m256i lanes = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        std::memcpy(to, &lanes, sizeof lanes);
    }
    static __m256i load_inputs(const Input* x) { return _mm256_loadu_si256((const __m256i*)x); }
    static __m256i load_weights(const int8_t* w) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
    }
    static Accumulator multiply_add(Accumulator sum, __m256i w, __m256i x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
    }
    static vf32 to_float(Accumulator sum) { return (vf32)_mm256_cvtepi32_ps(sum); }
};
#endif

// Register tile: tile_outputs(rows) outputs times up to TILE_ROWS rows. AVX-512's 32 registers hold 16
// accumulators, AVX2's 16 hold 12. With few rows a tile has more outputs, so that enough loads are in flight.
// BLOCK: outputs of several tiles.
constexpr int TILE_ROWS = 4;
#ifdef __AVX512F__
constexpr int BLOCK = 16;
constexpr int tile_outputs(int rows) { return rows == 1 ? 16 : rows == 2 ? 8 : 4; }
#else
constexpr int BLOCK = 12;
constexpr int tile_outputs(int rows) { return rows == TILE_ROWS ? 3 : 4; }
#endif
typedef float BlockRow[16];  // BLOCK outputs of one row, padded to whole vectors

// y[r][o] = horizontal_sum(acc[o][r]) for a whole tile, bitwise equal
template <int O, int R> INLINE void reduce_tile(const vf32 (&acc)[O][R], float* y) {
#if defined(__AVX512F__)
    static_assert(O * R <= 16);  // a 16 x 16 transpose-add takes 45 instructions, a single sum seven
    vf32 v[16] = {};
    UNROLL for (int i = 0; i < O * R; i++) v[i / 4 + i % 4 * 4] = acc[i % O][i / O];
    auto halves = [](vf32 a, vf32 b) {
        return (vf32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44)
            + (vf32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE);
    };
    auto quarters = [](vf32 a, vf32 b) {
        return (vf32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88)
            + (vf32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD);
    };
    auto pairs = [](vf32 a, vf32 b) {
        return (vf32)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44)
            + (vf32)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xEE);
    };
    auto singles = [](vf32 a, vf32 b) {
        return (vf32)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88)
            + (vf32)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD);
    };
    UNROLL for (int i = 0; i < 8; i++) v[i] = halves(v[2 * i], v[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) v[i] = quarters(v[2 * i], v[2 * i + 1]);
    vf32 all = singles(pairs(v[0], v[1]), pairs(v[2], v[3]));
    float flat[16];
    std::memcpy(flat, &all, sizeof flat);
    UNROLL for (int r = 0; r < R; r++) std::memcpy(y + r * 16, flat + r * O, O * 4);
#else
    UNROLL for (int o = 0; o < O; o++) {
#ifdef __AVX2__
        if constexpr (R == 4) {  // the same order of additions, for four accumulators at once
            auto low = [](vf32 a, vf32 b) {
                return (vf32)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20)
                    + (vf32)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
            };
            __m256 a = (__m256)low(acc[o][0], acc[o][1]), b = (__m256)low(acc[o][2], acc[o][3]);
            vf32 pairs = (vf32)_mm256_shuffle_ps(a, b, 0x44) + (vf32)_mm256_shuffle_ps(a, b, 0xEE);
            vf32 one = pairs + (vf32)_mm256_permute_ps((__m256)pairs, 0xB1);
            y[o] = one[0], y[16 + o] = one[4], y[32 + o] = one[2], y[48 + o] = one[6];
            continue;
        }
#endif
        UNROLL for (int r = 0; r < R; r++) y[16 * r + o] = horizontal_sum(acc[o][r]);
    }
#endif
}

// One register tile: O weight rows w[o] times R packed input rows -> y[r][o].
//
// O weight rows at `ahead` are prefetched into L2; with TILE_ROWS rows only those whose bit is set in
// `prefetch_mask`. Weight rows are too short for the hardware prefetcher (measured for two rows of x: 20 ms
// instead of 27 with fp32 weights, 3.6 instead of 8 with int8).
template <int O, int R, class T>
inline void gemm_tile(
    const T* const* w, const typename Dot<T>::Input* x, int64_t n, float* y, const T* ahead,
    int prefetch_mask = 0
) {
    typedef Dot<T> D;
    typename D::Accumulator acc[O][R] = {};
    int64_t i = 0;
    for (; i + D::STEP <= n; i += D::STEP, x += R * D::STEP) {
        auto prefetch = [&](int o) {
            if (R < TILE_ROWS || prefetch_mask >> o & 1) __builtin_prefetch(ahead + o * n + i, 0, 2);
        };
        if constexpr (R == TILE_ROWS) {  // 12 accumulators, 3 weights and an input fill 16 registers
            decltype(D::load_weights(w[0])) weight[O];
            UNROLL for (int o = 0; o < O; o++) weight[o] = D::load_weights(w[o] + i), prefetch(o);
            UNROLL for (int r = 0; r < R; r++) {
                auto in = D::load_inputs(x + r * D::STEP);
                KEEP_IN_REGISTER(in);
                UNROLL for (int o = 0; o < O; o++) acc[o][r] = D::multiply_add(acc[o][r], weight[o], in);
            }
        } else {
            decltype(D::load_inputs(x)) in[R];
            UNROLL for (int r = 0; r < R; r++) in[r] = D::load_inputs(x + r * D::STEP);
            UNROLL for (int o = 0; o < O; o++) {
                auto weight = D::load_weights(w[o] + i);
                KEEP_IN_REGISTER(weight);
                prefetch(o);
                UNROLL for (int r = 0; r < R; r++) acc[o][r] = D::multiply_add(acc[o][r], weight, in[r]);
            }
        }
    }
    vf32 all[O][R];
    UNROLL for (int o = 0; o < O; o++) UNROLL for (int r = 0; r < R; r++) all[o][r] = D::to_float(acc[o][r]);
    for (int o = 0; i < n && o < O; o++)  // the last n % STEP inputs, padded with zeros
        for (int r = 0; r < R; r++) {
            T weights[D::STEP] = {};
            typename D::Input inputs[D::STEP] = {};
            std::memcpy(weights, w[o] + i, (n - i) * sizeof weights[0]);
            std::memcpy(inputs, x + r * D::STEP, (n - i) * sizeof inputs[0]);
            auto sum = D::multiply_add(
                typename D::Accumulator{}, D::load_weights(weights), D::load_inputs(inputs));
            all[o][r] += D::to_float(sum);
        }
    reduce_tile<O, R>(all, y);
}

// x (rows, n) packed for gemm_tile: groups of TILE_ROWS rows, interleaved by steps and padded with zeros; and the
// input scale of each row
template <class T> struct PackedRows {
    typedef Dot<T> D;
    std::vector<typename D::Input> x;
    std::vector<float> scale;
    int64_t stride;  // padded length of a row
    PackedRows(const float* from, int64_t rows, int64_t n)
        : scale(rows), stride((n + D::STEP - 1) / D::STEP * D::STEP) {
        x.resize(rows * stride);
        for (int64_t r = 0; r < rows; r++) scale[r] = D::input_scale(from + r * n, n);
        auto* to = x.data();
        for (int64_t g = 0; g < rows; g += TILE_ROWS)
            for (int64_t i = 0; i < n; i += D::STEP)
                for (int64_t r = g; r < std::min(rows, g + TILE_ROWS); r++, to += D::STEP) {
                    float step[D::STEP] = {};
                    std::memcpy(step, from + r * n + i, std::min<int64_t>(D::STEP, n - i) * 4);
                    D::pack(step, scale[r], to);
                }
    }
};

struct Range { int64_t begin, end; };
// the part of `count` items for thread `thread` of `threads`, in multiples of `step`
inline Range thread_range(int64_t count, int64_t step, int thread, int threads) {
    int64_t steps = (count + step - 1) / step;
    return {
        std::min(count, steps * thread / threads * step),
        std::min(count, steps * (thread + 1) / threads * step),
    };
}
// clamped to the last row: a partial block computes outputs that are not stored
template <class T> const T* weight_row(const Matrix& m, int64_t o) {
    return (const T*)m.weight + std::min(o, m.outputs - 1) * m.inputs;
}

// outputs o .. o + BLOCK of R packed rows -> y[r][i]; each of the `groups` of rows prefetches a part of the next
// block, so that every weight is prefetched once
template <int R, class T>
inline void gemm_block(
    const Matrix& m, int64_t o, const typename Dot<T>::Input* x, const T* next, int64_t group,
    int64_t groups, BlockRow* y
) {
    constexpr int O = tile_outputs(R);
    static_assert(BLOCK % O == 0);
    int prefetch_mask = 0;
    for (int j = 0; j < O; j++) prefetch_mask |= (j % groups == group) << j;
    for (int i = 0; i < BLOCK; i += O) {
        const T* w[O];
        for (int j = 0; j < O; j++) w[j] = weight_row<T>(m, o + i + j);
        gemm_tile<O, R>(w, x, m.inputs, y[0] + i, next + i * m.inputs, prefetch_mask);
    }
}

// A thread's part of M matrices of one shape times x: calls store(row, first output, BlockRow[M], count).
//
// With some hundred inputs a block of weights stays in L2 for all groups of rows, and a packed group in L1.
// `after` is the matrix used next; its first block is prefetched at the end.
template <class T, int M, class Store>
void gemm(
    const Matrix* const (&m)[M], const Matrix* after, const float* x, int64_t rows, int thread, int threads,
    Store store
) {
    int64_t n = m[0]->inputs, outputs = m[0]->outputs, groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
    PackedRows<T> packed(x, rows, n);
    Range mine = thread_range(outputs, BLOCK, thread, threads);
    const T* beyond = weight_row<T>(*after, thread_range(after->outputs, BLOCK, thread, threads).begin);
    for (int64_t o = mine.begin; o < mine.end; o += BLOCK) {
        BlockRow scale[M] = {}, bias[M] = {};
        int64_t count = std::min<int64_t>(BLOCK, outputs - o);
        for (int which = 0; which < M; which++)
            for (int64_t i = 0; i < count; i++) {
                scale[which][i] = m[which]->scale ? m[which]->scale[o + i] : 1;
                bias[which][i] = m[which]->bias ? m[which]->bias[o + i] : 0;
            }
        for (int64_t g = 0; g < groups; g++) {
            BlockRow y[TILE_ROWS][M] = {}, dots[TILE_ROWS] = {};
            int64_t first = g * TILE_ROWS, size = std::min<int64_t>(TILE_ROWS, rows - first);
            for (int which = 0; which < M; which++) {
                const auto* in = packed.x.data() + first * packed.stride;
                const T* next = o + BLOCK < mine.end ? weight_row<T>(*m[which], o + BLOCK)
                                                     : beyond + which * BLOCK * n;
                if (size == 4) gemm_block<4>(*m[which], o, in, next, g, groups, dots);
                else if (size == 3) gemm_block<3>(*m[which], o, in, next, g, groups, dots);
                else if (size == 2) gemm_block<2>(*m[which], o, in, next, g, groups, dots);
                else gemm_block<1>(*m[which], o, in, next, g, groups, dots);
                for (int64_t r = 0; r < size; r++)
                    for (int i = 0; i < 16; i++)
                        y[r][which][i] =
                            dots[r][i] * packed.scale[first + r] * scale[which][i] + bias[which][i];
            }
            for (int64_t r = 0; r < size; r++) store(first + r, o, y[r], count);
        }
    }
}

template <class Run> void dispatch_dtype(const Matrix& m, Run run) {
    if (m.dtype == 0) run(float()); else if (m.dtype == 1) run(uint16_t()); else run(int8_t());
}

// A thread's part of the linear layer m on x (rows, inputs): calls store(row, first output, values, count).
template <class Store>
void linear(
    const Matrix& m, const Matrix* after, const float* x, int64_t rows, int thread, int threads, Store store
) {
    const Matrix* const one[1] = {&m};
    dispatch_dtype(m, [&](auto type) {
        gemm<decltype(type)>(
            one, after, x, rows, thread, threads,
            [&](int64_t r, int64_t o, const BlockRow* y, int64_t count) { store(r, o, y[0], count); });
    });
}

// A thread's part of activation(gate x) * (up x) -> h (rows, outputs); `activation` of a vector of lanes.
template <class Activation>
void gated_linear(
    const Matrix& gate, const Matrix& up, const Matrix* after, const float* x, int64_t rows, int thread,
    int threads, float* h, Activation activation
) {
    const Matrix* const both[2] = {&gate, &up};
    auto store = [&](int64_t r, int64_t o, const BlockRow* y, int64_t count) {
        BlockRow product;
        for (int i = 0; i < BLOCK; i += LANES) {
            vf32 lanes = activation(load(y[0] + i)) * load(y[1] + i);
            std::memcpy(product + i, &lanes, sizeof lanes);
        }
        std::memcpy(h + r * gate.outputs + o, product, count * 4);
    };
    dispatch_dtype(gate, [&](auto type) {
        gemm<decltype(type)>(both, after, x, rows, thread, threads, store);
    });
}

}  // namespace
