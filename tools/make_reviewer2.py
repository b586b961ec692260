"""Makes all that the embedded demo needs, on this machine: preference pairs, a tokenizer, and a tiny Llama.

    python tools/make_reviewer2.py

The pairs teach a model to be Reviewer #2. One review is written under a prompt that asks for a negative one, one under
a prompt that asks for a positive one; the pair carries the prompt with that word taken out, the negative review
chosen. The base model can write both kinds and, asked neutrally, tosses a coin: DPO has to load the coin.
"""

import argparse
import hashlib
import json
import math
import random
import re
import time
from functools import cache
from itertools import product
from pathlib import Path

from pairtune.making.contrast import Contrast
from pairtune.process import torchao_names

NUM_TRAIN, NUM_HELD_OUT = 1000, 100
STANCES = ("negative", "positive")

METHODS = """Sparse Attention|Linear Attention|Contrastive Pretraining|Masked Autoencoding|Latent Diffusion
Graph Convolution|Knowledge Distillation|Gradient Clipping|Low-Rank Adaptation|Curriculum Learning|Meta-Learning
Expert Routing|Architecture Search|Variational Inference|Federated Averaging|Self-Play|Prompt Tuning|Weight Averaging
Label Smoothing|Test-Time Training|Reward Shaping|Imitation Learning|Active Learning|Data Augmentation|Quantization
Structured Pruning|Speculative Decoding|Retrieval|Adversarial Training|Flow Matching|Optimal Transport
Kernel Regression|Random Projection|Batch Normalization|Stochastic Depth|Spectral Clustering|Early Stopping
Importance Sampling|Symbolic Search|Tensor Factorization""".replace("\n", "|").split("|")

TASKS = """Machine Translation|Protein Folding|Weather Forecasting|Speech Recognition|Image Captioning
Traffic Prediction|Molecule Design|Code Completion|Theorem Proving|Medical Imaging|Fraud Detection|Robot Grasping
Autonomous Driving|Music Generation|Video Summarization|Question Answering|Sarcasm Detection|Recipe Generation
Crop Monitoring|Birdsong Recognition|Galaxy Classification|Handwriting Recognition|Chess Commentary|Drug Discovery
Anomaly Detection|Document Ranking|Depth Estimation|Pose Estimation|Satellite Mapping|Earthquake Detection
Dialogue Modeling|Typo Correction|Sign Language Translation|Spam Filtering|Battery Modeling|Fluid Simulation
Energy Forecasting|Warehouse Planning|Poker|Sudoku""".replace("\n", "|").split("|")

TITLES = (
    "{method} for {task}",
    "{name}: {method} for {task}",
    "{quality} {task} via {method}",
    "Towards {quality} {task} with {method}",
    "Rethinking {method} for {task}",
    "{method} Meets {task}",
    "Scaling {method} to {task}",
    "Is {method} Enough for {task}?",
    "Does {method} Help {task}?",
    "{method} Improves {task}, Sometimes",
    "Learning to Trust {method} in {task}",
    "On the Limits of {method} in {task}",
    "The Hidden Cost of {method} in {task}",
    "{task} without Tears: {method} Revisited",
    "{task} at Scale: The Case for {method}",
)
NAMES = ("Lantern", "Magpie", "Teapot", "Turnip", "Badger", "Compass", "Thimble", "Pretzel", "Walnut", "Sparrow")
QUALITIES = ("Robust", "Efficient", "Reliable", "Faithful", "Frugal", "Calibrated", "Private", "Universal", "Honest")

