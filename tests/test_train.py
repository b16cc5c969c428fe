"""Optimizers, schedule, losses, runs: closed forms, published values, learning that must happen, exact resume."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import signal
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import gpt
import tokenizer as tok
import train
from data import read_choices
from tokenizer import CharTokenizer, WordTokenizer

TINY = ("--tokenizer char --emb_dim 16 --n_layers 2 --n_heads 2 --context_length 16 --batch_size 4 --sample_tokens 5 "
        "--learning_rate 1e-3").split()


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Return a small text file in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    words = "the cat sat on the mat and the dog ran to the red barn while a bird sang. ".split(" ")
    (tmp_path / "text.txt").write_text(" ".join(words[i * i % len(words)] for i in range(400)), encoding="utf-8")
    return "text.txt"


def pretrain(*flags, status=0):
    """Run train.main with the tiny sizes and return the summary of out/pretrain, or None after a failure."""
    assert train.main(["train", "--data", "text.txt", *TINY, *map(str, flags)]) == status
    path = Path("out/pretrain/summary.json")
    return json.loads(path.read_text(encoding="utf-8")) if status == 0 and path.exists() else None


def last_weights(folder="out/pretrain"):
    """Return the bytes of all weights in state.pt, and the hash of the data in the best model's file."""
    weights = train.read_state(f"{folder}/state.pt")["model"]
    whole = {name: gpt.tensor_bytes(tensor.contiguous()).raw for name, tensor in weights.items()}
    return whole, gpt.read_safetensors(f"{folder}/model.safetensors")[1]["data_sha256"]


def logged(folder="out/pretrain"):
    """Return the rows of a run's log."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# --- pure functions


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_is_chosen_only_where_the_hardware_has_it(units, monkeypatch):
    """A GPU that only emulates it, as torch says of a T4 or V100 unless asked otherwise, computes in float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    chosen = train.autocast(train.Config(), torch.device("cuda"))
    assert isinstance(chosen, contextlib.nullcontext) is not units


