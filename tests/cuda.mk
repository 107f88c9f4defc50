# cuda.mk - included by the Makefile. The CUDA backend without a GPU:
#
# make cuda             cuda-standin and cuda-compile
# make cuda-standin     operations and the pipeline on the stand-in runtime, plain and under AddressSanitizer
# make cuda-race        operations on the stand-in under ThreadSanitizer: missing barriers, events and dependencies
# make cuda-compile     the real compiler, for every architecture, warnings as errors; SKIP without nvcc
#
# ONLY="part of a name" as elsewhere. CUDA_ARCHS="90" compiles for fewer.

NVCC       ?= nvcc
CUDA_ARCHS ?= 75 80 90 100
CUDA_BUILD := $(BUILD)/cuda
STANDIN    := cuda_standin
CUDA_FLAGS := -std=c++17 -g -Wall -Wextra -Wshadow -Werror -I$(STANDIN)/include -I$(BESA) -I.
CUDA_FILES := test_cuda.cpp backend_ops.h test.h fixture.h $(BESA)/besa.h $(BESA)/besa_cuda.cuh
NVCC_FLAGS := -std=c++17 -I$(BESA) -Xcompiler -Wall,-Wextra,-Wshadow -Werror all-warnings

cuda_plain_FLAGS   := -O2
cuda_address_FLAGS := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
cuda_thread_FLAGS  := -O1 -fsanitize=thread

.PHONY: cuda cuda-standin cuda-race cuda-compile
CUDA_LOGS  := $(CUDA_BUILD)/plain.log $(CUDA_BUILD)/address.log
cuda: $(CUDA_LOGS) $(CUDA_ARCHS:%=$(CUDA_BUILD)/compile-%.log)
	@./sum.sh $^

cuda-standin: $(CUDA_LOGS)
	@./sum.sh $^

# slow: about ten minutes
cuda-race: $(CUDA_BUILD)/thread.log
	@./sum.sh $^

$(CUDA_BUILD)/%.log: $(CUDA_BUILD)/test_cuda-% FORCE
	@./run.sh $@ $< $(STORIES) $(if $(ONLY)$(cuda_$*_ONLY),'$(or $(ONLY),$(cuda_$*_ONLY))')

$(CUDA_BUILD)/test_cuda-%: $(CUDA_FILES) $(CUDA_BUILD)/standin-%.o | $(CUDA_BUILD)
	$(CXX) $(CUDA_FLAGS) $(cuda_$*_FLAGS) -o $@ test_cuda.cpp $(CUDA_BUILD)/standin-$*.o

$(CUDA_BUILD)/standin-%.o: $(STANDIN)/standin.cpp $(wildcard $(STANDIN)/include/*.h) | $(CUDA_BUILD)
	$(CXX) $(CUDA_FLAGS) $(cuda_$*_FLAGS) -c -o $@ $<

cuda_thread_ONLY := operations, fp32

cuda-compile: $(CUDA_ARCHS:%=$(CUDA_BUILD)/compile-%.log)
	@./sum.sh $^

# the .cu file that a C program links, and that C program
$(CUDA_BUILD)/compile-%.log: $(BESA)/besa.h $(BESA)/besa_cuda.cuh | $(CUDA_BUILD)
	@if ! command -v $(NVCC) >/dev/null; then echo "SKIP compile for sm_$*: no $(NVCC)" >$@; \
	else printf '#define BESA_IMPLEMENTATION\n#define BESA_CUDA\n#include "besa.h"\n' >$(CUDA_BUILD)/besa-$*.cu; \
	    if $(NVCC) $(NVCC_FLAGS) -arch=sm_$* -c -o $(CUDA_BUILD)/besa-$*.o $(CUDA_BUILD)/besa-$*.cu >$@ 2>&1; \
	    then echo "PASS compile for sm_$*" >>$@; else echo "FAIL compile for sm_$*" >>$@; fi; fi
	@cat $@

$(CUDA_BUILD):
	@mkdir -p $@

.SECONDARY:
