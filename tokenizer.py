"""Tokenizers: text into token ids and back, from whole words up to GPT-2's byte pairs.

Four rungs of one ladder; each mends what the one before it cannot do.

  WordTokenizer   A token is a word or a punctuation mark. Easy to read, but a word that training never saw is lost.
  CharTokenizer   A token is a character. Nothing is lost within the alphabet, but a text has about five times as many.
  BPETokenizer    Starts from the 256 bytes, so that no text at all is lost, then joins the most frequent pair of
                  neighbours again and again: common words end as one token, rare ones as a few. Trained here.
  GPT2Tokenizer   The same with the 50,000 merges that OpenAI learned and published, through the tiktoken package.

Commands
  python tokenizer.py                                      train on the built-in text: 1,024 tokens, a few seconds
  python tokenizer.py train --data corpus.txt notes/ --vocab_size 8192 --no-split_digits --out_dir out/mine
  python tokenizer.py inspect "Hello, world"               pieces, ids and bytes; --tokenizer gpt2 for GPT-2's
  python tokenizer.py encode "Hello, world" | python tokenizer.py decode

Files
  reads   text files in UTF-8; with data.py beside it also folders, .jsonl files and data sets by name
  writes  OUT_DIR/tokenizer.json: type, special tokens and merges (or words), how it was made, and a sha256 of it all

As a library: `load_tokenizer("gpt2" or path)`; every tokenizer has encode, encode_array, decode, vocab_size, eot_id,
pad_id, to_dict and save. Text never becomes a special token unless the caller says so: encode("<|endoftext|>") is plain
text, encode("<|endoftext|>", allowed_special={"<|endoftext|>"}) is one id. Half of a surrogate pair, which is not text
(Python strings may hold one, UTF-8 cannot), is read as U+FFFD.

Differs from the originals
  The merges equal those of Hugging Face's BpeTrainer with a ByteLevel alphabet on the same text; training touches only
  the words that hold the pair being joined, so pure Python needs no more time than that Rust code (10 MB of Python
  source, 8,192 tokens: 2.8 s against 3.3 s, `python tests/bench.py bpe`).
  Byte ids stand in GPT-2's own order and special tokens come last, so an export is a valid GPT-2 vocabulary.
  With `split_digits` no merge contains a digit, while encoding keeps GPT-2's pattern: numbers become one token a digit.
  encode shows the merge loop; long or non-ASCII text goes to tiktoken with the same merges and gives the same ids.

References: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners"; github.com/openai/gpt-2, src/encoder.py.
"""

import argparse
import array
import codecs
import contextlib
import difflib
import errno
import functools
import gc
import hashlib
import heapq
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict

EOT, UNK, PAD = SPECIALS = ("<|endoftext|>", "<|unk|>", "<|pad|>")
WHITESPACE = r"(\s)"
PUNCTUATION = r"""([,.:;?_!"()']|--|\s)"""  # Raschka, "Build a Large Language Model (From Scratch)", section 2.2

# Where GPT-2 cuts text before it joins pairs: 's and its like, letters, numbers, other signs (each with a space before
# it), runs of white space. src/encoder.py, in the possessive form of tiktoken: the same pieces, a third faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # vocab.bpe and encoder.json

# The bytes in GPT-2's order, printable ones first, and the character that stands for each in its files: itself where
# it is printable, else the next one from U+0100 on ("Ġ" is the space). src/encoder.py, bytes_to_unicode.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_IDS = bytes(sorted(range(256), key=BYTES.__getitem__))  # byte -> token id
BYTE_NAMES = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]

WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of regex and tiktoken; re's has 4 more
# Two places where every pre-token ends and none looks across: after an ASCII letter where no letter follows (all from
# U+0080 on count as letters), and before white space.
UNIT = re.compile(f"[{WHITE}]*[^{WHITE}A-Za-z]*[A-Za-z]+(?![A-Za-z\x80-\U0010ffff])|[{WHITE}]*[^{WHITE}]+|[{WHITE}]+")
GAP = re.compile(f"[^{WHITE}](?=[{WHITE}])")
LONG_BLANK = re.compile(f"(?<![{WHITE}])([{WHITE}]{{100000,}})(?=[{WHITE}]|\\Z)")
BLOCK = 1 << 20  # characters read, counted or encoded at a time
BULK = 10_000  # characters from which encode leaves the merge loop to tiktoken


# ---------------------------------------------------------------------------------------------------------------------
# What all tokenizers share


