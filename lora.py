"""Low-rank adapters (LoRA): fine-tune a model by training a small share of its parameters.

    python lora.py info --checkpoint gpt2 --lora_rank 4 8 32     what adapters of these ranks cost on a model
    python lora.py merge --adapter out/sft/adapter               a plain checkpoint with the update in its weights
    python lora.py export --adapter out/sft/adapter              the adapter for Hugging Face's PEFT

A linear layer keeps its W frozen and gains a product of two thin matrices, A (r, in) and B (out, r):

    y = W x + b + (alpha / r) B A dropout(x)

A starts random and B at zero, so training starts exactly at the given model. Gradients and optimizer state exist only
for A and B. This file works alone on any torch model; saving and loading need gpt.py or the package safetensors:

    apply_lora(model, rank=8, alpha=32)               # each nn.Linear gets an adapter, everything else is frozen
    with lora_disabled(model): before = model(x)      # the model without its adapters
    save_lora(model, "adapter")                       # in PEFT's format; load_lora(model, "adapter") reads it
    merge_lora(model)                                 # nn.Linears with W + (alpha / r) B A; and unmerge_lora(model)

Unlike the paper: adapters on all linear layers of a block; the fused queries, keys and values share one A.
Sources: Hu et al. 2021, arXiv 2106.09685, section 4.1; Kalajdzievski 2023, arXiv 2312.03732, for alpha / sqrt(r).
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import re
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # numpy is not used

import torch
import torch.nn as nn
import torch.nn.functional as F

HEADS = {"out_head", "lm_head", "score", "classifier"}  # output layers, which "all-linear" leaves alone, as PEFT does
PREFIX = "base_model.model."  # in front of every name in PEFT's files
GPT2_NAMES = {"qkv": "attn.c_attn", "out_proj": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}  # in a block
# What PEFT's configs may hold. Other values change the base weights too (PiSSA, LoRA-GA), other switches the result.
KNOWN_VALUES = {"bias": (None, "none"),
                "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica")}
KNOWN_OPTIONS = {"use_rslora", "fan_in_fan_out", "inference_mode", "target_modules", "exclude_modules", "rank_pattern",
                 "modules_to_save", "layers_to_transform", "layers_pattern", "auto_mapping", "eva_config"}


def require(condition, message):
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_options(rank, alpha, dropout, layers):
    """Raise ValueError for an option outside its range, `layers` being {name: nn.Linear}."""
    require(0 < alpha < math.inf, f"LoRA's alpha must be a positive number, not {alpha}")
    require(0 <= dropout < 1, f"LoRA's dropout must be at least 0 and below 1, not {dropout}")
    for name, layer in layers.items():
        high = min(layer.in_features, layer.out_features)
        fits = type(rank) is int and 1 <= rank <= high
        require(fits, f"LoRA's rank must be a whole number from 1 to {high}, the smaller side of {name}, not {rank}")


class LoRALinear(nn.Linear):
    """A frozen linear layer and its trained low-rank update: (..., in) -> (..., out).
    Weight and bias are those of `linear`, tied ones stay tied; lora_A (r, in), lora_B (out, r) are float32 at least."""
    def __init__(self, linear, rank=8, alpha=32.0, dropout=0.0, rslora=False):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        like = {"dtype": torch.promote_types(linear.weight.dtype, torch.float32), "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within 1/sqrt(in), as nn.Linear's weight
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale, self.enabled = alpha / (math.sqrt(rank) if rslora else rank), True
        self.train(linear.training)

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

    def plain(self, weight):
        """Return an nn.Linear with the given weight and this layer's bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = weight, self.bias
        return linear.train(self.training)


# Adapters on a model --------------------------------------------------------------------------------------------------


def linear_layers(model):
    """Return {name: layer} of the nn.Linear layers, adapted or not.

    Those of nn.TransformerEncoderLayer, which torch never calls, are left out."""
    fused = tuple(f"{name}.".lstrip(".") for name, module in model.named_modules()
                  if isinstance(module, nn.TransformerEncoderLayer))
    return {name: module for name, module in model.named_modules()
            if name and type(module) in (nn.Linear, LoRALinear) and not name.startswith(fused)}


