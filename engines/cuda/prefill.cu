// Causal attention of whole prompts, packed [batch, tokens, (heads + 2 kv_heads) head_size]: keys and values go to the caches, rotated where
// there are angles, and each query attends to those before it.
//
// The attention is FlashAttention-2 (Dao, 2023) with mma.m16n8k16: a block serves 64 queries of one head, 16 a warp, and walks over the keys in
// tiles of 64, which the copy engine of each thread (cp.async) fetches one tile ahead.
#include "kernels.h"
#include "launch.h"

namespace {

constexpr int kTile = 64, kThreads = 128;

// Elements 8 i .. 8 i + 7 of both halves of a head, rotated by the angles of `position` (Su et al., 2021).
template <typename T, int D>
__device__ void rotated(const T* head, int i, const T* cos, const T* sin, bool interleaved, T (&low)[8], T (&high)[8]) {
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

template <typename T, int D>
__global__ __launch_bounds__(kThreads) void append_kernel(AttentionArguments p) {
  wait_for_inputs();
  constexpr int kPairs = D / 16;  // threads a head
  const int token = blockIdx.x, row = token / p.tokens, position = token % p.tokens;
  const T* qkv = static_cast<const T*>(p.qkv) + size_t(token) * (p.heads + 2 * p.kv_heads) * D + p.heads * D;
  const size_t angles = size_t(position) * (D / 2);
  for (int at = threadIdx.x; at < 2 * p.kv_heads * kPairs; at += kThreads) {
    const int head = at / kPairs, i = at % kPairs;
    const bool key = head < p.kv_heads;
    const T* cos = key && p.cos != nullptr ? static_cast<const T*>(p.cos) + angles : nullptr;
    T low[8], high[8];
    rotated<T, D>(qkv + head * D, i, cos, static_cast<const T*>(p.sin) + angles, p.interleaved, low, high);
    T* to = static_cast<T*>(key ? p.key : p.value) + ((size_t(row) * p.kv_heads + head % p.kv_heads) * p.slots + position) * D;
    *reinterpret_cast<uint4*>(to + 8 * i) = *reinterpret_cast<uint4*>(low);
    *reinterpret_cast<uint4*>(to + D / 2 + 8 * i) = *reinterpret_cast<uint4*>(high);
  }
}

// A tile [64][D] in shared memory: the 16 byte pieces of a row are permuted by its number, so that 8 rows' pieces meet in no bank.
template <typename T, int D>
__device__ __forceinline__ T* piece(T* tile, int row, int i) { return tile + row * D + 8 * (i ^ (row & 7)); }

__device__ __forceinline__ void matrices(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(unsigned(__cvta_generic_to_shared(from))));
}

__device__ __forceinline__ void matrices_turned(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(unsigned(__cvta_generic_to_shared(from))));
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads) void prefill_kernel(AttentionArguments p) {
  constexpr int kPieces = D / 8, kSteps = D / 16;
  extern __shared__ uint4 shared[];
  T* tiles = reinterpret_cast<T*>(shared);  // keys, values; keys, values
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int last = gridDim.x - 1 - blockIdx.x, first = last * kTile;  // the longest rows of keys begin first
  const int row = blockIdx.y / p.heads, head = blockIdx.y % p.heads, kv = head / (p.heads / p.kv_heads);
  const T* keys = static_cast<const T*>(p.key) + (size_t(row) * p.kv_heads + kv) * p.slots * D;
  const T* values = static_cast<const T*>(p.value) + (size_t(row) * p.kv_heads + kv) * p.slots * D;
  wait_for_inputs();

  auto fetch = [&](int tile) {
    T* to = tiles + (tile % 2) * 2 * kTile * D;
    for (int at = threadIdx.x; at < kTile * kPieces; at += kThreads) {
      const int r = at / kPieces, i = at % kPieces;
      const size_t from = size_t(min(tile * kTile + r, p.tokens - 1)) * D + 8 * i;
      copy_async(piece<T, D>(to, r, i), keys + from);
      copy_async(piece<T, D>(to + kTile * D, r, i), values + from);
    }
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);

  // Queries pass through the second pair of tiles once.
  unsigned q[kSteps][4];
  T* staged = tiles + 2 * kTile * D;
  for (int at = threadIdx.x; at < kTile * kPieces / 2; at += kThreads) {
    const int r = at / (kPieces / 2), i = at % (kPieces / 2), position = min(first + r, p.tokens - 1);
    const T* query = static_cast<const T*>(p.qkv) + (size_t(row) * p.tokens + position) * (p.heads + 2 * p.kv_heads) * D + head * D;
    const size_t angles = size_t(position) * (D / 2);
    T low[8], high[8];
    rotated<T, D>(query, i, p.cos == nullptr ? nullptr : static_cast<const T*>(p.cos) + angles, static_cast<const T*>(p.sin) + angles, p.interleaved, low, high);
    *reinterpret_cast<uint4*>(piece<T, D>(staged, r, i)) = *reinterpret_cast<uint4*>(low);
    *reinterpret_cast<uint4*>(piece<T, D>(staged, r, i + kPieces / 2)) = *reinterpret_cast<uint4*>(high);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSteps; s++) matrices(q[s], piece<T, D>(staged, 16 * warp + lane % 16, 2 * s + lane / 16));
  __syncthreads();

  const float scale = p.scale * 1.4426950408889634f;  // exp2 below
  float out[2 * kSteps][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
  for (int tile = 0; tile <= last; tile++) {
    if (tile < last) fetch(tile + 1);
    if (tile < last) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    T *k = tiles + (tile % 2) * 2 * kTile * D, *v = k + kTile * D;
    float score[kTile / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; s++)
#pragma unroll
      for (int n = 0; n < kTile / 16; n++) {
        unsigned b[4];
        matrices(b, piece<T, D>(k, 16 * n + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
        mma(score[2 * n], q[s][0], q[s][1], q[s][2], q[s][3], b[0], b[1], T());
        mma(score[2 * n + 1], q[s][0], q[s][1], q[s][2], q[s][3], b[2], b[3], T());
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int query = first + 16 * warp + g + 8 * h;
      float above = top[h];
#pragma unroll
      for (int n = 0; n < kTile / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& value = score[n][2 * h + c];
          value = tile * kTile + 8 * n + 2 * t + c <= query ? value * scale : -INFINITY;
          above = fmaxf(above, value);
        }
      for (int mask = 1; mask <= 2; mask *= 2) above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, mask));
      const float shrink = exp2f(top[h] - above);
      top[h] = above, sum[h] *= shrink;
#pragma unroll
      for (int n = 0; n < 2 * kSteps; n++) out[n][2 * h] *= shrink, out[n][2 * h + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < kTile / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) sum[h] += score[n][2 * h + c] = exp2f(score[n][2 * h + c] - above);
    }
#pragma unroll
    for (int n = 0; n < kTile / 16; n++) {
      const unsigned a[4] = {packed<T>(score[2 * n][0], score[2 * n][1]), packed<T>(score[2 * n][2], score[2 * n][3]), packed<T>(score[2 * n + 1][0], score[2 * n + 1][1]),
                             packed<T>(score[2 * n + 1][2], score[2 * n + 1][3])};
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        unsigned b[4];
        matrices_turned(b, piece<T, D>(v, 16 * n + lane % 16, 2 * s + lane / 16));
        mma(out[2 * s], a[0], a[1], a[2], a[3], b[0], b[1], T());
        mma(out[2 * s + 1], a[0], a[1], a[2], a[3], b[2], b[3], T());
      }
    }
    __syncthreads();  // before the next tile but one is fetched over this one
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    for (int mask = 1; mask <= 2; mask *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], mask);
    const int query = first + 16 * warp + g + 8 * h;
    if (query >= p.tokens) continue;
    T* y = static_cast<T*>(p.y) + ((size_t(row) * p.tokens + query) * p.heads + head) * D;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n++) *reinterpret_cast<unsigned*>(y + 8 * n + 2 * t) = packed<T>(out[n][2 * h] / sum[h], out[n][2 * h + 1] / sum[h]);
  }
}

