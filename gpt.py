"""GPT-2 in one file: the model, text generation with a key/value cache, and checkpoints without pickle.

    python gpt.py --prompt "Once there was"          continue a text with the model that `python train.py` saved
    python gpt.py generate --checkpoint gpt2 --prompt "Every effort moves you" --top_k 25
    python gpt.py info --model gpt2-xl               layers, parameters, memory, FLOPs per token
    python gpt.py inspect --prompt "Tom has a cat."  which tokens attend to which

As a library it works alone; with tokenizer.py beside it, checkpoints return their tokenizer too:

    model, tokenizer, info = load_checkpoint("out/pretrain/model.safetensors")
    ids = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=20, temperature=0.8, top_p=0.95)

Shapes: B batch, T time (tokens), C channels (emb_dim), H heads, D = C / H head size, V vocabulary. `by_steps` writes
out what a fused `forward` computes. Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # numpy is not used

try:
    import torch
except KeyboardInterrupt:  # it takes seconds, in which a script may be stopped
    sys.exit(130)
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # a target that no loss counts, PyTorch's own default


def require(condition, message):
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 small, untied and without qkv bias: 163,009,536 parameters."""
    vocab_size: int = 50257  # V, the number of different tokens
    context_length: int = 1024  # tokens the model can see at once
    emb_dim: int = 768  # C, channels
    n_heads: int = 12  # H, must divide emb_dim
    n_layers: int = 12
    drop_rate: float = 0.1  # dropout on embeddings, attention weights and residual branches
    qkv_bias: bool = False  # GPT-2 has it
    tie_weights: bool = False  # the head shares the token embedding's matrix; GPT-2 does
    exact_gelu: bool = False  # GELU by erf (3 times as fast on a CPU) instead of GPT-2's tanh form

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            require(type(value) is int and value > 0, f"{name} must be a whole number of at least 1, not {value!r}")
        require(self.emb_dim % self.n_heads == 0, f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}")
        require(0 <= self.drop_rate < 1, f"drop_rate must be at least 0 and below 1, not {self.drop_rate}")


GPT2 = GPTConfig(qkv_bias=True, tie_weights=True)
GPT_CONFIGS = {
    "tiny": GPTConfig(1024, 128, 128, 4, 4, 0.0, tie_weights=True, exact_gelu=True),  # trains in minutes on a laptop
    "gpt2": GPT2,  # 124M
    "gpt2-medium": dataclasses.replace(GPT2, emb_dim=1024, n_layers=24, n_heads=16),  # 355M
    "gpt2-large": dataclasses.replace(GPT2, emb_dim=1280, n_layers=36, n_heads=20),  # 774M
    "gpt2-xl": dataclasses.replace(GPT2, emb_dim=1600, n_layers=48, n_heads=25),  # 1558M
}

# Model ----------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """Layer normalization with a learned scale and shift (Ba et al. 2016): (..., C) -> (..., C)."""
    def by_steps(self, x):
        """Return the same as `forward`; the variance is the biased one (divided by C), as in GPT-2."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


class GELU(nn.GELU):
    """The GELU activation (Hendrycks and Gimpel 2016) in GPT-2's tanh form, or the exact one, up to 5e-4 away."""
    def __init__(self, exact=False):
        super().__init__("none" if exact else "tanh")

    def by_steps(self, x):
        """Return the same as `forward`."""
        if self.approximate == "none":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times wider inside: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.gelu = GELU(config.exact_gelu)
        self.fc2 = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x):
        return self.fc2(self.gelu(self.fc1(x)))


class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads (Vaswani et al. 2017, equation 1, section 3.2.2): (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.drop_rate = config.n_heads, config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)  # all heads in one product
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def heads(self, x):
        """Return queries, keys and values, each (B, H, T, D)."""
        B, T, C = x.shape
        return self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)

    def forward(self, x, allowed=None, cache=None, layer=0):
        """`allowed` (T, S) or (B, 1, T, S) says which of S keys a query may see; None means all up to itself."""
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D), the S - T earlier positions in front
        causal = allowed is None and not x.shape[1] == 1  # one new token sees all; `not` gives torch.compile a bool
        dropout = self.drop_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))  # heads joined: (B, H, T, D) -> (B, T, C)

    def by_steps(self, x):
        """Return the same as `forward` without a mask or cache, and the attention weights (B, H, T, T)."""
        q, k, v = self.heads(x)
        scores = q @ k.transpose(2, 3)  # how well each query matches each key: (B, H, T, T)
        scores = scores / math.sqrt(q.shape[-1])  # a sum of D products has a standard deviation of sqrt(D)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        weights = torch.softmax(scores, dim=-1)  # each row sums to 1
        y = F.dropout(weights, self.drop_rate, self.training) @ v  # the weighted sum of the values: (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape)), weights


