"""Nothing lost: 64 bad inputs, 24 faults, exact resume of seven runs, corruption, malicious files.

`INPUTS` and `FAULTS` name the test that holds each entry, in this file or another, or why there is nothing to hold.

A run keeps one state, beside its best weights. So there is no newest one to choose, by step or by time, and no previous
one to fall back to: a state that is damaged, though it was read back before it got its name, is refused."""

import ast
import builtins
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

import data
import finetune_cls
import finetune_sft
import gpt
import gpt2_weights
import lora
import rlhf
import tokenizer as tok
import train
from tokenizer import BPETokenizer, CharTokenizer, WordTokenizer

ROOT = Path(__file__).resolve().parent.parent


def table(text):
    """Return {entry: tests that hold it, or "none: " and the reason} of the two lists below.

    A test is written file::name, both without "test_", or, where it is in this file, only its name."""
    rows = re.split(r"\n(?! )", text.strip())
    return {key: " ".join(tests.split()) for key, tests in (row.split(" -> ") for row in rows)}


# What a user may give
INPUTS = table("""
1 empty text -> tokenizer::bad_files_get_one_line_and_leave_nothing_behind
2 folder or missing path -> a_folder_or_nothing_where_a_file_is_wanted
3 byte that is no UTF-8 -> data::the_offset_of_a_bad_byte_is_named
4 UTF-16, byte order mark -> data::a_byte_order_mark_is_dropped_and_utf_16_refused
5 lone surrogate -> tokenizer::lone_surrogates_become_the_replacement_character
6 special token's name in a text -> no_hostile_document_gives_a_special_id
7 id outside the vocabulary -> tokenizer::an_invalid_id_is_named_with_the_range
8 vocabulary too small or too large -> tokenizer::mistakes_get_one_line_and_the_right_status
    tokenizer::training_stops_when_nothing_is_left_to_merge
9 vocabulary or merges damaged -> damaged_or_foreign_merges_are_refused
10 merges of another vocabulary -> damaged_or_foreign_merges_are_refused
11 a million equal characters -> tokenizer::a_million_equal_characters_train_and_encode_in_seconds
12 no network, no cache -> without_network_what_needs_it_is_one_line_and_the_rest_runs
13 status 404 or 500 -> data::a_download_that_fails_leaves_nothing_under_its_name
14 login page with status 200 -> data::a_download_that_fails_leaves_nothing_under_its_name
15 body cut -> data::a_download_that_fails_leaves_nothing_under_its_name
16 file:// and ftp:// -> data::a_download_that_fails_leaves_nothing_under_its_name
17 zip with members that lead out -> data::of_a_zip_only_the_expected_member_is_read
18 zip bomb, no zip, cut zip -> data::of_a_zip_only_the_expected_member_is_read
19 JSON of another form -> data::bad_input_is_one_line_that_names_the_place
20 one bad line of JSONL -> data::bad_input_is_one_line_that_names_the_place
21 NaN, doubled keys, surrogates in JSON -> data::bad_input_is_one_line_that_names_the_place
    data::half_a_character_in_json_is_replaced
22 open quote, short row, NUL in CSV -> data::bad_input_is_one_line_that_names_the_place
23 unknown label, one class only -> finetune_cls::bad_rows_are_named_and_nothing_is_left_behind
    finetune_cls::mistakes_get_one_line
24 text shorter than a window -> data::windows_cover_every_token_once_at_stride_equal_to_context
25 empty validation part -> a_validation_part_without_a_window_is_refused
26 id above 65,535 -> data::large_vocabularies_get_32_bits
27 token file empty, odd, cut -> damage_to_any_file_is_found_before_it_is_used
28 token file beyond the vocabulary -> damage_to_any_file_is_found_before_it_is_used
29 token file of another tokenizer -> data::prepared_text_is_used_again_until_text_or_tokenizer_change
30 nan, inf, negative, 0, 1e3 -> every_option_refuses_what_is_no_value
31 sizes that do not divide, dropout 1.5 -> every_option_refuses_what_is_no_value
    train::mistakes_get_one_line_and_leave_nothing_behind
32 misspelled flag -> train::mistakes_get_one_line_and_leave_nothing_behind
33 device or type that is not there -> train::mistakes_get_one_line_and_leave_nothing_behind
34 folder with a run -> train::an_existing_run_is_never_overwritten
35 --resume of nothing -> train::resume_in_an_empty_folder_starts_and_says_so
36 damaged state -> wrong_data_and_a_damaged_state_are_one_line_in_every_script
    damage_to_any_file_is_found_before_it_is_used a_state_that_cannot_be_read_now_is_not_called_damaged
37 --resume with other options or data -> train::an_existing_run_is_never_overwritten
    train::changed_data_is_refused_on_resume
38 optimizer state of another model -> a_state_that_does_not_fit_or_is_not_finite_is_refused
39 weights that are not finite -> a_state_that_does_not_fit_or_is_not_finite_is_refused
    safetensors::weights_that_are_not_finite_are_named_and_nothing_is_copied
40 foreign pickle or module -> six_kinds_of_malicious_checkpoints_run_nothing
41 folder read-only, a file, on a full disk -> a_folder_that_cannot_be_written_ends_before_the_first_step
42 instruction without a key -> finetune_sft::entries_that_cannot_be_used_are_refused_or_counted
43 example longer than the context -> finetune_sft::what_does_not_fit_is_cut_or_dropped_and_counted
44 prompt that holds the template -> finetune_sft::no_mask_covers_a_response_and_no_text_makes_a_special_token
45 classes that the head has not -> finetune_cls::mistakes_get_one_line
46 base missing or of another size -> finetune_sft::mistakes_get_one_line
47 rank 0, negative, too large; alpha nan -> lora::wrong_options_are_refused_and_change_nothing
48 targets that match nothing -> lora::wrong_options_are_refused_and_change_nothing
49 adapter of another base -> lora::another_base_is_refused_and_left_untouched
50 adapter with keys missing or left over -> lora::files_that_do_not_fit_are_refused_by_name
51 merged twice, or taken out unmerged -> lora::merged_equals_adapted_and_unmerging_restores_every_bit
52 judge that is not there -> finetune_sft::mistakes_get_one_line
53 judge with status 401, 404, 429, 500 -> finetune_sft::busy_servers_are_asked_again_and_refusals_are_not
54 judge that answers nonsense -> finetune_sft::a_reply_that_makes_no_sense_is_missing
    finetune_sft::a_judge_counts_what_is_missing_and_bounds_it
55 grade that is no grade -> finetune_sft::grades_and_choices_are_read_strictly
56 response that instructs the judge -> finetune_sft::no_response_can_leave_its_fence
57 equal rewards, batch of one -> ppo_on_one_response_with_one_reward_stays_finite rlhf::mistakes_get_one_line
58 reward or loss that is not finite -> a_gradient_that_is_not_finite_stops_before_the_update
    rlhf::mistakes_get_one_line
59 malformed safetensors -> a_file_that_is_no_model_is_one_line_wherever_one_is_wanted
    safetensors::a_malformed_file_is_refused_with_the_rule_that_it_breaks
    safetensors::no_malformed_file_makes_the_reader_claim_memory
60 weights of another size, transposed -> gpt2_weights::a_file_that_does_not_fit_names_the_tensor
61 weights as a pickle -> gpt2_weights::a_pickle_is_refused_and_nothing_in_it_runs
    six_kinds_of_malicious_checkpoints_run_nothing
62 prompt empty, too long, no UTF-8 -> any_prompt_is_continued_or_refused_in_one_line
63 sampling outside its range -> sampling_options_outside_their_range_are_refused
64 output closed, full, ASCII -> output_that_ends_or_cannot_show_a_character
""")
# What can happen to a run
FAULTS = table("""
F1 SIGKILL while a checkpoint is written -> twenty_kills_while_saving_lose_nothing
F2 SIGKILL between writing and renaming -> a_kill_between_writing_and_renaming_resumes_to_the_same_bits
F3 SIGKILL between renaming and deleting -> none: os.replace takes the old file's place, nothing is deleted
F4 order of writes at a power cut -> every_file_is_on_disk_before_it_has_its_name
    what_a_power_cut_leaves_is_cleared_away
F5 disk full in a save -> a_full_disk_is_named_wherever_a_run_writes train::a_disk_that_fills_within_a_save_is_one_line
F6 disk full while data is prepared -> a_disk_that_fails_while_data_is_prepared_leaves_nothing
F7 disk that fails -> a_disk_that_fills_or_fails_leaves_every_old_file
    a_disk_that_fails_in_a_save_ends_the_run_and_keeps_the_state
F8 flipped bits, cut files -> damage_to_any_file_is_found_before_it_is_used
F9 download cut -> data::a_download_that_fails_leaves_nothing_under_its_name
F10 status 404, 500, 429, redirects -> data::a_download_that_fails_leaves_nothing_under_its_name
    data::a_failure_that_passes_is_tried_again
F11 server that drips or hangs -> data::a_download_that_fails_leaves_nothing_under_its_name
F12 range ignored, changed file -> data::a_download_that_fails_leaves_nothing_under_its_name
F13 wrong content -> gpt2_weights::a_download_with_another_sha256_is_refused
F14 no network -> without_network_what_needs_it_is_one_line_and_the_rest_runs
F15 folder becomes read-only -> a_folder_that_cannot_be_written_ends_before_the_first_step
F16 gradient that is not finite -> a_gradient_that_is_not_finite_stops_before_the_update
    distributed::a_loss_that_is_not_finite_in_one_process_stops_both
F17 spike of the loss -> a_spike_of_the_loss_is_warned_of_once
F18 process killed or stalled -> distributed::a_killed_process_ends_the_run_and_the_state_is_good
F19 Ctrl-C and SIGTERM, in a save, twice -> signals_in_a_save_and_twice
    distributed::a_signal_to_torchrun_saves
F20 two runs in a folder -> a_lock_ends_with_its_holder
F21 two downloads of a file -> data::several_processes_can_fetch_and_prepare_at_once
F22 clock that jumps -> a_clock_that_jumps_changes_nothing
F23 out of memory -> out_of_memory_names_the_flags_to_lower
F24 judge or reward that dies -> finetune_sft::a_judge_that_dies_leaves_the_scores
    rlhf::a_reward_that_fails_stops_the_run_and_resuming_ends_with_the_same_bits
""")


