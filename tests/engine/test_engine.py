"""The engine on tiny random models: company, pieces, guesses, preemption and caching change nothing about an answer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import transformers

from pagoda import PagodaError, Sampling
from pagoda.common import use_huge_pages
from pagoda.engine.blocks import Blocks
from pagoda.engine.engine import Engine, Timing
from pagoda.engine.options import EngineOptions
from pagoda.engine.request import Request
from pagoda.engine.speculate import lookup
from pagoda.models.batch import Batch, Cache, PagedKV
from pagoda.models.layers import Linear, set_weight
from pagoda.models.loader import load
from pagoda.models.registry import from_hf_config
from pagoda.ops import cpu
from pagoda.ops.formats import pack

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = [[5, 6, 7], list(range(1, 90)), [11] * 64, [3], list(range(1, 80)) + [3] * 70]
needs_kernels = pytest.mark.skipif(cpu.kernels is None, reason="the reference's bits depend on the batch")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed: int = 0, **more):
    hf = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
        "initializer_range": 0.2,
        **more,
    }
    model = from_hf_config(hf)
    model.init_weights(torch.Generator().manual_seed(seed))
    model.requires_grad_(False)
    for layer in [m for m in model.modules() if isinstance(m, Linear)] if cpu.kernels is not None else []:
        set_weight(layer, "weight", pack(layer.weight.detach(), "float32"))  # for the kernels, as commands load a model
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@torch.inference_mode()
def recompute(model, prompt, n):
    """Greedy tokens without a cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def engine_of(model, n_blocks: int = 200, draft=None, **options) -> Engine:
    """An engine with so many blocks."""
    engine = Engine(model, options=EngineOptions(kv_memory=1.0, **options), draft=draft)
    size = engine.scheduler.blocks.size
    page = sum(s.page_bytes(size, model.dtype) for m in (model, *([draft] if draft else [])) for s in m.cache_specs())
    return Engine(model, options=EngineOptions(kv_memory=(n_blocks + 1.5) * page / 2**30, **options), draft=draft)


def answers(engine, requests):
    """For each request (token ids, logprobs) of its first answer."""
    found = [([], []) for _ in requests]

    def each(i, piece):
        assert not piece.error
        if piece.index == 0:
            found[i][0].extend(piece.token_ids)
            found[i][1].extend(t.logprob for t in piece.logprobs)

    engine.run(requests, each)
    assert engine.scheduler.blocks.used == 0
    return found


def test_cached_tokens_equal_recomputed_ones(model):
    assert tiny.generate(model, PROMPTS, GREEDY) == [recompute(model, p, 12) for p in PROMPTS]


@pytest.mark.parametrize("speculate", ["", "ngram"])
def test_prompts_in_pieces_change_nothing(model, speculate):
    whole = tiny.generate(model, PROMPTS, GREEDY)
    assert tiny.generate(model, PROMPTS, GREEDY, max_step_tokens=128, speculate=speculate) == whole


KINDS = [
    Sampling(temperature=0, max_new_tokens=20, logprobs=2),
    Sampling(temperature=1.0, seed=3, max_new_tokens=30, logprobs=0),
    Sampling(temperature=1.2, top_p=0.8, seed=4, max_new_tokens=25, logprobs=1, repetition_penalty=1.3),
    Sampling(temperature=0.7, top_k=9, min_p=0.05, seed=5, max_new_tokens=15, logprobs=0, frequency_penalty=0.5),
]


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 128},
        {"n_blocks": 12, "max_step_tokens": 128},  # far too few: sequences give their blocks back again and again
        {"max_num_seqs": 3, "prefix_caching": False},
        {"speculate": "ngram", "n_draft": 5},
    ],
    ids=str,
)
def test_an_answer_is_the_same_bit_for_bit_alone_and_in_company(model, options):
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(97, (130,), generator=generator).tolist()
    requests = []
    for i in range(24):
        n = int(torch.randint(1, 150, (1,), generator=generator))
        own = torch.randint(97, (n,), generator=generator).tolist()
        requests.append(Request((shared if i % 3 == 0 else []) + own, KINDS[i % len(KINDS)], priority=i % 2))
    alone = [answers(engine_of(model), [r])[0] for r in requests]
    engine = engine_of(model, **options)
    assert answers(engine, requests) == alone
    assert answers(engine, requests[::-1]) == alone[::-1]  # now with a full prefix cache
    if "n_blocks" in options:
        assert engine.stats()["preemptions"] > 0
    elif options.get("prefix_caching", True):
        assert engine.stats()["prefix_hit_tokens"] > 0


