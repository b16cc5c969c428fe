"""Classification: published figures of the metrics, padding, frozen layers, their cache, resume, use, mistakes."""

import copy
import io
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import finetune_cls as cls
import gpt
import train
from tokenizer import WordTokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--data rows.tsv --init base.safetensors --batch_size 8 --epochs 0 --max_steps 12 --warmup_steps 2 "
        "--eval_every 5").split()


def message(rng):
    """Return (label, text): the same words in both classes, only their order tells; up to five others around them."""
    words = [rng.choice("red blue old new big".split()) for _ in range(rng.randrange(5))]
    label = rng.choice(("eats", "eaten"))
    pair = ["dog", "bites", "man"] if label == "eats" else ["man", "bites", "dog"]
    at = rng.randrange(len(words) + 1)
    return label, " ".join(words[:at] + pair + words[at:] + [f"n{rng.randrange(8)}"])


def write_base(texts, emb_dim=16, n_layers=2, path="base.safetensors"):
    """Write a language model with random weights and a word tokenizer of these texts: what a classifier starts from."""
    tokenizer = WordTokenizer.train(texts)
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 12, emb_dim, 2, n_layers, drop_rate=0.0, tie_weights=True))
    gpt.save_checkpoint(path, model, tokenizer)


def write_rows(rows, path="rows.tsv"):
    """Write (label, text) rows as label<TAB>text."""
    Path(path).write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Return 160 rows of rows.tsv in a folder of its own, which is the current one, with a base.safetensors."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    rows = [message(rng) for _ in range(160)]
    write_rows(rows)
    write_base([text for _, text in rows])
    return rows


def fit(*flags, status=0, folder="out/cls"):
    """Run `train` with the tiny sizes and return the summary, or None after a failure."""
    assert cls.main(["train", *TINY, *map(str, flags)]) == status
    path = Path(folder, "summary.json")
    return json.loads(path.read_text(encoding="utf-8")) if status == 0 and path.exists() else None


def tiny_model(classes=3, layers=2, **options):
    """Return a small classifier with random weights, in eval mode."""
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(40, 12, 16, 2, layers, drop_rate=0.0, **options))
    model.out_head = torch.nn.Linear(16, classes)
    return model.eval()


def info_of(labels, pooling="last", positive=1, **cleaning):
    """Return what a classifier's file says of itself."""
    return {"labels": labels, "pooling": pooling, "positive": positive, "lowercase": False, "strip_punctuation": False,
            **cleaning}


def messages_of(truth, cut=None):
    """Return Messages with these numbers as labels and nothing else."""
    messages = cls.Messages.__new__(cls.Messages)
    messages.labels, messages.cut = torch.tensor(truth), cut or [False] * len(truth)
    return messages


# --- figures


def test_intervals_are_those_published():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, Wilson's score method."""
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                  (1, 29, 0.0061, 0.1718)):
        assert cls.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert cls.wilson(29, 29)[1] == 1 and cls.wilson(0, 0) == (0, 1)


