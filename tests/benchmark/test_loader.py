"""`nsa bench loader` as a user types it."""

import sys

import pytest
from nsa_cli.main import main

from nsa_lightning.data.plan import make_plan
from nsa_lightning.data.prepare import prepare
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.tokenizer import TokenizerConfig


@pytest.fixture
def prepared(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"document {index} counts " + " ".join(map(str, range(index * 9))))
    config = TokenizerConfig(vocab_size=300)
    plan = make_plan(TextSettings(sources=str(tmp_path / "*.txt"), tokenizer=config, val_fraction=0, test_fraction=0))
    return str(prepare(plan, tmp_path / "set", num_workers=0).path)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_it_prints_how_each_packing_does_at_each_length(prepared, monkeypatch, capsys, workers):
    words = ["--prepared", prepared, "--seq_lens", "64", "512", "--batch_size", "2", "--num_workers", workers]
    monkeypatch.setattr(sys, "argv", ["nsa", "bench", "loader", *words])
    assert main() == 0
    title, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert "40 training documents" in title
    assert header.split()[:3] == ["packing,", "seq_len", "sequences"]
    cells = {" ".join(row.split()[:2]): row.split()[2:] for row in rows}
    assert list(cells) == ["sequential, 64", "sequential, 512", "best_fit, 64", "best_fit, 512"]
    assert int(cells["sequential, 512"][2]) > int(cells["best_fit, 512"][2]) > 0
    assert all(float(row[5]) > 0 for row in cells.values())
    assert all((row[6] == "-") == (workers == "0") for row in cells.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq_lens", "1"], "seq_lens must be at least 2, got 1"),
        (["--packings", "tight"], "packings"),
        (["--prepared", "nowhere"], "prepared must be a set that nsa prepare has finished, got nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line(prepared, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["nsa", "bench", "loader", "--prepared", prepared, *words])
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
