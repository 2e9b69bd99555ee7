// Lanes of floats, and products of weight matrices with rows of numbers, for native.cpp.
//
// R rows of x, n inputs, O outputs. A few rows are as fast as the weights can be read, many as the processor
// multiplies. Either way a row's numbers are summed in one order (lane by lane, then halves of lanes), so that it
// does not depend on its neighbours. Inputs are rounded to 16 bits where AVX-512 multiplies such numbers: those of
// bfloat16 weights with AVX512_BF16, those of int8 weights with VNNI.
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
#ifdef __AVX2__  // in a register, or gcc reads it anew for every row
#define HOLD(v) asm("" : "+v"(v))
#else
#define HOLD(v)
#endif
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));

extern "C" {
struct Matrix {  // outputs x inputs, row by row; kind 0 = float32, 1 = bfloat16, 2 = int8 with a scale per row
    const void* weight;
    const float *scale, *bias;  // or null
    int64_t outputs, inputs, kind;
};
}

namespace {

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
#if defined(__AVX512F__)
inline vf load(const uint16_t* p) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16); }
inline vf load(const int8_t* p) { return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
#elif defined(__AVX2__)  // compilers take several steps for these two
inline vf load(const uint16_t* p) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16); }
inline vf load(const int8_t* p) { return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
#else
inline vf load(const uint16_t* p) {
    vh h; std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load(const int8_t* p) {
    vb b; std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}
#endif
inline float sum(vf v) {  // by halves, which is shorter than one lane after the other
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);  // gcc makes fifty instructions of what follows
#else
    for (int half = LANES / 2; half; half /= 2) {
#ifdef __clang__
        vf other;
        for (int i = 0; i < LANES; i++) other[i] = v[i ^ half];
#else
        vi from;
        for (int i = 0; i < LANES; i++) from[i] = i ^ half;
        vf other = __builtin_shuffle(v, from);
#endif
        v += other;
    }
    return v[0];
#endif
}

// exp of lanes to 2 ulp: 2^k by the exponent bits, the rest by a polynomial on [-ln2/2, ln2/2]
inline vf exp_lanes(vf x) {
    vf low = vf{} - 87.0f, high = vf{} + 88.0f;
    x = x < low ? low : x; x = x > high ? high : x;
    vf t = x * 1.44269504f + 12582912.0f, k = t - 12582912.0f;
    vf r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vf p = r * (r * (r * (r * (r * 1.9875691e-4f + 1.3981999e-3f) + 8.3334519e-3f) + 4.1665795e-2f) + 1.6666665e-1f) + 0.5f;
    p = p * r * r + r + 1.0f;
    vi bits = (__builtin_convertvector(k, vi) + 127) << 23;
    return p * (vf)bits;
}
inline vf silu(vf x) { return x / (1.0f + exp_lanes(-x)); }
inline vf gelu_tanh(vf x) { return x / (1.0f + exp_lanes(-1.5957691216f * (x + 0.044715f * x * x * x))); }
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }

