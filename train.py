"""Pretraining: teach a GPT to predict the next token. The other training scripts import their machinery from here.

    python train.py                                        the built-in world, tiny model
    python train.py --data my.txt --tokenizer gpt2 --model gpt2 --batch_size 8    your own text, GPT-2's size
    python train.py --resume                               continue a run that was stopped; Ctrl-C saves first
    python train.py evaluate --checkpoint out/pretrain/model.safetensors --data my.txt
    python train.py evaluate --checkpoint gpt2 --task hellaswag    multiple choice by log-likelihood
    python train.py report                                 every stage in out/: a table here, a page in out/report.html
    torchrun --standalone --nproc_per_node=2 train.py      data parallel: one process per GPU, or several on a CPU

Writes into --out_dir: model.safetensors (the weights with the best validation loss, with config and tokenizer),
state.pt (what --resume needs), metrics.jsonl, curves.svg, samples.txt, summary.json. Losses are in nats per token; an
untrained model scores about ln(vocabulary). Bits per byte, loss x tokens / (ln 2 x bytes), compare tokenizers.
"""

import contextlib
import dataclasses
import hashlib
import html
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from argparse import ArgumentError, BooleanOptionalAction, HelpFormatter
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import gpt  # first, because it filters torch's warning about numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import (SlidingWindowDataset, beginnings, epoch_order, json_sha256, load_tokens, pad_left, prepare,
                  read_choices, seeded, texts, token_info, true_facts)
from gpt import GPT_CONFIGS, GPTModel, pick_device, replacing, require, write_json
from tokenizer import CharTokenizer, WordTokenizer, load_tokenizer
from torch.nn.utils import clip_grad_norm_

# Options: a dataclass lists them, a field is a flag -------------------------------------------------------------------


def option(default, help, choices=None, low=None, high=None):
    """Return a dataclass field for one flag: its default, its help, the values it may take (low <= value <= high)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Options:
    """The options that mean the same in every training script; a script's Config changes defaults and adds its own."""
    data: str = option("tinyworld", "a name that `data.py list` shows, a file, a folder, or a mixture a:0.3,b:0.7")
    init: str = option("scratch", "start from: scratch, gpt2 ... gpt2-xl, or a checkpoint file")
    out_dir: str = option("out/pretrain", "the folder to write to")
    epochs: int = option(0, "passes over the data, 0 = no limit; this or max_steps, whichever ends first", low=0)
    max_steps: int = option(0, "updates, 0 = no limit", low=0)
    batch_size: int = option(16, "sequences per update, over all processes", low=1)
    accumulate: int = option(1, "micro-batches per update: same result, less memory", low=1)
    context_length: int = option(0, "tokens per sequence, 0 = the model's", low=0)
    drop_rate: float = option(0.0, "dropout", low=0, high=0.99)
    learning_rate: float = option(1e-3, "peak, after warm-up", low=0)
    weight_decay: float = option(0.1, "of matrices; vectors are not decayed", low=0)
    warmup_steps: int = option(100, "steps from 0 up to the peak rate", low=0)
    schedule: str = option("cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    final_rate: float = option(0.1, "the last rate as a share of the peak", low=0, high=1)
    clip: float = option(1.0, "gradient clipping: maximum norm, 0 = off", low=0)
    optimizer: str = option("adamw", "muon: for the blocks' matrices, AdamW for the rest", choices=("adamw", "muon"))
    eval_every: int = option(200, "steps between evaluations, 0 = only at the end", low=0)
    save_every: int = option(200, "steps between saves of state.pt, 0 = only at the end and when stopped", low=0)
    log_every: int = option(20, "steps between log lines", low=1, high=100)
    patience: int = option(0, "stop after so many evaluations without a better one, 0 = never", low=0)
    seed: int = option(1234, "of all random numbers", low=0, high=2**31 - 1)
    device: str = option("auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "of matrix products; auto = bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile: a minute at the start, faster steps on a GPU")
    resume: bool = option(False, "continue the run in out_dir, or start it where there is none")
    fresh: bool = option(False, "move the run in out_dir aside and start anew")
    debug: bool = option(False, "show the traceback of an error")
    command: str = dataclasses.field(default="", repr=False, compare=False)  # the command line, for summary.json


TRAINING = " ".join(field.name for field in dataclasses.fields(Options) if field.metadata)  # flags of a training run


@dataclass
class AdapterOptions(Options):
    """The options of scripts that can train LoRA adapters instead of the weights."""
    lora_rank: int = option(0, "train adapters of this rank instead of the weights, 0 = off; 8 is usual", low=0)
    lora_alpha: float = option(32.0, "an adapter's update is multiplied by alpha / rank", low=1e-6)
    lora_dropout: float = option(0.1, "dropout on an adapter's input", low=0, high=0.99)
    lora_targets: str = option("all-linear", "layers with adapters: all-linear, or ends of names as qkv,fc1")


@dataclass
class Config(Options):
    """The options of pretraining."""
    tokenizer: str = option("out/tokenizer/tokenizer.json", "a tokenizer file, gpt2, or char or word to make one")
    model: str = option("tiny", "architecture", choices=tuple(GPT_CONFIGS))
    emb_dim: int = option(0, "channels, 0 = the architecture's", low=0)
    n_layers: int = option(0, "blocks, 0 = the architecture's", low=0)
    n_heads: int = option(0, "heads, 0 = the architecture's", low=0)
    max_steps: int = option(800, "updates, 0 = no limit", low=0)
    eval_every: int = option(400, "steps between evaluations, 0 = only at the end", low=0)
    warmup_steps: int = option(50, "steps from 0 up to the peak rate", low=0)
    learning_rate: float = option(1.2e-2, "peak; AdamW 1e-3; at GPT-2's sizes Muon 2e-3, AdamW 6e-4", low=0)
    optimizer: str = option("muon", "muon: for the blocks' matrices, AdamW for the rest", choices=("adamw", "muon"))
    prompt: str = option("", "what the sample at each evaluation continues")
    sample_tokens: int = option(60, "tokens of that sample, 0 = none", low=0)
    separator: str = option("", "what divides documents in a text file, as '<|endoftext|>'")
    checkpoint: str = option("out/pretrain/model.safetensors", "the model to evaluate")
    task: str = option("", "multiple-choice questions instead of --data: hellaswag, tinyworld, a .jsonl file")


class Command(NamedTuple):
    """A word of the command line: the function of a Config that it calls, and the flags that this function reads."""
    function: Callable
    flags: str  # names of Config's fields, separated by spaces
    parallel: bool = False  # whether torchrun may start it in several processes
    defaults: dict = {}  # this command's own


def parse_options(Config, word, command, script, argv, adjust):
    """Return the Config of a command line; raises ArgumentError for a number outside its limits."""
    prog, fields = f"python {script} {word}", Config.__dataclass_fields__
    parser = gpt.Parser(prog=prog, usage=f"{prog} [--flag value ...]", allow_abbrev=False,
                        description=(command.function.__doc__ or "").partition("\n")[0],
                        formatter_class=lambda prog: HelpFormatter(prog, 2, 26, 119))
    for name in command.flags.split():
        kind, meta = fields[name].type, fields[name].metadata
        default = command.defaults.get(name, fields[name].default)
        shown = meta["help"].replace("%", "%%") + " (default %(default)s)" * (default not in ("", ()))
        if kind is list:  # of words, without a flag
            parser.add_argument(name, nargs="*", help=shown)
            parser.usage += f" [{name} ...]"
        elif kind is bool:
            action = BooleanOptionalAction if default else "store_true"
            parser.add_argument(f"--{name}", action=action, help=shown)
        else:
            parser.add_argument(f"--{name}", type=kind, choices=meta["choices"], help=shown,
                                metavar=None if meta["choices"] else kind.__name__)
        parser.set_defaults(**{name: default})
    if adjust:  # before --help is answered, which shows the adjusted defaults
        given, _ = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])
        adjusted = adjust(word, Config(**vars(given)))
        parser.set_defaults(**{name: value for name, value in adjusted.items() if name in vars(given)})
    config = Config(**vars(parser.parse_args(argv)))
    for name, field in fields.items():
        value, low, high = getattr(config, name), field.metadata.get("low"), field.metadata.get("high")
        if low is not None and not low <= value <= (high or sys.float_info.max):  # so neither nan nor infinity
            limits = f"at least {low}" + (f" and at most {high}" if high else "")
            raise ArgumentError(None, f"--{name} {value} must be a finite number, {limits}")
    if config.resume and config.fresh:
        raise ArgumentError(None, "--resume continues a run and --fresh starts anew: choose one")
    if not config.out_dir:
        raise ArgumentError(None, "--out_dir is empty; give the run's folder")
    return config


