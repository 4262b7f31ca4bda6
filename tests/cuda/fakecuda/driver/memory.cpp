// Memory of devices is this process's own, on pages of its own with a forbidden page on either side.

#include <string.h>
#include <sys/mman.h>

#include <memory>

#include "state.h"

namespace fake {

static std::map<u64, Allocation> allocations;
static std::map<int, size_t> used;  // bytes of each device
static const size_t TOTAL = 1ull << 40, PAGE = 4096;

Allocation* find(const void* pointer) {
  auto it = allocations.upper_bound((u64)pointer);
  if (it == allocations.begin()) return nullptr;
  --it;
  return (u64)pointer < it->first + it->second.size ? &it->second : nullptr;
}

std::string out_of_reach(const void* argument, size_t size, int device) {
  for (size_t at = 0; at + 8 <= size; at += 8) {
    void* pointer;
    memcpy(&pointer, (const char*)argument + at, 8);
    const Allocation* found = find(pointer);
    if (found && found->kind == DEVICE && found->device != device && !settings.peers)
      return "memory of device " + std::to_string(found->device) + " in work on device " + std::to_string(device);
  }
  return "";
}

static cudaError_t allocate(void** out, size_t size, Kind kind) {
  *out = nullptr;
  if (!size) return cudaSuccess;
  if (kind == DEVICE && used[current] + size > TOTAL) return fail(cudaErrorMemoryAllocation);
  const size_t body = (size + PAGE - 1) / PAGE * PAGE, mapped = body + 2 * PAGE;
  char* base = (char*)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  mprotect(base + PAGE, body, PROT_READ | PROT_WRITE);
  char* start = base + PAGE + (body - (size + 511) / 512 * 512);  // as near to its end as an alignment of 512 allows
  allocations[(u64)start] = {size, mapped, current, kind, base};
  if (kind == DEVICE) used[current] += size;
  *out = start;
  return cudaSuccess;
}

static cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  const auto it = allocations.find((u64)pointer);
  if (it == allocations.end()) return fail(cudaErrorInvalidValue);
  if (it->second.kind == DEVICE) used[it->second.device] -= it->second.size;
  munmap(it->second.base, it->second.mapped);
  allocations.erase(it);
  return cudaSuccess;
}

// A copy in stream order. From pageable memory the bytes are taken now; to pageable memory the call waits.
static cudaError_t copy(void* to, const void* from, size_t size, Stream* stream, bool wait) {
  bool host_source, host_target, from_host;
  {
    LOCK;
    const Allocation *target = find(to), *source = find(from);
    host_source = !source, host_target = !target, from_host = !source || source->kind != DEVICE;
    wait = wait && !(target && source && target->kind == DEVICE && source->kind == DEVICE);
  }
  if (from_host && refused(COPY_FROM_HOST, "a copy from the host's memory")) return cudaErrorNotPermitted;
  if ((host_target || wait) && refused(WAIT, "a copy that the host waits for")) return cudaErrorNotPermitted;
  LOCK;
  cudaError_t error;
  if (host_source && !host_target) {
    const auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + size);
    error = enqueue(stream, "copy", [=] { memcpy(to, staged->data(), size); }, {0, (long long)size});
  } else {
    error = enqueue(stream, "copy", [=] { memmove(to, from, size); }, {(long long)size, (long long)size});
  }
  return error || stream->capture || !(wait || host_target) ? error : wait_for(stream);
}

}  // namespace fake

using namespace fake;

// Fills memory with NaN of every kind of float, and integers that are no class id.
API int fakecuda_poison(void* pointer, size_t size, cudaStream_t handle) {
  LOCK;
  const auto fill = [=] {
    for (size_t i = 0; i < size; ++i) ((unsigned char*)pointer)[i] = i % 2 ? 0xff : 0xfe;
  };
  return enqueue(stream_of(handle), "empty", fill);
}
API int fakecuda_device_of(void* pointer) {
  LOCK;
  const Allocation* found = find(pointer);
  return found ? found->device : -1;
}

API cudaError_t cudaMalloc(void** out, size_t size) {
  LOCK;
  return capturing() ? fail(cudaErrorStreamCaptureUnsupported) : allocate(out, size, DEVICE);
}
API cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t) {
  LOCK;
  return allocate(out, size, DEVICE);
}
API cudaError_t cudaMallocFromPoolAsync(void** out, size_t size, cudaMemPool_t, cudaStream_t) {
  LOCK;
  return allocate(out, size, DEVICE);
}
API cudaError_t cudaMallocManaged(void** out, size_t size, unsigned) {
  LOCK;
  return allocate(out, size, MANAGED);
}
API cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) {
  LOCK;
  return allocate(out, size, PINNED);
}
API cudaError_t cudaMallocHost(void** out, size_t size) { return cudaHostAlloc(out, size, 0); }
API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  LOCK;
  allocations[(u64)pointer] = {size, 0, current, REGISTERED, nullptr};
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* pointer) {
  LOCK;
  allocations.erase((u64)pointer);
  return cudaSuccess;
}
API cudaError_t cudaFree(void* pointer) {
  LOCK;
  if (pointer && wait_for_device(current) && !sticky) return cudaErrorStreamCaptureUnsupported;
  return release(pointer);
}
API cudaError_t cudaFreeHost(void* pointer) {
  LOCK;
  for (int device = 0; device < settings.devices; ++device) wait_for_device(device);
  return release(pointer);
}
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  LOCK;
  return enqueue(stream_of(stream), "free", [pointer] { release(pointer); });
}
API cudaError_t cudaMemGetInfo(size_t* free_, size_t* total) {
  LOCK;
  return *total = TOTAL, *free_ = TOTAL - used[current], cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return fail(copy(to, from, size, stream_of(stream), false));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return fail(copy(to, from, size, null_stream(current), true));
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return fail(copy(to, from, size, stream_of(stream), false));
}
API cudaError_t cudaMemcpyPeer(void* to, int there, const void* from, int here, size_t size) {
  LOCK;
  wait_for_device(here);
  wait_for_device(there);
  memmove(to, from, size);
  return fail(sticky);
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  LOCK;
  return fail(enqueue(stream_of(stream), "memset", [=] { memset(to, value, size); }, {0, (long long)size}));
}
API cudaError_t cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
    size_t height, cudaMemcpyKind, cudaStream_t stream) {
  LOCK;
  return fail(enqueue(stream_of(stream), "copy", [=] {
    for (size_t i = 0; i < height; ++i) memcpy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  }, {(long long)(width * height), (long long)(width * height)}));
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  LOCK;
  memset(out, 0, sizeof *out);
  const Allocation* found = find(pointer);
  out->device = found ? found->device : cudaInvalidDeviceId;
  out->type = !found                   ? cudaMemoryTypeUnregistered
              : found->kind == DEVICE  ? cudaMemoryTypeDevice
              : found->kind == MANAGED ? cudaMemoryTypeManaged
                                       : cudaMemoryTypeHost;
  out->devicePointer = found ? (void*)pointer : nullptr;
  out->hostPointer = found && found->kind != DEVICE ? (void*)pointer : nullptr;
  return cudaSuccess;
}
