"""Low-rank adapters (LoRA) in one file: fine-tune a model by training a small share of its numbers.

    python lora.py                                    fine-tune the classifier fully and with adapters, compare (1 min)
    python lora.py compare --task sft --lora_rank 4 8 32
    python lora.py --full out/cls --flags="--epochs 2"         beside a run that is there, made with the same flags
    python lora.py merge --adapter out/sft/adapter    a plain checkpoint with the update in its weights
    python lora.py info --adapter out/cls/adapter     layers, ranks, how large each update is
    python lora.py export --adapter out/sft/adapter   the adapter for Hugging Face's PEFT, checked against its base

A linear layer y = W x + b keeps its W frozen and gains a product of two thin matrices:

    y = W x + b + (alpha / r) B A dropout(x)          A (r, in), B (out, r), r much smaller than in and out

A starts random and B at zero, so training starts exactly at the given model. Gradients and Adam's two moments exist
only for A and B, which is where the memory goes; the adapter is a file of a few megabytes; and the product can be added
into W at the end, so that the finished model costs nothing extra. Copy this file alone beside any torch model:

    apply_lora(model, rank=8, alpha=32)               # each nn.Linear gets an adapter, all else is frozen
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with lora_disabled(model): before = model(x)      # the model as it was
    save_lora(model, "adapter")                       # needs gpt.py, or the packages safetensors and numpy
    merge_lora(model)                                 # plain nn.Linears again, W + (alpha / r) B A inside

Reads and writes folders in PEFT's format, adapter_model.safetensors and adapter_config.json: PEFT loads them onto
GPT2LMHeadModel, `load_lora` takes what PEFT saved. Next to the adapters the file holds every other parameter that
trains, such as a classifier's new head, and the sha256 of the base, so that no adapter lands on another model unseen.

Differs from the paper and its code: adapters on all linear layers of a block instead of queries and values alone, which
does better at equal size; the queries, keys and values of a fused layer share one A; nothing is merged by `eval()`.
Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Kalajdzievski 2023 for
alpha / sqrt(r); https://huggingface.co/docs/peft/developer_guides/checkpoint for the file format.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # we never use it, so its absence is no news

import torch
import torch.nn as nn
import torch.nn.functional as F

HEADS = {"out_head", "lm_head", "score", "classifier"}  # output layers, which "all-linear" leaves alone, as PEFT does
GPT2_NAMES = {"attn.qkv": "attn.c_attn", "attn.out_proj": "attn.c_proj",  # gpt.py's names and Hugging Face's
              "ffn.fc1": "mlp.c_fc", "ffn.fc2": "mlp.c_proj"}
NOT_HERE = ("use_dora", "bias", "lora_bias", "alpha_pattern", "layer_replication", "target_parameters", "use_qalora",
            "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "kasa_config", "arrow_config",
            "monteclora_config")  # options of PEFT's that change what an adapter computes
PREFIX = "base_model.model."  # in front of every name in PEFT's files

# ---------------------------------------------------------------------------------------------------------------------
# The layer


def check_options(rank, alpha, dropout, layers):
    """Raise ValueError for an option outside its range, `layers` being {name: nn.Linear}."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA's alpha must be a positive number, not {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA's dropout must be at least 0 and below 1, not {dropout}")
    for name, layer in layers.items():
        smaller = min(layer.in_features, layer.out_features)
        if type(rank) is not int or not 1 <= rank <= smaller:
            raise ValueError(f"LoRA's rank must be a whole number from 1 to {smaller}, the smaller side of {name}, "
                             f"not {rank}")


def take_hooks(new, old):
    """Let the module `new` run the forward and backward hooks of `old`, whose handles go on to remove them."""
    kept = {key: value for key, value in vars(old).items() if "hook" in key and ("forward" in key or "backward" in key)}
    vars(new).update(kept)


