"""The public face of everything about ranks: the process group, collectives, models and data loaders."""

from typing import NoReturn

from dengine.comm.collectives import (
    all_gather_object,
    all_reduce,
    barrier,
    broadcast_object,
    progress,
    rank_zero_first,
)
from dengine.comm.rank_zero import rank_zero_only
from dengine.data.loader import prepare_data_loader
from dengine.data.sampler import ElasticSampler
from dengine.distributed.process_group import process_group
from dengine.launch.mesh import mesh_sizes
from dengine.launch.world import World, world
from dengine.naming import refuse_name
from dengine.parallel.clipping import clip_grad_norm_
from dengine.parallel.evaluation import evaluating
from dengine.parallel.model import prepare_model, unwrap_model

__all__ = [
    "ElasticSampler",
    "World",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast_object",
    "clip_grad_norm_",
    "evaluating",
    "mesh_sizes",
    "prepare_data_loader",
    "prepare_model",
    "process_group",
    "progress",
    "rank_zero_first",
    "rank_zero_only",
    "unwrap_model",
    "world",
]

# A name of another library -> what to write instead.
_INSTEAD = {
    "auto_model": "it is prepare_model(model)",
    "auto_dataloader": "it is prepare_data_loader(loader), whose batch size is that of one rank",
    "auto_optim": "an optimizer stays as it is: build it after prepare_model(model)",
    "one_rank_first": "it is rank_zero_first()",
    "one_rank_only": "it is rank_zero_only",
    "initialize": "write `with process_group() as world:`",
    "finalize": "leaving `with process_group() as world:` does it",
    "init_process_group": "write `with process_group() as world:`",
    "destroy_process_group": "leaving `with process_group() as world:` does it",
    "Parallel": "write `with process_group() as world:`, and start the script by torchrun or srun",
    "spawn": "start the script by torchrun or srun",
    "get_rank": "it is world().rank",
    "get_world_size": "it is world().size",
    "get_local_rank": "it is world().local_rank",
    "device": "it is world().device",
    "backend": "it is world().backend",
    "is_main_process": "it is world().rank == 0",
    "is_initialized": "world().launcher says who started the ranks; one process needs no group",
    "all_gather": "it is all_gather_object(value)",
    "gather": "it is all_gather_object(value)",
    "broadcast": "it is broadcast_object(value, source)",
}


def __getattr__(name: str) -> NoReturn:
    refuse_name(__name__, name, _INSTEAD)
