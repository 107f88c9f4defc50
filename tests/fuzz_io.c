/* One input through a reader of untrusted bytes; the first byte picks it: JSON, a safetensors file, an .npy file, a
 * config. Built with -fsanitize=fuzzer it is a libFuzzer target; test_io.c includes it and mutates inputs itself. */
#ifndef BESA_H
#define BESA_IMPLEMENTATION
#include "besa.h"
#endif

static int64_t fuzz_outcomes[4][2];             /* per reader: inputs it took, inputs it refused */

/* A refusal has its own code and says something. */
static void fuzz_outcome(int kind, besa_result result, const besa_error *error)
{
    if (result != BESA_OK && (error->code != result || !*error->message)) abort();
    fuzz_outcomes[kind][result != BESA_OK]++;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    besa_error error;
    if (!size) return 0;
    int kind = *data++ % 4;
    char *text = (char *)malloc(size); /* size - 1 bytes and a NUL: reading past it is seen by AddressSanitizer */
    if (!text) return 0;
    size--;
    memcpy(text, data, size);
    text[size] = 0;
    if (kind == 0 || kind == 3) {
        besa__json json;
        besa_result result = besa__json_parse(&json, text, size, "fuzz", &error);
        if (kind == 3 && result == BESA_OK) {
            besa_config config;
            int bias[BESA_LAYERS];
            besa__config_reader reader = { &json, json.values, "fuzz", &error };
            memset(&config, 0, sizeof config);
            result = besa__config_read(&reader, &config, bias);
            if (result == BESA_OK && (config.block.head_dim < 2 || config.num_hidden_layers > BESA_MAX_LAYERS)) abort();
        }
        besa__json_free(&json);
        fuzz_outcome(kind, result, &error);
        return 0;
    }
    if (kind == 1) {
        besa_checkpoint *c = (besa_checkpoint *)calloc(1, sizeof *c);
        c->shards = (besa__shard *)calloc(1, sizeof *c->shards);
        c->shards->base = (unsigned char *)text;
        c->shards->size = size;
        besa_result result = besa__read_header(c, 0, "fuzz", &error);
        if (result == BESA_OK) result = besa__sort_tensors(c, &error);
        for (int64_t i = 0; i < c->num_tensors && result == BESA_OK; i++) {
            const besa_tensor *t = c->tensors + i;
            if (t->offset > size || t->bytes > size - t->offset || besa_checkpoint_find(c, t->name) != t) abort();
        }
        fuzz_outcome(kind, result, &error);
        c->num_shards = 0;
        free(c->shards->text);
        besa_checkpoint_close(c);
    } else {
        besa_tokens tokens;
        memset(&tokens, 0, sizeof tokens);
        besa_result result = besa__tokens_read(&tokens, (const unsigned char *)text, size, "fuzz.npy", &error);
        if (result == BESA_OK && (tokens.count < 1 || (tokens.columns && tokens.rows * tokens.columns != tokens.count))) abort();
        besa_tokens_free(&tokens);
        fuzz_outcome(kind, result, &error);
    }
    free(text);
    return 0;
}
