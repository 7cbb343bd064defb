"""Tokenizers against transformers, lm-eval and `tokenizers`; broken ones against one rule: a JobError, and nothing on
stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Native

from onnxtools.base.errors import JobError, OnnxtoolsError
from onnxtools.checkpoints.tokenizer import Tokenizer
from tests.generation import vocabularies as v

CONTEXTS = ("in which the old ship", "in which the old ship ", "in which the old ship  \n", "before night")
CONTINUATIONS = (" sails", "sails", " island", "  sails", " ünknown")


def saved(tokenizer: Native, folder: Path) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder)


# --- context and continuation
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [v.sentencepiece, v.byte_level])
def test_a_continuation_is_cut_as_lm_eval_cuts_it(kind: Callable[[], Native], tmp_path: Path) -> None:
    model = pytest.importorskip("lm_eval.api.model", reason="the harness is the reference (make setup installs it)")
    native = kind()

    class Theirs(model.TemplateLM):  # type: ignore[misc, name-defined]
        backend = "causal"
        eot_token_id = 0

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(native.encode(string).ids)

        def _loglikelihood_tokens(self, *_: Any) -> None: ...
        def loglikelihood_rolling(self, *_: Any) -> None: ...
        def generate_until(self, *_: Any) -> None: ...

    ours, theirs = saved(kind(), tmp_path), Theirs()
    for context in CONTEXTS:
        for continuation in CONTINUATIONS:
            assert ours.pair(context, continuation) == tuple(theirs._encode_pair(context, continuation)), (
                context,
                continuation,
            )


def test_a_word_after_a_byte_level_context_is_what_it_is_alone(tmp_path: Path) -> None:
    """So scores of GPT-2 do not depend on how a passage is cut."""
    ours = saved(v.byte_level(), tmp_path)
    for context in ("in which the old ship", "before night"):
        for word in v.WORDS:
            assert ours.pair(context, f" {word}") == (ours.encode(context), ours.pieces(f" {word}"))


# --- what a file keeps of its training, and what lies beside it
# -------------------------------------------------------------


def cut(tokenizer: Native) -> None:
    tokenizer.enable_truncation(4)


def fill(tokenizer: Native) -> None:
    tokenizer.enable_padding(length=40, pad_token="<unk>")


@pytest.mark.parametrize("change", [cut, fill])
def test_a_text_is_encoded_whole_and_without_padding(change: Callable[[Native], None], tmp_path: Path) -> None:
    text = "in which the old ship sails round a small island before night"
    whole = v.sentencepiece().encode(text).ids
    changed = v.sentencepiece()
    change(changed)
    assert changed.encode(text).ids != whole
    ours = saved(changed, tmp_path)
    assert ours.encode(text) == whole and ours.pieces(text) == whole[1:]


END = "<|endoftext|>"
FOLDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nothing but the two files": ((END,), {}),
    "the end of text is not in the vocabulary": ((), {}),
    "named in the configuration": ((END,),
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END,
            "unk_token": END}}),
    "another end, and a beginning of every text": (
        ("<s>", "</s>", "<pad>"),
        {
            "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<s>",
                "eos_token": "</s>", "unk_token": "</s>"},
            "special_tokens_map": {
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>",
                "pad_token": {"content": "<pad>", "lstrip": False, "rstrip": True},
            },
        },
    ),
    "added tokens with ids of their own": (
        (END,),
        {
            "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<|user|>"]},
            "added_tokens": lambda size: {"<|user|>": size, "<tool>": size + 1},
        },
    ),
    "the decoder of added tokens": (
        (END,),
        {
            "tokenizer_config": lambda size: {
                "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    str(size): {"content": "<|im_end|>", "lstrip": True, "rstrip": False, "normalized": False,
                        "single_word": False, "special": True},
                    str(size + 1): {"content": "<think>", "lstrip": False, "rstrip": False, "normalized": False,
                        "single_word": False, "special": False},
                },
            },
            "special_tokens_map": {"eos_token": "in"},
        },
    ),
    "a space in front": ((END,), {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}),
    "Qwen 2": ((END, "<|im_start|>"),
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"]}}),
}  # fmt: skip
TEXTS = (
    f"in which the{END}old ship", "the <|user|>old <tool> ship", "old ship <|im_end|>night<think> in",
    "</s>the<pad> old<s>",
    "1234 it's 'LL\n\nthe  old é", "e\u0301", "<|im_start|>the", " the", "",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_vocabulary_and_merges_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (make setup installs it)")
    special, files = FOLDERS[name]
    v.write_parts(tmp_path / "f", *special, **files)
    kind = transformers.Qwen2Tokenizer if name == "Qwen 2" else transformers.GPT2Tokenizer
    theirs, ours = kind.from_pretrained(tmp_path / "f"), Tokenizer.open(tmp_path / "f")
    for text in TEXTS:
        if END in text and not special:
            continue  # transformers adds a token beyond the model's vocabulary; we do not
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), (
            text
        )


def test_a_class_with_rules_of_its_own_is_read_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (make setup installs it)")
    v.write_parts(tmp_path, "<s>", "</s>", tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JobError, match=r"vocab\.json: .*pip install transformers"):
        Tokenizer.open(tmp_path)


def test_special_tokens_named_beside_a_tokenizer_json_are_special(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (make setup installs it)")
    vocab, merges = v.byte_level_parts("</s>")
    native = v.byte_level()
    native.model = type(native.model)(vocab=vocab, merges=merges)
    native.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    ids = theirs("the old</s>ship").input_ids
    assert ours.encode("the old</s>ship") == ids and vocab["</s>"] in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# --- broken ones
# ------------------------------------------------------------------------------------------------------------

_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BROKEN: dict[str, dict[str, Any]] = {
    "exponential": {"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": r"^(1|11)*$"}}},
    "quadratic and more": {"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": r"(?:a+a+)+b"}}},
    "a bad regex": {"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": "("}}},
    "stripping more than there is": {"decoder": {"type": "Strip", "content": "e", "start": 0, "stop": 1 << 40}},
    "a map that is no map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "a template of unknown tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a pieces model without an unknown": {"model": {"type": "Unigram", "vocab": [["b", -1.0]], "unk_id": None}},
    "a stride beyond its window": {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 9}
    },
}
_TRY = """
import sys
from pathlib import Path
from onnxtools.base.errors import OnnxtoolsError
from onnxtools.checkpoints.tokenizer import Tokenizer
try:
    tokenizer = Tokenizer.open(Path(sys.argv[1]))
    for text in ("1" * 40 + "!", "a" * 3000, "the old ship", ""):
        tokenizer.decode(tokenizer.encode(text))
        tokenizer.token(2**31 - 1)
