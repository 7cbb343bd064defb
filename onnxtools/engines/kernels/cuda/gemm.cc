// act(X W^T + bias) of many rows by cublasLt, whose epilogue adds the bias and applies the activation without another
// pass over the result.
//
// The functions come from the library that ONNX Runtime has loaded, by dlopen: a process has one cublasLt, and ours
// links to none.
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "cublaslt_abi.h"
#include "kernels.h"

namespace {

using namespace cublaslt;

struct Library {
  int (*Create)(Handle*);
  int (*MatmulDescCreate)(Handle*, int compute, int scale);
  int (*MatmulDescSetAttribute)(Handle, int attribute, const void* value, size_t size);
  int (*MatrixLayoutCreate)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t pitch);
  int (*MatmulPreferenceCreate)(Handle*);
  int (*MatmulPreferenceSetAttribute)(Handle, int attribute, const void* value, size_t size);
  int (*MatmulAlgoGetHeuristic)(Handle, Handle desc, Handle a, Handle b, Handle c, Handle d, Handle preference,
                                int wanted, Heuristic* found, int* count);
  int (*Matmul)(Handle, Handle desc, const void* alpha, const void* a, Handle a_layout, const void* b, Handle b_layout,
                const void* beta, const void* c, Handle c_layout, void* d, Handle d_layout, const Algorithm*,
                void* workspace, size_t workspace_size, cudaStream_t);
  Handle handle = nullptr;
  bool ready = false;

  Library() {
    void* file = nullptr;
    for (int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
        if (file == nullptr) file = dlopen(name, flags);
    if (file == nullptr) return;
    auto get = [&](auto& function, const char* name) {
      return (function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(file, name))) != nullptr;
    };
    ready = get(Create, "cublasLtCreate") && get(MatmulDescCreate, "cublasLtMatmulDescCreate") &&
            get(MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute") &&
            get(MatrixLayoutCreate, "cublasLtMatrixLayoutCreate") &&
            get(MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate") &&
            get(MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute") &&
            get(MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic") && get(Matmul, "cublasLtMatmul") &&
            Create(&handle) == 0;
  }
};

constexpr int kCandidates = 8, kTimed = 3;

struct Plan {
  Handle desc = nullptr, x = nullptr, w = nullptr, y = nullptr;
  Heuristic found[kCandidates];  // best guess first
  int count = 0, chosen = 0, uses = 0;
};

int multiply(const Library& lt, const LinearArguments& p, const Plan& plan, int candidate, cudaStream_t stream) {
  const float one = 1, zero = 0;
  return lt.Matmul(lt.handle, plan.desc, &one, p.w, plan.w, p.x, plan.x, &zero, p.y, plan.y, p.y, plan.y,
                   &plan.found[candidate].algorithm, nullptr, 0, stream);
}

// The candidate that takes the least time for these operands.
int fastest(const Library& lt, const LinearArguments& p, const Plan& plan, cudaStream_t stream) {
  cudaEvent_t begin, end;
  if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess) return plan.chosen;
  int best = plan.chosen;
  float least = INFINITY;
  for (int i = 0; i < plan.count; i++) {
    float ms = INFINITY;
    int error = multiply(lt, p, plan, i, stream);
    cudaEventRecord(begin, stream);
    for (int run = 0; run < kTimed && error == 0; run++) error = multiply(lt, p, plan, i, stream);
    cudaEventRecord(end, stream);
    if (error == 0 && cudaEventSynchronize(end) == cudaSuccess &&
        cudaEventElapsedTime(&ms, begin, end) == cudaSuccess && ms < least)
      best = i, least = ms;
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return best;
}

}  // namespace

const char* gemm(const LinearArguments& p, bool bf16, cudaStream_t stream) {
  static Library lt;
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, int, int, bool>, Plan>
      plans;  // kept for the life of the process: a few hundred bytes each
  if (!lt.ready) return "Linear: cublasLt could not be loaded";
  std::lock_guard<std::mutex> lock(mutex);
  int epilogue = (p.bias != nullptr ? kBias : 0) | (p.activation == Activation::kGeluTanh ? kGelu : 0);
  if (epilogue == 0) epilogue = kDefault;
  int device = 0;
  cudaGetDevice(&device);
  auto [at, fresh] = plans.try_emplace({device, p.m, p.n, p.k, epilogue, bf16});
  Plan& plan = at->second;
  const int type = bf16 ? kReal16BF : kReal16F;
  if (fresh) {
    // Row-major Y = X W^T is column-major Y^T = W^T' X^T, and the bias runs along the rows of Y^T.
    const size_t none = 0;
    Handle preference = nullptr;
    int error = lt.MatmulDescCreate(&plan.desc, kCompute32F, kReal32F);
    auto set = [&](int attribute, const void* value, size_t size) {
      if (error == 0) error = lt.MatmulDescSetAttribute(plan.desc, attribute, value, size);
    };
    set(kDescTransA, &kTranspose, sizeof(int));
    set(kDescEpilogue, &epilogue, sizeof epilogue);
    if (p.bias != nullptr) set(kDescBias, &p.bias, sizeof p.bias), set(kDescBiasType, &type, sizeof type);
    if (error == 0) error = lt.MatrixLayoutCreate(&plan.w, type, p.k, p.n, p.k);
    if (error == 0) error = lt.MatrixLayoutCreate(&plan.x, type, p.k, p.m, p.k);
    if (error == 0) error = lt.MatrixLayoutCreate(&plan.y, type, p.n, p.m, p.n);
    if (error == 0) error = lt.MatmulPreferenceCreate(&preference);
    if (error == 0) error = lt.MatmulPreferenceSetAttribute(preference, kMaxWorkspace, &none, sizeof none);
    if (error == 0)
      error = lt.MatmulAlgoGetHeuristic(lt.handle, plan.desc, plan.w, plan.x, plan.y, plan.y, preference, kCandidates,
                                        plan.found, &plan.count);
    if (error != 0 || plan.count == 0) {
      plans.erase(at);
      return "Linear: cublasLt has no algorithm for this shape";
    }
  }
  if (p.bias != nullptr && lt.MatmulDescSetAttribute(plan.desc, kDescBias, &p.bias, sizeof p.bias) != 0)
    return "Linear: cublasLt does not take the bias";
  // A shape that comes again is worth a look at the other candidates; not while a graph is captured, which forbids
  // waiting.
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusActive;
  const bool free =
      cudaStreamIsCapturing(stream, &capturing) == cudaSuccess && capturing == cudaStreamCaptureStatusNone;
  if (free && ++plan.uses == 2) plan.chosen = fastest(lt, p, plan, stream);
  return multiply(lt, p, plan, plan.chosen, stream) == 0 ? nullptr : "Linear: cublasLt failed";
}
