"""GPT-2's published weights into our model, and our models out to where other tools load them.

    python gpt2_weights.py get --model gpt2         download 548 MB once, check them, print where they are
    python gpt2_weights.py check --model gpt2       load and compare with published losses: under 1 min
    python gpt2_weights.py import --source FOLDER --out out/gpt2/model.safetensors      as a checkpoint of ours
    python gpt2_weights.py export --source out/pretrain/model.safetensors --out out/hf     for transformers
    python gpt2_weights.py export --format gguf --out out/model.gguf     for llama.cpp and Ollama; or --dtype q8_0

    model = load_gpt2("gpt2-medium")                     a name (downloaded where it is missing), a folder or a file
    export_gpt2(model, "out/hf", tokenizer)              AutoModelForCausalLM.from_pretrained("out/hf") reads it
    export_gguf(model, "out/model.gguf", tokenizer)      llama_cpp.Llama("out/model.gguf") reads it

The sizes are gpt2, gpt2-medium, gpt2-large and gpt2-xl. Two formats are read, Hugging Face's (config.json with
model.safetensors or an index) and OpenAI's TensorFlow checkpoint (hparams.json, model.ckpt.*), but never a pickle.
Downloads go to $DATA_DIR/gpt2/ (data/gpt2/), from huggingface.co (or $HF_ENDPOINT) at a pinned revision, else from
OpenAI; their sha256 is checked at every load by name. Source: github.com/openai/gpt-2.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

from gpt import (GPT_CONFIGS, GPTConfig, copy_weights, empty_model, file_sha256, load_checkpoint, read_safetensors,
                 replacing, require, run, save_checkpoint, tensor_bytes, token_logprobs, write_json, write_safetensors)
import torch  # after gpt, which filters its warning about numpy


class Published(NamedTuple):
    """Where a size of GPT-2 comes from, and what it must compute."""

    openai: str  # its folder in OpenAI's storage
    revision: str  # of huggingface.co/openai-community/<name>
    sha256: str = ""  # of model.safetensors; "" where the host names it
    losses: tuple = ()  # on the-verdict, train and validation part: Raschka, LLMs-from-scratch, ch05, and its solutions


PUBLISHED = {
    "gpt2": Published("124M", "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                      "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", (3.7547, 3.5596)),
    "gpt2-medium": Published("355M", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": Published("774M", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": Published("1558M", "15ea56dee5df4983c59b2538573817e1667135e2",
                         "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a", (3.3046, 3.1195)),
}
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"

# Names and shapes -----------------------------------------------------------------------------------------------------

NAMES = (("trf_blocks.", "h."), ("attn.qkv", "attn.c_attn"), ("attn.out_proj", "attn.c_proj"), ("ffn.fc1", "mlp.c_fc"),
         ("ffn.fc2", "mlp.c_proj"), (".ln1", ".ln_1"), (".ln2", ".ln_2"), ("tok_emb", "wte"), ("pos_emb", "wpe"),
         ("final_norm", "ln_f"), ("out_head", "lm_head"))
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored in x out, because GPT-2 multiplies x @ W
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that files of old transformers versions hold
WRAPPERS = re.compile(r"^((_orig_mod|module|model|transformer)\.)+")  # in front of names: torch.compile, DDP, a class
# What a config.json must say, first the value that its absence means; anything else would compute something else.
FIXED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
         "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)}


def renamed(name, names=NAMES):
    """Return Hugging Face's name for one of our tensors: trf_blocks.3.attn.qkv.bias -> h.3.attn.c_attn.bias."""
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name


