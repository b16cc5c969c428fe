"""Tokenizers: text to token ids and back, from whole words to GPT-2's byte pairs.

  WordTokenizer   A token is a word or a punctuation mark. Easy to read, but a word unseen in training is lost.
  CharTokenizer   A token is a character. Nothing in the alphabet is lost, but texts become about five times longer.
  BPETokenizer    Starts from the 256 bytes, so that no text is lost, and joins the most frequent pair of neighbors
                  again and again: common words become one token, rare words a few. Trained here.
  GPT2Tokenizer   The same with the 50,000 merges that OpenAI learned and published, by the tiktoken package.

Examples
  python tokenizer.py                                      train on the built-in text: 1,024 tokens, a few seconds
  python tokenizer.py train --data corpus.txt notes/ --vocab_size 8192 --no-split_digits --out_dir out/mine
  python tokenizer.py inspect "Hello, world"               pieces, ids and bytes; --tokenizer gpt2 for GPT-2's
  python tokenizer.py encode "Hello, world" | python tokenizer.py decode

As a library: load_tokenizer("gpt2" or path). Text never becomes a special token unless the caller allows it:
encode("<|endoftext|>") is plain text, encode("<|endoftext|>", allowed_special={"<|endoftext|>"}) is one id.
Merges equal those of Hugging Face's BpeTrainer with a ByteLevel alphabet, ids those of tiktoken.
Sources: Sennrich, Haddow and Birch 2016 (byte pairs), arXiv:1508.07909; github.com/openai/gpt-2, src/encoder.py.
"""

import argparse
import array
import contextlib
import difflib
import functools
import gc
import hashlib
import heapq
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

EOT, UNK, PAD = SPECIALS = ("<|endoftext|>", "<|unk|>", "<|pad|>")
WHITESPACE, PUNCTUATION = r"(\s)", r"""([,.:;?_!"()']|--|\s)"""  # Raschka, Build a Large Language Model, section 2.2

# Where GPT-2 splits text before it joins pairs: 's and the like, letters, numbers, other signs (each with a space
# before it), runs of white space. src/encoder.py, in tiktoken's possessive form: the same pieces, a third faster.
ENDINGS, NUMBERS, ASCII_NUMBERS = r"'(?:[sdmt]|ll|ve|re)", r"| ?\p{N}++", "| ?[0-9]+"
GPT2_PATTERN = rf"{ENDINGS}| ?\p{{L}}++{NUMBERS}| ?[^\s\p{{L}}\p{{N}}]++|\s++$|\s+(?!\S)|\s"
# The same for ASCII text by Python's re: twice as fast as the package regex, but its \s has \x1c to \x1f too.
ASCII_PATTERN = rf"{ENDINGS}| ?[A-Za-z]+{ASCII_NUMBERS}| ?[^\t-\r 0-9A-Za-z]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]"
UNIT = re.compile(r"\s*[\S\x1c-\x1f]+|\s+")  # a word with the white space before it: no pre-token spans two units
WHOLE_UNIT = re.compile(r"[^\S\x1c-\x1f].*[\S\x1c-\x1f]", re.DOTALL)  # with white space; may stand beside others
LONG_BLANK = re.compile(r"(?<!W)(W{100000,})(?=W|\Z)".replace("W", r"[^\S\x1c-\x1f]"))  # one pre-token

# The bytes in GPT-2's order and the character for each in its files ("Ġ" is the space): src/encoder.py.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_IDS = bytes(sorted(range(256), key=BYTES.__getitem__))  # byte -> token id
BYTE_NAMES = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]


# Words and characters -------------------------------------------------------------------------------------------------


