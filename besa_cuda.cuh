/* besa_cuda.cuh - the CUDA backend of besa.h: every operation of `struct besa_backend` on the CUDA runtime and cuBLAS.
 * Version and licence are those of besa.h.
 *
 * Quick start: in one .cu file, compiled by nvcc and linked with -lcublas,
 *
 *   #define BESA_IMPLEMENTATION
 *   #define BESA_CUDA                           // besa.h includes this file after its own implementation
 *   #include "besa.h"
 *   ...
 *   besa_backend be;
 *   if (besa_cuda_backend(&be, NULL, &error) == BESA_OK) { besa_prune(..., &be, ...); be.destroy(&be); }
 *
 * A C program includes besa.h with neither macro and links that .cu file's object.
 *
 * Contents (search for the markers)
 *   >>cuda-calls         errors, launches, the context, workspace
 *   >>cuda-queues        memory, streams, events
 *   >>cuda-device        what kernels share: 16-byte accesses, sums in a fixed order, sort keys
 *   >>cuda-elementwise   convert, fill, power, squares, factors of scores, swiglu, geglu, residuals, rope
 *   >>cuda-norm          rmsnorm, column sums, loss, token likelihood
 *   >>cuda-products      linear layers, Gram matrix, logits
 *   >>cuda-attention     scores of a chunk of heads, causal softmax
 *   >>cuda-select        radix select, masks of a whole layer
 *   >>cuda-sparsity      scores, zeros, masks, bucketed gradient
 *   >>cuda-ranks         ranks of rows by radix sort
 *   >>cuda-rates         theta -> alpha, n and back; the exact count
 *   >>cuda-optimizer     Prodigy, AdamW, kept weights
 *   >>cuda-quantization  weights on a grid of levels
 *   >>cuda-sparsegpt     factor of the inverse Hessian, slabs
 *   >>cuda-refit         kept weights fitted anew: steps of conjugate gradients
 *   >>cuda-backend       the table, creation, the end
 *
 * Types    activations are bf16, products run on bf16 operands with float sums. With options.fp32, and on devices below
 *          sm_80, activations and products are float. Weights of another type are converted panel by panel.
 * Memory   operations allocate nothing: scratch, cuBLAS's too, is be->workspace. The context holds 256 bytes of device
 *          memory and 256 bytes of pinned memory.
 * Order    operations are enqueued on one stream per besa_queue and never wait. A Hessian that is not positive definite is
 *          found on the device: the next synchronize of the compute queue returns BESA_ERROR_NUMERIC.
 * Threads  one host thread at a time per backend. Operations make its device current (cudaSetDevice) and leave it so: several
 *          backends, of one or more devices, may be used in turn, or each by a thread of its own.
 * Bits     sums have a fixed order and there are no float atomics: the same calls give the same bytes on one device. */
#ifndef BESA_CUDA_CUH
#define BESA_CUDA_CUH

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* ============================================================================================
 * // >>cuda-calls            errors, launches, the context, workspace
 * ============================================================================================
 * Everything below uses this section. `be` is the backend in every function that calls one of these macros. */

#ifdef CUDA_STANDIN /* tests: kernels run on the CPU */
#define BESA__LAUNCH(kernel, grid, block, shared, stream, ...) \
    STANDIN_LAUNCH(kernel, grid, block, shared, stream, __VA_ARGS__)
#define BESA__SHARED(type, name) STANDIN_SHARED(type, name)
#define BESA__SHARED_ARRAY(type, name, count) STANDIN_SHARED_ARRAY(type, name, count)
#define BESA__UNROLL
#else
#define BESA__LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define BESA__SHARED(type, name)                                                                   \
    extern __shared__ __align__(16) unsigned char besa__shared_bytes[];                            \
    type *const name = reinterpret_cast<type *>(besa__shared_bytes)
#define BESA__SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define BESA__UNROLL _Pragma("unroll")
#endif

#define BESA__CUDA(call) BESA__TRY(besa__cuda_check(be, (call), #call))
#define BESA__CUBLAS(call)                                                                         \
    do {                                                                                           \
        BESA__CUDA_HERE();                                                                         \
        BESA__TRY(besa__cublas_check(be, (call), #call));                                          \
    } while (0)

/* The backend's device is current: before what goes to the current one. A caller may have two backends, or threads. */
#define BESA__CUDA_HERE() BESA__CUDA(cudaSetDevice(besa__cuda_of(be)->device))

/* Launch on the compute queue; no blocks, no launch. A kernel with a comma in its name goes in parentheses. */
#define BESA__RUN(kernel, blocks, threads, shared, ...)                                            \
    do {                                                                                           \
        if ((blocks) < 1) break;                                                                   \
        BESA__CUDA_HERE();                                                                         \
        BESA__LAUNCH(kernel, besa__cuda_grid(blocks), static_cast<unsigned>(threads), shared,      \
                     besa__cuda_of(be)->stream[BESA_QUEUE_COMPUTE], __VA_ARGS__);                  \
        BESA__TRY(besa__cuda_check(be, cudaGetLastError(), #kernel "<<<>>>"));                     \
    } while (0)

/* Run the statement with T as the element type that dtype names. */
#define BESA__BY_DTYPE(dtype, T, ...)                                                              \
    do {                                                                                           \
        if ((dtype) == BESA_F32) {                                                                 \
            typedef float T;                                                                       \
            __VA_ARGS__;                                                                           \
        } else if ((dtype) == BESA_BF16) {                                                         \
            typedef __nv_bfloat16 T;                                                               \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef __half T;                                                                      \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same for activations: float or bf16. */
#define BESA__BY_ACTIVATION(be, T, ...)                                                            \
    do {                                                                                           \
        if ((be)->activation_dtype == BESA_F32) {                                                  \
            typedef float T;                                                                       \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef __nv_bfloat16 T;                                                               \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same for weights as bits and for ranks: U has 32 bits or 16. */
#define BESA__BY_WIDTH(wide, U, ...)                                                               \
    do {                                                                                           \
        if (wide) {                                                                                \
            typedef uint32_t U;                                                                    \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef uint16_t U;                                                                    \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

typedef struct besa__cuda {
    int device, processors;            /* number of multiprocessors */
    size_t shared_limit;               /* most dynamic shared memory of a block, with opt-in */
    size_t blas_bytes;                 /* of cuBLAS's scratch, at the end of the workspace */
    int64_t panel;                     /* elements of W that are converted at a time (tests lower this and the next three) */
    int64_t queries;                   /* query rows of one item of attention's products, at least where memory allows */
    int64_t query_rows;                /* the same of all items of a product: what fills the device */
    size_t score_bytes;                /* scratch of attention; one head may take more */
    void *blas_workspace;              /* where cuBLAS has it now */
    cudaStream_t stream[BESA_QUEUE_COUNT];
    cudaEvent_t event[BESA_EVENT_COUNT];
    cublasHandle_t blas;
    int64_t *bad_pivot;                /* (2) device: column + 1 and columns of the first bad Hessian, or 0 */
    int64_t *bad_pivot_host;           /* (2) pinned: the same, once the queue has come so far */
} besa__cuda;

static besa__cuda *besa__cuda_of(const besa_backend *be) { return static_cast<besa__cuda *>(be->context); }

static besa_result besa__cuda_check(besa_backend *be, cudaError_t status, const char *call)
{
    if (status == cudaSuccess) return BESA_OK;
    cudaGetLastError(); /* not for the next launch to find */
    besa_result code = status == cudaErrorMemoryAllocation ? BESA_ERROR_MEMORY : BESA_ERROR_DEVICE;
    return besa__fail(&be->error, code, "CUDA: %s: %s (%s)", cudaGetErrorString(status), cudaGetErrorName(status), call);
}

static besa_result besa__cublas_check(besa_backend *be, cublasStatus_t status, const char *call)
{
    if (status == CUBLAS_STATUS_SUCCESS) return BESA_OK;
    besa_result code = status == CUBLAS_STATUS_ALLOC_FAILED ? BESA_ERROR_MEMORY : BESA_ERROR_DEVICE;
    return besa__fail(&be->error, code, "cuBLAS: %s (%s)", cublasGetStatusName(status), call);
}

static __host__ __device__ inline int64_t besa__cuda_min(int64_t a, int64_t b) { return a < b ? a : b; }
static __host__ __device__ inline int64_t besa__cuda_max(int64_t a, int64_t b) { return a > b ? a : b; }
static __host__ __device__ inline int64_t besa__cuda_parts(int64_t total, int64_t part) { return (total + part - 1) / part; }

/* Blocks beyond the grid's limit are taken in turns: every kernel loops over its blocks. */
static dim3 besa__cuda_grid(int64_t blocks) { return dim3(static_cast<unsigned>(besa__cuda_min(blocks, 2147483647))); }

/* Threads of a block that walks along a row, eight columns each. */
static int besa__cuda_row_threads(int64_t columns)
{
    return static_cast<int>(besa__cuda_min(256, besa__cuda_parts(besa__cuda_max(columns, 1), 256) * 32));
}

enum { BESA__CUDA_THREADS = 256 };

/* Blocks of BESA__CUDA_THREADS threads, eight elements each. */
static int64_t besa__cuda_flat_blocks(int64_t n) { return besa__cuda_parts(n, 8 * BESA__CUDA_THREADS); }

/* All of these lie on 16-byte boundaries. */
template <typename... P> static int besa__cuda_aligned(const P *...p)
{
    return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

/* Scratch of an operation: taken from the start of the workspace; products have theirs at its end. For each operation
 * with scratch a function `..._place` takes its arrays; workspace_size runs it on an arena without memory. */
static besa__arena besa__cuda_work(const besa_backend *be)
{
    besa__arena work;
    work.base = static_cast<unsigned char *>(be->workspace);
    work.used = 0;
    return work;
}

#define BESA__CUDA_FITS(be, work) BESA_ASSERT((work).used <= (be)->workspace_bytes)

/* Let a kernel have more dynamic shared memory than the 48 KB that every device gives. */
template <typename Kernel>
static besa_result besa__cuda_allow_shared(besa_backend *be, Kernel *kernel, size_t bytes)
{
    if (bytes <= 49152) return BESA_OK;
    BESA__CUDA_HERE();
    BESA__CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-queues           memory, streams, events
 * ============================================================================================ */

static besa_result besa__cuda_alloc(besa_backend *be, void **device, size_t bytes)
{
    *device = NULL;
    BESA__CUDA_HERE();
    cudaError_t status = cudaMalloc(device, bytes ? bytes : 1);
    if (status != cudaErrorMemoryAllocation) return besa__cuda_check(be, status, "cudaMalloc");
    *device = NULL;
    cudaGetLastError();
    return besa__fail(&be->error, BESA_ERROR_MEMORY, "out of device memory: %zu bytes wanted", bytes);
}

static void besa__cuda_free(besa_backend *be, void *device)
{
    (void)be;
    if (device) cudaFree(device);
}

static besa_result besa__cuda_host_alloc(besa_backend *be, void **host, size_t bytes)
{
    *host = NULL;
    BESA__CUDA_HERE();
    BESA__CUDA(cudaHostAlloc(host, bytes ? bytes : 1, cudaHostAllocDefault));
    return BESA_OK;
}

static void besa__cuda_host_free(besa_backend *be, void *host)
{
    (void)be;
    if (host) cudaFreeHost(host);
}

static besa_result besa__cuda_memory_info(besa_backend *be, size_t *free_bytes, size_t *total_bytes)
{
    BESA__CUDA_HERE();
    BESA__CUDA(cudaMemGetInfo(free_bytes, total_bytes));
    return BESA_OK;
}

/* From pageable memory the runtime copies the source aside before it returns. */
static besa_result besa__cuda_upload(besa_backend *be, besa_queue q, void *device, const void *host, size_t bytes)
{
    if (bytes == 0) return BESA_OK;
    BESA__CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, besa__cuda_of(be)->stream[q]));
    return BESA_OK;
}

static besa_result besa__cuda_download(besa_backend *be, besa_queue q, void *host, const void *device, size_t bytes)
{
    if (bytes == 0) return BESA_OK;
    BESA__CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, besa__cuda_of(be)->stream[q]));
    return BESA_OK;
}

static besa_result besa__cuda_copy(besa_backend *be, besa_queue q, void *dst, const void *src, size_t bytes)
{
    if (bytes == 0 || dst == src) return BESA_OK;
    BESA__CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, besa__cuda_of(be)->stream[q]));
    return BESA_OK;
}

static besa_result besa__cuda_zero(besa_backend *be, besa_queue q, void *dst, size_t bytes)
{
    if (bytes == 0) return BESA_OK;
    BESA__CUDA_HERE();
    BESA__CUDA(cudaMemsetAsync(dst, 0, bytes, besa__cuda_of(be)->stream[q]));
    return BESA_OK;
}

static besa_result besa__cuda_record(besa_backend *be, besa_queue q, int event)
{
    BESA_ASSERT(event >= 0 && event < BESA_EVENT_COUNT);
    BESA__CUDA_HERE();
    BESA__CUDA(cudaEventRecord(besa__cuda_of(be)->event[event], besa__cuda_of(be)->stream[q]));
    return BESA_OK;
}

static besa_result besa__cuda_wait(besa_backend *be, besa_queue q, int event)
{
    BESA_ASSERT(event >= 0 && event < BESA_EVENT_COUNT);
    BESA__CUDA(cudaStreamWaitEvent(besa__cuda_of(be)->stream[q], besa__cuda_of(be)->event[event], 0));
    return BESA_OK;
}

static besa_result besa__cuda_elapsed(besa_backend *be, int first, int second, double *seconds)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    float milliseconds;
    BESA_ASSERT(first >= 0 && first < BESA_EVENT_COUNT && second >= 0 && second < BESA_EVENT_COUNT);
    BESA__CUDA(cudaEventElapsedTime(&milliseconds, cuda->event[first], cuda->event[second]));
    *seconds = 1e-3 * static_cast<double>(milliseconds);
    return BESA_OK;
}

/* Waits, then tells of a Hessian that the device found not positive definite. */
static besa_result besa__cuda_synchronize(besa_backend *be, besa_queue q)
{
    besa__cuda *cuda = besa__cuda_of(be);
    BESA__CUDA(cudaStreamSynchronize(cuda->stream[q]));
    if (q != BESA_QUEUE_COMPUTE || cuda->bad_pivot_host[0] == 0) return BESA_OK;
    int64_t column = cuda->bad_pivot_host[0] - 1, columns = cuda->bad_pivot_host[1];
    cuda->bad_pivot_host[0] = 0;
    BESA__TRY(besa__cuda_zero(be, BESA_QUEUE_COMPUTE, cuda->bad_pivot, 2 * sizeof(int64_t)));
    return besa__fail(&be->error, BESA_ERROR_NUMERIC,
                      "the Hessian of %lld columns is not positive definite at column %lld (a larger option "
                      "damping or more calibration tokens may help)", static_cast<long long>(columns), static_cast<long long>(column));
}

/* ============================================================================================
 * // >>cuda-device           what kernels share: 16-byte accesses, sums in a fixed order, sort keys
 * ============================================================================================
 * A thread takes eight consecutive elements at a time. `vector` says that every such eight is aligned to 16 bytes; else,
 * and at the tail, they are read one by one, with the same thread for the same element: results do not depend on
 * alignment. */

static __device__ __forceinline__ float besa__get(float x) { return x; }
static __device__ __forceinline__ float besa__get(__nv_bfloat16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float besa__get(__half x) { return __half2float(x); }
static __device__ __forceinline__ uint16_t besa__get(uint16_t x) { return x; }
static __device__ __forceinline__ uint32_t besa__get(uint32_t x) { return x; }
static __device__ __forceinline__ void besa__put(float &y, float x) { y = x; }
static __device__ __forceinline__ void besa__put(__nv_bfloat16 &y, float x) { y = __float2bfloat16_rn(x); }
static __device__ __forceinline__ void besa__put(__half &y, float x) { y = __float2half_rn(x); }
static __device__ __forceinline__ void besa__put(uint16_t &y, uint16_t x) { y = x; }
static __device__ __forceinline__ void besa__put(uint32_t &y, uint32_t x) { y = x; }

template <typename T> struct alignas(16) besa__eight {
    T x[8];
};

/* x(8) = p[0 .. count-1], 0 beyond */
template <typename X, typename T>
static __device__ __forceinline__ void besa__load(X (&x)[8], const T *p, int count, int vector)
{
    if (vector && count == 8) {
        besa__eight<T> eight = *reinterpret_cast<const besa__eight<T> *>(p);
        BESA__UNROLL
        for (int i = 0; i < 8; i++) x[i] = besa__get(eight.x[i]);
    } else {
        BESA__UNROLL
        for (int i = 0; i < 8; i++) x[i] = i < count ? besa__get(p[i]) : X(0);
    }
}

/* p[0 .. count-1] = x */
template <typename X, typename T>
static __device__ __forceinline__ void besa__store(T *p, const X (&x)[8], int count, int vector)
{
    if (vector && count == 8) {
        besa__eight<T> eight;
        BESA__UNROLL
        for (int i = 0; i < 8; i++) besa__put(eight.x[i], x[i]);
        *reinterpret_cast<besa__eight<T> *>(p) = eight;
    } else {
        BESA__UNROLL
        for (int i = 0; i < 8; i++)
            if (i < count) besa__put(p[i], x[i]);
    }
}

/* Loops: over the rows that this block takes; over the eights of a row that this thread takes; over the eights of a
 * flat array that this thread of the grid takes. */
#define BESA__ROWS(r, rows) for (int64_t r = blockIdx.x; r < (rows); r += gridDim.x)
#define BESA__EIGHTS(j, columns)                                                                   \
    for (int64_t j = 8 * static_cast<int64_t>(threadIdx.x); j < (columns); j += 8 * static_cast<int64_t>(blockDim.x))
#define BESA__FLAT(i, n)                                                                           \
    for (int64_t i = 8 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x); i < (n);   \
         i += 8 * (static_cast<int64_t>(gridDim.x) * blockDim.x))

/* What is left of a row, as far as one thread takes it. */
static __device__ __forceinline__ int besa__count(int64_t left) { return left < 8 ? static_cast<int>(left) : 8; }

#define BESA__ALL_LANES 0xFFFFFFFFu

static __device__ __forceinline__ int besa__lane() { return static_cast<int>(threadIdx.x % 32); }
static __device__ __forceinline__ int besa__warp() { return static_cast<int>(threadIdx.x / 32); }
static __device__ __forceinline__ int besa__warps() { return static_cast<int>(blockDim.x / 32); }

template <typename X> static __device__ __forceinline__ X besa__warp_sum(X x)
{
    for (int width = 16; width > 0; width /= 2) x += __shfl_xor_sync(BESA__ALL_LANES, x, width);
    return x;
}

static __device__ __forceinline__ float besa__warp_max(float x)
{
    for (int width = 16; width > 0; width /= 2) x = fmaxf(x, __shfl_xor_sync(BESA__ALL_LANES, x, width));
    return x;
}

/* The sum over the block, for every thread; its order depends on the number of threads alone. */
template <typename X> static __device__ X besa__block_sum(X x)
{
    BESA__SHARED_ARRAY(X, part, 32);
    x = besa__warp_sum(x);
    __syncthreads(); /* the last sum has been read */
    if (besa__lane() == 0) part[besa__warp()] = x;
    __syncthreads();
    X sum = part[0];
    for (int w = 1; w < besa__warps(); w++) sum += part[w];
    return sum;
}

/* The sum of part(parts), for every thread of the block. */
static __device__ double besa__parts_sum(const double *part, int64_t parts)
{
    double sum = 0.0;
    for (int64_t p = threadIdx.x; p < parts; p += blockDim.x) sum += part[p];
    return besa__block_sum(sum);
}

static __device__ float besa__block_max(float x)
{
    BESA__SHARED_ARRAY(float, part, 32);
    x = besa__warp_max(x);
    __syncthreads();
    if (besa__lane() == 0) part[besa__warp()] = x;
    __syncthreads();
    float most = part[0];
    for (int w = 1; w < besa__warps(); w++) most = fmaxf(most, part[w]);
    return most;
}

/* The sum of x over the threads before this one. */
static __device__ uint32_t besa__block_before(uint32_t x)
{
    BESA__SHARED_ARRAY(uint32_t, part, 32);
    uint32_t sum = x;
    for (int width = 1; width < 32; width *= 2) {
        uint32_t lower = __shfl_up_sync(BESA__ALL_LANES, sum, static_cast<unsigned>(width));
        if (besa__lane() >= width) sum += lower;
    }
    __syncthreads();
    if (besa__lane() == 31) part[besa__warp()] = sum;
    __syncthreads();
    for (int w = 0; w < besa__warp(); w++) sum += part[w];
    return sum - x;
}

/* Keys in the order of the numbers: negative ones are complemented, -0 becomes +0. */
static __device__ __forceinline__ uint32_t besa__key(float x)
{
    uint32_t u = __float_as_uint(x + 0.0f);
    return u ^ (u >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

static __device__ __forceinline__ float besa__cuda_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* ============================================================================================
 * // >>cuda-elementwise      convert, fill, power, squares, factors of scores, swiglu, rope
 * ============================================================================================ */

/* dst(rows, width) = src(rows, width), rows of src `step` apart; the last row may be cut: `total` elements in all */
template <typename D, typename S>
static __global__ void besa__convert_kernel(D *dst, const S *src, int64_t rows, int64_t width, int64_t step,
                                            int64_t total, int vector)
{
    BESA__ROWS(r, rows)
        BESA__EIGHTS(j, width) {
            float x[8];
            int64_t left = besa__cuda_min(width - j, total - (r * width + j));
            if (left <= 0) continue;
            besa__load(x, src + r * step + j, besa__count(left), vector);
            besa__store(dst + r * width + j, x, besa__count(left), vector);
        }
}

static besa_result besa__cuda_convert_rows(besa_backend *be, void *dst, besa_dtype dst_dtype, const void *src,
                                           besa_dtype src_dtype, int64_t rows, int64_t width, int64_t step,
                                           int64_t total)
{
    int vector = besa__cuda_aligned(dst, src) && width % 8 == 0 && step % 8 == 0;
    BESA__BY_DTYPE(dst_dtype, D, BESA__BY_DTYPE(src_dtype, S,
        BESA__RUN((besa__convert_kernel<D, S>), rows, besa__cuda_row_threads(width), 0, static_cast<D *>(dst),
                  static_cast<const S *>(src), rows, width, step, total, vector)));
    return BESA_OK;
}

/* dst(n) = src(n) */
static besa_result besa__cuda_convert(besa_backend *be, void *dst, besa_dtype dst_dtype, const void *src,
                                      besa_dtype src_dtype, int64_t n)
{
    const int64_t width = 4096;
    if (dst_dtype == src_dtype)
        return besa__cuda_copy(be, BESA_QUEUE_COMPUTE, dst, src, static_cast<size_t>(n) * besa_dtype_size(dst_dtype));
    return besa__cuda_convert_rows(be, dst, dst_dtype, src, src_dtype, besa__cuda_parts(n, width), width, width, n);
}

/* y(n) = value */
static __global__ void besa__fill_kernel(int32_t *y, int32_t value, int64_t n)
{
    BESA__FLAT(i, n)
        for (int64_t k = i; k < besa__cuda_min(n, i + 8); k++) y[k] = value;
}

static besa_result besa__cuda_fill(besa_backend *be, int32_t *y, int32_t value, int64_t n)
{
    BESA__RUN(besa__fill_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, y, value, n);
    return BESA_OK;
}

/* y(n) = x(n)^exponent; those of Wanda's and SparseGPT's scores are exact */
static __global__ void besa__power_kernel(float *y, const float *x, float exponent, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        float v[8];
        besa__load(v, x + i, besa__count(n - i), vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++)
            v[k] = exponent == 0.5f ? sqrtf(v[k]) : exponent == -1.0f ? 1.0f / v[k]
                 : exponent == -2.0f ? 1.0f / (v[k] * v[k]) : powf(v[k], exponent);
        besa__store(y + i, v, besa__count(n - i), vector);
    }
}

static besa_result besa__cuda_power(besa_backend *be, float *y, const float *x, float exponent, int64_t n)
{
    BESA__RUN(besa__power_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, y, x, exponent, n,
              besa__cuda_aligned(y, x));
    return BESA_OK;
}

/* y(n) += x(n)^2 */
static __global__ void besa__accumulate_squares_kernel(float *y, const float *x, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, y + i, count, vector);
        besa__load(b, x + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) a[k] += b[k] * b[k];
        besa__store(y + i, a, count, vector);
    }
}

static besa_result besa__cuda_accumulate_squares(besa_backend *be, float *y, const float *x, int64_t n)
{
    BESA__RUN(besa__accumulate_squares_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, y, x, n,
              besa__cuda_aligned(y, x));
    return BESA_OK;
}

/* S(n) = S G where S is above 0 */
static __global__ void besa__score_scale_kernel(float *s, const float *g, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, s + i, count, vector);
        besa__load(b, g + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) a[k] = a[k] > 0.0f ? a[k] * b[k] : a[k];
        besa__store(s + i, a, count, vector);
    }
}

static besa_result besa__cuda_score_scale(besa_backend *be, float *s, const float *g, int64_t n)
{
    BESA__RUN(besa__score_scale_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, s, g, n, besa__cuda_aligned(s, g));
    return BESA_OK;
}

/* Gates x sigmoid(a(x)), with a' beside a: silu, where a(x) = x; gelu, where a(x) = x (p + q x^2) with p = 2 sqrt(2 / pi),
 * q = 0.044715 p */
struct besa__silu {
    static __device__ __forceinline__ float inner(float x) { return x; }
    static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

struct besa__gelu {
    static __device__ __forceinline__ float inner(float x) { return x * (1.59576912f + 0.0713548163f * x * x); }
    static __device__ __forceinline__ float slope(float x) { return 1.59576912f + 0.214064449f * x * x; }
};

/* Z(n) = gate(G) U */
template <typename Gate, typename T>
static __global__ void besa__gate_forward_kernel(T *z, const T *gate, const T *up, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        float g[8], u[8];
        besa__load(g, gate + i, besa__count(n - i), vector);
        besa__load(u, up + i, besa__count(n - i), vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) g[k] = g[k] * besa__cuda_sigmoid(Gate::inner(g[k])) * u[k];
        besa__store(z + i, g, besa__count(n - i), vector);
    }
}

template <typename Gate>
static besa_result besa__cuda_gate_forward(besa_backend *be, void *z, const void *gate, const void *up, int64_t n)
{
    int vector = besa__cuda_aligned(z, gate, up);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN((besa__gate_forward_kernel<Gate, T>), besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, static_cast<T *>(z),
                  static_cast<const T *>(gate), static_cast<const T *>(up), n, vector));
    return BESA_OK;
}

/* dG(n) = dZ U gate'(G), dU(n) = dZ gate(G), gate'(x) = s (1 + x a'(x) (1 - s)), s = sigmoid(a(x)); dG may be G, dU may be U */
template <typename Gate, typename T>
static __global__ void besa__gate_backward_kernel(T *dgate, T *dup, const T *dz, const T *gate, const T *up, int64_t n,
                                                  int vector)
{
    BESA__FLAT(i, n) {
        float d[8], g[8], u[8];
        besa__load(d, dz + i, besa__count(n - i), vector);
        besa__load(g, gate + i, besa__count(n - i), vector);
        besa__load(u, up + i, besa__count(n - i), vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            float x = g[k], s = besa__cuda_sigmoid(Gate::inner(x));
            g[k] = d[k] * u[k] * s * (1.0f + x * Gate::slope(x) * (1.0f - s));
            u[k] = d[k] * x * s;
        }
        besa__store(dgate + i, g, besa__count(n - i), vector);
        besa__store(dup + i, u, besa__count(n - i), vector);
    }
}

template <typename Gate>
static besa_result besa__cuda_gate_backward(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                            const void *up, int64_t n)
{
    int vector = besa__cuda_aligned(dgate, dup, dz, gate, up);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN((besa__gate_backward_kernel<Gate, T>), besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0,
                  static_cast<T *>(dgate), static_cast<T *>(dup), static_cast<const T *>(dz),
                  static_cast<const T *>(gate), static_cast<const T *>(up), n, vector));
    return BESA_OK;
}