def test_every_entry_of_the_lists_is_held_by_a_test_that_exists():
    """64 inputs and 24 faults, numbered without a gap; what they name is there; at most eight have nothing to hold."""
    assert [int(key.split()[0]) for key in INPUTS] == list(range(1, 65))
    assert [key.split()[0] for key in FAULTS] == [f"F{n}" for n in range(1, 25)]
    entries = [*INPUTS.values(), *FAULTS.values()]
    named = {test for entry in entries if not entry.startswith("none: ") for test in entry.split()}
    assert len(entries) - 8 <= sum(not entry.startswith("none: ") for entry in entries)
    there = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        file = "" if path.stem == "test_reliability" else path.stem.removeprefix("test_") + "::"
        there |= {file + name for name in re.findall(r"^def test_(\w+)", path.read_text(encoding="utf-8"), re.M)}
    assert sorted(named - there) == []


# ---------------------------------------------------------------------------------------------------------------------
# Small runs of every script

WORDS = "cat dog sun map red box hen pig jam ant owl fox bee cup pen hat".split()
PAIRS = [{"prompt": f"say {a} {b}", "response_1": f"{a} please", "response_2": f"no {b}", "preferred": 1 + i % 2}
         for i, (a, b) in enumerate(itertools.islice(itertools.permutations(WORDS, 2), 24))]
STEPS = "--max_steps 12 --eval_every 4 --save_every 3 --warmup_steps 2 --drop_rate 0.1 --accumulate 2 --log_every 1"
BASE = f"--init base.safetensors --epochs 0 {STEPS}"
POLICY = f"--data pairs.json --reward mine:length --response_length 2 --test_prompts 2 {BASE}"
SCRIPTS = {  # name: (main, command, its folder); an epoch has five steps in each
    "train": (train.main, "train --data text.txt --tokenizer char --emb_dim 8 --n_layers 1 --n_heads 2 --batch_size 4 "
                          f"--context_length 16 --sample_tokens 2 --learning_rate 1e-2 {STEPS}", "out/pretrain"),
    "cls": (finetune_cls.main, f"train --data rows.tsv --batch_size 11 {BASE}", "out/cls"),
    "sft": (finetune_sft.main, f"train --data mine.json --template plain --batch_size 9 --max_new_tokens 2 {BASE}",
            "out/sft"),
    "reward": (rlhf.main, f"reward --data pairs.json --batch_size 4 {BASE}", "out/reward"),
    "ppo": (rlhf.main, f"ppo --batch_size 4 --ppo_epochs 1 --eval_prompts 2 {POLICY}", "out/ppo"),
    "dpo": (rlhf.main, f"dpo --batch_size 4 --lora_rank 2 {POLICY}", "out/dpo"),  # adapters
    "grpo": (rlhf.main, f"grpo --batch_size 8 --group 2 --eval_prompts 2 {POLICY}", "out/grpo"),
}
FIRST = ("train", "cls", "sft", "ppo")
MODELS = [  # every flag that names a model, at the end of the rest that it needs
    (gpt.main, "--checkpoint"), (gpt.main, "inspect --prompt a --checkpoint"),
    (train.main, "--data text.txt --out_dir new --init"), (train.main, "evaluate --data text.txt --checkpoint"),
    (finetune_cls.main, "--data rows.tsv --out_dir new --init"), (finetune_cls.main, "classify x --checkpoint"),
    (finetune_sft.main, "--data mine.json --out_dir new --init"), (finetune_sft.main, "respond --checkpoint"),
    (rlhf.main, f"ppo {POLICY} --out_dir new --init"), (rlhf.main, f"ppo {POLICY} --out_dir new --reward"),
    (gpt2_weights.main, "import --out y.safetensors --source"), (lora.main, "merge --adapter a --checkpoint")]
TRAIN_FIRST = [pytest.param(name, marks=[] if name == "train" else pytest.mark.slow) for name in FIRST]  # for time


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Return a folder of its own, the current one, with small data for every script and a small base model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a third of the time, and these tests cut no power
    sys.modules.pop("mine", None)
    rng = random.Random(1)
    Path("text.txt").write_text(" ".join(WORDS[i * i % 16] for i in range(76)), encoding="utf-8")
    rows = [f"{label}\t{rng.choice(WORDS)} {word} {i}\n" for i in range(40)
            for label, word in (("a", "in"), ("b", "up"))]
    Path("rows.tsv").write_text("".join(rows[:78]), encoding="utf-8")
    asked = [{"instruction": f"Repeat {word} {n}.", "input": "", "output": word} for n in range(4)
             for word in WORDS[:12]]
    Path("mine.json").write_text(json.dumps(asked), encoding="utf-8")
    Path("pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    Path("mine.py").write_text("def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n\n\n"
                               "def same(prompts, responses):\n    return [1.0] * len(responses)\n")
    tokenizer = CharTokenizer.train([" ".join(map(chr, range(32, 127))) + "\n"], specials=True)
    torch.manual_seed(0)
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 64, 8, 2, 1, drop_rate=0.0, tie_weights=True))
    gpt.save_checkpoint("base.safetensors", model, tokenizer, template="plain")
    lora.save_lora(lora.apply_lora(model, rank=2), "a")
    return tmp_path


def words_of(name, *flags):
    """Return the words of the command line of one of SCRIPTS, with more flags."""
    return [*SCRIPTS[name][1].split(), *map(str, flags)]