def test_the_published_loss_arithmetic():
    """Six target probabilities of the notes give cross-entropy 10.7940 and perplexity 48725.82; a third target of -100
    leaves the loss of another published example at that of its first two: 1.1269."""
    probs = torch.tensor([7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06], dtype=torch.float64)
    logits = torch.stack([probs.log(), (1 - probs).log()], dim=1).view(2, 3, 2)
    loss = train.next_token_loss(logits, torch.zeros(2, 3, dtype=torch.long)).item() / 6
    assert loss == pytest.approx(10.7940, abs=2e-4) and math.exp(loss) == pytest.approx(48725.82, rel=2e-4)
    logits, targets = torch.tensor([[[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]]), torch.tensor([[0, 1, gpt.IGNORE]])
    assert train.next_token_loss(logits, targets).item() / 2 == pytest.approx(1.1269, abs=1e-4)


def test_schedule_rises_falls_and_ends_where_it_should():
    """Warm-up is linear, the cosine passes its middle half-way, all three shapes end as promised."""
    factor = lambda step, shape: train.rate_factor(step, 101, 11, shape, 0.1)  # noqa: E731
    for shape in ("cosine", "linear", "constant"):
        assert [factor(s, shape) for s in (0, 4, 10)] == pytest.approx([1 / 11, 5 / 11, 1])
        assert factor(11, shape) == pytest.approx(1)
    assert factor(100, "cosine") == pytest.approx(0.1) and factor(100, "linear") == pytest.approx(0.1)
    assert factor(100, "constant") == 1
    middle = 11 + (100 - 11) / 2
    assert factor(middle, "cosine") == pytest.approx(0.55) and factor(middle, "linear") == pytest.approx(0.55)
    assert factor(20, "cosine") > factor(20, "linear")


def test_a_muon_step_has_the_size_and_direction_it_should():
    """The first update of a random gradient is lr x 0.2 sqrt(max side) x (nearly) U V^T, after decay."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
    before = weight.detach().clone()
    weight.grad = torch.randn(16, 16, dtype=torch.float64)
    train.Muon([weight], lr=0.1, weight_decay=0.5).step()
    step = (before * (1 - 0.1 * 0.5) - weight.detach()) / (0.1 * 0.2 * 4)
    u, _, vh = torch.linalg.svd(weight.grad)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.97
    assert step.norm().item() == pytest.approx(4, rel=0.15)  # a 16 x 16 orthogonal matrix has norm 4


@pytest.mark.parametrize("shape", [(16, 16), (12, 16), (8, 32), (32, 8)])
def test_orthogonalizing_keeps_the_directions_and_evens_their_lengths(shape):
    """U diag(f(s)) V^T: f is the quintic applied five times to s / |s|, in both ways to compute it."""
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(train.orthogonalize(matrices), u @ torch.diag_embed(s) @ vh, atol=1e-6)


def test_a_fused_qkv_matrix_is_three_matrices_to_muon():
    """Updating one 3C x C matrix equals updating its three square pieces apart."""
    torch.manual_seed(0)
    fused, grad = nn.Parameter(torch.randn(24, 8)), torch.randn(24, 8)
    apart = [nn.Parameter(piece.clone()) for piece in fused.detach().chunk(3)]
    fused.grad = grad
    for piece, part in zip(apart, grad.chunk(3)):
        piece.grad = part
    train.Muon([fused]).step()
    train.Muon(apart).step()
    assert torch.allclose(fused, torch.cat(apart), atol=1e-6)


def test_adamw_decays_matrices_only_and_every_parameter_has_one_optimizer():
    """Groups hold each trainable parameter exactly once, under both --optimizer settings, a tied head once."""
    model = gpt.GPTModel(gpt.GPTConfig(11, 8, 8, 2, 2, tie_weights=True, qkv_bias=True))
    for name in ("adamw", "muon"):
        optimizers = train.make_optimizers(model, train.Config(optimizer=name, learning_rate=1e-3))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == set(model.parameters())
        assert all(p.dim() >= 2 for g in groups if g["weight_decay"] > 0 for p in g["params"])
        assert all(p.dim() < 2 for g in groups if g["weight_decay"] == 0 for p in g["params"])
    muon = train.make_optimizers(model, train.Config(optimizer="muon", learning_rate=1e-3))[0]
    assert {id(p) for p in muon.param_groups[0]["params"]} == {
        id(p) for block in model.trf_blocks for p in block.parameters() if p.dim() == 2}


@pytest.mark.parametrize("word, other", [("train", "checkpoint"), ("evaluate", "epochs"), ("report", "data")])
def test_help_shows_the_flags_that_a_command_reads_and_their_defaults(word, other, monkeypatch, capsys):
    """No other flag is shown or taken; a default that is shown is the one that the command gets."""
    given, commands = [], {}
    monkeypatch.setattr(train, "run_script", lambda doc, Config, found, *rest, **named: commands.update(found))
    train.main([])
    monkeypatch.undo()
    command = commands[word]._replace(function=given.append)
    assert train.run_script("", train.Config, {word: commands[word]}, [word, "--help"]) == 0
    shown = capsys.readouterr().out
    options = re.split(r"\n  --", shown.partition("options:")[2])[1:]
    names = [re.match(r"\w+", option)[0] for option in options]
    assert sorted(names) == sorted(command.flags.split()) and shown.count("\n") < 100
    assert train.run_script("", train.Config, {word: command}, [word], adjust=train.default_rate) == 0
    defaults = [re.search(r"\(default (.*?)\)", " ".join(option.split())) for option in options]
    on = {"on": "True", "off": "False"}
    found = {name: on.get(default[1], default[1]) for name, default in zip(names, defaults) if default}
    assert found == {name: str(getattr(given[0], name)) for name in found} and len(found) >= len(names) - 2
    assert train.run_script("", train.Config, {word: command}, [word, f"--{other}", "1"]) == 2
    assert f"--{other}" in capsys.readouterr().err and len(given) == 1


@pytest.mark.parametrize("flags, rate", [("", 1.2e-2), ("--optimizer adamw", 1e-3), ("--init gpt2", 2e-3),
                                         ("--model gpt2-medium --optimizer adamw", 6e-4),
                                         ("--optimizer adamw --learning_rate 5", 5)])
def test_the_default_rate_follows_optimizer_and_size_and_a_given_one_is_kept(flags, rate):
    """A Config is complete before a command sees it."""
    seen = []
    command = train.Command(lambda config: seen.append(config.learning_rate), train.TRAINING + " model")
    assert train.run_script("", train.Config, {"train": command}, flags.split(), adjust=train.default_rate) == 0
    assert seen == [rate]


def test_batches_cover_every_example_once_an_epoch_and_go_on_where_a_run_stopped():
    """11 examples in batches of 4 over four epochs and a bit; from any step on, the rest of the same list."""
    def listed(progress, **named):
        for indices in train.batches(11, train.Config(batch_size=4), progress, 13, **named):
            yield indices
            progress.step += 1

    whole = list(listed(train.Progress()))
    assert [len(indices) for indices in whole] == [4, 4, 3] * 4 + [4]
    epochs = [sum(whole[i : i + 3], []) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for step in range(14):
        assert list(listed(train.Progress(step=step))) == whole[step:]
    assert list(listed(train.Progress(), order=lambda epoch: torch.arange(11)))[4] == [4, 5, 6, 7]


# --- whole runs


def test_a_run_learns_and_writes_what_it_promises(text, capsys):
    """The loss falls well below the untrained ln V, and model, state, metrics, curves, samples and summary appear."""
    summary = pretrain("--max_steps", 60, "--eval_every", 30, "--learning_rate", "0.01", "--warmup_steps", 5)
    rows = logged()
    start = next(row["val_loss"] for row in rows if row["step"] == 0)
    vocabulary = gpt.load_checkpoint("out/pretrain/model.safetensors")[0].config.vocab_size
    assert start == pytest.approx(math.log(vocabulary), abs=0.2)
    assert summary["val_loss"] < start - 0.8 and summary["steps"] == 60 and summary["stage"] == "pretrain"
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2), rel=0.01)  # ASCII characters
    svg = Path("out/pretrain/curves.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg") and svg.count("<polyline") == 2
    assert sorted(os.listdir("out/pretrain")) == [".lock", "curves.svg", "metrics.jsonl", "model.safetensors",
                                                   "samples.txt", "state.pt", "summary.json"]
    assert "validation loss" in capsys.readouterr().out


def test_evaluation_is_over_every_window_once(text, capsys):
    """`evaluate` gives the loss of the summary, and a loop over single tokens gives it too."""
    summary = pretrain("--max_steps", 5)
    assert train.main(["evaluate", "--data", "text.txt"]) == 0
    assert f"loss {summary['val_loss']:.4f}" in capsys.readouterr().out
    model, tokenizer, _ = gpt.load_checkpoint("out/pretrain/model.safetensors")
    folder = next(Path("data/prepared").iterdir())
    tokens = train.load_tokens(folder / "val.bin").to(torch.int64)
    total, T = 0.0, 16
    for target in range(1, len(tokens)):
        start = (target - 1) // T * T
        if start + T + 1 > len(tokens):
            start = len(tokens) - 1 - T
        logits = model(tokens[None, start : start + T])[0, target - 1 - start]
        total -= torch.log_softmax(logits.double(), dim=0)[tokens[target]].item()
    assert total / (len(tokens) - 1) == pytest.approx(summary["val_loss"], abs=1e-4)


QUESTIONS = [
    {"prompt": "the cat sat on", "choices": ["the mat", "a bird sang", "ran"], "answer": 0},
    {"prompt": "the dog ran to ", "choices": ["barn", "red barn while"], "answer": "barn"},
    {"ctx": "a bird", "endings": ["sang.", "sat on the dog", "the the", "mat mat mat"], "label": "2", "ind": 4}]


def small_lm(path="m.safetensors", context=24):
    """Save a random model with lively logits whose tokenizer knows the characters of the questions; return both."""
    tokenizer = CharTokenizer.train([json.dumps(QUESTIONS)])
    torch.manual_seed(3)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, context, 16, 2, 2, 0.0, qkv_bias=True, tie_weights=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    gpt.save_checkpoint(path, model, tokenizer)
    return model.eval(), tokenizer


@torch.no_grad()
def token_by_token(model, ids, n):
    """Return the log-probability of the last n ids, each from a pass over what stands before it."""
    return sum(torch.log_softmax(model(torch.tensor([ids[:t]]))[0, -1].double(), 0)[ids[t]].item()
               for t in range(len(ids) - n, len(ids)))


def test_multiple_choice_takes_the_likeliest_plainly_and_per_byte(tmp_path, monkeypatch, capsys):
    """Scores by single tokens choose the same; both forms of a question, and a prompt longer than the context."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = small_lm()
    Path("task.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    found, hits = {}, {"accuracy": 0, "accuracy_per_byte": 0}
    for question, space, answer in zip(read_choices("task.jsonl"), (" ", "", " "), (0, 0, 2)):
        prompt, choices = question["prompt"], question["choices"]
        scores = [token_by_token(model, tokenizer.encode(prompt + space + choice)[-24:], len(space + choice))
                  for choice in choices]
        assert train.choice_logprobs(model, tokenizer, prompt, choices) == pytest.approx(scores, abs=1e-4)
        hits["accuracy"] += scores.index(max(scores)) == answer
        per_byte = [score / len(choice) for score, choice in zip(scores, choices)]
        hits["accuracy_per_byte"] += per_byte.index(max(per_byte)) == answer
    monkeypatch.setattr(train, "evaluate_task", lambda *args, real=train.evaluate_task: found.update(real(*args)))
    assert train.main(["evaluate", "--checkpoint", "m.safetensors", "--task", "task.jsonl"]) == 0
    assert {name: found[name] * 3 for name in hits} == pytest.approx(hits)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3) and found["questions"] == 3
    assert found["accuracy_interval"] == train.wilson(hits["accuracy"], 3)
    assert "of 3 questions" in capsys.readouterr().out


def test_a_model_that_knows_the_answers_is_right_and_length_counts_per_byte():
    """Each token "a" costs ln 2 and "b" ln 4: plainly a long row of a loses to one b, per byte it wins."""
    class Known(torch.nn.Module):
        config, device = gpt.GPTConfig(3, 16, 8, 2, 1), torch.device("cpu")

        def forward(self, ids):
            return torch.tensor([0.25, 0.5, 0.25]).log().expand(*ids.shape, 3)

    class Letters:
        eot_id = 0

        def encode(self, text):
            return [{"a": 1, "b": 2}[letter] for letter in text]

    scores = train.choice_logprobs(Known(), Letters(), "", ["b", "aaaa"])
    assert scores == pytest.approx([-math.log(4), -4 * math.log(2)], abs=1e-5)
    found = train.evaluate_task(Known(), Letters(), [{"prompt": "", "choices": ["b", "aaaa"], "answer": 1}] * 5)
    assert (found["accuracy"], found["accuracy_per_byte"], found["chance"]) == (0, 1, 0.5)


@pytest.mark.parametrize("line, said", [
    ({"prompt": "a", "choices": ["b"], "answer": 0}, "'choices' must be a list of two texts or more"),
    ({"prompt": "a", "choices": ["b", " "], "answer": 0}, "none empty"),
    ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "'answer' must be one of the choices or its number, 0 to 1, not"),
    ({"choices": ["b", "c"], "answer": 0}, "'prompt' is missing"),
    ({"ctx": "a", "endings": ["b", "c"], "label": "x"}, "'label' must be"),
    ({"prompt": "a", "choices": ["the cat " * 5, "c"], "answer": 1}, "does not fit into the context")])
