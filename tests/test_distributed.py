"""Several processes: the result of one, shares that are a partition, one log and one checkpoint, stops and errors.

One torchrun of two processes works through all runs of `RUNS`, since starting it takes longer than any of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import finetune_cls
import finetune_sft
import gpt
import rlhf
import train
from tokenizer import BPETokenizer

pytestmark = pytest.mark.slow  # each starts processes of its own: half a minute in all

ROOT = Path(__file__).resolve().parent.parent
# 11 windows in batches of 5: each epoch ends with a batch of one row, which leaves nothing to the second process.
TINY = ("--data text.txt --tokenizer char --emb_dim 16 --n_layers 2 --n_heads 2 --context_length 16 --batch_size 5 "
        "--sample_tokens 3 --learning_rate 1e-2 --warmup_steps 2 --max_steps 12 --eval_every 5 --drop_rate 0")
SFT = ("--data mine.json --init base.safetensors --template plain --batch_size 7 --max_new_tokens 4 --epochs 0 "
       "--max_steps 12 --eval_every 5 --learning_rate 1e-2 --warmup_steps 2 --drop_rate 0")
DROPOUT = TINY.replace("drop_rate 0", "drop_rate 0.2")
RUNS = {  # name: (script, flags, (process, look at Stop) where that process is told to stop, or a fault)
    "adamw": ("train", f"{TINY} --optimizer adamw", None),
    "muon": ("train", f"{TINY} --optimizer muon --accumulate 2", None),
    "sft": ("finetune_sft", f"{SFT} --accumulate 2", None),
    "lora": ("finetune_sft", f"{SFT} --lora_rank 2 --lora_dropout 0", None),
    "2to1": ("train", TINY, [1, 7]),  # stopped in two processes, goes on in one
    "1to2": ("train", TINY, None),  # was stopped in one, goes on here
    "dropout": ("train", DROPOUT, None),
    "dropout_stopped": ("train", DROPOUT, [0, 7]),
    "dropout_resumed": ("train", DROPOUT, None),
    "naive": ("train", TINY.replace("max_steps 12", "max_steps 2"), "naive"),
    "nan": ("train", f"{TINY} --save_every 2", "nan"),
}
DRIVER = """
import json, sys, time
sys.path[:0] = [ROOT, ROOT + "/tests"]
import test_distributed as tests
time.sleep = lambda seconds: None  # the wait of the second process before it ends with an error
for name, parts in tests.RUNS.items():
    out = "dropout_stopped" if name == "dropout_resumed" else name
    record = tests.run(name, f"two/{out}", parts[2])
    tests.train.barrier()
    with open(f"{name}.{tests.train.rank()}.json", "w") as file:
        json.dump(record, file)
"""


def run(name, out, fault=None):
    """Do one of RUNS in this process and return its status, its last step and weights, and the rows of each step."""
    script, flags, _ = RUNS[name]
    module, seen, seeds, held = {"train": train, "finetune_sft": finetune_sft}[script], [], [], {}
    real = {key: getattr(train, key) for key in ("open_run", "shard", "all_sum", "next_token_loss")}
    look = train.Stop.__bool__

    def open_run(config, model, optimizers, progress, *rest):
        held["model"], held["progress"] = model, progress
        return real["open_run"](config, model, optimizers, progress, *rest)

    def shard(items):
        share = real["shard"](items)
        if type(items) is list:  # of a batch; an evaluation shares a tensor
            seen.append([held["progress"].step, share])
            seeds.append(torch.initial_seed())
            held["shared"] = True  # the next sum is that of the batch's tokens
        return share

    def stop(self):
        held["looks"] = held.get("looks", 0) + 1
        if [train.rank(), held["looks"]] == fault:
            self.signal = signal.SIGTERM
        return look(self)

    def nan_here(logits, targets):
        broken = train.rank() == 1 and held["progress"].step == 7 and logits.requires_grad
        return real["next_token_loss"](logits, targets) * (float("nan") if broken else 1)

    def averaged(model):
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_run", open_run)
        patch.setattr(module, "shard", shard)
        patch.setattr(train.Stop, "__bool__", stop)
        if fault == "nan":
            patch.setattr(train, "next_token_loss", nan_here)
        if fault == "naive":  # what DistributedDataParallel makes of losses that each process divides by its own tokens
            patch.setattr(train, "sum_gradients", averaged)
            patch.setattr(train, "all_sum", lambda n: n if held.pop("shared", False) else real["all_sum"](n))
        torch.set_default_dtype(torch.float64)
        try:
            status = module.main(["train", *flags.split(), "--out_dir", out, "--resume"])
        finally:
            torch.set_default_dtype(torch.float32)
    flat = torch.cat([tensor.flatten().double() for tensor in train.trainable(held["model"]).values()])
    return {"status": status, "step": held["progress"].step, "weights": flat.tolist(), "seen": seen,
            "seeds": seeds}


def torchrun(*command, **options):
    """Start two processes with torchrun and return the Popen, whose stdout and stderr are pipes of text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def inputs():
    """Write a text of 11 training windows and a small model with 60 instructions into the current folder."""
    words = "the cat sat on the mat and the dog ran to the red barn while a bird sang. ".split(" ")
    Path("text.txt").write_text(" ".join(words[i * i % len(words)] for i in range(60))[:190], encoding="utf-8")
    entries = [{"instruction": f"Repeat {word}{n}.", "output": word * (1 + n % 3)} for n in range(20)
             for word in ("fox", "hen", "cat")]
    Path("mine.json").write_text(json.dumps(entries), encoding="utf-8")
    tokenizer = BPETokenizer.train([entry["instruction"] + entry["output"] for entry in entries], 280)
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 32, 16, 2, 2, 0.0))
    gpt.save_checkpoint("base.safetensors", model, tokenizer)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return (folder, {name: [what each of the two processes recorded]}, stderr) after doing RUNS in two processes."""
    folder, before = tmp_path_factory.mktemp("two"), os.getcwd()
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    inputs()
    assert run("1to2", "two/1to2", [0, 4])["status"] == 143
    Path("driver.py").write_text(DRIVER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    process = torchrun("driver.py")
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 0, err
    recorded = {name: [json.loads(Path(f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
                for name in RUNS}
    yield folder, recorded, err
    os.chdir(before)


def distance(first, second):
    """Return the largest difference between the last weights of two runs."""
    return max(abs(a - b) for a, b in zip(first["weights"], second["weights"], strict=True))


def logged(folder, key):
    """Return [(step, value)] of a run's log."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


