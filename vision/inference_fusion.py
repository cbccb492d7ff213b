"""Models made ready for inference: projections merged, norms folded, weights packed; the numbers stay the same."""

from timm.models import register_notrace_module
from torch import nn

from kernels.packed_linear import PackedLinear, can_pack

register_notrace_module(PackedLinear)


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Fuse every part of `model` that has a `fuse` method, pack its linear layers for the CPU, and return it in eval
    mode without gradients.

    The state dict changes (a merged projection takes the place of several), so load and save weights before fusing; a
    fused model refuses `train()`.
    """
    model.eval()
    for module in list(model.modules()):
        if module is not model and hasattr(module, "fuse"):
            module.fuse()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and can_pack(child):
                setattr(module, name, PackedLinear(child))
    model.fused = True
    return model.requires_grad_(False)


def refuse_training_when_fused(model: nn.Module, mode: bool) -> None:
    """Raise `RuntimeError` if a model that went through `fuse_for_inference` is put into training mode."""
    if mode and model.fused:
        raise RuntimeError("this model was fused for inference and cannot be trained; create it anew and do not fuse()")