def test_a_question_that_cannot_be_scored_is_one_line(line, said, tmp_path, monkeypatch, capsys):
    """With the line of the file, or the choice."""
    monkeypatch.chdir(tmp_path)
    small_lm()
    Path("task.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(line), encoding="utf-8")
    assert train.main(["evaluate", "--checkpoint", "m.safetensors", "--task", "task.jsonl"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert "task.jsonl line 2" in error or "context" in error


@pytest.mark.peer
def test_choices_are_as_likely_as_to_transformers(tmp_path):
    """On a random GPT-2, exported: the loss of transformers' model over the choice's tokens, times their number."""
    transformers = pytest.importorskip("transformers")
    from gpt2_weights import export_gpt2

    model, tokenizer = small_lm(tmp_path / "m.safetensors", context=64)
    export_gpt2(model, tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    for question in QUESTIONS[:2]:
        prompt, space, expected = question["prompt"], " " * (question["prompt"][-1] != " "), []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer.encode(prompt + space + choice)])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            expected.append(-theirs(ids, labels=labels).loss.item() * len(space + choice))
        assert train.choice_logprobs(model, tokenizer, prompt, question["choices"]) == pytest.approx(expected, abs=1e-4)


def test_accumulation_changes_nothing_but_rounding(text):
    """Batches of 4 computed at once, in 2 and in 4 pieces end with the same loss."""
    losses = [pretrain("--max_steps", 8, "--accumulate", n, "--fresh")["val_loss"] for n in (1, 2, 4)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_hash_of_frozen_weights_is_theirs_where_they_have_to_be_copied(monkeypatch):
    """On a GPU `cpu()` makes a tensor that nobody else holds: its memory must last until it is hashed."""
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPT_CONFIGS["tiny"]).requires_grad_(False)
    expected = train.fingerprint(model)["frozen"]
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    assert [train.fingerprint(model)["frozen"] for _ in range(3)] == [expected] * 3
    next(model.parameters())[0, 0] += 1
    assert train.fingerprint(model)["frozen"] != expected


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(text, stop_after):
    """AdamW, with dropout and micro-batches, stopped after an evaluation; each step is logged once.

    Muon, other scripts, and other places to stop: test_reliability::test_a_run_stopped_at_six_points..."""
    flags = ["--max_steps", 24, "--eval_every", 10, "--drop_rate", 0.1, "--optimizer", "adamw", "--accumulate", 2]
    pretrain(*flags, "--log_every", 1)
    expected, steps = last_weights(), [row["step"] for row in logged()]
    with stop_after(10):
        pretrain(*flags, "--log_every", 1, "--fresh", status=128 + signal.SIGTERM)
    pretrain(*flags, "--log_every", 1, "--resume", "--save_every", 5)  # an option that decides nothing
    assert last_weights() == expected and [row["step"] for row in logged()] == steps


def test_a_stop_between_two_looks_loses_no_step(text, monkeypatch):
    """The first look says no, every later one yes: one look decides both the save and the end, so step 2 is kept."""
    flags, looks, steps = ["--max_steps", 9, "--save_every", 0, "--drop_rate", 0.1], [], []
    pretrain(*flags)
    expected = last_weights()
    real = torch.Tensor.backward

    def look(stop):
        looks.append(1)
        stop.signal = signal.SIGTERM * (len(looks) > 1)
        return len(looks) > 1

    with monkeypatch.context() as patch:
        patch.setattr(train.Stop, "__bool__", look)
        patch.setattr(torch.Tensor, "backward", lambda loss: (steps.append(1), real(loss)))
        pretrain(*flags, "--fresh", status=128 + signal.SIGTERM)
    assert len(steps) == len(looks) == 2 == train.read_state("out/pretrain/state.pt")["step"]
    pretrain(*flags, "--resume")
    assert last_weights() == expected


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_new_optimizer_in_two_places_trains_stops_and_resumes(text, momentum, stop_after, monkeypatch):
    """SGD as a choice of --optimizer and in make_optimizers: the same bits; without momentum it has no state."""
    @dataclasses.dataclass
    class Config(train.Config):
        optimizer: str = train.option("sgd", "plain gradient descent", choices=("adamw", "muon", "sgd"))

    monkeypatch.setattr(train, "Config", Config)
    monkeypatch.setattr(train, "make_optimizers", lambda model, config: [
        torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=momentum)])
    flags = ["--optimizer", "sgd", "--max_steps", 20, "--eval_every", 5, "--learning_rate", 0.1, "--drop_rate", 0.1]
    pretrain(*flags)
    losses = [row["val_loss"] for row in logged() if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.1
    expected = last_weights()
    with stop_after(13):
        pretrain(*flags, "--fresh", status=128 + signal.SIGTERM)
    assert bool(train.read_state("out/pretrain/state.pt")["optimizers"][0]["state"]) == bool(momentum)
    pretrain(*flags, "--resume")
    assert last_weights() == expected


def test_an_update_clips_to_the_norm_and_takes_the_scheduled_rate(text, monkeypatch):
    """With plain gradient descent the step's length is rate x clip, the rate that of the schedule at that step."""
    lengths, norms = [], []

    class Measured(torch.optim.SGD):
        def step(self):
            before = [p.detach().double() for p in self.param_groups[0]["params"]]
            super().step()
            after = self.param_groups[0]["params"]
            lengths.append(math.sqrt(sum((b - p.detach()).square().sum().item() for b, p in zip(before, after))))
            norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in after)))

    monkeypatch.setattr(train, "make_optimizers", lambda model, config: [Measured(model.parameters(), lr=9.0)])
    pretrain("--max_steps", 8, "--warmup_steps", 4, "--learning_rate", 0.1, "--clip", 0.05, "--log_every", 1)
    rows = [row for row in logged() if "loss" in row]
    expected = [0.1 * train.rate_factor(step, 8, 4, "cosine", 0.1) for step in range(8)]
    assert [row["rate"] for row in rows] == pytest.approx(expected)
    assert lengths == pytest.approx([0.05 * rate for rate in expected], rel=1e-3) and norms == pytest.approx([0.05] * 8)
    assert min(row["norm"] for row in rows) > 0.1  # as logged, before clipping


