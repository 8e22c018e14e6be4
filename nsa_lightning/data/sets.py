"""What names the data of a run: prepared sets, and the tokenizer that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.data.storage import is_url
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, vocab_size_of
from nsa_lightning.paths import expand_path

Packing = Literal["sequential", "best_fit"]
"""How documents are laid in sequences."""


@dataclass(frozen=True, kw_only=True)
class MixtureSet:
    """One of the sets that are mixed."""

    prepared: str
    """A directory or URL that `nsa prepare` filled."""

    weight: float = 1.0
    """The set's share of the sequences, beside the weights of the others."""

    def __post_init__(self) -> None:
        check_types(self, "data.mixture: ")


def check_origin(
    sources: Sequence[str], prepared: str | None, mixture: Mapping[str, MixtureSet], choice: Mapping[str, Sequence[str]]
) -> None:
    """Refuse settings that name no text, or more than one origin of it.

    Args:
        sources: files, directories, globs and URLs.
        prepared: a set.
        mixture: several of them.
        choice: patterns that choose among the files of `sources`, by the names of their settings.

    Raises:
        ValueError: not exactly one of the three is set, patterns lack `sources`, or a weight is not above 0.
    """
    settings = {"data.sources": sources, "data.prepared": prepared, "data.mixture": mixture}
    given = [name for name, value in settings.items() if value]
    if not given:
        raise SettingError(
            "data.sources must name files, directories, globs or URLs, got none; or set data.prepared or data.mixture"
        )
    if len(given) > 1:
        raise SettingError(
            f"exactly one of {', '.join(settings)} must be set, got {' and '.join(given)}; "
            "clear the others: data.sources with '[]', the rest with null"
        )
    for name, patterns in choice.items():
        if patterns and not sources:
            raise SettingError(
                f"{name} must be empty with {given[0]}, whose files nsa prepare has chosen, got {list(patterns)}"
            )
    for name, each in mixture.items():
        if not 0 < each.weight < float("inf"):
            raise SettingError(f"data.mixture.{name}.weight must be a number above 0, got {each.weight}")


def open_set(setting: str, place: str, cache_dir: Path | None = None) -> TokenStore:
    """Open the prepared set that a setting names.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    place = expand_path(place)
    if is_url(place):
        return TokenStore(place, cache_dir)
    path = Path(place)
    if not (path / "manifest.json").exists():
        raise SettingError(
            f"{setting} must be a set that nsa prepare has finished, got {place}: it has no manifest.json"
        )
    return TokenStore(path, cache_dir)


def common_tokenizer(stores: Mapping[str, TokenStore], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of all sets.

    Args:
        stores: by the setting that names each.
        config: what the user asked for.

    Raises:
        ValueError: two sets differ in it, or `config` names another one.
    """
    (first, store), *others = stores.items()
    for name, other in others:
        if other.manifest.tokenizer != store.manifest.tokenizer:
            raise SettingError(
                f"all sets of data.mixture must have one tokenizer: {first} has {store.manifest.tokenizer}, "
                f"{name} has {other.manifest.tokenizer}"
            )
    tokenizer = store.load_tokenizer()
    if config.path is not None:
        asked = load_tokenizer(config.path, config.end_of_text)
        if asked.fingerprint != tokenizer.fingerprint:
            raise SettingError(
                f"wrong tokenizer: data.tokenizer.path={config.path!r} is {asked.fingerprint}, "
                f"{first} was prepared with {tokenizer.fingerprint}"
            )
    return tokenizer


def configured_vocab_size(
    path: str | None, trained: int, prepared: str | None, mixture: Mapping[str, Any] | None
) -> int:
    """The vocabulary that the settings lead to, found without loading a tokenizer.

    Args:
        path: data.tokenizer.path.
        trained: data.tokenizer.vocab_size.
        prepared: data.prepared.
        mixture: data.mixture, as parsed.
    """
    if prepared:
        return open_set("data.prepared", prepared).manifest.vocab_size
    for name, each in (mixture or {}).items():  # all have one tokenizer
        place = each.get("init_args", each)["prepared"]  # LightningCLI's parser nests the fields
        return open_set(f"data.mixture.{name}.prepared", place).manifest.vocab_size
    return vocab_size_of(path) if path else trained