// How STEP weights of type T meet as many inputs: these are floats / unit of their row, as `put` stores them.
template <class T> struct Dot {
    typedef float In;
    typedef vf Sum;
    static constexpr int STEP = LANES;
    static float unit(const float*, int64_t) { return 1; }
    static void put(const float* x, float, In* to) { std::memcpy(to, x, sizeof(vf)); }
    static vf inputs(const In* x) { return load(x); }
    static vf weights(const T* w) { return load(w); }
    static Sum add(Sum sum, vf w, vf x) { return sum + w * x; }
    static vf lanes(Sum sum) { return sum; }
};
#ifdef __AVX512BF16__
template <> struct Dot<uint16_t> {  // pairs; inputs rounded to bfloat16, as they are in torch's products
    typedef uint16_t In;
    typedef vf Sum;
    static constexpr int STEP = 32;
    static float unit(const float*, int64_t) { return 1; }
    static void put(const float* x, float, In* to) {
        auto pairs = _mm512_cvtne2ps_pbh((__m512)load(x + 16), (__m512)load(x));
        std::memcpy(to, &pairs, sizeof pairs);
    }
    static __m512i inputs(const In* x) { return _mm512_loadu_si512(x); }
    static __m512i weights(const uint16_t* w) { return _mm512_loadu_si512(w); }
    static Sum add(Sum sum, __m512i w, __m512i x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
    static vf lanes(Sum sum) { return sum; }
};
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <> struct Dot<int8_t> {  // pairs; inputs of 16 bits, which their row's greatest fills unless sums overflow
    typedef int16_t In;
    typedef __m512i Sum;
    static constexpr int STEP = 32;
    static float unit(const float* x, int64_t n) {
        vf tops = vf{} + 1e-30f, odd = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            vf v = load(x + i);
            v = v < vf{} ? -v : v;
            tops = v > tops ? v : tops, odd += v * 0.0f;
        }
        float top = _mm512_reduce_max_ps((__m512)tops), wrong = sum(odd);  // NaN where an input is no number
        for (; i < n; i++) top = std::max(top, std::abs(x[i])), wrong += x[i] * 0.0f;
        float most = std::floor(2147483520.0f / (127 * 2 * (n / STEP + 1)));
        return top / std::min(32767.0f, most) + wrong;
    }
    static void put(const float* x, float unit, In* to) {
        for (int i = 0; i < STEP; i += LANES) {
            __m256i lanes = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load(x + i) / unit)));
            std::memcpy(to + i, &lanes, sizeof lanes);
        }
    }
    static __m512i inputs(const In* x) { return _mm512_loadu_si512(x); }
    static __m512i weights(const int8_t* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }
    static Sum add(Sum sum, __m512i w, __m512i x) { return _mm512_dpwssd_epi32(sum, w, x); }
    static vf lanes(Sum sum) { return (vf)_mm512_cvtepi32_ps(sum); }
};
#endif

// A tile is some outputs times up to GROUP rows, a strip the tiles of STRIP outputs. 32 registers hold 16 sums,
// 16 hold 12. Few rows take many outputs, so that enough loads are under way.
constexpr int GROUP = 4;
#ifdef __AVX512F__
constexpr int STRIP = 16;
constexpr int outs(int rows) { return rows == 1 ? 16 : rows == 2 ? 8 : 4; }
#else
constexpr int STRIP = 12;
constexpr int outs(int rows) { return rows == GROUP ? 3 : 4; }
#endif
typedef float Row[16];  // STRIP outputs of a row, and room for whole lanes

// y[r][o] = sum(acc[o][r]), bit for bit
template <int O, int R> INLINE void sums(const vf (&acc)[O][R], float* y) {
#if defined(__AVX512F__)
    static_assert(O * R <= 16);  // sixteen at once take 45 instructions, one alone seven
    vf v[16] = {};
    UNROLL for (int i = 0; i < O * R; i++) v[i / 4 + i % 4 * 4] = acc[i % O][i / O];
    auto halves = [](vf a, vf b) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE); };
    auto quarters = [](vf a, vf b) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD); };
    auto pairs = [](vf a, vf b) { return (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44) + (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xEE); };
    auto ones = [](vf a, vf b) { return (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88) + (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD); };
    UNROLL for (int i = 0; i < 8; i++) v[i] = halves(v[2 * i], v[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) v[i] = quarters(v[2 * i], v[2 * i + 1]);
    vf all = ones(pairs(v[0], v[1]), pairs(v[2], v[3]));
    float flat[16];
    std::memcpy(flat, &all, sizeof flat);
    UNROLL for (int r = 0; r < R; r++) std::memcpy(y + r * 16, flat + r * O, O * 4);
#else
    UNROLL for (int o = 0; o < O; o++) {
#ifdef __AVX2__
        if constexpr (R == 4) {  // the same halves of lanes, of four at once
            auto low = [](vf a, vf b) { return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20) + (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); };
            __m256 a = (__m256)low(acc[o][0], acc[o][1]), b = (__m256)low(acc[o][2], acc[o][3]);
            vf pairs = (vf)_mm256_shuffle_ps(a, b, 0x44) + (vf)_mm256_shuffle_ps(a, b, 0xEE);
            vf one = pairs + (vf)_mm256_permute_ps((__m256)pairs, 0xB1);
            y[o] = one[0], y[16 + o] = one[4], y[32 + o] = one[2], y[48 + o] = one[6];
            continue;
        }
#endif
        UNROLL for (int r = 0; r < R; r++) y[16 * r + o] = sum(acc[o][r]);
    }
#endif
}

