"""Chat templates, rendered as vLLM 0.32 renders them."""

import copy
from typing import Any

import pytest

from gateway.usage.template import CannotRender, ChatTemplate

Body = dict[str, Any]

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALL = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p.text if p is mapping else p }}|{% endfor %}{% endfor %}"


def render(source: str, body: Body, **special_tokens: str) -> str:
    before = copy.deepcopy(body)
    try:
        return ChatTemplate({"default": source}, special_tokens).render(body)
    finally:
        assert body == before


def said(*contents: Any, role: str = "user") -> Body:
    return {"messages": [{"role": role, "content": content} for content in contents], "add_generation_prompt": False}


def text(content: str, **more: Any) -> Body:
    return {"type": "text", "text": content, **more}


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, "<s><user>Hi<assistant>"),
        ({"add_generation_prompt": True}, "<s><user>Hi<assistant>"),
        ({"add_generation_prompt": False}, "<s><user>Hi"),
        ({"chat_template_kwargs": {"bos_token": "B", "add_generation_prompt": False}}, "B<user>Hi<assistant>"),
        ({"chat_template_kwargs": None}, "<s><user>Hi<assistant>"),
    ],
)
def test_the_generation_prompt_and_special_tokens(fields: Body, rendered: str) -> None:
    assert render(PLAIN, {"messages": [{"role": "user", "content": "Hi"}], **fields}, bos_token="<s>") == rendered


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, "-|-|-"),
        ({"reasoning_effort": "high"}, "high|True|-"),
        ({"reasoning_effort": "none"}, "none|False|-"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "low|False|-"),
        ({"documents": [{"title": "é"}]}, '-|-|[{"title": "é"}]'),
        ({"chat_template_kwargs": {"documents": []}}, "-|-|[]"),
    ],
)
def test_what_else_a_request_gives_a_template(fields: Body, rendered: str) -> None:
    source = (
        "{{ reasoning_effort | default('-') }}|{{ enable_thinking | default('-') }}|"
        "{{ '-' if documents is none else documents | tojson }}"
    )
    assert render(source, {"messages": [], **fields}) == rendered


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "tokenize"])
def test_arguments_that_are_not_for_templates_are_refused(name: str) -> None:
    with pytest.raises(CannotRender):
        render(PLAIN, said("Hi") | {"chat_template_kwargs": {name: 1}})


def test_tools_come_with_the_known_fields_in_order_and_their_own_template() -> None:
    template = ChatTemplate({"default": "no tools", "tool_use": "{{ tools | tojson }}"}, {})
    tool = {"x": 1, "function": {"parameters": {"b": 1, "a": 2}, "y": 2, "name": "f"}, "type": "function"}
    assert template.render({"messages": []}) == "no tools"
    assert template.render({"messages": [], "tools": [tool]}) == (
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": 2}}}]'
    )
    deferred = {"defer_loading": True, "function": {"name": "f", "strict": False}}
    assert template.render({"messages": [], "tools": [deferred]}) == (
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": null, "strict": false, '
        '"defer_loading": true}, "defer_loading": true}]'
    )


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        ({"role": "user", "content": "Hi", "x": 1}, '{"role": "user", "content": "Hi"}'),
        ({"role": "user", "content": "Hi", "name": "n"}, '{"role": "user", "content": "Hi", "name": "n"}'),
        ({"role": "user", "content": [text("a"), text(""), text("b")]}, '{"role": "user", "content": "a\\nb"}'),
        ({"role": "assistant"}, '{"role": "assistant", "content": ""}'),
        ({"role": "assistant", "content": None, "tool_calls": []}, '{"role": "assistant", "content": ""}'),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "r"},
            '{"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"}',
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "s"},
            '{"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"}',
        ),
        (
            {"role": "tool", "tool_call_id": "1", "content": [text("a"), text("b")]},
            '{"role": "tool", "content": "a\\nb", "tool_call_id": "1"}',
        ),
        ({"role": "tool", "content": "a"}, '{"role": "tool", "content": "a"}'),
    ],
)
def test_messages_as_templates_see_them(message: Body, seen: str) -> None:
    assert render(ALL, {"messages": [message]}) == seen


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a": "é"}', '{"a": "é"}'),
        ("", "{}"),
        ("[1]", "{}"),
        ("{bad", "{}"),
        (None, "{}"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_arguments_of_tool_calls_are_objects(arguments: Any, seen: str) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
    assert render(ALL, {"messages": [{"role": "assistant", "tool_calls": [call]}]}) == (
        '{"role": "assistant", "content": "", "tool_calls": '
        f'[{{"id": "1", "function": {{"arguments": {seen}, "name": "f"}}, "type": "function"}}]}}'
    )


@pytest.mark.parametrize(
    "message",
    [
        {"content": "no role"},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["text as a part"]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [text("a", uuid="1")]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "system", "content": "x-anthropic-billing-header: x\nrest"},
        "not a message",
    ],
)
def test_what_is_not_plainly_text_cannot_be_rendered(message: Any) -> None:
    with pytest.raises(CannotRender):
        render(ALL, {"messages": [message]})


