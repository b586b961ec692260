"""The texts of a run's pairs: of its tokens, or read again from where its config says that its rows are."""

from collections.abc import Callable, Mapping, Sequence

from pairtune.errors import UserError
from pairtune.pairs.columns import as_plain
from pairtune.pairs.digests import short_digest
from pairtune.pairs.example import Answer, BadRow, Example, Skip, turns_of
from pairtune.pairs.formats import doubtful
from pairtune.pairs.pair import Pair
from pairtune.pairs.recognise import recognise
from pairtune.pairs.rows import read_rows

Text = tuple[str, str, str]  # prompt, chosen, rejected


def decoder(pairs: Sequence[Pair], tokenizer) -> Callable[[int, int], Text | None]:
    """Returns a function from a pair's row and short digest to what its tokens say; None for one that is not there."""

    def text_of(row: int, digest: int) -> Text | None:
        for pair in pairs:
            if pair.row == row and short_digest(pair) == digest:
                return tuple(map(tokenizer.decode, (pair.prompt, pair.chosen, pair.rejected)))
        return None

    return text_of


def read_texts(config: Mapping, *, held_out: bool) -> dict[int, list[Text]]:
    """Returns what each row of a run's training or held-out source says, by its number; of one that is not, nothing.

    Args:
        config: Of the run: config.yaml.

    Raises:
        UserError: The rows cannot be read: they may have moved. Or they come from several sources, whose numbers are
            not told apart.
    """
    key = "eval_dataset" if held_out and (config.get("eval_dataset") or {}).get("source") else "dataset"
    block = config.get(key) or {}
    if not block.get("source"):
        raise UserError(f"{key}.source: the run's config.yaml does not say where its pairs are")
    if not isinstance(block["source"], str):
        raise UserError(f"{key}.source: lists several sources, and a row's number does not say which of them it is of")
    where = {name: block[name] for name in ("split", "name", "revision", "limit") if name in block}
    rows = read_rows(block["source"], **where, columns=as_plain(block.get("columns") or {}), key=key)
    form, rows = recognise(rows, key)
    found: dict[int, list[Text]] = {}
    how = {"worse": block.get("rejected") or "all", "doubtful": doubtful(form.unused(rows.column_names)), "key": key}
    for number, row in zip(rows.numbers, rows, strict=True):
        try:
            found[number] = [_text(example) for example in form.read(row, **how)]
        except (Skip, BadRow, UserError):  # which the run did not take, either
            continue
    return found


def _text(example: Example) -> Text:
    several = len(example.prompt) > 1
    prompt = "\n".join((f"{m['role']}: " if several else "") + _content(m) for m in example.prompt)
    return prompt, _answer(example.chosen), _answer(example.rejected)


def _answer(answer: Answer | None) -> str:
    return "" if answer is None else "\n".join(map(_content, turns_of(answer)))


def _content(message: Mapping) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "" if content is None else str(content)


def read_cells(block: Mapping, columns: Sequence[str], key: str = "dataset") -> dict[str, dict[int, object]]:
    """Returns what rows have in those of the columns that they have, by the rows' numbers.

    Args:
        block: The config's `dataset` or `eval_dataset`; of several sources, nothing is found.
    """
    if not isinstance(block["source"], str):
        return {}
    where = {name: block[name] for name in ("split", "name", "revision", "limit")}
    rows = read_rows(block["source"], **where, key=key)
    found = [column for column in columns if column in rows.found]
    cells = {column: dict(zip(rows.numbers, rows.cells(column), strict=True)) for column in found}
    return {column: of_rows for column, of_rows in cells.items() if all(isinstance(c, str) for c in of_rows.values())}
