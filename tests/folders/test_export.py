"""What stands beside the weights in an export: the trained tokenizer, template and stop tokens, for transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import SIZES, save_llama, tiny_llama
from test_data import tokenize
from test_tokenizer import CHATML, GEMMA, SHARED, needs_shared, save, torchtune_tokenizer

from pairtune.folders.export import export
from pairtune.folders.weights import open_weights
from pairtune.tokenizer.hf import adapt, hf_tokenizer

transformers = pytest.importorskip("transformers")

BASE, TRAINED = ("{% for m in messages %}" + word + " {{ m.content }} {% endfor %}" for word in ("w5", "w6"))
ENDED = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def base(tmp_path):
    save_llama(tmp_path / "base", sizes=SIZES)
    return edited(tmp_path / "base", chat_template=BASE)


def edited(folder, file="tokenizer_config.json", **values):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    return folder


def with_end_of_turn(folder):
    """Gives a folder's tokenizer the token <|im_end|>, in the place of w319."""
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_str(path.read_text().replace('"w319"', '"<|im_end|>"'))
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(path))
    return folder


def exported_by(base, tokenizer, *, adapter=False):
    files = open_weights({"checkpoint_dir": str(base), "model_type": "LLAMA3"})
    weights = tiny_llama(**SIZES).state_dict()
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "modules": ["q_proj"]}
    saved = {
        f"layers.0.attn.q_proj.lora_{ab}.weight": torch.ones(size) for ab, size in (("a", (2, 64)), ("b", (64, 2)))
    }
    return export(
        files, base.parent / "run", merged=weights, adapter=saved if adapter else None, lora=lora, tokenizer=tokenizer
    )


def template_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("own", ["config", "file", "named"])
@pytest.mark.parametrize("home", [False, True])
def test_a_tokenizer_of_another_folder_brings_its_template_and_nothing_of_the_bases(base, monkeypatch, own, home):
    monkeypatch.setenv("HOME", str(base.parent))
    (base / "chat_template.jinja").write_text(BASE)
    (base / "special_tokens_map.json").write_text('{"pad_token": "w9"}')
    other = base.parent / "other"
    save_llama(other, sizes=SIZES)
    if own == "config":
        edited(other, chat_template=TRAINED)
    else:
        file = other / ("chat_template.jinja" if own == "file" else "additional_chat_templates/default.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(TRAINED)
    exported = exported_by(base, hf_tokenizer("~/other" if home else str(other)))
    peer = transformers.AutoTokenizer.from_pretrained(exported)
    assert peer.get_chat_template() == TRAINED and peer.pad_token is None


def test_a_template_of_the_config_is_the_exports(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    (base.parent / "{a}.jinja").write_text(TRAINED)
    for given in (TRAINED, "~/{a}.jinja", str(base.parent / "{a}.jinja")):
        assert template_of(exported_by(base, hf_tokenizer(str(base), given))) == TRAINED


def test_what_was_trained_as_plain_text_has_no_template(base):
    (base / "chat_template.jinja").write_text(BASE)
    assert template_of(exported_by(base, hf_tokenizer(str(base), "plain"))) is None


def test_a_folders_other_templates_go_along_with_its_own(base):
    named = {"default": TRAINED, "tool_use": GEMMA}
    for written in ([{"name": name, "template": text} for name, text in named.items()], named):
        edited(base, chat_template=written)
        assert template_of(exported_by(base, hf_tokenizer(str(base)))) == named
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text(CHATML)
    (base / "chat_template.jinja").write_text(TRAINED)
    exported = exported_by(base, hf_tokenizer(str(base)), adapter=True)
    assert template_of(exported) == {"default": TRAINED, "rag": CHATML}
    assert (exported / "adapter/additional_chat_templates/rag.jinja").read_text() == CHATML


def test_generation_stops_where_trained_answers_end(base):
    with_end_of_turn(base)
    edited(base, "generation_config.json", eos_token_id=2, bos_token_id=1, temperature=0.5, do_sample=True)
    tokenizer = hf_tokenizer(str(base), ENDED)
    exported = exported_by(base, tokenizer)
    (pair,), _ = tokenize([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}], tokenizer)
    generation = transformers.AutoModelForCausalLM.from_pretrained(exported).generation_config
    assert generation.eos_token_id == [2, 319] and pair.chosen[-1] == 319
    assert (generation.bos_token_id, generation.temperature) == (1, 0.5)


@pytest.mark.parametrize(("template", "stops"), [(ENDED, [2, 319]), (BASE, 2)])
def test_a_base_without_generation_config_keeps_its_other_ids(base, template, stops):
    edited(with_end_of_turn(base), "config.json", pad_token_id=0)
    exported = exported_by(base, hf_tokenizer(str(base), template))
    generation = transformers.AutoModelForCausalLM.from_pretrained(exported).generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (stops, 1, 0)


def test_files_of_a_read_only_base_are_written_as_others(base):
    edited(base, "generation_config.json", eos_token_id=2)
    (base / "chat_template.jinja").write_text(BASE)
    for file in base.iterdir():
        file.chmod(0o444)
    exported = exported_by(base, hf_tokenizer(str(base), TRAINED), adapter=True)
    assert all(file.stat().st_mode & 0o200 for file in exported.rglob("*"))
    assert template_of(exported) == template_of(exported / "adapter") == TRAINED


def test_code_of_the_bases_folder_is_not_asked_for(base):
    edited(base, "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    edited(base, auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    exported = exported_by(base, hf_tokenizer(str(base)))
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert type(model) is transformers.LlamaForCausalLM and tokenizer.chat_template == BASE


# torchtune's tokenizers have no template in Jinja


class LikeTorchtunes:
    """A tokenizer with torchtune's interface that writes what a Jinja template writes."""

    stop_tokens, bos_id, eos_id, pad_id, special_tokens = [1], 0, 1, 7, {}

    def __init__(self, folder, template):
        self._peer, self._template = transformers.AutoTokenizer.from_pretrained(folder), template

    def encode(self, text, add_bos=True, add_eos=True):
        return self._peer.encode(text, add_special_tokens=False)

    def tokenize_messages(self, messages):
        chats = [{"role": m.role, "content": m.text_content} for m in messages]
        return self._peer.apply_chat_template(chats, chat_template=self._template, return_dict=False), None


def test_the_bases_template_goes_with_a_tokenizer_of_torchtunes_that_writes_the_same(base):
    save(base, chat_template=CHATML)
    same, other = (adapt(LikeTorchtunes(base, template)) for template in (CHATML, GEMMA))
    assert template_of(exported_by(base, same)) == CHATML
    assert template_of(exported_by(base, other)) is None


@needs_shared
def test_the_files_of_a_tokenizer_of_torchtunes_are_exported(base):
    path = SHARED / "tokenizers/mistral/tokenizer.model.v1"
    tokenizer = adapt(torchtune_tokenizer("mistral"), {"_component_": "torchtune.models.mistral", "path": str(path)})
    exported = exported_by(base, tokenizer)
    assert (exported / path.name).read_bytes() == path.read_bytes()
    assert not any("chat_template" in file.read_text() for file in Path(exported).glob("*.json"))
