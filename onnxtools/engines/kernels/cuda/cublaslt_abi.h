// The part of cublasLt's interface that we call. A toolkit of nvcc alone, as the machines of our CI have, comes without
// cublasLt.h; where it is there, cublaslt_check.cc compares every number below with it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cublaslt {

using Handle = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

inline constexpr int kCompute32F = 68, kTranspose = 1;            // cublasComputeType_t, cublasOperation_t
inline constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;  // cudaDataType_t
inline constexpr int kDescTransA = 3, kDescEpilogue = 7, kDescBias = 8,
                     kDescBiasType = 26;                   // cublasLtMatmulDescAttributes_t
inline constexpr int kBias = 4, kGelu = 32, kDefault = 1;  // cublasLtEpilogue_t
inline constexpr int kMaxWorkspace = 1;                    // cublasLtMatmulPreferenceAttributes_t

}  // namespace cublaslt
