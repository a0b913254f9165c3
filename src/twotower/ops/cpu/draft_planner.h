// How many drafted tokens a pass checks, and how many masks follow them: the rules of decoding/draft_planner.py and, in
// diffusion, decoding/pass_width.py, which say what the numbers mean.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

// The state of a `DraftPlanner`: five numbers, then two lists of `most` values.
struct DraftPlanner {
    double* state;
    long most;
    enum Place { KEPT, EXPECTED, TOKENS, COST, DRAFTS, LISTS };
    double& survival(long i) const { return state[LISTS + i]; }
    double& checked(long i) const { return state[LISTS + most + i]; }

    // sure: the confidences of the `count` tokens of a new draft.
    void learn(long drafted, long kept, const float* sure, long count) const {
        for (long i = 0; i < std::min(kept + 1, drafted); i++) {
            state[KEPT] += i < kept;
            state[EXPECTED] += checked(i);
        }
        if (!count) return;
        state[DRAFTS] += 1;
        const double weight = std::max(0.1, 1 / (state[DRAFTS] + 4)), share = state[KEPT] / state[EXPECTED];
        double reach = 1;
        for (long i = 0; i < count; i++) {
            reach *= std::min(share * double(sure[i]), 1.0);
            survival(i) += weight * (reach - survival(i));
        }
    }

    struct Plan { int64_t checked, width; };

    Plan plan(const float* sure, long count, long room, double slope) const {
        const long most_here = std::min(most, std::max(room - 1, 0L));
        const double share = state[KEPT] / state[EXPECTED], price = state[TOKENS] / state[COST] * slope;
        std::vector<double> values(most_here + 1), worth(most_here);
        double least = 1;
        for (long i = 0; i < most_here; i++) {
            least = std::min(least, survival(i));
            worth[i] = 0.5 * least;
            values[i + 1] = values[i] + worth[i];
        }
        long masks = most_here;
        double tokens = 1, reach = 1, best = -std::numeric_limits<double>::infinity(), gain = 1;
        Plan chosen{0, 1};
        for (long k = 0; k <= std::min(count, most_here); k++) {
            if (k) tokens += reach *= std::min(share * double(sure[k - 1]), 1.0);
            const long fewest = k == 0 ? std::min(most_here, 1L) : 0;
            while (masks > fewest && (masks > most_here - k || reach * worth[masks - 1] <= price)) masks--;
            const double value = tokens + reach * values[masks] - price * (k + masks);
            if (value > best + 1e-9) best = value, chosen = {k, 1 + k + masks}, gain = tokens;
        }
        state[TOKENS] = 0.95 * state[TOKENS] + gain;
        state[COST] = 0.95 * state[COST] + 1 + slope * (chosen.width - 1);
        for (long i = 0; i < chosen.checked; i++) checked(i) = sure[i];
        return chosen;
    }
};

inline int64_t pass_width(long known, long tokens, long passes, long size) {
    const double rate = double(8 + tokens - passes) / double(10 + tokens);
    const double price = 2.0 * (1.0 / 12), least = price / (1 - price);
    double chance = rate;
    long width = std::min(known + 1, size);
    while (width < size && (chance *= rate) > least) width++;
    return width;
}
