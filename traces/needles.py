"""Questions with known answers: needles hidden in a haystack, key-value recall, long copies.

Needles follow RULER's multi-key retrieval (Hsieh et al., 2024, arXiv:2404.06654), recall the
key-value task of Liu et al., 2023 (arXiv:2307.03172). Each split has its own words and numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtune.common.errors import KvtuneError
from kvtune.traces.samples import SPLITS, Split

_WORDS = (
    "acorn anchor apple apron arrow autumn badge bagel bamboo banjo barn basket beacon beaver "
    "bell berry blanket blossom bottle branch bread brick bridge broom bucket button cabin "
    "cactus camel canal candle canoe carpet carrot castle cedar cellar chalk cherry chimney "
    "cider circle clarinet clay cliff clock cloud clover coal cobweb coffee comet compass "
    "copper coral cottage cotton cradle crane cricket crown curtain daisy desert diamond "
    "dolphin donkey dragon drawer drum eagle echo elbow ember engine fabric falcon feather "
    "fence ferry fiddle field flame flute forest fossil fountain fox garden garlic ginger "
    "glacier glove goat grape gravel hammer harbor harp hazel hedge helmet heron hill honey "
    "horse island ivory jacket jasmine jungle kettle kite ladder lagoon lamp lantern laurel "
    "lemon library lily linen lizard lobster magnet mango maple marble market meadow melon "
    "mirror mitten monkey moon mountain muffin napkin needle nest nutmeg oak oasis ocean olive "
    "onion orange orchard otter owl oyster paddle panda paper parrot pearl pebble pencil pepper "
    "piano pillow pine planet plum pocket pond poppy prairie pumpkin puzzle quartz quilt rabbit "
    "radio rain raven ribbon river robin rocket rose saddle salmon sand scarf shadow shell "
    "silver snow spider spoon spring squirrel star stone storm sugar summer sunset swan table "
    "teapot temple thistle thunder tiger tower train trumpet tulip tunnel turtle umbrella "
    "valley velvet village violet violin wagon walnut walrus whale wheat willow window winter "
    "wolf yarn zebra"
)
WORDS = tuple(_WORDS.split())

TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n\n"
)
UNASKED_END = 64
"""Tokens at a prompt's end in which nothing is hidden.

Methods that choose by the attention of the last tokens would otherwise be shown what will be asked
for: with one needle among SnapKV's last 32 tokens they look at all others, and keep them.
"""
COPY_LEAD = "\n\nHere is a passage of the above once more:\n\n"
RECALL_TASK = "Below is a list of keys and their values. Make sure to memorize them.\n\n"


@dataclass(frozen=True)
class Codec:
    """What this room needs of a tokenizer.

    Args:
        encode: text to tokens, nothing added.
        decode: one token to text.
        start: the tokens that the tokenizer itself puts before every text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[int], str]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A sentence to hide, and the same sentence asked for.

    Args:
        hidden: the sentence's tokens, lines of its own.
        asked: tokens that ask for it, with the answer and the full stop.
        is_answer: which of the asked tokens are digits of the answer.
    """

    hidden: tuple[int, ...]
    asked: tuple[int, ...]
    is_answer: tuple[bool, ...]


@dataclass(frozen=True)
class Passage:
    """A finished text of N + 1 tokens and, for each token, the needle whose answer it is or -1."""

    token_ids: tuple[int, ...]
    needle_of_token: tuple[int, ...]


def words_of(split: Split) -> tuple[str, ...]:
    """The words that only this split's needles use."""
    return WORDS[SPLITS.index(split) :: len(SPLITS)]


