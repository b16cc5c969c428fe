"""Classification: fine-tune a pretrained model to sort messages, measure it beside two baselines, and use it.

    python finetune_cls.py                              spam or not, built-in messages, from `python train.py`'s model
    python finetune_cls.py classify "You won a $1000 cash prize!"          the label and its probability
    python finetune_cls.py classify --file messages.txt > labels.jsonl     one message per line (also stdin), JSONL out
    python finetune_cls.py evaluate --data more.tsv --split all            a trained classifier on other messages
    python finetune_cls.py --data sms_spam --balance --init gpt2 --train_layers last-block --context_length 120

The head with one score per token is replaced by a linear layer with one score per class. It reads one vector per
message: the last block's state at the message's last token, which has attended to all before it, or the mean over the
message. The loss is cross-entropy, nats per message. Equal messages (but for case and spaces) fall into the same part
of the split, which --seed decides. Writes into --out_dir: model.safetensors (best weights, tokenizer and label names),
adapter/ (lora), state.pt, metrics.jsonl, curves.svg, summary.json (test figures beside two baselines). In Python:

    classify_text("Are we still on for dinner tonight?", *load_classifier("out/cls/model.safetensors"))

Differs from Raschka 2024, chapter 6: the last token is read, not the last position (--pooling position does that).
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import gpt  # first, because it filters torch's warning about numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import json_sha256, order_by_length, read_labelled, seeded, split, tinyworld
from torch.nn.utils import clip_grad_norm_
from train import (TRAINING, AdapterOptions, Command, Progress, add_adapters, autocast, batches, check_finite,
                   draw_curves, due, fingerprint, finished, full_precision, is_best, load_start, log, make_optimizers,
                   naive_bayes, open_run, option, read_log, report_step, run_script, save_best, save_state,
                   set_learning_rate, stop_now, total_steps, wilson, write_summary)

LAYERS = {"head": 0, "last-block": 1, "last-two": 2, "all": None, "lora": None}  # how many blocks train, None = all
POOLINGS = ("last", "mean", "position")
PARTS = ("train", "val", "test")
CACHE_BYTES = 1 << 32  # 4 GiB for a part's output of the frozen layers; what is larger is computed in every step


@dataclass
class Config(AdapterOptions):
    """The options of classification."""

    data: str = option("tinyworld", "a labeled file or dataset: tinyworld, sms_spam, my.tsv, my.csv, my.jsonl")
    init: str = option("out/pretrain/model.safetensors", "start from: a checkpoint file, or gpt2 ... gpt2-xl")
    out_dir: str = option("out/cls", "the run's folder")
    epochs: int = option(3, "passes over the data, 0 = no limit; this or max_steps, whichever ends first", low=0)
    batch_size: int = option(32, "messages per update", low=1)
    warmup_steps: int = option(20, "steps from 0 up to the peak rate", low=0)
    eval_every: int = option(50, "steps between evaluations, 0 = only at the end", low=0)
    train_layers: str = option("all", "head alone, last-block, last-two, all, or lora (rank 8)", choices=tuple(LAYERS))
    pooling: str = option("last", "state for the head: last token's, mean, or last position's", choices=POOLINGS)
    balance: bool = option(False, "as many messages of each class as the rarest has, drawn by --seed")
    unique: bool = option(False, "drop messages that occurred before")
    lowercase: bool = option(False, "read messages in lower case")
    strip_punctuation: bool = option(False, "read messages without punctuation")
    val_share: float = option(0.1, "of the messages, for validation", low=0.01, high=0.45)
    test_share: float = option(0.2, "of the messages, for the test", low=0.01, high=0.45)
    checkpoint: str = option("out/cls/model.safetensors", "the classifier")
    file: str = option("-", "messages, one per line; - is stdin")
    split: str = option("test", "part of the data", choices=(*PARTS, "all"))
    text: list = option((), "the messages")


# Messages and model ---------------------------------------------------------------------------------------------------


def dedup_key(row):
    """Return what rows with the same message have in common: the text but for case and white space."""
    return " ".join(row[1].lower().split())


def deduplicate_and_balance(rows, config, part=0):
    """Return rows without repeated messages (--unique), and of every class as many as of the rarest (--balance)."""
    if config.unique:
        rows = list({dedup_key(row): row for row in reversed(rows)}.values())[::-1]
    if config.balance:
        counts, kept = Counter(label for label, _ in rows), []
        generator = seeded("balance", config.seed, part)
        for label in sorted(counts):
            places = [i for i, row in enumerate(rows) if row[0] == label]
            drawn = torch.randperm(len(places), generator=generator)[: min(counts.values())]
            kept += [places[i] for i in drawn.tolist()]
        rows = [rows[i] for i in sorted(kept)]
    return rows


def read_parts(config):
    """Return (parts, labels): the rows of train, val and test, and the sorted names of the classes.

    Raises ValueError for fewer than two classes, a class of one row (a header?), and one that training lacks."""
    if config.data == "tinyworld":
        if (config.val_share, config.test_share) != (Config.val_share, Config.test_share):
            raise argparse.ArgumentError(None, "--val_share, --test_share: tinyworld has parts of its own")
        parts = [deduplicate_and_balance(tinyworld("messages", part, seed=config.seed), config, part) for part in PARTS]
        rows = sum(parts, [])
    else:
        rows = read_labelled(config.data)
        kept, train_share = deduplicate_and_balance(rows, config), 1 - config.val_share - config.test_share
        parts = split(kept, train_share, config.val_share, config.seed, group=dedup_key)
    counts, labels = Counter(label for label, _ in rows), sorted({label for label, _ in parts[0]})
    for label in counts:
        if counts[label] == 1 or label not in labels:
            raise ValueError(f"{config.data}: the label {label!r} has too few rows ({counts[label]}) for training and "
                             "test: remove it if it is a header or a mistake, or add rows")
    sizes = ", ".join(f"{len(part):,} {name}" for part, name in zip(parts, PARTS))
    if len(labels) < 2 or not all(parts):
        raise ValueError(f"{config.data}: need two labels, and messages in each part; got {', '.join(labels)}; {sizes}")
    print(f"{config.data}: {sizes} messages; labels: {', '.join(labels)}", file=sys.stderr)
    return parts, labels


def clean(text, info):
    """Return text as the classifier reads it: in lower case, without punctuation, where it was trained so."""
    text = text.lower() if info["lowercase"] else text
    return re.sub(r"[^\w\s]", "", text) if info["strip_punctuation"] else text


class Messages:
    """Rows as token ids, at most `length` each; `cut` tells which had more, `states` caches frozen layers' output."""

    def __init__(self, rows, tokenizer, info, length):
        pad_id = tokenizer.pad_id or 0
        all_ids = [tokenizer.encode(clean(text, info)) or [pad_id] for _, text in rows]
        self.rows, self.states, self.cut = rows, None, [len(ids) > length for ids in all_ids]
        self.ids = [torch.tensor(ids[:length]) for ids in all_ids]
        if info["pooling"] == "position":  # the model reads the padding as if it were text
            self.ids = [F.pad(ids, (0, length - len(ids)), value=pad_id) for ids in self.ids]
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self.labels = torch.tensor([info["labels"].index(label) for label, _ in rows])

    def batch(self, indices, device):
        """Return ids and mask (B, T), padded on the right, labels (B,), and the cached states (B, T, C) or None."""
        ids = nn.utils.rnn.pad_sequence([self.ids[i] for i in indices], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < self.lengths[indices][:, None]).long()
        states = self.states and nn.utils.rnn.pad_sequence([self.states[i] for i in indices], batch_first=True)
        return [t if t is None else t.to(device) for t in (ids, mask, self.labels[indices], states)]


