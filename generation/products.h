// Lanes of floats, and products of weight matrices with rows of numbers, for native.cpp.
//
// R rows of x, n inputs, O outputs. A few rows are as fast as the weights can be read: each weight is loaded once
// and nothing is moved. Many rows are as fast as the processor multiplies: see `many`. Either way a row's numbers
// are summed in one order (lane by lane, then halves of lanes), so that it does not depend on its neighbours.
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
inline float value(const float* p) { return *p; }
inline float value(const uint16_t* p) { uint32_t u = uint32_t(*p) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline float value(const int8_t* p) { return *p; }
inline float sum(vf v) {  // by halves, which is shorter than one lane after the other
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
inline vf gelu_tanh(vf x) {
    for (int i = 0; i < LANES; i++) x[i] *= 0.5f * (1 + std::tanh(0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    return x;
}
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }

// O rows of weights times R rows of x
template <int O, int R, class T> inline void tile(const T* const* w, const float* x, int64_t stride, int64_t n, float* y) {
    vf acc[O][R] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf in[R];
        for (int r = 0; r < R; r++) in[r] = load(x + r * stride + i);
        for (int o = 0; o < O; o++) {
            vf weight = load(w[o] + i);
            for (int r = 0; r < R; r++) acc[o][r] += weight * in[r];
        }
    }
    for (int o = 0; o < O; o++)
        for (int r = 0; r < R; r++) {
            float total = sum(acc[o][r]);
            for (int64_t j = i; j < n; j++) total += value(w[o] + j) * x[r * stride + j];
            y[o * R + r] = total;
        }
}

// few rows: four outputs at a time
template <class T, class Store> void few(const T* const* w, const float* x, int64_t rows, int64_t n, Store store) {
    float y[12];
    for (int64_t r = 0; r < rows;) {
        int64_t left = rows - r;
        int take = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
        if (take == 3) tile<4, 3>(w, x + r * n, n, n, y);
        else if (take == 2) tile<4, 2>(w, x + r * n, n, n, y);
        else tile<4, 1>(w, x + r * n, n, n, y);
        for (int o = 0; o < 4; o++)
            for (int i = 0; i < take; i++) store(r + i, o, y[take * o + i]);
        r += take;
    }
}

template <class T> const T* row(const Matrix& m, int64_t o) { return (const T*)m.weight + std::min(o, m.outputs - 1) * m.inputs; }
inline float finish(const Matrix& m, int64_t o, float y) {
    return (m.scale ? y * m.scale[o] : y) + (m.bias ? m.bias[o] : 0);
}

struct Share { int64_t begin, end; };
inline Share share(int64_t count, int64_t step, int me, int size) {  // whole steps
    int64_t steps = (count + step - 1) / step;
    return {std::min(count, steps * me / size * step), std::min(count, steps * (me + 1) / size * step)};
}

// Many rows. A tile is OUTS outputs times GROUP rows: 12 sums, 3 weights and an input fill 16 registers. The rows of
// a group lie packed, lane beside lane, in the first cache; a block of weights stays in the second for all groups,
// and the next block is fetched meanwhile. Weights of two bytes or one are widened in the tile, which is free
// beside the multiplications (unpacking them first is a fifth slower, measured).
constexpr int OUTS = 3, GROUP = 4;
constexpr int64_t BLOCK_BYTES = 16 << 10;

inline bool is_many(int64_t rows, int64_t n) { return rows >= GROUP && n % LANES == 0; }

inline const float* pack(const float* x, int64_t rows, int64_t n, std::vector<float>& spare) {
    spare.resize(std::max<size_t>(spare.size(), rows * n));
    float* to = spare.data();
    for (int64_t g = 0; g < rows; g += GROUP)
        for (int64_t i = 0; i < n; i += LANES)
            for (int64_t r = g; r < std::min(rows, g + GROUP); r++, to += LANES) std::memcpy(to, x + r * n + i, sizeof(vf));
    return spare.data();
}

// y[r] = sum(acc[r]), bit for bit
template <int R> inline void sums(const vf* acc, float* y) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (R == 4) {  // the same halves of lanes, of four at once
        auto low = [](vf a, vf b) { return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20) + (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); };
        __m256 a = (__m256)low(acc[0], acc[1]), b = (__m256)low(acc[2], acc[R - 1]);
        vf pairs = (vf)_mm256_shuffle_ps(a, b, 0x44) + (vf)_mm256_shuffle_ps(a, b, 0xEE);
        vf one = pairs + (vf)_mm256_permute_ps((__m256)pairs, 0xB1);
        y[0] = one[0], y[1] = one[4], y[2] = one[2], y[R - 1] = one[6];
        return;
    }
#endif
    for (int r = 0; r < R; r++) y[r] = sum(acc[r]);
}

typedef float Tile[16];  // OUTS x GROUP numbers, and room for whole lanes

template <int R, class T> inline void group_tile(const T* const* w, const float* x, int64_t n, float* y) {
    vf acc[OUTS][R] = {};
    const T *w0 = w[0], *w1 = w[1], *w2 = w[2];
    for (int64_t i = 0; i < n; i += LANES, x += R * LANES) {
        vf a = load(w0 + i), b = load(w1 + i), c = load(w2 + i);
        for (int r = 0; r < R; r++) {
            vf in = load(x + r * LANES);
            acc[0][r] += a * in; acc[1][r] += b * in; acc[2][r] += c * in;
        }
    }
    for (int o = 0; o < OUTS; o++) sums<R>(acc[o], y + o * GROUP);
}