@needs_kernels
@pytest.mark.parametrize("other", [1, 0], ids=["another model", "the same model"])
def test_a_draft_model_changes_nothing(model, other):
    requests = [Request(p, KINDS[i % len(KINDS)]) for i, p in enumerate(PROMPTS)]
    alone = [answers(engine_of(model), [r])[0] for r in requests]
    engine = engine_of(model, draft=make(seed=other), n_draft=3, max_step_tokens=128)
    assert answers(engine, requests) == alone
    assert answers(engine, requests) == alone
    steps, run = [], engine.runner.run
    engine.runner.run = lambda works, **o: steps.append(works) or run(works, **o)
    assert answers(engine, requests[:1]) == alone[:1]
    if not other:  # who guesses right takes four tokens a step, behind the prompt's
        assert len(steps) == 1 + 5


def test_lookup_finds_what_stood_behind_the_last_tokens():
    assert lookup([1, 2, 3, 4, 5, 6, 2, 3], 3) == [4, 5, 6]
    assert lookup([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]  # the latest place
    assert lookup([1, 2, 3], 3) == []


def test_parallel_answers_share_the_prompt_and_differ(model):
    engine = engine_of(model)
    o = Sampling(temperature=1.0, seed=1, n=4, max_new_tokens=10)
    group = engine.add(Request(PROMPTS[1], o))
    engine.step()
    assert engine.scheduler.blocks.used == 2  # of 64 tokens: 89 tokens once
    engine.step()
    assert engine.scheduler.blocks.used == 1 + 4  # the second block is written by each
    said = [[s.tokens[89:][:2] for s in group.sequences]]
    assert len({tuple(t) for t in said[0]}) > 1
    while engine.has_work:
        engine.step()
    assert engine.scheduler.blocks.used == 0
    single = Sampling(temperature=1.0, seed=3, max_new_tokens=10)  # the third answer has the seed behind two others
    tokens = {}
    engine.run([Request(PROMPTS[1], o)], lambda i, p: tokens.setdefault(p.index, []).extend(p.token_ids))
    assert tokens[2] == tiny.generate(model, [PROMPTS[1]], single)[0]


def test_best_of_returns_the_likeliest(model):
    engine, o = engine_of(model), dict(temperature=1.0, seed=1, max_new_tokens=6, logprobs=0)
    means, best = {}, []

    def mean(i, p):
        means.setdefault(p.index, []).extend(t.logprob for t in p.logprobs)

    engine.run([Request([5, 6, 7], Sampling(n=6, **o))], mean)
    engine.run([Request([5, 6, 7], Sampling(n=2, best_of=6, **o))], lambda i, p: best.append(p))
    expected = sorted((sum(v) / len(v) for v in means.values()), reverse=True)[:2]
    assert [sum(t.logprob for t in p.logprobs) / 6 for p in best] == pytest.approx(expected, abs=1e-6)
    assert [p.index for p in best] == [0, 1]
    for seed in range(4):  # whoever spoke first need not be among the best
        o = dict(temperature=1.0, seed=seed, max_new_tokens=6, best_of=6, prompt_logprobs=0)
        engine.run([Request([5, 6, 7], Sampling(**o))], lambda i, p: best.append(p))
        assert [t and t.token for t in best[-1].prompt_logprobs] == [None, 6, 7]


def test_beam_search_equals_transformers(tmp_path):
    config = transformers.LlamaConfig(**tiny.KV, initializer_range=0.5, eos_token_id=7, pad_token_id=0)
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    for prompt, width, n, penalty, most in (
        ([5, 6, 9], 4, 2, 1.0, 10),
        ([1, 2], 3, 3, 0.5, 14),
        ([9] * 20, 5, 1, 2.0, 8),
    ):
        expected = reference.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            length_penalty=penalty,
            max_new_tokens=most,
            eos_token_id=7,
        )
        expected = [row[len(prompt) :].tolist() for row in expected]
        expected = [row[: row.index(7)] if 7 in row else row for row in expected]
        o = Sampling(beam_width=width, n=n, length_penalty=penalty, max_new_tokens=most, stop_token_ids=[7])
        found = []
        engine = engine_of(model)
        engine.run([Request(prompt, o), Request([3, 4], GREEDY)], lambda i, p: i or found.append(p.token_ids))  # noqa: B023
        assert found == expected
        assert engine.scheduler.blocks.used == 0