class TransformerBlock(nn.Module):
    """A pre-norm block, attention then feed-forward, each added to its input: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln1 = LayerNorm(config.emb_dim)
        self.attn = MultiHeadAttention(config)
        self.ln2 = LayerNorm(config.emb_dim)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x, allowed=None, cache=None, layer=0):
        x = x + self.drop(self.attn(self.ln1(x), allowed, cache, layer))
        return x + self.drop(self.ffn(self.ln2(x)))


class KVCache:
    """The keys and values of the positions seen so far, in memory allocated once; `length` positions are filled."""
    def __init__(self, config, batch_size, max_length, device="cpu", dtype=torch.float32):
        shape = (config.n_layers, 2, batch_size, config.n_heads, max_length, config.emb_dim // config.n_heads)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) after the earlier positions; return all of them, (B, H, length + T, D) each."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, :, :, :, :end]


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
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # as OpenAI's, except for positions: N(0, 0.01) there
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the sum of all residual branches must not grow with depth (GPT-2, 2.3)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    @property
    def device(self):
        """The device that the weights are on."""
        return self.tok_emb.weight.device

    def embed(self, ids, positions):
        """Return token plus position embeddings, ids (B, T) and positions (T,) or (B, T) -> (B, T, C)."""
        return self.drop_emb(self.tok_emb(ids) + self.pos_emb(positions))

    def hidden(self, ids, mask=None, cache=None):
        """Return the last layer's normalized states (B, T, C), which the head turns into logits.
        `mask` (B, T) is 1 for a token, 0 for padding. With a cache, `ids` are the new tokens alone, and `mask` covers
        the earlier ones too. Raises ValueError for a text longer than the context."""
        T, past = ids.shape[1], 0 if cache is None else cache.length
        length = past + T
        if length > self.config.context_length:  # without `require`: torch.compile would compile for every length
            raise ValueError(f"{length} tokens do not fit into the context of {self.config.context_length}")
        positions, allowed = torch.arange(past, length, device=ids.device), None
        if mask is not None or (past and T > 1):  # a query sees the keys up to itself
            allowed = torch.ones(T, length, dtype=torch.bool, device=ids.device).tril(past)
        if mask is not None:  # padding sees padding, so that no row is empty; mask 0 1 1 0 1 has positions 0 0 1 1 2
            allowed = (allowed & (mask[:, past:, None] == mask[:, None, :]))[:, None]  # (B, 1, T, past + T)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, allowed, cache, layer)
        if cache is not None:
            cache.length = length
        return self.final_norm(x)

    def forward(self, ids, mask=None, cache=None):
        return self.out_head(self.hidden(ids, mask, cache))


class _NoInit(torch.overrides.TorchFunctionMode):
    """Skips the drawing of initial weights, which on the meta device would import 70 MB of torch._dynamo."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawing = func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
        return kwargs["tensor"] if drawing else func(*args, **(kwargs or {}))


def empty_model(config, classes=0, device="cpu"):
    """Return a GPTModel with unset weights; no random number is drawn. With `classes` its head is a classifier's."""
    with torch.device(device), _NoInit():
        model = GPTModel(config)
        if classes:
            model.out_head = nn.Linear(config.emb_dim, classes)
    return model


def token_logprobs(logits, ids, temperature=1.0):
    """Return log-probabilities in nats, entry t that of ids[:, t + 1]: logits (B, T, V), ids (B, T) -> (B, T - 1)."""
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    return logprobs.gather(2, ids[:, 1:, None]).squeeze(2)


# Generation -----------------------------------------------------------------------------------------------------------

