"""Small tasks with one right answer each, made by program: something to learn and to measure on.

Every task is a function from a random generator to a question and its answer. `rows` mixes them into
conversations; equal seeds give equal rows on every machine, and rows of different seeds share no
question.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Task = Callable[[Random], tuple[str, str]]

SYSTEM = "Answer with the result only."

_NAMES = (
    *("Ada", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Kira"),
    *("Leo", "Maria", "Nils", "Olga", "Paul", "Rosa", "Sven", "Tara", "Victor", "Wanda", "Yusuf"),
)
_CITIES = (
    *(
        "Lima",
        "Oslo",
        "Rome",
        "Cairo",
        "Paris",
        "Quito",
        "Tokyo",
        "Delhi",
        "Dublin",
        "Lagos",
        "Milan",
    ),
    *("Vienna", "Boston", "Madrid", "Athens", "Berlin", "Prague", "Sydney", "Nairobi", "Toronto"),
)
_WORDS = (
    *(
        "apple",
        "bread",
        "chair",
        "dream",
        "earth",
        "flame",
        "grass",
        "house",
        "island",
        "juice",
        "light",
    ),
    *("money", "night", "ocean", "paper", "river", "stone", "table", "water", "winter", "yellow"),
)
_UNITS = (
    *(("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("g", "mg", 1000)),
    *(("l", "ml", 1000), ("t", "kg", 1000), ("s", "ms", 1000)),
)
_PEOPLE = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, from {city}",
    "In {city} lives {name}, who is {age}.",
    "My friend {name} turned {age} last week in {city}.",
)


def extract_json(random: Random) -> tuple[str, str]:
    """Three facts from a sentence, as JSON."""
    facts = {
        "name": random.choice(_NAMES),
        "age": random.randint(18, 90),
        "city": random.choice(_CITIES),
    }
    sentence = random.choice(_PEOPLE).format(**facts)
    return f"Write as JSON with name, age and city: {sentence}", json.dumps(facts)


def convert_units(random: Random) -> tuple[str, str]:
    """A metric length, mass, volume or time in a smaller unit."""
    big, small, factor = random.choice(_UNITS)
    amount = random.randint(2, 99)
    return f"Convert {amount} {big} to {small}.", f"{amount * factor} {small}"


def add_days(random: Random) -> tuple[str, str]:
    """The date a few days after another."""
    start = datetime.date(2020, 1, 1) + datetime.timedelta(random.randrange(3650))
    days = random.randint(1, 9)
    return f"Which date is {days} days after {start}?", str(start + datetime.timedelta(days))


def reverse_words(random: Random) -> tuple[str, str]:
    """Words in the opposite order."""
    words = random.sample(_WORDS, 4)
    return f"Reverse the order of the words: {' '.join(words)}", " ".join(reversed(words))


def initials(random: Random) -> tuple[str, str]:
    """The first letters of a name."""
    names = random.sample(_NAMES, 3)
    return f"Give the initials of {' '.join(names)}.", "".join(f"{name[0]}." for name in names)


def sort_numbers(random: Random) -> tuple[str, str]:
    """Three numbers from small to large."""
    numbers = random.sample(range(10, 100), 3)
    text = lambda values: ", ".join(map(str, values))  # noqa: E731
    return f"Sort from small to large: {text(numbers)}", text(sorted(numbers))


TASKS: Mapping[str, Task] = {
    task.__name__: task
    for task in (extract_json, convert_units, add_days, reverse_words, initials, sort_numbers)
}


def rows(
    count: int,
    seed: int = 0,
    *,
    without: frozenset[str] = frozenset(),
    tasks: Mapping[str, Task] = TASKS,
) -> list[dict[str, Any]]:
    """Conversations of one question, in turn from each task, no question twice.

    Args:
        count: how many.
        seed: of the questions.
        without: questions not to ask: those of the training rows, when making held-out ones.
        tasks: by name.

    Returns:
        Dicts with `task` and `messages`: system, user and assistant.
    """
    random = Random(seed)
    made: list[dict[str, Any]] = []
    seen = set(without)
    names = list(tasks)
    while len(made) < count:
        name = names[len(made) % len(names)]
        question, answer = tasks[name](random)
        if question not in seen:
            seen.add(question)
            made.append({"task": name, "messages": _messages(question, answer)})
    random.shuffle(made)
    return made


def questions(rows: list[dict[str, Any]]) -> frozenset[str]:
    """What the rows ask."""
    return frozenset(row["messages"][1]["content"] for row in rows)


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
