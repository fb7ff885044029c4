"""From text to token ids."""

import shutil
from dataclasses import replace
from pathlib import Path

import make
import pytest
import tiny
from tokenizers import Tokenizer, normalizers, processors

from dppo_cli.config.sections import Prompting
from dppo_cli.errors import ConfigError, DataError, ModelError
from dppo_cli.policy import encoder as module
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Example

TEXTS = ["1+2=", "a", "hello World\n\n", " straße 日本 😀 \u2028\x00", "<eos>a<pad>", "12+34=" * 30, "?"]
PLAIN = Prompting("plain", None, {}, "refuse")
CHATS = (Prompting("chat", None, {}, "refuse"), Prompting("chat", "be brief", {}, "refuse"))


def test_plain_prompts_are_the_text(load, tiny_models):
    policy = load(tiny_models["llama3"])
    examples = [Example("1+2=", "3", {"level": 1}), Example("a", "b", {})]
    prompts = policy.encode(examples, Prompting("plain", None, {}, "refuse"))
    characters = {c: i + 3 for i, c in enumerate(tiny.CHARACTERS)}
    assert [p.token_ids for p in prompts] == [tuple(characters[c] for c in "1+2="), (characters["a"],)]
    assert [(p.index, p.example) for p in prompts] == [(0, examples[0]), (1, examples[1])]


@pytest.mark.parametrize(
    ("system", "text"), [(None, "<user>1+2=\n<a>"), ("be brief", "<system>be brief\n<user>1+2=\n<a>")]
)
def test_chat_prompts_are_wrapped_by_the_template(load, tiny_models, system, text):
    policy = load(tiny_models["llama3"])
    (prompt,) = policy.encode([Example("1+2=", "3", {})], Prompting("chat", system, {}, "refuse"))
    assert policy.decode(prompt.token_ids) == text
    assert prompt.example.prompt == "1+2="
    assert all(isinstance(i, int) for i in prompt.token_ids)


