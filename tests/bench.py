"""Benchmarks beside other projects, by hand and never as tests. One process a side, the two taking turns.

    python tests/bench.py                    every row but the long ones: 20 minutes on 2 cores that do nothing else
    python tests/bench.py bpe step           some rows; --list names them all, --quick shrinks them to see that they run
    python tests/bench.py shakespeare        to a loss, against nanoGPT's own recipe: DATA_DIR with tinyshakespeare.txt
    python tests/bench.py scaling            cost against size: table, and the picture assets/scaling.svg
    python tests/bench.py --gpu              bfloat16, compiled, on a GPU; says so where there is none

Writes assets/bench.md: a line for each comparison (those of rows that are not run again stay), and of each run the
machine with its own ceilings. Peers are the packages of requirements-peers.txt; nanoGPT and minbpe are found by the
variables NANOGPT and MINBPE, which name checkouts outside this repository. A row whose peer is absent says so.

A side is a function that prepares its work and returns `block`, which does it once and returns how much that was and
what came out. Both sides stand ready in processes of their own; after a warm-up that is not counted they take turns in
the order A B B A; a ratio is of two neighbours, the peer's seconds over ours, and the median counts. It counts only if
both came to the same: token files and tokens equal, losses within 1e-4. Both have the same weights, drawn from each
tensor's name. The peers' processes are left as their users have them, without this project's settings for memory.
Some "peers" are the machine's own limits: a step's matrix products alone, the weights read once a token.
"""

import argparse
import array
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
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # and never gpt.py up here: importing it changes how memory is kept, in the peers' processes too
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMALL = dict(vocab_size=65, context_length=64, emb_dim=128, n_heads=4, n_layers=4, exact_gelu=True)  # as nanoGPT
GPT2 = dict(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12)
MIDDLE = dict(vocab_size=8192, context_length=320, emb_dim=192, n_heads=6, n_layers=4)
TOY = dict(vocab_size=64, context_length=64, emb_dim=64, n_heads=2, n_layers=2)
QUICK = dict(vocab_size=512, context_length=320, emb_dim=32, n_heads=2, n_layers=2)  # in GPT-2's place with --quick
STEPS = 410  # of ours on tiny Shakespeare
TARGET = 1.915  # full-split loss where the 2,000 steps of nanoGPT's recipe end

# ---------------------------------------------------------------------------------------------------------------------
# The same model, data and training step on every side

NAMES = (("transformer.", ""), ("base_model.model.", ""), (".base_layer", ""), (".default.weight", ""),
         ("tok_emb", "wte"), ("pos_emb", "wpe"), ("trf_blocks", "h"), ("final_norm", "ln_f"), (".ln1", ".ln_1"),
         (".ln2", ".ln_2"), ("attn.qkv", "attn.c_attn"), ("attn.out_proj", "attn.c_proj"), ("ffn.fc1", "mlp.c_fc"),
         ("ffn.fc2", "mlp.c_proj"))


def same_weights(model, std=0.02, turned=()):
    """Return the model with weights drawn from each tensor's name, equal in all projects; `turned` are (in, out)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for theirs, short in NAMES:
                name = name.replace(theirs, short)
            turn = any(part + ".weight" in name for part in turned)
            values = torch.randn(parameter.shape[:: -1 if turn else 1],
                                 generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            if "lora_B" not in name:  # new adapters change nothing yet
                parameter.copy_(centre + std * (values.t() if turn else values))
    return model


def our_model(size, std=0.02):
    """Return a GPTModel of this size."""
    import gpt

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
    return same_weights(getattr(transformers, kind)(config), std, ("c_attn", "c_proj", "c_fc"))


def random_ids(*shape, below):
    """Return token ids of this shape, the same in every process."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def source_text(size):
    """Return about `size` characters of the standard library's source, a list with a string a file."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if total < size and not {"test", "tests", "site-packages", "idle_test"} & set(path.parts):
            texts.append(path.read_text(encoding="utf-8", errors="replace")[: size - total])
            total += len(texts[-1])
    return texts


def training(model, optimizers, loss_of, batches):
    """Return a block of training steps: one for each of `batches`, pairs (ids, targets)."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]

    def block():
        losses = []
        for ids, targets in batches:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = loss_of(ids, targets)
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
# Tokenizers


