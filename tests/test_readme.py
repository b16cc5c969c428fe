"""The README, the help texts and the Makefile: whatever they tell a person to type is there and is legal."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt
import train
from tokenizer import BPETokenizer
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
NINE = sorted(path.name for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROSE, FENCED = ("\n".join(README.split("```")[odd::2]) for odd in (0, 1))
QUOTED = FENCED.splitlines() + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
END = {"|", ">", ">>", "&&", ";"}


def words(line):
    """Return [[word, ...], ...]: the commands of a line of shell without its comment; a pipe or the like ends one."""
    lexer, commands = shlex.shlex(line, posix=True, punctuation_chars=True), [[]]
    lexer.whitespace_split = True
    for word in lexer:
        commands[-1].append(word) if word not in END else commands.append([])
    return commands


def found(lines, starts):
    """Return the commands in lines of shell that begin with a word in `starts`, variables in front of it left out."""
    some = [command for line in lines if re.search(rf"\b({'|'.join(starts)}) ", line) for command in words(line)]
    some = [[word for n, word in enumerate(one) if n or "=" not in word] for one in some]
    return [one for one in some if one and one[0] in starts]


def commands_of(lines):
    """Return [(script, arguments)] of the calls of one of the nine, and check those of torchrun itself."""
    calls = [(one[1], one[2:]) for one in found(lines, ["python"]) if one[1:] and one[1].endswith(".py")]
    for one in found(lines, ["torchrun"]):
        started = get_args_parser().parse_args(one[1:])
        calls.append((started.training_script, started.training_script_args))
    return calls


def in_docstring(name):
    """Return the lines of a file's docstring that begin with a command, without the words beside it."""
    lines = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))).splitlines()
    return [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.match(r"\s*(python \w+\.py|torchrun)", line)]


@pytest.fixture
def parse(monkeypatch):
    """Return a function that lets a script read its command line and do nothing; its value is the exit status."""
    monkeypatch.setattr(train, "launch", lambda *_: None)  # no processes are started and none are missed
    for name in NINE:
        module = importlib.import_module(name[:-3])
        if not hasattr(module, "run_script"):
            run = module.run
            empty = lambda commands: {key: (idle(call), flags) for key, (call, flags) in commands.items()}  # noqa: E731
            monkeypatch.setattr(module, "run", lambda doc, commands, argv, run=run: run(doc, empty(commands), argv))
        else:
            def check(doc, Config, commands, *rest, run=module.run_script, **more):
                return run(doc, Config, {key: idle(call) for key, call in commands.items()}, *rest, **more)

            monkeypatch.setattr(module, "run_script", check)
    return lambda script, arguments: importlib.import_module(script[:-3]).main(arguments)


def idle(call):
    """Return a function that does nothing in the place of a command, with its docstring, which is its help."""
    nothing = lambda args: None  # noqa: E731
    nothing.__doc__ = getattr(call, "__doc__", "")
    return nothing


def refused(parse, calls):
    """Return the commands that a script refuses to read; the flags that `lora.py compare` hands on are read too."""
    wrong = []
    for script, arguments in calls:
        if script == "lora.py" and (arguments or ["compare"])[0][:2] in ("--", "co"):
            task = "sft" if "sft" in arguments else "cls"
            flags = [word.partition("=") for word in arguments if re.match("--(lora_)?flags=", word)]
            if any(parse(f"finetune_{task}.py", shlex.split(handed)) for _, _, handed in flags):
                wrong.append((script, arguments))
        if script not in NINE or parse(script, arguments):
            wrong.append((script, arguments))
    return wrong


def test_every_command_of_the_readme_can_be_typed(parse):
    """The words, flags and values of every `python FILE.py ...` and `torchrun ... FILE.py` are legal for that file."""
    calls = commands_of(QUOTED)
    assert {script for script, _ in calls} == set(NINE) and len(calls) > 40
    assert refused(parse, calls) == []


@pytest.mark.parametrize("name", NINE)
def test_every_command_of_a_help_text_can_be_typed(name, parse):
    """So are those that stand at the top of each file, and most of them are that file's own."""
    calls = commands_of(in_docstring(name))
    assert sum(script == name for script, _ in calls) >= 3
    assert refused(parse, calls) == []


def test_what_cannot_be_typed_is_found(parse, capsys):
    """The control of the tests above: a wrong word, flag, value or handed-on flag is refused, what is right is not."""
    lines = ["python train.py trian", "python gpt.py --promt x", "python rlhf.py ppo --lam 2", "python none.py",
             'python lora.py --flags="--epoch 2"', "torchrun --nproc_per_node=2 train.py --max-steps 1"]
    assert refused(parse, commands_of(lines)) == commands_of(lines) and len(commands_of(lines)) == len(lines)
    right = commands_of(['X=1 python gpt.py --prompt "a | b" | python tokenizer.py encode > x  # y'])
    assert len(right) == 2 and refused(parse, right) == []
    assert "did you mean --prompt?" in capsys.readouterr().err


