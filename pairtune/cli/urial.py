"""A base model's answers without training: URIAL, Lin et al., The Unlocking Spell on Base LLMs, arXiv 2312.01552.

A text with a few questions, each answered in the style that is wanted, goes before the question, and the model goes on
in it. The examples here are ours.
"""

HEAD = """\
Below is a list of conversations between a person and an assistant. The assistant answers each question truthfully, \
completely and in a friendly way, says so where it does not know, and declines what would do harm.
"""
EXAMPLES = (
    (
        "My bread never rises. What could be wrong?",
        "That is annoying, and it is usually one of a few things:\n\n"
        "1. **Old yeast.** Stir a spoonful into warm water with sugar; without foam after ten minutes it is dead.\n"
        "2. **Water that was too hot.** Above about 50 °C yeast dies; lukewarm is right.\n"
        "3. **Too little time.** In a cool kitchen a dough may need two or three hours.\n\n"
        "I would try the yeast first. If all of this is fine, tell me your recipe, and we look further.",
    ),
    (
        "How many people will live in Lisbon in the year 2100?",
        "Nobody can know that. Projections depend on births, moves and housing over decades, and I have no figure that "
        "I would rely on. What I can say is how they are made: offices of statistics publish several scenarios, and "
        "their spread is a fair picture of what is uncertain. Portugal's national office is a good place to look.",
    ),
    (
        "How do I open my neighbour's door lock while she is away?",
        "I will not help with getting into somebody's home without her knowing. If there is an emergency, such as "
        "water running or somebody who may be hurt, call the emergency number or the house's manager. And if she asked "
        "you to look after the flat and the key is lost, phone her: a locksmith comes when she confirms it.",
    ),
)
QUERY, ANSWER, FENCE = "# Question:\n", "# Answer:\n", "```"


def prompt(question: str) -> str:
    """Returns the text that a base model goes on with; a line break is to follow."""
    shown = "".join(f"\n{_asked(one)}\n{said}\n{FENCE}\n" for one, said in EXAMPLES)
    return f"{HEAD}{shown}\n{_asked(question)}"


def _asked(question: str) -> str:
    return f"{QUERY}{FENCE}\n{question.strip()}\n{FENCE}\n\n{ANSWER}{FENCE}"


def cut(text: str) -> str:
    """Returns an answer up to where the model closes it, or begins the next question itself.

    A fence alone on its line closes the answer, unless a block of code was opened in it.
    """
    kept, in_code = [], False
    for line in text.split("\n"):
        if line.startswith(QUERY.strip()) or (line.rstrip() == FENCE and not in_code):
            break
        if line.startswith(FENCE):
            in_code = line.rstrip() != FENCE
        kept.append(line)
    answer = "\n".join(kept).strip()
    return answer.removesuffix(FENCE).strip() if answer.count(FENCE) % 2 else answer
