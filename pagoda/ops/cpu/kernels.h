// Every kernel that Python sees. Pointers are integers (0: no tensor), strides count elements, dtypes are simd.h's codes.
// To add one: declare it here, name it in KERNELS, define it in its operation's file.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

using ptr = uintptr_t;

// Throws (an IndexError) for row numbers that are neither among n_rows nor `or_this`. To be called before threads start.
inline void check_rows(ptr ids, int64_t n, int64_t n_rows, int64_t or_this = 0) {
  for (const int64_t *id = (const int64_t*)ids, *end = id + n; id < end; id++)
    if ((*id < 0 || *id >= n_rows) && *id != or_this) throw std::out_of_range("row " + std::to_string(*id) + " of " + std::to_string(n_rows));
}

// linear.cpp. weight: the words that PackedWeight.kernel_view of formats.py writes. y and add are (rows, n_out), dense.
void linear(ptr y, ptr weight, ptr x, ptr bias, ptr add, int64_t rows, int64_t x_stride, int64_t dtype);
void linear_many(std::vector<ptr> y, std::vector<ptr> weights, ptr x, int64_t rows, int64_t x_stride, int64_t dtype);
void embedding(ptr y, ptr weight, ptr ids, int64_t n, int64_t dtype);
void rows(ptr y, ptr weight, ptr ids, int64_t n, int64_t n_rows, int64_t size);
void dequantize(ptr y, ptr weight, int64_t first, int64_t rows, int64_t dtype);
struct Span {
  const char* from;
  int64_t bytes;
};
std::vector<Span> share_of_weights(const std::vector<ptr>& weights, int64_t me, int64_t threads);  // what a thread reads

// pack_bf16.cpp. w (n_out, n_in) bf16, the rows apart by stride.
void bf16_exponents(ptr exponents, ptr counts, ptr w, int64_t n_out, int64_t n_in, int64_t stride);
void bf16_lines(ptr lines, ptr escapes, ptr starts, ptr exponents, ptr w, int64_t n_out, int64_t n_in, int64_t stride);

// norm.cpp
void add(ptr out, ptr x, ptr delta, int64_t n, int64_t dtype);
void rms_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, int64_t rows, int64_t n, int64_t x_stride,
              int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps, double offset);
void layer_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, ptr bias, int64_t rows, int64_t n, int64_t x_stride,
                int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps);
void rms_norm_backward(ptr dx, ptr dweight, ptr dy, ptr dsum, ptr x, ptr weight, int64_t rows, int64_t n,
                       int64_t x_stride, int64_t dtype, int64_t weight_dtype, double eps, double offset);
void layer_norm_backward(ptr dx, ptr dweight, ptr dbias, ptr dy, ptr dsum, ptr x, ptr weight, int64_t rows, int64_t n,
                         int64_t x_stride, int64_t dtype, int64_t weight_dtype, double eps);

// activations.cpp
void gated(ptr out, ptr gate, ptr up, int64_t rows, int64_t n, int64_t gate_stride, int64_t up_stride, int64_t dtype,
           int64_t act);
void gated_backward(ptr dgate, ptr dup, ptr dy, ptr gate, ptr up, int64_t rows, int64_t n, int64_t gate_stride,
                    int64_t up_stride, int64_t dtype, int64_t act);

// rotary.cpp
void rotary(ptr q_out, ptr k_out, ptr q, ptr k, ptr cos, ptr sin, int64_t rows, int64_t n_head, int64_t n_kv_head,
            int64_t head_size, int64_t half, int64_t q_stride, int64_t k_stride, int64_t dtype);
void rotary_store(ptr q_out, ptr q, ptr k, ptr v, ptr cos, ptr sin, ptr k_pages, ptr v_pages, ptr k_scale, ptr v_scale,
                  ptr slots, int64_t rows, int64_t n_slots, int64_t n_head, int64_t n_kv_head, int64_t head_size, int64_t half,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t dtype, int64_t cache_dtype);

// attention.cpp
void attention(ptr out, ptr q, ptr k, ptr v, ptr cu_seqlens, ptr block_table, ptr seq_lens, ptr k_scale, ptr v_scale,
               ptr alibi, ptr lse, int64_t n_seq, int64_t n_head, int64_t n_kv_head, int64_t head_size, int64_t page_size,
               int64_t max_pages, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t q_dtype,
               int64_t kv_dtype, int64_t causal, int64_t window, double scale, double softcap, int64_t products);

// attention_backward.cpp
void attention_backward(ptr dq, ptr dk, ptr dv, ptr scratch, ptr dout, ptr out, ptr lse, ptr q, ptr k, ptr v,
                        ptr cu_seqlens, ptr alibi, int64_t n_seq, int64_t n_head, int64_t n_kv_head, int64_t head_size,
                        int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t dq_stride, int64_t dk_stride,
                        int64_t dtype, int64_t causal, int64_t window, double scale, double softcap);

// loss.cpp
void cross_entropy(ptr losses, ptr logits, ptr targets, int64_t rows, int64_t n, int64_t dtype, int64_t ignore,
                   double softcap, double z_loss);

// matmul.cpp
void matmul(ptr out, ptr a, ptr b, ptr bias, ptr sums, int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
            bool a_turned, bool b_turned, int64_t dtype);

// optim.cpp. Lists of tensors, of n elements each.
void square_sum(ptr sum, std::vector<ptr> x, std::vector<int64_t> n, int64_t dtype);  // added to *sum, a float64
void scale(std::vector<ptr> x, std::vector<int64_t> n, int64_t dtype, double factor);
void adamw(std::vector<ptr> x, std::vector<ptr> grad, std::vector<ptr> average, std::vector<ptr> square,
           std::vector<ptr> step, std::vector<int64_t> n, int64_t dtype, double lr, double beta1, double beta2, double eps,
           double decay);

// sample.cpp
void sample(ptr tokens, ptr scores, ptr options, int64_t rows, int64_t n, int64_t stride, int64_t dtype);

#define KERNELS(X) \
  X(linear) \
  X(linear_many) \
  X(embedding) \
  X(rows) \
  X(dequantize) \
  X(bf16_exponents) \
  X(bf16_lines) \
  X(add) \
  X(rms_norm) \
  X(layer_norm) \
  X(rms_norm_backward) \
  X(layer_norm_backward) \
  X(gated) \
  X(gated_backward) \
  X(rotary) \
  X(rotary_store) \
  X(attention) \
  X(attention_backward) \
  X(cross_entropy) \
  X(matmul) \
  X(square_sum) \
  X(scale) \
  X(adamw) \
  X(sample)
