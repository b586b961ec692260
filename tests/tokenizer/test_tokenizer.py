"""Rendering conversations: against transformers, torchtune, and by hand."""

import functools
import json
import random
from datetime import date, datetime
from pathlib import Path

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pairtune.errors import UserError
from pairtune.tokenizer.hf import adapt, common_prefix, hf_tokenizer
from pairtune.tokenizer.special_text import NOT_SPECIAL
from pairtune.tokenizer.template import Refusal

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")

TRAINING_TEXT = ["The reviewer wants a seventh ablation.", "user system assistant model", "Ça coûte combien ? 你好 🙂"]
SPECIAL = ["<s>", "</s>", "<|start|>", "<|head|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]

CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}<|im_start|>system\nAnswer briefly.<|im_end|>\n{% endif -%}\n"
    "{% for message in messages -%}\n"
    "  <|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{{ '\n' }}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|head|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>' + m.content + '<</SYS>>' %}{% continue %}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{{ '' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{{ '' }}{% endif %}"
)
# All that transformers' environment adds to Jinja's.
EXTRAS = (
    "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{% if tools %}T"
    "{% endif %}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "[{{ m.role }}]{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama_3": LLAMA_3, "llama_2": LLAMA_2, "gemma": GEMMA, "extras": EXTRAS}
ENDS = {"chatml": "<|im_end|>", "llama_3": "<|eot_id|>", "llama_2": "</s>", "gemma": "<end_of_turn>", "extras": "</s>"}


def byte_level_bpe(special=SPECIAL):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def save(folder, *, chat_template=None, adds_bos=True, backend=None, files=None, **config):
    backend = backend or byte_level_bpe()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    if chat_template is not None:
        config["chat_template"] = chat_template
    files = {"tokenizer_config.json": {k: v for k, v in config.items() if v is not None}} | (files or {})
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def chat(*turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


CONVERSATIONS = [
    chat("The reviewer wants?", "A seventh ablation."),
    chat("Hi", "Ça coûte 你好 🙂\n\n  indented  ", "And <b>&'\"?", " e"),
    chat("Hi", "n", system="Be the reviewer."),
    chat("Hi", "Write <|im_end|> and </s> and <|eot_id|> in the middle."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name, chat_template=template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_render_as_transformers_renders_them(folders, name, conversation):
    if name == "gemma" and conversation[0]["role"] == "system":
        pytest.skip("the template refuses system messages")
    transformers = pytest.importorskip("transformers")
    today = date.today().isoformat() if "strftime_now" in TEMPLATES[name] else None
    tokenizer = hf_tokenizer(folders[name], special_tokens_in_text="control", date=today)
    peer = transformers.AutoTokenizer.from_pretrained(folders[name])

    def peers(messages, **options):
        return peer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    prompt = conversation[:-1]
    assert tokenizer.render(prompt, add_generation_prompt=True) == peers(prompt, add_generation_prompt=True)
    assert tokenizer.render(prompt) == peers(prompt)
    whole, peers_whole = tokenizer.render(conversation), peers(conversation)
    assert whole == peers_whole[: len(whole)]
    assert peer.decode(peers_whole[len(whole) :]).strip() == ""
    assert peer.convert_ids_to_tokens(whole[-1]) == ENDS[name]
    assert whole[-2] not in tokenizer.end_ids


@pytest.mark.parametrize(
    ("behind_the_answer", "end"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("\n<|im_end|>\n\n", "<|im_end|>"),
        ("<|eot_id|></s>", "<|eot_id|>"),
        ("<|im_end|>\n</s>\n", "<|im_end|>"),
        ("</s>", "</s>"),
        ("", "</s>"),
        ("\n\n", "</s>"),
    ],
)
@pytest.mark.parametrize(
    "answer", ["e", "Fine.", "Fine. \n", "<|im_end|> starts it", "it holds </s> twice </s> so", "🙂"]
)
def test_an_answer_ends_in_exactly_one_end_token(tmp_path, behind_the_answer, end, answer):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    template += f"{{% if m.role == 'assistant' %}}{{{{ {behind_the_answer!r} }}}}{{% endif %}}{{% endfor %}}"
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=template))
    ids = tokenizer.render(chat("Hi", answer))
    before_end = behind_the_answer.partition(end)[0]
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>[user]Hi[assistant]{answer}{before_end}{end}"


@pytest.mark.parametrize("answer", ["Fine", "!", "Fine!", "e", " e ", "</s>", "!</s>", "</s>\n", "e</s>\n!", "\n"])
def test_an_answers_end_may_depend_on_the_conversation(tmp_path, answer):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if messages | length == 2 else m.content | trim }}"
        "{% if m.role == 'assistant' %}{{ '</s>\n' if messages | length == 2 else '!</s>\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=template))
    ids = tokenizer.render(chat("Hi", answer))
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"[user]Hi[assistant]{answer}</s>"
    ids = tokenizer.render(chat("Hi", "Ho", "And", answer))
    before = "[user]Hi[assistant]Ho!</s>\n[user]And[assistant]"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{before}{answer.strip()}!</s>"


def test_an_end_token_at_the_end_of_the_answer_is_not_taken_for_the_templates(folders):
    tokenizer = hf_tokenizer(folders["chatml"])
    text = tokenizer.decode(tokenizer.render(chat("Which token?", "It is <|im_end|>")), skip_special_tokens=False)
    assert text.endswith("It is <|im_end|><|im_end|>")


def test_bos_is_the_templates_alone(folders, tmp_path):
    with_bos, tokenizer_adds_it = hf_tokenizer(folders["llama_3"]), hf_tokenizer(folders["chatml"])
    ids = with_bos.render(chat("Hi", "Ho"))
    assert ids.count(with_bos.bos_id) == 1 and ids[0] == with_bos.bos_id
    assert tokenizer_adds_it.bos_id not in tokenizer_adds_it.render(chat("Hi", "Ho"))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer"])
@pytest.mark.parametrize(
    ("options", "has_bos"),
    [
        ({"adds_bos": True}, True),
        ({"adds_bos": True, "add_bos_token": False}, True),
        ({"adds_bos": False}, False),
        ({"adds_bos": False, "add_bos_token": True}, False),
        ({"adds_bos": False, "add_bos_token": True, "bos_token": None}, False),
    ],
)
def test_plain_text_has_the_bos_that_tokenizer_json_adds(tmp_path, kind, options, has_bos):
    transformers = pytest.importorskip("transformers")
    folder = save(tmp_path, tokenizer_class=kind, **options)
    tokenizer, peer = hf_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.render_text("Hi", " there")
    bos = [tokenizer.bos_id] if has_bos else []
    assert ids == [*bos, *tokenizer.encode("Hi there"), tokenizer.eos_id] == [*peer("Hi there")["input_ids"], 1]


def test_plain_text_that_brings_its_own_bos_gets_no_second_one(tmp_path):
    tokenizer = hf_tokenizer(save(tmp_path), special_tokens_in_text="control")
    assert tokenizer.render_text("<s>Hi") == tokenizer.render_text("Hi")


def test_a_tokenizer_that_adds_only_eos_is_not_mistaken_for_one_that_adds_bos(tmp_path):
    backend = byte_level_bpe()
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend, adds_bos=False, bos_token="</s>"))
    assert tokenizer.render_text("Hi", " there").count(tokenizer.eos_id) == 1


