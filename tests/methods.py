"""One table of ten ways to learn from preferences, beside the start and best of 4: `make methods`.

    python tests/methods.py                 whatever is missing in out/methods, then the table and the drawing
    python tests/methods.py --out_dir /tmp/trial --results /tmp/trial.md --seeds 1 --steps 3 --test_prompts 8    a trial

Needs out/sft/model.safetensors. A cell is one method with one seed, a file in out/methods/cells; one that is there is
not run again, and a run that was cut off is resumed. Methods keep their command's own steps and are measured on the
same test prompts with the reward model of their seed. Their learning rate is the best of three, a third, once and three
times rlhf.RATES: highest in reward - 0.2 x KL on the validation prompts after 60 steps of a seed that the table does
not use. None looks at gold score or exact match. CPU seconds are without reward model and search.
"""

import argparse
import contextlib
import functools
import json
import math
import random
import sys
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpt  # noqa: E402  (first, because it filters torch's warning about numpy)
import rlhf  # noqa: E402
import torch  # noqa: E402

METHODS = {  # the command and what it differs in
    "SFT on chosen": ("dpo", "--loss", "sft"), "DPO": ("dpo",), "IPO": ("dpo", "--loss", "ipo"),
    "SimPO": ("dpo", "--loss", "simpo"), "ORPO": ("dpo", "--loss", "orpo"), "PPO": ("ppo",), "GRPO": ("grpo",),
    "Dr. GRPO": ("grpo", "--advantage", "group-mean"), "RLOO": ("grpo", "--advantage", "rloo"), "PPO, coin": ("ppo",)}
CONTROL = "PPO, coin"  # its reward model and its ptx loss see preferences that a coin decided
COLUMNS = {"gold": "gold score", "reward": "reward", "kl": "KL, nats", "exact": "exact match", "length": "tokens",
           "wins": "win rate", "seconds": "CPU seconds"}
TRIAL_STEPS, TRIAL_SEED, KL_COEF = 60, 99, 0.2
COLORS = "#6b7280 #c026d3 #92400e #2563eb #0891b2 #059669 #65a30d #dc2626 #d97706 #f472b6 #7c3aed #a8a29e".split()
Args = namedtuple("Args", "out_dir init data results figure seeds steps test_prompts response_length", defaults=(
    "out/methods", "out/sft/model.safetensors", "tinyworld", f"{ROOT}/assets/results.md", f"{ROOT}/assets/methods.svg",
    3, 0, 500, 40))


