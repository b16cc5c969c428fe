"""Optimizers, schedule, losses, runs: closed forms, published values, learning that must happen, exact resume."""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import gpt
import train
from tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = "--tokenizer char --emb_dim 16 --n_layers 2 --n_heads 2 --context_length 16 --batch_size 4 --sample_tokens 5 --learning_rate 1e-3".split()


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
    """Return the sha256 over all weights in state.pt and the best model's file."""
    state = torch.load(f"{folder}/state.pt", weights_only=True)
    digest = hashlib.sha256()
    for name in sorted(state["model"]):
        digest.update(name.encode())
        digest.update(gpt.tensor_bytes(state["model"][name].contiguous()))
    return digest.hexdigest(), gpt.read_safetensors(f"{folder}/model.safetensors")[1]["data_sha256"]


# --- pure functions


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_is_chosen_only_where_the_hardware_has_it(units, monkeypatch):
    """A GPU that only emulates it, as torch says of a T4 or V100 unless asked otherwise, computes in float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    chosen = train.autocast(train.Config(), torch.device("cuda"))
    assert isinstance(chosen, contextlib.nullcontext) is not units


def test_the_published_loss_arithmetic():
    """Six target probabilities of the notes give cross-entropy 10.7940 and perplexity 48725.82."""
    probs = torch.tensor([7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06], dtype=torch.float64)
    logits = torch.stack([probs.log(), (1 - probs).log()], dim=1).view(2, 3, 2)
    loss = train.next_token_loss(logits, torch.zeros(2, 3, dtype=torch.long)).item() / 6
    assert loss == pytest.approx(10.7940, abs=2e-4) and math.exp(loss) == pytest.approx(48725.82, rel=2e-4)


def test_ignored_targets_do_not_count():
    """A third target of -100 leaves the loss of the published example at that of its first two: 1.1269."""
    logits, targets = torch.tensor([[[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]]), torch.tensor([[0, 1, gpt.IGNORE]])
    with_ignored = train.next_token_loss(logits, targets).item() / 2
    assert with_ignored == pytest.approx(train.next_token_loss(logits[:, :2], targets[:, :2]).item() / 2)
    assert with_ignored == pytest.approx(1.1269, abs=1e-4)


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


def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_directions():
    """Newton-Schulz against the SVD: U V^T for well-conditioned matrices, within the quintic's band of [.65, 1.25]."""
    torch.manual_seed(0)
    for shape in ((3, 8, 8), (2, 8, 32), (2, 32, 8)):
        matrices = torch.randn(shape, dtype=torch.float64)
        got = train.orthogonalise(matrices)
        values = torch.linalg.svdvals(got)
        assert got.shape == shape and values.min() > 0.3 and values.max() < 1.25
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        middle = u.transpose(1, 2) @ got @ vh.transpose(1, 2)  # diagonal, if the directions are the same
        off = middle - torch.diag_embed(torch.diagonal(middle, dim1=1, dim2=2))
        assert off.abs().max() < 1e-8


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


@pytest.mark.parametrize("shape", [(16, 16), (12, 16), (8, 32), (32, 8), (1, 8)])
def test_orthogonalising_keeps_the_directions_and_evens_their_lengths(shape):
    """U diag(f(s)) V^T: f is the quintic applied five times to s / |s|, in both ways to compute it."""
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(train.orthogonalise(matrices), u @ torch.diag_embed(s) @ vh, atol=1e-6)


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


def test_adamw_is_torchs_own_to_the_bit_also_when_resumed():
    """Five updates, the state handed to a new optimizer, three more: the weights of torch's class without a break."""
    torch.manual_seed(0)
    models, x = [nn.Linear(7, 5), nn.Linear(7, 5)], torch.randn(3, 7)
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (kind(model.parameters(), lr=0.1, weight_decay=0.3, fused=True)
                    for kind, model in zip((train.AdamW, torch.optim.AdamW), models))
    for step in range(8):
        if step == 5:
            state, ours = ours.state_dict(), train.AdamW(models[0].parameters())
            ours.load_state_dict(state)
        for model, optimizer in zip(models, (ours, theirs)):
            model.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
        assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)
        assert all(p.requires_grad and p.grad is not None for p in models[0].parameters())


