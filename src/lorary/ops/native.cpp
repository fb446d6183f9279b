// The sparse plan of a routed layer on a CPU: choose k experts for each token, apply those alone.
//
// ops/native.py compiles and calls this; ops/choose.py, ops/blocks.py and lora/plans.py state the same in PyTorch, and the
// tests hold one against the other. All matrices are float32 and row-major, and contiguous where no stride is given.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "native_kernels.h"

// Experts are rank-concatenated: those of expert e are the rows starts[e] .. starts[e + 1] of down and up.
struct Experts {
    const float* down;      // (ranks, d_in)
    const float* up;        // (ranks, d_out)
    const int64_t* starts;  // (experts + 1)
    int64_t experts, d_in, d_out;
};

// How a token finds its experts. With rows alone: by |x . row|. With matrices alone: by |M_e z_e|, z = down x. With
// both: the best `candidates` by rows, and the best of these by matrices.
struct Router {
    const float* rows;      // (experts, d_in), or null
    const float* matrices;  // (ranks, width), those of the experts one below the other, or null
    const uint8_t* alive;   // (experts)
    int64_t width, candidates, top_k;
    float temperature;
};

namespace {

constexpr int64_t kColumns = 512;         // of the output that stay in the second cache until all experts are added
constexpr int64_t kThreadWork = 1 << 16;  // multiply-adds below which a second thread costs more than it saves

// |M z| of one expert.
float norm(const float* matrix, int64_t width, const float* z, int64_t rank) {
    float sum = 0;
    for (int64_t i = 0; i < rank; ++i) {
        float own = 0;
        for (int64_t j = 0; j < rank; ++j) own += matrix[i * width + j] * z[j];
        sum += own * own;
    }
    return std::sqrt(sum);
}

// |M_e z_e| of all experts for up to kLanes tokens, one token in each lane; scores (tokens, experts).
void norms(const float* z, int64_t stride, int64_t tokens, const Router& by, const Experts& of, float* scores) {
    const int64_t ranks = of.starts[of.experts];
    std::vector<float> turned(ranks * kLanes, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < ranks; ++r) turned[r * kLanes + t] = z[t * stride + r];
    for (int64_t e = 0; e < of.experts; ++e) {
        const int64_t first = of.starts[e], rank = of.starts[e + 1] - first;
        Lanes sum = {};
        for (int64_t i = 0; i < rank; ++i) {
            Lanes own = {};
            for (int64_t j = 0; j < rank; ++j)
                own += by.matrices[(first + i) * by.width + j] * at(&turned[(first + j) * kLanes]);
            sum += own * own;
        }
        for (int64_t t = 0; t < tokens; ++t) scores[t * of.experts + e] = std::sqrt(sum[t]);
    }
}

// The experts of some tokens: a pair is one token with one of its k.
class Pairs {
public:
    Pairs(const Experts& of, int64_t tokens, int64_t k, const int64_t* chosen, float* weights)
        : of_(of), tokens_(tokens), k_(k), chosen_(chosen), weights_(weights) {
        for (int64_t e = 0; e < of.experts; ++e) widest_ = std::max(widest_, of.starts[e + 1] - of.starts[e]);
        z_.resize(tokens * k * widest_);
        sort();
    }

    // Expert by expert, so that its factors stay in cache for all tokens that chose it; those of weight 0 are left out.
    void sort() {
        const int64_t all = tokens_ * k_;
        next_.assign(of_.experts + 1, 0);
        order_.resize(all);
        for (int64_t pair = 0; pair < all; ++pair) next_[chosen_[pair] + 1] += weights_[pair] != 0;
        for (int64_t e = 0; e < of_.experts; ++e) next_[e + 1] += next_[e];
        order_.resize(next_[of_.experts]);
        for (int64_t pair = 0; pair < all; ++pair)
            if (weights_[pair] != 0) order_[next_[chosen_[pair]]++] = pair;
    }

    float* z(int64_t pair) { return &z_[pair * widest_]; }
    int64_t rank(int64_t pair) const { return of_.starts[chosen_[pair] + 1] - of_.starts[chosen_[pair]]; }

    // z of each pair, from x (tokens, d_in), or from the z (tokens, ranks) of all experts.
    void shrink(const float* x) {
        for_tiles([&](auto width, int64_t first, int64_t rank, const int64_t* pairs) {
            constexpr int N = decltype(width)::value;
            const float* from[N];
            float* to[N];
            for (int n = 0; n < N; ++n) from[n] = x + pairs[n] / k_ * of_.d_in, to[n] = z(pairs[n]);
            multiply<N>(from, of_.down + first * of_.d_in, rank, of_.d_in, to);
        });
    }
    void gather(const float* all, int64_t stride) {
        for (const int64_t pair : order_)
            std::copy_n(all + pair / k_ * stride + of_.starts[chosen_[pair]], rank(pair), z(pair));
    }

