"""How many operations a function launches on a device, and how many bytes they read and write.

The rule, the same for whatever is counted:

- One operation of PyTorch's dispatcher is one launch, once composite operations have come apart: `linear` becomes
  `addmm`, `reshape` a `clone` where it must copy, `1 / x` a `reciprocal` and a `mul`, `matmul` of four dimensions a
  `bmm` and a `clone` of each operand that cannot be viewed as three-dimensional. Layer norm, GELU, fused attention,
  `addmm` and convolution (with their biases) are one each.
- What launches nothing is free: operations that return views (by their schema, or because the result lies in the
  memory of an argument that is only read), allocations (`empty*`), reading a number back, and whatever has results
  without elements.
- An operation of another library (`torch.ops.<library>.<name>`) is one launch too, and what it calls inside is not
  seen: where it is several kernels, say so with `launches`.
- What an operation reads and what it returns count, elements times their size; a dimension of stride 0 (`expand`)
  counts once. What is changed in place counts as read and as written, what is overwritten (`out=`, `copy_`, `fill_`)
  as written. `gather`, `index` and their like read as much of their source as they return, `scatter_` and its like
  touch as much of their target as they bring. Within an operation each argument is read once, and no cache is thought
  of.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {
    "_local_scalar_dense",
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}
GIVES_ONLY_A_SHAPE = {
    "full_like",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones_like",
    "rand_like",
    "randn_like",
    "zeros_like",
}
OVERWRITES = {"copy_", "exponential_", "fill_", "normal_", "random_", "uniform_", "zero_"}
READS_WHAT_IT_RETURNS = {"embedding", "gather", "index", "index_select", "take"}
TOUCHES_WHAT_IT_BRINGS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}


@dataclass(frozen=True)
class Counts:
    """Launches, and bytes read and written, in all and by the operation's name: (launches, bytes)."""

    operations: int
    bytes: int
    by_operation: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        rows = [*sorted(self.by_operation.items(), key=lambda row: -row[1][1]), ("all", (self.operations, self.bytes))]
        return "\n".join(f"{name:<48}{launches:>8}{size / 1e6:>12.3f} MB" for name, (launches, size) in rows)


def bytes_of(*tensors: Tensor) -> int:
    """Of the elements that are there: a dimension of stride 0 has one."""
    total = 0
    for tensor in tensors:
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride else min(size, 1)
        total += elements * tensor.element_size()
    return total


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@dataclass
class _Call:
    """One operation: the tensors it only reads, changes in place, overwrites, and returns afresh."""

    name: str
    is_view: bool
    read: list[Tensor] = field(default_factory=list)
    changed: list[Tensor] = field(default_factory=list)
    overwritten: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, operation: Any, args: tuple, kwargs: dict, results: Any) -> "_Call":
        name = operation._schema.name.removeprefix("aten::")
        call = cls(name, operation.is_view)
        for index, argument in enumerate(operation._schema.arguments):
            tensors = tensors_in([args[index] if index < len(args) else kwargs.get(argument.name)])
            if argument.alias_info is None or not argument.alias_info.is_write:
                call.read += tensors
            elif argument.is_out or name in OVERWRITES:
                call.overwritten += tensors
            else:
                call.changed += tensors
        written = {id(tensor) for tensor in call.changed + call.overwritten}
        call.returned = [tensor for tensor in tensors_in(results) if id(tensor) not in written]
        return call

    @property
    def is_free(self) -> bool:
        targets = self.changed + self.overwritten + self.returned
        if self.name in FREE or not any(tensor.numel() for tensor in targets):
            return True
        if len(targets) > len(self.returned):
            return False
        return self.is_view or storages(self.returned) <= storages(self.read)

    @property
    def bytes(self) -> int:
        written = bytes_of(*self.overwritten, *self.returned)
        if self.name in GIVES_ONLY_A_SHAPE:
            return written
        if self.name in READS_WHAT_IT_RETURNS:
            return 2 * written + bytes_of(*self.read[1:])
        if self.name in TOUCHES_WHAT_IT_BRINGS:
            return bytes_of(*self.read) + bytes_of(self.read[-1])
        return written + bytes_of(*self.read) + 2 * bytes_of(*self.changed)


class _OperationCounter(TorchDispatchMode):
    def __init__(self, launches_of: Mapping[str, int]):
        super().__init__()
        self.launches_of = launches_of
        self.launches, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.namespace != "prim":
            with self:  # in inference mode, composite operations arrive whole
                results = operation.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        results = operation(*args, **kwargs)
        call = _Call.of(operation, args, kwargs, results)
        if not call.is_free:
            self.launches[call.name] += self.launches_of.get(call.name, 1)
            self.bytes[call.name] += call.bytes
        return results


def count(function: Callable[[], object], launches: Mapping[str, int] | None = None) -> Counts:
    """Run `function` and count what it launches and what it reads and writes.

    Args:
        launches: number of kernels behind operations of another library, by `library::name`, where it is not one.
    """
    with _OperationCounter(launches or {}) as counter:
        function()
    by_operation = {name: (number, counter.bytes[name]) for name, number in counter.launches.items()}
    return Counts(counter.launches.total(), counter.bytes.total(), by_operation)