def run_script(doc, Config, commands, argv=None, file=__file__, adjust=None):
    """Run `script.py [command] [flags]` and return the exit status; gpt.guarded says what it means.

    `commands` maps a word to a Command, the first being the default. `adjust(word, config) -> {name: default}` gives
    the defaults that depend on other flags."""
    argv, script = list(sys.argv[1:] if argv is None else argv), os.path.basename(file)

    def parse_and_call():
        if argv[:1] in (["-h"], ["--help"]):
            print(doc.strip(), f"\nCommands, each with --help of its own: {', '.join(commands)}", sep="\n")
            return
        word = argv.pop(0) if argv and not argv[0].startswith("-") else next(iter(commands))
        if word not in commands:
            raise ArgumentError(None, f"unknown command {word!r}; one of: {', '.join(commands)}")
        config = parse_options(Config, word, commands[word], script, argv, adjust)
        config.command = shlex.join(["python", script, word, *argv])
        launch(config, f"{script} {word}", commands[word].parallel)
        commands[word].function(config)
        barrier()

    if rank():  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    status = gpt.guarded(parse_and_call, debug="--debug" in argv)
    if rank() and status in (1, 2):
        time.sleep(10)  # torchrun ends every process once one has failed: let the first one tell the error
    return status


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each computes its share of every batch, the first one does all the writing.
# Without DistributedDataParallel: each loss is divided by the tokens of the whole batch, and gradients are summed.


def rank():
    """Return the number of this process among those that torchrun started, 0 for the first or only one."""
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def launch(config, command, parallel):
    """Join the processes that torchrun started, if it did; raises ArgumentError for a command that runs in one."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    if not parallel:
        raise ArgumentError(None, f"{command} runs in one process; start it without torchrun")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if ":" in config.device or config.device == "mps" or on_gpu and local > torch.cuda.device_count():
        raise ArgumentError(None, f"--device {config.device}: {local} processes; start one per GPU with --device cuda, "
                                  "or give --device cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")


def all_sum(value):
    """Return the sum of a number or tensor over all processes; raises ConnectionError where one was lost."""
    if not dist.is_initialized():
        return value
    tensor = value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError("another process of this run was lost; --resume continues from the last save") from error
    return tensor if torch.is_tensor(value) else type(value)(tensor.item())


def barrier():
    """Wait until all processes have come here."""
    all_sum(0)


def on_first_rank(function, *args):
    """Return function(*args), called in the first process before the others, which find the files it wrote."""
    if rank():
        barrier()
        return function(*args)
    result = function(*args)
    barrier()
    return result


def shard(items):
    """Return this process's share of a sequence: of range(5) the first of two gets 0, 2, 4 and the second 1, 3."""
    return items[rank() :: dist.get_world_size()] if dist.is_initialized() else items


def sum_gradients(model):
    """Sum each trainable parameter's gradient over all processes, 0 for a process that had no rows."""
    if not dist.is_initialized():
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = all_sum(torch.cat([grad.flatten() for grad in grads]))  # one message for all of them
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)


# Model, optimizers, schedule, loss ------------------------------------------------------------------------------------


def load_start(config, default_command, kinds=("gpt",)):
    """Return (model, tokenizer, info) for --init: a GPT-2 name or a checkpoint, cropped to --context_length."""
    if config.init not in GPT_CONFIGS and not Path(config.init).exists():
        raise FileNotFoundError(f"{config.init} does not exist; make it with: {default_command}")
    model, tokenizer, info = gpt.load_checkpoint(config.init)
    require(tokenizer is not None, f"{config.init} is a model without a tokenizer; give a model of: {default_command}")
    require(info["kind"] in kinds, f"{config.init} is a {info['kind']}; give a model of: {default_command}")
    most = model.config.context_length
    length = config.context_length or most
    require(length <= most, f"--context_length {length}: the model of --init has {most} positions")
    cropped = GPTModel(dataclasses.replace(model.config, context_length=length, drop_rate=config.drop_rate))
    if info["kind"] == "classifier":
        cropped.out_head = model.out_head
    cropped.load_state_dict({**model.state_dict(), "pos_emb.weight": model.pos_emb.weight[:length]})
    return cropped, tokenizer, info


def add_adapters(model, config):
    """Freeze the model and give it LoRA adapters as --lora_* say, in place; raises ArgumentError for a mistake."""
    from lora import apply_lora
    try:
        apply_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    except ValueError as error:
        raise ArgumentError(None, f"--lora_rank, --lora_targets: {error}") from None


