/* test_standin.cpp - the stand-in's own tests: kernels that are right must give right results, broken ones must be caught.
   Prints PASS, FAIL or SKIP and a name per test. With a name as argument, runs that broken case alone (a child of the tests). */
#include "sample_kernels.cuh"
#include <cuda_fp16.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>
#include <sys/wait.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TSAN 1
#elif __has_feature(address_sanitizer)
#define ASAN 1
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define TSAN 1
#endif
#ifdef __SANITIZE_ADDRESS__
#define ASAN 1
#endif
#ifndef TSAN
#define TSAN 0
#endif
#ifndef ASAN
#define ASAN 0
#endif

static int failures;
static bool test_ok;
#define CHECK(...) ((__VA_ARGS__) ? void() : (test_ok = false, void(printf("  %s:%d: %s\n", __FILE__, __LINE__, #__VA_ARGS__))))
#define OK(call) CHECK((call) == cudaSuccess)
#define BLAS(call) CHECK((call) == CUBLAS_STATUS_SUCCESS)

static bool each_order(int i) {                /* for (int i = 0; each_order(i); ++i) */
    if (i < 4) standin_set_order(std::min(i, 2), static_cast<unsigned>(i));
    else standin_set_order(STANDIN_FORWARD, 0);
    return i < 4;
}
template <class T> struct Device {             /* n elements of device memory */
    T *p = nullptr;
    size_t n;
    explicit Device(size_t count) : n(count) { OK(cudaMalloc(&p, n * sizeof(T))); }
    explicit Device(const std::vector<T> &v) : Device(v.size()) { OK(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    Device(const Device &) = delete;
    ~Device() { cudaFree(p); }
    std::vector<T> get() const {
        std::vector<T> v(n);
        OK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};
static std::vector<float> ramp(size_t n) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; ++i) v[i] = static_cast<float>((i * 7919 + 13) % 101) / 50.0f - 1.0f;
    return v;
}

/* ---------------------------------------------------------------- right kernels ---- */
static __global__ void ids_kernel(unsigned *out) {
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
static void test_ids() {
    for (int o = 0; each_order(o); ++o) {
        Device<unsigned> out(2 * 3 * 2 * 5 * 7 * 3);
        LAUNCH(ids_kernel, dim3(2, 3, 2), dim3(5, 7, 3), 0, nullptr, out.p);
        std::vector<unsigned> v = out.get();
        for (unsigned i = 0; i < v.size(); ++i) CHECK(v[i] == i / 105 * 1000 + i % 105);
    }
}
static void test_sample() {
    const int n = 1000;
    std::vector<float> in = ramp(n);
    std::vector<int> values(n);
    unsigned total = 0;
    for (int i = 0; i < n; ++i) total += static_cast<unsigned>(values[static_cast<size_t>(i)] = i * i % 16);
    for (int o = 0; each_order(o); ++o) {
        Device<float> d_in(in), out(8);
        Device<int> d_values(values);
        Device<__nv_bfloat16> scale(100);
        Device<unsigned> counts(16), work(40);
        OK(cudaMemset(counts.p, 0, 64));
        OK(cudaMemset(work.p, 0, 160));
        OK(sample_run(out.p, scale.p, counts.p, work.p, d_in.p, d_values.p, n, nullptr));
        std::vector<float> sums = out.get();
        for (size_t b = 0; b < 8; ++b) {
            double s = 0;
            for (size_t i = b * 128; i < std::min<size_t>(n, b * 128 + 128); ++i) s += in[i];
            CHECK(std::fabs(sums[b] - s) < 1e-4);
        }
        std::vector<__nv_bfloat16> y = scale.get();
        for (size_t r = 0; r < 100; ++r) {
            double s = 0;
            for (size_t c = 0; c < 10; ++c) s += double(in[r * 10 + c]) * in[r * 10 + c];
            CHECK(std::fabs(__bfloat162float(y[r]) * std::sqrt(s / 10) - 1) < 0.005);
        }
        std::vector<unsigned> c = counts.get();
        for (int v = 0; v < 16; ++v) CHECK(c[static_cast<size_t>(v)] == static_cast<unsigned>(std::count(values.begin(), values.end(), v)));
        CHECK(work.get()[0] == total);
    }
}
static __global__ void votes_kernel(int *out) {
    int t = static_cast<int>(threadIdx.x), n = __syncthreads_count(t % 3 == 0);
    int any = __syncthreads_or(t == 5), none = __syncthreads_or(t < 0), all = __syncthreads_and(t >= 0), some = __syncthreads_and(t > 0);
    if (t == 0 && blockIdx.x == 2) out[0] = n, out[1] = any, out[2] = none, out[3] = all, out[4] = some;
}
static void test_block_votes() {
    for (int o = 0; each_order(o); ++o) {
        Device<int> out(5);
        LAUNCH(votes_kernel, 3, 70, 0, nullptr, out.p);
        std::vector<int> v = out.get();
        CHECK(v[0] == 24 && v[1] && !v[2] && v[3] && !v[4]);
    }
}
static __global__ void warp_kernel(int *out) {                                /* 12 results per thread */
    int t = static_cast<int>(threadIdx.x), *r = out + t * 12;
    unsigned all = 0xffffffffu;
    r[0] = __shfl_sync(all, t, 3);
    r[1] = __shfl_sync(all, t, 1, 8);
    r[2] = __shfl_up_sync(all, t, 2u);
    r[3] = __shfl_down_sync(all, t, 3u, 16);
    r[4] = __shfl_xor_sync(all, t, 1);
    r[5] = static_cast<int>(__ballot_sync(all, t % 2));
    r[6] = __any_sync(all, t == 40) * 2 + __all_sync(all, t < 40);
    r[7] = static_cast<int>(__match_any_sync(all, t % 5));
    unsigned scale = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;                  /* two groups of a warp at once */
    r[8] = static_cast<int>(__reduce_add_sync(scale, static_cast<unsigned>(t)));
    r[9] = __reduce_min_sync(scale, 7 - t);
    if (t % 32 >= 16) r[10] = __shfl_sync(0xffff0000u, t, 20);                /* one group alone */
    else r[10] = -5;
    __syncwarp();
    r[11] = static_cast<int>(__shfl_sync(all, 1.5 * t, 0) * 2);               /* 8 bytes */
}
static void test_warp() {
    for (int o = 0; each_order(o); ++o) {
        const int n = 48;
        Device<int> out(n * 12);
        LAUNCH(warp_kernel, 1, n, 0, nullptr, out.p);
        std::vector<int> v = out.get();
        for (int t = 0; t < n; ++t) {
            int *r = &v[static_cast<size_t>(t) * 12], l = t % 32, w = t - l, lanes = std::min(32, n - w), h = t / 16 * 16;
            unsigned odd = 0, same = 0, sum = 0;
            for (int j = 0; j < lanes; ++j) odd |= unsigned((w + j) % 2) << j, same |= unsigned((w + j) % 5 == t % 5) << j;
            for (int j = h; j < h + 16; ++j) sum += static_cast<unsigned>(j);
            CHECK(r[0] == w + 3 && r[1] == t / 8 * 8 + 1 && r[2] == (l < 2 ? t : t - 2) && r[4] == (t ^ 1));
            CHECK(r[3] == (t % 16 < 13 ? t + 3 : t));
            CHECK(static_cast<unsigned>(r[5]) == odd && r[6] == (w == 32 ? 2 : 1) && static_cast<unsigned>(r[7]) == same);
            CHECK(static_cast<unsigned>(r[8]) == sum && r[9] == 7 - (h + 15) && r[10] == (l >= 16 ? w + 20 : -5) && r[11] == w * 3);
        }
    }
}
static __global__ void partial_kernel(float *out) { out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 4u); }
static __global__ void leave_early_kernel(int *out, int n) {
    SHARED(int, s);
    if (static_cast<int>(threadIdx.x) >= n) return;
    s[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = s[static_cast<unsigned>(n) - 1 - threadIdx.x];
}
static void test_partial() {
    Device<float> out(6);
    LAUNCH(partial_kernel, 1, 6, 0, nullptr, out.p);
    std::vector<float> v = out.get();
    CHECK(v[0] == 1 && v[1] == 1 && v[2] != v[2] && v[5] != v[5]);            /* lanes that do not exist give NaN */
    Device<int> got(40);
    LAUNCH(leave_early_kernel, 1, 64, 256, nullptr, got.p, 40);
    CHECK(got.get()[3] == 36);
    standin_strict_exit(1);
    standin_quiet(1);
    LAUNCH(leave_early_kernel, 1, 64, 256, nullptr, got.p, 40);
    CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure && strstr(standin_last_report(), "has exited"));
    standin_strict_exit(0);
    standin_reset();
    standin_quiet(0);
}
static __global__ void atomics_kernel(int *i, unsigned *u, unsigned long long *w) {
    int t = static_cast<int>(threadIdx.x);
    atomicAdd(&i[0], t);
    atomicMin(&i[1], -t);
    atomicMax(&i[2], t);
    atomicSub(&i[3], 1);
    atomicInc(&u[0], 9);
    atomicOr(&u[1], 1u << t % 32);
    if (atomicCAS(&u[2], 0u, 1u) == 0u) atomicExch(&u[3], 77u);
    atomicAdd(&w[0], 1ull << 33);
}
static void test_atomics() {
    Device<int> i(4);
    Device<unsigned> u(4);
    Device<unsigned long long> w(1);
    OK(cudaMemset(i.p, 0, 16));
    OK(cudaMemset(u.p, 0, 16));
    OK(cudaMemset(w.p, 0, 8));
    LAUNCH(atomics_kernel, 1, 100, 0, nullptr, i.p, u.p, w.p);
    std::vector<int> a = i.get();
    std::vector<unsigned> b = u.get();
    CHECK(a[0] == 4950 && a[1] == -99 && a[2] == 99 && a[3] == -100);
    CHECK(b[0] == 0 && b[1] == 0xffffffffu && b[2] == 1 && b[3] == 77 && w.get()[0] == 100ull << 33);
}
static __global__ void poison_kernel(float *out) {
    SHARED(float, s);
    SHARED_ARRAY(float, kept, 1);
    out[1 + 2 * blockIdx.x] = s[0];
    out[2 + 2 * blockIdx.x] = kept[0];
    s[0] = kept[0] = 1;
}
static void test_poison() {
    Device<float> out(5);
    LAUNCH(poison_kernel, 2, 1, 4, nullptr, out.p);
    for (float f : out.get()) CHECK(f != f);
}
template <class F> static void intrinsics_on_host(F check) {
    check(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0 && __brev(1u) == 0x80000000u);
    check(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f && __byte_perm(0x33221100u, 0x77665544u, 0x7150u) == 0x77115500u);
    check(__funnelshift_l(0x80000000u, 1u, 1) == 3u && __umulhi(0x80000000u, 4u) == 2u && min(3, 2) == 2 && max(1.0f, 2.0f) == 2.0f);
    check(rsqrtf(4.0f) == 0.5f && __frcp_rn(4.0f) == 0.25f && __fdividef(1.0f, 2.0f) == 0.5f && std::fabs(__expf(1.0f) - 2.7182818f) < 1e-6f);
    bool halves = true, brains = true;
    for (unsigned b = 0; b < 65536; ++b) {                                    /* every value goes there and back */
        unsigned short bits = static_cast<unsigned short>(b);
        if ((b & 0x7c00u) != 0x7c00u || !(b & 0x3ffu)) halves = halves && __half_as_ushort(__float2half_rn(__half2float(__ushort_as_half(bits)))) == b;
        if ((b & 0x7f80u) != 0x7f80u || !(b & 0x7fu)) brains = brains && __bfloat16_as_ushort(__float2bfloat16_rn(__bfloat162float(__ushort_as_bfloat16(bits)))) == b;
    }
    check(halves && brains);
    check(__half_as_ushort(__float2half_rn(65519.0f)) == 0x7bff && __half_as_ushort(__float2half_rn(65520.0f)) == 0x7c00);
    check(__half_as_ushort(__float2half_rn(1.0f + 1.0f / 2048)) == 0x3c00 && __half_as_ushort(__float2half_rn(1.0f + 3.0f / 2048)) == 0x3c02);
    check(__half_as_ushort(__float2half_rn(std::ldexp(1.0f, -25))) == 0 && __half_as_ushort(__float2half_rn(std::ldexp(1.5f, -25))) == 1);
    check(__bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(0x3f808000u))) == 0x3f80 && __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(0x3f818000u))) == 0x3f82);
    check(__float22bfloat162_rn(make_float2(1, 2)).y == 2.0f && sizeof(float4) == 16 && alignof(ushort4) == 8 && sizeof(float3) == 12);
}
static void test_intrinsics() { intrinsics_on_host([](bool ok) { CHECK(ok); }); }

