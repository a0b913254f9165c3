// Decoding steps of a tower in one call: passes from token ids to chosen tokens, and what follows from these. The results
// are those of the kernels called one by one from engine/context_step.py and denoiser_step.py, at temperature 0.
#pragma once
#include <memory>
#include "argmax.h"
#include "blocks.h"
#include "draft_planner.h"
#include "tower.h"

constexpr long KEPT_LOGITS = 1 << 20;  // more logits get memory of their own, which is freed after the pass

// A tower with its embeddings and head, and the rows of a state that its passes read. The same structure as `Decoder` in
// runners/decode_pass.py. slots: of the rows in the pools of the state; null: all rows in order. lengths (rows,): tokens
// that the state holds of each row.
struct Decoder {
    const PassOptions* pass;
    const LayerOptions* options;
    const void *const *weights, *const *packed, *const *scales, *const *inputs;
    const Rotation* ropes;
    const void *norm_f, *embeddings, *head, *head_packed, *head_scale, *head_bias;
    const int64_t* slots;
    AdapterTables adapters;
    const void* mask_embedding;  // null without adapters
    const void *previous, *following;  // of the draft head (V, draft_rank), see model/draft_head.py; null without one
    int64_t *lengths, vocab, rank, mask_token, draft_rank;
    float embedding_factor;
    long slot(long row) const { return slots ? slots[row] : row; }
};

// What a draft head draws at a position: nothing, a token after the one chosen before it, or one after a given token.
constexpr int64_t NO_DRAW = -2, AFTER_CHOSEN = -1;

// Draws tokens of each row again, from left to right: the draft head adds its term to their logits. before (rows, L): the
// token before each, or a constant. The other arguments are those of `choose`.
template <class T>
void draw(const Decoder& d, T* logits, const int64_t* before, const int64_t* excluded, long each, int64_t* chosen,
          float* confidence, int threads) {
    const long rows = d.pass->rows, L = d.pass->L, V = d.vocab, r = d.draft_rank;
    const T *previous = static_cast<const T*>(d.previous), *none = nullptr;
    T* inputs = reinterpret_cast<T*>(scratch(22, rows * r));
    const std::unique_ptr<T[]> term(new T[rows * V]);
    std::vector<long> places;
    for (long l = 0; l < L; l++) {
        places.clear();
        for (long b = 0; b < rows; b++)
            if (before[b * L + l] != NO_DRAW) places.push_back(b * L + l);
        for (size_t i = 0; i < places.size(); i++) {
            const int64_t given = before[places[i]], token = given == AFTER_CHOSEN ? chosen[places[i] - 1] : given;
            std::copy_n(previous + token * r, r, inputs + i * r);
        }
        const Matrix<T> following{static_cast<const T*>(d.following), nullptr, nullptr};
        if (!places.empty()) linear(inputs, following, none, term.get(), long(places.size()), r, V, threads);
        for (size_t i = 0; i < places.size(); i++) {
            const long at = places[i];
            add(term.get() + i * V, 1.0f, V, logits + at * V);
            const int64_t* barred = excluded ? excluded + at / each : nullptr;
            argmax(logits + at * V, barred, chosen + at, confidence + at, 1, 1, V, threads);
        }
    }
}

// The probability of each next token of `tokens`, divided by that of the most probable token, `chosen`; −1 if it has none.
template <class T>
void shares_of_next(const T* logits, const int64_t* tokens, const int64_t* chosen, long count, long V, float* shares) {
    for (long t = 0; t + 1 < count; t++, logits += V) {
        const float next = upcast(logits[tokens[t + 1]]);
        shares[t] = next == -INFINITY ? -1.0f : std::exp(next - upcast(logits[chosen[t]]));
    }
}

