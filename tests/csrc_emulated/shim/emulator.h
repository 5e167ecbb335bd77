// A GPU for csrc/ on one CPU thread: the threads of a block, and of a cluster of blocks, are fibers that switch at
// barriers and shuffles alone, in an order of choice. Threads that wait for ones which never come are a failure.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

using Where = std::source_location;

enum Order { kForwards, kBackwards, kShuffled };

struct Settings {
  int capability = 90, order = kForwards, shared_limit = 0;  // 0: what the capability has
  unsigned seed = 0;
};

// What the kernels did since the last reset.
struct Counts {
  long long launches, cluster, bytes_read, wide_reads, bytes_written, wide_writes;
};

inline Settings settings;
inline Counts counts;
inline std::string message;  // why the last launch failed
inline std::map<const void*, int> dynamic_allowed;

constexpr int kStack = 64 << 10;
constexpr unsigned char kPoison = 0xff;  // every float of it is a NaN
constexpr int kMaxDynamic = 232448;

enum State { kReady, kAtBlock, kAtWarp, kAtCluster, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  Where where;
  int exchanges;
  bool arrived;  // at the cluster's barrier, without having waited for it
  int generation;
};

struct Warp {
  int arrived;
  Where where;
  uint64_t slots[2][32];  // one lane may be an exchange ahead of another
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // while another block of the cluster runs
  int at_barrier = 0, done = 0;
  uint3 index;
};

struct Cluster {
  std::vector<Block> blocks;
  int arrived = 0, generation = 0;
};

inline Cluster cluster;
inline int block_now, fiber_now;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel_now;
inline std::mt19937 random_numbers;
inline bool failed;

inline Block& block() { return cluster.blocks[block_now]; }
inline Fiber& fiber() { return block().fibers[fiber_now]; }

inline void yield() { swapcontext(&fiber().context, &scheduler); }

inline std::string at(const Where& where) { return "line " + std::to_string(where.line()); }

inline std::string who() {
  return "thread " + std::to_string(fiber_now) + " of block " + std::to_string(block().index.x);
}

[[noreturn]] inline void fail(const std::string& why) {
  if (!failed) message = why;
  failed = true;
  setcontext(&scheduler);
  __builtin_unreachable();
}

// --- shared memory: this library's thread-local segment, of which each block has its own copy ------------------------

struct Segment {
  unsigned char* begin;
  size_t size;
};

inline thread_local char anchor = 1;

inline Segment segment() {
  Segment found = {};
  if (!anchor) return found;  // touches the segment, which is made on first use
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          auto* base = static_cast<unsigned char*>(info->dlpi_tls_data);
          auto* mine = reinterpret_cast<unsigned char*>(&anchor);
          if (header.p_type == PT_TLS && base && mine >= base && mine < base + header.p_memsz)
            *static_cast<Segment*>(out) = {base, header.p_memsz};
        }
        return 0;
      },
      &found);
  return found;
}

inline unsigned char* dynamic_shared();  // the kernels' extern array, kMaxDynamic bytes

inline void poison() {
  const Segment s = segment();
  memset(s.begin, kPoison, s.size);
}

inline void enter_block(int next) {
  if (cluster.blocks.size() > 1) {
    const Segment s = segment();
    if (block_now >= 0) block().shared.assign(s.begin, s.begin + s.size);
    block_now = next;
    memcpy(s.begin, block().shared.data(), s.size);
  }
  block_now = next;
  blockIdx = block().index;
}

template <typename T>
T* map_shared_rank(T* p, int rank) {
  const Segment s = segment();
  auto* byte = reinterpret_cast<unsigned char*>(const_cast<std::remove_const_t<T>*>(p));
  if (byte < s.begin || byte >= s.begin + s.size) fail(who() + " maps an address that is not shared memory");
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) fail(who() + " maps a rank outside the cluster");
  if (rank == block_now) return p;
  Block& other = cluster.blocks[rank];
  if (other.done == static_cast<int>(other.fibers.size()))
    fail(who() + " reads shared memory of a block that has left");
  return reinterpret_cast<T*>(other.shared.data() + (byte - s.begin));
}

// --- waiting ---------------------------------------------------------------------------------------------------------

inline void block_barrier(Where where) {
  Block& b = block();
  fiber().state = kAtBlock;
  fiber().where = where;
  if (++b.at_barrier < static_cast<int>(b.fibers.size())) return yield();
  for (Fiber& f : b.fibers) {
    if (f.where.line() != where.line()) fail("one barrier, two places: " + at(f.where) + " and " + at(where));
    f.state = kReady;
  }
  b.at_barrier = 0;
}

inline uint64_t exchange(unsigned mask, uint64_t value, int source, Where where) {
  if (mask != ~0u) fail("only whole warps are emulated, " + at(where));
  Block& b = block();
  const int lane = fiber_now % 32, phase = fiber().exchanges++ % 2;
  Warp& warp = b.warps[fiber_now / 32];
  if (warp.arrived && warp.where.line() != where.line())
    fail("one warp, two shuffles: " + at(warp.where) + " and " + at(where));
  warp.where = fiber().where = where;
  warp.slots[phase][lane] = value;
  if (++warp.arrived < 32) {
    fiber().state = kAtWarp;
    yield();
  } else {
    warp.arrived = 0;
    for (int i = 0; i < 32; ++i) b.fibers[fiber_now / 32 * 32 + i].state = kReady;
  }
  return warp.slots[phase][source];
}