def test_the_best_weights_are_kept_apart_from_the_last_also_when_resumed(text, stop_after):
    """A rate that ruins the model leaves model.safetensors at step 0 while state.pt goes on."""
    flags = ["--max_steps", 10, "--eval_every", 5, "--learning_rate", 3, "--warmup_steps", 0, "--optimizer", "adamw"]
    with stop_after(3):
        pretrain(*flags, status=128 + signal.SIGTERM)
    pretrain(*flags, "--resume")
    assert gpt.load_checkpoint("out/pretrain/model.safetensors")[2]["step"] == 0
    assert train.read_state("out/pretrain/state.pt")["step"] == 10


def test_init_goes_on_from_a_checkpoint_with_its_own_tokenizer(text):
    """A second run from the first one's model starts at its validation loss, cropped context and all."""
    first = pretrain("--max_steps", 20, "--learning_rate", "0.01")
    os.rename("out/pretrain", "out/first")
    Path("text.txt").write_text(Path(text).read_text(encoding="utf-8") + " ", encoding="utf-8")
    pretrain("--max_steps", 1, "--init", "out/first/model.safetensors", "--tokenizer", train.Config.tokenizer,
             "--context_length", 0, "--emb_dim", 0, "--n_layers", 0, "--n_heads", 0)
    rows = logged()
    start = next(row["val_loss"] for row in rows if row["step"] == 0)
    assert start == pytest.approx(first["val_loss"], abs=0.02)