def test_a_run_does_without_torchs_compiler(text):
    """From its start to its last file a run imports no torch._dynamo, which takes half as long as torch itself."""
    words = ["--data", text, *TINY, "--max_steps", "2", "--warmup_steps", "0"]
    code = f"import sys, train; print(train.main({words}), 'torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, timeout=100)
    assert found.stdout.splitlines()[-1] == "0 False", found.stderr


def test_ticks_are_round_and_inside():
    """The axis marks of a picture."""
    assert train.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert train.ticks(1.83, 4.21) == [2, 2.5, 3, 3.5, 4]


# --- whole runs


def test_a_run_learns_and_writes_what_it_promises(text, capsys):
    """The loss falls well below the untrained ln V, and model, state, metrics, curves, samples and summary appear."""
    summary = pretrain("--max_steps", 60, "--eval_every", 30, "--learning_rate", "0.01", "--warmup_steps", 5)
    rows = [json.loads(line) for line in open("out/pretrain/metrics.jsonl", encoding="utf-8")]
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


def test_accumulation_changes_nothing_but_rounding(text):
    """Batches of 4 computed at once, in 2 and in 4 pieces end with the same loss."""
    losses = [pretrain("--max_steps", 8, "--accumulate", n, "--out_dir", "out/pretrain", "--fresh")["val_loss"]
              for n in (1, 2, 4)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_the_hash_of_frozen_weights_is_theirs_where_they_have_to_be_copied(monkeypatch):
    """On a GPU `cpu()` makes a tensor that nobody else holds: its memory must last until it is hashed."""
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPT_CONFIGS["tiny"]).requires_grad_(False)
    expected = train.frozen_sha256(model)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    assert [train.frozen_sha256(model) for _ in range(3)] == [expected] * 3
    next(model.parameters())[0, 0] += 1
    assert train.frozen_sha256(model) != expected


def test_a_state_that_lacks_a_newer_option_resumes_with_its_default(text, stop_after, capsys):
    """An option that came later than the state counts as not given; given otherwise, it differs."""
    flags = ["--max_steps", 4]
    with stop_after(2):
        pretrain(*flags, status=128 + signal.SIGTERM)
    state = torch.load("out/pretrain/state.pt", weights_only=True)
    del state["options"]["momentum"]
    torch.save(state, "out/pretrain/state.pt")
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "4", "--resume", "--momentum", "0.5"], 2,
                "momentum: saved 0.9, given 0.5")
    assert pretrain(*flags, "--resume")["steps"] == 4


def test_early_stopping_ends_a_run_that_no_longer_improves(text):
    """With a rate of 0 no evaluation is better than the first: patience 2 stops after two more."""
    assert pretrain("--max_steps", 50, "--eval_every", 5, "--learning_rate", 0, "--patience", 2)["steps"] == 10


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(text, optimizer, stop_after):
    """Stopped by a signal after step 1, 7 (mid-epoch), 10 (after an evaluation) and 23, then resumed, with dropout."""
    flags = ["--max_steps", 24, "--eval_every", 10, "--save_every", 3, "--drop_rate", 0.1, "--optimizer", optimizer,
             "--accumulate", 2]
    pretrain(*flags)
    expected = last_weights()
    os.rename("out/pretrain", "out/whole")
    for stop_at in (1, 7, 10, 23):
        with stop_after(stop_at):
            pretrain(*flags, "--resume", status=128 + signal.SIGTERM)
        pretrain(*flags, "--resume")
        assert last_weights() == expected, stop_at
        steps = [json.loads(line)["step"] for line in open("out/pretrain/metrics.jsonl", encoding="utf-8")]
        assert steps == sorted(steps) and steps.count(24) == 2
        os.rename("out/pretrain", f"out/stopped{stop_at}")


