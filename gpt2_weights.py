"""GPT-2's published weights into our model, and our models out to where other tools load them.

    python gpt2_weights.py get --model gpt2         download 548 MB once, check them, print where they lie
    python gpt2_weights.py check --model gpt2       load and compare with published figures: under 1 min
    python gpt2_weights.py import --source gpt2 --context_length 256       as a checkpoint of ours
    python gpt2_weights.py export --source out/pretrain/model.safetensors --out out/hf     for transformers

The sizes are gpt2 (124M parameters), gpt2-medium (355M), gpt2-large (774M) and gpt2-xl (1558M). As a library:

    model = load_gpt2("gpt2-medium")                     a name (downloaded when it is not there), a folder or a file
    export_gpt2(model, "out/hf", tokenizer)              AutoModelForCausalLM.from_pretrained("out/hf") reads it

Two formats are read, both by hand: Hugging Face's (model.safetensors, config.json) and OpenAI's own TensorFlow
checkpoint (hparams.json, model.ckpt.index, model.ckpt.data-00000-of-00001). Pickles are refused. Tensors are mapped
from disk and copied once, so that loading needs the memory of the model and little more.

Reads $DATA_DIR/gpt2/gpt2/model.safetensors, or OpenAI's files in $DATA_DIR/gpt2/124M/ (355M, 774M, 1558M); DATA_DIR is
data/ unless set. Writes them there when it downloads: from huggingface.co at a pinned revision (HF_ENDPOINT or
--mirror name another host), else from OpenAI. A file is checked against the sha256 known here or the one that the host
names, at the download and at every load by name; OpenAI's checkpoint carries a CRC-32C of every tensor, and all are
checked. To use it elsewhere copy gpt.py too; commands that meet text need tokenizer.py.

Differs from the originals: the attention's weights are kept the way PyTorch multiplies them (out x in; GPT-2 stores in
x out), the causal masks that some files hold are left out, and a vocabulary that was padded to 50,304 is cropped back
to 50,257. Sources: Radford et al. 2019 and github.com/openai/gpt-2; the table format is LevelDB's,
github.com/google/leveldb/blob/main/doc/table_format.md, and the messages in it are tensor_bundle.proto of TensorFlow.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import glob
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.parse
import uuid
import warnings
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # we never use it, so its absence is no news

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import (GPT_CONFIGS, GPTConfig, copy_weights, empty_model, file_sha256, generate, load_checkpoint, meta_model,
                 read_safetensors, replacing, save_checkpoint, token_logprobs, write_safetensors)


class Published(NamedTuple):
    """Where a size of GPT-2 comes from, and what it must then compute."""

    openai: str  # its folder in OpenAI's storage
    revision: str  # of huggingface.co/openai-community/<name>
    size: int = 0  # of model.safetensors in bytes, 0 where the host is asked
    sha256: str = ""  # of the same; "" where the host is asked
    losses: tuple = ()  # on the-verdict, train and validation part: Raschka, LLMs-from-scratch, ch05, and its solutions
    greedy: tuple = ()  # prompt, number of tokens, text that their greedy continuation holds: ibid., ch06 and ch07


PUBLISHED = {
    "gpt2": Published(
        "124M", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", (3.7547, 3.5596),
        ("Every effort moves you", 15, " forward.\n\nThe first step is to understand the importance of your work")),
    "gpt2-medium": Published(
        "355M", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        greedy=("Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nConvert the active sentence to passive: 'The chef cooks the meal every "
                "day.'", 35, "The chef cooks the meal every day.")),
    "gpt2-large": Published("774M", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": Published(
        "1558M", "15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a", losses=(3.3046, 3.1195)),
}
HUGGING_FACE = "https://huggingface.co"
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"
PADDED_VOCABULARY = 50304  # 50,257 rounded up to a multiple of 128, as some train GPT-2 for speed
VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # encoder.json, as tiktoken pins it
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # vocab.bpe

# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes

NAMES = (("trf_blocks.", "h."), ("attn.qkv", "attn.c_attn"), ("attn.out_proj", "attn.c_proj"), ("ffn.fc1", "mlp.c_fc"),
         ("ffn.fc2", "mlp.c_proj"), (".ln1", ".ln_1"), (".ln2", ".ln_2"), ("tok_emb", "wte"), ("pos_emb", "wpe"),
         ("final_norm", "ln_f"), ("out_head", "lm_head"))
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored in x out, because GPT-2 multiplies x @ W
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that files of old transformers versions hold
# What a config.json must say, first the value that its absence means; anything else would compute something else.
FIXED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
         "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)}


def gpt2_name(name):
    """Return Hugging Face's name for one of our tensors: trf_blocks.3.attn.qkv.bias -> h.3.attn.c_attn.bias."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def from_openai_name(name):
    """Return Hugging Face's name for a tensor of OpenAI's: model/h3/attn/c_attn/w -> h.3.attn.c_attn.weight."""
    name = re.sub(r"^h(\d+)/", r"h.\1/", name.removeprefix("model/")).replace("/", ".")
    if name in ("wte", "wpe"):
        return name + ".weight"
    return re.sub(r"\.[wg]$", ".weight", re.sub(r"\.b$", ".bias", name))


