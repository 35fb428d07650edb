"""Rotary angles of every scaling against transformers' own functions, and per sequence."""

import pytest
import tiny
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagoda.common import PagodaError
from pagoda.models.batch import Batch
from pagoda.models.registry import from_hf_config
from pagoda.models.rope import Rope, alibi_slopes

CONTEXT, HEAD = 64, 16
SCALINGS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "yarn-untruncated": dict(factor=4.0, original_max_position_embeddings=16, truncate=False, beta_fast=4),
    "yarn-mscale": dict(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.1),
    "yarn-attention_factor": dict(factor=4.0, original_max_position_embeddings=16, attention_factor=1.3),
    "longrope": dict(
        short_factor=[1.0 + 0.1 * i for i in range(8)],
        long_factor=[2.0 + i for i in range(8)],
        original_max_position_embeddings=16,
    ),
    "longrope-factor": dict(
        short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=16, factor=3.0
    ),
}


@pytest.mark.parametrize("length", [10, 16, 17, 64, 90])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_match_transformers(name, length):
    params = {"rope_type": name.split("-")[0], "rope_theta": 1000.0, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=HEAD * 2, num_attention_heads=2, max_position_embeddings=CONTEXT, rope_parameters=dict(params)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[params["rope_type"]](config, "cpu", seq_len=length)
    rope = Rope(params, HEAD, CONTEXT)
    inv_freq, our_factor = rope.frequencies(torch.tensor([length]) if rope.by_length else None)
    torch.testing.assert_close(inv_freq.view(-1), expected, rtol=1e-5, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_scaling_by_length_looks_at_each_sequence_alone(name):
    rope = Rope({"rope_type": name, "rope_theta": 1000.0, **SCALINGS[name]}, HEAD, 16)
    lengths = [9, 40, 17]
    batch = Batch.of(lengths)
    cos, sin = rope(batch.positions, batch.token_lens(), batch.max_seq_len)
    for n, c, s in zip(lengths, cos.split(lengths), sin.split(lengths)):
        alone = Batch.of([n])
        expected = rope(alone.positions, alone.token_lens(), n)
        assert torch.equal(c, expected[0])
        assert torch.equal(s, expected[1])


def test_angles_beyond_the_first_table_and_at_scattered_positions():
    rope = Rope({}, 8, 16)
    for positions in ([0, 1], [700, 3], [5, 100000]):
        p = torch.tensor(positions)
        cos, sin = rope(p, None, max(positions))
        angles = p.double()[:, None] / 10000 ** (torch.arange(0, 8, 2).double() / 8)
        torch.testing.assert_close(cos, angles.cos().float(), atol=0.02 if max(positions) > 1e4 else 1e-4, rtol=0)
        torch.testing.assert_close(sin, angles.sin().float(), atol=0.02 if max(positions) > 1e4 else 1e-4, rtol=0)


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == pytest.approx([2.0**-i for i in range(1, 9)])
    twelve = [2 ** (-i) for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert alibi_slopes(12).tolist() == pytest.approx(twelve)


def test_unknown_scaling_and_missing_parameters_are_refused():
    with pytest.raises(PagodaError, match="'spiral' is not supported"):
        Rope({"rope_type": "spiral"}, 8, 16)
    with pytest.raises(PagodaError, match="'linear' needs factor"):
        Rope({"rope_type": "linear"}, 8, 16)
    hf = {"model_type": "llama", **tiny.KV, "rope_scaling": {"type": "longrope", "factor": 2}}
    with pytest.raises(PagodaError, match=r"config\.json: rotary scaling 'longrope' needs short_factor, long_factor"):
        from_hf_config(hf)