def autocast(config, device):
    """Return the context of a forward pass: in bfloat16 if chosen; raises ArgumentError where the CPU has no units."""
    has_units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "float32" or config.dtype == "auto" and not has_units:
        return contextlib.nullcontext()
    if device.type == "cpu" and not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        raise ArgumentError(None, "--dtype bfloat16 is 8 times slower on this CPU; use --dtype float32")
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def orthogonalize(matrices, steps=5):
    """Return matrices (N, rows, columns) with all singular values pushed toward 1, their directions kept.

    Newton-Schulz steps with f(s) = a s + b s^3 + c s^5 on every singular value s, which end between about 0.7 and 1.2.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers", https://kellerjordan.github.io/posts/muon"""
    a, b, c = 3.4445, -4.7750, 2.0315  # chosen there for the steepest slope at 0
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # the iteration needs singular values of at most 1
    wide = x.shape[2] >= 2 * x.shape[1]
    factor = product = None  # of the step before, and of all so far
    for _ in range(steps):  # x becomes (a + b gram + c gram^2) x
        gram = x @ x.transpose(1, 2) if product is None else factor @ gram @ factor
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if wide:  # gather the factors, so that only small matrices are multiplied: half the time for 1 x 4
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
        else:
            x = torch.baddbmm(x, factor, x, beta=a)
    x = product @ x if wide else x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices of hidden layers (Jordan et al. 2024).

    Updates are scaled by 0.2 sqrt(max(rows, columns)), AdamW's size (Liu et al. 2025, "Muon is scalable", 2.2), so the
    same rate and weight decay serve both. A fused query/key/value matrix counts as three."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = {}  # equal shapes are orthogonalized together: one batched product instead of many small ones
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov: look one step ahead
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for part, part_update in zip(p.chunk(parts), update.chunk(parts)):
                    shapes.setdefault(part.shape, []).append((part, part_update))
            for shape, pairs in shapes.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                for (part, _), update in zip(pairs, updates):
                    part.mul_(1 - group["lr"] * group["weight_decay"])
                    part.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def make_optimizers(model, config):
    """Return [optimizer, ...]: AdamW, or Muon for the blocks' matrices and AdamW for the rest. Only matrices decay."""
    trained, optimizers = {name: p for name, p in model.named_parameters() if p.requires_grad}, []
    hidden = [name for name, p in trained.items() if "trf_blocks." in name and p.dim() == 2]
    if config.optimizer == "muon" and hidden:
        optimizers.append(Muon([trained.pop(name) for name in hidden], config.learning_rate, config.weight_decay))
    groups = [dict(params=[p for p in trained.values() if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in trained.values() if p.dim() < 2], weight_decay=0.0)]
    if groups := [group for group in groups if group["params"]]:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one pass over memory instead of several
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused))
    return optimizers


def total_steps(config, per_epoch):
    """Return the number of updates: --epochs or --max_steps, whichever ends first; raises ArgumentError for neither."""
    ends = [end for end in (config.epochs * per_epoch, config.max_steps) if end]
    if not ends:
        raise ArgumentError(None, "--epochs 0 and --max_steps 0 together never end; give one of them")
    return min(ends)


def rate_factor(step, total, warmup, schedule, final):
    """Return the rate of update `step` (from 0) as a share of the peak: linear warm-up, then down to `final`.

    Example: rate_factor(0, 100, 10, "linear", 0.1) == 0.1"""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if schedule == "constant":
        return 1.0
    return final + (1 - final) * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizers, step, total, config):
    """Set the rate of update `step` in all optimizers and return it."""
    rate = config.learning_rate * rate_factor(step, total, config.warmup_steps, config.schedule, config.final_rate)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
    return rate


def full_precision(x):
    """Return x in float32, or as it is where it is more precise: sums of bfloat16 numbers would be coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def next_token_loss(logits, targets):
    """Return the summed cross-entropy in nats: logits (B, T, V), targets (B, T) -> (); targets of -100 do not count."""
    logits = full_precision(logits)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=gpt.IGNORE, reduction="sum")


# A run's folder: refuse, lock, save, resume ---------------------------------------------------------------------------

STATE_FORMAT = 2  # the first edition's states have 1
RUN_FILES = ("state.pt", "model.safetensors", "summary.json", "metrics.jsonl")
FREE = {"resume", "fresh", "debug", "log_every", "save_every", "out_dir", "command", "checkpoint", "task"}  # may change


@dataclass
class Progress:
    """How far a run is. The position in the data is the step: the order depends on seed and epoch alone."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # by the clock and of the processor, in earlier parts of the run
    cpu_seconds: float = 0.0
    best: float = math.inf  # lowest validation figure so far
    bad_evaluations: int = 0  # since then
    extra: dict = dataclasses.field(default_factory=dict)  # plain values of the script's own
    clock: float = dataclasses.field(default_factory=time.monotonic)  # when this part began
    cpu_clock: float = dataclasses.field(default_factory=time.process_time)

    def elapsed(self):
        """Return {"seconds": by the clock, "cpu_seconds": of the processor} of the run, earlier parts included."""
        return {"seconds": self.seconds + time.monotonic() - self.clock,
                "cpu_seconds": self.cpu_seconds + time.process_time() - self.cpu_clock}


class Stop:
    """True once Ctrl-C or SIGTERM came, in any process. A second signal does its usual work."""
    def __init__(self):
        self.signal, self.previous = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread, which signals do not reach
                self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        """Note the signal; the loop looks at the end of the step."""
        self.signal = number
        signal.signal(number, self.previous[number])
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr)

    def __bool__(self):
        if all_sum(int(self.signal)):
            self.signal = self.signal or signal.SIGTERM  # which came to another process
        return self.signal > 0

    def release(self):
        """Put the earlier signal handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def deciding(config):
    """Return the options that decide a run's result, as JSON gives them back."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}))


def fingerprint(model, *data):
    """Return what a resumed run must find again, a dict: the sha256 of its data, and of the weights that are frozen."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(gpt.tensor_bytes(parameter.detach().cpu().contiguous()))
    return {"data": json_sha256(data), "frozen": digest.hexdigest()}


def read_summary(folder):
    """Return a finished stage's summary.json as a dict, {} where it is missing or was cut."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {}


def finished(config):
    """Return the summary of a finished run at --resume, else None; raises ArgumentError where a run is in the way.

    Only the options are compared, not the data."""
    folder = Path(config.out_dir)
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if config.fresh or not found:
        return None
    if not config.resume or "state.pt" not in found:
        what = ": --resume continues it," if "state.pt" in found else " without state.pt, which --resume needs:"
        raise ArgumentError(None, f"{folder} holds a run{what} --fresh moves it aside; or give another --out_dir")
    summary = read_summary(folder)
    if summary.get("config") != deciding(config):
        return None
    print(f"{folder} is finished: {summary['steps']} steps; nothing to do", file=sys.stderr)
    return summary


