"""The search for the fewest layers that must stay in higher precision to keep an accuracy budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxtools.base.errors import JobError, UsageError
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.evaluate.lambada import (
    Passage,
    PassageResult,
    compare_lambada,
    score_lambada,
    summarize_lambada,
    tokenized,
)
from onnxtools.generation.runtime import RuntimeOptions
from onnxtools.ir.model import Model
from onnxtools.passes.quantize.quantize_pass import Quantize
from onnxtools.pipeline.manager import PassManager
from onnxtools.storage.files import OwnFolder


@dataclass(frozen=True)
class Budget:
    """The largest loss: points of LAMBADA's whole-word accuracy (pt), or percent of its perplexity per token (%)."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that a text such as `0.5pt` or `2%` gives.

        Raises:
            UsageError: the text is neither.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(pt|%)", text.strip())
        if match is None:
            raise UsageError(f"--budget is {text!r}; write 0.5pt (points of accuracy) or 2% (perplexity)")
        return cls(float(match[1]), match[2])

    def loss(self, reference: Sequence[PassageResult], found: Sequence[PassageResult]) -> float:
        """The loss of `found` against `reference`, in the budget's unit; negative for a gain."""
        if self.unit == "pt":
            return -100 * float(compare_lambada(reference, found)["acc_difference"])
        return 100 * float(summarize_lambada(found)["ppl_token"] / summarize_lambada(reference)["ppl_token"] - 1)


@dataclass(frozen=True)
class Trial:
    """One quantized model.

    Attributes:
        excluded: number of products left in their own precision.
        acc: whole-word accuracy on LAMBADA, 0 to 1.
        ppl_token: perplexity per token on LAMBADA.
        loss: the loss against the unquantized model, in the budget's unit.
    """

    excluded: int
    acc: float
    ppl_token: float
    loss: float


def within_budget(
    wanted: Quantize,
    source: Path,
    output: Path,
    budget: Budget,
    rows: Sequence[tuple[str, str]],
    tried: Callable[[Trial], None],
) -> tuple[Quantize, list[Trial]]:
    """`wanted` with the least `exclude_worst` that keeps the budget, found by bisection, and every trial.

    Layers are excluded in the order of their own output error, which calibration finds once for all trials. The search
    assumes that a model with more excluded layers loses less. On a few hundred passages this is only roughly true: see
    `docs/quantization.md`.

    Args:
        source: the unquantized model.
        output: trials are written beside this path, and removed.
        rows: (context, last word), as returned by `read_lambada`.
        tried: called with each trial.

    Raises:
        JobError: no calibrated product was quantized.
    """
    tokenizer = Tokenizer.open(Path(wanted.tokenizer) if wanted.tokenizer else source.parent)
    reference, passages = _reference(source, tokenizer, rows)
    trial_path = output.with_name(f"{output.stem}.trial.onnx")
    trials: dict[int, Trial] = {}
    with OwnFolder("onnxtools-budget-") as folder:

        def attempt(excluded: int) -> tuple[Trial, int]:
            candidate = dataclasses.replace(
                wanted, exclude_worst=excluded, calib_cache=wanted.calib_cache or str(folder)
            )
            try:
                count = _write(candidate, source, trial_path)
                results = _scores(OrtRuntime(trial_path, RuntimeOptions()), passages)
            finally:
                for path in output.parent.glob(f"{trial_path.name}*"):
                    path.unlink()
            figures = summarize_lambada(results)
            trials[excluded] = Trial(excluded, figures["acc"], figures["ppl_token"], budget.loss(reference, results))
            tried(trials[excluded])
            return trials[excluded], count

        first, count = attempt(0)
        low, high = 0, 0 if first.loss <= budget.amount else count
        while low < high:  # `high` keeps the budget: with all products excluded nothing is lost
            middle = (low + high) // 2
            over = trials[middle] if middle in trials else attempt(middle)[0]
            if over.loss > budget.amount:
                low = middle + 1
            else:
                high = middle
    return dataclasses.replace(wanted, exclude_worst=high), list(trials.values())


def _write(candidate: Quantize, source: Path, path: Path) -> int:
    """Write the quantized model; returns how many of its products can be excluded."""
    model = Model.load(source)
    report = PassManager([candidate]).run(model)
    count = sum(row.get("error") is not None for step in report.steps for row in step.result.table)
    if not count:
        raise JobError(f"{source}: no calibrated product was quantized, so nothing can be left out; drop --budget")
    model.save(path)
    return count


def _reference(
    source: Path, tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]
) -> tuple[list[PassageResult], list[Passage]]:
    runtime = OrtRuntime(source, RuntimeOptions())
    passages = tokenized(rows, tokenizer, runtime.info.max_positions)
    return _scores(runtime, passages), passages


def _scores(runtime: OrtRuntime, passages: list[Passage]) -> list[PassageResult]:
    """Score the passages and close `runtime`."""
    try:
        return score_lambada(runtime, passages, batch_size=8, known={}, done=lambda *_: None)
    finally:
        runtime.close()