def our_tensors(model, tensors, source):
    """Return {our name: tensor} for `copy_weights` from tensors under Hugging Face's names; nothing is copied here.

    Matrices are turned, masks left out, rows of a padded vocabulary cropped. Raises ValueError with `source` and the
    tensor that is missing, unknown or of a wrong shape."""
    config, wanted = model.config, model.state_dict()
    left = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if not name.endswith(MASKS)}
    if config.tie_weights:
        wanted.pop("out_head.weight")
        left.pop("lm_head.weight", None)  # the same matrix once more
    ours = {}
    for name, target in wanted.items():
        theirs = gpt2_name(name)
        if theirs not in left:
            raise ValueError(f"{source}: no tensor {theirs!r}")
        tensor, turned = left.pop(theirs), theirs.endswith(TURNED)
        if theirs in ("wte.weight", "lm_head.weight") and tensor.dim() == 2:
            tensor = tensor[: config.vocab_size]
        shape = target.shape[::-1] if turned else target.shape
        if tensor.shape != shape:
            raise ValueError(f"{source}: tensor {theirs!r} has the shape {tuple(tensor.shape)}, the config wants "
                             f"{tuple(shape)}" + (" (in x out)" if turned else ""))
        ours[name] = tensor.t() if turned else tensor
    if not config.qkv_bias:  # an export of ours, which had to write zeros
        left = {name: tensor for name, tensor in left.items() if not name.endswith("c_attn.bias") or tensor.any()}
    if left:
        raise ValueError(f"{source}: unknown tensor {min(left)!r}")
    return ours


def config_from_json(values):
    """Return the GPTConfig that a config.json (or, with n_vocab, OpenAI's hparams.json) describes.

    Raises ValueError with the field that is missing or asks for something that this model does not compute."""
    if type(values) is not dict:
        raise ValueError("it holds no JSON object")
    for name, allowed in {**FIXED, "n_inner": (None, 4 * (values.get("n_embd") or 0))}.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {values[name]!r}, this model has {allowed[-1]!r}")
    found = {"vocab_size": values.get("n_vocab", values.get("vocab_size")), "emb_dim": values.get("n_embd"),
             "context_length": values.get("n_positions", values.get("n_ctx")), "n_heads": values.get("n_head"),
             "n_layers": values.get("n_layer"), "drop_rate": values.get("resid_pdrop", 0.1)}
    if found["vocab_size"] == PADDED_VOCABULARY:
        found["vocab_size"] = GPTConfig.vocab_size
    return GPTConfig(**found, qkv_bias=values.get("qkv_bias", True) is True,
                     tie_weights=values.get("tie_word_embeddings", True) is True,
                     exact_gelu=values.get("activation_function") == "gelu")