template <typename T, int D>
cudaError_t launch(const AttentionArguments& p, cudaStream_t stream) {
  constexpr int kShared = 4 * kTile * D * sizeof(T);
  static const cudaError_t ready = cudaFuncSetAttribute(prefill_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (ready != cudaSuccess) return ready;
  if (cudaError_t error = Launch(dim3(p.batch * p.tokens), dim3(kThreads), 0, stream).run(append_kernel<T, D>, p); error != cudaSuccess) return error;
  return Launch(dim3((p.tokens + kTile - 1) / kTile, p.batch * p.heads), dim3(kThreads), kShared, stream).run(prefill_kernel<T, D>, p);
}

}  // namespace

bool takes_prefill(int batch, int heads, int kv_heads, int head_size, int tokens) {
  // Beyond, the attention itself is what counts, and cuDNN's, made for the chip's own matrix instructions, is faster than ours.
  return (head_size == 64 || head_size == 128) && heads % kv_heads == 0 && tokens <= 512 && batch * heads <= 65535;
}

cudaError_t prefill_attention(const AttentionArguments& p, bool bf16, cudaStream_t stream) {
  if (bf16) return p.head_size == 64 ? launch<__nv_bfloat16, 64>(p, stream) : launch<__nv_bfloat16, 128>(p, stream);
  return p.head_size == 64 ? launch<half, 64>(p, stream) : launch<half, 128>(p, stream);
}