/* ---------------------------------------------------------------- memory, streams, calls ---- */
static void test_memory() {
    size_t before = standin_live_allocations();
    void *p, *q;
    standin_set_memory(10000);
    OK(cudaMalloc(&p, 9000));
    CHECK(reinterpret_cast<uintptr_t>(p) % 256 == 0);
    CHECK(cudaMalloc(&q, 1001) == cudaErrorMemoryAllocation && q == nullptr && cudaGetLastError() == cudaErrorMemoryAllocation);
    size_t free_bytes, total;
    OK(cudaMemGetInfo(&free_bytes, &total));
    CHECK(free_bytes == 1000 && total == 10000 && standin_live_allocations() == before + 1);
    standin_quiet(1);
    CHECK(cudaMemset(p, 0, 9001) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(p, &total, 8, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaFreeHost(p) == cudaErrorInvalidValue);
    OK(cudaFree(p));
    CHECK(cudaFree(p) == cudaErrorInvalidValue && standin_reports() == 4);
    CHECK(cudaMemset(&total, 0, 8) == cudaErrorInvalidValue);
    standin_quiet(0);
    OK(cudaFree(nullptr));
    OK(cudaMalloc(&p, 0));
    CHECK(!p && standin_device_bytes() == 0 && standin_device_peak() >= 9000);
    standin_set_memory(size_t(16) << 30);
    standin_reset();
}
static __global__ void add_kernel(int *x, int n, int v) {
    int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) x[i] += v;
}
struct Streams {
    cudaStream_t a, b;
    cudaEvent_t e;
    int *host;                                                                /* pinned, 100 */
    Streams() {
        OK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
        OK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
        OK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
        OK(cudaHostAlloc(&host, 400, cudaHostAllocDefault));
    }
    ~Streams() {
        cudaStreamDestroy(a);
        cudaStreamDestroy(b);
        cudaEventDestroy(e);
        cudaFreeHost(host);
    }
};
static void test_streams() {
    for (int schedule = STANDIN_LATE; schedule <= STANDIN_OTHERS; ++schedule) {
        standin_set_streams(schedule);
        Streams s;
        Device<int> x(100);
        std::vector<int> pageable(100, 5);
        OK(cudaMemcpyAsync(x.p, pageable.data(), 400, cudaMemcpyHostToDevice, s.a));
        pageable.assign(100, 6);                                              /* allowed: the source was consumed */
        LAUNCH(add_kernel, 4, 30, 0, s.a, x.p, 100, 10);
        OK(cudaEventRecord(s.e, s.a));
        OK(cudaStreamWaitEvent(s.b, s.e));
        LAUNCH(add_kernel, 4, 30, 0, s.b, x.p, 100, 100);
        OK(cudaMemcpyAsync(s.host, x.p, 400, cudaMemcpyDeviceToHost, s.b));
        int polls = 0;
        while (cudaStreamQuery(s.b) == cudaErrorNotReady) ++polls;
        CHECK((schedule == STANDIN_EAGER) == (polls == 0) && cudaGetLastError() == cudaSuccess && s.host[99] == 115);
        struct Mark { static void set(void *p) { *static_cast<int *>(p) = cudaDeviceSynchronize() == cudaErrorNotPermitted ? 42 : 1; } };
        OK(cudaLaunchHostFunc(s.a, Mark::set, s.host));
        OK(cudaStreamSynchronize(s.a));
        CHECK(s.host[0] == 42);
    }
    standin_set_streams(STANDIN_LATE);
}
static void test_null_stream() {
    cudaStream_t s;
    cudaEvent_t from, to;
    OK(cudaStreamCreate(&s));                                                 /* blocking: ordered with the null stream */
    OK(cudaEventCreate(&from));
    OK(cudaEventCreate(&to));
    Device<int> x(10);
    OK(cudaEventRecord(from, s));
    OK(cudaMemsetAsync(x.p, 0, 40, s));
    LAUNCH(add_kernel, 1, 10, 0, nullptr, x.p, 10, 3);
    LAUNCH(add_kernel, 1, 10, 0, s, x.p, 10, 4);
    OK(cudaEventRecord(to, s));
    CHECK(x.get()[9] == 7);
    float ms = -1;
    CHECK(cudaEventQuery(to) == cudaSuccess && cudaEventElapsedTime(&ms, from, to) == cudaSuccess && ms >= 0);
    OK(cudaEventDestroy(from));
    OK(cudaEventDestroy(to));
    OK(cudaStreamDestroy(s));
    CHECK(cudaStreamSynchronize(s) == cudaErrorInvalidResourceHandle && standin_live_objects() == 0);
    std::vector<int> m(20, 1);
    OK(cudaMemcpy2D(m.data(), 40, x.p, 8, 8, 2, cudaMemcpyDeviceToHost));
    CHECK(m[0] == 7 && m[1] == 7 && m[2] == 1 && m[10] == 7 && m[12] == 1);
    CHECK(cudaMemcpy2D(m.data(), 4, x.p, 8, 8, 2, cudaMemcpyDeviceToHost) == cudaErrorInvalidPitchValue);
    cudaGetLastError();
}
static void test_launch_checks() {
    Device<int> x(1024);
    LAUNCH(add_kernel, 0, 1, 0, nullptr, x.p, 0, 0);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    LAUNCH(add_kernel, 1, 1025, 0, nullptr, x.p, 0, 0);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    LAUNCH(leave_early_kernel, 1, 64, 49153, nullptr, x.p, 64);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(leave_early_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 * 1024 + 1) == cudaErrorInvalidValue);
    OK(cudaFuncSetAttribute(leave_early_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 * 1024));
    LAUNCH(leave_early_kernel, 1, 64, 99 * 1024, nullptr, x.p, 64);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
    CHECK(x.get()[0] == 63);
    standin_set_devices(0);
    int count = 5;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0 && !strcmp(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice"));
    standin_set_devices(1);
    cudaGetLastError();
    CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
}

