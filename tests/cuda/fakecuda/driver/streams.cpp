// Streams, events and graphs. A stream is a queue: its work runs when something waits for it, and not before. So a
// missing order between streams, or memory that is reused too early, gives wrong numbers.

#include <time.h>

#include "state.h"

namespace fake {

struct Event {
  int device;
  Stream* stream = nullptr;
  u64 number = 0;
  double time = 0;
  Graph* capture = nullptr;
  std::vector<int> last;
};

static u64 numbers = 0;
static std::set<Stream*> streams;
static std::vector<Stream*> nulls;
static std::string log_text;
static bool logging = false;

Stream* null_stream(int device) {
  while ((int)nulls.size() < settings.devices) {
    nulls.push_back(new Stream{(int)nulls.size(), 0, 0});
    streams.insert(nulls.back());
  }
  return nulls[device];
}

Stream* stream_of(cudaStream_t handle) { return (u64)handle <= 2 ? null_stream(current) : (Stream*)handle; }

static bool is_null(const Stream* stream) { return stream == null_stream(stream->device); }
static bool joins_null(const Stream* stream) { return !is_null(stream) && !(stream->flags & cudaStreamNonBlocking); }
static std::vector<Stream*> on(int device) {
  std::vector<Stream*> found;
  for (Stream* stream : streams)
    if (stream->device == device) found.push_back(stream);
  return found;
}

void log_work(const std::string& what, const Stream* stream, const Cost& cost) {
  if (!logging) return;
  const u64 handle = is_null(stream) ? 0 : (u64)stream;
  log_text += what + "\t" + std::to_string(stream->device) + "\t" + std::to_string(handle);
  for (const long long n : {cost.read, cost.written, cost.multiply_adds}) log_text += "\t" + std::to_string(n);
  log_text += "\t" + cost.arithmetic + "\n";
}

void drain(Stream* stream, u64 upto) {
  if (stream->running) return;
  stream->running = true;
  while (!stream->queue.empty() && stream->queue.front().number <= upto) {
    const Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    // the null stream and all blocking streams of its device wait for each other
    if (is_null(stream)) {
      for (Stream* other : on(stream->device))
        if (joins_null(other)) drain(other, work.number - 1);
    } else if (joins_null(stream)) {
      drain(null_stream(stream->device), work.number - 1);
    }
    if (!sticky) work.run();
  }
  stream->running = false;
}

static void drain_for_host(Stream* stream, u64 upto) {
  if (settings.ahead)
    for (int device = 0; device < settings.devices; ++device)
      for (Stream* other : on(device))
        if (other != stream) drain(other, ~0ull);
  drain(stream, upto);
}

static cudaError_t breaks(Graph* graph, cudaError_t error) {
  graph->broken = true;
  return fail(error);
}

cudaError_t enqueue(Stream* stream, const std::string& what, std::function<void()> run, const Cost& cost) {
  if (sticky) return sticky;
  log_work(what, stream, cost);
  if (settings.dry) run = [] {};
  if (Graph* graph = stream->capture) {
    if (graph->broken) return fail(cudaErrorStreamCaptureInvalidated);
    graph->nodes.push_back({what, std::move(run), stream->last});
    stream->last = {(int)graph->nodes.size() - 1};
    return cudaSuccess;
  }
  if (is_null(stream))
    for (Stream* other : on(stream->device))
      if (other->capture && joins_null(other)) return breaks(other->capture, cudaErrorStreamCaptureImplicit);
  stream->queue.push_back({++numbers, std::move(run)});
  return cudaSuccess;
}

cudaError_t wait_for(Stream* stream) {
  if (stream->capture) return breaks(stream->capture, cudaErrorStreamCaptureUnsupported);
  drain_for_host(stream, ~0ull);
  if (is_null(stream))
    for (Stream* other : on(stream->device))
      if (joins_null(other) && !other->capture) drain(other, ~0ull);
  return sticky;
}

cudaError_t wait_for_device(int device) {
  for (Stream* stream : on(device))
    if (stream->capture) return breaks(stream->capture, cudaErrorStreamCaptureUnsupported);
  for (Stream* stream : on(device)) drain_for_host(stream, ~0ull);
  return sticky;
}

bool capturing() {
  bool any = false;
  for (Stream* stream : streams)
    if (stream->capture) any = stream->capture->broken = true;
  return any;
}

// Runs the nodes of a graph in the order that is furthest from that of the capture, among those that its edges allow.
static void run_nodes(const Graph& graph) {
  const int n = (int)graph.nodes.size();
  std::vector<char> done(n);
  const auto ready = [&](int i) {
    for (int before : graph.nodes[i].after)
      if (!done[before]) return false;
    return !done[i];
  };
  for (int count = 0; count < n; ++count) {
    int chosen = -1;
    for (int i = 0; i < n; ++i)
      if (ready(i) && (chosen < 0 || settings.reverse)) chosen = i;
    done[chosen] = true;
    if (!sticky) graph.nodes[chosen].run();
  }
}

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

}  // namespace fake