except OnnxtoolsError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("name", BROKEN)
def test_a_panic_is_one_error_and_silent(name: str, tmp_path: Path) -> None:
    content = json.loads(v.byte_level().to_str()) | BROKEN[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = subprocess.run(
        [sys.executable, "-c", _TRY, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == "" and found.stdout.count("\n") <= 1


def test_a_pattern_of_cubic_time_is_refused_at_once(tmp_path: Path) -> None:
    """A text of 1600 letters takes seconds and one of 6400 minutes; nothing can interrupt the library."""
    content = json.loads(v.byte_level().to_str()) | {
        "pre_tokenizer": {**_SPLIT, "pattern": {"Regex": r"[a-z]*[a-z]*\d"}}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    start = time.monotonic()
    with pytest.raises(JobError, match="its patterns take too long for"):
        Tokenizer.open(tmp_path)
    assert time.monotonic() - start < 10


def test_what_others_write_to_stderr_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    from onnxtools.checkpoints.native import native_call

    with native_call("x"):
        os.write(2, b"a line of another thread\n")
    assert capfd.readouterr().err == "a line of another thread\n"


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(OnnxtoolsError, match="is a pipe"):
        Tokenizer.open(tmp_path)


def test_a_name_of_the_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=r"hf download some-org/model-1\.5b --local-dir model-1\.5b"):
        Tokenizer.open(Path("some-org/model-1.5b"))
    with pytest.raises(JobError) as error:
        Tokenizer.open(tmp_path / "absent")
    assert "hf download" not in str(error.value)
