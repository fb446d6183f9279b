// What native.cpp is made of: products of a few tokens with a few rows, and the best of a row of scores.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

// A vector register, and how many tokens share one load of a factor: their sums must fit into the registers there are.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 2;
#else
constexpr int kLanes = 4, kTile = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

constexpr int kRanks = 4;  // ranks that share one load of a token
constexpr float kOut = -std::numeric_limits<float>::infinity();

const Lanes& at(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
Lanes& at(float* p) { return *reinterpret_cast<Lanes*>(p); }

// z[n][r] = x[n] . a[r], for N tokens and R rows of length d.
template <int N, int R>
void dots(const float* const* x, const float* a, int64_t d, float* const* z) {
    Lanes sums[N][R] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
        for (int n = 0; n < N; ++n)
            for (int r = 0; r < R; ++r) sums[n][r] += at(x[n] + i) * at(a + r * d + i);
    for (int n = 0; n < N; ++n)
        for (int r = 0; r < R; ++r) {
            float sum = 0;
            for (int lane = 0; lane < kLanes; ++lane) sum += sums[n][r][lane];
            for (int64_t j = i; j < d; ++j) sum += x[n][j] * a[r * d + j];
            z[n][r] = sum;
        }
}

// The same for any number of rows.
template <int N>
void multiply(const float* const* x, const float* a, int64_t rows, int64_t d, float* const* z) {
    float* to[N];
    int64_t r = 0;
    for (; r + kRanks <= rows; r += kRanks) {
        for (int n = 0; n < N; ++n) to[n] = z[n] + r;
        dots<N, kRanks>(x, a + r * d, d, to);
    }
    for (; r < rows; ++r) {
        for (int n = 0; n < N; ++n) to[n] = z[n] + r;
        dots<N, 1>(x, a + r * d, d, to);
    }
}

// out[n] += sum_r z[n][r] b[r], for N tokens and R rows, in the first `columns` of rows of length d.
template <int N, int R>
void add(float* const* out, const float* const* z, const float* b, int64_t columns, int64_t d) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes)
        for (int n = 0; n < N; ++n) {
            Lanes sum = at(out[n] + i);
            for (int r = 0; r < R; ++r) sum += z[n][r] * at(b + r * d + i);
            at(out[n] + i) = sum;
        }
    for (; i < columns; ++i)
        for (int n = 0; n < N; ++n)
            for (int r = 0; r < R; ++r) out[n][i] += z[n][r] * b[r * d + i];
}

// Positions of the best k of n scores, best first, and the scores there; returns how many: fewer where others are out.
int64_t best_of(const float* scores, int64_t n, int64_t k, int64_t* positions, float* best) {
    int64_t found = 0;
    for (int64_t start = 0; start < n; start += kLanes) {
        const int64_t stop = std::min(start + kLanes, n);
        if (found == k) {  // most blocks hold none that is better than what was found
            float top = kOut;
#pragma omp simd reduction(max : top)
            for (int64_t i = start; i < stop; ++i) top = scores[i] > top ? scores[i] : top;
            if (!(top > best[k - 1])) continue;
        }
        for (int64_t i = start; i < stop; ++i) {
            if (scores[i] == kOut || (found == k && !(scores[i] > best[k - 1]))) continue;
            int64_t place = found < k ? found++ : k - 1;
            for (; place > 0 && best[place - 1] < scores[i]; --place) {
                best[place] = best[place - 1];
                positions[place] = positions[place - 1];
            }
            best[place] = scores[i];
            positions[place] = i;
        }
    }
    return found;
}

// Softmax of the first `found` of k scores, in place, and 0 behind them. Where a score is not a number, all weights
// are none: it must stay visible.
void soften(float* scores, int64_t found, int64_t k, float temperature, bool broken) {
    const float best = found ? scores[0] : 0;
    float sum = 0;
    for (int64_t i = 0; i < found; ++i) sum += (scores[i] = std::exp((scores[i] - best) / temperature));
    for (int64_t i = 0; i < found; ++i) scores[i] = broken ? std::nanf("") : scores[i] / sum;
    std::fill(scores + found, scores + k, 0.0f);
}

// Magnitudes of a row of scores, and whether one of them is not a number; experts that are not alive are out.
bool magnitudes(const float* scores, const uint8_t* alive, int64_t n, float* to) {
    int broken = 0;
#pragma omp simd reduction(| : broken)
    for (int64_t e = 0; e < n; ++e) {
        to[e] = alive[e] ? std::fabs(scores[e]) : kOut;
        broken |= to[e] != to[e];
    }
    return broken;
}

}  // namespace
