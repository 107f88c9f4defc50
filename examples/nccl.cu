/* nccl.cu - besa in one process for each GPU: `make -C examples nccl`, then
 *
 *     torchrun --no-python --nproc-per-node 4 examples/besa_nccl prune llama pruned --tokens c4.npy --batch-size 8 --device cuda
 *     mpirun -n 4 examples/besa_nccl ...          srun --ntasks-per-node 4 examples/besa_nccl ...
 *
 * Who is who comes from what these set: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, or Open MPI's or SLURM's. The command
 * line is besa's. Fills in a besa_comm: sums by NCCL on the backend's own stream, beside what computes; all else through
 * sockets to rank 0, two to each rank. One has what is broadcast; the other is for failures, and a thread waits at it: when a
 * message comes or the other end is gone, NCCL's kernels are aborted and the next call fails. Rank 0 listens at MASTER_ADDR
 * [127.0.0.1], port BESA_PORT [MASTER_PORT + 1, or 29555]. NCCL 2.14 or newer, whose calls return before they are done. */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cuda_runtime.h>
#include <nccl.h>

#include "../besa.h"
#include "processes.h"

enum { DATA, FAILURES, LINES };
enum { BYE = 1, FAILED };                      /* the first byte of what comes over a line of failures */
enum { MESSAGE = 512, CONNECT_SECONDS = 300 };

static struct {
    int rank, size;
    int (*line)[LINES];                         /* rank 0: (size) to every other; else only line[0] */
    pthread_mutex_t lock;                       /* of all that follows */
    int failed, ended;
    char message[MESSAGE];                      /* of the first that failed */
    ncclComm_t nccl;
} g;

/* ---- failures ------------------------------------------------------------------------------ */

static besa_result error_of(besa_error *error, besa_result code, const char *what, const char *why)
{
    if (error) {
        error->code = code;
        snprintf(error->message, sizeof error->message, "%s%s%s", what, *why ? ": " : "", why);
    }
    return code;
}

static int lines(void) { return g.rank == 0 ? g.size : 1; }

static int is_line(int i) { return g.rank != 0 || i != 0; }

/* Keep the first message, tell the others of it, and let go of what waits for them. */
static void note_failure(const char *message)
{
    char sent[MESSAGE] = {FAILED};
    pthread_mutex_lock(&g.lock);
    if (!g.failed && !g.ended) {
        g.failed = 1;
        snprintf(g.message, sizeof g.message, "%s", message);
        snprintf(sent + 1, sizeof sent - 1, "%s", message);
        for (int i = 0; i < lines(); i++) {
            if (!is_line(i)) continue;
            if (send(g.line[i][FAILURES], sent, sizeof sent, MSG_NOSIGNAL) < 0) continue; /* it is gone itself */
            shutdown(g.line[i][DATA], SHUT_RDWR);
        }
        if (g.nccl) ncclCommAbort(g.nccl);
        g.nccl = NULL;
    }
    pthread_mutex_unlock(&g.lock);
}

