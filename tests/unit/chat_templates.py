"""Chat templates in the styles that are in use, written anew and short."""

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' ~ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "llama 2": """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must go user, assistant, user, ...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system is not false %}
        {%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}{% set text = message['content'] %}{% endif %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "llama 3, with today's date": """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "1 Jan 2024" %}{% endif %}
{%- endif %}
{%- if not tools is defined or tools is none %}{% set tools = none %}{% endif %}
{%- set head %}{{ '<|start|>' }}{% endset %}
{{- bos_token ~ head ~ "system\\n\\n" }}
{%- if tools is not none %}{{- "Tools: " ~ tools | tojson }}{% endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{% endif %}
""",
    "mistral, strict": """\
{%- set ns = namespace(index=0, users=0) %}
{%- set loop_messages = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- for message in loop_messages %}
    {%- if not (message.tool_calls is defined and message.tool_calls) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and messages[0].role == 'system' %}
            {{- "[INST] " + messages[0].content + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{% endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- else %}{{- raise_exception("Unknown role " ~ message.role) }}{% endif %}
{%- endfor %}
{%- if user_messages | length == 0 %}{{ raise_exception("no user") }}{% endif %}""",
    "gemma, without system": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}
""",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "qwen 3, thinking": """\
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string
            and not message.content.startswith('<result>') %}
        {%- set ns.found = true %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>' ~ thoughts.strip('\\n') ~ '</think>' }}{% endif %}
        {{- message.role ~ ': ' ~ content ~ '\\n' }}
    {%- else %}{{- message.role ~ ': ' ~ message.content ~ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant: ' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{% endif %}
{%- endif %}""",
    "json, loop controls, generation": """\
{% macro show(value, indent=none) -%}
    {{ value | tojson(indent=indent) }}
{%- endmacro %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% generation %}{% set seen = message.role %}{{ show(message, 2) }}{% endgeneration %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
    {{ seen is defined }}
{% endfor %}
{{ messages | tojson(true) }}{{ messages | tojson(false, none, (',', ':'), true) }}
{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}
{{ dict(a=1) | items | list }} {{ pad_token }} {{ unknown_token }} {{ documents is none }} {{ tools is none }}

""",
}