def lock(folder):
    """Return an open file that keeps other processes out of the folder until it is closed or this process ends."""
    file = open(folder / ".lock", "a", encoding="utf-8")
    with contextlib.suppress(ImportError):  # Windows has no file locks of this kind
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArgumentError(None, f"{folder} is in use by another process; choose another --out_dir") from None
    return file


def claim(folder, config):
    """Return the lock of a run's folder that can be written to: --fresh moved the old one aside."""
    if config.fresh and any((folder / name).exists() for name in RUN_FILES):
        if folder.resolve() in (Path.cwd(), *Path.cwd().parents, *Path(config.init).resolve().parents):
            raise ArgumentError(None, f"--fresh moves {folder} aside, but --init or this shell is inside; give another "
                                      "--out_dir")
        lock(folder).close()  # not from under a process that works there
        aside = next(name for n in range(1, 10**6) if not os.path.exists(name := f"{folder}.{n}"))
        os.rename(folder, aside)
        print(f"moved {folder} to {aside}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    finished(config)  # once more under the lock: another process may have worked here since
    for leftover in (*folder.glob(".*.tmp"), *folder.glob("adapter/.*.tmp")):
        if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name):  # of a process that was killed while writing
            leftover.unlink()
    return held


@contextlib.contextmanager
def open_run(config, model, optimizers, progress, total, mark, stage):
    """Yield (folder, Stop) with the folder locked and everything where a run that is resumed was; its log is cut there.

    `mark` is the run's `fingerprint`. A run that fails before its first evaluation leaves nothing behind."""
    folder = Path(config.out_dir)
    held = None if rank() else claim(folder, config)
    barrier()
    stop, is_new = Stop(), not (folder / "state.pt").exists()
    try:
        if not is_new:
            load_state(folder, model, optimizers, progress, config, mark)
        barrier()  # every process has looked for an old state before one writes a new one
        if is_new:  # saved before any other file, so that a run killed at any moment can be resumed
            save_state(folder, model, optimizers, progress, config, mark)
        if not rank():
            rows = read_log(folder) if progress.step else []
            with replacing(folder / "metrics.jsonl") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= progress.step).encode())
        if config.warmup_steps >= total:
            print(f"warning: --warmup_steps {config.warmup_steps} of {total}: the rate only rises", file=sys.stderr)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{stage}: {total} steps, {count:,} trainable parameters, "
              + (f"a new run in {folder}" if is_new else f"resumed at step {progress.step}"), file=sys.stderr)
        yield folder, stop
    except OSError as error:  # a full disk shows when an open file is written to, and then has no name
        if error.errno and not error.filename:
            error.filename = str(folder)
        raise
    finally:
        stop.release()
        if held:
            if is_new and progress.step == 0 and not (folder / "model.safetensors").exists():
                for name in ("state.pt", "metrics.jsonl", ".lock"):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # something else is in it
                    folder.rmdir()
            held.close()


