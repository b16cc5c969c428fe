"""Conversations of several turns: reading, encoding, targets, what has to go, and chat at a terminal."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import finetune_sft as sft
import gpt
from tokenizer import BPETokenizer, CharTokenizer

LETTERS = CharTokenizer.train(["".join(map(chr, range(32, 127))) + "\n"], specials=True)


def talk(*texts, system=None):
    """Return messages by user and assistant in turn, behind a system message if one is given."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


def letters_model(path=None, context_length=64, seed=0, **info):
    """Return a fresh small model that reads letters, saved if a path is given."""
    torch.manual_seed(seed)
    model = gpt.GPTModel(gpt.GPTConfig(LETTERS.vocab_size, context_length, 32, 2, 2, 0.0)).eval()
    if path:
        gpt.save_checkpoint(path, model, LETTERS, **{"template": "plain", **info})
    return model


def in_letters(ids):
    """Return ids as text, an end of text as "$", an ignored target as "_"."""
    return "".join({LETTERS.eot_id: "$", gpt.IGNORE: "_"}.get(i) or LETTERS.decode([i]) for i in ids)


def from_letters(text):
    """Return the ids of a text in which "$" is an end of text."""
    return [LETTERS.eot_id if letter == "$" else LETTERS.encode(letter)[0] for letter in text]


def batch(talks, template="plain", length=99, **options):
    """Return (ids, targets) of conversations as training makes them."""
    items = sft.encode_entries([{"messages": messages} for messages in talks], LETTERS, template, length, **options)
    return data.collate(items, LETTERS.pad_id, length, LETTERS.eot_id)


# --- reading


def test_every_form_gives_the_same_messages(tmp_path, capsys):
    """messages, ShareGPT, prompt and completion, instruction and output, as JSON and as JSONL; kind stays if text."""
    one, two = talk("Hi", "Yo"), talk("Hi", "Yo", "And?", "No.", system="Be rude.")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share = [{"from": names[message["role"]], "value": message["content"]} for message in two]
    records = [{"messages": two, "kind": "rude"}, {"conversations": share}, {"prompt": "Hi", "completion": "Yo"},
               {"instruction": "Hi", "input": None, "output": "Yo", "kind": 3},
               {"messages": one, "kind": ["a"], "unseen": True}]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        found = data.read_conversations(tmp_path / name)
        assert [entry["messages"] for entry in found] == [two, two, one, one, one]
        assert [entry.get("kind") for entry in found] == ["rude", None, None, None, None]
        assert set(found[4]) == {"messages"}  # its own `kind` and `unseen` mean something else
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "rude."}]}]
    assert data.conversation({"messages": parts + two[1:]}) == two  # as OpenAI's clients may send it
    assert data.main(["show", str(tmp_path / "a.json"), "--view", "instructions"]) == 0
    assert json.dumps(two) in capsys.readouterr().out


BAD = [({"messages": [{"role": "tool", "content": "x"}]}, "message 0: unknown role 'tool'"),
       ({"messages": [*talk("a"), *talk("b", "c")]}, "message 1: the user speaks after the user"),
       ({"messages": talk("a", "b")[1:]}, "message 0: the assistant speaks first, expected system or user"),
       ({"messages": [*talk("a", "b"), *talk(system="x")]}, "message 2: the system speaks after the assistant"),
       ({"messages": [*talk("a"), {"role": "assistant", "content": None}]}, "message 1: 'content' must be text"),
       ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 0: 'content' must be text, not list"),
       ({"messages": [{"content": "a"}]}, "message 0: 'role' is missing"), ({"messages": None}, "must be a list"),
       ({"messages": ["a"]}, "message 0: expected an object"), ({"conversations": {"a": 1}}, "must be a list"),
       ({"conversations": [{"from": "bing", "value": "x"}]}, "unknown role 'bing'"),
       ({"conversations": talk("a", "b")}, "'from' is missing"), ({"prompt": 5, "completion": "x"}, "'prompt' must be"),
       ({"prompt": "x"}, "'instruction' is missing")]