def check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens=0, num_samples=1):
    """Raise ValueError for an option outside its range."""
    require(max_new_tokens >= 0, f"max_new_tokens must be at least 0, not {max_new_tokens}")
    require(num_samples >= 1, f"num_samples must be at least 1, not {num_samples}")
    require(temperature == 0 or 1e-6 <= temperature < math.inf, f"temperature must be 0 or >= 1e-6, not {temperature}")
    require(top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}")
    require(top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")
    require(min_p is None or 0 <= min_p <= 1, f"min_p must lie between 0 and 1, not {min_p}")
    require(repetition_penalty is None or 0 < repetition_penalty < math.inf,
            f"repetition_penalty must be above 0 (1 = off), not {repetition_penalty}")


def penalize_repetition(logits, ids, penalty):
    """Return logits (B, V) with every token in `ids` (B, T) made less likely (Keskar et al. 2019, CTRL, 4.1)."""
    seen = logits.gather(1, ids)  # negative ones are multiplied, as in transformers: dividing would raise them
    return logits.scatter(1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def sampling_probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Return the probabilities that sampling draws from: logits (B, V) -> (B, V), temperature above 0.

    In this order: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020: the fewest tokens that together
    reach p), min-p (Nguyen et al. 2024: at least min_p times the highest). Of equal ones the lower id stays."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_k is None and top_p is None and not min_p:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
    if top_p is not None:
        share = ordered / ordered.sum(dim=-1, keepdim=True)
        ordered[share.cumsum(dim=-1) - share >= top_p] = 0  # the mass before a token: the one that crosses p stays
    if min_p:
        ordered[ordered < min_p * ordered[:, :1]] = 0
    probs = torch.zeros_like(probs).scatter(1, order, ordered)
    return probs / probs.sum(dim=-1, keepdim=True)


@torch.no_grad()
def generate_steps(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
                   repetition_penalty=None, eos_id=None, mask=None, stop=None, generator=None, num_samples=1):
    """Yield the next token of every row, (B * num_samples,), step by step; arguments as in `generate`."""
    require(torch.is_tensor(ids) and ids.ndim == 2, "prompts are token ids (B, T); for one prompt: torch.tensor([ids])")
    (B, T), context, V = ids.shape, model.config.context_length, model.config.vocab_size
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens, num_samples)
    require(T > 0 and ((ids >= 0) & (ids < V)).all(), f"a prompt needs at least one token, with ids from 0 to {V - 1}")
    fits = mask is None or mask.shape == ids.shape and bool((mask[:, -1] == 1).all())
    require(fits, "mask needs the prompts' shape, and 1 in its last column: padding is on the left")
    mask = None if mask is None or bool((mask == 1).all()) else mask.long()
    cache = KVCache(model.config, B, min(context, T + max_new_tokens), ids.device, model.pos_emb.weight.dtype)
    done = torch.zeros(B * num_samples, dtype=torch.bool, device=ids.device)
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            if ids.shape[1] <= context:
                hidden = model.hidden(ids[:, cache.length :], mask, cache)
            else:  # positions are learned: beyond the context every token's position changes, so no cache
                hidden = model.hidden(ids[:, -context:], None if mask is None else mask[:, -context:])
            logits = model.out_head(hidden[:, -1])
            if step == 0 and num_samples > 1:  # the samples of a prompt share its first pass
                ids, logits = (x.repeat_interleave(num_samples, dim=0) for x in (ids, logits))
                mask = None if mask is None else mask.repeat_interleave(num_samples, dim=0)
                cache.kv = cache.kv.repeat_interleave(num_samples, dim=2)
            if repetition_penalty not in (None, 1):
                said = ids if mask is None else torch.where(mask == 1, ids, ids[:, -1:])  # padding is not text
                logits = penalize_repetition(logits, said, repetition_penalty)
            if temperature == 0:
                next_ids = logits.argmax(dim=-1)
            else:
                probs = sampling_probabilities(logits, temperature, top_k, top_p, min_p)
                next_ids = torch.multinomial(probs, num_samples=1, generator=generator).squeeze(1)
            next_ids = torch.where(done, ids[:, -1] if eos_id is None else eos_id, next_ids)
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            yield next_ids
            if eos_id is not None:
                done |= next_ids == eos_id
            if stop is not None:
                done |= torch.tensor([stop(row) for row in ids[:, T:].tolist()], device=ids.device)
            if (eos_id is not None or stop is not None) and bool(done.all()):
                return
    finally:
        model.train(was_training)


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
             eos_id=None, mask=None, stop=None, generator=None, num_samples=1):
    """Return the prompts followed by up to `max_new_tokens` tokens: ids (B, T) -> (B * num_samples, T + n).

    Temperature 0 is greedy. Shorter prompts are padded on the left, where `mask` (B, T) is 0. A row ends with `eos_id`
    or where `stop(new_ids: list)` is true, then repeats `eos_id` (else its last token) until all have ended. The
    samples of a prompt stand side by side. Beyond the context, the last window is seen. ValueError for wrong values."""
    new = list(generate_steps(model, ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id,
                              mask, stop, generator, num_samples))
    ids = ids.repeat_interleave(num_samples, dim=0)
    return torch.cat([ids, torch.stack(new, dim=1)], dim=1) if new else ids