def read_state(path):
    """Return the dict that `save_state` wrote; raises ValueError where the file is damaged or not ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
            if part := archive.testzip():
                raise ValueError(f"{part} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs nothing that the file holds
        if type(state) is not dict or state.get("format") != STATE_FORMAT:
            raise ValueError("not a state of this version")
        return state
    except (OSError, MemoryError, torch.OutOfMemoryError):  # says nothing about the file
        raise
    except Exception as error:  # a damaged or foreign archive fails in a dozen ways
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{path} is damaged or not ours ({reason}); --fresh starts anew") from None


def trainable(model):
    """Return {name: tensor} of what training changes: each trainable parameter once (a tied head is one)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(folder, model, optimizers, progress, config, mark):
    """Write state.pt, everything that `load_state` puts back; it is read back before it takes the old one's place."""
    if not rank():
        state = {"format": STATE_FORMAT, "step": progress.step, "options": deciding(config), "fingerprint": mark,
                 "model": trainable(model), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                 "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                 "progress": {**dataclasses.asdict(progress), **progress.elapsed()}}
        with replacing(folder / "state.pt") as file:
            try:
                torch.save(state, file)
                file.flush()
                read_state(file.name)
            except RuntimeError as error:  # over a full disk torch's writer says something else than the disk did
                raise error.__context__ if isinstance(error.__context__, OSError) else error
            except ValueError:
                raise OSError(f"{folder}/state.pt does not read back as written; the one before stays") from None
    barrier()


def load_state(folder, model, optimizers, progress, config, mark):
    """Put what `save_state` wrote back into model, optimizers, random numbers and progress.

    Raises ArgumentError for a run with other options, ValueError for one with other data or frozen weights, and where
    a weight or moment is missing, left over, misshapen or not finite; then nothing is changed."""
    state = read_state(folder / "state.pt")
    old, new = state["options"], deciding(config)
    changed = [f"{key}: saved {old.get(key)!r}, given {new.get(key)!r}"
               for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        raise ArgumentError(None, f"{folder} has other options; {'; '.join(changed)}; give the saved ones, or --fresh, "
                                  f"or train on from it: --init {folder}/model.safetensors")
    require(state["fingerprint"] == mark, f"{folder} was trained on other data, or from another model than --init "
            f"{config.init} is now; give the same, or --fresh")
    own, saved = trainable(model), state["optimizers"]
    require(len(optimizers) == len(saved), "state.pt does not fit the model at the optimizers; --fresh starts anew")
    pairs = [(name, own.get(name), state["model"].get(name)) for name in sorted({*own, *state["model"]})]
    for number, (optimizer, values) in enumerate(zip(optimizers, saved)):
        parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        keys = {key for moments in values["state"].values() for key in moments}  # whatever this optimizer keeps
        for index in sorted({*parameters, *values["state"]}):
            for key in keys:
                moment = values["state"].get(index, {}).get(key)
                is_count = moment is not None and moment.dim() == 0  # of steps
                like = moment if is_count else parameters.get(index)
                pairs.append((f"optimizer {number}, parameter {index}", like, moment))
    for name, like, tensor in pairs:
        fits = like is not None and tensor is not None and like.shape == tensor.shape
        require(fits, f"state.pt does not fit the model at {name}; --fresh starts anew")
        require(tensor.isfinite().all(), f"state.pt is of no use: {name} is not finite; --fresh starts anew")
    for name, tensor in state["model"].items():
        own[name].copy_(tensor)
    for optimizer, values in zip(optimizers, saved):
        optimizer.load_state_dict(values)
    torch.set_rng_state(state["rng"])
    for number, rng in zip(range(torch.cuda.device_count()), state["cuda_rng"]):  # as many GPUs as both have
        torch.cuda.set_rng_state(rng, number)
    vars(progress).update({**state["progress"], "clock": progress.clock, "cpu_clock": progress.cpu_clock})


def batches(n, config, progress, total, order=None):
    """Yield each update's list of indices, from progress.step to `total` or --patience; `order(epoch)` permutes n."""
    per_epoch, indices = math.ceil(n / config.batch_size), []
    while progress.step < total:
        if config.patience and progress.bad_evaluations >= config.patience:
            print(f"no better evaluation in {progress.bad_evaluations}: stopping early", file=sys.stderr)
            return
        epoch, place = divmod(progress.step, per_epoch)
        if place == 0 or not indices:
            indices = list(map(int, order(epoch) if order else epoch_order(n, config.seed, epoch)))
        if rank():  # dropout of its own, and the same after a resume
            torch.manual_seed(seeded("process", config.seed, progress.step, rank()).initial_seed())
        yield indices[place * config.batch_size : (place + 1) * config.batch_size]


def check_finite(loss, norm, progress, folder, indices):
    """Raise ValueError, before anything is updated, where the loss or the gradient norm is not finite."""
    if not math.isfinite(loss + norm):
        few = ", ".join(map(str, indices[:8]))
        raise ValueError(f"step {progress.step + 1}: loss {loss}, gradient norm {norm}; nothing was updated, {folder} "
                         f"keeps the last good state; lower --learning_rate, or look at this batch, examples {few}")


def due(step, every, total):
    """Return whether something done every so many steps is due; at the last step it always is."""
    return step == total or bool(every) and step % every == 0


def stop_now(folder, progress, total, stop):
    """End the script with the signal's exit status, after its state was saved."""
    print(f"\nstopped: {folder} is saved at step {progress.step} of {total}; the same command with --resume continues",
          file=sys.stderr)
    raise SystemExit(128 + stop.signal)


# Log, curves, summary, intervals, a baseline --------------------------------------------------------------------------


def log(folder, step, **figures):
    """Append one JSON line with the step to metrics.jsonl."""
    if not rank():
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def read_log(folder):
    """Return the rows of metrics.jsonl as dicts; a line that a full disk or a power cut left unfinished is skipped."""
    rows, path = [], folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
    return rows


def report_step(folder, progress, total, config, loss, norm, rate, tokens, clock):
    """Log and print every --log_every steps; warn of a loss twice as high as any of the last 100 (`clock` = start)."""
    recent = progress.extra.setdefault("recent", [])  # [loss, tokens, seconds] of the last steps
    highest = max((row[0] for row in recent), default=math.inf)
    if len(recent) >= 20 and loss > max(1.0, 2 * highest):
        print(f"warning: step {progress.step}: loss {loss:.4g}, the highest of the {len(recent)} steps before was "
              f"{highest:.4g}; look at this batch, or lower --learning_rate or --clip", file=sys.stderr)
    recent.append([loss, tokens, time.monotonic() - clock])
    del recent[:-100]
    if due(progress.step, config.log_every, total):
        losses, counts, spans = zip(*recent[-(progress.step % config.log_every or config.log_every) :])
        mean, speed = sum(losses) / len(losses), sum(counts) / max(sum(spans), 1e-9)
        left = int(sum(spans) / len(spans) * (total - progress.step))
        log(folder, progress.step, loss=mean, rate=rate, norm=norm, tokens_per_second=round(speed))
        print(f"step {progress.step}/{total}  loss {mean:.4f}  rate {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tok/s  "
              f"{left // 60}:{left % 60:02d} left", file=sys.stderr)


def is_best(progress, value):
    """Return whether `value`, lower is better, is the best so far; raises ValueError where it is not finite."""
    require(math.isfinite(value), f"step {progress.step}: the validation figure is {value}; lower --learning_rate")
    better, progress.best = value < progress.best, min(value, progress.best)
    progress.bad_evaluations = 0 if better else progress.bad_evaluations + 1
    return better


def save_best(folder, model, tokenizer, **info):
    """Write model.safetensors; with adapters also adapter/, and the file holds the weights with them merged."""
    with contextlib.ExitStack() as afterwards:
        if any(name.endswith("lora_A") for name, _ in model.named_parameters()):
            from lora import merge_lora, save_lora, unmerge_lora
            save_lora(model, folder / "adapter")
            merge_lora(model)
            afterwards.callback(unmerge_lora, model)
        gpt.save_checkpoint(folder / "model.safetensors", model, tokenizer, **info)


def draw_curves(path, title, rows, keys, y_label="loss, nats per token"):
    """Draw figures of a log, {name in the legend: key}, over the steps into an SVG that reads in light and dark."""
    series = {name: [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
              for name, key in keys.items()}
    points = [point for line in series.values() for point in line] or [(0, 0)]
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points))
    x_scale, y_scale = 560 / (x_high - x_low or 1), 260 / (y_high - y_low or 1)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {350 + 22 * len(series)}" role="img">'
           "<style>text{font:12px system-ui,sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}"
           f'</style><text x="76" y="18" font-weight="bold">{title}</text><text x="346" y="338">step</text>'
           f'<text transform="translate(14,170) rotate(-90)" text-anchor="middle">{y_label}</text>']
    for part in range(5):  # a grid of four by four
        y, at = y_low + part / 4 * (y_high - y_low), 300 - 65 * part
        out.append(f'<line stroke="#8884" x1="76" x2="636" y1="{at}" y2="{at}"/>'
                   f'<text x="68" y="{at + 4}" text-anchor="end">{y:.4g}</text>'
                   f'<text x="{76 + 140 * part}" y="318">{x_low + part / 4 * (x_high - x_low):,.0f}</text>')
    colors = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
    for number, (name, line) in enumerate((name, line) for name, line in series.items() if line):
        drawn = " ".join(f"{76 + (x - x_low) * x_scale:.1f},{300 - (y - y_low) * y_scale:.1f}" for x, y in line)
        color, y = colors[number % len(colors)], 355 + 22 * number
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{drawn}"/>'
                   f'<text x="76" y="{y}" style="fill:{color}">{name} {line[-1][1]:.4g}</text>')
    with replacing(path) as file:
        file.write("\n".join([*out, "</svg>"]).encode())


