/* cuda_runtime.h of the stand-in (see standin.h): the runtime's types and calls, and what device code uses. */
#ifndef STANDIN_CUDA_RUNTIME_H
#define STANDIN_CUDA_RUNTIME_H
#define CUDA_STANDIN 1
#define CUDART_VERSION 13000
#include "standin.h"
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

/* ---------------------------------------------------------------- types ---- */
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ ::standin::note_static_shared(); static

#define STANDIN_VECTOR(T, name, a1, a2, a4)                                                                              \
    struct alignas(a1) name##1 { T x; };                                                                                 \
    struct alignas(a2) name##2 { T x, y; };                                                                              \
    struct name##3 { T x, y, z; };                                                                                       \
    struct alignas(a4) name##4 { T x, y, z, w; };                                                                        \
    inline name##1 make_##name##1(T x) { return {x}; }                                                                   \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                           \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                                   \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
STANDIN_VECTOR(signed char, char, 1, 2, 4)
STANDIN_VECTOR(unsigned char, uchar, 1, 2, 4)
STANDIN_VECTOR(short, short, 2, 4, 8)
STANDIN_VECTOR(unsigned short, ushort, 2, 4, 8)
STANDIN_VECTOR(int, int, 4, 8, 16)
STANDIN_VECTOR(unsigned int, uint, 4, 8, 16)
STANDIN_VECTOR(long long, longlong, 8, 16, 16)
STANDIN_VECTOR(unsigned long long, ulonglong, 8, 16, 16)
STANDIN_VECTOR(float, float, 4, 8, 16)
STANDIN_VECTOR(double, double, 8, 16, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

#define STANDIN_CUDA_ERRORS(X)                                                                                           \
    X(cudaSuccess, 0, "no error") X(cudaErrorInvalidValue, 1, "invalid argument")                                        \
    X(cudaErrorMemoryAllocation, 2, "out of memory") X(cudaErrorInitializationError, 3, "initialization error")          \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                                \
    X(cudaErrorInvalidPitchValue, 12, "invalid pitch argument")                                                          \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                                          \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")                   \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") X(cudaErrorInvalidDevice, 101, "invalid device ordinal") \
    X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")                  \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle") X(cudaErrorNotReady, 600, "device not ready")      \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                                          \
    X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                                     \
    X(cudaErrorHostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped")          \
    X(cudaErrorHostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region")                \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure") X(cudaErrorNotPermitted, 800, "operation not permitted") \
    X(cudaErrorNotSupported, 801, "operation not supported") X(cudaErrorUnknown, 999, "unknown error")
enum cudaError {
#define X(name, value, text) name = value,
    STANDIN_CUDA_ERRORS(X)
#undef X
};
typedef cudaError cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrGlobalMemoryBusWidth = 37, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_32I = 10, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum : unsigned {
    cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2,
    cudaEventRecordDefault = 0, cudaEventWaitDefault = 0, cudaHostAllocDefault = 0, cudaHostAllocPortable = 1,
    cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4, cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1,
    cudaHostRegisterMapped = 2, cudaHostRegisterReadOnly = 8
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor, reservedSharedMemPerBlock;
    size_t totalConstMem, memPitch;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock;
    int maxThreadsDim[3], maxGridSize[3];
    int l2CacheSize, memoryBusWidth, asyncEngineCount, concurrentKernels, integrated, canMapHostMemory, unifiedAddressing;
    int ECCEnabled, pciBusID, pciDeviceID, pciDomainID;
};
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef void (*cudaHostFn_t)(void *user);

/* ---------------------------------------------------------------- calls, as documented for the real ones ---- */
extern "C" {
const char *cudaGetErrorName(cudaError_t);
const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int device);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaDeviceReset(void);
cudaError_t cudaDriverGetVersion(int *);
cudaError_t cudaRuntimeGetVersion(int *);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
cudaError_t cudaMalloc(void **, size_t);
cudaError_t cudaFree(void *);
cudaError_t cudaHostAlloc(void **, size_t, unsigned flags);
cudaError_t cudaMallocHost(void **, size_t);
cudaError_t cudaFreeHost(void *);
cudaError_t cudaHostRegister(void *, size_t, unsigned flags);
cudaError_t cudaHostUnregister(void *);
cudaError_t cudaMemcpy(void *to, const void *from, size_t, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemset(void *, int value, size_t);
cudaError_t cudaMemsetAsync(void *, int value, size_t, cudaStream_t = nullptr);
cudaError_t cudaStreamCreate(cudaStream_t *);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamQuery(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void *user);
cudaError_t cudaEventCreate(cudaEvent_t *);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t stop);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int value);
}
template <class T> cudaError_t cudaMalloc(T **p, size_t bytes) { return cudaMalloc(reinterpret_cast<void **>(p), bytes); }
template <class T> cudaError_t cudaMallocHost(T **p, size_t bytes) { return cudaMallocHost(reinterpret_cast<void **>(p), bytes); }
template <class T> cudaError_t cudaHostAlloc(T **p, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void **>(p), bytes, flags);
}
template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}

