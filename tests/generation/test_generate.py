"""Our loop against transformers' `generate`, token for token, in every form of the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="its generate is the reference (make setup installs it)")
import torch

from onnxtools.base.errors import JobError, UsageError
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import Runtime, RuntimeOptions, open_runtime
from tests.generation.models import FORMS, checkpoint, exported, reference

PROMPTS = [[5, 9, 30, 31, 77], [3, 8], [60, 61, 62, 63, 64, 65, 66, 67, 1]]
CPU = RuntimeOptions(device="cpu", threads=2)


def runtime_of(name: str, form: str, *flags: str) -> Runtime:
    return (
        open_runtime("frameworks:eager", checkpoint(name), CPU)
        if form == "frameworks"
        else open_runtime("onnxrt", exported(name, form, *flags), CPU)
    )


def theirs(name: str, prompt: list[int], **settings: Any) -> list[list[int]]:
    """New tokens of each returned sequence, without the padding behind an end-of-text token."""
    with torch.no_grad():
        out = reference(name).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            **settings,
        )
    found = []
    for row in out.tolist():
        new = row[len(prompt) :]
        ends = [i for i, token in enumerate(new) if token == 2]
        found.append(new[: ends[0] + 1] if ends else new)
    return found


@pytest.mark.parametrize("form", [*FORMS, "frameworks"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_of_a_batch_of_different_lengths(name: str, form: str) -> None:
    found = generate(runtime_of(name, form), PROMPTS, GenerationOptions(max_new_tokens=24))
    assert [beams[0].token_ids for beams in found] == [theirs(name, prompt, max_new_tokens=24)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("form", [*FORMS, "frameworks"])
@pytest.mark.parametrize("settings", [
    {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.3}, {"num_beams": 3, "repetition_penalty": 1.4},
    {"num_beams": 3, "min_new_tokens": 6},
], ids=str)  # fmt: skip
def test_beam_search(form: str, settings: dict[str, Any]) -> None:
    early = {True: "yes", False: "no", "never": "never"}[settings.get("early_stopping", False)]
    options = GenerationOptions(max_new_tokens=12, **{**settings, "early_stopping": early})
    found = generate(runtime_of("llama", form), PROMPTS, options)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        assert [beam.token_ids for beam in beams] == theirs("llama", prompt, max_new_tokens=12, **settings)
        assert [beam.score for beam in beams] == sorted((beam.score or 0 for beam in beams), reverse=True)


def test_beams_that_end_early_equal_transformers() -> None:
    """A model whose end-of-text token is likely: beams finish at different lengths and the stopping rules decide."""
    model = reference("gpt2")
    runtime = runtime_of("gpt2", "concat")
    common = max(
        range(97),
        key=lambda token: sum(row.count(token) for p in PROMPTS for row in theirs("gpt2", p, max_new_tokens=24)),
    )
    ends = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = common
        object.__setattr__(runtime.info, "eos_token_ids", (common,))
        finished = set()
        for early in (False, True):
            options = GenerationOptions(
                max_new_tokens=20, num_beams=4, num_return_sequences=4, early_stopping="yes" if early else "no"
            )
            for prompt in PROMPTS:
                found = generate(runtime, [prompt], options)[0]
                with torch.no_grad():
                    out = model.generate(
                        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                        do_sample=False,
                        max_new_tokens=20, num_beams=4, num_return_sequences=4, early_stopping=early,
                    )  # fmt: skip
                for beam, row in zip(found, out[:, len(prompt) :].tolist(), strict=True):
                    assert beam.token_ids == row[: len(beam.token_ids)]
                    assert beam.token_ids[-1] == common or len(beam.token_ids) == 20
                    finished.add(beam.finish)
        assert "eos" in finished
    finally:
        model.generation_config.eos_token_id = ends


@pytest.mark.parametrize("form", FORMS)
def test_penalty_and_minimum_equal_transformers(form: str) -> None:
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 9}
    found = generate(runtime_of("llama", form), PROMPTS, GenerationOptions(max_new_tokens=15, **settings))  # type: ignore[arg-type]
    assert [beams[0].token_ids for beams in found] == [
        theirs("llama", prompt, max_new_tokens=15, **settings)[0] for prompt in PROMPTS
    ]


def test_rows_end_at_the_end_of_text_each_for_itself() -> None:
    runtime = runtime_of("llama", "concat")
    plain = [b[0].token_ids for b in generate(runtime, PROMPTS, GenerationOptions(max_new_tokens=10))]
    end = plain[1][3]
    object.__setattr__(runtime.info, "eos_token_ids", (end,))
    found = [beams[0] for beams in generate(runtime, PROMPTS, GenerationOptions(max_new_tokens=10))]
    for row, all_tokens in zip(found, plain, strict=True):
        stop = all_tokens.index(end) + 1 if end in all_tokens else 10
        assert row.token_ids == all_tokens[:stop] and row.finish == ("eos" if end in all_tokens else "length")
    ignored = generate(runtime, PROMPTS, GenerationOptions(max_new_tokens=10, ignore_eos=True))
    assert [beams[0].token_ids for beams in ignored] == plain


@pytest.mark.parametrize("form", ["concat", "none"])
def test_a_model_without_a_mask_runs_prompts_of_different_lengths(form: str) -> None:
    """The rest of the longer prompts is fed a token a step, so that no row needs padding."""
    runtime = runtime_of("llama", form, "--use-one-input")
    assert not runtime.pads
    found = generate(runtime, PROMPTS, GenerationOptions(max_new_tokens=12))
    assert [beams[0].token_ids for beams in found] == [
        theirs("llama", prompt, max_new_tokens=12)[0] for prompt in PROMPTS
    ]


KINDS = (
    "bloom", "mpt", "falcon_new", "cohere", "gemma2_capped", "gemma3", "gpt_oss", "mixtral", "deepseek_v3", "olmo2",
    "opt_350m", "phi_norms", "gptj_inner", "smollm3", "qwen3_windows", "gpt_neo",
)  # fmt: skip
"""Families with blocks that Llama and GPT-2 lack."""


@pytest.mark.parametrize("form", ["concat", "scatter", "gqa"])
@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_of_other_families(name: str, form: str) -> None:
    if form == "gqa" and name in ("bloom", "mpt", "deepseek_v3"):
        pytest.skip("GroupQueryAttention has neither ALiBi nor latent attention")
    found = generate(runtime_of(name, form), PROMPTS[:2], GenerationOptions(max_new_tokens=10, min_new_tokens=10))
    for beams, prompt in zip(found, PROMPTS, strict=False):
        assert beams[0].token_ids == theirs(name, prompt, max_new_tokens=10, min_new_tokens=10)[0]


@pytest.mark.parametrize("form", ["concat", "scatter", "gqa"])
def test_last_logits_alone_give_the_same_tokens(form: str) -> None:
    found = generate(runtime_of("llama", form, "--logits", "last"), PROMPTS, GenerationOptions(max_new_tokens=12))
    assert [beams[0].token_ids for beams in found] == [
        theirs("llama", prompt, max_new_tokens=12)[0] for prompt in PROMPTS
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_runtime_serves_one_batch_after_another(form: str) -> None:
    """Nothing of a batch is left for the next, also when the buffers serve again."""
    runtime = runtime_of("llama", form)
    for prompts in (PROMPTS, PROMPTS[:1], [PROMPTS[2], PROMPTS[0], PROMPTS[1]], PROMPTS):
        found = generate(runtime, prompts, GenerationOptions(max_new_tokens=6))
        assert [beams[0].token_ids for beams in found] == [
            theirs("llama", prompt, max_new_tokens=6)[0] for prompt in prompts
        ]


def test_log_probabilities_are_the_models() -> None:
    found = generate(runtime_of("llama", "concat"), PROMPTS[:1], GenerationOptions(max_new_tokens=8), logprobs=True)[0][
        0
    ]
    text = torch.tensor([PROMPTS[0] + found.token_ids])
    with torch.no_grad():
        expected = torch.log_softmax(reference("llama")(text).logits[0].float(), -1)
    wanted = [expected[len(PROMPTS[0]) - 1 + i, token].item() for i, token in enumerate(found.token_ids)]
    np.testing.assert_allclose(found.logprobs, wanted, atol=1e-4)


def test_sampling_is_repeated_by_its_seed_and_differs_without() -> None:
    runtime = runtime_of("llama", "gqa")

    def sample(seed: int) -> list[int]:
        return generate(
            runtime, PROMPTS[:1], GenerationOptions(max_new_tokens=16, temperature=2.0, top_k=40, seed=seed)
        )[0][0].token_ids

    assert sample(1) == sample(1) != sample(2)
    greedy = generate(runtime, PROMPTS[:1], GenerationOptions(max_new_tokens=16))[0][0].token_ids
    assert generate(runtime, PROMPTS[:1], GenerationOptions(max_new_tokens=16, top_k=1))[0][0].token_ids == greedy


def test_a_token_callback_sees_every_token_and_may_stop_a_row() -> None:
    seen: list[tuple[int, int]] = []

    def stop_row_1_at_4(row: int, token: int) -> bool:
        seen.append((row, token))
        return row == 1 and sum(r == 1 for r, _ in seen) == 4

    found = generate(
        runtime_of("llama", "concat"), PROMPTS, GenerationOptions(max_new_tokens=7), on_token=stop_row_1_at_4
    )
    assert [len(beams[0].token_ids) for beams in found] == [7, 4, 7] and found[1][0].finish == "stop"
    assert [token for row, token in seen if row == 2] == found[2][0].token_ids


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_no_prompt_is_an_error(prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="prompt"):
        generate(runtime_of("llama", "concat"), prompts, GenerationOptions())


def test_tokens_outside_the_vocabulary_and_texts_beyond_the_positions_are_errors() -> None:
    runtime = runtime_of("llama", "concat")
    with pytest.raises(JobError, match="token 97 and the model's vocabulary ends at 96"):
        generate(runtime, [[1, 97]], GenerationOptions())
    with pytest.raises(JobError, match="token -1 and"):
        generate(runtime, [[1, -1, 2]], GenerationOptions())
    with pytest.raises(JobError, match=r"text of 60 tokens and 5 new ones exceed the model's 64 positions"):
        generate(runtime, [[1] * 60], GenerationOptions(max_new_tokens=5))
    assert len(generate(runtime, [[1] * 60], GenerationOptions(max_new_tokens=4))[0][0].token_ids) == 4


@pytest.mark.parametrize(("spec", "says"), [("onnxrt:eager", "no variant 'eager'"), ("frameworks:nograph", "nograph")])
def test_a_variant_of_another_runtime_is_refused_with_its_own(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        open_runtime(spec, "model.onnx", RuntimeOptions())
