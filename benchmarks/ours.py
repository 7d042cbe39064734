"""ercbatch as one engine among others: the process of it that `benchmarks.throughput` asks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from benchmarks.limit import open_peak
from benchmarks.packed import separate
from benchmarks.peers.engine import Engine, Order, serve
from ercbatch.dialogues import Dialogue, parse_dialogue
from ercbatch.errors import UsageError
from ercbatch.labeler import Labeler


class Ours(Engine):
    """A bundle that labels records, all of it: rendering, tokenizing, packing, scoring.

    With the form `separate` one run for each prompt, without packs.
    """

    packages = ("ercbatch", "onnxruntime")

    def __init__(self, order: Order) -> None:
        self._labeler = Labeler(order.source, scores=True, threads=order.threads)
        # Each bundle has a temperature of its own; here the model's probabilities are compared.
        self._labeler.engine = replace(self._labeler.engine, temperature=1.0)
        self._packed = order.form == "packed"
        self._threads = order.threads

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request `{"records": [...], "limit": ...}`.

        The answer has the seconds, the probabilities [labels] of each utterance with text and, if
        the request asks for the limit, the result of `Peak.rate`.
        """
        dialogues = [parse_dialogue(record) for record in request["records"]]
        began = time.perf_counter()
        rows = self._label(dialogues) if self._packed else self._separate(dialogues)
        answer = {"seconds": time.perf_counter() - began, "rows": rows}
        if self._packed and request["limit"]:
            try:
                peak = open_peak(
                    self._labeler, list(self._labeler.engine.packs(dialogues)), self._threads
                )
            except UsageError:  # a form without a limit
                return answer
            rate = peak.rate()
            answer |= {"token_seconds": rate.token, "read_seconds": rate.read}
        return answer

    def _label(self, dialogues: list[Dialogue]) -> list[list[float]]:
        return [
            list(answer.scores.values())
            for labelled in self._labeler.label(dialogues)
            for answer in labelled.labels
            if answer.scores is not None
        ]

    def _separate(self, dialogues: list[Dialogue]) -> list[list[float]]:
        answers, _ = separate(self._labeler, dialogues)
        return [row.tolist() for row in answers.values()]


if __name__ == "__main__":
    serve(Ours)
