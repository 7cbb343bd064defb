"""Entry point: finds commands lazily, so that `--help` imports neither onnx nor onnx_ir.

Exit codes, of every command (docs/reliability.md):
    0: done, also where whoever read our output stopped reading.
    1: it cannot be done with these files, or on this machine; the same for any file that is missing or wrong.
    2: the command line or the recipe is written wrongly.
    128 + N: ended by signal N: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import click

from onnxtools.base import registry
from onnxtools.base.progress import Heartbeat
from onnxtools.base.version import __version__
from onnxtools.cli.logs import LOG, add_options, quiet, said

COMMANDS = ("pipeline", "validate", "build", "run", "benchmark", "accuracy", "summarize", "inspect", "diff")
FIRST = "export"
_SUMMARY = re.compile(r'"""([^\\\n]+?)(?:"""|\n)')
MAX_LINE = 2000
"""Characters of an error: names in a damaged file may be very long."""
MAIN_PASSES = ("convert", "add-kv-cache", "precision", "quantize", "prune")


class LazyGroup(click.Group):
    """Subcommands are the built-in commands and every registered pass."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [FIRST, *MAIN_PASSES, *COMMANDS, *sorted(set(registry.names()) - set(MAIN_PASSES))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in (FIRST, *COMMANDS):
            return add_options(importlib.import_module(f"onnxtools.cli.{cmd_name}").command)
        if cmd_name in registry.names():
            from onnxtools.cli.passes import pass_command

            return add_options(pass_command(cmd_name))
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            import difflib

            close = difflib.get_close_matches(name, self.list_commands(ctx), n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "see onnxtools --help"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        others = sorted(set(registry.names()) - set(MAIN_PASSES))
        for title, names in (("Main job", (FIRST, *MAIN_PASSES, *COMMANDS)), ("Single passes", others)):
            with formatter.section(title):
                formatter.write_dl([(name, short_help(name)) for name in names])


def short_help(name: str) -> str:
    """First line of the docstring of the module behind a command, read without importing it."""
    points = registry.names()
    module = points[name].module if name in points else f"onnxtools.cli.{name}"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin).read_text()
    first = _SUMMARY.match(source)  # parsing whole modules would take a third of the time of --help
    return first[1] if first else (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="onnxtools")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """From a checkpoint, or a TransformerEngine or torch ONNX export, to a TensorRT engine, one inspectable pass at a
    time.

    \b
    onnxtools export       ./SmolLM2 -o model.onnx
    onnxtools convert      te.onnx  qdq.onnx --opset19
    onnxtools add-kv-cache qdq.onnx kv.onnx
    onnxtools build        kv.onnx  gpt.engine --fp8
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: list[str] | None = None) -> None:
    """Run the command line; every deliberate error is one line on stderr."""
    ours = threading.current_thread() is threading.main_thread()
    handled = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in handled:
        signal.signal(number, _terminate)
    try:
        _main(args)
    finally:  # nothing is left to clean up: from here on a signal ends the process as it would any other
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _main(args: list[str] | None) -> NoReturn:
    heart = Heartbeat()
    with quiet():
        LOG.addHandler(heart)
        try:
            with heart.beating() if not sys.stderr.isatty() else contextlib.nullcontext():
                result: Any = cli.main(args=args, standalone_mode=False)
                sys.stdout.flush()
        except BaseException as error:
            _end(error, args if args is not None else sys.argv[1:])
    sys.exit(result if isinstance(result, int) else 0)


def _end(error: BaseException, given: list[str]) -> NoReturn:
    """One line on stderr and the exit code of a run that `error` ended."""
    if isinstance(error, click.ClickException):
        _fail(error.format_message(), error.exit_code)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        _fail("interrupted; no file was left half written", 130)
    if isinstance(error, SystemExit) and error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
        _fail("ended by a signal; no file was left half written", int(error.code))
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush has no reader
        sys.exit(0)
    if "--debug" in given or not isinstance(error, Exception):
        raise error
    from onnxtools.base.errors import OnnxtoolsError

    said(error)
    if isinstance(error, OnnxtoolsError):
        _fail(str(error), error.exit_code)
    if isinstance(error, OSError) and error.filename:
        _fail(f"{error.filename}: {error.strerror or error}; check the path, its permissions and the free space", 1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        _fail(f"the output cannot be written ({error.strerror}); free space, or send it elsewhere", 1)
    if isinstance(error, MemoryError):
        _fail("there is not enough memory for this; free some, or use a machine with more", 1)
    _unexpected(error, given)


def _unexpected(error: Exception, given: list[str]) -> NoReturn:
    """An exception that nobody raised on purpose: of a damaged file, or a fault of ours."""
    from onnxtools.base.errors import one_line
    from onnxtools.ir.wellformed import fault

    for path in (Path(word) for word in given if word.endswith(".onnx")):
        why = fault(path) if path.is_file() else ""
        if why:
            _fail(f"{path}: is no valid ONNX model ({why}); export it again", 1)
    notes = "; ".join(getattr(error, "__notes__", []))
    _fail(
        f"internal error, {type(error).__name__}: {one_line(error)}; {notes or 'run again with --debug and report it'}",
        1,
    )


def _terminate(signum: int, frame: Any) -> None:
    """So that temporary files go."""
    raise SystemExit(128 + signum)


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):
        line = " ".join(message.split())
        click.echo(f"error: {line if len(line) <= MAX_LINE else f'{line[:MAX_LINE]}...'}", err=True)
    sys.exit(code)
