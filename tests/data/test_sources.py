import os
import re
import sysconfig
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from nsa_kernels.errors import SettingError

from nsa_lightning.data.sources import Part, SourceFile, find_files, parts_of


def write(path: Path, content: str | bytes = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(files: list[SourceFile], root: Path) -> list[str]:
    return [str(Path(file.name).relative_to(root)) for file in files]


def test_a_directory_stands_for_every_regular_file_below_that_is_not_hidden(tmp_path: Path) -> None:
    for name in ["b.txt", "a/c.py", "a/deep/er/d", ".hidden", "a/.git/config", "a/.env"]:
        write(tmp_path / name)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert names(find_files([str(tmp_path)]), tmp_path) == ["a/c.py", "a/deep/er/d", "b.txt"]


def test_files_come_sorted_and_once_whatever_names_them(tmp_path: Path) -> None:
    write(tmp_path / "b.txt")
    write(tmp_path / "a" / "b.txt")
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt"), f"{tmp_path}/a/../b.txt", str(tmp_path)]
    assert names(find_files(sources), tmp_path) == ["a/b.txt", "b.txt"]


def test_double_star_matches_any_depth_and_no_directory(tmp_path: Path) -> None:
    for name in ["a.py", "x/b.py", "x/y/c.py", "x/y/d.txt", "folder.py/e.py"]:
        write(tmp_path / name)
    assert names(find_files([f"{tmp_path}/**/*.py"]), tmp_path) == ["a.py", "folder.py/e.py", "x/b.py", "x/y/c.py"]


def test_home_and_stdlib_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.txt")
    assert names(find_files(["~/mine.txt"]), tmp_path) == ["mine.txt"]
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert names(find_files(["{stdlib}/json/*.py"], (), ["{stdlib}/json/[a-ce-z_]*"]), stdlib) == ["json/decoder.py"]


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
    assert names(find_files([str(tmp_path)], (), [pattern.replace("{root}", str(tmp_path))]), tmp_path) == kept


@pytest.mark.parametrize("source", ["test/corpus", "test/corpus/*.py", "test/corpus/a.py"])
def test_exclude_looks_below_the_source_and_not_above_it(tmp_path: Path, source: str) -> None:
    write(tmp_path / "test" / "corpus" / "a.py")
    assert len(find_files([str(tmp_path / source)], (), ["**/test/**", "test"])) == 1


@pytest.mark.parametrize("source", ["", "/**/*.txt", "/**", "/*/../**/*.txt"])
def test_links_are_followed_once_by_directories_and_globs_alike(tmp_path: Path, source: str) -> None:
    root = tmp_path / "root"
    write(tmp_path / "elsewhere" / "books" / "a.txt")
    write(root / "own" / "b.txt")
    (root / "aa_alias").symlink_to(root / "own")  # comes first in order, but `own` keeps its name
    (root / "aa_alias.txt").symlink_to(root / "own" / "b.txt")
    (root / "books").symlink_to(tmp_path / "elsewhere")
    (root / "more_books").symlink_to(tmp_path / "elsewhere" / "books")
    (root / "own" / "one.txt").symlink_to(tmp_path / "elsewhere" / "books" / "a.txt")
    write(tmp_path / "elsewhere" / "c.txt")
    (tmp_path / "elsewhere" / "round").symlink_to(root)
    for name, target in {"self": ".", "own/up": "..", "own/above": "../..", "nowhere": "none", "me": "me"}.items():
        (root / name).symlink_to(target)
    write(tmp_path / "beside.txt")  # own/above leads to it, and to the whole source
    assert names(find_files([f"{root}{source}"]), root) == ["books/books/a.txt", "books/c.txt", "own/b.txt"]


def test_a_file_under_several_names_is_one_whatever_sources_and_patterns_name_it(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "1f")
    write(tmp_path / "blobs" / "2e")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").symlink_to("../blobs/1f")
    (tmp_path / "texts" / "b.txt").symlink_to("../blobs/1f")
    assert names(find_files([f"{tmp_path}/texts"]), tmp_path) == ["texts/a.txt"]
    assert names(find_files([f"{tmp_path}/texts", f"{tmp_path}/blobs/*"]), tmp_path) == ["blobs/1f", "blobs/2e"]
    assert names(find_files([str(tmp_path)], (), ["blobs"]), tmp_path) == ["texts/a.txt"]
    assert names(find_files([f"{tmp_path}/*/*.txt"], (), ["a.txt"]), tmp_path) == ["texts/b.txt"]


@pytest.mark.parametrize("source", ["no/such/file", "no/such/**/*.py", ""])
def test_a_source_without_files_is_named(tmp_path: Path, source: str) -> None:
    write(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=re.escape(f"data.sources must match files, {source!r} matches none")):
        find_files([str(tmp_path), source])


def test_an_empty_directory_is_a_source_without_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches none"):
        find_files([str(tmp_path)])


def test_excluding_everything_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"data.exclude=\['\*'\] leave none of the 1 files of"):
        find_files([str(tmp_path)], (), ["*"])


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    write(tmp_path / "heldout" / "a.txt")
    write(tmp_path / "b.txt")
    find_files([str(tmp_path)], **{setting: ["b.txt", "held_out", f"{tmp_path.name}/heldout"]})
    (record,) = caplog.records
    expected = f"data.{setting}: 'held_out', '{tmp_path.name}/heldout' match none of the 2 files of data.sources"
    assert record.getMessage().startswith(expected)
    caplog.clear()
    find_files([str(tmp_path)], **{setting: ["b.txt", f"{tmp_path}/b.*"]})
    assert not caplog.records


