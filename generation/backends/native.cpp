// Decoding on a CPU, one call per step: decode_step feeds a visual token (embedder and decoder); logits_step
// runs LLaMA layers with an output layer (the depth head for a code, the decoder for a text token).
//
// With one or two rows a step is bound by reading the weights. Therefore there is no operator dispatch, one team
// of threads runs the whole call, and weights are read from the model's memory. Rows are accumulated in the same
// order for every batch size, so an image does not depend on the rest of its batch.
// native_library.py compiles this file and mirrors its structs.
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
    Norm attention_norm, mlp_norm;
    Matrix query, key, value, out, gate, up, down;
    float *keys, *values;  // KV cache: (rows, kv_heads, capacity, head_dim)
};
struct Stack {
    const Layer* layers;
    Norm norm;
    const float *cos, *sin;  // RoPE tables: (positions, head_dim)
    int64_t depth, width, heads, kv_heads, head_dim, capacity;
};
struct Embedder {
    const float* codebooks;  // (K, V, C), normalised rows (VisualEmbedder.code_table)
    Norm attention_norm, linear_norm, mlp_norm, gate_norm, projector_norm;
    Matrix query, key, value, out, linear, gate, up, down, first, second;
    float *keys, *values;  // KV cache: (images, heads, capacity, head_dim)
    const float* places;   // (N, outputs), added to visual token n (VisualEmbedder.place_table), or null
    int64_t books, entries, code_dim, heads, head_dim, capacity;
    int64_t attends_to_earlier;  // 0: a visual token attends only to itself (visual_context "last")
    int64_t sums_rows;  // 0: the K rows of a token are concatenated, 1: they are added
};
}

namespace {

// The threads of one call; `barrier` spins, because phases are too short for a system call.
struct ThreadTeam {
    int size;
    std::atomic<int> arrived{0}, round{0};
    explicit ThreadTeam(int n) : size(n) {}
    void barrier() {
        if (size == 1) return;
        int now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 4000) std::this_thread::yield();  // more threads than free cores
    }
    template <class F> void run(F work) {
        std::vector<std::thread> others;
        for (int i = 1; i < size; i++) others.emplace_back([=] { work(i); });
        work(0);
        for (auto& thread : others) thread.join();
    }
};

void rms_norm(const Norm& norm, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        vf32 squares = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) { vf32 v = load(x + i); squares += v * v; }
        float total = horizontal_sum(squares);
        for (; i < n; i++) total += x[i] * x[i];
        float scale = 1 / std::sqrt(total / n + (float)norm.eps);
        for (i = 0; i < n; i++) y[i] = x[i] * scale * norm.weight[i];
    }
}

// sums in double: the scalar loops would lose accuracy in float
void layer_norm(const Norm& norm, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        double mean = 0, var = 0;
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= n;
        for (int64_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / std::sqrt(var / n + norm.eps);
        for (int64_t i = 0; i < n; i++) y[i] = (x[i] - (float)mean) * scale * norm.weight[i] + norm.bias[i];
    }
}

