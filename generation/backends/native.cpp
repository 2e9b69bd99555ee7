// The steps of drawing and answering on a CPU, each one call: (embedder + decoder) of a visual token, and a stack
// with its output layer: the depth head for a code, the decoder for a word.
//
// With a row or two a step is as fast as its weights can be read, so everything else stays out of the way: no
// operator calls, one team of threads for the whole call, weights where the model has them. R rows, B images,
// n inputs of a dot product. A row's numbers are summed in one order whatever the batch, so that an image does
// not depend on its neighbours. native.py builds this file and mirrors its structs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#include "matmul.h"

extern "C" {
struct Norm {
    const float *weight, *bias;
    double eps;
};
struct Layer {
    Norm norm1, norm2;
    Matrix query, key, value, out, gate, up, down;
    float *keys, *values;  // (rows, kv_heads, room, head)
};
struct Stack {
    const Layer* layers;
    Norm norm;
    const float *cos, *sin;  // (positions, head)
    int64_t depth, width, heads, kv_heads, head, room;
};
struct Embedder {
    const float* codebooks;  // (K, V, C), rows of length 1
    Norm attention_norm, linear_norm, mlp_norm, gate_norm, projector_norm;
    Matrix query, key, value, out, linear, gate, up, down, first, second;
    float *keys, *values;  // (images, heads, room, head)
    int64_t books, entries, code, heads, head, room, context;  // context 0: a token sees itself alone
};
}

namespace {

// The threads of one call; `meet` lets nobody on before all are there.
struct Team {
    int size;
    std::atomic<int> arrived{0}, round{0};
    explicit Team(int n) : size(n) {}
    void meet() {
        if (size == 1) return;
        int now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 4000) std::this_thread::yield();
    }
    template <class F> void run(F work) {
        std::vector<std::thread> others;
        for (int i = 1; i < size; i++) others.emplace_back([=] { work(i); });
        work(0);
        for (auto& thread : others) thread.join();
    }
};

void rms(const Norm& norm, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        vf squares = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) { vf v = load(x + i); squares += v * v; }
        float total = sum(squares);
        for (; i < n; i++) total += x[i] * x[i];
        float scale = 1 / std::sqrt(total / n + (float)norm.eps);
        for (i = 0; i < n; i++) y[i] = x[i] * scale * norm.weight[i];
    }
}

void centred(const Norm& norm, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        double mean = 0, var = 0;
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= n;
        for (int64_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / std::sqrt(var / n + norm.eps);
        for (int64_t i = 0; i < n; i++) y[i] = (x[i] - (float)mean) * scale * norm.weight[i] + norm.bias[i];
    }
}