def our_tensors(model, tensors, source):
    """Return {our name: tensor}, views of tensors under others' names; ValueError for a missing or unknown one."""
    config, ours = model.config, {}
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(MASKS)}
    if config.tie_weights and "lm_head.weight" in left:
        left.setdefault("wte.weight", left["lm_head.weight"])  # safetensors keeps either name of a shared matrix
    for name in model.state_dict():
        theirs = renamed(name)
        tensor, turned = left.pop(theirs, None), theirs.endswith(TURNED)
        if theirs == "lm_head.weight" and config.tie_weights:
            continue  # the same matrix once more
        require(tensor is not None, f"{source}: no tensor {theirs!r}")
        ours[name] = tensor.t() if turned and tensor.dim() == 2 else tensor
    for name, tensor in left.items():
        zeros = name.endswith("c_attn.bias") and not tensor.any()  # an export of ours has them where there is no bias
        require(zeros and not config.qkv_bias, f"{source}: unknown tensor {name!r}")
    return ours


def config_from_json(values):
    """Return the GPTConfig of a config.json or hparams.json; ValueError names a field that asks for something else."""
    require(type(values) is dict, "it holds no JSON object")
    for name, allowed in {**FIXED, "n_inner": (None, 4 * (values.get("n_embd") or 0))}.items():
        value = values.get(name, allowed[0])
        require(value in allowed, f"{name} is {value!r}, this model has {allowed[-1]!r}")
    return GPTConfig(values.get("n_vocab", values.get("vocab_size")), values.get("n_positions", values.get("n_ctx")),
                     values.get("n_embd"), values.get("n_head"), values.get("n_layer"), values.get("resid_pdrop", 0.1),
                     qkv_bias=values.get("qkv_bias", True) is True,
                     tie_weights=values.get("tie_word_embeddings", True) is True,
                     exact_gelu=values.get("activation_function") == "gelu")


# OpenAI's TensorFlow checkpoint ---------------------------------------------------------------------------------------
# The index is a table (github.com/google/leveldb/blob/main/doc/table_format.md): its last 48 bytes give the places of
# two blocks, the second of which lists the blocks of (key, value) entries; a key leaves out the start that it shares
# with the one before. The first value is a header, each other one (TensorFlow's tensor_bundle.proto) gives the type,
# shape and place in the data file of the tensor that its key names.


def varint(data, at):
    """Return (number, position after it) of a number stored 7 bits per byte, lowest first: 0xAC 0x02 is 300."""
    number = 0
    for shift in range(0, 64, 7):
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError("a number has more than 64 bits")


def read_block(data, offset, size):
    """Return the (key, value) pairs of one block of a table."""
    block = data[offset : offset + size + 1]  # the last byte is the compression
    require(len(block) == size + 1 > 4 and block[size] == 0, f"the block at {offset} is compressed or does not fit")
    end = size - 4 - 4 * int.from_bytes(block[size - 4 : size], "little")  # restart points follow the entries
    pairs, key, at = [], b"", 0
    while at < end:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared + length
        pairs.append((key, block[at - length : at]))
    require(at == max(end, 0), f"an entry of the block at {offset} runs past its end")
    return pairs


def read_message(message):
    """Return {field: [its values, numbers or bytes]} of a protocol buffer."""
    fields, at = {}, 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        fields.setdefault(tag >> 3, []).append(value)
    require(at == len(message), "a message is cut off")
    return fields


def read_entry(entry, data):
    """Return the float32 tensor that an entry of the index describes, a view of the mapped `data`."""
    fields = read_message(entry)  # BundleEntryProto; a field that is not written is 0
    dtype, shard, offset, size = (fields.get(number, [0])[0] for number in (1, 3, 4, 5))
    dims = read_message(fields.get(2, [b""])[0]).get(2, [])
    shape = [read_message(dim).get(1, [0])[0] for dim in dims]
    require(dtype == 1 and shard == 0 and 7 not in fields, f"type {dtype} (float32 is 1), data file {shard} or slices")
    require(len(shape) <= 8 and 4 * math.prod(shape) == size and offset % 4 == 0 and offset + size <= len(data),
            f"its shape {shape} does not fit the {size} bytes at {offset} of {len(data)}")
    return data[offset : offset + size].view(torch.float32).view(shape)