static int transfer(int fd, void *data, size_t bytes, int out)
{
    char *at = static_cast<char *>(data);
    while (bytes > 0) {
        ssize_t n = out ? send(fd, at, bytes, MSG_NOSIGNAL) : recv(fd, at, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return 0;
        at += n;
        bytes -= static_cast<size_t>(n);
    }
    return 1;
}

/* The thread that waits for failures, until all lines have said that they end. */
static void *watch(void *unused)
{
    struct pollfd *poll_of = static_cast<struct pollfd *>(calloc(static_cast<size_t>(g.size), sizeof *poll_of));
    int open = 0;
    for (int i = 0; i < lines(); i++, open += is_line(i - 1)) {
        poll_of[i].fd = is_line(i) ? g.line[i][FAILURES] : -1;
        poll_of[i].events = POLLIN;
    }
    while (open > 0) {
        if (poll(poll_of, static_cast<nfds_t>(lines()), -1) < 0) continue; /* a signal */
        for (int i = 0; i < lines(); i++) {
            char message[MESSAGE], gone[64];
            if (poll_of[i].fd < 0 || !poll_of[i].revents) continue;
            int rank = g.rank == 0 ? i : 0, whole = transfer(poll_of[i].fd, message, sizeof message, 0);
            snprintf(gone, sizeof gone, "rank %d has ended without a word", rank);
            message[MESSAGE - 1] = 0;
            if (!whole || message[0] != BYE) note_failure(whole ? message + 1 : gone);
            poll_of[i].fd = -1;
            open--;
        }
    }
    free(poll_of);
    return unused;
}

/* What a call that went wrong is to say: another rank's message, which may be on its way, or this. */
static besa_result lost(besa_error *error, const char *what, const char *why)
{
    char message[MESSAGE];
    for (int i = 0; i < 100; i++) {
        pthread_mutex_lock(&g.lock);
        const int failed = g.failed;
        snprintf(message, sizeof message, "%s", g.message);
        pthread_mutex_unlock(&g.lock);
        if (failed) return error_of(error, BESA_ERROR_COMM, message, "");
        usleep(10000);
    }
    return error_of(error, BESA_ERROR_COMM, what, why);
}

static int has_failed(void)
{
    pthread_mutex_lock(&g.lock);
    const int failed = g.failed;
    pthread_mutex_unlock(&g.lock);
    return failed;
}

/* ---- the comm ------------------------------------------------------------------------------ */

/* Root's bytes to rank 0, and from there to the others. */
static besa_result broadcast(void *user, void *data, size_t bytes, int root, besa_error *error)
{
    int ok = !has_failed();
    (void)user;
    if (g.rank != 0) ok = ok && transfer(g.line[0][DATA], data, bytes, g.rank == root);
    else {
        if (root != 0) ok = ok && transfer(g.line[root][DATA], data, bytes, 0);
        for (int i = 1; i < g.size && ok; i++)
            if (i != root) ok = transfer(g.line[i][DATA], data, bytes, 1);
    }
    return ok ? BESA_OK : lost(error, "a broadcast", "the connection to another process is gone");
}

/* A byte of every rank to rank 0, and one back. */
static besa_result barrier(void *user, besa_error *error)
{
    char byte = 0;
    int ok = !has_failed();
    (void)user;
    for (int i = 0; i < lines() && ok; i++)
        if (is_line(i)) ok = transfer(g.line[i][DATA], &byte, 1, g.rank != 0);
    for (int i = 0; i < lines() && ok; i++)
        if (is_line(i)) ok = transfer(g.line[i][DATA], &byte, 1, g.rank == 0);
    return ok ? BESA_OK : lost(error, "a barrier", "the connection to another process is gone");
}

/* A call of NCCL's returns at once; here it has come to its end, or a failure has ended it. */
static besa_result settle(const char *call, ncclResult_t status, besa_error *error)
{
    while (status == ncclInProgress) {
        pthread_mutex_lock(&g.lock);
        if (!g.nccl || ncclCommGetAsyncError(g.nccl, &status) != ncclSuccess) status = ncclSystemError;
        pthread_mutex_unlock(&g.lock);
        if (status == ncclInProgress) usleep(10);
    }
    return status == ncclSuccess ? BESA_OK : lost(error, call, ncclGetErrorString(status));
}

/* NCCL, once the backend has chosen its device: at the first sum, which comes to all ranks alike. */
static besa_result begin_nccl(besa_error *error)
{
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;                        /* else it would wait for a rank that is gone, and could not be aborted */
    memset(&id, 0, sizeof id);
    if (g.rank == 0) ncclGetUniqueId(&id);
    besa_result result = broadcast(NULL, &id, sizeof id, 0, error);
    if (result != BESA_OK) return result;
    pthread_mutex_lock(&g.lock);
    const ncclResult_t status = g.failed ? ncclSystemError : ncclCommInitRankConfig(&g.nccl, g.size, id, g.rank, &config);
    pthread_mutex_unlock(&g.lock);
    return settle("ncclCommInitRankConfig", status, error);
}

static besa_result reduce(void *user, besa_backend *be, besa_queue q, float *data, int64_t count, besa_error *error)
{
    (void)user;
    if (be->unified_memory)
        return error_of(error, BESA_ERROR_OPTION, "besa_nccl sums what lies on GPUs: expected --device cuda; besa_mpi is for the CPU", "");
    if (has_failed()) return lost(error, "", "");
    if (!g.nccl) {
        besa_result result = begin_nccl(error);
        if (result != BESA_OK) return result;
    }
    const cudaStream_t stream = static_cast<cudaStream_t>(besa_cuda_stream(be, q));
    pthread_mutex_lock(&g.lock);
    const ncclResult_t status =
        g.nccl ? ncclAllReduce(data, data, static_cast<size_t>(count), ncclFloat, ncclSum, g.nccl, stream) : ncclSystemError;
    pthread_mutex_unlock(&g.lock);
    return settle("ncclAllReduce", status, error);
}

static void fail(void *user, const besa_error *error)
{
    char message[MESSAGE];
    (void)user;
    snprintf(message, sizeof message, "%.480s (rank %d)", error->message, g.rank);
    note_failure(message);
}

/* ---- who is who ---------------------------------------------------------------------------- */

static const char *first_of(const char *const *names)
{
    for (; *names; names++)
        if (getenv(*names)) return getenv(*names);
    return NULL;
}

static int number_of(const char *const *names, int standard)
{
    const char *text = first_of(names);
    return text ? atoi(text) : standard;
}

static void give_up(const char *what, const char *why)
{
    fprintf(stderr, "besa_nccl: rank %d of %d: %s: %s\n", g.rank, g.size, what, why);
    exit(1);
}

static int listen_at(int port)
{
    struct sockaddr_in6 any;
    const int fd = socket(AF_INET6, SOCK_STREAM, 0), on = 1, off = 0;
    memset(&any, 0, sizeof any);
    any.sin6_family = AF_INET6;
    any.sin6_addr = in6addr_any;
    any.sin6_port = htons(static_cast<uint16_t>(port));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, reinterpret_cast<struct sockaddr *>(&any), sizeof any) || listen(fd, 2 * g.size))
        give_up("listening (BESA_PORT says another port)", strerror(errno));
    return fd;
}

