// Winograd's transforms of tiles, see winograd.h. Included by kernels_cpu_impl.h only.
#pragma once
#include "winograd.h"

namespace sbm {
namespace {

// Bᵀ and Aᵀ along one axis, for N channels: lines of M + 2, and of M, rows of channels. Sums are
// not fused: on processors without such an instruction they would be slow, and nothing is gained.
template <int M>
struct Winograd;

// At the points 0, 1, −1, ∞.
template <>
struct Winograd<2> {
  template <int N>
  static void input(const float* const* d, float* const* to) {
    const float *const d0 = d[0], *const d1 = d[1], *const d2 = d[2], *const d3 = d[3];
    float *const t0 = to[0], *const t1 = to[1], *const t2 = to[2], *const t3 = to[3];
    SBM_IVDEP
    for (int i = 0; i < N; ++i) {
      t0[i] = d2[i] - d0[i];
      t1[i] = d2[i] + d1[i];
      t2[i] = d2[i] - d1[i];
      t3[i] = d3[i] - d1[i];
    }
  }

  template <int N>
  static void output(const float* const* m, float* const* to) {
    const float *const m0 = m[0], *const m1 = m[1], *const m2 = m[2], *const m3 = m[3];
    float *const t0 = to[0], *const t1 = to[1];
    SBM_IVDEP
    for (int i = 0; i < N; ++i) {
      t0[i] = m0[i] + (m1[i] + m2[i]);
      t1[i] = m3[i] + (m1[i] - m2[i]);
    }
  }
};

// At the points 0, ±p, ±q, ∞; with a = p² and b = q², all of them exact in float32.
template <>
struct Winograd<4> {
  static constexpr float p = 11.0f / 16.0f, q = 1.5f, a = p * p, b = q * q;

  template <int N>
  static void input(const float* const* d, float* const* to) {
    const float *const d0 = d[0], *const d1 = d[1], *const d2 = d[2], *const d3 = d[3];
    const float *const d4 = d[4], *const d5 = d[5];
    float *const t0 = to[0], *const t1 = to[1], *const t2 = to[2], *const t3 = to[3];
    float *const t4 = to[4], *const t5 = to[5];
    SBM_IVDEP
    for (int i = 0; i < N; ++i) {
      const float even_p = d4[i] - b * d2[i], odd_p = p * (d3[i] - b * d1[i]);
      const float even_q = d4[i] - a * d2[i], odd_q = q * (d3[i] - a * d1[i]);
      t0[i] = d4[i] + (a * b * d0[i] - (a + b) * d2[i]);
      t1[i] = even_p + odd_p;
      t2[i] = even_p - odd_p;
      t3[i] = even_q + odd_q;
      t4[i] = even_q - odd_q;
      t5[i] = d5[i] + (a * b * d1[i] - (a + b) * d3[i]);
    }
  }