def test_a_resume_that_lost_the_random_numbers_is_seen(text, stop_after):
    """The control of the test above: without the saved RNG a run with dropout ends with other bits."""
    flags = ["--max_steps", 12, "--drop_rate", 0.1, "--save_every", 5]
    pretrain(*flags)
    expected = last_weights()
    os.rename("out/pretrain", "out/whole")
    with stop_after(6):
        pretrain(*flags, "--resume", status=128 + signal.SIGTERM)
    state = torch.load("out/pretrain/state.pt", weights_only=True)
    state["rng"] = torch.Generator().manual_seed(99).get_state()
    torch.save(state, "out/pretrain/state.pt")
    pretrain(*flags, "--resume")
    assert last_weights() != expected


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(text):
    """SIGKILL from outside at three moments; what is on disk is always whole, and the resumed run ends the same."""
    flags = ["train", "--data", text, *TINY, "--max_steps", "400", "--eval_every", "50", "--save_every", "20"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out_dir", "whole"], check=True, env=environment, capture_output=True)
    for tries in range(3):
        process = subprocess.Popen([*command, "--out_dir", f"k{tries}"], env=environment, stderr=subprocess.DEVNULL)
        while not os.path.exists(f"k{tries}/state.pt") and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.11 * tries)
        process.kill()
        process.wait()
        subprocess.run([*command, "--out_dir", f"k{tries}", "--resume"], check=True, env=environment, capture_output=True)
        assert last_weights(f"k{tries}") == last_weights("whole")


def test_an_update_clips_to_the_norm_and_takes_the_scheduled_rate(text):
    """With plain gradient descent the step's length is rate x clip, the rate that of the schedule at that step."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model = nn.ParameterDict({"w": weight})
    config = train.Config(clip=0.5, learning_rate=0.1, warmup_steps=4, max_steps=8)
    run, sgd = train.Run(config, "test"), torch.optim.SGD([weight], lr=0.1)
    sgd.param_groups[0]["peak"] = 0.1
    run.start(model, [sgd], 8, "none")
    for step in range(8):
        before = weight.detach().clone()
        weight.grad = torch.tensor([30.0, 0.0, 40.0], dtype=torch.float64)
        norm, rate = run.update(1.0, 1)
        assert norm == pytest.approx(50)
        assert rate == pytest.approx(0.1 * train.rate_factor(step, 8, 4, "cosine", 0.1))
        assert (before - weight.detach()).norm().item() == pytest.approx(0.5 * rate, rel=1e-4)
    run.close()


def test_the_best_weights_are_kept_apart_from_the_last(text):
    """A rate that ruins the model leaves model.safetensors at step 0 while state.pt goes on."""
    pretrain("--max_steps", 10, "--eval_every", 5, "--learning_rate", 3, "--warmup_steps", 0, "--optimizer", "adamw")
    assert gpt.load_checkpoint("out/pretrain/model.safetensors")[2]["step"] == 0
    assert train.read_state("out/pretrain/state.pt")["step"] == 10


def test_init_goes_on_from_a_checkpoint_with_its_own_tokenizer(text):
    """A second run from the first one's model starts at its validation loss, cropped context and all."""
    first = pretrain("--max_steps", 20, "--learning_rate", "0.01")
    os.rename("out/pretrain", "out/first")
    Path("text.txt").write_text(Path(text).read_text(encoding="utf-8") + " ", encoding="utf-8")
    pretrain("--max_steps", 1, "--init", "out/first/model.safetensors", "--tokenizer", train.Config.tokenizer,
             "--context_length", 0, "--emb_dim", 0, "--n_layers", 0, "--n_heads", 0)
    rows = [json.loads(line) for line in open("out/pretrain/metrics.jsonl", encoding="utf-8")]
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
    """Without --resume or --fresh exit 2 and no byte changes; --fresh moves it aside; --resume of a finished run is 0."""
    pretrain("--max_steps", 3)
    before = {path: path.read_bytes() for path in Path("out/pretrain").iterdir()}
    base = ["--data", text, *TINY, "--max_steps", "3"]
    check_error(capsys, base, 2, "--resume", "--fresh")
    check_error(capsys, [*base, "--resume", "--learning_rate", "0.5", "--seed", "7"], 2,
                "learning_rate: saved 0.001, given 0.5", "seed: saved 1234, given 7")
    longer = ["--data", text, *TINY, "--max_steps", "9", "--resume"]
    check_error(capsys, longer, 2, "max_steps: saved 3, given 9", "--init out/pretrain/model.safetensors --out_dir NEW")
    own = ["--data", text, "--max_steps", "3", "--init", "out/pretrain/model.safetensors", "--fresh"]
    check_error(capsys, own, 2, "--init out/pretrain/model.safetensors lies in --out_dir", "another --out_dir")
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
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--resume"], 2, "no state.pt", "--fresh")
    assert os.listdir("out/pretrain") == [kept] and Path("out/pretrain", kept).read_bytes() == before


