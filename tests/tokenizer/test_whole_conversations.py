"""Tools, tool calls, what tools return, and thoughts: with templates of 2025 and 26 that TRL has, token for token as
transformers' apply_chat_template writes them; and which tokens of an answer are the assistant's.

Vocabularies are trained here, with the special tokens that a template names.
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
from test_chat_templates import LLAMA_3_WORDS, SENTENCES, byte_level
from test_data import one, tokenize
from test_tokenizer import CHATML, chat, save
from tokenizers import AddedToken

from pairtune.errors import UserError
from pairtune.pairs.batch import lay_out
from pairtune.tokenizer.hf import hf_tokenizer
from pairtune.tokenizer.template import Refusal

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="trl is not installed")

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = ("gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer", "nemotron_3_nano")
FAMILIES += ("qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_8", "qwen3_vl")
NUM_CONVERSATIONS = 200
# eos of the models, and what their generation_config.json stops at besides
ENDS = {
    "gemma4_v5": ("<turn|>", "<|tool_response>"), "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"), "muse_glimmer": ("<|eot|>",),
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells {what}.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
                "required": ["town"],
            },
        },
    }
    for name, what in (("get_weather", "the weather of a town"), ("get_news", "the news of <b>a town</b>"))
]


@functools.cache
def words():
    return byte_level(LLAMA_3_WORDS).to_str()


def folder_of(name, root, template=None):
    """Writes a vocabulary with the special tokens that the family's template names."""
    template = template or (TEMPLATES / f"{name}.jinja").read_text()
    eos, *stops = ENDS.get(name, ("<|im_end|>",))
    named = re.findall(r"<\|?[A-Za-z_/]\w*\|?>|\[/?[A-Z_]+\]", template)
    backend = tokenizers.Tokenizer.from_str(words())
    special = [AddedToken(text, normalized=False, special="|" in text) for text in dict.fromkeys([*named, eos, *stops])]
    backend.add_tokens(special)
    backend.add_special_tokens(["<|bos|>"])
    ids = [backend.token_to_id(text) for text in (eos, *stops)]
    config = {"bos_token": "<|bos|>", "eos_token": eos, "chat_template": template}
    files = {"generation_config.json": {"eos_token_id": ids}}
    return save(root / name, backend=backend, adds_bos=False, files=files, **config)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its name, our tokenizer, transformers', and its template as TRL marks assistants' turns in it, if it does."""
    folder = folder_of(request.param, tmp_path_factory.mktemp("family"))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    today = {"date": date.today().isoformat()} if "strftime_now" in peer.chat_template else {}
    marked = TEMPLATES / f"{request.param}_training.jinja"
    return request.param, hf_tokenizer(folder, **today), peer, marked.read_text() if marked.is_file() else None


def text(rng):
    """Not empty, and without what ends a thought."""
    return rng.choice([" ", "\n"]).join(s for s in rng.choices(SENTENCES[:14], k=2) if s.strip()) or "x"


def turns(rng, number):
    """What an assistant answers: at times with thoughts, at times after one call or two."""
    answer = []
    for _ in range(number % 3):
        call = {"name": rng.choice(["get_weather", "get_news"]), "arguments": {"town": text(rng), "days": 2}}
        answer.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        answer.append({"role": "tool", "name": call["name"], "content": text(rng)})
    answer.append({"role": "assistant", "content": text(rng)})
    for turn in answer[::2]:
        if number % 2:
            turn["reasoning_content"] = text(rng)
    return answer


def conversations(seed):
    """200 of them: prompt, the better answer's turns, the worse one's, and the tools that there are."""
    rng = random.Random(seed)
    for number in range(NUM_CONVERSATIONS):
        prompt = chat(*(text(rng) for _ in range(rng.choice([1, 1, 3]))), system=text(rng) if number % 4 == 0 else None)
        yield prompt, turns(rng, number), turns(rng, number // 3), TOOLS if number % 6 else None


def unless_refused(render):
    try:
        return render()
    except (Refusal, jinja2.TemplateError, TypeError):
        return None


def test_200_conversations_with_tools_and_thoughts_are_those_of_transformers(family):
    _, tokenizer, peer, _ = family
    compared = 0
    for prompt, better, _, tools in conversations(0):
        for messages, generation in ((prompt, True), ([*prompt, *better], False)):
            options = {"tools": tools, "add_generation_prompt": generation}
            theirs = unless_refused(functools.partial(peer.apply_chat_template, messages, return_dict=False, **options))
            ours = unless_refused(functools.partial(tokenizer.render, messages, **options))
            assert (ours is None) == (theirs is None)
            if ours is not None:
                cut = len(ours) if generation or ours[:-1] != theirs else len(theirs)  # eos, where none is written
                assert ours[:cut] == theirs[:cut] and peer.decode(theirs[cut:]).strip() == ""
                compared += 1
    assert compared > NUM_CONVERSATIONS


def test_every_token_of_the_assistant_is_scored_and_none_of_a_tool(family):
    """Against transformers' mask of the same template as TRL has marked it, who counts headers that are served, too."""
    _, tokenizer, peer, marked = family
    if marked is None:
        pytest.skip("TRL marks no turns in this template")
    compared = 0
    for prompt, better, worse, tools in list(conversations(1))[:25]:
        pairs, _ = unless_dropped({"prompt": prompt, "chosen": better, "rejected": worse, "tools": tools}, tokenizer)
        opened = peer.apply_chat_template(chat("Q"), return_dict=False, add_generation_prompt=True)
        header = opened[len(peer.apply_chat_template(chat("Q"), return_dict=False)) :]
        for pair in pairs:
            sides = (better, pair.chosen, pair.chosen_unscored), (worse, pair.rejected, pair.rejected_unscored)
            for answer, ids, spans in sides:
                options = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": marked}
                theirs = peer.apply_chat_template([*prompt, *answer], tools=tools, **options)
                start, stop = len(pair.prompt), len(pair.prompt + ids) - 1
                if (pair.prompt + ids)[:-1] != theirs["input_ids"][:stop]:
                    continue  # TRL's writes this conversation in another way
                served = {i for _, end in spans for i in range(end - len(header), end)}
                for i, scored in enumerate(theirs["assistant_masks"][start:stop]):
                    if i not in served and peer.decode(ids[i]).strip():
                        assert bool(scored) != any(a <= i < b for a, b in spans), (i, peer.decode(ids[i - 3 : i + 3]))
                compared += bool(spans)
    assert compared > 5