def pool(states, mask, pooling):
    """Return the state that the head reads, the mean or the last one: states (B, T, C), mask (B, T) -> (B, C)."""
    if pooling == "mean":
        mask = mask.to(states.dtype).unsqueeze(2)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]


@torch.no_grad()
@torch.compiler.disable
def frozen_states(model, ids, n_frozen):
    """Return the output of the embeddings and the lowest blocks, without gradient or dropout: (B, T) -> (B, T, C)."""
    was_training = model.training
    model.eval()
    x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
    for block in model.trf_blocks[:n_frozen]:
        x = block(x)
    model.train(was_training)
    return x


def class_logits(model, ids, mask, pooling, n_frozen=None, states=None):
    """Return one score per class: ids, mask (B, T) -> (B, classes); `states` (B, T, C): cached, of frozen blocks."""
    if n_frozen is None:
        x = model.hidden(ids, None if mask[:, 0].all() else mask)  # causal attention never sees padding on the right
    else:
        x = frozen_states(model, ids, n_frozen) if states is None else states
        for block in model.trf_blocks[n_frozen:]:
            x = block(x)
        x = model.final_norm(x)
    return model.out_head(pool(x, mask, pooling))


def fill_cache(model, messages, n_frozen, config, context):
    """Compute the frozen layers' output once and keep it, unless it would take more than CACHE_BYTES."""
    size = int(messages.lengths.sum()) * model.config.emb_dim * 4
    if size > CACHE_BYTES:
        print(f"note: {size / 1e9:.1f} GB of frozen layers are not cached; lower --context_length", file=sys.stderr)
        return
    states = [None] * len(messages.ids)
    for batch in messages.lengths.argsort(stable=True).split(config.batch_size):
        ids, *_ = messages.batch(batch, model.device)
        with context:
            x = frozen_states(model, ids, n_frozen).float().cpu()
        for i, row in zip(batch, x):
            states[i] = row[: messages.lengths[i]].clone()
    messages.states = states


