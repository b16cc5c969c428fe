"""Benchmarks beside other projects, run by hand and never as tests: one process per side, the two taking turns.

    python tests/bench.py                    every row: 20 minutes on 2 cores that do nothing else
    python tests/bench.py bpe step           some rows; --list names them all, --quick shrinks them to see that they run
    python tests/bench.py --gpu              bfloat16, compiled, on a GPU; says so where there is none

Prints a line for each comparison. A run of all rows in which every side was there and ran also writes assets/bench.md.
Peers are the packages of requirements-peers.txt and nanoGPT: NANOGPT names a checkout. An absent peer is named as such.

A side is a function that prepares its work and returns `block`, which does it once and returns how much that was and
what came out. Both sides stand ready in processes of their own, in the same environment and with the same settings for
memory (gpt.keep_freed_memory in both). After a warm-up that is not counted they take turns in the order A B B A; a
ratio is of two neighbors, the peer's seconds over ours, and the median counts. It counts only if both came to the same
result: token files and tokens equal, losses within 1e-4. Both have the same weights, drawn from each tensor's name.
"""

import argparse
import array
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpt  # first, because it filters torch's warning about numpy
import torch
import torch.nn.functional as F

SMALL = dict(vocab_size=65, context_length=64, emb_dim=128, n_heads=4, n_layers=4, exact_gelu=True)  # as nanoGPT
GPT2 = dict(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12)
MIDDLE = dict(vocab_size=8192, context_length=320, emb_dim=192, n_heads=6, n_layers=4)
TOY = dict(vocab_size=64, context_length=64, emb_dim=64, n_heads=2, n_layers=2)
QUICK = dict(vocab_size=512, context_length=320, emb_dim=32, n_heads=2, n_layers=2)  # in GPT-2's place with --quick

# ---------------------------------------------------------------------------------------------------------------------
# The same model, data and training step on every side

NAMES = (("transformer.", ""), ("base_model.model.", ""), (".base_layer", ""), (".default.weight", ""),
         ("tok_emb", "wte"), ("pos_emb", "wpe"), ("trf_blocks", "h"), ("final_norm", "ln_f"), (".ln1", ".ln_1"),
         (".ln2", ".ln_2"), ("attn.qkv", "attn.c_attn"), ("attn.out_proj", "attn.c_proj"), ("ffn.fc1", "mlp.c_fc"),
         ("ffn.fc2", "mlp.c_proj"))
TURNED = ("c_attn", "c_proj", "c_fc")  # transformers stores these as (in, out)


def same_weights(model, std=0.02, turned=()):
    """Return the model with weights drawn from each tensor's name, equal in all projects; `turned` are (in, out)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for theirs, short in NAMES:
                name = name.replace(theirs, short)
            turn = any(part + ".weight" in name for part in turned)
            values = torch.randn(parameter.shape[:: -1 if turn else 1],
                                 generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            center = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            if "lora_B" not in name:  # new adapters change nothing yet
                parameter.copy_(center + std * (values.t() if turn else values))
    return model


def our_model(size, std=0.02):
    """Return a GPTModel of this size."""
    return same_weights(gpt.GPTModel(gpt.GPTConfig(**size, drop_rate=0.0, qkv_bias=True, tie_weights=True)), std)


def nano_model(size, std=0.02):
    """Return nanoGPT's model of this size."""
    sys.path.insert(0, os.environ["NANOGPT"])
    from model import GPT, GPTConfig
    return same_weights(GPT(GPTConfig(size["context_length"], size["vocab_size"], size["n_layers"], size["n_heads"],
                                      size["emb_dim"], dropout=0.0, bias=True)), std)


