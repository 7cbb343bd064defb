// What the kernels share: loads, rotated heads, the matrix instruction, and launches that overlap.
//
// Each kernel is launched while its predecessor still runs (programmatic dependent launch, CUDA programming guide).
// Before griddepcontrol.wait a kernel may read only data that no kernel of this step wrote (weights, cached keys of
// earlier tokens). It calls launch_dependents after the wait, so at most two kernels overlap. The predecessor may be
// one of ONNX Runtime's.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__device__ __forceinline__ void wait_for_inputs() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
}

template <typename T>
struct Pair;
template <>
struct Pair<half> {
  using type = half2;
  static __device__ float2 wide(half2 v) { return __half22float2(v); }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ float2 wide(__nv_bfloat162 v) { return __bfloat1622float2(v); }
};

template <typename T>
__device__ __forceinline__ void widen(const uint4& v, float (&to)[8]) {
  const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&v);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = Pair<T>::wide(pairs[i]);
    to[2 * i] = f.x, to[2 * i + 1] = f.y;
  }
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1, half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename T>
__device__ __forceinline__ unsigned packed(float a, float b) {
  const T pair[2] = {T(a), T(b)};
  return *reinterpret_cast<const unsigned*>(pair);
}

// Elements 8 i .. 8 i + 7 of both halves of a head, rotated by the angles of its position (Su et al., 2021) in the
// halves or the interleaved form; cos may be null.
template <typename T, int D>
__device__ __forceinline__ void rotated(const T* head, int i, const T* cos, const T* sin, bool interleaved, T (&low)[8],
                                        T (&high)[8]) {
  *reinterpret_cast<uint4*>(low) = *reinterpret_cast<const uint4*>(head + 8 * i);
  *reinterpret_cast<uint4*>(high) = *reinterpret_cast<const uint4*>(head + D / 2 + 8 * i);
  if (cos == nullptr) return;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (!interleaved) {
      const float c = float(cos[8 * i + e]), s = float(sin[8 * i + e]), a = float(low[e]), b = float(high[e]);
      low[e] = T(a * c - b * s), high[e] = T(b * c + a * s);
    } else if (e % 2 == 0) {
      for (T* half : {low, high}) {
        const int pair = (half == low ? 0 : D / 4) + 4 * i + e / 2;
        const float c = float(cos[pair]), s = float(sin[pair]), a = float(half[e]), b = float(half[e + 1]);
        half[e] = T(a * c - b * s), half[e + 1] = T(b * c + a * s);
      }
    }
  }
}

// Puts the elements that `rotated` gave to their places in a head.
template <typename T, int D>
__device__ __forceinline__ void put(T* head, int i, const T (&low)[8], const T (&high)[8]) {
  reinterpret_cast<uint4*>(head)[i] = *reinterpret_cast<const uint4*>(low),
  reinterpret_cast<uint4*>(head + D / 2)[i] = *reinterpret_cast<const uint4*>(high);
}

constexpr float kLog2E = 1.4426950408889634f;  // of scores whose exponentials are taken by exp2

class Launch {
 public:
  Launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    config_.gridDim = grid, config_.blockDim = block, config_.dynamicSmemBytes = shared, config_.stream = stream;
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    config_.numAttrs = 1;
  }

  Launch& cluster(int y) {  // blocks of the same x work together
    if (y == 1) return *this;
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim.x = 1, attributes_[1].val.clusterDim.y = y, attributes_[1].val.clusterDim.z = 1;
    config_.numAttrs = 2;
    return *this;
  }

  template <typename Kernel, typename... Arguments>
  cudaError_t run(Kernel kernel, const Arguments&... arguments) const {
    cudaLaunchConfig_t config = config_;
    config.attrs = const_cast<cudaLaunchAttribute*>(attributes_);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attributes_[2] = {};
};
