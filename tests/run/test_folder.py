"""The run folder: whatever it holds is kept."""

from pairtune.run.folder import make_room


def test_an_earlier_run_in_the_folder_is_kept_beside_it(tmp_path, capsys):
    run_dir = tmp_path / "run"
    for number in range(3):
        make_room(run_dir)
        (run_dir / "metrics.jsonl").write_text(str(number))
    assert [(tmp_path / n / "metrics.jsonl").read_text() for n in ("run.1", "run.2", "run")] == ["0", "1", "2"]
    assert "is now" in capsys.readouterr().out
