"""Count the functions of ours that a reader meets on two walks: python tests/walk.py [folder of another edition]

From a text file to the first training loss, and one PPO step from its batch to the next. Each is counted once, by
sys.setprofile, in a process of its own; lambdas and comprehensions do not count."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent).resolve()
SIZES = "--emb_dim 16 --n_layers 1 --n_heads 2 --context_length 32 --max_steps 1 --batch_size 4 --warmup_steps 0".split()
PPO = "ppo --data pairs.json --init base.safetensors --reward rewards:length --max_steps 2 --batch_size 4".split()
PPO += "--response_length 4 --eval_prompts 2 --test_prompts 2 --warmup_steps 0 --eval_every 0 --save_every 0".split()


def walk(name):
    """Print {file: [function, ...]} of one walk, made in the current folder."""
    sys.path.insert(0, str(ROOT))
    sys.path.append(os.getcwd())
    import gpt
    import torch
    from tokenizer import CharTokenizer
    found, first, last = {}, *{"text": ("train", "next_token_loss"), "ppo": ("batches", "batches")}[name]
    met = []

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_name == (last if met else first):
            met.append(code.co_name)
        inside = len(met) == 1
        if event == "call" and inside and Path(code.co_filename).parent == ROOT and code.co_name[0] != "<":
            found.setdefault(Path(code.co_filename).name, set()).add(f"{code.co_name}:{code.co_firstlineno}")

    tokenizer = CharTokenizer.train(["".join(map(chr, range(32, 127)))], specials=True)
    tokenizer.save("chars.json")
    gpt.save_checkpoint("base.safetensors", gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 64, 16, 2, 1)), tokenizer)
    Path("text.txt").write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    Path("rewards.py").write_text("def length(prompts, responses):\n    return [float(hash(r) % 9) for r in responses]\n")
    pairs = [{"prompt": f"say {n}", "chosen": f"{n} yes", "rejected": f"no {n}"} for n in range(60)]
    Path("pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):
        if name == "text":
            import train as script
            torch.Tensor.backward = lambda *args, **named: sys.setprofile(None)
            argv = ["train", "--data", "text.txt", "--tokenizer", "chars.json", "--sample_tokens", "0", *SIZES]
        else:
            import rlhf as script
            argv = PPO
        sys.setprofile(profile)
        status = script.main(argv)
        sys.setprofile(None)
    assert status == 0 or name == "text"  # which ends without a gradient
    print(json.dumps({file: sorted(names) for file, names in found.items()}))


if len(sys.argv) > 2:
    walk(sys.argv[2])
else:
    for name in ("text", "ppo"):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, __file__, ROOT, name], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = json.loads(done.stdout)
        print(name, sum(map(len, files.values())), {file: len(names) for file, names in files.items()})
