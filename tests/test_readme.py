"""The README, the course, the help texts and the Makefile: what they tell a person to type is there and is legal."""

import ast
import builtins
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
import torch
import train
from tokenizer import BPETokenizer
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
NINE = sorted(path.name for path in ROOT.glob("*.py"))
README, MAKEFILE, COURSE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile",
                                                                                   "assets/course.md"))
END = {"|", ">", ">>", "&&", ";"}


def quoted(page):
    """Return the lines of a page's code blocks and what stands in single backquotes outside of them."""
    prose, fenced = ("\n".join(page.split("```")[odd::2]) for odd in (0, 1))
    return fenced.splitlines() + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


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
    """Return [(script, arguments, processes)] of the calls of one of the nine; torchrun checks its own words."""
    calls = [(one[1], one[2:], 1) for one in found(lines, ["python"]) if one[1:] and one[1].endswith(".py")]
    for one in found(lines, ["torchrun"]):
        started = get_args_parser().parse_args(one[1:])
        calls.append((started.training_script, started.training_script_args, int(started.nproc_per_node)))
    return calls


def in_docstring(name):
    """Return the lines of a file's docstring that begin with a command, without the words beside it."""
    lines = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))).splitlines()
    return [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.match(r"\s*(python \w+\.py|torchrun)", line)]


def idle(function):
    """Return a function that does nothing in the place of a command, with its name and docstring, its help."""
    nothing = lambda *_: None  # noqa: E731
    nothing.__name__, nothing.__doc__ = function.__name__, function.__doc__
    return nothing


@pytest.fixture
def parse(monkeypatch):
    """Return a function that lets a script read its command line and do nothing; its value is the exit status.

    `words` of that function holds the commands of the script that was called last."""
    def run(doc, commands, *rest, real=gpt.run, **named):
        read.words = list(commands)
        commands = {word: (idle(function), flags) for word, (function, flags) in commands.items()}
        return real(doc, commands, *rest, **named)

    def run_script(doc, Config, commands, *rest, real=train.run_script, **named):
        read.words = list(commands)
        commands = {word: command._replace(function=idle(command.function)) for word, command in commands.items()}
        return real(doc, Config, commands, *rest, **named)

    modules = {name: importlib.import_module(name[:-3]) for name in NINE}
    for module in modules.values():
        for replaced in (run, run_script):
            if hasattr(module, replaced.__name__):
                monkeypatch.setattr(module, replaced.__name__, replaced)
    monkeypatch.setattr(modules["tokenizer.py"], "COMMANDS",
                        {idle(function): flags for function, flags in modules["tokenizer.py"].COMMANDS.items()})
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_: None)  # no other process is waited for

    def read(script, arguments, processes=1):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return modules[script].main(list(arguments))

    return read


def refused(parse, calls):
    """Return the commands that a script refuses to read."""
    return [call for call in calls if call[0] not in NINE or parse(*call)]


@pytest.mark.parametrize("page", ["README.md", "assets/course.md"])
def test_every_command_of_a_page_can_be_typed(page, parse):
    """The words, flags and values of every `python FILE.py ...` and `torchrun ... FILE.py` are legal for that file."""
    calls = commands_of(quoted((ROOT / page).read_text(encoding="utf-8")))
    assert len(calls) > 8 and (page != "README.md" or {script for script, _, _ in calls} == set(NINE))
    assert refused(parse, calls) == []


@pytest.mark.parametrize("name", NINE)
def test_every_command_of_a_help_text_can_be_typed(name, parse):
    """So are those that stand at the top of each file, and most of them are that file's own."""
    calls = commands_of(in_docstring(name))
    assert sum(script == name for script, _, _ in calls) >= 3
    assert refused(parse, calls) == []


@pytest.mark.parametrize("name", NINE)
def test_every_help_text_fits_two_screens(name, parse, capsys):
    """At most 80 lines, and the docstring at the top of a file 25."""
    parse.words = [function.__name__ for function in importlib.import_module("tokenizer").COMMANDS]
    assert parse(name, ["--help"]) == 0 and len(capsys.readouterr().out.splitlines()) <= 40
    for word in parse.words:
        assert parse(name, [word, "--help"]) == 0
        assert 5 < len(capsys.readouterr().out.splitlines()) <= 80, word
    assert len(ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))).splitlines()) <= 25


def test_what_cannot_be_typed_is_found(parse, capsys):
    """The control of the tests above: a wrong word, flag, value or number of processes is refused, the rest is not."""
    lines = ["python train.py trian", "python gpt.py --promt x", "python rlhf.py ppo --lam 2", "python none.py",
             "python tokenizer.py --vocab 2", "torchrun --nproc_per_node=2 train.py --max-steps 1",
             "torchrun --nproc_per_node=2 finetune_cls.py", "python train.py evaluate --epochs 2"]
    assert refused(parse, commands_of(lines)) == commands_of(lines) and len(commands_of(lines)) == len(lines)
    right = commands_of(['X=1 python gpt.py --prompt "a | b" | python tokenizer.py encode > x  # y',
                         "torchrun --nproc_per_node=2 train.py --max_steps 1"])
    assert len(right) == 3 and refused(parse, right) == []
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
    for _, call, _ in calls:
        options = dict(zip(call, call[1:]))
        needed = ",".join(options.get(flag, "") for flag in ("--init", "--checkpoint", "--reward")).split(",")
        folders = {Path(file).parent for file in needed if "/" in file}
        assert all({folder, folder.parent} & made for folder in folders), call  # `rlhf.py all`: folders below its own
        made.add(Path(options.get("--out_dir", "nowhere")))


