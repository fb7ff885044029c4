"""Static steps with slots that are filled again: tokens and log-probs are those of sampling sub-batch by sub-batch."""

import copy
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import make
import pytest
import tiny_models
import torch
from engines import generate, sampling
from plain_flash import plain_flash
from recording import RecordedGraphs, addresses
from refills import AHEAD, FAMILIES, LOOKING, check_equal, refilled, sampled, several_ends, tensors

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.kernels import slots
from dppo_cli.kernels.slots import Room
from dppo_cli.rollout import refill
from dppo_cli.rollout.blocks import Pace
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.refill import ON_CUDA, Refilling, room_for
from dppo_cli.rollout.sampling import Wanted
from dppo_cli.types import Status

paces = pytest.mark.parametrize("pace", [LOOKING, AHEAD], ids=["looking", "ahead"])
merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_models.save(root / name, name) for name in FAMILIES}


# What it samples


@pytest.mark.parametrize(
    ("family", "num_logprobs"),
    [*((family, 4) for family in FAMILIES), *(("llama", n) for n in (0, WHOLE_VOCABULARY)), ("qwen3", 0)],
)
@paces
@merging
def test_every_family(train_config, families, family, merge, pace, num_logprobs):
    config = train_config()
    config = replace(config, model=replace(config.model, path=str(families[family])))
    ends = tiny_models.SAMPLED_FROM_GEMMA3 if family == "gemma3" else range(5, 9)
    of = several_ends(make.policy(config, adapter_scale=0.1), ends)
    prompts = make.prompts(of)
    plain = generate(of, prompts, 3, sampling(20), num_logprobs, merge=merge)
    lengths = {len(c.token_ids_T) for c in make.flat(plain)}
    assert len(lengths) > 4 and Status.FINISHED in {c.status for c in make.flat(plain)}
    check_equal(sampled(of, prompts, 3, sampling(20), num_logprobs, pace=pace, merge=merge), plain)


@paces
@pytest.mark.parametrize("slots", [1, 2, 5, 7, 12, 100])
def test_any_number_of_slots(policy, slots, pace):
    """Fewer than a prompt's samples, too."""
    prompts = make.prompts(policy)
    check_equal(
        sampled(policy, prompts, 3, sampling(20), slots=slots, pace=pace), generate(policy, prompts, 3, sampling(20))
    )


@paces
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize(("group", "slots"), [(1, 3), (3, 2), (3, 5), (4, 9)])
def test_any_number_of_places(policy, monkeypatch, group, slots, at_once, pace):
    """Prompts wait for the place of one whose samples have all ended, and none is taken from a sample before."""
    monkeypatch.setattr(refill, "AT_ONCE", at_once)
    prompts = make.prompts(policy, (*make.MIXED, "2+2=", "b", "say it", "9-"))
    check_equal(
        sampled(policy, prompts, group, sampling(20), slots=slots, pace=pace),
        generate(policy, prompts, group, sampling(20)),
    )


