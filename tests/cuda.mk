# cuda.mk - included by the Makefile. The CUDA backend without a GPU:
#
# make cuda             all of these but the last two:
# make cuda-selftest    the stand-in runtime itself, and that it catches broken kernels: plain and under both sanitizers
# make cuda-standin     operations and the pipeline on the stand-in, plain and under AddressSanitizer
# make cuda-race        the same under ThreadSanitizer, shorter: missing barriers, events and dependencies. With clang++
#                       where it is found: g++ 12's sanitizer takes up to 40 times as long
# make cuda-compile     the real compiler, for every architecture, warnings as errors; SKIP without nvcc
# make cuda-programs    a C program that links what nvcc compiled; the command line's --device, on the stand-in and by
#                       `make -C examples cuda`; `make nccl` and `make mpi CUDA=1`, linked alone. Where there is a GPU they run
#                       on it, and so do the operations and the pipeline
# make bench-cuda-model without a GPU: one block's launches at the shapes of 7B and 70B, and what a roofline makes of them,
#                       on 1 to 64 GPUs
# make bench-cuda       with nvcc and a GPU: copy, product, each operation, whole blocks; $(CUDA_BUILD)/bench-cuda.txt
#
# BENCH="--models 7B --nsamples 8" and the like are passed on by both; bench_cuda.cpp lists the options.
# ONLY="part of a name" as elsewhere; ONLY_address and the like for one of the stand-in's builds. CUDA_ARCHS="90" compiles for fewer.

NVCC       ?= nvcc
CUDA_ARCHS ?= 75 80 90 100
BENCH_ARCH ?= native
CUDA_BUILD := $(BUILD)/cuda
STANDIN    := cuda_standin
CUDA_FLAGS := -std=c++17 -g -Wall -Wextra -Wshadow -Werror -I$(STANDIN)/include -I$(BESA) -I.
CUDA_FILES := test_cuda.cpp backend_ops.h test.h fixture.h $(BESA)/besa.h $(BESA)/besa_cuda.cuh
NVCC_FLAGS := -std=c++17 -I$(BESA) -Xcompiler -Wall,-Wextra,-Wshadow -Werror all-warnings

cuda_plain_FLAGS   := -O2
cuda_address_FLAGS := $(SANITIZED) $(if $(filter operations,$(ONLY_address)),-DTEST_OPERATIONS)
cuda_thread_FLAGS  := -O1 -fsanitize=thread

cuda_thread_CXX     = $(if $(findstring clang,$(CXX)),,$(shell echo 'int main(){return 0;}' | \
                         clang++ -fsanitize=thread -xc++ - -o /dev/null 2>/dev/null && echo clang++))

CUDA_SELFTEST_LOGS := $(CUDA_BUILD)/selftest-plain.log $(CUDA_BUILD)/selftest-address.log $(CUDA_BUILD)/selftest-thread.log
CUDA_STANDIN_LOGS  := $(CUDA_BUILD)/plain.log $(CUDA_BUILD)/address.log
CUDA_RACE_LOGS     := $(CUDA_BUILD)/thread.log
CUDA_COMPILE_LOGS  := $(CUDA_ARCHS:%=$(CUDA_BUILD)/compile-%.log) $(CUDA_BUILD)/compile-bench.log
CUDA_PROGRAM_LOGS  := $(CUDA_BUILD)/link-gcc.log $(CUDA_BUILD)/link-clang.log $(CUDA_BUILD)/command.log $(CUDA_BUILD)/nccl.log \
                      $(CUDA_BUILD)/processes.log $(CUDA_BUILD)/gpu.log
CUDA_MODEL_LOGS    := $(CUDA_BUILD)/bench-model.log

.PHONY: cuda cuda-selftest cuda-standin cuda-race cuda-compile cuda-programs bench-cuda bench-cuda-model
cuda: $(CUDA_SELFTEST_LOGS) $(CUDA_STANDIN_LOGS) $(CUDA_RACE_LOGS) $(CUDA_MODEL_LOGS) $(CUDA_COMPILE_LOGS) \
      $(if $(ONLY),,$(CUDA_PROGRAM_LOGS))
cuda-selftest: $(CUDA_SELFTEST_LOGS)
cuda-standin: $(CUDA_STANDIN_LOGS)
cuda-race: $(CUDA_RACE_LOGS)
cuda-compile: $(CUDA_COMPILE_LOGS)
cuda-programs: $(CUDA_PROGRAM_LOGS)
cuda cuda-selftest cuda-standin cuda-race cuda-compile cuda-programs:
	@./sum.sh $^

$(CUDA_BUILD)/%.log: $(CUDA_BUILD)/test_cuda-% FORCE
	@./run.sh $@ $< $(STORIES) $(if $(ONLY)$(ONLY_$*),'$(or $(ONLY),$(ONLY_$*))')

