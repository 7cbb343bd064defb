// Causal attention of whole prompts, packed [batch, tokens, (heads + 2 kv_heads) head_size]: each query attends to the
// keys up to its own, and the keys, rotated where there are angles, and values go to the caches.
//
// FlashAttention-2 (Dao, 2023) with mma.m16n8k16: a block serves 64 queries of one head, 16 a warp, and walks over the
// keys in tiles of 64, which are fetched (cp.async) kStages - 1 tiles ahead. Keys that need no rotation are taken as
// they are, and the block that meets all of a KV head stores them in the caches as they pass; others are rotated and
// stored once, by a kernel before.
#include "kernels.h"
#include "launch.h"

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kQueries = 16 * kWarps, kTile = 64, kStages = 2;

// A tile [rows][D] in shared memory: the 16 byte pieces of a row are permuted by its number, so that 8 rows' pieces
// meet in no bank.
template <typename T, int D>
__device__ __forceinline__ T* piece(T* tile, int row, int i) {
  return tile + row * D + 8 * (i ^ (row & 7));
}

template <typename T, int D>
__device__ __forceinline__ uint4& whole(T* tile, int row, int i) {
  return *reinterpret_cast<uint4*>(piece<T, D>(tile, row, i));
}

__device__ __forceinline__ void matrices(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(from))));
}

__device__ __forceinline__ void matrices_turned(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(from))));
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads) void append_kernel(AttentionArguments p) {
  wait_for_inputs();
  constexpr int kPairs = D / 16;  // threads a head
  const int token = blockIdx.x, row = token / p.tokens, position = token % p.tokens;
  const T* qkv = static_cast<const T*>(p.qkv) + (size_t(token) * (p.heads + 2 * p.kv_heads) + p.heads) * D;
  const size_t angles = size_t(position) * (D / 2);
  for (int at = threadIdx.x; at < 2 * p.kv_heads * kPairs; at += kThreads) {
    const int head = at / kPairs, i = at % kPairs;
    const bool key = head < p.kv_heads;
    T low[8], high[8];
    rotated<T, D>(qkv + head * D, i, key ? static_cast<const T*>(p.cos) + angles : nullptr,
                  static_cast<const T*>(p.sin) + angles, p.interleaved, low, high);
    T* to = static_cast<T*>(key ? p.key : p.value) +
            ((size_t(row) * p.kv_heads + head % p.kv_heads) * p.slots + position) * D;
    put<T, D>(to, i, low, high);
  }
}