def test_make_real_asks_for_the_weights_before_anything_else():
    """The largest weights come first, then all data: where they cannot be had nothing else is fetched or trained."""
    calls = commands_of(recipes("real", "SIZE=gpt2-medium"))
    assert calls[0] == ("gpt2_weights.py", ["get", "--model", "gpt2-medium"], 1)
    trained = [number for number, (_, call, _) in enumerate(calls) if call[0] in ("train", "reward", "ppo", "dpo")]
    fetched = [number for number, (_, call, _) in enumerate(calls) if call[0] in ("get", "check")]
    assert max(fetched) < min(trained)


def test_every_target_and_variable_of_make_is_there():
    """`make WORD` names a target that `make help` lists, `make NAME=...` a variable."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", MAKEFILE, re.MULTILINE))
    asked = [word for command in found(quoted(README), ["make"]) for word in command[1:]]
    assert len(asked) > 5
    assert {word.split("=")[0] for word in asked if "=" in word} <= variables
    assert {word for word in asked if "=" not in word} <= targets
    listed = set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE).group(1).split())
    assert targets == listed and "real" in targets


def test_the_readme_is_short_enough_to_finish():
    """At most 300 lines and 22 KB."""
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 22_000


@pytest.mark.parametrize("page", ["README.md", "assets/course.md", "assets/results.md", "assets/bench.md"])
def test_the_files_pictures_and_headings_that_a_page_names_are_there(page):
    """Every linked file exists, and every link to a heading finds it; so do the scripts that the README names."""
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    linked = re.findall(r"\]\(([^):]+)\)", text)
    headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in "".join(text.split("```")[::2]).splitlines() if line.startswith("#")]
    assert linked
    assert [name for name in linked if not (name[1:] in headings if name[0] == "#" else (folder / name).exists())] == []
    if page == "README.md":
        files = [word for one in quoted(text) for word in one.split() if re.fullmatch(r"(?:\w+/)?\w+\.py", word)]
        assert len(files) > 20 and [name for name in files if not (ROOT / name).exists()] == []


def test_the_table_of_files_tells_their_length():
    """Every one of the nine has a row, and its number of lines is right to within 2%."""
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|[^|]*\| ([\d,]+) \|", README, re.MULTILINE))
    assert sorted(rows) == NINE
    for name, said in rows.items():
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - lines) <= 0.02 * lines, f"{name} has {lines:,} lines, README: {said}"


# ---------------------------------------------------------------------------------------------------------------------
# The course: | section | topic | code | test | exercise |

ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in COURSE.splitlines() if
        re.match(r"\| [\dA-D]", line)]
GIVES = re.compile(r"`([^`]+)` gives `([^`]+)`")


def test_the_course_names_only_what_is_there():
    """Every `file.py:name` of the course is an attribute of that module, and every test beside it is one."""
    tests = {path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
             for path in (ROOT / "tests").glob("test_*.py")}
    assert len(ROWS) >= 40 and all(len(row) == 5 for row in ROWS)
    for row in ROWS:
        code, named = (re.findall("`([^`]+)`", cell) for cell in row[2:4])
        assert code and named, row
        for file, _, name in (test.partition("::") for test in named):
            assert name in tests.get(file, ()), f"tests/{file}.py has no {name}"
        for file, name in (one.split(".py:") for one in code):
            there = importlib.import_module(file)
            for part in name.split("."):
                there = getattr(there, part, None)
            assert there is not None, f"{file}.py has no {name}"


def test_every_topic_has_an_exercise_whose_answer_is_checked():
    """An expression with its value, a command with what it prints, or at least a command that is parsed."""
    assert [row for row in ROWS if not GIVES.search(row[4]) and not commands_of(quoted(row[4]))] == []
    assert sum(bool(GIVES.search(row[4])) for row in ROWS) >= 40


@pytest.mark.parametrize("topic, typed, answer", [(row[1], *pair) for row in ROWS for pair in GIVES.findall(row[4])])
def test_an_exercise_gives_the_answer_that_the_course_tells(topic, typed, answer, capsys, tmp_path, monkeypatch):
    """What the course says can be typed into `python -i`, after its first lines, or into a shell, in any folder."""
    monkeypatch.chdir(tmp_path)
    if "gpt2_tokenizer" in typed or "tokenizer gpt2" in typed:
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            pytest.skip("needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR")
    if typed.startswith("python "):
        (script, arguments, _), = commands_of([typed])
        assert importlib.import_module(script[:-3]).main(arguments) == 0
        assert answer in capsys.readouterr().out
        return
    names = {}
    exec(re.search(r"```python\n(.*?)```", COURSE, re.DOTALL)[1], names)
    torch.manual_seed(0)
    assert str(builtins.eval(typed, names)) == answer, topic


def test_the_python_examples_run(tmp_path):
    """Each block of the README marked as Python, as it stands, beside a checkpoint: no error, no warning, some text."""
    tokenizer = BPETokenizer.train(["At the market Tom has a red ball."], 270)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 32, 16, 2, 1))
    gpt.save_checkpoint(tmp_path / "out" / "pretrain" / "model.safetensors", model, tokenizer)
    model.out_head = torch.nn.Linear(16, 2)
    model.out_head.bias.data[1] = 100.0  # always the second label
    gpt.save_checkpoint(tmp_path / "out" / "cls" / "model.safetensors", model, tokenizer, kind="classifier",
                        labels=["ham", "spam"])
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 1
    for code, said in zip(examples, ("spam\n",)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and done.stdout.startswith(said) and done.stderr == "", done.stderr