def write_summary(folder, config, stage, progress, model, mark, **figures):
    """Return the summary of a finished run, a dict, after writing it as summary.json; `figures` are the stage's own."""
    parameters = list(model.parameters())
    summary = {"stage": stage, **{name: round(value, 1) for name, value in progress.elapsed().items()},
               "steps": progress.step, "command": config.command, "seed": config.seed, "processes": all_sum(1),
               "versions": {"python": platform.python_version(), "torch": torch.__version__,
                            "platform": platform.platform(), "threads": torch.get_num_threads()},
               "data": {"source": config.data, "sha256": mark["data"]}, "config": deciding(config),
               "parameters": sum(p.numel() for p in parameters),
               "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad), **figures}
    if not rank():
        write_json(folder / "summary.json", summary)
    return summary


Z = 1.959964  # 95% of a normal distribution lies within this many standard deviations


def wilson(hits, n, z=Z):
    """Return the 95% interval (low, high) of a share of `hits` in `n` (Wilson 1927): sound even at 0 and at n."""
    if not n:
        return 0.0, 1.0
    center, spread = hits / n + z * z / (2 * n), z * math.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    return max(0.0, (center - spread) / (1 + z * z / n)), min(1.0, (center + spread) / (1 + z * z / n))


def naive_bayes(rows):
    """Return a function text -> {label: log-probability up to a constant}, fitted to (label, text) rows: a baseline.

    Multinomial naive Bayes on lower-cased words, add-one smoothing; unknown words do not count. Source: Manning,
    Raghavan and Schuetze 2008, Introduction to Information Retrieval, figure 13.2."""
    classes, words = Counter(label for label, _ in rows), re.compile(r"\w+").findall
    counts = {label: Counter() for label in sorted(classes)}
    for label, text in rows:
        counts[label].update(words(text.lower()))
    vocabulary = set().union(*counts.values())

    def scores(text):
        known, found = [word for word in words(text.lower()) if word in vocabulary], {}
        for label, seen in counts.items():
            size, prior = seen.total() + len(vocabulary), math.log(classes[label] / len(rows))
            found[label] = prior + sum(math.log((seen[word] + 1) / size) for word in known)
        return found

    return scores


# Pretraining ----------------------------------------------------------------------------------------------------------


def start_model(config):
    """Return (model, tokenizer): fresh weights and --tokenizer's, or those of --init, which brings its own."""
    torch.manual_seed(config.seed)
    if config.init != "scratch":
        for name in ("model", "emb_dim", "n_layers", "n_heads", "tokenizer"):
            if (value := getattr(config, name)) != getattr(Config, name):
                raise ArgumentError(None, f"--{name} {value} does not go with --init {config.init}; leave one out")
        return load_start(config, "python train.py")[:2]
    if config.tokenizer in ("char", "word"):
        kind = CharTokenizer if config.tokenizer == "char" else WordTokenizer
        tokenizer = kind.train(texts(config.data, config.separator))
    elif config.tokenizer == "gpt2" or Path(config.tokenizer).exists():
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        flags = shlex.join(["--data", config.data, "--out_dir", str(Path(config.tokenizer).parent)])
        raise FileNotFoundError(f"--tokenizer {config.tokenizer} does not exist; make it with: python tokenizer.py "
                                f"train {flags}")
    sizes = {"vocab_size": tokenizer.vocab_size, "drop_rate": config.drop_rate}
    for name in ("context_length", "emb_dim", "n_layers", "n_heads"):
        sizes[name] = getattr(config, name) or getattr(GPT_CONFIGS[config.model], name)
    try:
        return GPTModel(dataclasses.replace(GPT_CONFIGS[config.model], **sizes)), tokenizer
    except ValueError as error:
        raise ArgumentError(None, f"--{error}") from None


@torch.no_grad()
def evaluate_loss(model, windows, context=contextlib.nullcontext(), batch_size=32):
    """Return (mean loss in nats per token, number of tokens) over every window once, shared among the processes."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for indices in shard(torch.arange(len(windows))).split(batch_size):
        ids, targets = (t.to(model.device) for t in windows.batch(indices))
        with context:
            logits = model(ids)
        total += next_token_loss(logits, targets).item()
        count += (targets != gpt.IGNORE).sum().item()
    model.train(was_training)
    total, count = all_sum(total), all_sum(count)
    return total / count, count


def bits_per_byte(loss, info):
    """Return a loss in nats per token as bits per byte of the text whose counts `info` holds."""
    return loss / math.log(2) * info["tokens"] / info["bytes"]


def evaluate_and_save(folder, model, tokenizer, windows, progress, total, config, mark, context):
    """Evaluate on the whole validation split, keep the weights if they are the best so far, log, sample and draw."""
    loss, _ = evaluate_loss(model, windows, context)
    better, text = is_best(progress, loss), ""
    if not rank():
        if better:
            info = {"stage": "pretrain", "step": progress.step, "val_loss": loss, "data_sha256": mark["data"]}
            save_best(folder, model, tokenizer, **info)
        if config.sample_tokens:  # after --prompt, from the same random numbers at every evaluation
            prompt = tokenizer.encode(config.prompt) or [tokenizer.eot_id or 0]
            ids, generator = torch.tensor([prompt], device=model.device), torch.Generator(model.device)
            new = gpt.generate(model, ids, config.sample_tokens, 0.8, eos_id=tokenizer.eot_id,
                               generator=generator.manual_seed(config.seed))
            text = tokenizer.decode([i for i in new[0].tolist() if i != tokenizer.eot_id])
        print(f"step {progress.step}/{total}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 50)):.2f}"
              + "  best" * better + f"\n  sample: {' '.join(text.split())}" * bool(text), file=sys.stderr)
        log(folder, progress.step, val_loss=loss, sample=text)
        rows = read_log(folder)
        samples = [f"--- step {row['step']}\n{row['sample']}\n" for row in rows if row.get("sample")]
        with replacing(folder / "samples.txt") as file:
            file.write("".join(samples).encode())
        draw_curves(folder / "curves.svg", "Pretraining", rows, {"train": "loss", "validation": "val_loss"})
    barrier()


def train(config):
    """Pretrain a model and return the summary, a dict that summary.json holds too."""
    if summary := finished(config):
        return summary
    device = pick_device(config.device)
    context = autocast(config, device)
    model, tokenizer = on_first_rank(start_model, config)
    model.to(device).train()
    tokens_folder = on_first_rank(prepare, config.data, tokenizer, config.separator)
    length = model.config.context_length
    windows, val_windows = (SlidingWindowDataset(load_tokens(tokens_folder / f"{part}.bin"), length, length)
                            for part in ("train", "val"))
    total = total_steps(config, math.ceil(len(windows) / config.batch_size))
    optimizers, progress = make_optimizers(model, config), Progress()
    mark = fingerprint(model, token_info(tokens_folder / "train.bin")["sha256"])
    forward = torch.compile(model) if config.compile else model
    with open_run(config, model, optimizers, progress, total, mark, "pretrain") as (folder, stop):
        if progress.step == 0:
            evaluate_and_save(folder, model, tokenizer, val_windows, progress, total, config, mark, context)
        for indices in batches(len(windows), config, progress, total):  # 1. each epoch  2. each batch
            clock = time.monotonic()
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            ids, targets = (t.to(device) for t in windows.batch(shard(indices)))
            tokens, batch_loss = all_sum((targets != gpt.IGNORE).sum().item()), 0.0
            for some_ids, some_targets in zip(ids.chunk(config.accumulate), targets.chunk(config.accumulate)):
                with context:
                    logits = forward(some_ids)
                loss = next_token_loss(logits, some_targets) / tokens  # 4. loss
                loss.backward()  # 5. backward
                batch_loss += loss.item()
            sum_gradients(model)
            batch_loss = all_sum(batch_loss)
            norm = clip_grad_norm_(model.parameters(), config.clip or math.inf).item()  # 6. clip, set the rate, update
            check_finite(batch_loss, norm, progress, folder, indices)
            rate = set_learning_rate(optimizers, progress.step, total, config)
            for optimizer in optimizers:
                optimizer.step()
            progress.step += 1
            progress.tokens += tokens
            report_step(folder, progress, total, config, batch_loss, norm, rate, tokens, clock)  # 7. report
            if due(progress.step, config.eval_every, total):  # 8. evaluate, sample, save
                evaluate_and_save(folder, model, tokenizer, val_windows, progress, total, config, mark, context)
            stopping = bool(stop)  # one look per step, the same in every process
            if stopping or due(progress.step, config.save_every, total):
                save_state(folder, model, optimizers, progress, config, mark)
            if stopping:
                stop_now(folder, progress, total, stop)
        losses = [loss for loss, _, _ in progress.extra["recent"]]
        bits = bits_per_byte(progress.best, token_info(tokens_folder / "val.bin"))
        known = {}
        if config.data == "tinyworld" and not rank():  # the best weights, as `evaluate` reads them
            known = known_facts(gpt.load_checkpoint(folder / "model.safetensors", device)[0], tokenizer)
        summary = write_summary(folder, config, "pretrain", progress, model, mark, tokens=progress.tokens, **known,
                                train_loss=sum(losses) / len(losses), val_loss=progress.best, bits_per_byte=bits)
    print(f"pretrained: validation loss {progress.best:.4f}, perplexity {math.exp(progress.best):.2f}, {bits:.3f} bits "
          f"per byte, {summary['seconds']:.0f} s; {folder}/model.safetensors")
    return summary


@torch.no_grad()
def choice_logprobs(model, tokenizer, prompt, choices):
    """Return the log-probability in nats of each of the choices after a prompt, which loses its start if too long."""
    context, ids = model.config.context_length, tokenizer.encode(prompt) or [tokenizer.eot_id or 0]
    space = "" if not prompt or prompt[-1].isspace() else " "
    ends = [tokenizer.encode(choice if choice[0].isspace() else space + choice) for choice in choices]
    longest = max(map(len, ends))
    require(longest < context, f"a choice of {longest} tokens does not fit into the context: {choices}"[:200])
    rows = [torch.tensor((ids + end)[-context:], device=model.device) for end in ends]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where no earlier position looks
    logprobs = gpt.token_logprobs(model(padded), padded)  # entry t is that of token t + 1
    return [line[len(row) - 1 - len(end) : len(row) - 1].sum().item() for line, row, end in zip(logprobs, rows, ends)]


def evaluate_task(model, tokenizer, questions, context=contextlib.nullcontext()):
    """Print and return a dict: accuracy by log-probability, by log-probability per byte, and by chance.

    Per byte, because a longer choice has more tokens to be unlikely in: "acc" and "acc_norm" of EleutherAI's harness,
    which gives 28.9% and 31.1% for GPT-2 124M on HellaSwag."""
    hits, n = Counter(), len(questions)
    for question in questions:
        choices, answer = question["choices"], question["answer"]
        with context:
            scores = choice_logprobs(model, tokenizer, question["prompt"], choices)
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices)]
        hits["accuracy"] += scores.index(max(scores)) == answer
        hits["accuracy_per_byte"] += per_byte.index(max(per_byte)) == answer
    found = {"questions": n, "chance": sum(1 / len(question["choices"]) for question in questions) / n}
    for name, count in hits.items():
        low, high = found[name + "_interval"] = wilson(count, n)
        found[name] = count / n
        print(f"{name:<18}{found[name]:.1%}  (95%: {low:.1%} to {high:.1%})")
    print(f"{'chance':<18}{found['chance']:.1%}  of {n:,} questions")
    return found


def ends_right(model, tokenizer, sentences):
    """Return for each (beginning, end) whether greedy decoding goes on from the beginning with exactly that end."""
    prompts, right = [tokenizer.encode(beginning) for beginning, _ in sentences], []
    length = max(len(tokenizer.encode(" " + end)) for _, end in sentences)
    for first in range(0, len(sentences), 128):
        ids, mask = (t.to(model.device) for t in pad_left(prompts[first : first + 128], tokenizer.pad_id or 0))
        new = gpt.generate(model, ids, length, 0.0, mask=mask)[:, ids.shape[1] :].tolist()
        for prompt, row, (beginning, end) in zip(prompts[first:], new, sentences[first:]):
            right.append(tokenizer.decode(prompt + row).startswith(f"{beginning} {end}"))
    return right


def known_facts(model, tokenizer, seed=0):
    """Print and return what a model knows of tinyworld, a dict of shares: facts and opposites that it ends right, in
    phrasings that the corpus tells and in others, and how much is true of the facts in 64 texts that it writes."""
    found = {}
    for name in ("told", "withheld"):
        sentences = beginnings(name == "told")
        right = ends_right(model, tokenizer, [sentence[1:] for sentence in sentences])
        opposites = [hit for hit, (kind, *_) in zip(right, sentences) if kind == "opposite"]
        found.update({f"facts_{name}": sum(right) / len(right), f"opposites_{name}": sum(opposites) / len(opposites)})
    start = torch.full((64, 1), tokenizer.eot_id or 0, device=model.device)
    drawn = gpt.generate(model, start, 120, generator=torch.Generator(model.device).manual_seed(seed))
    true, of = true_facts("\n".join(tokenizer.decode(row[1:]) for row in drawn.tolist()))
    found.update(true_sentences=true / max(1, of), fact_sentences=of)
    print("ends {facts_told:.1%} of the facts right in phrasings that the corpus tells (opposites "
          "{opposites_told:.1%}), {facts_withheld:.1%} in others ({opposites_withheld:.1%});\n"
          "true are {true_sentences:.1%} of the {fact_sentences} facts in its own texts".format(**found))
    return found


def evaluate(config):
    """Print and return a checkpoint's loss, perplexity and bits per byte on the validation split, or its task score."""
    device = pick_device(config.device)
    questions = read_choices(config.task) if config.task else []  # before the model, which takes longer to read
    model, tokenizer, _ = gpt.load_language_model(config.checkpoint, device)
    if config.task:
        return evaluate_task(model, tokenizer, questions, autocast(config, device))
    folder = prepare(config.data, tokenizer, config.separator)
    length = config.context_length or model.config.context_length
    windows = SlidingWindowDataset(load_tokens(folder / "val.bin"), length, length)
    loss, tokens = evaluate_loss(model, windows, autocast(config, device))
    perplexity, bits = math.exp(min(loss, 700)), bits_per_byte(loss, token_info(folder / "val.bin"))
    print(f"loss {loss:,.4f}  perplexity {perplexity:,.4f}  tokens {tokens:,}  bits per byte {bits:,.4f}")
    known = known_facts(model, tokenizer) if config.data == "tinyworld" else {}
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens, "bits_per_byte": bits, **known}