def test_figures_of_hand_made_logits():
    """Four messages, one wrong: loss, accuracy, confusion, precision, recall and F1 by hand; an even guess is ln 2."""
    messages = messages_of([0, 0, 0, 1], [False, True, False, False])
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    figures = cls.figures_of(logits, messages, info_of(["ham", "spam"]))
    softplus = [math.log1p(math.exp(x)) for x in (-2, -1, 3, -1)]
    assert figures["loss"] == pytest.approx(sum(softplus) / 4) and figures["accuracy"] == 0.75
    assert figures["accuracy_interval"] == train.wilson(3, 4)
    assert figures["confusion"] == [[2, 1], [0, 1]] and figures["cut"] == 1
    assert figures["classes"]["ham"] == {"messages": 3, "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8}
    assert figures["classes"]["spam"] == {"messages": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert figures["f1"] == pytest.approx(2 / 3)  # of spam
    assert cls.figures_of(logits, messages, info_of(["ham", "spam"], positive=0))["f1"] == 0.8
    even = cls.figures_of(torch.zeros(4, 2), messages, info_of(["ham", "spam"]))
    assert even["loss"] == pytest.approx(math.log(2))


def test_macro_f1_and_empty_classes():
    """With three classes the mean of their F1; a class that is never there nor predicted counts 0."""
    figures = cls.figures_of(F.one_hot(torch.tensor([0, 1, 1, 1]), 3).float(), messages_of([0, 0, 1, 1]),
                             info_of(["a", "b", "c"]))
    assert figures["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert figures["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert figures["classes"]["c"] == {"messages": 0, "precision": 0, "recall": 0, "f1": 0}


CHINA = [("yes", "Chinese Beijing Chinese"), ("yes", "Chinese Chinese Shanghai"), ("yes", "Chinese Macao"),
         ("no", "Tokyo Japan Chinese")]


def test_the_baselines_solve_the_textbook_example():
    """Manning, Raghavan and Schuetze 2008, example 13.1: class China; and the two-word text by its probabilities."""
    texts = [("yes", "Chinese Chinese Chinese Tokyo Japan"), ("no", "tokyo JAPAN"), ("no", "unknown words only")]
    test = messages_of([1, 0, 0])  # 3/4 (1/14)^2 = 0.004 < 1/4 (2/9)^2 = 0.012: the second is "no", the third "yes"
    test.rows = texts
    figures = cls.baseline_figures(CHINA, test, info_of(["no", "yes"], positive=0))
    assert figures["naive_bayes_accuracy"] == pytest.approx(2 / 3) and figures["naive_bayes_f1"] == pytest.approx(2 / 3)
    assert figures["majority_accuracy"] == pytest.approx(1 / 3)


def test_naive_bayes_on_real_messages(real_data):
    """On SMS Spam it reaches what is usual for it: 97.5 to 99% of a test split, and no class is left out."""
    config = cls.Config(data=str(real_data("SMSSpamCollection")), unique=True)
    parts, labels = cls.read_parts(config)
    scores = train.naive_bayes(parts[0])
    found = [(label, scores(text)) for label, text in parts[2]]
    right = [max(figures, key=figures.get) == label for label, figures in found]
    assert labels == ["ham", "spam"] and 0.975 < statistics.fmean(right) < 0.99


# --- messages


def test_equal_messages_never_meet_across_parts(rows):
    """But for case and spaces; every row lands in exactly one part; another seed splits otherwise, the same alike."""
    copies = rows + [(label, text.upper().replace(" ", "  ")) for label, text in rows[:50]]
    write_rows(copies)
    parts, _ = cls.read_parts(cls.Config(data="rows.tsv"))
    keys = [{cls.dedup_key(row) for row in part} for part in parts]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert sorted(sum(parts, [])) == sorted(copies)
    assert [len(part) for part in parts] == pytest.approx([147, 21, 42], abs=4)
    assert cls.read_parts(cls.Config(data="rows.tsv"))[0] == parts
    assert cls.read_parts(cls.Config(data="rows.tsv", seed=7))[0] != parts


def test_balance_and_unique():
    """Every class as often as the rarest, no row invented; --unique keeps the first of equal messages."""
    rows = [("a", f"text {i}") for i in range(30)] + [("b", f"other {i}") for i in range(10)]
    rows += [("c", "x"), ("c", "X ")]
    kept = cls.deduplicate_and_balance(rows, cls.Config(balance=True, unique=False))
    assert sorted(label for label, _ in kept) == ["a"] * 2 + ["b"] * 2 + ["c"] * 2 and set(kept) <= set(rows)
    assert cls.deduplicate_and_balance(rows, cls.Config(unique=True)) == rows[:-1]
    assert cls.deduplicate_and_balance(rows, cls.Config(balance=True, seed=3)) != kept


def test_the_books_split_has_its_sizes(real_data):
    """747 + 747 messages in 1045, 149 and 300, as in the book, but for groups of equal messages kept together."""
    parts, _ = cls.read_parts(cls.Config(data=str(real_data("SMSSpamCollection")), balance=True))
    assert [len(part) for part in parts] == pytest.approx([1045, 149, 300], abs=5) and sum(map(len, parts)) == 1494
    assert sum(label == "spam" for part in parts for label, _ in part) == 747


def test_cleaning_is_part_of_the_classifier():
    """Lower case and punctuation as trained; off by default."""
    assert cls.clean("Win £5, NOW!", info_of([])) == "Win £5, NOW!"
    assert cls.clean("Win £5, NOW!", info_of([], lowercase=True, strip_punctuation=True)) == "win 5 now"


# --- the classifier


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_on_either_side_changes_no_prediction(pooling):
    """A message alone, padded on the right and on the left, whatever token the padding is."""
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    alone = cls.class_logits(model, ids, torch.ones_like(ids), pooling)
    for pad_id in (0, 39):
        for sides in ((0, 3), (3, 0), (2, 2)):
            padded, mask = F.pad(ids, sides, value=pad_id), F.pad(torch.ones_like(ids), sides)
            assert torch.allclose(cls.class_logits(model, padded, mask, pooling), alone, atol=1e-5), sides
    wrong = cls.class_logits(model, F.pad(ids, (3, 0)), torch.ones(1, 7, dtype=torch.long), pooling)
    assert not torch.allclose(wrong, alone, atol=1e-3)  # the control: padding read as text does change it


def test_pooling_reads_the_states_it_should():
    """Rows of known states: the last real token, the mean of the real ones."""
    states = torch.arange(8.0).view(1, 8, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])
    assert [cls.pool(states, mask, how).item() for how in ("last", "mean")] == [5, 3.5]


def test_position_pooling_reads_padding_as_the_book_does():
    """All messages are filled up to the context length, and their last position counts."""
    tokenizer = WordTokenizer.train(["a b c d"])
    messages = cls.Messages([("x", "a b"), ("x", "a b c d")], tokenizer, info_of(["x"], "position"), 3)
    assert [ids.tolist() for ids in messages.ids] == [[*tokenizer.encode("a b"), tokenizer.pad_id],
                                                      tokenizer.encode("a b c")]
    assert messages.cut == [False, True] and messages.batch([0, 1], "cpu")[1].all()


def test_batches_hold_each_message_as_it_is_alone():
    """Ids, mask and label of three messages of different length, in the order asked for."""
    tokenizer = WordTokenizer.train(["a b c d"])
    messages = cls.Messages([("x", "a b c"), ("y", "d"), ("x", "")], tokenizer, info_of(["x", "y"]), 12)
    ids, mask, labels, states = messages.batch([1, 0, 2], "cpu")
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]] and labels.tolist() == [1, 0, 0] and states is None
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask)] == [
        tokenizer.encode("d"), tokenizer.encode("a b c"), [tokenizer.pad_id]]


