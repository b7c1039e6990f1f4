"""Changes to a saved ensemble's manifest and network, and the error of each."""

from collections.abc import Callable
from typing import Any


def entry(content: dict[str, Any], path: str) -> dict[str, Any]:
    return next(entry for entry in content["origin"]["weights"]["entries"] if entry["path"] == path)


def source(**changes: Any) -> dict[str, Any]:
    return {
        "file": "a.pt",
        "sha256": "0" * 64,
        "taken": {"key": "", "prefix": "", "renamed": {}, "left_out": [], "not_held": []},
    } | changes


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda m: m.update(version=2), "expected format version 1, got 2"),
    "no version": (lambda m: m.pop("version"), "expected format version 1, got None"),
    "boolean version": (lambda m: m.update(version=True), "expected format version 1, got True"),
    "missing field": (lambda m: m.pop("members"), "`members` is missing"),
    "unknown field": (lambda m: m.update(run="me"), "'run' is not known"),
    "mistyped field": (lambda m: m.update(members="2"), r"manifest.json.members: expected int, got '2'"),
    "path separator": (
        lambda m: m["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "'../../etc/passwd' is no file of an artifact",
    ),
    "absolute path": (
        lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "'/etc/passwd' is no file of an artifact",
    ),
    "unlisted file": (lambda m: m["files"].pop("source.py"), "source.py is not listed"),
    "no hash": (lambda m: m["leaves"]["bn.mean"].update(sha256="x"), "'bn.mean': 'x' is no hash"),
    "kind": (lambda m: m["leaves"]["bn.mean"].update(kind="code"), "'bn.mean': expected one of params.*got 'code'"),
    "other kind": (
        lambda m: m["leaves"]["bn.mean"].update(kind="params"),
        r"'bn.mean': expected buffers \[2, 3\], got params \[2, 3\]",
    ),
    "dtype": (lambda m: m["leaves"]["bn.mean"].update(dtype="object"), "'object' is no dtype"),
    "other dtype": (
        lambda m: m["leaves"]["bn.mean"].update(dtype="int32"),
        r"'bn.mean': expected int32\[2, 3\], got float32\[2, 3\]",
    ),
    "keys as weights": (lambda m: m["leaves"]["bn.mean"].update(dtype="key<fry>"), "buffers cannot be random keys"),
    "weights as keys": (
        lambda m: m["leaves"]["drop.rngs.key"].update(dtype="uint32", shape=[2, 2]),
        r"'drop.rngs.key': expected rngs of random keys \[2\], got rngs \[2, 2\]",
    ),
    "negative shape": (lambda m: m["leaves"]["bn.mean"].update(shape=[2, -3]), r"\[2, -3\] is no shape"),
    "huge shape": (lambda m: m["leaves"]["bn.mean"].update(shape=[2, 10**30]), "is no shape"),
    "members": (lambda m: m.update(members=3), r"shape \[2, 3\] does not begin with the 3 members"),
    "no members": (lambda m: m.update(members=0), "at least one member; got 0"),
    "missing leaves": (
        lambda m: [m["leaves"].pop(name) for name in ("fc.kernel", "conv.bias")] and m.update(origin=None),
        r"'fc.kernel' is not needed[\s\S]*'conv.bias' is not needed|'conv.bias' is not needed[\s\S]*'fc.kernel'",
    ),
    "extra leaves": (
        lambda m: m["leaves"].update(a=m["leaves"]["bn.mean"], b=m["leaves"]["bn.mean"]),
        r"'a' is missing\n  'b' is missing",
    ),
    "claimed proof": (lambda m: m.update(verified=True), "`verified` is True, with no proof"),
    "failed proof": (
        lambda m: m.update(
            verified=True,
            proof={
                "date": "",
                "versions": {},
                "comparisons": [{"stage": "s", "case": "c", "error": 1.0, "limit": 0.5}],
                "x64": False,
            },
        ),
        "not passed: 's', 'c'",
    ),
    "proof with 64 bits": (
        lambda m: m.update(
            verified=True,
            proof={
                "date": "",
                "versions": {},
                "comparisons": [{"stage": "s", "case": "c", "error": 0.0, "limit": 0.5}],
                "x64": True,
            },
        ),
        "`x64` is False, with a proof",
    ),
    "claimed lineage": (
        lambda m: m.update(
            lineage={"proof": {"date": "", "versions": {}, "comparisons": [], "x64": False}, "trained": True}
        ),
        "lineage: not passed: nothing was compared",
    ),
    "empty proof": (
        lambda m: m.update(verified=True, proof={"date": "", "versions": {}, "comparisons": [], "x64": False}),
        "nothing was compared",
    ),
    "permutation": (
        lambda m: entry(m, "fc.kernel")["rearrangement"].update(order=[0, 0]),
        r"'fc.kernel': order \[0, 0\] is no permutation of \d axes",
    ),
    "split": (
        lambda m: entry(m, "fc.kernel")["rearrangement"].update(split=[7]),
        r"split \[7\] does not have the 48 elem",
    ),
    "flip": (lambda m: entry(m, "fc.kernel")["rearrangement"].update(flipped=[9]), r"flipped \[9\] must be some of"),
    "torch shape": (lambda m: entry(m, "fc.kernel").update(shape=[-4, -12]), r"shape \[-4, -12\] has a negative size"),
    "torch dtype": (lambda m: entry(m, "fc.kernel").update(dtype="qint8"), "'qint8' is no dtype of a tensor"),
    "key twice": (lambda m: entry(m, "fc.kernel").update(keys=["bn.weight", "fc"]), "'bn.weight' is given 2 times"),
    "no key": (lambda m: entry(m, "fc.kernel").update(keys=[]), "a tensor needs a key"),
    "path twice": (lambda m: entry(m, "fc.kernel").update(path="conv.kernel"), "'conv.kernel' is given 2 times"),
    "path of nothing": (lambda m: entry(m, "fc.kernel").update(path="sys.path"), "'sys.path', where there is no"),
    "path of another": (lambda m: entry(m, "shift").update(path="conv.bias"), "is stored|given 2 times"),
    "sources of others": (lambda m: m.update(sources=[source()]), "one of `sources` for each of 2 members, got 1"),
    "source without hash": (lambda m: m.update(sources=[source(sha256="x"), source()]), "'a.pt': 'x' is no hash"),
    "source with code": (
        lambda m: m.update(sources=[source(run="me"), source()]),
        r"manifest.json.sources.0: 'run' is not known",
    ),
    "layout": (lambda m: m["origin"].update(input_layout="__import__"), "input_layout: expected one of torch, NHWC"),
    "batch axis": (lambda m: m["origin"].update(batch_axis="os"), "batch_axis: expected int or a list or null"),
}


NETWORKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda n: n.update(format=7), "no network in JSON"),
    "call": (lambda n: n["calls"][-1].update(target="os.system"), "os.system"),
    "layer": (lambda n: n["layers"][0].update(type="nnx.jit"), "nnx.jit"),
    "option": (lambda n: n["layers"][0]["options"].update(in_features="__import__('os')"), "network.json"),
    "name": (lambda n: n.update(name="X:\n  import os\nclass Y"), "network"),
    "shape": (
        lambda n: n["layers"][0]["options"].update(out_features=5),
        r"'conv.bias': expected params \[2, 5\], got params \[2, 3\]",
    ),
    "huge": (lambda n: n["layers"][0]["options"].update(out_features=10**20), "do not fit"),
    "many layers": (
        lambda n: n["layers"][0].update(type="layers.LSTM", options={"num_layers": 10**9}),
        r"`num_layers` of conv: expected at most 2, the number of its arrays; got 1000000000",
    ),
    "no such layer": (lambda n: n["layers"].pop(), "there is no layer"),
}
