"""What people see: tables on a terminal, plain text elsewhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from onnxtools.check.validate import Verdict
from onnxtools.pipeline.manager import Report


def console() -> Console:
    """A console on stdout; wide enough for a table where there is no terminal."""
    made = _Console(highlight=False)
    return made if made.is_terminal else _Console(highlight=False, width=120)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process with exit code 1; the command line ends it with 0."""
        raise BrokenPipeError


def print_json(data: Any) -> None:
    """JSON has no NaN and no infinity: they are null."""
    click.echo(json.dumps(_finite(data), indent=2, default=str, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Print one table; `right` names the columns of numbers."""
    out = console()
    out.print(title, style="bold", markup=False, soft_wrap=True)
    made = Table()
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    out.print(made)


def collapse(rows: Iterable[tuple[Any, ...]], name: int) -> list[tuple[Any, ...]]:
    """Rows that differ only in the number within their name become one: `past_key_values.*.key (24)`."""
    merged: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row in rows:
        pattern = re.sub(r"\b\d+\b", "*", str(row[name]))
        merged.setdefault((*row[:name], pattern, *row[name + 1 :]), []).append(row)
    result = []
    for key, group in merged.items():
        shown = key[name] if len(group) > 1 else group[0][name]
        result.append((*key[:name], f"{shown} ({len(group)})" if len(group) > 1 else shown, *key[name + 1 :]))
    return result


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def report_table(report: Report, title: str) -> None:
    """The passes of a run, then their notes."""
    rows = []
    for step in report.steps:
        m = step.measures
        nodes = (
            f"{m['nodes_before']} -> {m['nodes_after']}"
            if m.get("nodes_before") != m.get("nodes_after")
            else str(m.get("nodes_after", ""))
        )
        check = number(m.get("rel_l2")) if "rel_l2" in m else "-"
        matches = step.result.matches if step.result.matches or step.result.changed else "none"
        rows.append((step.name, matches, nodes, f"{m.get('seconds', 0):.2f}", f"{m.get('peak_mib', 0):.0f}", check))
    columns = ("pass", "matches", "nodes", "s", "peak MiB", "rel L2")
    table(title, columns, rows, right=columns[1:])
    out = console()
    for step in report.steps:
        if step.result.summary:
            names = tuple(step.result.summary[0])
            table(step.name, names, [tuple(row.values()) for row in step.result.summary], right=names[1:])
        for note in step.result.notes:
            style = "yellow" if note.startswith("warning") else "dim" if not step.result.changed else None
            out.print(f"  {step.name}: {note}", style=style, markup=False)
    sampled = [s.measures["sampled"] for s in report.steps if s.measures.get("sampled")]
    if sampled:
        out.print(f"  checked: {sampled[-1]}; --check compares the whole model", style="dim", markup=False)
    skipped = next((s.measures["numeric_skipped"] for s in report.steps if s.measures.get("numeric_skipped")), "")
    if skipped:
        out.print(f"  numeric check not done: {skipped}", style="yellow", markup=False)


def verdict_table(verdict: Verdict, title: str) -> None:
    rows = [
        (
            r.check,
            r.output,
            number(r.difference.max_abs),
            number(r.difference.rel_l2),
            f"{r.difference.cosine:.6f}",
            "pass" if r.passed else "FAIL",
        )
        for r in verdict.rows
    ]
    table(
        title,
        ("check", "output", "max abs", "rel L2", "cosine", "verdict"),
        rows,
        right=("max abs", "rel L2", "cosine"),
    )
    for note in verdict.notes:
        console().print(f"  {note}", style="dim", markup=False)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