class LoRALinear(nn.Linear):
    """A frozen linear layer and its trained low-rank update: (..., in) -> (..., out).

    It takes over `linear`'s own weight and bias, no copies: tied weights stay tied, and their names in a state_dict
    stay what they were, beside the new lora_A (r, in) and lora_B (out, r). Those two are float32 where the weight is
    of half precision, and computed in the weight's precision."""

    def __init__(self, linear, rank=8, alpha=32, dropout=0.0, rslora=False):
        check_options(rank, alpha, dropout, {"the layer": linear})
        nn.Module.__init__(self)  # nn.Linear's own would claim memory for a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = getattr(linear, "kind", type(linear))  # of the layer that merging puts back
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within 1/sqrt(in), what nn.Linear's weight gets
        self.alpha, self.dropout, self.rslora = alpha, dropout, rslora
        self.enabled = True
        take_hooks(self, linear)
        self.train(linear.training)

    @property
    def rank(self):
        """The number of columns of B."""
        return len(self.lora_A)

    @property
    def scale(self):
        """What the product B A is multiplied by: alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x):
        if not self.enabled:
            return super().forward(x)
        flat = x.reshape(-1, self.in_features)
        y = F.linear(flat, self.weight, self.bias)
        flat = F.dropout(flat, self.dropout, self.training).to(y.dtype)
        down = F.linear(flat, self.lora_A.to(y.dtype))  # (N, r)
        y = y.addmm_(down, self.lora_B.t().to(y.dtype), alpha=self.scale)  # one pass over y; "+ scale *" takes three
        return y.view(*x.shape[:-1], self.out_features)

    def by_steps(self, x):
        """Return the same as `forward`, written out."""
        update = F.dropout(x, self.dropout, self.training) @ self.lora_A.T @ self.lora_B.T
        return super().forward(x) + self.scale * update

    def merged_weight(self):
        """Return W + scale B A (out, in), computed in float32 at least; raises ValueError where it is not finite."""
        W, A, B = (t.detach() for t in (self.weight, self.lora_A, self.lora_B))
        merged = torch.addmm(W.to(A.dtype), B, A, alpha=self.scale).to(W.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError("an update is not finite, so it is not merged; the training has diverged")
        return merged

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on a model


def linears(model):
    """Return {name: layer} of the layers that can carry an adapter, those with one included.

    Subclasses of nn.Linear are left out, but for those that say `takes_adapters`: whoever writes one may read its
    weight without calling it, as nn.MultiheadAttention does with its output layer, and an adapter would never run. So
    are layers whose weight is computed from others, as under spectral_norm."""
    return {name: module for name, module in model.named_modules()
            if module is not model and "weight" in module._parameters
            and (type(module) in (nn.Linear, LoRALinear) or getattr(type(module), "takes_adapters", False))}


def lora_layers(model):
    """Return {name: LoRALinear} of the layers with adapters; raises ValueError where there are none."""
    layers = {name: layer for name, layer in linears(model).items() if type(layer) is LoRALinear}
    if not layers and merged_layers(model):
        raise ValueError("the adapters are already merged into the weights; unmerge_lora(model) takes them out")
    if not layers:
        raise ValueError("the model has no adapters; apply_lora(model) adds them")
    return layers


def merged_layers(model):
    """Return {nn.Linear: the LoRALinear that was merged into it}."""
    return {layer: vars(layer)["unmerged"][0] for layer in linears(model).values() if "unmerged" in vars(layer)}


def lora_parameters(model):
    """Return the list of A and B of every adapter; a head that trains beside them is not in it."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def matches(name, targets):
    """Return whether a layer's dotted name is one of `targets` or ends with one, at a dot: PEFT's rule."""
    return any(name == target or name.endswith("." + target) for target in targets)


def shares_weight(model, layer):
    """Return whether another module of the model holds the weight of `layer` too: a tied head."""
    return any(layer.weight is parameter for module in model.modules() if module is not layer
               for parameter in module.parameters(recurse=False))


def choose(model, targets):
    """Return {name: layer} of the layers that `targets` selects, ends of names as a list or as "qkv,fc1".

    "all-linear" selects every layer but heads and those that share their weight. Raises ValueError for a target that
    matches nothing, with the names there are."""
    layers, chosen = linears(model), {}
    targets = targets.replace(" ", "").split(",") if isinstance(targets, str) else list(targets)
    for target in targets or [""]:
        if target == "all-linear":
            found = {name: layer for name, layer in layers.items()
                     if name.split(".")[-1] not in HEADS and not shares_weight(model, layer)}
        else:
            found = {name: layer for name, layer in layers.items() if matches(name, [target])}
        if not found:
            names = dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in layers)  # once for all blocks
            raise ValueError(f"LoRA's target {target!r} matches no nn.Linear; there are: {', '.join(names) or 'none'}")
        chosen |= found
    return chosen