@pytest.mark.parametrize("body", [{}, {"messages": 5}, {"messages": [], "tools": 7}, {"messages": [], "tools": [{}]}])
def test_any_body_is_either_rendered_or_refused(body: Body) -> None:
    with pytest.raises(CannotRender):
        render(ALL, body)


@pytest.mark.parametrize(
    ("roles", "rendered"),
    [
        ("user developer", "<system>1<user>0"),
        ("developer user", "<system>0<user>1"),
        ("system developer user system", "<system>0\n\n1\n\n3<user>2"),
        ("system user", "<system>0<user>1"),
        ("user system", "<user>0<system>1"),  # only a developer moves it
    ],
)
def test_a_developer_is_the_system_where_the_template_knows_none(roles: str, rendered: str) -> None:
    messages = [{"role": role, "content": str(n)} for n, role in enumerate(roles.split())]
    assert render(PLAIN, {"messages": messages, "add_generation_prompt": False}) == rendered


def test_a_developer_is_one_where_the_template_knows_it() -> None:
    source = "{% for m in messages %}{{ 'developer' }}{{ m.content }}{{ m.tools | tojson }}{% endfor %}"
    assert render(source, said("x", role="developer")) == "developerxnull"


def test_the_parts_of_system_messages_are_joined_when_they_are_merged() -> None:
    messages = [{"role": "developer", "content": [text("a"), text("b")]}, {"role": "system", "content": "c"}]
    assert render(
        "{% for m in messages %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}", {"messages": messages}
    ) == ("a\nb\n\nc")


# --- a final message that is continued -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "content", "rendered"),
    [
        (PLAIN + "<end>", "Hello ", "<user>Hello "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "Hello ", "[Hello"),
        (PARTS, [text("a"), text("b")], "a|b"),
    ],
)
def test_a_final_message_that_is_continued_is_left_open(source: str, content: Any, rendered: str) -> None:
    assert render(source, said(content) | {"continue_final_message": True}) == rendered


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        (PLAIN, {"add_generation_prompt": True}),
        ("{{ messages[0].role }}", {}),
        ("content", {}),
        ("{{ messages[0].content[:3] }}CONTINUE_FINAL_MESSAGE_TAG", {}),
        (PARTS, {"messages": [{"role": "user", "content": []}]}),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, fields: Body) -> None:
    with pytest.raises(CannotRender):
        render(source, said("Hello") | {"continue_final_message": True} | fields)


# --- the language of templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("a{% generation %}{% set x = 1 %}b{% endgeneration %}{{ x }}", "ab"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ nothing }}", ""),
    ],
)
def test_the_language_is_that_of_transformers(source: str, rendered: str) -> None:
    assert render(source, {"messages": []}) == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at_all }}",
    ],
)
def test_a_template_that_fails_renders_nothing(source: str) -> None:
    with pytest.raises(CannotRender):
        render(source, {"messages": []})


def test_a_source_that_is_no_template_is_refused() -> None:
    with pytest.raises(CannotRender, match="no template"):
        ChatTemplate({"default": "{% for %}"}, {})


# --- text or parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages[1:] %}{% for p in m.content[1:] %}{% endfor %}{% endfor %}", True),
        (
            "{% set all = messages %}{% set rest = all[1:] %}{% set all = rest %}{% for m in rest %}{% for p in m.content %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for m in others %}{% for p in m.content %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.parts %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m[content] %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.x.content %}{% endfor %}{% endfor %}", False),
        ("{% for p in content %}{% endfor %}", True),
        ("{% for p in contents %}{% endfor %}", False),
        ("{% macro f(content) %}{% for p in content %}{% endfor %}{% endmacro %}", False),
        (
            "{% macro f(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% macro f(x, c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ g(m.content) }}{{ f(1) }}{{ f(1, c=m.content, z=2) }}{% endfor %}",
            True,
        ),
        (
            "{% macro f(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
            False,
        ),
        # What vLLM's look at a template does not expect, it takes for text.
        ("{% for a, b in messages %}{% endfor %}{% for p in content %}{% endfor %}", False),
        ("{% set ns = namespace() %}{% set ns.m = messages %}{% for p in content %}{% endfor %}", False),
        ("{% for m in messages %}{% for a, b in m.content %}{% endfor %}{% endfor %}", False),
    ],
)
def test_a_template_that_loops_over_contents_gets_them_as_parts(source: str, parts: bool) -> None:
    shown = "{{ messages[0].content is string }}{# #}"
    body = said("x")
    template = ChatTemplate({"default": "{% if false %}" + source + "{% endif %}" + shown}, {})
    assert template.render(body) == str(not parts)


def test_parts_keep_what_else_they_hold() -> None:
    source = PARTS.replace("p.text", "p | tojson")
    assert render(source, said("a", [text("b", cache_control=1)])) == (
        '{"type": "text", "text": "a"}|{"type": "text", "text": "b", "cache_control": 1}|'
    )


def test_the_parts_of_a_tool_s_answer_are_joined_even_then() -> None:
    assert render(PARTS + "{{ messages[0].content }}", said([text("a"), text(""), text("b")], role="tool")).endswith(
        "a\n\nb"
    )