static besa_result besa__cuda_swiglu_forward(besa_backend *be, void *z, const void *gate, const void *up, int64_t n)
{
    return besa__cuda_gate_forward<besa__silu>(be, z, gate, up, n);
}

static besa_result besa__cuda_swiglu_backward(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                              const void *up, int64_t n)
{
    return besa__cuda_gate_backward<besa__silu>(be, dgate, dup, dz, gate, up, n);
}

static besa_result besa__cuda_geglu_forward(besa_backend *be, void *z, const void *gate, const void *up, int64_t n)
{
    return besa__cuda_gate_forward<besa__gelu>(be, z, gate, up, n);
}

static besa_result besa__cuda_geglu_backward(besa_backend *be, void *dgate, void *dup, const void *dz, const void *gate,
                                             const void *up, int64_t n)
{
    return besa__cuda_gate_backward<besa__gelu>(be, dgate, dup, dz, gate, up, n);
}

/* Y(n) = X + scale Z; X NULL: 0 */
template <typename T>
static __global__ void besa__residual_kernel(T *y, const T *x, const T *z, float scale, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, x ? x + i : z + i, x ? count : 0, vector); /* a count of 0 gives zeros */
        besa__load(b, z + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) a[k] += scale * b[k];
        besa__store(y + i, a, count, vector);
    }
}

static besa_result besa__cuda_residual(besa_backend *be, void *y, const void *x, const void *z, float scale, int64_t n)
{
    int vector = besa__cuda_aligned(y, z) && (!x || besa__cuda_aligned(x));
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__residual_kernel<T>, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, static_cast<T *>(y),
                  static_cast<const T *>(x), static_cast<const T *>(z), scale, n, vector));
    return BESA_OK;
}

/* y(n) += value */
static __global__ void besa__shift_kernel(float *y, float value, int64_t n)
{
    BESA__FLAT(i, n)
        for (int64_t k = i; k < besa__cuda_min(n, i + 8); k++) y[k] += value;
}

static besa_result besa__cuda_shift(besa_backend *be, float *y, float value, int64_t n)
{
    BESA__RUN(besa__shift_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, y, value, n);
    return BESA_OK;
}

/* y(n) = scale y; where cap is not 0, cap tanh(scale y / cap) */
static __global__ void besa__softcap_kernel(float *y, float scale, float cap, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        float v[8];
        besa__load(v, y + i, besa__count(n - i), vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) v[k] = cap != 0.0f ? cap * tanhf(scale * v[k] / cap) : scale * v[k];
        besa__store(y + i, v, besa__count(n - i), vector);
    }
}

static besa_result besa__cuda_softcap(besa_backend *be, float *y, float scale, float cap, int64_t n)
{
    BESA__RUN(besa__softcap_kernel, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, y, scale, cap, n, besa__cuda_aligned(y));
    return BESA_OK;
}

/* X(T, heads, dh), of each head the first 2 pairs: (a, b) = (a cos - b sin, b cos + a sin), sin times direction; one block a
 * token */
template <typename T>
static __global__ void besa__rope_kernel(T *x, const float *cosine, const float *sine, int64_t tokens, int64_t seqlen,
                                         int64_t heads, int64_t head_dim, int64_t pairs, float direction, int vector)
{
    int64_t eights = besa__cuda_parts(pairs, 8);
    BESA__ROWS(t, tokens) {
        int64_t turn = t % seqlen * pairs;
        for (int64_t i = threadIdx.x; i < heads * eights; i += blockDim.x) {
            float a[8], b[8], cos8[8], sin8[8];
            int64_t head = static_cast<uint32_t>(i) / static_cast<uint32_t>(eights), j = (i - head * eights) * 8, angle = turn + j;
            T *at = x + (t * heads + head) * head_dim + j;
            int count = besa__count(pairs - j);
            besa__load(a, at, count, vector);
            besa__load(b, at + pairs, count, vector);
            besa__load(cos8, cosine + angle, count, vector);
            besa__load(sin8, sine + angle, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                float first = a[k], s = direction * sin8[k];
                a[k] = first * cos8[k] - b[k] * s;
                b[k] = b[k] * cos8[k] + first * s;
            }
            besa__store(at, a, count, vector);
            besa__store(at + pairs, b, count, vector);
        }
    }
}

static besa_result besa__cuda_rope(besa_backend *be, void *x, const float *cosine, const float *sine, int64_t tokens,
                                   int64_t seqlen, int64_t heads, int64_t head_dim, int64_t rotary_dim, int direction)
{
    int64_t pairs = rotary_dim / 2;
    int vector = pairs % 8 == 0 && head_dim % 8 == 0 && besa__cuda_aligned(x, cosine, sine);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__rope_kernel<T>, tokens, besa__cuda_row_threads(heads * pairs), 0, static_cast<T *>(x), cosine,
                  sine, tokens, seqlen, heads, head_dim, pairs, static_cast<float>(direction), vector));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-norm             rmsnorm, column sums, loss, token likelihood
 * ============================================================================================
 * Reductions along rows take a block a row; those that end in one number go through partial sums in the workspace,
 * whose number depends on the sizes alone. */

/* Y(N,d) = X r g, r = inv_rms(N) = 1 / sqrt(mean(X^2) + eps); y may be x */
template <typename T>
static __global__ void besa__rmsnorm_forward_kernel(T *y, float *inv_rms, const T *x, const float *g, int64_t n,
                                                    int64_t d, float eps, int vector)
{
    BESA__ROWS(i, n) {
        float sum = 0.0f, v[8], scale[8];
        BESA__EIGHTS(c, d) {
            besa__load(v, x + i * d + c, besa__count(d - c), vector);
            for (int k = 0; k < 8; k++) sum += v[k] * v[k];
        }
        float r = 1.0f / sqrtf(besa__block_sum(sum) / static_cast<float>(d) + eps);
        BESA__EIGHTS(c, d) {
            besa__load(v, x + i * d + c, besa__count(d - c), vector);
            besa__load(scale, g + c, besa__count(d - c), vector);
            for (int k = 0; k < 8; k++) v[k] = v[k] * r * scale[k];
            besa__store(y + i * d + c, v, besa__count(d - c), vector);
        }
        if (threadIdx.x == 0) inv_rms[i] = r;
    }
}

static besa_result besa__cuda_rmsnorm_forward(besa_backend *be, void *y, float *inv_rms, const void *x, const float *g,
                                              int64_t n, int64_t d, float eps)
{
    int vector = d % 8 == 0 && besa__cuda_aligned(y, x, g);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__rmsnorm_forward_kernel<T>, n, besa__cuda_row_threads(d), 0, static_cast<T *>(y), inv_rms,
                  static_cast<const T *>(x), g, n, d, eps, vector));
    return BESA_OK;
}

/* dX(N,d) = r (g dY - X r^2 mean(g dY X)) [+ dX]; dx may be dy */
template <typename T>
static __global__ void besa__rmsnorm_backward_kernel(T *dx, const T *dy, const T *x, const float *g,
                                                     const float *inv_rms, int64_t n, int64_t d, int accumulate,
                                                     int vector)
{
    BESA__ROWS(i, n) {
        float sum = 0.0f, r = inv_rms[i], v[8], dv[8], scale[8], old[8];
        BESA__EIGHTS(c, d) {
            int count = besa__count(d - c);
            besa__load(v, x + i * d + c, count, vector);
            besa__load(dv, dy + i * d + c, count, vector);
            besa__load(scale, g + c, count, vector);
            for (int k = 0; k < 8; k++) sum += v[k] * dv[k] * scale[k];
        }
        float t = r * r * r * (besa__block_sum(sum) / static_cast<float>(d));
        BESA__EIGHTS(c, d) {
            int count = besa__count(d - c);
            besa__load(v, x + i * d + c, count, vector);
            besa__load(dv, dy + i * d + c, count, vector);
            besa__load(scale, g + c, count, vector);
            if (accumulate) besa__load(old, dx + i * d + c, count, vector);
            for (int k = 0; k < 8; k++) v[k] = (accumulate ? old[k] : 0.0f) + r * scale[k] * dv[k] - v[k] * t;
            besa__store(dx + i * d + c, v, count, vector);
        }
    }
}

static besa_result besa__cuda_rmsnorm_backward(besa_backend *be, void *dx, const void *dy, const void *x,
                                               const float *g, const float *inv_rms, int64_t n, int64_t d,
                                               int accumulate)
{
    int vector = d % 8 == 0 && besa__cuda_aligned(dx, dy, x, g);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__rmsnorm_backward_kernel<T>, n, besa__cuda_row_threads(d), 0, static_cast<T *>(dx),
                  static_cast<const T *>(dy), static_cast<const T *>(x), g, inv_rms, n, d, accumulate, vector));
    return BESA_OK;
}

/* part(parts, d) = column sums of X^2 over runs of `run` rows; blocks go over strips of columns, then parts */
template <typename T>
static __global__ void besa__column_sumsq_kernel(float *part, const T *x, int64_t tokens, int64_t d, int64_t run,
                                                 int64_t strips, int64_t blocks, int vector)
{
    BESA__ROWS(b, blocks) {
        int64_t c = (b % strips * blockDim.x + threadIdx.x) * 8, t0 = b / strips * run;
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, v[8];
        if (c >= d) continue;
        for (int64_t t = t0; t < besa__cuda_min(tokens, t0 + run); t++) {
            besa__load(v, x + t * d + c, besa__count(d - c), vector);
            for (int k = 0; k < 8; k++) sum[k] += v[k] * v[k];
        }
        besa__store(part + b / strips * d + c, sum, besa__count(d - c), vector);
    }
}

/* out(d) += sum over the parts of part(parts, d), in their order */
static __global__ void besa__add_parts_kernel(float *out, const float *part, int64_t parts, int64_t d)
{
    BESA__ROWS(b, besa__cuda_parts(d, blockDim.x)) {
        int64_t c = b * blockDim.x + threadIdx.x;
        float sum = 0.0f;
        if (c >= d) continue;
        for (int64_t p = 0; p < parts; p++) sum += part[p * d + c];
        out[c] += sum;
    }
}

enum { BESA__CUDA_SUM_PARTS = 128 };

static float *besa__cuda_column_sumsq_place(besa__arena *work, int64_t d)
{
    return besa__take_floats(work, BESA__CUDA_SUM_PARTS * d);
}

/* out(d) += column sums of X(T,d)^2 */
static besa_result besa__cuda_column_sumsq(besa_backend *be, float *out, const void *x, int64_t tokens, int64_t d)
{
    besa__arena work = besa__cuda_work(be);
    float *part = besa__cuda_column_sumsq_place(&work, d);
    int64_t run = besa__cuda_max(1, besa__cuda_parts(tokens, BESA__CUDA_SUM_PARTS)), parts = besa__cuda_parts(tokens, run);
    int threads = static_cast<int>(besa__cuda_min(128, besa__cuda_row_threads(d)));
    int64_t strips = besa__cuda_parts(d, 8 * threads), blocks = strips * parts;
    int vector = d % 8 == 0 && besa__cuda_aligned(x);
    BESA__CUDA_FITS(be, work);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__column_sumsq_kernel<T>, blocks, threads, 0, part, static_cast<const T *>(x), tokens, d, run,
                  strips, blocks, vector));
    BESA__RUN(besa__add_parts_kernel, besa__cuda_parts(d, BESA__CUDA_THREADS), BESA__CUDA_THREADS, 0, out, part, parts, d);
    return BESA_OK;
}

/* part(parts, d) = column sums of dY, or of dY X inv_rms, over runs of `run` rows; blocks as for the sums of squares */
template <typename T>
static __global__ void besa__column_sum_kernel(float *part, const T *dy, const T *x, const float *inv_rms, int64_t n,
                                               int64_t d, int64_t run, int64_t strips, int64_t blocks, int vector)
{
    BESA__ROWS(b, blocks) {
        int64_t c = (b % strips * blockDim.x + threadIdx.x) * 8, i0 = b / strips * run;
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, v[8], w[8];
        if (c >= d) continue;
        for (int64_t i = i0; i < besa__cuda_min(n, i0 + run); i++) {
            besa__load(v, dy + i * d + c, besa__count(d - c), vector);
            if (x) besa__load(w, x + i * d + c, besa__count(d - c), vector);
            for (int k = 0; k < 8; k++) sum[k] += x ? inv_rms[i] * v[k] * w[k] : v[k];
        }
        besa__store(part + b / strips * d + c, sum, besa__count(d - c), vector);
    }
}

/* out(d) += column sums of dY(N,d), or of dY X inv_rms(N) */
static besa_result besa__cuda_column_sum(besa_backend *be, float *out, const void *dy, const void *x, const float *inv_rms,
                                         int64_t n, int64_t d)
{
    besa__arena work = besa__cuda_work(be);
    float *part = besa__cuda_column_sumsq_place(&work, d);
    int64_t run = besa__cuda_max(1, besa__cuda_parts(n, BESA__CUDA_SUM_PARTS)), parts = besa__cuda_parts(n, run);
    int threads = static_cast<int>(besa__cuda_min(128, besa__cuda_row_threads(d)));
    int64_t strips = besa__cuda_parts(d, 8 * threads), blocks = strips * parts;
    int vector = d % 8 == 0 && besa__cuda_aligned(dy, x);
    BESA__CUDA_FITS(be, work);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__column_sum_kernel<T>, blocks, threads, 0, part, static_cast<const T *>(dy),
                  static_cast<const T *>(x), inv_rms, n, d, run, strips, blocks, vector));
    BESA__RUN(besa__add_parts_kernel, besa__cuda_parts(d, BESA__CUDA_THREADS), BESA__CUDA_THREADS, 0, out, part, parts, d);
    return BESA_OK;
}

/* weight(d) = 1 / norm2, or 0 */
static __global__ void besa__loss_weight_kernel(float *weight, const float *norm2, int64_t d)
{
    BESA__FLAT(i, d)
        for (int64_t c = i; c < besa__cuda_min(d, i + 8); c++) weight[c] = norm2[c] > 0.0f ? 1.0f / norm2[c] : 0.0f;
}

/* part(blocks) = sum over the block's rows of weight (Y - Yref)^2; dY(T,d) = factor weight (Y - Yref) [+ dY]; dy may be y */
template <typename T>
static __global__ void besa__block_loss_kernel(double *part, T *dy, const T *y, const T *yref, const float *weight,
                                               float factor, int64_t tokens, int64_t d, int accumulate, int vector)
{
    double sum = 0.0;
    BESA__ROWS(t, tokens) {
        float row = 0.0f, a[8], b[8], w[8], before[8] = {0.0f};
        BESA__EIGHTS(c, d) {
            int count = besa__count(d - c);
            besa__load(a, y + t * d + c, count, vector);
            besa__load(b, yref + t * d + c, count, vector);
            besa__load(w, weight + c, count, vector);
            if (accumulate) besa__load(before, dy + t * d + c, count, vector);
            for (int k = 0; k < 8; k++) {
                float e = a[k] - b[k], g = factor * w[k] * e;
                row += w[k] * (e * e);
                a[k] = accumulate ? before[k] + g : g;
            }
            if (dy) besa__store(dy + t * d + c, a, count, vector);
        }
        sum += static_cast<double>(row);
    }
    sum = besa__block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

/* loss(1) += factor * sum of part(parts), by one block */
static __global__ void besa__add_loss_kernel(float *loss, const double *part, int64_t parts, double factor)
{
    double sum = besa__parts_sum(part, parts);
    if (threadIdx.x == 0) loss[0] += static_cast<float>(factor * sum);
}

enum { BESA__CUDA_LOSS_PARTS = 1024 };

static void besa__cuda_block_loss_place(besa__arena *work, float **weight, double **part, int64_t d)
{
    *weight = besa__take_floats(work, d);
    *part = static_cast<double *>(besa__take(work, BESA__CUDA_LOSS_PARTS * sizeof(double)));
}

/* loss(1) += scale / d * sum (Yref - Y)^2 / norm2_c; dY = 2 scale / d (Y - Yref) / norm2_c [+ dY] */
static besa_result besa__cuda_block_loss(besa_backend *be, float *loss, void *dy, const void *y, const void *yref,
                                         const float *norm2, float scale, int64_t tokens, int64_t d, int accumulate)
{
    besa__arena work = besa__cuda_work(be);
    float *weight;
    double *part;
    besa__cuda_block_loss_place(&work, &weight, &part, d);
    BESA__CUDA_FITS(be, work);
    int64_t parts = besa__cuda_min(tokens, BESA__CUDA_LOSS_PARTS);
    int vector = d % 8 == 0 && besa__cuda_aligned(dy, y, yref);
    BESA__RUN(besa__loss_weight_kernel, besa__cuda_flat_blocks(d), BESA__CUDA_THREADS, 0, weight, norm2, d);
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__block_loss_kernel<T>, parts, besa__cuda_row_threads(d), 0, part, static_cast<T *>(dy),
                  static_cast<const T *>(y), static_cast<const T *>(yref), weight, 2.0f * scale / static_cast<float>(d),
                  tokens, d, accumulate, vector));
    BESA__RUN(besa__add_loss_kernel, 1, BESA__CUDA_THREADS, 0, loss, part, parts,
              static_cast<double>(scale) / static_cast<double>(d));
    return BESA_OK;
}

/* A running maximum m and sum s of exp(x - m), with eight more x, of which `count` are there */
static __device__ __forceinline__ void besa__log_sum(float &m, float &s, const float (&x)[8], int count)
{
    float most = m;
    BESA__UNROLL
    for (int k = 0; k < 8; k++)
        if (k < count) most = fmaxf(most, x[k]);
    if (most == -INFINITY) return; /* nothing yet */
    s *= expf(m - most);
    m = most;
    BESA__UNROLL
    for (int k = 0; k < 8; k++)
        if (k < count) s += expf(x[k] - m);
}

/* state(T,3) = max, sum of exp(. - max), logit of the target, with logits(T,count) of ids first_id ..; a block a token */
static __global__ void besa__nll_update_kernel(float *state, const float *logits, const int32_t *target,
                                               int64_t first_id, int64_t count, int64_t tokens, int first, int vector)
{
    BESA__ROWS(t, tokens) {
        float m = -INFINITY, s = 0.0f, x[8];
        BESA__EIGHTS(j, count) {
            besa__load(x, logits + t * count + j, besa__count(count - j), vector);
            besa__log_sum(m, s, x, besa__count(count - j));
        }
        float most = besa__block_max(m);
        if (!first) most = fmaxf(most, state[3 * t]);
        double sum = besa__block_sum(static_cast<double>(s) * static_cast<double>(expf(m - most)));
        if (threadIdx.x != 0) continue;
        if (!first) sum += static_cast<double>(state[3 * t + 1]) * static_cast<double>(expf(state[3 * t] - most));
        int64_t id = target[t] < 0 ? -1 : target[t] - first_id;
        state[3 * t] = most;
        state[3 * t + 1] = static_cast<float>(sum);
        if (id >= 0 && id < count) state[3 * t + 2] = logits[t * count + id];
        else if (first) state[3 * t + 2] = 0.0f;
    }
}

static besa_result besa__cuda_nll_update(besa_backend *be, float *state, const float *logits, const int32_t *target,
                                         int64_t first_id, int64_t count, int64_t tokens, int first)
{
    if (count < 1) return BESA_OK;
    BESA__RUN(besa__nll_update_kernel, tokens, besa__cuda_row_threads(count), 0, state, logits, target, first_id, count,
              tokens, first, count % 8 == 0 && besa__cuda_aligned(logits));
    return BESA_OK;
}

/* sum(windows) = over the window's tokens with a target of max + log(sum) - logit; a block a window */
static __global__ void besa__nll_sum_kernel(double *sum, const float *state, const int32_t *target, int64_t windows,
                                            int64_t seqlen)
{
    BESA__ROWS(w, windows) {
        double total = 0.0;
        for (int64_t t = w * seqlen + threadIdx.x; t < (w + 1) * seqlen; t += blockDim.x)
            if (target[t] >= 0)
                total += static_cast<double>(state[3 * t]) + log(static_cast<double>(state[3 * t + 1])) -
                         static_cast<double>(state[3 * t + 2]);
        total = besa__block_sum(total);
        if (threadIdx.x == 0) sum[w] = total;
    }
}

static besa_result besa__cuda_nll_sum(besa_backend *be, double *sum, const float *state, const int32_t *target,
                                      int64_t windows, int64_t seqlen)
{
    BESA__RUN(besa__nll_sum_kernel, windows, BESA__CUDA_THREADS, 0, sum, state, target, windows, seqlen);
    return BESA_OK;
}

