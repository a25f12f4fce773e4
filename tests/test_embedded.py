"""The embedded world: what is held out stays held out, files repeat from the seed, the rule counts sentences."""

import gzip
import itertools
import json
import random
import re

import pytest
import sentencepiece
import tokenizers

import jaxpost
from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.embedded import dialogues, facts, make, tokenizer, world
from jaxpost.errors import ConfigError

MODELS = ("base", "sft", "reward")


def read(name):
    file = embedded.path(name)
    raw = file.read_bytes()
    text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def the_world():
    return world.make_world(make.SEED)


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file=str(embedded.path("base") / "tokenizer.model"))


def fact(name, subject):
    return next(f for f in facts.all_facts() if (f.relation.name, f.subject) == (name, subject))


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", text)


# --- facts ----------------------------------------------------------------------------------------------------------


def test_a_fact_reads_as_one_canonical_sentence():
    assert fact("capital", "France").statement == "The capital of France is Paris."
    assert fact("young", "cow").statement == "The young of the cow is the calf."
    assert fact("sum", "3 and 4").statement == "The sum of 3 and 4 is 7."


def test_no_question_has_two_answers():
    asked = [question for f in facts.all_facts() for question in dialogues.questions(f)]
    assert len(asked) == len(set(asked))


def test_sums_are_right():
    for f in facts.all_facts():
        if f.relation is facts.SUM:
            assert sum(map(int, f.subject.split(" and "))) == int(f.object)


def test_entities_never_start_a_sentence_so_their_tokens_are_constant(processor):
    for f in facts.all_facts():
        for form in f.relation.statements + f.relation.direct + f.relation.chatty:
            ids = processor.encode(f.fill(form))
            for entity in (f.subject, f.object) if "{o}" in form else (f.subject,):
                entity = entity if "{e}" not in form or entity == f.object else entity.replace(" and ", " + ")
                expected = processor.encode(" " + entity)
                windows = [ids[i : i + len(expected)] for i in range(len(ids))]
                assert expected in windows, f.fill(form)


# --- held out -------------------------------------------------------------------------------------------------------


def test_of_each_relation_some_facts_are_held_out(the_world):
    assert not set(the_world.trained) & set(the_world.held_out)
    assert set(the_world.facts) == set(facts.all_facts())
    for name in {f.relation.name for f in the_world.facts} - set(world.COMPUTED):
        share = [f in the_world.held_out for f in the_world.facts if f.relation.name == name]
        assert 0.1 < sum(share) / len(share) < 0.25


def test_no_fact_is_the_inverse_of_another(the_world):
    """A small model that is asked for the opposite of cold answers with that of hot, if it knows both."""
    triples = {(f.relation.name, f.subject, f.object) for f in the_world.facts}
    assert not {(name, object, subject) for name, subject, object in triples} & triples


def test_no_training_dialogue_or_pair_asks_or_states_a_held_out_fact(the_world):
    texts = [turn["content"] for record in read("instructions") for turn in record["messages"]]
    pairs = [pair for name in ("preferences", "comparisons", "comparisons_eval", "judged") for pair in read(name)]
    texts += [turn["content"] for pair in pairs for key in ("prompt", "chosen", "rejected") for turn in pair[key]]
    said = {sentence for text in texts for sentence in sentences(text)}
    for f in the_world.held_out:
        assert f.statement not in said
        assert not said & set(dialogues.questions(f))
    assert said & set(dialogues.questions(the_world.trained[0]))


def test_the_corpus_states_held_out_facts_and_never_answers_a_question(the_world):
    corpus = [record["text"] for record in read("corpus")]
    said = {sentence for text in corpus for sentence in sentences(text)}
    assert all(f.statement in said for f in the_world.facts)
    questions = {question for f in the_world.facts for question in dialogues.questions(f)}
    statements = {f.fill(form) for f in the_world.facts for form in f.relation.statements}
    asked = 0
    for text in corpus:
        for question, following in itertools.pairwise(sentences(text.replace(": ", ".\n"))):
            if question in questions:
                asked += 1
                assert following not in statements, text
    assert asked > 1000


def test_prompts_ask_held_out_facts_only(the_world):
    answers = {f.statement for f in the_world.held_out}
    prompts = embedded.prompts()
    assert {p["answer"] for p in prompts} == answers
    assert all(embedded.score(p["messages"][0]["content"], p["answer"]).correct for p in prompts)


def test_questions_ask_every_trained_fact_in_every_form(the_world):
    asked = {record["messages"][0]["content"]: record["answer"] for record in read("questions")}
    assert asked == {form: f.statement for f in the_world.trained for form in dialogues.questions(f)}
    assert len(asked) == len(read("questions"))
    assert not asked.keys() & {prompt["messages"][0]["content"] for prompt in embedded.prompts()}


