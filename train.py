"""Pretraining, and with it the machinery of every training script: options, device, optimizer, schedule, log, curves,
exact resume.

    python train.py                                        the built-in world, tiny model: about 2 minutes on 2 cores
    python train.py --data my.txt --tokenizer gpt2 --model gpt2 --batch_size 8    your own text, GPT-2's size
    python train.py --data shakespeare --tokenizer char --optimizer muon          tiny Shakespeare, letter by letter
    python train.py --resume                               go on where a run was stopped (Ctrl-C saves first), or, with
                                                           --schedule constant, a finished one with more --max_steps
    python train.py evaluate --checkpoint out/pretrain/model.safetensors --data my.txt
    python train.py report                                 out/report.html: every stage in out/ on one page, 5 seconds
    torchrun --standalone --nproc_per_node=2 train.py      two processes share the work: one for each GPU, or on CPUs
    torchrun --standalone --nproc_per_node=8 train.py --model gpt2-xl --tokenizer gpt2 --optimizer adamw --fsdp
                                                           a model too large for one GPU: each holds an eighth of it

Reads text (see data.py) and a tokenizer. Writes into --out_dir: model.safetensors (the weights with the best
validation loss, with config and tokenizer: all that generation needs), state.pt (what --resume needs),
metrics.jsonl, curves.svg, samples.txt and summary.json.

The log line shows: step, loss (nats a token, mean since the last line), rate (learning rate), norm (of the gradient,
before clipping), tok/s, and the time left. An untrained model scores about ln(vocabulary) nats a token. The validation
loss is over the whole validation split, every window once. Perplexity is exp(loss); bits per byte are
loss x tokens / (ln 2 x bytes), which can be compared between tokenizers.

Under torchrun each process computes its rows of every batch, so --batch_size stays the sequences of an update and the
result is that of one process, to rounding and what dropout draws; a run may go on with another number of them. All
must see the same disk.

A finetuning script imports this file for the machinery and keeps a loop of its own, with the same eight numbered steps.

Differs from nanoGPT: every window once an epoch instead of random crops, the whole validation split instead of random
batches of it, a resumed run that ends with the same bits, and --optimizer muon (Jordan et al. 2024).
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import typing
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gpt  # first, because it quiets torch's warning about numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import SlidingWindowDataset, epoch_order, format_prompt, load_tokens, prepare, seeded, texts, token_info
from gpt import GPT_CONFIGS, GPTModel, Parser, explain, pick_device, replacing
from tokenizer import CharTokenizer, WordTokenizer, from_dict, load_tokenizer, show

try:
    import fcntl  # locks; Windows has none of this kind
except ImportError:
    fcntl = None
try:
    import resource
except ImportError:
    resource = None

# ---------------------------------------------------------------------------------------------------------------------
# Options: one typed dataclass is the single list


def option(default, help, choices=None, low=None, high=None):
    """Return a dataclass field for one flag, with its help text and the values it may take (low <= value <= high)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Options:
    """The options that mean the same in every training script; its `Config` changes defaults and adds its own."""

    data: str = option("tinyworld", "a name that `data.py list` shows, a file, a folder, or a mixture a:0.3,b:0.7")
    init: str = option("scratch", "start from: scratch, gpt2 ... gpt2-xl, or a checkpoint file")
    out_dir: str = option("out/pretrain", "the run's folder")
    epochs: int = option(0, "times through the data, 0 = no limit; this or max_steps, whichever ends first", low=0)
    max_steps: int = option(0, "updates, 0 = no limit", low=0)
    batch_size: int = option(16, "sequences an update", low=1)
    accumulate: int = option(1, "pieces that a batch is computed in: saves memory, changes only what dropout draws",
                             low=1)
    context_length: int = option(0, "tokens a sequence, 0 = the model's", low=0)
    drop_rate: float = option(-1.0, "dropout, -1 = the model's", low=-1, high=0.99)
    learning_rate: float = option(1e-3, "peak, after warm-up", low=0)
    weight_decay: float = option(0.1, "of matrices; vectors are not decayed", low=0)
    warmup_steps: int = option(100, "steps from 0 up to the peak rate", low=0)
    schedule: str = option("cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    final_rate: float = option(0.1, "the last rate as a share of the peak", low=0, high=1)
    clip: float = option(1.0, "largest norm of the gradient, 0 = no clipping", low=0)
    optimizer: str = option("adamw", "muon takes AdamW for all but the blocks' matrices", choices=("adamw", "muon"))
    momentum: float = option(0.9, "muon: how much of its direction the last steps decide", low=0, high=0.999)
    eval_every: int = option(200, "steps between evaluations, 0 = only at the end", low=0)
    save_every: int = option(200, "steps between saves of state.pt, 0 = only at the end and when stopped", low=0)
    log_every: int = option(20, "steps between log lines", low=1)
    patience: int = option(0, "stop after so many evaluations without a better one, 0 = never", low=0)
    seed: int = option(1234, "of weights, data order and dropout", low=0, high=2**31 - 1)
    device: str = option("auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "of matrix products in training; auto = bfloat16 on a GPU that has it",
                        choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile: a minute at the start, faster steps on a GPU")
    resume: bool = option(False, "continue the run in out_dir, or start it where there is none")
    fresh: bool = option(False, "move the run in out_dir aside and start anew")
    debug: bool = option(False, "show the traceback of an error")


@dataclass
class Config(Options):
    """The options of pretraining."""

    tokenizer: str = option("out/tokenizer/tokenizer.json", "a tokenizer file, gpt2, or char or word to make one")
    model: str = option("tiny", "architecture", choices=tuple(GPT_CONFIGS))
    emb_dim: int = option(0, "channels, 0 = the architecture's", low=0)
    n_layers: int = option(0, "blocks, 0 = the architecture's", low=0)
    n_heads: int = option(0, "heads, 0 = the architecture's", low=0)
    max_steps: int = option(500, "updates, 0 = no limit", low=0)
    batch_size: int = option(8, "sequences an update", low=1)
    warmup_steps: int = option(50, "steps from 0 up to the peak rate", low=0)
    learning_rate: float = option(-1.0, "peak, after warm-up; -1 = by optimizer and model size", low=-1)
    optimizer: str = option("muon", "muon takes AdamW for all but the blocks' matrices", choices=("adamw", "muon"))
    fsdp: bool = option(False, "under torchrun, with AdamW: each process holds only its share of the model")
    sample_prompt: str = option("", "what the sample at each evaluation continues")
    sample_tokens: int = option(60, "tokens of that sample, 0 = none", low=0)
    checkpoint: str = option("", "evaluate: the model, default out_dir/model.safetensors")


def config_parser(Config, doc, script, commands):
    """Return an argument parser with one flag for each field of the dataclass `Config`.

    A field of type list takes the words that are no flags."""
    parser = Parser(prog=f"python {script}", description=doc.strip(), allow_abbrev=False,
                    usage=f"python {script} [{'|'.join(commands)}] [flags]",
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28))
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        meta, kind = field.metadata, types[field.name]
        limit = limits(field) if (meta["low"] or 0) > 0 or meta["high"] else ""  # the rest goes without saying
        default = f"{field.default:g}" if kind is float else field.default
        notes = ", ".join(filter(None, (f"default {default}" if default != "" else "", limit)))
        help = (meta["help"] + (f" ({notes})" if notes else "")).replace("%", "%%")
        if kind is list:
            parser.add_argument(field.name, nargs="*", help=meta["help"])
        elif kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=meta["help"]
                                + f" (default {'on' if field.default else 'off'})")
            parser.set_defaults(**{field.name: field.default})  # given above, Python up to 3.12 would show it twice
        else:
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, choices=meta["choices"], help=help,
                                metavar=None if meta["choices"] else kind.__name__)
    return parser


