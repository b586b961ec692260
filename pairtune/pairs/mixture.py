"""Several sources in one block of a config: what each is read by, and how many of its pairs an epoch has."""

import random
import re
from collections.abc import Mapping, Sequence

from pairtune.errors import UserError, nearest

OF_ALL = ("val_fraction", "cache_dir", "streaming", "shuffle_buffer")  # what is said of the sources together
OF_ONE = ("weight", "share")  # what is said of one of several to train on
# What evaluations say of all held-out pairs begins so
NO_NAMES = ("loss", "rewards", "logps", "pairs", "like_length", "length_controlled", "chosen_lost", "auc", "answers")


def sources_of(block: Mapping, key: str) -> list[tuple[str, dict]]:
    """Returns each source's own block, with what it says of itself in place of what the block says of all.

    Args:
        key: The block's name; a source's is KEY.source[N].

    Raises:
        UserError: A source is neither text nor a block, names an unknown key, or has a weight or share that is none.
    """
    source, rest = block["source"], {name: value for name, value in block.items() if name not in OF_ALL}
    if isinstance(source, str) or not isinstance(source, Sequence | Mapping):
        return [(key, {**block})]
    if isinstance(source, Mapping):
        _check_names(list(source), key)
        each = [(f"{key}.source.{name}", one) for name, one in source.items()]
    else:
        each = [(f"{key}.source[{number}]", one) for number, one in enumerate(source)]
    found, known = [], [*rest, *(OF_ONE if key == "dataset" else ())]
    for where, one in each:
        own = {"source": one} if isinstance(one, str) else one
        if not isinstance(own, Mapping) or not isinstance(own.get("source"), str):
            raise UserError(f"{where}={one}: must be a file, a folder or a Hub id, or a block with a `source`")
        for name in own:
            if name not in known:
                raise UserError(f"{where}.{name}: unknown key{nearest(name, known)}")
        found.append((where, {**rest, **own}))
    _check(found)
    return found


def names_of(block: Mapping) -> list[str]:
    """Returns the names of a block's held-out sets, in their order; none where they have none."""
    return list(block["source"]) if isinstance(block["source"], Mapping) else []


def _check_names(names: Sequence[str], key: str) -> None:
    for name in names:
        if not re.fullmatch(r"[\w.-]+", str(name)) or name in NO_NAMES:
            raise UserError(
                f"{key}.source.{name}: names what evaluations say of these pairs, eval/{name}/loss: must be letters, "
                f"digits, _, - and ., and none of {', '.join(NO_NAMES)}"
            )


def _check(found: list[tuple[str, dict]]) -> None:
    if not found:
        raise UserError("dataset.source=[]: names no source; list one at least")
    for where, one in found:
        weight, share = one.get("weight"), one.get("share")
        if weight is not None and not (_is_number(weight) and 0 < weight <= 1000):
            raise UserError(f"{where}.weight={weight}: must be above 0, such as 2 for each pair twice, 0.5 for half")
        if share is not None and not (_is_number(share) and 0 < share < 1):
            raise UserError(f"{where}.share={share}: must be above 0 and below 1, such as 0.3 for 30 % of all pairs")
        if weight is not None and share is not None:
            raise UserError(f"{where}: weight={weight} and share={share} both say how much there is of it; keep one")
    total = sum(one.get("share") or 0 for _, one in found)
    all_have_one = all(one.get("share") for _, one in found)
    if total > 1 + 1e-9 or (all_have_one and total < 1 - 1e-9) or (total > 1 - 1e-9 and not all_have_one):
        where = found[0][0].partition(".")[0]
        raise UserError(
            f"{where}.source: the shares add up to {total:.3g}; of all sources they must add up to 1, and to less "
            "where a source has none"
        )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def counts_of(sizes: Sequence[int], blocks: Sequence[Mapping]) -> list[int]:
    """Returns how many pairs of each source an epoch has.

    A source without a share has weight times as many as there are. The others fill their shares beside these; where all
    have one, an epoch is as long as no source is repeated for.
    """
    shares = [block.get("share") for block in blocks]
    weights = [0 if block.get("share") else block.get("weight") or 1 for block in blocks]
    own = [round(weight * size) for weight, size in zip(weights, sizes, strict=True)]
    if all(shares):
        total = min(size / share for size, share in zip(sizes, shares, strict=True))
    else:
        total = sum(own) / (1 - sum(share or 0 for share in shares))
    return [round(total * share) if share else count for share, count in zip(shares, own, strict=True)]


def rates_of(blocks: Sequence[Mapping]) -> list[float]:
    """Returns each source's part of the rows that are read of a stream, whose sources nobody has counted: its share;
    and of what the shares leave, by weight."""
    shares = [block.get("share") or 0 for block in blocks]
    weights = [0 if block.get("share") else block.get("weight") or 1 for block in blocks]
    rest = (1 - sum(shares)) / (sum(weights) or 1)
    return [float(share or rest * weight) for share, weight in zip(shares, weights, strict=True)]


def drawn(pairs: Sequence, count: int, seed: str) -> Sequence:
    """Returns so many of the pairs, in their order: all as often as they go, and then some that the seed draws."""
    times, rest = divmod(count, len(pairs))
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), rest))
    if not rest:
        some = pairs[:0]
    elif isinstance(pairs, list):
        some = [pairs[i] for i in chosen]
    else:
        some = pairs.take(chosen)
    for _ in range(times):
        some = some + pairs
    return some


def told(sources: Sequence[str], sizes: Sequence[int], counts: Sequence[int]) -> str:
    """Returns a line that says what an epoch is made of."""
    total = sum(counts)
    parts = [
        f"{source} {count:,} ({100 * count / total:.1f} %{'' if count == size else f'; it has {size:,}'})"
        for source, size, count in zip(sources, sizes, counts, strict=True)
    ]
    return f"an epoch of {total:,} pairs: {', '.join(parts)}"


def told_of_stream(sources: Sequence[str], rates: Sequence[float]) -> str:
    """Returns a line that says what a stream is made of."""
    return "rows are drawn from " + ", ".join(f"{s} {100 * r:.1f} %" for s, r in zip(sources, rates, strict=True))
