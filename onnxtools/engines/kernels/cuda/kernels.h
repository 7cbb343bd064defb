// Launchers of the kernels; each is described in the file of its name. One device a process: limits are set on the one
// that is current first.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

enum class Activation { kNone, kGeluTanh };

struct LinearArguments {
  const void *x, *w, *bias;  // [m, k], [n, k], [n] or null
  void* y;                   // [m, n]
  int m, n, k;
  Activation activation;
};

// Null, or what went wrong.
const char* gemm(const LinearArguments& p, bool bf16, cudaStream_t stream);

bool takes_linear(int m, int n, int k);
cudaError_t linear(const LinearArguments& p, bool bf16, int processors, cudaStream_t stream);

struct NormArguments {
  const void *x, *skip;              // [rows, width], [skip_rows, width] over and over; skip may be null
  const void *scale, *shift, *bias;  // [width]; shift and bias may be null
  void *y, *sum;                     // [rows, width]; sum = x + skip + bias, may be null
  int rows, skip_rows, width;
  float epsilon;
};

bool takes_norm(int width);
cudaError_t norm(const NormArguments& p, bool rms, bool bf16, cudaStream_t stream);

struct AttentionArguments {
  const void* qkv;    // [batch, tokens, (heads + 2 kv_heads) head_size]
  void *key, *value;  // the caches, [batch, kv_heads, slots, head_size]; the tokens' own are written at their positions
  const int* positions;   // [batch], of a decode step's one token; a prefill's begin at 0
  const void *cos, *sin;  // [positions, head_size / 2] or null
  void* y;                // [batch, tokens, heads, head_size]
  int batch, tokens, heads, kv_heads, head_size, slots;
  float scale;
  bool interleaved;
};

bool takes_decode(int heads, int kv_heads, int head_size);
cudaError_t decode_attention(const AttentionArguments& p, bool bf16, cudaStream_t stream);

bool takes_prefill(int batch, int heads, int kv_heads, int head_size, int tokens);
cudaError_t prefill_attention(const AttentionArguments& p, bool bf16, cudaStream_t stream);

struct LastTokenArguments {
  const void* x;        // [rows, tokens, pieces of 16 bytes]
  const int64_t* mask;  // [rows, total]: of the last `tokens` columns, 1 on those that are no padding, which come first
  void* y;              // [rows, pieces of 16 bytes]; the first where there is no token
  int rows, tokens, total, pieces;
};

cudaError_t last_token(const LastTokenArguments& p, cudaStream_t stream);

struct NextTokenArguments {
  const float* logits;         // [rows, tokens, vocabulary]
  const int64_t *mask, *past;  // [rows, slots]: 1 on a row's first tokens; [rows, past_slots]: tokens found before
  int64_t *next, *next_mask,
      *found;  // [rows, tokens], -1 where a logit is NaN or the best infinite; [rows, slots] each
  int rows, tokens, vocabulary, slots, past_slots;
};

cudaError_t next_token(const NextTokenArguments& p, cudaStream_t stream);