/* state(T,4) = max of P, sum of exp(P - max), sum of exp(P - max) (P - Q), max of Q, and best(T,2), with P and Q(T,count) of
 * ids first_id ..; a block a token. Places within the chunk go through floats, which are exact to 2^24. */
static __global__ void besa__divergence_kernel(float *state, int32_t *best, const float *p, const float *q, int64_t first_id,
                                               int64_t count, int64_t tokens, int first)
{
    BESA__ROWS(t, tokens) {
        const float *a = p + t * count, *b = q + t * count;
        float m = -INFINITY, n = -INFINITY, s = 0.0f, by = 0.0f, before = 0.0f, at[2] = {-INFINITY, -INFINITY};
        for (int64_t j = threadIdx.x; j < count; j += blockDim.x) {
            m = fmaxf(m, a[j]);
            n = fmaxf(n, b[j]);
        }
        m = besa__block_max(m);
        n = besa__block_max(n);
        float most = first ? m : fmaxf(m, state[4 * t]);
        for (int64_t j = threadIdx.x; j < count; j += blockDim.x) {
            float e = expf(a[j] - most);
            s += e;
            by += e * (a[j] - b[j]);
            if (a[j] == m) at[0] = fmaxf(at[0], -static_cast<float>(j));
            if (b[j] == n) at[1] = fmaxf(at[1], -static_cast<float>(j));
        }
        double sum = besa__block_sum(static_cast<double>(s)), sum_by = besa__block_sum(static_cast<double>(by));
        for (int i = 0; i < 2; i++) at[i] = fmaxf(besa__block_max(at[i]), -static_cast<float>(count - 1));
        if (threadIdx.x != 0) continue;
        if (!first) before = expf(state[4 * t] - most);
        if (first || m > state[4 * t]) best[2 * t] = static_cast<int32_t>(first_id + static_cast<int64_t>(-at[0]));
        if (first || n > state[4 * t + 3]) best[2 * t + 1] = static_cast<int32_t>(first_id + static_cast<int64_t>(-at[1]));
        if (first || n > state[4 * t + 3]) state[4 * t + 3] = n;
        if (!first) sum += static_cast<double>(state[4 * t + 1]) * static_cast<double>(before);
        if (!first) sum_by += static_cast<double>(state[4 * t + 2]) * static_cast<double>(before);
        state[4 * t] = most;
        state[4 * t + 1] = static_cast<float>(sum);
        state[4 * t + 2] = static_cast<float>(sum_by);
    }
}

static besa_result besa__cuda_divergence_update(besa_backend *be, float *state, int32_t *best, const float *p, const float *q,
                                                int64_t first_id, int64_t count, int64_t tokens, int first)
{
    if (count < 1) return BESA_OK;
    BESA__RUN(besa__divergence_kernel, tokens, besa__cuda_row_threads(count), 0, state, best, p, q, first_id, count, tokens, first);
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-products         linear layers, Gram matrix, logits
 * ============================================================================================
 * Matrices are row-major here and column-major in cuBLAS: C = A B is asked for as C' = B' A'. */

typedef struct besa__cuda_product {
    int64_t m, n, k;                   /* C(m,n) = alpha op(A)(m,k) op(B)(k,n) + beta C */
    const void *a, *b;
    int64_t lda, ldb, ldc;             /* elements from row to row as stored */
    int transpose_a, transpose_b;
    void *c;
    besa_dtype type, c_type;           /* of A and B; of C */
    float alpha, beta;
    int64_t batch, stride_a, stride_b, stride_c; /* elements from one product to the next */
} besa__cuda_product;

static besa__cuda_product besa__cuda_product_of(const besa_backend *be, int64_t m, int64_t n, int64_t k)
{
    besa__cuda_product p;
    memset(&p, 0, sizeof p);
    p.m = m, p.n = n, p.k = k;
    p.type = p.c_type = be->activation_dtype;
    p.alpha = 1.0f;
    p.batch = 1;
    return p;
}

static void besa__cuda_operand_a(besa__cuda_product *p, const void *a, int64_t lda, int transpose)
{
    p->a = a, p->lda = lda, p->transpose_a = transpose;
}

static void besa__cuda_operand_b(besa__cuda_product *p, const void *b, int64_t ldb, int transpose)
{
    p->b = b, p->ldb = ldb, p->transpose_b = transpose;
}

static void besa__cuda_result_c(besa__cuda_product *p, void *c, besa_dtype type, int64_t ldc, int accumulate)
{
    p->c = c, p->c_type = type, p->ldc = ldc, p->beta = accumulate ? 1.0f : 0.0f;
}

/* cuBLAS's scratch lies at the end of the workspace. */
static besa_result besa__cuda_blas_workspace(besa_backend *be)
{
    besa__cuda *cuda = besa__cuda_of(be);
    size_t end = be->workspace_bytes / BESA__ALIGN * BESA__ALIGN;
    unsigned char *at = static_cast<unsigned char *>(be->workspace) + end - cuda->blas_bytes;
    BESA_ASSERT(end >= cuda->blas_bytes);
    if (at == cuda->blas_workspace) return BESA_OK;
    BESA__CUBLAS(cublasSetWorkspace(cuda->blas, at, cuda->blas_bytes));
    cuda->blas_workspace = at;
    return BESA_OK;
}

/* cuBLAS counts in int. */
static besa_result besa__cuda_fits_int(besa_backend *be, int64_t a, int64_t b, int64_t c, int64_t d)
{
    int64_t most = besa__cuda_max(besa__cuda_max(a, b), besa__cuda_max(c, d));
    if (most <= INT32_MAX) return BESA_OK;
    return besa__fail(&be->error, BESA_ERROR_UNSUPPORTED, "a matrix product of size %lld: cuBLAS takes up to 2147483647",
                      static_cast<long long>(most));
}

static cudaDataType besa__cuda_type(besa_dtype dtype) { return dtype == BESA_F32 ? CUDA_R_32F : CUDA_R_16BF; }

static besa_result besa__cuda_multiply(besa_backend *be, const besa__cuda_product *p)
{
    cublasOperation_t op_a = p->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = p->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaDataType type = besa__cuda_type(p->type), c_type = besa__cuda_type(p->c_type);
    cublasHandle_t blas = besa__cuda_of(be)->blas;
    if (p->m < 1 || p->n < 1 || p->k < 1) return BESA_OK;
    BESA__TRY(besa__cuda_fits_int(be, p->m, p->n, p->k, p->batch));
    BESA__TRY(besa__cuda_fits_int(be, p->lda, p->ldb, p->ldc, 0));
    BESA__TRY(besa__cuda_blas_workspace(be));
    int m = static_cast<int>(p->m), n = static_cast<int>(p->n), k = static_cast<int>(p->k);
    int lda = static_cast<int>(p->lda), ldb = static_cast<int>(p->ldb), ldc = static_cast<int>(p->ldc);
    if (p->batch == 1)
        BESA__CUBLAS(cublasGemmEx(blas, op_b, op_a, n, m, k, &p->alpha, p->b, type, ldb, p->a, type, lda, &p->beta, p->c,
                                  c_type, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    else
        BESA__CUBLAS(cublasGemmStridedBatchedEx(blas, op_b, op_a, n, m, k, &p->alpha, p->b, type, ldb, p->stride_b, p->a,
                                                type, lda, p->stride_a, &p->beta, p->c, c_type, ldc, p->stride_c,
                                                static_cast<int>(p->batch), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return BESA_OK;
}

/* ---- weights in the products' type --------------------------------------------------------- */

static void *besa__cuda_panel_place(const besa_backend *be, besa__arena *work, int64_t rows, int64_t columns)
{
    int64_t least = 8 * besa__cuda_max(rows, columns); /* besa__cuda_panel_step takes no fewer lines than eight */
    int64_t count = besa__cuda_min(rows * columns, besa__cuda_max(besa__cuda_of(be)->panel, least));
    return besa__take(work, static_cast<size_t>(count) * besa_dtype_size(be->activation_dtype));
}

/* W(R,C) rows r0 .. r0+rows-1 and columns c0 .. c0+width-1 in the products' type, rows *ld elements apart: where they
 * lie, or converted into the workspace. */
static besa_result besa__cuda_panel(besa_backend *be, const void **panel, int64_t *ld, const void *w, besa_dtype dtype,
                                    int64_t columns, int64_t r0, int64_t rows, int64_t c0, int64_t width)
{
    besa__arena work = besa__cuda_work(be);
    const void *at = besa__at_const(w, dtype, r0 * columns + c0);
    *panel = at;
    *ld = columns;
    if (dtype == be->activation_dtype) return BESA_OK;
    void *memory = besa__cuda_panel_place(be, &work, rows, width);
    BESA__CUDA_FITS(be, work);
    *panel = memory;
    *ld = width;
    return besa__cuda_convert_rows(be, memory, be->activation_dtype, at, dtype, rows, width, columns, rows * width);
}

/* Rows, or columns, of W at a time, when each has `length` elements. */
static int64_t besa__cuda_panel_step(const besa_backend *be, besa_dtype dtype, int64_t total, int64_t length)
{
    if (dtype == be->activation_dtype) return besa__cuda_max(total, 1);
    return besa__cuda_max(8, besa__cuda_of(be)->panel / length / 8 * 8);
}

/* Y(T,R) += bias(R) */
template <typename T>
static __global__ void besa__bias_kernel(T *y, const float *bias, int64_t tokens, int64_t rows, int vector)
{
    BESA__ROWS(t, tokens)
        BESA__EIGHTS(r, rows) {
            float v[8], b[8];
            besa__load(v, y + t * rows + r, besa__count(rows - r), vector);
            besa__load(b, bias + r, besa__count(rows - r), vector);
            for (int k = 0; k < 8; k++) v[k] += b[k];
            besa__store(y + t * rows + r, v, besa__count(rows - r), vector);
        }
}

/* Y(T,R) = X(T,C) W(R,C)' [+ Y], a panel of W's rows at a time; Y has type y_type */
static besa_result besa__cuda_rows_product(besa_backend *be, void *y, besa_dtype y_type, const void *x, const void *w,
                                           besa_dtype dtype, int64_t tokens, int64_t rows, int64_t columns, int accumulate)
{
    int64_t step = besa__cuda_panel_step(be, dtype, rows, columns), ld;
    const void *panel;
    for (int64_t r = 0; r < rows; r += step) {
        int64_t count = besa__cuda_min(step, rows - r);
        besa__cuda_product p = besa__cuda_product_of(be, tokens, count, columns);
        BESA__TRY(besa__cuda_panel(be, &panel, &ld, w, dtype, columns, r, count, 0, columns));
        besa__cuda_operand_a(&p, x, columns, 0);
        besa__cuda_operand_b(&p, panel, ld, 1);
        besa__cuda_result_c(&p, besa__at(y, y_type, r), y_type, rows, accumulate);
        BESA__TRY(besa__cuda_multiply(be, &p));
    }
    return BESA_OK;
}

/* Y(T,R) = X(T,C) W(R,C)' [+ Y] [+ bias(R)] */
static besa_result besa__cuda_linear_forward(besa_backend *be, void *y, const void *x, const void *w, besa_dtype dtype,
                                             const float *bias, int64_t tokens, int64_t rows, int64_t columns,
                                             int accumulate)
{
    int vector = rows % 8 == 0 && besa__cuda_aligned(y, bias);
    BESA__TRY(besa__cuda_rows_product(be, y, be->activation_dtype, x, w, dtype, tokens, rows, columns, accumulate));
    if (!bias) return BESA_OK;
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__bias_kernel<T>, tokens, besa__cuda_row_threads(rows), 0, static_cast<T *>(y), bias, tokens, rows,
                  vector));
    return BESA_OK;
}

/* dX(T,C) = dY(T,R) W(R,C) [+ dX], a panel of W's columns at a time */
static besa_result besa__cuda_linear_backward_input(besa_backend *be, void *dx, const void *dy, const void *w,
                                                    besa_dtype dtype, int64_t tokens, int64_t rows, int64_t columns,
                                                    int accumulate)
{
    int64_t step = besa__cuda_panel_step(be, dtype, columns, rows), ld;
    const void *panel;
    for (int64_t c = 0; c < columns; c += step) {
        int64_t count = besa__cuda_min(step, columns - c);
        besa__cuda_product p = besa__cuda_product_of(be, tokens, count, rows);
        BESA__TRY(besa__cuda_panel(be, &panel, &ld, w, dtype, columns, 0, rows, c, count));
        besa__cuda_operand_a(&p, dy, rows, 0);
        besa__cuda_operand_b(&p, panel, ld, 0);
        besa__cuda_result_c(&p, besa__at(dx, be->activation_dtype, c), be->activation_dtype, columns, accumulate);
        BESA__TRY(besa__cuda_multiply(be, &p));
    }
    return BESA_OK;
}

/* dW(count,C) = rows first .. of dY(T,R)' X(T,C) [+ dW] */
static besa_result besa__cuda_linear_backward_weight(besa_backend *be, void *dw, besa_dtype dw_dtype, const void *dy,
                                                     const void *x, int64_t tokens, int64_t rows, int64_t columns,
                                                     int64_t first, int64_t count, int accumulate)
{
    besa__cuda_product p = besa__cuda_product_of(be, count, columns, tokens);
    besa__cuda_operand_a(&p, besa__at_const(dy, p.type, first), rows, 1);
    besa__cuda_operand_b(&p, x, columns, 0);
    besa__cuda_result_c(&p, dw, dw_dtype, columns, accumulate);
    return besa__cuda_multiply(be, &p);
}

/* H(C,C) += scale X(T,C)' X(T,C): strips of rows, each as far as its diagonal block reaches */
static besa_result besa__cuda_gram(besa_backend *be, float *h, const void *x, float scale, int64_t tokens,
                                   int64_t columns)
{
    int64_t strip = besa__cuda_parts(besa__cuda_parts(columns, 8), 256) * 256;
    for (int64_t i = 0; i < columns; i += strip) {
        int64_t rows = besa__cuda_min(strip, columns - i);
        besa__cuda_product p = besa__cuda_product_of(be, rows, i + rows, tokens);
        p.alpha = scale;
        besa__cuda_operand_a(&p, besa__at_const(x, be->activation_dtype, i), columns, 1);
        besa__cuda_operand_b(&p, x, columns, 0);
        besa__cuda_result_c(&p, h + i * columns, BESA_F32, columns, 1);
        BESA__TRY(besa__cuda_multiply(be, &p));
    }
    return BESA_OK;
}

/* logits(T,V) = H(T,d) W(V,d)', float */
static besa_result besa__cuda_logits(besa_backend *be, float *out, const void *h, const void *w, besa_dtype dtype,
                                     int64_t tokens, int64_t vocab, int64_t d)
{
    return besa__cuda_rows_product(be, out, BESA_F32, h, w, dtype, tokens, vocab, d, 0);
}

/* ============================================================================================
 * // >>cuda-attention        scores of a chunk of heads, causal softmax
 * ============================================================================================
 * One batched product makes the scores of a piece of queries for a chunk of key/value heads (or of sequences, where
 * there are more of those); its keys end where the piece ends, so that most of the masked half is never computed. Query
 * heads that share a key/value head take turns, except with a single key/value head: then the rows of all query heads
 * lie evenly and one product takes them together.
 * Few large products: at 32 heads of 128 and 2048 tokens an H100 takes 0.51 ms forward and 1.26 ms backward; with chunks
 * that stay in its second-level cache, where each product has two heads, it took 1.22 ms and 3.33 ms. Pieces are of 512
 * queries, and of more, up to half of the sequence, where few items would leave multiprocessors without a tile. */

typedef struct besa__cuda_attention {
    int64_t seqlen, head_dim, window;
    float scale, cap;                  /* of the scores; cap 0: none */
    int64_t stack, turns;              /* query heads in one matrix; products one after another: stack * turns share a kv head */
    int64_t inner, outer;              /* batched; one after another */
    int64_t q_inner, q_outer, k_inner, k_outer; /* elements from one to the next */
    int64_t q_row, k_row;              /* from token to token */
    int64_t queries, chunk;            /* tokens of a piece, items of `inner` at a time */
    float *scores;                     /* (chunk, queries * stack, keys): S, then in the backward pass dP */
    void *p, *ds;                      /* the same as act: P, dS; with float activations over the scores */
    float *dk, *dv;                    /* (chunk, seqlen, head_dim) sums */
} besa__cuda_attention;

/* Keys are padded to whole eights. */
static int64_t besa__cuda_score_row(int64_t keys) { return besa__cuda_parts(keys, 8) * 8; }

/* The arrays for `chunk` items. */
static void besa__cuda_attention_place(besa__arena *work, besa__cuda_attention *a, besa_dtype act, int64_t chunk)
{
    int64_t scores = chunk * a->queries * a->stack * besa__cuda_score_row(a->seqlen);
    size_t bytes = static_cast<size_t>(scores) * 2;
    a->chunk = chunk;
    a->scores = besa__take_floats(work, scores);
    a->p = besa__take(work, bytes);
    a->ds = besa__take(work, bytes);
    a->dk = besa__take_floats(work, chunk * a->seqlen * a->head_dim);
    a->dv = besa__take_floats(work, chunk * a->seqlen * a->head_dim);
    if (act != BESA_F32) return;
    a->ds = a->p; /* both halves: P lies over S, dS and dP over the other array */
    a->p = a->scores;
}

/* Everything but memory. */
static void besa__cuda_attention_shape(const besa__cuda *cuda, besa__cuda_attention *a, const besa_attention_shape *s)
{
    int64_t row_bytes = 8 * besa__cuda_score_row(s->seqlen), room = static_cast<int64_t>(cuda->score_bytes) / row_bytes;
    int64_t share = s->num_attention_heads / s->num_key_value_heads, dh = s->head_dim;
    int by_sequence = s->batch > s->num_key_value_heads;
    memset(a, 0, sizeof *a);
    a->seqlen = s->seqlen, a->head_dim = dh, a->window = s->sliding_window;
    a->scale = s->scale != 0.0f ? s->scale : 1.0f / sqrtf(static_cast<float>(dh));
    a->cap = s->softcap;
    a->stack = s->num_key_value_heads == 1 ? share : 1;
    a->turns = share / a->stack;
    a->q_row = s->num_attention_heads * dh, a->k_row = s->num_key_value_heads * dh;
    a->inner = by_sequence ? s->batch : s->num_key_value_heads;
    a->outer = by_sequence ? s->num_key_value_heads : s->batch;
    a->q_inner = by_sequence ? s->seqlen * a->q_row : share * dh;
    a->q_outer = by_sequence ? share * dh : s->seqlen * a->q_row;
    a->k_inner = by_sequence ? s->seqlen * a->k_row : dh;
    a->k_outer = by_sequence ? dh : s->seqlen * a->k_row;
    a->queries = besa__cuda_max(cuda->queries, besa__cuda_min(cuda->query_rows / a->inner / 128 * 128, s->seqlen / 2));
    a->queries = besa__cuda_max(besa__cuda_min(a->queries, room / 16 * 16) / a->stack, 1); /* of a token: stack rows */
    a->queries = besa__cuda_min(a->queries, besa__cuda_max(1, s->seqlen));
}

/* As many items as `bytes` of memory hold, at least one. */
static int64_t besa__cuda_attention_fit(besa__cuda_attention *a, besa_dtype act, size_t bytes)
{
    int64_t chunk = a->inner;
    for (;; chunk = besa__cuda_parts(chunk, 2)) {
        besa__arena work = {NULL, 0};
        besa__cuda_attention_place(&work, a, act, chunk);
        if (chunk <= 1 || work.used <= bytes) return chunk;
    }
}

static size_t besa__cuda_attention_bytes(const besa_backend *be, const besa_workload *w)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    besa_dtype act = be->activation_dtype;
    besa__arena work = {NULL, 0};
    besa__cuda_attention a;
    if (w->num_attention_heads < 1 || w->tokens < 1 || w->seqlen < 1) return 0;
    besa_attention_shape s = {besa__cuda_max(1, w->tokens / w->seqlen), w->seqlen, w->num_attention_heads,
                              w->num_key_value_heads, w->head_dim, 0, 0, 0};
    besa__cuda_attention_shape(cuda, &a, &s);
    besa__cuda_attention_place(&work, &a, act, besa__cuda_attention_fit(&a, act, cuda->score_bytes));
    return work.used;
}

/* Shape and memory of a call. */
static void besa__cuda_attention_begin(besa_backend *be, besa__cuda_attention *a, const besa_attention_shape *s)
{
    besa__arena work = besa__cuda_work(be);
    const besa__cuda *cuda = besa__cuda_of(be);
    size_t room = be->workspace_bytes / BESA__ALIGN * BESA__ALIGN - cuda->blas_bytes;
    besa__cuda_attention_shape(cuda, a, s);
    if (room > cuda->score_bytes) room = cuda->score_bytes;
    besa__cuda_attention_place(&work, a, be->activation_dtype, besa__cuda_attention_fit(a, be->activation_dtype, room));
    BESA__CUDA_FITS(be, work);
}

/* A piece: query tokens i0 .. i0+n-1 and keys j0 .. j0+keys-1 of `count` items; where its first rows lie. */
typedef struct besa__cuda_piece {
    int64_t i0, n, j0, keys, count;
    int64_t rows, row;                 /* of the scores: n * stack rows, `row` elements apart */
    int64_t q_at, k_at;
} besa__cuda_piece;

static besa__cuda_piece besa__cuda_piece_of(const besa__cuda_attention *a, int64_t outer, int64_t first, int64_t turn,
                                            int64_t i0)
{
    besa__cuda_piece piece;
    piece.i0 = i0;
    piece.n = besa__cuda_min(a->queries, a->seqlen - i0);
    piece.j0 = a->window > 0 ? besa__cuda_max(0, i0 - a->window + 1) : 0;
    piece.keys = i0 + piece.n - piece.j0;
    piece.count = besa__cuda_min(a->chunk, a->inner - first);
    piece.rows = piece.n * a->stack;
    piece.row = besa__cuda_score_row(piece.keys);
    piece.q_at = outer * a->q_outer + first * a->q_inner + turn * a->head_dim + i0 * a->q_row;
    piece.k_at = outer * a->k_outer + first * a->k_inner + piece.j0 * a->k_row;
    return piece;
}

/* A batched product over the piece's items. */
static besa__cuda_product besa__cuda_piece_product(const besa_backend *be, const besa__cuda_piece *piece, int64_t m,
                                                   int64_t n, int64_t k)
{
    besa__cuda_product p = besa__cuda_product_of(be, m, n, k);
    p.batch = piece->count;
    return p;
}

/* S(rows, keys) = scale Q K', or dP = dO V' with scale 1 */
static besa_result besa__cuda_piece_scores(besa_backend *be, const besa__cuda_attention *a, const besa__cuda_piece *piece,
                                           float *s, const void *q, const void *k, float scale)
{
    besa__cuda_product p = besa__cuda_piece_product(be, piece, piece->rows, piece->keys, a->head_dim);
    besa__cuda_operand_a(&p, besa__at_const(q, p.type, piece->q_at), a->q_row / a->stack, 0);
    besa__cuda_operand_b(&p, besa__at_const(k, p.type, piece->k_at), a->k_row, 1);
    besa__cuda_result_c(&p, s, BESA_F32, piece->row, 0);
    p.alpha = scale;
    p.stride_a = a->q_inner, p.stride_b = a->k_inner, p.stride_c = piece->rows * piece->row;
    return besa__cuda_multiply(be, &p);
}

/* O(rows, dh) = P V, or dQ = scale dS K */
static besa_result besa__cuda_piece_gather(besa_backend *be, const besa__cuda_attention *a, const besa__cuda_piece *piece,
                                           void *o, const void *p_act, const void *v, float scale)
{
    besa__cuda_product p = besa__cuda_piece_product(be, piece, piece->rows, a->head_dim, piece->keys);
    besa__cuda_operand_a(&p, p_act, piece->row, 0);
    besa__cuda_operand_b(&p, besa__at_const(v, p.type, piece->k_at), a->k_row, 0);
    besa__cuda_result_c(&p, besa__at(o, p.type, piece->q_at), p.type, a->q_row / a->stack, 0);
    p.alpha = scale;
    p.stride_a = piece->rows * piece->row, p.stride_b = a->k_inner, p.stride_c = a->q_inner;
    return besa__cuda_multiply(be, &p);
}

/* sum(keys, dh) += scale dS' Q, or P' dO */
static besa_result besa__cuda_piece_scatter(besa_backend *be, const besa__cuda_attention *a,
                                            const besa__cuda_piece *piece, float *sum, const void *p_act, const void *q,
                                            float scale)
{
    besa__cuda_product p = besa__cuda_piece_product(be, piece, piece->keys, a->head_dim, piece->rows);
    besa__cuda_operand_a(&p, p_act, piece->row, 1);
    besa__cuda_operand_b(&p, besa__at_const(q, p.type, piece->q_at), a->q_row / a->stack, 0);
    besa__cuda_result_c(&p, sum + piece->j0 * a->head_dim, BESA_F32, a->head_dim, 1);
    p.alpha = scale;
    p.stride_a = piece->rows * piece->row, p.stride_b = a->q_inner, p.stride_c = a->seqlen * a->head_dim;
    return besa__cuda_multiply(be, &p);
}

/* A thread's eights of a row of scores: the first stays in registers from sweep to sweep, others are read again. */
enum { BESA__CUDA_SOFTMAX_THREADS = 1024 };

static int besa__cuda_softmax_threads(int64_t keys)
{
    return static_cast<int>(besa__cuda_min(BESA__CUDA_SOFTMAX_THREADS, besa__cuda_parts(keys, 256) * 32));
}

/* Which query of the piece row b is of; rows are fewer than 2^32, and whole numbers of 64 bits slow to divide. */
static __device__ __forceinline__ int64_t besa__query_of(const besa__cuda_piece &piece, int64_t b, int64_t stack)
{
    return static_cast<uint32_t>(b) % static_cast<uint32_t>(piece.rows) / static_cast<uint32_t>(stack);
}

/* x(8) = scores from j on, -infinity where keys are not in first .. last; those are not read */
static __device__ __forceinline__ void besa__scores_at(float (&x)[8], const float *row, int64_t j, int64_t first, int64_t last)
{
    besa__load(x, row + j, j > last ? 0 : besa__count(last + 1 - j), 1);
    BESA__UNROLL
    for (int k = 0; k < 8; k++)
        if (j + k < first || j + k > last) x[k] = -INFINITY;
}

/* P(count * rows, keys) = softmax of S over the keys that the row's query sees, 0 elsewhere; a block a row. Row r of an
 * item is query i0 + r / stack; it sees keys up to itself, the last `window` of them where window > 0. P may be S. */
template <typename T>
static __global__ void __launch_bounds__(BESA__CUDA_SOFTMAX_THREADS)
    besa__softmax_forward_kernel(T *p, const float *s, besa__cuda_piece piece, int64_t stack, int64_t window)
{
    const int64_t mine = 8 * static_cast<int64_t>(threadIdx.x);
    BESA__ROWS(b, piece.count * piece.rows) {
        const float *row = s + b * piece.row;
        int64_t i = piece.i0 + besa__query_of(piece, b, stack) - piece.j0; /* the query's own key */
        int64_t first = window > 0 ? besa__cuda_max(0, i - window + 1) : 0;
        float m = -INFINITY, sum = 0.0f, held[8], x[8];
        besa__scores_at(held, row, mine, first, i);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) m = fmaxf(m, held[k]);
        BESA__EIGHTS(j, i + 1) {
            if (j == mine) continue;
            besa__scores_at(x, row, j, first, i);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) m = fmaxf(m, x[k]);
        }
        float most = besa__block_max(m);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) sum += held[k] = expf(held[k] - most);
        BESA__EIGHTS(j, i + 1) {
            if (j == mine) continue;
            besa__scores_at(x, row, j, first, i);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) sum += expf(x[k] - most);
        }
        float scale = 1.0f / besa__block_sum(sum);
        BESA__EIGHTS(j, piece.keys) {
            if (j != mine) besa__scores_at(x, row, j, first, i);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) x[k] = (j == mine ? held[k] : expf(x[k] - most)) * scale;
            besa__store(p + b * piece.row + j, x, besa__count(piece.keys - j), 1);
        }
    }
}

