"""The Modelfile's template: what Ollama makes of a conversation is what the chat template makes of it."""

import re

import gguf_files
import pytest

from dppo_cli.commands.exporting.modelfile import chat_template


def in_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a template of the one form that we write."""
    beginning, turns = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}", template, re.DOTALL).groups()
    has_system = any(m["role"] == "system" for m in messages)
    unless = re.fullmatch(r"\{\{ if not \.System \}\}(.*)\{\{ end \}\}", beginning, re.DOTALL)
    text = beginning if unless is None else "" if has_system else unless[1]
    branches = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', turns, re.DOTALL))
    return text + "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)


CHAT_TEMPLATES = {
    "default system message": gguf_files.CHAT_TEMPLATE,
    "no system message": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "thinking": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not think %}<think></think>{% endif %}{% endif %}",
}


@pytest.mark.parametrize("kind", CHAT_TEMPLATES)
def test_a_chat_template_for_ollama(kind: str) -> None:
    tokenizer = gguf_files.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES[kind]
    options = {"think": kind == "thinking"}
    template = chat_template(tokenizer, options)
    assert template is not None
    turns = [("user", "1+1="), ("assistant", "2"), ("user", "and 2+2?")]
    conversations = [turns[:1], turns, [("system", "Be brief."), *turns[:1]], [("system", "Be brief."), *turns]]
    for conversation in conversations[: 2 if kind == "no system message" else 4]:
        messages = [{"role": role, "content": text} for role, text in conversation]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        assert in_go(template, messages) == expected


def test_an_end_of_sequence_closes_its_own_message() -> None:
    template = chat_template(gguf_files.tokenizer(), {})
    assert template is not None
    assert template.startswith("{{ if not .System }}<s>Be kind.<eos>{{ end }}{{ range .Messages }}")
    assert '{{ if eq .Role "assistant" }}{{ .Content }}<eos>{{ end }}' in template


@pytest.mark.parametrize(
    "template",
    [
        # The system message inside the user's, as Gemma has it; history that changes; no template language at all.
        "{% for m in messages %}{% if m.role == 'system' %}{% else %}<{{ m.role }}>{% if loop.index == 2 and "
        "messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content[:3] }}{% endfor %}",
        "{{ nothing(",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '{{ x }}' }}{% endfor %}<assistant>",
    ],
)
def test_a_chat_template_that_cannot_be_said_in_one_form(template: str) -> None:
    tokenizer = gguf_files.tokenizer()
    tokenizer.chat_template = template
    assert chat_template(tokenizer, {}) is None