/* ---------------------------------------------------------------- cuBLAS ---- */
template <class T> static std::vector<T> as(const std::vector<float> &v) { return std::vector<T>(v.begin(), v.end()); }
template <class TA, class TC> static void gemm_case(cublasHandle_t h, cudaDataType ta, cudaDataType tc, float tolerance) {
    const int m = 19, n = 7, k = 33, batch = 2;
    for (int ops = 0; ops < 4; ++ops) {
        bool at = ops & 1, bt = ops & 2;
        int lda = (at ? k : m) + 2, ldb = (bt ? n : k) + 1, ldc = m + 3;
        size_t sa = static_cast<size_t>(lda) * (at ? m : k), sb = static_cast<size_t>(ldb) * (bt ? k : n), sc = static_cast<size_t>(ldc * n);
        std::vector<TA> A = as<TA>(ramp(sa * batch)), B = as<TA>(ramp(sb * batch));
        std::vector<TC> C = as<TC>(ramp(sc * batch));
        Device<TA> a(A), b(B);
        Device<TC> c(C);
        float alpha = 0.5f, beta = -2.0f;
        BLAS(cublasGemmStridedBatchedEx(h, at ? CUBLAS_OP_T : CUBLAS_OP_N, bt ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha, a.p, ta, lda,
                                        static_cast<long long>(sa), b.p, ta, ldb, static_cast<long long>(sb), &beta, c.p, tc, ldc,
                                        static_cast<long long>(sc), batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        std::vector<TC> got = c.get();
        for (int z = 0; z < batch; ++z)
            for (int j = 0; j < n; ++j)
                for (int i = 0; i < ldc; ++i) {
                    size_t at_c = static_cast<size_t>(z) * sc + static_cast<size_t>(j * ldc + i);
                    double s = 0;
                    for (int q = 0; q < k; ++q)
                        s += double(float(A[static_cast<size_t>(z) * sa + static_cast<size_t>(at ? i * lda + q : q * lda + i) % sa]))
                           * float(B[static_cast<size_t>(z) * sb + static_cast<size_t>(bt ? q * ldb + j : j * ldb + q)]);
                    double want = i < m ? 0.5 * s - 2.0 * float(C[at_c]) : float(C[at_c]);
                    CHECK(std::fabs(float(got[at_c]) - want) <= tolerance * (1 + std::fabs(want)));
                }
    }
}
static void test_gemm() {
    cublasHandle_t h;
    BLAS(cublasCreate(&h));
    gemm_case<float, float>(h, CUDA_R_32F, CUDA_R_32F, 1e-6f);
    gemm_case<__nv_bfloat16, float>(h, CUDA_R_16BF, CUDA_R_32F, 1e-6f);
    gemm_case<__nv_bfloat16, __nv_bfloat16>(h, CUDA_R_16BF, CUDA_R_16BF, 0.004f);
    gemm_case<__half, __half>(h, CUDA_R_16F, CUDA_R_16F, 0.0005f);
    Device<float> a(ramp(12)), b(ramp(12)), c(9);
    float one = 1, zero = 0;
    BLAS(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 4, &one, a.p, 3, b.p, 4, &zero, c.p, 3));   /* beta 0: the poison in C is not read */
    for (float f : c.get()) CHECK(f == f);
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 4, &one, a.p, 2, b.p, 4, &zero, c.p, 3) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(cublasSgemm(h, CUBLAS_OP_T, CUBLAS_OP_N, 3, 3, 4, &one, a.p, 3, b.p, 4, &zero, c.p, 3) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, -1, 3, 4, &one, a.p, 3, b.p, 4, &zero, c.p, 3) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(cublasSgemm(nullptr, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 4, &one, a.p, 3, b.p, 4, &zero, c.p, 3) == CUBLAS_STATUS_NOT_INITIALIZED);
    CHECK(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 4, &one, a.p, CUDA_R_32F, 3, b.p, CUDA_R_16F, 4, &zero, c.p, CUDA_R_32F, 3,
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_NOT_SUPPORTED);
    standin_quiet(1);
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 3, 4, 4, &one, a.p, 3, b.p, 4, &zero, c.p, 3) == CUBLAS_STATUS_EXECUTION_FAILED);
    standin_quiet(0);
    BLAS(cublasDestroy(h));
}
/* Each kind of product spoils its workspace at both ends, and one without a workspace is counted. */
static void test_scratch() {
    const size_t piece = (16 << 10) / sizeof(float), n = 64 << 10;
    const float one = 1;
    cublasHandle_t h;
    cudaStream_t stream;
    OK(cudaStreamCreate(&stream));
    BLAS(cublasCreate(&h));
    Device<float> a(ramp(9)), b(ramp(9)), c(ramp(9));
    size_t before = standin_own_scratch();
    for (int kind = 0; kind < 5; ++kind) {
        Device<float> scratch(std::vector<float>(n, 5.0f));
        if (kind < 4) BLAS(cublasSetWorkspace(h, scratch.p, n * sizeof(float)));
        else BLAS(cublasSetStream(h, stream));
        if (kind == 0 || kind == 4) BLAS(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 3, &one, a.p, 3, b.p, 3, &one, c.p, 3));
        if (kind == 1) BLAS(cublasSsyrk(h, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, 3, 3, &one, a.p, 3, &one, c.p, 3));
        if (kind == 2) BLAS(cublasStrsm(h, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 3, 3, &one, a.p, 3, c.p, 3));
        if (kind == 3) BLAS(cublasStrmm(h, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 3, 3, &one, a.p, 3, b.p, 3, c.p, 3));
        OK(cudaDeviceSynchronize());
        std::vector<float> left = scratch.get();
        for (size_t i = 0; i < n; ++i) CHECK((kind < 4 && (i < piece || i >= n - piece)) != (left[i] == 5.0f));
        CHECK(standin_own_scratch() == before + (kind == 4));
    }
    BLAS(cublasDestroy(h));
    OK(cudaStreamDestroy(stream));
}
static void test_triangles() {
    cublasHandle_t h;
    BLAS(cublasCreate(&h));
    BLAS(cublasSetMathMode(h, CUBLAS_PEDANTIC_MATH));
    const int m = 6, n = 5;
    for (int bits = 0; bits < 16; ++bits) {                                   /* trmm, then trsm, gives B back */
        cublasSideMode_t side = bits & 1 ? CUBLAS_SIDE_RIGHT : CUBLAS_SIDE_LEFT;
        cublasFillMode_t uplo = bits & 2 ? CUBLAS_FILL_MODE_UPPER : CUBLAS_FILL_MODE_LOWER;
        cublasOperation_t op = bits & 4 ? CUBLAS_OP_T : CUBLAS_OP_N;
        cublasDiagType_t diag = bits & 8 ? CUBLAS_DIAG_UNIT : CUBLAS_DIAG_NON_UNIT;
        int na = bits & 1 ? n : m;
        std::vector<float> A = ramp(static_cast<size_t>(na * na)), B = ramp(m * n), full(A.size());
        for (int i = 0; i < na; ++i) A[static_cast<size_t>(i * na + i)] = 2.0f;
        for (int c = 0; c < na; ++c)
            for (int r = 0; r < na; ++r)
                full[static_cast<size_t>(c * na + r)] = r == c ? (bits & 8 ? 1.0f : 2.0f) : (r > c) == !(bits & 2) ? A[static_cast<size_t>(c * na + r)] : 0.0f;
        Device<float> a(A), f(full), b(B), c(m * n), d(m * n);
        float scale = 0.5f, two = 2.0f, zero = 0;
        BLAS(cublasStrmm(h, side, uplo, op, diag, m, n, &scale, a.p, na, b.p, m, c.p, m));
        if (bits & 1) BLAS(cublasSgemm(h, CUBLAS_OP_N, op, m, n, n, &scale, b.p, m, f.p, n, &zero, d.p, m));
        else BLAS(cublasSgemm(h, op, CUBLAS_OP_N, m, n, m, &scale, f.p, m, b.p, m, &zero, d.p, m));
        CHECK(c.get() == d.get());
        BLAS(cublasStrsm(h, side, uplo, op, diag, m, n, &two, a.p, na, c.p, m));
        std::vector<float> x = c.get();
        for (size_t i = 0; i < x.size(); ++i) CHECK(std::fabs(x[i] - B[i]) < 1e-4f);
    }
    for (int bits = 0; bits < 4; ++bits) {
        Device<float> a(ramp(m * n)), c(ramp(m * m)), d(ramp(m * m));
        float one = 1, scale = 0.5f;
        bool t = bits & 1, upper = bits & 2;
        BLAS(cublasSsyrk(h, upper ? CUBLAS_FILL_MODE_UPPER : CUBLAS_FILL_MODE_LOWER, t ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, &scale, a.p, t ? n : m, &one, c.p, m));
        BLAS(cublasSgemm(h, t ? CUBLAS_OP_T : CUBLAS_OP_N, t ? CUBLAS_OP_N : CUBLAS_OP_T, m, m, n, &scale, a.p, t ? n : m, a.p, t ? n : m, &one, d.p, m));
        std::vector<float> x = c.get(), y = d.get(), old = ramp(m * m);
        for (size_t j = 0; j < m; ++j)
            for (size_t i = 0; i < m; ++i) CHECK(x[j * m + i] == ((upper ? i <= j : i >= j) ? y : old)[j * m + i]);
    }
    BLAS(cublasDestroy(h));
}