def config_from_shapes(tensors):
    """Return the GPTConfig of a file without a config.json, which only OpenAI's four widths can do without."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"no matrix {name!r}, so this is not GPT-2")
    (rows, width), context_length = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
    heads = {config.emb_dim: config.n_heads for name, config in GPT_CONFIGS.items() if name in PUBLISHED}
    if width not in heads:
        raise ValueError(f"a model of width {width} needs its config.json beside it, which gives the number of heads")
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    head = tensors.get("lm_head.weight")
    return GPTConfig(GPTConfig.vocab_size if rows == PADDED_VOCABULARY else rows, context_length, width, heads[width],
                     max(1, len(layers)), qkv_bias=True,
                     tie_weights=head is None or torch.equal(head, tensors["wte.weight"]))


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's TensorFlow checkpoint
#
# The index is a sorted table in LevelDB's format. Its last 48 bytes say where two blocks lie; the second lists the
# blocks of the entries. A block is a run of (key, value), each key without the start that it shares with the one
# before, and behind it stand one byte for the compression and a CRC. The first value is a header, each other one says
# of a tensor (its key is the name) its type, its shape and its place in the data file. Both are protocol buffers.

TABLE_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
TF_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}  # TensorFlow's types.proto
MAX_INDEX = 1 << 26  # bytes; GPT-2 XL's has 24,000
CRC_LANES, CRC_CHUNK = 1 << 14, 1 << 23  # registers side by side, and bytes at a time


def advance(zeros, crc):
    """Return the CRC registers (n,) after the zeros that the matrix `zeros` (32, 32) stands for.

    A register moves by exclusive or and shifts alone, so its 32 bits move linearly: a product modulo 2."""
    places = torch.arange(32)
    bits = (crc.long()[:, None] >> places & 1).float() @ zeros % 2
    return (bits.long() << places).sum(1).to(torch.int32)


@functools.lru_cache(maxsize=None)
def crc_tables():
    """Return (zeros, low, high): the matrices for 1, 2, 4, ... zero bytes, and for four bytes as two tables of 65,536,
    which say where the lower and the upper half of a register end."""
    zeros = torch.eye(32).roll(1, 0)  # one zero bit: every bit moves down by one place ...
    zeros[0] = 0x82F63B78 >> torch.arange(32) & 1  # ... and the lowest, on leaving, adds Castagnoli's polynomial
    powers = [zeros]
    while len(powers) < 43:
        powers.append(powers[-1] @ powers[-1] % 2)
    tables = []
    for half in advance(powers[5], (1 << torch.arange(32)).to(torch.int32)).split(16):
        table = torch.zeros(1, dtype=torch.int32)
        for end in half:  # of a single bit
            table = torch.cat([table, table ^ end])
        tables.append(table)
    return powers[3:], *tables


def skip_zeros(crc, count):
    """Return the CRC registers after `count` zero bytes."""
    for power, zeros in enumerate(crc_tables()[0]):
        if count >> power & 1:
            crc = advance(zeros, crc)
    return crc


def crc32c(data):
    """Return the CRC-32C (RFC 3720, appendix B.4) of a tensor of bytes: of b"123456789" it is 0xE3069283.

    The bytes are dealt to thousands of registers that run side by side, and the registers are joined pair by pair:
    some 300 MB a second on one core, where a loop over the bytes reaches 5."""
    _, low, high = crc_tables()
    total = torch.tensor([-1], dtype=torch.int32)
    for chunk in data.split(CRC_CHUNK):
        lanes = min(CRC_LANES, 1 << (len(chunk) // 256).bit_length())
        whole = F.pad(chunk, (-len(chunk) % (4 * lanes), 0))  # zeros in front leave a register of 0 as it is
        words = whole.view(torch.int32).view(lanes, -1)
        crc = torch.zeros(lanes, dtype=torch.int32)
        for column in words.t().contiguous():
            crc = crc ^ column
            crc = low.index_select(0, crc & 0xFFFF) ^ high.index_select(0, crc >> 16 & 0xFFFF)
        length = 4 * words.shape[1]
        while len(crc) > 1:
            crc = skip_zeros(crc[0::2], length) ^ crc[1::2]
            length *= 2
        total = skip_zeros(total, len(chunk)) ^ crc
    return ~int(total) & 0xFFFFFFFF


def masked_crc(data):
    """Return the CRC of a tensor of bytes as LevelDB stores it: turned by 15 bits and moved."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data, at):
    """Return (number, position behind it) of a number stored 7 bits a byte, lowest first: 0xAC 0x02 is 300."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number is cut off")
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError("a number has more than 64 bits")


def read_block(data, offset, size):
    """Return the (key, value) pairs of one block of a table after checking its CRC."""
    if offset + size + 5 > len(data) or size < 4:
        raise ValueError(f"a block of {size} bytes at {offset} does not fit into {len(data)} bytes")
    covered, stored = data[offset : offset + size + 1], data[offset + size + 1 : offset + size + 5]
    if masked_crc(torch.frombuffer(covered, dtype=torch.uint8)) != int.from_bytes(stored, "little"):
        raise ValueError(f"the block at {offset} is damaged, its CRC differs")
    if covered[-1] != 0:
        raise ValueError(f"the block at {offset} is compressed (type {covered[-1]}), which OpenAI's files are not")
    end = size - 4 - 4 * int.from_bytes(covered[size - 4 : size], "little")  # behind the entries stand restart points
    pairs, key, at = [], b"", 0
    while at < end:
        shared, at = varint(covered, at)
        unshared, at = varint(covered, at)
        length, at = varint(covered, at)
        if shared > len(key) or at + unshared + length > end:
            raise ValueError(f"an entry of the block at {offset} runs past its end")
        key = key[:shared] + bytes(covered[at : at + unshared])
        pairs.append((key, bytes(covered[at + unshared : at + unshared + length])))
        at += unshared + length
    return pairs


def read_table(path):
    """Return all (key, value) pairs of a LevelDB table."""
    if os.path.getsize(path) > MAX_INDEX:
        raise ValueError("too large for an index")
    data = bytearray(Path(path).read_bytes())
    if len(data) < 48 or data[-8:] != TABLE_MAGIC:
        raise ValueError("not an index of a checkpoint: the table's footer is missing")
    places, at = [], 0
    for _ in range(4):  # offset and size of the block of extras (empty), then of the list of blocks
        number, at = varint(data[-48:-8], at)
        places.append(number)
    if any(data[at - 48 : -8]):
        raise ValueError("the footer is damaged")
    read_block(data, *places[:2])
    pairs = []
    for _, handle in read_block(data, *places[2:]):
        offset, at = varint(handle, 0)
        pairs += read_block(data, offset, varint(handle, at)[0])
    if [key for key, _ in pairs] != sorted({key for key, _ in pairs}):
        raise ValueError("its keys are not in order")
    return pairs


def read_message(message):
    """Return ({field: number}, [(field, bytes)]) of a protocol buffer."""
    numbers, texts, at = {}, [], 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            numbers[tag >> 3], at = varint(message, at)
            continue
        if tag & 7 == 2:
            size, at = varint(message, at)
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
        else:
            raise ValueError(f"a message has a field of the unknown kind {tag & 7}")
        if at + size > len(message):
            raise ValueError("a message is cut off")
        texts.append((tag >> 3, message[at : at + size]))
        at += size
    return numbers, texts


def map_file(path):
    """Return the bytes of a file as mapped private memory; its slices are views."""
    with open(path, "rb") as file:  # raises OSError, where from_file would raise RuntimeError
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ValueError(f"{path} is empty")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).untyped_storage()


def read_entry(entry, data):
    """Return the tensor that an entry of the index describes, a view of the mapped data file, its CRC checked."""
    numbers, texts = read_message(entry)  # BundleEntryProto
    dtype = TF_DTYPES.get(numbers.get(1))
    if dtype is None:
        raise ValueError(f"has the type {numbers.get(1)} of TensorFlow, which holds no weights")
    fields = [number for number, _ in texts]
    if 7 in fields:
        raise ValueError("is stored in slices, which OpenAI's files are not")
    shape = [read_message(dim)[0].get(1, 0) for field, text in texts if field == 2
             for number, dim in read_message(text)[1] if number == 2]
    shard, offset, size = (numbers.get(field, 0) for field in (3, 4, 5))
    if shard != 0:
        raise ValueError(f"lies in data file {shard}, but there is only file 0")
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != size or offset + size > data.nbytes():
        raise ValueError(f"of shape {shape} does not fit the {size} bytes at {offset} of {data.nbytes()}")
    piece = torch.asarray(data[offset : offset + size], dtype=torch.uint8)
    if masked_crc(piece) != int.from_bytes(dict(texts).get(6, b""), "little"):
        raise ValueError("is damaged, its CRC differs")
    return piece.view(dtype).view(shape)


def read_tf_checkpoint(directory):
    """Return ({name: tensor}, hparams) of an OpenAI checkpoint, the tensors mapped from disk, not read into memory.

    The CRC of every block and every tensor is checked. Raises ValueError with the path and what is wrong."""
    directory = Path(directory)
    indexes = sorted(directory.glob("*.index"))
    if len(indexes) != 1:
        raise ValueError(f"{directory}: it must hold one .index file, not {len(indexes)}")
    hparams = read_json(directory / "hparams.json")
    tensors, name = {}, None
    try:
        (first, header), *entries = read_table(indexes[0]) or [(None, b"")]
        numbers, _ = read_message(header)  # BundleHeaderProto
        if first != b"" or numbers.get(1) != 1 or numbers.get(2, 0) != 0:
            raise ValueError("it has no header, several data files, or big-endian numbers")
        data = map_file(str(indexes[0]).removesuffix("index") + "data-00000-of-00001")
        for key, entry in entries:
            name = key.decode("utf-8", "replace")
            tensors[name] = read_entry(entry, data)
    except ValueError as error:
        where = "" if name is None else f"tensor {name!r} "
        raise ValueError(f"{indexes[0]}: {where}{str(error)[:500]}") from None
    return tensors, hparams


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def read_json(path):
    """Return the value in a JSON file; raises ValueError with the path where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def refuse_pickle(path):
    """Raise ValueError: reading a pickle can run any code that its maker put in."""
    raise ValueError(f"{path} is a pickle, which can run code when it is read, so it is refused; use model.safetensors "
                     "(python gpt2_weights.py get), or convert it where you trust it, with transformers: "
                     f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}).save_pretrained('new')")