def read_tf_checkpoint(path):
    """Return ({name: tensor}, hparams) of an OpenAI checkpoint, the tensors mapped from disk, not read into memory.

    `path` is its .index file, or a folder with one of them. Raises ValueError with the file and what is wrong."""
    indexes = sorted(Path(path).glob("*.index")) if Path(path).is_dir() else [Path(path)]
    require(len(indexes) == 1, f"{path}: it must hold one .index file, not {len(indexes)}; name the one to read")
    index, tensors, name, places, pairs = indexes[0], {}, "header", [], []
    file, hparams = index.with_suffix(".data-00000-of-00001"), read_json(index.with_name("hparams.json"))
    weights = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    data = index.read_bytes()
    try:
        require(data[-8:] == bytes.fromhex("57fb808b247547db"), "it is not a table")
        at = len(data) - 48
        for _ in range(4):  # offset and size of the block of extras, which is empty, and of the list of blocks
            number, at = varint(data, at)
            places.append(number)
        for _, handle in read_block(data, *places[2:]):
            offset, at = varint(handle, 0)
            pairs += read_block(data, offset, varint(handle, at)[0])
        fields = read_message(pairs[0][1])  # BundleHeaderProto
        require(fields.get(1) == [1] and fields.get(2, [0]) == [0], "several data files, or big-endian numbers")
        for key, entry in pairs[1:]:
            name = key.decode("utf-8", "replace")
            tensors[name] = read_entry(entry, weights)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{index} cannot be read: {name[:99]!r}: {str(error)[:300]}") from None
    return tensors, hparams


# Loading --------------------------------------------------------------------------------------------------------------


