"""What can be said of pairs at a glance, from their tokens, before a run. lint.py looks at texts."""

from collections.abc import Iterator, Sequence

from pairtune.pairs.at_once import lengths_of
from pairtune.pairs.packed import PARTS, PackedPairs
from pairtune.pairs.pair import Pair

MANY = 10  # pairs


def glance(pairs: Sequence[Pair]) -> str:
    """Returns two lines: duplicates, pairs that contradict others, and how often the longer answer is chosen."""
    seen = list(_parts(pairs))
    known = set(seen)
    against = sum((prompt, rejected, chosen) in known for prompt, chosen, rejected in seen if chosen != rejected)
    twice, count = len(seen) - len(known), max(1, len(seen))
    said = [f"{twice:,} duplicates ({100 * twice / count:.1f} %)", f"{against:,} pairs that contradict another"]
    _, chosen, rejected = lengths_of(pairs)
    apart = (chosen > 0) & (rejected > 0) & (chosen != rejected)
    if apart.any():
        said.append(f"of answers that differ in length the longer is chosen in {(chosen > rejected)[apart].mean():.1%}")
    if len(seen) >= MANY and len({prompt for prompt, _, _ in seen}) == 1:
        said.append("all prompts are the same")
    return (
        f"at a glance: {', '.join(said)}\n"
        "  `tune data FILE` shows near-duplicates, refusals, languages, special tokens, and rows to read"
    )


def _parts(pairs: Sequence[Pair]) -> Iterator[tuple[int, int, int]]:
    """Yields a number for each of a pair's three parts: 64 bits, alike for what is alike."""
    if not isinstance(pairs, PackedPairs):
        yield from (tuple(hash(tuple(getattr(pair, part))) for part in PARTS) for pair in pairs)
        return
    for number, place in zip(pairs.of_table.tolist(), pairs.places.tolist(), strict=True):
        table = pairs.tables[number]
        yield tuple(
            hash(values[offsets[place] : offsets[place + 1]].tobytes())
            for values, offsets in zip(table.values, table.offsets, strict=True)
        )