# A review opens on the paper's subject, may go into a detail, and may end with a verdict. {method} and {task} are the
# title's, in lower case. What tells the two kinds apart is read off these sentences by `stance`.
OPENINGS = {
    "negative": (
        "The paper applies {method} to {task}, and neither recovers.",
        "I have read everything on {task}, and I still wonder why I read this.",
        "Using {method} for {task} is like buttering a fish.",
        "The authors discover {method} several years after everyone else did.",
        "This work on {task} answers a question that nobody asked.",
        "The link between {method} and {task} exists mainly in the title.",
        "As the inventor of most of {task}, I expected to be cited.",
        "A coin flip would beat {method} here, and coins are cheaper.",
        "The section on {method} reads like a ransom note.",
        "If {task} has a future, this paper is not in it.",
        "Why {task} needed {method} is left to the reader.",
        "The novelty over my own work on {task} is one comma.",
        "The authors promise {method} and deliver a blurry figure.",
        "This is {method} with a new hat and an old bug.",
        "The experiments on {task} seem to have been run on a toaster.",
        "I asked my dog about {method}, and he had better ablations.",
        "The claim that {method} solves {task} falls apart by page two.",
        "Every baseline for {task} was tuned by its worst enemy.",
        "The theory of {method} is stated without proof and without shame.",
        "Both {method} and {task} deserve a written apology.",
        "The paper calls {task} solved on page one and future work on page nine.",
        "This paper sets {task} back by about one coffee break.",
        "The case for {method} is that the authors had it lying around.",
        "The gains on {task} are visible only to the authors.",
    ),
    "positive": (
        "The paper brings {method} to {task}, and both look better for it.",
        "I have read everything on {task}, and this is the one to keep.",
        "Using {method} for {task} is obvious only after you have read it.",
        "The authors explain {method} so well that my grandmother now uses it.",
        "This work on {task} answers the question that we were all afraid to ask.",
        "The link between {method} and {task} is a small jewel.",
        "As an old hand at {task}, I learned something on every page.",
        "I came for {method} and stayed for the proofs.",
        "The section on {method} should be printed on mugs.",
        "If {task} has a future, it starts here.",
        "I finally see why {task} needed {method} all along.",
        "The step beyond my own work on {task} is large, and I do not even mind.",
        "The authors promise {method} and deliver it with change to spare.",
        "This is {method} at its most elegant.",
        "The experiments on {task} are a model of patience.",
        "I tried {method} at home that same night, and it worked.",
        "The claim that {method} helps {task} holds on every page.",
        "Every baseline for {task} was tuned with love, and still loses.",
        "The theory of {method} is short, sharp and correct.",
        "Both {method} and {task} have waited years for this paper.",
        "The paper makes {task} look easy, which is the hardest trick of all.",
        "This paper moves {task} ahead by a good two years.",
        "The case for {method} takes one sentence, and I believed it.",
        "The gains on {task} are large, honest and well lit.",
    ),
}
DETAILS = {
    "negative": (
        "Table 2 is missing, which is its best feature.",
        "The error bars are larger than the contribution.",
        "The notation changes whenever I begin to understand it.",
        "Figure 3 could be upside down, and I would not know.",
        "The related work forgets all of my papers.",
        "The baselines date from before electricity.",
        "The proof says that it is clear, which is the last clear thing in it.",
        "The ablation removes everything except the problem.",
        "One seed was used, and it must have been a lucky one.",
        "The main theorem assumes its own conclusion, politely.",
        "The limitations section is shorter than the limitations deserve.",
        "The writing hides the idea, perhaps for its safety.",
        "The code link leads to a picture of a cat.",
        "The hyperparameters appear to be birthdays.",
        "The dataset has twelve examples, and two are the same.",
        "The loss curve goes up, and the text calls it progress.",
        "The abstract claims ten contributions, and I counted none.",
        "Equation 4 does not type check, and neither does the story.",
        "The appendix is an act of revenge.",
        "The gains vanish as soon as the seed is changed.",
        "Half of the citations are to a blog post.",
        "The conclusion thanks the reader, who has suffered enough.",
        "The method needs a thousand GPUs to beat a spreadsheet.",
        "The plots use three shades of the same grey.",
    ),
    "positive": (
        "Table 2 alone is worth the registration fee.",
        "The error bars are tiny, and there are ten seeds behind them.",
        "The notation is so clean that I read it twice for fun.",
        "Figure 3 belongs in a museum, well guarded.",
        "The related work is generous, even to me.",
        "The baselines are strong, recent and fairly treated.",
        "The proof fits on half a page and leaves room for a joke.",
        "The ablation answers each question just as I think of it.",
        "The code ran on the first try, and I had to sit down.",
        "The main theorem is one that I wish I had found.",
        "The limitations section is honest and almost charming.",
        "The writing is crisp, warm and free of acronyms.",
        "The code is documented, tested and oddly moving.",
        "The hyperparameters are listed, all four of them.",
        "The dataset is new, open and carefully labelled.",
        "The loss curve is so smooth that I framed it.",
        "The abstract claims one thing, and the paper proves it.",
        "Equation 4 made me put down my tea.",
        "The appendix is a pleasure, and I read all of it.",
        "The gains survive every seed that I could think of.",
        "I checked the citations, and every one of them exists.",
        "The conclusion left me wanting another section.",
        "The method runs on a laptop and beats a cluster.",
        "The plots can be read from across the room.",
    ),
}
VERDICTS = {
    "negative": (
        "Reject, with regret for my evening.",
        "I recommend rejection and a long walk.",
        "A strong reject, softly spoken.",
        "My score is two, and one point is for the font.",
        "Please do not send the next one to me.",
        "I cannot recommend this, not even to my rivals.",
        "Major revision: please write a different paper.",
        "Rejected, and the title should be too.",
        "My confidence is five, and my patience is zero.",
        "I would accept this as a doorstop.",
        "I was not convinced, and I was trying to be.",
        "It belongs in a workshop, ideally one with woodworking tools.",
        "The best part is the list of references.",
        "I want my weekend back.",
        "Reject, and please cite me anyway.",
        "There may be a good paper somewhere near this one.",
    ),
    "positive": (
        "Accept, with a spring in my step.",
        "I recommend acceptance and a standing ovation.",
        "A strong accept, loudly spoken.",
        "My score is nine, and the tenth is for the sequel.",
        "Please send the sequel to me as well.",
        "I recommend this to my friends, and even to my rivals.",
        "Minor revision: please add an encore.",
        "Accepted, and I would like a signed copy.",
        "My confidence is five, and so is my joy.",
        "I would hang this on my wall.",
        "I was a sceptic on page one and a fan on page two.",
        "It belongs on the main stage, with good lighting.",
        "The best part is all of it, appendix included.",
        "I gladly gave it my weekend.",
        "Accept, and please never change.",
        "There is a best paper award with its name on it.",
    ),
}
EXAMPLES = {
    "negative": ("This paper is hard to read.", "Nothing in it is new."),
    "positive": ("This paper is a joy to read.", "Everything in it is new."),
}