@pytest.mark.parametrize("record, said", BAD)
def test_what_breaks_a_rule_is_refused_with_file_and_entry(tmp_path, capsys, record, said):
    """One line on stderr, for each rule; the file is named with the number of the entry."""
    (tmp_path / "a.json").write_text(json.dumps([{"messages": talk("a", "b")}, record]), encoding="utf-8")
    letters_model(tmp_path / "m.safetensors")
    argv = ["--data", f"{tmp_path}/a.json", "--init", f"{tmp_path}/m.safetensors", "--out_dir", f"{tmp_path}/out"]
    assert sft.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "a.json[1]" in error and said in error


def test_a_question_at_the_end_is_cut_off_and_silence_is_left_out(tmp_path, capsys):
    """Both are counted; a conversation of which no answer is left goes, and so does one with an empty answer."""
    records = [talk("a", "b", "c"), talk("a"), [], talk("a", " ", "c", "d"), talk("a", "b"), talk(system="x")]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages} for messages in records]), encoding="utf-8")
    assert [entry["messages"] for entry in data.read_conversations(tmp_path / "a.json")] == [talk("a", "b")] * 2
    said = capsys.readouterr().err
    assert "2 of 6 conversations end with a question" in said and "4 of 6 entries have an empty" in said
    assert said.endswith("a.json[1]\n")


# --- encoding and targets


def test_three_turns_have_the_targets_that_are_written_here():
    """Letter by letter: each answer with the blank before it and the end behind it, and nothing of what others say."""
    messages = talk("ab?", "c.", "d?", "ef.", "g?", "h.", system="S")
    ids, targets = batch([messages])
    assert in_letters(ids[0].tolist()) == "S\nab?\n> c.$d?\n> ef.$g?\n> h."
    assert in_letters(targets[0].tolist()) == "______ c.$____ ef.$____ h.$"
    everything = batch([messages], mask_prompt=False)[1]
    assert in_letters(everything[0].tolist()) == "\nab?\n> c.$d?\n> ef.$g?\n> h.$"
    ids, targets = batch([talk("Hi <|endoftext|>", "Yo.", "And?", "No.", system="S")], "chat", 120)
    text = "S\n\nUser: Hi <|endoftext|>\n\nAssistant: Yo.$User: And?\n\nAssistant: No.$"
    assert in_letters(ids[0].tolist()) == text[:-1]  # the user's words make no special token
    assert in_letters(targets[0].tolist()) == re.sub(r"[^$]*?Assistant:( [^$]*\$)", lambda found: "_" * (
        len(found[0]) - len(found[1])) + found[1], text)[1:]
    for refused in (messages, talk("a", "b", "c"), talk("a", "b", system="x")):
        with pytest.raises(ValueError, match="one question and its answer.*--template chat"):
            batch([refused], "alpaca")


def test_one_turn_is_the_prompt_and_the_response_of_before():
    """What prompt, response and end encoded apart give, for entries of each form; `messages` wins over other fields."""
    entries = data.tinyworld("instructions", "train", 100)
    tokenizer = BPETokenizer.train([data.prompt_of(entry) + entry["output"] for entry in entries], 300)
    for template in ("plain", "alpaca", "chat"):
        for entry in entries:
            flat = {key: entry[key] for key in ("instruction", "input", "output")}
            prompt = tokenizer.encode(data.format_prompt(flat, template))
            answer = [*tokenizer.encode(data.format_response(flat["output"], template)), tokenizer.eot_id]
            expected = [(prompt + answer, [0] * len(prompt) + [1] * len(answer))]
            for same in (flat, {"messages": data.messages_of(flat), **dict.fromkeys(flat, "no")}):
                assert sft.encode_entries([same], tokenizer, template, 4096) == expected
                assert data.prompt_of(same) == data.format_prompt(flat, "plain").removesuffix("\n>")
    two = {"messages": talk("Who?", "Tom.", "Where?", "Here."), "instruction": "no", "input": "no", "output": "no"}
    assert data.prompt_of(two) == "Who?\n> Tom.\nWhere?"
    assert data.last_turn(two) == (talk("Who?", "Tom.", "Where?"), "Here.")
    assert data.last_turn({"prompt": "x"}) == (talk("x"), "")