def test_log_probabilities_are_the_models(model):
    o = Sampling(temperature=0.5, seed=1, logprobs=3, prompt_logprobs=2, max_new_tokens=5, repetition_penalty=2.0)
    for options in ({}, {"max_step_tokens": 128, "n_blocks": 8}):
        pieces = []
        others = [Request(p, GREEDY) for p in PROMPTS]
        engine = engine_of(model, **options)
        engine.run([*others, Request(PROMPTS[4], o)], lambda i, p: i < 5 or pieces.append(p))  # noqa: B023
        new = [t for p in pieces for t in p.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor(PROMPTS[4] + new)).log_softmax(-1)
        first, *told = pieces[0].prompt_logprobs
        assert first is None
        assert [t.token for t in told] == PROMPTS[4][1:]
        told += [t for p in pieces for t in p.logprobs]
        for i, t in enumerate(told):
            assert t.logprob == pytest.approx(float(expected[i, t.token]), abs=1e-4)
            values, places = expected[i].topk(3)
            assert [p for p, _ in t.top] == places.tolist()[: len(t.top)]
            assert [v for _, v in t.top] == pytest.approx(values.tolist()[: len(t.top)], abs=1e-4)
        assert len(told[-1].top) == 3
        assert len(told[0].top) == 2


def test_bias_stop_tokens_and_least_lengths(model):
    token = recompute(model, [5, 6, 7], 3)[-1]
    stopped = tiny.generate(model, [[5, 6, 7]], Sampling(temperature=0, max_new_tokens=12, stop_token_ids=[token]))[0]
    assert token not in stopped
    assert len(stopped) < 3
    o = Sampling(temperature=0, max_new_tokens=12, min_new_tokens=8, stop_token_ids=[token])
    assert len(tiny.generate(model, [[5, 6, 7]], o)[0]) >= 8
    assert tiny.generate(model, [[5]], Sampling(temperature=0, max_new_tokens=4, logit_bias={42: 1e4})) == [[42] * 4]


def test_lower_priorities_and_earlier_requests_go_first(model):
    engine = engine_of(model, max_num_seqs=1)
    ended = []
    requests = [Request([i + 1], GREEDY, priority=p) for i, p in enumerate((5, 5, 0, 9, 0))]
    engine.run(requests, lambda i, piece: piece.finish_reason and ended.append(i))
    assert ended == [2, 4, 0, 1, 3]


def test_a_long_prompt_leaves_half_a_step_to_others(model):
    engine = engine_of(model, max_step_tokens=256)
    long, short = engine.add(Request([7] * 390, GREEDY)), engine.add(Request([5] * 20, GREEDY))
    engine.step()
    assert len(short.sequences[0].new) == 1
    assert not long.sequences[0].new


def test_aborted_requests_free_their_blocks(model):
    engine = engine_of(model)
    groups = [engine.add(Request(p, Sampling(n=2, max_new_tokens=50))) for p in PROMPTS]
    engine.step()
    engine.step()
    for group in groups:
        engine.abort(group)
    assert engine.scheduler.blocks.used == 0
    assert not engine.has_work
    assert engine.step() == []


def test_an_error_in_one_request_fails_that_one_alone(model):
    engine = engine_of(model)
    expected = answers(engine, [Request([5, 6, 7], GREEDY)])
    bad, good = (engine.add(Request([5, 6, 7], Sampling(temperature=t, max_new_tokens=12))) for t in (1, 0))

    def breaks(scores):
        raise RuntimeError("broken")

    bad.sequences[0].chooser.adjust = breaks
    bad.sequences[0].chooser.bias = ()
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    assert [p.error for g, p in pieces if g is bad] == ["broken"]
    assert [t for g, p in pieces if g is good for t in p.token_ids] == expected[0][0]


def test_prompts_that_wait_for_each_others_blocks_go_on():
    model = make(max_position_embeddings=2048)
    requests = [Request([t] * n, Sampling(temperature=0, max_new_tokens=4)) for t, n in ((5, 780), (6, 500), (7, 600))]
    alone = [answers(engine_of(model, 40), [r])[0][0] for r in requests]
    engine = engine_of(model, n_blocks=13)
    groups, tokens = [engine.add(r) for r in requests], [[], [], []]
    for _ in range(60):
        for group, piece in engine.step():
            tokens[groups.index(group)] += piece.token_ids
    assert not engine.has_work
    assert tokens == alone
    assert engine.scheduler.blocks.used == 0


