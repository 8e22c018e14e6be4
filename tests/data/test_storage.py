import io
from pathlib import Path

import numpy as np
import pytest

from nsa_lightning.data import storage
from nsa_lightning.data.storage import retried, save_array


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("size", [1, 10**6])
def test_an_array_that_does_not_fit_is_told(size: int) -> None:
    with pytest.raises(OSError, match="No space left on device"), Path("/dev/full").open("wb") as stream:
        save_array(stream, np.zeros(size))


def test_an_array_is_written_as_numpy_writes_it() -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    save_array(ours, np.arange(12).reshape(3, 4))
    np.save(theirs, np.arange(12).reshape(3, 4))
    assert ours.getvalue() == theirs.getvalue()
