"""Classification: published figures of the metrics, padding, frozen layers, their cache, exact resume, use, mistakes."""

import copy
import hashlib
import io
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import finetune_cls as cls
import gpt
import train
from data import read_labelled

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--data rows.tsv --init scratch --tokenizer word --emb_dim 16 --n_layers 2 --n_heads 2 --context_length 12 "
        "--batch_size 8 --epochs 0 --max_steps 12 --warmup_steps 2 --eval_every 5").split()


def message(rng):
    """Return (label, text): the same words in both classes, only their order tells; up to five others around them."""
    words = [rng.choice("red blue old new big".split()) for _ in range(rng.randrange(5))]
    label = rng.choice(("eats", "eaten"))
    pair = ["dog", "bites", "man"] if label == "eats" else ["man", "bites", "dog"]
    at = rng.randrange(len(words) + 1)
    return label, " ".join(words[:at] + pair + words[at:] + [f"n{rng.randrange(8)}"])


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Return 160 rows of rows.tsv in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    rows = [message(rng) for _ in range(160)]
    Path("rows.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
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


def last_weights(folder="out/cls"):
    """Return the sha256 over all weights in state.pt and that of the best model's file."""
    state = torch.load(f"{folder}/state.pt", weights_only=True)
    digest = hashlib.sha256()
    for name in sorted(state["model"]):
        digest.update(name.encode() + gpt.tensor_bytes(state["model"][name].contiguous()))
    return digest.hexdigest(), gpt.read_safetensors(f"{folder}/model.safetensors")[1]["data_sha256"]


# --- figures


def test_intervals_are_those_published():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, Wilson's score method."""
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                  (1, 29, 0.0061, 0.1718)):
        assert cls.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert cls.wilson(29, 29)[1] == 1 and cls.wilson(0, 0) == (0, 1)


def test_a_paired_difference_is_the_mean_of_differences_and_its_error():
    """Against the list of +1, 0 and -1 that it stands for."""
    deltas = [1] * 7 + [-1] * 3 + [0] * 90
    mean, low, high = cls.difference(7, 3, 100)
    half = 1.96 * statistics.pstdev(deltas) / 10
    assert mean == pytest.approx(0.04) and (low, high) == pytest.approx((0.04 - half, 0.04 + half), abs=1e-5)