/* ---------------------------------------------------------------- the list, dry runs, faults ---- */
static __global__ void mark_kernel(unsigned char *p, long long n) {
    for (int k = 0; k < 4; ++k) {
        long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4 + k;
        if (i < n) p[i] = 1;
    }
}
static void test_record_and_dry() {
    std::vector<standin_record> list;
    standin_set_recorder([](const standin_record *r, void *user) { static_cast<std::vector<standin_record> *>(user)->push_back(*r); }, &list);
    standin_set_dry(1);
    standin_set_memory(size_t(80) << 30);
    __nv_bfloat16 *w, *x, *y;
    OK(cudaMalloc(&w, size_t(8192) * 28672 * 2));
    OK(cudaMalloc(&x, size_t(128) * 2048 * 8192 * 2));
    OK(cudaMalloc(&y, size_t(128) * 2048 * 28672 * 2));
    cublasHandle_t h;
    BLAS(cublasCreate(&h));
    float one = 1, zero = 0;
    BLAS(cublasGemmEx(h, CUBLAS_OP_T, CUBLAS_OP_N, 28672, 128 * 2048, 8192, &one, w, CUDA_R_16BF, 8192, x, CUDA_R_16BF, 8192, &zero, y,
                      CUDA_R_16BF, 28672, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    LAUNCH((row_scale_kernel<float, 4>), 65536, 128, 0, nullptr, y, static_cast<const float *>(nullptr), 1, 1);
    OK(cudaMemcpy(w, &one, 4, cudaMemcpyHostToDevice));
    OK(cudaDeviceSynchronize());
    CHECK(list.size() == 3 && list[0].m == 28672 && list[0].n == 262144 && list[0].flops == 2.0 * 28672 * 262144 * 8192);
    CHECK(!strcmp(list[1].kind, "kernel") && strstr(list[1].name, "row_scale_kernel") && list[1].grid[0] == 65536 && list[2].bytes == 4);
    CHECK(standin_device_bytes() == (size_t(8192) * 28672 + size_t(262144) * (8192 + 28672)) * 2);
    cudaFree(w), cudaFree(x), cudaFree(y);
    BLAS(cublasDestroy(h));
    standin_set_recorder(nullptr, nullptr);
    standin_set_dry(0);
    standin_set_memory(size_t(16) << 30);
}

/* The ends of an array of 2^33 bytes, by the first and the last block. */
static void test_sparse() {
    const long long n = 1ll << 33;
    unsigned char *p, got[4] = {9, 9, 9, 9};
    standin_set_sparse(1);
    OK(cudaMalloc(&p, size_t(n)));
    LAUNCH(mark_kernel, 1u << 23, 256, 0, nullptr, p, n);
    OK(cudaMemset(p, 7, size_t(n)));                   /* checked, not run */
    const long long at[4] = {0, 1024, n - 1025, n - 1};
    for (int i = 0; i < 4; ++i) OK(cudaMemcpy(&got[i], p + at[i], 1, cudaMemcpyDeviceToHost));
    CHECK(got[0] == 1 && got[1] == 0 && got[2] == 0 && got[3] == 1);
    cudaFree(p);
    standin_set_sparse(0);
}
static bool small_program() {                                                 /* false when a call failed; frees all it took */
    int *x = nullptr, *host = nullptr;
    cudaStream_t s = nullptr;
    cublasHandle_t h = nullptr;
    bool ok = cudaMalloc(&x, 400) == cudaSuccess && cudaHostAlloc(&host, 400, 0) == cudaSuccess && cudaStreamCreate(&s) == cudaSuccess
           && cublasCreate(&h) == CUBLAS_STATUS_SUCCESS && cublasSetStream(h, s) == CUBLAS_STATUS_SUCCESS && cudaMemsetAsync(x, 0, 400, s) == cudaSuccess;
    if (ok) LAUNCH(add_kernel, 1, 100, 0, s, x, 100, 1);
    ok = ok && cudaGetLastError() == cudaSuccess && cudaMemcpyAsync(host, x, 400, cudaMemcpyDeviceToHost, s) == cudaSuccess
      && cudaStreamSynchronize(s) == cudaSuccess && host[99] == 1;
    if (h) ok = (cublasDestroy(h) == CUBLAS_STATUS_SUCCESS) && ok;
    if (s) ok = (cudaStreamDestroy(s) == cudaSuccess) && ok;
    ok = (cudaFreeHost(host) == cudaSuccess) && ok;
    return (cudaFree(x) == cudaSuccess) && ok;
}
static void test_faults() {
    standin_reset_calls();
    CHECK(small_program());
    size_t calls = standin_calls();
    CHECK(calls == 13);
    for (int from = 0; from < 2; ++from)
        for (size_t n = 1; n <= calls; ++n) {
            from ? standin_fail_from(n) : standin_fail_call(n);
            CHECK(!small_program());
            CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0);
            cudaGetLastError();
        }
    standin_reset_calls();
    CHECK(small_program());
}

/* ---------------------------------------------------------------- broken on purpose ---- */
static __global__ void no_barrier_kernel(int *out) {
    SHARED(int, s);
    s[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
static __global__ void no_syncwarp_kernel(int *out) {
    SHARED(int, s);
    s[threadIdx.x] = static_cast<int>(threadIdx.x);
    int ignored = __shfl_sync(0xffffffffu, 0, 0);                             /* meets, but orders no memory */
    out[threadIdx.x] = s[threadIdx.x ^ 1u] + ignored;
}
static __global__ void reused_kernel(int *out) {                              /* no barrier between reading and writing again */
    SHARED(int, s);
    for (int i = 0; i < 3; ++i) {
        s[threadIdx.x] = i + static_cast<int>(threadIdx.x);
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x ^ 1u];
    }
}
static __global__ void blocks_race_kernel(int *out) {
    out[threadIdx.x / 2] = static_cast<int>(blockIdx.x);
}
static __global__ void tail_kernel(float *x, int n) {
    int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i <= n) x[i] = 0;
}
static __global__ void shared_tail_kernel(float *x) {
    SHARED(float, s);
    s[threadIdx.x + 1] = 1;
    x[threadIdx.x] = s[threadIdx.x + 1];
}
static __global__ void wrong_mask_kernel(int *out, int how) {
    int t = static_cast<int>(threadIdx.x);
    if (how == 0) out[t] = __shfl_sync(0x0000ffffu, t, 0);                    /* lanes 16.. are not in their own mask */
    else if (how == 1) {
        if (t < 16) out[t] = __shfl_sync(0xffffffffu, t, 0);                  /* the others exit */
    } else if (how == 2) {
        if (t < 16) out[t] = __shfl_sync(0xffffffffu, t, 0);
        else __syncthreads();                                                 /* the others wait elsewhere */
    } else if (how == 3) {
        if (t < 16) __syncthreads();
        else __syncthreads();
    } else {
        float f = 0;
        atomicAdd(&f, 1.0f);
    }
}
static void wrong_mask() {
    const char *const expected[] = {"lacks its own lane", "has exited", "waits in __syncthreads", "waits in another", "float atomicAdd"};
    standin_quiet(1);
    for (int how = 0; how < 5; ++how)
        for (int o = 0; each_order(o); ++o) {
            standin_reset();
            Device<int> out(32);
            LAUNCH(wrong_mask_kernel, dim3(2, 1, 1), 32, 0, nullptr, out.p, how);
            OK(cudaGetLastError());
            CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure && cudaGetLastError() == cudaErrorLaunchFailure);
            CHECK(strstr(standin_last_report(), "wrong_mask_kernel") && strstr(standin_last_report(), expected[how]) && strstr(standin_last_report(), "thread ("));
        }
    standin_reset();
    standin_quiet(0);
    CHECK(small_program());                                                   /* all is well again */
}

