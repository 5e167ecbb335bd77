// What stands between the head's GEMMs: fp32 products h·Wᵀ to log-probs, and to the gradient of the logits.
//
// The contract of kernels/logprob_epilogue.py: logp = (z_y - m) - log s, logp <= 0, no atomics, equal rows equal bits.
// Every entry point sums a row in the same order, whatever its launch: the row is cut into slices (their number follows
// from V alone), a thread adds every blockDim-th group of eight columns of a slice, lanes, warps and slices are then
// merged by trees. One block visits the slices in turn, or each block of a cluster takes one; the bits are the same.
// Plain C ABI: no torch headers, loaded by ctypes (genevolve_fast/ops/csrc.py mirrors the structs).

#include <cfloat>
#include <climits>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace genevolve {

enum Dtype : int { kFloat32, kBFloat16, kFloat16 };

// z = softcap·tanh(scale·(products + bias)/softcap) / temperature, and the target of every row.
struct Problem {
  const float* products;      // [rows, vocabulary], row stride `stride`
  const long long* targets;   // [rows]; outside [0, vocabulary): the target is not in this shard
  const void* bias;           // [vocabulary] or null
  const float* temperatures;  // [rows] or [1], or null: `temperature` then
  long long rows, vocabulary, stride;
  float temperature, softcap, scale;  // softcap 0: none
  int bias_dtype, temperature_per_row;
};

// fp32 [rows] each; m + log_sum is the log-sum-exp.
struct Softmax {
  float *logps, *maximum, *log_sum, *entropy;
};

// d/d products of logps·logp + lse·log-sum-exp + entropy·H into `out`; upstream gradients fp32 [rows] or null.
struct Gradient {
  const float *logps, *lse, *entropy;
  void* out;  // [rows, vocabulary], row stride `stride`; null: no such gradient
  long long stride;
  int dtype;
};

namespace {

namespace cg = cooperative_groups;

constexpr int kGroup = 8;  // columns a thread takes at once: two 16-byte reads, one 16-byte write in 16 bits
constexpr int kBatch = 2;  // groups whose reads are in flight together
constexpr int kThreads = 384;
constexpr int kResident = 3;  // blocks of a multiprocessor: while one waits for its cluster, others read or write
constexpr int kWarps = kThreads / 32;
constexpr int kSlices = 8;  // the largest cluster that every device takes
// Three slices, each with 1 KiB of the system's and 256 bytes of its block's, fill a multiprocessor's 228 KiB.
constexpr int kSliceGroups = (228 * 1024 / kResident - 1280) / (kGroup * 4);
template <typename T>
constexpr int kWide = kGroup * sizeof(T) / sizeof(uint4);  // 16-byte accesses of a group
constexpr float kOrigin = -FLT_MAX;  // below every logit, yet finite: differences to it are never NaN

struct Partition {
  int groups, slices, groups_per_slice, threads;
};

Partition partition(int vocabulary) {
  const int groups = vocabulary / kGroup + (vocabulary % kGroup != 0);
  int slices = 1;
  while (slices < kSlices && (groups + slices - 1) / slices > kSliceGroups) slices *= 2;
  const int each = (groups + slices - 1) / slices;
  const int threads = (each + 31) / 32 * 32;
  return {groups, slices, each, threads < 32 ? 32 : threads > kThreads ? kThreads : threads};
}

// --- one row of logits -----------------------------------------------------------------------------------------------

struct Row {
  const float* x;
  const void* bias;
  int vocabulary, target;  // target -1: not in this shard
  float slope;                 // scale / temperature
  float inner, outer, unbend;  // z = outer·tanh(inner·x), tanh = unbend·z
  int bias_dtype;
  bool wide, wide_bias;  // 16-byte reads
};

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

__device__ __forceinline__ Row row_of(const Problem& p, long long index) {
  const float tau = p.temperatures ? p.temperatures[p.temperature_per_row ? index : 0] : p.temperature;
  Row row;
  row.x = p.products + index * p.stride;
  row.bias = p.bias;
  row.vocabulary = p.vocabulary;
  const long long target = p.targets[index];
  row.target = target >= 0 && target < p.vocabulary ? static_cast<int>(target) : -1;
  row.slope = p.scale / tau;
  const bool bent = p.softcap > 0;
  row.inner = bent ? p.scale / p.softcap : 0.f;
  row.outer = bent ? p.softcap / tau : 0.f;
  row.unbend = bent ? tau / p.softcap : 0.f;
  row.bias_dtype = p.bias_dtype;
  row.wide = aligned(row.x);
  row.wide_bias = aligned(p.bias);
  return row;
}

// Explicit roundings keep the compiler from fusing differently in different kernels: the bits must agree.
template <bool kRich>
__device__ __forceinline__ float to_logit(const Row& row, float x, float bias) {
  if constexpr (!kRich) return __fmul_rn(x, row.slope);
  x = __fadd_rn(x, bias);
  return row.outer != 0.f ? __fmul_rn(row.outer, tanhf(__fmul_rn(row.inner, x))) : __fmul_rn(x, row.slope);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ void load_bias_as(const T* bias, bool wide, int left, float (&b)[kGroup]) {
  if (wide && left >= kGroup) {
    T values[kGroup];
    uint4 raw[kWide<T>];
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(bias) + i);
    __builtin_memcpy(values, raw, sizeof(values));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) b[i] = widen(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) b[i] = i < left ? widen(bias[i]) : 0.f;
  }
}