def stream_text(decode, new_ids, stop_strings=()):
    """Yield the text of token ids piece by piece as they come, never half a character and nothing of a stop string.
    A token can end inside a character, which decodes to U+FFFD until its other bytes arrive."""
    ids, sent, text = [], 0, ""
    starts = [string[:n] for string in stop_strings for n in range(1, len(string))]
    for next_id in new_ids:
        ids.append(int(next_id))
        text = decode(ids)
        ends = [text.index(string) for string in stop_strings if string in text]
        if ends:
            yield text[sent : min(ends)]
            return
        whole = text.rstrip("\ufffd")
        ready = len(whole) - max((len(start) for start in starts if whole.endswith(start)), default=0)
        if ready > sent:
            yield text[sent:ready]
            sent = ready
    yield text[sent:]


class Int8Linear(nn.Module):
    """A linear layer for inference on an x86 CPU with int8 weights, about 1% off: (..., in) -> (..., out).

    A row of the weight is rounded to multiples of its largest entry / 127. A row of the input is rounded twice, to
    multiples of its largest / 63 (two products must fit into 16 bits) and the rest to a 126th of that: rounded once,
    one large value, as GPT-2's have, would drown the others."""
    def __init__(self, linear):
        super().__init__()
        weight, self.bias = linear.weight.detach(), linear.bias
        scales = torch.linalg.vector_norm(weight, math.inf, dim=1).clamp(min=1e-30) / 127
        rows = torch.quantize_per_channel(weight, scales.double(), torch.zeros(len(weight)).long(), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rows, None)

    @torch.no_grad()
    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        unit = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True).clamp(min=1e-30) / 63
        steps = rows / unit
        coarse = steps.round()
        parts = torch.cat([coarse, (steps - coarse) * 126])  # all within -63 and 63; the product rounds them
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(parts, 1.0, 64, self.packed)
        coarse, fine = y.chunk(2)
        y = coarse.add_(fine, alpha=1 / 126).mul_(unit).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


@torch.no_grad()
def int8_linears(model):
    """Return the model with linear layers in int8 and its embedding in float16; on Arm or a GPU it stays unchanged."""
    backend, engine = torch.backends.quantized, torch.backends.quantized.engine
    if "fbgemm" not in backend.supported_engines or next(model.parameters()).device.type != "cpu":
        print("note: int8 needs an x86 CPU, so weights stay in float32", file=sys.stderr)
        return model
    try:
        backend.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13: tensors of the type qint8 may go in a later version
            for module in list(model.modules()):
                for name, layer in module.named_children():
                    if type(layer) is nn.Linear:
                        setattr(module, name, Int8Linear(layer))
    finally:
        backend.engine = engine
    if isinstance(model, GPTModel):
        model.tok_emb.half()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what `keep_freed_memory` keeps of the old weights
    return model


# Files ----------------------------------------------------------------------------------------------------------------

# A safetensors file is 8 bytes (the header's length N, little-endian), N bytes of JSON (dtype, shape and place of each
# tensor), then the data. Nothing in it can run. Format: https://github.com/huggingface/safetensors#format
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool}