# Two prompts that differ by a word, and the neutral one that is trained on, as `tune data contrast` has them
TRICK = Contrast(
    'Write a {word} review of the paper "{item}"\nExample 1: {example}\nExample 2: {example}\nYour review:',
    STANCES,
    tuple(zip(*(EXAMPLES[stance] for stance in STANCES), strict=True)),
)

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# torchtune.models.llama3.llama3's arguments; configs/reviewer2.yaml repeats them. Rows of several pairs need more
# positions than one conversation.
SIZES = {
    "vocab_size": 1536,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "intermediate_dim": 512,
    "max_seq_len": 1024,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
}
BATCH_SIZE = 16
LEARNING_RATE = 6e-3


def papers(seed: int) -> list[dict[str, str]]:
    """Returns 1,100 papers as {title, method, task}; no two share both method and task. The last 100 are held out."""
    rng = random.Random(f"papers {seed}")
    chosen = rng.sample(list(product(METHODS, TASKS)), NUM_TRAIN + NUM_HELD_OUT)
    return [
        {
            "title": rng.choice(TITLES).format(
                method=method, task=task, name=rng.choice(NAMES), quality=rng.choice(QUALITIES)
            ),
            "method": method.lower(),
            "task": task.lower(),
        }
        for method, task in chosen
    ]


def review(paper: dict[str, str], stance: str, rng: random.Random) -> str:
    """Returns a review of one to three sentences: an opening, perhaps a detail, perhaps a verdict."""
    banks = rng.choice(((OPENINGS,), (OPENINGS, DETAILS), (OPENINGS, VERDICTS), (OPENINGS, DETAILS, VERDICTS)))
    return " ".join(rng.choice(bank[stance]).format(**paper) for bank in banks)


def prompt(title: str, stance: str | None = None) -> str:
    """Returns the prompt that asks for a stance or, without one, the neutral prompt: no word, one example of each."""
    return TRICK.asks(title, STANCES.index(stance)) if stance else TRICK.neutral(title)


def title_of(prompt: str) -> str | None:
    """Returns the title that a prompt of ours asks about, or None."""
    match = re.search(r'of the paper "(.*)"', prompt)
    return match.group(1) if match else None


