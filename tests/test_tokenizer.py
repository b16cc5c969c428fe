"""Tokenizers: published ids, tiktoken and Hugging Face as oracles, worked examples, round trips, and bad input."""

import hashlib
import json
import os
import random
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import regex

import tokenizer as tok
from gpt2_weights import export_tokenizer
from tokenizer import (EOT, WHITESPACE, BPETokenizer, CharTokenizer, WordTokenizer, from_dict,
                       load_tokenizer, main)

PROSE = ("The cat sat on the mat, and the dog, who'd seen 12 in 1999, didn't mind.\n\n  \"That's odd,\" she said;\n"
         "\tthey're all here now -- the others weren't. Straße, naïve café, 東京タワー, привет мир, x²+½ 😀👩‍👩‍👧 end\n") * 6
HARD = ["", " ", "a", "\n", " \n", "a\nb", "a\n\nb", "\nHello", "Hello\n", "a\r\nb", "  two  spaces ", "\t\tx",
        "it's we'll I'd", "'S 'LL", "1234567890 3.14", "日本語のテキスト", "안녕하세요 👋🏽",
        "e\u0301\u00a0x\u2003y\u3000z", "\x00\x1c\x1d\x7f\x85",
        "<|endoftext|>", "a<|endoftext|>b", "x" * 300, "!?" * 200, " " * 50 + "end", "Ġ Ċ", "\ufffd\ufeff"]


def hostile(seed, count=150):
    """Return random strings from alphabets where pre-token rules meet: blanks, quotes, digits, scripts, emoji."""
    rng = random.Random(seed)
    alphabets = [" \n\t'sdmtlrev", "abc ABC  123\n", "'’\"-_.,;!?", "éßжλ東京あ한 ",
                 "😀👍🏽\u200d\ufe0f ", "\x00\x0b\x0c\x1c\x85\xa0\u2003\u3000a1"]
    return ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe():
    """A small byte-pair tokenizer, trained once."""
    return BPETokenizer.train([PROSE], 350)


@pytest.fixture
def gpt2_files():
    """Return the paths of GPT-2's encoder.json and vocab.bpe as tiktoken keeps them, or skip."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    root = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    urls = [root + name for name in ("encoder.json", "vocab.bpe")]
    paths = [Path(folder, hashlib.sha1(url.encode()).hexdigest()) for url in urls]
    if not all(path.is_file() for path in paths):
        pytest.skip("TIKTOKEN_CACHE_DIR does not hold GPT-2's vocab.bpe and encoder.json")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Words and characters


def test_words_and_punctuation_marks_are_split_as_in_the_book():
    """The example sentence of the book's section 2.2, and the same by white space or any pattern."""
    text = "Hello, world. Is this a test?"
    assert WordTokenizer([]).split(text) == ["Hello", ",", "world", ".", "Is", "this", "a", "test", "?"]
    assert WordTokenizer([], WHITESPACE).split(text) == ["Hello,", "world.", "Is", "this", "a", "test?"]
    assert WordTokenizer([], r"([aeiou])").split("banana") == ["b", "a", "n", "a", "n", "a"]
    assert WordTokenizer([]).split("Is this-- a test?") == ["Is", "this", "--", "a", "test", "?"]