def start_model(config, labels):
    """Return (model, tokenizer): --init with a new head for the labels, or with its own if it classifies the same."""
    model, tokenizer, info = load_start(config, "python train.py", kinds=("gpt", "classifier"))
    if info.get("labels", labels) != labels:
        raise ValueError(f"--init {config.init} has the labels {', '.join(info['labels'])}, --data {', '.join(labels)}")
    if info["kind"] == "gpt":
        model.config = replace(model.config, tie_weights=False)
        model.out_head = nn.Linear(model.config.emb_dim, len(labels))
        nn.init.normal_(model.out_head.weight, std=0.02)
        nn.init.zeros_(model.out_head.bias)
    return model, tokenizer


def choose_trained(model, config):
    """Return how many of the lowest blocks are frozen, embeddings included, or None for none; marks what trains."""
    count, rank = LAYERS[config.train_layers], config.lora_rank or 8 * (config.train_layers == "lora")
    if rank and count is not None:
        raise argparse.ArgumentError(None, f"--lora_rank does not go with --train_layers {config.train_layers}")
    if rank:
        add_adapters(model, replace(config, lora_rank=rank))
        model.out_head.requires_grad_(True)
    if count is None:
        return None
    n_frozen = max(0, model.config.n_layers - count)
    model.requires_grad_(False)
    for module in (model.out_head, *model.trf_blocks[n_frozen:], *([model.final_norm] if count else [])):
        module.requires_grad_(True)
    return n_frozen


# Figures and training -------------------------------------------------------------------------------------------------


def figures_of(logits, messages, info):
    """Return the figures of predictions, logits (N, classes), on a part of the split, as a dict for summary.json.

    F1 is that of the rarer of two classes, or the mean over more (macro F1); 0 stands where nothing was predicted."""
    labels, n = info["labels"], len(info["labels"])
    cells = messages.labels * n + logits.argmax(dim=1)
    confusion = torch.bincount(cells, minlength=n * n).view(n, n).tolist()  # a row per class, a column per prediction
    classes, correct = {}, sum(confusion[i][i] for i in range(n))
    for i, label in enumerate(labels):
        hits, actual, predicted = confusion[i][i], sum(confusion[i]), sum(row[i] for row in confusion)
        classes[label] = {"messages": actual, "precision": hits / max(predicted, 1), "recall": hits / max(actual, 1),
                          "f1": 2 * hits / max(predicted + actual, 1)}
    scores = [figures["f1"] for figures in classes.values()]
    return {"loss": F.cross_entropy(logits, messages.labels).item(), "accuracy": correct / len(logits),
            "accuracy_interval": wilson(correct, len(logits)), "confusion": confusion, "classes": classes,
            "f1": sum(scores) / n if n > 2 else scores[info["positive"]], "cut": sum(messages.cut)}