def clean(text):
    """Return `text` as UTF-8 can hold it: surrogate pairs joined, lone surrogates replaced by U+FFFD (as tiktoken)."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def documents(texts):
    """Return an iterator over `texts`, cleaned; a single string is one document."""
    return map(clean, [texts] if isinstance(texts, str) else texts)


class Tokenizer:
    """Encodes text and decodes ids; a subclass adds `encode_ordinary(text)` and `join(pieces)`.

    `tokens` holds the text (or the bytes) of every id, `specials` maps the special tokens among them to their ids,
    `made` is a note of plain values about the training that travels with the tokenizer."""

    def __init__(self, tokens, special_tokens, made):
        self.tokens, self.made = tokens, dict(made or {})
        self.specials = special_tokens
        self.vocab_size = len(tokens)
        self.eot_id = special_tokens.get(EOT)
        self.pad_id = special_tokens.get(PAD, self.eot_id)  # GPT-2 has no pad; a pad never counts in a loss

    def encode(self, text, allowed_special=()):
        """Return the ids of `text`; special tokens named in `allowed_special` (or "all") become their own ids."""
        text = clean(text)
        allowed = list(self.specials) if allowed_special == "all" else sorted(allowed_special, key=len, reverse=True)
        for name in allowed:
            if name not in self.specials:
                raise ValueError(f"{name!r} is not a special token; there are: {', '.join(self.specials) or 'none'}")
        if not allowed:
            return self.encode_ordinary(text)
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text)
        ids = ([self.specials[part]] if part in allowed else self.encode_ordinary(part) for part in parts)
        return list(itertools.chain.from_iterable(ids))

    def encode_array(self, text):
        """Return the ids of plain `text` as an array of unsigned 32-bit integers; the fast way for a corpus."""
        return array.array("I", self.encode(text))

    def decode(self, ids):
        """Return the text of `ids` (integers, an array or a 1-D tensor); ValueError names an id out of range."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i!r} is not in the vocabulary: ids are 0 to {self.vocab_size - 1}")
        return self.join([self.tokens[i] for i in ids])

    def to_dict(self):
        """Return the tokenizer as plain values that `from_dict` and JSON take; "sha256" covers all of them."""
        fields = {"type": self.type, "vocab_size": self.vocab_size, "made": self.made}
        fields.update({name: getattr(self, name) for name in self.fields})
        return {**fields, "sha256": digest(fields)}

    def save(self, path):
        """Write the tokenizer as one JSON file with a line for each token or merge."""
        write_file(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Return the tokenizer of class `cls` saved at `path`."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} holds a {tokenizer.type} tokenizer, not a {cls.type} tokenizer")
        return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Words and characters


def ordered(vocab):
    """Return the entries of `vocab`, a list or a dict {token: id}, in the order of their ids."""
    if isinstance(vocab, dict):
        if sorted(i for i in vocab.values() if type(i) is int) != list(range(len(vocab))):
            raise ValueError(f"the ids of a vocabulary of {len(vocab)} must be 0 to {len(vocab) - 1}, each once")
        vocab = sorted(vocab, key=vocab.get)
    repeated = [token for token, count in Counter(vocab).items() if count > 1 or not token or token != clean(token)]
    if repeated:
        raise ValueError(f"the vocabulary holds {repeated[0]!r}, which is empty, not UTF-8 or there twice")
    return list(vocab)


class WordTokenizer(Tokenizer):
    """Words and punctuation marks, cut where the regular expression `pattern` matches; white space is not kept.

    `vocab` lists the tokens by id, or maps them to ids. What a group of `pattern` captures stays as a token of its
    own. "<|endoftext|>", "<|unk|>" and "<|pad|>" are special where `vocab` has them; a word outside the vocabulary
    becomes "<|unk|>", or a ValueError where there is none."""

    type = "word"
    fields = {"vocab": list, "pattern": str}

    def __init__(self, vocab, pattern=PUNCTUATION, made=None):
        try:
            self.cut = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        self.vocab, self.pattern = ordered(vocab), pattern
        super().__init__(self.vocab, {word: i for i, word in enumerate(self.vocab) if word in SPECIALS}, made)
        self.ids = {word: i for i, word in enumerate(self.vocab) if word not in SPECIALS}

    @classmethod
    def train(cls, texts, pattern=PUNCTUATION):
        """Return a tokenizer of all words in `texts`, sorted, then the three special tokens."""
        splitter, words = cls([], pattern), set()
        for text in documents(texts):
            words.update(splitter.split(text))
        return cls([*sorted(words.difference(SPECIALS)), *SPECIALS], pattern)

    def split(self, text):
        """Return the words: "Is this-- a test?" -> ['Is', 'this', '--', 'a', 'test', '?']."""
        pieces = (piece.strip() for piece in self.cut.split(text) if piece)
        return [piece for piece in pieces if piece]

    def encode_ordinary(self, text):
        """Return the ids of plain text."""
        words, unk = self.split(text), self.specials.get(UNK)
        ids = [self.ids.get(word, unk) for word in words]
        if unk is None and None in ids:
            word = words[ids.index(None)]
            raise ValueError(f"the word {word!r} is not in the vocabulary, which has no {UNK} to stand for it")
        return ids

    def join(self, pieces):
        """Return the words joined by spaces, none before a punctuation mark: spacing is not restored."""
        return re.sub(r"""\s+([,.:;?!"()'])""", r"\1", " ".join(pieces))


