"""Arithmetic word problems with worked answers, without end: the text of the built-in demo.

Lengths are ragged like those of real instruction data: half of the problems take a step or two, a few ten.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

# fmt: off
NAMES = (
    "Maya", "Oskar", "Lena", "Tomas", "Priya", "Jonas", "Aisha", "Viktor", "Chloe", "Mateo", "Hana",
    "Felix", "Nora", "Samir", "Greta", "Diego", "Yuki", "Emil", "Zara", "Hugo", "Ines", "Kofi", "Freya",
    "Ravi", "Alma", "Luca", "Sofia", "Omar", "Edith", "Noah", "Leila", "Anton", "Rosa", "Milan", "Tara",
    "Pavel", "Ida", "Cyrus", "Wanda", "Bruno",
)
THINGS = (
    "apples", "pencils", "marbles", "stickers", "postcards", "eggs", "candles", "buttons", "tickets",
    "books", "shells", "stamps", "oranges", "badges", "cookies", "balloons", "bricks", "seeds",
    "bottles", "lemons", "ribbons", "coins", "cards", "beads", "muffins", "crayons", "plums",
    "lanterns", "chairs", "magnets", "walnuts", "tulips", "spoons", "pebbles", "kites", "notebooks",
)
PLACES = (
    "market", "library", "workshop", "harbour", "school", "museum", "bakery", "garden", "station",
    "theatre", "farm", "office",
)
VEHICLES = (
    "bus", "train", "ferry", "van", "tram", "bicycle", "truck", "motorboat",
)
# fmt: on

Problem = tuple[list[str], list[str], int]
"""Sentences of the question, lines of the worked answer, result."""


def samples(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Yield `count` samples, `prompt` and `response`, whose prompts all differ."""
    seen: set[str] = set()
    while len(seen) < count:
        family = rng.choices((_sum, _story, _shopping, _journey, _sharing), weights=(3, 7, 4, 4, 2))[0]
        question, lines, result = family(rng)
        prompt = f"Question: {' '.join(question)}\nAnswer:"
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "response": " " + "\n".join([*lines, f"The answer is {result}."])}


def _num_parts(rng: random.Random, most: int) -> int:
    """Return 1 or 2 mostly, with a long tail up to `most`: instruction data is ragged like that."""
    return min(most, max(1, round(rng.lognormvariate(0.8, 0.75))))


def _sum(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 200), rng.randint(2, 200)
    if rng.random() < 0.5:
        return [rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))], [f"{a} + {b} = {a + b}."], a + b
    a, b = max(a, b), min(a, b)
    asked = rng.choice((f"What is {a} - {b}?", f"Take {b} away from {a}."))
    return [asked], [f"{a} - {b} = {a - b}."], a - b


def _story(rng: random.Random) -> Problem:
    name, things, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 60)
    question = [
        rng.choice((f"{name} has {total} {things}.", f"{name} starts the day with {total} {things}."))
    ]
    lines = [f"At first there are {total} {things}."] if rng.random() < 0.5 else []
    for _ in range(_num_parts(rng, 12)):
        sentence, line, total = _event(rng, things, total)
        question.append(sentence)
        lines.append(line)
    return [*question, f"How many {things} does {name} have now?"], lines, total


def _event(rng: random.Random, things: str, total: int) -> tuple[str, str, int]:
    friend, place, n = rng.choice(NAMES), rng.choice(PLACES), rng.randint(2, 30)
    if total > 200 or (total > n and rng.random() < 0.45):
        n = total // 2 if total > 200 else n
        sentence = rng.choice((f"{friend} takes {n} of them.", f"{n} of them are lost at the {place}."))
        return sentence, f"After that {total} - {n} = {total - n} {things} are left.", total - n
    if total <= 60 and rng.random() < 0.2:
        return (
            f"At the {place} the number doubles.",
            f"Twice {total} is 2 * {total} = {2 * total}.",
            2 * total,
        )
    sentence = rng.choice((f"{friend} brings {n} more.", f"{n} more are bought at the {place}."))
    return sentence, f"Then there are {total} + {n} = {total + n} {things}.", total + n


def _shopping(rng: random.Random) -> Problem:
    name, place, total = rng.choice(NAMES), rng.choice(PLACES), 0
    question, lines = [f"{name} goes to the {place}."], []
    for things in rng.sample(THINGS, _num_parts(rng, 10)):
        n, price = rng.randint(2, 12), rng.randint(1, 9)
        question.append(
            rng.choice((f"{n} {things} cost ${price} each.", f"There are {n} {things} at ${price} each."))
        )
        lines.append(f"The {things} cost {n} * {price} = {n * price} dollars.")
        total += n * price
        if total > n * price:
            lines.append(f"So far that makes {total - n * price} + {n * price} = {total} dollars.")
    return [*question, f"How much does {name} pay for everything?"], lines, total


def _journey(rng: random.Random) -> Problem:
    name, vehicle, total = rng.choice(NAMES), rng.choice(VEHICLES), 0
    question, lines = [f"{name} travels by {vehicle}."], []
    for leg in range(1, _num_parts(rng, 10) + 1):
        hours, speed = rng.randint(1, 6), 5 * rng.randint(2, 18)
        question.append(f"Leg {leg} takes {hours} hours at {speed} km per hour to the {rng.choice(PLACES)}.")
        lines.append(f"Leg {leg} is {hours} * {speed} = {hours * speed} km long.")
        total += hours * speed
        if leg > 1:
            lines.append(f"Together {total - hours * speed} + {hours * speed} = {total} km.")
    return [*question, f"How far does {name} travel?"], lines, total


def _sharing(rng: random.Random) -> Problem:
    name, things, friends, each = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 25)
    total = friends * each
    question = [
        f"{name} shares {total} {things} equally among {friends} friends.",
        "How many does each of them get?",
    ]
    return question, [f"{total} / {friends} = {each} {things} for each friend."], each
