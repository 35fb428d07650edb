"""Guided output on the default model's tokenizer: whatever is drawn, the answer is what was asked for."""

import json
import re

import pytest
import torch

from pagoda import LLM, PagodaError
from pagoda.engine.engine import Engine
from pagoda.engine.options import EngineOptions, Guided, Sampling
from pagoda.engine.request import Request

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(default_model):
    pytest.importorskip("llguidance")
    return LLM.load(default_model)


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["dictionary", "text"])
def test_answers_follow_a_schema(llm, schema):
    done = llm.generate("A record:", temperature=1.5, seed=1, n=3, max_new_tokens=80, guided=Guided(json=schema))
    for answer in [done, *done.others]:
        record = json.loads(answer.text)
        assert set(record) == {"name", "age"}
        assert 0 <= record["age"] <= 99
        assert answer.finish_reason == "stop"


def test_answers_follow_patterns_choices_and_grammars(llm):
    options = dict(temperature=1.0, seed=2, max_new_tokens=30)
    assert re.fullmatch(
        r"\d{3}-[a-f]{4}", llm.generate("A code:", guided=Guided(regex=r"\d{3}-[a-f]{4}"), **options).text
    )
    assert llm.generate("The sky is", guided=Guided(choice=["blue and wide", "green"]), **options).text in (
        "blue and wide",
        "green",
    )
    grammar = 'start: "a" b "c"\nb: "x" | "y" b'
    answers = [llm.generate("Say:", guided=Guided(grammar=grammar), **options | {"seed": i}).text for i in range(4)]
    assert all(re.fullmatch(r"ay*(xc?)?", a) for a in answers)  # cut where the tokens end
    assert any(re.fullmatch(r"ay*xc", a) for a in answers)
    text = llm.generate("An object:", temperature=0, max_new_tokens=60, guided=Guided(any_json=True)).text
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"regex": "(a"}, "the guided regex makes no sense"),
        ({"json": {"type": 7}}, "the guided json makes no sense"),
        ({"json": "{"}, "the guided .* makes no sense"),
        ({"grammar": "start: nothing"}, "the guided grammar makes no sense"),
        ({"choice": [""]}, "not empty"),
    ],
)
def test_what_makes_no_sense_is_refused(llm, guided, message):
    with pytest.raises(PagodaError, match=message):
        llm.generate("x", guided=Guided(**guided))


def test_guesses_do_not_cut_a_guided_answer_short(llm):
    choice = Guided(choice=["one two three one two three one two three!"])
    engine = Engine(llm.model, llm.tokenizer, EngineOptions(kv_memory=0.1, speculate="ngram"))
    request, text = Request(llm.encode("one two three one two three one"), Sampling(guided=choice)), []
    engine.run([request], lambda i, piece: text.append(piece.text))
    assert "".join(text) == "one two three one two three one two three!"


def test_one_thing_can_be_asked_for():
    with pytest.raises(PagodaError, match="exactly one"):
        Guided(regex="a", choice=["b"])
    with pytest.raises(PagodaError, match="exactly one"):
        Guided()


def test_what_is_forbidden_has_no_chance(llm):
    guide = llm.engine.guides.guide(Guided(choice=["yes", "no"]))
    scores = torch.zeros(llm.model.config.vocab_size)
    guide.mask(scores)
    allowed = {llm.tokenizer.decode([i]) for i in torch.isfinite(scores).nonzero()[:, 0].tolist()}
    assert allowed == {"y", "ye", "yes", "n", "no"}