/* ---------------------------------------------------------------- launches and the executor ---- */
namespace standin {
enum Op { None, Barrier, SyncWarp, Shuffle, Vote, Reduce, MatchAny };
struct Fiber;
struct Thread {                      /* one thread of the block that runs */
    uint3 index;
    unsigned id, state;
    Op op;                           /* what it waits in, with what, and where */
    unsigned mask, source;
    uint64_t value, result;
    const char *file;
    int line;
    Fiber *fiber;
    void *context;                   /* ThreadSanitizer's */
};
extern Thread *current;
extern uint3 block_index;
extern dim3 block_dim, grid_dim;

void enqueue_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t, std::function<void()>);
void *dynamic_shared();
void *shared_array(const void *key, size_t bytes);
void note_static_shared();
int block_barrier(bool predicate, int what, const char *file, int line);   /* what: 0 plain, 1 count, 2 or, 3 and */
uint64_t exchange(Op, unsigned mask, uint64_t value, unsigned source, const char *file, int line);
[[noreturn]] void fault(const char *message);                              /* from device code: fails the launch */
void fence();

/* The arguments are converted to the kernel's parameter types at the call, as <<<>>> does. */
template <class... P, class... A>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A &&...args) {
    static_assert(sizeof...(P) == sizeof...(A), "wrong number of kernel arguments");
    std::tuple<std::decay_t<P>...> packed(std::forward<A>(args)...);
    static_assert(sizeof packed <= 4096, "kernel parameters beyond 4 KB");
    enqueue_launch(name, reinterpret_cast<const void *>(kernel), grid, block, shared, stream,
                   [kernel, packed] { std::apply(kernel, packed); });
}
}
#define STANDIN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::standin::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define STANDIN_SHARED(type, name) type *const name = static_cast<type *>(::standin::dynamic_shared())
#define STANDIN_SHARED_ARRAY(type, name, count) \
    type *const name = static_cast<type *>(::standin::shared_array([] { static char key; return &key; }(), sizeof(type) * (count)))
#define threadIdx (::standin::current->index)
#define blockIdx (::standin::block_index)
#define blockDim (::standin::block_dim)
#define gridDim (::standin::grid_dim)
constexpr int warpSize = 32;

