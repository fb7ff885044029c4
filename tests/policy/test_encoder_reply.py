"""What is put after a turn of the model, token by token, in the forms that chat templates have."""

import make
import pytest
import tiny

from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ModelError
from dppo_cli.policy.encoder import Encoder
from dppo_cli.types import Messages

EOS = 1
WORD = 20
CHAT = Prompting("chat", None, {}, "refuse")
USER = [{"role": "user", "content": "no, again"}]

TEMPLATES = {
    # As ChatML has it: each message ends, then a new line.
    "ends": "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}",
    # As Mistral has it: only the model's turn ends.
    "model ends": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>{% else %}|{{ m.content }}|"
    "{% endif %}{% endfor %}",
    # As Llama 2 has it: a space before the end.
    "space": "{% for m in messages %}<{{ m.role }}>{{ m.content }} <eos>{% endfor %}",
    # Nothing that the model would end with.
    "no end": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
    # As Qwen 3 has it: the last turn of the model is written otherwise than those before it.
    "thinks": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<eos>\n{% endfor %}",
}
END = "{% if add_generation_prompt %}<a>{% endif %}"
AFTER = {
    "ends": "\n<user>no, again<eos>\n<a>",
    "model ends": "|no, again|<a>",
    "space": "<user>no, again <eos><a>",
    "no end": "\n<user>no, again\n<a>",
    "thinks": "\n<user>no, again<eos>\n<a>",
}


def encoder(template: str | None) -> Encoder:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, "mine", None)


def text(of: Encoder, messages: Messages, prompting: Prompting = CHAT, ended_by: int = EOS) -> str:
    return str(of.tokenizer.decode(of.reply(messages, prompting, (EOS,), ended_by)))


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_reply_goes_after_the_models_turn(form: str) -> None:
    of = encoder(TEMPLATES[form] + END)
    assert text(of, USER) == AFTER[form]
    # A turn that a stop string has ended is ended first, where the template does so.
    assert text(of, USER, ended_by=WORD) == ("" if form == "no end" else "<eos>") + AFTER[form]


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_conversation_is_what_the_template_makes_of_it(form: str) -> None:
    """Prompt, turn and reply one after the other are the whole conversation."""
    of = encoder(TEMPLATES[form] + END)
    (prompt,) = of.encode([make.prompt().example], CHAT)
    turn = of.tokenizer("46", add_special_tokens=False)["input_ids"]
    ids = [*prompt.token_ids, *turn, EOS, *of.reply(USER, CHAT, (EOS,), EOS)]
    assert isinstance(prompt.messages, list)
    chat = [*prompt.messages, {"role": "assistant", "content": "46"}, *USER]
    whole = of.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    found = str(of.tokenizer.decode(ids))
    assert found.replace("<a>46", "<assistant>46" if form != "model ends" else "46") == (
        whole.replace("46\n", "46<eos>\n").replace("46 <eos>", "46<eos>") if form in ("no end", "space") else whole
    )


def test_several_messages_and_those_of_tools() -> None:
    of = encoder(TEMPLATES["ends"] + END)
    said = [{"role": "tool", "content": "42"}, {"role": "tool", "content": "43"}]
    assert text(of, said) == "\n<tool>42<eos>\n<tool>43<eos>\n<a>"


def test_plain_prompts_and_the_models_own_turn_get_the_text_alone() -> None:
    plain = Prompting("plain", None, {}, "refuse")
    assert text(encoder(None), USER, plain) == text(encoder(None), USER, plain, ended_by=WORD) == "no, again"
    inside = [{"role": "assistant", "content": " 42"}]
    assert text(encoder(TEMPLATES["ends"] + END), inside, ended_by=WORD) == " 42"


def test_what_the_template_is_given_besides() -> None:
    of = encoder(TEMPLATES["ends"] + "{% if add_generation_prompt %}<a>{{ mood }}{% endif %}")
    assert text(of, USER, Prompting("chat", None, {"mood": "sad"}, "refuse")).endswith("<a>sad")


def test_templates_that_refuse_or_forget() -> None:
    refuses = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match="the chat template of mine refuses the prompt: no tools"):
        text(encoder(refuses), [{"role": "tool", "content": "42"}])
    forgets = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match="the chat template of mine leaves out what the model has said before a reply"):
        text(encoder(forgets), USER)
    with pytest.raises(ModelError, match=r"has no chat template; use prompt\.template=plain"):
        text(encoder(None), USER)


def test_whether_a_template_shows_tools() -> None:
    shown = Prompting("chat", None, {"tools": [{"function": {"name": "f"}}]}, "refuse")
    assert encoder("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TEMPLATES["ends"]).shows_tools(shown)
    assert not encoder(TEMPLATES["ends"]).shows_tools(shown)