__device__ __forceinline__ void load_bias(const Row& row, int column, float (&b)[kGroup]) {
  const int left = row.vocabulary - column;
  if (row.bias == nullptr) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) b[i] = 0.f;
  } else if (row.bias_dtype == kFloat32) {
    load_bias_as(static_cast<const float*>(row.bias) + column, row.wide_bias, left, b);
  } else if (row.bias_dtype == kBFloat16) {
    load_bias_as(static_cast<const __nv_bfloat16*>(row.bias) + column, row.wide_bias, left, b);
  } else {
    load_bias_as(static_cast<const __half*>(row.bias) + column, row.wide_bias, left, b);
  }
}

// kLast: nobody reads the row again, so it need not stay in the cache.
template <bool kLast, typename T>
__device__ __forceinline__ T read(const T* p) {
  if constexpr (kLast) return __ldcs(p);
  return __ldcg(p);
}

template <bool kLast>
__device__ __forceinline__ void load_products(const Row& row, int column, float (&x)[kGroup]) {
  const float* p = row.x + column;
  const int left = row.vocabulary - column;
  if (row.wide && left >= kGroup) {
    const float4 a = read<kLast>(reinterpret_cast<const float4*>(p));
    const float4 b = read<kLast>(reinterpret_cast<const float4*>(p) + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i < left ? read<kLast>(p + i) : 0.f;
  }
}

// Products to logits; -inf beyond the vocabulary.
template <bool kRich>
__device__ __forceinline__ void to_logits(const Row& row, int column, float (&z)[kGroup]) {
  float b[kGroup];
  if constexpr (kRich) load_bias(row, column, b);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) z[i] = to_logit<kRich>(row, z[i], kRich ? b[i] : 0.f);
  const int left = row.vocabulary - column;
  if (left < kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) z[i] = i < left ? z[i] : -INFINITY;
  }
}

// The logits of groups [first, end), this thread's share of them: use(group, z).
template <bool kRich, bool kLast, typename Use>
__device__ __forceinline__ void sweep(const Row& row, int first, int end, Use use) {
  const int step = blockDim.x;
  for (int group = first + threadIdx.x; group < end; group += kBatch * step) {
    float z[kBatch][kGroup];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (group + b * step < end) load_products<kLast>(row, (group + b * step) * kGroup, z[b]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (group + b * step >= end) continue;
      to_logits<kRich>(row, (group + b * step) * kGroup, z[b]);
      use(group + b * step, z[b]);
    }
  }
}

// 0 where the target is not in this shard.
template <bool kRich>
__device__ __forceinline__ float target_logit(const Row& row) {
  if (row.target < 0) return 0.f;
  float b = 0.f;
  if (kRich && row.bias != nullptr) {
    if (row.bias_dtype == kFloat32) b = static_cast<const float*>(row.bias)[row.target];
    if (row.bias_dtype == kBFloat16) b = widen(static_cast<const __nv_bfloat16*>(row.bias)[row.target]);
    if (row.bias_dtype == kFloat16) b = widen(static_cast<const __half*>(row.bias)[row.target]);
  }
  return to_logit<kRich>(row, __ldcg(row.x + row.target), b);
}

// --- its softmax -----------------------------------------------------------------------------------------------------

// Of the logits seen so far: maximum m, s = sum of exp(z - m), t = sum of exp(z - m)·(z - m).
struct Running {
  float m, s, t;
};

struct Statistics {
  float logp, maximum, log_sum, entropy;
};

__device__ __forceinline__ Running nothing() { return {kOrigin, 0.f, 0.f}; }

__device__ __forceinline__ void move_origin(Running& r, float m) {
  const float shift = fmaxf(__fsub_rn(r.m, m), -256.f);  // exp is 0 long before; 0·inf would be NaN
  const float weight = expf(shift);
  r.t = __fmul_rn(fmaf(r.s, shift, r.t), weight);  // moving the origin shifts t by s·shift
  r.s = __fmul_rn(r.s, weight);
  r.m = m;
}

__device__ __forceinline__ void add(Running& r, const float (&z)[kGroup]) {
  const float top = fmaxf(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), fmaxf(fmaxf(z[4], z[5]), fmaxf(z[6], z[7])));
  if (top > r.m) move_origin(r, top);
  float s[kGroup / 2], t[kGroup / 2];
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const float d0 = __fsub_rn(z[2 * i], r.m), d1 = __fsub_rn(z[2 * i + 1], r.m);
    const float p0 = expf(d0), p1 = expf(d1);
    s[i] = __fadd_rn(p0, p1);
    t[i] = fmaf(p0, fmaxf(d0, -256.f), __fmul_rn(p1, fmaxf(d1, -256.f)));  // exp(-inf)·(-inf) counts as 0
  }
  r.s = __fadd_rn(r.s, __fadd_rn(__fadd_rn(s[0], s[1]), __fadd_rn(s[2], s[3])));
  r.t = __fadd_rn(r.t, __fadd_rn(__fadd_rn(t[0], t[1]), __fadd_rn(t[2], t[3])));
}

__device__ __forceinline__ Running across_lanes(Running r) {
  float m = r.m;
#pragma unroll
  for (int lane = 16; lane; lane /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lane));
  move_origin(r, m);
#pragma unroll
  for (int lane = 16; lane; lane /= 2) {
    r.s = __fadd_rn(r.s, __shfl_xor_sync(~0u, r.s, lane));
    r.t = __fadd_rn(r.t, __shfl_xor_sync(~0u, r.t, lane));
  }
  return r;
}

__device__ __forceinline__ Statistics finish(const Running& r, float z_y) {
  const double log_s = log(static_cast<double>(r.s));
  const float logp = static_cast<float>(static_cast<double>(z_y) - static_cast<double>(r.m) - log_s);
  return {logp > 0.f ? 0.f : logp, r.m, static_cast<float>(log_s),  // a NaN stays one
          static_cast<float>(log_s - static_cast<double>(r.t) / static_cast<double>(r.s))};
}

// By one block, slice after slice; every thread returns the same.
template <bool kRich, bool kLast>
__device__ __forceinline__ Statistics softmax_of(const Row& row, const Partition& part) {
  __shared__ Running of_warp[kSlices][kWarps];
  __shared__ Running of_slice[kSlices];
  __shared__ Statistics result;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float z_y = threadIdx.x == 0 ? target_logit<kRich>(row) : 0.f;
  for (int slice = 0; slice < part.slices; ++slice) {
    const int first = slice * part.groups_per_slice, end = min(first + part.groups_per_slice, part.groups);
    Running r = nothing();
    sweep<kRich, kLast>(row, first, end, [&](int, const float(&z)[kGroup]) { add(r, z); });
    r = across_lanes(r);
    if (lane == 0) of_warp[slice][warp] = r;
  }
  __syncthreads();
  if (warp < part.slices) {  // more than one slice only where there are kWarps warps
    const Running r = across_lanes(lane < part.threads / 32 ? of_warp[warp][lane] : nothing());
    if (lane == 0) of_slice[warp] = r;
  }
  __syncthreads();
  if (warp == 0) {
    const Running r = across_lanes(lane < part.slices ? of_slice[lane] : nothing());
    if (lane == 0) result = finish(r, z_y);
  }
  __syncthreads();
  return result;
}

__device__ __forceinline__ void store(const Softmax& softmax, long long row, const Statistics& s) {
  softmax.logps[row] = s.logp;
  softmax.maximum[row] = s.maximum;
  softmax.log_sum[row] = s.log_sum;
  softmax.entropy[row] = s.entropy;
}

// --- the gradient of its logits --------------------------------------------------------------------------------------

// dz = p·((g_lse - g_logp) - g_H·(log p + H)), + g_logp at the target.
struct Upstream {
  void* out;
  float at_target, share, g_entropy;
  int dtype;
  bool wide;  // 16-byte writes
};