def hf_model(size, std=0.02, kind="GPT2LMHeadModel", **more):
    """Return transformers' GPT-2 of this size."""
    import transformers
    config = transformers.GPT2Config(
        vocab_size=size["vocab_size"], n_positions=size["context_length"], n_embd=size["emb_dim"],
        n_layer=size["n_layers"], n_head=size["n_heads"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **more)
    return same_weights(getattr(transformers, kind)(config), std, TURNED)


def random_ids(*shape, below):
    """Return token ids of this shape, the same in every process."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def source_text(size):
    """Return about `size` characters of the standard library's source, a list with a string per file."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if total < size and not {"test", "tests", "site-packages", "idle_test"} & set(path.parts):
            texts.append(path.read_text(encoding="utf-8", errors="replace")[: size - total])
            total += len(texts[-1])
    return texts


def training(model, optimizers, loss_of, batches):
    """Return a block of training steps, one for each of `batches`, which `loss_of(*batch)` takes."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]

    def block():
        losses = []
        for batch in batches:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
        return len(batches), losses

    block.state = lambda: sum(tensor.numel() * tensor.element_size() for optimizer in optimizers for tensor in (
        *(p.grad for p in trained), *(t for state in optimizer.state.values() for t in state.values())))
    return block


def adamw(model, rate):
    """Return the optimizer of a peer that brings none of its own: fused AdamW, matrices with weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.optim.AdamW([dict(params=[p for p in trained if p.dim() > 1], weight_decay=0.1),
                               dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)],
                              lr=rate, betas=(0.9, 0.95), fused=True)]


def our_training(model, batches, rate):
    """Return a block of steps as train.py does them, with AdamW."""
    import train
    config = train.Config(optimizer="adamw", learning_rate=rate)
    return training(model, train.make_optimizers(model, config),
                    lambda ids, targets: train.next_token_loss(model(ids), targets) / targets.numel(), batches)


def nano_training(model, batches, rate, device="cpu"):
    """Return a block of steps as nanoGPT's train.py does them."""
    optimizer = model.configure_optimizers(0.1, rate, (0.9, 0.95), device)
    return training(model, [optimizer], lambda ids, targets: model(ids, targets)[1], batches)


def hf_training(model, batches, rate):
    """Return a block of steps with transformers' own loss."""
    return training(model, adamw(model, rate), lambda ids, targets: model(
        input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss, batches)


def batches_of(size, rows, length, count):
    """Return `count` batches of random tokens, pairs (ids, targets) of shape (rows, length)."""
    ids = random_ids(count, rows, length + 1, below=size["vocab_size"])
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]


# ---------------------------------------------------------------------------------------------------------------------
# The work of each side


def bpe_ours(quick):
    """10 MB of source, 8,192 tokens."""
    from tokenizer import BPETokenizer
    texts, vocabulary = source_text(500_000 if quick else 10_000_000), 1024 if quick else 8192

    def block():
        merges = BPETokenizer.train(texts, vocabulary, special_tokens=()).merges
        return sum(map(len, texts)) / 1e6, digest("\n".join(merges))

    return block


def hf_bpe(texts, vocabulary):
    """Return a byte-level tokenizer trained by Hugging Face's tokenizers."""
    import tokenizers
    level, bpe = tokenizers.pre_tokenizers.ByteLevel, tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = level(add_prefix_space=False)
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=level.alphabet(), show_progress=False))
    return bpe


def bpe_tokenizers(quick):
    """The same text, by the Rust trainer."""
    texts, vocabulary = source_text(500_000 if quick else 10_000_000), 1024 if quick else 8192

    def block():
        merges = json.loads(hf_bpe(texts, vocabulary).to_str())["model"]["merges"]
        return sum(map(len, texts)) / 1e6, digest("\n".join(map(" ".join, merges)))

    return block


def tokens_text(quick):
    """Return (texts to train a tokenizer on, the path of the text file to encode)."""
    path = Path(scratch(), "text.txt")
    path.write_text("".join(source_text(250_000 if quick else 5_000_000)), encoding="utf-8", newline="\n")
    return source_text(100_000 if quick else 2_000_000), path


def tokens_ours(quick):
    """data.prepare: a text file into train.bin and val.bin of 16-bit tokens, with checksums."""
    import data
    from tokenizer import BPETokenizer
    texts, path = tokens_text(quick)
    bpe, data.PREPARED = BPETokenizer.train(texts, 4096, special_tokens=()), path.parent / "prepared"

    def block():
        shutil.rmtree(data.PREPARED, ignore_errors=True)
        folder = data.prepare(path, bpe)
        return path.stat().st_size / 1e6, lambda: digest(*(folder / f"{part}.bin" for part in ("train", "val")))

    return block


