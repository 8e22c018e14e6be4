"""What `nsa bench decode` measured."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from nsa_lightning.benchmark.results import ratio

Kind = Literal["layer", "model", "prefill"]


class DecodeCase(NamedTuple):
    """What is measured with every method."""

    kind: Kind
    """One attention layer and one token, a token of the whole model, or a prompt of it."""
    name: str
    """The shape or the config."""
    description: str
    batch_size: int
    context: int
    """Tokens of each sequence, the new one included; of the prompt."""

    @property
    def words(self) -> str:
        """The case in words."""
        return f"{self.kind} {self.name}, batch {self.batch_size}, {self.context} tokens"


@dataclass(frozen=True, kw_only=True)
class DecodeRecord:
    """One method on one case."""

    case: DecodeCase
    method: str
    full: bool
    """Whether it is full attention."""
    implementation: str | None = None
    """The module that the backend stands for with the inputs of a layer."""
    eager_ms: float | None = None
    """Launches one after another, as Python makes them."""
    graph_ms: float | None = None
    """The same as a CUDA graph."""
    num_bytes: float | None = None
    """What the method must read and write, once; of one layer alone."""
    floor_ms: float | None = None
    """The least time for these bytes at the measured rate."""
    reason: str | None = None
    """Why a time is missing."""

    @property
    def ms(self) -> float | None:
        """As a CUDA graph, or where there is none without."""
        return self.eager_ms if self.graph_ms is None else self.graph_ms

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole batch, or of the prompt."""
        if self.case.kind == "layer" or self.ms is None:
            return None
        return 1e3 * (self.case.context if self.case.kind == "prefill" else self.case.batch_size) / self.ms

    def as_row(self) -> dict[str, Any]:
        """Everything in one flat object, for JSON."""
        own = {name: value for name, value in asdict(self).items() if name != "case"}
        derived = {"of_floor": ratio(self.floor_ms, self.ms), "tokens_per_second": self.tokens_per_second}
        return self.case._asdict() | own | derived
