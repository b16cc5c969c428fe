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
SFT = ("--data mine.json --init base.safetensors --template plain --batch_size 7 --max_new_tokens 4 --max_steps 12 "
       "--eval_every 5 --learning_rate 1e-2 --warmup_steps 2 --drop_rate 0")
RUNS = {  # name: (script, flags, (process, step) where that process is told to stop, or a fault)
    "adamw": ("train", f"{TINY} --optimizer adamw", None),
    "muon": ("train", f"{TINY} --optimizer muon --accumulate 2", None),
    "sft": ("finetune_sft", f"{SFT} --accumulate 2", None),
    "lora": ("finetune_sft", f"{SFT} --lora_rank 2 --lora_dropout 0", None),
    "float32": ("train", TINY, None),
    "2to1": ("train", TINY, [1, 7]),  # stopped in two processes, goes on in one
    "1to2": ("train", TINY, None),  # was stopped in one, goes on here
    "dropout": ("train", TINY.replace("drop_rate 0", "drop_rate 0.2"), None),
    "dropout_stopped": ("train", TINY.replace("drop_rate 0", "drop_rate 0.2"), [0, 7]),
    "dropout_resumed": ("train", TINY.replace("drop_rate 0", "drop_rate 0.2"), None),
    "naive": ("train", TINY.replace("max_steps 12", "max_steps 2"), "naive"),
    "nan": ("train", f"{TINY} --save_every 2", "nan"),
    "fsdp": ("train", f"{TINY} --optimizer adamw --accumulate 2 --clip 0.5 --fsdp", None),
    "fsdp_float32": ("train", f"{TINY} --optimizer adamw --fsdp", None),
    "fsdp_to_1": ("train", f"{TINY} --optimizer adamw --fsdp", [1, 7]),
    "1_to_fsdp": ("train", f"{TINY} --optimizer adamw --fsdp", None),
    "fsdp_nan": ("train", f"{TINY} --optimizer adamw --save_every 2 --fsdp", "nan"),
}
DRIVER = """
import json, sys, time
sys.path.insert(0, ROOT)
import gpt
import torch
import finetune_sft, train
real = train.together, train.sum_gradients, train.Run.report, train.Run.batches, train.next_token_loss, train.Run.close

def run(name, script, flags, fault):
    def report(run, *figures):
        real[2](run, *figures)
        if [train.process(), run.step] == fault:
            run.on_signal(15, None)
    def batches(run, order, size):
        for batch in real[3](run, order, size):
            seen.append([run.step, batch.tolist()])
            yield batch
    def close(run):
        parameters = list(run.model.parameters())
        moments = [t for o in run.optimizers for values in o.state.values() for t in values.values() if t.dim()]
        for tensors in (parameters, [p.grad for p in parameters if p.grad is not None], moments):
            shards.append(sum(getattr(t, "to_local", lambda: t)().numel() for t in tensors))
        flat = torch.cat([train.whole(t).flatten() for t in train.trainable_state(run.model).values()])
        weights.extend([run.step, *flat.tolist()])
        real[5](run)
    def nan_here(logits, targets):
        broken = train.process() == 1 and train.Run.current.step == 7 and logits.requires_grad
        return real[4](logits, targets) * (float("nan") if broken else 1)
    def mean(model):
        real[1](model)
        for p in model.parameters():
            p.grad /= 2
    seen, weights, shards = [], [], []
    train.together, train.sum_gradients, train.next_token_loss = real[0], real[1], real[4]
    train.Run.report, train.Run.batches, train.Run.close = report, batches, close
    if fault == "nan":
        train.next_token_loss = nan_here
    if fault == "naive":  # what DistributedDataParallel makes of losses that each process divides by its own tokens
        train.together, train.sum_gradients = lambda value, op="sum": real[0](value, op) if op == "max" else value, mean
    torch.set_default_dtype(torch.float32 if "float32" in name else torch.float64)
    out = "dropout_stopped" if name == "dropout_resumed" else name
    argv = ["train", *flags.split(), "--out_dir", "two/" + out, "--resume"]
    status = {"train": train, "finetune_sft": finetune_sft}[script].main(argv)
    train.wait()
    with open(f"{name}.{train.os.environ['RANK']}.json", "w") as file:
        json.dump({"status": status, "seen": seen, "weights": weights, "shards": shards}, file)

train.leave = train.wait  # the processes are joined once, for all runs
time.sleep = lambda seconds: None  # the wait of the second process before it tells of an error
for name, parts in json.load(open("runs.json")).items():
    run(name, *parts)
"""


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
    asked = [{"instruction": f"Repeat {word}{n}.", "output": word * (1 + n % 3)} for n in range(20)
             for word in ("fox", "hen", "cat")]
    Path("mine.json").write_text(json.dumps(asked), encoding="utf-8")
    tokenizer = BPETokenizer.train([entry["instruction"] + entry["output"] for entry in asked], 280)
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 32, 16, 2, 2, 0.0))
    gpt.save_checkpoint("base.safetensors", model, tokenizer)