// one query (head) over keys and values `from`..`to` inclusive -> y (head)
void attend(const float* q, const float* keys, const float* values, int64_t from, int64_t to, int64_t head, std::vector<float>& p, float* y) {
    constexpr int O = outs(1);
    int64_t count = to - from + 1;
    p.resize(std::max<size_t>(p.size(), count + 16));
    float top = -INFINITY, scale = 1 / std::sqrt((float)head);
    for (int64_t s = 0; s < count; s += O) {
        const float* k[O];
        for (int i = 0; i < O; i++) k[i] = keys + std::min(to, from + s + i) * head;
        tile<O, 1>(k, q, head, &p[s], keys + (from + s + O) * head);
    }
    for (int64_t s = 0; s < count; s++) top = std::max(top, p[s] *= scale);
    for (int64_t s = count; s < count + LANES; s++) p[s] = -INFINITY;
    vf total = {};
    for (int64_t s = 0; s < count; s += LANES) {
        vf e = exp_lanes(load(&p[s]) - top);
        for (int i = 0; i < LANES; i++) if (s + i >= count) e[i] = 0;
        total += e;
        std::memcpy(&p[s], &e, sizeof e);
    }
    float norm = 1 / sum(total);
    for (int64_t s = 0; s < count; s++) p[s] *= norm;
    values += from * head;
    int64_t i = 0;
    for (; i + 4 * LANES <= head; i += 4 * LANES) {
        vf sums[4] = {};
        for (int64_t s = 0; s < count; s++)
            for (int j = 0; j < 4; j++) sums[j] += p[s] * load(values + s * head + i + j * LANES);
        std::memcpy(y + i, sums, sizeof sums);
    }
    for (; i < head; i++) {
        y[i] = 0;
        for (int64_t s = 0; s < count; s++) y[i] += p[s] * values[s * head + i];
    }
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t head) {
    int64_t half = head / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// what to do with a product's numbers: put them into or add them onto rows of `width`
inline auto into(float* to, int64_t width) {
    return [=](int64_t r, int64_t o, const float* y, int64_t count) { std::memcpy(to + r * width + o, y, count * 4); };
}
inline auto onto(float* to, int64_t width) {
    return [=](int64_t r, int64_t o, const float* y, int64_t count) { for (int64_t i = 0; i < count; i++) to[r * width + o + i] += y[i]; };
}

struct Scratch { std::vector<float> x, p; };  // of one thread

struct Work {  // shared by the threads of a call
    std::vector<float> q, k, v, mixed, h;
    Work(int64_t rows, int64_t q, int64_t kv, int64_t h) : q(rows * q), k(rows * kv), v(rows * kv), mixed(rows * q), h(rows * h) {}
};

// x (rows, width) through all layers at cache place `slot`; row r's own places begin at starts[r], its cache is
// that of row caches[r] (or r). `last` is the matrix that follows.
void run_stack(const Stack& s, float* x, int64_t rows, int64_t slot, const int64_t* starts, const int64_t* caches, Work& w, Team& team, int me, Scratch& own, const Matrix* last) {
    int64_t qw = s.heads * s.head, kw = s.kv_heads * s.head, group = s.heads / s.kv_heads;
    own.x.resize(rows * s.width);
    auto add = onto(x, s.width);
    for (int64_t l = 0; l < s.depth; l++) {
        const Layer& layer = s.layers[l];
        rms(layer.norm1, x, rows, s.width, own.x.data());
        multiply(layer.query, &layer.key, own.x.data(), rows, me, team.size, into(w.q.data(), qw));
        multiply(layer.key, &layer.value, own.x.data(), rows, me, team.size, into(w.k.data(), kw));
        multiply(layer.value, &layer.out, own.x.data(), rows, me, team.size, into(w.v.data(), kw));
        team.meet();
        Share mine = share(rows * s.kv_heads, 1, me, team.size);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            int64_t r = i / s.kv_heads, h = i % s.kv_heads, start = starts ? starts[r] : 0;
            const float *cos = s.cos + (slot - start) * s.head, *sin = s.sin + (slot - start) * s.head;
            int64_t at = ((caches ? caches[r] : r) * s.kv_heads + h) * s.room * s.head;
            float *keys = layer.keys + at, *values = layer.values + at;
            float* k = &w.k[r * kw + h * s.head];
            rotate(k, cos, sin, s.head);
            std::memcpy(keys + slot * s.head, k, s.head * 4);
            std::memcpy(values + slot * s.head, &w.v[r * kw + h * s.head], s.head * 4);
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                float* q = &w.q[r * qw + g * s.head];
                rotate(q, cos, sin, s.head);
                attend(q, keys, values, start, slot, s.head, own.p, &w.mixed[r * qw + g * s.head]);
            }
        }
        team.meet();
        multiply(layer.out, &layer.gate, w.mixed.data(), rows, me, team.size, add);
        team.meet();
        rms(layer.norm2, x, rows, s.width, own.x.data());
        gated(layer.gate, layer.up, &layer.down, own.x.data(), rows, me, team.size, w.h.data(), [](vf v) { return silu(v); });
        team.meet();
        multiply(layer.down, l + 1 < s.depth ? &s.layers[l + 1].query : last, w.h.data(), rows, me, team.size, add);
        team.meet();
    }
}

