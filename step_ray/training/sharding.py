"""A model in parts: handed out by rank 0, which alone reads it, and gathered there again.

Takes two builders of one model (whole, and empty on the meta device) and how it is sharded, gives
it with its weights. Only rank 0 ever holds it whole, on CPU, and gives each weight away as it is
sent; the others hold their shares. It knows neither LoRA nor folders (trainee.py, student.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from step_ray.errors import StepRayError

Weights: TypeAlias = dict[str, tuple[str, torch.dtype]]
"""Name of each parameter -> the first name that it goes by (tied weights have several), its type"""


def load_in_shards(
    whole: Callable[[], Any],
    empty: Callable[[], Any],
    shard: Callable[[Any], None],
    device: torch.device,
) -> Any:
    """Build a model whose weights lie in shards on all ranks; all call it together.

    Weights, buffers, their types and which of them are tied are those of rank 0, whatever the
    config says: a checkpoint may have two different weights where the config ties them.

    Args:
        whole: gives the model with its weights on CPU; called on rank 0 only.
        empty: gives the same model on the meta device.
        shard: applies FSDP2 to the empty model.
        device: where the shares lie.

    Raises:
        StepRayError: what `whole` raised on rank 0, raised on all ranks.
    """
    source, weights = _read(whole, device)
    model = empty()
    _adopt(model, weights)
    shard(model)
    _fill(model, source, weights, device)
    return model


def _read(whole: Callable[[], Any], device: torch.device) -> tuple[Any, Weights]:
    """The model on rank 0, None on the others; and what all have to know of it."""
    source = None
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            source = whole()
            told = [_weights_of(source)]
        except StepRayError as exc:
            told = [exc]
    # the others wait here for as long as reading takes
    dist.broadcast_object_list(told, src=0, device=device)
    if isinstance(told[0], StepRayError):
        raise told[0]
    return source, told[0]


def _weights_of(model: nn.Module) -> Weights:
    first: dict[int, str] = {}
    return {
        name: (first.setdefault(id(parameter), name), parameter.dtype)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _adopt(model: nn.Module, weights: Weights) -> None:
    """Give the parameters of an empty model the types and the ties of the whole one."""
    own = dict(model.named_parameters(remove_duplicate=False))
    assert own.keys() == weights.keys(), f"other weights: {own.keys() ^ weights.keys()}"
    made: dict[str, nn.Parameter] = {}
    for name, (first, dtype) in weights.items():
        if first not in made:
            old = own[name]
            made[first] = nn.Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)
        _put(model, name, made[first])


def _fill(model: nn.Module, source: Any, weights: Weights, device: torch.device) -> None:
    """Replace the empty shares by those of rank 0's weights, one weight at a time."""
    given = dict(source.named_parameters()) if source is not None else {}
    shares: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        full = _give_away(given, name, parameter, device)
        share = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        shares[name] = nn.Parameter(share, requires_grad=parameter.requires_grad)
    for name, (first, _) in weights.items():
        _put(model, name, shares[first])
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        value = _give_away(buffers, name, buffer, device)
        dist.broadcast(value, src=0)
        _put(model, name, value)


def _give_away(
    given: Mapping[str, Tensor], name: str, like: Tensor, device: torch.device
) -> Tensor:
    """A tensor of rank 0, whose memory it leaves; on the others one to be written to."""
    if not given:
        # whole in name only: on CPU, pages that nothing is written to take no memory
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    value = given[name].data
    given[name].data = value.new_empty(0)
    return value.to(device).contiguous()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module | None, *, trained_only: bool = False) -> None:
    """Copy the weights of a model on all ranks into a whole one on rank 0, one at a time.

    They take the type that they have there. All ranks call it together.

    Args:
        model: the model in training; sharded, replicated or on one rank.
        into: the same model on CPU, for rank 0; None on the others.
        trained_only: leave out what is frozen.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    targets = dict(into.named_parameters()) if into is not None else {}
    for name, parameter in bare.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if into is not None:
            targets[name].copy_(full)
