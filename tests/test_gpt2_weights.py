"""GPT-2 weights in and out: both formats against hand-made files, the self-test, the download, and the peers."""

import dataclasses
import functools
import hashlib
import http.server
import json
import math
import os
import struct
import tempfile
import threading
from pathlib import Path

import gpt  # before torch, because it filters a warning
import pytest
import torch

import data
import gpt2_weights
from gpt2_weights import export_gpt2, load_gpt2, main, read_tf_checkpoint
from tokenizer import BPETokenizer, WordTokenizer

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


@pytest.mark.parametrize("prefix, dtype", [("", torch.float32), ("transformer.", torch.bfloat16)])
def test_logits_are_those_of_gpt2_written_out(prefix, dtype, tmp_path):
    """With and without the prefix, in two precisions, masks ignored: logits equal the matrix products by hand."""
    tensors = {name: tensor.to(dtype) for name, tensor in gpt2_tensors().items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    folder = hf_folder(tmp_path, {prefix + name: tensor for name, tensor in {**tensors, **masks}.items()})
    model = load_gpt2(folder)
    assert model.config == TINY and not model.training and model.tok_emb.weight.dtype == torch.float32
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for row in IDS:
        torch.testing.assert_close(model(row[None])[0], gpt2_logits(tensors, row), atol=2e-5, rtol=1e-5)


def test_a_config_with_the_exact_gelu_is_followed(tmp_path):
    """The logits are those of the exact form by hand, and further than the tolerance from the other's."""
    tensors = gpt2_tensors()
    model = load_gpt2(hf_folder(tmp_path, tensors, activation_function="gelu"))
    exact, tanh = (gpt2_logits(tensors, IDS[0], approximate=form) for form in ("none", "tanh"))
    torch.testing.assert_close(model(IDS[:1])[0], exact, atol=2e-5, rtol=1e-5)
    assert (exact - tanh).abs().max() > 2e-4


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


@pytest.mark.parametrize("change, message", [
    ({"h.1.mlp.c_fc.weight": None}, "no tensor 'h.1.mlp.c_fc.weight'"),
    ({"wte.weight": None}, "no tensor 'wte.weight'"),
    ({"h.2.ln_1.weight": torch.ones(48)}, "unknown tensor 'h.2.ln_1.weight'"),
    ({"h.0.attn.c_attn.weight": torch.ones(144, 48)}, r"'trf_blocks.0.attn.qkv.weight'.*\(48, 144\).*\(144, 48\)"),
    ({"h.0.attn.c_attn.weight": torch.ones(1, 144, 48)}, r"attn.qkv.weight' has the shape \(1, 144, 48\)"),
    ({"wte.weight": torch.ones(100, 48)}, r"'tok_emb.weight' has the shape \(100, 48\), the model \(101, 48\)"),
    ({"wte.weight": torch.ones(())}, r"'tok_emb.weight' has the shape \(\)"),
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


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    """One line with the path."""
    folder = hf_folder(tmp_path, gpt2_tensors())
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_gpt2(folder)


def test_without_a_config_only_a_published_name_is_enough(small_gpt2, tmp_path):
    """The name gives the sizes, and weights that do not have them are refused; a folder needs its config.json."""
    wanted = bits(load_gpt2(small_gpt2))
    (small_gpt2 / "config.json").unlink()
    assert bits(load_gpt2("gpt2")) == wanted
    with pytest.raises(ValueError, match="no config.json beside it"):
        load_gpt2(small_gpt2)


def sharded(folder, tensors):
    """Return `folder` after writing tensors to two files, and an index that names them."""
    hf_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    ordered, weight_map = sorted(tensors), {}
    for name, part in (("a.safetensors", ordered[:9]), ("z.safetensors", ordered[9:])):
        gpt.write_safetensors(folder / name, {key: tensors[key] for key in part})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_a_tensor_is_taken_from_the_file_that_the_index_gives(tmp_path):
    """Files may hold tensors of an older checkpoint too (vllm, pull request 54230), which count for nothing.

    Nor do files beside them; a missing one is named."""
    old, new = gpt2_tensors(seed=1), gpt2_tensors()
    folder = sharded(tmp_path / "in", new)
    gpt.write_safetensors(folder / "model-00001-of-00003.safetensors", old)
    wanted = bits(load_gpt2(hf_folder(tmp_path / "whole", new)))
    assert bits(load_gpt2(folder)) == bits(load_gpt2(folder / "model.safetensors.index.json")) == wanted
    for file, other in (("a.safetensors", "z.safetensors"), ("z.safetensors", "a.safetensors")):
        named = gpt.read_safetensors(folder / file)[0]
        stale = [name for name in gpt.read_safetensors(folder / other)[0] if name not in named][:3]
        named = {name: tensor.clone() for name, tensor in named.items()}
        gpt.write_safetensors(folder / file, {**named, **{name: old[name] for name in stale}})
        assert bits(load_gpt2(folder)) == wanted
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"].update({"wte.weight": "a.safetensors", "h.0.ln_1.bias": "lost.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="a.safetensors: no tensor 'wte.weight', which the index places there"):
        load_gpt2(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.transformer."])
def test_names_of_a_wrapper_are_read_without_it(prefix, tmp_path):
    """What torch.compile, DataParallel and Lightning put in front of every name; two of one name are refused."""
    tensors = gpt2_tensors()
    wanted = bits(load_gpt2(hf_folder(tmp_path / "plain", tensors)))
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    assert bits(load_gpt2(hf_folder(tmp_path / "wrapped", wrapped))) == wanted
    with pytest.raises(ValueError, match="a second tensor 'wpe.weight', as"):
        load_gpt2(hf_folder(tmp_path / "both", {**wrapped, "wpe.weight": tensors["wpe.weight"]}))


def test_a_tied_matrix_may_be_stored_under_the_heads_name(tmp_path):
    """safetensors' save_model keeps one name of a shared matrix, lm_head.weight too (transformers, issue 38870)."""
    tensors = gpt2_tensors()
    wanted = bits(load_gpt2(hf_folder(tmp_path / "plain", tensors)))
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    assert bits(load_gpt2(hf_folder(tmp_path / "head", tensors))) == wanted
    with pytest.raises(ValueError, match="no tensor 'wte.weight'"):
        load_gpt2(hf_folder(tmp_path / "untied", tensors, tie_word_embeddings=False))


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"wte.weight": "../x.safetensors"}}',
    '{"weight_map": {"wte.weight": "/x.safetensors"}}', '{"weight_map": {"wte.weight": 3}}'])