def test_a_run_killed_right_after_its_start_resumes_to_the_same_bits(text, monkeypatch):
    """After the first evaluation wrote a model, and before it, with the state of step 0 or, after an error, nothing."""
    flags = ["--max_steps", 6, "--drop_rate", 0.1, "--save_every", 0]
    pretrain(*flags)
    expected = last_weights()
    original, close = train.evaluate_and_keep, train.Run.close
    for finished, kept in ((True, True), (False, True), (False, False)):

        def killed(run, *parts):
            if finished:
                original(run, *parts)
            if kept:  # no clearing up after SIGKILL
                monkeypatch.setattr(train.Run, "close", lambda run: run.lock_file.close())
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "evaluate_and_keep", killed)
        pretrain(*flags, "--fresh", status=130)
        assert Path("out/pretrain/model.safetensors").exists() == finished
        assert Path("out/pretrain/state.pt").exists() == kept
        monkeypatch.setattr(train.Run, "close", close)
        monkeypatch.setattr(train, "evaluate_and_keep", original)
        pretrain(*flags, "--resume")
        assert last_weights() == expected


def test_a_finished_run_gives_its_folder_back(text):
    """From Python, where no script ends: asked twice to resume, it returns the summary twice."""
    summary = pretrain("--max_steps", 2)
    config = train.config_parser(train.Config, "", "train.py", ["train"]).parse_args(
        ["--data", "text.txt", *TINY, "--max_steps", "2", "--resume"])
    for _ in range(2):
        assert train.train(train.Config(**vars(config))) == summary


def test_a_finished_run_with_a_constant_rate_can_be_made_longer(text, capsys):
    """6 steps and then 6 more are the bits of 12 at once; shorter, or with a schedule that has an end, is refused."""
    flags = ["--schedule", "constant", "--eval_every", 3, "--drop_rate", 0.1, "--warmup_steps", 2]
    pretrain(*flags, "--max_steps", 12)
    expected = last_weights()
    pretrain(*flags, "--max_steps", 6, "--fresh")
    assert pretrain(*flags, "--max_steps", 12, "--resume")["steps"] == 12
    assert last_weights() == expected
    flags = ["--data", text, *TINY, *map(str, flags), "--resume"]
    check_error(capsys, [*flags, "--max_steps", "7"], 2, "max_steps: saved 12, given 7")
    check_error(capsys, [*flags, "--max_steps", "13", "--schedule", "cosine"], 2, "max_steps: saved 12, given 13")


def test_resume_takes_other_options_that_decide_nothing(text, capsys, stop_after):
    """More saves, another log; and a state of an earlier version, which also held options of other commands."""
    flags = ["--max_steps", 6, "--save_every", 2]
    with stop_after(3):
        pretrain(*flags, status=128 + signal.SIGTERM)
    state = torch.load("out/pretrain/state.pt", weights_only=True)
    assert "save_every" not in state["options"] and "batch_size" in state["options"]
    state["options"].update(save_every=2, judge="", judge_model="llama3", against="", text=(), part="test")
    torch.save(state, "out/pretrain/state.pt")
    capsys.readouterr()
    assert pretrain(*flags, "--resume", "--save_every", 5)["steps"] == 6
    assert "resumed at step 3" in capsys.readouterr().err
    state["step"] = 6
    torch.save(state, "out/pretrain/state.pt")
    pretrain(*flags, "--resume")
    assert "out/pretrain is finished" in capsys.readouterr().err


def test_resume_in_an_empty_folder_starts_and_says_so(text, capsys):
    """--resume is safe to give always."""
    pretrain("--max_steps", 2, "--resume")
    assert "starting at step 0" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(text, capsys):
    """Two processes never write into one folder; the lock ends with its holder."""
    holder = train.Run(train.Config(), "pretrain")
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "2"], 2, "in use by process", str(os.getpid()))
    holder.close()
    pretrain("--max_steps", 2)