def go(name, *flags, status=0):
    """Run one of SCRIPTS and assert its exit status."""
    assert SCRIPTS[name][0](words_of(name, *flags)) == status


def files():
    """Return {path: content} of all files below the current folder."""
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


def refused(capsys, main, argv, status, *words, new=r"^data/prepared/"):
    """Assert an exit status, one line of error with these words, that no old file changed, and no new one but `new`.

    Returns the line."""
    capsys.readouterr()
    before = files()
    assert main([str(word) for word in argv]) == status, argv
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in shown, (argv, shown)
    assert all(str(word) in lines[0] for word in words), (argv, lines)
    after = files()
    assert {path: after.get(path) for path in before} == before, argv
    assert [str(path) for path in set(after) - set(before) if not re.search(new, str(path))] == [], argv
    return lines[0]


def forked(function, *args):
    """Return the pid of a child process that calls function(*args) and ends with what it returns as its exit status."""
    if not hasattr(os, "fork") or torch.cuda.is_available():
        pytest.skip("needs os.fork, and a GPU's threads do not survive one")
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open("child.txt", "a", encoding="utf-8")
            status = function(*args) or 0
        finally:
            os._exit(status)
    return pid


def until(condition):
    """Return when condition() is true; a minute without that fails the test."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute in vain"
        time.sleep(0.002)


def ended(pid):
    """Return a child's exit status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs


def test_a_folder_or_nothing_where_a_file_is_wanted(work, capsys):
    """Every flag that names a file, given a folder and a path with nothing there: status 1 and the path."""
    Path("folder/inside").mkdir(parents=True)
    CharTokenizer.train(["abc"]).save("chars.json")
    for main, argv in [
            *MODELS, (train.main, "--data text.txt --tokenizer"), (finetune_cls.main, "--init base.safetensors --data"),
            (finetune_sft.main, "--init base.safetensors --data"), (rlhf.main, f"ppo {POLICY} --data"),
            (lora.main, "merge --checkpoint base.safetensors --adapter"), (lora.main, "info --checkpoint"),
            (gpt2_weights.main, "export --source"), (tok.main, "encode x --tokenizer"), (tok.main, "train --data"),
            (data.main, "prepare --tokenizer chars.json --data"), (data.main, "show --view messages"),
            (data.main, "show --view instructions")]:
        for path in ("folder", "nothing.here"):
            line = refused(capsys, main, [*argv.split(), path], 1, path)
            assert not (path == "folder" and "does not exist" in line), line


def test_damaged_or_foreign_merges_are_refused(tmp_path):
    """GPT-2's two files, swapped, cut, doubled, out of order, of two tokenizers: one line that names the file."""
    mine, other = (BPETokenizer.train([text], 280) for text in ("low lower lowest " * 9, "new newer " * 9))
    gpt2_weights.export_tokenizer(mine, tmp_path / "mine", 64)
    gpt2_weights.export_tokenizer(other, tmp_path / "other", 64)
    vocab, merges = tmp_path / "mine" / "vocab.json", tmp_path / "mine" / "merges.txt"
    assert BPETokenizer.from_gpt2_files(vocab, merges).merges == mine.merges
    lines = merges.read_text(encoding="utf-8").split("\n")
    broken = {"cut": "\n".join(lines[:6] + [""]), "half": "\n".join(lines[:6]),
              "twice": "\n".join([*lines[:-1], lines[2], ""]), "none": "",
              "order": "\n".join([lines[0], *lines[3:], *lines[1:3], ""]), "binary": "#version\n\0\1\n"}
    for name, text in broken.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{name} is corrupt|does not match .*{name}"):
            BPETokenizer.from_gpt2_files(vocab, tmp_path / name)
    for pair in ((merges, vocab), (vocab, tmp_path / "other" / "merges.txt")):
        with pytest.raises(ValueError, match="corrupt|does not match"):
            BPETokenizer.from_gpt2_files(*pair)


def test_a_validation_part_without_a_window_is_refused(work, capsys):
    """A text whose last tenth is shorter than the context: status 1, how many tokens there are and are needed."""
    Path("short.txt").write_text("a cat and a dog " * 6, encoding="utf-8")
    refused(capsys, train.main, words_of("train", "--data", "short.txt"), 1, "have", "need at least 17",
            "--context_length")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_refuses_what_is_no_value(name, work, capsys):
    """Every flag with a number: words, nan, infinity, 1e3 for a count, and what lies beyond its limits: status 2."""
    main, command, _ = SCRIPTS[name]
    fields, tried = sys.modules[main.__module__].Config.__dataclass_fields__, 0
    assert main([command.split()[0], "--help"]) == 0
    for field in (fields[flag] for flag in re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M) if flag in fields):
        if field.type not in (int, float, "int", "float"):
            continue
        low, high = field.metadata["low"], field.metadata["high"]
        wrong = ["many", "nan", "inf", "", *(["1e3", "1.5"] if field.type in (int, "int") else [])]
        wrong += [str(low - 1)] if low is not None else []
        wrong += [str(high + 1)] if high is not None else []
        for value in wrong:
            capsys.readouterr()
            assert main([command.split()[0], f"--{field.name}={value}"]) == 2, (field.name, value)
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and f"--{field.name}" in err and err.startswith("error: "), err
            tried += 1
    assert tried > 100 and not Path("out").exists()


def test_a_state_that_does_not_fit_or_is_not_finite_is_refused(work, capsys):
    """Weights and moments of other shapes, moments of more parameters, NaN: named, and no byte changes."""
    go("train", "--max_steps", 3)
    Path("out/pretrain/summary.json").unlink()
    good, path = Path("out/pretrain/state.pt").read_bytes(), Path("out/pretrain/state.pt")
    moments = [sorted(optimizer["state"]) for optimizer in train.read_state(path)["optimizers"]]
    assert len(moments) == 2 and all(moments)
    fit, finite = "does not fit the model", "is not finite"

    def weight(state):
        return state["model"]["pos_emb.weight"]

    def moment(state, number, index=0):
        return state["optimizers"][number]["state"][index]

    first = "optimizer 0, parameter 0"
    changes = [(lambda s: s["model"].update({"pos_emb.weight": weight(s)[:5]}), fit, "pos_emb.weight"),
               (lambda s: s["model"].pop("pos_emb.weight"), fit, "pos_emb.weight"),
               (lambda s: s["model"].update(more=weight(s)), fit, "more"),
               (lambda s: weight(s).view(-1)[3:4].fill_(math.nan), finite, "pos_emb.weight"),
               (lambda s: moment(s, 1).update(exp_avg=torch.zeros(3, 3)), fit, "optimizer 1, parameter 0"),
               (lambda s: moment(s, 0).update(momentum=torch.zeros(2)), fit, first),
               (lambda s: s["optimizers"][1]["state"].update({99: moment(s, 1)}), fit, "parameter 99"),
               (lambda s: moment(s, 0)["momentum"].view(-1)[5:6].fill_(math.inf), finite, first),
               (lambda s: moment(s, 0).clear(), fit, first),
               (lambda s: moment(s, 1, 1).pop("exp_avg_sq"), fit, "optimizer 1, parameter 1"),
               (lambda s: s["optimizers"][1]["state"].pop(2), fit, "optimizer 1, parameter 2"),
               (lambda s: s["optimizers"].pop(), fit, "the optimizers")]
    for change, *words in changes:
        state = torch.load(io.BytesIO(good), weights_only=True)
        change(state)
        torch.save(state, path)
        refused(capsys, train.main, words_of("train", "--max_steps", 3, "--resume"), 1, *words, "--fresh")
    path.write_bytes(good)
    go("train", "--max_steps", 3, "--resume")


