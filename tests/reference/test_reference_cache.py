"""A reference's log-probabilities from the disk are those that it would give now, or an error; never a stale one."""

import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, NF4_SIZES, SIZES, random_pairs, save_llama, save_pairs
from reference_cache_worker import LLAMA, ONE, Reference
from safetensors.torch import save_file

from pairtune import models
from pairtune.cli.commands import main
from pairtune.errors import UserError
from pairtune.folders import digests as file_digests
from pairtune.folders.digests import digest_files
from pairtune.losses.calling import mean_chosen_length, needs, step_losses
from pairtune.losses.modules import LOSSES, build
from pairtune.models.logps import AnswerScores
from pairtune.pairs import tokenize as data
from pairtune.pairs.batch import lay_out
from pairtune.pairs.digests import digest_pair
from pairtune.reference import cache as reference_cache
from pairtune.reference.cache import RECORD, ReferenceCache
from pairtune.tokenizer.hf import hf_tokenizer

WORKER = str(Path(__file__).with_name("reference_cache_worker.py"))
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "mlp"]}
TEMPLATE = "{% for m in messages %}w5 {{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    save_llama(folder, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def truth(base, tmp_path_factory):
    """Values [2, P] of random_pairs(n, seed=1) by pairs alone, without a cache."""
    reference = Reference(tmp_path_factory.mktemp("unused"), base)

    def values(num_pairs):
        alone = [torch.stack(reference.logps([pair])) for pair in random_pairs(num_pairs, seed=1)]
        return torch.cat(alone, 1)

    return values


def values_file(folder):
    (path,) = folder.glob("*/values.bin")
    return path


def worker(*words):
    return subprocess.Popen([sys.executable, WORKER, *map(str, words)], env=ENVIRONMENT)


# Values


def test_cached_values_are_the_live_ones_however_batches_were_put_together(tmp_path, base, truth):
    pairs = random_pairs(30, seed=1)
    cache = Reference(tmp_path, base).fill(tmp_path, pairs, batch_size=7)
    chosen, rejected = cache(pairs)
    assert chosen.shape == rejected.shape == (30,) and chosen.dtype == torch.float32
    torch.testing.assert_close(torch.stack([chosen, rejected]), truth(30), rtol=1e-6, atol=1e-5)
    some = [pairs[3], pairs[17], pairs[3]]
    torch.testing.assert_close(cache(some)[1], rejected[[3, 17, 3]], rtol=0, atol=0)
    assert [tuple(v.shape) for v in cache([])] == [(0,), (0,)]


@pytest.mark.parametrize("ld_alpha", [1.0, 0.5])
def test_every_loss_that_allows_a_cache_has_the_live_references_value(tmp_path, base, ld_alpha):
    """Value and gradients of a step of 8 pairs, laid out together; the cache was filled pair by pair."""
    pairs = random_pairs(8, seed=1)
    reference = Reference(tmp_path, base, ld_alpha=ld_alpha)
    live, cached = reference.logps(pairs), reference.fill(tmp_path, pairs, batch_size=1)(pairs)
    generator = torch.Generator().manual_seed(0)
    policy = [value + torch.randn(8, generator=generator) for value in live]
    batch, known = lay_out(pairs), {"mean_chosen_length": mean_chosen_length(pairs)}
    scores = AnswerScores(*policy, policy[0], torch.full((8,), 0.5), torch.full((8,), 0.8), None)
    tested = 0
    for name in LOSSES:
        options = {"terms": [{"name": "sigmoid", "ld_alpha": ld_alpha}, {"name": "sft"}]} if name == "mixture" else {}
        if "ld_alpha" in inspect.signature(LOSSES[name]).parameters:
            options = {"ld_alpha": ld_alpha}
        loss_fn = build(name, **options)
        if not needs(loss_fn).reference or "kl" in needs(loss_fn).inputs or needs(loss_fn).ld_alpha != ld_alpha:
            continue
        with_live, with_cached = (
            step_losses(loss_fn, [batch], [scores], [values], ONE, **known)[0] for values in (live, cached)
        )
        for what, value in vars(with_live).items():
            torch.testing.assert_close(vars(with_cached)[what], value, rtol=1e-6, atol=1e-5, msg=f"{name}: {what}")
        mean = with_live.losses.mean().item()
        assert with_cached.losses.mean().item() == pytest.approx(mean, rel=1e-6, abs=1e-6), name
        tested += 1
    assert tested >= 15


def test_a_second_run_makes_no_forward_and_gets_the_same_values(tmp_path, base):
    pairs = random_pairs(20, seed=1)
    first, second = Reference(tmp_path, base), Reference(tmp_path, base)
    written = first.fill(tmp_path, pairs)
    assert first.num_forwards == 5
    found = ReferenceCache(tmp_path, second.identity, pairs[::-1], ONE)
    assert found.missing == [] and second.num_forwards == 0
    for one, other in zip(found(pairs), written(pairs), strict=True):
        assert torch.equal(one, other)


def test_only_pairs_that_are_new_are_computed_each_once_the_longest_first(tmp_path, base):
    pairs = random_pairs(20, seed=1)
    reference = Reference(tmp_path, base)
    reference.fill(tmp_path, pairs[:12])
    missing = ReferenceCache(tmp_path, reference.identity, [*pairs, *pairs], ONE).missing
    assert sorted(p.row for p in missing) == list(range(12, 20))
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in missing]
    assert lengths == sorted(lengths, reverse=True)


def test_values_that_are_not_finite_are_refused_and_not_kept(tmp_path, base):
    pairs, reference = random_pairs(3), Reference(tmp_path, base)
    cache = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    cache.put(pairs, torch.tensor([-1.0, float("nan"), -3.0]), torch.zeros(3))
    with pytest.raises(UserError, match="row 1 has log-probabilities .*not finite"):
        cache.complete()
    assert len(ReferenceCache(tmp_path, reference.identity, pairs, ONE).missing) == 3


# What it is found by


def identity(
    folder, base, *, dtype="fp32", quantized=False, modules=("q_proj", "mlp"), sizes=NF4_SIZES, windows=None, **more
):
    component = {"_component_": LLAMA, **sizes}
    lora = LORA | {"modules": list(modules)}
    model = (
        models.lora(component, **lora, dtype=dtype, quantize_base=True)
        if quantized
        else models.full(component, dtype=dtype)
    )
    models.prepare(model, max_length=64, windows=windows)
    files = {"weight_files": sorted(base.glob("*.safetensors"))} | more
    return reference_cache.identify(folder, model, ONE, component=component, **files)


@pytest.fixture
def wide(tmp_path):
    """A model whose matrices NF4 can cut."""
    save_llama(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"ld_alpha": 0.5},
        {"quantized": True},
        {"windows": [None, 8, 8]},
        {"sizes": NF4_SIZES | {"rope_base": 500_000}},
        {"adapter_files": ["adapter.safetensors"]},
    ],
)
def test_what_changes_a_log_probability_misses(tmp_path, wide, change):
    if "adapter_files" in change:
        save_file({"lora_a": torch.ones(2)}, tmp_path / "adapter.safetensors")
        change = {"adapter_files": [tmp_path / "adapter.safetensors"]}
    assert identity(tmp_path, wide).key != identity(tmp_path, wide, **change).key


def test_another_starting_adapter_under_the_same_name_misses(tmp_path, wide):
    path, keys = tmp_path / "adapter.safetensors", set()
    for value in (1.0, 2.0):
        save_file({"lora_a": torch.full((2,), value)}, path)
        keys.add(identity(tmp_path, wide, adapter_files=[path]).key)
    assert len(keys) == 2


def test_the_scale_of_a_starting_adapter_is_part_of_the_key_and_of_a_fresh_one_is_not(tmp_path, wide):
    path, component = tmp_path / "adapter.safetensors", {"_component_": LLAMA, **NF4_SIZES}
    save_file({"lora_a": torch.ones(2)}, path)
    for adapter_files, num_keys in (([path], 2), ([], 1)):
        files = {"weight_files": [wide / "model.safetensors"], "adapter_files": adapter_files}
        adapted = [models.lora(component, **LORA | {"alpha": alpha}, dtype="fp32") for alpha in (8.0, 16.0)]
        found = [reference_cache.identify(tmp_path, model, ONE, component=component, **files) for model in adapted]
        assert len({identity.key for identity in found}) == num_keys


def test_activation_checkpointing_changes_no_key(tmp_path, wide):
    component, files = {"_component_": LLAMA, **NF4_SIZES}, {"weight_files": [wide / "model.safetensors"]}
    keys = set()
    for checkpointed in (False, True):
        model = models.lora(component, **LORA, dtype="fp32", quantize_base=True)
        models.prepare(model, max_length=64, checkpoint_activations=checkpointed)
        keys.add(reference_cache.identify(tmp_path, model, ONE, component=component, **files).key)
    assert len(keys) == 1


