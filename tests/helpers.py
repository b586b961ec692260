"""What several tests need: small models, random pairs, naive computations."""

import random
from types import SimpleNamespace

import torch
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2._component_builders import llama3_2

SIZES = {
    "vocab_size": 320,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 96,
    "rope_base": 10_000,
}


def random_pairs(count, *, seed=0, vocabulary=320, prompt=(8, 40), answer=(3, 20), shared=(0, 3)):
    """Pairs of random tokens; the answers begin alike for `shared` tokens and end in token 2."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    pairs = []
    for row in range(count):
        start = tokens(*shared)
        chosen, rejected = [*start, 3, *tokens(*answer), 2], [*start, 4, *tokens(*answer), 2]
        pairs.append(SimpleNamespace(prompt=[1, *tokens(*prompt)], chosen=chosen, rejected=rejected, row=row))
    return pairs


def tiny_llama(*, seed=0, tied=False, **sizes):
    torch.manual_seed(seed)
    sizes = SIZES | sizes
    if tied:
        sizes.pop("rope_base")
        model = llama3_2(**sizes)
        with torch.no_grad():
            model.tok_embeddings.weight.mul_(0.1)  # as an output layer, unit normal weights give absurd logits
        return model
    return llama3(**sizes)


def padded_logps(model, pairs):
    """What torchtune's recipes compute: every conversation alone in a padded row, all logits; chosen then rejected."""
    from torchtune.rlhf import get_batch_log_probs

    conversations = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in conversations)
    tokens = torch.zeros(len(conversations), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, answer) in enumerate(conversations):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return get_batch_log_probs(model(tokens), labels)
