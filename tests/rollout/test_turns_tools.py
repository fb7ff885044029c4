"""A conversation with a tool, from its schema in the prompt to the answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import make
import tiny
from engines import sampling
from helpers import built_of

from dppo_cli.commands.problems import prompting_with
from dppo_cli.config.sections import Prompting
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.turns import TurnsEngine
from dppo_cli.types import Completion, Example, Prompt, Status

TOOL = '''
def multiply(a: int, b: int) -> int:
    """Multiply.

    Args:
        a: One.
        b: The other.
    """
    return a * b
'''
SAID = ['<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>', "It is 42."]


def test_a_conversation_with_a_tool(policy, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.py").write_text(TOOL)
    shows = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    policy.tokenizer.chat_template = shows + tiny.CHAT_TEMPLATE
    environment = built_of("environment=tools", "environment.path=tools.py:multiply").environment.load(make.fail)
    assert environment is not None
    prompting = prompting_with(environment, Prompting("chat", None, {}, "refuse"), policy.encoder)
    (prompt,) = policy.encode([Example("6 x 7?", "42")], prompting)
    assert policy.decode(prompt.token_ids) == "<multiply><user>6 x 7?\n<a>"
    asked: list[str] = []

    class Scripted:
        def generate(self, prompts: Sequence[Prompt], count: int, *how: Any) -> Iterator[tuple[int, list[Completion]]]:
            asked.append(policy.decode(prompts[0].token_ids))
            text = SAID[len(asked) - 1]
            yield 0, [make.completion([*policy.tokenizer(text)["input_ids"], 1], text=text)] * count

    engine = TurnsEngine(Scripted(), environment, policy, prompting)  # type: ignore[arg-type]
    ((found,),) = in_order(engine.generate([prompt], 1, sampling(400), 0, 3))
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("assistant", SAID[0]),
        ("tool", "42"),
        ("assistant", SAID[1]),
    ]
    # As far as the tokenizer knows its characters.
    assert asked[1].startswith(asked[0] + "<toolcall>") and asked[1].endswith("</toolcall>\n<tool>42\n<a>")
    assert (found.text, found.turns, found.status) == ("It is 42.", 2, Status.FINISHED)
