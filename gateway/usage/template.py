"""A model's chat template, rendered as vLLM renders it, so that the text is the one that the engine will tokenize.

The rules are those of vllm/renderers/{hf,chat_utils}.py and transformers' utils/chat_template_utils.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]

_CONTINUE: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # the blank tells whether the template strips its messages

# Arguments of the rendering itself: given to a template, they would change what vLLM does with it.
_NOT_FOR_TEMPLATES: Final = frozenset(
    [
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "tokenizer_kwargs",
        "return_assistant_tokens_mask",
    ]
)


class CannotRender(Exception):  # noqa: N818 - a finding, not a fault
    """This is no template, or vLLM would refuse the request or see more in it than text."""


class ChatTemplate:
    """The template of one model. Thread-safe.

    `sources`: by name; "default", and "tool_use" where there is another for requests with tools.
    `special_tokens`: what templates call bos_token and the like.
    Raises CannotRender for a source that is no template.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._default = _Compiled(sources["default"])
        self._with_tools = _Compiled(sources["tool_use"]) if "tool_use" in sources else self._default
        self._special_tokens = dict(special_tokens)

    def render(self, body: Mapping[str, Any]) -> str:
        """The prompt of a chat request. Raises CannotRender, whatever the body."""
        try:
            tools = body.get("tools")
            template = self._default if tools is None else self._with_tools
            return template.render(
                template.messages(body["messages"]),
                None if tools is None else [_tool(tool) for tool in tools],
                self._special_tokens | _arguments(body),
            )
        except Exception as error:
            # A template may fail in any way on what a client sends.
            raise CannotRender(str(error)) from error


class _Compiled:
    def __init__(self, source: str) -> None:
        environment = _environment()
        self._source = source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CannotRender(f"no template: {error}") from error
        self._wants_parts = _iterates_over_content(environment.parse(source))
        self._knows_developers = '"developer"' in source or "'developer'" in source

    def messages(self, messages: Iterable[Mapping[str, Any]]) -> list[Message]:
        made = [_message(message, parts=self._wants_parts) for message in messages]
        if self._knows_developers or all(message["role"] != "developer" for message in made):
            return made
        return _system_first([_as_system(message) if message["role"] == "developer" else message for message in made])

    def render(self, messages: list[Message], tools: list[Message] | None, arguments: dict[str, Any]) -> str:
        final = ""
        continues = arguments.pop("continue_final_message", False)
        if continues:
            if arguments["add_generation_prompt"] or "content" not in self._source:
                raise CannotRender("what cannot be continued")
            final = _mark_end(messages[-1])
        arguments = {"documents": None, **arguments}
        text = self._template.render(messages=messages, tools=tools, **arguments)
        return _cut_at_mark(text, final) if continues else text


def _arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("chat_template_kwargs") or {}
    if not _NOT_FOR_TEMPLATES.isdisjoint(given):
        raise CannotRender("an argument that is not for templates")
    effort = body.get("reasoning_effort")
    own = {
        "add_generation_prompt": body.get("add_generation_prompt", True),
        "continue_final_message": body.get("continue_final_message", False),
        "documents": body.get("documents"),
        "reasoning_effort": effort,
        "enable_thinking": None if effort is None or "enable_thinking" in given else effort != "none",
    }
    return {**given, **{name: value for name, value in own.items() if value is not None and value != "auto"}}