def test_a_folder_that_cannot_be_written_ends_before_the_first_step(work, capsys, monkeypatch, steps):
    """A file in its place, no permission, a read-only disk, at the start and from the third save on."""
    Path("taken").write_text("mine", encoding="utf-8")
    command = words_of("train")
    refused(capsys, train.main, [*command, "--out_dir", "taken"], 1, "taken")
    refused(capsys, train.main, [*command, "--out_dir", "taken/below"], 1, "taken")
    real_open, allowed = builtins.open, [0]

    def read_only(path, mode="r", *rest, **named):
        if "out/pretrain" in str(path) and set(mode) & set("wax+"):
            allowed[0] -= 1
            if allowed[0] < 0:
                raise OSError(number, os.strerror(number), str(path))
        return real_open(path, mode, *rest, **named)

    for number, writes, most in ((errno.EROFS, 0, 0), (errno.EACCES, 0, 0), (errno.EROFS, 1, 0), (errno.EROFS, 12, 6)):
        shutil.rmtree("out", ignore_errors=True)
        allowed[0], steps.done = writes, 0
        monkeypatch.setattr(builtins, "open", read_only)
        refused(capsys, train.main, [*command, "--save_every", 1], 1, "out/pretrain", os.strerror(number),
                new="^out/|^data/")
        monkeypatch.setattr(builtins, "open", real_open)
        assert steps.done <= most, (number, writes)
        assert not list(Path("out").rglob("*.tmp"))
        if steps.done:
            assert 0 < train.read_state("out/pretrain/state.pt")["step"] <= steps.done
    assert steps.done  # the last case got beyond the start


@pytest.mark.filterwarnings("error")
def test_ppo_on_one_response_with_one_reward_stays_finite(work):
    """A batch of one, and rewards that are all equal: nothing to whiten; weights and all logged figures are finite."""
    same = ["--reward", "mine:same", "--no_stop_penalty", 0, "--group", 4]
    for out, flags in (("one", ["--reward", "mine:length", "--batch_size", 1]), ("same", same)):
        command = "grpo" if out == "same" else "ppo"
        argv = [command, *words_of("ppo")[1:], *map(str, flags), "--accumulate", "1", "--max_steps", "2"]
        assert rlhf.main([*argv, "--out_dir", out]) == 0
        assert all(t.isfinite().all() for t in train.read_state(f"{out}/state.pt")["model"].values())
        log = Path(out, "metrics.jsonl").read_text(encoding="utf-8")
        assert not re.search("NaN|Infinity", log)
        rows = [json.loads(line) for line in log.splitlines()]
        assert [row["objective/scores_std"] for row in rows if "objective/scores_std" in row] == [0.0, 0.0]


@pytest.mark.parametrize("name, value", [("train", math.inf), *(
    pytest.param(name, math.nan, marks=pytest.mark.slow) for name in FIRST)])
def test_a_gradient_that_is_not_finite_stops_before_the_update(name, value, work, capsys, monkeypatch, steps):
    """One bad number in the gradients of step 3: status 1, the step and the first examples of its batch named, and the
    state is that of step 2, finite."""
    main, command, _ = SCRIPTS[name]
    module, real, seen = sys.modules[main.__module__], torch.Tensor.backward, []
    batches = module.batches

    def recorded(*args, **named):
        for indices in batches(*args, **named):
            seen.append(indices)
            yield indices

    def backward(loss, *args, **named):
        real(loss, *args, **named)
        if steps.done == 2:
            parameter_behind(loss).grad.view(-1)[0] = value

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(module, "batches", recorded)
    line = refused(capsys, main, [*command.split(), "--save_every", 1, "--out_dir", "bad"], 1, "step 3",
                   "gradient norm", "nothing was updated", "bad keeps", "--learning_rate", new="^bad/|^data/|mine")
    assert len(seen) == 3 and seen[2] != seen[1]
    assert line.partition("this batch, examples ")[2].startswith(", ".join(map(str, seen[2][:8])))
    state = train.read_state("bad/state.pt")
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["model"].values())


def parameter_behind(loss):
    """Return a parameter that a loss was computed from."""
    nodes = [loss.grad_fn]
    while not hasattr(nodes[-1], "variable"):
        nodes += [node for node, _ in nodes.pop().next_functions if node is not None]
    return nodes[-1].variable


def test_a_file_that_is_no_model_is_one_line_wherever_one_is_wanted(work, capsys):
    """Eight kinds of wrong file, under twelve flags: status 1, the path, nothing written."""
    good, (model, tokenizer, made) = Path("base.safetensors").read_bytes(), gpt.load_checkpoint("base.safetensors")
    with torch.no_grad():
        model.pos_emb.weight[3, 3] = math.nan
    gpt.save_checkpoint("nan.safetensors", model, tokenizer, **made)
    gpt.write_safetensors("bare.safetensors", {"w": torch.zeros(2)})
    kinds = {"empty": b"", "page": b"<!DOCTYPE html><html><body>Sign in</body></html>", "cut": good[:-1],
             "longer": good + b"x", "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
             "flipped": good[:-9] + bytes([good[-9] ^ 8]) + good[-8:]}
    for name, content in kinds.items():
        Path(f"{name}.safetensors").write_bytes(content)
    for name in (*kinds, "nan", "bare"):
        for main, argv in MODELS:
            refused(capsys, main, [*argv.split(), f"{name}.safetensors"], 1, f"{name}.safetensors")


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_data_and_a_damaged_state_are_one_line_in_every_script(name, work, capsys):
    """Empty, other bytes, cut, another form: the path; a state with one flipped bit: the state, and --fresh."""
    main, command, folder = SCRIPTS[name]
    argv, kind = command.split(), {"train": "txt", "cls": "tsv"}.get(name, "json")
    wrong = {"empty": b"", "bytes": b"\xff\xfe\x00", "nul": b"a\tb\0\n" * 9}
    if kind == "json":
        wrong |= {"cut": Path(argv[argv.index("--data") + 1]).read_bytes()[:-9], "dict": b'{"a": 1}',
                  "nan": b'[{"a": NaN}]', "deep": b"[" * 10**5, "page": b"<html></html>", "list": b"[[]]",
                  "twice": b'[{"a": "b", "a": "c"}]'}
    for word, content in wrong.items():
        Path(f"{word}.{kind}").write_bytes(content)
        refused(capsys, main, [*argv, "--data", f"{word}.{kind}"], 1, f"{word}.{kind}")
    go(name, "--max_steps", 1)
    Path(folder, "summary.json").unlink()  # a finished run is not continued, so its state is not read
    path = Path(folder, "state.pt")
    good = path.read_bytes()
    weights = max(train.read_state(path)["model"].values(), key=torch.numel)
    at = good.index(gpt.tensor_bytes(weights).raw)  # not among the zip's padding
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    refused(capsys, main, [*argv, "--max_steps", 1, "--resume"], 1, f"{folder}/state.pt is damaged", "--fresh")
    refused(capsys, main, [*argv, "--max_steps", 1], 2, "holds a run", "--resume", "--fresh")


