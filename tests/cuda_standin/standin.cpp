/* standin.cpp - the executor, the runtime and cuBLAS of the stand-in. standin.h says how it behaves.
   Sections: >>sanitizers >>state >>switch >>executor >>rendezvous >>memory >>streams >>runtime >>cublas >>control */
#include "cublas_v2.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <set>
#include <string>
#include <vector>
#include <sys/mman.h>

/* ---------------------------------------------------------------- >>sanitizers ----
   One operating system thread runs everything. For ThreadSanitizer each stream and each thread of a block is a context of
   its own (host -> stream: at the call; stream -> stream: events; stream -> host: synchronisation; stream <-> kernel thread:
   start and end of a launch; kernel threads: barriers). The executor itself is not instrumented (UNSEEN). */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define STANDIN_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define STANDIN_ASAN 1
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define STANDIN_TSAN 1
#endif
#ifdef __SANITIZE_ADDRESS__
#define STANDIN_ASAN 1
#endif

#if !defined(STANDIN_TSAN)
#define UNSEEN
#elif defined(__clang__)
#define UNSEEN __attribute__((disable_sanitizer_instrumentation, noinline))
#else
#define UNSEEN __attribute__((no_sanitize_thread, noinline))
#endif

#ifdef STANDIN_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
void __tsan_read_range(void *, unsigned long);
void __tsan_write_range(void *, unsigned long);
}
static void *context_new() { return __tsan_create_fiber(0); }
static void context_free(void *c) { __tsan_destroy_fiber(c); }
static void *context_now() { return __tsan_get_current_fiber(); }
UNSEEN static void context_switch(void *c) { __tsan_switch_to_fiber(c, __tsan_switch_to_fiber_no_sync); }
UNSEEN static void acquire(void *token) { __tsan_acquire(token); }
UNSEEN static void release(void *token) { __tsan_release(token); }
static void note_read(const void *p, size_t n) { __tsan_read_range(const_cast<void *>(p), n); }
static void note_write(void *p, size_t n) { __tsan_write_range(p, n); }
static void ignore(bool on) {
    if (on) { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    else { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
}
#else
static void *context_new() { return nullptr; }
static void context_free(void *) {}
static void *context_now() { return nullptr; }
static void context_switch(void *) {}
static void acquire(void *) {}
static void release(void *) {}
static void note_read(const void *, size_t) {}
static void note_write(void *, size_t) {}
static void ignore(bool) {}
#endif
#ifdef STANDIN_ASAN
#include <sanitizer/common_interface_defs.h>
#define ASAN(call) call
#else
#define ASAN(call)
#endif
#if defined(STANDIN_TSAN) || defined(STANDIN_ASAN)
static const bool sanitized = true;
#else
static const bool sanitized = false;
#endif
#ifdef STANDIN_TSAN
static const bool race_build = true;
#else
static const bool race_build = false;
#endif

/* ---------------------------------------------------------------- >>state ---- */
typedef long long Token;                       /* its address names a synchronisation to ThreadSanitizer */
struct Work {                                  /* one queued call */
    std::function<void()> run;                 /* may be empty: an event */
    std::vector<std::shared_ptr<Work>> after;  /* beyond what is earlier in the same stream */
    cudaStream_t stream = nullptr;
    bool done = false;
    double time = 0;
    Token begin = 0, end = 0;
};
typedef std::shared_ptr<Work> WorkRef;

struct Lane {                                  /* ThreadSanitizer builds: one thread's context and the stack it keeps */
    void *context;
    standin::Fiber *fiber;
};
struct CUstream_st {
    int number = 0, queries = 0, device = 0;
    bool blocking = true;                      /* ordered with the null stream */
    std::deque<WorkRef> queue;
    WorkRef last;
    standin::Fiber *fiber = nullptr;           /* ThreadSanitizer builds: the stack and the context that its work runs in, */
    void *context = nullptr;                   /* made with the stream: a new context knows what its maker knows */
    std::vector<Lane> lanes[2];                /* threads of even and odd blocks */
    unsigned blocks = 0;
};
struct CUevent_st {
    WorkRef work;                              /* the last record, or none */
    bool timing = true;
    int queries = 0;
};
struct cublasContext {
    cudaStream_t stream = nullptr;
    int device = 0;
    bool device_scalars = false;
    void *workspace = nullptr;                 /* nullptr: cuBLAS takes memory of its own */
    size_t workspace_bytes = 0;
};

enum class Space { Device, Pinned, Registered, Pageable };
struct Allocation {
    size_t bytes = 0, mapped = 0;              /* mapped: length of the mapping at base, 0: from the heap */
    int device = 0;
    Space space = Space::Device;
    void *base = nullptr;
};

static thread_local int t_device;              /* current */

struct Runtime {
    std::recursive_mutex mutex;
    std::map<uintptr_t, Allocation> memory;
    std::set<cudaStream_t> streams;
    std::set<cudaEvent_t> events;
    std::set<cublasHandle_t> handles;
    std::map<std::pair<int, const void *>, size_t> shared_allowed; /* of a device and a kernel */
    CUstream_st null_stream;
    int stream_count = 0;
    size_t used = 0, peak = 0, pinned = 0, pinned_peak = 0;

    cudaError_t last = cudaSuccess, sticky = cudaSuccess;
    size_t calls = 0, fail_at = 0, reports = 0, own_scratch = 0;
    bool fail_on = false, quiet = false, executing = false;
    std::string report;

    size_t capacity = size_t(16) << 30, optin = 99 * 1024;
    int major = 8, minor = 0, devices = 1, processors = 4;
    int order = STANDIN_FORWARD, schedule = STANDIN_LATE;
    unsigned seed = 1;
    uint64_t sparse = 0;                       /* blocks that run at either end of a launch, 0: all */
    bool dry = false, strict_exit = false, guard = !sanitized;
    void (*record)(const standin_record *, void *) = nullptr;
    void *record_user = nullptr;

    Runtime() {
        null_stream.context = context_new();
        const char *s = getenv("STANDIN_ORDER");
        if (s && !strcmp(s, "reverse")) order = STANDIN_REVERSE;
        if (s && !strncmp(s, "shuffle", 7)) {
            order = STANDIN_SHUFFLE;
            if (s[7] == ':') seed = static_cast<unsigned>(strtoul(s + 8, nullptr, 10));
        }
        s = getenv("STANDIN_STREAMS");
        if (s && !strcmp(s, "eager")) schedule = STANDIN_EAGER;
        if (s && !strcmp(s, "others")) schedule = STANDIN_OTHERS;
        s = getenv("STANDIN_GUARD");
        if (s && !strcmp(s, "0")) guard = false;
    }
};
static Runtime &rt() {
    static Runtime *const runtime = new Runtime;   /* never destroyed: programs may free at exit */
    return *runtime;
}

static const int poison = 0xff;
static bool addresses_alone() { return rt().dry || rt().sparse; }

/* Every misuse ends here: a line on stderr, kept for standin_last_report. */
static void report(const char *format, ...) {
    ignore(true);
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    rt().report = text;
    ++rt().reports;
    if (!rt().quiet) fprintf(stderr, "standin: %s\n", text);
    ignore(false);
}

/* ---------------------------------------------------------------- >>switch ----
   standin_switch(save, to): pushes the callee-saved registers, stores the stack pointer in *save, continues at to. */
#if defined(__x86_64__) && !defined(STANDIN_UCONTEXT)
extern "C" void standin_switch(void **save, void *to);
__asm__(".text\n.globl standin_switch\n.type standin_switch,@function\nstandin_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
        ".size standin_switch,.-standin_switch\n");
static void *stack_prepare(char *top, size_t, void (*entry)()) {
    void **sp = reinterpret_cast<void **>(top);       /* top is 16-byte aligned */
    *--sp = nullptr;                                  /* return address of entry: none */
    *--sp = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__) && !defined(STANDIN_UCONTEXT)
extern "C" void standin_switch(void **save, void *to);
__asm__(".text\n.globl standin_switch\n.type standin_switch,%function\nstandin_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n.size standin_switch,.-standin_switch\n");
static void *stack_prepare(char *top, size_t, void (*entry)()) {
    void **sp = reinterpret_cast<void **>(top) - 20;
    for (int i = 0; i < 20; ++i) sp[i] = nullptr;
    sp[11] = reinterpret_cast<void *>(entry);         /* x30 */
    return sp;
}
#else
#include <ucontext.h>
static void standin_switch(void **save, void *to) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t *>(to));
}
static void *stack_prepare(char *top, size_t bytes, void (*entry)()) {
    ucontext_t *c = new ucontext_t;
    getcontext(c);
    c->uc_stack.ss_sp = top - bytes;
    c->uc_stack.ss_size = bytes;
    c->uc_link = nullptr;
    makecontext(c, entry, 0);
    return c;
}
#endif

/* ---------------------------------------------------------------- >>executor ---- */
namespace standin {
struct Fiber {
    void *sp, *fake;
    char *stack;
    Fiber *next;
};
Thread *current;
uint3 block_index;
dim3 block_dim, grid_dim;
}
using standin::Fiber;
using standin::Thread;
using standin::current;

