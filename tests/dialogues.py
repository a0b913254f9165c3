"""Prompts of the kind that the bundled models were trained on."""

from __future__ import annotations

import random


def dialogues(count: int, most: int = 12) -> list[str]:
    """Prompts of 1 to `most` turns; 12 turns have about 130 words, 36 turns up to 663 tokens."""
    rng = random.Random(0)
    turns = [
        "User: I want to book a table for {} in San Jose.", "Assistant: What time do you want to eat?",
        "User: At {} in the evening, please.", "Assistant: Do you have a preferred type of food?",
        "User: Something Italian that is not too expensive.", "User: I need a taxi to the airport for {} people.",
        "User: Can you find me a hotel in London with {} stars?", "Assistant: I found {} places. Shall I book one?",
        "User: No, thanks. I would like to hear some music by a new artist.",
    ]  # fmt: skip
    return [
        "\n".join(rng.choice(turns).format(rng.randint(1, 12)) for _ in range(rng.randint(1, most))) + "\nAssistant:"
        for _ in range(count)
    ]