def weight_files(path):
    """Return the safetensors files that a folder (or the file itself) stands for; raises ValueError where none does."""
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"):
            refuse_pickle(path)
        return [path]
    whole, pickles = path / "model.safetensors", sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*"))
    files = [whole] if whole.is_file() else sorted(path.glob("model-*-of-*.safetensors"))
    if not files and pickles:
        refuse_pickle(pickles[0])
    if not files:
        raise FileNotFoundError(f"no GPT-2 weights at {path}: neither model.safetensors nor OpenAI's hparams.json and "
                                f"model.ckpt.index; names that are known: {', '.join(PUBLISHED)}")
    return files


def config_from(path, function, values):
    """Return the GPTConfig that `function` finds in `values`; raises ValueError that names `path`."""
    try:
        return function(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_gpt2(path):
    """Return (config, tensors under Hugging Face's names) of GPT-2 weights in either format, mapped from disk."""
    path = path.parent if path.suffix == ".index" else path
    if (path / "hparams.json").is_file() and not (path / "model.safetensors").is_file():
        found, values = read_tf_checkpoint(path)
        tensors = {from_openai_name(name): tensor.squeeze(0) if tensor.dim() == 3 else tensor  # (1, in, out) there
                   for name, tensor in found.items()}
        return config_from(path / "hparams.json", config_from_json, values), tensors
    tensors = {}
    for file in weight_files(path):
        found, metadata = read_safetensors(file)
        if "config" in metadata:
            raise ValueError(f"{file} is a checkpoint of ours; gpt.load_checkpoint reads it")
        tensors.update(found)
    described = (path if path.is_dir() else path.parent) / "config.json"
    if described.is_file():
        return config_from(described, config_from_json, read_json(described)), tensors
    return config_from(path, config_from_shapes, tensors), tensors


def crop_context(model, context_length):
    """Let `model` see `context_length` tokens at most by dropping the position embeddings beyond."""
    if not 1 <= context_length <= model.config.context_length:
        raise ValueError(f"context_length must lie between 1 and the weights' {model.config.context_length}, not "
                         f"{context_length}")
    model.config = dataclasses.replace(model.config, context_length=context_length)
    model.pos_emb = nn.Embedding.from_pretrained(model.pos_emb.weight[:context_length].detach().clone(), freeze=False)


def load_gpt2(source, context_length=None):
    """Return a GPTModel in eval mode with GPT-2's weights, in float32.

    `source` is "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (downloaded when $DATA_DIR lacks it), a folder in
    Hugging Face's or OpenAI's format, or a safetensors file. `context_length` crops what the model can see. Raises
    ValueError with the file and the tensor that does not fit, OSError where there is none.

    Example: load_gpt2("gpt2", context_length=256).config.context_length == 256"""
    name, path = locate_gpt2(source)
    if name:
        verify_gpt2(path, name)
    config, tensors = read_gpt2(path)
    if name and config != GPT_CONFIGS[name]:
        raise ValueError(f"{path} holds another model than {name}: {config}")
    model = empty_model(config)
    copy_weights(model, our_tensors(model, tensors, path), path)
    if context_length is not None:
        crop_context(model, context_length)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Download

TIMEOUT = (3.05, 20)  # seconds to connect, and without a single byte
PAUSES = (1, 2, 4, 8)  # seconds before another try; they start again after a mebibyte of progress
SLOWEST, WINDOW = 1000, 30  # bytes a second on average over a window of so many seconds
LARGEST = 10**10  # bytes, where the host names no length


class TryAgain(OSError):
    """A download that failed in a way that may pass."""


def take_over(path, part):
    """Return the ETag of what an earlier run left of `path`, which is named `part` from now on, or None.

    Renaming decides between two processes: only one of them finds the old name."""
    for old in path.parent.glob(glob.escape(f".{path.name}.") + "*"):
        with contextlib.suppress(OSError):
            if old.suffix == ".part":
                os.rename(old, part)
                return urllib.parse.unquote(old.name[len(path.name) + 2 : -len(".part")])
            if old.suffix == ".tmp" and time.time() - old.stat().st_mtime > 86400:
                old.unlink()  # a process was killed
    return None


def leave(path, part, etag):
    """Keep the unfinished `part` for a later run under its ETag, or remove it where there is none."""
    if not part.exists():
        return
    if etag and part.stat().st_size:
        os.replace(part, path.with_name(f".{path.name}.{urllib.parse.quote(etag, safe='')}.part"))
    else:
        part.unlink()


def progress(name, size, total, started, last):
    """Return the time of the last line after reporting on stderr: twice a second on a terminal, else twice a minute."""
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if now - last < (0.5 if terminal else 30) and not (terminal and size == total):
        return last
    rate = size / max(now - started, 1e-3)
    text = f"{name}: {size / 1e6:,.0f}{f' of {total / 1e6:,.0f}' * (total > 0)} MB, {rate / 1e6:.1f} MB/s"
    print("\r" * terminal + text, end=" \n" if size == total or not terminal else " ", file=sys.stderr, flush=True)
    return now


def copy_body(reply, file, have, total, name):
    """Write the body of `reply` behind the `have` bytes of `file`; `name` is for the progress.

    Raises TryAgain where it is cut, OSError where it comes too slowly, ValueError where it is too long."""
    from requests.packages.urllib3.exceptions import HTTPError

    size, started = have, time.monotonic()
    window, before, last = started, size, started
    while True:
        try:  # read1 returns what has arrived; read would wait for a full block, and a drip could go on for days
            block = getattr(reply.raw, "read1", reply.raw.read)(1 << 16)
        except (HTTPError, OSError) as error:
            raise TryAgain(f"cut off after {size:,} of {total:,} bytes ({type(error).__name__})") from None
        size += len(block)
        if size > (total or LARGEST):
            raise ValueError(f"it is longer than {total or LARGEST:,} bytes")
        if not block:
            break
        file.write(block)
        last = progress(name, size - have, total - have, started, last)
        if time.monotonic() - window > WINDOW:
            if size - before < SLOWEST * WINDOW:
                raise OSError(f"too slow: {size - before} bytes in {WINDOW} seconds, given up after {size:,} bytes")
            window, before = time.monotonic(), size
    if size < total:
        raise TryAgain(f"cut off after {size:,} of {total:,} bytes")


def start_over(part, facts, reason):
    """Raise TryAgain after forgetting what was downloaded so far: it is no part of what the host has now."""
    part.unlink(missing_ok=True)
    facts["etag"] = None
    raise TryAgain(reason)


def receive(url, part, facts):
    """Complete `part` by one request; `facts` (see `download`) learn from the reply."""
    import requests

    have = part.stat().st_size if part.exists() and facts["etag"] else 0
    headers = {"Accept-Encoding": "identity"}  # the bytes as they are: packed ones could grow to fill the disk
    if have:
        headers.update({"Range": f"bytes={have}-", "If-Range": facts["etag"]})
    try:
        reply = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.ConnectionError, requests.Timeout) as error:
        reason = getattr(error.args[0] if error.args else error, "reason", error)
        raise (TryAgain if have else OSError)(f"no connection ({type(reason).__name__})") from None
    except requests.RequestException as error:  # a redirect that leads nowhere; some of these are ValueErrors too
        raise OSError(str(error)) from None
    with reply:
        status, etag = reply.status_code, reply.headers.get("ETag", "")
        if status in (408, 429) or status >= 500:
            raise TryAgain(f"HTTP status {status}")
        goes_on = have and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 416 or status == 206 and not (goes_on and etag in ("", facts["etag"])):
            start_over(part, facts, f"HTTP status {status}, which does not continue what is here")
        if status not in (200, 206):
            raise OSError(f"HTTP status {status}")
        have = have if status == 206 else 0
        if not have:  # a weak ETag (RFC 9110, 8.8.1) does not promise the same bytes
            facts["etag"] = None if etag.startswith("W/") else etag
        total, free = learn_size(reply, have, facts), shutil.disk_usage(part.parent).free
        if free < total - have:
            raise OSError(errno.ENOSPC, f"{total - have:,} bytes are needed, {free:,} are free", str(part.parent))
        with open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            copy_body(reply, file, have, total, facts["name"])
            file.flush()
            os.fsync(file.fileno())


