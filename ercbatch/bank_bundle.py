"""A bundle with one's own demonstrations: `ercbatch bank build`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ercbatch.bank import INDEX, TEXTS, VECTORS, DemonstrationBank, read_examples
from ercbatch.bundle import BundleInfo, find_bundle, open_bundle, write_bundle
from ercbatch.errors import UsageError
from ercbatch.labeler import open_retriever
from ercbatch.onnx_scorer import available_threads


def rebuild_with_examples(
    examples: Path,
    name: str,
    output: Path,
    label_set: str | None,
    demonstrations: int,
    *,
    force: bool,
) -> tuple[int, bool]:
    """Write bundle `name` to `output` with these examples as its bank.

    Returns how many there are, and whether the bundle's model was trained with as many as a
    question now shows.

    Raises:
        InputError: a bad example, or a label outside the label set.
        BundleError, UsageError: the bundle or the output is not usable.
    """
    bundle = open_bundle(find_bundle(name))
    if output.exists() and output.resolve() == bundle.folder.resolve():
        raise UsageError(f"{output} is the bundle to start from: choose another --output")
    labels = bundle.info.label_set(label_set)
    found = read_examples(examples, labels)
    encoder = open_retriever(bundle, available_threads()).encoder
    bank = DemonstrationBank(found, encoder.encode([d.text for d in found]))
    # The figures of the old bundle were not measured with these demonstrations.
    info = replace(
        bundle.info,
        label_sets=(labels, *(s for s in bundle.info.label_sets if s != labels)),
        demonstrations=demonstrations,
        quality={},
        data=(*bundle.info.data, f"demonstrations: {len(found):,} examples of {examples.name}"),
    )

    def fill(part: Path) -> BundleInfo:
        for file in bundle.info.files:
            if file not in (TEXTS, VECTORS, INDEX):
                shutil.copyfile(bundle.path(file), part / file)
        bank.save(part)
        return info

    write_bundle(output, fill, force=force)
    return len(found), demonstrations <= bundle.info.demonstrations_trained