def unless_dropped(row, tokenizer):
    try:
        return tokenize([{name: cell for name, cell in row.items() if cell is not None}], tokenizer)
    except UserError:  # such as an answer whose thoughts the template leaves out
        return [], None


# What goes in comes out, or is named


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = folder_of("qwen3", tmp_path_factory.mktemp("qwen3"))
    return hf_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder), folder


def peers_prompt(peer, messages, **options):
    return peer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True, **options)


CALL = {"function": {"name": "get_weather", "arguments": {"town": "Ulm"}}, "type": "function"}


@pytest.mark.parametrize("columns", [{"tools": TOOLS}, {"tools": json.dumps(TOOLS)},
                                     {"functions": [tool["function"] for tool in TOOLS]}])  # fmt: skip
def test_tools_are_read_from_either_column_and_from_text(qwen3, columns):
    tokenizer, peer, _ = qwen3
    answers = {"chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}], "rejected": "I cannot know."}
    pair, _ = one({"prompt": chat("Q"), **answers, **columns}, tokenizer)
    assert pair.prompt == peers_prompt(peer, chat("Q"), tools=TOOLS)
    whole = peer.apply_chat_template([*chat("Q"), *answers["chosen"]], tools=TOOLS, return_dict=False)
    assert pair.prompt + pair.chosen == whole[: len(pair.prompt + pair.chosen)]


def test_openais_function_call_is_a_tool_call(qwen3):
    tokenizer, _, _ = qwen3
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    new = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    pairs = [one({"prompt": chat("Q"), "chosen": [turn], "rejected": "No."}, tokenizer)[0] for turn in (old, new)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_read_under_each_of_their_names(qwen3, name):
    tokenizer, peer, _ = qwen3
    row = {"prompt": "Q", "chosen": [{"role": "assistant", "content": "B", name: "so"}], "rejected": "W"}
    pair, report = one({**row, "prompt": chat("Q")}, tokenizer)
    assert peer.decode(pair.chosen) == "<think>\nso\n</think>\n\nB<|im_end|>"
    assert report.thoughts == [0] and "with reasoning_content" in str(report)


def test_arguments_of_the_template_are_served_and_trained(qwen3):
    _, peer, folder = qwen3
    row = {"prompt": chat("Q"), "chosen": "B", "rejected": "W"}
    off = hf_tokenizer(folder, template_arguments={"enable_thinking": False})
    expected = peers_prompt(peer, chat("Q"), enable_thinking=False)
    pair, report = one(row, off)
    assert pair.prompt == expected and peer.decode(pair.chosen) == "B<|im_end|>" and not report.opened
    by_row, _ = one({**row, "chat_template_kwargs": {"enable_thinking": False}}, hf_tokenizer(folder))
    assert by_row == pair
    plain, report = one(row, hf_tokenizer(folder))
    assert peer.decode(plain.chosen) == "<think>\n\n</think>\n\nB<|im_end|>" and report.opened == [0]
    assert "the template writes '<think>\\n\\n</think>' before 1 rows' answers" in str(report)
    on = {**row, "chat_template_kwargs": json.dumps({"enable_thinking": True})}
    assert one(on, off)[0] == plain
    with pytest.raises(UserError, match="template_arguments.enable_thoughts: the chat template knows no such argument"):
        hf_tokenizer(folder, template_arguments={"enable_thoughts": False})


def test_text_parts_are_what_a_template_makes_of_them_or_joined(tmp_path, qwen3):
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river."}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [{"role": "assistant", "content": parts[1:]}],
           "rejected": "W"}  # fmt: skip
    joined = {"prompt": chat("Name a river."), "chosen": "a river.", "rejected": "W"}
    for name in ("qwen3_vl", "gemma4_v5", "glm4moe"):  # which read parts
        folder = folder_of(name, tmp_path)
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        assert one(row, hf_tokenizer(folder))[0].prompt == peers_prompt(peer, row["prompt"])
    chatml = hf_tokenizer(save(tmp_path / "chatml", chat_template=CHATML))
    for tokenizer in (chatml, hf_tokenizer(save(tmp_path / "plain"))):
        expected, _ = one({**joined, "prompt": chat("Name a river.")}, tokenizer)
        assert one(row, tokenizer)[0] == expected


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio"])
def test_rows_with_images_are_refused_by_name(qwen3, kind):
    parts = [{"type": kind, kind: "x.png"}, {"type": "text", "text": "What is it?"}]
    good = {"prompt": chat("Q"), "chosen": "B", "rejected": "W"}
    row = {**good, "prompt": [{"role": "user", "content": parts}]}
    what = kind.removesuffix("_url")
    with pytest.raises(UserError, match=rf"row 1 \(from 0\): a message holds an {what}, and pairs are text"):
        tokenize([good, row], qwen3[0])
    with pytest.raises(
        UserError, match=r"row 1 \(from 0\): column 'images' holds texts: rows with images are not read"
    ):
        tokenize([{**good, "images": []}, {**good, "images": ["x.png"]}], qwen3[0])
    pairs, _ = tokenize([{**good, "images": ["x.png"]}], qwen3[0], columns={"images": None})
    assert len(pairs) == 1


def test_an_answer_of_several_turns_is_laid_out_with_the_tools_turn_unscored(qwen3):
    tokenizer, peer, _ = qwen3
    trajectory = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"},
                  {"role": "assistant", "content": "It rains."}]  # fmt: skip
    for row in (
        {"prompt": chat("Q"), "chosen": trajectory, "rejected": "No."},
        {"chosen": [*chat("Q"), *trajectory], "rejected": chat("Q", "No.")},
    ):
        pair, report = one(row, tokenizer)
        assert report.several_turns == [0] and not pair.rejected_unscored
        for score_end in (True, False):
            batch = lay_out([pair], score_end=score_end)
            chosen = batch.target[: batch.answer_lengths[0]].tolist()
            written = peer.decode(chosen)
            assert "<tool_call>" in written and "It rains." in written and "tool_response" not in written
            assert "rain" in peer.decode(pair.chosen).replace("It rains.", "")
            assert written.endswith("<|im_end|>") == score_end
            predicts = batch.tokens.flatten()[batch.source + 1][: batch.answer_lengths[0]].tolist()
            assert predicts == chosen  # the answer that is laid out first


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>U:{{ m.content }}{% else %}<|im_start|>A:"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A:<think>\n{% endif %}"
)


