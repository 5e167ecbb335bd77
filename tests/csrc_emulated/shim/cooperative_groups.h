#pragma once

#include "emulator.h"

inline void __cluster_barrier_arrive_relaxed(emulator::Where where = emulator::Where::current()) {
  emulator::cluster_arrive(where);
}

namespace cooperative_groups {

struct cluster_group {
  using Where = emulator::Where;

  unsigned block_rank() const { return emulator::block_now; }
  unsigned num_blocks() const { return emulator::cluster.blocks.size(); }
  void barrier_arrive(Where where = Where::current()) const { emulator::cluster_arrive(where); }
  void barrier_wait(Where where = Where::current()) const { emulator::cluster_wait(where); }
  void sync(Where where = Where::current()) const {
    barrier_arrive(where);
    barrier_wait(where);
  }
  template <typename T>
  T* map_shared_rank(T* p, int rank) const {
    return emulator::map_shared_rank(p, rank);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
