"""What a config says is what a run does: in any order, from any layer, in short or in full, saved and read again."""

import pytest
from omegaconf import OmegaConf

from pairtune import config
from pairtune.cli.find import own
from pairtune.cli.recipe import read_recipe
from pairtune.config.layers import notes
from pairtune.errors import UserError

RECIPES = {name: read_recipe(name) for name in own("recipe")}
BASE = """
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}
dataset: {source: pairs.jsonl}
"""
SGD, COSINE, TIKTOKEN = "torch.optim.SGD", "pairtune.schedules.linear", "torchtune.models.llama3.llama3_tokenizer"
DISK = "torchtune.training.metric_logging.DiskLogger"


@pytest.fixture
def load(tmp_path):
    """Loads texts as files and then overrides; what is saved is read as the same run."""

    def load(*overrides, text="", more=(), recipe="lora_dpo_single_device", ask=config.load):
        method, defaults = RECIPES[recipe]
        paths = []
        for i, content in enumerate((BASE, *([text] if text else ()), *more)):
            paths.append(tmp_path / f"{i}.yaml")
            paths[-1].write_text(content)
        found = ask(method, defaults, paths, list(overrides))
        if ask is config.load:
            assert config.check(method, defaults, paths, list(overrides)).keys() == found.keys()
            config.save(found, tmp_path / "saved.yaml", recipe)
            assert config.load(method, defaults, [tmp_path / "saved.yaml"], []) == found
        return found

    return load


def get(cfg, name):
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("eval_dataset=held_out.jsonl", "eval_dataset.source=held_out.jsonl"),
        ("dataset=../a/pairs.jsonl", "dataset.source=../a/pairs.jsonl"),
        ("dataset=trl-lib/ultrafeedback_binarized", "dataset.source=trl-lib/ultrafeedback_binarized"),
        ("eval_dataset=null", "eval_dataset.source=null"),
        ("~eval_dataset", "eval_dataset.source=null"),
        ("tokenizer=/other", "tokenizer.path=/other"),
        ("tokenizer=./other", "tokenizer.path=./other"),
        ("checkpointer=~/base", "checkpointer.checkpoint_dir=~/base"),
        ("reference=none", "reference.name=none"),
        ("loss=ipo", "loss._component_=pairtune.losses.Ipo"),
        ("loss=[sigmoid,{name: sft,weight: 0.5}]", "loss=[{name: sigmoid},{name: sft,weight: 0.5}]"),
        ("samples.prompts='Why, then?'", "samples.prompts=['Why, then?']"),
        ("metric_logger=none", "metric_logger=null"),
    ],
)
def test_a_short_form_is_the_long_one_on_the_command_line_and_in_a_file(load, recipe, short, long):
    told, expected = long.partition("=")[0], load(*(["loss=simpo"] * ("none" in long)), long, recipe=recipe)
    assert load(*(["loss=simpo"] * ("none" in long)), short, recipe=recipe) == expected
    if not short.startswith("~") and "none" not in short:
        *blocks, key = short.partition("=")[0].split(".")
        line = "".join(f"{block}: {{" for block in blocks) + f"{key}: {short.partition('=')[2]}" + "}" * len(blocks)
        assert get(load(more=[line], recipe=recipe), told) == get(expected, told)
        method = RECIPES[recipe][0]
        assert get(load(more=[f"per_method: {{{method}: {{{line}}}}}"], recipe=recipe), told) == get(expected, told)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "lora" in name])
