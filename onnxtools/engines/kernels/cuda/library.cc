// The operators of the domain `onnxtools` for ONNX Runtime's CUDA provider: kernels of ours for a decode step, and
// cublasLt or ONNX Runtime's own operator for everything else, so that a graph with them is right for any input whose
// caches have slots for all tokens.
//
// Linear(X, W, bias?) -> Y: act(X W^T + bias). X [tokens, K], W [N, K], bias [1, N]; attribute activation: NONE or GELU
// (tanh form). GroupQueryAttention: the inputs of com.microsoft.GroupQueryAttention that a packed query needs; its
// attributes. SkipLayerNormalization, SkipSimplifiedLayerNormalization: those of com.microsoft, and of their outputs
// the first and the sum. Without skip: a norm. LastToken(X [batch, tokens, width], mask [batch, total]) -> [batch, 1,
// width]: the row at max(ones in the mask's last `tokens` columns - 1, 0). NextToken(logits fp32, mask, past_tokens) ->
// next, next_mask, tokens: see next_token.cu.
#include "kernels.h"
#include "ort_abi.h"

#include <string>
#include <vector>

namespace {

const OrtApi* ort;

#define TRY(...) \
  if (OrtStatus* status_ = (__VA_ARGS__)) return status_
#define TRY_CUDA(...)                                            \
  if (cudaError_t error_ = (__VA_ARGS__); error_ != cudaSuccess) \
  return ort->CreateStatus(kFail, cudaGetErrorString(error_))

struct Tensor {
  OrtValue* value = nullptr;
  void* data = nullptr;
  std::vector<int64_t> dims;
};

OrtStatus* read(OrtValue* value, Tensor& to) {
  to.value = value;
  if (value == nullptr) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t rank = 0;
  TRY(ort->GetTensorMutableData(value, &to.data));
  TRY(ort->GetTensorTypeAndShape(value, &info));
  OrtStatus* status = ort->GetDimensionsCount(info, &rank);
  to.dims.resize(rank);
  if (status == nullptr) status = ort->GetDimensions(info, to.dims.data(), rank);
  ort->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* input(OrtKernelContext* context, size_t index, Tensor& to) {
  const OrtValue* value = nullptr;
  size_t count = 0;
  TRY(ort->KernelContext_GetInputCount(context, &count));
  if (index < count) TRY(ort->KernelContext_GetInput(context, index, &value));
  return read(const_cast<OrtValue*>(value), to);
}

OrtStatus* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims, Tensor& to) {
  OrtValue* value = nullptr;
  TRY(ort->KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  return read(value, to);
}

// An operator of ONNX Runtime, made with a kernel and run in its place.
class Fallback {
 public:
  ~Fallback() {
    if (op_ != nullptr) ort->ReleaseOp(op_);
  }
  Fallback& add(const char* name, int64_t value) { return add(name, &value, 1, kInt); }
  Fallback& add(const char* name, float value) { return add(name, &value, 1, kFloat); }
  Fallback& add(const char* name, const std::string& value) {
    return add(name, value.data(), int(value.size()), kString);
  }

  OrtStatus* make(const OrtKernelInfo* info, const char* name, const char* type_name, int type, int inputs,
                  int outputs) {
    inputs_ = inputs, outputs_ = outputs;
    OrtStatus* status = failed_;
    if (status == nullptr)
      status = ort->CreateOp(info, name, "com.microsoft", 1, &type_name, &type, 1, attributes_.data(),
                             int(attributes_.size()), inputs, outputs, &op_);
    for (OrtOpAttr* attribute : attributes_) ort->ReleaseOpAttr(attribute);
    attributes_.clear();
    return status;
  }

  OrtStatus* run(OrtKernelContext* context, const std::vector<const OrtValue*>& inputs,
                 const std::vector<OrtValue*>& outputs) const {
    return ort->InvokeOp(context, op_, inputs.data(), inputs_, outputs.data(), outputs_);
  }

 private:
  Fallback& add(const char* name, const void* value, int length, OrtOpAttrType type) {
    OrtOpAttr* attribute = nullptr;
    if (failed_ == nullptr) failed_ = ort->CreateOpAttr(name, value, length, type, &attribute);
    if (attribute != nullptr) attributes_.push_back(attribute);
    return *this;
  }

  std::vector<OrtOpAttr*> attributes_;
  OrtStatus* failed_ = nullptr;
  OrtOp* op_ = nullptr;
  int inputs_ = 0, outputs_ = 0;
};

OrtStatus* processors(int& count) {
  int device = 0;
  TRY_CUDA(cudaGetDevice(&device));
  TRY_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return nullptr;
}

OrtStatus* stream_of(OrtKernelContext* context, cudaStream_t& to) {
  void* stream = nullptr;
  OrtStatus* status = ort->KernelContext_GetGPUComputeStream(context, &stream);
  to = static_cast<cudaStream_t>(stream);
  return status;
}

// What holds for an operator that does not say otherwise.
struct Operator {
  static bool optional(size_t) { return false; }  // of its inputs
  static bool on_host(size_t) { return false; }
  OrtStatus* make(const OrtKernelInfo*) { return nullptr; }
};

template <int kType>
struct Linear : Operator {
  static constexpr const char* kName = "Linear";
  static constexpr int kInputs = 3, kOutputs = 1, kNeeded = 1;
  static int type(size_t) { return kType; }
  static int output_type(size_t) { return kType; }
  static bool optional(size_t index) { return index == 2; }

  Activation activation = Activation::kNone;
  int count = 0;

  OrtStatus* make(const OrtKernelInfo* info) {
    char name[16];
    size_t size = sizeof name;
    TRY(ort->KernelInfoGetAttribute_string(info, "activation", name, &size));
    activation = std::string(name) == "GELU" ? Activation::kGeluTanh : Activation::kNone;
    return processors(count);
  }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor x, w, b, y;
    TRY(input(context, 0, x));
    TRY(input(context, 1, w));
    TRY(input(context, 2, b));
    if (x.dims.size() != 2 || w.dims.size() != 2 || x.dims[1] != w.dims[1])
      return ort->CreateStatus(kFail, "Linear: X [tokens, K] and W [N, K] do not fit");
    TRY(output(context, 0, {x.dims[0], w.dims[0]}, y));
    if (x.dims[0] == 0) return nullptr;
    cudaStream_t stream = nullptr;
    TRY(stream_of(context, stream));
    const LinearArguments given{x.data,         w.data,         b.data,         y.data,
                                int(x.dims[0]), int(w.dims[0]), int(w.dims[1]), activation};
    if (takes_linear(given.m, given.n, given.k)) {
      TRY_CUDA(linear(given, kType == kBFloat16, count, stream));
    } else if (const char* error = gemm(given, kType == kBFloat16, stream)) {
      return ort->CreateStatus(kFail, error);
    }
    return nullptr;
  }
};

template <int kType>
struct GroupQueryAttention : Operator {
  static constexpr const char* kName = "GroupQueryAttention";
  enum { kQuery, kPastKey, kPastValue, kLengths, kTotal, kCos, kSin, kInputs };
  static constexpr int kOutputs = 3, kNeeded = 3;
  static int type(size_t index) { return index == kLengths || index == kTotal ? kInt32 : kType; }
  static int output_type(size_t) { return kType; }
  static bool optional(size_t index) { return index >= kCos; }
  static bool on_host(size_t index) { return index == kTotal; }

