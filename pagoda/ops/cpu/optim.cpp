// What an optimizer does to all parameters or gradients: their norm, scaling, AdamW. The threads wake once for a list.
//
// Bound: memory. Norm and scaling read (and write) each element once; AdamW reads four numbers and writes three.
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements that are worth a thread

typedef uint32_t Bits __attribute__((vector_size(4 * W)));

// 32 random bits for each of W places from `first` on: a hash (two rounds of multiply and shift), the same in every run.
INLINE Bits random_bits(uint32_t first) {
  static const uint32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Bits h = (Bits)load_bits(LANE) + first;
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// a as it is stored: what T is too narrow for goes up or down by the low half of `random`, in proportion, so that sums of
// many small steps come out right (Gupta et al. 2015). Of bf16 only; NaN stays NaN.
template <class T> INLINE vf by_chance(vf a, Bits random) {
  if constexpr (!std::is_same_v<T, bf16>) return a;
  const Bits bits = (Bits)a, number = (Bits)(a == a), rounded = (bits + (random & 0xffffu)) & 0xffff0000u;
  return (vf)((rounded & number) | (bits & ~number));
}

struct Piece { int64_t tensor, begin, n; };  // elements begin .. begin + n - 1

// f(number, piece) for every piece of GRAIN elements of every tensor.
template <class F> int64_t for_pieces(const std::vector<int64_t>& n, F f) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < n.size(); t++)
    for (int64_t i = 0; i < n[t]; i += GRAIN) pieces.push_back({int64_t(t), i, std::min(GRAIN, n[t] - i)});
  parallel_for(pieces.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i, pieces[i]);
  });
  return pieces.size();
}

}  // namespace

// Pieces add up in lanes, and then in their order: the threads make no difference.
void square_sum(ptr sum, std::vector<ptr> x, std::vector<int64_t> n, int64_t dtype) {
  std::vector<double> of_piece(std::accumulate(n.begin(), n.end(), int64_t(0)) / GRAIN + n.size());
  with_float_type(dtype, [&](auto type) {
    for_pieces(n, [&](int64_t i, const Piece& piece) {
      auto from = (const decltype(type)*)x[piece.tensor] + piece.begin;
      vf squares = zero();
      for_each_vector(piece.n, [&](int64_t i, auto load, auto) {
        const vf a = load(from + i);
        squares = fma(a, a, squares);
      });
      of_piece[i] = reduce_add(squares);
    });
  });
  *(double*)sum += std::accumulate(of_piece.begin(), of_piece.end(), 0.0);
}

void scale(std::vector<ptr> x, std::vector<int64_t> n, int64_t dtype, double factor) {
  with_float_type(dtype, [&](auto type) {
    for_pieces(n, [&](int64_t, const Piece& piece) {
      auto at = (decltype(type)*)x[piece.tensor] + piece.begin;
      for_each_vector(piece.n, [&](int64_t i, auto load, auto store) { store(at + i, mul(load(at + i), set1(float(factor)))); });
    });
  });
}

// One step of AdamW (Loshchilov and Hutter 2019). `step` are float32 numbers of steps done, which count up. Parameters and
// averages in bf16 are rounded by chance, which depends on the step and the element's place alone: not on what else is stepped.
void adamw(std::vector<ptr> x, std::vector<ptr> grad, std::vector<ptr> average, std::vector<ptr> square,
           std::vector<ptr> step, std::vector<int64_t> n, int64_t dtype, double lr, double beta1, double beta2, double eps,
           double decay) {
  for (ptr count : step) *(float*)count += 1;
  const vf keep1 = set1(float(beta1)), new1 = set1(float(1 - beta1)), keep2 = set1(float(beta2)), new2 = set1(float(1 - beta2));
  const vf shrink = set1(float(1 - lr * decay)), least = set1(float(eps));
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    for_pieces(n, [&](int64_t, const Piece& piece) {
      auto at = [&](const std::vector<ptr>& list) { return (T*)list[piece.tensor] + piece.begin; };
      T *w = at(x), *m = at(average), *v = at(square);
      const T* g = at(grad);
      const double steps = *(const float*)step[piece.tensor];
      const uint32_t first = uint32_t(steps) * 0x9e3779b9u + uint32_t(piece.begin);
      const vf rate = set1(float(lr / (1 - std::pow(beta1, steps)))), unbias = set1(float(1 / std::sqrt(1 - std::pow(beta2, steps))));
      for_each_vector(piece.n, [&](int64_t i, auto load, auto store) {
        const vf a = load(g + i), mean = fma(a, new1, mul(load(m + i), keep1));
        const vf spread = fma(mul(a, new2), a, mul(load(v + i), keep2));
        const vf move = div(mul(mean, rate), fma(square_root(spread), unbias, least));
        const Bits random = random_bits(first + uint32_t(i));
        store(m + i, by_chance<T>(mean, random >> 8));
        store(v + i, by_chance<T>(spread, random >> 16));
        store(w + i, by_chance<T>(sub(mul(load(w + i), shrink), move), random));
      });
    });
  });
}