def number_of(split: Split, digits: int, rng: random.Random) -> str:
    """A number that only this split can draw: its remainder by three names the split."""
    count = len(SPLITS)
    third = rng.randrange(10 ** (digits - 1) // count + 1, 10**digits // count)
    return str(third * count + SPLITS.index(split))


def retrieval(
    codec: Codec, haystack: Sequence[int], split: Split, tokens: int, observed: int, needles: int,
    rng: random.Random,
) -> Passage:  # fmt: skip
    """Needles at seeded depths of the prompt's prose, then all of them asked for.

    Args:
        codec: the tokenizer.
        haystack: at least N + 1 tokens of other text.
        split: whose words and numbers to use.
        tokens: N.
        observed: C.
        needles: how many at most; as many as fit into C are used.
        rng: the sample's own stream.

    Raises:
        KvtuneError: not one question fits.
    """
    questions = []
    for word in rng.sample(words_of(split), needles):
        sentence = f"The special magic number for {word} is"
        questions.append(_question(codec, "\n" + sentence, sentence, number_of(split, 7, rng), "."))
    return assemble(codec, TASK, "\n\n", haystack, questions, tokens, observed, rng)


def recall(
    codec: Codec, split: Split, tokens: int, observed: int, most_questions: int, rng: random.Random
) -> Passage:
    """A list of key: value lines that fills the prompt, then some of the keys asked for.

    Args:
        codec: the tokenizer.
        split: whose words and numbers to use.
        tokens: N.
        observed: C.
        most_questions: how many keys to ask for at most.
        rng: the sample's own stream.

    Raises:
        KvtuneError: not one question fits.
    """
    pairs: dict[str, Question] = {}
    words, length = words_of(split), 0
    while length <= tokens + most_questions * 100 and len(pairs) < len(words) * (len(words) - 1):
        key = " ".join(rng.sample(words, 2))
        if key not in pairs:
            pairs[key] = _question(codec, f"{key}:", f"{key}:", number_of(split, 4, rng), "")
            length += len(pairs[key].hidden)
    lines = list(pairs.values())
    others = [token for line in lines[most_questions:] for token in line.hidden]
    questions = lines[:most_questions]
    lead = "\nHere are some of the values again.\n"
    return assemble(codec, RECALL_TASK, lead, others, questions, tokens, observed, rng)


def copied(
    codec: Codec, haystack: Sequence[int], tokens: int, observed: int, rng: random.Random
) -> Passage:
    """Prose, and then a passage of it once more: all observed tokens repeat what was read.

    Args:
        codec: the tokenizer.
        haystack: at least N + 1 tokens of other text.
        tokens: N.
        observed: C; the passage is one token longer, so that its first is the prompt's last.
        rng: draws where the passage begins.

    Raises:
        KvtuneError: the prompt is shorter than the passage.
    """
    first, lead = list(codec.start), codec.encode(COPY_LEAD)
    passage = observed + 1
    room = tokens + 1 - len(first) - len(lead) - passage
    if room < passage or len(haystack) < room:
        raise KvtuneError(
            f"a passage of {passage} tokens is not read before it is repeated in {tokens} tokens",
            hint="observe fewer tokens than half of a sample.",
        )
    at = rng.randrange(room - passage + 1)
    body = list(haystack[:room])
    text = (*first, *body, *lead, *body[at : at + passage])
    return Passage(text, (-1,) * len(text))


def _question(codec: Codec, hidden: str, asked: str, number: str, stop: str) -> Question:
    before, answer, after = (codec.encode(x) for x in (asked, " " + number, stop + "\n"))
    digits = [any(c.isdigit() for c in codec.decode(token)) for token in answer]
    return Question(
        hidden=tuple(codec.encode(f"{hidden} {number}{stop}\n")),
        asked=(*before, *answer, *after),
        is_answer=(*[False] * len(before), *digits, *[False] * len(after)),
    )


def assemble(
    codec: Codec, task: str, lead: str, haystack: Sequence[int], questions: Sequence[Question],
    tokens: int, observed: int, rng: random.Random,
) -> Passage:  # fmt: skip
    """Task, haystack with the hidden sentences, questions: N + 1 tokens.

    The questions end the text, so the observed part holds them all; where they do not fill it, it
    begins with the haystack's own last tokens, in which nothing is hidden. Nor is it in the last of
    the prompt.
    """
    first, leading = [*codec.start, *codec.encode(task)], codec.encode(lead)
    asked_room = observed - len(leading)
    kept: list[Question] = []
    for question in questions:
        if sum(len(q.asked) for q in kept) + len(question.asked) <= asked_room:
            kept.append(question)
    asked, answers = _ask(leading, kept, rng)
    room = tokens + 1 - len(first) - len(asked) - sum(len(q.hidden) for q in kept)
    prompt_room = room - (observed + 1 - len(asked))
    if not kept or prompt_room < 1 or len(haystack) < room:
        raise KvtuneError(
            f"no question fits into {tokens} tokens of which {observed} are observed",
            hint="use more tokens; 64 observed tokens hold about three questions.",
        )
    places = prompt_room - min(UNASKED_END, prompt_room // 2)
    body = _hide(codec, haystack[:room], kept, places, rng)
    text = [*first, *body]
    return Passage((*text, *asked), (*[-1] * len(text), *answers))


def _ask(
    leading: Sequence[int], questions: Sequence[Question], rng: random.Random
) -> tuple[list[int], list[int]]:
    """All questions in a drawn order, and the needle of each token."""
    asked, answers = list(leading), [-1] * len(leading)
    for needle in rng.sample(range(len(questions)), len(questions)):
        asked += questions[needle].asked
        answers += [needle if digit else -1 for digit in questions[needle].is_answer]
    return asked, answers


def _hide(
    codec: Codec, haystack: Sequence[int], questions: Sequence[Question], room: int,
    rng: random.Random,
) -> list[int]:  # fmt: skip
    """The haystack with every hidden sentence after a drawn line's end among ``room`` tokens."""
    ends = [i for i in range(1, room + 1) if codec.decode(haystack[i - 1]).endswith("\n")]
    places = ends if len(ends) >= len(questions) else list(range(room + 1))
    depths = sorted(rng.choices(places, k=len(questions)))
    body: list[int] = []
    for start, stop, question in zip([0, *depths], depths, questions, strict=False):
        body += [*haystack[start:stop], *question.hidden]
    return body + list(haystack[depths[-1] :])
