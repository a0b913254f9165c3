"""The Modelfile beside a GGUF file, from which Ollama makes a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAME = "Modelfile"


def modelfile(weights: str, ends: Sequence[str], sampling: Mapping[str, object], chat: bool) -> str:
    """The text of a Modelfile. weights: the file's name. ends: texts at which Ollama stops. chat: there is a template.

    sampling: defaults of the checkpoint, named as in `GenerationParams`.
    """
    lines = [f"# ollama create NAME -f {NAME}", f"FROM ./{weights}"]
    lines += [f'PARAMETER stop "{_escaped(text)}"' for text in dict.fromkeys(ends)]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items() if isinstance(value, int | float)]
    if chat:
        lines.append("# Ollama chooses its own form of the chat template in the GGUF file; TEMPLATE overrides it.")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
