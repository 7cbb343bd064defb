"""`-v` and `--log-file`, which every command has: what was begun when, as the logger `onnxtools` tells it."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

_HEAD = "# log of onnxtools"
LOG = logging.getLogger("onnxtools")


def add_options(command: click.Command) -> click.Command:
    """The command with `-v` and `--log-file`; a second call adds nothing."""
    if not any(parameter.name == "log_file" for parameter in command.params):
        command.params += [
            click.Option(
                ["-v", "--verbose"],
                count=True,
                expose_value=False,
                callback=_verbose,
                help="Say what is begun, on stderr; twice: all details.",
            ),
            click.Option(
                ["--log-file"],
                type=click.Path(path_type=Path),
                expose_value=False,
                callback=_log_file,
                help="Append the same, with times and all details.",
            ),
        ]
    return command


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' words go nowhere but into our log; afterwards all is as it was."""
    root, level = logging.getLogger(), LOG.level
    before = {logger: list(logger.handlers) for logger in (root, LOG)}
    root.addHandler(logging.NullHandler())
    LOG.setLevel(logging.DEBUG)
    LOG.addHandler(_warnings())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            LOG.setLevel(level)
            for logger, handlers in before.items():
                for handler in [one for one in logger.handlers if one not in handlers]:
                    logger.removeHandler(handler)
                    handler.close()


def _warnings() -> logging.Handler:
    """What a user must know although nothing failed, as one line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.addFilter(lambda record: record.levelno == logging.WARNING)
    return handler


def _verbose(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.INFO if value == 1 else logging.DEBUG)
        handler.setFormatter(logging.Formatter("%(relativeCreated)d ms %(message)s"))
        handler.addFilter(lambda record: record.levelno != logging.WARNING)  # they are shown without -v
        LOG.addHandler(handler)


def _log_file(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    from onnxtools.base.errors import JobError
    from onnxtools.base.version import __version__
    from onnxtools.storage.files import refuse_special

    refuse_special(value)
    if value.is_dir():
        raise JobError(f"--log-file {value}: is a folder; name a file")
    if value.exists() and value.stat().st_size:
        with value.open("rb") as file:
            if not file.readline(200).startswith(_HEAD.encode()):
                raise JobError(f"--log-file {value}: is there and is no log of onnxtools; name another file")
    value.parent.mkdir(parents=True, exist_ok=True)
    if not value.exists() or not value.stat().st_size:
        value.write_text(f"{_HEAD}\n", encoding="utf-8")
    handler = logging.FileHandler(value, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    LOG.info("onnxtools %s: %s", __version__, " ".join(sys.argv[1:]))


def said(error: Any) -> None:
    """The end of a run that failed, for the log."""
    LOG.debug("ended with: %s", error, exc_info=isinstance(error, BaseException))
