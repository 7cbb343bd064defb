"""`GenerationOptions`: how texts are continued; the flags of `run`.

Names and meanings are those of transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy search, unless a temperature, top-k, top-p or beams are given; a temperature of 0 is always greedy.

    Raises:
        UsageError: a value out of range, or beam search together with sampling.
    """

    max_new_tokens: int = option(20, "Tokens to generate at most.")
    min_new_tokens: int = option(0, "Tokens before the text may end.")
    temperature: float | None = option(None, "Sample, after dividing the logits by this. 0 is greedy search.")
    top_k: int | None = option(None, "Sample among the k most likely tokens.")
    top_p: float | None = option(
        None, "Sample among the fewest tokens whose probabilities reach p (arXiv 1904.09751, section 3.1)."
    )
    repetition_penalty: float = option(
        1.0,
        "Divide positive logits of tokens seen before by this, multiply negative ones (arXiv 1909.05858, section 4.1).",
    )
    seed: int = option(0, "Seed of the sampling.")
    num_beams: int = option(1, "Beam search with so many beams.")
    num_return_sequences: int = option(1, "Beams to return.")
    length_penalty: float = option(1.0, "Beam scores are divided by length to this power.")
    early_stopping: Literal["no", "yes", "never"] = option(
        "no", "When beam search ends: at no likely improvement, at enough finished beams, or late."
    )
    stop: tuple[str, ...] = option((), "A text that ends the generation.")
    ignore_eos: bool = option(False, "Go on after the end-of-text token.")

    def __post_init__(self) -> None:
        rules = (
            (self.max_new_tokens >= 1, "max_new_tokens", "1 or more"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "0 to max_new_tokens"),
            (self.temperature in (None, 0) or 1e-4 <= self.temperature <= 1e4, "temperature",
                "0.0001 to 10000, or 0 for greedy search"),
            (self.top_k is None or self.top_k >= 1, "top_k", "1 or more"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "more than 0, at most 1"),
            (1e-3 <= self.repetition_penalty <= 1e3, "repetition_penalty", "0.001 to 1000"),
            (self.num_beams >= 1, "num_beams", "1 or more"),
            (1 <= self.num_return_sequences <= self.num_beams, "num_return_sequences", "1 to num_beams"),
            (self.seed >= 0, "seed", "0 or more"),
            (-10 <= self.length_penalty <= 10, "length_penalty", "-10 to 10"),
            (all(self.stop), "stop", "texts that are not empty"),
        )  # fmt: skip
        for holds, name, allowed in rules:
            if not holds:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it takes {allowed}")
        if self.num_beams > 1 and self.samples:
            raise UsageError("beam search takes no temperature, top-k or top-p; give --num-beams or those")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled instead of taken greedily."""
        return self.temperature != 0 and (
            self.temperature is not None or self.top_k is not None or self.top_p is not None
        )
