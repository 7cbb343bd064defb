"""onnxtools' runtimes as a model of EleutherAI's lm-evaluation-harness, for all of its tasks.

    import onnxtools.evaluate.lm_eval_model, lm_eval
    lm_eval.simple_evaluate(model="onnxtools", model_args="model=model.onnx", tasks=["lambada_openai"])

Requests and their meanings: lm-eval's docs/model_guide.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from onnxtools.checkpoints.tokenizer import Streams, Tokenizer, cut_at
from onnxtools.evaluate.scores import score_texts
from onnxtools.evaluate.wikitext import Windows
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import RuntimeOptions, default_runtime, open_runtime

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


@register_model("onnxtools")
class OnnxtoolsLM(LM):  # type: ignore[misc]
    """Scores and generates with one runtime.

    Args:
        model: an ONNX file, engine or checkpoint.
        runtime: onnxrt, trt or frameworks, with a variant; chosen by the file if empty.
        tokenizer: tokenizer.json or its folder; beside the model if empty.
        max_length: most tokens of a text; the model's positions if 0.
        batch_size: texts run together; 8 if it is no number.
        options: fields of `RuntimeOptions`.
    """

    def __init__(
        self,
        model: str,
        runtime: str = "",
        tokenizer: str = "",
        max_length: int = 0,
        batch_size: int | str = 8,
        **options: Any,
    ) -> None:
        super().__init__()
        path = Path(model)
        options.pop("max_batch_size", None)
        device = options.pop("device", None) or "auto"
        device = str(device).split(":")[0]
        self.runtime = open_runtime(
            runtime or default_runtime(path),
            path,
            RuntimeOptions(device=device, **options),  # type: ignore[arg-type]
        )
        self.tokens = Tokenizer.open(Path(tokenizer) if tokenizer else path if path.is_dir() else path.parent)
        self.max_length = int(max_length) or self.runtime.info.max_positions or 2048
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        texts = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        targets = [len(continuation) for _, continuation in pairs]
        scored = score_texts(self.runtime, texts, targets, batch_size=self.batch_size)
        return [
            (float(s.logprobs[-n:].sum()), bool((s.ranks == 0).all())) for s, n in zip(scored, targets, strict=True)
        ]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both; an empty context becomes the prefix token."""
        if not context.strip():
            return [self._prefix()], self.tokens.pieces(context + continuation)
        return self.tokens.pair(context, continuation)

    def _prefix(self) -> int:
        """The token before a text without context: the begin-of-text token, or the end-of-text token."""
        info = self.runtime.info
        return (
            info.bos_token_id
            if info.bos_token_id is not None
            else info.eos_token_ids[0]
            if info.eos_token_ids
            else info.pad_token_id
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows without overlap; each begins with the token before it."""
        sums = []
        for request in requests:
            tokens = [self._prefix(), *self.tokens.pieces(request.args[0])]
            cut = list(Windows(self.max_length, max(self.max_length - 1, 1)).of(tokens))
            scored = score_texts(self.runtime, [w.tokens for w in cut], [0] * len(cut), batch_size=self.batch_size)
            sums.append(sum(float(s.logprobs[-w.new :].sum()) for w, s in zip(cut, scored, strict=True)))
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop texts."""
        return [self._until(*request.args) for request in requests]

    def _until(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or ()
        stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
        max_tokens = int(settings.get("max_gen_toks", 256))
        sampled = {
            key: settings[key]
            for key in ("temperature", "top_p", "top_k")
            if settings.get("do_sample") and settings.get(key)
        }
        options = GenerationOptions(max_new_tokens=max_tokens, stop=stop, **sampled)
        prompt = self.tokens.encode(context)[-max(self.max_length - max_tokens, 1) :]
        generated = generate(
            self.runtime, [prompt], options, on_token=Streams(self.tokens, [prompt], stop) if stop else None
        )
        return cut_at(self.tokens.continuation(prompt, generated[0][0].token_ids), stop)[0]