/* Each returns whether its result is the one the programmer hoped for. */
static bool broken_barrier() {
    Device<int> out(64);
    LAUNCH(no_barrier_kernel, 1, 64, 256, nullptr, out.p);
    std::vector<int> v = out.get();
    for (int i = 0; i < 64; ++i)
        if (v[static_cast<size_t>(i)] != 63 - i) return false;
    return true;
}
static bool broken_syncwarp() {
    Device<int> out(32);
    LAUNCH(no_syncwarp_kernel, 1, 32, 128, nullptr, out.p);
    return out.get()[0] == 1;
}
static bool broken_reuse() {
    Device<int> out(64);
    LAUNCH(reused_kernel, 1, 64, 256, nullptr, out.p);
    std::vector<int> v = out.get();
    for (int i = 0; i < 64; ++i)
        if (v[static_cast<size_t>(i)] != 2 + (i ^ 1)) return false;
    return true;
}
static bool broken_blocks() {
    Device<int> out(16);
    LAUNCH(blocks_race_kernel, 2, 32, 0, nullptr, out.p);
    return out.get()[0] == 1;
}
static bool broken_tail() {
    Device<float> x(256);
    LAUNCH(tail_kernel, 2, 192, 0, nullptr, x.p, 256);
    return x.get()[0] == 0;
}
static bool broken_shared_tail() {
    Device<float> x(64);
    LAUNCH(shared_tail_kernel, 1, 64, 256, nullptr, x.p);
    return x.get()[0] == 1;
}
static bool broken_event() {                                                  /* b does not wait for a */
    Streams s;
    Device<int> x(100);
    OK(cudaMemset(x.p, 0, 400));
    OK(cudaDeviceSynchronize());
    LAUNCH(add_kernel, 1, 100, 0, s.a, x.p, 100, 1);
    OK(cudaMemcpyAsync(s.host, x.p, 400, cudaMemcpyDeviceToHost, s.b));
    OK(cudaStreamSynchronize(s.b));
    return s.host[0] == 1;
}
static bool broken_source() {                                                 /* the pinned source is overwritten too early */
    Streams s;
    Device<int> x(100);
    s.host[0] = 1;
    OK(cudaMemcpyAsync(x.p, s.host, 400, cudaMemcpyHostToDevice, s.a));
    s.host[0] = 2;
    OK(cudaStreamSynchronize(s.a));
    return x.get()[0] == 1;
}
static bool broken_wait() {                                                   /* the result is read without waiting */
    Streams s;
    Device<int> x(100);
    s.host[0] = -1;
    OK(cudaMemset(x.p, 0, 400));
    OK(cudaDeviceSynchronize());
    OK(cudaMemcpyAsync(s.host, x.p, 400, cudaMemcpyDeviceToHost, s.a));
    return s.host[0] == 0;
}
static bool broken_use_after_free() {
    Device<int> x(64);
    OK(cudaFree(x.p));
    LAUNCH(add_kernel, 1, 64, 0, nullptr, x.p, 64, 1);
    OK(cudaDeviceSynchronize());
    x.p = nullptr;
    return true;
}
static bool broken_host_access() {
    Device<int> x(64);
    volatile int *p = x.p;
    return *p == -1;
}

