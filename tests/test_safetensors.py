"""The safetensors reader against files that break a rule of the format, and against files that only look odd."""

import json
import math
import os
import random
import sys
import time

import pytest
import torch

import gpt

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_bytes(header, data=bytes(8), length=None):
    """Return a file of `header` (a dict, or JSON as text or bytes) and `data`, claiming `length` bytes of header."""
    text = json.dumps(header) if isinstance(header, (dict, list)) or header is None else header
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes):
    """Return a file with one tensor "w" whose entry is changed; a value of None removes the field."""
    return file_bytes({"w": {key: value for key, value in {**F32, **changes}.items() if value is not None}})


def two(first, second, data=bytes(16)):
    """Return a file with tensors "a" and "b" at these data offsets."""
    return file_bytes({"a": {**F32, "data_offsets": first}, "b": {**F32, "data_offsets": second}}, data)


# What is wrong -> (file, a part of the message that names the rule or the tensor).
MALFORMED = {
    "empty": (b"", "has 0 bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "has 7 bytes"),
    "header of 0 bytes": (file_bytes("", length=0), "header would have 0"),
    "header of 1 byte": (file_bytes("{", length=1), "header would have 1"),
    "header longer than the file": (file_bytes({"w": F32}, length=10_000), "header would have 10000"),
    "header of 2^63 bytes": (file_bytes({"w": F32}, length=2**63), "header would have 9223372036854775808"),
    "header of 2^64 - 1 bytes": (file_bytes({"w": F32}, length=2**64 - 1), "header would have"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "malformed header.*codec"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "leading space": (file_bytes(" {}"), "does not start with '{'"),
    "not JSON": (file_bytes("{w: 1}"), "malformed header: Expecting"),
    "JSON list": (file_bytes([]), "does not start with '{'"),
    "JSON null": (file_bytes(None), "does not start with '{'"),
    "text behind the JSON": (file_bytes("{} x"), "malformed header: Extra data"),
    "NaN in the JSON": (file_bytes('{"w": NaN}'), "wrong type"),
    "infinite number": (file_bytes('{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'), "'w'.*whole"),
    "number of 5,000 digits": (
        file_bytes('{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % ("9" * 5000)), "malformed header"),
    "nested 100,000 deep": (file_bytes('{"w":' + "[" * 100_000), "wrong type|malformed header"),
    "one byte missing": (entry()[:-1], "'w': F32 .2. does not fit 8 of 7 bytes"),
    "one byte too many": (entry() + b"x", "describes 8 bytes of data, the file holds 9"),
    "no tensor, but data": (file_bytes({}), "describes 0 bytes of data, the file holds 8"),
    "hole at the start": (two([4, 12], [12, 20], bytes(20)), "'a'.*must begin at 0"),
    "hole in between": (two([0, 8], [12, 20], bytes(20)), "'b'.*must begin at 8"),
    "overlap": (two([0, 8], [4, 12], bytes(12)), "'b'.*must begin at 8"),
    "same span twice": (two([0, 8], [0, 8], bytes(8)), "'b'.*must begin at 8"),
    "end before begin": (entry(data_offsets=[0, -8]), "'w'.*at least 0"),
    "end before begin, both positive": (two([0, 8], [8, 4], bytes(8)), "'b'.*does not fit -4 of 8 bytes"),
    "negative begin": (entry(data_offsets=[-8, 8]), "'w'.*at least 0"),
    "fractional offsets": (entry(data_offsets=[0.0, 8.0]), "'w'.*whole"),
    "true as an offset": (entry(data_offsets=[False, 8]), "'w'.*whole"),
    "offsets as text": (entry(data_offsets=["0", "8"]), "'w'.*whole"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "too many values"),
    "no offset": (entry(data_offsets=[]), "not enough values"),
    "shape larger than the data": (entry(shape=[3]), "'w'.*does not fit 8 of 8 bytes"),
    "shape smaller than the data": (entry(shape=[1]), "'w'.*does not fit 8 of 8 bytes"),
    "type wider than the data": (entry(dtype="F64"), "'w'.*does not fit 8 of 8 bytes"),
    "unknown type": (entry(dtype="F31"), "'w'.*unknown dtype 'F31'"),
    "type in lower case": (entry(dtype="f32"), "'w'.*unknown dtype"),
    "type that is a list": (entry(dtype=["F32"]), "wrong type"),
    "shape whose product wraps at 64 bits": (entry(shape=[2**32, 2**32, 2]), "'w'.*does not fit 8 of 8 bytes"),
    "shape above 64 bits": (entry(shape=[2**64 + 2]), "'w'.*whole"),
    "negative dimensions": (entry(shape=[-1, -2]), "'w'.*at least 0"),
    "true as a dimension": (entry(shape=[True, 2]), "'w'.*whole"),
    "shape that is a number": (entry(shape=2), "wrong type"),
    "200,000 dimensions": (entry(shape=[2**62] * 200_000), "'w'.*shape and data_offsets must be"),
    "missing type": (entry(dtype=None), "'w' has unknown or missing fields"),
    "missing shape": (entry(shape=None), "'w' has unknown or missing fields"),
    "missing offsets": (entry(data_offsets=None), "a field is missing"),
    "unknown field": (entry(device="cpu"), "'w' has unknown or missing fields"),
    "entry that is a list": (file_bytes({"w": [1, 2]}), "wrong type"),
    "same name twice": (file_bytes('{"w": %s, "w": %s}' % (json.dumps(F32), json.dumps(F32))), "twice"),
    "same field twice": (file_bytes('{"w": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
                         "twice"),
    "number in the metadata": (file_bytes({"__metadata__": {"epoch": 3}, "w": F32}), "strings to strings"),
    "nested metadata": (file_bytes({"__metadata__": {"a": {"b": "c"}}, "w": F32}), "strings to strings"),
    "metadata that is null": (file_bytes({"__metadata__": None, "w": F32}), "wrong type"),
    "metadata that is a list": (file_bytes({"__metadata__": [], "w": F32}), "wrong type"),
    "shape that is text": (entry(shape="", data_offsets=[0, 4])[:-4], "wrong type"),
    "shape that is an object": (entry(shape={}, data_offsets=[0, 4])[:-4], "wrong type"),
    "BOOL of 7": (file_bytes({"w": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\1\0\1\0\7\0\0\0"),
                  "'w'.*neither 0 nor 1"),
    "web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "not a safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not a safetensors file"),
    "zip of torch.save": (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
}

# What is odd and yet allowed -> (file, {name: shape}).
SOUND = {
    "no tensors": (file_bytes({}, b""), {}),
    "header padded with spaces": (file_bytes(json.dumps({"w": F32}) + " " * 9), {"w": (2,)}),
    "no dimension": (file_bytes({"w": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}), {"w": ()}),
    "no element": (file_bytes({"w": {**F32, "shape": [0, 2**60], "data_offsets": [0, 0]}}, b""), {"w": (0, 2**60)}),
    "empty tensors side by side": (file_bytes({"a": {**F32, "shape": [0], "data_offsets": [8, 8]}, "w": F32,
                                               "b": {**F32, "shape": [0], "data_offsets": [8, 8]}}),
                                   {"a": (0,), "b": (0,), "w": (2,)}),
    "data out of order": (two([8, 16], [0, 8]), {"a": (2,), "b": (2,)}),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_with_the_rule_that_it_breaks(what, tmp_path):
    """Every rule of the format is checked, quickly, and the message names file and tensor."""
    content, message = MALFORMED[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        gpt.read_safetensors(path)
    assert time.monotonic() - started < 10
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 1000


def test_a_header_above_the_limit_is_refused_even_where_the_file_is_that_large(tmp_path):
    """The format allows 100 MB of header; a (sparse) file of 200 MB that claims more is not read."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 200_000_000)
    with pytest.raises(ValueError, match="header would have 100000001"):
        gpt.read_safetensors(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts otherwise elsewhere")
def test_no_malformed_file_makes_the_reader_claim_memory(tmp_path):
    """All of them together raise the peak of memory by less than 100 MB, though some claim exabytes."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (content, _) in enumerate(MALFORMED.values()):
        (tmp_path / str(number)).write_bytes(content)
        with pytest.raises(ValueError):
            gpt.read_safetensors(tmp_path / str(number))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("what", SOUND)
def test_an_odd_but_sound_file_is_read(what, tmp_path):
    """Being strict must not refuse what the format allows."""
    content, shapes = SOUND[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tensors, _ = gpt.read_safetensors(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes


def test_a_name_is_never_used_as_a_path(tmp_path):
    """Names with dots, NUL, nothing, or half a surrogate pair are only names."""
    names = ["../../escaped", "a\0b", "", "/etc/passwd", "\ud800"]
    header = {name: {**F32, "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.safetensors").write_bytes(file_bytes(header, bytes(8 * len(names))))
    tensors, _ = gpt.read_safetensors(tmp_path / "in" / "x.safetensors")
    assert sorted(tensors) == sorted(names)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.safetensors"]


@pytest.mark.parametrize("shift", range(4))
def test_data_that_is_not_aligned_is_read_without_a_copy(shift, tmp_path):
    """OpenAI's GPT-2 as published starts its data at an odd place; values and views must not suffer."""
    values = torch.arange(12, dtype=torch.float32).view(3, 4)
    text = json.dumps({"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}})
    text += " " * ((shift - len(text)) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(text, bytes(gpt.tensor_bytes(values))))
    found = gpt.read_safetensors(path)[0]["w"]
    assert found.data_ptr() % 4 == shift
    assert torch.equal(found, values) and torch.equal(found.t().contiguous(), values.t())
    found[0, 0] = 7  # private memory: the file does not change
    assert gpt.read_safetensors(path)[0]["w"][0, 0] == 0


@pytest.mark.parametrize("dtype", gpt.DTYPES)
def test_every_type_comes_back_bit_for_bit(dtype, tmp_path):
    """Random bits of each type, NaN and infinities among them, survive writing and reading."""
    width = gpt.DTYPES[dtype].itemsize
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (24 * width,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(0))
    gpt.write_safetensors(tmp_path / "x.safetensors", {"w": raw.view(gpt.DTYPES[dtype]).view(2, 3, 4)}, {"k": "v"})
    tensors, metadata = gpt.read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(tensors["w"].reshape(-1).view(torch.uint8), raw) and tensors["w"].shape == (2, 3, 4)
    assert metadata["k"] == "v"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_and_nothing_is_copied(value, tmp_path):
    """One such value anywhere, in a matrix lying on its side too, keeps the model as it was."""
    model = gpt.GPTModel(gpt.GPTConfig(11, 4, 8, 2, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    tensors["trf_blocks.0.ffn.fc1.weight"] = torch.zeros(8, 32).index_put((torch.tensor(3), torch.tensor(5)),
                                                                           torch.tensor(value)).t()
    with pytest.raises(ValueError, match="trf_blocks.0.ffn.fc1.weight.*not finite"):
        gpt.copy_weights(model, tensors, "somewhere")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_integers_are_no_weights():
    """A quantized file would load as numbers without meaning."""
    model = gpt.GPTModel(gpt.GPTConfig(11, 4, 8, 2, 1))
    tensors = {**model.state_dict(), "pos_emb.weight": torch.zeros(4, 8, dtype=torch.int8)}
    with pytest.raises(ValueError, match="pos_emb.weight.*int8"):
        gpt.copy_weights(model, tensors, "somewhere")


@pytest.mark.peer
def test_the_safetensors_package_and_we_read_each_other(tmp_path):
    """Both directions, all types that both know, bit for bit."""
    package = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    tensors = {dtype: torch.randint(0, 2, (3, 8), dtype=torch.uint8, generator=generator).to(kind)
               for dtype, kind in gpt.DTYPES.items()}
    gpt.write_safetensors(tmp_path / "ours", tensors)
    package.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    for found in (package.load_file(tmp_path / "ours"), gpt.read_safetensors(tmp_path / "theirs")[0]):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.peer
def test_we_refuse_whatever_the_safetensors_package_refuses(tmp_path):
    """Two thousand files with one to three bytes changed: being stricter is allowed, being laxer is not."""
    package = pytest.importorskip("safetensors.torch")
    sound, chance, path = two([0, 8], [8, 16]), random.Random(0), tmp_path / "x"
    ours, theirs = 0, 0
    for _ in range(2000):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content) - 16)] = chance.choice(b'0123456789-.,:[]{}"aeFI \0\xff')
        path.write_bytes(content)
        try:
            expected = package.load_file(path)
        except Exception:  # its error, or torch's
            expected, theirs = None, theirs + 1
        try:
            found = gpt.read_safetensors(path)[0]
        except ValueError:
            ours += 1
            continue
        assert expected is not None, bytes(content)
        assert {name: tensor.tolist() for name, tensor in found.items()} == \
               {name: tensor.tolist() for name, tensor in expected.items()}
    assert 0 < theirs <= ours < 2000
    for content, shapes in SOUND.values():
        path.write_bytes(content)
        assert {name: tuple(tensor.shape) for name, tensor in package.load_file(path).items()} == shapes