def limits(field):
    """Return the range of an option in words, empty where it has none. Example: "at least 0 and at most 1"."""
    bounds = (("at least", field.metadata["low"]), ("at most", field.metadata["high"]))
    return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def check_limits(config):
    """Raise ArgumentError for the first option outside its limits (nan is outside of any).

    Where the least is -1, that stands for "by the model", and what lies between it and 0 means nothing."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        low, high = (field.metadata[key] for key in ("low", "high"))
        sound = type(value) is not float or math.isfinite(value)
        if not sound or low is not None and value < low or high is not None and value > high:
            raise argparse.ArgumentError(None, f"--{field.name} {value} must be {limits(field) or 'a finite number'}")
        if low == -1 and -1 < value < 0:
            raise argparse.ArgumentError(None, f"--{field.name} {value} must be -1 or at least 0")
    if not config.out_dir and type(config).out_dir:  # where that is the default, the script has a meaning for it
        raise argparse.ArgumentError(None, "--out_dir is empty; name a folder, or leave the flag out")
    if config.resume and config.fresh:
        raise argparse.ArgumentError(None, "--resume continues a run and --fresh starts anew: choose one")


def run_script(doc, Config, commands, argv=None, file=__file__, parallel=()):
    """Run `script.py [command] [flags]` for a training script and return the exit status.

    `commands` maps a word to a function of the Config, the first being the default; those in `parallel` can be started
    by torchrun. As in gpt.run, a user's mistake is one line on stderr and status 2 (the command line alone is wrong, or
    would overwrite a run) or 1 (found later); a run that was stopped by a signal returns 130 or 143 after saving."""
    if process():  # of several processes the first one speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows only ASCII shows codes, and goes on
    argv, script = list(sys.argv[1:] if argv is None else argv), os.path.basename(file)
    command_line, debug = shlex.join(["python", script, *argv]), "--debug" in argv
    command = argv.pop(0) if argv and not argv[0].startswith("-") else next(iter(commands))
    if command not in commands:
        print(f"error: unknown command {command!r}; one of: {', '.join(commands)}; see python {script} --help",
              file=sys.stderr)
        return behind_first(2)
    try:
        config = Config(**vars(config_parser(Config, doc, script, commands).parse_args(argv)))
    except SystemExit as stop:
        return behind_first(stop.code)
    config.command_line = command_line
    try:
        check_limits(config)
        launch(config, f"{script} {command}", command in parallel)
        commands[command](config)
        leave()
        return 0
    except Stopped as stopped:
        print(f"\nstopped: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `| head` for one, has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (argparse.ArgumentError, ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        message = diagnosis(error)
        if debug or not message:
            raise
        status = 2 if isinstance(error, argparse.ArgumentError) else 1
    finally:
        if Run.current is not None:
            Run.current.close()
        sys.stdout, sys.stderr = (sys.__stdout__, sys.__stderr__) if process() else (sys.stdout, sys.stderr)
    behind_first(status)
    print(f"error: {message}", file=sys.stderr)
    return status


def diagnosis(error):
    """Return one line for an error that ended a run: its cause and the remedy; "" for a mistake of ours."""
    if out_of_memory(error):
        return "out of memory; lower --batch_size or --context_length, or raise --accumulate"
    if several and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)):
        return LOST  # met where no `exchange` was
    if type(error) is RuntimeError:
        return ""
    if getattr(error, "errno", None) and error.filename is None and Run.current is not None:
        error.filename = str(Run.current.folder)  # a full disk shows when a file is closed, and then has no name
    return explain(error)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each computes its share of every batch, the first one does all the writing
#
# There is no DistributedDataParallel around the model: every gradient is summed once an update, when its last piece is
# computed. So nothing is sent between the pieces of --accumulate, and tied weights, Muon and adapters need no thought.
# The price: sending does not overlap with backward. Each process holds the whole model; with --fsdp, for models that do
# not fit, FSDP2 leaves each its share, and the files are the same.

GUARD = 60  # seconds that a process may be behind the others in a step before the run is ended
LOST = f"another process of this run ended, or was silent for {GUARD} s; --resume goes on from the last save"
several = None  # in a run of several processes: the group for waits without limit, while the first one works alone


def process():
    """Return the number of this process among those that torchrun started, 0 for the first or only one."""
    return int(os.environ.get("RANK", 0)) % int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Return whether this is the first or only process, the one that writes."""
    return process() == 0


def processes():
    """Return how many processes work on this run, 1 where none were joined by `launch`."""
    return dist.get_world_size() if several else 1


def launch(config, command, supported):
    """Join the processes that torchrun started; nothing to do for one, or where they were joined before.

    Raises ArgumentError for a command that runs in one process, and for more processes than GPUs."""
    global several
    count, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if getattr(config, "fsdp", False):
        check_sharding(config, count)
    if count == 1 or several:
        return
    if not supported:
        raise argparse.ArgumentError(None, f"{command} runs in one process; start it without torchrun")
    device = pick_device(config.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "mps" or config.device.startswith("cuda:"):
        raise argparse.ArgumentError(None, f"--device {device} is one for {count} processes; give --device "
                                           + ("cuda" if gpus else "cpu"))
    if gpus and here > gpus:
        raise argparse.ArgumentError(None, f"--nproc_per_node={here}, but this machine has {gpus} GPU"
                                           f"{'s' * (gpus > 1)}; start one process for each, or give --device cpu")
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    limit, no_limit = datetime.timedelta(seconds=GUARD), datetime.timedelta(days=30)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=limit)
    several = dist.new_group(backend="gloo", timeout=no_limit)


def leave():
    """Wait until all processes are done, what the first one does alone at the end included, and part from them."""
    global several
    if several:
        wait()
        dist.destroy_process_group()
    several = None


@contextlib.contextmanager
def exchange():
    """Return a context that turns a failed exchange with the other processes into a ConnectionError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        raise ConnectionError(LOST) from error


def wait():
    """Wait until all processes have come here, however long the first one works alone before."""
    if several:
        with exchange():
            dist.barrier(several)


def behind_first(status):
    """Return an exit status, in all processes but the first after 10 s.

    So a mistake that all of them meet is told once, by the first: when it has ended, torchrun ends the others. What one
    of the others met alone it still tells."""
    if process() and status:
        time.sleep(10)
    return status


def first(function, *args):
    """Return function(*args), called in the first process before the others, which find the files that it made."""
    if not is_first():
        wait()
    result = function(*args)
    if is_first():
        wait()
    return result


def share(items):
    """Return what this process computes of a sequence of items, none of which comes to two processes; alone, all.

    Example: of range(5) the first of two processes gets 0, 2, 4 and the second 1, 3."""
    return items[process() :: processes()] if several else items


def together(value, op="sum"):
    """Return the sum (or `op="max"`) of a number over all processes, the same in each; an int stays one."""
    if not several:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    with exchange():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return type(value)(tensor.item())


def sum_gradients(model):
    """Sum each trainable parameter's gradient over all processes, 0 for one that had no rows.

    Each loss was divided by the tokens of the whole batch, so the sum is the whole batch's gradient, however unequal
    the shares; DistributedDataParallel's mean of means would weigh a token by the process that it came to."""
    if not several or hasattr(model, "reshard"):  # a sharded model's are summed while backward runs
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    with exchange():
        dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = grad.view_as(parameter)


def check_sharding(config, count):
    """Raise ArgumentError for --fsdp in one process or beside a flag that needs whole parameters."""
    if count == 1:
        raise argparse.ArgumentError(None, "--fsdp shares a model among processes; start them with torchrun "
                                           "--standalone --nproc_per_node=2 train.py ..., or leave it out")
    if config.optimizer != "adamw":
        raise argparse.ArgumentError(None, f"--fsdp does not go with --optimizer {config.optimizer}, which needs whole "
                                           "matrices; give --optimizer adamw")
    if config.compile:
        raise argparse.ArgumentError(None, "--fsdp does not go with --compile; leave one of the two out")


def shard(model, device):
    """Return `model` with its parameters, and so gradients and AdamW's state, shared among the processes, in place.

    Every parameter is cut along its first dimension. A block is put together on each process while it computes, forward
    and again backward, then dropped; its gradient is summed and cut in one exchange. Under autocast the bfloat16 copies
    of all weights stay until backward, 2 bytes a parameter. This is torch's own FSDP2, after Rajbhandari et al. 2020,
    "ZeRO", arXiv:1910.02054."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (processes(),))
    for part in (*model.trf_blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # what reads parameters between steps finds shards
        part.set_gradient_divide_factor(1.0)  # the sum, not the mean: see sum_gradients
        part.set_force_sum_reduction_for_comms(True)  # gloo can do no other
    return model


def whole(tensor):
    """Return a tensor that may be sharded as an ordinary one, whole in every process."""
    with exchange():
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(value):
    """Return dicts and lists with each sharded tensor in them whole, on the CPU; None for it in all but the first."""
    if isinstance(value, dict):
        return {key: gathered(part) for key, part in value.items()}
    if isinstance(value, list):
        return [gathered(part) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    value = whole(value)
    return value.cpu() if is_first() else None


def sharded_like(tensor, own):
    """Return a whole tensor in the shards of a parameter `own` of the same shape; as it is where `own` has none."""
    if not hasattr(own, "full_tensor") or tensor.shape != own.shape:  # AdamW's count of steps is one number
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def whole_model(model):
    """Return the model; a sharded one as a copy on the CPU in the first process, None in the others."""
    if not hasattr(model, "reshard"):
        return model
    weights = gathered(model.state_dict())
    if not is_first():
        return None
    plain = gpt.empty_model(model.config)
    plain.load_state_dict(weights)
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Model, device, optimizer, schedule


def new_model(config, tokenizer):
    """Return a model with fresh weights: the architecture of --model, the sizes given, the tokenizer's vocabulary."""
    sizes = {name: getattr(config, name) for name in ("context_length", "emb_dim", "n_layers", "n_heads")}
    sizes = {name: value for name, value in sizes.items() if value}
    if config.drop_rate >= 0:
        sizes["drop_rate"] = config.drop_rate
    try:
        return GPTModel(dataclasses.replace(GPT_CONFIGS[config.model], vocab_size=tokenizer.vocab_size, **sizes))
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--{error}") from None