def replace(model, new):
    """Put `new[layer]` in the place of each layer, wherever the model uses it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip the second use of a layer
            if child in new:
                setattr(parent, name, new[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # its fast path reads .weight and would pass the adapter by


def plain(layer, weight):
    """Return a linear layer, as `layer` was before it got an adapter, with the given weight and the bias of `layer`."""
    linear = layer.kind(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = weight, layer.bias
    take_hooks(linear, layer)
    return linear.train(layer.training)


def make_merge_final(model):
    """Take merged weights as the base from here on, and release what they were before."""
    for layer in merged_layers(model):
        del layer.unmerged


def apply_lora(model, rank=8, alpha=32, dropout=0.0, targets="all-linear", rslora=False):
    """Return the model, changed in place: adapters on the chosen layers, and only they require gradients.

    See `choose` for `targets`. A new head that is to train as well: `model.out_head.requires_grad_(True)` afterwards.
    Adapters that were merged before become part of the base. Raises ValueError, the model untouched, where an option is
    out of range, a target matches nothing, or there are adapters already.

    Example: apply_lora(GPTModel(GPT_CONFIGS["gpt2"])) adds 1,179,648 parameters to 124,439,808."""
    if any(type(layer) is LoRALinear for layer in linears(model).values()):
        raise ValueError("the model has adapters already; merge_lora(model) first, or exchange them by load_lora")
    chosen = choose(model, targets)
    check_options(rank, alpha, dropout, chosen)
    make_merge_final(model)
    model.requires_grad_(False)
    replace(model, {layer: LoRALinear(layer, rank, alpha, dropout, rslora) for layer in chosen.values()})
    return model


@contextlib.contextmanager
def lora_disabled(model):
    """Within the block the model computes what it did before `apply_lora`, bit for bit.

    Blocks nest, and an exception leaves none of them open. Raises ValueError where there are no adapters to disable."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def set_tied(model, tied):
    """Note in the config of a model from gpt.py whether its head is tied."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if dataclasses.is_dataclass(config) and hasattr(config, "tie_weights"):
            module.config = dataclasses.replace(config, tie_weights=tied)


def merge_lora(model, keep=True):
    """Return the model, changed in place: plain nn.Linears with the updates added to their weights, ready to be saved.

    `unmerge_lora` brings adapters and weights back bit for bit; `keep=False` releases what it needs for that. A tied
    head with an adapter gets a weight of its own, the embedding stays as it is. Raises ValueError, the model untouched,
    where there is nothing to merge or an update is not finite."""
    layers = lora_layers(model).values()
    weights = {layer: nn.Parameter(layer.merged_weight(), requires_grad=False) for layer in layers}
    new = {layer: plain(layer, weight) for layer, weight in weights.items()}
    for layer, linear in new.items():
        linear.unmerged = (layer,)  # in a tuple, or it would be a submodule and in the state_dict
    if any(shares_weight(model, layer) for layer in layers):
        set_tied(model, False)
    replace(model, new)
    if not keep:
        make_merge_final(model)
    return model


def unmerge_lora(model):
    """Return the model, changed in place: the adapters and weights from before `merge_lora`, bit for bit.

    Raises ValueError where nothing is merged."""
    merged = merged_layers(model)
    if not merged:
        raise ValueError("nothing is merged that could be taken out again")
    for linear, layer in merged.items():
        layer.to(linear.weight.device)  # where the model has moved in between
    replace(model, merged)
    if any(shares_weight(model, layer) for layer in merged.values()):
        set_tied(model, True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Files: adapter_model.safetensors and adapter_config.json, with PEFT's names


def peft_names(model):
    """Return {module name: its name in PEFT's files}: the same, but GPT-2's where the model holds one of gpt.py's.

    Its head is `lm_head` if it has a row for each token, else `score`."""
    names = {name: name for name, _ in model.named_modules()}
    ours = [name for name in names if name.endswith("trf_blocks.0.attn.qkv")]
    if len(ours) != 1:  # none, or several that would get the same names
        return names
    prefix = ours[0].removesuffix("trf_blocks.0.attn.qkv")
    for name, module in model.named_modules():
        block = re.fullmatch(re.escape(prefix) + r"trf_blocks\.(\d+)\.(.+)", name)
        if block and block[2] in GPT2_NAMES:
            names[name] = f"transformer.h.{block[1]}.{GPT2_NAMES[block[2]]}"
        elif name == prefix + "out_head" and isinstance(module, nn.Linear):
            tokens = model.get_submodule(prefix + "tok_emb").num_embeddings
            names[name] = "lm_head" if module.out_features == tokens else "score"
    return names


def is_adapter(name):
    """Return whether the parameter of this name, here or in a file, is an adapter's A or B."""
    return name.removesuffix(".weight").endswith((".lora_A", ".lora_B"))


def named_in_file(model):
    """Return {name in PEFT's file: (name here, parameter)} for every parameter of the model.

    Example: "trf_blocks.0.attn.qkv.lora_A" is "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" there."""
    names, found = peft_names(model), {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        found[PREFIX + f"{names[module]}.{leaf}".lstrip(".") + ".weight" * is_adapter(name)] = name, parameter
    return found


def base_fingerprint(model, trained=()):
    """Return the sha256 over name, shape and bytes of each parameter but the adapters' and those named in `trained`."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in trained and not is_adapter(name):
            tensor = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update((ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def write_bytes(path, data):
    """Write a file all at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows cannot open a folder; elsewhere this makes the new name last
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        error.filename = str(path)  # the name that the caller knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def data_sha256(content):
    """Return the sha256 of the data in the bytes of a safetensors file: all that stands behind its header."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def safetensors_functions():
    """Return (read, write) for safetensors files: gpt.py's, or the package's where gpt.py was not copied along.

    Raises ValueError where neither is at hand."""
    with contextlib.suppress(ImportError):
        from gpt import read_safetensors, write_safetensors

        return read_safetensors, write_safetensors
    if not all(map(importlib.util.find_spec, ("safetensors", "numpy"))):  # the package writes through numpy
        raise ValueError("adapter files need gpt.py beside lora.py, or: pip install safetensors numpy")
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    def read(path):
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(path, tensors, metadata):
        metadata = {"format": "pt", **metadata, "data_sha256": data_sha256(save(tensors))}
        write_bytes(path, save(tensors, metadata))

    return read, write


def peft_config(layers, names, heads, base_name):
    """Return the content of adapter_config.json for {name: LoRALinear}; `heads` are the modules saved whole."""
    ranks = {names[name]: layer.rank for name, layer in layers.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    ends = sorted({name.split(".")[-1] for name in ranks})  # enough to name the layers, if they match no others
    exact = sorted(name for name in names.values() if matches(name, ends)) == sorted(ranks)
    first, is_gpt2 = next(iter(layers.values())), any(names[name] != name for name in layers)
    task = "SEQ_CLS" if "score" in heads else "CAUSAL_LM" if is_gpt2 else None
    return {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base_name, "r": rank,
            "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
            "lora_alpha": first.alpha, "lora_dropout": first.dropout, "use_rslora": first.rslora,
            "target_modules": ends if exact else list(ranks), "modules_to_save": heads or None, "bias": "none",
            "fan_in_fan_out": is_gpt2,  # Hugging Face's GPT-2 stores its matrices transposed; A and B are the same
            "inference_mode": True}


def save_lora(model, directory, base_name=None):
    """Return the path of adapter_model.safetensors after writing it and adapter_config.json to a folder.

    Besides the adapters it holds every other parameter that requires gradients, such as a new head, and in its header
    the sha256 of the rest. `base_name` is for PEFT: the name or folder of the base in Hugging Face's format."""
    layers, names, folder = lora_layers(model), peft_names(model), Path(directory)
    saved = {key: (name, parameter) for key, (name, parameter) in named_in_file(model).items()
             if parameter.requires_grad or is_adapter(name)}
    heads = [name for name, _ in saved.values() if not is_adapter(name)]
    config = peft_config(layers, names, sorted({names[name.rpartition(".")[0]] for name in heads}), base_name)
    tensors = {key: parameter.detach().cpu().contiguous() for key, (_, parameter) in saved.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    path = folder / "adapter_model.safetensors"
    _, write = safetensors_functions()
    write(path, tensors, {"base_sha256": base_fingerprint(model, heads)})
    return path


def read_config(path):
    """Return the dict in an adapter_config.json; raises ValueError where it is not what `load_lora` can follow."""
    try:
        config = {"lora_dropout": 0.0, "use_rslora": False, **json.loads(path.read_bytes())}
        config["modules_to_save"] = list(config.get("modules_to_save") or [])
        if config["peft_type"] != "LORA" or not isinstance(config["target_modules"], (list, str)):
            raise ValueError(f"peft_type {config['peft_type']!r} is not LORA, or target_modules is missing")
        check_options(1, config["lora_alpha"], config["lora_dropout"], {})
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path}: {error}") from None
    strange = [key for key in NOT_HERE if config.get(key) not in (None, False, "none", [], {})]
    if str(config.get("init_lora_weights")).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        strange.append("init_lora_weights")  # these change the base's weights too
    if strange:
        raise ValueError(f"{path}: {', '.join(strange)} is set, which this LoRA does not have; merge with PEFT instead")
    return config


def read_adapter(directory):
    """Return (config, {name in the file: tensor}, metadata) of an adapter's folder.

    Raises FileNotFoundError, or ValueError for a file that is damaged or needs what this LoRA does not have."""
    path, config_path = Path(directory) / "adapter_model.safetensors", Path(directory) / "adapter_config.json"
    for needed in (config_path, path):
        if not needed.is_file():
            below = sorted(str(found.parent) for found in Path(directory).glob("*/**/adapter_config.json"))
            raise FileNotFoundError(f"no {needed}; " + (f"give one of: {', '.join(below)}" if below else
                                                        "an adapter is a folder that save_lora or PEFT wrote"))
    config, (read, _) = read_config(config_path), safetensors_functions()
    tensors, metadata = read(path)
    if "data_sha256" in metadata and metadata["data_sha256"] != data_sha256(path.read_bytes()):
        raise ValueError(f"{path}: the data is damaged, its sha256 is not the one in the header; restore a copy")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name!r} holds values that are not finite")
    for layer in sorted({name.rpartition(".lora_")[0] for name in tensors if is_adapter(name)}):
        A, B = (tensors.get(f"{layer}.lora_{letter}.weight") for letter in "AB")
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
            raise ValueError(f"{path}: lora_A or lora_B of {layer} is missing, or their ranks differ")
    return config, tensors, metadata


def selects(targets, name):
    """Return whether PEFT's target_modules or exclude_modules, a regular expression or list of ends, select `name`."""
    return re.fullmatch(targets, name) is not None if isinstance(targets, str) else matches(name, targets or [])


def wanted_shapes(model, config, tensors):
    """Return {name in the file: shape} of what an adapter for this model must hold, by its config and its own names."""
    names, shapes = peft_names(model), {}
    for name, layer in linears(model).items():
        A, B = (f"{PREFIX}{names[name]}.lora_{letter}.weight" for letter in "AB")
        wanted = selects(config["target_modules"], names[name]) and not config.get("layers_to_transform")
        if A in tensors or wanted and not selects(config.get("exclude_modules"), names[name]):
            rank = min(len(tensors[A]) if A in tensors else 0, layer.in_features, layer.out_features)
            shapes[A], shapes[B] = (rank, layer.in_features), (layer.out_features, rank)
    for key, (name, parameter) in named_in_file(model).items():
        head = matches(names[name.rpartition(".")[0]], config["modules_to_save"])
        if not is_adapter(name) and (head or key in tensors):
            shapes[key] = tuple(parameter.shape)
    return shapes


def check_fit(model, directory, config, tensors):
    """Raise ValueError with the first five tensors that are missing, unknown or of another shape, if there are any."""
    shapes = wanted_shapes(model, config, tensors)
    problems = {"not in the model": [name for name in tensors if name not in shapes],
                "missing": [name for name in shapes if name not in tensors],
                "of another shape": [f"{name} {tuple(tensors[name].shape)} instead of {shape}"
                                     for name, shape in shapes.items()
                                     if name in tensors and tuple(tensors[name].shape) != shape]}
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{directory}: {problem}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}")


