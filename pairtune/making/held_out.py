"""Which questions are held out: by their words alone, so that no two files disagree."""

import hashlib

from pairtune.making.judge.question import in_words


def is_held_out(prompt: str | list[dict], share: float, seed: int) -> bool:
    """Returns whether a question is held out: all of its pairs are, wherever it stands, and about this share of all."""
    words = " ".join(in_words(prompt).split())
    digest = hashlib.blake2b(f"{seed} {words}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") < share * 2**64
