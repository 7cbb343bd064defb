// Residual addition and layer normalization (Ba et al., 2016) or RMS normalization (Zhang and Sennrich, 2019) in one
// pass, fp32 inside.
#include "kernels.h"
#include "launch.h"

namespace {

__device__ float block_sum(float v, float* shared) {
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f;
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

template <typename T, bool RMS, int kVectors>  // kVectors: of 8 elements, a thread
__global__ __launch_bounds__(1024) void norm_kernel(NormArguments p) {
  __shared__ float shared[2][32];
  const size_t row = blockIdx.x * size_t(p.width), skip = blockIdx.x % p.skip_rows * size_t(p.width);
  uint4 scale[kVectors], shift[kVectors], bias[kVectors];
  auto vector = [](const void* from, size_t at) {  // zeros for what is not there
    uint4 v = make_uint4(0, 0, 0, 0);
    if (from != nullptr) v = *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + at);
    return v;
  };
#pragma unroll
  for (int i = 0; i < kVectors; i++)
    if (const int at = 8 * (threadIdx.x + i * blockDim.x); at < p.width)
      scale[i] = vector(p.scale, at), shift[i] = vector(p.shift, at), bias[i] = vector(p.bias, at);
  wait_for_inputs();

  float v[kVectors][8], total = 0;
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int at = 8 * (threadIdx.x + i * blockDim.x);
    if (at >= p.width) continue;
    float a[8], b[8], c[8];
    widen<T>(vector(p.x, row + at), a);
    widen<T>(vector(p.skip, skip + at), b);
    widen<T>(bias[i], c);
    T sum[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      v[i][e] = a[e] + b[e] + c[e];
      sum[e] = T(v[i][e]);
      total += RMS ? v[i][e] * v[i][e] : v[i][e];
    }
    if (p.sum != nullptr) *reinterpret_cast<uint4*>(static_cast<T*>(p.sum) + row + at) = *reinterpret_cast<uint4*>(sum);
  }
  total = block_sum(total, shared[0]);
  float mean = 0, square = total;
  if (!RMS) {
    mean = total / p.width, square = 0;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      if (8 * (threadIdx.x + i * blockDim.x) < p.width)
        for (int e = 0; e < 8; e++) square += (v[i][e] - mean) * (v[i][e] - mean);
    square = block_sum(square, shared[1]);
  }
  const float inverse = rsqrtf(square / p.width + p.epsilon);
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int at = 8 * (threadIdx.x + i * blockDim.x);
    if (at >= p.width) continue;
    float g[8], s[8];
    widen<T>(scale[i], g);
    widen<T>(shift[i], s);
    T y[8];
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] = T((v[i][e] - mean) * inverse * g[e] + s[e]);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + row + at) = *reinterpret_cast<uint4*>(y);
  }
}

template <typename T, bool RMS>
cudaError_t launch(const NormArguments& p, cudaStream_t stream) {
  const int vectors = p.width > 8 * 1024 ? 2 : 1, threads = (p.width / (8 * vectors) + 31) / 32 * 32;
  const Launch launch(dim3(p.rows), dim3(threads), 0, stream);
  return vectors == 2 ? launch.run(norm_kernel<T, RMS, 2>, p) : launch.run(norm_kernel<T, RMS, 1>, p);
}

}  // namespace

bool takes_norm(int width) { return width % 16 == 0 && width <= 16 * 1024; }

cudaError_t norm(const NormArguments& p, bool rms, bool bf16, cudaStream_t stream) {
  if (bf16) return rms ? launch<__nv_bfloat16, true>(p, stream) : launch<__nv_bfloat16, false>(p, stream);
  return rms ? launch<half, true>(p, stream) : launch<half, false>(p, stream);
}