# --- what a user can get wrong


def check_error(capsys, argv, status, *words):
    """Assert the exit status of train.main and that stderr ends with one error line holding the words."""
    capsys.readouterr()
    assert train.main(argv) == status, argv
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_an_existing_run_is_never_overwritten(text, capsys):
    """Without --resume or --fresh exit 2, no byte changes; --fresh moves it aside; --resume of a finished run is 0."""
    pretrain("--max_steps", 3)
    before = {path: path.read_bytes() for path in Path("out/pretrain").iterdir()}
    base = ["--data", text, *TINY, "--max_steps", "3"]
    check_error(capsys, base, 2, "--resume", "--fresh")
    check_error(capsys, [*base, "--resume", "--learning_rate", "0.5", "--seed", "7"], 2,
                "learning_rate: saved 0.001, given 0.5", "seed: saved 1234, given 7")
    longer = ["--data", text, *TINY, "--max_steps", "9", "--resume"]
    check_error(capsys, longer, 2, "max_steps: saved 3, given 9", "--init out/pretrain/model.safetensors")
    assert train.main([*base, "--resume"]) == 0
    assert {path: path.read_bytes() for path in Path("out/pretrain").iterdir() if path.name != ".lock"} == {
        path: data for path, data in before.items() if path.name != ".lock"}
    assert train.main([*base, "--fresh"]) == 0
    assert Path("out/pretrain.1/model.safetensors").read_bytes() == before[Path("out/pretrain/model.safetensors")]