// One pass over `tokens` (rows, L) → the most probable token after each (or instead of each) and its confidence; chosen
// null: neither. excluded: as in `argmax`, one for `each` positions. prefix (rows,): tokens before the first mask, which
// attend causally; from there on adapters act. Null: neither. before: as in `draw`; null: no token is drawn again.
// shares: as in `shares_of_next`, or null. The other arguments are those of `tower`.
template <class X, class T>
void choose(const Decoder& d, const int64_t* tokens, const uint8_t* token_mask, const int64_t* counts,
            const int64_t* prefix, const int64_t* excluded, long each, const int64_t* before, int causal, int64_t* chosen,
            float* confidence, float* shares, int threads) {
    const PassOptions& s = *d.pass;
    const long count = s.rows * s.L, H = s.H, V = d.vocab;
    const auto of = [](const void* p) { return static_cast<const T*>(p); };
    X* x = reinterpret_cast<X*>(scratch(16, count * H));
    T* hidden = reinterpret_cast<T*>(scratch(17, count * H));
    for (long t = 0; t < count; t++) {
        const bool masked =
            prefix && d.mask_embedding && t % s.L >= prefix[t / s.L] && tokens[t] == d.mask_token;
        const T* row = masked ? of(d.mask_embedding) : of(d.embeddings) + tokens[t] * H;
        for (long h = 0; h < H; h += W)
            put(x + t * H + h, rounded<T>(load<vec>(row + h, H - h) * d.embedding_factor), H - h);
    }
    const Tables tables{d.options, d.weights, d.packed, d.scales, d.inputs, d.ropes, d.adapters, d.rank};
    tower(x, s, tables, of(d.norm_f), hidden, token_mask, counts, d.slots, prefix, causal, threads);
    if (!chosen) return;
    const std::unique_ptr<T[]> own(count * V > KEPT_LOGITS ? new T[count * V] : nullptr);
    T* logits = own ? own.get() : reinterpret_cast<T*>(scratch(18, count * V));
    const Matrix<T> head{of(d.head), d.head_packed, static_cast<const float*>(d.head_scale),
                         s.int8_activations != 0};
    linear(hidden, head, of(d.head_bias), logits, real_tokens(s, token_mask), H, V, threads);
    argmax(logits, excluded, chosen, confidence, count, each, V, threads);
    if (shares) shares_of_next(logits, tokens, chosen, count, V, shares);
    if (before) draw(d, logits, before, excluded, each, chosen, confidence, threads);
}

// Updates the Mamba states with the first accepted[b] tokens of the pass, and the lengths.
template <class T> void commit(const Decoder& d, const int64_t* accepted, int threads) {
    const PassOptions& s = *d.pass;
    const Mamba m{s.mamba_heads, s.mamba_head_dim, s.mamba_groups, s.state_size, s.taps, 0, 0, 0, AFTER_GATE};
    for (long layer = 0; layer < s.layers; layer++) {
        const LayerInputs in{d.inputs + layer * INPUTS};
        if (!in.at<float>(STEP_X)) continue;
        state_update(in.at<T>(WINDOW), in.at<float>(STATE), d.slots, in.at<T>(XBC), in.at<float>(STEP_X),
                     in.at<float>(STEP_DT), in.at<float>(STEP_DECAY), in.at<float>(STEP_B), accepted, s.rows, s.L, m,
                     threads);
    }
    for (long b = 0; b < s.rows; b++) d.lengths[b] += accepted[b];
}

inline bool finite(const float* values, long n) {
    return std::all_of(values, values + n, [](float v) { return std::isfinite(v); });
}

// Up to `steps` AR steps of all rows: a pass over `tokens` (rows,), then over the tokens that it chose, and so on. Ends
// after a step in which a row chose one of its end tokens (end_ids from ends[b] to ends[b + 1]), or whose logits were not
// finite. chosen, confidence (steps, rows); done: steps made.
template <class X, class T>
void ar_steps(const Decoder& d, const int64_t* tokens, long steps, const int64_t* ends, const int64_t* end_ids,
              int64_t* chosen, float* confidence, int64_t* done, int threads) {
    const long rows = d.pass->rows;
    const std::vector<int64_t> ones(rows, 1);
    bool over = false;
    for (*done = 0; *done < steps && !over; tokens = chosen, chosen += rows, confidence += rows, ++*done) {
        choose<X, T>(d, tokens, nullptr, ones.data(), nullptr, nullptr, 1, nullptr, 1, chosen, confidence, nullptr,
                     threads);
        commit<T>(d, ones.data(), threads);
        over = !finite(confidence, rows);
        for (long b = 0; b < rows; b++)
            over |= std::find(end_ids + ends[b], end_ids + ends[b + 1], chosen[b]) != end_ids + ends[b + 1];
    }
}

