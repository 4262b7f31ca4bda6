// What cupy/cuda/thrust.pyx asks of Thrust, on the CPU and in stream order.

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <new>
#include <numeric>
#include <vector>

typedef std::vector<ptrdiff_t> Shape;

static void enqueue(intptr_t stream, std::function<void()> f) {
  const auto call = [](void* data) {
    auto* f = (std::function<void()>*)data;
    (*f)();
    delete f;
  };
  cudaLaunchHostFunc((cudaStream_t)stream, call, new std::function<void()>(std::move(f)));
}

struct Half {
  _Float16 value;
};
static bool less(Half a, Half b) { return b.value != b.value ? a.value == a.value : a.value < b.value; }
template <typename T>
static bool less(T a, T b) {
  return b != b ? a == a : a < b;
}  // NaN comes last

template <typename F>
static void with_type(int id, F f) {  // CuPy's numbers of dtypes
  switch (id) {
    case 0:
      return f((int8_t)0);
    case 1:
    case 13:
      return f((uint8_t)0);
    case 2:
      return f((int16_t)0);
    case 3:
      return f((uint16_t)0);
    case 4:
      return f((int32_t)0);
    case 5:
      return f((uint32_t)0);
    case 6:
      return f((int64_t)0);
    case 7:
      return f((uint64_t)0);
    case 8:
      return f(Half{});
    case 9:
      return f(0.f);
    case 10:
      return f(0.);
    default:
      throw std::bad_alloc();
  }
}

static size_t count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), (size_t)1, std::multiplies<size_t>());
}

void thrust_sort(int id, void* data, size_t*, const Shape& shape, intptr_t stream, void*) {
  const size_t n = count(shape), row = shape.back();
  with_type(id, [=](auto zero) {
    typedef decltype(zero) T;
    enqueue(stream, [=] {
      for (size_t i = 0; i < n; i += row)
        std::stable_sort((T*)data + i, (T*)data + i + row, [](T a, T b) { return less(a, b); });
    });
  });
}

void thrust_argsort(int id, size_t* order, void* data, void*, const Shape& shape, intptr_t stream, void*) {
  const size_t n = count(shape), row = shape.back();
  with_type(id, [=](auto zero) {
    const auto* values = (decltype(zero)*)data;
    enqueue(stream, [=] {
      for (size_t i = 0; i < n; i += row) {
        std::iota(order + i, order + i + row, 0);
        std::stable_sort(
            order + i, order + i + row, [=](size_t a, size_t b) { return less(values[i + a], values[i + b]); });
      }
    });
  });
}

void thrust_lexsort(int id, size_t* order, void* keys, size_t k, size_t n, intptr_t stream, void*) {
  with_type(id, [=](auto zero) {
    const auto* values = (decltype(zero)*)keys;
    enqueue(stream, [=] {
      std::iota(order, order + n, 0);
      for (size_t i = 0; i < k; ++i)
        std::stable_sort(
            order, order + n, [=](size_t a, size_t b) { return less(values[i * n + a], values[i * n + b]); });
    });
  });
}