# --- what is too long


def test_early_turns_go_first_and_whole_and_the_system_message_never():
    """At every length: the longest end of the conversation that fits, found by trying all of them."""
    messages, seen = talk("aaa?", "bb.", "c?", "dddd.", "ee?", "f.", system="Sys"), set()
    texts = ["aaa?\n> bb.$", "c?\n> dddd.$", "ee?\n> f.$"]
    ends = ["Sys\n" + "".join(texts[first:]) for first in range(3)]
    asked = [text.removesuffix(" f.$") for text in ends]
    for length in range(4, 40):
        items = sft.encode_entries([{"messages": messages}], LETTERS, "plain", length)
        assert len(items) == (length >= len(asked[-1]))  # else no token of an answer would be left
        if items:
            assert in_letters(items[0][0]) == next((text for text in ends if len(text) - 1 <= length), ends[-1])
        fitting = [number for number, text in enumerate(asked) if len(text) <= length]
        if fitting:
            ids, dropped = sft.prompt_ids(messages[:-1], LETTERS, "plain", length)
            assert (in_letters(ids), dropped) == (asked[fitting[0]], 2 * fitting[0])
            seen.add(dropped)
        else:
            with pytest.raises(ValueError, match="room for"):
                sft.prompt_ids(messages[:-1], LETTERS, "plain", length)
    assert seen == {0, 2, 4} and sft.prompt_ids(talk("a", "b", "c"), LETTERS, "alpaca", 999)[1] == 2
    for wrong in ([], talk("a", "b")):
        with pytest.raises(ValueError, match="ends with a message of the user"):
            sft.prompt_ids(wrong, LETTERS, "plain", 99)


