"""`LLM` on the default model, beside transformers on the same (dequantized) weights."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import tiny
import torch

from pagoda import LLM, PagodaError, Sampling
from pagoda.data.vocabulary import byte_tokenizer
from pagoda.engine.llm import load_model
from pagoda.engine.options import Weights
from pagoda.engine.request import Request
from pagoda.models.batch import Batch
from pagoda.ops import cpu
from pagoda.ops.formats import PackedWeight


def test_nf4_is_invariant_when_asked(tmp_path):
    """Alone a prompt has too few rows to be multiplied in another way, in company not."""
    tiny.saved("llama", tmp_path)
    model, _, _ = load_model(tmp_path, Weights(device="cpu", quantize="nf4", batch_invariant=True))
    assert all(m.invariant for m in model.modules() if isinstance(m, PackedWeight))
    prompts = [tiny.prompt(50, s) for s in range(4)]
    with torch.inference_mode():
        together = model(torch.cat(prompts), Batch.of([50] * 4))
        alone = model(prompts[0])
    if cpu.kernels is not None:
        assert torch.equal(together[:50], alone)


def test_a_stream_may_stay_open_beside_other_answers(tmp_path):
    tiny.saved("llama", tmp_path)
    byte_tokenizer().save(tmp_path)
    llm, options = LLM.load(tmp_path), dict(temperature=0, max_new_tokens=20, ignore_eos=True)
    whole, other = (llm.generate(t, **options).token_ids for t in ([5, 6, 7], [8, 9]))
    pieces = llm.engine.stream([Request([5, 6, 7], Sampling(**options))])
    seen = list(next(pieces)[1].token_ids)
    assert llm.generate([8, 9], **options).token_ids == other
    assert seen + [t for _, piece in pieces for t in piece.token_ids] == whole
    assert len(llm.generate([5, 6, 7], Sampling(**options), max_new_tokens=3).token_ids) == 3


def test_two_models_in_two_threads(tmp_path):
    """Each records its steps while the other computes."""
    tiny.saved("llama", tmp_path)
    models = [load_model(tmp_path, Weights(device="cpu", quantize="int8"))[0] for _ in range(2)]
    options = Sampling(temperature=0, max_new_tokens=30, ignore_eos=True)
    expected = tiny.generate(models[0], [[1, 2, 3]], options)

    def work(model):
        return [tiny.generate(model, [[1, 2, 3]], options) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(work, models):
            assert answers == [expected] * 20


TEXT = "The sun rose over the quiet harbour, and the first boats left for the open sea."


@pytest.fixture(scope="session")
def llm(default_model):
    return LLM.load(default_model, dtype="float32")


@pytest.fixture(scope="session")
def reference(default_model):
    import gguf
    from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

    # Told its configuration, transformers parses the file once; it makes its table of names for every module anew.
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        return LlamaForCausalLM.from_pretrained(
            default_model.parent,
            config=config,
            gguf_file=default_model.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )


def test_greedy_tokens_equal_transformers(llm, reference):
    done = llm.generate(TEXT, temperature=0, max_new_tokens=32, ignore_eos=True)
    ids = torch.tensor([llm.encode(TEXT)])
    expected = reference.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert done.token_ids == expected.tolist()
    assert done.finish_reason == "length"
    assert done.prompt_tokens == ids.shape[1]


@torch.inference_mode()
@pytest.mark.parametrize("ids", [[1, 2, 49152], [1, 2, -1], [1, 49152, 2], [1, 2, 2**40]])
def test_tokens_outside_the_vocabulary_have_no_score(llm, ids):
    with pytest.raises(PagodaError, match="outside the model's vocabulary of 49152"):
        llm.score(ids)


def test_scores_equal_transformers(llm, reference):
    ids = torch.tensor(llm.encode(TEXT))
    expected = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    tokens, scores = zip(*llm.score(TEXT))
    assert list(tokens) == ids[1:].tolist()
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-3, rtol=1e-4)


def test_the_stream_is_the_completion(llm):
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": 30}
    pieces = list(llm.stream("Hello 你好 🙂", **options))
    assert len(pieces) > 5
    assert "".join(pieces) == llm.generate("Hello 你好 🙂", **options).text


def test_several_prompts_at_once(llm):
    prompts = ["One, two, three,", "The capital of France is"]
    done = llm.generate(prompts, temperature=0, max_new_tokens=8)
    assert [d.text for d in done] == [llm.generate(p, temperature=0, max_new_tokens=8).text for p in prompts]
    assert done[1].text.startswith(" Paris")


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llm):
    whole = llm.generate("One, two, three,", temperature=0, max_new_tokens=20).text
    stop = whole[5:9]
    done = llm.generate("One, two, three,", temperature=0, max_new_tokens=20, stop=stop)
    assert done.text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"
    unmet = llm.generate("One, two, three,", temperature=0, max_new_tokens=20, stop=whole[-3:] + "never")
    assert unmet.text == whole  # what looked like the start of a stop text comes out in the end


def test_chat_ends_by_itself_and_knows_the_conversation(llm):
    messages = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name? Answer with the name only."},
    ]
    done = llm.chat(messages, temperature=0, max_new_tokens=60)
    assert "Ada" in done.text
    assert done.finish_reason == "stop"


def test_a_prompt_longer_than_the_context_is_refused(llm):
    with pytest.raises(PagodaError, match="context is 8192"):
        llm.generate([1] * 9000, max_new_tokens=1)


def test_a_second_prompt_that_begins_alike_starts_faster_with_the_same_answer(llm):
    text = TEXT * 12
    fresh = llm.generate(text, temperature=0, max_new_tokens=8)
    before = llm.engine.stats()["prefix_hit_tokens"]
    assert llm.generate(text, temperature=0, max_new_tokens=8).token_ids == fresh.token_ids
    assert llm.engine.stats()["prefix_hit_tokens"] - before >= 128
    assert llm.timing.prefill_tokens < 100


def test_several_answers_and_their_log_probabilities(llm):
    done = llm.generate(TEXT, n=3, temperature=1.0, seed=5, max_new_tokens=6, logprobs=1)
    answers = [done, *done.others]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    assert [t.token for t in done.logprobs] == done.token_ids
    ids = llm.encode(TEXT)
    for a in answers:
        scores = dict(enumerate(llm.score(ids + a.token_ids)[-6:]))
        for i, told in enumerate(a.logprobs):
            assert scores[i] == (told.token, pytest.approx(told.logprob, abs=1e-3))


def test_guesses_change_nothing(llm):
    from pagoda.engine.engine import Engine
    from pagoda.engine.options import EngineOptions, Sampling
    from pagoda.engine.request import Request

    prompt = llm.chat_ids([{"role": "user", "content": f"Repeat this: {TEXT}"}])
    expected = llm.generate(prompt, temperature=0, max_new_tokens=30)
    engine = Engine(llm.model, llm.tokenizer, EngineOptions(speculate="ngram"), llm.kv_dtype)
    tokens, steps = [], []
    run = engine.runner.run
    engine.runner.run = lambda works, **o: steps.append(len(works)) or run(works, **o)
    o = Sampling(temperature=0, max_new_tokens=30)
    engine.run([Request(prompt, o)], lambda _, piece: tokens.extend(piece.token_ids))
    assert tokens == expected.token_ids
    assert len(steps) < len(tokens)  # the answer repeats the question