def run(args, word, name, seed, *flags, steps=0):
    """Run a command of rlhf.py in the folder `name`, or go on with it, and return its CPU seconds."""
    folder, ends = Path(args.out_dir, name), [n for n in (steps, args.steps) if n]
    argv = [word, "--init", args.init, "--out_dir", folder, "--seed", seed, "--response_length", args.response_length,
            *(["--max_steps", min(ends)] if ends else []), "--resume", *flags]
    argv += ["--eval_prompts", min(200, args.test_prompts)] if word != "dpo" else []
    argv += ["--test_prompts", 1] if word != "reward" else []  # they are measured here
    with open(f"{folder}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        status = rlhf.main(list(map(str, argv)))
    if status:
        raise SystemExit(f"rlhf.py {word} ended with status {status}, see {folder}.log")
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["cpu_seconds"]


def reward_of(args, seed, coin=False):
    """Return (data, reward model) of a seed, made if need be; `coin` lets a coin decide what was preferred."""
    data, name = args.data, f"{'coin' if coin else 'reward'}-{seed}"
    if coin:
        data, rng = Path(args.out_dir, f"coin-{seed}.json"), random.Random(seed)
        pairs = rlhf.load_pairs(rlhf.Config(data=args.data))[0]
        for pair in pairs:
            pair["chosen"], pair["rejected"] = rng.sample((pair["chosen"], pair["rejected"]), 2)
        data.write_text(json.dumps(pairs), encoding="utf-8")
    run(args, "reward", name, seed, "--data", data)
    return data, Path(args.out_dir, name, "model.safetensors")


@functools.cache
def setting(args, seed):
    """Return (start, its Measure, validation and test prompts, data, reward model) for a seed."""
    data, reward = reward_of(args, seed)
    config = rlhf.Config(init=args.init, data=data, seed=seed, response_length=args.response_length, reward=str(reward))
    model, tokenizer, template, parts = rlhf.open_start(config, answers=False)
    measure = rlhf.Measure(rlhf.reference_of(model), rlhf.load_reward(config, model.device), tokenizer, config)
    validation, test = (rlhf.encode_prompts(part, tokenizer, template, model, config) for part in parts[1:])
    return model, measure, validation[: min(200, args.test_prompts)], test[: args.test_prompts], data, reward


def best_of(model, prompts, measure, n=4):
    """Return what `rlhf.assess` finds, of the best of n responses by reward; its KL is ln n - (n - 1) / n at most."""
    rollout, texts = rlhf.sample_responses(model, [row.prompt for row in prompts], measure.tokenizer, measure.config, n,
                                           torch.Generator(model.device).manual_seed(measure.config.seed))
    scores = rlhf.call_reward(measure.reward, [row.text["prompt"] for row in prompts for _ in range(n)], texts)
    best, pairs = scores.view(-1, n).argmax(1) + n * torch.arange(len(prompts)), [row.text for row in prompts]
    texts = [texts[i] for i in best]
    return {"reward": scores[best], "length": rollout.response_mask.sum(1).cpu()[best],
            "kl": torch.full((len(prompts),), math.log(n) - (n - 1) / n),
            "gold": rlhf.rubric(rlhf.gold, pairs, texts), "exact": rlhf.rubric(rlhf.right, pairs, texts)}


def trial(args, method, factor):
    """Return a rate, and reward - KL_COEF x KL on the validation prompts after a short run with it."""
    _, measure, prompts, _, data, reward = setting(args, TRIAL_SEED)
    word, *flags = METHODS[method]
    rate, name = rlhf.RATES[word][rlhf.is_large(args.init)] * factor, f"trial-{method}-{factor:.2g}"
    flags += ["--data", data, "--reward", reward, "--learning_rate", rate]
    run(args, word, name, TRIAL_SEED, *flags, steps=TRIAL_STEPS)
    found = rlhf.assess(gpt.load_checkpoint(f"{args.out_dir}/{name}/model.safetensors")[0], prompts, measure)
    return {"rate": rate, "value": (found["reward"] - KL_COEF * found["kl"]).mean().item()}


def rate_of(args, method):
    """Return a method's learning rate, the best of three trials."""
    tried = [cell(args, f"rate-{method}-{factor:.2g}", trial, method, factor) for factor in (1 / 3, 1, 3)]
    return max(tried, key=lambda one: one["value"])["rate"]


def measured(args, method, seed):
    """Return a cell of the table: the means of what a method reaches on test prompts, and its seconds."""
    model, measure, _, prompts, data, reward = setting(args, seed)
    start = found = rlhf.assess(model, prompts, measure)
    seconds, clock = 0.0, time.process_time()
    if method == "best of 4":
        found = best_of(model, prompts, measure)
        seconds = time.process_time() - clock
    elif method != "start":
        if method == CONTROL:
            data, reward = reward_of(args, seed, coin=True)
        word, *flags = METHODS[method]
        rate, name = rate_of(args, "PPO" if method == CONTROL else method), f"{method}-{seed}"
        flags += ["--data", data, "--reward", reward, "--learning_rate", rate]
        seconds = run(args, word, name, seed, *flags)
        found = rlhf.assess(gpt.load_checkpoint(f"{args.out_dir}/{name}/model.safetensors")[0], prompts, measure)
    by = "reward" if start["gold"] is None else "gold"
    found["wins"] = rlhf.correct(found[by] - start[by])
    return {key: found[key].mean().item() for key in COLUMNS if found.get(key) is not None} | {"seconds": seconds}


def cell(args, name, function, *arguments):
    """Return the values of a cell, from its file or by function(args, *arguments)."""
    path = Path(args.out_dir, "cells", f"{name}.json")
    if not path.exists():
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr)
        gpt.write_json(path, function(args, *arguments))
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows):
    """Return the Markdown table of {method: [cell of a seed, ...]}: mean, and lowest to highest."""
    columns = [key for key in COLUMNS if key in rows["start"][0]]
    lines = [f"| method | {' | '.join(map(COLUMNS.get, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for method, cells in rows.items():
        texts = []
        for key in columns:
            values, form = [one[key] for one in cells], ".0f" if key == "seconds" else ".2f"
            mean, low, high = (f"{x:{form}}" for x in (sum(values) / len(values), min(values), max(values)))
            texts.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(rows, path):
    """Draw gold score (else reward) against KL into an SVG: a small dot for each seed, a large one for their mean."""
    by = "gold" if "gold" in rows["start"][0] else "reward"
    points = [(one["kl"], one[by]) for cells in rows.values() for one in cells]
    right, low, high = max(x for x, _ in points) or 1, min(y for _, y in points), max(y for _, y in points)
    place = lambda x, y: (60 + 420 * x / right, 320 - 280 * (y - low) / (high - low or 1))  # noqa: E731
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" role="img"><style>text{font:12px system-ui,'
           'sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style><text x="60" y="20" '
           f'font-weight="bold">{COLUMNS[by]} against KL to the start</text><text x="230" y="360">KL, nats</text>']
    for part in range(5):
        x, y = place(right * part / 4, low + (high - low) * part / 4)
        out.append(f'<line stroke="#8884" x1="60" x2="480" y1="{y:.0f}" y2="{y:.0f}"/><text x="52" y="{y + 4:.0f}" '
                   f'text-anchor="end">{low + (high - low) * part / 4:.2f}</text><text x="{x:.0f}" y="340" '
                   f'text-anchor="middle">{right * part / 4:.1f}</text>')
    for number, (method, cells) in enumerate(rows.items()):
        color = COLORS[number % len(COLORS)]
        means = [sum(one[key] for one in cells) / len(cells) for key in ("kl", by)]
        dots = [(2.5, place(one["kl"], one[by])) for one in cells] + [(6, place(*means)), (6, (505, 46 + 22 * number))]
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{color}" stroke="#fff"/>' for size, (x, y) in dots]
        out.append(f'<text x="518" y="{50 + 22 * number}">{method}</text>')
    Path(path).write_text("\n".join([*out, "</svg>\n"]), encoding="utf-8")


def main(argv=None):
    """Fill the missing cells, then write the table between its markers and the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Args()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default %(default)s")
    args = Args(**vars(parser.parse_args(argv)))
    Path(args.out_dir, "cells").mkdir(parents=True, exist_ok=True)
    rows = {method: [cell(args, f"{method}-{seed}", measured, method, seed) for seed in range(1, args.seeds + 1)]
            for method in ("start", "best of 4", *METHODS)}
    rates = ", ".join(f"{method} {rate_of(args, method):.2g}" for method in METHODS if method != CONTROL)
    text = f"{table(rows)}\n\nMean (lowest to highest) of {args.seeds} seeds. Learning rates: {rates}."
    path, (begin, end) = Path(args.results), ("<!-- methods -->", "<!-- /methods -->")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, _, rest = (old if begin in old else f"{old.rstrip()}\n\n{begin}{end}\n".lstrip()).partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    draw(rows, args.figure)
    print(text)


if __name__ == "__main__":
    main()