// codes (images, K) at place `slot` -> x: one vector per image, written `copies` times
void run_embedder(const Embedder& e, const int64_t* codes, int64_t images, int64_t copies, int64_t slot, float* x, std::vector<float>& state, Work& w, Team& team, int me, Scratch& own) {
    int64_t latent = e.books * e.code, wide = e.heads * e.head, out = e.second.outputs;
    std::vector<float> latents(images * latent);
    for (int64_t b = 0; b < images; b++)
        for (int64_t k = 0; k < e.books; k++)
            std::memcpy(&latents[b * latent + k * e.code], e.codebooks + (k * e.entries + codes[b * e.books + k]) * e.code, e.code * 4);
    own.x.resize(images * std::max(latent, wide));
    centred(e.attention_norm, latents.data(), images, latent, own.x.data());
    auto add = onto(state.data(), wide);
    multiply(e.query, &e.key, own.x.data(), images, me, team.size, into(w.q.data(), wide));
    multiply(e.key, &e.value, own.x.data(), images, me, team.size, into(w.k.data(), wide));
    multiply(e.value, &e.linear, own.x.data(), images, me, team.size, into(w.v.data(), wide));
    centred(e.linear_norm, latents.data(), images, latent, own.x.data());
    multiply(e.linear, &e.out, own.x.data(), images, me, team.size, into(state.data(), wide));
    team.meet();
    Share mine = share(images * e.heads, 1, me, team.size);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        int64_t at = i / e.heads * wide + i % e.heads * e.head, place = e.context ? slot : 0;
        float *keys = e.keys + i * e.room * e.head, *values = e.values + i * e.room * e.head;
        std::memcpy(keys + place * e.head, &w.k[at], e.head * 4);
        std::memcpy(values + place * e.head, &w.v[at], e.head * 4);
        attend(&w.q[at], keys, values, 0, place, e.head, own.p, &w.mixed[at]);
    }
    team.meet();
    multiply(e.out, &e.gate, w.mixed.data(), images, me, team.size, add);
    team.meet();
    centred(e.mlp_norm, state.data(), images, wide, own.x.data());
    centred(e.gate_norm, own.x.data(), images, wide, own.x.data());
    gated(e.gate, e.up, &e.down, own.x.data(), images, me, team.size, w.h.data(), [](vf v) { return gelu_tanh(v); });
    team.meet();
    multiply(e.down, &e.first, w.h.data(), images, me, team.size, add);
    team.meet();
    centred(e.projector_norm, state.data(), images, wide, own.x.data());
    multiply(e.first, &e.second, own.x.data(), images, me, team.size, [&](int64_t r, int64_t o, const float* y, int64_t count) {
        for (int64_t i = 0; i < count; i++) w.mixed[r * out + o + i] = gelu(y[i]);
    });
    team.meet();
    multiply(e.second, &e.query, w.mixed.data(), images, me, team.size, [&](int64_t r, int64_t o, const float* y, int64_t count) {
        for (int64_t c = 0; c < copies; c++) std::memcpy(x + (c * images + r) * out + o, y, count * 4);
    });
    team.meet();
}

}  // namespace

extern "C" {

// codes (images, K) of visual token `place` -> hidden (rows, width); the decoder's cache place is `slot`
void decoder_step(const Embedder* e, const Stack* s, const int64_t* codes, int64_t images, int64_t rows, int64_t place, int64_t slot, const int64_t* starts, float* hidden, int64_t threads) {
    Team team(threads);
    int64_t qw = s->heads * s->head, wide = e->heads * e->head, most = std::max({qw, wide, s->width});
    Work work(rows, most, most, std::max(s->layers[0].gate.outputs, e->gate.outputs));
    std::vector<float> x(rows * s->width), state(images * wide);
    team.run([&](int me) {
        Scratch own;
        run_embedder(*e, codes, images, rows / images, place, x.data(), state, work, team, me, own);
        run_stack(*s, x.data(), rows, slot, starts, nullptr, work, team, me, own, &s->layers[0].query);
        if (me == 0) rms(s->norm, x.data(), rows, s->width, hidden);
    });
}

// entry (rows, width), changed, at cache place `slot` -> logits (rows, outputs)
void logits_step(const Stack* s, const Matrix* output, int64_t rows, int64_t slot, const int64_t* starts, const int64_t* caches, float* entry, float* logits, int64_t threads) {
    Team team(threads);
    Work work(rows, std::max(s->heads * s->head, s->width), s->kv_heads * s->head, s->layers[0].gate.outputs);
    team.run([&](int me) {
        Scratch own;
        run_stack(*s, entry, rows, slot, starts, caches, work, team, me, own, output);
        rms(s->norm, entry, rows, s->width, own.x.data());
        multiply(*output, &s->layers[0].query, own.x.data(), rows, me, team.size, into(logits, output->outputs));
    });
}

int64_t sizes(int which) {
    int64_t all[] = {sizeof(Matrix), sizeof(Norm), sizeof(Layer), sizeof(Stack), sizeof(Embedder)};
    return all[which];
}
}