@needs_shared
@pytest.mark.parametrize("text", ["Once upon a time", "  two  spaces ", "newline\nand é 🙂", "</s> inside", ""])
def test_plain_text_is_tokenized_as_transformers_does(text):
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "models" / "stories260K-hf"
    tokenizer, peer = hf_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.is_plain and tokenizer.style == "plain text: the tokenizer has no chat template"
    assert tokenizer.vocab_size == len(peer) == 512
    for policy in ("text", "control"):
        tokenizer, split = hf_tokenizer(str(folder), special_tokens_in_text=policy), policy == "text"
        theirs = functools.partial(peer, split_special_tokens=split)
        assert tokenizer.render_text(text) == theirs(text)["input_ids"]
        assert tokenizer.render_text(text, " The end") == [*theirs(text + " The end")["input_ids"], peer.eos_token_id]
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("messages", "prompt", "answer"),
    [
        (chat("Hi", "Ho"), "Hi\n", "Ho"),
        (chat("a", "b", "c", "d"), "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d"),
        (chat("a", "b", system="Be kind."), "Be kind.\n\nHuman: a\n\nAssistant:", " b"),
        (
            [{"role": "system", "content": "Be rude."}, *chat("a", "b", system="Be kind.")],
            "Be rude.\n\nBe kind.\n\nHuman: a\n\nAssistant:",
            " b",
        ),
    ],
)
def test_plain_conversations_are_a_question_or_a_transcript(tmp_path, messages, prompt, answer):
    tokenizer = hf_tokenizer(save(tmp_path))
    assert tokenizer.render(messages[:-1], add_generation_prompt=True) == tokenizer.render_text(prompt)
    assert tokenizer.render(messages) == tokenizer.render_text(prompt, answer)
    assert tokenizer.decode(tokenizer.render(messages)) == prompt + answer