def test_beams_beside_guesses(model):
    beams = Sampling(beam_width=2, max_new_tokens=20)
    requests = [Request([5, 6, 7, 5, 6, 7, 5, 6], o) for o in (beams, GREEDY)]
    expected = answers(engine_of(model), requests)
    assert answers(engine_of(model, speculate="ngram"), requests) == expected


def test_beams_go_on_where_ends_are_likely(model):
    """All of the likeliest tokens may be ends: the next ones go on, and a search that has nothing left is over."""
    first = [answers(engine_of(model), [Request([5, 6], Sampling(temperature=0, max_new_tokens=1))])[0][0][0]]
    while len(first) < 4:
        bias = dict.fromkeys(first, -10000.0)
        first += answers(
            engine_of(model), [Request([5, 6], Sampling(temperature=0, max_new_tokens=1, logit_bias=bias))]
        )[0][0]
    options = Sampling(beam_width=1, max_new_tokens=3, stop_token_ids=first)
    ((tokens, _),) = answers(engine_of(model), [Request([5, 6], options)])
    assert not set(tokens) & set(first)
    every = Sampling(beam_width=2, max_new_tokens=3, stop_token_ids=list(range(97)))
    assert answers(engine_of(model), [Request([5, 6], every)])[0][0] == []


def test_several_streams_may_be_open(model):
    engine = engine_of(model)
    expected = [answers(engine_of(model), [Request(p, GREEDY)])[0][0] for p in PROMPTS]
    streams = [engine.stream([Request(p, GREEDY)]) for p in PROMPTS]
    pieces = [[next(s)] for s in streams]
    for s, seen in reversed(list(zip(streams, pieces))):
        seen += s
    assert [[t for _, p in seen for t in p.token_ids] for seen in pieces] == expected

    def work(i):
        return [[t for _, p in engine.stream([Request(PROMPTS[i], GREEDY)]) for t in p.token_ids] for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(work, range(4))):
            assert found == [expected[i]] * 5
    left = engine.stream([Request(PROMPTS[0], GREEDY)])
    next(left)
    left.close()
    assert engine.scheduler.blocks.used == 0
    assert not engine.inboxes


def test_new_weights_that_do_not_fit_leave_the_old_ones(model, monkeypatch):
    engine = engine_of(model, max_num_seqs=1)
    groups = [engine.add(Request(p, GREEDY)) for p in PROMPTS[:2]]
    engine.step()
    tokens, errors = {groups[0]: groups[0].sequences[0].new, groups[1]: []}, []
    engine.options = EngineOptions(kv_memory=1e-6)
    engine.replace(make(seed=5))
    while engine.has_work:
        try:
            for group, piece in engine.step():
                tokens[group] += piece.token_ids
        except PagodaError as e:
            errors.append(str(e))
    assert len(errors) == 1
    assert "kv_memory is too small" in errors[0]
    assert [tokens[g] for g in groups] == [recompute(model, p, 12) for p in PROMPTS[:2]]


def test_new_weights_wait_for_what_runs(model):
    other = make(seed=5)
    engine = engine_of(model, max_num_seqs=1)
    first, second = (engine.add(Request(PROMPTS[1], GREEDY)) for _ in range(2))
    engine.step()
    engine.replace(other)
    tokens = {first: [], second: []}
    tokens[first] += first.sequences[0].new
    while engine.has_work:
        for group, piece in engine.step():
            tokens[group] += piece.token_ids
    assert tokens[first] == recompute(model, PROMPTS[1], 12)
    assert tokens[second] == recompute(other, PROMPTS[1], 12)
    assert engine.stats()["prefix_hit_tokens"] == 0


def test_embeddings_are_the_means_of_the_last_states(model):
    with torch.inference_mode():
        states = [model.hidden(torch.tensor(p), Batch.of([len(p)])) for p in PROMPTS]
    engine = engine_of(model)
    for pooling, expected in (("mean", [s.mean(0) for s in states]), ("last", [s[-1] for s in states])):
        expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1)
        torch.testing.assert_close(engine.embed(PROMPTS, pooling), expected, atol=1e-5, rtol=1e-4)