def learn_size(reply, have, facts):
    """Return how many bytes the file has in all (0: unknown), and keep in `facts` the sha256 that the host names.

    Raises ValueError where the size is wrong, or where there is nothing to check the file by."""
    length, total = reply.headers.get("Content-Length", ""), 0
    for answer in (*reply.history, reply):  # huggingface.co names both where it sends us on to its storage
        linked, size = (answer.headers.get(f"X-Linked-{what}", "").strip('"') for what in ("Etag", "Size"))
        facts["linked"] = linked if re.fullmatch("[0-9a-f]{64}", linked) else facts["linked"]
        total = int(size) if size.isdecimal() else total
    total = have + int(length) if length.isdecimal() else total
    if facts["size"] and total not in (0, facts["size"]):
        raise ValueError(f"it has {total:,} bytes, expected {facts['size']:,}")
    if facts["sha256"] == "" and not facts["linked"]:
        raise ValueError("the host names no sha256 (X-Linked-Etag) to check it by")
    return facts["size"] or total


def download(url, path, size=0, sha256=None):
    """Return the sha256 of `path` after fetching it from `url`, whole and checked; until then the name stays free.

    `sha256` is what the file must have; "" takes the host's word (X-Linked-Etag) and None goes without. A transfer that
    is cut is continued, in a later run too, unless the file has changed (If-Range, RFC 9110, 13.1.5). Raises OSError
    where it cannot be had, ValueError where it is not what it should be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # nobody else writes to it
    facts = {"name": path.name, "size": size, "sha256": sha256, "linked": "", "etag": take_over(path, part)}
    failures, before = 0, part.stat().st_size if part.exists() else 0
    try:
        while True:
            try:
                receive(url, part, facts)
                break
            except TryAgain as error:
                now = part.stat().st_size if part.exists() else 0
                failures, before = 1 if now - before > 1 << 20 else failures + 1, now
                if failures > len(PAUSES):
                    raise OSError(str(error)) from None
                print(f"{path.name}: {error}; trying again in {PAUSES[failures - 1]} s", file=sys.stderr)
                time.sleep(PAUSES[failures - 1])
        found, wanted = file_sha256(part), facts["linked"] if sha256 == "" else sha256
        if wanted is not None and found != wanted:
            raise ValueError(f"its sha256 is {found}, expected {wanted}")
        os.replace(part, path)
        return found
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno:  # wrong, or the disk's fault: nothing to be continued
            facts["etag"] = None
        if getattr(error, "errno", None):
            raise
        raise (ValueError if isinstance(error, ValueError) else OSError)(f"{url}: {error}") from None
    finally:
        leave(path, part, facts["etag"])


def gpt2_root():
    """Return the folder of all GPT-2 weights, $DATA_DIR/gpt2."""
    return Path(os.environ.get("DATA_DIR") or "data") / "gpt2"


def find_gpt2(name):
    """Return the folder in which the weights of a published size lie, or None."""
    folders = [gpt2_root() / name, gpt2_root() / PUBLISHED[name].openai]
    files = ("model.safetensors", "hparams.json")
    return next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)


def locate_gpt2(source):
    """Return (name, path) of a published size, downloaded if it is not there; ("", path) of anything else."""
    name = "gpt2" if source == "gpt2-small" else source
    if name not in PUBLISHED:
        return "", Path(source)
    return name, find_gpt2(name) or download_gpt2(name)


def verify_gpt2(folder, name):
    """Raise ValueError where model.safetensors has not the sha256 known here or noted at its download."""
    path, noted = folder / "model.safetensors", folder / "model.safetensors.sha256"
    wanted = PUBLISHED[name].sha256 or (noted.read_text(encoding="utf-8").split()[0] if noted.is_file() else "")
    if wanted and path.is_file() and (found := file_sha256(path)) != wanted:
        raise ValueError(f"{path}: its sha256 is {found}, that of {name} is {wanted}; move the file away and run: "
                         f"python gpt2_weights.py get --model {name}")


def download_openai(name):
    """Return the folder with OpenAI's own files of a published size; hparams.json comes last and marks it whole."""
    folder = gpt2_root() / PUBLISHED[name].openai
    size = 4 * sum(parameter.numel() for parameter in meta_model(GPT_CONFIGS[name]).parameters())
    for file, size, sha256 in (("model.ckpt.data-00000-of-00001", size, None), ("model.ckpt.index", 0, None),
                               ("encoder.json", 0, VOCAB_SHA256), ("vocab.bpe", 0, MERGES_SHA256),
                               ("hparams.json", 0, None)):
        if not (folder / file).is_file():
            download(f"{OPENAI}/models/{PUBLISHED[name].openai}/{file}", folder / file, size, sha256)
    return folder


