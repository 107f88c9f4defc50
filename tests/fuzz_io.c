/* One input through a reader of untrusted bytes; the first byte picks it: JSON, a safetensors file, an .npy file, a
 * config, an index. Built with -fsanitize=fuzzer it is a libFuzzer target; test_io.c includes it and mutates inputs itself. */
#ifndef BESA_H
#define BESA_IMPLEMENTATION
#include "besa.h"
#endif

static int fuzz_taken[5], fuzz_refused[5];      /* inputs, by kind */

/* An index against a table of two shards and three tensors. Takes text over. */
static besa_result fuzz_index(char *text, size_t size, besa_error *error)
{
    besa__shard shards[2];
    besa_tensor tensors[3];
    besa_checkpoint listed, *c = (besa_checkpoint *)BESA_MALLOC(sizeof *c);
    const besa_tensor *sorted[3];
    const besa__json_value *map;
    besa__json json;
    if (!c) return BESA_ERROR_MEMORY;
    memset(c, 0, sizeof *c);
    memset(&listed, 0, sizeof listed);
    memset(tensors, 0, sizeof tensors);
    memset(shards, 0, sizeof shards);
    shards[0].name = (char *)"x.safetensors", shards[1].name = (char *)"y.safetensors";
    for (int i = 0; i < 3; i++) {
        tensors[i].name = i == 0 ? "a" : i == 1 ? "b" : "c";
        tensors[i].file = i == 2;
        sorted[i] = &tensors[i];
    }
    listed.num_tensors = 3;
    listed.sorted = sorted;
    listed.shards = shards;
    besa_result result = besa__json_parse(&json, text, size, "fuzz", error);
    if (result == BESA_OK) result = besa__index_map(&map, &json, "fuzz", error);
    if (result == BESA_OK) result = besa__list_shards(c, &json, map, "fuzz", error);
    for (int64_t i = 0; i < c->num_shards && result == BESA_OK; i++) {
        const char *name = c->shards[i].name;
        if (!name || !*name || *name == '.' || strchr(name, '/') || !strstr(name, ".safetensors")) abort();
        if (i && strcmp(c->shards[i - 1].name, name) >= 0) abort();
    }
    if (result == BESA_OK) result = besa__check_index(&listed, &json, map, "fuzz", error);
    const besa__json_value *v = result == BESA_OK ? besa__json_first(&json, map) : NULL;
    for (; v; v = besa__json_next(&json, map, v)) { /* what is there is where the map says; what is nowhere may be anywhere */
        const besa_tensor *tensor = besa_checkpoint_find(&listed, besa__json_key(&json, v));
        if (tensor && strcmp(shards[tensor->file].name, besa__json_string(&json, v))) abort();
    }
    besa__json_free(&json);
    besa_checkpoint_close(c);
    return result;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    besa_error error;
    if (!size) return 0;
    int kind = (*data++ - '0') & 7;
    besa_result result = BESA_OK;
    if (kind > 4) return 0;
    char *text = (char *)BESA_MALLOC(size); /* size - 1 bytes and a NUL: reading past it is seen by AddressSanitizer */
    if (!text) return 0;
    size--;
    memcpy(text, data, size);
    text[size] = 0;
    if (kind == 0 || kind == 3) {
        besa__json json;
        result = besa__json_parse(&json, text, size, "fuzz", &error);
        if (kind == 3 && result == BESA_OK) {
            besa_config config;
            besa__config_reader reader = { &json, json.values, "fuzz", &error };
            memset(&config, 0, sizeof config);
            result = besa__config_read(&reader, &config);
            if (result == BESA_OK && (config.block.head_dim < 2 || config.num_hidden_layers > BESA_MAX_LAYERS)) abort();
        }
        besa__json_free(&json);
    } else if (kind == 4) {
        result = fuzz_index(text, size, &error);
    } else if (kind == 1) {
        besa_checkpoint *c = (besa_checkpoint *)BESA_MALLOC(sizeof *c);
        if (!c) abort();
        memset(c, 0, sizeof *c);
        c->shards = (besa__shard *)BESA_MALLOC(sizeof *c->shards);
        if (!c->shards) abort();
        memset(c->shards, 0, sizeof *c->shards);
        c->shards->base = (unsigned char *)text;
        c->shards->size = size;
        result = besa__read_header(c, 0, "fuzz", &error);
        if (result == BESA_OK) result = besa__sort_tensors(c, &error);
        for (int64_t i = 0; i < c->num_tensors && result == BESA_OK; i++) {
            const besa_tensor *t = c->tensors + i;
            if (t->offset > size || t->bytes > size - t->offset || besa_checkpoint_find(c, t->name) != t) abort();
        }
        c->num_shards = 0;
        BESA_FREE(c->shards->text);
        besa_checkpoint_close(c);
        BESA_FREE(text);
    } else {
        besa_tokens tokens;
        memset(&tokens, 0, sizeof tokens);
        result = besa__tokens_read(&tokens, (const unsigned char *)text, size, "fuzz.npy", &error);
        if (result == BESA_OK && (tokens.count < 1 || (tokens.columns && tokens.rows * tokens.columns != tokens.count))) abort();
        besa_tokens_free(&tokens);
        BESA_FREE(text);
    }
    if (result != BESA_OK && (error.code != result || !*error.message)) abort(); /* a refusal says something */
    if (result == BESA_OK) fuzz_taken[kind]++;
    else fuzz_refused[kind]++;
    return 0;
}