__device__ __forceinline__ Upstream upstream_of(const Gradient& g, long long row) {
  if (g.out == nullptr) return {};
  const float at_target = g.logps ? g.logps[row] : 0.f;
  void* out = static_cast<char*>(g.out) + row * g.stride * (g.dtype == kFloat32 ? 4 : 2);
  return {out, at_target, (g.lse ? g.lse[row] : 0.f) - at_target, g.entropy ? g.entropy[row] : 0.f, g.dtype,
          aligned(out)};
}

__device__ __forceinline__ void narrow(float2 d, float2& out) { out = d; }
__device__ __forceinline__ void narrow(float2 d, __nv_bfloat162& out) { out = __floats2bfloat162_rn(d.x, d.y); }
__device__ __forceinline__ void narrow(float2 d, __half2& out) { out = __floats2half2_rn(d.x, d.y); }

template <typename T, typename T2>
__device__ __forceinline__ void write(T* out, const float (&d)[kGroup], bool wide, int left) {
  T2 pairs[kGroup / 2];
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) narrow({d[2 * i], d[2 * i + 1]}, pairs[i]);
  if (wide && left >= kGroup) {
    uint4 raw[kWide<T>];
    __builtin_memcpy(raw, pairs, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) __stcs(reinterpret_cast<uint4*>(out) + i, raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < left) __stcs(out + i, i % 2 ? pairs[i / 2].y : pairs[i / 2].x);
  }
}

template <bool kRich>
__device__ __forceinline__ void write_gradient(const Row& row, const Statistics& s, int group, const float (&z)[kGroup],
                                               const Upstream& up) {
  const int column = group * kGroup, left = row.vocabulary - column;
  float d[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float log_p = __fsub_rn(__fsub_rn(z[i], s.maximum), s.log_sum);
    float weight = up.share;
    if (up.g_entropy != 0.f) weight = fmaf(-up.g_entropy, fmaxf(log_p, -256.f) + s.entropy, weight);  // 0·inf again
    d[i] = expf(log_p) * weight;
  }
  const int hit = row.target - column;
  if (row.target >= 0 && hit >= 0 && hit < kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) d[i] += i == hit ? up.at_target : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    d[i] *= row.slope;
    if (kRich && row.outer != 0.f) {
      const float bent = row.unbend * z[i];
      d[i] *= fmaf(-bent, bent, 1.f);
    }
  }
  if (up.dtype == kFloat32) {
    write<float, float2>(static_cast<float*>(up.out) + column, d, up.wide, left);
  } else if (up.dtype == kBFloat16) {
    write<__nv_bfloat16, __nv_bfloat162>(static_cast<__nv_bfloat16*>(up.out) + column, d, up.wide, left);
  } else {
    write<__half, __half2>(static_cast<__half*>(up.out) + column, d, up.wide, left);
  }
}

template <bool kRich>
__device__ __forceinline__ void write_gradients(const Row& row, const Statistics& s, int group,
                                                const float (&z)[kGroup], const Upstream (&upstreams)[2]) {
  write_gradient<kRich>(row, s, group, z, upstreams[0]);
  if (upstreams[1].out != nullptr) write_gradient<kRich>(row, s, group, z, upstreams[1]);
}

// By one block, tile after tile.
template <bool kRich>
__device__ __forceinline__ void gradients_of(const Row& row, const Statistics& s, int groups,
                                             const Upstream (&upstreams)[2]) {
  const int step = blockDim.x;
  for (int tile = 0; tile < groups; tile += kBatch * step) {
    float z[kBatch][kGroup];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = tile + i * step + threadIdx.x;
      if (group < groups) load_products<true>(row, group * kGroup, z[i]);
    }
    // Every warp has read its part of this tile before any writes: half-width results lie on tiles already read.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = tile + i * step + threadIdx.x;
      if (group >= groups) continue;
      to_logits<kRich>(row, group * kGroup, z[i]);
      write_gradients<kRich>(row, s, group, z[i], upstreams);
    }
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

template <bool kRich>
__global__ void __launch_bounds__(kThreads, kResident)
    softmax_kernel(Problem problem, Softmax softmax, Partition part) {
  const Statistics s = softmax_of<kRich, true>(row_of(problem, blockIdx.x), part);
  if (threadIdx.x == 0) store(softmax, blockIdx.x, s);
}

