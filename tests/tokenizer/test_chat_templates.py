"""Every family of models: conversations are token for token those of transformers' apply_chat_template.

The templates in chat_templates/ are those that the models publish. Vocabularies are real where real ones lie beside the
project; else they are trained here, in the family's format and with its special tokens.
"""

import functools
import json
import random
import re
from datetime import date
from pathlib import Path

import jinja2
import pytest
import tokenizers
from test_data import tokenize
from test_tokenizer import SHARED, chat
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pairtune.tokenizer.hf import hf_tokenizer
from pairtune.tokenizer.template import Refusal

transformers = pytest.importorskip("transformers")

TEMPLATES = Path(__file__).parent / "chat_templates"
NUM_CONVERSATIONS = 200
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# Texts

SENTENCES = [
    "The reviewer wants a seventh ablation, and the authors have 24 hours.",
    "Ça coûte combien ? Déjà vu; Straße, naïve coöperation.",
    "你好，世界。これは日本語の文です。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 and e\u0301 (decomposed) or é",
    'def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n\n\tprint(\'tab\', "quotes", f"{x!r}")',
    "| a | b |\n|---|---|\n| 1 | 2.50 |\n\n* item\n\n\n1. one\n2. two",
    "<html><b>&amp; 'bold' \"quoted\" \\n {{ braces }} {% percent %}</b></html>",
    "wordwithoutend" * 20,
    "  leading,  doubled   spaces and trailing   ",
    "\n\nnewlines at both ends\n\n",
    "\t\r\n mixed \u00a0 white\u2003space \u200b zero width",
    "3.14159 2024 1,000,000 x  1    2\n    3",
    "system user assistant model tool",
    "x",
    "",
]
SENTENCES += ["<think>\nLet me see.\n</think>\n\nYes.", "a < b and c > d, <|not a token|>, </ s>, < s >, <|im_"]


def conversations(seed=0):
    """200 of them: 1 to 6 turns, with and without a system message, a few whose roles do not alternate."""
    rng = random.Random(seed)

    def text():
        return rng.choice(["", " ", "\n"]).join(rng.choices(SENTENCES, k=rng.choice([1, 1, 2])))

    made = []
    for number in range(NUM_CONVERSATIONS):
        turns = [text() for _ in range(2 * rng.choice([1, 1, 2, 2, 3, 4, 6]))]
        messages = chat(*turns, system=text() if number % 3 == 0 else None)
        if number % 25 == 7:
            messages.insert(-2, messages[-2])
        made.append(messages)
    return made


# Vocabularies


def byte_level(words=None, *, normalizer=None, digits=False, size=600):
    """GPT-2's format, and with other words Llama 3's and Qwen's."""
    backend = tokenizers.Tokenizer(models.BPE())
    steps = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


def sentencepiece_like(first=("<unk>", "<s>", "</s>"), *, gemma=False):
    """A BPE of characters with spaces as ▁ and unknown characters in bytes, as converted SentencePiece models are."""
    spaces = normalizers.Replace(" ", "▁")
    normalizer = spaces if gemma else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(SENTENCES[:3] + SENTENCES[9:], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return finish_sentencepiece(vocabulary, [tuple(merge) for merge in learned["merges"]], gemma=gemma)


def finish_sentencepiece(vocabulary, merges, *, gemma=False):
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    spaces, steps = (
        normalizers.Replace(" ", "▁"),
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    if gemma:
        backend.normalizer, backend.pre_tokenizer = spaces, pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def mistral(file="tokenizer.model.v1"):
    """Mistral's own vocabulary, 32,000 or 32,768 pieces, converted as tokenizer.json has it."""
    path = SHARED / "tokenizers/mistral" / file
    if not path.is_file():
        return sentencepiece_like()
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path))
    ids = range(model.get_piece_size())
    vocabulary = {model.id_to_piece(i): i for i in ids}
    merges = []
    for piece, i in vocabulary.items():
        if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
            continue
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-model.get_score(i), pair) for pair in known]
    merges = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    control = [model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)]
    backend = finish_sentencepiece(vocabulary, merges)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return backend


def stories():
    """A real Llama of 512 pieces whose normalizer takes spaces away."""
    file = SHARED / "models/stories260K-hf/tokenizer.json"
    return tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else sentencepiece_like()