  int64_t heads = 0, kv_heads = 0, rotary = 0, interleaved = 0;
  float scale = 0;
  int count = 0;
  Fallback attention;

  OrtStatus* make(const OrtKernelInfo* info) {
    TRY(ort->KernelInfoGetAttribute_int64(info, "num_heads", &heads));
    TRY(ort->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads));
    TRY(ort->KernelInfoGetAttribute_int64(info, "do_rotary", &rotary));
    TRY(ort->KernelInfoGetAttribute_int64(info, "rotary_interleaved", &interleaved));
    TRY(ort->KernelInfoGetAttribute_float(info, "scale", &scale));
    TRY(processors(count));
    attention.add("num_heads", heads)
        .add("kv_num_heads", kv_heads)
        .add("do_rotary", rotary)
        .add("rotary_interleaved", interleaved)
        .add("scale", scale);
    return attention.make(info, "GroupQueryAttention", "T", kType, rotary ? 9 : 7, 3);
  }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor in[kInputs], out[kOutputs];
    for (int i = 0; i < (rotary ? kInputs : kCos); i++) TRY(input(context, i, in[i]));
    const auto& query = in[kQuery].dims;
    const auto& cache = in[kPastKey].dims;
    if (query.size() != 3 || cache.size() != 4)
      return ort->CreateStatus(kFail,
                               "GroupQueryAttention: the query must be [batch, sequence, width] and caches of rank 4");
    const int64_t batch = query[0], tokens = query[1], size = cache[3];
    int32_t total = 0;
    TRY(output(context, 0, {batch, tokens, heads * size}, out[0]));
    TRY(output(context, 1, cache, out[1]));
    TRY(output(context, 2, cache, out[2]));
    if (in[kTotal].data != nullptr) total = *static_cast<const int32_t*>(in[kTotal].data);
    if (total > cache[2]) return ort->CreateStatus(kFail, "GroupQueryAttention: more tokens than the cache has slots");
    const bool shared = out[1].data == in[kPastKey].data && out[2].data == in[kPastValue].data;
    const int h = int(heads), kv = int(kv_heads), d = int(size);
    // A step's block serves a row and KV head, and they must fill the GPU: with fewer, ONNX Runtime's kernels, which
    // split the keys, are faster.
    const bool whole =
        !rotary || (in[kCos].dims.size() == 2 && in[kCos].dims[1] == size / 2);  // not some of the channels alone
    const bool decodes = tokens == 1 && batch * kv_heads >= count && takes_decode(h, kv, d);
    const bool begins = tokens > 1 && tokens == total && takes_prefill(int(batch), h, kv, d, int(tokens));
    if (!shared || !whole || !(decodes || begins)) {
      const std::vector<const OrtValue*> given{
          in[kQuery].value,   nullptr,          nullptr,        in[kPastKey].value, in[kPastValue].value,
          in[kLengths].value, in[kTotal].value, in[kCos].value, in[kSin].value};
      return attention.run(context, given, {out[0].value, out[1].value, out[2].value});
    }
    cudaStream_t stream = nullptr;
    TRY(stream_of(context, stream));
    const AttentionArguments a{in[kQuery].data,
                               out[1].data,
                               out[2].data,
                               static_cast<const int*>(in[kLengths].data),
                               in[kCos].data,
                               in[kSin].data,
                               out[0].data,
                               int(batch),
                               int(tokens),
                               h,
                               kv,
                               d,
                               int(cache[2]),
                               scale,
                               interleaved != 0};
    TRY_CUDA((decodes ? decode_attention : prefill_attention)(a, kType == kBFloat16, stream));
    return nullptr;
  }
};