// my share of M matrices of one shape times x -> store(first row, rows, first output, sums of the M tiles);
// `after` is the matrix that comes next, whose beginning is fetched at the end
template <class T, int M, class Store> void many(const Matrix* const (&m)[M], const Matrix* after, const float* x, int64_t rows, int me, int size, std::vector<float>& spare, Store store) {
    int64_t n = m[0]->inputs, outputs = m[0]->outputs, groups = (rows + GROUP - 1) / GROUP;
    const float* packed = pack(x, rows, n, spare);
    int64_t block = std::max<int64_t>(1, BLOCK_BYTES / (OUTS * M * n * sizeof(T))) * OUTS, part = OUTS * n * sizeof(T) / groups;
    Share mine = share(outputs, OUTS, me, size);
    const char* beyond = (const char*)row<T>(*after, share(after->outputs, OUTS, me, size).begin);
    for (int64_t from = mine.begin; from < mine.end; from += block)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t o = from; o < std::min(mine.end, from + block); o += OUTS) {
                Tile y[M] = {};
                int64_t count = std::min<int64_t>(GROUP, rows - g * GROUP);
                for (int which = 0; which < M; which++) {
                    const T* w[OUTS] = {row<T>(*m[which], o), row<T>(*m[which], o + 1), row<T>(*m[which], o + 2)};
                    const char* next = (const char*)row<T>(*m[which], o + block);
                    if (o + block >= mine.end) next = beyond + (o - from + which * OUTS) * n * sizeof(T);
                    for (int64_t i = 0; i < part; i += 64) __builtin_prefetch(next + g * part + i, 0, 2);
                    const float* in = packed + g * GROUP * n;
                    if (count == 4) group_tile<4>(w, in, n, y[which]);
                    else if (count == 3) group_tile<3>(w, in, n, y[which]);
                    else if (count == 2) group_tile<2>(w, in, n, y[which]);
                    else group_tile<1>(w, in, n, y[which]);
                    for (int i = 0; i < OUTS * GROUP; i++) y[which][i] = finish(*m[which], std::min(o + i / GROUP, outputs - 1), y[which][i]);
                }
                store(g * GROUP, count, o, y);
            }
}

// my share of x (rows, inputs) -> store(row, output, value); `after` as above
template <class Store> void multiply(const Matrix& m, const Matrix* after, const float* x, int64_t rows, int me, int size, std::vector<float>& spare, Store store) {
    auto run = [&](auto type) {
        using T = decltype(type);
        const Matrix* const all[1] = {&m};
        if (is_many(rows, m.inputs)) return many<T>(all, after, x, rows, me, size, spare, [&](int64_t r, int64_t count, int64_t o, Tile* y) {
            for (int64_t i = 0; i < std::min<int64_t>(OUTS, m.outputs - o); i++)
                for (int64_t j = 0; j < count; j++) store(r + j, o + i, y[0][i * GROUP + j]);
        });
        Share mine = share(m.outputs, 4, me, size);
        for (int64_t o = mine.begin; o < mine.end; o += 4) {
            const T* w[4] = {row<T>(m, o), row<T>(m, o + 1), row<T>(m, o + 2), row<T>(m, o + 3)};
            few(w, x, rows, m.inputs, [&](int64_t r, int i, float y) {
                if (o + i < m.outputs) store(r, o + i, finish(m, o + i, y));
            });
        }
    };
    if (m.kind == 0) run(float()); else if (m.kind == 1) run(uint16_t()); else run(int8_t());
}

// my share of act(gate x) * up x -> h (rows, outputs); `act` of lanes
template <class Act> void gated(const Matrix& gate, const Matrix& up, const Matrix* after, const float* x, int64_t rows, int me, int size, std::vector<float>& spare, float* h, Act act) {
    auto run = [&](auto type) {
        using T = decltype(type);
        const Matrix* const both[2] = {&gate, &up};
        if (is_many(rows, gate.inputs)) return many<T>(both, after, x, rows, me, size, spare, [&](int64_t r, int64_t count, int64_t o, Tile* y) {
            for (int i = 0; i < OUTS * GROUP; i += LANES) {
                vf product = act(load(y[0] + i)) * load(y[1] + i);
                std::memcpy(y[0] + i, &product, sizeof product);
            }
            for (int64_t i = 0; i < std::min<int64_t>(OUTS, gate.outputs - o); i++)
                for (int64_t j = 0; j < count; j++) h[(r + j) * gate.outputs + o + i] = y[0][i * GROUP + j];
        });
        Share mine = share(gate.outputs, 2, me, size);
        for (int64_t o = mine.begin; o < mine.end; o += 2) {
            const T* w[4] = {row<T>(gate, o), row<T>(gate, o + 1), row<T>(up, o), row<T>(up, o + 1)};
            few(w, x, rows, gate.inputs, [&](int64_t r, int i, float y) {
                int64_t at = o + i % 2;
                if (at >= gate.outputs) return;
                float* to = h + r * gate.outputs + at;
                if (i < 2) *to = act(vf{} + finish(gate, at, y))[0]; else *to *= finish(up, at, y);
            });
        }
    };
    if (gate.kind == 0) run(float()); else if (gate.kind == 1) run(uint16_t()); else run(int8_t());
}

}  // namespace
