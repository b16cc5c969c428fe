"""The model, generation and checkpoints, held against published values, torch's own layers and closed forms."""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
import lora
from data import tinyworld
from gpt import GPTConfig, GPTModel, KVCache, MultiHeadAttention, generate
from tokenizer import CharTokenizer

SMALL = GPTConfig(vocab_size=50, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True,
                  tie_weights=True)
# The six-word sentence of the notes' attention chapter, one 3-dimensional embedding a word.
SENTENCE = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
                         [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])
NOTES_LOGITS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])  # nine words


def small_model(seed=0, dtype=torch.float64, spread=5, **changes):
    """Return a seeded model whose weights are large enough for lively attention and logits far from equal."""
    torch.manual_seed(seed)
    model = GPTModel(dataclasses.replace(SMALL, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    return model.eval()


def plain_greedy(model, ids, steps):
    """Return greedy continuations by the plain loop: a full forward of the last window for every token."""
    for _ in range(steps):
        logits = model(ids[:, -model.config.context_length :])
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


# --- layers


def test_layer_norm_written_out_equals_fused_and_torch():
    """The written-out layer norm, the fused one and torch's module agree, with the biased variance."""
    norm, x = gpt.LayerNorm(7).double(), torch.randn(3, 5, 7, dtype=torch.float64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    theirs = nn.LayerNorm(7).double()
    theirs.load_state_dict(norm.state_dict())
    assert torch.allclose(norm.by_steps(x), theirs(x), atol=1e-12)
    assert torch.equal(norm(x), theirs(x))
    unbiased = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    assert not torch.allclose(norm(x), unbiased, atol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_gelu_is_the_tanh_form_or_weighs_by_the_normal_distribution(exact):
    """Exact: x times the probability that a standard normal number is below x. The two differ enough to be seen."""
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    forms = [[0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()],
             [v * NormalDist().cdf(v) for v in x.tolist()]]
    gelu = gpt.GELU(exact)
    assert gelu(x).tolist() == pytest.approx(forms[exact], abs=1e-12)
    assert gelu.by_steps(x).tolist() == pytest.approx(forms[exact], abs=1e-12)
    assert gelu(x).tolist() != pytest.approx(forms[not exact], abs=1e-4)


# --- attention, by the derivation of the notes


def test_multi_head_attention_gives_the_published_outputs():
    """Two heads of size 1 with the seed of the notes (3 inputs, 2 outputs), embedded in our square module.

    Our heads have size 2 here, their second half zero; sqrt(2) in the queries makes up for the other scale."""
    torch.manual_seed(123)
    query, key, value = (nn.Linear(3, 2, bias=False).weight for _ in range(3))
    out = nn.Linear(2, 2)
    module = MultiHeadAttention(GPTConfig(10, 6, 4, 2, 1, drop_rate=0.0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for head in range(2):
            module.qkv.weight[2 * head, :3] = query[head] * math.sqrt(2)
            module.qkv.weight[4 + 2 * head, :3] = key[head]
            module.qkv.weight[8 + 2 * head, :3] = value[head]
            module.out_proj.weight[:2, 2 * head] = out.weight[:, head]
        module.out_proj.bias[:2] = out.bias
    x = F.pad(SENTENCE, (0, 1))[None].repeat(2, 1, 1)
    for y in (module(x), module.by_steps(x)[0]):
        assert y.shape == (2, 6, 4)
        assert y[0, 0, :2].tolist() == pytest.approx([0.3190, 0.4858], abs=1e-4)
        assert y[1, 5, :2].tolist() == pytest.approx([0.2575, 0.4028], abs=1e-4)


def test_attention_equals_torchs_own_module():
    """With the same weights nn.MultiheadAttention gives the same outputs and, averaged over heads, weights."""
    torch.manual_seed(1)
    ours, theirs = MultiHeadAttention(SMALL).double(), nn.MultiheadAttention(32, 4, batch_first=True).double()
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias})
    x = torch.randn(3, 11, 32, dtype=torch.float64)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    expected, weights = theirs(x, x, x, attn_mask=future)
    assert torch.allclose(ours(x), expected, atol=1e-12)
    assert torch.allclose(ours.by_steps(x)[1].mean(1), weights, atol=1e-12)


# --- the model


def test_parameter_counts_are_the_published_ones():
    """124M untied without qkv bias, without its head, and OpenAI's four tied sizes."""
    def count(config):
        return sum(parameter.numel() for parameter in gpt.empty_model(config, device="meta").parameters())

    notes = dict(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1,
                 qkv_bias=False)
    assert count(GPTConfig(**notes)) == 163_009_536
    assert count(GPTConfig(**notes, tie_weights=True)) == 124_412_160
    sizes = [count(gpt.GPT_CONFIGS[name]) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_gpt2_with_the_published_seed_generates_the_published_tokens():
    """124M, random weights of seed 123 drawn in the notes' order, prompt `Hello, I am`: ten known greedy tokens."""
    config = GPTConfig()
    torch.manual_seed(123)
    tensors = {"tok_emb.weight": nn.Embedding(50257, 768).weight, "pos_emb.weight": nn.Embedding(1024, 768).weight}
    for i in range(config.n_layers):
        name = f"trf_blocks.{i}."
        tensors[name + "attn.qkv.weight"] = torch.cat([nn.Linear(768, 768, bias=False).weight for _ in range(3)])
        for part, layer in (("attn.out_proj", nn.Linear(768, 768)), ("ffn.fc1", nn.Linear(768, 3072)),
                            ("ffn.fc2", nn.Linear(3072, 768))):
            tensors[name + part + ".weight"], tensors[name + part + ".bias"] = layer.weight, layer.bias
        for norm in ("ln1", "ln2"):
            tensors[f"{name}{norm}.weight"], tensors[f"{name}{norm}.bias"] = torch.ones(768), torch.zeros(768)
    tensors["final_norm.weight"], tensors["final_norm.bias"] = torch.ones(768), torch.zeros(768)
    tensors["out_head.weight"] = nn.Linear(768, 50257, bias=False).weight
    model = gpt.empty_model(config).eval()
    gpt.copy_weights(model, tensors, "seed 123")
    new = generate(model, torch.tensor([[15496, 11, 314, 716]]), 10, temperature=0)[0, 4:].tolist()
    assert new == [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]


def test_initial_weights_have_gpt2s_spread():
    """Weights have spread 0.02, residual projections 0.02 / sqrt(2 layers), and the untrained loss is near ln V."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(1000, 64, 128, 4, 6, tie_weights=True, drop_rate=0.0))
    block = model.trf_blocks[3]
    small = 0.02 / math.sqrt(12)
    for weight, spread in ((model.tok_emb.weight, 0.02), (block.attn.qkv.weight, 0.02), (block.ffn.fc1.weight, 0.02),
                           (block.attn.out_proj.weight, small), (block.ffn.fc2.weight, small)):
        assert weight.std().item() == pytest.approx(spread, rel=0.03)
    ids = torch.randint(1000, (8, 65))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(1000), abs=0.1)


def test_a_future_token_never_changes_an_earlier_logit():
    """Changing token t leaves the logits before t bitwise alone, and changes those from t on."""
    model = small_model()
    ids = torch.randint(50, (2, 16))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_padding_at_any_place_changes_no_logit():
    """Padding on the left, on the right and in between, with any ids, leaves the logits of the real tokens alone."""
    model = small_model()
    ids = torch.randint(50, (1, 9))
    expected = model(ids)
    for mask in ([0] * 5 + [1] * 9, [1] * 9 + [0] * 5, [0] * 3 + [1] * 9 + [0] * 2,
                 [1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]):
        mask = torch.tensor([mask])
        for filler in (0, 49):
            padded = torch.full_like(mask, filler).masked_scatter(mask == 1, ids)
            assert torch.allclose(model(padded, mask)[mask == 1], expected[0], atol=1e-10)
            assert torch.allclose(model(padded, mask.bool())[mask == 1], expected[0], atol=1e-10)
    assert not torch.allclose(model(F.pad(ids, (5, 0)))[:, 5:], expected, atol=1e-3)  # without a mask it does


def test_token_logprobs_line_up_with_the_next_token():
    """Entry t is the log-probability of ids[t + 1] under the logits at t, also at another temperature."""
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 11, dtype=torch.float64), torch.randint(11, (2, 6))
    for temperature in (1.0, 0.7):
        got = gpt.token_logprobs(logits, ids, temperature)
        assert got.shape == (2, 5)
        for b in range(2):
            for t in range(5):
                p = torch.softmax(logits[b, t] / temperature, dim=0)[ids[b, t + 1]]
                assert got[b, t].item() == pytest.approx(math.log(p), abs=1e-5)


@pytest.mark.parametrize("change", [dict(emb_dim=30), dict(n_layers=0), dict(drop_rate=1.5), dict(vocab_size="50")])
def test_an_impossible_config_is_refused_with_its_value(change):
    """Sizes that do not fit name the option and the value."""
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*{next(iter(change.values()))}"):
        dataclasses.replace(SMALL, **change)


# --- sampling


def test_sampling_draws_the_published_counts():
    """1,000 draws with seed 123 from the notes' nine-word logits at three temperatures."""
    published = {1.0: [73, 0, 0, 582, 2, 0, 0, 343, 0], 0.1: [0, 0, 0, 985, 0, 0, 0, 15, 0],
                 5.0: [165, 75, 42, 239, 71, 46, 32, 227, 103]}
    for temperature, counts in published.items():
        torch.manual_seed(123)
        probs = gpt.sampling_probabilities(NOTES_LOGITS, temperature)
        drawn = torch.cat([torch.multinomial(probs, 1)[0] for _ in range(1000)])
        assert torch.bincount(drawn, minlength=9).tolist() == counts


def test_top_k_keeps_the_published_probabilities():
    """The three likeliest words share all the mass: .0615, .5775, .3610; of equal ones the lower ids stay."""
    probs = gpt.sampling_probabilities(NOTES_LOGITS, top_k=3)[0]
    assert probs[[0, 3, 7]].tolist() == pytest.approx([0.0615, 0.5775, 0.3610], abs=1e-4)
    assert probs.count_nonzero() == 3
    assert gpt.sampling_probabilities(torch.zeros(1, 5), top_k=2).tolist() == [[0.5, 0.5, 0, 0, 0]]
    assert gpt.sampling_probabilities(NOTES_LOGITS, top_k=51)[0].tolist() == pytest.approx(
        torch.softmax(NOTES_LOGITS[0], dim=0).tolist())  # more than there are: all stay


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_min_p_a_share_of_the_best():
    """Of .5 .25 .15 .1 top-p keeps 1, 2, 3 and 4 for p = .5, .51, .76 and 1; min_p .4 keeps those of at least .2."""
    logits = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    for p, kept in ((0.5, [1]), (0.51, [1, 3]), (0.76, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        probs = gpt.sampling_probabilities(logits, top_p=p)[0]
        assert probs.nonzero().flatten().tolist() == kept
        assert probs.sum().item() == pytest.approx(1)
    probs = gpt.sampling_probabilities(logits, min_p=0.4)[0]
    assert probs.tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=1e-6)


def test_repetition_penalty_lowers_only_tokens_that_were_there():
    """Positive logits are divided, negative multiplied; twice in the text counts once."""
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0]])
    assert gpt.penalize_repetition(logits, torch.tensor([[0, 1, 0]]), 2.0).tolist() == [[1.0, -4.0, 3.0, -1.0]]


@pytest.mark.parametrize("wrong, said", [
    (dict(ids=torch.tensor([[1, 50]])), "ids from 0 to 49"), (dict(ids=torch.tensor([[-1]])), "ids from 0 to 49"),
    (dict(ids=torch.zeros(2, 0)), "at least one token"), (dict(ids=torch.tensor([1, 2])), "for one prompt: torch.tens"),
    (dict(ids=[[1, 2]]), "for one prompt"), (dict(mask=torch.ones(2, 3)), "prompts' shape"),
    (dict(mask=torch.tensor([[1, 1], [1, 0]])), "padding is on the left"), (dict(num_samples=0), "num_samples"),
    (dict(max_new_tokens=-1), "max_new_tokens"), (dict(temperature=-1.0), "temperature"),
    (dict(temperature=math.nan), "temperature"), (dict(temperature=1e-40), "temperature"), (dict(top_k=0), "top_k"),
    (dict(top_p=0.0), "top_p"), (dict(top_p=1.5), "top_p"), (dict(min_p=-0.1), "min_p"),
    (dict(repetition_penalty=0.0), "repetition_penalty")])
def test_prompts_and_options_out_of_range_are_refused(wrong, said):
    """Padding on the right, negative temperature (which would invert the distribution), and what would fail inside."""
    assert generate(small_model(), torch.zeros(0, 4, dtype=torch.long), 3).shape == (0, 7)
    with pytest.raises(ValueError, match=said):
        generate(small_model(), **{"ids": torch.tensor([[1, 2], [3, 4]]), "max_new_tokens": 2, **wrong})


# --- generation: every path gives the tokens of the plain uncached loop


def test_cached_greedy_generation_equals_the_plain_loop_past_the_context():
    """In a 16-token context, from 4 tokens and from 25: cached first, then full windows."""
    for seed, length in enumerate((4, 4, 25)):
        model, ids = small_model(seed), torch.randint(50, (3, length))
        assert torch.equal(generate(model, ids, 30, temperature=0), plain_greedy(model, ids, 30))


def test_left_padded_prompts_of_unequal_length_continue_as_if_alone():
    """Prompts of 1, 5 and 9 tokens in one batch, past the context too, equal one-by-one generation."""
    model = small_model(3)
    prompts = [torch.randint(50, (1, n)) for n in (1, 5, 9)]
    ids = torch.cat([F.pad(p, (9 - p.shape[1], 0), value=13) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])
    together = generate(model, ids, 7, temperature=0, mask=mask)
    for row, prompt in zip(together, prompts):
        assert torch.equal(row[9:], plain_greedy(model, prompt, 7)[0, prompt.shape[1] :])
    assert not torch.equal(generate(model, ids, 7, temperature=0)[0, 9:], together[0, 9:])  # the mask matters


def test_chunked_prefill_fills_the_cache_as_one_piece_does():
    """Feeding 10 tokens in pieces of 4, 5 and 1 gives the logits of one forward pass."""
    model, ids = small_model(), torch.randint(50, (2, 10))
    cache = KVCache(model.config, 2, 10, dtype=torch.float64)
    pieces = [model(part, cache=cache) for part in ids.split([4, 5, 1], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model(ids), atol=1e-10)
    cache, mask = KVCache(model.config, 2, 10, dtype=torch.float64), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = mask[1, 5] = 0
    pieces = [model(ids[:, past:end], mask[:, :end], cache) for past, end in ((0, 4), (4, 9), (9, 10))]
    assert torch.allclose(torch.cat(pieces, dim=1), model(ids, mask), atol=1e-10)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(torch.zeros(2, 17, dtype=torch.long))


def test_several_samples_share_a_prefill_and_equal_separate_rows():
    """Three samples of two prompts equal a batch in which each prompt stands three times."""
    model, ids = small_model(), torch.randint(50, (2, 5))
    seeded = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    shared = generate(model, ids, 20, num_samples=3, generator=seeded())
    apart = generate(model, ids.repeat_interleave(3, dim=0), 20, generator=seeded())
    assert torch.equal(shared, apart)
    assert len({tuple(row) for row in shared[:3].tolist()}) == 3
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    shared = generate(model, ids, 20, num_samples=3, generator=seeded(), mask=mask)
    ids, mask = ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0)
    apart = generate(model, ids, 20, generator=seeded(), mask=mask)
    assert torch.equal(shared, apart)


def test_a_row_keeps_its_stop_token_and_the_others_go_on():
    """After a row's first eos_id it holds nothing else; rows without one are as without stopping."""
    model, ids = small_model(2), torch.randint(50, (6, 3))
    free = generate(model, ids, 10, temperature=0)
    eos = free[0, 5].item()  # a token that row 0 is known to produce
    stopped = generate(model, ids, 10, temperature=0, eos_id=eos)
    for row, expected in zip(stopped[:, 3:].tolist(), free[:, 3:].tolist()):
        end = expected.index(eos) + 1 if eos in expected else len(row)
        assert row[:end] == expected[:end][: len(row)]
        assert set(row[end:]) <= {eos}
    assert eos in stopped[0, 3:].tolist()


def test_generation_ends_early_once_all_rows_have_stopped():
    """A model that always says 7 ends after one step with eos 7, and a stop function ends it after three."""
    model = small_model()
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(model.tok_emb.weight[7])
        model.tok_emb.weight[7] *= 3
    ids = torch.tensor([[1, 2]])
    assert generate(model, ids, 9, temperature=0, eos_id=7).tolist() == [[1, 2, 7]]
    stop = lambda new: "hhh" in "".join("abcdefgh"[i] for i in new)  # noqa: E731
    assert generate(model, ids, 9, temperature=0, stop=stop).tolist() == [[1, 2, 7, 7, 7]]
    assert generate(model, ids, 0).tolist() == [[1, 2]]


def test_generation_leaves_the_training_mode_as_it_was():
    """A model in training mode comes back in training mode, and its dropout took no part."""
    model = small_model(drop_rate=0.5).train()
    ids = torch.randint(50, (1, 4))
    assert torch.equal(generate(model, ids, 8, temperature=0), generate(model, ids, 8, temperature=0))
    assert model.training


def plain_sampled(model, ids, mask, steps, generator, penalty, **options):
    """Return sampled continuations by the plain loop: every step a full forward, no cache, the same random numbers."""
    T = ids.shape[1]
    for _ in range(steps):
        window, seen = ids[:, -model.config.context_length :], mask[:, -model.config.context_length :]
        logits = model(window, seen)[:, -1]
        for row in range(len(ids)):
            for token in {int(i) for i, m in zip(ids[row], mask[row]) if m}:
                logits[row, token] *= 1 / penalty if logits[row, token] > 0 else penalty
        probs = gpt.sampling_probabilities(logits, **options)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return ids[:, T:]


@pytest.mark.parametrize("options", [dict(), dict(top_k=8, top_p=0.9, min_p=0.05, temperature=0.8)])
def test_sampled_generation_equals_the_plain_loop(options):
    """Cached, left-padded, penalised sampling past the context draws the plain loop's tokens from the same seed."""
    model = small_model(4, spread=3)
    ids = torch.randint(50, (3, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    got = generate(model, ids, 14, mask=mask, repetition_penalty=1.5, generator=seeded(), **options)[:, 6:]
    with torch.no_grad():
        assert torch.equal(got, plain_sampled(model, ids, mask, 14, seeded(), 1.5, **options))


def test_dropout_acts_at_each_of_its_places_and_only_in_training():
    """Embeddings, attention weights and residual branches: each alone makes two training passes differ."""
    ids = torch.randint(50, (1, 8))
    for place in ("embeddings", "attention", "residual", "none"):
        model = small_model().train()
        model.drop_emb.p = 0.5 if place == "embeddings" else 0.0
        for block in model.trf_blocks:
            block.attn.drop_rate = 0.5 if place == "attention" else 0.0
            block.drop.p = 0.5 if place == "residual" else 0.0
        assert torch.equal(model(ids), model(ids)) is (place == "none"), place
        model.eval()
        assert torch.equal(model(ids), model(ids))


# --- streaming


def test_streaming_never_shows_half_a_character():
    """A four-byte emoji spelled in single bytes arrives in one piece, and the pieces make the whole text."""
    data = "naïve 🙂 日本".encode()
    pieces = list(gpt.stream_text(lambda ids: bytes(ids).decode("utf-8", "replace"), iter(data)))
    assert "".join(pieces) == "naïve 🙂 日本"
    assert not any("\ufffd" in piece for piece in pieces)
    cut = list(gpt.stream_text(lambda ids: bytes(ids).decode("utf-8", "replace"), iter(data[:8])))
    assert "".join(cut) == "naïve \ufffd"  # a text that really ends inside a character shows it once, at the end


def test_a_stop_string_over_several_tokens_is_never_shown():
    """A false start appears once it is clear. GPT-2 splits " 😀" inside the emoji: the space waits with its bytes."""
    ids = list(b"one ENx two END three")
    assert "".join(gpt.stream_text(lambda new: bytes(new).decode(), iter(ids), ["END"])) == "one ENx two "
    tokens = [b"Hi", b" \xf0\x9f\x98", b"\x80", b" there"]
    decode = lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace")  # noqa: E731
    assert "".join(gpt.stream_text(decode, range(4), [" 😀"])) == "Hi"
    assert "".join(gpt.stream_text(decode, range(4), [" 😁"])) == "Hi 😀 there"


# --- int8


needs_int8 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no int8 here")


def int8_layer(weight, bias=None):
    """Return a linear layer with this weight (out, in), in int8."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return gpt.int8_linears(nn.Sequential(layer))[0]


@needs_int8
@torch.no_grad()
def test_an_int8_layer_multiplies_whole_numbers_exactly():
    """Weights up to 127 and inputs up to 63 need no rounding; at the extremes no sum overflows; zeros stay zeros."""
    torch.manual_seed(0)
    weight, x = torch.randint(-127, 128, (70, 130)).float(), torch.randint(-63, 64, (2, 5, 130)).float()
    weight[:, 0], x[..., 0], weight[0], x[0, 0], weight[1], x[0, 1] = 127, 63, 127, 63, 0, 0
    bias = torch.randn(70)
    assert torch.allclose(int8_layer(weight, bias)(x), x @ weight.T + bias, rtol=1e-6, atol=1e-2)  # of up to a million
    assert torch.equal(int8_layer(weight)(x)[0, 1], torch.zeros(70))


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_the_error_of_an_int8_layer_has_the_bound_of_its_rounding(outlier):
    """Half a step of each row's weights, a 252nd of each row's input step of max / 63; 1% of a row's norm in practice.

    One large input, as GPT-2 has them, drowns neither the others nor other rows, which come out as they do alone."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 200), torch.randn(7, 200)
    x[3] *= 1000
    x[:, 5] *= outlier
    layer = int8_layer(weight)
    error, most = (layer(x) - x @ weight.T).abs(), weight.abs().amax(1)
    bound = x.abs().sum(1, keepdim=True) * most / 254
    bound = bound + x.abs().amax(1, keepdim=True) / (63 * 252) * (weight.abs().sum(1) + 200 * most / 254)
    assert (error <= 1.001 * bound).all()
    assert (error.norm(dim=1) / (x @ weight.T).norm(dim=1)).max() < 0.012
    assert all(torch.equal(layer(x[i : i + 1])[0], layer(x)[i]) for i in range(7))


@needs_int8
@torch.no_grad()
def test_a_trained_model_in_int8_keeps_its_perplexity_and_its_greedy_words():
    """Perplexity within 1%, the likeliest next token the same at 98% of the places, most greedy texts the same."""
    model, tokenizer, _ = gpt.load_checkpoint(Path(gpt.__file__).parent / "assets" / "tiny.safetensors")
    ids = torch.tensor(tokenizer.encode(" ".join(tinyworld("corpus", "test", 60))))
    windows, small = ids[:2048].view(32, 64), gpt.int8_linears(copy.deepcopy(model))
    logits, rounded = model(windows), small(windows)
    losses = [-gpt.token_logprobs(x, windows).mean().item() for x in (logits, rounded)]
    assert losses[0] < 0.75 * math.log(model.config.vocab_size)  # it has learned something
    assert abs(losses[1] - losses[0]) < 0.01
    assert (rounded.argmax(-1) == logits.argmax(-1)).float().mean() > 0.98
    ours, theirs = (generate(m, windows[:, :16], 24, temperature=0) for m in (small, model))
    assert (ours == theirs).all(dim=1).float().mean() > 0.7
    assert torch.equal(ours, plain_greedy(small, windows[:, :16], 24))  # with the cache


@needs_int8
def test_an_int8_model_is_not_saved_and_keeps_a_finer_embedding(tmp_path):
    """Its file could not be read. The tied embedding has more bits, the engine of other code is put back."""
    engine = torch.backends.quantized.engine
    before, ids = small_model(dtype=torch.float32), torch.randint(50, (2, 5))
    model = gpt.int8_linears(copy.deepcopy(before))
    assert torch.backends.quantized.engine == engine
    assert not any(type(module) is nn.Linear for module in model.modules()) and model(ids).dtype == torch.float32
    assert not any(parameter.dim() == 2 for name, parameter in model.named_parameters() if "emb" not in name)
    assert torch.allclose(model.tok_emb(ids).float(), before.tok_emb(ids), rtol=1e-3)
    with pytest.raises(ValueError, match="m.safetensors: int8 weights are for generation"):
        gpt.save_checkpoint(tmp_path / "m.safetensors", model)
    assert os.listdir(tmp_path) == []


def test_without_an_int8_product_the_model_stays_as_it_is_and_a_note_says_so(monkeypatch, capsys):
    """On Arm, and on a GPU."""
    model, ids = small_model(dtype=torch.float32), torch.randint(50, (2, 5))
    before = model(ids)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    assert torch.equal(gpt.int8_linears(model)(ids), before)
    assert capsys.readouterr().err == "note: int8 needs an x86 CPU, so weights stay in float32\n"
    monkeypatch.undo()
    engine = torch.backends.quantized.engine
    monkeypatch.setattr(gpt, "Int8Linear", lambda layer: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        gpt.int8_linears(model)
    assert torch.backends.quantized.engine == engine
    assert type(gpt.int8_linears(gpt.empty_model(SMALL, device="meta")).out_head) is nn.Linear


@needs_int8
@pytest.mark.filterwarnings("error::UserWarning")
def test_generate_takes_int8_and_prints_no_warning(tmp_path, capsys):
    """Not even where warnings are errors."""
    tokenizer = CharTokenizer.train(["abc ab ac"])
    gpt.save_checkpoint(tmp_path / "m.safetensors", small_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size),
                        tokenizer)
    assert gpt.main(["--int8", "--prompt", "ab", "--checkpoint", str(tmp_path / "m.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ab") and not err


MEMORY = """
import re, sys
sys.path.insert(0, sys.argv[1])
import gpt
import torch
gpt.keep_freed_memory()
def used():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
gpt.generate(gpt.GPTModel(gpt.GPTConfig(9, 8, 8, 2, 1)), torch.tensor([[1]]), 2)  # imports what is imported late
before = used()
model = gpt.load_checkpoint(sys.argv[2])[0]
if sys.argv[3] == "int8":
    gpt.int8_linears(model)
gpt.generate(model, torch.tensor([[1, 2, 3]]), 4, temperature=0)
print(used() - before)"""


@needs_int8
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_model_in_int8_holds_at_most_six_tenths_of_the_memory(tmp_path):
    """48M parameters in GPT-2's proportions: what the process holds after loading and generating."""
    config = GPTConfig(20_000, 256, 512, 8, 12, tie_weights=True)
    gpt.save_checkpoint(tmp_path / "m.safetensors", gpt.copy_weights(
        model := gpt.empty_model(config), {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}, ""))
    plain, small = (float(subprocess.run([sys.executable, "-c", MEMORY, os.path.dirname(gpt.__file__),
                                          tmp_path / "m.safetensors", kind], capture_output=True, text=True, check=True,
                                         timeout=300).stdout) for kind in ("float32", "int8"))
    assert plain > 180 and small < 0.6 * plain, (plain, small)


# --- files


def test_safetensors_written_by_hand_follow_the_format(tmp_path):
    """The bytes, taken apart here by the format's rules, give back header, metadata and every tensor."""
    tensors = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor([1, -2], dtype=torch.int64),
               "empty": torch.zeros(0, 4), "one": torch.tensor(3.5, dtype=torch.float64),
               "half": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)}
    gpt.write_safetensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    raw = (tmp_path / "t.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header["__metadata__"]["made"] == "here"
    begin, end = header["b"]["data_offsets"]
    assert struct.unpack("<6f", raw[8 + length + begin : 8 + length + end]) == (0, 1, 2, 3, 4, 5)
    assert struct.unpack("<2q", raw[8 + length :][slice(*header["a"]["data_offsets"])]) == (1, -2)
    read, metadata = gpt.read_safetensors(tmp_path / "t.safetensors")
    assert metadata["made"] == "here" and set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert os.listdir(tmp_path) == ["t.safetensors"]  # no temporary file stays


def test_a_checkpoint_gives_back_the_same_model_tokenizer_and_history(tmp_path):
    """Weights bitwise, config, tokenizer, info; tied heads stay tied, are stored once; no random number is drawn."""
    chars = CharTokenizer.train(["abc"])
    for tied in (True, False):
        model, path = small_model(dtype=torch.float32, tie_weights=tied), tmp_path / "model.safetensors"
        digest = gpt.save_checkpoint(path, model, chars, stage="test", step=3)
        assert gpt.read_safetensors(path)[1]["data_sha256"] == digest
        before = torch.get_rng_state()
        loaded, tokenizer, info = gpt.load_checkpoint(path)
        assert torch.equal(torch.get_rng_state(), before)
        assert tokenizer.to_dict() == chars.to_dict() and info == {"kind": "gpt", "stage": "test", "step": 3}
        assert loaded.config == model.config and not loaded.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert (loaded.out_head.weight.data_ptr() == loaded.tok_emb.weight.data_ptr()) is tied
        assert ("out_head.weight" in gpt.read_checkpoint(path)[0]) is not tied
        assert torch.equal(gpt.load_language_model(path)[0].out_head.weight, model.out_head.weight)


def test_a_checkpoint_of_the_first_edition_is_read(tmp_path):
    """It says `made` where we say `info`."""
    model, path = small_model(dtype=torch.float32), tmp_path / "old.safetensors"
    metadata = {"kind": "gpt", "config": json.dumps(dataclasses.asdict(SMALL)), "made": '{"kind": "gpt", "step": 7}'}
    gpt.write_safetensors(path, gpt.distinct_tensors(model), metadata)
    loaded, tokenizer, info = gpt.load_checkpoint(path)
    assert info == {"kind": "gpt", "step": 7} and tokenizer is None
    assert torch.equal(loaded.pos_emb.weight, model.pos_emb.weight)


def test_adapters_that_are_not_merged_are_not_saved(tmp_path):
    """Their names would fit no model that is loaded."""
    with pytest.raises(ValueError, match="m.safetensors: .*not merged; call lora.merge_lora"):
        gpt.save_checkpoint(tmp_path / "m.safetensors", lora.apply_lora(small_model(), rank=2))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("config", [dict(vocab_size=2**40), dict(n_layers=10**9)])
def test_no_memory_is_allocated_for_a_config_larger_than_its_file(config, tmp_path):
    """A file of 100 kB with intact hashes that describes a model of terabytes is refused at once."""
    model, path = small_model(dtype=torch.float32), tmp_path / "m.safetensors"
    metadata = {"config": json.dumps({**dataclasses.asdict(SMALL), **config}), "info": "{}"}
    gpt.write_safetensors(path, gpt.distinct_tensors(model), metadata)
    with pytest.raises(ValueError, match="m.safetensors: its config describes [0-9,]+ parameters or more, the file"):
        gpt.load_checkpoint(path)


def test_metadata_that_does_not_fit_is_one_line(tmp_path):
    """Unknown, missing and nested fields of config, info and tokenizer, with intact hashes."""
    path, good = tmp_path / "m.safetensors", {"config": json.dumps(dataclasses.asdict(SMALL)), "info": "{}"}
    for wrong in (dict(config="{}x"), dict(config='{"layers": 3}'), dict(config="[" * 100_000),
                  dict(config='{"emb_dim": 0}'), dict(config='{"drop_rate": "0"}'), dict(info="[1]"),
                  dict(tokenizer="{}")):
        gpt.write_safetensors(path, gpt.distinct_tensors(small_model()), {**good, **wrong})
        with pytest.raises(ValueError, match="m.safetensors: its metadata does not fit"):
            gpt.load_checkpoint(path)


def test_only_language_models_with_a_tokenizer_generate(tmp_path):
    """A reward model is refused by both loaders, a classifier and a file without a tokenizer by the second."""
    model, path = small_model(dtype=torch.float32), tmp_path / "m.safetensors"
    gpt.save_checkpoint(path, model, CharTokenizer.train(["abc"]), kind="reward")
    for load in (gpt.load_checkpoint, gpt.load_language_model):
        with pytest.raises(ValueError, match="m.safetensors is a reward model, not a language model"):
            load(path)
    assert gpt.read_checkpoint(path)[3] == {"kind": "reward"}
    gpt.save_checkpoint(path, model, CharTokenizer.train(["abc"]), kind="classifier")
    with pytest.raises(ValueError, match="m.safetensors is a classifier, not a language model"):
        gpt.load_language_model(path)
    gpt.save_checkpoint(path, model)
    with pytest.raises(ValueError, match="m.safetensors holds no tokenizer"):
        gpt.load_language_model(path)


def test_without_tokenizer_py_weights_load_and_a_note_says_so(tmp_path, monkeypatch, capsys):
    """gpt.py copied alone: the tokenizer of a checkpoint is None, one line on stderr."""
    gpt.save_checkpoint(tmp_path / "m.safetensors", small_model(dtype=torch.float32), CharTokenizer.train(["abc"]))
    monkeypatch.delitem(sys.modules, "tokenizer")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "tokenizer.py").exists()])
    monkeypatch.chdir(tmp_path)
    assert gpt.load_checkpoint(tmp_path / "m.safetensors")[1:] == (None, {"kind": "gpt"})
    error = capsys.readouterr().err
    assert error.startswith("note: no tokenizer.py") and error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_one_compilation_serves_every_length_and_is_stored_as_what_was_compiled(tmp_path):
    """What --compile does: batches of other shapes start no new compilation and break no graph; a mask starts one.

    Its file has no prefix before each name, which no reader would know."""
    model, compiled = small_model(dtype=torch.float32), []
    hidden = torch.compile(model.hidden, dynamic=True, fullgraph=True,
                           backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    for shape in ((2, 10), (3, 12), (5, 7), (4, 16)):
        ids = torch.randint(50, shape)
        assert torch.allclose(hidden(ids), model.hidden(ids), atol=1e-5)
    assert len(compiled) == 1
    for shape in ((2, 10), (3, 12)):
        hidden(torch.randint(50, shape), torch.ones(shape, dtype=torch.long))
    assert len(compiled) == 2
    gpt.save_checkpoint(tmp_path / "m.safetensors", torch.compile(model))
    assert torch.equal(gpt.load_checkpoint(tmp_path / "m.safetensors")[0](ids), model(ids))


def test_a_classifier_head_comes_back_with_its_own_shape(tmp_path):
    """A head of three rows with a bias, in place of the vocabulary's, survives saving and loading."""
    model = small_model(dtype=torch.float32)
    model.out_head = nn.Linear(32, 3)
    gpt.save_checkpoint(tmp_path / "c.safetensors", model, kind="classifier")
    loaded = gpt.load_checkpoint(tmp_path / "c.safetensors")[0]
    ids = torch.randint(50, (2, 5))
    assert torch.equal(loaded(ids), model(ids)) and loaded(ids).shape == (2, 5, 3)


def test_json_is_written_whole_and_is_json(tmp_path):
    """Indented, any character as it is, and null for what JSON has no number for."""
    gpt.write_json(tmp_path / "a.json", {"é": [1, math.inf, {"b": math.nan}]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "é": [\n') and json.loads(text) == {"é": [1, None, {"b": None}]}
    with pytest.raises(TypeError):
        gpt.write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text and os.listdir(tmp_path) == ["a.json"]


def test_weights_that_do_not_fit_name_the_tensor(tmp_path):
    """Missing, unknown, misshapen and whole-number tensors are refused by name and nothing is copied."""
    model = small_model(dtype=torch.float32)
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "trf_blocks.1.ffn.fc1.weight"
    wrong = [({k: v for k, v in good.items() if k != name}, name), ({**good, "extra": torch.ones(1)}, "extra"),
             ({**good, name: good[name].T}, name), ({**good, name: good[name].to(torch.int8)}, name)]
    for tensors, named in wrong:
        tensors["tok_emb.weight"] = torch.zeros_like(good["tok_emb.weight"])
        with pytest.raises(ValueError, match=f"here: .*{named}"):
            gpt.copy_weights(model, tensors, "here")
        assert torch.equal(model.tok_emb.weight, good["tok_emb.weight"])


def test_names_of_a_wrapper_are_said_to_be_one(tmp_path):
    """A file of torch.compile's or DDP's state_dict says where the model is; other unknown names blame no wrapper."""
    model = small_model(dtype=torch.float32)
    metadata = {"config": json.dumps(dataclasses.asdict(model.config)), "info": json.dumps({"kind": "gpt"})}
    for prefix in ("_orig_mod.", "module.", "modular."):
        path = tmp_path / f"{prefix}safetensors"
        gpt.write_safetensors(path, {prefix + name: each for name, each in model.named_parameters()}, metadata)
        with pytest.raises(ValueError, match="unknown tensors") as caught:
            gpt.load_checkpoint(path)
        assert ("save its ._orig_mod or .module" in str(caught.value)) == (prefix != "modular.")


# --- command line


def test_info_counts_work_and_memory_by_the_known_formulas(capsys):
    """163,009,536 parameters, 621.83 MB untied, as published.

    Tied: 16 bytes per parameter to train, 73.7 kB of cache per token, 2 FLOPs per matrix weight plus attention."""
    assert gpt.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "(0-11): 12 x TransformerBlock" in out and "Linear(in_features=768, out_features=2304" in out
    line = next(line for line in out.splitlines() if line.startswith("gpt2, no bias"))
    assert "163,009,536" in line and "621.83" in line
    line = next(line for line in out.splitlines() if line.startswith("gpt2  "))
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    flops = 2 * matrices + 12 * 2 * 2 * 1024 * 768  # scores and weighted sum over a full context
    assert line.split()[-3:] == [f"{124_439_808 * 16 / 1e9:.2f}", "73.7", f"{flops / 1e9:.3f}"]


def test_generate_and_inspect_print(capsys, tmp_path):
    """The two commands on a small character model: same seed same text, --stop cuts, shares as by hand."""
    tokenizer = CharTokenizer.train(["abcdefgh "])
    path, model = str(tmp_path / "m.safetensors"), small_model(dtype=torch.float32, vocab_size=9)
    gpt.save_checkpoint(path, model, tokenizer)
    texts = []
    for flags in ([], [], ["--seed", "2"]):
        assert gpt.main(["--checkpoint", path, "--prompt", "abc", "--max_new_tokens", "30", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("abc") and len(texts[0]) == 34
    stop = texts[0][10:12]
    assert gpt.main(["--checkpoint", path, "--prompt", "abc", "--max_new_tokens", "30", "--stop", stop]) == 0
    assert capsys.readouterr().out == texts[0][: 3 + texts[0][3:].index(stop)] + "\n"
    assert gpt.main(["inspect", "--checkpoint", path, "--prompt", "a bad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["'a'", "'", "'b'", "'a'", "'d'"]
    assert lines[0].split() == ["'a'", "'a'", "100%"] and lines[4].count("%") == 3
    ids = torch.tensor([tokenizer.encode("a bad")])
    states = model.trf_blocks[0](model.embed(ids, torch.arange(5)))
    weights = model.trf_blocks[1].attn.by_steps(model.trf_blocks[1].ln1(states))[1][0].mean(0)
    for line, row in zip(lines, weights.tolist()):
        wanted = [f"{share:.0%}" for share in sorted(row, reverse=True) if share][:3]
        assert [word for word in line.split() if word.endswith("%")] == wanted


def test_mistakes_on_the_command_line_are_one_line(capsys, tmp_path):
    """Status and message of wrong flags, values, commands and files."""
    model = tmp_path / "model.safetensors"
    gpt.save_checkpoint(model, small_model(dtype=torch.float32))
    (tmp_path / "text").write_text("no model, only text", encoding="utf-8")
    cases = [(["--promt", "x"], 2, "did you mean --prompt"), (["--temperature", "-1"], 2, "temperature"),
             (["--temperature", "nan"], 2, "temperature"), (["--seed", "-1"], 2, "seed"),
             (["invent"], 2, "unknown command 'invent'"), (["--top_p", "0"], 2, "top_p"),
             (["--checkpoint", str(tmp_path / "none")], 1, "python train.py"),
             (["--checkpoint", str(tmp_path)], 1, "is a folder; name the file"),
             (["--checkpoint", str(tmp_path / "text")], 1, "not a safetensors file"),
             (["--max_new_tokens", "-1"], 2, "--max_new_tokens must be at least 0"),
             (["--num_samples", "0"], 2, "--num_samples must be at least 1"),
             (["--prompt", "caf\udce9"], 2, "'caf\\udce9' is not UTF-8"), (["--stop", "\udcff"], 2, "not UTF-8"),
             (["inspect", "--prompt", "caf\udce9"], 2, "not UTF-8"),
             (["--checkpoint", str(model)], 1, "holds no tokenizer"), (["info", "--model", "x"], 1, "no checkpoint x")]
    if not torch.cuda.is_available():
        cases.append((["--checkpoint", str(model), "--device", "cuda"], 2, "--device cpu"))
    for argv, status, words in cases:
        assert gpt.main(argv) == status, argv
        out, err = capsys.readouterr()
        assert words in err and err.startswith("error: ") and err.count("\n") == 1 and not out, (argv, err)


ENDINGS = [  # what a function raises, the exit status, and what is said
    (argparse.ArgumentError(None, "--x is\nwrong"), 2, "error: --x is wrong"), (ValueError("no"), 1, "error: no"),
    (FileNotFoundError(2, "No such file", "a"), 1, "error: a: No such file"),
    (MemoryError(), 1, "lower --batch_size or --context_length"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes"), 1,
     "error: out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 1, "error: out of memory"),
    (ModuleNotFoundError("No module", name="lora"), 1, "copy lora.py beside"),
    (ModuleNotFoundError("No module", name="tiktoken"), 1, "pip install --upgrade tiktoken"),
    (KeyboardInterrupt(), 130, ""), (BrokenPipeError(), 141, ""), (SystemExit(2), 2, ""), (SystemExit(143), 143, "")]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("name", ["gpt", "gpt2_weights", "train", "finetune_cls", "finetune_sft", "rlhf"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path, name):
    """Status 130 and nothing on stderr; the torch here is a file that sends the signal and then would take a minute."""
    (tmp_path / "torch.py").write_text("import os, signal, time\n"
                                       "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                                       "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n", encoding="utf-8")
    done = subprocess.run([sys.executable, Path(gpt.__file__).with_name(f"{name}.py")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("error, status, said", ENDINGS)
def test_every_ending_of_a_command_has_its_exit_status(error, status, said, capsys, monkeypatch):
    """One line on stderr at most, and with debug the traceback of what is a mistake; ours keep theirs in any case."""
    def function():
        raise error

    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1)
    assert gpt.guarded(function) == status
    err = capsys.readouterr().err
    assert said in err and err.strip().count("\n") == 0 and bool(err) is bool(said)
    if status in (1, 2) and said:
        with pytest.raises(type(error)):
            gpt.guarded(function, debug=True)
    error = RuntimeError("shape")
    with pytest.raises(RuntimeError):
        gpt.guarded(function)
    assert gpt.guarded(lambda x: x, 3) == 3 and gpt.guarded(lambda: None) == gpt.guarded(dict) == 0


def test_help_lists_the_commands_and_each_command_its_flags(capsys):
    """The script's help is the module's docstring and a line per command; real default values stand in a command's."""
    assert gpt.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(gpt.__doc__.strip())
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["generate", "info", "inspect"]
    assert gpt.main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "(default: 0.8)" in out and "(default: None)" not in out and "--debug" in out
    assert len(out.splitlines()) < 48  # two screens


def test_a_device_that_is_not_there_is_refused():
    """Also numbers of devices that do not exist."""
    assert gpt.pick_device("cpu") == torch.device("cpu") and gpt.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("meta", "cpu:x", "tpu", "", "cuda:99"):
        with pytest.raises(argparse.ArgumentError, match="use --device cpu"):
            gpt.pick_device(name)
