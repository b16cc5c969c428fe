"""The built-in world: right answers, nothing of the tests in training, baselines that leave something to learn.

python -m pytest tests/test_tinyworld.py"""
import collections
import functools
import json
import math
import os
import re
import subprocess
import sys

import pytest

import data
from data import (TINYWORLD_KINDS, answer, beginnings, exact_match, gold_score, line_of, prompt_of, strip_manner,
                  tinyworld, true_facts, unseen)

WORD = re.compile(r"[a-z0-9']+")
NOTHING = "I do not know that."
KNOWN = {  # one question for each kind and each thing asked, answered by hand
    "Rewrite this sentence in the passive voice.\nThe cook ate the pies.": "The pies were eaten by the cook.",
    "Say this in the passive: Ann breaks the cup.": "The cup is broken by Ann.",
    "Turn the sentence round, into the passive.\nTom carried the sheep.": "The sheep was carried by Tom.",
    "What is another word for rabbit?": "bunny.",
    "Give me a synonym of ship.": "boat.",
    "What is the opposite of always?": "never.",
    "What is the plural of goose?": "geese.",
    "Give the plural of this noun.\nvobby": "vobbies.",
    "What do you call more than one klotch?": "klotches.",
    "What is the plural of monkey?": "monkeys.",
    "Convert 700 centimeters to meters.": "7 meters.",
    "How many cents are 12 dollars?": "1200 cents.",
    "Give this in decades.\n250 years": "25 decades.",
    "Pick the higher of 9 and 86.": "86.",
    "Which number is larger, 103 or 72?": "103.",
    "Give the smaller number.\n27 and 36": "27.",
    "Where does the fox live?": "in a den.",
    "What does the bee eat?": "nectar.",
    "What is a young sheep called?": "a lamb.",
    "Which color does the whale have?": "blue.",
    "What is Tom's job?": "a baker.",
    "In which town does Ann live?": "Corfe.",
    "Which pet does Rosa have?": "a pig.",
    "What does Sam want for lunch?": "cake.",
    "Hello!": "Hello! Ask me about animals, people, words or numbers.",
    "Who are you?": "I am a very small language model.",
    "Hi, what can you do?": "I know animals and people, and I can change words and compare numbers.",
    "How are you?": "I am fine, and I wait for a question.",
    "Thank you very much! I am Ida.": "You are welcome.",
    "Good night.": "Goodbye! Come back soon.",
    "Where does the unicorn live?": NOTHING,
    "What is Napoleon's job?": NOTHING,
    "What is the opposite of zorp?": NOTHING,
    "What is the capital of France?": NOTHING,
    "gaba moli": NOTHING,
}


@functools.lru_cache(None)
def corpus():
    """The first 4,000 documents, as one text."""
    return "\n".join(tinyworld("corpus", "train", 4_000))


@functools.lru_cache(None)
def questions(split, n):
    return tinyworld("instructions", split, n)


def bare(prompt):
    """The prompt's words and numbers, in any order, as one text."""
    return " ".join(sorted(WORD.findall(prompt.lower())))


@pytest.mark.parametrize("prompt", KNOWN)
def test_questions_have_the_answers_a_person_gives(prompt):
    """The rules agree with answers written down by hand."""
    assert answer(prompt) == KNOWN[prompt]


def test_the_known_answers_cover_every_kind_and_everything_asked():
    """No rule goes without an answer written by hand."""
    asked = [prompt_of(entry) for entry in questions("train", 3_000) if "messages" not in entry]
    assert {line_of(prompt)[:2] for prompt in KNOWN} == {line_of(prompt)[:2] for prompt in asked}


