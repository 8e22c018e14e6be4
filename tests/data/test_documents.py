import gzip
import json
import re
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data.documents import (
    Document,
    fingerprint_files,
    iter_documents,
    resolve_files,
    split_of,
    text_bytes,
    text_fraction,
)


def write(path: Path, content: str | bytes = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(files: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in files]


def read(path: Path, text_field: str = "text") -> list[Document]:
    return list(iter_documents([path], text_field))


def test_a_directory_stands_for_every_regular_file_below_that_is_not_hidden(tmp_path: Path) -> None:
    for name in ["b.txt", "a/c.py", "a/deep/er/d", ".hidden", "a/.git/config", "a/.env"]:
        write(tmp_path / name)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert names(resolve_files([str(tmp_path)]), tmp_path) == ["a/c.py", "a/deep/er/d", "b.txt"]


def test_files_come_sorted_and_once_whatever_names_them(tmp_path: Path) -> None:
    write(tmp_path / "b.txt")
    write(tmp_path / "a" / "b.txt")
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt"), f"{tmp_path}/a/../b.txt", str(tmp_path)]
    assert names(resolve_files(sources), tmp_path) == ["a/b.txt", "b.txt"]


def test_double_star_matches_any_depth_and_no_directory(tmp_path: Path) -> None:
    for name in ["a.py", "x/b.py", "x/y/c.py", "x/y/d.txt", "folder.py/e.py"]:
        write(tmp_path / name)
    assert names(resolve_files([f"{tmp_path}/**/*.py"]), tmp_path) == ["a.py", "folder.py/e.py", "x/b.py", "x/y/c.py"]


def test_home_and_stdlib_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.txt")
    assert resolve_files(["~/mine.txt"]) == [tmp_path / "mine.txt"]
    assert resolve_files(["{stdlib}/json/*.py"], ["{stdlib}/json/[a-ce-z_]*"]) == [
        Path(sysconfig.get_path("stdlib"), "json", "decoder.py")
    ]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("test_*.py", ["keep.py", "test_dir/a.py", "x/contest/d.py", "x/test/c.py"]),
        ("test", ["keep.py", "test_a.py", "test_dir/a.py", "x/contest/d.py", "x/test_b.py"]),
        ("*/test/*", ["keep.py", "test_a.py", "test_dir/a.py", "x/contest/d.py", "x/test_b.py"]),
        ("**/x/**", ["keep.py", "test_a.py", "test_dir/a.py"]),
        ("{root}/x", ["keep.py", "test_a.py", "test_dir/a.py"]),
        ("{root}/*.py", ["test_dir/a.py", "x/contest/d.py", "x/test/c.py", "x/test_b.py"]),
        ("tes?_[!b-z].py", ["keep.py", "test_dir/a.py", "x/contest/d.py", "x/test/c.py", "x/test_b.py"]),
        ("[k]eep.p?", ["test_a.py", "test_dir/a.py", "x/contest/d.py", "x/test/c.py", "x/test_b.py"]),
        ("eep.py", ["keep.py", "test_a.py", "test_dir/a.py", "x/contest/d.py", "x/test/c.py", "x/test_b.py"]),
    ],
)
def test_exclude_drops_files_and_whole_directories_at_any_depth(tmp_path: Path, pattern: str, kept: list[str]) -> None:
    for name in ["keep.py", "test_a.py", "test_dir/a.py", "x/test_b.py", "x/test/c.py", "x/contest/d.py"]:
        write(tmp_path / name)
    assert names(resolve_files([str(tmp_path)], [pattern.replace("{root}", str(tmp_path))]), tmp_path) == kept


@pytest.mark.parametrize("source", ["test/corpus", "test/corpus/*.py", "test/corpus/a.py"])
def test_exclude_looks_below_the_source_and_not_above_it(tmp_path: Path, source: str) -> None:
    write(tmp_path / "test" / "corpus" / "a.py")
    assert len(resolve_files([str(tmp_path / source)], ["**/test/**", "test"])) == 1


