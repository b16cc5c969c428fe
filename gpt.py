"""GPT-2 in one file: the model, text generation with a key/value cache, and checkpoints that need no pickle.

    python gpt.py --prompt "Once there was"          generate text with the model that `python train.py` wrote
    python gpt.py generate --checkpoint gpt2 --prompt "Every effort moves you" --top_k 25
    python gpt.py info --model gpt2-xl               layers, parameters, bytes to train, FLOPs a token
    python gpt.py inspect --prompt "Tom has a cat."  who attends to whom, printed and drawn as SVG

To use it elsewhere copy this file alone; only the command line needs tokenizer.py too. As a library:

    model, tokenizer, made = load_checkpoint("out/pretrain/model.safetensors")  # a dict, for tokenizer.from_dict
    ids = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=20, temperature=0.8, top_p=0.95)

The text reads from leaf to root: options, layer norm, GELU, feed-forward, attention, block, model; then sampling and
generation; then files; then the command line. Shapes: B batch, T time (tokens), C channels (emb_dim), H heads,
D = C / H head size, V vocabulary. `mask` (B, T) holds 1 where a token counts and 0 for padding; the numbers 2, 3, ...
mark further documents packed into the same row.

Three layers are written twice: `forward` calls PyTorch's fused kernel, `by_steps` spells out what it computes. The
tests hold the two equal; read `by_steps` first.

Differs from OpenAI's code: tensor names, the spread of new position embeddings, and nothing is computed for positions
whose logits nobody reads. Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2);
Vaswani et al. 2017, "Attention Is All You Need", equation 1 and section 3.2.2.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # we never use it, so its absence is no news

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # a target that no loss counts, PyTorch's own default

# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; `GPTConfig(**d)` takes a dict with these names.

    The defaults are GPT-2 small without query/key/value bias and with a head of its own: 163,009,536 parameters."""

    vocab_size: int = 50257  # V, the number of different tokens
    context_length: int = 1024  # tokens the model can see at once
    emb_dim: int = 768  # C, channels
    n_heads: int = 12  # H, must divide emb_dim
    n_layers: int = 12
    drop_rate: float = 0.1  # dropout on embeddings, attention weights and residual branches
    qkv_bias: bool = False  # GPT-2 has it
    tie_weights: bool = False  # the head shares the token embedding's matrix; GPT-2 does
    exact_gelu: bool = False  # GELU by erf (on a CPU 3 times as fast) instead of GPT-2's tanh form

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and below 1, not {self.drop_rate}")


def _gpt2(emb_dim, n_layers, n_heads):
    return GPTConfig(emb_dim=emb_dim, n_layers=n_layers, n_heads=n_heads, qkv_bias=True, tie_weights=True)


GPT_CONFIGS = {
    # trains in minutes on a laptop
    "tiny": GPTConfig(1024, 128, 128, 4, 4, drop_rate=0.0, tie_weights=True, exact_gelu=True),
    "gpt2": _gpt2(768, 12, 12),  # 124M, OpenAI's four sizes
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),  # 355M
    "gpt2-large": _gpt2(1280, 36, 20),  # 774M
    "gpt2-xl": _gpt2(1600, 48, 25),  # 1558M
}

# ---------------------------------------------------------------------------------------------------------------------
# Layers, from leaf to root


class LayerNorm(nn.Module):
    """Layer normalisation with a learned scale and shift (Ba et al. 2016): (..., C) -> (..., C)."""

    def __init__(self, emb_dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(emb_dim))
        self.bias = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def by_steps(self, x):
        """Return the same as `forward`, written out; the variance is the biased one (divided by C), as in GPT-2."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


class GELU(nn.Module):
    """The GELU activation in the tanh form that GPT-2 was trained with (Hendrycks and Gimpel 2016, section 2).

    The exact form, x times the normal distribution's integral up to x, is PyTorch's default. It differs by up to 5e-4:
    enough to change the logits of OpenAI's weights, nothing to a model that is trained with it."""

    def __init__(self, exact=False):
        super().__init__()
        self.exact = exact

    def forward(self, x):
        return F.gelu(x, approximate="none" if self.exact else "tanh")

    def by_steps(self, x):
        """Return the same as `forward`, written out."""
        if self.exact:
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Linear(nn.Linear):
    """PyTorch's linear layer, (..., in) -> (..., out), faster where a CPU generates tokens for a few rows at once.

    A large weight is read from memory for few multiplications then, and the library computes W x^T in 0.7 of the time
    of x W^T: 16 rows through GPT-2's 48 layers take 33 ms instead of 44 (2 cores)."""

    takes_adapters = True  # for lora.py: nothing here reads the weight of a layer without calling it

    def forward(self, x):
        rows = x.numel() // self.in_features
        if torch.is_grad_enabled() or not 4 < rows <= 48 or self.weight.numel() < 1 << 19 or x.device.type != "cpu":
            return super().forward(x)
        y = (self.weight @ x.reshape(rows, -1).T).T.contiguous()  # attention has no fast kernel for other orders
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times wider inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.emb_dim, 4 * config.emb_dim)
        self.gelu = GELU(config.exact_gelu)
        self.fc2 = Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x):
        return self.fc2(self.gelu(self.fc1(x)))


