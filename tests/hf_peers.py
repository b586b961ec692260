"""Random models of transformers, and what ours must compute as they do; imports transformers and peft when called."""

import json
import subprocess
import sys

import torch
from helpers import ROOT, from_first_step, random_pairs, run_config, run_recipe, save_pairs, save_tokenizer
from safetensors.torch import load_file
from torchtune.modules.peft import LoRALinear
from torchtune.rlhf import get_batch_log_probs

from pairtune import models
from pairtune.folders import peft as adapters
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import windows
from pairtune.folders.export import export
from pairtune.folders.opening import check_model
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))


def save_peer(folder, config, *, seed=0):
    """Writes a model of this transformers config with a tokenizer of numbered words; biases and norms random, too."""
    torch.manual_seed(seed)
    peer = auto_class(config).from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    peer.save_pretrained(folder)
    save_tokenizer(folder, config.get_text_config().vocab_size)
    return peer


def auto_class(config):
    """What transformers opens such a folder with: whole, where it is a text model with one of images around it."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForMultimodalLM


def load_peer(folder, adapter=None):
    """Returns the folder's model in float32, as transformers reads it, with PEFT's adapter of another folder.

    Its attention is the plain one: transformers' other ones leave out Gemma 2's cap on scores.
    """
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(folder))
    peer = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is None:
        return peer
    from peft import PeftModel

    return PeftModel.from_pretrained(peer, adapter).eval()


@torch.no_grad()
def hold_in_nf4(peer):
    """Rounds the weights of linear layers but the output to what NF4 holds of them; returns the model."""
    from torchao.dtypes.nf4tensor import to_nf4

    for module in peer.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(to_nf4(module.weight.float()).get_original_weight())
    return peer


def padded(pairs):
    """Returns tokens [2 P, S] of every conversation in a row, chosen answers first, and labels, -100 but in answers."""
    conversations = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in conversations)
    tokens = torch.zeros(len(conversations), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, answer) in enumerate(conversations):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return tokens, labels


def peer_logps(peer, pairs):
    """Every conversation alone in a padded row, all logits: chosen answers' sums, then rejected ones', [2 P]."""
    tokens, labels = padded(pairs)
    return get_batch_log_probs(peer(tokens).logits, labels)


def open_folder(folder, model_type, component=None):
    checkpointer = "torchtune.training.FullModelHFCheckpointer"
    block = {"_component_": checkpointer, "checkpoint_dir": str(folder), "model_type": model_type}
    return checkpoint.open_weights(block, component)


def load_ours(files, component, *, lora=None, adapter=None, **options):
    """Returns our model of a folder, checked against its config.json, ready to score pairs.

    Args:
        lora: rank, alpha and modules; its adapters are random on both sides unless `adapter` names a folder of one.
        options: Of models.prepare.
    """
    model = models.full(component, dtype="fp32")
    if lora:
        model = models.lora(component, dropout=0.0, dtype="fp32", **lora)
    models.prepare(model, max_length=64, windows=windows(files.config, len(model.layers)), **options)
    check_model(model, files.config)
    start = adapters.read_adapter(adapter, model, files) if adapter else None
    models.load(model, checkpoint.Weights(files), world=ONE, adapter=start)
    if not adapter:
        for module in model.modules():
            if isinstance(module, LoRALinear):
                torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    return model


def our_logps(model, pairs):
    return torch.cat(answer_logps(model, lay_out(pairs)))


def check_logps_and_gradients(peer, model, files):
    """Log-probabilities of pairs to 1e-5, every parameter's gradient to 1e-4 of its norm."""
    pairs, upstream = random_pairs(4), torch.randn(8)
    expected = peer_logps(peer, pairs)
    (expected * upstream).sum().backward()
    values = our_logps(model, pairs)
    (values * upstream).sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    wanted = {}
    for name, parameter in peer.named_parameters():
        if parameter.grad is not None:  # of a tower for images it is
            wanted |= files.family.to_ours(name, parameter.grad, files.config)
    gradients = {models.plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in gradients.items():
        # A key's bias moves all scores of a query alike, which a softmax does not see: its gradient is rounding.
        if not name.endswith("k_proj.bias"):
            assert (gradient - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name
        else:
            assert (gradient - wanted[name]).norm() < 1e-5 * largest, name


@torch.no_grad()
def check_export(files, model, folder, *, lora=None):
    """Merged weights in transformers, the adapter in PEFT, and PEFT's own merge: all compute what the model does."""
    weights, pairs = models.gather_weights(model, ONE), random_pairs(4)
    merged, adapter = models.merge_adapters(model, weights), models.only_adapters(model, weights)
    exported = export(files, folder, merged=merged, adapter=adapter, lora=lora and {**lora, "dropout": 0.0})
    expected = our_logps(model, pairs)
    torch.testing.assert_close(peer_logps(load_peer(exported), pairs), expected, rtol=1e-5, atol=0)
    if lora:
        adapted = load_peer(files.path, exported / "adapter")
        torch.testing.assert_close(peer_logps(adapted, pairs), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(peer_logps(adapted.merge_and_unload(), pairs), expected, rtol=1e-5, atol=0)
        base = peer_logps(load_peer(files.path), pairs)
        assert (expected - base).abs().max() > 0.1, "the adapter changes something"
    return exported


@torch.no_grad()
def check_peft_adapter(files, component, folder, *, targets, modules):
    """An adapter that PEFT wrote computes here what it does there."""
    from peft import LoraConfig, get_peft_model

    conv1d = any(module.transposed for module in files.family.modules)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=conv1d, task_type="CAUSAL_LM")
    peer = get_peft_model(load_peer(files.path), settings).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    peer.save_pretrained(folder)
    pairs = random_pairs(4)
    model = load_ours(files, component, lora={"rank": 4, "alpha": 8.0, "modules": modules}, adapter=folder)
    expected = peer_logps(peer, pairs)
    torch.testing.assert_close(our_logps(model, pairs), expected, rtol=1e-5, atol=0)
    assert (expected - peer_logps(load_peer(files.path), pairs)).abs().max() > 0.1, "the adapter changes something"


def write_config(folder, component, model_type, **changes):
    """Writes train.jsonl, held_out.jsonl and config.yaml of two steps of training beside folder/base."""
    save_pairs(folder / "train.jsonl", random_pairs(8, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(2, seed=2))
    checkpointer = {"checkpoint_dir": str(folder / "base"), "model_type": model_type}
    changes = {
        "pairs_per_step": 4,
        "batch_size": 2,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
        "per_method": {"full": {"optimizer": {"lr": 1e-3}}},
        "samples": {"num_prompts": 2, "max_new_tokens": 5},
        **changes,
    }
    (folder / "config.yaml").write_text(
        json.dumps(run_config(folder) | {"model": component, "checkpointer": checkpointer} | changes)
    )


def check_run(folder, method):
    """Two steps of a recipe train, and its exports have the log-probabilities that it last measured, held out.

    PEFT merges the adapter of a LoRA run into the weights that were exported.
    """
    as_trained = ["merge_into=dequantized"] if method == "qlora" else []
    log = run_recipe(f"{method}_dpo_single_device", *as_trained, config_paths=[folder / "config.yaml"])
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    (evaluation,) = [row for row in log if "eval/loss" in row]
    exported = folder / "run" / "export"
    peers = {"merged": load_peer(exported)}
    if method == "lora":  # a QLoRA adapter belongs to the 4-bit base
        peers["adapter"] = load_peer(folder / "base", exported / "adapter")
    pairs = random_pairs(2, seed=2)
    for name, peer in peers.items():
        with torch.no_grad():
            chosen, rejected = peer_logps(peer, pairs).chunk(2)
        measured = torch.tensor([evaluation["eval/logps/chosen"], evaluation["eval/logps/rejected"]])
        torch.testing.assert_close(torch.stack([chosen.mean(), rejected.mean()]), measured, rtol=1e-5, atol=0, msg=name)
    if method == "lora":
        merged, expected = peers["adapter"].merge_and_unload().state_dict(), peers["merged"].state_dict()
        assert merged.keys() == expected.keys()
        for name, weight in merged.items():
            torch.testing.assert_close(expected[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    started = load_file(folder / "base" / "model.safetensors")
    trained = load_file(exported / "model.safetensors")
    assert any(not torch.equal(trained[name], started[name]) for name in trained)


def check_two_processes(folder, method):
    """Sharded over two processes, a run logs what one process logs and exports the same weights."""
    alone = run_recipe(
        f"{method}_dpo_single_device", f"output_dir={folder / 'alone'}", config_paths=[folder / "config.yaml"]
    )
    recipe = str(ROOT / "recipes" / f"{method}_dpo_distributed.py")
    command = [sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", "2", recipe]
    arguments = ["--config", str(folder / "config.yaml"), f"output_dir={folder / 'two'}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shared = from_first_step(folder / "two" / "metrics.jsonl")
    for one, other in zip(alone, shared, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "eval/loss", "eval/logps/rejected"):
            if key in one:
                torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
    weights = [load_file(folder / name / "export" / "model.safetensors") for name in ("alone", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-3, msg=name)