enum State : unsigned { New, Ready, Waiting, Exited };
struct Abort {};                               /* thrown in every thread of a block that failed */
struct Region {                                /* shared memory: 0 the dynamic part, others by declaration */
    const void *key;
    char *data;
    size_t bytes;
    Token token;
};
struct Tokens {                                /* fresh for each block, so that blocks are not ordered by them */
    Token barrier[2], lane[1024], group[32][4];
};
struct Launch {
    const char *name;
    dim3 grid, block;
    size_t shared, shared_limit;
    std::function<void()> body;
    cudaStream_t stream;
    bool ordered;                              /* uses static __shared__ variables */
    Token begin, end;
};

static const size_t stack_bytes = sanitized && !race_build ? 512 << 10 : 160 << 10;
static Thread threads[1024];
static unsigned thread_order[1024], missing_lane[32], group_next[32];
static unsigned thread_count, alive, cursor, turn, at_barrier, phase; /* cursor: threads that have begun; turn: in thread_order */
static struct { unsigned yes, arrived; } outcome[2];
static bool aborting;
static Launch *active;
static Tokens *tokens;
static Region regions[33];
static unsigned region_count;
static Fiber *idle, *running;
static void *scheduler_sp;
#ifdef STANDIN_ASAN
static void *scheduler_fake;
static const void *scheduler_stack;
static size_t scheduler_bytes;
#endif
static uint64_t random_state;

UNSEEN static unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((random_state >> 33) % n);
}

UNSEEN static void enter(Fiber *f) {           /* scheduler -> fiber, until it leaves */
    running = f;
    ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, f->stack + 4096, stack_bytes - 4096));
    standin_switch(&scheduler_sp, f->sp);
    ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr));
}
UNSEEN static void leave() {                   /* fiber -> scheduler, until entered again */
    Fiber *f = running;
    ASAN(__sanitizer_start_switch_fiber(&f->fake, scheduler_stack, scheduler_bytes));
    standin_switch(&f->sp, scheduler_sp);
    ASAN(__sanitizer_finish_switch_fiber(f->fake, &scheduler_stack, &scheduler_bytes));
}

UNSEEN static void run_thread(Thread *t) {
    current = t;
    context_switch(t->context);
    acquire(&active->begin);
    try { active->body(); } catch (const Abort &) {}
    release(&active->end);
    current->state = Exited;
    --alive;
}
/* A fiber runs thread after thread; one that waits keeps the fiber, and the scheduler takes another for the rest.
   Under ThreadSanitizer each thread has a fiber of its own: a stack must not pass from context to context. */
UNSEEN static void fiber_main() {
    ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes));
    for (;;) {
        do run_thread(&threads[thread_order[cursor++]]);
        while (!race_build && cursor < thread_count && !aborting);
        running->next = idle;
        idle = running;
        leave();
    }
}
UNSEEN static Fiber *make_fiber(void (*entry)()) {
    static size_t made;
    ignore(true);
    void *p = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { perror("standin: stack of a fiber"); abort(); }
    mprotect(p, 4096, PROT_NONE);
    Fiber *f = new Fiber();
    f->stack = static_cast<char *>(p);
    size_t colour = made++ * 576 % 49152;      /* stacks begin in different cache lines */
    f->sp = stack_prepare(f->stack + stack_bytes - colour, stack_bytes - colour - 4096, entry);
    ignore(false);
    return f;
}
UNSEEN static Fiber *next_fiber() {            /* for the thread at the cursor */
    if (race_build) return threads[thread_order[cursor]].fiber;
    if (!idle) return make_fiber(fiber_main);
    Fiber *f = idle;
    idle = f->next;
    return f;
}
static void free_fiber(Fiber *f) {
    munmap(f->stack, stack_bytes);
    delete f;
}
static void free_lanes(cudaStream_t stream) {
    for (auto &pool : stream->lanes)
        for (Lane &l : pool) {
            context_free(l.context);
            free_fiber(l.fiber);
        }
    if (!race_build) return;
    context_free(stream->context);
    if (stream->fiber) free_fiber(stream->fiber);
}
UNSEEN static Fiber *ready_fiber() {           /* of the first thread from `turn` on that can go on, now the current one */
    while (turn < thread_count && threads[thread_order[turn]].state != Ready) ++turn;
    if (turn == thread_count) return nullptr;
    current = &threads[thread_order[turn]];
    context_switch(current->context);
    return current->fiber;
}
/* The current thread, until its rendezvous is complete. Who is next is as the scheduler would have it; without sanitizers,
   which must be told of each change of stacks, it is switched to from here. */
UNSEEN static void suspend() {
    Fiber *self = running, *next = nullptr;
    current->fiber = self;
    current->state = Waiting;
    if (!sanitized && !aborting) next = cursor < thread_count ? next_fiber() : ready_fiber();
    if (next) {
        running = next;
        standin_switch(&self->sp, next->sp);
    } else leave();
    if (aborting) throw Abort();
}

UNSEEN static bool same_site(const Thread &a, const Thread &b) {
    return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}