# The report: what the stages wrote, as a table and a page -------------------------------------------------------------

QUESTIONS = ("Hello! Who are you?", "Where does the fox live?", "Which number is larger, 27 or 36?",
             "What is the capital of France?", "Rewrite this sentence in the passive voice.\n The cook ate the pies.")
REPORT = (  # stages, what, key in summary.json, format, what stands beside it, its key
    ("pretrain", "validation loss", "val_loss", ".3f", "", ""),
    ("pretrain", "bits per byte", "bits_per_byte", ".3f", "", ""),
    ("pretrain", "facts in new phrasings", "facts_withheld", ".1%", "told", "facts_told"),
    ("cls lora", "accuracy", "test_accuracy", ".1%", "naive Bayes", "naive_bayes_accuracy"),
    ("sft", "exact match", "exact_match", ".1%", "before", "exact_match_before"),
    ("reward", "pairs ranked right", "accuracy", ".1%", "naive Bayes", "naive_bayes_accuracy"),
    ("ppo dpo grpo", "gold score", "gold_after", ".2f", "before", "gold_before"),
    ("ppo dpo grpo", "exact match", "exact_match_after", ".1%", "before", "exact_match_before"),
    ("ppo dpo grpo", "KL to its start, nats", "kl", ".2f", "", ""))


