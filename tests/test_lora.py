"""Tests of lora.py: what an adapter computes, merging, PEFT's files in both directions, bad input, the command line."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
import lora
from lora import apply_lora, load_lora, lora_disabled, lora_layers, lora_parameters, merge_lora, save_lora, unmerge_lora
from tokenizer import CharTokenizer

ROOT = Path(lora.__file__).parent
GOLDEN = Path(__file__).parent / "fixtures" / "lora"  # an adapter that PEFT wrote, and the logits it gave with it
CONFIG = gpt.GPTConfig(vocab_size=13, context_length=8, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True,
                       tie_weights=True)
IDS = torch.tensor([[1, 7, 3, 12, 5], [2, 2, 9, 0, 4]])


def small_model(seed=0, **changes):
    """Return a GPTModel in eval mode; larger weights than usual, so that an update can be seen in the logits."""
    torch.manual_seed(seed)
    model = gpt.GPTModel(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    return model


def classifier(seed=0, bias=False):
    """Return a small model whose head has three rows and is new."""
    model = small_model(seed, tie_weights=False)
    model.out_head = nn.Linear(CONFIG.emb_dim, 3, bias=bias)
    return model


def shake(model, seed=1):
    """Give every adapter values as if it had been trained, and return the model."""
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def adapted(seed=0, **options):
    return shake(apply_lora(small_model(seed), rank=2, alpha=4, **options))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def test_training_starts_at_the_base_and_never_moves_it():
    """Check 1: B = 0 gives the base's logits bit for bit; only B has a gradient yet; 10 steps leave the base alone."""
    model = small_model()
    before, base = model(IDS), snapshot(model)
    apply_lora(model, rank=2, alpha=4, dropout=0.1).train()
    assert torch.equal(model(IDS), before)  # dropout reaches the adapter alone, and the adapter is zero
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    optimizer, losses = torch.optim.AdamW(lora_parameters(model), lr=0.03), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        if not losses:
            for layer in lora_layers(model).values():
                assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base)