def lora_layers(model):
    """Return {name: LoRALinear} of the layers with adapters; raises ValueError where there are none."""
    layers = {name: layer for name, layer in linear_layers(model).items() if type(layer) is LoRALinear}
    require(layers, "the model has no adapters; apply_lora(model) adds them, unmerge_lora(model) takes merged ones out")
    return layers


def lora_parameters(model):
    """Return the list of A and B of every adapter; a head that trains besides them is not in it."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def matches(name, targets):
    """Return whether PEFT's `targets` select a name: a list of ends at a dot, or a regular expression for all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith("." + target) for target in targets)


def select_layers(model, targets):
    """Return {name: layer} of the layers that `targets` selects, ends of names as a list or as "qkv,fc1".

    "all-linear": every layer but heads and those that share their weight. ValueError for a target without a match."""
    layers, selected = linear_layers(model), {}
    users = collections.Counter(weight for module in model.modules() for weight in module.parameters(recurse=False))
    inner = [name for name, layer in layers.items() if name.split(".")[-1] not in HEADS and users[layer.weight] == 1]
    for target in targets.replace(" ", "").split(",") if isinstance(targets, str) else list(targets) or [""]:
        found = inner if target == "all-linear" else [name for name in layers if matches(name, [target])]
        names = dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in layers)  # once for all blocks
        require(found, f"LoRA's target {target!r} matches no nn.Linear; there are: {', '.join(names) or 'none'}")
        selected |= {name: layers[name] for name in found}
    return selected