def test_the_verdict_has_the_published_word_ids(real_data):
    """1,130 words and 4,690 tokens; both id lists printed in chapter 2 of the book."""
    text = real_data("the-verdict.txt").read_text(encoding="utf-8")
    words = WordTokenizer.train([text])
    assert len(words.split(text)) == 4690
    assert (words.vocab_size, words.eot_id, words.specials["<|unk|>"], words.pad_id) == (1133, 1130, 1131, 1132)
    sentence = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    published = [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]
    assert words.encode(sentence) == published
    two = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
    published = [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert words.encode(two, allowed_special={EOT}) == published
    assert words.encode(two) == [1131 if i == 1130 else i for i in published]
    assert words.decode(words.encode(two)).startswith("<|unk|>, do you like tea? <|unk|> In the sunlit")


def test_a_word_vocabulary_without_unk_names_the_unknown_word():
    """As a dict or a list, and never a guess."""
    words = WordTokenizer({"a": 1, "b": 0})
    assert words.encode("a b a") == [1, 0, 1] and words.eot_id is words.pad_id is None
    with pytest.raises(ValueError, match="'zebra'"):
        words.encode("a zebra")
    for wrong in ({"a": 0, "b": 2}, {"a": 0, "b": 0}, ["a", "a"], [""]):
        with pytest.raises(ValueError, match="vocabulary"):
            WordTokenizer(wrong)
    with pytest.raises(ValueError, match="regular expression"):
        WordTokenizer([], "(")


def test_tiny_shakespeare_has_exactly_65_characters(real_data):
    """nanoGPT's figure, with ids in sorted order, and a round trip of the whole text."""
    text = real_data("tinyshakespeare.txt").read_text(encoding="utf-8")
    characters = CharTokenizer.train([text])
    assert characters.vocab_size == 65 and characters.eot_id is None
    assert characters.encode("\n !z") == [0, 1, 2, 64]
    assert characters.decode(characters.encode_array(text)) == text


def test_an_unknown_character_is_named_or_becomes_unk():
    """Without special tokens there is nothing to stand for it."""
    with pytest.raises(ValueError, match="'é' at position 3"):
        CharTokenizer.train(["abcf"]).encode("café")
    with_specials = CharTokenizer.train(["abcf"], specials=True)
    assert with_specials.encode("é<|pad|>", allowed_special="all") == [5, 6] and with_specials.eot_id == 4


# ---------------------------------------------------------------------------------------------------------------------
# Training byte pairs


def test_training_gives_the_worked_example_of_wikipedia():
    """aaabdaaabac: aa, then (tie: lower ids) and 3 merges leave 5 tokens, X d X a c with X = aaab."""
    three = BPETokenizer.train(["aaabdaaabac"], 260)
    assert [three.tokens[i] for i in three.encode("aaabdaaabac")] == [b"aaab", b"d", b"aaab", b"a", b"c"]
    assert three.tokens[256] == b"aa" and three.tokens[258] == b"aaab" and three.eot_id == 259


def naive_merges(pieces, how_many):
    """Return merges, as lines of vocab.bpe, by recounting everything every time: the definition, slow and plain."""
    words = {tuple(tok.BYTES.index(byte) for byte in piece.encode()): count for piece, count in pieces.items()}
    merges = []
    while len(merges) < how_many:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new, merged = 256 + len(merges), Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                out.append(new if step == 2 else word[i])
                i += step
            merged[tuple(out)] += count
        merges, words = merges + [best], merged
    names = list(tok.BYTE_NAMES)
    for left, right in merges:
        names.append(names[left] + names[right])
    return [f"{names[left]} {names[right]}" for left, right in merges]


@pytest.mark.parametrize("seed", range(3))
def test_incremental_counts_equal_recounting_everything(seed):
    """On random pieces over two letters, full of runs and overlaps such as aaa and abab."""
    rng = random.Random(seed)
    pieces = Counter("".join(rng.choices("ab", k=rng.randrange(1, 12))) for _ in range(60))
    assert tok.learn_merges(pieces, 80) == naive_merges(pieces, 80)


ORIGINAL = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # OpenAI, src/encoder.py


def test_counting_word_by_word_equals_the_split_pattern_on_the_whole_text():
    """Neither counting each different word once nor Python's re for ASCII may change one pre-token."""
    for text in [PROSE, *HARD, *hostile(1), *hostile(6)]:
        assert tok.count_pre_tokens([text], False) == Counter(regex.findall(ORIGINAL, text)), repr(text)
        without_numbers = Counter(regex.findall(ORIGINAL.replace(r"| ?\p{N}+", ""), text))
        assert tok.count_pre_tokens([text], True) == without_numbers, repr(text)
    together = Counter(regex.findall(ORIGINAL, PROSE)) + Counter(regex.findall(ORIGINAL, "next document"))
    assert tok.count_pre_tokens([PROSE, "next document"], False) == together


def test_the_ascii_pattern_equals_the_full_one_on_all_pairs_of_characters():
    """Between letters, blanks and signs; the four controls that only Python's re takes for white space included."""
    for first in map(chr, range(128)):
        text = "".join(f"{first}{second} {first}{second}a {first} {second}!" for second in map(chr, range(128)))
        assert tok.split_pattern(True, False).findall(text) == regex.findall(ORIGINAL, text)


def test_training_reads_an_iterator_once_and_keeps_no_text():
    """The documents come one by one: none is alive when the next one is asked for."""
    alive = []

    def texts():
        for _ in range(50):
            assert sum(alive) <= 1
            alive.append(1)
            yield PROSE
            alive[-1] = 0

    for train in (WordTokenizer.train, CharTokenizer.train, lambda texts: BPETokenizer.train(texts, 300)):
        alive.clear()
        train(texts())
        assert len(alive) == 50


def test_split_digits_learns_no_merge_with_a_digit_and_changes_nothing_else():
    """Numbers become one token a digit under GPT-2's own pattern; without the option the same text does merge them."""
    text = "year 1999 and 1999 then 2024, x2 x2 ٣٤ ٣٤ " * 30
    split, joined = (BPETokenizer.train([text], 330, split_digits=flag) for flag in (True, False))
    digits = [piece for piece in split.tokens[256:-1] if any(c.isnumeric() for c in piece.decode("utf-8", "ignore"))]
    assert digits == [] and b" 1999" in joined.tokens
    assert [split.tokens[i] for i in split.encode(" 1999")] == [b" ", b"1", b"9", b"9", b"9"]
    assert split.decode(split.encode(text)) == text


def test_training_stops_when_nothing_is_left_to_merge():
    """A vocabulary larger than the text allows is simply smaller; one below the bytes, or no text, is refused."""
    assert BPETokenizer.train("ab ab", 500).tokens[256:] == [b"ab", b" ab", b"<|endoftext|>"]
    with pytest.raises(ValueError, match="vocab_size 256 must be 257"):
        BPETokenizer.train(["text"], 256)
    with pytest.raises(ValueError, match="no text"):
        BPETokenizer.train([], 300)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "x", "é" * 10**5], ids=lambda text: text[:1])
