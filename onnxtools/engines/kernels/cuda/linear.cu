// Y = act(X W^T + b) for a few rows of X: the products of a decode step, which are bound by reading W once.
//
// A block computes 32 features for all rows, each warp a part of their sums, with mma.m16n8k16: W is the A operand
// (features by K), X the B operand (K by rows). An MMA sums over K in any order as long as A and B agree, so a thread
// takes its operands as 16 consecutive bytes of a row of W and of X: thread t of a quad holds k = 8t .. 8t+7 of 32. Its
// pieces of W come ahead of time through a ring in shared memory that it alone uses. K is split among the warps of a
// block and among the blocks of a cluster; partial sums meet in (distributed) shared memory.
#include <cooperative_groups.h>

#include "kernels.h"
#include "launch.h"

namespace cg = cooperative_groups;

namespace {

constexpr int kWarps = 8, kTiles = 2, kFeatures = 16 * kTiles;  // of W, the mma's tiles and their rows in a block

__device__ __forceinline__ float activated(float v, Activation activation) {
  if (activation == Activation::kNone) return v;
  return 0.5f * v *
         (1.0f +
          tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));  // GELU's tanh form (Hendrycks and Gimpel, 2016)
}

template <int NT, int ST, int SUB>
struct Shared {  // bytes
  static constexpr int kRing = kWarps * ST * kTiles * 2 * SUB * 32 * 16,
                       kPartial = kWarps * 8 * NT * (kFeatures + 4) * 4;
  static constexpr int kReceived = kRing > kPartial ? kRing : kPartial;  // where it begins
  static constexpr int kAll = kReceived + 8 * NT * kFeatures * 4;
  static constexpr int kBlocks =
      200 * 1024 / kAll < 4 ? 200 * 1024 / kAll : 4;  // that live at once, if registers allow it
};

// NT: tiles of 8 rows of X; ST: stages of the ring, each SUB times 32 elements of K.
template <typename T, int NT, int ST, int SUB>
__global__ __launch_bounds__(32 * kWarps,
                             Shared<NT, ST, SUB>::kBlocks) void linear_kernel(const T* x, const T* __restrict__ w,
                                                                              const T* __restrict__ bias,
                                                                              T* __restrict__ y, int m, int n, int k,
                                                                              Activation activation) {
  constexpr int kRows = 8 * NT, kPitch = kFeatures + 4, kChunk = 32 * SUB;
  extern __shared__ uint4 shared[];
  cg::cluster_group cluster = cg::this_cluster();
  const int splits = gridDim.y;
  if (splits > 1) cluster.barrier_arrive();  // that the others run is known before they are written to
  auto& partial = *reinterpret_cast<float (*)[kWarps][kRows][kPitch]>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int feature0 = blockIdx.x * kFeatures;

  // A thread fetches what it will use itself, so its stages need no barrier.
  uint4* ring = shared + warp * ST * (kTiles * 2 * SUB) * 32 + lane;
  const T* rows[kTiles][2];
  for (int i = 0; i < kTiles; i++)
    for (int h = 0; h < 2; h++) rows[i][h] = w + size_t(min(feature0 + 16 * i + 8 * h + g, n - 1)) * k + 8 * t;
  const int start = (blockIdx.y * kWarps + warp) * kChunk, stride = splits * kWarps * kChunk;
  auto fetch = [&](int at, int stage) {
    if (at < k) {
#pragma unroll
      for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int s = 0; s < SUB; s++)
            copy_async(ring + ((stage * kTiles + i) * 2 * SUB + h * SUB + s) * 32, rows[i][h] + at + 32 * s);
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int i = 0; i < ST - 1; i++) fetch(start + i * stride, i);
  wait_for_inputs();

  const T* xs[NT];
  for (int j = 0; j < NT; j++) xs[j] = x + size_t(min(8 * j + g, m - 1)) * k + 8 * t;
  uint4 b[NT][SUB];
  auto fetch_x = [&](int at) {
    if (at >= k) return;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int s = 0; s < SUB; s++) b[j][s] = *reinterpret_cast<const uint4*>(xs[j] + at + 32 * s);
  };
  fetch_x(start);
  float sum[kTiles][NT][4] = {};
  int stage = 0;
  for (int at = start; at < k; at += stride) {
    fetch(at + (ST - 1) * stride, (stage + ST - 1) % ST);
    asm volatile("cp.async.wait_group %0;" ::"n"(ST - 1) : "memory");
    uint4 c[NT][SUB];
    for (int j = 0; j < NT; j++)
      for (int s = 0; s < SUB; s++) c[j][s] = b[j][s];
    fetch_x(at + stride);
#pragma unroll
    for (int s = 0; s < SUB; s++)
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        const uint4 low = ring[((stage * kTiles + i) * 2 * SUB + s) * 32],
                    high = ring[((stage * kTiles + i) * 2 * SUB + SUB + s) * 32];
#pragma unroll
        for (int j = 0; j < NT; j++) {
          mma(sum[i][j], low.x, high.x, low.y, high.y, c[j][s].x, c[j][s].y, T());
          mma(sum[i][j], low.z, high.z, low.w, high.w, c[j][s].z, c[j][s].w, T());
        }
      }
    stage = (stage + 1) % ST;
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  for (int i = 0; i < kTiles; i++)
    for (int j = 0; j < NT; j++)
      for (int c = 0; c < 4; c++) partial[warp][8 * j + 2 * t + c % 2][16 * i + g + 8 * (c / 2)] = sum[i][j][c];
  __syncthreads();

  // The warps are added up. Of a cluster, each block finishes its share of the result: it gets the others' sums for
  // that.
  constexpr int kAll = kRows * kFeatures;
  float* received =
      reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + Shared<NT, ST, SUB>::kReceived);  // [splits][share]
  const int share = kAll / splits, rank = blockIdx.y;
  if (splits > 1) cluster.barrier_wait();
  for (int e = threadIdx.x; e < kAll; e += 32 * kWarps) {
    const int f = e % kFeatures, r = e / kFeatures, owner = e / share;
    float total = 0;
    for (int i = 0; i < kWarps; i++) total += partial[i][r][f];
    float* to = received + rank * share + e % share;
    *(owner == rank ? to : cluster.map_shared_rank(to, owner)) = total;
  }
  if (splits > 1) cluster.sync();
  else __syncthreads();
  for (int at = threadIdx.x; at < share; at += 32 * kWarps) {
    const int e = rank * share + at, r = e / kFeatures, feature = feature0 + e % kFeatures;
    if (r >= m || feature >= n) continue;
    float total = bias != nullptr ? float(bias[feature]) : 0.0f;
    for (int i = 0; i < splits; i++) total += received[i * share + at];
    y[size_t(r) * n + feature] = T(activated(total, activation));
  }
}