def test_modules_are_told_by_one_name_too(load, recipe):
    assert load("lora.modules=all-linear", recipe=recipe).lora.modules == ["all-linear"]
    assert load("lora.modules=q_proj", recipe=recipe).lora.modules == ["q_proj"]
    assert load(text="lora: {modules: 'q_proj, v_proj'}", recipe=recipe).lora.modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("component", "argument"),
    [
        (f"optimizer={SGD}", "optimizer.lr=0.25"),
        (f"lr_scheduler={COSINE}", "lr_scheduler.min_ratio=0.5"),
        ("loss=robust", "loss.label_smoothing=0.25"),
        ("loss=simpo", "loss.gamma_beta_ratio=0.25"),
        ("loss=[{name: sigmoid},{name: sft,weight: 0.25}]", "loss.terms=[{name: sigmoid},{name: sft,weight: 0.25}]"),
        ("model=torchtune.models.llama3_1.llama3_1", "model.rope_base=10000"),
        (f"tokenizer={TIKTOKEN}", "tokenizer.max_seq_len=64"),
        ("checkpointer=torchtune.training.FullModelMetaCheckpointer", "checkpointer.checkpoint_files=[a.pth]"),
        (f"metric_logger={DISK}", "metric_logger.log_dir=x"),
        ("metric_logger=wandb", "metric_logger.project=x"),
        ("reference.model=torchtune.models.llama3.llama3_8b", "reference.checkpoint_dir=x"),
    ],
)
def test_a_component_and_its_arguments_stand_in_any_order_and_layer(load, component, argument):
    sizes = ["model.vocab_size=8", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1"]
    sizes += ["model.embed_dim=8", "model.max_seq_len=8"]
    needed = {"model": sizes, "reference.model": ["reference=model"], "tokenizer": ["tokenizer.path=/x"]}
    more = needed.get(component.partition("=")[0], [])
    words = [component, argument, *more]
    expected = load(*words)
    name, _, value = argument.partition("=")
    assert str(get(expected, name)) in (value, f"['{value.strip('[]')}']") or "terms" in name
    assert load(*reversed(words)) == expected
    path = f"{component.partition('=')[0]}._component_={component.partition('=')[2]}"
    if not component.startswith("loss"):
        assert load(*more, argument, path) == expected
    *blocks, key = name.split(".")
    line = "".join(f"{block}: {{" for block in blocks) + f"{key}: {value}" + "}" * len(blocks)
    if not component.startswith("reference"):
        assert load(component, *more, text=line) == expected  # YAML has the argument, the command line the component
        assert load(component, *more, text=f"per_method: {{lora: {{{line}}}}}") == expected


def test_what_was_given_is_kept_and_what_the_default_had_is_not(load):
    text = "optimizer: {_component_: torch.optim.AdamW, lr: 0.25, weight_decay: 0.125}"
    kept = load(f"optimizer={SGD}", text=text).optimizer
    assert kept == {"_component_": SGD, "lr": 0.25, "weight_decay": 0.125}
    assert load(more=[f"optimizer: {{_component_: {SGD}}}"], text=text).optimizer == kept
    assert load("loss=simpo").loss == {"_component_": "pairtune.losses.Simpo"}  # without DPO's beta
    assert load("optimizer={}", text=text) == load()
    assert load("optimizer={}", f"optimizer={SGD}", "optimizer.lr=1", text=text).optimizer == {
        "_component_": SGD, "lr": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="optimizer.lr: torch.optim.SGD needs a learning rate"):
        load(f"optimizer={SGD}")  # AdamW's default is none of SGD's
    for words in (["optimizer.betas=[0.5,0.5]", f"optimizer={SGD}"], [f"optimizer={SGD}", "optimizer.betas=[0.5,0.5]"]):
        with pytest.raises(
            UserError, match="optimizer.betas: SGD has no such argument.*remove it with ~optimizer.betas"
        ):
            load("optimizer.lr=1", *words)
    assert "betas" not in load("optimizer.lr=1", "optimizer.betas=[0.5,0.5]", f"optimizer={SGD}", "~optimizer.betas")


def test_a_saved_config_takes_another_component(load, tmp_path):
    config.save(load(), tmp_path / "run.yaml", "lora_dpo_single_device")
    saved = (tmp_path / "run.yaml").read_text()
    assert load("loss=ipo", more=[saved]).loss == {"_component_": "pairtune.losses.Ipo", "beta": 0.1}
    assert load("loss=ipo", more=[saved], ask=notes) == [
        "loss.label_smoothing=0.0, as by default, has no effect: Ipo has no such argument",
        f"loss.beta=0.1 ({tmp_path / '1.yaml'}, there for DPOLoss) is now Ipo's",
    ]


@pytest.mark.parametrize("cleared", ["dataset.columns={}", "~dataset.columns", "dataset.columns=null"])
def test_a_mapping_can_be_cleared(load, cleared):
    text = "dataset: {columns: {chosen: good, rejected: bad}}"
    assert load(cleared, text=text).dataset.columns == {}
    assert load(cleared, "dataset.columns.prompt=q", text=text).dataset.columns == {"prompt": "q"}
    assert load("~dataset.columns.chosen", text=text).dataset.columns == {"rejected": "bad"}
    assert load("dataset.columns.system=null", text=text).dataset.columns.system is None  # that column is left out
    for value in ("{}", "null"):
        assert load(text=text, more=[f"dataset: {{columns: {value}}}"]).dataset.columns == {}


def test_lists_and_arguments_that_are_mappings_can_be_cleared(load):
    text = "samples: {prompts: [a, b]}\nmetric_logger: {_component_: wandb, settings: {a: 1, b: {c: 2}}}"
    for cleared in ("samples.prompts=[]", "samples.prompts=null", "~samples.prompts"):
        assert load(cleared, text=text).samples.prompts == []
    assert load("metric_logger.settings.b.d=3", text=text).metric_logger.settings == {"a": 1, "b": {"c": 2, "d": 3}}
    assert load("~metric_logger.settings.a", text=text).metric_logger.settings == {"b": {"c": 2}}
    assert load("metric_logger.settings={}", text=text).metric_logger.settings == {}
    assert "settings" not in load("~metric_logger.settings", text=text).metric_logger
    assert load("samples={}", text=text).samples == load().samples


EVALUATED = "eval_dataset: {source: held_out.jsonl}\neval_every_n_steps: 50\nkeep_best: loss\nexport_best: true\n"


@pytest.mark.parametrize(
    ("text", "overrides", "off", "told"),
    [
        (EVALUATED, ["eval_dataset.source=null"], ["eval_every_n_steps", "keep_best", "export_best"],
         ["evaluation is off: eval", "eval_every_n_steps=50 (", "keep_best=loss (", "export_best=true (",
          "eval_dataset.source=null (command li"]),
        (EVALUATED, ["eval_dataset=null"], ["eval_every_n_steps", "keep_best"], []),
        (EVALUATED, ["~eval_dataset.source"], ["eval_every_n_steps", "keep_best"], []),
        (EVALUATED + "per_method: {lora: {eval_dataset: null}}", [], ["eval_every_n_steps", "keep_best"], []),
        ("dataset: {source: a, val_fraction: 0.5}\nkeep_best: loss", ["~dataset.val_fraction"], ["keep_best"], []),
        (EVALUATED, ["eval_every_n_epochs=0.5"], ["eval_every_n_steps"], ["says when to evaluate"]),
        (EVALUATED, ["keep_best=null"], ["export_best"], ["export_best=true (", "keeps no best checkpoint"]),
        (EVALUATED, ["keep_last_n=0"], ["keep_best", "export_best"], ["keep_last_n=0 (command line) writes no"]),
        ("dataset: {source: a, val_fraction: 0.5}", ["eval_dataset=b"], ["dataset.val_fraction"], ["what is held out"]),
        (EVALUATED, ["dataset.val_fraction=0.5"], ["eval_dataset.source"], ["what is held out"]),
        ("reference: {name: model, checkpoint_dir: x, dtype: fp32}", ["reference=start"],
         ["reference.checkpoint_dir", "reference.dtype"], ["reference.dtype=fp32 (", "reference.name=start (command"]),
        ("lr_scheduler: {warmup_ratio: 0.5}", ["lr_scheduler=null"], ["lr_scheduler"], []),
        ("lr_scheduler: {warmup_ratio: 0.5}", ["lr_scheduler.num_warmup_steps=0"], ["lr_scheduler.warmup_ratio"],
         ["lr_scheduler.warmup_ratio=0.5 (", "has no effect: lr_scheduler.num_warmup_steps=0 (command line) says"]),
        ("lr_scheduler: {warmup_ratio: 0.0}", ["lr_scheduler.num_warmup_steps=9"], ["lr_scheduler.warmup_ratio"], []),
        ("lr_scheduler: {num_warmup_steps: 0}\nper_method: {lora: {lr_scheduler: {warmup_ratio: 0.5}}}", [],
         ["lr_scheduler.num_warmup_steps"], ["lr_scheduler.num_warmup_steps=0 (", "per_method.lora) says how long"]),
        ("lr_scheduler: {_component_: pairtune.schedules.linear, num_warmup_steps: 7}",
         ["lr_scheduler.warmup_ratio=0.5", "lr_scheduler=pairtune.schedules.cosine"], ["lr_scheduler.num_warmup_steps"],
         ["lr_scheduler.num_warmup_steps=7 ("]),
        ("", ["max_length=256"], ["max_prompt_length"],
         ["max_prompt_length=512 (default) gives way: max_length=256 (command line) alone decides"]),
        ("loss: {name: sigmoid, f_divergence: alpha, f_alpha: 0.0}", ["loss.f_divergence=js"], ["loss.f_alpha"],
         ["loss.f_alpha=0.0 (", "loss.f_divergence=js (command line) does without it"]),
        ("eval_dataset: {source: a/b, split: test_prefs, name: x}", ["eval_dataset=c.jsonl.gz"], ["eval_dataset.name"],
         ["eval_dataset.split=test_prefs (", "eval_dataset.name=x (", "c.jsonl.gz (command line) is of files"]),
        ("dataset: {source: a/b, revision: x}", ["dataset.source=[c.csv,{source: d.json}]"], ["dataset.revision"], []),
        ("eval_dataset: {source: a/b, name: x}", ["eval_dataset={a: c.csv,b: [d.json]}"], ["eval_dataset.name"], []),
        ("dataset: {source: a, val_fraction: 0.5}", ["eval_dataset={one: b}"], ["dataset.val_fraction"], []),
        ("reference: {name: model, checkpoint_dir: x, model: {_component_: torchtune.models.llama3.llama3_8b}}",
         ["reference.checkpoint_dir=null"], ["reference.model"], ["takes the run's own weights"]),
        ("metric_logger: {_component_: wandb, project: x}", ["metric_logger=none"], ["metric_logger"], []),
        ("metric_logger: {_component_: wandb, project: x}", ["~metric_logger"], ["metric_logger"], []),
    ],
)  # fmt: skip
def test_what_stands_below_gives_way_and_is_named(load, text, overrides, off, told):
    cfg, said = load(*overrides, text=text), "\n".join(load(*overrides, text=text, ask=notes))
    assert [OmegaConf.select(cfg, name) or None for name in off] == [None] * len(off)
    assert [words for words in told if words not in said] == []


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("", ["keep_best=loss", "eval_dataset.source=null"], "keep_best=loss: there is nothing to evaluate on"),
        ("eval_dataset: {source: null}\neval_every_n_steps: 5", [], "eval_every_n_steps=5: there is nothing to eval"),
        (EVALUATED, ["eval_dataset=null", "keep_best=loss"], "keep_best=loss: there is nothing to evaluate on"),
        (EVALUATED, ["eval_dataset=null", "export_best=true"], "export_best=true: set keep_best"),
        (
            "",
            ["eval_dataset={math: a, code: b}", "keep_best=cod/loss"],
            "names math, code; nearest .* keep_best=code/loss",
        ),
        ("", ["eval_dataset=b", "keep_best=math/loss"], "names no held-out sets; nearest valid: keep_best=loss"),
        ("", ["eval_dataset={sorce: b}"], "eval_dataset.sorce"),
        ("", ["dataset.val_fraction=0.5", "eval_dataset=b"], "keep one of the two"),
        ("", ["eval_dataset=b", "eval_every_n_steps=5", "eval_every_n_epochs=1"], "says the same in another way"),
        (
            EVALUATED,
            ["keep_last_n=0", "keep_best=loss"],
            "keep_last_n=0: writes no checkpoint, which keep_best=loss needs",
        ),
        ("", ["lr_scheduler.num_warmup_steps=0", "lr_scheduler.warmup_ratio=0.1"], "says the same in another way"),
        ("", ["reference.dtype=fp32", "reference=start"], "reference.dtype=fp32: has no effect with reference=start"),
    ],
)
def test_a_contradiction_in_one_place_is_refused(load, text, overrides, words):
    with pytest.raises(UserError, match=words):
        load(*overrides, text=text)


