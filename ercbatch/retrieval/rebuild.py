"""A bundle with one's own demonstrations: `ercbatch bank build`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ercbatch.bundle.bundle import find_bundle, open_bundle, write_bundle
from ercbatch.bundle.folders import check_output
from ercbatch.bundle.manifest import CARD, CARD_JSON, MANIFEST, BundleInfo
from ercbatch.retrieval.bank import INDEX, TEXTS, VECTORS, build_bank, read_examples
from ercbatch.retrieval.retriever import open_retriever
from ercbatch.scoring.threads import available_threads


def rebuild_with_examples(
    examples: Path,
    name: str,
    output: Path,
    label_set: str | None,
    demonstrations: int,
    *,
    force: bool,
) -> tuple[int, str | None]:
    """Write bundle `name` to `output` with these examples as its bank.

    Returns how many there are, and what speaks against the new bundle, if anything.

    Raises:
        InputError: a bad example, or a label outside the label set.
        BundleError, UsageError: the bundle or the output is not usable.
    """
    bundle = open_bundle(find_bundle(name))
    check_output(output, MANIFEST, force=force, inputs=[bundle.folder, examples])
    labels = bundle.info.label_set(label_set)
    entries = read_examples(examples, labels)
    bank = build_bank(entries, open_retriever(bundle, available_threads()).encoder)
    # The figures of the old bundle, and its card, were not measured with these demonstrations.
    info = replace(
        bundle.info,
        label_sets=(labels, *(s for s in bundle.info.label_sets if s != labels)),
        demonstrations=demonstrations,
        quality=(),
        calibration={},
        data=(*bundle.info.data, f"demonstrations: {len(entries):,} examples of {examples.name}"),
    )

    def fill(part: Path) -> BundleInfo:
        for file in bundle.info.files:
            if file not in (TEXTS, VECTORS, INDEX, CARD, CARD_JSON):
                shutil.copyfile(bundle.path(file), part / file)
        bank.save(part)
        return info

    write_bundle(output, fill, force=force)
    return len(entries), _warning(bundle.info, labels.name)


_NOISE = 0.01
"""Weighted F1 that a validation split of a thousand utterances cannot tell from none."""


def _warning(info: BundleInfo, label_set: str) -> str | None:
    """What the bundle's own figures say against demonstrations, which not every model can use."""
    for quality in info.quality:
        f1_without, f1_with = quality.weighted_f1, quality.weighted_f1_with_demonstrations
        if quality.label_set != label_set or f1_without is None or f1_with is None:
            continue
        if f1_with > f1_without - _NOISE:
            return None
        return (
            f"demonstrations made the labels of bundle {info.name} worse on its {quality.title} "
            f"(weighted F1 {f1_with:.1%}, {f1_without:.1%} without)"
        )
    return f"what demonstrations do to the labels of bundle {info.name} has not been measured"