template <int kType, bool kRms>
struct SkipNorm : Operator {
  static constexpr const char* kName = kRms ? "SkipSimplifiedLayerNormalization" : "SkipLayerNormalization";
  enum {
    kX,
    kSkip,
    kScale,
    kShiftOrBias,
    kBias,
    kInputs = kRms ? kBias : kBias + 1
  };  // RMS normalization has no shift
  static constexpr int kOutputs = 2, kNeeded = 1;
  static int type(size_t) { return kType; }
  static int output_type(size_t) { return kType; }
  static bool optional(size_t index) { return index == kSkip || index >= kShiftOrBias; }

  float epsilon = 0;

  OrtStatus* make(const OrtKernelInfo* info) { return ort->KernelInfoGetAttribute_float(info, "epsilon", &epsilon); }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor in[kInputs], out[kOutputs];
    for (int i = 0; i < kInputs; i++) TRY(input(context, i, in[i]));
    for (int i = 0; i < kOutputs; i++) TRY(output(context, i, in[kX].dims, out[i]));
    const int width = int(in[kX].dims.back());
    int64_t rows = 1, skip_rows = 1;
    for (size_t i = 0; i + 1 < in[kX].dims.size(); i++) rows *= in[kX].dims[i];
    for (size_t i = 0; i + 1 < in[kSkip].dims.size(); i++) skip_rows *= in[kSkip].dims[i];
    const bool fits =
        in[kSkip].value == nullptr || (in[kSkip].dims.back() == width && skip_rows > 0 && rows % skip_rows == 0);
    if (!takes_norm(width) || !fits)
      return ort->CreateStatus(kFail,
                               "SkipLayerNormalization: a width our kernel does not take, or inputs that do not fit");
    if (rows == 0) return nullptr;
    cudaStream_t stream = nullptr;
    TRY(stream_of(context, stream));
    TRY_CUDA(norm({in[kX].data, in[kSkip].data, in[kScale].data, kRms ? nullptr : in[kShiftOrBias].data,
                   in[kInputs - 1].data, out[0].data, out[1].data, int(rows), int(skip_rows), width, epsilon},
                  kRms, kType == kBFloat16, stream));
    return nullptr;
  }
};