def download_gpt2(name, mirror=""):
    """Return the folder with the weights of a published size after downloading them, from OpenAI where Hugging Face's
    host (or `mirror`) cannot be reached. Raises OSError that says which file to put where."""
    published, folder = PUBLISHED[name], gpt2_root() / name
    host = (mirror or os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/{published.revision}/model.safetensors"
    problems = []
    try:
        sha256 = download(url, folder / "model.safetensors", published.size, published.sha256)
        with replacing(folder / "model.safetensors.sha256") as file:
            file.write(f"{sha256}  model.safetensors\n".encode())  # as sha256sum --check reads it
        return folder
    except OSError as error:
        if error.errno:
            raise
        problems.append(str(error))
    try:
        return download_openai(name)
    except OSError as error:
        if error.errno:
            raise
        problems.append(str(error))
    raise OSError(f"GPT-2's weights cannot be had: {'; '.join(problems)}. Fetch {url} where there is a network and put "
                  f"it at {folder / 'model.safetensors'}, or name a host with --mirror")


# ---------------------------------------------------------------------------------------------------------------------
# Export


def write_json(path, values):
    """Write `values` to `path` as JSON, all at once."""
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def hf_tensors(model):
    """Return {Hugging Face's name: tensor} of a language model; a missing query/key/value bias is written as zeros.

    Raises ValueError where the model holds other tensors than its config says: adapters, or a classifier's head."""
    wanted = {name: tensor.shape for name, tensor in meta_model(model.config).state_dict().items()}
    found = model.state_dict()
    odd = sorted(set(wanted) ^ set(found)) or [name for name in wanted if wanted[name] != found[name].shape]
    if odd:
        raise ValueError(f"{odd[0]}: only a language model can be exported; merge adapters first (python lora.py "
                         "merge), and a classifier's head has no place in GPT-2")
    tensors = {}
    for name, tensor in found.items():
        theirs = gpt2_name(name)
        if theirs == "lm_head.weight":
            if not model.config.tie_weights:
                tensors[theirs] = tensor
            continue
        tensors["transformer." + theirs] = tensor.t() if theirs.endswith(TURNED) else tensor
        if theirs.endswith("c_attn.weight") and not model.config.qkv_bias:
            tensors["transformer." + theirs.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    return tensors


def hf_config(config, eot_id):
    """Return the content of config.json; "qkv_bias" is a word of ours, which others pass over."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
            "n_positions": config.context_length, "n_ctx": config.context_length, "n_embd": config.emb_dim,
            "n_layer": config.n_layers, "n_head": config.n_heads, "n_inner": None,
            "activation_function": "gelu" if config.exact_gelu else "gelu_new",
            "resid_pdrop": config.drop_rate, "embd_pdrop": config.drop_rate, "attn_pdrop": config.drop_rate,
            "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True, "use_cache": True,
            "bos_token_id": eot_id, "eos_token_id": eot_id, "tie_word_embeddings": config.tie_weights,
            "qkv_bias": config.qkv_bias, "torch_dtype": "float32"}


def export_tokenizer(tokenizer, directory, context_length):
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json into `directory`.

    Raises ValueError for a tokenizer of words or characters, which has no place in GPT-2's format."""
    if tokenizer.type == "gpt2":
        from tiktoken.load import read_file_cached  # it lies there since the tokenizer was made

        for name, source, sha256 in (("vocab.json", "encoder.json", VOCAB_SHA256),
                                     ("merges.txt", "vocab.bpe", MERGES_SHA256)):
            with replacing(directory / name) as file:
                file.write(read_file_cached(f"{OPENAI}/encodings/main/{source}", sha256))
    elif tokenizer.type == "bpe":
        tokenizer.export_gpt2_files(directory)
    else:
        raise ValueError(f"a {tokenizer.type} tokenizer cannot be exported, only byte pairs can")
    merges = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(directory / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for text, i in tokenizer.specials.items()],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": read_json(directory / "vocab.json"),
                  "merges": [line.split(" ") for line in merges if line]}})
    texts = {i: text for text, i in tokenizer.specials.items()}
    named = {"bos_token": texts.get(tokenizer.eot_id), "eos_token": texts.get(tokenizer.eot_id),
             "unk_token": texts.get(tokenizer.eot_id), "pad_token": texts.get(tokenizer.pad_id)}
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": context_length, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "errors": "replace",
        **{name: text for name, text in named.items() if text is not None}})


