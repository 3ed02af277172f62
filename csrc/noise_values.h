// The four values of one Philox call, by kind of noise.
#pragma once
#include "gaussian.h"
#include "noise_kind.h"

namespace sbm {

template <class P, NoiseKind kind>
SBM_HD void noise_values(const typename P::U* w, typename P::F* z) {
  if constexpr (kind == NoiseKind::normal) {
    box_muller<P>(w[0], w[1], z[0], z[1]);
    box_muller<P>(w[2], w[3], z[2], z[3]);
  } else {
    for (int k = 0; k < 4; ++k) {
      if constexpr (kind == NoiseKind::uniform) z[k] = uniform<P>(w[k]);
      if constexpr (kind == NoiseKind::rademacher) z[k] = rademacher<P>(w[k]);
      if constexpr (kind == NoiseKind::words) z[k] = P::from_bits(P::as_int(w[k]));
    }
  }
}

}  // namespace sbm