def _mark_end(message: Message) -> str:
    """Puts the mark behind the message's (last) text, and gives that text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CONTINUE
        return content
    part = next(part for part in reversed(content) if "text" in part)
    text: str = part["text"]
    part["text"] = text + _CONTINUE
    return text


def _cut_at_mark(text: str, final: str) -> str:
    at = text.rindex(_CONTINUE.strip())
    if final.strip() not in text:
        raise CannotRender("the template changes the message that is to be continued")
    return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()


# --- from a request's messages and tools to those that templates get -------------------------------------------------


def _message(message: Mapping[str, Any], *, parts: bool) -> Message:
    """Its content a list of parts if `parts`, else one text."""
    role = message["role"]
    content = message.get("content")
    found = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content or ()]
    if role == "system" and any(part["text"].startswith("x-anthropic-billing-header") for part in found):
        raise CannotRender("a line that vLLM takes out")
    made: Message = {"role": role}
    if not parts:
        made["content"] = "\n".join(part["text"] for part in found if part["text"])
    elif role == "tool":
        made["content"] = "\n".join(part["text"] for part in found)
    else:
        made["content"] = found
    if role == "assistant":
        if message.get("tool_calls"):
            made["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            made["reasoning"] = made["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        made["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        made["tools"] = message.get("tools")
    return made | {name: message[name] for name in ("name", "task") if isinstance(message.get(name), str)}


def _part(part: Mapping[str, Any]) -> Message:
    if part["type"] != "text" or not isinstance(part["text"], str) or "uuid" in part:
        raise CannotRender("a part that is not text")
    return {"type": "text", "text": part["text"], **part}


def _tool_call(call: Mapping[str, Any]) -> Message:
    """Its arguments an object, as templates expect; whatever is none becomes an empty one."""
    function = call["function"]
    if call.get("type", "function") != "function":
        raise CannotRender("a call of something other than a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}
    ordered = {"arguments": arguments if isinstance(arguments, dict) else {}, "name": function["name"]}
    return {"id": call["id"], "function": ordered, "type": "function"}


def _tool(tool: Mapping[str, Any]) -> Message:
    """The fields that vLLM's request model knows, in its order."""
    function = tool["function"]
    defer = tool.get("defer_loading")
    optional = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading", defer)}
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description"),
            "parameters": function.get("parameters"),
            **{name: value for name, value in optional.items() if value is not None},
        },
        **({} if defer is None else {"defer_loading": defer}),
    }


def _as_system(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _system_first(messages: list[Message]) -> list[Message]:
    """All system messages as one, in front, unless the only one is there already."""
    systems = [message for message in messages if message["role"] == "system"]
    if len(systems) == 1 and messages[0] is systems[0]:
        return messages
    texts = [
        content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        for content in (message["content"] for message in systems)
    ]
    merged = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [merged, *(message for message in messages if message["role"] != "system")]


# --- the environment of transformers ---------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is a block like any."""

    tags = {"generation"}  # noqa: RUF012 - as declared by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates know
    return datetime.now().astimezone().strftime(format)


# --- whether a template takes contents apart -------------------------------------------------------------------------


class _Undecided(Exception):  # noqa: N818
    """The template does something that vLLM's own look at it does not expect."""


def _iterates_over_content(root: nodes.Template) -> bool:
    """Whether a template loops over the parts of a message's content: vLLM then gives it parts, else one text."""
    try:
        return any(_loops_over_content(root))
    except _Undecided:
        return False


def _loops_over_content(root: nodes.Template) -> Iterator[bool]:
    loops = list(root.find_all(nodes.For))
    all_messages = _aliases(root, "messages")
    one_message = [_name(loop.target) for loop in loops if any(_reads(loop.iter, name) for name in all_messages)]
    in_macros = {
        id(loop): _content_parameters(root, macro, one_message)
        for macro in root.find_all(nodes.Macro)
        for loop in macro.find_all(nodes.For)
    }
    for loop in loops:
        named = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        # A plain `content` is taken for a message's, but not in a macro, where it may be any parameter.
        if any(_reads(loop.iter, name, "content") for name in one_message) or (
            named is not None and named in in_macros.get(id(loop), {"content"})
        ):
            _name(loop.target)
            yield True


def _aliases(root: nodes.Template, name: str) -> list[str]:
    """The names under which a template keeps a variable, or a slice or filtering of it."""
    found = [name]
    for known in found:  # grows
        for assign in root.find_all(nodes.Assign):
            if _reads(assign.node, known) and (target := _name(assign.target)) not in found:
                found.append(target)
    return found


def _content_parameters(root: nodes.Template, macro: nodes.Macro, one_message: list[str]) -> set[str]:
    """The parameters of a macro that some call gives a message's content."""
    names = [parameter.name for parameter in macro.args]
    given: list[tuple[str, nodes.Expr]] = []
    for call in root.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given += zip(names, call.args, strict=False)
            given += [(keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in names]
    return {name for name, value in given if any(_reads(value, message, "content") for message in one_message)}


def _reads(node: nodes.Node | None, name: str, attribute: str | None = None) -> bool:
    """Whether an expression is a variable, or that attribute of it, perhaps filtered, tested or sliced."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if attribute is not None:
        match node:
            case nodes.Getitem(arg=nodes.Const(value=key)) | nodes.Getattr(attr=key) if key == attribute:
                node = node.node
            case _:
                return False
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Undecided
    return target.name
