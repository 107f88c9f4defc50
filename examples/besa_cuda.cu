/* The library and its CUDA backend for `make cuda`: nvcc compiles this file, besa.c stays plain C and links it. */
#define BESA_IMPLEMENTATION
#define BESA_CUDA
#include "../besa.h"
