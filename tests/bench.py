"""Benchmarks against other libraries, by hand and never as tests: python tests/bench.py lora

`lora`: a training step of a 124M model (random weights, 1 x 256 tokens, float32, no dropout), all weights against
rank-8 adapters of lora.py, of PEFT on the same model, and of PEFT on transformers' GPT-2. Memory is measured with a
process for each side; for time the sides take turns in one process, and a figure is the median over rounds of the ratio
within a round. Sides whose packages (requirements-peers.txt) are absent are named and left out. 4 minutes on 2 cores.
"""

import dataclasses
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpt  # first, because it quiets torch's warning about numpy
import torch
import torch.nn.functional as F
from lora import apply_lora

SIDES = {"full": (), "lora": (), "peft": ("peft",), "peft_hf": ("peft", "transformers")}  # and the packages they need
LINEAR = {"peft": ["qkv", "out_proj", "fc1", "fc2"], "peft_hf": ["c_attn", "c_proj", "c_fc"]}


def machine(size=1024, tries=20):
    """Return GFLOP/s of a matrix product of this size, the median of some tries: the machine's own rate."""
    a, rates = torch.randn(size, size), []
    for _ in range(tries):
        started = time.perf_counter()
        a @ a
        rates.append(2 * size**3 / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)


def make_step(side):
    """Return (step, trained parameters, optimizer) of one side; step() trains once and returns the loss."""
    torch.manual_seed(0)
    if side == "peft_hf":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    else:
        model = gpt.GPTModel(dataclasses.replace(gpt.GPT_CONFIGS["gpt2"], drop_rate=0.0))
    if side == "lora":
        apply_lora(model, rank=8, alpha=32)
    elif side in LINEAR:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=LINEAR[side],
                                                 fan_in_fan_out=side == "peft_hf"))
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, 50257, (1, 257), generator=torch.Generator().manual_seed(1))

    def step():
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids[0, 1:])
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, trained, optimizer


def measure_memory(side):
    """Print, as JSON, the bytes of gradients and optimizer state and the peak of this process, after four steps."""
    step, trained, optimizer = make_step(side)
    losses = [step() for _ in range(4)]
    tensors = [p.grad for p in trained] + [t for state in optimizer.state.values() for t in state.values()]
    print(json.dumps({"losses": losses, "numbers": sum(p.numel() for p in trained),
                      "state": sum(t.numel() * t.element_size() for t in tensors),
                      "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def lora(rounds=7):
    """Print memory and time of every side whose packages are here."""
    here = [side for side, needs in SIDES.items() if all(map(importlib.util.find_spec, needs))]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, matrix product {machine():.0f} GFLOP/s")
    for side in SIDES.keys() - set(here):
        print(f"{side}: not measured, needs {', '.join(SIDES[side])}")
    for side in here:
        out = subprocess.run([sys.executable, __file__, "memory", side], capture_output=True, text=True, check=True)
        found = json.loads(out.stdout)
        full = found if side == "full" else full
        print(f"{side:<8} trains {found['numbers']:>11,}  gradients and state {found['state'] / 1e6:7.1f} MB "
              f"({found['state'] / full['state']:.1%})  peak {found['peak'] / 1e6:5.0f} MB "
              f"({found['peak'] / full['peak']:.0%})")
    steps, seconds = {side: make_step(side)[0] for side in here}, {side: [] for side in here}
    for number in range(rounds + 1):  # the first round warms up
        for side in here[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            steps[side]()
            seconds[side].append(time.perf_counter() - started)
    for side in here:
        ratios = (f"{statistics.median(a / b for a, b in zip(seconds[side][1:], seconds[other][1:])):.3f} of {other}"
                  for other in here if other != side)
        print(f"{side:<8} {statistics.median(seconds[side][1:]):.3f} s a step: {', '.join(ratios)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        measure_memory(sys.argv[2])
    elif sys.argv[1:] == ["lora"]:
        lora()
    else:
        sys.exit(__doc__)