def check_sizes(config, *others):
    """Raise ArgumentError for a flag that --init, which brings an architecture, would leave unused.

    `others` are flags of the script's own that are for --init scratch too."""
    for name in ("model", "emb_dim", "n_layers", "n_heads", *others):
        if getattr(config, name) != getattr(type(config), name):
            raise argparse.ArgumentError(None, f"--{name} {getattr(config, name)} does not go with --init "
                                               f"{config.init}, whose model has its own; leave one of the two out, or "
                                               "give --init scratch")


def load_start(config, default_command):
    """Return (model, tokenizer, made) for --init: a GPT-2 name or a checkpoint, cropped and with dropout as asked.

    Raises FileNotFoundError that names `default_command`, the one that makes the missing file."""
    if config.init in GPT_CONFIGS and config.init != "tiny":
        from gpt2_weights import load_gpt2

        model, tokenizer, made = load_gpt2(config.init), load_tokenizer("gpt2"), {"kind": "gpt", "init": config.init}
    elif (folder := Path(config.init)).is_dir():
        raise ValueError(f"--init {folder} is a folder; {gpt.file_in(folder)}")
    elif not folder.is_file():
        raise FileNotFoundError(f"--init {config.init} does not exist; make it with: {default_command}")
    else:
        model, tokenizer, made = gpt.load_checkpoint(config.init)
        if tokenizer is None:
            raise ValueError(f"--init {config.init} holds no tokenizer")
        tokenizer = from_dict(tokenizer)
    return with_options(model, config), tokenizer, made


def load_writer(config, default_command):
    """Return what `load_start` does; raises ValueError for a model that scores classes, not tokens."""
    model, tokenizer, made = load_start(config, default_command)
    if made["kind"] != "gpt":
        raise ValueError(f"{config.init} is a {made['kind']}, which writes no text; give a model of {default_command}")
    return model, tokenizer, made


def with_options(model, config):
    """Return `model` with --context_length (cropping the learned positions) and --drop_rate applied."""
    length = config.context_length or model.config.context_length
    if length > model.config.context_length:
        raise ValueError(f"--context_length {length}: the model of --init has {model.config.context_length} positions")
    drop_rate = model.config.drop_rate if config.drop_rate < 0 else config.drop_rate
    changed = GPTModel(dataclasses.replace(model.config, context_length=length, drop_rate=drop_rate))
    if model.out_head.out_features != model.config.vocab_size:  # a classifier's
        changed.out_head = model.out_head
    changed.load_state_dict({**model.state_dict(), "pos_emb.weight": model.pos_emb.weight[:length]})
    return changed


def compile_blocks(model, config):
    """Compile the blocks for any shape, in place, where --compile asks for it, for calls without a cache.

    With a cache the plain forward runs: torch would compile anew for each layer and length and, after eight times,
    stop compiling, in training too. So the number of the layer, which only a cache needs, does not reach what is
    compiled."""
    def without_cache(plain, compiled):
        def forward(x, allowed=None, cache=None, layer=0, rows=None):
            return compiled(x, allowed, rows=rows) if cache is None else plain(x, allowed, cache, layer, rows)

        return forward

    for block in model.trf_blocks if config.compile else ():
        block.forward = without_cache(block.forward, torch.compile(block.forward, dynamic=True))


def autocast(config, device):
    """Return the context in which a loss is computed: bfloat16 matrix products where asked for and worth it.

    Raises ArgumentError for bfloat16 on a CPU without units for it: there it was measured 8 times slower."""
    dtype = config.dtype
    if dtype == "auto":
        units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if units else "float32"
    if dtype == "float32":
        return contextlib.nullcontext()
    if device.type == "cpu" and not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        raise argparse.ArgumentError(None, "--dtype bfloat16: this CPU has no units for it; use --dtype float32")
    return torch.autocast(device.type, dtype=torch.bfloat16)


def make_optimizers(model, config):
    """Return the list of optimizers for the trainable parameters: AdamW, or Muon for the blocks' matrices and AdamW.

    Weight decay is for matrices; vectors (biases, norms) have none. Each group keeps its `peak` rate, which
    `Run.apply` scales."""
    matrices, optimizers = [], []
    if config.optimizer == "muon":
        blocks = model.get_submodule("trf_blocks")
        matrices = [p for p in blocks.parameters() if p.requires_grad and p.dim() == 2]
    if matrices:
        optimizers.append(Muon(matrices, config.learning_rate, config.weight_decay, config.momentum))
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is matrix for matrix in matrices)]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    if groups:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one pass over memory instead of several
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


class Unguarded:
    """An optimizer's methods without torch's guards for the case that it is compiled, which happens to none here.

    On their first call the guards import torch._dynamo: a third of the time to a run's first step, and 60 MB."""

    add_param_group, state_dict, load_state_dict = map(inspect.unwrap, (
        torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.state_dict, torch.optim.Optimizer.load_state_dict))


class AdamW(Unguarded, torch.optim.AdamW):
    """torch's AdamW, to the bit (Loshchilov and Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@torch.no_grad()
def orthogonalise(matrices, steps=5):
    """Return matrices (N, rows, columns) with all singular values pushed towards 1, their directions kept.

    A Newton-Schulz iteration with a quintic polynomial, f(s) = a s + b s^3 + c s^5 applied to every singular value s;
    after five steps they lie between about 0.7 and 1.2. Source: Jordan et al. 2024, "Muon: An optimizer for hidden
    layers in neural networks", https://kellerjordan.github.io/posts/muon"""
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


class Muon(Unguarded, torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of hidden layers (Jordan et al. 2024).

    Every direction of a matrix moves equally far, not only those in which the gradient happens to be large. Updates
    are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's size (Liu et al. 2025, "Muon is scalable",
    section 2.2), so the same rate and weight decay serve both. A fused query/key/value matrix counts as three. Runs
    in the parameters' own precision: torch's own Muon forces bfloat16, which a CPU without units for it pays for."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = {}  # equal shapes are orthogonalised together: one batched product instead of many small ones
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov: look one step ahead
                rows, columns = p.shape
                pieces = 3 if rows == 3 * columns else 1
                for piece, part in zip(p.chunk(pieces), update.chunk(pieces)):
                    shapes.setdefault(piece.shape, []).append((piece, part))
            for (rows, columns), pairs in shapes.items():
                updates = orthogonalise(torch.stack([part for _, part in pairs]))
                for (piece, _), update in zip(pairs, updates):
                    piece.mul_(1 - group["lr"] * group["weight_decay"])
                    piece.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def default_rate(config, model):
    """Return the peak learning rate of pretraining for --learning_rate -1.

    Below GPT-2's width Muon at 1.2e-2 (best of 0.6, 1.2, 2.4e-2 on tiny Shakespeare) and AdamW at nanoGPT's 1e-3; from
    768 channels on 2e-3 (not measured) and nanoGPT's 6e-4."""
    small = model.config.emb_dim < 768
    if config.optimizer == "muon":
        return 1.2e-2 if small else 2e-3
    return 1e-3 if small else 6e-4


def total_steps(config, per_epoch):
    """Return the number of updates: --epochs or --max_steps, whichever ends first; raises ArgumentError for neither."""
    ends = [end for end in (config.epochs * per_epoch, config.max_steps) if end]
    if not ends:
        raise argparse.ArgumentError(None, "--epochs 0 and --max_steps 0 together never end; give one of them")
    return min(ends)


def rate_factor(step, total, warmup, schedule, final):
    """Return the learning rate of update `step` (from 0) of `total` as a share of the peak.

    It rises linearly for `warmup` steps and then falls to `final` by half a cosine wave, in a line, or not at all.

    Example: rate_factor(0, 100, 10, "linear", 0.1) == 0.1"""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if schedule == "constant":
        return 1.0
    return final + (1 - final) * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def full_precision(x):
    """Return x in float32, or as it is where it is more precise: sums of bfloat16 numbers would be coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def next_token_loss(logits, targets):
    """Return the summed cross-entropy in nats: logits (B, T, V), targets (B, T) -> (); targets of -100 do not count."""
    logits = full_precision(logits)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=gpt.IGNORE, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its log, and what it takes to go on exactly where it stopped


class Stopped(Exception):
    """A signal asked the run to stop, and its state was saved."""

    def __init__(self, message, number):
        super().__init__(message)
        self.signal = number


# Options that may change when a run goes on, as they decide nothing in it; those of the second line belong to commands
# that train nothing.
FREE = {"resume", "fresh", "debug", "log_every", "save_every", "out_dir", "fsdp",
        "checkpoint", "against", "prompt", "out", "split", "file", "part", "text", "ratings", "best_of", "rounds"}


def deciding(options):
    """Return those of a dict of options that decide a run's result; states of earlier versions hold others too."""
    return {key: value for key, value in options.items() if key not in FREE and not key.startswith("judge")}


def saved_options(config):
    """Return the options that decide a run's result, as a dict of plain values."""
    return deciding(dataclasses.asdict(config))


