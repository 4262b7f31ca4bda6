// What the parts of the fake driver share. One lock guards all of it, and work runs under that lock.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define LOCK const std::lock_guard<std::recursive_mutex> lock(fake::mutex)

namespace fake {

typedef uint64_t u64;
extern std::recursive_mutex mutex;

// What tests may choose, by these names, at any time but for the devices, the version and the peers.
struct Settings {
  int devices = 2, version = 13000, peers = 0;
  int processors = 132, shared = 227 << 10, capability = 90, clusters = 1;  // of an H100
  int reverse = 0;  // fibers, blocks and the nodes of a graph by falling number, where that is legal
  int ahead = 0;    // when the host waits for a stream, all others have run first
  int dry = 0;      // work is judged and logged, and not run
  int reduced = 1;  // 16-bit products whose parts are added up in 16 bits, unless the math mode forbids it
};
extern Settings settings;

// ------------------------------------------------------------------------------------------------ errors

extern thread_local int current;  // device
extern cudaError_t sticky;        // what a kernel did wrong: from then on every call fails

cudaError_t fail(cudaError_t error, const std::string& why = "");
void stick(cudaError_t error, const std::string& why);
const char* text_of(int error);

// Asks whoever watches whether the host may do this now; the refusal is an error of its own.
enum Ask { WAIT, COPY_FROM_HOST };
bool refused(Ask ask, const char* what);

// ------------------------------------------------------------------------------------------------ streams

// What a piece of work moves and multiplies; of kernels that are not CuPy's own, only Python knows the arrays (ledger.py).
struct Cost {
  long long read = 0, written = 0, multiply_adds = 0;
  std::string arithmetic;  // of a product: operands and sums
};

struct Node {
  std::string what;
  std::function<void()> run;
  std::vector<int> after;  // numbers of the nodes that it depends on
};

struct Graph {
  std::vector<Node> nodes;
  bool broken = false;
};

struct Work {
  u64 number;
  std::function<void()> run;
};

struct Stream {
  int device;
  unsigned flags;
  int priority;
  std::deque<Work> queue;
  bool running = false;
  Graph* capture = nullptr;
  std::vector<int> last;  // nodes that the next node of the capture depends on
};

Stream* stream_of(cudaStream_t handle);
Stream* null_stream(int device);
void drain(Stream* stream, u64 upto);
cudaError_t enqueue(Stream* stream, const std::string& what, std::function<void()> run, const Cost& cost = {});
cudaError_t wait_for(Stream* stream);
cudaError_t wait_for_device(int device);
bool capturing();
void log_work(const std::string& what, const Stream* stream, const Cost& cost = {});

// ------------------------------------------------------------------------------------------------ memory

enum Kind { DEVICE, PINNED, MANAGED, REGISTERED };
struct Allocation {
  size_t size, mapped;
  int device;
  Kind kind;
  void* base;
};
Allocation* find(const void* pointer);
// Says which address among the words of an argument is one of another device, which work on `device` cannot reach.
std::string out_of_reach(const void* argument, size_t size, int device);

}  // namespace fake