@pytest.mark.parametrize("name", ["adamw", "muon", "sft", "lora"])
def test_two_processes_end_with_the_weights_and_losses_of_one(done, name):
    """In float64 within 1e-12 (weights) and 1e-9 (log): unequal and empty shares, micro-batches, Muon, adapters."""
    alone, two = run(name, f"one/{name}"), done[1][name]
    assert alone["status"] == 0 and [part["status"] for part in two] == [0, 0]
    assert distance(alone, two[0]) < 1e-12 and len(alone["weights"]) > 100
    for key in ("loss", "val_loss", "norm"):
        one, both = (logged(f"{count}/{name}", key) for count in ("one", "two"))
        assert len(one) > 0 and [step for step, _ in one] == [step for step, _ in both]
        assert [value for _, value in both] == pytest.approx([value for _, value in one], abs=1e-9)
    empty = [rows for _, rows in two[1]["seen"] if not rows]
    assert name in ("sft", "lora") or len(empty) == 4  # of 12 steps, the last one of each epoch of three


def test_shares_that_are_averaged_without_weights_differ(done):
    """The control of the test above: the mean of the processes' means over 3 and 2 rows is another gradient."""
    assert distance(run("naive", "one/naive"), done[1]["naive"][0]) > 1e-5


@pytest.mark.parametrize("name", [name for name in RUNS if name != "naive"])
def test_both_processes_hold_the_same_bits(done, name):
    """Nothing drifts apart: the weights at the end of both are equal, not only close."""
    first, second = done[1][name]
    assert first["weights"] == second["weights"] and len(first["weights"]) > 100