def check_base(model, directory, tensors, metadata):
    """Raise ValueError where the adapter says that it was trained on another base; note where it does not say which."""
    if "base_sha256" not in metadata:
        print(f"note: {directory} does not say which base it belongs to (PEFT's files never do); make sure that it is "
              "this one", file=sys.stderr)
        return
    trained = {name for key, (name, _) in named_in_file(model).items() if key in tensors}
    there, here = metadata["base_sha256"], base_fingerprint(model, trained)
    if there != here:
        raise ValueError(f"{directory} was trained on another base (sha256 {there[:12]}..., this model has "
                         f"{here[:12]}...); load the weights that it started from")


@torch.no_grad()
def load_lora(model, directory, any_base=False):
    """Return the model, changed in place: the adapter from a folder that `save_lora` or PEFT wrote, and only it trains.

    Adapters that are there give way; where layer and rank agree the parameters stay the same objects, so that an
    optimizer keeps them. A saved head is copied into the model's own. Raises ValueError, the model untouched, where a
    tensor is missing, unknown or of another shape, or the base is another one (`any_base` lets that pass, for a model
    in another precision)."""
    config, tensors, metadata = read_adapter(directory)
    check_fit(model, directory, config, tensors)
    if not any_base:
        check_base(model, directory, tensors, metadata)
    names, options, new = peft_names(model), (config["lora_alpha"], config["lora_dropout"], config["use_rslora"]), {}
    for name, layer in linears(model).items():
        A = tensors.get(f"{PREFIX}{names[name]}.lora_A.weight")
        if A is not None and (type(layer) is not LoRALinear or layer.rank != len(A)):
            new[layer] = LoRALinear(layer, len(A), *options)
        elif A is None and type(layer) is LoRALinear:
            new[layer] = plain(layer, layer.weight)
    make_merge_final(model)
    model.requires_grad_(False)
    replace(model, new)
    for layer in lora_layers(model).values():
        layer.alpha, layer.dropout, layer.rslora = options
    for key, (_, parameter) in named_in_file(model).items():
        if key in tensors:
            parameter.copy_(tensors[key]).requires_grad_(True)
    return model


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
# The four commands