def gpt2():
    files = [SHARED / "tokenizers/gpt2" / name for name in ("vocab.json", "merges.txt")]
    if not files[0].is_file():
        return byte_level()
    backend = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


# Families: their format, the special tokens in the order of their ids, what tokenizer_config.json says

SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_CLASS = {**SENTENCEPIECE, "tokenizer_class": "LlamaTokenizer", "legacy": False}
LLAMA_3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
LLAMA_3_NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_NAMES = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
THINKING = [AddedToken(text, normalized=False, special=False) for text in ("<tool_call>", "<think>", "</think>")]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
PHI_3 = [AddedToken("</s>", rstrip=True, normalized=False, special=False), "<|endoftext|>"]
PHI_3 += [
    AddedToken(text, rstrip=True, normalized=False, special=True)
    for text in ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
]


def of_llama_3():
    return byte_level(LLAMA_3_WORDS)


def of_qwen():
    return byte_level(QWEN_WORDS, normalizer=normalizers.NFC())


def of_gemma():
    return sentencepiece_like(GEMMA, gemma=True)


# name: backend, special tokens, tokenizer_config.json, model_type, how often BOS stands in a conversation
FAMILIES = {
    "llama_2": (sentencepiece_like, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "llama", "user turns"),
    "llama_2_stories": (stories, ["<unk>", "<s>", "</s>"], SENTENCEPIECE, "llama", "user turns"),
    "llama_3": (of_llama_3, LLAMA_3, LLAMA_3_NAMES, "llama", 1),
    "llama_3_1": (of_llama_3, [*LLAMA_3, "<|python_tag|>"], LLAMA_3_NAMES, "llama", 1),
    "llama_3_2": (of_llama_3, LLAMA_3, LLAMA_3_NAMES, "llama", 1),
    "tinyllama": (sentencepiece_like, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "llama", 0),
    "mistral_v0_1": (mistral, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "mistral", 1),
    "mistral_v0_2": (sentencepiece_like, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "mistral", 1),
    "mistral_v0_3": (
        functools.partial(mistral, "mistral_instruct_tokenizer_240323.model.v3"),
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], LLAMA_CLASS, "mistral", 1,
    ),
    "mixtral": (sentencepiece_like, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "mixtral", 1),
    "zephyr": (sentencepiece_like, ["<unk>", "<s>", "</s>"], LLAMA_CLASS, "mistral", 0),
    "gemma": (of_gemma, GEMMA, {**GEMMA_NAMES, "tokenizer_class": "GemmaTokenizer"}, "gemma", 1),
    "gemma_2": (of_gemma, GEMMA, {**GEMMA_NAMES, "tokenizer_class": "GemmaTokenizer"}, "gemma2", 1),
    "phi_3": (
        sentencepiece_like, ["<unk>", "<s>", *PHI_3],
        {**LLAMA_CLASS, "eos_token": "<|endoftext|>"}, "phi3", 0,
    ),
    "phi_4": (
        byte_level, [*CHATML, "<|im_sep|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}, "phi3", 0,
    ),
    "qwen2": (of_qwen, CHATML, {**QWEN_NAMES, "tokenizer_class": "Qwen2Tokenizer"}, "qwen2", 0),
    "qwen2_5": (of_qwen, [*CHATML, THINKING[0]], {**QWEN_NAMES, "tokenizer_class": "Qwen2Tokenizer"}, "qwen2", 0),
    "qwen3": (of_qwen, [*CHATML, *THINKING], {**QWEN_NAMES, "tokenizer_class": "Qwen2Tokenizer"}, "qwen3", 0),
    "smollm2": (
        functools.partial(byte_level, digits=True), CHATML,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"},
        "llama", "every turn",
    ),
    "tulu_3": (of_llama_3, LLAMA_3, {**LLAMA_3_NAMES, "eos_token": "<|end_of_text|>"}, "llama", 0),
    "gpt2": (
        gpt2, [AddedToken("<|endoftext|>", normalized=True, special=True)],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}, "gpt2", 0,
    ),
}  # fmt: skip
TEMPLATE_OF = {"llama_2_stories": "llama_2", "tinyllama": "zephyr", "gemma_2": "gemma", "gpt2": None}