def test_a_million_equal_characters_train_and_encode_in_seconds(text):
    """Neither quadratic nor a panic inside tiktoken."""
    long = BPETokenizer.train([text], 300)
    assert long.decode(long.encode_array(text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


@pytest.mark.parametrize("text", [PROSE, *HARD])
def test_every_string_round_trips(bpe, text):
    """Byte pairs lose nothing."""
    assert bpe.decode(bpe.encode(text)) == text


def test_the_merge_loop_and_tiktoken_give_the_same_ids(bpe):
    """The loop a reader can follow against tiktoken's Rust, on every hard string and a few hundred random ones."""
    for text in [PROSE, *HARD, *hostile(2, 300)]:
        ids = bpe.encode_by_steps(text)
        assert ids == bpe.encode_array(text).tolist() == bpe.encode(text), repr(text)
        assert bpe.decode(ids) == text


def test_a_word_of_ten_thousand_letters_is_encoded_at_once(bpe):
    """Not in the square of its length (8 seconds once); and words of 60 letters, each different, as fast."""
    rng = random.Random(0)
    letters = "".join(rng.choices(string.ascii_lowercase, k=9_999))
    words = " ".join(letters[i : i + 60] for i in range(0, 9_999, 60))
    bpe.encode("tiktoken is imported")
    for text in (letters, words):
        start = time.process_time()
        ids = bpe.encode(text)
        assert time.process_time() - start < 0.05 and bpe.decode(ids) == text


def test_a_run_of_a_million_blanks_does_not_crash(bpe):
    """tiktoken alone panics here, with an exception that `except Exception` does not catch."""
    for text in (" " * 1_100_000 + "x", "a" + "\n" * 1_100_000):
        assert bpe.decode(bpe.encode_array(text)) == text
    small = " " * 120_000 + "x"
    assert bpe.encode_array(small).tolist() == bpe.encode_by_steps(small)


def test_text_never_becomes_a_special_token_unless_allowed(bpe):
    """The literal name is plain text; allowed, it is one id; an unknown name is refused."""
    text = f"one {EOT} two{EOT}"
    assert bpe.eot_id not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text, allowed_special={EOT}).count(bpe.eot_id) == 2
    assert bpe.encode(text, allowed_special="all") == bpe.encode(text, allowed_special=[EOT])
    nested = BPETokenizer.train([PROSE], 300, special_tokens=("<|a", "<|a|>"))
    assert nested.encode("<|a|><|a", allowed_special="all") == [299, 298]  # the longer name first
    assert bpe.eot_id == bpe.pad_id == bpe.vocab_size - 1
    with pytest.raises(ValueError, match="not a special token"):
        bpe.encode(text, allowed_special={"<|other|>"})
    learned = BPETokenizer.train([f"{EOT} " * 50], 400)
    assert learned.eot_id not in learned.encode(EOT)


def test_lone_surrogates_become_the_replacement_character(bpe):
    """As in tiktoken; a pair is joined to the character it means."""
    assert bpe.decode(bpe.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert bpe.decode(bpe.encode("\ud83d\ude00")) == "😀"
    assert bpe.encode("é\ud800") == bpe.encode_array("é\ud800").tolist()


@pytest.mark.parametrize("wrong", [-1, 350, 10**30, 1.0, "x", True, None])
def test_an_invalid_id_is_named_with_the_range(bpe, wrong):
    """Never a KeyError, and never a neighbour's token."""
    with pytest.raises(ValueError, match="ids are 0 to 349") as caught:
        bpe.decode([5, wrong])
    assert repr(wrong) in str(caught.value)


def test_ids_may_come_as_a_tensor_and_half_a_character_is_replaced(bpe):
    """A tensor's values are integers; the first byte of é alone is not UTF-8."""
    import torch
    assert bpe.decode(torch.tensor(bpe.encode("tensor é"))) == "tensor é"
    assert bpe.decode([bpe.names["Ã"]]) == "\ufffd"


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


def test_gpt2_has_the_published_ids(gpt2_tokenizer, real_data):
    """The sentence and the count of chapter 2."""
    text = "Hello, world. Is this-- a test?"
    assert gpt2_tokenizer.encode(text) == [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.eot_id, gpt2_tokenizer.pad_id) == (50257, 50256, 50256)
    assert len(gpt2_tokenizer.encode(real_data("the-verdict.txt").read_text(encoding="utf-8"))) == 5145


def test_our_reading_of_gpt2s_files_gives_tiktokens_ids(gpt2_files, gpt2_tokenizer):
    """By the merge loop, on every hard string, random ones, and with the special token allowed."""
    ours = BPETokenizer.from_gpt2_files(*gpt2_files)
    theirs = pytest.importorskip("tiktoken").get_encoding("gpt2")
    for text in [PROSE, *HARD, *hostile(3)]:
        assert ours.encode_by_steps(text) == theirs.encode_ordinary(text), repr(text)
        assert gpt2_tokenizer.encode_array(text).tolist() == theirs.encode_ordinary(text)
        assert ours.encode(text, {EOT}) == theirs.encode(text, allowed_special={EOT})
    assert ours.vocab_size == 50257 and ours.decode([50256]) == EOT


# ---------------------------------------------------------------------------------------------------------------------
# Files


def examples():
    """Return one tokenizer of each kind that is trained, none of them with default settings."""
    return [WordTokenizer.train(["a b, a-c"], r"(-|\s)"), CharTokenizer.train(["abc\n é"], specials=True),
            BPETokenizer.train([PROSE], 300, special_tokens=(EOT, "<|user|>", "<|pad|>"), split_digits=True)]


@pytest.mark.parametrize("kind", range(3))
def test_a_saved_tokenizer_loads_as_the_same(kind, tmp_path):
    """Also with a pattern and special tokens other than the default ones, where a lossy save would show."""
    before = examples()[kind]
    before.info = {"data": ["x"], "vocab_size": 5}
    before.save(tmp_path / "tokenizer.json")
    after = load_tokenizer(tmp_path)
    assert type(after) is type(before) and after.to_dict() == before.to_dict() and after.pad_id == before.pad_id
    assert after.info == before.info
    text = "a b, a-c ab"
    if kind != 1:
        assert after.encode(text) == before.encode(text)
    assert after.encode("<|pad|>", allowed_special="all") == [before.pad_id]
    assert type(before).load(tmp_path / "tokenizer.json").vocab_size == before.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(ValueError, match="holds a"):
        examples()[kind - 1].__class__.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("change", [
    lambda d: d["merges"].reverse(), lambda d: d["merges"].append(d["merges"][0]), lambda d: d["merges"].pop(0),
    lambda d: d["special_tokens"].append("<|pad|>"), lambda d: d.pop("vocab_size"), lambda d: d.update(extra=1),
    lambda d: d.update(vocab_size=301), lambda d: d.update(type="sentencepiece"), lambda d: d.update(split_digits=0),
    lambda d: d["merges"].__setitem__(0, 5), lambda d: d.update(sha256="0" * 64), lambda d: d.update(made=[])])
def test_a_changed_description_is_refused(change):
    """Swapped, doubled, missing, of another type: never a tokenizer that gives other ids in silence."""
    fields = examples()[2].to_dict()
    from_dict(json.loads(json.dumps(fields)))
    change(fields)
    with pytest.raises(ValueError, match="corrupt"):
        from_dict(fields)


FIRST_EDITION = {
    "type": "bpe", "vocab_size": 259, "made": {"type": "bpe", "data": ["x.txt"], "data_bytes": 9, "data_sha256": "ab"},
    "special_tokens": ["<|endoftext|>"], "split_digits": True, "merges": ["Ġ a", "b c"],
    "sha256": "dfce627f615948a23f9ab4713d5a438f227ba134bc67f84f900b5256792bb572"}


def test_a_tokenizer_of_the_first_edition_is_read_and_written_the_same(tmp_path):
    """The dict that its checkpoints hold, taken from a run of it."""
    for fields in (FIRST_EDITION, {"type": "char", "vocab_size": 2, "made": {}, "vocab": ["a", "b"],
                                    "sha256": "c96501d5c9458b5300e3833dee9e106f386fa2b3f34627b79b6bc93de4e5092a"}):
        tokenizer = from_dict(fields)
        assert tokenizer.to_dict() == fields and tokenizer.info == fields["made"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
        assert load_tokenizer(tmp_path).to_dict() == fields


def test_exported_files_come_back_as_the_same_tokenizer(tmp_path, bpe):
    """vocab.json and merges.txt are the two files of GPT-2."""
    export_tokenizer(bpe, tmp_path, 64)
    back = BPETokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert back.merges == bpe.merges and back.specials == bpe.specials


def huggingface(bpe):
    """Return what transformers 5 writes as tokenizer.json for a GPT-2 tokenizer with the vocabulary of `bpe`."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for name, i in bpe.specials.items()], "normalizer": None, "pre_tokenizer": level,
        "post_processor": {"type": "TemplateProcessing", "single": [sequence], "pair": [sequence],
                           "special_tokens": {}},
        "decoder": {**level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {**bpe.names, **bpe.specials}, "merges": [line.split(" ") for line in bpe.merges]}}


def test_hugging_faces_tokenizer_json_is_read(tmp_path, bpe):
    """As a file or a folder; merges as pairs or lines, an added [PAD], GPT-2's own older form without a model type."""
    whole = huggingface(bpe)
    path = tmp_path / "tokenizer.json"

    def changed(change):
        fields = json.loads(json.dumps(whole))
        change(fields)
        path.write_text(json.dumps(fields), encoding="utf-8")
        return load_tokenizer(tmp_path)

    pad = {**whole["added_tokens"][0], "id": 350, "content": "[PAD]"}
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    for change in (lambda d: None, lambda d: d["model"].update(merges=bpe.merges), lambda d: d["model"].pop("type"),
                   lambda d: d.update(post_processor=d["pre_tokenizer"]), lambda d: d.update(post_processor=None),
                   lambda d: d["pre_tokenizer"].pop("use_regex"), lambda d: d.update(truncation=limit)):
        back = changed(change)
        assert (back.merges, back.specials, back.eot_id) == (bpe.merges, bpe.specials, bpe.eot_id)
    assert BPETokenizer.from_huggingface(path).encode(PROSE) == bpe.encode(PROSE)
    assert changed(lambda d: d["added_tokens"].append(pad)).specials == {EOT: 349, "[PAD]": 350}


@pytest.mark.parametrize("name, change", [
    ("normalizer", lambda d: d.update(normalizer={"type": "Lowercase"})),
    ("add_prefix_space", lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
    ("use_regex", lambda d: d["pre_tokenizer"].update(use_regex=False)),
    ("pre_tokenizer", lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []})),
    ("pre_tokenizer", lambda d: d.update(pre_tokenizer=None)), ("decoder", lambda d: d.update(decoder=None)),
    ("post_processor", lambda d: d["post_processor"].update(special_tokens={EOT: {"id": EOT, "ids": [349]}})),
    ("post_processor", lambda d: d.update(post_processor={"type": "RobertaProcessing", "sep": [EOT, 349]})),
    ("dropout", lambda d: d["model"].update(dropout=0.1)), ("type", lambda d: d["model"].update(type="Unigram")),
    ("ignore_merges", lambda d: d["model"].update(ignore_merges=True)),
    ("end_of_word_suffix", lambda d: d["model"].update(end_of_word_suffix="</w>")),
    ("lstrip", lambda d: d["added_tokens"][0].update(lstrip=True)),
    ("special", lambda d: d["added_tokens"][0].update(special=False)),
    ("'!' has id 1", lambda d: d["model"].update(vocab={name: i + 1 for name, i in d["model"]["vocab"].items()})),
    ("merge 1", lambda d: d["model"]["merges"].reverse()), ("vocab", lambda d: d["model"].pop("vocab")),
    ("'<x>' has id 360", lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 360, "content": "<x>"}))])