def test_a_model_in_4_bits_shares_an_entry_with_the_base_of_qlora_and_not_with_itself_in_another_dtype(tmp_path, wide):
    component, files = {"_component_": LLAMA, **NF4_SIZES}, {"weight_files": [wide / "model.safetensors"]}

    def key(dtype):
        model = models.full(component, dtype=dtype, quantize=True)
        return reference_cache.identify(tmp_path, model, ONE, component=component, **files).key

    assert key("fp32") == identity(tmp_path, wide, quantized=True).key != key("bf16")


def test_a_base_in_8_bits_has_entries_of_its_own(tmp_path, wide):
    component, files = {"_component_": LLAMA, **NF4_SIZES}, {"weight_files": [wide / "model.safetensors"]}
    keys = set()
    for base_dtype in ("nf4", "int8", "fp8"):
        model = models.lora(component, **LORA, dtype="fp32", quantize_base=True, base_dtype=base_dtype)
        identity = reference_cache.identify(tmp_path, model, ONE, component=component, **files)
        keys.add(identity.key)
        pairs, values = random_pairs(3), torch.tensor([-3.0, -4.0, -5.0])
        writer = ReferenceCache(tmp_path, identity, pairs, ONE)
        writer.put(pairs, values, values)
        writer.complete()
        found = ReferenceCache(tmp_path, identity, pairs, ONE)
        found.check(pairs, values, values)
        with pytest.raises(UserError, match="row 0: chosen"):
            found.check(pairs, values + 1, values)
    assert len(keys) == 3


def test_other_weights_under_the_same_name_of_the_same_size_and_time_miss(tmp_path, wide):
    path = wide / "model.safetensors"
    time.sleep(2.1)  # until a file's digest is remembered
    before, state = identity(tmp_path, wide).key, path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:  # in place: not even the inode tells
        file.write(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identity(tmp_path, wide).key != before


def test_a_weight_file_that_has_not_changed_is_not_read_again(tmp_path, wide):
    time.sleep(2.1)
    before = identity(tmp_path, wide).key
    memo = json.loads((tmp_path / "weights.json").read_text())
    ((path, state),) = memo.items()
    assert path == str((wide / "model.safetensors").resolve())
    (tmp_path / "weights.json").write_text(json.dumps({path: [*state[:-1], "as remembered"]}))
    assert identity(tmp_path, wide).key != before  # so it was not read
    (tmp_path / "weights.json").write_text("{ damaged")
    assert identity(tmp_path, wide).key == before


def test_large_files_are_hashed_whole_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "BLOCK_BYTES", 1000)
    path, digests = tmp_path / "weights", set()
    for changed in (None, 0, 999, 1000, 2499):
        content = bytearray(2500)
        if changed is not None:
            content[changed] = 1
        path.write_bytes(content)
        digests.update(digest_files(tmp_path, [path]))
    assert len(digests) == 5


def test_names_do_not_matter(tmp_path, wide):
    key = identity(tmp_path, wide).key
    (wide / "model.safetensors").rename(wide / "model.safetensors")
    moved = wide.rename(tmp_path / "moved")
    assert identity(tmp_path, moved).key == key


def test_full_and_lora_share_an_entry_since_their_reference_is_one_model(tmp_path, base):
    pairs = random_pairs(6, seed=1)
    Reference(tmp_path, base).fill(tmp_path, pairs)
    lora = Reference(tmp_path, base, lora=LORA)
    cache = ReferenceCache(tmp_path, lora.identity, pairs, ONE)
    assert cache.missing == []
    with models.reference_of(lora.model):
        cache.check(pairs, *lora.logps(pairs))


@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]])
def test_what_of_a_model_is_quantized_is_part_of_the_key(tmp_path, wide, modules):
    """Qwen 2's builder quantizes what has an adapter, Llama's everything: the built model tells."""
    found = identity(tmp_path, wide, quantized=True, modules=modules)
    assert len(found.content["quantized"]) == 7 * NF4_SIZES["num_layers"]


def read_pairs(base, source, *, template=None, **limits):
    unset = dict.fromkeys(("name", "revision", "limit"))
    settings = unset | {"source": str(source), "split": "train", "columns": {}, "overlong": "trim_prompt"}
    settings |= {"on_bad_row": "drop", "rejected": "all"}
    pairs, _ = data.read_pairs(settings, hf_tokenizer(str(base), template), **{"max_length": 96} | limits)
    return pairs