def alone(name, out=None, stop_at=None):
    """Do one of RUNS in this process and return (status, its last weights, one long vector)."""
    script, flags, _ = RUNS[name]
    weights, real_close, real_report = [], train.Run.close, train.Run.report

    def close(run):
        weights.extend(t.flatten() for t in train.trainable_state(run.model).values())
        real_close(run)

    def report(run, *figures):
        real_report(run, *figures)
        if run.step == stop_at:
            run.on_signal(signal.SIGTERM, None)

    torch.set_default_dtype(torch.float32 if "float32" in name else torch.float64)
    train.Run.close, train.Run.report = close, report
    try:
        argv = ["train", *flags.replace("--fsdp", "").split(), "--out_dir", out or f"one/{name}", "--resume"]
        status = {"train": train, "finetune_sft": finetune_sft}[script].main(argv)
    finally:
        torch.set_default_dtype(torch.float32)
        train.Run.close, train.Run.report = real_close, real_report
    return status, torch.cat(weights).double()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return (folder, {name: [what each of the two processes recorded]}, stderr) after doing RUNS in two processes."""
    folder, before = tmp_path_factory.mktemp("two"), os.getcwd()
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    inputs()
    for name in ("1to2", "1_to_fsdp"):
        assert alone(name, f"two/{name}", stop_at=4)[0] == 143
    Path("runs.json").write_text(json.dumps(RUNS), encoding="utf-8")
    Path("driver.py").write_text(DRIVER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    process = torchrun("driver.py")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    recorded = {name: [json.loads(Path(f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
                for name in RUNS}
    yield folder, recorded, err
    os.chdir(before)


def weights(recorded, rank=0):
    """Return a process's last weights, one long vector."""
    return torch.tensor(recorded[rank]["weights"][1:], dtype=torch.float64)


def logged(folder, key):
    """Return [(step, value)] of a run's log."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


@pytest.mark.parametrize("name", ["adamw", "muon", "sft", "lora", "fsdp"])
def test_two_processes_end_with_the_weights_and_losses_of_one(done, name):
    """In float64 within 1e-9, with unequal and empty shares, accumulation, both optimizers, adapters, shards."""
    status, expected = alone(name)
    assert status == 0 and [part["status"] for part in done[1][name]] == [0, 0]
    assert (weights(done[1][name]) - expected).abs().max() < 1e-9
    for key in ("loss", "val_loss", "norm"):
        one, two = (logged(f"{count}/{name}", key) for count in ("one", "two"))
        assert len(one) > 0 and [step for step, _ in one] == [step for step, _ in two]
        assert [value for _, value in two] == pytest.approx([value for _, value in one], abs=1e-9)
    empty = [rows for _, rows in done[1][name][1]["seen"] if not rows]
    assert name in ("sft", "lora") or len(empty) == 4  # of 12 steps, the last one of each epoch of three


def test_shares_that_are_averaged_as_they_are_differ(done):
    """The control of the test above: the mean of the processes' means over 3 and 2 rows is another gradient."""
    assert (weights(done[1]["naive"]) - alone("naive")[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["float32", "fsdp_float32"])
def test_in_float32_the_loss_is_that_of_one_process(done, name):
    """Within 1e-5 at every logged step."""
    alone(name)
    for key in ("loss", "val_loss"):
        one, two = (logged(f"{count}/{name}", key) for count in ("one", "two"))
        assert [value for _, value in two] == pytest.approx([value for _, value in one], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "naive" and "fsdp" not in name])