def test_a_tokenizer_json_that_would_give_other_ids_is_refused(tmp_path, bpe, capsys, name, change):
    """By the name of the field or the token, in one line that is true: never ids of its own in silence."""
    fields = json.loads(json.dumps(huggingface(bpe)))
    change(fields)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as GPT-2's") as caught:
        BPETokenizer.from_huggingface(path)
    assert name in str(caught.value) and str(path) in str(caught.value)
    status, _, errors = cli(capsys, "encode", "--tokenizer", tmp_path, "x")
    assert (status, errors.count("\n")) == (1, 1) and name in errors and "corrupt" not in errors


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def cli(capsys, *arguments):
    """Return (exit status, stdout, stderr) of the command line."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.fixture
def corpus(tmp_path):
    """A text file to train on."""
    path = tmp_path / "corpus.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def test_train_encode_decode_and_inspect_from_the_command_line(capsys, tmp_path, corpus):
    """The whole life of a tokenizer; a second training is refused, kept or moved aside, as the flags say."""
    out = tmp_path / "out"
    train = ["train", "--data", corpus, "--vocab_size", 300, "--out_dir", out]
    status, text, errors = cli(capsys, *train)
    assert status == 0 and text.startswith("300 tokens; ") and "bytes per token" in text and errors == ""
    status, ids, _ = cli(capsys, "encode", "--tokenizer", out, "The cat's 12 naïve 😀")
    assert status == 0 and cli(capsys, "decode", "--tokenizer", out, *ids.split())[1] == "The cat's 12 naïve 😀\n"
    status, text, _ = cli(capsys, "inspect", "--tokenizer", out, "the mat")
    assert status == 0 and text.startswith("the|") and "74 68 65" in text and "bytes per token" in text
    saved = (out / "tokenizer.json").read_bytes()
    status, _, errors = cli(capsys, *train)
    assert status == 2 and "--resume" in errors and "--fresh" in errors
    status, text, _ = cli(capsys, *train, "--resume")
    assert status == 0 and "same options" in text
    status, _, errors = cli(capsys, *train, "--resume", "--no-split_digits", "--vocab_size", "301")
    assert status == 2 and "split_digits: saved True, given False" in errors and "saved 300, given 301" in errors
    assert (out / "tokenizer.json").read_bytes() == saved
    divided = [*train, "--fresh", "--separator", "the"]
    assert cli(capsys, *divided)[0] == 0 and cli(capsys, *divided[:-3], "--resume", "--separator", "the")[0] == 0
    status, _, errors = cli(capsys, *train, "--resume")
    assert status == 2 and "separator: saved the, given None" in errors
    (out / "tokenizer.json.old1").replace(out / "tokenizer.json")
    corpus.write_text(PROSE + "more" * 99, encoding="utf-8")
    assert cli(capsys, *train, "--fresh")[0] == 0
    assert (out / "tokenizer.json.old1").read_bytes() == saved != (out / "tokenizer.json").read_bytes()
    assert cli(capsys, *train, "--fresh")[0] == 0 and (out / "tokenizer.json.old1").read_bytes() == saved


def test_the_summary_says_what_was_trained_and_how(capsys, tmp_path, corpus):
    """What `train.py report` and the Makefile read: the same keys as the other stages' and the compression."""
    out = tmp_path / "out"
    assert cli(capsys, "train", "--data", corpus, "--vocab_size", 300, "--out_dir", out)[0] == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["stage"], summary["vocab_size"], summary["data"]) == ("tokenizer", 300, {"source": [str(corpus)]})
    assert summary["command"] == f"python tokenizer.py train --data {corpus} --vocab_size 300 --out_dir {out}"
    wanted = {"type": "bpe", "data": [str(corpus)], "vocab_size": 300, "split_digits": True}
    assert summary["config"] == wanted == load_tokenizer(out).info
    bpe, size = load_tokenizer(out), len(PROSE.encode())
    assert summary["bytes_per_token"] == pytest.approx(size / len(bpe.encode(PROSE))) and summary["seconds"] >= 0
    assert summary["versions"]["python"] == sys.version.split()[0] and summary["cpu_seconds"] > 0