/* How a broken case is caught in this build: by a sanitizer's report, by a wrong result in some order, by a fault, or not. */
enum Caught { No, Race, Address, Wrong, Fault };
static const struct { const char *name; bool (*run)(); Caught plain, address, thread; } broken[] = {
    {"barrier removed", broken_barrier, Wrong, Wrong, Race},
    {"barrier before reuse removed", broken_reuse, No, No, Race},
    {"syncwarp removed", broken_syncwarp, No, No, Race},
    {"race between blocks", broken_blocks, Wrong, Wrong, Race},
    {"off-by-one tail", broken_tail, Fault, Address, No},
    {"off-by-one tail in shared memory", broken_shared_tail, No, Address, No},
    {"event left out", broken_event, Wrong, Wrong, Race},
    {"source overwritten early", broken_source, Wrong, Wrong, Race},
    {"result read early", broken_wait, Wrong, Wrong, Race},
    {"device memory used after free", broken_use_after_free, Fault, Address, No},
    {"host reads device memory", broken_host_access, Fault, No, No},
};
static int run_broken(const char *name) {      /* the child: 3 when a result is wrong in some order */
    bool right = true;
    for (const auto &b : broken)
        if (!strcmp(b.name, name))
            for (int o = 0; each_order(o); ++o) right = b.run() && right;
    return right ? 0 : 3;
}
static void test_broken(size_t index, const char *program) {
    const auto &b = broken[index];
    Caught want = TSAN ? b.thread : ASAN ? b.address : b.plain;
    std::string name = std::string("caught: ") + b.name;
    if (want == No) return;                    /* another build's */
    std::string command = std::string("TSAN_OPTIONS=atexit_sleep_ms=0 '") + program + "' '" + b.name + "' 2>&1", output;
    FILE *pipe = popen(command.c_str(), "r");
    char line[512];
    while (pipe && fgets(line, sizeof line, pipe)) output += line;
    int status = pipe ? pclose(pipe) : -1, code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    bool ok = want == Race ? output.find("data race") != std::string::npos && code == 66
            : want == Address ? output.find("ERROR: AddressSanitizer") != std::string::npos && code != 0
            : want == Wrong ? code == 3 : (WIFSIGNALED(status) || code == 128 + 11);
    printf("%s %s\n", ok ? "PASS" : "FAIL", name.c_str());
    if (!ok) printf("  status %x\n%s", static_cast<unsigned>(status), output.c_str());
    failures += !ok;
}