// Attention of one query (head_dim) over cache entries first..last inclusive -> y (head_dim).
void attention(
    const float* q, const float* keys, const float* values, int64_t first, int64_t last, int64_t head_dim,
    std::vector<float>& scores, float* y
) {
    constexpr int O = tile_outputs(1);
    int64_t count = last - first + 1;
    scores.resize(std::max<size_t>(scores.size(), count + 16));
    float top = -INFINITY, scale = 1 / std::sqrt((float)head_dim);
    // scores: the keys are the weight rows of a GEMV
    for (int64_t s = 0; s < count; s += O) {
        const float* k[O];
        for (int i = 0; i < O; i++) k[i] = keys + std::min(last, first + s + i) * head_dim;
        gemm_tile<O, 1>(k, q, head_dim, &scores[s], keys + (first + s + O) * head_dim);
    }
    // softmax; lanes after the last score are -inf, then 0
    for (int64_t s = 0; s < count; s++) top = std::max(top, scores[s] *= scale);
    for (int64_t s = count; s < count + LANES; s++) scores[s] = -INFINITY;
    vf32 total = {};
    for (int64_t s = 0; s < count; s += LANES) {
        vf32 e = exp_lanes(load(&scores[s]) - top);
        for (int i = 0; i < LANES; i++) if (s + i >= count) e[i] = 0;
        total += e;
        std::memcpy(&scores[s], &e, sizeof e);
    }
    float norm = 1 / horizontal_sum(total);
    for (int64_t s = 0; s < count; s++) scores[s] *= norm;
    // weighted sum of the values
    values += first * head_dim;
    int64_t i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES) {
        vf32 sums[4] = {};
        for (int64_t s = 0; s < count; s++)
            for (int j = 0; j < 4; j++) sums[j] += scores[s] * load(values + s * head_dim + i + j * LANES);
        std::memcpy(y + i, sums, sizeof sums);
    }
    for (; i < head_dim; i++) {
        y[i] = 0;
        for (int64_t s = 0; s < count; s++) y[i] += scores[s] * values[s * head_dim + i];
    }
}

// LLaMA's RoPE in place: channel i is rotated with channel i + head_dim / 2.
inline void apply_rope(float* x, const float* cos, const float* sin, int64_t head_dim) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Store functions for `linear`: write outputs to, or add them to, rows of `width`.
inline auto write_to(float* to, int64_t width) {
    return [=](int64_t r, int64_t o, const float* y, int64_t count) {
        std::memcpy(to + r * width + o, y, count * 4);
    };
}
inline auto add_to(float* to, int64_t width) {
    return [=](int64_t r, int64_t o, const float* y, int64_t count) {
        for (int64_t i = 0; i < count; i++) to[r * width + o + i] += y[i];
    };
}

struct ThreadScratch { std::vector<float> x, scores; };

struct SharedScratch {  // of all threads of a call
    std::vector<float> q, k, v, mixed, h;
    SharedScratch(int64_t rows, int64_t q, int64_t kv, int64_t h)
        : q(rows * q), k(rows * kv), v(rows * kv), mixed(rows * q), h(rows * h) {}
};

// Runs x (rows, width) through all layers, in place; keys and values are written at `cache_index`.
//
// starts: (rows) cache index of each row's first real token; null = 0.
// cache_rows: (rows) the row of the cache that each row uses; null = the same row.
// after: the matrix used after these layers, for prefetching.
void run_layers(
    const Stack& s, float* x, int64_t rows, int64_t cache_index, const int64_t* starts,
    const int64_t* cache_rows, SharedScratch& shared, ThreadTeam& team, int thread, ThreadScratch& own,
    const Matrix* after
) {
    int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim, group = s.heads / s.kv_heads;
    own.x.resize(rows * s.width);
    float* normed = own.x.data();
    auto add_residual = add_to(x, s.width);
    for (int64_t l = 0; l < s.depth; l++) {
        const Layer& layer = s.layers[l];
        rms_norm(layer.attention_norm, x, rows, s.width, normed);
        auto q_store = write_to(shared.q.data(), q_width);
        auto k_store = write_to(shared.k.data(), kv_width), v_store = write_to(shared.v.data(), kv_width);
        linear(layer.query, &layer.key, normed, rows, thread, team.size, q_store);
        linear(layer.key, &layer.value, normed, rows, thread, team.size, k_store);
        linear(layer.value, &layer.out, normed, rows, thread, team.size, v_store);
        team.barrier();
        // a thread takes whole (row, KV head) pairs: it writes their cache entry, then attends with their query
        // heads, so that no barrier is needed in between
        Range mine = thread_range(rows * s.kv_heads, 1, thread, team.size);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            int64_t r = i / s.kv_heads, h = i % s.kv_heads, start = starts ? starts[r] : 0;
            int64_t position = cache_index - start;
            const float *cos = s.cos + position * s.head_dim, *sin = s.sin + position * s.head_dim;
            int64_t offset = ((cache_rows ? cache_rows[r] : r) * s.kv_heads + h) * s.capacity * s.head_dim;
            float *keys = layer.keys + offset, *values = layer.values + offset;
            float* k = &shared.k[r * kv_width + h * s.head_dim];
            const float* v = &shared.v[r * kv_width + h * s.head_dim];
            apply_rope(k, cos, sin, s.head_dim);
            std::memcpy(keys + cache_index * s.head_dim, k, s.head_dim * 4);
            std::memcpy(values + cache_index * s.head_dim, v, s.head_dim * 4);
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                float* q = &shared.q[r * q_width + g * s.head_dim];
                apply_rope(q, cos, sin, s.head_dim);
                float* y = &shared.mixed[r * q_width + g * s.head_dim];
                attention(q, keys, values, start, cache_index, s.head_dim, own.scores, y);
            }
        }
        team.barrier();
        linear(layer.out, &layer.gate, shared.mixed.data(), rows, thread, team.size, add_residual);
        team.barrier();
        rms_norm(layer.mlp_norm, x, rows, s.width, normed);
        gated_linear(
            layer.gate, layer.up, &layer.down, normed, rows, thread, team.size, shared.h.data(),
            [](vf32 v) { return silu(v); });
        team.barrier();
        const Matrix* next = l + 1 < s.depth ? &s.layers[l + 1].query : after;
        linear(layer.down, next, shared.h.data(), rows, thread, team.size, add_residual);
        team.barrier();
    }
}