TASKS = {"cls": ("finetune_cls.py", "test_accuracy"), "sft": ("finetune_sft.py", "exact_match")}


def load_base(name):
    """Return (model, the tokenizer's dict or None, made) for a checkpoint file or a GPT-2 name."""
    from gpt import GPT_CONFIGS, load_checkpoint

    if name in GPT_CONFIGS and name != "tiny":
        from gpt2_weights import load_gpt2
        from tokenizer import load_tokenizer

        return load_gpt2(name).eval(), load_tokenizer("gpt2").to_dict(), {}
    if not Path(name).is_file():
        raise FileNotFoundError(f"no checkpoint {name}; give the base of the adapter with --checkpoint")
    return load_checkpoint(name)


def load_adapted(checkpoint, adapter):
    """Return (model with the adapter, the tokenizer's dict or None, made); a classifier's adapter brings its head."""
    model, tokenizer, made = load_base(checkpoint)
    _, tensors, _ = read_adapter(adapter)
    head = tensors.get(PREFIX + "score.weight")
    if head is not None and model.out_head.out_features == model.config.vocab_size:
        model.out_head = nn.Linear(model.config.emb_dim, len(head), bias=PREFIX + "score.bias" in tensors)
        set_tied(model, False)
        made = {**made, "kind": "classifier"}
    return load_lora(model, adapter), tokenizer, made


