#!/usr/bin/env python3
"""Make a directory that besa reads out of what transformers loads. Needs the packages torch and transformers.

    python convert.py MODEL NEW             a directory with pytorch_model*.bin; or with weights in fp8, which needs the
                                            package accelerate, or in compressed-tensors, which needs that one too
    python convert.py MODEL/FILE.gguf NEW   a GGUF file of any quantisation; needs the packages gguf and accelerate

NEW gets config.json, safetensors of at most 5 GB each, and the tokenizer. Weights come out dense: in the type that
config.json names, of a GGUF file in bfloat16, or as --dtype says. The whole model is in memory meanwhile.

A pruned directory becomes GGUF by llama.cpp's own converter. Its quantisation keeps zeros where levels have one, as Q8_0
and Q4_0 do:

    python llama.cpp/convert_hf_to_gguf.py PRUNED --outtype bf16 --outfile pruned.gguf
    llama.cpp/build/bin/llama-quantize pruned.gguf pruned-Q4_0.gguf Q4_0
"""
import os
import sys

# tokenize.py beside this file has the name of a module of Python's library that others import: let them find theirs.
sys.path = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]

import argparse
import importlib.util
import json
import pathlib
import shutil

SHARD = "5GB"
# what lies beside the weights and is as true of the new ones
BESIDE = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
          "generation_config.json", "chat_template*", "LICENSE*", "README.md")
# quantisations that transformers undoes while it loads; bitsandbytes afterwards
WHILE_LOADING, AFTERWARDS = ("fp8", "compressed-tensors"), ("bitsandbytes",)


def need(reason, *packages):
    """Ends the program where a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        sys.exit(f"convert.py needs {', '.join(missing)} {reason}: pip install {' '.join(missing)}")


def quantisation(config):
    """The quant_method of a config, None for dense weights."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "one without a name")
    if method not in WHILE_LOADING + AFTERWARDS:
        sys.exit(f"transformers does not turn {method} back into dense weights: take the model that it was made from")
    need(f"for weights in {method}", "accelerate", *([] if method == "fp8" else [method]))
    stored["dequantize"] = True
    return method


def unpacked():
    """What asks for dense weights of a GGUF file; earlier versions of transformers know no others."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def load(source, dtype):
    """The model, in dense weights; dtype None: its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    wanted = getattr(torch, dtype) if dtype else None
    if source.is_file():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=wanted or torch.bfloat16,
                                                     **unpacked())
    else:
        config = AutoConfig.from_pretrained(source)
        method = quantisation(config)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=wanted or "auto")
        model = model.dequantize() if method in AFTERWARDS else model
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model.to(wanted or model.dtype)


def check(model):
    """Every weight is one that besa reads, and there are no others than the model's own."""
    for name, tensor in model.state_dict().items():
        if str(tensor.dtype) not in ("torch.float32", "torch.float16", "torch.bfloat16"):
            sys.exit(f"{name} is still {tensor.dtype}: take the model that it was made from")


def copy_beside(source, new):
    if source.is_file():
        from transformers import AutoTokenizer
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(new)
        return
    for pattern in BESIDE:
        for path in source.glob(pattern):
            shutil.copyfile(path, new / path.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, metavar="MODEL", help="a directory, or a .gguf file")
    parser.add_argument("new", type=pathlib.Path, metavar="NEW", help="the directory to make")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights [the model's own]")
    args = parser.parse_args()
    if not args.source.exists():
        sys.exit(f"{args.source} does not exist: download a model of the Hub, hf download {args.source} --local-dir DIR")
    if args.new.exists():
        sys.exit(f"{args.new} is there already: name a directory that is not")
    partial = args.new.with_name(args.new.name + ".partial")
    if partial.exists():
        sys.exit(f"{partial} is there already, what a `besa prune` or a convert.py that was stopped has left: the same `besa prune` goes "
                 "on with it; else delete it, or name another directory")
    need("for any model", "torch", "transformers")
    if args.source.is_file():
        need("for GGUF files", "gguf", "accelerate")
    model = load(args.source, args.dtype)
    check(model)
    partial.mkdir()
    try:
        model.save_pretrained(partial, max_shard_size=SHARD)
        copy_beside(args.source, partial)
        partial.rename(args.new)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count, size = sum(p.numel() for p in model.parameters()), sum(p.stat().st_size for p in args.new.glob("*.safetensors"))
    kind = json.loads((args.new / "config.json").read_text())["model_type"]
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{args.new}: {kind}, {count / 1e6:.4g} million weights in {dtype}, {size / 1e9:.3g} GB")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, ImportError) as error:
        sys.exit(f"convert.py: {type(error).__name__}: {error}")
