"""The report: one page that loads nothing, hides nothing, and shows what the stages wrote as they wrote it."""

import html
import json
from html.parser import HTMLParser

import pytest

import gpt
import torch
import train
from tokenizer import BPETokenizer

HOSTILE = '<script>alert(1)</script> <img src=http://evil> & "quoted"'


class Page(HTMLParser):
    """What a browser would make of a page: text, tags with their attributes, and whether the tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text += data


def write(path, value):
    """Write a value as JSON, a list of rows as JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value), encoding="utf-8")


def summary(stage, **figures):
    """Return a summary.json's value in the form in which Run.finish writes it."""
    return {"stage": stage, "seconds": 60.0, "steps": 3, "command": f"python {stage}.py --resume", "seed": 1234,
            "versions": {"torch": torch.__version__}, "data": {"source": "tinyworld", "sha256": "ab" * 32},
            "config": {"batch_size": 16, "data": "tinyworld"}, **figures}


def policy(gold):
    """Return the figures of a policy stage."""
    return dict(gold_before=0.25, gold_after=gold, reward_before=-0.5, reward_after=1.5, exact_match_before=0.3,
                exact_match_after=0.4, kl=2.5, gold_std_before=0.5, test_prompts=20)


@pytest.fixture
def out(tmp_path):
    """Return a folder with small runs of every stage but DPO and GRPO, all written as the stages write them."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["Tom has a red ball and Mia has a blue one."], 270)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer" / "tokenizer.json")
    model = gpt.GPTModel(gpt.GPTConfig(tokenizer.vocab_size, 32, 16, 2, 1))
    for stage in ("pretrain", "ppo"):
        gpt.save_checkpoint(tmp_path / stage / "model.safetensors", model, tokenizer, template="plain")
    write(tmp_path / "pretrain" / "metrics.jsonl", [
        {"step": 0, "val_loss": 6.9, "sample": "first words"}, {"step": 1, "loss": 5.0},
        {"step": 2, "val_loss": 4.0, "sample": "middle words"}, {"step": 3, "val_loss": 1.2768, "sample": HOSTILE}])
    write(tmp_path / "pretrain" / "summary.json", summary("pretrain", val_loss=1.2768, bits_per_byte=0.63))
    write(tmp_path / "cls" / "summary.json", summary(
        "classification", test_accuracy=0.98, test_accuracy_interval=[0.97, 0.99], test_f1=0.975,
        naive_bayes_accuracy=0.914, majority_accuracy=0.666, labels=["ham", HOSTILE],
        test_confusion=[[601, 7], [13, 379]]))
    write(tmp_path / "sft" / "summary.json", summary(
        "sft", exact_match=0.9, exact_match_interval=[0.88, 0.92], exact_match_before=0.01,
        nearest_example_exact_match=0.2, exact_match_unseen_words=0.155,
        exact_match_by_kind={"plural": 0.65, HOSTILE: 0.1}))
    for name, word in (("responses.before.json", "untuned"), ("responses.json", "tuned")):
        rows = [{"instruction": f"Plural of {noun}?", "input": HOSTILE if kind == "add" else "", "kind": kind,
                 "reference": f"{noun}s.", "response": f"{word} {noun}"}
                for noun, kind in (("fox", "plural"), ("six", "add"))]
        write(tmp_path / "sft" / name, rows)
    run = {"trainable_parameters": 939522, "score": 0.97}
    write(tmp_path / "lora" / "summary.json", {"stage": "lora", "seconds": 9.5, "command": "python lora.py", "runs": {
        "full": run, "rank8": {"trainable_parameters": 65794, "score": 0.96}}})
    write(tmp_path / "reward" / "summary.json", summary(
        "reward", accuracy=0.85, accuracy_interval=[0.83, 0.87], length_baseline_accuracy=0.6,
        naive_bayes_accuracy=0.77, accuracy_noise_free=None))
    write(tmp_path / "ppo" / "summary.json", summary("ppo", **policy(gold=0.75)))
    write(tmp_path / "ppo" / "evaluation.json", {"prompts": 20, "rows": {
        "start": {"gold": [0.25, 0.1]}, "ppo": {"gold": [0.75, 0.125], "wins": [0.6, 0.1]}},
        "samples": [{"prompt": "Add 8 and 8.", "start": "19.", "best of 4": HOSTILE, "ppo": "16."}]})
    for stage, name in (("pretrain", "curves"), ("cls", "curves"), ("cls", "accuracy"), ("sft", "curves"),
                        ("lora/full", "curves"), ("lora/rank8", "curves"), ("reward", "curves"), ("ppo", "curves")):
        train.draw_curves(tmp_path / stage / f"{name}.svg", f"{stage} {name}", {"train": [(0, 3.0), (3, 1.0)]})
    return tmp_path


def report(folder, status=0):
    """Run the command and return the page's source."""
    assert train.main(["report", "--out_dir", str(folder), "--device", "cpu"]) == status
    return (folder / "report.html").read_bytes().decode() if status == 0 else None


