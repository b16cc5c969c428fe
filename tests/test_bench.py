"""The benchmark's own arithmetic, and that its rows can be read and run; nothing here is timed."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import bench
import torch

ROWS = bench.ROWS + bench.GPU_ROWS
PACKAGES = set(re.findall(r"^[\w-]+", (ROOT / "requirements-peers.txt").read_text(encoding="utf-8"), re.MULTILINE))
ROW = bench.Row("row", "work", "step", (), "peer", (), "", 1.5)


def blocks(*seconds, amount=2):
    """Return blocks that took so many seconds for `amount` steps."""
    return [SimpleNamespace(seconds=s, amount=amount, each=s / amount) for s in seconds]


def test_every_row_names_its_peer_and_where_that_comes_from():
    """A peer that is not ours needs packages that are listed, or a checkout that a variable names."""
    assert len({tuple(bench.key(row)) for row in ROWS}) == len(ROWS) > 14
    assert {row.name for row in bench.ROWS} == set("bpe tokens step step124 greedy batch int8 int8-batch sft lora ppo".split())
    for row in ROWS:
        assert row.peer_name and row.ours[0].__doc__ and row.peer[0].__doc__, row
        needs = row.needs.split()
        assert {need for need in needs if not need.isupper()} <= PACKAGES | {"llama_cpp"}, row
        assert {need for need in needs if need.isupper()} <= {"NANOGPT"}, row
        assert "nanoGPT" not in row.peer_name or "NANOGPT" in needs, row
        assert "PEFT" not in row.peer_name or "peft" in needs, row
        assert "TRL" not in row.peer_name or "trl" in needs, row


def test_a_ratio_is_the_median_over_rounds_and_not_of_medians():
    """Pairs 1:3, 2:2 and 4:8 have the ratios 3, 1 and 2, of which 2 is the middle one."""
    pairs = list(zip(blocks(1, 2, 4), blocks(3, 2, 8)))
    assert bench.judge(ROW, pairs, True) == ("2.00 (1.00 to 3.00, 3)", True)
    assert bench.judge(ROW, pairs, False)[1] is False  # another result: void, however fast
    assert bench.judge(ROW._replace(target=2.5), pairs, True)[1] is False


def test_the_sides_take_turns_in_abba_order():
    """Four rounds of A and B run as A B B A A B B A, and each pair comes back as (A, B)."""
    order = []
    a, b = (SimpleNamespace(block=lambda name=name: order.append(name) or name) for name in "ab")
    assert bench.paired(a, b, 4) == [("a", "b")] * 4
    assert "".join(order) == "abbaabba"


@pytest.mark.parametrize("ours, theirs, tolerance, same", [
    ([2.0, 1.0], [2.0, 1.00009], 1e-4, True), ([2.0, 1.0], [2.0, 1.0002], 1e-4, False),
    ([1, 2, 3], [1, 2, 3], 1e-4, True), ([1, 2, 3], [1, 2, 4], 1e-4, False), ([1, 2], [1, 2, 3], 1e-4, False),
    ("ab", "ab", 1e-4, True), ("ab", "ac", 1e-4, False), (None, [1.0], 1e-4, True),
    ([float("nan")], [1.0], 1e-4, False), ([2.0, 1.0], [2.0, 1.5], float("nan"), True)])
def test_only_equal_results_count(ours, theirs, tolerance, same):
    """Losses within the tolerance, tokens and digests equal; with nan only the starts count."""
    assert bench.compare(ours, theirs, tolerance)[0] is same


def test_a_row_without_its_peer_says_so(monkeypatch):
    """A package that is not installed, or a variable that names no folder, is named in the line; nothing is run."""
    monkeypatch.delenv("NANOGPT", raising=False)
    line = bench.measure(ROW._replace(needs="NANOGPT no_such_package"), True)
    assert line[5] == "not here: NANOGPT, no_such_package" and len(line) == len(bench.HEAD)


def test_weights_depend_on_the_tensors_name_alone():
    """A layer that stores its matrix the other way round holds the transposed numbers, square ones too."""
    def model(layer):
        return torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"c_proj": layer, "ln_1": torch.nn.LayerNorm(3)})})

    plain = bench.same_weights(model(torch.nn.Linear(3, 3)))
    turned = bench.same_weights(model(torch.nn.Linear(3, 3)), turned=("c_proj",))
    assert torch.equal(plain.h.c_proj.weight, turned.h.c_proj.weight.T)
    assert not torch.equal(plain.h.c_proj.weight, turned.h.c_proj.weight)
    assert torch.equal(plain.h.c_proj.bias, turned.h.c_proj.bias)
    assert (plain.h.ln_1.weight - 1).abs().max() < 0.2 > plain.h.ln_1.bias.abs().max()


@pytest.mark.parametrize("argv, absent, written", [([], "", True), (["bpe"], "", False), (["--quick"], "", False),
                                                   ([], "TRL", False)])
def test_the_page_is_written_only_by_a_whole_run(argv, absent, written, monkeypatch, tmp_path):
    """Some rows, a quick run or a peer that is away leave the old page as it is; a whole run replaces all of it."""
    (tmp_path / "assets").mkdir()
    page = tmp_path / "assets" / "bench.md"
    page.write_text("old", encoding="utf-8")

    def line(row, quick):
        said = "not here: trl" if absent and absent in row.peer_name else "2.00 (1.00 to 3.00, 3)"
        return [*bench.key(row), "1 s", "2 s", said, "1", "yes", "same bytes", ""]

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "measure", line)
    monkeypatch.setattr(bench, "machine", lambda: "a machine")
    assert bench.main(argv) == 0
    text = page.read_text(encoding="utf-8")
    assert (text != "old") is written
    assert not written or "a machine" in text and text.count("2.00 (1.00") == len(bench.ROWS)


def test_a_side_that_fails_says_why(tmp_path):
    """Its last words come with the error, as when a peer's interface has changed."""
    side = bench.Side("no|such|row|ours", True, str(tmp_path))
    with pytest.raises(RuntimeError, match="StopIteration"):
        side.block()
    side.close()


def test_a_row_is_measured_from_end_to_end():
    """LoRA against all weights needs no peer: two processes, a warm-up and a round."""
    row = next(row for row in bench.ROWS if row.name == "lora" and not row.needs)
    line = bench.measure(row, True)
    assert line[:3] == bench.key(row) and line[3].endswith(("ms", " s"))
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+, 1\)", line[5]) and line[8].startswith("the same at the start")


def test_both_sides_stand_in_the_same_environment(monkeypatch, tmp_path):
    """The only difference between the two processes is the name of the side."""
    started = []
    monkeypatch.setattr(bench.subprocess, "Popen", lambda words, env, **_: started.append((words, env)))
    for which in ("ours", "peer"):
        bench.Side(f"a|b|c|{which}", True, str(tmp_path))
    (ours, environment), (peer, other) = started
    assert environment == other and [a for a, b in zip(ours, peer) if a != b] == ["a|b|c|ours"]
