"""Text classification: teach a pretrained model to sort messages, measure it honestly, and use it.

    python finetune_cls.py                              spam or not, built-in messages, from `python train.py`'s model
    python finetune_cls.py classify "You won a $1000 cash prize!"          the label and its probability
    python finetune_cls.py classify --file messages.txt > labels.jsonl     a message a line (also from stdin), in JSONL
    python finetune_cls.py evaluate --data more.tsv --part all             a trained classifier on other messages
    python finetune_cls.py --data sms_spam --unique --init scratch --pooling mean --lm_weight 0.5 --token_dropout 0.2
    python finetune_cls.py --data sms_spam --balance --init gpt2 --train_layers last-block --context_length 120

The language model's head, one score a token of the vocabulary, gives way to a linear layer with one score a class. It
reads one vector a message: the last block's state at the message's last token (--pooling last), which has attended to
all before it, or the mean over the message. The loss is the cross-entropy of the right class, in nats a message. Small
data is learnt by heart soon. Two things hold that back: --lm_weight keeps the model predicting the messages' next
tokens beside it (Radford et al. 2018, equation 5), and --token_dropout hides some of their tokens at each step.

Reads label<TAB>text, .csv and .jsonl with `label` and `text` (any number of classes, any names), or a dataset's name.
Equal messages (but for case and spaces) fall to the same part of the split, which depends on --seed alone. Writes into
--out_dir: model.safetensors (the weights with the best validation loss, with tokenizer and label names), adapter/ (with
--lora_rank), state.pt, metrics.jsonl, curves.svg, accuracy.svg, and summary.json, which has the test figures with 95%
intervals, those of two baselines on the same messages, and the split's fingerprint. --seeds 5 repeats it all on five
splits: each run stands in --out_dir's seedN/, and --out_dir itself holds only a summary.json of their means.

As a library:

    model, tokenizer = load_classifier("out/cls/model.safetensors")
    classify_text("Hey, just wanted to check if we're still on for dinner tonight? Let me know!", model, tokenizer)

Differs from the book (Raschka 2024, chapter 6): the last real token is read and not the last position, which may be
padding (--pooling position is the book's way); batches are padded to their longest message; frozen layers are computed
once and not in every epoch; the model is saved.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gpt  # first, because it quiets torch's warning about numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import json_sha256, read_labelled, seeded, split, tinyworld
from gpt import pick_device
from train import (Options, Run, Z, autocast, check_sizes, compile_blocks, draw_curves, load_start, make_optimizers,
                   new_model, next_token_loss, option, run_script, saved_options, total_steps, wilson, write_json)

LAYERS = {"head": 0, "last-block": 1, "last-two": 2, "all": None, "lora": None}  # blocks that train, None = see there
PARTS = ("train", "val", "test")


@dataclass
class Config(Options):
    """The options of classification."""

    data: str = option("tinyworld", "a labelled file or dataset: tinyworld, sms_spam, my.tsv, my.csv, my.jsonl")
    init: str = option("out/pretrain/model.safetensors", "start from: a checkpoint file, gpt2 ... gpt2-xl, or scratch")
    out_dir: str = option("out/cls", "the run's folder")
    epochs: int = option(3, "times through the data, 0 = no limit; this or max_steps, whichever ends first", low=0)
    batch_size: int = option(32, "messages an update", low=1)
    context_length: int = option(0, "tokens of a message that are read, the rest is cut off; 0 = the model's", low=0)
    warmup_steps: int = option(20, "steps from 0 up to the peak rate", low=0)
    eval_every: int = option(50, "steps between evaluations, 0 = only at the end", low=0)
    train_layers: str = option("all", "last-block = last block, final norm and head", choices=tuple(LAYERS))
    pooling: str = option("last", "the state that the head reads: at the last or first token of the message, the mean "
                          "over it, or at the last position, which may be padding",
                          choices=("last", "first", "mean", "position"))
    lm_weight: float = option(0.0, "weight of the next-token loss beside the classification's", low=0)
    token_dropout: float = option(0.0, "share of the tokens hidden from the model in training", low=0, high=0.9)
    lora_rank: int = option(0, "train adapters of this rank instead of the weights, 0 = off", low=0)
    lora_alpha: float = option(32.0, "an adapter's update is multiplied by alpha / rank", low=1e-6)
    lora_dropout: float = option(0.0, "of an adapter's input", low=0, high=0.99)
    lora_targets: str = option("all-linear", "layers with adapters: all-linear, or ends of names as qkv,fc1")
    cache: bool = option(True, "compute frozen layers once and keep their output in memory")
    balance: bool = option(False, "as many messages of each class as the rarest has, drawn by --seed")
    unique: bool = option(False, "drop messages that occurred before")
    lowercase: bool = option(False, "read messages in lower case")
    strip_punctuation: bool = option(False, "read messages without punctuation")
    val_share: float = option(0.1, "of the messages, for validation", low=0.01, high=0.5)
    test_share: float = option(0.2, "of the messages, for the test", low=0.01, high=0.5)
    seeds: int = option(1, "runs, with the seeds from --seed on; the summary has their mean and spread", low=1)
    tokenizer: str = option("bpe", "with --init scratch: char, word or bpe, made from the training messages; a file; "
                            "gpt2")
    vocab_size: int = option(1000, "of that bpe tokenizer", low=258)
    model: str = option("tiny", "with --init scratch: architecture", choices=tuple(gpt.GPT_CONFIGS))
    emb_dim: int = option(0, "with --init scratch: channels, 0 = the architecture's", low=0)
    n_layers: int = option(0, "with --init scratch: blocks, 0 = the architecture's", low=0)
    n_heads: int = option(0, "with --init scratch: heads, 0 = the architecture's", low=0)
    checkpoint: str = option("", "classify, evaluate: the model, default out_dir/model.safetensors")
    file: str = option("", "classify: messages, a line each; default stdin")
    part: str = option("test", "evaluate: this part of the split, or all", choices=(*PARTS, "all"))
    text: list = option((), "classify: the messages")


# ---------------------------------------------------------------------------------------------------------------------
# Messages: rows, parts, token ids, batches


def same(row):
    """Return what two rows with the same message have in common: the text but for case and white space."""
    return " ".join(row[1].lower().split())


def thinned(rows, config, part=0):
    """Return rows without repeated messages (--unique) and with equal classes (--balance), in the order they had."""
    if config.unique:
        rows = list({same(row): row for row in reversed(rows)}.values())[::-1]
    if config.balance:
        places = {}
        for place, (label, _) in enumerate(rows):
            places.setdefault(label, []).append(place)
        fewest = min(map(len, places.values()))
        generator = seeded("balance", config.seed, part)
        kept = [members[i] for members in (places[label] for label in sorted(places))
                for i in torch.randperm(len(members), generator=generator)[:fewest].tolist()]
        rows = [rows[place] for place in sorted(kept)]
    return rows


def read_parts(config):
    """Return (parts, labels): the rows of train, val and test, and the sorted names of the classes.

    Raises ValueError where there are fewer than two classes, or one is so rare that training lacks it."""
    if config.val_share + config.test_share > 0.999:
        raise argparse.ArgumentError(None, "--val_share and --test_share together leave nothing to train on")
    if config.data == "tinyworld":
        if (config.val_share, config.test_share) != (Config.val_share, Config.test_share):
            raise argparse.ArgumentError(None, "--val_share, --test_share: tinyworld has parts of its own")
        parts = [thinned(tinyworld("messages", name, seed=config.seed), config, name)
                 for name in PARTS]
    else:
        rows = thinned(read_labelled(config.data), config)
        parts = split(rows, 1 - config.val_share - config.test_share, config.val_share, config.seed, group=same)
    counts = Counter(label for part in parts for label, _ in part)
    if len(counts) < 2:
        raise ValueError(f"{config.data}: every row has the label {next(iter(counts))!r}; a classifier needs two "
                         "labels")
    sizes = ", ".join(f"{len(part):,} {name}" for part, name in zip(parts, PARTS))
    if not all(parts):
        texts = {same(row) for part in parts for row in part}
        raise ValueError(f"{config.data}: {sum(counts.values())} messages, {len(texts)} of them different, are too few "
                         f"to split: {sizes}")
    labels = sorted({label for label, _ in parts[0]})
    rare = sorted(set(counts) - set(labels))
    if rare:
        raise ValueError(f"{config.data}: the label {rare[0]!r} has {counts[rare[0]]} rows, none of them in the "
                         "training part; add some, or drop them")
    print(f"{config.data}: {sizes} messages; " + ", ".join(f"{label} {n:,}" for label, n in sorted(counts.items())),
          file=sys.stderr)
    return parts, labels


def clean(text, made):
    """Return text as the classifier reads it: in lower case, without punctuation, where it was trained so."""
    text = text.lower() if made["lowercase"] else text
    return re.sub(r"[^\w\s]", "", text) if made["strip_punctuation"] else text


def encode(texts, tokenizer, made, length):
    """Return (list of id lists, list of bool): each text's first `length` tokens, and whether it had more.

    For --pooling position all are padded to `length` here, and what reads them takes the padding for text."""
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    all_ids = [tokenizer.encode(clean(text, made)) or [pad_id] for text in texts]
    kept = [ids[:length] for ids in all_ids]
    if made["pooling"] == "position":
        kept = [ids + [pad_id] * (length - len(ids)) for ids in kept]
    return kept, [len(ids) > length for ids in all_ids]


def pad(sequences):
    """Return ids and mask, each (B, T), of id lists, padded on the right to the longest."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([i for ids in sequences for i in ids])
    return ids, mask


