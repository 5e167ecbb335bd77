// As much of the CUDA runtime as csrc/ uses, on the emulator.
#pragma once

#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // of which the emulator keeps one copy per block

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// --- device ----------------------------------------------------------------------------------------------------------

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::block_barrier(where); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, emulator::Where where = emulator::Where::current()) {
  static_assert(sizeof(T) == 4);
  const auto bits = emulator::exchange(mask, std::bit_cast<uint32_t>(value), emulator::fiber_now % 32 ^ lanes, where);
  return std::bit_cast<T>(static_cast<uint32_t>(bits));
}

namespace emulator {

template <typename T>
void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
    fail(who() + " is misaligned for " + std::to_string(sizeof(T)) + " bytes");
}

template <typename T>
T load(const T* p) {
  check_aligned<T>(p);
  counts.bytes_read += sizeof(T);
  counts.wide_reads += sizeof(T) == 16;
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
void store(T* p, T value) {
  check_aligned<T>(p);
  counts.bytes_written += sizeof(T);
  counts.wide_writes += sizeof(T) == 16;
  memcpy(p, &value, sizeof(T));
}

}  // namespace emulator

template <typename T>
T __ldcs(const T* p) {
  return emulator::load(p);
}
template <typename T>
T __ldcg(const T* p) {
  return emulator::load(p);
}
template <typename T>
T __ldg(const T* p) {
  emulator::check_aligned<T>(p);
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}
template <typename T>
void __stcs(T* p, T value) {
  emulator::store(p, value);
}

// A GPU's expf and tanhf may be two units in the last place off; these are, by a hash of the result, except where it is
// exact on a GPU too.
namespace emulator {

inline float off_by_two(float x, bool exact) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (exact || magnitude < 0x00800000 + 2 || magnitude >= 0x7f800000 - 2) return x;
  return std::bit_cast<float>(bits + (bits * 2654435761u >> 16) % 5 - 2);
}

inline float exp_of(float x) { return off_by_two(std::exp(x), x == 0); }
inline float tanh_of(float x) { return std::clamp(off_by_two(std::tanh(x), x == 0), -1.f, 1.f); }

}  // namespace emulator

#define expf emulator::exp_of
#define tanhf emulator::tanh_of

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

// --- host ------------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrClusterLaunch = 120 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline int shared_limit() {
  if (emulator::settings.shared_limit) return emulator::settings.shared_limit;
  return emulator::settings.capability >= 90 ? 232448 : 166912;
}

inline const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown";
}

inline const char* cudaGetErrorString(cudaError_t) { return emulator::message.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? emulator::settings.capability >= 90 : shared_limit();
  return cudaSuccess;
}

template <typename... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value > shared_limit()) return cudaErrorInvalidValue;
  emulator::dynamic_allowed[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

template <typename... Args>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Args...), const cudaLaunchConfig_t* config) {
  *clusters = static_cast<int>(config->dynamicSmemBytes) <= shared_limit();
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const int dynamic = static_cast<int>(config->dynamicSmemBytes);
  const auto allowed = emulator::dynamic_allowed.find(reinterpret_cast<const void*>(kernel));
  if (dynamic > 48 << 10 && (allowed == emulator::dynamic_allowed.end() || allowed->second < dynamic))
    return cudaErrorInvalidValue;
  int size = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) size = config->attrs[i].val.clusterDim.x;
  if (size && emulator::settings.capability < 90) return cudaErrorNotSupported;
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024 || size > 8 ||
      (size && config->gridDim.x % size))
    return cudaErrorInvalidConfiguration;
  const std::function<void()> run = [&] { kernel(args...); };
  return emulator::run_grid(config->gridDim.x, size, config->blockDim.x, dynamic, run) ? cudaSuccess
                                                                                       : cudaErrorLaunchFailure;
}
