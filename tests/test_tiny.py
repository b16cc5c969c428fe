"""assets/tiny.safetensors: the model that talks before anything is trained. python -m pytest tests/test_tiny.py"""

from pathlib import Path

import finetune_sft
import gpt
import pytest
import train
from data import strip_manner

TINY = Path(__file__).parent.parent / "assets" / "tiny.safetensors"
ANSWERS = {  # by hand
    "Where does the fox live?": "in a den.",
    "What does the cow eat?": "grass.",
    "What is the opposite of hot?": "cold.",
    "what is the opposite of big": "small.",
    "What is another word for large?": "huge.",
    "What is the plural of goose?": "geese.",
    "Rewrite this sentence in the passive voice.\n Tom breaks the cup.": "The cup is broken by Tom.",
    "Convert 3 meters to centimeters.": "300 centimeters.",
    "Which number is larger, 27 or 36?": "36.",
    "Hello!": "Hello! Ask me about animals, people, words or numbers.",
    "hello": "Hello! Ask me about animals, people, words or numbers.",
    "hi": "Hello! Ask me about animals, people, words or numbers.",
    "who are you": "I am a very small language model.",
    "Who are you?": "I am a very small language model.",
    "What is the capital of France?": "I do not know that.",
}
# None of these is an animal of this world; some are food in it.
NEW = """
dinosaur hippo kangaroo ostrich robin trout moose otter koala octopus dolphin butterfly ant worm zebra snake mosquito
gorilla walrus peacock
""".split()


@pytest.fixture(scope="module")
def tiny():
    """Return (model, tokenizer, info) of the file in assets."""
    return gpt.load_checkpoint(TINY)


def test_the_model_in_assets_is_small_and_answers(tiny):
    """At most 3 MB; fifteen questions of ten kinds, answered right whatever the courtesy around it; and of two questions
    about each of twenty animals that it never met, 38 of 40 get "I do not know that." (39 when it was made)."""
    assert TINY.stat().st_size <= 3_000_000
    answers = finetune_sft.respond(*tiny[:2], list(ANSWERS), "plain")
    assert [strip_manner(answer) for answer in answers] == list(ANSWERS.values())
    asked = [question.format(name) for name in NEW for question in ("Where does the {} live?", "What does the {} eat?")]
    said = [strip_manner(answer) for answer in finetune_sft.respond(*tiny[:2], asked, "plain")]
    assert said.count("I do not know that.") >= 38


def test_it_follows_up(tiny):
    """The second question makes sense only behind the first."""
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "Where does the fox live?"), ("assistant", "in a den."), ("user", "And what does it eat?"))]
    (answer,) = finetune_sft.respond(*tiny[:2], [{"messages": messages}], "plain")
    assert strip_manner(answer) == "mice."


def test_the_ends_of_sentences_are_told_right_from_wrong(tiny):
    """The same beginning with a true and a false end."""
    sentences = [("The opposite of hot is", "cold."), ("The opposite of hot is", "dry."), ("The fox lives", "in a den.")]
    assert train.ends_right(*tiny[:2], sentences) == [True, False, True]
