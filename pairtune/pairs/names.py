"""What the name of a column says by itself: that it chooses between answers, that one of them is better or worse, that
a number is better where it is higher, how good a single answer is."""

import re
from collections.abc import Iterable, Sequence

from pairtune.pairs.ranked import TIE_WORDS, Choice

QUESTIONS = ("prompt", "question", "instruction", "query", "input", "context", "post", "text")
ANSWERS = ("text", "response", "answer", "completion", "generation", "candidate", "output", "content", "reply")
ANSWERS += ("replie",)  # in the singular, but for its ending
OF_WHOM = ("id", "uuid", "user_id", "annotator_id", "worker_id", "model", "author", "annotator", "status")
NAMES = (
    "model",
    "policy",
    "name",
    "author",
    "annotator",
    "judge",
    "worker",
    "rater",
    "source",
    "id",
    "system",
    "label",
)
CHOICES = ("choice", "label", "labels", "winner", "preference", "preferred", "better", "vote", "votes", "verdict")
CHOICES += ("best", "selected", "better_response_id", "human_preference", "preferred_response", "preferred_answer")
# Which may say how good a single answer is, where no label does; and of these, that it is a bad one
_BAD = (
    "toxic",
    "toxicity",
    "harmful",
    "harm",
    "unsafe",
    "spam",
    "bad",
    "refused",
    "refusal",
    "violation",
    "violations",
)
_BAD += ("hate", "hateful", "flagged", "offensive", "abusive", "wrong", "incorrect", "rejected", "undesirable", "error")
_BAD += ("downvoted", "disliked", "hallucination", "hallucinated", "violates", "penalty", "perplexity")
BAD_GRADES = tuple(f"{before}{name}{after}" for name in _BAD for before in ("", "is_") for after in ("", "_score"))
GRADES = (*CHOICES, "feedback", "thumb", "thumbs", "rating", "ratings", "score", "scores", "reward", "rewards", "grade")
GRADES += ("quality", "sentiment", "upvoted", "like", "liked", "accepted", "approved", "is_good", "good", "helpful")
GRADES += ("correct", "is_correct", "desirable", "is_desirable", "is_preferred", "is_chosen", "completion_label")
GRADES += ("quality_score", "reward_score", "helpfulness", "helpfulness_score", "safety_score", "is_safe", "safe")
GRADES += ("reaction", "reactions", "csat", "nps")
GRADES += ("overall_score", "stars", "upvotes", "points", "is_helpful", "is_approved", "is_accepted", *BAD_GRADES)

_BETTER = re.compile(
    r"(?<![a-z])((?:not|non)_?reject|chosen|better|preferred|good|accepted|best|win|pos(?![a-z])|positive|correct(?!ed))"
)
_CHOOSES = re.compile(
    r"(?<![a-z])(choice|choose|chose|label|win|won|prefer|better|best|vote|verdict|select|pick|judg|decision|favou?r)"
)
_PREFERS = re.compile(r"(?<![a-z])(prefer|likert|rating|score|margin|diff|delta|elo|prob|win|strength|better)")
# What stands for the first answer and for the second, but for signs around it
_IN_TURN = [("a", "b"), ("1", "2"), ("l", "r"), ("left", "right"), ("first", "second"), ("ab", "ba"), ("x", "y")]
_IN_TURN += [
    (f"{what}{a}", f"{what}{b}")
    for what in ("response", "answer", "output", "model")
    for a, b in (("a", "b"), ("1", "2"))
]
_WORSE = re.compile(
    r"(?<![a-z])(?<!not_)(?<!non_)(reject|worse|worst|bad|los(e|ing|t(?![a-z]))|neg(?![a-z])|negative|incorrect|wrong"
    r"|(dis|un|non_?|not_?|less_|least_)(chosen|better|preferred|accepted|selected|good|best"
    r"|helpful|harmless|safe|honest|correct|accurate|true)|harmful|unsafe|toxic(?!ity)|offensive|biased"
    r"|discard|eliminat|hallucinat|corrupt|flawed|failed|dropped|removed|disliked|fake)"
)
# A text and what somebody made of it
_AFTER = re.compile(
    r"(?<![a-z])(revised|revision|edited|after|improved|corrected|final|refined|rewritten|fixed|polished)"
)
_BEFORE = re.compile(r"(?<![a-z])(original|draft|before|initial|unedited|unrevised)")
_FEWER_IS_BETTER = re.compile(
    r"(?<![a-z])(rank|penalt|error|mistake|fault|loss|perplexity|ppl|nll|toxic|harm(?!less)|unsafe|hate|violation|spam"
    r"|distance|cost|risk|downvote|dislike|bad|wrong|hallucination|refusal)"
)
_MORE_IS_BETTER = re.compile(
    r"(?<![a-z])(score|rating|reward|vote|upvote|like(?!li)|star|grade|point|quality|helpful|harmless|accura|win)"
)
_STEM_AND_SUFFIX = re.compile(r"(.*?)[_ ]?(\d+|[A-Za-z]|first|second|left|right)")
_IN_ORDER = re.compile(r"(?<![a-z])(rankings?|order|ordering|sorted|sorting)(?![a-z])")
TO_BE_NAMED, TO_BE_ORDERED = "SCORES_OR_RANKS", "RANKS_OR_ORDER"