@pytest.mark.parametrize("template", [None, CHATML, LLAMA_2])
def test_a_pad_token_that_is_eos_changes_nothing(tmp_path, template):
    plain = hf_tokenizer(save(tmp_path / "plain", chat_template=template, pad_token="<|pad|>"))
    padded = hf_tokenizer(save(tmp_path / "padded", chat_template=template, pad_token="</s>"))
    assert padded.pad_id == padded.eos_id != plain.pad_id
    assert padded.render(CONVERSATIONS[0]) == plain.render(CONVERSATIONS[0])


def test_special_tokens_are_found_wherever_a_folder_names_them(tmp_path):
    as_dict = hf_tokenizer(save(tmp_path / "dict", eos_token={"content": "<|eot_id|>", "lstrip": False}))
    assert as_dict.decode([as_dict.eos_id], skip_special_tokens=False) == "<|eot_id|>"
    table = {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"}}
    old = hf_tokenizer(save(tmp_path / "old", eos_token=None, files=table))
    assert old.decode([old.eos_id], skip_special_tokens=False) == "<|im_end|>"
    ids = {"generation_config.json": {"eos_token_id": [6, 4]}, "config.json": {"eos_token_id": 1}}
    by_id = hf_tokenizer(save(tmp_path / "id", eos_token=None, files=ids))
    assert (by_id.eos_id, by_id.stop_ids) == (6, [6, 4])
    assert (by_id.bos_id, by_id.pad_id) == (0, None)


def test_generation_stops_at_eos_at_the_models_stop_tokens_and_at_the_templates(tmp_path):
    files = {"generation_config.json": {"eos_token_id": [1, 4]}}
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=CHATML, files=files))
    assert [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.stop_ids] == [
        "</s>",
        "<|eot_id|>",
        "<|im_end|>",
    ]


def test_the_folders_template_is_the_jinja_file_then_the_default_of_the_config(tmp_path):
    named = {"rag": "R", "default": LLAMA_2}
    for written in ([{"name": name, "template": text} for name, text in named.items()], named):
        assert hf_tokenizer(save(tmp_path / "a", chat_template=written)).chat_template == LLAMA_2
    with_file = save(tmp_path / "b", chat_template=LLAMA_2, files={"chat_template.jinja": GEMMA})
    assert hf_tokenizer(with_file).chat_template == GEMMA
    assert not hf_tokenizer(with_file).is_plain


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"additional_chat_templates/rag.jinja": GEMMA, "chat_template.jinja": LLAMA_3}, LLAMA_3),
        ({"additional_chat_templates/default.jinja": GEMMA, "additional_chat_templates/rag.jinja": LLAMA_3}, GEMMA),
        ({"chat_template.json": {"chat_template": GEMMA}}, LLAMA_2),
    ],
)
def test_templates_beside_the_config_are_found_as_transformers_finds_them(tmp_path, files, found):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "additional_chat_templates").mkdir()
    folder = save(tmp_path, chat_template=LLAMA_2, files=files)
    assert hf_tokenizer(folder).chat_template == found
    assert transformers.AutoTokenizer.from_pretrained(folder).get_chat_template() == found


def test_a_processors_template_is_the_last_to_be_taken(tmp_path):
    assert hf_tokenizer(save(tmp_path, files={"chat_template.json": {"chat_template": GEMMA}})).chat_template == GEMMA


def test_templates_without_a_default_are_named(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    files = {f"additional_chat_templates/{name}.jinja": GEMMA for name in ("tool_use", "rag")}
    with pytest.raises(UserError, match=r"\(rag, tool_use\) but none named default"):
        hf_tokenizer(save(tmp_path, files=files))


@pytest.mark.parametrize(
    "template",
    [
        "{% set d = dict(a=1, b='z') %}{{ d.b }}{% set n = namespace(a=1, self=2) %}{% set n.a = n.self %}{{ n.a }}",
        "{{ dict.fromkeys('ab', 1) }}",
        "{{ dict.update(messages[0], {'content': 'changed'}) }}",
        "{{ dict.__name__ }}",
        "{% set n = namespace(__x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
    ],
)
def test_a_templates_dict_and_namespace_are_those_of_transformers(folders, template):
    transformers = pytest.importorskip("transformers")
    peer, messages = transformers.AutoTokenizer.from_pretrained(folders["llama_3"]), chat("Hi")
    tokenizer = hf_tokenizer(folders["llama_3"], template)
    try:
        expected = peer.apply_chat_template(messages, chat_template=template, return_dict=False)
    except jinja2.TemplateError:
        with pytest.raises(UserError, match="refuses the conversation"):
            tokenizer.render(messages)
    else:
        assert tokenizer.render(messages) == expected
    assert messages == chat("Hi")


def test_a_template_can_be_given_as_plain_as_a_file_and_as_text(folders, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(GEMMA)
    assert hf_tokenizer(folders["chatml"], str(file)).chat_template == GEMMA
    assert hf_tokenizer(folders["chatml"], LLAMA_2).chat_template == LLAMA_2
    plain = hf_tokenizer(folders["chatml"], "plain")
    assert plain.is_plain and plain.style == "plain text: chat_template=plain"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [("chatml", "neither null"), ("absent.jinja", "no such file"), ("{% for %}", "not valid Jinja"), ("", "neither")],
)
def test_a_wrong_chat_template_is_refused(folders, chat_template, message):
    with pytest.raises(UserError, match=message):
        hf_tokenizer(folders["chatml"], chat_template)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token": None}, "eos_token is 'not set'"),
        ({"eos_token": "<end>"}, "eos_token is '<end>', which is no token"),
        ({"bos_token": "<begin>"}, "bos_token is '<begin>'"),
        ({"files": {"tokenizer.json": "{"}}, "tokenizer.json cannot be read"),
        ({"files": {"generation_config.json": "{'a'}"}}, "generation_config.json: cannot be read"),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, r"\(rag\) but none named default"),
        ({"chat_template": {"rag": "R"}}, r"\(rag\) but none named default"),
        ({"chat_template": ["R"]}, "chat_template must be text, texts by name, or a list"),
        ({"chat_template": {"default": 1}}, "chat_template must be text, texts by name, or a list"),
        ({"extra_special_tokens": [5]}, "extra_special_tokens is 5, which is no token's text"),
        ({"pad_token": {"lstrip": True}}, "pad_token is {'lstrip': True}, which is no token's text"),
    ],
)
def test_a_broken_folder_is_refused_by_file(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        hf_tokenizer(save(tmp_path, **options))


def test_a_folder_without_tokenizer_json_or_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json, nor vocab.json.*llama2_tokenizer"):
        hf_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="does not exist; `tune download`"):
        hf_tokenizer(str(tmp_path / "absent"))


def test_a_conversation_that_the_template_refuses_is_named_by_its_roles(folders):
    with pytest.raises(UserError, match=r"\(system, user, assistant\): no system role"):
        hf_tokenizer(folders["gemma"]).render(chat("Hi", "Ho", system="Be kind."))


def test_a_template_that_does_not_write_the_answer_is_refused(folders):
    with pytest.raises(UserError, match="does not write the last assistant message"):
        hf_tokenizer(folders["chatml"], "{{ messages[0].content }}").render(chat("Hi", "Ho"))


def test_a_truncation_stored_in_the_folder_is_ignored(tmp_path):
    backend = byte_level_bpe()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend))
    text = "The reviewer wants a seventh ablation."
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(("last", "largest"), [(2, 3), (90, 90)])
def test_vocab_size_is_the_largest_id_plus_one_with_gaps_and_added_tokens(tmp_path, last, largest):
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "far": last}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens(["<added>"])  # becomes token 3
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend))
    assert max(tokenizer.encode("far <added>")) == largest
    assert tokenizer.vocab_size == largest + 1


