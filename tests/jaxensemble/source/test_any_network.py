"""Random networks: the source computes the network's calls."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxensemble.network.network import Network, Ref, Slice
from tests.helpers.sketch import Sketch, X, assert_same, draw, run_both

NAMES = ("a", "b", "0", "1", "2", "my-block", "class", "long_name_for_a_child_module")


KINDS = ("module", "module", "sequence", "mapping")


class Drawn:
    """A random network: values of shape [3, 4], modules entered and left at will, layers of any module."""

    def __init__(self, data: st.DataObject):
        self.pick = lambda items: data.draw(st.sampled_from(list(items)))
        self.sketch = Sketch("Random", self.pick(KINDS))
        self.values: list[Ref] = [X, Ref("y")]
        self.paths: list[str] = [""]

    def build(self, size: int) -> Network:
        self._fill("", size)
        outputs = tuple({self.pick(self.values).name: None for _ in range(2)})
        return self.sketch.network((X, Ref("y")), [Ref(name) for name in outputs])

    def _fill(self, path: str, size: int) -> None:
        for _ in range(size):
            self.pick([self._call, self._call, self._enter, self._repeat, self._number])(path, size)

    def _child(self, path: str) -> str:
        name = self.pick(NAMES)
        return f"{path}.{name}" if path else name

    def _enter(self, path: str, size: int) -> None:
        again = [p for p in self.paths if p]
        inner = self.pick(again) if again and self.pick([True, False]) else self._child(path)
        if inner in self.sketch.layers or inner in self.sketch.variables or size < 2 or path.count(".") > 3:
            return
        class_name, kind = self.sketch.modules.get(
            inner, (self.pick(("Block", "Cell", "Sequential")), self.pick(KINDS))
        )
        self.paths.append(inner)
        if self.pick([True, True, False]):
            with self.sketch.inside(inner, class_name, kind):
                self._fill(inner, size - 2)
        else:  # left and entered again under one name
            times = dict(self.sketch.times)
            with self.sketch.inside(inner, class_name, kind):
                self._fill(inner, size - 2)
            self.sketch.times = times

    def _repeat(self, path: str, size: int) -> None:
        """Adds a block like others, with other numbers, and with a child that only some of them have."""
        s, x, block = self.sketch, self.pick(self.values[-2:]), self._free(path)
        width, bound, times = self.pick((3, 5)), self.pick((0.5, 2.0)), self.pick((1, 1, 2))
        has_gate, is_chain, is_residual, is_shifted = (self.pick((True, False)) for _ in range(4))
        activation = self.pick(("nnx.relu", "jnp.tanh", None))
        for _ in range(times):
            with s.inside(block, "Repeated"):
                y = s.linear(f"{block}.grow", x, 4, width)
                with s.inside(f"{block}.body", "Body", "sequence" if is_chain else "module"):
                    y = s.linear(f"{block}.body.0", y, width, width)
                    with s.inside(f"{block}.body.1", "Clip", "function"):
                        y = s.call("jnp.clip", y, -bound, bound)
                    y = s.linear(f"{block}.body.2", y, width, 4)
                    if activation:
                        with s.inside(f"{block}.body.3", "Activation", "function"):
                            y = s.call(activation, y)
                if is_shifted:
                    y = s.call("jnp.roll", s.call("+", y, s.variable(f"{block}.mask", (4,), "constant")), 1, axis=1)
                if has_gate:
                    x = s.linear(f"{block}.gate", x, 4, 4)
                x = s.call("+", y, x) if is_residual else y
        self.values.append(x)

    def _number(self, path: str, size: int) -> None:
        """Adds blocks with numbered names, called in turn, some with all earlier values, some with gaps."""
        s, x, holder = self.sketch, self.pick(self.values[-2:]), self._free(path)
        found: list[Any] = [x]
        is_dense, gap = self.pick((True, False)), self.pick((2, 9, 9))
        with s.inside(holder, holder.rpartition(".")[2].title()):
            for k in range(5):
                block = f"{holder}.block{k + (k > gap)}"
                with s.inside(block, "Numbered"):
                    y = s.call("jnp.concatenate", [*found], axis=-1) if is_dense and k else found[-1]
                    y = s.linear(f"{block}.fc", y, 4 * len(found) if is_dense else 4, 4)
                found.append(s.call("nnx.relu", y))
        self.values.append(found[-1])

    def _call(self, path: str, size: int) -> None:
        s, x, y = self.sketch, self.pick(self.values[-3:]), self.pick(self.values[-3:])
        kinds = ["linear", "linear", "relu", "tanh", "+", "*", "variable", "reshape", "stack", "parts", "nothing"]
        match self.pick(kinds):
            case "linear":
                out = self._layer(path, x)
            case "relu":
                with s.inside(self._free(path), "ReLU"):
                    out = s.call("nnx.relu", x)
            case "tanh":
                out = s.call("jnp.clip", s.call("jnp.tanh", x), -0.5, self.pick([0.5, 0.25]))
            case "variable":
                name = self._free(path)
                out = s.call("+", s.variable(name, (4,)), x)
            case "reshape":
                out = s.call(".reshape", x, s.call(".shape", y, 0), -1)
            case "stack":
                out = s.call("[]", s.call("jnp.concatenate", [x, y], axis=1), (Slice(), Slice(None, 4)))
            case "parts":
                whole = self.pick([s.call("jnp.split", x, 2, axis=-1), s.call(".reshape", x, -1, 2, 2)])
                before = (Slice(), Slice()) if whole.name != f"v{len(s.calls) - 2}" else ()
                halves: list[Any] = [
                    s.call("[]", whole, (*before, k) if before else k) for k in self.pick([(0, 1), (1, 0)])
                ]
                out = s.call("jnp.concatenate", halves, axis=-1)
            case "nothing":
                s.linear(self._free(path), x, 4, 4)
                return
            case operator:
                out = s.call(operator, x, y)
        self.values.append(out)

    def _free(self, path: str) -> str:
        names = [self._child(path), f"{path}.extra{len(self.sketch.calls)}".lstrip(".")]
        return next(n for n in names if not self._is_taken(n))

    def _is_taken(self, path: str) -> bool:
        held = [*self.sketch.layers, *self.sketch.variables, *self.sketch.modules]
        return any(p == path or p.startswith(path + ".") for p in held)

    def _layer(self, path: str, x: Ref) -> Ref:
        square = [path for path, layer in self.sketch.layers.items() if set(layer.options.values()) == {4}]
        if square and self.pick([True, False, False]):
            return self.sketch.call(f"layer:{self.pick(square)}", x)
        return self.sketch.linear(self._free(path), x, 4, 4)


@settings(max_examples=15)
@given(data=st.data())
def test_any_network_computes_what_its_calls_say(data: st.DataObject) -> None:
    network = Drawn(data).build(data.draw(st.integers(2, 7)))
    x, y = draw(3, 4), draw(3, 4) + 1
    _, actual, expected = run_both(network, x, y, at_once=False)
    assert_same(actual, expected)