class CharTokenizer(Tokenizer):
    """One id a character. `vocab` lists the characters by id, or maps them to ids, and may end in special tokens.

    Without special tokens (the default of `train`, and what makes tiny Shakespeare's vocabulary exactly 65) `eot_id`
    and `pad_id` are None and an unknown character is a ValueError; with them it becomes "<|unk|>"."""

    type = "char"
    fields = {"vocab": list}

    def __init__(self, vocab, made=None):
        self.vocab = ordered(vocab)
        wrong = [token for token in self.vocab if len(token) != 1 and token not in SPECIALS]
        if wrong:
            raise ValueError(f"{wrong[0]!r} in the vocabulary is neither one character nor a special token")
        super().__init__(self.vocab, {token: i for i, token in enumerate(self.vocab) if token in SPECIALS}, made)
        self.ids = {character: i for i, character in enumerate(self.vocab) if len(character) == 1}

    @classmethod
    def train(cls, texts, specials=False):
        """Return a tokenizer of all characters in `texts`, sorted, and with `specials` the three special tokens."""
        characters = set()
        for text in documents(texts):
            characters.update(text)
        return cls([*sorted(characters), *(SPECIALS if specials else ())])

    def encode_ordinary(self, text):
        """Return the ids of plain text."""
        unk = self.specials.get(UNK)
        ids = [self.ids.get(character, unk) for character in text]
        if unk is None and None in ids:
            position = ids.index(None)
            raise ValueError(f"the character {text[position]!r} at position {position} is not among the "
                             f"{self.vocab_size} of this tokenizer; train one on text that has it, or use byte pairs")
        return ids

    def join(self, pieces):
        """Return the characters as one string."""
        return "".join(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Byte pairs: training


def no_progress(line, *numbers):
    """Show nothing; what is passed instead gets a format string and its numbers, often."""


def cut(text):
    """Yield `text` in parts of about BLOCK characters, cut only where white space follows a word.

    No pre-token of GPT-2's pattern spans such a place and none looks across it, so the parts can be counted or encoded
    one by one."""
    start = 0
    while gap := GAP.search(text, start + BLOCK):
        yield text[start:gap.end()]
        start = gap.end()
    yield text[start:]


def blocks(texts):
    """Yield the documents of `texts`, long ones cut, in lists of about BLOCK characters."""
    block, size = [], 0
    for part in itertools.chain.from_iterable(map(cut, documents(texts))):
        block.append(part)
        size += len(part) + 1
        if size >= BLOCK:
            yield block
            block, size = [], 0
    yield block


def count_pieces(texts, split_digits):
    """Return how often each pre-token occurs in the strings `texts`.

    Text is first cut with `re` into units at places where pre-tokens must end; the units are counted, and the slower
    pattern of `regex` then sees each different one only once."""
    import regex  # for \p{L}; comes with tiktoken; 0.1 s, so only where it is needed

    # Python's findall skips what no alternative matches: without the one for numbers, numbers are not learned from.
    pattern = regex.compile(GPT2_PATTERN.replace(r"| ?\p{N}++", "") if split_digits else GPT2_PATTERN)
    units, counts = Counter(), Counter()
    for text in texts:
        units.update(UNIT.findall(text))
    for unit, count in units.items():
        for piece in pattern.findall(unit):
            counts[piece] += count
    return counts


CHILD = "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2]).count_stdin(sys.argv[3] == 'True')"


def count_stdin(split_digits):
    """Count the pre-tokens of the documents on stdin, each ended by byte 0xff, and write them to stdout as JSON."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children

    def received(rest=b""):
        while block := sys.stdin.buffer.read(BLOCK):
            *whole, rest = (rest + block).split(b"\xff")
            yield from map(bytes.decode, whole)

    json.dump(count_pieces(received(), split_digits), sys.stdout)


def count_in_children(stream, split_digits, workers, progress):
    """Return what `count_pieces` does for lists of texts, dealt out in turn to `workers` Python processes.

    Plain child processes of this file, not multiprocessing: they import nothing but it, whatever the caller's main
    module is, and do not copy a process whose threads (torch's) may hold locks."""
    folder, name = os.path.split(os.path.splitext(os.path.abspath(__file__))[0])
    command = [sys.executable, "-c", CHILD, folder, name, str(split_digits)]
    children, counts, done = [], Counter(), 0
    try:
        for _ in range(workers):
            children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for child, block in zip(itertools.cycle(children), stream):
            child.stdin.write(b"".join(text.encode() + b"\xff" for text in block))
            done += sum(map(len, block))
            progress("counted {:,.0f} million characters", done / 1e6)
        for child in children:
            child.stdin.close()
        for child in children:
            counts.update(json.load(child.stdout))
    except (BrokenPipeError, json.JSONDecodeError):
        raise OSError("a process that counted words ended early; is the memory full? "
                      "train(..., workers=1) uses this process only") from None
    finally:
        for child in children:
            child.kill()
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.stdout.close()
            child.wait()
    return counts


@contextlib.contextmanager
def collector_paused():
    """Yield with Python's search for cycles switched off, for work that makes none: beside torch's many objects it
    takes an eighth of the time of all merges."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@collector_paused()
def learn_merges(counts, how_many, progress=no_progress):
    """Return up to `how_many` pairs of token ids to join, in the order learned.

    A pre-token is a string with one character for each token, chr(id), so that str.split finds a pair, str.join puts
    the new token in its place, and pairs compare as their ids do. The counts of all pairs are kept up to date: a merge
    touches only the pre-tokens that hold its pair, and in them only its neighbours. The most frequent pair is taken,
    of equals the one with the lower ids. Same result as Hugging Face's trainer (tokenizers, bpe/trainer.rs)."""
    words = [piece.encode().translate(BYTE_IDS).decode("latin-1") for piece in counts]
    often = list(counts.values())
    where = defaultdict(list)  # pair -> the words that hold it (or once did), each as often as it does
    for number, word in enumerate(words):
        for pair in map("".join, itertools.pairwise(word)):
            where[pair].append(number)
    pairs = {pair: sum(map(often.__getitem__, numbers)) for pair, numbers in where.items()}  # pair -> its count
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < how_many:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:  # counts only fall after a pair was pushed: put it back where it belongs now
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        new = chr(256 + len(merges))
        merges.append((ord(pair[0]), ord(pair[1])))
        fresh = join_everywhere(pair, new, words, often, where.pop(pair), pairs)
        for other, numbers in fresh.items():
            where[other] = numbers
            heapq.heappush(heap, (-pairs[other], other))
        progress("learned {:,} of {:,} merges", len(merges), how_many)
    return merges


def join_everywhere(pair, new, words, often, numbers, pairs):
    """Put token `new` for `pair` into the `words` with these numbers; return {pair with the new token: words}.

    `pairs` is brought up to date: x a b y loses (x, a), (a, b), (b, y) and wins (x, new), (new, y)."""
    first, second = pair
    before, after = defaultdict(list), defaultdict(list)  # neighbour -> words, each as often as it stands there
    for number in dict.fromkeys(numbers):  # each once, or a million equal letters take hours
        parts = words[number].split(pair)
        if len(parts) == 1:  # an earlier merge took the pair apart
            continue
        words[number] = new.join(parts)
        left = parts[0][-1:]
        for part in parts[1:]:
            if left:
                before[left].append(number)
            if part:
                after[part[0]].append(number)
            left = part[-1:] or new
    # Where pairs touch, a b a b, the left neighbour is the new token; it was b. Counting here, once for each neighbour
    # and not in the loop above, takes a quarter off the time of all merges.
    changed = [((second if left == new else left) + first, left + new, held) for left, held in before.items()]
    changed += [(second + right, new + right, held) for right, held in after.items()]
    for old, other, held in changed:
        count = sum(map(often.__getitem__, held))
        pairs[old] -= count
        pairs[other] = count
    del pairs[pair]
    return {other: held for _, other, held in changed}


# ---------------------------------------------------------------------------------------------------------------------
# Byte pairs: the tokenizers


def join(ids, pair, new):
    """Return `ids` with every occurrence of `pair` replaced by `new`: [1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]."""
    joined, i = [], 0
    while i < len(ids):
        found = (ids[i], ids[i + 1]) == pair if i + 1 < len(ids) else False
        joined.append(new if found else ids[i])
        i += 2 if found else 1
    return joined


def encode_fast(encoding, text):
    """Return the ids of plain `text` by a tiktoken.Encoding, as an array.

    tiktoken panics at a run of a million blanks; such a run is one pre-token, less the last blank if a word follows."""
    ids = array.array("I")
    buffer = getattr(encoding._core_bpe, "encode_to_tiktoken_buffer", None)  # makes no Python number of a token
    for part in LONG_BLANK.split(text):
        if buffer and ids.itemsize == 4:
            ids.frombytes(memoryview(buffer(part, set())).cast("B"))
        else:
            ids.extend(encoding.encode_ordinary(part))
    return ids


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding: ids 0 to 255 are the bytes, then one id a merge, then the special tokens.

    `merges` are lines as in GPT-2's vocab.bpe, "Ġ t" joining a space and a t, in the order they were learned.
    ValueError names the first line that joins unknown tokens or makes one a second time."""

    type = "bpe"
    fields = {"special_tokens": list, "split_digits": bool, "merges": list}

    def __init__(self, merges, special_tokens=(EOT,), split_digits=False, made=None):
        self.merges, self.special_tokens, self.split_digits = list(merges), list(special_tokens), split_digits
        self.names = {name: i for i, name in enumerate(BYTE_NAMES)}  # token as GPT-2's files write it -> id
        self.ranks = {}  # (id, id) -> id of the two joined; the lower, the earlier learned
        for number, line in enumerate(self.merges, 1):
            left, _, right = line.partition(" ")
            if left not in self.names or right not in self.names or left + right in self.names:
                raise ValueError(f"merge {number}, {line!r}: its two parts must be tokens made before it, and the "
                                 f"whole a new one")
            self.ranks[self.names[left], self.names[right]] = self.names[left + right] = len(self.names)
        if "" in self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"the special tokens {self.special_tokens} must be different and not empty")
        byte_of = dict(zip(BYTE_NAMES, BYTES))
        tokens = [bytes(byte_of[character] for character in name) for name in self.names]
        specials = {name: len(tokens) + i for i, name in enumerate(self.special_tokens)}
        super().__init__(tokens + [clean(name).encode() for name in specials], specials, made)
        self.known = {}  # pre-tokens that were encoded before -> ids

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(EOT,), split_digits=False, workers=None, progress=no_progress):
        """Return a tokenizer of `vocab_size` tokens (fewer where the text has no more pairs) learned from `texts`.

        `texts`: any iterable of strings, read once; only the counts of different words are held in memory. From four
        million characters on they are counted in `workers` child processes (None: one a processor). `progress` is
        called with a format and its numbers. Raises ValueError if `vocab_size` is too small or there is no text."""
        smallest = 256 + len(special_tokens)
        if not smallest <= vocab_size <= sys.maxunicode:
            raise ValueError(f"vocab_size {vocab_size} must be {smallest} (the bytes and special tokens) or more, "
                             f"up to {sys.maxunicode}")
        workers = workers or min(8, os.cpu_count() or 1)
        stream = blocks(texts)
        start = list(itertools.islice(stream, 4))
        stream = itertools.chain(start, stream)
        if workers == 1 or len(start) < 4:
            counts = count_pieces(itertools.chain.from_iterable(stream), split_digits)
        else:
            counts = count_in_children(stream, split_digits, workers, progress)
        if not counts:
            raise ValueError("there is no text to learn from")
        names = list(BYTE_NAMES)
        merges = []
        for left, right in learn_merges(counts, vocab_size - smallest, progress):
            merges.append(f"{names[left]} {names[right]}")
            names.append(names[left] + names[right])
        return cls(merges, special_tokens, split_digits)

    @classmethod
    def from_gpt2_files(cls, encoder_json, vocab_bpe, special_tokens=(EOT,)):
        """Return the tokenizer of GPT-2's two files (Hugging Face's vocab.json and merges.txt are the same).

        ValueError says which file is corrupt, or that the one "does not match" the other."""
        vocab = read_json(encoder_json)
        try:
            with open(vocab_bpe, encoding="utf-8") as file:
                version, *merges = file.read().split("\n")
            if not version.startswith("#version") or merges[-1:] != [""]:
                raise ValueError("it must begin with a #version line and end in a line break")
            tokenizer = cls(merges[:-1], special_tokens)
        except ValueError as error:
            raise ValueError(f"{vocab_bpe} is corrupt: {error}") from None
        wanted = {**tokenizer.names, **tokenizer.specials}
        if vocab != wanted:
            vocab = vocab if isinstance(vocab, dict) else {}
            odd = next(token for token in [*wanted, *vocab] if vocab.get(token) != wanted.get(token))
            raise ValueError(f"{encoder_json} does not match {vocab_bpe}: {odd!r} has id {vocab.get(odd)} in the one "
                             f"and {wanted.get(odd)} by the other")
        return tokenizer

    def merge(self, piece):
        """Return the ids of one pre-token: from its bytes, join the pair learned first, while any pair is known."""
        ids = list(piece.encode().translate(BYTE_IDS))
        while len(ids) > 1:
            pair = min(itertools.pairwise(ids), key=lambda pair: self.ranks.get(pair, self.vocab_size))
            if pair not in self.ranks:
                break
            ids = join(ids, pair, self.ranks[pair])
        return ids

    def encode_slowly(self, text):
        """Return the ids of plain text by the merge loop, which needs no package but regex."""
        import regex

        ids = []
        for piece in regex.findall(GPT2_PATTERN, text):
            found = self.known.get(piece)  # asked once, as another thread may empty it at any time
            if found is None:
                if len(self.known) >= 1 << 16:
                    self.known.clear()
                found = self.known[piece] = self.merge(piece)
            ids += found
        return ids

    @functools.cached_property
    def fast(self):
        """A tiktoken.Encoding of the same merges, or None without tiktoken."""
        try:
            import tiktoken
        except ImportError:
            return None
        ranks = {token: i for i, token in enumerate(self.tokens[:len(self.names)])}
        # Never allowed, so never found; but without any, tiktoken looks for one at every character: 1.7x the time.
        unused = {EOT: len(ranks)}
        return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=unused)

    def encode_ordinary(self, text):
        """Return the ids of plain text: the merge loop for short ASCII text, tiktoken for the rest."""
        # Not by length alone: regex and tiktoken know different versions of Unicode, so the newest letters (after
        # Unicode 16) may be cut differently, and the ids of a character must not depend on how long the text is.
        if len(text) < BULK and text.isascii() or not self.fast:
            return self.encode_slowly(text)
        return encode_fast(self.fast, text).tolist()

    def encode_array(self, text):
        """Return the ids of plain `text` as an array of unsigned 32-bit integers, by tiktoken where it is."""
        return encode_fast(self.fast, clean(text)) if self.fast else super().encode_array(text)

    def join(self, pieces):
        """Return the bytes as text; those that are not UTF-8, as of half a character, become U+FFFD."""
        return b"".join(pieces).decode("utf-8", "replace")

    def export_gpt2_files(self, directory):
        """Write `vocab.json` and `merges.txt`, which Hugging Face's GPT-2 tokenizer loads; special tokens included."""
        os.makedirs(directory, exist_ok=True)
        vocab = json.dumps({**self.names, **self.specials}, ensure_ascii=False)
        write_file(os.path.join(directory, "vocab.json"), vocab)
        write_file(os.path.join(directory, "merges.txt"), "\n".join(["#version: 0.2", *self.merges, ""]))


def gpt2_is_cached():
    """Return whether tiktoken can load GPT-2's vocabulary without the network."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
    names = [hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]
    return all(os.path.isfile(os.path.join(folder, name)) for name in names)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens by tiktoken, which fetches them once and keeps them in $TIKTOKEN_CACHE_DIR."""

    type = "gpt2"
    fields = {}

    def __init__(self, made=None, seconds=30):
        loaded = []

        def load():
            try:
                import tiktoken
                loaded.append(tiktoken.get_encoding("gpt2"))
            except Exception as error:
                loaded.append(error)

        thread = threading.Thread(target=load, daemon=True)  # tiktoken's own download has no time limit
        thread.start()
        thread.join(seconds)
        if not loaded or isinstance(loaded[0], Exception):
            reason = type(loaded[0]).__name__ if loaded else f"no answer in {seconds} seconds"
            raise OSError(f"GPT-2's vocabulary could not be had from {GPT2_URL} ({reason}); point TIKTOKEN_CACHE_DIR "
                          f"at a folder where tiktoken keeps it, or use BPETokenizer.from_gpt2_files")
        self.fast = loaded[0]
        tokens = [self.fast.decode_single_token_bytes(i) for i in range(self.fast.n_vocab)]
        super().__init__(tokens, {EOT: self.fast.eot_token}, made)

    def encode_ordinary(self, text):
        """Return the ids of plain text."""
        return encode_fast(self.fast, text).tolist()

    def encode_array(self, text):
        """Return the ids of plain `text` as an array of unsigned 32-bit integers."""
        return encode_fast(self.fast, clean(text))

    join = BPETokenizer.join


# ---------------------------------------------------------------------------------------------------------------------
# Files


def digest(fields):
    """Return the sha256 of plain values, in hexadecimal; key order does not matter."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_file(path, text):
    """Write `text` to `path` so that the file is there whole or not at all."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    if os.name == "posix":  # make the new name last through a power cut too
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_json(path):
    """Return the value in a JSON file; ValueError for what is not strict JSON, a repeated key included."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: {error}") from None


def from_dict(fields, source="the tokenizer"):
    """Return the tokenizer that `to_dict` described; ValueError names `source` and what is wrong with it."""
    kinds = {kind.type: kind for kind in (WordTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer)}
    if not isinstance(fields, dict) or str(fields.get("type")) not in kinds:
        raise ValueError(f"{source} is corrupt: it holds no tokenizer of a type among {', '.join(kinds)}")
    kind = kinds[fields["type"]]
    types = {"type": str, "vocab_size": int, "made": dict, "sha256": str, **kind.fields}
    if types.keys() != fields.keys():
        raise ValueError(f"{source} is corrupt: missing or unknown: {', '.join(sorted(types.keys() ^ fields.keys()))}")
    for name, wanted in types.items():
        items = fields[name] if wanted is list and type(fields[name]) is list else []
        if type(fields[name]) is not wanted or not all(type(item) is str for item in items):
            raise ValueError(f"{source} is corrupt: {name} must be of type {wanted.__name__}, a list holding strings")
    try:
        tokenizer = kind(**{name: fields[name] for name in kind.fields}, made=fields["made"])
    except ValueError as error:
        raise ValueError(f"{source} is corrupt: {error}") from None
    if tokenizer.to_dict() != fields:
        raise ValueError(f"{source} is corrupt: its {tokenizer.vocab_size} tokens have the sha256 "
                         f"{tokenizer.to_dict()['sha256'][:12]}, which does not match {fields['sha256'][:12]}")
    return tokenizer


def load_tokenizer(source):
    """Return the tokenizer "gpt2", or the one in the file (or in `tokenizer.json` of the folder) `source`."""
    if source == "gpt2":
        return GPT2Tokenizer()
    path = os.path.join(source, "tokenizer.json") if os.path.isdir(source) else os.fspath(source)
    if not os.path.exists(path):
        folder = (os.path.dirname(path) or ".") if path.endswith(".json") else path
        raise FileNotFoundError(f"no tokenizer at {path}; python tokenizer.py train --out_dir {folder} makes "
                                f"{os.path.join(folder, 'tokenizer.json')}")
    if path.endswith(".safetensors"):
        raise ValueError(f"{path} is a model, not a tokenizer; give the tokenizer.json that it was trained with")
    return from_dict(read_json(path), path)


def read_text(path, errors="strict"):
    """Yield the text of a UTF-8 file in parts that join to the whole, cut as `cut` does; a BOM is dropped."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    rest, offset = "", 0
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            if not offset and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{path} is UTF-16; save it as UTF-8")
            if b"\0" in block:
                raise ValueError(f"{path} is not text: it holds a zero byte at offset {offset + block.index(0)}")
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - len(decoder.getstate()[0]) + error.start
                raise ValueError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place}; "
                                 f"save it as UTF-8, or use --errors replace") from None
            rest = rest if offset else rest.removeprefix("\ufeff")
            *parts, rest = cut(rest) if block else [rest, ""]
            yield from filter(None, parts)
            if not block:
                break
            offset += len(block)
    if not offset:
        raise ValueError(f"{path} is empty")


