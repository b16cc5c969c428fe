"""GPT-2 weights in and out: both formats against hand-made files, the self-test, the download, and the peers."""

import dataclasses
import hashlib
import http.server
import json
import math
import os
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

import gpt
import gpt2_weights
from gpt2_weights import crc32c, download, export_gpt2, load_gpt2, main, read_tf_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = gpt.GPTConfig(101, 16, 48, 4, 2, qkv_bias=True, tie_weights=True)
CONFIG_JSON = {"model_type": "gpt2", "vocab_size": 101, "n_positions": 16, "n_ctx": 16, "n_embd": 48, "n_head": 4,
               "n_layer": 2, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}
IDS = torch.tensor([[5, 99, 0, 41, 41, 7, 100, 23], [3, 1, 4, 1, 5, 9, 2, 6]])


def gpt2_tensors(V=101, T=16, C=48, L=2, seed=0):
    """Return random weights under the names and in the shapes of GPT-2: matrices (in, out), vectors around 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    block = {"ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
             "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
             "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (4 * C, C),
             "mlp.c_proj.bias": (C,)}
    for i in range(L):
        shapes.update({f"h.{i}.{name}": shape for name, shape in block.items()})
    return {name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1) for name, shape in shapes.items()}


def gpt2_logits(w, ids, heads=4, approximate="tanh", head=None):
    """Return the logits that GPT-2's weights `w` give for ids (T,), by matrix products as in openai/gpt-2."""
    T, C = len(ids), w["wte.weight"].shape[1]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def matrix(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("h."))):
        q, k, v = matrix(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=1)
        mixed = []
        for h in range(heads):
            part = slice(h * C // heads, (h + 1) * C // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(C // heads) + torch.full((T, T), -1e10).triu(1)
            mixed.append(scores.softmax(1) @ v[:, part])
        x = x + matrix(torch.cat(mixed, 1), f"h.{i}.attn.c_proj")
        inner = torch.nn.functional.gelu(matrix(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate=approximate)
        x = x + matrix(inner, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ (w["wte.weight"] if head is None else head).T


def hf_folder(folder, tensors, **config):
    """Return `folder` after writing tensors and config.json as Hugging Face does."""
    folder.mkdir(parents=True, exist_ok=True)
    gpt.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**CONFIG_JSON, **config}), encoding="utf-8")
    return folder


def bits(model):
    """Return the sha256 of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + bytes(gpt.tensor_bytes(tensor.contiguous())))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's format


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_those_of_gpt2_written_out(prefix, dtype, tmp_path):
    """With and without the prefix, in three precisions, masks ignored: logits equal the matrix products by hand."""
    tensors = {name: tensor.to(dtype) for name, tensor in gpt2_tensors().items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    folder = hf_folder(tmp_path, {prefix + name: tensor for name, tensor in {**tensors, **masks}.items()})
    model = load_gpt2(folder)
    assert model.config == TINY and not model.training and model.tok_emb.weight.dtype == torch.float32
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for row in IDS:
        torch.testing.assert_close(model(row[None])[0], gpt2_logits(tensors, row), atol=2e-5, rtol=1e-5)


def test_the_exact_gelu_would_be_noticed(tmp_path):
    """The negative control: with the other form of the GELU the logits differ by far more than the tolerance."""
    tensors = gpt2_tensors()
    model = load_gpt2(hf_folder(tmp_path, tensors))
    wrong = gpt2_logits(tensors, IDS[0], approximate="none")
    assert (model(IDS[:1])[0] - wrong).abs().max() > 2e-4


def test_a_config_with_the_exact_gelu_is_followed(tmp_path):
    """The logits are those of the exact form by hand."""
    tensors = gpt2_tensors()
    model = load_gpt2(hf_folder(tmp_path, tensors, activation_function="gelu"))
    torch.testing.assert_close(model(IDS[:1])[0], gpt2_logits(tensors, IDS[0], approximate="none"), atol=2e-5, rtol=1e-5)


def test_a_tied_head_shares_its_storage_and_an_untied_one_is_read(tmp_path):
    """One matrix in memory where the config ties, two where not; a tied head that the file holds too is no news."""
    tensors, head = gpt2_tensors(), torch.randn(101, 48, generator=torch.Generator().manual_seed(9))
    tied = load_gpt2(hf_folder(tmp_path / "tied", {**tensors, "lm_head.weight": tensors["wte.weight"].clone()}))
    assert tied.out_head.weight.data_ptr() == tied.tok_emb.weight.data_ptr()
    folder = hf_folder(tmp_path / "untied", {**tensors, "lm_head.weight": head}, tie_word_embeddings=False)
    untied = load_gpt2(folder)
    assert torch.equal(untied.out_head.weight, head)
    torch.testing.assert_close(untied(IDS[:1])[0], gpt2_logits(tensors, IDS[0], head=head), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="no tensor 'lm_head.weight'"):
        load_gpt2(hf_folder(tmp_path / "headless", tensors, tie_word_embeddings=False))


@pytest.mark.parametrize("rows, config", [(128, {}), (50304, {"vocab_size": 50304}), (50304, {"vocab_size": 50257})])
def test_a_padded_vocabulary_is_cropped(rows, config, tmp_path):
    """Rows beyond the vocabulary are dropped, also where the config counts nanoGPT's 50,304."""
    tensors = gpt2_tensors(V=rows)
    model = load_gpt2(hf_folder(tmp_path, tensors, **config))
    wanted = 101 if rows == 128 else 50257
    assert model.config.vocab_size == wanted and model(IDS).shape == (2, 8, wanted)
    assert torch.equal(model.tok_emb.weight, tensors["wte.weight"][:wanted])


def test_the_context_can_be_cropped(tmp_path):
    """Logits within the shorter context stay the same; beyond it the model refuses, and can be trained."""
    folder = hf_folder(tmp_path, gpt2_tensors())
    whole, short = load_gpt2(folder), load_gpt2(folder, context_length=8)
    assert short.config == dataclasses.replace(TINY, context_length=8) and short.pos_emb.weight.requires_grad
    assert torch.equal(short(IDS), whole(IDS))
    with pytest.raises(ValueError, match="context of 8"):
        short(torch.zeros(1, 9, dtype=torch.long))
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="between 1 and the weights' 16"):
            load_gpt2(folder, context_length=wrong)