def cells(source, label):
    """Return the cells of all table columns of one name, as the page's source has them."""
    return [part.split("</td>")[0] for part in source.split(f'<td data-of="{label}">')[1:]]


def test_a_smaller_evaluation_does_not_mix_with_the_runs_own_figures(out):
    """A value and its interval are of the same prompts: the later evaluation's where it had as many, else the run's."""
    rows = {"start": {"gold": [0.2, 0.3]}, "ppo": {"gold": [0.5, 0.25]}}
    for prompts, value, interval in ((20, "0.50", "0.25 to 0.75"), (5, "0.75", "")):
        write(out / "ppo" / "evaluation.json", {"prompts": prompts, "rows": rows})
        found = {(row[0], row[1]): row for row in train.results(train.finished_stages(out))}["PPO", "gold score"]
        assert found[2:4] == (value, interval), prompts


def test_the_page_is_well_formed_and_loads_nothing(out):
    """Every tag is closed in its turn; no script, no image, no link outwards; the policy in the page forbids both."""
    source = report(out)
    page = Page(source)
    assert page.open == [] and page.wrong == []
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "image", "use", "base"} == set()
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes, tag
    style = source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert [tag for tag, _ in page.tags].count("style") == 1  # a picture's own would apply to the whole page
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page.tags)


def test_the_search_for_faults_finds_them():
    """The control of the test above: a page with these faults is not taken for well formed."""
    assert Page("<p><b>x</p></b>").wrong and Page("<div><p>x</p>").open == ["div"]
    assert ("img", {"src": "http://evil"}) in Page("<img src=http://evil>").tags


def test_hostile_text_stays_text(out):
    """A script in a sample, a label, a kind of question or a question is shown letter by letter, wherever it stands."""
    source = report(out)
    page = Page(source)
    assert page.text.count("<script>alert(1)</script>") >= 5  # sample, label, kind, input, answer of best of 4
    assert "<script" not in source and "<img" not in source
    assert HOSTILE in page.text


def test_every_stage_shows_what_it_wrote(out):
    """Headings, curves, samples before and after, the confusion matrix, tokens in colour, attention, options."""
    source = report(out)
    page = Page(source)
    headings = source.split("<h2>")[1:]
    assert [h.split("</h2>")[0] for h in headings][2:] == [
        "Tokenizer", "Pretraining", "Classification", "Instruction tuning", "LoRA", "Reward model", "PPO"]
    for picture in ("pretrain curves", "cls accuracy", "lora/rank8 curves", "ppo curves"):
        assert page.text.count(picture) == 2  # as its title for screen readers, and drawn
    assert cells(source, "at step 0") == ["first words"] and "middle words" not in page.text
    assert cells(source, "said ham") == ["601", "13"]
    pieces = [attributes for tag, attributes in page.tags if tag == "span"]
    encoded = BPETokenizer.load(out / "tokenizer" / "tokenizer.json").encode(train.SENTENCE)
    assert len(pieces) == len(encoded) and len({piece["style"] for piece in pieces}) > 1
    assert "head 1" in page.text and "head 2" not in page.text  # the model has two heads
    assert cells(source, "best of 4") == [html.escape(HOSTILE)]
    assert all(text in page.text for text in (torch.__version__, "python sft.py --resume", "batch_size", "ab" * 32))


