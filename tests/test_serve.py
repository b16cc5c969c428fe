"""The server: answers equal a plain forward pass, OpenAI's client and a browser use it, no hostile request ends it.

The openai and selenium tests need `pip install openai selenium`, Chromium and its driver (Debian: chromium-driver)."""

import contextlib
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import torch

import finetune_sft as sft
import gpt
from tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
ASKED = [{"role": "user", "content": "What is the plural of fox?"}]
SAID = "Ah \U0001f600 é, foxes. No more"


@pytest.fixture(scope="module")
def tokenizer():
    """Return a byte-pair tokenizer in which an emoji is four tokens."""
    return BPETokenizer.train(["What is the plural of fox? foxes. No more."] * 3, 290)


def recite(tokenizer, text):
    """Return a model that answers `ASKED` with `text`: its blocks add nothing, position alone decides what follows."""
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 96, 96, 2, 1, 0.0))
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    model.pos_emb.weight.data.copy_(torch.eye(96) * 96)
    model.final_norm.weight.data.fill_(1)
    start = len(tokenizer.encode(ASKED[0]["content"] + "\n>")) - 1
    for position, i in enumerate(tokenizer.encode(" " + text) + [tokenizer.eot_id], start):
        model.out_head.weight.data[[tokenizer.encode(letter)[0] for letter in "bcdgjkqvwyz"], position] = 1
        model.out_head.weight.data[i, position] = 9
    return model.eval()


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    """Return a running server with two models: `drawn`, of random weights, and `recited`, which says SAID."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    drawn = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 64, 32, 2, 2, 0.0))
    drawn.out_head.weight.data.mul_(20)
    gpt.save_checkpoint(folder / "drawn.safetensors", drawn, tokenizer)
    gpt.save_checkpoint(folder / "recited.safetensors", recite(tokenizer, SAID), tokenizer)
    checkpoint = f"{folder}/drawn.safetensors,{folder}/recited.safetensors"
    with sft.open_server(sft.Config(checkpoint=checkpoint, port=0, device="cpu")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(server, method, path, body=None, headers=()):
    """Return (status, headers, content) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def ask(server, model="drawn", messages=ASKED, **fields):
    """Return the reply, JSON, to a request that must succeed; for a streamed one the list of its events."""
    status, _, content = send(server, "POST", "/v1/chat/completions", {"model": model, "messages": messages, **fields})
    assert status == 200, content
    if not fields.get("stream"):
        return json.loads(content)
    *events, done, rest = content.decode().split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def until(condition):
    """Wait until condition() is true; a minute without that fails the test."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def drawn_by(server):
    """Return the model `drawn`, its tokenizer and the ids of `ASKED`."""
    model, tokenizer, _, _ = server.models["drawn"]
    return model, tokenizer, tokenizer.encode(ASKED[0]["content"] + "\n>")


@torch.no_grad()
def test_answers_and_logprobs_are_those_of_a_plain_forward_pass(server):
    """Greedy ids, their log-probabilities and the five likeliest, from one pass over the whole text without a cache."""
    model, tokenizer, prompt = drawn_by(server)
    reply = ask(server, logprobs=True, top_logprobs=5, max_tokens=12)
    choice = reply["choices"][0]
    ids, scores = choice["token_ids"], choice["logprobs"]["content"]
    expected = torch.log_softmax(model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 :], dim=-1)
    assert ids == expected[:-1].argmax(dim=-1).tolist() and len(ids) == 12 == reply["usage"]["completion_tokens"]
    assert choice["message"]["content"] == tokenizer.decode(ids).lstrip()
    for i, row, score in zip(ids, expected, scores, strict=False):
        assert score["id"] == i and math.isclose(score["logprob"], row[i].item(), abs_tol=1e-5)
        values, best = row.topk(5)
        assert [top["id"] for top in score["top_logprobs"]] == best.tolist()
        assert [top["logprob"] for top in score["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-5)
        assert score["token"] == tokenizer.decode([i])
    assert choice["finish_reason"] == "length" and reply["usage"]["prompt_tokens"] == len(prompt)


def test_logprobs_ignore_temperature_and_the_end_has_one(server):
    """They belong to the model; behind the last token stands the end of text, which is not among the ids."""
    plain, hot = (ask(server, "recited", logprobs=True, top_logprobs=2, temperature=t, seed=1)["choices"][0]
                  for t in (0, 0.5))
    assert plain["logprobs"] == hot["logprobs"] and plain["finish_reason"] == "stop"
    assert plain["logprobs"]["content"][-1]["token"] == "<|endoftext|>"
    assert len(plain["logprobs"]["content"]) == len(plain["token_ids"]) + 1 and plain["message"]["content"] == SAID


def test_a_stream_is_the_whole_answer_in_whole_characters(server):
    """Text and ids joined are those of the whole answer; the emoji of four tokens and é of two come in one piece."""
    whole = ask(server, "recited")["choices"][0]
    choices = [event["choices"][0] for event in ask(server, "recited", stream=True)]
    pieces = [choice["delta"]["content"] for choice in choices]
    assert "".join(pieces) == SAID == whole["message"]["content"]
    assert sum((choice["token_ids"] for choice in choices), []) == whole["token_ids"]
    assert any("\U0001f600" in piece for piece in pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 8 and choices[0]["delta"]["role"] == "assistant" and "role" not in choices[1]["delta"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    for seed in range(2):  # bytes at random, halves of characters among them
        drawn = {"temperature": 2, "seed": seed}
        deltas = [event["choices"][0]["delta"]["content"] for event in ask(server, stream=True, **drawn)]
        assert "".join(deltas) == ask(server, **drawn)["choices"][0]["message"]["content"]


def test_seeds_reproduce_and_n_draws_differ(server):
    """Equal seeds give equal answers, others do not; the n answers of one request differ; no seed, no repetition."""
    drawn = [ask(server, temperature=1, n=3, **seed)["choices"] for seed in ({"seed": 5}, {"seed": 5}, {"seed": 6}, {})]
    ids = [[choice["token_ids"] for choice in choices] for choices in drawn]
    assert ids[0] == ids[1] and ids[0] != ids[2] and ids[2] != ids[3]
    assert [choice["index"] for choice in drawn[0]] == [0, 1, 2] and ids[0][0] != ids[0][1]
    greedy = ask(server)["choices"][0]["token_ids"]
    for narrow in ({"top_k": 1}, {"top_p": 0.0001}, {"temperature": 0}):
        assert ask(server, **{"temperature": 2, **narrow})["choices"][0]["token_ids"] == greedy


def test_stop_strings_end_an_answer_and_are_not_in_it(server):
    """The first of them counts, also across tokens; in a stream no part of it is sent."""
    for stop, left in ((". No", "Ah \U0001f600 é, foxes"), (["more", "foxes"], "Ah \U0001f600 é, "), ("zebra", SAID)):
        whole = ask(server, "recited", stop=stop)["choices"][0]
        deltas = [event["choices"][0]["delta"]["content"] for event in ask(server, "recited", stop=stop, stream=True)]
        assert whole["message"]["content"] == "".join(deltas) == left and whole["finish_reason"] == "stop"
    limits = ask(server, "recited", max_tokens=2), ask(server, "recited", max_tokens=9, max_completion_tokens=2)
    assert [(len(reply["choices"][0]["token_ids"]), reply["choices"][0]["finish_reason"]) for reply in limits] \
        == [(2, "length")] * 2


@torch.no_grad()
def test_an_answer_goes_on_from_exact_ids(server):
    """The ids before the click stay, the clicked one follows, and the rest is drawn as if it had been drawn first."""
    model, _, prompt = drawn_by(server)
    first = ask(server, logprobs=True, top_logprobs=10, max_tokens=20)["choices"][0]
    for place in (0, 3, len(first["token_ids"]) - 1):
        kept = first["token_ids"][:place]
        clicked = first["logprobs"]["content"][place]["top_logprobs"][4]["id"]
        changed = {"continue_ids": kept + [clicked], "max_tokens": 5}
        ids = ask(server, **changed)["choices"][0]["token_ids"]
        assert ids[: place + 1] == kept + [clicked] and len(ids) == place + 6
        for n in range(place + 1, len(ids)):
            assert ids[n] == model(torch.tensor([prompt + ids[:n]]))[0, -1].argmax().item()
        assert ask(server, continue_ids=kept, max_tokens=20 - place)["choices"][0]["token_ids"] == first["token_ids"]
        assert sum((event["choices"][0]["token_ids"] for event in ask(server, stream=True, **changed)), []) == ids
    end = drawn_by(server)[1].eot_id
    assert ask(server, continue_ids=[*first["token_ids"][:3], end])["choices"][0]["token_ids"] == first["token_ids"][:3]


WRONG = [({"temperature": "hot"}, 400), ({"temperature": -1}, 400), ({"temperature": True}, 400), ({"top_p": 0}, 400),
         ({"top_k": 0}, 400), ({"n": 0}, 400), ({"n": 10**30}, 400), ({"seed": 1.5}, 400), ({"stop": [""]}, 400),
         ({"stop": [1]}, 400), ({"max_tokens": 0}, 400), ({"logprobs": 3}, 400), ({"top_logprobs": 21}, 400),
         ({"continue_ids": [-1]}, 400), ({"continue_ids": [10**9]}, 400), ({"continue_ids": ["a"]}, 400),
         ({"continue_ids": [5] * 99}, 400), ({"messages": []}, 400), ({"messages": [1]}, 400), ({"model": 7}, 400),
         ({"messages": [{"role": "king", "content": "x"}]}, 400), ({"messages": [{"role": "user"}]}, 400),
         ({"messages": ASKED * 2}, 400), ({"messages": [{"role": "user", "content": "fox " * 99}]}, 400),
         ({"model": "gpt-4"}, 404), ({"model": " "}, 404), ({"stream": "yes"}, 400),
         *[({name: 0.5}, 400) for name in ("presence_penalty", "frequency_penalty")],  # what is not done is not ignored
         *[({name: [{"name": "f"}]}, 400) for name in ("tools", "functions")], ({"logit_bias": {"5": -100}}, 400),
         *[({"response_format": {"type": kind}}, 400) for kind in ("json_object", "json_schema", [], 5)]]


@pytest.mark.parametrize("change, status", WRONG)
def test_a_wrong_field_is_an_error_that_names_it(server, change, status):
    """In OpenAI's form: message, type, param, code."""
    body = {"model": "drawn", "messages": ASKED, "stream": True, **change}
    got, _, content = send(server, "POST", "/v1/chat/completions", body)
    error = json.loads(content)["error"]
    assert got == status and error["param"] in {*change, None} and error["type"] == "invalid_request_error", error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_fields_that_ask_for_nothing_are_taken(server):
    """null, 0, what is empty and the format text, as OpenAI's clients may send them, and fields that change nothing."""
    plain = ask(server, max_tokens=3)["choices"]
    zeros = {"presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "functions": [], "logit_bias": {}}
    for fields in (zeros, dict.fromkeys([*zeros, "response_format"]), {"response_format": {"type": "text"}},
                   {"response_format": {}}, {"user": "me", "tool_choice": "none"}):
        assert ask(server, max_tokens=3, **fields)["choices"] == plain


def test_only_local_names_and_known_paths_are_answered(server, monkeypatch):
    """A stranger's Host (DNS rebinding), a form of another site, other paths and methods; no reply allows an origin."""
    port = server.server_port
    for host, status in ((f"localhost:{port}", 200), ("127.0.0.1", 200), ("[::1]:80", 403), ("evil.example", 403),
                         ("192.168.0.7:80", 200), (f"shire:{port}", 403),
                         (f"evil.org:{port}", 403), ("localhost.evil.org", 403), ("", 403), ("1.2.nip.io", 403)):
        assert send(server, "GET", "/v1/models", headers={"Host": host})[0] == status, host
    monkeypatch.setattr(server, "host", "shire")
    assert send(server, "GET", "/v1/models", headers={"Host": f"shire:{port}"})[0] == 200
    for method, path, status in (("GET", "/v1/models?x=1", 200), ("GET", "/../gpt.py", 404), ("OPTIONS", "/", 405),
                                 ("GET", "/assets/chat.html", 404), ("POST", "/v1/models", 404),
                                 ("GET", "/v1/chat/completions", 404), ("DELETE", "/v1/models", 405)):
        got, headers, _ = send(server, method, path)
        assert got == status and not [name for name in headers if name.lower().startswith("access-control")], path
    good = {"model": "drawn", "messages": ASKED}
    assert send(server, "POST", "/v1/chat/completions", good, {"Content-Type": "text/plain"})[0] == 400
    models = json.loads(send(server, "GET", "/v1/models")[2])["data"]
    assert [model["id"] for model in models] == ["drawn", "recited"]


def test_without_the_page_the_api_still_answers(server, monkeypatch, tmp_path):
    """GET / is the page, which loads nothing from elsewhere, or a 404 that names the API."""
    status, headers, page = send(server, "GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"http://" not in page and b"https://" not in page and page == (ROOT / "assets/chat.html").read_bytes()
    monkeypatch.setattr(sft, "__file__", str(tmp_path / "finetune_sft.py"))
    status, _, content = send(server, "GET", "/")
    assert status == 404 and b"/v1/chat/completions" in content
    assert ask(server, model=None, max_tokens=1)["model"] == next(iter(server.models))  # the first, where none is named


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def raw(**fields):
    """Return the bytes of a good request."""
    body = json.dumps({"messages": ASKED, **fields}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def hostile(rng):
    """Return the bytes of a request that nobody should send, and whether its sender then waits instead of closing."""
    good = json.dumps({"model": "drawn", "messages": ASKED}).encode()
    whole = lambda body: HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body  # noqa: E731
    cut = rng.randrange(len(good))
    name, values = rng.choice([
        (b"temperature", [b"NaN", b"Infinity", b"1e999", b"-1", b"1" * 5000, b'"0"', b"{}"]),
        (b"max_tokens", [b"1e3", b"-5", b"9" * 4000, b"[]", b"true"]), (b"stop", [b"[" * 10_000, b"[[]]"]),
        (b"messages", [b"{}", b'"x"', b"[[]]", b'[{"role": 1}]', b"[" + b"0," * 9999 + b"0]"]),
        (b"continue_ids", [b"[1e9]", b"[-1]", b"[[1]]", b"{}", b"[%d]" % 10**40])])
    sizes = [b"-1", b"x", b"9" * 50, b"1_0", b"0x1", b""]
    return rng.choice([
        *3 * [(whole(good[:-1] + b', "%s": %s}' % (name, rng.choice(values))), False)], (whole(good[:cut]), False),
        (HEAD + b"Content-Length: 500\r\n\r\n" + good[:cut], rng.random() < 0.5), (HEAD[:cut], True), (b"", True),
        (whole(b"[" * 10_000 + b"]" * 10_000), False), (whole(b"null"), False), (whole(b"\xff\xfe\0"), False),
        (HEAD + b"Content-Length: %s\r\n\r\n" % rng.choice(sizes) + good, False), (whole(b" " * (1 << 21)), False),
        (HEAD + b"Content-Length: 99999999\r\n\r\n" + good, False), (rng.randbytes(cut) + b"\r\n\r\n", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False),
        (b"GET /" + b"a" * 70_000 + b"\r\n\r\n", False), (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", False),
        (b"PRI * HTTP/2.0\r\n\r\n", False), (b"GET /v1/models\r\n\r\n", False)])


def test_200_hostile_requests_are_refused_and_the_next_good_one_is_served(server, monkeypatch, capfd):
    """Each ends in 4xx or a closed connection, slow senders after PATIENCE; the server prints no traceback."""
    monkeypatch.setattr(sft.Handler, "timeout", 0.5)
    rng, ends, wrong = random.Random(1), [], []

    def attack(request, waits):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(request)
            reply = b""
            with contextlib.suppress(OSError):
                if not waits:
                    connection.shutdown(socket.SHUT_WR)
                while block := connection.recv(1 << 16):
                    reply += block
            ends.append(reply[9:12])
            if reply and not (reply.startswith(b"HTTP/1.0 4") and b'"error"' in reply):
                wrong.append((request[:200], reply[:200]))

    for _ in range(10):
        threads = [threading.Thread(target=attack, args=hostile(rng)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == [] and len(ends) == 200 and len(set(ends)) >= 5, set(ends)
    assert ask(server, "recited")["choices"][0]["message"]["content"] == SAID
    assert "Traceback" not in capfd.readouterr().err


def test_a_slow_sender_ends_although_its_bytes_trickle_in(server, monkeypatch):
    """A byte each tenth of a second does not extend the time that a request has; a longer answer may follow it."""
    monkeypatch.setattr(sft, "PATIENCE", 0.6)
    for start in (b"GET /v1/models HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 999\r\n\r\n"):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection, \
                contextlib.suppress(OSError):
            connection.send(start)
            for _ in range(150):
                connection.send(b"y")
                time.sleep(0.1)
        assert 0.5 < time.monotonic() - began < 12
    model = server.models["recited"][0]
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **more: (time.sleep(0.1), real(*args, **more))[1])
    assert ask(server, "recited")["choices"][0]["message"]["content"] == SAID


def test_eight_requests_wait_and_the_tenth_is_refused(server):
    """While one is answered: 503 in OpenAI's form; those that waited are answered, those that left free their place."""
    replies = []
    free = lambda n: lambda: server.places._value == n  # noqa: E731
    with server.busy:
        gone = socket.create_connection(("127.0.0.1", server.server_port))
        gone.sendall(raw(model="drawn"))
        until(free(sft.WAITING))
        gone.close()
        until(free(1 + sft.WAITING))
        threads = [threading.Thread(target=lambda: replies.append(ask(server, max_tokens=2)))
                   for _ in range(1 + sft.WAITING)]
        for thread in threads:
            thread.start()
        until(free(0))
        status, _, content = send(server, "POST", "/v1/chat/completions", {"model": "drawn", "messages": ASKED})
        assert status == 503 and json.loads(content)["error"]["type"] == "server_error" and replies == []
    for thread in threads:
        thread.join()
    assert len(replies) == 1 + sft.WAITING and all(reply["choices"] == replies[0]["choices"] for reply in replies)


@pytest.mark.parametrize("stream", (True, False))
def test_a_client_that_leaves_stops_its_answer(server, monkeypatch, stream):
    """Of an answer that takes three seconds only the first steps are computed."""
    model, steps = server.models["recited"][0], []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **more: (steps.append(time.sleep(0.1)), real(*args, **more))[1])
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(raw(model="recited", stream=stream))
        until(lambda: len(steps) >= 3)
    assert server.busy.acquire(timeout=60) and len(steps) < 12
    server.busy.release()


def test_our_own_judge_can_ask_it(server):
    """--judge http://localhost:PORT/v1 --judge_model recited."""
    judge = sft.open_judge(f"http://localhost:{server.server_port}/v1", "recited")
    assert sft.ask_judge(judge, ASKED[0]["content"]) == SAID


def test_a_busy_port_and_a_model_that_is_not_there_are_one_line(server, capsys, tmp_path):
    """Status 1; nothing else is printed. A busy port says which flag changes it."""
    gpt.save_checkpoint(tmp_path / "own.safetensors", *server.models["recited"][:2])
    for name, said in (("own", "Address already in use; give another"), ("none", "python finetune_sft.py")):
        flags = ["--checkpoint", f"{tmp_path}/{name}.safetensors", "--port", str(server.server_port)]
        assert sft.main(["serve", *flags]) == 1
        shown = capsys.readouterr()
        assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
        assert (f"--port {server.server_port}" in shown.err) == (name == "own")


def test_another_address_is_listened_at_and_said_to_be_open(server, capsys, tmp_path, monkeypatch):
    """127.0.0.1 without --host; 0.0.0.0 is open to others, which one line says; an unknown name is an error."""
    gpt.save_checkpoint(tmp_path / "own.safetensors", *server.models["recited"][:2])
    bound = []
    monkeypatch.setattr(sft.http.server.ThreadingHTTPServer, "serve_forever",
                        lambda self: bound.append(self.socket.getsockname()[0]))
    for flags, host, noted in (((), "127.0.0.1", 0), (("--host", "0.0.0.0"), "0.0.0.0", 1)):
        assert sft.main(["serve", "--checkpoint", f"{tmp_path}/own.safetensors", "--port", "0", *flags]) == 0
        shown = capsys.readouterr()
        assert bound.pop() == host and f"http://{host}:" in shown.out
        assert shown.err.count("everyone who can reach this machine") == shown.err.count("\n") == noted
    assert sft.main(["serve", "--checkpoint", f"{tmp_path}/own.safetensors", "--host", "no.such.invalid"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_connection_that_closes_at_once_is_no_error(server):
    """As when Ctrl-C comes while a request starts: the thread finds its socket closed, and says nothing."""
    own, other = socket.socketpair()
    other.close(), own.close()
    sft.Handler(own, ("127.0.0.1", 0), server)  # socketserver would print the traceback of an error


@pytest.mark.slow
def test_the_command_says_its_address_and_ctrl_c_ends_it(tmp_path, tokenizer):
    """The address is where it answers; status 0, and nothing on stderr but the line of the request."""
    gpt.save_checkpoint(tmp_path / "own.safetensors", recite(tokenizer, SAID), tokenizer)
    command = [sys.executable, ROOT / "finetune_sft.py", "serve", "--checkpoint", "own.safetensors", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": ""}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])
    assert requests.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "own"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert out.split() == ["stopped"] and process.returncode == 0
    assert err.endswith('"GET /v1/models HTTP/1.1" 200 -\n') and err.count("\n") == 1


@pytest.mark.peer
def test_the_official_client_talks_to_it(server):
    """List, whole, streamed, stop, logprobs, a wrong model, a wrong parameter, all by the openai package."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
    create = lambda **more: client.chat.completions.create(model="recited", messages=ASKED, **more)  # noqa: E731
    assert [model.id for model in client.models.list()] == ["drawn", "recited"]
    whole = create(logprobs=True, top_logprobs=3, seed=1, n=2)
    assert [choice.message.content for choice in whole.choices] == [SAID] * 2 and whole.usage.prompt_tokens > 3
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3 and whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content for chunk in create(stream=True)) == SAID
    assert create(stop=["fox"]).choices[0].message.content == "Ah \U0001f600 é, "
    kept = whole.choices[0].token_ids[:4]
    assert create(extra_body={"continue_ids": kept, "top_k": 1}).choices[0].token_ids == whole.choices[0].token_ids
    with client.chat.completions.stream(model="recited", messages=ASKED) as stream:
        assert stream.get_final_completion().choices[0].message.content == SAID
    with pytest.raises(openai.NotFoundError, match="drawn, recited"):
        client.chat.completions.create(model="gpt-4o", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        create(temperature=3)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"


@pytest.mark.peer
def test_a_browser_types_sends_and_clicks_a_token(server):
    """Chromium: two answers side by side, ten likeliest in place of a token; a click draws on behind the same ids."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromedriver"):
        pytest.skip("needs chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--window-size=500,800"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    find = lambda css: driver.find_elements("css selector", css)  # noqa: E731
    tokens = lambda: [token.get_property("textContent") for token in find(".answer:last-child .token")]  # noqa: E731

    def wait(what):
        until(lambda: find("#error")[0].text or what())
        assert not find("#error")[0].text

    try:
        driver.get(f"http://127.0.0.1:{server.server_port}/")
        wait(lambda: len(find("#model option")) == 2)
        find("#text")[0].send_keys(ASKED[0]["content"] + "\n")
        wait(lambda: find("#send")[0].text == "Send" and len(find(".end")) == 2)
        before = tokens()
        assert "".join(before) == SAID + " \u25a0"
        find(".answer:last-child .token")[1].click()
        wait(lambda: len(find("#top button")) == 10)
        labels = [button.get_attribute("aria-label").rpartition(", ") for button in find("#top button")]
        assert json.loads(labels[0][0]) == before[1] and labels[0][2] == "100.0%"
        find("#top button")[3].click()
        wait(lambda: tokens() != before and find("#send")[0].text == "Send" and len(find(".end")) == 2)
        assert tokens() == [before[0], json.loads(labels[3][0]), *before[2:]] and len(labels[3][0]) == 3
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        driver.quit()
