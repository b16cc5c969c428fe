"""The shape of the project: nine files, who imports whom, what is copied with what, and help that reads well."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpt
import train

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ["gpt.py", "tokenizer.py", "data.py", "lora.py", "gpt2_weights.py"]
NINE = LEAVES + ["train.py", "finetune_cls.py", "finetune_sft.py", "rlhf.py"]
THERE = [name for name in NINE if (ROOT / name).exists()]
PACKAGES = {"torch", "tiktoken", "requests", "regex"}
OPTIONAL = {"lora.py": {"safetensors"}}  # used where gpt.py is not beside it
# What each file imports of ours at its top: arrows that only point down, and what has to be copied with it.
TOP = {"gpt.py": set(), "tokenizer.py": set(), "data.py": set(), "lora.py": set(), "gpt2_weights.py": {"gpt"},
       "train.py": {"gpt", "data", "tokenizer"}, "finetune_cls.py": {"gpt", "data", "train"},
       "finetune_sft.py": {"gpt", "data", "train"}, "rlhf.py": {"gpt", "data", "train"}}
WITH_TRAIN = ["gpt.py", "tokenizer.py", "data.py", "train.py"]
COPY = {"gpt.py": [], "tokenizer.py": [], "data.py": [], "lora.py": [], "gpt2_weights.py": ["gpt.py"],
        "train.py": WITH_TRAIN[:3], "finetune_cls.py": WITH_TRAIN, "finetune_sft.py": WITH_TRAIN,
        "rlhf.py": WITH_TRAIN}
LOOPS = {"train.py": ["train"], "finetune_cls.py": ["train"], "finetune_sft.py": ["train"],
         "rlhf.py": ["train_reward", "train_policy", "train_dpo"]}
STEPS = ["1. each epoch  2. each batch", "3. clear gradients", "4. loss", "5. backward",
         "6. clip, set the rate, update", "7. report", "8. evaluate, sample, save"]


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


def outside_functions(tree):
    """Return a module without the bodies of its functions and classes."""
    return ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])


@pytest.mark.parametrize("name", NINE)
def test_only_the_four_packages_and_lower_layers_are_imported(name):
    """torch, tiktoken, requests (and regex, which tiktoken brings), the standard library; of ours, files further down.

    Inside a function a file may import more of ours, for one option or command."""
    stages = {other[:-3] for other in NINE}
    assert imports(parsed(name)) - stages <= PACKAGES | OPTIONAL.get(name, set()) | set(sys.stdlib_module_names)
    assert imports(outside_functions(parsed(name))) & stages == TOP[name]


def functions_of(tree):
    """Return all functions and methods in a syntax tree."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node):
    """Return the lines of a function or class."""
    return node.end_lineno - node.lineno + 1


def test_functions_and_classes_stay_short():
    """At most 60 lines a function, 100 a loop or a class; at most 480 functions in all."""
    loops = {(name, loop) for name, found in LOOPS.items() for loop in found}
    assert sum(len(functions_of(parsed(name))) for name in NINE) <= 480
    for name in NINE:
        long = [(node.name, length(node)) for node in functions_of(parsed(name))
                if length(node) > (100 if (name, node.name) in loops else 60)]
        wide = [node.name for node in ast.walk(parsed(name)) if isinstance(node, ast.ClassDef) and length(node) > 100]
        assert long == [] and wide == [], name


def test_there_is_one_command_line_guard_one_atomic_writer_and_one_sha256_of_files():
    """Only gpt.py holds them; tokenizer.py, which works without torch, has a small writer and main of its own."""
    names = {name: {getattr(node, "name", "") for node in parsed(name).body} for name in NINE}
    for once in ("Parser", "guarded", "explain", "replacing", "write_json", "file_sha256", "read_safetensors"):
        assert [name for name in NINE if once in names[name] and name != "tokenizer.py"] == ["gpt.py"], once
    assert [name for name in NINE if "download" in names[name]] == ["data.py"]