/* ---------------------------------------------------------------- rendezvous ---- */
#define STANDIN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(STANDIN_SITE) { standin::block_barrier(true, 0, file, line); }
inline int __syncthreads_count(int p, STANDIN_SITE) { return standin::block_barrier(p != 0, 1, file, line); }
inline int __syncthreads_or(int p, STANDIN_SITE) { return standin::block_barrier(p != 0, 2, file, line); }
inline int __syncthreads_and(int p, STANDIN_SITE) { return standin::block_barrier(p != 0, 3, file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, STANDIN_SITE) { standin::exchange(standin::SyncWarp, mask, 0, 0, file, line); }
inline unsigned __ballot_sync(unsigned mask, int p, STANDIN_SITE) {
    return static_cast<unsigned>(standin::exchange(standin::Vote, mask, p != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int p, STANDIN_SITE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, STANDIN_SITE) { return __ballot_sync(mask, p == 0, file, line) == 0; }

namespace standin {
inline unsigned lane() { return current->id % 32; }
template <class T> uint64_t to_word(T value) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "exchanged values have 4 or 8 bytes");
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
}
template <class T> T from_word(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}
template <class T> T shuffle(unsigned mask, T value, unsigned source, const char *file, int line) {
    return from_word<T>(exchange(Shuffle, mask, to_word(value), source, file, line));
}
enum { Add, Min, Max, And, Or, Xor };
template <class T> T reduce(unsigned mask, T value, unsigned how, const char *file, int line) {
    static_assert(std::is_integral<T>::value && sizeof(T) == 4, "reductions are of int and unsigned");
    uint64_t sign = std::is_signed<T>::value && (how == Min || how == Max) ? 0x80000000u : 0;   /* order of signed values */
    return from_word<T>(exchange(Reduce, mask, to_word(value) ^ sign, how, file, line) ^ sign);
}
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, STANDIN_SITE) {
    unsigned w = static_cast<unsigned>(width) - 1;
    return standin::shuffle(mask, value, (standin::lane() & ~w) | (static_cast<unsigned>(source) & w), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, STANDIN_SITE) {
    unsigned l = standin::lane(), in = l & (static_cast<unsigned>(width) - 1);
    return standin::shuffle(mask, value, delta <= in ? l - delta : l, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, STANDIN_SITE) {
    unsigned l = standin::lane(), w = static_cast<unsigned>(width), in = l & (w - 1);
    return standin::shuffle(mask, value, delta < w - in ? l + delta : l, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, STANDIN_SITE) {
    unsigned l = standin::lane(), from = l ^ static_cast<unsigned>(bits), end = (l | (static_cast<unsigned>(width) - 1)) + 1;
    return standin::shuffle(mask, value, from < end ? from : l, file, line);
}
template <class T> T __reduce_add_sync(unsigned mask, T v, STANDIN_SITE) { return standin::reduce(mask, v, standin::Add, file, line); }
template <class T> T __reduce_min_sync(unsigned mask, T v, STANDIN_SITE) { return standin::reduce(mask, v, standin::Min, file, line); }
template <class T> T __reduce_max_sync(unsigned mask, T v, STANDIN_SITE) { return standin::reduce(mask, v, standin::Max, file, line); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, STANDIN_SITE) { return standin::reduce(mask, v, standin::And, file, line); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, STANDIN_SITE) { return standin::reduce(mask, v, standin::Or, file, line); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, STANDIN_SITE) { return standin::reduce(mask, v, standin::Xor, file, line); }
template <class T> unsigned __match_any_sync(unsigned mask, T value, STANDIN_SITE) {
    return static_cast<unsigned>(standin::exchange(standin::MatchAny, mask, standin::to_word(value), 0, file, line));
}
inline void __threadfence() { standin::fence(); }
inline void __threadfence_block() { standin::fence(); }
inline void __threadfence_system() { standin::fence(); }
[[noreturn]] inline void __trap() { standin::fault("__trap"); }

/* ---------------------------------------------------------------- atomics: relaxed, as on the device ---- */
namespace standin {
template <class T> constexpr bool is_word = std::is_same<T, int>::value || std::is_same<T, unsigned>::value
                                         || std::is_same<T, unsigned long long>::value;
template <class T> struct same_ { typedef T type; };
template <class T> using same = typename same_<T>::type;   /* deduce T from the address alone */
template <class T, class F> T atomic_update(T *p, F next) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
}
#define STANDIN_ATOMIC(name, ok, update)                                                                                 \
    template <class T> T name(T *p, standin::same<T> v) {                                                                \
        static_assert(ok, #name " of this type is not offered");                                                         \
        return standin::atomic_update(p, [v](T old) -> T { return update; });                                            \
    }
STANDIN_ATOMIC(atomicAdd, standin::is_word<T>, static_cast<T>(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(v)))
STANDIN_ATOMIC(atomicSub, standin::is_word<T> && sizeof(T) == 4, static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(v)))
STANDIN_ATOMIC(atomicMin, standin::is_word<T> || (std::is_same<T, long long>::value), old < v ? old : v)
STANDIN_ATOMIC(atomicMax, standin::is_word<T> || (std::is_same<T, long long>::value), old > v ? old : v)
STANDIN_ATOMIC(atomicAnd, standin::is_word<T>, old & v)
STANDIN_ATOMIC(atomicOr, standin::is_word<T>, old | v)
STANDIN_ATOMIC(atomicXor, standin::is_word<T>, old ^ v)
STANDIN_ATOMIC(atomicExch, standin::is_word<T>, (static_cast<void>(old), v))
STANDIN_ATOMIC(atomicInc, (std::is_same<T, unsigned>::value), old >= v ? 0 : old + 1)
STANDIN_ATOMIC(atomicDec, (std::is_same<T, unsigned>::value), old == 0 || old > v ? v : old - 1)
#undef STANDIN_ATOMIC
template <class T> T atomicCAS(T *p, standin::same<T> expected, standin::same<T> desired) {
    static_assert(standin::is_word<T>, "atomicCAS of this type is not offered");
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
inline float atomicAdd(float *, float) { standin::fault("float atomicAdd: the order of its sums is not fixed"); }

/* ---------------------------------------------------------------- bits and arithmetic ---- */
inline float __uint_as_float(unsigned u) { return standin::from_word<float>(u); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline unsigned __float_as_uint(float f) { return static_cast<unsigned>(standin::to_word(f)); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
inline long long __double_as_longlong(double d) { return static_cast<long long>(standin::to_word(d)); }
inline double __longlong_as_double(long long i) { return standin::from_word<double>(static_cast<uint64_t>(i)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned byte = static_cast<unsigned>(both >> 8 * (s >> 4 * i & 7u)) & 255u;
        if (s >> 4 * i & 8u) byte = byte & 128u ? 255u : 0u;
        r |= byte << 8 * i;
    }
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) { n &= 31; return n ? high << n | low >> (32 - n) : high; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) { n &= 31; return n ? low >> n | high << (32 - n) : low; }

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, standin::same<T> v) { *p = v; }
template <class T> void __stcg(T *p, standin::same<T> v) { *p = v; }

#define __expf(x) (::expf(x))          /* macros: the C library declares functions of these names */
#define __exp2f(x) (::exp2f(x))
#define __logf(x) (::logf(x))
#define __log2f(x) (::log2f(x))
#define __sinf(x) (::sinf(x))
#define __cosf(x) (::cosf(x))
#define __powf(x, y) (::powf(x, y))
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
#define STANDIN_MINMAX(T)                                     \
    inline T min(T a, T b) { return b < a ? b : a; }          \
    inline T max(T a, T b) { return a < b ? b : a; }
STANDIN_MINMAX(int) STANDIN_MINMAX(unsigned) STANDIN_MINMAX(long) STANDIN_MINMAX(unsigned long)
STANDIN_MINMAX(long long) STANDIN_MINMAX(unsigned long long)
#undef STANDIN_MINMAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
#endif