@pytest.mark.parametrize("kept", ["model.safetensors", "summary.json"])
def test_resume_without_a_state_leaves_the_model_alone(text, capsys, kept):
    """A folder with a model but no state.pt is not a place to start at step 0 in: status 2, no byte changes."""
    pretrain("--max_steps", 2)
    for path in Path("out/pretrain").iterdir():
        if path.name != kept:
            path.unlink()
    before = Path("out/pretrain", kept).read_bytes()
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--resume"], 2, "without state.pt", "--fresh")
    assert os.listdir("out/pretrain") == [kept] and Path("out/pretrain", kept).read_bytes() == before


def test_a_state_of_the_first_edition_is_refused_in_one_line(text, capsys):
    """Its format is 1: it has keys of the same names, so it must not be taken for ours."""
    pretrain("--max_steps", 2)
    Path("out/pretrain/summary.json").unlink()
    state = train.read_state("out/pretrain/state.pt")
    torch.save({**state, "format": 1}, "out/pretrain/state.pt")
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--resume"], 1, "not a state of this", "--fresh")


def test_resume_in_an_empty_folder_starts_and_says_so(text, capsys):
    """--resume is safe to give always; a second resume from Python returns the same summary, and the lock is free."""
    summary = pretrain("--max_steps", 2, "--resume")
    assert "a new run in out/pretrain" in capsys.readouterr().err
    names = dict(zip((word[2:] for word in TINY[::2]), TINY[1::2]))
    values = {name: type(getattr(train.Config, name))(value) for name, value in names.items()}
    assert train.train(train.Config(data="text.txt", max_steps=2, resume=True, **values)) == summary
    train.lock(Path("out/pretrain")).close()


def test_a_summary_that_was_cut_is_written_again_on_resume(text):
    """Empty, as a power cut can leave it: the run counts as unfinished, and its end gives the same figures."""
    whole = pretrain("--max_steps", 3)
    Path("out/pretrain/summary.json").write_text("")
    again = pretrain("--max_steps", 3, "--resume")
    for figure in ("steps", "train_loss", "val_loss", "bits_per_byte", "config", "data"):
        assert again[figure] == whole[figure]


def test_every_sample_begins_with_the_prompt(text):
    """Word tokens: the prompt's own, a space, then the new ones."""
    pretrain("--max_steps", 4, "--eval_every", 2, "--tokenizer", "word", "--context_length", 8, "--prompt", "the cat")
    samples = [row["sample"] for row in logged() if "sample" in row]
    assert len(samples) == 3 and all(sample.startswith("the cat ") for sample in samples)


def test_without_a_tokenizer_the_error_is_the_one_command_to_type(text, capsys):
    """For the data of the run: after it the same command line trains."""
    argv = ["--data", text, *TINY[2:], "--max_steps", "1", "--context_length", "4"]
    assert train.main(argv) == 1
    command = capsys.readouterr().err.partition("make it with: python tokenizer.py ")[2].split()
    assert tok.main([*command, "--vocab_size", "260"]) == 0 and train.main(argv) == 0