def test_an_index_that_names_no_files_beside_it_is_refused(index, tmp_path):
    """One line with the path; a file outside the folder is never opened."""
    folder = sharded(tmp_path, gpt2_tensors())
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match="index.json: its weight_map must give the name of a file beside it"):
        load_gpt2(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gpt2.pth"])
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




# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's TensorFlow checkpoint, written here by hand


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
    return bytes(out) + len(restarts or [0]).to_bytes(4, "little") + bytes([kind]) + b"crc "  # which is not read


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


def entry(tensor, offset, dtype=1, shard=0, extra=b""):
    """Return the BundleEntryProto of a tensor."""
    shape = b"".join(field(2, field(1, n)) for n in tensor.shape)
    places = (field(3, shard) if shard else b"") + (field(4, offset) if offset else b"")  # a 0 is not written
    size = tensor.numel() * tensor.element_size()
    return field(1, dtype) + field(2, shape) + places + field(5, size) + field(6, ("fixed", 7)) + extra


HEADER = field(1, 1) + field(3, field(1, 1))  # one shard, little-endian, version 1


def openai_name(name):
    """Return OpenAI's name for one of Hugging Face's, spelled out apart from the code under test."""
    if name.startswith("h."):
        _, layer, *rest = name.split(".")
        rest[-1] = {"weight": "g" if rest[0].startswith("ln") else "w", "bias": "b"}[rest[-1]]
        return "/".join(["model", "h" + layer, *rest])
    return {"wte.weight": "model/wte", "wpe.weight": "model/wpe", "ln_f.weight": "model/ln_f/g",
            "ln_f.bias": "model/ln_f/b"}[name]


def bundle(folder, tensors, header=HEADER, entries=None, kind=0, name="model.ckpt", **hparams):
    """Return `folder` after writing an OpenAI checkpoint; `entries` changes {name: bytes} of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    named, data = {}, bytearray()
    for key, tensor in sorted((openai_name(key), tensor) for key, tensor in tensors.items()):
        tensor = tensor[None] if key.endswith("/w") else tensor  # (1, in, out)
        named[key] = entry(tensor, len(data))
        data += bytes(gpt.tensor_bytes(tensor.contiguous()))
    pairs = [(b"", header)] + [(key.encode(), value) for key, value in sorted({**named, **(entries or {})}.items())]
    (folder / f"{name}.index").write_bytes(table(pairs, kind=kind))
    (folder / f"{name}.data-00000-of-00001").write_bytes(data)
    V, C = tensors["wte.weight"].shape
    layers = sum(key.endswith("ln_1.bias") for key in tensors)
    described = {"n_vocab": V, "n_ctx": len(tensors["wpe.weight"]), "n_embd": C, "n_head": 4, "n_layer": layers}
    (folder / "hparams.json").write_text(json.dumps({**described, **hparams}), encoding="utf-8")
    return folder


def test_both_formats_give_the_same_bits(tmp_path):
    """The same numbers as a TensorFlow checkpoint and as safetensors, over several blocks and shortened keys."""
    tensors = gpt2_tensors()
    ours = load_gpt2(bundle(tmp_path / "tf", tensors))
    assert bits(ours) == bits(load_gpt2(hf_folder(tmp_path / "hf", tensors))) and ours.config == TINY
    found, hparams = read_tf_checkpoint(tmp_path / "tf")
    assert hparams["n_embd"] == 48 and found["model/h0/attn/c_attn/w"].shape == (1, 48, 144)
    assert bits(load_gpt2(tmp_path / "tf" / "model.ckpt.index")) == bits(ours)


def test_a_damaged_index_ends_in_one_line(tmp_path):
    """Every byte flipped, every length: a ValueError with the path, or tensors that fit, and nothing else."""
    bundle(tmp_path, {name: tensor for name, tensor in gpt2_tensors(C=8, L=1).items() if name.startswith("w")})
    path = tmp_path / "model.ckpt.index"
    content, refused = path.read_bytes(), 0
    damaged = [content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]
               for place in range(len(content))]
    for bad in damaged + [content[:length] for length in range(len(content))]:
        path.write_bytes(bad)
        try:
            read_tf_checkpoint(tmp_path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 700
            refused += 1
    assert refused > len(content)  # the truncated ones, and more


FOUR = torch.zeros(4)


@pytest.mark.parametrize("change, message", [
    (dict(header=field(1, 1) + field(2, 1)), "big-endian"),
    (dict(header=field(1, 2)), "several data files"),
    (dict(header=b"\xff"), "'header'"),
    (dict(kind=1), "compressed"),
    (dict(entries={"model/x": entry(FOUR, 0, dtype=7)}), "'model/x': type 7"),
    (dict(entries={"model/x": entry(FOUR, 0, extra=field(7, b""))}), "'model/x': .*slices"),
    (dict(entries={"model/x": entry(FOUR, 0, shard=1)}), "'model/x': .*data file 1"),
    (dict(entries={"model/x": entry(FOUR, 2**62)}), "'model/x': its shape .* does not fit"),
    (dict(entries={"model/x": entry(FOUR, 2**70)}), "'model/x': .*64 bits"),
    (dict(entries={"model/x": entry(FOUR, 2)}), "'model/x': its shape .* does not fit the 16 bytes at 2"),
    (dict(entries={"model/x": field(1, 1) + field(2, field(2, field(1, 2**62)) * 2) + field(5, 16)}), "/x': its shape"),
    (dict(entries={"model/x": field(1, b"text")}), "'model/x': type"),
    (dict(entries={"model/x": field(1, 1) + field(2, field(2, field(1, 1)) * 99) + field(5, 4)}), "/x': its shape"),
    (dict(entries={"model/x": b"\x0b"}), "'model/x': 3"),
    (dict(entries={"model/x": b"\x12\x7f"}), "'model/x': .*cut off"),
    (dict(entries={"model/x": b"\x80"}), "'model/x': .*out of range"),
    (dict(n_embd=7), "n_heads"),
    (dict(n_layer=2), "no tensor 'h.1.ln_1.weight'"),
])
def test_a_checkpoint_that_breaks_a_rule_is_refused(change, message, tmp_path):
    """Impossible content: the message names the rule and the tensor, and no memory is claimed for it."""
    with pytest.raises(ValueError, match=message):
        load_gpt2(bundle(tmp_path, gpt2_tensors(C=8, L=1), **change))


def test_of_several_checkpoints_the_named_one_is_taken(tmp_path):
    """Fault 36: model-200.index beside model-100.index, by its name; a folder of two is refused."""
    for seed, name in ((1, "model-100"), (2, "model-200")):
        bundle(tmp_path / "both", gpt2_tensors(seed=seed), name=name)
    with pytest.raises(ValueError, match="one .index file, not 2; name the one to read"):
        load_gpt2(tmp_path / "both")
    out = tmp_path / "out.safetensors"
    assert main(["import", "--source", str(tmp_path / "both" / "model-100.index"), "--out", str(out)]) == 0
    assert bits(gpt.load_checkpoint(out)[0]) == bits(load_gpt2(bundle(tmp_path / "one", gpt2_tensors(seed=1))))


# ---------------------------------------------------------------------------------------------------------------------
# Published sizes by name, the self-test and the command line


@pytest.fixture
def small_gpt2(tmp_path, monkeypatch):
    """Return the folder of a tiny model that stands in for "gpt2" in a $DATA_DIR of its own."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    folder = hf_folder(tmp_path / "gpt2" / "gpt2", gpt2_tensors())
    published = gpt2_weights.PUBLISHED["gpt2"]._replace(
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2", published)
    monkeypatch.setitem(gpt.GPT_CONFIGS, "gpt2", TINY)
    return folder


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


def test_without_the_files_the_check_says_that_it_could_not(tmp_path, monkeypatch, capsys):
    """Nothing was verified, so this is no success; the line names the command that helps."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert main(["check"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "could not check" in error and "gpt2_weights.py get --model gpt2" in error


def test_check_tells_right_weights_from_wrong_ones(small_gpt2, monkeypatch, capsys, gpt2_tokenizer, real_data):
    """Random weights under GPT-2's name: FAIL and status 1; with their own losses as the published ones: pass."""
    config = gpt.GPTConfig(50257, 300, 8, 2, 1, qkv_bias=True, tie_weights=True)
    hf_folder(small_gpt2, gpt2_tensors(V=50257, T=300, C=8, L=1), vocab_size=50257, n_positions=300, n_embd=8, n_head=2,
              n_layer=1)
    monkeypatch.setitem(gpt.GPT_CONFIGS, "gpt2", config)
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2", gpt2_weights.PUBLISHED["gpt2"]._replace(sha256=""))
    text = real_data("the-verdict.txt").read_bytes()
    (small_gpt2.parent.parent / "the-verdict.txt").write_bytes(text)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("FAIL  ") for line in lines) and "3.7547" in lines[0]
    model, text, losses = load_gpt2("gpt2"), text.decode(), []
    for part in (text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]):
        ids = torch.tensor(gpt2_tokenizer.encode(part))
        n = (len(ids) - 1) // 256 * 256
        assert n == (512 if losses else 4608)  # the book's 18 and 2 windows
        with torch.no_grad():
            logits = model(ids[:n].view(-1, 256))
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1 : n + 1]).item())
    monkeypatch.setitem(gpt2_weights.PUBLISHED, "gpt2",
                        gpt2_weights.PUBLISHED["gpt2"]._replace(losses=tuple(losses)))
    assert main(["check"]) == 0 and capsys.readouterr().out.count("pass  ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_real_weights_pass_the_self_test(name, real_data, capsys):
    """Where GPT-2's own weights lie in $DATA_DIR, everything that `check` compares is as published."""
    if gpt2_weights.find_gpt2(name) is None:
        pytest.skip(f"the weights of {name} are not in {gpt2_weights.gpt2_root()}")
    real_data("the-verdict.txt")
    assert main(["check", "--model", name]) == 0 and "FAIL" not in capsys.readouterr().out


def test_import_makes_a_checkpoint_of_ours(small_gpt2, tmp_path, capsys):
    """Weights, the tokenizer beside them and the template of our own export; the checkpoint then stands alone."""
    tokenizer = BPETokenizer.train(["low lower lowest newer wider " * 5], 262, ("<|endoftext|>", "<|pad|>"))
    config = dataclasses.replace(TINY, vocab_size=262)
    model = gpt.GPTModel(config)
    gpt.save_checkpoint(tmp_path / "own.safetensors", model, tokenizer, template="chat")
    assert main(["export", "--source", str(tmp_path / "own.safetensors"), "--out", str(tmp_path / "hf")]) == 0
    out = tmp_path / "out.safetensors"
    assert main(["import", "--source", str(tmp_path / "hf"), "--out", str(out)]) == 0
    loaded, again, info = gpt.load_checkpoint(out)
    assert loaded.config == config and info["source"] == str(tmp_path / "hf") and info["template"] == "chat"
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    assert again.encode("lowest pad") == tokenizer.encode("lowest pad") and again.pad_id == tokenizer.pad_id == 261
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as older versions of transformers wrote it
        (tmp_path / "hf" / name).unlink()
    assert main(["import", "--source", str(tmp_path / "hf"), "--out", str(out)]) == 2  # never over a file
    assert "exists; give another --out" in capsys.readouterr().err
    out = tmp_path / "without.safetensors"
    assert main(["import", "--source", str(tmp_path / "hf"), "--out", str(out)]) == 0
    assert gpt.load_checkpoint(out)[1] is None and "imported without a tokenizer" in capsys.readouterr().err


def imported(folder, capsys):
    """Return (model, tokenizer or None, stderr) of what `import` makes of a folder."""
    out = Path(tempfile.mkdtemp(dir=folder.parent)) / "out.safetensors"
    assert main(["import", "--source", str(folder), "--out", str(out)]) == 0
    model, tokenizer, _ = gpt.load_checkpoint(out)
    return model, tokenizer, capsys.readouterr().err


def test_an_own_tokenizer_is_never_replaced_by_gpt2s(tmp_path, capsys, gpt2_tokenizer):
    """Fault 3: tokenizer.json alone with 350 own tokens beside 50,257 rows: its own, cropped to it with a word.

    GPT-2's comes only where no tokenizer is there at all, and only for its own number of rows."""
    shape = dict(vocab_size=50257, n_positions=8, n_embd=8, n_head=2, n_layer=1)
    folder = hf_folder(tmp_path / "own", gpt2_tensors(V=50257, T=8, C=8, L=1), **shape)
    own = BPETokenizer.train(["low lower lowest newer wider " * 5], 265)
    gpt2_weights.export_tokenizer(own, folder, 8)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    model, tokenizer, error = imported(folder, capsys)
    assert tokenizer.encode("the lowest") == own.encode("the lowest") and tokenizer.vocab_size == own.vocab_size
    assert model.config.vocab_size == own.vocab_size == len(model.out_head.weight)
    assert f"50257 rows cropped to the tokenizer's {own.vocab_size} tokens" in error
    (folder / "tokenizer.json").write_text("{}")
    model, tokenizer, error = imported(folder, capsys)
    assert tokenizer is None and "imported without a tokenizer: " in error and "tokenizer.json" in error
    assert model.config.vocab_size == 50257
    (folder / "tokenizer.json").unlink()
    assert imported(folder, capsys)[1].encode("Hello, world") == [15496, 11, 995]
    folder = hf_folder(tmp_path / "padded", gpt2_tensors(V=50304, T=8, C=8, L=1), **{**shape, "vocab_size": 50304})
    model, tokenizer, error = imported(folder, capsys)
    assert tokenizer is None and "holds no tokenizer.json or vocab.json" in error and model.config.vocab_size == 50304


def test_a_tokenizer_larger_than_the_model_is_left_out(tmp_path, capsys):
    """Its last ids would be outside the embedding: the weights are imported, the tokenizer is not."""
    folder = hf_folder(tmp_path, gpt2_tensors())
    gpt2_weights.export_tokenizer(BPETokenizer([]), folder, 16)
    model, tokenizer, error = imported(folder, capsys)
    assert tokenizer is None and "its tokenizer has 257 tokens, the model 101 rows" in error and error.count("\n") == 1
    assert bits(model) == bits(load_gpt2(folder))


@pytest.mark.parametrize("lost, name, content, message", [
    ((), "tokenizer_config.json", {"add_prefix_space": True}, "tokenizer_config.json: add_prefix_space is set"),
    (("tokenizer.json",), "tokenizer_config.json", {"add_bos_token": True}, "add_bos_token is set"),
    (("tokenizer.json",), "tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is set"),
    (("tokenizer.json",), "added_tokens.json", {"[PAD]": 265}, "added_tokens.json holds tokens that"),
    ((), "tokenizer.json", {"added_tokens": []}, "tokenizer.json cannot be read as GPT-2's kind"),
    ((), "tokenizer_config.json", {"add_bos_token": True}, ""), ((), "added_tokens.json", {"[PAD]": 265}, "")])
def test_every_part_of_a_foreign_tokenizer_counts(lost, name, content, message, tmp_path, capsys):
    """Faults 4 and 30: what makes transformers give other ids leaves the tokenizer out with a word, weights come whole.

    With a tokenizer.json beside them, transformers reads neither added_tokens.json nor add_bos_token."""
    own = BPETokenizer.train(["low lower lowest newer wider " * 5], 265)
    folder = hf_folder(tmp_path / "in", gpt2_tensors(V=266), vocab_size=266)
    gpt2_weights.export_tokenizer(own, folder, 16)
    for file in lost:
        (folder / file).unlink()
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    model, tokenizer, error = imported(folder, capsys)
    assert message in error and error.count("\n") == 1
    assert (tokenizer is None) == bool(message) and len(model.tok_emb.weight) == (266 if message else own.vocab_size)


@pytest.mark.parametrize("argv, status, message", [
    (["get", "--model", "gpt5"], 2, "invalid choice"), (["fetch"], 2, "unknown command"),
    (["get", "--modle", "x"], 2, "did you mean --model"),
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
    model = ready_model(config)
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
        assert "exists; give another --out" in capsys.readouterr().err
    assert checkpoint.read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_the_tokenizer_of_gpt2_is_exported_whole(tmp_path, gpt2_tokenizer):
    """vocab.json and merges.txt hold what OpenAI's two files hold, and give the ids that were published."""
    from tiktoken.load import read_file_cached
    gpt2_weights.export_tokenizer(gpt2_tokenizer, tmp_path, 1024)
    again = BPETokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert again.encode("Hello, world. Is this-- a test?") == [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]
    folder = f"{gpt2_weights.OPENAI}/encodings/main"
    encoder, merges = (read_file_cached(f"{folder}/{name}") for name in ("encoder.json", "vocab.bpe"))
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(encoder)
    assert (tmp_path / "merges.txt").read_bytes() == merges
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(whole["model"]["merges"]) == 50_000 and whole["added_tokens"][0]["id"] == 50256


def test_no_tokenizer_of_another_export_stays_beside_a_model(tmp_path):
    """transformers would load it with the new weights; the folder is named and nothing in it has changed."""
    tokenizer = BPETokenizer.train(["low lower lowest newer wider " * 5], 260)
    own = gpt.GPTModel(dataclasses.replace(TINY, vocab_size=260))
    export_gpt2(own, tmp_path, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds vocab.json, .*, tokenizer_config.json of another export"):
        export_gpt2(gpt.GPTModel(TINY), tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 260}')  # of an old version of transformers
    with pytest.raises(ValueError, match="holds added_tokens.json of another export"):
        export_gpt2(own, tmp_path, tokenizer)
    (tmp_path / "added_tokens.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_gpt2(own, tmp_path, tokenizer)  # the same files again


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def read_gguf(path):
    """Return (metadata, {tensor name: (type, sizes, bytes)}) of a GGUF file, read by its specification."""
    data, at = path.read_bytes(), 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def string():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind):
        if kind == 9:
            kind, count = take("IQ")
            return [value(kind) for _ in range(count)]
        return string() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert data[:4] == b"GGUF"
    at = 4
    version, tensor_count, count = take("IQQ")
    assert version == 3
    metadata = {string(): value(take("I")) for _ in range(count)}
    infos = [(string(), [take("Q") for _ in range(take("I"))], *take("IQ")) for _ in range(tensor_count)]
    start, tensors = at + -at % 32, {}
    for (name, sizes, kind, offset), following in zip(infos, [*infos[1:], None]):
        assert offset % 32 == 0
        end = start + following[3] if following else len(data)
        tensors[name] = kind, sizes, data[start + offset : end]
    return metadata, tensors


def numbers_of(kind, sizes, data):
    """Return the tensor stored in a GGUF file as type 0 (float32), 1 (float16) or 8 (blocks of 34 bytes)."""
    count = math.prod(sizes)
    if kind == 8:
        blocks = [struct.unpack_from("<e32b", data, start) for start in range(0, count // 32 * 34, 34)]
        flat = torch.tensor([[scale * number for number in numbers] for scale, *numbers in blocks])
    else:
        flat = torch.tensor(struct.unpack_from(f"<{count}{'fe'[kind]}", data))
    return flat.reshape(sizes[::-1])


def ready_model(config, seed=0):
    """Return a model in eval mode whose biases and norms are random too, and whose logits lie far apart."""
    torch.manual_seed(seed)
    model = gpt.GPTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


TEXT = "Tom has 12 red balls, and Mia's dog (Bo) isn't here.\n\n  Naïve café – 日本 🙂 the the the "


@pytest.mark.parametrize("tied, bias", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_gguf_file_holds_the_model(tied, bias, dtype, tmp_path):
    """Read back by the specification: hyperparameters, tokens, merges, and every weight within its type's rounding."""
    tokenizer = BPETokenizer.train([TEXT * 3], 300, ("<|endoftext|>", "<|pad|>"))
    config = gpt.GPTConfig(300, 24, 48 if dtype == "q8_0" else 36, 4, 2, qkv_bias=bias, tie_weights=tied)
    model = ready_model(config)
    gpt2_weights.export_gguf(model, tmp_path / "m.gguf", tokenizer, dtype, "{{ template }}")
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    C = config.emb_dim
    wanted = {"context_length": 24, "embedding_length": C, "feed_forward_length": 4 * C, "block_count": 2,
              "attention.head_count": 4, "attention.layer_norm_epsilon": struct.unpack("f", struct.pack("f", 1e-5))[0]}
    assert {key[5:]: value for key, value in metadata.items() if key.startswith("gpt2.")} == wanted
    assert metadata["general.architecture"] == metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.tokens"] == [*tokenizer.names, "<|endoftext|>", "<|pad|>"]
    assert metadata["tokenizer.ggml.token_type"] == [1] * 298 + [3, 3]  # normal, control
    assert metadata["tokenizer.ggml.merges"] == tokenizer.merges and not metadata["tokenizer.ggml.add_bos_token"]
    ids = [metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")]
    assert ids == [298, 298, 299] and metadata["tokenizer.chat_template"] == "{{ template }}"
    state = model.state_dict()
    parts = {"attn_norm": "ln1", "attn_qkv": "attn.qkv", "attn_output": "attn.out_proj", "ffn_norm": "ln2",
             "ffn_up": "ffn.fc1", "ffn_down": "ffn.fc2"}
    ours = {"token_embd.weight": "tok_emb.weight", "position_embd.weight": "pos_emb.weight",
            "output_norm.weight": "final_norm.weight", "output_norm.bias": "final_norm.bias"}
    ours |= {f"blk.{i}.{theirs}.{kind}": f"trf_blocks.{i}.{name}.{kind}"
             for i in range(2) for theirs, name in parts.items() for kind in ("weight", "bias")}
    ours |= {} if tied else {"output.weight": "out_head.weight"}
    assert tensors.keys() == ours.keys()
    for name, (kind, sizes, data) in tensors.items():
        found, right = numbers_of(kind, sizes, data), state.get(ours[name], torch.zeros(3 * C))
        vector = right.dim() == 1 or name.startswith("position")
        fits = sizes[0] % 32 == 0  # 192, the rows of ffn_down, but not 48
        assert kind == (0 if vector else {"f32": 0, "f16": 1, "q8_0": 8 if fits else 1}[dtype])
        if kind == 8:
            step = right.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert ((found - right).reshape(-1, 32).abs() <= 0.51 * step + 127 * step * 2**-11).all()
        else:
            torch.testing.assert_close(found, right, rtol=2**-11 * kind, atol=6e-8 * kind)


def test_what_llama_cpp_cannot_run_is_not_exported(tmp_path, capsys):
    """One line for each, and no file: no tokenizer, no end token, ambiguous or huge numbers."""
    bpe, path = BPETokenizer([], ("<|endoftext|>",)), tmp_path / "m.gguf"
    config = dataclasses.replace(TINY, vocab_size=257)
    plain, huge = gpt.GPTModel(config), gpt.GPTModel(dataclasses.replace(config, tie_weights=False))
    huge.out_head.weight.data[0, 0] = 7e4
    for model, tokenizer, dtype, message in (
            (plain, None, "f16", "llama.cpp needs a tokenizer"), (plain, bpe, "q4_0", "dtype 'q4_0' is none of f32"),
            (plain, BPETokenizer([], ("</s>",)), "f16", "the tokenizer has no .*endoftext"),
            (gpt.GPTModel(dataclasses.replace(config, vocab_size=258)), BPETokenizer([], ("<|endoftext|>", "a")), "f16",
             "has the text of another token"), (huge, bpe, "f16", "output.weight has weights too large for f16")):
        with pytest.raises(ValueError, match=message):
            gpt2_weights.export_gguf(model, path, tokenizer, dtype)
    gpt2_weights.export_gguf(huge, tmp_path / "huge.gguf", bpe, "f32")
    assert [file.name for file in tmp_path.iterdir()] == ["huge.gguf"]


def test_the_export_command_writes_gguf(tmp_path, capsys):
    """With the chat template of tuned models; a file is never replaced, and flags that do not belong are refused."""
    tokenizer = BPETokenizer.train([TEXT * 3], 300)
    model = gpt.GPTModel(dataclasses.replace(TINY, vocab_size=300, exact_gelu=True))
    source, out = str(tmp_path / "m.safetensors"), str(tmp_path / "out" / "m.gguf")
    gpt.save_checkpoint(source, model, tokenizer, template="plain")
    assert main(["export", "--source", source, "--format", "gguf", "--out", out]) == 0
    assert "m.gguf: 0." in (said := capsys.readouterr().out) and "tanh form" in said
    metadata, tensors = read_gguf(Path(out))
    assert metadata["general.file_type"] == 1 and tensors["blk.0.ffn_up.weight"][0] == 1
    template = metadata["tokenizer.chat_template"]
    assert '"\\n>"' in template and "eos_token" in template
    for argv in (["--format", "gguf", "--out", out], ["--format", "gguf"], ["--out", out], ["--dtype", "f16"]):
        assert main(["export", "--source", source, *argv]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Download, from a server on this machine


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Return a web server of the files in tmp_path/web, with its address and the paths that were asked for."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *args):
            server.requests.append(self.path)

    monkeypatch.setattr(data, "BACKOFF", (0.01, 0.01))
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests, server.host = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PINNED = "openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e"


def test_get_downloads_checks_and_then_leaves_it_alone(server, small_gpt2, tmp_path, capsys, monkeypatch):
    """From the host that HF_ENDPOINT names, at the pinned revision; the second call finds the file."""
    monkeypatch.setenv("HF_ENDPOINT", server.host + "/")
    content = (small_gpt2 / "model.safetensors").read_bytes()
    (tmp_path / "web" / PINNED).mkdir(parents=True)
    (small_gpt2 / "model.safetensors").rename(tmp_path / "web" / PINNED / "model.safetensors")
    for _ in range(2):
        assert main(["get"]) == 0
        assert str(small_gpt2) in capsys.readouterr().out
    assert server.requests == [f"/{PINNED}/model.safetensors"]
    assert (small_gpt2 / "model.safetensors.sha256").read_text().split() == [hashlib.sha256(content).hexdigest(),
                                                                              "model.safetensors"]


def test_a_download_with_another_sha256_is_refused(server, small_gpt2, tmp_path, capsys, monkeypatch):
    """Nothing stays under the final name."""
    monkeypatch.setenv("HF_ENDPOINT", server.host)
    (small_gpt2 / "model.safetensors").unlink()
    (tmp_path / "web" / PINNED).mkdir(parents=True)
    (tmp_path / "web" / PINNED / "model.safetensors").write_bytes(b"something else")
    assert main(["get"]) == 1 and "sha256" in capsys.readouterr().err
    assert not (small_gpt2 / "model.safetensors").exists()


def test_where_hugging_face_cannot_be_reached_openai_is_asked(server, small_gpt2, monkeypatch, tmp_path):
    """The TensorFlow checkpoint arrives file by file, hparams.json last, and gives the same model."""
    wanted = bits(load_gpt2("gpt2"))
    for path in small_gpt2.iterdir():
        path.unlink()
    bundle(tmp_path / "web" / "models" / "124M", gpt2_tensors())
    monkeypatch.setattr(gpt2_weights, "OPENAI", server.host)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert bits(load_gpt2("gpt2")) == wanted
    assert server.requests[-1] == "/models/124M/hparams.json"


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
    tokenizer = BPETokenizer.train([TEXT * 3], 300, ("<|endoftext|>", "<|pad|>"), split_digits=True)
    ours = ready_model(gpt.GPTConfig(tokenizer.vocab_size, 32, 48, 4, 3, qkv_bias=bias, tie_weights=tied))
    export_gpt2(ours, tmp_path, tokenizer, data.chat_template("alpaca"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.config.tie_word_embeddings == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs.eval()(IDS).logits, atol=1e-4, rtol=0)
    greedy = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False,
                             eos_token_id=None)
    assert greedy.tolist() == gpt.generate(ours, IDS, 12, temperature=0).tolist()
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in set(HARD) - {"<|endoftext|>"}:
        ids = tokenizer.encode(sample)
        assert peer(sample)["input_ids"] == ids and peer.decode(ids, clean_up_tokenization_spaces=False) == sample
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (tokenizer.eot_id, tokenizer.pad_id, 300)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = data.format_prompt({"prompt": "What is 2 + 3?"}, "alpaca")
    assert peer.apply_chat_template(messages, tokenize=False) == prompt
    assert peer("a<|endoftext|>b")["input_ids"] == tokenizer.encode("a<|endoftext|>b", allowed_special="all")
    theirs.save_pretrained(tmp_path / "again")
    again = load_gpt2(tmp_path / "again")
    assert torch.equal(again(IDS), ours(IDS))


@pytest.mark.peer
@pytest.mark.parametrize("change", ["saved again", "[PAD] added", "trained anew"])
def test_what_transformers_saved_comes_back(change, tmp_path, capsys):
    """Faults 30 and 31: weights are imported in any case; the tokenizer gives the same ids, or a note says why not."""
    transformers = pytest.importorskip("transformers")
    text = "low lower lowest newer wider, Mia's 12 dogs "
    export_gpt2(gpt.GPTModel(dataclasses.replace(TINY, vocab_size=280)), tmp_path / "ours",
                BPETokenizer.train([text * 5], 280, split_digits=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    if change == "[PAD] added":
        peer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(peer))
    if change == "trained anew":
        peer = peer.train_new_from_iterator([text * 5], 270)  # its special tokens come first
    (tmp_path / "theirs").mkdir()
    model.save_pretrained(tmp_path / "theirs")
    peer.save_pretrained(tmp_path / "theirs")
    ours, tokenizer, error = imported(tmp_path / "theirs", capsys)
    rows = model.get_input_embeddings().weight
    assert torch.equal(ours.tok_emb.weight, rows[: ours.config.vocab_size])
    if tokenizer is None:
        assert "imported without a tokenizer: " in error and len(ours.tok_emb.weight) == len(rows)
    else:
        assert tokenizer.vocab_size == len(peer) == ours.config.vocab_size
        for sample in (text, "  Wider\n\n", "naïve 日本 123"):
            assert tokenizer.encode(sample) == peer(sample)["input_ids"]
    assert (tokenizer is None) == (change == "trained anew")


@pytest.mark.peer
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_the_chat_template_words_a_conversation_as_tuning_does(template):
    """By Jinja as transformers and llama-cpp-python set it up: prompt, answer and end as in encode_entries."""
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    jinja = environment.from_string(data.chat_template(template))
    asked, answered = 'Say "\\n" in 日本\nnow', " Yes.\n"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt = data.format_prompt({"prompt": asked}, template)
    assert jinja.render(messages=messages[:1], add_generation_prompt=True) == prompt
    whole = prompt + data.format_response(answered, template) + "<|endoftext|>"
    assert jinja.render(messages=messages + messages[:1], eos_token="<|endoftext|>") == whole + prompt


HARD = (TEXT, " leading", "trailing  ", "\t\n\r\n", "1234567 890", "3.14 and 2,718", "unseen Ωδ words", "x=1;y=23456",
        "don't we'll I'VE they're", "日本語のテキスト", "🙂🙂 👨‍👩‍👧", "a\u00a0b\u3000c", "½ Ⅷ ٣٤", "e\u0301te",
        "\x1c\x1f|", "snake_case()", "  two  spaces\n\n\nlines", "<|endoftext|>", "ſ ʼn 'ſ", "tab\tbed\r\nline",
        "--__--", " \n x", "\u200b zero", "")


def own_model():
    """Return (model, tokenizer) with 400 own tokens, trained until it is sure of the text that it has seen."""
    text = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    tokenizer = BPETokenizer.train([TEXT * 3, text], 400, split_digits=True)
    ids = torch.tensor(tokenizer.encode(text))
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(400, 64, 64, 4, 2, drop_rate=0.0, tie_weights=True, exact_gelu=True))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        starts = torch.randint(len(ids) - 65, (16, 1))
        windows = ids[starts + torch.arange(65)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval(), tokenizer


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["GPT-2's tokenizer, random", "own tokenizer, trained"])
def test_llama_cpp_computes_the_same(kind, tmp_path, gpt2_tokenizer):
    """Same ids for 24 hard texts, same greedy tokens for 20 prompts in f32 (but at ties), perplexity within 1%."""
    llama_cpp = pytest.importorskip("llama_cpp")
    random = ready_model(gpt.GPTConfig(50257, 64, 64, 4, 3, qkv_bias=True, tie_weights=True))
    random.final_norm.weight.data.mul_(4)  # sure of its choices
    model, tokenizer = own_model() if kind.startswith("own") else (random, gpt2_tokenizer)
    text = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    ids, perplexities = tokenizer.encode(text), {}
    prompts = [ids[97 * i : 97 * i + 8 + i] for i in range(20)]
    for dtype in ("f32", "q8_0"):
        gpt2_weights.export_gguf(model, tmp_path / f"{dtype}.gguf", tokenizer, dtype)
        llama = llama_cpp.Llama(str(tmp_path / f"{dtype}.gguf"), n_ctx=64, n_threads=1, n_threads_batch=1, type_k=0,
                                type_v=0, logits_all=True, verbose=False)  # keys and values in f32 too

        def logits_of(tokens):
            llama.reset()
            llama.eval(tokens)
            return torch.tensor(llama.scores[: len(tokens)])

        assert llama.token_eos() == tokenizer.eot_id and llama.n_vocab() == tokenizer.vocab_size
        for sample in HARD:
            found = llama.tokenize(sample.encode(), add_bos=False) if sample else []
            assert found == tokenizer.encode(sample), sample
            assert llama.detokenize(found).decode() == sample
        assert llama.tokenize(b"a<|endoftext|>", add_bos=False, special=True)[-1] == tokenizer.eot_id
        windows = [ids[i : i + 64] for i in range(0, 640, 64)]
        losses = {"ours": [], "theirs": []}
        for window in windows:
            row = torch.tensor([window])
            losses["ours"].append(-gpt.token_logprobs(model(row), row).mean().item())
            losses["theirs"].append(-gpt.token_logprobs(logits_of(window)[None], row).mean().item())
        perplexities[dtype] = [math.exp(sum(part) / len(part)) for part in losses.values()]
        if dtype == "f32":
            worst = max((logits_of(window) - model(torch.tensor([window]))[0]).abs().max().item() for window in windows)
            assert worst < 0.01 * model(torch.tensor(windows)).std()  # GELU from a table of float16 there
            for prompt in prompts:
                ours = gpt.generate(model, torch.tensor([prompt]), 20, temperature=0)
                best, second = model(ours[:, :-1])[0, len(prompt) - 1 :].topk(2).values.T
                theirs = logits_of(ours[0, :-1].tolist())[len(prompt) - 1 :].argmax(-1)
                sure = best - second > 2 * worst
                assert sure.float().mean() > 0.5 and torch.equal(theirs[sure], ours[0, len(prompt) :][sure])
    print(f"{kind}: largest difference of a logit in f32 {worst:.1e}; perplexity ours, theirs: {perplexities}")
    for ours, theirs in perplexities.values():
        assert abs(theirs / ours - 1) < (0.01 if kind.startswith("own") else 0.02)  # random: perplexity of 8 million


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_the_gguf_package_reads_our_files(dtype, tmp_path):
    """Every tensor, dequantized by the package, and metadata of each kind; its blocks of q8_0 are ours."""
    gguf = pytest.importorskip("gguf")
    tokenizer = BPETokenizer.train([TEXT * 3], 300)
    model = ready_model(gpt.GPTConfig(300, 16, 32, 4, 2, qkv_bias=True, tie_weights=True))
    gpt2_weights.export_gguf(model, tmp_path / "m.gguf", tokenizer, dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.tokens"] == [*tokenizer.names, "<|endoftext|>"]
    assert fields["tokenizer.ggml.merges"] == tokenizer.merges and fields["tokenizer.ggml.eos_token_id"] == 299
    assert fields["gpt2.block_count"] == 2 and abs(fields["gpt2.attention.layer_norm_epsilon"] - 1e-5) < 1e-11
    known = {gguf.TENSOR_NAMES[tensor].format(bid=i) for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
             for i in range(2)}
    assert {tensor.name.rpartition(".")[0] for tensor in reader.tensors} == known - {"output"}
    state = list(model.state_dict().values())
    assert len(reader.tensors) == len(state) - 1
    for tensor, right in zip(reader.tensors, state):
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        step = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 254 + 2**-11}[tensor.tensor_type.name] * right.abs().max()
        assert (found - right).abs().max() <= step * 1.01, tensor.name
        if tensor.tensor_type.name == "Q8_0":
            theirs = torch.from_numpy(gguf.quants.quantize(right.detach().numpy(), tensor.tensor_type))
            difference = theirs.view(torch.int8).int() - torch.from_numpy(tensor.data.copy()).view(torch.int8).int()
            assert (difference != 0).float().mean() < 1e-4 and difference.abs().max() <= 1  # ties round to even here