def bpe_ours(quick, size=10_000_000, vocabulary=8192):
    """10 MB of source, 8,192 tokens."""
    from tokenizer import BPETokenizer

    texts = source_text(size // 20 if quick else size)

    def block():
        merges = BPETokenizer.train(texts, vocabulary // (8 if quick else 1), special_tokens=()).merges
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


def bpe_tokenizers(quick, size=10_000_000, vocabulary=8192):
    """The same text, by the Rust trainer."""
    texts = source_text(size // 20 if quick else size)

    def block():
        bpe = hf_bpe(texts, vocabulary // (8 if quick else 1))
        merges = json.loads(bpe.to_str())["model"]["merges"]
        return sum(map(len, texts)) / 1e6, digest("\n".join(map(" ".join, merges)))

    return block


def bpe_small_ours(quick):
    """185 KB as one text, 512 tokens, none of them special."""
    from tokenizer import BPETokenizer

    text = "".join(source_text(20_000 if quick else 185_000))

    def block():
        bpe = BPETokenizer.train(text, 300 if quick else 512, special_tokens=())
        return len(text) / 1e6, [math.log(len(bpe.encode(text)))]

    return block


def bpe_minbpe(quick):
    """The same; of pairs that are equally frequent it takes another one, so the text's length in tokens is compared."""
    sys.path.insert(0, os.environ["MINBPE"])
    from minbpe.regex import GPT2_SPLIT_PATTERN, RegexTokenizer

    text = "".join(source_text(20_000 if quick else 185_000))

    def block():
        bpe = RegexTokenizer(GPT2_SPLIT_PATTERN)
        bpe.train(text, 300 if quick else 512)
        return len(text) / 1e6, lambda: [math.log(len(bpe.encode_ordinary(text)))]

    return block


def tokens_text(quick, folder):
    """Return (texts to train a tokenizer on, the path of the text file to encode)."""
    path = Path(folder, "text.txt")
    path.write_text("".join(source_text(250_000 if quick else 5_000_000)), encoding="utf-8", newline="\n")
    return source_text(100_000 if quick else 2_000_000), path


def tokens_ours(quick):
    """data.prepare: a text file into train.bin and val.bin of 16-bit tokens, with checksums."""
    import data
    from tokenizer import BPETokenizer

    texts, path = tokens_text(quick, scratch())
    bpe, data.PREPARED = BPETokenizer.train(texts, 4096, special_tokens=()), path.parent / "prepared"

    def block():
        shutil.rmtree(data.PREPARED, ignore_errors=True)
        folder = data.prepare(path, bpe)
        return path.stat().st_size / 1e6, lambda: digest((folder / "train.bin").read_bytes() +
                                                         (folder / "val.bin").read_bytes())

    return block


def tokens_tokenizers(quick):
    """The same files without checksums, the text in pieces for encode_batch_fast, which uses every core."""
    texts, path = tokens_text(quick, scratch())
    bpe = hf_bpe(texts, 4096)

    def write(part, text):
        pieces = re.findall(r"(?s).{1,20000}\S(?=\s)|.+", text)  # cut where no pre-token spans the place
        numbers = array.array("H", itertools.chain.from_iterable(e.ids for e in bpe.encode_batch_fast(pieces)))
        path.with_name(part).write_bytes(numbers)
        return numbers.tobytes()

    def block():
        text = path.read_text(encoding="utf-8")
        border = len(text) * 9 // 10
        parts = [write("train.bin", text[:border]), write("val.bin", text[border:])]
        return path.stat().st_size / 1e6, lambda: digest(b"".join(parts))

    return block


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def steps(quick, make, block, size=SMALL, rows=12, length=64, count=20, rate=1e-3):
    """Training steps on random tokens: `make` is the model's side, `block` the training's."""
    size, count = (QUICK, 2) if quick else (size, count)
    return block(make(size), batches_of(size, rows, length, count), rate)


def steps124(quick, make, block):
    """GPT-2 124M, one row of 256 tokens: 2 steps."""
    return steps(quick, make, block, GPT2, 1, 256, 2, 1e-4)


def products(quick):
    """No peer but a limit: the step's matrix products alone, forward and twice backward, nothing between them."""
    size, T, blocks = QUICK if quick else GPT2, 256, []
    C, layers, V = (size[key] for key in ("emb_dim", "n_layers", "vocab_size"))
    for rows, columns in [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * layers + [(V, C)]:
        blocks.append((torch.randn(T, columns), torch.randn(rows, columns), torch.randn(T, rows)))

    def block():
        for x, weight, grad in blocks * 2:
            F.linear(x, weight), grad @ weight, grad.t() @ x
        return 2, None

    return block


def lora_side(quick, add, make=our_model):
    """Return a block of 2 steps of a 124M model (1 x 256 tokens) once `add(model)` has put in its adapters."""
    size = QUICK if quick else GPT2
    model = same_weights(add(make(size)), turned=("c_attn", "c_proj", "c_fc") if make is hf_model else ())

    def loss_of(ids, targets):
        logits = model(ids)
        return F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), targets.flatten())

    return training(model, adamw(model, 1e-4), loss_of, batches_of(size, 1, 256, 2))


def lora_ours(quick):
    """Adapters of rank 8 on every linear layer of the blocks, by lora.py."""
    from lora import apply_lora

    return lora_side(quick, lambda model: apply_lora(model, rank=8, alpha=32) or model)


def lora_full(quick):
    """All weights instead, which learn other things but start from the same."""
    return lora_side(quick, lambda model: model)


def lora_peft(quick, make=our_model, targets=("qkv", "out_proj", "fc1", "fc2")):
    """PEFT on this project's model, or on transformers' GPT-2."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=32, target_modules=list(targets), fan_in_fan_out=make is hf_model)
    return lora_side(quick, lambda model: get_peft_model(model, config), make)


SFT_ROWS, SFT_LENGTH = 16, 257  # examples an update, tokens of the longest one with its end


def sft_examples(quick):
    """Return 256 pairs (ids, length of the prompt, half of them) of 16 to 256 tokens."""
    lengths = torch.randint(16, 257, (32 if quick else 256,), generator=torch.Generator().manual_seed(2)).tolist()
    ids = random_ids(len(lengths), 256, below=MIDDLE["vocab_size"] - 1).tolist()
    return [(row[:length], length // 2) for row, length in zip(ids, lengths)]


def sft_ours(quick):
    """An epoch of instruction tuning as finetune_sft.py does it; the check is the loss of the first 16 examples."""
    import finetune_sft as sft
    import train

    model, items, epochs = our_model(MIDDLE), sft_examples(quick), itertools.count()
    config = sft.Config(batch_size=SFT_ROWS, optimizer="adamw", learning_rate=1e-4, weight_decay=0.0)
    ends = SimpleNamespace(pad_id=0, eot_id=MIDDLE["vocab_size"] - 1)
    optimizers = train.make_optimizers(model, config)

    def loss_of(some):
        ids, targets, mask = sft.make_batch(some, ends, SFT_LENGTH)
        return sft.response_loss(model, ids, targets, mask) / (targets != -100).sum()

    with torch.no_grad():
        before = [loss_of(items[:SFT_ROWS]).item()]

    def block():
        for batch in sft.batch_order(items, config, next(epochs)).split(SFT_ROWS):
            model.zero_grad(set_to_none=True)
            loss = loss_of([items[i] for i in batch.tolist()])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            loss.item()
        return sum(len(ids) - start + 1 for ids, start in items), before

    return block


def sft_trl(quick, packing=False):
    """The same epoch by TRL's SFTTrainer; packed rows are half as many, so that an update has as many tokens."""
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    items, end = sft_examples(quick), MIDDLE["vocab_size"] - 1
    rows = datasets.Dataset.from_list([{"input_ids": [*ids, end], "completion_mask": [0] * start + [1] * (
        len(ids) + 1 - start)} for ids, start in items])
    args = SFTConfig(output_dir=scratch(), per_device_train_batch_size=SFT_ROWS // (1 + packing), num_train_epochs=1,
                     learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0, max_length=SFT_LENGTH, packing=packing,
                     completion_only_loss=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
                     report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
                     dataloader_pin_memory=False)
    trainer = SFTTrainer(hf_model(MIDDLE, use_cache=False), args, train_dataset=rows,
                         processing_class=PreTrainedTokenizerFast(tokenizer_object=words(end), pad_token="w0",
                                                                  eos_token=f"w{end}"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Generation and PPO

PROMPT, NEW, SPREAD = 32, 128, 0.06  # SPREAD: weights so large that a random model does not repeat one token


def greedy(quick, make, generate, device="cpu", dtype=torch.float32):
    """A prompt of 32 tokens and 128 more, greedily."""
    size, new = (QUICK, 16) if quick else (GPT2, NEW)
    model, ids = make(size, SPREAD).to(device, dtype).eval(), random_ids(1, PROMPT, below=512).to(device)
    return lambda: (new, generate(model, ids, new)[0, PROMPT:].tolist())


def our_tokens(model, ids, new, mask=None):
    """Return the prompts and `new` tokens, greedily."""
    import gpt

    return gpt.generate(model, ids, new, temperature=0, mask=mask, cuda_graph=ids.is_cuda)


def hf_tokens(model, ids, new, mask=None):
    """The same by transformers, with its cache."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new,
                          do_sample=False, pad_token_id=0)


def nano_tokens(model, ids, new):
    """The same by nanoGPT, which has no cache; a draw from the one likeliest token is greedy."""
    return model.generate(ids, new, top_k=1)


def greedy_reading(quick):
    """No peer but a limit: reading the weights (495 MB) once for each token."""
    new, weights = (16, torch.randn(10**6)) if quick else (NEW, torch.randn(123_653_376))

    def block():
        for _ in range(new):
            weights.sum()
        return new, None

    return block


def batch(quick, make, generate):
    """16 prompts of 8 to 64 tokens, padded on the left, and 48 more for each, greedily."""
    lengths = torch.tensor([8 + 56 * row // 15 for row in range(16)])
    mask = (torch.arange(64) >= 64 - lengths[:, None]).long()
    model, ids = make(QUICK if quick else GPT2, SPREAD).eval(), random_ids(16, 64, below=512) * mask
    return lambda: (16 * 48, generate(model, ids, 48, mask)[:, 64:].flatten().tolist())


LIKED, STOP, PPO_ROWS, PPO_NEW = range(16, 32), 63, 32, 16  # the reward counts liked tokens; prompts hold none


def ppo_prompts():
    """Return 256 prompts of 3 to 8 tokens, as lists of ids."""
    ids = random_ids(256, 8, below=30) + 33
    return [row[: 3 + number % 6] for number, row in enumerate(ids.clamp(max=62).tolist())]


def ppo_ours(quick, device="cpu", size=TOY):
    """PPO as rlhf.py does it: 32 responses of 16 tokens an update, four times through them."""
    import rlhf
    import train

    model = our_model(size).to(device)
    policy, start = rlhf.Policy(model).to(device), rlhf.start_of(model)
    config = rlhf.Config(response_length=PPO_NEW, kl_coef=0.02, ppo_epochs=4, minibatches=1, accumulate=1,
                         max_approxkl=0.0, no_stop_penalty=0.0, learning_rate=1e-3, optimizer="adamw")
    optimizers = train.make_optimizers(policy, config)
    prompts = [rlhf.Prompt("", ids) for ids in ppo_prompts()]
    tokenizer = SimpleNamespace(eot_id=STOP, decode=lambda ids: " ".join(map(str, ids)))

    def reward(asked, texts):
        return [sum(int(word) in LIKED for word in text.split()) / 4 for text in texts]

    def apply(loss):
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return norm, config.learning_rate

    with torch.no_grad():
        before = model(random_ids(4, 20, below=62).to(device)).log_softmax(-1).mean().item()

    def block():
        scores, some = [], prompts[: PPO_ROWS * (2 if quick else 8)]
        for first in range(0, len(some), PPO_ROWS):
            episodes = rlhf.play(policy, start, some[first : first + PPO_ROWS], reward, tokenizer, config)
            advantages, returns = rlhf.targets(episodes, config.kl_coef, config, "ppo")
            rlhf.improve(policy, episodes, advantages, returns, config.kl_coef, config, apply)
            scores.append(episodes.scores.mean().item())
        print(f"ppo, ours: mean score of the updates {[round(score, 2) for score in scores]}", file=sys.stderr)
        return len(some), [before]

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


def ppo_trl(quick, device="cpu", size=TOY):
    """The same by TRL, whose value model is a second network; ours is a head on the policy's."""
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words(STOP, ["<pad>"]), eos_token=f"w{STOP}",
                                        pad_token="<pad>", padding_side="left")  # a pad beyond the model's vocabulary
    rows = datasets.Dataset.from_dict({"input_ids": ppo_prompts()})
    model, reference = hf_model(size), hf_model(size)
    critic = hf_model(size, kind="GPT2ForSequenceClassification", num_labels=1)
    episodes = PPO_ROWS * (2 if quick else 8)
    args = PPOConfig(output_dir=scratch(), per_device_train_batch_size=PPO_ROWS, total_episodes=episodes,
                     response_length=PPO_NEW, temperature=1.0, kl_coef=0.02, learning_rate=1e-3, num_ppo_epochs=4,
                     stop_token="eos", lr_scheduler_type="constant", use_cpu=device == "cpu", bf16=False,
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


# ---------------------------------------------------------------------------------------------------------------------
# Start-up, and a whole run


def started(quick, *words):
    """This Python with these words, until it ends."""
    def block():
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        return 1, None

    return block


def first_step_ours(quick):
    """`python train.py` on a small text, until the line of its first step is there; the run then ends by itself."""
    text = Path(scratch(), "text.txt")
    text.write_text("".join(source_text(60_000)), encoding="utf-8")
    flags = f"--data {text} --tokenizer char --max_steps 1 --warmup_steps 0 --fresh --out_dir {text.parent / 'run'}"

    def block():
        process = subprocess.Popen([sys.executable, "train.py", *flags.split()], cwd=ROOT, stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, text=True)
        found = any(line.startswith("step 1/1") for line in process.stderr)
        assert found, "train.py printed no first step"
        return 1, lambda: process.communicate() and None

    return block


def shakespeare_ours(quick):
    """train.py on tiny Shakespeare, letter by letter, with as many steps as it needs to come below nanoGPT's loss."""
    out = Path(scratch(), "run")
    flags = ("--data shakespeare --tokenizer char --batch_size 12 --context_length 64 --schedule linear --final_rate 0 "
             "--learning_rate 0.02 "
             f"--max_steps {20 if quick else STEPS} --warmup_steps {2 if quick else 20} --eval_every 0 --fresh")

    def block():
        subprocess.run([sys.executable, "train.py", *flags.split(), "--out_dir", str(out)], check=True, cwd=ROOT)
        return 1, lambda: [json.loads((out / "summary.json").read_text(encoding="utf-8"))["val_loss"]]

    return block

def shakespeare_nanogpt(quick):
    """The command of nanoGPT's README for a CPU, evaluated only at the end; its loss is measured on the whole split."""
    folder = Path(scratch(), "nanoGPT")
    shutil.copytree(os.environ["NANOGPT"], folder)
    data = folder / "data" / "shakespeare_char"
    shutil.copyfile(Path(os.environ["DATA_DIR"], "tinyshakespeare.txt"), data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], check=True, cwd=data, stdout=sys.stderr)
    steps = 20 if quick else 2000
    flags = ("--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 "
             "--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --always_save_checkpoint=True "
             f"--max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}")

    def loss():
        sys.path.insert(0, str(folder))
        from model import GPT, GPTConfig

        saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        tokens = torch.tensor(array.array("H", (data / "val.bin").read_bytes()).tolist())
        windows = tokens[: (len(tokens) - 1) // 64 * 64 + 1].unfold(0, 65, 64)
        with torch.no_grad():
            losses = [model.eval()(part[:, :-1], part[:, 1:].contiguous())[1] * len(part) for part in windows.split(64)]
        return [(sum(losses) / len(windows)).item()]

    def block():
        subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags.split()], check=True,
                       cwd=folder, stdout=sys.stderr)
        return 1, loss

    return block


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: bfloat16, compiled, the data on the device


def gpu_steps(quick, make, rows=12, compare=True):
    """GPT-2 124M, rows of 1,024 tokens, compiled, in bfloat16, the data on the device: 10 steps."""
    model, tokens = make(GPT2).cuda().train(), random_ids(10 * rows * 1024 + 1, below=50257).cuda()
    forward, ours = torch.compile(model), make is our_model

    def loss_of(ids, targets):
        with torch.autocast("cuda", torch.bfloat16):
            out = forward(ids) if ours else forward(ids, targets)[1]
        return train.next_token_loss(out, targets) / targets.numel() if ours else out

    if ours:
        import train

        optimizers = train.make_optimizers(model, train.Config(optimizer="adamw", learning_rate=1e-4))
    else:
        optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cuda")]
    block = training(model, optimizers, loss_of, [(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                                                  for part in tokens.unfold(0, 1025, 1024).split(rows)])
    return lambda: (10 * rows * 1024, block()[1] if compare else None)


def gpu_products(quick):
    """No peer but a limit: as many operations as those steps have, in bfloat16 products of 8192 x 8192 matrices."""
    import gpt

    a, tokens = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), 10 * 64 * 1024
    times = round(3 * tokens * gpt.flops_per_token(gpt.GPT_CONFIGS["gpt2"]) / (2 * 8192**3))

    def block():
        for _ in range(times):
            a @ a
        torch.cuda.synchronize()
        return tokens, None

    return block


# ---------------------------------------------------------------------------------------------------------------------
# The rows


class Row(NamedTuple):
    """One comparison: two sides, and the ratio (peer's seconds over ours) to reach; "0.3 s" = that more at most."""

    name: str
    work: str
    unit: str  # what a block's amount counts
    ours: tuple  # a side: its function, and what that takes after `quick`
    peer_name: str
    peer: tuple
    needs: str  # packages, and variables that name checkouts
    asked: float | str
    rounds: int = 5
    tolerance: float = 1e-4  # by which losses may differ


STEP = "step", "training step, 4 x 128, context 64, batch 12", "step", (steps, our_model, our_training)
STEP124 = "step124", "training step, GPT-2 124M, 1 x 256", "step", (steps124, our_model, our_training)
GREEDY = "greedy", "greedy generation, 124M, 32 + 128 tokens", "token", (greedy, our_model, our_tokens)
SFT = "sft", "instruction tuning, 256 examples of 16 to 256", "response token", (sft_ours,)
LORA = "lora", "LoRA step, rank 8, 124M, 1 x 256", "step", (lora_ours,)
ON_GPU = "cuda", torch.bfloat16
ROWS = [
    Row("bpe", "BPE training, 10 MB, 8,192 tokens", "MB", (bpe_ours,), "tokenizers", (bpe_tokenizers,), "tokenizers",
        1.0),
    Row("bpe", "BPE training, 185 KB, 512 tokens", "MB", (bpe_small_ours,), "minbpe", (bpe_minbpe,), "MINBPE", 50.0, 2,
        1e-3),
    Row("tokens", "text to token file, 5 MB, own merges", "MB", (tokens_ours,), "tokenizers", (tokens_tokenizers,),
        "tokenizers", 3.0, 7),
    Row(*STEP, "nanoGPT", (steps, nano_model, nano_training), "NANOGPT", 1.2, 11),
    Row(*STEP124, "nanoGPT", (steps124, nano_model, nano_training), "NANOGPT", 1.4),
    Row(*STEP124, "transformers", (steps124, hf_model, hf_training), "transformers", 1.4),
    Row(*STEP124, "its matrix products alone", (products,), "", 0.75),
    Row(*GREEDY, "transformers", (greedy, hf_model, hf_tokens), "transformers", 1.7),
    Row(*GREEDY, "nanoGPT", (greedy, nano_model, nano_tokens), "NANOGPT", 8.0, 2),
    Row(*GREEDY, "reading the weights", (greedy_reading,), "", 0.6),
    Row("batch", "generation, 124M, 16 prompts of 8 to 64, + 48", "token", (batch, our_model, our_tokens),
        "transformers", (batch, hf_model, hf_tokens), "transformers", 2.0, 3),
    Row(*SFT, "TRL", (sft_trl,), "trl transformers", 2.0, 3),
    Row(*SFT, "TRL, packed", (sft_trl, True), "trl transformers", 1.2, 3),
    Row(*LORA, "all weights", (lora_full,), "", 1.25, tolerance=math.nan),
    Row(*LORA, "PEFT, our model", (lora_peft,), "peft", 1.3),
    Row(*LORA, "PEFT, transformers", (lora_peft, hf_model, ("c_attn", "c_proj", "c_fc")), "peft transformers", 1.3),
    Row("ppo", "PPO, toy of 2 x 64, 32 x 16 tokens an update", "episode", (ppo_ours,), "TRL", (ppo_trl,),
        "trl transformers", 4.0),
    Row("start", "python train.py --help", "start", (started, "train.py", "--help"), "import torch",
        (started, "-W", "ignore", "-c", "import torch"), "", "0.3 s"),
    Row("start", "python train.py, to its first step", "start", (first_step_ours,), "import transformers",
        (started, "-W", "ignore", "-c", "from transformers import GPT2LMHeadModel, Trainer"), "transformers", 2.5),
]
LONG = [
    Row("shakespeare", f"tiny Shakespeare to full-split loss {TARGET}", "run", (shakespeare_ours,),
        "nanoGPT, 2,000 steps", (shakespeare_nanogpt,), "NANOGPT DATA_DIR", 3.0, 1, TARGET),
]
GPU_ROWS = [
    Row("gpu-step", "training, 124M, bf16, 12 x 1,024", "token", (gpu_steps, our_model), "nanoGPT",
        (gpu_steps, nano_model), "NANOGPT", 1.1, 5, 2e-2),
    Row("gpu-large", "training, 124M, bf16, 64 x 1,024", "token", (gpu_steps, our_model, 64, False),
        "nanoGPT, 12 x 1,024", (gpu_steps, nano_model, 12, False), "NANOGPT", 1.35),
    Row("gpu-large", "training, 124M, bf16, 64 x 1,024", "token", (gpu_steps, our_model, 64, False),
        "bf16 products of 8192", (gpu_products,), "", 0.45),
    Row("gpu-greedy", "greedy generation, 124M, bf16", "token", (greedy, our_model, our_tokens, *ON_GPU),
        "transformers", (greedy, hf_model, hf_tokens, *ON_GPU), "transformers", 15.0),
    Row("gpu-ppo", "PPO, 124M", "episode", (ppo_ours, "cuda", GPT2), "TRL", (ppo_trl, "cuda", GPT2), "trl transformers",
        4.0, 3),
]

# ---------------------------------------------------------------------------------------------------------------------
# Measuring: a process for each side, which does its block whenever a line comes in


def scratch():
    """Return a new folder for a side's files; the process that measures removes it."""
    return tempfile.mkdtemp(dir=os.environ.get("BENCH_SCRATCH"))


def digest(content):
    """Return a sha256, to compare what is too long to send."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()


def peak_memory():
    """Return the most memory that this process has held, in bytes; 0 where Linux does not tell.

    Not getrusage: its maximum starts from that of the process that started this one."""
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else 0


def side_of(name):
    """Return the block's maker of a side: "scaling", or a row's three names and 0 for ours, 1 for the peer's."""
    if name == "scaling":
        return scaling_ours
    row, number = next((row, name.split("|")[3]) for row in ROWS + LONG + GPU_ROWS if name.split("|")[:3] == key(row))
    function, *given = row.peer if int(number) else row.ours
    return lambda quick: function(quick, *given)


def key(row):
    """Return what tells a row from all others: [row, work, peer]."""
    return [row.name, row.work, row.peer_name]


def serve(side, quick):
    """Prepare a side, then for each line on stdin do its block once and print seconds, amount and check as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the side itself prints goes elsewhere
    block = side_of(side)(quick)
    for _ in sys.stdin:
        started = time.perf_counter()
        amount, check = block()
        seconds = time.perf_counter() - started
        found = {"seconds": seconds, "amount": amount, "check": check() if callable(check) else check,
                 "peak": peak_memory(), "state": block.state() if hasattr(block, "state") else None}
        print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process that stands ready to do one side's block."""

    def __init__(self, name, ours, quick, folder):
        settings = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "true",
                    "BENCH_SCRATCH": folder, "THP_MEM_ALLOC_ENABLE": "1" if ours else "0"}
        self.errors = open(Path(folder, f"{ours}.log"), "w+", encoding="utf-8")
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
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def compare(ours, theirs, tolerance):
    """Return (whether two results are the same, that in words): texts and tokens equal, losses within the tolerance.

    A tolerance above 1 is a loss: ours may be as high as that, or as the peer's. None is a side without a result."""
    if ours is None or theirs is None:
        return True, "nothing to compare"
    if isinstance(ours, str):
        return ours == theirs, "same bytes" if ours == theirs else "other bytes"
    if isinstance(ours[0], int):
        equal = sum(a == b for a, b in zip(ours, theirs)) / max(len(ours), len(theirs))
        return ours == theirs, f"{equal:.0%} of {len(ours)} tokens equal"
    if math.isnan(tolerance):  # two methods that start from the same model
        return compare(ours[:1], theirs[:1], 1e-4)[0], "the same at the start, their results not compared"
    if tolerance > 1:
        return ours[0] <= max(tolerance, theirs[0]), f"loss {ours[0]:.3f}, peer {theirs[0]:.3f}"
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
    """Return (the ratio in words, whether what was asked is reached) of a row's rounds."""
    if isinstance(row.asked, str):
        more = statistics.median(a.each - b.each for a, b in pairs)
        return f"{more:+.2f} s", same and more <= float(row.asked.split()[0])
    ratios = sorted(b.each / a.each for a, b in pairs)
    return (f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)})",
            same and statistics.median(ratios) >= row.asked)


