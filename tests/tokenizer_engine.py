"""An engine of which nothing is real but the tokenizer: for a gateway, which asks for nothing else of it."""

from typing import Any

from engine import blobs, manifest, registry
from engine.fingerprint import Fingerprint
from engine.store import Store


def publish(
    store: Store, name: str, tokenizer: dict[str, bytes], identity: dict[str, Any], vocab_size: int, max_seq_len: int
) -> str:
    """Gives the engine a name; its id, which follows from the identity.

    Args:
        tokenizer: tokenizer.json and tokenizer_config.json.
    """
    engine = manifest.Manifest(
        engine_id=manifest.engine_id(identity),
        identity=identity,
        source="test",
        created="2026-01-01T00:00:00Z",
        model=manifest.ModelFacts(
            architecture="llama",
            vocab_size=vocab_size,
            num_layers=1,
            hidden_size=8,
            num_heads=1,
            num_kv_heads=1,
            dtype="float32",
            kv_bytes_per_token=64,
            eos_token_ids=(1,),
            num_parameters=8,
        ),
        limits=manifest.Limits(max_batch_size=8, max_seq_len=max_seq_len, max_num_tokens=64),
        mapping=manifest.Parallelism(),
        fingerprint=Fingerprint("torch", "cpu"),
        ranks=(manifest.Rank(blobs.put_bytes(store, "program.json", b"{}"), ()),),
        tokenizer=tuple(blobs.put_bytes(store, file, data) for file, data in tokenizer.items()),
    )
    registry.publish(store, engine)
    registry.set_name(store, name, engine.engine_id)
    return engine.engine_id
