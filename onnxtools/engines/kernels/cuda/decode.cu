// One query token a row against its cache: appends the token's key and value, rotates where there are angles, and
// attends.
//
// A block serves one KV head of one row with all the query heads that share it (G). A key is read by head_size / 8
// lanes, 16 bytes each; each such group of lanes keeps its own running maximum, sum and output (the online softmax of
// Milakov and Gimelshein, 2018), and the groups are merged at the end. The cache is read once, keys and values
// together.
#include "kernels.h"
#include "launch.h"

namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 4, kStages = 3;  // keys a lane takes at once, and how many times that are in flight

template <typename T, int D, int G>
__global__ __launch_bounds__(kThreads) void attention_kernel(AttentionArguments p) {
  constexpr int kLanes = D / 8, kGroups = kThreads / kLanes;  // lanes a key, keys at once
  __shared__ __align__(16) T query[G][D], fresh[2][D];
  __shared__ float maxima[kGroups][G], sums[kGroups][G], outputs[kGroups][D];
  const int kv = blockIdx.x % p.kv_heads, row = blockIdx.x / p.kv_heads, lane = threadIdx.x % kLanes,
            group = threadIdx.x / kLanes;
  const size_t width = size_t(p.heads + 2 * p.kv_heads) * D;
  const T* qkv = static_cast<const T*>(p.qkv) + row * width;
  T* keys = static_cast<T*>(p.key) + (size_t(row) * p.kv_heads + kv) * p.slots * D;
  T* values = static_cast<T*>(p.value) + (size_t(row) * p.kv_heads + kv) * p.slots * D;

  // A lane fetches what it will use itself, so its stages need no barrier.
  extern __shared__ uint4 shared[];
  uint4* ring = shared + threadIdx.x;
  constexpr int kStride = kGroups * kUnroll;
  auto fetch = [&](int base, int stage) {
    if (base < p.slots) {
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const size_t at = size_t(min(base + group + u * kGroups, p.slots - 1)) * D + 8 * lane;
        copy_async(ring + ((stage * kUnroll + u) * 2 + 0) * kThreads, keys + at);
        copy_async(ring + ((stage * kUnroll + u) * 2 + 1) * kThreads, values + at);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int i = 0; i < kStages - 1; i++) fetch(i * kStride, i);  // the cache is of earlier steps
  wait_for_inputs();
  const int position = p.positions[row];  // the kernel before may be the one that makes it
  const T* cos = p.cos == nullptr ? nullptr : static_cast<const T*>(p.cos) + size_t(position) * (D / 2);
  const T* sin = p.cos == nullptr ? nullptr : static_cast<const T*>(p.sin) + size_t(position) * (D / 2);

  for (int at = threadIdx.x; at < (G + 2) * (D / 16); at += kThreads) {  // the queries, the key, the value
    const int which = at / (D / 16), i = at % (D / 16),
              head = which < G ? kv * G + which : p.heads + (which - G) * p.kv_heads + kv;
    T low[8], high[8];
    rotated<T, D>(qkv + size_t(head) * D, i, which <= G ? cos : nullptr, sin, p.interleaved, low, high);
    put<T, D>(which < G ? query[which] : fresh[which - G], i, low, high);
    if (which >= G) put<T, D>((which == G ? keys : values) + size_t(position) * D, i, low, high);
  }
  __syncthreads();

  float q[G][8], maximum[G], sum[G], out[G][8] = {};
  for (int h = 0; h < G; h++) {
    widen<T>(*reinterpret_cast<const uint4*>(&query[h][8 * lane]), q[h]);
    maximum[h] = -1e30f, sum[h] = 0;  // finite: a group may have no key
    for (int i = 0; i < 8; i++) q[h][i] *= p.scale * kLog2E;
  }
  int stage = 0;
  for (int base = 0; base <= position; base += kStride) {  // the same trips for every lane, which shuffle together
    const int ahead = base + (kStages - 1) * kStride;
    fetch(ahead <= position ? ahead : p.slots, (stage + kStages - 1) % kStages);
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    uint4 k[kUnroll], v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const bool old =
          base + group + u * kGroups < position;  // Slots past `position` are uninitialised, and 0 * NaN is NaN
      k[u] =
          old ? ring[((stage * kUnroll + u) * 2 + 0) * kThreads] : *reinterpret_cast<const uint4*>(&fresh[0][8 * lane]);
      v[u] =
          old ? ring[((stage * kUnroll + u) * 2 + 1) * kThreads] : *reinterpret_cast<const uint4*>(&fresh[1][8 * lane]);
    }
    stage = (stage + 1) % kStages;
#pragma unroll
    for (int h = 0; h < G; h++) {
      float score[kUnroll], top = maximum[h];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        float wide[8], dot = 0;
        widen<T>(k[u], wide);
#pragma unroll
        for (int i = 0; i < 8; i++) dot += q[h][i] * wide[i];
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, mask);
        score[u] = base + group + u * kGroups <= position ? dot : -INFINITY;
        top = fmaxf(top, score[u]);
      }
      const float shrink = exp2f(maximum[h] - top);
      maximum[h] = top, sum[h] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; i++) out[h][i] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const float weight = exp2f(score[u] - top);
        float wide[8];
        widen<T>(v[u], wide);
        sum[h] += weight;
#pragma unroll
        for (int i = 0; i < 8; i++) out[h][i] += weight * wide[i];
      }
    }
  }
  if (lane == 0)
    for (int h = 0; h < G; h++) maxima[group][h] = maximum[h], sums[group][h] = sum[h];
  for (int h = 0; h < G; h++) {
    __syncthreads();
    for (int i = 0; i < 8; i++) outputs[group][8 * lane + i] = out[h][i];
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += kThreads) {
      float top = -INFINITY, total = 0, value = 0;
      for (int i = 0; i < kGroups; i++) top = fmaxf(top, maxima[i][h]);
      for (int i = 0; i < kGroups; i++) {
        const float weight = exp2f(maxima[i][h] - top);
        total += weight * sums[i][h], value += weight * outputs[i][d];
      }
      static_cast<T*>(p.y)[(size_t(row) * p.heads + kv * G + h) * D + d] = T(value / total);
    }
  }
}

template <typename T, int D, int G>
cudaError_t launch(const AttentionArguments& p, cudaStream_t stream) {
  constexpr int kShared = kStages * kUnroll * 2 * kThreads * 16;
  static const cudaError_t ready =
      cudaFuncSetAttribute(attention_kernel<T, D, G>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (ready != cudaSuccess) return ready;
  return Launch(dim3(p.batch * p.kv_heads), dim3(kThreads), kShared, stream).run(attention_kernel<T, D, G>, p);
}

template <typename T, int D>
cudaError_t grouped(const AttentionArguments& p, cudaStream_t stream) {
  switch (p.heads / p.kv_heads) {
    case 1: return launch<T, D, 1>(p, stream);
    case 2: return launch<T, D, 2>(p, stream);
    case 3: return launch<T, D, 3>(p, stream);
    case 4: return launch<T, D, 4>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool takes_decode(int heads, int kv_heads, int head_size) {
  return (head_size == 64 || head_size == 128) && heads % kv_heads == 0 && heads / kv_heads <= 4;
}

cudaError_t decode_attention(const AttentionArguments& p, bool bf16, cudaStream_t stream) {
  if (bf16) return p.head_size == 64 ? grouped<__nv_bfloat16, 64>(p, stream) : grouped<__nv_bfloat16, 128>(p, stream);
  return p.head_size == 64 ? grouped<half, 64>(p, stream) : grouped<half, 128>(p, stream);
}