def clean(text):
    """Return `text` as UTF-8 can hold it: surrogate pairs joined, lone surrogates replaced by U+FFFD (as tiktoken)."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def documents(texts):
    """Return an iterator over `texts`, cleaned; a single string is one document."""
    return map(clean, [texts] if isinstance(texts, str) else texts)


class Tokenizer:
    """Encodes text and decodes ids; a subclass adds `encode_ordinary(text)` and `join(pieces)`.

    tokens: the text (or the bytes) of every id; specials: {special token: id}; info: plain values about training."""

    def __init__(self, tokens, specials, info):
        self.tokens, self.specials, self.info = tokens, specials, dict(info or {})
        self.vocab_size, self.eot_id = len(tokens), specials.get(EOT)
        self.pad_id = specials.get(PAD, self.eot_id)  # GPT-2 has no pad token; padding never counts in a loss

    def encode(self, text, allowed_special=()):
        """Return the ids of `text`; special tokens named in `allowed_special` (or "all") become their own ids."""
        text = clean(text)
        allowed = sorted(self.specials if allowed_special == "all" else allowed_special, key=len, reverse=True)
        for name in allowed:
            if name not in self.specials:
                raise ValueError(f"{name!r} is not a special token; there are: {', '.join(self.specials) or 'none'}")
        if not allowed:
            return self.encode_ordinary(text)
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text)
        ids = ([self.specials[part]] if part in allowed else self.encode_ordinary(part) for part in parts)
        return list(itertools.chain.from_iterable(ids))

    def encode_array(self, text):
        """Return the ids of plain `text` as an array of unsigned 32-bit integers."""
        return array.array("I", self.encode_ordinary(clean(text)))

    def decode(self, ids):
        """Return the text of `ids` (integers, an array or a 1-D tensor); ValueError names an id out of range."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i!r} is not in the vocabulary: ids are 0 to {self.vocab_size - 1}")
        return self.join([self.tokens[i] for i in ids])

    def to_dict(self):
        """Return the tokenizer as plain values that `from_dict` and JSON take; "sha256" covers all of them."""
        fields = {"type": self.type, "vocab_size": self.vocab_size, "made": self.info}
        fields.update({name: getattr(self, name) for name in self.fields})
        return {**fields, "sha256": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}

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


class ListTokenizer(Tokenizer):
    """A tokenizer with a list of strings, or a dict {string: id}, as its vocabulary; a subclass adds `split(text)`."""

    def __init__(self, vocab, info=None):
        self.vocab = sorted(vocab, key=vocab.get) if isinstance(vocab, dict) else list(vocab)
        if isinstance(vocab, dict) and list(map(vocab.get, self.vocab)) != list(range(len(vocab))):
            raise ValueError(f"the ids of a vocabulary of {len(vocab)} must be 0 to {len(vocab) - 1}, each once")
        for token, count in Counter(self.vocab).items():
            if count > 1 or not token or token != clean(token):
                raise ValueError(f"the vocabulary holds {token!r}, which is empty, not UTF-8 or there twice")
        super().__init__(self.vocab, {token: i for i, token in enumerate(self.vocab) if token in SPECIALS}, info)
        self.ids = {token: i for i, token in enumerate(self.vocab) if token not in SPECIALS}

    def encode_ordinary(self, text):
        """Return the ids of plain text; what the vocabulary lacks is "<|unk|>", or a ValueError without that."""
        pieces, unk = self.split(text), self.specials.get(UNK)
        ids = [self.ids.get(piece, unk) for piece in pieces]
        if None in ids:
            position = ids.index(None)
            raise ValueError(f"{pieces[position]!r} at position {position} is not in the vocabulary, which lacks {UNK}")
        return ids


class WordTokenizer(ListTokenizer):
    """Words, split where the regular expression `pattern` matches; what a group of it captures is a token too."""

    type, fields = "word", ("vocab", "pattern")

    def __init__(self, vocab, pattern=PUNCTUATION, info=None):
        with reading(repr(pattern), "is not a regular expression"):
            self.pattern, self.splitter = pattern, re.compile(pattern)
        super().__init__(vocab, info)

    @classmethod
    def train(cls, texts, pattern=PUNCTUATION):
        """Return a tokenizer of all words in `texts`, sorted, then the three special tokens."""
        words = set(itertools.chain.from_iterable(map(cls([], pattern).split, documents(texts))))
        return cls([*sorted(words.difference(SPECIALS)), *SPECIALS], pattern)

    def split(self, text):
        """Return the words: "Is this-- a test?" -> ['Is', 'this', '--', 'a', 'test', '?']."""
        pieces = (piece.strip() for piece in self.splitter.split(text) if piece)
        return [piece for piece in pieces if piece]

    def join(self, pieces):
        """Return the words joined by spaces, none before a punctuation mark: spacing is not restored."""
        return re.sub(r"""\s+([,.:;?!"()'])""", r"\1", " ".join(pieces))