class Messages:
    """One part of the split: its rows as token ids, `labels` (N,) as numbers, frozen layers' output in `states`."""

    def __init__(self, rows, tokenizer, made, length):
        self.rows = rows
        self.ids, self.cut = encode([text for _, text in rows], tokenizer, made, length)
        self.labels = torch.tensor([made["labels"].index(label) for label, _ in rows])
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self.states = None

    def first(self, n):
        """Return the first n messages, sharing all that is computed."""
        part = copy.copy(self)
        for name in ("rows", "ids", "cut", "labels", "lengths"):
            setattr(part, name, getattr(self, name)[:n])
        return part

    def batch(self, indices, device):
        """Return ids (B, T), mask (B, T), and the cached states (B, T, C) or None."""
        ids, mask = pad([self.ids[i] for i in indices])
        states = None
        if self.states is not None:
            states = nn.utils.rnn.pad_sequence([self.states[i] for i in indices], batch_first=True).to(device)
        return ids.to(device), mask.to(device), states


def bucketed_order(lengths, batch_size, seed, epoch, window=20):
    """Return the order of one epoch, a permutation (N,) whose batches hold messages of similar length.

    Shuffled, then sorted within windows of so many batches, then the batches shuffled; it depends on seed and epoch
    alone, which an exact resume needs. A smaller last batch stays last."""
    order = torch.randperm(len(lengths), generator=seeded("order", seed, epoch))
    order = torch.cat([part[lengths[part].argsort(stable=True)] for part in order.split(batch_size * window)])
    full = len(order) // batch_size
    batches, rest = order[: full * batch_size].view(full, batch_size), order[full * batch_size :]
    return torch.cat([batches[torch.randperm(full, generator=seeded("batches", seed, epoch))].flatten(), rest])


