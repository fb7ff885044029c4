"""Shapes without numbers: the same model, adapter and layers as a run would load."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dppo_cli.algorithm.approx import Binary, Full, TopK
from dppo_cli.commands.planning import update
from dppo_cli.commands.planning.prompts import assumed_prompts
from dppo_cli.commands.planning.recorder import Recorder, Work
from dppo_cli.commands.planning.sampling import Products, sampling_cost
from dppo_cli.commands.planning.shapes import NF4_BYTES, Shapes, make_shapes, read_source
from dppo_cli.commands.planning.update import update_cost
from dppo_cli.config.sections import Hardware, LoRA, Model, Sampling
from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.policy.forward import Forward, SharedPrompts
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.packed_forward import PackedGroups
from dppo_cli.rollout.sampling import Wanted

ADAPTER = LoRA(4, 8.0, 0.0, "all-linear", None, False, False, None)
HARDWARE = Hardware("cpu", "float32", 64, 16, False, 1)
SAMPLING = Sampling(1.0, 1.0, 0, 0.0, 8, [])


def shapes_of(folder: Path, adapter: LoRA = ADAPTER, hardware: Hardware = HARDWARE) -> Shapes:
    source = read_source(Model(str(folder), None, None))
    return make_shapes(source, adapter, hardware, torch.float32, on_cpu=True)


def test_the_recorder_counts_what_is_alive_and_what_is_done() -> None:
    with Recorder() as recorder:
        a = torch.zeros(10, 20)
        b = a @ torch.zeros(20, 30)
        del a
        c = b.view(30, 10)
    # float32: 800 bytes, then 2,400 more, and 1,200 of the result; the view is none.
    assert (recorder.peak, recorder.live, recorder.made) == (4400, 1200, 4400)
    assert recorder.flops == 2 * 10 * 20 * 30
    assert c.shape == (30, 10)
    assert recorder.restart_peak() == 4400 and recorder.peak == 1200


def test_work_aside_is_told_and_not_counted_and_other_work_is_added() -> None:
    with Recorder() as recorder:
        x = torch.zeros(10, 10)
        product, work = recorder.aside(lambda: (x + 1) @ x)
    assert work == Work(flops=2000, made=800, operations=2)
    assert recorder.work == Work(made=400, operations=1) and recorder.peak == 400 and recorder.live == 800
    del product
    recorder.add(work)
    # What it makes was there beside the 400 bytes that are alive, and is gone.
    assert recorder.work == Work(flops=2000, made=1200, operations=3)
    assert recorder.peak == 1200 and recorder.live == 400


def test_asking_where_a_tensor_is_is_no_operation() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        x = torch.zeros(4)
        assert torch.ops.prim.device.default(x) == torch.device("cpu")
    assert recorder.operations == 1


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_has_the_parameters_of_the_model_that_is_loaded(family: str, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / family, family)
    policy = load_policy(Model(str(folder), None, None), HARDWARE, warn=lambda text: None, adapter=ADAPTER)
    shapes = shapes_of(folder)
    loaded = {name: tuple(p.shape) for name, p in policy.model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in shapes.policy.model.named_parameters()} == loaded
    assert shapes.trained == sum(p.numel() for p in policy.parameters)
    assert shapes.parameters == sum(p.numel() for p in policy.model.parameters()) - shapes.trained
    prompts = assumed_prompts(2, 8)
    sampling = sampling_cost(shapes, Wanted(prompts, 4, SAMPLING, 0, ()), 8, Products(False, 0))
    update = update_cost(shapes, prompts, 4, 8, HARDWARE, Binary(), reference=False)
    assert sampling.cache > 0 and update.activations > 0 and update.work.flops > 0


def test_four_bits_take_what_bitsandbytes_takes(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    quantised = replace(ADAPTER, quantization="nf4")
    shapes = shapes_of(folder, quantised)
    policy = load_policy(Model(str(folder), None, None), HARDWARE, warn=lambda text: None, adapter=quantised)
    packed = [p for p in policy.model.parameters() if hasattr(p, "quant_state")]
    assert shapes.quantised == sum(2 * p.numel() for p in packed)
    assert shapes.quantised * NF4_BYTES == pytest.approx(sum(p.numel() * (1 + 1 / 32) for p in packed), rel=0.001)
    assert len(shapes.adapted) == len(packed)


@pytest.mark.parametrize("change", [dict(use_dora=True), dict(dropout=0.1), dict(quantization="nf4")], ids=str)
def test_every_kind_of_adapter_runs(change: dict[str, object], tmp_path: Path) -> None:
    shapes = shapes_of(tiny.save(tmp_path / "m"), replace(ADAPTER, **change))  # type: ignore[arg-type]
    plain = shapes_of(tiny.save(tmp_path / "m"))
    args = (assumed_prompts(2, 8), 4, 8, HARDWARE, Binary(), False)
    assert update_cost(shapes, *args).activations >= update_cost(plain, *args).activations


def test_checkpointing_keeps_less_and_does_more(tmp_path: Path) -> None:
    folder, checkpointing = tiny.save(tmp_path / "m"), replace(HARDWARE, gradient_checkpointing=True)
    prompts = assumed_prompts(2, 8)
    plain = update_cost(shapes_of(folder), prompts, 4, 32, HARDWARE, Binary(), False)
    less = update_cost(shapes_of(folder, hardware=checkpointing), prompts, 4, 32, checkpointing, Binary(), False)
    assert less.activations < 0.3 * plain.activations
    assert less.work.flops > 1.2 * plain.work.flops


@pytest.mark.parametrize(("kind", "budgets"), [(SharedPrompts, (128, 512)), (PackedGroups, (132, 528))])
def test_a_micro_batch_grows_with_its_budget_and_an_update_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Forward], budgets: tuple[int, int]
) -> None:
    """Packed, a prompt counts, too."""
    monkeypatch.setattr(update, "choose_for", lambda *_: kind)
    shapes, prompts = shapes_of(tiny.save(tmp_path / "m")), assumed_prompts(8, 8)
    small, large = (
        update_cost(shapes, prompts, 4, 31, replace(HARDWARE, tokens_per_micro_batch=budget), Binary(), False)
        for budget in budgets
    )
    assert (small.samples, small.micro_batches, large.samples, large.micro_batches) == (4, 8, 16, 2)
    assert large.activations == pytest.approx(4 * small.activations, rel=0.1)
    assert large.work.flops == pytest.approx(small.work.flops, rel=0.1)


def test_the_head_needs_what_the_approximation_looks_at(tmp_path: Path) -> None:
    shapes, prompts = shapes_of(tiny.save(tmp_path / "m", vocabulary=4096)), assumed_prompts(4, 8)
    chunk = 16 * 4096 * 4
    binary, top, full = (
        update_cost(shapes, prompts, 4, 16, HARDWARE, approx, False).head for approx in (Binary(), TopK(20), Full())
    )
    assert 2 * chunk <= binary <= 3 * chunk
    assert binary <= top <= full and full >= binary + chunk


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: None, "there is no model folder"),
    ],
    ids=["empty", "none"],
)
def test_a_folder_without_a_config_is_refused(make: Callable[[Path], None], line: str, tmp_path: Path) -> None:
    make(tmp_path / "m")
    with pytest.raises(ModelError, match=line):
        read_source(Model(str(tmp_path / "m"), None, None))


def test_layers_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules"):
        shapes_of(tiny.save(tmp_path / "m"), replace(ADAPTER, target_modules=["no_such_layer"]))
