"""A judge that is a reward model's folder: transformers' sequence classification with one label."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.making.judge.question import Question, Said
from pairtune.process import console

BATCH_TOKENS = 8192  # of a batch, padding included


class RewardModel:
    """Scores an answer behind its prompt: by the chat template where there is one, else as a pair of texts."""

    compares = False

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: It is no reward model, or transformers is not installed.
        """
        self.name, self._folder = str(folder), folder
        config = read_object(folder / "config.json")
        kinds = config.get("architectures") or []
        if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
            found = f"is a {kinds[0]}" if kinds else "holds no config.json of one"
            raise UserError(
                f"--judge {folder}: {found}; a reward model's is a ...ForSequenceClassification; by a policy's own "
                f"likelihoods judges --judge implicit:{folder}"
            )
        labels = config.get("num_labels") or len(config.get("id2label") or "12")
        if labels != 1:
            raise UserError(f"--judge {folder}: has {labels} labels; a reward model has one, its score")
        if find_spec("transformers") is None:
            raise UserError(f"--judge {folder}: needs transformers: pip install 'pairtune[models]'")
        self._opened = None

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        import torch

        if not questions:
            return []
        model, tokenizer = self._opened or self._open()
        rows = [self._tokens(tokenizer, question) for question in questions]
        lengths = [len(row["input_ids"]) for row in rows]
        most = getattr(model.config, "max_position_embeddings", None) or max(lengths)
        found = [Said(None, f"longer than the reward model's {most:,} positions")] * len(rows)
        pad = tokenizer.pad_token_id
        if pad is None:  # a token that no row has: the model takes the last one that is another for a row's end
            pad = next(iter({*range(model.config.vocab_size)} - {token for row in rows for token in row["input_ids"]}))
        model.config.pad_token_id = pad
        fits = sorted((n for n, length in enumerate(lengths) if length <= most), key=lengths.__getitem__)
        batches = list(_batches(fits, lengths))
        with torch.inference_mode():
            for batch in console.progress(batches, "scores", shown=len(batches) > 1):
                padded = _padded([rows[n] for n in batch], pad)
                inputs = {name: torch.tensor(values, device=model.device) for name, values in padded.items()}
                for n, score in zip(batch, model(**inputs).logits[:, 0].tolist(), strict=True):
                    found[n] = Said(score) if score == score else Said(None, "the score is not a number")
        return found

    def _open(self):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from pairtune.process import dist

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(
                self._folder, dtype="auto", local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            told = str(error).strip().partition("\n")[0]
            raise UserError(f"--judge {self._folder}: transformers cannot open it: {told}") from error
        self._opened = model.to(dist.alone("auto").device).eval(), tokenizer
        return self._opened

    @staticmethod
    def _tokens(tokenizer, question: Question) -> dict[str, list[int]]:
        """Inputs of the model by their names: tokens, which of them count, and where it wants that, of which text."""
        (answer,) = question.answers
        if tokenizer.chat_template is None:
            return dict(tokenizer(question.prompt, answer))
        asked = question.row["prompt"]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [*asked]
        messages.append({"role": "assistant", "content": answer})
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return dict(tokenizer(text, add_special_tokens=False))


def _padded(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, list[list[int]]]:
    """Returns rows' inputs, padded on the right to one length."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad}
    return {name: [row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows] for name in rows[0]}


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields rows' numbers, of ascending length, as many at a time as BATCH_TOKENS holds of them."""
    batch: list[int] = []
    for n in order:
        if batch and (len(batch) + 1) * lengths[n] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch
