"""The run folder: whatever it holds is kept."""

from pairtune import config
from pairtune.run.folder import claim


def test_an_earlier_run_in_the_folder_is_kept_beside_it(tmp_path, capsys):
    run_dir = tmp_path / "run"
    for number in range(3):
        claim(run_dir).make_room(None)
        config.save({"seed": number}, run_dir / "config.yaml", "lora_dpo_single_device")
    seeds = [(tmp_path / name / "config.yaml").read_text()[-2] for name in ("run.1", "run.2", "run")]
    assert seeds == ["0", "1", "2"]
    assert "is now" in capsys.readouterr().out