def export_gpt2(model, directory, tokenizer=None):
    """Write `model` as Hugging Face stores GPT-2: config.json, model.safetensors, generation_config.json and, with a
    byte-pair `tokenizer`, its files.

    `transformers.AutoModelForCausalLM.from_pretrained(directory)` computes the same logits, and `load_gpt2(directory)`
    returns the same bits. GPT-2 has a query/key/value bias: where the model has none, zeros are written. A head of its
    own is written as lm_head.weight with tie_word_embeddings false."""
    directory = Path(directory)
    if isinstance(tokenizer, dict):  # as `load_checkpoint` returns it
        from tokenizer import from_dict

        tokenizer = from_dict(tokenizer)
    eot_id = tokenizer.eot_id if tokenizer is not None else None
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
    tensors = hf_tensors(model)
    if tokenizer is not None:
        directory.mkdir(parents=True, exist_ok=True)
        export_tokenizer(tokenizer, directory, model.config.context_length)
    write_safetensors(directory / "model.safetensors", tensors)
    write_json(directory / "generation_config.json", {"bos_token_id": eot_id, "eos_token_id": eot_id})
    write_json(directory / "config.json", hf_config(model.config, eot_id))


# ---------------------------------------------------------------------------------------------------------------------
# Command line. `Parser`, `explain` and `run` stand identically in every leaf, so that a file can be copied alone;
# tests/test_layout.py compares them.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit status 2, and name the nearest flag."""

    def error(self, message):
        flag = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7) if "unrecognized" in message else []
        self.exit(2, f"error: {message}; " + (f"did you mean {near[0]}?\n" if near else f"see {self.prog} --help\n"))


def explain(error):
    """Return an error as one line; one of the operating system's as path, reason and what to do."""
    if isinstance(error, ImportError) and error.name:
        name, ours = error.name.split(".")[0], "gpt tokenizer data lora gpt2_weights train finetune_cls finetune_sft"
        return f"{error}; " + (f"copy {name}.py beside this file" if name in ours.split() else
                               f"install it: python -m pip install --upgrade {name}")
    if not isinstance(error, OSError) or not error.errno:
        return " ".join(str(error).split())
    place = "" if error.filename is None else f"{error.filename}: "
    remedies = {errno.ENOSPC: "free some space there, or write to another disk",
                errno.EROFS: "write to another folder", errno.EACCES: "change its permissions, or take another folder",
                errno.ENOTDIR: "a part of this path is a file and no folder; take another path",
                errno.EEXIST: "a file of this name is in the way; move it, or take another path",
                errno.EISDIR: "name a file, not a folder", errno.ENOENT: "check the path",
                errno.EIO: "the disk reports a fault; write to another one"}
    return f"{place}{error.strerror}" + (f"; {remedies[error.errno]}" if error.errno in remedies else "")