def move_aside(path):
    """Rename a file or folder to the first free name with a number behind it."""
    number = next(n for n in range(1, 10**6) if not Path(f"{path}.{n}").exists())
    os.rename(path, f"{path}.{number}")
    print(f"moved {path} to {path}.{number}", file=sys.stderr)


def write_json(path, value):
    """Write a value as readable JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def out_of_memory(error):
    """Return whether an error says that memory ran out, as Python, the CPU's allocator or CUDA says it."""
    system = isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ENOMEM  # not a file's name
    return isinstance(error, MemoryError) or system and "alloc" in str(error) and "memory" in str(error)


def damage(path):
    """Return what is wrong with a zip archive, "" where each part's checksum is that of its bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:  # as the place of the damage has it
        return str(error) or "it ends early"
    return f"{part} fails its checksum" if part else ""


def read_state(path, mmap=False):
    """Return the dict that `Run.save` wrote; raises ValueError where the file is damaged or not ours.

    An error that says nothing about the file itself, as that it may not be read or that memory ran out, stays what it
    is: nobody should throw a good run away for it.

    With `mmap` its tensors stay on the disk until they are used, so that many processes can read it at once.

    torch.load does not check the archive's CRCs (a flipped bit in a weight would load silently), so they are checked
    first; weights_only keeps the file from running anything."""
    try:
        if damaged := damage(path):
            raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if type(state) is not dict or state.get("format") != 1:
            raise ValueError("not a state of this program")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged archive fails in a dozen ways, all of them mean the same
        if out_of_memory(error) or getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.EMFILE):
            raise
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is damaged or not ours ({reason}); --fresh starts anew") from None
    return state


def frozen_sha256(model):
    """Return the sha256 over the parameters that do not train: state.pt does not hold them, and --init may change."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(gpt.tensor_bytes(parameter.detach().cpu()))
    return digest.hexdigest()


