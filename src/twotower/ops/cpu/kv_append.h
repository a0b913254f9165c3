// Writes the keys or values of a pass behind those of earlier tokens.
#pragma once
#include "simd.h"

// Where the keys and values of each row lie in a pool: token t of row b and head h is the vector at index
// start[b] + h·stride[b] + t.
struct KVLayout { const int64_t *start, *stride, *lengths; };

// from (rows · L, heads, D): appends the first counts[b] of the L tokens of row b to the pool.
template <class T>
void kv_append(const T* from, T* pool, KVLayout at, const int64_t* counts, long rows, long L, long heads, long D) {
    for (long b = 0; b < rows; b++)
        for (long l = 0; l < std::min(long(counts[b]), L); l++) {
            const long column = at.lengths[b] + l;
            if (column >= at.stride[b]) break;
            for (long h = 0; h < heads; h++)
                std::copy_n(from + ((b * L + l) * heads + h) * D, D, pool + (at.start[b] + h * at.stride[b] + column) * D);
        }
}