def tokens_tokenizers(quick):
    """The same files without checksums, the text in pieces for encode_batch_fast, which uses every core."""
    texts, path = tokens_text(quick)
    bpe = hf_bpe(texts, 4096)

    def block():
        text = path.read_text(encoding="utf-8")
        border, files = len(text) * 9 // 10, [path.with_name("train.bin"), path.with_name("val.bin")]
        for file, part in zip(files, (text[:border], text[border:])):
            pieces = re.findall(r"(?s).{1,20000}\S(?=\s)|.+", part)  # cut where no pre-token spans the place
            ids = itertools.chain.from_iterable(e.ids for e in bpe.encode_batch_fast(pieces))
            file.write_bytes(array.array("H", ids))
        return path.stat().st_size / 1e6, lambda: digest(*files)

    return block


def steps(quick, make, block, size=SMALL, rows=12, length=64, count=20, rate=1e-3):
    """Training steps on random tokens: `make` is the model's side, `block` the training's."""
    size, count = (QUICK, 2) if quick else (size, count)
    return block(make(size), batches_of(size, rows, length, count), rate)


def steps124(quick, make, block):
    """GPT-2 124M, one row of 256 tokens: 2 steps."""
    return steps(quick, make, block, GPT2, 1, 256, 2, 1e-4)


def lora(quick, by, make=our_model):
    """2 steps of a 124M model, 1 x 256 tokens, with adapters of rank 8 on the blocks' linear layers, or all weights."""
    model, theirs = make(QUICK if quick else GPT2), make is hf_model
    if by == "ours":
        from lora import apply_lora
        apply_lora(model, rank=8, alpha=32.0, dropout=0.0)
    elif by == "peft":
        from peft import LoraConfig, get_peft_model
        targets = TURNED if theirs else ("qkv", "out_proj", "fc1", "fc2")
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=list(targets),
                                                 fan_in_fan_out=theirs))
    same_weights(model, turned=TURNED if theirs else ())  # also the adapters

    def loss_of(ids, targets):
        logits = model(ids)
        return F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), targets.flatten())

    return training(model, adamw(model, 1e-4), loss_of, batches_of(QUICK if quick else GPT2, 1, 256, 2))


SFT_ROWS, SFT_LENGTH, END = 16, 257, MIDDLE["vocab_size"] - 1  # examples per update, tokens of the longest, stop token


def sft_examples(quick):
    """Return 256 pairs (ids, length of the prompt, half of them) of 16 to 256 tokens."""
    lengths = torch.randint(16, 257, (32 if quick else 256,), generator=torch.Generator().manual_seed(2)).tolist()
    ids = random_ids(len(lengths), 256, below=END).tolist()
    return [(row[:length], length // 2) for row, length in zip(ids, lengths)]


def sft_ours(quick):
    """An epoch of instruction tuning as finetune_sft.py does it; the check is the loss of the first 16 examples."""
    import data
    import finetune_sft
    import train
    model, items = our_model(MIDDLE), sft_examples(quick)
    config = finetune_sft.Config(optimizer="adamw", learning_rate=1e-4, weight_decay=0.0)

    def loss_of(*some):
        some = [([*ids, END], [0] * start + [1] * (len(ids) + 1 - start)) for ids, start in some]
        ids, targets = data.collate(some, 0, SFT_LENGTH, END)
        loss = finetune_sft.response_loss(model.hidden, model.out_head, ids, targets)
        return loss / (targets != gpt.IGNORE).sum()

    order = data.order_by_length([len(ids) for ids, _ in items], SFT_ROWS, config.seed, 0).split(SFT_ROWS)
    batches = [[items[i] for i in indices] for indices in order]
    epoch = training(model, train.make_optimizers(model, config), loss_of, batches)
    with torch.no_grad():
        before = [loss_of(*items[:SFT_ROWS]).item()]
    return lambda: (sum(len(ids) - start + 1 for ids, start in items), epoch() and before)


def sft_trl(quick):
    """The same epoch by TRL's SFTTrainer."""
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    items = sft_examples(quick)
    rows = datasets.Dataset.from_list([{"input_ids": [*ids, END], "completion_mask": [0] * start + [1] * (
        len(ids) + 1 - start)} for ids, start in items])
    args = SFTConfig(output_dir=scratch(), per_device_train_batch_size=SFT_ROWS, num_train_epochs=1,
                     learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0, max_length=SFT_LENGTH,
                     completion_only_loss=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
                     report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
                     dataloader_pin_memory=False)
    trainer = SFTTrainer(hf_model(MIDDLE, use_cache=False), args, train_dataset=rows,
                         processing_class=PreTrainedTokenizerFast(tokenizer_object=words(END), pad_token="w0",
                                                                  eos_token=f"w{END}"))
    first = trainer.data_collator([{**row, "labels": [i if m else -100 for i, m in zip(
        row["input_ids"], row["completion_mask"])]} for row in rows.select(range(SFT_ROWS)).to_list()])
    with torch.no_grad():
        before = [trainer.compute_loss(trainer.model, first).item()]

    def block():
        trainer.train()
        return sum(len(ids) - start + 1 for ids, start in items), before

    return block


def words(last, extra=()):
    """Return a tokenizer of the words w0 to w<last> and some more, as transformers wants one."""
    import tokenizers
    names = [f"w{i}" for i in range(last + 1)] + list(extra)
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))