  template <int N>
  static void output(const float* const* m, float* const* to) {
    const float *const m0 = m[0], *const m1 = m[1], *const m2 = m[2], *const m3 = m[3];
    const float *const m4 = m[4], *const m5 = m[5];
    float *const t0 = to[0], *const t1 = to[1], *const t2 = to[2], *const t3 = to[3];
    SBM_IVDEP
    for (int i = 0; i < N; ++i) {
      const float even_p = m1[i] + m2[i], odd_p = p * (m1[i] - m2[i]);
      const float even_q = m3[i] + m4[i], odd_q = q * (m3[i] - m4[i]);
      t0[i] = m0[i] + (even_p + even_q);
      t1[i] = odd_p + odd_q;
      t2[i] = a * even_p + b * even_q;
      t3[i] = m5[i] + (a * odd_p + b * odd_q);
    }
  }
};

// Where a tile's output begins.
struct TilePlace {
  int64_t sample, y, x;
  TilePlace(const WinogradShape& s, int64_t tile)
      : sample(tile / (s.down() * s.across())),
        y(tile / s.across() % s.down() * s.side),
        x(tile % s.across() * s.side) {}
};

// Calls run(std::integral_constant<int, N>, channel) for blocks of N channels.
template <class Run>
void for_channels(int64_t channels, Run run) {
  constexpr int64_t kBlock = 16;
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) run(std::integral_constant<int, kBlock>(), c);
  for (; c < channels; ++c) run(std::integral_constant<int, 1>(), c);
}

template <int M>
void winograd_input(const WinogradInputArgs& a, int64_t begin, int64_t end) {
  constexpr int L = M + 2;
  static const float zeros[16] = {};
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace at(a, a.first + tile);
    const float* pixel[L][L];  // null outside the image
    for (int i = 0; i < L; ++i)
      for (int j = 0; j < L; ++j) {
        const int64_t y = at.y - 1 + i, x = at.x - 1 + j;
        const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
        pixel[i][j] = inside ? a.x.at(at.sample, y, x) : nullptr;
      }
    for_channels(a.channels, [&](auto block, int64_t c) {
      constexpr int N = decltype(block)::value;
      float buffer[L][L][N];  // transformed along the columns
      for (int j = 0; j < L; ++j) {
        const float* from[L];
        float* to[L];
        for (int i = 0; i < L; ++i) {
          from[i] = pixel[i][j] ? pixel[i][j] + c : zeros;
          to[i] = buffer[i][j];
        }
        Winograd<M>::template input<N>(from, to);
      }
      for (int i = 0; i < L; ++i) {
        const float* from[L];
        float* to[L];
        for (int j = 0; j < L; ++j) {
          from[j] = buffer[i][j];
          to[j] = a.tiles + ((i * L + j) * a.count + tile) * a.channels + c;
        }
        Winograd<M>::template input<N>(from, to);
      }
    });
  }
}

// gain·(value + bias + plus) of N channels of a pixel.
template <int N>
void write_pixel(const WinogradOutputArgs& a, const float* value, const float* plus, int64_t c,
                 float* y) {
  float sum[N];
  for (int i = 0; i < N; ++i) sum[i] = value[i];
  if (a.bias)
    for (int i = 0; i < N; ++i) sum[i] += a.bias[c + i];
  if (plus)
    for (int i = 0; i < N; ++i) sum[i] += plus[c + i];
  for (int i = 0; i < N; ++i) y[c + i] = a.gain * sum[i];
}

template <int M>
void winograd_output(const WinogradOutputArgs& a, int64_t begin, int64_t end) {
  constexpr int L = M + 2;
  const auto within = [](int64_t left) { return int(left < M ? left : M); };
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace at(a, a.first + tile);
    const int rows = within(a.height - at.y), columns = within(a.width - at.x);
    for_channels(a.channels, [&](auto block, int64_t c) {
      constexpr int N = decltype(block)::value;
      float buffer[M][L][N], line[M][N];
      for (int j = 0; j < L; ++j) {
        const float* from[L];
        float* to[M];
        for (int i = 0; i < L; ++i)
          from[i] = a.products + ((i * L + j) * a.count + tile) * a.channels + c;
        for (int i = 0; i < M; ++i) to[i] = buffer[i][j];
        Winograd<M>::template output<N>(from, to);
      }
      for (int i = 0; i < rows; ++i) {
        const float* from[L];
        float* to[M];
        for (int j = 0; j < L; ++j) from[j] = buffer[i][j];
        for (int j = 0; j < M; ++j) to[j] = line[j];
        Winograd<M>::template output<N>(from, to);
        for (int j = 0; j < columns; ++j) {
          const int64_t y = at.y + i, x = at.x + j;
          const float* const plus = a.plus.data ? a.plus.at(at.sample, y, x) : nullptr;
          write_pixel<N>(a, line[j], plus, c, a.y.at(at.sample, y, x));
        }
      }
    });
  }
}

inline WinogradKernel winograd_kernel() {
  return {{winograd_input<2>, winograd_input<4>}, {winograd_output<2>, winograd_output<4>}};
}

}  // namespace
}  // namespace sbm
