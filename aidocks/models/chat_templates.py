"""Chat templates of a result: a few that are known by name, and whatever Jinja a request brings."""

from __future__ import annotations

from dataclasses import dataclass

from aidocks.errors import InvalidSpec

_FIELD = "chat_template"
#: The dialect: statements stand on lines of their own, which leave no trace in the text.
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_MISTRAL = """\
{{- bos_token }}
{%- set parts = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set parts.system = message['content'] + '\\n\\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + parts.system + message['content'] + ' [/INST]' }}
        {%- set parts.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] ~ eos_token }}
    {%- else %}
        {{- raise_exception('There is no role ' + message['role'] + ' in a Mistral chat.') }}
    {%- endif %}
{%- endfor %}
"""
_ALPACA = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' + message['content'] ~ eos_token ~ '\\n\\n' }}
    {%- else %}
        {{- raise_exception('There is no role ' + message['role'] + ' in an Alpaca chat.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        text: Jinja.
        marks: Special tokens that a tokenizer should have for it.
    """

    text: str
    marks: tuple[str, ...] = ()


#: Templates by name.
TEMPLATES = {
    "alpaca": Template(_ALPACA),
    "chatml": Template(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Template(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Template(_MISTRAL),
}


def resolve_template(given: str) -> Template:
    """Return the template that a request means: by name, or literally.

    Raises:
        InvalidSpec: For a name that is not known, and for Jinja that cannot be compiled, naming the line.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    # A text without any statement or expression would answer every chat with itself: a misspelt name.
    if "{{" not in given and "{%" not in given:
        raise InvalidSpec(
            f"There is no chat template called {given[:80]!r}.",
            field=_FIELD,
            value=given[:200],
            hint=f"Known: {', '.join(TEMPLATES)}; or give a Jinja template.",
        )
    _check(given)
    return Template(given)


def _check(text: str) -> None:
    """Parse as transformers will, with loop controls and its ``generation`` block.

    Nothing is compiled: the compiler computes what is constant (``9 ** 9 ** 9``), for as long as it takes.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}``: its content, whose place training code asks for."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError as error:
        raise _flaw(text, error.lineno, str(error.message).rstrip(".")) from error
    except RecursionError as error:
        raise _flaw(text, 1, "it is nested too deeply") from error
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        if node.name not in (environment.filters if isinstance(node, nodes.Filter) else environment.tests):
            raise _flaw(text, node.lineno, f"there is no filter or test {node.name!r}")
    for other in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise _flaw(text, other.lineno, "it needs another template, which a model cannot bring along")


def _flaw(text: str, line: int, reason: str) -> InvalidSpec:
    return InvalidSpec(
        f"The chat template has an error in line {line}: {reason}.",
        field=_FIELD,
        value=text[:200],
        hint=f"Correct it, or use one of {', '.join(TEMPLATES)}.",
    )