def replace(model, new):
    """Put `new[layer]` in the place of each layer, wherever the model uses it; a GPT's config notes if it is tied."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip the second use of a layer
            if child in new:
                setattr(parent, name, new[child])
    for module in model.modules():
        head, config = getattr(module, "out_head", None), getattr(module, "config", None)
        if isinstance(head, nn.Linear) and hasattr(config, "tie_weights"):
            module.config = dataclasses.replace(config, tie_weights=head.weight is module.tok_emb.weight)


def apply_lora(model, rank=8, alpha=32.0, dropout=0.1, targets="all-linear", rslora=False):
    """Return the model, changed in place: adapters on the selected layers, and only they require gradients.

    A new head needs `requires_grad_(True)` afterwards. ValueError, the model untouched, for a wrong option or target.
    Example: apply_lora(load_gpt2("gpt2")) adds 1,179,648 parameters."""
    adapted = LoRALinear in map(type, linear_layers(model).values())
    require(not adapted, "the model has adapters already; merge_lora(model) first, or replace them by load_lora")
    selected = select_layers(model, targets)
    check_options(rank, alpha, dropout, selected)
    vars(model).pop("lora_merged", None)
    model.requires_grad_(False)
    replace(model, {layer: LoRALinear(layer, rank, alpha, dropout, rslora) for layer in selected.values()})
    return model


@contextlib.contextmanager
def lora_disabled(model):
    """Within the block the model computes what it did before `apply_lora`, bit for bit; blocks nest."""
    before = {layer: layer.enabled for layer in lora_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


@torch.no_grad()
def merge_lora(model):
    """Return the model, changed in place: nn.Linear layers with the weights W + (alpha / r) B A, ready to be saved.

    A tied head with an adapter gets a weight of its own. ValueError, the model untouched, for an update not finite."""
    merged = {}
    for layer in lora_layers(model).values():
        W, A, B = layer.weight, layer.lora_A, layer.lora_B
        weight = torch.addmm(W.to(A.dtype), B, A, alpha=layer.scale).to(W.dtype)
        require(bool(torch.isfinite(weight).all()), "an update is not finite, so the training has diverged")
        merged[layer] = layer.plain(nn.Parameter(weight, requires_grad=False))
    replace(model, merged)
    model.lora_merged = {linear: layer for layer, linear in merged.items()}
    return model


def unmerge_lora(model):
    """Return the model, changed in place: the adapters and weights from before `merge_lora`, bit for bit."""
    require("lora_merged" in vars(model), "nothing is merged that could be taken out again")
    for linear, layer in model.lora_merged.items():
        layer.to(linear.weight.device).train(linear.training)  # where the model has changed in between
    replace(model, vars(model).pop("lora_merged"))
    return model


# Files: adapter_model.safetensors and adapter_config.json, with PEFT's names ------------------------------------------


def peft_names(model):
    """Return {name of a module or parameter: its name in PEFT's files}, which are GPT-2's for a model of gpt.py's.

    Example: trf_blocks.0.attn.qkv.lora_A -> transformer.h.0.attn.c_attn.lora_A.weight"""
    modules, first = dict(model.named_modules()), "trf_blocks.0.attn.qkv"
    names = {name: name + ".weight" * (".lora_" in name) for name in [*modules, *dict(model.named_parameters())]}
    starts = [name.removesuffix(first) for name in modules if name.endswith(first)]
    if len(starts) != 1:  # none, or several whose names would be the same
        return names
    head, tokens = modules[starts[0] + "out_head"], modules[starts[0] + "tok_emb"].num_embeddings
    pairs = {rf"trf_blocks\.(\d+)\.\w+\.{ours}": rf"transformer.h.\1.{theirs}" for ours, theirs in GPT2_NAMES.items()}
    pairs["out_head"] = "lm_head" if getattr(head, "out_features", 0) == tokens else "score"
    for ours, theirs in pairs.items():
        names = {name: re.sub(rf"^{re.escape(starts[0])}{ours}\b", theirs, new) for name, new in names.items()}
    return names


def base_sha256(model, trained=()):
    """Return the sha256 over name, shape and bytes of each parameter but the adapters' and those named in `trained`."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in trained and ".lora_" not in name:
            tensor = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update((ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def file_functions():
    """Return (read, write, write_json): gpt.py's, or the package safetensors' where gpt.py is not beside this file."""
    with contextlib.suppress(ModuleNotFoundError):
        from gpt import read_safetensors, write_json, write_safetensors
        return read_safetensors, write_safetensors, write_json
    from safetensors import safe_open, torch as package
    return (lambda path: (package.load_file(path), safe_open(path, "pt").metadata() or {}),
            lambda path, tensors, metadata: package.save_file(tensors, path, metadata),
            lambda path, value: path.write_text(json.dumps(value, indent=1)))


def save_lora(model, folder, base_name=None):
    """Return the path of adapter_model.safetensors after writing it and adapter_config.json to `folder`.

    Other parameters that require gradients, as a new head, are saved too. `base_name`: the base in PEFT's config."""
    layers, names, folder = lora_layers(model), peft_names(model), Path(folder)
    saved = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()
             if parameter.requires_grad or ".lora_" in name}
    trained = [name for name in saved if ".lora_" not in name]
    heads = sorted({names[name.rpartition(".")[0]] for name in trained})
    ranks, first = {names[name]: layer.rank for name, layer in layers.items()}, next(iter(layers.values()))
    is_gpt2 = any(name.startswith("transformer.h.") for name in ranks)
    _, write, write_json = file_functions()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if "score" in heads else "CAUSAL_LM" if is_gpt2 else None,
        "base_model_name_or_path": base_name, "bias": "none", "inference_mode": True, "r": first.rank,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first.rank}, "lora_alpha": first.alpha,
        "lora_dropout": first.dropout, "use_rslora": first.rslora, "target_modules": list(ranks),
        "modules_to_save": heads or None, "fan_in_fan_out": is_gpt2})  # their matrices are transposed, not A and B
    write(folder / "adapter_model.safetensors", {PREFIX + names[name]: tensor for name, tensor in saved.items()},
          {"base_sha256": base_sha256(model, trained)})
    return folder / "adapter_model.safetensors"