def test_every_example_is_seen_once_an_epoch(done):
    """The shares of both processes together are each epoch's windows, none twice, and halves as good as it goes."""
    first, second = (part["seen"] for part in done[1]["muon"])
    assert [step for step, _ in first] == [step for step, _ in second] == list(range(12))
    for epoch in range(4):
        rows = [row for step, share in first + second if step // 3 == epoch for row in share]
        assert sorted(rows) == list(range(11))
    assert all(len(a) - len(b) in (0, 1) for (_, a), (_, b) in zip(first, second))


def test_there_is_one_log_one_checkpoint_and_one_set_of_lines(done):
    """Each step is logged once, each run announced once, and the folder holds what a run of one process writes."""
    folder, _, err = done
    assert [step for step, _ in logged("two/adamw", "val_loss")] == [0, 5, 10, 12]
    assert err.count("pretrain: ") == sum(script == "train" for script, _, _ in RUNS.values())
    assert sorted(os.listdir("two/adamw")) == [".lock", "curves.svg", "metrics.jsonl", "model.safetensors",
                                               "samples.txt", "state.pt", "summary.json"]
    assert json.loads(Path("two/adamw/summary.json").read_text(encoding="utf-8"))["processes"] == 2


def test_a_run_goes_on_in_another_number_of_processes(done):
    """Stopped in two and resumed in one, and the other way, within 1e-12 of the run that was not stopped."""
    down, up = done[1]["2to1"], done[1]["1to2"]
    assert [part["status"] for part in down] == [143, 143]  # only the second one was told to stop
    assert [part["step"] for part in down] == [7, 7]
    ended, whole = run("2to1", "two/2to1"), run("2to1", "one/2to1")
    assert ended["status"] == 0 and ended["seen"][0][0] == 7 and distance(ended, whole) < 1e-12
    assert [part["status"] for part in up] == [0, 0] and up[0]["seen"][0][0] == 4
    assert distance(up[0], whole) < 1e-12


def test_a_resumed_run_of_two_with_dropout_ends_with_the_same_bits(done):
    """Each process draws other numbers than the other, and after a stop the same as without."""
    recorded = done[1]
    assert [part["status"] for part in recorded["dropout_stopped"]] == [143, 143]
    assert recorded["dropout_resumed"][0]["seen"][0][0] == 7
    assert recorded["dropout_resumed"][0]["weights"] == recorded["dropout"][0]["weights"]
    assert recorded["dropout"][0]["weights"] != recorded["adamw"][0]["weights"]
    seeds = recorded["dropout"][1]["seeds"]  # made anew for each step of the second process
    assert len(set(seeds)) == 12 and recorded["dropout_resumed"][1]["seeds"] == seeds[7:]
    assert not set(seeds) & set(recorded["dropout"][0]["seeds"])


def test_a_loss_that_is_not_finite_in_one_process_stops_both(done):
    """Nothing is updated anywhere, the last save stays, and the error is told once."""
    for part in done[1]["nan"]:
        assert part["status"] == 1 and part["step"] == 7
    assert train.read_state("two/nan/state.pt")["step"] == 6
    errors = [line for line in done[2].splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step 8: loss nan" in errors[0] and "two/nan keeps" in errors[0]


# --- mistakes


@pytest.mark.parametrize("script, command", [(finetune_cls, "train"), (rlhf, "dpo"), (train, "evaluate"),
                                             (finetune_sft, "respond")])
def test_what_runs_in_one_process_says_so(monkeypatch, capsys, script, command, tmp_path):
    """One line and status 2, before anything is read or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert script.main([command]) == 2
    assert capsys.readouterr().err == (f"error: {script.__name__}.py {command} runs in one process; start it without "
                                       "torchrun\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_to_torchrun_saves(tmp_path, monkeypatch):
    """SIGTERM stops both processes, saved at the same step, which is said once."""
    monkeypatch.chdir(tmp_path)
    inputs()
    flags = TINY.replace("max_steps 12", "max_steps 100000").split()
    process = torchrun(ROOT / "train.py", *flags, "--out_dir", "out")
    end = time.monotonic() + 60
    while not Path("out/model.safetensors").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    step = train.read_state("out/state.pt")["step"]
    assert step > 0 and err.count(f"stopped: out is saved at step {step} of") == 1


@pytest.mark.parametrize("rank, end", [(0, "os.kill(os.getpid(), signal.SIGKILL)"), (1, "time.sleep(600)")])
def test_a_killed_process_ends_the_run_and_the_state_is_good(tmp_path, monkeypatch, rank, end):
    """A process is killed, or hangs longer than torch waits, before a backward pass: the first one, if it is not the
    one, says what happened, torchrun ends within a minute, one process goes on."""
    monkeypatch.chdir(tmp_path)
    inputs()
    code = ("import datetime, functools, os, signal, sys, time; sys.path.insert(0, sys.argv.pop(1)); import train\n"
            "real, steps, dist = train.next_token_loss, [], train.dist\n"
            "dist.init_process_group = functools.partial(dist.init_process_group, timeout=datetime.timedelta(0, 5))\n"
            "def loss(logits, targets):\n"
            "    steps.append(1) if logits.requires_grad else None\n"
            f"    if train.rank() == {rank} and len(steps) == 21 and logits.requires_grad:\n"
            f"        signal.signal(signal.SIGTERM, signal.SIG_DFL)\n        {end}\n    return real(logits, targets)\n"
            "train.next_token_loss = loss\nsys.exit(train.main())")
    Path("killed.py").write_text(code, encoding="utf-8")
    flags = [*TINY.replace("max_steps 12", "max_steps 40").split(), "--save_every", "8", "--out_dir", "out"]
    process = torchrun("killed.py", ROOT, *flags)
    started = time.monotonic()
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and time.monotonic() - started < 60 + 30  # and 30 for starting on a busy machine
    assert rank == 0 or "error: another process of this run was lost" in err  # the other may be ended before it speaks
    assert "[rank0]: Traceback" not in err
    assert train.read_state("out/state.pt")["step"] == 16
    assert train.main([*flags, "--resume"]) == 0