def folder_of(name, root):
    """Writes the family's tokenizer as its models publish it."""
    backend, special, config, model_type, _ = FAMILIES[name]
    backend = backend()
    backend.add_tokens(
        [AddedToken(text, normalized=False, special=True) if isinstance(text, str) else text for text in special]
    )
    if config.get("bos_token") in ("<s>", "<bos>", "<|begin_of_text|>"):
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    folder = root / name
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    template = TEMPLATE_OF.get(name, name)
    if template:
        config["chat_template"] = (TEMPLATES / f"{template}.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


OF_TRL = {name: name.replace("_", "", 1) for name in ("llama_3", "llama_3_1", "llama_3_2", "phi_3")}
OF_TRL |= {name: name for name in ("gemma", "qwen2_5", "qwen3")}


@pytest.mark.parametrize("name", OF_TRL)
def test_templates_are_those_that_trl_has_of_the_same_models(name):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    theirs = Path(trl.__file__).parent / "chat_templates" / f"{OF_TRL[name]}.jinja"
    assert (TEMPLATES / f"{name}.jinja").read_text().rstrip("\n") == theirs.read_text().rstrip("\n")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its name, our tokenizer, and transformers'; the latter tells a template today's date."""
    folder = folder_of(request.param, tmp_path_factory.mktemp("family"))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    return request.param, hf_tokenizer(folder, **today_in(peer.chat_template)), peer


def today_in(template):
    return {"date": date.today().isoformat()} if "strftime_now" in (template or "") else {}


def peers_ids(peer, messages, **options):
    return peer.apply_chat_template(messages, return_dict=False, **options)


def unless_refused(render, messages):
    """Returns what is rendered, None where the template raises."""
    try:
        return render(messages)
    except (Refusal, jinja2.TemplateError):
        return None


def test_200_conversations_are_those_of_transformers(family):
    name, tokenizer, peer = family
    compared = 0
    for messages in conversations():
        assert not any(tokenizer.holds_special(message["content"]) for message in messages)
        if tokenizer.is_plain:
            text = "".join(message["content"] for message in messages)
            assert tokenizer.render_text(text) == peer(text)["input_ids"]
            compared += 1
            continue
        asked, theirs = messages[:-1], unless_refused(functools.partial(peers_ids, peer), messages)
        whole = unless_refused(tokenizer.render, messages)
        assert (whole is None) == (theirs is None)
        if whole is None:
            continue
        assert tokenizer.render(asked) == peers_ids(peer, asked)
        with_header = {"add_generation_prompt": True}
        assert tokenizer.render(asked, **with_header) == peers_ids(peer, asked, **with_header)
        assert whole == theirs[: len(whole)] and whole[-1] in tokenizer.end_ids
        assert set(peer.decode(theirs[len(whole) :]).split()) <= {peer.eos_token}
        check_bos(FAMILIES[name][-1], messages, whole, peer.bos_token_id)
        compared += 1
    assert compared >= NUM_CONVERSATIONS // 2


def check_bos(count, messages, ids, bos):
    if count == "every turn":
        return
    if count == "user turns":
        count = sum(message["role"] == "user" for message in messages)
    assert ids.count(bos) == count
    assert count == 0 or (ids[0] == bos and ids[1] != bos)


def test_prompt_and_answers_of_a_pair_are_the_whole_conversations_up_to_their_end_token(family):
    _, tokenizer, peer = family
    if tokenizer.is_plain:
        pytest.skip("the family has no chat template")
    rows, expected = [], []
    for messages in conversations(seed=1)[:50]:
        answers = ["Yes, it is.", messages[-1]["content"] or "No."]
        whole = [[*messages[:-1], {"role": "assistant", "content": answer}] for answer in answers]
        theirs = [unless_refused(functools.partial(peers_ids, peer), conversation) for conversation in whole]
        if None not in theirs and messages[-2]["content"].strip() and answers[1].strip():
            rows.append(dict(zip(("prompt", "chosen", "rejected"), (messages[:-1], *answers), strict=True)))
            expected.append(theirs)
    pairs, report = tokenize(rows, tokenizer, max_length=100_000)
    assert len(pairs) == len(rows) > 20 and not report.dropped and not report.special
    for pair, theirs in zip(pairs, expected, strict=True):
        for answer, ids in zip((pair.chosen, pair.rejected), theirs, strict=True):
            assert pair.prompt + answer == ids[: len(pair.prompt + answer)]
            assert answer[-1] in tokenizer.end_ids and answer[-2] not in tokenizer.end_ids
            assert set(peer.decode(ids[len(pair.prompt + answer) :]).split()) <= {peer.eos_token}


# Special tokens that a message holds


class ByHand:
    """Cuts a text that holds stand-ins at special tokens; what lies between, with `held` put in, goes to a tokenizer
    that has never heard of them."""

    def __init__(self, tokenizer_json, held):
        content = json.loads(tokenizer_json)
        named = {token["content"]: token for token in content["added_tokens"]}
        self.special = {text: named[text] for text in named if named[text]["special"] or text in ("<s>", "</s>")}
        content["added_tokens"] = [token for text, token in named.items() if text not in self.special]
        self.ids = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab()
        self.first = self.later = tokenizers.Tokenizer.from_str(json.dumps(content))
        if (content["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
            content["pre_tokenizer"]["prepend_scheme"] = "never"
            self.later = tokenizers.Tokenizer.from_str(json.dumps(content))
        self.held = held

    def encode(self, text):
        ids, before = [], None
        for piece in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            if piece in self.special:
                ids.append(self.ids[piece])
                before = self.special[piece]
            else:
                piece = piece.lstrip() if before and before["rstrip"] else piece
                for i, written in enumerate(self.held):
                    piece = piece.replace(stand_in(i), written)
                encoding = (self.later if before else self.first).encode(piece, add_special_tokens=False)
                ids += map(self.ids.get, encoding.tokens)
        return ids


def stand_in(i):
    return chr(0xE100 + i)


SHAPES = ["{} starts it", "it holds {}, and glued{}on", " around\n{}\n", "{}{}", "😀{} ends", "{}"]


def test_special_tokens_in_text_are_text_and_the_templates_are_tokens(family):
    _, tokenizer, peer = family
    held = [token.content for token in peer.added_tokens_decoder.values() if token.special][:12]
    held += [text for text in ("<s>", "</s>", "<|eot_id|>", "<|im_end|>") if text not in held]
    by_hand = ByHand(peer.backend_tokenizer.to_str(), held)
    for start in range(4):
        places = [(stand_in(i % len(held)), held[i % len(held)]) for i in range(5 * start, 5 * start + 12)]
        texts = [
            [shape.format(*[place[kind] for place in places[2 * i : 2 * i + 2]]) for i, shape in enumerate(SHAPES)]
            for kind in (0, 1)
        ]
        with_stand_ins, messages = (chat(*turns) for turns in texts)
        assert any(tokenizer.holds_special(message["content"]) for message in messages)
        if tokenizer.is_plain:
            assert tokenizer.render_text("".join(texts[1])) == by_hand.encode("".join(texts[0]))
            continue
        for options in ({}, {"add_generation_prompt": True}):
            asked = messages[:-1]
            text = peer.apply_chat_template(with_stand_ins[:-1], tokenize=False, **options)
            assert tokenizer.render(asked, **options) == by_hand.encode(text) != peers_ids(peer, asked, **options)
        ids = by_hand.encode(peer.apply_chat_template(with_stand_ins, tokenize=False))
        whole = tokenizer.render(messages)
        assert whole == ids[: len(whole)] and whole[-1] in tokenizer.end_ids
        assert set(peer.decode(ids[len(whole) :]).split()) <= {peer.eos_token}


def test_special_tokens_in_text_are_tokens_where_the_option_says_so(family):
    _, tokenizer, peer = family
    tokenizer = hf_tokenizer(peer.name_or_path, special_tokens_in_text="control", **today_in(peer.chat_template))
    messages = chat(f"{peer.eos_token} starts it", "Yes.", f"it holds {peer.eos_token}")
    if tokenizer.is_plain:
        assert tokenizer.render_text(messages[0]["content"]) == peer(messages[0]["content"])["input_ids"]
    else:
        assert tokenizer.render(messages) == peers_ids(peer, messages)