class Run:
    """One run's folder and its progress.

    `step` counts the steps done, of `total`. The script's loop asks for `batches` and calls `update`, `report` and
    `end_step`; everything that must survive a stop is written by `save` and read back by `start`."""

    current = None  # the run whose folder this process holds

    def __init__(self, config, stage):
        """Open and lock config.out_dir. Raises ArgumentError where it holds a run and neither --resume nor --fresh is
        given, or no state.pt to resume from, or one with other options, or where another process works there."""
        total_steps(config, 1)  # refuses a run without end before anything is written
        self.config, self.stage, self.folder = config, stage, Path(config.out_dir)
        self.step = self.total = self.tokens = 0
        self.loss_sum, self.count = 0.0, 0  # of the steps since the last evaluation
        self.best_value, self.bad_evaluations = math.inf, 0  # so far, and how many since then were no better
        self.seconds = self.train_seconds = 0.0  # of earlier parts of the run; within steps, this part's too
        self.kept = {}  # plain values of the script's own that a resumed run needs
        self.state = None  # what was saved, until `start` has put it back
        self.clock = None  # when `start` began; before that nothing was trained
        self.recent = []  # (loss, tokens, seconds) of the steps since the last log line
        self.losses = collections.deque(maxlen=100)  # of the last steps, to tell a spike
        self.stop_signal, self.lock_file = 0, None
        self.examples = ()  # indices of this step's batch, all processes together
        if is_first():
            self.open()
        wait()
        if together(int(self.state is not None), "max") and self.state is None:  # the first process found one
            self.state = read_state(self.folder / "state.pt", getattr(config, "fsdp", False))
        wait()  # reading takes minutes where the model is large, and what comes next has a time limit
        Run.current = self

    def open(self):
        """Lock the folder and read what an earlier part of the run saved there; only the first process does."""
        config = self.config
        if config.fresh and self.exists():
            if self.folder.resolve() in Path(config.init).resolve().parents:
                raise argparse.ArgumentError(None, f"--init {config.init} lies in --out_dir, which --fresh moves "
                                                   "aside; give another --out_dir")
            self.lock()  # not from under a process that works there
            self.lock_file.close()
            move_aside(self.folder)
        if self.exists() and not config.resume:
            raise argparse.ArgumentError(None, f"{self.folder} holds a run: --resume continues it, --fresh moves it "
                                               "aside")
        if self.exists() and not (self.folder / "state.pt").exists():
            raise argparse.ArgumentError(None, f"{self.folder} holds a run but no state.pt, which --resume needs: "
                                               "--fresh moves the folder aside and starts anew")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        for rest in (*self.folder.glob(".*.tmp"), *self.folder.glob("adapter/.*.tmp")):
            rest.unlink()  # left by a process that was killed while writing
        if (self.folder / "state.pt").exists():
            self.state = read_state(self.folder / "state.pt", getattr(config, "fsdp", False))
            self.compare(self.state["options"])
        elif config.resume:
            print(f"a new run in {self.folder}, starting at step 0", file=sys.stderr)

    def exists(self):
        """Return whether the folder holds a run."""
        return any((self.folder / name).exists() for name in ("state.pt", "summary.json", "model.safetensors"))

    def lock(self):
        """Hold the folder until this process ends, however it ends."""
        self.lock_file = open(self.folder / ".lock", "a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock_file.seek(0)
            owner = self.lock_file.read().strip() or "unknown"
            message = f"{self.folder} is in use by process {owner}; choose another --out_dir"
            raise argparse.ArgumentError(None, message) from None
        Run.current = self
        self.lock_file.truncate(0)
        self.lock_file.write(str(os.getpid()))
        self.lock_file.flush()

    def compare(self, saved):
        """Raise ArgumentError with a table of the options that differ from the saved ones.

        With the constant schedule, whose rates do not depend on the end, a run may be made longer."""
        saved, given = deciding(saved), saved_options(self.config)
        defaults = deciding({field.name: field.default for field in dataclasses.fields(self.config)})
        saved = {**defaults, **saved}  # an older version's lack some
        if given["schedule"] == "constant":
            longer = {key for key in ("epochs", "max_steps") if given[key] == 0 or 0 < saved.get(key, 0) < given[key]}
            saved = {**saved, **{key: given[key] for key in longer}}
        changed = [key for key in sorted(set(saved) | set(given)) if saved.get(key) != given.get(key)]
        rows = [f"{key}: saved {saved.get(key)!r}, given {given.get(key)!r}" for key in changed]
        if rows:
            raise argparse.ArgumentError(None, f"{self.folder} was started with other options; " + "; ".join(rows)
                                         + "; give the saved ones, or --fresh" + self.way_on(changed))

    def way_on(self, changed):
        """Return how else a run can be made longer, where that alone is asked for, else nothing."""
        model = self.folder / "model.safetensors"
        if not set(changed) <= {"epochs", "max_steps"} or not model.is_file():
            return ""
        return f"; its rates were made for that end, more steps go on from its weights: --init {model} --out_dir NEW"

    def finished(self):
        """Return the summary of a run that is done and was not made longer now, or None."""
        path = self.folder / "summary.json"
        if self.state is None or not path.exists():
            return None
        if deciding(self.state["options"]) != saved_options(self.config):
            return None
        print(f"{self.folder} is finished: {self.state['step']} steps; nothing to do", file=sys.stderr)
        self.close()
        return json.loads(path.read_text(encoding="utf-8"))

    def start(self, model, optimizers, total, data_sha256):
        """Begin `total` steps with these parts; where a state was saved, put it back into them, else save one first.

        From here on Ctrl-C and SIGTERM stop the run at the end of a step, saved; a second one stops it at once."""
        self.total, self.data_sha256, self.optimizers, self.model = total, data_sha256, optimizers, model
        self.kept["frozen"] = frozen_sha256(model)
        if self.state is None:
            self.save()  # before any other file, so that what was killed at whatever moment can be resumed
        else:
            self.restore(self.state)
            self.state = None  # it is as large as model and optimizer together
            if is_first():
                (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that is made longer now
        if self.config.warmup_steps >= total:
            print(f"warning: --warmup_steps {self.config.warmup_steps} for a run of {total} steps: the learning rate "
                  "rises to the very end; give fewer", file=sys.stderr)
        patience = self.config.patience
        if patience and self.bad_evaluations >= patience or self.kept.get("ended"):  # it had stopped early
            self.total = self.step
        if is_first():
            self.cut_log()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{self.stage}: {total} steps, {trainable:,} trainable parameters"
              + (f", resumed at step {self.step}" if self.step else "")
              + (f", {processes()} processes" if several else ""), file=sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nobody signals us there
                signal.signal(number, self.on_signal)
        self.clock = time.monotonic()

    def cut_log(self):
        """Take from metrics.jsonl what a stopped run logged after its last save: it is going to be logged again.

        A line that a full disk or a power cut left unfinished goes too."""
        metrics, lines, kept = self.folder / "metrics.jsonl", [], []
        if self.step and metrics.exists():
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(step, int) and step <= self.step:
                kept.append(line + "\n")
        with replacing(metrics) as file:
            file.write("".join(kept).encode())

    def on_signal(self, number, frame):
        """Ask the loop to stop, and let a second signal do its usual work."""
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr)

    def restore(self, state):
        """Put a saved state back into model, optimizers, random numbers and counters, all shapes checked first."""
        if state["data_sha256"] != self.data_sha256:
            raise ValueError(f"{self.folder} was trained on other data: sha256 {state['data_sha256'][:12]}, "
                             f"now {self.data_sha256[:12]}; give the same data, or --fresh")
        if state["progress"]["kept"].get("frozen", self.kept["frozen"]) != self.kept["frozen"]:
            raise ValueError(f"--init {self.config.init} is no longer what {self.folder} was started from; --fresh "
                             "starts anew")
        own = trainable_state(self.model)
        self.check_weights(own, state["model"])
        self.check_moments(state)
        with torch.no_grad():
            for name, tensor in state["model"].items():
                own[name].copy_(sharded_like(tensor, own[name]))
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {number: {key: sharded_like(value, parameters[number]) for key, value in values.items()}
                       for number, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": moments})
        torch.set_rng_state(state["rng"])
        for number, rng in zip(range(torch.cuda.device_count()), state["cuda_rng"]):  # as many GPUs as both have
            torch.cuda.set_rng_state(rng, number)
        for key, value in state["progress"].items():
            setattr(self, key, value)
        wait()  # as in __init__

    def misfit(self, what):
        """Return a ValueError about state.pt."""
        return ValueError(f"{self.folder}/state.pt {what}; --fresh starts anew")

    def check_weights(self, own, saved):
        """Raise ValueError for the first saved weight that is missing, too many, of another shape, or not finite."""
        for name in sorted(set(own) | set(saved)):
            if name not in own or name not in saved or own[name].shape != saved[name].shape:
                raise self.misfit(f"does not fit the model at {name}")
            if not saved[name].isfinite().all():
                raise self.misfit(f"is of no use: {name} is not finite")

    def check_moments(self, state):
        """Raise ValueError for the first parameter whose moments are missing, of another shape, or not finite.

        torch would take them, and fail in the next step or learn something else."""
        if len(state["optimizers"]) != len(self.optimizers):
            raise self.misfit(f"does not fit the model: it holds {len(state['optimizers'])} optimizers, not "
                              f"{len(self.optimizers)}")
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"])):
            shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
            names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            expected = range(len(shapes)) if state["step"] else ()  # the first update makes them
            for index in sorted({*saved["state"], *expected}):
                where, moments = f"optimizer {number}, parameter {index}", saved["state"].get(index, {})
                if index >= len(shapes) or moments.keys() != names or any(
                        t.shape not in ((), shapes[index]) for t in moments.values()):
                    raise self.misfit(f"does not fit the model at {where}")
                if not all(t.isfinite().all() for t in moments.values()):
                    raise self.misfit(f"is of no use: {where} is not finite")

    def save(self):
        """Write state.pt: everything that `start` puts back.

        The first process writes. With --fsdp each holds only its share, and the first one's CPU memory must take the
        whole: all processes must come here, as each tensor in turn is put together."""
        model, optimizers = gathered([trainable_state(self.model), [o.state_dict() for o in self.optimizers]])
        if is_first():
            self.write_state(model, optimizers)
        wait()

    def write_state(self, model, optimizers):
        """Write state.pt with these parts of it."""
        progress = ("step", "tokens", "best_value", "bad_evaluations", "loss_sum", "count", "train_seconds", "kept")
        cuda_rng = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state = {"format": 1, "step": self.step, "options": saved_options(self.config),
                 "data_sha256": self.data_sha256, "model": model, "optimizers": optimizers,
                 "rng": torch.get_rng_state(), "cuda_rng": cuda_rng,
                 "progress": {**{key: getattr(self, key) for key in progress}, "seconds": self.elapsed()}}
        with replacing(self.folder / "state.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # over a full disk torch's writer says something else than the disk did
                raise error.__context__ if isinstance(error.__context__, OSError) else error
            file.flush()
            os.fsync(file.fileno())  # a disk that fails says so here
            if damaged := damage(file.name):
                raise OSError(f"{self.folder}/state.pt does not read back as it was written ({damaged}), the one "
                              "before stays; write to another disk")

    @property
    def device(self):
        """The device that the weights are on."""
        return next(self.model.parameters()).device

    def elapsed(self):
        """Return the seconds that this run has taken, earlier parts included."""
        return self.seconds + (0 if self.clock is None else time.monotonic() - self.clock)

    def batches(self, order, batch_size):
        """Yield the batches of one epoch that are still to be done: pieces of `order`, the shuffled indices.

        One of several processes gets its share of each, which may be empty. All but the first draw dropout from numbers
        of their own, made from the step alone, so that a resumed run draws the same."""
        per_epoch = math.ceil(len(order) / batch_size)
        for number in range(self.step % per_epoch, per_epoch):
            if self.step >= self.total:
                return
            self.step_clock = time.monotonic()
            if process():
                torch.manual_seed(seeded("process", self.config.seed, self.step, process()).initial_seed())
            self.examples = order[number * batch_size : (number + 1) * batch_size]
            yield share(self.examples)

    def update(self, loss, tokens):
        """Do a step, which is one `apply` and one `advance`; return (gradient norm, rate)."""
        norm, rate = self.apply(loss)
        self.advance(loss, tokens)
        return norm, rate

    def apply(self, loss):
        """Clip the gradients, set the rate, update the weights; return (gradient norm, rate). A step may do it often.

        Raises ValueError before anything is changed where the loss or a gradient is not finite."""
        config = self.config
        sum_gradients(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            few = [f"{int(index)}" for index in self.examples[:8]] + ["..."] * (len(self.examples) > 8)
            raise ValueError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}: nothing was updated, "
                             f"{self.folder} keeps the last good state; lower --learning_rate, raise --warmup_steps, "
                             f"or look at the data of this batch, examples {', '.join(few)}")
        factor = rate_factor(self.step, self.total, config.warmup_steps, config.schedule, config.final_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        return norm, config.learning_rate * factor

    def advance(self, loss, tokens):
        """Count one step with this loss and so many tokens."""
        self.step += 1
        self.tokens += tokens
        self.loss_sum, self.count = self.loss_sum + loss, self.count + 1

    def report(self, loss, norm, rate, tokens):
        """Log this step, and every --log_every steps a line: loss, rate, gradient norm, tokens a second, time left.

        A loss twice as high as any of the last 100 steps, and above 1, is warned of."""
        if len(self.losses) >= 20 and loss > max(1.0, 2 * max(self.losses)):
            print(f"warning: step {self.step}: loss {loss:.4g}, the highest of the {len(self.losses)} steps before was "
                  f"{max(self.losses):.4g}; look at this batch, or lower --learning_rate or --clip", file=sys.stderr)
        self.losses.append(loss)
        self.recent.append((loss, tokens, time.monotonic() - self.step_clock))
        self.train_seconds += self.recent[-1][2]
        if self.step % self.config.log_every and self.step != self.total:
            return
        losses, counts, spans = zip(*self.recent)
        mean, speed = sum(losses) / len(losses), sum(counts) / max(sum(spans), 1e-9)
        left = sum(spans) / len(spans) * (self.total - self.step)
        self.log(loss=mean, rate=rate, norm=norm, tokens_per_second=round(speed))
        print(f"step {self.step}/{self.total}  loss {mean:.4f}  rate {rate:.2e}  norm {norm:.2f}  {speed:,.0f} tok/s  "
              f"{int(left) // 60}:{int(left) % 60:02d} left", file=sys.stderr)
        self.recent = []

    def log(self, **values):
        """Append one JSON line with the step to metrics.jsonl."""
        if not is_first():
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    def due(self, every):
        """Return whether something done every so many steps is due; the last step always is."""
        return self.step == self.total or bool(every) and self.step % every == 0

    def count_evaluation(self, value):
        """Return whether `value` is the lowest so far; --patience counts those that are not, and ends the run."""
        better = value < self.best_value
        self.best_value = min(value, self.best_value)
        self.bad_evaluations = 0 if better else self.bad_evaluations + 1
        if self.config.patience and self.bad_evaluations >= self.config.patience:
            print(f"no better evaluation in {self.bad_evaluations}: stopping early", file=sys.stderr)
            self.total = self.step
        return better

    def end_step(self):
        """Save where it is due, and stop where a signal asked for it, all processes at the same step."""
        stop_signal = together(self.stop_signal, "max")
        if stop_signal:
            self.save()
            raise Stopped(f"{self.folder} is saved at step {self.step} of {self.total}; --resume continues",
                          stop_signal)
        if self.due(self.config.save_every):
            self.save()

    def finish(self, **figures):
        """Write summary.json and curves.svg, release the folder, and return the summary."""
        optimizer_bytes = sum(t.numel() * t.element_size() for o in self.optimizers for s in o.state.values()
                              for t in s.values() if torch.is_tensor(t))
        summary = {"stage": self.stage, "seconds": round(self.elapsed(), 1), "steps": self.step,
                   "command": getattr(self.config, "command_line", ""), "versions": versions(),
                   "seed": self.config.seed, "data": {"source": self.config.data, "sha256": self.data_sha256},
                   "config": saved_options(self.config),
                   "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                   "optimizer_bytes": optimizer_bytes, "peak_memory_bytes": peak_memory(self.device),
                   "step_seconds": round(self.train_seconds / max(1, self.step), 5), **figures}
        if several:
            summary["processes"] = processes()
        if is_first():
            write_json(self.folder / "summary.json", summary)
        self.close()
        return summary

    def close(self):
        """Give back the folder and the signals; of a run that failed before its first step and model nothing stays."""
        fresh = self.clock is not None and self.step == 0 and not (self.folder / "model.safetensors").exists()
        if fresh and is_first():
            (self.folder / "state.pt").unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        if self.lock_file:
            with contextlib.suppress(OSError):  # a folder that was refused before anything came into it goes again
                if self.clock is None and [path.name for path in self.folder.iterdir()] == [".lock"]:
                    (self.folder / ".lock").unlink()
                    self.folder.rmdir()
            self.lock_file.close()
        Run.current = None

    def metrics(self, key):
        """Return [(step, value)] of one logged figure."""
        return self.curves({key: key})[key]

    def curves(self, keys):
        """Return {name: [(step, value)]} of the logged figures {name: key}; the log is read once for all of them."""
        with open(self.folder / "metrics.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return {name: [(row["step"], row[key]) for row in rows if key in row] for name, key in keys.items()}

    def write_samples(self, texts):
        """Write samples.txt anew, from texts of the log, which a resumed run cuts where it goes on."""
        with replacing(self.folder / "samples.txt") as file:
            file.write("".join(texts).encode())


def trainable_state(model):
    """Return {name: tensor} of what training changes: all trainable parameters, each once (a tied head is one)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def versions():
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
            "threads": torch.get_num_threads()}


def peak_memory(device):
    """Return the most memory this process has held so far, in bytes: the GPU's for a device that is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train_each_seed(train, config, folder):
    """Return the summaries of `train` with the seeds from --seed on: the first run stands in `folder`, others below."""
    summaries = []
    for seed in range(config.seed, config.seed + config.seeds):
        one = copy.copy(config)
        one.seed, one.out_dir = seed, folder if seed == config.seed else f"{folder}/seed{seed}"
        summaries.append(train(one))
    return summaries


Z = 1.959964  # 95% of a normal distribution lies within this many standard deviations


def wilson(hits, n, z=Z):
    """Return the 95% interval (low, high) of a share of `hits` in `n` (Wilson 1927): sound even at 0 and at n."""
    if not n:
        return 0.0, 1.0
    centre, spread = hits / n + z * z / (2 * n), z * math.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


# ---------------------------------------------------------------------------------------------------------------------
# Curves as SVG, drawn by hand

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#6b7280", "#db2777")
STYLE = ("<style>text{font:12px system-ui,sans-serif;fill:#333}.g{stroke:#8884;stroke-width:1}"
         "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>")


def ticks(low, high, count=5):
    """Return about `count` round numbers from low to high. Example: ticks(0, 10) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]"""
    raw = max(high - low, 1e-12) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(n * step, 12) for n in numbers]


def draw_curves(path, title, series, x_label="step", y_label="loss, nats a token"):
    """Draw {name: [(x, y), ...]} as lines into an SVG file that reads in light and dark."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    points = [point for line in series.values() for point in line] or [(0, 0)]
    left, top, width, height = 76, 40, 560, 260
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    x_high, y_high = max(x_high, x_low + 1e-9), max(y_high, y_low + 1e-9)

    def place(x, y):
        return left + (x - x_low) / (x_high - x_low) * width, top + (y_high - y) / (y_high - y_low) * height

    bottom = top + height + 56  # below the axis stand the names, two in a row
    size = f"{left + width + 24} {bottom + 22 * math.ceil(len(series) / 2)}"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
           f'role="img"><title>{title}</title>{STYLE}<text x="{left}" y="18" font-weight="bold">{title}</text>']
    for y in ticks(y_low, y_high):
        at = place(x_low, y)[1]
        out.append(f'<line class="g" x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}"/>'
                   f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high):
        at = place(x, y_low)[0]
        out.append(f'<text x="{at:.1f}" y="{top + height + 18}" text-anchor="middle">{x:,g}</text>')
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        x, y = left + number % 2 * width / 2, bottom + 22 * (number // 2)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{drawn}"/>'
                   f'<rect x="{x}" y="{y}" width="14" height="4" fill="{colour}"/>'
                   f'<text x="{x + 22}" y="{y + 7}">{name} {line[-1][1]:.4g}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{x_label}</text>'
               f'<text transform="translate(14,{top + height / 2}) rotate(-90)" text-anchor="middle">{y_label}</text>'
               "</svg>")
    with replacing(path) as file:
        file.write("\n".join(out).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining


def pretraining_tokenizer(config):
    """Return the tokenizer that --tokenizer names: a file, gpt2, or a new char or word tokenizer of the data."""
    made_here = {"char": CharTokenizer, "word": WordTokenizer}
    if config.tokenizer in made_here:
        return made_here[config.tokenizer].train(texts(config.data))
    if config.tokenizer != "gpt2" and not Path(config.tokenizer).exists():
        raise FileNotFoundError(f"--tokenizer {config.tokenizer} does not exist; make it with: python tokenizer.py")
    return load_tokenizer(config.tokenizer)


@torch.no_grad()
def evaluate_loss(model, windows, batch_size=32, context=contextlib.nullcontext()):
    """Return (mean loss in nats a token, number of tokens) over every window once, shared among the processes."""
    was_training = model.training
    model.eval()
    total, count, mine = 0.0, 0, share(torch.arange(len(windows)))
    passes = together(math.ceil(len(mine) / batch_size), "max")  # sharded, all must compute each block as often
    for start in range(0, passes * batch_size, batch_size):
        ids, targets = (t.to(model.device) for t in windows.batch(mine[start : start + batch_size]))
        with context:
            logits = model(ids)
        total += next_token_loss(logits, targets).item()
        count += (targets != gpt.IGNORE).sum().item()
    model.train(was_training)
    total, count = together(total), together(count)
    return total / count, count


def bits_per_byte(loss, info):
    """Return a loss in nats a token as bits per byte of the text whose counts `info` holds."""
    return loss / math.log(2) * info["tokens"] / info["bytes"]


def sample_text(model, tokenizer, config):
    """Return what the model writes after --sample_prompt, drawn from the same random numbers at every evaluation."""
    ids = tokenizer.encode(config.sample_prompt) or [0 if tokenizer.eot_id is None else tokenizer.eot_id]
    generator = torch.Generator(device=model.device).manual_seed(config.seed)
    ids = torch.tensor([ids], device=model.device)
    new = gpt.generate(model, ids, config.sample_tokens, 0.8, eos_id=tokenizer.eot_id, generator=generator)
    new = [i for i in new[0, ids.shape[1] :].tolist() if i != tokenizer.eot_id]
    return config.sample_prompt + tokenizer.decode(new)


def evaluate_and_keep(run, model, tokenizer, windows, context):
    """Evaluate on the whole validation split, keep the weights if they are the best so far, log and draw it all."""
    loss, _ = evaluate_loss(model, windows, context=context)
    better = run.count_evaluation(loss)
    model = whole_model(model)
    if is_first():
        write_evaluation(run, model, tokenizer, loss, better)
    wait()
    if run.step < run.total:
        run.loss_sum, run.count = 0.0, 0


def write_evaluation(run, model, tokenizer, loss, better):
    """Log, show and draw an evaluation with a sample, and keep the weights if they are the best."""
    text = sample_text(model, tokenizer, run.config) if run.config.sample_tokens else ""
    run.log(val_loss=loss, **({"train_loss": run.loss_sum / run.count} if run.count else {}), sample=text)
    if better:
        made = {"stage": run.stage, "step": run.step, "val_loss": loss, "data_sha256": run.data_sha256}
        gpt.save_checkpoint(run.folder / "model.safetensors", model, tokenizer, **made)
    print(f"step {run.step}/{run.total}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 50)):.2f}"
          + ("  best" if better else ""), file=sys.stderr)
    if run.config.sample_tokens:
        print(f"  sample: {' '.join(text.split())}", file=sys.stderr)
        run.write_samples(f"--- step {step}\n{text}\n" for step, text in run.metrics("sample"))
    draw_curves(run.folder / "curves.svg", "Pretraining", run.curves({"train": "loss", "validation": "val_loss"}))


def windows_of(config, path, length):
    """Return the windows of a token file; raises ValueError that names the part of --data which is too short."""
    try:
        return SlidingWindowDataset(load_tokens(path), length, length)
    except ValueError as error:
        raise ValueError(f"the {path.stem} part of {config.data}: {error}") from None


def train(config):
    """Pretrain a model as `config` says and return the summary, a dict that summary.json holds too."""
    device = pick_device(config.device)
    context = autocast(config, device)
    total_steps(config, 1)  # refuses a run without end before any work
    if config.init != "scratch":
        check_sizes(config, "tokenizer")
    torch.manual_seed(config.seed)
    if config.init == "scratch":
        tokenizer = first(pretraining_tokenizer, config)
        model = new_model(config, tokenizer)
    else:
        model, tokenizer, _ = first(load_writer, config, "python train.py")  # its weights know no other tokenizer
    folder = first(prepare, config.data, tokenizer)
    model = shard(model, device) if config.fsdp else model.to(device)
    config = copy.copy(config)  # the caller's stays as it is
    config.learning_rate = default_rate(config, model) if config.learning_rate < 0 else config.learning_rate
    length = model.config.context_length
    windows, val_windows = (windows_of(config, folder / f"{part}.bin", length) for part in ("train", "val"))
    run = Run(config, "pretrain")
    if summary := run.finished():
        return summary
    per_epoch = math.ceil(len(windows) / config.batch_size)
    optimizers = make_optimizers(model, config)
    run.start(model, optimizers, total_steps(config, per_epoch), token_info(folder / "train.bin")["sha256"])
    forward = torch.compile(model) if config.compile else model
    pieces = torch.tensor_split if config.fsdp else torch.chunk  # sharded, all must compute each block as often
    evaluate_now = functools.partial(evaluate_and_keep, run, model, tokenizer, val_windows, context)
    model.train()
    if run.step == 0:
        evaluate_now()
    for epoch in range(run.step // per_epoch, math.ceil(run.total / per_epoch)):  # 1. each epoch
        order = epoch_order(len(windows), config.seed, epoch)
        for batch in run.batches(order, config.batch_size):  # 2. each batch, of several processes this one's share
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            all_ids, all_targets = (t.to(device, non_blocking=True) for t in windows.batch(batch))
            batch_loss, tokens = 0.0, together((all_targets != gpt.IGNORE).sum().item())
            for ids, targets in zip(*(pieces(t, config.accumulate) for t in (all_ids, all_targets))):
                with context:
                    logits = forward(ids)
                loss = next_token_loss(logits, targets) / tokens  # 4. loss
                loss.backward()  # 5. backward
                batch_loss += loss.item()
            batch_loss = together(batch_loss)
            norm, rate = run.update(batch_loss, tokens)  # 6. clip, set the rate, update
            run.report(batch_loss, norm, rate, tokens)  # 7. report
            if run.due(config.eval_every):  # 8. evaluate, sample, save
                evaluate_now()
            run.end_step()
    summary = run.finish(train_loss=run.loss_sum / max(1, run.count), val_loss=run.best_value, tokens=run.tokens,
                         bits_per_byte=bits_per_byte(run.best_value, token_info(folder / "val.bin")),
                         parameters=sum(p.numel() for p in model.parameters()))
    print(f"pretrained: validation loss {summary['val_loss']:.4f}, perplexity {math.exp(summary['val_loss']):.2f}, "
          f"{summary['bits_per_byte']:.3f} bits a byte, {summary['seconds']:.0f} s; {run.folder}/model.safetensors")
    return summary


def evaluate(config):
    """Print and return a checkpoint's loss, perplexity and bits per byte on the validation split of --data."""
    device = pick_device(config.device)
    model, tokenizer = gpt.load_for_cli(config.checkpoint or f"{config.out_dir}/model.safetensors", device)
    folder = prepare(config.data, tokenizer)
    length = config.context_length or model.config.context_length
    windows = windows_of(config, folder / "val.bin", length)
    loss, tokens = evaluate_loss(model, windows, context=autocast(config, device))
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens,
               "bits_per_byte": bits_per_byte(loss, token_info(folder / "val.bin"))}
    print("  ".join(f"{key} {value:,}" if key == "tokens" else f"{key} {value:,.4f}" for key, value in figures.items()))
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The report: one page made of what the stages wrote

STAGES = {  # folder: (make target, heading, what it did)
    "tokenizer": ("tokenizer", "Tokenizer", "Joined the most frequent neighbours, from single bytes on, into tokens."),
    "pretrain": ("pretrain", "Pretraining", "Learned, from random weights, to predict the next token of plain text."),
    "cls": ("classify", "Classification", "Got a head that scores classes, not tokens, and learned labelled texts."),
    "sft": ("sft", "Instruction tuning", "Learned from questions with answers to answer, and to stop after it."),
    "lora": ("lora", "LoRA", "Tuned small matrices beside frozen weights, and compared that with tuning all weights."),
    "reward": ("rlhf", "Reward model", "Learned from pairs of answers to score which of the two is preferred."),
    "ppo": ("rlhf", "PPO", "Wrote answers and made those likelier that the reward model scores high, near its start."),
    "dpo": ("rlhf-all", "DPO", "Learned from the pairs directly, without reward model and without writing answers."),
    "grpo": ("rlhf-all", "GRPO", "As PPO, but with other answers to the same prompt in the place of a value model."),
}
FIGURES = (  # (stages, what, key, format, then (baseline, key) ...); a stage's first is the terminal's
    ("tokenizer", "bytes a token, sentence below", "bytes_a_token", ".2f", ("single bytes", "one")),
    ("pretrain", "validation loss, nats a token", "val_loss", ".3f", ("untrained", "untrained_loss")),
    ("pretrain", "bits a byte", "bits_per_byte", ".3f"),
    ("cls", "accuracy", "test_accuracy", ".1%", ("naive Bayes", "naive_bayes_accuracy"),
     ("most frequent class", "majority_accuracy")),
    ("cls", "F1", "test_f1", ".3f", ("naive Bayes", "naive_bayes_f1")),
    ("sft", "exact match", "exact_match", ".1%", ("before", "exact_match_before"),
     ("nearest example", "nearest_example_exact_match")),
    ("sft", "exact match, unseen words", "exact_match_unseen_words", ".1%"),
    ("lora", "test score, adapters", "adapter_score", ".1%", ("all weights", "full_score")),
    ("lora", "trainable parameters", "adapter_trainable_parameters", ",", ("all weights", "full_trainable_parameters")),
    ("reward", "pairs put right", "accuracy", ".1%", ("by length", "length_baseline_accuracy"),
     ("naive Bayes", "naive_bayes_accuracy")),
    ("reward", "of these, without wrong labels", "accuracy_noise_free", ".1%"),
    ("ppo dpo grpo", "gold score", "gold_after", ".2f", ("before", "gold_before")),
    ("ppo dpo grpo", "reward", "reward_after", ".2f", ("before", "reward_before")),
    ("ppo dpo grpo", "exact match", "exact_match_after", ".1%", ("before", "exact_match_before")),
    ("ppo dpo grpo", "KL to its start, nats a response", "kl", ".2f"),
)
HEAD = ("stage", "held out", "value", "95% interval", "beside it")
SENTENCE = "Tom has a red ball and Mia has a blue one."  # what tokenizer and attention are shown on
KEYS = {"gold": "gold_after", "reward": "reward_after", "exact": "exact_match_after", "kl": "kl"}  # of evaluation.json
# The policy keeps the page from loading or running anything, whatever a run folder holds.
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A language model, stage by stage</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{css}</style></head>
<body><h1>A language model, stage by stage</h1>"""
CSS = """:root{--fg:#1b1f24;--soft:#59626d;--bg:#fff;--line:#d8dce2;--a:37 99 235;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--fg:#e3e6ea;--soft:#9aa4b0;--bg:#111418;--line:#343b45;--a:96 165 250}
figure polyline,svg rect{filter:brightness(1.4)}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:66rem;margin:auto;padding:1rem}
section{border-top:1px solid var(--line);margin-top:2rem;padding-top:1rem}h1,h2{line-height:1.2;margin:1rem 0 .3rem}
a{color:rgb(var(--a));margin-right:1rem}summary,th,figcaption{color:var(--soft);font-weight:400;font-size:.86rem}
div{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0;font-size:.93rem}th,td{text-align:left;
vertical-align:top;padding:.35rem 1.4rem .35rem 0;border-bottom:1px solid var(--line);white-space:pre-line}
figure{display:grid;gap:1.5rem;margin:1rem 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
figure svg{width:100%;max-width:42rem}figure text{font-size:14px;font-family:system-ui,sans-serif;fill:currentColor}
.g{stroke:var(--line)}code{line-height:2.1;white-space:pre-wrap}.facts td+td{overflow-wrap:anywhere}
.s td{max-width:22rem;overflow-wrap:break-word}
code span{padding:.25em .1em;border-radius:3px}
@media(max-width:640px){figure text{font-size:20px}.s tr{display:block;border-bottom:1px solid var(--line);
padding:.6rem 0}.s tr:first-child,.s td:empty{display:none}.s td{display:grid;grid-template-columns:6rem 1fr;
border:0;padding:0;max-width:none;overflow-wrap:anywhere}
.s td::before{content:attr(data-of);color:var(--soft);font-size:.86rem}}"""


def read_rows(path, missing=None):
    """Return a JSON file's value, or the list of a .jsonl file's; raises ValueError that names a damaged file."""
    if not path.is_file():
        return missing
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder and run its stage again") from None


def finished_stages(root):
    """Return {stage: its summary, a dict} of the finished runs in a folder, with what else the page shows of them."""
    found = {stage: read_rows(root / stage / "summary.json") for stage in STAGES}
    if (root / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(root / "tokenizer" / "tokenizer.json")
        rate = len(SENTENCE.encode()) / max(1, len(tokenizer.encode(SENTENCE)))
        found["tokenizer"] = {"config": tokenizer.made, "bytes_a_token": rate, "one": 1, "tokenizer": tokenizer}
    found = {stage: summary for stage, summary in found.items() if summary}
    for name, run in found.get("lora", {}).get("runs", {}).items():
        name = "full" if name == "full" else "adapter"
        found["lora"].update({f"{name}_{key}": value for key, value in run.items()})
    for stage, summary in found.items():
        summary["log"] = read_rows(root / stage / "metrics.jsonl", [])
        if stage == "pretrain" and summary["log"]:
            summary["untrained_loss"] = summary["log"][0].get("val_loss")
        summary.update(read_rows(root / stage / "evaluation.json", {}))
        for other, columns in summary.get("rows", {}).items():
            fewer = summary["prompts"] < found.get(other, {}).get("test_prompts", math.inf)  # than its own run had
            for column in () if fewer else KEYS.keys() & columns.keys():
                mean, half = columns[column]
                found[other] |= {KEYS[column]: mean, KEYS[column] + "_interval": (mean - half, mean + half)}
    return found


def results(found):
    """Return [(stage, what, value, interval, baselines)], in words, of the held-out figures."""
    rows = []
    for stage, row in ((stage, row) for stage in found for row in FIGURES if stage in row[0].split()):
        summary, (_, what, key, form, *others) = found[stage], row
        spread, bounds = summary.get(key + "_std"), summary.get(key + "_interval", ())
        bounds = f"sd {spread:{form}} over seeds" if spread else " to ".join(format(bound, form) for bound in bounds)
        beside = [f"{name} {summary[other]:{form}}" for name, other in others if summary.get(other) is not None]
        if (value := summary.get(key + "_mean", summary.get(key))) is not None:
            rows.append((STAGES[stage][1], what, format(value, form), bounds, ", ".join(beside)))
    return rows


def table(head, rows, kind="s"):
    """Return rows of text as an HTML table, escaped; of kind "s" each row becomes a list on a phone."""
    escape = html.escape
    lines = ["".join(f'<td data-of="{escape(name)}">{escape(str(cell))}</td>' for name, cell in zip(head, row))
             for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div><table class="{kind}">{"".join(f"<tr>{line}</tr>" for line in (head, *lines))}</table></div>'


def pictures(folder):
    """Return a run's SVG files, or its parts' curves, for the page, whose style takes the place of their own."""
    out = []
    for path in sorted(folder.glob("*.svg")) or sorted(folder.glob("*/curves.svg")):
        svg = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        part = "" if path.parent == folder else html.escape(path.parent.name)
        out.append(f"<div><figcaption>{part}</figcaption>{svg}</div>")
    return f"<figure>{''.join(out)}</figure>"


def attention(path):
    """Return where the last layer of a model looks, four heads at most, drawn by gpt.py."""
    model, tokenizer = gpt.load_for_cli(path)
    ids = tokenizer.encode(SENTENCE)[: model.config.context_length]
    weights = gpt.attention_maps(model, torch.tensor([ids]))[-1][0, :4].detach()
    pieces = [tokenizer.decode([i]) for i in ids]
    return f"<div>{gpt.attention_svg(weights, pieces, 'Its last layer: blue is where the token of a row looks')}</div>"


def answers(path, questions, device):
    """Return what a model answers, greedily, to (instruction, input) pairs."""
    model, tokenizer, made = gpt.load_checkpoint(path, device)
    tokenizer, found = from_dict(tokenizer), []
    for question in questions:
        prompt = format_prompt(dict(zip(("instruction", "input"), question)), made.get("template", "plain"))
        ids = torch.tensor([tokenizer.encode(prompt)], device=device)
        new = gpt.generate(model, ids, 64, 0, eos_id=tokenizer.eot_id)[0, ids.shape[1] :].tolist()
        found.append(tokenizer.decode([i for i in new if i != tokenizer.eot_id]).strip())
    return found


def same_questions(root, device):
    """Return a table of held-out questions, one of a kind: the reference, and what each stage's model answers."""
    before, after = ({(row["instruction"], row["input"]): row for row in read_rows(root / "sft" / name, [])}
                     for name in ("responses.before.json", "responses.json"))
    kinds = {}  # words that training never saw in a kind have a figure of their own and come last here
    for n, (question, row) in enumerate(sorted(before.items(), key=lambda item: bool(item[1].get("unseen")))):
        if question in after:
            kinds.setdefault(row.get("kind", n), question)
    asked = list(kinds.values())[:13]
    columns = {"question": ["\n".join(filter(None, question)) for question in asked],
               "reference": [after[question]["reference"] for question in asked]}
    for name, rows in ("pretrained", before), ("SFT", after):
        columns[name] = [rows[question]["response"] for question in asked]
    for stage in ("ppo", "dpo", "grpo") if asked else ():
        if (path := root / stage / "model.safetensors").is_file():
            columns[STAGES[stage][1]] = answers(path, asked, device)
    return table(columns, zip(*columns.values())) if asked else ""


def section(root, stage, summary):
    """Return one stage's part of the page."""
    parts = [f'<section id="{stage}"><h2>{STAGES[stage][1]}</h2><p>{STAGES[stage][2]}</p>{pictures(root / stage)}']
    if stage == "tokenizer":
        pieces = map(summary["tokenizer"].tokens.__getitem__, summary["tokenizer"].encode(SENTENCE))
        spans = (f'<span style="background:{colour}55">{html.escape(show(piece))}</span>'
                 for piece, colour in zip(pieces, itertools.cycle(COLOURS)))
        parts.append(f"<code>{''.join(spans)}</code>")
    if samples := [row for row in summary["log"] if row.get("sample")]:
        first_last = samples[:: len(samples) - 1 or 1]
        parts.append(table([f"at step {row['step']}" for row in first_last], [[row["sample"] for row in first_last]]))
    if stage == "pretrain" and (root / stage / "model.safetensors").is_file():
        parts.append(attention(root / stage / "model.safetensors"))
    if labels := "test_confusion" in summary and summary["labels"]:
        parts.append(table(("messages", *(f"said {label}" for label in labels)),
                           [(f"is {label}", *row) for label, row in zip(labels, summary["test_confusion"])], "matrix"))
    if kinds := summary.get("exact_match_by_kind"):
        kinds = ", ".join(f"{kind} {rate:.0%}" for kind, rate in kinds.items())
        parts.append(f"<p>Right by kind of question: {html.escape(kinds)}.</p>")
    if samples := summary.get("samples"):
        parts.append(table(samples[0], [sample.values() for sample in samples[:8]]))
    facts = {**summary, **summary.get("data", {}), **summary.get("versions", {}), **summary.get("config", {})}
    facts = [(key, fact) for key, fact in facts.items() if isinstance(fact, (str, int, float))]
    facts = table(("what", "value"), facts, "facts")
    return "".join(parts) + f"<details><summary>command, time, options, versions</summary>{facts}</details></section>"


def report(config):
    """Write report.html beside the runs of --out_dir (default: out), print a figure of each stage; return its path."""
    root = Path("out" if config.out_dir == Config.out_dir else config.out_dir)
    found = finished_stages(root)
    if not found:
        raise FileNotFoundError(f"{root} holds no finished stage to report on; make them all with: make")
    rows, seconds = results(found), sum(summary.get("seconds", 0) for summary in found.values())
    missing = [f"{title} (make {target})" for stage, (target, title, _) in STAGES.items() if stage not in found]
    nav = " ".join(f'<a href="#{stage}">{STAGES[stage][1]}</a>' for stage in found)
    questions = same_questions(root, pick_device(config.device))
    page = [PAGE.format(css=CSS), f"<p>Made in {seconds / 60:.1f} minutes of training.",
            f"Not made yet: {', '.join(missing)}." if missing else "", f"</p><nav>{nav}</nav><h2>Held-out results</h2>",
            table(HEAD, rows), f"<h2>The same questions to every model</h2>{questions}" if questions else "",
            *(section(root, stage, summary) for stage, summary in found.items()), "</body></html>"]
    with replacing(root / "report.html") as file:
        file.write("\n".join(page).encode("utf-8", "replace"))
    firsts = {row[0]: row for row in reversed(rows)}
    for row in (HEAD, *reversed(firsts.values())):
        print("{:<20}{:<31}{:>7}  {:<18}{}".format(*row).rstrip())
    print(f"\n{root / 'report.html'}" + (f"; not made yet: {', '.join(missing)}" if missing else ""))
    return root / "report.html"


def main(argv=None):
    """Run the command line and return its exit status."""
    return run_script(__doc__, Config, {"train": train, "evaluate": evaluate, "report": report}, argv,
                      parallel=("train",))


if __name__ == "__main__":
    sys.exit(main())