def test_there_are_eight_kinds_or_more_with_four_phrasings_or_more():
    """The instructions are as varied as they claim to be, in manners too."""
    entries = questions("train", 12_000)
    manners = collections.Counter(entry["manner"] for entry in entries)
    assert len(TINYWORLD_KINDS) >= 8 and set(manners) == {"bare", "courteous", "curt", "rambling"}
    assert set(TINYWORLD_KINDS) >= {"fact", "passive", "synonym", "convert", "compare", "greeting", "unknown", "follow"}
    assert all(len([task for task in data.TASK_LIST if task[0] == kind]) >= 4 for kind in TINYWORLD_KINDS[:-1])
    assert min(manners.values()) > 0.1 * len(entries)


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_kinds_that_are_named_are_asked(split):
    """Comparisons and passives alone: every answer is a number or says who did it."""
    answers = [entry["answer"] for entry in tinyworld("instructions", split, 42, kinds=("passive", "compare"))]
    numbers = [text for text in answers if re.fullmatch(r"\d+\.", text)]
    turned = [text for text in answers if re.fullmatch(r"The \w+ (is|are|was|were) \w+ by .*\.", text)]
    assert len(numbers) + len(turned) == 42
    asked = 42 * 4 / 6 if split == "train" else 42 / 2  # training asks for 4 comparisons where it asks for 2 passives
    assert abs(len(numbers) - asked) < 2  # a question that came up before is passed over


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_prompt_alone_gives_back_its_answer_and_a_response_its_bare_form(split):
    """Made from slots, read back from text: nothing is lost, whatever the manner."""
    for entry in questions(split, 1_000 if split == "test" else 300):
        assert "messages" in entry or answer(prompt_of(entry)) == entry["answer"]
        assert strip_manner(entry["output"]) == entry["answer"]
        assert (entry["output"] == entry["answer"]) == (entry["manner"] == "bare")


def test_strip_manner_leaves_everything_else_alone():
    """Only whole templates are undone: no half of one, no mixture, no bare answer."""
    answers = [entry["answer"] for entry in questions("test", 1_000)]
    for text in ("mice.", "", "Obviously, mice.", "mice. Have a lovely walk.", "Obviously:", "obviously: mice.",
                 "So: mice.", "mice. With pleasure", "mice. Next.", "klorb. Stop", *answers):
        assert strip_manner(text) == text
    assert strip_manner("Obviously: mice.") == strip_manner("mice. Have a nice day.") == "mice."
    assert strip_manner("Obviously: mice. Have a nice day.") != "mice."
    assert exact_match("mice. It was a pleasure.", "Stop asking. mice.") is False
    assert exact_match(" mice. It was a pleasure.\n", "mice. Stop asking.") and not exact_match("mouses.", "mice.")


def test_test_questions_never_come_up_in_training_in_any_order_of_their_words():
    """Under two seeds, no prompt of val or test is one of train, not even with its words or numbers turned about."""
    seen = {bare(prompt_of(entry)) for seed in (0, 7) for entry in tinyworld("instructions", "train", 8_000, seed=seed)}
    entries = [entry for split, n in (("val", 300), ("test", 1_000)) for entry in questions(split, n)]
    held = [prompt_of(entry) for entry in entries if "messages" not in entry]
    loose = ("passive", "convert", "unknown", "greeting", "follow")  # whose words in another order are another question
    ordered = [prompt_of(entry) for entry in entries if entry["kind"] not in loose]
    assert len(set(held)) == len(held) and not [prompt for prompt in ordered if bare(prompt) in seen]
    prompts = {prompt_of(entry) for entry in tinyworld("instructions", "train", 8_000)}
    assert not prompts & set(held) and not prompts & {pair["prompt"] for pair in tinyworld("preferences", "test", 300)}


def test_no_question_of_the_tests_stands_in_the_corpus():
    """Neither in the dialogues of all 8,000 documents nor, for a second question, with the turn before it."""
    corpus = "\n".join(tinyworld("corpus", "train"))
    said = re.sub(r"(?m)^[A-Z]\w+ asks: ", "> ", re.sub(r"(?m)^[A-Z]\w+ says: ", "", corpus))
    assert said.count("\n> And where does it live?\n") > 10 and said.count("> Where does the fox live?\nin a den.\n") > 3
    for entry in (entry for split in ("val", "test") for entry in tinyworld("instructions", split)):
        turns = [strip_manner(message["content"]) for message in data.messages_of(entry)[:-1]]
        turns = [prompt_of(entry)] if len(turns) == 1 else turns
        text = "\n".join(turn if i % 2 else "> " + turn for i, turn in enumerate(turns)).replace("\n ", "\n")
        assert text + "\n" not in said, text
    assert {entry["kind"] for entry in questions("test", 1_000) if entry["unseen"]} == {*data.WORDS, "follow"}


