// Rows of fp32 logits to log-prob of the target, log-sum-exp and entropy, in one read.
// The same contract as kernels/logprob_epilogue.py: logp = (z_y - m) - log s, logp <= 0, no atomics, equal rows equal bits.
// Plain C ABI: no torch headers, loaded by ctypes.

#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Maximum m, sum s of exp(z - m) and first moment t = sum of exp(z - m)(z - m) of the values seen so far.
struct Running {
  float m, s, t;
};

__device__ __forceinline__ Running empty() { return {-INFINITY, 0.f, 0.f}; }

__device__ __forceinline__ Running merge(Running a, Running b) {
  const float m = fmaxf(a.m, b.m);
  if (m == -INFINITY) return a;
  const float da = a.m == -INFINITY ? 0.f : a.m - m, db = b.m == -INFINITY ? 0.f : b.m - m;
  const float wa = a.m == -INFINITY ? 0.f : __expf(da), wb = b.m == -INFINITY ? 0.f : __expf(db);
  return {m, a.s * wa + b.s * wb, (a.t + a.s * da) * wa + (b.t + b.s * db) * wb};  // moving the origin shifts t by s·d
}

__device__ __forceinline__ void add(Running& r, float z) {
  if (z <= r.m) {
    const float d = z - r.m, p = expf(d);
    r.s += p;
    r.t += p * d;
  } else {
    const float d = r.m == -INFINITY ? 0.f : r.m - z, w = r.m == -INFINITY ? 0.f : expf(d);
    r = {z, r.s * w + 1.f, (r.t + r.s * d) * w};
  }
}

__device__ __forceinline__ Running across_warp(Running r) {
  for (int lane = 16; lane; lane >>= 1) {
    const Running other = {__shfl_xor_sync(~0u, r.m, lane), __shfl_xor_sync(~0u, r.s, lane),
                           __shfl_xor_sync(~0u, r.t, lane)};
    r = merge(r, other);
  }
  return r;
}

__global__ void __launch_bounds__(kThreads)
    epilogue(const float* __restrict__ logits, const long long* __restrict__ targets,
             const float* __restrict__ temperature, float* __restrict__ logps, float* __restrict__ lse,
             float* __restrict__ entropy, long long vocabulary, long long stride, float softcap, float scale,
             long long ignore_index, bool has_softcap, bool per_row) {
  const long long row = blockIdx.x;
  const float* x = logits + row * stride;
  const float tau = per_row ? temperature[row] : temperature[0];
  auto value = [&](float v) {
    v *= scale;
    if (has_softcap) v = softcap * tanhf(v / softcap);
    return v / tau;
  };
  Running r = empty();
  // 16-byte reads between an unaligned head and tail: a row of odd stride starts anywhere.
  const long long misaligned = (reinterpret_cast<unsigned long long>(x) & 15) / 4;
  const long long head = misaligned ? min(vocabulary, 4 - misaligned) : 0;
  const long long quads = (vocabulary - head) / 4;
  for (long long i = threadIdx.x; i < head; i += kThreads) add(r, value(x[i]));
  const float4* wide = reinterpret_cast<const float4*>(x + head);
  for (long long i = threadIdx.x; i < quads; i += kThreads) {
    const float4 v = __ldcs(wide + i);  // read once: do not keep it in cache
    add(r, value(v.x));
    add(r, value(v.y));
    add(r, value(v.z));
    add(r, value(v.w));
  }
  for (long long i = head + 4 * quads + threadIdx.x; i < vocabulary; i += kThreads) add(r, value(x[i]));

  __shared__ Running partial[kWarps];
  r = across_warp(r);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = r;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  r = across_warp(threadIdx.x < kWarps ? partial[threadIdx.x] : empty());
  if (threadIdx.x) return;
  const long long target = targets[row];
  const bool keep = target != ignore_index;
  const float log_s = logf(r.s);
  logps[row] = keep ? fminf((value(x[target]) - r.m) - log_s, 0.f) : 0.f;
  lse[row] = keep ? r.m + log_s : 0.f;
  entropy[row] = keep ? log_s - r.t / r.s : 0.f;
}

}  // namespace

// logits fp32 [rows, vocabulary] with row stride `stride`, targets int64 [rows], temperature fp32 [rows] or [1];
// writes fp32 [rows] each. Returns the CUDA error code of the launch.
extern "C" __attribute__((visibility("default"))) int genevolve_logprob_epilogue(
    const void* logits, const void* targets, const void* temperature, void* logps, void* lse, void* entropy,
    long long rows, long long vocabulary, long long stride, float softcap, float scale, long long ignore_index,
    int has_softcap, int per_row, void* stream) {
  if (rows == 0) return 0;
  epilogue<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const float*>(logits), static_cast<const long long*>(targets),
      static_cast<const float*>(temperature), static_cast<float*>(logps), static_cast<float*>(lse),
      static_cast<float*>(entropy), vocabulary, stride, softcap, scale, ignore_index, has_softcap != 0, per_row != 0);
  return static_cast<int>(cudaGetLastError());
}