def read_json(path):
    """Return the value in a JSON file; raises ValueError with the path where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def weight_files(path):
    """Return {file: its tensors' names, or None for all} of a file, an index or a folder; ValueError for a pickle."""
    if path.is_dir():
        known = ("model.safetensors", "model.safetensors.index.json", "hparams.json", "*.bin", "*.pt*")
        path = next((file for name in known for file in sorted(path.glob(name))), path)
    if not path.is_file():
        raise FileNotFoundError(f"no GPT-2 weights at {path}; name a folder or file, or one of {', '.join(PUBLISHED)}")
    require(path.suffix not in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
            f"{path} is a pickle, which can run code when it is read; run: python gpt2_weights.py get, or convert it "
            "with transformers' save_pretrained")
    if not path.name.endswith(".index.json"):
        return {path: None}
    value, files = read_json(path), {}
    names = value.get("weight_map") if type(value) is dict else None
    require(type(names) is dict and names and all(os.path.basename(str(name)) == name for name in names.values()),
            f"{path}: its weight_map must give the name of a file beside it for each tensor")
    for name, file in names.items():  # a file may hold others too, which are out of date
        files.setdefault(path.with_name(file), []).append(name)
    return files


def read_gpt2(path, config=None):
    """Return (config, tensors under Hugging Face's names), mapped from disk; `config` is for weights without one."""
    files, tensors = weight_files(path), {}
    first = next(iter(files))
    described = first.with_name("config.json")
    if first.suffix == ".index" or first.name == "hparams.json":
        found, values = read_tf_checkpoint(path if path.suffix == ".index" else described.parent)
        described = described.with_name("hparams.json")
        for name, tensor in found.items():  # model/h3/attn/c_attn/w -> h.3.attn.c_attn.weight
            name = re.sub(r"^h(\d+)/", r"h.\1/", name.removeprefix("model/")).replace("/", ".")
            name = re.sub(r"\.b$", ".bias", re.sub(r"\.[wg]$|(?<=^w[tp]e)$", ".weight", name))
            tensors[name] = tensor.squeeze(0) if tensor.dim() == 3 else tensor  # (1, in, out) there
    else:
        for file, names in files.items():
            found, metadata = read_safetensors(file)
            require("config" not in metadata, f"{file} is a checkpoint of ours; gpt.load_checkpoint reads it")
            for name in found if names is None else names:
                plain = WRAPPERS.sub("", name)
                require(name in found, f"{file}: no tensor {name!r}, which the index places there")
                require(plain not in tensors, f"{file}: a second tensor {plain!r}, as {name!r}")
                tensors[plain] = found[name]
        if config and not described.is_file():
            return config, tensors
        require(described.is_file(), f"{path}: no config.json beside it, which describes the model")
        values = read_json(described)
    try:
        return config_from_json(values), tensors
    except (TypeError, ValueError) as error:
        raise ValueError(f"{described}: {error}") from None


def load_gpt2(source):
    """Return a GPTModel in eval mode with GPT-2's weights, in float32.

    `source`: a published size as "gpt2" (downloaded where $DATA_DIR lacks it), a folder in either format, a file or an
    index. ValueError names file and tensor that do not fit. Example: load_gpt2("gpt2").config.n_layers == 12"""
    name, path = locate_gpt2(source)
    config, tensors = read_gpt2(path, GPT_CONFIGS.get(name))
    if name:
        verify_gpt2(path, name)
        require(config == GPT_CONFIGS[name], f"{path} holds another model than {name}: {config}")
    model = empty_model(config)
    return copy_weights(model, our_tensors(model, tensors, path), path).eval()


def gpt2_root():
    """Return the folder of all GPT-2 weights, $DATA_DIR/gpt2."""
    return Path(os.environ.get("DATA_DIR") or "data") / "gpt2"


def find_gpt2(name):
    """Return the folder with the weights of a published size, or None."""
    files = gpt2_root() / name / "model.safetensors", gpt2_root() / PUBLISHED[name].openai / "hparams.json"
    return next((file.parent for file in files if file.is_file()), None)


def locate_gpt2(source):
    """Return (name, folder) of a published size, downloaded if it is not there; ("", path) of anything else."""
    return (source, find_gpt2(source) or download_gpt2(source)) if source in PUBLISHED else ("", Path(source))


def verify_gpt2(folder, name):
    """Raise ValueError where a file does not have the sha256 that is known here or was noted at its download."""
    wanted = {note.with_suffix(""): note.read_text(encoding="utf-8")[:64] for note in folder.glob("*.sha256")}
    if PUBLISHED[name].sha256:
        wanted[folder / "model.safetensors"] = PUBLISHED[name].sha256
    for path in filter(Path.is_file, wanted):
        found = file_sha256(path)
        require(found == wanted[path], f"{path}: its sha256 is {found}, that of {name} is {wanted[path]}; move the "
                f"file away and run: python gpt2_weights.py get --model {name}")


def download_gpt2(name):
    """Return the folder of a published size, downloaded from Hugging Face, else OpenAI; OSError says what to put where.

    The sha256 of each file is noted beside it."""
    from data import download
    published, problems = PUBLISHED[name], []
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/{published.revision}"
    tensorflow = ("model.ckpt.data-00000-of-00001", "model.ckpt.index", "hparams.json")  # the last marks a whole folder
    for folder, base, files in ((name, url, ["model.safetensors"]),
                                (published.openai, f"{OPENAI}/models/{published.openai}", tensorflow)):
        try:
            for file in files:
                path, sha256 = gpt2_root() / folder / file, published.sha256 if folder == name else ""
                sha256 = download(f"{base}/{file}", path, sha256)
                with replacing(f"{path}.sha256") as note:
                    note.write(f"{sha256}  {file}\n".encode())  # as sha256sum --check reads it
            return gpt2_root() / folder
        except OSError as error:
            if error.errno:  # the disk's fault, not the host's
                raise
            problems.append(str(error))
    raise OSError(f"{'; '.join(problems)}. Fetch {url}/model.safetensors where there is a network and put it at "
                  f"{gpt2_root() / name / 'model.safetensors'}, or name another host as HF_ENDPOINT")


# Export ---------------------------------------------------------------------------------------------------------------


def exported_tensors(model, names, tokenizer):
    """Return {name for others: tensor} of a language model, without a tied head; ValueError for what does not fit."""
    model = getattr(model, "_orig_mod", model)
    tensors, plain = model.state_dict(), empty_model(model.config, device="meta").state_dict()
    same = tensors.keys() == plain.keys() and all(tensors[name].shape == plain[name].shape for name in plain)
    require(same, "only a language model can be exported; merge adapters first (python lora.py merge)")
    if tokenizer is not None:
        require(tokenizer.type in ("bpe", "gpt2"), f"a {tokenizer.type} tokenizer cannot be exported, only byte pairs")
        size, rows = tokenizer.vocab_size, model.config.vocab_size
        require(size == rows, f"the tokenizer has {size} tokens, the model {rows}")
    if model.config.tie_weights:
        del tensors["out_head.weight"]
    if not model.config.qkv_bias:  # GPT-2 has one, so others read zeros
        tensors |= {name.replace("weight", "bias"): tensor.new_zeros(len(tensor))
                    for name, tensor in tensors.items() if name.endswith("qkv.weight")}
    return {renamed(name, names): tensor for name, tensor in tensors.items()}


TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",  # ours, then others'
                   "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")