def test_a_damaged_state_is_found_before_it_is_used(text, capsys):
    """20 flipped bytes and 11 cuts of state.pt: one line, status 1, nothing changed; so is a foreign pickle."""
    pretrain("--max_steps", 2)
    path = Path("out/pretrain/state.pt")
    good = path.read_bytes()
    broken = [good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :] for at in range(7, len(good), len(good) // 20)]
    broken += [good[: len(good) * cut // 11] for cut in range(11)]
    caught = 0
    for data in broken:
        path.write_bytes(data)
        try:
            train.read_state(path)
        except ValueError as error:
            caught += "damaged or not ours" in str(error)
        else:  # a byte that nothing depends on, in the archive's directory for one: what is read is still right
            path.write_bytes(good)
            whole = train.read_state(path)
            path.write_bytes(data)
            state = train.read_state(path)
            assert all(torch.equal(state["model"][k], whole["model"][k]) for k in whole["model"])
            caught += 1
    assert caught == len(broken)
    path.write_bytes(good[:100])
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--resume"], 1, "damaged", "--fresh")


def test_a_state_that_would_run_code_runs_nothing(text, tmp_path, capsys):
    """A pickle with a payload in place of state.pt is refused and its marker file never appears."""
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    for save in (lambda path: torch.save(Payload(), path), lambda path: Path(path).write_bytes(pickle.dumps(Payload()))):
        save(tmp_path / "state.pt")
        with pytest.raises(ValueError, match="damaged or not ours"):
            train.read_state(tmp_path / "state.pt")
        assert not (tmp_path / "marker").exists()


def test_changed_data_is_refused_on_resume(text, capsys):
    """The same file name with other text does not continue the run."""
    pretrain("--max_steps", 4)
    Path("out/pretrain/summary.json").unlink()
    with open(text, "a", encoding="utf-8") as file:
        file.write("the dog sat on the cat. " * 20)
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "4", "--resume"], 1, "other data")


def test_a_loss_that_is_not_finite_stops_before_the_update(text, capsys, monkeypatch):
    """NaN at step 3: status 1, weights of step 2 stay, no state of step 3 is written, the flags to try are named."""
    original = train.next_token_loss

    def poisoned(logits, targets):
        poisoned.calls += logits.requires_grad
        return original(logits, targets) * (math.nan if poisoned.calls == 3 and logits.requires_grad else 1)

    poisoned.calls = 0
    monkeypatch.setattr(train, "next_token_loss", poisoned)
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "9", "--save_every", "1"], 1, "step 3", "nan",
                "--learning_rate", "this batch, examples ")
    state = train.read_state("out/pretrain/state.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())


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
             ([*base, "--emb_dim", "17"], 2, "not divisible by n_heads 2"), ([*base, "--bach_size", "3"], 2, "--batch_size"),
             ([*base, "--learning_rate", "nan"], 2, "learning_rate"), ([*base, "--batch_size", "0"], 2, "at least 1"),
             ([*base, "--learning_rate", "-2"], 2, "at least -1"), ([*base, "--max_steps", "1e3"], 2, "max_steps"),
             ([*base, "--max_steps", "0"], 2, "--epochs"), ([*base, "--resume", "--fresh"], 2, "choose one"),
             ([*base, "--optimizer", "sgd"], 2, "invalid choice"), (["trian"], 2, "unknown command"),
             ([*base, "--init", "none.safetensors"], 2, "--emb_dim 16 does not go with --init none.safetensors"),
             (["--data", text, "--init", "none.safetensors"], 1, "none.safetensors does not exist"),
             (["--data", text, "--init", "theirs"], 1, "python gpt2_weights.py import --source theirs"),
             (["--data", text, "--init", "."], 1, "--init . is a folder; name the file, such as cls.safetensors"),
             (["--data", text, "--init", "cls.safetensors"], 1, "is a classifier"),
             (["--data", text, "--init", "adapter"], 1, "lora.py merge --adapter adapter"),
             (["--data", text, "--tokenizer", "cls.safetensors"], 1, "is a model, not a tokenizer"),
             (["--data", text, "--init", "none.safetensors", "--tokenizer", "gpt2"], 2, "--tokenizer gpt2 does not go"),
             ([*base, "--learning_rate", "-0.5"], 2, "-1 or at least 0"), ([*base, "--out_dir", ""], 2, "--out_dir"),
             ([*base, "--max_step", "3"], 2, "--max_steps"),
             (["--data", text, "--max_steps", "2"], 1, "python tokenizer.py"),
             (["evaluate", "--data", text], 1, "python train.py")]
    if not torch.cuda.is_available():
        cases.append(([*base, "--device", "cuda"], 2, "--device cpu"))
    if not torch.cpu._is_avx512_bf16_supported():
        cases.append(([*base, "--dtype", "bfloat16"], 2, "float32"))
    for argv, status, word in cases:
        check_error(capsys, argv, status, word)
    assert not Path("out/pretrain/model.safetensors").exists() and not Path("out/pretrain/state.pt").exists()
    with pytest.raises(argparse.ArgumentError, match="--max_steps"):  # as the other stages call it
        train.Run(train.Config(max_steps=0, out_dir="endless"), "test")
    assert not Path("endless").exists()
    (tmp_path / "file").write_text("")
    check_error(capsys, [*base, "--out_dir", "file/run"], 1, "error: file/run: Not a directory; ", "take another path")