/* dS(count * rows, keys) = P (dP - sum_j P dP); dS may be dP. Keys after the row's query are not read: P is 0 there. */
template <typename T>
static __global__ void __launch_bounds__(BESA__CUDA_SOFTMAX_THREADS)
    besa__softmax_backward_kernel(T *ds, const float *dp, const T *p, besa__cuda_piece piece, int64_t stack)
{
    const int64_t mine = 8 * static_cast<int64_t>(threadIdx.x);
    BESA__ROWS(b, piece.count * piece.rows) {
        int64_t seen = piece.i0 + besa__query_of(piece, b, stack) - piece.j0 + 1, row = b * piece.row;
        float dot = 0.0f, held_p[8], held_d[8], x[8], d[8];
        int there = mine < seen ? besa__count(piece.keys - mine) : 0; /* a count of 0 gives zeros */
        besa__load(held_p, p + row + mine, there, 1);
        besa__load(held_d, dp + row + mine, there, 1);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) dot += held_p[k] * held_d[k];
        BESA__EIGHTS(j, seen) {
            if (j == mine) continue;
            besa__load(x, p + row + j, besa__count(piece.keys - j), 1);
            besa__load(d, dp + row + j, besa__count(piece.keys - j), 1);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) dot += x[k] * d[k];
        }
        dot = besa__block_sum(dot);
        BESA__EIGHTS(j, piece.keys) {
            int count = besa__count(piece.keys - j);
            if (j != mine) {
                besa__load(x, p + row + j, j < seen ? count : 0, 1);
                besa__load(d, dp + row + j, j < seen ? count : 0, 1);
            }
            BESA__UNROLL
            for (int k = 0; k < 8; k++) d[k] = j == mine ? held_p[k] * (held_d[k] - dot) : x[k] * (d[k] - dot);
            besa__store(ds + row + j, d, count, 1);
        }
    }
}

/* P of a piece, from Q and K */
static besa_result besa__cuda_piece_probabilities(besa_backend *be, const besa__cuda_attention *a,
                                                  const besa__cuda_piece *piece, const void *q, const void *k)
{
    BESA__TRY(besa__cuda_piece_scores(be, a, piece, a->scores, q, k, a->scale));
    if (a->cap != 0.0f) BESA__TRY(besa__cuda_softcap(be, a->scores, 1.0f, a->cap, piece->count * piece->rows * piece->row));
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__softmax_forward_kernel<T>, piece->count * piece->rows, besa__cuda_softmax_threads(piece->keys), 0,
                  static_cast<T *>(a->p), a->scores, *piece, a->stack, a->window));
    return BESA_OK;
}

/* O(T, heads * dh) = softmax_causal(S) V, S = scale Q K', capped or not */
static besa_result besa__cuda_attention_forward(besa_backend *be, void *o, const void *q, const void *k, const void *v,
                                                const besa_attention_shape *s)
{
    besa__cuda_attention a;
    besa__cuda_attention_begin(be, &a, s);
    for (int64_t outer = 0; outer < a.outer; outer++)
        for (int64_t first = 0; first < a.inner; first += a.chunk)
            for (int64_t turn = 0; turn < a.turns; turn++)
                for (int64_t i0 = 0; i0 < a.seqlen; i0 += a.queries) {
                    besa__cuda_piece piece = besa__cuda_piece_of(&a, outer, first, turn, i0);
                    BESA__TRY(besa__cuda_piece_probabilities(be, &a, &piece, q, k));
                    BESA__TRY(besa__cuda_piece_gather(be, &a, &piece, o, a.p, v, 1.0f));
                }
    return BESA_OK;
}

/* dS(count * rows, keys) *= 1 - tanh(S / cap)^2, the derivative by the scores before the cap; a block a row. What is masked has
 * a dS of 0 and any S. */
template <typename T>
static __global__ void besa__softcap_backward_kernel(T *ds, const float *s, besa__cuda_piece piece, float cap)
{
    BESA__ROWS(b, piece.count * piece.rows)
        BESA__EIGHTS(j, piece.keys) {
            int count = besa__count(piece.keys - j);
            float d[8], x[8];
            besa__load(d, ds + b * piece.row + j, count, 1);
            besa__load(x, s + b * piece.row + j, count, 1);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                float t = tanhf(x[k] / cap);
                d[k] *= 1.0f - t * t;
            }
            besa__store(ds + b * piece.row + j, d, count, 1);
        }
}

/* dS of a piece through the cap: the scores are made once more, where P or dP was. */
static besa_result besa__cuda_piece_uncap(besa_backend *be, const besa__cuda_attention *a, const besa__cuda_piece *piece,
                                          const void *q, const void *k)
{
    BESA__TRY(besa__cuda_piece_scores(be, a, piece, a->scores, q, k, a->scale));
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__softcap_backward_kernel<T>, piece->count * piece->rows, besa__cuda_row_threads(piece->keys), 0,
                  static_cast<T *>(a->ds), a->scores, *piece, a->cap));
    return BESA_OK;
}

/* One piece's part of dQ, dK, dV: dV += P' dO, dP = dO V', dS = P (dP - sum P dP), dQ = dS K scale, dK += dS' Q scale */
static besa_result besa__cuda_piece_backward(besa_backend *be, const besa__cuda_attention *a,
                                             const besa__cuda_piece *piece, void *dq, const void *d_o, const void *q,
                                             const void *k, const void *v)
{
    float *dp = be->activation_dtype == BESA_F32 ? static_cast<float *>(a->ds) : a->scores;
    BESA__TRY(besa__cuda_piece_probabilities(be, a, piece, q, k));
    BESA__TRY(besa__cuda_piece_scatter(be, a, piece, a->dv, a->p, d_o, 1.0f));
    BESA__TRY(besa__cuda_piece_scores(be, a, piece, dp, d_o, v, 1.0f));
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__softmax_backward_kernel<T>, piece->count * piece->rows, besa__cuda_softmax_threads(piece->keys), 0,
                  static_cast<T *>(a->ds), dp, static_cast<const T *>(a->p), *piece, a->stack));
    if (a->cap != 0.0f) BESA__TRY(besa__cuda_piece_uncap(be, a, piece, q, k));
    BESA__TRY(besa__cuda_piece_gather(be, a, piece, dq, a->ds, k, a->scale));
    return besa__cuda_piece_scatter(be, a, piece, a->dk, a->ds, q, a->scale);
}

/* Rows of sum(count, seqlen, dh) to dst, row t of item i at i * inner + t * row */
template <typename T>
static __global__ void besa__attention_sums_kernel(T *dst, const float *sum, int64_t count, int64_t seqlen, int64_t dh,
                                                   int64_t inner, int64_t row)
{
    BESA__ROWS(b, count * seqlen)
        for (int64_t c = threadIdx.x; c < dh; c += blockDim.x)
            besa__put(dst[b / seqlen * inner + b % seqlen * row + c], sum[b * dh + c]);
}

static besa_result besa__cuda_attention_sums(besa_backend *be, const besa__cuda_attention *a, void *dst,
                                             const float *sum, int64_t count, int64_t at)
{
    int threads = static_cast<int>(besa__cuda_min(256, besa__cuda_parts(a->head_dim, 32) * 32));
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__attention_sums_kernel<T>, count * a->seqlen, threads, 0, static_cast<T *>(dst) + at, sum, count,
                  a->seqlen, a->head_dim, a->k_inner, a->k_row));
    return BESA_OK;
}

/* dQ(T, heads * dh), dK, dV (T, kv_heads * dh) */
static besa_result besa__cuda_attention_backward(besa_backend *be, void *dq, void *dk, void *dv, const void *d_o,
                                                 const void *q, const void *k, const void *v,
                                                 const besa_attention_shape *s)
{
    besa__cuda_attention a;
    besa__cuda_attention_begin(be, &a, s);
    size_t sums = static_cast<size_t>(a.chunk * a.seqlen * a.head_dim) * sizeof(float);
    for (int64_t outer = 0; outer < a.outer; outer++)
        for (int64_t first = 0; first < a.inner; first += a.chunk) {
            int64_t count = besa__cuda_min(a.chunk, a.inner - first), at = outer * a.k_outer + first * a.k_inner;
            BESA__TRY(besa__cuda_zero(be, BESA_QUEUE_COMPUTE, a.dk, sums));
            BESA__TRY(besa__cuda_zero(be, BESA_QUEUE_COMPUTE, a.dv, sums));
            for (int64_t turn = 0; turn < a.turns; turn++)
                for (int64_t i0 = 0; i0 < a.seqlen; i0 += a.queries) {
                    besa__cuda_piece piece = besa__cuda_piece_of(&a, outer, first, turn, i0);
                    BESA__TRY(besa__cuda_piece_backward(be, &a, &piece, dq, d_o, q, k, v));
                }
            BESA__TRY(besa__cuda_attention_sums(be, &a, dk, a.dk, count, at));
            BESA__TRY(besa__cuda_attention_sums(be, &a, dv, a.dv, count, at));
        }
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-select           radix select, masks of a whole layer
 * ============================================================================================
 * The key that stands at a place in the order of all keys of a matrix, found 11 bits at a time from the top. Counts are
 * integers, so the order in which blocks add theirs does not matter. */

enum { BESA__CUDA_DIGITS = 2048, BESA__CUDA_SELECT_BLOCKS = 1024 };

typedef struct besa__select {
    unsigned long long count[BESA__CUDA_DIGITS];
    long long place, smaller;          /* place among the keys that share the prefix; keys below the prefix */
    uint32_t prefix;                   /* in the end the key */
} besa__select;

/* Keys of a matrix of scores (R,C) */
typedef struct besa__score_keys {
    const float *s;
    int64_t columns;
    __device__ uint32_t operator()(int64_t r, int64_t j) const { return besa__key(s[r * columns + j]); }
} besa__score_keys;

/* Keys of a slab: w^2 scale(width), rows of w `columns` apart; 0 for dead columns */
typedef struct besa__slab_keys {
    const float *w, *scale;
    const int32_t *dead;
    int64_t columns;
    __device__ uint32_t operator()(int64_t r, int64_t j) const
    {
        float x = dead[j] ? 0.0f : w[r * columns + j];
        return besa__key(x * x * scale[j]);
    }
} besa__slab_keys;

static __global__ void besa__select_start_kernel(besa__select *select, long long place)
{
    for (unsigned i = threadIdx.x; i < BESA__CUDA_DIGITS; i += blockDim.x) select->count[i] = 0;
    if (threadIdx.x == 0) select->place = place, select->smaller = 0, select->prefix = 0;
}

/* count(2048) += keys with the prefix, by the `bits` bits from shift */
template <typename Keys>
static __global__ void besa__select_count_kernel(besa__select *select, Keys keys, int64_t rows, int64_t columns,
                                                 int shift, int bits)
{
    BESA__SHARED_ARRAY(uint32_t, count, BESA__CUDA_DIGITS);
    uint32_t prefix = select->prefix, mask = (1u << bits) - 1u, above = shift + bits == 32 ? 0u : ~0u << (shift + bits);
    for (unsigned i = threadIdx.x; i < BESA__CUDA_DIGITS; i += blockDim.x) count[i] = 0;
    __syncthreads();
    BESA__ROWS(r, rows)
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
            uint32_t key = keys(r, j);
            if ((key & above) == (prefix & above)) atomicAdd(&count[key >> shift & mask], 1u);
        }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < BESA__CUDA_DIGITS; i += blockDim.x)
        if (count[i] != 0) atomicAdd(&select->count[i], static_cast<unsigned long long>(count[i]));
}

/* The digit at the place joins the prefix; counts are zero again. One block of 256 threads, eight digits each. */
static __global__ void besa__select_pick_kernel(besa__select *select, int shift, int bits)
{
    BESA__SHARED_ARRAY(long long, before, BESA__CUDA_THREADS + 1);
    long long count[8], sum = 0, place = select->place;
    unsigned t = threadIdx.x, last = (1u << bits) - 1u;
    for (unsigned k = 0; k < 8; k++) {
        count[k] = static_cast<long long>(select->count[8 * t + k]);
        select->count[8 * t + k] = 0;
        sum += count[k];
    }
    before[t + 1] = sum;
    __syncthreads();
    if (t == 0) {
        before[0] = 0;
        for (unsigned k = 1; k <= BESA__CUDA_THREADS; k++) before[k] += before[k - 1];
    }
    __syncthreads();
    for (unsigned k = 0, digit = 8 * t; k < 8; k++, digit++) {
        long long begin = before[t];
        for (unsigned i = 0; i < k; i++) begin += count[i];
        if (digit > last || begin > place || begin + count[k] <= place) continue;
        select->prefix |= digit << shift;
        select->place = place - begin;
        select->smaller += begin;
    }
}

static besa__select *besa__cuda_select_place(besa__arena *work)
{
    return static_cast<besa__select *>(besa__take(work, sizeof(besa__select)));
}

/* select->prefix = the key at `place` of all keys, select->smaller = how many are smaller */
template <typename Keys>
static besa_result besa__cuda_select(besa_backend *be, besa__select *select, Keys keys, int64_t rows, int64_t columns,
                                     int64_t place)
{
    static const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
    int64_t blocks = besa__cuda_min(rows, BESA__CUDA_SELECT_BLOCKS);
    BESA__RUN(besa__select_start_kernel, 1, BESA__CUDA_THREADS, 0, select, static_cast<long long>(place));
    for (int pass = 0; pass < 3; pass++) {
        BESA__RUN(besa__select_count_kernel<Keys>, blocks, BESA__CUDA_THREADS, 0, select, keys, rows, columns,
                  shifts[pass], widths[pass]);
        BESA__RUN(besa__select_pick_kernel, 1, BESA__CUDA_THREADS, 0, select, shifts[pass], widths[pass]);
    }
    return BESA_OK;
}

/* ties(R) = scores of the row that equal the threshold */
static __global__ void besa__ties_kernel(long long *ties, const float *s, const besa__select *select, int64_t rows,
                                         int64_t columns)
{
    BESA__ROWS(r, rows) {
        int count = 0;
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) count += besa__key(s[r * columns + j]) == select->prefix;
        count = besa__block_sum(count);
        if (threadIdx.x == 0) ties[r] = count;
    }
}

/* ties(R) = those that may still go when the row begins, of `count` smallest in all. One block; a thread takes a run. */
static __global__ void besa__ties_left_kernel(long long *ties, const besa__select *select, long long count, int64_t rows)
{
    BESA__SHARED_ARRAY(long long, before, BESA__CUDA_THREADS);
    int64_t run = besa__cuda_parts(rows, blockDim.x), begin = run * threadIdx.x, end = besa__cuda_min(rows, begin + run);
    long long left = 0;
    for (int64_t r = begin; r < end; r++) left += ties[r];
    before[threadIdx.x] = left;
    __syncthreads();
    left = count - select->smaller;
    for (unsigned t = 0; t < threadIdx.x; t++) left -= before[t];
    for (int64_t r = begin; r < end; r++) {
        long long here = ties[r];
        ties[r] = left;
        left -= here;
    }
}

/* What(R,C) = W, +0 where the score is below the threshold or among the row's first ties; a block a row */
template <typename W>
static __global__ void besa__mask_smallest_kernel(W *what, const W *w, const float *s, const besa__select *select,
                                                  const long long *ties, int64_t rows, int64_t columns)
{
    BESA__ROWS(r, rows) {
        long long left = ties[r];
        for (int64_t j0 = 0; j0 < columns; j0 += blockDim.x) {
            int64_t j = j0 + threadIdx.x;
            uint32_t key = j < columns ? besa__key(s[r * columns + j]) : 0xFFFFFFFFu;
            int tie = j < columns && key == select->prefix;
            long long before = besa__block_before(static_cast<uint32_t>(tie));
            if (j < columns) {
                int go = key < select->prefix || (tie && before < left);
                what[r * columns + j] = go ? W(0) : w[r * columns + j];
            }
            left -= __syncthreads_count(tie);
        }
    }
}

static besa__select *besa__cuda_mask_smallest_place(besa__arena *work, long long **ties, int64_t rows)
{
    *ties = static_cast<long long *>(besa__take(work, static_cast<size_t>(rows) * sizeof(long long)));
    return besa__cuda_select_place(work);
}

/* What = W without its `count` smallest scores, ties by position */
static besa_result besa__cuda_mask_smallest(besa_backend *be, void *what, const void *w, besa_dtype dtype, const float *s,
                                            int64_t count, int64_t rows, int64_t columns)
{
    besa__arena work = besa__cuda_work(be);
    long long *ties;
    besa__select *select = besa__cuda_mask_smallest_place(&work, &ties, rows);
    besa__score_keys keys = {s, columns};
    int threads = BESA__CUDA_THREADS;
    if (count <= 0)
        return besa__cuda_copy(be, BESA_QUEUE_COMPUTE, what, w, static_cast<size_t>(rows * columns) * besa_dtype_size(dtype));
    BESA__CUDA_FITS(be, work);
    BESA__TRY(besa__cuda_select(be, select, keys, rows, columns, besa__cuda_min(count, rows * columns) - 1));
    BESA__RUN(besa__ties_kernel, rows, threads, 0, ties, s, select, rows, columns);
    BESA__RUN(besa__ties_left_kernel, 1, threads, 0, ties, select, static_cast<long long>(count), rows);
    BESA__BY_WIDTH(dtype == BESA_F32, W,
        BESA__RUN(besa__mask_smallest_kernel<W>, rows, threads, 0, static_cast<W *>(what), static_cast<const W *>(w), s,
                  select, ties, rows, columns));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-sparsity         scores, zeros, masks, bucketed gradient
 * ============================================================================================
 * Passes over all weights of a layer, a block a row: memory-bound, each weight is read once. */

/* S(R,C) = |W|^power scale(C), -1 where W is 0; scale NULL: 1 */
template <typename T>
static __global__ void besa__score_kernel(float *s, const T *w, const float *scale, int power, int64_t rows,
                                          int64_t columns, int vector)
{
    BESA__ROWS(r, rows)
        BESA__EIGHTS(j, columns) {
            float x[8], f[8] = {1, 1, 1, 1, 1, 1, 1, 1};
            int count = besa__count(columns - j);
            besa__load(x, w + r * columns + j, count, vector);
            if (scale) besa__load(f, scale + j, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                float magnitude = fabsf(x[k]);
                x[k] = magnitude == 0.0f ? -1.0f : (power == 2 ? magnitude * magnitude : magnitude) * f[k];
            }
            besa__store(s + r * columns + j, x, count, vector);
        }
}

static besa_result besa__cuda_score(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *scale,
                                    int power, int64_t rows, int64_t columns)
{
    int vector = columns % 8 == 0 && besa__cuda_aligned(s, w, scale);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__score_kernel<T>, rows, besa__cuda_row_threads(columns), 0, s, static_cast<const T *>(w), scale,
                  power, rows, columns, vector));
    return BESA_OK;
}

/* Of the rows of S(R,C) = |W| scale(C): sums(R), and above(R) = scores that exceed the limit; either may be NULL */
template <typename T>
static __global__ void besa__score_rows_kernel(double *sums, int32_t *above, const T *w, const float *scale, float limit,
                                               int64_t rows, int64_t columns, int vector)
{
    BESA__ROWS(r, rows) {
        double sum = 0;
        int number = 0;
        BESA__EIGHTS(j, columns) {
            float x[8], f[8];
            int count = besa__count(columns - j);
            besa__load(x, w + r * columns + j, count, vector);
            besa__load(f, scale + j, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                float score = k < count && x[k] != 0.0f ? fabsf(x[k]) * f[k] : 0.0f;
                sum += static_cast<double>(score);
                number += score > limit;
            }
        }
        sum = besa__block_sum(sum);
        number = besa__block_sum(number);
        if (threadIdx.x != 0) continue;
        if (sums) sums[r] = sum;
        if (above) above[r] = number;
    }
}

/* part(parts, C) = column sums of |W| over runs of `run` rows; blocks as for the sums of squares */
template <typename T>
static __global__ void besa__absolute_sums_kernel(float *part, const T *w, int64_t rows, int64_t columns, int64_t run,
                                                  int64_t strips, int64_t blocks, int vector)
{
    BESA__ROWS(b, blocks) {
        int64_t c = (b % strips * blockDim.x + threadIdx.x) * 8, r0 = b / strips * run;
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, v[8];
        if (c >= columns) continue;
        for (int64_t r = r0; r < besa__cuda_min(rows, r0 + run); r++) {
            besa__load(v, w + r * columns + c, besa__count(columns - c), vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) sum[k] += fabsf(v[k]);
        }
        besa__store(part + b / strips * columns + c, sum, besa__count(columns - c), vector);
    }
}