// codes (images, K) of visual token `token_index` -> x: one vector per image, written `copies` times.
//
// Concatenated or added code rows, causal attention projection with its KV cache, GeGLU, two-layer MLP.
void run_embedder(
    const Embedder& e, const int64_t* codes, int64_t images, int64_t copies, int64_t token_index, float* x,
    std::vector<float>& state, SharedScratch& shared, ThreadTeam& team, int thread, ThreadScratch& own
) {
    int64_t latent = e.sums_rows ? e.code_dim : e.books * e.code_dim, wide = e.heads * e.head_dim, out = e.second.outputs;
    int threads = team.size;
    // every thread computes all latents and norms: cheaper than a barrier
    std::vector<float> latents(images * latent);
    for (int64_t b = 0; b < images; b++)
        for (int64_t k = 0; k < e.books; k++) {
            const float* row = e.codebooks + (k * e.entries + codes[b * e.books + k]) * e.code_dim;
            float* to = &latents[b * latent + (e.sums_rows ? 0 : k * e.code_dim)];
            if (e.sums_rows)
                for (int64_t c = 0; c < e.code_dim; c++) to[c] += row[c];
            else
                std::memcpy(to, row, e.code_dim * 4);
        }
    own.x.resize(images * std::max(latent, wide));
    float* normed = own.x.data();
    layer_norm(e.attention_norm, latents.data(), images, latent, normed);
    auto add_residual = add_to(state.data(), wide);
    linear(e.query, &e.key, normed, images, thread, threads, write_to(shared.q.data(), wide));
    linear(e.key, &e.value, normed, images, thread, threads, write_to(shared.k.data(), wide));
    linear(e.value, &e.linear, normed, images, thread, threads, write_to(shared.v.data(), wide));
    layer_norm(e.linear_norm, latents.data(), images, latent, normed);
    linear(e.linear, &e.out, normed, images, thread, threads, write_to(state.data(), wide));
    team.barrier();
    Range mine = thread_range(images * e.heads, 1, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        int64_t at = i / e.heads * wide + i % e.heads * e.head_dim;
        int64_t index = e.attends_to_earlier ? token_index : 0;
        int64_t offset = i * e.capacity * e.head_dim;
        float *keys = e.keys + offset, *values = e.values + offset;
        std::memcpy(keys + index * e.head_dim, &shared.k[at], e.head_dim * 4);
        std::memcpy(values + index * e.head_dim, &shared.v[at], e.head_dim * 4);
        attention(&shared.q[at], keys, values, 0, index, e.head_dim, own.scores, &shared.mixed[at]);
    }
    team.barrier();
    linear(e.out, &e.gate, shared.mixed.data(), images, thread, threads, add_residual);
    team.barrier();
    layer_norm(e.mlp_norm, state.data(), images, wide, normed);
    layer_norm(e.gate_norm, normed, images, wide, normed);
    gated_linear(
        e.gate, e.up, &e.down, normed, images, thread, threads, shared.h.data(),
        [](vf32 v) { return gelu_tanh(v); });
    team.barrier();
    linear(e.down, &e.first, shared.h.data(), images, thread, threads, add_residual);
    team.barrier();
    layer_norm(e.projector_norm, state.data(), images, wide, normed);
    auto store_gelu = [&](int64_t r, int64_t o, const float* y, int64_t count) {
        for (int64_t i = 0; i < count; i++) shared.mixed[r * out + o + i] = gelu(y[i]);
    };
    linear(e.first, &e.second, normed, images, thread, threads, store_gelu);
    team.barrier();
    // conditional and unconditional rows get the same image
    const float* place = e.places ? e.places + token_index * out : nullptr;
    auto store_copies = [&](int64_t r, int64_t o, const float* y, int64_t count) {
        for (int64_t c = 0; c < copies; c++) {
            float* to = x + (c * images + r) * out + o;
            for (int64_t i = 0; i < count; i++) to[i] = place ? y[i] + place[o + i] : y[i];
        }
    };
    linear(e.second, &e.query, shared.mixed.data(), images, thread, threads, store_copies);
    team.barrier();
}

}  // namespace