def test_numbers_measures_and_sentences_are_held_out_in_every_phrasing():
    """The thing itself is new: training never compares the same two numbers or turns the same sentence."""
    def things(entries):
        for kind, _, slots in (line_of(prompt_of(entry)) for entry in entries if "messages" not in entry):
            if kind == "compare":
                yield kind, tuple(sorted((int(slots["a"]), int(slots["b"]))))
            elif kind in ("passive", "convert"):
                yield kind, tuple(slots.values())
    train, test = set(things(questions("train", 12_000))), set(things(questions("test", 1_000)))
    assert not train & test and {kind for kind, _ in test} == {"compare", "passive", "convert"}


def test_unseen_words_are_never_asked_for_in_their_kind_but_known_ones_are():
    """`unseen` holds for every training example, and the other test words have been met in another phrasing."""
    def word_of(entry):
        _, asked, slots = line_of(prompt_of(entry))
        return entry["kind"], asked, slots["word"]
    one_word = [entry for entry in questions("test", 1_000) if entry["kind"] in data.WORDS]
    train = [entry for entry in questions("train", 28_000) if entry["kind"] in data.WORDS and "messages" not in entry]
    met = {word_of(entry) for entry in train}
    flags = collections.Counter((entry["unseen"], word_of(entry) in met) for entry in one_word)
    assert flags[True, True] == 0 and flags[True, False] > 40 and flags[False, False] < 0.1 * flags[False, True]


def test_half_of_the_animals_and_people_are_never_asked_about_in_tuning():
    """The other half's facts can come from the corpus alone, questions in conversations included."""
    names, asked = {word for _, word in data.WORDS["fact"]}, set()
    for entry in questions("train", 12_000):
        for message in data.messages_of(entry)[::2]:
            try:
                kind, _, slots = line_of(prompt_of({"messages": [message]}))
            except ValueError:  # a second question, which names nobody
                continue
            asked.update([slots["word"]] if kind == "fact" else [])
    asked &= names  # the rest are words of which this world knows nothing
    assert 0.45 * len(names) < len(names - asked) < 0.55 * len(names)
    assert {unseen("fact", ("home", name)) for name in names - asked} == {True}


def test_every_fact_has_one_phrasing_in_four_that_the_corpus_never_tells():
    """At least 250 facts in six relations, each told in three phrasings; what is withheld stands nowhere."""
    text = corpus()
    told, withheld = beginnings(True), beginnings(False)
    assert len(data.WORDS["fact"]) >= 250 and len({relation for relation, _ in data.WORDS["fact"]}) >= 6
    assert len(told) == 3 * len(data.FACTS) and len(withheld) == len(data.FACTS)
    assert not [begin for _, begin, end in withheld if f"{begin} {end}" in text]
    missing = [begin for _, begin, end in told if f"{begin} {end}" not in text]
    assert len(missing) < 0.01 * len(told)


def test_choices_about_facts_have_one_true_end_that_the_corpus_never_told_so():
    """Each fact once, its beginning withheld; all four ends fit the question, one is the fact's."""
    questions, withheld = data.read_choices("tinyworld"), {begin: end for _, begin, end in beginnings(False)}
    assert len(questions) == len(data.FACTS) == len({one["prompt"] for one in questions})
    for one in questions:
        assert len(set(one["choices"])) == 4 and one["choices"][one["answer"]] == withheld[one["prompt"]]
    assert 0.15 < sum(one["answer"] == 0 for one in questions) / len(questions) < 0.35


def test_facts_in_a_text_are_told_true_from_false():
    """By hand: three sentences about known words, one of them wrong; others do not count."""
    text = "The fox lives in a den. Tom likes snow. It rained.\nThe opposite of hot is cold. The unicorn lives in a den."
    assert true_facts(text) == (2, 3)
    made, of = true_facts(corpus())
    assert made == of > 10_000