template <typename T, int D>
__global__ __launch_bounds__(kThreads, 2) void prefill_kernel(AttentionArguments p) {
  constexpr int kPieces = D / 8, kSteps = D / 16;
  extern __shared__ uint4 shared[];
  T* queries = reinterpret_cast<T*>(shared);  // at the end the outputs
  T* ring = queries + kQueries * D;           // of stages: keys, values
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (gridDim.x - 1 - blockIdx.x) * kQueries,
            tiles = (min(first + kQueries, p.tokens) + kTile - 1) / kTile;  // the longest rows of keys begin first
  const int row = blockIdx.y / p.heads, head = blockIdx.y % p.heads, group = p.heads / p.kv_heads, kv = head / group;
  const size_t width = size_t(p.heads + 2 * p.kv_heads) * D;
  const T* qkv = static_cast<const T*>(p.qkv) + size_t(row) * p.tokens * width;
  T* key_cache = static_cast<T*>(p.key) + (size_t(row) * p.kv_heads + kv) * p.slots * D;
  T* value_cache = static_cast<T*>(p.value) + (size_t(row) * p.kv_heads + kv) * p.slots * D;
  const bool stored = p.cos != nullptr, stores = !stored && blockIdx.x == 0 && head % group == 0;
  const T *keys = stored ? key_cache : qkv + (p.heads + kv) * D,
          *values = stored ? value_cache : qkv + (p.heads + p.kv_heads + kv) * D;
  const size_t pitch = stored ? D : width;
  wait_for_inputs();

  auto stage = [&](int tile) { return ring + tile % kStages * 2 * kTile * D; };
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      for (int at = threadIdx.x; at < kTile * kPieces; at += kThreads) {
        const int r = at / kPieces, i = at % kPieces;
        const size_t from = min(tile * kTile + r, p.tokens - 1) * pitch + 8 * i;
        copy_async(piece<T, D>(stage(tile), r, i), keys + from);
        copy_async(piece<T, D>(stage(tile) + kTile * D, r, i), values + from);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int at = threadIdx.x; at < kQueries * kPieces / 2; at += kThreads) {
    const int r = at / (kPieces / 2), i = at % (kPieces / 2), position = min(first + r, p.tokens - 1);
    const T* query = qkv + position * width + head * D;
    if (stored) {
      const size_t angles = size_t(position) * (D / 2);
      T low[8], high[8];
      rotated<T, D>(query, i, static_cast<const T*>(p.cos) + angles, static_cast<const T*>(p.sin) + angles,
                    p.interleaved, low, high);
      whole<T, D>(queries, r, i) = *reinterpret_cast<uint4*>(low),
                              whole<T, D>(queries, r, i + kPieces / 2) = *reinterpret_cast<uint4*>(high);
    } else {
      copy_async(piece<T, D>(queries, r, i), query + 8 * i),
          copy_async(piece<T, D>(queries, r, i + kPieces / 2), query + D / 2 + 8 * i);
    }
  }
  for (int tile = 0; tile < kStages - 1; tile++) fetch(tile);

  const float scale = p.scale * kLog2E;
  const int query0 = first + 16 * warp;
  unsigned q[kSteps][4];
  float out[2 * kSteps][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
  for (int tile = 0; tile < tiles; tile++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // this tile is there, and the one before is done with
    fetch(tile + kStages - 1);
    if (tile == 0)
#pragma unroll
      for (int s = 0; s < kSteps; s++) matrices(q[s], piece<T, D>(queries, 16 * warp + lane % 16, 2 * s + lane / 16));
    T *k = stage(tile), *v = k + kTile * D;
    if (stores)
      for (int at = threadIdx.x; at < kTile * kPieces; at += kThreads) {
        const int r = at / kPieces, i = at % kPieces, position = tile * kTile + r;
        if (position >= p.tokens) break;
        reinterpret_cast<uint4*>(key_cache + size_t(position) * D)[i] = whole<T, D>(k, r, i);
        reinterpret_cast<uint4*>(value_cache + size_t(position) * D)[i] = whole<T, D>(v, r, i);
      }
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
      const int query = query0 + g + 8 * h;
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
      const unsigned a[4] = {packed<T>(score[2 * n][0], score[2 * n][1]), packed<T>(score[2 * n][2], score[2 * n][3]),
                             packed<T>(score[2 * n + 1][0], score[2 * n + 1][1]),
                             packed<T>(score[2 * n + 1][2], score[2 * n + 1][3])};
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        unsigned b[4];
        matrices_turned(b, piece<T, D>(v, 16 * n + lane % 16, 2 * s + lane / 16));
        mma(out[2 * s], a[0], a[1], a[2], a[3], b[0], b[1], T());
        mma(out[2 * s + 1], a[0], a[1], a[2], a[3], b[2], b[3], T());
      }
    }
  }
  // A warp's outputs take the place of its queries, to leave in whole pieces.
#pragma unroll
  for (int h = 0; h < 2; h++) {
    for (int mask = 1; mask <= 2; mask *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], mask);
    const float share = 1 / sum[h];
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n++)
      *reinterpret_cast<unsigned*>(piece<T, D>(queries, 16 * warp + g + 8 * h, n) + 2 * t) =
          packed<T>(out[n][2 * h] * share, out[n][2 * h + 1] * share);
  }
  __syncwarp();
  for (int at = lane; at < 16 * kPieces; at += 32) {
    const int r = at / kPieces, i = at % kPieces;
    if (query0 + r < p.tokens)
      reinterpret_cast<uint4*>(static_cast<T*>(p.y) + ((size_t(row) * p.tokens + query0 + r) * p.heads + head) * D)[i] =
          whole<T, D>(queries, 16 * warp + r, i);
  }
}

template <typename T, int D>
cudaError_t launch(const AttentionArguments& p, cudaStream_t stream) {
  constexpr int kShared = (kQueries + 2 * kStages * kTile) * D * sizeof(T);
  static const cudaError_t ready =
      cudaFuncSetAttribute(prefill_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (ready != cudaSuccess) return ready;
  if (p.cos != nullptr)
    if (cudaError_t error = Launch(dim3(p.batch * p.tokens), dim3(kThreads), 0, stream).run(append_kernel<T, D>, p);
        error != cudaSuccess)
      return error;
  return Launch(dim3((p.tokens + kQueries - 1) / kQueries, p.batch * p.heads), dim3(kThreads), kShared, stream)
      .run(prefill_kernel<T, D>, p);
}

}  // namespace

bool takes_prefill(int batch, int heads, int kv_heads, int head_size, int tokens) {
  // Beyond, the attention itself is what counts, and cuDNN's, made for the chip's own matrix instructions, is faster
  // than ours.
  return (head_size == 64 || head_size == 128) && heads % kv_heads == 0 && tokens <= 512 && batch * heads <= 65535;
}

cudaError_t prefill_attention(const AttentionArguments& p, bool bf16, cudaStream_t stream) {
  if (bf16) return p.head_size == 64 ? launch<__nv_bfloat16, 64>(p, stream) : launch<__nv_bfloat16, 128>(p, stream);
  return p.head_size == 64 ? launch<half, 64>(p, stream) : launch<half, 128>(p, stream);
}