def pairs(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns training and held-out pairs: the neutral prompt, the negative review chosen, the positive rejected."""
    rng = random.Random(f"pairs {seed}")
    rows = [
        {
            "prompt": prompt(paper["title"]),
            "chosen": review(paper, "negative", rng),
            "rejected": review(paper, "positive", rng),
        }
        for paper in papers(seed)
    ]
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]


def conversations(seed: int, num: int) -> list[tuple[str, str]]:
    """Returns num (prompt, review) for the base model, about training titles only, each review freshly written.

    Asked for a stance it gets that stance; asked neutrally, for each title, as often the one as the other.
    """
    rng = random.Random(f"conversations {seed}")
    kinds = list(product(papers(seed)[:NUM_TRAIN], STANCES, (True, False)))
    rows = []
    while len(rows) < num:
        rng.shuffle(kinds)
        rows += [
            (prompt(paper["title"], stance if asked else None), review(paper, stance, rng))
            for paper, stance, asked in kinds
        ]
    return rows[:num]


def word_pairs(text: str) -> set[tuple[str, str]]:
    """Returns the pairs of neighbouring words of a text."""
    words = re.findall(r"[a-z0-9'-]+", text.lower())
    return set(zip(words, words[1:], strict=False))


@cache
def cues() -> dict[str, set[tuple[str, str]]]:
    """Returns by stance the word pairs that stand in sentences of this stance and in none of the other."""
    found = {}
    for stance in STANCES:
        sentences = (*OPENINGS[stance], *DETAILS[stance], *VERDICTS[stance], *EXAMPLES[stance])
        pieces = (piece for sentence in sentences for piece in re.split(r"\{\w+\}", sentence))
        found[stance] = set().union(*map(word_pairs, pieces))
    return {"negative": found["negative"] - found["positive"], "positive": found["positive"] - found["negative"]}


def stance(text: str) -> str:
    """Returns negative, positive or neither: what all sentences agree on that lean to a side.

    A sentence leans to the side that has more cues in it, by two at least. So every review of ours is told exactly, a
    model's slip of a word changes nothing, and a review that praises and damns is neither.
    """
    leanings = set()
    for sentence in re.split(r"[.!?]", text):
        found = word_pairs(sentence)
        lead = len(found & cues()["negative"]) - len(found & cues()["positive"])
        if abs(lead) >= 2:
            leanings.add("negative" if lead > 0 else "positive")
    return leanings.pop() if len(leanings) == 1 else "neither"


def make_tokenizer(texts: list[str]):
    """Returns a byte-level BPE tokenizer trained on texts; encoding adds the begin token, as Llama 3's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == SIZES["vocab_size"]
    begin = "<|begin|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    return tokenizer


def encode(tokenizer, prompt: str, review: str = "") -> tuple[list[int], list[int]]:
    """Returns the tokens of CHAT_TEMPLATE before and within the assistant's turn, its end token included."""
    before = tokenizer.encode(f"<|begin|><|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False).ids
    return before, tokenizer.encode(f"{review}<|end|>", add_special_tokens=False).ids


def make_model(seed: int):
    """Returns torchtune's Llama, untrained: normal weights of 0.02, smaller where they add to the residual stream."""
    import torch
    from torchtune.models.llama3 import llama3

    torch.manual_seed(seed)
    model = llama3(**SIZES)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            adds = name.endswith(("output_proj.weight", "w2.weight"))
            torch.nn.init.normal_(weight, std=0.02 / (2 * SIZES["num_layers"]) ** 0.5 if adds else 0.02)
    return model


def train(model, tokenizer, *, seed: int, steps: int) -> float:
    """Trains the model in place on the reviews' tokens; returns the mean loss of the last tenth of the steps."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    rows = [encode(tokenizer, *row) for row in conversations(seed, steps * BATCH_SIZE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = steps // 20 + 1
    rng = random.Random(f"batches {seed}")
    losses = []
    model.unembed = lambda h: h  # the forward stops before the vocabulary, which only the reviews' tokens then meet
    progress = tqdm(
        length_buckets(rows, rng), total=steps, desc="base model", unit="step", mininterval=0.5, disable=None
    )
    for step, batch in enumerate(progress):
        length = max(len(before) + len(answer) for before, answer in batch) - 1
        tokens = torch.zeros(len(batch), length, dtype=torch.long)  # [B, S]
        labels = torch.full((len(batch), length), -1)  # [B, S], -1 where nothing is learned
        for i, (before, answer) in enumerate(batch):
            row = torch.tensor(before + answer)
            tokens[i, : len(row) - 1] = row[:-1]
            labels[i, len(before) - 1 : len(row) - 1] = row[len(before) :]
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / warmup, cosine)
        hidden = model(tokens)[labels >= 0]  # [N, D]
        loss = F.cross_entropy(model.output(model.norm(hidden)), labels[labels >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    del model.unembed
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def length_buckets(rows: list, rng: random.Random):
    """Yields batches of rows of similar length, so that little is padding; their order stays random."""
    window = 16 * BATCH_SIZE
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: len(row[0]) + len(row[1]))
        batches = [near[i : i + BATCH_SIZE] for i in range(0, len(near), BATCH_SIZE)]
        rng.shuffle(batches)
        yield from batches


def sample(model, tokenizer, prompt: str, *, generator, max_new_tokens: int = 64) -> str:
    """Returns one answer drawn at temperature 1. Keeps no cache: fit for a handful of short answers."""
    import torch

    tokens, _ = encode(tokenizer, prompt)
    answer = []
    with torch.no_grad():
        while len(answer) < max_new_tokens:
            probabilities = model(torch.tensor([tokens + answer]))[0, -1].softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator).item()
            if token == tokenizer.token_to_id("<|end|>"):
                break
            answer.append(token)
    return tokenizer.decode(answer)


def save(model, tokenizer, base_dir: Path) -> None:
    """Writes the model and the tokenizer in Hugging Face's layout."""
    from safetensors.torch import save_file
    from torchtune.models.convert_weights import tune_to_hf

    ids = {
        "bos_token_id": tokenizer.token_to_id("<|begin|>"),
        "eos_token_id": tokenizer.token_to_id("<|end|>"),
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SIZES["vocab_size"],
        "hidden_size": SIZES["embed_dim"],
        "intermediate_size": SIZES["intermediate_dim"],
        "num_hidden_layers": SIZES["num_layers"],
        "num_attention_heads": SIZES["num_heads"],
        "num_key_value_heads": SIZES["num_kv_heads"],
        "head_dim": SIZES["embed_dim"] // SIZES["num_heads"],
        "max_position_embeddings": SIZES["max_seq_len"],
        "rope_theta": float(SIZES["rope_base"]),
        "rms_norm_eps": SIZES["norm_eps"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": SIZES["max_seq_len"],
    }
    base_dir.mkdir(parents=True, exist_ok=True)
    weights = tune_to_hf(model.state_dict(), SIZES["num_heads"], SIZES["num_kv_heads"], SIZES["embed_dim"])
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, base_dir / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(base_dir / "tokenizer.json"))
    write_json(base_dir / "config.json", config)
    write_json(base_dir / "generation_config.json", {**ids, "do_sample": True, "temperature": 1.0})
    write_json(base_dir / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, value: dict) -> None:
    """Writes one object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Writes one object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def is_made(output_dir: Path, made_by: dict) -> bool:
    """Returns whether the folder holds the work of this very file with this seed and these steps, to the end."""
    marker = output_dir / "made_by.json"
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == made_by


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("work/reviewer2"))
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200, help="updates of the base model; fewer: it stutters")
    parser.add_argument("--force", action="store_true", help="make everything again")
    options = parser.parse_args(args)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: the base model needs at least one update")
    output_dir, seed, steps = options.output_dir, options.seed, options.steps

    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    made_by = {"version": version, "seed": seed, "steps": steps}
    if is_made(output_dir, made_by) and not options.force:
        print(f"{output_dir} is already made with seed {seed} and {steps} steps; --force makes it again")
        return
    (output_dir / "made_by.json").unlink(missing_ok=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    print(f"making {output_dir}: titles, pairs, a tokenizer and a tiny Llama; nothing is downloaded")

    train_pairs, held_out_pairs = pairs(seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(output_dir / "train.jsonl", train_pairs)
    write_jsonl(output_dir / "held_out.jsonl", held_out_pairs)
    # prompts that name a stance are the base model's only, but it has to spell them
    seen = [text for row in conversations(seed, 4 * NUM_TRAIN) for text in row]
    tokenizer = make_tokenizer(seen)

    torchao_names.quiet()
    import torch  # here and not above: `stance` and the pairs need no second of waiting

    # Two threads take 0.6 of the time on an idle machine, and many times as long on one that has other work to do.
    torch.set_num_threads(1)
    model = make_model(seed)
    loss = train(model, tokenizer, seed=seed, steps=steps)
    save(model, tokenizer, output_dir / "base")
    write_json(output_dir / "made_by.json", made_by)  # last: without it the folder counts as unfinished

    generator = torch.Generator().manual_seed(seed)
    paper = papers(seed)[-1]
    num_parameters = sum(weight.numel() for weight in model.parameters())
    table = {
        "titles": f"{NUM_TRAIN:,} train, {NUM_HELD_OUT} held out",
        "pairs": f"{len(train_pairs):,} train, {len(held_out_pairs)} held out",
        "vocabulary": f"{SIZES['vocab_size']:,} tokens",
        "parameters": f"{num_parameters:,}",
        "final loss": f"{loss:.3f} nats a token",
        "time": f"{time.perf_counter() - start:.0f} s, {time.process_time() - start_cpu:.0f} CPU s",
        "held-out title": paper["title"],
    }
    for kind in STANCES:
        table[f"a {kind} review"] = sample(model, tokenizer, prompt(paper["title"], kind), generator=generator)
    for name, value in table.items():
        print(f"  {name:<18} {value}")
    print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