def test_both_processes_hold_the_same_bits(done, name):
    """Nothing drifts apart: the weights at the end of both are equal, not only close. (Sharded, there is one copy.)"""
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


@pytest.mark.parametrize("down, up", [("2to1", "1to2"), ("fsdp_to_1", "1_to_fsdp")])
def test_a_run_goes_on_in_another_number_of_processes(done, down, up):
    """Stopped in two and resumed in one, and the other way, within 1e-9 of the run that was not stopped."""
    recorded = done[1]
    assert [part["status"] for part in recorded[down]] == [143, 143]  # only the second one was told to stop
    assert [part["weights"][0] for part in recorded[down]] == [7, 7]
    status, ended = alone(down, f"two/{down}")
    whole = alone(down)[1]
    assert status == 0 and (ended - whole).abs().max() < 1e-9
    assert [part["status"] for part in recorded[up]] == [0, 0] and recorded[up][0]["seen"][0][0] == 4
    assert (weights(recorded[up]) - whole).abs().max() < 1e-9


def test_a_sharded_model_is_held_in_shares_and_written_whole(done):
    """Each process holds about half of the parameters, of the gradients and of AdamW's two moments; the files are those
    of a run in one process."""
    recorded, size = done[1], len(done[1]["fsdp"][0]["weights"]) - 1
    for name, share in (("fsdp", size / 2), ("adamw", size)):
        for part in recorded[name]:
            assert part["shards"] == pytest.approx([share, share, 2 * share], rel=0.05)
    alone("fsdp_float32", "one/sizes")
    for name in ("model.safetensors", "state.pt"):
        one, two = (tensors_of(f"{folder}/{name}") for folder in ("one/sizes", "two/fsdp_float32"))
        assert {k: (t.shape, t.dtype) for k, t in one.items()} == {k: (t.shape, t.dtype) for k, t in two.items()}


def tensors_of(path):
    """Return all tensors in a checkpoint or state, by the names that lead there."""
    if path.endswith("safetensors"):
        return gpt.read_safetensors(path)[0]
    state = train.read_state(path)
    moments = [values for optimizer in state["optimizers"] for values in optimizer["state"].values()]
    return {**state["model"], **{f"{n}.{key}": t for n, values in enumerate(moments) for key, t in values.items()}}


def test_a_resumed_run_of_two_with_dropout_ends_with_the_same_bits(done):
    """Each process draws other numbers than the other, and after a stop the same as without."""
    recorded = done[1]
    assert [part["status"] for part in recorded["dropout_stopped"]] == [143, 143]
    assert recorded["dropout_resumed"][0]["seen"][0][0] == 7
    assert recorded["dropout_resumed"][0]["weights"] == recorded["dropout"][0]["weights"]
    assert recorded["dropout"][0]["weights"] != recorded["adamw"][0]["weights"]


@pytest.mark.parametrize("name", ["nan", "fsdp_nan"])
def test_a_loss_that_is_not_finite_in_one_process_stops_both(done, name):
    """Nothing is updated anywhere, and the last save stays."""
    for part in done[1][name]:
        assert part["status"] == 1 and part["weights"][0] == 7
    assert train.read_state(f"two/{name}/state.pt")["step"] == 6
    assert any("step 8: loss nan" in line and f"two/{name} keeps" in line for line in done[2].splitlines())


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


@pytest.mark.parametrize("processes, flags, words", [
    (1, "--optimizer adamw", ("shares a model among processes", "torchrun", "leave it out")),
    (2, "", ("--optimizer muon", "give --optimizer adamw")), (2, "--optimizer adamw --compile", ("--compile",))])