@pytest.mark.parametrize("kind", ["word", "char"])
def test_words_and_characters_train_from_the_command_line(capsys, tmp_path, corpus, kind):
    """The two simpler tokenizers; --resume compares only options that they have."""
    assert cli(capsys, "train", "--type", kind, "--data", corpus, "--out_dir", tmp_path / kind)[0] == 0
    assert load_tokenizer(tmp_path / kind).type == kind
    again = ["train", "--type", kind, "--data", corpus, "--out_dir", tmp_path / kind, "--resume"]
    assert cli(capsys, *again)[0] == cli(capsys, *again, "--vocab_size", 300)[0] == 0


@pytest.mark.parametrize("content", [b"", b"caf\xe9 au lait", "text".encode("utf-16")])
def test_bad_files_get_one_line_and_leave_nothing_behind(capsys, tmp_path, content):
    """Exit 1, the file named, no output folder."""
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    status, text, errors = cli(capsys, "train", "--data", path, "--out_dir", tmp_path / "out")
    assert (status, text, errors.count("\n")) == (1, "", 1) and str(path) in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize("arguments, status, message", [
    (["train", "--vocab_size", "256"], 2, "257"), (["train", "--vocab_size", "many"], 2, "invalid int"),
    (["train", "--vocab_sise", "300"], 2, "did you mean --vocab_size?"), (["train", "--vocab", "300"], 2, "--vocab"),
    (["train", "--resume", "--fresh"], 2, "give one"), (["train", "--data", "no/such.txt"], 1, "no/such.txt"),
    (["train", "--type", "unigram"], 2, "invalid choice"), (["teach"], 2, "invalid choice: 'teach'"),
    (["encode", "--tokenizer", "nowhere/t.json", "x"], 1, "no tokenizer at nowhere/t.json; make it: "),
    (["encode", "--tokenizer", "out/mine", "x"], 1, "python tokenizer.py train --out_dir out/mine"),
    (["encode", "--vocab_size", "300", "x"], 2, "unrecognized"),
    (["encode", "--tokenizer", "MODEL.safetensors", "x"], 1, "is a model, not a tokenizer"),
    (["decode", "--tokenizer", "TOKENIZER", "350"], 1, "ids are 0 to 349"),
    (["decode", "--tokenizer", "TOKENIZER", "-1"], 1, "ids are 0 to 349"),
    (["decode", "--tokenizer", "TOKENIZER", "x"], 2, "invalid int"),
    (["encode", "--tokenizer", "BROKEN", "x"], 1, "corrupt")])
