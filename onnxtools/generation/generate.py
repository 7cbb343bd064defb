"""`generate`: continues prompts by greedy search, sampling or beam search."""

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
    """Continue `prompts` (token ids) together in one batch.

    Args:
        on_token: called with each row and its new token; greedy search and sampling only.
        logprobs: fill `Generated.logprobs`; greedy search and sampling only.

    Returns:
        The continuations of each prompt: one, or `num_return_sequences` of a beam search, best first.

    Raises:
        UsageError: no prompt, or an empty one.
        JobError: a token outside the vocabulary, a text too long for the model, or logits that are NaN or infinite.
    """
    check_prompts(prompts, runtime.vocab_size)
    if options.num_beams > 1:
        return beam_search(runtime, prompts, options)
    with closing(runtime.open(len(prompts), max(map(len, prompts)) + options.max_new_tokens)) as session:
        return [[continuation] for continuation in Loop(session, runtime, prompts, options, on_token, logprobs).run()]