$(CUDA_BUILD)/test_cuda-%: $(CUDA_FILES) $(CUDA_BUILD)/standin-%.o | $(CUDA_BUILD)
	$(or $(cuda_$*_CXX),$(CXX)) $(CUDA_FLAGS) $(cuda_$*_FLAGS) -o $@ test_cuda.cpp $(CUDA_BUILD)/standin-$*.o

$(CUDA_BUILD)/selftest-%.log: $(CUDA_BUILD)/test_standin-% FORCE
	@./run.sh $@ $<

$(CUDA_BUILD)/test_standin-%: $(STANDIN)/test_standin.cpp $(STANDIN)/sample_kernels.cuh $(CUDA_BUILD)/standin-%.o | $(CUDA_BUILD)
	$(or $(cuda_$*_CXX),$(CXX)) $(CUDA_FLAGS) $(cuda_$*_FLAGS) -o $@ $< $(CUDA_BUILD)/standin-$*.o

$(CUDA_BUILD)/standin-%.o: $(STANDIN)/standin.cpp $(wildcard $(STANDIN)/include/*.h) | $(CUDA_BUILD)
	$(or $(cuda_$*_CXX),$(CXX)) $(CUDA_FLAGS) $(cuda_$*_FLAGS) -c -o $@ $<

# the .cu file that a C program links
$(CUDA_BUILD)/compile-%.log: $(BESA)/besa.h $(BESA)/besa_cuda.cuh | $(CUDA_BUILD)
	@if ! command -v $(NVCC) >/dev/null; then echo "SKIP compile for sm_$*: no $(NVCC)" >$@; \
	else printf '#define BESA_IMPLEMENTATION\n#define BESA_CUDA\n#include "besa.h"\n' >$(CUDA_BUILD)/besa-$*.cu; \
	    if $(NVCC) $(NVCC_FLAGS) -arch=sm_$* -c -o $(CUDA_BUILD)/besa-$*.o $(CUDA_BUILD)/besa-$*.cu >$@ 2>&1; \
	    then echo "PASS compile for sm_$*" >>$@; else echo "FAIL compile for sm_$*" >>$@; fi; fi
	@cat $@

# that C program, by gcc and by clang; the oldest architecture's object runs on every GPU
C_FLAGS     := -std=c11 -O1 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror -I$(BESA)
LINK_ARCH   := $(firstword $(CUDA_ARCHS))
LINK_BY_NVCC = $(NVCC) -o $(CUDA_BUILD)/link-$* $(CUDA_BUILD)/link-$*.o $(CUDA_BUILD)/besa-$(LINK_ARCH).o -lcublas -lm
$(CUDA_BUILD)/link-%.log: link_cuda.c test.h $(CUDA_BUILD)/compile-$(LINK_ARCH).log FORCE
	@if ! command -v $(NVCC) >/dev/null || ! command -v $* >/dev/null; then \
	    echo "SKIP a C program by $* links the .cu file's object: no $(NVCC) or no $*" >$@; cat $@; \
	elif ! $* $(C_FLAGS) -c -o $(CUDA_BUILD)/link-$*.o $< || ! $(LINK_BY_NVCC); then \
	    echo "FAIL a C program by $* links the .cu file's object" >$@; cat $@; \
	else rm -rf $(CUDA_BUILD)/linked-$* && mkdir $(CUDA_BUILD)/linked-$* && \
	    ./run.sh $@ $(CUDA_BUILD)/link-$* $(STORIES) $(CUDA_BUILD)/linked-$*; fi

$(CUDA_BUILD)/command.log: command_cuda.sh $(CUDA_BUILD)/besa-standin FORCE
	@CC='$(CC)' ./run.sh $@ ./$< $(BESA) $(CUDA_BUILD)/command $(CUDA_BUILD)/besa-standin $(NVCC) \
	    $(if $(filter command,$(firstword $(origin CUDA_ARCHS))),$(lastword $(CUDA_ARCHS)))

# what the stand-in tests, as far as a GPU can: operations, queues, plans, the pipeline
HAS_GPU = nvidia-smi -L >/dev/null 2>&1 || test -e /dev/nvidia0 || test -e /dev/dxg
$(CUDA_BUILD)/gpu.log: $(CUDA_FILES) gpu.h FORCE | $(CUDA_BUILD)
	@if ! command -v $(NVCC) >/dev/null; then echo "SKIP operations and pipelines on a GPU: no $(NVCC)" >$@; cat $@; \
	elif ! { $(HAS_GPU); }; then echo "SKIP operations and pipelines on a GPU: there is none" >$@; cat $@; \
	elif ! $(NVCC) $(NVCC_FLAGS) -I. -O2 -arch=$(BENCH_ARCH) -x cu test_cuda.cpp -lcublas -o $(CUDA_BUILD)/test_cuda-gpu >$@ 2>&1; \
	then cat $@; echo "FAIL test_cuda.cpp for a GPU" | tee -a $@; \
	else ./run.sh $@ $(CUDA_BUILD)/test_cuda-gpu $(STORIES) $(if $(ONLY),'$(ONLY)'); fi

# the command line on the stand-in: a C program that links besa_cuda.cu, as `make -C examples cuda` does
BESA_FILES := $(addprefix $(BESA)/examples/,besa.c options.h card.h compare.h besa_cuda.cu) $(BESA)/besa.h $(BESA)/besa_cuda.cuh
$(CUDA_BUILD)/besa-standin: $(BESA_FILES) $(CUDA_BUILD)/standin-plain.o
	$(CC) $(C_FLAGS) -DBESA_WITH_CUDA -c -o $@.o $<
	$(CXX) $(CUDA_FLAGS) -O1 -D__CUDACC__ -c -o $@-cuda.o -x c++ $(BESA)/examples/besa_cuda.cu
	$(CXX) -o $@ $@.o $@-cuda.o $(CUDA_BUILD)/standin-plain.o -lm

# nccl.cu, with a stand-in for NCCL's calls too
NCCL_FILES := $(addprefix $(BESA)/examples/,nccl.cu processes.h) $(STANDIN)/nccl_standin.cpp $(STANDIN)/include/nccl.h
$(CUDA_BUILD)/besa_nccl-standin: $(CUDA_BUILD)/besa-standin $(NCCL_FILES)
	$(CC) $(C_FLAGS) -DBESA_WITH_CUDA -DBESA_WITH_PROCESSES -c -o $@.o $(BESA)/examples/besa.c
	$(CXX) $(CUDA_FLAGS) $(cuda_plain_FLAGS) -c -o $@-nccl.o -x c++ $(BESA)/examples/nccl.cu
	$(CXX) $(CUDA_FLAGS) $(cuda_plain_FLAGS) -c -o $@-calls.o $(STANDIN)/nccl_standin.cpp
	$(CXX) -o $@ $@.o $@-nccl.o $@-calls.o $(CUDA_BUILD)/besa-standin-cuda.o $(CUDA_BUILD)/standin-plain.o -lm -pthread

$(CUDA_BUILD)/nccl.log: test_nccl.sh $(CUDA_BUILD)/besa_nccl-standin FORCE
	@./run.sh $@ ./$< $(CUDA_BUILD)/besa-standin $(CUDA_BUILD)/besa_nccl-standin $(STORIES) $(CUDA_BUILD)/nccl

# what the examples' Makefile makes of them with the real ones
$(CUDA_BUILD)/processes.log: link_processes.sh $(CUDA_BUILD)/compile-$(LINK_ARCH).log FORCE
	@CC='$(CC)' ./run.sh $@ ./$< $(NVCC) $(CUDA_BUILD)/besa-$(LINK_ARCH).o $(BESA) $(CUDA_BUILD)/processes

# ---- speed ----

BENCH_BUILD  = $(NVCC) $(NVCC_FLAGS) -I. -O3 -x cu bench_cuda.cpp -lcublas
BENCH_FILES := bench_cuda.cpp test.h $(BESA)/besa.h $(BESA)/besa_cuda.cuh

bench-cuda-model: $(CUDA_BUILD)/bench_cuda-model
	@$< --model $(BENCH)

$(CUDA_BUILD)/bench-model.log: $(CUDA_BUILD)/bench_cuda-model FORCE
	@./run.sh $@ $< --check $(if $(ONLY),--only '$(ONLY)')

$(CUDA_BUILD)/bench_cuda-model: $(BENCH_FILES) $(CUDA_BUILD)/standin-plain.o | $(CUDA_BUILD)
	$(CXX) $(CUDA_FLAGS) -O0 '-DBESA_API=static inline' -o $@ bench_cuda.cpp $(CUDA_BUILD)/standin-plain.o

bench-cuda:
	@if ! command -v $(NVCC) >/dev/null; then echo "SKIP bench-cuda: no $(NVCC)"; \
	elif ! { $(HAS_GPU); }; then echo "SKIP bench-cuda: no GPU"; \
	else $(MAKE) --no-print-directory $(CUDA_BUILD)/bench_cuda && \
	    $(CUDA_BUILD)/bench_cuda --output $(CUDA_BUILD)/bench-cuda.txt $(BENCH); fi

$(CUDA_BUILD)/bench_cuda: $(BENCH_FILES) | $(CUDA_BUILD)
	$(BENCH_BUILD) -arch=$(BENCH_ARCH) -o $@

$(CUDA_BUILD)/compile-bench.log: $(BENCH_FILES) | $(CUDA_BUILD)
	@if ! command -v $(NVCC) >/dev/null; then echo "SKIP compile bench_cuda: no $(NVCC)" >$@; \
	elif $(subst -O3,-O0,$(BENCH_BUILD)) -arch=sm_90 -o $(CUDA_BUILD)/bench_cuda-sm_90 >$@ 2>&1; \
	then echo "PASS compile bench_cuda" >>$@; else echo "FAIL compile bench_cuda" >>$@; fi
	@cat $@

$(CUDA_BUILD):
	@mkdir -p $@

.SECONDARY:
