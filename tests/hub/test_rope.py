import itertools

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinsmith.core.errors import UserError
from tinsmith.hub.families.rope import read_rope, read_scaling, with_rope_scaling, write_rope
from tinsmith.nn.attention.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling, frequencies

YARN = [
    {"factor": factor, "original_max_position_embeddings": original} | betas | attention
    for factor, original, betas, attention in itertools.product(
        (1.0, 4.0, 16.0),
        (16, 2048, 65536),
        ({}, {"beta_fast": 4.0, "beta_slow": 1.0}, {"beta_fast": 64, "beta_slow": 2}),
        ({}, {"attention_factor": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.7}),
    )
]


def theirs(kind, parameters, theta, width):
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": kind, "rope_theta": theta} | parameters,
    )
    return ROPE_INIT_FUNCTIONS[kind](config)


def ours(kind, parameters, theta, width):
    data = {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | parameters}
    rope = read_rope(data, 32768, "config.json")
    return frequencies(rope, width, torch.float32, None)


@pytest.mark.parametrize("width", [8, 64, 80, 96])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_yarn_frequencies_and_factor_equal_transformers(width, theta):
    for parameters in YARN:
        frequency, factor = ours("yarn", parameters, theta, width)
        wanted, wanted_factor = theirs("yarn", parameters, theta, width)
        torch.testing.assert_close(frequency, wanted, rtol=3e-7, atol=0, msg=str(parameters))
        assert factor == pytest.approx(wanted_factor, abs=1e-12), parameters


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("linear", {"factor": 2.5}),
        (
            "llama3",
            {
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        (
            "llama3",
            {
                "factor": 32.0,
                "original_max_position_embeddings": 512,
                "low_freq_factor": 2.0,
                "high_freq_factor": 3.0,
            },
        ),
    ],
)
def test_linear_and_llama3_frequencies_equal_transformers(kind, parameters):
    for width, theta in ((16, 1e4), (64, 5e5), (128, 1e6)):
        frequency, factor = ours(kind, parameters, theta, width)
        wanted, wanted_factor = theirs(kind, parameters, theta, width)
        torch.testing.assert_close(frequency, wanted, rtol=1e-5, atol=0)
        assert factor == wanted_factor


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=1e6),
        Rope(scaling=LinearScaling(factor=2.0)),
        Rope(
            scaling=Llama3Scaling(
                factor=8.0, original_max_seq_len=64, low_freq_factor=2.0, high_freq_factor=5.0
            )
        ),
        Rope(theta=5e5, scaling=YarnScaling(factor=4.0, original_max_seq_len=64)),
        Rope(
            scaling=YarnScaling(
                factor=4.0,
                original_max_seq_len=64,
                beta_fast=8.0,
                beta_slow=2.0,
                attention_factor=1.1,
            )
        ),
    ],
)
def test_written_rope_keys_read_back_in_the_formats_of_transformers_4_and_5(rope):
    written = write_rope(rope)
    assert read_rope(written, 999, "config.json") == rope
    four = {key: written[key] for key in ("rope_theta", "rope_scaling")}
    assert read_rope(four, 999, "config.json") == rope
    five = {"rope_parameters": written["rope_parameters"]}
    assert read_rope(five, 999, "config.json") == rope


def test_a_file_without_rope_keys_means_theta_10000_and_no_scaling():
    for data in ({}, {"rope_scaling": None, "rope_parameters": {}}):
        assert read_rope(data, 64, "config.json") == Rope(theta=10000.0, scaling=None)


def test_the_original_context_may_be_outside_of_the_section_or_default():
    inner = {"rope_type": "yarn", "factor": 2.0}
    read = read_rope({"rope_scaling": inner}, 48, "config.json").scaling
    assert read == YarnScaling(factor=2.0, original_max_seq_len=48)
    beside = {"rope_scaling": inner, "original_max_position_embeddings": 32}
    assert read_rope(beside, 48, "config.json").scaling == YarnScaling(
        factor=2.0, original_max_seq_len=32
    )
    ratio = {"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 16}
    assert read_rope(ratio, 64, "config.json").scaling == YarnScaling(
        factor=4.0, original_max_seq_len=16
    )


@pytest.mark.parametrize(
    ("data", "output"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling: rope_type: 'dyn",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling: rope_type: ['yarn'] is not one"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: rope_type: 'mrope' is not one of"),
        ({"rope_scaling": [1]}, "rope_scaling: must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: required"),
        (
            {"rope_scaling": {"factor": 2.0}},
            "rope_scaling: factor: unknown for rope_type 'default'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fats": 3}},
            "rope_scaling: beta_fats: unknown for rope_type 'yarn'. Did you mean 'beta_fast'?",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
            "rope_scaling: factor=0.5 must be",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling: factor: must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor: must be"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
            "rope_scaling: truncate: False is not supported",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope_scaling: high_freq_factor: must be a number above 4",
        ),
        ({"rope_theta": 0}, "rope_theta: must be a number above 1"),
        ({"rope_theta": True}, "rope_theta: must be a number above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "rope_parameters: partial_rotary_factor: 0.25 is not supported",
        ),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta: given twice"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_theta": 1e4},
            },
            "rope_scaling: contradicts rope_parameters",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: full_attention: unknown for rope_type 'default'",
        ),
    ],
)
def test_unsupported_or_invalid_rope_scaling_gives_one_line_with_the_key(data, output):
    with pytest.raises(UserError) as caught:
        read_rope(data, 64, "config.json")
    assert output in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_requested_rope_scaling_may_use_either_key_format(model):
    config = model().config
    words = {"kind": "yarn", "factor": 4, "original_max_seq_len": 64}
    theirs = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    short = {"type": "yarn", "factor": 4.0}
    for scaling in (words, theirs, short):
        found = with_rope_scaling(config, scaling)
        assert found.rope.scaling == YarnScaling(factor=4.0, original_max_seq_len=64)
        assert found.max_seq_len == 256
    assert with_rope_scaling(config, None) == config
    assert with_rope_scaling(config, {"kind": "linear", "factor": 2}).max_seq_len == 128
    assert (
        with_rope_scaling(with_rope_scaling(config, words), {"rope_type": "default"}).rope
        == config.rope
    )


def test_invalid_requested_rope_scaling_gives_one_line(model):
    config = model().config
    for scaling, output in (
        ({"kind": "yarm", "factor": 4}, "'yarm' is not one of"),
        ({"kind": "yarn", "factor": 4}, "original_max_seq_len: required key is missing"),
        ({"kind": "yarn", "factr": 4}, "factr"),
        ("yarn", "needs keys and values"),
    ):
        with pytest.raises(UserError, match="rope_scaling") as caught:
            with_rope_scaling(config, scaling)
        assert output in str(caught.value)
    with pytest.raises(UserError, match="learned positions"):
        with_rope_scaling(model(positions="learned").config, {"type": "yarn", "factor": 2.0})


def test_read_scaling_ignores_a_single_mscale():
    data = {"type": "yarn", "factor": 4.0, "mscale": 1.0}
    assert read_scaling(data, 64, "x") == YarnScaling(factor=4.0, original_max_seq_len=64)