/* sums(C) of the columns of |W|(R,C) */
static besa_result besa__cuda_absolute_sums(besa_backend *be, float *sums, const void *w, besa_dtype dtype, int64_t rows,
                                            int64_t columns)
{
    besa__arena work = besa__cuda_work(be);
    float *part = besa__cuda_column_sumsq_place(&work, columns);
    int64_t run = besa__cuda_max(1, besa__cuda_parts(rows, BESA__CUDA_SUM_PARTS)), parts = besa__cuda_parts(rows, run);
    int threads = static_cast<int>(besa__cuda_min(128, besa__cuda_row_threads(columns)));
    int64_t strips = besa__cuda_parts(columns, 8 * threads), blocks = strips * parts;
    int vector = columns % 8 == 0 && besa__cuda_aligned(w);
    BESA__CUDA_FITS(be, work);
    BESA__TRY(besa__cuda_zero(be, BESA_QUEUE_COMPUTE, sums, static_cast<size_t>(columns) * sizeof(float)));
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__absolute_sums_kernel<T>, blocks, threads, 0, part, static_cast<const T *>(w), rows, columns, run, strips,
                  blocks, vector));
    BESA__RUN(besa__add_parts_kernel, besa__cuda_parts(columns, BESA__CUDA_THREADS), BESA__CUDA_THREADS, 0, sums, part, parts,
              columns);
    return BESA_OK;
}

/* S(R,C) = S (1 / sum_j |W_rj| + 1 / sums_j) where S is above 0; a block a row */
template <typename T>
static __global__ void besa__score_relative_kernel(float *s, const T *w, const float *sums, int64_t rows, int64_t columns,
                                                   int vector)
{
    BESA__ROWS(r, rows) {
        float sum = 0.0f, x[8], by[8];
        BESA__EIGHTS(j, columns) {
            besa__load(x, w + r * columns + j, besa__count(columns - j), vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) sum += fabsf(x[k]);
        }
        float share = 1.0f / besa__block_sum(sum);
        BESA__EIGHTS(j, columns) {
            int count = besa__count(columns - j);
            besa__load(x, s + r * columns + j, count, vector);
            besa__load(by, sums + j, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) x[k] = x[k] > 0.0f ? x[k] * (share + 1.0f / by[k]) : x[k];
            besa__store(s + r * columns + j, x, count, vector);
        }
    }
}

static besa_result besa__cuda_score_relative(besa_backend *be, float *s, const void *w, besa_dtype dtype, const float *sums,
                                             int64_t rows, int64_t columns)
{
    int vector = columns % 8 == 0 && besa__cuda_aligned(s, w, sums);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__score_relative_kernel<T>, rows, besa__cuda_row_threads(columns), 0, s, static_cast<const T *>(w), sums, rows,
                  columns, vector));
    return BESA_OK;
}

static besa_result besa__cuda_score_rows(besa_backend *be, double *sums, int32_t *above, const void *w, besa_dtype dtype,
                                         const float *scale, float limit, int64_t rows, int64_t columns)
{
    int vector = columns % 8 == 0 && besa__cuda_aligned(w, scale);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__score_rows_kernel<T>, rows, besa__cuda_row_threads(columns), 0, sums, above,
                  static_cast<const T *>(w), scale, limit, rows, columns, vector));
    return BESA_OK;
}

/* zeros(R) = elements that are +0 or -0; not_finite(1) += infinite or NaN ones. `exponent` has the exponent's bits set. */
template <typename W>
static __global__ void besa__count_zeros_kernel(int32_t *zeros, int32_t *not_finite, const W *w, W exponent, int64_t rows,
                                                int64_t columns, int vector)
{
    BESA__ROWS(r, rows) {
        int zero = 0, special = 0;
        BESA__EIGHTS(j, columns) {
            W x[8];
            int count = besa__count(columns - j);
            besa__load(x, w + r * columns + j, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                zero += k < count && static_cast<W>(x[k] << 1) == 0;
                special += static_cast<W>(x[k] & exponent) == exponent;
            }
        }
        zero = besa__block_sum(zero);
        special = besa__block_sum(special);
        if (threadIdx.x != 0) continue;
        zeros[r] = zero;
        if (special > 0) atomicAdd(not_finite, special);
    }
}

static besa_result besa__cuda_count_zeros(besa_backend *be, int32_t *zeros, int32_t *not_finite, const void *w,
                                          besa_dtype dtype, int64_t rows, int64_t columns)
{
    uint32_t exponent = dtype == BESA_F32 ? 0x7F800000u : dtype == BESA_BF16 ? 0x7F80u : 0x7C00u;
    int vector = columns % 8 == 0 && besa__cuda_aligned(w);
    BESA__BY_WIDTH(dtype == BESA_F32, W,
        BESA__RUN(besa__count_zeros_kernel<W>, rows, besa__cuda_row_threads(columns), 0, zeros, not_finite,
                  static_cast<const W *>(w), static_cast<W>(exponent), rows, columns, vector));
    return BESA_OK;
}

/* What(R,C) = rank >= n[r] ? W : +0, weights as bits; what may be w */
template <typename W, typename K>
static __global__ void besa__mask_apply_kernel(W *what, const W *w, const K *rank, const int32_t *n, int64_t rows,
                                               int64_t columns, int vector)
{
    BESA__ROWS(r, rows) {
        int64_t pruned = n[r];
        BESA__EIGHTS(j, columns) {
            W x[8];
            K place[8];
            int count = besa__count(columns - j);
            besa__load(x, w + r * columns + j, count, vector);
            besa__load(place, rank + r * columns + j, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) x[k] = static_cast<int64_t>(place[k]) >= pruned ? x[k] : W(0);
            besa__store(what + r * columns + j, x, count, vector);
        }
    }
}

static besa_result besa__cuda_mask_apply(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                                         const int32_t *n, int64_t rows, int64_t columns)
{
    int vector = columns % 8 == 0 && besa__cuda_aligned(what, w, rank);
    BESA__BY_WIDTH(dtype == BESA_F32, W, BESA__BY_WIDTH(columns > 65536, K,
        BESA__RUN((besa__mask_apply_kernel<W, K>), rows, besa__cuda_row_threads(columns), 0, static_cast<W *>(what),
                  static_cast<const W *>(w), static_cast<const K *>(rank), n, rows, columns, vector)));
    return BESA_OK;
}

/* The same where what holds the mask of before(R): of a row whose n has changed, the weights between the two */
template <typename W, typename K>
static __global__ void besa__mask_update_kernel(W *what, const W *w, const K *rank, const int32_t *n, int32_t *before,
                                                int64_t rows, int64_t columns, int vector)
{
    BESA__ROWS(r, rows) {
        int64_t was = before[r], pruned = n[r];
        int64_t low = besa__cuda_min(was, pruned), high = besa__cuda_max(was, pruned);
        if (low == high) continue;
        BESA__EIGHTS(j, columns) {
            K place[8];
            int64_t at = r * columns + j;
            int count = besa__count(columns - j);
            besa__load(place, rank + at, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++)
                if (k < count && static_cast<int64_t>(place[k]) >= low && static_cast<int64_t>(place[k]) < high)
                    what[at + k] = pruned > was ? W(0) : w[at + k];
        }
        __syncthreads(); /* all have read before[r] */
        if (threadIdx.x == 0) before[r] = static_cast<int32_t>(pruned);
    }
}

static besa_result besa__cuda_mask_update(besa_backend *be, void *what, const void *w, besa_dtype dtype, const void *rank,
                                          const int32_t *n, int32_t *before, int64_t rows, int64_t columns)
{
    int vector = columns % 8 == 0 && besa__cuda_aligned(rank);
    BESA__BY_WIDTH(dtype == BESA_F32, W, BESA__BY_WIDTH(columns > 65536, K,
        BESA__RUN((besa__mask_update_kernel<W, K>), rows, besa__cuda_row_threads(columns), 0, static_cast<W *>(what),
                  static_cast<const W *>(w), static_cast<const K *>(rank), n, before, rows, columns, vector)));
    return BESA_OK;
}

/* The place of element j in the stable ascending order of s(m) */
static __device__ __forceinline__ int besa__place(const float *s, int m, int j)
{
    int place = 0;
    for (int i = 0; i < m; i++) place += s[i] < s[j] || (i < j && !(s[i] > s[j]));
    return place;
}

/* What = 0 in What ? +0 : W */
template <typename T> static __global__ void besa__mask_zeros_kernel(T *what, const T *w, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float x[8], y[8];
        besa__load(y, what + i, count, vector);
        besa__load(x, w + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) y[k] = y[k] != 0.0f && x[k] != 0.0f ? x[k] : 0.0f;
        besa__store(what + i, y, count, vector);
    }
}

static besa_result besa__cuda_mask_zeros(besa_backend *be, void *what, const void *w, besa_dtype dtype, int64_t n)
{
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__mask_zeros_kernel<T>, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, static_cast<T *>(what),
                  static_cast<const T *>(w), n, besa__cuda_aligned(what, w)));
    return BESA_OK;
}

/* What(R,C): in every m consecutive columns the n smallest scores are +0; what may be w; a thread a weight */
template <typename W>
static __global__ void besa__mask_pattern_kernel(W *what, const W *w, const float *s, int n, int m, int64_t rows,
                                                 int64_t columns)
{
    BESA__ROWS(r, rows)
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
            int64_t begin = j / m * m;
            int go = begin + m <= columns && besa__place(s + r * columns + begin, m, static_cast<int>(j - begin)) < n;
            what[r * columns + j] = go ? W(0) : w[r * columns + j];
        }
}

static besa_result besa__cuda_mask_pattern(besa_backend *be, void *what, const void *w, besa_dtype dtype, const float *s,
                                           int n, int m, int64_t rows, int64_t columns)
{
    BESA__BY_WIDTH(dtype == BESA_F32, W,
        BESA__RUN(besa__mask_pattern_kernel<W>, rows, besa__cuda_row_threads(columns), 0, static_cast<W *>(what),
                  static_cast<const W *>(w), s, n, m, rows, columns));
    return BESA_OK;
}

/* How the bucket sums use shared memory: the bucket table, then for each warp a histogram with 1 .. 32 copies side by side,
 * so that lanes add without colliding; lanes that share a copy take turns. */
typedef struct besa__bucket_plan {
    int64_t warps;                     /* of a block */
    int table_bytes, log_copies;
    size_t shared;                     /* 0: straight into sums, the table where it lies */
} besa__bucket_plan;

static besa__bucket_plan besa__cuda_bucket_plan(const besa__cuda *cuda, int64_t columns, int64_t buckets)
{
    besa__bucket_plan plan = {16, 0, 0, 0};
    int64_t table = besa__cuda_parts(columns, 8) * 16, one = buckets * static_cast<int64_t>(sizeof(float));
    int64_t room = static_cast<int64_t>(cuda->shared_limit) - table;
    if (room < one) return plan;
    plan.log_copies = 5;
    while (plan.log_copies > 0 && 4 * (one << plan.log_copies) > room) plan.log_copies--;
    plan.warps = besa__cuda_min(16, room / (one << plan.log_copies));
    plan.table_bytes = static_cast<int>(table);
    plan.shared = static_cast<size_t>(table + plan.warps * (one << plan.log_copies));
    return plan;
}

/* Eight elements as they came from memory, in whole words: they are not touched before they are needed, so that a load ahead
 * does not wait. */
template <typename T> struct alignas(16) besa__words {
    uint32_t word[2 * sizeof(T)];
    __device__ __forceinline__ besa__eight<T> eight() const
    {
        besa__eight<T> e;
        memcpy(&e, word, sizeof e);
        return e;
    }
};

/* What a lane takes of a row at a time: all eight aligned and there, or none, where VECTOR */
template <typename G, typename T, typename K, bool VECTOR> struct besa__bucket_load {
    besa__words<G> g;
    besa__words<T> x;
    besa__words<K> place;
    int count;
    template <typename X> static __device__ __forceinline__ void load(besa__words<X> &to, const X *p, int count)
    {
        if constexpr (VECTOR) {
            to = *reinterpret_cast<const besa__words<X> *>(p);
        } else {
            besa__eight<X> e;
            BESA__UNROLL
            for (int k = 0; k < 8; k++) e.x[k] = p[k < count ? k : 0];
            memcpy(to.word, &e, sizeof e);
        }
    }
    __device__ __forceinline__ void load(const G *dw, const T *w, const K *rank, int64_t left)
    {
        count = left <= 0 ? 0 : besa__count(left);
        if (count == 0) return;
        load(g, dw, count);
        load(x, w, count);
        load(place, rank, count);
    }
    __device__ __forceinline__ void add(float *to, const uint16_t *of_rank, int log_copies, uint32_t copy) const
    {
        besa__eight<G> gs = g.eight();
        besa__eight<T> xs = x.eight();
        besa__eight<K> places = place.eight();
        uint32_t at[8];
        if (VECTOR && count == 0) return;
        BESA__UNROLL
        for (int k = 0; k < 8; k++)
            at[k] = VECTOR || k < count ? (static_cast<uint32_t>(of_rank[places.x[k]]) << log_copies) + copy : 0;
        BESA__UNROLL
        for (int k = 0; k < 8; k++)
            if (VECTOR || k < count) to[at[k]] += besa__get(gs.x[k]) * besa__get(xs.x[k]);
    }
};

/* sums(R,D)[r, bucket[rank[r,j]]] += dW[r,j] W[r,j]; a warp a row, element j in lane (j / 8) % 32; the next eight elements are
 * on their way while these are added. SHARED: the table and the histograms lie in shared memory. copies = 1 << log_copies */
template <typename G, typename T, typename K, bool SHARED, bool VECTOR>
static __global__ void __launch_bounds__(512, 1)
    besa__bucket_gradient_kernel(float *__restrict__ sums, const G *__restrict__ dw, const T *__restrict__ w,
                                 const K *__restrict__ rank, const uint16_t *__restrict__ bucket, int64_t rows, int64_t columns,
                                 int buckets, int table_bytes, int log_copies)
{
    BESA__SHARED(unsigned char, shared);
    uint16_t *table = reinterpret_cast<uint16_t *>(shared);
    int lane = besa__lane(), warps = besa__warps(), last = (1 << log_copies) - 1, turn = lane >> log_copies;
    int size = buckets << log_copies, turns = 32 >> log_copies;
    float *histogram = reinterpret_cast<float *>(shared + table_bytes) + besa__warp() * size;
    uint32_t copy = static_cast<uint32_t>(lane & last);
    const uint16_t *of_rank = SHARED ? table : bucket;
    if (SHARED)
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) table[j] = bucket[j];
    __syncthreads();
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * warps + besa__warp(); r < rows; r += static_cast<int64_t>(gridDim.x) * warps) {
        int64_t at = r * columns;
        float *sum = sums + r * buckets, *to = SHARED ? histogram : sum;
        besa__bucket_load<G, T, K, VECTOR> next = {};
        int64_t j = 8 * lane;
        next.load(dw + at + j, w + at + j, rank + at + j, columns - j);
        if (SHARED)
            for (int i = lane; i < size; i += 32) histogram[i] = 0.0f;
        __syncwarp();
        for (int64_t j0 = 0; j0 < columns; j0 += 256) {
            besa__bucket_load<G, T, K, VECTOR> now = next;
            j += 256;
            next.load(dw + at + j, w + at + j, rank + at + j, columns - j);
            for (int t = 0; t < turns; t++) {
                if (turn == t) now.add(to, of_rank, log_copies, copy);
                if (turns > 1) __syncwarp();
            }
        }
        __syncwarp();
        for (int b = lane; SHARED && b < buckets; b += 32) {
            float total = 0.0f;
            for (int c = 0; c <= last; c++) total += histogram[(b << log_copies) + ((b + c) & last)]; /* other banks a lane */
            sum[b] += total;
        }
        __syncwarp();
    }
}

template <typename G>
static besa_result besa__cuda_bucket_sums(besa_backend *be, float *sums, const G *dw, const void *w, besa_dtype dtype,
                                          const void *rank, const uint16_t *bucket, int64_t rows, int64_t columns,
                                          int64_t buckets)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    besa__bucket_plan plan = besa__cuda_bucket_plan(cuda, columns, buckets);
    int64_t blocks = besa__cuda_min(besa__cuda_parts(rows, plan.warps), cuda->processors);
    int vector = columns % 8 == 0 && besa__cuda_aligned(dw, w, rank), threads = static_cast<int>(32 * plan.warps);
    int d = static_cast<int>(buckets);
#define BESA__BUCKETS(SHARED, VECTOR)                                                              \
    BESA__BY_DTYPE(dtype, T, BESA__BY_WIDTH(columns > 65536, K,                                    \
        BESA__TRY(besa__cuda_allow_shared(be, besa__bucket_gradient_kernel<G, T, K, SHARED, VECTOR>, plan.shared)); \
        BESA__RUN((besa__bucket_gradient_kernel<G, T, K, SHARED, VECTOR>), blocks, threads, plan.shared, sums, dw, \
                  static_cast<const T *>(w), static_cast<const K *>(rank), bucket, rows, columns, d, plan.table_bytes, \
                  plan.log_copies)))
    if (plan.shared > 0 && vector) BESA__BUCKETS(true, true);
    else if (plan.shared > 0) BESA__BUCKETS(true, false);
    else BESA__BUCKETS(false, false);
#undef BESA__BUCKETS
    return BESA_OK;
}

static besa_result besa__cuda_bucket_gradient(besa_backend *be, float *sums, const void *dw, besa_dtype dw_dtype,
                                              const void *w, besa_dtype dtype, const void *rank, const uint16_t *bucket,
                                              int64_t rows, int64_t columns, int64_t buckets)
{
    if (dw_dtype == BESA_F32)
        return besa__cuda_bucket_sums(be, sums, static_cast<const float *>(dw), w, dtype, rank, bucket, rows, columns, buckets);
    return besa__cuda_bucket_sums(be, sums, static_cast<const __nv_bfloat16 *>(dw), w, dtype, rank, bucket, rows, columns,
                                  buckets);
}

/* ============================================================================================
 * // >>cuda-ranks            ranks of rows by radix sort
 * ============================================================================================
 * A block sorts a row: four passes over eight bits of the keys, each of them stable. Positions move, keys stay and are
 * looked up. Both lie in shared memory where the row fits, else the positions alone, else neither: then positions have
 * their place in the workspace and keys are made of the scores again. */

enum { BESA__CUDA_SORT_THREADS = 512, BESA__CUDA_SORT_COLUMNS = 16 /* of a thread, at least */ };

typedef struct besa__sort_plan {
    int threads, shared_keys, shared_positions;
    size_t shared;
    int64_t blocks;
} besa__sort_plan;

static besa__sort_plan besa__cuda_sort_plan(const besa__cuda *cuda, int64_t rows, int64_t columns)
{
    besa__sort_plan plan;
    size_t element = columns > 65536 ? 4 : 2, c = static_cast<size_t>(columns);
    plan.threads = static_cast<int>(besa__cuda_min(BESA__CUDA_SORT_THREADS,
                                                   besa__cuda_parts(columns, 32 * BESA__CUDA_SORT_COLUMNS) * 32));
    size_t counts = 256 * static_cast<size_t>(plan.threads / 32) * sizeof(uint32_t), positions = 2 * c * element;
    plan.shared_keys = counts + positions + 4 * c <= cuda->shared_limit;
    plan.shared_positions = counts + positions <= cuda->shared_limit;
    plan.shared = counts + (plan.shared_positions ? positions : 0) + (plan.shared_keys ? 4 * c : 0);
    plan.blocks = plan.shared_positions ? rows : besa__cuda_min(rows, 2 * cuda->processors);
    return plan;
}

/* Two arrays of positions for each block that is at work at a time, or NULL where shared memory has them */
static void *besa__cuda_sort_place(const besa__cuda *cuda, besa__arena *work, int64_t rows, int64_t columns)
{
    besa__sort_plan plan = besa__cuda_sort_plan(cuda, rows, columns);
    if (plan.shared_positions) return NULL;
    return besa__take(work, static_cast<size_t>(2 * plan.blocks * columns) * (columns > 65536 ? 4 : 2));
}

/* What a block has at hand for its row */
template <typename K> struct besa__sort {
    const float *s;                    /* (C) scores */
    const uint32_t *keys;              /* (C) their keys, or NULL */
    uint32_t *count;                   /* (256, warps) elements of a digit in a warp's run, then where they go */
    K *now, *next;                     /* (C) positions in the order so far, and after the pass */
    int columns, shift;
    __device__ uint32_t digit(K position) const
    {
        return (keys ? keys[position] : besa__key(s[position])) >> shift & 255u;
    }
};

/* count = where the elements of each digit and warp begin: digits first, then warps. Eight counters a thread. */
template <typename K> static __device__ void besa__sort_offsets(const besa__sort<K> &sort)
{
    uint32_t *mine = sort.count + 8 * threadIdx.x, sum = 0;
    for (int k = 0; k < 8; k++) sum += mine[k];
    sum = besa__block_before(sum);
    for (int k = 0; k < 8; k++) {
        uint32_t here = mine[k];
        mine[k] = sum;
        sum += here;
    }
}

/* What a warp takes of the order: a run of whole 32s. */
typedef struct besa__sort_span {
    int begin, end;
} besa__sort_span;

static __device__ __forceinline__ besa__sort_span besa__sort_run(int columns)
{
    int warps = besa__warps(), run = (columns + 32 * warps - 1) / (32 * warps) * 32, begin = besa__warp() * run;
    besa__sort_span span = {begin, begin + run < columns ? begin + run : columns};
    return span;
}

/* count = elements of each digit in each warp's run: of integers, so that the order of lanes does not matter */
template <typename K> static __device__ void besa__sort_count(const besa__sort<K> &sort)
{
    besa__sort_span span = besa__sort_run(sort.columns);
    unsigned warps = static_cast<unsigned>(besa__warps()), warp = static_cast<unsigned>(besa__warp());
    for (int i = span.begin + besa__lane(); i < span.end; i += 32) atomicAdd(&sort.count[sort.digit(sort.now[i]) * warps + warp], 1u);
}

/* Elements move to their places, 32 at a time; lanes with the same digit keep their order. At last next[position] = place. */
template <typename K> static __device__ void besa__sort_scatter(const besa__sort<K> &sort, int last)
{
    besa__sort_span span = besa__sort_run(sort.columns);
    unsigned warps = static_cast<unsigned>(besa__warps()), warp = static_cast<unsigned>(besa__warp());
    int lane = besa__lane();
    for (int i = span.begin; i < span.end; i += 32) {
        int there = i + lane < span.end;
        K position = there ? sort.now[i + lane] : K(0);
        uint32_t digit = there ? sort.digit(position) : 256u;
        unsigned peers = __match_any_sync(BESA__ALL_LANES, digit), before = peers & ((1u << lane) - 1u);
        uint32_t *count = sort.count + digit * warps + warp;
        uint32_t place = there ? *count + static_cast<uint32_t>(__popc(before)) : 0u;
        __syncwarp();
        if (there && before == 0) *count += static_cast<uint32_t>(__popc(peers));
        if (there) sort.next[last ? position : place] = last ? static_cast<K>(place) : position;
        __syncwarp();
    }
}

/* rank(R,C) = place of column j in the stable ascending order of row r of S; work: see besa__cuda_sort_place */
template <typename K>
static __global__ void __launch_bounds__(BESA__CUDA_SORT_THREADS)
    besa__rank_rows_kernel(K *rank, const float *s, K *work, int64_t rows, int64_t columns, int shared_keys)
{
    BESA__SHARED(unsigned char, shared);
    besa__sort<K> sort;
    uint32_t *keys = shared_keys ? reinterpret_cast<uint32_t *>(shared) : NULL;
    sort.count = reinterpret_cast<uint32_t *>(shared + (shared_keys ? 4 * columns : 0));
    K *position = work ? work + blockIdx.x * 2 * columns : reinterpret_cast<K *>(sort.count + 256 * besa__warps());
    sort.keys = keys;
    sort.columns = static_cast<int>(columns);
    BESA__ROWS(r, rows) {
        sort.s = s + r * columns;
        sort.now = position, sort.next = position + columns;
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
            if (keys) keys[j] = besa__key(sort.s[j]);
            sort.now[j] = static_cast<K>(j);
        }
        for (sort.shift = 0; sort.shift < 32; sort.shift += 8) {
            for (int i = static_cast<int>(threadIdx.x); i < 256 * besa__warps(); i += static_cast<int>(blockDim.x))
                sort.count[i] = 0;
            __syncthreads();
            besa__sort_count(sort);
            __syncthreads();
            besa__sort_offsets(sort);
            __syncthreads();
            besa__sort_scatter(sort, sort.shift == 24);
            __syncthreads();
            K *swap = sort.now;
            sort.now = sort.next, sort.next = swap;
        }
        /* The next row overwrites what it begins with, and each thread the elements alone that it reads here. */
        for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) rank[r * columns + j] = sort.now[j];
    }
}

