// Compares cublaslt_abi.h with the toolkit's own header while the library is compiled; it makes no code.
#include "cublaslt_abi.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

using namespace cublaslt;

static_assert(kCompute32F == CUBLAS_COMPUTE_32F && kTranspose == CUBLAS_OP_T);
static_assert(kReal32F == CUDA_R_32F && kReal16F == CUDA_R_16F && kReal16BF == CUDA_R_16BF);
static_assert(kDescTransA == CUBLASLT_MATMUL_DESC_TRANSA && kDescEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(kDescBias == CUBLASLT_MATMUL_DESC_BIAS_POINTER && kDescBiasType == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
static_assert(kBias == CUBLASLT_EPILOGUE_BIAS && kGelu == CUBLASLT_EPILOGUE_GELU);
static_assert((kBias | kGelu) == CUBLASLT_EPILOGUE_GELU_BIAS && kDefault == CUBLASLT_EPILOGUE_DEFAULT);
static_assert(kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(Heuristic, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(Heuristic, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(Heuristic, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
static_assert(sizeof(int) == sizeof(cublasLtEpilogue_t) && sizeof(int) == sizeof(cudaDataType_t));
#endif
