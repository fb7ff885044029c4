"""The host's side of sampling with static steps: which sequence is in which slot, and when it looks what has ended.

The device is given blocks of steps. While one runs, the host reads which sequences had ended in the block before, takes
them out, gives their slots to the next of the queue, and hands on the prompts whose samples have all ended. So the
device never waits for the host, and the tokens never depend on how fast either is.

Shapes: S slots, T the most tokens of a response, G samples per prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from dppo_cli.kernels.graphs import Graphs
from dppo_cli.kernels.slots import Room
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.record import report_of
from dppo_cli.rollout.sampling import Sampled, Wanted
from dppo_cli.rollout.static import OnHost, Prefilled, StaticSequences, prefill, sent
from dppo_cli.rollout.stop_strings import StopStrings
from dppo_cli.types import Prompt


@dataclass(frozen=True)
class Pace:
    """How blocks are made.

    `steps`: of a block; `ahead`: blocks that the device is given before the host looks at the one before. `rows`:
    numbers of rows that there are steps for, above the last its multiples; `width`: positions that attention reads, and
    those of places and slots, are rounded up to multiples of it. Fewer of either make fewer graphs. `prompt_tokens`: of
    prompts that run at once, with their padding, or of one prompt. More would take memory and should hardly save time
    (not measured): so many rows keep a device's multipliers busy.
    """

    steps: int
    ahead: int
    rows: Sequence[int] = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    width: int = 256
    prompt_tokens: int = 4096

    def parts(self, prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """Prompts that run at once, in their order."""
        start, longest = 0, 0
        for end, prompt in enumerate(prompts):
            longest = max(longest, len(prompt.token_ids))
            if end > start and (end + 1 - start) * longest > self.prompt_tokens:
                yield prompts[start:end]
                start, longest = end, len(prompt.token_ids)
        yield prompts[start:]


@dataclass
class Occupant:
    """The host's view of a sequence in a slot. `steps`: what it was given so far, whether or not it has ended."""

    number: int
    sample: int
    slot: int
    steps: int = 0
    tokens: list[int] = field(default_factory=list)  # that the host has seen, where it looks for stop strings


@dataclass
class Waiting:
    """A prompt in its place, and the next of its samples that gets a slot."""

    number: int
    place: int
    uniform_TG: Tensor
    sample: int = 0


class Blocks:
    """One call: `groups()` once. `opened` makes the slots, from the states of prompts, which tell their shapes.

    `room`: places and slots that this call takes. A prompt keeps its place until the last of its samples has ended; if
    no place is free, the next prompts wait, and slots may be empty meanwhile. `stops`: texts that end a response, too;
    the device does not know of them, and goes on until the host has seen one.
    """

    def __init__(
        self,
        sampler: Sampler,
        wanted: Wanted,
        pace: Pace,
        room: Room,
        pad_id: int,
        graphs: Graphs,
        opened: Callable[[Prefilled], StaticSequences],
        stops: StopStrings | None = None,
    ) -> None:
        self.sampler, self.wanted, self.pace, self.pad_id = sampler, wanted, pace, pad_id
        self.graphs, self.opened, self.stops = graphs, opened, stops
        self.recent = 0 if stops is None else pace.steps
        self.device = sampler.head.weight_VH.device
        self.most = wanted.sampling.max_new_tokens
        self.occupants: list[Occupant | None] = [None] * room.slots
        self.queue = deque(range(len(wanted.prompts)))
        self.waiting: deque[Waiting] = deque()
        self.places = deque(range(room.prompts))  # that are free
        self.place_of: dict[int, int] = {}
        self.sequences: StaticSequences | None = None
        self.looks: deque[tuple[list[Occupant | None], OnHost]] = deque()
        self.found: list[dict[int, OnHost]] = [{} for _ in wanted.prompts]
        self.complete: deque[int] = deque()

    def groups(self) -> Iterator[tuple[int, list[Sampled]]]:
        """Each prompt's number and its responses, on the host, when they have all ended."""
        while True:
            self._fill()
            launched = self._launch()
            # Only now, so that the device has something to do meanwhile.
            while self.complete:
                number = self.complete.popleft()
                yield number, [self._sampled(self.found[number].pop(g)) for g in range(self.wanted.group)]
            if not self.looks:
                return
            if not launched or len(self.looks) > self.pace.ahead:
                self._look()

    def _fill(self) -> None:
        """Give free slots to the next samples. Prompts run when the first of their samples has a slot."""
        free = deque(slot for slot, occupant in enumerate(self.occupants) if occupant is None)
        while free and (self.waiting or (self.queue and self.places)):
            if not self.waiting:
                self._prefill(min(-(-len(free) // self.wanted.group), len(self.places)))
            slots, places, uniforms = [], [], []
            while free and self.waiting:
                first, slot = self.waiting[0], free.popleft()
                self.occupants[slot] = Occupant(first.number, first.sample, slot)
                slots.append(slot)
                places.append(first.place)
                uniforms.append(first.uniform_TG[:, first.sample])
                first.sample += 1
                if first.sample == self.wanted.group:
                    self.waiting.popleft()
            assert self.sequences is not None
            uniform_NT = sent(torch.stack(uniforms), self.device)
            self.sequences.put(self._indices(slots), self._indices(places), uniform_NT)

    def _prefill(self, most: int) -> None:
        """At least one of the next prompts, `most` of them at most."""
        prompts = next(self.pace.parts([self.wanted.prompts[number] for number in islice(self.queue, most)]))
        numbers = [self.queue.popleft() for _ in prompts]
        prefilled = prefill(self.sampler, prompts, self.pad_id, self.device)
        if self.sequences is None:
            self.sequences = self.opened(prefilled)
        for number in numbers:
            self.place_of[number] = self.places.popleft()
            generator = torch.Generator().manual_seed(self.wanted.seeds[number])
            uniform_TG = torch.rand((self.most, self.wanted.group), generator=generator)
            self.waiting.append(Waiting(number, self.place_of[number], uniform_TG))
        self.sequences.put_prompts(self._indices([self.place_of[number] for number in numbers]), prefilled)

    def _launch(self) -> bool:
        """One block of steps, if a sequence may have a token to write."""
        live = [occupant for occupant in self.occupants if occupant is not None]
        steps = min(self.pace.steps, max((self.most - occupant.steps for occupant in live), default=0))
        if steps <= 0:
            return False
        sequences = self.sequences
        assert sequences is not None
        # The last token runs, too, because the host does not know that it is the last one.
        longest = max(min(occupant.steps + steps, self.most) for occupant in live)
        width = sequences.width(rounded_up(longest, self.pace.width))
        rows = self._compacted(len(live), longest)

        def step() -> None:
            sequences.step(rows, width)

        for _ in range(steps):
            self.graphs((rows, width, sequences.options), step)
        for occupant in live:
            occupant.steps += steps
        self.looks.append((list(self.occupants), sequences.ends(self.recent)))
        return True

    def _compacted(self, live: int, longest: int) -> int:
        """Rows that the next steps take. Where fewer are enough, sequences from the end move into free slots."""
        size = len(self.occupants)
        rows = min(_at_least(live, self.pace.rows), size)
        beyond = [slot for slot in range(rows, size) if self.occupants[slot] is not None]
        if beyond:
            free = [slot for slot in range(rows) if self.occupants[slot] is None][: len(beyond)]
            assert self.sequences is not None
            self.sequences.move(self._indices(beyond), self._indices(free), longest)
            for source, target in zip(beyond, free, strict=True):
                occupant = self.occupants[source]
                assert occupant is not None
                occupant.slot = target
                self.occupants[target], self.occupants[source] = occupant, None
        return rows

    def _look(self) -> None:
        """Take out what had ended when the oldest block that was not looked at ended."""
        occupants, ends = self.looks.popleft()
        assert self.sequences is not None
        tokens_S, *seen = (told.tolist() for told in ends.read())
        for slot, (occupant, tokens) in enumerate(zip(occupants, tokens_S, strict=False)):
            if occupant is None or self.occupants[occupant.slot] is not occupant:
                continue
            if self.stops is not None:
                written_S, last_ST = seen
                tokens = self._stopped(occupant, written_S[slot], last_ST[slot]) or tokens
            if tokens < 0:
                continue
            self.occupants[occupant.slot] = None
            samples = self.found[occupant.number]
            samples[occupant.sample] = OnHost(self.sequences.recorded(occupant.slot, tokens))
            if len(samples) == self.wanted.group:
                self.complete.append(occupant.number)
                self.places.append(self.place_of.pop(occupant.number))

    def _stopped(self, occupant: Occupant, written: int, last: Sequence[int]) -> int | None:
        """How many tokens it has with the one that completes a stop string, of `written`, of which `last` are last."""
        assert self.stops is not None
        before = len(occupant.tokens)
        new = written - before
        assert new <= len(last)
        occupant.tokens += last[len(last) - new :]
        return self.stops.first_end(occupant.tokens, before)

    def _sampled(self, recorded: OnHost) -> Sampled:
        columns = recorded.read()
        return columns[0], report_of(columns, self.sampler.head, self.wanted.num_logprobs)

    def _indices(self, numbers: Sequence[int]) -> Tensor:
        return sent(torch.tensor(numbers), self.device)


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _at_least(count: int, rows: Sequence[int]) -> int:
    return next((n for n in rows if n >= count), rounded_up(count, rows[-1]))
