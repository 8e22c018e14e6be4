import codecs
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data.documents import Document, iter_documents
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.sources import Part, SourceFile, parts_of
from nsa_lightning.data.splits import split_of, text_fraction


def write(path: Path, content: str | bytes = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def read(path: Path, text_field: str = "text") -> list[Document]:
    return list(iter_documents([Part(str(path), 0, None, 0)], TextSettings(text_field=text_field)))


def test_text_is_read_to_the_byte(tmp_path: Path) -> None:
    text = "\ufefféa\r\nb\n\n文🙂"
    plain, packed = write(tmp_path / "a.txt", text), write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))
    for path in plain, packed, write(tmp_path / "a.TXT.zst", zstd(text.encode())):
        assert read(path) == [Document(str(path), text)]


def test_a_jsonl_line_is_a_document_named_by_its_number(tmp_path: Path) -> None:
    lines = '{"text": "one", "id": 1}\n\n{"id": 2, "text": "two"}\n{"text": null}\n{"text": ""}'
    plain, packed = write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.JSONL.gz", gzip.compress(lines.encode()))
    frames = zstd(lines[:31].encode()) + zstd(lines[31:].encode())
    for path in plain, packed, write(tmp_path / "c.jsonl.zst", frames):
        numbered = {1: "one", 3: "two", 4: "", 5: ""}
        assert read(path) == [Document(f"{path}:{line}", text) for line, text in numbered.items()]


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path: Path) -> None:
    line, mark = b'{"text": "one", "score": NaN}\r\n', codecs.BOM_UTF8
    path = write(tmp_path / "a.jsonl", mark + line + b"\r\n" + mark + line)
    assert read(path) == [Document(f"{path}:1", "one"), Document(f"{path}:3", "one")]
    for name in "b.jsonl.gz", "b.ndjson.gz":
        assert [text for _, text in read(write(tmp_path / name, gzip.compress(mark + line)))] == ["one"]
    assert read(write(tmp_path / "c.json", mark + b"[" + line + b"]")) == [Document(f"{tmp_path}/c.json[0]", "one")]
    assert read(write(tmp_path / "d.jsonl", mark)) == read(write(tmp_path / "e.jsonl", b"")) == []


def test_the_records_of_a_json_file_are_documents(tmp_path: Path) -> None:
    contents = {
        '[{"text": "a"},\n {"text": null, "id": 1}, {"text": "text"}]': {"[0]": "a", "[1]": "", "[2]": "text"},
        '{"text": "a"}\n\n{"text": "b"}\n': {":1": "a", ":3": "b"},
        '{\n  "text": "a"\n}': {"": "a"},
    }
    for content, documents in contents.items():
        plain, packed = write(tmp_path / "a.json", content), write(tmp_path / "a.json.zst", zstd(content.encode()))
        for path in plain, packed:
            assert read(path) == [Document(f"{path}{place}", text) for place, text in documents.items()]


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "package", "version": 1}',
        "[1, 2, 3]",
        '["text", {"text": "a"}]',
        "[]",
        "",
        "// a comment\n{}",
        '{"id": 1}\n{"id": 2}',
        "[" * 10**5,
        '{"text": {"en": "a"}}',
    ],
)
def test_a_json_file_without_records_is_a_text(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.json", content)
    assert read(path) == [Document(str(path), content)]


def test_records_of_a_json_file_that_have_no_text_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.json", '[{"text": "a"}, {"body": "b"}]')
    with pytest.raises(ValueError, match=re.escape(f"data.text_field='text' is not a field of {path}[1], which has")):
        read(path)
    path.write_text('{"text": "a"}\n{"text": 5}')
    with pytest.raises(ValueError, match=f"data.text_field='text' must hold text, {path}:2 holds int"):
        read(path)
    path.write_text('[{"body": "a"}]')
    assert not caplog.records
    assert read(path) == [Document(str(path), '[{"body": "a"}]')]
    assert caplog.messages == [f"{path} is an array of records without data.text_field='text' and is read as one text"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_row_is_a_document_named_by_its_number(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"row {i}" for i in range(200)] + [None]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(201), "body": pa.array(texts, kind)}), path, row_group_size=50)
    assert read(path, "body") == [Document(f"{path}:{i}", text or "") for i, text in enumerate(texts)]