def fine_tune(task, out_dir, flags):
    """Return the exit status of one fine-tuning run, in a process of its own, which a signal to this one stops too."""
    script = TASKS[task][0]
    path = Path(__file__).with_name(script)
    if not path.is_file():
        raise FileNotFoundError(f"compare runs {script}, which is not beside {Path(__file__).name}")
    command = [sys.executable, str(path), "--out_dir", str(out_dir), *flags]
    stopped, before = [], {}

    def pass_on(number, frame):  # as the other signal: many reach both processes, and a second one ends a run unsaved
        if not stopped:
            child.send_signal(signal.SIGINT if number == signal.SIGTERM and os.name != "nt" else signal.SIGTERM)
        stopped.append(number)

    with subprocess.Popen(command, stdout=2) as child:  # its report goes to stderr: stdout is for the table
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not in the main thread: nobody signals us there
                    before[number] = signal.signal(number, pass_on)
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 + stopped[0] if stopped else status


def row_of(task, out_dir):
    """Return the row of the table of the finished run in a folder; raises ValueError where there is none."""
    script, score = TASKS[task]
    try:
        summary = json.loads((out_dir / "summary.json").read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{out_dir} holds no finished run of {script}; make one, or leave out --full") from error
    row = {key: summary.get(key) for key in ("trainable_parameters", "optimizer_bytes", "peak_memory_bytes",
                                             "step_seconds", "seconds")}
    adapter = out_dir / "adapter" / "adapter_model.safetensors"
    file = adapter if adapter.is_file() else out_dir / "model.safetensors"
    row["file_bytes"] = file.stat().st_size if file.is_file() else None
    row["score"] = summary.get(score + "_mean", summary.get(score))  # the mean where several seeds were run
    return row


def full_row(args):
    """Return the row of the run that --full names; raises ValueError for a run of another kind or with adapters."""
    folder, script = Path(args.full), TASKS[args.task][0]
    row = row_of(args.task, folder)
    if row["score"] is None or (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} is no run of {script} with all weights, which is what --full needs")
    return row


def print_table(rows, score_name):
    """Print the runs {name: row} side by side; a number that a run did not report is a dash."""
    columns = (("trainable_parameters", "trainable", 1, ",.0f"), ("optimizer_bytes", "optimizer MB", 2**20, ",.1f"),
               ("peak_memory_bytes", "peak MB", 2**20, ",.0f"), ("step_seconds", "step ms", 1e-3, ",.1f"),
               ("file_bytes", "file MB", 2**20, ",.2f"), ("score", score_name, 1, ".4f"))
    print(f"{'run':<10}" + "".join(f"{title:>15}" for _, title, _, _ in columns))
    for name, row in rows.items():
        cells = ("-" if row[key] is None else format(row[key] / unit, style) for key, _, unit, style in columns)
        print(f"{name:<10}" + "".join(f"{cell:>15}" for cell in cells))


def compare_command(args):
    """Fine-tune fully and with adapters, and print what each costs and how well it does.

    Runs finetune_cls.py (or, with --task sft, finetune_sft.py) into OUT_DIR/full and OUT_DIR/rank8. The run with all
    weights may be there already (--full); made with the same --flags, or the comparison is none."""
    if min(args.lora_rank) < 1:
        raise argparse.ArgumentError(None, "--lora_rank must be at least 1")
    started, score = time.perf_counter(), TASKS[args.task][1]
    both = shlex.split(args.flags) + ["--resume"] * args.resume + ["--fresh"] * args.fresh
    runs, rows, out_dir = {} if args.full else {"full": []}, {}, Path(args.out_dir)
    if args.full:
        rows["full"] = full_row(args)
    for rank in args.lora_rank:
        runs[f"rank{rank}"] = ["--lora_rank", str(rank), *shlex.split(args.lora_flags)]
    for name, flags in runs.items():
        print(f"--- {args.task}, {name}", file=sys.stderr)
        if status := fine_tune(args.task, out_dir / name, both + flags):
            return status
        rows[name] = row_of(args.task, out_dir / name)
    print_table(rows, score)
    full, gaps = rows["full"]["score"], {}
    for name, row in rows.items():
        if name != "full" and None not in (full, row["score"]):
            gaps[name] = 100 * (full - row["score"])
            print(f"{name}: {abs(gaps[name]):.1f} points {'below' if gaps[name] > 0 else 'above'} full fine-tuning")
    last = json.loads((out_dir / f"rank{args.lora_rank[-1]}" / "summary.json").read_bytes())  # all saw the same data
    summary = {"stage": "lora", "seconds": time.perf_counter() - started,
               "command": shlex.join(["python", "lora.py", *args.argv]),
               **{key: last[key] for key in ("steps", "versions", "seed", "data") if key in last},
               "config": {key: value for key, value in vars(args).items() if key not in ("argv", "debug")},
               "task": args.task, "score_name": score, "runs": rows, "points_below_full": gaps}
    write_bytes(out_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


@torch.no_grad()
def merge_command(args):
    """Write a plain checkpoint: the base with the adapter's update added to its weights."""
    from gpt import read_safetensors, save_checkpoint

    if Path(args.out).resolve() == Path(args.checkpoint).resolve():
        raise argparse.ArgumentError(None, "--out would overwrite --checkpoint; give another --out")
    model, tokenizer, made = load_adapted(args.checkpoint, args.adapter)
    whole = Path(args.adapter).parent / "model.safetensors"  # the run's own knows labels, template and figures
    metadata = read_safetensors(whole)[1] if whole.is_file() else {}
    base = {key: value for key, value in made.items() if key not in ("stage", "step", "val_loss")}  # of other weights
    made = json.loads(metadata["made"]) if "made" in metadata else base
    if model.out_head.out_features != model.config.vocab_size and "labels" not in made:
        raise ValueError(f"{args.adapter} belongs to a classifier or reward model, and no {whole} says what its scores "
                         "mean; use that run's own model.safetensors, which is merged already")
    ids = torch.arange(min(64, model.config.context_length))[None] % model.config.vocab_size
    before, count = model(ids), len(lora_layers(model))
    largest = (merge_lora(model, keep=False)(ids) - before).abs().max()
    save_checkpoint(args.out, model, tokenizer, **{**made, "adapter": str(args.adapter)})
    print(f"merged {count} layers into {args.out}; largest change of a logit by merging {largest:.1e}")


def export_command(args):
    """Check an adapter against its base and write PEFT's files, which Hugging Face's GPT-2 loads."""
    model, _, _ = load_adapted(args.checkpoint, args.adapter)
    ours = Path(args.checkpoint).is_file()
    name = args.base_name or ("out/hf" if ours else args.checkpoint.replace("gpt2-small", "gpt2"))
    path = save_lora(model, args.out, name)
    if ours and not args.base_name:
        print(f"the base, where it is not yet in Hugging Face's format:\n"
              f"    python gpt2_weights.py export --source {shlex.quote(args.checkpoint)} --out {name}")
    print(f"written: {path} and adapter_config.json; with Hugging Face's packages:\n"
          f"    base = transformers.AutoModelForCausalLM.from_pretrained({name!r})\n"
          f"    model = peft.PeftModel.from_pretrained(base, {args.out!r})")


def info_command(args):
    """List an adapter's layers, ranks, and how large their updates (alpha / r) B A are.

    Frobenius norm and largest singular value; with --checkpoint also the norm as a share of the weight's own."""
    config, tensors, metadata = read_adapter(args.adapter)
    weights = {}
    if args.checkpoint:
        model, _, _ = load_adapted(args.checkpoint, args.adapter)
        names = peft_names(model)
        weights = {names[name]: layer.weight.detach() for name, layer in lora_layers(model).items()}
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.adapter}: {count:,} parameters, alpha {config['lora_alpha']}, dropout {config['lora_dropout']}, "
          f"base {metadata.get('base_sha256', 'unknown')[:12]}")
    print(f"{'layer':<36}{'out x in':>14}{'rank':>6}{'norm':>10}{'largest':>10}{'share':>10}")
    for key, A in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        B = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight"):
            scale = config["lora_alpha"] / (math.sqrt(len(A)) if config["use_rslora"] else len(A))
            values = scale * torch.linalg.svdvals(torch.linalg.qr(B.float()).R @ torch.linalg.qr(A.float().T).R.T)
            share = f"{values.norm() / weights[name].norm():.2%}" if name in weights else "-"
            print(f"{name:<36}{f'{len(B)} x {A.shape[1]}':>14}{len(A):>6}{values.norm():>10.4f}{values.max():>10.4f}"
                  f"{share:>10}")
        elif not key.endswith(".lora_B.weight"):
            print(f"{name:<36}{' x '.join(map(str, A.shape)):>14}   trained whole")