def token_names(tokenizer):
    """Return the text of every id of a byte-pair tokenizer as GPT-2's files write it, "Ġthe"; all are different."""
    from tokenizer import BYTE_NAMES, BYTES
    names, special = dict(zip(BYTES, BYTE_NAMES)), {i: text for text, i in tokenizer.specials.items()}
    texts = [special.get(i, "".join(map(names.get, token))) for i, token in enumerate(tokenizer.tokens)]
    require(len(set(texts)) == len(texts), "a special token has the text of another token, so it cannot be exported")
    return texts


def merge_lines(tokenizer):
    """Return the merges of a byte-pair tokenizer in the order learned, as lines "Ġ t"."""
    if tokenizer.type == "bpe":
        return tokenizer.merges
    from tiktoken.load import read_file_cached  # in the cache, and checked, since the tokenizer was loaded
    return read_file_cached(f"{OPENAI}/encodings/main/vocab.bpe").decode().split("\n")[1:-1]


def export_tokenizer(tokenizer, folder, context_length, chat_template=None):
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json of a byte-pair tokenizer to `folder`."""
    vocab = {text: i for i, text in enumerate(token_names(tokenizer))}
    merges = merge_lines(tokenizer)
    for name, text in (("vocab.json", json.dumps(vocab)), ("merges.txt", "\n".join(["#version: 0.2", *merges, ""]))):
        with replacing(folder / name) as file:
            file.write(text.encode())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level,
        "decoder": byte_level, "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for text, i in tokenizer.specials.items()],
        "model": {"type": "BPE", "vocab": vocab, "merges": [line.split(" ") for line in merges]}})
    texts = {i: text for text, i in tokenizer.specials.items()}
    eot, pad = texts.get(tokenizer.eot_id), texts.get(tokenizer.pad_id)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": context_length, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "bos_token": eot, "eos_token": eot, "unk_token": eot, "pad_token": pad,
        "chat_template": chat_template})


def export_gpt2(model, folder, tokenizer=None, chat_template=None):
    """Write `model` as Hugging Face stores GPT-2: config, weights and, with a byte-pair `tokenizer`, its files.

    ValueError for a folder with another model's tokenizer, because transformers would load that too."""
    folder, config, tensors, eot_id = Path(folder), model.config, {}, None
    for name, tensor in exported_tensors(model, NAMES, tokenizer).items():
        tensor = tensor.t() if name.endswith(TURNED) else tensor
        tensors[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor
    stale = [name for name in TOKENIZER_FILES[4 * (tokenizer is not None) :] if (folder / name).exists()]
    require(not stale, f"{folder} holds {', '.join(stale)} of another export; move it away or name another folder")
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder, config.context_length, chat_template)
        eot_id = tokenizer.eot_id
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "generation_config.json", {"bos_token_id": eot_id, "eos_token_id": eot_id})
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "float32",
        "vocab_size": config.vocab_size, "n_positions": config.context_length, "n_ctx": config.context_length,
        "n_embd": config.emb_dim, "n_layer": config.n_layers, "n_head": config.n_heads,
        "activation_function": "gelu" if config.exact_gelu else "gelu_new", "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.drop_rate, "embd_pdrop": config.drop_rate, "attn_pdrop": config.drop_rate,
        "bos_token_id": eot_id, "eos_token_id": eot_id, "tie_word_embeddings": config.tie_weights,
        "qkv_bias": config.qkv_bias})  # a field of ours, which others ignore


