"""Chat templates: untrusted jinja that comes with a model, rendered as transformers renders it."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training masks; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser):
        """The statements of the block, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False
) -> str:
    # jinja's own filter escapes HTML characters.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of a conversation.

    Args:
        template: jinja source.
        messages: {"role": ..., "content": ...} each, in order.
        variables: What else the template may ask for.

    Raises:
        ValueError: If the template is malformed or refuses the messages.
    """
    try:
        return _compile(template).render(messages=messages, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"chat template: {type(error).__name__}: {error}; change the messages, or pass the text itself"
        ) from error