def calls_in_order(function):
    """Return the names of what a function calls as attributes or names, in the order of their lines."""
    calls = [call for call in ast.walk(function) if isinstance(call, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    return [call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls]


@pytest.mark.parametrize("name, loop", [(name, loop) for name, loops in LOOPS.items() for loop in loops])
def test_the_eight_steps_stand_open_in_every_loop(name, loop):
    """Backward, clipping, rate and update are called in the loop itself, under the same comments in the same order."""
    function = next(node for node in parsed(name).body if getattr(node, "name", "") == loop)
    calls = calls_in_order(function)
    places = [calls.index(call) for call in ("zero_grad", "backward", "clip_grad_norm_", "set_learning_rate", "step",
                                             "report_step")]
    assert places == sorted(places)
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()[function.lineno - 1 : function.end_lineno]
    found = [next((number for number, line in enumerate(lines) if f"# {step}" in line), None) for step in STEPS]
    assert None not in found and found == sorted(found), dict(zip(STEPS, found))


def test_a_missing_companion_or_package_is_one_line(monkeypatch, capsys):
    """A file of ours has to be copied, a package installed; an error from inside of one keeps what it says."""
    for missing in ("lora", "tiktoken"):
        monkeypatch.setitem(sys.modules, missing, None)

    def ours(args):
        """Import a file."""
        from lora import apply_lora  # noqa: F401

    def ours_from_a_folder_data(args):
        """Import from what is no file of ours."""
        from data import no_such_function  # noqa: F401

    def package(args):
        """Import a package."""
        import tiktoken  # noqa: F401

    def inside_a_package(args):
        """Import what a package lacks."""
        from torch.nn import NoSuchLayer  # noqa: F401

    for command, said in ((ours, "copy lora.py beside this file"), (package, "pip install --upgrade tiktoken"),
                          (ours_from_a_folder_data, "copy data.py beside this file"),
                          (inside_a_package, "'NoSuchLayer' from 'torch.nn'")):
        for run in (lambda: gpt.run("", {"go": (command, {})}, []),
                    lambda: train.run_script("", train.Config, {"go": train.Command(command, "debug")}, [])):
            assert run() == 1
            error = capsys.readouterr().err
            assert error.startswith("error: ") and said in error and error.count("\n") == 1, error


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_repeats_no_stage_that_is_newer_than_what_it_starts_from(tmp_path):
    """rlhf-all evaluates anew, which leaves DPO and GRPO up to date; new SFT weights do not."""
    stages = ["tokenizer/tokenizer.json", *(f"{stage}/summary.json" for stage in ("pretrain", "sft", "dpo", "grpo")),
              "ppo/evaluation.json"]

    def made(newest):
        for age, stage in enumerate([*stages, newest]):
            (tmp_path / stage).parent.mkdir(exist_ok=True)
            (tmp_path / stage).touch()
            os.utime(tmp_path / stage, (age, age))
        done = subprocess.run(["make", "-n", "-C", ROOT, "rlhf-all", f"OUT={tmp_path}", f"PYTHON={sys.executable}"],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return re.findall(r"\w+\.py (\w+) .*?(--fresh|\n)", done.stdout)

    assert made("ppo/evaluation.json") == [("evaluate", "\n")]
    assert made("sft/summary.json") == [("all", "--fresh"), ("dpo", "--fresh"), ("grpo", "--fresh"), ("evaluate", "\n")]


@pytest.mark.parametrize("name", THERE)
def test_public_functions_and_classes_say_what_they_return(name):
    """Everything public at the top level has a docstring."""
    public = [node for node in parsed(name).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_line_is_wider_than_120_columns():
    """In the nine files."""
    wide = [(name, number) for name in THERE
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert wide == []


def dangers(tree):
    """Yield (line, what) for every call that could run foreign code, trust a server blindly, or hang."""
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


SMALL = ["--emb_dim", "16", "--n_layers", "1", "--n_heads", "2", "--max_steps", "2"]
TRAINED = [["tokenizer.py", "train", "--data", "text.txt", "--vocab_size", "300"],
           ["train.py", "--data", "text.txt", *SMALL]]
SHORT = "--data mine.json --max_new_tokens 4".split()
FEW = "--data mine.json --max_steps 1 --response_length 4 --eval_prompts 2 --test_prompts 2".split()
LIBRARY = {
    "gpt.py": """
import gpt  # first: it quiets torch's warning about numpy
import torch
model = gpt.GPTModel(gpt.GPTConfig(20, 8, 16, 2, 1))
ids = torch.randint(20, (2, 8))
torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
gpt.save_checkpoint("m.safetensors", model)
print(gpt.generate(gpt.load_checkpoint("m.safetensors")[0], ids, 4).shape)""",
    "lora.py": """
import lora
import torch
torch.manual_seed(1)  # else all its units are dead once in some hundred times
model, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)), torch.randn(3, 4)
before = model(x)
lora.apply_lora(model, rank=2, dropout=0.0)
torch.nn.functional.mse_loss(model(x), before + 1).backward()
torch.optim.AdamW(lora.lora_parameters(model), lr=0.1).step()
adapted = model(x)
print(lora.merge_lora(model)(x).allclose(adapted, atol=1e-6) and not adapted.allclose(before))""",
    "tokenizer.py": """
import tokenizer
bpe = tokenizer.BPETokenizer.train(["Tom has a red ball. " * 9], 270)
bpe.save("t.json")
print(tokenizer.load_tokenizer("t.json").decode(bpe.encode("Tom has")))""",
    "data.py": """
import data, torch
windows = data.SlidingWindowDataset(torch.arange(10), 4, 2)
rows, texts = data.read_labelled("mine.tsv"), list(data.texts("text.txt"))
ids, targets = data.collate([([5, 6, 7, 0], [0, 0, 1, 1])], pad_id=0)
print(len(windows), rows[1], targets.tolist(), data.format_prompt({"instruction": texts[0][:7]}, "plain"))""",
    "gpt2_weights.py": """
import gpt, gpt2_weights
model = gpt.GPTModel(gpt.GPTConfig(20, 8, 16, 2, 1, qkv_bias=True))
gpt2_weights.export_gpt2(model, "hf")
print(all(map(lambda a, b: a.equal(b), model.parameters(), gpt2_weights.load_gpt2("hf").parameters())))"""}
RUNS = {  # what each file does in the folder, and a word or line of what it prints at the end
    "gpt.py": ([["-c", LIBRARY["gpt.py"]]], "torch.Size([2, 12])"),
    "tokenizer.py": ([["-c", LIBRARY["tokenizer.py"]]], "Tom has"),
    "data.py": ([["-c", LIBRARY["data.py"]]], "Tom has"),
    "lora.py": ([["-c", LIBRARY["lora.py"]]], "True"),
    "gpt2_weights.py": ([["-c", LIBRARY["gpt2_weights.py"]]], "True"),
    "train.py": ([["gpt.py", "--prompt", "Tom has", "--max_new_tokens", "3"]], "Tom has"),
    "finetune_cls.py": ([["finetune_cls.py", "--data", "mine.tsv", "--max_steps", "2"],
                         ["finetune_cls.py", "classify", "You won a prize"]], "You won a prize"),
    "finetune_sft.py": ([["finetune_sft.py", *SHORT, "--template", "plain", "--max_steps", "2"],
                         ["finetune_sft.py", "evaluate", *SHORT]], "exact match"),
    "rlhf.py": ([["rlhf.py", "all", "--init", "out/pretrain/model.safetensors", *FEW]], "reward"),
}


def start(folder, *command):
    """Run Python with these words in a folder, as on a machine where nothing of ours is; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DATA_DIR")}
    done = subprocess.run([sys.executable, *command], cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "NumPy" not in done.stderr, (command, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a tokenizer and a model in out/, made by train.py and what is copied with it."""
    folder = tmp_path_factory.mktemp("trained")
    for file in WITH_TRAIN:
        shutil.copy(ROOT / file, folder)
    (folder / "text.txt").write_text("Tom has a red ball.\n\nMia has a blue hat.\n\n" * 200, encoding="utf-8")
    for command in TRAINED:
        start(folder, *command)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NINE)
def test_a_file_copied_with_its_companions_works_elsewhere(name, tmp_path, trained):
    """In a folder with only what the README says to copy, and data of one's own, it does what it is for."""
    for file in [name, *COPY[name]]:
        shutil.copy(ROOT / file, tmp_path)
    shutil.copy(trained / "text.txt", tmp_path)
    if "data.py" in COPY[name]:
        shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "mine.tsv").write_text("".join(f"ham\tsee you at {n}\nspam\twin {n} coins\n" for n in range(40)),
                                       encoding="utf-8")
    (tmp_path / "mine.json").write_text(json.dumps(
        [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}.", "chosen": f"{n + 1}.",
          "rejected": "No."} for n in range(60)]), encoding="utf-8")
    runs, said = RUNS[name]
    for command in runs:
        printed = start(tmp_path, *command)
    assert said in printed


def test_what_is_copied_with_a_file_is_all_that_it_imports():
    """Whatever a file or its companions import of ours at the top is among what is copied with it."""
    for name in NINE:
        there = {file[:-3] for file in [name, *COPY[name]]}
        for file in [name, *COPY[name]]:
            assert TOP[file] <= there, (name, file)