def test_of_a_key_that_is_given_twice_the_later_counts_and_is_named(load):
    assert load("seed=5", "seed=6").seed == 6
    assert load("seed=5", "seed=6", ask=notes) == ["seed=5 has no effect: seed=6 stands behind it on the command line"]
    assert load("dataset=a", "dataset.source=b", ask=notes) == [
        "dataset=a has no effect: dataset.source=b stands behind it on the command line"
    ]
    assert load("optimizer.lr=1", "optimizer.fused=false", ask=notes) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 1\nepochs: 2\nseed: 3\n", "1.yaml: seed stands twice, in lines 1 and 3; keep one"),
        ("lora:\n  rank: 1\n  rank: 2\n", "lora.rank stands twice, in lines 2 and 3"),
        ("per_method: {lora: {seed: 1}, lora: {seed: 2}}\n", "per_method.lora stands twice, in line 1"),
        ("seed: 1\noptimizer: {lr: 1, lr: 2}", "optimizer.lr stands twice, in line 2"),
        ("loss: [{name: sft, weight: 1, weight: 2}]", r"loss\[0\].weight stands twice, in line 1"),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused_with_its_lines(load, text, lines):
    with pytest.raises(UserError, match=lines) as error:
        load(text=text)
    assert "\n" not in str(error.value)


def test_a_key_that_stands_twice_in_a_value_is_refused(load):
    with pytest.raises(UserError, match="command line, optimizer={lr: 1, lr: 2}: optimizer.lr stands twice"):
        load("optimizer={lr: 1, lr: 2}")
