// Cross-entropy of rows of logits, with its gradient written over them.
//
// Bound: memory, then the exponential. A row (a vocabulary) is read three times, for its maximum, its sum and its
// gradient, and stays in the L2 cache meanwhile.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

// losses[r] = lse - logit[target] + z_loss * lse^2, lse the log-sum-exp of the row (after the soft cap); 0 where the
// target is `ignore`. logits become the gradient of losses[r] by each of them. Other targets outside of 0 .. n - 1 throw.
void cross_entropy(ptr losses, ptr logits, ptr targets, int64_t rows, int64_t n, int64_t dtype, int64_t ignore,
                   double softcap, double z_loss) {
  check_rows(targets, rows, n, ignore);
  const vf cap = set1(float(softcap)), inverse_cap = set1(softcap ? float(1 / softcap) : 0);
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows, (1 << 14) / (n + 1) + 1, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        T* row = (T*)logits + r * n;
        const int64_t target = ((const int64_t*)targets)[r];
        float& loss = ((float*)losses)[r];
        if (target == ignore) {
          memset(row, 0, n * sizeof(T));
          loss = 0;
          continue;
        }
        auto capped = [=](vf x) { return softcap ? mul(cap, tanh(mul(x, inverse_cap))) : x; };
        vf largest = set1(-std::numeric_limits<float>::infinity()), sum = zero();
        int64_t whole = n / W * W;  // what lies behind must not count as zeros
        auto tail = [=](int64_t i) { return capped(set1(to_float(row[i]))); };
        for (int64_t i = 0; i < whole; i += W) largest = max(capped(load(row + i)), largest);
        for (int64_t i = whole; i < n; i++) largest = max(tail(i), largest);
        const vf maximum = set1(reduce_max(largest));
        for (int64_t i = 0; i < whole; i += W) sum = add(sum, exp(sub(capped(load(row + i)), maximum)));
        float total = reduce_add(sum);
        for (int64_t i = whole; i < n; i++) total += reduce_max(exp(sub(tail(i), maximum)));
        const float lse = reduce_max(maximum) + std::log(total), z = float(z_loss);
        const float picked = reduce_max(tail(target));
        loss = lse - picked + z * lse * lse;
        const vf shift = set1(lse), factor = set1(1 + 2 * z * lse);
        auto slope = [=](vf x) {  // of the soft cap
          vf t = tanh(mul(x, inverse_cap));
          return softcap ? fnma(t, t, set1(1)) : set1(1);
        };
        const vf at_target = mul(sub(mul(factor, exp(sub(set1(picked), shift))), set1(1)), slope(set1(to_float(row[target]))));
        for_each_vector(n, [&](int64_t i, auto load, auto store) {
          vf x = load(row + i), p = mul(factor, exp(sub(capped(x), shift)));
          store(row + i, softcap ? mul(p, slope(x)) : p);
        });
        from_float(reduce_max(at_target), row + target);
      }
    });
  });
}
