"""A chat template as models have them: tools, a system message, roles that must alternate."""

TEMPLATE = """\
{%- if tools %}{{ "<|im_start|>system\\n# Tools " ~ (tools | tojson) ~ "<|im_end|>\\n" }}{% endif %}
{%- for message in messages if message.role == "system" %}
{{- "<|im_start|>system\\n" ~ message.content ~ " <|im_end|>\\n" }}
{%- endfor %}
{%- for message in messages | rejectattr("role", "equalto", "system") %}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("roles must alternate: user, assistant, user, ...") }}
{%- endif %}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ " <|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

MESSAGES = [
    {"role": "system", "content": "t9 t8 be brief"},
    {"role": "user", "content": "t5 t6 t7"},
    {"role": "assistant", "content": "t11 t12"},
    {"role": "user", "content": "t13 once upon a time"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "t20 of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
