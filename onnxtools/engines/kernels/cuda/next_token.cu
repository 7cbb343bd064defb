// The greedy token of each row, and with it the inputs of the next step, in one kernel.
#include "kernels.h"
#include "launch.h"

namespace {

constexpr int kThreads = 1024;

struct Best {
  float value;
  int at;
};

// The larger, the first of equals; a NaN is larger than anything, so that none is overlooked.
__device__ __forceinline__ Best better(Best a, Best b) {
  const bool second =
      isnan(b.value) ? !isnan(a.value) || b.at < a.at : b.value > a.value || (b.value == a.value && b.at < a.at);
  return second ? b : a;
}

template <typename V, typename Combine>
__device__ V reduced(V v, V none, V* shared, Combine combine) {
  auto shuffled = [&](V x) {
    for (int mask = 16; mask > 0; mask /= 2) {
      V other;
      if constexpr (sizeof(V) == sizeof(Best))
        other = {__shfl_xor_sync(0xffffffffu, x.value, mask), __shfl_xor_sync(0xffffffffu, x.at, mask)};
      else other = __shfl_xor_sync(0xffffffffu, x, mask);
      x = combine(x, other);
    }
    return x;
  };
  v = shuffled(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  return shuffled(threadIdx.x % 32 < kThreads / 32 ? shared[threadIdx.x % 32] : none);
}

__global__ __launch_bounds__(kThreads) void next_token_kernel(NextTokenArguments p) {
  __shared__ Best bests[32];
  __shared__ int counts[32];
  wait_for_inputs();
  const int row = blockIdx.x / p.tokens;
  const float* logits = p.logits + size_t(blockIdx.x) * p.vocabulary;
  Best best{-INFINITY, p.vocabulary};
#pragma unroll 8  // loads in flight
  for (int at = threadIdx.x; at < p.vocabulary; at += kThreads) best = better(best, {logits[at], at});
  best = reduced(best, Best{-INFINITY, p.vocabulary}, bests, better);
  const int64_t token = isfinite(best.value) ? best.at : -1;
  if (threadIdx.x == 0) p.next[blockIdx.x] = token;
  if (blockIdx.x % p.tokens != p.tokens - 1) return;
  int length = 0;
  for (int at = threadIdx.x; at < p.slots; at += kThreads) length += p.mask[size_t(row) * p.slots + at] != 0;
  length = reduced(length, 0, counts, [](int a, int b) { return a + b; });
  for (int at = threadIdx.x; at < p.slots; at += kThreads) {
    const size_t here = size_t(row) * p.slots + at;
    p.next_mask[here] = at <= length;
    p.found[here] = at == length ? token : p.past[size_t(row) * p.past_slots + min(at, p.past_slots - 1)];
  }
}

}  // namespace

cudaError_t next_token(const NextTokenArguments& p, cudaStream_t stream) {
  return Launch(dim3(p.rows * p.tokens), dim3(kThreads), 0, stream).run(next_token_kernel, p);
}