def test_common_prefix_is_that_of_a_naive_loop():
    generator = random.Random(0)
    for _ in range(500):
        lists = [[generator.randrange(2) for _ in range(generator.randrange(6))] for _ in range(3)]
        naive = []
        for column in zip(*lists, strict=False):
            if len(set(column)) > 1:
                break
            naive.append(column[0])
        assert common_prefix(*lists) == naive


# Special tokens that stand in a text; that they are text in every family is test_chat_templates.py's to show


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return functools.partial(hf_tokenizer, save(tmp_path_factory.mktemp("bare") / "model"))


QUOTED = "The end is </s>, and <|eot_id|>"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("{{ m.content | replace('<', '&lt;') }}", QUOTED.replace("<", "&lt;")),
        ("{{ m.content | tojson }}", f'"{QUOTED}"'),
        ("{{ m.content | upper }}", QUOTED.upper()),
        ("{{ m.content.split('The')[1] | trim }}", QUOTED.removeprefix("The ")),
        ("{{ m.content }}{{ m.content }}", QUOTED * 2),
    ],
)
def test_a_message_that_the_template_transforms_stays_text(bare, content, written):
    tokenizer = bare("<s>{% for m in messages %}" + content + "</s>{% endfor %}")
    ids = tokenizer.render(chat(QUOTED))
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{written}</s>"
    assert [i for i in ids if i < len(SPECIAL)] == [tokenizer.bos_id, tokenizer.eos_id]


@pytest.mark.parametrize(
    "content",
    ["{{ m.content[:14] }}", "{{ m.content.split('</s>')[0] }}", "{{ m.content | replace('<|eot_id|>', '') }}",
     "{{ m.content | length }}"],
)  # fmt: skip
def test_a_template_that_looks_into_special_tokens_is_refused_by_row(bare, content):
    tokenizer = bare("<s>{% for m in messages %}" + content + "</s>{% endfor %}")
    tokenizer.render(chat("The end is near"))
    with pytest.raises(Refusal, match="changes a message that holds a special token's text.*in_text=control"):
        tokenizer.render(chat(QUOTED))


def test_a_text_that_holds_the_mark_itself_beside_a_special_token_is_refused(bare):
    tokenizer = bare(CHATML)
    assert f"a{NOT_SPECIAL}b" in tokenizer.decode(tokenizer.render(chat(f"a{NOT_SPECIAL}b")))
    with pytest.raises(Refusal, match="changes a message"):
        tokenizer.render(chat(f"a{NOT_SPECIAL}b", "</s>"))


def test_special_tokens_that_overlap_or_hold_each_other_are_text(tmp_path):
    backend = byte_level_bpe([*SPECIAL, "<a", "a>", "<a>"])
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend, chat_template=CHATML))
    text = "<a><a<aa>>a>"
    ids = tokenizer.render(chat(text))
    assert text in tokenizer.decode(ids)  # which leaves special tokens out
    assert hf_tokenizer(save(tmp_path, backend=backend)).encode(text) == ids[-len(text) - 2 : -2]


def test_a_vocabulary_that_makes_a_special_token_of_plain_characters_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "near": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend))
    assert tokenizer.encode("near or <s>far") == [3, 2, 2]
    with pytest.raises(Refusal, match="makes the special token </s> of plain characters"):
        tokenizer.encode("near </s>")


def test_an_unknown_way_with_special_tokens_is_refused(folders):
    with pytest.raises(UserError, match="special_tokens_in_text='ignore': must be text or control"):
        hf_tokenizer(folders["chatml"], special_tokens_in_text="ignore")


# The day that a template writes

PUBLISHED = Path(__file__).parent / "chat_templates" / "llama_3_2.jinja"
NEEDS_A_DAY = "Today: {{ strftime_now('%d %B %Y') }}" + CHATML