template <int kType>
struct LastToken : Operator {
  static constexpr const char* kName = "LastToken";
  enum { kX, kMask, kInputs };
  static constexpr int kOutputs = 1, kNeeded = 1;
  static int type(size_t index) { return index == kMask ? kInt64 : kType; }
  static int output_type(size_t) { return kType; }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor x, mask, y;
    TRY(input(context, kX, x));
    TRY(input(context, kMask, mask));
    if (x.dims.size() != 3 || mask.dims.size() != 2 || x.dims[0] != mask.dims[0] || x.dims[2] % 8)
      return ort->CreateStatus(kFail, "LastToken: rows and mask do not fit");
    TRY(output(context, 0, {x.dims[0], 1, x.dims[2]}, y));
    if (x.dims[0] == 0) return nullptr;
    cudaStream_t stream = nullptr;
    TRY(stream_of(context, stream));
    TRY_CUDA(last_token({x.data, static_cast<const int64_t*>(mask.data), y.data, int(x.dims[0]), int(x.dims[1]),
                         int(mask.dims[1]), int(x.dims[2] / 8)},
                        stream));
    return nullptr;
  }
};

struct NextToken : Operator {
  static constexpr const char* kName = "NextToken";
  enum { kLogits, kMask, kPast, kInputs };
  static constexpr int kOutputs = 3, kNeeded = 3;
  static int type(size_t index) { return index == kLogits ? kFloat32 : kInt64; }
  static int output_type(size_t) { return kInt64; }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor in[kInputs], out[kOutputs];
    for (int i = 0; i < kInputs; i++) TRY(input(context, i, in[i]));
    const auto &logits = in[kLogits].dims, &mask = in[kMask].dims, &past = in[kPast].dims;
    if (logits.size() != 3 || mask.size() != 2 || past.size() != 2 || mask[0] != logits[0] || past[0] != logits[0] ||
        (past[1] != 1 && past[1] < mask[1]))
      return ort->CreateStatus(kFail, "NextToken: logits, mask and tokens do not fit");
    TRY(output(context, 0, {logits[0], logits[1]}, out[0]));
    TRY(output(context, 1, mask, out[1]));
    TRY(output(context, 2, mask, out[2]));
    cudaStream_t stream = nullptr;
    TRY(stream_of(context, stream));
    auto tokens = [](const Tensor& t) { return static_cast<int64_t*>(t.data); };
    TRY_CUDA(next_token(
        {static_cast<const float*>(in[kLogits].data), tokens(in[kMask]), tokens(in[kPast]), tokens(out[0]),
         tokens(out[1]), tokens(out[2]), int(logits[0]), int(logits[1]), int(logits[2]), int(mask[1]), int(past[1])},
        stream));
    return nullptr;
  }
};

// The table of functions that ONNX Runtime knows an operator by.
template <typename Op>
struct Registered : OrtCustomOp {
  Registered() : OrtCustomOp{} {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Op::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
    GetInputType = [](const OrtCustomOp*, size_t index) { return Op::type(index); };
    GetInputTypeCount = [](const OrtCustomOp*) { return size_t(Op::kInputs); };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Op::output_type(index); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(Op::kOutputs); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) { return int(Op::optional(index)); };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) { return int(index >= Op::kNeeded); };
    GetInputMemoryType = [](const OrtCustomOp*, size_t index) {
      return Op::on_host(index) ? kMemoryCpuInput : kMemoryDefault;
    };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      auto* op = new Op();
      OrtStatus* status = op->make(info);
      if (status == nullptr) *kernel = op;
      else delete op;
      return status;
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Op*>(kernel)->compute(context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  }
};

template <typename Op>
const OrtCustomOp* registered() {
  static Registered<Op> op;
  return &op;
}

template <typename... Ops>
OrtStatus* add(OrtCustomOpDomain* domain) {
  OrtStatus* status = nullptr;
  for (const OrtCustomOp* op : {registered<Ops>()...})
    if (status == nullptr) status = ort->CustomOpDomain_Add(domain, op);
  return status;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  ort = base->GetApi(kApiVersion);
  if (ort == nullptr) return nullptr;  // older than 1.17: it says itself that it does not know the operators
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    TRY(ort->CreateCustomOpDomain("onnxtools", &domain));
    TRY(add<Linear<kFloat16>, Linear<kBFloat16>, GroupQueryAttention<kFloat16>, GroupQueryAttention<kBFloat16>,
            SkipNorm<kFloat16, false>, SkipNorm<kBFloat16, false>, SkipNorm<kFloat16, true>, SkipNorm<kBFloat16, true>,
            LastToken<kFloat16>, LastToken<kBFloat16>, NextToken>(domain));
  }
  return ort->AddCustomOpDomain(options, domain);
}
