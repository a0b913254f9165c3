// Open blocks of the denoiser, and the commit policies `threshold` and `span`.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// Open blocks of R slots with up to `size` positions, as `OpenBlocks` in engine/denoiser_step.py: (R, size); step, steps
// (R,). shift: an output predicts the token so many positions later. prefix_causal: the positions before the first mask
// attend causally.
struct Blocks {
    int64_t *tokens, *committed_at, *step, *steps;
    uint8_t* masked;
    float* confidence;
    int64_t size, shift, prefix_causal;
};

// A row of `fill_blocks`: its block size, its mask token, its most passes, the threshold of its commit policy, and its
// modulations at each number of masked positions, from 1 (or null). opens: a new block begins, and pending is its first
// token (−1: it is masked too). before: the token before the block. span: commits are from the left.
struct BlockRow {
    int64_t size, mask_token, steps, opens, pending, before, span;
    const void* modulations;
    float threshold;
};

// Commits positions of a row's block after its pass number `step`: those above the threshold, with `span` up to the first
// that is not, and in any case as many as are due (`commit` in decoding/unmasking.py). candidate, sure: of each output,
// which predicts the token `shift` positions later; with shift, the first position is never masked. Returns whether masked
// positions are left.
inline bool commit_block(const int64_t* candidate, const float* sure, const BlockRow& row, long shift, int64_t step,
                         int64_t* tokens, uint8_t* masked, int64_t* committed_at, float* confidence) {
    std::vector<long> places;
    for (long i = shift; i < row.size; i++)
        if (masked[i]) places.push_back(i);
    const long left = places.size(), over = row.steps - step;
    const auto above = [&](long i) { return sure[i - shift] > row.threshold; };
    const long above_count = row.span ? std::find_if_not(places.begin(), places.end(), above) - places.begin()
                                      : std::count_if(places.begin(), places.end(), above);
    const long count = std::min(left, std::max({above_count, (left + over - 1) / over, 1L}));
    const auto rank = [&](long i) { return std::isnan(sure[i - shift]) ? INFINITY : sure[i - shift]; };  // as torch sorts
    if (!row.span)
        std::stable_sort(places.begin(), places.end(), [&](long a, long b) {
            return above(a) != above(b) ? above(a) : rank(a) > rank(b);
        });
    for (long k = 0; k < count; k++) {
        const long i = places[k];
        tokens[i] = candidate[i - shift], masked[i] = 0, committed_at[i] = step, confidence[i] = sure[i - shift];
    }
    return count < left;
}

inline void open_block(const Blocks& blocks, const BlockRow& row, long slot) {
    const long at = slot * blocks.size;
    std::fill_n(blocks.tokens + at, blocks.size, row.mask_token);
    for (long i = 0; i < blocks.size; i++) blocks.masked[at + i] = i < row.size;
    std::fill_n(blocks.committed_at + at, blocks.size, 0);
    std::fill_n(blocks.confidence + at, blocks.size, 0.0f);
    if (row.pending >= 0) blocks.tokens[at] = row.pending, blocks.masked[at] = 0;
    blocks.step[slot] = 0, blocks.steps[slot] = row.steps;
}
