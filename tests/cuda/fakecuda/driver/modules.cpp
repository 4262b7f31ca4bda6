// The driver's side of CuPy: modules, functions and launches.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <memory>

#include "scheduler.h"
#include "state.h"

namespace fake {

struct Module {
  void* library;
  int device;
  const FakeKernel* kernels;
  void (*enter)(FakeBlock*);
  bool fibers, flush, strict;  // it has barriers or shuffles; -ftz=true was given; it is not CuPy's own
};

struct Function {
  Module* module;
  const FakeKernel* kernel;
  int most_shared = 48 << 10;
};

static FakeTraffic traffic;  // of all launches

// glibc knows a library by inode and name, and so does this: one image is one library.
static void* load(const std::string& image) {
  static std::map<std::string, void*> loaded;
  void*& library = loaded[image];
  if (!library) {
    const int file = memfd_create("kernel", 0);
    if (write(file, image.data(), image.size()) != (ssize_t)image.size()) return nullptr;
    library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "[fakecuda] %s\n", dlerror());
  }
  return library;
}

// What all devices of compute capability 7.5 and above allow.
static std::string illegal(const unsigned* grid, const unsigned* block, unsigned shared, int most_shared) {
  for (int i = 0; i < 3; ++i)
    if (!grid[i] || !block[i]) return "an empty grid or block";
  if (grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535) return "a grid beyond (2^31-1, 65535, 65535)";
  if ((u64)block[0] * block[1] * block[2] > 1024 || block[2] > 64)
    return "a block of more than 1024 threads or (-, -, 64)";
  if ((int)shared > most_shared)
    return std::to_string(shared) + " bytes of shared memory, of which " + std::to_string(most_shared) + " are allowed";
  return "";
}

// Bytes of one of CuPy's own arrays among the arguments of a kernel: {address, elements, shape…, strides…}; 0 if it is none.
static long long bytes_of(const void* argument, int size) {
  const long long* word = (const long long*)argument;
  if (size < 16 || !find((const void*)word[0])) return 0;
  const int axes = (size / 8 - 2) / 2;
  long long elements = 1, item = 8;
  for (int i = 0; i < axes; ++i)
    if (const long long step = llabs(word[2 + axes + i])) elements *= word[2 + i], item = std::min(item, step);
  return elements * item;
}

// An elementwise kernel and a reduction of CuPy's write their last array.
static Cost cost_of(const Function* function, void** args) {
  Cost cost;
  const FakeKernel* kernel = function->kernel;
  for (int i = 0; i < kernel->n_params && !function->module->strict; ++i)
    if (const long long bytes = bytes_of(args[i], kernel->sizes[i])) cost.read += cost.written, cost.written = bytes;
  return cost;
}

static void run_launch(Function* function, Launch launch, void** args) {
  launch.reverse = settings.reverse;
  const unsigned before = _mm_getcsr();
  // on a card -ftz=true flushes float32 only; MXCSR knows no difference, so kernels of doubles go without
  if (function->module->flush && !strchr(function->kernel->signature, 'd') && !strchr(function->kernel->signature, '?'))
    _mm_setcsr(before | 0x8040);
  const std::string broken = run(launch, args);
  _mm_setcsr(before);
  traffic.read += launch.traffic.read;
  traffic.written += launch.traffic.written;
  traffic.wide += launch.traffic.wide;
  traffic.narrow += launch.traffic.narrow;
  if (broken.empty()) return;
  const bool misaligned = broken.find(": misaligned") != std::string::npos;
  const bool illegal_address = broken.find(": illegal") != std::string::npos;
  stick(misaligned        ? cudaErrorMisalignedAddress
        : illegal_address ? cudaErrorIllegalAddress
                          : cudaErrorLaunchFailure,
      broken);
}

}  // namespace fake

using namespace fake;

API const char* fakecuda_signature(Function* function) { return function->kernel->signature; }
API void fakecuda_traffic(FakeTraffic* out) {
  LOCK;
  *out = traffic;
  traffic = {};
}

// ------------------------------------------------------------------------------------------------ contexts

// Their true prototypes are in cuda.h, so these have names of their own in C++.
#define CU(name, ...)                          \
  API int fake_##name(__VA_ARGS__) asm(#name); \
  int fake_##name(__VA_ARGS__)
static void* context_of(int device) { return (void*)(u64)(0x1000 + device); }

CU(cuInit, unsigned) { return 0; }
CU(cuDriverGetVersion, int* version) { return *version = settings.version, 0; }
CU(cuGetErrorName, int error, const char** out) { return *out = cudaGetErrorName((cudaError_t)error), 0; }
CU(cuGetErrorString, int error, const char** out) { return *out = text_of(error), 0; }
CU(cuCtxGetCurrent, void** out) { return *out = context_of(current), 0; }
CU(cuCtxSetCurrent, void* context) { return current = (int)((u64)context - 0x1000), 0; }
CU(cuCtxGetDevice, int* device) { return *device = current, 0; }
CU(cuCtxCreate_v2, void** out, unsigned, int device) { return *out = context_of(device), 0; }
CU(cuCtxDestroy_v2, void*) { return 0; }
CU(cuDevicePrimaryCtxRelease_v2, int) { return 0; }
CU(cuStreamGetCtx, cudaStream_t stream, void** out) { return *out = context_of(stream_of(stream)->device), 0; }

