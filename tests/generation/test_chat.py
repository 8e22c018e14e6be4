"""A chat template renders as `apply_chat_template` of transformers renders it."""

import json

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

from nsa_lightning.generation.chat import ChatTemplate

LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}{{- raise_exception("no tools here") }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
    {%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{{- ns.last_query_index }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}{%- endif %}
    {%- if message["role"] == "user" %}{{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}{%- endif %}
{%- endfor %}
"""
MARKED = "{% for m in messages %}{% if m['role'] == 'user' %}{% generation %}{% set x = 1 %}{{ m['content'] }}\n"
MARKED += "{% endgeneration %}{% else %}-{% endif %}{{ x }}{% endfor %}"
TEMPLATES = {
    "llama 3": LLAMA3,
    "qwen 2.5": QWEN25,
    "qwen 3": QWEN3,
    "mistral": MISTRAL,
    "generation": MARKED,
    "generation with its own spaces": "a {%- generation -%} b {%- endgeneration %} c",
    "tools is none": "{% if tools is none %}none{% endif %}{% if documents is none %}none{% endif %}" + LOOP,
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ 'é<b>' | tojson(ensure_ascii=true) }}",
    "tojson sorted": "{{ {'b': 1, 'a': '<&\\''} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "loop controls": "{% for i in [1, 2, 3, 4] %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "every name": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|{{ my_token }}",
    "defined": "{{ bos_token is defined }}{{ pad_token is defined }}{{ enable_thinking is defined }}",
    "dict": "{{ dict(a=1).items() | list }}",
    "spaces": "  {% if true %}\n  a\n  {% endif %}\n{{ messages[0].content | trim }}\n",
}
NAMES = {
    "bos_token": {"content": "<s>", "special": True, "__type": "AddedToken"},
    "eos_token": "</s>",
    "pad_token": None,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def write(directory, settings, **files):
    library = Library(models.BPE({"a": 0}, []))
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    )
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)


def true(transformers, directory, prompt):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_with_transformers(transformers, tmp_path, name):
    write(
        tmp_path,
        NAMES
        | {"chat_template": TEMPLATES[name], "image_token": "<image>", "extra_special_tokens": {"my_token": "<my>"}},
    )
    for prompt in ("a<b> & 'é' \"海\"", " spaces \n"):
        assert ChatTemplate(tmp_path).render(prompt) == true(transformers, tmp_path, prompt)


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}, {}),
        ({"chat_template": "x"}, {"chat_template.jinja": "y"}),
        ({"chat_template": "x"}, {"chat_template.jinja": "y", "additional_chat_templates/tool_use.jinja": "z"}),
        ({}, {"special_tokens_map.json": '{"bos_token": "</s>"}', "chat_template.jinja": "{{ bos_token }}"}),
        (
            {"bos_token": "<s>"},
            {"special_tokens_map.json": '{"bos_token": {"content": "</s>"}}', "chat_template.jinja": "{{ bos_token }}"},
        ),
        (
            {"bos_token": "<s>", "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}},
            {"special_tokens_map.json": '{"bos_token": "</s>"}', "chat_template.jinja": "{{ bos_token }}"},
        ),
    ],
)
def test_the_template_and_the_names_are_those_that_transformers_reads(transformers, tmp_path, settings, files):
    write(tmp_path, settings, **files)
    rendered = ChatTemplate(tmp_path).render("a")
    assert rendered == true(transformers, tmp_path, "a")
    assert rendered


def test_of_named_templates_without_a_default_none_is_taken(tmp_path):
    for settings, files in (
        ({"chat_template": [{"name": "tool_use", "template": "x"}]}, {}),
        ({"chat_template": "x"}, {"additional_chat_templates/tool_use.jinja": "z"}),
    ):
        write(tmp_path, settings, **files)
        with pytest.raises(ValueError, match="chat must be false where the tokenizer has no chat template"):
            ChatTemplate(tmp_path)