using namespace fake;

API void fakecuda_log(int on) {
  LOCK;
  logging = on;
  log_text.clear();
}
API void fakecuda_forgive() {
  LOCK;
  sticky = cudaSuccess;
  for (Stream* stream : streams) stream->capture = nullptr;
}
API int fakecuda_pending() {
  LOCK;
  for (const Stream* stream : streams)
    if (!stream->queue.empty()) return 1;
  return 0;
}
API const char* fakecuda_logged() { return log_text.c_str(); }

// ------------------------------------------------------------------------------------------------ streams

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  LOCK;
  Stream* stream = new Stream{current, flags, priority};
  streams.insert(stream);
  *out = (cudaStream_t)stream;
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return *flags = stream_of(stream)->flags, cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* p) {
  return *p = stream_of(stream)->priority, cudaSuccess;
}
// What is queued still runs: the stream itself stays, for events that name it.
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (refused(WAIT, "cudaStreamSynchronize")) return cudaErrorNotPermitted;
  LOCK;
  return fail(wait_for(stream_of(stream)));
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  LOCK;
  Stream* stream = stream_of(handle);
  if (sticky || stream->queue.empty()) return sticky;
  drain(stream, stream->queue.front().number);
  return cudaErrorNotReady;
}
API cudaError_t cudaDeviceSynchronize() {
  if (refused(WAIT, "cudaDeviceSynchronize")) return cudaErrorNotPermitted;
  LOCK;
  return fail(wait_for_device(current));
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void* data) {
  LOCK;
  return fail(enqueue(stream_of(stream), "host function", [=] { f(data); }));
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t f, void* data, unsigned) {
  LOCK;
  return fail(enqueue(stream_of(stream), "host function", [=] { f(stream, cudaSuccess, data); }));
}

// ------------------------------------------------------------------------------------------------ events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  return *out = (cudaEvent_t) new Event{current}, cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  LOCK;
  Event* event = (Event*)handle;
  Stream* stream = stream_of(stream_handle);
  if (stream->device != event->device) return fail(cudaErrorInvalidResourceHandle);
  event->stream = stream;
  event->capture = stream->capture;
  event->last = stream->last;
  if (stream->capture) return cudaSuccess;
  stream->queue.push_back({event->number = ++numbers, [event] { event->time = now(); }});
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCK;
  Event* event = (Event*)event_handle;
  Stream* stream = stream_of(handle);
  if (!event->stream) return cudaSuccess;
  if (event->capture) {  // a fork of the capture, or its join
    if (stream->capture != event->capture) stream->last.clear();
    stream->capture = event->capture;
    stream->last.insert(stream->last.end(), event->last.begin(), event->last.end());
    return cudaSuccess;
  }
  if (stream->capture) return breaks(stream->capture, cudaErrorStreamCaptureIsolation);
  stream->queue.push_back({++numbers, [from = event->stream, upto = event->number] { drain(from, upto); }});
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  if (refused(WAIT, "cudaEventSynchronize")) return cudaErrorNotPermitted;
  LOCK;
  Event* event = (Event*)handle;
  if (event->capture) return breaks(event->capture, cudaErrorCapturedEvent);
  if (event->stream) drain_for_host(event->stream, event->number);
  return fail(sticky);
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  LOCK;
  const Event* event = (Event*)handle;
  if (!event->stream || event->stream->queue.empty()) return sticky;
  const u64 next = event->stream->queue.front().number;
  if (next > event->number) return sticky;
  drain(event->stream, next);
  return cudaErrorNotReady;
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  return *ms = (float)(((Event*)to)->time - ((Event*)from)->time), cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ graphs

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  LOCK;
  Stream* stream = stream_of(handle);
  if (is_null(stream) || stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = new Graph;
  stream->last.clear();
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  LOCK;
  Stream* stream = stream_of(handle);
  Graph* graph = stream->capture;
  *out = nullptr;
  if (!graph) return fail(cudaErrorIllegalState);
  std::set<int> joined(stream->last.begin(), stream->last.end());  // and all that these wait for
  for (int i = (int)graph->nodes.size() - 1; i >= 0; --i)
    if (joined.count(i)) joined.insert(graph->nodes[i].after.begin(), graph->nodes[i].after.end());
  for (Stream* other : streams)
    if (other->capture == graph) other->capture = nullptr;
  if (graph->broken) return fail(cudaErrorStreamCaptureInvalidated);
  if (joined.size() < graph->nodes.size()) return fail(cudaErrorStreamCaptureUnjoined);
  *out = (cudaGraph_t)graph;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCK;
  const Graph* graph = stream_of(handle)->capture;
  *status = !graph          ? cudaStreamCaptureStatusNone
            : graph->broken ? cudaStreamCaptureStatusInvalidated
                            : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  return *out = (cudaGraphExec_t) new Graph(*(Graph*)graph), cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  LOCK;
  return fail(enqueue(stream_of(stream), "graph", [graph] { run_nodes(*(Graph*)graph); }));
}