template <bool kRich>
__global__ void __launch_bounds__(kThreads, kResident)
    d_logits_kernel(Problem problem, Softmax softmax, Gradient first, Gradient second, Partition part) {
  const long long index = blockIdx.x;
  const Statistics s = {0.f, softmax.maximum[index], softmax.log_sum[index],
                        softmax.entropy ? softmax.entropy[index] : 0.f};
  __shared__ Upstream upstreams[2];
  if (threadIdx.x == 0) upstreams[0] = upstream_of(first, index), upstreams[1] = upstream_of(second, index);
  gradients_of<kRich>(row_of(problem, index), s, part.groups, upstreams);  // begins with a barrier
}

template <bool kRich>
__global__ void __launch_bounds__(kThreads, kResident)
    two_reads_kernel(Problem problem, Softmax softmax, Gradient first, Gradient second, Partition part) {
  const long long index = blockIdx.x;
  const Row row = row_of(problem, index);
  __shared__ Upstream upstreams[2];
  if (threadIdx.x == 0) upstreams[0] = upstream_of(first, index), upstreams[1] = upstream_of(second, index);
  const Statistics s = softmax_of<kRich, false>(row, part);  // ends with a barrier: the row has been read
  if (threadIdx.x == 0) store(softmax, index, s);
  gradients_of<kRich>(row, s, part.groups, upstreams);
}

// A cluster of blocks per row, each of which keeps one slice of the logits in its shared memory.
template <bool kRich>
__global__ void __launch_bounds__(kThreads, kResident)
    one_read_kernel(Problem problem, Softmax softmax, Gradient first, Gradient second, Partition part) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ float4 kept[];  // [2][groups_per_slice]: neighbouring threads touch neighbouring 16 bytes
  __shared__ Running of_warp[kWarps];
  __shared__ Running of_slice;
  __shared__ Statistics result;
  __shared__ Upstream upstreams[2];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long index = blockIdx.x / part.slices;
  const Row row = row_of(problem, index);
  const float z_y = rank == 0 && threadIdx.x == 0 ? target_logit<kRich>(row) : 0.f;
  const int start = rank * part.groups_per_slice, end = min(start + part.groups_per_slice, part.groups);
  float4 *low = kept, *high = kept + part.groups_per_slice;
  if (threadIdx.x == 0) upstreams[0] = upstream_of(first, index), upstreams[1] = upstream_of(second, index);

  Running r = nothing();
  sweep<kRich, true>(row, start, end, [&](int group, const float(&z)[kGroup]) {
    add(r, z);
    low[group - start] = {z[0], z[1], z[2], z[3]};
    high[group - start] = {z[4], z[5], z[6], z[7]};
  });
  r = across_lanes(r);
  if (lane == 0) of_warp[warp] = r;
  __syncthreads();
  if (warp == 0) {
    r = across_lanes(lane < part.threads / 32 ? of_warp[lane] : nothing());
    if (lane == 0) of_slice = r;
  }
  cluster.sync();  // the whole row has been read before any of it is overlaid, and every slice's sums are visible
  if (warp == 0) {
    r = across_lanes(lane < part.slices ? *cluster.map_shared_rank(&of_slice, lane) : nothing());
    if (lane == 0) result = finish(r, z_y);  // z_y is rank 0's
  }
  __syncthreads();
  __cluster_barrier_arrive_relaxed();  // has read the others' sums; a release would wait for all of memory
  const Statistics s = result;
  if (rank == 0 && threadIdx.x == 0) store(softmax, index, s);

  for (int group = start + threadIdx.x; group < end; group += blockDim.x) {
    const float4 l = low[group - start], h = high[group - start];
    const float z[kGroup] = {l.x, l.y, l.z, l.w, h.x, h.y, h.z, h.w};
    write_gradients<kRich>(row, s, group, z, upstreams);
  }
  cluster.barrier_wait();  // no block leaves while another may still read its sums
#endif
}

// --- launches --------------------------------------------------------------------------------------------------------

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(long long rows, const Partition& part, void* stream, int cluster = 0) {
    config.gridDim = dim3(static_cast<unsigned>(rows * (cluster ? cluster : 1)));
    config.blockDim = dim3(part.threads);
    config.stream = static_cast<cudaStream_t>(stream);
    if (cluster == 0) return;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    config.dynamicSmemBytes = static_cast<size_t>(part.groups_per_slice) * kGroup * sizeof(float);
  }
  Launch(const Launch&) = delete;
};

