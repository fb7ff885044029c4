"""From text to token ids."""

import make
import pytest
import tiny

from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.types import Example


def test_plain_prompts_are_the_text(load, tiny_models):
    policy = load(tiny_models["llama3"])
    examples = [Example("1+2=", "3", {"level": 1}), Example("a", "b", {})]
    prompts = policy.encode(examples, Prompting("plain", None))
    characters = {c: i + 3 for i, c in enumerate(tiny.CHARACTERS)}
    assert [p.token_ids for p in prompts] == [tuple(characters[c] for c in "1+2="), (characters["a"],)]
    assert [(p.index, p.example) for p in prompts] == [(0, examples[0]), (1, examples[1])]


@pytest.mark.parametrize(
    ("system", "text"), [(None, "<user>1+2=\n<a>"), ("be brief", "<system>be brief\n<user>1+2=\n<a>")]
)
def test_chat_prompts_are_wrapped_by_the_template(load, tiny_models, system, text):
    policy = load(tiny_models["llama3"])
    (prompt,) = policy.encode([Example("1+2=", "3", {})], Prompting("chat", system))
    assert policy.decode(prompt.token_ids) == text
    assert prompt.example.prompt == "1+2="
    assert all(isinstance(i, int) for i in prompt.token_ids)


def test_a_tokenizer_without_chat_template(load, folder):
    (folder / "chat_template.jinja").unlink()
    policy = load(folder)
    with pytest.raises(ModelError, match=r"has no chat template; use prompt\.template=plain"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", None))
    policy.encode([Example("1+2=", "3", {})], Prompting("plain", None))


def test_a_template_that_refuses_a_system_message(load, folder):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + tiny.CHAT_TEMPLATE)
    policy = load(folder)
    with pytest.raises(ModelError, match="System role not supported"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", "be brief"))


def test_a_response_that_does_not_fit_into_the_models_positions_is_refused(train_config, tiny_models):
    config = train_config()
    policy = make.plain_policy(tiny_models["gpt2"], config)
    prompts = policy.encode([Example("1+1=", "2"), Example("12+34=", "46")], config.prompt)
    policy.check_length(prompts, 250)
    with pytest.raises(ConfigError, match=r"problem 1 has 6 tokens.*more than the 256 positions"):
        policy.check_length(prompts, 251)
