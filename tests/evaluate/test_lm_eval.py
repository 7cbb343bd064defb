"""The adapter against lm-evaluation-harness's own transformers model, on the same weights and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the harness is the reference (make setup installs it)")
pytest.importorskip("transformers", reason="the model is written by transformers (make setup installs it)")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import onnxtools.evaluate.lm_eval_model  # noqa: F401  # registers the model
from tests.generation.models import exported, reference


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs; the tokenizer has a token a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate([*letters, "Ġ"])}}, merges=[]
        )
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    ours = get_model("onnxtools")(
        model=str(exported("llama", "concat")), tokenizer=str(folder), batch_size=3, device="cpu", max_length=32
    )
    theirs = HFLM(pretrained=reference("llama"), tokenizer=fast, batch_size=1, max_length=32, device="cpu")
    return ours, theirs


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_loglikelihoods(both: tuple[Any, Any]) -> None:
    asked = requests(
        "loglikelihood",
        ("The cat sat on", " the mat"),
        ("A", " B"),
        ("The cat sat on ", "it"),
        ("", "alone"),
        ("A", " C"),
    )
    for (ours, greedy), (theirs, is_greedy) in zip(
        both[0].loglikelihood(asked), both[1].loglikelihood(asked), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=2e-3) and greedy == is_greedy


def test_rolling(both: tuple[Any, Any]) -> None:
    asked = requests("loglikelihood_rolling", ("A short text",))
    assert both[0].loglikelihood_rolling(asked) == pytest.approx(both[1].loglikelihood_rolling(asked), abs=2e-3)


def test_generation(both: tuple[Any, Any]) -> None:
    settings = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", ("The cat", settings), ("Once", settings))
    assert both[0].generate_until(asked) == both[1].generate_until(asked)


def test_its_path(tmp_path: Path) -> None:
    from onnxtools.base.errors import OnnxtoolsError

    with pytest.raises(OnnxtoolsError):
        get_model("onnxtools")(model=str(tmp_path / "absent.onnx"))