def baseline_figures(rows, test, info):
    """Return the test figures of two baselines fitted to rows: naive Bayes, and always the most frequent class."""
    scores = naive_bayes([(label, clean(text, info)) for label, text in rows])
    logits = [list(scores(clean(text, info)).values()) for _, text in test.rows]  # in the order of the sorted labels
    bayes = figures_of(torch.tensor(logits, dtype=torch.float64), test, info)
    usual = Counter(label for label, _ in rows).most_common(1)[0][0]
    return {"naive_bayes_accuracy": bayes["accuracy"], "naive_bayes_f1": bayes["f1"],
            "majority_accuracy": bayes["classes"][usual]["messages"] / len(test.rows)}


def print_figures(figures):
    """Print the confusion matrix with the figures of each class, then accuracy and F1."""
    width = max(12, *(len(label) + 2 for label in figures["classes"]))
    print(" " * width + "".join(f"{'-> ' + label:>{width}}" for label in figures["classes"]) + " precision recall   F1")
    for (label, its), row in zip(figures["classes"].items(), figures["confusion"]):
        counts = "".join(f"{count:>{width},}" for count in row)
        print(f"{label:<{width}}{counts}{its['precision']:>10.1%}{its['recall']:>7.1%}{its['f1']:>7.1%}")
    low, high = figures["accuracy_interval"]
    print(f"{sum(map(sum, figures['confusion'])):,} messages, {figures['cut']} of them cut; accuracy "
          f"{figures['accuracy']:.2%} (95%: {100 * low:.2f} to {100 * high:.2f}), F1 {figures['f1']:.4f}")


@torch.no_grad()
def predict(model, messages, pooling, n_frozen=None, context=contextlib.nullcontext()):
    """Return logits (N, classes) of all messages, in their order, computed in order of length to save padding."""
    was_training, logits = model.training, torch.zeros(len(messages.ids), model.out_head.out_features)
    model.eval()
    for batch in messages.lengths.argsort(stable=True).split(64):
        ids, mask, _, states = messages.batch(batch, model.device)
        with context:
            logits[batch] = class_logits(model, ids, mask, pooling, n_frozen, states).float().cpu()
    model.train(was_training)
    return logits


def evaluate_and_save(folder, model, tokenizer, info, messages, progress, total, n_frozen, context):
    """Evaluate on the validation part, keep the weights if they are the best so far, log and draw."""
    logits = predict(model, messages, info["pooling"], n_frozen, context)
    loss = F.cross_entropy(logits, messages.labels).item()
    accuracy = (logits.argmax(dim=1) == messages.labels).float().mean().item()
    log(folder, progress.step, val_loss=loss, val_accuracy=accuracy)
    if is_best(progress, loss):
        save_best(folder, model, tokenizer, step=progress.step, val_loss=loss, **info)
    print(f"step {progress.step}/{total}  validation loss {loss:.4f} (best {progress.best:.4f})  accuracy "
          f"{accuracy:.2%}", file=sys.stderr)
    keys = {"train": "loss", "validation": "val_loss"}
    draw_curves(folder / "curves.svg", "Classification", read_log(folder), keys, "loss, nats per message")


