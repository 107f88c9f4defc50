/* gpu.h - for test_cuda.cpp built by nvcc for a real GPU: what the stand-in would do or know, and a GPU does not. */
#ifndef GPU_H
#define GPU_H
#include <stddef.h>

enum { STANDIN_FORWARD, STANDIN_REVERSE, STANDIN_SHUFFLE };
enum { STANDIN_LATE, STANDIN_EAGER, STANDIN_OTHERS };

static inline void standin_set_order(int order, unsigned seed) { (void)order, (void)seed; }
static inline void standin_set_streams(int schedule) { (void)schedule; }
static inline void standin_set_shared(size_t bytes) { (void)bytes; }
static inline size_t standin_own_scratch(void) { return 0; }
static inline size_t standin_reports(void) { return 0; }
static inline const char *standin_last_report(void) { return ""; }
static inline size_t standin_live_allocations(void) { return 0; }
static inline size_t standin_live_objects(void) { return 0; }

#endif
