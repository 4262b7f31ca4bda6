// The scheduler of cuda_shim.h, and what Python calls. Included once, after the kernels.

#include <stdarg.h>

namespace shim {

thread_local Thread* self = nullptr;
thread_local bool progress = false;

struct Launch {
  const Kernel* kernel;
  void** args;
  Report* report;
};

#ifndef SHIM_THREADS

const int MAX_THREADS = 1024;
#ifdef __SANITIZE_ADDRESS__
const size_t STACK = 256 << 10;
#else
const size_t STACK = 64 << 10;
#endif

thread_local Thread* fibers = nullptr;
thread_local jmp_buf scheduler;
thread_local ucontext_t scheduler_context;
thread_local Launch launch;

// AddressSanitizer follows swapcontext, not longjmp between stacks; the latter makes no system call.
#ifdef __SANITIZE_ADDRESS__
void to_fiber(Thread* t) { swapcontext(&scheduler_context, &t->context); }
void yield() { swapcontext(&self->context, &scheduler_context); }
#else
void to_fiber(Thread* t) {
  if (_setjmp(scheduler) == 0) _longjmp(t->where, 1);
}
void yield() {
  if (_setjmp(self->where) == 0) _longjmp(scheduler, 1);
}
#endif

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!launch.report->error[0]) vsnprintf(launch.report->error, sizeof launch.report->error, format, arguments);
  va_end(arguments);
  for (;;) yield();  // the scheduler abandons this block
}

void fiber_main() {
  for (;;) {
    launch.kernel->call(launch.kernel->function, launch.args);
    self->done = true;
    progress = true;
    yield();
  }
}

void make_fiber(Thread* t, int number) {
  getcontext(&t->context);
  void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  t->context.uc_stack.ss_sp = stack;
  t->context.uc_stack.ss_size = STACK;
  t->context.uc_link = nullptr;
  t->number = number;
  makecontext(&t->context, fiber_main, 0);
#ifndef __SANITIZE_ADDRESS__
  // Fibers start by swapcontext and then go on by longjmp: let each run up to its first wait, in fiber_start.
#endif
}

thread_local std::vector<char> started;  // which fibers have been entered since they were made

void resume(Thread* t) {
  self = t;
#ifdef __SANITIZE_ADDRESS__
  to_fiber(t);
#else
  if (!started[t->number]) {
    started[t->number] = 1;
    if (_setjmp(scheduler) == 0) setcontext(&t->context);
  } else {
    to_fiber(t);
  }
#endif
}

void abandon_fibers() {  // after an error they are stuck in the middle of a kernel
  for (int i = 0; i < MAX_THREADS; ++i) munmap(fibers[i].context.uc_stack.ss_sp, STACK);
  delete[] fibers;
  fibers = nullptr;
}

bool run_block(Block* block, bool reverse) {
  if (!fibers) {
    fibers = new Thread[MAX_THREADS];
    started.assign(MAX_THREADS, 0);
    for (int i = 0; i < MAX_THREADS; ++i) make_fiber(&fibers[i], i);
  }
  const int n = block->n_threads;
  for (int i = 0; i < n; ++i) {
    Thread* t = &fibers[i];
    t->index = {i % block->size.x, i / block->size.x % block->size.y, i / block->size.x / block->size.y};
    t->block = block;
    t->done = false;
    t->waits_at = nullptr;
  }
  for (int alive = n; alive > 0;) {
    progress = false;
    alive = 0;
    for (int k = 0; k < n; ++k) {
      Thread* t = &fibers[reverse ? n - 1 - k : k];
      if (t->done) continue;
      resume(t);
      if (launch.report->error[0]) return false;
      if (!t->done) ++alive;
    }
    if (alive && !progress) {
      for (int i = 0; i < n; ++i)
        if (!fibers[i].done && fibers[i].waits_at) {
          snprintf(launch.report->error, sizeof launch.report->error, "not all threads reach the %s where thread %d waits",
                   fibers[i].waits_at, i);
          return false;
        }
    }
  }
  return true;
}

#else

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  abort();
}
void yield() {}

struct Started {
  Thread thread;
  const Launch* launch;
};

void* thread_main(void* argument) {
  Started* started = static_cast<Started*>(argument);
  self = &started->thread;
  started->launch->kernel->call(started->launch->kernel->function, started->launch->args);
  return nullptr;
}

#endif

}  // namespace shim

extern "C" {

const char* shim_signature(int kernel) {
  return kernel < (int)shim::kernels.size() ? shim::kernels[kernel].signature.c_str() : nullptr;
}

// Runs one launch. sizes = grid x, y, z, block x, y, z, bytes of shared memory. Returns 0, or 1 with report->error.
int shim_launch(int kernel, const int64_t* sizes, void** args, int mode, shim::Report* report) {
  using namespace shim;
  memset(report, 0, sizeof *report);
  const int64_t n_blocks = sizes[0] * sizes[1] * sizes[2];
  const int n_threads = (int)(sizes[3] * sizes[4] * sizes[5]);
  Launch here{&kernels[kernel], args, report};
  const auto open = [&](Block* block, int64_t number) {
    block->index = {(unsigned)(number % sizes[0]), (unsigned)(number / sizes[0] % sizes[1]),
                    (unsigned)(number / sizes[0] / sizes[1])};
    block->grid = {(unsigned)sizes[0], (unsigned)sizes[1], (unsigned)sizes[2]};
    block->size = {(unsigned)sizes[3], (unsigned)sizes[4], (unsigned)sizes[5]};
    block->n_threads = n_threads;
    block->report = report;
    // exactly as large as asked for, so that AddressSanitizer sees an access beyond it; poisoned with NaN
    block->shared = nullptr;
    if (sizes[6] && posix_memalign((void**)&block->shared, 16, sizes[6])) abort();
    if (sizes[6]) memset(block->shared, 0xff, sizes[6]);
  };
#ifndef SHIM_THREADS
  launch = here;
  for (int64_t k = 0; k < n_blocks; ++k) {
    Block block;
    open(&block, mode == REVERSE ? n_blocks - 1 - k : k);
    const bool ok = run_block(&block, mode == REVERSE);
    free(block.shared);
    if (!ok) {
      abandon_fibers();
      return 1;
    }
  }
#else
  std::vector<Block> blocks(n_blocks);
  std::vector<Started> started(n_blocks * n_threads);
  std::vector<pthread_t> ids(started.size());
  for (int64_t k = 0; k < n_blocks; ++k) {
    open(&blocks[k], k);
    pthread_barrier_init(&blocks[k].barrier, nullptr, n_threads);
    for (int w = 0; w < n_threads / 32; ++w) pthread_barrier_init(&blocks[k].warp_barriers[w], nullptr, 32);
  }
  for (size_t i = 0; i < started.size(); ++i) {
    const int t = (int)(i % n_threads);
    Thread& thread = started[i].thread;
    thread.index = {(unsigned)(t % sizes[3]), (unsigned)(t / sizes[3] % sizes[4]), (unsigned)(t / sizes[3] / sizes[4])};
    thread.number = t;
    thread.block = &blocks[i / n_threads];
    started[i].launch = &here;
    if (pthread_create(&ids[i], nullptr, thread_main, &started[i])) fail("no more threads");
  }
  for (pthread_t id : ids) pthread_join(id, nullptr);
  for (Block& block : blocks) free(block.shared);
#endif
  return 0;
}
}