PROMPT, NEW, SPREAD = 32, 128, 0.06  # SPREAD: weights so large that a random model does not repeat one token


def prompt_loss(model, ids):
    """Return [loss on the prompts], which is compared where rounded weights choose other tokens in time."""
    with torch.no_grad():
        logits = model(ids)
    return [F.cross_entropy(getattr(logits, "logits", logits)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()]


def greedy(quick, make, generate, device="cpu", dtype=torch.float32, rounded=False):
    """A prompt of 32 tokens and 128 more, greedily."""
    size, new = (QUICK, 16) if quick else (GPT2, NEW)
    model, ids = make(size, SPREAD).to(device, dtype).eval(), random_ids(1, PROMPT, below=512).to(device)
    before = prompt_loss(model, ids) if rounded else None

    def block():
        tokens = generate(model, ids, new)[0, PROMPT:].tolist()
        return len(tokens), before or tokens

    return block


def our_tokens(model, ids, new, mask=None):
    """Return the prompts and `new` tokens, greedily."""
    return gpt.generate(model, ids, new, temperature=0, mask=mask)


def hf_tokens(model, ids, new, mask=None):
    """The same by transformers, with its cache."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new,
                          do_sample=False, pad_token_id=0)


def int8_model(size, std=0.02):
    """Return our model with its weights in int8."""
    return gpt.int8_linears(our_model(size, std))


def llama_q8(quick):
    """The same by llama.cpp with weights in q8_0, from the file that we export; the check is its loss on the prompt."""
    import llama_cpp
    from gpt2_weights import export_gguf
    from tokenizer import BPETokenizer, load_tokenizer
    size, new = (QUICK, 16) if quick else (GPT2, NEW)
    tokenizer = BPETokenizer.train(source_text(60_000), size["vocab_size"]) if quick else load_tokenizer("gpt2")
    path, ids = Path(scratch(), "model.gguf"), random_ids(1, PROMPT, below=512)[0].tolist()
    export_gguf(our_model(size, SPREAD), path, tokenizer, "q8_0")
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=torch.get_num_threads(), logits_all=True, verbose=False)
    llama.eval(ids)
    logits = torch.tensor(llama.scores[:PROMPT].tolist())
    before = [F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()]

    def block():
        tokens = llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        return len(list(itertools.islice(tokens, new))), before

    return block


def batch(quick, make, generate, rounded=False):
    """16 prompts of 8 to 64 tokens, padded on the left, and 48 more for each, greedily."""
    lengths = torch.tensor([8 + 56 * row // 15 for row in range(16)])
    mask = (torch.arange(64) >= 64 - lengths[:, None]).long()
    model, ids = make(QUICK if quick else GPT2, SPREAD).eval(), random_ids(16, 64, below=512) * mask
    before = prompt_loss(model, ids) if rounded else None

    def block():
        tokens = generate(model, ids, 48, mask)[:, 64:].flatten().tolist()
        return len(tokens), before or tokens

    return block


LIKED, STOP, PPO_ROWS, PPO_NEW = range(16, 32), 63, 32, 16  # the reward counts liked tokens; prompts hold none


def ppo_prompts():
    """Return 320 prompts of 3 to 8 tokens and the template's last one, 0, as lists of ids."""
    ids = (random_ids(320, 8, below=30) + 33).clamp(max=STOP - 1).tolist()
    return [[*row[: 3 + number % 6], 0] for number, row in enumerate(ids)]


def liked(prompts, responses):
    """Return the reward of each response: a quarter for each liked word."""
    return [sum(int(word[1:]) in LIKED for word in re.findall(r"w\d+", response)) / 4 for response in responses]


def ppo_ours(quick, updates=32):
    """A run of `rlhf.py ppo` from checkpoint to summary: 32 responses of 16 tokens per update, four passes."""
    import rlhf
    from tokenizer import EOT, UNK, WordTokenizer
    folder, numbers, updates, model = Path(scratch()), itertools.count(), 2 if quick else updates, our_model(TOY)
    vocabulary = [">", *(f"w{i}" if i != 32 else UNK for i in range(1, STOP)), EOT]  # no prompt holds 32
    gpt.save_checkpoint(folder / "start.safetensors", model, WordTokenizer(vocabulary), template="plain")
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": " ".join(f"w{i}" for i in ids[:-1])}) + "\n" for ids in ppo_prompts()), encoding="utf-8")
    config = rlhf.Config(
        data=str(folder / "prompts.jsonl"), init=str(folder / "start.safetensors"), reward="bench:liked",
        max_steps=updates, batch_size=PPO_ROWS, response_length=PPO_NEW, temperature=1.0, kl_coef=0.02, ppo_epochs=4,
        accumulate=1, max_approxkl=0.0, ptx_coef=0.0, no_stop_penalty=0.0, optimizer="adamw", learning_rate=1e-3,
        warmup_steps=0, schedule="constant", eval_every=0, save_every=0, eval_prompts=1, test_prompts=1, device="cpu")
    with torch.no_grad():
        before = model(random_ids(4, 20, below=62)).log_softmax(-1).mean().item()

    def block():
        rlhf.train_policy(replace(config, out_dir=str(folder / f"run{next(numbers)}")))
        return updates * PPO_ROWS, [before]

    return block


class Liked(torch.nn.Module):
    """The reward as a model in the form that TRL asks for: the count of liked tokens up to each position."""

    base_model_prefix = "counter"

    def __init__(self):
        super().__init__()
        self.counter, self.score = self.count, torch.nn.Identity()

    def count(self, input_ids, **ignored):
        """Return an object with hidden_states[-1] (B, T, 1)."""
        liked = (input_ids >= LIKED.start) & (input_ids < LIKED.stop)
        return SimpleNamespace(hidden_states=[liked.cumsum(1)[:, :, None] / 4])


def ppo_trl(quick, updates=32):
    """The same by TRL, whose value model is a second network; ours is a head on the policy's."""
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words(STOP, ["<pad>"]), eos_token=f"w{STOP}",
                                        pad_token="<pad>", padding_side="left")  # a pad beyond the model's vocabulary
    rows = datasets.Dataset.from_dict({"input_ids": ppo_prompts()})
    model, reference = hf_model(TOY), hf_model(TOY)
    critic = hf_model(TOY, kind="GPT2ForSequenceClassification", num_labels=1)
    episodes = PPO_ROWS * (2 if quick else updates)
    args = PPOConfig(output_dir=scratch(), per_device_train_batch_size=PPO_ROWS, total_episodes=episodes,
                     response_length=PPO_NEW, temperature=1.0, kl_coef=0.02, learning_rate=1e-3, num_ppo_epochs=4,
                     stop_token="eos", lr_scheduler_type="constant", use_cpu=True, bf16=False,
                     gradient_checkpointing=False, report_to="none", num_sample_generations=0, save_strategy="no",
                     disable_tqdm=True, logging_steps=1000)
    with torch.no_grad():
        before = model(random_ids(4, 20, below=62)).logits.log_softmax(-1).mean().item()
    trainer = PPOTrainer(args=args, processing_class=tokenizer, model=model, ref_model=reference,
                         reward_model=Liked(), value_model=critic, train_dataset=rows,
                         eval_dataset=rows.select(range(8)))

    def block():
        trainer.train()
        return episodes, [before]

    return block