@pytest.mark.parametrize("bias, rslora", [(True, False), (False, True)])
def test_output_is_the_dense_layer_with_the_scaled_product_added(bias, rslora):
    """The fused forward equals W x + b + (alpha / r) B A x in float64, and by_steps with the same dropout."""
    torch.manual_seed(0)
    dense = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    layer = lora.LoRALinear(dense, rank=3, alpha=7, dropout=0.4, rslora=rslora)
    nn.init.normal_(layer.lora_B)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x, scale = torch.randn(2, 4, 6, dtype=torch.float64), 7 / math.sqrt(3) if rslora else 7 / 3
    expected = F.linear(x, dense.weight + scale * layer.lora_B @ layer.lora_A, dense.bias)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], rtol=1e-12, atol=1e-12)  # a single vector
    layer.train()
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(dropped, layer.by_steps(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dropped, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_those_of_the_dense_model_through_the_product(rslora):
    """Check 3: dL/dA = s B^T G and dL/dB = s G A^T, where G = dL/dW of the dense model at the merged weights."""
    model = apply_lora(small_model().double(), rank=2, alpha=3, rslora=rslora)
    shake(model)
    dense = merge_lora(copy.deepcopy(model)).requires_grad_(True)
    scale = 3 / math.sqrt(2) if rslora else 3 / 2
    for network in (model, dense):
        F.cross_entropy(network(IDS).flatten(0, 1), IDS.flip(0).flatten()).backward()
    for name, layer in lora_layers(model).items():
        G = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, scale * layer.lora_B.T @ G, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.lora_B.grad, scale * G @ layer.lora_A.T, rtol=1e-10, atol=1e-10)
        assert layer.weight.grad is None


@pytest.mark.parametrize("rank", [2, 8])
def test_training_finds_the_best_update_of_its_rank(rank):
    """Check 4: fitting a dense change leaves the squared singular values beyond the rank (Eckart and Young 1936)."""
    torch.manual_seed(0)
    dense, change = nn.Linear(12, 10, bias=False, dtype=torch.float64), torch.randn(10, 12, dtype=torch.float64)
    model = apply_lora(nn.Sequential(dense), rank=rank, alpha=rank, dropout=0)
    wanted, eye = dense.weight + change, torch.eye(12, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(lora_parameters(model), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(eye) - wanted.T).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(torch.linalg.svdvals(change)[rank:].square().sum())
    assert best * 0.999999 <= float(closure().detach()) <= 1.01 * best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_float32_adapters(dtype):
    """On a half-precision model and under autocast the adapter trains in float32, the output has the model's type."""
    half = apply_lora(nn.Sequential(nn.Linear(6, 5, dtype=dtype)), rank=2, dropout=0)
    x = torch.randn(3, 6)
    y = shake(half)(x.to(dtype))
    assert y.dtype == dtype and half[0].lora_A.dtype == torch.float32
    merged = merge_lora(copy.deepcopy(half))
    exact = (half[0].weight.double() + 16 * half[0].lora_B.double() @ half[0].lora_A.double()).detach()
    half_unit = 0.51 * torch.finfo(dtype).eps * exact.abs()  # rounded once, at the end
    assert merged[0].weight.dtype == dtype and bool(((merged[0].weight.double() - exact).abs() <= half_unit).all())
    torch.testing.assert_close(merged(x.to(dtype)).float(), y.float(), rtol=0.03, atol=0.03)
    single = shake(apply_lora(nn.Sequential(nn.Linear(6, 5)), rank=2, dropout=0))
    with torch.autocast("cpu", dtype=dtype):
        y = single(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), single(x), rtol=0.03, atol=0.03)
    y.float().sum().backward()
    assert single[0].lora_A.grad.dtype == torch.float32 and single[0].lora_B.grad.any()


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on a model


def test_merged_equals_adapted_and_unmerging_restores_every_bit():
    """Check 2: merging keeps the logits and leaves plain layers; unmerging brings back all bits; twice is refused."""
    base = small_model()
    model = adapted()
    before, logits = snapshot(model), model(IDS)
    assert (logits - base(IDS)).abs().max() > 0.1  # or the rest would show nothing
    assert merge_lora(model) is model
    torch.testing.assert_close(model(IDS), logits, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys() and not any(m.training for m in model.modules())
    assert {type(module) for module in model.modules()} == {type(module) for module in base.modules()}
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(model)
    unmerge_lora(model)
    assert same(model.state_dict(), before) and torch.equal(model(IDS), logits)
    with pytest.raises(ValueError, match="nothing is merged"):
        unmerge_lora(model)
    nn.init.constant_(lora_parameters(model)[-1], math.inf)  # the training has diverged
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(model)


def test_disabled_adapters_leave_the_base_bit_for_bit():
    """Check 2: blocks nest, an exception ends them, and a model without adapters says so."""
    base, model = small_model(), adapted()
    logits, plain = model(IDS), base(IDS)
    with lora_disabled(model):
        assert torch.equal(model(IDS), plain)
        with lora_disabled(model):
            assert torch.equal(model(IDS), plain)
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), logits)
    with contextlib.suppress(KeyError), lora_disabled(model):
        raise KeyError
    assert torch.equal(model(IDS), logits)
    with pytest.raises(ValueError, match=r"no adapters; .* unmerge_lora\(model\)"), lora_disabled(base):
        pass


def test_all_linear_spares_heads_and_tied_layers():
    """Only the blocks' four layers get adapters; a tied head stays the same storage through merging and unmerging."""
    model = adapted()
    assert {name.split(".", 2)[2] for name in lora_layers(model)} == {"attn.qkv", "attn.out_proj", "ffn.fc1", "ffn.fc2"}
    for change in (merge_lora, unmerge_lora, merge_lora):
        assert change(model).out_head.weight is model.tok_emb.weight
    assert "out_head" not in lora_layers(apply_lora(small_model(tie_weights=False), rank=2))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'all-linear' matches no nn.Linear; there are: 0, 1"):
        apply_lora(tied, rank=2)