@pytest.mark.parametrize("change, message", [
    ({"h.1.mlp.c_fc.weight": None}, "no tensor 'h.1.mlp.c_fc.weight'"),
    ({"wte.weight": None}, "no tensor 'wte.weight'"),
    ({"h.2.ln_1.weight": torch.ones(48)}, "unknown tensor 'h.2.ln_1.weight'"),
    ({"h.0.attn.c_attn.weight": torch.ones(144, 48)}, r"'h.0.attn.c_attn.weight'.*\(144, 48\).*\(48, 144\) \(in x out"),
    ({"wpe.weight": torch.ones(32, 48)}, r"'wpe.weight' has the shape \(32, 48\), the config wants \(16, 48\)"),
    ({"wte.weight": torch.ones(100, 48)}, r"'wte.weight' has the shape \(100, 48\), the config wants \(101, 48\)"),
    ({"wte.weight": torch.ones(())}, r"'wte.weight' has the shape \(\)"),
    ({"ln_f.bias": torch.full((48,), math.nan)}, "final_norm.bias.*not finite"),
    ({"ln_f.bias": torch.zeros(48, dtype=torch.int8)}, "final_norm.bias.*int8"),
    ({"h.0.attn.q_proj.weight": torch.ones(48, 48)}, "unknown tensor 'h.0.attn.q_proj.weight'"),
])
def test_a_file_that_does_not_fit_names_the_tensor(change, message, tmp_path, capsys):
    """Missing, unknown, transposed, of another size or not finite: one line, exit status 1, no traceback."""
    tensors = {name: tensor for name, tensor in {**gpt2_tensors(), **change}.items() if tensor is not None}
    folder = hf_folder(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=message):
        load_gpt2(folder)
    assert main(["import", "--source", str(folder), "--out", str(tmp_path / "out.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(folder) in error
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 100),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("n_head", 5), ("n_layer", "2"),
    ("vocab_size", None), ("n_embd", -48), ("n_embd", {}), ("resid_pdrop", "much")])
def test_a_config_that_asks_for_something_else_is_refused(field, value, tmp_path):
    """Loading it anyway would give a model that computes nonsense."""
    folder = hf_folder(tmp_path, gpt2_tensors(), **{field: value})
    with pytest.raises(ValueError, match=r"config\.json: .*(%s|emb_dim|n_layers|n_heads|not supported)" % field):
        load_gpt2(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"n_embd": 48', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    """One line with the path."""
    folder = hf_folder(tmp_path, gpt2_tensors())
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_gpt2(folder)


def test_without_a_config_the_four_published_widths_are_known():
    """768 to 1,600 channels have 12 to 25 heads; another width needs its config.json."""
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = gpt.GPT_CONFIGS[name]
        with torch.device("meta"):
            tensors = {"transformer.wte.weight": torch.empty(50257, config.emb_dim), "h.0.ln_1.bias": torch.empty(1),
                       "wpe.weight": torch.empty(1024, config.emb_dim),
                       **{f"h.{i}.ln_1.weight": torch.empty(config.emb_dim) for i in range(config.n_layers)}}
        assert gpt2_weights.config_from_shapes(tensors) == config
    with pytest.raises(ValueError, match="width 48 needs its config.json"):
        gpt2_weights.config_from_shapes(gpt2_tensors())
    with pytest.raises(ValueError, match="no matrix 'wte.weight'"):
        gpt2_weights.config_from_shapes({})


def test_shards_are_read_together(tmp_path):
    """Large models lie in model-00001-of-00002.safetensors and so on."""
    tensors = gpt2_tensors()
    whole = load_gpt2(hf_folder(tmp_path / "whole", tensors))
    folder = hf_folder(tmp_path / "shards", tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        part = {name: tensors[name] for name in part}
        gpt.write_safetensors(folder / f"model-0000{number}-of-00002.safetensors", part)
    assert bits(load_gpt2(folder)) == bits(whole)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "gpt2.pth"])
def test_a_pickle_is_refused_and_nothing_in_it_runs(name, tmp_path):
    """As a file and as all that a folder holds; the message says how to get safetensors."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "in").mkdir()
    torch.save({"wte.weight": Bomb()}, tmp_path / "in" / name)
    for source in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(ValueError, match="pickle.*gpt2_weights.py get.*save_pretrained"):
            load_gpt2(source)
    assert not (tmp_path / "exploded").exists()


def test_an_empty_place_and_our_own_checkpoint_are_told_apart(tmp_path):
    """No weights: FileNotFoundError; a checkpoint of ours: the function that reads it."""
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no GPT-2 weights at"):
            load_gpt2(source)
    gpt.save_checkpoint(tmp_path / "ours.safetensors", gpt.GPTModel(TINY))
    with pytest.raises(ValueError, match="load_checkpoint"):
        load_gpt2(tmp_path / "ours.safetensors")


MEMORY = """
import sys, threading, time
sys.path.insert(0, {root!r})
import gpt, gpt2_weights
gpt.meta_model(gpt.GPTConfig(2, 1, 1, 1, 1))  # the first one makes torch 2.10 import sympy, 31 MB

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

peak, done, before = [0], threading.Event(), anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = gpt2_weights.load_gpt2({source!r})
done.set()
thread.join()
print((max(peak[0], anonymous()) - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "TensorFlow"])
def test_loading_claims_little_more_memory_than_the_model(kind, tmp_path):
    """Anonymous memory grows by at most 1.15 times the model, 46 MB here, even where the file's data is not aligned."""
    tensors = gpt2_tensors(V=8000, T=64, C=256, L=12)
    if kind == "TensorFlow":
        source = bundle(tmp_path, tensors, crc=crc_fast)
    else:
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512)
        source = hf_folder(tmp_path, tensors, vocab_size=8000, n_positions=64, n_embd=256, n_layer=12)
        content = (source / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        shifted = (length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :]
        (source / "model.safetensors").write_bytes(shifted)
    code = MEMORY.format(root=ROOT, source=str(source))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout) < 1.15  # less than 1 where the model takes memory that was freed before


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's TensorFlow checkpoint, written here by hand