def gpu_steps(quick, make):
    """GPT-2 124M, 12 rows of 1,024 tokens, compiled, in bfloat16: 10 steps."""
    import train
    model, ours = make(GPT2).cuda().train(), make is our_model
    forward = torch.compile(model)

    def loss_of(ids, targets):
        with torch.autocast("cuda", torch.bfloat16):
            out = forward(ids) if ours else forward(ids, targets)[1]
        return train.next_token_loss(out, targets) / targets.numel() if ours else out

    if ours:
        optimizers = train.make_optimizers(model, train.Config(optimizer="adamw", learning_rate=1e-4))
    else:
        optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cuda")]
    batches = [(ids.cuda(), targets.cuda()) for ids, targets in batches_of(GPT2, 12, 1024, 10)]
    block = training(model, optimizers, loss_of, batches)
    return lambda: (10 * 12 * 1024, block()[1])


# ---------------------------------------------------------------------------------------------------------------------
# The rows


class Row(NamedTuple):
    """One comparison: two sides, and the ratio (peer's seconds over ours) to reach."""

    name: str
    work: str
    unit: str  # what a block's amount counts
    ours: tuple  # a side: its function, and what that takes after `quick`
    peer_name: str
    peer: tuple
    needs: str  # packages, and variables that name checkouts
    target: float
    rounds: int = 5
    tolerance: float = 1e-4  # by which losses may differ