# Export to GGUF, the one file that llama.cpp and Ollama run -----------------------------------------------------------
# github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts; metadata as (key, type, value); for each
# tensor its name, sizes (a row's first), type and place; then the data, each tensor at a multiple of 32 bytes.

GGUF_NAMES = (("trf_blocks.", "blk."), ("attn.qkv", "attn_qkv"), ("attn.out_proj", "attn_output"),
              (".ln1", ".attn_norm"), (".ln2", ".ffn_norm"), ("ffn.fc1", "ffn_up"), ("ffn.fc2", "ffn_down"),
              ("tok_emb", "token_embd"), ("pos_emb", "position_embd"), ("final_norm", "output_norm"),
              ("out_head", "output"))
GGUF_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}


def gguf_value(value):
    """Return (type, bytes) of a metadata value: text, truth, number, or a list of texts or of numbers."""
    if isinstance(value, str):
        text = value.encode()
        return 8, struct.pack("<Q", len(text)) + text
    if isinstance(value, list):
        items = [gguf_value(item) if isinstance(item, str) else (5, struct.pack("<i", item)) for item in value]
        kind = items[0][0] if items else 8
        return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
    kind, form = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}[type(value)]
    return kind, struct.pack(form, value)


def gguf_metadata(config, tokenizer, file_type):
    """Return {key: value} of all that a file says about model and tokenizer but the chat template."""
    require(tokenizer is not None, "llama.cpp needs a tokenizer in the file, and the model has none")
    tokens, special = token_names(tokenizer), set(tokenizer.specials.values())
    require(tokenizer.eot_id is not None, "the tokenizer has no <|endoftext|>; llama.cpp would end at token 11")
    return {"general.architecture": "gpt2", "general.file_type": file_type, "general.quantization_version": 2,
            "gpt2.context_length": config.context_length, "gpt2.embedding_length": config.emb_dim,
            "gpt2.feed_forward_length": 4 * config.emb_dim, "gpt2.block_count": config.n_layers,
            "gpt2.attention.head_count": config.n_heads, "gpt2.attention.layer_norm_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
            "tokenizer.ggml.merges": list(merge_lines(tokenizer)), "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": tokenizer.eot_id, "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
            "tokenizer.ggml.padding_token_id": tokenizer.pad_id}


def gguf_tensor(name, tensor, dtype):
    """Return (number of its type, the tensor as stored): vectors and positions in f32, whatever `dtype` is.

    q8_0 stores blocks of 32 weights, a float16 scale s and 32 bytes q of s * q; f16 takes rows that do not divide."""
    tensor = tensor.detach().cpu().float()
    if dtype == "f32" or tensor.dim() == 1 or name == "position_embd.weight":
        return 0, tensor.contiguous()
    require(tensor.abs().max() <= 65504, f"{name} has weights too large for {dtype}; export it as f32")
    if dtype == "f16" or tensor.shape[1] % 32:
        return 1, tensor.half().contiguous()
    blocks = tensor.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    whole = (blocks * scale.clamp(min=1e-30).reciprocal()).round().to(torch.int8)
    return 8, torch.cat([scale.half().view(torch.uint8), whole.view(torch.uint8)], 1)