def test_figures_of_hand_made_logits():
    """Four messages, one wrong: loss, accuracy, confusion, precision, recall and F1 by hand; an even guess is ln 2."""
    messages = cls.Messages.__new__(cls.Messages)
    messages.labels, messages.cut = torch.tensor([0, 0, 0, 1]), [False, True, False, False]
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    messages.rows = [("ham", "a"), ("ham", "b"), ("ham", "c"), ("spam", "d")]
    figures = cls.figures_of(logits, messages, ["ham", "spam"])
    softplus = [math.log1p(math.exp(x)) for x in (-2, -1, 3, -1)]
    assert figures["loss"] == pytest.approx(sum(softplus) / 4) and figures["accuracy"] == 0.75
    assert figures["confusion"] == [[2, 1], [0, 1]] and figures["cut"] == 1
    assert figures["classes"]["ham"] == {"messages": 3, "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8}
    assert figures["classes"]["spam"] == {"messages": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert figures["f1"] == pytest.approx(2 / 3)  # spam is the rarer class
    wrong = figures["confidently_wrong"]
    assert [(w["text"], w["predicted"]) for w in wrong] == [("c", "spam")]
    assert wrong[0]["probability"] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-4)
    even = cls.figures_of(torch.zeros(4, 2), messages, ["ham", "spam"])
    assert even["loss"] == pytest.approx(math.log(2))


def test_macro_f1_and_empty_classes():
    """With three classes the mean of their F1; a class that is never there nor predicted counts 0."""
    matrix = cls.confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert matrix == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert cls.f1_score(matrix) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


def test_calibration_error():
    """Right as often as sure -> 0; always sure and never right -> 1; a hand-made mixture of two bins."""
    assert cls.calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert cls.calibration_error([1.0, 1.0], [False, False]) == 1
    assert cls.calibration_error([0.6, 0.6, 0.9, 0.9], [True, False, True, True]) == pytest.approx((0.1 + 0.1) / 2)


def test_naive_bayes_solves_the_textbook_example():
    """Manning, Raghavan and Schuetze 2008, example 13.1: class China; and by its own probabilities the two-word text."""
    china = [("yes", "Chinese Beijing Chinese"), ("yes", "Chinese Chinese Shanghai"), ("yes", "Chinese Macao"),
             ("no", "Tokyo Japan Chinese")]
    texts = ["Chinese Chinese Chinese Tokyo Japan", "tokyo JAPAN", "unknown words only"]
    assert cls.naive_bayes(china, texts) == ["yes", "no", "yes"]  # 3/4 (1/14)^2 = 0.004 < 1/4 (2/9)^2 = 0.012
    assert cls.majority(china, texts) == ["yes"] * 3


def test_naive_bayes_on_real_messages(real_data):
    """On SMS Spam it reaches what is usual for it: 97.5 to 99% of a test split, and no class is left out."""
    config = cls.Config(data=str(real_data("SMSSpamCollection")), unique=True)
    parts, labels = cls.read_parts(config)
    right = [guess == label for guess, (label, _) in
             zip(cls.naive_bayes(parts[0], [text for _, text in parts[2]]), parts[2])]
    assert labels == ["ham", "spam"] and 0.975 < statistics.fmean(right) < 0.99


# --- messages


def test_equal_messages_never_meet_across_parts(rows):
    """But for case and spaces; every row lands in exactly one part; another seed splits otherwise, the same alike."""
    copies = rows + [(label, text.upper().replace(" ", "  ")) for label, text in rows[:50]]
    Path("rows.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in copies), encoding="utf-8")
    parts, _ = cls.read_parts(cls.Config(data="rows.tsv"))
    keys = [{cls.same(row) for row in part} for part in parts]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert sorted(sum(parts, [])) == sorted(copies)
    assert [len(part) for part in parts] == pytest.approx([147, 21, 42], abs=4)
    assert cls.read_parts(cls.Config(data="rows.tsv"))[0] == parts
    assert cls.read_parts(cls.Config(data="rows.tsv", seed=7))[0] != parts


def test_balance_and_unique():
    """Every class as often as the rarest, no row invented; --unique keeps the first of equal messages."""
    rows = [("a", f"text {i}") for i in range(30)] + [("b", f"other {i}") for i in range(10)] + [("c", "x"), ("c", "X ")]
    kept = cls.thinned(rows, cls.Config(balance=True, unique=False))
    assert sorted(label for label, _ in kept) == ["a"] * 2 + ["b"] * 2 + ["c"] * 2 and set(kept) <= set(rows)
    assert cls.thinned(rows, cls.Config(unique=True)) == rows[:-1]
    assert cls.thinned(rows, cls.Config(balance=True, seed=3)) != kept


def test_the_books_split_has_its_sizes(real_data):
    """747 + 747 messages in 1045, 149 and 300, as in the book, but for groups of equal messages kept together."""
    parts, _ = cls.read_parts(cls.Config(data=str(real_data("SMSSpamCollection")), balance=True))
    assert [len(part) for part in parts] == pytest.approx([1045, 149, 300], abs=5) and sum(map(len, parts)) == 1494
    assert sum(label == "spam" for part in parts for label, _ in part) == 747


def test_the_order_of_an_epoch_is_a_permutation_that_saves_padding():
    """Every message once, the same for equal seed and epoch, others otherwise, and batches of similar length."""
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(0))
    order = cls.bucketed_order(lengths, 8, 1, 0)
    assert order.sort().values.tolist() == list(range(203))
    assert torch.equal(order, cls.bucketed_order(lengths, 8, 1, 0))
    assert not torch.equal(order, cls.bucketed_order(lengths, 8, 1, 1))

    def padded(order):
        return sum(int(lengths[batch].max()) * len(batch) for batch in order.split(8))

    assert padded(order) < 1.15 * int(lengths.sum()) < padded(torch.arange(203))


def test_cleaning_is_part_of_the_classifier():
    """Lower case and punctuation as trained; off by default."""
    made = {"lowercase": False, "strip_punctuation": False}
    assert cls.clean("Win £5, NOW!", made) == "Win £5, NOW!"
    assert cls.clean("Win £5, NOW!", {"lowercase": True, "strip_punctuation": True}) == "win 5 now"


# --- the classifier


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_padding_on_either_side_changes_no_prediction(pooling):
    """A message alone, padded on the right and on the left, whatever token the padding is."""
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    alone = cls.class_logits(model, ids, torch.ones_like(ids), pooling)
    for pad_id in (0, 39):
        for sides in ((0, 3), (3, 0), (2, 2)):
            padded, mask = F.pad(ids, sides, value=pad_id), F.pad(torch.ones_like(ids), sides)
            assert torch.allclose(cls.class_logits(model, padded, mask, pooling), alone, atol=1e-5), sides
    wrong = cls.class_logits(model, F.pad(ids, (3, 0)), torch.ones(1, 7, dtype=torch.long), pooling)
    assert not torch.allclose(wrong, alone, atol=1e-3)  # the control: padding taken for text does change it


def test_pooling_reads_the_states_it_should():
    """Rows of known states: last and first real token, the mean of the real ones."""
    states = torch.arange(8.0).view(1, 8, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])
    assert [cls.pool(states, mask, how).item() for how in ("last", "first", "mean")] == [5, 2, 3.5]