def read_adapter(folder):
    """Return (config, {name in the file without PREFIX: tensor}, metadata), or ValueError if damaged or unsupported."""
    path, file = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    try:
        config = {"lora_dropout": 0.0, "use_rslora": False, **json.loads(path.read_bytes())}
        config["modules_to_save"] = list(config.get("modules_to_save") or [])
        require(config["peft_type"] == "LORA", f"peft_type {config['peft_type']!r} is not LORA")
        check_options(1, config["lora_alpha"], config["lora_dropout"], {})
        matches("", config["target_modules"])
    except (KeyError, TypeError, ValueError, RecursionError, re.error) as error:
        raise ValueError(f"{path}: {'no ' * isinstance(error, KeyError)}{error}") from None
    wrong = {name for name, value in config.items() if value and isinstance(value, (bool, list, dict))} - KNOWN_OPTIONS
    wrong -= set(KNOWN_VALUES)
    wrong |= {name for name, values in KNOWN_VALUES.items() if config.get(name) not in values}
    require(not wrong, f"{path}: {', '.join(sorted(wrong))} is set, which is not supported here; merge with PEFT")
    (tensors, metadata), content = file_functions()[0](file), file.read_bytes()
    found = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    require(metadata.get("data_sha256", found) == found, f"{file}: damaged, its sha256 is not the one in the header")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, metadata


def check_fit(model, folder, config, tensors):
    """Raise ValueError with the first tensor that is missing, unknown, of another shape or not finite."""
    names, shapes = peft_names(model), {}
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform")  # then the file says which layers
    for name, layer in linear_layers(model).items():
        A, B = (f"{names[name]}.lora_{letter}.weight" for letter in "AB")
        if A in tensors or not narrowed and matches(names[name], config["target_modules"]):
            found = tensors[A].shape[:1] if A in tensors else ()
            rank = max(1, min(*found, layer.in_features, layer.out_features))
            shapes |= {A: (rank, layer.in_features), B: (layer.out_features, rank)}
    for name, parameter in model.named_parameters():
        head = matches(names[name.rpartition(".")[0]], config["modules_to_save"])
        if ".lora_" not in name and (head or names[name] in tensors):
            shapes[names[name]] = tuple(parameter.shape)
    for name in sorted(shapes | tensors):
        there, here = tuple(tensors[name].shape) if name in tensors else "missing", shapes.get(name, "unknown")
        require(there == here, f"{folder}: {name} is {there} in the file and {here} in the model")
        require(bool(torch.isfinite(tensors[name]).all()), f"{folder}: {name} holds values that are not finite")


@torch.no_grad()
def load_lora(model, folder, any_base=False):
    """Return the model, changed in place: the adapter from a folder that `save_lora` or PEFT wrote, and only it trains.

    It replaces existing adapters and, if it has one, the head. Raises ValueError, the model untouched, where a tensor
    does not fit or the base is another one (`any_base` allows that, as for another precision)."""
    config, tensors, metadata = read_adapter(folder)
    check_fit(model, folder, config, tensors)
    names = peft_names(model)
    here = base_sha256(model, {name for name in names if names[name] in tensors})
    require(any_base or metadata.get("base_sha256", here) == here,
            f"{folder} was trained on another base; load the weights that it started from")
    if "base_sha256" not in metadata:
        print(f"note: {folder} does not say which base it belongs to, as PEFT's files never do", file=sys.stderr)
    new, options = {}, (config["lora_alpha"], config["lora_dropout"], config["use_rslora"])
    for name, layer in linear_layers(model).items():
        A = tensors.get(f"{names[name]}.lora_A.weight")
        if A is not None:
            new[layer] = LoRALinear(layer, len(A), *options)
        elif type(layer) is LoRALinear:
            new[layer] = layer.plain(layer.weight)
    vars(model).pop("lora_merged", None)
    model.requires_grad_(False)
    replace(model, new)
    names = peft_names(model)
    for name, parameter in model.named_parameters():
        if names[name] in tensors:
            parameter.copy_(tensors[names[name]]).requires_grad_(True)
    return model


# Commands -------------------------------------------------------------------------------------------------------------