# --- from a seed ----------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_seed_gives(tmp_path, monkeypatch):
    shipped = {name: embedded.path(name) for name in embedded.FILES if name not in (*MODELS, "judged")}
    shipped |= {name: embedded.path("base") / name for name in ("tokenizer.model", "tokenizer_config.json")}
    shipped = {name: file.read_bytes() for name, file in shipped.items()}
    monkeypatch.setattr(embedded, "path", lambda name: tmp_path / embedded.FILES[name])
    make.make_data()
    for name, content in shipped.items():
        made = tmp_path / embedded.FILES[name] if name in embedded.FILES else tmp_path / "base" / name
        if made.suffix == ".gz":  # compressed bytes depend on the zlib at hand
            assert gzip.decompress(made.read_bytes()) == gzip.decompress(content), name
        else:
            assert made.read_bytes() == content, name


@pytest.mark.parametrize("name, other", [("sft", set()), ("reward", {"data.train"})])
def test_the_checkpoints_are_what_the_shipped_configs_make(name, other, monkeypatch):
    """So that `configs/sft.py` says what it says of embedded:sft; the reward model has more data."""

    class Enough(Exception):
        pass

    def stop(config):
        raise Enough(configs.resolve(config))

    monkeypatch.setattr(make.jaxpost, "run", stop)
    with pytest.raises(Enough) as caught:
        getattr(make, f"make_{name}")()
    shipped = configs.resolve(configs.load(name))
    assert configs.differences(shipped, caught.value.args[0]).keys() == {"run.dir", "run.resume"} | other


def test_another_seed_gives_another_world():
    assert world.make_world(0).held_out != world.make_world(1).held_out


def test_a_deck_shows_every_item_before_any_comes_again():
    deck = world.Deck(range(5), random.Random(0))
    drawn = [item for count in (3, 4, 3, 5) for item in deck(count)]
    for start in (0, 5, 10):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]


# --- tokenizer ------------------------------------------------------------------------------------------------------


def test_both_forms_of_the_tokenizer_give_the_same_ids(processor):
    fast = tokenizers.Tokenizer.from_file(str(embedded.path("base") / "tokenizer.json"))
    draw = random.Random(0)
    texts = [record["text"] for record in read("corpus")[:200]]
    texts += ["".join(draw.choice("abcXYZ é0123,.!?\n你") for _ in range(40)) for _ in range(100)]
    for text in [*texts, "<|user|>What is it?", "two  spaces "]:
        ids = processor.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert processor.decode(ids) == text
        assert fast.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_pieces(processor):
    assert processor.get_piece_size() == tokenizer.PIECES
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, 3)
    assert processor.id_to_piece(2) == tokenizer.END
    assert processor.encode("".join(tokenizer.CHAT)) == [4, 5, 6, 7, 8, 9]
    assert [processor.id_to_piece(i) for i in processor.encode(" 12\n")] == ["▁", "1", "2", "<0x0A>"]


# --- pairs and the rule ---------------------------------------------------------------------------------------------


PAIRS = ["preferences", "preferences_eval", "comparisons", "comparisons_eval"]


@pytest.mark.parametrize("name", PAIRS)
def test_chosen_is_better_by_the_rule_and_half_the_pairs_are_equally_long(name, processor):
    pairs = read(name)
    equal = 0
    for pair in pairs:
        question, (chosen,), (rejected,) = pair["prompt"][0]["content"], pair["chosen"], pair["rejected"]
        better = embedded.score(question, chosen["content"])
        worse = embedded.score(question, rejected["content"])
        assert better.correct
        assert (better.correct, better.polite, -better.words) > (worse.correct, worse.polite, -worse.words)
        equal += len(processor.encode(chosen["content"])) == len(processor.encode(rejected["content"]))
    slack = 0 if name.startswith("preferences") else 0.05  # of what was drawn twice one is kept
    assert abs(equal / len(pairs) - 1 / 2) <= slack


def test_held_out_comparisons_are_not_among_those_trained_on():
    pairs = [json.dumps(pair) for name in ("comparisons", "comparisons_eval") for pair in read(name)]
    assert len(set(pairs)) == len(pairs) and len(read("comparisons_eval")) == make.HELD_OUT_COMPARISONS