@pytest.mark.parametrize("change", [{"max_prompt_length": 12}, {"template": TEMPLATE}])
def test_pairs_that_are_tokenized_otherwise_miss(tmp_path, base, change):
    save_pairs(tmp_path / "pairs.jsonl", random_pairs(8, seed=1, prompt=(20, 30)))
    limits = {"max_prompt_length": 64}
    reference = Reference(tmp_path / "cache", base)
    pairs = read_pairs(base, tmp_path / "pairs.jsonl", **limits)
    reference.fill(tmp_path / "cache", pairs)
    again = read_pairs(base, tmp_path / "pairs.jsonl", **limits)
    assert ReferenceCache(tmp_path / "cache", reference.identity, again, ONE).missing == []
    changed = read_pairs(base, tmp_path / "pairs.jsonl", **limits | change)
    assert len(ReferenceCache(tmp_path / "cache", reference.identity, changed, ONE).missing) == len(changed) == 8


def test_tokens_that_move_between_prompt_and_answers_are_another_pair():
    first, second = random_pairs(2)
    moved = type(first)(prompt=first.prompt + first.chosen[:1], chosen=first.chosen[1:], rejected=first.rejected)
    swapped = type(first)(prompt=first.prompt, chosen=first.rejected, rejected=first.chosen)
    assert len({digest_pair(pair) for pair in (first, second, moved, swapped)}) == 4


# Interrupted, side by side, distributed


def test_a_build_that_is_killed_goes_on_and_never_yields_a_wrong_value(tmp_path, base, truth):
    """SIGKILL as soon as the file has grown, several times; then one run to the end."""
    num_pairs, folder, left = 400, tmp_path / "cache", []
    expected, pairs = truth(num_pairs), random_pairs(num_pairs, seed=1)
    reference = Reference(folder, base)
    for kill in range(3):
        process, size = worker(folder, base, num_pairs), sum(p.stat().st_size for p in folder.glob("*/values.bin"))
        while process.poll() is None and sum(p.stat().st_size for p in folder.glob("*/values.bin")) <= size:
            time.sleep(0.001)
        time.sleep(0.02 * kill)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        cache = ReferenceCache(folder, reference.identity, pairs, ONE)
        missing = {pair.row for pair in cache.missing}
        there = [i for i in range(num_pairs) if i not in missing]
        torch.testing.assert_close(
            torch.stack(cache([pairs[i] for i in there])), expected[:, there], rtol=1e-6, atol=1e-5
        )
        left.append(len(missing))
    assert num_pairs > left[0] > left[1] > left[2] > 0
    output = tmp_path / "output"
    assert worker(folder, base, num_pairs, output).wait() == 0
    result = json.loads(Path(f"{output}.0").read_text())
    assert result["forwards"] == left[-1]
    torch.testing.assert_close(torch.tensor(result["values"]), expected, rtol=1e-6, atol=1e-5)


def test_a_file_cut_at_any_byte_lacks_values_and_has_no_wrong_one(tmp_path, base):
    pairs, reference = random_pairs(5, seed=1), Reference(tmp_path, base)
    complete = reference.fill(tmp_path, pairs)
    path, whole = values_file(tmp_path), values_file(tmp_path).read_bytes()
    assert len(whole) == 5 * RECORD.size
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        cache = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
        assert len(cache.missing) == 5 - size // RECORD.size
        cache.put(cache.missing, *complete(cache.missing))
        cache.complete()
        assert sorted(records(path)) == sorted(records(path, whole))
        for one, other in zip(cache(pairs), complete(pairs), strict=True):
            assert torch.equal(one, other)


def records(path, content=None):
    content = path.read_bytes() if content is None else content
    return [content[i : i + RECORD.size] for i in range(0, len(content), RECORD.size)]


@pytest.mark.parametrize("tail", [bytes(3 * RECORD.size), b"\xff" * 50])
def test_what_a_power_cut_leaves_at_the_end_is_taken_off(tmp_path, base, tail):
    pairs, reference = random_pairs(6, seed=1), Reference(tmp_path, base)
    reference.fill(tmp_path, pairs[:4])
    with values_file(tmp_path).open("ab") as file:
        file.write(tail)
    cache = reference.fill(tmp_path, pairs)
    assert values_file(tmp_path).stat().st_size == 6 * RECORD.size
    cache.check(pairs, *reference.logps(pairs))


