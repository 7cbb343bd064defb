"""What `run`, `benchmark`, `accuracy` and `summarize` share: the model, the runtimes and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base import registry
from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.cli.flags import PATH, make_command
from onnxtools.generation.runtime import RuntimeOptions

if TYPE_CHECKING:
    from onnxtools.checkpoints.tokenizer import Tokenizer
    from onnxtools.generation.runtime import Runtime


@dataclass(frozen=True)
class RuntimeChoice:
    """Which runtimes run MODEL, and its tokenizer."""

    runtime: tuple[str, ...] = option(
        (),
        f"{', '.join(registry.names(registry.RUNTIMES))}; onnxrt has :cpu, :cuda, :nograph and :nokernels, frameworks "
        ":eager, :sdpa and :nocache. [default: by the file]",
        metavar="NAME[:VARIANT]",
    )
    tokenizer: Path | None = option(None, "tokenizer.json, or a folder with it. [default: beside the model]", path=True)


def runtime_command(
    name: str, help_text: str, callback: Callable[..., Any], options: Sequence[type[Any]]
) -> click.Command:
    """A command on MODEL; its flags are those of `options` and of the runtimes."""
    model = click.Argument(["model"], type=PATH)
    return make_command(name, help_text, callback, [model], [*options, RuntimeChoice, RuntimeOptions])


@contextmanager
def opened(model: Path, runtimes: Sequence[str], options: RuntimeOptions) -> Iterator[list[Runtime]]:
    """The runtimes, open at once, closed at the end.

    Raises:
        UsageError: no such file, one runtime named twice, or a checkpoint that none of them reads.
    """
    from onnxtools.base.inputs import absent
    from onnxtools.generation.runtime import default_runtime, open_runtime

    if not model.exists():
        raise JobError(f"{absent(model)}: no such file or folder; check the path")
    names = list(runtimes) or [default_runtime(model)]
    if len(set(names)) != len(names):
        raise UsageError(f"--runtime names {max(names, key=names.count)!r} twice; name each once")
    if options.checkpoint is not None and not any(name.split(":")[0] == "frameworks" for name in names):
        raise UsageError(
            f"--checkpoint is for --runtime frameworks, and {', '.join(names)} runs {model}; add it, or leave "
            "--checkpoint out"
        )
    made: list[Runtime] = []
    try:
        for name in names:
            made.append(open_runtime(name, model, options))
        yield made
    finally:
        for runtime in made:
            runtime.close()


def open_tokenizer(path: Path | None, runtime: Runtime, model: Path) -> Tokenizer:
    """The one named, else the runtime's own, else the one beside MODEL.

    Raises:
        JobError: there is none, or it is another model's by now.
    """
    from onnxtools.checkpoints.tokenizer import Tokenizer

    own = runtime.info.folder
    if path is None and model.is_file():
        from onnxtools.checkpoints.beside import check_beside
        from onnxtools.storage.records import files_of

        manifest = getattr(runtime, "manifest", None)
        beside = manifest["graph"].get("beside") if manifest else files_of(model)["beside"]
        check_beside(
            model,
            {name: text for name, text in beside.items() if isinstance(text, str)} if isinstance(beside, dict) else {},
        )
    return Tokenizer.open(
        path or (own if (own / "tokenizer.json").is_file() else model if model.is_dir() else model.parent)
    )


def say_notes(runtimes: Sequence[Runtime]) -> None:
    """What the user should know of each runtime, on stderr."""
    for runtime in runtimes:
        for note in runtime.notes:
            click.echo(f"note: {runtime.name}: {note}", err=True)
