"""The shape of the project: nine files, who imports whom, what is copied with what, and help that reads well."""

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

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ["gpt.py", "tokenizer.py", "data.py", "lora.py", "gpt2_weights.py"]
NINE = LEAVES + ["train.py", "finetune_cls.py", "finetune_sft.py", "rlhf.py"]
THERE = [name for name in NINE if (ROOT / name).exists()]
PACKAGES = {"torch", "tiktoken", "requests", "regex"}
OPTIONAL = {"lora.py": {"safetensors"}}  # used where gpt.py is not beside it
# What each file may import of ours, and so what has to be copied with it.
OURS = {"gpt.py": {"tokenizer", "gpt2_weights"}, "tokenizer.py": {"data"}, "data.py": {"tokenizer"},
        "lora.py": {"gpt", "tokenizer", "gpt2_weights"}, "gpt2_weights.py": {"gpt", "tokenizer"},
        "train.py": {"gpt", "tokenizer", "data", "gpt2_weights"}}
COPY = {"gpt.py": [], "tokenizer.py": [], "data.py": ["tokenizer.py"], "lora.py": [], "gpt2_weights.py": ["gpt.py"],
        "train.py": ["gpt.py", "tokenizer.py", "data.py"]}


def imports(tree):
    """Return the top-level names of all modules that a syntax tree imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def parsed(name):
    """Return the syntax tree of one of our files."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def test_the_root_holds_no_tenth_module():
    """Every .py file at the root is one of the nine."""
    assert {path.name for path in ROOT.glob("*.py")} <= set(NINE)


@pytest.mark.parametrize("name", THERE)
def test_only_the_four_packages_and_lower_layers_are_imported(name):
    """torch, tiktoken, requests (and regex, which tiktoken brings), the standard library, and files further down."""
    stages = {other[:-3] for other in NINE}
    ours = imports(parsed(name)) & stages
    assert imports(parsed(name)) - stages <= PACKAGES | OPTIONAL.get(name, set()) | set(sys.stdlib_module_names)
    layer = NINE.index(name)
    assert ours <= OURS.get(name, {other[:-3] for other in NINE[:layer]})


def test_the_command_line_block_is_the_same_in_every_leaf():
    """`Parser`, `explain` and `run` are copied so that a leaf can be copied alone; copies must not drift."""
    blocks = {}
    for name in (name for name in LEAVES if name in THERE):
        found = [node for node in parsed(name).body if getattr(node, "name", "") in ("Parser", "explain", "run")]
        blocks[name] = "".join(ast.dump(node) for node in found)
        assert len(found) == 3, name
    for name, block in blocks.items():
        assert block == blocks["gpt.py"], f"Parser, explain or run differs between gpt.py and {name}"


@pytest.mark.parametrize("name", THERE)
def test_public_functions_and_classes_say_what_they_return(name):
    """Everything public at the top level has a docstring."""
    public = [node for node in parsed(name).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


README = (ROOT / "README.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", README)
QUOTED += [line for block in README.split("```")[1::2] for line in block.splitlines()]


def test_the_readme_names_only_what_is_there():
    """No placeholder is left, and the files and make targets that it names exist."""
    assert re.findall(r"\{\w*\}|TODO|TBD|XXX", README) == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [command.split()[1] for command in QUOTED if re.match(r"make [a-z]", command)]
    assert len(named) > 2 and set(named) <= {*targets, "help"}
    linked = re.findall(r"\]\(([^):]+)\)", README)
    files = [word for command in QUOTED for word in command.split() if re.fullmatch(r"\w+\.py", word)]
    assert len(linked) > 2 and len(files) > 20
    assert [name for name in linked + files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", THERE)
def test_the_readme_names_only_commands_and_flags_that_are_there(name, capsys):
    """Every command word and flag of a `python FILE.py ...` line stands in the help of that file."""
    assert importlib.import_module(name[:-3]).main(["--help"]) == 0
    help = capsys.readouterr().out
    commands = set(re.findall(rf"^usage: python {name} (\w+)", help, re.MULTILINE))
    commands |= set("".join(re.findall(rf"^usage: python {name} \[([\w|-]+)\]", help, re.MULTILINE)).split("|"))
    lines = [shlex.split(line, comments=True) for line in QUOTED if f"python {name}" in line]
    lines = [line[line.index(name) + 1 :] for line in lines if name in line]  # not in a comment
    assert lines and len(commands) > 1
    assert [line[0] for line in lines if line and line[0][0] != "-" and line[0] not in commands] == []
    flags = {word.split("=")[0] for line in lines for word in line if re.match("--[a-z]", word)}
    assert {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?!\w)", help)} == set()


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
            found = importlib.import_module(file)
            for part in name.split("."):
                found = getattr(found, part, None)
            assert callable(found), f"{file}.py has no {name}"


def dangers(tree):
    """Yield (line, what) for every call in a syntax tree that could run foreign code, trust a server blindly, or hang."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called in ("eval", "exec", "os.system", "os.popen") or called.endswith(".extractall"):
            yield call.lineno, called
        if words.get("verify") == "False" or words.get("shell") == "True":
            yield call.lineno, "verify or shell"
        if called == "torch.load" and words.get("weights_only") != "True":
            yield call.lineno, "torch.load without weights_only=True"
        if re.fullmatch(r"(requests|session|\w*http\w*)\.(get|post|head|request)", called) and "timeout" not in words:
            yield call.lineno, "request without timeout"
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else words.get("mode", "'r'")
        if called in ("open", "gzip.open") and "b" not in mode and "encoding" not in words:
            yield call.lineno, "text file without encoding"


def test_nothing_dangerous_is_called_anywhere():
    """No pickle, eval, extractall, unverified TLS, shell or unpickling load; every request has a timeout."""
    for name in THERE:
        assert "pickle" not in imports(parsed(name))
        assert list(dangers(parsed(name))) == [], name


def test_the_search_for_dangers_finds_them():
    """The control of the test above: each of these lines is caught."""
    lines = ["eval(x)", "z.extractall()", "requests.get(u)", "torch.load(f)", "torch.load(f, weights_only=False)",
             "requests.get(u, timeout=3, verify=False)", "subprocess.run(c, shell=True)", "open(p)", "open(p, 'w')"]
    for line in lines:
        assert len(list(dangers(ast.parse(line)))) == 1, line
    assert list(dangers(ast.parse("open(p, 'wb'); requests.get(u, timeout=3); model.eval()"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in THERE if name in COPY])
def test_a_file_copied_with_its_companions_runs_elsewhere(name, tmp_path):
    """In an empty folder, with only what the README says to copy, --help works and nothing is written to stderr."""
    for file in [name, *COPY[name]]:
        shutil.copy(ROOT / file, tmp_path)
    code = f"import {name[:-3]}"
    for command in (["-c", code], [name, "--help"]):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0 and done.stderr == "", (command, done.stderr)
    assert done.stdout.strip().startswith(("usage", ast.get_docstring(parsed(name)).split("\n")[0][:40]))


@pytest.mark.slow
def test_gpt_copied_alone_trains_and_generates(tmp_path):
    """gpt.py alone in a folder is a library: build, learn, generate, save, load."""
    shutil.copy(ROOT / "gpt.py", tmp_path)
    code = """
import gpt  # first: it quiets torch's warning about numpy
import torch
model = gpt.GPTModel(gpt.GPTConfig(20, 8, 16, 2, 1))
ids = torch.randint(20, (2, 8))
torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
gpt.save_checkpoint("m.safetensors", model)
print(gpt.generate(gpt.load_checkpoint("m.safetensors")[0], ids, 4).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([2, 12])" and done.stderr == ""