// O rows of weights, w[o], times R packed rows of inputs -> y[r][o]. Meanwhile O rows `ahead` are fetched into the
// second cache, of a whole group those of the bits of `fetch`: rows are too short for the processor's own guesses
// (measured: two rows of fp32 take 20 ms instead of 27, of int8 3.6 instead of 8).
template <int O, int R, class T> inline void tile(const T* const* w, const typename Dot<T>::In* x, int64_t n, float* y, const T* ahead, int fetch = 0) {
    typedef Dot<T> D;
    typename D::Sum acc[O][R] = {};
    int64_t i = 0;
    for (; i + D::STEP <= n; i += D::STEP, x += R * D::STEP) {
        auto fetch_row = [&](int o) {
            if (R < GROUP || fetch >> o & 1) __builtin_prefetch(ahead + o * n + i, 0, 2);
        };
        if constexpr (R == GROUP) {  // 12 sums, 3 weights and an input are all that 16 registers hold
            decltype(D::weights(w[0])) weight[O];
            UNROLL for (int o = 0; o < O; o++) weight[o] = D::weights(w[o] + i), fetch_row(o);
            UNROLL for (int r = 0; r < R; r++) {
                auto in = D::inputs(x + r * D::STEP);
                HOLD(in);
                UNROLL for (int o = 0; o < O; o++) acc[o][r] = D::add(acc[o][r], weight[o], in);
            }
        } else {
            decltype(D::inputs(x)) in[R];
            UNROLL for (int r = 0; r < R; r++) in[r] = D::inputs(x + r * D::STEP);
            UNROLL for (int o = 0; o < O; o++) {
                auto weight = D::weights(w[o] + i);
                HOLD(weight);
                fetch_row(o);
                UNROLL for (int r = 0; r < R; r++) acc[o][r] = D::add(acc[o][r], weight, in[r]);
            }
        }
    }
    vf all[O][R];
    UNROLL for (int o = 0; o < O; o++) UNROLL for (int r = 0; r < R; r++) all[o][r] = D::lanes(acc[o][r]);
    for (int o = 0; i < n && o < O; o++)  // the rest, filled with zeros
        for (int r = 0; r < R; r++) {
            T weights[D::STEP] = {};
            typename D::In inputs[D::STEP] = {};
            std::memcpy(weights, w[o] + i, (n - i) * sizeof weights[0]);
            std::memcpy(inputs, x + r * D::STEP, (n - i) * sizeof inputs[0]);
            all[o][r] += D::lanes(D::add(typename D::Sum{}, D::weights(weights), D::inputs(inputs)));
        }
    sums<O, R>(all, y);
}

// x (rows, n) by groups of rows, step beside step, the last one filled with zeros; and the rows' units
template <class T> struct Packed {
    typedef Dot<T> D;
    std::vector<typename D::In> x;
    std::vector<float> unit;
    int64_t size;  // of a row
    Packed(const float* from, int64_t rows, int64_t n) : unit(rows), size((n + D::STEP - 1) / D::STEP * D::STEP) {
        x.resize(rows * size);
        for (int64_t r = 0; r < rows; r++) unit[r] = D::unit(from + r * n, n);
        auto* to = x.data();
        for (int64_t g = 0; g < rows; g += GROUP)
            for (int64_t i = 0; i < n; i += D::STEP)
                for (int64_t r = g; r < std::min(rows, g + GROUP); r++, to += D::STEP) {
                    float some[D::STEP] = {};
                    std::memcpy(some, from + r * n + i, std::min<int64_t>(D::STEP, n - i) * 4);
                    D::put(some, unit[r], to);
                }
    }
};

struct Share { int64_t begin, end; };
inline Share share(int64_t count, int64_t step, int me, int size) {  // whole steps
    int64_t steps = (count + step - 1) / step;
    return {std::min(count, steps * me / size * step), std::min(count, steps * (me + 1) / size * step)};
}
template <class T> const T* row(const Matrix& m, int64_t o) { return (const T*)m.weight + std::min(o, m.outputs - 1) * m.inputs; }

