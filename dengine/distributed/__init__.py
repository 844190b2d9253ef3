"""Ranks: who is there, how they talk, and how models and loaders are spread over them."""

from dengine.distributed.collectives import (
    all_gather_object,
    all_reduce,
    barrier,
    broadcast_object,
    progress,
    rank_zero_first,
)
from dengine.distributed.group import process_group
from dengine.distributed.loader import prepare_data_loader
from dengine.distributed.model import evaluating, prepare_model, unwrap_model
from dengine.distributed.rank_zero import rank_zero_only
from dengine.distributed.sampler import ElasticSampler
from dengine.distributed.world import World, world

__all__ = [
    "ElasticSampler",
    "World",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast_object",
    "evaluating",
    "prepare_data_loader",
    "prepare_model",
    "process_group",
    "progress",
    "rank_zero_first",
    "rank_zero_only",
    "unwrap_model",
    "world",
]