def test_generation_ends_at_the_context(model):
    assert len(tiny.generate(model, [[5] * 380], Sampling(temperature=0, max_new_tokens=500))[0]) == 20


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 400, "400 tokens and the model's context is 400"),
        ([97], "token 97 .*vocabulary"),
        ([3, -1], "token -1 "),
    ],
)
def test_impossible_prompts_are_refused(model, prompt, message):
    with pytest.raises(PagodaError, match=message):
        Engine(model).add(Request(prompt, GREEDY))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], GREEDY, adapter="none"), "no adapter 'none'"),
        (Request([1], Sampling(logit_bias={97: 1.0})), "token 97"),
        (Request([1], Sampling(stop_token_ids=[97], min_new_tokens=3)), "stop_token_ids: token 97"),
        (Request([1], Sampling(beam_width=100, max_new_tokens=390)), "beams do not fit"),
    ],
)
def test_impossible_requests_are_refused(model, request_, message):
    with pytest.raises(PagodaError, match=message):
        engine_of(model, n_blocks=50).add(request_)


def test_a_cache_too_small_for_anything_is_refused(model):
    with pytest.raises(PagodaError, match="kv_memory is too small"):
        Engine(model, options=EngineOptions(kv_memory=1e-6))


def test_an_interrupted_prefill_has_a_summary():
    assert Timing(prefill_tokens=2048).summary() == "[]"


def test_embeddings_and_ids_are_the_same_input(model):
    ids = torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(model.embed(ids)), model(ids))


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 8.0]}


def scaled(rope, original=16):
    """A model whose rotary angles depend on the length of the text."""
    rope = {"rope_theta": 100.0, "original_max_position_embeddings": original, **rope}
    return make(num_key_value_heads=6, max_position_embeddings=200, rope_parameters=rope)


@pytest.mark.parametrize("step", [512, 128])
def test_longrope_computes_a_sequence_again_when_it_outgrows_the_original_context(step):
    model = scaled(LONGROPE, 140)
    prompts = [[5, 6, 7], list(range(1, 90)) + [5] * 45, [11] * 140, list(range(30, 60))]
    expected = [recompute(model, p, 20) for p in prompts]
    assert tiny.generate(model, prompts, Sampling(temperature=0, max_new_tokens=20), max_step_tokens=step) == expected


def test_dynamic_scaling_does_not_see_the_pieces_of_a_prompt():
    model = scaled({"rope_type": "dynamic", "factor": 2.0})
    model.rope.block_size = 16
    assert tiny.generate(model, PROMPTS, GREEDY, max_step_tokens=128) == tiny.generate(model, PROMPTS, GREEDY)


# The pool of blocks


def test_blocks_are_remembered_until_their_memory_is_needed():
    blocks = Blocks(4, 2)
    mine = [blocks.take() for _ in range(3)]
    assert blocks.remember("a", [1, 2, 3, 4, 5], mine, 0) == 2
    blocks.release(mine)
    assert blocks.used == 0
    assert blocks.find("a", [1, 2, 3, 4, 9], 5) == mine[:2]
    assert blocks.find("b", [1, 2, 3, 4, 9], 5) == []  # another adapter's
    assert blocks.find("a", [1, 2, 3, 4, 9], 3) == mine[:1]
    assert blocks.find("a", [3, 4], 2) == []  # stood behind something else
    taken = [blocks.take() for _ in range(3)]  # the end of a text is forgotten before its beginning
    assert mine[0] not in taken
    assert blocks.find("a", [1, 2, 3, 4], 4) == mine[:1]
    blocks.share(mine[0])
    with pytest.raises(IndexError):
        blocks.take()
    blocks.clear()
    blocks.release([*taken, mine[0]])
    assert blocks.free == 4
    assert blocks.find("a", [1, 2], 2) == []


def test_the_cache_stays_within_its_memory(model):
    for gib in (0.001, 0.003):
        engine = Engine(model, options=EngineOptions(kv_memory=gib, max_num_seqs=64))
        cache = engine.runner.cache
        size = sum(t.nbytes for layer in cache.layers for t in (layer.k, layer.v))
        assert 0.8 * gib * 2**30 < size <= gib * 2**30
        assert sum(len(t) for t in tiny.generate(model, PROMPTS * 3, GREEDY)) == 12 * 15