def test_two_processes_may_fill_one_entry_at_once(tmp_path, base, truth):
    folder, num_pairs = tmp_path / "cache", 200
    processes = [worker(folder, base, num_pairs, tmp_path / f"output-{n}") for n in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"output-{n}.0").read_text()) for n in range(2)]
    for result in results:
        torch.testing.assert_close(torch.tensor(result["values"]), truth(num_pairs), rtol=1e-6, atol=1e-5)
    reference = Reference(folder, base)
    cache = ReferenceCache(folder, reference.identity, random_pairs(num_pairs, seed=1), ONE)
    assert cache.missing == []
    stored = torch.stack(cache(random_pairs(num_pairs, seed=1))).tolist()
    assert [result["values"] for result in results] == [stored, stored]


def append_one_by_one(folder, found, first):
    for n in range(first, first + 100):
        reference_cache.append(folder, found, {n.to_bytes(16): (float(n), -float(n))})


def test_no_record_is_lost_or_torn_where_many_processes_append_and_one_reads(tmp_path, wide):
    found = identity(tmp_path, wide)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_one_by_one, args=(tmp_path, found, 100 * n)) for n in range(4)]
    for process in processes:
        process.start()
    sizes = set()
    while any(process.is_alive() for process in processes):
        values = reference_cache.read(tmp_path, found.key)
        assert all(value == (float(n), -float(n)) for n, value in ((int.from_bytes(d), v) for d, v in values.items()))
        sizes.add(len(values))
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(reference_cache.read(tmp_path, found.key)) == 400 and len(sizes) > 2


def test_of_two_values_for_a_pair_the_first_stays_also_in_the_run_that_wrote_the_second(tmp_path, base):
    pairs, reference = random_pairs(2), Reference(tmp_path, base)
    slow, fast = (ReferenceCache(tmp_path, reference.identity, pairs, ONE) for _ in range(2))
    fast.put(pairs, torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
    fast.complete()
    slow.put(pairs, torch.tensor([-1.001, -2.0]), torch.tensor([-3.0, -4.0]))
    slow.complete()
    for cache in (slow, fast, ReferenceCache(tmp_path, reference.identity, pairs, ONE)):
        assert cache(pairs)[0].tolist() == [-1.0, -2.0]


def test_two_processes_of_one_run_without_a_common_disk_end_with_the_table_of_one(tmp_path, base, truth):
    """75 pairs: the last micro-batch of rank 1 is empty, and the flush is not at the end of the pass."""
    folder, output = tmp_path / "cache", tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", WORKER]
    for expected_forwards in (38, 0):  # the second time all is there
        done = subprocess.run([*command, str(folder), str(base), "75", str(output)], env=ENVIRONMENT, timeout=600)
        assert done.returncode == 0
        results = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(2)]
        assert results[0]["values"] == results[1]["values"]
        assert [result["forwards"] for result in results] == [expected_forwards] * 2
        torch.testing.assert_close(torch.tensor(results[0]["values"]), truth(75), rtol=1e-6, atol=1e-5)
    assert not Path(f"{folder}-of-another-machine").exists()
    alone = Reference(folder, base)
    cache = ReferenceCache(folder, alone.identity, random_pairs(75, seed=1), ONE)
    assert cache.missing == []
    assert torch.stack(cache(random_pairs(75, seed=1))).tolist() == results[0]["values"]