    // out (tokens, d_out) = base + the weighted experts, a block of columns at a time.
    void expand(const float* base, float* out) {
        for (const int64_t pair : order_)
            for (int64_t r = 0; r < rank(pair); ++r) z(pair)[r] *= weights_[pair];
        for (int64_t column = 0; column < of_.d_out; column += kColumns) {
            const int64_t columns = std::min(kColumns, of_.d_out - column);
            for (int64_t t = 0; t < tokens_ && base != out; ++t)
                std::memcpy(out + t * of_.d_out + column, base + t * of_.d_out + column, columns * sizeof(float));
            for_tiles([&](auto width, int64_t first, int64_t rank, const int64_t* pairs) {
                constexpr int N = decltype(width)::value;
                const float *b = of_.up + first * of_.d_out + column, *from[N];
                float* to[N];
                for (int n = 0; n < N; ++n) to[n] = out + pairs[n] / k_ * of_.d_out + column;
                int64_t r = 0;
                for (; r + kRanks <= rank; r += kRanks) {
                    for (int n = 0; n < N; ++n) from[n] = z(pairs[n]) + r;
                    add<N, kRanks>(to, from, b + r * of_.d_out, columns, of_.d_out);
                }
                for (; r < rank; ++r) {
                    for (int n = 0; n < N; ++n) from[n] = z(pairs[n]) + r;
                    add<N, 1>(to, from, b + r * of_.d_out, columns, of_.d_out);
                }
            });
        }
    }

private:
    template <int N>
    struct Width {
        static constexpr int value = N;
    };

    // Calls `run` with kTile pairs of one expert at a time, then with single ones.
    template <typename Run>
    void for_tiles(Run run) {
        int64_t i = 0;
        for (int64_t e = 0; e < of_.experts; ++e) {
            const int64_t first = of_.starts[e], rank = of_.starts[e + 1] - first;
            for (; i + kTile <= next_[e]; i += kTile) run(Width<kTile>(), first, rank, &order_[i]);
            for (; i < next_[e]; ++i) run(Width<1>(), first, rank, &order_[i]);
        }
    }

    const Experts& of_;
    const int64_t tokens_, k_;
    const int64_t* chosen_;
    const float* weights_;
    int64_t widest_ = 0;
    std::vector<float> z_;
    std::vector<int64_t> next_, order_;  // next_[e]: where the pairs of expert e end in order_
};

// x (tokens, d_in) by all rows (rows, d_in), for few tokens: the rows are shared out among the threads.
void multiply_all(const float* x, int64_t tokens, const float* rows, int64_t num_rows, int64_t d, int64_t threads,
                  float* out) {
    const int64_t blocks = (num_rows + kRanks - 1) / kRanks;
#pragma omp parallel for num_threads(threads) if (num_rows * tokens * d > kThreadWork)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * kRanks, own = std::min<int64_t>(kRanks, num_rows - row);
        int64_t t = 0;
        const float* from[kTile];
        float* to[kTile];
        for (; t + kTile <= tokens; t += kTile) {
            for (int n = 0; n < kTile; ++n) from[n] = x + (t + n) * d, to[n] = out + (t + n) * num_rows + row;
            multiply<kTile>(from, rows + row * d, own, d, to);
        }
        for (; t < tokens; ++t) {
            from[0] = x + t * d, to[0] = out + t * num_rows + row;
            multiply<1>(from, rows + row * d, own, d, to);
        }
    }
}

// Calls `run` with a block of tokens in each thread, so that no two write to one row.
template <typename Run>
void for_blocks(int64_t tokens, int64_t work, int64_t threads, Run run) {
    if (work < kThreadWork || tokens < 2) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = tokens * me / parts, end = tokens * (me + 1) / parts;
        if (begin < end) run(begin, end - begin);
    }
}

int64_t work_of(const Experts& of, int64_t tokens, int64_t k) {
    return tokens * k * (of.starts[of.experts] / of.experts + 1) * (of.d_in + of.d_out);
}

