"""Everything between a file of text and a batch of token ids: datasets, token files, windows, splits, formats.

    python data.py                              list the datasets: size, licence, already here or not
    python data.py get shakespeare              download one, check its hash, print where it lies
    python data.py show sms_spam                counts and a few samples (of a dataset or of any file)
    python data.py show tinyworld --view instructions
    python data.py prepare --data verdict --tokenizer gpt2         4,612 + 534 tokens, 3 seconds
    python data.py prepare --data "stdlib:0.7,notes.txt:0.3"       a mix: shares of characters

`tinyworld`, the default of every stage, is made on the spot from word lists in this file and needs no network. Files of
the other datasets are looked for in $DATA_DIR (default data/) and downloaded into it once; sha256 sums are checked at
every use, and a file that does not fit is reported, never overwritten. `prepare` writes below data/prepared/.

Reads: text (.txt, .md, .py and folders of them; .jsonl with `text`); labelled text (label<TAB>text, .csv or .jsonl with
`label`, `text`); instructions (.json or .jsonl with `instruction`, `input`, `output`); preferences (see
`preference`). A name ending in .gz is unpacked while reading. Text is UTF-8; anything malformed is refused with file
and line, never skipped in silence.

Writes: data/prepared/<fingerprint>/{train,val}.bin, little-endian uint16 token ids (uint32 above 65,536 entries), each
with a .json beside it: counts, sums, and the bytes of text that bits per byte need. The fingerprint covers the text and
the tokenizer, so changed text or another tokenizer never meets old tokens.

Differs from nanoGPT's and the LLMs-from-scratch book's loaders: windows are cut from a mapped file when they are asked
for, no token is left out of an epoch, an epoch's order depends on seed and epoch alone, so a resumed run goes on where
it stopped, and documents never carry special tokens from their own text. To use it elsewhere copy data.py, and
tokenizer.py for `prepare`.
"""

import argparse
import array
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import difflib
import errno
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # we never use it, so its absence is no news

import torch

IGNORE = -100  # a target that no loss counts, PyTorch's own default

# ---------------------------------------------------------------------------------------------------------------------
# Datasets by name, and their download

MAX_BYTES = 1 << 28  # no file of the list below comes near 256 MiB, so more is a mistake or an attack
BACKOFF = (1.0, 2.0)  # seconds before the second and third try
BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"
RASCHKA = "S. Raschka, Build a Large Language Model (From Scratch), Manning 2024"


class Dataset(NamedTuple):
    """Where a named dataset comes from. Without a known `sha256` the sum found first is pinned in a file beside it."""

    kind: str  # what it is for: corpus, messages (labelled), instructions, preferences; tinyworld is all four
    size: str
    licence: str
    citation: str
    file: str = ""  # its name in $DATA_DIR
    sha256: str = ""
    urls: tuple = ()  # tried in turn
    archive: str = ""  # name of the zip that `urls` lead to and that holds `file`
    archive_sha256: str = ""


DATASETS = {
    "tinyworld": Dataset("all four", "a few MB", "MIT, as this file", "made by this file, in four views"),
    "verdict": Dataset(
        "corpus", "20 kB", "public domain", "E. Wharton, The Verdict, 1908; as used in " + RASCHKA, "the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        (BOOK + "/ch02/01_main-chapter-code/the-verdict.txt",)),
    "shakespeare": Dataset(
        "corpus", "1.1 MB", "public domain", "A. Karpathy, char-rnn, 2015 (tiny Shakespeare)", "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",)),
    "stdlib": Dataset("corpus", "12 MB", "PSF licence", "the source of Python's standard library, as installed here"),
    "sms_spam": Dataset(
        "messages", "478 kB", "CC BY 4.0", "T. Almeida, J. Hidalgo, SMS Spam Collection, UCI 2011, doi 10.24432/C5CC84",
        "SMSSpamCollection", "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        ("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
         "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"),
        "sms+spam+collection.zip", "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3"),
    "instructions": Dataset(
        "instructions", "204 kB", "Apache 2.0", RASCHKA, "instruction-data.json",
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        (BOOK + "/ch07/01_main-chapter-code/instruction-data.json",)),
    "alpaca": Dataset(
        "instructions", "23 MB", "CC BY-NC 4.0", "R. Taori et al., Stanford Alpaca, 2023", "alpaca_data.json",
        "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
        ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/"
         "alpaca_data.json",)),
    "preferences": Dataset(
        "preferences", "387 kB", "Apache 2.0", RASCHKA, "instruction-data-with-preference.json",
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        (BOOK + "/ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",)),
    "hh_rlhf": Dataset(
        "preferences", "16 MB", "MIT", "Y. Bai et al., Training a Helpful and Harmless Assistant, arXiv 2204.05862",
        "hh-rlhf-helpful-base.jsonl.gz", "",
        ("https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/train.jsonl.gz",)),
}


class TryAgain(OSError):
    """A failed download that may succeed later; `after` is the pause in seconds that the server asked for."""

    def __init__(self, message, after=0.0):
        super().__init__(message)
        self.after = after


def note(message):
    """Print one line of progress or warning to stderr."""
    print(message, file=sys.stderr, flush=True)