def test_position_pooling_reads_padding_as_the_book_does():
    """All messages are filled up to the context length, and their last position counts."""
    tokenizer = cls.scratch_tokenizer(cls.Config(tokenizer="word"), ["a b c d"])
    made = {"pooling": "position", "lowercase": False, "strip_punctuation": False}
    ids, cut = cls.encode(["a b", "a b c d"], tokenizer, made, 3)
    assert ids == [[*tokenizer.encode("a b"), tokenizer.pad_id], tokenizer.encode("a b c")] and cut == [False, True]


def test_the_language_loss_is_that_of_each_message_alone():
    """Padded together or one by one: the sum of -log p of all tokens but the first."""
    torch.manual_seed(0)
    head, sequences = torch.randn(40, 16), [[1, 2, 3, 4], [5, 6], [7]]
    ids, mask = cls.pad(sequences)
    states = torch.randn(3, 4, 16)
    expected = sum(-torch.log_softmax(head @ states[row, t], dim=0)[sequence[t + 1]]
                   for row, sequence in enumerate(sequences) for t in range(len(sequence) - 1))
    assert cls.language_loss(states, ids, mask, head).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_untrained_classifier_knows_nothing(rows):
    """The first validation loss is about ln 2 whatever the layers say, because the new head starts near 0."""
    fit("--max_steps", 1)
    first = json.loads(Path("out/cls/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(math.log(2), abs=0.1)


def test_word_order_is_learnt_where_naive_bayes_must_guess(rows, capsys):
    """Two classes of the same words: at least 95% right, naive Bayes near a half; and all that a run promises is there."""
    rng = random.Random(3)
    Path("rows.tsv").write_text("".join("\t".join(message(rng)) + "\n" for _ in range(700)), encoding="utf-8")
    summary = fit("--max_steps", 150, "--learning_rate", 0.01, "--emb_dim", 32, "--eval_every", 50, "--optimizer", "muon")
    assert summary["test_accuracy"] >= 0.95 > 0.75 > summary["naive_bayes_accuracy"]
    assert summary["ahead_interval"][0] > 0.2 and summary["test_f1"] > 0.95
    assert sum(map(sum, summary["test_confusion"])) == summary["messages"]["test"]
    out = capsys.readouterr().out
    assert "precision" in out and f"{summary['test_accuracy']:.2%}" in out
    assert sorted(os.listdir("out/cls")) == [".lock", "accuracy.svg", "curves.svg", "metrics.jsonl", "model.safetensors",
                                             "state.pt", "summary.json"]
    assert cls.main(["evaluate", "--data", "rows.tsv"]) == 0
    streams = capsys.readouterr()
    assert f"messages, accuracy {summary['test_accuracy']:.2%}" in streams.out and "note" not in streams.err
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
def test_frozen_weights_stay_bit_identical_and_the_others_move(rows, start, monkeypatch, layers):
    """The last weights against those before the first step, on three blocks."""
    monkeypatch.setattr(cls, "load_best", lambda *parts: None)
    fit("--n_layers", 3, "--train_layers", layers, "--max_steps", 3)
    after = start["model"].state_dict()
    moved = {name for name, tensor in start["weights"].items() if not torch.equal(after[name], tensor)}
    blocks = {"head": [], "last-block": [2], "last-two": [1, 2], "all": [0, 1, 2], "lora": []}[layers]
    wanted = ["out_head."] + [f"trf_blocks.{i}." for i in blocks] + ["final_norm."] * (layers not in ("head", "lora"))
    wanted += ["tok_emb.", "pos_emb."] * (layers == "all")
    assert {name for name in moved if not name.startswith(tuple(wanted))} == set()
    assert all(any(name.startswith(prefix) for name in moved) for prefix in wanted)


@pytest.mark.parametrize("layers", ["head", "last-block"])
def test_training_on_cached_states_equals_training_without(rows, layers, monkeypatch):
    """Weights and losses within 1e-5 over two epochs; with the cache the first block sees every message once."""
    seen = []
    original = cls.base_states
    monkeypatch.setattr(cls, "base_states", lambda model, ids, frozen: seen.append(len(ids)) or original(model, ids, frozen))
    flags = ("--train_layers", layers, "--n_layers", 3, "--max_steps", 28, "--learning_rate", 0.01)
    found = {}
    for cache in ("--cache", "--no-cache"):
        seen.clear()
        summary = fit(*flags, cache, "--fresh")
        found[cache] = (summary["val_loss"], gpt.load_checkpoint("out/cls/model.safetensors")[0].state_dict(), sum(seen))
    assert found["--cache"][0] == pytest.approx(found["--no-cache"][0], abs=1e-5)
    for name, tensor in found["--cache"][1].items():
        assert torch.allclose(tensor, found["--no-cache"][1][name], atol=1e-5), name
    assert found["--cache"][2] == 112 + 16 and found["--no-cache"][2] >= 2 * 112


@pytest.mark.slow
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


def test_hidden_tokens_are_a_random_share_and_the_rest_stay():
    """Of 10,000 tokens 30% (3 standard deviations: 1.4%) become the hidden id, others are as before; 0 hides none."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (100, 100))
    shown = cls.hide(ids, 0.3, 99)
    assert abs((shown == 99).float().mean() - 0.3) < 0.014 and torch.equal(shown[shown != 99], ids[shown != 99])
    assert torch.equal(cls.hide(ids, 0.0, 99), ids)


def test_accumulation_changes_nothing_but_rounding(rows):
    """Batches of 8 at once and in 3 pieces, with the language loss, end with the same validation loss."""
    losses = [fit("--accumulate", n, "--lm_weight", 0.5, "--fresh")["val_loss"] for n in (1, 3)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("flags", [["--lm_weight", 0.5, "--token_dropout", 0.3, "--optimizer", "muon"], ["--lora_rank", 2, "--lora_dropout", 0.1],
                                   ["--train_layers", "last-block"]])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(rows, flags, stop_after):
    """Stopped by a signal after step 1, 9 (mid-epoch) and 15 (after an evaluation), with dropout."""
    flags = [*flags, "--drop_rate", 0.1, "--max_steps", 20, "--save_every", 4]
    fit(*flags)
    expected = last_weights()
    os.rename("out/cls", "out/whole")
    for stop_at in (1, 9, 15):
        with stop_after(stop_at):
            fit(*flags, "--resume", status=128 + signal.SIGTERM)
        fit(*flags, "--resume")
        assert last_weights() == expected, stop_at
        os.rename("out/cls", f"out/stopped{stop_at}")


@pytest.mark.parametrize("flags", [["--train_layers", "head"], ["--lora_rank", 2]])
def test_a_run_with_frozen_weights_goes_on_over_the_same_ones_alone(rows, flags, capsys, stop_after):
    """Stopped after step 4: with another base of the same shapes it is refused and untouched, with the same resumed."""
    fit("--max_steps", 2)
    os.rename("out/cls", "out/base")
    base = [option for pair in (("--init", "out/base/model.safetensors"), *[flags]) for option in pair]
    command = ["train", "--data", "rows.tsv", "--max_steps", "8", *map(str, base)]
    with stop_after(4):
        assert cls.main(command) == 128 + signal.SIGTERM
    kept, state = open("out/base/model.safetensors", "rb").read(), open("out/cls/state.pt", "rb").read()
    model, tokenizer, made = gpt.load_checkpoint("out/base/model.safetensors")
    with torch.no_grad():
        model.tok_emb.weight[0, 0] += 1
    gpt.save_checkpoint("out/base/model.safetensors", model, tokenizer, **made)
    check_error(capsys, [*command, "--resume"], 1, "out/base/model.safetensors", "--fresh")
    assert open("out/cls/state.pt", "rb").read() == state
    with open("out/base/model.safetensors", "wb") as file:
        file.write(kept)
    assert cls.main([*command, "--resume"]) == 0


def test_a_finished_run_is_not_run_again(rows, capsys):
    """--resume on a finished run returns its summary; without it the folder is refused and untouched."""
    first = fit()
    before = Path("out/cls/model.safetensors").read_bytes()
    assert fit("--resume") == first
    assert cls.main(["train", *TINY]) == 2 and "holds a run" in capsys.readouterr().err
    assert Path("out/cls/model.safetensors").read_bytes() == before


def test_several_seeds_give_mean_and_spread(rows, capsys):
    """Three folders, three splits; mean, standard deviation and the pooled lead over naive Bayes from their summaries."""
    summary = fit("--seeds", 3, "--seed", 5)
    runs = [json.loads(Path(f"out/cls/seed{seed}/summary.json").read_text(encoding="utf-8")) for seed in (5, 6, 7)]
    accuracies = [run["test_accuracy"] for run in runs]
    assert summary["test_accuracy_mean"] == pytest.approx(statistics.fmean(accuracies))
    assert summary["test_accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
    lead = statistics.fmean(run["test_accuracy"] - run["naive_bayes_accuracy"] for run in runs)
    assert summary["ahead_of_naive_bayes_mean"] == pytest.approx(lead)
    assert summary["ahead_interval"][0] < lead < summary["ahead_interval"][1]
    assert len({run["split_sha256"] for run in runs}) == 3 and "3 seeds" in capsys.readouterr().out
    assert fit("--seeds", 3, "--seed", 5, "--resume") == summary
    assert cls.main(["train", *TINY]) == 2 and "--seeds" in capsys.readouterr().err


def test_a_classifier_is_a_start_for_another(rows, capsys):
    """--init with a classifier keeps its head for the same labels, and refuses others by name."""
    fit("--max_steps", 60, "--learning_rate", 0.01)
    flags = ["train", "--init", "out/cls/model.safetensors", "--max_steps", "1", "--learning_rate", "0"]
    assert cls.main([*flags, "--data", "rows.tsv", "--out_dir", "out/more"]) == 0
    more, one = (gpt.load_checkpoint(f"out/{name}/model.safetensors")[0].state_dict() for name in ("more", "cls"))
    assert all(torch.equal(more[name], one[name]) for name in one)
    rows_of_three = "".join(f"{label}\tmessage {i}\n" for i in range(20) for label in "abc")
    Path("three.tsv").write_text(rows_of_three, encoding="utf-8")
    check_error(capsys, [*flags, "--data", "three.tsv", "--out_dir", "out/three"], 1, "eaten, eats", "3: a, b, c")


# --- use


def test_three_classes_and_a_fresh_process(tmp_path, monkeypatch, capsys):
    """A .jsonl with three classes; a new process prints the very probabilities this one computes, in the same order."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(2)
    rows = [{"label": label, "text": f"{word} {rng.randrange(9)} {rng.choice('xyz')}"} for _ in range(40)
            for label, word in (("good", "fine"), ("bad", "awful"), ("so-so", "fair"))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cls.main(["train", *TINY, "--data", "rows.jsonl", "--max_steps", "60", "--learning_rate", "0.01"]) == 0
    texts = ["awful 3 x", "fine 3 x", "", "fair " * 40, "caf\u00e9"]
    Path("lines.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "finetune_cls.py"), "classify", "--file", "lines.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    model, tokenizer = cls.load_classifier("out/cls/model.safetensors")
    probabilities, cut = cls.classify_texts(texts, model, tokenizer)
    assert [row["text"] for row in found] == texts and [row["cut"] for row in found] == cut == [False] * 3 + [True, False]
    assert [[row["probabilities"][label] for label in model.made["labels"]] for row in found] == [
        [round(p, 6) for p in row] for row in probabilities.tolist()]
    assert [row["label"] for row in found[:2]] == ["bad", "good"] and found[3]["label"] == "so-so"
    assert cls.classify_text("awful 3 x", model, tokenizer, "cpu") == "bad"
    assert "5 messages, 1 of them cut to 12 tokens" in done.stderr


def test_messages_from_the_command_line_and_from_stdin(rows, capsys, monkeypatch):
    """One readable line a message given; JSONL for stdin in batches, bytes that are no UTF-8 included."""
    fit("--max_steps", 3)
    capsys.readouterr()
    assert cls.main(["classify", "dog bites man", "-- man bites dog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("man bites dog") and "%" in lines[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"dog\r\n\xff bad\nman" + b"\nmore" * 40 + b"\n\n \n")))
    assert cls.main(["classify", "--batch_size", "8", "--file", "-"]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 45 and [row["text"] for row in found[:3]] == ["dog", "\ufffd bad", "man"]
    assert "note: 2 of 45 lines are empty\n" in err and "note: 1 of 45 lines is not UTF-8" in err
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in found)
    monkeypatch.setattr("sys.stdin", None)
    assert cls.main(["classify", "--file", "-"]) == 1 and "error: stdin is closed" in capsys.readouterr().err
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert cls.main(["classify", "--file", "picture.png"]) == 1
    assert "error: picture.png, line 3: a zero byte" in capsys.readouterr().err
    assert cls.main(["classify", "picture.png"]) == 0 and "--file picture.png" in capsys.readouterr().err
    assert cls.main(["classify", "dog " * 200]) == 0  # longer than a file's name can be


# --- what a user can get wrong


def check_error(capsys, argv, status, *words):
    """Assert that a command fails with this status and one line on stderr that holds all these words."""
    capsys.readouterr()
    assert cls.main(argv) == status, argv
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_bad_rows_are_named_and_nothing_is_left_behind(tmp_path, monkeypatch, capsys):
    """Empty, one label, too few columns, broken quotes, a rare label, too few rows: status 1, row number, no folder."""
    monkeypatch.chdir(tmp_path)
    good = "".join(f"ham\tmessage {i}\nspam\toffer {i}\n" for i in range(20))
    quoted = "label,text\nham,\"fine\"\nspam,\"never closed\n"
    cases = {"empty.tsv": ("", "empty"), "one.tsv": ("ham\ta\nham\tb\n", "'ham'", "two labels"),
             "short.tsv": (good + "spam\n", "row 41", "label and a text"), "quote.csv": (quoted, "quote.csv row"),
             "rare.tsv": (good + "odd\tx\n", "'odd'", "1 rows"), "few.tsv": ("ham\ta\nspam\tb\n", "too few"),
             "keys.jsonl": ('{"label": "ham", "txt": "a"}\n', "line 1", "'text'"),
             "bytes.tsv": (good.encode() + b"ham\t\xff\n", "not UTF-8"), "none.tsv": (None, "none.tsv")}
    seeds = {"rare.tsv": next(seed for seed in range(99) if not in_training(good + "odd\tx\n", seed))}
    for name, (content, *words) in cases.items():
        if content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        argv = ["train", *TINY, "--data", name, "--seed", str(seeds.get(name, 1))]
        check_error(capsys, argv, 1, *words)
    assert not Path("out").exists()


def in_training(content, seed):
    """Return whether the last row of a labelled text falls to the training part under this seed."""
    Path("probe.tsv").write_text(content, encoding="utf-8")
    parts = cls.split(read_labelled("probe.tsv"), 0.7, 0.1, seed, group=cls.same)
    return ("odd", "x") in parts[0]


def test_mistakes_get_one_line(rows, capsys):
    """Missing files, flags that fight, ranges, labels and files that do not fit."""
    fit("--max_steps", 3)
    os.rename("out/cls", "out/1")
    model = "out/1/model.safetensors"
    cases = [(["--data", "rows.tsv", "--init", model, "--out_dir", "out/2", "--emb_dim", "8"], 2, "--emb_dim", "scratch"),
             ([*TINY, "--lm_weight", "1", "--pooling", "position"], 2, "--lm_weight"),
             ([*TINY, "--val_share", "0.5", "--test_share", "0.5"], 2, "nothing to train on"),
             ([*TINY, "--init", "none.safetensors"], 1, "none.safetensors", "python train.py"),
             (["--data", "rows.tsv"], 1, "out/pretrain/model.safetensors", "python train.py"),
             ([*TINY, "--train_layers", "head", "--lora_rank", "2"], 2, "--train_layers head"),
             ([*TINY, "--lora_rank", "99"], 2, "--lora_rank", "16"), ([*TINY, "--lora_targets", "q", "--lora_rank", "2"], 2, "'q'"),
             ([*TINY, "--tokenizer", "none.json"], 1, "none.json"), ([*TINY, "--pooling", "max"], 2, "invalid choice"),
             ([*TINY, "--token_dropout", "0.2", "--train_layers", "head"], 2, "--token_dropout"),
             ([*TINY, "--lm_weight", "nan"], 2, "--lm_weight"), ([*TINY, "--max_steps", "0"], 2, "--epochs"),
             ([*TINY, "--val_share", "0.6"], 2, "at most 0.5"), ([*TINY, "--pooing", "last"], 2, "--pooling"),
             ([*TINY, "stray words"], 2, "'stray words'", "classify"), (["classify", "x"], 1, "python finetune_cls.py"),
             (["evaluate"], 1, "python finetune_cls.py"), ([*TINY, "--context_length", "0", "--n_heads", "3"], 2, "n_heads 3")]
    for argv, status, *words in cases:
        check_error(capsys, argv if argv[0] in ("classify", "evaluate") else ["train", *argv], status, *words)
    assert not Path("out/cls/model.safetensors").exists()
    fit("--max_steps", 2)
    Path("odd.tsv").write_text("eats\tdog\nsleeps\tcat\n", encoding="utf-8")
    for argv, *words in ((["evaluate", "--data", "odd.tsv", "--part", "all"], "row 2", "'sleeps'", "eaten, eats"),
                         (["classify", "--file", "none.txt"], "none.txt"),
                         (["classify", "--checkpoint", "rows.tsv", "x"], "rows.tsv", "not a safetensors file")):
        check_error(capsys, argv, 1, *words)
    check_error(capsys, ["classify", "--file", "rows.tsv", "x"], 2, "not both")
    gpt.save_checkpoint("lm.safetensors", gpt.GPTModel(gpt.GPTConfig(40, 8, 8, 2, 1)))
    check_error(capsys, ["classify", "--checkpoint", "lm.safetensors", "x"], 1, "no classifier", "'gpt'")


def test_a_loss_that_is_not_finite_stops_before_the_update(rows, capsys, monkeypatch):
    """NaN logits at a step: status 1, the last good state stays, the flags to try are named."""
    original, calls = cls.pool, []

    def poisoned(states, mask, pooling):
        calls.append(states.requires_grad)
        return original(states, mask, pooling) * (math.nan if sum(calls) == 3 and states.requires_grad else 1)

    monkeypatch.setattr(cls, "pool", poisoned)
    check_error(capsys, ["train", *TINY, "--save_every", "1"], 1, "step 3", "nan", "--learning_rate")
    state = train.read_state("out/cls/state.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())
