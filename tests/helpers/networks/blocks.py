"""Networks of blocks that have one class, and differ in numbers or steps."""

from typing import Any

from jaxensemble.network.network import Network
from tests.helpers.sketch import Sketch, X


def wide() -> Network:
    """Blocks whose numbers have little in common."""
    s = Sketch("Wide")
    y = X
    for k, (size, axis) in enumerate(((3, 0), (5, 1), (3, 1))):
        with s.inside(f"block{k}", "Block"):
            y = s.linear(f"block{k}.grow", y, 4, size)
            y = s.linear(f"block{k}.shrink", y, size, 4)
            y = s.call("jnp.flip", s.call("jnp.cumsum", y, axis=axis), axis)
    return s.network((X,), y)


def residual_blocks() -> Network:
    """Blocks of which some add their input; an option of an inner class makes some shrink."""
    s = Sketch("MobileNet")
    y = X
    with s.inside("blocks", "Sequential", "sequence"):
        for k, (before, after, stride) in enumerate(((4, 8, 2), (8, 8, 1), (8, 8, 1), (8, 12, 1))):
            with s.inside(f"blocks.{k}", "Inverted"):
                x, path = y, f"blocks.{k}.conv"
                strides: dict[str, Any] = {"strides": (stride, stride)} if stride > 1 else {}
                with s.inside(path, "ConvNorm"):
                    y = s.conv(f"{path}.expand", y, before, 2 * before, 1, padding="VALID")
                    y = s.conv(
                        f"{path}.each", y, 2 * before, 2 * before, padding=1, feature_group_count=2 * before, **strides
                    )
                y = s.conv(f"blocks.{k}.project", y, 2 * before, after, 1)
                y = s.call("+", x, y) if before == after else y
    return s.network((X,), y)


def residual_blocks_with_parts() -> Network:
    """Blocks of which some add their input; all return an earlier value as well."""
    s = Sketch("Parts")
    y, parts = X, []
    for k, (before, after) in enumerate(((4, 6), (6, 6), (6, 3), (3, 3))):
        with s.inside(f"block{k}", "Block"):
            x, part = y, s.linear(f"block{k}.first", y, before, after)
            y = s.linear(f"block{k}.second", part, after, after)
            y = s.call("+", x, y) if before == after else y
            parts.append(part)
    return s.network((X,), (y, *parts))


def kernels() -> Network:
    """Convolutions of several sizes with padding to match, and a scale for each feature."""
    s = Sketch("Kernels")
    y = X
    for k, (size, width) in enumerate(((3, 4), (1, 8), (5, 4))):
        with s.inside(f"block{k}", "Block"):
            padding = "VALID" if size == 1 else size // 2
            y = s.conv(f"block{k}.conv", y, 12 - width if k else 4, width, size, padding=padding)
            y = s.call("*", s.variable(f"block{k}.scale", (1, width)), y)
    return s.network((X,), y)


def dense() -> Network:
    """Layers that take the outputs of all earlier layers."""
    s = Sketch("Dense")
    found = [X]
    for k in range(1, 6):
        with s.inside(f"layer{k}", "DenseLayer"):
            y = s.call("jnp.concatenate", list(found), axis=-1) if k > 1 else X
            found.append(s.call("nnx.relu", s.linear(f"layer{k}.fc", y, 1 + 3 * k, 3)))
    return s.network((X,), s.call("jnp.concatenate", list(found), axis=-1))


def numbered(stem: str) -> Network:
    """Blocks with numbered names in a container of PyTorch's, and again in the network itself."""
    s = Sketch("Numbered")
    y = X
    with s.inside("layers", "Layers"):
        for k in range(4):
            with s.inside(f"layers.{stem}{k}", "Block"):
                y = s.call("nnx.relu", s.linear(f"layers.{stem}{k}.fc", y, 4, 4))
    for k in range(1, 5):
        with s.inside(f"{stem}{k}", "Block"):
            y = s.call("nnx.relu", s.linear(f"{stem}{k}.fc", y, 4, 4))
    return s.network((X,), y)


def named_alike() -> Network:
    """Layers with numbered names that are called one by one, and too few to be called in a loop."""
    s = Sketch("Alike")
    y = X
    for k in range(1, 5):
        y = s.call("jnp.tanh" if k % 2 else "nnx.relu", s.linear(f"fc{k}", y, 4, 4))
    for k in range(1, 4):
        y = s.linear(f"out{k}", y, 4, 4)
    return s.network((X,), y)


