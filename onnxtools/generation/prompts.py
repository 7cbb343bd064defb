"""`run`: continues text prompts, and reports what the NeMo demo printed of each text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxtools.base.errors import UsageError
from onnxtools.checkpoints.tokenizer import Streams, Tokenizer, cut_at
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.loop import Generated
from onnxtools.generation.runtime import Runtime


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation.

    Attributes:
        sentence: prompt and new text.
        text: the new text alone, cut at a stop text.
        tokens: text of each token of the sentence.
        logprob: log-probability of each new token.
        token_ids: id of each token of the sentence.
        offsets: where each token begins in the sentence, in characters.
        finish: why the text ended, as in `Generated`.
        score: score of a beam; None without beams.
    """

    sentence: str
    text: str
    tokens: list[str]
    logprob: list[float]
    token_ids: list[int]
    offsets: list[int]
    finish: str
    score: float | None


def continue_texts(
    runtime: Runtime,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: GenerationOptions,
    *,
    batch_size: int = 0,
    show: Callable[[int, str], None] | None = None,
    logprobs: bool = False,
) -> list[list[Text]]:
    """Continue `prompts`, `batch_size` at a time (0: all together).

    Args:
        show: called with a prompt's index and each new piece of its text.
        logprobs: fill `Text.logprob`.

    Returns:
        The continuations of each prompt, as `generate` orders them.

    Raises:
        UsageError: no prompt, or one without tokens.
        JobError: as in `generate`.
    """
    size = batch_size or max(len(prompts), 1)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    empty = next((index for index, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise UsageError(
            f"prompt {empty} ({prompts[empty][:40]!r}) has no tokens in {tokenizer.path}; give other text, or the "
            "model's own tokenizer"
        )
    texts: list[list[Text]] = []
    for start in range(0, max(len(prompts), 1), size):
        batch = encoded[start : start + size]
        watched = options.stop or show is not None

        def say(row: int, piece: str, start: int = start) -> None:
            if show is not None:
                show(start + row, piece)

        streams = Streams(tokenizer, batch, options.stop, say) if watched and options.num_beams == 1 else None
        generated = generate(runtime, batch, options, on_token=streams, logprobs=logprobs)
        if streams is not None:
            streams.flush()
        for prompt, ids, beams in zip(prompts[start : start + size], batch, generated, strict=True):
            texts.append([_text(tokenizer, prompt, ids, beam, options) for beam in beams])
    return texts


def _text(tokenizer: Tokenizer, prompt: str, ids: list[int], generated: Generated, options: GenerationOptions) -> Text:
    whole = [*ids, *generated.token_ids]
    text, _ = cut_at(tokenizer.continuation(ids, generated.token_ids), options.stop)
    return Text(
        prompt + text,
        text,
        [tokenizer.token(token) for token in whole],
        [round(value, 6) for value in generated.logprobs],
        whole,
        tokenizer.offsets(whole),
        generated.finish,
        generated.score,
    )


def as_demo(texts: Sequence[Text]) -> dict[str, Any]:
    """The NeMo demo's result: a mapping of lists with one entry per sentence."""
    rows = [asdict(text) for text in texts]
    names = {
        "sentences": "sentence",
        "tokens": "tokens",
        "logprob": "logprob",
        "token_ids": "token_ids",
        "offsets": "offsets",
        "finish": "finish",
    }
    return {name: [row[key] for row in rows] for name, key in names.items()}