def test_a_tokenizer_without_chat_template(load, folder):
    (folder / "chat_template.jinja").unlink()
    policy = load(folder)
    with pytest.raises(ModelError, match=r"has no chat template; use prompt\.template=plain"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", None, {}, "refuse"))
    policy.encode([Example("1+2=", "3", {})], Prompting("plain", None, {}, "refuse"))


def test_a_template_that_refuses_a_system_message(load, folder):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + tiny.CHAT_TEMPLATE)
    policy = load(folder)
    with pytest.raises(ModelError, match="System role not supported"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", "be brief", {}, "refuse"))


def test_a_response_that_does_not_fit_into_the_models_positions_is_refused(train_config, tiny_models):
    config = train_config()
    policy = make.plain_policy(tiny_models["gpt2"], config)
    prompts = policy.encode([Example("1+1=", "2"), Example("12+34=", "46")], config.prompt)
    assert policy.encoder.fitting(prompts, 250, "refuse", make.fail) == prompts
    with pytest.raises(ConfigError, match=r"problem 1 has 6 tokens.*more than the 256 positions"):
        policy.encoder.fitting(prompts, 251, "refuse", make.fail)
    told: list[str] = []
    assert policy.encoder.fitting(prompts, 251, "drop", told.append) == prompts[:1]
    assert len(told) == 1 and told[0].startswith("1 of 2 problems are too long and left out (problem 1 has 6 tokens; ")
    with pytest.raises(DataError, match=r"^every problem is too long: problem 1 has 6 tokens"):
        policy.encoder.fitting(prompts, 256, "drop", make.fail)


@pytest.fixture
def begins(tiny_models, tmp_path) -> Path:
    """A tokenizer that puts <eos> before a plain text, as Llama's does with its own mark, and drops the letter z."""
    folder = Path(shutil.copytree(tiny_models["llama3"], tmp_path / "begins"))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    backend.normalizer = normalizers.Replace("z", "")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def one_at_a_time(policy, text, prompting):
    if prompting.template == "plain":
        return tuple(policy.tokenizer(text)["input_ids"])
    system = [{"role": "system", "content": prompting.system}] if prompting.system else []
    chat = [*system, {"role": "user", "content": text}]
    return tuple(policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("model", ["llama3", "embedded", "begins"])
def test_a_batch_of_prompts_has_the_tokens_of_each(load, tiny_models, begins, monkeypatch, model):
    monkeypatch.setattr(module, "BATCH", 4)
    policy = load({"llama3": tiny_models["llama3"], "begins": begins, "embedded": "embedded:arithmetic_1m"}[model])
    for prompting in (PLAIN, *CHATS) if policy.tokenizer.chat_template else (PLAIN,):
        prompts = policy.encode([Example(text, "") for text in TEXTS], prompting)
        assert [p.token_ids for p in prompts] == [one_at_a_time(policy, text, prompting) for text in TEXTS]
        assert [(p.index, p.example.prompt) for p in prompts] == list(enumerate(TEXTS))
        assert (prompts[0].token_ids[0] == 1) == (model == "begins" and prompting.template == "plain")


def test_batches_are_small_in_prompts_and_in_characters(load, model, monkeypatch):
    policy, sizes = load(model), []
    monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    tokenizer = policy.tokenizer
    recording = replace(policy, tokenizer=lambda texts: sizes.append([len(t) for t in texts]) or tokenizer(texts))
    assert len(recording.encode([Example("a" * n, "") for n in (1, 1, 1, 1, 6, 4, 10, 2, 11, 3)], PLAIN)) == 10
    # The one of 11 is looked at first, as the beginning of what could be far too long.
    assert sizes == [[1, 1, 1], [1, 6], [4], [10], [2], [11], [11], [3]]
    assert recording.encode([], PLAIN) == []


@pytest.mark.parametrize("prompting", [PLAIN, *CHATS])
def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(load, model, prompting, monkeypatch):
    policy, seen = load(model), []
    whole = policy.encoder._token_ids
    monkeypatch.setattr(
        module.Encoder, "_token_ids", lambda _, texts, chats, p: seen.extend(map(len, texts)) or whole(texts, chats, p)
    )
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 3000)
    words = r"^problem 1 has 50,000,000 characters, .* first 3,000 .* more than the 256 positions of /.*; shorten it$"
    with pytest.raises(DataError, match=words):
        policy.encode([Example("1", ""), Example("1+2=" * 12_500_000, "")], prompting)
    assert sum(seen) == 3001


def test_a_long_prompt_of_few_tokens_is_not_refused(load, begins, monkeypatch):
    """What the tokenizer drops needs no positions: the beginning decides, not the number of characters."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 3000)
    policy = load(begins)
    (prompt,) = policy.encode([Example("z" * 100_000 + "1", "")], PLAIN)
    assert prompt.token_ids == (1, tiny.CHARACTERS.index("1") + 3)


def test_a_model_without_a_number_of_positions_has_a_generous_one(load, model, monkeypatch):
    policy = load(model)
    monkeypatch.setattr(Policy, "positions", None)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(module, "UNKNOWN_POSITIONS", 500)
    assert len(policy.encode([Example("1" * 1500, "")], PLAIN)[0].token_ids) == 1500
    prompts = policy.encode([Example("1" * 1500, "")], PLAIN)
    assert policy.encoder.fitting(prompts, 10**9, "refuse", make.fail) == prompts
    with pytest.raises(DataError, match="the first 4,000 of them alone have 4,000 tokens; that is more than the 500"):
        policy.encode([Example("1" * 5000, "")], PLAIN)


def test_a_prompt_without_tokens_is_refused(load, begins):
    policy = load(begins)
    policy.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match=r"^problem 1 \('zzz'\) gives no token; the tokenizer of /.* drops all of it$"):
        policy.encode([Example("a", ""), Example("zzz", "")], PLAIN)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no\nroles') }}", "refuses the prompt: no roles$"),
        ("{{ messages[0].content + 1 }}", "refuses the prompt: can only concatenate str"),
        ("{{ 1 // 0 }}", "refuses the prompt: integer division"),
        ("{% if %}", "refuses the prompt: Expected an expression"),
    ],
)
def test_a_template_that_fails_is_named_in_a_line(load, folder, template, words):
    (folder / "chat_template.jinja").write_text(template)
    policy = load(folder)
    with pytest.raises(ModelError, match=f"^the chat template of .* {words}"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", None, {}, "refuse"))


def test_the_template_is_given_what_the_user_sets(train_config):
    policy = make.policy(train_config())
    policy.tokenizer.chat_template = "{{ 'on' if thinking else 'off' }}{{ messages[-1].content }}"
    example = [Example("1+2=", "3", {})]
    found = [
        policy.encode(example, Prompting("chat", None, words, "refuse"))[0].token_ids
        for words in ({}, {"thinking": True})
    ]
    assert [policy.decode(ids) for ids in found] == ["off1+2=", "on1+2="]


def test_a_conversation_goes_into_the_template_as_it_is(load, tiny_models):
    policy = load(tiny_models["llama3"])
    turns = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
    ]
    own = [{"role": "system", "content": "9"}]
    chat, with_system = CHATS
    examples = [Example("2+2=", "4", messages=turns), Example("2+2=", "4", messages=own + turns), Example("3+3=", "6")]
    first, second, third = policy.encode(examples, with_system)
    ours = {"role": "system", "content": with_system.system}
    assert first.messages == [ours, *turns]
    assert second.messages == own + turns
    assert third.messages == [ours, {"role": "user", "content": "3+3="}]
    for prompt in (first, second, third):
        rendered = policy.tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)
        assert prompt.token_ids == tuple(rendered["input_ids"])
    assert policy.encode(examples, chat)[0].messages == turns
    assert policy.encode(examples[2:], PLAIN)[0].messages == ()
    with pytest.raises(DataError, match=r"conversations.*need prompt.template=chat"):
        policy.encode(examples, PLAIN)