inline void cluster_arrive(Where where) {
  if (fiber().arrived) fail(who() + " arrives at the cluster's barrier twice, " + at(where));
  fiber().arrived = true;
  fiber().generation = cluster.generation + 1;
  if (++cluster.arrived < static_cast<int>(cluster.blocks.size() * block().fibers.size())) return;
  cluster.arrived = 0;
  ++cluster.generation;
}

inline void cluster_wait(Where where) {
  if (!fiber().arrived) fail(who() + " waits at the cluster's barrier without having arrived, " + at(where));
  fiber().where = where;
  if (cluster.generation < fiber().generation) {
    fiber().state = kAtCluster;
    yield();
  }
  fiber().arrived = false;
}

// --- running ---------------------------------------------------------------------------------------------------------

inline void run_fiber() {
  (*kernel_now)();
  if (fiber().arrived) fail(who() + " leaves without waiting at the cluster's barrier");
  fiber().state = kDone;
  ++block().done;
}

inline std::vector<int> in_order(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == kBackwards) std::reverse(order.begin(), order.end());
  if (settings.order == kShuffled) std::shuffle(order.begin(), order.end(), random_numbers);
  return order;
}

// Runs the block's fibers until each has ended or waits; whether any of them ran.
inline bool run_block() {
  Block& b = block();
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (int i : in_order(b.fibers.size())) {
      Fiber& f = b.fibers[i];
      if (f.state == kAtCluster && cluster.generation >= f.generation) f.state = kReady;
      if (f.state != kReady) continue;
      fiber_now = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &f.context);
      if (failed) return true;
      ran = any = true;
    }
  }
  return any;
}

inline void describe_deadlock() {
  for (Block& b : cluster.blocks)
    for (size_t i = 0; i < b.fibers.size(); ++i) {
      const char* names[] = {"ready", "__syncthreads", "a shuffle", "the cluster's barrier", "the end"};
      const Fiber& f = b.fibers[i];
      if (f.state == kDone) continue;
      message = "deadlock: thread " + std::to_string(i) + " of block " + std::to_string(b.index.x) + " waits at " +
                names[f.state] + ", " + at(f.where);
      return;
    }
}

inline unsigned char* stacks(size_t bytes) {
  static unsigned char* memory = nullptr;
  static size_t size = 0;
  if (bytes > size) {
    if (memory) munmap(memory, size);
    memory = static_cast<unsigned char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    size = bytes;
  }
  return memory;
}

inline bool run_cluster(int first, int size, int threads, size_t dynamic) {
  cluster = Cluster();
  cluster.blocks.resize(size);
  unsigned char* stack = stacks(static_cast<size_t>(size) * threads * kStack);
  for (int rank = 0; rank < size; ++rank) {
    Block& b = cluster.blocks[rank];
    b.index = {static_cast<unsigned>(first + rank), 0, 0};
    b.warps.resize((threads + 31) / 32, Warp());
    b.shared.assign(size > 1 ? segment().size : 0, kPoison);
    b.fibers.resize(threads, Fiber());
    for (Fiber& f : b.fibers) {
      getcontext(&f.context);
      f.context.uc_stack = {stack, 0, kStack};
      f.context.uc_link = &scheduler;
      makecontext(&f.context, run_fiber, 0);
      stack += kStack;
    }
  }
  poison();
  block_now = -1;
  const auto left = [&] {
    return std::any_of(cluster.blocks.begin(), cluster.blocks.end(),
                       [&](const Block& b) { return b.done < static_cast<int>(b.fibers.size()); });
  };
  while (left() && !failed) {
    bool ran = false;
    for (int rank : in_order(size)) {
      enter_block(rank);
      ran |= run_block();
      if (failed) return false;
      const unsigned char* bytes = dynamic_shared();
      if (std::any_of(bytes + dynamic, bytes + kMaxDynamic, [](unsigned char byte) { return byte != kPoison; })) {
        message = "a block writes beyond its " + std::to_string(dynamic) + " bytes of dynamic shared memory";
        return false;
      }
    }
    if (!ran) {
      describe_deadlock();
      return false;
    }
  }
  return !failed;
}

inline bool run_grid(int blocks, int cluster_size, int threads, size_t dynamic, const std::function<void()>& kernel) {
  ++counts.launches;
  counts.cluster = cluster_size;
  const int size = cluster_size ? cluster_size : 1;
  message.clear();
  failed = false;
  kernel_now = &kernel;
  random_numbers.seed(settings.seed);
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int i : in_order(blocks / size))
    if (!run_cluster(i * size, size, threads, dynamic)) return false;
  return true;
}

}  // namespace emulator