def open_source(source, errors="strict"):
    """Return an iterator over the texts of a text file; of all else (a folder, a name) data.py knows how to read it."""
    if os.path.isfile(source) and not source.endswith((".jsonl", ".gz")):
        return read_text(source, errors)
    try:
        from data import texts
    except ImportError as error:
        problem = "" if os.path.exists(source) else f"no such file: {source}; "
        raise FileNotFoundError(f"{problem}folders, .jsonl, .gz and data sets by name need data.py beside tokenizer.py "
                                f"({error})") from None
    return texts(source)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class Progress:
    """Print how far the work is to stderr: in place on a terminal, else a line every ten seconds."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.next = time.monotonic() + (0 if self.terminal else 10)

    def __call__(self, line, *numbers):
        if time.monotonic() >= self.next:
            self.clear()
            print(line.format(*numbers), end="" if self.terminal else "\n", file=sys.stderr, flush=True)
            self.next = time.monotonic() + (0.2 if self.terminal else 10)

    def clear(self):
        """Remove the line from a terminal."""
        print("\r\x1b[K" * self.terminal, end="", file=sys.stderr, flush=True)


class Reading:
    """Iterates over texts and keeps what a report needs: number of bytes, sha256 and the first part, as a sample."""

    def __init__(self, sources, errors):
        streams = [open_source(source, errors) for source in sources]
        self.texts = documents(itertools.chain.from_iterable(streams))
        self.bytes, self.hash, self.sample = 0, hashlib.sha256(), []

    def __iter__(self):
        for text in self.texts:
            if self.bytes < BLOCK:
                self.sample.append(text)
            data = text.encode()
            self.bytes += len(data)
            self.hash.update(data + b"\xff")
            yield text


def train(args):
    """Train a tokenizer on text and write it to OUT_DIR/tokenizer.json."""
    if not args.out_dir:
        raise argparse.ArgumentError(None, "--out_dir is empty; name a folder, or leave the flag out")
    path = os.path.join(args.out_dir, "tokenizer.json")
    there = os.path.exists(path)
    if args.type == "bpe" and args.vocab_size < 257:
        raise argparse.ArgumentError(None, f"--vocab_size {args.vocab_size} is below 257: 256 bytes and {EOT}")
    if args.resume and args.fresh:
        raise argparse.ArgumentError(None, "--resume keeps a tokenizer that is there, --fresh replaces it: give one")
    if there and not args.resume and not args.fresh:
        raise argparse.ArgumentError(None, f"{path} exists: --resume keeps it if it was made with these options, "
                                           f"--fresh moves it aside, another --out_dir leaves it alone")
    check_writable(args.out_dir)
    reading = Reading(args.data, args.errors)
    if there and args.resume:
        return compare(path, args, reading)
    if args.resume:
        print(f"training a new tokenizer, {path}", file=sys.stderr)
    progress, start = Progress(), time.perf_counter()
    if args.type == "bpe":
        tokenizer = BPETokenizer.train(reading, args.vocab_size, split_digits=args.split_digits, progress=progress)
    else:
        tokenizer = {"word": WordTokenizer, "char": CharTokenizer}[args.type].train(reading)
    progress.clear()
    seconds = time.perf_counter() - start
    if not reading.bytes:
        raise ValueError(f"there is no text in {', '.join(args.data)}")
    tokenizer.made = made(args, reading)
    os.makedirs(args.out_dir, exist_ok=True)
    if there:
        aside = next(name for n in itertools.count(1) if not os.path.exists(name := f"{path}.old{n}"))
        shutil.copyfile(path, aside)  # not moved: the name must hold a whole tokenizer at every moment
        print(f"the old {path} is now {aside}", file=sys.stderr)
    tokenizer.save(path)
    print(report(tokenizer, reading, seconds), f"saved        {path}", sep="\n")


def check_writable(folder):
    """Raise OSError unless `folder`, or the nearest folder above it that exists, can be written to."""
    parent = os.path.abspath(folder)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        reason = "read-only" if os.path.isdir(parent) else "a file"
        raise OSError(f"cannot write to --out_dir {folder}: {parent} is {reason}; name another folder")


def made(args, reading):
    """Return the note on the training that is saved with a tokenizer and decides whether --resume may keep it."""
    options = {"vocab_size": args.vocab_size, "split_digits": args.split_digits} if args.type == "bpe" else {}
    return {"type": args.type, **options, "data": args.data, "data_bytes": reading.bytes,
            "data_sha256": reading.hash.hexdigest()}


def compare(path, args, reading):
    """Return 0 if the tokenizer at `path` was made with the same options and text; else raise what differs."""
    for _ in reading:
        pass
    saved, given = load_tokenizer(path).made, made(args, reading)
    differing = [name for name in sorted({*saved, *given} - {"data"}) if saved.get(name) != given.get(name)]
    if differing:
        table = "; ".join(f"{name}: saved {saved.get(name)}, given {given.get(name)}" for name in differing)
        raise argparse.ArgumentError(None, f"{path} was made otherwise ({table}); --fresh moves it aside and trains")
    print(f"{path} is there, made with the same options from the same text")
    return 0


def report(tokenizer, reading, seconds):
    """Return the lines that sum a training up."""
    size, pieces = tokenizer.vocab_size, tokenizer.tokens
    parts = f"{len(tokenizer.specials)} special"
    if tokenizer.type == "bpe":
        learned = [show(piece) for piece in pieces[256:256 + len(tokenizer.merges)]]
        parts = f"256 bytes, {len(learned):,} merges, {parts}"
        if size < tokenizer.made["vocab_size"]:
            parts += f"; fewer than {tokenizer.made['vocab_size']:,}, because no pair is left to merge"
    sample = "".join(reading.sample)
    rate = len(sample.encode()) / max(len(tokenizer.encode_array(sample)), 1)
    lines = [f"vocabulary   {size:,} tokens: {parts}",
             f"text         {reading.bytes:,} bytes, sha256 {reading.hash.hexdigest()[:12]}",
             f"compression  {rate:.2f} bytes a token on the first {len(sample.encode()):,} bytes",
             f"time         {seconds:.1f} s"]
    if tokenizer.type == "bpe":
        longest = sorted((word for word in learned if word.strip().isalpha()), key=len, reverse=True)[:8]
        lines[3:3] = [f"first        {'|'.join(learned[:16])}", f"long words   {'|'.join(longest)}"]
    return "\n".join(lines)


def use_utf8():
    """Make the standard streams UTF-8 whatever the locale says; what is not UTF-8 is handled as in arguments."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def argument_text(words):
    """Return the words of the command line as one text, or all of stdin without any; warn of what is not UTF-8."""
    use_utf8()
    if not words and sys.stdin.isatty():
        raise argparse.ArgumentError(None, "no text: give it in quotes, or on standard input")
    text = " ".join(words) if words else sys.stdin.read()
    lost = clean(text).count("\ufffd") - text.count("\ufffd")
    if lost:
        print(f"warning: {lost} bytes or surrogates that are not UTF-8 were read as U+FFFD", file=sys.stderr)
    return clean(text)