def test_an_untrained_classifier_knows_nothing(rows):
    """The first validation loss is about ln 2 whatever the layers say, because the new head starts near 0."""
    fit("--max_steps", 1)
    first = train.read_log(Path("out/cls"))[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(math.log(2), abs=0.1)


def test_word_order_is_learned_where_naive_bayes_must_guess(rows, capsys):
    """Two classes of the same words: at least 95% right, naive Bayes near a half; all that a run promises is there."""
    rng = random.Random(3)
    rows = [message(rng) for _ in range(700)]
    write_rows(rows)
    write_base([text for _, text in rows], emb_dim=32)
    summary = fit("--max_steps", 150, "--learning_rate", 0.01, "--eval_every", 50, "--optimizer", "muon")
    assert summary["test_accuracy"] >= 0.95 > 0.75 > summary["naive_bayes_accuracy"]
    assert summary["test_accuracy_interval"][0] > 0.9 and summary["test_f1"] > 0.95
    assert sum(map(sum, summary["test_confusion"])) == summary["messages"]["test"]
    out = capsys.readouterr().out
    assert "precision" in out and f"{summary['test_accuracy']:.2%}" in out
    assert sorted(os.listdir("out/cls")) == [".lock", "curves.svg", "metrics.jsonl", "model.safetensors", "state.pt",
                                             "summary.json"]
    assert cls.main(["evaluate", "--data", "rows.tsv"]) == 0
    streams = capsys.readouterr()
    assert f"; accuracy {summary['test_accuracy']:.2%}" in streams.out and "note" not in streams.err
    assert cls.main(["evaluate", "--data", "rows.tsv", "--seed", "5"]) == 0
    assert "not the split" in capsys.readouterr().err


@pytest.fixture
def start(monkeypatch):
    """Return a dict that a later run fills: its model, the weights before training, and a copy of the model then."""
    found, original = {}, cls.choose_trained

    def spy(model, config):
        found.update(model=model, copy=copy.deepcopy(model),
                     weights={name: tensor.clone() for name, tensor in model.state_dict().items()})
        return original(model, config)

    monkeypatch.setattr(cls, "choose_trained", spy)
    return found


@pytest.mark.parametrize("layers", ["head", "last-block", "last-two", "all", "lora"])
def test_frozen_weights_stay_bit_identical_and_the_others_move(rows, start, layers):
    """The last weights against those before the first step, on three blocks."""
    write_base([text for _, text in rows], n_layers=3)
    summary = fit("--train_layers", layers, "--max_steps", 3)
    after = start["model"].state_dict()
    moved = {name for name, tensor in start["weights"].items() if not torch.equal(after[name], tensor)}
    blocks = {"head": [], "last-block": [2], "last-two": [1, 2], "all": [0, 1, 2], "lora": []}[layers]
    wanted = ["out_head."] + [f"trf_blocks.{i}." for i in blocks] + ["final_norm."] * (layers not in ("head", "lora"))
    wanted += ["tok_emb.", "pos_emb."] * (layers == "all")
    assert {name for name in moved if not name.startswith(tuple(wanted))} == set()
    assert all(any(name.startswith(prefix) for name in moved) for prefix in wanted)
    if layers == "lora":  # rank 8 on the four matrices of each block, and the head
        assert summary["trainable_parameters"] == 3 * 8 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16) + 2 * 17