def recipes(*arguments):
    """Return the lines that make would run, one command each, in place of which it prints them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "--always-make", "--dry-run", "PYTHON=python", "OUT=nowhere", *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("arguments", [["all", "rlhf-all"], ["real"], ["real", "SIZE=gpt2-medium", "JUDGE=ollama"]])
def test_every_recipe_of_make_can_be_typed(arguments, parse):
    """Each is one command, which its script accepts, and starts only from what an earlier one made."""
    calls, made = commands_of(recipes(*arguments)), set()
    assert len(calls) >= 10 and refused(parse, calls) == []
    for _, call in calls:
        options = dict(zip(call, call[1:]))
        needed = ",".join(options.get(flag, "") for flag in ("--init", "--checkpoint")).split(",")
        folders = {Path(file).parent for file in needed if "/" in file}
        assert all({folder, folder.parent} & made for folder in folders), call  # `rlhf.py all`: folders below its own
        made.add(Path(options.get("--out_dir", "nowhere")))


def test_make_real_asks_for_the_weights_before_anything_else():
    """The largest weights come first, then all data: where they cannot be had nothing else is fetched or trained."""
    calls = commands_of(recipes("real", "SIZE=gpt2-medium"))
    assert calls[0] == ("gpt2_weights.py", ["get", "--model", "gpt2-medium"])
    trained = [number for number, (_, call) in enumerate(calls) if call[0] in ("train", "compare", "reward")]
    fetched = [number for number, (_, call) in enumerate(calls) if call[0] in ("get", "check")]
    assert max(fetched) < min(trained)


def test_every_target_and_variable_of_make_is_there():
    """`make WORD` names a target that `make help` lists, `make NAME=...` a variable."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", MAKEFILE, re.MULTILINE))
    asked = [word for command in found(QUOTED, ["make"]) for word in command[1:]]
    assert len(asked) > 5
    assert {word.split("=")[0] for word in asked if "=" in word} <= variables
    assert {word for word in asked if "=" not in word} <= targets
    listed = set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE).group(1).split())
    assert targets == listed and "real" in targets


def test_the_files_pictures_and_headings_that_the_readme_names_are_there():
    """No placeholder is left; every linked file exists, and every link to a heading finds it."""
    assert re.findall(r"\{\w*\}|TODO|TBD|XXX", README) == []
    linked = re.findall(r"\]\(([^):]+)\)", README)
    files = [word for command in QUOTED for word in command.split() if re.fullmatch(r"(?:\w+/)?\w+\.py", word)]
    assert len(linked) > 2 and len(files) > 20
    headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in PROSE.splitlines() if line.startswith("#")]
    assert [name for name in linked if name.startswith("#") and name[1:] not in headings] == []
    assert [name for name in linked + files if name[0] != "#" and not (ROOT / name).exists()] == []


def test_the_table_of_files_tells_their_length():
    """Every one of the nine has a row, and its number of lines is right to within 2%."""
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|[^|]*\| ([\d,]+) \|", README, re.MULTILINE))
    assert sorted(rows) == NINE
    for name, said in rows.items():
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - lines) <= 0.02 * lines, f"{name} has {lines:,} lines, README: {said}"


def test_the_table_of_topics_names_only_what_is_there():
    """Every `file.py:name` of the README's table is an attribute of that module, and every test beside it is one."""
    table = README.split("## From the notes to the code")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    tests = set(re.findall(r"^def (test_\w+)", "".join(path.read_text(encoding="utf-8") for path in
                                                       (ROOT / "tests").glob("test_*.py")), re.MULTILINE))
    assert len(rows) > 40
    for row in rows:
        code, test = (re.findall("`([^`]+)`", cell) for cell in row.split("|")[2:4])
        assert code and len(test) == 1 and test[0] in tests, row
        for file, name in (one.split(".py:") for one in code):
            there = importlib.import_module(file)
            for part in name.split("."):
                there = getattr(there, part, None)
            assert callable(there), f"{file}.py has no {name}"


def test_the_python_examples_run(tmp_path):
    """Each block marked as Python, as it stands, beside a checkpoint: no error, no warning, some text."""
    tokenizer = BPETokenizer.train(["At the market Tom has a red ball."], 270)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 32, 16, 2, 1))
    gpt.save_checkpoint(tmp_path / "out" / "pretrain" / "model.safetensors", model, tokenizer)
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert examples
    for code in examples:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and done.stdout.startswith("At the market") and done.stderr == "", done.stderr