class CharTokenizer(ListTokenizer):
    """One id per character. Without special tokens, the default of `train`, `eot_id` and `pad_id` are None."""

    type, fields = "char", ("vocab",)
    split, join = list, "".join

    @classmethod
    def train(cls, texts, specials=False):
        """Return a tokenizer of all characters in `texts`, sorted, and with `specials` the three special tokens."""
        characters = set(itertools.chain.from_iterable(documents(texts)))
        return cls([*sorted(characters), *(SPECIALS if specials else ())])


# Byte pairs -----------------------------------------------------------------------------------------------------------


@functools.cache
def split_pattern(is_ascii, split_digits):
    """Return GPT-2's pattern for ASCII or for any text; with `split_digits` without numbers, which findall skips."""
    if is_ascii:
        return re.compile(ASCII_PATTERN.replace(ASCII_NUMBERS, "") if split_digits else ASCII_PATTERN)
    import regex  # comes with tiktoken
    return regex.compile(GPT2_PATTERN.replace(NUMBERS, "") if split_digits else GPT2_PATTERN)


def count_pre_tokens(texts, split_digits):
    """Return how often each pre-token occurs in the strings `texts`; equally frequent words are split in one go."""
    units, groups, counts = Counter(), defaultdict(list), Counter()
    for text in texts:
        units.update(map(re.Match.group, UNIT.finditer(text)))
    for unit, count in units.items():
        groups[count, unit.isascii(), "" if WHOLE_UNIT.fullmatch(unit) else unit].append(unit)
    for (count, is_ascii, _), group in groups.items():
        for piece, number in Counter(split_pattern(is_ascii, split_digits).findall("".join(group))).items():
            counts[piece] += count * number
    return counts


def learn_merges(counts, how_many):
    """Return up to `how_many` merges in the order learned, lines of GPT-2's vocab.bpe, from {pre-token: count}.

    The most frequent pair is taken, of equals the one with the lower ids, as in Hugging Face's bpe/trainer.rs. A
    pre-token is a string with one character per token, chr(id), so that str.split finds a pair and str.join puts the
    new token in its place. Pair counts are kept up to date: a merge touches only the pre-tokens that hold its pair."""
    words = [piece.encode().translate(BYTE_IDS).decode("latin-1") for piece in counts]
    often = list(counts.values())
    where = defaultdict(list)  # pair -> the words that hold it (or once did), each as often as it does
    for number, word in enumerate(words):
        for pair in map("".join, itertools.pairwise(word)):
            where[pair].append(number)
    pairs = {pair: sum(map(often.__getitem__, numbers)) for pair, numbers in where.items()}  # pair -> its count
    heap = sorted((-count, pair) for pair, count in pairs.items())
    names, merges = list(BYTE_NAMES), []
    while heap and len(merges) < how_many:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:  # counts only fall after a pair was pushed: put it back where it belongs now
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        merges.append(" ".join(names[ord(token)] for token in pair))
        names.append(merges[-1].replace(" ", ""))  # no name holds a space
        for other, numbers in join_everywhere(pair, chr(len(names) - 1), words, often, where.pop(pair), pairs).items():
            where[other] = numbers
            heapq.heappush(heap, (-pairs[other], other))
    return merges