STEP = "step", "training step, 4 x 128, context 64, batch 12", "step", (steps, our_model, our_training)
STEP124 = "step124", "training step, GPT-2 124M, 1 x 256", "step", (steps124, our_model, our_training)
GREEDY = "greedy", "greedy generation, 124M, 32 + 128 tokens", "token", (greedy, our_model, our_tokens)
SFT = "sft", "instruction tuning, 256 examples of 16 to 256", "response token", (sft_ours,)
LORA = "lora", "LoRA step, rank 8, 124M, 1 x 256", "step", (lora, "ours")
ON_GPU = "cuda", torch.bfloat16
ROUNDED = "cpu", torch.float32, True
INT8 = "int8", "greedy generation, 124M in int8, 32 + 128", "token", (greedy, int8_model, our_tokens, *ROUNDED)
ROWS = [
    Row("bpe", "BPE training, 10 MB, 8,192 tokens", "MB", (bpe_ours,), "tokenizers", (bpe_tokenizers,), "tokenizers",
        0.9),
    Row("tokens", "text to token file, 5 MB, own merges", "MB", (tokens_ours,), "tokenizers", (tokens_tokenizers,),
        "tokenizers", 3.0, 7),
    Row(*STEP, "nanoGPT", (steps, nano_model, nano_training), "NANOGPT", 1.1, 11),
    Row(*STEP124, "nanoGPT", (steps124, nano_model, nano_training), "NANOGPT", 1.4),
    Row(*STEP124, "transformers", (steps124, hf_model, hf_training), "transformers", 1.15),
    Row(*GREEDY, "transformers", (greedy, hf_model, hf_tokens), "transformers", 1.0),
    Row("batch", "generation, 124M, 16 prompts of 8 to 64, + 48", "token", (batch, our_model, our_tokens),
        "transformers", (batch, hf_model, hf_tokens), "transformers", 1.0, 3),
    Row(*INT8, "transformers, float32", (greedy, hf_model, hf_tokens, *ROUNDED), "transformers", 2.8, tolerance=0.02),
    Row(*INT8, "llama.cpp, q8_0", (llama_q8,), "llama_cpp", 0.5, tolerance=0.02),
    Row("int8-batch", "124M in int8, 16 prompts of 8 to 64, + 48", "token", (batch, int8_model, our_tokens, True),
        "transformers, float32", (batch, hf_model, hf_tokens, True), "transformers", 3.5, 3, 0.02),
    Row(*SFT, "TRL", (sft_trl,), "trl transformers", 1.8, 3),
    Row(*LORA, "all weights", (lora, ""), "", 1.43, tolerance=math.nan),
    Row(*LORA, "PEFT, our model", (lora, "peft"), "peft", 1.0),
    Row(*LORA, "PEFT, transformers", (lora, "peft", hf_model), "peft transformers", 1.0),
    Row("ppo", "PPO, toy of 2 x 64, 32 x 16 tokens per update", "episode", (ppo_ours,), "TRL", (ppo_trl,),
        "trl transformers", 5.0, tolerance=math.nan),
]
GPU_ROWS = [
    Row("gpu-step", "training, 124M, bf16, 12 x 1,024", "token", (gpu_steps, our_model), "nanoGPT",
        (gpu_steps, nano_model), "NANOGPT", 1.1, 5, 2e-2),
    Row("gpu-greedy", "greedy generation, 124M, bf16", "token", (greedy, our_model, our_tokens, *ON_GPU),
        "transformers", (greedy, hf_model, hf_tokens, *ON_GPU), "transformers", 1.0),
]