def test_a_tied_head_asked_for_by_name_is_untied_by_merging(tmp_path):
    """The embedding keeps its values, the checkpoint holds both matrices, and unmerging ties them again."""
    model = shake(apply_lora(small_model(), rank=2, targets="out_head"))
    embedding, logits = model.tok_emb.weight.clone(), model(IDS)
    merge_lora(model)
    assert torch.equal(model.tok_emb.weight, embedding) and not model.config.tie_weights
    gpt.save_checkpoint(tmp_path / "model.safetensors", model)
    loaded = gpt.load_checkpoint(tmp_path / "model.safetensors")[0]
    torch.testing.assert_close(loaded(IDS), logits, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert model.out_head.weight is model.tok_emb.weight and model.config.tie_weights
    assert torch.equal(model(IDS), logits)


def test_gpt2_gets_the_published_number_of_parameters():
    """PEFT's counts for 124M at rank 8: 294,912 on c_attn alone, 1,179,648 on all four layers of a block."""
    for targets, count in (("qkv", 294_912), ("all-linear", 1_179_648)):
        with torch.device("meta"):
            model = apply_lora(gpt.GPTModel(gpt.GPT_CONFIGS["gpt2"]), rank=8, targets=targets)
        assert sum(p.numel() for p in lora_parameters(model)) == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("targets, ends", [("qkv", {"qkv"}), ("attn.out_proj, fc1", {"out_proj", "fc1"}),
                                           (["trf_blocks.1.ffn.fc2"], {"fc2"}), ("all-linear,out_head", None)])
def test_targets_are_ends_of_names_at_a_dot(targets, ends):
    """A suffix selects it in every block, a full name once, and a head is adapted where it is named."""
    names = set(lora_layers(apply_lora(small_model(), rank=2, targets=targets)))
    if ends is None:
        assert len(names) == 9 and "out_head" in names
    else:
        assert {name.split(".")[-1] for name in names} == ends
        assert len(names) == (1 if "trf" in targets[0] else 2 * len(ends))


@pytest.mark.parametrize("options, message", [
    (dict(rank=0), "rank must be a whole number from 1 to 8, the smaller side of trf_blocks.0.attn.qkv, not 0"),
    (dict(rank=-1), "not -1"), (dict(rank=9), "not 9"), (dict(rank=2.0), "not 2.0"),
    (dict(alpha=0), "alpha must be a positive number"), (dict(alpha=math.nan), "not nan"),
    (dict(dropout=1.0), "dropout must be at least 0 and below 1"), (dict(targets=[]), "matches no"),
    (dict(targets="qkv,proj"), "'proj' matches no nn.Linear; there are: attn.qkv, attn.out_proj, ffn.fc1, ffn.fc2, o"),
])
def test_wrong_options_are_refused_and_change_nothing(options, message):
    """Each message is one line with what was wrong; the model still trains all its parameters."""
    model = small_model()
    with pytest.raises(ValueError, match=message) as caught:
        apply_lora(model, **{"rank": 2, **options})
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters()) and not any("lora" in n for n in model.state_dict())
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(apply_lora(model, rank=2), rank=2)


