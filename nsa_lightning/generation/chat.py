"""A prompt as the message of a conversation, by the template that comes with a tokenizer."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from nsa_kernels.errors import SettingError

from nsa_lightning.data.token_names import SETTINGS, read_settings, special_token_names

_FILE, _MORE = "chat_template.jinja", "additional_chat_templates"


class ChatTemplate:
    """The Jinja template of a tokenizer's directory, run in a sandbox that cannot change what it is given.

    It sees what `apply_chat_template` of `transformers` shows it, and renders the same.

    Args:
        directory: with chat_template.jinja, or tokenizer_config.json that holds `chat_template`.

    Raises:
        ValueError: there is no template, or it is no Jinja.
    """

    def __init__(self, directory: Path) -> None:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.nodes import Node, Scope
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what the model has written, to train on it; it is rendered like the rest."""

            tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

            def parse(self, parser: Parser) -> Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return Scope(body).set_lineno(line)

        self._directory = directory
        self._names = special_token_names(directory)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(_read_template(directory))
        except jinja2.TemplateError as error:
            raise SettingError(f"chat: the template of {directory} is broken: {error}") from error

    def render(self, prompt: str) -> str:
        """The conversation up to where the model's answer begins.

        Raises:
            ValueError: the template fails or refuses the message.
        """
        messages = [{"role": "user", "content": prompt}]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._names
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise SettingError(f"chat: the template of {self._directory} failed: {error}") from error


def _read_template(directory: Path) -> str:
    """The template's text; of several the one called `default`. Files have precedence over the settings."""
    files = {path.stem: path for path in sorted((directory / _MORE).glob("*.jinja"))}
    if (directory / _FILE).is_file():
        files["default"] = directory / _FILE
    template = read_settings(directory / SETTINGS).get("chat_template")
    if files:
        template = files["default"].read_text(encoding="utf-8") if "default" in files else None
    elif isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not isinstance(template, str):
        raise SettingError(
            f"chat must be false where the tokenizer has no chat template: {directory} has no {_FILE}, "
            f"and no chat_template in {SETTINGS}"
        )
    return template


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes what is safe within HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