# ---------------------------------------------------------------------------------------------------------------------
# The classifier


def pool(states, mask, pooling):
    """Return the one vector a message that the head reads: states (B, T, C), mask (B, T) -> (B, C).

    "mean" over the tokens that count, or the state at the "first" or "last" of them; padding may be on either side."""
    if pooling == "mean":
        mask = mask.to(states.dtype).unsqueeze(2)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)
    place = mask.argmax(dim=1) if pooling == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), place]


def class_logits(model, ids, mask, pooling):
    """Return one score a class: ids, mask (B, T) -> (B, classes). Padding on either side changes nothing."""
    padded_left = not bool(mask[:, 0].all())  # causal attention never sees padding on the right
    return model.out_head(pool(model.hidden(ids, mask if padded_left else None), mask, pooling))


def base_states(model, ids, frozen):
    """Return what the embedding and the lowest `frozen` blocks make of ids, without gradient: (B, T) -> (B, T, C)."""
    with torch.no_grad():
        x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in model.trf_blocks[:frozen]:
            x = block(x)
    return x


def last_states(model, ids, states, frozen):
    """Return model.hidden(ids), computed from the cached `states` of the frozen part where they are given."""
    if frozen is None:
        return model.hidden(ids)
    x = base_states(model, ids, frozen) if states is None else states
    for block in model.trf_blocks[frozen:]:
        x = block(x)
    return model.final_norm(x)


def fill_cache(model, messages, frozen, config, context, limit=1 << 32):
    """Compute the frozen part's states once and keep them, unless they would take more than `limit` bytes."""
    size = int(messages.lengths.sum()) * model.config.emb_dim * 4
    if size > limit:
        print(f"note: the frozen layers' output would take {size / 1e9:.1f} GB, so it is not kept", file=sys.stderr)
        return
    set_mode(model, frozen, training=False)
    states = [None] * len(messages.ids)
    for batch in messages.lengths.argsort(stable=True).split(config.batch_size):
        ids, _, _ = messages.batch(batch.tolist(), model.device)
        with context:
            x = base_states(model, ids, frozen).float().cpu()
        for row, i in zip(x, batch.tolist()):
            states[i] = row[: messages.lengths[i]].clone()
    messages.states = states


def set_mode(model, frozen, training=True):
    """Turn dropout on in the layers that train, never in frozen ones, whose output then never changes."""
    model.train(training)
    if frozen is not None:
        for module in (model.drop_emb, *model.trf_blocks[:frozen]):
            module.eval()


def start_model(config, texts, labels):
    """Return (model, tokenizer, language_head): --init with a head for `labels`, and the (V, C) matrix it had before.

    Raises ValueError where --init is a classifier with other labels; with the same ones its head stays."""
    if config.init == "scratch":
        tokenizer = scratch_tokenizer(config, texts)
        model, made = new_model(config, tokenizer), {}
    else:
        model, tokenizer, made = load_start(config, "python train.py")
        check_sizes(config, "tokenizer", "vocab_size")
    if made.get("kind") == "classifier":
        if made["labels"] != labels:
            raise ValueError(f"--init {config.init} has a head for the {len(made['labels'])} labels "
                             f"{', '.join(made['labels'])}; {config.data} has {len(labels)}: {', '.join(labels)}")
        return model, tokenizer, model.tok_emb.weight
    tied = model.config.tie_weights
    language_head = model.tok_emb.weight if tied else model.out_head.weight.detach()
    model.config = dataclasses.replace(model.config, tie_weights=False)
    model.out_head = nn.Linear(model.config.emb_dim, len(labels))
    nn.init.normal_(model.out_head.weight, std=0.02)
    nn.init.zeros_(model.out_head.bias)
    return model, tokenizer, language_head


def scratch_tokenizer(config, texts):
    """Return the tokenizer that --tokenizer names: made from the training messages, a file, or GPT-2's."""
    from tokenizer import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer

    if config.tokenizer == "char":
        return CharTokenizer.train(texts, specials=True)
    if config.tokenizer == "word":
        return WordTokenizer.train(texts)
    if config.tokenizer == "bpe":
        return BPETokenizer.train(texts, config.vocab_size, split_digits=True)
    if config.tokenizer != "gpt2" and not Path(config.tokenizer).exists():
        raise FileNotFoundError(f"--tokenizer {config.tokenizer} does not exist; give bpe, char, word, gpt2 or a file")
    return load_tokenizer(config.tokenizer)