def report(config):
    """Print what every finished stage in --out_dir reached; write report.html with its curves and some answers."""
    from finetune_sft import respond
    root, rows = Path(config.out_dir), [("stage", "held out", "value", "95% interval", "beside it", "seconds")]
    for stages, what, key, form, other, other_key in REPORT:
        for stage in stages.split():
            figures = read_summary(root / stage)
            if figures.get(key) is not None:
                interval = " to ".join(format(bound, form) for bound in figures.get(key + "_interval", ()))
                beside = f"{other} {figures[other_key]:{form}}" if figures.get(other_key) is not None else ""
                rows.append((stage, what, format(figures[key], form), interval, beside, f"{figures['seconds']:.0f}"))
    if len(rows) == 1:
        raise FileNotFoundError(f"{root} holds no folder of a finished stage; make them all with: make")
    columns = [["question", *QUESTIONS]]
    for path in (root / stage / "model.safetensors" for stage in ("pretrain", "sft", "ppo")):
        if path.is_file():
            model, tokenizer, info = gpt.load_checkpoint(path)
            if tokenizer is None or tokenizer.eot_id is None:
                continue  # it cannot end an answer
            template = info.get("template", "plain")
            columns.append([path.parent.name, *respond(model, tokenizer, QUESTIONS, template, max_new_tokens=24)])
    answers = [[" ".join(cell.split()) for cell in row] for row in zip(*columns)] if len(columns) > 1 else []

    for row in rows:
        print("{:<10}{:<23}{:>8}  {:<18}{:<20}{:>7}".format(*row))
    for question, *said in answers[1:]:
        print("", question, *(f"  {stage:<10}{text}" for stage, text in zip(answers[0][1:], said)), sep="\n")
    page = ['<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>A language model, stage by stage</title>'
            "<style>body{font:16px/1.5 system-ui;max-width:62rem;margin:auto;padding:1rem;color-scheme:light dark}"
            "td{padding:.3rem 1rem .3rem 0;vertical-align:top}svg{max-width:30rem}</style>"]
    for title, table in (("What each stage reached", rows), ("The same questions, stage by stage", answers)):
        page.append(f"<h2>{title}</h2><table>")
        for row in table:
            page.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
        page.append("</table>")
    page += ["<h2>Curves</h2>", *(path.read_text(encoding="utf-8") for path in sorted(root.glob("*/*.svg")))]
    with replacing(root / "report.html") as file:
        file.write("\n".join(page).encode("utf-8", "replace"))
    print(f"\n{root / 'report.html'} has the curves. Now talk to it: make chat, or in the browser: make serve")


def main(argv=None):
    """Run the command line and return its exit status."""
    own = " separator tokenizer model emb_dim n_layers n_heads prompt sample_tokens"
    return run_script(__doc__, Config, {
        "train": Command(train, TRAINING + own, parallel=True),
        "evaluate": Command(evaluate, "checkpoint data separator task context_length device dtype debug"),
        "report": Command(report, "out_dir debug", defaults={"out_dir": "out"})}, argv, adjust=default_rate)


def is_large(init):
    """Return whether --init names a model of GPT-2's size, by its name or its file's: it needs lower rates."""
    return init in GPT_CONFIGS or os.path.isfile(init) and os.path.getsize(init) > 200_000_000


def default_rate(word, config):
    """Return {"learning_rate": peak}: Muon's best of three on Shakespeare, AdamW's of nanoGPT, by the model's size."""
    width = config.emb_dim or GPT_CONFIGS[config.model].emb_dim
    large = is_large(config.init) or config.init == "scratch" and width >= 768
    rates = {"muon": (1.2e-2, 2e-3), "adamw": (1e-3, 6e-4)}
    return {"learning_rate": rates[config.optimizer][large]} if config.optimizer in rates else {}


if __name__ == "__main__":
    sys.exit(main())