// (rows, L), whether a position is one of the first counts[b] of its row; null if all are.
inline const uint8_t* padding_mask(const PassOptions& s, const int64_t* counts, std::vector<uint8_t>& mask) {
    if (std::all_of(counts, counts + s.rows, [&](int64_t count) { return count >= s.L; })) return nullptr;
    mask.resize(s.rows * s.L);
    for (long t = 0; t < s.rows * s.L; t++) mask[t] = t % s.L < counts[t / s.L];
    return mask.data();
}

// One pass over the pending token, the draft and the masks of each row: tokens (rows, L), of which the first counts[b]
// come before the masks, and the first widths[b] before the padding. The state keeps the accepted part, whose length
// `accepted` (rows,) says without the pending token. chosen, confidence (rows, L): the AR model's choice after each
// token, and that of adapters at masks. chosen null, or final[b]: the state keeps all tokens before the masks.
// least[b] below 1: a drafted token with this share of the probability of AR's choice is accepted too, and is then the
// choice (decoding/acceptance.py).
template <class X, class T>
void read_drafts(const Decoder& d, const int64_t* tokens, const int64_t* counts, const int64_t* widths,
                 const int64_t* final, const float* least, int64_t* chosen, float* confidence, int64_t* accepted,
                 int threads) {
    const long rows = d.pass->rows, L = d.pass->L;
    const bool relaxed = chosen && std::any_of(least, least + rows, [](float share) { return share < 1; });
    std::vector<float> shares(relaxed ? rows * L : 0);
    std::vector<uint8_t> mask;
    std::vector<int64_t> kept(rows), excluded, before;
    const bool adapts = !std::equal(counts, counts + rows, widths);
    if (adapts)
        for (long t = 0; t < rows * L; t++) {
            const bool drafted = t % L >= counts[t / L];
            excluded.push_back(drafted ? d.mask_token : -1);
            before.push_back(drafted ? AFTER_CHOSEN : NO_DRAW);
        }
    choose<X, T>(d, tokens, padding_mask(*d.pass, widths, mask), counts, adapts ? counts : nullptr,
                 adapts ? excluded.data() : nullptr, 1, adapts && d.previous ? before.data() : nullptr, 1, chosen,
                 confidence, relaxed ? shares.data() : nullptr, threads);
    for (long b = 0; b < rows; b++) {
        const int64_t* read = tokens + b * L;
        const auto accepts = [&](long at, int64_t drafted) {
            if (!chosen || final[b] || drafted == chosen[at]) return true;
            if (least[b] >= 1 || shares[at] < least[b]) return false;
            chosen[at] = drafted, confidence[at] *= shares[at];
            return true;
        };
        long n = 0;
        while (n + 1 < counts[b] && accepts(b * L + n, read[n + 1])) n++;
        accepted[b] = n, kept[b] = n + 1;
    }
    commit<T>(d, kept.data(), threads);
}

// A row of `one_pass_rounds`, as engine/one_pass.py has it: the most positions of a pass, those of the first pass, the new
// tokens that may follow, and whether drafted tokens are final. They are drafted if their confidence is above `least`, and
// a pass is as wide as `pass_width` says after so many new tokens and passes (passes −1: size). Others are drafted as
// `planner` says, the state of a `DraftPlanner`; slope: of the cost of a pass. acceptance: `least` of `read_drafts`.
struct RoundRow {
    int64_t size, width, room, final, tokens, passes;
    double slope, least, acceptance;
    double* planner;
};

