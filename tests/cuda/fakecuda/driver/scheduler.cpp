#include "scheduler.h"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace fake {

static FakeBlock block_of(const Launch& launch, unsigned long long number) {
  const unsigned *g = launch.grid, *b = launch.block;
  FakeBlock block{};
  block.index = {(unsigned)(number % g[0]), (unsigned)(number / g[0] % g[1]), (unsigned)(number / g[0] / g[1])};
  block.size = {b[0], b[1], b[2]};
  block.grid = {g[0], g[1], g[2]};
  return block;
}

static void place(FakeThread* thread, int number, const unsigned* b) {
  thread->number = number;
  thread->index = {number % b[0], number / b[0] % b[1], number / b[0] / b[1]};
}

// Exactly as large as asked for, so that AddressSanitizer sees an access beyond it; poisoned with NaN.
static unsigned char* shared_memory(unsigned size) {
  void* memory = nullptr;
  if (size && posix_memalign(&memory, 128, size)) abort();
  return (unsigned char*)memory;
}

}  // namespace fake

// ------------------------------------------------------------------------------------------------ fibers

extern "C" void fake_switch(void** save, void* to);
asm(R"(
.text
.globl fake_switch
.hidden fake_switch
fake_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fake {

struct Fiber : FakeThread {
  void* stack_pointer;
  char* stack;
  bool done, started;
};

struct Warp {
  unsigned arrived;
  int generation;
  unsigned long long tag;
  unsigned char values[2][32][16];  // by turns: one wait orders a turn
};

const size_t STACK = 256 << 10;
static Fiber* fibers;
static Fiber* running;
static void* scheduler_stack_pointer;
static FakeBlock block;
static Warp warps[32];
static int n_threads, arrived, generation, alive, barrier_line;
static bool progress;
static Launch* launch;
static void** launch_args;
static sigjmp_buf escape;
static volatile sig_atomic_t in_kernel;
static std::string broken;

static void yield() { fake_switch(&running->stack_pointer, scheduler_stack_pointer); }

static void fault(const char* what) {
  char where[100];
  snprintf(where, sizeof where, " in block (%u, %u, %u), thread %d", block.index.x, block.index.y, block.index.z,
      block.thread ? block.thread->number : -1);
  broken = std::string(launch->kernel->name) + ": " + what + where;
  siglongjmp(escape, 1);
}

static void barrier(int line) {
  if (!arrived) barrier_line = line;
  if (line != barrier_line) fault("divergent __syncthreads()");
  const int mine = generation;
  ++arrived;
  progress = true;
  while (generation == mine) {
    if (arrived >= (launch->strict ? n_threads : alive)) {
      arrived = 0;
      ++generation;
      progress = true;
      break;
    }
    yield();
  }
}

static void exchange(const void* mine, int size, int from, unsigned long long tag, void* result, unsigned mask) {
  Warp& warp = warps[running->number / 32];
  const int lane = running->number % 32, before = warp.generation;
  if (mask != ~0u) fault("a shuffle of less than a warp");
  if (n_threads % 32) fault("a shuffle where warps are not full");
  if (!warp.arrived) warp.tag = tag;
  if (warp.tag != tag) fault("divergent shuffle");
  memcpy(warp.values[before & 1][lane], mine, size);
  warp.arrived |= 1u << lane;
  progress = true;
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == before) yield();
    progress = true;
  }
  memcpy(result, warp.values[before & 1][from], size);
}

static void fiber_main() {
  for (;;) {
    launch->kernel->call(launch->kernel->function, launch_args);
    running->done = true;
    --alive;
    progress = true;
    yield();
  }
}

static void reset(Fiber* fiber) {
  void** top = (void**)(fiber->stack + STACK - 64);
  *--top = nullptr;  // so that the stack is aligned at fiber_main
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  fiber->started = true;
}

static void make_fibers() {
  fibers = new Fiber[1024]();
  for (int i = 0; i < 1024; ++i)
    fibers[i].stack =
        (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void run_fibers() {
  memset(warps, 0, sizeof warps);
  arrived = 0;
  alive = n_threads;
  for (int i = 0; i < n_threads; ++i) {
    if (!fibers[i].started || !fibers[i].done) reset(&fibers[i]);
    place(&fibers[i], i, launch->block);
    fibers[i].done = false;
  }
  while (alive > 0) {
    progress = false;
    for (int k = 0; k < n_threads; ++k) {
      Fiber* fiber = &fibers[launch->reverse ? n_threads - 1 - k : k];
      if (fiber->done) continue;
      running = fiber;
      block.thread = fiber;
      fake_switch(&scheduler_stack_pointer, fiber->stack_pointer);
    }
    if (alive && !progress) fault("not all threads reach a barrier or shuffle");
  }
}

static void run_one_by_one() {  // no thread waits for another
  FakeThread thread;
  block.thread = &thread;
  for (int i = 0; i < n_threads; ++i) {
    place(&thread, launch->reverse ? n_threads - 1 - i : i, launch->block);
    launch->kernel->call(launch->kernel->function, launch_args);
  }
}

static void on_bad_address(int signal_, siginfo_t* info, void*) {
  signal(signal_, SIG_DFL);  // of the host itself: as without the fake
  if (!in_kernel) return;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  char text[64];
  snprintf(text, sizeof text, "illegal address %p", info->si_addr);
  fault(text);
}

struct CatchBadAddresses {
  struct sigaction before[2];
  CatchBadAddresses() {
    static void* stack = nullptr;
    if (!stack) {
      stack_t own{};
      own.ss_sp = stack = malloc(own.ss_size = 1 << 16);
      sigaltstack(&own, nullptr);
    }
    struct sigaction action{};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
    in_kernel = 1;
  }
  ~CatchBadAddresses() {
    in_kernel = 0;
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
  }
};

std::string run(Launch& this_launch, void** args) {
  launch = &this_launch;
  launch_args = args;
  n_threads = launch->block[0] * launch->block[1] * launch->block[2];
  broken.clear();
  if (!fibers) make_fibers();
  const CatchBadAddresses caught;
  unsigned char* const shared = shared_memory(launch->shared);
  const unsigned long long n_blocks = (unsigned long long)launch->grid[0] * launch->grid[1] * launch->grid[2];
  if (sigsetjmp(escape, 1) == 0) {
    for (unsigned long long k = 0; k < n_blocks; ++k) {
      block = block_of(*launch, launch->reverse ? n_blocks - 1 - k : k);
      block.shared = shared;
      block.traffic = &launch->traffic;
      block.barrier = barrier;
      block.exchange = exchange;
      block.fault = fault;
      block.legal = launch->legal;
      launch->enter(&block);
      if (shared) memset(shared, 0xff, launch->shared);
      if (launch->fibers)
        run_fibers();
      else
        run_one_by_one();
    }
  } else {
    for (int i = 0; i < 1024; ++i) fibers[i].started = false;
  }
  free(shared);
  return broken;
}

}  // namespace fake