def asked_by(name: str) -> set[str]:
    """Returns the words of a column's name, by which it may ask."""
    return set(re.findall(r"[a-z]+", _words(name)))


def says_worse(name: str) -> bool:
    """Says whether a column is a worse answer, or names it."""
    return _WORSE.search(_words(name)) is not None


def better_and_worse(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the columns of a better and of a worse answer, as their names say; None where these do not say it."""
    words = {name: _words(name) for name in names}
    worse = next(filter(says_worse, words), None)
    better = next((name for name, said in words.items() if _BETTER.search(said) and not says_worse(name)), None)
    if worse and not better:  # response and rejected_response
        better = next(
            (name for name in words if words[worse].endswith(f"_{words[name]}") and not says_worse(name)), None
        )
    if better and worse:
        return better, worse
    after = next((name for name, said in words.items() if _AFTER.search(said)), None)
    before = next((name for name, said in words.items() if _BEFORE.search(said) and not _AFTER.search(said)), None)
    return (after, before) if after and before else None


def says_which(name: str) -> bool:
    """Says whether a column may say which answer is better, by its name."""
    return _CHOOSES.search(_words(name)) is not None


def in_turn(name: str, values: Iterable[str], suffixes: Sequence[str] | None) -> list[str] | None:
    """Returns the two values of a column that stand for the first answer and for the second, and a third one that is no
    known word for a tie; None where that is not plain.

    Args:
        suffixes: How the answers' columns end, if they begin alike.
    """
    plain = {re.sub(r"[^a-z0-9]", "", value): value for value in values}
    if set(plain) in ({"true", "false"}, {"yes", "no"}):  # which one is it about?
        words = re.split(r"[^a-z0-9]+", _words(name))
        firsts = [
            first in words or last in words
            for first, last in zip(("first", suffixes and suffixes[0]), ("1st", "left"), strict=True)
        ]
        seconds = [
            first in words or last in words
            for first, last in zip(("second", suffixes and suffixes[1]), ("2nd", "right"), strict=True)
        ]
        if any(firsts) == any(seconds):
            return None
        yes, no = (plain[word] for word in (("true", "false") if "true" in plain else ("yes", "no")))
        return [yes, no] if any(firsts) else [no, yes]
    pair = next((pair for pair in _IN_TURN if set(plain) >= set(pair)), None)
    rest = [value for word, value in plain.items() if pair and word not in pair]
    return [plain[word] for word in pair] + rest if pair and len(rest) < 2 else None


def is_preference(name: str) -> bool:
    """Says whether a column's numbers may say how much better one of two answers is, by its name."""
    return _PREFERS.search(_words(name)) is not None


def numbers_as(name: str) -> str:
    """Returns what answers' numbers are by their name: scores, better where they are higher; ranks, better where they
    are lower, as penalties are; or what is to be filled in."""
    words = _words(name.removesuffix(".*").rpartition(".")[2])
    if "rank" in words and _MORE_IS_BETTER.search(words):
        return TO_BE_NAMED
    if _FEWER_IS_BETTER.search(words):
        return "ranks"
    return "scores" if _MORE_IS_BETTER.search(words) else TO_BE_NAMED


def is_order(name: str, numbers: Sequence) -> bool:
    """Says whether a list may be the answers' places in an order, by its name and by what it holds."""
    if not _IN_ORDER.search(_words(name)):
        return False
    try:
        places = sorted(map(float, numbers))
    except (ValueError, OverflowError):
        return False
    return places in ([*range(len(places))], [*range(1, len(places) + 1)])


def names_of(answers: Sequence[str], values: set[str]) -> Choice | None:
    """Returns what stands for each answer where a choice's values name the answers: by column or by its suffix.

    Suffixes 0 and 1 are taken by their number, as are 1 and 2.
    """
    columns = [name.lower() for name in answers]
    suffixes = suffixes_of(answers)
    if suffixes is None:
        return None
    names = [
        (column, suffix, f"model_{suffix}", f"response_{suffix}")
        for column, suffix in zip(columns, suffixes, strict=True)
    ]
    known = {word for words in names for word in words}
    if not values & known or values - known - set(TIE_WORDS):  # 0 beside 1 and 2 may be a tie, and 2 beside 0 and 1
        return None
    return Choice(tuple(names))


def suffixes_of(answers: Sequence[str]) -> tuple[str, ...] | None:
    """Returns how columns' names end that begin alike; None where they do not."""
    found = [_STEM_AND_SUFFIX.fullmatch(name) for name in answers]
    if not all(found) or len({match[1] for match in found}) > 1:
        return None
    return tuple(match[2].lower() for match in found)


def stem_and_suffix(name: str) -> tuple[str, str]:
    """Returns how a column's name begins and, in lower case, how it ends: "" where it has no suffix."""
    found = _STEM_AND_SUFFIX.fullmatch(name)
    return (found[1], found[2].lower()) if found else (name, "")


def stem_of(name: str) -> list[str]:
    """Returns the words of a name, in the singular, but for its suffix."""
    return [word.strip("s") for word in re.split(r"[^a-z]+", stem_and_suffix(name)[0].lower())]


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
