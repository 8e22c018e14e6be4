"""A prompt as the message of a conversation, by the template that comes with a tokenizer."""

import time
from pathlib import Path
from typing import Any, NoReturn

from nsa_kernels.errors import SettingError

from nsa_lightning.checkpoint.dense import read_json

_FILE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """The Jinja template of a tokenizer's directory, run in a sandbox that cannot change what it is given.

    Args:
        directory: with chat_template.jinja, or tokenizer_config.json that holds `chat_template`.

    Raises:
        ValueError: there is no template, or it is no Jinja.
    """

    def __init__(self, directory: Path) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        settings = read_json(directory / _SETTINGS, "tokenizer") if (directory / _SETTINGS).is_file() else {}
        self._directory = directory
        self._names = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _raise, "strftime_now": time.strftime}
        try:
            self._template = environment.from_string(_read_template(directory, settings))
        except jinja2.TemplateError as error:
            raise SettingError(f"chat: the template of {directory} is broken: {error}") from error

    def render(self, prompt: str) -> str:
        """The conversation up to where the model's answer begins.

        Raises:
            ValueError: the template fails or refuses the message.
        """
        messages = [{"role": "user", "content": prompt}]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except Exception as error:  # a template is a program and raises what it likes
            raise SettingError(f"chat: the template of {self._directory} failed: {error}") from error


def _read_template(directory: Path, settings: dict[str, Any]) -> str:
    """The template's text; of several in the settings the one called `default`."""
    if (directory / _FILE).is_file():
        return (directory / _FILE).read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str):
        raise SettingError(
            f"chat must be false where the tokenizer has no chat template: {directory} has no {_FILE}, "
            f"and no chat_template in {_SETTINGS}"
        )
    return template


def _content(token: Any) -> Any:
    """The text of a special token, which may be saved with its properties."""
    return token["content"] if isinstance(token, dict) else token


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