def main(argv=None):
    """Run the command line and return its exit status."""
    adapter = dict(default="out/sft/adapter", help="a folder that save_lora or PEFT wrote")
    base = dict(default="out/pretrain/model.safetensors", help="what the adapter was trained on: a file, or gpt2, ...")
    return run(__doc__, {
        "compare": (compare_command, {
            "--task": dict(default="cls", choices=list(TASKS), help="classification or instructions"),
            "--lora_rank": dict(type=int, nargs="+", default=[8], help="one run for each rank (default 8)"),
            "--flags": dict(default="", help='flags for all runs, as one word: --flags="--max_steps 50 --seed 1"'),
            "--lora_flags": dict(default="", help="flags for the runs with adapters alone"),
            "--full": dict(default="", help="folder of a finished run with all weights and the same flags, which is "
                           "then not made again"),
            "--out_dir": dict(default="out/lora", help="where the runs and summary.json go"),
            "--resume": dict(action="store_true", help="continue or reuse the runs that are there"),
            "--fresh": dict(action="store_true", help="move runs that are there aside")}),
        "merge": (merge_command, {
            "--checkpoint": base,
            "--adapter": adapter,
            "--out": dict(default="out/merged.safetensors", help="where to write")}),
        "export": (export_command, {
            "--checkpoint": base,
            "--adapter": adapter,
            "--out": dict(default="out/peft", help="the folder to write"),
            "--base_name": dict(default="", help="the base for Hugging Face: a name, or a folder that "
                                "`gpt2_weights.py export` wrote; default that of --checkpoint, or out/hf")}),
        "info": (info_command, {
            "--adapter": adapter,
            "--checkpoint": dict(help="the base, to compare the updates with its weights")}),
    }, argv)


if __name__ == "__main__":
    sys.exit(main())
