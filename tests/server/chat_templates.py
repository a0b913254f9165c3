"""Short chat templates with the calls, tools and reasoning of published ones; they have no sentence of these.

The name of a template begins with the name of the parser of its calls.
"""

from __future__ import annotations

HERMES = """
{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
<tool_call>
{"name": <name>, "arguments": <object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{%- if m.role == "tool" %} ={{ m.tool_call_id }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

# Nemotron 3: the prompt begins the reasoning. Qwen3-Coder has the same calls.
QWEN3_CODER = """
{%- for tool in tools or [] %}<function>{{ tool.function.name }}</function>{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for name, value in call.function.arguments | items %}<parameter={{ name }}>
{{ value }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking | default(true) %}<think>
{% else %}<think></think>{% endif %}{% endif %}"""

NEMOTRON_JSON = """
{%- if tools %}<AVAILABLE_TOOLS>[{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}]</AVAILABLE_TOOLS>
{% endif %}
{%- for m in messages %}<SPECIAL_11>{{ m.role }}
{{ m.content }}
{%- if m.tool_calls %}<TOOLCALL>[{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}]</TOOLCALL>
{%- endif %}
<SPECIAL_12>
{% endfor %}<SPECIAL_11>Assistant
<think>
"""

LLAMA = """
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.first %}{"name": function name, "parameters": dictionary of argument name and its value}
{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{"name": "{{ call.function.name }}",
{#- #} "parameters": {{ call.function.arguments | tojson }}}{% endfor %}<|eot_id|>
{%- endfor %}<|start_header_id|>assistant<|end_header_id|>

"""

MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("An id must have nine characters.") }}{% endif %}
{{- call.function | tojson }}{% endfor %}]
{%- elif m.role == "tool" %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
{%- else %}[INST]{{ m.content }}[/INST]{% endif %}
{%- endfor %}"""

TEMPLATES = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "nemotron_json": NEMOTRON_JSON,
    "nemotron_json/small": "<toolcall> {{ messages }} </toolcall>",
    "llama3_json": LLAMA,
    "llama3_json/tag": "<|python_tag|>{{ messages }}",
    "mistral": MISTRAL,
}
