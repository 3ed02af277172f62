// The data-dependent Langevin step size: norms of score and noise per sample, and ε from them.
#pragma once
#include "affine_step.h"

namespace sbm {

// Σ s² and Σ z² of a sample or a part of one.
template <class S>
struct SquareSums {
  S score, noise;
  SquareSums operator+(const SquareSums& other) const {
    return {score + other.score, noise + other.noise};
  }
};

// Writes ε[b] for the row that sample b stands at (0 where that row has no norm). Of `args` it
// reads x, network, uncond, guidance, keys, noise, row, coef and field. Where `keep_noise`
// [batch, numel] is given, the z of rows with a norm is left there.
template <class S>
void langevin_epsilon_cpu(const StepArgs<S>& args, S* epsilon, S* keep_noise = nullptr);

}  // namespace sbm
