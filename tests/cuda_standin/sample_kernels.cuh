/* sample_kernels.cuh - a kernel source as a program would write it: compiled by nvcc and, against the stand-in, by any C++17 compiler. */
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cublas_v2.h>
#include <stdint.h>

#ifdef CUDA_STANDIN
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    STANDIN_LAUNCH(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define SHARED(type, name) STANDIN_SHARED(type, name)
#define SHARED_ARRAY(type, name, count) STANDIN_SHARED_ARRAY(type, name, count)
#else
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SHARED(type, name)                                         \
    extern __shared__ __align__(16) unsigned char sample_shared[]; \
    type *const name = reinterpret_cast<type *>(sample_shared)
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#endif

/* out[b] = sum of the block's share of in (n), by a tree in shared memory of blockDim.x floats */
static __global__ void block_sum_kernel(float *out, const float *in, int n) {
    SHARED(float, part);
    int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    part[threadIdx.x] = i < n ? __ldg(&in[i]) : 0.0f;
    __syncthreads();
    for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

/* y[r] = rsqrt(mean of squares of row r of x (rows, cols)) in bf16; one warp per row, WARPS rows per block */
template <typename T, int WARPS>
static __global__ void __launch_bounds__(32 * WARPS) row_scale_kernel(__nv_bfloat16 *y, const T *x, int rows, int cols) {
    SHARED_ARRAY(float, kept, WARPS);
    int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(blockIdx.x) * WARPS + warp;
    float sum = 0.0f;
    if (row < rows)
        for (int c = lane; c < cols; c += 32) sum += x[row * cols + c] * x[row * cols + c];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) kept[warp] = rsqrtf(sum / static_cast<float>(cols));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < WARPS && static_cast<int>(blockIdx.x) * WARPS + static_cast<int>(threadIdx.x) < rows)
        y[blockIdx.x * WARPS + threadIdx.x] = __float2bfloat16_rn(kept[threadIdx.x]);
}

/* counts[v] += 1 for each of values (n): warps aggregate equal values first; a plain static __shared__ table */
static __global__ void count_kernel(unsigned *counts, const int *values, int n) {
    __shared__ unsigned table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = 0;
    __syncthreads();
    int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), v = i < n ? values[i] : -1;
    unsigned same = __match_any_sync(0xffffffffu, v);
    if (v >= 0 && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % 32)) atomicAdd(&table[v], static_cast<unsigned>(__popc(same)));
    __syncthreads();
    if (threadIdx.x < 16 && table[threadIdx.x]) atomicAdd(&counts[threadIdx.x], table[threadIdx.x]);
}

/* out[0] = sum of in (n) by the last block to finish, in the order of the blocks; done[0] starts at 0 */
static __global__ void last_block_kernel(unsigned *out, unsigned *partial, unsigned *done, const unsigned *in, int n) {
    SHARED_ARRAY(bool, last, 1);
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x, sum = __reduce_add_sync(0xffffffffu, i < static_cast<unsigned>(n) ? in[i] : 0u);
    if (threadIdx.x == 0) {                       /* blocks of one warp */
        partial[blockIdx.x] = sum;
        __threadfence();
        last[0] = atomicAdd(done, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (last[0] && threadIdx.x == 0) {
        unsigned total = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
        out[0] = total;
    }
}

static inline cudaError_t sample_run(float *out, __nv_bfloat16 *scale, unsigned *counts, unsigned *work, const float *in, const int *values,
                                     int n, cudaStream_t stream) {
    dim3 grid(static_cast<unsigned>(n + 127) / 128);
    LAUNCH(block_sum_kernel, grid, 128, 128 * sizeof(float), stream, out, in, n);
    LAUNCH((row_scale_kernel<float, 4>), (n / 10 + 3) / 4, 128, 0, stream, scale, in, n / 10, 10);
    LAUNCH(count_kernel, grid, 128, 0, stream, counts, values, n);
    LAUNCH(last_block_kernel, (n + 31) / 32, 32, 0, stream, work, work + 2, work + 1, reinterpret_cast<const unsigned *>(values), n);
    return cudaGetLastError();
}