def adapter_rank(config):
    """Return the rank of the adapters, 0 for none; raises ArgumentError where --lora_rank meets other layers."""
    if config.lora_rank and config.train_layers not in ("all", "lora"):
        raise argparse.ArgumentError(None, f"--lora_rank adapts all blocks, --train_layers {config.train_layers} does "
                                           "not: choose one")
    return config.lora_rank or 8 * (config.train_layers == "lora")


def choose_trained(model, config):
    """Return how many of the lowest blocks are frozen, embedding included, or None where none is; marks what trains."""
    if rank := adapter_rank(config):
        from lora import apply_lora

        try:
            apply_lora(model, rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        except ValueError as error:
            raise argparse.ArgumentError(None, f"--lora_rank, --lora_targets: {error}") from None
        model.out_head.requires_grad_(True)
        return None
    count = LAYERS[config.train_layers]
    if count is None:
        return None
    frozen = max(0, model.config.n_layers - count)
    model.requires_grad_(False)
    for module in (model.out_head, *model.trf_blocks[frozen:], *([model.final_norm] if count else [])):
        module.requires_grad_(True)
    return frozen


# ---------------------------------------------------------------------------------------------------------------------
# Figures and baselines


def difference(only_first, only_second, n):
    """Return (mean, low, high): the lead in accuracy of a first classifier over a second on n messages, with 95%.

    Paired: `only_first` messages are right with the first alone, `only_second` with the second alone; those on which
    both agree say nothing. That is much narrower than two intervals side by side."""
    mean = (only_first - only_second) / n
    half = Z * math.sqrt(((only_first + only_second) / n - mean * mean) / n)
    return mean, mean - half, mean + half


def confusion_matrix(truth, predicted, n):
    """Return n rows of n counts: entry [i][j] is how many messages of class i were taken for class j."""
    matrix = [[0] * n for _ in range(n)]
    for i, j in zip(truth, predicted):
        matrix[i][j] += 1
    return matrix


def class_figures(matrix):
    """Return (precision, recall, F1) of each class; 0 where nothing was predicted or nothing was there."""
    figures = []
    for i, row in enumerate(matrix):
        hits, called, there = row[i], sum(other[i] for other in matrix), sum(row)
        figures.append((hits / called if called else 0.0, hits / there if there else 0.0,
                        2 * hits / (called + there) if called + there else 0.0))
    return figures


def f1_score(matrix, positive=None):
    """Return the F1 of class `positive` of two (default: the rarer one here), or the mean over more (macro F1)."""
    scores = [f1 for _, _, f1 in class_figures(matrix)]
    if len(scores) > 2:
        return statistics.fmean(scores)
    return scores[int(sum(matrix[0]) >= sum(matrix[1])) if positive is None else positive]


def calibration_error(confidences, correct, bins=10):
    """Return how far confidence and accuracy lie apart, on average over messages, within bins of equal confidence.

    Source: Naeini et al. 2015, expected calibration error. 80% sure and 80% right -> 0."""
    groups = {}
    for confidence, right in zip(confidences, correct):
        groups.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, right))
    gaps = (abs(sum(c for c, _ in group) - sum(r for _, r in group)) for group in groups.values())
    return sum(gaps) / len(confidences)


def majority(train_rows, texts):
    """Return the most frequent label of the training rows, once for each text."""
    return [Counter(label for label, _ in train_rows).most_common(1)[0][0]] * len(texts)


def naive_bayes(train_rows, texts):
    """Return the likeliest label of each text under multinomial naive Bayes on lower-cased words, add-one smoothing.

    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, figure 13.2."""
    def words(text):
        return re.findall(r"\w+", text.lower())

    counts, classes = {}, Counter(label for label, _ in train_rows)
    for label, text in train_rows:
        counts.setdefault(label, Counter()).update(words(text))
    vocabulary = set().union(*counts.values())
    sizes = {label: sum(counter.values()) + len(vocabulary) for label, counter in counts.items()}

    def score(label, known):
        return math.log(classes[label]) + sum(math.log((counts[label][word] + 1) / sizes[label]) for word in known)

    documents = [[word for word in words(text) if word in vocabulary] for text in texts]
    return [max(sorted(classes), key=lambda label: score(label, known)) for known in documents]


def figures_of(logits, messages, labels, positive=None):
    """Return the figures of predictions, logits (N, classes), on a part of the split, as a dict for summary.json."""
    rows = messages.rows
    probabilities = logits.float().softmax(dim=1)
    confidences, predicted = (t.tolist() for t in probabilities.max(dim=1))
    truth = messages.labels.tolist()
    correct = [a == b for a, b in zip(predicted, truth)]
    matrix = confusion_matrix(truth, predicted, len(labels))
    wrong = sorted((i for i in range(len(rows)) if not correct[i]), key=lambda i: -confidences[i])[:10]
    return {
        "loss": F.cross_entropy(logits.float(), messages.labels).item(), "accuracy": sum(correct) / len(correct),
        "accuracy_interval": wilson(sum(correct), len(correct)), "f1": f1_score(matrix, positive),
        "calibration_error": calibration_error(confidences, correct), "confusion": matrix,
        "classes": {label: {"messages": sum(row), "precision": p, "recall": r, "f1": f1}
                    for label, row, (p, r, f1) in zip(labels, matrix, class_figures(matrix))},
        "cut": sum(messages.cut),
        "confidently_wrong": [{"label": rows[i][0], "predicted": labels[predicted[i]],
                               "probability": round(confidences[i], 4), "text": rows[i][1]} for i in wrong]}