template <typename T, int NT, int ST, int SUB>
cudaError_t launch(const LinearArguments& p, int splits, cudaStream_t stream) {
  auto* kernel = linear_kernel<T, NT, ST, SUB>;
  constexpr int kShared = Shared<NT, ST, SUB>::kAll;
  static const cudaError_t ready = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (ready != cudaSuccess) return ready;
  const dim3 grid((p.n + kFeatures - 1) / kFeatures, splits);
  return Launch(grid, dim3(32 * kWarps), kShared, stream)
      .cluster(splits)
      .run(kernel, static_cast<const T*>(p.x), static_cast<const T*>(p.w), static_cast<const T*>(p.bias),
           static_cast<T*>(p.y), p.m, p.n, p.k, p.activation);
}

template <typename T, int NT>
cudaError_t chosen(const LinearArguments& p, int processors, cudaStream_t stream) {
  // Few blocks: K is split among a cluster. Many: fewer bytes of shared memory let more of them live at once.
  const int blocks = (p.n + kFeatures - 1) / kFeatures;
  if (blocks > 3 * processors) return launch<T, NT, 3, 1>(p, 1, stream);
  if (blocks > 3 * processors / 2) return launch<T, NT, 2, 2>(p, 1, stream);
  return launch<T, NT, 3, 2>(p, blocks > 3 * processors / 4 ? 2 : 4, stream);
}

}  // namespace

// Above 32768 features cuBLAS also saturates memory bandwidth and has the cheaper epilogue.
bool takes_linear(int m, int n, int k) { return m <= 16 && n <= 32768 && k % 64 == 0; }

cudaError_t linear(const LinearArguments& p, bool bf16, int processors, cudaStream_t stream) {
  if (bf16)
    return p.m <= 8 ? chosen<__nv_bfloat16, 1>(p, processors, stream) : chosen<__nv_bfloat16, 2>(p, processors, stream);
  return p.m <= 8 ? chosen<half, 1>(p, processors, stream) : chosen<half, 2>(p, processors, stream);
}