def encode(args):
    """Print the token ids of a text."""
    text = argument_text(args.text)
    print(*load_tokenizer(args.tokenizer).encode(text))


def decode(args):
    """Print the text of token ids."""
    ids = args.ids or [int(word) for word in argument_text([]).split()]
    use_utf8()
    print(load_tokenizer(args.tokenizer).decode(ids))


def show(piece):
    """Return a token, text or bytes, as one printable line."""
    text = piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def inspect(args):
    """Show the tokens of a text: pieces, ids and bytes, and how far it is compressed."""
    text = argument_text(args.text)
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(text)
    pieces = [tokenizer.tokens[i] for i in ids]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        colours = itertools.cycle(("\x1b[30;46m", "\x1b[30;43m"))
        print("".join(f"{colour}{show(piece)}" for colour, piece in zip(colours, pieces)) + "\x1b[0m")
    else:
        print("|".join(map(show, pieces)))
    for i, piece in zip(ids, pieces):
        data = piece if isinstance(piece, bytes) else piece.encode()
        print(f"{i:>7}  {data.hex(' '):<29}  {show(piece)}")
    size = len(text.encode())
    print(f"{len(text):,} characters, {size:,} bytes, {len(ids):,} tokens: {size / max(len(ids), 1):.2f} bytes a token")
    if tokenizer.type != "gpt2" and gpt2_is_cached():
        theirs = len(GPT2Tokenizer().encode(text))
        print(f"GPT-2's tokenizer: {theirs:,} tokens, {size / max(theirs, 1):.2f} bytes a token")
    elif tokenizer.type != "gpt2":
        print("GPT-2's tokenizer, to compare with, is not on this machine; once with network: "
              "python tokenizer.py inspect --tokenizer gpt2 TEXT")


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


