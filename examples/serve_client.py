"""Ask a running server through the OpenAI client: a chat reply, and a completion as a stream.

Start the server first: twotower serve. The client: pip install openai.
Run: python examples/serve_client.py [http://127.0.0.1:8000/v1]
"""

import sys

from openai import APIConnectionError, OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=address, api_key="none")  # the key, if the server was started with one
try:
    model = client.models.list().data[0].id
except APIConnectionError:
    sys.exit(f"no server at {address}; start one: twotower serve")

reply = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "I need a taxi to the airport."}],
    max_tokens=64,
    temperature=0,
    extra_body={"mode": "verified"},  # what the OpenAI API does not have goes into extra_body
)
print(reply.choices[0].message.content)

stream = client.completions.create(
    model=model,
    prompt="User: Find me a restaurant in San Jose.\nAssistant:",
    max_tokens=64,
    temperature=0.7,
    seed=1,
    stop=["\nUser:"],
    stream=True,
    extra_body={"mode": "diffusion", "threshold": 0.8},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].text, end="", flush=True)
print()
