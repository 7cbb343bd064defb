"""`generate`: continues prompts, by greedy search, sampling or beam search."""

from __future__ import annotations

from contextlib import closing

from onnxtools.generation.beam import beam_search
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.loop import Generated, Loop, OnToken, check_prompts
from onnxtools.generation.runtime import Prompts, Runtime


def generate(
    runtime: Runtime,
    prompts: Prompts,
    options: GenerationOptions,
    *,
    on_token: OnToken | None = None,
    logprobs: bool = False,
) -> list[list[Generated]]:
    """Continue `prompts` together.

    Returns:
        For each prompt its continuations: one, or `num_return_sequences` of a beam search, best first.
    Raises:
        UsageError: no prompt, or an empty one.
        JobError: a token outside the vocabulary, too long for the model, or logits that are not numbers.
    """
    check_prompts(prompts, runtime.vocab_size)
    if options.num_beams > 1:
        return beam_search(runtime, prompts, options)
    with closing(runtime.open(len(prompts), max(map(len, prompts)) + options.max_new_tokens)) as session:
        return [[found] for found in Loop(session, runtime, prompts, options, on_token, logprobs).run()]
