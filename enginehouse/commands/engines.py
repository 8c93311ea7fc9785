"""`enginehouse engines`: what a store holds, whether it is whole, and what becomes of it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import gc as collection
from engine import inventory, registry, signing
from engine import verify as verification
from engine.backends import open_store
from engine.blobs import blob_key
from engine.errors import DataLoss
from engine.manifest import Manifest
from engine.trust import Trust
from enginehouse.progress import Bars, format_bytes, stderr
from enginehouse.tables import print_json, print_table


def ls(store_url: str, *, as_json: bool) -> None:
    """All engines of a store; those that cannot be read are told on stderr."""
    store = open_store(store_url)
    engines, unreadable = inventory.engines(store)
    for broken in unreadable:
        stderr().print(f"engine {broken.engine_id} cannot be read: {broken.problem}")
    if as_json:
        print_json([dataclasses.asdict(engine) for engine in engines])
        return
    rows = [
        (
            engine.engine_id[:12],
            ", ".join(engine.models) or "-",
            engine.architecture,
            f"{engine.dtype} {engine.device}" + (", dummy weights" if engine.dummy_weights else ""),
            format_bytes(engine.size),
            engine.created[:16].replace("T", " "),
            ", ".join(engine.signers) or "-",
        )
        for engine in engines
    ]
    head = ("engine", "models", "architecture", "for", "size", "created", "signed by")
    print_table(head, rows, f"no engines in {store.url} yet: enginehouse build CHECKPOINT")


def inspect(engine: str, store_url: str, *, as_json: bool) -> None:
    """One engine, whole."""
    store = open_store(store_url)
    summary, manifest, data = inventory.inspect(store, registry.find_engine(store, engine))
    if as_json:
        print_json({**dataclasses.asdict(summary), "manifest": json.loads(data)})
        return
    needs = manifest.fingerprint
    wanted = [needs.backend, needs.backend_version, needs.device, f"operator set {needs.opset_version}"]
    wanted += [f"compute capability {needs.compute_capability}"] if needs.compute_capability else []
    wanted += [f"driver {needs.driver_floor}"] if needs.driver_floor else []
    limits = manifest.limits
    lines = {
        "engine": summary.engine_id,
        "models": ", ".join(summary.models) or "-",
        "signed by": f"{', '.join(summary.signers)} (not verified)" if summary.signers else "-",
        "source": summary.source,
        "created": summary.created,
        "architecture": f"{summary.architecture}, {summary.num_parameters:,} parameters, {summary.dtype}",
        **({"quantized": _quantization(manifest.quantization)} if manifest.quantization else {}),
        "needs": ", ".join(part for part in wanted if part),
        "limits": f"{limits.max_batch_size} requests, {limits.max_seq_len} tokens each, {limits.max_num_tokens} a step",
        "weights": _weights(manifest),
        "tokenizer": "yes" if manifest.tokenizer else "none: token ids in and out",
        "ranks": _ranks(manifest),
        **_networks(manifest),
        "size": format_bytes(summary.size),
    }
    for name, value in lines.items():
        print(f"{name:<13} {value}")
    print()
    native = {file.digest for rank in manifest.ranks for file in (*rank.native, *rank.kernels)}
    rows = [
        (file.name, format_bytes(file.size), file.digest[:12], "native code" if file.digest in native else "")
        for file in manifest.files()
    ]
    print_table(("file", "size", "sha256", ""), rows, "no files")


def _ranks(manifest: Manifest) -> str:
    """How many, and how the model is divided among several."""
    mapping = manifest.mapping
    return f"{mapping.world_size} (tp {mapping.tp_size}, pp {mapping.pp_size})" if len(manifest.ranks) > 1 else "1"


def verify(engine: str, store_url: str, *, deep: bool, trusted_keys: Sequence[Path], as_json: bool) -> None:
    """Looks at every file of an engine.

    Raises:
        FailedPrecondition: keys are given and none of them has signed it.
        DataLoss: a file is missing or not what its digest says.
    """
    trust = Trust.of_files(trusted_keys, native=True)
    store = open_store(store_url)
    manifest, signers = trust.examine(store, registry.find_engine(store, engine))
    with Bars(stderr(), manifest.engine_id[:12]) as bars:
        states = verification.verify(
            store, manifest, deep, lambda done, total: bars.update("read", done, total, "bytes")
        )
    if as_json:
        files = [
            {"name": state.file.name, "digest": state.file.digest, "state": state.state, "chunks": state.chunks}
            for state in states
        ]
        print_json({"engine_id": manifest.engine_id, "deep": deep, "signers": signers, "files": files})
    else:
        rows = [(state.file.name, format_bytes(state.file.size), _words(state)) for state in states]
        print_table(("file", "size", "state"), rows, "no files")
    bad = [state for state in states if state.state != "ok"]
    if bad:
        blobs = ", ".join(dict.fromkeys(blob_key(state.file.digest) for state in bad))
        raise DataLoss(
            f"engine {manifest.engine_id[:12]}: {len(bad)} of {len(states)} files are not as they should be. Delete {blobs} "
            f"in {store.url} as far as they are there, and build it again from {manifest.source}",
            reason="ENGINE_DAMAGED",
        )
    if not as_json:
        signed = f", signed by {', '.join(signers)}" if signers else ""
        how = "every byte is as it should be" if deep else "all files are there in their sizes"
        print(f"engine {manifest.engine_id[:12]}: {how}{signed}")


def rm(engine: str, store_url: str, *, as_json: bool) -> None:
    """Removes an engine that no name stands for."""
    store = open_store(store_url)
    engine_id = registry.find_engine(store, engine)
    inventory.remove_engine(store, engine_id)
    if as_json:
        print_json({"engine_id": engine_id})
    else:
        print(f"removed engine {engine_id[:12]}; what only it has used is deleted by: enginehouse engines gc")


def sign(engine: str, key: Path, store_url: str, *, as_json: bool) -> None:
    """Signs an engine."""
    private = signing.load_private(key)
    store = open_store(store_url)
    engine_id = registry.find_engine(store, engine)
    signing.sign(store, engine_id, private)
    if as_json:
        print_json({"engine_id": engine_id, "key_id": private.public.id})
    else:
        print(f"engine {engine_id[:12]} is signed by {private.public.id}")


def gc(store_url: str, grace: float, *, dry_run: bool, as_json: bool) -> None:
    """Collects garbage."""
    report = collection.collect(open_store(store_url), grace, dry_run=dry_run)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    verb = "would delete" if dry_run else "deleted"
    print(
        f"{verb} {_amount(report.deleted)}; kept {_amount(report.kept)}, and {_amount(report.young)} that are too young"
    )
    others = {
        "uploaded checkpoints": report.checkpoints,
        "old builds": report.builds,
        "signatures of removed engines": report.signatures,
        "pins of dead builds": report.pins,
        "interrupted uploads": report.partial,
    }
    for what, count in others.items():
        if count:
            print(f"{verb} {what}: {count}")


def _weights(manifest: Manifest) -> str:
    if any(rank.native for rank in manifest.ranks):
        return "in the plans"
    if not manifest.dummy_weights:
        return "in files"
    seeds = ", ".join(str(rank.random_seed) for rank in manifest.ranks)
    return f"dummy: random, made where it is loaded from seed {seeds}"


def _networks(manifest: Manifest) -> dict[str, str]:
    """What TensorRT was given for the first rank; nothing for a program."""
    network = manifest.ranks[0].network
    if network is None:
        return {}
    layers = ", ".join(f"{count} {kind.lower()}" for kind, count in network["layers"].items())
    profiles = "; ".join(
        f"{name} " + ", ".join(f"{dim} {least}-{most}" for dim, (least, _, most) in dims.items())
        for name, dims in network["profiles"].items()
    )
    return {"network": f"{network['attention']} attention, {layers}", "profiles": profiles}


def _amount(amount: collection.Amount) -> str:
    return f"{amount.count} file{'' if amount.count == 1 else 's'} ({format_bytes(amount.size)})"


def _words(state: verification.FileState) -> str:
    if not state.chunks:
        return state.state
    return f"{state.state}: chunk{'' if len(state.chunks) == 1 else 's'} {', '.join(map(str, state.chunks))}"


def _quantization(facts: Mapping[str, Any]) -> str:
    """The method, and what is packed and dequantized in which form or for which reason."""
    texts: dict[str, list[str]] = {}
    for kind in ("packed", "dequantized"):
        for name, text in facts.get(kind, {}).items():
            texts.setdefault(text if kind == "packed" else f"dequantized, since {text}", []).append(name)
    return "; ".join([facts.get("method", ""), *(f"{text}: {', '.join(names)}" for text, names in texts.items())])