int main(int argc, char **argv) {
    if (argc > 1) return run_broken(argv[1]);
    setvbuf(stdout, nullptr, _IOLBF, 0);
    static const struct { const char *name; void (*run)(); } tests[] = {
        {"thread and block indices", test_ids}, {"sample kernels", test_sample}, {"block votes", test_block_votes},
        {"warp exchanges", test_warp}, {"partial warps and early exits", test_partial}, {"atomics", test_atomics},
        {"poisoned memory", test_poison}, {"intrinsics and 16-bit floats", test_intrinsics}, {"memory", test_memory},
        {"streams and events", test_streams}, {"null stream", test_null_stream}, {"launch checks", test_launch_checks},
        {"gemm", test_gemm}, {"workspaces of products", test_scratch}, {"trsm, trmm, syrk", test_triangles}, {"record and dry run", test_record_and_dry}, {"first and last blocks", test_sparse},
        {"fault injection", test_faults}, {"caught: masks and divergent barriers", wrong_mask},
    };
    for (const auto &t : tests) {
        test_ok = true;
        t.run();
        CHECK(standin_live_allocations() == 0 && standin_live_objects() == 0);
        printf("%s %s\n", test_ok ? "PASS" : "FAIL", t.name);
        failures += !test_ok;
    }
    for (size_t i = 0; i < sizeof broken / sizeof *broken; ++i) test_broken(i, argv[0]);
    return failures != 0;
}