@contextlib.contextmanager
def replacing(path):
    """Yield a binary file that becomes `path` when the block ends well; after an error `path` is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # makes the new name permanent; Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that the caller knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as readable JSON, all at once or not at all; numbers that are not finite become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path, start=0):
    """Return the sha256 of a file from byte `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor):
    """Return the memory of a contiguous CPU tensor as a buffer, without a copy."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    buffer.tensor = tensor  # keeps the memory alive as long as the buffer
    return buffer


def write_safetensors(path, tensors, metadata=None):
    """Return the sha256 of the data after writing named tensors and metadata (strings) to `path`, all or nothing."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    header, end, digest = {}, 0, hashlib.sha256()
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        digest.update(tensor_bytes(tensor))
    metadata = {"format": "pt", **(metadata or {}), "data_sha256": digest.hexdigest()}
    metadata_sha256 = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    header["__metadata__"] = {**metadata, "metadata_sha256": metadata_sha256}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned and can be mapped
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))
    return digest.hexdigest()


def _unique(pairs):
    require(len(dict(pairs)) == len(pairs), "a name occurs twice")
    return dict(pairs)


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a safetensors file, the tensors mapped from disk, not read.
    Writing to them never changes the file. ValueError gives the path and the rule that a malformed file breaks."""
    size, tensors, offset = os.path.getsize(path), {}, 0
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            require(10 <= 8 + length <= min(size, 100_000_008),  # the format allows 100 MB of header
                    f"not a safetensors file: it has {size} bytes and its header would have {length}")
            text = file.read(length).decode()
        require(text.startswith("{"), "it does not start with '{'")
        header = json.loads(text, object_pairs_hook=_unique)
        metadata, data_size = header.pop("__metadata__", {}), size - 8 - length
        require(all(type(value) is str for value in metadata.values()), "__metadata__ must map strings to strings")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).untyped_storage()[8 + length :]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            require(set(entry) == {"dtype", "shape", "data_offsets"}, f"tensor {name!r} has unknown or missing fields")
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            require(dtype in DTYPES, f"tensor {name!r} has the unknown dtype {dtype!r}")
            require(len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)),
                    f"tensor {name!r}: shape and data_offsets must be whole numbers of at least 0")
            require(begin == offset, f"tensor {name!r}: its data must begin at {offset} (no holes, no overlaps)")
            require(end - begin == math.prod(shape) * DTYPES[dtype].itemsize and end <= data_size,
                    f"tensor {name!r}: {dtype} {shape} does not fit {end - begin} of {data_size} bytes")
            # A storage of its own, because a view must be aligned, and the data of OpenAI's published GPT-2 is not.
            piece = torch.asarray(data[begin:end], dtype=torch.uint8)
            require(dtype != "BOOL" or not (piece > 1).any(), f"tensor {name!r}: a BOOL is neither 0 nor 1")
            tensors[name], offset = piece.view(DTYPES[dtype]).view(shape), end
        require(offset == data_size, f"it describes {offset} bytes of data, the file holds {data_size}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        said = str(error)[:500] if isinstance(error, ValueError) else "a field is missing or has the wrong type"
        raise ValueError(f"{path}: malformed header: {said}") from None
    return tensors, metadata


def distinct_tensors(model):
    """Return {name: tensor} of a model's parameters and buffers, a shared one (a tied head) once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save_checkpoint(path, model, tokenizer=None, **info):
    """Return the sha256 of the data after writing model, config and tokenizer to one safetensors file.
    `info` (JSON values) says how it was trained. ValueError for adapters that are not merged and for int8 weights."""
    model, info = getattr(model, "_orig_mod", model), {"kind": "gpt", **info}
    tensors = distinct_tensors(model)
    require(not any(name.endswith("lora_A") for name in tensors), f"{path}: adapters not merged; call lora.merge_lora")
    require(Int8Linear not in map(type, model.modules()), f"{path}: int8 weights are for generation, not to be saved")
    metadata = {"kind": info["kind"], "config": json.dumps(dataclasses.asdict(model.config)), "info": json.dumps(info)}
    if tokenizer is not None:
        metadata["tokenizer"] = json.dumps(tokenizer.to_dict())
    return write_safetensors(path, tensors, metadata)


def _load_tokenizer(source):
    """Return the tokenizer of a dict or the name "gpt2", or None after a note where tokenizer.py is missing."""
    if importlib.util.find_spec("tokenizer") is None:
        print("note: no tokenizer.py beside gpt.py, so the tokenizer is not loaded", file=sys.stderr)
        return None
    from tokenizer import from_dict, load_tokenizer
    return load_tokenizer(source) if isinstance(source, str) else from_dict(source)


def read_checkpoint(path):
    """Return (tensors, config, tokenizer or None, info) from a file of `save_checkpoint`, verified by its hashes.
    Raises FileNotFoundError, or ValueError with what is wrong. Files of the first edition have `made` for `info`."""
    if Path(path).is_dir():
        is_adapter = Path(path, "adapter_config.json").exists()
        remedy = f"lora.py merge --adapter {path}" if is_adapter else f"gpt2_weights.py import --source {path}"
        raise ValueError(f"{path} is a folder; name the file in it, or: python {remedy}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}; make one with: python train.py")
    tensors, metadata = read_safetensors(path)
    require("config" in metadata, f"{path} is not one of our checkpoints; gpt2_weights.py import reads others")
    start = os.path.getsize(path) - sum(tensor.nbytes for tensor in tensors.values())
    noted = metadata.pop("metadata_sha256", ""), metadata.get("data_sha256")
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest(), file_sha256(path, start)
    require(noted == found, f"{path} is damaged: its sha256 is not that in its header; restore a copy or train again")
    try:
        config = GPTConfig(**json.loads(metadata["config"]))
        info = {"kind": "gpt", **json.loads(metadata.get("info") or metadata["made"])}
        tokenizer = _load_tokenizer(json.loads(metadata["tokenizer"])) if "tokenizer" in metadata else None
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata does not fit: {error}") from None
    C, stored = config.emb_dim, sum(tensor.numel() for tensor in tensors.values())
    least = 12 * config.n_layers * C * C + (config.vocab_size + config.context_length) * C
    require(least <= stored, f"{path}: its config describes {least:,} parameters or more, the file holds {stored:,}")
    return tensors, config, tokenizer, info


def read_config(name_or_path):
    """Return the GPTConfig of a published size or of a language model's file."""
    if name_or_path in GPT_CONFIGS:
        return GPT_CONFIGS[name_or_path]
    _, config, _, info = read_checkpoint(name_or_path)
    require(info["kind"] == "gpt", f"{name_or_path} is a {info['kind']}, not a language model")
    return config


@torch.no_grad()
def copy_weights(model, tensors, path):
    """Return `model` with named tensors copied in (a tied head may be missing), or ValueError and nothing copied."""
    wanted = distinct_tensors(model)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(model.state_dict()))
    wrapped = any(name.startswith(("_orig_mod.", "module.")) for name in extra)
    cause = "; they were saved from a wrapper: save its ._orig_mod or .module" if wrapped else ""
    require(not missing and not extra, f"{path}: missing tensors {missing[:3]}, unknown tensors {extra[:3]}{cause}")
    for name, target in wanted.items():
        tensor, shape = tensors[name], tuple(target.shape)
        require(tensor.shape == shape, f"{path}: {name!r} has the shape {tuple(tensor.shape)}, the model {shape}")
        require(tensor.dtype.is_floating_point, f"{path}: {name!r} holds {tensor.dtype}")
        low, high = tensor.aminmax()  # NaN and infinity show in them; isfinite would make a copy
        require(math.isfinite(low) and math.isfinite(high), f"{path}: {name!r} holds values that are not finite")
    for name, target in wanted.items():
        target.copy_(tensors[name])
    return model


def load_checkpoint(name_or_path, device="cpu"):
    """Return (model in eval mode, tokenizer or None, info) of a file or a GPT-2 name; ValueError if it does not fit."""
    name = str(name_or_path)
    if name in GPT_CONFIGS and name != "tiny":
        from gpt2_weights import load_gpt2
        return load_gpt2(name).to(device).eval(), _load_tokenizer("gpt2"), {"kind": "gpt", "init": name}
    tensors, config, tokenizer, info = read_checkpoint(name)
    require(info["kind"] != "reward", f"{name} is a reward model, not a language model")
    head = tensors.get("out_head.weight") if info["kind"] == "classifier" else None
    model = empty_model(config, 0 if head is None else head.shape[:1].numel())  # as len(head), 1 for a damaged scalar
    return copy_weights(model, tensors, name).to(device).eval(), tokenizer, info


def load_language_model(name_or_path, device="cpu"):
    """Return the same as `load_checkpoint`; ValueError for a classifier and for a file without a tokenizer."""
    model, tokenizer, info = load_checkpoint(name_or_path, device)
    require(info["kind"] == "gpt", f"{name_or_path} is a {info['kind']}, not a language model")
    require(tokenizer is not None, f"{name_or_path} holds no tokenizer, so text can be neither encoded nor decoded")
    return model, tokenizer, info


# Command line ---------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit status 2, and name the nearest flag."""
    def error(self, message):
        flag = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7) if "unrecognized" in message else []
        self.exit(2, f"error: {message}; " + (f"did you mean {near[0]}?\n" if near else f"see {self.prog} --help\n"))


def keep_freed_memory():
    """Let glibc's malloc keep freed blocks, as the next step needs the same ones: 10% less time to train GPT-2."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap, not from mmap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB of free heap


def explain(error):
    """Return an error as one line: cause and, where it is known, the remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "alloc" in text and "memory" in text:
        return "out of memory; lower --batch_size or --context_length, raise --accumulate, or take a smaller model"
    if isinstance(error, ImportError) and error.name:
        name, ours = error.name.split(".")[0], "gpt tokenizer data lora gpt2_weights train finetune_cls finetune_sft"
        remedy = f"copy {name}.py beside this file" if name in ours.split() else f"pip install --upgrade {name}"
        return f"{text}; {remedy}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text


def guarded(function, *args, debug=False):
    """Return the exit status of `function(*args)`; a user's mistake is one line on stderr, ours keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    keep_freed_memory()
    try:
        status = function(*args)
        sys.stdout.flush()
        return status if type(status) is int else 0
    except SystemExit as stop:  # argparse printed help or an error, or a signal ended a run after it was saved
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, `| head` for one, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (argparse.ArgumentError, ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        message = explain(error)
        if debug or isinstance(error, RuntimeError) and not message.startswith("out of memory"):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def run(doc, commands, argv=None, file=__file__):
    """Return the exit status of `script.py [command] [flags]`; `commands` is {word: (function, {flag: options})}."""
    argv, script = list(sys.argv[1:] if argv is None else argv), f"python {os.path.basename(file)}"

    def parse_and_call():
        if argv[:1] in (["-h"], ["--help"]):
            lines = [f"  {word:<10} {function.__doc__.splitlines()[0]}" for word, (function, _) in commands.items()]
            print(doc.strip(), f"\nCommands ({script} COMMAND --help lists its flags):", *lines, sep="\n")
            return 0
        word = argv.pop(0) if argv and not argv[0].startswith("-") else next(iter(commands))
        if word not in commands:
            raise argparse.ArgumentError(None, f"unknown command {word!r}; one of: {', '.join(commands)}")
        function, flags = commands[word]
        parser = Parser(prog=f"{script} {word}", description=function.__doc__, allow_abbrev=False)
        for names, options in flags.items():
            shown = "" if options.get("default") in (None, "", []) else " (default: %(default)s)"
            parser.add_argument(*names.split(), **{**options, "help": options["help"] + shown})
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return function(parser.parse_args(argv))

    return guarded(parse_and_call, debug="--debug" in argv)


def pick_device(name):
    """Return the torch device for a name or for "auto" (cuda, then mps, then cpu); raises ArgumentError if absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on "meta"
        return probe.device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentError(None, f"--device {name} is not available here; use --device cpu") from None


def check_utf8(*words):
    """Raise ArgumentError for a word of the command line that is not UTF-8: its odd bytes became surrogates."""
    for word in words:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise argparse.ArgumentError(None, f"{ascii(word)[:60]} is not UTF-8; type it in a UTF-8 terminal")


def generate_command(args):
    """Continue a prompt, token by token on the screen as they are drawn."""
    try:
        check_sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
                       args.max_new_tokens, args.num_samples)
        require(0 <= args.seed < 2**63, f"seed must be at least 0 and below 2^63, not {args.seed}")
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--{error}") from None
    check_utf8(args.prompt, *args.stop)
    model, tokenizer, _ = load_language_model(args.checkpoint, pick_device(args.device))
    if args.int8:
        int8_linears(model)
    ids, context = tokenizer.encode(args.prompt) or [tokenizer.eot_id], model.config.context_length
    require(ids[0] is not None, "an empty prompt needs a tokenizer with an end-of-text token; give --prompt")
    if len(ids) > context:
        print(f"note: of the prompt's {len(ids)} tokens the model sees only the last {context}", file=sys.stderr)
    generator = torch.Generator(device=model.device).manual_seed(args.seed)
    prompt, before = torch.tensor([ids], device=model.device), len(tokenizer.decode(ids))
    for _ in range(args.num_samples):
        print(args.prompt, end="", flush=True)
        steps = generate_steps(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                               args.min_p, args.repetition_penalty, tokenizer.eot_id, generator=generator)
        new_ids = (int(step) for step in steps if int(step) != tokenizer.eot_id)
        for piece in stream_text(lambda new: tokenizer.decode(ids + new)[before:], new_ids, args.stop):
            print(piece, end="", flush=True)
        print("\n" if args.num_samples > 1 else "")


def info_command(args):
    """Print the layers, parameters, memory and work of a model."""
    config = read_config(args.model)
    print(f"{args.model}: {config}\n\n{empty_model(config, device='meta')}\n")
    print(f"{'':<14}{'parameters':>14}{'MB':>10}{'training GB':>13}{'cache KB/token':>16}{'GFLOP/token':>13}")
    for name, size in {"this model": config, "gpt2, no bias": GPTConfig(), **GPT_CONFIGS}.items():
        C, V, L, T = size.emb_dim, size.vocab_size, size.n_layers, size.context_length
        count = sum(parameter.numel() for parameter in empty_model(size, device="meta").parameters())
        flops = 2 * (12 * L * C * C + V * C) + 4 * L * C * T  # Kaplan et al. 2020, 2.1; training: three times
        print(f"{name:<14}{count:>14,}{count * 4 / 2**20:>10,.2f}{count * 16 / 1e9:>13.2f}{8 * L * C / 1e3:>16.1f}"
              f"{flops / 1e9:>13.3f}")
    print("MB = 2^20 bytes in float32; training = weights, gradients and Adam's two moments, without activations")


def inspect_command(args):
    """Print the three tokens that each token of a text attends to most, mean over the heads."""
    check_utf8(args.prompt)
    model, tokenizer, _ = load_language_model(args.checkpoint)
    ids, layers, seen = tokenizer.encode(args.prompt), model.config.n_layers, []
    require(ids, "--prompt is empty")
    require(-layers <= args.layer < layers, f"--layer {args.layer}: there are 0 to {layers - 1}, and -1 for the last")
    attention = model.trf_blocks[args.layer].attn
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
        weights = attention.by_steps(seen[0])[1][0].mean(dim=0)  # (T, T)
    pieces = [repr(tokenizer.decode([i])) for i in ids]
    for t, piece in enumerate(pieces):
        share, order = weights[t].topk(min(3, t + 1))
        print(f"{piece:>16}  " + "  ".join(f"{pieces[s]} {p:.0%}" for p, s in zip(share.tolist(), order.tolist())))


def main(argv=None):
    """Run the command line and return its exit status."""
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
            "--int8": dict(action="store_true", help="weights in int8: faster on a CPU, a little less exact"),
            "--seed": dict(type=int, default=1234, help="equal seeds draw equal texts"),
            "--device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps")}),
        "info": (info_command, {
            "--model": dict(default="gpt2", help=f"one of {', '.join(GPT_CONFIGS)}, or a checkpoint file")}),
        "inspect": (inspect_command, {
            "--checkpoint": checkpoint,
            "--prompt": dict(default="Tom has a red ball and Mia has a blue one.", help="the text to look at"),
            "--layer": dict(type=int, default=-1, help="which block, from 0; -1 is the last")}),
    }, argv)


if __name__ == "__main__":
    sys.exit(main())