static besa_result besa__cuda_rank_rows(besa_backend *be, void *rank, const float *s, int64_t rows, int64_t columns)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    besa__arena work = besa__cuda_work(be);
    besa__sort_plan plan = besa__cuda_sort_plan(cuda, rows, columns);
    void *positions = besa__cuda_sort_place(cuda, &work, rows, columns);
    BESA__CUDA_FITS(be, work);
    BESA__BY_WIDTH(columns > 65536, K,
        BESA__TRY(besa__cuda_allow_shared(be, besa__rank_rows_kernel<K>, plan.shared));
        BESA__RUN(besa__rank_rows_kernel<K>, plan.blocks, plan.threads, plan.shared, static_cast<K *>(rank), s,
                  static_cast<K *>(positions), rows, columns, plan.shared_keys));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-rates            theta -> alpha, n and back; the exact count
 * ============================================================================================
 * A warp a group. Nothing is kept per candidate: logits are worked out again for each sweep over the candidates. */

enum { BESA__CUDA_RATE_WARPS = 4 /* of a block */, BESA__CUDA_RATE_FLOATS = 1 << 20 /* of each scratch array */ };

/* p_d = 1 - d / D */
static __device__ __forceinline__ float besa__candidate(const besa_rate_shape &s, int64_t d)
{
    float last = static_cast<float>(s.logits - 1);
    return s.logits > 1 ? static_cast<float>(s.logits - 1 - d) / last : 1.0f;
}

/* u(x) = sigmoid(x) - 1/2, or x */
static __device__ __forceinline__ float besa__squash(const besa_rate_shape &s, float x)
{
    return s.plain ? x : besa__cuda_sigmoid(x) - 0.5f;
}

/* u'(x) */
static __device__ __forceinline__ float besa__squash_slope(const besa_rate_shape &s, float x)
{
    float u = besa__cuda_sigmoid(x);
    return s.plain ? 1.0f : u * (1.0f - u);
}

/* z_d = c p_d + s_L u(theta_L[d]) + s_R u(theta_g[d]); a theta that is NULL has no part in it */
static __device__ __forceinline__ float besa__logit(const besa_rate_shape &s, const float *theta_layer,
                                                    const float *theta_group, int64_t d)
{
    float z = s.tilt * besa__candidate(s, d);
    if (theta_layer) z += s.layer_scale * besa__squash(s, theta_layer[d]);
    if (theta_group) z += s.row_scale * besa__squash(s, theta_group[d]);
    return z;
}

/* The largest logit of a group */
static __device__ float besa__logit_max(const besa_rate_shape &s, const float *theta_layer, const float *theta_group)
{
    float m = -INFINITY;
    for (int64_t d = besa__lane(); d < s.logits; d += 32) m = fmaxf(m, besa__logit(s, theta_layer, theta_group, d));
    return besa__warp_max(m);
}

/* alpha(R) = sum_d beta_d p_d, beta = softmax(z); n(R) = max(floor(alpha C), zeros), the product in float */
static __global__ void besa__rate_forward_kernel(float *alpha, int32_t *n, const float *theta_layer,
                                                 const float *theta_row, const int32_t *zeros, besa_rate_shape s,
                                                 int64_t groups)
{
    for (int64_t g = static_cast<int64_t>(blockIdx.x) * besa__warps() + besa__warp(); g < groups;
         g += static_cast<int64_t>(gridDim.x) * besa__warps()) {
        const float *theta_group = theta_row ? theta_row + g * s.logits : NULL;
        float m = besa__logit_max(s, theta_layer, theta_group);
        double total = 0.0, rate = 0.0;
        for (int64_t d = besa__lane(); d < s.logits; d += 32) {
            float e = expf(besa__logit(s, theta_layer, theta_group, d) - m);
            total += static_cast<double>(e);
            rate += static_cast<double>(e) * static_cast<double>(besa__candidate(s, d));
        }
        total = besa__warp_sum(total);
        rate = besa__warp_sum(rate);
        float a = static_cast<float>(rate / total);
        float share = floorf(a * static_cast<float>(s.units));
        int64_t pruned = share > 0.0f ? besa__cuda_min(static_cast<int64_t>(share), s.units) : 0; /* 0 where a is NaN */
        int64_t end = besa__cuda_min(s.rows, (g + 1) * s.group_rows);
        for (int64_t r = g * s.group_rows + besa__lane(); r < end; r += 32) {
            alpha[r] = a;
            if (n) n[r] = static_cast<int32_t>(zeros ? besa__cuda_max(pruned, zeros[r]) : pruned);
        }
    }
}

static besa_result besa__cuda_rate_forward(besa_backend *be, float *alpha, int32_t *n, const float *theta_layer,
                                           const float *theta_row, const int32_t *zeros, const besa_rate_shape *s)
{
    int64_t groups = besa__cuda_parts(s->rows, s->group_rows);
    BESA__RUN(besa__rate_forward_kernel, besa__cuda_parts(groups, BESA__CUDA_RATE_WARPS), 32 * BESA__CUDA_RATE_WARPS, 0,
              alpha, n, s->layer_scale == 0.0f ? NULL : theta_layer, s->row_scale == 0.0f ? NULL : theta_row, zeros, *s,
              groups);
    return BESA_OK;
}

/* mean(1) [+]= share sum_r alpha_r / R, by one block */
static __global__ void besa__rate_mean_kernel(float *mean, const float *alpha, float share, int accumulate, int64_t rows)
{
    double sum = 0.0;
    for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) sum += static_cast<double>(alpha[r]);
    sum = besa__block_sum(sum);
    if (threadIdx.x == 0)
        mean[0] = (accumulate ? mean[0] : 0.0f) + static_cast<float>(static_cast<double>(share) * sum / static_cast<double>(rows));
}

static besa_result besa__cuda_rate_mean(besa_backend *be, float *mean, const float *alpha, float share, int accumulate,
                                        int64_t rows)
{
    BESA__RUN(besa__rate_mean_kernel, 1, BESA__CUDA_THREADS, 0, mean, alpha, share, accumulate, rows);
    return BESA_OK;
}

/* The bucket sums as the backward pass reads them: rows of one group follow each other. */
typedef struct besa__bucket_rows {
    const float *sums;                 /* (rows, D) */
    int64_t rows, group_rows;
} besa__bucket_rows;

/* part(G * parts, D) = sums of runs of rows, `parts` runs to a group; a block a run */
static __global__ void besa__bucket_rows_kernel(float *part, const float *sums, int64_t rows, int64_t group_rows,
                                                int64_t parts, int64_t total, int64_t buckets)
{
    int64_t run = besa__cuda_parts(group_rows, parts);
    BESA__ROWS(b, total) {
        int64_t group = b / parts, begin = group * group_rows + b % parts * run;
        int64_t end = besa__cuda_min(besa__cuda_min(begin + run, (group + 1) * group_rows), rows);
        for (int64_t d = threadIdx.x; d < buckets; d += blockDim.x) {
            float sum = 0.0f;
            for (int64_t r = begin; r < end; r++) sum += sums[r * buckets + d];
            part[b * buckets + d] = sum;
        }
    }
}

/* A sweep over the candidates of a group, from the last to the first, 32 at a time: here lane l has d = base + l, and
 * *after carries sum_{b >= base + 32} of the group's bucket sums from step to step. Returns
 * dL/dbeta_d = slope p_d - sum_{b >= d} sums_b, slope = coefficient (S - t) rows_g / R. */
static __device__ float besa__beta_gradient(const besa_rate_shape &s, const besa__bucket_rows &from, int64_t g,
                                            double slope, int64_t base, double *after)
{
    int64_t d = base + besa__lane(), buckets = s.logits - 1, end = besa__cuda_min(from.rows, (g + 1) * from.group_rows);
    float sum = 0.0f;
    if (d < buckets)
        for (int64_t r = g * from.group_rows; r < end; r++) sum += from.sums[r * buckets + d];
    double run = static_cast<double>(sum);
    for (int width = 1; width < 32; width *= 2) {
        double higher = __shfl_down_sync(BESA__ALL_LANES, run, static_cast<unsigned>(width));
        if (besa__lane() + width < 32) run += higher;
    }
    run += *after;
    *after = __shfl_sync(BESA__ALL_LANES, run, 0);
    return static_cast<float>(slope * static_cast<double>(besa__candidate(s, d)) - run);
}

/* dtheta_row(G,D+1) = dz s_R u'(theta_row), dz = (dbeta - sum beta dbeta) beta; part(parts,D+1) = sums of dz over runs of
 * `run` groups, NULL where theta_layer learns nothing. A warp a run. */
static __global__ void besa__rate_backward_kernel(float *dtheta_row, float *part, besa__bucket_rows from,
                                                  const float *theta_layer, const float *theta_row,
                                                  besa_penalty penalty, besa_rate_shape s, int64_t groups, int64_t run)
{
    int64_t n = s.logits, top = (n - 1) / 32 * 32, p = static_cast<int64_t>(blockIdx.x) * besa__warps() + besa__warp();
    double slope_of_row = 0.0;
    if (penalty.coefficient != 0.0f)
        slope_of_row = static_cast<double>(penalty.coefficient) / static_cast<double>(s.rows) *
                       (static_cast<double>(penalty.mean[0]) - static_cast<double>(penalty.target));
    for (int64_t g = p * run; g < besa__cuda_min(groups, (p + 1) * run); g++) {
        const float *theta_group = theta_row ? theta_row + g * n : NULL;
        float m = besa__logit_max(s, theta_layer, theta_group);
        double slope = slope_of_row * static_cast<double>(besa__cuda_min(s.group_rows, s.rows - g * s.group_rows));
        double total = 0.0, product = 0.0, after = 0.0;
        for (int64_t base = top; base >= 0; base -= 32) {
            int64_t d = base + besa__lane();
            float dbeta = besa__beta_gradient(s, from, g, slope, base, &after);
            float e = d < n ? expf(besa__logit(s, theta_layer, theta_group, d) - m) : 0.0f;
            total += static_cast<double>(e);
            product += static_cast<double>(e) * static_cast<double>(dbeta);
        }
        total = besa__warp_sum(total);
        product = besa__warp_sum(product);
        float mean = static_cast<float>(product / total), scale = static_cast<float>(1.0 / total);
        after = 0.0;
        for (int64_t base = top; base >= 0; base -= 32) {
            int64_t d = base + besa__lane();
            float dbeta = besa__beta_gradient(s, from, g, slope, base, &after);
            if (d >= n) continue;
            float dz = (dbeta - mean) * (expf(besa__logit(s, theta_layer, theta_group, d) - m) * scale);
            if (part) part[p * n + d] = (g == p * run ? 0.0f : part[p * n + d]) + dz;
            if (dtheta_row) dtheta_row[g * n + d] = dz * s.row_scale * besa__squash_slope(s, theta_group[d]);
        }
    }
}

/* dtheta_layer(D+1) = s_L u'(theta_layer) sum over the parts of part(parts, D+1); a block a candidate */
static __global__ void besa__rate_layer_kernel(float *dtheta_layer, const float *part, const float *theta_layer,
                                               int64_t parts, besa_rate_shape s)
{
    BESA__ROWS(d, s.logits) {
        float sum = 0.0f;
        for (int64_t p = threadIdx.x; p < parts; p += blockDim.x) sum += part[p * s.logits + d];
        sum = besa__block_sum(sum);
        if (threadIdx.x == 0) dtheta_layer[d] = sum * s.layer_scale * besa__squash_slope(s, theta_layer[d]);
    }
}

/* candidates 0: any number */
static void besa__cuda_rates_place(besa__arena *work, float **sums, float **part, int64_t rows, int64_t candidates)
{
    int64_t floats = BESA__CUDA_RATE_FLOATS;
    if (candidates > 0) floats = besa__cuda_min(floats, rows * candidates);
    *sums = besa__take_floats(work, floats);
    *part = besa__take_floats(work, floats);
}

/* Groups of many rows: their rows are summed in runs of about 128 first, as far as the scratch goes. */
static besa_result besa__cuda_bucket_rows(besa_backend *be, besa__bucket_rows *from, float *scratch, int64_t groups,
                                          int64_t buckets)
{
    int64_t parts = besa__cuda_min(from->group_rows / 128, BESA__CUDA_RATE_FLOATS / (groups * buckets)), total = groups * parts;
    if (parts < 2) return BESA_OK;
    BESA__RUN(besa__bucket_rows_kernel, total, static_cast<int>(besa__cuda_min(256, besa__cuda_parts(buckets, 32) * 32)), 0,
              scratch, from->sums, from->rows, from->group_rows, parts, total, buckets);
    from->sums = scratch;
    from->rows = total;
    from->group_rows = parts;
    return BESA_OK;
}

/* dtheta_row(G,D+1) and dtheta_layer(D+1), assigned */
static besa_result besa__cuda_rate_backward(besa_backend *be, float *dtheta_layer, float *dtheta_row, const float *sums,
                                            const float *theta_layer, const float *theta_row,
                                            const besa_penalty *penalty, const besa_rate_shape *s)
{
    int64_t groups = besa__cuda_parts(s->rows, s->group_rows), n = s->logits;
    besa__arena work = besa__cuda_work(be);
    besa__bucket_rows from = {sums, s->rows, s->group_rows};
    besa_penalty none = {NULL, 0.0f, 0.0f};
    float *rows, *part;
    besa__cuda_rates_place(&work, &rows, &part, s->rows, n);
    BESA__CUDA_FITS(be, work);
    if (s->layer_scale == 0.0f) theta_layer = dtheta_layer = NULL;
    if (s->row_scale == 0.0f) theta_row = dtheta_row = NULL;
    if (n > 1) BESA__TRY(besa__cuda_bucket_rows(be, &from, rows, groups, n - 1));
    int64_t parts = besa__cuda_min(besa__cuda_min(groups, 8192), BESA__CUDA_RATE_FLOATS / n); /* warps that fill the device */
    int64_t run = besa__cuda_parts(groups, besa__cuda_max(1, parts));
    parts = besa__cuda_parts(groups, run);
    BESA__RUN(besa__rate_backward_kernel, besa__cuda_parts(parts, BESA__CUDA_RATE_WARPS), 32 * BESA__CUDA_RATE_WARPS, 0,
              dtheta_row, dtheta_layer ? part : NULL, from, theta_layer, theta_row, penalty ? *penalty : none, *s, groups,
              run);
    if (!dtheta_layer) return BESA_OK;
    BESA__RUN(besa__rate_layer_kernel, n, BESA__CUDA_THREADS, 0, dtheta_layer, part, theta_layer, parts, *s);
    return BESA_OK;
}

/* ---- the exact count ----------------------------------------------------------------------- */

enum { BESA__CUDA_PROJECT_THREADS = 512 };

/* exact_r = columns sigmoid(logit + shift) of a row */
static __device__ __forceinline__ double besa__exact(double logit, double columns, double shift)
{
    return columns / (1.0 + exp(-(logit + shift)));
}

/* n of a row from exact: its floor within least .. columns */
static __device__ __forceinline__ int64_t besa__whole(double exact, int64_t least, int64_t columns)
{
    return besa__cuda_min(columns, besa__cuda_max(least, static_cast<int64_t>(floor(exact))));
}

/* Numbers of either sign as bits in their order. */
static __device__ __forceinline__ unsigned long long besa__order(double x)
{
    unsigned long long u = static_cast<unsigned long long>(__double_as_longlong(x + 0.0));
    return u >> 63 ? ~u : u | 1ull << 63;
}

/* The rows of project_counts; logit and rest (exact - n) are scratch. Loops take every 512th row: sums are of integers,
 * so that their order does not matter. */
typedef struct besa__project {
    int32_t *n;
    const float *alpha;
    const int32_t *least, *columns;
    double *logit, *rest;
    int64_t rows;
} besa__project;

#define BESA__PROJECT_ROWS(r, p)                                                                   \
    for (int64_t r = threadIdx.x; r < (p).rows; r += blockDim.x)                                   \
        if ((p).columns[r] <= 0) continue;                                                         \
        else

/* The sum of n for one shift. */
static __device__ int64_t besa__project_sum(const besa__project &p, double shift)
{
    int64_t sum = 0;
    BESA__PROJECT_ROWS(r, p)
        sum += besa__whole(besa__exact(p.logit[r], static_cast<double>(p.columns[r]), shift), p.least[r], p.columns[r]);
    return besa__block_sum(sum);
}

/* Rows that could have one more and whose rest is at least `bits` in order; more: above them. */
static __device__ int64_t besa__project_above(const besa__project &p, unsigned long long bits, int more)
{
    int64_t sum = 0;
    BESA__PROJECT_ROWS(r, p)
        if (p.n[r] < p.columns[r]) sum += besa__order(p.rest[r]) >= bits + static_cast<unsigned long long>(more);
    return besa__block_sum(sum);
}

/* One more for each of the `give` rows with the largest rests, ties by row; there are as many rows. */
static __device__ void besa__project_give(const besa__project &p, int64_t give)
{
    unsigned long long bits = 0; /* the largest threshold that `give` rows reach, bit by bit */
    for (int b = 63; b >= 0; b--)
        if (besa__project_above(p, bits | 1ull << b, 0) >= give) bits |= 1ull << b;
    int64_t ties = give - besa__project_above(p, bits, 1);
    for (int64_t first = 0; first < p.rows; first += blockDim.x) { /* ties in the order of rows */
        int64_t r = first + threadIdx.x;
        int open = r < p.rows && p.columns[r] > 0 && p.n[r] < p.columns[r];
        unsigned long long order = open ? besa__order(p.rest[r]) : 0;
        uint32_t tied = open && order == bits, before = besa__block_before(tied);
        int64_t all = besa__block_sum(static_cast<int64_t>(tied));
        if (open && (order > bits || (tied && before < ties))) {
            p.n[r]++;
            p.rest[r] -= 4294967296.0; /* behind all who have had fewer; of its fraction 2^-20 is left */
        }
        ties -= besa__cuda_min(all, besa__cuda_max(ties, 0));
    }
}

/* n(R) whose sum is count, by one block; excess(1) says whether that can be */
static __global__ void __launch_bounds__(BESA__CUDA_PROJECT_THREADS)
    besa__project_counts_kernel(besa__project p, int64_t *excess, int64_t count)
{
    int64_t least = 0, open = 0;
    int wrong = 0;
    BESA__PROJECT_ROWS(r, p) {
        double rate = static_cast<double>(p.alpha[r]);
        wrong += !isfinite(rate);
        rate = rate < 1e-7 ? 1e-7 : rate > 1 - 1e-7 ? 1 - 1e-7 : rate;
        p.logit[r] = log(rate / (1.0 - rate));
        least += p.least[r];
    }
    wrong = besa__block_sum(wrong);
    least = besa__block_sum(least);
    if (threadIdx.x == 0) *excess = wrong ? -1 : besa__cuda_max(0, least - count);
    if (wrong || least > count) return;
    double low = -60.0, high = 60.0;
    for (int i = 0; i < 80; i++) {
        double shift = 0.5 * (low + high);
        if (besa__project_sum(p, shift) <= count) low = shift;
        else high = shift;
    }
    int64_t missing = count - besa__project_sum(p, low);
    BESA__PROJECT_ROWS(r, p) {
        p.rest[r] = besa__exact(p.logit[r], static_cast<double>(p.columns[r]), low);
        p.n[r] = static_cast<int32_t>(besa__whole(p.rest[r], p.least[r], p.columns[r]));
        p.rest[r] -= static_cast<double>(p.n[r]);
    }
    __syncthreads();
    while (missing > 0 && (open = besa__project_above(p, 0, 0)) > 0) {
        besa__project_give(p, besa__cuda_min(open, missing));
        missing -= besa__cuda_min(open, missing);
        __syncthreads();
    }
}

static void besa__cuda_project_place(besa__arena *work, double **logit, double **rest, int64_t rows)
{
    *logit = static_cast<double *>(besa__take(work, static_cast<size_t>(rows) * sizeof(double)));
    *rest = static_cast<double *>(besa__take(work, static_cast<size_t>(rows) * sizeof(double)));
}

static besa_result besa__cuda_project_counts(besa_backend *be, int32_t *n, int64_t *excess, const float *alpha,
                                             const int32_t *least, const int32_t *columns, int64_t count, int64_t rows)
{
    besa__arena work = besa__cuda_work(be);
    besa__project p = {n, alpha, least, columns, NULL, NULL, rows};
    besa__cuda_project_place(&work, &p.logit, &p.rest, rows);
    BESA__CUDA_FITS(be, work);
    BESA__RUN(besa__project_counts_kernel, 1, BESA__CUDA_PROJECT_THREADS, 0, p, excess, count);
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-optimizer        Prodigy, AdamW, kept weights
 * ============================================================================================
 * Prodigy takes two launches: the state and the sums of runs of parameters into fixed slots; then every block adds up
 * all slots in the same order and moves its run. AdamW needs no sums and takes one. */

enum { BESA__CUDA_STEP_PARTS = 1024, BESA__CUDA_STEP_RUN = 2048 /* parameters, at least */ };

/* Eights of this block's run of parameters */
#define BESA__RUN_EIGHTS(i, run, n)                                                                \
    for (int64_t i = blockIdx.x * (run) + 8 * threadIdx.x, end = besa__cuda_min(n, (blockIdx.x + 1) * (run)); i < end; \
         i += 8 * blockDim.x)

static __device__ __forceinline__ float besa__rest(double beta) { return static_cast<float>(1.0 - beta); }

/* theta = keep theta - rate m / (sqrt(v) / root + eps) of eight parameters */
static __device__ __forceinline__ void besa__move(const besa_optimizer_step &o, int64_t i, int count, const float (&m)[8],
                                                  const float (&v)[8], float keep, float rate, float root, float eps,
                                                  int vector)
{
    float x[8];
    besa__load(x, o.theta + i, count, vector);
    BESA__UNROLL
    for (int k = 0; k < 8; k++) x[k] = keep * x[k] - rate * m[k] / (sqrtf(v[k]) / root + eps);
    besa__store(o.theta + i, x, count, vector);
}

/* m = beta1 m + (1-beta1) d g, v = beta2 v + (1-beta2) d^2 g^2, s = beta3 s + gain g, gain = d / d0 * dlr;
 * slots(parts, 2) = sum g (theta0 - theta), sum |s| of each run; then d and numerator as they were */
static __global__ void besa__prodigy_state_kernel(double *slots, besa_optimizer_step o, int64_t run, int vector)
{
    double d = o.scalars[0], gain = d / o.d0 * (d * static_cast<double>(o.lr)), sum[2] = {0.0, 0.0};
    float f = static_cast<float>(d), c1 = f * besa__rest(o.beta1), c2 = f * f * besa__rest(o.beta2);
    float b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2), b3 = static_cast<float>(o.beta3);
    float c3 = static_cast<float>(gain);
    BESA__RUN_EIGHTS(i, run, o.n) {
        int count = besa__count(end - i);
        float g[8], m[8], v[8], s[8], x0[8], x[8];
        besa__load(g, o.grad + i, count, vector);
        besa__load(m, o.m + i, count, vector);
        besa__load(v, o.v + i, count, vector);
        besa__load(s, o.s + i, count, vector);
        besa__load(x0, o.theta0 + i, count, vector);
        besa__load(x, o.theta + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            m[k] = b1 * m[k] + c1 * g[k];
            v[k] = b2 * v[k] + c2 * g[k] * g[k];
            s[k] = b3 * s[k] + c3 * g[k];
            sum[0] += static_cast<double>(g[k]) * static_cast<double>(x0[k] - x[k]);
            sum[1] += static_cast<double>(fabsf(s[k]));
        }
        besa__store(o.m + i, m, count, vector);
        besa__store(o.v + i, v, count, vector);
        besa__store(o.s + i, s, count, vector);
    }
    sum[0] = besa__block_sum(sum[0]);
    sum[1] = besa__block_sum(sum[1]);
    if (threadIdx.x != 0) return;
    slots[2 * blockIdx.x] = sum[0];
    slots[2 * blockIdx.x + 1] = sum[1];
    if (blockIdx.x == 0)
        for (int k = 0; k < BESA_OPTIMIZER_SCALARS; k++) slots[2 * gridDim.x + static_cast<unsigned>(k)] = o.scalars[k];
}