@needs_kernels
@pytest.mark.parametrize(
    ("more", "from_tokens"),
    [({}, True), ({"model_type": "gemma", "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"}, False)],
)
def test_recorded_steps_choose_what_python_chooses(more, from_tokens):
    """Recorded from the tokens on, or where the embedding is more than kernels (Gemma's factor) behind it. The second
    request needs a longer table of angles, while the first recording still reads the one before."""
    model = make(**more)
    long = [[7] * 300, [9, 8]]
    recorded, plain = engine_of(model), engine_of(model)
    plain.runner.most_recorded = 0
    for prompts in ([[5, 6, 7]], long, [[5, 6, 7]]):
        requests = [Request(p, GREEDY) for p in prompts]
        assert [a[0] for a in answers(recorded, requests)] == [a[0] for a in answers(plain, requests)]
    decoders = recorded.runner.decoders.values()
    assert not plain.runner.decoders
    assert len(decoders) == 2
    assert all(d.recording.complete and (d.inputs is None) == from_tokens for d in decoders)


@needs_kernels
def test_recorded_steps_draw_what_python_draws(model):
    """A step draws by itself while nobody's scores are adjusted: the request with a penalty ends before the others."""
    requests = [
        Request([5, 6, 7], Sampling(temperature=0.9, top_p=0.9, seed=3, max_new_tokens=20)),
        Request([5, 6], Sampling(temperature=1.2, seed=4, repetition_penalty=1.3, max_new_tokens=6)),
        Request([8], Sampling(temperature=1.5, top_k=9, min_p=0.01, seed=5, max_new_tokens=20)),
    ]
    recorded, plain, drawn = engine_of(model), engine_of(model), []
    plain.runner.most_recorded = 0
    run = recorded.runner.run

    def watched(works, **options):
        scores = run(works, **options)
        drawn.append(recorded.runner.chosen is not None)
        return scores

    recorded.runner.run = watched
    assert [a[0] for a in answers(recorded, requests)] == [a[0] for a in answers(plain, requests)]
    assert not drawn[1]
    assert drawn[-1]
    assert sum(drawn) >= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_tensors_of_a_cache_share_no_memory(dtype):
    cache = Cache([PagedKV(2, 6), PagedKV(3, 10)], 5, 4, dtype, torch.device("cpu"))
    tensors = [t for c in cache.layers for t in (c.k, c.v, c.k_scale, c.v_scale) if t is not None]
    assert len(tensors) == (8 if dtype == torch.int8 else 4)
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert all((t == i).all() for i, t in enumerate(tensors))
    assert [tuple(c.k.shape) for c in cache.layers] == [(5, 4, 2, 6), (5, 4, 3, 10)]


def huge_kb() -> int:
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("AnonHugePages"))


def huge_pages_on_request() -> bool:
    """Whether the system gives pages of 2 MB where they are asked for, and only there."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as f:
            if "[madvise]" not in f.read():
                return False
        before, memory = huge_kb(), torch.empty(2**26, dtype=torch.uint8)
        use_huge_pages(memory.data_ptr(), memory.nbytes)
        memory.zero_()
        return huge_kb() > before
    except (OSError, StopIteration):
        return False


@pytest.mark.skipif(not huge_pages_on_request(), reason="the system does not give pages of 2 MB on request")
@pytest.mark.parametrize("n_tokens", [1000, 5000])
def test_only_many_tokens_take_large_pages(n_tokens):
    cache = Cache([PagedKV(4, 64)] * 2, 2048, 16, torch.bfloat16, torch.device("cpu"))  # 1 KB a token and layer
    before = huge_kb()
    cache.expect(n_tokens)
    for layer in cache.layers:
        layer.k[: n_tokens // 16].zero_()
    assert cache.in_huge_pages == (huge_kb() > before) == (n_tokens > 2048)


def test_waiting_and_running_tokens_are_expected_together(model, monkeypatch):
    monkeypatch.setattr(Cache, "HUGE", 50 * sum(s.page_bytes(1, model.dtype) for s in model.cache_specs()[:1]))
    engine = engine_of(model)
    for i, n in enumerate((20, 20, 20)):
        engine.add(Request(list(range(1, n + 1)), GREEDY))
        assert engine.runner.cache.in_huge_pages == (i == 2)
    engine = engine_of(model, draft=make(1))
    engine.add(Request(list(range(1, 60)), GREEDY))
    assert [cache.in_huge_pages for cache in engine.caches] == [True, True]
