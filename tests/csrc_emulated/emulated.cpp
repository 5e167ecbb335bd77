// csrc/ as host C++ on the emulator, behind the same C ABI, and the emulator's own controls.
#include "cuda_runtime.h"

namespace genevolve {
namespace {
extern thread_local float4 kept[];  // what the kernels declare extern __shared__
}
}  // namespace genevolve

#include CSRC

namespace genevolve {
namespace {
thread_local float4 kept[emulator::kMaxDynamic / sizeof(float4)];
}
}  // namespace genevolve

unsigned char* emulator::dynamic_shared() { return reinterpret_cast<unsigned char*>(genevolve::kept); }

GENEVOLVE_API void emulator_configure(int capability, int order, unsigned seed, int shared_limit) {
  emulator::settings = {capability, order, shared_limit, seed};
  emulator::dynamic_allowed.clear();
  emulator::counts = {};
}

GENEVOLVE_API void emulator_counts(emulator::Counts* out) { *out = emulator::counts; }