/* num = beta3 num + gain <g, theta0 - theta>, d = max(d, d_coef num / sum |s|); theta -= dlr m / (sqrt(v) + d eps);
 * nothing while sum |s| = 0 */
static __global__ void besa__prodigy_move_kernel(const double *slots, besa_optimizer_step o, int64_t run, int vector)
{
    double sum[2] = {0.0, 0.0};
    for (unsigned p = threadIdx.x; p < gridDim.x; p += blockDim.x) sum[0] += slots[2 * p], sum[1] += slots[2 * p + 1];
    sum[0] = besa__block_sum(sum[0]);
    sum[1] = besa__block_sum(sum[1]);
    if (sum[1] == 0.0) return;
    const double *old = slots + 2 * gridDim.x;
    double d = old[0], dlr = d * static_cast<double>(o.lr);
    double numerator = static_cast<double>(o.beta3) * old[1] + d / o.d0 * dlr * sum[0];
    double estimate = o.d_coef * numerator / sum[1];
    if (estimate > d) d = estimate;
    float keep = static_cast<float>(1.0 - dlr * static_cast<double>(o.weight_decay));
    float eps = static_cast<float>(d * static_cast<double>(o.eps));
    BESA__RUN_EIGHTS(i, run, o.n) {
        int count = besa__count(end - i);
        float m[8], v[8];
        besa__load(m, o.m + i, count, vector);
        besa__load(v, o.v + i, count, vector);
        besa__move(o, i, count, m, v, keep, static_cast<float>(dlr), 1.0f, eps, vector);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) o.scalars[0] = d, o.scalars[1] = numerator;
}

/* m = beta1 m + (1-beta1) g, v = beta2 v + (1-beta2) g^2, theta = keep theta - rate m / (sqrt(v) / root + eps) */
static __global__ void besa__adamw_kernel(besa_optimizer_step o, int64_t run, float keep, float rate, float root, int vector)
{
    float b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2);
    float c1 = besa__rest(o.beta1), c2 = besa__rest(o.beta2);
    BESA__RUN_EIGHTS(i, run, o.n) {
        int count = besa__count(end - i);
        float g[8], m[8], v[8];
        besa__load(g, o.grad + i, count, vector);
        besa__load(m, o.m + i, count, vector);
        besa__load(v, o.v + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            m[k] = b1 * m[k] + c1 * g[k];
            v[k] = b2 * v[k] + c2 * g[k] * g[k];
        }
        besa__store(o.m + i, m, count, vector);
        besa__store(o.v + i, v, count, vector);
        besa__move(o, i, count, m, v, keep, rate, root, static_cast<float>(o.eps), vector);
    }
}

static double *besa__cuda_optimizer_place(besa__arena *work)
{
    return static_cast<double *>(besa__take(work, (2 * BESA__CUDA_STEP_PARTS + 3) * sizeof(double)));
}

/* Parameters of a block's run, a multiple of 8 */
static int64_t besa__cuda_step_run(int64_t n)
{
    return besa__cuda_max(BESA__CUDA_STEP_RUN, besa__cuda_parts(besa__cuda_parts(n, BESA__CUDA_STEP_PARTS), 8) * 8);
}

static besa_result besa__cuda_optimizer_step(besa_backend *be, const besa_optimizer_step *o)
{
    besa__arena work = besa__cuda_work(be);
    double *slots = besa__cuda_optimizer_place(&work);
    int64_t run = besa__cuda_step_run(o->n), parts = besa__cuda_parts(o->n, run);
    int vector = besa__cuda_aligned(o->theta, o->theta0, o->grad, o->m, o->v, o->s);
    BESA__CUDA_FITS(be, work);
    if (o->kind == BESA_PRODIGY) {
        BESA__RUN(besa__prodigy_state_kernel, parts, BESA__CUDA_THREADS, 0, slots, *o, run, vector);
        BESA__RUN(besa__prodigy_move_kernel, parts, BESA__CUDA_THREADS, 0, slots, *o, run, vector);
        return BESA_OK;
    }
    double c1 = 1.0 - pow(static_cast<double>(o->beta1), static_cast<double>(o->step));
    double c2 = 1.0 - pow(static_cast<double>(o->beta2), static_cast<double>(o->step));
    BESA__RUN(besa__adamw_kernel, parts, BESA__CUDA_THREADS, 0, *o, run,
              static_cast<float>(1.0 - static_cast<double>(o->lr) * static_cast<double>(o->weight_decay)),
              static_cast<float>(static_cast<double>(o->lr) / c1), static_cast<float>(sqrt(c2)), vector);
    return BESA_OK;
}

/* See besa_weight_step, without masks. */
static __global__ void besa__vector_step_kernel(besa_weight_step o, float lr, float root, int vector)
{
    float b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2), eps = static_cast<float>(o.eps);
    float c1 = besa__rest(o.beta1), c2 = besa__rest(o.beta2), rate = lr * *o.rms;
    BESA__FLAT(i, o.n) {
        int count = besa__count(o.n - i);
        float g[8], m[8], v[8], w[8];
        besa__load(g, o.grad + i, count, vector);
        besa__load(m, o.m + i, count, vector);
        besa__load(v, o.v + i, count, vector);
        besa__load(w, o.w + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            m[k] = b1 * m[k] + c1 * g[k];
            v[k] = b2 * v[k] + c2 * g[k] * g[k];
            w[k] -= rate * m[k] / (sqrtf(v[k]) / root + eps);
        }
        besa__store(o.m + i, m, count, vector);
        besa__store(o.v + i, v, count, vector);
        besa__store(o.w + i, w, count, vector);
    }
}

/* See besa_weight_step; w is all that there is where T is float, else `source` holds it rounded. */
template <typename T>
static __global__ void besa__weight_step_kernel(besa_weight_step o, float lr, float root, int vector)
{
    float b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2), eps = static_cast<float>(o.eps);
    float c1 = besa__rest(o.beta1), c2 = besa__rest(o.beta2), rate = lr * *o.rms;
    T *masked = static_cast<T *>(o.masked), *source = static_cast<T *>(o.source);
    BESA__FLAT(i, o.n) {
        int count = besa__count(o.n - i);
        float g[8], m[8], v[8], w[8], now[8], old[8];
        besa__load(g, o.grad + i, count, vector);
        besa__load(m, o.m + i, count, vector);
        besa__load(v, o.v + i, count, vector);
        besa__load(w, o.w + i, count, vector);
        besa__load(old, masked + i, count, vector);
        besa__load(now, source + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            float m1 = b1 * m[k] + c1 * g[k], v1 = b2 * v[k] + c2 * g[k] * g[k];
            float w1 = w[k] - rate * m1 / (sqrtf(v1) / root + eps), rounded;
            T put;
            besa__put(put, w1);
            rounded = besa__get(put);
            int kept = old[k] != 0.0f && rounded != 0.0f;
            m[k] = kept ? m1 : m[k];
            v[k] = kept ? v1 : v[k];
            w[k] = kept ? w1 : w[k];
            now[k] = kept ? rounded : now[k];
            old[k] = kept ? rounded : old[k];
        }
        besa__store(o.m + i, m, count, vector);
        besa__store(o.v + i, v, count, vector);
        besa__store(source + i, now, count, vector);
        besa__store(o.w + i, w, count, vector);
        besa__store(masked + i, old, count, vector);
    }
}

static besa_result besa__cuda_weight_step(besa_backend *be, const besa_weight_step *o)
{
    double c1 = 1.0 - pow(static_cast<double>(o->beta1), static_cast<double>(o->step));
    double c2 = 1.0 - pow(static_cast<double>(o->beta2), static_cast<double>(o->step));
    float lr = static_cast<float>(static_cast<double>(o->lr) / c1), root = static_cast<float>(sqrt(c2));
    int vector = besa__cuda_aligned(o->w, o->m, o->v, o->grad, o->masked, o->source);
    if (!o->masked) {
        BESA__RUN(besa__vector_step_kernel, besa__cuda_flat_blocks(o->n), BESA__CUDA_THREADS, 0, *o, lr, root, vector);
        return BESA_OK;
    }
    BESA__BY_DTYPE(o->dtype, T,
        BESA__RUN(besa__weight_step_kernel<T>, besa__cuda_flat_blocks(o->n), BESA__CUDA_THREADS, 0, *o, lr, root, vector));
    return BESA_OK;
}

/* slots(parts) = sums of w^2 of each run */
static __global__ void besa__squares_kernel(double *slots, const float *w, int64_t run, int64_t n, int vector)
{
    double sum = 0.0;
    BESA__RUN_EIGHTS(i, run, n) {
        float x[8];
        int count = besa__count(end - i);
        besa__load(x, w + i, count, vector);
        for (int k = 0; k < count; k++) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    }
    sum = besa__block_sum(sum);
    if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

/* out(1) = sqrt(sum of slots / n), one block */
static __global__ void besa__rms_kernel(float *out, const double *slots, int64_t parts, int64_t n)
{
    double sum = besa__parts_sum(slots, parts);
    if (threadIdx.x == 0) *out = static_cast<float>(sqrt(sum / static_cast<double>(n)));
}

static besa_result besa__cuda_rms(besa_backend *be, float *out, const float *w, int64_t n)
{
    besa__arena work = besa__cuda_work(be);
    double *slots = besa__cuda_optimizer_place(&work);
    int64_t run = besa__cuda_step_run(n), parts = besa__cuda_parts(n, run);
    BESA__CUDA_FITS(be, work);
    BESA__RUN(besa__squares_kernel, parts, BESA__CUDA_THREADS, 0, slots, w, run, n, besa__cuda_aligned(w));
    BESA__RUN(besa__rms_kernel, 1, BESA__CUDA_THREADS, 0, out, slots, parts, n);
    return BESA_OK;
}

/* Y = (1 - share) Y + share X */
template <typename T> static __global__ void besa__mix_kernel(T *y, const T *x, float share, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, y + i, count, vector);
        besa__load(b, x + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) a[k] = (1.0f - share) * a[k] + share * b[k];
        besa__store(y + i, a, count, vector);
    }
}

static besa_result besa__cuda_mix(besa_backend *be, void *y, const void *x, float share, int64_t n)
{
    BESA__BY_ACTIVATION(be, T,
        BESA__RUN(besa__mix_kernel<T>, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, static_cast<T *>(y),
                  static_cast<const T *>(x), share, n, besa__cuda_aligned(y, x)));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-quantization     weights on a grid of levels
 * ============================================================================================
 * A warp a group of columns: memory-bound, each weight is read once. */

/* Over the groups of rows(R) that this warp takes; what group i is: where it begins, and its columns. */
#define BESA__GROUPS(i, count)                                                                     \
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * besa__warps() + besa__warp(); i < (count); \
         i += static_cast<int64_t>(gridDim.x) * besa__warps())

typedef struct besa__group {
    int64_t at, columns;
} besa__group;

static __device__ __forceinline__ besa__group besa__group_of(int64_t i, int64_t columns, int64_t group)
{
    int64_t groups = besa__cuda_parts(columns, group), first = i % groups * group;
    besa__group g = {i / groups * columns + first, besa__cuda_min(group, columns - first)};
    return g;
}

/* Warps of a block, and blocks for so many groups. */
enum { BESA__CUDA_GROUP_WARPS = 8 };
static int64_t besa__cuda_group_blocks(int64_t count) { return besa__cuda_parts(count, BESA__CUDA_GROUP_WARPS); }

template <typename T>
static __global__ void besa__quantize_range_kernel(float *range, const T *w, int64_t group, int64_t count, int64_t columns)
{
    BESA__GROUPS(i, count) {
        besa__group g = besa__group_of(i, columns, group);
        float high = 0.0f, low = 0.0f;
        for (int64_t j = besa__lane(); j < g.columns; j += 32) {
            float x = besa__get(w[g.at + j]);
            high = high < x ? x : high;
            low = low > x ? x : low;
        }
        high = besa__warp_max(high);
        low = -besa__warp_max(-low);
        if (besa__lane() == 0) range[2 * i] = high, range[2 * i + 1] = low;
    }
}

static besa_result besa__cuda_quantize_range(besa_backend *be, float *range, const void *w, besa_dtype dtype, int64_t group,
                                             int64_t rows, int64_t columns)
{
    int64_t count = rows * besa__cuda_parts(columns, group);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__quantize_range_kernel<T>, besa__cuda_group_blocks(count), 32 * BESA__CUDA_GROUP_WARPS, 0, range,
                  static_cast<const T *>(w), group, count, columns));
    return BESA_OK;
}

/* scale, zero of groups i .. i + 7 of `count`; a thread eight groups */
static __global__ void besa__quantize_grid_kernel(besa_quantizer q, float most, int64_t count)
{
    BESA__FLAT(i0, count)
        for (int64_t i = i0; i < besa__cuda_min(count, i0 + 8); i++) {
            float g0 = q.logit ? besa__cuda_sigmoid(q.logit[2 * i]) : 1.0f;
            float g1 = q.logit ? besa__cuda_sigmoid(q.logit[2 * i + 1]) : 1.0f;
            float low = g1 * q.range[2 * i + 1], h = (g0 * q.range[2 * i] - low) / most;
            q.scale[i] = h > 0.0f ? h : 0.0f;
            q.zero[i] = h > 0.0f ? rintf(-low / h) : 0.0f;
        }
}

static float besa__cuda_most(const besa_quantizer *q) { return static_cast<float>((1 << q->bits) - 1); }

static int64_t besa__cuda_groups(const besa_quantizer *q) { return q->rows * besa__cuda_parts(q->columns, q->group); }

static besa_result besa__cuda_quantize_grid(besa_backend *be, const besa_quantizer *q)
{
    int64_t count = besa__cuda_groups(q);
    BESA__RUN(besa__quantize_grid_kernel, besa__cuda_flat_blocks(count), BESA__CUDA_THREADS, 0, *q, besa__cuda_most(q), count);
    return BESA_OK;
}

/* The place u of x on the grid, kept within one of its ends: -1 .. most + 1; what x / h is there goes to t. */
static __device__ __forceinline__ float besa__cuda_grid_place(float x, float h, float z, float most, float &t)
{
    float low = -1.0f - z, high = most + 1.0f - z;
    t = x / h;
    t = t < low ? low : t > high ? high : t; /* NaN stays */
    return rintf(t) + z;
}

static __device__ __forceinline__ float besa__cuda_level(float u, float z, float most)
{
    return (u < 0.0f ? 0.0f : u > most ? most : u) - z;
}

template <typename T>
static __global__ void besa__quantize_kernel(T *what, const T *w, besa_quantizer q, float most, int64_t count)
{
    BESA__GROUPS(i, count) {
        besa__group g = besa__group_of(i, q.columns, q.group);
        float h = q.scale[i], z = q.zero[i], t;
        for (int64_t j = besa__lane(); j < g.columns; j += 32) {
            float u = besa__cuda_grid_place(besa__get(w[g.at + j]), h, z, most, t);
            besa__put(what[g.at + j], h > 0.0f ? h * besa__cuda_level(u, z, most) : 0.0f);
        }
    }
}

static besa_result besa__cuda_quantize(besa_backend *be, void *what, const void *w, besa_dtype dtype, const besa_quantizer *q)
{
    int64_t count = besa__cuda_groups(q);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__quantize_kernel<T>, besa__cuda_group_blocks(count), 32 * BESA__CUDA_GROUP_WARPS, 0,
                  static_cast<T *>(what), static_cast<const T *>(w), *q, besa__cuda_most(q), count));
    return BESA_OK;
}

template <typename T>
static __global__ void besa__quantize_gradient_kernel(float *dlogit, const float *dw, const T *w, besa_quantizer q, float most,
                                                      int64_t count)
{
    BESA__GROUPS(i, count) {
        besa__group g = besa__group_of(i, q.columns, q.group);
        float h = q.scale[i], z = q.zero[i], sum = 0.0f, t;
        for (int64_t j = besa__lane(); j < g.columns && h > 0.0f; j += 32) {
            float u = besa__cuda_grid_place(besa__get(w[g.at + j]), h, z, most, t);
            sum += dw[g.at + j] * (u > 0.0f && u < most ? u - z - t : besa__cuda_level(u, z, most));
        }
        sum = besa__warp_sum(sum);
        if (besa__lane() != 0) continue;
        float g0 = besa__cuda_sigmoid(q.logit[2 * i]), g1 = besa__cuda_sigmoid(q.logit[2 * i + 1]);
        dlogit[2 * i] += sum * (q.range[2 * i] * g0 * (1.0f - g0) / most);
        dlogit[2 * i + 1] -= sum * (q.range[2 * i + 1] * g1 * (1.0f - g1) / most);
    }
}

static besa_result besa__cuda_quantize_gradient(besa_backend *be, float *dlogit, const float *dw, const void *w,
                                                besa_dtype dtype, const besa_quantizer *q)
{
    int64_t count = besa__cuda_groups(q);
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__quantize_gradient_kernel<T>, besa__cuda_group_blocks(count), 32 * BESA__CUDA_GROUP_WARPS, 0, dlogit, dw,
                  static_cast<const T *>(w), *q, besa__cuda_most(q), count));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-sparsegpt        factor of the inverse Hessian, slabs
 * ============================================================================================
 * SparseGPT, arXiv 2301.00774, all in float. H = W'W with W lower triangular, Z = W^-1, U = Z': then U'U = inv(H). In
 * cuBLAS's column-major eyes the lower triangle is the upper one of V = W', H = V V'. */

enum { BESA__CUDA_FACTOR = 64 /* columns of a diagonal block */ };

/* dead(C), ones on the diagonal there, then damping * mean(diag) on all of it; one block */
static __global__ void __launch_bounds__(1024) besa__hessian_damp_kernel(float *h, int32_t *dead, float damping, int64_t columns)
{
    double sum = 0.0;
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
        float diagonal = h[j * columns + j];
        dead[j] = diagonal == 0.0f;
        sum += dead[j] ? 1.0 : static_cast<double>(diagonal);
    }
    sum = besa__block_sum(sum);
    float add = static_cast<float>(static_cast<double>(damping) * sum / static_cast<double>(columns));
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x)
        h[j * columns + j] = (dead[j] ? 1.0f : h[j * columns + j]) + add;
}

/* In place D(n,n) -> W, D = W'W, lower triangles, at column i0 of H; one block. bad_pivot(2): see besa__cuda. */
static __global__ void besa__factor_block_kernel(float *h, int64_t columns, int64_t i0, int n, int64_t *bad_pivot)
{
    BESA__SHARED_ARRAY(float, d, BESA__CUDA_FACTOR *(BESA__CUDA_FACTOR + 1));
    const int step = BESA__CUDA_FACTOR + 1, t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float *block = h + i0 * columns + i0;
    for (int e = t; e < n * n; e += threads) d[e / n * step + e % n] = block[e / n * columns + e % n];
    __syncthreads();
    for (int p = n - 1; p >= 0; p--) {
        float pivot = d[p * step + p];
        int bad = !(pivot > 0.0f) || pivot > 3.0e38f;
        float root = bad ? 1.0f : sqrtf(pivot);
        __syncthreads();
        for (int j = t; j <= p; j += threads) d[p * step + j] = j == p ? root : d[p * step + j] * (1.0f / root);
        if (bad && t == 0 && bad_pivot[0] == 0) bad_pivot[0] = i0 + p + 1, bad_pivot[1] = columns;
        __syncthreads();
        for (int e = t; e < p * p; e += threads)
            if (e % p <= e / p) d[e / p * step + e % p] -= d[p * step + e / p] * d[p * step + e % p];
        __syncthreads();
    }
    for (int e = t; e < n * n; e += threads)
        if (e % n <= e / n) block[e / n * columns + e % n] = d[e / n * step + e % n];
}

/* In place W(n,n) -> W^-1, lower triangular, at column i0; one block, a thread a column of the inverse */
static __global__ void besa__invert_block_kernel(float *h, int64_t columns, int64_t i0, int n)
{
    BESA__SHARED_ARRAY(float, w, BESA__CUDA_FACTOR *(BESA__CUDA_FACTOR + 1));
    BESA__SHARED_ARRAY(float, z, BESA__CUDA_FACTOR *(BESA__CUDA_FACTOR + 1));
    const int step = BESA__CUDA_FACTOR + 1, t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float *block = h + i0 * columns + i0;
    for (int e = t; e < n * n; e += threads) w[e / n * step + e % n] = block[e / n * columns + e % n];
    __syncthreads();
    for (int j = t; j < n; j += threads)
        for (int i = j; i < n; i++) {
            float sum = i == j ? 1.0f : 0.0f;
            for (int k = j; k < i; k++) sum -= w[i * step + k] * z[k * step + j];
            z[i * step + j] = sum / w[i * step + i];
        }
    __syncthreads();
    for (int e = t; e < n * n; e += threads)
        if (e % n <= e / n) block[e / n * columns + e % n] = z[e / n * step + e % n];
}

/* H = Z' above the diagonal, from Z on and below it, and below zeros, or (keep) what is there; a block of 256 threads for two
 * mirrored tiles 32 x 32 */
static __global__ void besa__transpose_kernel(float *h, int64_t columns, int64_t tiles, int keep)
{
    BESA__SHARED_ARRAY(float, tile, 32 * 33);
    BESA__ROWS(b, tiles * tiles) {
        int64_t i0 = b / tiles * 32, j0 = b % tiles * 32;
        int64_t x = threadIdx.x % 32, y0 = threadIdx.x / 32;
        if (i0 > j0) continue;
        for (int64_t y = y0; y < 32; y += 8)
            if (j0 + y < columns && i0 + x < columns) tile[y * 33 + x] = h[(j0 + y) * columns + i0 + x];
        __syncthreads();
        for (int64_t y = y0; y < 32; y += 8) {
            int upper = i0 + y <= j0 + x;
            if (i0 + y < columns && j0 + x < columns && (upper || !keep))
                h[(i0 + y) * columns + j0 + x] = upper ? tile[x * 33 + y] : 0.0f;
            if (i0 < j0 && !keep && j0 + y < columns && i0 + x < columns) h[(j0 + y) * columns + i0 + x] = 0.0f;
        }
        __syncthreads();
    }
}

/* H -> W, blocks of rows from the last to the first: W_bb by a kernel, W_b = (W_bb')^-1 H_b left of it, and what is above
 * loses W_b' W_b. */
static besa_result besa__cuda_factor_lower(besa_backend *be, float *h, int64_t columns)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    const float one = 1.0f, minus_one = -1.0f;
    int ld = static_cast<int>(columns);
    for (int64_t i0 = (columns - 1) / BESA__CUDA_FACTOR * BESA__CUDA_FACTOR; i0 >= 0; i0 -= BESA__CUDA_FACTOR) {
        int n = static_cast<int>(besa__cuda_min(BESA__CUDA_FACTOR, columns - i0)), above = static_cast<int>(i0);
        float *rows = h + i0 * columns;
        BESA__RUN(besa__factor_block_kernel, 1, BESA__CUDA_THREADS, 0, h, columns, i0, n, cuda->bad_pivot);
        if (i0 == 0) break;
        BESA__CUBLAS(cublasStrsm(cuda->blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T, CUBLAS_DIAG_NON_UNIT,
                                 above, n, &one, rows + i0, ld, rows, ld));
        BESA__CUBLAS(cublasSsyrk(cuda->blas, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, above, n, &minus_one, rows, ld, &one, h,
                                 ld));
    }
    return BESA_OK;
}

/* W -> Z = W^-1, blocks of rows from the first to the last: Z_b = -W_bb^-1 W_b Z_before left of the diagonal block */
static besa_result besa__cuda_invert_lower(besa_backend *be, float *h, int64_t columns)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    const float one = 1.0f, minus_one = -1.0f;
    int ld = static_cast<int>(columns);
    for (int64_t i0 = 0; i0 < columns; i0 += BESA__CUDA_FACTOR) {
        int n = static_cast<int>(besa__cuda_min(BESA__CUDA_FACTOR, columns - i0)), before = static_cast<int>(i0);
        float *rows = h + i0 * columns;
        if (i0 > 0) {
            BESA__CUBLAS(cublasStrmm(cuda->blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                                     CUBLAS_DIAG_NON_UNIT, before, n, &one, h, ld, rows, ld, rows, ld));
            BESA__CUBLAS(cublasStrsm(cuda->blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                                     CUBLAS_DIAG_NON_UNIT, before, n, &minus_one, rows + i0, ld, rows, ld));
        }
        BESA__RUN(besa__invert_block_kernel, 1, BESA__CUDA_FACTOR, 0, h, columns, i0, n);
    }
    return BESA_OK;
}