def export_gguf(model, path, tokenizer, dtype="f16", chat_template=None):
    """Write a language model and its byte-pair tokenizer as one GGUF file, matrices in "f32", "f16" or "q8_0".

    llama.cpp computes every GELU in the tanh form, up to 5e-4 from an exact one. ValueError for what it cannot run."""
    require(dtype in GGUF_FILE_TYPES, f"dtype {dtype!r} is none of {', '.join(GGUF_FILE_TYPES)}")
    tensors, end = exported_tensors(model, GGUF_NAMES, tokenizer), 0
    tensors = {name: (tensor.shape, *gguf_tensor(name, tensor, dtype)) for name, tensor in tensors.items()}
    metadata = gguf_metadata(model.config, tokenizer, GGUF_FILE_TYPES[dtype])
    if chat_template:
        metadata["tokenizer.chat_template"] = chat_template
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = gguf_value(value)
        head += gguf_value(key)[1] + struct.pack("<I", kind) + data
    for name, (shape, kind, stored) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += gguf_value(name)[1] + sizes + struct.pack("<IQ", kind, end)
        end += stored.nbytes + -stored.nbytes % 32
    with replacing(path) as file:
        file.write(head + bytes(-len(head) % 32))
        for *_, stored in tensors.values():
            file.write(tensor_bytes(stored))
            file.write(bytes(-stored.nbytes % 32))


# Commands -------------------------------------------------------------------------------------------------------------


def tokenizer_of(folder, vocab_size):
    """Return the byte-pair tokenizer whose files are in `folder`, else GPT-2's if it fits, or None after a note why."""
    from tokenizer import BPETokenizer, load_tokenizer
    whole, vocab, config = (folder / f"{name}.json" for name in ("tokenizer", "vocab", "tokenizer_config"))
    try:
        options = read_json(config) if config.is_file() else {}
        for name in ("add_prefix_space", "add_bos_token", "add_eos_token")[: 1 if whole.is_file() else 3]:
            require(not options.get(name), f"{config}: {name} is set, so it gives other ids than any tokenizer here")
        if whole.is_file():
            tokenizer = load_tokenizer(whole)
        elif vocab.is_file():
            require(not (folder / "added_tokens.json").is_file(), f"added_tokens.json holds tokens that {vocab} lacks")
            tokenizer = BPETokenizer.from_gpt2_files(vocab, folder / "merges.txt")
        else:
            require(vocab_size == GPTConfig.vocab_size, f"{folder} holds no tokenizer.json or vocab.json")
            tokenizer = load_tokenizer("gpt2")
        size = tokenizer.vocab_size
        require(size <= vocab_size, f"{folder}: its tokenizer has {size} tokens, the model {vocab_size} rows")
        return tokenizer
    except (OSError, ValueError) as error:
        print(f"note: imported without a tokenizer: {error}", file=sys.stderr)
        return None


@torch.no_grad()
def window_loss(model, ids, length=256):
    """Return the mean loss, nats per token, over windows of `length` tokens laid end to end, as the book's loaders."""
    losses = []
    for start in range(0, len(ids) - length, length):  # a rest is left out
        window = torch.tensor([ids[start : start + length + 1]])
        losses.append(-token_logprobs(model(window), window).mean().item())
    return sum(losses) / len(losses)


def get_command(args):
    """Download the weights of a published size, unless they are there."""
    _, folder = locate_gpt2(args.model)
    verify_gpt2(folder, args.model)
    print(f"{args.model} is in {folder}; next: python gpt2_weights.py check --model {args.model}")


def import_command(args):
    """Write GPT-2's weights, from a name, folder or file, as a checkpoint of ours."""
    from data import TEMPLATES, chat_template
    path = locate_gpt2(args.source)[1]
    if Path(args.out).exists():
        raise argparse.ArgumentError(None, f"--out {args.out} exists; give another --out")
    model = load_gpt2(args.source)
    rows = model.config.vocab_size
    tokenizer = tokenizer_of(path if path.is_dir() else path.parent, rows)
    if tokenizer and tokenizer.vocab_size < rows:  # padded, as some pad GPT-2's 50,257 to 50,304 for speed
        print(f"note: {rows} rows cropped to the tokenizer's {tokenizer.vocab_size} tokens", file=sys.stderr)
        model.config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size)
        for layer in (model.tok_emb, model.out_head):
            layer.weight = torch.nn.Parameter(layer.weight[: tokenizer.vocab_size].detach())
    noted = Path(path, "tokenizer_config.json")
    theirs = read_json(noted).get("chat_template") if tokenizer and noted.is_file() else None
    template = {"template": name for name in TEMPLATES if chat_template(name) == theirs}  # of an export of ours
    save_checkpoint(args.out, model, tokenizer, source=args.source, **template)
    print(f"{args.out}: {model.config}")


