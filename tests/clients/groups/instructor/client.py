"""Instructor's default mode: a forced call of one function."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1], api_key="x", max_retries=0))


class Trip(BaseModel):
    """A trip."""

    city: Literal["Ulm", "Bonn"]
    days: Literal[1, 2]


ASK = {"role": "user", "content": "A trip to Ulm."}
common = {"model": "small", "response_model": Trip, "messages": [ASK], "max_tokens": 200, "max_retries": 0}
assert isinstance(client.chat.completions.create(**common), Trip)
*_, last = client.chat.completions.create_partial(**common)
assert last.days in (1, 2)