@pytest.mark.parametrize("pattern", ["a[z-a]*", "[]", "x[!b-a]"])
def test_a_malformed_pattern_is_named(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.txt")
    message = f"data.exclude must hold globs, {pattern!r} is malformed: "
    with pytest.raises(SettingError, match=re.escape(message)):
        find_files([str(tmp_path)], (), [pattern])
    with pytest.raises(SettingError, match=r"data.include must hold globs"):
        find_files([str(tmp_path)], [pattern])


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"[\d]", r"\d"),
        ("[^a]", "^a"),
        ("[[a]", "[a"),
        ("[]a]", "]a"),
        ("[!]a]", r"&1[\^d{|~"),
        ("[a&&d]", "&ad"),
        ("[~||1]", "1|~"),
        ("{", "{"),
    ],
)
def test_what_stands_in_a_set_stands_for_itself(tmp_path: Path, pattern: str, matches: str) -> None:
    for name in r"a&1[]\^d{|~":
        write(tmp_path / name)
    assert set(names(find_files([str(tmp_path)], [pattern]), tmp_path)) == set(matches)
    assert {path.name for path in tmp_path.glob(pattern)} == set(matches)


def test_an_unreadable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, onerror: object) -> None:
        onerror(PermissionError(13, "Permission denied", str(path)))  # type: ignore[operator]

    monkeypatch.setattr("os.walk", refuse)
    with pytest.raises(ValueError, match=f"data.sources: {tmp_path} cannot be read: Permission denied"):
        find_files([str(tmp_path)])


def test_include_keeps_only_what_it_matches_and_exclude_still_drops(tmp_path: Path) -> None:
    for name in ["a.py", "x/b.py", "x/c.txt", "docs/d.md", "docs/deep/e.md", "docs/test/f.md"]:
        write(tmp_path / name)
    assert names(find_files([str(tmp_path)], ["*.py", "docs"], ["test"]), tmp_path) == [
        "a.py",
        "docs/d.md",
        "docs/deep/e.md",
        "x/b.py",
    ]
    with pytest.raises(ValueError, match=r"data.include=\['\*.c'\] and data.exclude=\[\] leave none of the 6 files"):
        find_files([str(tmp_path)], ["*.c"])


def test_a_file_that_is_written_again_is_another_version(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    (before,) = find_files([str(path)])
    os.utime(path, ns=(1, 1))
    (after,) = find_files([str(path)])
    assert (before.name, before.size) == (after.name, after.size) == (str(path), 4)
    assert before.version != after.version


@pytest.fixture
def bucket() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    for name in ["a.txt", "x/b.jsonl", "x/test/c.txt", ".git/config"]:
        memory.pipe(f"/bucket/{name}", b"text")
    yield "memory:///bucket"
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", ["a.txt", "x/b.jsonl"]),
        ("/", ["a.txt", "x/b.jsonl"]),
        ("/a.txt", ["a.txt"]),
        ("/x", ["x/b.jsonl"]),
        ("/x/*.jsonl", ["x/b.jsonl"]),
        ("/**/*.txt", ["a.txt"]),
    ],
)
def test_urls_name_files_directories_and_globs(bucket: str, source: str, found: list[str]) -> None:
    files = find_files([bucket + source], (), ["test"])
    assert [file.name for file in files] == [f"{bucket}/{name}" for name in found]
    assert all(file.size == 4 and file.version for file in files)


def test_relative_globs_look_below_a_url_and_not_above_it(bucket: str) -> None:
    assert [file.name for file in find_files([f"{bucket}/x/test"], ["*.txt"], ["x"])] == [f"{bucket}/x/test/c.txt"]
    assert [file.name for file in find_files([bucket], (), [f"{bucket}/x"])] == [f"{bucket}/a.txt"]


def test_a_file_that_is_written_again_on_a_web_server_is_another_version(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.txt"
        (before,) = find_files([url])
        os.utime(path, (10**9, 10**9))
        (after,) = find_files([url])
        server.shutdown()
    assert (before.name, before.size) == (after.name, after.size) == (url, 4)
    assert before.version != after.version


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory:///bucket/none.txt", "memory:///bucket/none.txt cannot be read: FileNotFoundError"),
        ("memory:///bucket/*.md", "data.sources must match files, 'memory:///bucket/*.md' matches none"),
        ("nowhere://x", "nowhere://x cannot be read: Protocol not known: nowhere"),
        ("zip://*.txt::memory:///bucket/a.zip", "data.sources must not chain filesystems, got 'zip://*.txt::"),
    ],
)
def test_a_url_without_files_is_named(bucket: str, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_files([source])


@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [
        ("a.txt", 1000, [(0, None, 1000)]),
        ("a.jsonl", 100, [(0, None, 100)]),
        ("a.jsonl", 250, [(0, 100, 100), (100, 200, 100), (200, 250, 50)]),
        ("https://host/a.jsonl?download=1", 101, [(0, 100, 100), (100, 101, 1)]),
        ("a.jsonl.gz", 1000, [(0, None, 4000)]),
        ("a.txt.zst", 10, [(0, None, 40)]),
        ("a.parquet", 20, [(0, None, 80)]),
    ],
)
def test_only_what_can_be_read_from_the_middle_is_cut(
    name: str, size: int, parts: list[tuple[int, int | None, int]]
) -> None:
    assert parts_of(SourceFile(name, size, ""), 100) == [Part(name, *part) for part in parts]