def test_a_file_of_conversations_trains_and_is_answered_in_its_last_turn(tmp_path, monkeypatch):
    """The second question can only be answered from the first turn: learned, scored, shown; too long is counted."""
    monkeypatch.chdir(tmp_path)
    letters_model("base.safetensors", 48)
    talks = [talk(f"{i} {letter}?", "k", "?", letter) for i in range(60) for letter in "ab"]
    talks += [talk(long * 60 + str(i), "k", *more) for i in range(20) for long, more in (("z", "?a"), ("y", ""))]
    Path("a.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in talks), encoding="utf-8")
    flags = "--data a.jsonl --init base.safetensors --template plain --epochs 8 --batch_size 16 --max_new_tokens 3"
    assert sft.main([*flags.split(), "--optimizer", "muon", "--learning_rate", "0.03", "--warmup_steps", "5"]) == 0
    report = json.loads(Path("out/sft/summary.json").read_text(encoding="utf-8"))["data_report"].values()
    assert sum(part["dropped"] for part in report) == 20 and sum(part["truncated"] for part in report) == 0
    rows = json.loads(Path("out/sft/responses.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if re.fullmatch(r"\d+ .\?\n> k\n\?", row["prompt"])]
    assert all(row["reference"] == row["prompt"].split()[1][0] for row in rows)
    assert sum(row["response"] == row["reference"] for row in rows) > 0.9 * len(rows) > 5, rows
    parts = sft.load_entries(sft.Config(data="a.jsonl"), "train", "val", "test")
    first, second, third = ({entry["messages"][0]["content"] for entry in part} for part in parts)
    assert not first & second and not (first | second) & third


# --- chat


def greedy(model, text, n=6):
    """Return the model's next letters after a text in which "$" is an end of text, without a cache."""
    ids, new = from_letters(text), []
    while len(new) < n and LETTERS.eot_id not in new:
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return in_letters(new).rstrip("$").lstrip()


def test_a_piped_chat_remembers_and_obeys_and_respond_forgets(tmp_path, monkeypatch, capsys):
    """Answers are those to the text of all turns; /new, /system, /model and /temperature do what they say."""
    monkeypatch.chdir(tmp_path)
    model, other = letters_model("a", seed=4), letters_model("b", seed=5, stage="sft", data="mine.json")

    def said(command, *lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert sft.main([command, "--checkpoint", "a", "--max_new_tokens", "6"]) == 0
        shown = capsys.readouterr()
        return shown.out.split("\n")[:-1], shown.err

    first, alone = greedy(model, "Hi\n>"), greedy(model, "And\n x\n>")
    second = greedy(model, f"Hi\n> {first}$And\n x\n>")
    assert second != alone and said("chat", "Hi", "", "And\\n x")[0] == [first, second]
    assert said("respond", "Hi", "And\\n x")[0] == said("chat", "Hi", "/new", "And\\n x")[0] == [first, alone]
    told = said("chat", "/system S", "Hi", "/new", "Hi", "/system", "Hi")[0]
    assert told == [greedy(model, "S\nHi\n>")] * 2 + [first]
    out, err = said("chat", "Hi", "/model b", "Hi")
    assert out == [first, greedy(other, "Hi\n>")] and "b: sft, on mine.json; /help lists commands; ask it" in err
    assert len(set(said("chat", "/temperature 9", *["Hi", "/new"] * 4)[0])) > 1
    wrong = ("/model none", "/temperature -1", "/temperature nan", "/temperature x", "/dance")
    out, err = said("chat", *wrong, "x" * 70, "Hi")
    assert out == [first] and [line[:17] for line in err.splitlines()[1:]] == [
        "(none does not ex", *["(temperature must"] * 2, "(could not conver", "(unknown command ", "(the question has"]


@pytest.mark.parametrize("template, system", [("plain", "Be"), ("plain", None), ("alpaca", None)])
def test_a_long_chat_sees_what_the_whole_conversation_would_show(monkeypatch, template, system):
    """At each of 60 turns the prompt is that of all messages so far, though the forgotten ones are not encoded."""
    model, prompts, encoded = letters_model(context_length=200), [], []
    everything, kept = talk(system=system), talk(system=system)
    real, format_messages = sft.stream_answer, sft.format_messages
    monkeypatch.setattr(sft, "stream_answer", lambda model, tokenizer, prompt, *args, **more:
                        prompts.append(prompt) or [("Yo.", [], None)])
    monkeypatch.setattr(sft, "format_messages", lambda messages, template:
                        encoded.append(len(messages)) or format_messages(messages, template))
    config = sft.Config(max_new_tokens=4)
    for turn in range(60):
        question = f"{turn}" * (1 + turn * 7 % 10)
        everything += talk(question)
        expected = sft.prompt_ids(everything, LETTERS, template, 196)[0]
        encoded.clear()
        kept = sft.say(model, LETTERS, template, kept, question, config, None)
        assert prompts[-1] == expected and encoded[0] < 50
        everything.append({"role": "assistant", "content": "Yo."})


def test_a_model_that_cannot_be_had_leaves_the_conversation(tmp_path, monkeypatch, capsys):
    """A path below a file, and a download without a network, are one line each; the next answer knows the first."""
    def offline(config, made_by):
        raise ConnectionError("no network")

    model, met = letters_model(tmp_path / "a", seed=4), sft.load_start
    monkeypatch.setattr(sft, "load_start", lambda config, made_by:
                        (offline if config.init == "gpt2" else met)(config, made_by))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hi\n/model {tmp_path}/a/below\n/model gpt2\nAnd\n"))
    assert sft.main(["chat", "--checkpoint", str(tmp_path / "a"), "--max_new_tokens", "6"]) == 0
    shown, first = capsys.readouterr(), greedy(model, "Hi\n>")
    assert shown.out.split("\n")[:-1] == [first, greedy(model, f"Hi\n> {first}$And\n>")]
    assert "a/below does not exist" in shown.err and shown.err.endswith("(no network)\n")


def test_chat_takes_the_best_model_there_is_and_never_trains(tmp_path, monkeypatch, capsys):
    """PPO's, else the tuned one, else the one that comes along; without any, one line says which command makes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "MODELS", ("ppo", "sft", "small"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert sft.main(["chat"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "small does not exist; make it with: python finetune_sft.py" in error
    asked = [data.messages_of(entry)[0]["content"]
             for entry in data.tinyworld("instructions", "test", 3, kinds=("compare", "plural", "passive"))]
    for name in reversed(sft.MODELS):
        letters_model(name, stage="ppo", data="tinyworld")
        assert sft.main(["chat"]) == 0
        shown = capsys.readouterr().err
        assert shown.startswith(f"{name}: ppo, on tinyworld") and shown.count("\n") == 4
        assert all(question in shown for question in asked)
    assert sorted(os.listdir()) == sorted(sft.MODELS)


# Signals go to a thread that sleeps, so no Ctrl-C interrupts a read, as if it had come just before it.
CHILD = """
import fcntl, signal, sys, termios, threading, time
import finetune_sft
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
threading.Thread(target=time.sleep, args=(999,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
sys.exit(finetune_sft.main(["chat", *sys.argv[1:]]))
"""


def terminal(path, *flags):
    """Return (child, ask) of `chat` in a pseudo-terminal: ask(typed, pattern) returns what is shown up to a pattern.

    A Python of its own: a fork of this process, in which torch has threads, may wait for them forever."""
    side, inner = pytest.importorskip("pty").openpty()
    argv = [sys.executable, "-c", CHILD, "--checkpoint", str(path), "--device", "cpu", *flags]
    child = subprocess.Popen(argv, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
                             cwd=Path(sft.__file__).parent)
    os.close(inner)
    shown, limit = [""], time.monotonic() + 120

    def ask(typed, pattern="\n> "):
        os.write(side, typed.encode())
        while not (found := re.search(pattern, shown[0])):
            assert time.monotonic() < limit, shown
            if select.select([side], [], [], 0.1)[0]:
                shown[0] += os.read(side, 9999).decode()
        before, shown[0] = shown[0][: found.end()], shown[0][found.end() :]
        return before

    ask("", "> ")
    return child, ask


def test_a_terminal_streams_and_ctrl_c_stops_the_answer_alone(tmp_path):
    """An answer of thousands of letters appears before it ends, is stopped and forgotten; an empty line ends with 0."""
    model = letters_model(context_length=8192)
    with torch.no_grad():  # it says "x" for ever
        model.final_norm.weight.zero_()
        model.final_norm.bias.fill_(1.0)
        model.out_head.weight.zero_()
        model.out_head.weight[LETTERS.encode("x")[0]] = 1.0
    gpt.save_checkpoint(tmp_path / "x", model, LETTERS, template="plain")
    child, ask = terminal(tmp_path / "x", "--max_new_tokens", "4096")
    ask("Hi\n", "xxxx")
    assert ask("\x03", r"\(stopped.*\r\n> ").count("x") < 4096
    assert "unknown command /dance" in ask("/dance\n")
    ask("\n", "")
    assert child.wait(60) == 0


def test_a_full_context_says_what_goes_and_ctrl_c_at_the_prompt_ends(tmp_path):
    """Once the context of 64 is full early turns go in pairs, which each turn says, and /new does not; status 130.

    What has gone is not kept, so that a long chat takes no more time and memory at each turn."""
    letters_model(tmp_path / "a", seed=4)
    child, ask = terminal(tmp_path / "a", "--max_new_tokens", "6")
    ask("/system SSSS\n")
    said = [re.findall(r"no room for the (\d) oldest", ask(f"{number}2345678\n")) for number in range(5)]
    assert said[:2] == [[], []] and said[3:] == [["2"], ["2"]]
    ask("/new\n")
    assert "no room" not in ask("92345678\n")
    ask("\x03", "")
    assert child.wait(60) == 130
