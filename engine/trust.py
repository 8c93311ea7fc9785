"""Which engines may be used here: who must have signed them, and whether code of theirs may run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine import registry, signing
from engine.errors import FailedPrecondition
from engine.manifest import Manifest
from engine.signing import PublicKey
from engine.store import Store


@dataclass(frozen=True)
class Trust:
    """The rule of one executor.

    Attributes:
        trusted: if there are any, only engines that one of them has signed are used.
        native: native code (plans, compiled kernels) also runs if nobody that is trusted has signed it.
    """

    trusted: tuple[PublicKey, ...] = ()
    native: bool = False

    @property
    def code(self) -> bool:
        """Whether code of an engine that `admit` has let in may run: one without plans is let in, but may have kernels."""
        return self.native or bool(self.trusted)

    @staticmethod
    def of_files(paths: Iterable[str | Path], native: bool = False) -> "Trust":
        """The rule with the public keys in PEM files and directories of them. Raises InvalidArgument naming the file."""
        return Trust(tuple(key for path in paths for key in signing.load_public(Path(path))), native)

    def admit(self, store: Store, engine_id: str) -> Manifest:
        """The engine's manifest, if it may be used here. Raises what `examine` does."""
        return self.examine(store, engine_id)[0]

    def examine(self, store: Store, engine_id: str) -> tuple[Manifest, tuple[str, ...]]:
        """The engine's manifest, from the very bytes that were verified, and ids of the trusted keys that have signed them.

        Nothing else of the engine is read.

        Raises:
            NotFound, DataLoss: no such engine, or its manifest is damaged.
            FailedPrecondition: it may not be used here. The reason is ENGINE_UNSIGNED, ENGINE_SIGNATURE_INVALID (a trusted
                key's signature is there and is none over this manifest) or NATIVE_UNTRUSTED.
        """
        manifest, data = registry.stored(store, engine_id)
        signers = signing.signed_by(store, engine_id, data, self.trusted)
        if self.trusted:
            if not signers:
                raise self._unsigned(store, engine_id)
        elif not self.code and (code := [file.name for rank in manifest.ranks for file in rank.native]):
            raise FailedPrecondition(
                f"engine {engine_id[:12]} holds native code ({', '.join(code)}), and nobody says that it can be trusted: "
                "start the executor with --trusted-keys FILE of those whose signed engines may run, or with --trust-native",
                reason="NATIVE_UNTRUSTED",
                metadata={"engine_id": engine_id},
            )
        return manifest, signers

    def _unsigned(self, store: Store, engine_id: str) -> FailedPrecondition:
        claims = signing.claims(store, engine_id)
        trusted = [key.id for key in self.trusted]
        if invalid := [key_id for key_id in claims if key_id in trusted]:
            problem, reason = (
                f"the signature by {', '.join(invalid)} does not fit its manifest",
                "ENGINE_SIGNATURE_INVALID",
            )
        else:
            who = f"only by {', '.join(claims)}" if claims else "by nobody"
            problem, reason = f"it is signed {who}", "ENGINE_UNSIGNED"
        return FailedPrecondition(
            f"engine {engine_id[:12]} is not signed by a trusted key: {problem}; trusted here: {', '.join(trusted)}. "
            f"Whoever holds such a key signs with: enginehouse engines sign {engine_id} --key FILE",
            reason=reason,
            metadata={"engine_id": engine_id},
        )