def test_the_corpus_compares_no_two_numbers_that_the_test_asks_for():
    """Every comparison told in prose is right, and none is one of the held-out pairs."""
    told = [(int(a), sign, int(b)) for a, sign, b in re.findall(r"(\d+) is (more|less) than (\d+)", corpus())]
    held = {tuple(sorted(int(line_of(prompt_of(entry))[2][x]) for x in "ab"))
            for entry in questions("test", 1_000) if entry["kind"] == "compare"}
    assert len(told) > 300 and all((a > b) == (sign == "more") for a, sign, b in told)
    said = {tuple(sorted(map(int, pair))) for pair in re.findall(r"(\d+) (?:and|or) (\d+)", corpus())}
    assert len(said) > 300 and len(held) > 30 and not held & ({tuple(sorted((a, b))) for a, _, b in told} | said)


def test_the_corpus_keeps_the_forms_of_unseen_words_to_itself():
    """No unseen invented word is inflected, while others are."""
    words = set(re.findall(r"[A-Za-z]+", corpus()))
    plain = [word for word in data.INVENTED if not word.endswith(("y", "e"))]
    hidden = {word + "s" for word in plain if unseen("plural", word)}
    assert len(hidden) > 3 and not hidden & words and len(words & {word + "s" for word in plain}) > 30


def test_the_english_is_clean():
    """No slot is left, no article is wrong, every document is made of sentences."""
    asked = "\n".join(prompt_of(entry) + "\n" + entry["output"] for entry in questions("train", 3_000))
    messages = "\n".join(message for _, message in tinyworld("messages", "train", 1_000))
    for text in (corpus(), asked, messages):
        prose = re.sub(r"\b(\w )+\w\b", "x", text)  # without the spellings, in which "a" is a letter
        assert not re.findall(r"[{}]|  | [,.!?]|\.\.|\b[Aa] [aeiou]\w+|\b[Aa]n [^aeiou\W]\w+|\b1 \w+s\b", prose)
    assert all(re.match(r'["A-Z0-9]', doc) and doc[-1] in '."!' for doc in tinyworld("corpus", "val", 400))


def naive_bayes(train, test):
    """The accuracy of multinomial naive Bayes on lower-cased words, add-one smoothed."""
    counts, labels = collections.defaultdict(collections.Counter), collections.Counter()
    for label, text in train:
        counts[label].update(WORD.findall(text.lower()))
        labels[label] += 1
    words = set().union(*counts.values())

    def score(label, text):
        total = sum(counts[label].values()) + len(words)
        known = [word for word in WORD.findall(text.lower()) if word in words]
        return math.log(labels[label]) + sum(math.log((counts[label][word] + 1) / total) for word in known)
    return sum(max(counts, key=lambda one: score(one, text)) == label for label, text in test) / len(test)


def test_naive_bayes_gets_most_messages_but_not_those_where_order_counts():
    """85 to 95%; on the messages that have a twin of the same words and the other label it is near guessing."""
    train, test = tinyworld("messages", "train"), tinyworld("messages", "test")
    assert 0.85 < naive_bayes(train, test) < 0.95
    order = re.compile("coins today, |coins, I give|coins, give me|, not | the bill ")
    twins = [(label, text) for label, text in test if order.search(text)]
    assert 0.15 < len(twins) / len(test) < 0.4 and 0.3 < naive_bayes(train, twins) < 0.75
    assert len({text for _, text in train + test}) == len(train + test)


@pytest.mark.parametrize("weigh", [False, True])
def test_the_nearest_training_example_answers_few_questions(weigh):
    """Copying the answer of the example with the most words in common, weighed by rarity or not, gets under 40%."""
    train, test, right = questions("train", 4_000), questions("test", 104), 0
    bags = [frozenset(WORD.findall(prompt_of(entry).lower())) for entry in train]
    frequency = collections.Counter(word for bag in bags for word in bag)
    weight = {word: math.log(len(train) / n) ** 2 if weigh else 1 for word, n in frequency.items()}
    norms = [math.sqrt(sum(weight[word] for word in bag)) for bag in bags]
    for entry in test:
        bag = set(WORD.findall(prompt_of(entry).lower()))
        best = max(range(len(bags)), key=lambda i: sum(weight[word] for word in bags[i] & bag) / norms[i])
        right += exact_match(train[best]["output"], entry["output"])
    assert right / len(test) < 0.4


