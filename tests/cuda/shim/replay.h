// A program of its own that repeats recorded launches, for the sanitizers: included after scheduler.h.
//
//   replay FILE MODE    runs every launch of FILE, in memory of exactly the recorded size, and compares the bytes
//
// FILE, as written by recording.py, is a sequence of 64-bit numbers and bytes; for each launch
//   kernel, 7 sizes, regions, for each of them: offset in 16 bytes, size, contents before, contents after;
//   arguments, for each of them: kind (0 value, 1 pointer, 2 null), value or (region << 40 | offset), −1 for a pointer to
//   nothing; or kind 3, a struct: its size, how many pointers, its bytes, for each pointer where it lies and what it is

#include <stdio.h>

struct Region {
  unsigned char* base;   // as malloc gave it
  unsigned char* start;  // with the recorded offset from a 16-byte boundary; it ends where the allocation ends
  std::vector<unsigned char> after;
};

static int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1) {
    fputs("the recording is cut off\n", stderr);
    exit(2);
  }
  return value;
}

static std::vector<unsigned char> bytes(FILE* file, int64_t size) {
  std::vector<unsigned char> data(size);
  if (size && fread(data.data(), 1, size, file) != (size_t)size) exit(2);
  return data;
}

int main(int argc, char** argv) {
  FILE* file = argc == 3 ? fopen(argv[1], "rb") : nullptr;
  if (!file) return 2;
  int launches = 0, wrong = 0;
  for (int64_t kernel; fread(&kernel, 8, 1, file) == 1; ++launches) {
    int64_t sizes[7];
    for (int64_t& size : sizes) size = number(file);
    std::vector<Region> regions(number(file));
    for (Region& region : regions) {
      const int64_t offset = number(file), size = number(file);
      region.base = (unsigned char*)malloc(offset + size);
      region.start = region.base + offset;
      memcpy(region.start, bytes(file, size).data(), size);
      region.after = bytes(file, size);
    }
    const auto address = [&](int64_t place) {
      return place < 0 ? nullptr : regions[place >> 40].start + (place & ((1ll << 40) - 1));
    };
    std::vector<std::vector<unsigned char>> values(number(file));
    std::vector<void*> args;
    for (std::vector<unsigned char>& value : values) {
      const int64_t kind = number(file), size = kind == 3 ? number(file) : 8, pointers = kind == 3 ? number(file) : 0;
      value = bytes(file, size);
      for (int64_t k = 0; k < (kind == 3 ? pointers : kind == 1); ++k) {
        const int64_t offset = kind == 3 ? number(file) : 0;
        int64_t place = 0;
        if (kind == 3) place = number(file); else memcpy(&place, value.data(), 8);
        const void* pointer = address(place);
        memcpy(value.data() + offset, &pointer, 8);
      }
      args.push_back(value.data());
    }
    shim::Report report;
    if (shim_launch((int)kernel, sizes, args.data(), atoi(argv[2]), &report)) {
      fprintf(stderr, "launch %d, kernel %d: %s\n", launches, (int)kernel, report.error);
      ++wrong;
    }
    for (Region& region : regions) {
      if (region.after.size() && memcmp(region.start, region.after.data(), region.after.size())) {
        fprintf(stderr, "launch %d, kernel %d: wrong result\n", launches, (int)kernel);
        ++wrong;
      }
      free(region.base);
    }
  }
  printf("%d launches\n", launches);
  return wrong ? 1 : 0;
}
