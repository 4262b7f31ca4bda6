// What a compiled kernel and its scheduler know of each other.

#pragma once

struct FakeIndex {
  unsigned x, y, z;
};

struct FakeThread {
  FakeIndex index;
  int number;
};

// Bytes that a launch moved through __ldcs, __ldg and __stcs.
struct FakeTraffic {
  long long read, written, wide, narrow;  // wide: accesses of 16 bytes
};

struct FakeBlock {
  FakeIndex index, size, grid;
  unsigned char* shared;
  FakeThread* thread;  // the one that runs
  FakeTraffic* traffic;
  unsigned char* const* cluster;  // the shared memories of the blocks of its cluster
  void (*barrier)(int line);
  void (*barrier_of_cluster)(int line);
  void (*exchange)(const void* mine, int size, int from, unsigned long long tag, void* result, unsigned mask);
  void (*fault)(const char* what);
  bool (*legal)(const void* p, int size);  // tells whether an access is within an array, where that is known
};

struct FakeKernel {
  const char* name;
  void (*call)(void* function, void** args);
  void* function;
  int n_params;
  const int* sizes;
  const char* signature;  // see fake_letter in device.h
  int cluster;            // blocks that run together
};