def test_layers_that_torch_reads_without_calling_take_no_adapter():
    """nn.TransformerEncoderLayer's fused inference and nn.MultiheadAttention would skip the adapters; others stay."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    assert list(lora_layers(apply_lora(model, rank=2))) == ["1"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_an_adapter_comes_back_bit_for_bit_from_a_file_of_its_own_size(tmp_path):
    """Check 5: the same logits, four bytes for each parameter and a header, a complete config, nothing else written."""
    model = adapted(dropout=0.1)
    path = save_lora(model, tmp_path / "new" / "adapter")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 4 * sum(p.numel() for p in lora_parameters(model)) + header
    assert {p.name for p in path.parent.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
    assert config | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1,
                     "target_modules": [f"transformer.h.{i}.{layer}" for i in range(2) for layer in (
                         "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
                     "modules_to_save": None, "rank_pattern": {}, "fan_in_fan_out": True, "bias": "none",
                     "inference_mode": True, "base_model_name_or_path": None} == config
    names = set(gpt.read_safetensors(path)[0])
    assert "base_model.model.transformer.h.1.mlp.c_proj.lora_B.weight" in names and len(names) == 16
    loaded = load_lora(small_model().eval(), path.parent)
    assert torch.equal(loaded(IDS), model(IDS))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad}
    assert all(layer.dropout == 0.1 and not layer.training for layer in lora_layers(loaded).values())


def test_adapters_take_turns_without_leaving_anything_behind(tmp_path):
    """Check 5: other layers, ranks and scales replace those there."""
    first = adapted(targets="qkv,fc1")
    second = shake(apply_lora(small_model(), rank=3, targets="fc1,fc2", rslora=True), seed=2)
    third = shake(apply_lora(small_model(), rank=2, alpha=9, targets="qkv,fc1", rslora=True), seed=3)
    save_lora(first, tmp_path / "1")
    save_lora(second, tmp_path / "2")
    save_lora(third.requires_grad_(False), tmp_path / "3")  # frozen for inference, and saved all the same
    model = small_model()
    for number, wanted in (("1", first), ("2", second), ("1", first), ("3", third), ("1", first)):
        load_lora(model, tmp_path / number)
        assert torch.equal(model(IDS), wanted(IDS)) and model.state_dict().keys() == wanted.state_dict().keys()


def test_a_new_head_travels_with_the_adapter(tmp_path):
    """A classifier's head is saved as PEFT saves it, and loaded over another random head."""
    model = apply_lora(classifier(), rank=2)
    model.out_head.requires_grad_(True)
    save_lora(shake(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    tensors, _ = gpt.read_safetensors(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.score.weight"], model.out_head.weight)
    other = classifier()
    nn.init.zeros_(other.out_head.weight)
    load_lora(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS)) and other.out_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"score.weight is \(3, 8\) in the file and unknown in the model"):
        load_lora(small_model(tie_weights=False), tmp_path)


class Reward(nn.Module):
    """A model around a model, with a score of its own and an output head that nobody needs."""

    def __init__(self, seed=0):
        super().__init__()
        self.gpt = small_model(seed)
        self.gpt.out_head = nn.Identity()
        self.score = nn.Linear(CONFIG.emb_dim, 1)

    def forward(self, ids):
        return self.score(self.gpt.hidden(ids)[:, -1]).squeeze(1)


def test_adapters_inside_a_reward_model_have_the_same_names(tmp_path):
    """In the file the blocks are GPT-2's whatever holds them, the score is beside them."""
    model = apply_lora(Reward(), rank=2)
    model.score.requires_grad_(True)
    save_lora(shake(model), tmp_path)
    names = set(gpt.read_safetensors(tmp_path / "adapter_model.safetensors")[0])
    assert {"base_model.model.score.weight", "base_model.model.score.bias",
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"} < names and len(names) == 18
    assert torch.equal(load_lora(Reward(), tmp_path)(IDS), model(IDS))


def test_another_base_is_refused_and_left_untouched(tmp_path):
    """One number of one frozen weight differs: the sha256 in the file says so; any_base lets it pass."""
    save_lora(adapted(), tmp_path)
    other = small_model()
    with torch.no_grad():
        other.trf_blocks[0].ln1.bias[3] += 1e-6
    before = snapshot(other)
    with pytest.raises(ValueError, match="trained on another base; load the weights that it started from"):
        load_lora(other, tmp_path)
    assert same(other.state_dict(), before)
    assert lora_layers(load_lora(other, tmp_path, any_base=True))


def rewrite(folder, change, **config):
    """Apply `change` to the dict of tensors in an adapter's file, and set options in its config."""
    path = folder / "adapter_model.safetensors"
    tensors, metadata = gpt.read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    gpt.write_safetensors(path, tensors, {"base_sha256": metadata["base_sha256"]})
    options = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(options | config), encoding="utf-8")


A0 = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
A7, B7 = A0.replace("h.0", "h.7"), B0.replace("h.0", "h.7")


@pytest.mark.parametrize("change, config, message", [
    (lambda t: t.pop(B0), {}, "c_attn.lora_B.weight is missing in the file"),
    (lambda t: t.pop(A0), {}, "c_attn.lora_A.weight is missing in the file"),
    (lambda t: (t.pop(A0), t.pop(B0)), {"target_modules": r".*\.c_attn"}, "h.0.attn.c_attn.lora_A.weight is missing"),
    (lambda t: t.update({A7: t[A0], B7: t[B0]}), {}, "h.7.*lora_A.weight is .* unknown in the model"),
    (lambda t: t.update({A0: t[A0][:, :5]}), {}, r"c_attn.lora_A.weight is \(2, 5\) in the file and \(2, 8\) in the"),
    (lambda t: t.update({A0: t[A0][:1]}), {}, r"c_attn.lora_B.weight is \(24, 2\) in the file and \(24, 1\) in the"),
    (lambda t: t.update({A0: torch.ones(9, 8), B0: torch.ones(24, 9)}), {}, r"lora_A.weight is \(9, 8\)"),
    (lambda t: t.update({A0: torch.tensor(1.0)}), {}, r"c_attn.lora_A.weight is \(\) in the file"),
    (lambda t: t[A0].fill_(math.nan), {}, "not finite"),
    (lambda t: None, {"use_dora": True}, "use_dora is set"),
    (lambda t: None, {"bias": "lora_only"}, "bias is set"),
    (lambda t: None, {"alpha_pattern": {"c_attn": 4}}, "alpha_pattern is set, which is not supported here; merge with"),
    (lambda t: None, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is set"),  # changes the base
    (lambda t: None, {"init_lora_weights": "lora_ga"}, "init_lora_weights is set"),
    (lambda t: None, {"peft_type": "IA3"}, "'IA3' is not LORA"),
    (lambda t: None, {"lora_alpha": "8"}, "adapter_config.json: "),
    (lambda t: None, {"lora_alpha": 0}, "adapter_config.json: LoRA's alpha must be a positive number"),
    (lambda t: None, {"target_modules": "*c_attn("}, "config.json: nothing to repeat"),
    (lambda t: None, {"modules_to_save": ["final_norm"]}, "final_norm.bias is missing in the file"),
])
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, change, config, message):
    """Missing, extra, misshapen and unsupported contents each end in one line, and the model stays what it was."""
    save_lora(adapted(), tmp_path)
    rewrite(tmp_path, change, **config)
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert same(model.state_dict(), before) and all(parameter.requires_grad for parameter in model.parameters())


def test_damage_is_seen_before_anything_is_loaded(tmp_path):
    """Flipped bits, lost ends, absent files and broken JSON are errors with the path."""
    path = save_lora(adapted(), tmp_path)
    good, config = path.read_bytes(), (tmp_path / "adapter_config.json").read_bytes()
    for bad in [good[:-1], good[:50], b""] + [good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :] for i in (-1, -700, 4)]:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="adapter_model.safetensors: "):
            load_lora(small_model(), tmp_path)
    path.write_bytes(good)
    for bad in (config[:40], b"[]", b"{}", b"\xff", b'{"peft_type": "LORA", "target_modules": []}'):
        (tmp_path / "adapter_config.json").write_bytes(bad)
        with pytest.raises(ValueError, match="adapter_config.json: "):
            load_lora(small_model(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_lora(small_model(), tmp_path)


def formula_model():
    """Return the base of the golden adapter, every weight given by a formula."""
    model = gpt.GPTModel(CONFIG).eval()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.7 + 0.13 * k) + k)
            parameter.copy_(0.4 * wave.view(parameter.shape) + (name.endswith("weight") and parameter.dim() == 1))
    return model


