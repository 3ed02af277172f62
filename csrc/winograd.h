// 3×3 convolution by Winograd's minimal filtering F(M×M, 3×3): the transforms before and behind the
// products. sbm_fast/ops/winograd.py has the formulas.
#pragma once
#include <stdint.h>

namespace sbm {

// An NHWC image of float32; strides in elements, channels beside one another.
template <class T>
struct Nhwc {
  T* data = nullptr;
  int64_t sample = 0, row = 0, pixel = 0;  // strides
  T* at(int64_t b, int64_t y, int64_t x) const { return data + b * sample + y * row + x * pixel; }
};

struct WinogradShape {
  int64_t side = 2;  // M
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t first = 0, count = 0;  // tiles: by sample, row, column

  int64_t across() const { return (width + side - 1) / side; }
  int64_t down() const { return (height + side - 1) / side; }
  int64_t tiles() const { return samples * down() * across(); }
};

struct WinogradInputArgs : WinogradShape {
  float* tiles = nullptr;  // [(M + 2)², count, channels]
  Nhwc<const float> x;
};

struct WinogradOutputArgs : WinogradShape {
  const float* products = nullptr;  // [(M + 2)², count, channels]
  const float* bias = nullptr;
  Nhwc<const float> plus;
  Nhwc<float> y;
  float gain = 1.0f;
};

void winograd_input_cpu(const WinogradInputArgs& args);
void winograd_output_cpu(const WinogradOutputArgs& args);

// Of tiles first + begin … first + end − 1, for M = 2 and M = 4.
struct WinogradKernel {
  void (*input[2])(const WinogradInputArgs&, int64_t begin, int64_t end);
  void (*output[2])(const WinogradOutputArgs&, int64_t begin, int64_t end);
};

}  // namespace sbm