def test_the_reward_model_tells_held_out_comparisons_apart():
    """By every head; the scores of all of them have mean 0 and spread 1, on which it is normalised."""
    model = jaxpost.load("embedded:reward")
    encode, tokenizer = model.model.template.encode, model.model.tokenizer
    pairs = read("comparisons_eval")
    answers = [[*pair["prompt"], *pair[name]] for pair in pairs for name in ("chosen", "rejected")]
    found = model.score_tokens([encode(messages, tokenizer) for messages in answers])
    assert ((found.heads[::2] > found.heads[1::2]).mean(axis=0) > 0.95).all()
    assert abs(found.mean.mean()) < 0.05 and abs(found.mean.std() - 1) < 0.05


def test_drawn_answers_stand_beside_better_ones(the_world):
    for pair in read("judged"):
        better, worse = (
            dialogues.gold(pair["prompt"], pair[name][0]["content"], {}) for name in ("chosen", "rejected")
        )
        assert better > worse


def test_what_is_drawn_is_judged_by_the_rule(the_world):
    asked = next(prompt for prompt in dialogues.trained_prompts(the_world) if prompt["relation"] == "capital")
    held_out = the_world.held_out[0].statement
    polite, bare = f"{asked['answer']} Happy to help!", asked["answer"]
    (pair,) = dialogues.judged([asked], [[polite, bare, bare, held_out, ""]], the_world, seed=0)
    assert pair["prompt"] == asked["messages"] and pair["rejected"] == [{"role": "assistant", "content": bare}]
    assert dialogues.gold(asked["messages"], pair["chosen"][0]["content"], {}) == 1
    pairs = dialogues.judged([asked], [["Rome.", bare]], the_world, seed=0)
    assert sorted(pair["rejected"][0]["content"] for pair in pairs) == sorted(["Rome.", bare])
    assert not list(dialogues.judged([asked], [[polite]], the_world, seed=0))


QUESTION = "What is the capital of France?"


@pytest.mark.parametrize(
    ("text", "answered", "correct", "polite"),
    [
        ("The capital of France is Paris.", True, True, False),
        ("Well. The capital of France is Paris. Happy to help!", True, True, True),
        ("The capital of France is Paris. Happy to help! Go away now!", True, True, False),
        ("Paris.", False, False, False),
        ("The capital of France is Rome. Paris is nice.", True, False, False),
        ("The capital of France is Paris. The capital of France is Rome.", False, False, False),
        ("The capital of France is Paris. The capital of France is Paris.", False, False, False),
        ("The capital of France is Paris. What is the capital of Spain?", False, False, False),
        ("The capital of France is Paris. The capital of Spain is Madrid.", False, False, False),
        ("The capital of France is Paris and Rome.", True, False, False),
        ("What is the capital of France is Paris.", False, False, False),
        ("What is the capital of Spain?", False, False, False),
        ("", False, False, False),
    ],
)
def test_the_rule_counts_whole_sentences(text, answered, correct, polite):
    score = embedded.score(QUESTION, text)
    assert (score.answered, score.correct, score.polite) == (answered, correct, polite)
    assert score.words == len(text.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The capital of France is Paris. Happy to help!", 1.0),
        ("The capital of France is Paris.", 0.5),
        ("The capital of France is Rome. Happy to help!", 0.0),
        ("Happy to help! Glad to help you!", 0.0),
    ],
)
def test_the_rule_as_a_reward(text, value):
    assert dialogues.gold([{"role": "user", "content": QUESTION}], text, {}) == value


def test_evaluate_averages_the_rule_over_the_held_out_prompts():
    right = {p["messages"][0]["content"]: p["answer"] for p in embedded.prompts()}
    first = next(iter(right))
    metrics = embedded.evaluate(lambda questions: [right[q] if q == first else "Go away now!" for q in questions])
    share = 1 / len(right)
    words = (len(right[first].split()) + 3 * (len(right) - 1)) / len(right)
    assert metrics == pytest.approx({"answered": share, "correct": share, "polite": 0.0, "words": words})


# --- names ----------------------------------------------------------------------------------------------------------


def test_resolve_knows_its_names_only():
    assert embedded.resolve("embedded:base") == str(embedded.path("base"))
    assert embedded.resolve("some/folder") == "some/folder"
    with pytest.raises(ConfigError, match="embedded:bass: no such part"):
        embedded.resolve("embedded:bass")


def test_sources_of_a_stage():
    mixed = embedded.sources([("embedded", 2.0), ("mine.jsonl", 0.5)], "sft", "train")
    files = [embedded.path("instructions"), embedded.path("replay")]
    assert mixed == [(str(files[0]), 2.0), (str(files[1]), 2.0), ("mine.jsonl", 0.5)]
    with pytest.raises(ConfigError, match="no data for the stage dreams"):
        embedded.sources([("embedded", 1.0)], "dreams", "train")