def print_figures(figures):
    """Print the confusion matrix, the figures of each class, and what went most wrong."""
    with contextlib.suppress(AttributeError):  # a terminal that cannot show a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    labels = list(figures["classes"])
    width = max(12, *(len(label) + 2 for label in labels))
    print(f"{'':{width}}" + "".join(f"{'-> ' + label:>{width}}" for label in labels)
          + f"{'precision':>12}{'recall':>9}{'F1':>9}")
    for label, row in zip(labels, figures["confusion"]):
        per_class = figures["classes"][label]
        print(f"{label:<{width}}" + "".join(f"{count:>{width},}" for count in row)
              + f"{per_class['precision']:>12.1%}{per_class['recall']:>9.1%}{per_class['f1']:>9.1%}")
    for wrong in figures["confidently_wrong"][:3]:
        text = " ".join(wrong["text"].split())
        print(f"wrong: {wrong['label']}, taken for {wrong['predicted']} with {wrong['probability']:.1%}: {text[:80]}")


# ---------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def predict(model, messages, pooling, frozen=None, context=contextlib.nullcontext(), batch_size=64):
    """Return logits (N, classes) of all messages, in their order, computed in order of length to save padding."""
    set_mode(model, frozen, training=False)
    logits = torch.zeros(len(messages.ids), model.out_head.out_features)
    for batch in messages.lengths.argsort(stable=True).split(batch_size):
        ids, mask, states = messages.batch(batch.tolist(), model.device)
        with context:
            logits[batch] = model.out_head(pool(last_states(model, ids, states, frozen), mask, pooling)).float().cpu()
    set_mode(model, frozen)
    return logits


def language_loss(states, ids, mask, language_head):
    """Return the summed cross-entropy of each message's next tokens, nats: states (B, T, C), ids, mask (B, T) -> ()."""
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, gpt.IGNORE)
    return next_token_loss(F.linear(states[:, :-1], language_head), targets)


def hide(ids, share, hidden_id):
    """Return ids (B, T) of which each is `hidden_id` with probability `share`.

    A message is still spam without some of its words, so no single one may be learnt by heart. Source: Iyyer et al.
    2015, "Deep Unordered Composition Rivals Syntactic Methods", section 3 (word dropout)."""
    return ids.masked_fill((torch.rand(ids.shape) < share).to(ids.device), hidden_id) if share else ids


def evaluate_and_keep(run, model, tokenizer, made, parts, frozen, context):
    """Evaluate on the validation part and as many training messages, keep the best weights, log and draw it all."""
    found = {}
    for name, part in (("train", parts["train"].first(len(parts["val"].ids))), ("val", parts["val"])):
        logits = predict(model, part, made["pooling"], frozen, context)
        found[f"{name}_loss"] = F.cross_entropy(logits, part.labels).item()
        found[f"{name}_accuracy"] = (logits.argmax(dim=1) == part.labels).float().mean().item()
    better = run.count_evaluation(found["val_loss"])
    run.log(**found)
    if better:
        save_best(run, model, tokenizer, made)
    print(f"step {run.step}/{run.total}  validation loss {found['val_loss']:.4f}  accuracy {found['val_accuracy']:.2%}"
          f" (training {found['train_accuracy']:.2%})" + ("  best" if better else ""), file=sys.stderr)
    for file, what, unit in (("curves.svg", "loss", "nats a message"), ("accuracy.svg", "accuracy", "share right")):
        curves = run.curves({"train": f"train_{what}", "validation": f"val_{what}"})
        draw_curves(run.folder / file, f"Classification: {what}", curves, y_label=f"{what}, {unit}")


def save_classifier(run, model, tokenizer, made, step):
    """Write model.safetensors; `step` is the one that the weights are from."""
    gpt.save_checkpoint(run.folder / "model.safetensors", model, tokenizer, kind="classifier", stage=run.stage,
                        step=step, val_loss=run.best_value, data_sha256=run.data_sha256, **made)


def save_best(run, model, tokenizer, made):
    """Write the best weights so far: the whole classifier, or its adapters and head."""
    if adapter_rank(run.config):
        from lora import save_lora

        save_lora(model, run.folder / "adapter")
    else:
        save_classifier(run, model, tokenizer, made, run.step)


def load_best(run, model, tokenizer, made):
    """Put the best weights back into the model; adapters are also merged and saved as a whole."""
    path = run.folder / "model.safetensors"
    if not adapter_rank(run.config):
        gpt.copy_weights(model, gpt.read_safetensors(path)[0], path)
        return
    from lora import load_lora, merge_lora, unmerge_lora

    merge_lora(load_lora(model, run.folder / "adapter"))
    step = min(run.metrics("val_loss"), key=lambda point: point[1])[0]
    save_classifier(run, model, tokenizer, made, step)
    unmerge_lora(model)


