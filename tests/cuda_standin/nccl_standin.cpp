/* nccl_standin.cpp - sums over processes of one machine in a file that all map: every rank puts its part into it, and adds all
 * parts up in the order of ranks. Calls go on in a thread of their own after their return; an abort ends the wait for others.
 * NCCL_STANDIN_KILL=N: the process kills itself in its call N, from 0 (the communicator's creation) on. */
#include "nccl.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANKS = 8 };
static const size_t PIECE = 1 << 14;         /* floats at a time */

struct shared {
    int count[4];                               /* arrivals at meeting n, at n % 4 */
    float part[RANKS][PIECE];
};

struct ncclComm {
    int rank, size, aborted;
    long meeting, calls;
    struct shared *memory;
    ncclUniqueId id;
    ncclResult_t state;                         /* ncclInProgress until the call's thread is done */
    float *data;                                /* the arguments of a sum */
    size_t count;
    cudaStream_t stream;
};

const char *ncclGetErrorString(ncclResult_t result) { return result == ncclSuccess ? "no error" : "the stand-in was aborted"; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    const char *base = getenv("TMPDIR");
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%.90s/nccl-standin-%d", base ? base : "/tmp", (int)getpid());
    const int fd = open(id->internal, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(struct shared))) return ncclSystemError;
    close(fd);
    return ncclSuccess;
}

/* Every rank has come to this meeting. */
static ncclResult_t meet(ncclComm_t c)
{
    int *count = &c->memory->count[c->meeting % 4], *next = &c->memory->count[(c->meeting + 1) % 4];
    if (c->rank == 0) __atomic_store_n(next, 0, __ATOMIC_SEQ_CST); /* the ranks are at this one, or at the one before */
    __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    c->meeting++;
    while (__atomic_load_n(count, __ATOMIC_SEQ_CST) < c->size) {
        if (__atomic_load_n(&c->aborted, __ATOMIC_SEQ_CST)) return ncclSystemError;
        usleep(50);
    }
    return ncclSuccess;
}

static ncclResult_t sum(ncclComm_t c)
{
    for (size_t at = 0; at < c->count; at += PIECE) {
        float total[PIECE] = {0};
        const size_t n = c->count - at < PIECE ? c->count - at : PIECE, bytes = n * sizeof *total;
        cudaMemcpyAsync(c->memory->part[c->rank], c->data + at, bytes, cudaMemcpyDeviceToHost, c->stream);
        if (cudaStreamSynchronize(c->stream) != cudaSuccess || meet(c) != ncclSuccess) return ncclSystemError;
        for (int rank = 0; rank < c->size; rank++)
            for (size_t i = 0; i < n; i++) total[i] += c->memory->part[rank][i];
        if (meet(c) != ncclSuccess) return ncclSystemError;
        cudaMemcpyAsync(c->data + at, total, bytes, cudaMemcpyHostToDevice, c->stream);
        if (cudaStreamSynchronize(c->stream) != cudaSuccess) return ncclSystemError;
    }
    return ncclSuccess;
}

static void *work(void *of)
{
    ncclComm_t c = static_cast<ncclComm_t>(of);
    const int creation = c->calls == 1;
    const ncclResult_t result = creation ? meet(c) : sum(c);
    if (creation && c->rank == 0) unlink(c->id.internal);
    __atomic_store_n(&c->state, result, __ATOMIC_SEQ_CST);
    return NULL;
}

static ncclResult_t start(ncclComm_t c)
{
    pthread_t thread;
    const char *victim = getenv("NCCL_STANDIN_KILL");
    if (victim && atol(victim) == c->calls) raise(SIGKILL);
    c->calls++;
    __atomic_store_n(&c->state, ncclInProgress, __ATOMIC_SEQ_CST);
    return pthread_create(&thread, NULL, work, c) || pthread_detach(thread) ? ncclSystemError : ncclInProgress;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    ncclComm_t c = static_cast<ncclComm_t>(calloc(1, sizeof *c));
    const int fd = open(id.internal, O_RDWR);
    if (fd < 0 || size > RANKS || config->blocking) return ncclInvalidUsage;
    c->memory = static_cast<struct shared *>(mmap(NULL, sizeof *c->memory, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
    c->id = id;
    c->rank = rank;
    c->size = size;
    *comm = c;
    return start(c);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    *state = __atomic_load_n(&comm->state, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    __atomic_store_n(&comm->aborted, 1, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm,
                           cudaStream_t stream)
{
    if (type != ncclFloat || operation != ncclSum || from != to) return ncclInvalidUsage;
    comm->data = static_cast<float *>(to);      /* which the host may not touch */
    comm->count = count;
    comm->stream = stream;
    return start(comm);
}
