"""`tune generate` and `tune chat` answer as transformers does, with an adapter and over a base in 4 bits, too."""

import json
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import hf_peers
import pytest
import torch
from helpers import ENVIRONMENT, NF4_SIZES, save_llama
from torch.utils._python_dispatch import TorchDispatchMode

from pairtune import models
from pairtune.cli import asking, main, urial
from pairtune.errors import UserError
from pairtune.models import decoding
from pairtune.models.generation import Sampling
from pairtune.run.samples import show_samples

PROMPTS = ["w5 w9 w100 w41", "w7", "w250 w12 w12 w88 w17 w301 w3 w9"]
NEW = 24
GREEDY = {"max_new_tokens": NEW, "sampling": Sampling(), "rng": torch.Generator()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("ask")
    save_llama(work / "base", sizes=NF4_SIZES)
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return work


def ask(folder, *words):
    """Returns the answers of `tune generate`."""
    output = folder / "answers.jsonl"
    how = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(output), "--max-new-tokens", str(NEW)]
    assert main(["generate", *words, *how, "dtype=fp32", "device=cpu"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    return [row["answer"] for row in rows]


def greedy(peer, folder):
    """Returns transformers' answers, each prompt alone."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        out = peer.generate(**tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=2)
        found.append(tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))
    return found


def test_greedy_answers_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    expected = greedy(peer, folder / "base")
    assert ask(folder, str(folder / "base")) == expected
    assert ask(folder, str(folder / "base"), "--batch-size", "1") == expected
    assert len(set(expected)) == len(expected)


FAMILIES = {  # what their configs have beside the sizes of all; of some, NF4 would hold other matrices than theirs
    "Llama": {}, "Mistral": {"sliding_window": 16}, "Gemma": {"head_dim": 32}, "Qwen2": {},
    "Gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24}, "Qwen3": {"head_dim": 32},
    "Phi3": {"original_max_position_embeddings": 128}, "GPT2": {}, "GPTNeoX": {},
    "Olmo2": {}, "Gemma3Text": {"head_dim": 32, "sliding_window": 16}, "Lfm2": {},
}  # fmt: skip
SPLIT = ("Phi3", "GPT2", "GPTNeoX")
BRIDGED = ("Olmo2", "Gemma3Text", "Lfm2")
COMPILED = "compile=true"
SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Unrecordable(TorchDispatchMode):
    """Counts what a CUDA graph cannot hold: looks at numbers, and tensors made of Python's but single ones."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select")
        self.count += name == "lift_fresh" and args[0].dim() > 0
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_so_are_those_of_each_family_with_an_adapter_over_nf4(tmp_path, name):
    """Token by token, from short and long prompts in one batch, each up to where generation stops; and without both.

    With windows, a convolution's state, learned positions, and, of transformers' classes, a cache of their own.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    peer = hf_peers.save_peer(tmp_path / "base", getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name]))
    if name.startswith(
        "Gemma"
    ):  # whose embeddings, which are the output, too, are so large that a token is followed by itself
        peer.model.embed_tokens.weight.data.mul_(0.2)
        peer.save_pretrained(tmp_path / "base")
    prompts = [[1, 5, 9], [1, *range(3, 63)], [1, *range(40, 60)]]

    def theirs(model, stops):
        return [
            model.generate(
                input_ids=torch.tensor([p]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=stops
            )[0, len(p) :].tolist()
            for p in prompts
        ]

    stop = theirs(peer, None)[1][7]  # a token that comes
    for file in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "base" / file).read_text()) if (tmp_path / "base" / file).exists() else {}
        (tmp_path / "base" / file).write_text(json.dumps(told | {"eos_token_id": [2, stop]}))

    def check(model, adapter=None, base_dtype=None):
        words = ["dtype=fp32", "device=cpu"]
        asked = asking.Model(asking.Asked(tmp_path / "base", adapter, base_dtype, words))
        expected = [[token for token in answer if token not in (2, stop)] for answer in theirs(model, [2, stop])]
        found = ["".join(parts) for parts in zip(*asked.answers(prompts, **GREEDY), strict=True)]
        assert found == [asked.tokenizer.decode(answer) for answer in expected]
        open_compiled = partial(asking.Model, asking.Asked(tmp_path / "base", adapter, base_dtype, [*words, COMPILED]))
        if name in BRIDGED:
            with pytest.raises(UserError, match="compile=true: this model answers by transformers' classes"):
                open_compiled()
        else:  # steps of one shape; a compiler, which takes its time, has only one family
            compiled = open_compiled()
            stance = nullcontext() if name == "Mistral" else torch.compiler.set_stance("force_eager")
            with stance, nullcontext() if name == "Mistral" else Unrecordable() as looked:
                steps = [*compiled.answers(prompts, **GREEDY)]
            assert ["".join(parts) for parts in zip(*steps, strict=True)] == found
            assert looked is None or looked.count < len(steps) - 1  # none in a step: a CUDA graph would not hold it
        return found

    plain = check(peer)
    assert len(plain[1].split()) <= 7
    if name not in SPLIT:
        hf_peers.hold_in_nf4(peer)
    adapted = get_peft_model(peer, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert check(adapted, tmp_path / "adapter", None if name in SPLIT else "nf4") != plain


def test_a_model_whose_steps_are_not_alike_is_not_compiled():
    sizes = {**NF4_SIZES, "_component_": "torchtune.models.llama3.llama3"}
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "modules": ["q_proj"], "use_dora": True}
    dora = models.qlora(sizes, **lora, dtype="fp32")
    experts = {"vocab_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32, "num_experts": 2}
    experts |= {"intermediate_dim": 32, "max_seq_len": 32, "experts_per_token": 1}
    experts = models.full({**experts, "_component_": "pairtune.mixtral.mixtral"}, dtype="fp32")
    for model, said in ((dora, "has DoRA on a base in fewer bits"), (experts, "has experts")):
        with pytest.raises(UserError, match=f"compile=true: this model {said}"):
            decoding.check(model)


def test_an_adapter_of_peft_answers_as_it_does_there(folder):
    """Laid on its base by --adapter, and named alone: its settings say which layers, rank and base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    peer = get_peft_model(peer, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    torch.manual_seed(0)
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(folder / "adapter")
    expected = greedy(peer, folder / "base")
    assert ask(folder, str(folder / "base"), "--adapter", str(folder / "adapter")) == expected
    assert ask(folder, str(folder / "adapter")) == expected != ask(folder, str(folder / "base"))


def test_a_base_in_four_bits_answers_as_its_values_do(folder):
    from transformers import AutoModelForCausalLM

    peer = hf_peers.hold_in_nf4(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32))
    found = ask(folder, str(folder / "base"), "--base-dtype", "nf4")
    assert found == greedy(peer, folder / "base") != ask(folder, str(folder / "base"))


def test_what_is_drawn_depends_on_the_seed_alone(folder):
    drawn = [ask(folder, str(folder / "base"), "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = ask(folder, str(folder / "base"))
    assert ask(folder, str(folder / "base"), "--temperature", "1", "--top-k", "1") == likeliest
    assert ask(folder, str(folder / "base"), "--temperature", "1", "--top-p", "1e-6") == likeliest


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (7, None), (12, 0.6), (None, 0.05)])
def test_tokens_that_may_be_drawn_are_those_of_transformers(top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3)) * 3
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p else expected
    how = Sampling(0.7, top_k, top_p)
    torch.testing.assert_close(how.kept(logits).softmax(-1), expected.softmax(-1))
    rng, row = torch.Generator().manual_seed(0), logits[:1].expand(20_000, -1)
    counts = torch.bincount(how.pick(row, rng), minlength=50) / len(row)
    torch.testing.assert_close(counts, expected[0].softmax(-1), atol=0.015, rtol=0)


# tune compare


def test_models_are_compared_by_the_same_prompts(folder, tmp_path, capsys):
    """One with itself, and another one; URIAL's text before the question changes what a base answers."""
    for name, seed in (("one", 0), ("other", 5)):
        save_llama(tmp_path / name, sizes=NF4_SIZES | {"max_seq_len": 2048}, seed=seed)
    one, other, output = str(tmp_path / "one"), str(tmp_path / "other"), tmp_path / "answers.jsonl"
    how = ["--max-new-tokens", str(NEW), "dtype=fp32", "device=cpu", "--output", str(output)]
    asked = ["--prompts", str(folder / "prompts.jsonl")]
    assert main(["compare", one, other, "--urial", *asked, *how]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row[one] for row in rows] == ask(folder, one) and [row[other] for row in rows] == ask(folder, other)
    changed = sum(row[one] != row[f"{one}, URIAL"] for row in rows)
    assert changed and f"{one}, URIAL: {changed} of 3 answers changed against {one}; " in out
    assert f"{other}: 3 of 3 answers changed" in out and "> w7" in out
    (tmp_path / "again").symlink_to(tmp_path / "one")
    assert main(["compare", one, str(tmp_path / "again"), *asked, *how]) == 0
    assert "again: 0 of 3 answers changed against" in capsys.readouterr().out


def test_the_examples_of_urial_are_not_in_an_answer():
    text = urial.prompt("Why?")
    assert text.count(urial.QUERY) == 4 and text.endswith("Why?\n```\n\n# Answer:\n```")
    for end in ("\n```\n\n# Question:\n```\nMy bread", "\n\n# Question:\nMy", "```", "\n```  \nMy bread", ""):
        assert urial.cut(f"It is so.{end}") == "It is so."
        assert urial.cut(f"Do:\n```sh\nls\n```\nIt is so.{end}") == "Do:\n```sh\nls\n```\nIt is so."
        assert urial.cut(end.strip()) == ""


def test_runs_are_compared_by_what_they_were_told_and_came_to(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, beta, loss in (("a", 0.1, 0.6), ("b", 0.3, 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"output_dir: {name}\nloss: {{beta: {beta}}}\nseed: 1\n")
        held = {"eval/loss": loss, "eval/pairs": 200, "eval/rewards/accuracies": 0.75}
        held["eval/rewards/margins"] = 0.2 if name == "a" else 1e-9  # rounding, which ranks no pair
        log = [{"step": 1, "loss": 0.69, "pairs_per_second": 1.0}, {"step": 1, **held}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert main(["compare", "a", "b", "--runs-only"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["loss.beta", "0.1", "0.3"] in lines and ["held-out", "loss", "0.6", "0.5"] in lines
    assert ["ranked", "rightly", "75.0%", "(68.3%", "to", "80.7%)", "-"] in lines
    assert not any(line[0] in ("seed", "output_dir") for line in lines)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_that_was_not_asked_for_before_has_not_changed(tmp_path, capsys):
    rows = [{"prompt": "a", "before": None, "after": "x"}, {"prompt": "b", "before": "y", "after": "y"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_samples(tmp_path / "samples.jsonl")
    assert "0 of 1 answers changed: the policy barely moved; 1 were not asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "{base}"], "what is asked? --prompt TEXT"),
        (["compare", "{base}", "{base}", "--prompt", "w1"], "is named twice"),
        (["compare", "{base}", "--prompt", "w1", "--judge", "x.y"], "compares models' answers, and one is named"),
        (["compare", "--judge", "x.y", "--prompt", "w1"], "which models?"),
        (["compare", "{base}", "--judge-model", "x"], "--judge-model: has no effect without --judge WHO"),
        (["compare", "--answers", "{base}/config.json"], "is not what --output of `tune compare` writes"),
        (
            ["compare", "--answers", "x", "--judge", "http://h/v1"],
            "told which of its models judges: --judge-model NAME",
        ),
        (["compare", "--answers", "x", "--judge", "nothing"], "there is no such folder; a judge is an endpoint's"),
        (["compare", "--answers", "x", "--judge", "{base}"], "a reward model's is a ...ForSequenceClassification"),
        (["generate", "{base}"], "what is asked? --prompt TEXT"),
        (["generate", "{base}/no", "--prompt", "w1"], "no such folder"),
        (["generate", "{work}", "--prompt", "w1"], "holds no config.json"),
        (["generate", "{base}", "--prompt", "w1", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["generate", "{base}", "--prompt", "w1", "--top-p", "0.9"], "has no effect with --temperature 0"),
        (["generate", "{base}", "--prompts", "{work}/none.txt"], "cannot be read: No such file"),
        (["generate", "{base}", "--prompt", "w1 " * 200, "dtype=fp32"], "leaves no room in the model's 128 positions"),
        (["generate", "{base}", "--prompt", "w1", "--prompt", "w1 " * 200, "dtype=fp32"], "prompt 2 of 2, of "),
        (["generate", "{base}", "--prompt", "w1", "batch_size=3"], "is an option of this command: --batch-size 3"),
        (["compare", "{base}", "--prompt", "w1", "seed=3"], "is an option of this command: --seed 3"),
        (["chat", "{base}", "batch_size=3"], "batch_size=3: has no effect on answers"),
        (["chat", "{base}", "{base}", "{base}"], "3 folders; one or two"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_sentence(folder, capsys, words, said):
    assert main([word.format(work=folder, base=folder / "base") for word in words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def start_chat(folder, *words):
    command = [sys.executable, "-m", "pairtune.cli", "chat", *words, "dtype=fp32", "device=cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, bufsize=1, **pipes)


def test_a_chat_survives_what_people_type_and_a_closed_pipe(folder):
    """Two models side by side; an empty line, one of 100,000 characters, Ctrl-C in an answer, a pipe that closes."""
    base = str(folder / "base")
    chat = start_chat(folder, base, base, "--temperature", "0", "--max-new-tokens", "4")
    out, said = chat.communicate("w5 w9\n\n" + "w7 " * 33_000 + "\n/help\n/new\nw5 w9\n")
    assert chat.returncode == 0 and "Traceback" not in said
    answered = re.findall(rf"{base}:\n(.+)\n\n", out)
    assert len(answered) == 4 and len(set(answered)) == 1  # a conversation that begins anew begins as the first did
    assert said.count("/help: no such command; /new begins anew, /end ends") == 1
    assert said.count("leaves no room in the model's 128 positions; /new begins anew") == 2
    endless = folder / "endless"
    save_llama(endless, sizes=NF4_SIZES | {"max_seq_len": 100_000})
    # Of the likeliest tokens none is an end: the answer goes on however late the signal comes
    chat = start_chat(folder, str(endless), "--temperature", "0", "--max-new-tokens", "90000")
    chat.stdin.write("w5\n")
    assert chat.stdout.read(3)
    chat.send_signal(signal.SIGINT)
    chat.stdin.write("/new\nw5\n")
    assert "..." in chat.stdout.readline()  # of the answer that was ended; the next one begins
    chat.stdout.read(3)
    chat.stdout.close()
    assert chat.wait(60) == 128 + signal.SIGPIPE
    assert "Traceback" not in chat.stderr.read()
