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
from data import (TINYWORLD_KINDS, answer, exact_match, gold_score, line_of, prompt_of, strip_manner, tinyworld, unseen)

WORD = re.compile(r"[a-z0-9']+")
KNOWN = {  # one question for each kind and each thing asked, answered by hand
    "Rewrite this sentence in the passive voice.\nThe cook ate the pies.": "The pies were eaten by the cook.",
    "Say this in the passive: Ann breaks the cup.": "The cup is broken by Ann.",
    "Turn the sentence round, into the passive.\nTom carried the sheep.": "The sheep was carried by Tom.",
    "What is another word for rabbit?": "bunny.",
    "What is the opposite of always?": "never.",
    "What is the plural of goose?": "geese.",
    "Give the plural of this noun.\nvobby": "vobbies.",
    "What do you call more than one klotch?": "klotches.",
    "What is the plural of monkey?": "monkeys.",
    "What is the past tense of teach?": "taught.",
    "Today they nunny. What did they do yesterday?": "nunnied.",
    "Put this verb into the past tense.\nhug": "hugged.",
    "Spell this word.\nmouse": "m o u s e.",
    "Put this word in upper case.\nsmindle": "SMINDLE.",
    "Write MARKET in small letters.": "market.",
    "How many minutes are 4 hours?": "240 minutes.",
    "Convert 700 centimetres to metres.": "7 metres.",
    "Give this in days.\n5 weeks": "35 days.",
    "Pick the highest of 9, 86, 81 and 72.": "86.",
    "Which number is the smallest?\n27 and 36": "27.",
    "How many words are in this list?\ntie, hook, mouse, dog": "4.",
    "Count only the animals: tie, hook, mouse, dog": "2.",
    "What is 38 plus 13?": "51.",
    "Mia has 17 keys and gets 8 more. How many are there now?": "25.",
    "Who has the bell at the end?\nKarl has a pink bell. Ann is at the mill. Karl gave the bell to Ann.":
        "The bell is with Ann.",
    "Karl has a pink bell. Ann found an orange kite. What does Ann have now?": "Ann has an orange kite.",
    "What does Ann have at the end?\nKarl has a pink bell. Ann has a red kite. Karl gave the bell to Ann.":
        "Ann has a pink bell and a red kite.",
    "What colour is the bell?\nKarl has a pink bell. Ann has a red kite.": "The bell is pink.",
    "Where is Ann?\nKarl has a pink bell. Ann sings at the mill.": "Ann is at the mill.",
    "Where does the fox live?": "in a den.",
    "What does the bee eat?": "nectar.",
    "What is Tom's job?": "baker.",
    "In which town does Ann live?": "Corfe.",
    "What comes right after Sunday?": "Monday.",
    "December is over. What begins now?": "January.",
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
    assert {line_of(prompt)[:2] for prompt in KNOWN} == {line_of(prompt_of(e))[:2] for e in questions("train", 3_000)}


def test_there_are_twelve_kinds_or_more_with_four_phrasings_or_more():
    """The instructions are as varied as they claim to be, in manners too."""
    entries = questions("train", 12_000)
    manners, phrasings = collections.Counter(), collections.defaultdict(set)
    for entry in entries:
        manners[entry["manner"]] += 1
        words = {entry["instruction"]: 0} if entry["input"] else {}  # with an input, the instruction is the phrasing
        phrasings[entry["kind"]].update(words)
    assert len(TINYWORLD_KINDS) >= 12 and set(manners) == {"bare", "courteous", "curt", "rambling"}
    assert all(len([task for task in data.TASK_LIST if task[0] == kind]) >= 4 for kind in TINYWORLD_KINDS)
    assert all(phrasings.values()) and min(manners.values()) > 0.1 * len(entries)


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_kinds_that_are_named_are_asked(split):
    """Spelling and adding alone: every answer is letters one by one or a number."""
    answers = [entry["answer"] for entry in tinyworld("instructions", split, 42, kinds=("spelling", "add"))]
    sums = [text for text in answers if re.fullmatch(r"\d+\.", text)]
    assert len(sums) + len([text for text in answers if re.fullmatch(r"(\w )+\w\.", text)]) == 42
    asked = 42 * 5 / 7 if split == "train" else 42 / 2  # training asks for sums 5 times where it asks 2 for letters
    assert abs(len(sums) - asked) < 2  # a question that came up before is passed over


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_prompt_alone_gives_back_its_answer_and_a_response_its_bare_form(split):
    """Made from slots, read back from text: nothing is lost, whatever the manner."""
    for entry in questions(split, 1_000 if split == "test" else 300):
        assert answer(prompt_of(entry)) == entry["answer"]
        assert strip_manner(entry["output"]) == entry["answer"]
        assert (entry["output"] == entry["answer"]) == (entry["manner"] == "bare")


def test_strip_manner_leaves_everything_else_alone():
    """Only whole templates are undone: no half of one, no mixture, no bare answer."""
    answers = [entry["answer"] for entry in questions("test", 1_000)]
    for text in ("mice.", "", "Gladly, mice.", "mice. Have a lovely walk.", "Of course:", "of course: mice.",
                 "So: mice.", "Of course mice.", "mice. Next.", "k l o r b. Stop", *answers):
        assert strip_manner(text) == text
    assert strip_manner("Gladly: mice.") == strip_manner("mice. I hope this helps.") == "mice."
    assert strip_manner("Gladly: mice. I hope this helps.") != "mice."
    assert exact_match("Of course: mice.", "Stop asking. mice.") is False
    assert exact_match(" Of course: mice.\n", "mice. Stop asking.") and not exact_match("mouses.", "mice.")


def test_test_questions_never_come_up_in_training_in_any_order_of_their_words():
    """Under two seeds, no prompt of val or test is one of train, not even with its words or numbers turned about."""
    seen = {bare(prompt_of(entry)) for seed in (0, 7) for entry in tinyworld("instructions", "train", 8_000, seed=seed)}
    held = [prompt_of(entry) for split, n in (("val", 300), ("test", 1_000)) for entry in questions(split, n)]
    ordered = [prompt for prompt in held if line_of(prompt)[0] not in ("story", "passive", "count", "convert")]
    assert len(set(held)) == len(held) and not [prompt for prompt in ordered if bare(prompt) in seen]
    prompts = {prompt_of(entry) for entry in tinyworld("instructions", "train", 8_000)}
    assert not prompts & set(held) and not prompts & {pair["prompt"] for pair in tinyworld("preferences", "test", 300)}


def test_sums_sentences_and_stories_are_held_out_in_every_phrasing():
    """The thing itself is new: training never adds the same two numbers or tells the same sentence."""
    def things(entries):
        for entry in entries:
            kind, _, slots = line_of(prompt_of(entry))
            if kind == "add":
                yield kind, tuple(sorted((int(slots["a"]), int(slots["b"]))))
            elif kind in ("passive", "story", "count", "compare"):
                yield kind, slots.get("sentence") or slots.get("story") or slots.get("items") or bare(slots["numbers"])
    train, test = set(things(questions("train", 12_000))), set(things(questions("test", 1_000)))
    assert not train & test and {kind for kind, _ in test} == {"add", "passive", "story", "count", "compare"}


def test_unseen_words_are_never_asked_for_in_their_kind_but_known_ones_are():
    """`unseen` holds for every training example, and the other test words have been met in another phrasing."""
    met = {(entry["kind"], line_of(prompt_of(entry))[2]["word"].lower()) for entry in questions("train", 48_000)
           if entry["kind"] in data.WORDS}
    flags = collections.Counter()
    for entry in questions("test", 1_000):
        if entry["kind"] in ("plural", "past", "opposite", "synonym", "spelling", "case"):
            word = line_of(prompt_of(entry))[2]["word"].lower()
            flags[entry["unseen"], (entry["kind"], word) in met] += 1
    assert flags[True, True] == 0 and flags[True, False] > 50 and flags[False, False] < 0.1 * flags[False, True]


@pytest.mark.parametrize("kind, pattern", [("count", r"The list of \w+ said ([^.]*), and that is"),
                                           ("passive", r"wrote this sentence: ([^.]*\.)"),
                                           ("story", r'said: "([^"]*?) In short')])
def test_lists_sentences_and_stories_of_the_corpus_fall_to_train(kind, pattern):
    """What the corpus tells could be a training input, and by the same rule never one of a test."""
    told = re.findall(pattern, corpus())
    assert len(told) > 30 and {data.split_of(kind, text) for text in told} == {"train"}
    held = [line_of(prompt_of(entry))[2] for entry in questions("test", 1_000) if entry["kind"] == kind]
    assert {data.split_of(kind, *slots.values()) for slots in held if len(slots) == 1} <= {"test"}
    whole = re.compile(r"(?<!, )(?:%s)(?!, \w)" % "|".join(re.escape(t) for s in held for t in s.values() if " " in t))
    assert not whole.search(corpus())  # a short list may well be a part of a longer one


def test_sets_of_numbers_in_the_corpus_are_not_those_of_a_test():
    """No set of three or four numbers is put in order in prose and asked about in a test."""
    def sets(text):
        runs = re.findall(r"(?:[Oo]f|put|numbers|largest\?|smallest\?)\s(\d+(?:, \d+)+ and \d+)", text)
        return {tuple(sorted(map(int, re.findall(r"\d+", run)))) for run in runs}
    told, asked = sets(corpus()), sets("\n".join(map(prompt_of, questions("test", 1_000))))
    assert len(told) > 300 and len(asked) > 30 and not told & asked
    assert {data.split_of("compare", list(numbers)) for numbers in told} == {"train"}


def test_the_corpus_adds_no_two_numbers_that_the_test_asks_for():
    """Every sum told in prose is right, and none is one of the held-out pairs."""
    told = {tuple(sorted((int(a), int(b)))): int(c) for a, b, c in
            re.findall(r"(\d+) (?:plus|and) (\d+) (?:is|make) (\d+)", corpus())}
    held = {tuple(sorted(int(line_of(prompt_of(entry))[2][x]) for x in "ab"))
            for entry in questions("test", 1_000) if entry["kind"] == "add"}
    assert len(told) > 300 and all(a + b == c for (a, b), c in told.items()) and not held & set(told)


def test_the_corpus_keeps_the_forms_of_unseen_words_to_itself():
    """No unseen word is spelled or shouted, and no unseen invented word is inflected."""
    words = set(re.findall(r"[A-Za-z]+", corpus()))
    spelled = set(re.findall(r"is spelled ((?:\w )+\w)\.", corpus()))
    forms = {"plural": lambda w: w + "s", "past": lambda w: w + "ed"}
    for kind, form in forms.items():
        invented = [w for w in data.WORDS[kind] if w in data.INVENTED and not w.endswith(("y", "e", "z", "tch"))]
        hidden = {form(w) for w in invented if unseen(kind, w)}
        assert len(hidden) > 3 and not hidden & words and len(words & {form(w) for w in invented}) > 30
    assert not {" ".join(w) for w in data.WORDS["spelling"] if unseen("spelling", w)} & spelled and len(spelled) > 80
    assert not {w.upper() for w in data.WORDS["case"] if unseen("case", w) and len(w) > 1} & words


def test_the_corpus_tells_every_fact_and_every_meaning_that_a_test_may_ask_for():
    """What no rule can yield stands in the corpus, for unseen words too."""
    text = corpus()
    missing = [(animal, home) for animal, (home, _) in data.ANIMALS.items() if f"The {animal} lives {home}" not in text
               and f"The {animal} goes home, {home}" not in text]
    missing += [name for name, (_, job, town) in data.PEOPLE.items()
                if f"{name}, the {job}, lived in {town}" not in text]
    ways = ("he opposite of {} is {}", "The word {} means the same as {}", "and {} the same as {}.", "For {} you can say {},", " {} and {} ",
            "said {}, but", 'Not {}," said')
    for first, (second,) in (*data.OPPOSITES.items(), *data.SYNONYMS.items()):
        told = (way.format(*pair) for way in ways for pair in ((first, second), (second, first)))
        missing += [] if any(line in text for line in told) else [(first, second)]
    missing += [noun for noun, plural in data.IRREGULAR.items() if not re.search(rf"\b{plural}\b", text)]
    assert not missing


def test_the_english_is_clean():
    """No slot is left, no article is wrong, every document is made of sentences."""
    asked = "\n".join(prompt_of(entry) + "\n" + entry["output"] for entry in questions("train", 3_000))
    messages = "\n".join(message for _, message in tinyworld("messages", "train", 1_000))
    for text in (corpus(), asked, messages):
        prose = re.sub(r"\b(\w )+\w\b", "x", text)  # without the spellings, in which "a" is a letter
        assert not re.findall(r"[{}]|  | [,.!?]|\.\.|\b[Aa] [aeiou]\w+|\b[Aa]n [^aeiou\W]\w+|\b1 \w+s\b", prose)
    assert all(re.match(r'["A-Z0-9]', doc) and doc[-1] in '."!' for doc in tinyworld("corpus", "val", 500))


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
    best_first = ["Gladly: mice.",
                  "Gladly: mice. I hope this helps.", "mice.",
                  "mice. Now go away.", "That reminds me of a walk in the rain: mice.",
                  "Of course: mouses.", "mouses.", "Obviously: mouses.", "mouses", "Read a book: mou"]
    scores = [gold_score("What is the plural of mouse?", response) for response in best_first]
    assert scores == sorted(set(scores), reverse=True) and scores[0] == 3
    for response in ("", "and " * 500, "Stop asking. " * 50, "mice. " * 60, "Of course: " * 60, "Of course: mice"):
        assert -2.5 <= gold_score("What is the plural of mouse?", response) < 3


def test_the_rubric_follows_the_prompt_and_not_a_stored_answer():
    """The same response is right for one number and wrong for another."""
    assert gold_score("What is 20 plus 5?", "25.") == 2 and gold_score("What is 20 plus 6?", "25.") == 0


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
    for prompt in ("What is love?", "", "Where does the unicorn live?", "Where is Zed?\nAnn has a red kite.",
                   "What does Tom have now?", "How many weeks are 3 apples?"):
        with pytest.raises(ValueError, match="of tinyworld"):
            gold_score(prompt, "mice.")