def join_everywhere(pair, new, words, often, numbers, pairs):
    """Put token `new` for `pair` into the `words` with these numbers; return {pair with the new token: words}.

    `pairs` is updated in place: x a b y loses (x, a), (a, b), (b, y) and gains (x, new), (new, y)."""
    first, second = pair
    before, after = defaultdict(list), defaultdict(list)  # neighbor -> words, each as often as it stands there
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
    # Counted once for each neighbor. Where pairs touch, a b a b, the left neighbor is the new token; it was b.
    changed = [((second if left == new else left) + first, left + new, held) for left, held in before.items()]
    changed += [(second + right, new + right, held) for right, held in after.items()]
    for old, other, held in changed:
        count = sum(map(often.__getitem__, held))
        pairs[old] -= count
        pairs[other] = count
    del pairs[pair]
    return {other: held for _, other, held in changed}


def encode_fast(encoding, text):
    """Return the ids of plain `text` by a tiktoken.Encoding, which panics at a run of a million blanks."""
    long = any(text[i:i + 100].isspace() for i in range(0, len(text), 50_000))  # a quick look before the slow one
    return list(itertools.chain(*map(encoding.encode_ordinary, LONG_BLANK.split(text) if long else [text])))


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding: ids 0 to 255 are the bytes, then one id per merge, then the special tokens.

    `merges` are lines as in GPT-2's vocab.bpe, "Ġ t" joining a space and a t, in the order they were learned."""

    type, fields = "bpe", ("special_tokens", "split_digits", "merges")

    def __init__(self, merges, special_tokens=(EOT,), split_digits=False, info=None):
        self.merges, self.special_tokens, self.split_digits = list(merges), list(special_tokens), split_digits
        self.names = {name: i for i, name in enumerate(BYTE_NAMES)}  # token as GPT-2's files write it -> id
        self.ranks = {}  # chr(id) + chr(id) -> id of the two joined; the lower, the earlier learned
        for number, line in enumerate(self.merges, 1):
            left, _, right = line.partition(" ")
            if left not in self.names or right not in self.names or left + right in self.names:
                raise ValueError(f"merge {number}, {line!r}, must join two tokens made before it into a new one")
            pair = chr(self.names[left]) + chr(self.names[right])
            self.ranks[pair] = self.names[left + right] = len(self.names)
        if "" in self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"the special tokens {self.special_tokens} must be different and not empty")
        byte_of = dict(zip(BYTE_NAMES, BYTES))
        tokens = [bytes(map(byte_of.get, name)) for name in self.names]
        specials = {name: len(tokens) + i for i, name in enumerate(self.special_tokens)}
        super().__init__(tokens + [clean(name).encode() for name in specials], specials, info)

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(EOT,), split_digits=False):
        """Return a tokenizer of `vocab_size` tokens (fewer where the text has no more pairs) learned from `texts`.

        `texts` is any iterable of strings, of which only word counts are kept. With `split_digits` no merge contains a
        digit: numbers become one token per digit. ValueError if `vocab_size` is too small or there is no text."""
        smallest = 256 + len(special_tokens)
        if not smallest <= vocab_size <= sys.maxunicode:
            raise ValueError(f"vocab_size {vocab_size} must be {smallest} (bytes, special tokens) to {sys.maxunicode}")
        counts = count_pre_tokens(documents(texts), split_digits)
        if not counts:
            raise ValueError("there is no text to learn from")
        gc.disable()  # no cycles are made, and looking for them takes a tenth of the time, more beside torch's objects
        try:
            return cls(learn_merges(counts, vocab_size - smallest), special_tokens, split_digits)
        finally:
            gc.enable()

    @classmethod
    def from_gpt2_files(cls, encoder_json, vocab_bpe, special_tokens=(EOT,)):
        """Return the tokenizer of GPT-2's two files (Hugging Face's vocab.json and merges.txt are the same)."""
        vocab = read_json(encoder_json)
        with reading(vocab_bpe, f"is corrupt or does not match {encoder_json}"):
            _, *lines = Path(vocab_bpe).read_text(encoding="utf-8").split("\n")
            return check_ids(cls(filter(None, lines), special_tokens), vocab)

    @classmethod
    def from_huggingface(cls, path):
        """Return the tokenizer of Hugging Face's tokenizer.json; ValueError names what would give other ids here."""
        with reading(path, "cannot be read as GPT-2's kind of tokenizer"):
            merges, special_tokens, vocab = huggingface_parts(read_json(path))
            return check_ids(cls(merges, special_tokens), vocab)

    def merge(self, piece):
        """Return the ids of one pre-token: from its bytes, join the pair learned first, while any pair is known."""
        word = piece.encode().translate(BYTE_IDS).decode("latin-1")  # a character per token, as in learn_merges
        while known := [pair for pair in map("".join, itertools.pairwise(word)) if pair in self.ranks]:
            pair = min(known, key=self.ranks.get)
            word = word.replace(pair, chr(self.ranks[pair]))
        return list(map(ord, word))

    def encode_by_steps(self, text):
        """Return the ids of plain text by the merge loop: what `encode_ordinary` computes by tiktoken."""
        return list(itertools.chain(*map(self.merge, split_pattern(text.isascii(), False).findall(text))))

    @functools.cached_property
    def fast(self):
        """A tiktoken.Encoding of the same merges."""
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens[:len(self.names)])}
        unused = {EOT: len(ranks)}  # without any, tiktoken looks for one at every character: 1.7x the time
        return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=unused)

    def encode_ordinary(self, text):
        """Return the ids of plain text."""
        return encode_fast(self.fast, text)

    def join(self, pieces):
        """Return the bytes as text; those that are not UTF-8, as of half a character, become U+FFFD."""
        return b"".join(pieces).decode("utf-8", "replace")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens by tiktoken, which downloads them once and keeps them in $TIKTOKEN_CACHE_DIR."""

    type, fields = "gpt2", ()

    def __init__(self, info=None):
        import tiktoken
        try:
            self.fast = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of tiktoken, requests or the file system
            raise OSError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}); point TIKTOKEN_CACHE_DIR "
                          f"at a folder that holds it, or use BPETokenizer.from_gpt2_files") from None
        tokens = [self.fast.decode_single_token_bytes(i) for i in range(self.fast.n_vocab)]
        super().__init__(tokens, {EOT: self.fast.eot_token}, info)

    encode_ordinary, join = BPETokenizer.encode_ordinary, BPETokenizer.join


# Files and commands ---------------------------------------------------------------------------------------------------


def write_file(path, text):
    """Write `text` to `path`; after a failure the old file is still there."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; free some space or name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(source, problem="is corrupt"):
    """Turn the errors that wrong content causes inside the block into a ValueError that names `source`."""
    try:
        yield
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{source} {problem} ({type(error).__name__}: {error})") from None