@given(st.lists(st.text(max_size=20), max_size=12), st.integers(1, 80), st.booleans())
def test_the_parts_of_a_jsonl_file_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, ends: bool
) -> None:
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n" * ends
    path = write(tmp_path_factory.mktemp("parts") / "a.jsonl", lines)
    parts = parts_of(SourceFile(str(path), path.stat().st_size, ""), size)
    assert len(parts) == max(1, -(-path.stat().st_size // size))
    assert [document.text for document in iter_documents(parts, TextSettings())] == texts


def test_a_bad_line_of_a_files_middle_is_named_by_its_first_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=f"{path} at byte 17 holds int"):
        list(iter_documents([Part(str(path), 3, None, 0)], TextSettings()))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 3000))
def test_the_parts_of_a_parquet_file_give_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, size: int
) -> None:
    texts = [f"row {row} " * 9 for row in range(rows)]
    path = tmp_path_factory.mktemp("parts") / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=group)
    parts = parts_of(SourceFile(str(path), path.stat().st_size, ""), size)
    assert list(iter_documents(parts, TextSettings())) == [
        Document(f"{path}:{row}", text) for row, text in enumerate(texts)
    ]


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100_000}).encode() + b"\n"
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(line * 200, 1))
    tracemalloc.start()
    assert (
        sum(len(document.text) for document in iter_documents([Part(str(path), 0, None, 0)], TextSettings()))
        == 20_000_000
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "secret.txt")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"data.sources: .*/secret.txt cannot be read: Permission denied"):
        read(path)


