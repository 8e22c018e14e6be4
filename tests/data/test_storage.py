import pytest

from nsa_lightning.data import storage
from nsa_lightning.data.storage import retried


class HTTPError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.status = status


def missing(cause: Exception | None) -> Exception:
    """What fsspec's http makes of any failure."""
    error = FileNotFoundError("https://host/a")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (TimeoutError("slow"), 3),
        (RuntimeError("SlowDown"), 3),
        (missing(ConnectionResetError("reset")), 3),
        (missing(HTTPError(503)), 3),
        (missing(HTTPError(429)), 3),
        (missing(HTTPError(404)), 1),
        (missing(None), 1),
        (PermissionError("Forbidden"), 1),
        (ValueError("no ranges"), 1),
    ],
    ids=repr,
)
def test_only_what_may_pass_is_tried_again(
    error: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.001))
    with pytest.raises(ValueError, match="s3://bucket/a cannot be read") as caught:
        retried("s3://bucket/a", action)
    assert len(calls) == attempts
    assert str(error.__cause__ or error) in str(caught.value)
    assert [record.message.split()[0] for record in caplog.records] == ["s3://bucket/a"] * (attempts - 1)


def test_pauses_grow_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    answers = [OSError("one"), OSError("two"), "whole"]

    def action() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("time.sleep", slept.append)
    assert retried("s3://bucket/a", action) == "whole"
    assert 0 < slept[0] < slept[1]