# ---------------------------------------------------------------------------------------------------------------------
# Measuring: a process for each side, which does its block whenever a line comes in


def scratch():
    """Return a new folder for a side's files; the process that measures removes it."""
    return tempfile.mkdtemp(dir=os.environ.get("BENCH_SCRATCH"))


def digest(*parts):
    """Return a sha256 of texts and of files, which are paths, to compare what is too long to send."""
    contents = (part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts)
    return hashlib.sha256(b"".join(contents)).hexdigest()


def peak_memory():
    """Return the most memory that this process has held, in bytes; 0 where Linux does not tell."""
    status = Path("/proc/self/status")  # not getrusage, whose maximum starts from that of the parent process
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else 0


def key(row):
    """Return what tells a row from all others: [row, work, peer]."""
    return [row.name, row.work, row.peer_name]


def serve(side, quick):
    """Prepare a side, then for each line on stdin do its block once and print seconds, amount and check as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the side itself prints goes elsewhere
    gpt.keep_freed_memory()
    *names, which = side.split("|")  # row, work, peer; ours or peer
    function, *given = getattr(next(row for row in ROWS + GPU_ROWS if key(row) == names), which)
    block = function(quick, *given)
    for _ in sys.stdin:
        started = time.perf_counter()
        amount, check = block()
        seconds = time.perf_counter() - started
        found = {"seconds": seconds, "amount": amount, "check": check() if callable(check) else check,
                 "peak": peak_memory(), "state": block.state() if hasattr(block, "state") else None}
        print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process that stands ready to do one side's block."""

    def __init__(self, name, quick, folder):
        settings = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "true",
                    "BENCH_SCRATCH": folder, "THP_MEM_ALLOC_ENABLE": "1"}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", name, *["--quick"] * quick],
                                        env={**os.environ, **settings}, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)

    def block(self):
        """Return what one block took and gave, as a namespace; RuntimeError with its last words if it failed."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            found = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):
            self.errors.seek(0)
            raise RuntimeError(self.errors.read().strip().rpartition("\n")[2] or "it ended early") from None
        found.each = found.seconds / found.amount
        return found

    def close(self):
        """End the process, which may be gone already."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def compare(ours, theirs, tolerance):
    """Return (whether two results are the same, that in words): texts and tokens equal, losses within the tolerance.

    None is a side without a result, and nan the tolerance of two methods that only start from the same model."""
    if ours is None or theirs is None:
        return True, "nothing to compare"
    if isinstance(ours, str):
        return ours == theirs, "same bytes" if ours == theirs else "other bytes"
    if isinstance(ours[0], int):
        equal = sum(a == b for a, b in zip(ours, theirs)) / max(len(ours), len(theirs))
        return ours == theirs, f"{equal:.0%} of {len(ours)} tokens equal"
    if math.isnan(tolerance):
        return compare(ours[:1], theirs[:1], 1e-4)[0], "the same at the start, their results not compared"
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    return apart <= tolerance, f"losses {apart:.0e} apart"


def missing(needs):
    """Return those of the needed packages and checkouts that are not here."""
    there = {need: Path(os.environ.get(need, "-")).is_dir() if need.isupper() else importlib.util.find_spec(need)
             for need in needs.split()}
    return [need for need, found in there.items() if not found]


def paired(ours, theirs, rounds):
    """Return [(ours, theirs)], the blocks of each round, in the order A B B A."""
    pairs = []
    for number in range(rounds):
        found = [side.block() for side in ((ours, theirs) if number % 2 == 0 else (theirs, ours))]
        pairs.append(tuple(found[:: 1 if number % 2 == 0 else -1]))
    return pairs


