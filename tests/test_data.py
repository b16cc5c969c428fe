"""data.py: downloads, text and records, token files, windows, splits, formats. Needs no network and no real data;
tests on real files skip where $DATA_DIR lacks them."""

import array
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
from tokenizer import BPETokenizer

ROOT = Path(data.__file__).parent
BODY = b"once upon a time\n" * 5000  # larger than one read


class Characters:
    """A tokenizer for tests: a character is a token, its id is its code point, and the end of text is the last id."""

    def __init__(self, vocab_size=300, eot=True):
        self.vocab_size, self.eot_id = vocab_size, vocab_size - 1 if eot else None

    def encode_array(self, text):
        return array.array("I", map(ord, text))

    def to_dict(self):
        return {"type": "characters", "vocab_size": self.vocab_size, "eot_id": self.eot_id}


def sha(content):
    return hashlib.sha256(content).hexdigest()


def decode(tokens):
    return "".join(map(chr, tokens.to(torch.int64).tolist()))


def write_texts(path, texts):
    """Write a .jsonl file with a text per line."""
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run every test in an empty folder, where nothing may be left under a temporary name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(data, "BACKOFF", (0.02, 0.02))
    yield
    assert not list(tmp_path.rglob("*.tmp*"))


# Downloads, from a real server on this machine ------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers each path in its own way; `seen` counts the requests."""

    seen = Counter()

    def log_message(self, *_):
        pass

    def reply(self, status=200, body=BODY, length=True, **headers):
        self.send_response(status)
        if length:
            self.send_header("Content-Length", str(len(body) if length is True else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.strip("/")
        self.seen[name] += 1
        if self.seen[name] > 1 and "once" in name:
            name = "good"
        if name in ("cut", "cut_once"):
            self.reply(body=BODY[:100], length=len(BODY))
        elif name.startswith("linked"):  # as huggingface.co answers for a large file
            tag = {"linked": f'"{sha(BODY)}"', "linked_wrong": f'"{sha(b"other")}"', "linked_git": '"0123abcd"'}[name]
            self.reply(302, b"", Location="/whole", X_Linked_Etag=tag, X_Linked_Size=len(BODY))
        elif name == "cut_without_length":
            self.reply(body=BODY[:100], length=False)
        elif name == "cut_chunk":
            self.protocol_version = "HTTP/1.1"
            self.reply(body=b"fff\r\nonce", length=False, Transfer_Encoding="chunked", Connection="close")
            self.close_connection = True
        elif name.removeprefix("once_").isdecimal():
            self.reply(int(name.removeprefix("once_")), b"no")
        elif name == "login":
            self.reply(body=b"<html>please sign in</html>", Content_Type="text/html")
        elif name in ("loop", "elsewhere"):
            self.reply(302, b"", Location={"loop": "/loop", "elsewhere": "file:///etc/hostname"}[name])
        else:
            time.sleep(0.2 if name == "slow" else 0)
            self.reply(body=self.server.zip if name == "zip" else BODY)


@pytest.fixture
def server(monkeypatch):
    """Return the address of a server that answers as `Server` says, for as long as a test runs."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Server, "seen", Counter())
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    running.address = f"http://127.0.0.1:{running.server_port}"
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """Return a function that adds a dataset `story` to the list, at paths of the server."""

    def add(*paths, sha256=sha(BODY), **more):
        urls = [path if "://" in path else f"{server.address}/{path}" for path in paths]
        entry = data.Dataset("corpus", "85 kB", "none", "nobody", "story.txt", sha256, urls, **more)
        monkeypatch.setitem(data.DATASETS, "story", entry)

    return add


def test_a_download_arrives_whole_and_leaves_no_other_file(server, tmp_path):
    """The file holds the body, the folder nothing else, and permissions are those of any new file."""
    data.download(server.address + "/good", tmp_path / "a", sha(BODY))
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == BODY
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("path", ["cut_once", "once_503", "once_408", "once_429"])
def test_a_failure_that_passes_is_tried_again(server, tmp_path, path):
    """A cut body or a busy server costs one more request."""
    data.download(f"{server.address}/{path}", tmp_path / "a", sha(BODY))
    assert (tmp_path / "a").read_bytes() == BODY and Server.seen[path] == 2


@pytest.mark.parametrize("path, tries, error, words", [
    ("cut", 3, OSError, "cut|IncompleteRead|ProtocolError"), ("cut_chunk", 3, OSError, "ProtocolError|IncompleteRead"),
    ("cut_without_length", 1, ValueError, "sha256 is .* expected"), ("login", 1, ValueError, "sha256 is .* expected"),
    ("404", 1, OSError, "404"),
    ("500", 3, OSError, "500"), ("loop", None, OSError, "redirect"), ("elsewhere", 1, OSError, "file:"),
    *((url, 0, OSError, "No connection adapters|Invalid URL")
      for url in ("file:///etc/passwd", "ftp://example.org/a", "example.org"))])
def test_a_download_that_fails_leaves_nothing_under_its_name(server, tmp_path, path, tries, error, words):
    """Refusals are final, failures that may pass are tried three times; no part of the body remains. Only web addresses
    are downloaded."""
    with pytest.raises(error, match=words):
        data.download(path if tries == 0 else f"{server.address}/{path}", tmp_path / "a", sha(BODY))
    assert list(tmp_path.iterdir()) == []
    assert tries is None or Server.seen[path] == tries


def test_the_sha256_that_a_host_names_counts_where_none_is_known(server, tmp_path):
    """X-Linked-Etag of a redirect is checked, unless it is no sha256."""
    assert data.download(server.address + "/linked", tmp_path / "a") == sha(BODY)
    assert data.download(server.address + "/linked_git", tmp_path / "b") == sha(BODY)
    with pytest.raises(ValueError, match="expected " + sha(b"other")):
        data.download(server.address + "/linked_wrong", tmp_path / "c")
    assert data.download(server.address + "/linked_wrong", tmp_path / "c", sha(BODY)) == sha(BODY)


@pytest.mark.slow
def test_several_processes_can_fetch_and_prepare_at_once(server, tmp_path):
    """Two processes start from nothing in one folder; both end well and agree."""
    code = ("import sys, data; sys.path.append('tests'); from test_data import Characters; "
            f"data.DATASETS['story'] = data.Dataset('corpus', '', '', '', 'story.txt', '{sha(BODY)}', "
            f"['{server.address}/slow']); print(data.prepare('story', Characters()))")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "NO_PROXY": "127.0.0.1"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    folders = {run.communicate()[0].decode() for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(folders) == 1
    assert len(data.load_tokens(Path(folders.pop().strip()) / "val.bin")) == len(BODY) - len(BODY) * 9 // 10


def test_a_second_address_serves_where_the_first_does_not(offer):
    """The list of addresses is tried in order until one delivers the right bytes."""
    offer("404", "login", "good", "never")
    assert data.fetch("story").read_bytes() == BODY
    assert Server.seen == {"404": 1, "login": 1, "good": 1}


def test_a_file_in_data_dir_is_used_and_one_with_a_wrong_sum_reported_not_touched(offer, monkeypatch, capsys):
    """No request is made for a good file, and none for a bad one."""
    offer("good")
    monkeypatch.setenv("DATA_DIR", "mine")
    Path("mine").mkdir()
    Path("mine/story.txt").write_bytes(BODY)
    assert data.fetch("story") == Path("mine/story.txt") and not Server.seen
    Path("mine/story.txt").write_bytes(BODY + b"!")
    assert data.main(["show", "story"]) == 1
    message = capsys.readouterr().err
    assert sha(BODY) in message and sha(BODY + b"!") in message and not Server.seen
    assert Path("mine/story.txt").read_bytes() == BODY + b"!"


def zipped(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def test_of_a_zip_only_the_expected_member_is_read(offer, server, tmp_path):
    """Other members, wherever they want to go, are never written."""
    server.zip = zipped(("story.txt", BODY), ("../evil", b"x"), ("/tmp/evil_of_test_data", b"x"))
    offer("zip", zip_sha256=sha(server.zip))
    assert data.fetch("story").read_bytes() == BODY
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "story.txt", "story.txt.zip"]
    assert not (tmp_path.parent / "evil").exists() and not Path("/tmp/evil_of_test_data").exists()


@pytest.mark.parametrize("archive", [b"no zip", zipped(("story.txt", b"other"))])
def test_another_zip_than_the_pinned_one_is_never_opened(offer, server, archive):
    """Whatever it holds, its sha256 gives it away; the file in it has one of its own."""
    server.zip = archive
    offer("zip", zip_sha256=sha(zipped(("story.txt", BODY))))
    with pytest.raises(OSError, match="sha256 is"):
        data.fetch("story")
    assert list(Path("data").iterdir()) == []
    server.zip = zipped(("story.txt", b"other"))
    offer("zip", zip_sha256=sha(server.zip))
    with pytest.raises(ValueError, match=f"sha256 is {sha(b'other')}"):
        data.fetch("story")


def test_the_list_of_datasets_is_complete():
    """Every dataset has a license and a citation; a file has an address over TLS and a sha256, or the host's."""
    assert list(data.DATASETS) == ["tinyworld", "verdict", "shakespeare", "tinystories", "tinystories_full",
                                   "sms_spam", "instructions", "alpaca", "preferences", "hh_rlhf", "hellaswag"]
    for name, dataset in data.DATASETS.items():
        assert dataset.license and dataset.citation
        assert all(url.startswith("https://") for url in dataset.urls) and bool(dataset.urls) == bool(dataset.file)
        assert len(dataset.sha256) == 64 or name == "tinyworld" or "unpinned" in dataset.citation or name == "hh_rlhf"
        assert len(dataset.zip_sha256) == (64 if dataset.urls and ".zip" in dataset.urls[0] else 0)


STORY = "Once there was a {}.\n\nIt ran {} the hill."  # TinyStories' form: <|endoftext|> between stories, on a line


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """Return (path, stories) of a made file in TinyStories' form, in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    items = [STORY.format(animal, way) for animal in ("fox", "dog", "été", "cat") for way in ("up", "down", "over")]
    (tmp_path / "stories.txt").write_bytes(("\ufeff" + "\r\n<|endoftext|>\r\n".join(items).replace("\n\n", "\r\n\r\n")
                                            + "\n<|endoftext|>\n\n<|endoftext|>").encode())
    return "stories.txt", items


@pytest.mark.parametrize("size", [1, 3, 7, 40, 1 << 17])
def test_a_separator_makes_documents_wherever_reading_pauses(stories, size, monkeypatch):
    """White space beside it goes, what is empty is no document; without it the file is one text."""
    path, items = stories
    monkeypatch.setattr(data, "PIECE", size)
    assert list(data.texts(path, " <|endoftext|>\n")) == items and len(list(data.texts(path))) == 1
    assert "".join(data.texts(path)).count("<|endoftext|>") == 13


def test_token_files_of_stories_end_each_with_the_end_of_text(stories, gpt2_tokenizer, capsys):
    """As tiktoken encodes each story by itself; without the separator it is plain characters, and a note counts them."""
    import tiktoken
    path, items = stories
    folder = data.prepare(path, gpt2_tokenizer, "<|endoftext|>")
    assert "stands" not in capsys.readouterr().err
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    for part, some in (("train", items[:10]), ("val", items[10:])):
        assert data.load_tokens(folder / f"{part}.bin").tolist() == [i for item in some for i in [*encode(item), 50256]]
        assert data.token_info(folder / f"{part}.bin")["documents"] == len(some)
    other = data.prepare(path, gpt2_tokenizer)
    error = capsys.readouterr().err
    assert "stories.txt: <|endoftext|> stands 13 times" in error and error.count("\n") == 1 and "--separator" in error
    assert other != folder and 50256 not in data.load_tokens(other / "train.bin").tolist()


def test_a_dataset_brings_its_separator_and_another_one_works_too(stories, monkeypatch, tmp_path):
    """tinystories is read as stories; a mixture and records by lines do not confuse it; white space inside is refused."""
    path, items = stories
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    shutil.copy(path, tmp_path / data.DATASETS["tinystories"].file)
    assert list(data.texts("tinystories")) == items
    Path("other.txt").write_text("a b\n====\nc <|endoftext|> d\n====\n", encoding="utf-8")
    assert list(data.texts("other.txt", "====")) == ["a b", "c <|endoftext|> d"]
    Path("lines.jsonl").write_text('{"text": "a ==== b"}\n{"text": "c"}\n', encoding="utf-8")
    assert list(data.texts("lines.jsonl", "====")) == ["a ==== b", "c"]
    assert "====" not in "".join(data.texts("other.txt,stories.txt", "===="))
    with pytest.raises(ValueError, match="'a b' must not hold white space"):
        list(data.texts("other.txt", "a b"))


@pytest.mark.parametrize("name", ["verdict", "shakespeare", "sms_spam", "instructions", "preferences"])
def test_real_files_have_the_listed_sums(real_data, monkeypatch, name):
    """`fetch` accepts the files as their publishers serve them."""
    path = real_data(data.DATASETS[name].file)
    monkeypatch.setenv("DATA_DIR", str(path.parent))
    assert data.fetch(name) == path


# Text -----------------------------------------------------------------------------------------------------------------


def test_pieces_of_a_text_have_the_tokens_of_the_whole(gpt2_tokenizer, tmp_path, monkeypatch):
    """Cut anywhere the code allows, the tokens are GPT-2's for the uncut text."""
    rng = random.Random(0)
    words = ["it", "'s", " ", "  ", "\n", "\n\n", "\t", "don't", "12", "...", "é", "日本", "🙂", "_", "\u00a0", " \n ", "x"]
    text = "".join(rng.choice(words) for _ in range(4000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(data, "PIECE", 37)
    pieces = list(data.pieces(tmp_path / "a.txt"))
    assert len(pieces) > 100 and "".join(pieces) == text
    joined = [i for piece in pieces for i in gpt2_tokenizer.encode(piece)]
    assert joined == gpt2_tokenizer.encode(text)


@pytest.mark.parametrize("prefix", [0, 1, 8191, 8192, 20_009])  # Python decodes 8 KiB at a time
@pytest.mark.parametrize("bad", [b"\xff", b"\xe6\x97", b"\xc3("])
def test_the_offset_of_a_bad_byte_is_named(tmp_path, prefix, bad):
    """Where Python's own decoder puts the error in the whole file, there our message does, across block borders too."""
    content = "é".encode() * (prefix // 2) + b"a" * (prefix % 2) + bad
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt: not UTF-8 text at byte {prefix};"):
        list(data.texts("a.txt"))


def test_a_byte_order_mark_is_dropped_and_utf_16_refused(tmp_path):
    """UTF-8 with a mark reads as without, in records too; other encodings are named as what they may be."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\nyou\r\n")
    assert list(data.texts("a.txt")) == ["hello\nyou\n"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbflabel,text\r\nham,hi\r\n")
    assert data.read_labelled("a.csv") == [("ham", "hi")]
    (tmp_path / "b.txt").write_bytes(b"old\rMac\r")
    assert list(data.texts("b.txt")) == ["old\nMac\n"]
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / "a.txt").write_bytes("hello".encode(encoding))
        with pytest.raises(ValueError, match="UTF-16"):
            list(data.texts("a.txt"))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path, capsys):
    """Text files at any depth, in any letter case, compressed or not, .jsonl line by line, no hidden ones; other kinds
    are counted. A pipe is refused, as text is read twice."""
    for name, text in {"b.txt": "B", "a/z.md": "Z", "a/c.py": "C", ".hidden.txt": "no", ".git/x.txt": "no",
                       "d.bin": "no", "c.jsonl": '{"text": "one"}\n\n{"text": "t\\u2028wo"}\n', "e.txt": "",
                       "f.TXT": "F", "G.JSONL": '{"text": "G"}', "pic.png": "no"}.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    (tmp_path / "in" / "h.txt.gz").write_bytes(gzip.compress(b"H"))
    (tmp_path / "in" / "I.Md.GZ").write_bytes(gzip.compress(b"I"))
    assert list(data.texts("in")) == ["G", "I", "C", "Z", "B", "one", "t\u2028wo", "F", "H"]
    assert "9 text files; 2 files of other kinds are not read" in capsys.readouterr().err
    (tmp_path / "FOUR.JSONL").write_text('{"text": "four"}\n')
    assert list(data.texts("FOUR.JSONL")) == ["four"]
    (tmp_path / "S.CSV").write_text("label,text\nham,hi\n")
    assert data.read_labelled("S.CSV") == [("ham", "hi")]
    os.mkfifo(tmp_path / "pipe")  # half of the work would be done before anything showed
    with pytest.raises(ValueError, match="pipe is no file of text"):
        data.prepare("pipe", Characters())


def test_a_line_of_any_length_costs_linear_time(tmp_path):
    """Four times the line, about four times the processor's time, not sixteen times."""
    seconds = {}
    for megabytes in (5, 20):
        (tmp_path / "a.jsonl").write_text('{"text": "' + "word " * (megabytes * 200_000) + '"}\n')
        start = time.process_time()
        assert [len(text) for text in data.texts("a.jsonl")] == [megabytes * 1_000_000]
        seconds[megabytes] = time.process_time() - start
    assert seconds[20] < 8 * seconds[5]


def test_a_mix_has_the_shares_it_names(tmp_path):
    """Characters come 3 to 7 to within a piece at every point, in the same order each time, till one source ends."""
    (tmp_path / "a.txt").write_text("a a\n" * 20_000)
    (tmp_path / "b.txt").write_text("b b\n" * 20_000)
    documents = list(data.texts("a.txt:0.3,b.txt:0.7"))
    assert documents == list(data.texts("a.txt:0.3,b.txt:0.7"))
    a = b = 0
    for text in documents:
        a, b = a + len(text) * ("a" in text), b + len(text) * ("b" in text)
        assert abs(0.7 * a - 0.3 * b) <= 5000
    assert b == 80_000
    assert documents == list(data.texts(" a.txt:0.3, b.txt:0.7 "))  # blanks do not count
    assert list(data.texts("a.txt, b.txt:1")) == list(data.texts("a.txt:1,b.txt"))  # a weight is 1 by default
    with pytest.raises(ValueError, match="weight"):
        list(data.texts("a.txt:0,b.txt:1"))
    for part in ("a.txt:x", "a.txt:nan", "c.txt:2"):
        with pytest.raises(FileNotFoundError, match=part.removesuffix(":2")):
            list(data.texts(part + ",b.txt:0.7"))


# Token files ----------------------------------------------------------------------------------------------------------


def test_the_verdict_has_the_published_numbers_of_tokens(gpt2_tokenizer, real_data, monkeypatch):
    """5,145 GPT-2 tokens, 4,612 and 534 when split by characters (LLMs-from-scratch, chapters 2 and 5)."""
    monkeypatch.setenv("DATA_DIR", str(real_data("the-verdict.txt").parent))
    assert len(gpt2_tokenizer.encode("".join(data.texts("verdict")))) == 5145
    folder = data.prepare("verdict", gpt2_tokenizer)
    train, val = (data.load_tokens(folder / f"{part}.bin") for part in ("train", "val"))
    assert (len(train), len(val), train.dtype) == (4612, 534, torch.uint16)
    windows = [data.SlidingWindowDataset(tokens, 256, 256, tail=False) for tokens in (train, val)]
    assert [len(window) for window in windows] == [18, 2]


def test_tiny_shakespeare_has_the_published_numbers_of_tokens(gpt2_tokenizer, real_data, monkeypatch):
    """301,966 and 36,059 GPT-2 tokens, 1,003,854 and 111,540 characters (nanoGPT's readme)."""
    monkeypatch.setenv("DATA_DIR", str(real_data("tinyshakespeare.txt").parent))
    folder = data.prepare("shakespeare", gpt2_tokenizer)
    info = [data.token_info(folder / f"{part}.bin") for part in ("train", "val")]
    assert [i["tokens"] for i in info] == [301_966, 36_059]
    assert [i["characters"] for i in info] == [i["bytes"] for i in info] == [1_003_854, 111_540]


@pytest.mark.parametrize("specials", [False, True])
def test_prepared_files_are_those_of_a_plain_loop(specials):
    """Short and long documents in order, each with its end of text."""
    rng, text = random.Random(0), "Tom has a red ball and Mia has a blué one.\n"
    documents = [text[: rng.randrange(1, 43)] * rng.choice([1, 1, 1, 2, 99, 999]) for _ in range(60)]
    write_texts("a.jsonl", documents)
    ends = ["<|endoftext|>"] if specials else []
    tokenizer = BPETokenizer.train([text], 300, special_tokens=ends)
    folder = data.prepare("a.jsonl", tokenizer)
    for part, wanted in (("train", documents[:54]), ("val", documents[54:])):
        ids = array.array("H")
        for one in wanted:
            ids.extend(tokenizer.encode_array(one).tolist())
            ids.extend([tokenizer.eot_id] if specials else [])
        assert (folder / f"{part}.bin").read_bytes() == ids.tobytes() and len(ids) > 1000
        info = data.token_info(folder / f"{part}.bin")
        assert (info["tokens"], info["documents"]) == (len(ids), len(wanted))
        assert info["bytes"] == len("".join(wanted).encode()) > info["characters"] == len("".join(wanted))


def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(tmp_path):
    """A single text comes in pieces; the files hold the tokens of the uncut text."""
    text = "".join(f"line {number} of a <|endoftext|> blué text\n" for number in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    tokenizer = BPETokenizer.train([text[:9000]], 300)
    folder = data.prepare("a.txt", tokenizer)
    tokens = b"".join((folder / f"{part}.bin").read_bytes() for part in ("train", "val"))
    border = len(text) * 9 // 10
    assert len(text.encode()) > 4 * data.PIECE
    assert tokens == array.array("H", [*tokenizer.encode(text[:border]), *tokenizer.encode(text[border:])]).tobytes()


def test_two_lists_of_documents_never_share_a_fingerprint_and_empty_ones_do_not_count():
    """Not even where a document holds the character that would mark the border of two. Nine of ten documents that hold
    something train: empty ones at the end do not empty the validation part."""
    write_texts("a.jsonl", "ABCD")
    write_texts("b.jsonl", ["A\0B", "C\0D"])
    first, second = data.prepare("a.jsonl", Characters()), data.prepare("b.jsonl", Characters())
    assert first != second and decode(data.load_tokens(second / "train.bin")) == "A\0B" + chr(299)
    write_texts("a.jsonl", [*(f"document {i}" for i in range(10)), "", "", ""])
    assert decode(data.load_tokens(data.prepare("a.jsonl", Characters()) / "val.bin")) == "document 9" + chr(299)


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path):
    """A file that grows between the pass that counts and the one that encodes gives no tokens under the old name."""
    class Growing(Characters):
        def encode_array(self, text):
            with open("a.txt", "a") as file:
                file.write("more")
            return super().encode_array(text)

    (tmp_path / "a.txt").write_text("hello you " * 100_000)  # several pieces: more is written before the end is read
    with pytest.raises(ValueError, match="a.txt changed while it was read"):
        data.prepare("a.txt", Growing())
    assert not list(Path("data/prepared").rglob("*.json"))
    folder = data.prepare("a.txt", Characters())
    size = (tmp_path / "a.txt").stat().st_size
    assert size > 1_000_000 and data.token_info(folder / "train.bin")["tokens"] == size * 9 // 10


def test_large_vocabularies_get_32_bits(tmp_path):
    """Ids beyond 65,535 survive; at exactly 65,536 entries 16 bits still do."""
    (tmp_path / "a.txt").write_text("\uffff\U00010000é" * 20, encoding="utf-8")
    tokens = data.load_tokens(data.prepare("a.txt", Characters(0x110000)) / "train.bin")
    assert tokens.dtype == torch.uint32 and decode(tokens) == "\uffff\U00010000é" * 18
    ids, targets = data.SlidingWindowDataset(tokens, 4, 4)[0]
    assert ids.tolist() == [0xFFFF, 0x10000, 0xE9, 0xFFFF] and targets.tolist() == [0x10000, 0xE9, 0xFFFF, 0x10000]
    (tmp_path / "a.txt").write_text("\uffff\u8000é" * 20, encoding="utf-8")
    tokens = data.load_tokens(data.prepare("a.txt", Characters(0x10000)) / "train.bin")
    assert tokens.dtype == torch.uint16
    assert data.SlidingWindowDataset(tokens, 2, 2)[0][0].tolist() == [0xFFFF, 0x8000]
    assert data.load_tokens(data.prepare("a.txt", Characters(0x10001)) / "val.bin").dtype == torch.uint32


def test_prepared_text_is_used_again_until_text_or_tokenizer_change(tmp_path, monkeypatch):
    """The second call encodes nothing; another text or another vocabulary has its own folder."""
    (tmp_path / "a.txt").write_text("hello you " * 100)
    folder = data.prepare("a.txt", Characters())
    with monkeypatch.context() as patch:
        patch.setattr(Characters, "encode_array", None)
        assert data.prepare("a.txt", Characters()) == folder
    assert data.prepare("a.txt", Characters(301)) != folder
    (tmp_path / "a.txt").write_text("hello you " * 100 + "!")
    assert data.prepare("a.txt", Characters()) != folder
    assert len(list(Path("data/prepared").iterdir())) == 3
    calls = []  # making tinyworld takes seconds: one prepare asks for it once, the next not at all
    monkeypatch.setattr(data, "tinyworld", lambda *view: calls.append(view) or ["Tom has a cat. "] * 20)
    folder = data.prepare("tinyworld", Characters())
    assert data.prepare("tinyworld", Characters()) == folder and calls == [("corpus", "train")]


@pytest.mark.parametrize("name", ["train.bin", "train.json", "val.bin", "val.json"])
def test_damage_to_a_prepared_file_is_found_said_and_mended(tmp_path, name, capsys):
    """One flipped bit anywhere, or a cut anywhere, is a ValueError in load_tokens, and prepare makes the file again."""
    (tmp_path / "a.txt").write_text("hello you " * 50)
    folder = data.prepare("a.txt", Characters())
    path, rng = folder / name, random.Random(0)
    good = path.read_bytes()
    damaged = [good[:rng.randrange(len(good))] for _ in range(5)] + [b"", good[:-1], good + b"\0\0"]
    for _ in range(20):
        position = rng.randrange(len(good))
        damaged.append(good[:position] + bytes([good[position] ^ 1 << rng.randrange(7)]) + good[position + 1:])
    for content in damaged:
        path.write_bytes(content)
        try:
            data.load_tokens(path.with_suffix(".bin"))
        except ValueError:
            continue
        assert name.endswith("json") and json.loads(content) == json.loads(good)  # white space may change
    path.write_bytes(good[:-2])
    assert data.prepare("a.txt", Characters()) == folder and path.read_bytes() == good
    assert "made again" in capsys.readouterr().err
    path.with_suffix(".json").unlink()  # without it a token file is no token file
    with pytest.raises(FileNotFoundError, match="data.py prepare"):
        data.load_tokens(path.with_suffix(".bin"))


@pytest.mark.parametrize("separator", ["", "====\n"])
def test_memory_stays_flat_while_a_long_text_is_prepared(tmp_path, separator):
    """Nine MB of text, one document or many, take little more than the block of one MB that is hashed at a time."""
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(200_000):
            file.write(f"line {i} of a long story, all of it the same\n" + separator * (i % 20 == 0))
    tokenizer = Characters()
    tokenizer.encode_array = lambda text: array.array("I", [len(text) % 256])
    tracemalloc.start()
    data.prepare("a.txt", tokenizer, separator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.txt").stat().st_size > 9e6 and peak < 1.3e6


def test_an_interrupted_prepare_leaves_no_token_file(tmp_path, monkeypatch):
    """Stopped in the middle, or with a val part without tokens, nothing below data/prepared can be loaded."""
    (tmp_path / "a.txt").write_text("hello you " * 3000)

    def stop(_, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Characters, "encode_array", stop)
        with pytest.raises(KeyboardInterrupt):
            data.prepare("a.txt", Characters())
    for text, words in (("a", "too few"), ("", "is empty")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            data.prepare("a.txt", Characters())
    assert not list(Path("data/prepared").rglob("*.json"))
    (tmp_path / "a.txt").write_text("hello you " * 3000)
    assert len(data.load_tokens(data.prepare("a.txt", Characters()) / "train.bin")) == 27_000


# Windows, orders, splits ----------------------------------------------------------------------------------------------


def test_the_published_windows_of_the_verdict(gpt2_tokenizer, real_data):
    """LLMs-from-scratch, chapter 2: stride 1, and the first batch of eight with stride 4."""
    tokens = torch.tensor(gpt2_tokenizer.encode(real_data("the-verdict.txt").read_text(encoding="utf-8")))
    windows = data.SlidingWindowDataset(tokens, 4, 1)
    assert [t.tolist() for t in windows[0]] == [[40, 367, 2885, 1464], [367, 2885, 1464, 1807]]
    assert [t.tolist() for t in windows[1]] == [[367, 2885, 1464, 1807], [2885, 1464, 1807, 3619]]
    ids, targets = data.SlidingWindowDataset(tokens, 4, 4).batch(range(8))
    assert ids.tolist() == [[40, 367, 2885, 1464], [1807, 3619, 402, 271], [10899, 2138, 257, 7026],
                            [15632, 438, 2016, 257], [922, 5891, 1576, 438], [568, 340, 373, 645],
                            [1049, 5975, 284, 502], [284, 3285, 326, 11]]
    assert targets[:, :-1].equal(ids[:, 1:]) and targets[:, -1].tolist() == [1807, 10899, 15632, 922, 568, 1049, 284, 287]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_windows_cover_every_token_once_at_stride_equal_to_context(length, stride):
    """For any count of tokens: each target follows its context; at stride = context each token but the first is a
    target exactly once, at a smaller stride at least once; full windows are those of a plain loop. Too few tokens are
    told with both numbers and the flag to change."""
    with pytest.raises(ValueError, match=f"have {length} tokens, need at least {length + 1} .*--context_length"):
        data.SlidingWindowDataset(torch.arange(length), length, stride)
    assert len(data.SlidingWindowDataset(torch.arange(length + 1), length, stride)) == 1
    for n in range(length + 1, 40):
        tokens = torch.arange(n) + 1000
        windows = data.SlidingWindowDataset(tokens, length, stride)
        plain = [tokens[i:i + length].tolist() for i in range(0, n - length, stride)]
        full = data.SlidingWindowDataset(tokens, length, stride, tail=False)
        assert [ids.tolist() for ids, _ in full] == plain == [ids.tolist() for ids, _ in windows][:len(plain)]
        ids, targets = windows.batch(torch.arange(len(windows)))
        assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape == (len(windows), length)
        counted = targets[targets != data.IGNORE]
        assert (ids + 1)[targets != data.IGNORE].equal(counted)
        times = Counter(counted.tolist())
        if stride == length:
            assert times == Counter(range(1001, 1000 + n))
        elif stride < length:
            assert set(times) == set(range(1001, 1000 + n)) and len(windows) - len(full) in (0, 1)
        else:
            assert len(windows) == len(full)
        for index in range(len(windows)):
            assert all(one.equal(row) for one, row in zip(windows[index], (ids[index], targets[index])))


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_fix_and_by_length_saves_padding():
    """Every item once; the same numbers give the same order on any machine, others give others. By length, far less of
    the batches is padding than in random order."""
    order = data.epoch_order(1000, 1, 0)
    assert sorted(order.tolist()) == list(range(1000)) and order.equal(data.epoch_order(1000, 1, 0))
    others = [data.epoch_order(1000, seed, epoch) for seed, epoch in ((1, 1), (2, 0), (0, 1), (0, 0))]
    assert not any(order.equal(other) for other in others) and not others[0].equal(others[2])
    assert data.epoch_order(8, 1, 0).tolist() == [3, 4, 2, 1, 5, 6, 7, 0]  # so that a run resumed elsewhere goes on
    lengths = torch.randint(5, 100, (1000,), generator=torch.Generator().manual_seed(0))
    order = data.order_by_length(lengths, 16, 1, 3)
    assert order.sort().values.equal(torch.arange(1000)) and order.dtype == torch.int64

    def padding(order):
        return sum((batch.max() - batch).sum().item() for batch in lengths[order].split(16)) / lengths.sum().item()

    assert padding(order) < 0.35 * padding(data.epoch_order(1000, 1, 3))


def test_split_gives_the_books_sizes_and_keeps_groups_together():
    """935 / 55 / 110 of 1,100 instructions, and 1,045 / 149 / 300 of the 1,494 balanced messages. No prompt is in two
    parts, sizes are met to within a group; without `group` prompts do straddle."""
    assert [len(part) for part in data.split(range(1100))] == [935, 55, 110]
    assert [len(part) for part in data.split(range(1494), 0.7, 0.1)] == [1045, 149, 300]
    parts = data.split(range(1000), 0.6, 0.1)
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(1000)) and parts == data.split(range(1000), 0.6, 0.1)
    assert parts != data.split(range(1000), 0.6, 0.1, seed=1) and parts[0] != sorted(parts[0])
    assert [len(part) for part in data.split([], 0.5, 0.5)] == [0, 0, 0]
    with pytest.raises(ValueError, match="shares"):
        data.split(range(10), 0.9, 0.2)
    items = [(f"prompt {i % 120}", i) for i in range(1000)]
    for group, together in ((lambda item: item[0], True), (None, False)):
        parts = data.split(items, 0.8, 0.1, group=group)
        prompts = [{item[0] for item in part} for part in parts]
        assert together == (not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2])
        assert sorted(sum(parts, [])) == sorted(items)
        assert all(abs(len(part) - size) < 9 for part, size in zip(parts, (800, 100, 100)))


# Records --------------------------------------------------------------------------------------------------------------


def test_real_records_have_their_published_counts(real_data, monkeypatch):
    """5,574 messages, 747 spam, quotes kept; 1,100 instructions; 1,100 pairs, six of them equal."""
    monkeypatch.setenv("DATA_DIR", str(real_data("SMSSpamCollection").parent))
    rows = data.read_labelled("sms_spam")
    assert len(rows) == 5574 and Counter(label for label, _ in rows) == {"ham": 4827, "spam": 747}
    assert sum(text.count('"') for _, text in rows) == real_data("SMSSpamCollection").read_bytes().count(b'"') > 0
    entries = data.read_conversations("instructions")
    assert len(entries) == 1100 and entries[0]["messages"][0]["input"] == "freind --> friend"
    pairs = data.read_preferences("preferences")
    assert len(pairs) == 1100 and sum(pair["chosen"] == pair["rejected"] for pair in pairs) == 6
    assert pairs[0]["prompt"] == entries[0]["messages"][0]["content"] + "\n freind --> friend"


def test_labelled_text_reads_alike_from_three_formats(tmp_path):
    """Tab-separated, CSV and JSONL give the same pairs; quotes and tabs inside a text are kept."""
    (tmp_path / "a.tsv").write_text('label\ttext\nham\tsay "hi\tyou\nspam\tWin, now\n\n')
    (tmp_path / "a.csv").write_text('text,id,label\n"say ""hi\tyou",1,ham\n"Win, now",2,spam\n')
    (tmp_path / "a.jsonl").write_text('{"label": "ham", "text": "say \\"hi\\tyou"}\n{"label": "spam", "text": "Win, now"}')
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        assert data.read_labelled(name) == [("ham", 'say "hi\tyou'), ("spam", "Win, now")]
    (tmp_path / "b.jsonl").write_text('{"label": 1, "text": "a"}')
    assert data.read_labelled("b.jsonl") == [("1", "a")]
    (tmp_path / "a.NDJSON").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert data.read_labelled("a.NDJSON") == data.read_labelled("a.jsonl")
    (tmp_path / "b.csv").write_text(f'Label, Text\nham,{"x" * 135_000}\n')
    assert data.read_labelled("b.csv") == [("ham", "x" * 135_000)]
    with pytest.raises(ValueError, match="line 3: label 'spam'; the model knows ham, eggs"):
        data.read_labelled("a.tsv", ["ham", "eggs"])


def test_half_a_character_in_json_is_replaced(tmp_path):
    """A lone surrogate would fail at the next write; whole pairs and other text are untouched."""
    (tmp_path / "c.jsonl").write_text('{"instruction": "a\\ud83dz \\ud83d\\ude42 \\ufffd", "output": "b"}')
    assert data.read_conversations("c.jsonl")[0]["messages"][0]["content"] == "a\ufffdz 🙂 \ufffd"


def test_every_preference_format_gives_the_same_pair(tmp_path):
    """Numbered answers, chosen and rejected, instruction and input, transcripts, all .json, .jsonl or .gz."""
    answers = {"chosen": "Paris.", "rejected": "Rome."}
    numbered = {"response_1": "Rome.", "response_2": "Paris.", "preferred": 2}
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Capital?\n\nAssistant:"
    entries = [{"prompt": "Capital?", **answers}, {"prompt": "Capital?", **numbered},
               {"instruction": "Capital?", "input": "", **answers}, {"instruction": "Capital?", **numbered}]
    expected = {"instruction": "Capital?", "input": "", "prompt": "Capital?", **answers}
    assert [data.preference(entry) for entry in entries] == [expected] * 4
    flipped = data.preference({**entries[1], "preferred": 1})
    assert (flipped["chosen"], flipped["rejected"]) == ("Rome.", "Paris.")
    told = data.preference({"chosen": talk + " Paris.", "rejected": talk + " Rome."})
    assert told["prompt"] == "Human: Hi\n\nAssistant: Hello\n\nHuman: Capital?"
    assert (told["chosen"], told["rejected"]) == ("Paris.", "Rome.")
    lines = "\n".join(map(json.dumps, entries))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert data.read_preferences("a.jsonl") == data.read_preferences("a.json") == data.read_preferences("a.jsonl.gz")


def test_pairs_of_different_prompts_or_with_an_empty_chosen_answer_are_left_out_and_counted(tmp_path, capsys):
    """A pair that does not answer one prompt is no comparison, an empty answer would train silence, an empty rejected
    one is fair; an error if no pair is left."""
    same = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    other = {**same, "rejected": "\n\nHuman: z\n\nAssistant: c"}
    (tmp_path / "a.json").write_text(json.dumps([same, other, same]))
    assert len(data.read_preferences("a.json")) == 2
    assert "1 of 3 pairs left out: prompts differ" in capsys.readouterr().err
    (tmp_path / "a.json").write_text(json.dumps([other]))
    with pytest.raises(ValueError, match="no pair has one prompt"):
        data.read_preferences("a.json")
    pairs = [{"prompt": "a", "chosen": chosen, "rejected": rejected} for chosen, rejected in (("b", ""), (" ", "c"))]
    (tmp_path / "a.json").write_text(json.dumps(pairs))
    assert [pair["chosen"] for pair in data.read_preferences("a.json")] == ["b"]
    assert "1 of 2 pairs left out" in capsys.readouterr().err
    talk = "\n\nHuman: a\n\nAssistant:"
    assert data.preference({"chosen": talk, "rejected": talk + " c"}) is None


def test_pairs_of_messages_are_read_in_every_usual_form():
    """The question among the messages, or apart; more turns become a transcript; `output` stays."""
    user, yes, no = ({"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No")))
    plain = {"prompt": "Why?", "chosen": "So.", "rejected": "No"}
    for entry in ({"chosen": [user, yes], "rejected": [user, no]}, {"prompt": [user], "chosen": [yes], "rejected": [no]},
                  {"prompt": "Why?", "chosen": [user, yes], "rejected": [user, no]}):
        assert data.preference(entry) == data.preference(plain), entry
    longer = data.preference({"chosen": [user, no, user, yes], "rejected": [user, no, user, no]})
    assert longer["prompt"] == "Human: Why?\n\nAssistant: No\n\nHuman: Why?" and longer["chosen"] == "So."
    talk = "\n\nHuman: Why?\n\nAssistant: No\n\nHuman: Why?\n\nAssistant: "  # HH-RLHF's own form of the same
    assert data.preference({"chosen": talk + "So.", "rejected": talk + "No"}) == longer
    assert data.preference({"chosen": [user, yes], "rejected": [{**user, "content": "Who?"}, no]}) is None
    assert data.preference({**plain, "output": "So."})["output"] == "So."
    for wrong, said in (([user], "must ask something"), ([yes], "assistant speaks first"), (["Why?"], "an object"),
                        ([], "must ask"), ([user, {"role": "assistant"}], "'content' is missing"), ("So.", "needs 'prompt'")):
        with pytest.raises(ValueError, match=said):
            data.preference({"chosen": wrong, "rejected": [user, no]}, "a.json[0]")


GOOD = '{"instruction": "a", "input": "", "output": "b"}'
BAD_INPUTS = [
    ("corpus", "a.txt", "", "a.txt is empty"),
    ("corpus", "missing.txt", None, "no such file or dataset: missing.txt"),
    ("corpus", "a.txt", b"abc\xe9", "byte 3"),
    ("corpus", "a.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: 'text' is missing"),
    ("corpus", "a.jsonl.gz", b"\x1f\x8b\x08\0broken", "damaged .gz"),
    ("corpus", "a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-3], "damaged .gz"),
    ("corpus", "a.txt.gz", b"plain", "damaged .gz"),
    ("instructions", "a.json", '{"instruction": "a"}', "expected a list of objects, got dict"),
    ("instructions", "a.json", f"[{GOOD},]", "line 1 column"),
    ("instructions", "a.json", f"[{GOOD}] [{GOOD}]", "Extra data"),
    ("instructions", "a.json", "[" * 100_000, "recursion"),
    ("instructions", "a.json", '[{"instruction": ' + "1" * 5000 + "}]", "a.json"),
    ("instructions", "a.json", "[]", "holds no entries"),
    ("instructions", "a.json", f'[{GOOD}, {{"instruction": "a", "input": ""}}]', "a.json[1]: 'output' is missing"),
    ("instructions", "a.json", f'[{GOOD}, {GOOD}, ["a"]]', "a.json[2]: expected an object, got list"),
    ("instructions", "a.jsonl", f'{GOOD}\n{{"instruction": 3, "output": "b"}}', "line 2: 'instruction' must be text"),
    ("instructions", "a.jsonl", f'{GOOD}\n\n{{"instruction": "a", ', "line 3: not JSON"),
    ("instructions", "a.jsonl", f'{GOOD}\n{{"instruction": NaN, "output": "b"}}', "line 2: 'instruction' must be text"),
    ("instructions", "sms_spam", None, "sms_spam holds messages, not instructions"),
    ("preferences", "a.jsonl", '{"prompt": "a", "response_1": "b", "response_2": "c", "preferred": 3}', "must be 1 or 2"),
    ("preferences", "a.jsonl", '{"prompt": "a", "response_1": "b", "response_2": "c", "preferred": true}', "not True"),
    ("preferences", "a.jsonl", '{"prompt": "a", "response_1": "b", "preferred": 1}', "'response_2' is missing"),
    ("preferences", "a.jsonl", '{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
    ("preferences", "a.jsonl", '{"chosen": "b", "rejected": "c"}', "needs 'prompt' or 'instruction'"),
    ("messages", "a.tsv", "ham\thi\nspam", "line 2: 'text' is missing"),
    ("messages", "a.tsv", "ham\thi\n\tyou", "line 2: expected a label and a text"),
    ("messages", "a.tsv", "", "holds no entries"),
    ("messages", "a.tsv", "label\ttext\n", "holds no rows"),
    ("corpus", "a.csv", "text,label\nA cat.,pet\n", "is no file of text"),
    ("corpus", "A.CSV.gz", gzip.compress(b"text,label\nA cat.,pet\n"), "is no file of text"),
    ("corpus", "a.json", '[{"text": "A cat."}]', "is no file of text"),
    ("messages", "a.tsv", b"ham\thi\0", "zero bytes"),
    ("messages", "a.csv", "label,text\nham,hi\nspam", "line 3: expected 2 columns"),
    ("messages", "a.csv", 'label,text\nham,"hi\nspam,you\n', "after line 1: unexpected end of data"),
    ("messages", "a.csv", 'label,text\nham,"hi"x\nspam,you\n', "after line 1"),
    ("messages", "a.csv", "a,b\nham,hi", "line 2: 'label' is missing"),
    ("messages", "a.csv", "label;text\nham;hi, you\n", "commas between its columns, not semicolons"),
    ("messages", "a.csv", "label,,text,Text\nham,,hi,you\n", "a column stands twice in the header: label, , text, text"),
    ("messages", "a.jsonl", '{"label": null, "text": "a"}', "'label' must be text"),
]


@pytest.mark.parametrize("view, name, content, words", BAD_INPUTS)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, capsys, view, name, content, words):
    """Exit status 1, one line on stderr, no traceback, and no file written."""
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert data.main(["show", name, "--view", view]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and len(err) < 400, err
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


# Instructions ---------------------------------------------------------------------------------------------------------


def test_prompts_have_the_published_form():
    """The book's Alpaca text, with and without input; the plain form; `prompt` counts as an instruction."""
    entry = {"instruction": "Identify the correct spelling.", "input": "Ocassion", "output": "Occasion."}
    book = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nIdentify the correct spelling.\n\n### Input:\nOcassion\n\n### Response:\nOccasion.")
    assert data.format_prompt(entry, "alpaca") + data.format_response(entry["output"], "alpaca") == book
    bare = {**entry, "input": ""}
    assert data.format_prompt(bare, "alpaca") == book.split("\n\n### Input")[0] + "\n\n### Response:\n"
    assert data.format_prompt(entry, "plain") + data.format_response("Occasion.", "plain") == (
        "Identify the correct spelling.\n Ocassion\n> Occasion.")
    asked = {"prompt": data.prompt_of(entry)}
    assert data.format_prompt(asked, "plain") == data.format_prompt(entry, "plain")
    with pytest.raises(ValueError, match="alpaca, plain"):
        data.format_prompt(entry, "Alpaca")


def test_prompt_and_response_encoded_apart_are_the_tokens_of_both(gpt2_tokenizer, real_data):
    """No token spans the border, so that a mask from token counts covers the prompt exactly."""
    for entry in json.loads(real_data("instruction-data.json").read_text(encoding="utf-8"))[:200]:
        for template in data.TEMPLATES:
            prompt = data.format_prompt(entry, template)
            response = data.format_response(entry["output"], template)
            encode = gpt2_tokenizer.encode
            assert encode(prompt) + encode(response) == encode(prompt + response)


def test_collation_gives_the_published_vectors_and_padding_on_the_left_those_by_hand():
    """LLMs-from-scratch, chapter 7: three rows padded with 50256, one end of text learned, the rest ignored. On the
    left all rows end in the last column; the mask tells padding even from a real token with its id."""
    ids, targets = data.collate([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]], 50256)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]]
    assert targets.tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]
    ids, targets = data.collate([[0, 1, 2, 3, 4], [5, 6]], 50256, max_length=3)
    assert ids.tolist() == [[0, 1, 2], [5, 6, 50256]] and targets.tolist() == [[1, 2, 3], [6, 50256, -100]]
    ids, mask = data.pad_left([[5, 6, 0], [7], (8, 9)], 0)
    assert ids.tolist() == [[5, 6, 0], [0, 0, 7], [0, 8, 9]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64 and data.pad_left([[3]], 9)[1].tolist() == [[1]]


def test_a_masked_prompt_gives_the_published_vector(gpt2_tokenizer):
    """LLMs-from-scratch, exercise 7.2: 46 ignored targets, the response, its end, and padding ignored."""
    entry = {"instruction": "Sort the following list in alphabetical order.", "input": "Zebra, Elephant, Crocodile"}
    prompt, head = data.format_prompt(entry, "alpaca").split("\n\n### Response:")
    asked = gpt2_tokenizer.encode(prompt)
    whole = asked + gpt2_tokenizer.encode("\n\n### Response:" + head + "Crocodile, Elephant, Zebra")
    counted = [0] * len(asked) + [1] * (len(whole) + 1 - len(asked))
    _, targets = data.collate([([*whole, 50256], counted), list(range(64))], 50256)
    assert targets[0].tolist() == [-100] * 46 + [198, 198, 21017, 18261, 25, 198, 34, 12204, 375, 576, 11, 42651, 11,
                                                 1168, 37052, 50256, -100, -100]


def test_padding_and_masks_change_no_loss():
    """The mean loss of a padded batch is that of its counted targets one by one, with a pad unlike the end of text."""
    torch.manual_seed(0)
    table = torch.randn(20, 20)  # logits of the next token, given one token
    batch = [([1, 2, 3, 4, 18], [0, 0, 1, 1, 1]), ([5, 6, 18], [0, 1, 1]), [7, 8, 9]]
    ids, targets = data.collate(batch, 19, eot_id=18)
    loss = F.cross_entropy(table[ids].flatten(0, 1), targets.flatten(), ignore_index=-100)
    pairs = [(2, 3), (3, 4), (4, 18), (5, 6), (6, 18), (7, 8), (8, 9), (9, 18)]
    assert loss.item() == pytest.approx(sum(-table[a].log_softmax(0)[b].item() for a, b in pairs) / 8, rel=1e-5)
    assert (targets == 18).sum() == 3 and not (targets == 19).any()
    counted = data.collate([([1, 2, 3, 18], [0, 0, 0, 1])], 19, eot_id=18)[1]
    assert counted.tolist() == [[-100, -100, 18]]


# Command line ---------------------------------------------------------------------------------------------------------


def test_the_commands_do_what_they_say(tmp_path, capsys, monkeypatch):
    """list names all, show prints three items of each view and counts them, prepare reports tokens. A few lines stand in
    tinyworld's place, so that nothing depends on its word lists."""
    views = {"corpus": ["Tom has a cat. "] * 20, "messages": [("spam", "Win!"), ("ham", "Hi")],
             "instructions": [{"instruction": "Plural?", "input": "cat", "output": "cats"}],
             "preferences": [{"prompt": "Hi", "response_1": "Yo", "response_2": "Hello.", "preferred": 2}]}
    monkeypatch.setattr(data, "tinyworld", lambda view, split, n=None, seed=0: iter(views[view]))
    assert data.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(data.DATASETS)
    for view, words in {"corpus": "20 items", "messages": '["spam", "Win!"]\n["ham", "Hi"]\n2 items',
                        "instructions": '"output": "cats"', "preferences": '"preferred": 2'}.items():
        assert data.main(["show", "tinyworld", "--view", view]) == 0
        assert words in capsys.readouterr().out
    files = {"a.csv": ("messages", "label,text\ngood,é🙂\n", '["good", "é🙂"]\n1 item'),
             "b.tsv": ("messages", "good\tday\n", '["good", "day"]'),
             "c.json": ("instructions", '[{"instruction": "Say a.", "output": "A."}]', '"content": "A."'),
             "d.jsonl": ("preferences", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', '"rejected": "c"'),
             "e.jsonl": ("corpus", '{"text": "day"}\n', '"day"'), "f.txt": ("corpus", "good day\n" * 9, '"good day')}
    for name, (view, text, words) in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert data.main(["show", name, "--view", view]) == 0 and words in capsys.readouterr().out, name
    monkeypatch.setattr(data, "fetch", lambda name: Path("here"))
    assert data.main(["get", "verdict"]) == 0 and "here\nlicense: public domain" in capsys.readouterr().out
    tokenizer = pytest.importorskip("tokenizer")
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda source: Characters())
    assert data.main(["prepare"]) == 0
    out = capsys.readouterr().out
    assert "train.bin: 288 tokens of 270 bytes in 18 documents" in out and "val.bin: 32 tokens" in out


@pytest.mark.parametrize("argv, words", [
    (["get"], "name"), (["get", "nothing"], "invalid choice"), (["show", "--vieww", "corpus"], "did you mean --view"),
    (["fetch"], "unknown command 'fetch'"), (["prepare", "--tokenizer"], "expected one argument")])
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, argv, words):
    """Nothing is read, written or downloaded."""
    assert data.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err
