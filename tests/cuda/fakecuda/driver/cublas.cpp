// cuBLAS: the products that NumPy's own OpenBLAS computes, in the precision asked for, in stream order.

#include <string.h>

#include "state.h"

using namespace fake;

struct Blas {
  int device;
  cudaStream_t stream = nullptr;
  int pointer_mode = 0, math_mode = 0;
};

enum Type { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14 };
enum { COMPUTE_32F = 68, COMPUTE_64F = 70, COMPUTE_32F_FAST_TF32 = 77, DISALLOW_REDUCED_PRECISION = 16 };
enum { INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

// cblas_sgemm and cblas_dgemm of OpenBLAS with 64-bit integers: matrices by columns
template <typename T>
using Gemm = void (*)(
    int, int, int, int64_t, int64_t, int64_t, T, const T*, int64_t, const T*, int64_t, T, T*, int64_t);
static Gemm<float> sgemm;
static Gemm<double> dgemm;
static void multiply(int ta, int tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb, float* c) {
  sgemm(102, ta ? 112 : 111, tb ? 112 : 111, m, n, k, 1, a, lda, b, ldb, 0, c, m);
}
static void multiply(
    int ta, int tb, int m, int n, int k, const double* a, int lda, const double* b, int ldb, double* c) {
  dgemm(102, ta ? 112 : 111, tb ? 112 : 111, m, n, k, 1, a, lda, b, ldb, 0, c, m);
}
API void fakecuda_gemm(void* s, void* d) { sgemm = (Gemm<float>)s, dgemm = (Gemm<double>)d; }

static size_t size_of(int type) { return type == R_32F ? 4 : type == R_64F ? 8 : 2; }
static const char* name_of(int type) {
  return type == R_32F ? "float32" : type == R_64F ? "float64" : type == R_16F ? "float16" : "bfloat16";
}
static double read(const void* p, int type, size_t i) {
  if (type == R_32F) return ((const float*)p)[i];
  if (type == R_64F) return ((const double*)p)[i];
  if (type == R_16F) return (double)((const _Float16*)p)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void write(void* p, int type, size_t i, double value) {
  if (type == R_32F) ((float*)p)[i] = (float)value;
  if (type == R_64F) ((double*)p)[i] = value;
  if (type == R_16F) ((_Float16*)p)[i] = (_Float16)(float)value;
  if (type != R_16BF) return;
  const float rounded = (float)value;
  uint32_t bits;
  memcpy(&bits, &rounded, 4);
  ((uint16_t*)p)[i] = rounded != rounded ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A matrix by columns in the precision of the product, without gaps.
template <typename A>
static std::vector<A> dense(const void* p, int type, int rows, int columns, int ld) {
  std::vector<A> out((size_t)rows * columns);
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < rows; ++i) out[(size_t)j * rows + i] = (A)read(p, type, (size_t)j * ld + i);
  return out;
}

static void shorten(std::vector<float>& values) {
  for (float& value : values) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
    memcpy(&value, &bits, 4);
  }
}
static void shorten(std::vector<double>&) {}

struct Product {
  int ta, tb, m, n, k;
  double alpha, beta;
  const void *a, *b;
  void* c;
  int type, lda, ldb, type_c, ldc;
  bool tf32;          // 10 bits behind the point, as tensor cores have them
  bool rounds_parts;  // cuBLAS may add parts of a sum up in the type of the result, unless it is told not to
};

template <typename A>
static void compute(const Product& p) {
  std::vector<A> sum((size_t)p.m * p.n), part(sum.size());
  const int parts = p.rounds_parts && p.k > 1 ? 2 : 1;
  for (int s = 0; s < parts; ++s) {
    const int from = p.k * s / parts, k = p.k * (s + 1) / parts - from;
    const char* a = (const char*)p.a + size_of(p.type) * from * (p.ta ? 1 : (size_t)p.lda);
    const char* b = (const char*)p.b + size_of(p.type) * from * (p.tb ? (size_t)p.ldb : 1);
    auto da = dense<A>(a, p.type, p.ta ? k : p.m, p.ta ? p.m : k, p.lda);
    auto db = dense<A>(b, p.type, p.tb ? p.n : k, p.tb ? k : p.n, p.ldb);
    if (p.tf32) shorten(da), shorten(db);
    multiply(p.ta, p.tb, p.m, p.n, k, da.data(), p.ta ? k : p.m, db.data(), p.tb ? p.n : k, part.data());
    for (size_t i = 0; i < sum.size(); ++i) {
      sum[i] += part[i];
      if (parts > 1) write(&part[0], p.type_c, 0, sum[i]), sum[i] = (A)read(&part[0], p.type_c, 0);
    }
  }
  for (int j = 0; j < p.n; ++j)
    for (int i = 0; i < p.m; ++i) {
      const size_t at = (size_t)j * p.ldc + i;
      const A value = (A)p.alpha * sum[(size_t)j * p.m + i];
      write(p.c, p.type_c, at, p.beta ? value + (A)p.beta * (A)read(p.c, p.type_c, at) : value);
    }
}

static int gemm(Blas* handle, Product p, int compute_type) {
  LOCK;
  Stream* stream = stream_of(handle->stream);
  const bool wide = compute_type == COMPUTE_64F;
  if (handle->device != current || stream->device != current) return INVALID_VALUE;
  if (compute_type == COMPUTE_32F_FAST_TF32 && p.type != R_32F) return NOT_SUPPORTED;
  if ((compute_type != COMPUTE_32F && compute_type != COMPUTE_32F_FAST_TF32 && !wide) || wide != (p.type == R_64F))
    return NOT_SUPPORTED;
  if (p.type_c != p.type && p.type_c != (wide ? R_64F : R_32F)) return NOT_SUPPORTED;
  if (p.m < 1 || p.n < 1 || p.k < 1 || p.lda < (p.ta ? p.k : p.m) || p.ldb < (p.tb ? p.n : p.k) || p.ldc < p.m)
    return INVALID_VALUE;
  for (const auto& [pointer, type] : {std::pair(p.a, p.type), {p.b, p.type}, {(const void*)p.c, p.type_c}})
    if ((u64)pointer % size_of(type) || !find(pointer) || !out_of_reach(&pointer, 8, current).empty())
      return INVALID_VALUE;
  p.rounds_parts = settings.reduced && size_of(p.type_c) == 2 && !(handle->math_mode & DISALLOW_REDUCED_PRECISION);
  p.tf32 = compute_type == COMPUTE_32F_FAST_TF32;
  const std::string what = std::string("gemmEx of ") + name_of(p.type) + " into " + name_of(p.type_c);
  const long long m = p.m, n = p.n, k = p.k, into = m * n * size_of(p.type_c);
  const Cost cost = {(long long)size_of(p.type) * (m * k + k * n) + (p.beta ? into : 0), into, m * n * k,
      std::string(p.tf32 ? "tfloat32" : name_of(p.type)) + " in " +
          name_of(p.rounds_parts ? p.type_c : wide ? R_64F : R_32F)};
  return enqueue(stream, what, [=] { wide ? compute<double>(p) : compute<float>(p); }, cost) ? EXECUTION_FAILED : 0;
}

API int cublasCreate_v2(Blas** out) { return *out = new Blas{current}, 0; }
API int cublasDestroy_v2(Blas*) { return 0; }
API int cublasGetVersion_v2(Blas*, int* version) { return *version = settings.version * 10, 0; }
API int cublasSetStream_v2(Blas* handle, cudaStream_t stream) { return handle->stream = stream, 0; }
API int cublasGetStream_v2(Blas* handle, cudaStream_t* out) { return *out = handle->stream, 0; }
API int cublasSetPointerMode_v2(Blas* handle, int mode) { return handle->pointer_mode = mode, 0; }
API int cublasGetPointerMode_v2(Blas* handle, int* mode) { return *mode = handle->pointer_mode, 0; }
API int cublasSetMathMode(Blas* handle, int mode) { return handle->math_mode = mode, 0; }
API int cublasGetMathMode(Blas* handle, int* mode) { return *mode = handle->math_mode, 0; }
API int cublasSgemm_v2(Blas* h, int ta, int tb, int m, int n, int k, const float* alpha, const void* a, int lda,
    const void* b, int ldb, const float* beta, void* c, int ldc) {
  return gemm(h, {ta, tb, m, n, k, *alpha, *beta, a, b, c, R_32F, lda, ldb, R_32F, ldc}, COMPUTE_32F);
}
API int cublasDgemm_v2(Blas* h, int ta, int tb, int m, int n, int k, const double* alpha, const void* a, int lda,
    const void* b, int ldb, const double* beta, void* c, int ldc) {
  return gemm(h, {ta, tb, m, n, k, *alpha, *beta, a, b, c, R_64F, lda, ldb, R_64F, ldc}, COMPUTE_64F);
}
API int cublasGemmEx(Blas* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type_a,
    int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute_type,
    int) {
  if (type_a != type_b) return NOT_SUPPORTED;
  const bool wide = compute_type == COMPUTE_64F;
  const double one = wide ? *(const double*)alpha : *(const float*)alpha;
  const double add = wide ? *(const double*)beta : *(const float*)beta;
  return gemm(h, {ta, tb, m, n, k, one, add, a, b, c, type_a, lda, ldb, type_c, ldc}, compute_type);
}
