// Devices, what they can do, and errors. Whatever of the runtime is in no file here answers "not supported" (build.py).

#include <stdio.h>
#include <string.h>

#include "state.h"

namespace fake {

std::recursive_mutex mutex;
Settings settings;
thread_local int current = 0;
cudaError_t sticky = cudaSuccess;
static std::string sticky_text;
static thread_local cudaError_t last = cudaSuccess;  // as cudaGetLastError gives it
static thread_local cudaError_t told = cudaSuccess;  // what last_text is about
static thread_local std::string last_text;
static int (*judge)(int ask, const char* what);

cudaError_t fail(cudaError_t error, const std::string& why) {
  if (!error) return error;
  if (error != told || !why.empty()) last_text = why;
  return last = told = error;
}

void stick(cudaError_t error, const std::string& why) {
  sticky = error;
  sticky_text = why;
  fprintf(stderr, "[fakecuda] %s\n", why.c_str());
}

const char* text_of(int error) {
  const std::string& text = error == sticky ? sticky_text : last_text;
  return (error == sticky || error == told) && !text.empty() ? text.c_str() : "no more is known";
}

bool refused(Ask ask, const char* what) {
  if (!judge || !judge(ask, what)) return false;
  fail(cudaErrorNotPermitted, std::string(what) + " inside an operation");
  return true;
}

static cudaError_t known(int device) {
  return device < 0 || device >= settings.devices ? fail(cudaErrorInvalidDevice) : cudaSuccess;
}

}  // namespace fake

using namespace fake;

// ------------------------------------------------------------------------------------------------ for tests

API int fakecuda_set(const char* name, int value) {
  LOCK;
#define SETTING(x) \
  if (!strcmp(name, #x)) return std::swap(settings.x, value), value;
  SETTING(devices)
  SETTING(version)
  SETTING(peers)
  SETTING(processors) SETTING(shared) SETTING(capability) SETTING(clusters) SETTING(reverse) SETTING(ahead) SETTING(reduced) SETTING(dry) return -1;
}
API void fakecuda_judge(int (*f)(int, const char*)) { judge = f; }

// ------------------------------------------------------------------------------------------------ errors

API cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return sticky ? sticky : error;
}
API cudaError_t cudaPeekAtLastError() { return sticky ? sticky : last; }
API const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(x) \
  case x:       \
    return #x;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorMemoryAllocation)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorNotReady)
    NAME(cudaErrorIllegalAddress) NAME(cudaErrorLaunchFailure) NAME(cudaErrorMisalignedAddress)
        NAME(cudaErrorNotSupported) NAME(cudaErrorNotPermitted) NAME(cudaErrorInvalidResourceHandle)
            NAME(cudaErrorIllegalState) NAME(cudaErrorStreamCaptureUnsupported) NAME(cudaErrorStreamCaptureInvalidated)
                NAME(cudaErrorStreamCaptureImplicit) NAME(cudaErrorStreamCaptureIsolation)
                    NAME(cudaErrorStreamCaptureUnjoined) NAME(cudaErrorCapturedEvent)
                        NAME(cudaErrorPeerAccessUnsupported) default : return "cudaErrorUnknown";
  }
}
API const char* cudaGetErrorString(cudaError_t error) { return text_of(error); }

// ------------------------------------------------------------------------------------------------ devices

API cudaError_t cudaDriverGetVersion(int* version) { return *version = settings.version, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = settings.version, cudaSuccess; }
API cudaError_t cudaGetDeviceCount(int* count) { return *count = settings.devices, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
  if (!known(device)) current = device;
  return known(device);
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch ((int)attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = settings.shared;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = settings.shared + 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = settings.processors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = 65536;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.capability % 10;
      break;
    case cudaDevAttrClusterLaunch:
      *value = settings.clusters;
      break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return known(device);
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fake CUDA device on the CPU");
  p->totalGlobalMem = 1ull << 40;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = settings.shared;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->major = settings.capability / 10;
  p->minor = settings.capability % 10;
  p->multiProcessorCount = settings.processors;
  p->pciDeviceID = device;
  return known(device);
}
API cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int device) {
  snprintf(out, size, "0000:%02x:00.0", device);
  return known(device);
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { return *can = settings.peers && a != b, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return settings.peers ? cudaSuccess : fail(cudaErrorPeerAccessUnsupported);
}
API cudaError_t cudaDeviceDisablePeerAccess(int) { return cudaSuccess; }
API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) { return *value = 1024, cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = (cudaMemPool_t)1, cudaSuccess; }
API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int) { return *pool = (cudaMemPool_t)1, cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
