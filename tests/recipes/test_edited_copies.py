"""A copy of a recipe is made to be edited: another loss, reference, logged number or key of its own trains at once."""

import json

import pytest
from helpers import from_first_step, random_pairs, run_config, save_llama, save_pairs

from pairtune.cli import main

CALL = """\
        losses, chosen_rewards, rejected_rewards = loss_fn(
            scores.chosen_logps, scores.rejected_logps, *reference.logps(batch), **whole.inputs(batch, scores)
        )
"""
KEY = '    "epochs": 1,  # 0.5: half of them, in steps rounded up\n'
# What a user does to the copy: texts in it, and what takes their place
EDITS = {
    "a margin loss with a key of its own": [
        (KEY, f'{KEY}    "margin": 1.0,  # nats by which the chosen answer has to be ahead\n'),
        (
            CALL,
            """\
        reference_chosen, reference_rejected = reference.logps(batch)
        chosen_rewards = scores.chosen_logps - reference_chosen
        rejected_rewards = scores.rejected_logps - reference_rejected
        losses = torch.relu(cfg.margin - (chosen_rewards - rejected_rewards))
""",
        ),
    ],
    "a margin loss without a reference": [
        (
            CALL,
            """\
        chosen_rewards, rejected_rewards = scores.chosen_logps.detach(), scores.rejected_logps.detach()
        losses = torch.relu(100.0 - (scores.chosen_logps - scores.rejected_logps))
""",
        ),
    ],
    "a likelihood term": [
        (CALL, f"{CALL}        losses = losses - 0.05 * scores.chosen_logps\n"),
    ],
    "nothing but a metric of one's own": [
        (
            "        into.add_pairs(batch, scores, losses, chosen_rewards, rejected_rewards, kl=whole.kl)\n",
            "        into.add(loss=losses)\n",
        ),
    ],
    "another logged metric": [
        (
            "        into.add_pairs(",
            "        into.add(entropy_of_nothing=losses.detach() * 0 + 7)\n        into.add_pairs(",
        ),
    ],
    "a reference of the user's own": [
        (
            "def main(cfg):\n",
            "def uniform(batch):\n    return torch.full((2, batch.num_pairs), -60.0).unbind()\n\n\ndef main(cfg):\n",
        ),
        ("*reference.logps(batch), **whole.inputs", "*uniform(batch), **whole.inputs"),
    ],
    "the reference's values, changed": [
        ("*reference.logps(batch), **whole.inputs", "*(0.9 * v for v in reference.logps(batch)), **whole.inputs"),
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    save_llama(folder / "base")
    save_pairs(folder / "train.jsonl", random_pairs(16, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(4, seed=2))
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 5e-3}
    cfg = run_config(folder, optimizer=optimizer, lr_scheduler=None, batch_size=4, epochs=2, samples={"num_prompts": 0})
    (folder / "config.yaml").write_text(json.dumps(cfg))
    return folder


def edited(inputs, tmp_path, edits):
    """Returns the words that run a copy with these edits."""
    assert main(["cp", "lora_dpo_single_device", str(tmp_path / "mine.py")]) == 0
    text = (tmp_path / "mine.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)
    return ["run", str(tmp_path / "mine.py"), "--config", str(inputs / "config.yaml"), f"output_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_trains(inputs, tmp_path, edit):
    assert main(edited(inputs, tmp_path, EDITS[edit])) == 0
    log = from_first_step(tmp_path / "run" / "metrics.jsonl")
    first, last = log[0], [row for row in log if "loss" in row][-1]
    assert last["step"] == 4 and "eval/loss" in log[-1]
    if edit == "another logged metric":
        assert first["entropy_of_nothing"] == last["entropy_of_nothing"] == 7
    else:
        assert last["loss"] < first["loss"]  # what the copy minimises, whatever the config's loss is
    if edit == "a margin loss with a key of its own":
        assert first["loss"] == pytest.approx(1.0, abs=1e-5)
        assert "margin: 1.0" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("margin=wide", "margin=wide: must be a number, is text"),
        ("marginn=2", "unknown key marginn; nearest: margin"),
        ("margin=2.5", None),
    ],
)
def test_a_key_of_a_copy_is_typed_and_spell_checked(inputs, tmp_path, capsys, override, words):
    copy = edited(inputs, tmp_path, EDITS["a margin loss with a key of its own"])
    status = main([*copy, override, "max_steps=1"])
    said = capsys.readouterr().err
    assert (status, words is None or words in said) == (2 if words else 0, True), said
    if not words:
        assert from_first_step(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(2.5, abs=1e-5)


def test_what_is_wrong_with_an_edit_is_told_as_such(inputs, tmp_path, capsys):
    deaf = f"{CALL}        losses = losses.detach() + 0 * scores.chosen_logps\n"
    shifted = f"{CALL}        chosen_rewards = chosen_rewards + 1\n"
    for wrong, words in ((deaf, "the gradient is zero"), (shifted, "the mean of rewards/chosen is +1.0000")):
        assert main(edited(inputs, tmp_path, [(CALL, wrong)])) == 2
        said = capsys.readouterr().err
        assert words in said and "in an edited copy of a recipe, look at what the loop passes" in said