def test_changed_data_is_refused_on_resume(text, capsys):
    """The same file name with other text does not continue the run."""
    pretrain("--max_steps", 4)
    Path("out/pretrain/summary.json").unlink()
    with open(text, "a", encoding="utf-8") as file:
        file.write("the dog sat on the cat. " * 20)
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "4", "--resume"], 1, "other data")


def test_mistakes_get_one_line_and_leave_nothing_behind(text, capsys, tmp_path):
    """Files, sizes, devices and flags that cannot work."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    classifier = gpt.GPTModel(gpt.GPTConfig(27, 16, 16, 2, 1))
    classifier.out_head = torch.nn.Linear(16, 2)
    letters = CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz"])
    gpt.save_checkpoint(tmp_path / "cls.safetensors", classifier, letters, kind="classifier", labels=["a", "b"])
    base = ["--data", text, *TINY, "--max_steps", "2"]
    cases = [(["--data", "none.txt", *TINY], 1, "none.txt"), (["--data", "empty.txt", *TINY], 1, "empty.txt"),
             (["--data", "short.txt", *TINY], 1, "tokens"), (["--data", "latin.txt", *TINY], 1, "latin.txt"),
             ([*base, "--emb_dim", "17"], 2, "not divisible by n_heads 2"), ([*base, "--bach_size=3"], 2, "--batch"),
             ([*base, "--learning_rate", "nan"], 2, "learning_rate"), ([*base, "--batch_size", "0"], 2, "at least 1"),
             ([*base, "--learning_rate", "-2"], 2, "at least 0"), ([*base, "--max_steps", "1e3"], 2, "max_steps"),
             ([*base, "--max_steps", "0"], 2, "--epochs"), ([*base, "--resume", "--fresh"], 2, "choose one"),
             ([*base, "--optimizer", "sgd"], 2, "invalid choice"), (["trian"], 2, "unknown command"),
             ([*base, "--init", "none.safetensors"], 2, "--emb_dim 16 does not go with --init none.safetensors"),
             (["--data", text, "--init", "none.safetensors"], 1, "none.safetensors does not exist"),
             (["--data", text, "--init", "theirs"], 1, "python gpt2_weights.py import --source theirs"),
             (["--data", text, "--init", "."], 1, ". is a folder; name the file in it"),
             (["--data", text, "--init", "cls.safetensors"], 1, "is a classifier"),
             (["--data", text, "--init", "adapter"], 1, "lora.py merge --adapter adapter"),
             (["--data", text, "--tokenizer", "cls.safetensors"], 1, "is a model, not a tokenizer"),
             (["--data", text, "--init", "none.safetensors", "--tokenizer", "gpt2"], 2, "--tokenizer gpt2 does not go"),
             ([*base, "--momentum", "0.5"], 2, "--momentum"), ([*base, "--out_dir", ""], 2, "--out_dir"),
             ([*base, "--max_step", "3"], 2, "--max_steps"),
             (["--data", text, "--max_steps", "2"], 1, "python tokenizer.py train --data text.txt"),
             (["evaluate", "--data", text], 1, "python train.py")]
    if not torch.cuda.is_available():
        cases.append(([*base, "--device", "cuda"], 2, "--device cpu"))
    if not torch.cpu._is_avx512_bf16_supported():
        cases.append(([*base, "--dtype", "bfloat16"], 2, "float32"))
    for argv, status, word in cases:
        check_error(capsys, argv, status, word)
    assert not Path("out/pretrain/model.safetensors").exists() and not Path("out/pretrain/state.pt").exists()
    with pytest.raises(argparse.ArgumentError, match="--max_steps"):  # as the other stages call it
        train.total_steps(train.Config(max_steps=0), 1)
    (tmp_path / "file").write_text("")
    check_error(capsys, [*base, "--out_dir", "file/run"], 1, "error: file/run", "Not a directory")


def test_a_warm_up_as_long_as_the_run_is_warned_of(text, capsys):
    """One line on stderr at 5 of 5 steps, none at 4 of 5."""
    for warmup, lines in ((5, 1), (4, 0)):
        pretrain("--max_steps", 5, "--warmup_steps", warmup, "--fresh")
        assert capsys.readouterr().err.count("warning: --warmup_steps") == lines


def test_early_stopping_ends_a_run_that_no_longer_improves(text):
    """With a rate of 0 no evaluation is better than the first: patience 2 stops after two more."""
    assert pretrain("--max_steps", 50, "--eval_every", 5, "--learning_rate", 0, "--patience", 2)["steps"] == 10


def test_a_disk_that_fills_within_a_save_is_one_line(text, capsys, monkeypatch):
    """After so many bytes of state.pt: torch's writer, closing its archive, says something else than the disk did."""
    pretrain("--max_steps", 2)
    size, real_open = os.path.getsize("out/pretrain/state.pt"), open

    class Full(io.FileIO):
        def write(self, content):
            if self.tell() + len(content) > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    def full(path, mode="r", *rest, **named):
        return Full(path, "w") if "state.pt" in str(path) and mode == "wb" else real_open(path, mode, *rest, **named)

    for limit in (0, size // 2, size - 50):
        monkeypatch.setattr("builtins.open", full)
        check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--out_dir", f"out/{limit}"], 1,
                    "No space left on device")
        monkeypatch.setattr("builtins.open", real_open)
        assert not list(Path(f"out/{limit}").glob(".*.tmp"))
        if (state := Path(f"out/{limit}/state.pt")).exists():  # the first save fitted: it has no moments yet
            assert train.read_state(state)["step"] == 0


