// The sparse plan of a routed layer on a CPU: choose k experts for each token, apply those alone.
//
// ops/native.py compiles and calls this, ops/mix.py and ops/choose.py state the same in PyTorch, and the tests hold one
// against the other. All matrices are float32, contiguous and row-major.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t kMostChosen = 64;         // ops/native.py: MOST_CHOSEN
constexpr int64_t kThreadWork = 1 << 16;    // multiply-adds below which a second thread costs more than it saves
constexpr int64_t kFewTokens = 8;           // so few share no expert: they are taken as they come

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// The best k of one row of scores, best first, as softmax weights. Entries that are not filled get weight 0.
// A score that is not a number makes all weights so: it must stay visible.
void choose_row(const float* scores, const uint8_t* alive, int64_t experts, int64_t k, float temperature, bool absolute,
                int64_t* chosen, float* weights) {
    int64_t found = 0;
    bool broken = false;
    for (int64_t e = 0; e < experts; ++e) {
        if (alive && !alive[e]) continue;
        const float score = absolute ? std::fabs(scores[e]) : scores[e];
        if (score != score) broken = true;
        if (score == -std::numeric_limits<float>::infinity()) continue;
        if (found == k && !(score > weights[k - 1])) continue;
        int64_t place = found < k ? found++ : k - 1;
        for (; place > 0 && weights[place - 1] < score; --place) {
            weights[place] = weights[place - 1];
            chosen[place] = chosen[place - 1];
        }
        weights[place] = score;
        chosen[place] = e;
    }
    const float best = found ? weights[0] : 0;
    float sum = 0;
    for (int64_t i = 0; i < found; ++i) sum += (weights[i] = std::exp((weights[i] - best) / temperature));
    for (int64_t i = 0; i < found; ++i) weights[i] = broken ? std::nanf("") : weights[i] / sum;
    for (int64_t i = found; i < k; ++i) {
        weights[i] = 0;
        chosen[i] = 0;
    }
}

// out += weight * up^T (down x), for the ranks of one expert; four of them at a time share the loads of x and out.
void add_expert(const float* x, const float* down, const float* up, int64_t rank, float weight, int64_t d_in,
                int64_t d_out, float* out) {
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        const float *a0 = down + r * d_in, *a1 = a0 + d_in, *a2 = a1 + d_in, *a3 = a2 + d_in;
        float z0 = 0, z1 = 0, z2 = 0, z3 = 0;
#pragma omp simd reduction(+ : z0, z1, z2, z3)
        for (int64_t i = 0; i < d_in; ++i) {
            z0 += x[i] * a0[i];
            z1 += x[i] * a1[i];
            z2 += x[i] * a2[i];
            z3 += x[i] * a3[i];
        }
        z0 *= weight, z1 *= weight, z2 *= weight, z3 *= weight;
        const float *b0 = up + r * d_out, *b1 = b0 + d_out, *b2 = b1 + d_out, *b3 = b2 + d_out;
#pragma omp simd
        for (int64_t i = 0; i < d_out; ++i) out[i] += z0 * b0[i] + z1 * b1[i] + z2 * b2[i] + z3 * b3[i];
    }
    for (; r < rank; ++r) {
        const float z = weight * dot(x, down + r * d_in, d_in);
        const float* b = up + r * d_out;
#pragma omp simd
        for (int64_t i = 0; i < d_out; ++i) out[i] += z * b[i];
    }
}

}  // namespace

// Experts are rank-concatenated: those of expert e are the rows starts[e] .. starts[e + 1] of down and up.
struct Experts {
    const float* down;      // (ranks, d_in)
    const float* up;        // (ranks, d_out)
    const int64_t* starts;  // (experts + 1)
    int64_t experts, d_in, d_out;
};

// chosen, weights (tokens, k) from scores (tokens, experts).
extern "C" void lorary_choose(const float* scores, const uint8_t* alive, int64_t tokens, int64_t experts, int64_t k,
                              float temperature, int32_t absolute, int32_t threads, int64_t* chosen, float* weights) {
#pragma omp parallel for num_threads(threads) if (tokens * experts > kThreadWork)
    for (int64_t t = 0; t < tokens; ++t)
        choose_row(scores + t * experts, alive, experts, k, temperature, absolute, chosen + t * k, weights + t * k);
}

// out (tokens, d_out) += the weighted experts of each token.
extern "C" void lorary_mix(const float* x, int64_t tokens, const int64_t* chosen, const float* weights, int64_t k,
                           const Experts* of, int32_t threads, float* out) {
    const int64_t work = tokens * k * (of->starts[of->experts] / of->experts + 1) * (of->d_in + of->d_out);
    if (work < kThreadWork || tokens < 2) threads = 1;
    auto add = [&](int64_t pair) {
        const int64_t t = pair / k, first = of->starts[chosen[pair]], rank = of->starts[chosen[pair] + 1] - first;
        add_expert(x + t * of->d_in, of->down + first * of->d_in, of->up + first * of->d_out, rank, weights[pair],
                   of->d_in, of->d_out, out + t * of->d_out);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // A block of tokens for each thread, so that no two write to one row.
        const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = tokens * me / parts * k, end = tokens * (me + 1) / parts * k;
        if (tokens <= kFewTokens) {
            for (int64_t pair = begin; pair < end; ++pair)
                if (weights[pair] != 0) add(pair);
        } else {
            // Expert by expert: its factors stay in the first cache for all tokens that chose it.
            std::vector<int64_t> next(of->experts + 1, 0), order(end - begin);
            for (int64_t pair = begin; pair < end; ++pair) next[chosen[pair] + 1] += weights[pair] != 0;
            for (int64_t e = 0; e < of->experts; ++e) next[e + 1] += next[e];
            const int64_t total = next[of->experts];
            for (int64_t pair = begin; pair < end; ++pair)
                if (weights[pair] != 0) order[next[chosen[pair]]++] = pair;
            for (int64_t i = 0; i < total; ++i) add(order[i]);
        }
    }
}

// All of a routed layer for a few tokens in one call: scores |x . row|, the best k, their experts.
extern "C" void lorary_route(const float* x, int64_t tokens, const float* rows, const uint8_t* alive, int64_t k,
                             float temperature, const Experts* of, int32_t threads, float* out) {
    int64_t chosen[kMostChosen];
    float weights[kMostChosen];
    std::vector<float> scores(of->experts);
    for (int64_t t = 0; t < tokens; ++t) {
        const float* token = x + t * of->d_in;
#pragma omp parallel for num_threads(threads) if (of->experts * of->d_in > kThreadWork)
        for (int64_t e = 0; e < of->experts; ++e) scores[e] = dot(token, rows + e * of->d_in, of->d_in);
        choose_row(scores.data(), alive, of->experts, k, temperature, true, chosen, weights);
        lorary_mix(token, 1, chosen, weights, k, of, 1, out + t * of->d_out);
    }
}