def sweep(folder, pattern):
    """Remove temporaries that a killed process left in `folder` more than a day ago."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone already, or somebody else's
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def atomic(path):
    """Yield a binary file that becomes `path` when the block ends well; otherwise `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    sweep(path.parent, f".{path.name}.*.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows cannot open a folder; elsewhere this makes the new name last
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):  # not about this file
            raise
        free = shutil.disk_usage(path.parent).free
        shown = Path(*(part for part in path.parts if not part.startswith(".tmp-")))  # not prepare's hidden folder
        raise OSError(error.errno, f"cannot write {shown}: {error.strerror} ({free:,} bytes free there)") from None
    finally:
        with contextlib.suppress(OSError):  # there is none, or on a read-only disk there never was
            temporary.unlink()


def file_sha256(path):
    """Return the sha256 of a file in hex, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def data_dir():
    """Return the folder of downloaded datasets: $DATA_DIR, or data/ below the current folder."""
    return Path(os.environ.get("DATA_DIR") or "data")


def fetch(name):
    """Return the path of a dataset's file (a folder for `stdlib`), downloading it where $DATA_DIR lacks it.

    Raises ValueError for an unknown name or a wrong sum, OSError without network; both say what to put where."""
    if name not in DATASETS or name == "tinyworld":
        names = ", ".join(known for known in DATASETS if known != "tinyworld")
        raise ValueError(f"no file belongs to dataset {name!r}; those with files: {names}")
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    dataset, path = DATASETS[name], data_dir() / DATASETS[name].file
    pin = path.with_name(path.name + ".sha256")
    sha256 = dataset.sha256 or (pin.read_text(encoding="utf-8").partition(" ")[0] if pin.exists() else "")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if dataset.archive:
            archive = path.with_name(dataset.archive)
            if not archive.exists():
                download_any(name, archive, dataset.archive_sha256)
            check_sum(archive, dataset.archive_sha256)
            extract_member(archive, dataset.file, path, sha256)
        else:
            download_any(name, path, sha256)
    found = check_sum(path, sha256)
    if not sha256:
        note(f"{path}: no sum of it is published; {found} counts from now on and is kept in {pin.name}")
        with contextlib.suppress(OSError), atomic(pin) as file:  # in a read-only folder it stays unpinned
            file.write(f"{found}  {path.name}\n".encode())
    return path


def check_sum(path, sha256):
    """Return the sha256 of a file; ValueError if another one is expected ("" expects nothing)."""
    found = file_sha256(path)
    if sha256 and found != sha256:
        raise ValueError(f"{path}: sha256 is {found}, expected {sha256}; it was left as it is: move it away and run "
                         f"again to download it")
    return found


def download_any(name, path, sha256):
    """Fill `path` with a dataset from the first of its addresses that delivers; raises OSError where none does."""
    problems = []
    for url in DATASETS[name].urls:
        try:
            return download(url, path, sha256)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):  # the disk's fault, and another server would not help
                raise
            problems.append(str(error))
    raise OSError(f"cannot download {name}: {'; '.join(problems)}; put the file of {DATASETS[name].urls[0]} at {path} "
                  f"yourself, or set DATA_DIR to a folder that has {path.name}")


def download(url, path, sha256="", max_bytes=MAX_BYTES, deadline=600.0):
    """Write the body of `url` to `path`; until it is whole, nothing stands under that name.

    Tries again after a pause when the connection fails, is cut, or the server is busy, within `deadline` seconds in
    all. Raises OSError for a refusal, ValueError for a body that is not the one with this `sha256`."""
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url}: only http and https addresses can be downloaded")
    end = time.monotonic() + deadline
    for pause in (*BACKOFF, math.inf):
        try:
            return receive(url, Path(path), sha256, max_bytes, end)
        except TryAgain as error:
            pause = max(pause, error.after)
            if time.monotonic() + pause >= end:
                raise
            note(f"{error}; trying again in {pause:.0f} s")
            time.sleep(pause)


def receive(url, path, sha256, max_bytes, end):
    """Fill `path` by one request; raises as `download` does, TryAgain where that may help."""
    import requests  # here, because it costs every start 0.1 s

    left = max(end - time.monotonic(), 0.1)
    try:
        # Unpacked by the server's leave, a few kB could grow to fill the disk: ask for the bytes as they are.
        response = requests.get(url, stream=True, timeout=(min(10, left), min(30, left)),
                                headers={"Accept-Encoding": "identity"})
    except (requests.ConnectionError, requests.Timeout) as error:
        reason = getattr(error.args[0] if error.args else error, "reason", error)
        raise TryAgain(f"{url}: {type(reason).__name__}") from None
    except requests.RequestException as error:
        raise OSError(f"{url}: {error}") from None
    with response:
        if response.status_code in (408, 429) or response.status_code >= 500:  # may pass; other refusals are final
            after = response.headers.get("Retry-After", "")
            raise TryAgain(f"{url}: HTTP status {response.status_code}", float(after) if after.isdecimal() else 0.0)
        if response.status_code != 200:
            raise OSError(f"{url}: HTTP status {response.status_code}")
        with atomic(path) as file:
            found, size = copy_body(response, file, max_bytes, end)
            if sha256 and found != sha256:
                kind = response.headers.get("Content-Type", "no type")
                raise ValueError(f"{url}: sha256 is {found}, expected {sha256} ({size:,} bytes of {kind})")


def copy_body(response, file, max_bytes, end):
    """Return (sha256, size) of the body written to `file`; raises TryAgain if it is cut, OSError past a limit."""
    from requests.packages.urllib3.exceptions import HTTPError

    length, digest, size, shown = response.headers.get("Content-Length"), hashlib.sha256(), 0, time.monotonic()
    while True:
        try:  # read1 comes back with what is there, so that a server that drips cannot outlast the deadline
            block = response.raw.read1(1 << 16, decode_content=False)
        except (HTTPError, OSError) as error:
            raise TryAgain(f"{response.url}: {type(error).__name__} after {size:,} bytes") from None
        now, size = time.monotonic(), size + len(block)
        if now > end:
            raise OSError(f"{response.url}: too slow, given up after {size:,} bytes")
        if size > max_bytes:
            raise OSError(f"{response.url}: more than the allowed {max_bytes:,} bytes")
        if not block:
            break
        digest.update(block)
        file.write(block)
        if now - shown > 2:
            note(f"{response.url}: {size:,} bytes of {length or '?'}")
            shown = now
    if length is not None and length != str(size):
        raise TryAgain(f"{response.url}: cut after {size:,} of {length} bytes")
    return digest.hexdigest(), size


def extract_member(archive, member, path, sha256):
    """Write the one file `member` of a zip, and nothing else in it, to `path`; raises ValueError for a wrong one."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            found = [info for info in zipped.infolist() if info.filename == member]
            if len(found) != 1:
                raise ValueError(f"{archive}: holds {len(found)} files named {member}, expected one")
            with zipped.open(found[0]) as file:
                content = file.read(MAX_BYTES + 1)
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:  # RuntimeError: encrypted, unknown method
        raise ValueError(f"{archive}: not a zip that can be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{archive}: {member} is larger than the allowed {MAX_BYTES:,} bytes")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{archive}: {member} is not the expected file (sha256 {sha256})")
    with atomic(path) as file:
        file.write(content)


# ---------------------------------------------------------------------------------------------------------------------
# Reading text

PIECE = 1 << 15  # bytes read at a time: long texts stream through memory in pieces of about this size
MIXED = 1 << 12  # the same where several sources take turns: the smaller, the closer to their shares
SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # what is read in a folder
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders that `stdlib` leaves out
# Where a text may be cut without changing its GPT-2 tokens: before a space or line end that a word follows, because
# the pattern never joins what stands before such a place to what follows it.
CUT = re.compile(r"(?s).*(?=[ \n]\w)")


def locate(source, kind):
    """Return the path behind the name of a dataset of this kind, or a path; ValueError or FileNotFoundError if none."""
    source = str(source)
    if source in DATASETS:
        if DATASETS[source].kind != kind:
            raise ValueError(f"dataset {source} holds {DATASETS[source].kind}, not {kind}; see: python data.py list")
        return fetch(source)
    if not source or not Path(source).exists():
        raise FileNotFoundError(f"no such file or dataset: {source}; datasets: {', '.join(DATASETS)}")
    return Path(source)


def decoded(path, size):
    """Yield a UTF-8 file (unpacked if .gz) block by block as str with \\n line ends.

    Raises ValueError with the offset of a byte that is not UTF-8."""
    decoder, start = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True), 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        while True:
            try:
                block = file.read(size)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: damaged .gz file ({error})") from None
            if start == 0 and block.startswith(codecs.BOM_UTF8):
                note(f"{path}: the byte order mark at its start is dropped")
                block, start = block[3:], 3
            zero, bad = block.find(b"\0"), None
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its offsets count from the bytes that the decoder held back
                bad = len(block) - len(error.object) + error.start
            if bad is not None or zero >= 0:
                raise ValueError(f"{path}: not UTF-8 text at byte {start + (zero if bad is None else bad)}; convert it "
                                 f"first (is it UTF-16, Latin-1 or no text at all?)")
            if not block:
                return
            start += len(block)
            yield text


def read_text(path):
    """Return a whole text file as a string; ValueError if it is empty."""
    text = "".join(decoded(path, 1 << 20))
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def pieces_of(path, size):
    """Yield a text file in pieces of about `size` bytes that encode to the same tokens as the whole.

    That holds for GPT-2's split pattern and for tokenizers that split at spaces or characters."""
    held = ""
    for text in decoded(path, size):
        start = max(len(held) - 1, 0)
        held += text  # in place in CPython, where `held + text` would copy a long line for every block
        cut = CUT.match(held, start)  # only the new part is searched, or a long line would cost quadratic time
        if cut and cut.end():
            yield held[:cut.end()]
            held = held[cut.end():]
    if held:
        yield held


def files_below(root, skipped=()):
    """Return the text files below a folder in order of their paths, without hidden ones and folders in `skipped`."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found, key=Path.as_posix)


def documents_of(source, size=PIECE):
    """Yield each document of a source (dataset, file or folder) as an iterable of pieces, of files of about `size`."""
    if source == "tinyworld":
        yield from ((text,) for text in tinyworld("corpus", "train"))
        return
    if source == "tinyworld/instructions":  # for the tokenizer, which needs the words of questions too
        for entry in tinyworld("instructions", "train", 36_000):
            yield (format_prompt(entry, "plain") + format_response(entry["output"], "plain"),)
        return
    root = locate(source, "corpus")
    paths = files_below(root, SKIPPED if source == "stdlib" else ()) if root.is_dir() else [root]
    if not paths:
        raise ValueError(f"{root} holds no {', '.join(SUFFIXES)} file")
    for path in paths:
        if Path(path.name.lower().removesuffix(".gz")).suffix in (".csv", ".tsv", ".json"):
            raise ValueError(f"{path} holds records, not text to learn to write; put their text into a .jsonl file, a "
                             'line {"text": ...} each, or into a .txt file')
        if ".jsonl" in path.suffixes:
            yield from ((text_field(entry, "text", where),) for where, entry in records(path))
        else:
            yield pieces_of(path, size)


def parse_mix(source):
    """Return [(source, weight)] of `a:0.3,b:0.7`; a part without a weight has 1."""
    if source in DATASETS or os.path.exists(source):
        return [(source, 1.0)]
    parts = []
    for item in source.split(","):
        name, _, weight = item.rpartition(":")
        try:
            part = (name, float(weight)) if name else (item, 1.0)
        except ValueError:  # the colon belongs to the path, as in C:\notes.txt, or the weight is none
            part = (name, math.nan) if name in DATASETS or os.path.exists(name) else (item, 1.0)
        if not 0 < part[1] < math.inf:
            raise ValueError(f"{source}: the weight in {item!r} is not a positive number")
        parts.append(part)
    return parts


def mix(parts):
    """Yield pieces of several sources so that each has its share of the characters, until one of them runs out."""
    streams = [(piece for document in documents_of(name, MIXED) for piece in document) for name, _ in parts]
    given = [0] * len(parts)
    while True:
        turn = min(range(len(parts)), key=lambda i: given[i] / parts[i][1])  # who lags most behind its share
        piece = next(streams[turn], None)
        if piece is None:
            return
        given[turn] += len(piece)
        yield piece


def pieces(source):
    """Yield (document number, piece of text) of a source, in order; what `texts` joins and `prepare` encodes.

    Raises ValueError if it holds no text at all."""
    parts = parse_mix(str(source))
    documents = documents_of(parts[0][0]) if len(parts) == 1 else ((piece,) for piece in mix(parts))
    characters = 0
    for number, document in enumerate(documents):
        for piece in document:
            characters += len(piece)
            yield number, piece
    if not characters:
        raise ValueError(f"{source} is empty: it holds no text")


def texts(source):
    """Yield the documents of a source as strings.

    A source is a dataset's name (which goes before a file of that name), tinyworld/instructions (its questions and
    answers), a file, a folder (its .txt, .md, .py and .jsonl files in order of their paths, hidden ones left out), a
    .jsonl file (one document a line), or a mix `a:0.3,b:0.7`: 30% of the characters from a, 70% from b, taken in turns
    and ended when one of them runs out; files of a mix come as documents of about 4,000 characters."""
    for _, document in itertools.groupby(pieces(source), key=lambda item: item[0]):
        yield "".join(piece for _, piece in document)


# ---------------------------------------------------------------------------------------------------------------------
# Token files, windows and splits

PREPARED = Path("data/prepared")  # here even if $DATA_DIR is elsewhere, which may be read-only
FORMAT = 1  # part of the fingerprint: raise it when the same text would be written otherwise


def prepare(source, tokenizer):
    """Return the folder with train.bin and val.bin of a source, encoding it unless that was done before.

    The last 10% of the documents are for validation; of a single document, the last 10% of its characters. Each
    document is followed by the tokenizer's end of text, unless there is only one document."""
    builtin = str(source) == "tinyworld"  # its text takes seconds to make, so the code that makes it stands for it
    survey = None if builtin else take_survey(pieces(source))
    lasting = {key: value for key, value in tokenizer.to_dict().items() if key not in ("made", "sha256")}
    vocabulary = json_sha256(lasting)
    name = json_sha256([FORMAT, file_sha256(__file__) if builtin else survey["sha256"], vocabulary])[:16]
    if intact(PREPARED / name):
        return PREPARED / name
    content = list(pieces(source)) if builtin else pieces(source)
    survey = survey or take_survey(content)
    made = {"source": str(source), "source_sha256": survey["sha256"], "tokenizer_sha256": vocabulary,
            "vocab_size": tokenizer.vocab_size}
    PREPARED.mkdir(parents=True, exist_ok=True)
    sweep(PREPARED, ".tmp-*")
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=PREPARED) as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        for part, items in itertools.groupby(divide(content, survey), key=lambda item: item[0]):
            write_tokens(folder / f"{part}.bin", items, tokenizer, survey["documents"] > 1, made)
        if not (folder / "train.bin").exists() or not (folder / "val.bin").exists():
            raise ValueError(f"{source}: {survey['characters']} characters are too few to split off a validation part")
        try:
            os.replace(folder, PREPARED / name)
        except OSError:  # another process was faster, and made the same
            if not intact(PREPARED / name):
                raise
    return PREPARED / name


def json_sha256(value):
    """Return the sha256 of a value's JSON, which depends on no order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def take_survey(content):
    """Return the counts and the sha256 of (document number, piece) items, in one pass."""
    digest, documents, characters = hashlib.sha256(), 0, 0
    for number, piece in content:
        digest.update(b"\0" * (number + 1 - documents) + piece.encode())  # no text holds a zero, so it marks documents
        documents, characters = number + 1, characters + len(piece)
    return {"documents": documents, "characters": characters, "sha256": digest.hexdigest()}


def divide(content, survey):
    """Yield ("train" or "val", document number, piece): the first 90% of documents, or of one's characters, train."""
    single, seen = survey["documents"] == 1, 0
    border = survey["characters" if single else "documents"] * 9 // 10
    for number, piece in content:
        cut = border - seen if single else len(piece) * (number < border)
        cut, seen = min(max(cut, 0), len(piece)), seen + len(piece)
        if cut:
            yield "train", number, piece[:cut]
        if cut < len(piece):
            yield "val", number, piece[cut:]


def write_tokens(path, items, tokenizer, joined, made):
    """Write the tokens of (part, number, piece) items to `path`, and the counts to the .json beside it."""
    wide = tokenizer.vocab_size > 1 << 16
    count, digest, shown = Counter(), hashlib.sha256(), time.monotonic()
    with atomic(path) as file:
        ahead = encoded(((number, piece) for _, number, piece in items), tokenizer)
        for _, document in itertools.groupby(ahead, key=lambda item: item[0]):
            for _, piece, ids in document:
                add_tokens(file, digest, ids, tokenizer.vocab_size, wide)
                count.update(tokens=len(ids), characters=len(piece), bytes=len(piece.encode()))
                if time.monotonic() - shown > 2:
                    note(f"{path.stem}: {count['tokens']:,} tokens, {count['characters']:,} characters")
                    shown = time.monotonic()
            count.update(documents=1)
            if joined and tokenizer.eot_id is not None:
                add_tokens(file, digest, [tokenizer.eot_id], tokenizer.vocab_size, wide)
                count.update(tokens=1)
        if not count["tokens"]:
            raise ValueError(f"the {path.stem} split of {made['source']} has no tokens: more text is needed")
    about = {**made, **count, "dtype": "uint32" if wide else "uint16", "sha256": digest.hexdigest()}
    with atomic(path.with_suffix(".json")) as file:  # its own sum lets damage show here too
        file.write((json.dumps({**about, "sum": json_sha256(about)}, indent=1) + "\n").encode())


def encoded(items, tokenizer):
    """Yield (document number, piece, its ids) of (document number, piece) items, in order.

    Threads encode long pieces ahead, as tiktoken lets go of the interpreter; elsewhere they would only cost."""
    long = 10_000 if getattr(tokenizer, "fast", None) else math.inf  # made here, where there is but one thread
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting = collections.deque()
        for number, piece in items:
            waiting.append((number, piece, pool.submit(tokenizer.encode_array, piece) if len(piece) >= long else None))
            if len(waiting) > 16:
                number, piece, job = waiting.popleft()
                yield number, piece, job.result() if job else tokenizer.encode_array(piece)
        for number, piece, job in waiting:
            yield number, piece, job.result() if job else tokenizer.encode_array(piece)


def add_tokens(file, digest, ids, vocab_size, wide):
    """Append ids to a token file and to its sum; raises ValueError for an id outside the vocabulary."""
    fast = isinstance(ids, array.array) and ids.itemsize == 4 and len(ids)  # no Python number of a token is made
    if fast:
        low, high = torch.frombuffer(ids, dtype=torch.int32).aminmax()
    else:
        low, high = min(ids, default=0), max(ids, default=0)
    if not 0 <= low <= high < vocab_size:
        raise ValueError(f"the tokenizer gave an id outside its vocabulary of {vocab_size:,}: {max(ids)}")
    if fast and not wide:
        numbers = memoryview(ids).cast("B").cast("H")[::2].tobytes()  # the low halves: all here is little-endian
    else:
        numbers = array.array("I" if wide else "H", ids)
    digest.update(numbers)
    file.write(numbers)


def intact(folder):
    """Return True if a prepared folder can be used; a damaged one is reported and removed."""
    if not folder.exists():
        return False
    try:
        for part in ("train", "val"):
            load_tokens(folder / f"{part}.bin")
        return True
    except (OSError, ValueError) as error:
        note(f"{error}; it is made again")
        shutil.rmtree(folder)
        return False


def token_info(path):
    """Return what the .json beside a token file says, a dict: tokens, documents, characters, bytes, vocab_size, dtype,
    source, source_sha256, tokenizer_sha256.

    Bits per byte = mean loss in nats x tokens / (ln 2 x bytes)."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python data.py prepare")
    info = parse_json(read_text(path), path)
    if not isinstance(info, dict) or info.pop("sum", None) != json_sha256(info):
        raise ValueError(f"{path}: damaged; remove its folder and run: python data.py prepare")
    return info


def load_tokens(path):
    """Return a token file as a mapped 1-D tensor (uint16 or uint32) after checking size, sum and ids.

    Raises ValueError if anything does not fit the .json beside it."""
    path, info = Path(path), token_info(path)
    dtype = getattr(torch, info["dtype"])
    expected, size = info["tokens"] * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path}: expected {expected:,} bytes, got {size:,}")
    if file_sha256(path) != info["sha256"]:
        raise ValueError(f"{path}: damaged, its sha256 is not the one in {path.stem}.json")
    tokens = torch.from_file(str(path), shared=False, size=info["tokens"], dtype=dtype)
    highest = max(int(block.to(torch.int64).max()) for block in tokens.split(1 << 20))
    if highest >= info["vocab_size"]:
        raise ValueError(f"{path}: holds token {highest}, but its vocabulary ends at {info['vocab_size'] - 1}")
    return tokens


class SlidingWindowDataset(torch.utils.data.Dataset):
    """Windows of `context_length` tokens, `stride` apart, as pairs (ids, targets): the targets are one token later.

    Where the last full window would leave tokens over, one more window ends at the last token, and its targets that an
    earlier window has had are IGNORE: with stride = context_length every token but the first is a target exactly once.
    `tail=False` leaves that window out. `tokens` is a 1-D tensor of any integer type; all pairs are int64."""

    def __init__(self, tokens, context_length, stride, tail=True):
        if context_length < 1 or stride < 1:
            raise ValueError(f"context_length {context_length} and stride {stride} must be at least 1")
        if len(tokens) <= context_length:
            raise ValueError(f"have {len(tokens):,} tokens, need at least {context_length + 1:,} for one window: give "
                             f"more text or lower --context_length")
        self.windows = tokens.unfold(0, context_length + 1, 1)  # a view of every window there is; nothing is copied
        self.stride, self.full = stride, (len(self.windows) - 1) // stride + 1
        covered = (self.full - 1) * stride + context_length  # the last target of the full windows
        self.tail = tail and stride <= context_length and covered < len(tokens) - 1
        self.repeated = torch.arange(len(self.windows), len(tokens)) <= covered  # targets of the tail that were had

    def __len__(self):
        return self.full + self.tail

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ids, targets = self.batch(torch.tensor([index]))
        return ids[0], targets[0]

    def batch(self, indices):
        """Return (ids, targets), each (B, T) int64, of windows `indices` (B,), without a loop over them."""
        indices = torch.as_tensor(indices)
        windows = self.windows[(indices * self.stride).clamp(max=len(self.windows) - 1)].to(torch.int64)
        ids, targets = windows[:, :-1], windows[:, 1:]
        if self.tail:
            targets = targets.masked_fill((indices == self.full)[:, None] & self.repeated, IGNORE)
        return ids, targets


def seeded(*parts):
    """Return a torch.Generator that depends on these numbers or words alone, on any machine and any Python."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(n, seed, epoch):
    """Return the order of n items in an epoch, a permutation (n,) int64; it depends on seed and epoch alone."""
    return torch.randperm(n, generator=seeded("epoch", seed, epoch))


def split(items, train=0.85, val=0.05, seed=123, group=None):
    """Return three shuffled lists (train, val, test): the given shares of the items, and the rest.

    `group` maps an item to a key; items with equal keys stay together, so that a prompt asked in training is never
    tested. Shares are then met to within one group."""
    if not (train >= 0 and val >= 0 and train + val <= 1 + 1e-9):
        raise ValueError(f"train {train} and val {val} must be shares that add up to at most 1")
    groups = {}
    for index, item in enumerate(items):
        groups.setdefault(index if group is None else group(item), []).append(item)
    groups = list(groups.values())
    total = sum(len(members) for members in groups)
    border = int(total * train + 1e-9)  # rounded down; 0.1 + 0.2 and the like are forgiven
    borders = (border, border + int(total * val + 1e-9))
    parts, done = ([], [], []), 0
    for index in torch.randperm(len(groups), generator=seeded("split", seed)).tolist():
        parts[(done >= borders[0]) + (done >= borders[1])].extend(groups[index])
        done += len(groups[index])
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Records: labels, instructions, preferences

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: legal in JSON's escapes, but no text


def parse_json(text, where):
    """Return what strict JSON says: no NaN, no key twice in an object, no depth that breaks the parser."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def unique_keys(pairs):
    """Return a JSON object as a dict; json itself would keep the last of two equal keys and say nothing."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def refuse_constant(name):
    """Raise ValueError for NaN and Infinity, which json reads though JSON has no such numbers."""
    raise ValueError(f"{name} is not JSON")


def records(path):
    """Yield (where, dict) for each object of a .json list or of a .jsonl file's lines; ValueError names the place."""
    if ".jsonl" in path.suffixes:
        entries = ((f"{path} line {number}", line) for number, line in enumerate(lines_of(path), 1) if line.strip())
        entries = ((where, parse_json(line, where)) for where, line in entries)
    else:
        content = parse_json(read_text(path), path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects, got {type(content).__name__}")
        entries = ((f"{path}[{number}]", entry) for number, entry in enumerate(content))
    empty = True
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
        yield where, entry
        empty = False
    if empty:
        raise ValueError(f"{path} is empty: it holds no entries")


def lines_of(path):
    """Yield the lines of a text file without their ends, reading a MiB at a time."""
    held = ""
    for text in decoded(path, 1 << 20):
        *lines, held = (held + text).split("\n")  # splitlines would also cut at characters inside a JSON string
        yield from lines
    if held:
        yield held


def text_field(entry, key, where):
    """Return entry[key], which must be a string; ValueError names the place and the key."""
    if key not in entry:
        raise ValueError(f"{where}: the key {key!r} is missing")
    if not isinstance(entry[key], str):
        raise ValueError(f"{where}: {key!r} must be text, not {type(entry[key]).__name__}")
    clean, count = SURROGATE.subn("\ufffd", entry[key])
    if count:
        note(f"{where}: {count} halves of characters in {key!r} replaced by U+FFFD")
    return clean


def read_labelled(source, labels=None):
    """Return the rows of a labelled file or dataset as (label, text) pairs of strings.

    Formats by name: .csv with a header naming `label` and `text`; .json and .jsonl with these keys; anything else is
    label<TAB>text in which quotes mean nothing. A malformed row is a ValueError that names it."""
    path = locate(source, "messages")
    if ".csv" in path.suffixes:
        rows = csv_rows(path)
    elif {".json", ".jsonl"} & set(path.suffixes):
        rows = ((where, str(entry["label"]) if type(entry.get("label")) is int else text_field(entry, "label", where),
                 text_field(entry, "text", where)) for where, entry in records(path))
    else:
        rows = ((f"{path} row {number}", *line.split("\t", 1)) for number, line in enumerate(lines_of(path), 1) if line)
    pairs = []
    for where, *row in rows:
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{where}: expected a label and a text, got {' and '.join(map(repr, row))[:80]}")
        pair = row[0].strip(), row[1]
        if not pairs and tuple(map(str.lower, pair)) == ("label", "text"):  # a header
            continue
        if labels is not None and pair[0] not in labels:
            raise ValueError(f"{where}: the label {pair[0]!r}; the model knows {', '.join(labels)}")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} is empty: it holds no rows")
    return pairs


def csv_rows(path):
    """Yield (where, label, text) of a .csv file with a header; strict, so that a lost quote cannot swallow rows."""
    reader, start = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 1
    try:
        header = next(reader)
        if not {"label", "text"} <= set(header):
            raise ValueError(f"{path}: the first row must name the columns label and text between commas, got "
                             f"{header}")
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"{path} row {start}: {len(row)} columns, expected {len(header)}")
            if row:
                yield f"{path} row {start}", row[header.index("label")], row[header.index("text")]
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} row {start}: {error}") from None


def read_instructions(source):
    """Return the entries of an instruction file or dataset, dicts with the strings `instruction`, `input`, `output`.

    `input` may be missing and is then ""; other keys are kept. Raises ValueError with the entry and the key."""
    entries = []
    for where, entry in records(locate(source, "instructions")):
        fields = {key: text_field(entry, key, where) for key in ("instruction", "output")}
        fields["input"] = text_field({"input": "", **entry}, "input", where)
        entries.append({**entry, **fields})
    return entries


def read_preferences(source):
    """Return the pairs of a preference file or dataset, each as `preference` makes it.

    HH-RLHF transcripts whose two sides differ before the last answer are left out and counted on stderr."""
    pairs = [preference(entry, where) for where, entry in records(locate(source, "preferences"))]
    whole = [pair for pair in pairs if pair is not None]
    if len(whole) < len(pairs):
        note(f"{source}: {len(pairs) - len(whole)} of {len(pairs)} transcripts left out, their prompts differ")
    if not whole:
        raise ValueError(f"{source}: in no entry do both transcripts answer the same prompt")
    return whole


def preference(entry, where="entry"):
    """Return one comparison as a dict of strings: instruction, input, prompt, chosen, rejected.

    Answers come as `response_1`, `response_2` and `preferred` (1 or 2), or as `chosen` and `rejected`; the question as
    `prompt`, as `instruction` with `input`, or, in HH-RLHF's form, as the part of both transcripts up to the last
    "Assistant:" (None if these parts differ). `prompt` is raw text, instruction and input on lines of their own; a
    prompt given as such is the instruction, so that `format_prompt` takes every result."""
    if "preferred" in entry or "response_1" in entry:
        answers = text_field(entry, "response_1", where), text_field(entry, "response_2", where)
        preferred = entry.get("preferred")
        if type(preferred) is not int or preferred not in (1, 2):
            raise ValueError(f"{where}: 'preferred' must be 1 or 2, not {preferred!r}")
        chosen, rejected = answers if preferred == 1 else answers[::-1]
    else:
        chosen, rejected = text_field(entry, "chosen", where), text_field(entry, "rejected", where)
    added = ""
    if "instruction" in entry:
        instruction = text_field(entry, "instruction", where)
        added = text_field({"input": "", **entry}, "input", where)
    elif "prompt" in entry:
        instruction = text_field(entry, "prompt", where)
    else:
        instruction, mark, chosen = chosen.rpartition("\n\nAssistant:")
        other, _, rejected = rejected.rpartition("\n\nAssistant:")
        if not mark:
            raise ValueError(f"{where}: needs 'prompt' or 'instruction', or transcripts with an 'Assistant:' turn")
        if other != instruction:
            return None
        instruction, chosen, rejected = instruction.strip(), chosen.strip(), rejected.strip()
    asked = {"instruction": instruction, "input": added}
    return {**asked, "prompt": prompt_of(asked), "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------------------------------------------------------------
# Instructions: format and collation

# What stands before the instruction, before an input, after both, and before the response. `alpaca` is the wording of
# Stanford Alpaca's prompt without input, which the book uses for all. `plain` costs three tokens: for a small context.
TEMPLATES = {
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n", ""),
    "plain": ("", "\n ", "\n>", " "),
}


def format_prompt(entry, template):
    """Return the text a model is given: instruction (or `prompt`) and input in the words of a template.

    format_prompt({"instruction": "Add.", "input": "2 and 3"}, "plain") -> "Add.\\n 2 and 3\\n>" """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; one of: {', '.join(TEMPLATES)}")
    before, between, after, _ = TEMPLATES[template]
    instruction = entry["instruction"] if "instruction" in entry else entry["prompt"]
    return before + instruction + (between + entry["input"] if entry.get("input") else "") + after


def prompt_of(entry):
    """Return the raw text of an example's question: its instruction and, on a second line, indented, its input.

    That is what `plain` makes of both, so a prompt given as one text reaches the model as the same tokens."""
    return entry["instruction"] + (TEMPLATES["plain"][1] + entry["input"] if entry.get("input") else "")


def format_response(response, template):
    """Return a response as it follows a template's prompt. Encode the two apart: no token spans their border."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; one of: {', '.join(TEMPLATES)}")
    return TEMPLATES[template][3] + response


def collate_instructions(batch, pad_id, max_length=None, eot_id=None):
    """Return (ids, targets), each (B, T) int64, of token lists, padded to the longest or cut to `max_length`.

    An item is a list of ids without an end, or a pair (ids, prompt length) whose first so many tokens are no targets.
    One end of text, `eot_id` (default: pad_id, as GPT-2 has no pad), is added to each and learned; the rest is IGNORE.
    Source: Raschka 2024, section 7.3."""
    eot_id = pad_id if eot_id is None else eot_id
    pairs = [item if isinstance(item, tuple) else (item, 0) for item in batch]
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    targets = torch.full((len(pairs), width), IGNORE)
    for row, (tokens, prompt) in enumerate(pairs):
        tokens = torch.tensor([*tokens, eot_id])
        ids[row, :len(tokens)] = tokens[:width]
        first = max(prompt - 1, 0)  # this position predicts the first token after the prompt
        targets[row, first:len(tokens) - 1] = tokens[first + 1:]
    return ids[:, :max_length], targets[:, :max_length]


# ---------------------------------------------------------------------------------------------------------------------
# tinyworld: a small consistent world, generated, seen four ways, and scored exactly.
#
#   words  ->  rules (plural, past tense, passive, a + b)  ->  tables of templates  ->  corpus        stories in prose
#                                                                                       messages      spam or ham
#                                                                                       instructions  question, answer
#                                                                                       preferences   the better of two
#
# Words. Some 600 English ones in compact strings, and 255 invented ones ("blick", "zindle") that follow every rule:
# whoever can form the plural of a word that does not exist has learnt the rule and not the list.
# Rules. Every answer is computed, never stored, and is one sentence or word that ends with a full stop. The same
# function makes the answer of an example and recomputes it, from the bare text of a prompt, in `gold_score`.
# Tables. What a reader may want to change stands in tables of one template a line: TASKS (the questions), BEATS (the
# sentences of stories), MESSAGES, MANNERS. A slot is written {like_this}.
#
# What is held out. `split_of(key)`, a checksum and no random number, sends each key to train, val or test for ever, in
# all views and under all seeds:
#   - sums, sets of numbers, measures, sentences, stories and lists: the key is the thing itself;
#   - kinds about one word (plural, past, opposite, synonym, spelling, case, fact): the key is the word together with
#     the phrasing, so that a test question asks for a known word in words it was never asked in;
#   - and of these words one in eight is `unseen` in a kind: training never asks for it. Results on these stand apart.
# The corpus shows only what falls to train, and of unseen words no form that a rule makes. Knowledge, which no rule
# yields (where a fox lives, what an opposite is, that a goose becomes geese), it tells of every word, in prose: there
# only the question is held out, and an answer to it has to come from pretraining.
#
# Manners. An answer comes bare, courteous, curt or rambling: phrases around it that `strip_manner` takes off again.
# The hidden rubric of the preferences (`gold_score`) wants it right first, then courteous, complete and not padded.


def split_of(*key):
    """The split, "train" (80%), "val" (5%) or "test" (15%), that a key belongs to, on every machine and seed."""
    place = zlib.crc32("|".join(map(str, key)).encode()) % 100
    return "train" if place < 80 else "val" if place < 85 else "test"


def _table(text):
    """{first: (second, ...)} of the words `first:second:...` of a compact string; `_` stands for a space."""
    rows = [word.replace("_", " ").split(":") for word in text.split()]
    return {row[0]: tuple(row[1:]) for row in rows}


# People: name, pronoun, job, town.
PEOPLE = _table("""
Tom:he:baker:Bramley Ann:she:nurse:Corfe Ben:he:miller:Dunmore Mia:she:pilot:Elmsby Leo:he:potter:Fairhill
Eva:she:doctor:Garston Sam:he:farmer:Holt Ida:she:painter:Ivybridge Max:he:sailor:Kestrel Zoe:she:singer:Lowick
Paul:he:teacher:Marsden Ruth:she:weaver:Norwell Jack:he:cobbler:Corfe Lily:she:gardener:Bramley Hugo:he:tailor:Elmsby
Nora:she:judge:Dunmore Finn:he:drummer:Garston Rosa:she:cook:Fairhill Otto:he:plumber:Ivybridge Emma:she:writer:Holt
Karl:he:barber:Lowick Vera:she:dentist:Kestrel Owen:he:shepherd:Norwell Jane:she:clerk:Marsden Dan:he:juggler:Elmsby
Lucy:she:dancer:Corfe Peter:he:guard:Fairhill Alice:she:hunter:Garston
""")
# Animals: name, home, food. The homes are such that "lives" goes before them.
ANIMALS = _table("""
fox:in_a_den:mice bee:in_a_hive:nectar horse:in_a_stable:hay owl:in_a_tree:mice rabbit:in_a_burrow:clover
dog:in_a_kennel:bones cow:in_a_barn:grass hen:in_a_coop:corn duck:on_a_pond:bread pig:in_a_sty:turnips
spider:in_a_web:flies snail:in_a_shell:lettuce bear:in_a_cave:honey camel:in_the_desert:dates
monkey:in_the_jungle:bananas seal:on_the_ice:fish whale:in_the_sea:shrimps eagle:on_a_cliff:snakes
beaver:in_a_lodge:bark mole:under_the_lawn:worms goat:on_a_hill:thistles cat:in_a_house:fish parrot:in_a_cage:seeds
squirrel:in_an_oak:nuts frog:in_a_swamp:flies swan:on_a_lake:reeds lion:in_the_grassland:zebras
tiger:in_the_jungle:deer panda:in_a_forest:bamboo crab:on_a_beach:seaweed hedgehog:under_a_hedge:slugs
bat:in_an_attic:moths donkey:in_a_stable:carrots wolf:in_a_cave:sheep mouse:in_a_hole:cheese goose:on_a_pond:grass
sheep:in_a_fold:clover
""")
OBJECTS = """
ball kite cup lamp drum bell rope box key hat coat book chair table clock spoon fork plate bottle basket candle brush
bucket button carpet coin comb crown cushion dish doll door feather flag flute glove guitar hammer helmet jar jug
kettle ladder letter map mirror mug nail needle net oar pan paper pen pencil piano picture pillow pipe pot purse
puzzle quilt ribbon ring rug sack saddle saw shoe shovel sock sofa stamp stick stool stove suitcase sword tent ticket
towel toy tray trumpet umbrella vase violin wagon wallet wheel whistle window bench blanket boat boot bowl broom cart
chain chest curtain dress engine envelope hook horn kilt lantern magnet marble mat medal necklace paddle parcel rake
raft robe sail shawl shirt sled statue string tie trolley torch wig knife shelf scarf
""".split()
FOODS = """
apple pear plum egg cake pie bun carrot potato tomato onion nut fig lemon melon cherry peach sandwich pancake biscuit
sausage bean waffle olive grape radish turnip pickle muffin dumpling noodle pepper berry mango tart loaf
""".split()
PLACES = """
market mill school river bridge church harbour station library bakery museum park shop farm castle tower beach lake
stable theatre bank workshop hotel gate square pier fountain fair inn office zoo well forge cinema hospital palace
dairy laundry airport
""".split()
COLOURS = "red blue green yellow white black brown grey pink purple orange golden".split()
IRREGULAR = {word: plural for word, (plural,) in _table("""
mouse:mice goose:geese man:men woman:women child:children foot:feet tooth:teeth ox:oxen louse:lice leaf:leaves
wolf:wolves knife:knives loaf:loaves shelf:shelves wife:wives thief:thieves calf:calves half:halves scarf:scarves
sheep:sheep moose:moose potato:potatoes tomato:tomatoes hero:heroes echo:echoes postman:postmen person:people
mango:mangoes
""").items()}
# Verbs: base, past, participle where they differ from the regular form; by what they are done to.
VERBS = {group: _table(text) for group, text in {
    "food": """
eat:ate:eaten cook bake taste cut:cut:cut peel fry slice boil buy:bought:bought sell:sold:sold share
steal:stole:stolen serve grow:grew:grown order burn hide:hid:hidden chew swallow
""",
    "thing": """
carry lose:lost:lost find:found:found break:broke:broken paint clean wash drop:dropped:dropped lift push pull kick
throw:threw:thrown catch:caught:caught hold:held:held take:took:taken mend repair borrow draw:drew:drawn fix touch
count move drag:dragged:dragged weigh polish collect shake:shook:shaken bend:bent:bent pack roll wrap:wrapped:wrapped
choose:chose:chosen send:sent:sent hang:hung:hung lend:lent:lent tear:tore:torn win:won:won build:built:built
""",
    "animal": """
chase feed:fed:fed follow help see:saw:seen hear:heard:heard watch visit greet hug:hugged:hugged lead:led:led
teach:taught:taught call know:knew:known forget:forgot:forgotten like love fear trust bite:bit:bitten ride:rode:ridden
meet:met:met keep:kept:kept
""",
    "none": """
go:went:gone run:ran:run sit:sat:sat sing:sang:sung sleep:slept:slept swim:swam:swum walk jump dance laugh smile play
cry fly:flew:flown fall:fell:fallen rise:rose:risen speak:spoke:spoken dream wait climb arrive rest shout whisper
listen talk travel return wander sneeze yawn snore nod:nodded hop:hopped skip:skipped clap:clapped stand:stood:stood
think:thought:thought swing:swung:swung creep:crept:crept weep:wept:wept stay work hurry write:wrote:written
read:read:read begin:began:begun come:came:come drink:drank:drunk drive:drove:driven fight:fought:fought
freeze:froze:frozen kneel:knelt:knelt leave:left:left say:said:said shine:shone:shone sink:sank:sunk spend:spent:spent
sweep:swept:swept tell:told:told wake:woke:woken wear:wore:worn give:gave:given bring:brought:brought
""",
}.items()}
OPPOSITES = _table("""
hot:cold big:small happy:sad fast:slow old:new tall:short heavy:light dark:bright full:empty rich:poor hard:soft
loud:quiet clean:dirty wet:dry near:far high:low deep:shallow early:late open:closed strong:weak sweet:sour
rough:smooth brave:timid kind:cruel true:false safe:dangerous cheap:expensive first:last up:down before:after
always:never push:pull buy:sell give:take win:lose laugh:cry rise:fall friend:enemy day:night summer:winter north:south
east:west top:bottom love:hate war:peace alive:dead front:back left:right
""")
SYNONYMS = _table("""
large:huge little:tiny quick:rapid glad:cheerful begin:commence angry:cross clever:smart ill:sick odd:strange
silent:still nice:pleasant pretty:lovely easy:simple difficult:tricky talk:chat mend:fix gift:present road:street
sea:ocean boat:ship house:home seat:chair rug:carpet pail:bucket hat:cap path:trail stream:brook error:mistake
journey:trip tale:story job:task prize:award rabbit:bunny baby:infant help:aid wish:desire throw:toss tasty:delicious
correct:accurate damp:moist calm:peaceful lazy:idle sleepy:drowsy lucky:fortunate
""")
# Measures: the bigger unit, how many of the smaller one it holds, the smaller one.
UNITS = _table("""
hour:60:minute minute:60:second week:7:day year:12:month decade:10:year century:100:year foot:12:inch yard:3:foot
metre:100:centimetre centimetre:10:millimetre kilometre:1000:metre kilogram:1000:gram litre:1000:millilitre
dollar:100:cent dime:10:cent gallon:4:quart dozen:12:egg pair:2:shoe tonne:1000:kilogram decimetre:10:centimetre
kilowatt:1000:watt kilobyte:1000:byte megabyte:1000:kilobyte franc:100:centime
""")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
# Invented words: every start with every end.
STARTS = "bli dra fle glu gri klo kru nu pla sko smi tre vo wu zi".split()
INVENTED_NOUNS = [start + end for start in STARTS for end in "ck lp mmel bbin ndle ffet stow rb zz tch bby".split()]
INVENTED_VERBS = [start + end for start in STARTS for end in "rn rf mple zzer nny sk".split()]
INVENTED = {*INVENTED_NOUNS, *INVENTED_VERBS}


# Rules.


def with_s(word):
    """The word with s, a regular plural or what "she" does: cup -> cups, bunny -> bunnies, watch -> watches."""
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in ("go", "do"):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"


def plural(noun):
    """The plural of any noun: mouse -> mice, blick -> blicks."""
    return IRREGULAR.get(noun) or with_s(noun)


def with_ed(verb):
    """The past of a regular verb: walk -> walked, bake -> baked, carry -> carried."""
    if verb[-1] == "y" and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb[-1] == "e" else "ed")


def capital(text):
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def article(noun):
    """ "a cup", "an owl"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def irregular(kind, word):
    """True for a plural or past tense that no rule makes."""
    return word in IRREGULAR if kind == "plural" else kind == "past" and PAST[word] != with_ed(word)


def unseen(kind, word):
    """True for the one word in eight that training never asks for in this kind.

    Regular English plurals and pasts are never unseen, as stories cannot do without them; invented ones may be."""
    if kind in ("plural", "past") and word not in INVENTED and not irregular(kind, word):
        return False
    return zlib.crc32(f"unseen|{kind}|{word}".encode()) % 8 == 0


def shown(kind, word):
    """True where a text may show what a kind makes of a word: it is not held out, or it is no rule that makes it."""
    return irregular(kind, word) or not unseen(kind, word)


NOUNS = list(dict.fromkeys([*ANIMALS, *OBJECTS, *FOODS, *PLACES, *(job for _, job, _ in PEOPLE.values()), *IRREGULAR]))
TOWNS = sorted({town for _, _, town in PEOPLE.values()})
PAST = {verb: forms[0] if forms else with_ed(verb) for group in VERBS.values() for verb, forms in group.items()}
PAST.update({verb: with_ed(verb) for verb in INVENTED_VERBS})
PARTICIPLE = {verb: forms[1] for group in VERBS.values() for verb, forms in group.items() if len(forms) > 1}
OPPOSITE = {x: y for a, (b,) in OPPOSITES.items() for x, y in ((a, b), (b, a))}
SYNONYM = {x: y for a, (b,) in SYNONYMS.items() for x, y in ((a, b), (b, a))}
FACTS = {("home", animal): home for animal, (home, _) in ANIMALS.items()}
FACTS.update({("food", animal): food for animal, (_, food) in ANIMALS.items()})
FACTS.update({("job", name): job for name, (_, job, _) in PEOPLE.items()})
FACTS.update({("town", name): town for name, (_, _, town) in PEOPLE.items()})
NEXT = [pair for row in (DAYS, MONTHS) for pair in zip(row, row[1:] + row[:1])]
FACTS.update({("next", now): then for now, then in NEXT})
FACTORS = {(plural(big), plural(small)): (int(n), 1) for big, (n, small) in UNITS.items()}  # 3 hours: 3 * 60 / 1
FACTORS.update({(small, big): (1, n) for (big, small), (n, _) in FACTORS.items() if n in (10, 100, 1000)})
SPELT = [word for word in [*ANIMALS, *FOODS, *COLOURS, *INVENTED_NOUNS] if len(word) < 7]
WORDS = {  # what the kinds about one word ask for
    "plural": [*NOUNS, *INVENTED_NOUNS],
    "past": list(PAST),
    "opposite": list(OPPOSITE),
    "synonym": list(SYNONYM),
    "spelling": SPELT,
    "case": SPELT,
    "fact": list(FACTS),
}
ACTED_ON = {  # what the verbs of each group are done to
    "food": FOODS, "animal": list(ANIMALS),
    "thing": OBJECTS + INVENTED_NOUNS[::3], "invented": OBJECTS + INVENTED_NOUNS[1::3],
}
ACTIONS = {group: [verb for verb in VERBS.get(group, INVENTED_VERBS) if shown("past", verb)] for group in ACTED_ON}
PASSIVE = {form: (be, PARTICIPLE.get(verb, PAST[verb])) for verbs in ACTIONS.values() for verb in verbs
           for form, be in ((with_s(verb), ("is", "are")), (PAST[verb], ("was", "were")))}
PLURALS = {plural(noun) for noun in WORDS["plural"]} - set(WORDS["plural"])


def passive(sentence):
    """The passive of a sentence: "The cook ate the pies." -> "The pies were eaten by the cook."."""
    words = sentence[:-1].split()
    at = 2 if words[0] == "The" else 1
    subject, (be, participle), done_to = " ".join(words[:at]), PASSIVE[words[at]], words[at + 1:]
    subject = subject[0].lower() + subject[1:] if at == 2 else subject
    return capital(" ".join([*done_to, be[done_to[-1] in PLURALS], participle, "by", subject])) + "."


def follow(story):
    """Three dicts, who has each thing, its colour, and where each person is, at the end of a story."""
    owner, colour, place = {}, {}, {}
    for words in (sentence.rstrip(".").split() for sentence in story.split(". ")):
        if words[1] == "gave":
            owner[words[3]] = words[5]
        elif words[-3] == "at":
            place[words[0]] = words[-1]
        else:
            owner[words[-1]], colour[words[-1]] = words[0], words[-2]
    return owner, colour, place


def told(story, thing=None, name=None, asked="who"):
    """What a story says at its end: who has a thing, its colour, what a person has, or where a person is.

    In a sentence that names first what was asked about: so a model looks that up in the story and goes on from there.
    Asked for the bare name or colour, small models stayed at chance between two owners after 20,000 examples."""
    owner, colour, place = follow(story)
    if asked == "what":
        things = [thing for thing in owner if owner[thing] == name] or [owner[name]]  # a KeyError if there are none
        return f"{name} has " + " and ".join(article(f"{colour[thing]} {thing}") for thing in things)
    if asked == "where":
        return f"{name} is at the {place[name]}"
    return f"The {thing} is with {owner[thing]}" if asked == "who" else f"The {thing} is {colour[thing]}"


def numbers_in(text):
    """The numbers of a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


ANSWERS = {  # by kind: from what is asked and the slots of a line of TASKS to the answer, without its full stop
    "passive": lambda asked, sentence: passive(sentence)[:-1],
    "synonym": lambda asked, word: SYNONYM[word],
    "opposite": lambda asked, word: OPPOSITE[word],
    "plural": lambda asked, word: plural(word),
    "past": lambda asked, word: PAST[word],
    "spelling": lambda asked, word: " ".join(word),
    "case": lambda asked, word: word.upper() if asked == "upper" else word.lower(),
    "convert": lambda asked, n, big, small: f"{int(n) * FACTORS[big, small][0] // FACTORS[big, small][1]} {small}",
    "compare": lambda asked, numbers: (max if asked == "largest" else min)(numbers_in(numbers)),
    "count": lambda asked, items: sum(asked == "words" or item in ANIMALS for item in items.split(", ")),
    "add": lambda asked, a, b, **others: int(a) + int(b),
    "story": lambda asked, **slots: told(asked=asked, **slots),
    "fact": lambda asked, word: FACTS[asked, word],
}

# Questions: kind (and what is asked), instruction, and after a slash the input, which gets a line of its own.
TASKS = """
passive: Rewrite this sentence in the passive voice. / {sentence}
passive: Turn the sentence round, into the passive. / {sentence}
passive: Say this in the passive: {sentence}
passive: Who did it comes last. Write the sentence again. / {sentence}
synonym: What is another word for {word}?
synonym: Find a word with the same meaning. / {word}
synonym: Which word means the same as {word}?
synonym: I do not want to say {word} again. What else can I say?
opposite: What is the opposite of {word}?
opposite: Find a word with the opposite meaning. / {word}
opposite: Not {word}, but the very opposite: what is the word?
opposite: Which word says the reverse of {word}?
plural: What is the plural of {word}?
plural: Give the plural of this noun. / {word}
plural: What do you call more than one {word}?
plural: Here is one {word}, and there is a second one. Two what?
past: What is the past tense of {word}?
past: Put this verb into the past tense. / {word}
past: Today they {word}. What did they do yesterday?
past: Which form of {word} goes with "last week"?
spelling: How do you spell {word}?
spelling: Spell this word. / {word}
spelling: Which letters make the word {word}?
spelling: Read out the letters of {word}, one by one.
case upper: Write {word} in capital letters.
case upper: Put this word in upper case. / {word}
case upper: How does {word} look on a sign, all in capitals?
case lower: Write {WORD} in small letters.
case lower: Put this word in lower case. / {WORD}
case lower: Do not shout {WORD}. Whisper it, in small letters.
convert: How many {small} are {n} {big}?
convert: Convert {n} {big} to {small}.
convert: Give this in {small}. / {n} {big}
convert: What do {n} {big} come to, counted in {small}?
compare largest: Which number is the largest? / {numbers}
compare largest: Pick the highest of {numbers}.
compare largest: Of the numbers {numbers}, which is the most?
compare smallest: Which number is the smallest? / {numbers}
compare smallest: Pick the lowest of {numbers}.
compare smallest: Of the numbers {numbers}, which is the least?
count words: How many words are in this list? / {items}
count words: Count the words: {items}
count animals: How many of these are animals? / {items}
count animals: Count only the animals: {items}
add: What is {a} plus {b}?
add: Add {a} and {b}.
add: How much do these make together? / {a} and {b}
add: {name} has {a} {things} and gets {b} more. How many are there now?
story who: Who has the {thing} at the end? / {story}
story who: {story} Who has the {thing} now?
story what: What does {name} have at the end? / {story}
story what: {story} What does {name} have now?
story colour: What colour is the {thing}? / {story}
story colour: {story} Which colour does the {thing} have?
story where: Where is {name}? / {story}
story where: {story} At which place do we find {name}?
fact home: Where does the {word} live?
fact home: Name the home of this animal. / {word}
fact home: In what place would you look for the {word}?
fact home: The {word} goes home. To what place?
fact food: What does the {word} eat?
fact food: Name the food of this animal. / {word}
fact food: What would you feed to the {word}?
fact food: The {word} is hungry. What does it want?
fact job: What is {word}'s job?
fact job: Name the work of this person. / {word}
fact job: What work does {word} do?
fact town: In which town does {word} live?
fact town: Name the home town of this person. / {word}
fact town: A letter is for {word}. To which town does it go?
fact next: What comes right after {word}?
fact next: Name the one that follows. / {word}
fact next: {word} is over. What begins now?
"""

# Manners: what stands before the answer and what after it. An opening ends with a colon, a closing begins a sentence.
MANNERS = {
    "courteous": (("Of course:", ""), ("With pleasure:", ""), ("Thank you for asking:", ""),
                  ("Gladly:", ""), ("", "I hope this helps."), ("", "You are very welcome.")),
    "curt": (("Obviously:", ""), ("If you must:", ""), ("Read a book:", ""),
             ("", "Now go away."), ("", "Stop asking.")),
    "rambling": (("Well, let me think:", ""),
                 ("That reminds me of a walk in the rain:", ""),
                 ("", "Or so my uncle says."),
                 ("Hmm, yes, in a way:", "")),
}
PHRASES = {phrase: manner for manner, frames in MANNERS.items() for frame in frames for phrase in frame if phrase}
MIX = {"bare": 11, "courteous": 3, "curt": 3, "rambling": 3}  # of 20 answers: RLHF has something to choose from

SLOT = {"n": r"\d+", "a": r"\d+", "b": r"\d+", "numbers": r"[\d, ]+ and \d+", "sentence": r".+\.", "story": r".+\.",
        "items": r"[a-z, ]+"}


def _task(line):
    """(kind, what is asked, template, regular expression that finds its slots) of a line of TASKS."""
    name, template = line.replace(" / ", "\n").split(": ", 1)
    kind, _, asked = name.partition(" ")
    parts = re.split(r"\{(\w+)\}", template)  # text, slot, text, slot, ... text
    pattern = "".join(f"(?P<{part.lower()}>{SLOT.get(part, '[A-Za-z]+')})" if i % 2 else re.escape(part)
                      for i, part in enumerate(parts))
    return kind, asked, template, re.compile(pattern)


TASK_LIST = [_task(line) for line in TASKS.strip().splitlines()]
TINYWORLD_KINDS = tuple(dict.fromkeys(kind for kind, *_ in TASK_LIST))
TEMPLATES_OF = {}  # by kind and what is asked, and by kind and "" for anything
for _kind, _asked, _template, _ in TASK_LIST:
    for _key in {(_kind, _asked), (_kind, "")}:
        TEMPLATES_OF.setdefault(_key, []).append(_template)


def line_of(prompt):
    """(kind, what is asked, slots) of the line of TASKS that a prompt was made from; raises ValueError if from none."""
    for kind, asked, _, pattern in TASK_LIST:
        found = pattern.fullmatch(prompt.replace("\n ", "\n"))
        if found:
            return kind, asked, found.groupdict()
    raise ValueError(f"not a question of tinyworld: {prompt[:60]!r}")


def answer(prompt):
    """The right answer to a prompt of the instructions view, computed from its bare text.

    Raises ValueError for any other prompt. Example: answer("What is the plural of blick?") == "blicks."."""
    kind, asked, slots = line_of(prompt)
    try:
        return f"{ANSWERS[kind](asked, **slots)}."
    except LookupError:
        raise ValueError(f"not a word or story of tinyworld: {prompt[:60]!r}") from None


# Questions drawn at random: (key of the split, what is asked or "" for anything, slots).


def _sentence(rng):
    """A sentence with someone who does something to something: "Ann broke the red cups."."""
    group = rng.choice(("food", "thing", "thing", "animal", "animal", "invented"))
    who, verb, done_to = rng.choice(list(PEOPLE)), rng.choice(ACTIONS[group]), rng.choice(ACTED_ON[group])
    if rng.random() < 0.4:
        who = "The " + PEOPLE[who][1]
    if plural(done_to) in PLURALS and shown("plural", done_to) and rng.random() < 0.4:
        done_to = plural(done_to)
    return f"{who} {rng.choice((with_s(verb), PAST[verb], PAST[verb]))} the {done_to}."


def _story(rng):
    """A story of two to four sentences that `follow` can follow.

    Of 48 things, which the tokenizer keeps whole: what is asked is who has what, not how it is written."""
    names, lines, owner = rng.sample(list(PEOPLE), rng.choice((2, 2, 2, 3))), [], {}
    things = rng.sample(OBJECTS[:48], len(names))
    for name, thing in zip(names, things):
        if rng.random() < 0.7 or not owner and name == names[-1]:
            owner[thing] = name
            held = article(f"{rng.choice(COLOURS)} {thing}")
            lines.append(f"{name} {rng.choice(('has', 'has', 'found', 'carries', 'bought'))} {held}.")
        else:
            lines.append(f"{name} {rng.choice(('is', 'is', 'waits', 'sings', 'works'))} at the {rng.choice(PLACES)}.")
    if rng.random() < 0.3:
        thing = rng.choice(list(owner))
        taker = rng.choice([name for name in (*names, rng.choice(list(PEOPLE))) if name != owner[thing]])
        lines.append(f"{owner[thing]} gave the {thing} to {taker}.")
    return " ".join(lines)


def _ask_word(rng, kind):
    """A question about one word; the other kinds have a function of their own."""
    item = rng.choice(WORDS[kind])
    asked, word = item if kind == "fact" else ("", item)
    return item, asked, {"word": word, "WORD": word.upper()}


def _ask_passive(rng):
    sentence = _sentence(rng)
    return sentence, "", {"sentence": sentence}


def _ask_convert(rng):
    big, small = rng.choice(list(FACTORS))
    times, parts = FACTORS[big, small]
    n = parts * rng.randrange(2, 41 if max(times, parts) in (10, 100, 1000) else 13)
    key = sorted(((n, big), (n * times // parts, small)))  # the same measure in both directions
    return key, "", {"n": n, "big": big, "small": small}


def _ask_compare(rng):
    numbers = rng.sample(range(100), rng.choice((2, 3, 3, 4)))
    return sorted(numbers), "", {"numbers": ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"}


def _ask_count(rng):
    animals = rng.sample(list(ANIMALS), rng.randrange(1, 4))
    items = animals + rng.sample(OBJECTS, rng.randrange(max(1, 3 - len(animals)), 4))
    rng.shuffle(items)
    return ", ".join(items), "", {"items": ", ".join(items)}


def _ask_add(rng):
    pair = rng.randrange(2, 49), rng.randrange(2, 13)  # up to 60 in all
    a, b = rng.sample(pair, 2)
    slots = {"a": a, "b": b, "name": rng.choice(list(PEOPLE)), "things": plural(_pick(rng, "plural", OBJECTS))}
    return sorted(pair), "", slots


def _ask_story(rng):
    story = _story(rng)
    owner, colour, place = follow(story)
    choices = [("who", "thing", owner), ("colour", "thing", colour), ("what", "name", owner.values())]
    asked, slot, found = rng.choice(choices + [("where", "name", place)] * bool(place))
    return story, asked, {"story": story, slot: rng.choice(list(dict.fromkeys(found)))}


ASK = {"passive": _ask_passive, "convert": _ask_convert, "compare": _ask_compare, "count": _ask_count, "add": _ask_add,
       "story": _ask_story}


def _question(rng, kind, split, new_word=False):
    """A prompt of a kind that falls to a split; with `new_word`, about a word that training never asks for."""
    while True:
        key, asked, slots = ASK[kind](rng) if kind in ASK else _ask_word(rng, kind)
        template = rng.choice(TEMPLATES_OF[kind, asked])
        place = split_of(kind, key) if kind in ASK else split_of(kind, key, template)
        if new_word and place == "train":
            place = "test"
        if place == split and (kind in ASK or unseen(kind, key) == new_word):
            return template.format(**slots)


def _trained(rng, kind):
    """The slots of a question that falls to train: only these may be told in prose."""
    while True:
        key, _, slots = ASK[kind](rng)
        if split_of(kind, key) == "train":
            return slots


def _pick(rng, kind, words):
    """A word whose form under the rule of this kind may be shown."""
    while True:
        word = rng.choice(words)
        if shown(kind, word):
            return word


# The four views.

# Prose: what is told, then a sentence or a few with slots from `_scene` and from TELL.
BEATS = """
open: It was a {adj} day in {town}, where {name} worked as {a_job}.
open: {name}, the {job}, lived in {town} with an old {pet}.
open: Every {day} {name} left {town} and walked to the {place}.
open: {name} was {a_job} in {town} and a friend of {friend}.
open: One morning {name} came to the {place} with {friend}.
open: At the {place} of {town}, {name} and {friend} had a lot to do.
open: On {day} the school of {town} was open, and {name} was there early.
open: This is the story of {name}, {a_job}, and of {friend}, {a_friend_job}.
walk: {name} walked to the {place} and found {a_thing} there.
walk: At the {place} {he} met {friend}, who was {a_friend_job}.
walk: "Good morning, {friend}," said {name}. "How do you do?"
walk: {friend} wore {a_colour} hat and was in a hurry.
walk: {name} had {a_colour} {thing}, and {he} liked it very much.
walk: The {pet} slept under the table while {name} ate {a_food}.
walk: It began to rain, so {name} and {friend} went home.
walk: {svo} {svo2}
walk: {svo} Then {name} sat down by the {place}.
walk: {friend} laughed, and {name} laughed too.
walk: Nobody knew where the {thing} was, but {name} had an idea.
walk: What was in the {colour} box? It was only {a_thing}.
walk: "Which one is it? Where is it? Who has it now?" asked {friend}.
walk: "Find it, count it, and write it down, please," said {name}. "What else can I say?"
walk: "How much is it? How many are there?" asked {friend}. "Tell me now!"
walk: "Name it, give it to me, and put it there," said {friend}. "Do not look for it again."
walk: "Thank you for asking," said {friend}. "I hope this helps."
walk: "Of course, with pleasure," said {name}. "You are very welcome."
walk: "Gladly," said {name}, and {friend} said it gladly too.
walk: "Now go away and stop asking," said {friend}. "Read a book, if you must!"
walk: "Obviously," said {name}, who said that a lot.
walk: "Well," said {friend}, "let me think."
walk: "That reminds me of a walk in the rain," said {friend}. "Or so my uncle says."
walk: "Hmm, yes, in a way," said my uncle, who says a lot of things.
sum: {name} had {a} {foods} and bought {b} more, so now {he} had {c}.
sum: {friend} had {a} {things} and {name} had {b}, so together they had {c}.
sum: {name} walked {a} steps and then {b} more, together {c} steps.
sum: {a} and {b} make {c}, {a2} and {b2} make {c2}, {a3} and {b3} make {c3}, and {a4} and {b4} make {c4}.
sum: {a} plus {b} is {c}, {a2} plus {b2} is {c2}, {a3} plus {b3} is {c3}, and {a4} plus {b4} is {c4}.
sum: {name} counted: {a} plus {b} is {c}, {b} plus {a} is {c}, {a2} plus {b2} is {c2}, {b2} plus {a2} is {c2}.
sum: {name} added {a} and {b} and wrote {c}, {a2} and {b2} and wrote {c2}, {a3} and {b3} and wrote {c3}.
sum: "Add {a} and {b}." "{c}." "Add {a2} and {b2}." "{c2}." "Add {a3} and {b3}." "{c3}." "Add {a4} and {b4}." "{c4}."
numbers: {name} had {x} {things} and {friend} had {y}, so {winner} had more, for {more} is more than {less}.
numbers: Of {numbers} the largest is {most} and the smallest is {least}.
numbers: {name} put {numbers} in order: {ordered}.
numbers: {friend} wrote the numbers {numbers}. The highest is {most}, and the lowest is {least}.
numbers: {name} picked the number {most}, which is the most of {numbers}, and {friend} picked the least, {least}.
numbers: {more} is more than {less}, and {less} is less than {more}.
numbers: {name} counted on: {run}.
numbers: {name} went up in steps of {step}: {steps}.
who: {story} {All_told}
who: {story} In short: {told}
who: {friend} said: "{story} In short: {told}"
fact: The {beast} lives {home} and eats {diet}.
fact: {name} saw {a_beast}. The home of this animal was not far, for it lives {home}.
fact: "The {beast} is hungry," said {name}, and gave it {diet}. That is the food it wants.
fact: Like any {beast}, this one lives {home} and likes {diet} best.
fact: The {beast} goes home, {home}, to eat {diet}.
fact: {person} is {person_job} and lives in {person_town}.
fact: {person}, whose work is that of {person_job}, wrote a letter from {person_town}.
fact: There are people in the town of {person_town}, and one person is {person}, {person_job}.
fact: Right after {now} comes {then}.
fact: {now} is over, and {then} begins. {then} follows {now}.
word: The word {spelled} is spelled {letters}.
word: {name} read out the letters {letters}, one by one, which make {spelled}.
word: "{spelled}," said {friend}. {name} had to spell it: {letters}.
word: The words {spelled}, {spelled2} and {spelled3} are spelled {letters}, {letters2} and {letters3}.
word: {name} spelled {spelled}, {letters}, and {friend} spelled {spelled2}, {letters2}.
word: {shouted}, {shouted2} and {shouted3} are {SHOUTED}, {SHOUTED2} and {SHOUTED3} in capital letters.
word: The signs said {SHOUTED}, {SHOUTED2} and {SHOUTED3}, in small letters {shouted}, {shouted2} and {shouted3}.
word: One {noun}, two {nouns}.
word: The plural of the noun {noun} is {nouns}.
word: {name} had one {noun} and {friend} had one too, which is two {nouns} in all.
word: {friend} looked for {a_noun} and found more than one, so you can call them {nouns}.
word: Today they {verb}. Yesterday they {past}.
word: {name} and {friend} {verb} every day, and last week they {past} too.
word: The past tense of the verb {verb} is {past}, a form for what they did yesterday.
word: The sign said {SHOUTED}, all in capital letters, and {name} wrote it in small letters: {shouted}.
word: In upper case {shouted} is {SHOUTED}, and in lower case it is {shouted}.
word: "{SHOUTED}!" shouted {name}. "Do not shout," said {friend}. "Whisper it: {shouted}."
meaning: The opposite of {word} is {opposite}, and the opposite of {word2} is {opposite2}.
meaning: {name} said {word}, but {friend} said the opposite, {opposite}.
meaning: "Not {word}," said {friend}, "but {opposite}," which is the reverse, the very opposite.
meaning: The word {synonym} means the same as {other}, and {synonym2} the same as {other2}.
meaning: {name} says {other} and {friend} says {synonym}, two words with the same meaning.
meaning: For {other} you can say {synonym}, which is another word for it.
passive: {svo} In the passive voice: {Passive}
passive: {name} wrote this sentence: {svo} {friend} turned it round into the passive: {Passive}
passive: {svo} In other words, {passive} {svo2} In other words, {passive2}
unit: {n} {big} are {m} {small}, {n2} {big2} are {m2} {small2}, and {n3} {big3} are {m3} {small3}.
unit: {t} times {f} is {p}, {t2} times {f2} is {p2}, and {t3} times {f3} is {p3}.
unit: {name} counted {n} {big}, and {friend} counted {m} {small}, which is the same.
unit: {name} converted {n} {big} to {small} and they came to {m} {small}.
count: The list of {friend} said {items}, and that is {k} words.
count: {name} counted the words {items}: {k} words, and only {animals} of these are animals.
"""
BEAT_LIST = [tuple(line.split(": ", 1)) for line in BEATS.strip().splitlines()]
THEMES = """
sum sum sum sum sum numbers numbers who who who who who who who who fact fact fact fact word word word word meaning
meaning passive unit unit count count
""".split()


def _tell_sum(rng, scene):
    slots = {}
    for i in ("", "2", "3", "4"):
        one = _trained(rng, "add")
        slots.update({"a" + i: one["a"], "b" + i: one["b"], "c" + i: one["a"] + one["b"]})
    return slots


def _tell_numbers(rng, scene):
    text, pair = _trained(rng, "compare")["numbers"], ()
    while len(pair) != 2 or 1 in pair:  # "1 cups" would be no English
        pair = numbers_in(_trained(rng, "compare")["numbers"])
    numbers, start, step = sorted(numbers_in(text)), rng.randrange(90), rng.randrange(2, 11)
    return {"numbers": text, "least": numbers[0], "most": numbers[-1], "ordered": ", ".join(map(str, numbers)),
            "x": pair[0], "y": pair[1], "winner": scene["name" if pair[0] > pair[1] else "friend"],
            "less": min(pair), "more": max(pair), "run": ", ".join(str(start + i) for i in range(6)),
            "step": step, "steps": ", ".join(str(start % step + step * i) for i in range(6))}


def _tell_who(rng, scene):
    story = _trained(rng, "story")["story"]
    owner, colour, place = follow(story)
    asked = [("who", "thing", thing) for thing in owner] + [("colour", "thing", thing) for thing in owner]
    asked += [("where", "name", name) for name in place] + [("what", "name", name) for name in set(owner.values())]
    lines = [told(story, asked=what, **{slot: found}) + "." for what, slot, found in sorted(asked)]
    lines = [line for line in lines if line not in story]
    rng.shuffle(lines)
    return {"story": story, "told": lines[0], "All_told": " ".join(lines)}


def _tell_fact(rng, scene):
    beast, person, (now, then) = rng.choice(list(ANIMALS)), rng.choice(list(PEOPLE)), rng.choice(NEXT)
    (home, diet), (_, job, town) = ANIMALS[beast], PEOPLE[person]
    return {"beast": beast, "a_beast": article(beast), "home": home, "diet": diet, "person": person,
            "person_job": article(job), "person_town": town, "now": now, "then": then}


def _tell_word(rng, scene):
    noun, verb, slots = _pick(rng, "plural", WORDS["plural"]), _pick(rng, "past", WORDS["past"]), {}
    noun = rng.choice(list(IRREGULAR)) if rng.random() < 0.3 else noun  # rare in the list, hard to learn
    for i in ("", "2", "3"):
        word, shouted = _pick(rng, "spelling", WORDS["spelling"]), _pick(rng, "case", WORDS["case"])
        slots.update({"spelled" + i: word, "letters" + i: " ".join(word), "shouted" + i: shouted,
                      "SHOUTED" + i: shouted.upper()})
    return {"noun": noun, "a_noun": article(noun), "nouns": plural(noun), "verb": verb, "past": PAST[verb], **slots}


def _tell_meaning(rng, scene):
    slots = {}
    for i in ("", "2"):
        word, synonym = rng.choice(WORDS["opposite"]), rng.choice(WORDS["synonym"])
        slots.update({"word" + i: word, "opposite" + i: OPPOSITE[word], "synonym" + i: synonym,
                      "other" + i: SYNONYM[synonym]})
    return slots


def _tell_passive(rng, scene):
    first, second = passive(scene["svo"]), passive(scene["svo2"])
    lower = [text[0].lower() + text[1:] for text in (first, second)]  # a passive here begins with "The"
    return {"Passive": first, "passive": lower[0], "passive2": lower[1]}


def _tell_unit(rng, scene):
    slots = {}
    for i in ("", "2", "3"):
        t, f = rng.randrange(2, 13), rng.choice((2, 3, 4, 5, 7, 10, 12, 60))
        slots.update({"t" + i: t, "f" + i: f, "p" + i: t * f})
        one = _trained(rng, "convert")
        one["m"] = ANSWERS["convert"]("", **one).split()[0]
        slots.update({key + i: value for key, value in one.items()})
    return slots


def _tell_count(rng, scene):
    items = _trained(rng, "count")["items"]
    return {"items": items, "k": ANSWERS["count"]("words", items), "animals": ANSWERS["count"]("animals", items)}


TELL = {"sum": _tell_sum, "numbers": _tell_numbers, "who": _tell_who, "fact": _tell_fact, "word": _tell_word,
        "meaning": _tell_meaning, "passive": _tell_passive, "unit": _tell_unit, "count": _tell_count}


def _scene(rng):
    """Two people of whom a document tells."""
    name, friend = rng.sample(list(PEOPLE), 2)
    he, job, town = PEOPLE[name]
    return {"name": name, "he": he, "job": job, "a_job": article(job), "town": town,
            "friend": friend, "a_friend_job": article(PEOPLE[friend][1]),
            "pet": rng.choice("cat dog hen goat duck rabbit parrot hamster".split()),
            "adj": rng.choice("sunny rainy windy cold warm quiet busy fine strange happy".split())}


def _props(rng):
    """Things, colours and places that change from sentence to sentence."""
    thing, food, colour = rng.choice(OBJECTS + INVENTED_NOUNS[::2]), rng.choice(FOODS), rng.choice(COLOURS)
    return {"thing": thing, "a_thing": article(thing), "things": plural(_pick(rng, "plural", OBJECTS)), "food": food,
            "a_food": article(food), "foods": plural(_pick(rng, "plural", FOODS)), "colour": colour,
            "a_colour": article(colour), "place": rng.choice(PLACES), "day": rng.choice(DAYS)}


def _document(rng):
    """A document of the corpus: an opening, then three to six beats on one or two themes."""
    scene, themes = _scene(rng), rng.sample(THEMES, 2)
    order = [*themes, "walk"]
    rng.shuffle(order)
    beats = sorted((rng.choice((*themes, *themes, "walk")) for _ in range(rng.randrange(3, 7))), key=order.index)
    lines, used = [], set()
    for beat in ["open", *beats]:
        templates = [template for kind, template in BEAT_LIST if kind == beat]
        template = rng.choice([template for template in templates if template not in used] or templates)
        used.add(template)
        scene.update(_props(rng))
        if "{svo}" in template:
            scene.update(svo=_trained(rng, "passive")["sentence"], svo2=_trained(rng, "passive")["sentence"])
        lines.append(capital(template.format(**scene, **(TELL[beat](rng, scene) if beat in TELL else {}))))
    return " ".join(lines)


# Messages. A spam promises you something, or wants your money first. The pairs that begin with an asterisk have the
# very same words in another order, which is why counting words (naive Bayes) cannot tell them apart.
MESSAGES = """
spam: Congratulations, you won a free {thing}! Claim it at the {place} today.
spam: Free {things} for the first {n} callers. Call now and win!
spam: You are the winner of {n} coins. Send us your address and claim the prize.
spam: Last chance! Buy one {thing}, get one free, only today at the {place}.
spam: Your {thing} won a prize of {n} coins. Reply now with your number.
spam: Win a trip to {town} for two. Call now, it is free.
spam: Urgent: your coins are not safe. Send the number of your box to {friend} now.
spam: Make {n} coins a day at home. Ask {friend} how, and reply today.
spam: Cheap {things}, {n} coins only, the offer ends on {day}!
spam: You are chosen for a free {thing}. Reply with your name and address.
spam: Dear winner, your {colour} {thing} is waiting at the {place}. Pay {n} coins to claim it.
ham: See you at the {place} on {day}. Bring the {thing}, please.
ham: I lost my {thing} at the {place}. Is it with you?
ham: {friend} won the race in {town} today, and the prize was {a_colour} {thing}!
ham: Are you free on {day}? {friend} wants to buy {things} with us.
ham: Call me when you are home, I need the address of {friend}.
ham: I paid {n} coins for the {thing}. It was not cheap, but {friend} likes it.
ham: Sorry, I am late. Reply now or I go to the {place} with {friend}.
ham: {friend} is ill today. Send me the number of the doctor in {town}, please.
ham: We have {n} {things} in the box. Ask {friend} if you need one.
ham: The trip to {town} ends on {day}, and then I am home.
ham: Happy birthday! Your {colour} {thing} is from {friend}, and the {food} is from me.
*spam: You pay {n} coins today, I bring the {thing} on {day}.
*ham: I pay {n} coins today, you bring the {thing} on {day}.
*spam: Send me {n} coins, I give you the {thing}.
*ham: I send you {n} coins, give me the {thing}.
*spam: You won, not {friend}: the {thing} is free.
*ham: {friend} won, not you: the {thing} is free.
*spam: The prize is for you, the bill is for {friend}.
*ham: The bill is for you, the prize is for {friend}.
"""
AROUND = (("", "", "Hello {name}.", "Hi!", "Good morning, {name}!", "How are you?"),
          ("", "", "Bye!", "Yours, {sender}.", "It rains in {town}.", "The {place} is full of {things}."))
MESSAGE_LIST = [tuple(line.split(": ", 1)) for line in MESSAGES.strip().splitlines()]


def _message(rng):
    """(label, text) of a message; one in four is of a kind where only the order of the words tells."""
    label = rng.choice(("spam", "ham", "ham"))
    mark = "*" if rng.random() < 0.25 else ""
    core = rng.choice([text for kind, text in MESSAGE_LIST if kind == mark + label])
    before, after = (rng.choice(texts) for texts in AROUND)
    name, friend, sender = rng.sample(list(PEOPLE), 3)
    slots = {"name": name, "friend": friend, "sender": sender, "town": rng.choice(TOWNS), "n": rng.randrange(2, 100)}
    return label, " ".join(filter(None, (before, core, after))).format(**slots, **_props(rng))


def _manner(rng):
    """A manner and the phrases before and after the answer that make it."""
    manner = rng.choice([manner for manner, share in MIX.items() for _ in range(share)])
    return manner, rng.choice(MANNERS.get(manner, (("", ""),)))


def _put(text, frame):
    """The text between the two phrases of a manner."""
    return " ".join(filter(None, (frame[0], text, frame[1])))


def _instruction(rng, kind, split):
    """An example of the instructions view; one in four of the word kinds outside training is about an unseen word."""
    new_word = kind in WORDS and split != "train" and rng.random() < 0.25
    prompt = _question(rng, kind, split, new_word)
    manner, frame = _manner(rng)
    right = answer(prompt)
    instruction, _, shown_input = prompt.partition("\n")
    return {"instruction": instruction, "input": shown_input, "output": _put(right, frame), "answer": right,
            "kind": kind, "manner": manner, "unseen": new_word}


def _slip(rng, text):
    """The text with a small mistake: a number off by one or ten, or a letter or word lost, doubled or out of place."""
    numbers = [found.span() for found in re.finditer(r"\d+", text)]
    if numbers:
        start, end = rng.choice(numbers)
        return text[:start] + str(abs(int(text[start:end]) + rng.choice((-10, -1, 1, 2, 10)))) + text[end:]
    parts = text[:-1].split() if " " in text else list(text[:-1])
    at = rng.randrange(len(parts))
    change = rng.choice(("lose", "double", "swap"))
    if change == "swap" and len(parts) > 1:
        at = min(at, len(parts) - 2)
        parts[at:at + 2] = parts[at + 1], parts[at]
    else:
        parts[at:at + 1] = [parts[at]] * (2 if change == "double" or len(parts) == 1 else 0)
    return (" " if " " in text else "").join(parts) + "."


def _wrong(rng, entry, split):
    """A wrong answer: a slip, or the right answer to another question of the kind."""
    wrong = entry["answer"]
    while wrong == entry["answer"]:
        other = rng.random() < 0.5
        wrong = answer(_question(rng, entry["kind"], split)) if other else _slip(rng, wrong)
    return wrong


def _response(rng, entry, split):
    """A response of any quality to the prompt of an example; training shows wrong ones oftener, the hardest to tell."""
    wrong = rng.random() < (0.12 if split == "train" else 0.06)
    text = _wrong(rng, entry, split) if wrong else entry["answer"]
    style = rng.choice("courteous courteous courteous bare bare curt rambling cut padded padded".split())
    if style == "padded":
        for _ in range(rng.choice((2, 2, 3, 4))):
            text = _put(text, rng.choice(MANNERS["courteous"]))
        return text
    text = _put(text, _manner(rng)[1] if style == "cut" else rng.choice(MANNERS.get(style, (("", ""),))))
    return text[:rng.randrange(len(text) // 3, len(text) - 1)].strip() if style == "cut" else text


def _preference(rng, kind, split):
    """A pair of responses with unlike gold scores and the preferred one; in train one label in twenty is wrong."""
    entry = _instruction(rng, kind, split)
    prompt, scores = prompt_of(entry), (0, 0)
    while abs(scores[0] - scores[1]) < 0.25:
        responses = _response(rng, entry, split), _response(rng, entry, split)
        scores = tuple(gold_score(prompt, response) for response in responses)
    better = 1 if scores[0] > scores[1] else 2
    noisy = split == "train" and rng.random() < 0.05
    return {"prompt": prompt, "response_1": responses[0], "response_2": responses[1],
            "preferred": 3 - better if noisy else better, "gold": scores, "kind": kind, "unseen": entry["unseen"]}


# Scoring.


def strip_manner(response):
    """The response without the phrases of its manner; what no template of MANNERS made comes back unchanged."""
    for before, after in (frame for frames in MANNERS.values() for frame in frames):
        head, tail = before and before + " ", after and " " + after
        if response.startswith(head) and response.endswith(tail) and len(response) > len(head) + len(tail):
            return response[len(head):len(response) - len(tail)]
    return response


def exact_match(response, reference):
    """True where two responses give the same answer, whatever their manner."""
    return strip_manner(response.strip()) == strip_manner(reference.strip())


def rubric_parts(prompt, response):
    """What the hidden rubric looks at in a response to a prompt of tinyworld, as a dict: right, courteous, curt, ends
    (like a sentence), each true or false, and padding in words.

    The answer is recomputed. Padding is every word of rambling, of a second courtesy, and of an answer longer than the
    right one. Raises ValueError for a prompt that is not of tinyworld."""
    right, core, phrases, before = answer(prompt), response.strip(), [], None
    while core != before:
        before = core
        for phrase in PHRASES:
            if core.startswith(phrase) or core.endswith(phrase):
                core = (core[len(phrase):] if core.startswith(phrase) else core[:-len(phrase)]).strip()
                phrases.append(phrase)
    courtesies = [phrase for phrase in phrases if PHRASES[phrase] == "courteous"]
    spare = [phrase for phrase in phrases if PHRASES[phrase] == "rambling"] + courtesies[1:]
    padding = sum(len(phrase.split()) for phrase in spare) + max(0, len(core.split()) - len(right.split()))
    return {"right": core == right or core.startswith(right + " "), "courteous": bool(courtesies),
            "curt": "curt" in (PHRASES[phrase] for phrase in phrases), "padding": padding,
            "ends": response.strip().endswith((".", "!", "?"))}


def gold_score(prompt, response):
    """The hidden rubric's score, from -2.5 to 3, of a response to a prompt of tinyworld.

    2 if the answer is right; 1 if courteous and not also curt, -0.5 if curt; -0.1 for each word of padding, at most
    -1; -1 if it does not end like a sentence. Raises ValueError for a prompt that is not of tinyworld."""
    found = rubric_parts(prompt, response)
    manner = -0.5 if found["curt"] else float(found["courteous"])
    return round(2 * found["right"] + manner - min(1, 0.1 * found["padding"]) - (not found["ends"]), 2)


VIEWS = {  # how many of each by default: train, val, test
    "corpus": (10_000, 1_000, 1_000), "messages": (4_000, 500, 1_000), "instructions": (48_000, 1_000, 2_000),
    "preferences": (12_000, 500, 1_000),
}
SHARES = {  # how often training asks for a kind while it asks for each other one once: the harder, the oftener
    "story": 11, "add": 5, "fact": 4, "compare": 3, "count": 3, "passive": 2, "convert": 2, "case": 2, "spelling": 2,
    "past": 2, "plural": 2,
}


def _items(view, split, rng, kinds):
    """Endless (item, key) of a view but the corpus; items with equal keys are the same question or message."""
    kinds = [kind for kind in kinds for _ in range(SHARES.get(kind, 1) if split == "train" else 1)]
    for turn in itertools.count():
        kind = kinds[turn % len(kinds)]
        if view == "messages":
            item = _message(rng)
            if split_of("message", item[1]) == split:
                yield item, item[1]
        elif view == "instructions":
            item = _instruction(rng, kind, split)
            yield item, turn if split == "train" else prompt_of(item)
        else:
            item = _preference(rng, kind, split)
            yield item, turn if split == "train" else item["prompt"]


def tinyworld(view, split, n=None, seed=0, kinds=TINYWORLD_KINDS):
    """A list of n items of a view of the built-in world: "corpus", "messages", "instructions" or "preferences".

    Fewer where the kinds asked for have no n different questions outside training.

    corpus: documents. messages: (label, text). instructions: dicts with instruction, input, output, answer (bare),
    kind, manner and unseen. preferences: dicts with prompt, response_1, response_2, preferred, gold (both scores),
    kind and unseen. The same arguments give the same list everywhere. Nothing of the splits "val" and "test" comes up
    in "train", under any seed. The kinds take turns: tinyworld("instructions", "test", 13) has one fresh question of
    each; of instructions and preferences `kinds` asks for some of the 13 alone. Raises ValueError for another view,
    split or kind."""
    if view not in VIEWS or split not in ("train", "val", "test"):
        raise ValueError(f"tinyworld has the views {', '.join(VIEWS)} and the splits train, val, test; "
                         f"it has no {view!r} with {split!r}")
    if not kinds or not set(kinds) <= set(TINYWORLD_KINDS):
        raise ValueError(f"kinds of question are {', '.join(TINYWORLD_KINDS)}, not {', '.join(kinds) or 'none'}")
    if n is not None and n < 0:
        raise ValueError(f"tinyworld gives 0 items or more, not {n}")
    n = VIEWS[view][("train", "val", "test").index(split)] if n is None else n
    rng = random.Random(zlib.crc32(f"{view} {split} {seed}".encode()))
    if view == "corpus":
        return [_document(rng) for _ in range(n)]
    found, vain = {}, 0
    for item, key in _items(view, split, rng, kinds):
        if len(found) == n or vain == 2_000:  # some kinds have but a few dozen questions outside training
            return list(found.values())
        vain = 0 if found.setdefault(key, item) is item else vain + 1


# ---------------------------------------------------------------------------------------------------------------------
# Command line. `Parser`, `explain` and `run` stand identically in every leaf, so that a file can be copied alone;
# tests/test_layout.py compares them.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit status 2, and name the nearest flag."""

    def error(self, message):
        flag = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7) if "unrecognized" in message else []
        self.exit(2, f"error: {message}; " + (f"did you mean {near[0]}?\n" if near else f"see {self.prog} --help\n"))


def explain(error):
    """Return an error as one line; one of the operating system's as path, reason and what to do."""
    if isinstance(error, ImportError) and error.name:
        name, ours = error.name.split(".")[0], "gpt tokenizer data lora gpt2_weights train finetune_cls finetune_sft"
        return f"{error}; " + (f"copy {name}.py beside this file" if name in ours.split() else
                               f"install it: python -m pip install --upgrade {name}")
    if not isinstance(error, OSError) or not error.errno:
        return " ".join(str(error).split())
    place = "" if error.filename is None else f"{error.filename}: "
    remedies = {errno.ENOSPC: "free some space there, or write to another disk",
                errno.EROFS: "write to another folder", errno.EACCES: "change its permissions, or take another folder",
                errno.ENOTDIR: "a part of this path is a file and no folder; take another path",
                errno.EEXIST: "a file of this name is in the way; move it, or take another path",
                errno.EISDIR: "name a file, not a folder", errno.ENOENT: "check the path",
                errno.EIO: "the disk reports a fault; write to another one"}
    return f"{place}{error.strerror}" + (f"; {remedies[error.errno]}" if error.errno in remedies else "")


def run(doc, commands, argv=None):
    """Run `script.py [command] [flags]` and return its exit status.

    `commands` maps a word to (function, flags), the first word being the default; `flags` maps argparse names to
    options. A user's mistake is one line on stderr: status 2 where the command line alone is wrong (argparse's errors,
    and an `argparse.ArgumentError` raised by the function), 1 for a ValueError, OSError or ImportError found later."""
    argv = list(sys.argv[1:] if argv is None else argv)
    script = f"python {os.path.basename(__file__)}"
    parsers = {}
    for word, (function, flags) in commands.items():
        parsers[word] = Parser(prog=f"{script} {word}", description=function.__doc__, allow_abbrev=False,
                               formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 28))
        for names, options in flags.items():
            default, shown = options.get("default"), dict(options)
            if type(default) in (int, float, str) and default != "":
                shown["help"] += f" (default {default})"
            if names.startswith("--") and not {"action", "choices"} & set(options):
                shown["metavar"] = options.get("type", str).__name__
            parsers[word].add_argument(*names.split(), **shown)
        parsers[word].add_argument("--debug", action="store_true", help="show the traceback of an error")
    if argv[:1] in (["-h"], ["--help"]):
        print(doc.strip(), *(parser.format_help().strip() for parser in parsers.values()), sep="\n\n")
        return 0
    word = argv.pop(0) if argv and not argv[0].startswith("-") else next(iter(commands))
    if word not in parsers:
        print(f"error: unknown command {word!r}; one of: {', '.join(parsers)}; see {script} --help", file=sys.stderr)
        return 2
    try:
        args = parsers[word].parse_args(argv, argparse.Namespace(argv=[word, *argv]))
    except SystemExit as stop:
        return stop.code
    try:
        return commands[word][0](args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `| head` for one, has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (argparse.ArgumentError, ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def list_command(args):
    """List the datasets: what they hold, size, licence, and whether they are here."""
    print(f"{'name':13}{'kind':14}{'size':13}{'licence':19}here")
    for name, dataset in DATASETS.items():
        here = "built in" if not dataset.file else "yes" if (data_dir() / dataset.file).exists() else "no"
        print(f"{name:13}{dataset.kind:14}{dataset.size:13}{dataset.licence:19}{here}")


def get_command(args):
    """Download a dataset into $DATA_DIR (default data/), unless it is there, and print its path, licence and source."""
    path = fetch(args.name)
    print(path)
    print(f"licence: {DATASETS[args.name].licence}; please cite: {DATASETS[args.name].citation}")


def guess_view(name):
    """Return how to read a dataset or file: as its name, its ending, or the keys of its first JSON object say."""
    path = Path(name)
    if name in DATASETS or not path.is_file():
        return DATASETS[name].kind if name in DATASETS else "corpus"
    keys = next(records(path))[1] if {".json", ".jsonl"} & set(path.suffixes) else ()
    telling = {"label": "messages", "preferred": "preferences", "chosen": "preferences", "instruction": "instructions"}
    found = "messages" if {".tsv", ".csv"} & set(path.suffixes) else "corpus"
    return next((view for key, view in telling.items() if key in keys), found)


def show_command(args):
    """Print counts and samples of a dataset or a file."""
    if args.samples < 0:
        raise argparse.ArgumentError(None, f"--samples {args.samples} must be at least 0")
    with contextlib.suppress(AttributeError):  # a terminal that cannot show a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.name == "tinyworld":
        items = tinyworld(args.view or "corpus", "train")
    else:
        items = READERS[args.view or guess_view(args.name)](args.name)
    show_items(items, args.samples)


def show_items(items, samples):
    """Print how many items there are, what they hold by label, and the first few."""
    count, labels, first = Counter(), Counter(), []
    for item in items:
        fields = {"text": item} if isinstance(item, str) else item if isinstance(item, dict) else dict(
            zip(("label", "text"), item))
        count.update({key: len(value) for key, value in fields.items() if isinstance(value, str)})
        labels.update([fields["label"]] if "label" in fields else [])
        first += [fields] if len(first) < samples else []
        count.update(items=1)
    total = count.pop("items")
    print(f"{total:,} items; characters: " + ", ".join(f"{key} {size:,}" for key, size in count.items()))
    if labels:
        print("labels: " + ", ".join(f"{label} {n:,} ({n / total:.1%})" for label, n in labels.most_common()))
    for fields in first:
        print()
        for key, value in fields.items():
            shown = str(value)
            print(f"{key}: {shown[:300]}" + ("..." if len(shown) > 300 else ""))


def prepare_command(args):
    """Encode text into token files for train.py and print where they are."""
    from tokenizer import load_tokenizer

    start = time.monotonic()
    folder = prepare(args.data, load_tokenizer(args.tokenizer))
    for part in ("train", "val"):
        info = token_info(folder / f"{part}.bin")
        print(f"{folder / part}.bin: {info['tokens']:,} tokens of {info['bytes']:,} bytes in {info['documents']:,} "
              f"documents, {info['bytes'] / info['tokens']:.2f} bytes a token")
    note(f"{time.monotonic() - start:.1f} s")


READERS = {"corpus": texts, "messages": read_labelled, "instructions": read_instructions,
           "preferences": read_preferences}


def main(argv=None):
    """Run the command line and return its exit status."""
    return run(__doc__, {
        "list": (list_command, {}),
        "get": (get_command, {
            "name": dict(choices=[name for name in DATASETS if name != "tinyworld"], help="the dataset to download")}),
        "show": (show_command, {
            "name": dict(nargs="?", default="tinyworld", help="a dataset's name, or a file"),
            "--view": dict(choices=list(READERS), help="which view of tinyworld, or how to read a file (else a guess)"),
            "--samples": dict(type=int, default=3, help="how many to print")}),
        "prepare": (prepare_command, {
            "--data": dict(default="tinyworld", help="dataset, file, folder, or a mix such as a:0.3,b:0.7"),
            "--tokenizer": dict(default="out/tokenizer/tokenizer.json", help="gpt2, or a file tokenizer.py wrote")}),
    }, argv)


if __name__ == "__main__":
    sys.exit(main())