# --- published results, on real text


@pytest.mark.slow
def test_the_verdict_is_memorized(real_data, gpt2_tokenizer, tmp_path, monkeypatch):
    """Ten epochs over the short story bring the training loss under 1, as in the notes, at a smaller size."""
    monkeypatch.chdir(tmp_path)
    flags = ("--tokenizer gpt2 --emb_dim 192 --n_layers 3 --n_heads 4 --context_length 64 --batch_size 2 --epochs 10 "
             "--max_steps 0 --learning_rate 4e-3 --warmup_steps 20 --eval_every 0 --prompt Every --drop_rate 0")
    assert train.main(["--data", str(real_data("the-verdict.txt")), *flags.split()]) == 0
    summary = json.loads(Path("out/pretrain/summary.json").read_text(encoding="utf-8"))
    rows = logged()
    assert [row["loss"] for row in rows if "loss" in row][-1] < 1 < summary["val_loss"]


def test_a_validation_figure_that_is_not_finite_ends_the_run():
    """NaN would count as the lowest for ever after: it is refused, and the best so far stays."""
    progress = train.Progress(step=3, best=1.5)
    with pytest.raises(ValueError, match="step 3: the validation figure is nan"):
        train.is_best(progress, math.nan)
    assert progress.best == 1.5 and train.is_best(progress, 1.25)


def test_a_run_leaves_the_unfinished_files_of_other_runs_alone(text):
    """A folder below --out_dir belongs to another run, which may be saving now; so do names that are not of our form."""
    for name in ("out/pretrain/other/.state.pt.999.tmp", "out/pretrain/.notes.tmp", "out/pretrain/.state.pt.99.tmp"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("half")
    pretrain("--max_steps", 1, "--warmup_steps", 0)
    assert Path("out/pretrain/other/.state.pt.999.tmp").exists() and Path("out/pretrain/.notes.tmp").exists()
    assert not Path("out/pretrain/.state.pt.99.tmp").exists()


def test_a_state_that_cannot_be_read_stays_though_no_model_lies_beside_it(text, capsys, monkeypatch, stop_after):
    """Of a new run that fails at once nothing stays; of one that is resumed everything does."""
    with stop_after(2):
        pretrain("--max_steps", 4, status=128 + signal.SIGTERM)
    Path("out/pretrain/model.safetensors").unlink()
    before = Path("out/pretrain/state.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **named: os.stat("gone"))
        check_error(capsys, ["--data", text, *TINY, "--max_steps", "4", "--resume"], 1, "gone")
    assert Path("out/pretrain/state.pt").read_bytes() == before
    assert pretrain("--max_steps", 4, "--resume")["steps"] == 4
    monkeypatch.setattr(train, "evaluate_and_save", lambda *parts: os.stat("gone"))
    check_error(capsys, ["--data", text, *TINY, "--out_dir", "out/new"], 1, "gone")
    assert not Path("out/new").exists()


@pytest.mark.parametrize("kind", [CharTokenizer, WordTokenizer])
def test_the_end_of_a_sentence_is_read_with_every_tokenizer(kind, monkeypatch):
    """Words come back without the space before them, and characters have no token for padding."""
    told = [("The fox lives", "in a den."), ("The old owl eats", "mice.")]
    tokenizer = kind.train([f"{beginning} {end}" for beginning, end in told])
    wholes = [tokenizer.encode(f"{beginning} {end}") for beginning, end in told]

    def recite(model, ids, length, temperature, mask):
        ends = [whole[len(tokenizer.encode(beginning)) :] for whole, (beginning, _) in zip(wholes, told)]
        return torch.cat([ids, torch.tensor([(end + 9 * end[-1:])[:length] for end in ends])], dim=1)

    monkeypatch.setattr(gpt, "generate", recite)
    model = types.SimpleNamespace(device="cpu")
    assert train.ends_right(model, tokenizer, told) == [True, True]
    assert train.ends_right(model, tokenizer, [told[0], ("The old owl eats", "a den.")]) == [True, False]
