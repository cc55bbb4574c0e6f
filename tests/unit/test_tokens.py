import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.usage.prompt import CannotCount
from gateway.usage.tokens import TokenCounter, load_counter

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".models/SmolLM2-135M-Instruct"

Make = Callable[..., Path]

# Every printable ASCII character is written as itself; the rest of a byte's alphabet does not come up here.
TOKENIZER = {
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<s>": {"ids": [0]}},
    },
    "added_tokens": [{"content": "<s>"}],
    "model": {
        "type": "BPE",
        "vocab": dict.fromkeys([*map(chr, range(0x21, 0x7F)), "Ġ", "ab"], 0),
        "merges": [["a", "b"]],
    },
}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<s>"}, "model_max_length": 1e30}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**files: Any) -> Path:
        """A model's folder; a file's name with _ for its dot."""
        for name, content in {"tokenizer_json": TOKENIZER, "tokenizer_config_json": CONFIG, **files}.items():
            stem, _, suffix = name.rpartition("_")
            path = tmp_path / f"{stem}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return tmp_path

    return make


def loaded(folder: Path) -> TokenCounter:
    counter = load_counter(folder)
    assert counter is not None
    return counter


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents], **more}


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", 1),
        ("abab", 3),
        (["abab", "c"], 5),
        ([1, 2, 3], 3),
        ([[1, 2], [3]], 3),
        (["ab", [1, 2]], 4),
        ([[]], 0),
    ],
)
def test_prompts_of_completions_are_texts_and_token_ids(make: Make, prompt: object, tokens: int) -> None:
    assert loaded(make()).count_prompt(prompt) == tokens


def test_special_tokens_are_put_before_a_completion_s_prompt_but_not_before_a_chat(make: Make) -> None:
    counter = loaded(make(chat_template_jinja=TEMPLATE))
    assert counter.count_prompt("ab") == 2
    assert counter.count_prompt("ab", add_special_tokens=False) == 1
    assert counter.count_chat(chat("ab")) == 2  # the template's own
    assert counter.count_chat(chat("ab", add_special_tokens=True)) == 3
    assert counter.count_text("ab<s>") == 2


@pytest.mark.parametrize("prompt", [None, 7, {}, [], [None], [{}], ["a", 1], "é"])
def test_what_is_neither_texts_nor_ids_cannot_be_counted(make: Make, prompt: object) -> None:
    with pytest.raises(CannotCount):
        loaded(make()).count_prompt(prompt)


def test_a_chat_that_cannot_be_rendered_cannot_be_counted(make: Make) -> None:
    with pytest.raises(CannotCount):
        loaded(make(chat_template_jinja=TEMPLATE)).count_chat({"messages": 5})


def test_threads_may_share_a_counter(make: Make) -> None:
    counter = loaded(make(chat_template_jinja=TEMPLATE))
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(lambda n: counter.count_chat(chat("ab " * n)), range(200)))
    assert counted == [2 * n + 1 for n in range(200)]


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"tokenizer_config_json": CONFIG | {"chat_template": TEMPLATE}}, 3),
        ({"tokenizer_config_json": CONFIG | {"chat_template": "ab"}, "chat_template_jinja": TEMPLATE}, 3),
        ({"tokenizer_config_json": CONFIG | {"chat_template": [{"name": "default", "template": TEMPLATE}]}}, 3),
        ({"chat_template_jinja": "ab", "additional_chat_templates/tool_use_jinja": TEMPLATE}, 1),
        (
            {
                "tokenizer_config_json": {"tokenizer_class": "PreTrainedTokenizerFast"},
                "special_tokens_map_json": {"bos_token": "<s>"},
                "chat_template_jinja": TEMPLATE,
            },
            3,
        ),
        (
            {
                "tokenizer_config_json": {"tokenizer_class": "GPT2Tokenizer"},  # whose beginning is <|endoftext|>
                "chat_template_jinja": TEMPLATE,
            },
            3,
        ),
        (
            {
                "tokenizer_config_json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": None},
                "chat_template_jinja": "{{ 'no' if bos_token is defined else 'ab' }}",
            },
            1,
        ),
    ],
)
def test_where_templates_and_their_tokens_come_from(make: Make, files: dict[str, Any], tokens: int) -> None:
    assert loaded(make(**files)).count_chat(chat("ab", "ab")) == tokens


def test_requests_with_tools_have_a_template_of_their_own(make: Make) -> None:
    files: dict[str, Any] = {"chat_template_jinja": "ab", "additional_chat_templates/tool_use_jinja": "{{ 'ab' * 5 }}"}
    assert loaded(make(**files)).count_chat(chat("x", tools=[])) == 5


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config_json": CONFIG | {"chat_template": [{"name": "rag", "template": "ab"}]}},
        {"chat_template_jinja": "{% for %}"},
        {"chat_template_jinja": "ab", "chat_template_json": {"chat_template": "ab"}},
    ],
)
def test_without_a_usable_template_only_texts_are_counted(make: Make, files: dict[str, Any]) -> None:
    counter = loaded(make(**files))
    assert counter.count_prompt("ab") == 2
    with pytest.raises(CannotCount, match="template"):
        counter.count_chat(chat("ab"))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config_json": {"architectures": ["GptOssForCausalLM"]}}, "code of its own"),
        ({"tekken_json": {}}, "code of its own"),
        ({"tokenizer.model_v3": ""}, "code of its own"),
        ({"tokenizer_json": TOKENIZER | {"normalizer": {"type": "Lowercase"}}}, "Lowercase"),
        ({"tokenizer_config_json": CONFIG | {"tokenizer_class": "LlamaTokenizer"}}, "LlamaTokenizer"),
        ({"tokenizer_json": "{"}, "cannot be read"),
        ({"tokenizer_json": {}}, "cannot be read"),
        ({"tokenizer_json": []}, "cannot be read"),
        ({"tokenizer_config_json": "7"}, "cannot be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_reproduced_is_not_loaded_and_the_log_says_why(
    make: Make, files: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert load_counter(make(**files)) is None
    assert reason in caplog.text


def test_a_folder_without_a_tokenizer_has_no_counter(tmp_path: Path) -> None:
    assert load_counter(tmp_path) is None
    assert load_counter(tmp_path / "nowhere") is None


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_smollm2_is_counted_as_by_its_own_tokenizer() -> None:
    """The counts in the data file are those of the tokenizers and transformers libraries."""
    expected = json.loads((Path(__file__).parent / "data/smollm2_tokens.json").read_text("utf-8"))
    counter = loaded(SMOLLM2)
    assert [counter.count_text(text) for text, _ in expected["texts"]] == [tokens for _, tokens in expected["texts"]]
    assert [counter.count_chat(body) for body, _ in expected["chats"]] == [tokens for _, tokens in expected["chats"]]