static const char *const op_names[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle", "a vote", "a reduction", "a match"};

UNSEEN static void fail_block(const Thread &t, const char *format, ...) {
    char text[512];
    va_list arguments;
    ignore(true);
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    ignore(false);
    report("kernel %s, block (%u,%u,%u), thread (%u,%u,%u): %s", active->name, standin::block_index.x, standin::block_index.y,
           standin::block_index.z, t.index.x, t.index.y, t.index.z, text);
    rt().sticky = cudaErrorLaunchFailure;
    aborting = true;
}

/* No thread can run and the barrier is not complete: say who waits for whom. */
UNSEEN static void explain_stall() {
    for (unsigned id = 0; id < thread_count; ++id) {
        const Thread &t = threads[id];
        if (t.state != Waiting || t.op == standin::Barrier) continue;
        for (unsigned l = 0; l < 32; ++l) {
            unsigned other = (id & ~31u) + l;
            if (!(t.mask >> l & 1) || other >= thread_count || other == id) continue;
            const Thread &o = threads[other];
            if (o.state == Exited)
                return fail_block(t, "waits in %s with mask 0x%08x at %s:%d, but lane %u of that mask has exited",
                                  op_names[t.op], t.mask, t.file, t.line, l);
            if (o.op != t.op || o.mask != t.mask || !same_site(o, t))
                return fail_block(t, "waits in %s with mask 0x%08x at %s:%d, but lane %u of that mask waits in %s with mask 0x%08x at %s:%d",
                                  op_names[t.op], t.mask, t.file, t.line, l, op_names[o.op], o.mask, o.file, o.line);
        }
    }
    fail_block(threads[0], "the block cannot go on");
}

UNSEEN static void shuffle_threads() {
    for (unsigned i = thread_count; i > 1; --i) {
        unsigned j = random_below(i), keep = thread_order[i - 1];
        thread_order[i - 1] = thread_order[j];
        thread_order[j] = keep;
    }
}

/* All threads that have not exited wait at a barrier. */
UNSEEN static void complete_barrier() {
    const Thread *first = nullptr, *exited = nullptr;
    for (unsigned id = 0; id < thread_count; ++id) {
        Thread &t = threads[id];
        if (t.state == Exited) { exited = &t; continue; }
        if (!first) first = &t;
        if (!same_site(*first, t))
            return fail_block(t, "waits in __syncthreads at %s:%d while thread (%u,%u,%u) waits in another at %s:%d", t.file, t.line,
                              first->index.x, first->index.y, first->index.z, first->file, first->line);
        t.state = Ready;
    }
    if (exited && rt().strict_exit) return fail_block(*exited, "has exited while others wait in __syncthreads at %s:%d", first->file, first->line);
    outcome[phase].arrived = at_barrier;
    phase ^= 1;                                /* the other one has been read by all: they are here */
    outcome[phase].yes = at_barrier = 0;
    if (rt().order == STANDIN_SHUFFLE) shuffle_threads();
}

UNSEEN static void run_block() {
    unsigned id = 0;
    for (unsigned z = 0; z < active->block.z; ++z)
        for (unsigned y = 0; y < active->block.y; ++y)
            for (unsigned x = 0; x < active->block.x; ++x, ++id) {
                threads[id].index = {x, y, z};
                threads[id].id = id;
                threads[id].state = New;
                threads[id].op = standin::None;
            }
    alive = thread_count;
    cursor = at_barrier = phase = outcome[0].yes = 0;
    turn = thread_count;
    while (cursor < thread_count && !aborting) enter(next_fiber());
    while (alive && !aborting) {
        bool moved = false;
        if (at_barrier == alive) complete_barrier();
        turn = 0;
        while (Fiber *ready = aborting ? nullptr : ready_fiber()) {
            moved = true;
            enter(ready);
        }
        if (!moved && !aborting) explain_stall();
    }
    for (unsigned i = 0; i < thread_count; ++i) {                  /* after a failure: unwind the threads that wait */
        if (threads[i].state != Ready && threads[i].state != Waiting) continue;
        current = &threads[i];
        context_switch(current->context);
        enter(current->fiber);
    }
    current = nullptr;
}

/* Shared memory of one block: a heap block of its exact size, poisoned; under ThreadSanitizer a mapping made anew, without history. */
UNSEEN static void region_open(Region &r, const void *key, size_t bytes) {
    r = Region{key, nullptr, bytes, 0};
    void *p = nullptr;
    if (race_build && bytes) {
        p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) abort();
    } else if (bytes && posix_memalign(&p, 16, bytes)) abort();
    r.data = static_cast<char *>(p);
}
UNSEEN static void region_renew(Region &r) {
    if (!r.bytes) return;
    ignore(true);
    if (race_build && mmap(r.data, r.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) abort();
    memset(r.data, poison, r.bytes);
    ignore(false);
}
UNSEEN static void region_close(Region &r) {
    if (race_build && r.bytes) munmap(r.data, r.bytes);
    else free(r.data);
}

UNSEEN static void run_launch(Launch &l) {
    Runtime &R = rt();
    CUstream_st &stream = l.stream ? *l.stream : R.null_stream;
    active = &l;
    standin::block_dim = l.block;
    standin::grid_dim = l.grid;
    thread_count = l.block.x * l.block.y * l.block.z;
    aborting = false;
    random_state = R.seed * 0x9e3779b97f4a7c15u + 1;
    for (unsigned i = 0; i < thread_count; ++i) thread_order[i] = R.order == STANDIN_REVERSE ? thread_count - 1 - i : i;
    region_open(regions[0], nullptr, l.shared);
    region_count = 1;

    uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z, step = 1, start = 0;
    if (R.order == STANDIN_SHUFFLE) {
        step = 1 + (uint64_t(random_below(1u << 30)) << 1) % blocks;
        while (std::gcd(step, blocks) != 1) ++step;
        start = random_below(1u << 30) % blocks;
    }
    for (uint64_t i = 0; i < blocks && !aborting; ++i) {
        uint64_t b = R.order == STANDIN_REVERSE ? blocks - 1 - i
                                                : static_cast<uint64_t>((static_cast<__uint128_t>(i) * step + start) % blocks);
        if (R.sparse && b >= R.sparse && blocks - b > R.sparse) continue;
        standin::block_index = {static_cast<unsigned>(b % l.grid.x), static_cast<unsigned>(b / l.grid.x % l.grid.y),
                                static_cast<unsigned>(b / l.grid.x / l.grid.y)};
        for (unsigned r = 0; r < region_count; ++r) region_renew(regions[r]);
        if (race_build) {
            std::vector<Lane> &lanes = stream.lanes[stream.blocks++ & 1];
            while (lanes.size() < thread_count) lanes.push_back({context_new(), make_fiber(fiber_main)});
            for (unsigned t = 0; t < thread_count; ++t) {
                threads[t].context = lanes[t].context;
                threads[t].fiber = lanes[t].fiber;
            }
            tokens = new Tokens();
            release(&l.begin);
        }
        if (R.order == STANDIN_SHUFFLE) shuffle_threads();
        run_block();
        context_switch(stream.context);
        if (race_build) {
            delete tokens;
            if (l.ordered) acquire(&l.end);
        }
    }
    acquire(&l.end);
    for (unsigned r = 0; r < region_count; ++r) region_close(regions[r]);
    active = nullptr;
}

/* ---------------------------------------------------------------- >>rendezvous ---- */
UNSEEN static void exchange_results(Thread *warp, unsigned members, standin::Op op, unsigned how) {
    uint64_t ballot = 0, total = 0;
    bool first = true;
    for (unsigned l = 0; l < 32 && op != standin::Shuffle; ++l) {
        if (!(members >> l & 1)) continue;
        uint64_t v = warp[l].value;
        ballot |= uint64_t(v != 0) << l;
        if (first) total = v;
        else switch (how) {
            case standin::Add: total += v; break;
            case standin::Min: total = v < total ? v : total; break;
            case standin::Max: total = v > total ? v : total; break;
            case standin::And: total &= v; break;
            case standin::Or: total |= v; break;
            default: total ^= v; break;
        }
        first = false;
    }
    for (unsigned l = 0; l < 32; ++l) {
        Thread &t = warp[l];
        if (!(members >> l & 1)) continue;
        if (op == standin::Vote) t.result = ballot;
        else if (op == standin::Reduce) t.result = total;
        else if (op == standin::Shuffle) t.result = members >> (t.source & 31) & 1 ? warp[t.source & 31].value : ~uint64_t(0);
        else {
            t.result = 0;
            for (unsigned j = 0; j < 32; ++j) t.result |= uint64_t((members >> j & 1) && warp[j].value == t.value) << j;
        }
    }
}

UNSEEN uint64_t standin::exchange(Op op, unsigned mask, uint64_t value, unsigned source, const char *file, int line) {
    Thread &self = *current;
    unsigned w = self.id / 32, lane = self.id % 32, size = thread_count - w * 32;
    unsigned members = size >= 32 ? mask : mask & ((1u << size) - 1);
    Thread *warp = threads + w * 32;
    self.op = op;
    self.mask = mask;
    self.value = value;
    self.source = source;
    self.file = file;
    self.line = line;
    if (!(mask >> lane & 1)) {
        fail_block(self, "calls %s with mask 0x%08x, which lacks its own lane %u, at %s:%d", op_names[op], mask, lane, file, line);
        throw Abort();
    }
    if (op == SyncWarp && race_build) release(&tokens->lane[self.id]);
    for (unsigned i = 0, l = missing_lane[w]; i < 32; ++i, l = (l + 1) % 32) {   /* starts at the one missing last time */
        const Thread &o = warp[l];
        if (!(members >> l & 1) || l == lane) continue;
        if (o.state == Waiting && o.op == op && o.mask == mask && same_site(o, self)) continue;
        missing_lane[w] = l;
        suspend();
        if (op == SyncWarp && race_build) acquire(&tokens->group[w][self.result & 3]);
        return self.result;
    }
    exchange_results(warp, members, op, source);
    unsigned group = group_next[w]++ & 3;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(members >> l & 1)) continue;
        if (op == SyncWarp && race_build) {
            warp[l].result = group;
            acquire(&tokens->lane[w * 32 + l]);
        }
        warp[l].op = None;
        if (l != lane) warp[l].state = Ready;
    }
    if (op == SyncWarp && race_build) release(&tokens->group[w][group]);
    return self.result;
}

UNSEEN int standin::block_barrier(bool predicate, int what, const char *file, int line) {
    Thread &self = *current;
    unsigned mine = phase;
    self.op = Barrier;
    self.mask = 0;
    self.file = file;
    self.line = line;
    outcome[mine].yes += predicate;
    ++at_barrier;
    if (race_build) release(&tokens->barrier[mine]);
    suspend();
    if (race_build) acquire(&tokens->barrier[mine]);
    self.op = None;
    unsigned yes = outcome[mine].yes;
    return what == 1 ? static_cast<int>(yes) : what == 2 ? yes != 0 : yes == outcome[mine].arrived;
}

void standin::fault(const char *message) {
    fail_block(*current, "%s", message);
    throw Abort();
}
UNSEEN void standin::fence() {                 /* orders this thread after every thread that fenced before */
    static Token token;
    acquire(&token);
    release(&token);
}
UNSEEN void standin::note_static_shared() { active->ordered = true; }
UNSEEN void *standin::dynamic_shared() { return regions[0].data; }
UNSEEN void *standin::shared_array(const void *key, size_t bytes) {
    size_t total = active->shared + bytes;
    for (unsigned r = 1; r < region_count; ++r) {
        if (regions[r].key == key) {
            acquire(&regions[r].token);
            return regions[r].data;
        }
        total += regions[r].bytes;
    }
    if (total > active->shared_limit || region_count == 33) fault("more shared memory than a block may have");
    Region &r = regions[region_count++];
    region_open(r, key, bytes);
    region_renew(r);
    release(&r.token);
    return r.data;
}

/* ---------------------------------------------------------------- >>memory ---- */
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* The allocation that holds p, if it holds all the bytes from there; *inside says whether p lies in one at all. */
static const Allocation *find(const void *p, size_t bytes, bool *inside = nullptr) {
    uintptr_t a = reinterpret_cast<uintptr_t>(p);
    auto it = rt().memory.upper_bound(a);
    if (inside) *inside = false;
    if (it == rt().memory.begin()) return nullptr;
    --it;
    if (a - it->first >= it->second.bytes) return nullptr;
    if (inside) *inside = true;
    return bytes <= it->second.bytes - (a - it->first) ? &it->second : nullptr;
}

static void guard_device(bool accessible) {
    for (auto &entry : rt().memory)
        if (entry.second.space == Space::Device && entry.second.mapped && !addresses_alone())
            mprotect(entry.second.base, entry.second.mapped - 4096, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

/* Where the system has large pages, a large array lies on them: it is opened and closed with every wait, page by page. */
static void *map_pages(size_t bytes, int access, bool on_large) {
    const size_t large = static_cast<size_t>(2) << 20, extra = on_large && bytes >= large ? large : 0;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *all = static_cast<char *>(mmap(nullptr, bytes + extra, access, flags, -1, 0));
    if (all == MAP_FAILED || !extra) return all;
    char *base = reinterpret_cast<char *>(round_up(reinterpret_cast<uintptr_t>(all), large));
    if (base > all) munmap(all, static_cast<size_t>(base - all));
    if (all + extra > base) munmap(base + bytes, static_cast<size_t>(all + extra - base));
#ifdef MADV_HUGEPAGE
    madvise(base, bytes, MADV_HUGEPAGE);
#endif
    return base;
}

static cudaError_t allocate(void **out, size_t bytes, Space space) {
    Runtime &R = rt();
    *out = nullptr;
    if (!bytes) return cudaSuccess;
    if (space == Space::Device && bytes > R.capacity - R.used) return cudaErrorMemoryAllocation;
    Allocation a;
    a.bytes = bytes;
    a.space = space;
    a.device = t_device;
    bool guarded = space == Space::Device && R.guard;
    char *data = nullptr;
    if (addresses_alone() || guarded) {
        a.mapped = round_up(bytes, 4096) + 4096;
        int access = R.dry && space == Space::Device ? PROT_NONE : PROT_READ | PROT_WRITE;
        a.base = map_pages(a.mapped, access, !addresses_alone()); /* all of it is written below */
        if (a.base == MAP_FAILED) return cudaErrorMemoryAllocation;
        data = static_cast<char *>(a.base);
        if (guarded) data += a.mapped - 4096 - round_up(bytes, 256);
    } else {
        if (posix_memalign(&a.base, space == Space::Device ? 256 : 4096, bytes)) return cudaErrorMemoryAllocation;
        data = static_cast<char *>(a.base);
    }
    if (!addresses_alone()) memset(data, poison, bytes);
    if (R.sparse) mprotect(static_cast<char *>(a.base) + a.mapped - 4096, 4096, PROT_NONE);
    if (guarded && !addresses_alone()) {
        mprotect(static_cast<char *>(a.base) + a.mapped - 4096, 4096, PROT_NONE);
        mprotect(a.base, a.mapped - 4096, PROT_NONE);
    }
    R.memory[reinterpret_cast<uintptr_t>(data)] = a;
    size_t &used = space == Space::Device ? R.used : R.pinned, &peak = space == Space::Device ? R.peak : R.pinned_peak;
    used += bytes;
    if (used > peak) peak = used;
    *out = data;
    return cudaSuccess;
}

static void run_all();
static cudaError_t deallocate(void *p, Space space) {
    Runtime &R = rt();
    if (!p) return cudaSuccess;
    auto it = R.memory.find(reinterpret_cast<uintptr_t>(p));
    if (it == R.memory.end() || it->second.space != space) {
        report("free of %p, which is not the start of a live allocation of that kind", p);
        return cudaErrorInvalidValue;
    }
    run_all();
    Allocation a = it->second;
    R.memory.erase(it);
    if (space == Space::Registered) return cudaSuccess;
    (space == Space::Device ? R.used : R.pinned) -= a.bytes;
    if (a.mapped) munmap(a.base, a.mapped);
    else free(a.base);
    return cudaSuccess;
}

/* ---------------------------------------------------------------- >>streams ---- */
static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static Work *performing;
static void *host_sp;
UNSEEN static void perform_here() {
    Work &w = *performing;
    acquire(&w.begin);
    for (const WorkRef &d : w.after) acquire(&d->end);
    if (w.run && rt().sticky == cudaSuccess) w.run();
    release(&w.end);
}
UNSEEN static void stream_main() {
    for (;;) {
        perform_here();
        standin_switch(&performing->stream->fiber->sp, host_sp);
    }
}
/* Under ThreadSanitizer on a stack of the stream's own, else on the host's. */
UNSEEN static void perform(Work &w) {
    void *host = context_now();
    performing = &w;
    rt().executing = true;
    if (race_build) {
        if (!w.stream->fiber) w.stream->fiber = make_fiber(stream_main);
        context_switch(w.stream->context);
        standin_switch(&host_sp, w.stream->fiber->sp);
    } else perform_here();
    context_switch(host);
    rt().executing = false;
    w.time = now_ms();
    w.done = true;
    w.after.clear();
    w.run = nullptr;
}
static void run_until(const WorkRef &w) {
    while (!w->done) {
        WorkRef front = w->stream->queue.front();
        for (size_t i = 0; i < front->after.size(); ++i) run_until(front->after[i]);
        w->stream->queue.pop_front();
        perform(*front);
    }
}
static bool open_window() {                    /* device memory is accessible while queued work runs */
    bool open = rt().guard && !addresses_alone();
    if (open) guard_device(true);
    return open;
}
/* The host waits for w. */
static void wait_for(const WorkRef &w) {
    if (!w) return;
    if (!w->done) {
        bool opened = open_window();
        if (rt().schedule == STANDIN_OTHERS)
            for (cudaStream_t s : rt().streams)
                if (s != w->stream && s->last) run_until(s->last);
        run_until(w);
        if (opened) guard_device(false);
    }
    acquire(&w->end);
}
static void run_all() {
    wait_for(rt().null_stream.last);
    for (cudaStream_t s : rt().streams) wait_for(s->last);
}

static WorkRef enqueue(cudaStream_t handle, std::function<void()> run, WorkRef after = nullptr) {
    Runtime &R = rt();
    CUstream_st *stream = handle ? handle : &R.null_stream;
    WorkRef w = std::make_shared<Work>();
    w->run = std::move(run);
    w->stream = stream;
    if (after) w->after.push_back(after);
    if (!handle) {
        for (cudaStream_t s : R.streams)
            if (s->blocking && s->last) w->after.push_back(s->last);
    } else if (stream->blocking && R.null_stream.last) w->after.push_back(R.null_stream.last);
    release(&w->begin);
    stream->queue.push_back(w);
    stream->last = w;
    if (R.schedule == STANDIN_EAGER) {
        bool opened = open_window();
        run_until(w);
        if (opened) guard_device(false);
    }
    return w;
}

/* ---------------------------------------------------------------- >>runtime ----
   One Call per entry: counts it, and says in status whether it may go on. */
struct Call {
    std::unique_lock<std::recursive_mutex> lock;
    cudaError_t status;
    explicit Call(cudaError_t injected = cudaErrorUnknown) : status(cudaSuccess) {
        Runtime &R = rt();
        if (R.executing) { ignore(true); status = cudaErrorNotPermitted; return; }   /* from a host function */
        lock = std::unique_lock<std::recursive_mutex>(R.mutex);
        ignore(true);
        ++R.calls;
        bool hit = R.fail_at && (R.fail_on ? R.calls >= R.fail_at : R.calls == R.fail_at);
        status = R.devices == 0 ? cudaErrorNoDevice : R.sticky != cudaSuccess ? R.sticky : hit ? injected : cudaSuccess;
    }
    Call(const Call &) = delete;
    ~Call() { ignore(false); }
    cudaError_t end(cudaError_t e) {
        if (status == cudaSuccess && e == cudaSuccess) e = rt().sticky;
        if (e != cudaSuccess && e != cudaErrorNotReady && lock.owns_lock()) rt().last = e;
        return e;
    }
    cudaError_t freed(cudaError_t e) { return end(status != cudaSuccess ? status : e); }
};
#define CALL(...) Call call{__VA_ARGS__}; if (call.status != cudaSuccess) return call.end(call.status)

static bool live(cudaStream_t s) { return !s || rt().streams.count(s); }
static bool here(cudaStream_t s) { return live(s) && (!s || s->device == t_device); } /* launches and records go to the current device */
static int stream_number(cudaStream_t s) { return s ? s->number : 0; }
static void emit(standin_record &r, cudaStream_t stream) {
    r.stream = stream_number(stream);
    if (rt().record) rt().record(&r, rt().record_user);
}
static void emit_copy(const char *kind, const char *name, size_t bytes, cudaStream_t stream) {
    standin_record r = {};
    r.kind = kind;
    r.name = name;
    r.bytes = bytes;
    emit(r, stream);
}

const char *cudaGetErrorName(cudaError_t e) {
    switch (e) {
#define X(name, value, text) case name: return #name;
    STANDIN_CUDA_ERRORS(X)
#undef X
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
#define X(name, value, text) case name: return text;
    STANDIN_CUDA_ERRORS(X)
#undef X
    }
    return "unrecognized error code";
}
cudaError_t cudaGetLastError() {
    std::lock_guard<std::recursive_mutex> lock(rt().mutex);
    cudaError_t e = rt().last;
    rt().last = cudaSuccess;
    return rt().sticky != cudaSuccess ? rt().sticky : e;
}
cudaError_t cudaPeekAtLastError() { return rt().sticky != cudaSuccess ? rt().sticky : rt().last; }
cudaError_t cudaGetDeviceCount(int *count) {
    if (count) *count = 0;
    CALL();
    if (!count) return call.end(cudaErrorInvalidValue);
    *count = rt().devices;
    return call.end(cudaSuccess);
}
/* To set the device that is current cannot fail, and is not counted. */
cudaError_t cudaSetDevice(int device) {
    if (device == t_device && rt().devices > device) return cudaSuccess;
    CALL();
    if (device >= 0 && device < rt().devices) t_device = device;
    return call.end(device >= 0 && device < rt().devices ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int *device) {
    CALL();
    *device = t_device;
    return call.end(cudaSuccess);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    CALL();
    if (device < 0 || device >= rt().devices) return call.end(cudaErrorInvalidDevice);
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "CPU stand-in");
    p->totalGlobalMem = rt().capacity;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = rt().optin;
    p->sharedMemPerMultiprocessor = rt().optin + 1024;
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->memPitch = 0x7fffffff;
    p->major = rt().major;
    p->minor = rt().minor;
    p->multiProcessorCount = 4;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = (rt().major >= 9 ? 50 : 40) << 20;
    p->memoryBusWidth = 256;
    p->asyncEngineCount = 2;
    p->concurrentKernels = p->canMapHostMemory = p->unifiedAddressing = 1;
    return call.end(cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    CALL();
    if (!value || device < 0 || device >= rt().devices) return call.end(value ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = rt().processors; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 256; break;
    case cudaDevAttrL2CacheSize: *value = (rt().major >= 9 ? 50 : 40) << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = rt().major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = rt().minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(rt().optin) + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(rt().optin); break;
    default: return call.end(cudaErrorInvalidValue);
    }
    return call.end(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() {
    CALL();
    run_all();
    return call.end(cudaSuccess);
}
cudaError_t cudaDeviceReset() {
    standin_reset();
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    CALL();
    *free_bytes = rt().capacity - rt().used;
    *total_bytes = rt().capacity;
    return call.end(cudaSuccess);
}
static cudaError_t allocate_call(void **p, size_t bytes, Space space) {
    CALL(cudaErrorMemoryAllocation);
    return call.end(p ? allocate(p, bytes, space) : cudaErrorInvalidValue);
}
cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate_call(p, bytes, Space::Device); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return allocate_call(p, bytes, Space::Pinned); }
cudaError_t cudaMallocHost(void **p, size_t bytes) { return allocate_call(p, bytes, Space::Pinned); }
cudaError_t cudaFree(void *p) { Call call; return call.freed(deallocate(p, Space::Device)); }
cudaError_t cudaFreeHost(void *p) { Call call; return call.freed(deallocate(p, Space::Pinned)); }
cudaError_t cudaHostUnregister(void *p) { Call call; return call.freed(p ? deallocate(p, Space::Registered) : cudaErrorInvalidValue); }
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned) {
    CALL(cudaErrorMemoryAllocation);
    bool inside = false;
    if (!p || !bytes) return call.end(cudaErrorInvalidValue);
    find(p, 1, &inside);
    if (inside) return call.end(cudaErrorHostMemoryAlreadyRegistered);
    Allocation a;
    a.bytes = bytes;
    a.space = Space::Registered;
    rt().memory[reinterpret_cast<uintptr_t>(p)] = a;
    return call.end(cudaSuccess);
}

/* Where p lies; false when it starts inside an allocation and runs past its end. */
static bool classify(const void *p, size_t bytes, Space *space) {
    bool inside = false;
    const Allocation *a = find(p, bytes, &inside);
    *space = a ? a->space : Space::Pageable;
    return a || !inside;
}
static cudaError_t copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                        cudaStream_t stream, bool wait) {
    static const char *const names[] = {"h2h", "h2d", "d2h", "d2d"};
    if (!live(stream)) return cudaErrorInvalidResourceHandle;
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    if (height > 1 && (to_pitch < width || from_pitch < width)) return cudaErrorInvalidPitchValue;
    if (!width || !height) return cudaSuccess;
    if (!to || !from) return cudaErrorInvalidValue;
    Space to_space, from_space;
    if (!classify(to, (height - 1) * to_pitch + width, &to_space) || !classify(from, (height - 1) * from_pitch + width, &from_space)) {
        report("copy of %zu x %zu bytes runs past the end of an allocation", height, width);
        return cudaErrorInvalidValue;
    }
    bool to_device = to_space == Space::Device, from_device = from_space == Space::Device;
    int found = (from_device ? 2 : 0) + (to_device ? 1 : 0);
    if (kind != cudaMemcpyDefault && kind != found) {
        report("copy declared %s is %s", names[kind], names[found]);
        return cudaErrorInvalidValue;
    }
    emit_copy("copy", names[found], width * height, stream);
    if (rt().dry || (rt().sparse && found == 3)) return cudaSuccess;
    std::shared_ptr<std::vector<char>> staged;
    if (from_space == Space::Pageable && !wait) {                     /* consumed when the call returns */
        staged = std::make_shared<std::vector<char>>(width * height);
        for (size_t y = 0; y < height; ++y) memcpy(staged->data() + y * width, static_cast<const char *>(from) + y * from_pitch, width);
        from = staged->data();
        from_pitch = width;
    }
    WorkRef w = enqueue(stream, [=] {
        static_cast<void>(staged);
        for (size_t y = 0; y < height; ++y)
            memcpy(static_cast<char *>(to) + y * to_pitch, static_cast<const char *>(from) + y * from_pitch, width);
    });
    if ((wait && found != 3) || to_space == Space::Pageable) wait_for(w);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    CALL();
    return call.end(copy(to, bytes, from, bytes, bytes, 1, kind, nullptr, true));
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    return call.end(copy(to, bytes, from, bytes, bytes, 1, kind, stream, false));
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
    CALL();
    return call.end(copy(to, to_pitch, from, from_pitch, width, height, kind, nullptr, true));
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    return call.end(copy(to, to_pitch, from, from_pitch, width, height, kind, stream, false));
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    CALL();
    if (!here(stream)) return call.end(cudaErrorInvalidResourceHandle);
    if (!bytes) return call.end(cudaSuccess);
    const Allocation *a = find(p, bytes);
    if (!a || a->space != Space::Device) {
        report("set of %zu bytes is not within one allocation of device memory", bytes);
        return call.end(cudaErrorInvalidValue);
    }
    emit_copy("set", "set", bytes, stream);
    if (!addresses_alone()) enqueue(stream, [=] { memset(p, value, bytes); });
    return call.end(cudaSuccess);
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    CALL();
    if (!out || flags > cudaStreamNonBlocking) return call.end(cudaErrorInvalidValue);
    *out = new CUstream_st;
    (*out)->device = t_device;
    (*out)->context = context_new();
    (*out)->number = ++rt().stream_count;
    (*out)->blocking = flags != cudaStreamNonBlocking;
    rt().streams.insert(*out);
    return call.end(cudaSuccess);
}
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithFlags(out, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int) { return cudaStreamCreateWithFlags(out, flags); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Call call;
    if (!stream || !live(stream)) return call.freed(cudaErrorInvalidResourceHandle);
    WorkRef last = stream->last;
    if (last && !last->done) {
        bool opened = open_window();
        run_until(last);
        if (opened) guard_device(false);
    }
    rt().streams.erase(stream);
    /* Its work stays known to events and to the null stream through the tokens of its last call. */
    if (stream->blocking && last) enqueue(nullptr, nullptr, last);
    free_lanes(stream);
    delete stream;
    return call.freed(cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    CALL();
    if (!live(stream)) return call.end(cudaErrorInvalidResourceHandle);
    if (!stream) {                                     /* waits for what the null stream would wait for */
        for (cudaStream_t s : rt().streams)
            if (s->blocking) wait_for(s->last);
    }
    wait_for((stream ? stream : &rt().null_stream)->last);
    return call.end(cudaSuccess);
}
/* A query is answered with cudaErrorNotReady three times before the work runs. */
static cudaError_t query(const WorkRef &w, int *queries) {
    if (w && !w->done && ++*queries % 4) return cudaErrorNotReady;
    wait_for(w);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    CALL();
    if (!live(stream)) return call.end(cudaErrorInvalidResourceHandle);
    CUstream_st &s = stream ? *stream : rt().null_stream;
    return call.end(query(s.last, &s.queries));
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *user) {
    CALL();
    if (!live(stream)) return call.end(cudaErrorInvalidResourceHandle);
    if (!fn) return call.end(cudaErrorInvalidValue);
    enqueue(stream, [=] { fn(user); });
    return call.end(cudaSuccess);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    CALL();
    if (!out) return call.end(cudaErrorInvalidValue);
    *out = new CUevent_st;
    (*out)->timing = !(flags & cudaEventDisableTiming);
    rt().events.insert(*out);
    return call.end(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Call call;
    if (!rt().events.erase(event)) return call.freed(cudaErrorInvalidResourceHandle);
    delete event;
    return call.freed(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    CALL();
    if (!rt().events.count(event) || !here(stream)) return call.end(cudaErrorInvalidResourceHandle);
    event->work = enqueue(stream, nullptr);
    return call.end(cudaSuccess);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    CALL();
    if (!rt().events.count(event) || !live(stream)) return call.end(cudaErrorInvalidResourceHandle);
    if (event->work) enqueue(stream, nullptr, event->work);
    return call.end(cudaSuccess);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    CALL();
    if (!rt().events.count(event)) return call.end(cudaErrorInvalidResourceHandle);
    return call.end(query(event->work, &event->queries));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    CALL();
    if (!rt().events.count(event)) return call.end(cudaErrorInvalidResourceHandle);
    wait_for(event->work);
    return call.end(cudaSuccess);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t stop) {
    CALL();
    Runtime &R = rt();
    if (!ms) return call.end(cudaErrorInvalidValue);
    if (!R.events.count(start) || !R.events.count(stop) || !start->timing || !stop->timing || !start->work || !stop->work)
        return call.end(cudaErrorInvalidResourceHandle);
    if (!start->work->done || !stop->work->done) return call.end(cudaErrorNotReady);
    *ms = static_cast<float>(stop->work->time - start->work->time);
    return call.end(cudaSuccess);
}
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    CALL();
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return call.end(cudaSuccess);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || static_cast<size_t>(value) > rt().optin)
        return call.end(cudaErrorInvalidValue);
    rt().shared_allowed[{t_device, kernel}] = static_cast<size_t>(value);
    return call.end(cudaSuccess);
}

static cudaError_t check_launch(const void *kernel, dim3 g, dim3 b, size_t shared, cudaStream_t stream) {
    if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 || !b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024
        || b.z > 64 || uint64_t(b.x) * b.y * b.z > 1024)
        return cudaErrorInvalidConfiguration;
    auto it = rt().shared_allowed.find({t_device, kernel});
    if (shared > (it == rt().shared_allowed.end() ? 48 * 1024 : it->second)) return cudaErrorInvalidValue;
    return here(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
void standin::enqueue_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                             std::function<void()> body) {
    Call call;
    cudaError_t e = call.status != cudaSuccess ? call.status : check_launch(kernel, grid, block, shared, stream);
    if (e != cudaSuccess) { call.end(e); return; }
    standin_record r = {};
    r.kind = "kernel";
    r.name = name;
    r.grid[0] = grid.x, r.grid[1] = grid.y, r.grid[2] = grid.z;
    r.block[0] = block.x, r.block[1] = block.y, r.block[2] = block.z;
    r.shared = shared;
    emit(r, stream);
    if (rt().dry) return;
    size_t limit = shared > 48 * 1024 ? rt().optin : 48 * 1024;
    auto l = std::make_shared<Launch>(Launch{name, grid, block, shared, limit, std::move(body), stream, false, 0, 0});
    enqueue(stream, [l] { run_launch(*l); });
}

/* ---------------------------------------------------------------- >>cublas ---- */
static cublasStatus_t status_of(cudaError_t e) {
    return e == cudaSuccess ? CUBLAS_STATUS_SUCCESS : e == cudaErrorMemoryAllocation ? CUBLAS_STATUS_ALLOC_FAILED
         : e == cudaErrorNoDevice ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_EXECUTION_FAILED;
}
#define CUBLAS_CALL(handle, ...)                                          \
    Call call{__VA_ARGS__};                                               \
    if (call.status != cudaSuccess) return status_of(call.status);        \
    if (!rt().handles.count(handle) || handle->device != t_device) return CUBLAS_STATUS_NOT_INITIALIZED

static size_t element(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }
UNSEEN static float load(const void *p, size_t i, cudaDataType type) {
    if (type == CUDA_R_32F) return static_cast<const float *>(p)[i];
    unsigned short bits = static_cast<const unsigned short *>(p)[i];
    return type == CUDA_R_16F ? standin::half_value(bits) : __uint_as_float(static_cast<unsigned>(bits) << 16);
}
UNSEEN static void store(void *p, size_t i, cudaDataType type, float v) {
    if (type == CUDA_R_32F) static_cast<float *>(p)[i] = v;
    else static_cast<unsigned short *>(p)[i] = type == CUDA_R_16F ? standin::half_bits(v) : standin::bf16_bits(v);
}
struct Matrix {                                /* column-major (rows, cols) at p, in elements of type */
    const void *p;
    cudaDataType type;
    size_t rows, cols, ld;
    size_t extent() const { return rows && cols ? ((cols - 1) * ld + rows) * element(type) : 0; }
};
/* out[r * row_step + c * col_step] = M(r, c) */
UNSEEN static void unpack(float *out, size_t row_step, size_t col_step, const Matrix &M) {
    for (size_t c = 0; c < M.cols; ++c) {
        note_read(static_cast<const char *>(M.p) + c * M.ld * element(M.type), M.rows * element(M.type));
        for (size_t r = 0; r < M.rows; ++r) out[r * row_step + c * col_step] = load(M.p, c * M.ld + r, M.type);
    }
}
/* out (m, n) column-major = A B with A at A[k * m16 + i] (m16: m rounded up to 16, zeros beyond m), B at B[j * K + k];
   each sum in double, k ascending. */
UNSEEN static void multiply(double *out, size_t m, size_t n, size_t K, const float *A, const float *B) {
    size_t m16 = round_up(m, 16);
    for (size_t i0 = 0; i0 < m; i0 += 16)
        for (size_t j = 0; j < n; ++j) {
            double sum[16] = {};
            for (size_t k = 0; k < K; ++k) {
                const float *a = A + k * m16 + i0;
                double b = B[j * K + k];
                for (int i = 0; i < 16; ++i) sum[i] += a[i] * b;
            }
            for (size_t i = 0; i < 16 && i0 + i < m; ++i) out[j * m + i0 + i] = sum[i];
        }
}
/* C = alpha product + beta C; part: 0 all, 1 lower triangle, 2 upper. beta = 0 does not read C. */
UNSEEN static void combine(void *C, cudaDataType type, size_t m, size_t n, size_t ld, float alpha, const double *product, float beta, int part) {
    for (size_t j = 0; j < n; ++j) {
        size_t first = part == 1 ? j : 0, end = part == 2 ? j + 1 : m, at = j * ld;
        if (first >= end) continue;
        char *column = static_cast<char *>(C) + (at + first) * element(type);
        if (beta != 0) note_read(column, (end - first) * element(type));
        note_write(column, (end - first) * element(type));
        for (size_t i = first; i < end; ++i) {
            double v = alpha != 0 ? alpha * product[j * m + i] : 0;
            if (beta != 0) v += static_cast<double>(beta) * load(C, at + i, type);
            store(C, at + i, type, static_cast<float>(v));
        }
    }
}
/* C = alpha op(A) op(B) + beta C with op(A) (m, k), op(B) (k, n); A and B as stored. */
static void product(Matrix A, bool at, Matrix B, bool bt, float alpha, float beta, void *C, cudaDataType ctype, size_t ldc, int part) {
    size_t m = at ? A.cols : A.rows, k = at ? A.rows : A.cols, n = bt ? B.rows : B.cols, m16 = round_up(m, 16);
    std::vector<double> result;
    if (alpha != 0) {                          /* else A and B are not read */
        std::vector<float> a(k * m16), b(n * k);
        unpack(a.data(), at ? m16 : 1, at ? 1 : m16, A);
        unpack(b.data(), bt ? k : 1, bt ? 1 : k, B);
        result.resize(m * n);
        multiply(result.data(), m, n, k, a.data(), b.data());
    }
    combine(C, ctype, m, n, ldc, alpha, result.data(), beta, part);
}
/* The triangle of a stored (n, n) matrix as op(A), row by row, zeros elsewhere. */
UNSEEN static std::vector<float> triangle(const float *A, size_t lda, size_t n, bool lower, bool transposed, bool unit) {
    std::vector<float> t(n * n);
    for (size_t c = 0; c < n; ++c) {
        size_t first = lower ? c : 0, end = lower ? n : c + 1;
        note_read(A + c * lda + first, (end - first) * 4);
        for (size_t r = first; r < end; ++r)
            t[transposed ? c * n + r : r * n + c] = r == c && unit ? 1.0f : A[c * lda + r];
    }
    return t;
}

static bool on_device(const char *name, const char *which, const void *p, size_t bytes) {
    const Allocation *a = bytes ? find(p, bytes) : nullptr;
    if (!bytes || (a && a->space == Space::Device)) return true;
    report("%s: %s (%zu bytes) is not within one allocation of device memory", name, which, bytes);
    return false;
}
/* Scalars are read at the call, or when it runs if they are in device memory. */
struct Scalar {
    const float *p;
    float v;
    float get() const {
        if (p) note_read(p, 4);
        return p ? *p : v;
    }
};
static Scalar scalar(cublasHandle_t h, const void *p) {
    return h->device_scalars ? Scalar{static_cast<const float *>(p), 0} : Scalar{nullptr, *static_cast<const float *>(p)};
}
/* What a product does to its scratch: a piece at either end, as tens of megabytes each time would take too long. */
struct Scratch {
    char *p = nullptr;
    size_t bytes = 0;
    void spoil() const {
        const size_t piece = std::min(bytes, size_t(16) << 10);
        for (size_t at : {size_t(0), bytes - piece})
            if (piece) {
                note_write(p + at, piece);
                memset(p + at, poison, piece);
            }
    }
};
static bool scratch_of(const char *name, cublasHandle_t h, Scratch *scratch) {
    if (!h->workspace) ++rt().own_scratch;
    *scratch = Scratch{static_cast<char *>(h->workspace), h->workspace_bytes};
    return on_device(name, "the workspace", h->workspace, h->workspace_bytes);
}
/* A product between two spoilings of its scratch. */
template <typename Work> static void enqueue_product(cudaStream_t stream, const Scratch &scratch, Work work) {
    enqueue(stream, [=] {
        scratch.spoil();
        work();
        scratch.spoil();
    });
}
static void emit_product(const char *name, cublasHandle_t h, size_t m, size_t n, size_t k, size_t batch, double flops, size_t bytes) {
    standin_record r = {};
    r.kind = "product";
    r.name = name;
    r.m = static_cast<long long>(m), r.n = static_cast<long long>(n), r.k = static_cast<long long>(k);
    r.batch = static_cast<long long>(batch);
    r.flops = flops;
    r.bytes = bytes;
    emit(r, h->stream);
}

const char *cublasGetStatusName(cublasStatus_t s) {
    switch (s) {
#define X(name, value) case name: return #name;
    STANDIN_CUBLAS_STATUS(X)
#undef X
    }
    return "unknown cuBLAS status";
}
const char *cublasGetStatusString(cublasStatus_t s) { return cublasGetStatusName(s); }
cublasStatus_t cublasCreate(cublasHandle_t *out) {
    Call call(cudaErrorMemoryAllocation);
    if (call.status != cudaSuccess) return status_of(call.status);
    if (!out) return CUBLAS_STATUS_INVALID_VALUE;
    *out = new cublasContext;
    (*out)->device = t_device;
    rt().handles.insert(*out);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t h) {
    Call call;
    if (!rt().handles.erase(h)) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete h;
    return status_of(call.status);
}
cublasStatus_t cublasGetVersion(cublasHandle_t, int *v) { *v = CUBLAS_VERSION; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t h, cudaStream_t stream) {
    CUBLAS_CALL(h);
    if (!live(stream)) return CUBLAS_STATUS_INVALID_VALUE;
    h->stream = stream;
    h->workspace = nullptr, h->workspace_bytes = 0;    /* as cuBLAS does */
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetStream(cublasHandle_t h, cudaStream_t *stream) {
    CUBLAS_CALL(h);
    *stream = h->stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode) {
    CUBLAS_CALL(h);
    return static_cast<int>(mode) & ~19 ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t h, cublasAtomicsMode_t) { CUBLAS_CALL(h); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetPointerMode(cublasHandle_t h, cublasPointerMode_t mode) {
    CUBLAS_CALL(h);
    h->device_scalars = mode == CUBLAS_POINTER_MODE_DEVICE;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t h, void *p, size_t bytes) {
    CUBLAS_CALL(h);
    if (bytes && (reinterpret_cast<uintptr_t>(p) % 256 || !on_device("cublasSetWorkspace", "the workspace", p, bytes)))
        return CUBLAS_STATUS_INVALID_VALUE;
    h->workspace = bytes ? p : nullptr, h->workspace_bytes = bytes;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t gemm(const char *name, cublasHandle_t h, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k,
                           const void *alpha, const void *A, cudaDataType ta, int lda, long long sa, const void *B, cudaDataType tb,
                           int ldb, long long sb, const void *beta, void *C, cudaDataType tc, int ldc, long long sc, int batch,
                           cublasComputeType_t compute) {
    CUBLAS_CALL(h);
    bool at = opa != CUBLAS_OP_N, bt = opb != CUBLAS_OP_N;
    if (opa < CUBLAS_OP_N || opa > CUBLAS_OP_C || opb < CUBLAS_OP_N || opb > CUBLAS_OP_C || m < 0 || n < 0 || k < 0 || batch < 0
        || lda < (at ? k : m) || lda < 1 || ldb < (bt ? n : k) || ldb < 1 || ldc < m || ldc < 1 || sa < 0 || sb < 0 || sc < 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC && compute != CUBLAS_COMPUTE_32F_FAST_TF32
        && compute != CUBLAS_COMPUTE_32F_FAST_16BF && compute != CUBLAS_COMPUTE_32F_FAST_16F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((ta != CUDA_R_32F && ta != CUDA_R_16BF && ta != CUDA_R_16F) || ta != tb || (tc != ta && tc != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!m || !n || !batch) return CUBLAS_STATUS_SUCCESS;
    if (!alpha || !beta || !C || (k && (!A || !B))) return CUBLAS_STATUS_INVALID_VALUE;
    size_t M = static_cast<size_t>(m), N = static_cast<size_t>(n), K = static_cast<size_t>(k), last = static_cast<size_t>(batch) - 1;
    Matrix a{A, ta, at ? K : M, at ? M : K, static_cast<size_t>(lda)}, b{B, tb, bt ? N : K, bt ? K : N, static_cast<size_t>(ldb)};
    size_t ec = ((N - 1) * static_cast<size_t>(ldc) + M) * element(tc);
    size_t da = static_cast<size_t>(sa) * element(ta), db = static_cast<size_t>(sb) * element(tb), dc = static_cast<size_t>(sc) * element(tc);
    Scratch scratch;
    if (!scratch_of(name, h, &scratch) || !on_device(name, "A", A, K ? a.extent() + last * da : 0) || !on_device(name, "B", B, K ? b.extent() + last * db : 0)
        || !on_device(name, "C", C, ec + last * dc))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    Scalar sal = scalar(h, alpha), sbe = scalar(h, beta);
    size_t reads_c = sbe.p || sbe.v != 0 ? 2 : 1;
    emit_product(name, h, M, N, K, last + 1, 2.0 * m * n * k * batch,
                 (last + 1) * (M * K * element(ta) + K * N * element(tb) + reads_c * M * N * element(tc)));
    if (addresses_alone()) return CUBLAS_STATUS_SUCCESS;
    enqueue_product(h->stream, scratch, [=] {
        for (size_t i = 0; i <= last; ++i) {
            Matrix ai = a, bi = b;
            ai.p = static_cast<const char *>(a.p) + i * da;
            bi.p = static_cast<const char *>(b.p) + i * db;
            product(ai, at, bi, bt, sal.get(), sbe.get(), static_cast<char *>(C) + i * dc, tc, static_cast<size_t>(ldc), 0);
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k, const void *alpha,
                            const void *A, cudaDataType ta, int lda, const void *B, cudaDataType tb, int ldb, const void *beta, void *C,
                            cudaDataType tc, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return gemm("cublasGemmEx", h, opa, opb, m, n, k, alpha, A, ta, lda, 0, B, tb, ldb, 0, beta, C, tc, ldc, 0, 1, compute);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k,
                                          const void *alpha, const void *A, cudaDataType ta, int lda, long long sa, const void *B,
                                          cudaDataType tb, int ldb, long long sb, const void *beta, void *C, cudaDataType tc, int ldc,
                                          long long sc, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return gemm("cublasGemmStridedBatchedEx", h, opa, opb, m, n, k, alpha, A, ta, lda, sa, B, tb, ldb, sb, beta, C, tc, ldc, sc, batch, compute);
}
cublasStatus_t cublasSgemm(cublasHandle_t h, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k, const float *alpha,
                           const float *A, int lda, const float *B, int ldb, const float *beta, float *C, int ldc) {
    return gemm("cublasSgemm", h, opa, opb, m, n, k, alpha, A, CUDA_R_32F, lda, 0, B, CUDA_R_32F, ldb, 0, beta, C, CUDA_R_32F, ldc, 0, 1,
                CUBLAS_COMPUTE_32F);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k,
                                         const float *alpha, const float *A, int lda, long long sa, const float *B, int ldb,
                                         long long sb, const float *beta, float *C, int ldc, long long sc, int batch) {
    return gemm("cublasSgemmStridedBatched", h, opa, opb, m, n, k, alpha, A, CUDA_R_32F, lda, sa, B, CUDA_R_32F, ldb, sb, beta, C,
                CUDA_R_32F, ldc, sc, batch, CUBLAS_COMPUTE_32F);
}

/* What trsm and trmm share: checks, the record. *empty: nothing to do. */
static cublasStatus_t triangular(const char *name, cublasHandle_t h, cublasSideMode_t side, int m, int n, const void *alpha,
                                 const float *A, int lda, const float *B, int ldb, const float *C, int ldc, bool *empty,
                                 Scratch *scratch) {
    int ka = side == CUBLAS_SIDE_LEFT ? m : n;
    *empty = m == 0 || n == 0;
    if ((side != CUBLAS_SIDE_LEFT && side != CUBLAS_SIDE_RIGHT) || m < 0 || n < 0 || lda < 1 || lda < ka || ldb < 1 || ldb < m || ldc < 1 || ldc < m)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (*empty) return CUBLAS_STATUS_SUCCESS;
    if (!alpha || !A || !B || !C) return CUBLAS_STATUS_INVALID_VALUE;
    size_t M = static_cast<size_t>(m), N = static_cast<size_t>(n), K = static_cast<size_t>(ka);
    auto extent = [](size_t rows, size_t cols, int ld) { return ((cols - 1) * static_cast<size_t>(ld) + rows) * 4; };
    if (!scratch_of(name, h, scratch) || !on_device(name, "A", A, extent(K, K, lda)) || !on_device(name, "B", B, extent(M, N, ldb)) || !on_device(name, "C", C, extent(M, N, ldc)))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    emit_product(name, h, M, N, K, 1, 1.0 * m * n * ka, (K * (K + 1) / 2 + 2 * M * N) * 4);
    *empty = addresses_alone();
    return CUBLAS_STATUS_SUCCESS;
}
UNSEEN static void solve(const std::vector<float> &T, size_t size, bool lower, size_t m, size_t n, bool left, float alpha, float *B, size_t ldb) {
    std::vector<double> x(size);
    size_t count = left ? n : m;                      /* columns of B, or its rows */
    for (size_t c = 0; c < n; ++c) { note_read(B + c * ldb, m * 4); note_write(B + c * ldb, m * 4); }
    for (size_t v = 0; v < count; ++v) {
        for (size_t s = 0; s < size; ++s) {
            size_t i = lower ? s : size - 1 - s, from = lower ? 0 : i + 1, to = lower ? i : size;
            double sum = alpha == 0 ? 0 : static_cast<double>(alpha) * (left ? B[v * ldb + i] : B[i * ldb + v]);
            for (size_t j = from; j < to; ++j) sum -= T[i * size + j] * x[j];
            x[i] = sum / T[i * size + i];
        }
        for (size_t i = 0; i < size; ++i) (left ? B[v * ldb + i] : B[i * ldb + v]) = static_cast<float>(x[i]);
    }
}
cublasStatus_t cublasStrsm(cublasHandle_t h, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t op, cublasDiagType_t diag,
                           int m, int n, const float *alpha, const float *A, int lda, float *B, int ldb) {
    CUBLAS_CALL(h);
    Scratch scratch;
    bool empty, left = side == CUBLAS_SIDE_LEFT, lower = uplo == CUBLAS_FILL_MODE_LOWER;
    cublasStatus_t s = triangular("cublasStrsm", h, side, m, n, alpha, A, lda, B, ldb, B, ldb, &empty, &scratch);
    if (s != CUBLAS_STATUS_SUCCESS || empty) return s;
    Scalar al = scalar(h, alpha);
    enqueue_product(h->stream, scratch, [=] {
        size_t size = static_cast<size_t>(left ? m : n);
        bool transposed = (op != CUBLAS_OP_N) == left;    /* rows of X op(A) = B are columns of op(A)' X' = B' */
        std::vector<float> T = triangle(A, static_cast<size_t>(lda), size, lower, transposed, diag == CUBLAS_DIAG_UNIT);
        solve(T, size, lower != transposed, static_cast<size_t>(m), static_cast<size_t>(n), left, al.get(), B, static_cast<size_t>(ldb));
    });
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasStrmm(cublasHandle_t h, cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t op, cublasDiagType_t diag,
                           int m, int n, const float *alpha, const float *A, int lda, const float *B, int ldb, float *C, int ldc) {
    CUBLAS_CALL(h);
    Scratch scratch;
    bool empty, left = side == CUBLAS_SIDE_LEFT;
    cublasStatus_t s = triangular("cublasStrmm", h, side, m, n, alpha, A, lda, B, ldb, C, ldc, &empty, &scratch);
    if (s != CUBLAS_STATUS_SUCCESS || empty) return s;
    Scalar al = scalar(h, alpha);
    enqueue_product(h->stream, scratch, [=] {
        size_t M = static_cast<size_t>(m), N = static_cast<size_t>(n), size = left ? M : N;
        std::vector<float> t = triangle(A, static_cast<size_t>(lda), size, uplo == CUBLAS_FILL_MODE_LOWER, op == CUBLAS_OP_N, diag == CUBLAS_DIAG_UNIT);
        Matrix T{t.data(), CUDA_R_32F, size, size, size}, b{B, CUDA_R_32F, M, N, static_cast<size_t>(ldb)};   /* T: op(A), column by column */
        product(left ? T : b, false, left ? b : T, false, al.get(), 0, C, CUDA_R_32F, static_cast<size_t>(ldc), 0);
    });
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSsyrk(cublasHandle_t h, cublasFillMode_t uplo, cublasOperation_t op, int n, int k, const float *alpha, const float *A,
                           int lda, const float *beta, float *C, int ldc) {
    CUBLAS_CALL(h);
    bool t = op != CUBLAS_OP_N;
    if (n < 0 || k < 0 || lda < 1 || lda < (t ? k : n) || ldc < 1 || ldc < n) return CUBLAS_STATUS_INVALID_VALUE;
    if (!n) return CUBLAS_STATUS_SUCCESS;
    if (!alpha || !beta || !C || (k && !A)) return CUBLAS_STATUS_INVALID_VALUE;
    size_t N = static_cast<size_t>(n), K = static_cast<size_t>(k);
    Matrix a{A, CUDA_R_32F, t ? K : N, t ? N : K, static_cast<size_t>(lda)};
    Scratch scratch;
    if (!scratch_of("cublasSsyrk", h, &scratch) || !on_device("cublasSsyrk", "A", A, a.extent()) || !on_device("cublasSsyrk", "C", C, ((N - 1) * static_cast<size_t>(ldc) + N) * 4))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    Scalar al = scalar(h, alpha), be = scalar(h, beta);
    emit_product("cublasSsyrk", h, N, N, K, 1, 1.0 * n * (n + 1.0) * k, (N * K + (be.p || be.v != 0 ? 2 : 1) * N * (N + 1) / 2) * 4);
    if (addresses_alone()) return CUBLAS_STATUS_SUCCESS;
    enqueue_product(h->stream, scratch, [=] {
        product(a, t, a, !t, al.get(), be.get(), C, CUDA_R_32F, static_cast<size_t>(ldc), uplo == CUBLAS_FILL_MODE_LOWER ? 1 : 2);
    });
    return CUBLAS_STATUS_SUCCESS;
}

/* ---------------------------------------------------------------- >>control ---- */
void standin_set_memory(size_t bytes) { rt().capacity = bytes; }
void standin_set_shared(size_t optin_bytes) { rt().optin = optin_bytes; }
void standin_set_arch(int major, int minor) { rt().major = major; rt().minor = minor; }
void standin_set_devices(int count) { rt().devices = count; }
void standin_set_processors(int count) { rt().processors = count; }
int standin_device_of(const void *p) {
    auto found = rt().memory.find(reinterpret_cast<uintptr_t>(p));
    return found != rt().memory.end() && found->second.space == Space::Device ? found->second.device : -1;
}
void standin_set_order(int order, unsigned seed) { rt().order = order; rt().seed = seed; }
void standin_set_streams(int schedule) { rt().schedule = schedule; }
void standin_strict_exit(int on) { rt().strict_exit = on != 0; }
void standin_set_dry(int on) { rt().dry = on != 0; }
void standin_set_sparse(size_t blocks) { rt().sparse = blocks; }
void standin_set_guard(int on) { rt().guard = on && !sanitized; }
void standin_reset() {
    Runtime &R = rt();
    std::lock_guard<std::recursive_mutex> lock(R.mutex);
    ignore(true);
    R.sticky = cudaErrorUnknown;                       /* queued work is dropped, not run */
    run_all();
    R.sticky = R.last = cudaSuccess;
    R.reports = R.calls = R.fail_at = R.own_scratch = 0;
    R.report.clear();
    ignore(false);
}
size_t standin_own_scratch() { return rt().own_scratch; }
static size_t count_space(bool registered) {
    size_t n = 0;
    for (auto &entry : rt().memory) n += (entry.second.space == Space::Registered) == registered;
    return n;
}
size_t standin_live_allocations() { return count_space(false); }
size_t standin_live_objects() { return rt().streams.size() + rt().events.size() + rt().handles.size(); }
size_t standin_device_bytes() { return rt().used; }
size_t standin_device_peak() { return rt().peak; }
size_t standin_pinned_bytes() { return rt().pinned; }
size_t standin_pinned_peak() { return rt().pinned_peak; }
void standin_reset_peak() { rt().peak = rt().used; rt().pinned_peak = rt().pinned; }
const char *standin_last_report() { return rt().report.c_str(); }
size_t standin_reports() { return rt().reports; }
void standin_quiet(int on) { rt().quiet = on != 0; }
void standin_reset_calls() { standin_fail_call(0); }
size_t standin_calls() { return rt().calls; }
void standin_fail_call(size_t n) { rt().calls = 0; rt().fail_at = n; rt().fail_on = false; }
void standin_fail_from(size_t n) { rt().calls = 0; rt().fail_at = n; rt().fail_on = true; }
void standin_set_recorder(void (*record)(const standin_record *, void *), void *user) { rt().record = record; rt().record_user = user; }