def bottlenecks() -> Network:
    s = Sketch("Bottlenecks")
    y = X
    for k, width in enumerate((4, 8, 8)):
        with s.inside(f"block{k}", "Gate"):
            y = s.linear(f"block{k}.grow", y, width, 4 * width)
            y = s.linear(f"block{k}.gate", y, 4 * width, width // 2)
            y = s.linear(f"block{k}.out", y, width // 2, 8)
            y = s.call(".reshape", s.call(".reshape", y, -1, 8 // width, width), -1, 8)
    return s.network((X,), y)


def activations() -> Network:
    """Chains of one class with different functions, or none, between or after their layers."""
    s = Sketch("Activations")
    y = X
    for k, (inner, last) in enumerate(
        (("nnx.relu", "nnx.hard_swish"), ("nnx.relu", None), (None, "jnp.tanh"), ("nnx.relu", "nnx.hard_swish"))
    ):
        with s.inside(f"block{k}", "LinearActivation", "sequence"):
            y = s.linear(f"block{k}.0", y, 4, 4)
            if inner:
                with s.inside(f"block{k}.1", "Inner", "function"):
                    y = s.call(inner, y)
            y = s.linear(f"block{k}.2", y, 4, 4)
            if last:
                with s.inside(f"block{k}.3", "Last", "function"):
                    y = s.call(last, y)
    return s.network((X,), y)


def windows() -> Network:
    """Blocks of which some shift their input and add a mask; some have one window, and cut nothing."""
    s = Sketch("Windows")
    y = X
    for k, (count, shift) in enumerate(((2, 0), (2, 1), (4, 2), (1, 0))):
        path = f"block{k}"
        with s.inside(path, "Window"):
            x = y
            y = s.linear(f"{path}.qkv", y, 4, 4)
            if shift:
                y = s.call("jnp.roll", y, -shift, axis=1)
            if count > 1:
                y = s.call("jnp.transpose", s.call(".reshape", y, -1, count, 8 // count, 4), (0, 2, 1, 3))
            y = s.call(".reshape", y, -1, 8, 4)
            if shift:
                mask = s.variable(f"{path}.mask", (8, 1), "constant")
                y = s.call("jnp.square", s.call("+", y, mask))
            y = s.linear(f"{path}.proj", y, 4, 4)
            if shift:
                y = s.call("jnp.roll", y, shift, axis=1)
            y = s.call("nnx.relu", s.linear(f"{path}.grow", y, 4, 8))
            y = s.call("+", x, s.linear(f"{path}.shrink", y, 8, 4))
    return s.network((X,), y)


def shortened_otherwise() -> Network:
    """Modules of one class that differ by steps that no flag can leave out."""
    s = Sketch("Otherwise")
    outs = []
    for k in range(3):
        with s.inside(f"a{k}", "ReadLater"):  # the step's input is read again
            y = s.linear(f"a{k}.fc", X, 4, 4)
            z = s.call("jnp.cos", y) if k == 1 else y
            outs.append(s.call("*", s.call("jnp.sin", s.call("+", y, z)), 2))
        with s.inside(f"b{k}", "TakesTwo"):
            y = s.linear(f"b{k}.fc", X, 4, 4)
            z = s.call("jnp.sin", X)
            y = s.call("*", y, z) if k == 1 else y
            outs.append(s.call("jnp.square", s.call("+", y, y)))
        with s.inside(f"c{k}", "GivesBoth"):
            y = s.linear(f"c{k}.fc", s.call("jnp.sin", X), 4, 4)
            outs += [y, s.call("jnp.cos", y)] if k == 1 else [y]
        with s.inside(f"d{k}", "EndsEarly"):
            y = s.linear(f"d{k}.fc", s.call("jnp.sin", X), 4, 4)
            outs.append(s.call("jnp.cos", s.call("jnp.tanh", y)) if k == 1 else y)
    return s.network((X,), tuple(outs))


def called_mappings() -> Network:
    """Containers with names for their children: called with few steps, with many, and as an item of a list."""
    s = Sketch("Mappings")
    y = X
    with s.inside("heads", "Heads", "mapping"):
        y = s.call("nnx.relu", s.linear("heads.head", y, 4, 4))
    with s.inside("features", "Features", "mapping"):
        for k in ("a", "b", "c", "d"):
            y = s.call("nnx.relu", s.linear(f"features.{k}", y, 4, 4))
    with s.inside("blocks", "Sequential", "sequence"):
        for k in range(2):
            with s.inside(f"blocks.{k}", "Item", "mapping"):
                y = s.linear(f"blocks.{k}.fc", y, 4, 4)
    return s.network((X,), y)
