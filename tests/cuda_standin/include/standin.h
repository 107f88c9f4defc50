/* standin.h - a stand-in for the CUDA runtime and cuBLAS that runs kernels on the CPU, for tests.

   BUILD    compile the kernels' source as C++17 with this folder first on the include path, and link standin.cpp:
                g++ -std=c++17 -g -O1 -Iinclude program.cpp standin.cpp                              plain
                  ... -fsanitize=address      buffers and shared memory are single heap blocks: overruns are reported
                  ... -fsanitize=thread       threads of a kernel and streams are contexts: missing barriers, events
                                              and dependencies are reported as data races (memory use: see LIMITS)
                                              clang 14's is 2 to 40 times faster here than gcc 12's
            CUDA_STANDIN is defined by these headers, so that a source can tell them from the real ones. Never run the real
            nvcc with this folder as the working directory: it includes "cuda_runtime.h" from there by itself.
   SEAMS    #ifdef CUDA_STANDIN
            #define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
                STANDIN_LAUNCH(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
            #define SHARED(type, name)              STANDIN_SHARED(type, name)
            #define SHARED_ARRAY(type, name, count) STANDIN_SHARED_ARRAY(type, name, count)    (optional)
            #else
            #define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
                kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
            #define SHARED(type, name) extern __shared__ __align__(16) unsigned char shared_bytes_[]; \
                type *const name = reinterpret_cast<type *>(shared_bytes_)
            #define SHARED_ARRAY(type, name, count) __shared__ type name[count]
            #endif
            A kernel that is a template with a comma goes in parentheses: LAUNCH((k<float, 4>), ...). Errors of a launch
            come from cudaGetLastError. A plain "__shared__ T x[N];" at function scope works too, but is not poisoned,
            and under ThreadSanitizer it makes the blocks of that launch ordered (races between blocks go unseen).
   BLOCKS   run one after another, the threads of a block as fibers that switch only at __syncthreads*, __syncwarp,
            shuffles, votes, reductions and matches. Order of threads and blocks: STANDIN_ORDER=forward|reverse|shuffle[:seed].
            An exchange waits for all existing lanes of its mask at the same source line with the same mask. A caller outside
            its own mask, a lane of the mask that exited or waits elsewhere, and threads at different __syncthreads are
            errors: a line on stderr, and cudaErrorLaunchFailure from every later call until standin_reset or cudaDeviceReset.
            Threads that have exited do not take part in __syncthreads, as on sm_70 and later (standin_strict_exit forbids it).
            A shuffle from a lane outside the mask gives poison. Only __syncwarp and __syncthreads order memory.
   STREAMS  work is queued and runs as late as allowed: when something waits for it. STANDIN_STREAMS=late (default),
            eager (each call at once) or others (at a wait, every other stream first). Copies from pageable memory take the source
            at the call, copies to it finish in the call; pinned memory is read and written late. The null stream is the
            legacy one: it waits for all streams not created as non-blocking, and they wait for it.
   MEMORY   device and shared memory start as bytes 0xFF (NaN, -1). Device memory is 256-byte aligned. Outside sanitizer
            builds it ends at a guard page and is inaccessible unless queued work runs: a host access to a device pointer is a
            segmentation fault (STANDIN_GUARD=0 turns this off, and many short runs are faster without). Copies, sets and products must lie within one allocation.
            A product overwrites its workspace (16 KB at either end) before it reads its operands and after it has written;
            without one of cublasSetWorkspace it is counted. cublasSetStream takes the workspace back, as the real one does.
   DEVICES  share one memory. A launch, a record or a product whose stream, event or handle belongs to another device than the
            current one is an error, as it is there; what a kernel reads is not compared.
   LIMITS   spin-waits between threads never end; no inline PTX, textures, graphs, cooperative groups, __activemask;
            float atomics are declared but an error. ThreadSanitizer holds 8128 contexts (0.2 to 1 MB each): two per thread of
            the largest block for each stream that launches kernels. Races between two blocks of a launch that are an even number of
            places apart in running order
            may go unseen. */
#ifndef STANDIN_H
#define STANDIN_H
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif

/* ---- the device ---- */
void standin_set_memory(size_t bytes);       /* size of device memory (default 16 GiB): cudaErrorMemoryAllocation beyond it */
void standin_set_shared(size_t optin_bytes); /* most shared memory of a block after cudaFuncSetAttribute (default 99 KB) */
void standin_set_arch(int major, int minor); /* compute capability (default 8, 0) */
void standin_set_devices(int count);         /* 0: every call returns cudaErrorNoDevice (default 1) */
void standin_set_processors(int count);      /* multiprocessors (default 4) */
int standin_device_of(const void *p);        /* where cudaMalloc's memory lies; -1: elsewhere */

/* ---- how it runs; each overrides its environment variable ---- */
enum { STANDIN_FORWARD, STANDIN_REVERSE, STANDIN_SHUFFLE };
enum { STANDIN_LATE, STANDIN_EAGER, STANDIN_OTHERS };
void standin_set_order(int order, unsigned seed);
void standin_set_streams(int schedule);
void standin_set_guard(int on);              /* see MEMORY; while nothing is allocated */
void standin_strict_exit(int on);            /* 1: a thread that exited while others wait at __syncthreads is an error */
void standin_set_dry(int on);                /* 1: kernels, products, copies and sets are recorded and checked but not run;
                                                cudaMalloc reserves address space only. Set it before the first cudaMalloc. */
void standin_set_sparse(size_t blocks);      /* of each launch only so many first and last blocks run, 0: all; products, device
                                                copies and sets are checked but not run; device memory is zeros that take room
                                                as they are written: sizes beyond 2^32. Set it before the first cudaMalloc. */
void standin_reset(void);                    /* drop queued work, the sticky error, reports and fault injection; keeps memory */

/* ---- what is alive ---- */
size_t standin_live_allocations(void);       /* cudaMalloc and cudaHostAlloc blocks not yet freed */
size_t standin_live_objects(void);           /* streams, events and cuBLAS handles not yet destroyed */
size_t standin_device_bytes(void);
size_t standin_device_peak(void);            /* most bytes at any time since start or standin_reset_peak */
size_t standin_pinned_bytes(void);
size_t standin_pinned_peak(void);
void standin_reset_peak(void);
size_t standin_own_scratch(void);            /* products without a workspace of the caller's since start or standin_reset */

/* ---- reports: misuse found while running ---- */
const char *standin_last_report(void);       /* "" when there was none since standin_reset */
size_t standin_reports(void);
void standin_quiet(int on);                  /* 1: reports do not go to stderr */

/* ---- fault injection ----
   Every runtime call, cuBLAS call and launch counts, but not cudaGetLastError, cudaPeekAtLastError, the texts and cudaDeviceReset.
   The chosen call returns cudaErrorMemoryAllocation (allocations), CUBLAS_STATUS_ALLOC_FAILED (cublasCreate),
   CUBLAS_STATUS_EXECUTION_FAILED or cudaErrorUnknown, and does nothing; calls that free or destroy do their work all the same. */
void standin_reset_calls(void);              /* counting starts again at 0, no fault is pending */
size_t standin_calls(void);
void standin_fail_call(size_t n);            /* the n-th call from now on (1 = the next) fails; 0: none. Resets the count. */
void standin_fail_from(size_t n);            /* that call and all after it fail */

/* ---- the list of launches, in the order of the calls ---- */
typedef struct standin_record {
    const char *kind;                        /* "kernel", "product", "copy" or "set" */
    const char *name;                        /* the kernel as written in the launch, the cuBLAS function, "h2d", "d2h", ... */
    unsigned grid[3], block[3];              /* kernels */
    size_t shared;                           /* kernels: dynamic shared memory in bytes */
    long long m, n, k, batch;                /* products (k = size of the triangle for trsm and trmm) */
    double flops;                            /* products: 2 m n k batch, or its share for triangles */
    size_t bytes;                            /* products: A, B, C once each (C twice if beta != 0); copies and sets */
    int stream;                              /* 0 the null stream, else numbered by creation */
} standin_record;
/* record is called for each; what it points to lives for the call (the strings forever). NULL: none. */
void standin_set_recorder(void (*record)(const standin_record *, void *user), void *user);

#ifdef __cplusplus
}
#endif
#endif