// Whether the device runs `launch` of `kernel`, whose dynamic shared memory is allowed on the way.
template <typename Kernel>
cudaError_t fits(Kernel kernel, const Launch& launch, bool* yes) {
  *yes = false;
  int device = 0, clusters = 0, shared = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (status != cudaSuccess || !clusters) return status;
  status = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const size_t dynamic = launch.config.dynamicSmemBytes;
  if (status != cudaSuccess || dynamic + 256 > static_cast<size_t>(shared)) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic));
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  int active = 0;
  status = cudaOccupancyMaxActiveClusters(&active, kernel, &launch.config);
  *yes = status == cudaSuccess && active > 0;
  return status;
}

bool rich(const Problem& p) { return p.bias != nullptr || p.softcap > 0; }

template <bool kRich>
cudaError_t launch_softmax_d_logits(const Problem& problem, const Softmax& softmax, const Gradient& first,
                                    const Gradient& second, const Partition& part, void* stream) {
  bool one_read = false;
  const Launch cluster(problem.rows, part, stream, part.slices);
  const cudaError_t status = fits(one_read_kernel<kRich>, cluster, &one_read);
  if (status != cudaSuccess) return status;
  const Launch plain(problem.rows, part, stream);
  const auto kernel = one_read ? one_read_kernel<kRich> : two_reads_kernel<kRich>;
  return cudaLaunchKernelEx(one_read ? &cluster.config : &plain.config, kernel, problem, softmax, first, second, part);
}

// Blocks of one launch and columns of a row are counted in an int.
bool too_large(const Problem& p) { return p.rows > INT_MAX / kSlices || p.vocabulary > INT_MAX / 2; }

int done(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();  // reported here, not by somebody's next call
  return static_cast<int>(status);
}

}  // namespace
}  // namespace genevolve

// --- C ABI: each returns a CUDA error code ---------------------------------------------------------------------------

#define GENEVOLVE_API extern "C" __attribute__((visibility("default")))

// Raised with every change of a struct or a signature: a library built from other sources is not called.
GENEVOLVE_API int genevolve_abi() { return 1; }

GENEVOLVE_API const char* genevolve_error_name(int status) {
  return cudaGetErrorName(static_cast<cudaError_t>(status));
}

GENEVOLVE_API const char* genevolve_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

GENEVOLVE_API int genevolve_softmax(const genevolve::Problem* problem, const genevolve::Softmax* softmax,
                                    void* stream) {
  using namespace genevolve;
  if (problem->rows == 0) return 0;
  if (too_large(*problem)) return cudaErrorInvalidValue;
  const Partition part = partition(static_cast<int>(problem->vocabulary));
  const Launch launch(problem->rows, part, stream);
  const auto kernel = rich(*problem) ? softmax_kernel<true> : softmax_kernel<false>;
  return done(cudaLaunchKernelEx(&launch.config, kernel, *problem, *softmax, part));
}

// The gradients of one or two upstreams (`second` may be null) from the softmax that genevolve_softmax wrote.
// first.out may be the products, or the left half of their rows in 16 bits; second.out lies elsewhere.
GENEVOLVE_API int genevolve_d_logits(const genevolve::Problem* problem, const genevolve::Softmax* softmax,
                                     const genevolve::Gradient* first, const genevolve::Gradient* second,
                                     void* stream) {
  using namespace genevolve;
  if (problem->rows == 0) return 0;
  if (too_large(*problem)) return cudaErrorInvalidValue;
  const Partition part = partition(static_cast<int>(problem->vocabulary));
  const Launch launch(problem->rows, part, stream);
  const auto kernel = rich(*problem) ? d_logits_kernel<true> : d_logits_kernel<false>;
  const Gradient none = {};
  return done(cudaLaunchKernelEx(&launch.config, kernel, *problem, *softmax, *first, second ? *second : none, part));
}

// Both in one launch, for upstream gradients known beforehand: one read where a cluster's shared memory holds the row.
GENEVOLVE_API int genevolve_softmax_d_logits(const genevolve::Problem* problem, const genevolve::Softmax* softmax,
                                             const genevolve::Gradient* first, const genevolve::Gradient* second,
                                             void* stream) {
  using namespace genevolve;
  if (problem->rows == 0) return 0;
  if (too_large(*problem)) return cudaErrorInvalidValue;
  const Partition part = partition(static_cast<int>(problem->vocabulary));
  const auto launch = rich(*problem) ? launch_softmax_d_logits<true> : launch_softmax_d_logits<false>;
  return done(launch(*problem, *softmax, *first, second ? *second : Gradient{}, part, stream));
}
