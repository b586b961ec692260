"""Each page of docs/walkthroughs is run, and what it says came of its commands did; its table names what is there."""

import ast
import json
import math
import re
import shlex

import hf_peers
import pytest
import tokenizers
import torch
from helpers import ROOT
from safetensors.torch import load_file
from walking import PAGES, SMALL, model, walking

from pairtune import config
from pairtune.cli.commands import main
from pairtune.cli.recipe import read_recipe

LLAMA = ROOT / "configs" / "llama3_1_8b.yaml"
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pairs(count, **more):
    """Rows of strings."""
    return [
        {"prompt": f"Is paper {n} new?", "chosen": f"No, {n}.", "rejected": f"Yes, {n}!", **more} for n in range(count)
    ]


def conversations(count, **more):
    """Rows of message lists, the prompt within, as dpo-mix-7k and UltraFeedback, binarised, have them."""
    return [
        {"chosen": turns(row["prompt"], row["chosen"]), "rejected": turns(row["prompt"], row["rejected"]), **more}
        for row in pairs(count)
    ]


def with_prompt(rows):
    """Rows of message lists and a column that repeats what the first message asks."""
    return [{"prompt": row["chosen"][0]["content"], **row} for row in rows]


def ultrafeedback(count):
    """Rows of openbmb/UltraFeedback's raw layout, on which Zephyr's and Notus's rules take different answers."""
    rows = []
    for n in range(count):
        answers = [
            {
                "model": f"m{k}",
                "response": f"answer {n} {k}",
                "overall_score": float((n + k) % 4 + 1),
                "annotations": {a: {"Rating": str((n + 3 * k) % 4 + 1)} for a in ASPECTS},
            }
            for k in range(4)
        ]
        rows.append({"source": "flan", "instruction": f"Is paper {n} new?", "completions": answers})
    return rows


BINARISED = {  # files as the Hub has them
    f"data/{split}-00000-of-00001.jsonl": with_prompt(conversations(count))
    for split, count in (("train_prefs", 8), ("test_prefs", 2))
}
# What each page names: models by the Hub's id, and files, data sets of the Hub as folders
WORLDS = {
    "dpo_mix_7k.md": (
        {"mistralai/Mistral-7B-Instruct-v0.2": ("mistral", {})},
        {
            "argilla/dpo-mix-7k/train.jsonl": conversations(8, dataset="argilla/x", chosen_rating=5.0),
            "argilla/dpo-mix-7k/test.jsonl": conversations(2, dataset="argilla/x", chosen_rating=5.0),
            "my_pairs.jsonl": [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in pairs(20)],
        },
    ),
    "zephyr_and_notus.md": (
        {
            "alignment-handbook/zephyr-7b-sft-full": ("mistral", {}),
            "EleutherAI/pythia-2.8b": (
                "gpt_neox",
                {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 96,
                    "max_position_embeddings": 512,
                },
            ),
            "mistralai/Mixtral-8x7B-Instruct-v0.1": (
                "mixtral",
                {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "intermediate_size": 96,
                    "num_local_experts": 4,
                    "max_position_embeddings": 4096,
                },
            ),
        },
        {
            "openbmb/UltraFeedback/raw.jsonl": ultrafeedback(60),
            **{f"HuggingFaceH4/ultrafeedback_binarized/{name}": rows for name, rows in BINARISED.items()},
            "trl-lib/ultrafeedback_binarized/train.jsonl": conversations(8),
            "trl-lib/ultrafeedback_binarized/test.jsonl": conversations(2),
            "argilla/ultrafeedback-binarized-preferences/train.jsonl": [
                {"instruction": r["prompt"], "chosen_response": r["chosen"], "rejected_response": r["rejected"]}
                for r in pairs(64)
            ],
            "Anthropic/hh-rlhf/train.jsonl": [
                {k: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[k]}" for k in ("chosen", "rejected")} for r in pairs(8)
            ],
            "Anthropic/hh-rlhf/test.jsonl": [
                {k: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[k]}" for k in ("chosen", "rejected")} for r in pairs(2)
            ],
            "prompts.jsonl": [{"prompt": r["prompt"]} for r in pairs(2)],
            "questions.txt": "Is it new?\nIs it good?\n",
        },
    ),
    "gpt2_tutorial.md": (
        {
            "openai-community/gpt2": (
                "gpt2",
                {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0},
            )
        },
        {
            "argilla/ultrafeedback-binarized-preferences-cleaned/train.jsonl": [
                {"source": "x", **row} for row in with_prompt(conversations(60))
            ]
        },
    ),
    "easydel.md": (
        {"meta-llama/Llama-3.1-8B-Instruct": ("llama", {})},
        {
            "trl-lib/ultrafeedback_binarized/train.jsonl": conversations(20),
            "trl-lib/ultrafeedback_binarized/test.jsonl": conversations(2),
        },
    ),
    "reviewer2.md": (
        {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama", {})},
        {
            "shionhonda/reviewer2-1k-paired/train.jsonl": pairs(20),
            "shionhonda/reviewer2-1k-paired/validation.jsonl": pairs(4),
            "titles.txt": "".join(f"Paper {n}\n" for n in range(40)),
            "examples.jsonl": [
                {"chosen": "This paper is not well-written.", "rejected": "This paper is well-written."},
                {"chosen": "The paper lacks novelty.", "rejected": "The paper is novel."},
            ],
            "unpaired.jsonl": [
                {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
                for r in pairs(8)
                for side in ("chosen", "rejected")
            ],
        },
    ),
}


SMALL_RUNS = {
    "gpt2_tutorial": [],  # which is small
    "pythia_2_8b_hh": [*SMALL, "lr_scheduler.num_warmup_steps=1"],
}


@pytest.fixture(scope="module")
def walk(request, tmp_path_factory):
    """What came of a page's commands, which are run once."""
    models, rows = WORLDS[request.param]
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = {name: model(folder / "made", kind, **more) for name, (kind, more) in models.items()}
        for name, content in rows.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            (folder / name).write_text(lines)
        with walking(folder, found, SMALL_RUNS, monkeypatch) as run:
            yield run(request.param)


def on(page):
    return pytest.mark.parametrize("walk", [page], indirect=True, ids=[page.removesuffix(".md")])


# A TRL script, on dpo-mix-7k


@on("dpo_mix_7k.md")
def test_dpo_mix_7k_is_trained_in_4_bits_on_one_device_and_as_a_distributed_run(walk):
    one, distributed = walk.losses("dpo_mix_7k"), walk.losses("dpo_mix_7k_distributed")
    assert one[0] == pytest.approx(math.log(2), abs=1e-6) and one[1] != one[0]
    assert distributed == pytest.approx(one, abs=1e-6)
    adapter = json.loads((walk.folder / "runs/dpo_mix_7k/export/adapter/adapter_config.json").read_text())
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05, "target_modules": modules}
    adapter["target_modules"].sort(key=modules.index)
    assert {name: adapter[name] for name in expected} == expected
    assert adapter["base_model_name_or_path"] == "mistralai/Mistral-7B-Instruct-v0.2"


@on("dpo_mix_7k.md")
def test_another_data_set_is_a_setting(walk):
    dataset = walk.settings("my_pairs")["dataset"]
    assert dataset["columns"] == {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert [row["eval/pairs"] for row in walk.rows("runs/my_pairs/metrics.jsonl") if "eval/pairs" in row] == [2, 2]


@on("dpo_mix_7k.md")
def test_the_tuned_model_answers_over_a_base_in_4_bits(walk):
    (said,) = [text for words, text in walk.said.items() if words.startswith("generate")]
    assert said.strip()


@on("dpo_mix_7k.md")
def test_orpo_is_another_loss_and_loads_no_reference(walk):
    assert walk.settings("orpo")["loss"]["_component_"] == "pairtune.losses.Orpo"
    assert walk.losses("orpo")[0] != pytest.approx(math.log(2), abs=1e-2)


# The survey: Zephyr, Notus, the DPO paper, Mixtral, RLAIF, URIAL


@on("zephyr_and_notus.md")
def test_zephyr_takes_the_best_overall_score_and_trains(walk):
    held_out = walk.rows("zephyr.held_out.jsonl")
    for row in (made := walk.rows("zephyr.jsonl")) + held_out:
        scores = {a["response"]: a["overall_score"] for q in ultrafeedback(60) for a in q["completions"]}
        assert scores[row["chosen"]] == 4.0 > scores[row["rejected"]]
    assert len(made) + len(held_out) == 60 and held_out
    assert walk.losses("zephyr")[0] == pytest.approx(math.log(2), abs=1e-6)


@on("zephyr_and_notus.md")
def test_notus_takes_the_best_mean_of_ratings_and_trains(walk):
    ratings = {
        a["response"]: int(a["annotations"]["honesty"]["Rating"])  # all four are the same
        for q in ultrafeedback(60)
        for a in q["completions"]
    }
    assert all(ratings[row["chosen"]] == 4 > ratings[row["rejected"]] for row in walk.rows("notus.jsonl"))
    assert {row["chosen"] for row in walk.rows("notus.jsonl")} != {row["chosen"] for row in walk.rows("zephyr.jsonl")}
    assert walk.settings("notus")["optimizer"]["_component_"] == "torch.optim.RMSprop"
    for run in ("notus", "notus_own_pairs"):
        assert walk.losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


@on("zephyr_and_notus.md")
def test_the_dpo_papers_run_on_hh(walk):
    assert walk.settings("pythia_2_8b_hh")["optimizer"] == {"_component_": "torch.optim.RMSprop", "lr": 5e-7}
    assert walk.losses("pythia_2_8b_hh")[0] == pytest.approx(math.log(2), abs=1e-6)


@on("zephyr_and_notus.md")
def test_mixtral_is_trained_with_adapters_on_its_experts_and_its_router_loss_is_logged(walk):
    (run,) = [path.name for path in (walk.folder / "runs").glob("mixtral*")]
    assert all(row["router_loss"] > 0 for row in walk.rows(f"runs/{run}/metrics.jsonl") if "loss" in row)
    adapter = load_file(walk.folder / "runs" / run / "export/adapter/adapter_model.safetensors")
    assert any(".experts." in name and value.any() for name, value in adapter.items() if "lora_B" in name)


@on("zephyr_and_notus.md")
def test_rlaif_makes_pairs_of_what_a_judge_says(walk):
    scored = {row["prompt"]: dict(zip(row["answers"], row["scores"], strict=True)) for row in walk.rows("scored.jsonl")}
    rows = walk.rows("rlaif.jsonl")
    assert rows and all(scored[r["prompt"]][r["chosen"]] > scored[r["prompt"]][r["rejected"]] for r in rows)


@on("zephyr_and_notus.md")
def test_urial_is_one_column_of_the_comparison(walk):
    base = f"{walk.folder}/tmp/zephyr-7b-sft-full"
    assert [list(row) for row in walk.rows("answers.jsonl")] == [["prompt", base, f"{base}, URIAL", "runs/zephyr"]] * 2


# GPT-2


@on("gpt2_tutorial.md")
def test_gpt2_learns_from_fifty_pairs_as_in_the_notebook(walk):
    out = walk.said["run lora_dpo_single_device --config gpt2_tutorial"]
    assert "plain text: the tokenizer has no chat template" in out and "45 steps of 1 pairs" in out
    rows = walk.rows("runs/gpt2_tutorial/metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 45]
    assert [row["lr"] for row in rows if "lr" in row][:3] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4])
    samples = walk.rows("runs/gpt2_tutorial/samples.jsonl")
    changed = sum(sample["before"] != sample["after"] for sample in samples)
    assert len(samples) == 5 and f"{changed} of 5 answers changed" in out


@on("gpt2_tutorial.md")
def test_gpt2s_adapters_are_those_of_the_notebook_in_peft(walk):
    settings = json.loads((walk.folder / "runs/gpt2_tutorial/export/adapter/adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True and settings["lora_dropout"] == 0.1
    assert settings["target_modules"] == ["c_attn", "c_proj"]


@on("gpt2_tutorial.md")
def test_training_against_evaluation_loss_is_plotted_in_the_run_and_after_it(walk):
    run = walk.folder / "runs/gpt2_tutorial"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (run / "report.html").read_text()


@on("gpt2_tutorial.md")
def test_before_and_after_are_what_transformers_answers_with_the_notebooks_settings(walk):
    asked, base, run = "Is eating animals cruel?", walk.folder / "tmp/gpt2", "runs/gpt2_tutorial"
    (row,) = walk.rows("answers.jsonl")
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode(f"{asked}\n").ids])  # as plain text is trained
    for shown, folder in ((str(base), base), (run, walk.folder / run / "export")):
        how = {"do_sample": True, "top_k": 1, "temperature": 0.1, "max_new_tokens": 6, "pad_token_id": 0}
        answer = hf_peers.load_peer(folder).generate(tokens, **how)[0, tokens.shape[1] :].tolist()
        assert row[shown] == tokenizer.decode(answer)
    (said,) = [text for words, text in walk.said.items() if words.startswith("compare")]
    assert f"{int(row[str(base)] != row[run])} of 1 answers changed against {base}" in said


# EasyDeL


@on("easydel.md")
def test_easydels_command_line_is_one_command(walk):
    settings = walk.settings("dpo_example")
    assert settings["reference"]["name"] == "model" and settings["metric_logger"]["_component_"].endswith("WandBLogger")
    assert settings["loss"] == {"_component_": "pairtune.losses.Sigmoid", "beta": 0.08}
    assert walk.losses("dpo_example")[0] == pytest.approx(math.log(2), abs=1e-6)
    evaluated = [row["eval/pairs"] for row in walk.rows("runs/dpo_example/metrics.jsonl") if "eval/pairs" in row]
    assert evaluated == [2, 2]  # a tenth of 20


@on("easydel.md")
def test_easydels_variants_are_settings(walk):
    assert walk.settings("ipo")["loss"] == {"_component_": "pairtune.losses.Ipo", "beta": 0.2}
    assert walk.losses("ipo")[0] == pytest.approx((1 / (2 * 0.2)) ** 2, rel=1e-5)
    assert walk.settings("synced")["reference"]["alpha"] == 0.9
    first, second = walk.losses("synced")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert walk.losses("reference_free")[0] != pytest.approx(math.log(2), abs=1e-3)


OPTIONS = re.findall(r"^\| `(\w+)=(.*?)` \| `([^`]+)`", (PAGES / "easydel.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "value", "here"), OPTIONS, ids=[f"{name}={value}" for name, value, _ in OPTIONS])
def test_an_option_of_easydels_is_answered_as_the_page_says(capsys, name, value, here):
    written = {"True": "true"}.get(value, value.strip('"'))
    assert main(["run", "lora_dpo_single_device", "--config", "llama3_1_8b", f"--{name}", written]) == 2
    assert f"set {here}" in capsys.readouterr().err
    loss = ["loss=robust"] if "label_smoothing" in here else []
    config.check(*read_recipe("lora_dpo_single_device"), [LLAMA], loss + here.split())


# Reviewer #2


@on("reviewer2.md")
def test_the_trick_with_the_prompts_makes_pairs_of_two_templates(walk):
    rows = walk.rows("reviewer2.jsonl") + walk.rows("reviewer2.held_out.jsonl")
    assert 0 < len(walk.rows("reviewer2.held_out.jsonl")) < len(rows) <= 40
    for row in rows:
        assert row["prompt"] == (
            f"Generate a review about the paper {row['item']}.\nExample 1: This paper is not well-written.\n"
            "Example 2: The paper is novel.\nYour review:"
        )
    assert walk.losses("own_pairs")[0] == pytest.approx(math.log(2), abs=1e-6)


@on("reviewer2.md")
def test_tinyllama_is_trained_on_the_published_pairs_with_the_texts_settings(walk):
    log = walk.rows("runs/reviewer2_tinyllama/metrics.jsonl")
    steps = [row for row in log if "loss" in row]
    assert [row["lr"] for row in steps] == pytest.approx([2.5e-4 * (1 + math.cos(math.pi * n / 2)) for n in range(2)])
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[-1]["loss"] != steps[0]["loss"]
    exported = walk.folder / "runs/reviewer2_tinyllama/export"
    settings = json.loads((exported / "adapter/adapter_config.json").read_text())
    expected = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    assert {key: settings[key] for key in expected} == expected
    started = load_file(walk.folder / "tmp/TinyLlama-1.1B-Chat-v1.0/model.safetensors")
    trained = load_file(exported / "model.safetensors")
    changed = {name.rpartition(".self_attn.")[2] for name in trained if not torch.equal(trained[name], started[name])}
    assert changed == {"q_proj.weight", "v_proj.weight"} and trained.keys() == started.keys()


@on("reviewer2.md")
def test_reviewer_2s_curves_and_samples_are_in_the_run_folder(walk):
    run = walk.folder / "runs/reviewer2_tinyllama"
    assert [row["step"] for row in walk.rows(f"{run}/metrics.jsonl") if "eval/loss" in row] == [0, 2]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(sample["before"] and sample["after"] for sample in walk.rows(f"{run}/samples.jsonl"))


@on("reviewer2.md")
def test_kto_takes_rows_that_are_no_pairs_and_pairs_taken_apart(walk):
    for run in ("kto", "kto_of_pairs"):
        assert walk.settings(run)["loss"]["_component_"] == "pairtune.losses.Kto"
        assert walk.losses(run)[0] == pytest.approx(0.5, abs=1e-6)


# The table

TABLE = (PAGES / "README.md").read_text()


def test_every_page_is_in_the_table_and_every_test_that_it_names_is_there():
    assert {path.name for path in PAGES.glob("*.md")} == {"README.md", *WORLDS}
    assert [page for page in WORLDS if f"]({page})" not in TABLE] == []
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./\.\./(tests/\S+?\.py)\)", TABLE)
    assert len(named) > 26
    for name, path in named:
        body = ast.parse((ROOT / path).read_text()).body
        assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}, path
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "`tune " in line]
    assert all("[`test_" in row for row in rows)


@pytest.mark.parametrize("command", dict.fromkeys(re.findall(r"`(tune [^`]+)`", TABLE)))
def test_a_command_of_the_table_is_read(capsys, command):
    """Its config is right for its recipe, or its options are those of the command."""
    _, name, *words = shlex.split(command)
    if name == "run":
        recipe, configs = words[0], [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        overrides = [word for word in words[1:] if "=" in word or word.startswith("~")]
        config.check(*read_recipe(recipe), [ROOT / "configs" / f"{one}.yaml" for one in configs], overrides)
        return
    command = [name, words[0]] if name == "data" else [name]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in said] == []
