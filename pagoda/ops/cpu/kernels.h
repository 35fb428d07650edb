// Every kernel that Python sees. Pointers are integers (0: no tensor), strides count elements, dtypes are simd.h's codes.
// To add one: declare it here, name it in KERNELS, define it in its operation's file.
#pragma once
#include <cstdint>

using ptr = uintptr_t;

// norm.cpp
void rms_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, int64_t rows, int64_t n, int64_t x_stride,
              int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps, double offset);
void layer_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, ptr bias, int64_t rows, int64_t n, int64_t x_stride,
                int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps);

#define KERNELS(X) \
  X(rms_norm)      \
  X(layer_norm)