class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads side by side (Vaswani et al. 2017, 3.2.2): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.drop_rate = config.n_heads, config.drop_rate
        self.qkv = Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)  # all heads, one product
        self.out_proj = Linear(config.emb_dim, config.emb_dim)

    def heads(self, x):
        """Return queries, keys and values, each (B, H, T, D)."""
        B, T, C = x.shape
        return self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)

    def forward(self, x, allowed=None, cache=None, layer=0, rows=None):
        """`allowed` (B, 1, T, S) says which of S keys a query may see; None means all up to itself.

        With `rows` (N,), indices into the B * T positions, only these come out: (N, C)."""
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D), the S - T earlier positions in front
        causal = allowed is None and x.shape[1] > 1  # a single new token may see everything before it
        dropout = self.drop_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(x.shape)  # heads joined: (B, H, T, D) -> (B, T, C)
        return self.out_proj(y if rows is None else y.flatten(0, 1).index_select(0, rows))

    def by_steps(self, x, allowed=None):
        """Return the same as `forward` without a cache, written out, and the attention weights (B, H, T, T)."""
        T = x.shape[1]
        q, k, v = self.heads(x)
        scores = q @ k.transpose(2, 3)  # how well each query matches each key: (B, H, T, T)
        scores = scores / math.sqrt(q.shape[-1])  # sums of D products have a spread of sqrt(D): undo it
        if allowed is None:
            allowed = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)  # the future is invisible
        weights = torch.softmax(scores, dim=-1)  # each row sums to 1
        dropped = F.dropout(weights, self.drop_rate, self.training)
        y = dropped @ v  # the weighted sum of the values: (B, H, T, D)
        y = y.transpose(1, 2).reshape(x.shape)  # heads joined: (B, T, C)
        return self.out_proj(y), weights


class TransformerBlock(nn.Module):
    """A pre-norm block, attention then feed-forward, each added to its input: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = LayerNorm(config.emb_dim)
        self.attn = MultiHeadAttention(config)
        self.ln2 = LayerNorm(config.emb_dim)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x, allowed=None, cache=None, layer=0, rows=None):
        attended = self.drop(self.attn(self.ln1(x), allowed, cache, layer, rows))
        x = attended + (x if rows is None else x.flatten(0, 1).index_select(0, rows))
        return x + self.drop(self.ffn(self.ln2(x)))


class KVCache:
    """The keys and values of the positions seen so far, in memory claimed once.

    `length` positions are filled. Only attention layers call `append`, and only `GPTModel.hidden` calls `extend_mask`.
    Half of the bytes that `gpt.py info` gives a token are keys, half values."""

    def __init__(self, config, batch_size, max_length, device="cpu", dtype=torch.float32):
        shape = (config.n_layers, 2, batch_size, config.n_heads, max_length, config.emb_dim // config.n_heads)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.mask = None  # (B, length) once a mask was given
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) behind the earlier positions; return all of them, (B, H, length + T, D) each."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def extend_mask(self, mask, ids):
        """Return the mask of all positions, earlier and new, (B, length + T), or None where every token counts."""
        if mask is None and self.mask is None:
            return None
        ones = torch.ones_like(ids)
        earlier = ones.new_ones(len(ids), self.length) if self.mask is None else self.mask
        self.mask = torch.cat([earlier, ones if mask is None else mask], dim=1)
        return self.mask

    def repeat(self, times):
        """Give every row `times` copies, side by side: one prefill serves several samples."""
        self.kv = self.kv.repeat_interleave(times, dim=2)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)


def positions_in_documents(mask):
    """Return each token's position (B, T) counted from the start of its document (a run of equal numbers in `mask`).

    Example: [[0, 0, 1, 1, 1, 2, 2]] -> [[0, 1, 0, 1, 2, 0, 1]]"""
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    starts = torch.ones_like(mask, dtype=torch.bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask(mask, past, T, device):
    """Return `allowed` (B or 1, 1, T, S): which of the S = past + T keys each of the last T queries may see.

    A query sees its own document up to itself; padding (0) sees padding, so that no row is empty."""
    allowed = torch.ones(past + T, past + T, dtype=torch.bool, device=device).tril()[past:]
    if mask is not None:
        allowed = allowed & (mask[:, past:, None] == mask[:, None, :])
    return allowed.view(-1, 1, T, past + T)


class GPTModel(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, V); entry t scores the token after position t."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)  # learned, so the context is fixed
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.emb_dim)
        self.out_head = Linear(config.emb_dim, config.vocab_size, bias=False)
        self.initialise()
        self.tie()

    def initialise(self):
        """Draw the weights from N(0, 0.02), biases 0, as OpenAI's model.py does except for positions (0.01 there).

        Every block adds two branches to the residual stream; their last matrices are drawn smaller by
        1/sqrt(2 n_layers), so that its spread at the top does not grow with depth (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)

    def tie(self):
        """Let the head share the token embedding's matrix, where the config says so: V x C parameters fewer."""
        if self.config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    @property
    def device(self):
        """The device that the weights are on."""
        return self.tok_emb.weight.device

    def embed(self, ids, positions):
        """Return token plus position embeddings, ids (B, T) and positions (T,) or (B, T) -> (B, T, C)."""
        return self.drop_emb(self.tok_emb(ids) + self.pos_emb(positions))

    def hidden(self, ids, mask=None, cache=None, rows=None):
        """Return the last layer's normalised states (B, T, C), which the head turns into logits.

        With a cache, `ids` are only the new tokens and `mask` covers only them. With `rows` (N,), indices into the
        B * T positions, only their states come out, (N, C), and most of the last block is computed for them alone.
        Raises ValueError where the text is longer than the context."""
        T, past = ids.shape[1], 0 if cache is None else cache.length
        if past + T > self.config.context_length:
            raise ValueError(f"{past + T} tokens do not fit into the context of {self.config.context_length}")
        if cache is not None:
            mask = cache.extend_mask(mask, ids)
        if mask is not None:
            positions, allowed = positions_in_documents(mask)[:, past:], attention_mask(mask, past, T, ids.device)
        else:
            positions = torch.arange(past, past + T, device=ids.device)
            allowed = attention_mask(None, past, T, ids.device) if past and T > 1 else None
        x = self.states(ids, positions, allowed, cache, rows)
        if cache is not None:
            cache.length += T
        return x

    def states(self, ids, positions, allowed=None, cache=None, rows=None):
        """Return the last layer's normalised states (B, T, C) of tokens at `positions`, (T,) or (B, T).

        `allowed` (B, 1, T, S) says which of S keys a query may see; of `cache` only `append` is called; `rows` is as
        in `hidden`, which finds out the others from a mask."""
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, allowed, cache, layer, rows if layer == len(self.trf_blocks) - 1 else None)
        return self.final_norm(x)

    def forward(self, ids, mask=None, cache=None):
        return self.out_head(self.hidden(ids, mask, cache))