def read_json(path):
    """Return the value in a JSON file; ValueError for what is not JSON."""
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def check_ids(tokenizer, vocab):
    """Return the BPETokenizer; ValueError unless its merges give `vocab`, {token: id}."""
    mine = {**tokenizer.names, **tokenizer.specials}
    for token in [*mine, *vocab]:
        if mine.get(token) != vocab.get(token):
            raise ValueError(f"{token!r} has id {vocab.get(token)} in the vocabulary, {mine.get(token)} by the merges")
    return tokenizer


def huggingface_parts(fields):
    """Return (merges, special tokens, {token: id}) of a tokenizer.json; its truncation and padding are not read."""
    model, added = fields["model"], sorted(fields["added_tokens"], key=lambda token: token["id"])
    pre, post, decoder = (fields[name] or {} for name in ("pre_tokenizer", "post_processor", "decoder"))
    checks = [("normalizer", fields["normalizer"], None), ("model.type", model.get("type", "BPE"), "BPE"),
              ("pre_tokenizer.type", pre.get("type"), "ByteLevel"), ("decoder.type", decoder.get("type"), "ByteLevel"),
              ("pre_tokenizer.add_prefix_space", pre.get("add_prefix_space"), False),
              ("pre_tokenizer.use_regex", pre.get("use_regex", True), True)]
    if post.get("type", "ByteLevel") != "ByteLevel":  # a template without special tokens adds nothing
        checks.append(("post_processor.special_tokens", post.get("special_tokens"), {}))
    for name in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        checks.append((f"model.{name}", model.get(name) or None, None))
    for name in ("special", "single_word", "lstrip", "rstrip"):
        checks += [(f"added_tokens.{name}", token[name], name == "special") for token in added]
    for name, found, wanted in checks:
        if found != wanted:
            raise ValueError(f"its {name} is {found!r}, and only {wanted!r} gives the same ids here")
    merges = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
    specials = {token["content"]: token["id"] for token in added}
    return merges, list(specials), {**model["vocab"], **specials}