def test_an_answer_that_the_template_cuts_is_refused_and_another_prompt_than_is_served_is_told(tmp_path):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=R1))
    thought = {"prompt": "2+2?", "chosen": "<think>\nby hand\n</think>\n\n4", "rejected": "5"}
    plain = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    words = r"row 1 \(from 0\): the chat template leaves out part of an answer, its thoughts: 'by hand'"
    with pytest.raises(UserError, match=words):
        tokenize([plain, thought], tokenizer)
    pairs, report = tokenize([plain] * 30 + [thought], tokenizer)
    assert len(pairs) == 30 and report.broken.keys() == {30}
    assert report.served_apart == [*range(30)] and not report.merges
    assert "a served prompt goes on with '<think>' where the conversation has '" in str(report)


@pytest.mark.parametrize(
    ("template", "column", "told"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}", "respaced",
         "white space as the"),
        ("{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}", "left_out",
         "does not write all that the prompt's system says"),
    ],
)  # fmt: skip
def test_what_a_template_changes_is_counted(tmp_path, template, column, told):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=template))
    clean = {"prompt": "Q", "chosen": "B", "rejected": "W"}
    _, report = tokenize([clean, {**clean, "chosen": " B\n", "system": "S"}], tokenizer)
    assert getattr(report, column) == [1] and told in str(report)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(CHATML, "the chat template does not write tool descriptions"),
     (None, "refused by the chat template: plain text has no place for tool descriptions")],
)  # fmt: skip
def test_tools_that_are_not_written_drop_a_row_in_words(tmp_path, template, reason):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=template))
    good = {"prompt": chat("Q"), "chosen": "B", "rejected": "W"}
    _, report = tokenize([good, {**good, "tools": TOOLS}], tokenizer)
    assert report.dropped == {reason: [1]}