def judge(row, pairs, same):
    """Return (the ratio in words, whether the target is reached) of a row's rounds."""
    ratios = sorted(b.each / a.each for a, b in pairs)
    return (f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)})",
            same and statistics.median(ratios) >= row.target)


def figure(found, unit):
    """Return a side's median in words: seconds per step, or a rate."""
    each = statistics.median(block.each for block in found)
    if unit == "step":
        return f"{each * 1000:.1f} ms" if each < 1 else f"{each:.2f} s"
    return f"{1 / each:,.{1 if each > 0.01 else 0}f} {unit}s/s".replace("MBs", "MB")


def measure(row, quick):
    """Return the cells of a row's line in the table."""
    target = f"{row.target:g}"
    if absent := missing(row.needs):
        return [*key(row), "", "", f"not here: {', '.join(absent)}", target, "", "", ""]
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side("|".join([*key(row), which]), quick, folder) for which in ("ours", "peer")]
        try:
            first = [side.block().check for side in sides]  # warms up, and shows whether both do the same
            pairs = paired(*sides, 1 if quick else row.rounds)
        except RuntimeError as error:
            return [*key(row), "", "", f"failed: {error}"[:150], target, "", "", ""]
        finally:
            for side in sides:
                side.close()
    same, how = compare(*first, row.tolerance)
    ratio, reached = judge(row, pairs, same)
    memory = " / ".join(f"{found.peak / 1e6:,.0f}" + (f" ({found.state / 1e6:,.0f})" if found.state else "")
                        for found in pairs[-1])
    return [*key(row), *(figure(found, row.unit) for found in zip(*pairs)),
            ratio, target, "yes" if reached else "**no**", how if same else f"**void**: {how}", memory]


def machine():
    """Return what this machine can do, in words, measured now: processor, load, versions, limits."""
    def median_seconds(work):
        times = []
        for _ in range(9):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    square, large = torch.randn(1024, 1024), torch.randn(2**26)
    product = 2 * 1024**3 / median_seconds(lambda: square @ square) / 1e9
    reading = large.numel() * 4 / median_seconds(large.sum) / 1e9
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    packages = [f"{name} {importlib.metadata.version(name)}" for name in
                ("torch", "tokenizers", "transformers", "peft", "trl") if importlib.util.find_spec(name)]
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{cpu[1] if cpu else platform.machine()}{card}, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {', '.join(packages)}; matrix product "
            f"{product:.0f} GFLOP/s, reading {reading:.1f} GB/s")


# ---------------------------------------------------------------------------------------------------------------------
# The page, and the command line

HEAD = ("row", "work", "peer", "ours", "peer's", "times faster (range, rounds)", "target", "reached", "same result",
        "MB at most: ours / peer's (gradients and optimizer)")
PAGE = """# Benchmarks

Made by `python tests/bench.py` (`make bench`); its first lines say how it measures. "Times faster" is the peer's time
over ours, the median of paired rounds. A line is void where the two sides did not come to the same result. nanoGPT is
its main branch. The machine, with its own limits measured in the same run:

"""


def table(head, rows):
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv=None):
    """Run the rows that are named and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows; none = all")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, nothing written")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU; nothing written")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.quick)
    if args.list:
        for row in ROWS + GPU_ROWS:
            print(f"{row.name:<12}{row.work:<50}{row.peer_name:<28}target {row.target}")
        return 0
    if args.gpu and not torch.cuda.is_available():
        print("no GPU: torch finds none, so there is nothing to measure")
        return 0
    known = GPU_ROWS if args.gpu else ROWS
    if unknown := set(args.rows) - {row.name for row in known}:
        parser.error(f"no row {', '.join(sorted(unknown))}; see --list")
    run = f"{datetime.datetime.now():%Y-%m-%d %H:%M}: {machine()}"
    print(run, "", *table(HEAD, []), sep="\n", flush=True)
    lines = []
    for row in (row for row in known if not args.rows or row.name in args.rows):
        lines.append(measure(row, args.quick))
        print(table(lines[-1], [])[0], flush=True)
    complete = not any(line[5].startswith(("not here", "failed")) for line in lines)
    if complete and not (args.rows or args.quick or args.gpu):
        with gpt.replacing(ROOT / "assets" / "bench.md") as file:
            file.write((PAGE + "\n".join([run, "", *table(HEAD, lines)]) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