// A decoder for passes of `length` tokens a row, of at most as many as it was made for.
struct Narrower {
    PassOptions pass;
    std::vector<Rotation> ropes;
    Decoder decoder;
    Narrower(const Decoder& d, long length) : pass(*d.pass), decoder(d) {
        long count = 1;
        for (long i = 0; i < pass.layers; i++) count = std::max(count, long(d.options[i].rope) + 1);
        ropes.assign(d.ropes, d.ropes + count);
        for (Rotation& rope : ropes) rope.length = length;
        pass.L = length, decoder.pass = &pass, decoder.ropes = ropes.data();
    }
    Narrower(const Narrower&) = delete;
};

// The next block of a row after a pass that read `first` tokens and masks up to `width`, and accepted `kept` of them after
// the first. Updates the row's room, tokens and passes, and writes the plan of the next pass. Returns whether the rounds
// end.
inline bool next_block(RoundRow& row, const int64_t* own, const float* sure, long kept, long first, long width,
                       const int64_t* end, const int64_t* last_end, std::vector<int64_t>& block, int64_t* plan) {
    bool over = !std::all_of(sure, sure + kept + 1, [](float v) { return std::isfinite(v); });
    const long drafted = kept == first - 1 ? width - first : 0;
    long checked = 0;
    if (row.planner) {
        const DraftPlanner planner{row.planner, row.size - 1};
        planner.learn(first - 1, kept, sure + first, drafted);
        const DraftPlanner::Plan next = planner.plan(sure + first, drafted, row.room - kept - 1, row.slope);
        checked = plan[0] = next.checked, plan[1] = next.width;
    } else {
        while (checked < drafted && sure[first + checked] > row.least) checked++;
        row.tokens += 1 + checked;
        plan[0] = checked;
        plan[1] = row.passes < 0 ? row.size : pass_width(1 + checked, row.tokens, ++row.passes, row.size);
    }
    block.assign(1, own[kept]);
    block.insert(block.end(), own + first, own + first + checked);
    const auto ended = [&](int64_t token) { return std::find(end, last_end, token) != last_end; };
    if (row.final) over |= std::any_of(block.begin(), block.end(), ended);
    else over |= std::any_of(own, own + kept + 1, ended);
    row.room -= row.final ? long(block.size()) : kept + 1;
    if (!row.final && long(block.size()) > row.room) block.resize(std::max(row.room, int64_t(1)));
    return over || row.room < 1;
}

// Up to `most` rounds of a model with adapters. block[b]: the pending token and the draft of row b. A round reads the
// blocks and masks after them, as `read_drafts`, and makes the next blocks. Ends after a round in which a row gets one of
// its end tokens, has no room left, or has logits that are not finite. chosen, confidence (most, rows, L), accepted
// (most, rows): of each round; plans (most, rows, 2): the drafted tokens that the next pass checks, and its width; done:
// rounds made.
template <class X, class T>
void one_pass_rounds(const Decoder& d, const RoundRow* given, const int64_t* tokens, const int64_t* counts, long most,
                     const int64_t* ends, const int64_t* end_ids, int64_t* chosen, float* confidence, int64_t* accepted,
                     int64_t* plans, int64_t* done, int threads) {
    const long B = d.pass->rows, L = d.pass->L;
    std::vector<std::vector<int64_t>> block(B);
    std::vector<int64_t> read(B * L), own(B * L), kept(B), widths(B), final(B), planned(B);
    std::vector<float> sure(B * L), acceptance(B);
    std::vector<RoundRow> rows(given, given + B);
    for (long b = 0; b < B; b++) {
        block[b].assign(tokens + b * L, tokens + b * L + counts[b]);
        final[b] = rows[b].final, planned[b] = rows[b].width, acceptance[b] = float(rows[b].acceptance);
    }
    bool over = false;
    for (*done = 0; *done < most && !over; chosen += B * L, confidence += B * L, accepted += B, plans += 2 * B, ++*done) {
        for (long b = 0; b < B; b++) {
            const long n = kept[b] = block[b].size(), left = final[b] ? rows[b].room - 1 : rows[b].room - n;
            widths[b] = n + std::max(std::min(planned[b] - n, left), 0L);
        }
        const long length = *std::max_element(widths.begin(), widths.end());
        std::fill(read.begin(), read.begin() + B * length, 0);
        for (long b = 0; b < B; b++) {
            const auto to = std::copy(block[b].begin(), block[b].end(), read.begin() + b * length);
            std::fill(to, read.begin() + b * length + widths[b], d.mask_token);
        }
        const Narrower pass(d, length);
        read_drafts<X, T>(pass.decoder, read.data(), kept.data(), widths.data(), final.data(), acceptance.data(),
                          own.data(), sure.data(), accepted, threads);
        for (long b = 0; b < B; b++) {
            std::copy_n(own.data() + b * length, length, chosen + b * L);
            std::copy_n(sure.data() + b * length, length, confidence + b * L);
            over |= next_block(rows[b], chosen + b * L, confidence + b * L, accepted[b], kept[b], widths[b],
                               end_ids + ends[b], end_ids + ends[b + 1], block[b], plans + 2 * b);
            planned[b] = plans[2 * b + 1];
        }
    }
}