@pytest.fixture
def peer_on(monkeypatch):
    """Gives a folder's prompt as transformers renders it on a day."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    from transformers import AutoTokenizer

    def ids_on(day, folder):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls: datetime(*day, 23, 59, 59))})
        monkeypatch.setattr(utils, "datetime", clock)
        peer = AutoTokenizer.from_pretrained(folder)
        return peer.apply_chat_template(chat("Hi"), return_dict=False, add_generation_prompt=True)

    return ids_on


def test_a_prompt_has_the_templates_own_day_whatever_day_it_is(tmp_path, peer_on):
    folder = save(tmp_path, chat_template=PUBLISHED.read_text())
    ids = hf_tokenizer(folder).render(chat("Hi"), add_generation_prompt=True)
    assert ids == peer_on((2024, 7, 26), folder) != peer_on((2025, 11, 21), folder)


@pytest.mark.parametrize("template", [PUBLISHED.read_text(), NEEDS_A_DAY])
def test_a_prompt_has_the_day_of_the_config(tmp_path, peer_on, template):
    folder = save(tmp_path, chat_template=template)
    tokenizer = hf_tokenizer(folder, date="2025-11-20")
    assert tokenizer.render(chat("Hi"), add_generation_prompt=True) == peer_on((2025, 11, 20), folder)


def test_a_template_that_needs_a_day_is_refused_without_one(tmp_path):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=NEEDS_A_DAY))
    with pytest.raises(UserError, match="knows none without a clock: .*tokenizer.date=2025-01-31") as refused:
        tokenizer.render(chat("Hi"))
    assert not isinstance(refused.value, Refusal)  # which would drop every row


@pytest.mark.parametrize(
    ("template", "day", "message"),
    [
        (CHATML, "2025-11-20", "date=2025-11-20: the chat template asks for no day"),
        (None, "2025-11-20", "date=2025-11-20: the chat template asks for no day"),
        (NEEDS_A_DAY, "20 Nov 2025", "date=20 Nov 2025: must be a day as YYYY-MM-DD"),
        (NEEDS_A_DAY, "2025-02-30", "date=2025-02-30: must be a day"),
    ],
)
def test_a_day_without_effect_and_one_that_is_none_are_refused(tmp_path, template, day, message):
    with pytest.raises(UserError, match=message):
        hf_tokenizer(save(tmp_path, chat_template=template), date=day)


# Folders that have no tokenizer.json, and what transformers makes of those that have one


@needs_shared
@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ({"model_type": "gpt2"}, {"tokenizer_config.json": {"model_max_length": 1024}}),
        ({"model_type": "gpt2"}, {}),
        ({"model_type": "gpt2"}, {"tokenizer_config.json": {"add_bos_token": True}}),
        ({"model_type": "llama"},
         {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}),
        ({"model_type": "qwen2"}, {"added_tokens.json": {"<|im_start|>": 50257, "<|im_end|>": 50258},
                                   "special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
        ({"model_type": "qwen3"}, {"tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None, "chat_template": CHATML,
            "added_tokens_decoder": {
                str(i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                         "special": i < 50259}
                for i, text in enumerate(["<|im_start|>", "<|im_end|>", "<think>"], 50257)}}}),
    ],
)  # fmt: skip
def test_vocabulary_and_merges_are_read_as_transformers_reads_them(tmp_path, kind, files):
    transformers = pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(SHARED / "tokenizers/gpt2" / name)
    for name, content in {"config.json": kind, **files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer, peer = hf_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (peer.eos_token_id, len(peer))
    for text in (*TRAINING_TEXT, "x  2024\n\n  é e\u0301 it's  ", "<think>\nno\n</think>", ""):
        assert tokenizer.render_text(text) == peer(text)["input_ids"]
        if peer.chat_template:
            assert tokenizer.render(chat(text)) == peer.apply_chat_template(chat(text), return_dict=False)


NEW = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
DECODER = {str(i): {"content": text, **PLAIN, "rstrip": text == "<|im_end|>"} for i, text in enumerate(SPECIAL)}


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"pad_token": "<new>"}, {}),
        ({"pad_token": {"__type": "AddedToken", **NEW}}, {}),
        ({"image_token": "<new>"}, {}),
        ({"additional_special_tokens": ["<new>", "<|im_end|>"]}, {}),
        ({"extra_special_tokens": ["<new>", "<newer>"], "pad_token": "<newest>"}, {}),
        ({"extra_special_tokens": {"image_token": "<new>"}}, {}),
        ({"added_tokens_decoder": DECODER}, {}),
        ({"added_tokens_decoder": DECODER | {"334": NEW}, "pad_token": "<newer>"}, {}),
        ({}, {"special_tokens_map.json": {"pad_token": NEW, "additional_special_tokens": ["<newer>"]}}),
        ({}, {"added_tokens.json": {"<newer>": 335, "<new>": 334}, "special_tokens_map.json": {"pad_token": "<new>"}}),
    ],
)
def test_tokens_that_other_files_add_are_those_of_transformers(tmp_path, kind, config, files):
    transformers = pytest.importorskip("transformers")
    folder = save(tmp_path, chat_template=CHATML, tokenizer_class=kind, unk_token="<|pad|>", files=files, **config)
    tokenizer = hf_tokenizer(folder, special_tokens_in_text="control")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(peer) and tokenizer.pad_id == peer.pad_token_id
    assert tokenizer._backend.get_added_tokens_decoder() == peer.added_tokens_decoder
    for text in ("a <new> b", "<newer><newest>c <new>", " <|im_end|> d", "<s> a </s> b"):
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False)
        assert tokenizer.render(chat(text)) == peer.apply_chat_template(chat(text), return_dict=False)


def test_a_token_that_would_get_another_id_is_refused(tmp_path):
    files = {"added_tokens.json": {"<new>": 405}}
    with pytest.raises(UserError, match="<new> is token 405 .*, and would be token 334 behind the vocabulary's"):
        hf_tokenizer(save(tmp_path, files=files))


def test_special_tokens_that_a_folder_splits_are_refused(tmp_path):
    with pytest.raises(UserError, match="split_special_tokens in tokenizer_config.json makes ordinary characters"):
        hf_tokenizer(save(tmp_path, chat_template=CHATML, split_special_tokens=True))
    hf_tokenizer(save(tmp_path, chat_template=CHATML, split_special_tokens=False))


@needs_shared
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer_class": "CodeGenTokenizer"}, "tokenizer_class is CodeGenTokenizer"),
        ({}, "tokenizer_class is None. Set it"),
        ({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"60000": {"content": "<x>"}}},
         "<x> is token 60000 .* would be token 50257"),
        ({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"x": {"content": "<x>"}}}, "cannot be read"),
        ({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": ["<x>"]}, "added tokens cannot be read"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_cannot_be_read_as_transformers_does_is_refused(tmp_path, content, message):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(SHARED / "tokenizers/gpt2" / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        hf_tokenizer(str(tmp_path))


def test_a_broken_vocabulary_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("a b")
    with pytest.raises(UserError, match="vocab.json and merges.txt cannot be read"):
        hf_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "phi3", None])
@pytest.mark.parametrize(
    "options",
    [
        {"legacy": False},
        {"legacy": True},
        {"legacy": None},
        {},
        {"add_prefix_space": False},
        {"add_prefix_space": True},
    ],
)
def test_a_llamas_spaces_are_those_of_its_class_in_transformers(tmp_path, model_type, options):
    transformers = pytest.importorskip("transformers")
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a", "[", "▁[", "]"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "[")], unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    files = {"config.json": {"model_type": model_type}} if model_type else {}
    folder = save(tmp_path, backend=backend, tokenizer_class="LlamaTokenizer", files=files, **options)
    tokenizer = hf_tokenizer(folder, special_tokens_in_text="control")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("a a", " a  a ", "<s>[a] a</s><s>[a", "<s> a", ""):
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_neox", None])
@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_gpt2s_first_word_is_that_of_its_class_in_transformers(tmp_path, model_type, prefix):
    transformers = pytest.importorskip("transformers")
    files = {"config.json": {"model_type": model_type}} if model_type else {}
    options = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>", "add_prefix_space": prefix}
    folder = save(tmp_path, files=files, **options)
    tokenizer, peer = hf_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("reviewer wants", " a"):
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False)


# torchtune's tokenizers


def torchtune_tokenizer(name, **options):
    from torchtune.models import gemma, llama2, llama3, mistral, phi3, qwen2

    files = SHARED / "tokenizers"
    m_model, v1 = str(files / "torchtune" / "m.model"), str(files / "mistral" / "tokenizer.model.v1")
    gpt2 = [str(files / "gpt2" / file) for file in ("vocab.json", "merges.txt")]
    return {
        "llama3": lambda: llama3.llama3_tokenizer(str(files / "torchtune" / "tiktoken_small.model"), **options),
        "llama2": lambda: llama2.llama2_tokenizer(m_model, **options),
        "mistral": lambda: mistral.mistral_tokenizer(v1, **options),
        "gemma": lambda: gemma.gemma_tokenizer(m_model, **options),
        "phi3": lambda: phi3.phi3_mini_tokenizer(v1, **options),
        "qwen2": lambda: qwen2.qwen2_tokenizer(*gpt2, **options),
    }[name]()


TORCHTUNE = ("llama3", "llama2", "mistral", "gemma", "phi3", "qwen2")


@needs_shared
@pytest.mark.parametrize("name", TORCHTUNE)
@pytest.mark.parametrize("conversation", [chat("Hi", "Ho there"), chat("Hi", "e", "And 你好?", " Fine.\n")])
def test_torchtunes_tokenizers_render_as_they_do_alone_but_for_one_end_token(name, conversation):
    from torchtune.data import Message

    theirs = torchtune_tokenizer(name)
    tokenizer = adapt(theirs)
    alone = theirs.tokenize_messages([Message(m["role"], m["content"]) for m in conversation])[0]
    whole = tokenizer.render(conversation)
    assert whole == alone[: len(whole)] and set(alone[len(whole) :]) <= {
        theirs.eos_id,
        *theirs.encode("\n", False, False),
    }
    assert whole[-1] in tokenizer.stop_ids and whole[-2] not in tokenizer.end_ids
    asked = tokenizer.render(conversation[:-1], add_generation_prompt=True)
    assert asked == whole[: len(asked)]
    assert tokenizer.decode(whole[len(asked) : -1]).strip() == conversation[-1]["content"].strip()


@needs_shared
def test_llama3s_header_is_the_generation_prompt_and_eot_the_end():
    theirs = torchtune_tokenizer("llama3")
    tokenizer = adapt(theirs)
    asked = tokenizer.render(chat("Hi"), add_generation_prompt=True)
    assert theirs.decode(asked, truncate_at_eos=False, skip_special_tokens=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.render(chat("Hi", "Ho"))[-1] == theirs.eot_id
    assert tokenizer.render_text("Hi", " Ho") == theirs.encode("Hi Ho", add_bos=True, add_eos=True)
    assert tokenizer.decode(tokenizer.encode("Hi Ho")) == "Hi Ho"
    assert adapt(tokenizer) is tokenizer


@needs_shared
def test_phi3_stops_at_the_end_token_that_its_template_writes():
    tokenizer = adapt(torchtune_tokenizer("phi3"))
    assert tokenizer.render(chat("Hi", "Ho"))[-1] == 32007  # <|end|>, which torchtune's stop_tokens lack
    assert 32007 in tokenizer.stop_ids
    assert tokenizer.vocab_size == 1 + max(tokenizer._tokenizer.special_tokens.values())  # torchtune says 32,000


@needs_shared
def test_a_torchtune_tokenizer_that_truncates_is_refused():
    with pytest.raises(UserError, match="max_seq_len=128"):
        adapt(torchtune_tokenizer("llama2", max_seq_len=128))


@needs_shared
def test_what_a_torchtune_template_refuses_is_named():
    with pytest.raises(UserError, match=r"MistralTokenizer refuses the conversation \(system, user, assistant\)"):
        adapt(torchtune_tokenizer("mistral")).render(chat("Hi", "Ho", system="Be kind."))


def test_adapt_keeps_ours_and_refuses_what_cannot_write_conversations(folders):
    tokenizer = hf_tokenizer(folders["chatml"])
    assert adapt(tokenizer) is tokenizer
    with pytest.raises(UserError, match="str cannot write conversations"):
        adapt("gpt2")


@needs_shared
@pytest.mark.parametrize("name", TORCHTUNE)
def test_special_tokens_in_text_are_no_tokens_of_torchtunes_tokenizers_either(name):
    tokenizer = adapt(torchtune_tokenizer(name))
    reserved = {
        *tokenizer.end_ids,
        tokenizer.bos_id,
        *(getattr(tokenizer._tokenizer, "special_tokens", None) or {}).values(),
    }
    for text in ("<|im_end|>", "</s>", "<|eot_id|>", "<|end|>", "<s>"):
        messages = chat(f"What is {text}?", "An end.")
        if name == "qwen2" and text == "<|im_end|>":
            with pytest.raises(
                Refusal, match=r"Qwen2Tokenizer would make a token of the text <\|im_end\|>. Use pairtune"
            ):
                tokenizer.render(messages)
            continue
        with_one, without = tokenizer.render(messages), tokenizer.render(chat("What is it?", "An end."))
        assert [i for i in with_one if i in reserved] == [i for i in without if i in reserved]
        assert tokenizer.holds_special(text) or text == "<s>"