@paces
@pytest.mark.parametrize("new", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("group", [1, 4])
def test_any_number_of_tokens_and_samples(policy, group, new, pace):
    prompts = make.prompts(policy)
    check_equal(
        sampled(policy, prompts, group, sampling(new), slots=3, pace=pace),
        generate(policy, prompts, group, sampling(new)),
    )


@paces
@pytest.mark.parametrize(
    "how",
    [
        sampling(12, temperature=0.0),
        sampling(12, temperature=1.0),
        sampling(12, temperature=3.0, top_p=0.8, top_k=9, min_p=0.02),
    ],
    ids=["greedy", "untempered", "truncated"],
)
def test_every_way_of_drawing(policy, how, pace):
    prompts = make.prompts(policy)
    check_equal(sampled(policy, prompts, 3, how, pace=pace), generate(policy, prompts, 3, how))


@paces
@pytest.mark.parametrize("slots", [1, 2, 5, 12])
@pytest.mark.parametrize("stop", [("F", "Vj", "LE"), ("+",), ("LE",), ("no such text",)], ids=str)
def test_texts_that_end_a_response(policy, stop, slots, pace):
    """The host sees them blocks later, when their slot may have moved, or be that of another sequence."""
    prompts, how = make.prompts(policy, (*make.MIXED, "2+2=", "b")), replace(sampling(30), stop=list(stop))
    plain = generate(policy, prompts, 4, how)
    stopped = [c for c in make.flat(plain) if c.status is Status.FINISHED and c.token_ids_T[-1] not in policy.eos_ids]
    assert bool(stopped) == (stop != ("no such text",))
    check_equal(sampled(policy, prompts, 4, how, slots=slots, pace=pace), plain)


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_of_sequences_that_move_again_and_again(policy, seed):
    """Through every number of rows, each block from one slot to another; what was seen of them is not lost."""
    of = several_ends(policy, range(5, 30))
    prompts, how = make.prompts(of, (*make.MIXED, "2+2=", "b")), replace(sampling(30), stop=["no such text"])
    pace = Pace(steps=1, ahead=1, rows=tuple(range(1, 33)), width=8)
    found = sampled(of, prompts, 8, how, slots=32, pace=pace, seed=seed)
    check_equal(found, sampled(of, prompts, 8, sampling(30), slots=32, pace=pace, seed=seed))


@pytest.mark.parametrize("texts", [("3+4=", "a - "), make.ALIKE, ("x",)], ids=["equal lengths", "one beginning", "one"])
def test_all_kinds_of_prompts(policy, texts):
    prompts = make.prompts(policy, texts)
    check_equal(sampled(policy, prompts, 3, sampling(20)), generate(policy, prompts, 3, sampling(20)))


@paces
def test_attention_that_reads_true_lengths(policy, monkeypatch, pace):
    """As on CUDA, with a stand-in for the kernel: through places and slots that change hands, and moves."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    prompts = make.prompts(policy, (*make.MIXED, "2+2=", "b", "say it"))
    with refilled(policy, slots=5, pace=pace) as engine:
        monkeypatch.setattr(Refilling, "_may_stay", lambda _: True)
        found = in_order(engine.generate(prompts, 2, sampling(20), 4, seed=3))
        assert engine.refilling.sequences.decoding.flash is not None
    check_equal(found, generate(policy, prompts, 2, sampling(20), 4))


def test_responses_of_one_token_and_of_all_tokens_at_once(policy):
    """Slots are filled again at every step, or never."""
    for ends in (tuple(range(96)), (-1,)):
        of = replace(policy, eos_ids=ends)
        prompts = make.prompts(of)
        check_equal(sampled(of, prompts, 3, sampling(10)), generate(of, prompts, 3, sampling(10)))


@pytest.mark.parametrize("weights", ["dequantized", "quantized"])
def test_a_4_bit_base(train_config, weights):
    of = several_ends(make.policy(train_config("adapter=qlora", "hardware.dtype=float32"), adapter_scale=0.1))
    prompts = make.prompts(of)
    with LocalRollout(weights, None, 512, 64).load(of, make.fail) as engine:
        engine.sync(0)
        plain = in_order(engine.generate(prompts, 2, sampling(), 4, seed=3))
        engine.refilling = Refilling(of, 5, make.fail, AHEAD)
        check_equal(in_order(engine.generate(prompts, 2, sampling(), 4, seed=3)), plain)


# What it keeps


def test_slots_stay_from_call_to_call_and_the_adapter_is_read_anew(policy, monkeypatch):
    monkeypatch.setattr(Refilling, "_may_stay", lambda _: True)
    graphs, prompts = RecordedGraphs(), make.prompts(policy)
    with refilled(policy, merge=False, graphs=graphs) as engine:
        first = in_order(engine.generate(prompts, 3, sampling(20), 4, seed=3))
        sequences, recorded = engine.refilling.sequences, dict(graphs.recorded)
        before = addresses(*tensors(sequences))
        make.move_adapter(policy, 0.3, seed=1)
        # Fewer and shorter ones have room, too.
        moved = in_order(engine.generate(prompts[:3], 3, sampling(20), 4, seed=3))
        assert engine.refilling.sequences is sequences and addresses(*tensors(sequences)) == before
        assert {key: graphs.recorded[key] for key in recorded} == recorded
    assert engine.refilling.sequences is None and not graphs.recorded
    check_equal(moved, generate(policy, prompts[:3], 3, sampling(20), 4, merge=False))
    assert make.tokens(moved) != make.tokens(first[:3])


def test_other_ways_of_drawing_and_records_take_the_same_slots(policy, monkeypatch):
    """Training, evaluation, training: steps are recorded once for each."""
    monkeypatch.setattr(Refilling, "_may_stay", lambda _: True)
    graphs, prompts = RecordedGraphs(), make.prompts(policy)
    of_training, of_evaluation = (sampling(20), 4), (sampling(18, 0.0), 0)
    # Each differs from training in one option.
    others = [(sampling(20), 0), (sampling(20, temperature=2.0), 4), (sampling(9), 4)]
    others += [(sampling(20, **{name: value}), 4) for name, value in (("top_p", 0.5), ("top_k", 2), ("min_p", 0.2))]
    with refilled(policy, merge=False, graphs=graphs) as engine:
        seen, recorded = [], []
        for how, num_logprobs in (of_training, of_evaluation, of_training, of_evaluation, *others, of_training):
            found = in_order(engine.generate(prompts, 2, how, num_logprobs, seed=3))
            check_equal(found, generate(policy, prompts, 2, how, num_logprobs, merge=False))
            seen.append(engine.refilling.sequences)
            recorded.append(len(graphs.recorded))
    assert len(set(map(id, seen))) == 1
    assert recorded[0] < recorded[1] == recorded[2] == recorded[3] and recorded[-1] == recorded[-2]


def test_slots_that_are_made_anew_have_room_for_the_calls_before(policy, monkeypatch):
    monkeypatch.setattr(Refilling, "_may_stay", lambda _: True)
    long, short = make.prompts(policy, ("1+1=2, 2+2=", "3", "b")), make.prompts(policy, ("3", "4"))
    with refilled(policy, slots=4, merge=False) as engine:
        seen = []
        for prompts, group, how in ((long, 1, sampling(8)), (short, 3, sampling(30)), (long, 1, sampling(8))):
            found = in_order(engine.generate(prompts, group, how, 0, seed=3))
            check_equal(found, generate(policy, prompts, group, how, merge=False))
            seen.append(engine.refilling.sequences)
    assert seen[0] is not seen[1] and seen[1] is seen[2]
    assert [one.room for one in seen[:2]] == [Room(3, 16, 3, 8), Room(3, 16, 4, 32)]


def test_slots_of_another_model_are_made_anew(policy, monkeypatch):
    monkeypatch.setattr(Refilling, "_may_stay", lambda _: True)
    with refilled(policy, merge=False) as engine:
        in_order(engine.generate(make.prompts(policy), 2, sampling(20), 0, seed=3))
        before = engine.refilling.sequences
        before.sampler = replace(before.sampler, model=copy.deepcopy(policy.model))
        in_order(engine.generate(make.prompts(policy), 2, sampling(4), 0, seed=3))
        assert engine.refilling.sequences is not before and engine.refilling.sequences.room.positions == 8


@pytest.mark.parametrize(
    ("count", "group", "slots", "expected"),
    [
        (64, 8, 64, Room(24, 256, 64, 512)),
        (8, 8, 64, Room(8, 256, 64, 512)),
        (64, 1, 48, Room(48, 256, 48, 512)),
        (64, 8, 4, Room(3, 256, 4, 512)),
        (2, 3, 64, Room(2, 256, 6, 512)),
    ],
)
def test_room_for_a_call(count, group, slots, expected):
    prompts = [make.prompt(0, (5,) * length) for length in (*[3] * (count - 1), 40)]
    assert room_for(Wanted(prompts, group, sampling(300), 0, ()), slots, ON_CUDA) == expected


@merging
def test_on_a_cpu_and_after_an_error_nothing_stays(policy, merge):
    with refilled(policy, merge=merge) as engine:
        assert len(list(engine.generate(make.prompts(policy), 2, sampling(4), 0, seed=3))) == 4
        assert engine.refilling.sequences is None
        started = engine.generate(make.prompts(policy), 2, sampling(4), 0, seed=3)
        next(started)
        slots = weakref.ref(engine.refilling.sequences)
        assert slots() is not None
        started.close()
        gc.collect()
        assert slots() is None


@pytest.mark.parametrize(("share", "stays"), [(0.05, True), (0.2, False)])
def test_on_cuda_slots_stay_if_they_are_a_small_part_of_the_memory(policy, monkeypatch, share, stays):
    """And only those over the policy itself: a copy of its weights is elsewhere each time."""
    monkeypatch.setattr(refill, "CUDA", "cpu")
    sizes: list[int] = []

    def properties(_):
        sizes.append(engine.refilling.sequences.num_bytes)
        return SimpleNamespace(total_memory=sizes[-1] / share)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    for merge in (False, True):
        with refilled(policy, merge=merge) as engine:
            in_order(engine.generate(make.prompts(policy), 2, sampling(4), 0, seed=3))
            assert (engine.refilling.sequences is not None) == (stays and not merge)
    # Keys and values of two layers with two heads of 8 numbers, in float32: four prompts, five responses.
    assert sizes == [(4 * 24 + 5 * 8) * 2 * 2 * 2 * 8 * 4]