def figure(found, unit):
    """Return a side's median in words: seconds a step, or a rate."""
    each = statistics.median(block.each for block in found)
    if unit in ("step", "run", "start"):
        return f"{each * 1000:.1f} ms" if each < 1 else f"{each:.2f} s"
    return f"{1 / each:,.{1 if each > 0.01 else 0}f} {unit}s/s".replace("MBs", "MB")


def measure(row, quick):
    """Return the cells of a row's line in the table."""
    asked = f"+{row.asked} at most" if isinstance(row.asked, str) else f"{row.asked:g}"
    if absent := missing(row.needs):
        return [*key(row), "", "", f"not here: {', '.join(absent)}", asked, "", "", ""]
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side("|".join([*key(row), str(number)]), not number, quick, folder) for number in (0, 1)]
        try:
            first = pairs = [tuple(side.block() for side in sides)]  # warms up, and shows whether both do the same
            if row.rounds > 1:
                pairs = paired(*sides, 1 if quick else row.rounds)
        except RuntimeError as error:
            return [*key(row), "", "", f"failed: {error}"[:150], asked, "", "", ""]
        finally:
            for side in sides:
                side.close()
    same, how = compare(first[0][0].check, first[0][1].check, row.tolerance)
    ratio, reached = judge(row, pairs, same)
    memory = " / ".join(f"{found.peak / 1e6:,.0f}" + (f" ({found.state / 1e6:,.0f})" if found.state else "")
                        for found in pairs[-1] if row.unit not in ("start", "run"))  # these start other processes
    return [*key(row), *(figure(found, row.unit) for found in zip(*pairs)),
            ratio, asked, "yes" if reached else "**no**", how if same else f"**void**: {how}", memory]