def train(config):
    """Train a classifier and return the summary, a dict that summary.json holds too."""
    if summary := finished(config):
        return summary
    device = gpt.pick_device(config.device)
    context = autocast(config, device)
    rows, labels = read_parts(config)
    total = total_steps(config, math.ceil(len(rows[0]) / config.batch_size))
    torch.manual_seed(config.seed)
    model, tokenizer = start_model(config, labels)
    n_frozen, length = choose_trained(model, config), model.config.context_length
    model.to(device).train()
    mark, counts = fingerprint(model, *rows), Counter(label for part in rows for label, _ in part)
    info = {"kind": "classifier", "stage": "classification", "data_sha256": mark["data"], "labels": labels,
            "positive": labels.index(min(reversed(labels), key=counts.get)),  # the rarer class, whose F1 is reported
            **{key: getattr(config, key) for key in ("pooling", "lowercase", "strip_punctuation")}}
    messages, val_messages, test_messages = (Messages(part, tokenizer, info, length) for part in rows)
    if cut := sum(messages.cut + val_messages.cut + test_messages.cut):
        print(f"{cut:,} messages are longer than {length} tokens: only their beginning is read", file=sys.stderr)
    for part in (messages, val_messages) if n_frozen is not None else ():
        fill_cache(model, part, n_frozen, config, context)
    optimizers, progress = make_optimizers(model, config), Progress()
    order = functools.partial(order_by_length, messages.lengths, config.batch_size, config.seed)
    forward = torch.compile(class_logits, dynamic=True) if config.compile else class_logits
    with open_run(config, model, optimizers, progress, total, mark, "classification") as (folder, stop):
        if progress.step == 0:
            evaluate_and_save(folder, model, tokenizer, info, val_messages, progress, total, n_frozen, context)
        for indices in batches(len(rows[0]), config, progress, total, order):  # 1. each epoch  2. each batch
            clock = time.monotonic()
            model.zero_grad(set_to_none=True)  # 3. clear gradients
            tokens, batch_loss = messages.lengths[indices].sum().item(), 0.0
            for some in torch.tensor(indices).chunk(config.accumulate):
                ids, mask, targets, states = messages.batch(some, device)
                with context:
                    logits = forward(model, ids, mask, config.pooling, n_frozen, states)
                loss = F.cross_entropy(full_precision(logits), targets, reduction="sum") / len(indices)  # 4. loss
                loss.backward()  # 5. backward
                batch_loss += loss.item()
            norm = clip_grad_norm_(model.parameters(), config.clip or math.inf).item()  # 6. clip, set the rate, update
            check_finite(batch_loss, norm, progress, folder, indices)
            rate = set_learning_rate(optimizers, progress.step, total, config)
            for optimizer in optimizers:
                optimizer.step()
            progress.step += 1
            progress.tokens += tokens
            report_step(folder, progress, total, config, batch_loss, norm, rate, tokens, clock)  # 7. report
            if due(progress.step, config.eval_every, total):  # 8. evaluate, sample, save
                evaluate_and_save(folder, model, tokenizer, info, val_messages, progress, total, n_frozen, context)
            stopping = bool(stop)  # one look per step, the same in every process
            if stopping or due(progress.step, config.save_every, total):
                save_state(folder, model, optimizers, progress, config, mark)
            if stopping:
                stop_now(folder, progress, total, stop)
        stop.release()  # everything is saved: Ctrl-C may end what follows, and --resume does it again
        best, _, _ = load_classifier(folder / "model.safetensors", device)
        figures = figures_of(predict(best, test_messages, config.pooling, context=context), test_messages, info)
        summary = write_summary(folder, config, "classification", progress, model, mark, val_loss=progress.best,
                                split_sha256=mark["data"], labels=labels, messages=dict(zip(PARTS, map(len, rows))),
                                **{f"test_{key}": value for key, value in figures.items()},
                                **baseline_figures(rows[0], test_messages, info))
    print_figures(figures)
    print(f"naive Bayes {summary['naive_bayes_accuracy']:.2%}, F1 {summary['naive_bayes_f1']:.4f}; most frequent class "
          f"{summary['majority_accuracy']:.2%}; {summary['seconds']:.0f} s; {folder}/model.safetensors")
    return summary


# Use ------------------------------------------------------------------------------------------------------------------


