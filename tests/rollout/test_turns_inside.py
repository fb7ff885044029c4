"""Replies within the model's own turn, and the texts that interrupt it."""

import make
import torch
from conversations import BOUND, STOPS, always, generate, parts
from engines import ROUNDING, sampling, trained

from dppo_cli.config.sections import Sampling


def test_a_reply_goes_on_with_the_models_own_turn(policy) -> None:
    """Where the model has written one of the texts; its own end is the end."""
    environment = always("99", role="assistant", stop=list(STOPS), turns=2)
    found = make.flat(generate(policy, environment, make.prompts(policy), group=8))
    asked = [said for _, said, _ in environment.asked]
    assert asked and all(len(said) == 1 and said[0]["content"][-1] in STOPS for said in asked)
    for c in found:
        assert c.messages == () and c.text == policy.decode(c.token_ids_T.tolist())
        for turn, (sampled, ids) in enumerate(parts(c)):
            text = policy.decode(ids)
            assert text == "99" if not sampled else not set(STOPS) & set(text[:-1]) or turn == 2
    last = [parts(c)[2][1] for c in found if len(parts(c)) == 3]
    assert last and any(set(STOPS) & set(policy.decode(ids)[:-1]) for ids in last), "nothing interrupts the last turn"


def test_an_empty_reply_leaves_the_text_as_it_was(policy) -> None:
    prompts = make.prompts(policy)
    environment = always("", role="assistant", stop=["a"], turns=9)
    found = make.flat(generate(policy, environment, prompts, how=sampling(30)))
    assert environment.asked and all(bool(c.sampled_T.all()) for c in found)
    torch.testing.assert_close(
        trained(policy, prompts, [found[i : i + 3] for i in range(0, len(found), 3)]),
        torch.cat([c.mu.logp_N for c in found]),
        **ROUNDING,
    )


def test_a_stop_string_of_sampling_ends_the_response_or_the_turn(policy) -> None:
    how = Sampling(1.0, 1.0, 0, 0.0, BOUND, ["a"])
    inside = always("9", role="assistant", stop=["7"], turns=4)
    for c in make.flat(generate(policy, inside, make.prompts(policy), how=how)):
        assert all("a" not in policy.decode(ids) for _, ids in parts(c)[:-1])
    assert all("a" not in said[-1]["content"] for _, said, _ in inside.asked)
    beside = always("9", turns=2)
    generate(policy, beside, make.prompts(policy), how=how)
    assert beside.asked, "a turn that it ends is answered"


def test_the_text_of_a_special_token_interrupts_a_turn(policy) -> None:
    """It is in no decoded text."""
    environment = always("99", role="assistant", stop=["<eos>"], turns=3)
    found = make.flat(generate(policy, environment, make.prompts(policy), group=8))
    ended = [c for c in found if policy.tokenizer.eos_token_id in parts(c)[0][1]]
    assert ended and len(environment.asked) >= len(ended)
    assert all(policy.decode(parts(c)[1][1]) == "99" for c in ended if len(parts(c)) > 1)
