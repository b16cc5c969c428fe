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

ROWS = bench.ROWS + bench.LONG + bench.GPU_ROWS
PACKAGES = set(re.findall(r"^[\w-]+", (ROOT / "requirements-peers.txt").read_text(encoding="utf-8"), re.MULTILINE))
ROW = bench.Row("row", "work", "step", (), "peer", (), "", 1.5)


def blocks(*seconds, amount=2):
    """Return blocks that took so many seconds for `amount` steps."""
    return [SimpleNamespace(seconds=s, amount=amount, each=s / amount) for s in seconds]


def test_every_row_names_its_peer_and_where_that_comes_from():
    """A peer that is no limit of the machine and not ours needs packages that are listed, or a named checkout."""
    assert len({(row.name, row.work, row.peer_name) for row in ROWS}) == len(ROWS) > 20
    for row in ROWS:
        assert row.peer_name and row.ours[0].__doc__ and row.peer[0].__doc__, row
        needs = row.needs.split()
        assert {need for need in needs if not need.isupper()} <= PACKAGES, row
        assert {need for need in needs if need.isupper()} <= {"NANOGPT", "MINBPE", "DATA_DIR"}, row
        assert "nanoGPT" not in row.peer_name or "NANOGPT" in needs, row


def test_a_ratio_is_the_median_over_rounds_and_not_of_medians():
    """Pairs 1:3, 2:2 and 4:8 have the ratios 3, 1 and 2, of which 2 is the middle one."""
    pairs = list(zip(blocks(1, 2, 4), blocks(3, 2, 8)))
    assert bench.judge(ROW, pairs, True) == ("2.00 (1.00 to 3.00, 3)", True)
    assert bench.judge(ROW, pairs, False)[1] is False  # another result: void, however fast
    assert bench.judge(ROW._replace(asked=2.5), pairs, True)[1] is False


def test_a_ratio_is_of_equal_work():
    """Four steps in 8 seconds are as fast as two in 4."""
    assert bench.judge(ROW, [(blocks(4)[0], blocks(8, amount=4)[0])], True)[0].startswith("1.00")


def test_a_difference_in_seconds_is_judged_by_its_size():
    """Asked "0.3 s": 0.2 s more is well, 0.4 s is not."""
    row = ROW._replace(asked="0.3 s")
    ours, theirs = blocks(1.2, 1.4, amount=1), blocks(1, 1, amount=1)
    assert bench.judge(row, [(ours[0], theirs[0])], True) == ("+0.20 s", True)
    assert bench.judge(row, [(ours[1], theirs[1])], True) == ("+0.40 s", False)


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
    ([1.90], [1.80], 1.915, True), ([1.92], [1.80], 1.915, False), ([1.92], [1.93], 1.915, True),
    ([float("nan")], [1.0], 1e-4, False), ([2.0, 1.0], [2.0, 1.5], float("nan"), True)])
def test_only_equal_results_count(ours, theirs, tolerance, same):
    """Losses within the tolerance, tokens and digests equal; a target bounds ours; with nan only starts count."""
    assert bench.compare(ours, theirs, tolerance)[0] is same


def test_a_row_without_its_peer_says_so(monkeypatch):
    """A package that is not installed, or a variable that names no folder, is named in the line; nothing is run."""
    monkeypatch.delenv("NANOGPT", raising=False)
    line = bench.measure(ROW._replace(needs="NANOGPT no_such_package"), True)
    assert line[5] == "not here: NANOGPT, no_such_package" and len(line) == len(bench.HEAD) - 1


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


def test_the_page_keeps_the_rows_that_are_not_run_again(tmp_path):
    """A new line takes the place of the one for the same comparison; a run that no line is left of disappears."""
    path, (first, second) = tmp_path / "bench.md", bench.ROWS[:2]

    def line(row, ratio, when):
        return [row.name, row.work, row.peer_name, "", "", ratio, "1", "yes", "same", "", when]

    bench.write_page(path, "monday: a", [line(first, "1.00", "monday"), line(second, "2.00", "monday")], [])
    bench.write_page(path, "friday: b", [line(first, "3.00", "friday")], [["batch", *["-"] * 6, "friday"]])
    text = path.read_text(encoding="utf-8")
    assert "1.00" not in text and text.index("3.00") < text.index("2.00") < text.index("| batch")
    assert "- monday: a" in text and "- friday: b" in text
    bench.write_page(path, "sunday: c", [line(first, "4.00", "sunday"), line(second, "5.00", "sunday")], [])
    text = path.read_text(encoding="utf-8")
    assert "monday" not in text and "friday" in text and text.count("| batch") == 1
    bench.write_page(path, "later: d", [line(first, "not here: NANOGPT", "later")], [])
    assert path.read_text(encoding="utf-8") == text  # a peer that is away undoes no measurement


def test_without_a_gpu_the_gpu_rows_say_so(monkeypatch, capsys):
    """And that is no error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not bench.main(["--gpu"])
    assert "no GPU" in capsys.readouterr().out


def test_a_side_that_fails_says_why(tmp_path):
    """Its last words come with the error, as when a peer's interface has changed."""
    side = bench.Side("no|such|row|1", False, True, str(tmp_path))
    with pytest.raises(RuntimeError, match="StopIteration"):
        side.block()
    side.close()


def test_a_row_is_measured_from_end_to_end():
    """The step row's limit needs no peer: two processes, a warm-up and a round."""
    row = next(row for row in bench.ROWS if row.name == "step124" and not row.needs)
    line = bench.measure(row, True)
    assert line[:3] == list(row[:2]) + [row.peer_name] and line[3].endswith(("ms", " s"))
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+, 1\)", line[5])