def test_the_same_questions_go_to_every_model(out):
    """One question of a kind; each column holds that model's own answer, PPO's being generated here and now."""
    source = report(out)
    assert cells(source, "pretrained") == ["untuned fox", "untuned six"]
    assert cells(source, "SFT") == ["tuned fox", "tuned six"] and cells(source, "reference") == ["foxs.", "sixs."]
    model, tokenizer = gpt.load_for_cli(out / "ppo" / "model.safetensors")
    ids = torch.tensor([tokenizer.encode("Plural of fox?\n>")])
    ids = gpt.generate(model, ids, 64, temperature=0, eos_id=tokenizer.eot_id)[0, ids.shape[1] :].tolist()
    ids = ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
    assert cells(source, "PPO")[0] == html.escape(tokenizer.decode(ids).strip())


def test_figures_stand_beside_intervals_and_baselines(out, capsys):
    """Every stage has a row on the terminal and rows on the page; a figure that was not measured has none."""
    source = report(out)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 2  # a heading, seven stages, an empty line, the path
    assert lines[3].split() == ["Classification", "accuracy", "98.0%", "97.0%", "to", "99.0%", "naive", "Bayes", "91.4%,",
                                "most", "frequent", "class", "66.6%"]
    assert lines[2].endswith("untrained 6.900") and lines[5].endswith("all weights 97.0%")
    assert lines[7].split() == ["PPO", "gold", "score", "0.75", "0.62", "to", "0.88", "before", "0.25"]
    assert "without wrong labels" not in source and "None" not in source
    rows = list(zip(*(cells(source, name) for name in train.HEAD)))
    assert ("LoRA", "trainable parameters", "65,794", "", "all weights 939,522") in rows
    assert ("Reward model", "pairs put right", "85.0%", "83.0% to 87.0%", "by length 60.0%, naive Bayes 77.0%") in rows


def test_several_seeds_are_shown_by_mean_and_spread(out):
    """Where a stage ran with --seeds, its mean stands there with the standard deviation, and its parts' curves."""
    write(out / "cls" / "summary.json", summary("classification", test_accuracy=0.9, test_accuracy_mean=0.91,
                                                test_accuracy_std=0.02, seeds=[1, 2], naive_bayes_accuracy=0.8))
    assert ("91.0%", "sd 2.0% over seeds") in set(zip(*(cells(report(out), name) for name in train.HEAD[2:4])))


def test_missing_stages_are_named_with_what_makes_them(out, capsys):
    """Each stage that is absent or unfinished is named, on page and terminal, with its make target, and no other."""
    (out / "cls" / "summary.json").unlink()
    text, printed = Page(report(out)).text, capsys.readouterr().out
    for said in (text, printed):
        assert "Classification (make classify), DPO (make rlhf-all), GRPO (make rlhf-all)" in said
        assert "(make sft)" not in said and "(make pretrain)" not in said


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "cls", "sft", "lora", "reward", "ppo"])
def test_each_stage_alone_makes_a_page(out, stage, tmp_path_factory):
    """No part of the page needs another stage than its own."""
    alone = tmp_path_factory.mktemp("alone")
    (out / stage).rename(alone / stage)
    page = Page(report(alone))
    assert page.open == [] and page.wrong == []


def test_an_empty_folder_is_one_line_and_no_page(tmp_path, capsys):
    """Nothing to report on: exit status 1, one line that names `make`, no file written."""
    report(tmp_path, status=1)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "make" in error and str(tmp_path) in error
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_summary_is_named_and_the_old_page_stays(out, capsys):
    """Exit status 1, one line with the file and what to do; the page of before is untouched."""
    before = report(out)
    (out / "sft" / "summary.json").write_text('{"stage": "sft", ', encoding="utf-8")
    capsys.readouterr()
    report(out, status=1)
    error = capsys.readouterr().err
    assert "sft" in error and "summary.json is damaged" in error and error.count("\n") == 1
    assert (out / "report.html").read_bytes().decode() == before


def test_equal_runs_give_equal_pages(out):
    """The page has no date and nothing random in it."""
    assert report(out) == report(out)


def test_without_flags_the_folder_is_out(out, monkeypatch, capsys):
    """The bare command reports on out/, not on the folder of a pretraining run."""
    (out / "pretrain" / "model.safetensors").unlink()  # the picture of attention is left out
    (out.parent / "work").mkdir()
    out.rename(out.parent / "work" / "out")
    monkeypatch.chdir(out.parent / "work")
    assert train.main(["report"]) == 0
    assert (out.parent / "work" / "out" / "report.html").exists() and "report.html" in capsys.readouterr().out