def load_classifier(path, device="cpu"):
    """Return (model, tokenizer, info) of a classifier's file; raises FileNotFoundError, ValueError for another file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no classifier {path}; make one with: python finetune_cls.py")
    model, tokenizer, info = gpt.load_checkpoint(path, device)
    if info["kind"] != "classifier" or tokenizer is None or info.get("pooling") not in POOLINGS:
        raise ValueError(f"{path} is not a classifier with a tokenizer and a pooling of {', '.join(POOLINGS)}, but of "
                         f"the kind {info['kind']!r}; make one with: python finetune_cls.py --init {path}")
    return model, tokenizer, info


def classify_texts(texts, model, tokenizer, info):
    """Return (probabilities (N, classes), list of bool: was it cut) of texts, by what `load_classifier` returned."""
    rows = [(info["labels"][0], text) for text in texts]  # the label is not looked at
    messages = Messages(rows, tokenizer, info, model.config.context_length)
    return predict(model, messages, info["pooling"]).softmax(dim=1), messages.cut


def classify_text(text, model, tokenizer, info):
    """Return the label of one text: classify_text("You won $1000!", *load_classifier(path)) -> "spam"."""
    return info["labels"][int(classify_texts([text], model, tokenizer, info)[0].argmax())]


def input_lines(source):
    """Yield the lines of a file, or of stdin for "-", without their ends; bytes that are not UTF-8 become U+FFFD."""
    if source == "-" and sys.stdin is None:
        raise ValueError("stdin is closed; give messages as words, or a file by --file")
    with contextlib.nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as file:
        if file.isatty():
            print("one message per line; Ctrl-D ends", file=sys.stderr)
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise ValueError(f"{source}, line {number}: a zero byte, so this is not UTF-8 text")
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def classify(config):
    """Print the label of each message given, or label one message per line from --file or stdin as JSONL."""
    if config.text and config.file != "-":
        raise argparse.ArgumentError(None, "give messages or --file, not both")
    gpt.check_utf8(*config.text)
    model, tokenizer, info = load_classifier(config.checkpoint, gpt.pick_device(config.device))
    lines = iter(config.text) if config.text else input_lines(config.file)
    typed = not config.text and config.file == "-" and sys.stdin and sys.stdin.isatty()  # label each line at once
    while texts := list(itertools.islice(lines, 1 if typed else config.batch_size)):
        probabilities, cut = classify_texts(texts, model, tokenizer, info)
        for text, row, was_cut in zip(texts, probabilities.tolist(), cut):
            label, shares = info["labels"][row.index(max(row))], dict(zip(info["labels"], (round(p, 6) for p in row)))
            if config.text:
                print(label, *(f"{name} {p:.1%}" for name, p in shares.items()), "[cut] " * was_cut + text, sep="  ")
            else:
                print(json.dumps({"label": label, "probabilities": shares, "cut": was_cut, "text": text}), flush=True)


def evaluate(config):
    """Print and return a classifier's figures on a part of the split of --data, or on all of it."""
    model, tokenizer, info = load_classifier(config.checkpoint, gpt.pick_device(config.device))
    if config.split == "all" and config.data != "tinyworld":
        rows = deduplicate_and_balance(read_labelled(config.data, info["labels"]), config)
    else:
        parts, _ = read_parts(config)
        rows = sum(parts, []) if config.split == "all" else parts[PARTS.index(config.split)]
        if json_sha256(parts) != info.get("data_sha256"):
            print("note: this is not the split that the model was trained on (other --data, --seed or options), so it "
                  "may have seen some of these messages", file=sys.stderr)
    if unknown := sorted({label for label, _ in rows} - set(info["labels"])):
        raise ValueError(f"{config.data} has the label {unknown[0]!r}; the model knows {', '.join(info['labels'])}")
    messages = Messages(rows, tokenizer, info, model.config.context_length)
    context = autocast(config, model.device)
    figures = figures_of(predict(model, messages, info["pooling"], context=context), messages, info)
    print_figures(figures)
    return figures


def main(argv=None):
    """Run the command line and return its exit status."""
    splitting, head = " val_share test_share balance unique", " train_layers pooling lowercase strip_punctuation"
    return run_script(__doc__, Config, {
        "train": Command(train, TRAINING + splitting + head + " lora_rank lora_alpha lora_dropout lora_targets"),
        "classify": Command(classify, "text file checkpoint batch_size device debug"),
        "evaluate": Command(evaluate, "checkpoint data split seed device dtype debug" + splitting)}, argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
