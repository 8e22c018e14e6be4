"""What text is prepared and how: the settings that `nsa fit` (`data.`) and `nsa prepare` share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.data.tokenizer import TokenizerConfig

CHOICE = ("sources", "include", "exclude")
"""The settings that say which files are read."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where text comes from, how it is read, and how it becomes tokens in three splits.

    Raises:
        ValueError: a setting is out of its range.
    """

    sources: Sequence[str] | str = ()
    """Files, directories, globs (** for any depth) and fsspec URLs (s3://..., https://...) of text, code, .json(l) and
    .parquet; all but parquet also as .gz and .zst. ~ is expanded, and {stdlib} stands for Python's standard library. A
    protocol may need a package of its own, such as s3fs."""

    include: Sequence[str] | str = ()
    """Globs of the files to read among `sources`; left out, all. A relative one, such as *.c, at any depth."""

    exclude: Sequence[str] | str = ()
    """Globs of files and directories to leave out; a relative one, such as test_*.py, at any depth. One that matches
    nothing is told."""

    text_field: str = "text"
    """The field of a jsonl line, or the column of a parquet file, that holds the text."""

    skip_binary: bool = False
    """Skip files of `sources` that are not valid UTF-8 text instead of stopping; they count as empty documents."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes tokens; a prepared set has its own."""

    val_fraction: float = 0.01
    """Share of the documents of `sources` held out for validation, by a hash of their text."""

    test_fraction: float = 0.01
    """Share of them held out for the test, by the same hash."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        for name in CHOICE:
            names = getattr(self, name)
            object.__setattr__(self, name, [names] if isinstance(names, str) else list(names))
        fractions = self.val_fraction, self.test_fraction
        if min(fractions) < 0 or sum(fractions) >= 1:
            raise SettingError(
                f"data.val_fraction and data.test_fraction must be 0 or more, below 1 in sum, got {fractions}"
            )

    @property
    def fractions(self) -> dict[str, float]:
        """The shares that are held out, by their names."""
        return {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