def info_command(args):
    """Print what adapters cost on a model: trained numbers, file (4 bytes each), gradients and AdamW's moments (12)."""
    from gpt import empty_model, read_config
    model = empty_model(read_config(args.checkpoint), device="meta")
    layers, total = select_layers(model, args.lora_targets), sum(parameter.numel() for parameter in model.parameters())
    counts = {"all weights": total}
    for rank in args.lora_rank:
        check_options(rank, 1, 0, layers)
        counts[f"rank {rank}"] = sum(rank * (layer.in_features + layer.out_features) for layer in layers.values())
    print(f"{args.checkpoint}, adapters on {len(layers)} layers")
    print(f"{'':<12}{'trained':>16}{'share':>10}{'file MB':>10}{'AdamW MB':>10}")
    for name, n in counts.items():
        print(f"{name:<12}{n:>16,}{n / total:>10.2%}{4 * n / 1e6:>10.2f}{12 * n / 1e6:>10.1f}")


def merge_command(args):
    """Write a plain checkpoint: the base with the adapter's update added to its weights."""
    from gpt import load_checkpoint, read_checkpoint, read_safetensors, save_checkpoint
    if Path(args.out).resolve() == Path(args.checkpoint).resolve():
        raise argparse.ArgumentError(None, "--out would overwrite --checkpoint; give another --out")
    whole = Path(args.adapter).parent / "model.safetensors"  # the run's own knows its template and figures
    ours = read_checkpoint(whole)[3] if whole.is_file() and "config" in read_safetensors(whole)[1] else {}
    if ours.get("kind") == "classifier":
        raise ValueError(f"{args.adapter} belongs to a classifier, and {whole} is that classifier with it merged")
    model, tokenizer, info = load_checkpoint(args.checkpoint)
    merge_lora(load_lora(model, args.adapter))
    info = ours or {"kind": info["kind"], "init": args.checkpoint}
    save_checkpoint(args.out, model, tokenizer, **{**info, "adapter": args.adapter})
    print(f"{args.out}: {args.checkpoint} with {args.adapter} merged into it")


def export_command(args):
    """Write an adapter's folder with the name of its base, and print how Hugging Face's packages load it."""
    config, tensors, metadata = read_adapter(args.adapter)
    (_, write, write_json), out = file_functions(), Path(args.out)
    write_json(out / "adapter_config.json", {**config, "base_model_name_or_path": args.base_name})
    write(out / "adapter_model.safetensors", {PREFIX + name: tensor for name, tensor in tensors.items()}, metadata)
    head = tensors.get("score.weight")
    kind, labels = ("CausalLM", "") if head is None else ("SequenceClassification", f", num_labels={len(head)}")
    print(f"written to {out}; with Hugging Face's packages:\n"
          f"    base = transformers.AutoModelFor{kind}.from_pretrained({args.base_name!r}{labels})")
    if "score.bias" in tensors:
        print("    base.score = torch.nn.Linear(base.score.in_features, base.num_labels)  # theirs has no bias")
    print(f"    model = peft.PeftModel.from_pretrained(base, {str(out)!r})")


def main(argv=None):
    """Run the command line and return its exit status."""
    from gpt import run
    adapter = dict(default="out/sft/adapter", help="a folder that save_lora or PEFT wrote")
    return run(__doc__, {
        "info": (info_command, {
            "--checkpoint": dict(default="gpt2", help="a file, or the name of a size, whose weights are not needed"),
            "--lora_rank": dict(type=int, nargs="+", default=[4, 8, 32], help="a row for each rank"),
            "--lora_targets": dict(default="all-linear", help="layers with adapters, or ends of names as qkv,fc1")}),
        "merge": (merge_command, {
            "--checkpoint": dict(default="out/pretrain/model.safetensors", help="the base: a file, or gpt2, ..."),
            "--adapter": adapter, "--out": dict(default="out/merged.safetensors", help="where to write")}),
        "export": (export_command, {
            "--adapter": adapter, "--out": dict(default="out/peft", help="the folder to write"),
            "--base_name": dict(default="out/hf", help="the base for Hugging Face, name or folder")})}, argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
