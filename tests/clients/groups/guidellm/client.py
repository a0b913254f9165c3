"""guidellm measures streamed chats and completions. Every text has the number of tokens that it asks for."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENIZER = Path(__file__).parents[4] / "src" / "twotower" / "assets" / "small"
REQUESTS, TOKENS = 3, 12
target = sys.argv[1].removesuffix("/v1")

for request_format in ("/v1/chat/completions", "/v1/completions"):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        options = {
            "--backend": f"kind=openai_http,target={target},request_format={request_format}",
            "--profile": "kind=synchronous",
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--tokenizer": f"kind=hf_auto,model={TOKENIZER}",
            "--data": f"kind=synthetic_text,prompt_tokens=24,output_tokens={TOKENS}",
            "--output": f"kind=json,path={out}",
        }
        program = Path(sys.executable).with_name("guidellm")
        command = [str(program), "run", "--disable-console", *(part for pair in options.items() for part in pair)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), totals
    for request in benchmark["requests"]["successful"]:
        assert request["output_tokens"] == TOKENS, request
        assert request["time_to_first_token_ms"] > 0, request