@pytest.mark.parametrize("source", ["no/such/file", "no/such/**/*.py", ""])
def test_a_source_without_files_is_named(tmp_path: Path, source: str) -> None:
    write(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=re.escape(f"data.sources must match files, {source!r} matches none")):
        resolve_files([str(tmp_path), source])


def test_an_empty_directory_is_a_source_without_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches none"):
        resolve_files([str(tmp_path)])


def test_excluding_everything_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"data.exclude=\['\*'\] leaves none of the 1 files of"):
        resolve_files([str(tmp_path)], ["*"])


def test_text_is_read_to_the_byte(tmp_path: Path) -> None:
    text = "\ufefféa\r\nb\n\n文🙂"
    plain, packed = write(tmp_path / "a.txt", text), write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))
    assert read(plain) == [Document(str(plain), text)]
    assert read(packed) == [Document(str(packed), text)]


def test_a_jsonl_line_is_a_document_named_by_its_number(tmp_path: Path) -> None:
    lines = '{"text": "one", "id": 1}\n\n{"id": 2, "text": "two"}\n{"text": null}\n{"text": ""}'
    plain, packed = write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.JSONL.gz", gzip.compress(lines.encode()))
    for path in plain, packed:
        numbered = {1: "one", 3: "two", 4: "", 5: ""}
        assert read(path) == [Document(f"{path}:{line}", text) for line, text in numbered.items()]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_parquet_row_is_a_document_named_by_its_number(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"row {i}" for i in range(200)] + [None]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(201), "body": pa.array(texts, kind)}), path, row_group_size=50)
    assert read(path, "body") == [Document(f"{path}:{i}", text or "") for i, text in enumerate(texts)]


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100_000}).encode() + b"\n"
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(line * 200, 1))
    tracemalloc.start()
    assert sum(len(document.text) for document in iter_documents([path], "text")) == 20_000_000
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
    with pytest.raises(ValueError, match=r"data.sources: .*/secret.txt cannot be read: Permission denied"):
        fingerprint_files([path], "text")


def test_an_unreadable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, onerror: object) -> None:
        onerror(PermissionError(13, "Permission denied", str(path)))  # type: ignore[operator]

    monkeypatch.setattr("os.walk", refuse)
    with pytest.raises(ValueError, match=f"data.sources: {tmp_path} cannot be read: Permission denied"):
        resolve_files([str(tmp_path)])


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
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    documents = iter_documents([path], "text")
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


def test_the_fingerprint_follows_content_names_and_field_but_not_the_place(tmp_path: Path) -> None:
    def fingerprint(root: str, name: str = "x/b.txt", content: str = "b", field: str = "text") -> str:
        files = [write(tmp_path / root / "a.txt"), write(tmp_path / root / name, content)]
        return fingerprint_files(files, field)

    first = fingerprint("one")
    assert fingerprint("two") == first
    others = [fingerprint("three", "x/c.txt"), fingerprint("four", content="c"), fingerprint("five", field="body")]
    assert len({first, *others}) == 4


def test_the_bytes_of_documents_are_known_early_for_plain_text_alone(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.txt", "é"), write(tmp_path / "b.py", "b")]
    assert text_bytes(files) == 3
    assert text_bytes([*files, write(tmp_path / "c.jsonl", "{}")]) is None


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_text_falls_in_one_split_by_its_fraction(text: str, val_fraction: float, test_fraction: float) -> None:
    split = split_of(text, val_fraction, test_fraction)
    fraction = text_fraction(text)
    assert 0 <= fraction < 1
    assert (split == "test") == (fraction < test_fraction)
    assert (split == "train") == (fraction >= test_fraction + val_fraction)


def test_the_fractions_are_even_and_the_same_in_every_process() -> None:
    texts = [f"document {i}" for i in range(2000)]
    counts = [[split_of(text, 0.1, 0.2) for text in texts].count(split) for split in ("train", "val", "test")]
    assert all(abs(count - expected) < 80 for count, expected in zip(counts, [1400, 200, 400], strict=True))
    script = "from nsa_lightning.data.documents import text_fraction; print(text_fraction('文字'))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert float(printed) == text_fraction("文字")