def compare_with_baselines(logits, parts, made):
    """Return the figures of the two baselines on the test part, and how far the model is ahead of naive Bayes."""
    labels, test = made["labels"], parts["test"]
    train_rows = [(label, clean(text, made)) for label, text in parts["train"].rows]
    texts, truth = [clean(text, made) for _, text in test.rows], [label for label, _ in test.rows]
    guesses, usual = naive_bayes(train_rows, texts), majority(train_rows, texts)
    matrix = confusion_matrix(map(labels.index, truth), map(labels.index, guesses), len(labels))
    right, right_too = (logits.argmax(dim=1) == test.labels).tolist(), [a == b for a, b in zip(guesses, truth)]
    ahead, behind = sum(a > b for a, b in zip(right, right_too)), sum(a < b for a, b in zip(right, right_too))
    mean, low, high = difference(ahead, behind, len(truth))
    return {"naive_bayes_accuracy": sum(right_too) / len(truth), "naive_bayes_f1": f1_score(matrix, made["positive"]),
            "majority_accuracy": sum(a == b for a, b in zip(usual, truth)) / len(truth),
            "ahead_of_naive_bayes": mean, "ahead_interval": (low, high), "only_right": ahead,
            "only_naive_bayes_right": behind}


def check_folder(config):
    """Raise ArgumentError where a run of one seed would land among those of several, or the other way round."""
    folder = Path(config.out_dir)
    if any(folder.glob("seed*/state.pt")) if config.seeds == 1 else (folder / "state.pt").exists():
        raise argparse.ArgumentError(None, f"{folder} holds a run with another number of --seeds; choose another "
                                           "--out_dir")


def check_no_text(config):
    """Raise ArgumentError where words stand behind a command that takes none."""
    if config.text:
        raise argparse.ArgumentError(None, f"{' '.join(config.text)[:40]!r} is no flag; to label it: python "
                                           "finetune_cls.py classify")


def prepare(config, device):
    """Return (model, tokenizer, made, parts, language_head): all that the loop needs, from --init and --data.

    `made` is what the checkpoint says of itself, `parts` are the Messages of train, val and test; see `start_model`
    for the last."""
    rows, labels = read_parts(config)
    made = {"labels": labels, **{key: getattr(config, key) for key in ("pooling", "lowercase", "strip_punctuation")}}
    counts = Counter(label for part in rows for label, _ in part)
    made["positive"] = labels.index(min(reversed(labels), key=counts.get))  # the rarer class, whose F1 is reported
    torch.manual_seed(config.seed)
    model, tokenizer, language_head = start_model(config, [clean(text, made) for _, text in rows[0]], labels)
    parts = {name: Messages(part, tokenizer, made, model.config.context_length) for name, part in zip(PARTS, rows)}
    tell_cut(parts.values(), model)
    return model.to(device), tokenizer, made, parts, language_head.to(device)