def test_any_prompt_is_continued_or_refused_in_one_line(work, capsys):
    """Nothing, a blank, far more than the context, a lone surrogate, the name of a special token."""
    base = ["generate", "--checkpoint", "base.safetensors", "--max_new_tokens", "3", "--prompt"]
    for prompt in ("", " ", "word " * 100, "<|endoftext|>"):
        assert gpt.main([*base, prompt]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(prompt) and ("only the last 64" in err) == (len(prompt) > 64)
    refused(capsys, gpt.main, [*base, "caf\udce9"], 2, "not UTF-8")


def test_sampling_options_outside_their_range_are_refused(work, capsys):
    """Status 2 and the flag, for each wrong value; the ends of the range, and greedy at 0, work."""
    base = ["generate", "--checkpoint", "base.safetensors", "--prompt", "a"]
    wrong = ("temperature -1 nan inf x|top_k 0 -3 1.5|top_p 0 1.1 nan|min_p -0.1 1.1 nan|repetition_penalty 0 -1 nan|"
             f"repetition_penalty inf|max_new_tokens -1 1e3|num_samples 0 -1|seed -1 {2**70} x")
    for flag, *values in (row.split() for row in wrong.split("|")):
        for value in values:
            refused(capsys, gpt.main, [*base, f"--{flag}={value}"], 2, flag)
    for flags in ("--temperature 0", "--max_new_tokens 0", "--top_k 9999", "--top_p 1", "--min_p 1", f"--seed {2**62}"):
        assert gpt.main([*base, "--max_new_tokens", "2", *flags.split()]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_output_that_ends_or_cannot_show_a_character(work):
    """A reader that goes away ends it quietly, a full disk in one line, and ASCII shows what it can."""
    python = [sys.executable, str(ROOT / "gpt.py"), "--checkpoint", "base.safetensors", "--prompt", "a"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}

    def run(command, **options):
        return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=120, **options)

    read, write = os.pipe()
    os.close(read)
    done = run([*python, "--num_samples", "30"], stdout=write)
    os.close(write)
    assert done.returncode in (0, 141) and done.stderr == ""
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run(python, stdout=full)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    tokenizer = CharTokenizer.train(["é"])
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 8, 8, 2, 1, 0.0))
    gpt.save_checkpoint("accents.safetensors", model, tokenizer)
    done = run([*python[:3], "accents.safetensors", "--prompt", "é", "--max_new_tokens", "2"], stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("?")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def raising(error):
    """Return a function that raises an error, whatever it is called with."""
    def fails(*args, **named):
        raise error

    return fails


def replaced(path):
    """Write one small file through gpt.replacing."""
    with gpt.replacing(path) as file:
        file.write(b"new")


SAVERS = {"gpt.replacing": replaced, "tokenizer.write_file": lambda path: tok.write_file(path, "new")}


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder cannot be synced")
@pytest.mark.parametrize("saver", SAVERS)
def test_every_file_is_on_disk_before_it_has_its_name(saver, tmp_path, monkeypatch):
    """Content synced, then renamed: in any other order a power cut can leave an empty file. A state's folder is synced
    too, so that the new name lasts."""
    order, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), replace(old, new)))
    SAVERS[saver](tmp_path / "file")
    assert order == [3, "rename", "folder"][: 3 if saver == "gpt.replacing" else 2]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_only_these_savers_give_a_file_its_name():
    """In the nine files nothing else renames, but for folders that move as a whole and downloads, which are checked."""
    known = {"gpt.py": {"replacing"}, "data.py": {"download"}, "train.py": {"claim"},
             "tokenizer.py": {"write_file", "train"}}
    for path in sorted(ROOT.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {function.name for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                 for node in ast.walk(function) if isinstance(node, ast.Attribute)
                 and node.attr in ("replace", "rename", "renames", "move")
                 and getattr(node.value, "id", "") in ("os", "shutil")}
        assert found <= known.get(path.name, set()), path.name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("saver", SAVERS)
def test_a_disk_that_fills_or_fails_leaves_every_old_file(saver, number, tmp_path, monkeypatch):
    """The error names the file, the old content stays, and no temporary does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
    with pytest.raises(OSError) as caught:
        SAVERS[saver](path)
    monkeypatch.undo()
    line = gpt.explain(caught.value)
    assert str(path) in line and os.strerror(number) in line and ".tmp" not in line
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_data_is_prepared_leaves_nothing(number, work, capsys, monkeypatch):
    """data.py prepare: one line with the folder that was asked for, and nothing stands there or beside it."""
    CharTokenizer.train([" ".join(WORDS)]).save("chars.json")
    argv = ["prepare", "--data", "text.txt", "--tokenizer", "chars.json"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
        line = refused(capsys, data.main, argv, 1, "data/prepared/", "train.bin", os.strerror(number), new="^$")
    assert ".tmp" not in line and not [path for path in Path("data").rglob("*") if path.is_file()]
    assert data.main(argv) == 0 and len(list(Path("data/prepared").iterdir())) == 1


@pytest.mark.parametrize("name", TRAIN_FIRST)
def test_a_disk_that_fails_in_a_save_ends_the_run_and_keeps_the_state(name, work, capsys, monkeypatch, steps):
    """EIO when the state of step 3 is synced: one line, status 1, the state of step 2 loads, and the run goes on."""
    real = os.fsync

    def failing(descriptor):
        if steps.done == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    folder = SCRIPTS[name][2]
    refused(capsys, SCRIPTS[name][0], words_of(name, "--save_every", 1), 1, f"{folder}/state.pt",
            os.strerror(errno.EIO), new="^out/|^data/|mine")
    monkeypatch.setattr(os, "fsync", real)
    assert train.read_state(f"{folder}/state.pt")["step"] == 2 and not list(Path(folder).glob(".*.tmp"))
    go(name, "--save_every", 1, "--resume")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", TRAIN_FIRST)
def test_a_full_disk_is_named_wherever_a_run_writes(name, work, capsys, monkeypatch, steps):
    """Each file of a run in turn meets a full disk: file or folder is named, the state loads, and the run goes on."""
    main, command, folder = SCRIPTS[name]
    real, told = builtins.open, []
    for target in ("metrics.jsonl", "curves.svg", "model.safetensors", "summary.json", "samples.txt", "state.pt"):

        def full(path, mode="r", *rest, **named):
            hit = target in str(path) and folder in str(path) and mode in ("wb", "a") and steps.done > 1
            return real("/dev/full" if hit else path, mode, *rest, **named)

        shutil.rmtree("out", ignore_errors=True)
        monkeypatch.setattr(builtins, "open", full)
        status = main([*command.split(), "--save_every", "1"])
        monkeypatch.setattr(builtins, "open", real)
        err = capsys.readouterr().err
        if status:  # not every script writes each of them
            told.append(target)
            line = next(line for line in err.splitlines() if line.startswith("error:"))
            assert status == 1 and re.match(rf"error: {folder}(/{target})?: No space left on device", line)
            assert train.read_state(f"{folder}/state.pt")["step"] > 0 and not list(Path(folder).glob(".*.tmp"))
            go(name, "--save_every", 1, "--resume")
    assert {"metrics.jsonl", "curves.svg", "summary.json", "state.pt"} <= set(told)


def count_steps(patch=setattr):
    """Return an object whose `done` is the number of steps that the latest run has finished: its looks at Stop."""
    steps, begin, look = types.SimpleNamespace(done=0), train.Stop.__init__, train.Stop.__bool__

    def began(stop):
        steps.done = 0
        begin(stop)

    def looked(stop):
        steps.done += 1
        return look(stop)

    patch(train.Stop, "__init__", began)
    patch(train.Stop, "__bool__", looked)
    return steps


@pytest.fixture
def steps(monkeypatch):
    """Return the count of finished steps, see `count_steps`."""
    return count_steps(monkeypatch.setattr)


@pytest.mark.parametrize("fault", ["a bit", "the end"])
def test_a_state_that_does_not_read_back_never_gets_its_name(fault, work, capsys, monkeypatch, steps):
    """A disk that stores one wrong bit in step 3, or only the beginning: status 1, and the state of step 2 stays."""
    real = torch.save

    def wrong(state, file):
        real(state, file)
        if steps.done == 3 and fault == "the end":
            file.truncate(1000)
        elif steps.done == 3:
            weights = max(state["model"].values(), key=torch.numel)
            with open(file.name, "rb") as written:
                file.flush()
                at = written.read().index(gpt.tensor_bytes(weights).raw)
            file.seek(at)
            file.write(bytes([gpt.tensor_bytes(weights).raw[0] ^ 1]))

    monkeypatch.setattr(torch, "save", wrong)
    line = refused(capsys, train.main, words_of("train", "--save_every", 1), 1, "out/pretrain/state.pt",
                   new="^out/|^data/")
    assert ".tmp" not in line and "--fresh" not in line  # that file is gone, and the run can go on
    assert train.read_state("out/pretrain/state.pt")["step"] == 2 and not list(Path("out/pretrain").glob(".*.tmp"))


UNREADABLE = {"permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/pretrain/state.pt"),
              "fault": OSError(errno.EIO, os.strerror(errno.EIO)), "memory": MemoryError()}


@pytest.mark.parametrize("what, where", [("permission", (zipfile, "ZipFile")), ("fault", (torch, "load")),
                                         ("memory", (torch, "load"))])
def test_a_state_that_cannot_be_read_now_is_not_called_damaged(what, where, work, capsys, monkeypatch):
    """An error that is not the file's fault is told as it is, not with the advice to start anew; later it goes on."""
    stop_at("train", 1, "look", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(*where, raising(UNREADABLE[what]))
        line = refused(capsys, train.main, words_of("train", "--resume"), 1,
                       "out of memory" if what == "memory" else UNREADABLE[what].strerror)
    assert "damaged" not in line and "--fresh" not in line
    go("train", "--resume")


def test_without_network_what_needs_it_is_one_line_and_the_rest_runs(work, capsys, monkeypatch):
    """With no socket at all the four scripts run; GPT-2's tokenizer, weights and a dataset say what to put where."""
    import tiktoken.registry
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, raising(OSError(errno.ENETUNREACH, "Network is unreachable")))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(work / "cache"))
    for name in SCRIPTS:
        go(name, "--max_steps", 1)
    rows = [row for row in train.REPORT if row[2] != "facts_withheld"]  # tinyworld's alone
    for key, stages in ((row[2], row[0].split()) for row in rows):  # what the report looks for is there
        assert all(key in json.loads(path.read_text(encoding="utf-8")) for path in Path("out").glob("*/summary.json")
                   if path.parent.name in stages), key
    refused(capsys, train.main, ["--data", "text.txt", "--out_dir", "x", "--tokenizer", "gpt2"], 1,
            "TIKTOKEN_CACHE_DIR")
    refused(capsys, data.main, ["get", "verdict"], 1, "the-verdict.txt", new=r"\.lock$|^data/")
    refused(capsys, gpt2_weights.main, ["get", "--model", "gpt2"], 1, "model.safetensors", new=r"\.lock$|^data/")