static void accept_all(int port)
{
    const int fd = listen_at(port);
    for (int left = LINES * (g.size - 1); left > 0; left--) {
        int who[2], one = accept(fd, NULL, NULL);
        if (one < 0 || !transfer(one, who, sizeof who, 0) || who[0] < 1 || who[0] >= g.size || who[1] < 0 || who[1] >= LINES ||
            g.line[who[0]][who[1]] >= 0)
            give_up("accepting connections", "a process that is not one of this run's");
        g.line[who[0]][who[1]] = one;
    }
    close(fd);
}

static int connect_to(const char *host, int port)
{
    struct addrinfo hints, *found = NULL;
    char service[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    for (int tenths = 0; tenths < 10 * CONNECT_SECONDS; tenths++) {
        if (!getaddrinfo(host, service, &hints, &found)) {
            for (struct addrinfo *at = found; at; at = at->ai_next) {
                const int fd = socket(at->ai_family, SOCK_STREAM, 0);
                if (fd >= 0 && !connect(fd, at->ai_addr, at->ai_addrlen)) return freeaddrinfo(found), fd;
                if (fd >= 0) close(fd);
            }
            freeaddrinfo(found);
        }
        usleep(100000);
    }
    give_up(host, "rank 0 does not answer");
    return -1;
}

extern "C" const besa_comm *besa_processes_begin(int *device)
{
    static const char *const ranks[] = {"RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK", NULL};
    static const char *const sizes[] = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE", NULL};
    static const char *const locals[] = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID", NULL};
    static const char *const hosts[] = {"MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR", NULL};
    static const char *const port[] = {"BESA_PORT", NULL}, *const master[] = {"MASTER_PORT", NULL};
    static besa_comm comm = {0, 1, NULL, reduce, broadcast, barrier, fail};
    pthread_t watcher;
    const char *host = first_of(hosts);
    const int on = 1, at = number_of(port, number_of(master, 29554) + 1);
    comm.rank = g.rank = number_of(ranks, 0);
    comm.size = g.size = number_of(sizes, 1);
    *device = number_of(locals, 0);
    if (g.size < 1 || g.rank < 0 || g.rank >= g.size) give_up("RANK, WORLD_SIZE", "expected 0 <= RANK < WORLD_SIZE");
    if (g.size == 1) return &comm;
    pthread_mutex_init(&g.lock, NULL);
    g.line = static_cast<int(*)[LINES]>(malloc(static_cast<size_t>(g.size) * sizeof *g.line));
    for (int i = 0; i < g.size; i++) g.line[i][DATA] = g.line[i][FAILURES] = -1;
    if (g.rank == 0) accept_all(at);
    for (int k = 0; k < LINES && g.rank != 0; k++) {
        int who[2] = {g.rank, k};
        g.line[0][k] = connect_to(host ? host : "127.0.0.1", at);
        if (!transfer(g.line[0][k], who, sizeof who, 1)) give_up("connecting", strerror(errno));
    }
    for (int i = 0; i < lines(); i++)
        if (is_line(i)) setsockopt(g.line[i][DATA], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (pthread_create(&watcher, NULL, watch, NULL) || pthread_detach(watcher)) give_up("a thread", strerror(errno));
    return &comm;
}

/* Lines that end in good order say so. */
extern "C" int besa_processes_end(int status)
{
    char bye[MESSAGE] = {BYE};
    if (g.size <= 1) return status;
    pthread_mutex_lock(&g.lock);
    for (int i = 0; i < lines() && status == 0; i++)
        if (is_line(i)) send(g.line[i][FAILURES], bye, sizeof bye, MSG_NOSIGNAL);
    g.ended = 1;
    pthread_mutex_unlock(&g.lock);
    return status;
}