extern "C" {

// codes (images, K) of visual token `token_index` -> hidden (rows, width); KV entries go to `cache_index`
void decode_step(
    const Embedder* e, const Stack* s, const int64_t* codes, int64_t images, int64_t rows,
    int64_t token_index, int64_t cache_index, const int64_t* starts, float* hidden, int64_t threads
) {
    ThreadTeam team(threads);
    int64_t q_width = s->heads * s->head_dim, wide = e->heads * e->head_dim;
    int64_t widest = std::max({q_width, wide, s->width});
    SharedScratch shared(rows, widest, widest, std::max(s->layers[0].gate.outputs, e->gate.outputs));
    std::vector<float> x(rows * s->width), state(images * wide);
    team.run([&](int thread) {
        ThreadScratch own;
        run_embedder(
            *e, codes, images, rows / images, token_index, x.data(), state, shared, team, thread, own);
        run_layers(
            *s, x.data(), rows, cache_index, starts, nullptr, shared, team, thread, own, &s->layers[0].query);
        if (thread == 0) rms_norm(s->norm, x.data(), rows, s->width, hidden);
    });
}

// entry (rows, width), overwritten, at `cache_index` -> logits (rows, outputs)
void logits_step(
    const Stack* s, const Matrix* output, int64_t rows, int64_t cache_index, const int64_t* starts,
    const int64_t* cache_rows, float* entry, float* logits, int64_t threads
) {
    ThreadTeam team(threads);
    int64_t q_width = std::max(s->heads * s->head_dim, s->width);
    SharedScratch shared(rows, q_width, s->kv_heads * s->head_dim, s->layers[0].gate.outputs);
    team.run([&](int thread) {
        ThreadScratch own;
        run_layers(*s, entry, rows, cache_index, starts, cache_rows, shared, team, thread, own, output);
        rms_norm(s->norm, entry, rows, s->width, own.x.data());
        linear(
            *output, &s->layers[0].query, own.x.data(), rows, thread, team.size,
            write_to(logits, output->outputs));
    });
}

int64_t struct_size(int which) {
    int64_t all[] = {sizeof(Matrix), sizeof(Norm), sizeof(Layer), sizeof(Stack), sizeof(Embedder)};
    return all[which];
}
}