def export_command(args):
    """Write a checkpoint of ours, or a published size, as transformers' folder or llama.cpp's file."""
    from data import chat_template
    gguf, there = args.format == "gguf", Path(args.out, "model.safetensors")
    if gguf != args.out.endswith(".gguf") or args.dtype and not gguf:
        raise argparse.ArgumentError(None, "--format gguf, an --out that ends in .gguf and --dtype belong together")
    exported = there.with_name("config.json").exists() and there.resolve() != Path(args.source).resolve()
    if os.path.isfile(args.out) or there.exists() and not exported:
        raise argparse.ArgumentError(None, f"--out {args.out} exists; give another --out")
    model, tokenizer, info = load_checkpoint(args.source)
    template = chat_template(info["template"]) if "template" in info else None
    if gguf:
        export_gguf(model, args.out, tokenizer, args.dtype or "f16", template)
        gelu = "; llama.cpp takes GELU's tanh form for the exact one" if model.config.exact_gelu else ""
        print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB{gelu}")
        return
    if tokenizer is not None and tokenizer.type not in ("bpe", "gpt2"):
        print(f"note: its {tokenizer.type} tokenizer is left out, GPT-2 knows only byte pairs", file=sys.stderr)
        tokenizer = None
    export_gpt2(model, args.out, tokenizer, template)
    zeros = "" if model.config.qkv_bias else "; the model has no query/key/value bias, zeros are written"
    print(f"{args.out}: {', '.join(sorted(os.listdir(args.out)))}{zeros}")


def check_command(args):
    """Load a published size and compare its losses on the-verdict with the published ones."""
    from tokenizer import load_tokenizer
    verdict, losses, status = gpt2_root().parent / "the-verdict.txt", PUBLISHED[args.model].losses, 0
    if not find_gpt2(args.model) or not verdict.is_file():
        raise FileNotFoundError(f"could not check, {verdict.parent} lacks a file; run: python gpt2_weights.py get "
                                f"--model {args.model} and python data.py get verdict")
    model, tokenizer, text = load_gpt2(args.model), load_tokenizer("gpt2"), verdict.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    targets = losses or PUBLISHED["gpt2"].losses
    for part, words, target in zip(("train", "validation"), (text[:cut], text[cut:]), targets):
        loss = window_loss(model, tokenizer.encode(words))
        passed = abs(loss - target) < 1e-3 if losses else loss < target  # a larger model must be better than gpt2
        print(f"{'pass' if passed else 'FAIL'}  loss on the-verdict, {part} part: {loss:.4f}, published: "
              f"{'' if losses else 'below '}{target}")
        status = status if passed else 1
    return status


def main(argv=None):
    """Run the command line and return its exit status."""
    size = dict(default="gpt2", choices=list(PUBLISHED), help="a published size")
    return run(__doc__, {
        "get": (get_command, {"--model": size}), "check": (check_command, {"--model": size}),
        "import": (import_command, {
            "--source": dict(default="gpt2", help="a published size, a folder, a safetensors file or an index"),
            "--out": dict(default="out/gpt2/model.safetensors", help="where to write")}),
        "export": (export_command, {
            "--source": dict(default="out/pretrain/model.safetensors", help="a checkpoint of ours or a published size"),
            "--out": dict(default="out/hf", help="folder to write, or with --format gguf the file"),
            "--format": dict(default="hf", choices=("hf", "gguf"), help="a folder for transformers, or one GGUF file"),
            "--dtype": dict(choices=list(GGUF_FILE_TYPES), help="of a GGUF file's matrices (f16)")})}, argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