@pytest.mark.parametrize("layers", ["head", "last-block"])
def test_training_on_cached_states_equals_training_without(rows, layers, monkeypatch, capsys):
    """Weights and losses within 1e-5 over two epochs; with the cache the first block sees every message once."""
    write_base([text for _, text in rows], n_layers=3)
    seen, original = [], cls.frozen_states
    monkeypatch.setattr(cls, "frozen_states", lambda model, ids, n: seen.append(len(ids)) or original(model, ids, n))
    found = {}
    for room in (1 << 32, 1000):
        seen.clear()
        monkeypatch.setattr(cls, "CACHE_BYTES", room)
        summary = fit("--train_layers", layers, "--max_steps", 28, "--learning_rate", 0.01, "--fresh")
        found[room] = (summary["val_loss"], gpt.load_checkpoint("out/cls/model.safetensors")[0].state_dict(), sum(seen))
        assert ("not cached" in capsys.readouterr().err) == (room == 1000)  # the limit of memory is said
    assert found[1 << 32][0] == pytest.approx(found[1000][0], abs=1e-5)
    for name, tensor in found[1 << 32][1].items():
        assert torch.allclose(tensor, found[1000][1][name], atol=1e-5), name
    assert found[1 << 32][2] == 112 + 16 and found[1000][2] >= 2 * 112


def test_dropout_is_off_in_frozen_layers_and_on_in_the_others():
    """The frozen part gives equal states in training, and leaves the mode as it was; the rest draws anew each time."""
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(40, 12, 16, 2, 2, drop_rate=0.5)).train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(cls.frozen_states(model, ids, 1), cls.frozen_states(model, ids, 1)) and model.training
    first, second = (cls.class_logits(model, ids, torch.ones_like(ids), "last", 1) for _ in range(2))
    assert not torch.equal(first, second)


def test_adapters_and_merged_weights_agree(rows, start):
    """The adapter's folder on the base gives the logits of the merged file, and few numbers train."""
    from lora import load_lora
    summary = fit("--lora_rank", 2, "--learning_rate", 0.02, "--max_steps", 20)
    ids = torch.randint(0, 10, (3, 9), generator=torch.Generator().manual_seed(0))
    base, merged = start["copy"].eval(), gpt.load_checkpoint("out/cls/model.safetensors")[0]
    before, after = (cls.class_logits(model, ids, torch.ones_like(ids), "last") for model in (base, merged))
    adapted = cls.class_logits(load_lora(base, "out/cls/adapter"), ids, torch.ones_like(ids), "last")
    assert torch.allclose(adapted, after, atol=1e-5) and not torch.allclose(before, after, atol=1e-2)
    assert summary["trainable_parameters"] == 2 * 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16) + 2 * 17


