"""The retriever: the demonstrations that a question shows, from a bundle's bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ercbatch.bundle import manifest
from ercbatch.bundle.bundle import Bundle, wrap_file_errors
from ercbatch.errors import BundleError
from ercbatch.labels import LabelSet
from ercbatch.retrieval.bank import DemonstrationBank
from ercbatch.retrieval.encoder import SentenceEncoder


@dataclass(frozen=True, slots=True)
class Retriever:
    """Finds demonstrations for utterances.

    Attributes:
        packages: names of the packages that find them, whose releases a run's manifest records.
    """

    packages: ClassVar[tuple[str, ...]] = ("hnswlib", "onnxruntime")

    encoder: SentenceEncoder
    bank: DemonstrationBank

    def restricted(self, labels: LabelSet) -> Retriever:
        """The retriever over the demonstrations that have a label in this set."""
        return Retriever(self.encoder, self.bank.restricted(labels))

    def demonstrations(self, texts: list[str], count: int) -> list[tuple[tuple[str, str], ...]]:
        """(text, label) pairs for each text, `count` of them where the bank has as many."""
        unique_texts = list(dict.fromkeys(texts))
        excluded = [[text] for text in unique_texts]
        neighbours = self.bank.nearest(self.encoder.encode(unique_texts), count, exclude=excluded)
        pairs = [tuple((d.text, d.label) for d in nearest) for nearest in neighbours]
        pairs_of = dict(zip(unique_texts, pairs, strict=True))
        return [pairs_of[text] for text in texts]


def open_retriever(bundle: Bundle, threads: int) -> Retriever:
    """The retriever of a bundle.

    Raises:
        BundleError: the bundle has none.
    """
    if manifest.ENCODER not in bundle.info.files:
        raise BundleError(
            f"{bundle.folder}: the bundle has no encoder to find demonstrations with: export it "
            "with --encoder and --examples"
        )
    with wrap_file_errors(bundle.folder):
        encoder = SentenceEncoder(
            bundle.path(manifest.ENCODER), bundle.path(manifest.ENCODER_TOKENIZER), threads=threads
        )
        digests = {name: digest.sha256 for name, digest in bundle.info.files.items()}
        bank = DemonstrationBank.load(bundle.folder, digests)
        if bank.vectors.shape[1] != encoder.dim:
            raise BundleError(
                f"{bundle.folder}: its demonstrations are not of its encoder: build the bank again"
            )
        return Retriever(encoder, bank)