def from_dict(fields, source="the tokenizer"):
    """Return the tokenizer that `to_dict` described; ValueError names `source` and what is wrong with it."""
    kinds = {kind.type: kind for kind in (WordTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer)}
    with reading(source):
        kind = kinds[fields["type"]]
        tokenizer = kind(**{name: fields[name] for name in kind.fields}, info=fields["made"])
        if tokenizer.to_dict() != fields:
            raise ValueError("its parts and its sha256 do not match")
    return tokenizer


def load_tokenizer(source):
    """Return the tokenizer "gpt2", or that of a file (or a folder's tokenizer.json), ours or Hugging Face's."""
    if source == "gpt2":
        return GPT2Tokenizer()
    path = Path(source)
    if path.is_dir() or not path.exists() and path.suffix != ".json":
        path = path / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; make it: python tokenizer.py train --out_dir {path.parent}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a model, not a tokenizer; give the tokenizer.json that it was trained with")
    fields = read_json(path)
    foreign = isinstance(fields, dict) and "added_tokens" in fields
    return BPETokenizer.from_huggingface(path) if foreign else from_dict(fields, path)


def show(piece):
    """Return a token, text or bytes, as one printable line."""
    text = piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def train(args):
    """Train a tokenizer on text; writes OUT_DIR/tokenizer.json."""
    path = Path(args.out_dir, "tokenizer.json")
    options = {"vocab_size": args.vocab_size, "split_digits": args.split_digits} if args.type == "bpe" else {}
    if args.vocab_size < 257:
        raise argparse.ArgumentError(None, f"--vocab_size {args.vocab_size} is below 257: 256 bytes and {EOT}")
    if args.resume and args.fresh:
        raise argparse.ArgumentError(None, "--resume keeps a tokenizer, --fresh replaces it: give one")
    info = {"type": args.type, "data": args.data, **options}
    if args.separator:
        info["separator"] = args.separator
    if path.exists() and not args.fresh:
        if not args.resume:
            raise argparse.ArgumentError(None, f"{path} exists: --resume keeps it, --fresh moves it aside")
        saved = load_tokenizer(path).info
        table = [f"{key}: saved {saved.get(key)}, given {info.get(key)}" for key in {**info, **saved}
                 if saved.get(key) != info.get(key)]
        if table:
            raise argparse.ArgumentError(None, f"{path} has other options ({'; '.join(table)}); --fresh moves it aside")
        return print(f"{path} is there, made with the same options")
    from data import texts
    start = time.perf_counter()
    content = documents(text for source in args.data for text in texts(source, args.separator))
    first = list(itertools.islice(content, 500))
    sample = "".join(first)[:1_000_000]
    kind = {"bpe": BPETokenizer, "word": WordTokenizer, "char": CharTokenizer}[args.type]
    tokenizer = kind.train(itertools.chain(first, content), **options)
    tokenizer.info, seconds = info, round(time.perf_counter() - start, 1)
    rate = len(sample.encode()) / max(1, len(tokenizer.encode_array(sample)))
    summary = {"stage": "tokenizer", "seconds": seconds, "cpu_seconds": round(time.process_time(), 1),
               "command": shlex.join(["python", "tokenizer.py", *args.argv]), "data": {"source": args.data},
               "versions": {"python": sys.version.split()[0]}, "config": info, "vocab_size": tokenizer.vocab_size,
               "bytes_per_token": rate}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        aside = next(name for n in itertools.count(1) if not os.path.exists(name := f"{path}.old{n}"))
        os.replace(path, aside)
        print(f"moved {path} to {aside}", file=sys.stderr)
    write_file(path.with_name("summary.json"), json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    tokenizer.save(path)
    print(f"{tokenizer.vocab_size:,} tokens; {rate:.2f} bytes per token; {seconds} s; {path}")


def text_of(words):
    """Return the words of the command line as one text, or all of stdin without any."""
    if not words and (sys.stdin is None or sys.stdin.isatty()):
        raise argparse.ArgumentError(None, "no text: give it in quotes, or on standard input")
    text = " ".join(words) if words else sys.stdin.read()
    if text != clean(text):
        print("warning: bytes that are not UTF-8 were read as U+FFFD", file=sys.stderr)
    return clean(text)


def encode(args):
    """Print the token ids of a text."""
    print(*load_tokenizer(args.tokenizer).encode(text_of(args.text)))


def decode(args):
    """Print the text of token ids."""
    ids = args.ids or [int(word) for word in text_of([]).split()]
    print(load_tokenizer(args.tokenizer).decode(ids))


def inspect(args):
    """Show the tokens of a text: pieces, ids and bytes."""
    text, tokenizer = text_of(args.text), load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(text)
    print("|".join(show(tokenizer.tokens[i]) for i in ids))
    for piece, i in ((tokenizer.tokens[i], i) for i in ids):
        print(f"{i:>7}  {(piece if isinstance(piece, bytes) else piece.encode()).hex(' '):<29}  {show(piece)}")
    size, count = len(text.encode()), len(ids)
    print(f"{len(text):,} characters, {size:,} bytes, {count:,} tokens: {size / max(1, count):.2f} bytes per token")


TOKENIZER = {"--tokenizer": dict(default="out/tokenizer/tokenizer.json", help="its file, or gpt2 (%(default)s)")}
TEXT = {"text": dict(nargs="*", help="text; without it, stdin is read"), **TOKENIZER}
COMMANDS = {train: {
    "--data": dict(nargs="+", default=["tinyworld", "tinyworld/instructions"],
                   help="text files, folders, data sets by name (tinyworld's stories and its questions)"),
    "--separator": dict(default="", help="what divides documents in a text file, as '<|endoftext|>'"),
    "--type": dict(default="bpe", choices=("bpe", "word", "char"), help="byte pairs, words, characters (%(default)s)"),
    "--vocab_size": dict(default=1024, type=int, help="tokens, bytes and special ones too; bpe only (%(default)s)"),
    "--split_digits": dict(default=True, action=argparse.BooleanOptionalAction, help="one token per digit; bpe only"),
    "--out_dir": dict(default="out/tokenizer", help="where tokenizer.json goes (%(default)s)"),
    "--resume": dict(action="store_true", help="keep a tokenizer that was made with the same options"),
    "--fresh": dict(action="store_true", help="train even if there is one, and move that aside")},
    encode: TEXT, inspect: TEXT,
    decode: {"ids": dict(nargs="*", type=int, help="ids; without them, stdin is read"), **TOKENIZER}}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors in one line."""

    def error(self, message):
        flags, word = itertools.chain(*COMMANDS.values()), message.partition("--")[2].split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(f"--{word}", flags, 1, 0.7) if "unrecognized" in message else []
        raise argparse.ArgumentError(None, f"{message}; " + (f"did you mean {near[0]}?" if near else "see --help"))


def main(argv=None):
    """Run the command line and return its exit status: 2 if it is wrong by itself, 1 for what is found later."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["train", *argv]
    parser = Parser("python tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="command", parser_class=functools.partial(Parser, allow_abbrev=False))
    for function, flags in COMMANDS.items():
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        for name, options in flags.items():
            command.add_argument(name, **options)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=function, argv=argv)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # bytes that are not UTF-8 are handled as in arguments
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        args = parser.parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # --help
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (argparse.ArgumentError, ValueError, OSError, ImportError, MemoryError) as error:
        if "--debug" in argv:
            raise
        remedy = "; copy data.py beside this file, or pip install tiktoken" if isinstance(error, ImportError) else ""
        print("error:", (" ".join(str(error).split()) or "out of memory") + remedy, file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