def test_accumulation_changes_nothing_but_rounding(rows):
    """Batches of 8 at once and in 3 micro-batches end with the same validation loss."""
    losses = [fit("--accumulate", n, "--fresh")["val_loss"] for n in (1, 3)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_run_with_frozen_weights_goes_on_over_the_same_ones_alone(rows, capsys, stop_after):
    """Stopped after step 4: with another base of the same shapes it is refused and untouched, with the same resumed."""
    command = ["train", *TINY, "--train_layers", "head"]
    with stop_after(4):
        assert cls.main(command) == 128 + signal.SIGTERM
    kept, state = Path("base.safetensors").read_bytes(), Path("out/cls/state.pt").read_bytes()
    model, tokenizer, info = gpt.load_checkpoint("base.safetensors")
    with torch.no_grad():
        model.tok_emb.weight[0, 0] += 1
    gpt.save_checkpoint("base.safetensors", model, tokenizer, **info)
    check_error(capsys, [*command, "--resume"], 1, "base.safetensors", "--fresh")
    assert Path("out/cls/state.pt").read_bytes() == state
    Path("base.safetensors").write_bytes(kept)
    assert cls.main([*command, "--resume"]) == 0


def test_a_classifier_is_a_start_for_another(rows, capsys):
    """--init with a classifier keeps its head for the same labels, and refuses others by name."""
    fit("--max_steps", 60, "--learning_rate", 0.01)
    flags = ["train", "--init", "out/cls/model.safetensors", "--max_steps", "1", "--learning_rate", "0"]
    assert cls.main([*flags, "--data", "rows.tsv", "--out_dir", "out/more"]) == 0
    more, one = (gpt.load_checkpoint(f"out/{name}/model.safetensors")[0].state_dict() for name in ("more", "cls"))
    assert all(torch.equal(more[name], one[name]) for name in one)
    write_rows([(label, f"message {i}") for i in range(20) for label in "abc"], "three.tsv")
    check_error(capsys, [*flags, "--data", "three.tsv", "--out_dir", "out/three"], 1, "eaten, eats", "a, b, c")


# --- use


FIVE_LINES = """
import gpt, torch
model, tokenizer, info = gpt.load_checkpoint("model.safetensors")
ids = torch.tensor([tokenizer.encode("MESSAGE")[: model.config.context_length]])
states = model.hidden(ids)  # (1, T, C): the head reads the last one
print(info["labels"][model.out_head(states[0, -1]).argmax()])
"""


def test_five_lines_with_gpt_and_tokenizer_alone_use_a_classifier(rows, tmp_path):
    """In a folder with two of our files and the checkpoint they print what classify_text returns, and it is right."""
    rows = [(label, f"{word} n{i}") for i in range(40) for label, word in (("good", "fine"), ("bad", "awful"))]
    write_rows(rows)
    write_base([text for _, text in rows])
    fit("--max_steps", 60, "--learning_rate", 0.01)
    assert len(FIVE_LINES.strip().splitlines()) == 5
    (tmp_path / "alone").mkdir()
    for file in (ROOT / "gpt.py", ROOT / "tokenizer.py", Path("out/cls/model.safetensors")):
        shutil.copy(file, tmp_path / "alone")
    classifier = cls.load_classifier("out/cls/model.safetensors")
    code = "".join(FIVE_LINES.replace("MESSAGE", text) for _, text in rows[:2])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "alone", capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good", "bad"] == [cls.classify_text(text, *classifier) for _, text in rows[:2]]


def test_three_classes_and_a_fresh_process(tmp_path, monkeypatch):
    """A .jsonl with three classes; a new process prints the very probabilities this one computes, in the same order."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(2)
    rows = [{"label": label, "text": f"{word} {rng.randrange(9)} {rng.choice('xyz')}"} for _ in range(40)
            for label, word in (("good", "fine"), ("bad", "awful"), ("so-so", "fair"))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_base([row["text"] for row in rows])
    assert cls.main(["train", *TINY, "--data", "rows.jsonl", "--max_steps", "150", "--learning_rate", "0.01"]) == 0
    texts = ["awful 3 x", "fine 3 x", "", "fair " * 40, "caf\u00e9"]
    Path("lines.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "finetune_cls.py"), "classify", "--file", "lines.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    model, tokenizer, info = cls.load_classifier("out/cls/model.safetensors")
    probabilities, cut = cls.classify_texts(texts, model, tokenizer, info)
    assert [row["text"] for row in found] == texts
    assert [row["cut"] for row in found] == cut == [False] * 3 + [True, False]
    assert [[row["probabilities"][label] for label in info["labels"]] for row in found] == [
        [round(p, 6) for p in row] for row in probabilities.tolist()]
    assert [row["label"] for row in found[:2]] == ["bad", "good"] and found[3]["label"] == "so-so"
    assert cls.classify_text("awful 3 x", model, tokenizer, info) == "bad"


def test_messages_from_the_command_line_and_from_stdin(rows, capsys, monkeypatch):
    """One readable line per message given; JSONL for stdin in batches, bytes that are not UTF-8 included."""
    fit("--max_steps", 3)
    capsys.readouterr()
    assert cls.main(["classify", "dog bites man", "-- man bites dog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("man bites dog") and "%" in lines[0]
    lines = b"dog\r\n\xff bad\nman" + b"\nmore" * 40 + b"\n\n \n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert cls.main(["classify", "--batch_size", "8", "--file", "-"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 45 and [row["text"] for row in found[:3]] == ["dog", "\ufffd bad", "man"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in found)
    monkeypatch.setattr("sys.stdin", None)
    assert cls.main(["classify", "--file", "-"]) == 1 and "error: stdin is closed" in capsys.readouterr().err
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert cls.main(["classify", "--file", "picture.png"]) == 1
    assert "error: picture.png, line 3: a zero byte" in capsys.readouterr().err
    assert cls.main(["classify", "dog " * 200]) == 0 and "[cut] dog" in capsys.readouterr().out


# --- what a user can get wrong


def check_error(capsys, argv, status, *words):
    """Assert that a command fails with this status and one line on stderr that holds all these words."""
    capsys.readouterr()
    assert cls.main(argv) == status, argv
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line


GOOD = "".join(f"ham\tmessage {i}\nspam\toffer {i}\n" for i in range(20))


def test_bad_rows_are_named_and_nothing_is_left_behind(rows, capsys):
    """Empty, one label, too few columns, broken quotes, a rare label, too few rows: status 1, row number, no folder."""
    quoted = "label,text\nham,\"fine\"\nspam,\"never closed\n"
    cases = {"empty.tsv": ("", "empty"), "one.tsv": ("ham\ta\nham\tb\n", "ham", "two labels"),
             "short.tsv": (GOOD + "spam\n", "line 41", "'text'"), "quote.csv": (quoted, "quote.csv after line 2"),
             "rare.tsv": (GOOD + "odd\tx\nodd\tX\n", "'odd'", "too few rows (2)"),
             "few.tsv": ("ham\ta\nham\tb\nspam\tc\nspam\td\n", "messages in each part"),
             "keys.jsonl": ('{"label": "ham", "txt": "a"}\n', "line 1", "'text'"),
             "bytes.tsv": (GOOD.encode() + b"ham\t\xff\n", "not UTF-8"), "none.tsv": (None, "none.tsv")}
    seeds = {"rare.tsv": next(seed for seed in range(99) if not in_training(cases["rare.tsv"][0], seed)),
             "few.tsv": next(seed for seed in range(99) if in_training(cases["few.tsv"][0], seed, "ham", "spam"))}
    for name, (content, *words) in cases.items():
        if content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = ["train", *TINY, "--data", name, "--seed", str(seeds.get(name, 1))]
        check_error(capsys, argv, 1, *words)
    assert not Path("out").exists()


def in_training(content, seed, *labels):
    """Return whether these labels of a labeled text (default: odd) are in the training part under this seed."""
    Path("probe.tsv").write_text(content, encoding="utf-8")
    part = data.split(data.read_labelled("probe.tsv"), 0.7, 0.1, seed, group=cls.dedup_key)[0]
    return set(labels or ["odd"]) <= {label for label, _ in part}


@pytest.mark.parametrize("flags", [[], ["--balance"]])
def test_a_header_row_is_never_a_class(rows, capsys, flags):
    """A first row of column names is one row of a third label: refused under any seed, named, nothing written."""
    Path("head.tsv").write_text("category\tmessage\n" + GOOD, encoding="utf-8")
    for seed in range(2):
        argv = ["train", *TINY, "--data", "head.tsv", "--seed", str(seed), *flags]
        check_error(capsys, argv, 1, "head.tsv", "'category' has too few rows (1)", "header")
    assert not Path("out").exists()
    Path("head.csv").write_text("Label,Text\n" + GOOD.replace("\t", ","), encoding="utf-8")  # but these are columns
    assert cls.read_parts(cls.Config(data="head.csv", balance="--balance" in flags))[1] == ["ham", "spam"]


def test_mistakes_get_one_line(rows, capsys):
    """Missing files, flags that fight, ranges, labels and files that do not fit."""
    cases = [([*TINY, "--init", "none.safetensors"], 1, "none.safetensors", "python train.py"),
             (["--data", "rows.tsv"], 1, "out/pretrain/model.safetensors", "python train.py"),
             ([*TINY, "--train_layers", "head", "--lora_rank", "2"], 2, "--train_layers head", "--lora_rank"),
             ([*TINY, "--lora_rank", "99"], 2, "--lora_rank", "16"),
             ([*TINY, "--lora_targets", "q", "--lora_rank", "2"], 2, "'q'"),
             ([*TINY, "--pooling", "max"], 2, "invalid choice"), ([*TINY, "--max_steps", "0"], 2, "--epochs"),
             ([*TINY, "--learning_rate", "nan"], 2, "--learning_rate"),
             ([*TINY, "--context_length", "13"], 1, "12 positions"),
             ([*TINY, "--val_share", "0.5"], 2, "--val_share", "0.45"), ([*TINY, "--pooing", "last"], 2, "--pooling"),
             (["--data", "tinyworld", "--val_share", "0.3"], 2, "tinyworld has parts of its own"),
             ([*TINY, "stray words"], 2, "stray words"), ([*TINY, "--split", "all"], 2, "--split"),
             (["classify", "x"], 1, "python finetune_cls.py"), (["evaluate"], 1, "python finetune_cls.py")]
    for argv, status, *words in cases:
        check_error(capsys, argv if argv[0] in ("classify", "evaluate") else ["train", *argv], status, *words)
    assert not Path("out").exists()
    fit("--max_steps", 2)
    write_rows([("eats", "dog"), ("sleeps", "cat")], "odd.tsv")
    for argv, *words in ((["evaluate", "--data", "odd.tsv", "--split", "all"], "line 2", "'sleeps'", "eaten, eats"),
                         (["evaluate"], "tinyworld", "'ham'", "eaten, eats"),
                         (["classify", "--file", "none.txt"], "none.txt"),
                         (["classify", "--checkpoint", "rows.tsv", "x"], "rows.tsv", "not a safetensors file"),
                         (["classify", "--checkpoint", "base.safetensors", "x"], "not a classifier", "'gpt'"),
                         (["classify", "--checkpoint", "out", "x"], "out is a folder")):
        check_error(capsys, argv, 1, *words)
    check_error(capsys, ["classify", "--file", "rows.tsv", "x"], 2, "not both")
    model, tokenizer, info = cls.load_classifier("out/cls/model.safetensors")
    gpt.save_checkpoint("first.safetensors", model, tokenizer, **{**info, "pooling": "first"})  # of the first edition
    check_error(capsys, ["classify", "--checkpoint", "first.safetensors", "x"], 1, "pooling of last, mean, position")