// ------------------------------------------------------------------------------------------------ modules

CU(cuModuleLoadData, Module** out, const char* image) {
  LOCK;
  if (memcmp(image, "FAKECUBN", 8)) return fail(cudaErrorInvalidKernelImage, "not made by the fake NVRTC");
  u64 size;
  memcpy(&size, image + 8, 8);
  void* library = load(std::string(image + 16, size));
  if (!library) return fail(cudaErrorInvalidKernelImage, "cannot be loaded");
  const auto kernels = (const FakeKernel* (*)())dlsym(library, "fake_kernels");
  const auto enter = (void (*)(FakeBlock*))dlsym(library, "fake_enter");
  const int* flags = (int*)dlsym(library, "fake_flags");
  *out = new Module{library, current, kernels(), enter, flags[0] != 0, flags[1] != 0, flags[2] != 0};
  return 0;
}
CU(cuModuleUnload, Module*) { return 0; }
CU(cuModuleGetFunction, Function** out, Module* module, const char* name) {
  for (const FakeKernel* kernel = module->kernels; kernel->name; ++kernel)
    if (!strcmp(kernel->name, name)) return *out = new Function{module, kernel}, 0;
  return fail(cudaErrorSymbolNotFound, std::string(name) + " is not in the module");
}
CU(cuModuleGetGlobal_v2, void** out, size_t* size, Module* module, const char* name) {
  *size = 0;
  return (*out = dlsym(module->library, name)) ? 0 : fail(cudaErrorSymbolNotFound, name);
}
CU(cuFuncGetAttribute, int* value, int attribute, Function* function) {
  *value = attribute == 0 ? 1024 : attribute == 8 ? function->most_shared : attribute == 4 ? 32 : 0;
  return 0;
}
CU(cuFuncSetAttribute, Function* function, int attribute, int value) {
  if (attribute != 8) return 0;
  if (value > settings.shared) return fail(cudaErrorInvalidValue, "an opt-in beyond the device's shared memory");
  function->most_shared = value;
  return 0;
}
CU(cuOccupancyMaxActiveBlocksPerMultiprocessor, int* blocks, void*, int threads, size_t) {
  return *blocks = 2048 / threads, 0;
}
CU(cuOccupancyMaxPotentialBlockSize, int* grid, int* block, void*, void*, size_t, int limit) {
  return *block = limit ? limit : 1024, *grid = settings.processors, 0;
}

CU(cuLaunchKernel, Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, cudaStream_t handle, void** args, void**) {
  LOCK;
  if (sticky) return sticky;
  const FakeKernel* kernel = function->kernel;
  Stream* stream = stream_of(handle);
  Launch launch{kernel, function->module->enter, function->module->fibers, function->module->strict, {gx, gy, gz},
      {bx, by, bz}, shared};
  std::string wrong = illegal(launch.grid, launch.block, shared, function->most_shared);
  if (kernel->cluster > 1 && (!settings.clusters || gx % kernel->cluster))
    wrong = "clusters of " + std::to_string(kernel->cluster) + " blocks, of which the device has none or the grid no whole number";
  if (!wrong.empty()) return fail(cudaErrorInvalidValue, std::string(kernel->name) + ": " + wrong);
  if (function->module->device != current || stream->device != current)
    return fail(cudaErrorInvalidResourceHandle, std::string(kernel->name) + " of device " +
                                                    std::to_string(function->module->device) +
                                                    " in a stream of device " + std::to_string(stream->device) +
                                                    ", while " + std::to_string(current) + " is current");
  // as the driver does: the arguments' bytes are taken now
  const auto bytes = std::make_shared<std::vector<std::vector<max_align_t>>>();
  const auto pointers = std::make_shared<std::vector<void*>>();
  for (int i = 0; i < kernel->n_params && wrong.empty(); ++i) {
    const size_t size = kernel->sizes[i];
    bytes->emplace_back(size / sizeof(max_align_t) + 1);
    memcpy(bytes->back().data(), args[i], size);
    // of CuPy's own structs the first word is an address; those that have none end with words that were never set
    wrong = out_of_reach(args[i], function->module->strict ? size : size < 8 ? 0 : 8, current);
  }
  if (!wrong.empty()) return fail(cudaErrorIllegalAddress, std::string(kernel->name) + ": " + wrong);
  for (auto& one : *bytes) pointers->push_back(one.data());
  return enqueue(stream, kernel->name, [=] { run_launch(function, launch, pointers->data()), (void)bytes; },
      cost_of(function, args));
}

// ------------------------------------------------------------------------------------------------ NVIDIA's own runtime

// cub, jitify and cupy.random's Generator have it within them, and code for a card. They would fail in silence.
static int foreign() {
  fputs("[fakecuda] a part of CuPy that has NVIDIA's runtime within it was used\n", stderr);
  abort();
}
CU(cuGetProcAddress_v2, const char*, void**, int, u64, int*) { return foreign(); }
CU(cuGetProcAddress, const char*, void**, int, u64) { return foreign(); }
CU(cuGetExportTable, const void**, const void*) { return foreign(); }