TOKENIZER = {"--tokenizer": dict(default="out/tokenizer/tokenizer.json", help="a saved tokenizer, or gpt2")}
TEXT = {"text": dict(nargs="*", help="text; without it, stdin is read"), **TOKENIZER}
TRAIN = {
    "--data": dict(nargs="+", default=["tinyworld", "tinyworld/instructions"],
                   help="text files, folders, data sets by name (default: tinyworld's stories and its questions)"),
    "--type": dict(default="bpe", choices=("bpe", "word", "char"), help="byte pairs, words or characters"),
    "--vocab_size": dict(default=1024, type=int, help="tokens, with the bytes and the special token (bpe only)"),
    "--split_digits": dict(default=True, action=argparse.BooleanOptionalAction, help="one token a digit (bpe only)"),
    "--errors": dict(default="strict", choices=("strict", "replace"), help="what to do with bytes that are not UTF-8"),
    "--out_dir": dict(default="out/tokenizer", help="where tokenizer.json goes"),
    "--resume": dict(action="store_true", help="keep a tokenizer that was made with the same options and text"),
    "--fresh": dict(action="store_true", help="train even if there is one, and move that aside"),
}
COMMANDS = {
    "train": (train, TRAIN),
    "encode": (encode, TEXT),
    "decode": (decode, {"ids": dict(nargs="*", type=int, help="ids; without them, stdin is read"), **TOKENIZER}),
    "inspect": (inspect, TEXT),
}


def main(argv=None):
    """Run the command line and return its exit status."""
    return run(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