@torch.no_grad()
def attention_maps(model, ids):
    """Return every layer's attention weights as a list of (B, H, T, T), computed by the written-out steps."""
    was_training = model.training
    model.eval()
    x, maps = model.embed(ids, torch.arange(ids.shape[1], device=ids.device)), []
    for block in model.trf_blocks:
        attended, weights = block.attn.by_steps(block.ln1(x))
        x = x + attended
        x = x + block.ffn(block.ln2(x))
        maps.append(weights)
    model.train(was_training)
    return maps


def token_logprobs(logits, ids, temperature=1.0):
    """Return the log-probability of each next token: logits (B, T, V), ids (B, T) -> (B, T - 1), in nats.

    Entry t scores `ids[:, t + 1]`, which the logits of position t predict; those of the last position go unused."""
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    return logprobs.gather(2, ids[:, 1:, None]).squeeze(2)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and generation


def check_sampling(vocab_size, temperature, top_k, top_p, min_p, repetition_penalty):
    """Raise ValueError for a decoding option outside its range."""
    if not (temperature == 0 or 1e-6 <= temperature < math.inf):  # below, logits / temperature can overflow
        raise ValueError(f"temperature must be 0 (greedy) or a number from 0.000001 up, not {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be at least 1 and at most the size of the vocabulary, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie between 0 and 1, not {min_p}")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be a positive number (1 = off), not {repetition_penalty}")


