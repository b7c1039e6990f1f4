"""Every network by name, with the shapes of its inputs."""

from collections.abc import Callable

from jaxensemble.network.network import Network
from tests.helpers.networks import blocks, plain

CASES: dict[str, tuple[Callable[[], Network], list[tuple[int, ...]]]] = {
    "lenet": (plain.lenet, [(2, 8, 8, 1)]),
    "resnet": (plain.resnet, [(2, 8, 8, 3)]),
    "sequential": (plain.sequential, [(2, 4)]),
    "convolutional_sequential": (plain.convolutional_sequential, [(2, 2, 3, 3)]),
    "irregular_sequential": (plain.irregular_sequential, [(2, 4)]),
    "twice": (plain.twice, [(2, 4)]),
    "twice_differently": (plain.twice_differently, [(2, 4)]),
    "attention_twice": (plain.attention_twice, [(3, 4), (3, 4)]),
    "interleaved": (plain.interleaved, [(2, 4)]),
    "shared_elsewhere": (plain.shared_elsewhere, [(2, 4)]),
    "block_list": (plain.block_list, [(2, 4), (2, 4)]),
    "mapping": (plain.mapping, [(2, 4)]),
    "variables": (plain.variables, [(2, 4)]),
    "odd_names": (plain.odd_names, [(2, 4)]),
    "constants": (plain.constants, [(3, 4)]),
    "several_results": (plain.several_results, [(2, 4)]),
    "wide": (blocks.wide, [(2, 4)]),
    "residual_blocks": (blocks.residual_blocks, [(2, 8, 8, 4)]),
    "residual_blocks_with_parts": (blocks.residual_blocks_with_parts, [(2, 4)]),
    "kernels": (blocks.kernels, [(2, 8, 8, 4)]),
    "dense": (blocks.dense, [(2, 4)]),
    "numbered": (lambda: blocks.numbered("block_"), [(2, 4)]),
    "numbered_oddly": (lambda: blocks.numbered("b-"), [(2, 4)]),
    "named_alike": (blocks.named_alike, [(2, 4)]),
    "parts": (plain.parts, [(2, 3, 4)]),
    "parts_left_over": (plain.parts_left_over, [(2, 4)]),
    "arranged": (plain.arranged, [(2, 4, 3)]),
    "branches": (plain.branches, [(2, 4)]),
    "bottlenecks": (blocks.bottlenecks, [(2, 4)]),
    "recurrent": (plain.recurrent, [(3, 4)]),
    "activations": (blocks.activations, [(2, 4)]),
    "functions": (plain.functions, [(2, 4)]),
    "windows": (blocks.windows, [(2, 8, 4)]),
    "shortened_otherwise": (blocks.shortened_otherwise, [(2, 4)]),
    "called_mappings": (blocks.called_mappings, [(2, 4)]),
    "kept_axes": (plain.kept_axes, [(2, 3, 3, 4)]),
}