def machine(quick):
    """Return what this machine can do, in words, measured now: processor, load, versions, ceilings."""
    def best(work, seconds=0.2 if quick else 2):
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    a, weights, x = torch.randn(1024, 1024), torch.randn(50257, 768), torch.randn(768)
    large = torch.randn(2**27 // (8 if quick else 1))
    rates = (f"matrix product {2 * 1024**3 / best(lambda: a @ a) / 1e9:.0f} GFLOP/s, matrix-vector product "
             f"{weights.numel() * 4 / best(lambda: F.linear(x, weights)) / 1e9:.1f} GB/s, reading "
             f"{large.numel() * 4 / best(lambda: large.sum()) / 1e9:.1f} GB/s")
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    packages = [f"{name} {importlib.metadata.version(name)}" for name in
                ("torch", "tokenizers", "transformers", "peft", "trl") if importlib.util.find_spec(name)]
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{cpu[1] if cpu else platform.machine()}{card}, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {', '.join(packages)}; {rates}")


# ---------------------------------------------------------------------------------------------------------------------
# Scaling: our own cost against the size of the work


def seconds_of(work, tries=5):
    """Return the median seconds of some calls after one that warms up."""
    times = []
    for _ in range(tries + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def scaling_steps(quick):
    """Yield (name, size, floating-point operations, seconds) of training steps by model size, context and batch."""
    import gpt

    base = dict(vocab_size=1024, context_length=128, emb_dim=128, n_heads=4, n_layers=4)
    grown = [("model size", "emb_dim", (64, 128, 256, 512), 8), ("batch", "", (1, 2, 4, 8, 16, 32), 0),
             ("context", "context_length", (64, 128, 256, 512, 1024), 4)]
    for name, field, sizes, rows in grown:
        for size in sizes[: 2 if quick else None]:
            shape = {**base, field: size} if field else base
            model, count, length = our_model(shape), rows or size, shape["context_length"]
            block = our_training(model, batches_of(shape, count, length, 3), 1e-3)
            yield name, size, 9 * count * length * gpt.flops_per_token(model.config), seconds_of(block)


def scaling_generation(quick):
    """Yield ("a token, by those before it", tokens before, 1, seconds): with the cache each should cost the same."""
    import gpt

    model = our_model(dict(vocab_size=1024, context_length=1024, emb_dim=256, n_heads=4, n_layers=4)).eval()
    steps = gpt.generate_steps(model, random_ids(1, 16, below=1024), 976, temperature=0)
    times = []
    for _ in range(100 if quick else 976):
        started = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - started)
    for before in (32, 64) if quick else (32, 64, 128, 256, 512, 960):
        yield "a token, by those before it", before, 1, statistics.median(times[before - 16 : before + 16])


PREPARE = """import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import bench, data, tokenizer
started = time.perf_counter()
data.prepare(sys.argv[2], tokenizer.load_tokenizer(sys.argv[3]))
print(time.perf_counter() - started, bench.peak_memory())"""


def scaling_corpus(quick):
    """Yield the cost of BPE training, of prepare, and the memory of prepare, by megabytes of text."""
    from tokenizer import BPETokenizer

    folder, made = Path(scratch()), []
    for size in (1, 2) if quick else (2, 4, 8, 16):
        texts = source_text(size * 10**6)
        made.append((size, sum(map(len, texts)), seconds_of(lambda: BPETokenizer.train(texts, 4096, workers=1), 1)))
        (folder / f"{size}.txt").write_text("".join(texts), encoding="utf-8")
    yield from (("BPE training", *row) for row in made)
    BPETokenizer.train(source_text(10**6), 4096).save(folder / "tokenizer.json")
    found = [subprocess.run([sys.executable, "-W", "ignore", "-c", PREPARE, str(ROOT), f"{size}.txt", "tokenizer.json"],
                            cwd=folder, check=True, capture_output=True, text=True).stdout.split() for size, *_ in made]
    yield from (("prepare", *row[:2], float(seconds)) for row, (seconds, _) in zip(made, found))
    yield from (("memory of prepare", row[0], 1, float(memory)) for row, (_, memory) in zip(made, found))


def scaling_ours(quick):
    """All of them, as one block."""
    return lambda: (1, [*scaling_steps(quick), *scaling_generation(quick), *scaling_corpus(quick)])


def scaling(quick):
    """Return the lines of the table of cost against size, after drawing them as assets/scaling.svg."""
    with tempfile.TemporaryDirectory() as folder:
        side = Side("scaling", True, quick, folder)
        rows = side.block().check
        side.close()
    lines, curves = [], {"law: cost = work": [(0, 0), (6, 6)]}
    for name, group in itertools.groupby(rows, key=lambda row: row[0]):
        (_, first, work, cost), *more = group = list(group)
        grown, dearer = more[-1][2] / work, more[-1][3] / cost
        worst = max((b[3] / a[3]) / (b[2] / a[2]) for a, b in zip(group, more))
        form = (lambda x: f"{x / 1e6:.0f} MB") if "memory" in name else (lambda x: f"{x:.3g} s")
        law = "stays" if grown == 1 else f"at most x {grown:.1f}"
        lines.append([name, f"{first} to {more[-1][1]}", f"x {grown:.1f}", f"{form(cost)} to {form(more[-1][3])}",
                      f"x {dearer:.2f}", law, f"{worst:.2f}"])
        curves[name] = [(math.log2(b[2] / work) if grown > 1 else math.log2(b[1] / first), math.log2(b[3] / cost))
                        for b in group]
    if not quick:
        import train

        train.draw_curves(ROOT / "assets" / "scaling.svg", "Cost against the size of the work", curves,
                          "doublings of the work (of the size, where the work stays)", "doublings of the cost")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The page, and the command line

HEAD = ("row", "work", "peer", "ours", "peer's", "times faster (range, rounds)", "asked", "reached", "same result",
        "MB at most: ours / peer's (gradients and optimizer)", "measured")
SCALING = ("scaling", "sizes", "work grows", "cost", "cost grows", "law", "dearest step, 1 = by the law", "measured")
PAGE = """# Benchmarks

Made by `python tests/bench.py` (`make bench`, `make bench-gpu`); its first lines say how it measures. "Times faster" is
the peer's time over ours, the median of paired rounds. A line is void where the two sides did not come to the same
result. nanoGPT and minbpe: their main branches.
"""


def table(head, rows):
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def cells_of(text, width):
    """Return the rows of the Markdown tables of this many columns in a text, without their heads."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [row for row in rows if len(row) == width and row[0] not in ("---", HEAD[0], SCALING[0])]


def write_page(path, run, rows, scaled):
    """Put new lines in place of older ones for the same comparison, and drop stale runs."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    order = [tuple(key(row)) for row in ROWS + LONG + GPU_ROWS]
    kept = {tuple(row[:3]): row for row in cells_of(old, len(HEAD))}
    for row in rows:
        if not row[5].startswith("not here") or tuple(row[:3]) not in kept:  # an absent peer undoes no measurement
            kept[tuple(row[:3])] = row
    lines = sorted((row for name, row in kept.items() if name in order), key=lambda row: order.index(tuple(row[:3])))
    scaled = list({row[0]: row for row in [*cells_of(old, len(SCALING)), *scaled]}.values())
    runs = [line for line in [*re.findall(r"^- (.*)", old, re.M), run]
            if any(line.startswith(row[-1]) for row in lines + scaled)]
    parts = [PAGE, *table(HEAD, lines), "", *([*table(SCALING, scaled), "", "![Cost against the size of the work]"
             "(scaling.svg)", ""] if scaled else []), "Machines, with their own ceilings measured in the same run:", "",
             *(f"- {line}" for line in runs)]
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(argv=None):
    """Run the rows that are named and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows; none = all but the long ones")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, nothing written")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.quick)
    known = GPU_ROWS if args.gpu else ROWS + LONG
    if args.list:
        for row in ROWS + LONG + GPU_ROWS:
            print(f"{row.name:<12}{row.work:<50}{row.peer_name:<28}asked {row.asked}")
        return print("scaling     cost against the size of the work")
    if args.gpu and not torch.cuda.is_available():
        return print("no GPU: torch finds none, so there is nothing to measure")
    wanted = args.rows or [row.name for row in (GPU_ROWS if args.gpu else ROWS)] + ["scaling"] * (not args.gpu)
    if unknown := set(wanted) - {row.name for row in known} - {"scaling"}:
        parser.error(f"no row {', '.join(sorted(unknown))}; see --list")
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    run = f"{now}: {machine(args.quick)}"
    print(run, "", *table(HEAD[:-1], []), sep="\n", flush=True)
    rows = []
    for row in (row for row in known if row.name in wanted):
        rows.append([*measure(row, args.quick), now])
        print(*table(rows[-1][:-1], [])[:1], flush=True)
    scaled = [[*line, now] for line in scaling(args.quick)] if "scaling" in wanted else []
    print(*(table(SCALING, scaled) if scaled else []), sep="\n")
    if not args.quick:
        write_page(ROOT / "assets" / "bench.md", run, rows, scaled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
