"""The report: a table on the terminal, and one page that loads nothing and shows what the stages wrote as it is."""

import json
import types
from html.parser import HTMLParser

import finetune_sft
import pytest
import train

HOSTILE = '<script>alert(1)</script> <img src=http://evil> & "quoted"'


class Page(HTMLParser):
    """What a browser would make of a page: text, tags with their attributes, and the tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "html"):  # neither needs an end
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data


def write(path, value):
    """Write a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def out(tmp_path):
    """Return a folder with what small runs of every stage but DPO and GRPO leave."""
    figures = {
        "pretrain": dict(val_loss=1.2768, bits_per_byte=0.63),
        "cls": dict(test_accuracy=0.98, test_accuracy_interval=[0.97, 0.99], naive_bayes_accuracy=0.914),
        "sft": dict(exact_match=0.9, exact_match_interval=[0.88, 0.92], exact_match_before=0.01),
        "lora": dict(test_accuracy=0.96, naive_bayes_accuracy=0.914),
        "reward": dict(accuracy=0.85, accuracy_interval=[0.83, 0.87], naive_bayes_accuracy=None),
        "ppo": dict(gold_before=0.25, gold_after=0.75, exact_match_before=0.3, exact_match_after=0.4, kl=2.5)}
    for number, (stage, values) in enumerate(figures.items()):
        write(tmp_path / stage / "summary.json", {"stage": stage, "seconds": 60.4 + number, **values})
        rows = [{"step": 0, "loss": 3.0}, {"step": 3, "loss": 1.0}]
        train.draw_curves(tmp_path / stage / "curves.svg", f"{stage} curves", rows, {"train": "loss"})
    return tmp_path


@pytest.fixture
def answers(monkeypatch):
    """Every model answers with the name of its folder and a script."""
    monkeypatch.setattr(train.gpt, "load_checkpoint", lambda path: (path.parent.name, types.SimpleNamespace(eot_id=0), {}))
    monkeypatch.setattr(finetune_sft, "respond", lambda model, *rest, **more: [f"{model} says {HOSTILE}"] * 5)


def report(folder, status=0):
    """Run the command and return the page's source."""
    assert train.main(["report", "--out_dir", str(folder)]) == status
    return (folder / "report.html").read_bytes().decode() if status == 0 else None


def test_the_page_is_well_formed_and_loads_nothing(out):
    """Every tag is closed in its turn; no script, no image, no link outwards."""
    source = report(out)
    page = Page(source)
    assert page.open == page.wrong == [] and source.startswith("<!DOCTYPE html>")
    assert not {tag for tag, _ in page.tags} & set("script img link iframe object image use base".split())
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "href" not in attributes and "src" not in attributes, tag
    for style in source.split("<style>")[1:]:
        style = style.split("</style>")[0]
        assert "url(" not in style and "@import" not in style and "http" not in style


def test_the_search_for_faults_finds_them():
    """The control of the test above: a page with these faults is not taken for well formed."""
    assert Page("<p><b>x</p></b>").wrong and Page("<div><p>x</p>").open == ["div"]
    assert ("img", {"src": "http://evil"}) in Page("<img src=http://evil>").tags


def test_every_model_answers_the_same_five_questions(out, answers, capsys):
    """Pretrained, tuned and PPO model, on the terminal and on the page; a script in an answer is shown letter by letter."""
    for stage in ("pretrain", "sft", "ppo"):
        (out / stage / "model.safetensors").touch()
    source, printed = report(out), capsys.readouterr().out
    assert Page(source).text.count(HOSTILE) == printed.count(HOSTILE) == 15 and "<script" not in source
    for stage in ("pretrain", "sft", "ppo"):
        assert Page(source).text.count(f"{stage} says") == printed.count(f"  {stage:<10}{stage} says") == 5
    assert all(" ".join(question.split()) in printed for question in train.QUESTIONS) and "pretrain  pretrain\n" not in printed


def test_a_model_that_cannot_end_an_answer_has_no_column(out, monkeypatch, capsys):
    """As one of `train.py --tokenizer char`: its figures are there, its answers are not."""
    monkeypatch.setattr(train.gpt, "load_checkpoint", lambda path: (None, types.SimpleNamespace(eot_id=None), {}))
    assert "The same questions" in report(out) and "says" not in capsys.readouterr().out


def test_figures_stand_beside_intervals_and_baselines(out, capsys):
    """Every figure has a row on the terminal and on the page; one that was not measured has none."""
    source = report(out)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 1 + 1 + 1 + 1 + 3 + 2  # a heading, six stages, an empty line, the path
    assert lines[3].split() == ["cls", "accuracy", "98.0%", "97.0%", "to", "99.0%", "naive", "Bayes", "91.4%", "61"]
    assert lines[7].split() == ["ppo", "gold", "score", "0.75", "before", "0.25", "65"]
    assert any("KL" in line and "2.50" in line for line in lines)
    assert "None" not in source and "None" not in "".join(lines) and "make chat" in lines[-1]
    for row in ("<td>cls</td><td>accuracy</td><td>98.0%</td><td>97.0% to 99.0%</td>", "<td>before 1.0%</td>"):
        assert row in source
    assert all(Page(source).text.count(f"{stage} curves") == 1 for stage in ("pretrain", "cls", "ppo"))


def test_one_stage_alone_makes_a_page_and_a_summary_that_was_cut_is_left_out(out, capsys):
    """No part of the page needs another stage than its own, nor a picture."""
    for stage in ("pretrain", "cls", "sft", "lora", "reward"):
        (out / stage / "summary.json").write_text('{"stage": "sft", ', encoding="utf-8")
    for path in out.glob("*/curves.svg"):
        path.unlink()
    assert Page(report(out)).wrong == []
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-2]} == {"ppo"}


def test_an_empty_folder_is_one_line_and_no_page(tmp_path, capsys):
    """Nothing to report on: exit status 1, one line that names `make`, no file written."""
    report(tmp_path, status=1)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "make" in error and str(tmp_path) in error
    assert list(tmp_path.iterdir()) == []


def test_without_flags_the_folder_is_out(out, monkeypatch, capsys):
    """The bare command reports on out/, not on the folder of a pretraining run."""
    (out.parent / "work").mkdir()
    out.rename(out.parent / "work" / "out")
    monkeypatch.chdir(out.parent / "work")
    assert train.main(["report"]) == 0
    assert (out.parent / "work" / "out" / "report.html").exists() and "report.html" in capsys.readouterr().out
