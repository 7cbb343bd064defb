"""Names of the Hugging Face hub: huggingface_hub fetches the files into its cache, or takes those that are there.

The token, the cache and the endpoint are those of huggingface_hub (HF_TOKEN or `hf auth login`, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE).
"""

from __future__ import annotations

from pathlib import Path

from onnxtools.base.errors import JobError, one_line
from onnxtools.base.inputs import is_hub_name

_PLAIN = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_OLDER = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_LEFT = ["*/*", "consolidated*", "*.fp16.safetensors"]
"""Other copies of the weights (Llama's original/, Mistral's consolidated.safetensors) and other formats."""


def fetched(source: Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a hub's name such as Qwen/Qwen3-0.6B; any other path as it is.

    Args:
        source: a path, or a name of the hub where nothing of that path exists.
        revision: branch, tag or commit; the repository's main branch by default.
        weights: False fetches the configuration and the tokenizer alone.

    Raises:
        JobError: huggingface_hub is not installed, or cannot fetch the files.
    """
    if source.exists() or not is_hub_name(source):
        return source
    folder = _snapshot(str(source), revision, [*_PLAIN, *(_WEIGHTS if weights else [])])
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(str(source), revision, [*_PLAIN, *_OLDER])
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise JobError(
            f"{name}: no such file; as a name of the Hugging Face hub it needs huggingface_hub: pip install "
            "'onnxtools[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_LEFT))
    except GatedRepoError:
        raise JobError(f"{name}: is gated; ask for access on its page, then `hf auth login` or set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise JobError(
            f"{name}: neither a path nor a model of the hub that this token sees; check the name, or set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError:
        raise JobError(
            f"{name}: no such path, and the hub cannot be reached and its files are not in the cache; check the name "
            f"and the connection, or `hf download {name}` where there is one"
        ) from None
    except Exception as error:  # a revision that does not exist, no space, whatever the hub answers
        raise JobError(f"{name}: cannot be fetched from the hub ({one_line(error, 160)}); check the name") from error