def test_an_adapter_that_peft_saved_gives_the_logits_it_gave_there(capsys):
    """Check 5, stored: files written by peft 0.21.2 on transformers' GPT2LMHeadModel, and that model's logits."""
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    model = formula_model()
    base = model(torch.tensor(expected["ids"]))
    load_lora(model, GOLDEN)
    assert "does not say which base it belongs to" in capsys.readouterr().err
    logits = model(torch.tensor(expected["ids"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)
    assert (logits - base).abs().max() > 0.5


ALONE = """
import lora, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
x, goal = torch.randn(64, 6), torch.randint(4, (64,))
start = model(x)
lora.apply_lora(model, rank=2)
assert torch.equal(model(x), start)
for _ in range(100):
    loss = torch.nn.functional.cross_entropy(model(x), goal)
    for p, grad in zip(lora.lora_parameters(model), torch.autograd.grad(loss, lora.lora_parameters(model))):
        p.data -= 0.1 * grad
y = model.eval()(x)
assert torch.nn.functional.cross_entropy(y, goal) < torch.nn.functional.cross_entropy(start, goal) - 0.1
with lora.lora_disabled(model):
    assert torch.equal(model(x), start)
assert torch.allclose(lora.merge_lora(model)(x), y, atol=1e-5)
lora.unmerge_lora(model)
lora.save_lora(model, "adapter")
with torch.no_grad():
    lora.lora_parameters(model)[1].zero_()
assert torch.equal(lora.load_lora(model, "adapter")(x), y)
"""


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """Return an empty folder, now the current one, with a base checkpoint and an adapter for it."""
    monkeypatch.chdir(tmp_path)
    gpt.save_checkpoint("base.safetensors", small_model(), CharTokenizer(list("abcdefghijklm")), step=7, val_loss=2.5)
    save_lora(adapted(), "adapter")
    return tmp_path


def test_merge_writes_a_plain_checkpoint(run_folder, capsys):
    """It holds the adapted model's logits and the tokenizer, and no figure of the base, which has other weights."""
    assert lora.main("merge --checkpoint base.safetensors --adapter adapter --out m/merged.safetensors".split()) == 0
    assert "m/merged.safetensors: base.safetensors with adapter merged" in capsys.readouterr().out
    model, tokenizer, info = gpt.load_checkpoint("m/merged.safetensors")
    torch.testing.assert_close(model(IDS), adapted()(IDS), rtol=1e-5, atol=1e-5)
    assert tokenizer.encode("abm") == [0, 1, 12]
    assert info == {"kind": "gpt", "init": "base.safetensors", "adapter": "adapter"}


def test_merging_a_runs_adapter_keeps_what_the_run_knew_of_itself(run_folder):
    """Stage, figures and template are those of model.safetensors beside the adapter, not of the base."""
    save_lora(adapted(), "sft/adapter")
    gpt.save_checkpoint("sft/model.safetensors", small_model(), stage="sft", step=9, val_loss=0.5, template="alpaca")
    assert lora.main("merge --checkpoint base.safetensors --adapter sft/adapter --out m.safetensors".split()) == 0
    model, _, info = gpt.load_checkpoint("m.safetensors")
    torch.testing.assert_close(model(IDS), adapted()(IDS), rtol=1e-5, atol=1e-5)
    assert info == {"kind": "gpt", "stage": "sft", "step": 9, "val_loss": 0.5, "template": "alpaca",
                    "adapter": "sft/adapter"}


def test_export_writes_the_same_adapter_with_the_bases_name(run_folder, capsys):
    """The tensors are equal, the config names the base for Hugging Face, and the folder still knows its base here."""
    assert lora.main("export --adapter adapter --out peft --base_name hf_base".split()) == 0
    shown = capsys.readouterr().out
    assert "AutoModelForCausalLM.from_pretrained('hf_base')" in shown and "from_pretrained(base, 'peft')" in shown
    assert same(*(gpt.read_safetensors(f"{folder}/adapter_model.safetensors")[0] for folder in ("adapter", "peft")))
    assert json.loads(Path("peft/adapter_config.json").read_text())["base_model_name_or_path"] == "hf_base"
    assert torch.equal(load_lora(small_model(), "peft")(IDS), adapted()(IDS))
    with pytest.raises(ValueError, match="another base"):
        load_lora(small_model(seed=3), "peft")


@pytest.mark.parametrize("bias", [False, True])
def test_a_classifiers_adapter_is_exported_as_one(run_folder, capsys, bias):
    """The printed lines load a sequence classifier with as many labels, and with a bias where the head has one."""
    model = apply_lora(classifier(bias=bias), rank=2)
    model.out_head.requires_grad_(True)
    save_lora(shake(model), "cls")
    assert lora.main("export --adapter cls --base_name gpt2".split()) == 0
    shown = capsys.readouterr().out
    assert "transformers.AutoModelForSequenceClassification.from_pretrained('gpt2', num_labels=3)" in shown
    assert ("base.score = torch.nn.Linear" in shown) == bias and "CausalLM" not in shown


def test_info_prints_what_adapters_cost(run_folder, capsys):
    """Trained numbers, share, bytes of the file and of AdamW for each rank, as apply_lora adds them."""
    assert lora.main(["info"]) == 0  # GPT-2 by name, without its weights
    rows = {line[:12].strip(): line[12:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["all weights"] == ["124,439,808", "100.00%", "497.76", "1493.3"]
    assert rows["rank 8"] == ["1,179,648", "0.95%", "4.72", "14.2"]
    assert list(rows)[1:] == ["rank 4", "rank 8", "rank 32"]
    command = "info --checkpoint base.safetensors --lora_rank 2 --lora_targets qkv,fc1"
    assert lora.main(command.split()) == 0
    count = sum(p.numel() for p in lora_parameters(apply_lora(small_model(), 2, targets="qkv,fc1")))
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["rank", "2", f"{count:,}"]


@pytest.mark.parametrize("command, status, message", [
    ("merge --adapter nowhere --checkpoint base.safetensors", 1, "nowhere/adapter_config.json"),
    ("merge --adapter adapter --checkpoint nowhere", 1, "no checkpoint nowhere"),
    ("merge --adapter adapter --checkpoint other.safetensors", 1, "another base"),
    ("merge --adapter adapter --checkpoint base.safetensors --out base.safetensors", 2, "would overwrite"),
    ("export --adapter .", 1, "adapter_config.json"),
    ("info --lora_rank 0", 1, "from 1 to 768"),
    ("info --lora_rank four", 2, "invalid int value: 'four'"),
    ("info --lora_targets c_attn", 1, "'c_attn' matches no nn.Linear; there are: attn.qkv"),
    ("info --checkpoint nowhere", 1, "nowhere"),
    ("info --lora_rnak 4", 2, "did you mean --lora_rank"),
    ("split", 2, "unknown command 'split'"),
])
def test_mistakes_on_the_command_line_are_one_line(run_folder, capfd, command, status, message):
    """Exit status 2 where the command line alone is wrong, 1 for what is found later, and no traceback."""
    gpt.save_checkpoint("other.safetensors", small_model(seed=3))
    assert lora.main(command.split()) == status
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Side by side with peft and transformers


def hugging_face(model, **changes):
    """Return transformers' GPT-2 with the weights of `model`: same sizes, matrices of the blocks transposed."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.GPT2ForSequenceClassification if changes else transformers.GPT2LMHeadModel
    config = model.config
    theirs = kind(transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.emb_dim, n_layer=config.n_layers,
        n_head=config.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, **changes))
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, other in (("tok_emb", "wte"), ("pos_emb", "wpe"), ("trf_blocks", "h"), ("final_norm", "ln_f"),
                            ("ln1", "ln_1"), ("ln2", "ln_2"), ("attn.qkv", "attn.c_attn"),
                            ("attn.out_proj", "attn.c_proj"), ("ffn.fc1", "mlp.c_fc"), ("ffn.fc2", "mlp.c_proj")):
            name = name.replace(ours, other)
        if "out_head" not in name:
            weights["transformer." + name] = tensor.T if tensor.dim() == 2 and name.startswith("h.") else tensor
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if name not in ("lm_head.weight", "score.weight")]
    return theirs.eval()


def make_golden(folder):
    """Write the golden files: an adapter that PEFT saves for the formula model, and the logits PEFT gives with it."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                              task_type="CAUSAL_LM")
    model = peft.get_peft_model(hugging_face(formula_model()), options).eval()
    with torch.no_grad():
        for k, (_, p) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.copy_(0.3 * torch.cos(torch.arange(p.numel(), dtype=torch.float64) * 1.3 + k).view(p.shape))
        logits = model(IDS).logits
    model.save_pretrained(folder)
    rounded = [[[round(x, 7) for x in row] for row in text] for text in logits.tolist()]
    expected = {"ids": IDS.tolist(), "logits": rounded}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


@pytest.mark.peer
def test_the_golden_files_are_what_peft_writes(tmp_path):
    """The stored adapter and logits are still those of the installed peft and transformers."""
    make_golden(tmp_path)
    new, old = (gpt.read_safetensors(folder / "adapter_model.safetensors")[0] for folder in (tmp_path, GOLDEN))
    assert same(new, old)
    new, old = (json.loads((folder / "expected.json").read_text())["logits"] for folder in (tmp_path, GOLDEN))
    torch.testing.assert_close(torch.tensor(new), torch.tensor(old), rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"targets": "attn.out_proj"}, {"rslora": True, "dropout": 0.1},
                                     {"targets": "all-linear,out_head"}])
def test_peft_loads_our_adapter_and_gives_our_logits(tmp_path, options, recwarn):
    """PeftModel.from_pretrained on transformers' GPT-2 agrees with us, and warns of no unknown or missing key."""
    peft = pytest.importorskip("peft")
    model = adapted(**options)
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hugging_face(small_model()), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter(), lora_disabled(model):
            torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "key" in str(w.message) or "Unexpected" in str(w.message)]


@pytest.mark.peer
@pytest.mark.parametrize("bias", [False, True])
def test_peft_loads_our_classifier_with_its_head(tmp_path, bias):
    """GPT2ForSequenceClassification takes adapter and head from our file; its score is our last position's logits."""
    peft = pytest.importorskip("peft")
    model = apply_lora(classifier(bias=bias), rank=2)
    model.out_head.requires_grad_(True)
    save_lora(shake(model), tmp_path)
    base = hugging_face(classifier(), num_labels=3, pad_token_id=0)
    if bias:
        base.score = nn.Linear(base.score.in_features, base.num_labels)  # theirs has none
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = IDS[:1]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("options", [
    dict(target_modules="all-linear", exclude_modules=["c_fc"]),
    dict(target_modules=["c_attn"], use_rslora=True),
    dict(target_modules=r".*\.1\.mlp\.c_(fc|proj)", init_lora_weights="gaussian"),
    dict(target_modules=["c_fc", "c_attn"], rank_pattern={"h.1.attn.c_attn": 4}),
    dict(target_modules=["c_proj"], layers_to_transform=[1], layers_pattern="h"),
])
def test_we_load_what_peft_saved(tmp_path, options):
    """Targets as a list, a pattern, all but some, in one block; rank-stabilised scale; one layer with its own rank."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(hugging_face(small_model()), peft.LoraConfig(
        r=2, lora_alpha=6, fan_in_fan_out=True, task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    model = load_lora(small_model(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    save_lora(model, tmp_path / "again")
    again = load_lora(small_model(), tmp_path / "again")
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.peer
def test_without_gpt_py_the_safetensors_package_serves(tmp_path, monkeypatch):
    """lora.py alone saves and loads by the package; its files and gpt.py's are read by both, and damage is seen."""
    pytest.importorskip("safetensors")
    pytest.importorskip("numpy")
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "lora.py", tmp_path / "alone")
    result = subprocess.run([sys.executable, "-W", "error", "-c", ALONE], cwd=tmp_path / "alone", capture_output=True,
                            text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    model = adapted()
    save_lora(model, tmp_path / "gpt")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gpt", None)
        save_lora(model, tmp_path / "package")
        assert torch.equal(load_lora(small_model(), tmp_path / "gpt")(IDS), model(IDS))
        path = tmp_path / "gpt" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(ValueError, match="damaged"):
            load_lora(small_model(), path.parent)
    assert torch.equal(load_lora(small_model(), tmp_path / "package")(IDS), model(IDS))