// Up to `most` passes of the denoiser over the blocks of all rows. Ends after a pass in which a block is finished.
// modulation: of this pass, (rows, 3 · layers · H), where `inputs` find it. done: passes made.
template <class X, class T>
void fill_blocks(const Decoder& d, const Blocks& blocks, const BlockRow* rows, long most, void* modulation,
                 int64_t* done, int threads) {
    const PassOptions& s = *d.pass;
    const long count = s.rows * s.L, each = s.modulation_stride;
    std::vector<uint8_t> mask;
    std::vector<int64_t> tokens(count), chosen(count), sizes(s.rows), excluded(s.rows), prefix(s.rows);
    std::vector<int64_t> before(d.previous ? count : 0);
    std::vector<float> sure(count);
    for (long b = 0; b < s.rows; b++) {
        sizes[b] = rows[b].size, excluded[b] = rows[b].mask_token;
        if (rows[b].opens) open_block(blocks, rows[b], d.slot(b));
    }
    const uint8_t* token_mask = padding_mask(s, sizes.data(), mask);
    bool finished = false;
    for (*done = 0; *done < most && !finished; ++*done) {
        for (long b = 0; b < s.rows; b++) {
            const long at = d.slot(b) * blocks.size;
            std::copy_n(blocks.tokens + at, s.L, tokens.data() + b * s.L);
            const long left = std::count(blocks.masked + at, blocks.masked + at + s.L, 1);
            prefix[b] = std::find(blocks.masked + at, blocks.masked + at + s.L, 1) - (blocks.masked + at);
            for (long l = 0; d.previous && l < s.L; l++) {
                const long i = l + blocks.shift;  // the input that this output predicts
                const bool open = i < s.L && blocks.masked[at + i], drawn = i > 0 && blocks.masked[at + i - 1];
                const int64_t known = i > 0 ? blocks.tokens[at + i - 1] : rows[b].before;
                before[b * s.L + l] = !open ? NO_DRAW : drawn ? AFTER_CHOSEN : known;
            }
            if (rows[b].modulations && left)
                std::copy_n(static_cast<const T*>(rows[b].modulations) + (left - 1) * each, each,
                            static_cast<T*>(modulation) + b * each);
        }
        choose<X, T>(d, tokens.data(), token_mask, nullptr, blocks.prefix_causal ? prefix.data() : nullptr,
                     excluded.data(), s.L, d.previous ? before.data() : nullptr, 0, chosen.data(), sure.data(), nullptr,
                     threads);
        for (long b = 0; b < s.rows; b++) {
            const long slot = d.slot(b), at = slot * blocks.size, from = b * s.L;
            finished |= !commit_block(chosen.data() + from, sure.data() + from, rows[b], blocks.shift,
                                      blocks.step[slot]++, blocks.tokens + at, blocks.masked + at,
                                      blocks.committed_at + at, blocks.confidence + at);
        }
    }
}