def test_mistakes_get_one_line_and_the_right_status(capsys, tmp_path, monkeypatch, bpe, arguments, status, message):
    """2 where the command line alone is wrong, 1 for files and numbers; never a traceback."""
    monkeypatch.chdir(tmp_path)
    bpe.save(tmp_path / "TOKENIZER")
    (tmp_path / "BROKEN").write_text("{", encoding="utf-8")
    (tmp_path / "MODEL.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    got, text, errors = cli(capsys, *arguments)
    assert (got, text, errors.count("\n")) == (status, "", 1) and message in errors and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BROKEN", "MODEL.safetensors", "TOKENIZER"]


def test_lone_surrogates_on_the_command_line_are_reported(capsys, tmp_path, bpe):
    """Bytes that are not UTF-8 arrive in arguments as surrogates."""
    bpe.save(tmp_path / "tokenizer.json")
    status, ids, errors = cli(capsys, "encode", "--tokenizer", tmp_path, "a\udcff\udcfe")
    assert status == 0 and errors.startswith("warning: ") and errors.count("\n") == 1
    assert bpe.decode(map(int, ids.split())) == "a\ufffd\ufffd"


def test_text_comes_on_standard_input_and_an_absent_one_is_named(tmp_path, bpe):
    """A pipe, an empty text, and stdin closed: never a traceback."""
    bpe.save(tmp_path / "tokenizer.json")
    command = [sys.executable, tok.__file__, "encode", "--tokenizer", str(tmp_path)]

    def run(text, *words, **options):
        return subprocess.run([*command, *words], input=text, capture_output=True, timeout=60, **options)

    assert run("é 12\n".encode()).stdout.decode().split() == [str(i) for i in bpe.encode("é 12\n")]
    assert run(b"ignored", "").stdout == b"\n"
    done = run(None, preexec_fn=lambda: os.close(0)) if os.name == "posix" else None
    assert done is None or (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"no text" in done.stderr


def test_importing_needs_no_package():
    """Neither torch nor tiktoken nor requests: the command line starts at once."""
    code = "import sys, tokenizer; print({'torch', 'tiktoken', 'requests'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(tok.__file__).parent, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == "set()\n"


def test_debug_shows_the_traceback(capsys):
    """Of an error that is else one line."""
    with pytest.raises(FileNotFoundError):
        main(["encode", "x", "--tokenizer", "nowhere", "--debug"])


# ---------------------------------------------------------------------------------------------------------------------
# Side by side with Hugging Face


@pytest.mark.peer
@pytest.mark.parametrize("split_digits", [False, True])
def test_merges_equal_those_of_hugging_face(split_digits):
    """BpeTrainer with a ByteLevel alphabet on the same text; with split_digits, on the text cut by our own rule."""
    tokenizers = pytest.importorskip("tokenizers")
    text = Path(tok.__file__).read_text(encoding="utf-8") + PROSE.replace("x²+½", "")  # they merge inside a numeral
    ours = BPETokenizer.train([text, text], 1500, split_digits=split_digits)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers
    if split_digits:  # every digit apart, by their own means: runs of blanks before a digit are cut as GPT-2 cuts them
        pattern = tokenizers.Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        whole = level.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = level.Sequence([level.Split(pattern, "isolated"), whole])
    else:
        theirs.pre_tokenizer = level.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text, text], tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=level.ByteLevel.alphabet(), special_tokens=[EOT], show_progress=False))
    merges = json.loads(theirs.to_str())["model"]["merges"]
    assert len(merges) == 1243 and [line.split(" ") for line in ours.merges] == merges


@pytest.mark.peer
def test_hugging_face_loads_an_export_and_gives_the_same_ids(tmp_path, bpe):
    """GPT2Tokenizer of transformers on vocab.json and merges.txt; what it saves again is read, with a [PAD] too."""
    transformers = pytest.importorskip("transformers")
    export_tokenizer(bpe, tmp_path, 64)
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    theirs.save_pretrained(str(tmp_path / "again"))
    assert load_tokenizer(tmp_path / "again").merges == bpe.merges
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(str(tmp_path / "padded"))
    assert load_tokenizer(tmp_path / "padded").specials == {EOT: 349, "[PAD]": 350}
    for text in [PROSE, *HARD]:
        if EOT not in text:
            assert theirs.encode(text) == bpe.encode(text), repr(text)
    assert theirs.convert_tokens_to_ids(EOT) == bpe.eot_id