@pytest.mark.parametrize(("content", "offset"), [(b"caf\xe9 au lait", 3), (b"\x89PNG", 0), (b"ab\0c", 2)])
def test_a_file_that_is_not_text_is_named_with_the_byte(tmp_path: Path, content: bytes, offset: int) -> None:
    path = write(tmp_path / "image", content)
    with pytest.raises(
        ValueError, match=f"{path} is not UTF-8 text: .* at byte {offset}; leave it out with data.exclude"
    ):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut"', "{path}:2 is not a JSON object: Expecting ',' delimiter"),
        (b'{"text": "\xe9"}', "{path}:2 is not a JSON object: 'utf-8' codec can't decode"),
        (b'["text"]', "{path}:2 is not a JSON object, got list"),
        (b'{"body": "b", "id": 2}', "data.text_field='text' is not a field of {path}:2, which has ['body', 'id']"),
        (b'{"text": 5}', "data.text_field='text' must hold text, {path}:2 holds int"),
        (b'{"text": "\\ud800"}', "{path}:2 is not Unicode text: surrogates not allowed at character 0"),
        (b'"text"', "{path}:2 is not a JSON object, got str"),
        (
            b'{"text": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "{path}:2 is not a JSON object: it is nested too",
        ),
        (b'{"text": "a", "text": "b"}', "{path}:2 is not a JSON object: the field 'text' stands twice in it"),
        ('{"text": "x"}'.encode("utf-16"), "{path}:2 is not a JSON object: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    documents = iter_documents([Part(str(path), 0, None, 0)], TextSettings())
    assert next(documents).text == "fine"
    with pytest.raises(ValueError, match=re.escape(message.replace("{path}", str(path)))):
        next(documents)


def test_a_parquet_file_without_the_column_lists_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["b"]}), path)
    with pytest.raises(ValueError, match=r"data.text_field='text' is not a column of .*, which has \['id', 'body'\]"):
        read(path)
    with pytest.raises(ValueError, match=r"data.text_field='id' must hold text, .*a.parquet holds int64"):
        read(path, "id")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, compression="none")
    whole = path.read_bytes()
    for broken in (b"no parquet at all", whole[:-100], whole[:4] + b"\xff" * 9_996 + whole[10_000:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.parquet (is not a whole parquet file|cannot be read)"):
            read(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(b'{"text": "some text"}\n' * 1000)
    for broken in (whole[:-20], b"plain text", whole[:20] + b"\xff" * 20 + whole[40:]):
        path = write(tmp_path / name, broken)
        with pytest.raises(ValueError, match=f"data.sources: {path} is not a whole gzip file"):
            read(path)


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_text_falls_in_one_split_by_its_fraction(text: str, val_fraction: float, test_fraction: float) -> None:
    split = split_of(text, val_fraction, test_fraction)
    fraction = text_fraction(text)
    assert 0 <= fraction < 1
    assert (split == "test") == (fraction < test_fraction)
    assert (split == "train") == (fraction >= test_fraction + val_fraction)


@pytest.mark.parametrize("content", [zstd(b"some text" * 100)[:-5], b"plain text"])
def test_a_broken_zstd_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.txt.zst", content)
    with pytest.raises(ValueError, match=f"data.sources: {path} cannot be read: (Truncated|ZSTD decompress failed)"):
        read(path)


@pytest.fixture
def bucket() -> Iterator[Callable[[str, bytes], str]]:
    memory = fsspec.filesystem("memory")
    yield lambda name, content: [memory.pipe(f"/bucket/{name}", content), f"memory://bucket/{name}"][1]
    memory.rm("/bucket", recursive=True)


def test_a_url_is_read_like_a_file(tmp_path: Path, bucket: Callable[[str, bytes], str]) -> None:
    lines = b'{"text": "one"}\n' * 5
    pq.write_table(pa.table({"text": [f"row {row}" for row in range(50)]}), tmp_path / "a.parquet", row_group_size=9)
    contents = {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.jsonl.zst": zstd(lines), "d": "été".encode()}
    contents["a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    for name, content in contents.items():
        local, url = write(tmp_path / name, content), bucket(name, content)
        parts = parts_of(SourceFile(url, len(content), ""), 30)
        assert [text for _, text in iter_documents(parts, TextSettings())] == [text for _, text in read(local)]


def test_a_url_that_fails_midway_goes_on_where_it_was(
    bucket: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket("a.txt.gz", gzip.compress(random.Random(0).randbytes(3_000_000).hex().encode()))
    calls: list[int] = []

    def flaky(stream: Any, size: int = -1) -> bytes:
        calls.append(stream.tell())
        if len(calls) in failing:
            raise ConnectionResetError(104, "Connection reset by peer")
        return io.BytesIO.read(stream, size)

    monkeypatch.setattr("nsa_lightning.data.storage.PAUSES", (0.0, 0.0))
    monkeypatch.setattr("nsa_lightning.data.storage.READ_AHEAD", 2**20)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", flaky, raising=False)
    failing = {2, 3}
    (document,) = iter_documents([Part(url, 0, None, 0)], TextSettings())
    assert document.text == random.Random(0).randbytes(3_000_000).hex()
    assert calls[1] == calls[2] == calls[3] > 0
    calls.clear()
    failing = {2, 3, 4}
    with pytest.raises(ValueError, match=f"{url} cannot be read, 3 attempts failed: ConnectionResetError.*reset by"):
        list(iter_documents([Part(url, 0, None, 0)], TextSettings()))


def test_a_url_that_ends_early_is_no_whole_file(
    bucket: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket("a.txt", b"some text")
    monkeypatch.setattr("nsa_lightning.data.storage.PAUSES", ())
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", lambda *_: b"", raising=False)
    with pytest.raises(ValueError, match=f"{url} cannot be read, 1 attempts failed: EOFError: it ends after 0 of 9"):
        list(iter_documents([Part(url, 0, None, 0)], TextSettings()))


def test_the_fractions_are_even_and_the_same_in_every_process() -> None:
    texts = [f"document {i}" for i in range(2000)]
    counts = [[split_of(text, 0.1, 0.2) for text in texts].count(split) for split in ("train", "val", "test")]
    assert all(abs(count - expected) < 80 for count, expected in zip(counts, [1400, 200, 400], strict=True))
    script = "from nsa_lightning.data.splits import text_fraction; print(text_fraction('文字'))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert float(printed) == text_fraction("文字")