def run(doc, commands, argv=None):
    """Run `script.py [command] [flags]` and return its exit status.

    `commands` maps a word to (function, flags), the first word being the default; `flags` maps argparse names to
    options. A user's mistake is one line on stderr: status 2 where the command line alone is wrong (argparse's errors,
    and an `argparse.ArgumentError` raised by the function), 1 for a ValueError, OSError or ImportError found later."""
    argv = list(sys.argv[1:] if argv is None else argv)
    script = f"python {os.path.basename(__file__)}"
    parsers = {}
    for word, (function, flags) in commands.items():
        parsers[word] = Parser(prog=f"{script} {word}", description=function.__doc__, allow_abbrev=False,
                               formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 28))
        for names, options in flags.items():
            default, shown = options.get("default"), dict(options)
            if type(default) in (int, float, str) and default != "":
                shown["help"] += f" (default {default})"
            if names.startswith("--") and not {"action", "choices"} & set(options):
                shown["metavar"] = options.get("type", str).__name__
            parsers[word].add_argument(*names.split(), **shown)
        parsers[word].add_argument("--debug", action="store_true", help="show the traceback of an error")
    if argv[:1] in (["-h"], ["--help"]):
        print(doc.strip(), *(parser.format_help().strip() for parser in parsers.values()), sep="\n\n")
        return 0
    word = argv.pop(0) if argv and not argv[0].startswith("-") else next(iter(commands))
    if word not in parsers:
        print(f"error: unknown command {word!r}; one of: {', '.join(parsers)}; see {script} --help", file=sys.stderr)
        return 2
    try:
        args = parsers[word].parse_args(argv, argparse.Namespace(argv=[word, *argv]))
    except SystemExit as stop:
        return stop.code
    try:
        return commands[word][0](args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `| head` for one, has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (argparse.ArgumentError, ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def tokenizer_of(folder, vocab_size):
    """Return the byte-pair tokenizer whose files lie in `folder`, GPT-2's where there are none and it fits, or None."""
    from tokenizer import EOT, BPETokenizer, load_tokenizer

    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            whole, specials = folder / "tokenizer.json", [EOT]
            if whole.is_file():
                try:
                    specials = [token["content"] for token in read_json(whole)["added_tokens"]]
                except (KeyError, TypeError):
                    raise ValueError(f"{whole}: its added_tokens cannot be read") from None
            return BPETokenizer.from_gpt2_files(folder / vocab, folder / merges, specials)
    return load_tokenizer("gpt2") if vocab_size == GPTConfig.vocab_size else None


@torch.no_grad()
def window_loss(model, ids, length=256):
    """Return the mean loss, nats a token, over windows of `length` tokens laid end to end; a rest is left out.

    These are the windows of the book's loaders, and because none of its batches is short, its mean too."""
    losses = []
    for start in range(0, len(ids) - length, length):
        window = torch.tensor([ids[start : start + length + 1]])
        losses.append(-token_logprobs(model(window), window).mean().item())
    return sum(losses) / len(losses)


def self_test(model, tokenizer, name, text=None):
    """Yield (what, found, wanted, passed) for each published figure of the size `name`; `text` is the-verdict.

    Where none is published, the loss must be lower than that of the smallest size."""
    if text is not None:
        cut = int(0.9 * len(text))
        for part, words, k in (("train", text[:cut], 0), ("validation", text[cut:], 1)):
            loss = window_loss(model, tokenizer.encode(words))
            if PUBLISHED[name].losses:
                wanted = PUBLISHED[name].losses[k]
                yield f"loss on the-verdict, {part} part", f"{loss:.4f}", f"{wanted}", abs(loss - wanted) < 1e-3
            else:
                wanted = PUBLISHED["gpt2"].losses[k]
                yield f"loss on the-verdict, {part} part", f"{loss:.4f}", f"below {wanted}", loss < wanted
    if PUBLISHED[name].greedy:
        prompt, count, wanted = PUBLISHED[name].greedy
        ids = tokenizer.encode(prompt)
        found = tokenizer.decode(generate(model, torch.tensor([ids]), count, temperature=0)[0, len(ids) :])
        yield f"greedy continuation of {prompt[-24:]!r}", repr(found), repr(wanted), wanted in found


def get_command(args):
    """Download the weights of a published size, unless they are there."""
    folder = find_gpt2(args.model)
    if folder is None:
        folder = download_gpt2(args.model, args.mirror)
    verify_gpt2(folder, args.model)
    print(f"{args.model} lies in {folder}; next: python gpt2_weights.py check --model {args.model}")


def import_command(args):
    """Write GPT-2's weights, from a name, folder or file, as a checkpoint of ours."""
    path = locate_gpt2(args.source)[1]
    if Path(args.out).resolve() in (path.resolve(), path.resolve() / "model.safetensors"):
        raise argparse.ArgumentError(None, f"--out {args.out} would overwrite --source; give another --out")
    model = load_gpt2(args.source, args.context_length)
    tokenizer = tokenizer_of(path if path.is_dir() else path.parent, model.config.vocab_size)
    save_checkpoint(args.out, model, tokenizer, source=args.source)
    print(f"{args.out}: {model.config}" + ("" if tokenizer else "; without a tokenizer, its files are not there"))


def export_command(args):
    """Write a checkpoint of ours, or a published size, as a folder that transformers loads."""
    from tokenizer import from_dict

    there = Path(args.out, "model.safetensors")
    exported = there.with_name("config.json").exists() and there.resolve() != Path(args.source).resolve()
    if there.exists() and not exported:
        raise argparse.ArgumentError(None, f"{there} is there and no earlier export; give another --out")
    if args.source in GPT_CONFIGS:
        model = load_gpt2(args.source)
        tokenizer = tokenizer_of(locate_gpt2(args.source)[1], model.config.vocab_size)
    else:
        model, described, _ = load_checkpoint(args.source)
        tokenizer = from_dict(described) if described else None
    if tokenizer is not None and tokenizer.type not in ("bpe", "gpt2"):
        print(f"its {tokenizer.type} tokenizer is left out: GPT-2's format knows only byte pairs", file=sys.stderr)
        tokenizer = None
    export_gpt2(model, args.out, tokenizer)
    zeros = "" if model.config.qkv_bias else "; the model has no query/key/value bias, zeros are written"
    print(f"{args.out}: {', '.join(sorted(os.listdir(args.out)))}{zeros}")


def check_command(args):
    """Load a published size and compare what it computes with published figures."""
    from tokenizer import load_tokenizer

    if find_gpt2(args.model) is None:
        raise FileNotFoundError(f"could not check: no weights of {args.model} in {gpt2_root() / args.model}; get them "
                                f"with: python gpt2_weights.py get --model {args.model}")
    model, tokenizer = load_gpt2(args.model), load_tokenizer("gpt2")
    verdict = gpt2_root().parent / "the-verdict.txt"
    text = verdict.read_text(encoding="utf-8") if verdict.is_file() else None
    failed = text is None
    for what, found, wanted, passed in self_test(model, tokenizer, args.model, text):
        print(f"{'pass' if passed else 'FAIL'}  {what}: {found}, published: {wanted}")
        failed |= not passed
    if text is None:
        print(f"could not check the loss: no {verdict}; get it with: python data.py get verdict", file=sys.stderr)
    return int(failed)


def main(argv=None):
    """Run the command line and return its exit status."""
    size = dict(default="gpt2", choices=list(PUBLISHED), help="a published size")
    return run(__doc__, {
        "get": (get_command, {
            "--model": size,
            "--mirror": dict(default="", help="host to ask in place of huggingface.co, as https://hf-mirror.com")}),
        "import": (import_command, {
            "--source": dict(default="gpt2", help="a published size, a folder or a safetensors file"),
            "--context_length": dict(type=int, help="tokens that the model shall see; fewer need less memory"),
            "--out": dict(default="out/gpt2/model.safetensors", help="where to write")}),
        "export": (export_command, {
            "--source": dict(default="out/pretrain/model.safetensors", help="a checkpoint of ours or a published size"),
            "--out": dict(default="out/hf", help="folder to write")}),
        "check": (check_command, {"--model": size}),
    }, argv)


if __name__ == "__main__":
    sys.exit(main())