/* H(C,C) -> U, U'U = inv(H + damping mean(diag)) */
static besa_result besa__cuda_hessian_factor(besa_backend *be, float *h, int32_t *dead, float damping, int64_t columns)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    int64_t tiles = besa__cuda_parts(columns, 32);
    if (columns < 1) return BESA_OK;
    BESA__TRY(besa__cuda_fits_int(be, columns, 0, 0, 0));
    BESA__TRY(besa__cuda_blas_workspace(be));
    BESA__RUN(besa__hessian_damp_kernel, 1, 1024, 0, h, dead, damping, columns);
    BESA__TRY(besa__cuda_factor_lower(be, h, columns));
    BESA__TRY(besa__cuda_invert_lower(be, h, columns));
    BESA__RUN(besa__transpose_kernel, tiles * tiles, 256, 0, h, columns, tiles, 0);
    return besa__cuda_download(be, BESA_QUEUE_COMPUTE, cuda->bad_pivot_host, cuda->bad_pivot, 2 * sizeof(int64_t));
}

/* diag(C) = U_jj, +infinity where dead */
static __global__ void besa__diagonal_kernel(float *diag, const float *u, const int32_t *dead, int64_t columns)
{
    BESA__FLAT(i, columns)
        for (int64_t j = i; j < besa__cuda_min(columns, i + 8); j++)
            diag[j] = dead && dead[j] ? INFINITY : u[j * columns + j];
}

static besa_result besa__cuda_diagonal(besa_backend *be, float *diag, const float *u, const int32_t *dead, int64_t columns)
{
    BESA__RUN(besa__diagonal_kernel, besa__cuda_flat_blocks(columns), BESA__CUDA_THREADS, 0, diag, u, dead, columns);
    return BESA_OK;
}

/* A slab: columns first .. first+width-1 of Wf(R,C) */
typedef struct besa__slab {
    float *w, *err;                    /* row 0 of the slab, rows `columns` apart; (R, width) */
    const float *u;                    /* (width, width) on U's diagonal, rows `columns` apart */
    const float *scale;                /* (width) = 1 / U_jj^2 */
    const int32_t *dead;               /* (width); NULL: none */
    int64_t width, rows, columns;
    int n, m;
    const float *kept;                 /* row 0, rows `columns` apart: what is 0 here goes; NULL: as n, m and scores say */
    besa_quantizer q;                  /* bits 0: kept weights stay as they are */
    int64_t first;                     /* column of Wf */
} besa__slab;

/* scale(width) = 1 / U_jj^2 */
static __global__ void besa__slab_scale_kernel(float *scale, besa__slab slab)
{
    for (int64_t j = threadIdx.x; j < slab.width; j += blockDim.x) {
        float u = slab.u[j * slab.columns + j];
        scale[j] = 1.0f / (u * u);
    }
}

/* go[i] = 1 for the n smallest w^2 scale of columns first .. first+m-1, as far as the slab reaches; a lane a column */
static __device__ void besa__slab_group(const besa__slab &slab, float *go, const float *w, int64_t first)
{
    int64_t end = besa__cuda_min(slab.width, first + slab.m);
    for (int64_t j = first + besa__lane(); j < end; j += 32) {
        float s = w[j] * w[j] * slab.scale[j];
        int place = 0;
        for (int64_t i = first; i < end; i++) {
            float other = w[i] * w[i] * slab.scale[i];
            place += other < s || (i < j && !(other > s));
        }
        go[j] = place < slab.n ? 1.0f : 0.0f;
    }
    __syncwarp();
}

/* What stays of a kept weight in column i of the slab. */
static __device__ __forceinline__ float besa__slab_stays(const besa__slab &slab, float w, int64_t row, int64_t i)
{
    if (slab.q.bits == 0) return w;
    int64_t g = row * besa__cuda_parts(slab.columns, slab.q.group) + (slab.first + i) / slab.q.group;
    float h = slab.q.scale[g], z = slab.q.zero[g], most = static_cast<float>((1 << slab.q.bits) - 1), t;
    float u = besa__cuda_grid_place(w, h, z, most, t);
    return h > 0.0f ? h * besa__cuda_level(u, z, most) : 0.0f;
}

/* A warp a row, columns from left to right: the error e = (w - what stays of it) / U_ii is taken off the later columns along
 * U[i, i+1:]. Shared memory has the row's weights and, in go, which of them go; column i's error takes its flag's place. */
static __global__ void besa__sparsegpt_slab_kernel(besa__slab slab, const besa__select *select)
{
    BESA__SHARED(float, shared);
    float *w = shared + 2 * slab.width * besa__warp(), *go = w + slab.width;
    int64_t width = slab.width;
    uint32_t threshold = slab.m > 0 || slab.kept ? 0u : select->prefix;
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * besa__warps() + besa__warp(); r < slab.rows;
         r += static_cast<int64_t>(gridDim.x) * besa__warps()) {
        for (int64_t j = besa__lane(); j < width; j += 32) {
            int dead = slab.dead && slab.dead[j];
            w[j] = dead ? 0.0f : slab.w[r * slab.columns + j];
            int goes = slab.kept ? slab.kept[r * slab.columns + j] == 0.0f
                                 : slab.m == 0 && besa__key(w[j] * w[j] * slab.scale[j]) <= threshold;
            go[j] = goes ? 1.0f : 0.0f;
        }
        __syncwarp();
        for (int64_t i = 0; i < width; i++) {
            const float *u = slab.u + i * slab.columns;
            if (slab.m > 0 && i % slab.m == 0) besa__slab_group(slab, go, w, i);
            float stays = go[i] != 0.0f ? 0.0f : besa__slab_stays(slab, w[i], r, i), e = (w[i] - stays) / u[i];
            if (e != 0.0f)
                for (int64_t j = i + 1 + besa__lane(); j < width; j += 32) w[j] -= e * u[j];
            __syncwarp();
            if (besa__lane() == 0) {
                go[i] = e;
                w[i] = stays;
            }
        }
        __syncwarp();
        for (int64_t j = besa__lane(); j < width; j += 32) {
            slab.w[r * slab.columns + j] = w[j];
            slab.err[r * width + j] = go[j];
        }
        __syncwarp();
    }
}

static besa_result besa__cuda_slab_run(besa_backend *be, const besa__slab &slab, const besa__select *select)
{
    int64_t row_bytes = 2 * slab.width * static_cast<int64_t>(sizeof(float)), warps = besa__cuda_min(8, 49152 / row_bytes);
    if (warps < 1)
        return besa__fail(&be->error, BESA_ERROR_UNSUPPORTED, "a slab of %lld columns: at most 6144 on CUDA",
                          static_cast<long long>(slab.width));
    BESA__RUN(besa__sparsegpt_slab_kernel, besa__cuda_parts(slab.rows, warps), 32 * warps,
              static_cast<size_t>(warps * row_bytes), slab, select);
    return BESA_OK;
}

static besa__select *besa__cuda_slab_place(besa__arena *work, float **scale, int64_t width)
{
    *scale = besa__take_floats(work, width);
    return besa__cuda_select_place(work);
}

/* Columns first .. first+width-1 of Wf(R,C) */
static besa_result besa__cuda_sparsegpt_slab(besa_backend *be, float *wf, float *err, const float *u,
                                             const int32_t *dead, int64_t first, int64_t width, double target, int n,
                                             int m, const besa_quantizer *q, int64_t rows, int64_t columns)
{
    besa__arena work = besa__cuda_work(be);
    float *scale;
    besa__select *select = besa__cuda_slab_place(&work, &scale, width);
    const besa_quantizer none = {0, 0, 0, 0, NULL, NULL, NULL, NULL};
    besa__slab slab = {wf + first, err, u + first * columns + first, scale, dead + first, width, rows, columns, n, m,
                       NULL, q ? *q : none, first};
    besa__slab_keys keys = {slab.w, scale, slab.dead, columns};
    BESA__CUDA_FITS(be, work);
    BESA__RUN(besa__slab_scale_kernel, 1, BESA__CUDA_THREADS, 0, scale, slab);
    if (m == 0) {
        double place = floor(static_cast<double>(width) * static_cast<double>(rows) * target);
        BESA__TRY(besa__cuda_select(be, select, keys, rows, width,
                                    besa__cuda_min(static_cast<int64_t>(place), width * rows - 1)));
    }
    return besa__cuda_slab_run(be, slab, select);
}

/* The same where what is 0 in kept(R,C) goes */
static besa_result besa__cuda_sparsegpt_given(besa_backend *be, float *wf, float *err, const float *u, const float *kept,
                                              int64_t first, int64_t width, int64_t rows, int64_t columns)
{
    const besa_quantizer none = {0, 0, 0, 0, NULL, NULL, NULL, NULL};
    besa__slab slab = {wf + first, err, u + first * columns + first, NULL, NULL, width, rows, columns, 0, 0, kept + first, none,
                       first};
    return besa__cuda_slab_run(be, slab, NULL);
}

/* Wf[:, first+width:] -= err(R,width) U[first:first+width, first+width:] */
static besa_result besa__cuda_sparsegpt_push(besa_backend *be, float *wf, const float *err, const float *u,
                                             int64_t first, int64_t width, int64_t rows, int64_t columns)
{
    int64_t next = first + width;
    besa__cuda_product p = besa__cuda_product_of(be, rows, columns - next, width);
    p.type = BESA_F32;
    p.alpha = -1.0f;
    besa__cuda_operand_a(&p, err, width, 0);
    besa__cuda_operand_b(&p, u + first * columns + next, columns, 0);
    besa__cuda_result_c(&p, wf + next, BESA_F32, columns, 1);
    return besa__cuda_multiply(be, &p);
}

/* ============================================================================================
 * // >>cuda-refit            kept weights fitted anew: steps of conjugate gradients
 * ============================================================================================
 * All in float. Rows are systems of their own: a block takes a row. */

/* damping * mean(diag) onto the diagonal, scale(C) = 1 / H_jj or 0; one block */
static __global__ void __launch_bounds__(1024) besa__hessian_whole_kernel(float *h, float *scale, float damping,
                                                                          int64_t columns)
{
    double sum = 0.0;
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) sum += static_cast<double>(h[j * columns + j]);
    sum = besa__block_sum(sum);
    float add = static_cast<float>(static_cast<double>(damping) * sum / static_cast<double>(columns));
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
        float diagonal = h[j * columns + j] + add;
        h[j * columns + j] = diagonal;
        scale[j] = diagonal != 0.0f ? 1.0f / diagonal : 0.0f;
    }
}

/* H(C,C): the lower triangle to both, and its diagonal damped */
static besa_result besa__cuda_hessian_whole(besa_backend *be, float *h, float *scale, float damping, int64_t columns)
{
    int64_t tiles = besa__cuda_parts(columns, 32);
    if (columns < 1) return BESA_OK;
    BESA__RUN(besa__hessian_whole_kernel, 1, 1024, 0, h, scale, damping, columns);
    BESA__RUN(besa__transpose_kernel, tiles * tiles, 256, 0, h, columns, tiles, 1);
    return BESA_OK;
}

/* Y(R,C) = X(R,C) H(C,C) */
static besa_result besa__cuda_hessian_product(besa_backend *be, float *y, const float *x, const float *h, int64_t rows,
                                              int64_t columns)
{
    besa__cuda_product p = besa__cuda_product_of(be, rows, columns, columns);
    p.type = BESA_F32;
    besa__cuda_operand_a(&p, x, columns, 0);
    besa__cuda_operand_b(&p, h, columns, 0);
    besa__cuda_result_c(&p, y, BESA_F32, columns, 0);
    return besa__cuda_multiply(be, &p);
}

/* x = What, p = W - What */
template <typename T>
static __global__ void besa__refit_begin_kernel(float *x, float *p, const T *w, const T *what, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, w + i, count, vector);
        besa__load(b, what + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) a[k] -= b[k];
        besa__store(x + i, b, count, vector);
        besa__store(p + i, a, count, vector);
    }
}

static besa_result besa__cuda_refit_begin(besa_backend *be, float *x, float *p, const void *w, const void *what,
                                          besa_dtype dtype, int64_t n)
{
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__refit_begin_kernel<T>, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, x, p,
                  static_cast<const T *>(w), static_cast<const T *>(what), n, besa__cuda_aligned(x, p, w, what)));
    return BESA_OK;
}

/* A row's alpha = rho / p'q, for every thread of the block; 0: it stops */
static __device__ float besa__refit_alpha(const float *p, const float *q, float rho, float rho0, int64_t columns, int vector)
{
    float sum = 0.0f;
    BESA__EIGHTS(c, columns) {
        int count = besa__count(columns - c);
        float a[8], b[8];
        besa__load(a, p + c, count, vector);
        besa__load(b, q + c, count, vector);
        for (int k = 0; k < 8; k++) sum += a[k] * b[k];
    }
    sum = besa__block_sum(sum);
    float alpha = sum > 1e-30f && rho > 1e-14f * rho0 ? rho / sum : 0.0f;
    return alpha > 0.0f && alpha < 3.0e38f ? alpha : 0.0f;
}

/* See besa_refit_step; a block a row */
static __global__ void besa__refit_step_kernel(besa_refit_step o, int vector)
{
    BESA__ROWS(row, o.rows) {
        float *x = o.x + row * o.columns, *r = o.r + row * o.columns, *p = o.p + row * o.columns, sum = 0.0f;
        const float *q = o.q + row * o.columns;
        float rho = o.first ? 0.0f : o.rho[row], rho0 = o.first ? 0.0f : o.rho[o.rows + row];
        float alpha = o.first ? 0.0f : besa__refit_alpha(p, q, rho, rho0, o.columns, vector); /* when all threads have read rho */
        if (!o.first && alpha == 0.0f) {
            if (threadIdx.x == 0) o.rho[row] = 0.0f;
            continue;
        }
        BESA__EIGHTS(c, o.columns) {
            int count = besa__count(o.columns - c);
            float a[8], b[8], d[8], e[8], z[8];
            besa__load(a, x + c, count, vector);
            besa__load(e, q + c, count, vector);
            besa__load(z, o.scale + c, count, vector);
            if (!o.first) besa__load(b, r + c, count, vector);
            if (!o.first) besa__load(d, p + c, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) {
                int kept = a[k] != 0.0f;
                float moved = o.first ? a[k] : a[k] + alpha * d[k], left = o.first ? e[k] : b[k] - alpha * e[k];
                a[k] = kept ? (moved != 0.0f ? moved : 1.17549435e-38f) : a[k];
                b[k] = kept ? left : 0.0f;
                sum += b[k] * b[k] * z[k];
            }
            if (!o.first) besa__store(x + c, a, count, vector);
            besa__store(r + c, b, count, vector);
        }
        float now = besa__block_sum(sum), beta = o.first ? 0.0f : now / rho;
        BESA__EIGHTS(c, o.columns) {
            int count = besa__count(o.columns - c);
            float b[8], d[8], z[8];
            besa__load(b, r + c, count, vector);
            besa__load(z, o.scale + c, count, vector);
            if (beta != 0.0f) besa__load(d, p + c, count, vector);
            BESA__UNROLL
            for (int k = 0; k < 8; k++) b[k] = z[k] * b[k] + (beta != 0.0f ? beta * d[k] : 0.0f);
            besa__store(p + c, b, count, vector);
        }
        if (threadIdx.x == 0) o.rho[row] = now;
        if (threadIdx.x == 0 && o.first) o.rho[o.rows + row] = now;
    }
}

static besa_result besa__cuda_refit_step(besa_backend *be, const besa_refit_step *o)
{
    int vector = o->columns % 8 == 0 && besa__cuda_aligned(o->x, o->r, o->p, o->q, o->scale);
    BESA__RUN(besa__refit_step_kernel, o->rows, besa__cuda_row_threads(o->columns), 0, *o, vector);
    return BESA_OK;
}

/* What = x, rounded, where it is not 0, unless that is 0 */
template <typename T> static __global__ void besa__refit_end_kernel(T *what, const float *x, int64_t n, int vector)
{
    BESA__FLAT(i, n) {
        int count = besa__count(n - i);
        float a[8], b[8];
        besa__load(a, x + i, count, vector);
        besa__load(b, what + i, count, vector);
        BESA__UNROLL
        for (int k = 0; k < 8; k++) {
            T put;
            besa__put(put, a[k]);
            float rounded = besa__get(put), kept = rounded != 0.0f ? rounded : b[k];
            b[k] = b[k] != 0.0f ? kept : 0.0f;
        }
        besa__store(what + i, b, count, vector);
    }
}

static besa_result besa__cuda_refit_end(besa_backend *be, void *what, const float *x, besa_dtype dtype, int64_t n)
{
    BESA__BY_DTYPE(dtype, T,
        BESA__RUN(besa__refit_end_kernel<T>, besa__cuda_flat_blocks(n), BESA__CUDA_THREADS, 0, static_cast<T *>(what), x, n,
                  besa__cuda_aligned(what, x)));
    return BESA_OK;
}

/* ============================================================================================
 * // >>cuda-backend          the table, creation, the end
 * ============================================================================================ */

/* The most scratch that any operation takes, and behind it cuBLAS's. */
static size_t besa__cuda_workspace_size(besa_backend *be, const besa_workload *w)
{
    const besa__cuda *cuda = besa__cuda_of(be);
    float *a, *b;
    double *part, *rest;
    long long *ties;
    size_t most = besa__cuda_attention_bytes(be, w);
#define BESA__PLACED(call)                                                                         \
    do {                                                                                           \
        besa__arena work = {NULL, 0};                                                              \
        call;                                                                                      \
        if (work.used > most) most = work.used;                                                    \
    } while (0)
    if (w->tokens > 0) BESA__PLACED(besa__cuda_panel_place(be, &work, w->rows, w->columns));
    BESA__PLACED(besa__cuda_column_sumsq_place(&work, w->columns));
    BESA__PLACED(besa__cuda_block_loss_place(&work, &a, &part, w->columns));
    BESA__PLACED(besa__cuda_mask_smallest_place(&work, &ties, w->rows));
    BESA__PLACED(besa__cuda_sort_place(cuda, &work, w->rows, w->columns));
    BESA__PLACED(besa__cuda_rates_place(&work, &a, &b, w->rows, w->rate_logits));
    BESA__PLACED(besa__cuda_optimizer_place(&work));
    BESA__PLACED(besa__cuda_slab_place(&work, &a, w->hessian_columns));
    BESA__PLACED(besa__cuda_project_place(&work, &part, &rest, w->projected_rows));
#undef BESA__PLACED
    return most + (w->tokens > 0 || w->hessian_columns > 0 ? cuda->blas_bytes : 0);
}

static void besa__cuda_destroy(besa_backend *be)
{
    besa__cuda *cuda = besa__cuda_of(be);
    if (cuda) {
        cudaSetDevice(cuda->device);
        for (int i = 0; i < BESA_QUEUE_COUNT; i++)
            if (cuda->stream[i]) cudaStreamSynchronize(cuda->stream[i]); /* the workspace may go next */
        if (cuda->blas) cublasDestroy(cuda->blas);
        for (int i = 0; i < BESA_EVENT_COUNT; i++)
            if (cuda->event[i]) cudaEventDestroy(cuda->event[i]);
        for (int i = 0; i < BESA_QUEUE_COUNT; i++)
            if (cuda->stream[i]) cudaStreamDestroy(cuda->stream[i]);
        if (cuda->bad_pivot) cudaFree(cuda->bad_pivot);
        if (cuda->bad_pivot_host) cudaFreeHost(cuda->bad_pivot_host);
        BESA_FREE(cuda);
    }
    memset(be, 0, sizeof *be);
}

/* Find the device and read what the operations want to know of it. */
static besa_result besa__cuda_open_device(besa_backend *be, const besa_cuda_options *options)
{
    besa__cuda *cuda = besa__cuda_of(be);
    int count = 0, major, shared, wanted = options ? options->device : 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (status != cudaSuccess || count == 0)
        return besa__fail(&be->error, BESA_ERROR_DEVICE, "no CUDA device: %s",
                          status == cudaErrorInsufficientDriver ? "there is no NVIDIA driver, or it is older than this CUDA toolkit"
                          : status != cudaSuccess ? cudaGetErrorString(status) : "the driver lists none");
    if (wanted < 0 || wanted >= count)
        return besa__fail(&be->error, BESA_ERROR_DEVICE, "CUDA device %d does not exist: there are devices 0 .. %d", wanted,
                          count - 1);
    cuda->device = wanted;
    BESA__CUDA(cudaSetDevice(wanted));
    BESA__CUDA(cudaDeviceGetAttribute(&cuda->processors, cudaDevAttrMultiProcessorCount, wanted));
    BESA__CUDA(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, wanted));
    BESA__CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, wanted));
    if (major < 7)
        return besa__fail(&be->error, BESA_ERROR_UNSUPPORTED, "CUDA device %d has compute capability %d.x, expected 7.0 or "
                          "more", wanted, major);
    cuda->shared_limit = static_cast<size_t>(shared > 49152 ? shared : 49152) - 1024; /* kernels keep up to 1 KB */
    cuda->blas_bytes = static_cast<size_t>(major >= 9 ? 32 : 8) << 20;               /* as cuBLAS recommends */
    cuda->panel = 1 << 25;
    cuda->queries = 512;
    cuda->query_rows = 64 * cuda->processors;                                        /* a tile of 128 for every other one */
    cuda->score_bytes = static_cast<size_t>(cuda->processors) * 3 << 20;
    be->gradient_bytes = static_cast<size_t>(256) << 20;
    be->activation_dtype = be->gradient_dtype = major < 8 || (options && options->fp32) ? BESA_F32 : BESA_BF16;
    return BESA_OK;
}

/* Streams, events, cuBLAS; a first launch, which fails if the kernels were not compiled for this device. */
static besa_result besa__cuda_open(besa_backend *be, const besa_cuda_options *options)
{
    besa__cuda *cuda = besa__cuda_of(be);
    BESA__TRY(besa__cuda_open_device(be, options));
    for (int i = 0; i < BESA_QUEUE_COUNT; i++)
        BESA__CUDA(cudaStreamCreateWithFlags(&cuda->stream[i], cudaStreamNonBlocking));
    for (int i = 0; i < BESA_EVENT_COUNT; i++)
        BESA__CUDA(cudaEventCreate(&cuda->event[i]));
    BESA__CUBLAS(cublasCreate(&cuda->blas));
    BESA__CUBLAS(cublasSetStream(cuda->blas, cuda->stream[BESA_QUEUE_COMPUTE])); /* before any cublasSetWorkspace */
    BESA__CUBLAS(cublasSetMathMode(cuda->blas, static_cast<cublasMath_t>(
        CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    BESA__CUBLAS(cublasSetAtomicsMode(cuda->blas, CUBLAS_ATOMICS_NOT_ALLOWED));
    void *device = NULL, *host = NULL;
    BESA__TRY(besa__cuda_alloc(be, &device, 256));
    cuda->bad_pivot = static_cast<int64_t *>(device);
    BESA__TRY(besa__cuda_host_alloc(be, &host, 256));
    cuda->bad_pivot_host = static_cast<int64_t *>(host);
    memset(host, 0, 256);
    BESA__TRY(besa__cuda_fill(be, static_cast<int32_t *>(device), 0, 64));
    return besa__cuda_synchronize(be, BESA_QUEUE_COMPUTE);
}

BESA_API besa_result besa_cuda_backend(besa_backend *be, const besa_cuda_options *options, besa_error *error)
{
    void *memory;
    memset(be, 0, sizeof *be);
    BESA__TRY(besa__malloc(&memory, sizeof(besa__cuda), "the CUDA backend", error));
    memset(memory, 0, sizeof(besa__cuda));
    be->name = "CUDA";
    be->context = memory;
#define BESA__FILL(operation) be->operation = besa__cuda_##operation;
    BESA_OPERATIONS(BESA__FILL)
#undef BESA__FILL
    besa_result result = besa__cuda_open(be, options);
    if (result == BESA_OK) return BESA_OK;
    if (error) *error = be->error;
    besa__cuda_destroy(be);
    return result;
}

BESA_API void *besa_cuda_stream(const besa_backend *be, besa_queue queue) { return besa__cuda_of(be)->stream[queue]; }

#endif /* BESA_CUDA_CUH */
