"""`--budget`: quantize again and again, leaving out more or fewer layers, until what is lost is what may be lost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.pipeline.passbase import Pass


@dataclass(frozen=True)
class BudgetOptions:
    """Flags of a pass that can leave out its worst layers."""

    budget: str | None = option(
        None,
        "Search the least --exclude-worst that loses no more: 0.5pt of LAMBADA's accuracy, or 2% of its perplexity.",
    )
    budget_data: Path | None = option(None, "LAMBADA's JSONL for --budget.", path=True)
    budget_rows: int = option(500, "Passages that --budget scores.", minimum=1)


def search(
    pass_: Pass, source: Path, output: Path, options: BudgetOptions, as_json: bool
) -> tuple[Pass, dict[str, Any]]:
    """The pass that keeps the budget, and what was tried for `--json`; writes OUTPUT.recipe.yaml. Without a budget
    `pass_` itself.

    Raises:
        UsageError: the budget cannot be read, or goes with no calibration.
    """
    budget, budget_data = options.budget, options.budget_data
    if budget is None:
        if budget_data is not None:
            raise UsageError("--budget-data is for --budget; say how much may be lost, or leave it out")
        return pass_, {}
    from onnxtools.cli.flags import check_output
    from onnxtools.cli.render import console, table
    from onnxtools.evaluate.exclusion_search import Budget, Trial, within_budget
    from onnxtools.evaluate.lambada import read_lambada
    from onnxtools.passes.quantize.quantize_pass import Quantize
    from onnxtools.pipeline.recipe_file import write_recipe

    limit = Budget.parse(budget)
    if budget_data is None:
        raise UsageError("--budget needs passages to score; name LAMBADA's JSONL with --budget-data")
    assert isinstance(pass_, Quantize)
    if pass_.exclude_worst or pass_.kind in ("none", "int4-rtn"):
        wrong = (
            "searches --exclude-worst itself; leave one out"
            if pass_.exclude_worst
            else "ranks layers by what calibration finds; say --fp8, --int8 or --int4-awq"
        )
        raise UsageError(f"--budget {wrong}")
    check_output(output)

    def tried(trial: Trial) -> None:
        if as_json:
            return
        verdict = "keeps" if trial.loss <= limit.amount else "exceeds"
        console().print(
            f"{trial.excluded} left out: loses {trial.loss:.2f}{limit.unit}, {verdict} {budget}",
            markup=False,
            highlight=False,
        )

    chosen, trials = within_budget(pass_, source, output, limit, read_lambada(budget_data, options.budget_rows), tried)
    recipe = output.with_suffix(".recipe.yaml")
    absolute: dict[str, Any] = {
        key: str(Path(value).resolve()) for key in ("calib", "tokenizer") if (value := getattr(chosen, key)) is not None
    }
    write_recipe(
        recipe,
        source,
        Path(output.name),
        [dataclasses.replace(chosen, **absolute, calib_cache=None)],
        f"keeps --budget {budget}",
    )
    shown = ("left out", "acc (whole word)", "ppl(token)", f"lost, {limit.unit}")
    rows = [
        (t.excluded, f"{t.acc:.4f}", f"{t.ppl_token:.3f}", f"{t.loss:+.2f}")
        for t in sorted(trials, key=lambda t: t.excluded)
    ]
    if not as_json:
        table(
            f"--budget {budget}: {chosen.exclude_worst} layers left out; `onnxtools pipeline {recipe}` makes it again",
            shown,
            rows,
            right=shown,
        )
    return chosen, {"budget": budget, "trials": [dataclasses.asdict(trial) for trial in trials], "recipe": str(recipe)}
