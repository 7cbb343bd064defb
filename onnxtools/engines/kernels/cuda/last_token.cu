// The row of each text's last token, where prompts of several lengths are padded on the right.
#include "kernels.h"
#include "launch.h"

namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void last_token_kernel(LastTokenArguments p) {
  wait_for_inputs();
  const int64_t* mask = p.mask + size_t(blockIdx.x) * p.total;
  int count = 0;
  for (int begin = max(p.total - p.tokens, 0); begin < p.total; begin += kThreads)
    count += __syncthreads_count(begin + threadIdx.x < p.total && mask[begin + threadIdx.x] != 0);
  const uint4* from = static_cast<const uint4*>(p.x) + (size_t(blockIdx.x) * p.tokens + max(count - 1, 0)) * p.pieces;
  for (int i = threadIdx.x; i < p.pieces; i += kThreads)
    static_cast<uint4*>(p.y)[size_t(blockIdx.x) * p.pieces + i] = from[i];
}

}  // namespace

cudaError_t last_token(const LastTokenArguments& p, cudaStream_t stream) {
  return Launch(dim3(p.rows), dim3(kThreads), 0, stream).run(last_token_kernel, p);
}