def test_sharding_that_cannot_be_is_refused(monkeypatch, capsys, processes, flags, words):
    """One line and status 2, which names the flag to change."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert train.main(["--fsdp", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: --fsdp ") and all(word in err for word in words)
    assert finetune_sft.main(["--fsdp"]) == 2 and "--fsdp" in capsys.readouterr().err


@pytest.mark.parametrize("device, gpus, words", [
    ("auto", 1, ("--nproc_per_node=2", "1 GPU;", "--device cpu")), ("cuda", 1, ("--nproc_per_node=2", "1 GPU;")),
    ("cuda:1", 4, ("--device cuda:1 is one for 2 processes; give --device cuda",)),
    ("mps", 0, ("--device mps is one for 2 processes; give --device cpu",))])
def test_more_processes_than_devices_are_refused(monkeypatch, capsys, device, gpus, words):
    """One line and status 2, with the number and a way out."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert train.main(["--device", device]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)


@pytest.mark.slow
def test_an_error_is_told_once_and_a_signal_saves(tmp_path, monkeypatch):
    """Through torchrun itself: SIGTERM stops both processes saved, a second run there is refused in one line."""
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
    process = torchrun(ROOT / "train.py", *flags, "--out_dir", "out")
    assert [line for line in process.communicate(timeout=120)[1].splitlines() if line.startswith("error:")] == [
        "error: out holds a run: --resume continues it, --fresh moves it aside"]


@pytest.mark.slow
@pytest.mark.parametrize("rank, end, flags", [
    (1, "os.kill(os.getpid(), signal.SIGKILL)", ""), (1, "time.sleep(600)", ""),
    (1, "os.kill(os.getpid(), signal.SIGKILL)", "--optimizer adamw --fsdp"),
    (0, "os.kill(os.getpid(), signal.SIGKILL)", "")])
def test_a_killed_process_ends_the_run_and_the_state_is_good(tmp_path, monkeypatch, rank, end, flags):
    """A process is killed, or hangs longer than the guard, before a backward pass: the first one, if it is not the one,
    says what happened, torchrun ends within a minute, one process goes on."""
    monkeypatch.chdir(tmp_path)
    inputs()
    code = ("import os, signal, sys, time; sys.path.insert(0, sys.argv.pop(1)); import train\n"
            "real, train.GUARD = train.next_token_loss, 3\ndef loss(logits, targets):\n"
            f"    if train.process() == {rank} and logits.requires_grad and train.Run.current.step == 20:\n"
            f"        signal.signal(signal.SIGTERM, signal.SIG_DFL)\n        {end}\n    return real(logits, targets)\n"
            "train.next_token_loss = loss\nsys.exit(train.main())")
    Path("killed.py").write_text(code, encoding="utf-8")
    flags = [*TINY.replace("max_steps 12", "max_steps 40").split(), *flags.split(), "--save_every", "8", "--out_dir",
             "out"]
    process = torchrun("killed.py", ROOT, *flags)
    started = time.monotonic()
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and time.monotonic() - started < 60 + 30  # and 30 for starting on a busy machine
    assert rank == 0 or "error: another process of this run ended" in err  # the other may be ended before it speaks
    assert "[rank0]: Traceback" not in err
    assert train.read_state("out/state.pt")["step"] == 16
    assert train.main([*(flag for flag in flags if flag != "--fsdp"), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["read_state", "Run.check_weights"])
def test_a_process_that_reads_the_state_longer_than_the_guard_is_waited_for(tmp_path, monkeypatch, slow):
    """Resuming a large run: the first process has the state before the other, which takes 8 s; the guard is 4 s."""
    monkeypatch.chdir(tmp_path)
    inputs()
    flags = [*TINY.split(), "--schedule", "constant", "--out_dir", "out", "--resume"]
    assert train.main([*flags, "--max_steps", "4"]) == 0
    code = ("import sys, time; sys.path.insert(0, sys.argv.pop(1)); import train\n"
            f"real, train.GUARD = train.{slow}, 4\ndef slowly(*args):\n"
            f"    time.sleep(8 * train.process())\n    return real(*args)\ntrain.{slow} = slowly\n"
            "sys.exit(train.main())")
    Path("slow.py").write_text(code, encoding="utf-8")
    process = torchrun("slow.py", ROOT, *flags, "--max_steps", "6")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert "resumed at step 4" in err and train.read_state("out/state.pt")["step"] == 6