// Chosen experts and weights of some tokens, (tokens, places), from their products with the rows, or their z.
void choose(const float* products, int64_t stride, int64_t tokens, int64_t places, const Router& by, const Experts& of,
            int64_t* chosen, float* weights) {
    std::vector<float> scores(of.experts * kLanes), row(of.experts);
    for (int64_t t = 0; t < tokens; ++t) {
        const float* own = products + t * stride;
        if (!by.rows) {
            if (t % kLanes == 0) norms(own, stride, std::min<int64_t>(kLanes, tokens - t), by, of, scores.data());
            own = &scores[t % kLanes * of.experts];
        }
        const bool broken = magnitudes(own, by.alive, of.experts, row.data());
        const int64_t found = best_of(row.data(), of.experts, places, chosen + t * places, weights + t * places);
        std::fill(chosen + t * places + found, chosen + (t + 1) * places, 0);
        if (by.rows && by.matrices) {  // a first stage: all that pass it are alike
            std::fill_n(weights + t * places, found, broken ? std::nanf("") : 1.0f);
            std::fill(weights + t * places + found, weights + (t + 1) * places, 0.0f);
        } else {
            soften(weights + t * places, found, places, by.temperature, broken);
        }
    }
}

// Of the candidates of each token, those that the second stage takes keep a weight.
void choose_again(Pairs& pairs, int64_t tokens, int64_t places, const Router& by, const Experts& of,
                  const int64_t* chosen, float* weights) {
    std::vector<float> scores(places), best(by.top_k);
    std::vector<int64_t> positions(by.top_k);
    for (int64_t t = 0; t < tokens; ++t) {
        bool broken = false;
        for (int64_t i = 0; i < places; ++i) {
            const int64_t pair = t * places + i;
            scores[i] = kOut;
            if (weights[pair] == 0) continue;
            broken |= weights[pair] != weights[pair];
            scores[i] = norm(by.matrices + of.starts[chosen[pair]] * by.width, by.width, pairs.z(pair), pairs.rank(pair));
            broken |= scores[i] != scores[i];
        }
        const int64_t found = best_of(scores.data(), places, by.top_k, positions.data(), best.data());
        soften(best.data(), found, by.top_k, by.temperature, broken);
        std::fill(weights + t * places, weights + (t + 1) * places, 0.0f);
        for (int64_t i = 0; i < found; ++i) weights[t * places + positions[i]] = best[i];
    }
}

}  // namespace

// out (tokens, d_out) = base + the weighted experts of each token. z (tokens, ranks) of all experts, or null.
extern "C" void lorary_mix(const float* x, int64_t tokens, const int64_t* chosen, float* weights, int64_t k,
                           const float* z, int64_t stride, const Experts* of, int32_t threads, const float* base,
                           float* out) {
    for_blocks(tokens, work_of(*of, tokens, k), threads, [&](int64_t begin, int64_t number) {
        Pairs pairs(*of, number, k, chosen + begin * k, weights + begin * k);
        z ? pairs.gather(z + begin * stride, stride) : pairs.shrink(x + begin * of->d_in);
        pairs.expand(base + begin * of->d_out, out + begin * of->d_out);
    });
}

// All of a routed layer. `products` (tokens, experts), or (tokens, ranks) for matrices alone, or null to have them
// computed here, for few tokens. Into chosen and weights (tokens, places) go the experts, where they are not null; places
// is top_k, or the number of candidates.
extern "C" void lorary_route(const float* x, int64_t tokens, const float* products, const Router* by, const Experts* of,
                             int32_t threads, const float* base, float* out, int64_t* chosen, float* weights) {
    const int64_t places = by->rows && by->matrices ? by->candidates : by->top_k;
    const int64_t stride = by->rows ? of->experts : of->starts[of->experts];
    std::vector<float> own, own_weights(weights ? 0 : tokens * places);
    std::vector<int64_t> own_chosen(chosen ? 0 : tokens * places);
    if (!chosen) chosen = own_chosen.data();
    if (!weights) weights = own_weights.data();
    if (!products) {
        own.resize(tokens * stride);
        multiply_all(x, tokens, by->rows ? by->rows : of->down, stride, of->d_in, threads, own.data());
        products = own.data();
    }
    for_blocks(tokens, work_of(*of, tokens, places), threads, [&](int64_t begin, int64_t number) {
        const float* tokens_of = x + begin * of->d_in;
        const float* products_of = products + begin * stride;
        choose(products_of, stride, number, places, *by, *of, chosen + begin * places, weights + begin * places);
        Pairs pairs(*of, number, places, chosen + begin * places, weights + begin * places);
        by->rows ? pairs.shrink(tokens_of) : pairs.gather(products_of, stride);
        if (by->rows && by->matrices) {
            choose_again(pairs, number, places, *by, *of, chosen + begin * places, weights + begin * places);
            pairs.sort();
        }
        pairs.expand(base + begin * of->d_out, out + begin * of->d_out);
    });
}