def crc_slow(data):
    """Return the CRC-32C bit by bit, straight from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def crc_fast(data):
    """Return the same by the function under test, for large files; the small ones go the slow way."""
    return crc32c(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8))


def masked(crc):
    """Return a CRC as LevelDB stores it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def number(value):
    """Return a varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def field(tag, value):
    """Return one field of a protocol buffer: a number, or bytes; ("fixed", n) is a 32-bit number."""
    if isinstance(value, bytes):
        return number(tag << 3 | 2) + number(len(value)) + value
    if isinstance(value, tuple):
        return number(tag << 3 | 5) + value[1].to_bytes(4, "little")
    return number(tag << 3) + number(value)


def block(pairs, restart=3, kind=0):
    """Return one block of a table with its trailer; every third key is written in full."""
    out, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart == 0:
            restarts.append(len(out))
        else:
            shared = len(os.path.commonprefix([before, key]))
        out += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
        before = key
    for place in restarts or [0]:
        out += place.to_bytes(4, "little")
    out += len(restarts or [0]).to_bytes(4, "little") + bytes([kind])
    return bytes(out) + masked(crc_slow(out)).to_bytes(4, "little")


def table(pairs, size=7, kind=0):
    """Return a table of (key, value) pairs in blocks of `size` entries."""
    out, handles = bytearray(), []
    for start in range(0, len(pairs), size):
        part = block(pairs[start : start + size], kind=kind)
        handles.append((pairs[min(start + size, len(pairs)) - 1][0], number(len(out)) + number(len(part) - 5)))
        out += part
    extras, index = block([]), block(handles, restart=1)
    footer = b"".join(map(number, (len(out), len(extras) - 5, len(out) + len(extras), len(index) - 5)))
    return bytes(out) + extras + index + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry(tensor, offset, crc, dtype=1, shard=0, extra=b""):
    """Return the BundleEntryProto of a tensor."""
    shape = b"".join(field(2, field(1, n)) for n in tensor.shape)
    places = (field(3, shard) if shard else b"") + (field(4, offset) if offset else b"")  # a 0 is not written
    size = tensor.numel() * tensor.element_size()
    return field(1, dtype) + field(2, shape) + places + field(5, size) + field(6, ("fixed", crc)) + extra


HEADER = field(1, 1) + field(3, field(1, 1))  # one shard, little-endian, version 1


def openai_name(name):
    """Return OpenAI's name for one of Hugging Face's, spelled out apart from the code under test."""
    if name.startswith("h."):
        _, layer, *rest = name.split(".")
        rest[-1] = {"weight": "g" if rest[0].startswith("ln") else "w", "bias": "b"}[rest[-1]]
        return "/".join(["model", "h" + layer, *rest])
    return {"wte.weight": "model/wte", "wpe.weight": "model/wpe", "ln_f.weight": "model/ln_f/g",
            "ln_f.bias": "model/ln_f/b"}[name]


def bundle(folder, tensors, crc=crc_slow, header=HEADER, entries=None, kind=0, **hparams):
    """Return `folder` after writing an OpenAI checkpoint; `entries` changes {name: bytes} of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    named, data = {}, bytearray()
    for name, tensor in sorted((openai_name(name), tensor) for name, tensor in tensors.items()):
        tensor = tensor[None] if name.endswith("/w") else tensor  # (1, in, out)
        raw = bytes(gpt.tensor_bytes(tensor.contiguous()))
        named[name] = entry(tensor, len(data), masked(crc(raw)))
        data += raw
    pairs = [(b"", header)] + [(name.encode(), value) for name, value in sorted({**named, **(entries or {})}.items())]
    (folder / "model.ckpt.index").write_bytes(table(pairs, kind=kind))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    V, C = tensors["wte.weight"].shape
    layers = sum(name.endswith("ln_1.bias") for name in tensors)
    described = {"n_vocab": V, "n_ctx": len(tensors["wpe.weight"]), "n_embd": C, "n_head": 4, "n_layer": layers}
    (folder / "hparams.json").write_text(json.dumps({**described, **hparams}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("data, crc", [
    (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C), (b"123456789", 0xE3069283), (b"", 0)])
def test_the_crc_is_that_of_the_standard(data, crc):
    """RFC 3720, appendix B.4, and the check value of every table of CRCs."""
    assert crc_fast(data) == crc_slow(data) == crc


def test_the_crc_of_any_length_is_that_of_the_definition(monkeypatch):
    """Registers side by side and chunks one after another change nothing, whatever the length."""
    monkeypatch.setattr(gpt2_weights, "CRC_CHUNK", 3000)
    data = bytes(torch.randint(0, 256, (10_007,), generator=torch.Generator().manual_seed(0)).tolist())
    for length in (1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 257, 1023, 2999, 3000, 3001, 6000, 6001, 10_007):
        assert crc_fast(data[:length]) == crc_slow(data[:length]), length


def test_both_formats_give_the_same_bits(tmp_path):
    """The same numbers as a TensorFlow checkpoint and as safetensors, over several blocks and shortened keys."""
    tensors = gpt2_tensors()
    ours = load_gpt2(bundle(tmp_path / "tf", tensors, crc=crc_fast))
    assert bits(ours) == bits(load_gpt2(hf_folder(tmp_path / "hf", tensors))) and ours.config == TINY
    found, hparams = read_tf_checkpoint(tmp_path / "tf")
    assert hparams["n_embd"] == 48 and found["model/h0/attn/c_attn/w"].shape == (1, 48, 144)
    assert bits(load_gpt2(tmp_path / "tf" / "model.ckpt.index")) == bits(ours)


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path):
    """All bytes of a table of two blocks, one after another: each block has a CRC, and so has what the footer names."""
    path, pairs = tmp_path / "x.index", [(b"", b"header"), (b"model/h0", b"one"), (b"model/h1", b"two")]
    content = table(pairs, size=2)
    path.write_bytes(content)
    assert gpt2_weights.read_table(path) == pairs
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(ValueError):
            gpt2_weights.read_table(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError):
            gpt2_weights.read_table(path)


def test_damaged_data_names_the_tensor(tmp_path):
    """A flipped bit anywhere in the weights, a file cut short, and a missing file are refused."""
    bundle(tmp_path, gpt2_tensors(C=8, L=1))
    path = tmp_path / "model.ckpt.data-00000-of-00001"
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"model.ckpt.index: tensor 'model/.*damaged"):
            load_gpt2(tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="tensor 'model/wte' .*does not fit"):
        load_gpt2(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.ckpt.data-00000-of-00001"):
        load_gpt2(tmp_path)


FOUR = torch.zeros(4)


@pytest.mark.parametrize("change, message", [
    (dict(header=field(1, 1) + field(2, 1)), "big-endian"),
    (dict(header=b"\xff"), "cut off"),
    (dict(kind=1), "compressed"),
    (dict(entries={"model/x": entry(FOUR, 0, 0, dtype=7)}), "'model/x' has the type 7"),
    (dict(entries={"model/x": entry(FOUR, 0, 0, dtype=3)}), "'model/x' has the type 3"),
    (dict(entries={"model/x": b""}), "'model/x' has the type None"),
    (dict(entries={"model/x": entry(FOUR, 0, 0, extra=field(7, b""))}), "'model/x' is stored in slices"),
    (dict(entries={"model/x": entry(FOUR, 0, 0, shard=1)}), "'model/x' lies in data file 1"),
    (dict(header=field(1, 2)), "several data files"),
    (dict(entries={"model/x": entry(FOUR, 2**62, 0)}), "'model/x' of shape .* does not fit"),
    (dict(entries={"model/x": entry(FOUR, 2**70, 0)}), "'model/x' .*64 bits|does not fit"),
    (dict(entries={"model/x": field(1, 1) + field(2, field(2, field(1, 2**62)) * 2) + field(5, 16)}), "/x' of shape"),
    (dict(entries={"model/x": entry(FOUR, 0, 123)}), "'model/x' is damaged"),
    (dict(entries={"model/x": field(1, b"text")}), "'model/x' has the type None"),
    (dict(entries={"model/x": field(1, 1) + field(2, field(2, field(1, 1)) * 99) + field(5, 4)}), "'model/x' of shape"),
    (dict(entries={"model/x": b"\x0b"}), "'model/x' .*unknown kind"),
    (dict(entries={"model/x": b"\x12\x7f"}), "'model/x' .*cut off"),
    (dict(entries={"model/x": b"\x80"}), "'model/x' .*cut off"),
    (dict(n_embd=7), "n_heads"),
    (dict(n_layer=2), "no tensor 'h.1.ln_1.weight'"),
])
def test_a_checkpoint_that_breaks_a_rule_is_refused(change, message, tmp_path):
    """With sound CRCs but impossible content: the message names the rule and the tensor, nothing is claimed for it."""
    with pytest.raises(ValueError, match=message):
        load_gpt2(bundle(tmp_path, gpt2_tensors(C=8, L=1), **change))


def test_a_second_index_or_none_is_refused(tmp_path):
    """Which one is meant cannot be known."""
    bundle(tmp_path, gpt2_tensors(C=8, L=1))
    (tmp_path / "model-2.index").write_bytes(b"")
    with pytest.raises(ValueError, match="one .index file, not 2"):
        load_gpt2(tmp_path)


@pytest.mark.peer
def test_a_checkpoint_written_by_tensorflow_is_read(tmp_path):
    """Every tensor comes back bit for bit from the bundle that TensorFlow's own SaveV2 wrote, under its own CRCs."""
    tensorflow = pytest.importorskip("tensorflow")
    tensors = {openai_name(name): tensor[None] if openai_name(name).endswith("/w") else tensor
               for name, tensor in gpt2_tensors().items()}
    tensorflow.raw_ops.SaveV2(prefix=str(tmp_path / "model.ckpt"), tensor_names=list(tensors),
                              shape_and_slices=[""] * len(tensors), tensors=[t.numpy() for t in tensors.values()])
    bundle(tmp_path / "ours", gpt2_tensors(), crc=crc_fast)
    (tmp_path / "ours" / "hparams.json").rename(tmp_path / "hparams.json")
    found, _ = read_tf_checkpoint(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Published sizes by name, the self-test and the command line


@pytest.fixture
def small_gpt2(tmp_path, monkeypatch):
    """Return the folder of a tiny model that stands in for "gpt2" in a $DATA_DIR of its own."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    folder = hf_folder(tmp_path / "gpt2" / "gpt2", gpt2_tensors())
    published = gpt2_weights.PUBLISHED["gpt2"]._replace(
        size=(folder / "model.safetensors").stat().st_size,
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2", published)
    monkeypatch.setitem(gpt.GPT_CONFIGS, "gpt2", TINY)
    return folder


def test_a_published_size_is_found_in_either_format(small_gpt2):
    """$DATA_DIR/gpt2/gpt2 with safetensors, or $DATA_DIR/gpt2/124M with OpenAI's files; gpt2-small is an alias."""
    by_name = bits(load_gpt2("gpt2"))
    assert by_name == bits(load_gpt2("gpt2-small")) == bits(load_gpt2(str(small_gpt2))) == bits(load_gpt2(small_gpt2))
    bundle(small_gpt2.parent / "124M", gpt2_tensors(), crc=crc_fast)
    (small_gpt2 / "model.safetensors").unlink()
    assert bits(load_gpt2("gpt2")) == by_name


def test_a_damaged_or_other_file_under_a_published_name_is_refused(small_gpt2, monkeypatch):
    """One flipped bit of the weights fails the sha256, and a sound file of another size is not taken for gpt2."""
    path = small_gpt2 / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match="sha256 is .* move the file away"):
        load_gpt2("gpt2")
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2", gpt2_weights.PUBLISHED["gpt2"]._replace(sha256=""))
    (small_gpt2 / "model.safetensors.sha256").write_text(hashlib.sha256(content).hexdigest() + "  model.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        load_gpt2("gpt2")
    path.write_bytes(content)
    load_gpt2("gpt2")
    monkeypatch.setitem(gpt.GPT_CONFIGS, "gpt2", dataclasses.replace(TINY, n_heads=2))
    with pytest.raises(ValueError, match="another model than gpt2"):
        load_gpt2("gpt2")


class Letters:
    """A stand-in for GPT-2's tokenizer: one id below 101 for each character."""

    def encode(self, text):
        return [ord(character) % 101 for character in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids)


def test_the_self_test_tells_right_weights_from_wrong_ones(tmp_path):
    """With the figures of the model itself everything passes, after one slip in the weights something fails."""
    config = dataclasses.replace(TINY, context_length=300)
    torch.manual_seed(0)
    model, text = gpt.GPTModel(config).eval(), "It was a dark and stormy night. " * 100
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # sure of its choices, so that slips matter
    ids = torch.tensor([Letters().encode(text[: 9 * len(text) // 10])[: 256 * 11 + 1]])
    with torch.no_grad():
        rows = [torch.nn.functional.cross_entropy(model(ids[:, i : i + 256])[0], ids[0, i + 1 : i + 257]).item()
                for i in range(0, 256 * 11, 256)]
    greedy = Letters().decode(gpt.generate(model, torch.tensor([[7, 8]]), 5, temperature=0)[0, 2:].tolist())
    validation = gpt2_weights.window_loss(model, Letters().encode(text[9 * len(text) // 10 :]))
    gpt2_weights.PUBLISHED["test"] = gpt2_weights.Published(
        "", "", losses=(sum(rows) / 11, validation), greedy=(chr(7) + chr(8), 5, greedy))
    try:
        results = list(gpt2_weights.self_test(model, Letters(), "test", text))
        assert len(results) == 3 and all(passed for *_, passed in results), results
        with torch.no_grad():
            model.trf_blocks[1].attn.qkv.weight.copy_(model.trf_blocks[1].attn.qkv.weight.flip(0))
        assert not all(passed for *_, passed in gpt2_weights.self_test(model, Letters(), "test", text))
    finally:
        del gpt2_weights.PUBLISHED["test"]


def test_the_windows_of_the_loss_are_those_of_the_book(real_data, gpt2_tokenizer):
    """The-verdict gives 18 windows for training and 2 for validation, 4,608 + 512 tokens, as published."""
    text, seen = real_data("the-verdict.txt").read_text(encoding="utf-8"), []

    def model(window):
        seen.append(window)
        return torch.zeros(1, window.shape[1], 50257)

    cut = int(0.9 * len(text))
    assert abs(gpt2_weights.window_loss(model, gpt2_tokenizer.encode(text[:cut])) - math.log(50257)) < 1e-3
    assert len(seen) == 18 and sum(window.shape[1] - 1 for window in seen) == 4608
    seen.clear()
    gpt2_weights.window_loss(model, gpt2_tokenizer.encode(text[cut:]))
    assert len(seen) == 2 and sum(window.shape[1] - 1 for window in seen) == 512


def test_without_the_files_the_check_says_that_it_could_not(tmp_path, monkeypatch, capsys):
    """Nothing was verified, so this is no success; the line names the command that helps."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert main(["check"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "could not check" in error and "gpt2_weights.py get --model gpt2" in error


def test_check_prints_fail_for_weights_that_are_not_gpt2s(small_gpt2, monkeypatch, capsys, gpt2_tokenizer, real_data):
    """Random weights of GPT-2's vocabulary under its name: every line says FAIL, and the status is 1."""
    config = gpt.GPTConfig(50257, 300, 8, 2, 1, qkv_bias=True, tie_weights=True)
    hf_folder(small_gpt2, gpt2_tensors(V=50257, T=300, C=8, L=1), vocab_size=50257, n_positions=300, n_embd=8, n_head=2,
              n_layer=1)
    monkeypatch.setitem(gpt.GPT_CONFIGS, "gpt2", config)
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2", gpt2_weights.PUBLISHED["gpt2"]._replace(sha256=""))
    text = real_data("the-verdict.txt").read_bytes()
    (small_gpt2.parent.parent / "the-verdict.txt").write_bytes(text)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("FAIL  ") for line in lines) and "3.7547" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_real_weights_pass_the_self_test(name, real_data, capsys):
    """Where GPT-2's own weights lie in $DATA_DIR, everything that `check` compares is as published."""
    if gpt2_weights.find_gpt2(name) is None:
        pytest.skip(f"the weights of {name} are not in {gpt2_weights.gpt2_root()}")
    real_data("the-verdict.txt")
    assert main(["check", "--model", name]) == 0 and "FAIL" not in capsys.readouterr().out


def test_import_makes_a_checkpoint_of_ours(small_gpt2, tmp_path, capsys):
    """Weights, cropped context and the tokenizer that lies beside them; the checkpoint then stands alone."""
    from tokenizer import BPETokenizer, from_dict

    tokenizer = BPETokenizer.train(["low lower lowest newer wider " * 5], 262, ("<|endoftext|>", "<|pad|>"))
    config = dataclasses.replace(TINY, vocab_size=262)
    model = gpt.GPTModel(config)
    export_gpt2(model, tmp_path / "hf", tokenizer.to_dict())  # as load_checkpoint gives it; elsewhere the tokenizer
    out = tmp_path / "out.safetensors"
    assert main(["import", "--source", str(tmp_path / "hf"), "--context_length", "8", "--out", str(out)]) == 0
    loaded, described, made = gpt.load_checkpoint(out)
    assert loaded.config == dataclasses.replace(config, context_length=8) and made["source"] == str(tmp_path / "hf")
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    again = from_dict(described)
    assert again.encode("lowest pad") == tokenizer.encode("lowest pad") and again.pad_id == tokenizer.pad_id == 261
    before = bits(load_gpt2(tmp_path / "hf"))
    for source in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        assert main(["import", "--source", str(source), "--out", str(tmp_path / "hf" / "model.safetensors")]) == 2
        assert "would overwrite --source" in capsys.readouterr().err
    assert bits(load_gpt2(tmp_path / "hf")) == before
    assert main(["import", "--source", "gpt2", "--context_length", "17", "--out", str(tmp_path / "no")]) == 1
    assert "between 1 and the weights' 16" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("argv, status, message", [
    (["get", "--model", "gpt5"], 2, "invalid choice"), (["fetch"], 2, "unknown command"),
    (["get", "--miror", "x"], 2, "did you mean --mirror"), (["import", "--context_length", "x"], 2, "invalid int"),
    (["import", "--source", "nowhere"], 1, "no GPT-2 weights at nowhere"),
    (["export", "--source", "nowhere"], 1, "no checkpoint nowhere")])
def test_a_mistake_on_the_command_line_is_one_line(argv, status, message, capsys):
    """Status 2 where the command line alone is wrong, 1 for what is found later."""
    assert main(argv) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias, exact", [(True, False), (False, False), (False, True)])
def test_out_and_in_again_gives_the_same_bits(tied, bias, exact, tmp_path):
    """Config, weights and tying survive for every config that we can train; two exports are the same file."""
    config = gpt.GPTConfig(101, 16, 48, 4, 2, drop_rate=0.25, qkv_bias=bias, tie_weights=tied, exact_gelu=exact)
    torch.manual_seed(1)
    model = gpt.GPTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms too
    export_gpt2(model, tmp_path / "out")
    again = load_gpt2(tmp_path / "out")
    assert again.config == config and bits(again) == bits(model)
    assert (again.out_head.weight.data_ptr() == again.tok_emb.weight.data_ptr()) == tied
    tensors, _ = gpt.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (48, 144) and ("lm_head.weight" in tensors) != tied
    assert bool(tensors["transformer.h.1.attn.c_attn.bias"].any()) == bias
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    torch.testing.assert_close(model(IDS[:1])[0], gpt2_logits(plain, IDS[0], approximate="none" if exact else "tanh",
                                                             head=plain.get("lm_head.weight")),
                               atol=1e-4, rtol=1e-5)
    export_gpt2(again, tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_only_a_language_model_can_be_exported(tmp_path):
    """A classifier's head, adapters, a tokenizer of another size or of words: refused before anything is written."""
    from tokenizer import BPETokenizer, WordTokenizer

    classifier = gpt.GPTModel(dataclasses.replace(TINY, tie_weights=False))
    classifier.out_head = torch.nn.Linear(48, 2)
    adapted = gpt.GPTModel(TINY)
    adapted.trf_blocks[0].attn.qkv.lora_a = torch.nn.Parameter(torch.zeros(2, 48))
    for model in (classifier, adapted):
        with pytest.raises(ValueError, match="only a language model"):
            export_gpt2(model, tmp_path / "out")
    with pytest.raises(ValueError, match="258 tokens, the model 101"):
        export_gpt2(gpt.GPTModel(TINY), tmp_path / "out", BPETokenizer([], ("<|endoftext|>", "<|pad|>")))
    words = WordTokenizer([f"word{i}" for i in range(101)])
    with pytest.raises(ValueError, match="word tokenizer cannot be exported"):
        export_gpt2(gpt.GPTModel(TINY), tmp_path / "out", words)
    assert not list(tmp_path.glob("out/*"))


def test_the_export_command_writes_what_transformers_looks_for(tmp_path, capsys):
    """Config, weights, generation settings and four files of the tokenizer; zeros for a missing bias are announced."""
    from tokenizer import BPETokenizer, WordTokenizer

    tokenizer = BPETokenizer.train(["low lower lowest newer wider " * 5], 260)
    config = dataclasses.replace(TINY, vocab_size=260, qkv_bias=False)
    gpt.save_checkpoint(tmp_path / "m.safetensors", gpt.GPTModel(config), tokenizer)
    assert main(["export", "--source", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "hf")]) == 0
    assert "zeros are written" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json",
        "tokenizer_config.json"}
    again = BPETokenizer.from_gpt2_files(tmp_path / "hf" / "vocab.json", tmp_path / "hf" / "merges.txt")
    assert again.encode("the lowest") == tokenizer.encode("the lowest")
    read = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert read["eos_token_id"] == read["bos_token_id"] == 259 and read["vocab_size"] == 260
    assert main(["export", "--source", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "hf")]) == 0  # again
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run" / "model.safetensors"
    checkpoint.write_bytes((tmp_path / "m.safetensors").read_bytes())
    for source, beside in ((checkpoint, ""), (tmp_path / "m.safetensors", ""), (checkpoint, "config.json")):
        (tmp_path / "run" / (beside or "summary.json")).write_text("{}")
        capsys.readouterr()
        assert main(["export", "--source", str(source), "--out", str(tmp_path / "run")]) == 2
        assert "no earlier export; give another --out" in capsys.readouterr().err
    assert checkpoint.read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    words = WordTokenizer([f"word{i}" for i in range(101)])
    gpt.save_checkpoint(tmp_path / "w.safetensors", gpt.GPTModel(TINY), words)
    assert main(["export", "--source", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "w")]) == 0
    assert "word tokenizer is left out" in capsys.readouterr().err and not (tmp_path / "w" / "vocab.json").exists()


def test_the_tokenizer_of_gpt2_is_exported_byte_for_byte(tmp_path, gpt2_tokenizer):
    """vocab.json and merges.txt are OpenAI's two files, and give the ids that were published."""
    from tokenizer import BPETokenizer

    gpt2_weights.export_tokenizer(gpt2_tokenizer, tmp_path, 1024)
    again = BPETokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert again.encode("Hello, world. Is this-- a test?") == [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(whole["model"]["merges"]) == 50_000 and whole["added_tokens"][0]["id"] == 50256


# ---------------------------------------------------------------------------------------------------------------------
# Download, from a server on this machine

BODY = bytes(range(256)) * 1200  # 307,200 bytes
SUM = hashlib.sha256(BODY).hexdigest()


class Server:
    """A web server whose replies are given one by one: each a function of the request handler."""

    def __init__(self):
        self.replies, self.requests, outer = [], [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                (outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0])(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.host = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.url = self.host + "/model.safetensors"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def reply(status=200, body=BODY, upto=None, length=True, etag='"one"', **headers):
    """Return a reply that sends `upto` bytes of the body and hangs up; `headers` with _ for -."""

    def send(handler):
        handler.send_response(status)
        if length:
            handler.send_header("Content-Length", str(len(body)))
        if etag:
            handler.send_header("ETag", etag)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body[:upto])
        handler.close_connection = True

    return send


def rest(handler, start=None, etag='"one"'):
    """Answer a range request as a server should: with the rest of BODY, or from `start` if it is a bad one."""
    asked = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    begin = asked if start is None else start
    reply(206, BODY[begin:], etag=etag, Content_Range=f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}")(handler)


@pytest.fixture
def server(monkeypatch):
    """Return a server on this machine, with no pauses before another try."""
    monkeypatch.setattr(gpt2_weights, "PAUSES", (0.01, 0.01, 0.01))
    server = Server()
    yield server
    server.close()


def left(folder):
    """Return the names of all files below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_download_is_checked_and_leaves_nothing_else(server, tmp_path):
    """One request that asks for unpacked bytes, one file, its sha256."""
    server.replies = [reply()]
    assert download(server.url, tmp_path / "sub" / "x", len(BODY), SUM) == SUM
    assert (tmp_path / "sub" / "x").read_bytes() == BODY and left(tmp_path) == ["x"]
    assert server.requests[0][1]["Accept-Encoding"] == "identity" and "Range" not in server.requests[0][1]


def test_a_cut_transfer_goes_on_where_it_stopped(server, tmp_path):
    """Cut twice: the next request asks for the rest, only if the file is still the same."""
    server.replies = [reply(upto=100_000), lambda h: reply(206, BODY[100_000:], upto=50_000,
                      Content_Range=f"bytes 100000-307199/{len(BODY)}")(h), rest]
    assert download(server.url, tmp_path / "x", len(BODY), SUM) == SUM
    asked = [(headers.get("Range"), headers.get("If-Range")) for _, headers in server.requests]
    assert asked == [(None, None), ("bytes=100000-", '"one"'), ("bytes=150000-", '"one"')]
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("second", [
    reply(etag='"two"'),  # the file has changed, the whole of it comes
    reply(),  # ranges are ignored
    lambda h: rest(h, start=0), lambda h: rest(h, start=99_999), lambda h: rest(h, start=100_001),  # the wrong place
    lambda h: rest(h, etag='"two"'),  # If-Range is ignored
    reply(206, BODY[100_000:]),  # no Content-Range
    reply(416, b""),
], ids=["changed", "ignored", "from 0", "one early", "one late", "changed range", "no range", "416"])
def test_what_does_not_continue_is_never_joined(second, server, tmp_path):
    """What came before the cut was of another file; whatever the server does then, the result is the right one."""
    server.replies = [reply(body=BODY[::-1], upto=100_000), second, reply(etag='"two"')]
    assert download(server.url, tmp_path / "x", len(BODY), SUM) == SUM
    assert (tmp_path / "x").read_bytes() == BODY and left(tmp_path) == ["x"]


def test_a_later_run_takes_over_what_an_earlier_one_left(server, tmp_path):
    """The first run fails after 100,000 bytes; the second asks only for the rest, and removes the remains."""
    server.replies = [reply(upto=100_000), reply(503, b"")]
    with pytest.raises(OSError, match="HTTP status 503"):
        download(server.url, tmp_path / "x", len(BODY), SUM)
    assert left(tmp_path) == [".x.%22one%22.part"]
    server.replies, server.requests = [rest], []
    assert download(server.url, tmp_path / "x", len(BODY), SUM) == SUM
    assert server.requests[0][1]["Range"] == "bytes=100000-" and left(tmp_path) == ["x"]


@pytest.mark.parametrize("etag", ["", 'W/"one"'])
def test_without_a_strong_etag_a_transfer_starts_over(etag, server, tmp_path):
    """A weak validator does not promise the same bytes (RFC 9110, 8.8.1), so nothing is continued or kept."""
    server.replies = [reply(upto=100_000, etag=etag), reply(etag=etag)]
    assert download(server.url, tmp_path / "x", len(BODY), SUM) == SUM
    assert "Range" not in server.requests[1][1]
    server.replies = [reply(upto=100_000, etag=etag)]
    with pytest.raises(OSError, match="cut off"):
        download(server.url, tmp_path / "y", len(BODY), SUM)
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("replies, tries, message", [
    ([reply(404, b"")], 1, "HTTP status 404"),
    ([reply(503, b"")], 4, "HTTP status 503"),
    ([reply(429, b"")], 4, "HTTP status 429"),
    ([reply(upto=0)], 4, "cut off after 0 of"),
    ([reply(length=False, upto=1000)], 4, "cut off after 1,000 of 307,200"),
    ([lambda h: h.connection.close()], 1, "no connection"),
    ([reply(302, b"", Location="/again")], None, "30 redirects"),
    ([reply(302, b"", Location="file:///etc/passwd")], 1, "file:"),
])
def test_a_server_that_fails_is_asked_again_only_where_that_may_help(replies, tries, message, server, tmp_path):
    """In the end there is one line with the address, no file under the final name, and a file there already stays."""
    (tmp_path / "x").write_bytes(b"from before")
    server.replies = replies
    with pytest.raises(OSError, match=message) as caught:
        download(server.url, tmp_path / "x", len(BODY), SUM)
    assert server.url in str(caught.value) and (tries is None or len(server.requests) == tries)
    assert (tmp_path / "x").read_bytes() == b"from before"


@pytest.mark.parametrize("answer, size, sha256, message", [
    (reply(body=BODY[::-1]), len(BODY), SUM, "sha256 is [0-9a-f]{64}, expected " + SUM),
    (reply(body=BODY + b"x"), len(BODY), SUM, "307,201 bytes, expected 307,200"),
    (reply(body=BODY + b"x", length=False), len(BODY), SUM, "longer than 307,200"),
    (reply(body=b"<html>please log in</html>"), len(BODY), SUM, "26 bytes, expected 307,200"),
    (reply(X_Linked_Etag='"%s"' % hashlib.sha256(b"").hexdigest()), 0, "", "sha256 is"),
    (reply(), 0, "", "names no sha256"),
    (reply(X_Linked_Etag='"abc"'), 0, "", "names no sha256"),
])
def test_wrong_content_is_thrown_away(answer, size, sha256, message, server, tmp_path):
    """Another size, another sha256 than pinned or than the host names, or none where one is needed."""
    server.replies = [answer]
    with pytest.raises(ValueError, match=message):
        download(server.url, tmp_path / "x", size, sha256)
    assert left(tmp_path) == []


def test_the_sha256_that_the_host_names_on_the_way_counts(server, tmp_path):
    """huggingface.co names it in the reply that sends on to its storage, whose own ETag is something else."""
    sent_on = reply(302, b"", Location="/storage", X_Linked_Etag=f'"{SUM}"', etag=f'"{SUM}"')
    server.replies = [sent_on, reply(upto=100_000, etag='"storage"'), sent_on, lambda h: rest(h, etag='"storage"')]
    assert download(server.url, tmp_path / "x", 0, "") == SUM
    assert server.requests[3][1]["If-Range"] == '"storage"' and server.requests[3][1]["Range"] == "bytes=100000-"


def test_a_drip_is_given_up_and_kept_for_later(server, tmp_path, monkeypatch):
    """Bytes that trickle never trip a timeout; the average over a window does."""
    monkeypatch.setattr(gpt2_weights, "WINDOW", 0.3)
    monkeypatch.setattr(gpt2_weights, "SLOWEST", 1000)

    def drip(handler):
        reply(upto=1000)(handler)
        for i in range(2000):
            handler.wfile.write(BODY[1000 + i : 1001 + i])
            handler.wfile.flush()
            time.sleep(0.02)

    server.replies, started = [drip], time.monotonic()
    with pytest.raises(OSError, match="too slow"):
        download(server.url, tmp_path / "x", len(BODY), SUM)
    assert time.monotonic() - started < 20 and left(tmp_path) == [".x.%22one%22.part"]


@pytest.mark.parametrize("sent", [None, 1000])
def test_a_server_that_falls_silent_does_not_hold_us(sent, server, tmp_path, monkeypatch):
    """Before the first byte or in the middle: the time limit ends each try, and the tries are counted."""
    monkeypatch.setattr(gpt2_weights, "TIMEOUT", (1, 0.2))

    def stall(handler):
        if sent:
            reply(upto=sent)(handler)
            handler.wfile.flush()
        time.sleep(0.6)

    server.replies, started = [stall], time.monotonic()
    with pytest.raises(OSError, match="no connection" if sent is None else "cut off after 1,000 of 307,200"):
        download(server.url, tmp_path / "x", len(BODY), SUM)
    assert time.monotonic() - started < 20 and left(tmp_path) == ([] if sent is None else [".x.%22one%22.part"])


def test_two_downloads_at_once_do_not_disturb_each_other(server, tmp_path):
    """Each has a file of its own; both end well and one good file is left."""
    server.replies = [reply()]
    results = []
    threads = [threading.Thread(target=lambda: results.append(download(server.url, tmp_path / "x", len(BODY), SUM)))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [SUM] * 4 and left(tmp_path) == ["x"]


def test_too_little_space_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    """The message has what is needed and what is free; nothing is left behind."""
    monkeypatch.setattr(gpt2_weights.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    server.replies = [reply()]
    with pytest.raises(OSError, match="307,200 bytes are needed, 1,000 are free"):
        download(server.url, tmp_path / "x", len(BODY), SUM)
    assert left(tmp_path) == []


def test_get_downloads_checks_and_then_leaves_it_alone(server, small_gpt2, capsys):
    """From a mirror, at the pinned revision; the second call finds the file and asks nobody."""
    content = (small_gpt2 / "model.safetensors").read_bytes()
    (small_gpt2 / "model.safetensors").unlink()
    server.replies = [reply(body=content)]
    for _ in range(2):
        assert main(["get", "--mirror", server.host]) == 0
        assert str(small_gpt2) in capsys.readouterr().out
    assert [path for path, _ in server.requests] == [
        "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors"]
    assert (small_gpt2 / "model.safetensors.sha256").read_text().split() == [hashlib.sha256(content).hexdigest(),
                                                                              "model.safetensors"]


def test_where_hugging_face_cannot_be_reached_openai_is_asked(server, small_gpt2, monkeypatch, tmp_path):
    """The TensorFlow checkpoint arrives file by file, hparams.json last, and gives the same model."""
    wanted = bits(load_gpt2("gpt2"))
    for path in small_gpt2.iterdir():
        path.unlink()
    source = bundle(tmp_path / "source", gpt2_tensors(), crc=crc_fast)
    for name in ("encoder.json", "vocab.bpe"):
        (source / name).write_bytes(b"{}")
    monkeypatch.setattr(gpt2_weights, "VOCAB_SHA256", hashlib.sha256(b"{}").hexdigest())
    monkeypatch.setattr(gpt2_weights, "MERGES_SHA256", hashlib.sha256(b"{}").hexdigest())
    monkeypatch.setattr(gpt2_weights, "OPENAI", server.host)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    server.replies = [lambda handler: reply(body=(source / handler.path.split("/")[-1]).read_bytes())(handler)]
    assert bits(load_gpt2("gpt2")) == wanted
    assert [path for path, _ in server.requests][-1] == "/models/124M/hparams.json"


def test_without_a_network_one_line_says_which_file_to_put_where(tmp_path, monkeypatch, capsys):
    """Quickly, with address, size and place."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(gpt2_weights, "OPENAI", "http://127.0.0.1:9")
    started = time.monotonic()
    assert main(["get"]) == 1
    error = capsys.readouterr().err
    assert time.monotonic() - started < 30 and error.count("\n") == 1
    assert str(tmp_path / "gpt2" / "gpt2" / "model.safetensors") in error and "Traceback" not in error
    assert "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors" in error


# ---------------------------------------------------------------------------------------------------------------------
# Peers

# The four published shapes at a head size of 4: layers and heads as they are, so 48, 64, 80 and 100 channels.
SHAPES = {"gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}


def peer_model(layers, heads, **config):
    """Return a transformers model with weights large enough that a mistake shows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=4 * heads, n_layer=layers, n_head=heads,
                                     bos_token_id=0, eos_token_id=0, initializer_range=0.1, **config)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.peer
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    """All four architectures at reduced width: logits, greedy tokens, left-padded batches, and the way back."""
    theirs = peer_model(*SHAPES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_gpt2(tmp_path / "theirs")
    assert (ours.config.n_layers, ours.config.n_heads) == SHAPES[name] == (
        gpt.GPT_CONFIGS[name].n_layers, gpt.GPT_CONFIGS[name].n_heads)
    with torch.no_grad():
        difference = (ours(IDS) - theirs(IDS).logits).abs().max().item()
    print(f"{name}: largest difference of a logit {difference:.2e}")
    assert difference < 1e-4
    mask = torch.ones_like(IDS)
    for padding in (0, 3):  # none, then three on the left of the first row
        mask[0, :padding] = 0
        greedy = theirs.generate(IDS, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
                                 eos_token_id=None)
        assert gpt.generate(ours, IDS, 12, temperature=0, mask=mask).tolist() == greedy.tolist()
    export_gpt2(ours, tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back").eval()
    for (key, one), (_, other) in zip(theirs.state_dict().items(), back.state_dict().items()):
        assert torch.equal(one, other), key


@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_we_train_loads_in_transformers(tied, bias, tmp_path):
    """Model and tokenizer through the Auto classes, for untied heads and missing biases too: logits, ids, text."""
    transformers = pytest.importorskip("transformers")
    from tokenizer import BPETokenizer

    text = "Tom has 12 red balls, and Mia's dog (Bo) isn't here.\n\n  Naïve café – 日本 🙂 the the the "
    tokenizer = BPETokenizer.train([text * 3], 300, ("<|endoftext|>", "<|pad|>"), split_digits=True)
    torch.manual_seed(0)
    config = gpt.GPTConfig(tokenizer.vocab_size, 32, 48, 4, 3, qkv_bias=bias, tie_weights=tied)
    ours = gpt.GPTModel(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(5)
    export_gpt2(ours, tmp_path, tokenizer)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.config.tie_word_embeddings == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs.eval()(IDS).logits, atol=1e-4, rtol=0)
    greedy = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False,
                             eos_token_id=None)
    assert greedy.tolist() == gpt.generate(ours, IDS, 12, temperature=0).tolist()
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in (text, " leading", "trailing  ", "\t\n\r\n", "1234567", "", "unseen Ωδ words", text[::-1]):
        ids = tokenizer.encode(sample)
        assert peer(sample)["input_ids"] == ids and peer.decode(ids, clean_up_tokenization_spaces=False) == sample
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (tokenizer.eot_id, tokenizer.pad_id, 300)
    assert peer("a<|endoftext|>b")["input_ids"] == tokenizer.encode("a<|endoftext|>b", allowed_special="all")
    theirs.save_pretrained(tmp_path / "again")
    again = load_gpt2(tmp_path / "again")
    assert torch.equal(again(IDS), ours(IDS))


@pytest.mark.peer
def test_gpt2s_own_tokenizer_loads_in_transformers(tmp_path, gpt2_tokenizer):
    """The export of tiktoken's vocabulary gives the same ids through AutoTokenizer."""
    transformers = pytest.importorskip("transformers")
    config = gpt.GPTConfig(50257, 8, 8, 2, 1, qkv_bias=True, tie_weights=True)
    export_gpt2(gpt.GPTModel(config), tmp_path, gpt2_tokenizer)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("Hello, world. Is this-- a test?", "naïve 日本語 🙂🙂", "  spaces \n\n\t", "x=1;y=23456"):
        assert peer(sample)["input_ids"] == gpt2_tokenizer.encode(sample)
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (50256, 50256, 50257)
