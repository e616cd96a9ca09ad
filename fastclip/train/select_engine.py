"""Which engine trains: torch's, whole or sharded, or DeepSpeed's."""

from fastclip.models.clip import Model
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.engine import Engine
from fastclip.train.torch_engine import TorchEngine


def build_engine(model: Model, config: TrainConfig, world: World, samples: int = 0) -> Engine:
    """The engine that the configuration asks for; the arguments are those of `Engine`."""
    if config.distributed.deepspeed:
        # an installation of its own
        from fastclip.train.zero import DeepSpeedEngine

        return DeepSpeedEngine(model, config, world, samples)
    if config.distributed.fsdp:
        # its imports take a while
        from fastclip.train.fsdp import FSDPEngine

        return FSDPEngine(model, config, world, samples)
    return TorchEngine(model, config, world, samples)