def test_a_spike_of_the_loss_is_warned_of_once(work, capsys, monkeypatch, steps):
    """Ten times the loss at step 25 of 30: one warning with step and both losses; the run ends well; none without."""
    real = train.next_token_loss
    for factor, warnings in ((10, 1), (1, 0)):
        monkeypatch.setattr(train, "next_token_loss", lambda logits, targets: real(logits, targets) * (
            factor if logits.requires_grad and steps.done == 24 else 1))
        capsys.readouterr()
        go("train", "--max_steps", 30, "--fresh", "--eval_every", 0, "--save_every", 0, "--accumulate", 1)
        err = capsys.readouterr().err
        assert err.count("warning: step 25: loss ") == err.count("warning: step") == warnings
        assert warnings == 0 or "highest of the 24 steps before" in err


def test_a_clock_that_jumps_changes_nothing(work, monkeypatch):
    """A day back at every look at the wall clock, and files of the year 2040: same bits, no negative time."""
    go("train")
    expected, clock = digest("out/pretrain"), itertools.count(2**31, -86400)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    go("train", "--fresh", "--max_steps", 12)
    summary = json.loads(Path("out/pretrain/summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in open("out/pretrain/metrics.jsonl", encoding="utf-8")]
    assert digest("out/pretrain") == expected and 0 <= summary["seconds"] < 600
    assert min(row.get("tokens_per_second", 0) for row in rows) >= 0
    stop_at("train", 7, "look", monkeypatch)
    for path in Path("out/pretrain").iterdir():
        os.utime(path, (2**31 + 7e7, 2**31 + 7e7 if path.name != "state.pt" else 0))
    go("train", "--resume")
    assert digest("out/pretrain") == expected


OUT_OF_MEMORY = {  # as the CPU's allocator, CUDA and Python say it
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "python": MemoryError()}


@pytest.mark.parametrize("name, said", [("train", "cpu"), ("train", "python"), *(
    pytest.param(name, "cuda", marks=pytest.mark.slow) for name in FIRST)])
def test_out_of_memory_names_the_flags_to_lower(name, said, work, capsys, monkeypatch, steps):
    """In a step: one line, status 1, and the state of the step before it stays."""
    real = torch.Tensor.backward

    def backward(tensor, *args, **named):
        if steps.done == 2:
            raise OUT_OF_MEMORY[said]
        return real(tensor, *args, **named)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    main, command, folder = SCRIPTS[name]
    refused(capsys, main, [*command.split(), "--save_every", 1], 1, "out of memory", "--batch_size", "--context_length",
            new="^out/|^data/|mine")
    assert train.read_state(f"{folder}/state.pt")["step"] == 2


def test_a_files_name_is_no_sign_that_memory_ran_out(work, capsys):
    """A missing file whose name holds the words of the allocator's message is a missing file."""
    refused(capsys, train.main, ["--tokenizer", "memory_alloc.json"], 1, "memory_alloc.json does not exist")


def test_a_lock_ends_with_its_holder(work, capsys):
    """While a process works in a folder another is refused; killed by SIGKILL, it leaves nothing in the way."""
    pytest.importorskip("fcntl")

    def hold():
        train.Stop.__bool__ = lambda stop: (Path("ready").touch(), time.sleep(600))
        return train.main(words_of("train"))

    pid = forked(hold)
    try:
        until(Path("ready").exists)
        refused(capsys, train.main, words_of("train", "--resume"), 2, "in use by another process")
    finally:
        os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    go("train", "--resume")


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume

POINTS = {  # where a run of 12 steps is stopped, with five steps in an epoch: (step, where in it)
    "first step": (1, "look"), "in an epoch": (3, "look"), "end of an epoch": (5, "look"),
    "between the micro-batches": (7, "backward"), "after an evaluation": (8, "look"), "last but one": (11, "look")}


def digest(folder):
    """Return sha256s: of all trained weights, of the optimizers' moments, and of the best weights."""
    state = train.read_state(f"{folder}/state.pt")
    moments = [sorted(optimizer["state"].items()) for optimizer in state["optimizers"]]
    assert state["model"] and all(moments)
    last = [hashlib.sha256(repr(flat(part)).encode()).hexdigest() for part in (state["model"], moments)]
    best = sorted(hashlib.sha256(repr(flat(gpt.read_safetensors(path)[0])).encode()).hexdigest()
                  for path in Path(folder).rglob("*.safetensors"))
    return *last, best


def stop_at(name, step, place, monkeypatch, number=signal.SIGTERM, flags=()):
    """Run a script anew until the signal that it gets during `step` has stopped it."""
    backward, told = torch.Tensor.backward, []
    with monkeypatch.context() as patch:
        steps = count_steps(patch.setattr)
        counted = train.Stop.__bool__

        def in_look(stop):
            if place == "look" and steps.done == step - 1:
                stop.signal = number
            return counted(stop)

        def in_backward(tensor, *args, **named):
            backward(tensor, *args, **named)
            if place == "backward" and steps.done == step - 1 and not told:
                told.append(signal.raise_signal(number))

        patch.setattr(train.Stop, "__bool__", in_look)
        patch.setattr(torch.Tensor, "backward", in_backward)
        go(name, "--fresh", *flags, status=128 + number)
    assert train.read_state(f"{SCRIPTS[name][2]}/state.pt")["step"] == step


@pytest.mark.parametrize("name", TRAIN_FIRST + [pytest.param(name, marks=pytest.mark.slow)
                                                for name in SCRIPTS if name not in FIRST])
def test_a_run_stopped_at_six_points_ends_with_the_same_bits(name, work, monkeypatch):
    """6 of 6 for each of seven runs, 42 in all; the controls, with other random numbers or without moments, differ."""
    main, _, folder = SCRIPTS[name]
    module, lengths, equal = sys.modules[main.__module__], [], 0
    with monkeypatch.context() as patch:
        real = module.batches
        patch.setattr(module, "batches", lambda n, config, *rest, **named: (
            lengths.append(math.ceil(n / config.batch_size)), real(n, config, *rest, **named))[1])
        go(name)
    assert lengths == [5]  # steps in an epoch
    expected = digest(folder)
    for step, place in POINTS.values():
        stop_at(name, step, place, monkeypatch)
        if step == 3:
            shutil.copytree(folder, "stopped")
        go(name, "--resume")
        equal += digest(folder) == expected
    assert equal == len(POINTS) == 6
    for part in ("rng", "optimizers")[name == "dpo" :]:  # which draws nothing: its policy has no dropout
        shutil.rmtree(folder)
        shutil.copytree("stopped", folder)
        state = train.read_state(f"{folder}/state.pt")
        if part == "rng":
            state["rng"] = torch.Generator().manual_seed(99).get_state()
        else:
            for moments in (values for optimizer in state["optimizers"] for values in optimizer["state"].values()):
                moments.update({key: t if t.dim() == 0 else torch.zeros_like(t) for key, t in moments.items()})
        torch.save(state, f"{folder}/state.pt")
        go(name, "--resume")
        assert digest(folder)[0] != expected[0], part


def test_another_init_under_the_same_adapters_is_refused(work, capsys, monkeypatch):
    """With a base of the same shapes but other weights nothing changes; with the same one it goes on to the same bits."""
    flags = "--lora_rank", 2
    go("sft", *flags)
    expected, base = digest("out/sft"), Path("base.safetensors").read_bytes()
    stop_at("sft", 4, "look", monkeypatch, flags=flags)
    model, tokenizer, info = gpt.load_checkpoint("base.safetensors")
    with torch.no_grad():
        model.pos_emb.weight[0, 0] += 1
    gpt.save_checkpoint("base.safetensors", model, tokenizer, **info)
    refused(capsys, finetune_sft.main, words_of("sft", "--resume", *flags), 1, "--init base.safetensors", "--fresh")
    Path("base.safetensors").write_bytes(base)
    go("sft", "--resume", *flags)
    assert digest("out/sft") == expected


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [*((name, "SIGKILL") for name in SCRIPTS), ("train", "SIGTERM"),
                                          ("train", "SIGINT")])
def test_a_process_that_gets_a_signal_resumes_to_the_same_bits(name, number, work):
    """A real signal from outside, whenever it comes: the status is that of the signal, the end the same bits."""
    main, command, folder = SCRIPTS[name]
    number, command = getattr(signal, number, None), [*command.split(), "--max_steps", "40"]
    assert main(command) == 0
    expected = digest(folder)
    pid = forked(main, [*command, "--fresh"])
    until(lambda: Path(f"{folder}.1").exists() and Path(folder, "model.safetensors").exists())
    time.sleep(0.05)
    os.kill(pid, number)
    assert ended(pid) == (-9 if number == signal.SIGKILL else 128 + number)
    assert 0 <= train.read_state(f"{folder}/state.pt")["step"] < 40
    assert main([*command, "--resume"]) == 0 and digest(folder) == expected
    assert not list(Path(folder).glob(".*.tmp"))


@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_kill_between_writing_and_renaming_resumes_to_the_same_bits(nth, work):
    """SIGKILL at the n-th rename, its file complete but under its temporary name: the end is the same."""
    go("train")
    expected = digest("out/pretrain")

    def killed():
        real, count = os.replace, itertools.count(1)
        os.replace = lambda *names: os.kill(os.getpid(), 9) if next(count) == nth else real(*names)
        return train.main(words_of("train", "--fresh"))

    assert ended(forked(killed)) == -signal.SIGKILL
    assert len(list(Path("out/pretrain").glob(".*.tmp"))) == 1
    go("train", "--resume")
    assert digest("out/pretrain") == expected and not list(Path("out/pretrain").glob(".*.tmp"))


@pytest.mark.slow
def test_twenty_kills_while_saving_lose_nothing(work, monkeypatch):
    """A run that saves step 2 without a pause is killed at 20 random moments: the state loads each time, is never older
    than the last save that was finished, and the resumed run ends with the same bits."""
    go("train")
    expected, filler = digest("out/pretrain"), torch.arange(500_000)  # which makes a save take longer
    stop_at("train", 1, "look", monkeypatch)
    shutil.copytree("out/pretrain", "stopped")
    rng, survived, path = random.Random(0), 0, Path("out/pretrain/state.pt")

    def killed():
        real = train.save_state

        def save_without_end(folder, model, optimizers, progress, *rest):
            for number in itertools.count():
                progress.extra.update(number=number, filler=filler)
                real(folder, model, optimizers, progress, *rest)
                Path("saved").write_text(str(number), encoding="utf-8")

        train.save_state = save_without_end
        return train.main(words_of("train", "--resume", "--save_every", "1"))

    for _ in range(20):
        shutil.rmtree("out/pretrain")
        shutil.copytree("stopped", "out/pretrain")
        Path("saved").unlink(missing_ok=True)
        pid = forked(killed)
        try:
            until(Path("saved").exists)
            time.sleep(rng.uniform(0.0, 0.1))
        finally:
            os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        found, told = train.read_state(path), Path("saved").read_text(encoding="utf-8")
        kept = found["progress"]["extra"]
        survived += found["step"] == 2 and torch.equal(kept["filler"], filler) and kept["number"] >= int(told or 0)
    assert survived == 20
    go("train", "--resume")
    assert digest("out/pretrain") == expected and not list(Path("out/pretrain").glob(".*.tmp"))


def logged_steps():
    """Return the steps of the rows in the log of out/pretrain."""
    lines = Path("out/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("rest", [b'{"step": 7, "lo', b"\0\0\0\0", b'{"step": 7, "sample": "\xc3',
                                  b'7\n[7]\n"step"\nnull\n{"loss": 1}\n{"step": "x"}\n{"step": null}\n'])
def test_what_a_power_cut_leaves_is_cleared_away(rest, work, monkeypatch):
    """Half a line at the end of the log, temporary files beside model and adapter: --resume goes on to the same end."""
    go("train")
    expected, steps = digest("out/pretrain"), logged_steps()
    stop_at("train", 7, "look", monkeypatch)
    with open("out/pretrain/metrics.jsonl", "ab") as file:
        file.write(rest)
    Path("out/pretrain/adapter").mkdir()
    for name in (".state.pt.1.tmp", "adapter/.adapter_model.safetensors.1.tmp"):
        Path("out/pretrain", name).write_bytes(b"half")
    go("train", "--resume")
    assert digest("out/pretrain") == expected and not list(Path("out/pretrain").rglob("*.tmp"))
    assert logged_steps() == steps


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_in_a_save_and_twice(signals, work):
    """SIGTERM inside a save ends after it, saved, with 143; a second one ends at once, and the old state is whole."""
    go("train")
    expected, logged = digest("out/pretrain"), logged_steps()

    def told():
        real, steps = os.replace, count_steps()

        def replace(old, new):
            if steps.done == 6 and str(new).endswith("state.pt"):
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
            real(old, new)

        os.replace = replace
        return train.main(words_of("train", "--fresh"))

    assert ended(forked(told)) == (143 if signals == 1 else -signal.SIGTERM)
    assert train.read_state("out/pretrain/state.pt")["step"] == (7 if signals == 1 else 3)
    go("train", "--resume")
    assert digest("out/pretrain") == expected and logged_steps() == logged


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def damaged(content):
    """Return 20 copies of a file's bytes with one byte changed, spread over it, and 11 that end early."""
    places = [round(i * (len(content) - 1) / 19) for i in range(20)]
    return ([content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places]
            + [content[: len(content) * cut // 11] for cut in range(11)])


def test_damage_to_any_file_is_found_before_it_is_used(work):
    """155 of 155: 20 flipped bytes and 11 cuts of checkpoint, state, token file, adapter and tokenizer.

    Found means refused; what loads all the same (a byte that nothing depends on) must be equal in all that it holds."""
    go("train", "--max_steps", 2)
    assert finetune_sft.main(words_of("sft", "--max_steps", "2", "--lora_rank", "2")) == 0
    BPETokenizer.train([" ".join(WORDS) * 3], 290).save("tokenizer.json")
    prepared = next(Path("data/prepared").glob("*/train.bin"))

    def adapted(path):
        return lora.load_lora(gpt.load_checkpoint("base.safetensors")[0], Path(path).parent).state_dict()

    kinds = {"out/pretrain/model.safetensors": lambda path: gpt.load_checkpoint(path)[0].state_dict(),
             "out/pretrain/state.pt": train.read_state, prepared: lambda path: {"tokens": data.load_tokens(path)},
             "out/sft/adapter/adapter_model.safetensors": adapted,
             "tokenizer.json": lambda path: tok.load_tokenizer(path).to_dict()}
    found = 0
    for path, load in kinds.items():
        good, path = Path(path).read_bytes(), Path(path)
        whole = flat(load(path))
        for content in damaged(good):
            path.write_bytes(content)
            try:
                same = flat(load(path)) == whole
            except ValueError as error:
                names = {path.name, path.parent.name} - {""}
                same = any(name in str(error) for name in names)  # refused, by name
            found += same
            assert same, path
        path.write_bytes(good)
    assert found == 155


def flat(value):
    """Return a nested value with its tensors as bytes, so that == compares everything."""
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(part) for part in value]
    whole = value.detach().contiguous() if torch.is_tensor(value) else None
    return value if whole is None else gpt.tensor_bytes(whole).raw


# ---------------------------------------------------------------------------------------------------------------------
# Security


class Runs:
    """A value whose pickle makes a folder, the marker, when it is read as pickle reads."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class RunsEval(Runs):
    """The same through a builtin that pickle finds everywhere."""

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.marker!r})",)


def nested_storage(value):
    """Return a pickle that hides another one in the function by which torch reads storages from bytes."""
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(value),)

    buffer = io.BytesIO()
    torch.save({"model": Storage()}, buffer)
    return buffer.getvalue()


def malicious(marker):
    """Return {kind: bytes} of six files that would make the marker if anything in them were run."""
    def saved(value, **options):
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    class Module(torch.nn.Module):
        def __setstate__(self, state):
            os.mkdir(str(marker))

    globals()["Module"], Module.__qualname__ = Module, "Module"  # pickle finds it by name
    return {"zip of torch.save": saved({"format": 2, "model": Runs(marker)}), "raw pickle": pickle.dumps(Runs(marker)),
            "old torch format": saved({"format": 2, "x": Runs(marker)}, _use_new_zipfile_serialization=False),
            "eval": saved([RunsEval(marker)]), "pickle in a storage": nested_storage(Runs(marker)),
            "whole module": saved(Module())}


def test_six_kinds_of_malicious_checkpoints_run_nothing(work, capsys):
    """6 of 6, as a state, under every flag that names a model: refused in one line, the marker never appears."""
    marker = work / "marker"
    kinds = malicious(marker)
    go("train", "--max_steps", 1)
    Path("out/pretrain/summary.json").unlink()
    safe, resume = 0, words_of("train", "--max_steps", 1, "--resume")
    for content in kinds.values():
        for path in ("out/pretrain/state.pt", "bad.safetensors", "bad.pt"):
            Path(path).write_bytes(content)
        refused(capsys, train.main, resume, 1, "state.pt is damaged or not ours", "--fresh")
        for (main, argv), path in itertools.product(MODELS, ("bad.safetensors", "bad.pt")):
            refused(capsys, main, [*argv.split(), path], 1, path)
        safe += not marker.exists()
    assert safe == len(kinds) == 6
    for kind, content in kinds.items():  # the control: each of them does what it says where nobody looks
        with contextlib.suppress(Exception):
            torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists(), kind
        marker.rmdir()


def hostile_documents(tokens, n=10_000):
    """Yield n texts in which the names of special tokens stand whole, cut, doubled, nested and in odd company."""
    rng = random.Random(0)
    around = ["", " ", "\n", "a", "é", "\u200b", "\ufeff", "<", "|", ">", "<|", "|>", "\0", "\ud83d\ude00", "user: "]
    for _ in range(n):
        parts = []
        for _ in range(rng.randrange(1, 6)):
            token, cut = rng.choice(tokens), rng.randrange(1, 6)
            parts.append(rng.choice([token, token, token[:cut] + token + token[cut:], token[:-cut], token.upper(),
                                     token * 2, rng.choice(around)]))
            parts.append(rng.choice(around))
        yield "".join(parts)


def test_no_hostile_document_gives_a_special_id():
    """10,000 of 10,000 with a byte-pair tokenizer trained on such, one by one and as an array; words and characters."""
    names = ("<|endoftext|>", "<|pad|>", "<|user|>")
    texts = list(hostile_documents(names))
    bpe = BPETokenizer.train(texts[:300], 400, special_tokens=names)
    chars = CharTokenizer.train(texts[:2000], specials=True)
    words = WordTokenizer.train(texts[:300])
    special = {bpe.vocab_size - 1 - i for i in range(3)}
    assert set(bpe.encode("".join(names), allowed_special="all")) == special  # the control
    clean = 0
    for text in texts:
        ids = bpe.encode(text)
        safe = not special & set(ids)
        clean += safe and bpe.decode(ids) == tok.clean(text)
    assert clean == len(texts) == 10_000
    assert not special & set(bpe.encode_array("\n".join(texts)).tolist())
    for tokenizer in (chars, words):
        ends = {tokenizer.eot_id, tokenizer.pad_id} - {None}
        assert ends and not ends & set(tokenizer.encode(" ".join(texts[:300])))


def test_hostile_data_puts_the_end_of_text_only_where_a_document_ends(work):
    """Prepared text has as many ends as documents, whatever they say; an encoded instruction has one, its last token."""
    texts = [text for text in hostile_documents(("<|endoftext|>",), 300) if "\0" not in text and text.strip()]
    with open("hostile.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    bpe = BPETokenizer.train(texts[:50], 300)
    folder = data.prepare("hostile.jsonl", bpe)
    ids = [data.load_tokens(folder / f"{part}.bin").to(torch.int64) for part in ("train", "val")]
    ends = sum((part == bpe.eot_id).sum().item() for part in ids)
    assert ends == len(texts) > 200
    entries = [{"instruction": text, "input": text, "output": text} for text in texts[:50]]
    items = finetune_sft.encode_entries(entries, bpe, "plain", 4096, True)
    assert len(items) == 50 and all(bpe.eot_id not in ids[:-1] and ids[-1] == bpe.eot_id for ids, _ in items)


def test_a_key_in_the_environment_reaches_no_file_of_a_run(work, monkeypatch, capsys):
    """JUDGE_API_KEY and OPENAI_API_KEY while the four scripts run, finish, fail: in no file and no line."""
    canary = "sk-canary-8831"
    monkeypatch.setenv("JUDGE_API_KEY", canary)
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    for name in SCRIPTS:
        go(name, "--max_steps", 1)
        go(name, "--max_steps", 1, status=2)
    shown = capsys.readouterr()
    written = files()
    assert len(written) > 20 and canary not in shown.out + shown.err
    assert [path for path, content in written.items() if canary.encode() in content] == []
    for path in (path for path in written if zipfile.is_zipfile(path)):
        with zipfile.ZipFile(path) as archive:
            assert all(canary.encode() not in archive.read(name) for name in archive.namelist())