def penalise_repetition(logits, ids, penalty):
    """Return logits (B, V) with every token that `ids` (B, T) holds made less likely (Keskar et al. 2019, CTRL, 4.1).

    CTRL divides all of them by the penalty, which lifts negative logits; these are multiplied, as Hugging Face does."""
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def sampling_probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Return the probabilities that sampling draws from: logits (B, V) -> (B, V), temperature above 0.

    Temperature comes first, then top-k (Fan et al. 2018), top-p (Holtzman et al. 2020: the fewest tokens that together
    reach p) and min-p (Nguyen et al. 2024: at least min_p times the best token's probability). Ties let no extra
    token in: of equal logits the lower id stays."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_k is None and top_p is None and not min_p:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        kept = torch.where(keep, ordered, 0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
        keep &= kept.cumsum(dim=-1) - kept < top_p  # the mass in front of a token: the one that crosses p stays
    if min_p:
        keep &= ordered >= min_p * ordered[:, :1]
    probs = torch.zeros_like(probs).scatter(1, order, torch.where(keep, ordered, 0))
    return probs / probs.sum(dim=-1, keepdim=True)


def sample(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Return one token id a row: logits (B, V) -> (B,). Temperature 0 takes the most likely token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = sampling_probabilities(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(1)


class RecordedStep:
    """The step from one token a row to the next logits, in fixed shapes: ids (B,) -> logits (B, V).

    On an NVIDIA GPU it is recorded as a CUDA graph and replayed, one launch instead of a hundred and more; elsewhere
    it runs as it is. A graph keeps its shapes and addresses: so each step attends to the whole cache, where positions
    not filled yet are hidden, and the place to fill is a tensor. The next step overwrites the logits. `cache` holds
    the prompt and has room for more; `mask` (B, T) is 1 for those of its tokens that count. To the model the step
    itself is the cache: all it calls is `append`. Recording costs four steps and waits for the GPU."""

    streams = {}  # {GPU: its stream for recording}: the libraries keep memory for each stream that they meet

    def __init__(self, model, cache, mask=None):
        B, S = cache.kv.shape[2], cache.kv.shape[4]
        self.model, self.cache, self.graph = model, cache, None
        cache.kv[..., cache.length :, :] = 0  # hidden, but 0 times what memory happens to hold must be 0
        self.index = torch.arange(S, device=model.device)
        self.counts = torch.ones(B, S, dtype=torch.bool, device=model.device)
        if mask is not None:
            self.counts[:, : mask.shape[1]] = mask == 1
        self.start = torch.where(self.counts, 0, self.index + 1).amax(dim=1, keepdim=True)  # behind the padding
        self.place = torch.tensor([cache.length], device=model.device)
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=model.device)
        if model.device.type == "cuda":
            self.record()

    def record(self):
        """Record the step after three trial runs, in which the libraries claim the memory they work in."""
        device = self.model.device
        with torch.cuda.device(device):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream()
            stream = self.streams[device]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = self.step()

    def append(self, layer, k, v):
        """Store k, v (B, H, 1, D) at the place to fill; return all positions, (B, H, S, D) each."""
        keys, values = self.cache.kv[layer]
        return keys.index_copy_(2, self.place, k.to(keys.dtype)), values.index_copy_(2, self.place, v.to(keys.dtype))

    def step(self):
        """Return the logits (B, V) behind `ids`, which stand at `place`."""
        allowed = (self.counts & (self.index <= self.place))[:, None, None]
        return self.model.out_head(self.model.states(self.ids, self.place - self.start, allowed, self)[:, -1])

    def __call__(self, ids):
        self.ids.copy_(ids[:, None])
        if self.graph is None:
            self.logits = self.step()
        else:
            self.graph.replay()
        self.place += 1
        self.cache.length += 1
        return self.logits


def check_prompts(model, ids, mask, max_new_tokens, num_samples):
    """Raise ValueError unless `generate` can continue the prompts `ids` (B, T) with this `mask`."""
    if not torch.is_tensor(ids) or ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError("prompts are token ids in a tensor (B, T) of int64; for one prompt: torch.tensor([ids])")
    if ids.device != model.device:
        raise ValueError(f"the prompts are on {ids.device}, the model is on {model.device}: ids.to(model.device)")
    if ids.shape[1] == 0 or max_new_tokens < 0 or num_samples < 1:
        raise ValueError("the prompt is empty" if ids.shape[1] == 0 else f"max_new_tokens must be at least 0 and "
                         f"num_samples at least 1, not {max_new_tokens} and {num_samples}")
    low, high = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if not 0 <= low <= high < model.config.vocab_size:
        raise ValueError(f"the prompts hold the ids {low} to {high}; the model knows 0 to "
                         f"{model.config.vocab_size - 1}")
    if mask is not None and not (mask.shape == ids.shape and mask.device == ids.device
                                 and bool((mask[:, -1] == 1).all())):
        raise ValueError("mask has the prompts' shape and device, and 1 in its last column: padding is on the left")


@torch.no_grad()
def generate_steps(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
                   repetition_penalty=None, eos_id=None, mask=None, stop=None, generator=None, num_samples=1,
                   cuda_graph=False):
    """Yield the next token of every row, (B * num_samples,), step by step; arguments as in `generate`."""
    check_prompts(model, ids, mask, max_new_tokens, num_samples)
    config, T = model.config, ids.shape[1]
    check_sampling(config.vocab_size, temperature, top_k, top_p, min_p, repetition_penalty)
    mask = None if mask is None or bool((mask == 1).all()) else mask.long()  # bool masks are welcome too
    was_training = model.training
    model.eval()
    try:
        logits, cache = _prefill(model, ids, mask, max_new_tokens, num_samples)
        ids = ids.repeat_interleave(num_samples, dim=0)
        mask = None if mask is None else mask.repeat_interleave(num_samples, dim=0)
        room = cache is not None and cache.length < config.context_length
        recorded = RecordedStep(model, cache, mask) if cuda_graph and room and max_new_tokens > 1 else None
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(max_new_tokens):
            if repetition_penalty not in (None, 1):
                said = ids if mask is None else torch.where(mask > 0, ids, ids[:, -1:])  # padding was never said
                logits = penalise_repetition(logits, said, repetition_penalty)
            next_ids = sample(logits, temperature, top_k, top_p, min_p, generator)
            next_ids = torch.where(done, ids[:, -1] if eos_id is None else eos_id, next_ids)
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            yield next_ids
            if eos_id is not None:
                done |= next_ids == eos_id
            if stop is not None:
                done |= torch.tensor([stop(row) for row in ids[:, T:].tolist()], device=ids.device)
            if step + 1 == max_new_tokens or (eos_id is not None or stop is not None) and bool(done.all()):
                return
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            if cache is not None and cache.length == config.context_length:
                cache = recorded = None  # positions are learned: beyond the context every token's position changes
            logits = recorded(next_ids) if recorded else _last_logits(model, ids, mask, cache)
    finally:
        model.train(was_training)


def _prefill(model, ids, mask, max_new_tokens, num_samples):
    """Return (logits behind the prompts (B * num_samples, V), cache), all of a prompt in one pass over the model.

    The cache has room for the new tokens too, up to the context; it is None where the prompts exceed that."""
    (B, T), context = ids.shape, model.config.context_length
    if T > context:
        return _last_logits(model, ids, mask, None).repeat_interleave(num_samples, dim=0), None
    cache = KVCache(model.config, B, min(context, T + max_new_tokens), ids.device, model.tok_emb.weight.dtype)
    rows = [] if mask is None else _rows_to_share(mask)
    logits = _prefill_shared(model, ids, mask, cache, rows) if rows else _last_logits(model, ids, mask, cache)
    if num_samples > 1:
        cache.repeat(num_samples)
    return logits.repeat_interleave(num_samples, dim=0), cache


def _last_logits(model, ids, mask, cache):
    """Return the last position's logits (B, V): of the tokens the cache lacks, or of the last window without one."""
    start = -model.config.context_length if cache is None else cache.length
    hidden = model.hidden(ids[:, start:], None if mask is None else mask[:, start:], cache)
    return model.out_head(hidden[:, -1])


def _rows_to_share(mask):
    """Return lists of left-padded prompts that fit side by side into the longest one's length, or [] if none do.

    First fit, the longest first: 16 prompts of 8 to 64 tokens need 10 rows."""
    lengths, T = mask.sum(dim=1).tolist(), mask.shape[1]
    if bool((mask.diff(dim=1) < 0).any()):  # holes between real tokens; the last is one, see `check_prompts`
        return []
    rows, room = [], []
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        row = next((row for row in range(len(rows)) if lengths[prompt] <= room[row]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(T)
        rows[row].append(prompt)
        room[row] -= lengths[prompt]
    return rows if len(rows) < len(lengths) else []


def _prefill_shared(model, ids, mask, cache, rows):
    """Return the last position's logits (B, V) and fill the cache, with the prompts of a row as documents in it.

    Padding costs as much as text: without it the prefill of those 16 prompts takes 0.6 of the time."""
    T, lengths = ids.shape[1], mask.sum(dim=1).tolist()
    packed_ids, packed_mask, places = torch.zeros_like(ids[: len(rows)]), torch.zeros_like(mask[: len(rows)]), {}
    for row, prompts in enumerate(rows):
        start = 0
        for number, prompt in enumerate(prompts, 1):
            end = start + lengths[prompt]
            packed_ids[row, start:end], packed_mask[row, start:end] = ids[prompt, -lengths[prompt] :], number
            places[prompt], start = (row, start, end), end
    packed = KVCache(model.config, len(rows), T, ids.device, cache.kv.dtype)
    last = torch.tensor([row * T + end - 1 for row, _, end in map(places.get, range(len(ids)))], device=ids.device)
    logits = model.out_head(model.hidden(packed_ids, packed_mask, packed, last))
    cache.kv[..., :T, :] = 0  # what stands in padding is never seen, but must be a number
    for prompt, (row, start, end) in places.items():
        cache.kv[:, :, prompt, :, T - (end - start) : T] = packed.kv[:, :, row, :, start:end]
    cache.mask, cache.length = mask, T
    return logits


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
             eos_id=None, mask=None, stop=None, generator=None, num_samples=1, cuda_graph=False):
    """Return the prompts with up to `max_new_tokens` tokens behind each: ids (B, T) -> (B * num_samples, T + n).

    Temperature 0 is greedy; see `sampling_probabilities` for the other options. Prompts of unequal length are padded
    on the left, and `mask` (B, T) holds 1 for their real tokens. A row ends with `eos_id`, or where
    `stop(new_ids: list) -> bool` says so; behind its end it holds `eos_id` (its last token, where there is none), and
    n shrinks when all rows have ended. `num_samples` continuations of a prompt stand side by side and share one
    prefill. Text longer than the context goes on with the last window. `cuda_graph` replays one recorded step where
    the model is on an NVIDIA GPU (`RecordedStep`). Raises ValueError for an empty prompt, padding on the right,
    ids that the model does not know, or an option outside its range.

    Example: generate(model, torch.tensor([[5, 6]]), 3, temperature=0).shape == (1, 5)"""
    steps = generate_steps(model, ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id,
                           mask, stop, generator, num_samples, cuda_graph)
    new = list(steps)
    ids = ids.repeat_interleave(num_samples, dim=0)
    return torch.cat([ids, torch.stack(new, dim=1)], dim=1) if new else ids


def stop_at(decode, strings):
    """Return a `stop` function for `generate`: true once the decoded new tokens hold one of `strings`."""
    return lambda new_ids: any(string in decode(new_ids) for string in strings)


def stream_text(decode, new_ids, stop_strings=()):
    """Yield the text of token ids piece by piece as they come, never half a character and nothing from a stop string.

    A token can end inside a UTF-8 character, which decodes to U+FFFD until its other bytes arrive; and the start of a
    stop string has to wait until it is clear that the rest does not follow."""
    ids, sent, text = [], 0, ""
    for next_id in new_ids:
        ids.append(int(next_id))
        text = decode(ids)
        ends = [text.index(string) for string in stop_strings if string in text]
        if ends:
            yield text[sent : min(ends)]
            return
        waiting = len(text) - len(text.rstrip("\ufffd"))
        for string in stop_strings:
            waiting = max([waiting] + [n for n in range(1, len(string)) if text.endswith(string[:n])])
        if len(text) - waiting > sent:
            yield text[sent : len(text) - waiting]
            sent = len(text) - waiting
    yield text[sent:]


def keep_freed_memory():
    """On glibc, tell malloc to keep freed blocks for reuse instead of handing each back to the kernel.

    A training step frees and claims the same large tensors over and over, and every page handed back costs a fault
    when it is claimed again: with this a step of GPT-2 on 256 tokens takes 0.9 of the time, and 0.85 where the kernel
    gives large pages too (THP_MEM_ALLOC_ENABLE=1; medians of three). GPT_MALLOC=0 leaves the allocator alone."""
    if sys.platform.startswith("linux") and os.environ.get("GPT_MALLOC") != "0":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap, not from mmap
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB of free heap


keep_freed_memory()

# ---------------------------------------------------------------------------------------------------------------------
# Files: safetensors by hand, and the checkpoint made of it
#
# A safetensors file is 8 bytes (the header's length N, little-endian), N bytes of JSON (for each tensor its dtype,
# shape and place in the data), then the data. Nothing in it can run. The reader refuses everything that the format
# forbids: https://github.com/huggingface/safetensors#format

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes, the format's own limit


@contextlib.contextmanager
def replacing(path):
    """Yield a binary file that becomes `path` when the block ends well; after an error `path` is what it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows cannot open a folder; elsewhere this makes the new name last
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        if error.errno and str(error.filename or temporary) == str(temporary):
            error.filename = str(path)  # the name that the caller knows
        raise
    finally:
        with contextlib.suppress(OSError):  # there is none, or on a read-only disk there never was
            temporary.unlink()


def tensor_bytes(tensor):
    """Return the memory of a contiguous CPU tensor as a buffer, without copying it."""
    buffer = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    buffer.tensor = tensor  # whose memory would be freed under it, where the caller holds only the buffer
    return buffer


def write_safetensors(path, tensors, metadata=None):
    """Return the sha256 of the data after writing named tensors to `path`, all at once or not at all.

    `metadata` maps strings to strings; the hash is added to it as `data_sha256`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    header, offset, digest = {}, 0, hashlib.sha256()
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        digest.update(tensor_bytes(tensor))
        offset = end
    metadata = {"format": "pt", **(metadata or {}), "data_sha256": digest.hexdigest()}
    header["__metadata__"] = {**metadata, "metadata_sha256": _metadata_sha256(metadata)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned and can be mapped
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))
    return digest.hexdigest()


def _metadata_sha256(metadata):
    lasting = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _no_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("the header names something twice")
    return dict(pairs)


def _no_constant(name):
    raise ValueError(f"the header holds {name}, which is not JSON")


def _read_header(path):
    """Return (header dict, where the data starts, file size) after checking all that can be checked without a name."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError("this is a git-lfs pointer, not the file itself; download the file")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"not a safetensors file: it has {size} bytes and its header would have {length}; give a "
                             "model.safetensors, which every training script writes")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the header is nested too deep") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"the header cannot be read: {error}") from None
    return header, 8 + length, size


def _check_entry(name, entry, expected_begin):
    """Return the end offset of one tensor's data; raises ValueError with the rule that its entry breaks."""
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if type(numbers) is not list or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor {name!r}: {what} must be whole numbers of at least 0")
    if len(shape) > 64:  # as many as PyTorch takes; a million of them would only be there to make the product slow
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions")
    if len(offsets) != 2 or offsets[0] != expected_begin:
        raise ValueError(f"tensor {name!r}: its data must begin at {expected_begin} (no holes, no overlaps), "
                         f"not at {offsets[:1]}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r}: {offsets[1] - offsets[0]} bytes of data do not hold {dtype} {shape}")
    return offsets[1]


def _place(entry):
    """Return the data offsets to sort by; an entry without sound ones comes first, to be refused."""
    offsets = entry.get("data_offsets") if type(entry) is dict else None
    return tuple(offsets) if type(offsets) is list and all(type(n) is int for n in offsets) else (-1,)


def _check_header(header, data_size):
    """Return the metadata; raises ValueError with the rule that the header breaks."""
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    end = 0
    for name in sorted(header, key=lambda name: _place(header[name])):
        end = _check_entry(name, header[name], end)
    if end != data_size:
        raise ValueError(f"the header describes {end} bytes of data, the file holds {data_size}")
    return metadata


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a safetensors file, the tensors mapped from disk, not read.

    They are views of private memory: writing to them never changes the file. Raises ValueError with the path and the
    rule that a malformed file breaks; nothing is allocated on the word of a header."""
    try:
        header, start, size = _read_header(path)
        metadata = _check_header(header, size - start)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).untyped_storage()
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            # A storage of its own, because a view within one must be aligned, and OpenAI's GPT-2 as published is not.
            piece = torch.asarray(data[start + begin : start + end], dtype=torch.uint8)
            if dtype == torch.bool and bool((piece > 1).any()):
                raise ValueError(f"tensor {name!r}: a BOOL is neither 0 nor 1")
            tensors[name] = piece.view(dtype).view(entry["shape"])
    except ValueError as error:
        raise ValueError(f"{path}: {str(error)[:500]}") from None  # a hostile name may be long
    return tensors, metadata


def file_sha256(path, start=0):
    """Return the sha256 of a file from byte `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_data(path, metadata):
    """Raise ValueError unless data and metadata of a file that we wrote have the hashes that its header names."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if (metadata.get("data_sha256") != file_sha256(path, start)
            or metadata.get("metadata_sha256") != _metadata_sha256(metadata)):
        raise ValueError(f"{path}: the data is damaged, its sha256 is not the one in the header; restore a copy or "
                         "train again")


def save_checkpoint(path, model, tokenizer=None, **made):
    """Return the sha256 of the data after writing model, config and tokenizer to one safetensors file.

    `made` says how the model came about (any JSON values); its `kind` is "gpt" unless given. A tied head is not stored
    twice. A model from torch.compile is stored as what was compiled."""
    model = getattr(model, "_orig_mod", model)
    tensors = dict(model.state_dict())
    if model.config.tie_weights and tensors["out_head.weight"].data_ptr() == tensors["tok_emb.weight"].data_ptr():
        del tensors["out_head.weight"]
    made = {"kind": "gpt", **made}
    metadata = {"kind": made["kind"], "config": json.dumps(dataclasses.asdict(model.config)), "made": json.dumps(made)}
    if tokenizer is not None:
        tokenizer = tokenizer if isinstance(tokenizer, dict) else tokenizer.to_dict()
        metadata["tokenizer"] = json.dumps(tokenizer)
    return write_safetensors(path, tensors, metadata)


def load_checkpoint(path, device="cpu"):
    """Return (model in eval mode, the tokenizer's dict or None, made) from a file of `save_checkpoint`.

    A classifier's `out_head` takes the shape that the file has. Raises FileNotFoundError, or ValueError for a file
    that is damaged, is not ours, or does not fit its own config."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    tensors, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path}: no config inside, so this is not one of our checkpoints; GPT-2's own weights are "
                         "read by gpt2_weights.py")
    verify_data(path, metadata)
    try:
        config, made = GPTConfig(**json.loads(metadata["config"])), json.loads(metadata["made"])
        tokenizer = json.loads(metadata["tokenizer"]) if "tokenizer" in metadata else None
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: its metadata does not fit: {error}") from None
    if made.get("kind") == "reward":
        raise ValueError(f"{path} is a reward model, which gives scores and no text; rlhf.py reads it")
    sizes = {"tok_emb.weight": (config.vocab_size, config.emb_dim),
             "pos_emb.weight": (config.context_length, config.emb_dim),
             f"trf_blocks.{config.n_layers - 1}.ln1.weight": (config.emb_dim,)}
    for name, shape in sizes.items():  # before memory is claimed on the config's word
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise ValueError(f"{path}: its config wants a tensor {name!r} of the shape {shape}")
    model = empty_model(config, tensors.get("out_head.weight"), "out_head.bias" in tensors)
    copy_weights(model, tensors, path)
    return model.to(device).eval(), tokenizer, made


class _NothingDrawn(torch.overrides.TorchFunctionMode):
    """Leaves out `nn.init.normal_`, which on the meta device imports 67 MB of torch._dynamo only to draw nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def meta_model(config):
    """Return a GPTModel without memory: names and shapes only."""
    with torch.device("meta"), _NothingDrawn():
        return GPTModel(config)


def empty_model(config, head_weight=None, head_bias=False):
    """Return a GPTModel whose memory is claimed but not yet filled; `head_weight` decides the size of its head."""
    model = meta_model(config)
    if head_weight is not None and head_weight.dim() == 2 and len(head_weight) != config.vocab_size:
        model.config = config = dataclasses.replace(config, tie_weights=False)
        model.out_head = Linear(config.emb_dim, len(head_weight), bias=head_bias, device="meta")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):  # to_empty would import 31 MB for this
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
    model.tie()  # shared tensors were given memory of their own
    return model


@torch.no_grad()
def copy_weights(model, tensors, source):
    """Copy named tensors into `model`; nothing is copied unless all names and shapes fit.

    A tied head may be absent. Raises ValueError with `source` and the first tensor that is missing, left over, of
    another shape, or not finite."""
    wanted = model.state_dict()
    if model.config.tie_weights:
        wanted.pop("out_head.weight")
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted) - {"out_head.weight"})
    if missing or extra:
        raise ValueError(f"{source}: " + (f"no tensor {missing[0]!r}" if missing else f"unknown tensor {extra[0]!r}"))
    for name, target in wanted.items():
        if tensors[name].shape != target.shape:
            raise ValueError(f"{source}: tensor {name!r} has the shape {tuple(tensors[name].shape)}, "
                             f"the config wants {tuple(target.shape)}")
        if tensors[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"{source}: tensor {name!r} holds {tensors[name].dtype}, which are no weights")
        low, high = tensors[name].aminmax()  # NaN and infinity show in them, and no copy is made, unlike in isfinite
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"{source}: tensor {name!r} holds values that are not finite")
    for name, target in wanted.items():
        target.copy_(tensors[name])


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


# ---------------------------------------------------------------------------------------------------------------------
# The three commands


def file_in(folder):
    """Return what to do with a folder that was given instead of a checkpoint's file, in words."""
    if (folder / "adapter_config.json").is_file():
        return f"of an adapter: python lora.py merge --adapter {folder} writes a checkpoint"
    if (folder / "config.json").is_file():
        return f"if Hugging Face's, make a checkpoint of it: python gpt2_weights.py import --source {folder}"
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
    return f"name the file, such as {found[0]}" if found else "and no checkpoint is in it; name the file"


def load_for_cli(name, device="cpu"):
    """Return (model, tokenizer) for a checkpoint file or a GPT-2 name."""
    from tokenizer import from_dict, load_tokenizer

    if name in GPT_CONFIGS and name != "tiny":
        from gpt2_weights import load_gpt2

        return load_gpt2(name).to(device).eval(), load_tokenizer("gpt2")
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder; {file_in(Path(name))}")
    if not Path(name).is_file():
        raise FileNotFoundError(f"no checkpoint {name}; make one with: python train.py")
    model, tokenizer, made = load_checkpoint(name, device)
    if tokenizer is None:
        raise ValueError(f"{name} holds no tokenizer, so text cannot go in or out")
    if made["kind"] != "gpt":
        raise ValueError(f"{name} is a {made['kind']}, which generates no text")
    return model, from_dict(tokenizer)


def pick_device(name):
    """Return the torch device for a name or for "auto" (cuda, then mps, then cpu); raises ArgumentError if absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        if available.get(name.split(":")[0], False):
            return torch.empty(0, device=name).device  # finds "cpu:x", and "cuda:7" where there is one GPU
    except RuntimeError:
        pass
    raise argparse.ArgumentError(None, f"--device {name} is not available here; use --device cpu")


def check_utf8(*words):
    """Raise ArgumentError for a word of the command line that is not UTF-8: its odd bytes became surrogates, which no
    tokenizer knows."""
    for word in words:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise argparse.ArgumentError(None, f"{ascii(word)[:60]} is not UTF-8; type it in a UTF-8 terminal")


def generate_command(args):
    """Continue a prompt, token by token on the screen as they are drawn."""
    try:
        check_sampling(sys.maxsize, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--{error}") from None
    if "" in args.stop:
        raise argparse.ArgumentError(None, "--stop needs some text to stop at")
    for name, low in (("max_new_tokens", 0), ("num_samples", 1), ("seed", 0)):
        if not low <= getattr(args, name) < 2**63:
            raise argparse.ArgumentError(None, f"--{name} must be at least {low} and below 2^63, not "
                                               f"{getattr(args, name)}")
    check_utf8(args.prompt, *args.stop)
    model, tokenizer = load_for_cli(args.checkpoint, pick_device(args.device))
    ids = tokenizer.encode(args.prompt) or [tokenizer.eot_id]  # an empty prompt starts a new document
    if ids[0] is None:
        raise ValueError("an empty prompt needs a tokenizer with an end-of-text token; give --prompt")
    if len(ids) > model.config.context_length:
        print(f"note: of the prompt's {len(ids)} tokens the model sees only the last {model.config.context_length}",
              file=sys.stderr)
    top_k = args.top_k and min(args.top_k, model.config.vocab_size)
    generator = torch.Generator(device=model.device).manual_seed(args.seed)
    prompt, before = torch.tensor([ids], device=model.device), len(tokenizer.decode(ids))
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples}")
        print(args.prompt, end="", flush=True)
        steps = generate_steps(model, prompt, args.max_new_tokens, args.temperature, top_k, args.top_p, args.min_p,
                               args.repetition_penalty, tokenizer.eot_id, generator=generator,
                               cuda_graph=args.cuda_graph)
        new_ids = itertools.takewhile(lambda i: i != tokenizer.eot_id, (int(step) for step in steps))
        for piece in stream_text(lambda new: tokenizer.decode(ids + new)[before:], new_ids, args.stop):
            print(piece, end="", flush=True)
        print()


def count_parameters(config):
    """Return (rows, total): one (name, shape, parameters) for each tensor, and their sum; a tied head counts once."""
    rows = [(name, tuple(p.shape), p.numel()) for name, p in meta_model(config).named_parameters()]
    return rows, sum(count for _, _, count in rows)


def flops_per_token(config):
    """Return the floating-point operations of one token's forward pass, attention at full context included.

    Two for each weight of a matrix (a multiplication and an addition), and 4 C T a layer for scores and weighted sum.
    Training costs three times as much (Kaplan et al. 2020, section 2.1)."""
    C, V, L, T = config.emb_dim, config.vocab_size, config.n_layers, config.context_length
    return 2 * (12 * L * C * C + V * C) + 4 * L * C * T


def info_command(args):
    """Print the layers, parameters, memory and work of a model."""
    if args.checkpoint:
        config = load_for_cli(args.checkpoint)[0].config
    else:
        config = GPT_CONFIGS[args.model]
    print(f"{args.checkpoint or args.model}: {config}\n")
    rows, _ = count_parameters(config)
    print(f"{'tensor':<34}{'shape':>16}{'parameters':>14}")
    for name, shape, count in rows:
        if ".0." in name or not name.startswith("trf_blocks."):
            print(f"{name:<34}{' x '.join(map(str, shape)):>16}{count:>14,}")
        elif name == "trf_blocks.1.ln1.weight":
            print(f"{'... and ' + str(config.n_layers - 1) + ' more blocks of the same shape':<34}")
    print(f"\n{'':<14}{'parameters':>14}{'untied':>16}{'untied MB':>11}{'without head':>16}{'training GB':>13}"
          f"{'cache KB/token':>16}{'GFLOP/token':>13}")
    sizes = {"this model": config, "tiny": GPT_CONFIGS["tiny"], "gpt2, no bias": GPTConfig(),
             **{name: GPT_CONFIGS[name] for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}}
    for name, size in sizes.items():
        untied = count_parameters(dataclasses.replace(size, tie_weights=False))[1]
        tied = count_parameters(dataclasses.replace(size, tie_weights=True))[1]
        total = tied if size.tie_weights else untied
        print(f"{name:<14}{total:>14,}{untied:>16,}{untied * 4 / 2**20:>11,.2f}{tied:>16,}{total * 16 / 1e9:>13.2f}"
              f"{2 * 4 * size.n_layers * size.emb_dim / 1e3:>16.1f}{flops_per_token(size) / 1e9:>13.3f}")
    print("\nMB = 2^20 bytes in float32; training = weights, gradients and Adam's two moments in float32, without"
          "\nactivations; GFLOP = one token forward at full context, training takes three times as many.")


def attention_svg(weights, pieces, title):
    """Return an SVG picture of attention weights (H, T, T): one square a head, a row for each query."""
    H, T = weights.shape[:2]
    cell, label, gap = 16, 8 * max(map(len, pieces)) + 10, 24
    width, height = H * (T * cell + gap) + label, T * cell + label + 44
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
           'font-family="monospace" font-size="12" fill="currentColor">', f'<text x="4" y="16">{title}</text>']
    for row, piece in enumerate(pieces):
        out.append(f'<text x="{label - 6}" y="{52 + row * cell}" text-anchor="end">{_xml(piece)}</text>')
    for head in range(H):
        left = label + head * (T * cell + gap)
        out.append(f'<text x="{left}" y="34">head {head}</text>')
        for row in range(T):
            for column in range(row + 1):
                weight = float(weights[head, row, column])
                out.append(f'<rect x="{left + column * cell}" y="{40 + row * cell}" width="{cell - 1}" '
                           f'height="{cell - 1}" fill="#2563eb" fill-opacity="{0.04 + 0.96 * weight:.3f}">'
                           f"<title>{_xml(pieces[row])} to {_xml(pieces[column])}: {weight:.3f}</title></rect>")
        for column, piece in enumerate(pieces):
            x, y = left + column * cell + 12, 46 + T * cell
            out.append(f'<text transform="translate({x},{y}) rotate(90)">{_xml(piece)}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def _xml(text):
    """Return text for XML: markup escaped, white space made visible."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;").replace("\n", "\u23ce")
    return "".join(c if c.isprintable() else "\ufffd" for c in text.replace(" ", "\u00b7"))


def inspect_command(args):
    """Print to which earlier tokens each token attends, and draw it."""
    check_utf8(args.prompt)
    model, tokenizer = load_for_cli(args.checkpoint)
    ids = tokenizer.encode(args.prompt)
    if not 0 < len(ids) <= model.config.context_length:
        raise argparse.ArgumentError(None, f"--prompt has {len(ids)} tokens; the model takes 1 to "
                                           f"{model.config.context_length}")
    if not -model.config.n_layers <= args.layer < model.config.n_layers:
        raise argparse.ArgumentError(None, f"--layer {args.layer}: there are layers 0 to {model.config.n_layers - 1}")
    weights = attention_maps(model, torch.tensor([ids]))[args.layer][0]  # (H, T, T)
    pieces = [tokenizer.decode([i]) for i in ids]
    print("the three tokens that each token attends to most, mean over the heads")
    for t, piece in enumerate(pieces):
        share, order = weights[:, t].mean(0).topk(min(3, t + 1))
        print(f"{piece!r:>16}  " + "  ".join(f"{pieces[s]!r} {p:.0%}" for p, s in zip(share.tolist(), order.tolist())))
    layer = args.layer % model.config.n_layers
    picture = attention_svg(weights, pieces, f"layer {layer}: each row is a token, blue is where it looks")
    with replacing(args.out) as file:
        file.write(picture.encode())
    print(f"drawn: {args.out}")


def main(argv=None):
    """Run the command line and return its exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows only ASCII shows "?", and goes on
    checkpoint = dict(default="out/pretrain/model.safetensors", help="a checkpoint file, or gpt2, gpt2-medium, ...")
    return run(__doc__, {
        "generate": (generate_command, {
            "--checkpoint": checkpoint,
            "--prompt": dict(default="", help="text to continue; empty starts a new document"),
            "--max_new_tokens": dict(type=int, default=100, help="tokens at most"),
            "--temperature": dict(type=float, default=0.8, help="0 = greedy, 1 = as trained"),
            "--top_k": dict(type=int, help="draw from the k likeliest tokens"),
            "--top_p": dict(type=float, help="draw from the fewest tokens that together reach p"),
            "--min_p": dict(type=float, help="drop tokens below this share of the likeliest one's probability"),
            "--repetition_penalty": dict(type=float, help="above 1 makes tokens already there less likely"),
            "--stop": dict(action="append", default=[], help="end before this text; may be given several times"),
            "--num_samples": dict(type=int, default=1, help="how many continuations"),
            "--seed": dict(type=int, default=1234, help="equal seeds draw equal texts"),
            "--device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
            "--cuda_graph": dict(action="store_true", help="on an NVIDIA GPU, replay one recorded step")}),
        "info": (info_command, {
            "--model": dict(default="gpt2", choices=list(GPT_CONFIGS), help="an architecture"),
            "--checkpoint": dict(help="the model in this file instead")}),
        "inspect": (inspect_command, {
            "--checkpoint": checkpoint,
            "--prompt": dict(default="Tom has a red ball and Mia has a blue one.", help="the text to look at"),
            "--layer": dict(type=int, default=-1, help="which block, from 0; -1 is the last"),
            "--out": dict(default="out/attention.svg", help="where to draw")}),
    }, argv)


if __name__ == "__main__":
    sys.exit(main())
