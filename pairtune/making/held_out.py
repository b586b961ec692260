"""Which questions are held out: by their words alone, so that no two files disagree."""

import hashlib


def is_held_out(prompt: str | list[dict], share: float, seed: int) -> bool:
    """Returns whether a question is held out: all of its pairs are, wherever it stands, and about this share of all."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content')}" for m in prompt)
    digest = hashlib.blake2b(f"{seed} {' '.join(text.split())}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") < share * 2**64
