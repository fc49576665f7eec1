"""How ranks share a model: not at all (one process), as replicas (DDP), or in shards (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bt.engine.distributed import World


class Parallel:
    """One process, with nothing to share, and what the others do differently.

    model: bt.tasks.base.TaskModel on the rank's device. `forward`: what is called in training; a backward pass through
    it leaves the mean of the gradients over ranks.
    """

    def __init__(self, model: nn.Module, world: World):
        self.model, self.world = model, world
        self.forward: nn.Module = model

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around the forward and backward pass of a micro-batch: gradients are exchanged in the last one only."""
        return contextlib.nullcontext()

    def finish_backward(self) -> None:
        """After the last backward pass of a step."""

    def scaler(self, enabled: bool) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.world.device.type, enabled=enabled)

    def clip_gradients(self, largest: float) -> None:
        """Scales all gradients so that their norm, over the parameters of all ranks, is at most `largest`."""
        nn.utils.clip_grad_norm_(self.model.parameters(), largest)


class Replicas(Parallel):
    """DistributedDataParallel.

    find_unused_parameters: which parameters a loss reaches depends on the objectives (MLM alone leaves the poolers
    out), and a parameter without gradient must stay without one, neither moved nor decayed.
    """

    def __init__(self, model: nn.Module, world: World):
        super().__init__(model, world)
        ids = [world.device.index] if world.device.type == "cuda" else None
        self.forward = DistributedDataParallel(
            model,
            device_ids=ids,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,  # gradients lie in the buckets that are sent: 4 bytes a parameter less
            forward_sync_buffers=False,  # they are constants
        )

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.forward.no_sync()


class Shards(Parallel):
    """FSDP2: every rank keeps a share of each weight, its gradient and its optimizer state.

    A layer's weights are gathered when it runs and freed behind it; what is no layer (embeddings, projections, poolers,
    heads) is gathered once a step. While micro-batches are accumulated each rank holds whole gradients.
    fully_shard takes no scalars (ITC's temperature): every rank keeps those, and their gradients are averaged here.
    Weights and what ranks exchange stay fp32; autocast does the rest, as without shards.
    """

    def __init__(self, model: nn.Module, world: World):
        super().__init__(model, world)
        self.scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in (*layers(model), model):
            fully_shard(module, mesh=mesh, ignored_params=set(self.scalars))
        # The first module that runs is taken for the root, and an evaluator may call a part of the model first.
        fully_shard.state(model)._lazy_init()

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        return contextlib.nullcontext()

    def finish_backward(self) -> None:
        for parameter in self.scalars:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.size

    def scaler(self, enabled: bool) -> torch.amp.GradScaler:
        return ShardScaler(self.world.device.type, enabled=enabled)

    def clip_gradients(self, largest: float) -> None:
        # Every rank counts the scalars, which all of them have, as its share of the square.
        own = [local(p.grad) for p in self.model.parameters() if p.grad is not None and isinstance(p, DTensor)]
        shared = [parameter.grad for parameter in self.scalars if parameter.grad is not None]
        square = nn.utils.get_total_norm(own).double() ** 2
        if shared:
            square += nn.utils.get_total_norm(shared).double() ** 2 / self.world.size
        dist.all_reduce(square)
        # As in clip_grad_norm_.
        factor = (largest / (square.sqrt() + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_(own + shared, factor)


class ShardScaler(torch.amp.GradScaler):
    """GradScaler for shards beside scalars, which torch's does not take together: all ranks skip a step or none."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inv_scale)
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


def make_parallel(model: nn.Module, world: World, kind: str = "ddp") -> Parallel:
    """kind: trainer.parallel, "ddp" or "fsdp". One process alone has nothing to share either way.

    With fsdp the model's parameters are other tensors afterwards, so the optimizer is built on them later.
    """
    if world.size == 1:
        return Parallel(model, world)
    return {"ddp": Replicas, "fsdp": Shards}[kind](model, world)


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the encoders: what stands in a list or sequence and has parts of its own, but no such layers.

    Stages of hierarchical encoders hold layers in turn, and are not always called as a whole.
    """
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for part in module:
                found += layers(part) or [part] * any(True for _ in part.children())
        else:
            found += layers(module)
    return found


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every rank has all weights of a model, sharded or not, and may use any part of it on its own.

    Evaluation needs that: ranks have different numbers of batches there, and could not gather layers together.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield
        return
    model.set_reshard_after_forward(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, which every rank has, on the device of `other` and sharded as it is."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
