"""Adapters side by side: in one batch every request gets what a model with its adapter alone would say."""

import shutil

import pytest
import tiny
import torch

from pagoda import PagodaError, Sampling
from pagoda.engine.engine import Engine
from pagoda.engine.options import EngineOptions
from pagoda.engine.request import Request
from pagoda.models.loader import load
from pagoda.peft import adapter
from pagoda.peft.files import load_adapter, save_adapter
from pagoda.peft.options import IA3, LoRA

GREEDY = Sampling(temperature=0, max_new_tokens=10, logprobs=0)
OPTIONS = EngineOptions(kv_memory=0.05)
PROMPTS = [tiny.prompt(n, seed=n).tolist() for n in (5, 30, 17, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and some adapters for it."""
    folder = tmp_path_factory.mktemp("base")
    tiny.saved("llama", folder)
    for i, options in enumerate((LoRA(rank=4), LoRA(rank=2, targets="q_proj,down_proj"), LoRA(dora=True), IA3())):
        model = adapter.attach(load(folder, torch.float32), options)
        torch.manual_seed(i)
        for _, p in adapter.trainable_parameters(model):
            p.data.normal_(std=0.3)
        save_adapter(model, folder / f"adapter-{i}")
    return folder


def said(engine, requests):
    tokens, logprobs = [[] for _ in requests], [[] for _ in requests]

    def each(i, piece):
        tokens[i] += piece.token_ids
        logprobs[i] += [t.logprob for t in piece.logprobs]

    engine.run(requests, each)
    return list(zip(tokens, logprobs))


def test_a_batch_of_several_adapters_is_each_alone(folder):
    engine = Engine(load(folder, torch.float32), options=OPTIONS)
    engine.load_adapter("a", folder / "adapter-0")
    engine.load_adapter("b", folder / "adapter-1")
    names = [None, "a", "b", "a", "b", None]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], *PROMPTS[1:]]
    together = said(engine, [Request(p, GREEDY, adapter=name) for p, name in zip(prompts, names)])
    for prompt, name, (tokens, logprobs) in zip(prompts, names, together):
        model = load(folder, torch.float32)
        if name:
            load_adapter(model, folder / f"adapter-{'ab'.index(name)}")
        ((expected, scores),) = said(Engine(model, options=OPTIONS), [Request(prompt, GREEDY)])
        assert tokens == expected
        assert logprobs == pytest.approx(scores, abs=1e-4)
    assert len({tuple(tokens) for tokens, _ in together[:3]}) == 3


def test_the_cache_keeps_adapters_apart(folder):
    engine = Engine(load(folder, torch.float32), options=OPTIONS)
    engine.load_adapter("a", folder / "adapter-0")
    prompt = tiny.prompt(45, seed=3).tolist()
    engine.scheduler.blocks.size  # noqa: B018
    fresh = said(engine, [Request(prompt, GREEDY, adapter="a")])
    assert said(engine, [Request(prompt, GREEDY)]) != fresh
    assert said(engine, [Request(prompt, GREEDY, adapter="a")]) == fresh


def test_adapters_come_and_go(folder):
    model = load(folder, torch.float32)
    before = dict(model.named_modules())
    engine = Engine(model, options=OPTIONS)
    expected = said(engine, [Request(PROMPTS[0], GREEDY)])
    engine.load_adapter("a", folder / "adapter-0")
    group = engine.add(Request(PROMPTS[0], GREEDY, adapter="a"))
    with pytest.raises(PagodaError, match="in use"):
        engine.drop_adapter("a")
    engine.abort(group)
    first = said(engine, [Request(PROMPTS[0], GREEDY, adapter="a")])
    engine.load_adapter("a", folder / "adapter-1")  # another under the same name
    assert said(engine, [Request(PROMPTS[0], GREEDY, adapter="a")]) != first
    engine.drop_adapter("a")
    with pytest.raises(PagodaError, match="no adapter 'a'"):
        engine.add(Request(PROMPTS[0], GREEDY, adapter="a"))
    assert said(engine, [Request(PROMPTS[0], GREEDY)]) == expected
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in before.items()}


@pytest.mark.parametrize("i", [2, 3])
def test_what_cannot_be_shared_is_refused_and_changes_nothing(folder, i):
    model = load(folder, torch.float32)
    engine = Engine(model, options=OPTIONS)
    expected = said(engine, [Request(PROMPTS[0], GREEDY)])
    with pytest.raises(PagodaError, match="plain LoRA"):
        engine.load_adapter("x", folder / f"adapter-{i}")
    assert said(engine, [Request(PROMPTS[0], GREEDY)]) == expected
    assert not adapter.adapters(model)
    with pytest.raises(PagodaError, match="no adapter_config"):
        engine.load_adapter("x", folder / "nowhere")


def test_an_adapter_under_a_name_takes_the_place_of_the_old_one(folder):
    """In the cache too; and not while it is asked for."""
    prompt = tiny.prompt(45, seed=3).tolist()
    engine, fresh = (Engine(load(folder, torch.float32), options=OPTIONS) for _ in range(2))
    engine.load_adapter("a", folder / "adapter-0")
    fresh.load_adapter("a", folder / "adapter-1")
    said(engine, [Request(prompt, GREEDY, adapter="a")])
    group = engine.add(Request(prompt, GREEDY, adapter="a"))
    with pytest.raises(PagodaError, match="in use"):
        engine.load_adapter("a", folder / "adapter-1")
    engine.abort(group)
    engine.load_adapter("a", folder / "adapter-1")
    requests = [Request(prompt, GREEDY, adapter="a")]
    assert said(engine, requests) == said(fresh, requests)


def test_an_adapter_that_the_model_itself_puts_on_is_worn_at_once(folder):
    model, other = (load(folder, torch.float32, quantize="float32") for _ in range(2))
    engine, prompt = Engine(model, options=OPTIONS), tiny.prompt(45, seed=3).tolist()
    bare = said(engine, [Request(prompt, GREEDY)])
    for each in (model, other):
        load_adapter(each, folder / "adapter-0")
    dressed = said(engine, [Request(prompt, GREEDY)])
    assert dressed == said(Engine(other, options=OPTIONS), [Request(prompt, GREEDY)]) != bare


def test_who_waits_for_an_adapter_that_is_gone_hears_of_it(folder, tmp_path):
    shutil.copytree(folder / "adapter-0", tmp_path / "adapter")
    engine = Engine(load(folder, torch.float32), options=EngineOptions(kv_memory=0.05, max_num_seqs=1))
    engine.load_adapter("a", tmp_path / "adapter")
    groups = [engine.add(Request(PROMPTS[0], GREEDY, adapter=name)) for name in (None, "a", None)]
    engine.step()
    shutil.rmtree(tmp_path / "adapter")
    engine.replace(load(folder, torch.float32))
    reasons = {}
    while engine.has_work:
        reasons |= {g: (p.finish_reason, p.error) for g, p in engine.step() if p.finish_reason}
    assert [reasons[g][0] for g in groups] == ["length", "error", "length"]
    assert "adapter 'a' does not go on the new weights" in reasons[groups[1]][1]
    assert engine.adapters.names == []


def test_new_weights_keep_the_adapters(folder):
    engine = Engine(load(folder, torch.float32), options=OPTIONS)
    engine.load_adapter("a", folder / "adapter-0")
    expected = said(engine, [Request(PROMPTS[0], GREEDY, adapter="a")])
    engine.replace(load(folder, torch.float32))
    assert said(engine, [Request(PROMPTS[0], GREEDY, adapter="a")]) == expected
