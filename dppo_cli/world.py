"""One process, or several that train one policy together, through Accelerate."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from dppo_cli.errors import ConfigError


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes.

    Example: `World().sum(torch.tensor(3.0))` is 3 in one process, and 6 in each of two that both say 3.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """The processes that a launcher (accelerate launch, torchrun) has started.

        Raises ConfigError for variables of the environment that Accelerate cannot use.
        """
        try:
            state = PartialState(cpu=not torch.cuda.is_available())
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                "the environment (ACCELERATE_TORCH_DEVICE, RANK, WORLD_SIZE and the like) cannot be used: "
                f"{str(error).splitlines()[0]}"
            ) from None
        return World(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run folder and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, of each element; the value itself where there is only one process."""
        if self.size == 1:
            return value
        total: Tensor = reduce(value, reduction="sum")
        return total