# What is wrong with it is told


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path, base, monkeypatch):
    pairs, reference = random_pairs(5), Reference(tmp_path, base)
    reference.fill(tmp_path, pairs)
    key = reference.identity.key
    content = bytearray(values_file(tmp_path).read_bytes())
    content[2 * RECORD.size + 17] ^= 1  # a bit of the third pair's value
    values_file(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=f"record 2 is damaged: `tune cache rm {key} --cache-dir {tmp_path}`"):
        ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    monkeypatch.setattr(reference_cache, "find_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=f"`tune cache rm {key}` removes the entry"):
        ReferenceCache(tmp_path, reference.identity, pairs, ONE)


def test_records_of_another_entry_are_no_values(tmp_path, base):
    pairs, one, other = random_pairs(3), Reference(tmp_path, base), Reference(tmp_path, base, ld_alpha=0.5)
    one.fill(tmp_path, pairs)
    (tmp_path / one.identity.key).rename(tmp_path / other.identity.key)
    assert len(ReferenceCache(tmp_path, other.identity, pairs, ONE).missing) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_spot_check_passes_true_values_however_attention_is_computed(tmp_path, base, dtype):
    pairs = random_pairs(24, seed=1)
    Reference(tmp_path, base, dtype=dtype, attention="segments").fill(tmp_path, pairs)
    reference = Reference(tmp_path, base, dtype=dtype, attention="mask")
    cache = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    assert cache.missing == [] and len(cache.samples(8)) == 8 and len(cache.samples(100)) == 24
    sampled = cache.samples(24)
    cache.check(sampled, *reference.logps(sampled))


@pytest.mark.parametrize(("dtype", "by"), [("fp32", 0.1), ("bf16", 5.0)])
def test_a_spot_check_catches_a_value_that_is_not_of_this_reference(tmp_path, base, dtype, by):
    pairs, reference = random_pairs(6), Reference(tmp_path, base, dtype=dtype)
    writer = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    chosen, rejected = reference.logps(pairs)
    writer.put(pairs, chosen, rejected + torch.tensor([0, 0, 0, 0, by, 0]))
    writer.complete()
    cache = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    cache.check(pairs[:4], *reference.logps(pairs[:4]))
    key = reference.identity.key
    with pytest.raises(UserError, match=f"(?s)row 4: rejected .*`tune cache rm {key} .*computes it anew"):
        cache.check(pairs, *reference.logps(pairs))


def test_only_values_of_earlier_runs_are_sampled_and_others_each_time(tmp_path, base):
    pairs, reference = random_pairs(40), Reference(tmp_path, base)
    assert reference.fill(tmp_path, pairs[:30]).samples(8) == []
    cache = reference.fill(tmp_path, pairs)
    seen = {pair.row for _ in range(40) for pair in cache.samples(8)}
    assert len(seen) > 8 and max(seen) < 30


def test_a_folder_that_cannot_be_written_is_refused_before_the_pass(tmp_path, base):
    reference = Reference(tmp_path, base)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="reference.cache_dir: .*file.*name a folder with room"):
        ReferenceCache(tmp_path / "file", reference.identity, random_pairs(2), ONE)


# tune cache


def test_tune_cache_lists_entries_and_removes_them(tmp_path, base, capsys):
    pairs, folder = random_pairs(7), tmp_path / "cache"
    keys = []
    for dtype in ("fp32", "bf16"):
        reference = Reference(folder, base, dtype=dtype)
        reference.fill(folder, pairs)
        keys.append(reference.identity.key)
    option = ["--cache-dir", str(folder)]
    assert main(["cache", "ls", *option]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(keys))]
    assert len(lines) == 2
    assert all(str(base) in line and line.split()[1] == "7" for line in lines)
    assert {"(float32)", "(bfloat16)"} == {line.split()[-1] for line in lines}
    assert main(["cache", "rm", keys[0], *option]) == 0
    assert not (folder / keys[0]).exists() and (folder / keys[1]).exists()
    assert main(["cache", "rm", keys[0], *option]) == 2
    assert "no such entry" in capsys.readouterr().err
    assert main(["cache", "rm", *option]) == 2
    assert main(["cache", "rm", "--all", *option]) == 0
    assert main(["cache", "ls", *option]) == 0
    assert "holds no entry" in capsys.readouterr().out


def test_tune_cache_ls_shows_a_damaged_entry_and_rm_removes_it(tmp_path, base, capsys):
    reference = Reference(tmp_path, base)
    reference.fill(tmp_path, random_pairs(5))
    content = bytearray(values_file(tmp_path).read_bytes())
    content[0] ^= 1
    values_file(tmp_path).write_bytes(content)
    assert main(["cache", "ls", "--cache-dir", str(tmp_path)]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["cache", "rm", reference.identity.key, "--cache-dir", str(tmp_path)]) == 0
    assert len(ReferenceCache(tmp_path, reference.identity, random_pairs(5), ONE).missing) == 5


def test_removing_an_entry_while_it_is_filled_harms_nobody(tmp_path, base, truth):
    pairs, reference = random_pairs(6, seed=1), Reference(tmp_path, base)
    cache = ReferenceCache(tmp_path, reference.identity, pairs, ONE)
    cache.put(pairs[:3], *reference.logps(pairs[:3]))
    reference_cache.remove(tmp_path, [])
    cache.put(pairs[3:], *reference.logps(pairs[3:]))
    cache.complete()
    torch.testing.assert_close(torch.stack(cache(pairs)), truth(6), rtol=1e-6, atol=1e-5)


def test_the_folder_is_the_configs_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert reference_cache.find_folder() == Path.home() / ".cache" / "pairtune" / "reference"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference_cache.find_folder(None) == tmp_path / "pairtune" / "reference"
    assert reference_cache.find_folder("~/mine") == Path.home() / "mine"