// outputs o .. o + STRIP of R packed rows -> y[r][i]; the strip at `next` is fetched, a part by each of the groups
template <int R, class T> inline void strip(const Matrix& m, int64_t o, const typename Dot<T>::In* x, const T* next, int64_t group, int64_t groups, Row* y) {
    constexpr int O = outs(R);
    static_assert(STRIP % O == 0);
    int fetch = 0;
    for (int j = 0; j < O; j++) fetch |= (j % groups == group) << j;
    for (int i = 0; i < STRIP; i += O) {
        const T* w[O];
        for (int j = 0; j < O; j++) w[j] = row<T>(m, o + i + j);
        tile<O, R>(w, x, m.inputs, y[0] + i, next + i * m.inputs, fetch);
    }
}

// my share of M matrices of one shape times x -> store(row, first output, numbers of each matrix, their count). At
// some hundred inputs a strip of weights stays in the second cache for all groups of rows, which lie packed in the
// first. `after` is the matrix that comes next, whose beginning is fetched at the end.
template <class T, int M, class Store> void product(const Matrix* const (&m)[M], const Matrix* after, const float* x, int64_t rows, int me, int size, Store store) {
    int64_t n = m[0]->inputs, outputs = m[0]->outputs, groups = (rows + GROUP - 1) / GROUP;
    Packed<T> packed(x, rows, n);
    Share mine = share(outputs, STRIP, me, size);
    const T* beyond = row<T>(*after, share(after->outputs, STRIP, me, size).begin);
    for (int64_t o = mine.begin; o < mine.end; o += STRIP) {
        Row scale[M] = {}, bias[M] = {};
        int64_t count = std::min<int64_t>(STRIP, outputs - o);
        for (int which = 0; which < M; which++)
            for (int64_t i = 0; i < count; i++) {
                scale[which][i] = m[which]->scale ? m[which]->scale[o + i] : 1;
                bias[which][i] = m[which]->bias ? m[which]->bias[o + i] : 0;
            }
        for (int64_t g = 0; g < groups; g++) {
            Row y[GROUP][M] = {}, dots[GROUP] = {};
            int64_t first = g * GROUP, some = std::min<int64_t>(GROUP, rows - first);
            for (int which = 0; which < M; which++) {
                const auto* in = packed.x.data() + first * packed.size;
                const T* next = o + STRIP < mine.end ? row<T>(*m[which], o + STRIP) : beyond + which * STRIP * n;
                if (some == 4) strip<4>(*m[which], o, in, next, g, groups, dots);
                else if (some == 3) strip<3>(*m[which], o, in, next, g, groups, dots);
                else if (some == 2) strip<2>(*m[which], o, in, next, g, groups, dots);
                else strip<1>(*m[which], o, in, next, g, groups, dots);
                for (int64_t r = 0; r < some; r++)
                    for (int i = 0; i < 16; i++) y[r][which][i] = dots[r][i] * packed.unit[first + r] * scale[which][i] + bias[which][i];
            }
            for (int64_t r = 0; r < some; r++) store(first + r, o, y[r], count);
        }
    }
}

template <class Run> void by_kind(const Matrix& m, Run run) {
    if (m.kind == 0) run(float()); else if (m.kind == 1) run(uint16_t()); else run(int8_t());
}

// my share of x (rows, inputs) -> store(row, first output, numbers, their count)
template <class Store> void multiply(const Matrix& m, const Matrix* after, const float* x, int64_t rows, int me, int size, Store store) {
    const Matrix* const one[1] = {&m};
    by_kind(m, [&](auto type) {
        product<decltype(type)>(one, after, x, rows, me, size, [&](int64_t r, int64_t o, const Row* y, int64_t count) {
            store(r, o, y[0], count);
        });
    });
}

// my share of act(gate x) * up x -> h (rows, outputs); `act` of lanes
template <class Act> void gated(const Matrix& gate, const Matrix& up, const Matrix* after, const float* x, int64_t rows, int me, int size, float* h, Act act) {
    const Matrix* const both[2] = {&gate, &up};
    by_kind(gate, [&](auto type) {
        product<decltype(type)>(both, after, x, rows, me, size, [&](int64_t r, int64_t o, const Row* y, int64_t count) {
            Row made;
            for (int i = 0; i < STRIP; i += LANES) {
                vf lanes = act(load(y[0] + i)) * load(y[1] + i);
                std::memcpy(made + i, &lanes, sizeof lanes);
            }
            std::memcpy(h + r * gate.outputs + o, made, count * 4);
        });
    });
}

}  // namespace
