// Runs the blocks of a launch. Each thread of a block is a fiber: it runs until it waits at a barrier or shuffle, then
// the next one runs, by rising or falling number. Blocks come one after the other, by rising or falling number too, but
// those of a cluster together.
// Code with a missing barrier gives different numbers in the two orders.

#pragma once

#include <string>

#include "../include/fake_abi.h"

namespace fake {

struct Launch {
  const FakeKernel* kernel;
  void (*enter)(FakeBlock*);  // tells the kernel's library about its block
  bool fibers;                // the source has a barrier or shuffle
  bool strict;                // all threads must reach a barrier, also those that could have returned before
  unsigned grid[3], block[3], shared;
  bool reverse;
  bool (*legal)(const void*, int);
  FakeTraffic traffic;
};

// Runs a launch. Returns which rule it broke, in which block and thread; else an empty string.
std::string run(Launch& launch, void** args);

}  // namespace fake
