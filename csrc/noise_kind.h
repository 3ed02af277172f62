// What the CPU and the GPU share about cutting samples and kinds of noise.
#pragma once
#include <stdint.h>

namespace sbm {

enum class NoiseKind : int { normal, uniform, rademacher, words };

// Elements that one call or thread block works on at most: small enough that a CPU's buffers stay
// in the L1 cache. Reductions sum blocks of this size, so it is part of what results look like.
constexpr int64_t kTile = 1024;

}  // namespace sbm