def test_a_warm_up_as_long_as_the_run_is_warned_of(text, capsys):
    """One line on stderr at 5 of 5 steps, none at 4 of 5."""
    for warmup, lines in ((5, 1), (4, 0)):
        pretrain("--max_steps", 5, "--warmup_steps", warmup, "--fresh")
        assert capsys.readouterr().err.count("warning: --warmup_steps") == lines


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_state(text, capsys, monkeypatch):
    """When the save of step 3 meets a full disk: status 1, state.pt is that of step 2, no temporary file stays."""
    real_open, saves = open, []

    def full(path, mode="r", *rest, **named):
        if "state.pt" in str(path) and mode == "wb":
            saves.append(path)
        return real_open("/dev/full" if len(saves) == 4 and mode == "wb" else path, mode, *rest, **named)

    monkeypatch.setattr("builtins.open", full)
    check_error(capsys, ["--data", text, *TINY, "--max_steps", "9", "--save_every", "1"], 1,
                "error: out/pretrain/state.pt: No space left on device; free some space")
    monkeypatch.setattr("builtins.open", real_open)
    assert train.read_state("out/pretrain/state.pt")["step"] == 2
    assert not list(Path("out/pretrain").glob("*.tmp")) and not list(Path("out/pretrain").glob(".*.tmp"))


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

    for limit in (0, 100, size // 2, size - 3000, size - 50):
        monkeypatch.setattr("builtins.open", full)
        check_error(capsys, ["--data", text, *TINY, "--max_steps", "2", "--out_dir", f"out/{limit}"], 1,
                    "No space left on device; free some space")
        monkeypatch.setattr("builtins.open", real_open)
        assert not list(Path(f"out/{limit}").glob(".*.tmp"))
        if (state := Path(f"out/{limit}/state.pt")).exists():  # the first save fitted: it has no moments yet
            assert train.read_state(state)["step"] == 0


# --- published results, on real text


@pytest.mark.slow
def test_the_verdict_is_learnt_by_heart(real_data, gpt2_tokenizer, tmp_path, monkeypatch):
    """Ten epochs over the short story bring the training loss under 1, as in the notes, at a smaller size."""
    monkeypatch.chdir(tmp_path)
    flags = ("--tokenizer gpt2 --emb_dim 192 --n_layers 3 --n_heads 4 --context_length 64 --batch_size 2 --epochs 10 "
             "--max_steps 0 --learning_rate 4e-3 --warmup_steps 20 --eval_every 0 --sample_prompt Every --drop_rate 0")
    assert train.main(["--data", str(real_data("the-verdict.txt")), *flags.split()]) == 0
    summary = json.loads(Path("out/pretrain/summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in open("out/pretrain/metrics.jsonl", encoding="utf-8")]
    assert [row["loss"] for row in rows if "loss" in row][-1] < 1 < summary["val_loss"]
