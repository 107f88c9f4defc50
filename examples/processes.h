/* processes.h - what besa.c asks of a file that lets several processes work on one run: mpi.c, nccl.cu. */
#ifndef PROCESSES_H
#define PROCESSES_H

#ifdef __cplusplus
extern "C" {
#endif

/* Once, when the command line has been read. *device: which GPU of its machine is this process's, from 0 on. */
const besa_comm *besa_processes_begin(int *device);

/* Once, at the end: the exit status. Others end too where it is not 0. */
int besa_processes_end(int status);

#ifdef __cplusplus
}
#endif
#endif
