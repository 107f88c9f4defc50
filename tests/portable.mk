# portable.mk - included by the Makefile. The header beyond the compiler and machine at hand; SKIP where the tools are not
# installed (Debian: gcc-multilib g++-multilib musl-tools tcc mingw-w64 libopenblas-dev locales qemu-user, and for AArch64
# and s390x clang with libc6-dev-arm64-cross libgcc-12-dev-arm64-cross binutils-aarch64-linux-gnu, and so on):
#
# make portable                 all of these; -j2 runs two at a time
# make portable-refused         -ffast-math, -Ofast, -ffinite-math-only and x87 do not compile
# make portable-unsafe          -funsafe-math-optimizations, which sets no macro: right, or no backend
# make portable-32-bit          -m32 -msse2 -mfpmath=sse: operations, references, files, the pipeline
# make portable-musl            references and files with musl
# make portable-c99, -tcc       strict C99; tcc
# make portable-mingw           levels 2 and 3 for Windows, as C99 and C++17; run where there is wine
# make portable-no-simd         BESA_NO_SIMD
# make portable-OpenBLAS        BESA_CBLAS: operations and references
# make portable-locale          a German locale, made with localedef
# make portable-aarch64, -s390x under qemu: NEON and plain C; checkpoints are refused on big-endian machines

PORTABLE      := refused unsafe 32-bit musl c99 tcc mingw no-simd OpenBLAS locale aarch64 s390x
PORTABLE_LOGS := $(PORTABLE:%=$(BUILD)/portable/%.log)

.PHONY: portable $(PORTABLE:%=portable-%)
portable: $(PORTABLE_LOGS)
	@./sum.sh $^

$(PORTABLE:%=portable-%): portable-%: $(BUILD)/portable/%.log
	@./sum.sh $^

$(BUILD)/portable/%.log: FORCE
	@mkdir -p $(BUILD)/portable/$*
	@./run.sh $@ ./portable.sh $(BESA) $(BUILD)/portable/$* $(STORIES) $(REFERENCE) $*
