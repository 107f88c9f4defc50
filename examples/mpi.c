/* mpi.c - besa in several processes by MPI: `make -C examples mpi`, then
 *
 *     mpirun -n 4 examples/besa_mpi prune llama pruned --tokens c4.npy --batch-size 8
 *
 * The command line is besa's. Fills in a besa_comm: sums by MPI_Allreduce, of host memory; what a GPU holds goes through a
 * buffer of the host (nccl.cu needs none). A rank that fails sends its message to all others, who look for one while they
 * wait; one that dies without a word ends the others through mpirun. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mpi.h>

#include "besa.h"
#include "processes.h"

enum { FAILURE = 1, PIECE = 1 << 22 /* floats at a time between GPU and host */ };

typedef struct state {
    MPI_Comm sums, failures;                    /* messages of their own */
    int rank, size, told;                       /* told: of this rank's failure */
    float *buffer;                              /* (PIECE) where device memory is not the host's */
    besa_error first;                           /* of another rank that failed */
} state;

static state g_state;

static besa_result failed(besa_error *error, besa_result code, const char *message)
{
    if (error) {
        error->code = code;
        snprintf(error->message, sizeof error->message, "%s", message);
    }
    return code;
}

/* Has another rank failed? */
static int look_for_failure(state *s)
{
    int there = 0;
    MPI_Status status;
    if (s->first.code) return 1;
    if (MPI_Iprobe(MPI_ANY_SOURCE, FAILURE, s->failures, &there, &status) || !there) return 0;
    MPI_Recv(s->first.message, sizeof s->first.message, MPI_CHAR, status.MPI_SOURCE, FAILURE, s->failures, &status);
    s->first.message[sizeof s->first.message - 1] = 0;
    s->first.code = BESA_ERROR_COMM;
    return 1;
}

/* Wait for a call that all ranks have begun, or for another's failure. */
static besa_result finish(state *s, MPI_Request *request, int code, besa_error *error)
{
    int done = 0;
    while (code == MPI_SUCCESS) {
        code = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) break;
        if (done) return BESA_OK;
        if (look_for_failure(s)) return failed(error, BESA_ERROR_COMM, s->first.message);
        sched_yield();
    }
    return failed(error, BESA_ERROR_COMM, "MPI reported an error");
}

/* In pieces of one size on all ranks, each added in an order that depends on the number of ranks alone. */
static besa_result reduce_host(state *s, float *data, int64_t count, besa_error *error)
{
    for (int64_t at = 0; at < count; at += PIECE) {
        MPI_Request request;
        int n = count - at < PIECE ? (int)(count - at) : PIECE;
        int code = MPI_Iallreduce(MPI_IN_PLACE, data + at, n, MPI_FLOAT, MPI_SUM, s->sums, &request);
        besa_result result = finish(s, &request, code, error);
        if (result != BESA_OK) return result;
    }
    return BESA_OK;
}

static besa_result reduce_device(state *s, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error)
{
    if (!s->buffer && be->host_alloc(be, (void **)&s->buffer, PIECE * sizeof(float)) != BESA_OK) {
        if (error) *error = be->error;
        return be->error.code;
    }
    for (int64_t at = 0; at < count; at += PIECE) {
        int64_t n = count - at < PIECE ? count - at : PIECE;
        size_t bytes = (size_t)n * sizeof(float);
        besa_result result = be->download(be, q, s->buffer, data + at, bytes);
        if (result == BESA_OK) result = be->synchronize(be, q);
        if (result == BESA_OK) result = reduce_host(s, s->buffer, n, &be->error);
        if (result == BESA_OK) result = be->upload(be, q, data + at, s->buffer, bytes);
        if (result == BESA_OK) result = be->synchronize(be, q);
        if (result == BESA_OK) continue;
        if (error && error != &be->error) *error = be->error;
        return result;
    }
    return BESA_OK;
}

static besa_result reduce(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error)
{
    state *s = (state *)user;
    if (be->unified_memory) return reduce_host(s, data, count, error);
    return reduce_device(s, be, q, data, count, error);
}

static besa_result broadcast(void *user, void *data, size_t bytes, int root, besa_error *error)
{
    state *s = (state *)user;
    const size_t piece = (size_t)PIECE * sizeof(float);
    for (size_t at = 0; at < bytes; at += piece) {
        MPI_Request request;
        int n = bytes - at < piece ? (int)(bytes - at) : (int)piece;
        int code = MPI_Ibcast((char *)data + at, n, MPI_BYTE, root, s->sums, &request);
        besa_result result = finish(s, &request, code, error);
        if (result != BESA_OK) return result;
    }
    return BESA_OK;
}

static besa_result barrier(void *user, besa_error *error)
{
    state *s = (state *)user;
    MPI_Request request;
    int code = MPI_Ibarrier(s->sums, &request);
    return finish(s, &request, code, error);
}

/* The message stays where it is: the others may read it later. */
static void fail(void *user, const besa_error *error)
{
    static char message[sizeof error->message];
    state *s = (state *)user;
    MPI_Request request;
    if (s->told || s->first.code) return;
    s->told = 1;
    snprintf(message, sizeof message, "%.900s (rank %d)", error->message, s->rank);
    for (int rank = 0; rank < s->size; rank++)
        if (rank != s->rank) MPI_Isend(message, sizeof message, MPI_CHAR, rank, FAILURE, s->failures, &request);
}

const besa_comm *besa_processes_begin(int *device)
{
    static besa_comm comm = {0, 1, &g_state, reduce, broadcast, barrier, fail};
    MPI_Comm node;
    MPI_Init(NULL, NULL);
    MPI_Comm_dup(MPI_COMM_WORLD, &g_state.sums);
    MPI_Comm_dup(MPI_COMM_WORLD, &g_state.failures);
    MPI_Comm_set_errhandler(g_state.sums, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &node);
    MPI_Comm_rank(node, device);                /* a GPU for each rank of a machine */
    g_state.rank = comm.rank;
    g_state.size = comm.size;
    return &comm;
}

int besa_processes_end(int status)
{
    if (status == 0) return MPI_Finalize() == MPI_SUCCESS ? 0 : 1;
    fflush(NULL);
    const double end = MPI_Wtime() + 0.5;         /* for the others to read the message, and say what they have to */
    int flag = 0;
    while (g_state.size > 1 && MPI_Wtime() < end) {
        /* what has been sent moves on; not so where another failed: a sum may still be under way in memory that is gone */
        if (g_state.told) MPI_Iprobe(MPI_ANY_SOURCE, FAILURE, g_state.failures, &flag, MPI_STATUS_IGNORE);
        usleep(1000);
    }
    MPI_Abort(MPI_COMM_WORLD, status);
    return status;
}