def train(config):
    """Train a classifier as `config` says and return the summary, a dict that summary.json holds too."""
    check_no_text(config)
    check_folder(config)
    if config.seeds > 1:
        return train_seeds(config)
    device = pick_device(config.device)
    context = autocast(config, device)
    model, tokenizer, made, parts, language_head = prepare(config, device)
    frozen = choose_trained(model, config)
    if config.lm_weight and (frozen == model.config.n_layers or config.pooling == "position"):
        raise argparse.ArgumentError(None, "--lm_weight needs blocks that train and a --pooling other than position")
    if config.token_dropout and (frozen is not None or tokenizer.eot_id is None):
        raise argparse.ArgumentError(None, "--token_dropout needs --train_layers all and a tokenizer with an "
                                           "end-of-text token, which stands for what is hidden")
    run = Run(config, "classification")
    if summary := run.finished():
        return summary
    if frozen is not None and config.cache:
        for name in ("train", "val"):
            fill_cache(model, parts[name], frozen, config, context)
    messages = parts["train"]
    per_epoch = math.ceil(len(messages.ids) / config.batch_size)
    fingerprint = json_sha256([part.rows for part in parts.values()])
    run.start(model, make_optimizers(model, config), total_steps(config, per_epoch), fingerprint)
    evaluate_now = functools.partial(evaluate_and_keep, run, model, tokenizer, made, parts, frozen, context)
    compile_blocks(model, config)
    if run.step == 0 and config.eval_every:
        evaluate_now()
    set_mode(model, frozen)
    for epoch in range(run.step // per_epoch, math.ceil(run.total / per_epoch)):  # 1. each epoch
        order = bucketed_order(messages.lengths, config.batch_size, config.seed, epoch)
        for batch in run.batches(order, config.batch_size):  # 2. each batch
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            batch_loss, tokens = 0.0, int(messages.lengths[batch].sum())
            for piece in batch.chunk(config.accumulate):
                ids, mask, cached = messages.batch(piece.tolist(), device)
                with context:  # 4. loss
                    shown = hide(ids, config.token_dropout, tokenizer.eot_id)
                    states = last_states(model, shown, cached, frozen)
                    logits = model.out_head(pool(states, mask, config.pooling))
                    loss = F.cross_entropy(logits.float(), messages.labels[piece].to(device), reduction="sum")
                    loss = loss / len(batch)
                    if config.lm_weight:
                        loss = loss + config.lm_weight * language_loss(states, ids, mask, language_head) / tokens
                loss.backward()  # 5. backward
                batch_loss += loss.item()
            norm, rate = run.update(batch_loss, tokens)  # 6. clip, set the rate, update
            run.report(batch_loss, norm, rate, tokens)  # 7. report
            if run.due(config.eval_every):  # 8. evaluate, sample, save
                evaluate_now()
            run.end_step()
    load_best(run, model, tokenizer, made)
    return finish(run, model, parts, made, context)


def finish(run, model, parts, made, context):
    """Return the summary after the test with the best weights, printed and written to summary.json."""
    logits = predict(model, parts["test"], made["pooling"], context=context)
    figures = figures_of(logits, parts["test"], made["labels"], made["positive"])
    summary = run.finish(**{f"test_{key}": value for key, value in figures.items()},
                         **compare_with_baselines(logits, parts, made), val_loss=run.best_value,
                         split_sha256=run.data_sha256, labels=made["labels"],
                         messages={name: len(part.rows) for name, part in parts.items()},
                         parameters=sum(p.numel() for p in model.parameters()))
    print_figures(figures)
    print_result(summary)
    print(f"{summary['seconds']:.0f} s; {run.folder}/model.safetensors")
    return summary


def tell_cut(parts, model):
    """Say on stderr how many messages are longer than the model can see."""
    cut, total = (sum(sum(part.cut) for part in parts), sum(len(part.ids) for part in parts))
    if cut:
        print(f"{cut:,} of {total:,} messages are longer than {model.config.context_length} tokens: only their "
              "beginning is read; see --context_length", file=sys.stderr)


def percent(share, bounds):
    """Return a share with its interval in words: percent(0.98, (0.96, 0.99)) -> "98.00% (95%: 96.00 to 99.00)"."""
    return f"{share:.2%} (95%: {100 * bounds[0]:.2f} to {100 * bounds[1]:.2f})"


def lead(summary):
    """Return how far the model is ahead of naive Bayes, in words."""
    mean, (low, high) = 100 * summary["ahead_of_naive_bayes"], summary["ahead_interval"]
    return f"ahead of naive Bayes by {mean:.2f} points (95%: {100 * low:.2f} to {100 * high:.2f})"


def print_result(summary):
    """Print the test's figures beside those of the baselines."""
    print(f"test accuracy {percent(summary['test_accuracy'], summary['test_accuracy_interval'])}, "
          f"F1 {summary['test_f1']:.4f}, calibration error {summary['test_calibration_error']:.4f}")
    print(f"naive Bayes {summary['naive_bayes_accuracy']:.2%}, F1 {summary['naive_bayes_f1']:.4f}; most frequent class "
          f"{summary['majority_accuracy']:.2%}")
    print(lead(summary))


MEANS = ("test_accuracy", "test_f1", "test_loss", "test_calibration_error", "val_loss", "naive_bayes_accuracy",
         "naive_bayes_f1", "majority_accuracy", "ahead_of_naive_bayes", "seconds")


def train_seeds(config):
    """Train once for each seed, into a folder of its own, and return the summary with means and standard deviations.

    Each seed has its own split. The interval of the lead over naive Bayes pools the test messages of all splits, which
    overlap a little, so it is slightly too narrow."""
    folder, runs = Path(config.out_dir), []
    for seed in range(config.seed, config.seed + config.seeds):
        one = dataclasses.replace(config, seed=seed, seeds=1, out_dir=str(folder / f"seed{seed}"))
        one.command_line = getattr(config, "command_line", "")
        runs.append(train(one))
    summary = {key: runs[0][key] for key in ("stage", "command", "versions", "seed", "labels", "trainable_parameters",
                                             "optimizer_bytes", "peak_memory_bytes", "step_seconds", "parameters")}
    summary.update(data=runs[0]["data"], config=saved_options(config), seeds=[run["seed"] for run in runs],
                   steps=sum(run["steps"] for run in runs), splits_sha256=[run["split_sha256"] for run in runs])
    for key in MEANS:
        values = [run[key] for run in runs]
        summary.update({key: statistics.fmean(values), f"{key}_mean": statistics.fmean(values),
                        f"{key}_std": statistics.stdev(values), f"{key}_all": values})
    summary["seconds"] = sum(run["seconds"] for run in runs)
    total = sum(run["messages"]["test"] for run in runs)
    ahead, behind = (sum(run[key] for run in runs) for key in ("only_right", "only_naive_bayes_right"))
    summary["ahead_interval"] = difference(ahead, behind, total)[1:]
    write_json(folder / "summary.json", summary)
    print(f"\n{config.seeds} seeds, mean (standard deviation)")
    for key in MEANS[:-1]:
        print(f"{key.replace('_', ' '):<24}{summary[key + '_mean']:.4f} ({summary[key + '_std']:.4f})")
    print(f"{lead(summary)}; {summary['seconds']:.0f} s; {folder}/summary.json")
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Use


def load_classifier(path, device="cpu"):
    """Return (model, tokenizer) of a classifier's file, ready for `classify_text`.

    `model.made` holds what the file says of itself: labels, pooling, lowercase, strip_punctuation, and how it was
    trained. Raises FileNotFoundError, or ValueError for a file that is damaged or no classifier."""
    from tokenizer import from_dict

    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier {path}; make one with: python finetune_cls.py")
    model, tokenizer, made = gpt.load_checkpoint(path, device)
    missing = {"labels", "pooling", "lowercase", "strip_punctuation"} - set(made)
    if made.get("kind") != "classifier" or missing or tokenizer is None:
        raise ValueError(f"{path} is no classifier but of the kind {made.get('kind')!r}; make one with: "
                         f"python finetune_cls.py --init {path}")
    if len(made["labels"]) != model.out_head.out_features:
        raise ValueError(f"{path}: {len(made['labels'])} labels for a head of {model.out_head.out_features} classes")
    model.made = made
    return model, from_dict(tokenizer)


@torch.no_grad()
def classify_texts(texts, model, tokenizer):
    """Return (probabilities (N, classes), list of bool: was it cut) of texts, read by a model of `load_classifier`."""
    sequences, cut = encode(texts, tokenizer, model.made, model.config.context_length)
    ids, mask = (t.to(model.device) for t in pad(sequences))
    return class_logits(model.eval(), ids, mask, model.made["pooling"]).float().softmax(dim=1).cpu(), cut


def classify_text(text, model, tokenizer, device=None):
    """Return the label of one text, by a model and a tokenizer of `load_classifier`.

    classify_text("You won a $1000 cash prize!", model, tokenizer) -> "spam" """
    if device is not None:
        model.to(device)
    return model.made["labels"][int(classify_texts([text], model, tokenizer)[0].argmax())]


def input_lines(source):
    """Yield the lines of a file, or of stdin for "", without their ends; bytes that are no UTF-8 become U+FFFD.

    Notes at the end count the lines with such bytes, and the empty ones."""
    if not source and sys.stdin is None:
        raise ValueError("stdin is closed; give messages as words, or a file by --file")
    with open(source, "rb") if source else contextlib.nullcontext(sys.stdin.buffer) as file:
        if not source and sys.stdin.isatty():
            print("a message a line, please; Ctrl-D ends", file=sys.stderr)
        empty = odd = 0
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise ValueError(f"{source or 'stdin'}, line {number}: a zero byte, so this is no UTF-8 text")
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            empty, odd = empty + (not text.strip()), odd + ("\ufffd" in text and "\ufffd".encode() not in line)
            yield text
    for count, what in ((empty, "empty"), (odd, "not UTF-8; unreadable bytes became U+FFFD")):
        if count:
            print(f"note: {count:,} of {number:,} lines {'is' if count == 1 else 'are'} {what}", file=sys.stderr)


def classify(config):
    """Print the label of each message given, or label a message a line from --file or stdin as JSONL."""
    if config.text and config.file:
        raise argparse.ArgumentError(None, "give messages or --file, not both")
    if len(config.text) == 1 and os.path.isfile(config.text[0]):  # Path.is_file() fails where a name is too long
        print(f"note: this name is taken for the message; its lines: --file {config.text[0]}", file=sys.stderr)
    device = pick_device(config.device)
    config.file = "" if config.file == "-" else config.file
    if config.file and not Path(config.file).exists():
        raise FileNotFoundError(f"--file {config.file} does not exist")
    model, tokenizer = load_classifier(config.checkpoint or f"{config.out_dir}/model.safetensors", device)
    labels, total, cut = model.made["labels"], 0, 0
    lines = iter(config.text) if config.text else input_lines(config.file)
    with contextlib.suppress(AttributeError):  # a terminal that cannot show a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    while texts := list(itertools.islice(lines, config.batch_size)):
        probabilities, was_cut = classify_texts(texts, model, tokenizer)
        for text, row, long in zip(texts, probabilities.tolist(), was_cut):
            best, shares = row.index(max(row)), dict(zip(labels, (round(p, 6) for p in row)))
            if config.text:
                print(f"{labels[best]}  " + " ".join(f"{label} {p:.1%}" for label, p in shares.items()) + f"  {text}")
            else:
                print(json.dumps({"label": labels[best], "probabilities": shares, "cut": long, "text": text}))
        total, cut = total + len(texts), cut + sum(was_cut)
        sys.stdout.flush()
    note = f", {cut:,} of them cut to {model.config.context_length} tokens" if cut else ""
    print(f"{total:,} message{'s' * (total != 1)}{note}", file=sys.stderr)


def evaluate(config):
    """Print and return a classifier's figures on a part of the split of --data, or on all of it."""
    check_no_text(config)
    device = pick_device(config.device)
    model, tokenizer = load_classifier(config.checkpoint or f"{config.out_dir}/model.safetensors", device)
    labels = model.made["labels"]
    if config.part == "all" and config.data != "tinyworld":
        rows = read_labelled(config.data, labels)
    else:
        parts, _ = read_parts(config)
        rows = sum(parts, []) if config.part == "all" else parts[PARTS.index(config.part)]
        if json_sha256(parts) != model.made.get("data_sha256"):
            print("note: this is not the split that the model was trained on (other --data, --seed or options), so it "
                  "may have seen some of these messages", file=sys.stderr)
    for number, (label, text) in enumerate(rows, 1):
        if label not in labels:
            raise ValueError(f"{config.data}: message {number}, {text[:40]!r}, has the label {label!r}; the model "
                             f"knows {', '.join(labels)}")
    messages = Messages(rows, tokenizer, model.made, model.config.context_length)
    tell_cut([messages], model)
    logits = predict(model, messages, model.made["pooling"], context=autocast(config, device))
    figures = figures_of(logits, messages, labels, model.made.get("positive"))
    print_figures(figures)
    print(f"{len(rows):,} messages, accuracy {percent(figures['accuracy'], figures['accuracy_interval'])}, "
          f"F1 {figures['f1']:.4f}, calibration error {figures['calibration_error']:.4f}")
    return figures


def main(argv=None):
    """Run the command line and return its exit status."""
    return run_script(__doc__, Config, {"train": train, "classify": classify, "evaluate": evaluate}, argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