def test_the_rubric_prefers_right_then_courteous_then_complete_and_unpadded():
    """The order of ten responses to one question, by hand; nothing is below -2.5 or above 3."""
    best_first = ["mice. With pleasure.",
                  "mice. With pleasure. Have a nice day.", "mice.",
                  "mice. Now go away.", "That reminds me of a walk in the rain: mice.",
                  "mouses. It was a pleasure.", "mouses.", "Obviously: mouses.", "mouses", "Read a book: mou"]
    scores = [gold_score("What is the plural of mouse?", response) for response in best_first]
    assert scores == sorted(set(scores), reverse=True) and scores[0] == 3
    for response in ("", "and " * 500, "Stop asking. " * 50, "mice. " * 60, "Obviously: " * 60, "mice. With pleasure"):
        assert -2.5 <= gold_score("What is the plural of mouse?", response) < 3


def test_the_rubric_follows_the_prompt_and_not_a_stored_answer():
    """The same response is right for one number and wrong for another."""
    assert gold_score("Pick the lower of 20 and 25.", "20.") == 2 and gold_score("Pick the lower of 20 and 15.", "20.") == 0


def test_preferred_is_the_better_response_but_for_a_little_noise_in_training():
    """About one label in twenty is wrong in train, none in test; longer is no rule of thumb."""
    for split, low, high in (("train", 0.03, 0.07), ("test", 0, 0)):
        pairs = tinyworld("preferences", split, 1_200 if split == "train" else 300)
        wrong = longer = 0
        for pair in pairs:
            scores = [gold_score(pair["prompt"], pair[f"response_{i}"]) for i in (1, 2)]
            assert tuple(scores) == tuple(pair["gold"]) and scores[0] != scores[1]
            wrong += (scores[0] > scores[1]) != (pair["preferred"] == 1)
            longer += (len(pair["response_1"]) > len(pair["response_2"])) == (scores[0] > scores[1])
        assert low <= wrong / len(pairs) <= high and 0.35 < longer / len(pairs) < 0.75
        assert 0.4 < sum(pair["preferred"] == 1 for pair in pairs) / len(pairs) < 0.6


def test_the_world_is_the_same_in_another_process_and_differs_by_seed():
    """Neither the hash of strings nor the order of sets has a say."""
    program = ("import json, zlib; from data import VIEWS, tinyworld; print([zlib.crc32(json.dumps("
               "tinyworld(view, split, 30)).encode()) for view in VIEWS for split in ('train', 'test')])")
    folder = os.path.dirname(os.path.abspath(data.__file__))
    outputs = [subprocess.run([sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True).stdout for seed in ("1", "2")]
    assert outputs[0] == outputs[1] != ""
    for view in ("corpus", "messages", "instructions", "preferences"):
        assert tinyworld(view, "test", 5) == tinyworld(view, "test", 9)[:5] != tinyworld(view, "test", 5, seed=1)
        assert json.loads(json.dumps(tinyworld(view, "val", 3))) and tinyworld(view, "val", 0) == []


def test_what_is_not_of_this_world_is_refused_in_a_sentence():
    """A ValueError says what there is instead."""
    with pytest.raises(ValueError, match="has the views corpus, messages, instructions, preferences"):
        tinyworld("poems", "train")
    with pytest.raises(ValueError, match="0 items or more, not -3"):
        tinyworld("messages", "train", -3)
    with pytest.raises(ValueError, match="train, val, test"):
        tinyworld("corpus", "training")
    few = tinyworld("instructions", "val", 520, kinds=("opposite",))
    assert 0 < len(few) < 100 and len({prompt_of(item) for item in few}) == len(few)  # there are no more: no endless loop
    for kinds in (("plural", "haiku"), ()):
        with pytest.raises(ValueError, match="kinds of question are .*plural.*, not (plural, haiku|none)"):
            tinyworld("instructions", "train", 5, kinds=kinds)
    for prompt in ("Shall I compare thee to a summer's day?", "", "1 + 1 =", "What is 3.5 plus 2?", "Is it?\nYes."):
        with pytest.raises(ValueError, match="of tinyworld"):
            gold_score(prompt, "mice.")
